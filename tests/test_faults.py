"""What goes wrong on real machines: damaged files, signals, kills, folders that go away."""

import faulthandler
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time

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
IMAGES = ["x.jpg", "x.png", "x.gif", "x.webp", "x.bmp", "x.tif"]


def read(path):
    """-> pixels (T, H, W, 3), of an image (H, W, 3)."""
    if path.suffix in data.VIDEO:
        return data.read_clips(path, lambda n: mae_video.segment_views(n, 8, 1))[0][0]
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


@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_damaged_files_are_read_or_named_and_never_crash_or_hang(name, tmp_path):
    path, rng, named = tmp_path / name, np.random.default_rng(1), 0
    if name in VIDEOS:
        write_clip(path, VIDEOS[name], waves(20))
    else:
        Image.fromarray(waves(1)[0]).save(path)
    good, content = read(path), path.read_bytes()
    faulthandler.dump_traceback_later(120, exit=True)  # a decoder that hangs ends the tests
    try:
        for _ in range(60):
            path.write_bytes(damaged(content, rng))
            try:
                pixels = read(path)
                assert pixels.dtype == np.uint8 and pixels.ndim == good.ndim and pixels.any()
            except data.BrokenFile as error:
                named += bool(str(error))
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert named > 0


@pytest.mark.parametrize("turn, matrix", [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1))])
def test_a_video_is_turned_as_its_phone_was_held(tmp_path, turn, matrix):
    path = write_clip(tmp_path / "x.mp4")
    upright, content = read(path), bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44  # the track header's matrix: 16.16, the last column 2.30
    a, b, c, d = (v << 16 for v in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    assert np.array_equal(read(path), np.rot90(upright, -turn // 90, axes=(1, 2)))


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


@pytest.mark.parametrize("name, removed", [
    ("SIGINT", False), ("SIGTERM", False), ("SIGHUP", False), ("SIGTERM", True)])
def test_a_second_run_in_a_folder_is_refused_and_a_signal_saves_the_first(toy, tmp_path, refused,
                                                                          name, removed):
    """Also where the folder was removed: the run makes it again."""
    process = start(tmp_path, [*LONG, "--data", toy, "--workers", 2, "--out", "same"])
    assert "another run writes to same" in refused(mae_image, "--resume", "--out", "same")
    if removed:
        (tmp_path / "same").rename(tmp_path / "gone")
    os.killpg(process.pid, getattr(signal, name))  # a terminal sends it to the workers, too
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in text and "loader" not in text, text
    step = state(tmp_path / "same")["step"]
    hint = "resume with: python mae_image.py --resume --out same"
    assert f"stopped after update {step}; {hint}" in text and step >= 5
    assert ("same was removed, and is made again" in text) == removed


TUNING = ("--mode scratch --size 24x1x2 --workers 0 --clips 1 --repeat 2 --drop-path 0.2 "
          "--mixup 0.8 --erase 0.5 --rand-augment 5").split()
SCRIPTS = {"mae_image": (mae_image, TINY_IMAGE), "mae_video": (mae_video, TINY_VIDEO),
           "mae_st": (mae_video, [*TINY_VIDEO, "--model", "mae_st", "--repeat", 2]),
           "omni": (omni, [*TINY_VIDEO, "--images", "toy"]),
           "mixed": (omni, [*TINY_VIDEO, "--images", "toy", "--joint", "mixed"]),
           "multimae": (multimae, TINY_IMAGE), "finetune": (finetune, [*TINY_VIDEO[:8], *TUNING])}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_resumes_bit_for_bit(name, toy, tmp_path, run):
    """Killed at a random moment, resumed with other workers; weights and log are the same."""
    module, flags = SCRIPTS[name]
    (tmp_path / "toy").symlink_to(toy)
    flags = [*flags, "--data", "toy", "--epochs", 6, "--accum", 2, "--clip", 1, "--log-every", 1]
    run(module, *flags, "--out", "whole")
    script = f"{module.__name__}.py"
    process = start(tmp_path, [*flags, "--out", "killed", "--workers", 2], script, "update      2/")
    time.sleep(random.random() * 0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = (tmp_path / "killed/checkpoint.pt").exists()  # or killed before the first one
    run(module, *(["--resume", "--workers", 1] if saved else flags), "--out", "killed")
    assert not list((tmp_path / "killed").glob(".*checkpoint.pt"))  # a half one
    results = []
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        parts = [state(folder)[key] for key in ("step", "model", "optimizer")]
        log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        kept = [[line.get(key) for key in ("step", "loss", "lr", "val_loss")] for line in log]
        results.append(torch.utils._pytree.tree_leaves([*parts, kept]))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


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


SHM = RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize("name, place, method, error, words", [
    ("mae_video", torch.Tensor, "share_memory_", SHM, "No space left .*--workers 0.*--shm-size"),
    ("finetune", torch.Tensor, "share_memory_", SHM, "No space left .*--workers 0.*--shm-size"),
    ("mae_image", torch.multiprocessing.Process, "start", OSError(24, "Too many open files"),
     "no workers can be started: .*Too many open files; try --workers 0")])
def test_where_workers_lack_something_one_line_says_what(name, place, method, error, words, toy,
                                                         refused, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(place, method, fail)  # workers are forked, and have it
    module, flags = SCRIPTS[name]
    assert re.search(words, refused(module, *flags, "--data", toy, "--workers", 2))


# ---- main() from a notebook ----------------------------------------------------------------------


def test_main_leaves_signals_threads_and_random_numbers_as_they_were(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").symlink_to(toy)

    def surroundings():
        names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
        handlers = [signal.getsignal(name) for name in names]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        numbers = torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        threads = torch.get_num_threads(), threading.active_count()
        return handlers, mask, numbers, random.getstate(), threads, os.getcwd()

    for module, flags in SCRIPTS.values():
        flags = [str(x) for x in [*flags, "--data", "toy", "--smoke", "--workers", 1]]
        before = surroundings()
        for _ in range(2):
            module.main(flags)
        assert surroundings() == before


def test_a_killed_pool_leaves_no_worker_not_even_one_that_was_starting(tmp_path):
    code = ("import data, os, time, torch\n"
            "def late():\n"
            "    while os.getppid() == parent:\n"
            "        time.sleep(0.1)\n"
            "    data.begin_worker(0)\n"
            "    open('alive', 'w')\n"
            "parent = os.getpid()\n"
            "torch.multiprocessing.get_context('fork').Process(target=late).start()\n"
            "for _ in data.in_parallel(lambda job: time.sleep(0.2), range(1000), ''):\n"
            "    print('up', flush=True)\n")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)  # returns when the last worker has closed its output
    assert not (tmp_path / "alive").exists()


def test_ctrl_c_waits_until_all_workers_run(monkeypatch):
    started = []

    class Loader(list):
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGINT)
            started.append(True)
            return super().__iter__()

    monkeypatch.setattr(data, "DataLoader", lambda *args, **options: Loader())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            data.start_loader([], 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started


def test_two_shrinks_into_one_folder_do_not_disturb_each_other(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(8):
        write_clip(tmp_path / f"in/{i}.avi", "mpeg4", waves(20))
    command = [sys.executable, ROOT / "data.py", "shrink", "in", "out", "--short-side", "16"]
    both = [subprocess.Popen(command, cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert all(read(tmp_path / f"out/{i}.avi").shape[0] == 8 for i in range(8))


def test_workers_may_be_started_by_a_server(tmp_path):
    """Then they are no children of the run's process: Python 3.14's default on Linux."""
    (tmp_path / "x.jpg").write_text("no image")
    code = ("import data, pathlib, torch\n"
            "torch.multiprocessing.set_start_method('forkserver')\n"
            "options = {'batch_size': None, 'collate_fn': data.check_file}\n"
            "loader = data.start_loader([pathlib.Path('x.jpg')], 1, **options)\n"
            "assert 'broken' in data.take(loader)[0]\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
