"""finetune.py - what the pretraining was for: a classifier around the encoder, and its test.

Fine-tunes, probes or trains from scratch on labelled images or videos, tests with several views,
writes predictions, results and a confusion matrix. Takes our files and the papers' public ones.

Papers  MAE 2111.06377 (App. A.1), VideoMAE 2203.12602 (App. 7), MAE-ST 2205.09113 (Sec. 4)
Covers  MAE App. A.1 "End-to-end fine-tuning", Table 9   Classifier, layer_groups, mix, Augmented
        MAE App. A.1 "Linear probing", Table 10          Classifier(frozen=True), LARS
        VideoMAE Table 2 "from scratch"                  --mode scratch: no weights, no layer decay
        MAE-ST Sec. 4 "Settings", VideoMAE App. 7        ViewDataset, summarise: clips x crops views
        random erasing (arXiv 1708.04896)                erase
        not in the papers                                nearest_neighbours; --mode knn
Not     detection; MAE's segmentation (App. A.4), recipe from scratch (App. A.2) and partial
        fine-tuning (Fig. 9); VideoMAE's probe (SGD, Table 11); image to video (MAE-ST App. A)

The modes answer different questions. finetune: is the encoder a good place to start from? scratch:
what would it have learnt without? linear and knn: what does the encoder know already? Masked
autoencoders are strong in the first and weak in the last (VideoMAE Table 3: 69.6, linear 38.9).

Run     python finetune.py                            (2 min on 2 CPU cores, after mae_video.py)
        python finetune.py --mode scratch --lr 2e-2 --out runs/scratch  (... without pretraining)
        python finetune.py --mode linear --out runs/linear    (--mode knn needs no training at all)
        python finetune.py --data UCF101 --preset ucf101 --init runs/mae_video_ucf101/checkpoint.pt
        python finetune.py --predict clip.avi                 (with the classifier in runs/finetune)
        It ends with "done: finetune: top-1 ... see runs/finetune".
Next    this is the last file. tests/ shows what was checked, and how.
"""

import csv
import dataclasses
import io
import json
import math
import re
import typing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

import data
from mae_image import (DECODER, MAE, begin, choose_precision, encoder_size, evenly, fetch,
                       layer_norm, list_both, load_into, public_mae, rename, save_picture, train)
from mae_video import (MAEST, ClipConfig, ClipDataset, VideoMAE, even_starts, grid_of, public_maest,
                       public_videomae, resize_table, views_of)
from masking import is_first, picture_table, rank_and_world, report, run_script
from multimae import AlignedDataset, DenseHead, MultiMAE, parse_modalities, public_multimae
from omni import OmniMAE, public_omni

MODELS = {"mae": MAE, "videomae": VideoMAE, "mae_st": MAEST, "omni": OmniMAE, "multimae": MultiMAE}
READERS = {"multimae": public_multimae, "omni": public_omni, "mae": public_mae,
           "mae_st": public_maest, "videomae": public_videomae}


# ==== THE PAPERS, part 1: a classifier around the encoder =========================================
# (needs: math, torch, nn; mae_image.py DECODER, part 3; mae_video.py parts 1, 3;
# multimae.py part 3)
class TunedBlock(nn.Module):
    """The pretrained block with what only fine-tuning adds; the names of its tensors stay.

    drop_path    chance that a sample skips each half of the block in training (stochastic depth,
                 arXiv 1603.09382)
    layer_scale  whether each half has a learned factor per channel (VideoMAE's code)
    """

    def __init__(self, block, drop_path, layer_scale):
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        self.norm2, self.mlp = block.norm2, block.mlp
        self.drop_path, width = drop_path, block.norm1.normalized_shape[0]
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, nn.Parameter(torch.ones(width)) if layer_scale else None)

    def branch(self, x, gamma):
        """What a half of the block adds: for some samples nothing, for the others as much more."""
        x = x if gamma is None else gamma * x
        if self.drop_path and self.training:
            keep = 1 - self.drop_path
            x = x * torch.rand(len(x), 1, 1, device=x.device).lt(keep) / keep
        return x

    def forward(self, x):
        x = x + self.branch(self.attn(self.norm1(x)), self.gamma_1)
        return x + self.branch(self.mlp(self.norm2(x)), self.gamma_2)


class Classifier(nn.Module):
    """Pretrained encoder -> pooled token -> LayerNorm -> linear layer.   logits = model(x)

    x       what the encoder's `encode` takes, e.g. clips (B, C, T, H, W);   logits (B, classes)
    pool    "mean" over the tokens without the class token (MultiMAE's global token does count), or
            "first": the class token. Models without one take their first cube or patch, as
            VideoMAE's public code does with --use_cls
    fresh_norm  the norm before the head is new. Fine-tuned, MAE, VideoMAE and OmniMAE throw the
            pretrained final norm away, MultiMAE has none; MAE-ST, probes and "first" keep it
    frozen  linear probing: BatchNorm without affine before the linear layer; nothing else learns

    The norm comes after the pooling. For "first" that is the same: LayerNorm looks at one token.
    """

    def __init__(self, encoder, classes, pool="mean", fresh_norm=True, drop_path=0.0, dropout=0.0,
                 layer_scale=False, frozen=False):
        super().__init__()
        for name in [name for name in dir(encoder) if name.startswith(DECODER)]:
            delattr(encoder, name)  # it has done its work: MAE Sec. 3 "MAE decoder"
        D, depth = encoder.blocks[0].norm1.normalized_shape[0], len(encoder.blocks)
        self.pool, self.WARMUP_INCLUSIVE = pool, encoder.WARMUP_INCLUSIVE
        # important: MAE-ST's code leaves token 0 out even without a class token, and loses a cube
        self.skip = int(isinstance(encoder, (MAE, MAEST)))
        self.norm = layer_norm(D) if fresh_norm else encoder.norm
        encoder.norm = nn.Identity()
        drop_path = 0.0 if frozen else drop_path
        rates = torch.linspace(0, drop_path, depth).tolist()  # deeper blocks are skipped more often
        blocks = [TunedBlock(block, r, layer_scale) for block, r in zip(encoder.blocks, rates)]
        encoder.blocks = nn.Sequential(*blocks)
        # fixed positions enter the state dict: they may be resized, and MAE's code trains them
        if not isinstance(encoder, MAEST):
            encoder.pos_embed = nn.Parameter(encoder.pos_embed, isinstance(encoder, MAE))
        if isinstance(encoder, MultiMAE):  # which resizes them itself, always from this grid
            encoder.register_buffer("pos_embed_grid", torch.tensor(encoder.grid))
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        if frozen:
            self.requires_grad_(False)
        linear = nn.Linear(D, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01 if frozen else 2e-5)
        nn.init.zeros_(linear.bias)
        # MAE App. A.1: without BatchNorm each model would need its own learning rate
        scale = nn.BatchNorm1d(D, affine=False, eps=1e-6)
        self.head = nn.Sequential(scale, linear) if frozen else linear

    def features(self, x):
        """-> (B, D): one vector per sample."""
        x = self.encoder.encode(x)  # (B, N, D), with the class token where there is one
        x = x[:, 0] if self.pool == "first" else x[:, self.skip :].mean(dim=1)  # (B, D)
        return self.norm(x)

    def forward(self, x):
        return self.head(self.dropout(self.features(x)))

    def answers(self, x):
        """-> (B, classes): probabilities."""
        return self(x).float().softmax(dim=-1)


def change_grid(encoder, new):
    """Another image size or clip length than in pretraining: tables of positions are interpolated.

    DIFFERS from VideoMAE's public code, which makes a new sine table: then every token has another
    position than in pretraining. MultiMAE resizes its positions to every input itself.
    """
    if isinstance(encoder, MultiMAE):
        return
    old, encoder.grid = encoder.grid, new
    for name, a, b in (("pos_embed", old, new),
                       ("pos_embed_spatial", (1, *old[1:]), (1, *new[1:])),
                       ("pos_embed_temporal", (old[0], 1, 1), (new[0], 1, 1))):
        if (table := getattr(encoder, name, None)) is not None:
            extra = table.shape[1] - math.prod(a)  # a joint table begins with the class token's row
            resized = resize_table(table[:, extra:].detach(), a, b)
            resized = torch.cat([table[:, :extra].detach(), resized], dim=1)
            setattr(encoder, name, nn.Parameter(resized, table.requires_grad))


# ==== THE PAPERS, part 2: the recipe ==============================================================
# (needs: re, torch, v2; data.py seeded, torchvision_draws_from, part 4)
def layer_groups(model, weight_decay, layer_decay):
    """AdamW's groups: layer-wise decay of the learning rate, MAE App. A.1 (from BEiT, 2106.08254).

    Layer 0 is the embedding with tokens and positions, block i is layer i + 1, norm and head are
    the last; a layer learns `layer_decay` times as fast as the one above it (ViT-B at 0.75: the
    embedding at 0.75^13 = 2.4 % of the head's rate). Vectors, tokens and positions do not decay.

    OmniMAE's public code counts one step more: its head learns layer_decay times as fast, and so on
    down. That is ours at layer_decay times the learning rate.
    """
    last, groups = len(model.encoder.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = 0 if name.startswith("encoder.") else last
        if block := re.match(r"encoder\.blocks\.(\d+)\.", name):
            layer = int(block[1]) + 1
        plain = parameter.ndim < 2 or "_token" in name or "pos_embed" in name
        rate, decay = layer_decay ** (last - layer), 0.0 if plain else weight_decay
        group = {"params": [], "lr_scale": rate, "weight_decay": decay}
        groups.setdefault((layer, plain), group)["params"].append(parameter)
    return list(groups.values())


class LARS(torch.optim.SGD):
    """SGD with momentum, the gradient of each matrix scaled: MAE App. A.1, arXiv 1708.03888.

    A matrix moves by lr x 0.001 x its own norm, however long its gradient is. Vectors: plain SGD.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    norm, length = p.norm(), p.grad.norm()
                    p.grad *= torch.where(norm * length > 0, 0.001 * norm / length, 1.0)
        super().step()


def mix(x, labels, classes, mixup, cutmix):
    """Mixup or CutMix, one of them at random, of the samples of a batch: MAE Table 9.

    -> x, labels (B,) or soft (B, classes).   All frames of a clip are mixed alike: to torchvision
    they are channels. It mixes neighbours, with --repeat clips of one video: so shuffle first.
    """
    both = (v2.MixUp, mixup), (v2.CutMix, cutmix)
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in both if alpha]
    if not kinds:
        return x, labels
    order = torch.randperm(len(x))
    kind = kinds[int(torch.rand(1) * len(kinds))]
    mixed, labels = kind(x[order].flatten(1, -3), labels[order])  # (B, C*T, H, W)
    return mixed.reshape(x.shape), labels


def erase(x, chance):
    """Random erasing, arXiv 1708.04896: a box of noise in all frames.   x (B, C, [T,] H, W)"""
    if not chance:
        return x
    eraser = v2.RandomErasing(p=chance, value="random")
    return torch.stack([eraser(sample.flatten(0, -3)).reshape(sample.shape) for sample in x])


class Augmented(data.FileDataset):
    """A dataset of data.py with RandAugment (arXiv 1909.13719) on top of crop and flip.

    All frames of a clip get the same operations. important: frames augmented one by one would
    flicker, and the network would learn from motion that is not there.
    DIFFERS from the official code (timm's): torchvision's operations and scale, after the crop, not
    before it, without noise on the magnitude, each operation always and not with a chance of 0.5.
    """

    def __init__(self, dataset, cfg):
        super().__init__(dataset.files, cfg, train=True)
        self.dataset, self.repeat = dataset, dataset.repeat
        self.augment = v2.RandAugment(cfg.rand_ops, cfg.rand_augment, num_magnitude_bins=11)

    def __getitem__(self, key):
        pixels, number, problems = self.dataset[key]
        with data.torchvision_draws_from(data.seeded(self.cfg.seed, 5, *key)):
            samples = [self.augment(x.movedim(-1, -3)).movedim(-3, -1) for x in pixels]
        return torch.stack(samples), number, problems


# ==== THE PAPERS, part 3: testing, on all that stands below =======================================
def spatial_views(pixels, size, crops):
    """The largest boxes of the aspect of `size`, evenly along what is too long; one: the middle.

    uint8 (T, H, W, 3) -> (crops, T, *size, 3)
    """
    H, W = pixels.shape[1:3]
    h, w = data.center_box((H, W), size)[2:]
    corners = zip(even_starts(H - h, crops), even_starts(W - w, crops))
    return torch.stack([data.make_crop(pixels, size, (*corner, h, w)) for corner in corners])


class ViewDataset(data.FileDataset):
    """dataset[i] -> uint8 (clips * crops, T, H, W, 3), i, [(path, problem)]: all views of a file.

    Images have one view, the whole centre (DIFFERS from MAE's public code: resized to 256, cropped
    to 224). A broken file gives no view, and None as its number. It is not replaced by another one,
    as in training, or that one would count twice.
    """

    def choose(self, n):
        return views_of(self.cfg.sampling, n, self.cfg.frames, self.cfg.stride, self.cfg.clips)

    def __getitem__(self, i):
        path = self.paths[i]
        try:
            if is_video(self.cfg):
                clips, problem = data.read_clips(path, self.choose)
                views = [spatial_views(clip, self.size, self.cfg.crops) for clip in clips]
                pixels = torch.cat(views)
            else:
                pixels, problem = open_images(self.files, self.cfg, False).read(i, None)
            return pixels, i, [(path, problem)] * bool(problem)
        except data.BrokenFile as error:
            nothing = torch.empty(0, dtype=torch.uint8)  # torch.cat takes it beside any shape
            return nothing, None, [(path, f"broken, left out: {error}")]


def run_views(model, files, cfg, output):
    """output(x), a method of the model, of every view -> (n, views, width), the n files it is of.

    Files that cannot be read are left out. Each process takes every world-th file.
    """
    (rank, world), device = rank_and_world(), next(model.parameters()).device
    dtype, views = choose_precision(cfg, device), cfg.clips * cfg.crops if is_video(cfg) else 1
    size = max(cfg.batch // (world * cfg.accum) // views, 1)  # files of a forward pass
    loader = data.start_loader(
        ViewDataset(files, cfg, False), cfg.workers, batch_size=size,
        sampler=range(rank, len(files.paths), world), collate_fn=data.collate)
    outputs, problems = {}, []
    model.eval()
    for pixels, numbers, found in data.take_all(loader, "testing"):
        problems += found
        numbers = [i for i in numbers if i is not None]
        if numbers:
            with torch.inference_mode(), torch.autocast(device.type, dtype, dtype != torch.float32):
                answers = output(model.encoder.normalize(pixels.to(device))).float().cpu()
            outputs |= zip(numbers, answers.unflatten(0, (len(numbers), views)))
    parts = [(outputs, problems)] * world
    if world > 1:
        torch.distributed.all_gather_object(parts, (outputs, problems))
    for more, problems in parts:
        outputs |= more
        for path, problem in problems:
            report(f"{path}: {problem}")
    kept = sorted(outputs)
    answers = torch.stack([outputs[i] for i in kept] or [torch.tensor(math.nan)])
    if not answers.isfinite().all():
        raise ValueError("no file can be read, or answers are not finite: --precision float32?")
    if len(kept) < len(files.paths):
        report(f"{len(files.paths) - len(kept)} unreadable files are left out")
    return answers, files.select(kept)


def summarise(probabilities, labels):
    """Accuracy of single views and of files.

    probabilities (N, views, classes), labels (N,)
    important: the two are different numbers, and papers report the second: the softmax averaged
    over all views of a video. To compare one with the other is how results fail to reproduce.
    """
    N, V, C = probabilities.shape
    of_files = probabilities.mean(dim=1)  # (N, C)
    right = of_files.topk(min(5, C)).indices == labels[:, None]  # (N, 5)
    pairs = torch.bincount(labels * C + of_files.argmax(dim=1), minlength=C * C)
    confusion = pairs.reshape(C, C)  # true class, answer
    count = confusion.sum(dim=1)
    per_class = confusion.diag() / count  # NaN where there is no test file: no part of the mean
    return {
        "files": N, "views": V,
        "top1": right[:, 0].double().mean().item(), "top5": right.any(dim=1).double().mean().item(),
        "view_top1": (probabilities.argmax(dim=2) == labels[:, None]).double().mean().item(),
        "class_mean": per_class.nanmean().item(), "most_frequent": (count.max() / N).item(),
        "confusion": confusion.tolist(),
    }


def nearest_neighbours(train, train_labels, test, classes, k=20, temperature=0.07):
    """Weighted vote of the k nearest training features (arXiv 1805.01978).

    (n, D), (n,), (m, D) -> votes (m, classes), numbers of the neighbours (m, k)
    Nearness is the cosine after subtracting the mean of the training features; a neighbour's vote
    weighs exp(cosine / temperature).
    """
    mean, k = train.mean(dim=0), min(k, len(train))
    train, test = (F.normalize(x - mean, dim=1) for x in (train, test))
    # in parts: all cosines at once would be 250 GB for ImageNet
    nearest = [(part @ train.T).topk(k, dim=1) for part in test.split(1024)]
    cosines, index = (torch.cat(x) for x in zip(*nearest))  # each (m, k)
    weight = (cosines / temperature).exp()
    votes = torch.zeros(len(test), classes).scatter_add(1, train_labels[index], weight)
    return votes / votes.sum(dim=1, keepdim=True), index


# ==== THE RUN, part 1: settings ===================================================================
Mode = typing.Literal["finetune", "scratch", "linear", "knn", "features"]


@dataclasses.dataclass
class Config(ClipConfig):
    SCRIPT, BASELINE = "finetune", "uniform guess"

    # what to do
    mode: Mode = "finetune"  # scratch: no weights; linear, knn: frozen; features: save vectors
    eval_only: bool = False  # no training: test the classifier in --init, or in --out
    predict: str = ""  # no training: classify this one file with what is in --init, or in --out
    # data
    data: str = "toy"  # UCF101, HMDB51, a folder, a list file or cifar10
    share: float = 1.0  # share of the training files of each class that is used
    # augmentation, none of it in a probe but crop and flip
    min_crop: float = 0.35  # smallest share of the frame that a random crop takes; papers 0.08
    flip: bool = True  # mirror half of the samples; --no-flip where left and right are classes
    rand_augment: int = 0  # magnitude 0 to 10 of RandAugment, 0: off; MAE's is 9, VideoMAE's 7
    rand_ops: int = 2  # operations of RandAugment; VideoMAE's code has 4
    erase: float = 0.0  # chance that a box is filled with noise; the papers' codes have 0.25
    mixup: float = 0.0  # alpha of Mixup; the papers' is 0.8
    cutmix: float = 0.0  # alpha of CutMix; the papers' is 1.0
    smoothing: float = 0.0  # label smoothing; the papers' is 0.1
    # model
    model: typing.Literal["mae", "videomae", "mae_st", "omni", "multimae"] = "videomae"  # of --init
    classify: typing.Literal["videos", "images"] = "videos"  # --model omni: which of the two
    inputs: str = "rgb"  # --model multimae: what the classifier sees, any of rgb,depth,semseg
    dense: typing.Literal["", "semseg"] = ""  # --model multimae: predict the class map
    classes: int = 6  # --model multimae: classes of the semantic maps; the toy world has 6
    ignore: int = -1  # --dense: class that does not count (void), -1: none
    class_width: int = 16  # --model multimae: width of a class's learned vector
    pool: typing.Literal["paper", "mean", "first"] = "paper"  # paper: first if an MAE is frozen
    drop_path: float = 0.1  # chance to skip a half of the last block, less before; papers 0.1-0.2
    dropout: float = 0.0  # before the head
    # optimiser
    epochs: int = 100  # passes over the training files; each gives --repeat samples
    batch: int = 16  # samples per update, over all processes, accumulation steps and repeats
    lr: float = 3e-2  # base rate, for a batch of 256, made for nano; ViT-B: 1e-3
    probe_lr: float = 100.0  # base rate of --mode linear (LARS); MAE's is 0.1, for batch 16,384
    warmup: float = 6  # epochs of linear warm-up
    layer_decay: float = 0.75  # rate of a layer beside that of the one above; papers 0.7-0.75
    # test
    clips: int = 4  # clips of a test video (knn, features: 1); with "segments" the paper has 2
    crops: int = 1  # boxes along the long side of every clip; the papers have 3
    # run
    out: str = "runs/finetune"  # folder for checkpoint, log, predictions and results

    def default_file(self):
        """Where a classifier or encoder is looked for without --init."""
        if self.eval_only or self.predict:
            return f"{self.out}/checkpoint.pt"
        script = MODELS[self.model].__module__  # a model stands in the file that trains it
        return "" if self.mode == "scratch" else f"runs/{script}/checkpoint.pt"


# Sizes are those of the pretraining's presets: for --mode scratch, which may have no file.
_recipe = dict(frames=16, stride=4, sampling="dense", tubelet=2, smoothing=0.1, erase=0.25,
               rand_augment=7, rand_ops=4, mixup=0.8, cutmix=1.0, repeat=2, crops=3)
_gpu = dict(_recipe, img_size="112", size="small", min_crop=0.3, batch=128, lr=1e-3,
            layer_decay=0.7, warmup=5)
# VideoMAE App. 7 "UCF101", "HMDB51": batch 128, base rates 5e-4 and 1e-3. Our --batch counts both
# clips of a video: so twice that, and half the base rate. RandAugment, dropout and the end of the
# cosine are those of the public UCF101 script
_paper = dict(_recipe, img_size="224", patch=16, size="base", min_crop=0.08, batch=256,
              layer_decay=0.7, drop_path=0.2, dropout=0.5, warmup=5, min_lr=5e-6)
PRESETS = {
    # some hundred clips of your own, on a CPU or one GPU
    "small": dict(lr=5e-2, layer_decay=0.9, drop_path=0.0, smoothing=0.1, min_crop=0.8, epochs=60,
                  warmup=4, clips=2, init="runs/mae_video_small/checkpoint.pt"),
    "ucf101": dict(_gpu, clips=5),
    "hmdb51": dict(_gpu, stride=2, clips=10),
    "ucf101_paper": dict(_paper, lr=2.5e-4, epochs=100, clips=5),
    "hmdb51_paper": dict(_paper, stride=2, lr=5e-4, epochs=50, clips=10),
    "cifar10": dict(data="cifar10", smoothing=0.1, batch=512, lr=1e-3, warmup=5, min_crop=0.6,
                    rand_augment=7, mixup=0.8, cutmix=1.0,
                    init="runs/mae_image_cifar10/checkpoint.pt"),
    # MAE Table 9 (ViT-B; the public code has 5e-4 and 0.65), random erasing from the public code;
    # the table's 100 epochs, layer decay 0.75 and drop path 0.1 are the defaults above
    "mae_paper": dict(smoothing=0.1, min_crop=0.08, erase=0.25, rand_augment=9, mixup=0.8,
                      cutmix=1.0, batch=1024, lr=1e-3, warmup=5),
    # MAE Table 10; the class token of MAE, the mean of others
    "mae_probe_paper": dict(mode="linear", min_crop=0.08, batch=16384, probe_lr=0.1, epochs=90,
                            warmup=10),
}
FROZEN = ("linear", "knn", "features")  # modes in which the encoder learns nothing


def is_video(cfg):
    return cfg.model in ("videomae", "mae_st") or cfg.model == "omni" and cfg.classify == "videos"


def planes_of(cfg):
    """The modalities that are read from files: the inputs and, with --dense, the map to predict."""
    return parse_modalities(f"{cfg.inputs},{cfg.dense}")


# ==== THE RUN, part 2: from a file to a classifier ================================================
def build(cfg, classes, found=None):
    """-> Classifier or DenseHead.   found None: random weights"""
    stored, state = {}, {}
    if found:  # a flag corrects a guess; "encoder.": names in a classifier of ours
        stored = {k: v for k, v in found.settings.items() if k not in found.guesses}
        state = {k.removeprefix("encoder."): v for k, v in found.state.items()}
    size = data.height_width(stored.get("img_size", cfg.img_size))
    if "pos_embed_grid" in state:  # a MultiMAE of ours that was fine-tuned at another size
        size = tuple(n * cfg.patch for n in state["pos_embed_grid"][1:].tolist())
    shape = encoder_size(cfg.size), (4, 0, 1)  # the decoder will go: the smallest there is
    if cfg.model == "mae":
        encoder = MAE(size, cfg.patch, *shape)
    elif cfg.model == "multimae":
        encoder = MultiMAE(size, cfg.patch, *shape, planes_of(cfg), cfg.classes, cfg.class_width,
                           cfg.ignore)
        if cfg.dense:  # read from the files, but not for the encoder
            del encoder.input_adapters[cfg.dense]
    else:
        options = {}
        if found and cfg.model == "mae_st":
            options = {"separable": "pos_embed" not in state, "cls": "cls_token" in state}
        frames = stored.get("frames", cfg.frames)
        encoder = MODELS[cfg.model](frames, size, cfg.tubelet, cfg.patch, *shape, **options)
    frozen = cfg.mode in FROZEN
    keeps_norm = frozen or cfg.model == "mae_st" or cfg.pool == "first"
    fresh_norm = not keeps_norm or cfg.model == "multimae"
    model = Classifier(encoder, classes, cfg.pool, fresh_norm, cfg.drop_path, cfg.dropout,
                       "blocks.0.gamma_1" in state, frozen)
    if found:
        load_encoder(model, state, cfg, found.path, fresh_norm)
    # built for the size in the file; now for the size that is wanted
    frames, tubelet = (cfg.frames, cfg.tubelet) if hasattr(encoder, "tubelet") else (1, 1)
    change_grid(encoder, grid_of(frames, data.height_width(cfg.img_size), tubelet, cfg.patch))
    if cfg.dense:
        model = DenseHead(encoder, model.norm, parse_modalities(cfg.inputs))
    return model


def load_encoder(model, state, cfg, path, fresh_norm):
    """Copy a file's weights into a classifier, every one if it is tested."""
    new = [] if cfg.eval_only or cfg.predict else ["head"] + ["norm"] * fresh_norm
    names = {r"^(?!norm\.|fc_norm\.|head\.)": "encoder.", r"^fc_norm\.": "norm."}
    if new:  # what the file has of these is set aside
        names[rf"^({'|'.join(new)})\."] = r"old.\1."
    fresh = new + ["encoder.pos_embed"] * (not isinstance(model.encoder, MAEST))  # a fixed table
    unused = ["old.", "encoder.input_adapters.", *(f"encoder.{name}" for name in DECODER)]
    count, _ = load_into(model, rename(state, names), fresh, unused)
    if not cfg.resume:
        report(f"{path}: {count} tensors used; new: {', '.join(new) or 'nothing'}")


def as_it_was_built(cfg, found):
    """A classifier is tested with the head, the pooling and the inputs that it was built with."""
    if not any(k in found.state for k in ("head.weight", "head.1.weight")):
        raise ValueError(f"{found.path} holds an encoder, no classifier: fine-tune it first")
    pool = "mean" if "fc_norm.weight" in found.state or cfg.model in ("mae_st", "omni") else "first"
    cfg.pool = found.settings.get("pool", pool)
    cfg.mode = "linear" if "head.1.weight" in found.state else "finetune"


# ==== THE RUN, part 3: data, results, main ========================================================
def open_images(files, cfg, train):
    """Images, with the maps that belong to them where some are needed."""
    planes = planes_of(cfg)
    if planes == ["rgb"]:
        return data.ImageDataset(files, cfg, train)
    return AlignedDataset(files, planes, cfg, train)


def open_data(cfg):
    """-> dataset for training, files for training, files for testing.

    Raises ValueError for data from which nothing can be learnt
    """
    if is_video(cfg):
        train, test = list_both(cfg, data.list_videos, cfg.data, cfg.fold)
    else:
        root = Path(cfg.data, planes_of(cfg)[0]) if cfg.model == "multimae" else cfg.data
        train, test = list_both(cfg, data.list_images, root)
    if not cfg.dense and cfg.mode != "features":
        train, test = (files.select(files.labels >= 0) for files in (train, test))
        names = train.classes
        report(f"of known class: {len(train.paths)} training files of {len({*train.labels})} of "
               f"the {len(names)} classes, {len(test.paths)} held out")
        if len(names) < 2:
            raise ValueError(f"{cfg.data} has one class or none: {', '.join(names)}. Is it the "
                             "right folder? Classes are folders, or labels in a list")
        if test.labels.max(initial=-1) >= len(names):
            raise ValueError(f"{cfg.data} has labels beyond the {len(names)} classes in training")
    train = take_share(train, cfg.share, cfg.seed)
    open_files = ClipDataset if is_video(cfg) else open_images
    dataset = open_files(train, cfg, True)
    if cfg.rand_augment:
        dataset = Augmented(dataset, cfg)
    return dataset, train, test


def take_share(files, share, seed):
    """A share of the files of each class, at least one, always the same for a seed."""
    keep = []
    for label in np.unique(files.labels):
        own = np.flatnonzero(files.labels == label)
        order = torch.randperm(len(own), generator=data.seeded(seed, 7, max(label, 0))).numpy()
        keep += own[order[: max(1, round(share * len(own)))]].tolist()
    return files.select(sorted(keep))


def write(cfg, name, content):
    """A file in --out, whole or not at all, by the first process."""
    if is_first():
        data.write_whole(Path(cfg.out, name), lambda part: part.write_bytes(content))


def write_results(probabilities, files, cfg):
    """Print accuracies; write predictions.csv, results.json, confusion.png.   -> the last line"""
    classes, s = files.classes, summarise(probabilities, torch.from_numpy(files.labels))
    five = f", top-5 {s['top5']:.1%}" * (len(classes) > 5)
    report(f"test: {s['files']} files x {s['views']} views")
    report(f"  of files: top-1 {s['top1']:.1%}{five}, mean over classes {s['class_mean']:.1%}")
    report(f"  of single views: top-1 {s['view_top1']:.1%}")
    report(f"  always the most frequent class: {s['most_frequent']:.1%}")
    table = csv.writer(text := io.StringIO())
    table.writerow(["path", "label", "answer", "score"])
    for path, label, p in zip(files.paths, files.labels, probabilities.mean(dim=1)):
        row = [path, classes[label], classes[p.argmax()], f"{p.max():.4f}"]
        # a spreadsheet must not take a name for a formula
        table.writerow([re.sub("^([=+@-])", r"'\1", cell) for cell in row])
    # surrogateescape: a name on a disk need not be valid text, and is written as it is
    write(cfg, "predictions.csv", text.getvalue().encode("utf-8", "surrogateescape"))
    s |= {"mode": cfg.mode, "init": cfg.init or cfg.default_file()}
    write(cfg, "results.json", json.dumps(s, indent=1).encode())
    # a row for each class, a column for each answer; the darker, the more often
    confusion, color = torch.tensor(s["confusion"]), torch.tensor([0.8, 0.65, 0.2])
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    cells = 1 - share[..., None, None, None] * color[:, None, None]  # (C, C, 3, 1, 1)
    columns = [f"{i}" for i in range(1, len(classes) + 1)]
    rows = [f"{i} {name}" for i, name in zip(columns, classes)]
    table = picture_table(cells, columns, rows, "rows: true class, columns: answer", 24)
    save_picture(table, Path(cfg.out, "confusion.png"))
    return f"top-1 {s['top1']:.1%} (most frequent class {s['most_frequent']:.1%})"


def draw_neighbours(test_files, train_files, neighbours, cfg):
    """neighbours.png: some test files, each beside the training files that are most like it."""
    test, train = (ViewDataset(files, cfg, False) for files in (test_files, train_files))
    some, rows = evenly(len(test)).tolist(), []
    for i in some:
        views = [test[i][0], *(train[k][0] for k in neighbours[i, :5].tolist())]
        frames = [x.flatten(0, -4) for x in views]  # each (frames, H, W, planes)
        rows.append(torch.stack([x[len(x) // 2, ..., :3] for x in frames]))
    cells = torch.stack(rows).movedim(-1, 2) / 255  # (8, 6, 3, H, W)
    names = [test_files.classes[test_files.labels[i]] for i in some]
    table = picture_table(cells, ["test", "training files, nearest first"], names)
    save_picture(table, Path(cfg.out, "neighbours.png"))


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they are
def main(argv=None):
    cfg, found, device = begin(Config, PRESETS, __doc__, READERS, argv)
    tested = cfg.eval_only or cfg.predict
    if tested:
        as_it_was_built(cfg, found)
    if cfg.pool == "paper":
        cfg.pool = "first" if cfg.model == "mae" and cfg.mode in FROZEN else "mean"
    if cfg.mode == "linear":
        cfg.lr, cfg.rand_augment = cfg.probe_lr, 0
        cfg.erase = cfg.mixup = cfg.cutmix = cfg.dropout = 0.0
    if cfg.dense and (cfg.model != "multimae" or tested or cfg.mode in FROZEN
                      or cfg.dense in parse_modalities(cfg.inputs)):
        raise ValueError(f"--dense {cfg.dense} takes --model multimae, --mode finetune or scratch, "
                         "training, and other --inputs")
    if cfg.model == "multimae" and (cfg.erase or cfg.rand_augment or cfg.mixup or cfg.cutmix):
        raise ValueError("--model multimae takes no --erase, --rand-augment, --mixup or --cutmix")
    if found and (fold := found.settings.get("fold", cfg.fold)) != cfg.fold:
        report(f"warning: {found.path} has seen fold {fold}, and with it tests of fold {cfg.fold}")
    if cfg.predict:
        return predict(cfg, found, device)
    own_results = cfg.mode == "knn" or cfg.eval_only and cfg.init
    if own_results and Path(cfg.out, "checkpoint.pt").exists():
        raise ValueError(f"{cfg.out} holds a run, whose results would be lost: name another --out")
    fetch(cfg.data)
    dataset, train_files, test_files = open_data(cfg)
    classes = test_files.classes = train_files.classes
    if cfg.eval_only and found.classes and found.classes != classes:
        raise ValueError(f"{cfg.data} has other classes than {found.path}")
    model = build(cfg, max(len(classes), 1), None if cfg.mode == "scratch" else found).to(device)
    if cfg.mode in ("knn", "features"):
        result = use_features(model, train_files, test_files, cfg)
    elif cfg.eval_only:
        result = write_results(*run_views(model, test_files, cfg, model.answers), cfg)
    else:
        return train_classifier(model, dataset, test_files, cfg)
    report(f"done: {result}, see {cfg.out}")


def train_classifier(model, dataset, test_files, cfg):
    """Supervised training, then the test."""
    classes, one_view = len(dataset.classes), dataclasses.replace(cfg, clips=1, crops=1)
    if cfg.mode == "linear":  # without weight decay: MAE Table 10
        optimizer = LARS(model.head.parameters(), momentum=0.9)
    else:
        decay = 1.0 if cfg.mode == "scratch" else cfg.layer_decay
        optimizer = torch.optim.AdamW(layer_groups(model, cfg.weight_decay, decay),
                                      betas=(0.9, 0.999), fused=True)

    def loss_of(net, batch, items, step, piece):
        # clips of one video stand together
        labels = torch.from_numpy(dataset.labels[items].repeat(dataset.repeat)).to(batch.device)
        x = erase(model.encoder.normalize(batch), cfg.erase)
        x, labels = mix(x, labels, classes, cfg.mixup, cfg.cutmix)
        if cfg.dense:
            return model.loss(net(x), x)
        return F.cross_entropy(net(x).float(), labels, label_smoothing=cfg.smoothing)

    def look(path):
        """One view of every test file, for the log only; what is reported is the final test."""
        answers, files = run_views(model, test_files, one_view, model.answers)
        if cfg.dense:
            return model.score(answers[:, 0])
        answers, labels = answers[:, 0], torch.from_numpy(files.labels)
        loss = F.nll_loss(answers.clamp(min=1e-9).log(), labels).item()
        top1 = (answers.argmax(dim=1) == labels).float().mean().item()
        return {"val_loss": loss, "baseline": math.log(classes), "top-1": top1}

    run, result = train(model, dataset, loss_of, optimizer, look, cfg), ""
    if cfg.dense and not run.stopping:
        run.scores = look(None)
        write(cfg, "results.json", json.dumps({"task": cfg.dense, **run.scores}).encode())
    elif not run.stopping:
        answers = run_views(model, test_files, cfg, model.answers)
        result = f"{cfg.mode}: {write_results(*answers, cfg)}"
    run.finish(result)


def use_features(model, train_files, test_files, cfg):
    """--mode knn: classify by the nearest training files; features: save a vector of every file."""
    cfg, kept = dataclasses.replace(cfg, clips=1, crops=1), []
    for files in (train_files, test_files):
        x, files = run_views(model, files, cfg, model.features)
        kept.append((x[:, 0], files))  # x (files, D)
    (x, known), (y, asked) = kept
    if cfg.mode == "knn":
        votes, neighbours = nearest_neighbours(
            x, torch.from_numpy(known.labels), y, len(known.classes))
        result = write_results(votes[:, None], asked, cfg)
        if planes_of(cfg)[0] == "rgb":
            draw_neighbours(asked, known, neighbours, cfg)
        return result
    np.savez(file := io.BytesIO(),
             train_features=x, train_labels=known.labels, train_paths=known.paths,
             test_features=y, test_labels=asked.labels, test_paths=asked.paths)
    write(cfg, "features.npz", file.getvalue())
    return f"{len(x)} training and {len(y)} test files, vectors of {x.shape[1]} numbers"


def predict(cfg, found, device):
    """The five most likely classes of one file, their probabilities: the mean over its views."""
    if planes_of(cfg) != ["rgb"]:
        raise ValueError(f"--predict: {found.path} needs {cfg.inputs}, not one file")
    head = found.state.get("head.weight", found.state.get("head.1.weight"))
    classes = found.classes or [f"class {i}" for i in range(len(head))]
    model = build(cfg, len(classes), found).to(device)
    one = data.one_file(cfg.predict, data.VIDEO if is_video(cfg) else data.IMAGE, classes)
    cfg.workers = 0
    answers, _ = run_views(model, one, cfg, model.answers)
    for p, i in zip(*answers[0].mean(dim=0).topk(min(5, len(classes)))):
        report(f"{p:6.1%}  {classes[i]}")


if __name__ == "__main__":
    run_script(main)
