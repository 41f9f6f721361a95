"""data.py - from a file on disk to a batch of uint8 pixels.

    which files       UCF101, HMDB51, class folders, "path label" lists, CIFAR-10     list_videos
    decoding          PyAV: exact frames, only those that are kept are converted      read_clips
    one crop          random resized or centre; the same for all frames of a clip     make_crop
    a dataset item    uint8 (R, H, W, 3), or (R, T, H, W, 3) in mae_video.py          ImageDataset
    a batch           items in the order of (seed, epoch), read by worker processes   start_loader
    a toy world       sprites with exact depth and class maps                         make_toy

What item i of an epoch gets (crop, flip, clip position) is drawn from a generator seeded with
(seed, epoch, i): a dataset is indexed with the pair (epoch, i), and workers need no state. A file
that cannot be read is named in the log and another one is used; it never becomes zeros.

Run   python data.py toy toy                    (20 s on 2 cores: 600 clips, 2,000 images)
      python data.py check UCF101               (decode everything, list what is broken)
      python data.py shrink UCF101 UCF101-128   (smaller copies decode faster: do it once)
Next  mae_image.py: the first model, and the training loop.
"""

import argparse
import collections
import contextlib
import errno
import functools
import itertools
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from masking import numbers, report, run_script

# Endings of files, and the only formats that are opened, whatever a file claims to be. The first
# five can hold MPEG-4, which shrink writes.
VIDEO = ".avi .mp4 .m4v .mov .mkv .3gp .webm .mpg .mpeg .vob .mts .m2ts .wmv .asf .flv .ogv".split()
IMAGE = ".jpg .jpeg .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm".split()
CONTAINERS = "avi,mov,mp4,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv,ogg"  # FFmpeg's names
PICTURES = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # Pillow's


def seeded(*numbers):
    """A generator that depends on these whole numbers alone, not on what was drawn before.

    The first is the seed, the second says what for: 0 items, 1 masks, 2 held-out masks, 3 what
    replaces a broken file, and so on (shuffled() alone has the epoch there). important: numpy fills
    up to four numbers with zeros, so (s, 1) and (s, 1, 0) are one stream. It does no harm here; in
    a new project put the use last.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


# ==== PART 1: which files, with which labels ======================================================
# (needs: collections, functools, itertools, os, re, unicodedata, zlib, dataclass, Path, np,
# datasets, VIDEO, IMAGE)
@dataclass
class Files:
    """One split of a data set. Arrays: a list of objects would be copied into every worker."""

    paths: np.ndarray  # of str
    labels: np.ndarray  # of int, 0 .. len(classes) - 1, or -1 where none is known
    classes: list  # names
    how: str = ""  # where the split comes from, in words
    missing: int = 0  # files that a list names, but that are not there
    pixels: np.ndarray = None  # (N, H, W, 3) uint8 where the images are in memory (CIFAR-10)

    def __post_init__(self):
        self.paths, self.labels = np.array(self.paths, str), np.array(self.labels, int)

    def select(self, keep):
        """Some of the files.   keep: their numbers, or a bool for each"""
        pixels = None if self.pixels is None else self.pixels[keep]
        own = self.paths[keep], self.labels[keep]
        return Files(*own, self.classes, self.how, self.missing, pixels)


def one_file(path, kinds, classes=()):
    """A single file, of no known class.   Raises ValueError if it does not end in one of `kinds`"""
    if not os.path.isfile(path) or Path(path).suffix.lower() not in kinds:
        raise ValueError(f"{path} is no file that ends in {', '.join(kinds)}")
    return Files([path], [-1], classes)


def list_videos(root, split="train", fold=1):
    """The videos of one split ("train" or "val") of:

    root/UCF-101/ + root/ucfTrainTestlist/                 UCF101 as downloaded; fold 1, 2 or 3
    root/hmdb51_org/ + root/testTrainMulti_7030_splits/    HMDB51 as downloaded; fold 1, 2 or 3
    root/<Class>/*.avi + root/classInd.txt, trainlist01.txt ...     lists in UCF101's format
    root/train/<class>/*, root/val/<class>/*               also training, valid, test, TRAIN_256 ...
    root/<class>/* or root/*                               every 20th file of a class is held out
    a file of lines "path label"                           val: val.csv or test.csv beside it

    A lone folder in root is stepped into. Raises ValueError where nothing is found.
    """
    official = find_official(Path(root)) or find_official(root := find_root(root, "videos"))
    if official:
        return read_official(*official, split, fold)
    if fold != 1:
        raise ValueError(f"--fold {fold}: {root} has no official lists, and so one split only")
    return list_plain(root, split, VIDEO)


def list_images(root, split="train"):
    """The images of one split, as in list_videos; "cifar10": torchvision's, downloaded to data/."""
    if str(root) == "cifar10" and not Path(root).exists():
        found = datasets.CIFAR10("data/cifar10", train=split == "train", download=True)
        names = [f"cifar10/{split}/{i}" for i in range(len(found.data))]
        return Files(names, found.targets, found.classes, "torchvision", pixels=found.data)
    return list_plain(find_root(root, "rgb"), split, IMAGE)


def find_root(root, part):
    """The folder or file, or its part "videos" / "rgb" where it has one, as the toy world does."""
    inside = Path(root, part)
    return inside if inside.is_dir() else Path(root)


def find_official(root):
    """-> (name, folder of lists, folder of videos) of UCF101 or HMDB51 as they were unpacked."""
    if (root / "classInd.txt").is_file():
        return "UCF101", root, root
    for name, *folders in (("UCF101", "ucfTrainTestlist", "UCF-101"),
                           ("HMDB51", "testTrainMulti_7030_splits", "hmdb51_org")):
        given = root.name == folders[1]  # the folder of videos itself
        found = [find_folder(root.parent if given else root, folder) for folder in folders]
        if all(found):
            return name, *found
        if any(found) and not given:
            lost = folders[found.index(None)]
            raise ValueError(f"{root} holds a part of {name}: unpack {lost}, too")
    return None


def find_folder(root, name):
    """A folder of this name in root or one level below, the innermost of nested ones; or None."""
    places = [root / name, *sorted(root.glob(f"[!._]*/{name}"))]
    found = next((place for place in places if place.is_dir()), None)
    return found and (find_folder(found, name) or found)


def read_official(name, lists, videos, split, fold):
    """One fold of the official lists. The comments name their traps."""
    train, wanted = split == "train", []  # (path in the list, label)
    if name == "UCF101":
        table = f"{'train' if train else 'test'}list0{fold}.txt"
        classes = [c for (c,) in read_lines(lists / "classInd.txt", r"\d+\s+(.+)")]
        label_of = {c.lower(): label for label, c in enumerate(classes)}
        # trainlist has labels (from 1; 0: unknown), testlist none: the folder is the class
        for path, number in read_lines(lists / table, r"(.+?)(?:\s+(\d+))?"):
            label = label_of.get(path.split("/")[0].lower(), -1)
            wanted.append((path, -1 if number == "0" else label))
    else:
        table = f"_test_split{fold}.txt"
        tables = sorted(lists.glob(f"*{table}"))  # climb_stairs before climb, as the files sort
        classes = [path.name.removesuffix(table) for path in tables]
        for label, path in enumerate(tables):
            for video, use in read_lines(path, r"(.+)\s([012])"):  # 1 train, 2 test, 0 neither
                if use == ("1" if train else "2"):
                    wanted.append((f"{classes[label]}/{video}", label))
    return resolve(wanted, classes, videos, VIDEO, f"{name}'s {table}")


def read_lines(path, pattern="(.+)"):
    """The groups of `pattern` in every line that is not empty.   Raises ValueError that shows it"""
    rows = []
    for line in path.read_text("utf-8-sig").splitlines():
        if found := re.fullmatch(pattern, line.strip()):
            rows.append(found.groups())
        elif line.strip():
            raise ValueError(f"{path} has the line {line!r}, which cannot be read")
    return rows


def resolve(wanted, classes, folder, kinds, how):
    """Listed (path, label) -> Files that exist.

    A file is where the list says or, wherever it lies, of the same name in a folder of the same
    name: without regard to case (UCF101's lists and folders disagree about HandStandPushups), to
    the ending (a re-encoded copy may be .mp4) and to the two ways to write an accent.
    """

    def key(path):
        return unicodedata.normalize("NFC", f"{path.parent.name}/{path.stem}").casefold()

    @functools.cache
    def by_key():  # only where a file is not at its place: a large folder takes long to walk
        alike = collections.defaultdict(list)
        for path in walk(folder, kinds)[0]:
            alike[key(path)].append(path)
        return alike

    paths, labels, missing = [], [], []
    for listed, label in wanted:
        path, found = Path(folder, listed), []
        ending = path.suffix.lower()
        if ending in kinds and path.is_file():
            found = [path]
        elif ending in (*kinds, ""):
            found = by_key()[key(path)]
        if len(found) == 1:
            paths.append(found[0])
            labels.append(label)
        else:
            missing.append(listed)
    if not paths:
        raise ValueError(f"{folder} has no file of the {len(wanted)} in {how}, e.g. {missing[:1]}")
    if missing:
        how += f": {len(missing)} of {len(wanted)} files not found in {folder}, e.g. {missing[0]}"
    return Files(paths, labels, classes, how, len(missing))


def walk(folder, kinds):
    """All files below folder -> those that end in `kinds`, sorted; the others, counted in words."""
    found, others, seen = [], collections.Counter(), set()

    def fail(error):
        raise error  # a folder that may not be listed

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(f for f in folders if not re.match(r"\.|__MACOSX|lost\+found", f))
        real = os.path.realpath(parent)
        if real in seen:  # links to folders are followed, but not in circles
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(parent, name) for name in sorted(names) if name[0] != "."):
            if path.suffix.lower() not in kinds:
                others[path.suffix.lower() or path.name] += 1
            elif path.is_file():
                found.append(path)
    return found, [f"{n} {ending}" for ending, n in others.most_common(9)]


def list_plain(root, split, kinds):
    """Class folders, a folder of files, or a list file; see list_videos."""
    if root.is_file():
        for name in ("val", "test"):
            other = root.with_name(name + root.suffix)
            if other.is_file() and other != root:
                return read_list(root if split == "train" else other, kinds)
        return hold_out(read_list(root, kinds), split)
    inside = subfolders(root)
    while len(inside) == 1 and not any(path.suffix.lower() in kinds for path in root.iterdir()):
        root, inside = inside[0], subfolders(inside[0])  # a wrapper, as archives leave it
    train = split_folder(inside, "train(ing)?")
    val = split_folder(inside, "val(id(ation)?)?", "test(ing)?", "eval(uation)?")
    if train and not val:
        raise ValueError(f"{root} has {train.name}/ but no val/: is that a split, or a class?")
    if not train:
        return hold_out(list_folder(root, kinds), split)
    if split == "train":
        return list_folder(train, kinds)
    return list_folder(val, kinds, list_folder(train, kinds).classes)


def subfolders(folder):
    return sorted(d for d in folder.iterdir() if d.is_dir() and d.name[0] not in "._")


def split_folder(folders, *words):
    """The folder of a split: called by one of these words in any case, perhaps with a suffix."""
    for word, folder in itertools.product(words, folders):
        if re.fullmatch(rf"{word}(set|[^a-z].*)?", folder.name, re.I):
            return folder
    return None


def find_files(folder, kinds):
    """walk(), but a ValueError that says what is there instead if nothing is found."""
    found, others = walk(folder, kinds)
    if not found:
        raise ValueError(f"{folder} has no {' '.join(kinds[:4])} ..., but "
                         f"{', '.join(others) or 'nothing'}: mae_image.py takes images, "
                         "mae_video.py videos")
    return found, others


def list_folder(folder, kinds, classes=None):
    """Files of class folders; beside them, of no known class.   classes: those of another split"""
    found, others = find_files(folder, kinds)
    tops = [path.relative_to(folder).parts[0] for path in found]
    own = sorted({top for top, path in zip(tops, found) if path.parent != folder})
    if classes and (new := set(own) - set(classes)):
        raise ValueError(f"{folder} has classes that training lacks: {new}")
    classes = own if classes is None else classes
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of.get(top, -1) for top in tops]
    how = f"folder {folder.name}"
    if classes and -1 in labels:
        how += f", {labels.count(-1)} beside the class folders"
    if others:
        how += f", passed over: {', '.join(others)}"
    return Files(found, labels, classes, how)


def read_list(path, kinds):
    """Lines "path label", with a space, comma or semicolon, or "path". Labels are whole numbers.

    Quotes, a header line and labels like 3.0 are read, too.
    """
    wanted = []
    for (line,) in read_lines(path):
        found = re.fullmatch(r"(.*[^\s,;])[\s,;]+[\"']?(-?\d{1,6})(\.0*)?[\"']?", line)
        label = -1
        if found:
            line, label = found[1], int(found[2])
        wanted.append((line.strip("\"'"), label))
    if len(wanted) > 1 and wanted[0][1] < 0 and Path(wanted[0][0]).suffix.lower() not in kinds:
        del wanted[0]  # a header
    classes = [str(i) for i in range(max((label for _, label in wanted), default=-1) + 1)]
    return resolve(wanted, classes, path.parent, kinds, f"list {path.name}")


def hold_out(files, split):
    """Every 20th file of a class, at least one, is "val" where a data set brings no split."""
    val = np.zeros(len(files.paths), bool)
    for label in np.unique(files.labels):
        own = np.flatnonzero(files.labels == label)
        val[own[1:][::-20]] = True  # of a single file none
    files.how += "; no split found: every 20th file of a class is held out"
    return files.select(val == (split == "val")) if val.any() else files


def fingerprint(files):
    """Number of files, checksum of names and labels. Not of folders: the data may have moved."""
    names = [f"{os.path.basename(path)} {label}" for path, label in zip(files.paths, files.labels)]
    return [len(names), zlib.crc32("\n".join(names).encode("utf-8", "surrogateescape"))]


# ==== PART 2: decoding (about FFmpeg's habits, not about learning: a student may skip it) =========
# (needs: contextlib, errno, functools, itertools, os, re, warnings, av, np, Image, ImageOps,
# CONTAINERS, PICTURES)
class BrokenFile(ValueError):
    """This file cannot be read; the message says why."""


@contextlib.contextmanager
def broken():
    """Whatever a decoder raises on a damaged file becomes a BrokenFile."""
    try:
        yield
    except Exception as error:
        raise BrokenFile(reason(error)) from None


LARGEST = 2**29  # bytes of pixels that a clip may have: 16 frames of 4K


def reason(error):
    """Why a file cannot be read. What is not its fault is raised: no memory, descriptors, disk."""
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        bytearray(LARGEST)  # fails if memory is short; else the damaged file asked for too much
        return "it asks for more memory than there is"
    if isinstance(error, BrokenFile):
        return str(error)
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


@contextlib.contextmanager
def open_video(path):
    """-> container, video stream.   In the worker: an open container does not survive a fork."""
    if not os.path.isfile(path):  # of a pipe or device FFmpeg would wait for ever
        raise BrokenFile("no such file")
    # Only these formats: a file may claim to be a list of other files, and have them opened. Titles
    # need not be UTF-8 (HMDB51). In a relative name like 10:30.avi FFmpeg would see a protocol.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    with av.open(os.path.abspath(path), metadata_errors="ignore", options=options) as container:
        stream = container.streams.best("video")  # not a cover picture
        if stream is None or stream.codec_context is None:
            raise BrokenFile("no video stream in it that FFmpeg has a decoder for")
        # important: threads of kind FRAME or AUTO can hang when a loop is left early
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        yield container, stream


def frame_times(path):
    """-> how many frames there are, their times in the order of display or None, "" or a problem.

    Headers promise what they like: packets are counted, which costs a fiftieth of decoding them.
    What an editor cut (MP4) or AVI dropped is no frame. Times are in the stream's units; None: they
    do not tell which frame comes when, or the decoder cannot begin in the middle.
    """
    status = os.stat(path)
    return cached_times(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(10_000)
def cached_times(path, size, changed):
    with open_video(path) as (container, stream):
        context, times, end = stream.codec_context, [], 0
        reordered = context.has_b_frames
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                times.append(packet.pts if reordered else packet.dts)
                end = max(end, (packet.dts or 0) + (packet.duration or 0))
        known = None not in times and len(set(times)) == len(times)
        name = container.format.name
        if name in ("mpeg", "asf") or (name == "avi" and reordered):
            known = False  # these do not store the time of every frame: some are made up
        # H.264 4:4:4 by old versions of x264 says in the first packet alone how to decode it
        if context.name == "h264" and re.search("444|gbr", context.pix_fmt or ""):
            known = False
        seconds = (end - (stream.start_time or 0)) * float(stream.time_base)
        claimed, problem = (container.duration or 0) / av.time_base, ""
        if name == "avi":  # FFmpeg makes up a duration of what is there; the header counts frames
            claimed = float(stream.frames / (stream.average_rate or 25))
        if seconds < 0.9 * claimed - 0.5:
            problem = f"cut short: {claimed:.1f} s by its header, {seconds:.1f} s are there"
        return len(times), np.sort(times) if known else None, problem


def shown(container, stream):
    """The frames of a video in the order of display."""
    size = None
    for frame in container.decode(stream):
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise BrokenFile(f"its picture changes from {size} to {(frame.width, frame.height)}")
        yield frame


def to_rgb(frame, **size):
    """Frame -> uint8 (H, W, 3), turned as the file says: a phone only notes how it was held."""
    rgb = frame.to_ndarray(format="rgb24", threads=1, **size)  # more threads take longer
    return np.rot90(rgb, round(frame.rotation / 90))


def grab(path, clips, times):
    """Decode the frames of clips -> {number: (H, W, 3) uint8}, how many were met, damaged.

    Where `times` tells the time of every frame, a clip that begins after frame 24 is reached by a
    jump to the key frame before it, whose time tells its number. Otherwise, as in an AVI with
    B-frames, all are decoded and counted.
    """
    found, damaged, wanted, first = {}, 0, set(clips.flat), clips.min()
    with open_video(path) as (container, stream):
        context, frames, i = stream.codec_context, shown(container, stream), 0
        if len(wanted) * context.width * context.height * 3 > LARGEST:
            raise BrokenFile(f"frames of {context.width}x{context.height}: shrink it first")
        if times is not None and 24 < first < len(times):
            container.seek(int(times[first]), stream=stream)
            # frames before the key frame may miss what they refer to
            key = next((frame for frame in frames if frame.key_frame), None)
            when = key and (key.pts if context.has_b_frames else key.dts)
            if when not in times[: first + 1]:
                return grab(path, clips, None)
            i, frames = int(np.searchsorted(times, when)), itertools.chain([key], frames)
        for frame in frames:
            if i in wanted:
                found[i] = to_rgb(frame)
                damaged += frame.is_corrupt
            i += 1
            if i > clips.max():
                break
    return found, i, damaged


def read_clips(path, choose):
    """R clips of one video, decoded once.

    choose   n -> int (R, T), the frame numbers of R clips in a video of n frames
    returns  uint8 (R, T, H, W, 3), what is wrong with them ("" if nothing);   raises BrokenFile
    """
    with broken():
        count, times, problem = frame_times(path)
        clips = choose(max(count, 1))
        found, n, damaged = grab(path, clips, times)
        if 0 < n <= clips.max():  # fewer frames than packets: draw again
            clips = choose(n)
            found, n, damaged = grab(path, clips, times)
        if n == 0:
            raise BrokenFile("no frame can be decoded")
        frames = np.stack([found[f] for f in clips.flat])  # one copy: two cost as much as the crop
        if damaged:
            problem = f"damaged: {damaged} of {len(found)} frames, used as they are"
        return frames.reshape(*clips.shape, *frames.shape[1:]), problem


def every_frame(path, problems, **size):
    """All frames of a video, one by one, as to_rgb(). What is wrong is added to `problems`."""
    problem, met, damaged = frame_times(path)[2], 0, 0
    with open_video(path) as (container, stream):
        for frame in shown(container, stream):
            met, damaged = met + 1, damaged + frame.is_corrupt
            yield to_rgb(frame, **size)
        if not met:
            raise BrokenFile("no frame can be decoded")
        if damaged:
            problems.append(f"damaged: {damaged} of {met} frames decode with errors")
        if problem:
            problems.append(problem)
        elif stream.frames and abs(stream.frames - met) > 2:
            problems.append(f"note: {stream.frames} frames by its header, {met} are there")


@contextlib.contextmanager
def open_image(path):
    """-> PIL image.   Raises BrokenFile, also for more than 89 megapixels (Pillow's limit)"""
    with broken(), warnings.catch_warnings():
        if not os.path.isfile(path):
            raise BrokenFile("no such file")
        warnings.simplefilter("ignore")  # doubts about a damaged file: an error says it
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(str(path), formats=PICTURES) as image:
            yield image


def read_image(path):
    """-> uint8 (H, W, 3), whatever the file holds: grey, palette, RGBA, CMYK; turned as EXIF says.

    Values of more than 8 bits (CT, microscopy) rarely use their whole range: each file is stretched
    over its own.
    """
    with open_image(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            x = np.asarray(image, dtype=np.float64)
            if not np.isfinite(x).all():
                raise BrokenFile("pixels that are no numbers")
            x = (x - x.min()) / max(np.ptp(x), 1e-12) * 255
            image = Image.fromarray(x.round().astype(np.uint8))
        return np.array(image.convert("RGB"))


# ==== PART 3: one crop and one flip for all frames of a clip ======================================
# (needs: contextlib, torch, v2, TF)
def make_crop(pixels, size, box, flip=False, how=v2.InterpolationMode.BILINEAR):
    """Cut out a box, resize it, perhaps mirror it: all frames alike.

    pixels  array (T, H, W, C), mostly uint8 -> tensor (T, *size, C);   size (height, width)
    box     top, left, height, width
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (T, C, H, W), channels last in memory: fast
    x = TF.resized_crop(x, *box, list(size), how)
    if flip:
        x = TF.horizontal_flip(x)
    return x.permute(0, 2, 3, 1).contiguous()


def center_box(shape, size):
    """The largest box of the aspect of `size` in the middle.   -> top, left, height, width"""
    (H, W), (h, w) = shape, size
    h, w = min(H, max(1, W * h // w)), min(W, max(1, H * w // h))
    return (H - h) // 2, (W - w) // 2, h, w


@contextlib.contextmanager
def torchvision_draws_from(generator):
    """torchvision draws from the global generator: lend it a seed, and put it back as it was."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which reaches for the GPUs, too, and takes as long as a resize
        torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        yield


# ==== PART 4: from files to batches ===============================================================
# (needs: os, signal, time, np, torch, DataLoader, Dataset, v2, seeded, parts 2, 3; masking.py
# is_first, numbers, printable, rank_and_world, report)
def height_width(text):
    """--img-size, "64" or "64x112" -> (height, width)."""
    return numbers(text, 2) if "x" in text else numbers(text, 1) * 2


class FileDataset(Dataset):
    """dataset[epoch, i] -> uint8 (R, ...), number of the file that was used, [(path, problem)].

    A kind of data adds read(i, generator) -> pixels, problem or "". In place of a broken file
    another one is used; after ten broken ones in a row a ValueError.
    cfg: settings img_size, seed, min_crop (see draw_box), flip; train False: centre crop
    """

    repeat = 1  # R, samples of one file

    def __init__(self, files, cfg, train):
        self.files, self.cfg, self.train = files, cfg, train
        self.size = height_width(cfg.img_size)
        self.paths, self.labels, self.classes = files.paths, files.labels, files.classes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        (epoch, i), problems = key, []
        for attempt in range(10):
            path = self.paths[i]
            try:
                pixels, problem = self.read(i, seeded(self.cfg.seed, 0, epoch, i))
                if problem:
                    problems.append((path, problem))
                return pixels, i, problems
            except BrokenFile as error:
                problems.append((path, f"broken, another file is used: {error}"))
                other = seeded(self.cfg.seed, 3, epoch, i, attempt)
                i = int(torch.randint(len(self), (1,), generator=other))
        raise ValueError(f"10 files in a row cannot be read, e.g. {': '.join(problems[0])!r}: "
                         "python data.py check lists them")

    def choose(self, n):
        """Of a file of n frames those of a test sample (1, T): of an image all."""
        return np.arange(n)[None]

    def draw_crop(self, shape, generator):
        """-> box, whether to mirror: by chance in training, else the centre, not mirrored."""
        if not self.train:
            return center_box(shape, self.size), False
        box = self.draw_box(shape, generator)
        return box, self.cfg.flip and torch.rand(1, generator=generator) < 0.5

    def draw_box(self, shape, generator):
        """RandomResizedCrop's: min_crop .. 1 of the area, 3/4 .. 4/3 of the aspect of self.size."""
        aspect = self.size[1] / self.size[0]
        image, ratio = torch.empty(1, *shape, device="meta"), (0.75 * aspect, aspect / 0.75)
        with torchvision_draws_from(generator):
            return v2.RandomResizedCrop.get_params(image, (self.cfg.min_crop, 1.0), ratio)


class ImageDataset(FileDataset):
    """Items uint8 (1, H, W, 3)."""

    def read(self, i, generator):
        stored = self.files.pixels
        pixels = read_image(self.paths[i]) if stored is None else stored[i]
        box, flip = self.draw_crop(pixels.shape[:2], generator)
        return make_crop(pixels[None], self.size, box, flip, v2.InterpolationMode.BICUBIC), ""


def shuffled(seed, epoch, n, size):
    """One pass over n items in the order of (seed, epoch): updates of `size` numbers each.

    A rest that does not fill an update is left out; another epoch leaves out others.
    """
    order = torch.randperm(n, generator=seeded(seed, epoch))
    return order[: n // size * size].view(-1, size).tolist()


def batches(plan, start, stop, rank, world, accum):
    """The keys (epoch, item) that this process loads, batch by batch, from update start to stop.

    plan(epoch) -> list of updates, each a list of items (or of pieces, in omni.py). One update is
    cut into world * accum equal pieces, and every process loads its own. So two processes together
    see what one sees, and a run can begin anywhere.
    """
    per_epoch = len(plan(0))
    for step in range(start, stop):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            updates = plan(epoch)
        pieces = updates[i]
        if not isinstance(pieces[0], list):
            size = len(pieces) // (world * accum)
            pieces = [pieces[k : k + size] for k in range(0, len(pieces), size)]
        for piece in pieces[rank::world]:
            yield [(epoch, item) for item in piece]


def collate(items):
    """-> uint8 (sum of R, ...), file numbers, problems."""
    pixels, numbers, problems = zip(*items)
    batch = torch.cat(pixels)
    if torch.utils.data.get_worker_info():  # torch would do it later, and hang if /dev/shm is full
        batch.share_memory_()
    return batch, list(numbers), sum(problems, [])


def start_loader(dataset, workers, **options):
    """torch's DataLoader as an iterator whose workers are running, see take() and take_all()."""
    loader = DataLoader(dataset, num_workers=workers, worker_init_fn=begin_worker, **options)
    if os.name != "posix":
        return iter(loader)
    # Ctrl-C waits until all run: blocked here and in what is started, kept if another thread gets
    # it. And torch would raise anywhere if a worker is killed
    before, pressed = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGCHLD)}, []
    signal.signal(signal.SIGINT, lambda *args: pressed.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return iter(loader)
    except OSError as error:
        raise OSError(f"no workers can be started: {error}; try --workers 0") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def begin_worker(worker):
    """First thing in a worker: out of reach of the terminal's signals, which are for the parent."""
    if os.name == "posix":
        os.setpgid(0, 0)
        parent = torch.multiprocessing.parent_process().pid
        # it died in between; from here on torch watches for that. With "forkserver", which is
        # Python 3.14's default, a worker is the child of another process
        if torch.multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
            os._exit(1)


def take(loader):
    """next(loader).   Raises ValueError if a worker was killed, memory or /dev/shm is full"""
    try:
        return next(loader)
    except Exception as error:  # arrives as a whole traceback, and ends with the message
        message = (str(error).strip() or type(error).__name__).splitlines()[-1]
        hint = "; try --workers 0, or a larger /dev/shm (docker run --shm-size)"
        raise ValueError(f"the loader failed: {message}{hint * ('/torch_' in message)}") from None


def take_all(loader, what):
    """Yield everything that the loader has; a line now and then says how long it will take."""
    begin = shown_at = time.monotonic()
    for i in range(1, len(loader) + 1):
        yield take(loader)
        now = time.monotonic()
        if now - shown_at > 10:
            shown_at, left = now, (now - begin) / i * (len(loader) - i)
            report(f"{what}: {i} of {len(loader)}, {left:.0f} s left")


def in_parallel(work, jobs, what):
    """work(job) of each job in order; on all CPU cores, as torch's collate_fn."""
    loader = start_loader(jobs, os.cpu_count(), batch_size=None, collate_fn=work)
    return take_all(loader, what)


# ==== PART 5: checkpoints to the disk and back ====================================================
# (needs: argparse, contextlib, os, Path, np, torch, part 2)
def write_whole(path, save):
    """save(part), then rename: a crash or a full disk leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")  # two processes may write the same file
    try:
        save(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def lock(folder):
    """Two runs in one folder would overwrite each other.   -> open file: the lock ends with it"""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes to {folder}: use another --out") from None
    return file


def load_file(path):
    """Read a checkpoint, ours or a public one: tensors and plain values.   Raises ValueError"""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file. A run of SCRIPT.py writes runs/SCRIPT/checkpoint.pt: "
                         "python mae_video.py, for example, runs/mae_video/checkpoint.pt")
    if str(path).endswith(".safetensors"):
        import safetensors.torch  # not in requirements.txt: pip install safetensors

        return safetensors.torch.load_file(path)
    # weights_only refuses pickles that could run code. These are harmless and in public files
    kinds = [type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8", "?")]
    harmless = [argparse.Namespace, type(Path()), np.dtype, np._core.multiarray.scalar, *kinds]
    try:
        with torch.serialization.safe_globals(harmless):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds on a damaged file
        reason(error)
        why = "damaged, cut off, or no checkpoint at all"
        if "GLOBAL" in str(error):
            why = "it holds Python code besides numbers, which could do anything"
        raise ValueError(f"{path} is refused: {why}") from None


# ==== PART 6: the toy world (needs: functools, os, Path, av, np, Image, parts 4, 5) ===============
# A room, a large object that matters, and two small ones by the wall. They are flat sprites,
# painted from far to near, so depth and class maps are exact. Metres: x right, y up, z away.
#
# Images: the class is the kind of the large object.
# Videos: the object swings along some of the three axes, each with a phase of its own drawn
# uniformly, and the class is which. One frame alone looks alike in all classes, by construction:
# motion decides. A mirrored clip and a reversed one keep their class.
KINDS = ("Ball", "Box", "Cone", "Post")
MAPS = ("floor", "wall") + KINDS  # class numbers of the semantic maps
MOTIONS = {  # which of x, y, z the object swings along
    "Still": (0, 0, 0),
    "Sideways": (1, 0, 0),
    "UpDown": (0, 1, 0),
    "InOut": (0, 0, 1),
    "Slope": (1, 1, 0),
    "Wheel": (0, 1, 1),
}
CENTER, SWING = np.array([0, 1.3, 4.2]), np.array([1.0, 0.8, 1.4])  # of the large object
VIEW, EYE, BACK = 0.55, 1.3, 9.0  # tangent of half the view, height of the eye, the wall's z
FLOOR, WALL = np.array([0.45, 0.42, 0.40]), np.array([0.62, 0.66, 0.70])
COLORS = np.array([(0.9, 0.2, 0.2), (0.2, 0.7, 0.25), (0.2, 0.3, 0.9), (0.95, 0.8, 0.15),
                   (0.7, 0.25, 0.8), (0.95, 0.55, 0.1)])
SIDE, LENGTH = 48, 24  # pixels of a frame, frames of a clip


def outline(kind, u, v):
    """Which points of the square [-1, 1] x [-1, 1], v up, belong to the sprite."""
    if kind == "Ball":
        return u * u + v * v < 1
    if kind == "Box":
        return np.maximum(abs(u), abs(v)) < 0.85
    if kind == "Cone":
        return (abs(u) < (1 - v) / 2) & (abs(v) < 1)
    return (abs(u) < 0.4) & (abs(v) < 1)  # Post


def render(objects):
    """[(kind, color (3,), radius, place (T, 3)), ...], from far to near -> pixels (T, S, S, 3), and
    (T, S, S) each: depth in metres, class numbers, where the last object is, the nearest one."""
    S = 2 * SIDE  # painted at twice the size and averaged, or edges would flicker
    at = (np.arange(S) + 0.5) / S * 2 - 1
    right, up = np.meshgrid(at * VIEW, -at * VIEW)  # slope of the ray through every pixel
    room = np.minimum(EYE / np.maximum(-up, 1e-3), BACK)  # distance of floor and wall
    is_floor, far = room < BACK, room[..., None] / BACK
    floor, wall = FLOOR * (0.55 + 0.45 * far), WALL * (0.8 + 0.36 * up[..., None])
    paint, frames = np.where(is_floor[..., None], floor, wall), []
    for t in range(len(objects[0][3])):
        canvas, depth, classes = paint.copy(), room.copy(), 1 - is_floor
        for kind, color, radius, place in objects:
            x, y, z = place[t]
            u, v = (right * z - x) / radius, (up * z + EYE - y) / radius
            inside, light = outline(kind, u, v), 0.75 + 0.25 * np.clip(v - 0.6 * u, -1, 1)
            canvas[inside] = light[inside, None] * color
            depth[inside], classes[inside] = z, MAPS.index(kind)
        canvas = canvas.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3)) * 255
        maps = (m[::2, ::2] for m in (depth, classes, inside))  # inside: of the last one
        frames.append((canvas.astype(np.uint8), *maps))
    return [np.stack(part) for part in zip(*frames)]


def write_toy(job):
    """A clip with a map of its object, or an image with its maps. Its randomness is in `seed`."""
    folder, name, seed = job
    kind, rng = Path(name).parent.name, np.random.default_rng(seed)
    turns, motion = rng.uniform(size=(1, 3)), MOTIONS.get(kind)
    if motion:
        turns = turns + np.array(motion) * np.arange(LENGTH)[:, None] / LENGTH  # (T, 3)
        kind = rng.choice(KINDS)
    place = CENTER + SWING * np.sin(2 * np.pi * turns)
    objects = [(kind, rng.choice(COLORS), rng.uniform(1, 1.25), place)]
    for side in (-1, 1):  # two small ones by the wall
        spot = np.tile((side * rng.uniform(1, 3.2), 0.45, rng.uniform(6.5, 8)), (len(turns), 1))
        objects.insert(0, (rng.choice(KINDS), rng.choice(COLORS), 0.45, spot))
    pixels, depth, classes, large = render(objects)
    maps = {"object": large}  # frames of a clip below each other
    if motion:
        write_whole(folder / f"videos/{name}.mp4", functools.partial(write_video, pixels, 12))
    else:
        save = functools.partial(Image.fromarray(pixels[0]).save, quality=95)
        write_whole(folder / f"rgb/{name}.jpg", save)
        maps["depth"] = (depth / 16 * 65535).astype(np.uint16)
        maps["semseg"] = classes.astype(np.uint8)
    for part, x in maps.items():
        write_whole(folder / f"{part}/{name}.png", Image.fromarray(x.reshape(-1, SIDE)).save)


def make_toy(folder, groups=25, images=(1600, 400), labelled=7):
    """Write the toy world, or what is missing of it: two calls give the same files, byte for byte.

    folder/videos/<Motion>/v_<Motion>_gXX_cYY.mp4, classInd.txt, trainlist01.txt ...    as UCF101;
        no group of 4 clips is in both lists of a fold; `labelled` training groups have labels
    folder/{rgb,depth,semseg}/{train,val}/<Kind>/00000.{jpg,png,png}    aligned maps
    folder/object/    where the object is in each of these clips and images
    """
    folder = Path(folder)
    lists, begun = folder / "videos", folder / "object"
    if (lists / "classInd.txt").exists():
        return
    if folder.exists() and not begun.exists():
        raise ValueError(f"{folder} exists and is no toy world: name a new folder")
    begun.mkdir(parents=True, exist_ok=True)
    clips = [(f"{m}/v_{m}_g{g:02d}_c{c:02d}", label, g) for label, m in enumerate(MOTIONS, 1)
             for g in range(1, groups + 1) for c in range(1, 5)]
    jobs = [(folder, name, [1, i]) for i, (name, _, _) in enumerate(clips)]
    for split, count in zip(("train", "val"), images):
        for i in range(count):
            name = f"{split}/{KINDS[i % len(KINDS)]}/{i:05d}"
            jobs.append((folder, name, [2, split == "val", i]))
    for _ in in_parallel(write_toy, jobs, f"rendering the toy world into {folder}"):
        pass
    width = max(1, groups * 7 // 25)
    for fold in (1, 2, 3):  # groups 8 to 14, 15 to 21, 1 to 7, by which the defaults were chosen
        start = 1 + fold % 3 * width
        tested, train, test = range(start, start + width), "", ""
        known = [g for g in range(1, groups + 1) if g not in tested][:labelled]
        for name, label, g in clips:
            if g in tested:
                test += f"{name}.mp4\n"
            else:  # 0: unknown
                train += f"{name}.mp4 {label * (g in known)}\n"
        (lists / f"trainlist0{fold}.txt").write_text(train)
        (lists / f"testlist0{fold}.txt").write_text(test)
    (lists / "classInd.txt").write_text("".join(f"{i} {m}\n" for i, m in enumerate(MOTIONS, 1)))


def write_video(frames, rate, path):
    """uint8 frames (H, W, 3), all of one even-sided size -> a video: MPEG-4, a key frame every 12.

    Nearly lossless, without B-frames: on clips this small it decodes several times faster than
    H.264, and the same frames give the same bytes (libx264's vary with the load of the machine).
    """
    options = {"qmin": "2", "qmax": "4", "g": "12", "threads": "1"}
    with av.open(os.path.abspath(path), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("mpeg4", rate=rate, options=options)
                stream.height, stream.width = frame.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ==== THE RUN: the commands toy, check, shrink ====================================================
def finish(paths, results):
    """Print what is wrong with which file.   Exit code 1 if any has more than a note"""
    bad = 0
    for path, problems in zip(paths, results):
        for problem in problems:
            report(f"{path}: {problem}")
        bad += any(not problem.startswith("note") for problem in problems)
    report(f"{len(paths)} files decoded, {bad} broken or damaged")
    sys.exit(bad > 0)


def check_file(path):
    """Read one file in full, as training does.   -> problems"""
    problems = []
    try:
        if path.suffix.lower() in IMAGE:
            read_image(path)
        else:
            for _ in every_frame(path, problems, width=16, height=16):
                pass
    except Exception as error:
        return [f"broken: {reason(error)}"]
    return problems


def shrink_file(job):
    """Re-encode one video with a smaller short side; a broken one is left out.   -> problems"""
    source, target, short = job
    problems = []
    try:
        with open_video(source) as (_, stream):
            W, H = stream.codec_context.width, stream.codec_context.height
            rate = max(1, round(stream.average_rate or 25))  # MPEG-4 has no long fractions
        scale = min(1, short / min(W, H)) / 2
        W, H = (2 * max(1, round(side * scale)) for side in (W, H))
        frames = every_frame(source, problems, width=W, height=H, interpolation="AREA")
        if not target.exists():
            write_whole(target, functools.partial(write_video, frames, rate))
    except Exception as error:
        return [f"broken, left out: {reason(error)}"]
    return problems


def shrink(source, target, short):
    """Re-encode every video below source into target, with the same names, and copy the lists.

    A copy that is there is kept: a second call does what the first left undone.   Exit code 1 if a
    file is broken or damaged
    """
    source, target = Path(source), Path(target)
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in {source}: the copy needs a folder of its own")
    videos = find_files(source, VIDEO)[0]
    for path in walk(source, (".txt", ".csv"))[0]:
        write_whole(target / path.relative_to(source), functools.partial(shutil.copyfile, path))
    jobs = []
    for path in videos:
        copy = target / path.relative_to(source)
        jobs.append((path, copy if copy.suffix.lower() in VIDEO[:5] else copy.with_suffix(".mp4"),
                     short))
    report(f"the copies go to {target}")
    finish(videos, in_parallel(shrink_file, jobs, f"shrinking into {target}"))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("toy", "check", "shrink"))
    parser.add_argument("folder", help="new folder, data set, or folder of videos")
    parser.add_argument("target", nargs="?", help="folder for the smaller copies")
    parser.add_argument("--short-side", type=int, default=128, help="in pixels (default: 128)")
    args = parser.parse_args(argv)
    if args.command == "check":  # decode everything, list what is wrong
        paths, others = find_files(args.folder, VIDEO + IMAGE)
        report(f"passed over: {', '.join(others) or 'nothing'}")
        finish(paths, in_parallel(check_file, paths, f"checking {args.folder}"))
    elif args.command == "toy":
        make_toy(args.folder)
        report(f"the toy world is in {args.folder}")
    elif args.target:
        shrink(args.folder, args.target, args.short_side)
    else:
        parser.error("shrink needs a SOURCE and a TARGET")


if __name__ == "__main__":
    run_script(main)
