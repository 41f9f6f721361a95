"""What goes wrong on real disks and machines: damaged files by the thousand, odd files, signals, two runs at once."""

import faulthandler
import os
import signal
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import ROOT, TINY_IMAGE, TINY_VIDEO

VIDEOS = {"x.avi": "mpeg4", "x.mp4": "libx264", "x.webm": "libvpx-vp9", "x.mov": "mjpeg"}
IMAGES = ["x.jpg", "x.png", "x.gif", "x.webp", "x.bmp", "x.tif"]


def write_clip(path, codec="libx264", frames=20, size=(48, 64), pixels=None, times=None):
    """A drifting picture, or `pixels` in every frame; times: presentation times in ticks of 1/25 s."""
    height, width = size
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, i, 1) if pixels is None else pixels, format="rgb24")
            frame.pts = i if times is None else times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path):
    """-> pixels (T, H, W, 3), of an image (H, W, 3)."""
    if path.suffix in data.VIDEO:
        return data.read_clips(path, lambda n: data.segment_views(n, 8, 1))[0]
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
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(source)
    good, rng, named = read(source).shape, np.random.default_rng(1), 0
    content = source.read_bytes()
    faulthandler.dump_traceback_later(120, exit=True)  # a decoder that hangs ends the tests, and says where
    try:
        for _ in range(150):
            path.write_bytes(damaged(content, rng))
            try:
                pixels = read(path)
                assert pixels.dtype == np.uint8 and pixels.ndim == len(good) and pixels.shape[-1] == 3
            except data.BrokenFile as error:
                assert str(error) and "\n" not in str(error)
                named += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert named > 0


@pytest.mark.parametrize(
    "turn, matrix", [(0, (1, 0, 0, 1)), (90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))]
)
def test_a_video_is_turned_as_its_phone_was_held(tmp_path, run, turn, matrix):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :16] = 255
    (tmp_path / "in" / "a").mkdir(parents=True)
    path = write_clip(tmp_path / "in" / "a" / "x.mp4", pixels=picture)
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44  # the track header's matrix: fixed point 16.16, the last column 2.30
    a, b, c, d = (v << 16 for v in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    run("data.py", "shrink", tmp_path / "in", tmp_path / "out", "--short-side", 24)
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
    times = [i + 40 * (i > 9) for i in range(20)]
    uneven = data.read_clips(write_clip(tmp_path / "uneven.mp4", times=times), lambda n: np.arange(n)[None])[0]
    assert len(uneven) == 20 and all((a != b).any() for a, b in zip(uneven, uneven[1:]))


def test_files_that_vanish_while_a_run_goes_on_are_named(tmp_path, run):
    (tmp_path / "videos" / "a").mkdir(parents=True)
    for i in range(24):
        write_clip(tmp_path / "videos" / "a" / f"{i:02d}.mp4", frames=6, size=(32, 32))
    flags = [*TINY_VIDEO, "--data", "videos", "--batch", 4, "--epochs", 20, "--workers", 1]
    process = subprocess.Popen([sys.executable, ROOT / "mae_video.py", *map(str, flags)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    for line in process.stdout:
        if "update     10/" in line:
            break
    for i in range(4):
        (tmp_path / "videos" / "a" / f"{i:02d}.mp4").unlink()
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "no such file" in text and "broken files were met" in text, text


def start(tmp_path, flags):
    """A long run, in its first updates."""
    process = subprocess.Popen([sys.executable, ROOT / "mae_image.py", *map(str, flags)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    for line in process.stdout:
        if "update      5/" in line:
            return process
    pytest.fail("the run ended before its fifth update")


def test_two_runs_in_one_folder_are_refused_and_the_first_goes_on(toy, tmp_path, run):
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 5000, "--out", "same"]
    first = start(tmp_path, flags)
    assert "another run is writing to same" in run("mae_image.py", "--resume", "--out", "same", code=2)
    first.terminate()
    text = first.communicate(timeout=60)[0]
    assert first.returncode == 130 and "go on with: python mae_image.py --resume --out same" in text, text


def test_a_terminated_run_saves_as_with_ctrl_c(toy, tmp_path):
    process = start(tmp_path, [*TINY_IMAGE, "--data", toy, "--epochs", 5000, "--workers", 2])
    os.killpg(process.pid, signal.SIGTERM)  # what torchrun sends to each of its processes and their children
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in text and "loader" not in text, text
    step = torch.load(tmp_path / "runs/mae_image/checkpoint.pt", weights_only=True)["step"]
    assert f"stopped after update {step}" in text and step >= 5
