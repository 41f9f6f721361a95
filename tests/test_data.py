import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

import data
from conftest import ROOT
from masking import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A 40-frame video whose frame i is grey with brightness 5 * i: a frame tells its number."""
    path = tmp_path_factory.mktemp("clips") / "count.mp4"
    frames = np.broadcast_to((5 * np.arange(40, dtype=np.uint8))[:, None, None, None], (40, 48, 64, 3))
    data.write_video(path, frames, 25)
    return path


def numbers(frames):
    """Which frames of `clip` these are."""
    return np.rint(frames.reshape(*frames.shape[:-3], -1).astype(float).mean(-1) / 5).astype(int)


def text_file(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- lists ------------------------------------------------------------------------------------------------


@pytest.fixture
def ucf(tmp_path, clip):
    """UCF101's layout in small, with its traps: folder and list disagree about case, no labels in testlist."""
    root = tmp_path / "UCF101"
    for name in ("ApplyLipstick/v_ApplyLipstick_g01_c01.avi", "ApplyLipstick/v_ApplyLipstick_g08_c01.avi",
                 "HandstandPushups/v_HandStandPushups_g08_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"):  # fmt: skip
        target = root / "UCF-101" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, target)
    lists = root / "ucfTrainTestlist"
    text_file(lists / "classInd.txt", "1 ApplyLipstick\n2 HandstandPushups\n")
    for fold, train, test in (("1", "g08", "g01"), ("2", "g08", "g01"), ("3", "g01", "g08")):  # the third is turned round
        text_file(lists / f"trainlist0{fold}.txt", f"ApplyLipstick/v_ApplyLipstick_{train}_c01.avi 1\r\n"
                  f"HandstandPushups/v_HandstandPushups_{train}_c01.avi 2\r\n")  # fmt: skip
        text_file(lists / f"testlist0{fold}.txt", f"ApplyLipstick/v_ApplyLipstick_{test}_c01.avi\n"
                  f"HandStandPushups/v_HandStandPushups_{test}_c01.avi\n")  # fmt: skip
    return root


def test_ucf101_as_downloaded(ucf):
    train, val = data.list_videos(ucf, "train"), data.list_videos(ucf, "val", fold=2)
    assert train.classes == ["ApplyLipstick", "HandstandPushups"]
    assert train.labels.tolist() == val.labels.tolist() == [0, 1]
    assert "g08" in train.paths[1] and "g01" in val.paths[1] and "g08" in data.list_videos(ucf, "val", fold=3).paths[1]
    assert data.list_videos(ucf / "UCF-101", "train").paths.tolist() == train.paths.tolist()


def test_hmdb51_as_downloaded_with_its_odd_file_names(tmp_path, clip):
    odd = "#1_A&B_(x)+;@[y]~!_wave_f_nm_np1_fr_goo_37.avi"
    for name in (odd, "plain.avi", "unused.avi"):
        target = tmp_path / "hmdb51_org" / "wave" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, target)
    for fold, a, b in ((1, 1, 2), (2, 2, 1)):
        text = f"{odd} {a} \nplain.avi {b} \nunused.avi 0 \n"
        text_file(tmp_path / f"testTrainMulti_7030_splits/wave_test_split{fold}.txt", text)
    train = data.list_videos(tmp_path)
    assert data.list_videos(tmp_path, "val", fold=2).paths.tolist() == train.paths.tolist()
    assert [Path(p).name for p in train.paths] == [odd] and train.classes == ["wave"]
    assert [Path(p).name for p in data.list_videos(tmp_path, "val").paths] == ["plain.avi"]
    assert data.read_clips(train.paths[0], lambda n: np.zeros((1, 1), int)).shape == (1, 1, 48, 64, 3)


def test_missing_files_are_counted_and_named_unless_allowed(ucf):
    gone = ucf / "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi"
    gone.unlink()
    with pytest.raises(
        InputError, match="1 of 2 files .* HandstandPushups/v_HandstandPushups_g08_c01.avi.*--allow-missing"
    ):
        data.list_videos(ucf)
    assert data.list_videos(ucf, allow_missing=True).labels.tolist() == [0]


def test_half_a_download_is_explained(tmp_path):
    (tmp_path / "ucfTrainTestlist").mkdir()
    with pytest.raises(InputError, match="UCF-101/: unpack UCF101.rar .* bsdtar -xf"):
        data.list_videos(tmp_path)
    (tmp_path / "b/hmdb51_org").mkdir(parents=True)
    with pytest.raises(InputError, match="test_train_splits.rar"):
        data.list_videos(tmp_path / "b")


def test_lists_that_are_no_lists_are_named(tmp_path, ucf, clip):
    text_file(ucf / "ucfTrainTestlist/classInd.txt", "ApplyLipstick\n")
    with pytest.raises(InputError, match="a number and a class name"):
        data.list_videos(ucf)
    shutil.copy(clip, tmp_path / "x.mp4")
    for line in ("x.mp4 --5", "x.mp4 12345678901"):
        with pytest.raises(InputError, match="1 of 1 files"):
            data.list_videos(text_file(tmp_path / "list.csv", line + "\n"))


def test_val_classes_are_numbered_as_in_train(tmp_path, clip):
    for name in ("train/a/x.mp4", "train/b/x.mp4", "val/b/x.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / name)
    val = data.list_videos(tmp_path, "val")
    assert val.classes == ["a", "b"] and val.labels.tolist() == [1]


@pytest.mark.parametrize("line", ["a b/x 1.mp4 3", "a b/x 1.mp4,3", "a b/x 1.mp4, 3"])
def test_list_files_with_spaces_or_commas(tmp_path, clip, line):
    (tmp_path / "a b").mkdir()
    shutil.copy(clip, tmp_path / "a b/x 1.mp4")
    files = data.list_videos(text_file(tmp_path / "train.csv", line + "\n"))
    assert files.paths.tolist() == [str(tmp_path / "a b/x 1.mp4")] and files.labels.tolist() == [3]


def test_list_files_with_absolute_paths_without_labels_and_with_a_val_list(tmp_path, clip):
    path = tmp_path / "clip 2.mp4"
    shutil.copy(clip, path)
    train = text_file(tmp_path / "train.csv", f"{path}\n")
    text_file(tmp_path / "val.csv", "clip 2.mp4 0\n")
    assert data.list_videos(train).labels.tolist() == [-1]
    assert data.list_videos(train, "val").labels.tolist() == [0]


def test_class_folders_plain_folders_and_train_val_folders(tmp_path, clip):
    for name in ("one/b/y.mp4", "one/a/x.mp4", "one/a/deep/z.mp4", "one/empty/readme.txt", "flat/x.mp4",
                 "split/train/a/x.mp4", "split/validation/a/y.mp4", "one/a/.hidden.mp4"):  # fmt: skip
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, target)
    one = data.list_videos(tmp_path / "one")
    val = data.list_videos(tmp_path / "one", "val")
    assert one.classes == ["a", "b"] and len(one.paths) + len(val.paths) == 3
    assert not set(one.paths) & set(val.paths)
    assert len(data.list_videos(tmp_path / "flat").paths) == 1
    assert "validation" in data.list_videos(tmp_path / "split", "val").paths[0]


def test_what_could_be_meant_in_two_ways_is_asked_for(tmp_path, clip):
    for name in ("loose/a.mp4", "loose/old/b.mp4", "traffic/bus/a.mp4", "traffic/train/b.mp4", "plain/a/x.mp4", "plain/b/y.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / name)
    for folder, message in (("loose", r"class folders \(old/ ...\) and 1 files beside them, e.g. a.mp4"), ("traffic", "bus/ but no val/")):
        with pytest.raises(InputError, match=message):
            data.list_videos(tmp_path / folder)
    with pytest.raises(InputError, match="--fold 2: .*plain has no official lists"):
        data.list_videos(tmp_path / "plain", fold=2)


def test_lists_reach_out_of_their_folder_and_through_links(tmp_path, clip):
    for name in ("videos/a,b.mp4", "elsewhere/c.mp4", "lists/here.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / name)
    (tmp_path / "lists/link").symlink_to(tmp_path / "elsewhere")
    lines = "../videos/a,b.mp4 1\nlink/c.mp4,0\nhere.mp4 2\n"
    files = data.read_list(text_file(tmp_path / "lists/train.csv", lines), data.VIDEO, False)
    assert [Path(p).name for p in files.paths] == ["a,b.mp4", "c.mp4", "here.mp4"] and files.labels.tolist() == [1, 0, 2]
    Image.new("RGB", (8, 8)).save(tmp_path / "lists/still.png")
    for line in (f"/{'a' * 300} 3", "still.png 0", f"a{' ' * 2000}b"):
        with pytest.raises(InputError, match="1 of 1 files"):
            data.list_videos(text_file(tmp_path / "lists/none.csv", line + "\n"))


def test_imagenets_flat_val_folder_has_files_of_no_class_and_hidden_folders_are_none(tmp_path):
    for name in ("train/a/0.png", "train/b/1.png", "train/a/.thumbs/2.png", "val/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert data.list_images(tmp_path).labels.tolist() == [0, 1]
    val = data.list_images(tmp_path, "val")
    assert val.labels.tolist() == [-1] and val.classes == ["a", "b"]


def test_lists_without_the_numbers_of_the_classes_are_refused(tmp_path):
    text_file(tmp_path / "trainlist01.txt", "a/x.avi 1\n")
    with pytest.raises(InputError, match="trainlist01.txt but not classInd.txt"):
        data.list_videos(tmp_path)


def test_every_20th_file_is_held_out_and_splits_are_disjoint():
    files = data.Files(np.array([str(i) for i in range(100)]), np.zeros(100, int), ["a"])
    train, val = data.hold_out(files, "train"), data.hold_out(files, "val")
    assert len(train.paths) == 95 and len(val.paths) == 5 and not set(train.paths) & set(val.paths)


def test_cifar10_comes_through_torchvision(monkeypatch):
    class Fake:
        def __init__(self, folder, train, download):
            self.data, self.targets, self.classes = (
                np.zeros((30, 32, 32, 3), np.uint8) + train,
                list(range(10)) * 3,
                list("abcdefghij"),
            )

    monkeypatch.setattr(data.datasets, "CIFAR10", Fake)
    files = data.list_images("CIFAR10", "train")
    assert data.ImageDataset(files, 32, 0)[0, 4][0].shape == (1, 32, 32, 3) and files.labels[11] == 1


def test_a_folder_called_cifar10_comes_before_the_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cifar10").mkdir()
    Image.new("RGB", (8, 8)).save("cifar10/a.png")
    assert data.list_images("cifar10").paths.tolist() == ["cifar10/a.png"]


def test_a_download_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr(data.datasets, "STL10", lambda *a, **k: (_ for _ in ()).throw(OSError("no network\nat all")))
    with pytest.raises(InputError, match="could not get stl10 .*: no network$"):
        data.list_images("stl10")


# ---- frame numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 64, 300])
@pytest.mark.parametrize("length, stride", [(1, 1), (8, 2), (16, 4)])
def test_frame_numbers_are_valid_and_do_not_run_backwards(n, length, stride):
    for seed in range(5):
        g = seeded(seed)
        clips = [data.dense_clip(n, length, stride, data.dense_start(n, length, stride, g)), data.segment_clip(n, length, g),
                 data.linspace_clip(n, length, stride, 0.0), *data.dense_views(n, length, stride, 5),
                 *data.dense_views(n, length, stride, 1), *data.segment_views(n, length, 2)]  # fmt: skip
        for frames in clips:
            assert len(frames) == length and frames.min() >= 0 and frames.max() < n and (np.diff(frames) >= 0).all()


def test_random_starts_and_segments_reach_the_whole_video():
    starts = {data.dense_start(20, 8, 2, seeded(i)) for i in range(200)}
    assert starts == {0, 1, 2, 3, 4}
    seen = np.concatenate([data.segment_clip(75, 16, seeded(i)) for i in range(400)])
    assert set(seen) == set(range(75))


# ---- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec, suffix", [("libx264", "mp4"), ("mpeg4", "avi"), ("mpeg4", "mkv")])
def test_kept_frames_are_those_of_a_full_decode(tmp_path, codec, suffix):
    rng = np.random.default_rng(0)
    frames = np.repeat(np.repeat(rng.integers(0, 255, (90, 6, 8, 3), dtype=np.uint8), 8, 1), 8, 2)
    path = tmp_path / f"x.{suffix}"
    data.write_video(path, frames, 25, codec)
    with av.open(str(path)) as container:
        full = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    for chosen in ([[0, 3, 3, 89], [7, 8, 9, 10]], [[61, 65, 69, 89]], [[71, 72, 73, 74]], [[72, 72, 72, 72]]):
        assert np.array_equal(data.read_clips(path, lambda n: np.array(chosen)), full[chosen])


def write_noise(path, codec, n, b_frames=0, time=lambda i: i):
    """n frames of blocks of noise; time: frame number -> when it is shown, in 25ths of a second."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = b_frames, 12
        for i in range(n):
            blocks = np.kron(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            frame = av.VideoFrame.from_ndarray(blocks, format="rgb24")
            frame.pts, frame.time_base = time(i), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class Watched:
    """A container that notes where it was told to seek; PyAV's take no attributes."""

    def __init__(self, container, jumps):
        self.container, self.jumps = container, jumps

    def __getattr__(self, name):
        return getattr(self.container, name)

    def __enter__(self):
        return self.container.__enter__()

    def __exit__(self, *error):
        return self.container.__exit__(*error)

    def seek(self, place, **options):
        self.jumps.append(place)
        self.container.seek(place, **options)


PAUSE = lambda i: i + 75 * (i > 60)
FASTER_THEN_SLOWER = lambda i: i if i < 60 else 60 + 3 * (i - 60)


@pytest.mark.parametrize("name, codec, b_frames, time, jumping", [
    ("h264.mp4", "libx264", 2, None, True), ("pause.mp4", "libx264", 2, PAUSE, True),
    ("slower.mp4", "libx264", 2, FASTER_THEN_SLOWER, True), ("h264.mkv", "libx264", 2, None, True),
    ("none.mp4", "mpeg4", 0, None, True), ("none.mov", "mpeg4", 0, FASTER_THEN_SLOWER, True),
    ("none.avi", "mpeg4", 0, None, True), ("pause.avi", "mpeg4", 0, PAUSE, True), ("h264.avi", "libx264", 0, None, True),
    ("b.avi", "mpeg4", 2, None, False), ("none.mkv", "libx264", 0, PAUSE, False), ("b.mpg", "mpeg2video", 2, None, True),
])  # fmt: skip
def test_a_late_clip_has_the_same_frames_as_by_decoding_from_the_first(
    tmp_path, monkeypatch, name, codec, b_frames, time, jumping
):
    path = tmp_path / name
    write_noise(path, codec, 120, b_frames, time or (lambda i: i))
    with av.open(str(path)) as container:
        full = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    jumps, plain = [], data.open_video
    monkeypatch.setattr(data, "open_video", lambda path: (Watched((opened := plain(path))[0], jumps), opened[1]))
    for first in (30, 59, 60, 61, 75, 100):
        wanted = np.arange(first, first + 16)
        jumps.clear()
        found, met = data.grab(path, wanted)
        assert met == first + 16 and all(np.array_equal(found[i], full[i]) for i in wanted) and bool(jumps) == jumping


def test_frames_that_avi_shows_for_longer_are_counted_once(tmp_path):
    write_noise(tmp_path / "pause.avi", "mpeg4", 120, time=PAUSE)
    with av.open(str(tmp_path / "pause.avi")) as container:
        assert container.streams.video[0].frames == 195
    assert data.count_frames(tmp_path / "pause.avi") == 120 and data.check_file(tmp_path / "pause.avi")[0] == ""
    whole = (tmp_path / "pause.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    assert "can be decoded" in data.check_file(tmp_path / "cut.avi")[0]


def test_a_cover_picture_is_not_the_video(tmp_path):
    path = tmp_path / "cover.mkv"
    with av.open(str(path), "w") as container:
        cover, video = container.add_stream("mjpeg", rate=1), container.add_stream("mpeg4", rate=25)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        for _ in range(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        container.mux(video.encode())
    assert data.read_clips(path, lambda n: np.zeros((1, 2), int)).shape == (1, 2, 48, 64, 3)


def test_repeated_sampling_gives_different_clips_of_one_video(clip):
    files = data.Files(np.array([str(clip)]), np.array([0]), ["a"])
    dataset = data.ClipDataset(files, frames=4, stride=2, size=16, seed=0, repeat=3, flip=False)
    clips, index, broken = dataset[0, 0]
    assert clips.shape == (3, 4, 16, 16, 3) and clips.dtype == torch.uint8 and (index, broken) == (0, [])
    starts = numbers(clips.numpy())[:, 0]
    assert len(set(starts)) > 1 and (np.diff(numbers(clips.numpy()), axis=1) == 2).all()


def test_all_frames_of_a_clip_share_one_crop_and_one_flip():
    frames = np.broadcast_to(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8), (5, 40, 60, 3))
    for kind in ("random", "multiscale", "center"):
        out = data.make_crop(frames.copy(), 32, kind, 0.2, True, seeded(3))
        assert out.shape == (5, 32, 32, 3) and (out == out[:1]).all()


def test_a_flip_mirrors_and_can_be_switched_off():
    frames = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)
    crops = [data.make_crop(frames, 32, "random", 1.0, flip, seeded(i)) for flip in (True, False) for i in range(20)]
    plain = torch.from_numpy(frames)
    same = [torch.equal(c, plain) for c in crops]
    mirrored = [torch.equal(c, plain.flip(2)) for c in crops]
    assert 3 < sum(mirrored[:20]) < 17 and not any(mirrored[20:])
    assert all(s or m for s, m in zip(same, mirrored)) and all(same[20:])


def test_multi_scale_crops_stay_inside_and_use_all_places():
    boxes = {data.multi_scale_crop(240, 320, seeded(i)) for i in range(800)}
    assert all(0 <= top and top + h <= 240 and 0 <= left and left + w <= 320 for top, left, h, w in boxes)
    assert {h for _, _, h, _ in boxes} == {240, 210, 180, 158} and min(data.multi_scale_crop(1, 900, seeded())[2:]) == 1
    assert len({(top, left) for top, left, h, w in boxes if h == w == 158}) == 13


def test_an_item_is_a_function_of_seed_epoch_and_number(toy):
    files = data.list_videos(toy)
    make = lambda seed: data.ClipDataset(files, 4, 2, 16, seed)
    a = make(0)[3, 5][0]
    torch.manual_seed(99)
    assert torch.equal(a, make(0)[3, 5][0])
    assert not torch.equal(a, make(0)[4, 5][0]) and not torch.equal(a, make(1)[3, 5][0])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(toy, workers):
    dataset = data.ClipDataset(data.list_videos(toy), 4, 2, 16, seed=0)
    plan = [[(0, i), (1, i + 1)] for i in range(6)]
    batches = lambda n: [b[0] for b in data.make_loader(dataset, plan, n, "cpu")]
    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(workers), strict=True))


@pytest.mark.parametrize("least", [0.1, 0.5, 0.95])
def test_a_random_crop_takes_at_least_the_share_that_is_asked_for(least):
    """Every pixel says where it is, so the crop's size can be read from what it shows."""
    rows, columns = np.meshgrid(np.arange(60) * 4, np.arange(60) * 4, indexing="ij")
    frame = np.stack([rows, columns, rows], -1).astype(np.uint8)[None]
    shares = []
    for i in range(60):
        x = data.make_crop(frame, 20, "random", least, False, seeded(i))[0].float() / 4
        step = ((x[-1, 10, 0] - x[0, 10, 0]) * (x[10, -1, 1] - x[10, 0, 1])).item() / 19**2  # pixels of the frame to one
        shares.append(step * 20**2 / 60**2)
    assert min(shares) > least - 0.06 and max(shares) - min(shares) > 0.5 * (1 - least)


def test_each_kind_of_crop_is_what_its_name_says():
    frame = np.random.default_rng(0).integers(0, 255, (1, 40, 60, 3), dtype=np.uint8)
    middle = torch.from_numpy(frame[:, :, 10:50])
    assert torch.equal(data.make_crop(frame, 40, "center", 0.1, True, None), middle)
    top, left, h, w = data.multi_scale_crop(40, 60, seeded(5))
    box = TF.resize(torch.from_numpy(frame[:, top : top + h, left : left + w]).permute(0, 3, 1, 2), [32, 32], antialias=True)
    assert torch.equal(data.make_crop(frame, 32, "multiscale", 0.1, False, seeded(5)), box.permute(0, 2, 3, 1))


def test_training_images_are_cropped_at_random_and_test_images_are_not(toy):
    files = data.list_images(toy)
    items = {train: [data.ImageDataset(files, 16, 0, train=train)[e, 3][0] for e in (0, 1)] for train in (True, False)}
    assert not torch.equal(*items[True]) and torch.equal(*items[False])
    whole = data.make_crop(data.read_image(files.paths[3])[None], 16, "center", 1, False, None, bicubic=True)
    assert torch.equal(items[False][0], whole)


def test_drawing_a_crop_leaves_the_global_generator_alone(clip):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    data.make_crop(np.zeros((1, 20, 20, 3), np.uint8), 8, "random", 0.2, True, seeded())
    assert torch.equal(state, torch.get_rng_state())


# ---- broken files -----------------------------------------------------------------------------------------


def break_file(path, how, clip):
    content = clip.read_bytes()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "text":
        path.write_text("this is no video")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut off":
        path.write_bytes(content[: len(content) // 3])
    elif how == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "sound only":
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.rate = 44100
            container.mux(stream.encode(frame))
            container.mux(stream.encode())


@pytest.mark.parametrize("how", ["folder", "pipe", "text", "empty", "cut off", "noise", "sound only", "gone"])
def test_a_broken_video_is_named_and_another_one_taken(tmp_path, clip, how):
    bad, good = tmp_path / "bad.mp4", tmp_path / "good.mp4"
    shutil.copy(clip, good)
    break_file(bad, how, clip)
    files = data.Files(np.array([str(bad), str(good)]), np.array([0, 0]), ["a"])
    pixels, index, broken = data.ClipDataset(files, 4, 2, 16, seed=0, crop="center")[0, 0]
    assert index == 1 and pixels.float().mean() > 0 and {path for path, _ in broken} == {str(bad)}
    assert all(reason and "\n" not in reason for _, reason in broken)


def test_only_broken_files_end_in_one_line(tmp_path):
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    for path in paths:
        path.write_text("no video")
    files = data.Files(np.array([str(p) for p in paths]), np.zeros(3, int), ["a"])
    with pytest.raises(InputError, match="10 files in a row cannot be read"):
        data.ClipDataset(files, 4, 2, 16, seed=0)[0, 0]


def test_a_header_that_promises_too_many_frames_is_not_believed(monkeypatch, clip):
    monkeypatch.setattr(data, "count_frames", lambda path: 400)
    clips = data.read_clips(clip, lambda n: data.dense_views(n, 4, 2, 1))
    assert clips.shape[:2] == (1, 4) and numbers(clips).max() < 40


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
def test_images_of_every_kind_become_rgb(tmp_path, mode):
    grey = np.tile(np.arange(64, dtype=np.uint8)[None] * 4, (48, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    pixels = data.read_image(path)
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    if mode != "1":
        assert np.abs(pixels[..., 0].astype(int) - grey).max() <= 3


def test_pixels_of_no_known_range_are_not_taken_for_a_picture(tmp_path):
    for i, x in enumerate((np.random.default_rng(0).random((8, 8), np.float32), np.full((8, 8), 70000, np.int32))):
        Image.fromarray(x).save(tmp_path / f"{i}.tif")
        with pytest.raises(data.BrokenFile, match="save it with 8 or 16 bits"):
            data.read_image(tmp_path / f"{i}.tif")


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "a/locked").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a/0.png")
    real = os.scandir  # the tests may run as root, who may list everything

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="cannot list .*locked: Permission denied"):
        list(data.walk(tmp_path, data.IMAGE))
    (tmp_path / "a/locked").rename(tmp_path / "a/lost+found")  # every disk has one that users may not list
    assert len(list(data.walk(tmp_path, data.IMAGE))) == 1
    (tmp_path / "a/lost+found").rename(tmp_path / "a/locked")
    with pytest.raises(InputError, match="1 of 2 files listed in .* are not in"):  # the missing file is what matters
        data.read_list(text_file(tmp_path / "list.txt", "a/0.png 1\na/1.png 0\n"), data.IMAGE, False)
    # a list whose files are all there has no need of it
    assert len(data.read_list(text_file(tmp_path / "list.txt", "a/0.png 1\n"), data.IMAGE, False).paths) == 1


def test_class_folders_beside_a_training_split_without_labels_are_pictures_without_labels(tmp_path):
    for name in ("train/0.png", "val/a/1.png", "val/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert data.list_images(tmp_path, "val").labels.tolist() == [-1, -1]


def test_linked_folders_are_walked_but_not_in_circles(tmp_path):
    (tmp_path / "there").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "there/0.png")
    (tmp_path / "root/a").mkdir(parents=True)
    (tmp_path / "root/b").symlink_to(tmp_path / "there")
    (tmp_path / "there/up").symlink_to(tmp_path / "root")
    assert list(data.walk(tmp_path / "root", data.IMAGE)) == [tmp_path / "root/b/0.png"]


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert data.read_image(tmp_path / "x.jpg").shape == (40, 20, 3)


# ---- the toy world ----------------------------------------------------------------------------------------


def ridge_accuracy(x, y, classes, train):
    """Accuracy on ~train of ridge regression to one-hot labels, inputs standardised."""
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-3)
    target = np.eye(classes)[y]
    weights = np.linalg.solve(
        x[train].T @ x[train] + 10 * len(x[0]) ** 0.5 * np.eye(x.shape[1]), x[train].T @ target[train]
    )
    return ((x[~train] @ weights).argmax(1) == y[~train]).mean()


@pytest.fixture(scope="module")
def toy_clips():
    """480 clips of 12 frames at 24 px, with the object's class map, straight from the renderer."""
    clips, centers, labels = [], [], []
    for i in range(480):
        motion = list(data.MOTIONS)[i % 6]
        scene = data.draw_video_scene(np.random.default_rng([9, i]), motion, 12)
        clips.append(data.render(scene, 24)[0])
        centers.append(scene["objects"][0]["place"][:, 1:])  # height and distance over time
        labels.append(i % 6)
    return np.stack(clips), np.stack(centers), np.array(labels)


def test_one_toy_frame_is_at_chance_and_the_motion_is_not(toy_clips):
    clips, centers, labels = toy_clips
    train = np.arange(480) // 6 % 4 < 3  # a quarter is held out
    frame = clips[:, 6].reshape(480, -1) / 255.0
    error = (1 / 6 * 5 / 6 / 120) ** 0.5
    assert abs(ridge_accuracy(frame, labels, 6, train) - 1 / 6) < 3 * error
    # even the exact place of the object in one frame says nothing about the class ...
    place = np.concatenate([centers[:, 6], centers[:, 6] ** 2, centers[:, 6, :1] * centers[:, 6, 1:]], 1)
    assert abs(ridge_accuracy(place, labels, 6, train) - 1 / 6) < 3 * error
    # ... but the way it turns does: the area swept around the circle's centre from frame to frame, nearest neighbour
    y, z = (centers - [1.8, 4.6])[:, :, 0], (centers - [1.8, 4.6])[:, :, 1]
    swept = y[:, :-1] * z[:, 1:] - y[:, 1:] * z[:, :-1]
    motion = np.stack([swept.mean(axis=1), swept.std(axis=1)], axis=1)
    nearest = np.linalg.norm(motion[~train][:, None] - motion[train][None], axis=2).argmin(axis=1)
    assert (labels[train][nearest] == labels[~train]).mean() > 0.95


def test_a_mirrored_toy_clip_is_a_clip_of_the_same_class():
    """Mirroring the picture equals rendering the mirrored world, whose heights and distances are the same."""
    scene = data.draw_video_scene(np.random.default_rng(3), "OverAway", 4)
    pixels, depth, classes = data.render(scene, 32)
    for thing in scene["objects"]:
        thing["place"] = thing["place"] * np.float32([-1, 1, 1])
        thing["turn"] = -thing["turn"]
    for pattern in (scene["floor"], scene["wall"]):
        pattern["waves"] = pattern["waves"] * np.float32([-1, 1])
    scene["camera"] = -scene["camera"]
    mirrored = data.render(scene, 32)
    assert np.abs(mirrored[0][:, :, ::-1].astype(int) - pixels).max() <= 2
    # maps take one of two by two samples, so edges may differ by one of them
    assert (mirrored[2][:, :, ::-1] == classes).mean() > 0.98


def test_toy_images_are_solvable_from_one_frame():
    """Histograms of edge directions, 4 x 4 cells: far above the chance of 1/4."""
    features, labels = [], []
    for i in range(480):
        kind = data.KINDS[i % 4]
        pixels, _, _ = data.render(data.draw_image_scene(np.random.default_rng([7, i]), kind), 48)
        grey = pixels[0].astype(float).mean(-1)
        dy, dx = np.gradient(grey)
        angle, size = np.arctan2(dy, dx) % np.pi, np.hypot(dx, dy)
        bins = (angle / np.pi * 8).astype(int) % 8
        cells = [np.bincount(bins[r : r + 12, c : c + 12].ravel(), size[r : r + 12, c : c + 12].ravel(), 8)
                 for r in range(0, 48, 12) for c in range(0, 48, 12)]  # fmt: skip
        features.append(np.concatenate(cells))
        labels.append(i % 4)
    assert ridge_accuracy(np.sqrt(features), np.array(labels), 4, np.arange(480) < 360) > 0.5


def test_toy_depth_and_classes_are_those_of_a_ball_at_a_known_place():
    scene = data.draw_image_scene(np.random.default_rng(0), "Ball")
    scene["objects"] = [{**scene["objects"][0], "place": np.float32([0, 1.7, 4]), "radius": np.float32(0.5)}]
    scene["camera"] = np.zeros(1, np.float32)
    _, depth, classes = data.render(scene, 64)
    inside = classes[0] == data.MAPS.index("Ball")
    assert abs(depth[0][inside].min() - 3.5) < 0.1  # along the view axis, 4 m minus the radius
    assert abs(np.sqrt(inside.sum() / np.pi) - 0.5 / 4 / 0.55 * 32) < 1.5  # radius in pixels by perspective
    assert set(np.unique(classes)) == {0, 1, 2} and depth.max() <= 10


def test_the_toy_world_on_disk_is_aligned_and_split_by_groups(toy):
    rgb = sorted((toy / "rgb").rglob("*.jpg"))
    assert len(rgb) == 80
    for path in rgb[:5]:
        depth = np.asarray(Image.open(str(path).replace("rgb", "depth").replace("jpg", "png")))
        classes = np.asarray(Image.open(str(path).replace("rgb", "semseg").replace("jpg", "png")))
        assert depth.dtype == np.uint16 and depth.shape == classes.shape == (32, 32)
        assert classes.max() < len(data.MAPS) and data.MAPS.index(path.parent.name) in classes
    for fold in (1, 2, 3):
        groups = [{Path(p).stem.split("_")[2] for p in data.list_videos(toy, s, fold).paths} for s in ("train", "val")]
        assert groups[0] and groups[1] and not groups[0] & groups[1]
    assert len(data.list_images(toy, "val").paths) == 16 and data.list_videos(toy).classes == list(data.MOTIONS)


# ---- commands ---------------------------------------------------------------------------------------------


def test_check_decodes_everything_and_lists_what_is_broken(run, tmp_path, ucf):
    text = run("data.py", "check", ucf)
    assert "4 files decoded, 0 broken" in text and "fold 2 val: 2 files listed, all there" in text
    assert Image.open(tmp_path / "contact_sheet.png").size == (400, 100)
    (ucf / "UCF-101/ApplyLipstick/v_ApplyLipstick_g01_c01.avi").write_text("no video")
    text = run("data.py", "check", ucf, "--sheet", "a.png", code=1)
    assert "broken: " in text and "v_ApplyLipstick_g01_c01.avi" in text and "4 files decoded, 1 broken" in text
    (ucf / "UCF-101/ApplyLipstick/v_ApplyLipstick_g01_c01.avi").unlink()
    text = run("data.py", "check", ucf, code=1)
    assert "3 files decoded, 0 broken" in text and "1 of 2 files listed" in text


def test_shrink_keeps_names_lists_and_frames_and_can_go_on(run, tmp_path, ucf):
    (ucf / "UCF-101/bad.avi").write_text("no video")
    text = run("data.py", "shrink", ucf, tmp_path / "small", "--short-side", 32, code=1)
    assert "broken, left out: " in text and "bad.avi" in text and "4 videos in" in text
    train = data.list_videos(tmp_path / "small")
    first = Path(data.list_videos(ucf, allow_missing=True).paths[0])
    (tmp_path / "linked").symlink_to(ucf)
    for root in (ucf, tmp_path / "linked"):
        text_file(ucf / "all.csv", f"{root / first.relative_to(ucf)} 0\n")
        run("data.py", "shrink", root, tmp_path / "smaller", "--short-side", 16, code=1)
        (copied,) = data.list_videos(tmp_path / "smaller/all.csv").paths  # its absolute path leads to the copy
        assert Path(copied) == tmp_path / "smaller" / first.relative_to(ucf)
    (ucf / "all.csv").unlink()
    clip = data.read_clips(train.paths[1], lambda n: np.arange(n)[None])
    assert clip.shape == (1, 40, 32, 42, 3) and np.abs(numbers(clip)[0] - np.arange(40)).max() <= 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "small").rglob("*.avi")}
    Path(train.paths[0]).unlink()
    run("data.py", "shrink", ucf, tmp_path / "small", "--short-side", 32, code=1)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "small").rglob("*.avi")}
    assert set(before) == set(after) and sum(before[p] != after[p] for p in before) == 1


def test_a_full_disk_ends_shrink_and_is_not_taken_for_broken_videos(tmp_path, monkeypatch):
    write_noise(tmp_path / "in.mp4", "mpeg4", 10)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "write_video", full)
    with pytest.raises(InputError, match="cannot write .*: No space left on device; call again"):
        data.shrink_file((tmp_path / "in.mp4", tmp_path / "out.mp4", 16))
    monkeypatch.setattr(data, "in_parallel", lambda *_: iter([(None, InputError("no space"))]))
    with pytest.raises(InputError, match="no space"):
        data.shrink(tmp_path, tmp_path.with_name("other"), 16)


@pytest.mark.parametrize("how, left", [(signal.SIGTERM, False), (signal.SIGKILL, True)])
def test_a_killed_toy_world_leaves_no_processes(tmp_path, how, left):
    process = subprocess.Popen([sys.executable, ROOT / "data.py", "toy", "toy"], cwd=tmp_path,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    process.stderr.readline()  # the first progress: its workers are there
    process.send_signal(how)
    assert process.wait(timeout=30) == (-how if left else 143) and bool(os.listdir(tmp_path)) == left
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers are still there")


def test_shrink_takes_slow_motion_another_size_and_odd_names_and_refuses_two_of_one_name(run, tmp_path):
    (tmp_path / "in").mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), dtype=np.uint8)
    data.write_video(tmp_path / "in/10:30.mp4", frames, Fraction(240000, 1001))
    for side in (24, 16):  # asked for again at another size, it is made again
        assert "1 videos in out" in run("data.py", "shrink", "in", "out", "--short-side", side)
        assert data.read_clips(tmp_path / "out/10:30.mp4", lambda n: np.arange(n)[None]).shape[:3] == (1, 6, side)
    (tmp_path / "out/10:30.mp4").write_bytes(b"cut off")  # so is a damaged copy
    assert "1 videos in out" in run("data.py", "shrink", "in", "out", "--short-side", 16)
    data.write_video(tmp_path / "in/cut.avi", frames.repeat(5, 0), 25, "mpeg4")
    content = (tmp_path / "in/cut.avi").read_bytes()
    (tmp_path / "in/cut.avi").write_bytes(content[: len(content) // 2])
    assert "cut short: in/cut.avi: the header says 30 frames" in run("data.py", "shrink", "in", "out", "--short-side", 16)
    write_noise(tmp_path / "in/10:30.mp4", "mpeg4", 30)  # another video under the same name
    assert "1 videos in out" not in run("data.py", "shrink", "in", "out", "--short-side", 16)
    assert data.count_frames(tmp_path / "out/10:30.mp4") == 30
    write_noise(tmp_path / "in/a.mpg", "mpeg2video", 30)
    text_file(tmp_path / "in/list.txt", f"{tmp_path}/in/A.mpg 0\n")  # becomes a.mp4
    run("data.py", "shrink", "in", "out", "--short-side", 16)
    assert data.list_videos(tmp_path / "out/list.txt").paths.tolist() == [f"{tmp_path}/out/a.mp4"]
    for name in ("same.mpg", "same.mp4"):
        shutil.copy(tmp_path / "in/10:30.mp4", tmp_path / "in" / name)
    assert "would both become" in run("data.py", "shrink", "in", "other", code=2)


def test_two_scripts_that_begin_at_once_share_one_toy_world(tmp_path):
    """The second finds it complete; nothing else is touched, and nothing is left over."""
    (tmp_path / "toy.part").mkdir()
    small = dict(size=16, groups=4, clips=1, images=(4, 4))
    real, other = data.in_parallel, []

    def meanwhile(work, jobs, what):
        if not other:
            other.append(True)
            other.append(data.make_toy(tmp_path / "toy", **small))
        return real(work, jobs, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "in_parallel", meanwhile)
        assert data.make_toy(tmp_path / "toy", **small) is False and other == [True, True]
        patch.setattr(data, "in_parallel", real)
        rename = Path.rename  # ... or it is complete at the last moment
        patch.setattr(Path, "rename", lambda self, to: (rename(tmp_path / "toy", to), rename(self, to)))
        (tmp_path / "later").mkdir()
        assert data.make_toy(tmp_path / "later", **small) is False
        patch.undo()
        (tmp_path / "later").rename(tmp_path / "toy")
    assert sorted(os.listdir(tmp_path)) == ["toy", "toy.part"] and len(data.list_videos(tmp_path / "toy").paths) == 18


@pytest.mark.parametrize("command, message", [
    (["check", "nowhere"], "nowhere is no folder"), (["check", "."], "holds no videos and no images"),
    (["shrink", "nowhere", "x"], "is no folder"), (["shrink", ".", "x"], "lies in"), (["toy", "."], "no toy world"),
    (["toy", "x", "--size", "33"], "even --size"), ([], "required"), (["shake"], "invalid choice"),
])  # fmt: skip
def test_bad_commands_are_one_line_and_exit_code_2(refused, tmp_path, command, message):
    (tmp_path / "note.txt").write_text("not empty")
    assert message in refused(data, *command)


# ---- real files -------------------------------------------------------------------------------------------


def test_genuine_ucf101_and_hmdb51_clips_read(real):
    for name, count in (("ucf101", 101), ("hmdb51", 51)):
        root, found = real / "real_clips" / name, []
        with pytest.raises(InputError, match=r"\d+ of \d+ files listed in"):
            data.list_videos(root)
        for split in ("train", "val"):
            files = data.list_videos(root, split, allow_missing=True)
            assert len(files.classes) == count
            found += files.paths.tolist()
            for i in range(len(files.paths)):
                clips, index, broken = data.ClipDataset(files, 16, 2, 64, seed=0)[0, i]
                assert clips.shape == (1, 16, 64, 64, 3) and not broken and index == i and clips.float().std() > 5
        assert len(found) == len(set(found)) >= 2


def test_loader_batches_are_uint8(toy):
    dataset = data.ImageDataset(data.list_images(toy), 16, 0)
    batch, index, broken = next(iter(data.make_loader(dataset, [[(0, 0), (0, 1)]], 0, "cpu")))
    assert isinstance(data.make_loader(dataset, [], 0, "cpu"), DataLoader)
    assert batch.shape == (2, 16, 16, 3) and batch.dtype == torch.uint8 and index == [0, 1] and broken == []
