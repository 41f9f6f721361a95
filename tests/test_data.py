"""data.py: decoding, crops, batches, processes, the toy world, the commands. Lists: test_files.py.

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
    rng, (y, x, c) = np.random.default_rng(0), np.mgrid[: size[0], : size[1], :3]
    frames = []
    for i in range(n):
        frame = 127 + 100 * np.sin(x / 9 + i / 5 + c) * np.cos(y / 7 - i / 9)
        strip = frame[:, i % 4 * 8 :][:, :20]
        strip += rng.normal(0, 40, strip.shape)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return np.stack(frames)


@functools.cache
def greys(n=60, size=(48, 64)):
    """n frames whose brightness tells their number, see numbers(). They take a few bytes each."""
    grey = (4 * np.arange(n, dtype=np.uint8))[:, None, None, None]
    return np.broadcast_to(grey, (n, *size, 3))


def numbers(frames):
    """Which frames of greys() these are."""
    return np.rint(np.asarray(frames, float).mean((-3, -2, -1)) / 4).astype(int)


def write_clip(path, codec="mpeg4", frames=None, b_frames=0, pixels="yuv420p", times=None,
               options={}, **muxer):
    """times: when each frame is shown, in 25ths of a second; a key frame every 12."""
    with av.open(str(path), "w", options=muxer) as container:
        frames = waves() if frames is None else frames
        try:
            stream = container.add_stream(codec, rate=25, options=options)
        except av.codec.codec.UnknownCodecError:
            pytest.skip(f"this FFmpeg cannot write {codec}")
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.codec_context.thread_count = pixels, 1
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = b_frames, 12
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def trim(source, target, start):
    """Copy the packets from `start` (in frames) on, as ffmpeg -ss START -c copy does."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy, shift = new.add_stream_from_template(stream), int(start / 25 / stream.time_base)
        old.seek(shift, stream=stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                new.mux(packet)
    return target


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


def files_of(*paths):
    return data.Files(np.array([str(p) for p in paths]), np.zeros(len(paths), int), ["a"])


def spoil(source, target, share=0.3, every=5):
    """Change one byte of every fifth packet, in the part of the file after `share`."""
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for place, size in packets[int(len(packets) * share) :: every]:
        content[place + size // 2] ^= 255
    target.write_bytes(content)
    return target


def cut(source, target, share=0.5):
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


# ---- exact frames ----------------------------------------------------------------------------------

PAIRS = """
    mpeg4.avi mpeg4-B.avi mpeg4-pause.avi mpeg4-B.mp4 mpeg4-uneven.mov mpeg4.m4v mpeg4-B.mkv mpeg4.3gp
    h264.avi h264-B.avi h264-B.mp4 h264-B-pause.mp4 h264-B-uneven.mov h264-B.mkv h264-pause.mkv
    h264-B.flv h264-B.mts h264-B.m2ts h264-B.mpg h264-B.wmv hevc-B.mp4 hevc-B-uneven.mkv hevc-B.mts
    mpeg1video-B.mpg mpeg1video-still.vob mpeg2video-B.mpeg mpeg2video-still.mpg mpeg2video-B.vob
    mpeg2video-B.m2ts mpeg2video-B.mkv mpeg2video-B.asf vp8.webm vp8-pause.mkv vp8.ogv vp9.webm
    vp9-uneven.mp4 av1.webm av1.mp4 wmv1.wmv wmv2-pause.asf flv.flv msmpeg4v2.avi mjpeg.avi mjpeg.mov
    ffv1.mkv huffyuv.avi""".split()


@pytest.mark.parametrize("name", PAIRS)
def test_clips_equal_a_full_decode(tmp_path, name):
    codec, *how = name.split(".")[0].split("-")
    steps = np.random.default_rng(1).integers(1, 4, 60) if "uneven" in how else np.ones(60, int)
    steps[40] += 75 * ("pause" in how)
    pixels = {"mjpeg": "yuvj420p", "huffyuv": "yuv422p"}.get(codec, "yuv420p")
    write_clip(tmp_path / name, codec, greys() if "still" in how else None, 2 * ("B" in how), pixels,
               np.cumsum(steps).tolist())
    assert assert_exact(tmp_path / name) == 60


OPEN = {"x264-params": "open-gop=1:bframes=3", "x265-params": "open-gop=1:bframes=3"}


@pytest.mark.parametrize("name, codec, pixels, options", [
    ("open.mp4", "h264", "yuv420p", OPEN), ("open.mkv", "h264", "yuv420p", OPEN),
    ("open.mov", "hevc", "yuv420p", OPEN), ("open.mts", "hevc", "yuv420p", OPEN),
    ("refresh.mp4", "h264", "yuv420p", {"x264-params": "intra-refresh=1"}),
    ("pyramid.mp4", "h264", "yuv420p", {"x264-params": "b-pyramid=normal:bframes=4"}),
    ("hidden.webm", "vp8", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}),
    ("444.mp4", "h264", "yuv444p", {}), ("rgb.mkv", "libx264rgb", "rgb24", {}),
    ("422.mov", "prores", "yuv422p10le", {}), ("10bit.mp4", "hevc", "yuv420p10le", {})])
def test_clips_equal_a_full_decode_in_streams_of_odd_make(tmp_path, name, codec, pixels, options):
    write_clip(tmp_path / name, codec, None, 3 * (codec in ("h264", "hevc")), pixels, None, options)
    assert assert_exact(tmp_path / name) == 60


@pytest.mark.parametrize("codec, pixels", [("libx264", "yuv444p"), ("libx264rgb", "rgb24")])
def test_444_of_an_x264_that_tells_its_version_in_the_first_packet_alone(tmp_path, codec, pixels):
    """Before build 151 it wrote 4:4:4 in a way that the decoder must know of."""
    path = write_clip(tmp_path / "x.mp4", codec, None, 2, pixels)
    content = path.read_bytes()
    path.write_bytes(re.sub(rb"core \d{3}", b"core 142", content))
    assert path.read_bytes() != content
    assert_exact(path, damaged=True)  # a new one obeys no old rule: the frames are as broken as ever


FRAGMENTED, EMPTY = "+frag_keyframe", "+frag_keyframe+empty_moov+default_base_moof"


@pytest.mark.parametrize("name", ["fragmented.mp4", "empty.mp4", "trimmed.mp4", "trimmed.mov",
                                  "dropped.avi"])
def test_all_agree_on_one_count(tmp_path, capsys, name):
    """The loader, check and shrink, where headers count more or fewer frames than are shown."""
    path, kind = tmp_path / "in" / name, name.split(".")[0]
    path.parent.mkdir()
    if kind == "trimmed":
        source = write_clip(tmp_path / "whole.mp4", "h264", None, 2)
        trim(source, path, 17)
    elif kind == "dropped":
        write_clip(path, times=[i + 75 * (i > 40) for i in range(60)])
    else:
        write_clip(path, "h264", None, 2, movflags=FRAGMENTED if kind == "fragmented" else EMPTY)
    n = assert_exact(path)
    assert data.frame_times(path)[0] == n == (43 if kind == "trimmed" else 60)
    assert all(problem.startswith("note: ") for problem in data.check_file(path))
    with pytest.raises(SystemExit) as end:
        data.shrink(path.parent, tmp_path / "out", 24)
    assert end.value.code == 0 and len(decode(tmp_path / "out" / name)) == n


def test_check_says_where_the_header_counts_otherwise(tmp_path):
    path = write_clip(tmp_path / "x.avi", times=[i + 75 * (i > 40) for i in range(60)])
    assert data.check_file(path) == ["note: 135 frames by its header, 60 are there"]


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
    path = write_clip(tmp_path / "x.mp4", frames=greys(40))
    monkeypatch.setattr(data, "frame_times", lambda path: (400, None, ""))
    clips, _ = data.read_clips(path, lambda n: mae_video.dense_views(n, 4, 2, 1))
    assert numbers(clips).tolist() == [[16, 18, 20, 22]]


def claim(path):
    """10^9 frames, by the header."""
    content, many = bytearray(path.read_bytes()), 10**9
    if path.suffix == ".avi":
        struct.pack_into("<I", content, content.find(b"avih") + 24, many)
        struct.pack_into("<I", content, content.find(b"strh") + 40, many)
    else:  # of 200 bytes each; one chunk
        struct.pack_into(">2I", content, content.find(b"stsz") + 8, 200, many)
        struct.pack_into(">I", content, content.find(b"stts") + 12, many)
        struct.pack_into(">I", content, content.find(b"stsc") + 16, many)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["x.avi", "x.mp4"])
def test_a_header_that_claims_a_thousand_million_frames_costs_nothing(tmp_path, name):
    path, begin = claim(write_clip(tmp_path / name)), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert data.check_file(path)[0].startswith(("cut short: ", "broken: "))
    if name == "x.avi":
        assert assert_exact(path, 2, damaged=True) == 60
    else:
        with pytest.raises(data.BrokenFile):
            data.read_clips(path, lambda n: np.zeros((1, 1), int))
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_cover_picture_is_not_the_video(tmp_path):
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        cover, video = (container.add_stream(c, rate=r) for c, r in (("mjpeg", 1), ("mpeg4", 25)))
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for stream, frames in (cover, greys(1, (32, 32))), (video, greys(20)):
            for pixels in map(np.ascontiguousarray, frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    assert data.read_clips(tmp_path / "x.mkv", lambda n: np.arange(n)[None])[0].shape[1:3] == (20, 48)


def test_genuine_clips_equal_a_full_decode(real):
    sets = [real / "real_clips", *(real / name for name in ("gestures10", "lips20", "weizmann4"))]
    for root in sets:
        paths = data.walk(root, data.VIDEO)[0]
        for path in paths if root.name == "real_clips" else paths[:: max(1, len(paths) // 3)]:
            assert_exact(path, 5)


def test_genuine_ucf101_and_hmdb51_clips_read(real):
    for name, count in ("ucf101", 101), ("hmdb51", 51):
        root, used = real / "real_clips" / name, []
        with pytest.raises(ValueError, match=r"\d+ of \d+ files of .* are not in"):
            data.list_videos(root)
        for split in "train", "val":
            files = data.list_videos(root, split, allow_missing=True)
            assert len(files.classes) == count
            used += files.paths.tolist()
            for i in range(len(files.paths)):
                clips, number, problems = ClipDataset(files, 16, 2, (64, 64), seed=0)[0, i]
                assert clips.shape == (1, 16, 64, 64, 3) and clips.float().std() > 5
                assert number == i and not problems
        assert len(used) == len(set(used)) >= 2


# ---- damaged, cut, broken --------------------------------------------------------------------------


@pytest.mark.parametrize("name, codec", [("x.mp4", "h264"), ("x.avi", "mpeg4"), ("x.mkv", "h264")])
def test_damaged_frames_are_counted_and_said(tmp_path, name, codec):
    path = spoil(write_clip(tmp_path / f"good_{name}", codec), tmp_path / name)
    (problem,) = data.check_file(path)
    damaged, met = re.fullmatch(r"damaged: (\d+) of (\d+) frames decode with errors",
                                problem).groups()
    assert 1 <= int(damaged) <= int(met) == 60
    _, problem = data.read_clips(path, lambda n: np.arange(n)[None])
    assert problem == f"damaged: {damaged} of 60 frames, used as they are"
    assert data.read_clips(path, lambda n: np.arange(8)[None])[1] == ""  # none of these is


@pytest.mark.parametrize("name, codec", [("x.mkv", "h264"), ("x.webm", "vp9"), ("x.avi", "mjpeg")])
def test_check_says_that_a_file_is_cut_short(tmp_path, name, codec):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    source = write_clip(tmp_path / f"good_{name}", codec, waves(100), pixels=pixels)
    assert data.check_file(source) == []
    path = cut(source, tmp_path / name)
    problems = " ".join(data.check_file(path))
    seconds = re.search(r"cut short: 4.0 s by its header, (\d\.\d) s are there", problems)[1]
    assert abs(float(seconds) - len(decode(path)) / 25) < 0.11


@pytest.mark.parametrize("how, word", [(spoil, "damaged"), (cut, "cut short")])
def test_training_names_such_a_file_once_and_goes_on(tmp_path, run, how, word):
    good = write_clip(tmp_path / "good.mkv", frames=waves(100))
    for name in "a/1.mkv", "a/2.mkv", "b/1.mkv", "b/2.mkv":
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good, tmp_path / "in" / name)
    how(good, tmp_path / "in/a/1.mkv")
    text = run(mae_video, *TINY_VIDEO, "--data", "in", "--batch", 2)
    assert text.count(f"a/1.mkv: {word}: ") == 1
    assert re.search("1 files with problems: in/a/1.mkv", text)


def break_file(path, how):
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "empty":
        path.touch()
    elif how == "text":
        path.write_text("this is no video")
    elif how == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "cut off":
        cut(write_clip(path.with_name("whole.mp4")), path, 0.3)
    elif how == "sound only":
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=44100)
            sound = np.zeros((2, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
            frame.rate = 44100
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    elif how == "another size":
        for name, size in ("1.mpg", (48, 64)), ("2.mpg", (48, 96)):
            write_clip(path.with_name(name), "mpeg2video", greys(30, size))
        path.write_bytes(b"".join(path.with_name(f"{i}.mpg").read_bytes() for i in (1, 2)))
    elif how == "no decoder":
        content = write_clip(path.with_name("x.avi")).read_bytes()
        path.write_bytes(content.replace(b"FMP4", b"ZZZZ"))
    elif how == "list of files":
        name = write_clip(path.with_name("secret.mp4")).name
        path.write_text(f"ffconcat version 1.0\nfile {name}\n")
        assert decode(path)  # this is what FFmpeg would do
    elif how == "playlist":
        name = write_clip(path.with_name("secret.mp4")).name
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n")


BROKEN = {"folder": "no such file", "pipe": "no such file", "gone": "No such file",
          "text": "Invalid data", "empty": "Invalid data", "noise": "Invalid data",
          "cut off": "Invalid data", "sound only": "no video stream in it that FFmpeg",
          "another size": r"its picture changes from \(64, 48\) to \(96, 48\)",
          "no decoder": "no video stream in it that FFmpeg has a decoder for",
          "list of files": "Invalid|denied|not permitted", "playlist": "Invalid|denied|not permitted"}


@pytest.mark.parametrize("how", BROKEN)
def test_check_and_training_agree_that_a_file_is_broken_and_another_one_is_used(tmp_path, how):
    bad, good = tmp_path / "bad.mp4", write_clip(tmp_path / "good.mp4", frames=greys(40))
    break_file(bad, how)
    (problem,) = data.check_file(bad)
    assert re.search(f"broken: .*({BROKEN[how]})", problem)
    assert "\n" not in problem
    dataset = ClipDataset(files_of(bad, good), 4, 2, (16, 16), seed=0, sampling="segments")
    pixels, number, problems = dataset[0, 0]
    assert number == 1 and numbers(pixels[0]).min() > 0 and {path for path, _ in problems} == {str(bad)}
    told = {text for _, text in problems}
    assert told == {problem.replace("broken: ", "broken, another file is used: ")}


@pytest.mark.parametrize("workers", [0, 1])
def test_only_broken_files_end_in_one_whole_line(tmp_path, workers):
    path = tmp_path / "one\ntwo.mp4"
    path.write_text("no video")
    dataset = ClipDataset(files_of(path, path), 4, 2, (16, 16), seed=0)
    loader = data.start_loader(dataset, workers, batch_sampler=[[(0, 0)]], collate_fn=data.collate)
    with pytest.raises(ValueError, match="10 files in a row cannot be read, .* check lists them"):
        data.take(loader)


def test_a_clip_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "x.mp4")
    assert data.LARGEST >= 16 * 3840 * 2160 * 3  # a clip of 4K is possible
    monkeypatch.setattr(data, "LARGEST", 9 * 48 * 64 * 3)
    assert data.read_clips(path, lambda n: np.arange(9)[None])[0].shape[1] == 9
    with pytest.raises(data.BrokenFile, match="frames of 64x48: shrink it first"):
        data.read_clips(path, lambda n: np.arange(10)[None])


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"),
                                   OSError(errno.ENOMEM, "Cannot allocate memory")], ids=str)
def test_a_lack_of_memory_or_descriptors_is_not_the_fault_of_a_file(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(data, "LARGEST", 2**60)  # more than there is
    monkeypatch.setattr(data.av, "open", fail)
    monkeypatch.setattr(data.Image, "open", fail)
    video, image = write_text(tmp_path / "x.mp4"), write_text(tmp_path / "x.png")
    for read in (lambda: data.read_clips(video, lambda n: np.zeros((1, 1), int)),
                 lambda: data.read_image(image), lambda: data.check_file(video)):
        with pytest.raises((MemoryError, OSError)):
            read()
    loader = data.start_loader(ClipDataset(files_of(video), 4, 2, (16, 16), 0), 0,
                               batch_sampler=[[(0, 0)]], collate_fn=data.collate)
    cause = "Too many open files" if getattr(error, "errno", 0) == errno.EMFILE else "MemoryError"
    with pytest.raises(ValueError, match=f"the loader failed: .*{cause}"):
        data.take(loader)


def test_a_damaged_file_that_asks_for_gigabytes_is_broken(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(data.av, "open", fail)
    with pytest.raises(data.BrokenFile, match="asks for more memory than there is"):
        data.read_clips(write_text(tmp_path / "x.mp4"), lambda n: np.zeros((1, 1), int))


def write_text(path, text="some bytes"):
    path.write_text(text)
    return path
