"""claims.py - do the papers' claims hold in a small run?

    python tests/claims.py                       (all that have data here: days on 2 cores)
    python tests/claims.py --only V1 --sets toy  (one claim on one data set)
    python tests/claims.py --quick               (tiny runs: only shows that it works)
    python tests/claims.py --list                (the commands that would run)

A claim compares arms: a pretraining (or none) and a fine-tuning each, by the scripts' command
lines, for every split and seed; the last epoch on the test files counts. Finished runs are kept in
--work and not repeated, cut off ones are resumed. The verdict is by rule: see verdict().
Real data: set MAE_TEST_DATA to a folder with lips20/, gestures10/, sprites5/ and others.
"""

import collections
import concurrent.futures
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("MAE_TEST_DATA", "/nowhere")).resolve()
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from masking import run_script  # noqa: E402

VIDEO = ("--sampling segments --img-size 48 --size 96x4x3 --decoder 64x1x2 --tubelet 2 --norm-pix "
         "--mask-ratio 0.85 --lr 2e-2 --min-crop 0.5 --batch 32 --epochs 80 --warmup 5")
# of finetune.py; sizes come from the pretraining, for runs from scratch, too
TUNE = ("--batch 32 --lr 1.6e-2 --layer-decay 0.75 --drop-path 0.1 --smoothing 0.1 --min-crop 0.5 "
        "--epochs 15 --warmup 2")
TUNE_TOY = f"{TUNE} --epochs 30 --batch 16 --warmup 3"
FEW = "--share 0.25"  # 400 labelled images of the toy world: with all, every arm is nearly perfect
DENSE = "--sampling dense --frames 16 --stride 2 --batch 16"
# script: of the pretraining; folds: splits of the data; short: side to which it is shrunk, or 0;
# images: a second data set, for omni.py; scratch: flags from scratch, which learns best at its own
# rate; long: the same for as many updates as pretraining and fine-tuning together.
Set = collections.namedtuple("Set", "data pretrain finetune script folds short images scratch long",
                             defaults=["", "", "mae_video.py", 3, 0, "", "", ""])
SETS = {
    "toy": Set("toy", folds=1, scratch="--lr 2e-2", long="--epochs 505 --lr 2e-2"),
    "lips20": Set("lips20", VIDEO, f"{TUNE} --clips 2", short=64,
                  scratch="--lr 4e-3 --min-crop 0.8 --smoothing 0 --drop-path 0",
                  long="--epochs 95 --min-crop 0.5 --smoothing 0.1 --drop-path 0.1"),
    "gestures10": Set("gestures10", f"{VIDEO} --no-flip --frames 16 --epochs 300 --warmup 15",
                      "--batch 16 --lr 5e-2 --layer-decay 0.9 --drop-path 0 --min-crop 0.8 "
                      "--frames 16 --no-flip --epochs 60 --warmup 3 --clips 2", short=64,
                      long="--epochs 210"),
    "sprites5": Set("sprites5", VIDEO, f"{TUNE} --epochs 10 --warmup 1.5 --clips 2", short=64,
                    scratch="--lr 4e-3", long="--epochs 90"),
    "weizmann4": Set("weizmann4", f"{VIDEO} {DENSE} --epochs 600 --warmup 30",
                     f"{TUNE} {DENSE} --epochs 60 --warmup 5 --clips 5", scratch="--lr 4e-3",
                     long="--epochs 660"),
    # the labels of a twentieth of the images: 2,500
    "cifar10": Set("cifar10", "--img-size 32 --patch 4 --size 96x4x3 --decoder 64x1x2 --norm-pix "
                   "--batch 128 --epochs 12 --warmup 1 --lr 6e-3",
                   f"{TUNE} --share 0.05 --epochs 30 --warmup 3", "mae_image.py", 1,
                   scratch="--lr 4e-3", long="--epochs 90"),
    "toy-joint": Set("toy", "", "", "omni.py", 1, images="toy"),
    "toy-joint-short": Set("toy", "--epochs 12 --warmup 1", "", "omni.py", 1, images="toy"),
    # a fifth of the image updates: as many images as clips
    "lips20+tin20": Set("lips20", f"{VIDEO} --patch 12 --decoder 64x2x4 --mask-ratio 0.75 "
                        "--epochs 40 --warmup 2 --image-share 0.2", f"{TUNE} --clips 1", "omni.py",
                        1, 64, "tin20"),
    "toy-maps": Set("toy", "", TUNE_TOY, "multimae.py", 1, scratch="--lr 4e-3"),
    "toy-images": Set("toy", "", f"{TUNE_TOY} {FEW}", "mae_image.py", 1, scratch="--lr 4e-3"),
}


# Flags on top of the set's (LONG in them: its flags `long`); source: another set, whose pretraining
# is taken; script: another one of pretraining.
Arm = collections.namedtuple("Arm", "pretrain finetune source script", defaults=[""] * 4)
# pairs, as the paper has it: (arm with the higher accuracy, lower one).   equal: as good as that
Claim = collections.namedtuple("Claim", "text sets arms pairs equal", defaults=[False])
LIPS, IMAGES = ("lips20",), ("toy-images", "cifar10")
CLIPS = ("toy", "lips20", "gestures10", "sprites5", "weizmann4")
JOINT = ("toy-joint-short", "toy-joint", "lips20+tin20")
SCRATCH, KNN, UNTRAINED = "--mode scratch", "--mode knn --clips 1", "--epochs 0 --pictures 0"
PROBE, TOKENS = "--mode linear --min-crop 0.8 --epochs 40", "tests/mask_tokens.py"
QUARTER, SEMSEG = f"{FEW} --epochs 60 --warmup 8", f"{FEW} --dense semseg"
RATIOS = (0.25, 0.5, 0.75, 0.9)
CLAIMS = {
    "M1": Claim("MAE Fig. 5: a very high masking ratio is best, a lot for the probe", IMAGES, {
        **{f"{r:.0%}, linear": Arm(f"--mask-ratio {r}", PROBE) for r in RATIOS},
        **{f"{r:.0%}, tuned": Arm(f"--mask-ratio {r}") for r in RATIOS}},
        (("75%, linear", "25%, linear"),)),
    "M3": Claim("MAE Table 1(c): mask tokens in the encoder cost accuracy", IMAGES, {
        "encoder, linear": Arm("", PROBE, script=TOKENS), "encoder, tuned": Arm(script=TOKENS),
        "decoder, linear": Arm("", PROBE), "decoder, tuned": Arm()},
        (("decoder, linear", "encoder, linear"), ("decoder, tuned", "encoder, tuned"))),
    "V1": Claim("VideoMAE Table 2: pretraining on the small set beats scratch", CLIPS + IMAGES, {
        "scratch": Arm("", SCRATCH), "pretrained": Arm()}, (("pretrained", "scratch"),)),
    "M8": Claim("MAE-ST Fig. 5: ... also scratch that trains as long", (*CLIPS, "cifar10"), {
        "scratch, long": Arm("", f"{SCRATCH} LONG"), "pretrained": Arm()},
        (("pretrained", "scratch, long"),)),
    "V2": Claim("VideoMAE Table 2: the gain grows as the set shrinks (here: the labels)", LIPS, {
        "scratch, all": Arm("", SCRATCH), "scratch, a quarter": Arm("", f"{SCRATCH} {QUARTER}"),
        "pretrained, all": Arm(), "pretrained, a quarter": Arm("", QUARTER)},
        (("pretrained, all", "scratch, all"), ("pretrained, a quarter", "scratch, a quarter"),
         ("pretrained, a quarter - scratch, a quarter", "pretrained, all - scratch, all"))),
    "V8": Claim("VideoMAE Table 3: frozen features are weak, fine-tuning is strong", CLIPS, {
        "kNN": Arm("", KNN), "kNN, untrained encoder": Arm(UNTRAINED, KNN), "fine-tuned": Arm(),
        "linear": Arm("", PROBE), "linear, untrained encoder": Arm(UNTRAINED, PROBE)},
        (("fine-tuned", "linear"),)),
    # of the 4 slots, frame masks hide 3 at either ratio
    "V3": Claim("VideoMAE Table 1(b): tubes are best, then random masks, then frames", LIPS, {
        f"{kind}, {r:.0%}": Arm(f"--mask {kind} --mask-ratio {r}") for kind, r in (
            ("tube", 0.75), ("tube", 0.9), ("random", 0.75), ("random", 0.9), ("frame", 0.75))},
        (("tube, 90%", "random, 90%"), ("tube, 75%", "random, 75%"), ("tube, 75%", "frame, 75%"))),
    "S1": Claim("MAE-ST Fig. 6: a very high masking ratio is best", LIPS, {
        "85%": Arm(),  # as in VIDEO
        **{f"{r:.0%}": Arm(f"--mask tube --mask-ratio {r}") for r in (0.5, 0.75, 0.9)}},
        (("90%", "75%"), ("90%", "50%"))),
    "S8": Claim("MAE-ST Table 2(b): the normalised target is the better one", LIPS, {
        "raw": Arm("--no-norm-pix"), "normalised": Arm()}, (("normalised", "raw"),)),
    "S4": Claim("MAE-ST Table 2(d): several clips of a video: less time, no loss", LIPS, {
        "1 clip": Arm(), "2 clips": Arm("--repeat 2 --epochs 40 --warmup 2.5"),
        "4 clips": Arm("--repeat 4 --epochs 20 --warmup 1.25")}, (("4 clips", "1 clip"),), True),
    # 190 epochs of 840 clips are as many updates as 80 of 2,000
    "V6": Claim("VideoMAE Sec. 4.3: the target's own domain beats another's", LIPS, {
        "sprites5": Arm("--epochs 190 --warmup 12", source="sprites5"), "lips20": Arm(),
        "scratch": Arm("", SCRATCH)}, (("lips20", "sprites5"), ("sprites5", "scratch"))),
    # as many updates of each modality
    "O1": Claim("OmniMAE abstract: a joint model is as good as one per modality", JOINT, {
        "videos, alone": Arm("--image-share 0"), "videos, joint": Arm(),
        "images, alone": Arm("--video-share 0", f"--classify images {FEW}"),
        "images, joint": Arm("", f"--classify images {FEW}")},
        (("videos, joint", "videos, alone"), ("images, joint", "images, alone")), True),
    "X1": Claim("MultiMAE README: with RGB alone as good as MAE", ("toy-maps",), {
        "MultiMAE, RGB": Arm("", FEW), "MAE": Arm("", FEW, source="toy-images")},
        (("MultiMAE, RGB", "MAE"),), True),
    "X2": Claim("MultiMAE README: depth as a second input helps to paint", ("toy-maps",), {
        "RGB": Arm("", SEMSEG), "RGB-D": Arm("", f"{SEMSEG} --inputs rgb,depth"),
        "RGB, scratch": Arm("", f"{SEMSEG} {SCRATCH}")},
        (("RGB-D", "RGB"), ("RGB", "RGB, scratch"))),
}


def run_all(jobs, args):
    """Run {name: command} as processes, --jobs at a time; stop if one fails. Not what is done."""
    if args.list:
        print(*[f"  python {command}" for command in jobs.values()], sep="\n")
        return
    env = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs)), **os.environ}
    def run(name):
        folder, (script, *flags) = args.work / name, jobs[name].split()
        if (folder / "done").exists():
            return
        if (folder / "checkpoint.pt").exists():  # cut off in an earlier call
            flags = ["--resume", "--out", name]
        start, line = time.perf_counter(), [sys.executable, ROOT / script, *flags]
        with open(f"{folder}.log", "a") as log:
            code = subprocess.run(line, cwd=args.work, env=env, stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"{name} ended with code {code}: see {folder}.log")
        (folder / "done").touch()
        print(f"  {name}: {(time.perf_counter() - start) / 60:.1f} min", flush=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, jobs))


def plan(claim, name, args):
    """-> pretrainings {name: command}, fine-tunings {(arm, fold, seed): (name, command)}."""
    before, after, s, usual = {}, {}, SETS[name], "--workers 1 --log-every 100"
    quick = "--smoke --batch 8 --workers 0" if args.quick else ""
    def where(of, fold):
        videos = of.script in ("mae_video.py", "omni.py")
        return f"--data {prepare(of.data, of.short, args)}" + f" --fold {fold}" * videos
    def key(text):  # flags -> part of a folder name
        return re.sub(r"[^\w.-]+", "_", text.replace("--", "").strip()) or "plain"
    both = f"--images {prepare(s.images, 0, args)}" if s.images else ""
    folds, seeds = range(1, min(s.folds, args.folds) + 1), range(args.seeds)
    for (arm, a), fold, seed in itertools.product(claim.arms.items(), folds, seeds):
        first, flags = SETS[a.source or name], key(f"{Path(a.script).stem} {a.pretrain}")
        pre = f"{'quick-' * args.quick}{a.source or name}-{fold}-pre-{flags}-{seed}"
        before[pre] = (
            f"{a.script or first.script} {where(first, fold)} {both} {usual} --seed {seed} "
            f"--pictures 1 {first.pretrain} {a.pretrain} {quick} --out {pre}")
        mine, own = a.finetune.replace("LONG", s.long), s.scratch * (SCRATCH in a.finetune)
        run = f"{pre}-ft-{f'{name}-' * bool(a.source)}{key(mine)}"
        on_images = both.replace("--images", "--data") * ("images" in mine)
        after[arm, fold, seed] = run, (
            f"finetune.py {where(s, fold)} {on_images} {usual} --seed {seed} --pictures 0 "
            f"{s.finetune} {own} {mine} {quick} --init {pre}/checkpoint.pt --out {run}")
    return before, after


def prepare(name, short, args):
    """The folder of a data set. Real videos are shrunk once, or decoding is most of the work."""
    folder, part, source = args.work / f"{name}-{short}", args.work / "part", REAL / name
    folder = folder if short else args.work / name
    if args.list or folder.exists() and name != "toy":  # whose files may be incomplete
        return folder.name
    args.work.mkdir(parents=True, exist_ok=True)
    if name == "toy":
        data.make_toy(folder)
    elif not source.is_dir():  # FileNotFoundError: there is no archive either
        shutil.unpack_archive(f"{source}.tar.gz", args.work, filter="data")
    elif not short:
        folder.symlink_to(source)
    else:
        shutil.rmtree(part, ignore_errors=True)  # what an earlier call left
        command = [sys.executable, ROOT / "data.py", "shrink", source, part, "--short-side"]
        if subprocess.run([*command, str(short)]).returncode:
            raise SystemExit(f"{name} could not be shrunk")
        part.rename(folder)
    return folder.name


def values(scores, arms):
    """Run by run; of "one - other" their differences.   scores {arm: array}"""
    one, *other = [scores[arm] for arm in arms.split(" - ")]
    return one - sum(other)


def mean_and_spread(numbers):
    return np.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else np.nan


def verdict(gaps, equal):
    """"holds": the mean is larger than the spread and has the paper's sign.   equal: see Claim"""
    mean, spread = mean_and_spread(gaps)
    if abs(mean) > spread:
        return "holds" if mean > 0 else "does not hold here"
    return f"{'no difference can' if equal and len(gaps) > 1 else 'cannot'} be seen at this size"


def show(name, claim, after, args):
    """Print the lines of one claim on one data set, as rows of a Markdown table."""
    scores = {arm: np.empty(0) for arm in claim.arms}
    for (arm, *_), (run, _) in after.items():
        result = json.loads((args.work / run / "results.json").read_text())
        scores[arm] = np.append(scores[arm], 100 * result.get("top1", result.get("mean IoU")))
    for arm, numbers in scores.items():
        print("| {} | {} | {:.1f} ± {:.1f} | |".format(name, arm, *mean_and_spread(numbers)))
    for more, less in claim.pairs:
        gaps = values(scores, more) - values(scores, less)
        found = "{:+.1f} ± {:.1f}".format(*mean_and_spread(gaps))
        found += f", {min(gaps):+.1f} to {max(gaps):+.1f} | {verdict(gaps, claim.equal)}"
        print(f"| {name} | {more} - ({less}) | {found} |", flush=True)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
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
    asked, sets = (text.replace(" ", "").split(",") for text in (args.only, args.sets))
    if unknown := (set(asked) - set(CLAIMS)) | (set(sets) - set(SETS)):
        parser.error(f"{', '.join(sorted(unknown))} is unknown: see --help")
    for number in asked:
        claim = CLAIMS[number]
        print(f"\n{number}  {claim.text}", flush=True)
        for name in [s for s in claim.sets if s in sets]:
            try:
                before, after = plan(claim, name, args)
            except FileNotFoundError as error:
                print(f"  {name}: left out, see MAE_TEST_DATA: {error}")
                continue
            for jobs in (before, dict(after.values())):
                run_all(jobs, args)
            if not args.list:
                show(name, claim, after, args)


if __name__ == "__main__":
    run_script(main)
