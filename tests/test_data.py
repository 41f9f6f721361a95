"""data.py: decoding, what is damaged or broken, the commands. Lists and images: test_files.py.

Videos are written by the tests. The oracle of decoding is a full decode from the first frame.
"""

import errno
import functools
import os
import re
import resource
import shutil
import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest

import data
import mae_video
from conftest import TINY_VIDEO
from mae_video import ClipDataset


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
        try:
            stream = container.add_stream(codec, rate=25, options=options)
        except av.codec.codec.UnknownCodecError:
            pytest.skip(f"this FFmpeg cannot write {codec}")
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"mjpeg": "yuvj420p", "huffyuv": "yuv422p"}.get(codec, pixels)
        stream.codec_context.thread_count = 1
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = b_frames, 12
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


def all_frames(n):
    return np.arange(n)[None]


def dataset_of(*paths):
    files = data.Files([str(path) for path in paths], [0] * len(paths), ["a"])
    return ClipDataset(files, mae_video.Config(frames=4, stride=2, img_size="16"), True)


def take_one(dataset, workers):
    options = {"batch_sampler": [[(0, 0)]], "collate_fn": data.collate}
    return data.take(data.start_loader(dataset, workers, **options))


def spoil(source, target):
    """Change one byte of every fifth packet, after the first 30 % of them."""
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for place, size in packets[int(len(packets) * 0.3) :: 5]:
        content[place + size // 2] ^= 255
    target.write_bytes(content)


def cut(source, target, share=0.5):
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])


# ---- exact frames --------------------------------------------------------------------------------

PAIRS = """
    mpeg4-pause.avi mpeg4-B.avi mpeg4-uneven.mov mpeg4.m4v mpeg4.3gp h264-B.avi h264-B-pause.mp4
    h264-B-uneven.mov h264-pause.mkv h264-B.flv h264-B.mts h264-B.mpg h264-B.wmv hevc-B.mp4
    hevc-B-uneven.mkv hevc-B.m2ts mpeg1video-flat.vob mpeg2video-flat.mpg mpeg2video-B.mpeg
    mpeg2video-B.m2ts mpeg2video-B.mkv mpeg2video-B.asf vp8-pause.mkv vp8.ogv vp9.webm
    vp9-uneven.mp4 av1.webm wmv2-pause.asf flv.flv msmpeg4v2.avi mjpeg.avi mjpeg.mov ffv1.mkv
    huffyuv.avi""".split()


@pytest.mark.parametrize("name", PAIRS)
def test_clips_equal_a_full_decode(tmp_path, name):
    codec, *how = name.split(".")[0].split("-")
    steps = np.random.default_rng(1).integers(1, 4, 60) if "uneven" in how else np.ones(60, int)
    steps[40] += 75 * ("pause" in how)
    frames = np.broadcast_to(waves()[:, :1, :1], waves().shape) if "flat" in how else waves()
    write_clip(tmp_path / name, codec, frames, 2 * ("B" in how), times=np.cumsum(steps).tolist())
    assert assert_exact(tmp_path / name) == 60


OPEN = {"x264-params": "open-gop=1:bframes=3", "x265-params": "open-gop=1:bframes=3"}


@pytest.mark.parametrize("name, codec, pixels, options", [
    ("open.mp4", "h264", "yuv420p", OPEN), ("open.mts", "hevc", "yuv420p", OPEN),
    ("refresh.mp4", "h264", "yuv420p", {"x264-params": "intra-refresh=1"}),
    ("pyramid.mp4", "h264", "yuv420p", {"x264-params": "b-pyramid=normal:bframes=4"}),
    ("hidden.webm", "vp8", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}),
    ("444.mp4", "h264", "yuv444p", {}), ("rgb.mkv", "libx264rgb", "rgb24", {}),
    ("odd.mp4", "h264", "yuv444p", {}), ("old.mp4", "h264", "yuv444p", {}),
    ("old_rgb.mp4", "libx264rgb", "rgb24", {"bf": "2"}), ("422.mov", "prores", "yuv422p10le", {}),
    ("10bit.mp4", "hevc", "yuv420p10le", {})])
def test_clips_equal_a_full_decode_in_streams_of_odd_make(tmp_path, name, codec, pixels, options):
    frames = waves(60, (35, 51)) if name == "odd.mp4" else waves()
    b_frames = 3 * (codec in ("h264", "hevc"))
    path = write_clip(tmp_path / name, codec, frames, b_frames, pixels, None, options)
    if "old" in name:  # before build 151 x264 wrote 4:4:4 in a way that the decoder must know of
        content = path.read_bytes()
        path.write_bytes(re.sub(rb"core \d{3}", b"core 142", content))
        assert path.read_bytes() != content  # by a new one, all frames look broken, as ever
    assert assert_exact(path, damaged="old" in name) == 60


@pytest.mark.parametrize("name, count, movflags", [
    ("fragmented.mp4", 60, "+frag_keyframe"), ("trimmed.mp4", 43, ""), ("trimmed.mov", 43, ""),
    ("empty.mp4", 60, "+frag_keyframe+empty_moov+default_base_moof"), ("dropped.avi", 60, "")])
def test_all_agree_on_one_count(tmp_path, name, count, movflags):
    """The loader, check and shrink, where headers count more or fewer frames than are shown."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if name == "dropped.avi":
        write_clip(path, times=[i + 75 * (i > 40) for i in range(60)])
        assert data.check_file(path) == ["note: 135 frames by its header, 60 are there"]
    elif movflags:
        write_clip(path, "h264", None, 2, movflags=movflags)
    else:
        write_clip(path, "h264", None, 2, times=[i - 17 for i in range(60)])
    assert assert_exact(path) == data.frame_times(path)[0] == count
    assert all(problem.startswith("note: ") for problem in data.check_file(path))
    assert data.shrink_file((path, tmp_path / name, 24)) == data.check_file(path)
    assert len(decode(tmp_path / name)) == count


def test_a_late_clip_is_reached_by_a_jump(tmp_path, monkeypatch):
    decoded, plain = [], data.shown

    def count(*stream):
        for frame in plain(*stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(data, "shown", count)
    data.read_clips(write_clip(tmp_path / "x.mp4", "h264", b_frames=2), lambda n: np.array([[50]]))
    assert len(decoded) <= 12 + 2


def test_a_clip_is_chosen_again_where_packets_count_more_than_frames(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "x.mp4", frames=waves(40))
    monkeypatch.setattr(data, "frame_times", lambda path: (400, None, ""))
    clips, _ = data.read_clips(path, lambda n: mae_video.views_of("dense", n, 4, 2, 1))
    assert np.array_equal(clips[0], np.stack(decode(path))[[16, 18, 20, 22]])


@pytest.mark.parametrize("name, format, places", [  # places: a box of the header, bytes after it
    ("x.avi", "<I", [("avih", 24), ("strh", 40)]),
    ("x.mp4", ">I", [("stts", 12), ("stsz", 12), ("stsc", 16)])])
def test_a_header_that_claims_many_frames_costs_nothing(tmp_path, name, format, places):
    path = write_clip(tmp_path / name)
    content = bytearray(path.read_bytes())
    for box, offset in places:
        struct.pack_into(format, content, content.find(box.encode()) + offset, 10**9)
    if name == "x.mp4":  # of 200 bytes each
        struct.pack_into(format, content, content.find(b"stsz") + 8, 200)
    path.write_bytes(content)
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert data.check_file(path)[0].startswith(("cut short: ", "broken: "))
    if name == "x.avi":
        assert assert_exact(path, 2, damaged=True) == 60
    else:
        with pytest.raises(data.BrokenFile):
            data.read_clips(path, all_frames)
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_genuine_clips_equal_a_full_decode(real):
    for name in ("real_clips", "gestures10", "lips20", "weizmann4"):
        paths = data.walk(real / name, data.VIDEO)[0]
        for path in paths if name == "real_clips" else paths[:: max(1, len(paths) // 3)]:
            assert_exact(path, 5)


@pytest.mark.parametrize("name, count", [("ucf101", 101), ("hmdb51", 51)])
def test_genuine_ucf101_and_hmdb51_clips_read(real, name, count):
    root, used = real / "real_clips" / name, []
    with pytest.raises(ValueError, match=r"\d+ of \d+ files of .* are not in"):
        data.list_videos(root)
    for split in "train", "val":
        files = data.list_videos(root, split, allow_missing=True)
        assert len(files.classes) == count
        used += files.paths.tolist()
        cfg = mae_video.Config(frames=16, stride=2, sampling="dense", img_size="64")
        clips, _, problems = ClipDataset(files, cfg, True)[0, 0]
        assert clips.shape == (1, 16, 64, 64, 3) and clips.float().std() > 5 and not problems
    assert len(used) == len(set(used)) >= 2


# ---- damaged, cut, broken ------------------------------------------------------------------------


@pytest.mark.parametrize("name, codec", [("x.mp4", "h264"), ("x.avi", "mpeg4"), ("x.mkv", "h264")])
def test_damaged_frames_are_counted_and_said(tmp_path, name, codec):
    path = tmp_path / name
    spoil(write_clip(tmp_path / f"good_{name}", codec), path)
    (problem,) = data.check_file(path)
    damaged = int(re.fullmatch(r"damaged: (\d+) of 60 frames decode with errors", problem)[1])
    _, problem = data.read_clips(path, all_frames)
    assert damaged >= 1 and problem == f"damaged: {damaged} of 60 frames, used as they are"
    assert data.read_clips(path, lambda n: np.arange(8)[None])[1] == ""  # none of these is


@pytest.mark.parametrize("name, codec", [("x.mkv", "h264"), ("x.webm", "vp9"), ("x.avi", "mjpeg")])
def test_check_says_that_a_file_is_cut_short(tmp_path, name, codec):
    source, path = write_clip(tmp_path / f"good_{name}", codec, waves(100)), tmp_path / name
    assert data.check_file(source) == []
    cut(source, path)
    problems = " ".join(data.check_file(path))
    seconds = re.search(r"cut short: 4.0 s by its header, (\d\.\d) s are there", problems)[1]
    assert abs(float(seconds) - len(decode(path)) / 25) < 0.11


@pytest.mark.parametrize("how, word", [(spoil, "damaged"), (cut, "cut short")])
def test_check_and_training_name_such_a_file_once_and_training_continues(tmp_path, run, how, word):
    good = write_clip(tmp_path / "good.mkv", frames=waves(100))
    for name in "a/1.mkv", "a/2.mkv", "b/1.mkv", "b/2.mkv":
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good, tmp_path / "in" / name)
    how(good, tmp_path / "in/a/1.mkv")
    text = run(mae_video, *TINY_VIDEO, "--data", "in", "--batch", 2, "--epochs", 9)
    assert text.count(f"a/1.mkv: {word}: ") == 1 and "1 files with problems: in/a/1.mkv" in text
    text = run(data, "check", "in", code=1)
    assert f"a/1.mkv: {word}: " in text and "4 files decoded, 1 broken or damaged" in text


@pytest.mark.parametrize("how, words", [
    ("pipe", "no such file"), ("gone", "No such file"), ("cut off", "Invalid data"),
    ("another size", r"its picture changes from \(64, 48\) to \(96, 48\)"),
    ("no decoder", "no video stream in it that FFmpeg has a decoder for"),
    ("list of files", "Invalid|denied|not permitted")])
def test_check_and_training_agree_that_a_file_is_broken_and_use_another(tmp_path, how, words):
    bad, good = tmp_path / "one\ntwo.mp4", write_clip(tmp_path / "good.mp4")
    if how == "pipe":
        os.mkfifo(bad)
    elif how == "cut off":
        cut(good, bad, 0.3)
    elif how == "another size":
        parts = [write_clip(tmp_path / "x.mpg", "mpeg2video", waves(30, size)).read_bytes()
                 for size in ((48, 64), (48, 96))]
        bad.write_bytes(b"".join(parts))
    elif how == "no decoder":
        content = write_clip(tmp_path / "x.avi").read_bytes()
        bad.write_bytes(content.replace(b"FMP4", b"ZZZZ"))
    elif how == "list of files":
        bad.write_text("ffconcat version 1.0\nfile good.mp4\n")
        assert decode(bad)  # this is what FFmpeg would do
    (problem,) = data.check_file(bad)
    assert re.search(f"broken: .*({words})", problem) and "\n" not in problem
    pixels, number, problems = dataset_of(bad, good)[0, 0]
    assert number == 1 and pixels.float().std() > 5
    assert set(problems) == {(str(bad), problem.replace("broken", "broken, another file is used"))}
    with pytest.raises(ValueError, match="10 files in a row cannot be read, .* check lists them"):
        take_one(dataset_of(bad, bad), workers=1)


def test_a_clip_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "x.mp4")
    assert data.LARGEST >= 16 * 3840 * 2160 * 3  # a clip of 4K is possible
    monkeypatch.setattr(data, "LARGEST", 9 * 48 * 64 * 3)
    assert data.read_clips(path, lambda n: np.arange(9)[None])[0].shape[1] == 9
    with pytest.raises(data.BrokenFile, match="frames of 64x48: shrink it first"):
        data.read_clips(path, lambda n: np.arange(10)[None])


NO_MEMORY = av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize("error, there_is", [
    (MemoryError(), False), (OSError(errno.EMFILE, "Too many open files"), False),
    (NO_MEMORY, False), (NO_MEMORY, True)], ids=str)
def test_a_lack_of_memory_or_descriptors_is_not_the_fault_of_a_file(tmp_path, monkeypatch, error,
                                                                    there_is):
    """Unless there is memory for the largest clip: then the damaged file asked for too much."""
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(data.av, "open", fail)
    monkeypatch.setattr(data.Image, "open", fail)
    monkeypatch.setattr(data, "LARGEST", 2**20 if there_is else 2**60)
    path, words = tmp_path / "x.mp4", "loader failed: .*(MemoryError|Too many open files)"
    path.touch()
    with pytest.raises(data.BrokenFile if there_is else (MemoryError, OSError)):
        data.read_image(path)
    with pytest.raises(ValueError, match="in a row .* more memory than" if there_is else words):
        take_one(dataset_of(path), workers=0)
