"""What goes wrong on real machines: damaged files, signals, kills, folders that go away."""

import faulthandler
import json
import multiprocessing
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from unittest.mock import Mock

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
from test_data import waves, write_clip

VIDEOS = {"x.avi": "mpeg4", "x.mp4": "libx264", "x.webm": "libvpx-vp9", "x.mov": "mjpeg"}
LONG = [*TINY_IMAGE, "--epochs", 5000]
TUNING = ("--mode scratch --size 24x1x2 --workers 0 --clips 1 --repeat 2 --drop-path 0.2 "
          "--mixup 0.8 --erase 0.5 --rand-augment 5").split()
SCRIPTS = {"mae_image": (mae_image, TINY_IMAGE), "mae_video": (mae_video, TINY_VIDEO),
           "mae_st": (mae_video, [*TINY_VIDEO, "--model", "mae_st", "--repeat", 2]),
           "omni": (omni, [*TINY_VIDEO, "--images", "toy"]),
           "mixed": (omni, [*TINY_VIDEO, "--images", "toy", "--joint", "mixed"]),
           "multimae": (multimae, TINY_IMAGE), "finetune": (finetune, [*TINY_VIDEO[:8], *TUNING])}
SHM = RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def read(path):
    """-> pixels (T, H, W, 3), of an image (H, W, 3)."""
    if path.suffix in data.VIDEO:
        return data.read_clips(path, lambda n: mae_video.views_of("segments", n, 8, 1, 1))[0][0]
    return data.read_image(path)


def damaged(content, rng):
    """Cut off, some bytes changed, or a stretch of bytes replaced or lost."""
    how, place, length = rng.integers([4, len(content), 200])
    if how == 0:
        return content[:place]
    if how == 1:
        changed = np.frombuffer(content, np.uint8).copy()
        changed[rng.integers(len(content), size=30)] = rng.integers(256, size=30)
        return changed.tobytes()
    return content[:place] + (rng.bytes(length) if how == 2 else b"") + content[place + length :]


@pytest.mark.parametrize("name", [*VIDEOS, "x.jpg", "x.png", "x.gif", "x.webp", "x.bmp", "x.tif"])
def test_damaged_files_are_read_or_named_and_never_crash_or_hang(name, tmp_path, request):
    path, rng, named = tmp_path / name, np.random.default_rng(1), 0
    if name in VIDEOS:
        write_clip(path, VIDEOS[name], waves(20))
    else:
        Image.fromarray(waves(1)[0]).save(path)
    good, content = read(path), path.read_bytes()
    request.addfinalizer(faulthandler.cancel_dump_traceback_later)
    faulthandler.dump_traceback_later(120, exit=True)  # a decoder that hangs ends the tests
    for _ in range(60):
        path.write_bytes(damaged(content, rng))
        try:
            pixels = read(path)
            assert pixels.dtype == np.uint8 and pixels.ndim == good.ndim and pixels.any()
        except data.BrokenFile as error:
            named += str(error) != ""
    assert named > 0


def test_a_video_is_turned_as_its_phone_was_held(tmp_path):
    path = write_clip(tmp_path / "x.mp4")
    upright, content = read(path), bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44  # the track header's matrix: 16.16, the last column 2.30
    struct.pack_into(">9i", content, place, 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    assert np.array_equal(read(path), np.rot90(upright, -1, axes=(1, 2)))


def start(tmp_path, flags, script="mae_image.py", until="update      5/"):
    """A long run, in its first updates."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    for line in process.stdout:
        if until in line:
            return process
    pytest.fail(f"the run ended before {until}")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_run_there_is_refused_and_a_signal_saves_the_first(toy, tmp_path, refused, name):
    process, removed = start(tmp_path, [*LONG, "--data", toy, "--workers", 2]), name == "SIGHUP"
    folder = tmp_path / "runs/mae_image"
    assert "another run writes to runs/mae_image" in refused(mae_image, "--resume")
    if removed:  # the run makes it again
        folder.rename(tmp_path / "gone")
    os.killpg(process.pid, getattr(signal, name))  # a terminal sends it to the workers, too
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in text and "loader" not in text, text
    step = torch.load(folder / "checkpoint.pt")["step"]
    hint = "resume with: python mae_image.py --resume --out runs/mae_image"
    assert f"stopped after update {step}; {hint}" in text and step >= 5
    assert ("runs/mae_image was removed, and is made again" in text) == removed


def surroundings():
    return ([signal.getsignal(number) for number in signal.Signals], os.getcwd(),
            signal.pthread_sigmask(signal.SIG_BLOCK, []), multiprocessing.active_children(),
            torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
            random.getstate(), torch.get_num_threads())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_resumes_bit_for_bit(name, toy, tmp_path, run):
    (tmp_path / "toy").symlink_to(toy)
    module, flags = SCRIPTS[name]
    flags = [*flags, "--data", "toy", "--epochs", 6, "--accum", 2, "--clip", 1, "--log-every", 1]
    run(module, *flags, "--out", "whole")
    flags = [*flags, "--out", "killed", "--workers"]  # resumed with another number of them
    process = start(tmp_path, [*flags, 2], f"{module.__name__}.py", "update      2/")
    time.sleep(random.random() * 0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (tmp_path / "killed/checkpoint.pt").exists():  # or killed before the first one
        flags = ["--resume", "--out", "killed", "--workers"]
    before = surroundings()
    run(module, *flags, 1)
    assert surroundings() == before  # in a notebook main() is one of many things
    assert not list((tmp_path / "killed").glob(".*checkpoint.pt"))  # a half one
    results = []
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        saved = torch.load(folder / "checkpoint.pt")
        log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        log = [[line.get(key) for key in ("step", "loss", "lr", "val_loss")] for line in log]
        results.append([log, saved["step"], saved["model"], saved["optimizer"]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_run_whose_folder_is_replaced_leaves_the_new_one_alone(toy, tmp_path, run):
    process = start(tmp_path, [*LONG, "--data", toy])
    (tmp_path / "runs/mae_image").rename(tmp_path / "old")
    run(mae_image, *TINY_IMAGE, "--data", toy)
    before = (tmp_path / "runs/mae_image/checkpoint.pt").read_bytes()
    process.terminate()
    text = process.communicate(timeout=60)[0]
    # it may be ending by itself when the signal arrives, and have saved before, or not
    assert process.returncode in (2, -signal.SIGTERM), text
    assert re.search("was replaced by another run|another run writes to", text), text
    assert (tmp_path / "runs/mae_image/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("place, method, outcome, words", [
    (torch.Tensor, "share_memory_", SHM, "No space left .*--workers 0.*--shm-size"),
    (torch.multiprocessing.Process, "start", OSError(24, "Too many open files"),
     "no workers can be started: .*Too many open files; try --workers 0"),
    (os, "getppid", [1] * 99, "the loader failed: .* exited unexpectedly")])  # the parent died
def test_failing_workers_are_one_line(place, method, outcome, words, toy, refused, monkeypatch):
    monkeypatch.setattr(place, method, Mock(side_effect=outcome))  # workers are forked: they, too
    assert re.search(words, refused(mae_video, *TINY_VIDEO, "--data", toy, "--workers", 2))


def test_a_full_disk_is_named_and_ends_no_run(toy, run, monkeypatch):
    monkeypatch.setattr(data, "write_whole", lambda path, save: save("/dev/full"))
    text = run(mae_image, *TINY_IMAGE, "--data", toy, "--smoke", code=1)
    assert "checkpoint.pt: [Errno 28] No space left on device; the last one" in text


def test_ctrl_c_waits_until_all_workers_run(monkeypatch, request):
    started = []
    def interrupted(loader):
        os.kill(os.getpid(), signal.SIGINT)
        started.append(loader)
        return iter([])
    monkeypatch.setattr(data.DataLoader, "__iter__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt):
        data.start_loader([], 1)
    assert started and signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_two_shrinks_into_one_folder_do_not_disturb_each_other(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(8):
        write_clip(tmp_path / f"in/{i}.avi", "mpeg4", waves(20))
    command = [sys.executable, ROOT / "data.py", "shrink", "in", "out", "--short-side", "16"]
    both = [subprocess.Popen(command, cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert all(read(tmp_path / f"out/{i}.avi").shape[0] == 8 for i in range(8))


def test_workers_may_be_started_by_a_server(request):
    """Then they are no children of the run's process: Python 3.14's default on Linux."""
    request.addfinalizer(lambda: torch.multiprocessing.set_start_method(None, force=True))
    torch.multiprocessing.set_start_method("forkserver", force=True)
    assert data.take(data.start_loader([0], 1)) == 0
