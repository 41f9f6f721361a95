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
from mae_image import Config, list_both
from masking import report


def fill(root, *names):
    """Empty files: to list them, nobody looks inside.   -> root"""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def text_file(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def found(files):
    """{file name: class, or None where no label is known}"""
    known = {label: name for label, name in enumerate(files.classes)}
    return {Path(p).name: known.get(label) for p, label in zip(files.paths, files.labels)}


# ---- UCF101 and HMDB51 ---------------------------------------------------------------------------


def make_ucf(videos, lists):
    """UCF101 in small, with its traps: folder and list differ in case, testlist has no labels."""
    for name in ("ApplyLipstick", "HandStandPushups"):
        folder = videos / name.replace("HandStand", "Handstand")
        fill(folder, f"v_{name}_g01_c01.avi", f"v_{name}_g08_c01.avi")
    text_file(lists / "classInd.txt", "1 ApplyLipstick\n2 HandstandPushups\n")
    for fold, train, test in (1, "08", "01"), (3, "01", "08"):
        text_file(lists / f"trainlist0{fold}.txt",
                  f"ApplyLipstick/v_ApplyLipstick_g{train}_c01.avi 1\r\n"
                  f"HandstandPushups/v_HandstandPushups_g{train}_c01.avi 2\r\n")
        text_file(lists / f"testlist0{fold}.txt",
                  f"ApplyLipstick/v_ApplyLipstick_g{test}_c01.avi\n"
                  f"HandStandPushups/v_HandStandPushups_g{test}_c01.avi\n")


EIGHT = {"v_ApplyLipstick_g08_c01.avi": "ApplyLipstick",
         "v_HandStandPushups_g08_c01.avi": "HandstandPushups"}


@pytest.mark.parametrize("videos, lists", [
    ("root/UCF-101", "root/UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist"),
    ("root/UCF-101/UCF-101", "root/ucfTrainTestlist/ucfTrainTestlist"),
    ("root/UCF101/UCF-101", "root/UCF101/ucfTrainTestlist"),
    ("root", "root"),  # lists beside the class folders
])
def test_ucf101_is_found_where_the_archives_unpack_it(tmp_path, videos, lists):
    make_ucf(tmp_path / videos, tmp_path / lists)
    root = tmp_path / "root"
    assert found(data.list_videos(root)) == found(data.list_videos(root, "val", fold=3)) == EIGHT
    assert not set(EIGHT) & set(found(data.list_videos(root, "val")))


def test_lists_of_ucf101_are_taken_as_they_are_or_the_trouble_is_shown(tmp_path):
    videos, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    make_ucf(videos, lists)
    assert found(data.list_videos(videos)) == EIGHT  # the lists lie beside the folder
    table = lists / "trainlist01.txt"
    table.write_text(table.read_text().replace("avi 1", "avi 0"))  # 0: unknown
    assert list(found(data.list_videos(tmp_path)).values()) == [None, "HandstandPushups"]
    (videos / "HandstandPushups/v_HandStandPushups_g08_c01.avi").unlink()
    with pytest.raises(ValueError, match="1 of 2 files .*/v_HandstandPushups_g08_c01.avi; --allow"):
        data.list_videos(tmp_path)
    assert data.list_videos(tmp_path, allow_missing=True).labels.tolist() == [-1]
    text_file(lists / "classInd.txt", "ApplyLipstick\n")
    with pytest.raises(ValueError, match="classInd.txt has the line 'ApplyLipstick'"):
        data.list_videos(tmp_path)


@pytest.mark.parametrize("folder", ["hmdb51_org/wave", "hmdb51_org/wave/wave",
                                    "hmdb51_org/hmdb51_org/wave", "videos/hmdb51_org/wave"])
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


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train, val", [
    ("train", "val"), ("Train", "Test"), ("training", "testing"), ("train_256", "val_256"),
    ("TRAIN", "VALIDATION"), ("trainset", "testset"), ("kinetics400/train", "kinetics400/val")])
def test_split_folders_have_many_names_and_the_classes_of_training(tmp_path, train, val):
    fill(tmp_path, f"{train}/a/1.mp4", f"{train}/b/2.mp4", f"{val}/b/3.mp4")
    assert found(data.list_videos(tmp_path)) == {"1.mp4": "a", "2.mp4": "b"}
    files = data.list_videos(tmp_path, "val")
    assert found(files) == {"3.mp4": "b"} and files.classes == ["a", "b"]


@pytest.mark.parametrize("split, names, want", [
    ("train", "README.txt dataset/a/1.mp4 dataset/b/2.mp4", {"1.mp4": "a", "2.mp4": "b"}),
    ("train", "__MACOSX/x/a/._1.mp4 x/y/a/1.mp4 x/y/b/2.mp4", {"1.mp4": "a", "2.mp4": "b"}),
    ("train", "a/1.mp4 b/2.mp4 b/.3.mp4 b/.thumbs/4.mp4", {"1.mp4": "a", "2.mp4": "b"}),
    ("train", "intro.mp4 a/1.mp4 b/2.mp4", {"1.mp4": "a", "2.mp4": "b", "intro.mp4": None}),
    ("train", "dataset/archery/1.mp4", {"1.mp4": None}),  # one folder alone is no class
    ("val", "x.mp4", {"x.mp4": None}),
    ("val", "train/a/1.mp4 val/a/2.mp4 test/a/3.mp4", {"2.mp4": "a"}),
    ("val", "train/2.mp4 val/a/3.mp4 val/b/4.mp4", {"3.mp4": None, "4.mp4": None}),
    ("val", "train/a/5.mp4 train/b/6.mp4 val/7.mp4", {"7.mp4": None})])
def test_wrappers_are_stepped_into_and_class_folders_are_classes(tmp_path, split, names, want):
    assert found(data.list_videos(fill(tmp_path, *names.split()), split)) == want


@pytest.mark.parametrize("names, message", [
    ("ucfTrainTestlist/x", "holds a part of .*: unpack UCF-101, too"),
    ("b/hmdb51_org/x", "holds a part of .*: unpack testTrainMulti_7030_splits, too"),
    ("train/a/1.mp4 train/b/2.mp4 val/b/3.mp4 val/c/4.mp4", "lacks: {'c'}"),
    ("bus/1.mp4 train/2.mp4", "has train/ but no val/: is that a split, or a class"),
    ("a/1.png b/2.png b/3.ts", "but 2 .png, 1 .ts: mae_image.py takes images")])
def test_what_a_folder_leaves_in_doubt_is_an_error(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        data.list_videos(fill(tmp_path, *names.split()), "val")


def test_one_line_says_what_was_found(tmp_path, capsys):
    fill(tmp_path / "train", "a/1.mp4", "b/2.mp4", "a/x.ts", "b/x.ts", "intro.mp4")
    fill(tmp_path / "val", "a/3.mp4")
    files = list_both(data.list_videos, tmp_path)[0]
    assert found(files) == {"1.mp4": "a", "2.mp4": "b", "intro.mp4": None}
    how = "folder train, 1 beside the class folders, passed over: 2 .ts"
    line = f"training: 3 files of 2 classes ({how}); held out: 1 (folder val)"
    assert capsys.readouterr().out == f"{line}\n"
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


# ---- lists ---------------------------------------------------------------------------------------


FILE = "a b/é 1.mp4"


@pytest.mark.parametrize("text, labels", [
    (f"{FILE} 3", [3]), (f"{FILE}, 3", [3]), (f"{FILE}\t3.0", [3]), (f"'{FILE}' 3", [3]),
    (f'"{FILE}";"3"', [3]), (FILE, [-1]), (f"{FILE} -1", [-1]), ("A B/É 1.AVI 0", [0]),
    (f"elsewhere/{FILE} 0", [0]), (f"\ufeff{FILE} 0", [0]), (f"path,label\n{FILE},1", [1]),
    (f'\ufeff"video";"class"\n{FILE};1', [1]), (f"{FILE}\n{FILE} 0", [-1, 0])])
def test_a_list_is_read_where_it_leaves_no_doubt(tmp_path, text, labels):
    """Also with quotes, a header, a byte order mark, and an accent that is written in two ways."""
    path = tmp_path / unicodedata.normalize("NFD", FILE)
    fill(path.parent, path.name)
    files = data.list_videos(text_file(tmp_path / "train.csv", unicodedata.normalize("NFC", text)))
    assert set(files.paths) == {str(path)} and files.labels.tolist() == labels


@pytest.mark.parametrize("line", ["x.mp4 1.5", "x.mp4 Archery", "still.png 0", "two 1"])
def test_a_line_of_a_list_that_cannot_be_read_is_shown(tmp_path, line):
    fill(tmp_path, "x.mp4", "still.png", "two.mp4", "two.avi")
    with pytest.raises(ValueError, match=f"1 of 1 files .*{line.rsplit(' ', 1)[0]}"):
        data.list_videos(text_file(tmp_path / "train.csv", line + "\n"))


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
    files = data.list_images("cifar10")
    pixels, number, problems = data.ImageDataset(files, Config(img_size="24x16"), True)[0, 4]
    assert pixels.shape == (1, 24, 16, 3) and (pixels == 8).all() and number == 4 and not problems
    assert files.labels[11] == 1 and (data.list_images("cifar10", "val").pixels == 7).all()
    assert data.list_images(fill(Path("cifar10"), "a.png")).paths.tolist() == ["cifar10/a.png"]


def test_names_with_escapes_and_newlines_are_printed_harmlessly(capsys):
    report("clip \x1b[31mred\nand a second line é")
    assert capsys.readouterr().out == r"clip \x1b[31mred\nand a second line é" + "\n"


# ---- images --------------------------------------------------------------------------------------


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


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS < 10**8
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 60):  # Pillow warns of the first, and refuses what is twice as large
        Image.new("L", (side, side)).save(tmp_path / "x.png")
        with pytest.raises(data.BrokenFile, match="exceeds limit of"):
            data.read_image(tmp_path / "x.png")


def test_a_jpg_that_is_a_program_for_an_interpreter_is_not_run(tmp_path, monkeypatch):
    called = tmp_path / "called"
    text_file(tmp_path / "gs", f"#!/bin/sh\ntouch {called}\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    with pytest.raises(data.BrokenFile, match="cannot identify image file"):
        data.read_image(text_file(tmp_path / "x.jpg", eps))
    assert not called.exists()


def test_a_pipe_and_pixels_that_are_no_numbers_are_broken(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "x.tif")
    for name, problem in ("x.png", "no such file"), ("x.tif", "pixels that are no numbers"):
        assert data.check_file(tmp_path / name) == [f"broken: {problem}"]


# ---- checkpoints to the disk and back ------------------------------------------------------------


def test_checkpoints_may_hold_numpys_numbers_paths_and_namespaces(tmp_path):
    content = {"weight": torch.arange(3), "scalar": np.float64(0.5), "count": np.int64(3),
               "flag": np.bool_(True), "path": Path("a/b"), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "x.pt")
    loaded = data.load_file(tmp_path / "x.pt")
    assert torch.equal(loaded.pop("weight"), content.pop("weight")) and loaded == content


class Code:
    def __reduce__(self):
        return print, ("this code was run",)


@pytest.mark.parametrize("name, content, message", [
    ("x.pt", {"x": Code()}, "x.pt is refused: it holds Python code"),
    ("x.pt", [1, 2], "x.pt is refused: it is damaged"), ("x.pt", b"PK\3\4", "it is damaged"),
    ("x.safetensors", b"", "pip install safetensors")])
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, capsys, name, content, message):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    torch.save(content, tmp_path / name)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load_file(tmp_path / name)
    assert "this code was run" not in capsys.readouterr().out
