"""What goes wrong on real machines: damaged files by the hundred, signals, kills, folders that go away."""

import faulthandler
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
import finetune
import mae_image
import mae_video
import multimae
import omni
from conftest import ROOT, TINY_IMAGE, TINY_VIDEO

VIDEOS = {"x.avi": "mpeg4", "x.mp4": "libx264", "x.webm": "libvpx-vp9", "x.mov": "mjpeg"}
IMAGES = ["x.jpg", "x.png", "x.gif", "x.webp", "x.bmp", "x.tif"]


def write_clip(path, codec="libx264", frames=20, size=(48, 64), pixels=None, times=None):
    """A drifting picture, or `pixels` in every frame; times: presentation times in ticks of 1/25 s."""
    picture = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    even = size[0] % 2 == size[1] % 2 == 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        for i in range(frames):
            image = np.roll(picture, i, 1) if pixels is None else pixels
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i if times is None else times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path):
    """-> pixels (T, H, W, 3), of an image (H, W, 3)."""
    if path.suffix in data.VIDEO:
        return data.read_clips(path, lambda n: mae_video.segment_views(n, 8, 1))[0][0]
    return data.read_image(path)


def damaged(content, rng):
    """Cut off, some bytes changed, or a stretch of bytes replaced or lost."""
    content, how = bytearray(content), rng.integers(4)
    place = int(rng.integers(len(content)))
    if how == 0:
        return bytes(content[:place])
    if how == 1:
        for _ in range(rng.integers(1, 30)):
            content[rng.integers(len(content))] = rng.integers(256)
    else:
        length = int(rng.integers(1, 200))
        content[place : place + length] = rng.bytes(length) if how == 2 else b""
    return bytes(content)


@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_damaged_files_are_read_or_named_and_never_crash_or_hang(name, tmp_path):
    source, path = tmp_path / name, tmp_path / f"damaged_{name}"
    if name in VIDEOS:
        write_clip(source, VIDEOS[name])
    else:
        picture = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(picture).save(source)
    good, rng, named = read(source).shape, np.random.default_rng(1), 0
    content = source.read_bytes()
    faulthandler.dump_traceback_later(120, exit=True)  # a decoder that hangs ends the tests
    try:
        for _ in range(60):
            path.write_bytes(damaged(content, rng))
            try:
                pixels = read(path)
                assert pixels.dtype == np.uint8 and pixels.ndim == len(good) and pixels.any()
            except data.BrokenFile as error:
                assert str(error)
                named += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert named > 0


TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("turn", TURNS)
def test_a_video_is_turned_as_its_phone_was_held(tmp_path, run, turn):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :16] = 255
    (tmp_path / "in" / "a").mkdir(parents=True)
    path = write_clip(tmp_path / "in" / "a" / "x.mp4", pixels=picture)
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44  # the track header's matrix: 16.16, the last column 2.30
    a, b, c, d = (v << 16 for v in TURNS[turn])
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    run(data, "shrink", "in", "out", "--short-side", 24)
    for pixels in (read(path)[0], read(tmp_path / "out" / "a" / "x.mp4")[0]):
        want = np.rot90(picture, -turn // 90)
        assert pixels.shape[0] / pixels.shape[1] == want.shape[0] / want.shape[1]
        step = want.shape[0] // pixels.shape[0]
        assert np.abs(pixels.astype(int) - want[::step, ::step]).mean() < 12


def test_odd_sizes_one_frame_and_uneven_frame_rates(tmp_path):
    assert read(write_clip(tmp_path / "odd.mp4", size=(35, 51))).shape == (8, 35, 51, 3)
    still = read(write_clip(tmp_path / "one.mp4", frames=1))
    assert still.shape[0] == 8 and (still == still[0]).all()
    # frames are counted, not timed: a pause in the video does not repeat a frame
    path = write_clip(tmp_path / "uneven.mp4", times=[i + 40 * (i > 9) for i in range(20)])
    uneven = data.read_clips(path, lambda n: np.arange(n)[None])[0][0]
    assert len(uneven) == 20 and all((a != b).any() for a, b in zip(uneven, uneven[1:]))


# ---- runs that are stopped -----------------------------------------------------------------------

LONG = [*TINY_IMAGE, "--epochs", 5000]


def start(tmp_path, flags, script="mae_image.py", until="update      5/"):
    """A long run, in its first updates."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    for line in process.stdout:
        if until in line:
            return process
    pytest.fail(f"the run ended before {until}")


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_two_runs_in_one_folder_are_refused_and_the_first_continues(toy, tmp_path, refused):
    first = start(tmp_path, [*LONG, "--data", toy, "--out", "same"])
    assert "another run writes to same" in refused(mae_image, "--resume", "--out", "same")
    first.terminate()
    text = first.communicate(timeout=60)[0]
    assert first.returncode == 130
    assert "resume with: python mae_image.py --resume --out same" in text, text


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_before_it_ends_a_run(toy, tmp_path, name):
    process = start(tmp_path, [*LONG, "--data", toy, "--workers", 2])
    os.killpg(process.pid, getattr(signal, name))  # a terminal sends it to the workers, too
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in text and "loader" not in text, text
    step = state(tmp_path / "runs/mae_image")["step"]
    hint = "resume with: python mae_image.py --resume --out runs/mae_image"
    assert f"stopped after update {step}; {hint}" in text and step >= 5


SCRIPTS = {
    "mae_image": (mae_image, TINY_IMAGE), "mae_video": (mae_video, TINY_VIDEO),
    "mae_st": (mae_video, [*TINY_VIDEO, "--model", "mae_st", "--repeat", 2]),
    "omni": (omni, [*TINY_VIDEO, "--images", "toy"]),
    "mixed": (omni, [*TINY_VIDEO, "--images", "toy", "--joint", "mixed"]),
    "multimae": (multimae, TINY_IMAGE),
    "finetune": (finetune, ["--mode", "scratch", *TINY_VIDEO[:-16], "--size", "24x1x2", "--workers", 0,
                            "--log-every", 1, "--clips", 1, "--drop-path", 0.2, "--mixup", 0.8,
                            "--erase", 0.5, "--repeat", 2, "--img-size", 16, "--rand-augment", 5]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_resumes_bit_for_bit(name, toy, tmp_path, run):
    """Killed at a random moment, resumed with other workers; weights, log and pictures are the same."""
    module, flags = SCRIPTS[name]
    (tmp_path / "toy").symlink_to(toy)
    flags = [*flags, "--data", "toy", "--epochs", 6, "--accum", 2, "--clip", 1, "--log-every", 1]
    run(module, *flags, "--out", "whole")
    script = f"{module.__name__}.py"
    process = start(tmp_path, [*flags, "--out", "killed", "--workers", 2], script, "update      2/")
    time.sleep(random.random() * 0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (tmp_path / "killed/checkpoint.pt").exists():
        run(module, "--resume", "--out", "killed", "--workers", 1)
    else:  # killed before the first checkpoint
        run(module, *flags, "--out", "killed")
    assert not list((tmp_path / "killed").glob(".*checkpoint.pt"))  # a half one
    a, b = (state(tmp_path / folder) for folder in ("whole", "killed"))
    assert a["step"] == b["step"]
    for key in ("model", "optimizer"):
        a_flat, b_flat = (torch.utils._pytree.tree_leaves(x[key]) for x in (a, b))
        for x, y in zip(a_flat, b_flat, strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, key
    logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "killed")]
    kept = ("step", "loss", "lr", "val_loss")
    logs = [[{k: r.get(k) for k in kept} for r in map(json.loads, log.splitlines())] for log in logs]
    assert logs[0] == logs[1]


def test_files_that_vanish_during_a_run_are_named_and_replaced(tmp_path):
    (tmp_path / "videos" / "a").mkdir(parents=True)
    for i in range(24):
        write_clip(tmp_path / "videos" / "a" / f"{i:02d}.mp4", frames=6, size=(32, 32))
    flags = [*TINY_VIDEO, "--data", "videos", "--batch", 4, "--epochs", 20, "--workers", 1]
    process = start(tmp_path, flags, "mae_video.py", "update     10/")
    for i in range(4):
        (tmp_path / "videos" / "a" / f"{i:02d}.mp4").unlink()
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "No such file" in text, text
    assert "files with problems: " in text


def test_a_run_whose_folder_is_removed_makes_it_again(toy, tmp_path):
    process = start(tmp_path, [*LONG, "--data", toy])
    shutil.rmtree(tmp_path / "runs")
    time.sleep(0.5)
    process.terminate()
    text = process.communicate(timeout=60)[0]
    assert "was removed, and is made again" in text, text
    assert state(tmp_path / "runs/mae_image")["step"] >= 5


def test_a_run_whose_folder_is_replaced_leaves_the_new_one_alone(toy, tmp_path, run):
    process = start(tmp_path, [*LONG, "--data", toy])
    (tmp_path / "runs/mae_image").rename(tmp_path / "old")
    run(mae_image, *TINY_IMAGE, "--data", toy)
    before = (tmp_path / "runs/mae_image/checkpoint.pt").read_bytes()
    process.terminate()
    text = process.communicate(timeout=60)[0]
    both = "was replaced by another run|another run writes to"  # as it had saved before, or not
    # it may be ending by itself when the signal arrives
    assert process.returncode in (2, -signal.SIGTERM) and re.search(both, text), text
    assert (tmp_path / "runs/mae_image/checkpoint.pt").read_bytes() == before


# ---- resources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module, flags", [(mae_image, TINY_IMAGE), (mae_video, TINY_VIDEO)])
def test_a_full_shared_memory_ends_a_run_with_one_line(module, flags, toy, refused, monkeypatch):
    def full(self):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # workers are forked, and have it
    text = refused(module, *flags, "--data", toy, "--workers", 2)
    assert "No space left on device" in text and "--workers 0" in text and "--shm-size" in text


def test_workers_that_cannot_be_started_are_one_line(toy, refused, monkeypatch):
    def fail(self):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(torch.multiprocessing.Process, "start", fail)
    text = refused(mae_image, *TINY_IMAGE, "--data", toy, "--workers", 2)
    assert "no workers can be started" in text and "--workers 0" in text


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files")])
def test_a_lack_of_memory_or_descriptors_is_not_a_broken_file(toy, refused, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(data, "LARGEST", 2**60)  # more than there is
    monkeypatch.setattr(av, "open", fail)
    assert "broken" not in refused(mae_video, *TINY_VIDEO, "--data", toy)


# ---- main() from a notebook ----------------------------------------------------------------------


def test_main_leaves_signals_threads_and_random_numbers_as_they_were(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").symlink_to(toy)
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD")

    def surroundings():
        handlers = [signal.getsignal(getattr(signal, name)) for name in names]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return handlers, mask, torch.get_num_threads(), threading.active_count(), os.getcwd()

    for module, flags in SCRIPTS.values():
        flags = [str(x) for x in [*flags, "--data", "toy", "--smoke", "--workers", 1]]
        before, numbers = surroundings(), torch.random.get_rng_state()
        numpys = np.random.get_state()[1].copy(), random.getstate()
        for _ in range(2):
            module.main(flags)
        assert surroundings() == before
        assert torch.equal(torch.random.get_rng_state(), numbers)
        assert (np.random.get_state()[1] == numpys[0]).all() and random.getstate() == numpys[1]


def test_workers_may_be_started_by_a_server(tmp_path):
    """Then they are no children of the run's process: Python 3.14's default on Linux."""
    (tmp_path / "x.jpg").write_text("no image")
    script = tmp_path / "script.py"
    script.write_text("import pathlib, torch\nimport data\n"
                      "if __name__ == '__main__':\n"
                      "    torch.multiprocessing.set_start_method('forkserver')\n"
                      "    options = {'batch_size': None, 'collate_fn': data.check_file}\n"
                      "    loader = data.start_loader([pathlib.Path('x.jpg')], 1, **options)\n"
                      "    assert 'broken' in data.take(loader)[0]\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, script], cwd=tmp_path, env=env).returncode == 0
