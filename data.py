"""data.py - from a file on disk to a batch of uint8 pixels.

Lists the files of a data set, decodes what is needed of them, crops, and hands out batches. It also checks
a data set, makes smaller copies of its videos, and writes a toy world, so that nothing need be downloaded.

    which files       UCF101, HMDB51, class folders, "path label" lists, CIFAR-10            list_videos
    decoding          PyAV: exact frames, only those that are kept are converted            read_clips
    one crop          random resized or centre; the same for all frames of a clip           make_crop
    a dataset item    uint8 (R, H, W, 3), or (R, T, H, W, 3) in mae_video.py                ImageDataset
    a batch           items in the order of (seed, epoch), decoded by worker processes      start_loader
    a toy world       sprites with exact depth and class maps                               make_toy

What item i of an epoch gets (crop, flip, clip position) is drawn from a generator seeded with (seed, epoch, i): a
dataset is indexed with the pair (epoch, i), and workers need no state. A file that cannot be read is named in the
log and another one is used instead (ten in a row end the run); it never becomes silent zeros.

Run   python data.py toy toy                          (30 s on 2 cores: 600 clips, 2,000 images)
      python data.py check UCF101                     (decode everything, list what is broken, draw a sheet)
      python data.py shrink UCF101 UCF101-128         (smaller copies decode faster: do it once)
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

from masking import is_first, picture_table, report, run_script

# Endings of files, and the only formats that are opened: a file is what its ending says, or refused.
VIDEO = tuple(
    ".avi .mp4 .m4v .mov .3gp .mkv .webm .mpg .mpeg .vob .mts .m2ts .wmv .asf .flv .ogv".split()
)
IMAGE = tuple(".jpg .jpeg .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm".split())
CONTAINERS = "avi,mov,mp4,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv,ogg"  # FFmpeg's names
PICTURES = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # Pillow's


def seeded(*numbers):
    """A generator that depends on these whole numbers alone, not on what was drawn before.

    The first is the seed, the second says what for: 0 items, 1 masks, 2 held-out masks, 3 what replaces
    a broken file, and so on. important: numpy fills up to four numbers with zeros, so (s, 1) and (s, 1, 0)
    are one stream. It does no harm here; in a new project put the use last.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


# ==================================================================================================
#  PART 1: which files, with which labels         (needs: numpy, torch, torchvision, VIDEO, IMAGE)
# ==================================================================================================


@dataclass
class Files:
    """One split of a data set. Arrays, because a list of objects would be copied into every worker."""

    paths: np.ndarray  # of str
    labels: np.ndarray  # of int, 0 .. len(classes) - 1, or -1 where none is known
    classes: list  # names
    how: str  # where the split comes from, in words
    pixels: np.ndarray = None  # (N, H, W, 3) uint8 where the images are in memory (CIFAR-10)

    def select(self, keep):
        """Some of the files.   keep: their numbers, or a bool for each file"""
        pixels = None if self.pixels is None else self.pixels[keep]
        return Files(self.paths[keep], self.labels[keep], self.classes, self.how, pixels)


def list_videos(root, split="train", fold=1, allow_missing=False):
    """The videos of one split ("train" or "val") of:

    root/UCF-101/ + root/ucfTrainTestlist/                 UCF101 as downloaded; fold 1, 2 or 3
    root/hmdb51_org/ + root/testTrainMulti_7030_splits/    HMDB51 as downloaded; fold 1, 2 or 3
    root/<Class>/*.avi + root/classInd.txt, trainlist01.txt ...     lists in UCF101's format
    root/train/<class>/*, root/val/<class>/*               also training, valid, test, TRAIN_256 ...
    root/<class>/* or root/*                               every 20th file of a class is held out
    a file of lines "path label"                           paths absolute or from the list's folder;
                                                           val: val.csv or test.csv beside it

    A lone folder in root is stepped into. Raises ValueError where nothing is found, and for listed files
    that are absent (unless allow_missing).
    """
    root = find_root(root, "videos")
    if official := find_official(root):
        return read_official(*official, split, fold, allow_missing)
    if fold != 1:
        raise ValueError(f"--fold {fold}: {root} has no official lists, and so one split only")
    return list_plain(root, split, VIDEO, allow_missing)


def list_images(root, split="train", allow_missing=False):
    """The images of one split, as in list_videos; "cifar10": through torchvision, which downloads it to data/cifar10."""
    if str(root) == "cifar10" and not Path(root).exists():
        found = datasets.CIFAR10("data/cifar10", train=split == "train", download=True)
        names = np.array([f"cifar10/{split}/{i}" for i in range(len(found.data))])
        return Files(names, np.array(found.targets), list(found.classes), "torchvision's CIFAR-10", found.data)
    return list_plain(find_root(root, "rgb"), split, IMAGE, allow_missing)


def find_root(root, part):
    """The folder or file, or its part "videos" / "rgb" where it has one, as the toy world does."""
    root = Path(root)
    if not root.exists():
        raise ValueError(f"{root} does not exist: a folder or a list file is needed")
    return root / part if (root / part).is_dir() else root


OFFICIAL = {  # folder of lists, folder of videos, and the archives they come in
    "UCF101": ("ucfTrainTestlist", "UCF-101", "UCF101TrainTestSplits-RecognitionTask.zip", "UCF101.rar"),
    "HMDB51": ("testTrainMulti_7030_splits", "hmdb51_org", "test_train_splits.rar", "hmdb51_org.rar"),
}


def find_official(root):
    """-> (name, folder of lists, folder of videos) of UCF101 or HMDB51, wherever they were unpacked."""
    if (root / "classInd.txt").is_file():
        return "UCF101", root, root
    for name, (lists, videos, lists_archive, videos_archive) in OFFICIAL.items():
        given = root.name == videos  # the folder of videos itself
        place = root.parent if given else root
        found = find_folder(place, lists), find_folder(place, videos)
        if found[0] and found[1]:
            return name, *found
        if any(found) and not given:
            lost, archive = (lists, lists_archive) if found[1] else (videos, videos_archive)
            how = "unzip" if archive.endswith("zip") else "bsdtar -xf"
            raise ValueError(f"{root} has a part of {name}, but no folder {lost}: {how} {archive} there")
    return None


def find_folder(root, name):
    """A folder of this name in root or one level below, and the innermost if it is nested; else None."""
    found = next((p for p in [root / name, *sorted(root.glob(f"*/{name}"))] if p.is_dir()), None)
    while found and (found / name).is_dir():
        found = found / name
    return found


def read_official(name, lists, videos, split, fold, allow_missing):
    """One fold of the official lists. The comments name their traps."""
    if fold not in (1, 2, 3):
        raise ValueError(f"--fold {fold}: {name} has the folds 1, 2 and 3")
    wanted = []  # (path in the list, label)
    if name == "UCF101":
        table = f"{'train' if split == 'train' else 'test'}list0{fold}.txt"
        numbered = [line.split(maxsplit=1) for line in read_lines(lists / "classInd.txt")]
        classes = [name for _, name in sorted((int(number), name) for number, name in numbered)]
        index = {c.lower(): i for i, c in enumerate(classes)}
        for line in read_lines(lists / table):
            # trainlist has a label column (1-based), testlist has none: the folder is the class in both
            path = re.sub(r"\s+\d+$", "", line)
            label = index.get(path.split("/")[0].lower())
            if label is None:
                raise ValueError(f"{lists / table}: the class of '{line}' is not in classInd.txt")
            wanted.append((path, -1 if line.endswith(" 0") else label))  # 0: its label is not told
    else:
        table = f"*_test_split{fold}.txt"
        code = "1" if split == "train" else "2"  # 1 train, 2 test, 0 in neither
        tables = sorted(lists.glob(table))  # climb_stairs before climb, as the files sort
        classes = [path.name.removesuffix(table[1:]) for path in tables]
        for label, path in enumerate(tables):
            for line in read_lines(path):
                video, _, use = line.rpartition(" ")
                if use == code:
                    wanted.append((f"{classes[label]}/{video}", label))
    paths, labels = resolve(wanted, videos, lists, VIDEO, allow_missing)
    return Files(paths, labels, classes, f"{name}'s {table}")


def read_lines(path):
    """Lines of a text file that are not empty."""
    return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]


def resolve(wanted, folder, source, kinds, allow_missing):
    """Listed (path, label) -> arrays of paths that exist and of their labels.

    Names are matched without regard to case (UCF101's lists and folders disagree about HandStandPushups), to the
    ending (a re-encoded copy may be .mp4), to the two ways to write an accent, and to folders further up.
    """

    def key(path):
        path = path.with_suffix("") if path.suffix.lower() in kinds else path
        return unicodedata.normalize("NFC", str(path)).casefold()

    def tail(path):
        return key(Path(path.parent.name, path.name))

    direct = [Path(folder, path) for path, _ in wanted]
    direct = [p if p.suffix.lower() in kinds and os.path.isfile(p) else None for p in direct]
    alike = {}
    if None in direct:
        for path in walk(folder, kinds)[0]:
            alike[key(path.relative_to(folder))] = path
            alike[tail(path)] = path if tail(path) not in alike else None  # None: several are called so
    paths, labels, missing = [], [], []
    for found, (listed, label) in zip(direct, wanted):
        inside = Path(os.path.relpath(Path(folder, listed), folder))
        found = found or alike.get(key(inside)) or alike.get(tail(inside))
        if found is None:
            missing.append(listed)
        else:
            paths.append(str(found))
            labels.append(label)
    if not paths or (missing and not allow_missing):
        hint = "--allow-missing uses the others" if paths else 'a line is "path label", as in "a/b.avi 3"'
        few = ", ".join(missing[:3])
        raise ValueError(
            f"{len(missing)} of {len(wanted)} files listed in {source} are not in {folder}, e.g. {few}; {hint}"
        )
    return np.array(paths), np.array(labels, dtype=np.int64)


def walk(folder, kinds):
    """All files below folder -> (those that end in `kinds`, sorted; how many others, by ending)."""
    found, others, seen = [], collections.Counter(), set()

    def fail(error):
        raise error  # a folder that may not be listed

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # links to folders are followed, but not in circles
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in ("lost+found", "__MACOSX"))
        for path in (Path(parent, name) for name in sorted(names) if name[0] != "."):
            if path.suffix.lower() not in kinds:
                others[path.suffix.lower() or path.name] += 1
            elif path.is_file():
                found.append(path)
    return found, others


def list_plain(root, split, kinds, allow_missing):
    """Class folders, a folder of files, or a list file; see list_videos."""
    if root.is_file():
        siblings = [root.with_name(name + root.suffix) for name in ("val", "test")]
        other = next((path for path in siblings if path.is_file() and path != root), None)
        files = read_list(other if other and split == "val" else root, kinds, allow_missing)
        return files if other else hold_out(files, split)
    root = step_in(root, kinds)
    train = split_folder(root, "train(ing)?")
    val = split_folder(root, "val(id(ation)?)?", "test(ing)?", "eval(uation)?")
    if train and val:
        files = list_folder(train, kinds)
        return files if split == "train" else list_folder(val, kinds, files.classes)
    if train and len(subfolders(root)) > 1:
        other = next(d.name for d in subfolders(root) if d != train)
        raise ValueError(f"{root} has {train.name}/ and {other}/ but no val/: is {train.name} a split, or a class?")
    return hold_out(list_folder(train or root, kinds), split)


def subfolders(folder):
    return sorted(d for d in folder.iterdir() if d.is_dir() and d.name[0] != "." and d.name != "__MACOSX")


def step_in(folder, kinds):
    """A lone folder in a folder is a wrapper, as archives leave it: what is meant lies inside."""
    while len(inside := subfolders(folder)) == 1 and not any(p.suffix.lower() in kinds for p in folder.iterdir()):
        folder = inside[0]
    return folder


def split_folder(root, *patterns):
    """The folder of a split, called by one of these words in any case, perhaps with a suffix; else None."""
    for pattern in patterns:
        for folder in subfolders(root):
            if re.fullmatch(rf"{pattern}(set|[^a-z].*)?", folder.name, re.I):
                return folder
    return None


def list_folder(folder, kinds, classes=None):
    """Files of class folders, or of the folder itself where it has none. `classes`: number them as another split."""
    found, others = walk(folder, kinds)
    if not found:
        most = [f"{count} {ending}" for ending, count in others.most_common(3)]
        what = f"but {', '.join(most)}" if most else "is it the right folder?"
        if set(others) & set(VIDEO + IMAGE):
            what += " (mae_image.py takes images, mae_video.py videos)"
        raise ValueError(f"{folder} holds no files that end in {', '.join(kinds[:4])} ...: {what}")
    parts = [path.relative_to(folder).parts for path in found]
    names = [p[0] if len(p) > 1 else "" for p in parts]  # of class folders
    own = sorted(set(names) - {""})
    if classes and set(own) - set(classes):
        raise ValueError(f"{folder} has a class that training lacks: {sorted(set(own) - set(classes))[0]}")
    classes = own if classes is None else classes
    if own and classes and "" in names:
        others["files beside the class folders"] = names.count("")
        found = [path for path, name in zip(found, names) if name]
        names = [name for name in names if name]
    labels = [classes.index(name) if name in classes else -1 for name in names]
    how = f"folder {folder.name}"
    if others:
        how += ", passed over: " + ", ".join(f"{n} {ending}" for ending, n in others.most_common(5))
    return Files(np.array([str(p) for p in found]), np.array(labels, dtype=np.int64), classes, how)


def read_list(path, kinds, allow_missing):
    """Lines "path label", with a space, comma or semicolon, or "path". Labels are whole numbers.

    Quotes, a header line and labels like 3.0 are read, too.
    """
    wanted = []
    for line in read_lines(path):
        found = re.fullmatch(r"(.+?)\s*[,;\s]\s*[\"']?(-?\d{1,6})(\.0*)?[\"']?", line)
        if found and not os.path.exists(path.parent / line):
            wanted.append((found[1].strip("\"'"), int(found[2])))
        else:
            wanted.append((line.strip("\"'"), -1))
    if len(wanted) > 1 and wanted[0][1] == -1 and wanted[1][1] >= 0:  # a header
        del wanted[0]
    if not wanted:
        raise ValueError(f"the list {path} is empty")
    count = max(label for _, label in wanted) + 1
    paths, labels = resolve(wanted, path.parent, path, kinds, allow_missing)
    return Files(paths, labels, [str(i) for i in range(count)], f"list {path.name}")


def hold_out(files, split):
    """Every 20th file of a class, at least one, is "val" where a data set brings no split of its own."""
    if len(files.paths) == 1:
        return files
    val = np.zeros(len(files.paths), bool)
    for label in set(files.labels.tolist()):
        own = np.flatnonzero(files.labels == label)
        held = own[19::20] if len(own) >= 20 else own[1:][-1:]  # of a single file none
        val[held] = True
    files.how += "; no split found: every 20th file of a class is held out"
    return files.select(val if split == "val" else ~val)


def describe(train, val):
    """One line that says what was found."""
    classes = f" of {len(train.classes)} classes" if train.classes else ""
    return f"training: {len(train.paths)} files{classes} ({train.how}); held out: {len(val.paths)} ({val.how})"


def fingerprint(files):
    """Number of files, and a checksum of names and labels. Not of folders: the data may have moved."""
    names = [f"{os.path.basename(path)} {label}" for path, label in zip(files.paths, files.labels)]
    return [len(names), zlib.crc32("\n".join(names).encode("utf-8", "surrogateescape"))]


# ==================================================================================================
#  PART 2: decoding. About FFmpeg's habits, not about learning: a student may go on with part 3.
#  (needs: numpy, av, pillow, VIDEO, CONTAINERS, PICTURES)
# ==================================================================================================


class BrokenFile(Exception):
    """This file cannot be read; the message says why."""


LARGEST = 2**29  # bytes of pixels that a clip may have: 16 frames of 4K


def reason(error):
    """Why a file cannot be read. A lack of memory or of descriptors is not the file's fault, and is raised."""
    if isinstance(error, MemoryError):
        raise error
    if getattr(error, "errno", None) in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        raise error
    return str(error) if isinstance(error, BrokenFile) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def open_video(path):
    """-> container, video stream.   Called in the worker: an open container does not survive a fork."""
    if not os.path.isfile(path):  # of a pipe or device FFmpeg would wait for ever
        raise BrokenFile("no such file")
    # Only these formats: a file may claim to be a list of other files, and have those opened. HMDB51 has titles that
    # are not UTF-8. Of a relative name like 10:30.avi FFmpeg would think that 10: is a protocol.
    only = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    with av.open(os.path.abspath(path), metadata_errors="ignore", options=only) as container:
        if not container.streams.video:
            raise BrokenFile("no video stream in it")
        stream = container.streams.best("video")  # not a cover picture
        if stream.codec_context is None:
            raise BrokenFile("FFmpeg has no decoder for its codec")
        # important: threads of kind FRAME or AUTO can hang when a loop is left early; one per worker is enough
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        yield container, stream


def frame_times(path):
    """-> how many frames are shown, their times in the order of display or None, seconds to the last one's end.

    Headers promise what they like, so packets are counted, which costs a fiftieth of decoding them; what an
    editor cut (MP4) or AVI dropped is no frame. Times are the stream's own units. None: they do not tell which frame
    comes when, or the decoder cannot begin in the middle.
    """
    status = os.stat(path)
    return cached_times(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(10_000)
def cached_times(path, size, changed):
    with open_video(path) as (container, stream):
        reordered, unit = stream.codec_context.has_b_frames, float(stream.time_base)
        times, end = [], 0
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                times.append(packet.pts if reordered else packet.dts)
                end = max(end, (packet.dts or 0) + (packet.duration or 0))
        guessed = reordered and container.format.name == "avi"  # AVI stores no times: FFmpeg makes them up
        # H.264 4:4:4 by old versions of x264 says so in the first packet alone, and is decoded accordingly
        headless = stream.codec_context.name == "h264" and "444" in (stream.codec_context.pix_fmt or "")
        known = times and None not in times and len(set(times)) == len(times)
        order = np.sort(np.array(times)) if known and not guessed and not headless else None
        return len(times), order, (end - (stream.start_time or 0)) * unit


def shown(container, stream):
    """The frames of a video in the order of display."""
    size = None
    for frame in container.decode(stream):
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise BrokenFile(f"its picture changes from {size} to {(frame.width, frame.height)}")
        yield frame


def to_rgb(convert, frame, **size):
    """Frame -> uint8 (H, W, 3), turned as the file says: a phone only notes how it was held.

    convert  a VideoReformatter; without threads of its own it takes a third of the time
    """
    rgb = convert.reformat(frame, format="rgb24", threads=1, **size).to_ndarray()
    return np.rot90(rgb, round(frame.rotation / 90))


def grab(path, wanted, jump=True):
    """Decode the frames `wanted` -> {number: (H, W, 3) uint8}, frames met, damaged ones among those wanted.

    Where the file tells the time of every frame, a clip that begins after frame 24 is reached by a jump to the
    key frame before it, whose time tells its number. Otherwise, as in an AVI with B-frames, all are decoded and
    counted.
    """
    found, first, last, kept = {}, wanted.min(), wanted.max(), set(wanted.tolist())
    count, times, _ = frame_times(path)
    convert, damaged = av.video.reformatter.VideoReformatter(), 0
    with open_video(path) as (container, stream):
        context = stream.codec_context
        if len(kept) * context.width * context.height * 3 > LARGEST:
            raise BrokenFile(f"{len(kept)} frames of {context.width}x{context.height} are too much: shrink it")
        i, frames = 0, shown(container, stream)
        if jump and times is not None and 24 < first < count:
            container.seek(int(times[first]), stream=stream)
            # B-frames before the key frame miss what they refer to
            key = next((frame for frame in frames if frame.key_frame), None)
            when = None if key is None else key.pts if context.has_b_frames else key.dts
            i = int(np.searchsorted(times, when)) if when is not None else count
            if i > first or times[i] != when:
                return grab(path, wanted, jump=False)
            frames = itertools.chain([key], frames)
        for frame in frames:
            if i in kept:
                found[i] = to_rgb(convert, frame)
                damaged += frame.is_corrupt
            i += 1
            if i > last:
                break
    return found, i, damaged


def read_clips(path, choose):
    """R clips of one video, decoded once.

    choose   n -> int (R, T), the frame numbers of R clips in a video of n frames
    returns  uint8 (R, T, H, W, 3), what is wrong with them ("" if nothing);   raises BrokenFile
    """
    try:
        clips = choose(max(frame_times(path)[0], 1))
        found, n, damaged = grab(path, np.unique(clips))
        if n == 0:
            raise BrokenFile("no frame can be decoded")
        if any(f not in found for f in clips.flat):  # fewer frames than packets: draw again
            clips = choose(n)
            found, n, damaged = grab(path, np.unique(clips))
        frames = np.stack([found[f] for f in clips.flat])  # one copy: a second costs as much as the crop
        problem = f"damaged: {damaged} of {len(found)} frames, used as they are" if damaged else ""
        return frames.reshape(*clips.shape, *frames.shape[1:]), problem
    except Exception as error:  # decoders raise many kinds on a damaged file
        raise BrokenFile(reason(error)) from None


def every_frame(path, problems):
    """All frames of a video, one by one. What is wrong with it is added to the list `problems`."""
    count, _, seconds = frame_times(path)
    met = damaged = 0
    with open_video(path) as (container, stream):
        for frame in shown(container, stream):
            met, damaged = met + 1, damaged + frame.is_corrupt
            yield frame
        claimed = (container.duration or 0) / av.time_base
        if not met:
            raise BrokenFile("no frame can be decoded")
        if damaged:
            problems.append(f"damaged: {damaged} of {met} frames decode with errors")
        if seconds < 0.9 * claimed - 0.5:
            problems.append(f"cut short: the header says {claimed:.1f} s, frames end after {seconds:.1f} s")
        elif stream.frames and abs(stream.frames - met) > 2:
            problems.append(f"note: the header says {stream.frames} frames, there are {met}")


def read_image(path):
    """-> uint8 (H, W, 3), whatever the file holds: grey, palette, RGBA, CMYK; turned as EXIF says.

    Values of more than 8 bits (CT, microscopy) rarely use their whole range: each file is stretched over its own.
    Raises BrokenFile, also for an image of more than 89 megapixels (Pillow's limit).
    """
    try:
        if not os.path.isfile(path):
            raise BrokenFile("no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubts about a damaged file: an error says it, or none matters
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(str(path), formats=PICTURES) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":
                    x = np.asarray(image, dtype=np.float64)
                    low, high = x.min(), x.max()
                    x = (x - low) / max(high - low, 1e-12) * 255
                    image = Image.fromarray(x.round().astype(np.uint8))
                return np.array(image.convert("RGB"))
    except Exception as error:
        raise BrokenFile(reason(error)) from None


# ==================================================================================================
#  PART 3: one crop and one flip for all frames of a clip                (needs: torch, torchvision)
# ==================================================================================================


def make_crop(pixels, size, box, flip=False, bicubic=False):
    """Cut out a box, resize it, perhaps mirror it: all frames alike.

    pixels  uint8 (T, H, W, 3) -> uint8 (T, size, size, 3), or (T, *size, 3) where size is (height, width)
    box     top, left, height, width
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (T, 3, H, W), channels last in memory: the fast path
    how = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    x = TF.resized_crop(x, *box, list(size), interpolation=how, antialias=True)
    if flip:
        x = TF.horizontal_flip(x)
    return x.permute(0, 2, 3, 1).contiguous()


def center_box(shape, size):
    """The largest box of the shape of `size` in the middle.   shape, size (H, W) -> top, left, height, width"""
    (H, W), (h, w) = shape, size
    if H * w <= W * h:
        h, w = H, max(1, H * w // h)
    else:
        h, w = max(1, W * h // w), W
    return (H - h) // 2, (W - w) // 2, h, w


def random_box(shape, size, min_crop, generator):
    """RandomResizedCrop's box: min_crop .. 1 of the area, 3/4 .. 4/3 of the aspect of `size` (height, width)."""
    aspect = size[1] / size[0]
    crop = v2.RandomResizedCrop(size, scale=(min_crop, 1.0), ratio=(0.75 * aspect, aspect / 0.75))
    with torchvision_draws_from(generator):
        box = crop.make_params([torch.empty(1, *shape, device="meta")])
    return box["top"], box["left"], box["height"], box["width"]


@contextlib.contextmanager
def torchvision_draws_from(generator):
    """torchvision draws from the global generator: lend it a seed of ours, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it reaches for the GPUs too, and takes as long as the resize of a small clip
        torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        yield


# ==================================================================================================
#  PART 4: from files to batches                                        (needs: torch, seeded, parts 2, 3)
# ==================================================================================================


class FileDataset(Dataset):
    """dataset[epoch, i] -> uint8 (R, ...), number of the file used, [(path, what is wrong with it)].

    A kind of data adds read(i, generator) -> (pixels, problem or ""). Item i in place of a broken file is another
    file; after ten broken ones in a row a ValueError.
    """

    repeat = 1  # R, samples of one file

    def __init__(self, files, seed):
        self.files, self.paths, self.labels, self.classes = files, files.paths, files.labels, files.classes
        self.seed = seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        (epoch, i), problems = key, []
        for attempt in range(10):
            try:
                pixels, problem = self.read(i, seeded(self.seed, 0, epoch, i))
                problems += [(str(self.paths[i]), problem)] if problem else []
                return pixels, i, problems
            except BrokenFile as error:
                problems.append((str(self.paths[i]), f"broken, another file is used: {error}"))
                other = seeded(self.seed, 3, epoch, i, attempt)
                i = int(torch.randint(len(self), (1,), generator=other))
        names = ", ".join(f"{path} ({text})" for path, text in problems[:3])
        raise ValueError(f"10 files in a row cannot be read: {names} ...: python data.py check lists them")


class ImageDataset(FileDataset):
    """Items uint8 (1, H, W, 3).   size (H, W); min_crop, flip: see random_box; train False: centre crop."""

    def __init__(self, files, size, seed, min_crop=0.2, flip=True, train=True):
        super().__init__(files, seed)
        self.size, self.min_crop, self.flip, self.train = size, min_crop, flip, train

    def read(self, i, generator):
        pixels = self.files.pixels[i] if self.files.pixels is not None else read_image(self.paths[i])
        shape, flip = pixels.shape[:2], False
        if self.train:
            box = random_box(shape, self.size, self.min_crop, generator)
            flip = self.flip and torch.rand(1, generator=generator) < 0.5
        else:
            box = center_box(shape, self.size)
        return make_crop(pixels[None], self.size, box, flip, bicubic=True), ""


def shuffled(seed, epoch, n, size):
    """One pass over n items in the order of (seed, epoch): a list of updates, each a list of `size` numbers.

    The rest that does not fill an update is left out; another epoch's order leaves out others."""
    order = torch.randperm(n, generator=seeded(seed, epoch)).tolist()
    return [order[i : i + size] for i in range(0, n - size + 1, size)]


def batches(plan, start, stop, rank, world, accum):
    """The keys (epoch, item) that this process loads, batch by batch, from update `start` to update `stop`.

    plan(epoch) -> list of updates, each a list of items. One update is cut into world * accum equal pieces, and
    every process loads its own. So two processes together see what one sees, and a run can begin anywhere.
    """
    per_epoch = len(plan(0))
    for step in range(start, stop):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            updates = plan(epoch)
        update, size = updates[i], len(updates[i]) // (world * accum)
        for piece in range(rank, world * accum, world):
            # omni.py may cut an update into pieces itself
            items = update[piece] if isinstance(update[0], list) else update[piece * size : (piece + 1) * size]
            yield [(epoch, item) for item in items]


def collate(items):
    """-> uint8 (sum of R, ...), file numbers, problems."""
    pixels, numbers, problems = zip(*items)
    return share(torch.cat(pixels)), list(numbers), sum(problems, [])


def share(pixels):
    """Into shared memory, in a worker: torch does it later, too, but there a full /dev/shm hangs instead of raising."""
    return pixels.share_memory_() if torch.utils.data.get_worker_info() and pixels is not None else pixels


def take(loader):
    """next(loader).   Raises ValueError where it cannot deliver: a worker was killed, memory or /dev/shm is full"""
    try:
        return next(loader)
    except Exception as error:
        raise ValueError(f"the loader failed: {last_line(error)}") from None


def last_line(error):
    """What went wrong in a worker: its error arrives as a whole traceback, and ends with the message."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def start_loader(dataset, workers, **options):
    """torch's DataLoader as an iterator whose workers are running. A killed worker raises in next(), not anywhere."""
    begin = functools.partial(begin_worker, os.getpid())
    loader = DataLoader(dataset, num_workers=workers, worker_init_fn=begin, **options)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C waits until all have begun
    on_child = signal.getsignal(signal.SIGCHLD)  # torch would raise at any line when a worker is killed
    try:
        return iter(loader)
    except OSError as error:
        hint = "--workers 0 needs neither /dev/shm nor processes"
        raise OSError(f"the loader's workers cannot be started: {error}; {hint}") from None
    finally:
        signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(parent, worker):
    """First thing in a worker: out of reach of the terminal's signals, which are for the parent alone."""
    os.setpgid(0, 0)
    if os.getppid() != parent:  # killed in between; later on torch looks after that
        os._exit(1)


# ==================================================================================================
#  PART 5: checkpoints to the disk and back                                           (needs: torch)
# ==================================================================================================


def write_whole(path, fill):
    """fill(file) under a temporary name, then rename: a crash or a full disk leaves the previous file as it was.

    Raises OSError when it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError, and hides its reason
        if temporary.is_file():
            temporary.unlink()
        cause = error if getattr(error, "strerror", None) else error.__context__
        text = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {path}: {text}") from None


def load_file(path):
    """Read a checkpoint, ours or a public one: tensors and plain values.   Raises ValueError if it is none"""
    if not os.path.isfile(path):
        hint = f"; did you mean {path}/checkpoint.pt?" if os.path.isdir(path) else ""
        script = Path(path).absolute().parent.name + ".py"
        hint = f": python {script} makes it" if Path(__file__).with_name(script).exists() else hint
        raise ValueError(f"there is no checkpoint {path}{hint}")
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file as load  # pip install safetensors

        return load(path)
    # weights_only refuses pickles that would run code. These are harmless, and common in public files
    numpy = [np._core.multiarray.scalar, np.dtype, *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?"))]
    harmless = [argparse.Namespace, *numpy, type(Path()), Path]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        reason(error)
        code = "it holds Python code besides numbers, which could do anything"
        why = code if "GLOBAL" in str(error) else "it is damaged or cut off, or no checkpoint at all"
        raise ValueError(f"checkpoint {path} is refused: {why}") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} holds a {type(content).__name__}, not a dict of weights")
    return content


# ==================================================================================================
#  PART 6: the toy world                                   (needs: numpy, av, pillow; part 2 BrokenFile)
#
#  A room, a large object that matters, and small ones far away. Objects are flat sprites, painted from far to near,
#  so depth and class maps are exact. Units are metres; x to the right, y up, z away from the camera.
#
#  Images: the class is the kind of the large object.
#  Videos: the object swings along some of the three axes, each with a phase of its own drawn uniformly, and the
#  class is which. One frame alone looks alike in all classes, by construction: motion decides. A mirrored clip and a
#  reversed one keep their class.
# ==================================================================================================

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
VIEW, EYE, BACK = 0.55, 1.3, 9.0  # tangent of half the angle of view, height of the eye, distance of the wall
FLOOR, WALL = np.array([0.45, 0.42, 0.40]), np.array([0.62, 0.66, 0.70])
COLORS = np.array([[0.9, 0.2, 0.2], [0.2, 0.7, 0.25], [0.2, 0.3, 0.9], [0.95, 0.8, 0.15], [0.7, 0.25, 0.8],
                   [0.95, 0.55, 0.1]])  # fmt: skip
SIDE, LENGTH = 48, 24  # pixels of a frame, frames of a clip


def outline(kind, u, v):
    """Which points of the square [-1, 1] x [-1, 1], v up, belong to the sprite."""
    if kind == "Ball":
        return u * u + v * v < 1
    if kind == "Box":
        return np.maximum(abs(u), abs(v)) < 0.85
    if kind == "Cone":
        return (abs(u) < (1 - v) / 2) & (abs(v) < 1)
    return (abs(u) < 0.4) & (abs(v) < 1)


def render(objects, size):
    """-> pixels (T, S, S, 3) uint8, depth (T, S, S) in metres, classes (T, S, S), where the first object is.

    objects  [{kind, color (3,), radius, place (T, 3)}, ...]
    """
    S = 2 * size  # painted at twice the size and averaged, or edges would flicker
    at = (np.arange(S) + 0.5) / S * 2 - 1
    right, up = np.meshgrid(at * VIEW, -at * VIEW)  # slope of the ray through every pixel
    room = np.minimum(np.where(up < 0, EYE / np.maximum(-up, 1e-3), np.inf), BACK)  # depth of floor and wall
    floor = FLOOR * (0.55 + 0.45 * room / BACK)[..., None]
    wall = WALL * (0.8 + 0.36 * up)[..., None]
    frames = []
    for t in range(len(objects[0]["place"])):
        depth, classes, owner = room.copy(), np.where(room < BACK, 0, 1), np.full((S, S), -1)
        color = np.where((room < BACK)[..., None], floor, wall)
        for o in sorted(objects, key=lambda o: -o["place"][t, 2]):  # from far to near
            x, y, z = o["place"][t]
            u, v = (right * z - x) / o["radius"], (up * z + EYE - y) / o["radius"]
            inside = outline(o["kind"], u, v)
            light = 0.75 + 0.25 * np.clip(v - 0.6 * u, -1, 1)  # from above left
            color[inside] = light[inside, None] * o["color"]
            depth[inside], classes[inside] = z, MAPS.index(o["kind"])
            owner[inside] = o is objects[0]
        color = color.reshape(size, 2, size, 2, 3).mean((1, 3)) * 255
        maps = (m[::2, ::2] for m in (depth, classes, owner == 1))
        frames.append((color.clip(0, 255).astype(np.uint8), *maps))
    return [np.stack(part) for part in zip(*frames)]


def draw_scene(rng, kind, place):
    """The object that matters at place (T, 3), and two small ones that stand still by the wall."""
    objects = [dict(kind=kind, color=rng.choice(COLORS), radius=rng.uniform(1.0, 1.25), place=place)]
    for side in (-1, 1):
        spot = (side * rng.uniform(1, 3.2), 0.45, rng.uniform(6.5, 8))
        spot = np.tile(spot, (len(place), 1))
        objects.append(dict(kind=rng.choice(KINDS), color=rng.choice(COLORS), radius=0.45, place=spot))
    return objects


def draw_clip(rng, motion):
    """Any frame alone looks alike in all motions: where the object is along each axis is a sine of a uniform phase."""
    turns = rng.uniform(size=3) + np.array(MOTIONS[motion]) * np.arange(LENGTH)[:, None] / LENGTH  # (T, 3)
    place = np.array([0, 1.3, 4.2]) + np.array([1.0, 0.8, 1.4]) * np.sin(2 * np.pi * turns)
    return draw_scene(rng, rng.choice(KINDS), place)


def draw_image(rng, kind):
    place = np.array([0, 1.3, 4.2]) + np.array([1.0, 0.8, 1.4]) * rng.uniform(-1, 1, (1, 3))
    return draw_scene(rng, kind, place)


def write_toy_clip(folder, motion, group, number):
    """One clip, and where its object is, frames below each other. All its randomness comes from its name."""
    rng = np.random.default_rng([1, list(MOTIONS).index(motion), group, number])
    pixels, _, _, where = render(draw_clip(rng, motion), SIDE)
    name = f"{motion}/v_{motion}_g{group:02d}_c{number:02d}"
    save_once(folder / f"object/{name}.png", Image.fromarray(where.reshape(-1, SIDE)).save)
    save_once(folder / f"videos/{name}.mp4", functools.partial(write_video, pixels, Fraction(12)))


def write_toy_image(folder, split, kind, number):
    """One image with its depth map (16 bits), its class map, and where its object is."""
    rng = np.random.default_rng([2, split == "val", number])
    pixels, depth, classes, where = (x[0] for x in render(draw_image(rng, kind), SIDE))
    depth = (depth / 16 * 65535).astype(np.uint16)  # 16 m are the most that a map can hold
    maps = {"depth": depth, "semseg": classes.astype(np.uint8), "object": where}
    name = f"{split}/{kind}/{number:05d}"
    for part, array in maps.items():
        save_once(folder / f"{part}/{name}.png", Image.fromarray(array).save)
    save_once(folder / f"rgb/{name}.jpg", functools.partial(Image.fromarray(pixels).save, quality=95))


def save_once(path, save):
    """save(path) if it is not there, under another name first: what has its name is complete."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{os.getpid()}-{path.name}")
        save(part)
        os.replace(part, path)


def make_toy(folder, groups=25, clips=4, images=(1600, 400), labelled=5):
    """Write the toy world, or what is missing of it: two calls give the same files, byte for byte.

    folder/videos/<Motion>/v_<Motion>_gXX_cYY.mp4, classInd.txt, trainlist01.txt ...     UCF101's format; no
        group is in both lists of a fold, and only the first `labelled` training groups of a fold have labels
    folder/{rgb,depth,semseg}/{train,val}/<Kind>/00000.{jpg,png,png}                     aligned maps
    folder/object/                                        where the object is in each of these clips and images
    """
    folder = Path(folder)
    lists, note = folder / "videos", folder / "TOY.txt"
    if (lists / "classInd.txt").exists():
        return
    if folder.exists() and not note.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no toy world: name a new folder")
    lists.mkdir(parents=True, exist_ok=True)
    note.write_text("Rendered by: python data.py toy\n")
    numbers = range(1, clips + 1)
    jobs = [(write_toy_clip, folder, m, g + 1, c) for m in MOTIONS for g in range(groups) for c in numbers]
    for split, count in zip(("train", "val"), images):
        jobs += [(write_toy_image, folder, split, KINDS[i % len(KINDS)], i) for i in range(count)]
    for _ in in_parallel(call, jobs, f"rendering the toy world into {folder}"):
        pass
    width = max(1, groups * 7 // 25)  # UCF101's fold 1 tests on the groups 1 to 7 of 25
    for fold in (1, 2, 3):
        test = range(1 + (fold - 1) * width, 1 + fold * width)
        train = [g for g in range(1, groups + 1) if g not in test]
        for name, some in (("train", train), ("test", test)):
            lines = []
            for label, motion in enumerate(MOTIONS, 1):
                for g in some:
                    number = f" {label if g in train[:labelled] else 0}" if name == "train" else ""
                    lines += [f"{motion}/v_{motion}_g{g:02d}_c{c:02d}.mp4{number}\n" for c in numbers]
            (lists / f"{name}list0{fold}.txt").write_text("".join(lines))
    (lists / "classInd.txt").write_text("".join(f"{i} {m}\n" for i, m in enumerate(MOTIONS, 1)))


def call(job):
    return job[0](*job[1:])


def write_video(frames, rate, path):
    """uint8 frames (H, W, 3), all of one even-sided size, -> a video file: MPEG-4, a key frame every 12 frames.

    Nearly lossless, without B-frames: on clips this small it decodes several times faster than H.264, and the same
    frames give the same bytes (libx264's lookahead varies with the load of the machine)."""
    with av.open(os.path.abspath(path), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("mpeg4", rate=rate)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
                stream.codec_context.qmin, stream.codec_context.qmax = 2, 4
                stream.codec_context.gop_size = 12
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ==================================================================================================
#  THE RUN: data that are made or downloaded; the commands toy, check, shrink
# ==================================================================================================


def in_parallel(work, jobs, what):
    """Yield work(job) of each job in order, from all CPU cores, with progress and time left on stderr."""
    results = start_loader(jobs, os.cpu_count(), batch_size=None, collate_fn=work)
    begin, shown, live = time.monotonic(), 0.0, sys.stderr.isatty()
    for i in range(1, len(jobs) + 1):
        yield take(results)
        spent = time.monotonic() - begin
        if i == len(jobs) or (spent > 2 and spent - shown > (0.5 if live else 20)):
            shown, end = spent, "\r" if live and i < len(jobs) else "\n"
            left = spent / i * (len(jobs) - i)
            print(f"{what}: {i} of {len(jobs)}, {left:.0f} s left  ", end=end, file=sys.stderr, flush=True)


def check_file(path):
    """Read one file in full, as training does: -> what is wrong with it, small picture of its middle or None."""
    problems, middle = [], None
    try:
        if path.suffix.lower() in IMAGE:
            middle = read_image(path)
        else:
            half, convert = frame_times(path)[0] // 2, av.video.reformatter.VideoReformatter()
            for i, frame in enumerate(every_frame(path, problems)):
                if i in (0, half):
                    middle = to_rgb(convert, frame)
    except Exception as error:
        return [f"broken: {reason(error)}"], None
    thumbnail = ImageOps.pad(Image.fromarray(middle), (96, 96))
    return problems, np.asarray(thumbnail)


def check(root, sheet):
    """Decode everything below root, list what is wrong, draw a contact sheet.

    Exit code 1 if anything is broken or damaged, or a file of the official lists is absent."""
    root = Path(root)
    paths, others = walk(root, VIDEO + IMAGE)
    if not paths:
        raise ValueError(f"{root} holds no videos and no images")
    official = find_official(root)  # now: half a download should be named before hours of decoding
    bad, absent, pictures = 0, 0, []
    shown = set(np.linspace(0, len(paths) - 1, 48).round().astype(int).tolist())
    for i, (problems, picture) in enumerate(in_parallel(check_file, paths, f"checking {root}")):
        for problem in problems:
            report(f"{problem.partition(': ')[0]}: {paths[i]}: {problem.partition(': ')[2]}")
        bad += any(not problem.startswith("note") for problem in problems)
        if picture is not None and i in shown:
            pictures.append(picture)
    for fold in (1, 2, 3) if official else ():
        for split in ("train", "val"):
            try:
                count = len(read_official(*official, split, fold, allow_missing=False).paths)
                report(f"fold {fold} {split}: {count} files listed, all there")
            except ValueError as error:
                absent += 1
                report(f"fold {fold} {split}: {str(error).partition('; --allow-missing')[0]}")
    if pictures:
        pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % 8)
        cells = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        picture_table(cells.unflatten(0, (-1, 8))).save(sheet)
        report(f"wrote {sheet}")
    if others:
        report("passed over: " + ", ".join(f"{n} {ending}" for ending, n in others.most_common()))
    report(f"{len(paths)} files decoded, {bad} broken or damaged")
    sys.exit(1 if bad or absent else 0)


def shrink_file(job):
    """Re-encode one video with a smaller short side.   -> what is wrong with it; a broken one is left out"""
    source, target, short = job
    problems = []
    try:
        with open_video(source) as (_, stream):
            W, H = stream.codec_context.width, stream.codec_context.height
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25).limit_denominator(1001)
        rate = rate if rate.numerator < 2**16 else Fraction(round(rate))  # MPEG-4 holds no more
        scale = min(1, short / min(W, H))
        W, H = (max(2, round(side * scale / 2) * 2) for side in (W, H))
        convert = av.video.reformatter.VideoReformatter()
        small = (to_rgb(convert, frame, width=W, height=H, interpolation="AREA")
                 for frame in every_frame(source, problems))  # fmt: skip
        save_once(target, functools.partial(write_video, small, rate))
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise ValueError(f"cannot write {target}: {error.strerror}; call again when there is room") from None
        return [f"broken, left out: {reason(error)}"]
    return problems


def shrink(source, target, short):
    """Re-encode every video below source into target, with the same names, and copy the lists.

    A copy that is there is kept: a second call does what the first left undone.   Exit code 1 if a file is broken
    """
    source, target = Path(source), Path(target)
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in {source}: the copy needs a folder of its own")
    videos = walk(source, VIDEO)[0]
    if not videos:
        raise ValueError(f"{source} holds no videos")
    for path in walk(source, (".txt", ".csv"))[0]:
        save_once(target / path.relative_to(source), functools.partial(shutil.copyfile, path))
    keep = (".avi", ".mp4", ".mkv", ".mov", ".m4v")  # containers that take MPEG-4; others become .mp4
    copies = [target / path.relative_to(source) for path in videos]
    copies = [copy if copy.suffix.lower() in keep else copy.with_suffix(".mp4") for copy in copies]
    jobs, bad = list(zip(videos, copies, [short] * len(videos))), 0
    for path, problems in zip(videos, in_parallel(shrink_file, jobs, f"shrinking into {target}")):
        for problem in problems:
            report(f"{problem.partition(': ')[0]}: {path}: {problem.partition(': ')[2]}")
        bad += any(not problem.startswith("note") for problem in problems)
    before, after = (sum(p.stat().st_size for p in paths if p.exists()) / 1e6 for paths in (videos, copies))
    report(f"{len(videos)} videos, {bad} broken or damaged: {before:.1f} MB, in {target} {after:.1f} MB")
    sys.exit(1 if bad else 0)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], usage="data.py {toy,check,shrink} FOLDER ...    (--help explains them)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy world: rendered videos, images, depth and class maps")
    toy.add_argument("folder", help="new folder")
    look = commands.add_parser("check", help="decode everything, list what is broken, draw a contact sheet")
    look.add_argument("folder", help="data set, or any folder")
    look.add_argument("--sheet", default="contact_sheet.png", help="file for the contact sheet")
    less = commands.add_parser("shrink", help="re-encode videos once, so that decoding does not starve the GPU")
    less.add_argument("source", help="folder of videos")
    less.add_argument("target", help="folder for the smaller copies")
    less.add_argument("--short-side", type=int, default=128, help="new short side in pixels (default: 128)")
    args = parser.parse_args(argv)
    if args.command == "check":
        check(args.folder, args.sheet)
    elif args.command == "shrink":
        shrink(args.source, args.target, args.short_side)
    else:
        make_toy(args.folder)
        report(f"the toy world is in {args.folder}")


if __name__ == "__main__":
    run_script(main)
