"""data.py: decoding, what is damaged or broken, the commands. Lists and images: test_files.py."""

import errno
import functools
import itertools
import re
import resource
import struct
import time
from fractions import Fraction
from unittest.mock import Mock

import av
import numpy as np
import pytest

import data
import mae_video
from conftest import TINY_VIDEO


@functools.cache
def waves(n=60, size=(48, 64)):
    """n different frames: smooth waves, with a strip of noise that moves over them."""
    i, y, x, c = np.mgrid[:n, : size[0], : size[1], :3]
    frames = 127 + 100 * np.sin(x / 9 + i / 5 + c) * np.cos(y / 7 - i / 9)
    strip = abs(x - 10 - i % 4 * 8) < 10
    frames += strip * np.random.default_rng(0).normal(0, 40, frames.shape)
    return frames.clip(0, 255).astype(np.uint8)


def write_clip(path, codec="mpeg4", frames=None, b_frames=0, pixels="yuv420p", times=None,
               options={}, **muxer):
    """times: when each frame is shown, in 25ths of a second; a key frame every 12."""
    frames = waves() if frames is None else frames
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"mjpeg": "yuvj420p", "huffyuv": "yuv422p"}.get(codec, pixels)
        context = stream.codec_context
        context.thread_count, context.max_b_frames, context.gop_size = 1, b_frames, 12
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode(path):
    """All frames, from the first to the last: the oracle."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def assert_exact(path, clips=12, damaged=False):
    """Random clips of 4 frames equal those of a full decode; most begin after frame 24.   -> n"""
    full, rng = decode(path), np.random.default_rng(0)
    for i in range(clips):
        first = int(rng.integers(0 if i % 4 == 0 else min(25, len(full) - 1), len(full)))
        wanted = np.minimum(first + rng.integers(1, 5) * np.arange(4), len(full) - 1)
        got, problem = data.read_clips(path, lambda n: wanted[None])
        assert all(np.array_equal(x, full[k]) for x, k in zip(got[0], wanted)), wanted
        assert damaged or problem == ""
    return len(full)


def read(path, numbers):
    return data.read_clips(path, lambda n: np.array([numbers]))


def dataset_of(*paths):
    files = data.Files([str(path) for path in paths], [0] * len(paths), ["a"])
    return mae_video.ClipDataset(files, mae_video.Config(frames=4, stride=2, img_size="16"), True)


def spoil(source, target):
    """Change one byte of every fifth packet, after the first 30 % of them."""
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for place, size in packets[int(len(packets) * 0.3) :: 5]:
        content[place + size // 2] ^= 255
    target.write_bytes(content)


NAMES = """
    mpeg4-pause.avi mpeg4-B.avi mpeg4-uneven.mov mpeg4.m4v mpeg4.3gp h264-B.avi h264-B-pause.mp4
    h264-B-uneven.mov h264-pause.mkv h264-B.flv h264-B.mts h264-B.mpg h264-B.wmv hevc-B-uneven.mkv
    hevc-B.m2ts mpeg1video-flat.vob mpeg2video-flat.mpg mpeg2video-B.mpeg mpeg2video-B.m2ts
    mpeg2video-B.mkv mpeg2video-B.asf vp8-pause.mkv vp8.ogv vp9-uneven.mp4 av1.webm wmv2-pause.asf
    msmpeg4v2.avi mjpeg.mov ffv1.mkv huffyuv.avi h264-B-open.mp4 hevc-B-open.mts h264-B-refresh.mp4
    h264-B-pyramid.mp4 vp8-hidden.webm h264-B-444.mp4 h264-B-444-odd.mp4 h264-B-444-old.mp4
    libx264rgb-rgb.mkv libx264rgb-B-rgb-old.mp4 prores-422.mov hevc-B-10bit.mp4""".split()
OPTIONS = {"open": {"x264-params": "open-gop=1:bframes=3", "x265-params": "open-gop=1:bframes=3"},
           "refresh": {"x264-params": "intra-refresh=1"},
           "pyramid": {"x264-params": "b-pyramid=normal:bframes=4"},
           "hidden": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}}
PIXELS = {"444": "yuv444p", "rgb": "rgb24", "422": "yuv422p10le", "10bit": "yuv420p10le"}


@pytest.mark.parametrize("name", NAMES)
def test_clips_equal_a_full_decode(tmp_path, name):
    codec, *how = name.split(".")[0].split("-")
    steps = np.random.default_rng(1).integers(1, 4, 60) if "uneven" in how else np.ones(60, int)
    steps[40] += 75 * ("pause" in how)
    frames = waves(60, (35, 51)) if "odd" in how else waves()
    frames = np.broadcast_to(frames[:, :1, :1], frames.shape) if "flat" in how else frames
    pixels = next((PIXELS[word] for word in how if word in PIXELS), "yuv420p")
    options = next((OPTIONS[word] for word in how if word in OPTIONS), {})
    times, path = np.cumsum(steps).tolist(), tmp_path / name
    write_clip(path, codec, frames, 3 * ("B" in how), pixels, times, options)
    if "old" in how:  # before build 151 x264 wrote 4:4:4 in a way that the decoder must know of
        content = path.read_bytes()
        path.write_bytes(re.sub(rb"core \d{3}", b"core 142", content))
        assert path.read_bytes() != content  # by a new one, all frames look broken, as ever
    assert assert_exact(path, damaged="old" in how) == 60


@pytest.mark.parametrize("name, count, options", [
    ("fragmented.mp4", 60, {"movflags": "+frag_keyframe"}),
    ("trimmed.mov", 43, {"times": [i - 17 for i in range(60)]}),
    ("trimmed.mp4", 43, {"times": [i - 17 for i in range(60)]}),
    ("dropped.avi", 60, {"times": [i + 75 * (i > 40) for i in range(60)]})])
def test_loader_check_and_shrink_agree_where_headers_count_wrongly(tmp_path, name, count, options):
    path, copy, avi = tmp_path / name, tmp_path / f"small_{name}", name == "dropped.avi"
    write_clip(path, *(["mpeg4"] if avi else ["h264", None, 2]), **options)
    assert assert_exact(path) == data.frame_times(path)[0] == count
    problems = data.check_file(path)
    assert all(problem.startswith("note: ") for problem in problems)
    assert not avi or problems == ["note: 135 frames by its header, 60 are there"]
    assert data.shrink_file((path, copy, 24)) == problems and len(decode(copy)) == count


def test_a_header_that_claims_many_frames_costs_nothing(tmp_path):
    path = write_clip(tmp_path / "x.avi", "mpeg4")
    content = bytearray(path.read_bytes())
    for place in content.find(b"avih") + 24, content.find(b"strh") + 40:
        struct.pack_into("<I", content, place, 10**9)
    path.write_bytes(content)
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert data.check_file(path)[0].startswith("cut short: ")
    assert assert_exact(path, damaged=True) == 60
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_late_clip_is_reached_by_a_jump_and_chosen_again_if_less_is_there(tmp_path, monkeypatch):
    path, shown = write_clip(tmp_path / "x.mp4", "h264", b_frames=2), data.shown
    with monkeypatch.context() as patched:
        patched.setattr(data, "shown", lambda *stream: itertools.islice(shown(*stream), 12 + 2))
        assert np.array_equal(read(path, [50])[0][0, 0], decode(path)[50])
    monkeypatch.setattr(data, "frame_times", lambda path: (400, None, ""))  # of its packets
    last, _ = data.read_clips(path, lambda n: np.array([[n - 1]]))
    assert np.array_equal(last[0, 0], decode(path)[59])


def test_genuine_clips_equal_a_full_decode_and_train_by_their_genuine_lists(real, run):
    for name in ("real_clips", "gestures10", "lips20", "weizmann4"):
        paths = data.walk(real / name, data.VIDEO)[0]
        for path in paths if name == "real_clips" else paths[:: max(1, len(paths) // 3)]:
            assert_exact(path, 5)
    for name, count in ("ucf101", 101), ("hmdb51", 51):
        root = real / "real_clips" / name
        train, val = (data.list_videos(root, split) for split in ("train", "val"))
        assert len(train.classes) == len(val.classes) == count
        assert len(train.paths) and len(val.paths) and not set(train.paths) & set(val.paths)
        flags = ["--smoke", "--batch", 1, "--allow-missing", "--workers", 0, "--out", name]
        assert "done: " in run(mae_video, "--data", root, *flags)


@pytest.mark.parametrize("name, codec", [("x.mkv", "h264"), ("x.avi", "mpeg4")])
def test_damaged_and_cut_files_are_named_once_and_training_continues(tmp_path, run, name, codec):
    (tmp_path / "in").mkdir()
    short, spoiled, good = (tmp_path / f"in/{word}_{name}" for word in ("cut", "damaged", "good"))
    write_clip(good, codec, waves(100))
    assert data.check_file(good) == []
    spoil(good, spoiled)
    (problem,) = data.check_file(spoiled)
    damaged = int(re.fullmatch(r"damaged: (\d+) of 100 frames decode with errors", problem)[1])
    problem = read(spoiled, range(100))[1]
    assert damaged >= 1 and problem == f"damaged: {damaged} of 100 frames, used as they are"
    assert read(spoiled, range(8))[1] == ""  # none of these is
    short.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    problems = " ".join(data.check_file(short))
    seconds = re.search(r"cut short: 4.0 s by its header, (\d\.\d) s are there", problems)[1]
    assert abs(float(seconds) - len(decode(short)) / 25) < 0.11
    text = run(mae_video, *TINY_VIDEO, "--data", "in", "--batch", 2, "--epochs", 9)
    for path in short, spoiled:
        assert len(re.findall(rf"{path.name}: (cut short|damaged): ", text)) == 1
    text = run(data, "check", "in", code=1)
    assert f"/cut_{name}: cut short: 4.0 s by its header, {seconds} s are there" in text
    assert f"/damaged_{name}: damaged: " in text and "3 files decoded, 2 broken or damaged" in text


def test_check_and_training_agree_that_a_file_is_broken_and_use_another(tmp_path):
    good, avi = write_clip(tmp_path / "good.mp4"), write_clip(tmp_path / "x.avi")
    mpgs = [write_clip(tmp_path / f"{w}.mpg", "mpeg2video", waves(30, (48, w))) for w in (64, 96)]
    contents = {
        "Invalid data": good.read_bytes()[:1000],
        r"its picture changes from \(64, 48\) to": b"".join(x.read_bytes() for x in mpgs),
        "no video stream in it .* decoder": avi.read_bytes().replace(b"FMP4", b"ZZZZ"),
        "Invalid|denied|not permitted": b"ffconcat version 1.0\nfile good.mp4\n"}
    for i, (words, content) in enumerate(contents.items()):
        bad = tmp_path / f"one\ntwo {i}.mp4"
        bad.write_bytes(content)
        (problem,) = data.check_file(bad)
        assert re.search(f"broken: .*({words})", problem) and "\n" not in problem
        pixels, number, problems = dataset_of(bad, good)[0, 0]
        assert number == 1 and pixels.float().std() > 5
        assert problems[0] == (str(bad), problem.replace("broken", "broken, another file is used"))
    assert decode(bad)  # the list of files: this is what FFmpeg would do
    with pytest.raises(ValueError, match="(?s)^10 files in a row cannot be read, .* check lists"):
        dataset_of(bad, bad)[0, 0]


def test_a_clip_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "x.mp4")
    assert data.LARGEST >= 16 * 3840 * 2160 * 3  # a clip of 4K is possible
    monkeypatch.setattr(data, "LARGEST", 9 * 48 * 64 * 3)
    assert read(path, range(9))[0].shape[1] == 9
    with pytest.raises(data.BrokenFile, match="frames of 64x48: shrink it first"):
        read(path, range(10))


@pytest.mark.parametrize("error, largest, words", [
    (OSError(errno.EMFILE, "Too many open files"), 2**60, "loader failed: .*Too many open files"),
    (MemoryError(), 2**60, "loader failed: MemoryError"),
    (MemoryError(), 2**20, "in a row .* more memory than")])  # a damaged file asked for too much
def test_a_lack_of_memory_or_descriptors_is_no_files_fault(monkeypatch, error, largest, words):
    monkeypatch.setattr(data.av, "open", Mock(side_effect=error))
    monkeypatch.setattr(data, "LARGEST", largest)
    with pytest.raises(ValueError, match=words):
        data.take(map(dataset_of(__file__).__getitem__, [(0, 0)]))
