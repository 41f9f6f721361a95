"""data.py, files: which ones there are, images, and what is read and written whole."""

import argparse
import errno
import os
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
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


# ---- UCF101 and HMDB51 -----------------------------------------------------------------------------


def make_ucf(videos, lists):
    """UCF101 in small, with its traps: folder and list disagree about case, no labels in testlist."""
    for name in ("ApplyLipstick", "HandStandPushups"):
        folder = name.replace("HandStand", "Handstand")
        fill(videos / folder, f"v_{name}_g01_c01.avi", f"v_{name}_g08_c01.avi")
    text_file(lists / "classInd.txt", "1 ApplyLipstick\n2 HandstandPushups\n")
    for fold, train, test in (1, "08", "01"), (2, "08", "01"), (3, "01", "08"):
        train = (f"ApplyLipstick/v_ApplyLipstick_g{train}_c01.avi 1\r\n"
                 f"HandstandPushups/v_HandstandPushups_g{train}_c01.avi 2\r\n")
        test = (f"ApplyLipstick/v_ApplyLipstick_g{test}_c01.avi\n"
                f"HandStandPushups/v_HandStandPushups_g{test}_c01.avi\n")
        text_file(lists / f"trainlist0{fold}.txt", train)
        text_file(lists / f"testlist0{fold}.txt", test)


@pytest.fixture
def ucf(tmp_path):
    make_ucf(tmp_path / "UCF101/UCF-101", tmp_path / "UCF101/ucfTrainTestlist")
    return tmp_path / "UCF101"


EIGHT = {"v_ApplyLipstick_g08_c01.avi": "ApplyLipstick",
         "v_HandStandPushups_g08_c01.avi": "HandstandPushups"}


def test_ucf101_as_downloaded(ucf):
    assert found(data.list_videos(ucf)) == found(data.list_videos(ucf, "val", fold=3)) == EIGHT
    assert not set(EIGHT) & set(found(data.list_videos(ucf, "val", fold=2)))
    assert found(data.list_videos(ucf / "UCF-101")) == EIGHT


@pytest.mark.parametrize("videos, lists", [
    ("UCF101/UCF-101", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist"),
    ("UCF-101/UCF-101", "ucfTrainTestlist"),
    ("UCF-101", "ucfTrainTestlist/ucfTrainTestlist"),
    ("ucf101/UCF-101", "ucf101/ucfTrainTestlist"),
    ("here", "here"),  # lists beside the class folders
])
def test_ucf101s_lists_are_found_where_the_archives_unpack_them(tmp_path, videos, lists):
    make_ucf(tmp_path / videos, tmp_path / lists)
    root = tmp_path / "here" if lists == "here" else tmp_path
    assert found(data.list_videos(root)) == EIGHT


def make_hmdb(root, folder, *names):
    fill(root / folder, *names)
    for fold, a, b in (1, 1, 2), (2, 2, 1), (3, 0, 1):
        text = f"{names[0]} {a} \n{names[1]} {b} \n{names[2]} 0 \n"
        text_file(root / f"testTrainMulti_7030_splits/wave_test_split{fold}.txt", text)


@pytest.mark.parametrize("folder", ["hmdb51_org/wave", "hmdb51_org/wave/wave",
                                    "hmdb51_org/hmdb51_org/wave", "videos/hmdb51_org/wave"])
def test_hmdb51_as_downloaded_with_its_odd_file_names(tmp_path, folder):
    odd = "#1_A&B_(x)+;@[y]~!_wave_f_nm_np1_fr_goo_37.avi"
    make_hmdb(tmp_path, folder, odd, "plain.avi", "unused.avi")
    assert found(data.list_videos(tmp_path)) == {odd: "wave"}
    assert found(data.list_videos(tmp_path, "val", fold=2)) == {odd: "wave"}
    assert found(data.list_videos(tmp_path, "val")) == {"plain.avi": "wave"}


def test_what_a_mac_adds_to_an_archive_is_not_the_data_set(tmp_path):
    make_hmdb(tmp_path, "hmdb51/hmdb51_org/wave", "a.avi", "b.avi", "c.avi")
    fill(tmp_path, "__MACOSX/hmdb51_org/wave/._a.avi")
    assert found(data.list_videos(tmp_path)) == {"a.avi": "wave"}


def test_missing_files_are_counted_and_named_unless_allowed(ucf):
    (ucf / "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi").unlink()
    name = "HandstandPushups/v_HandstandPushups_g08_c01.avi"
    with pytest.raises(ValueError, match=f"1 of 2 files .*, e.g. {name}; --allow-missing"):
        data.list_videos(ucf)
    assert data.list_videos(ucf, allow_missing=True).labels.tolist() == [0]


@pytest.mark.parametrize("there, lost", [
    ("ucfTrainTestlist", "UCF-101"), ("UCF-101", "ucfTrainTestlist"),
    ("b/hmdb51_org", "testTrainMulti_7030_splits")])
def test_half_a_download_is_explained(tmp_path, there, lost):
    (tmp_path / there).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"holds a part of .*: unpack {lost}, too"):
        data.list_videos(tmp_path)


def test_folds_are_1_2_and_3_and_only_official_lists_have_them(ucf, tmp_path):
    with pytest.raises(FileNotFoundError, match="trainlist04.txt"):
        data.list_videos(ucf, fold=4)
    with pytest.raises(ValueError, match="--fold 2: .*plain has no official lists"):
        data.list_videos(fill(tmp_path / "plain", "a/x.mp4", "b/y.mp4"), fold=2)


def test_the_class_0_of_a_training_list_is_unknown(ucf):
    path = ucf / "ucfTrainTestlist/trainlist01.txt"
    path.write_text(path.read_text().replace("avi 1", "avi 0"))
    assert list(found(data.list_videos(ucf)).values()) == [None, "HandstandPushups"]


@pytest.mark.parametrize("name, text, shown", [
    ("classInd.txt", "ApplyLipstick\n", "ApplyLipstick"),
    ("trainlist01.txt", "Archery/v_Archery_g08_c01.avi 3\n", "v_Archery_g08_c01")])
def test_a_line_of_an_official_list_that_cannot_be_read_is_shown(ucf, name, text, shown):
    text_file(ucf / "ucfTrainTestlist" / name, text)
    with pytest.raises(ValueError, match=shown):
        data.list_videos(ucf)


# ---- folders ---------------------------------------------------------------------------------------

SPLITS = [("train", "val"), ("Train", "Test"), ("training", "testing"), ("train_256", "val_256"),
          ("TRAIN", "VALIDATION"), ("trainset", "testset"), ("train-2017", "valid"),
          ("training_set", "eval")]


@pytest.mark.parametrize("train, val", SPLITS)
def test_split_folders_have_many_names(tmp_path, train, val):
    fill(tmp_path, f"{train}/a/1.mp4", f"{train}/b/2.mp4", f"{val}/a/3.mp4", f"{val}/b/4.mp4")
    assert found(data.list_videos(tmp_path)) == {"1.mp4": "a", "2.mp4": "b"}
    assert found(data.list_videos(tmp_path, "val")) == {"3.mp4": "a", "4.mp4": "b"}


def test_val_comes_before_test(tmp_path):
    fill(tmp_path, "train/a/1.mp4", "val/a/2.mp4", "test/a/3.mp4")
    assert found(data.list_videos(tmp_path, "val")) == {"2.mp4": "a"}


def test_classes_are_numbered_as_in_training(tmp_path):
    val = data.list_videos(fill(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/b/3.mp4"), "val")
    assert val.classes == ["a", "b"] and val.labels.tolist() == [1]


def test_a_class_that_training_lacks_is_an_error(tmp_path):
    fill(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/b/3.mp4", "val/c/4.mp4")
    with pytest.raises(ValueError, match="has classes that training lacks: {'c'}"):
        data.list_videos(tmp_path, "val")


def test_train_beside_other_folders_may_be_a_class_and_is_asked_about(tmp_path):
    with pytest.raises(ValueError, match="has train/ but no val/: is that a split, or a class"):
        data.list_videos(fill(tmp_path, "bus/1.mp4", "train/2.mp4"))


@pytest.mark.parametrize("wrapper", ["dataset", "archive/dataset"])
@pytest.mark.parametrize("beside", ["README.txt", "__MACOSX/dataset/a/._1.mp4", ".cache/x.mp4"])
def test_a_lone_wrapper_folder_is_stepped_into(tmp_path, wrapper, beside):
    fill(tmp_path, beside, f"{wrapper}/a/1.mp4", f"{wrapper}/b/2.mp4")
    assert found(data.list_videos(tmp_path)) == {"1.mp4": "a", "2.mp4": "b"}


def test_a_wrapper_may_hold_split_folders(tmp_path):
    fill(tmp_path, "kinetics400/train/a/1.mp4", "kinetics400/train/b/2.mp4",
         "kinetics400/val/b/3.mp4")
    assert found(data.list_videos(tmp_path)) == {"1.mp4": "a", "2.mp4": "b"}
    assert found(data.list_videos(tmp_path, "val")) == {"3.mp4": "b"}


def test_one_folder_alone_is_no_class(tmp_path):
    files = data.list_videos(fill(tmp_path, "dataset/archery/1.mp4", "dataset/archery/2.mp4"))
    assert files.classes == [] and found(files) == {"1.mp4": None}


def test_folders_without_classes_have_no_labels(tmp_path):
    fill(tmp_path, "flat/1.png", "mixed/train/2.png", "mixed/val/a/3.png", "mixed/val/b/4.png",
         "imagenet/train/a/5.png", "imagenet/train/b/6.png", "imagenet/val/7.png")
    assert found(data.list_images(tmp_path / "flat")) == {"1.png": None}
    assert found(data.list_images(tmp_path / "mixed", "val")) == {"3.png": None, "4.png": None}
    assert found(data.list_images(tmp_path / "imagenet", "val")) == {"7.png": None}


def test_one_line_says_what_was_found(tmp_path):
    fill(tmp_path, *[f"all/{c}/{i}.mp4" for c in "ab" for i in range(3)])
    fill(tmp_path, "split/train/a/1.mp4", "split/train/b/2.mp4", "split/val/a/3.mp4")
    fill(tmp_path, "split/train/a/code.ts", "split/train/b/code.ts", "split/train/b/x.avif")
    one, two = ([data.list_videos(tmp_path / name, split) for split in ("train", "val")]
                for name in ("all", "split"))
    how = "folder all; no split found: every 20th file of a class is held out"
    assert data.describe(*one) == f"training: 4 files of 2 classes ({how}); held out: 2 ({how})"
    how = "folder train, passed over: 2 .ts, 1 .avif"
    assert data.describe(*two) == f"training: 2 files of 2 classes ({how}); held out: 1 (folder val)"


def test_files_beside_class_folders_are_passed_over_and_counted(tmp_path):
    files = data.list_videos(fill(tmp_path, "intro.mp4", "a/1.mp4", "b/2.mp4"))
    assert set(found(files)) == {"1.mp4", "2.mp4"}
    assert "passed over: 1 beside the class folders" in files.how


def test_a_folder_of_the_other_kind_of_files_is_explained(tmp_path):
    message = "has no .avi .mp4 .m4v .mov ..., but 2 .png, 1 .ts: mae_image.py takes images"
    with pytest.raises(ValueError, match=message):
        data.list_videos(fill(tmp_path, "a/1.png", "b/2.png", "b/3.ts"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.list_videos(tmp_path / "nowhere")


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png", "a/.3.png", "a/.thumbs/4.png", "__MACOSX/a/5.png")
    assert set(found(data.list_images(tmp_path))) == {"1.png", "2.png"}


def test_every_20th_file_of_a_class_is_held_out_at_least_one(tmp_path):
    fill(tmp_path, *[f"a/a{i:02}.mp4" for i in range(60)], "b/b1.mp4", "b/b2.mp4", "c/c1.mp4")
    train, val = (found(data.list_videos(tmp_path, split)) for split in ("train", "val"))
    assert set(val) == {"a19.mp4", "a39.mp4", "a59.mp4", "b2.mp4"}
    assert len(train) == 59 and not set(train) & set(val) and train["c1.mp4"] == "c"


def test_a_single_file_is_trained_on_and_looked_at(tmp_path):
    fill(tmp_path, "x.mp4")
    assert set(found(data.list_videos(tmp_path, "val"))) == {"x.mp4"}


def test_linked_folders_are_walked_but_not_in_circles(tmp_path):
    fill(tmp_path, "there/0.png", "root/a/none.txt")
    (tmp_path / "root/b").symlink_to(tmp_path / "there")
    (tmp_path / "there/up").symlink_to(tmp_path / "root")
    assert data.walk(tmp_path / "root", data.IMAGE)[0] == [tmp_path / "root/b/0.png"]


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "a/0.png", "a/locked/1.png")
    real = os.scandir  # the tests may run as root, who may list everything

    def scandir(path):
        if str(path).endswith(("locked", "lost+found")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="Permission denied: '.*locked'"):
        data.walk(tmp_path, data.IMAGE)
    # a list whose files are all there has no need of it
    text_file(tmp_path / "list.txt", "a/0.png 1\n")
    assert len(data.list_images(tmp_path / "list.txt").paths) == 1
    (tmp_path / "a/locked").rename(tmp_path / "a/lost+found")  # every disk has one
    assert data.walk(tmp_path, data.IMAGE)[0] == [tmp_path / "a/0.png"]


# ---- lists -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, label", [
    ("a b/x 1.mp4 3", 3), ("a b/x 1.mp4,3", 3), ("a b/x 1.mp4, 3", 3), ("a b/x 1.mp4;3", 3),
    ("a b/x 1.mp4\t3", 3), ('"a b/x 1.mp4",3', 3), ('"a b/x 1.mp4";"3"', 3), ("'a b/x 1.mp4' 3", 3),
    ("a b/x 1.mp4 3.0", 3), ("a b/x 1.mp4,3.", 3), ("a b/x 1.mp4", -1), ("a b/x 1.mp4 -1", -1),
    ("a b/x 1.avi 0", 0), ("A B/X 1.MP4 0", 0), ("elsewhere/a b/x 1.mp4 0", 0)])
def test_a_line_of_a_list_is_read_where_it_leaves_no_doubt(tmp_path, line, label):
    fill(tmp_path, "a b/x 1.mp4")
    files = data.list_videos(text_file(tmp_path / "train.csv", line + "\n"))
    assert files.paths.tolist() == [str(tmp_path / "a b/x 1.mp4")]
    assert files.labels.tolist() == [label]


@pytest.mark.parametrize("line", [
    "x.mp4 --5", "x.mp4 12345678901", "x.mp4 1.5", "x.mp4 Archery", "x.mp4 3 train", "still.png 0",
    f"/{'a' * 300} 3", f"a{' ' * 2000}b", "two 1"])
def test_a_line_of_a_list_that_cannot_be_read_is_shown(tmp_path, line):
    fill(tmp_path, "x.mp4", "still.png", "two.mp4", "two.avi")
    with pytest.raises(ValueError) as error:
        data.list_videos(text_file(tmp_path / "train.csv", line + "\n"))
    assert "1 of 1 files" in str(error.value) and line.rsplit(" ", 1)[0] in str(error.value)


@pytest.mark.parametrize("header", ["path,label", "filename;class", '"video","label"', "\ufeffx,y"])
def test_a_header_line_and_a_byte_order_mark_are_no_files(tmp_path, header):
    path = text_file(fill(tmp_path, "a.mp4", "b.mp4") / "l.csv", f"{header}\na.mp4,0\nb.mp4,1\n")
    assert data.list_videos(path, "train").labels.tolist() == [0, 1]
    text_file(path, "\ufeffa.mp4 0\n")
    assert found(data.list_videos(path)) == {"a.mp4": "0"}


@pytest.mark.parametrize("first", ["a.mp4 -1", "a.mp4"])
def test_a_first_line_without_a_label_is_no_header(tmp_path, first):
    text_file(fill(tmp_path, "a.mp4", "b.mp4") / "val.csv", "b.mp4 0\n")
    path = text_file(tmp_path / "train.csv", f"{first}\nb.mp4 0\n")
    assert found(data.list_videos(path)) == {"a.mp4": None, "b.mp4": "0"}


def test_an_accent_may_be_written_in_two_ways(tmp_path):
    composed, taken_apart = (unicodedata.normalize(form, "é/clé.mp4") for form in ("NFC", "NFD"))
    for there, listed in ((composed, taken_apart), (taken_apart, composed)):
        root = fill(tmp_path / str(len(there)), there)
        files = data.list_videos(text_file(root / "list.txt", f"{listed} 1\n"))
        assert files.paths.tolist() == [str(root / there)] and files.labels.tolist() == [1]


def test_lists_reach_out_of_their_folder_and_through_links(tmp_path):
    fill(tmp_path, "videos/a,b.mp4", "elsewhere/c.mp4", "lists/d.mp4", "e 2.mp4")
    (tmp_path / "lists/link").symlink_to(tmp_path / "elsewhere")
    lines = f"../videos/a,b.mp4 1\nlink/c.mp4,0\nd.mp4 2\n{tmp_path}/e 2.mp4\n"
    text_file(tmp_path / "lists/test.csv", "d.mp4 0\n")
    files = data.list_videos(text_file(tmp_path / "lists/train.csv", lines))
    assert found(files) == {"a,b.mp4": "1", "c.mp4": "0", "d.mp4": "2", "e 2.mp4": None}


@pytest.mark.parametrize("name", ["val.csv", "test.csv"])
def test_a_list_beside_the_training_list_is_held_out(tmp_path, name):
    fill(tmp_path, "a.mp4", "b.mp4")
    train = text_file(tmp_path / "train.csv", "a.mp4 0\n")
    text_file(tmp_path / name, "b.mp4 0\n")
    assert set(found(data.list_videos(train))) == {"a.mp4"}
    assert set(found(data.list_videos(train, "val"))) == {"b.mp4"}


def test_without_such_a_list_every_20th_line_of_a_class_is_held_out(tmp_path):
    fill(tmp_path, *[f"{i}.mp4" for i in range(4)])
    path = text_file(tmp_path / "all.txt", "0.mp4 0\n1.mp4 0\n2.mp4 1\n3.mp4 1\n")
    assert set(found(data.list_videos(path))) == {"0.mp4", "2.mp4"}
    assert set(found(data.list_videos(path, "val"))) == {"1.mp4", "3.mp4"}


def test_cifar10_comes_through_torchvision(monkeypatch, tmp_path):
    class Fake:
        def __init__(self, folder, train, download):
            self.data = np.full((30, 32, 32, 3), 7 + train, np.uint8)
            self.targets, self.classes = list(range(10)) * 3, list("abcdefghij")

    monkeypatch.setattr(data.datasets, "CIFAR10", Fake)
    monkeypatch.chdir(tmp_path)
    files = data.list_images("cifar10")
    pixels, number, problems = data.ImageDataset(files, (24, 16), 0)[0, 4]
    assert pixels.shape == (1, 24, 16, 3) and (pixels == 8).all() and number == 4 and not problems
    assert files.labels[11] == 1 and (data.list_images("cifar10", "val").pixels == 7).all()
    # a folder of this name comes before the download
    assert data.list_images(fill(Path("cifar10"), "a.png")).paths.tolist() == ["cifar10/a.png"]


def test_the_fingerprint_of_a_data_set_is_of_names_and_labels_not_of_folders(tmp_path):
    def fingerprint(folder, names=("a.mp4", "\udcff.mp4"), labels=(0, 1)):
        paths = np.array([f"{folder}/{name}" for name in names])
        return data.fingerprint(data.Files(paths, np.array(labels), ["x", "y"]))

    assert fingerprint("/here") == fingerprint("there")
    others = [fingerprint("", labels=(1, 0)), fingerprint("", ("a.mp4", "c.mp4")),
              fingerprint("", ("\udcff.mp4", "a.mp4"), (1, 0))]
    assert fingerprint("/here") not in others and fingerprint("/here")[0] == 2


def test_names_with_escapes_and_newlines_are_printed_harmlessly(capsys):
    report("clip \x1b[31mred\nand a second line é")
    assert capsys.readouterr().out == r"clip \x1b[31mred\nand a second line é" + "\n"


# ---- images ----------------------------------------------------------------------------------------

GREY = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "PA", "1", "CMYK", "YCbCr"])
def test_images_of_every_kind_become_rgb(tmp_path, mode):
    image = Image.fromarray(GREY).convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr", "PA") else "x.png")
    image.save(path)
    pixels = data.read_image(path)
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    want = np.where(GREY > 127, 255, 0) if mode == "1" else GREY
    assert mode == "1" or np.abs(pixels.astype(int) - want[..., None]).max() <= 3


def test_a_palette_of_colours_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "x.png", transparency=0)
    assert data.read_image(tmp_path / "x.png").tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("ending, dtype, low, high", [
    ("png", np.uint16, 0, 4095), ("png", np.uint16, 1000, 1255), ("tif", np.int32, -1024, 3071),
    ("tif", np.float32, 0.25, 0.5)])
def test_more_than_8_bits_are_stretched_over_the_range_of_the_file(
        tmp_path, ending, dtype, low, high):
    x = np.linspace(low, high, 256).reshape(16, 16).astype(dtype)
    Image.fromarray(x).save(tmp_path / f"x.{ending}")
    pixels = data.read_image(tmp_path / f"x.{ending}")
    assert np.abs(pixels[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
    assert pixels.min() == 0 and pixels.max() == 255


def test_an_image_of_one_value_is_no_division_by_zero(tmp_path):
    Image.fromarray(np.full((8, 8), 500, np.uint16)).save(tmp_path / "x.png")
    assert (data.read_image(tmp_path / "x.png") == 0).all()


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_one_pixel_that_is_no_number_does_not_make_all_others_black(tmp_path, hole):
    x = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    x[0, 0] = hole
    Image.fromarray(x).save(tmp_path / "x.tif")
    try:
        assert data.read_image(tmp_path / "x.tif")[4:].min() > 100
    except data.BrokenFile:
        pass


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    exif, x = Image.Exif(), np.zeros((20, 40, 3), np.uint8)
    x[:, :10], exif[0x0112] = 255, 6  # bright on the left; to be turned clockwise
    Image.fromarray(x).save(tmp_path / "x.jpg", exif=exif)
    pixels = data.read_image(tmp_path / "x.jpg")
    assert pixels.shape == (40, 20, 3) and pixels[:8].min() > 200 and pixels[12:].max() < 50


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_a_decompression_bomb_is_named(tmp_path, side):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[16:24] = struct.pack(">II", side, side)  # the header's width and height ...
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))  # ... and its checksum
    (tmp_path / "x.png").write_bytes(content)
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


@pytest.mark.parametrize("how", ["folder", "pipe", "text", "empty", "cut off", "gone"])
def test_a_broken_image_is_named(tmp_path, how):
    path = tmp_path / "x.png"
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "cut off":
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif how != "gone":
        path.write_text("no image" * (how == "text"))
    with pytest.raises(data.BrokenFile) as error:
        data.read_image(path)
    assert str(error.value) and "\n" not in str(error.value)


# ---- checkpoints to the disk and back ----------------------------------------------------------------


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "x.pt"
    data.write_whole(path, lambda part: part.write_bytes(b"first"))

    def half(part):
        part.write_bytes(b"half")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        data.write_whole(path, half)
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["x.pt"]
    data.write_whole(path, lambda part: part.write_bytes(b"second"))
    assert path.read_bytes() == b"second"


def test_a_full_disk_leaves_the_previous_file(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"first")
    (tmp_path / f".{os.getpid()}-x.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        data.write_whole(path, lambda part: part.write_bytes(b"more"))
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["x.pt"]


def test_checkpoints_may_hold_numpys_numbers_paths_and_namespaces(tmp_path):
    content = {"weight": torch.arange(3), "scalar": np.float64(0.5), "count": np.int64(3),
               "flag": np.bool_(True), "path": Path("a/b"), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "x.pt")
    loaded = data.load_file(tmp_path / "x.pt")
    assert loaded.pop("weight").tolist() == [0, 1, 2] and content.pop("weight") is not None
    assert loaded == content


class Code:
    def __reduce__(self):
        return print, ("this code was run",)


@pytest.mark.parametrize("content, message", [
    ({"x": Code()}, "is refused: it holds Python code besides numbers"),
    ([1, 2], "is refused: it is damaged, cut off, or no checkpoint"), (b"PK\3\4 no archive", "is refused: it is damaged, cut"),
    (b"", "is refused: it is damaged, cut off, or no checkpoint at all")])
def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, content, message):
    if isinstance(content, bytes):
        (tmp_path / "x.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt {message}"):
        data.load_file(tmp_path / "x.pt")
    assert "this code was run" not in capsys.readouterr().out


def test_a_missing_checkpoint_is_named_with_the_script_that_makes_it(tmp_path):
    for name, hint in (("runs/mae_video/checkpoint.pt", ": python mae_video.py makes it"),
                       ("runs/other/checkpoint.pt", ""), (".", "; did you mean .*checkpoint.pt")):
        with pytest.raises(ValueError, match=f"there is no checkpoint {tmp_path / name}{hint}"):
            data.load_file(tmp_path / name)


def test_safetensors_are_read(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    package.save_file({"x": torch.arange(3)}, tmp_path / "x.safetensors")
    assert data.load_file(tmp_path / "x.safetensors")["x"].tolist() == [0, 1, 2]


def test_without_the_package_for_safetensors_one_line_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ValueError, match="pip install safetensors"):
        data.load_file(tmp_path / "x.safetensors")
