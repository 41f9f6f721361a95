"""data.py, files: which ones there are, images, and what is read and written whole."""

import argparse
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mae_image
import mae_video

FILE = "a b/é 1.mp4"


def fill(root, *names):
    """Empty files: to list them, nobody looks inside.   -> root"""
    for name in names:
        text_file(root / name, "")
    return root


def text_file(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def found(files):
    """{file name: class, or None where no label is known}"""
    known = {label: name for label, name in enumerate(files.classes)}
    return {Path(p).name: known.get(label) for p, label in zip(files.paths, files.labels)}


def make_ucf(videos, lists):
    """UCF101 in small, with its traps: folder and list differ in case, testlist has no labels."""
    a, b = "ApplyLipstick/v_ApplyLipstick", "HandstandPushups/v_HandStandPushups"
    fill(videos, *[f"{name}_g{group}_c01.avi" for name in (a, b) for group in ("01", "08")])
    text_file(lists / "classInd.txt", "1 ApplyLipstick\n2 HandstandPushups\n")
    for fold, train, test in (1, "08", "01"), (3, "01", "08"):
        lines = f"{a}_g{train}_c01.avi 1\r\n{b}_g{train}_c01.avi 2\r\n"
        text_file(lists / f"trainlist0{fold}.txt", lines.replace("HandStand", "Handstand"))
        lines = f"{a}_g{test}_c01.avi\n{b}_g{test}_c01.avi\n"
        text_file(lists / f"testlist0{fold}.txt", lines.replace("Handstand", "HandStand"))


@pytest.mark.parametrize("videos, lists, given", [
    ("UCF-101", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist", ""), ("", "", ""),
    ("UCF-101/UCF-101", "UCF101/ucfTrainTestlist", ""), ("UCF-101", "ucfTrainTestlist", "UCF-101")])
def test_ucf101_is_found_where_the_archives_unpack_it(tmp_path, videos, lists, given):
    make_ucf(tmp_path / videos, tmp_path / lists)
    train, val, other = (found(data.list_videos(tmp_path / given, split, fold))
                         for split, fold in (("train", 1), ("val", 1), ("val", 3)))
    assert train == other == {"v_ApplyLipstick_g08_c01.avi": "ApplyLipstick",
                              "v_HandStandPushups_g08_c01.avi": "HandstandPushups"}
    assert len(val) == 2 and not set(train) & set(val)


def test_lists_of_ucf101_are_taken_as_they_are_or_the_trouble_is_shown(tmp_path):
    videos, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    make_ucf(videos, lists)
    table = lists / "trainlist01.txt"
    table.write_text(table.read_text().replace("avi 1", "avi 0"))  # 0: unknown
    assert list(found(data.list_videos(tmp_path)).values()) == [None, "HandstandPushups"]
    (videos / "HandstandPushups/v_HandStandPushups_g08_c01.avi").unlink()
    files, where = data.list_videos(tmp_path), f"1 of 2 files not found in {videos}, e.g. Hand"
    assert (files.labels.tolist(), files.missing) == ([-1], 1) and where in files.how
    text_file(lists / "classInd.txt", "ApplyLipstick\n")
    with pytest.raises(ValueError, match="classInd.txt has the line 'ApplyLipstick'"):
        data.list_videos(tmp_path)


@pytest.mark.parametrize("folder", ["hmdb51_org/wave", "videos/hmdb51_org/wave/wave"])
def test_hmdb51_as_downloaded_with_its_odd_file_names(tmp_path, folder):
    odd = "#1_A&B_(x)+;@[y]~!_wave_f_nm_np1_fr_goo_37.avi"
    fill(tmp_path / folder, odd, "plain.avi", "unused.avi")
    fill(tmp_path, f"__MACOSX/hmdb51_org/wave/._{odd}")  # as a Mac adds to an archive
    for fold, a, b in (1, 1, 2), (2, 2, 1), (3, 0, 1):
        lines = f"{odd} {a} \nplain.avi {b} \nunused.avi 0 \n"
        text_file(tmp_path / f"testTrainMulti_7030_splits/wave_test_split{fold}.txt", lines)
    assert found(data.list_videos(tmp_path)) == {odd: "wave"}
    assert found(data.list_videos(tmp_path, "val", fold=2)) == {odd: "wave"}
    assert found(data.list_videos(tmp_path, "val")) == {"plain.avi": "wave"}


@pytest.mark.parametrize("split, names, want", [
    ("train", "x.txt __MACOSX/a/._1.mp4 x/y/a/1.mp4 x/y/b/2.mp4", {"1.mp4": "a", "2.mp4": "b"}),
    ("train", "3.mp4 a/1.mp4 b/.4.mp4 b/.hidden/5.mp4", {"1.mp4": "a", "3.mp4": None}),
    ("train", "dataset/archery/1.mp4", {"1.mp4": None}),  # one folder alone is no class
    ("val", "x.mp4", {"x.mp4": None}),
    ("val", "train/a/1.mp4 val/a/2.mp4 test/a/3.mp4", {"2.mp4": "a"}),
    ("val", "train/2.mp4 val/a/3.mp4 val/b/4.mp4", {"3.mp4": None, "4.mp4": None}),
    ("val", "train/a/5.mp4 train/b/6.mp4 val/7.mp4", {"7.mp4": None}),
    ("val", "TRAIN_256/a/1.mp4 TRAIN_256/b/2.mp4 testing/b/3.mp4", {"3.mp4": "b"}),
    ("val", "x/trainset/a/1.mp4 x/trainset/b/2.mp4 x/Validation/b/3.mp4", {"3.mp4": "b"})])
def test_wrappers_are_stepped_into_and_class_folders_are_classes(tmp_path, split, names, want):
    fill(tmp_path, *names.split())
    assert found(data.list_videos(tmp_path, split)) == want
    assert data.list_videos(tmp_path).classes == data.list_videos(tmp_path, "val").classes


@pytest.mark.parametrize("names, listed, message", [
    ("ucfTrainTestlist/x", "", "holds a part of .*: unpack UCF-101, too"),
    ("b/hmdb51_org/x", "", "holds a part of .*: unpack testTrainMulti_7030_splits, too"),
    ("train/a/1.mp4 train/b/2.mp4 val/b/3.mp4 val/c/4.mp4", "", "lacks: {'c'}"),
    ("bus/1.mp4 train/2.mp4", "", "has train/ but no val/: is that a split, or a class"),
    ("a/1.png b/2.png b/3.ts", "", "but 2 .png, 1 .ts: mae_image.py takes images"),
    ("x.mp4", "x.mp4 1.5", "no file of .*x.mp4"), ("x.mp4", "x.mp4 word", "no file of .*x.mp4"),
    ("x.png", "x.png 0", "no file of .*x.png"), ("x.mp4 x.avi", "x 1", "has no file of")])
def test_what_a_folder_or_list_leaves_in_doubt_is_an_error(tmp_path, names, listed, message):
    root = fill(tmp_path, *names.split())
    root = text_file(root / "train.csv", listed) if listed else root
    with pytest.raises(ValueError, match=message):
        data.list_videos(root, "val")


def test_one_line_says_what_was_found(tmp_path, run):
    fill(tmp_path, *"train/a/1.mp4 train/b/2.mp4 train/a/x.ts train/0.mp4 val/a/3.mp4".split())
    how = "folder train, 1 beside the class folders, passed over: 1 .ts"
    line = f"training: 3 files of 2 classes ({how}); held out: 1 (folder val)\n"
    assert line in run(mae_video, "--data", ".", code=2)
    with pytest.raises(ValueError, match="--fold 2: .* has no official lists"):
        data.list_videos(tmp_path, fold=2)


def test_every_20th_file_of_a_class_is_held_out_at_least_one(tmp_path):
    names = [f"0/a{i:02}.mp4" for i in range(60)] + ["1/b1.mp4", "1/b2.mp4", "2/c1.mp4"]
    lines = [f"{name} {name[0]}\n" for name in names]
    path = text_file(fill(tmp_path / "all", *names) / "list.txt", "".join(lines))
    for root in (path.parent, path):
        train, val = (data.list_videos(root, split) for split in ("train", "val"))
        assert set(found(val)) == {"a19.mp4", "a39.mp4", "a59.mp4", "b2.mp4"}
        assert len(train.paths) == 59 and not set(found(train)) & set(found(val))
        assert found(train)["c1.mp4"] == "2" and "every 20th file of a class is held out" in val.how


@pytest.mark.parametrize("text, labels", [
    (f"{FILE} 3", [3]), (f"{FILE}, 3", [3]), (f"{FILE}\t3.0", [3]), (f"'{FILE}' 3", [3]),
    (f'"{FILE}";"3"', [3]), (FILE, [-1]), (f"{FILE} -1", [-1]), ("A B/É 1.AVI 0", [0]),
    (f"elsewhere/{FILE} 0", [0]), (f"\ufeff{FILE} 0", [0]), (f"path,label\n{FILE},1", [1]),
    (f'\ufeff"video";"class"\n{FILE};1', [1]), (f"{FILE}\n{FILE} 0", [-1, 0])])
def test_a_list_is_read_where_it_leaves_no_doubt(tmp_path, text, labels):
    path = tmp_path / unicodedata.normalize("NFD", FILE)  # its accent can be written in two ways
    fill(path.parent, path.name)
    files = data.list_videos(text_file(tmp_path / "train.csv", unicodedata.normalize("NFC", text)))
    assert set(files.paths) == {str(path)} and files.labels.tolist() == labels


@pytest.mark.parametrize("name", ["val.csv", "test.csv"])
def test_lists_reach_out_of_their_folder_and_one_beside_it_is_held_out(tmp_path, name):
    fill(tmp_path, "videos/a,b.mp4", "elsewhere/c.mp4", "lists/d.mp4", "e 2.mp4")
    (tmp_path / "lists/link").symlink_to(tmp_path / "elsewhere")
    lines = f"../videos/a,b.mp4 1\nlink/c.mp4,0\n{tmp_path}/e 2.mp4\n"
    train = text_file(tmp_path / "lists/train.csv", lines)
    text_file(tmp_path / "lists" / name, "d.mp4 0\n")
    assert found(data.list_videos(train)) == {"a,b.mp4": "1", "c.mp4": "0", "e 2.mp4": None}
    assert found(data.list_videos(train, "val")) == {"d.mp4": "0"}


def test_cifar10_comes_through_torchvision_unless_there_is_such_a_folder(monkeypatch, tmp_path):
    def fake(folder, train, download):
        pixels, labels = np.full((30, 32, 32, 3), 7 + train, np.uint8), list(range(10)) * 3
        return argparse.Namespace(data=pixels, targets=labels, classes=list("abcdefghij"))
    monkeypatch.setattr(data.datasets, "CIFAR10", fake)
    monkeypatch.chdir(tmp_path)
    files, cfg = data.list_images("cifar10"), mae_image.Config(img_size="24x16")
    pixels, number, problems = data.ImageDataset(files, cfg, True)[0, 4]
    assert pixels.shape == (1, 24, 16, 3) and (pixels == 8).all() and number == 4 and not problems
    assert files.labels[11] == 1 and (data.list_images("cifar10", "val").pixels == 7).all()
    assert data.list_images(fill(Path("cifar10"), "a.png")).paths.tolist() == ["cifar10/a.png"]


@pytest.mark.parametrize("name, kind, low, high", [
    ("x.png", np.uint16, 0, 4095), ("x.tif", np.int32, -1024, 3071), ("x.tif", np.float32, 0, 0.5)])
def test_more_than_8_bits_are_stretched_over_the_range_of_the_file(tmp_path, name, kind, low, high):
    x = np.linspace(low, high, 256).reshape(16, 16).astype(kind)
    Image.fromarray(x).save(tmp_path / name)
    pixels = data.read_image(tmp_path / name)
    assert np.abs(pixels[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
    assert pixels.min() == 0 and pixels.max() == 255
    Image.fromarray(np.full_like(x, high)).save(tmp_path / name)
    assert (data.read_image(tmp_path / name) == 0).all()  # one value: no division by zero


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_photographs_of_every_kind_become_rgb_and_are_turned_as_their_exif_says(tmp_path, mode):
    exif, x = Image.Exif(), np.zeros((20, 40, 3), np.uint8)
    x[:, :10], exif[0x0112] = 255, 6  # bright on the left; to be turned clockwise
    Image.fromarray(x).convert(mode).save(tmp_path / "x.jpg", exif=exif)
    pixels = data.read_image(tmp_path / "x.jpg")
    assert pixels.shape == (40, 20, 3) and pixels[:8].min() > 200 and pixels[12:].max() < 50


def test_what_is_no_image_is_named_and_no_program_is_run(tmp_path, monkeypatch, run):
    text_file(tmp_path / "gs", "#!/bin/sh\ntouch called\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    text_file(tmp_path / "in/\x1b[31mréd\nx.jpg", eps)
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "in/x.tif")
    assert Image.MAX_IMAGE_PIXELS < 10**8
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (40, 40)).save(tmp_path / "in/bomb.png")
    text = run(data, "check", "in", code=1)
    for line in (r"in/\x1b[31mréd\nx.jpg: broken: UnidentifiedImageError: cannot identify image",
                 "in/bomb.png: broken: DecompressionBombWarning: Image size (1600 pixels) exceeds",
                 "in/x.tif: broken: pixels that are no numbers"):
        assert line in text
    assert not (tmp_path / "called").exists()
    for name in ("x.png", "x.mp4"):
        os.mkfifo(tmp_path / name)
        assert data.check_file(tmp_path / name) == ["broken: no such file"]


@pytest.mark.parametrize("name, content, message", [
    ("x.pt", {"x": print}, "x.pt is refused: it holds Python code"),
    ("x.pt", [1, 2], "x.pt is refused: damaged"), ("x.pt", b"PK\3\4", "refused: damaged"),
    ("x.safetensors", b"", "safetensors")])
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    torch.save(content, tmp_path / name)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, ImportError), match=message):
        data.load_file(tmp_path / name)
