"""data.py - from a file on disk to a batch of uint8 pixels.

    a list of files   UCF101, HMDB51, class folders, "path label" lists, CIFAR-10 / STL-10      -> list_videos ...
    frame numbers     dense (length x stride) or one per segment, random or test-time          -> dense_clip ...
    decoding          PyAV, one thread, only the frames that are kept are converted            -> read_clips
    one crop          random resized, VideoMAE's multi-scale, centre; the same for all frames  -> make_crop
    a dataset item    uint8 (R, T, H, W, 3) or (R, H, W, 3); R clips of one decoded video      -> ClipDataset
    a toy world       rendered scenes with exact depth and classes, so that nothing need be downloaded

What item i gets in an epoch (crop, flip, clip position) is drawn from a generator seeded with (seed, epoch, i):
a dataset is indexed with the pair (epoch, i), and workers need no state. A file that cannot be read is named in
the log and another one is taken (ten in a row end the run); it never becomes silent zeros.

Run   python data.py toy toy                             (30 s on 2 cores: the toy world, 600 clips, 2,000 images)
      python data.py check UCF101                        (decodes everything, lists what is broken, draws a sheet)
      python data.py shrink UCF101 UCF101-128 --short-side 128     (smaller files decode faster: do it once)
Next  mae_image.py: the first model, and the training loop.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import errno
import functools
import itertools
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from masking import InputError, OneLineParser, run_script

VIDEO = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts")
IMAGE = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


def seeded(*numbers):
    """A generator that depends on these whole numbers alone, not on what was drawn before.

    The first is the seed, the second says what for: 0 items, 1 masks, 2 held-out masks, 3 what replaces a broken file,
    and so on; only the order of an epoch is (seed, epoch). important: numpy fills up to four numbers with zeros, so
    (s, 1) and (s, 1, 0) are one stream: among others the order of epoch 1 and the masks of update 0. That does no harm,
    but in a new project number the uses from 1 and put the use last.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


# ============================================================================================================
#  PART 1: which files, with which labels     (needs: numpy, torchvision, VIDEO, IMAGE; masking.py InputError)
# ============================================================================================================


@dataclass
class Files:
    """A split of a data set. paths and labels are arrays: a list of objects would be copied into every worker."""

    paths: np.ndarray  # of str
    labels: np.ndarray  # of int, 0 .. len(classes) - 1, or -1 where none is known
    classes: list
    pixels: np.ndarray = None  # (N, H, W, 3) uint8 where the images are in memory (CIFAR-10, STL-10)


def list_videos(root, split="train", fold=1, allow_missing=False):
    """The videos of one split ("train" or "val") of:

    root/UCF-101/ + root/ucfTrainTestlist/                  UCF101 as downloaded; fold 1, 2 or 3
    root/hmdb51_org/ + root/testTrainMulti_7030_splits/     HMDB51 as downloaded; fold 1, 2 or 3
    root/<Class>/*.avi + root/classInd.txt, trainlist01.txt ...      lists in UCF101's format beside the class folders
    root/train/<class>/*, root/val/<class>/*                (or valid, validation, test)
    root/<class>/* or root/*                                every 20th file is held out as "val"
    a file of lines "path label"                            (space or comma), paths absolute or from the list's folder;
                                                            val: val.csv or test.csv beside it

    Raises InputError for a missing or empty folder and for listed files that are absent (unless allow_missing).
    """
    root = find_root(root, "videos")
    if found := find_official(root):
        return read_official(*found, split, fold, allow_missing)
    if fold != 1:
        raise InputError(f"--fold {fold}: {root} has no official lists, and so one split only")
    return list_plain(root, split, VIDEO, allow_missing)


def list_images(root, split="train", allow_missing=False):
    """The images of one split of a folder or list file, as in list_videos; "cifar10", "stl10": by torchvision."""
    if str(root).lower() in ("cifar10", "stl10") and not Path(root).exists():
        return load_torchvision(str(root).lower(), split)
    return list_plain(find_root(root, "rgb"), split, IMAGE, allow_missing)


def find_root(root, part):
    """The folder or file, or its part "videos" / "rgb" where it has one, as the toy world does."""
    root = Path(root)
    if not root.exists():
        raise InputError(f"{root} does not exist: a folder or a list file is needed")
    return root / part if (root / part).is_dir() else root


def find_official(root):
    """-> (name, folder of lists, folder of videos) if root looks like UCF101 or HMDB51, else None."""
    layouts = (
        ("UCF101", "ucfTrainTestlist", "UCF-101", "unzip UCF101TrainTestSplits-RecognitionTask.zip", "UCF101.rar"),
        ("HMDB51", "testTrainMulti_7030_splits", "hmdb51_org", "unpack test_train_splits.rar", "hmdb51_org.rar"),
    )
    for name, lists, videos, get_lists, archive in layouts:
        if (root / lists).is_dir() or (root / videos).is_dir():
            if not (root / lists).is_dir():
                raise InputError(f"{root} has {videos}/ but not {name}'s lists, {lists}/: {get_lists} in {root}")
            if not (root / videos).is_dir():
                raise InputError(f"{root} has {lists}/ but not {name}'s videos, {videos}/: unpack {archive} there, "
                                 f"e.g. with: bsdtar -xf {archive} (or unrar x, 7z x)")  # fmt: skip
            return name, root / lists, root / videos
        if root.name == videos and (root.parent / lists).is_dir():  # the folder of videos itself was given
            return name, root.parent / lists, root
    if (root / "classInd.txt").is_file():
        return "UCF101", root, root
    if (root / "trainlist01.txt").is_file():
        raise InputError(f"{root} has trainlist01.txt but not classInd.txt, with lines like '1 ApplyEyeMakeup'")
    return None


def read_official(name, lists, videos, split, fold, allow_missing):
    """One fold of the official lists, whose traps the comments name."""
    if fold not in (1, 2, 3):
        raise InputError(f"--fold {fold}: {name} has the folds 1, 2 and 3")
    wanted = []  # (path in the list, label)
    if name == "UCF101":
        numbered = [line.split(maxsplit=1) for line in read_lines(lists / "classInd.txt")]
        if not all(len(pair) == 2 and pair[0].isdigit() for pair in numbered):
            raise InputError(f"{lists / 'classInd.txt'}: every line should be a number and a class name")
        classes = [c for _, c in sorted((int(n), c) for n, c in numbered)]
        index = {c.lower(): i for i, c in enumerate(classes)}
        for line in read_lines(lists / f"{'train' if split == 'train' else 'test'}list0{fold}.txt"):
            # trainlist has a label column (1-based), testlist has none: the folder is the class in both
            path = line.rsplit(maxsplit=1)[0] if line.rsplit(maxsplit=1)[-1].isdigit() else line
            label = index.get(path.split("/")[0].lower())
            if label is None:
                raise InputError(f"{lists}: the class of '{line}' is not in classInd.txt")
            wanted.append((path, label))
    else:
        tables = sorted(lists.glob(f"*_test_split{fold}.txt"))
        classes = [t.name.removesuffix(f"_test_split{fold}.txt") for t in tables]
        code = "1" if split == "train" else "2"  # 1 train, 2 test, 0 in neither
        for label, table in enumerate(tables):  # in the order of the list files, where climb_stairs precedes climb
            for line in read_lines(table):
                path, _, use = line.rpartition(" ")
                if use == code:
                    wanted.append((f"{classes[label]}/{path}", label))
    return resolve(wanted, classes, videos, lists, VIDEO, allow_missing)


def read_lines(path):
    """Lines that are not empty.   Raises InputError if the file is missing or no text."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the list {path}: {error}") from None


def resolve(wanted, classes, folder, source, kinds, allow_missing):
    """Listed paths -> files that exist.

    Names are matched without regard to case (UCF101's lists and folders disagree about HandStandPushups) and to
    the suffix (a re-encoded copy may be .mp4 where the list says .avi). Paths that lead to a file are taken as they
    are.
    """
    direct = [folder / p if p.lower().endswith(kinds) and os.path.isfile(folder / p) else None for p, _ in wanted]
    alike = {} if all(direct) else {path_key(p.relative_to(folder)): p for p in walk(folder, kinds, strict=False)}
    inside = lambda path: Path(os.path.relpath(folder / path, folder))  # also of an absolute path
    found = [(file or alike.get(path_key(inside(path))), label) for file, (path, label) in zip(direct, wanted)]
    missing = [path for (path, _), (file, _) in zip(wanted, found) if file is None]
    if len(missing) == len(wanted) or (missing and not allow_missing):
        hint = ("--allow-missing goes on with those that are there" if len(missing) < len(wanted) else
                'a line is "path label", the label a whole number, the path absolute or from that folder')  # fmt: skip
        raise InputError(f"{len(missing)} of {len(wanted)} files listed in {source} are not in {folder}, e.g. "
                         f"{', '.join(missing[:3])}; {hint}")  # fmt: skip
    return make_files([(f, label) for f, label in found if f is not None], classes)


def path_key(path):
    return str(path.with_suffix("") if path.suffix.lower() in VIDEO + IMAGE else path).lower()


def walk(folder, kinds, strict=True):
    """All regular files of these kinds below folder, sorted, so that every machine sees the same order.

    Raises InputError for a folder that may not be listed (strict=False: passes it over)."""

    def fail(error):
        raise InputError(f"cannot list {error.filename}: {error.strerror}")

    seen = set()  # links to folders are followed, but not in circles
    for parent, folders, names in os.walk(folder, onerror=fail if strict else None, followlinks=True):
        if (place := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "lost+found")  # at the top of a disk
        for name in sorted(names):
            if name.lower().endswith(kinds) and not name.startswith(".") and os.path.isfile(os.path.join(parent, name)):
                yield Path(parent, name)


def make_files(pairs, classes):
    return Files(np.array([str(p) for p, _ in pairs]), np.array([label for _, label in pairs], dtype=np.int64), classes)


def list_plain(root, split, kinds, allow_missing):
    """Class folders, a folder of files, or a list file; see list_videos."""
    if root.is_file():
        siblings = [root.with_name(name + root.suffix) for name in ("val", "test")]
        other = next((path for path in siblings if path.is_file() and path != root), None)
        if split == "val" and other:
            return read_list(other, kinds, allow_missing)
        return hold_out(read_list(root, kinds, allow_missing), split if not other else "all")
    if not (root / "train").is_dir():
        return hold_out(list_folder(root, kinds), split)
    train = list_folder(root / "train", kinds)
    other = next((root / n for n in ("val", "valid", "validation", "test") if (root / n).is_dir()), None)
    if other is None:
        folders = sorted(d for d in root.iterdir() if d.is_dir() and d.name != "train")
        if beside := [d.name for d in folders if next(walk(d, kinds), None)]:
            raise InputError(f"{root} has train/ and {beside[0]}/ but no val/: is train a split, or a class like "
                             f"{beside[0]}? Add val/, or use a list file of lines 'path label'")  # fmt: skip
        return hold_out(train, split)
    return train if split == "train" else list_folder(other, kinds, train.classes)


def list_folder(folder, kinds, classes=None):
    """Files of class folders, or of the folder itself where it has none. `classes`: number them as another split."""
    folders = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    found = [d.name for d in folders if next(walk(d, kinds), None)]
    if found:  # an empty folder beside them is a class too, more likely a failed download than nothing
        found = [d.name for d in folders if d.name in found or next(d.iterdir(), None) is None]
        names = [n for n in sorted(os.listdir(folder)) if n.lower().endswith(kinds) and n[0] != "."]
        if loose := [n for n in names if os.path.isfile(folder / n)]:
            raise InputError(f"{folder} has class folders ({found[0]}/ ...) and {len(loose)} files beside them, e.g. "
                             f"{loose[0]}: which are meant? Move the others away")  # fmt: skip
    if classes and set(found) - set(classes):
        raise InputError(f"{folder} has a class that the training split lacks: {sorted(set(found) - set(classes))[0]}")
    classes = found if classes is None else classes
    pairs = [(p, i) for i, c in enumerate(classes) if c in found for p in walk(folder / c, kinds)]
    if not (found and classes):  # a plain folder, ImageNet's val/ as it is downloaded, or train/ without labels
        pairs = [(p, -1) for p in walk(folder, kinds)]
    if not pairs:
        other = next(walk(folder, VIDEO + IMAGE), None)
        hint = f"but others, e.g. {other.name}" if other else "is it the right folder?"
        raise InputError(f"{folder} holds no files that end in {', '.join(kinds[:4])} ...: {hint}")
    return make_files(pairs, classes)


def read_list(path, kinds, allow_missing):
    """Lines "path label", "path,label" or "path": the csv of VideoMAE and Kinetics. Labels are whole numbers."""
    wanted = []
    for line in read_lines(path):
        found = (line, -1)
        for separator in () if os.path.exists(path.parent / line) else (",", None):  # None: any space
            name, *label = line.rsplit(separator, maxsplit=1)
            if label and re.fullmatch(r"\s*-?\d{1,6}", label[0]):
                found = name.strip(), int(label[0])
                break
        wanted.append(found)
    if not wanted:
        raise InputError(f"the list {path} is empty")
    labels = max(label for _, label in wanted) + 1
    return resolve(wanted, [str(i) for i in range(labels)], path.parent, path, kinds, allow_missing)


def select(files, keep):
    """Some of the files.   keep: their numbers, or a bool for each file"""
    pixels = None if files.pixels is None else files.pixels[keep]
    return Files(files.paths[keep], files.labels[keep], files.classes, pixels)


def hold_out(files, split):
    """Every 20th file is "val", where a data set brings no split of its own."""
    if split == "all" or len(files.paths) == 1:
        return files
    val = np.arange(len(files.paths)) % 20 == 19
    val[-1] |= not val.any()
    return select(files, val if split == "val" else ~val)


def load_torchvision(name, split):
    """CIFAR-10 or STL-10 through torchvision, downloaded to data/NAME when they are not there."""
    folder = Path("data") / name
    try:
        if name == "cifar10":
            found = datasets.CIFAR10(folder, train=split == "train", download=True)
            pixels, labels, classes = found.data, found.targets, found.classes
        else:  # STL-10's unlabelled 100,000 are what it is for
            found = datasets.STL10(folder, "train+unlabeled" if split == "train" else "test", download=True)
            pixels, labels, classes = found.data.transpose(0, 2, 3, 1), found.labels, found.classes
    except (OSError, RuntimeError) as error:
        raise InputError(f"torchvision could not get {name} into {folder}: {str(error).splitlines()[0]}") from None
    names = np.array([f"{name}/{split}/{i}" for i in range(len(pixels))])
    return Files(names, np.array(labels, dtype=np.int64), list(classes), np.ascontiguousarray(pixels))


# ============================================================================================================
#  PART 2: which frames                                                                  (needs: numpy, torch)
#
#  n is the number of frames of the video. Every function returns int (T,) frame numbers in [0, n); a video that
#  is too short gives its last frames several times.
# ============================================================================================================


def dense_clip(n, length, stride, start):
    """`length` frames, `stride` apart: VideoMAE Sec. 3.3 "temporal downsampling" (stride 4, on SSv2 2).

    DIFFERS from VideoMAE's public code, whose steps drift (0, 4, 8, 12, 17, 21, ...): here each is exactly `stride`.
    """
    frames = start + stride * np.arange(length)
    return np.minimum(frames, start + (n - 1 - start) // stride * stride)


def dense_start(n, length, stride, generator):
    """A random start for dense_clip, each equally likely where length * stride frames fit; else 0."""
    return int(torch.randint(max(n - length * stride + 1, 1), (1,), generator=generator))


def dense_views(n, length, stride, views):
    """Test-time clips at even distances over the whole video -> (views, T). One view: the middle of the video.

    VideoMAE's public code thins the video to every stride-th frame and moves a window over what is left."""
    thin = np.arange(0, n, stride)
    room = max(len(thin) - length, 0)
    starts = [room // 2] if views == 1 else [int(i * room / (views - 1)) for i in range(views)]
    return np.stack([thin[np.minimum(s + np.arange(length), len(thin) - 1)] for s in starts])


def linspace_clip(n, length, stride, start):
    """MAE-ST's (public code): a real-valued start, `length` points from start to start + length*stride - 1,
    truncated. The step drifts a little: 0, 4, 8, 12, 16, 21, ..."""
    points = np.linspace(start, start + length * stride - 1, length, dtype=np.float32)
    return np.clip(points, 0, n - 1).astype(np.int64)


def segment_clip(n, length, generator):
    """One random frame from each of `length` equal segments of the whole video (TSN; VideoMAE on SSv2).

    DIFFERS from VideoMAE's public code, which rounds the segments down and so never sees the end of a video."""
    edges = np.arange(length + 1) * n / length
    u = torch.rand(length, generator=generator).double().numpy()
    low, high = np.floor(edges[:-1]), np.maximum(np.floor(edges[1:]), np.floor(edges[:-1]) + 1)
    return np.minimum(low + np.floor(u * (high - low)), n - 1).astype(np.int64)


def segment_views(n, length, views):
    """Test-time clips of one frame per segment -> (views, T). One view: the middle of each segment.

    Two views, as in VideoMAE's public code for SSv2: the starts of the segments, and their middles."""
    shifts = [0.5] if views == 1 else [v / views for v in range(views)]
    return np.stack([np.minimum((np.arange(length) + s) * n / length, n - 1).astype(np.int64) for s in shifts])


def views_of(sampling, n, length, stride, views):
    """Test-time clips of a video of n frames, no randomness: frame numbers (views, T). One view: the middle."""
    if sampling == "segments":
        return segment_views(n, length, views)
    if sampling == "dense":
        return dense_views(n, length, stride, views)
    gap = max(n - length * stride, 0)  # linspace, MAE-ST: starts at whole distances, public code
    starts = [gap // 2] if views == 1 else [v * (gap // (views - 1)) for v in range(views)]
    return np.stack([linspace_clip(n, length, stride, s) for s in starts])


# ============================================================================================================
#  PART 3: decoding                                                                 (needs: numpy, av, pillow)
# ============================================================================================================


class BrokenFile(Exception):
    """This file cannot be read; the message says why."""


def one_line(error):
    """What went wrong, with the kind of error unless the message is our own."""
    return (str(error) if isinstance(error, BrokenFile) else f"{type(error).__name__}: {error}").splitlines()[0]


def open_video(path):
    """-> container, video stream.   Called in the worker: an open container does not survive a fork."""
    if not os.path.isfile(path):  # a pipe or device of that name would wait for ever
        raise BrokenFile("no such file")
    # HMDB51 has titles that are not UTF-8; of a name like 10:30.avi FFmpeg would think that 10: is a protocol
    container = av.open(os.path.abspath(str(path)), metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise BrokenFile("no video stream in it")
    stream = container.streams.best("video")  # not a cover picture
    # important: threads of kind FRAME or AUTO can hang when a loop is left early beside torch; one per worker is enough
    stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
    return container, stream


def count_frames(path):
    """Frames by the index, the header or, where both do not say, by the packets. Decoding may still give a few less."""
    container, stream = open_video(path)
    with container:
        return len(index_of(stream)) or stream.frames or sum(1 for packet in container.demux(stream) if packet.size)


def index_of(stream):
    """Time stamps of all frames that are shown, in the order of storage, or [] where the file has no full index."""
    entries = stream.index_entries
    # in AVI a frame shown for longer has no entries after it, but the header counts them; times are numbers there
    full = entries and stream.frames in (len(entries), entries[-1].timestamp + 1)
    return [e.timestamp for e in entries if not e.is_discard] if full else []  # an editor's cuts are stored, not shown


def upright(rgb, frame):
    """Converted frame -> uint8 (H, W, 3), turned as the file says: a phone only notes how it was held."""
    return np.rot90(rgb.to_ndarray(), round(frame.rotation / 90))


def display_times(container, stream):
    """The time stamp of every frame, in the order of display, or [] where the file does not tell."""
    if stream.codec_context.has_b_frames:  # stored in another order
        if container.format.name == "avi":  # has no such times: FFmpeg guesses them
            return []
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        return sorted(times) if None not in times and len(set(times)) == len(times) else []
    return index_of(stream)


def grab(path, wanted, jump=True):
    """Decode the frames `wanted` -> {number: (H, W, 3) uint8}, number of frames met.

    Where the file tells the time of every frame, a clip that begins after frame 24 is reached by a jump to a key frame
    before it, whose time tells its number. Otherwise, as in those of UCF101's and HMDB51's AVIs that have B-frames, all
    are decoded and counted. Only frames that are kept are converted, by one converter without threads of its own (with
    them it takes three times as long).
    """
    found, first, last, kept = {}, wanted.min(), wanted.max(), set(wanted.tolist())
    convert = av.video.reformatter.VideoReformatter()
    container, stream = open_video(path)
    with container:
        i, frames = 0, container.decode(stream)
        if jump and first > 24:
            times, key = display_times(container, stream), None
            if first < len(times):
                container.seek(times[first], stream=stream)
                key = next((f for f in frames if f.key_frame), None)  # B-frames before it miss what they refer to
            when = key and (key.pts if stream.codec_context.has_b_frames else key.dts)  # in AVI pts may begin at 1
            if when not in times[: first + 1]:
                return grab(path, wanted, jump=False)
            i, frames = times.index(when), itertools.chain([key], frames)
        for frame in frames:
            if i in kept:
                found[i] = upright(convert.reformat(frame, format="rgb24", threads=1), frame)
            i += 1
            if i > last:
                break
    return found, i


def read_clips(path, choose):
    """R clips of one video, decoded once.

    choose   n -> int (R, T), the frame numbers of R clips in a video of n frames
    returns  uint8 (R, T, H, W, 3);   raises BrokenFile
    """
    try:
        n = count_frames(path)
        clips = choose(n) if n else np.zeros((1, 1), np.int64)
        found, n = grab(path, np.unique(clips))
        if any(f not in found for f in clips.flat):  # the header promised more frames than there are: draw again
            if n == 0:
                raise BrokenFile("no frame can be decoded")
            clips = choose(n)
            found, _ = grab(path, np.unique(clips))
        frames = np.stack([found[f] for f in clips.flat])  # one copy: a stack of stacks costs as much as the crop
        return frames.reshape(*clips.shape, *frames.shape[1:])
    except Exception as error:  # decoders raise many kinds on a damaged file
        raise BrokenFile(one_line(error)) from None


def read_image(path):
    """-> uint8 (H, W, 3), whatever the file holds: grey, palette, RGBA, CMYK, 16 bits; turned as EXIF says.

    Raises BrokenFile, also for pixels of more than 16 bits or with a decimal point, whose range is not known."""
    try:
        path = str(path)  # numpy's strings show their type in error messages
        if not os.path.isfile(path):
            raise BrokenFile("no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's doubts about a damaged file: an error says it, or none matters
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":  # 16 bits a pixel: convert() would clip all above 255 to white
                    x = np.asarray(image)
                    if image.mode == "F" or not 0 <= x.min() <= x.max() < 65536:
                        raise BrokenFile(f"pixels {x.min():g} to {x.max():g} ({x.dtype}): save it with 8 or 16 bits")
                    image = Image.fromarray((x / 257).astype(np.uint8))
                return np.array(image.convert("RGB"))
    except Exception as error:
        raise BrokenFile(one_line(error)) from None


# ============================================================================================================
#  PART 4: one crop and one flip for all frames of a clip                          (needs: torch, torchvision)
# ============================================================================================================


def multi_scale_crop(H, W, generator):
    """VideoMAE's crop (public code): -> top, left, height, width.

    Sides are 1, .875, .75 or .66 of the short side, height and width at most one step apart; the corner is one
    of 13 places on a grid of quarters: the four corners, the centre, and eight between them.
    """
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))
    sides = [max(1, int(min(H, W) * s)) for s in (1, 0.875, 0.75, 0.66)]
    pairs = [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1]
    h, w = pairs[pick(len(pairs))]
    places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
    row, col = places[pick(len(places))]
    return row * ((H - h) // 4), col * ((W - w) // 4), h, w


def make_crop(pixels, size, kind, min_crop, flip, generator, bicubic=False):
    """Crop, resize to size x size, perhaps flip.   uint8 (T, H, W, 3) -> uint8 (T, size, size, 3)

    kind      "random": area min_crop .. 1 of the frame, aspect 3/4 .. 4/3 (torchvision's RandomResizedCrop)
              "multiscale": VideoMAE's;  "center": short side to size, centre crop, no flip
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (T, 3, H, W), channels last in memory: the fast path
    how = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    if kind == "random":
        box = random_box(x, (min_crop, 1.0), generator)
    elif kind == "multiscale":
        box = multi_scale_crop(*x.shape[-2:], generator)
    else:
        box = center_box(x)
    x = TF.resized_crop(x, *box, [size, size], interpolation=how, antialias=True)
    if kind != "center" and flip and torch.rand(1, generator=generator) < 0.5:
        x = TF.horizontal_flip(x)
    return x.permute(0, 2, 3, 1).contiguous()


def center_box(x):
    """The largest square in the middle.   (..., H, W) -> top, left, height, width"""
    H, W = x.shape[-2:]
    side = min(H, W)
    return (H - side) // 2, (W - side) // 2, side, side


@contextlib.contextmanager
def torchvision_draws_from(generator):
    """torchvision draws from the global generator: lend it a seed of ours, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it reaches for the GPUs too, and would take as long as the resize of a small clip
        torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        yield


def random_box(x, scale, generator):
    """RandomResizedCrop's box from an explicit generator."""
    with torchvision_draws_from(generator):
        box = v2.RandomResizedCrop(1, scale=scale).make_params([x])
    return box["top"], box["left"], box["height"], box["width"]


# ============================================================================================================
#  PART 5: datasets and the loader             (needs: numpy, torch, seeded, parts 2-4; masking.py InputError)
# ============================================================================================================


class ClipDataset(Dataset):
    """dataset[epoch, i] -> uint8 (R, T, H, W, 3), number of the file used, [(path, reason) of broken files].

    frames, stride   T frames, `stride` apart ("dense", "linspace"), or spread over the video ("segments")
    size             side of the square clips;   crop, min_crop, flip: see make_crop
    repeat           R clips of every decoded video, with their own position and crop: MAE-ST Sec. 4 "Data
                     pre-processing". Decoding is the slow part, so R clips cost little more than one.
    train            False: one clip without randomness, of the middle of the video or of every segment; centre crop
    """

    def __init__(self, files, frames, stride, size, seed, sampling="dense", crop="random", min_crop=0.5, flip=True,
                 repeat=1, train=True):  # fmt: skip
        self.paths, self.labels, self.classes = files.paths, files.labels, files.classes
        self.seed, self.repeat = seed, repeat
        self.frames, self.stride, self.size, self.sampling, self.train = frames, stride, size, sampling, train
        self.crop, self.min_crop, self.flip = crop if train else "center", min_crop, flip

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        return read_or_redraw(self, *key)

    def read(self, i, generator):
        clips = read_clips(self.paths[i], lambda n: self.choose(n, generator))
        return torch.stack([make_crop(c, self.size, self.crop, self.min_crop, self.flip, generator) for c in clips])

    def choose(self, n, generator):
        """Frame numbers (R, T) for a video of n frames."""
        T, stride = self.frames, self.stride
        if not self.train:
            return views_of(self.sampling, n, T, stride, 1)
        if self.sampling == "segments":
            return np.stack([segment_clip(n, T, generator) for _ in range(self.repeat)])
        if self.sampling == "dense":
            starts = [dense_start(n, T, stride, generator) for _ in range(self.repeat)]
            return np.stack([dense_clip(n, T, stride, s) for s in starts])
        starts = torch.rand(self.repeat, generator=generator).numpy() * max(n - T * stride, 0)
        return np.stack([linspace_clip(n, T, stride, s) for s in starts])


class ImageDataset(Dataset):
    """dataset[epoch, i] -> uint8 (1, H, W, 3), number of the file used, [(path, reason) of broken files]."""

    repeat = 1

    def __init__(self, files, size, seed, min_crop=0.2, flip=True, train=True):
        self.paths, self.labels, self.classes, self.pixels = files.paths, files.labels, files.classes, files.pixels
        self.size, self.seed, self.crop = size, seed, "random" if train else "center"
        self.min_crop, self.flip = min_crop, flip

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        return read_or_redraw(self, *key)

    def read(self, i, generator):
        pixels = self.pixels[i] if self.pixels is not None else read_image(self.paths[i])
        return make_crop(pixels[None], self.size, self.crop, self.min_crop, self.flip, generator, bicubic=True)


def read_or_redraw(dataset, epoch, i, tries=10):
    """Item i of an epoch, or another one in place of a broken file. After `tries` broken ones in a row: InputError."""
    broken = []
    for attempt in range(tries):
        try:
            return dataset.read(i, seeded(dataset.seed, 0, epoch, i)), i, broken
        except BrokenFile as error:
            broken.append((str(dataset.paths[i]), str(error)))
            i = int(torch.randint(len(dataset), (1,), generator=seeded(dataset.seed, 3, epoch, i, attempt)))
    names = ", ".join(f"{path} ({reason})" for path, reason in broken[:3])
    raise InputError(f"{tries} files in a row cannot be read: {names} ...: python data.py check lists them")


def collate(items):
    """-> uint8 (sum of R, ...), file numbers, broken files."""
    pixels, numbers, broken = zip(*items)
    return torch.cat(pixels), list(numbers), sum(broken, [])


def make_loader(dataset, batch_sampler, workers, device):
    return DataLoader(dataset, batch_sampler=batch_sampler, num_workers=workers, collate_fn=collate,
                      worker_init_fn=leave_signals_to_the_parent,
                      pin_memory=torch.device(device).type == "cuda")  # fmt: skip


def leave_signals_to_the_parent(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C
    if hasattr(os, "setpgid"):  # torchrun's SIGTERM goes to the whole process group of a rank
        os.setpgid(0, 0)


# ============================================================================================================
#  PART 6: the toy world
#  (needs: numpy, av, pillow, BrokenFile, in_parallel, one_thread, end_with; masking.py InputError)
#
#  A room with a patterned floor and wall, an object that matters and some that do not, seen by a camera that
#  drifts sideways. Rays are cast through every pixel, so depth and class maps are exact. Units are metres.
#
#  Images: the class is the kind of the large object, visible in one frame.
#  Videos: the object travels on an upright circle, away and back, and the class is how. Where it begins is drawn
#  uniformly, so a single frame looks the same in every class: motion decides. A mirror image keeps the class.
# ============================================================================================================

KINDS = ("Ball", "Box", "Cone", "Post")
MAPS = ("floor", "wall") + KINDS  # class numbers of the semantic maps
MOTIONS = {  # class -> angle on the circle, in turns, at time 0 .. 1
    "Still": lambda t: 0 * t,
    "OverTowards": lambda t: t,
    "OverAway": lambda t: -t,
    "FastTowards": lambda t: 2 * t,
    "FastAway": lambda t: -2 * t,
    "ThereAndBack": lambda t: 1 - abs(2 * t - 1),
}
VIEW = 0.55  # tangent of half the camera's angle of view
FAR = 16.0  # depth maps hold depth / FAR * 65535


def draw_pattern(rng):
    """A floor or wall: two waves that mix two colours."""
    parts = {
        "waves": rng.uniform(-0.8, 0.8, (2, 2)),
        "phase": rng.uniform(0, 6.28, 2),
        "colors": rng.uniform(0.1, 0.95, (2, 3)),
    }
    return {name: np.float32(part) for name, part in parts.items()}


def draw_object(rng, kind, place, radius):
    """place (3,) or (T, 3): x to the right, y up, z away from the camera; y is the object's middle."""
    return {"kind": kind, "place": np.float32(place), "radius": np.float32(radius), "turn": rng.uniform(0, 1.57),
            "color": np.float32(rng.uniform(0.15, 1.0, 3))}  # fmt: skip


def draw_scene(rng, kind, main_place, times):
    """What is in view at each of the times 0 .. 1: two patterns, the object that matters, two more, the camera."""
    others = [draw_object(rng, rng.choice(KINDS), (x, 0.35, rng.uniform(6.6, 8.2)), 0.35) for x in
              (rng.uniform(-3, -0.8), rng.uniform(0.8, 3))]  # fmt: skip
    return {"floor": draw_pattern(rng), "wall": draw_pattern(rng),
            "objects": [draw_object(rng, kind, main_place, rng.uniform(0.7, 0.9))] + others,
            "camera": np.float32(rng.uniform(-0.4, 0.4) + rng.uniform(-0.5, 0.5) * times)}  # fmt: skip


def draw_image_scene(rng, kind):
    place = (rng.uniform(-0.8, 0.8), rng.uniform(0.9, 1.8), rng.uniform(3.6, 4.6))
    return draw_scene(rng, kind, place, np.zeros(1))


def draw_video_scene(rng, motion, frames):
    times = np.arange(frames) / frames
    turns = rng.uniform() + rng.choice([-1, 1] if motion == "ThereAndBack" else [1]) * MOTIONS[motion](times)
    angle = 2 * math.pi * turns
    x = rng.uniform(-0.7, 0.7)
    place = np.stack([np.full(frames, x), 1.8 + 1.0 * np.sin(angle), 4.6 + 1.2 * np.cos(angle)], axis=1)  # (T, 3)
    return draw_scene(rng, rng.choice(KINDS), place, times)


def render(scene, size):
    """-> pixels (T, size, size, 3) uint8, depth (T, size, size) float32 in metres, classes (T, size, size) uint8.

    Pixels are rendered at twice the size and averaged, or edges would flicker; the maps are not smoothed."""
    T, S = len(scene["camera"]), 2 * size
    at = np.float32((np.arange(S) + 0.5) / S * 2 - 1)
    right, down = np.meshgrid(at * VIEW, at * VIEW)
    slope = 0.12  # the camera looks down a little. A ray is 1 long along the view, so t in eye + t * ray is the depth
    ray = np.stack([right, -down * math.cos(slope) - math.sin(slope), math.cos(slope) - down * math.sin(slope)], -1)
    ray = np.broadcast_to(np.float32(ray), (T, S, S, 3))
    eye = np.float32(np.stack([scene["camera"], np.full(T, 1.7), np.zeros(T)], -1))[:, None, None]  # (T, 1, 1, 3)

    floor, wall = -eye[..., 1] / np.minimum(ray[..., 1], -1e-6), 9.0 / ray[..., 2]
    depth, classes = np.minimum(floor, wall), np.where(floor < wall, 0, 1).astype(np.uint8)
    point = eye + depth[..., None] * ray
    on_floor = paint(scene["floor"], point[..., 0], point[..., 2])
    on_wall = paint(scene["wall"], point[..., 0], point[..., 1])
    for thing in scene["objects"]:  # a soft shadow straight below makes height visible
        x, _, z = np.moveaxis(thing["place"].reshape(-1, 3), -1, 0).reshape(3, -1, 1, 1)
        gap = ((point[..., 0] - x) ** 2 + (point[..., 2] - z) ** 2) / thing["radius"] ** 2
        on_floor = on_floor * (1 - 0.6 * np.exp(-gap))[..., None]
    color = np.where((classes == 0)[..., None], on_floor, on_wall)
    for thing in scene["objects"]:
        x, y, z = np.moveaxis(thing["place"] - eye[:, 0, 0], -1, 0)  # only the pixels around it are looked at
        ahead, below = z * math.cos(slope) - y * math.sin(slope), -y * math.cos(slope) - z * math.sin(slope)
        margin = 1.8 * thing["radius"]
        box = (slice(None), span((below - margin) / ahead, (below + margin) / ahead, S),
               span((x - margin) / ahead, (x + margin) / ahead, S))  # fmt: skip
        hit, normal = intersect(thing, eye, ray[box])
        near = hit < depth[box]
        light = 0.45 + 0.55 * np.clip(dot(normal, np.float32([0, 0.8, -0.6])), 0, 1)
        depth[box] = np.where(near, hit, depth[box])
        classes[box] = np.where(near, MAPS.index(thing["kind"]), classes[box])
        color[box] = np.where(near[..., None], light[..., None] * thing["color"], color[box])
    pixels = sum(color[:, r::2, c::2] for r in (0, 1) for c in (0, 1)) / 4
    return (pixels * 255).clip(0, 255).astype(np.uint8), depth[:, ::2, ::2].astype(np.float32), classes[:, ::2, ::2]


def span(low, high, S):
    """The pixels, over all frames, between two slopes of a ray (sideways or down / ahead)."""
    low, high = (int((v / VIEW + 1) / 2 * S) for v in (low.min(), high.max()))
    return slice(min(max(low, 0), S - 1), max(min(high + 1, S), 1))


def paint(pattern, a, b):
    """Colour of a pattern at coordinates a, b."""
    waves = [np.sin(wave[0] * a + wave[1] * b + phase) for wave, phase in zip(pattern["waves"], pattern["phase"])]
    mix = (0.5 + 0.25 * sum(waves))[..., None]
    return mix * pattern["colors"][0] + (1 - mix) * pattern["colors"][1]


def intersect(thing, eye, ray):
    """Where rays meet an object: -> depth (inf where they miss), surface normal (T, S, S, 3)."""
    r, o = np.float32(thing["radius"]), (eye - thing["place"].reshape(-1, 1, 1, 3)).astype(np.float32)
    o = np.broadcast_to(o, ray.shape)
    if thing["kind"] == "Box":
        return hit_box(o, ray, 0.8 * r, thing["turn"])
    if thing["kind"] == "Ball":
        hit = hit_quadric(dot(ray, ray), dot(o, ray), dot(o, o) - r**2, lambda t: True)
        return hit, unit(o + np.where(np.isfinite(hit), hit, 0)[..., None] * ray)
    # a cone or a post: radius low + lean * (height above the foot), between foot and top
    low, lean = (r, np.float32(-0.5)) if thing["kind"] == "Cone" else (0.45 * r, np.float32(0))  # to a point at 2 r
    foot = low + lean * (o[..., 1] + r)
    a = ray[..., 0] ** 2 + ray[..., 2] ** 2 - (lean * ray[..., 1]) ** 2
    b = o[..., 0] * ray[..., 0] + o[..., 2] * ray[..., 2] - lean * foot * ray[..., 1]
    c = o[..., 0] ** 2 + o[..., 2] ** 2 - foot**2
    hit = hit_quadric(a, b, c, lambda t: np.abs(o[..., 1] + t * ray[..., 1]) <= r)
    p = o + np.where(np.isfinite(hit), hit, 0)[..., None] * ray
    normal = unit(np.stack([p[..., 0], -lean * np.hypot(p[..., 0], p[..., 2]), p[..., 2]], -1))
    for y, radius in ((-r, low), (r, low + lean * 2 * r)):  # the flat foot and top
        t = (y - o[..., 1]) / ray[..., 1]
        inside = (o[..., 0] + t * ray[..., 0]) ** 2 + (o[..., 2] + t * ray[..., 2]) ** 2 < radius**2
        near = inside & (t > 0) & (t < hit)
        hit, normal = np.where(near, t, hit), np.where(near[..., None], np.float32([0, np.sign(y), 0]), normal)
    return hit, normal


def hit_quadric(a, b, c, valid):
    """The nearest positive root of a t^2 + 2 b t + c = 0 for which valid(t); inf where there is none."""
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    hit = np.full(b.shape, np.inf, np.float32)
    for t in ((-b + root) / a, (-b - root) / a):
        hit = np.where((b * b >= a * c) & (t > 0) & (t < hit) & valid(t), t, hit)
    return hit


def hit_box(o, ray, half, turn):
    """An upright cube, turned about its vertical axis: the slab method."""
    c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    rotate = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)
    o, d = o @ rotate, ray @ rotate
    d = np.where(np.abs(d) < 1e-6, np.float32(1e-6), d)
    t0, t1 = np.minimum((-half - o) / d, (half - o) / d), np.maximum((-half - o) / d, (half - o) / d)
    enter, leave = np.maximum.reduce(np.moveaxis(t0, -1, 0)), np.minimum.reduce(np.moveaxis(t1, -1, 0))
    hit = np.where((enter < leave) & (enter > 0), enter, np.float32(np.inf))
    axis = t0.argmax(-1)[..., None] == np.arange(3)
    return hit, (-np.sign(d) * axis).astype(np.float32) @ rotate.T


def dot(a, b):
    """Over the last axis. (Faster than sum(-1) over an axis of three.)"""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def unit(v):
    return v / np.maximum(np.sqrt(dot(v, v)), 1e-6)[..., None]


def write_toy_clip(folder, motion, group, clip, size, frames):
    """One video file of the toy world; all its randomness comes from its name."""
    number = list(MOTIONS).index(motion)
    scene = draw_video_scene(np.random.default_rng([1, number, group, clip]), motion, frames)
    path = folder / motion / f"v_{motion}_g{group:02d}_c{clip:02d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, render(scene, size)[0], Fraction(12))


def write_toy_image(folder, split, i, size):
    """One image with its depth map (16 bits) and class map (8 bits) in three parallel folders."""
    kind = KINDS[i % len(KINDS)]
    scene = draw_image_scene(np.random.default_rng([2, split == "val", i]), kind)
    pixels, depth, classes = render(scene, size)
    for part, suffix, array in (("rgb", "jpg", pixels[0]), ("depth", "png", (depth[0] / FAR * 65535).clip(0, 65535)),
                                ("semseg", "png", classes[0])):  # fmt: skip
        path = folder / part / split / kind / f"{i:05d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint16) if part == "depth" else array).save(path, quality=95)


def make_toy(folder, size=64, frames=24, groups=25, clips=4, images=(1600, 400)):
    """Write the toy world; nothing happens if it is there already.   -> whether it was written

    folder/videos/<Motion>/v_<Motion>_gXX_cYY.mp4, classInd.txt, trainlist01.txt ...   UCF101's format:
        no group is in both lists of a fold
    folder/{rgb,depth,semseg}/{train,val}/<Kind>/00000.{jpg,png,png}                    aligned maps
    """
    folder, place = Path(folder), Path(folder).resolve()
    is_there = lambda: (folder / "videos").is_dir() and (folder / "rgb").is_dir()
    if is_there():
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or place == Path.cwd()):
        raise InputError(f"{folder} exists and is no toy world: name a new folder")
    # of this process alone, since two scripts may begin at once; renamed when complete
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "videos").mkdir(parents=True)
        jobs = [functools.partial(write_toy_clip, partial / "videos", m, g, c, size, frames)
                for m in MOTIONS for g in range(1, groups + 1) for c in range(1, clips + 1)]  # fmt: skip
        jobs += [functools.partial(write_toy_image, partial, split, i, size)
                 for split, count in zip(("train", "val"), images) for i in range(count)]  # fmt: skip
        for _, error in in_parallel(call, jobs, f"rendering the toy world into {folder}"):
            if error:
                raise error
        (partial / "videos" / "classInd.txt").write_text("".join(f"{i} {m}\n" for i, m in enumerate(MOTIONS, 1)))
        for fold in (1, 2, 3):  # like UCF101, whose fold 1 tests on the groups 1 to 7 of 25
            width = max(1, groups * 7 // 25)
            test = range(1 + (fold - 1) * width, 1 + fold * width)
            for name, keep in (("train", lambda g: g not in test), ("test", lambda g: g in test)):
                lines = [f"{m}/v_{m}_g{g:02d}_c{c:02d}.mp4" + (f" {i}" if name == "train" else "")
                         for i, m in enumerate(MOTIONS, 1) for g in range(1, groups + 1) if keep(g)
                         for c in range(1, clips + 1)]  # fmt: skip
                (partial / "videos" / f"{name}list0{fold}.txt").write_text("\n".join(lines) + "\n")
        if folder.exists() and not is_there():
            folder.rmdir()
        partial.rename(place)
    except OSError as error:
        if is_there():  # another script was faster
            return False
        raise InputError(f"cannot write the toy world to {folder}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def call(job):
    return job()


def write_video(path, frames, rate, codec="libx264"):
    """uint8 frames (H, W, 3), all of one even-sided size, -> a video file. H.264, or MPEG-4 where PyAV lacks it.

    -> how many frames there were"""
    codec = codec if codec in av.codecs_available else "mpeg4"
    options = {"crf": "18", "preset": "veryfast", "g": "12"} if codec == "libx264" else {}
    with av.open(os.path.abspath(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        if codec == "mpeg4":  # nearly lossless, a key frame every 12
            stream.codec_context.qmin, stream.codec_context.qmax, stream.codec_context.gop_size = 2, 4, 12
        count = 0
        for count, frame in enumerate(frames, 1):
            if count == 1:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        if not count:
            raise BrokenFile("no frame can be decoded")
        container.mux(stream.encode())
    return count


# ============================================================================================================
#  THE RUN: data that are made or downloaded; the commands toy, check, shrink
# ============================================================================================================


def fetch(name, rank, world):
    """Data that are made or downloaded (--data toy, the default; cifar10, stl10): by the first process, others wait."""
    if name == "toy" and rank == 0:
        make_toy(name)
    if name.lower() in ("cifar10", "stl10") and rank == 0 and world > 1:
        list_images(name, "val")  # one archive holds both splits
    if world > 1:
        torch.distributed.barrier()


def in_parallel(work, jobs, what):
    """Yield (result, error) of work(job) in the order of jobs, from all CPU cores, with progress and ETA."""
    start, shown = time.perf_counter(), 0.0
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), initializer=one_thread) as pool:
        futures = collections.deque(pool.submit(work, job) for job in jobs)
        try:
            for i in range(1, len(jobs) + 1):
                future = futures.popleft()  # or every result would stay in memory
                error = future.exception()
                if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                    raise InputError(f"{what}: a worker process was killed (out of memory?), after {i - 1} files")
                yield (None, error) if error else (future.result(), None)
                now = time.perf_counter()
                if now - shown > (0.5 if sys.stderr.isatty() else 20) or i == len(jobs):
                    left, shown = (now - start) / i * (len(jobs) - i), now
                    end = "\r" if sys.stderr.isatty() and i < len(jobs) else "\n"
                    print(f"{what}: {i} of {len(jobs)}, {left:.0f} s left  ", end=end, file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def one_thread():
    """Begin a worker process of in_parallel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent):
    """A worker whose parent was killed would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def check_file(path):
    """Decode one file in full: -> reason if broken (else ""), small picture of its middle."""
    try:
        if path.suffix.lower() in IMAGE:
            return "", thumbnail(read_image(path))
        promised = count_frames(path)
        found, n = grab(path, np.array([0, promised // 2, 10**9]))  # from the first frame to the end
        if n == 0:
            raise BrokenFile("no frame can be decoded")
        return cut_short(promised, n), thumbnail(found[max(found)])
    except Exception as error:
        return one_line(error), None


def cut_short(promised, n):
    """-> reason, or "": at either end B-frames may be lost, so one or two frames less is common and harmless."""
    return f"the header says {promised} frames, {n} can be decoded" if n < 0.9 * promised - 2 else ""


def thumbnail(pixels):
    return np.asarray(ImageOps.pad(Image.fromarray(pixels), (96, 96)))


def check(root, sheet):
    """Decode everything below root, list what is broken, draw a contact sheet.

    Exit code 1 if anything is broken, or a file of the official lists is absent."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root} is no folder")
    paths = list(walk(root, VIDEO + IMAGE))
    if not paths:
        raise InputError(f"{root} holds no videos and no images")
    official = find_official(root)  # now: half a download should be named before hours of decoding
    broken, absent, pictures = [], False, []
    shown = set(np.linspace(0, len(paths) - 1, min(len(paths), 48)).round().astype(int).tolist())
    for i, ((report, error), path) in enumerate(zip(in_parallel(check_file, paths, f"checking {root}"), paths)):
        reason, picture = report or (str(error), None)
        if reason:
            broken.append(path)
            print(f"broken: {path}: {reason}")
        if picture is not None and i in shown:
            pictures.append(picture)
    if official is not None:
        for fold, split in [(f, s) for f in (1, 2, 3) for s in ("train", "val")]:
            try:
                count = len(read_official(*official, split, fold, allow_missing=False).paths)
                print(f"fold {fold} {split}: {count} files listed, all there")
            except InputError as error:
                absent = True
                print(f"fold {fold} {split}: {error}")
    if pictures:
        columns = min(8, len(pictures))
        canvas = Image.new("RGB", (columns * 100, -(-len(pictures) // columns) * 100), "white")
        for i, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (i % columns * 100 + 2, i // columns * 100 + 2))
        try:
            canvas.save(sheet)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write {sheet}: {error}") from None
        print(f"wrote {sheet}")
    print(f"{len(paths)} files decoded, {len(broken)} broken")
    sys.exit(1 if broken or absent else 0)


def shrink_file(job):
    """Re-encode one video with a smaller short side and a key frame every 12 frames.

    -> reason if it is broken and left out, else "", reason if it is cut short, else "" """
    source, target, short = job
    partial = target.with_name("." + target.name)  # walk() does not see it, should the work be cut off
    try:
        container, stream = open_video(source)
        with container:
            W, H = stream.codec_context.width, stream.codec_context.height
            scale = min(1, short / min(W, H))
            W, H = max(2, round(W * scale / 2) * 2), max(2, round(H * scale / 2) * 2)
            done = target.exists() and target.stat().st_mtime >= source.stat().st_mtime  # in an earlier call
            if done and sorted(size_of(target)) == sorted((W, H)):
                return "", ""
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25).limit_denominator(1001)
            rate = rate if rate.numerator < 2**16 else Fraction(round(rate))  # MPEG-4 holds no more
            convert = av.video.reformatter.VideoReformatter()
            frames = (upright(convert.reformat(f, W, H, "rgb24", interpolation="AREA"), f)
                      for f in container.decode(stream))  # fmt: skip
            target.parent.mkdir(parents=True, exist_ok=True)
            less = cut_short(stream.frames, write_video(partial, frames, rate, "mpeg4"))
        os.replace(partial, target)
        return "", less
    except Exception as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise InputError(f"cannot write {target}: {error.strerror}; call again when there is room") from None
        return one_line(error), ""


def size_of(path):
    """-> width, height by the header; of a file that cannot be read 0, 0."""
    try:
        container, stream = open_video(path)
        with container:
            return stream.codec_context.width, stream.codec_context.height
    except Exception:  # decoders raise many kinds on a damaged file
        return 0, 0


def shrink(source, target, short):
    """Re-encode every video below source into target, with the same names, and copy the lists.

    MPEG-4 without B-frames: on clips this small it decodes several times faster than H.264. A second call
    does what the first left undone, and what was replaced since.   Exit code 1 if a file is broken.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise InputError(f"{source} is no folder")
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target} lies in {source}: the copy needs a folder of its own")
    if short < 16:
        raise InputError(f"--short-side {short} is too small for a picture: 128 is common")
    videos = list(walk(source, VIDEO))
    if not videos:
        raise InputError(f"{source} holds no videos")
    keep = (".avi", ".mp4", ".mkv", ".mov", ".m4v")  # containers that take MPEG-4; others become .mp4
    jobs = [(p, target / (r if r.suffix.lower() in keep else r.with_suffix(".mp4")), short)
            for p in videos for r in [p.relative_to(source)]]  # fmt: skip
    goals = {}
    for p, t, _ in jobs:
        if goals.setdefault(t, p) != p:
            raise InputError(f"{goals[t]} and {p} would both become {t}: rename one of them")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in walk(source, (".txt", ".csv")):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            for old in {os.path.join(p, "") for p in (os.path.abspath(source), source.resolve())}:
                new = os.fsencode(os.path.join(target.resolve(), ""))  # where an absolute path leads from now on
                content = re.sub(rb"(?m)^" + re.escape(os.fsencode(old)), lambda _: new, content)
            copy.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error}") from None
    broken = 0
    for (result, error), (path, _, _) in zip(in_parallel(shrink_file, jobs, f"shrinking into {target}"), jobs):
        if isinstance(error, InputError):
            raise error
        reason, less = result or (str(error), "")
        if reason:
            broken += 1
            print(f"broken, left out: {path}: {reason}")
        if less:  # of the copy, whose header is right, check could not tell
            print(f"cut short: {path}: {less}")
    sizes = [sum(p.stat().st_size for p in walk(folder, VIDEO)) / 1e6 for folder in (source, target)]
    print(
        f"{len(videos) - broken} videos in {target}, {sizes[0]:.1f} MB before, {sizes[1]:.1f} MB after, {broken} broken"
    )
    sys.exit(1 if broken else 0)


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    toy = commands.add_parser("toy", help="write the toy world: rendered videos, images, depth and class maps")
    toy.add_argument("folder", help="new folder")
    toy.add_argument("--size", type=int, default=64, help="side of pictures and clips in pixels (default: 64)")
    toy.add_argument("--groups", type=int, default=25, help="groups of 4 clips a class (default: 25)")
    toy.add_argument("--images", type=int, default=1600, help="training images; a quarter more to test (default: 1600)")
    look = commands.add_parser("check", help="decode everything, list what is broken, draw a contact sheet")
    look.add_argument("folder", help="data set, or any folder")
    look.add_argument("--sheet", default="contact_sheet.png", help="file for the contact sheet")
    less = commands.add_parser("shrink", help="re-encode videos once, so that decoding does not starve the GPU")
    less.add_argument("source", help="folder of videos")
    less.add_argument("target", help="folder for the smaller copies")
    less.add_argument("--short-side", type=int, default=128, help="new short side in pixels (default: 128)")
    args = parser.parse_args()
    if args.command == "check":
        check(args.folder, args.sheet)
    elif args.command == "shrink":
        shrink(args.source, args.target, args.short_side)
    else:
        if args.size < 16 or args.size % 2 or args.groups < 4 or args.images < 4:
            raise InputError("the toy world needs an even --size of 16 or more, 4 --groups and 4 --images")
        written = make_toy(args.folder, args.size, groups=args.groups, images=(args.images, args.images // 4))
        print(f"the toy world is in {args.folder}" + ("" if written else ", as it was: it is not written twice"))


if __name__ == "__main__":
    run_script(main)
