"""claims.py - do the papers' claims hold in a small run?

    python tests/claims.py                       (all that have data here: days on 2 cores)
    python tests/claims.py --only V1 --sets toy  (one claim on one data set)
    python tests/claims.py --quick               (tiny runs: only shows that it works)
    python tests/claims.py --list                (the commands that would run)

A claim compares arms: each is a pretraining (or none) and a fine-tuning, run through the scripts'
command lines for every split of the data and every seed. Pretraining sees the training files of the
split, without labels, and is repeated for every seed. What is reported is the last epoch on the
test files. Runs that are done are kept in --work and not repeated; cut off ones are resumed.
Real data: set MAE_TEST_DATA to a folder with lips20/, gestures10/, sprites5/ and others.

The verdict is by rule: "holds" if the difference is, on average, larger than its spread over splits
and seeds and has the paper's sign; "does not hold here" if the sign is the other; else "cannot be
seen at this size" or, where the paper says "as good as", "no difference can be seen at this size".
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from mae_video import segment_views  # noqa: E402
from masking import run_script  # noqa: E402

VIDEO = ("--sampling segments --img-size 48 --size 96x4x3 --decoder 64x1x2 --tubelet 2 --norm-pix "
         "--mask-ratio 0.85 --lr 2e-2 --min-crop 0.5")
# of finetune.py; sizes come from the pretraining, for runs from scratch, too
TUNE = ("--batch 32 --lr 1.6e-2 --layer-decay 0.75 --drop-path 0.1 --smoothing 0.1 --min-crop 0.5 "
        "--epochs 15 --warmup 2")
MILD = "--batch 16 --lr 5e-2 --layer-decay 0.9 --drop-path 0 --min-crop 0.8"


@dataclass
class Set:
    """A data set, and the flags of its pretraining and fine-tuning."""

    data: str
    pretrain: str = ""
    finetune: str = ""
    script: str = "mae_video.py"  # of the pretraining
    folds: int = 3  # splits of the data
    short: int = 0  # side to which its videos are shrunk first, 0: as they are
    images: str = ""  # a second data set, of images, for omni.py
    scratch: str = ""  # from scratch, which learns best at a rate of its own (see claims.md)
    long: str = ""  # the same for as many updates as pretraining and fine-tuning together


SETS = {
    "toy": Set("toy", folds=1, scratch="--lr 2e-2", long="--epochs 505 --lr 2e-2"),
    "lips20": Set("lips20", f"{VIDEO} --batch 32 --epochs 80 --warmup 5", f"{TUNE} --clips 2",
                  short=64, scratch="--lr 4e-3 --min-crop 0.8 --smoothing 0 --drop-path 0",
                  long="--epochs 95 --min-crop 0.5 --smoothing 0.1 --drop-path 0.1"),
    "gestures10": Set("gestures10",
                      f"{VIDEO} --no-flip --frames 16 --batch 32 --epochs 300 --warmup 15",
                      f"{MILD} --frames 16 --no-flip --epochs 60 --warmup 3 --clips 2", short=64,
                      long="--epochs 210"),
    "sprites5": Set("sprites5", f"{VIDEO} --batch 32 --epochs 80 --warmup 5",
                    f"{TUNE} --epochs 10 --warmup 1.5 --clips 2", short=64, scratch="--lr 4e-3",
                    long="--epochs 90"),
    "weizmann4": Set("weizmann4", f"{VIDEO} --sampling dense --frames 16 --stride 2 --batch 16 "
                     "--epochs 600 --warmup 30", f"{TUNE} --frames 16 --sampling dense "
                     "--stride 2 --batch 16 --epochs 60 --warmup 5 --clips 5", scratch="--lr 4e-3",
                     long="--epochs 660"),
    # the labels of a twentieth of the images: 2,500
    "cifar10": Set("cifar10", "--img-size 32 --patch 4 --size 96x4x3 --decoder 64x1x2 --norm-pix "
                   "--batch 128 --epochs 12 --warmup 1 --lr 6e-3", f"{TUNE} --share 0.05 "
                   "--epochs 30 --warmup 3", "mae_image.py", 1, scratch="--lr 4e-3",
                   long="--epochs 90"),
    "toy-joint": Set("toy", "", "", "omni.py", 1, images="toy"),
    "toy-joint-short": Set("toy", "--epochs 12 --warmup 1", "", "omni.py", 1, images="toy"),
    # a fifth of the image updates: as many images as clips
    "lips20+tin20": Set("lips20", "--img-size 48 --patch 12 --size 96x4x3 --tubelet 2 "
                        "--decoder 64x2x4 --norm-pix --sampling segments --batch 32 --epochs 40 "
                        "--lr 2e-2 --image-share 0.2", f"{TUNE} --clips 1", "omni.py", 1, 64,
                        "tin20"),
    "toy-maps": Set("toy", "", f"{TUNE} --epochs 30 --batch 16 --warmup 3", "multimae.py", 1,
                    scratch="--lr 4e-3"),
    "toy-images": Set("toy", "", f"{TUNE} --epochs 30 --batch 16 --warmup 3 --share 0.25",
                      "mae_image.py", 1, scratch="--lr 4e-3"),
}
SCRATCH = "--mode scratch"


@dataclass
class Arm:
    """One side of a comparison: flags on top of the set's."""

    pretrain: str = ""
    finetune: str | None = ""  # None: held-out loss counts; LONG in it: the set's flags `long`
    source: str = ""  # the pretraining of another set
    script: str = ""  # another script of pretraining with the set's flags


@dataclass
class Claim:
    place: str
    text: str
    paper: str
    sets: tuple
    arms: dict
    pairs: tuple = ()  # as the paper has it: (arm with the higher accuracy or loss, lower one)
    equal: bool = False  # the paper says that the first is as good as the second


PRETRAINED, FROM_SCRATCH = Arm(), Arm("", SCRATCH)
FEW = "--share 0.25"  # 400 labelled images of the toy world: with all, every arm is nearly perfect
QUARTER = "--share 0.25 --epochs 60 --warmup 8"
KNN, PROBE = "--mode knn --clips 1", "--mode linear --min-crop 0.8 --epochs 40"
UNTRAINED = "--epochs 0 --pictures 0"
RATIOS = (0.25, 0.5, 0.75, 0.9)
IMAGE_SETS = ("toy-images", "cifar10")


def probed_and_tuned(name, pretrain="", script=""):
    return {f"{name}, linear": Arm(pretrain, PROBE, "", script),
            f"{name}, tuned": Arm(pretrain, "", "", script)}


CLAIMS = {
    "M1": Claim(
        "MAE Fig. 5", "a very high masking ratio is best: a lot for the probe, hardly for tuning",
        "linear 54.6 -> 73.5; fine-tuning flat from 40 to 80 %", IMAGE_SETS,
        {name: arm for r in RATIOS
         for name, arm in probed_and_tuned(f"{r:.0%}", f"--mask-ratio {r}").items()},
        (("75%, linear", "25%, linear"),)),
    "M3": Claim(
        "MAE Table 1(c)", "mask tokens belong into the decoder: in the encoder they cost accuracy",
        "linear -13.9, fine-tuned -0.7", IMAGE_SETS,
        probed_and_tuned("in the encoder", "", "tests/mask_tokens.py")
        | probed_and_tuned("in the decoder"),
        (("in the decoder, linear", "in the encoder, linear"),
         ("in the decoder, tuned", "in the encoder, tuned"))),
    "M5": Claim(
        "MAE Table 1(d)", "the normalised target is the better one",
        "+0.5 fine-tuned, +0.4 linear", IMAGE_SETS,
        probed_and_tuned("raw", "--no-norm-pix") | probed_and_tuned("normalised", "--norm-pix"),
        (("normalised, linear", "raw, linear"), ("normalised, tuned", "raw, tuned"))),
    "M7": Claim(
        "MAE Sec. 4.1, Table 1(f)", "a grid is easier to fill in than a random mask, a block "
        "harder: held-out loss", "order of the losses, no numbers", IMAGE_SETS,
        {kind: Arm(f"--mask {kind}", None) for kind in ("grid", "random", "block")},
        (("random", "grid"), ("block", "random"))),
    "V1": Claim(
        "VideoMAE Table 2", "pretraining on the small set itself beats training from scratch",
        "UCF101 51.4 -> 91.3, HMDB51 18.0 -> 62.6",
        ("toy", "lips20", "gestures10", "sprites5", "weizmann4", "cifar10", "toy-images"),
        {"scratch": FROM_SCRATCH, "pretrained": PRETRAINED}, (("pretrained", "scratch"),)),
    "M8": Claim(
        "MAE Sec. 4, MAE-ST Fig. 5", "... also when scratch trains long (here: as many epochs as "
        "both stages together)", "ViT-L 84.9 against 82.5; video 84.4 against 71.4",
        ("lips20", "toy", "gestures10", "sprites5", "weizmann4", "cifar10"),
        {"scratch, long": Arm("", f"{SCRATCH} LONG"), "pretrained": PRETRAINED},
        (("pretrained", "scratch, long"),)),
    "V2": Claim(
        "VideoMAE Table 2, Sec. 4.3", "the gain grows as the set shrinks (here: fewer labels, as "
        "many updates)", "from 240k to 3.5k clips: +11.2, 37.0, 39.9, 44.6", ("lips20",),
        {"scratch, all": FROM_SCRATCH, "pretrained, all": PRETRAINED,
         "scratch, a quarter": Arm("", f"{SCRATCH} {QUARTER}"),
         "pretrained, a quarter": Arm("", QUARTER)},
        (("pretrained, all", "scratch, all"), ("pretrained, a quarter", "scratch, a quarter"),
         ("pretrained, a quarter - scratch, a quarter", "pretrained, all - scratch, all"))),
    "V8": Claim(
        "VideoMAE Table 3", "frozen features are weak, fine-tuning is strong",
        "linear 38.9, fine-tuned 69.6", ("toy", "lips20", "gestures10", "sprites5", "weizmann4"),
        {"kNN": Arm("", KNN), "linear": Arm("", PROBE), "fine-tuned": PRETRAINED,
         "kNN, untrained encoder": Arm(UNTRAINED, KNN),
         "linear, untrained encoder": Arm(UNTRAINED, PROBE)},
        (("fine-tuned", "linear"),)),
    "V3": Claim(
        "VideoMAE Table 1(b), MAE-ST Table 2(a)", "which mask kind gives the best features",
        "VideoMAE, SSv2: tube 69.6 > random 68.3 (both 90 %) > frame 61.5 (87.5 %); "
        "MAE-ST, K400: random 84.4 > tube 83.5 (both 90 %) > frame 79.1 (75 %)", ("lips20",),
        # the pairs follow VideoMAE; of 4 slots, frame masks hide 3 at either ratio
        {f"{kind}, {r:.0%}": Arm(f"--mask {kind} --mask-ratio {r}")
         for kind in ("tube", "random", "frame") for r in (0.75, 0.9)
         if (kind, r) != ("frame", 0.9)},
        (("tube, 90%", "random, 90%"), ("tube, 75%", "random, 75%"), ("tube, 75%", "frame, 75%"))),
    "S1": Claim(
        "MAE-ST Fig. 6, VideoMAE Table 1(b)", "a very high masking ratio is best",
        "MAE-ST: 90 % best (a figure); VideoMAE, SSv2: tube 90 % 69.6, 75 % 68.0", ("lips20",),
        # 85 % is what VIDEO has, above: lips20 is pretrained so in the other claims
        {"50%": Arm("--mask tube --mask-ratio 0.5"), "75%": Arm("--mask tube --mask-ratio 0.75"),
         "85%": PRETRAINED, "90%": Arm("--mask tube --mask-ratio 0.9")},
        (("90%", "75%"), ("90%", "50%"))),
    "S8": Claim(
        "MAE Table 1(d), MAE-ST Table 2(b)", "the normalised target is the better one",
        "+0.5, +0.6", ("lips20",), {"raw": Arm("--no-norm-pix"), "normalised": PRETRAINED},
        (("normalised", "raw"),)),
    "S4": Claim(
        "MAE-ST Table 2(d)", "several clips of every decoded video: less time at as many samples, "
        "no loss", "1.8x, 3.0x faster", ("lips20",),
        {"1 clip": PRETRAINED, "2 clips": Arm("--repeat 2 --epochs 40 --warmup 2.5"),
         "4 clips": Arm("--repeat 4 --epochs 20 --warmup 1.25")},
        (("4 clips", "1 clip"),), equal=True),
    "V6": Claim(
        "VideoMAE Sec. 4.3, Table 1(e)", "pretraining on the target's own domain beats pretraining "
        "on another's", "42k SSv2 68.7, 240k K400 68.5", ("lips20",),
        # 190 epochs of 840 clips are as many updates as 80 of 2,000
        {"scratch": FROM_SCRATCH, "lips20": PRETRAINED,
         "sprites5": Arm("--epochs 190 --warmup 12", source="sprites5")},
        (("lips20", "sprites5"), ("sprites5", "scratch"))),
    "V7": Claim(
        "VideoMAE Table 4", "pretraining on a larger set helps a small one",
        "UCF101 91.3 -> 96.1, HMDB51 62.6 -> 73.3", ("weizmann4",),
        {"weizmann4": PRETRAINED, "sprites5": Arm("--frames 16", source="sprites5")},
        (("sprites5", "weizmann4"),)),
    "O1": Claim(
        "OmniMAE abstract",
        "one joint model is comparable to one per modality (here: equal steps per modality)",
        "joint ViT-B: ImageNet 83.0, SSv2 69.5 (public README); single ones not read",
        ("toy-joint-short", "toy-joint", "lips20+tin20"),
        {"videos, video-only": Arm("--image-share 0"), "videos, joint": Arm(),
         "images, image-only": Arm("--video-share 0", f"--classify images {FEW}"),
         "images, joint": Arm("", f"--classify images {FEW}")},
        (("videos, joint", "videos, video-only"), ("images, joint", "images, image-only")),
        equal=True),
    "O2": Claim(
        "OmniMAE abstract (90 / 95 %), public recipe (75 / 90 %)",
        "90 % / 95 % hidden instead of 75 % / 90 % costs no accuracy, and time is saved",
        "only the ratios were read; that they cost nothing is our question", ("toy-joint",),
        {f"{a:.0%} / {b:.0%}": Arm(f"--mask-ratio-image {a} --mask-ratio {b}")
         for a, b in ((0.75, 0.9), (0.9, 0.95))},
        (("90% / 95%", "75% / 90%"),), equal=True),
    "X1": Claim(
        "MultiMAE README table", "with RGB alone as good as MAE", "83.3 = 83.3 (ImageNet)",
        ("toy-maps",), {"MultiMAE, RGB": Arm("", FEW), "MAE": Arm("", FEW, source="toy-images")},
        (("MultiMAE, RGB", "MAE"),), equal=True),
    "X2": Claim(
        "MultiMAE README table", "a second input modality helps: segmentation, mean IoU",
        "NYUv2 RGB 52.0, RGB-D 56.0", ("toy-maps",),
        {"RGB": Arm("", f"{FEW} --dense semseg"),
         "RGB-D": Arm("", f"{FEW} --dense semseg --inputs rgb,depth"),
         "RGB, scratch": Arm("", f"{FEW} --dense semseg {SCRATCH}")},
        (("RGB-D", "RGB"), ("RGB", "RGB, scratch"))),
}
QUICK = "--smoke --batch 8 --workers 0"


def run_all(jobs, count, work):
    """Run {name: command} as processes, `count` at a time; stop if one fails. Not what is done.

    Each has its share of the cores, or OMP_NUM_THREADS threads if that is set."""
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}

    def run(name):
        script, *flags = jobs[name].split()
        if (work / name / "checkpoint.pt").exists():  # cut off in an earlier call
            flags = ["--resume", "--out", name]
        start = time.perf_counter()
        with open(work / f"{name}.log", "a") as log:
            line = [sys.executable, ROOT / script, *flags]
            code = subprocess.run(line, cwd=work, env=env, stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"{name} ended with code {code}: see {work / name}.log")
        minutes = (time.perf_counter() - start) / 60
        (work / name / "minutes.json").write_text(json.dumps(minutes))
        print(f"  {name}: {minutes:.1f} min", flush=True)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        list(pool.map(run, [k for k in jobs if not (work / k / "minutes.json").exists()]))


def key(text):
    """Flags -> part of a folder name."""
    text = text.replace("--", "").strip()
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text) or "plain"


def plan(claim, name, args):
    """-> pretrainings {name: command}, what gives scores {(arm, fold, seed): (name, command)}."""
    before, after, quick = {}, {}, QUICK if args.quick else ""

    def where(of, fold):
        videos = of.script in ("mae_video.py", "omni.py")
        return f"--data {prepare(of.data, of.short, args)}" + f" --fold {fold}" * videos

    s, usual = SETS[name], "--workers 1 --log-every 100"
    images = prepare(s.images, 0, args) if s.images else ""
    for (arm, a), fold in itertools.product(claim.arms.items(), range(1, folds(s, args) + 1)):
        origin = a.source or name
        first = SETS[origin]
        both = f"--images {images}" if images else ""
        pre = f"{origin}-{fold}-pre-{key(f'{Path(a.script).stem} {a.pretrain}')}"
        pre = f"{'quick-' * args.quick}{pre}"
        command = (f"{a.script or first.script} {where(first, fold)} {both} {usual} --pictures 1 "
                   f"{first.pretrain} {a.pretrain} {quick}")
        for seed in range(args.seeds):
            source = f"{pre}-{seed}"
            line = f"{command} --seed {seed} --out {source}"
            if a.finetune is None:
                after[arm, fold, seed] = source, line
                continue
            before[source] = line
            mine, own = a.finetune.replace("LONG", s.long), s.scratch * (SCRATCH in a.finetune)
            run = f"{pre}-ft-{f'{name}-' * bool(a.source)}{key(mine)}-{seed}"
            on_images = f"--data {images}" * ("images" in a.finetune)
            line = (f"finetune.py {where(s, fold)} {on_images} --seed {seed} {usual} --pictures 0 "
                    f"{s.finetune} {own} {mine} {quick}")
            after[arm, fold, seed] = run, f"{line} --init {source}/checkpoint.pt --out {run}"
    return before, after


def folds(s, args):
    return min(s.folds, args.folds)


def prepare(name, short, args):
    """The folder of a data set. Real videos are shrunk once, or decoding is most of the work."""
    folder = args.work / (f"{name}-{short}" if short else name)
    part, source = args.work / "part", source_of(name)
    if args.list or folder.exists():
        return folder.name
    if name == "toy":
        subprocess.run([sys.executable, ROOT / "data.py", "toy", "toy"], cwd=args.work, check=True)
    elif short:
        shutil.rmtree(part, ignore_errors=True)  # what an earlier call left
        command = [sys.executable, ROOT / "data.py", "shrink", source, part]
        log = Path(f"{folder}.log")
        with open(log, "w") as file:
            subprocess.run([*command, "--short-side", str(short)], stdout=file)
        if "files decoded" not in log.read_text():  # the last line
            raise SystemExit(f"{name} could not be shrunk: see {log}")
        part.rename(folder)
    elif source.is_dir():
        folder.unlink(missing_ok=True)  # a link to where the data were in an earlier call
        folder.symlink_to(source)
    else:
        with tarfile.open(f"{source}.tar.gz") as archive:
            archive.extractall(part, filter="data")
        (part / name).rename(folder)
    return folder.name


def source_of(name):
    return Path(os.environ.get("MAE_TEST_DATA", "/nowhere"), name).resolve()


def have(s):
    """Whether the data of a Set are here, as folders or, where they need not be shrunk, packed."""

    def found(name):
        packed = Path(f"{source_of(name)}.tar.gz").is_file()
        return source_of(name).is_dir() or packed and not (s.short and name == s.data)

    return all(name in ("", "toy") or found(name) for name in (s.data, s.images))


def ridge(train, labels, test, classes, strengths=(1, 10, 100, 1000)):
    """Ridge regression on one-hot labels, its strength chosen on a fifth of the training files.

    -> predictions
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    a, b = (train - mean) / std, (test - mean) / std
    onehot, held = F.one_hot(labels, classes).double(), torch.arange(len(a)) % 5 == 4

    def fit(x, y, z, strength):
        penalty = strength * x.shape[1] / 100 * torch.eye(len(x), dtype=torch.float64)
        gram = x @ x.T + penalty  # dual form: few files
        return (z @ (x.T @ torch.linalg.solve(gram, y - y.mean(0))) + y.mean(0)).argmax(1)

    def right(strength):
        return (fit(a[~held], onehot[~held], a[held], strength) == labels[held]).sum().item()

    return fit(a, onehot, b, max(strengths, key=right))


@functools.cache
def trivial_baselines(folder, fold):
    """{name: accuracy} of what needs no network.

    small clip        ridge on 16 x 8 x 8 grey pixels
    motion energy     ridge on how much each place differs from its median over time, on average
    motion over time  ridge on the same, time by time and coarser: 16 slots of a 4 x 4 map
    """
    parts = []
    for split in ("train", "val"):
        files = data.list_videos(folder, split, fold)
        found = {"small clip": [], "motion energy": [], "motion over time": []}
        for path in files.paths:
            clips, _ = data.read_clips(path, lambda n: segment_views(n, 16, 1))
            x = torch.from_numpy(clips[0].mean(-1))[None].float()  # (1, 16, H, W)
            change = (x - x.median(dim=1, keepdim=True).values).abs()
            maps = (x, 8), (change.mean(dim=1), 16), (change, 4)
            for rows, (values, side) in zip(found.values(), maps):
                rows.append(F.adaptive_avg_pool2d(values, side).flatten())
        parts.append((files, {name: torch.stack(x).double() for name, x in found.items()}))
    (train, a), (test, b) = parts
    labels, truth = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    guess = {"majority": labels.bincount().argmax()}
    guess |= {name: ridge(a[name], labels, b[name], len(train.classes)) for name in a}
    return {name: (truth == x).double().mean().item() for name, x in guess.items()}


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def score(folder):
    """What a finished run gives: accuracy or mean IoU; of a pretraining the held-out loss."""
    if not (folder / "results.json").exists():
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [line["val_loss"] for line in log if "val_loss" in line][-1]
    result = json.loads((folder / "results.json").read_text())
    return result.get("top1", result.get("mean IoU"))


def differences(scores, more, less):
    """Run by run; of what one has over another, too.   scores {(arm, fold, seed): value}"""

    def value(arm, *run):
        one, *other = arm.split(" - ")
        return scores[(one, *run)] - (scores[(other[0], *run)] if other else 0)

    runs = [run for arm, *run in scores if arm == more.split(" - ")[0]]
    return [value(more, *run) - value(less, *run) for run in runs]


def verdict(gaps, equal):
    """equal: the paper says that there is no difference."""
    if abs(statistics.mean(gaps)) > spread(gaps):
        return "holds" if statistics.mean(gaps) > 0 else "does not hold here"
    nothing = "no difference can" if equal and len(gaps) > 1 else "cannot"
    return f"{nothing} be seen at this size"


def show(name, claim, after, args):
    """Print the lines of one claim on one data set, as rows of a README table."""
    of_loss = any(arm.finetune is None for arm in claim.arms.values())
    unit, factor, digits = ("loss", 1, 4) if of_loss else ("%", 100, 1)

    def minutes(run):
        return json.loads((args.work / run / "minutes.json").read_text())

    scores = {k: factor * score(args.work / run) for k, (run, _) in after.items()}
    for arm, a in claim.arms.items():
        values = [v for (one, _, _), v in scores.items() if one == arm]
        runs = [(run, seed) for (one, _, seed), (run, _) in after.items() if one == arm]
        spent, before = statistics.median(minutes(run) for run, _ in runs), ""
        if a.finetune is not None and SCRATCH not in a.finetune:
            run, seed = runs[0]
            pretraining = f"{run.split('-ft-')[0]}-{seed}"
            before = f"{minutes(pretraining):.1f} min, then "
        mean = f"{statistics.mean(values):.{digits}f} ± {spread(values):.{digits}f} {unit}"
        print(f"| {name} | {arm} | {mean} | {before}{len(values)} x {spent:.1f} min |")
    s = SETS[name]
    if s.data != "toy" and s.script == "mae_video.py" and not args.quick:
        folder = args.work / prepare(s.data, s.short, args)
        rows = [trivial_baselines(folder, fold) for fold in range(1, folds(s, args) + 1)]
        means = ", ".join(f"{b} {statistics.mean(r[b] for r in rows):.1%}" for b in rows[0])
        print(f"| {name} | without a network | {means} | |")
    for more, less in claim.pairs:
        gaps = differences(scores, more, less)
        low, mean, high = (f"{f(gaps):+.{digits}f}" for f in (min, statistics.mean, max))
        subtracted = f"({less})" if " - " in less else less
        print(f"| {name} | {more} - {subtracted} | {mean} ± {spread(gaps):.{digits}f}, {low} to "
              f"{high} | {verdict(gaps, claim.equal)} |", flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default=",".join(CLAIMS), help="claims (default: %(default)s)")
    parser.add_argument("--sets", default=",".join(SETS), help="data sets (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the fine-tuning per split")
    parser.add_argument("--folds", type=int, default=3, help="splits of the data, 1 to 3")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="three updates, one split, one seed")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args()
    if args.quick:
        args.seeds = args.folds = 1
    if min(args.seeds, args.folds, args.jobs) < 1 or args.folds > 3:
        parser.error("--seeds and --jobs must be at least 1, --folds 1 to 3")
    asked, sets = (text.replace(" ", "").split(",") for text in (args.only, args.sets))
    if unknown := (set(asked) - set(CLAIMS)) | (set(sets) - set(SETS)):
        parser.error(f"{', '.join(sorted(unknown))} is unknown: see --help")
    args.work = args.work.resolve()
    if not args.list:
        args.work.mkdir(parents=True, exist_ok=True)
    for number in asked:
        claim = CLAIMS[number]
        print(f"\n{number}  {claim.place}: {claim.text}\n    the paper: {claim.paper}", flush=True)
        for name in [s for s in claim.sets if s in sets]:
            used = {name, *(arm.source or name for arm in claim.arms.values())}
            if missing := sorted(s for s in used if not have(SETS[s])):
                print(f"  {name}: left out, MAE_TEST_DATA names no folder with {missing[0]}")
                continue
            before, after = plan(claim, name, args)
            if args.list:
                commands = [*before.values(), *(command for _, command in after.values())]
                print("".join(f"  python {command}\n" for command in commands), end="")
                continue
            run_all(before, args.jobs, args.work)
            run_all(dict(after.values()), args.jobs, args.work)
            show(name, claim, after, args)


if __name__ == "__main__":
    run_script(main)
