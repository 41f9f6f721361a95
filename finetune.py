"""finetune.py - what the pretraining was for: a classifier around the pretrained encoder, and how it is tested.

Fine-tunes, probes or trains from scratch on labelled images or videos, tests with several views, and writes
predictions, a confusion matrix and results. Takes our checkpoints and public ones of all five papers.

Papers  MAE 2111.06377 (App. A.1), VideoMAE 2203.12602 (App. 7), MAE-ST 2205.09113 (Sec. 4), all arXiv
Covers  MAE App. A.1 "End-to-end fine-tuning", Table 9    Classifier, layer_groups, mix, Augmented
        MAE App. A.1 "Linear probing", Table 10           Classifier(frozen=True), LARS; --mode linear
        VideoMAE Table 2 "from scratch"                   --mode scratch: no weights, no layer decay
        MAE-ST Sec. 4 "Settings", VideoMAE App. 7         ViewDataset, summarise: clips x crops views
        MAE-ST App. A, last paragraph (image -> video)    inflate
        random erasing (arXiv 1708.04896)                 erase
        not in the papers                                 nearest_neighbours; --mode knn
Not     detection; MAE's segmentation (App. A.4), recipe from scratch (App. A.2) and partial fine-tuning
        (Fig. 9); VideoMAE's probe (SGD, Table 11)

The four modes answer different questions. finetune: is the encoder a good place to start from? scratch: what
would it have learnt without? linear and knn: what does the encoder know already? Masked autoencoders are strong
in the first and weak in the last two (VideoMAE Table 3: 69.6 fine-tuned, 38.9 linear): do not expect miracles of
a probe.

Run     python finetune.py                                (4 min on 2 CPU cores, after python mae_video.py)
        python finetune.py --mode scratch --out runs/scratch      (the same network without pretraining)
        python finetune.py --mode linear --out runs/linear        (--mode knn needs no training at all)
        python finetune.py --data UCF101 --preset ucf101 --init runs/ucf101/checkpoint.pt --out runs/ucf101_ft
        python finetune.py --predict clip.avi                     (with the classifier in runs/finetune)
        It ends with "done: top-1 ... see runs/finetune".
Next    this is the last file. tests/ shows what was checked, and how.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import time
import typing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
from mae_image import (
    DECODER,
    ENCODERS,
    MAE,
    RunConfig,
    choose_precision,
    encoder_size,
    fetch,
    height_width,
    load_into,
    parts_of,
    public_mae,
    rank_and_world,
    read_config,
    save_picture,
    sincos_2d,
    start_processes,
    train,
)
from mae_video import MAEST, ClipDataset, VideoMAE, public_maest, public_videomae, resize_table, views_of
from masking import is_first, picture_table, report, run_script
from multimae import MODALITIES, PLANES, AlignedDataset, DenseHead, MultiMAE, list_aligned, parse_modalities, public_multimae
from omni import OmniMAE, public_omni

MODELS = {"mae": MAE, "videomae": VideoMAE, "mae_st": MAEST, "omni": OmniMAE, "multimae": MultiMAE}
READERS = {"multimae": public_multimae, "omni": public_omni, "mae": public_mae, "mae_st": public_maest,
           "videomae": public_videomae}  # fmt: skip


# ==================================================================================================
#  THE PAPERS, part 1: a classifier around the encoder
#  (needs: torch; mae_image.py DECODER, part 3; mae_video.py resize_table, part 3)
# ==================================================================================================


class TunedBlock(nn.Module):
    """The pretrained block with what only fine-tuning adds; the names of its tensors stay.

    drop_path    chance that a sample skips each half of the block (stochastic depth, arXiv 1603.09382); in training
    layer_scale  0: none; else a learned factor per channel, begun here (an option of VideoMAE's public code)
    """

    def __init__(self, block, drop_path, layer_scale):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.drop_path, width = drop_path, block.norm1.normalized_shape[0]
        for name in ("gamma_1", "gamma_2"):
            scale = nn.Parameter(torch.full((width,), float(layer_scale))) if layer_scale else None
            self.register_parameter(name, scale)

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

    x       what the encoder's `encode` takes, e.g. clips (B, C, T, H, W), normalised;   logits (B, classes)
    pool    "mean" over the tokens without the class token (MultiMAE's global token does count), or "first": the class
            token. Models without one take their first cube or patch, as VideoMAE's public code does with --use_cls
    fresh_norm  the norm before the head is new. Fine-tuned, MAE, VideoMAE and OmniMAE throw the pretrained final norm
            away, MultiMAE has none; MAE-ST, every probe, and pool "first" keep the pretrained one
    frozen  linear probing: BatchNorm without affine before the linear layer, and nothing else learns or moves

    The norm comes after the pooling everywhere. For "first" that is no difference: LayerNorm looks at one token.
    """

    def __init__(self, encoder, classes, pool="mean", fresh_norm=True, drop_path=0.0, dropout=0.0, layer_scale=0.0,
                 frozen=False):  # fmt: skip
        super().__init__()
        drop_decoder(encoder)
        D, depth = encoder.blocks[0].norm1.normalized_shape[0], len(encoder.blocks)
        self.pool, self.frozen, self.WARMUP_INCLUSIVE = pool, frozen, encoder.WARMUP_INCLUSIVE
        # important: MAE-ST leaves token 0 out even when it has no class token, and so loses a cube (public code)
        self.skip = 1 if isinstance(encoder, (MAE, MAEST)) else 0
        self.norm = nn.LayerNorm(D, eps=1e-6) if fresh_norm else encoder.norm
        encoder.norm = nn.Identity()
        rates = torch.linspace(0, drop_path, depth).tolist()  # deeper blocks are skipped more often
        encoder.blocks = nn.ModuleList([TunedBlock(b, r, layer_scale) for b, r in zip(encoder.blocks, rates)])
        own_positions(encoder)
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        linear = nn.Linear(D, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01 if frozen else 2e-5)
        nn.init.zeros_(linear.bias)
        # MAE App. A.1: without the BatchNorm each model would need its own learning rate for the probe
        self.head = nn.Sequential(nn.BatchNorm1d(D, affine=False, eps=1e-6), linear) if frozen else linear
        if frozen:
            self.encoder.requires_grad_(False)
            self.norm.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def features(self, x):
        """-> (B, D): one vector per sample."""
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            tokens = self.encoder.encode(x)  # (B, N, D), with the class token where there is one
            pooled = tokens[:, 0] if self.pool == "first" else tokens[:, self.skip :].mean(dim=1)  # (B, D)
            return self.norm(pooled)

    def forward(self, x):
        return self.head(self.dropout(self.features(x)))

    def loss(self, logits, x, labels, smoothing):
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    def answers(self, x):
        """-> (B, classes): probabilities."""
        return self(x).softmax(dim=-1)


def drop_decoder(model):
    """The decoder has done its work: MAE Sec. 3 "MAE decoder"."""
    for parts in (model._modules, model._parameters, model._buffers):
        for name in [n for n in parts if n.startswith(DECODER)]:
            del parts[name]


def own_positions(encoder):
    """Fixed positions enter the state dict, since they may be resized; MAE's public code even trains them."""
    if isinstance(encoder, MAE):
        table = encoder.pos_embed
        del encoder.pos_embed
        encoder.pos_embed = nn.Parameter(table)
    elif "pos_embed" in encoder._buffers:
        encoder.register_buffer("pos_embed", encoder.pos_embed, persistent=True)


def change_grid(encoder, new):
    """Another image size or clip length than in pretraining: every table of positions is interpolated.

    DIFFERS from VideoMAE's public code, which makes a new sine table: then every token has another position than in
    pretraining. MultiMAE resizes its positions to every input itself.
    """
    old = encoder.grid
    if old == tuple(new) or isinstance(encoder, MultiMAE):
        return
    encoder.grid = tuple(new)
    tables = {
        "pos_embed_spatial": ((1, *old[1:]), (1, *new[1:])),
        "pos_embed_temporal": ((old[0], 1, 1), (new[0], 1, 1)),
        "pos_embed": (old, new),
    }
    for name, (a, b) in tables.items():
        if (table := getattr(encoder, name, None)) is not None:
            extra = table.shape[1] - math.prod(a)  # MAE-ST's joint table begins with the class token's row
            resized = torch.cat([table[:, :extra], resize_table(table[:, extra:].detach(), a, b)], dim=1)
            learns = isinstance(table, nn.Parameter)  # not in a probe
            setattr(encoder, name, nn.Parameter(resized.detach(), table.requires_grad) if learns else resized)


# ==================================================================================================
#  THE PAPERS, part 2: the recipe   (needs: torch, torchvision; data.py seeded, torchvision_draws_from)
# ==================================================================================================


def layer_groups(model, weight_decay, layer_decay):
    """AdamW's groups: layer-wise decay of the learning rate, MAE App. A.1 (from BEiT, arXiv 2106.08254).

    Layer 0 is the embedding with tokens and positions, block i is layer i + 1, norm and head are the last; a layer
    learns `layer_decay` times as fast as the one above it (ViT-B at 0.75: the embedding at 0.75^13 = 2.4 % of the
    head's rate). Vectors, tokens and positions have no weight decay.

    OmniMAE's public code counts one step more (its head learns layer_decay times as fast, and so on down): the
    same as ours at layer_decay times the learning rate.
    """
    last, groups = len(model.encoder.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        layer = 0 if name.startswith("encoder.") else last
        layer = int(block[1]) + 1 if block else layer
        plain = parameter.ndim < 2 or "_token" in name or "pos_embed" in name
        new = {"params": [], "lr_scale": layer_decay ** (last - layer), "weight_decay": 0.0 if plain else weight_decay}
        groups.setdefault((layer, plain), new)["params"].append(parameter)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled to each matrix: MAE App. A.1 "Linear probing" (arXiv 1708.03888).

    A matrix moves by lr x trust x its own norm, whatever the length of its gradient. Vectors: plain momentum SGD.
    """

    def __init__(self, groups, lr=0.1, momentum=0.9, trust=0.001):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    norms = p.norm() * update.norm()
                    update = update * torch.where(norms > 0, group["trust"] * p.norm() / update.norm(), 1.0)
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(buffer.mul_(group["momentum"]).add_(update), alpha=group["lr"])


def mix(x, labels, classes, mixup, cutmix):
    """Mixup or CutMix, one of them at random, of the samples of a batch: MAE Table 9.

    -> x, labels (B,) or soft (B, classes).   All frames of a clip are mixed alike: to torchvision they are channels."""
    kinds = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    if not kinds:
        return x, labels
    order = torch.randperm(len(x))  # torchvision mixes neighbours, and with --repeat those are clips of one video
    x, labels = x[order], labels[order]
    mixed, labels = kinds[int(torch.rand(1) * len(kinds))](x.flatten(1, -3), labels)  # (B, C*T, H, W)
    return mixed.reshape(x.shape), labels


def erase(x, chance):
    """Random erasing (arXiv 1708.04896): the same box in all frames, filled with new noise.   x (B, C, [T,] H, W)"""
    eraser = v2.RandomErasing(p=chance, value="random")
    return torch.stack([eraser(sample.flatten(0, -3)).reshape(sample.shape) for sample in x]) if chance else x


class Augmented(Dataset):
    """A dataset of data.py with RandAugment (arXiv 1909.13719) on top of crop and flip.

    All frames of a clip get the same operations. important: frames augmented one by one would flicker, and the
    network would learn from motion that is not there.
    DIFFERS from the official code (timm's): torchvision's operations and scale, after the crop and not before it,
    without noise on the magnitude, and each operation always, not with a chance of 0.5.
    """

    def __init__(self, dataset, operations, magnitude):
        self.dataset, self.repeat = dataset, dataset.repeat
        self.paths, self.labels, self.classes = dataset.paths, dataset.labels, dataset.classes
        self.augment = v2.RandAugment(operations, magnitude, num_magnitude_bins=11)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        pixels, number, problems = self.dataset[key]
        with data.torchvision_draws_from(data.seeded(self.dataset.seed, 5, *key)):
            pixels = torch.stack([self.augment(x.movedim(-1, -3)).movedim(-3, -1) for x in pixels])
        return pixels, number, problems


# ==================================================================================================
#  THE PAPERS, part 3: testing      (needs: torch, torchvision, is_video, planes_of, open_aligned;
#  data.py parts 2-4; mae_image.py choose_precision, rank_and_world; mae_video.py part 4;
#  multimae.py MODALITIES, PLANES, parse_modalities, part 4; masking.py report)
# ==================================================================================================


def spatial_views(pixels, size, crops):
    """Whole frame to `size`, then `crops` boxes at even distances along what is too long; one: the middle.

    uint8 (T, H, W, 3) -> (crops, T, *size, 3)"""
    (H, W), (h, w) = pixels.shape[1:3], size
    if crops == 1:
        return data.make_crop(pixels, size, data.center_box((H, W), size))[None]
    scale = max(h / H, w / W)
    H, W = max(h, round(H * scale)), max(w, round(W * scale))
    x = TF.resize(torch.from_numpy(pixels).permute(0, 3, 1, 2), [H, W], antialias=True)  # (T, 3, H, W)
    views = []
    for i in range(crops):
        top, left = round(i * (H - h) / (crops - 1)), round(i * (W - w) / (crops - 1))
        views.append(x[..., top : top + h, left : left + w])
    return torch.stack(views).permute(0, 1, 3, 4, 2).contiguous()


class ViewDataset(Dataset):
    """dataset[i] -> uint8 (clips * crops, T, H, W, 3), i, [(path, problem)]: all views of a file, no randomness.

    Images have one view, the whole centre (DIFFERS from MAE's public code: resized to 256, cropped to 224). A
    broken file gives None and is named: it is never replaced by another one, as in training, or its label would
    count twice.
    """

    def __init__(self, files, cfg, clips, crops):
        self.files, self.cfg, self.clips, self.crops = files, cfg, clips, crops
        self.size = height_width(cfg.img_size)
        several = cfg.model == "multimae" and planes_of(cfg) != ["rgb"]
        self.aligned = open_aligned(files, cfg, train=False) if several else None
        self.images = data.ImageDataset(files, self.size, 0, train=False)

    def __len__(self):
        return len(self.files.paths)

    def __getitem__(self, i):
        path, cfg = self.files.paths[i], self.cfg
        try:
            if not is_video(cfg):
                pixels, problem = (self.aligned or self.images).read(i, None)
            else:
                clips, problem = data.read_clips(path, lambda n: views_of(cfg.sampling, n, cfg.frames, cfg.stride, self.clips))
                pixels = torch.cat([spatial_views(clip, self.size, self.crops) for clip in clips])
            return data.share(pixels), i, [(str(path), problem)] if problem else []
        except data.BrokenFile as error:
            return None, i, [(str(path), f"broken, left out: {error}")]


def run_views(model, files, cfg, clips, crops, output):
    """output(x), a method of the model, of every view of every file -> (files, views, width); NaN for broken files.

    Each process takes every world-th file, so each is done exactly once, whatever the number of files."""
    (rank, world), device = rank_and_world(), next(model.parameters()).device
    own, views = range(rank, len(files.paths), world), clips * crops if is_video(cfg) else 1
    dtype, outputs, problems = choose_precision(cfg, device), {}, []
    loader = data.start_loader(ViewDataset(files, cfg, clips, crops), cfg.workers, sampler=own, batch_size=None)
    size = max(cfg.batch // (world * cfg.accum), 1)  # of a forward pass, as in training
    waiting, begin = [], time.monotonic()
    shown = begin
    model.eval()

    def flush():
        """The network's answers to the views that were collected."""
        x = torch.cat([pixels for _, pixels in waiting])
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            parts = [output(model.encoder.normalize(part.to(device))).float().cpu() for part in x.split(size)]
        for (i, _), answer in zip(waiting, torch.cat(parts).unflatten(0, (len(waiting), -1))):
            outputs[i] = answer
        waiting.clear()

    for done in range(1, len(own) + 1):
        pixels, i, found = data.take(loader)
        problems += found
        if pixels is not None:
            waiting.append((i, pixels))
        if waiting and (len(waiting) * views >= size or done == len(own)):
            flush()
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            report(f"testing: {done} of {len(own)} files, {(shown - begin) / done * (len(own) - done):.0f} s left")
    everything = [(outputs, problems)] * world
    if world > 1:
        torch.distributed.all_gather_object(everything, (outputs, problems))
    for path, problem in (one for _, found in everything for one in found):
        report(f"{path}: {problem}")
    outputs = {i: answer for part, _ in everything for i, answer in part.items()}
    if not outputs:
        raise ValueError("not one file could be read")
    answers = torch.stack(list(outputs.values()))
    if not answers.isfinite().all():
        raise ValueError("the network's answers are not finite: try --precision float32")
    results = torch.full((len(files.paths), *answers.shape[1:]), math.nan)
    results[list(outputs)] = answers
    return results


def summarise(probabilities, labels):
    """Accuracy of single views and of files.   probabilities (N, views, classes), labels (N,) -> dict

    important: the two are different numbers, and papers report the second: the softmax averaged over all views of
    a video. Comparing one with the other is the most common way not to reproduce a result.
    Files that could not be read (NaN) are left out.
    """
    good = probabilities[:, 0, 0].isfinite()
    probabilities, labels = probabilities[good], labels[good]
    N, V, C = probabilities.shape
    video, clips = probabilities.mean(dim=1), probabilities.flatten(0, 1)  # (N, C), (N*V, C)

    def share(p, y, k):
        return (p.topk(min(k, C)).indices == y[:, None]).any(dim=1).double().mean().item()

    confusion = torch.zeros(C, C).index_put((labels, video.argmax(dim=1)), torch.ones(N), accumulate=True)
    count = confusion.sum(dim=1)
    per_class = confusion.diag() / count  # NaN where there is no test file
    return {"files": N, "unreadable": int((~good).sum()), "views": V, "top1": share(video, labels, 1),
            "top5": share(video, labels, 5), "view_top1": share(clips, labels.repeat_interleave(V), 1),
            "view_top5": share(clips, labels.repeat_interleave(V), 5), "class_mean": per_class.nanmean().item(),
            "most_frequent": (count.max() / N).item(), "per_class": per_class.tolist(),
            "confusion": confusion.int().tolist()}  # fmt: skip


def nearest_neighbours(train, train_labels, test, classes, k=20, temperature=0.07):
    """Weighted vote of the k nearest training features (arXiv 1805.01978).

    (n, D), (n,), (m, D) -> votes (m, classes), numbers of the neighbours (m, k)
    Nearness is the cosine after subtracting the mean of the training features; a neighbour's vote weighs
    exp(cosine / temperature)."""
    mean, votes, neighbours = train.mean(dim=0), [], []
    train = F.normalize(train - mean, dim=1)
    for part in test.split(1024):  # all cosines at once would be 250 GB for ImageNet
        weight, index = (F.normalize(part - mean, dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        vote = torch.zeros(len(part), classes).scatter_add(1, train_labels[index], (weight / temperature).exp())
        votes.append(vote / vote.sum(dim=1, keepdim=True))
        neighbours.append(index)
    return torch.cat(votes), torch.cat(neighbours)


# ==================================================================================================
#  THE RUN, part 1: settings
# ==================================================================================================


@dataclasses.dataclass
class Config(RunConfig):
    SCRIPT, BASELINE = "finetune", "uniform guess"

    # what to do
    mode: typing.Literal["finetune", "linear", "scratch", "knn", "features"] = "finetune"  # features: one vector a file
    eval_only: bool = False  # no training: test the classifier in --init, or in --out
    predict: str = ""  # no training: what the classifier in --init, or in --out, says about this one file
    # data
    data: str = "toy"  # UCF101, HMDB51, a folder, a list file or cifar10
    fold: int = 1  # of the official lists: 1, 2 or 3; as in pretraining
    allow_missing: bool = False  # a list may name files that are not there: use the others
    share: float = 1.0  # share of the training files of each class that is used, the same for a --seed
    frames: int = 8  # frames per clip
    stride: int = 2  # frames from one to the next
    sampling: typing.Literal["segments", "dense", "linspace"] = "segments"  # whole video, window, MAE-ST's window
    img_size: str = "48"  # side in pixels, or HEIGHTxWIDTH; other than in pretraining: positions are resized
    # augmentation, none of it in a probe but crop and flip
    min_crop: float = 0.8  # smallest share of the frame that a random crop takes; the public codes have 0.08
    flip: bool = True  # mirror half of the samples; --no-flip where left and right are classes
    repeat: int = 1  # clips of every decoded video: repeated augmentation
    rand_augment: int = 0  # magnitude 0 to 10 of RandAugment, 0: off; the papers' is 9, video codes' 7
    rand_ops: int = 2  # operations of RandAugment; VideoMAE's code has 4
    erase: float = 0.0  # chance that a box is filled with noise; the public codes have 0.25
    mixup: float = 0.0  # alpha of Mixup; the papers' is 0.8
    cutmix: float = 0.0  # alpha of CutMix; the papers' is 1.0
    smoothing: float = 0.0  # label smoothing; the papers' is 0.1
    # model
    model: typing.Literal["mae", "videomae", "mae_st", "omni", "multimae"] = "videomae"  # as in --init, or mae inflated
    classify: typing.Literal["videos", "images"] = "videos"  # --model omni: which of both
    inputs: str = "rgb"  # --model multimae: what the classifier sees, any of rgb,depth,semseg
    dense: typing.Literal["", "semseg", "depth"] = ""  # --model multimae: predict this map, linearly from each patch
    classes: int = 6  # --model multimae: classes of the semantic maps; the toy world has 6
    ignore: int = -1  # --dense semseg: class that does not count (void), -1: none
    class_width: int = 16  # --model multimae: width of a class's learned vector
    size: str = "nano"  # encoder: nano ... huge, or WIDTHxBLOCKSxHEADS
    patch: int = 8  # side of a patch or cube in pixels
    tubelet: int = 2  # frames in a cube
    pool: typing.Literal["paper", "mean", "first"] = "paper"  # paper: mean; of a frozen MAE the class token
    drop_path: float = 0.0  # chance to skip attention or MLP of the last block, lower in earlier ones; papers 0.1-0.2
    dropout: float = 0.0  # before the head
    # optimiser
    epochs: int = 40  # passes over the training files; each gives --repeat samples
    batch: int = 16  # samples per update, over all processes, accumulation steps and repeats
    lr: float = 5e-2  # base rate, for a batch of 256, made for nano; ViT-B: 1e-3
    probe_lr: float = 100.0  # base rate of --mode linear (LARS); the paper's is 0.1, for a batch of 16,384
    warmup: float = 3  # epochs of linear warm-up
    layer_decay: float = 0.9  # rate of a layer: this times that of the one above; papers 0.7-0.75; scratch 1
    # test
    clips: int = 5  # clips of every test video (knn, features: 1); with sampling "segments" 2 is the paper's
    crops: int = 1  # boxes along the long side of every clip; the papers' is 3
    # run
    out: str = "runs/finetune"  # folder for checkpoint, log, predictions and results


_recipe = dict(smoothing=0.1, erase=0.25, rand_augment=7, rand_ops=4, mixup=0.8, cutmix=1.0, repeat=2, crops=3)
_gpu = dict(_recipe, min_crop=0.3, batch=128, lr=1e-3, layer_decay=0.7, drop_path=0.1, epochs=100, warmup=5,
            workers=8)  # fmt: skip
# VideoMAE App. 7 "UCF101", "HMDB51": batch 128, base rates 5e-4 and 1e-3. Our --batch counts both clips of a video,
# so it is twice that and the base rate half. RandAugment, dropout and the end of the cosine: public UCF101 script
_paper = dict(_recipe, min_crop=0.08, batch=256, layer_decay=0.7, drop_path=0.2, dropout=0.5, warmup=5, min_lr=5e-6,
              workers=16)  # fmt: skip
PRESETS = {
    # some hundred clips of your own, on a CPU or one GPU: the recipe of most sets in tests/claims.py
    "small": dict(batch=32, lr=1.6e-2, layer_decay=0.75, drop_path=0.1, smoothing=0.1, min_crop=0.5, epochs=15,
                  warmup=2, clips=2, out="runs/small_ft", init="runs/small/checkpoint.pt"),
    "ucf101": dict(_gpu, clips=5, out="runs/ucf101_ft"),
    "hmdb51": dict(_gpu, clips=10, out="runs/hmdb51_ft"),
    "ucf101_paper": dict(_paper, lr=2.5e-4, epochs=100, clips=5, out="runs/ucf101_paper_ft"),
    "hmdb51_paper": dict(_paper, lr=5e-4, epochs=50, clips=10, out="runs/hmdb51_paper_ft"),
    "cifar10": dict(data="cifar10", smoothing=0.1, drop_path=0.1, batch=512, lr=1e-3, epochs=100, warmup=5,
                    min_crop=0.6, rand_augment=7, mixup=0.8, cutmix=1.0, layer_decay=0.75, out="runs/cifar10_ft",
                    init="runs/mae_cifar10/checkpoint.pt"),
    # MAE Table 9 (ViT-B; the public code has 5e-4 and 0.65), random erasing from the public code
    "mae_paper": dict(smoothing=0.1, min_crop=0.08, erase=0.25, rand_augment=9, mixup=0.8, cutmix=1.0, batch=1024,
                      lr=1e-3, epochs=100, warmup=5, layer_decay=0.75, drop_path=0.1, workers=16),
    # MAE Table 10; the class token of MAE, the mean of others
    "mae_probe_paper": dict(mode="linear", min_crop=0.08, batch=16384, probe_lr=0.1, epochs=90, warmup=10, workers=16),
}  # fmt: skip
FROZEN = ("linear", "knn", "features")  # modes in which the encoder learns nothing


def default_file(cfg):
    """Where a classifier or encoder is looked for without --init."""
    if cfg.eval_only or cfg.predict:
        return f"{cfg.out}/checkpoint.pt"
    script = {"mae": "mae_image", "omni": "omni", "multimae": "multimae"}.get(cfg.model, "mae_video")
    return "" if cfg.mode == "scratch" else f"runs/{script}/checkpoint.pt"


def is_video(cfg):
    return cfg.model in ("videomae", "mae_st") or (cfg.model == "omni" and cfg.classify == "videos")


def planes_of(cfg):
    """The modalities that are read from files: the inputs and, with --dense, the map that is to be painted."""
    inputs = parse_modalities(cfg.inputs)
    if cfg.dense in inputs:
        raise ValueError(f"--dense {cfg.dense} is also among --inputs {cfg.inputs}: nothing would be left to do")
    return [m for m in MODALITIES if m in inputs or m == cfg.dense]


# ==================================================================================================
#  THE RUN, part 2: from a file to a classifier
# ==================================================================================================


def build(cfg, classes, found=None):
    """-> Classifier (or DenseHead), what was loaded in words. Without weights unless `found` has some for it."""
    tested, inflated = cfg.eval_only or bool(cfg.predict), found is not None and found.model != cfg.model
    said = {} if found is None or inflated else found.settings
    size, frames = height_width(said.get("img_size", cfg.img_size)), said.get("frames", cfg.frames)
    state = dict(found.state) if found else {}
    shape = encoder_size(cfg.size), (4, 0, 1)  # the decoder will go: the smallest there is
    if cfg.model == "mae":
        encoder = MAE(size, cfg.patch, *shape)
    elif cfg.model == "multimae":
        encoder = MultiMAE(size, cfg.patch, *shape, planes_of(cfg), cfg.classes, cfg.class_width, cfg.ignore)
    else:
        joint = found is not None and found.model == "mae_st"
        options = {"separable": "pos_embed" not in state, "cls": "cls_token" in state} if joint else {}
        encoder = MODELS[cfg.model](frames, size, cfg.tubelet, cfg.patch, *shape, **options)
    frozen, first = cfg.mode in FROZEN, cfg.pool == "first"
    fresh_norm = cfg.model == "multimae" or not (frozen or cfg.model == "mae_st" or first)
    layer_scale = float("blocks.0.gamma_1" in state)  # its values are in the file
    if inflated:
        state = inflate(state, encoder, height_width(found.settings["img_size"]))
    model = Classifier(encoder, classes, cfg.pool, fresh_norm, cfg.drop_path, cfg.dropout, layer_scale, frozen)
    text = load_encoder(model, state, cfg, found.path, fresh_norm, tested) if found else "from scratch: no weights"
    slots = parts_of(cfg.frames, cfg.tubelet, "clip length") if hasattr(encoder, "tubelet") else 1
    change_grid(encoder, (slots, *(parts_of(side, cfg.patch, "image side") for side in height_width(cfg.img_size))))
    return DenseHead(encoder, model.norm, parse_modalities(cfg.inputs), cfg.dense) if cfg.dense else model, text


def inflate(state, encoder, size):
    """Image MAE -> video encoder: MAE-ST App. A, last paragraph.   size (H, W) of the MAE's images

    The kernel is repeated over the frames of a cube and divided by their number, so that a still clip gives what
    the image gives. Where positions are learned, space takes MAE's fixed table, and time and class token start at zero.
    """
    u = encoder.tubelet
    state = {k: v for k, v in state.items() if k not in ("cls_token", "pos_embed")}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, None].repeat(1, 1, u, 1, 1) / u
    if isinstance(encoder, MAEST):
        D, (t, h, w) = encoder.cls_token.shape[2], encoder.grid
        old = tuple(side // encoder.patch for side in size)
        space = resize_table(sincos_2d(D, *old)[None], (1, *old), (1, h, w))
        state |= {"pos_embed_spatial": space, "pos_embed_temporal": torch.zeros(1, t, D),
                  "pos_embed_class": torch.zeros(1, 1, D), "cls_token": torch.zeros(1, 1, D)}  # fmt: skip
    return state


def load_encoder(model, state, cfg, path, fresh_norm, tested):
    """Copy a file's weights into a classifier, all of them into one that is tested.   -> what was done, in words"""
    if isinstance(model.encoder, MAE) and "pos_embed" in state:  # public: a row for the class token, perhaps trained
        table, extra = state["pos_embed"], state["pos_embed"].shape[1] - math.prod(model.encoder.grid)
        state |= {"pos_embed": table[:, extra:], "cls_token": state["cls_token"] + table[:, :extra].sum(dim=1, keepdim=True)}
    norms = ["norm.", "fc_norm."] if not fresh_norm else []  # the first that is there becomes the one before our head
    norms = ["fc_norm.", "norm."] if tested else norms
    norm = next((n for n in norms if n + "weight" in state), None)
    mapped = {}
    for key, value in state.items():
        if norm and key.startswith(norm):
            key = key.replace(norm, "norm.", 1)
        elif not key.startswith(("head.", "fc_norm.")):
            key = f"encoder.{key}"
        mapped[key] = value
    fresh = [] if tested else ["head."] + ["norm."] * fresh_norm
    unused = ["encoder.norm.", "fc_norm."] + [f"encoder.{name}" for name in DECODER] + ([] if tested else ["head."])
    if not isinstance(model.encoder, MAEST):
        fresh.append("encoder.pos_embed")  # fixed, and not in every file
    seen = parse_modalities(cfg.inputs)  # the map of --dense is painted, not seen
    unused += [f"encoder.input_adapters.{m}." for m in MODALITIES if m not in seen]
    fresh += [f"encoder.input_adapters.{cfg.dense}."] if cfg.dense else []
    count, missing, left = load_into(model, mapped, fresh, unused)

    def groups(names):
        return ", ".join(sorted({k.removeprefix("encoder.").split(".")[0] for k in names})) or "nothing"

    missing = [k for k in missing if "pos_embed" not in k]
    return f"{path}: {count} tensors used; left over, as expected: {groups(left)}; new: {groups(missing)}"


# ==================================================================================================
#  THE RUN, part 3: data, results, main
# ==================================================================================================


def open_aligned(files, cfg, train):
    return AlignedDataset(cfg.data, files, planes_of(cfg), height_width(cfg.img_size), cfg.classes, cfg.ignore,
                          cfg.seed, cfg.min_crop, cfg.flip, train)  # fmt: skip


def open_data(cfg):
    """-> dataset for training, files for training, files for testing."""

    def open_files(split):
        if cfg.model == "multimae":
            return list_aligned(cfg.data, split, planes_of(cfg))
        if is_video(cfg):
            return data.list_videos(cfg.data, split, cfg.fold, cfg.allow_missing)
        return data.list_images(cfg.data, split, cfg.allow_missing)

    train_files, test_files = open_files("train"), open_files("val")
    report(data.describe(train_files, test_files))
    if not cfg.dense and cfg.mode != "features":
        train_files = labelled(train_files, cfg)
        test_files = test_files.select(test_files.labels >= 0)
        check_classes(train_files, test_files, cfg)
    train_files = take_share(train_files, cfg.share, cfg.seed)
    size = height_width(cfg.img_size)
    if cfg.model == "multimae":
        dataset = open_aligned(train_files, cfg, train=True)
    elif is_video(cfg):
        dataset = ClipDataset(train_files, cfg.frames, cfg.stride, size, cfg.seed, cfg.sampling, "random",
                              cfg.min_crop, cfg.flip, cfg.repeat)  # fmt: skip
    else:
        dataset = data.ImageDataset(train_files, size, cfg.seed, cfg.min_crop, cfg.flip)
    if cfg.rand_augment:
        dataset = Augmented(dataset, cfg.rand_ops, cfg.rand_augment)
    return dataset, train_files, test_files


def labelled(files, cfg):
    """The files whose class is known: pretraining has use for the others, too."""
    known = files.labels >= 0
    if not known.any():
        raise ValueError(f"{cfg.data} has no file whose class is known: use class folders or lines 'path label'")
    if not known.all():
        report(f"{known.sum()} of {len(known)} training files have a label: these are used")
    return files.select(known)


def check_classes(train, test, cfg):
    """Raises ValueError for data from which nothing can be learnt."""
    classes = len(train.classes)
    count = np.bincount(train.labels, minlength=classes)
    if classes < 2:
        raise ValueError(f"{cfg.data} has one class, {train.classes[0]}: nothing to tell apart. Is it the right folder?")
    if len(count) > classes or test.labels.max(initial=-1) >= classes:
        raise ValueError(f"labels of {cfg.data} go beyond the {classes} classes of its training files")
    if not count.all() and not cfg.allow_missing:
        raise ValueError(f"class {train.classes[int(count.argmin())]} of {cfg.data} has no training file with a label")
    if empty := classes - len(set(test.labels.tolist())):
        report(f"warning: {empty} of {classes} classes have no test file")


def take_share(files, share, seed):
    """A share of the files of each class, at least one, always the same for a seed: for "few labels" experiments."""
    keep = []
    for label in sorted(set(files.labels.tolist())):
        own = np.flatnonzero(files.labels == label)
        order = torch.randperm(len(own), generator=data.seeded(seed, 7, max(label, 0))).numpy()
        keep += own[order[: max(1, round(share * len(own)))]].tolist()
    return files if share == 1 else files.select(sorted(keep))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_whole(path, lambda file: file.write(content))


def write_results(probabilities, files, cfg):
    """Print accuracies; write predictions.csv, results.json and confusion.png into --out. -> the line for the log"""
    classes, scores = files.classes, summarise(probabilities, torch.from_numpy(files.labels))
    five = "  top-5 {top5:.1%}" if len(classes) > 5 else ""
    left_out = f", {scores['unreadable']} unreadable and left out" if scores["unreadable"] else ""
    report("test: {files} files x {views} views".format(**scores) + left_out)
    report(f"  file level  top-1 {{top1:.1%}}{five}  mean over classes {{class_mean:.1%}}".format(**scores))
    report("  view level  top-1 {view_top1:.1%}".format(**scores))
    report("  always the most frequent class: {most_frequent:.1%}".format(**scores))
    known = sorted((a, name) for name, a in zip(classes, scores["per_class"]) if math.isfinite(a))
    report("  worst classes: " + ", ".join(f"{name} {a:.0%}" for a, name in known[:5]))
    wrong = torch.tensor(scores["confusion"]).fill_diagonal_(0).flatten()
    pairs = [divmod(int(i), len(classes)) + (int(wrong[i]),) for i in wrong.argsort(descending=True)[:5] if wrong[i]]
    if pairs:
        report("  most confused: " + ", ".join(f"{classes[a]} for {classes[b]} {n}x" for a, b, n in pairs))
    if is_first():
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["path", "label"] + [f"{what}{k}" for k in range(1, 6) for what in ("class", "score")])
        for path, label, p in zip(files.paths, files.labels, probabilities.mean(dim=1)):
            best = [(c, f"{s:.4f}") for c, s in top5(p, classes)] if p.isfinite().all() else [("unreadable", "")]
            row = [str(path), classes[label], *sum(best, ())]
            table.writerow(["'" + cell if cell[:1] in "=+-@" and cell else cell for cell in row])  # no formula
        # surrogateescape: a name on a disk need not be valid text, and is written as it is
        write(Path(cfg.out, "predictions.csv"), text.getvalue().encode("utf-8", "surrogateescape"))
        scores |= {"per_class": {name: a for a, name in known}, "mode": cfg.mode, "init": cfg.init}
        write(Path(cfg.out, "results.json"), json.dumps(scores, indent=1).encode())
        share = torch.tensor(scores["confusion"]).float()
        share = (share / share.sum(dim=1, keepdim=True).clamp(min=1))[:, :, None, None, None]
        cells = 1 - share * torch.tensor([0.8, 0.65, 0.2])[:, None, None].expand(-1, 24, 24)  # (C, C, 3, 24, 24)
        names = [f"{i} {name}" for i, name in enumerate(classes, 1)]
        note = "a row for each class, a column for each answer"
        table = picture_table(cells, [str(i) for i in range(1, len(classes) + 1)], names, note, side=24)
        save_picture(table, Path(cfg.out, "confusion.png"))
    return "top-1 {top1:.1%} (most frequent class {most_frequent:.1%})".format(**scores)


def top5(probabilities, classes):
    """-> [(class name, probability), ...], the five most likely first."""
    best = probabilities.topk(min(5, len(classes)))
    return [(classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist())]


def draw_neighbours(test_files, train_files, neighbours, cfg):
    """neighbours.png: some test files, each beside the training files that are most like it."""
    some = np.linspace(0, len(neighbours) - 1, min(8, len(neighbours))).astype(int)
    views, rows = [ViewDataset(files, cfg, 1, 1) for files in (test_files, train_files)], []
    for i in some:
        pixels = [views[0][i][0], *(views[1][int(k)][0] for k in neighbours[i][:5])]
        rows.append(torch.stack([x.flatten(0, -4)[x.flatten(0, -4).shape[0] // 2, ..., :3] for x in pixels]))
    cells = torch.stack(rows).permute(0, 1, 4, 2, 3) / 255  # (8, 6, 3, H, W)
    titles = ["test", "nearest", "2nd", "3rd", "4th", "5th"]
    names = [test_files.classes[test_files.labels[i]] for i in some]
    save_picture(picture_table(cells, titles[: cells.shape[1]], names), Path(cfg.out, "neighbours.png"))


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they are
def main(argv=None):
    cfg, found = read_config(Config, PRESETS, __doc__, READERS, argv, default_file)
    device, tested = start_processes(cfg), cfg.eval_only or bool(cfg.predict)
    if found and found.script == "finetune":  # names as if it were a public file
        found.state = {k.removeprefix("encoder.") if k.startswith("encoder.") else k.replace("norm.", "fc_norm.", 1): v
                       for k, v in found.state.items()}  # fmt: skip
    if tested:
        cfg = as_it_was_built(cfg, found)
    if cfg.pool == "paper":
        cfg = dataclasses.replace(cfg, pool="first" if cfg.model == "mae" and cfg.mode in FROZEN else "mean")
    if cfg.mode == "linear":
        cfg = dataclasses.replace(cfg, lr=cfg.probe_lr, erase=0.0, rand_augment=0, mixup=0.0, cutmix=0.0, dropout=0.0)
    if found and found.settings.get("fold", cfg.fold) != cfg.fold:
        report(f"warning: {found.path} has seen fold {found.settings['fold']}: test files of fold {cfg.fold} are among it")
    torch.manual_seed(cfg.seed)
    if cfg.predict:
        return predict(cfg, found, device)
    if (cfg.eval_only or cfg.mode == "knn") and Path(cfg.out, "checkpoint.pt").exists() and cfg.init:
        raise ValueError(f"{cfg.out} holds a trained run, whose results would be lost: name another --out")
    fetch(cfg.data)
    dataset, train_files, test_files = open_data(cfg)
    classes = test_files.classes = train_files.classes
    if cfg.eval_only and list(found.classes or classes) != list(classes):
        raise ValueError(f"the classes of {cfg.data} ({', '.join(classes[:3])} ...) are not those of {found.path}")
    weights = None if cfg.mode == "scratch" and not tested else found
    model, text = build(cfg, len(found.state["head.weight"]) if tested and not found.classes else max(len(classes), 1), weights)
    report(text)
    model.to(device)
    if cfg.mode in ("knn", "features"):
        result = use_features(model, train_files, test_files, cfg)
    elif cfg.eval_only:
        result = write_results(run_views(model, test_files, cfg, cfg.clips, cfg.crops, model.answers), test_files, cfg)
    else:
        return train_classifier(model, dataset, test_files, cfg)
    report(f"done: {result}, see {cfg.out}")


def train_classifier(model, dataset, test_files, cfg):
    """Supervised training, then the test."""
    device, classes = next(model.parameters()).device, len(dataset.classes)
    groups = layer_groups(model, cfg.weight_decay, 1.0 if cfg.mode == "scratch" else cfg.layer_decay)
    if cfg.mode == "linear":  # without weight decay: MAE Table 10
        optimizer = LARS([{"params": group["params"]} for group in groups])
    else:
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)

    def loss_of(net, batch, items, step, piece):
        labels = torch.from_numpy(dataset.labels[items]).repeat_interleave(dataset.repeat).to(device)
        x = erase(model.encoder.normalize(batch), cfg.erase)
        x, labels = mix(x, labels, classes, cfg.mixup, cfg.cutmix)
        return model.loss(net(x).float(), x, labels, cfg.smoothing)

    def look(path):
        """One view of every test file, for the log alone: what is reported is the last epoch's model."""
        answers = run_views(model, test_files, cfg, 1, 1, model.answers)[:, 0]
        if cfg.dense:
            return {"val_loss": math.nan, "baseline": math.nan, **model.score(answers[answers[:, 0].isfinite()])}
        good, labels = answers[:, 0].isfinite(), torch.from_numpy(test_files.labels)
        loss = F.nll_loss(answers[good].clamp(min=1e-9).log(), labels[good]).item()
        top1 = (answers[good].argmax(dim=1) == labels[good]).float().mean().item()
        return {"val_loss": loss, "baseline": math.log(classes), "top-1": top1}

    run = train(model, dataset, loss_of, optimizer, look, cfg)
    result = ""
    if not run.stopping:
        answers = run_views(model, test_files, cfg, cfg.clips, cfg.crops, model.answers)
        if cfg.dense:
            scores = model.score(answers[answers[:, 0, 0].isfinite(), 0])
            if is_first():
                write(Path(cfg.out, "results.json"), json.dumps({"task": cfg.dense, **scores}).encode())
            (name, ours), (_, constant) = scores.items()
            result = f"{cfg.dense}: {name} {ours:.3f} (the same map for all: {constant:.3f})"
        else:
            result = f"{cfg.mode}: " + write_results(answers, test_files, cfg)
    run.finish(result)


def as_it_was_built(cfg, found):
    """A classifier is tested with the head, the pooling and the inputs that it was built with."""
    if not any(k in found.state for k in ("head.weight", "head.1.weight")):
        raise ValueError(f"{found.path} holds no classifier, only a pretrained encoder: fine-tune it first")
    pool = "mean" if "fc_norm.weight" in found.state or cfg.model in ("mae_st", "omni") else "first"
    pool = found.settings.get("pool", pool)
    return dataclasses.replace(cfg, mode="linear" if "head.1.weight" in found.state else "finetune", pool=pool)


def use_features(model, train_files, test_files, cfg):
    """--mode knn: classify by the nearest training files; --mode features: save a vector of every file."""
    vectors = [run_views(model, files, cfg, 1, 1, model.features)[:, 0] for files in (train_files, test_files)]
    good = [x[:, 0].isfinite() for x in vectors]
    if cfg.mode == "knn":
        known = train_files.select(good[0].numpy())
        labels, classes = torch.from_numpy(known.labels), len(known.classes)
        answers, neighbours = nearest_neighbours(vectors[0][good[0]], labels, vectors[1], classes)
        result = write_results(answers[:, None], test_files, cfg)
        if is_first():
            draw_neighbours(test_files, known, neighbours, cfg)
        return result
    arrays = {}
    for name, x, files, keep in zip(("train", "test"), vectors, (train_files, test_files), good):
        kept = files.select(keep.numpy())
        arrays |= {f"{name}_features": x[keep].numpy(), f"{name}_labels": kept.labels, f"{name}_paths": kept.paths}
    if is_first():
        np.savez(file := io.BytesIO(), **arrays)
        write(Path(cfg.out, "features.npz"), file.getvalue())
    return ", ".join(f"{k} {v.shape}" for k, v in arrays.items())


def predict(cfg, found, device):
    """Class names with probabilities for one file, the mean over its views."""
    kinds = data.VIDEO if is_video(cfg) else data.IMAGE
    if Path(cfg.predict).suffix.lower() not in kinds or not Path(cfg.predict).is_file() or cfg.inputs != "rgb":
        raise ValueError(f"--predict {cfg.predict}: {found.path} classifies one file, that ends in {', '.join(kinds)}")
    head = found.state.get("head.weight", found.state.get("head.1.weight"))
    classes = list(found.classes) or [f"class {i}" for i in range(len(head))]
    model = build(cfg, len(head), found)[0].to(device)
    one = data.Files(np.array([cfg.predict]), np.array([-1]), classes, "")
    answers = run_views(model, one, dataclasses.replace(cfg, workers=0), cfg.clips, cfg.crops, model.answers)
    for name, p in top5(answers[0].mean(dim=0), classes):
        report(f"{p:6.1%}  {name}")


if __name__ == "__main__":
    run_script(main)
