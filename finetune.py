"""finetune.py - what the pretraining was for: a classifier around the pretrained encoder, and how it is tested.

Papers  MAE 2111.06377 (App. A.1), VideoMAE 2203.12602 (App. 7), MAE-ST 2205.09113 (Sec. 4), all on arXiv
Covers  MAE App. A.1 "End-to-end fine-tuning", Table 9    Classifier, layer_groups, mix, Augmented; --mode finetune
        MAE App. A.1 "Linear probing", Table 10           Classifier(frozen=True), LARS; --mode linear
        VideoMAE Table 2 "from scratch"                   --mode scratch: no weights, no layer decay (paper: longer)
        MAE-ST Sec. 4 "Settings", VideoMAE App. 7         ViewDataset, summarise: clips x crops views of every video
        MAE-ST App. A, last paragraph (image -> video)    inflate
        MultiMAE, dense transfers                         DenseHead, a plain linear layer; --dense
        random erasing (arXiv 1708.04896)                 erase
        not in the papers                                 nearest_neighbours of frozen features; --mode knn
        public files of all five papers, HuggingFace's    read_init, recognise, from_huggingface
Not     detection; MAE's segmentation (App. A.4), recipe from scratch (App. A.2) and partial fine-tuning (Fig. 9);
        VideoMAE's probe (SGD, Table 11).

The four modes answer different questions. finetune: is the encoder a good place to start from? scratch: what would
it have learnt without? linear and knn: what does the encoder know already? Masked autoencoders are strong in the
first and weak in the last two (VideoMAE Table 3: 69.6 fine-tuned, 38.9 linear): do not expect miracles of a probe.

Run     python finetune.py                                (4 min on 2 CPU cores: the toy world, runs/mae_video)
        python finetune.py --mode scratch --out runs/scratch      (the same network and budget without pretraining)
        python finetune.py --mode linear --out runs/linear        (--mode knn needs no training at all)
        python finetune.py --data UCF101 --preset ucf101 --init runs/ucf101/checkpoint.pt --out runs/ucf101_ft
        python finetune.py --predict clip.avi --init runs/finetune/checkpoint.pt
        It ends with "done: top-1 ... (chance ...) ... see runs/finetune".
Next    this is the last file. tests/ shows what was checked, and how.
"""

import contextlib
import csv
import io
import json
import math
import re
import time
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
from data import BrokenFile, make_crop, read_clips, read_image, seeded, select, views_of
from mae_image import (DECODER, ENCODERS, MAE, Batches, Run, StopOnSignal, agree, check_divides, choose_precision,
                       encoder_size, load_file, lr_at, open_loader, pieces_of, public_tensors, read_config, shuffled,
                       sincos_2d, start_processes, write_whole)  # fmt: skip
from mae_video import MAEST, VideoMAE, resize_table
from masking import InputError, last_line, run_script, say
from multimae import MODALITIES, PLANES, STRIDE, AlignedDataset, MultiMAE, list_aligned, parse_modalities
from omni import OmniMAE

MODELS = {"mae": MAE, "videomae": VideoMAE, "mae_st": MAEST, "omni": OmniMAE, "multimae": MultiMAE}


# ============================================================================================================
#  THE PAPERS, part 1: a classifier around the encoder
#  (needs: torch; mae_image.py DECODER, part 3; mae_video.py resize_table, part 3; multimae.py STRIDE)
# ============================================================================================================


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
        """What a half of the block adds: scaled, and for some samples nothing; the others make up for it."""
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

    x       what the encoder's `encode` takes, e.g. clips (B, 3, T, H, W), normalised;   logits (B, classes)
    pool    "mean" over the tokens without the class token (MultiMAE's global token does count), or "first": the class
            token. Models without one take their first cube or patch, as VideoMAE's public code does with --use_cls
    fresh_norm  the norm before the head is new. Fine-tuned, MAE, VideoMAE and OmniMAE throw the pretrained final norm
            away, MultiMAE has none; MAE-ST, every probe, and who pools "first" go on with the pretrained one
    frozen  linear probing: BatchNorm without affine before the linear layer, and nothing else learns or moves

    The norm comes after the pooling everywhere. For "first" that is no difference: LayerNorm looks at one token.
    """

    def __init__(self, encoder, classes, pool="mean", fresh_norm=True, drop_path=0.0, dropout=0.0, layer_scale=0.0,
                 frozen=False):  # fmt: skip
        super().__init__()
        drop_decoder(encoder)
        D, depth = encoder.blocks[0].norm1.normalized_shape[0], len(encoder.blocks)
        self.pool, self.frozen = pool, frozen
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


class DenseHead(nn.Module):
    """A class map or depth map from a MultiMAE encoder: one linear layer on every patch.   pred = model(x) (B, N, P)

    MultiMAE's public code puts ConvNeXt blocks or a DPT head here. This one is ours, and as plain as can be, so that
    what it finds was in the tokens. Of several modalities the tokens at one place are averaged.

    classifier  the Classifier whose encoder is used;   inputs: modalities it sees;   task: "semseg" or "depth"
    """

    def __init__(self, classifier, inputs, task):
        super().__init__()
        self.encoder, self.norm, self.inputs, self.task = classifier.encoder, classifier.norm, inputs, task
        if task in self.encoder.input_adapters:
            del self.encoder.input_adapters[task]  # it is read from the files, but the encoder does not see it
        patch, classes = self.encoder.patch, self.encoder.classes
        values = classes * (patch // STRIDE) ** 2 if task == "semseg" else patch**2
        self.head = nn.Linear(self.norm.normalized_shape[0], values)

    def forward(self, x):
        tokens = self.encoder.encode({m: x[m] for m in self.inputs})[:, :-1]  # (B, sum of N, D), no global token
        tokens = tokens.unflatten(1, (len(self.inputs), -1)).mean(dim=1)  # (B, N, D)
        return self.head(self.norm(tokens))

    def loss(self, pred, x, labels, smoothing):
        nothing = torch.zeros(len(pred), len(self.inputs) * pred.shape[1], dtype=torch.bool)
        return self.encoder.task_losses({self.task: pred}, x, {m: x[m] for m in self.inputs}, nothing)[self.task]

    def answers(self, x):
        """-> (B, 2 * values): what is painted (of classes the numbers) and what would be right, pixel by pixel."""
        pred, target = self(x), self.encoder.target(self.task, x[self.task])
        if self.task == "semseg":
            pred = pred.unflatten(2, (self.encoder.classes, -1)).argmax(dim=2)
        return torch.cat([pred.flatten(1), target.flatten(1)], dim=1)


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
    """Another image size or clip length than in pretraining: every table of positions is interpolated."""
    old, encoder.grid = encoder.grid, tuple(new)
    if old == encoder.grid:
        return
    tables = {"pos_embed_spatial": ((1, *old[1:]), (1, *new[1:])), "pos_embed": (old, new),
              "pos_embed_temporal": ((old[0], 1, 1), (new[0], 1, 1))}  # fmt: skip
    for name, (a, b) in tables.items():
        if (table := getattr(encoder, name, None)) is not None:
            extra = table.shape[1] - math.prod(a)  # MAE-ST's joint table begins with the class token's row
            resized = torch.cat([table[:, :extra], resize_table(table[:, extra:].detach(), a, b)], dim=1)
            learns = isinstance(table, nn.Parameter)  # not in a probe
            setattr(encoder, name, nn.Parameter(resized.detach(), table.requires_grad) if learns else resized)


# ============================================================================================================
#  THE PAPERS, part 2: the recipe          (needs: torch, torchvision; data.py seeded, torchvision_draws_from)
# ============================================================================================================


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
        layer = int(block[1]) + 1 if block else 0 if name.startswith("encoder.") else last
        plain = parameter.ndim < 2 or any(part in name for part in ("_token", "pos_embed"))
        group = groups.setdefault((layer, plain), {"params": [], "lr_scale": layer_decay ** (last - layer),
                                                   "weight_decay": 0.0 if plain else weight_decay})  # fmt: skip
        group["params"].append(parameter)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled to each matrix: MAE App. A.1 "Linear probing" (arXiv 1708.03888).

    A matrix moves by lr x trust x its own norm, whatever the length of its gradient. Vectors: plain momentum SGD.
    """

    def __init__(self, groups, lr, momentum=0.9, trust=0.001):
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
    """Mixup or CutMix, by chance, of the samples of a batch: MAE Table 9.   -> x, labels (B,) or soft (B, classes)

    All frames of a clip are mixed alike: to torchvision they are channels of one image."""
    kinds = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    if not kinds:
        return x, labels
    order = torch.randperm(len(x))  # torchvision mixes neighbours, and with --repeat those are clips of one video
    x, labels = x[order], labels[order]
    mixed, labels = kinds[int(torch.rand(1) * len(kinds))](x.flatten(1, -3), labels)  # (B, C*T, H, W)
    return mixed.reshape(x.shape), labels


def erase(x, chance):
    """Random erasing (arXiv 1708.04896): a box of noise, the same box in all frames.   x (B, C, [T,] H, W)"""
    eraser = v2.RandomErasing(p=chance, value="random")
    return torch.stack([eraser(sample.transpose(0, -3)).transpose(0, -3) for sample in x]) if chance else x


class Augmented(Dataset):
    """A dataset of data.py with RandAugment (arXiv 1909.13719) on top of crop and flip.

    All frames of a clip get the same operations. important: frames augmented one by one would flicker, and the
    network would learn from motion that is not there.
    DIFFERS from the official code (timm's): torchvision's operations and scale, without noise on the magnitude.
    """

    def __init__(self, dataset, operations, magnitude):
        self.dataset, self.repeat = dataset, dataset.repeat
        self.paths, self.labels, self.classes = dataset.paths, dataset.labels, dataset.classes
        self.augment = v2.RandAugment(operations, magnitude, num_magnitude_bins=11)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        pixels, number, broken = self.dataset[key]
        with data.torchvision_draws_from(seeded(self.dataset.seed, 5, *key)):
            pixels = torch.stack([self.augment(x.movedim(-1, -3)).movedim(-3, -1) for x in pixels])
        return pixels, number, broken


# ============================================================================================================
#  THE PAPERS, part 3: testing
#  (needs: torch, torchvision, is_video, planes_of, open_aligned; data.py parts 2-5;
#   mae_image.py choose_precision, open_loader, start_processes;
#   multimae.py MODALITIES, PLANES, parse_modalities, part 4; masking.py InputError, last_line, say)
# ============================================================================================================


def spatial_views(pixels, size, crops):
    """Short side to `size`, then `crops` squares at even distances along the long side; one: the middle.

    uint8 (T, H, W, 3) -> (crops, T, size, size, 3)"""
    if crops == 1:
        return make_crop(pixels, size, "center", 1, False, None)[None]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (T, 3, H, W)
    H, W = x.shape[-2:]
    H, W = max(size, round(H * size / min(H, W))), max(size, round(W * size / min(H, W)))
    x = TF.resize(x, [H, W], antialias=True)
    places = [round(i * max(H - size, W - size) / (crops - 1)) for i in range(crops)]
    views = [x[..., p : p + size, :size] if H > W else x[..., :size, p : p + size] for p in places]
    return torch.stack(views).permute(0, 1, 3, 4, 2).contiguous()


class ViewDataset(Dataset):
    """dataset[i] -> uint8 (clips * crops, T, H, W, 3), i, [(path, reason) if broken]: all views, no randomness.

    Images have one view, the whole centre square (DIFFERS from MAE's public code: resized to 256, cropped to 224). A
    broken file gives zeros and is named: it is never replaced by another one, as in training, or its label would be
    counted twice.
    """

    def __init__(self, files, cfg, clips, crops):
        self.files, self.cfg, self.clips, self.crops = files, cfg, clips, crops
        several = cfg.model == "multimae" and planes_of(cfg) != ["rgb"]
        self.aligned = open_aligned(files, cfg, train=False) if several else None

    def __len__(self):
        return len(self.files.paths)

    def __getitem__(self, i):
        path, size = self.files.paths[i], self.cfg.img_size
        try:
            if is_video(self.cfg):
                choose = lambda n: views_of(self.cfg.sampling, n, self.cfg.frames, self.cfg.stride, self.clips)
                clips = read_clips(path, choose)  # (clips, T, H, W, 3)
                return torch.cat([spatial_views(c, size, self.crops) for c in clips]), i, []
            if self.aligned:
                return self.aligned.read(i, None), i, []
            pixels = self.files.pixels[i] if self.files.pixels is not None else read_image(path)
            return make_crop(pixels[None], size, "center", 1, False, None, bicubic=True), i, []
        except BrokenFile as error:
            frames = (self.clips * self.crops, self.cfg.frames) if is_video(self.cfg) else (1,)
            planes = sum(PLANES[m] for m in planes_of(self.cfg))
            return torch.zeros(*frames, size, size, planes, dtype=torch.uint8), i, [(str(path), str(error))]


def deliver(loader):
    """The batches of a loader.   Raises InputError where it cannot deliver: a worker was killed (out of memory?)"""
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError) as error:
        raise InputError(f"the loader failed: {last_line(error)}") from None


def run_views(model, files, cfg, clips, crops, output):
    """output(x), a method of the model, of every view of every file -> (files, views, width), broken files.

    Each process takes every world-th file, so each is done exactly once, whatever the number of files."""
    rank, world, device = start_processes(cfg)
    own, views = range(rank, len(files.paths), world), clips * crops if is_video(cfg) else 1
    size = max(cfg.batch // (world * cfg.accum), 1)  # of a forward pass, as in training
    at_once = max(size // views, 1)  # files
    batches = [own[i : i + at_once] for i in range(0, len(own), at_once)]
    loader = open_loader(ViewDataset(files, cfg, clips, crops), batches, cfg.workers, device)
    dtype, outputs, broken = choose_precision(cfg, device), [], []
    shown = start = time.perf_counter()
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for done, (pixels, _, errors) in enumerate(deliver(loader), 1):
            broken += errors
            outputs += [output(model.encoder.normalize(p.to(device))).float().cpu() for p in pixels.split(size)]
            now = time.perf_counter()
            if rank == 0 and now - shown > 20:
                left, shown = (now - start) / done * (len(loader) - done), now
                say(f"testing: {done} of {len(loader)} batches, {left:.0f} s left")
    parts = [(list(own), outputs, broken)]
    if world > 1:  # one such triple of each process
        mine, parts = parts[0], [None] * world
        torch.distributed.all_gather_object(parts, mine)
    numbers, outputs, broken = (sum(lists, []) for lists in zip(*parts))
    results = torch.cat(outputs).reshape(len(numbers), views, -1)[torch.tensor(numbers).argsort()]  # in file order
    named = dict(broken)
    lost = torch.tensor([path in named for path in map(str, files.paths)])
    if not results[~lost].isfinite().all():
        raise InputError("the network's answers are not finite: try --precision float32")
    results[lost] = float("nan")
    return results, broken


def summarise(probabilities, labels):
    """Accuracy of single views and of files.   probabilities (N, views, classes), labels (N,) -> dict

    important: the two are different numbers, and papers report the second: the softmax averaged over all views of
    a video. Comparing one with the other is the most common way not to reproduce a result.
    Files that could not be read (NaN) are left out.
    """
    good = probabilities[:, 0, 0].isfinite()
    probabilities, labels = probabilities[good], labels[good]
    if not len(labels):
        raise InputError("not one test file could be read")
    N, V, C = probabilities.shape
    hits = lambda p, y, k: (p.topk(min(k, C)).indices == y[:, None]).any(dim=1).double()
    video = probabilities.mean(dim=1)  # (N, C)
    clips, clip_labels = probabilities.flatten(0, 1), labels.repeat_interleave(V)
    right, count = hits(video, labels, 1), labels.bincount(minlength=C)
    per_class = torch.zeros(C).double().index_add(0, labels, right) / count  # NaN where there is no test file
    confusion = torch.zeros(C, C).index_put((labels, video.argmax(dim=1)), torch.ones(N), accumulate=True)
    wrong = confusion.fill_diagonal_(0).flatten()
    pairs = [(int(i) // C, int(i) % C, int(wrong[i])) for i in wrong.argsort(descending=True)[:5] if wrong[i]]
    return {"files": N, "unreadable": int((~good).sum()), "views": V, "top1": right.mean().item(),
            "top5": hits(video, labels, 5).mean().item(), "view_top1": hits(clips, clip_labels, 1).mean().item(),
            "view_top5": hits(clips, clip_labels, 5).mean().item(), "class_mean": per_class.nanmean().item(),
            "chance": (count.max() / N).item(), "per_class": per_class.tolist(), "confused": pairs}  # fmt: skip


def nearest_neighbours(train, train_labels, test, classes, k=20, temperature=0.07):
    """Weighted vote of the k nearest training features (arXiv 1805.01978).   (n, D), (n,), (m, D) -> (m, classes)

    Nearness is the cosine after subtracting the mean of the training features; a neighbour's vote weighs
    exp(cosine / temperature)."""
    mean, answers = train.mean(dim=0), []
    train = F.normalize(train - mean, dim=1)
    for part in test.split(1024):  # all cosines at once would be 250 GB for ImageNet
        weight, index = (F.normalize(part - mean, dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(part), classes).scatter_add(1, train_labels[index], (weight / temperature).exp())
        answers.append(votes / votes.sum(dim=1, keepdim=True))
    return torch.cat(answers)


# ============================================================================================================
#  THE RUN, part 1: settings
# ============================================================================================================


@dataclass
class Config:
    # what to do
    mode: typing.Literal["finetune", "linear", "scratch", "knn", "features"] = "finetune"  # features: one vector a file
    init: str = "auto"  # pretrained file, ours or a public one; auto: run of --model's script; for tests of this one
    eval_only: bool = False  # no training: test the classifier in --init
    predict: str = ""  # no training: what the classifier in --init says about this one file
    # data
    data: str = "toy"  # UCF101, HMDB51, a folder, a list file, cifar10 or stl10
    fold: int = 1  # of the official lists: 1, 2 or 3
    allow_missing: bool = False  # a list may name files that are not there: use the others
    share: float = 1.0  # share of the training files of each class that is used, the same for a --seed
    frames: int = 0  # frames per clip; 0: as in pretraining
    stride: int = 0  # frames from one to the next; 0: as in pretraining
    img_size: int = 0  # side of the square that the model sees; 0: as in pretraining; else positions are resized
    sampling: typing.Literal["auto", "dense", "linspace", "segments"] = "auto"  # auto: as in pretraining; toy: segments
    workers: int = 2  # processes that load data
    # augmentation
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
    model: typing.Literal[("auto", *MODELS)] = "auto"  # auto: that of --init; from scratch videomae
    images: bool = False  # --model omni: classify images, else videos
    inputs: str = "rgb"  # --model multimae: what the classifier sees, any of rgb,depth,semseg
    dense: typing.Literal["", "semseg", "depth"] = ""  # --model multimae: predict this map, linearly from each patch
    ignore: int = -1  # --dense semseg: class that does not count (void), -1: none
    maps: int = 0  # --model multimae: classes of the semantic maps; 0: those of --init, else 6 (the toy world)
    class_width: int = 16  # --model multimae: width of a class's learned vector; that of --init, if given
    size: str = "auto"  # encoder: nano ... huge, or WIDTHxBLOCKSxHEADS; auto: that of --init
    patch: int = 0  # side of a patch or cube in pixels; 0: that of --init
    tubelet: int = 0  # frames in a cube; 0: that of --init
    pool: typing.Literal["auto", "mean", "first"] = "auto"  # auto: mean; of a frozen MAE the class token
    drop_path: float = 0.0  # chance to skip attention or MLP of the last block, lower in earlier ones; papers 0.1-0.2
    dropout: float = 0.0  # before the head
    # optimiser
    epochs: int = 40  # passes over the training files; each gives --repeat samples
    batch: int = 16  # samples per update, over all processes, accumulation steps and repeats
    accum: int = 1  # forward-backward passes per update: raise it when memory runs out
    lr: float = 0.0  # base rate, for a batch of 256; 0: 5e-2, made for nano (ViT-B: 1e-3); --mode linear 100 (LARS)
    min_lr: float = 0.0  # base rate at the end of the cosine
    warmup: float = 3  # epochs of linear warm-up
    weight_decay: float = 0.05  # of matrices; --mode linear has none (MAE Table 10)
    layer_decay: float = 0.9  # rate of a layer: this times that of the one above; papers 0.7-0.75; scratch 1
    clip: float = 0.0  # largest norm of the gradient, 0: no clipping
    # test
    clips: int = 5  # clips of every test video (images, knn, features: 1); with sampling "segments" 2 is the paper's
    crops: int = 1  # squares along the long side of every clip; the papers' is 3
    check_every: int = 10  # epochs between two looks at the test set, one view each; 0: only at the end
    # run
    out: str = "runs/finetune"  # folder for checkpoint, log and predictions
    resume: bool = False  # go on with the run in --out
    seed: int = 0  # of head, order, crops, drop path, --share
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format of the matrix products
    compile: bool = False  # torch.compile: slow start, faster steps
    log_every: int = 10  # updates between two lines of the log
    smoke: bool = False  # three updates only, to see that everything runs; its folder may be written again


LIMITS = [("share", 0.001, 1), ("rand_augment", 0, 10), ("rand_ops", 1, 10), ("erase", 0, 1), ("smoothing", 0, 0.99)]
LIMITS += [("mixup", 0, 100), ("cutmix", 0, 100), ("drop_path", 0, 0.99), ("dropout", 0, 0.99), ("clips", 1, 1000)]
LIMITS += [("crops", 1, 100), ("layer_decay", 0.01, 1), ("check_every", 0, 10**9)]
LIMITS += [(name, 0, 10**9) for name in ("frames", "stride", "img_size", "patch", "tubelet", "maps")]  # 0: --init's
TEST_FLAGS = ("clips", "crops", "check_every")  # may change when a run goes on

_recipe = dict(smoothing=0.1, erase=0.25, rand_augment=7, rand_ops=4, mixup=0.8, cutmix=1.0, repeat=2, crops=3)
_one_gpu = dict(_recipe, min_crop=0.3, batch=128, lr=1e-3, layer_decay=0.7, drop_path=0.1, epochs=100, warmup=5,
                workers=8)  # fmt: skip
# VideoMAE App. 7 "UCF101", "HMDB51": batch 128, base rates 5e-4 and 1e-3. Our --batch counts both clips of a video,
# so it is twice that and the base rate half. RandAugment, dropout and the end of the cosine: public UCF101 script
_paper = dict(_recipe, min_crop=0.08, batch=256, layer_decay=0.7, drop_path=0.2, dropout=0.5, warmup=5, min_lr=5e-6,
              workers=16)  # fmt: skip
PRESETS = {
    # small sets on a CPU, in minutes: the recipe of most sets in tests/claims.py
    "laptop": dict(batch=32, lr=1.6e-2, layer_decay=0.75, drop_path=0.1, smoothing=0.1, min_crop=0.5, epochs=15,
                   warmup=2),
    "ucf101": dict(_one_gpu, clips=5, out="runs/ucf101_ft"),
    "hmdb51": dict(_one_gpu, clips=10, out="runs/hmdb51_ft"),
    "ucf101_paper": dict(_paper, lr=2.5e-4, epochs=100, clips=5, out="runs/ucf101_paper_ft"),
    "hmdb51_paper": dict(_paper, lr=5e-4, epochs=50, clips=10, out="runs/hmdb51_paper_ft"),
    "cifar10": dict(data="cifar10", smoothing=0.1, drop_path=0.1, batch=512, lr=1e-3, epochs=100, warmup=5,
                    min_crop=0.6, rand_augment=7, mixup=0.8, cutmix=1.0, layer_decay=0.75, out="runs/cifar10_ft",
                    init="runs/mae_cifar10/checkpoint.pt"),
    # MAE Table 9 (ViT-B; the public code has 5e-4 and 0.65), random erasing from the public code
    "mae_paper": dict(smoothing=0.1, min_crop=0.08, erase=0.25, rand_augment=9, mixup=0.8, cutmix=1.0, batch=1024,
                      lr=1e-3, epochs=100, warmup=5, layer_decay=0.75, drop_path=0.1, workers=16),
    # MAE Table 10; the class token of MAE, the mean of others
    "mae_probe_paper": dict(mode="linear", min_crop=0.08, batch=16384, lr=0.1, epochs=90, warmup=10, workers=16),
}  # fmt: skip


def for_mode(preset, given):
    """A linear probe leaves out the rates and augmentations of a preset for fine-tuning, and takes the rest."""
    own = ("lr", "min_lr", "clip", "dropout", "erase", "rand_augment", "mixup", "cutmix")
    probe = given.get("mode") == "linear" and "mode" not in preset
    return {k: v for k, v in preset.items() if not (probe and k in own)}


# what a file may say of its model, and what is taken where neither it nor a flag says it
LAPTOP = {"model": "videomae", "size": "nano", "patch": 8, "tubelet": 2, "frames": 8, "stride": 2, "img_size": 64,
          "sampling": "dense", "maps": 6}  # fmt: skip


PROBES = ("linear", "knn", "features")  # modes in which the encoder is frozen


def is_video(cfg):
    return cfg.model in ("videomae", "mae_st") or (cfg.model == "omni" and not cfg.images)


# ============================================================================================================
#  THE RUN, part 2: pretrained files from anywhere
# ============================================================================================================


@dataclass
class Found:
    """What a file holds: which model, its settings, its tensors, and whether their names are the public ones."""

    model: str
    settings: dict
    state: dict
    public: bool = True
    classes: list = ()  # names of the classes of a fine-tuned file of ours


def read_init(path):
    """Recognise a file by its contents.   -> Found.   Raises InputError for a file of no known layout."""
    content = read_safetensors(path) if str(path).endswith(".safetensors") else load_file(path)
    if "script" not in content:
        return recognise(public_tensors(content), path)
    config, state, script = content["config"], content["model"], content["script"]
    model = {"mae_image": "mae", "omni": "omni", "multimae": "multimae"}.get(script, config.get("model"))
    if model not in MODELS:
        raise InputError(f"checkpoint {path} was written by {script}.py, which this version does not know")
    settings = {k: config[k] for k in (*LAPTOP, "fold") if k in config and k != "model"}
    if script == "multimae":
        settings.update(maps=config["classes"], class_width=config["class_width"])
    if script == "finetune":
        kept = ("mode", "pool", "images", "inputs", "dense", "maps", "class_width")
        settings.update({k: config[k] for k in kept if k in config})
        # names as if it were a public file: fc_norm is the norm before the head
        rename = lambda k: k.removeprefix("encoder.") if k.startswith("encoder.") else k.replace("norm.", "fc_norm.", 1)
        state = {rename(k): v for k, v in state.items()}
    return Found(model, settings, state, False, content.get("classes", []))


def read_safetensors(path):
    try:
        from safetensors.torch import load_file as load
    except ImportError:
        raise InputError(f"{path}: to read this format, pip install safetensors") from None
    try:
        return load(path)
    except Exception as error:
        raise InputError(f"cannot read {path}: {error}".splitlines()[0]) from None


def recognise(state, path):
    """Public layouts of the five papers, pretrained or fine-tuned, by the names and shapes of their tensors.

    Heads are not written in any file: by width and depth if it is a published size, else slices of 64."""
    if any("patch_embeddings.projection" in k for k in state):
        state = from_huggingface(state)
    kernels = ("patch_embed.proj.weight", "encoder.patch_embed.proj.weight", "trunk.patch_embed.proj.1.weight",
               "input_adapters.rgb.proj.weight")  # fmt: skip
    kernel = next((state[k] for k in kernels if k in state), None)
    block = re.compile(r"(?:(?:encoder\.|trunk\.)?blocks|encoder)\.(\d+)\.")
    numbers = [int(m[1]) for m in map(block.match, state) if m]
    no_mae = kernel is not None and kernel.ndim == 4 and "pos_embed" in state and "cls_token" not in state
    if kernel is None or kernel.ndim not in (4, 5) or not numbers or no_mae:
        raise InputError(f"{path} has no layout that is known here: MAE, MAE-ST, VideoMAE, OmniMAE, MultiMAE, "
                         "HuggingFace")  # fmt: skip
    D, _, *sides = kernel.shape
    depth, patch = max(numbers) + 1, sides[-1]
    heads = {(d, n): h for d, n, h in ENCODERS.values()}.get((D, depth), max(D // 64, 1))
    settings = {"size": f"{D}x{depth}x{heads}", "patch": patch}
    tables = {k: v.shape[1] for k, v in state.items() if re.fullmatch(r"pos_embed(_spatial|_temporal)?", k)}
    if "input_adapters.rgb.proj.weight" in state:
        table = state.get("input_adapters.rgb.pos_emb")  # (1, D, h, w)
        settings["img_size"] = patch * (14 if table is None else table.shape[-1])
        if (embedding := state.get("input_adapters.semseg.class_emb.weight")) is not None:
            settings.update(maps=embedding.shape[0], class_width=embedding.shape[1])
        named = {"output_adapters.cls.norm.": "fc_norm.", "output_adapters.cls.head.": "head."}  # if it is fine-tuned
        rename = lambda k: next((k.replace(a, b) for a, b in named.items() if k.startswith(a)), k)
        return Found("multimae", settings, {rename(k): v for k, v in state.items()})
    if len(sides) == 2:
        side = math.isqrt(tables["pos_embed"] - 1) if "pos_embed" in tables else 14
        return Found("mae", {**settings, "img_size": side * patch}, state)
    settings.update(tubelet=sides[0], frames=16, stride=4, img_size=14 * patch, sampling="dense")
    if "trunk.patch_embed.proj.1.weight" in state:
        N = state["trunk.pos_embed"].shape[1] if "trunk.pos_embed" in state else 8 * 14 * 14
        side = math.isqrt(N // (settings["frames"] // sides[0]))  # huge: patches of 14 pixels, 16 x 16 of them
        return Found("omni", {**settings, "img_size": side * patch}, state)
    if not tables:
        return Found("videomae", settings, state)
    if "pos_embed_spatial" in tables:
        side, slots = math.isqrt(tables["pos_embed_spatial"]), tables["pos_embed_temporal"]
        settings.update(img_size=side * patch, frames=slots * sides[0])
    return Found("mae_st", {**settings, "sampling": "linspace"}, state)


HUGGINGFACE = [  # both the names on the hub and those of transformers 5 -> public names of MAE and VideoMAE
    (r"^(vit|videomae)\.", ""), (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.cls_token", "cls_token"), (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^(encoder\.layer|layers)\.", "blocks."), (r"attention\.attention\.(q|k|v)(uery|ey|alue)\.", r"attn.\1."),
    (r"attention\.attention\.(q|v)_bias", r"attn.\1.bias"), (r"attention\.(q|k|v)_proj", r"attn.\1"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"), (r"intermediate\.dense", "mlp.fc1"),
    (r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2"), (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
    (r"^layernorm\.", "norm."), (r"^classifier\.", "head."),
]  # fmt: skip


def from_huggingface(state):
    """HuggingFace's ViTMAE and VideoMAE, old and new names -> the papers' public names; q, k and v become one."""
    renamed = {}
    for key, value in state.items():
        if not key.startswith(("decoder", "encoder_to", "mask_token")):
            for pattern, name in HUGGINGFACE:
                key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [k for k in renamed if ".attn.q." in k]:
        q, k, v = (renamed.pop(key.replace(".q.", f".{part}."), None) for part in "qkv")
        renamed[key.replace(".q.", ".qkv.")] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    return renamed


def settle(cfg, found):
    """Settings left open are those of the file, else those of a laptop; what must agree is compared."""
    settings = {**LAPTOP, **(found.settings if found else {}), "model": found.model if found else "videomae"}
    fresh = cfg.mode == "scratch" and not only_tests(cfg)  # no weights are used, so nothing has to fit
    inflated = found is not None and found.model == "mae" and cfg.model in ("videomae", "mae_st")
    if found and cfg.model not in ("auto", found.model) and not inflated:
        if fresh:
            return settle(cfg, None)
        raise InputError(f"--model {cfg.model}: {cfg.init} holds a {found.model}; only an image MAE can become another")
    compared = ["size", "patch", "tubelet"] + ["maps"] * ("semseg" in cfg.inputs) if found and not fresh else []
    for name in compared:
        given, there = getattr(cfg, name), settings[name]
        if given in (0, "auto") or (name == "tubelet" and inflated):
            continue
        if (encoder_size(given) != encoder_size(there)) if name == "size" else given != there:
            raise InputError(f"--{name} {given}: the model in {cfg.init} has {there}; leave the flag out")
    if cfg.data == "toy" and cfg.sampling == "auto" and not only_tests(cfg):
        cfg = replace(cfg, sampling="segments")  # which motion it is shows in the whole video
    left_open = lambda k: k == "class_width" or (k in LAPTOP and getattr(cfg, k) in (0, "auto"))
    cfg = replace(cfg, **{k: v for k, v in settings.items() if left_open(k)})
    check_combinations(cfg)
    if only_tests(cfg) and (dense := settings.get("dense")):
        raise InputError(f"{cfg.init} paints {dense} maps and is no classifier: --eval-only and --predict need one")
    if only_tests(cfg):  # a classifier is tested as it was built
        mean = "fc_norm.weight" in found.state or cfg.model in ("mae_st", "omni")
        built = {"mode": "finetune", "pool": "mean" if mean else "first", **settings}
        if (cfg.images and not built.get("images", True)) or cfg.mode not in ("finetune", built["mode"]):
            raise InputError(f"--eval-only and --predict test what is in {cfg.init}: leave --images and --mode out")
        if cfg.fold not in (1, fold := built.get("fold", cfg.fold)):
            raise InputError(f"--fold {cfg.fold}: {cfg.init} was trained on fold {fold}, test files of others among it")
        cfg = replace(cfg, **{k: built[k] for k in ("mode", "pool", "images", "inputs", "fold") if k in built})
    if cfg.pool == "auto":
        cfg = replace(cfg, pool="first" if cfg.model == "mae" and cfg.mode in PROBES else "mean")
    if not cfg.lr:
        cfg = replace(cfg, lr=100.0 if cfg.mode == "linear" else 5e-2)
    return cfg


def check_combinations(cfg):
    """Raises InputError for settings that mean nothing together."""
    if cfg.images and cfg.model != "omni":
        raise InputError(f"--images is for OmniMAE, which takes both: {cfg.model} takes only one kind")
    if cfg.inputs != "rgb" and cfg.model != "multimae":
        raise InputError(f"--inputs {cfg.inputs} is for --model multimae: {cfg.model} sees RGB")
    if cfg.repeat > 1 and not is_video(cfg) and not only_tests(cfg) and cfg.mode not in ("knn", "features"):
        raise InputError(f"--repeat {cfg.repeat} takes several clips of a video: images have none")
    if cfg.fold != 1 and not is_video(cfg) and not only_tests(cfg):
        raise InputError(f"--fold {cfg.fold} is of the lists of UCF101 and HMDB51: images have none")
    if cfg.dense and (cfg.model != "multimae" or cfg.mode not in ("finetune", "scratch") or only_tests(cfg)):
        raise InputError("--dense is for --model multimae and --mode finetune or scratch, and has no --eval-only")
    if cfg.ignore >= cfg.maps:
        raise InputError(f"--ignore {cfg.ignore}: classes of the maps are 0 to {cfg.maps - 1}, -1 is none")


def grid_of(cfg):
    """-> token grid (t, h, w).   Raises InputError if a side cannot be cut evenly."""
    check_divides(cfg.img_size, cfg.patch, "frame side", "patch", "--img-size")
    side = cfg.img_size // cfg.patch
    if cfg.model in ("mae", "multimae"):
        return 1, side, side
    check_divides(cfg.frames, cfg.tubelet, "clip length", "tubelet", "--frames")
    return cfg.frames // cfg.tubelet, side, side


def build(cfg, classes, found=None):
    """-> Classifier, report. Without weights unless `found` has some for it."""
    inflated = found is not None and found.model != cfg.model  # an image model that becomes a video model
    start = replace(cfg, **found.settings) if found and not inflated else cfg  # its own token grid first, then ours
    shape, options = (encoder_size(start.size), (4, 0, 1)), {}  # the decoder will go: the smallest there is
    state = dict(found.state) if found else {}
    if cfg.model == "mae":
        encoder = MAE(start.img_size, start.patch, *shape)
    elif cfg.model == "multimae":
        encoder = MultiMAE(start.img_size, start.patch, *shape, planes_of(cfg), cfg.maps, cfg.class_width, cfg.ignore)
    else:
        if found and found.model == "mae_st":
            options = {"separable": "pos_embed" not in state, "cls": "cls_token" in state}
        encoder = MODELS[cfg.model](start.frames, start.img_size, start.tubelet, start.patch, *shape, **options)
    if found and found.public:
        table = state.get("pos_embed") if found.model == "mae" else None
        state = (MAE if inflated else encoder).from_public(state)
        if table is not None and not inflated:  # MAE's table has a row for the class token, and may have been trained
            state.update(pos_embed=table[:, 1:], cls_token=state["cls_token"] + table[:, :1])
    if inflated:
        state = inflate(state, encoder, found.settings["img_size"] // cfg.patch)
    frozen = cfg.mode in PROBES
    fresh_norm = cfg.model == "multimae" or not (frozen or cfg.model == "mae_st" or cfg.pool == "first")
    layer_scale = float("blocks.0.gamma_1" in state)  # its values are in the file
    model = Classifier(encoder, classes, cfg.pool, fresh_norm, cfg.drop_path, cfg.dropout, layer_scale, frozen)
    said = load(model, state, cfg, fresh_norm) if found else "no weights: the network starts from scratch"
    change_grid(model.encoder, grid_of(cfg))
    return DenseHead(model, parse_modalities(cfg.inputs, "--inputs"), cfg.dense) if cfg.dense else model, said


def planes_of(cfg):
    """The modalities that are read from files: the inputs and, with --dense, the map that is to be painted."""
    inputs = parse_modalities(cfg.inputs, "--inputs")
    if cfg.dense in inputs:
        raise InputError(f"--dense {cfg.dense} is also among --inputs {cfg.inputs}: nothing would be left to do")
    return [m for m in MODALITIES if m in inputs or m == cfg.dense]


def inflate(state, encoder, side):
    """Image MAE -> video encoder: MAE-ST App. A, last paragraph.

    The kernel is repeated over the frames of a cube and divided by their number, so that a still clip gives what
    the image gives. Where positions are learned, space takes MAE's fixed table, and time and class token start at zero.
    """
    u = encoder.tubelet
    state = {k: v for k, v in state.items() if k not in ("cls_token", "pos_embed")}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, None].repeat(1, 1, u, 1, 1) / u
    if isinstance(encoder, MAEST):
        D, (t, h, w) = encoder.cls_token.shape[2], encoder.grid
        space = resize_table(sincos_2d(D, side, side)[None], (1, side, side), (1, h, w))
        state.update(pos_embed_spatial=space, pos_embed_temporal=torch.zeros(1, t, D),
                     pos_embed_class=torch.zeros(1, 1, D), cls_token=torch.zeros(1, 1, D))  # fmt: skip
    return state


def load(model, state, cfg, fresh_norm):
    """Copy what fits. Each tensor of the file is used, left over as it should be, or wrong; the report says which.

    Raises InputError for anything else: a tensor that is unknown, missing or of another shape is never passed over.
    """
    own, tested = model.state_dict(), only_tests(cfg)
    norms = ("fc_norm.", "norm.") if tested else () if fresh_norm else ("norm.", "fc_norm.")
    norm = next((n for n in norms if n + "weight" in state), "-")  # becomes the norm before our head; "-": none does
    unneeded = (*DECODER, "norm.", "fc_norm.") + (() if tested else ("head.",))
    seen = parse_modalities(cfg.inputs, "--inputs")  # the map of --dense is painted, not seen
    unneeded += tuple(f"input_adapters.{m}." for m in MODALITIES if m not in seen)
    used, left, wrong = {}, [], []
    for key, value in state.items():
        is_norm = key.startswith(norm)
        ours = key.removeprefix("fc_") if is_norm else key if key.startswith("head.") else f"encoder.{key}"
        if key.startswith(unneeded) and not is_norm:
            left.append(key)
        elif ours not in own:
            wrong.append(f"unknown {key}")
        elif own[ours].shape != value.shape:
            wrong.append(f"{key} {tuple(value.shape)}, here {tuple(own[ours].shape)}")
        else:
            used[ours] = value
    # positions are fixed, and not in every file, where they are not learned
    fresh = () if tested else ("norm.", "head.") if fresh_norm else ("head.",)
    fresh += () if isinstance(model.encoder, MAEST) else ("encoder.pos_embed",)
    fresh += (f"encoder.input_adapters.{cfg.dense}.",) if cfg.dense else ()  # DenseHead throws it away
    missing = [k for k in own if k not in used]
    wrong += [f"no {k}" for k in missing if not k.startswith(fresh)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"checkpoint {cfg.init} does not fit this model: {wrong[0]}{more}")
    model.load_state_dict(used, strict=False)
    groups = lambda names: ", ".join(sorted({k.removeprefix("encoder.").split(".")[0] for k in names})) or "nothing"
    return f"{cfg.init}: {len(used)} tensors used; left over, as expected: {groups(left)}; new: {groups(missing)}"


# ============================================================================================================
#  THE RUN, part 3: the training loop
# ============================================================================================================


def train_classifier(model, train, look, cfg, extra):
    """Supervised training: the other loop of the project, see mae_image.pretrain for the first.

    look   model -> text: a look at the test set, for the log only. What is reported is the last epoch's model.
    extra  what else goes into the checkpoint
    returns  run (mae_image.Run), whether all updates were done (else Ctrl-C was pressed)
    """
    rank, world, device = start_processes(cfg)
    pieces = pieces_of(cfg, world, train.repeat)
    if cfg.mode == "linear" and cfg.batch == pieces:
        raise InputError(f"--mode linear has a BatchNorm, which needs two samples at a time: raise --batch {cfg.batch}")
    plan = lambda epoch: shuffled(cfg.seed, epoch, len(train), cfg.batch // train.repeat)
    per_epoch = len(plan(0))
    if not per_epoch:
        raise InputError(f"{len(train)} files do not fill one update of {cfg.batch // train.repeat}: lower --batch")
    total = min(cfg.epochs * per_epoch, 3 if cfg.smoke else math.inf)
    peak, classes = cfg.lr * cfg.batch / 256, len(train.classes)

    dtype = choose_precision(cfg, device)
    groups = layer_groups(model, cfg.weight_decay, 1.0 if cfg.mode == "scratch" else cfg.layer_decay)
    if cfg.mode == "linear":
        optimizer = LARS([{"params": g["params"], "lr_scale": 1.0} for g in groups], peak)
    else:
        optimizer = torch.optim.AdamW(groups, peak, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(Path(cfg.out), cfg, "finetune", model, optimizer, scaler, train, writes=rank == 0, extra=extra)
    start = run.open()
    run.scores = {"chance": math.log(max(classes, 1)) if not cfg.dense else float("nan"), "val_loss": float("nan")}
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = f"{dtype} on {world} x {device}, {per_epoch} updates x {cfg.epochs} epochs".replace("torch.", "")
    run.say(f"{learning / 1e6:.2f} M parameters learn, {where}")
    run.say(f"learning rate {cfg.lr:g} x batch {cfg.batch} / 256 = {peak:g}")
    if 0 < cfg.epochs <= cfg.warmup:
        run.say(f"warning: all {cfg.epochs} epochs are warm-up, the rate never reaches its peak: lower --warmup")

    if cfg.compile:
        model.compile()
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    loader = open_loader(train, Batches(plan, start, total, rank, world, cfg.accum), cfg.workers, device)
    run.begin(start, total, per_epoch, world, device)
    done = start
    with StopOnSignal() as stop:
        for step in range(start, total):
            model.train()
            lr = lr_at(step, peak, cfg.min_lr * cfg.batch / 256, cfg.warmup * per_epoch, total)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            # drop path, Mixup and erasing draw from torch's global generator: a function of (seed, step, process)
            torch.manual_seed(seeded(cfg.seed, 6, step, rank).initial_seed())
            update_loss, names = 0.0, []
            for a in range(cfg.accum):
                batch, index = run.next_batch(loader, step)
                names += [str(train.paths[i]) for i in index]
                labels = torch.from_numpy(train.labels[index]).repeat_interleave(train.repeat).to(device)
                x = erase(model.encoder.normalize(batch.to(device, non_blocking=True)), cfg.erase)
                x, labels = mix(x, labels, classes, cfg.mixup, cfg.cutmix)
                hold = parallel.no_sync() if world > 1 and a + 1 < cfg.accum else contextlib.nullcontext()
                with hold:
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        logits = parallel(x)
                    loss = model.loss(logits.float(), x, labels, cfg.smoothing)
                    scaler.scale(loss / cfg.accum).backward()
                update_loss = update_loss + loss.detach() / cfg.accum
            if cfg.clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            done = step + 1
            ending = done == total or agree(bool(stop), world, device)
            run.after_update(done, update_loss, names, lr, ending)
            run.save_if_due(done, ending)
            if cfg.check_every and done % (cfg.check_every * per_epoch) == 0 and not ending:
                run.say(look(model))
                run.clock, run.mark, run.wait = time.perf_counter(), done, 0.0  # the look is not training time
            if ending:
                break
    if world > 1:
        for buffer in model.buffers():  # BatchNorm's statistics: the ones that are saved
            torch.distributed.broadcast(buffer, 0)
    return run, done == total


# ============================================================================================================
#  THE RUN, part 4: results, and main
# ============================================================================================================


def only_tests(cfg):
    return cfg.eval_only or bool(cfg.predict)


def check_labels(train, test, cfg):
    """Raises InputError for files without labels, labels out of range, and classes without a training file."""
    classes = len(train.classes)
    if min(train.labels.min(), test.labels.min()) < 0 or not classes:
        raise InputError(f"{cfg.data} has files without a class: use class folders or lines 'path label'")
    if len(test.classes) > classes or test.labels.max() >= classes:
        raise InputError(f"the test files of {cfg.data} have label {test.labels.max()}, but the {classes} classes of "
                         f"the training files are 0 to {classes - 1}")  # fmt: skip
    count = np.bincount(train.labels, minlength=classes)
    if not count.all() and not cfg.allow_missing:
        raise InputError(f"class {train.classes[int(count.argmin())]} of {cfg.data} has no training file; "
                         "--allow-missing goes on without it")  # fmt: skip


def take_share(files, share, seed):
    """A share of the files of each class, at least one, always the same for a seed: for "few labels" experiments."""
    if share == 1:
        return files
    keep = []
    for label in range(max(len(files.classes), 1)):  # --dense may have no classes: all labels are -1
        own = np.flatnonzero(np.maximum(files.labels, 0) == label)
        order = torch.randperm(len(own), generator=seeded(seed, 7, label)).numpy()
        keep += own[order[: max(1, round(share * len(own)))]].tolist()
    return select(files, sorted(keep))


def top5(probabilities, classes):
    """-> [(class name, probability), ...], the five most likely first."""
    best = probabilities.topk(min(5, len(classes)))
    return [(classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist())]


def write(path, content):
    """Bytes -> a file, whose folder is made.   Raises InputError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(content))
    except OSError as error:
        raise InputError(str(error) if not error.errno else f"cannot write {path}: {error.strerror}") from None


def without(broken):
    return f", {len(broken)} files unreadable and left out: {', '.join(p for p, _ in broken[:5])}" if broken else ""


def report(probabilities, files, classes, cfg, broken):
    """Print accuracies, write predictions.csv and results.json into --out. -> the line for the log."""
    scores = summarise(probabilities, torch.from_numpy(files.labels))
    scores["per_class"] = {classes[i]: a for i, a in enumerate(scores["per_class"]) if math.isfinite(a)}
    scores["confused"] = [[classes[a], classes[b], n] for a, b, n in scores["confused"]]
    say(f"test: {scores['files']} files x {scores['views']} views{without(broken)}")
    say("  file level  top-1 {top1:.1%}  top-5 {top5:.1%}  mean over classes {class_mean:.1%}\n"
        "  view level  top-1 {view_top1:.1%}  top-5 {view_top5:.1%}\n"
        "  chance      top-1 {chance:.1%}  (always the most frequent class)".format(**scores))  # fmt: skip
    worst = sorted((a, name) for name, a in scores["per_class"].items())[:5]
    say("  worst classes: " + ", ".join(f"{name} {a:.0%}" for a, name in worst))
    if scores["confused"]:
        say("  most confused: " + ", ".join(f"{a} taken for {b} {n}x" for a, b, n in scores["confused"]))
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["path", "label"] + [f"{what}{k}" for k in range(1, 6) for what in ("class", "score")])
    for path, label, p in zip(files.paths, files.labels, probabilities.mean(dim=1)):
        best = [(c, f"{s:.4f}") for c, s in top5(p, classes)] if p.isfinite().all() else [("unreadable", "")]
        table.writerow([path, classes[label], *sum(best, ())])
    # surrogateescape: a name on a disk need not be valid text, and is written as it is
    write(Path(cfg.out, "predictions.csv"), text.getvalue().encode("utf-8", "surrogateescape"))
    numbers = json.dumps({**scores, "mode": cfg.mode, "init": cfg.init}, indent=1)
    write(Path(cfg.out, "results.json"), numbers.encode())
    return f"top-1 {scores['top1']:.1%} (chance {scores['chance']:.1%})"


def report_dense(answers, cfg, classes, broken=(), last=True):
    """Mean IoU or absolute depth error, beside a map that is the same for every picture; the last one is written.

    answers (files, 1, 2 * values), see DenseHead.answers.   -> the line for the log"""
    guess, truth = answers[answers[:, 0, 0].isfinite(), 0].chunk(2, dim=1)  # each (files, values)
    if not len(guess):
        raise InputError("not one test file could be read")
    counted = truth != cfg.ignore

    def mean_iou(x):
        pairs = torch.bincount((truth * classes + x)[counted].long(), minlength=classes**2)
        pairs = pairs.reshape(classes, classes).double()  # [right class, painted class]
        union = pairs.sum(0) + pairs.sum(1) - pairs.diag()
        valid = (union > 0) & (torch.arange(classes) != cfg.ignore)  # void may be painted, and does not count
        return (pairs.diag() / union)[valid].mean().item()

    if cfg.dense == "depth":
        name, score, map_of_all = "depth error", lambda x: (x - truth).abs().mean().item(), truth.median(dim=0).values
    else:
        most = torch.stack([((truth == c) & counted).sum(dim=0) for c in range(classes)]).argmax(dim=0)
        name, score, map_of_all = "mean IoU", mean_iou, most.to(truth)
    ours, constant = score(guess), score(map_of_all.expand_as(truth))
    if last:
        say(f"test: {len(guess)} files{without(broken)}")
        scores = {"task": cfg.dense, name: ours, "constant map": constant, "unreadable": len(broken)}
        write(Path(cfg.out, "results.json"), json.dumps(scores).encode())
    task = name if cfg.dense == "depth" else f"semseg {name}"
    return f"{task} {ours:.3f} (the same map for all: {constant:.3f})"


def find_init(cfg, rank):
    """--init auto: the default run of this script for a test alone, else of mae_video.py (with --model mae: of
    mae_image.py and so on). Where that is not there, how to get it is printed and the answer is "": from scratch."""
    if cfg.init != "auto":
        return cfg.init
    script = {"mae": "mae_image", "omni": "omni", "multimae": "multimae"}.get(cfg.model, "mae_video")
    script = "finetune" if only_tests(cfg) else script
    path = Path("runs") / script / "checkpoint.pt"
    if path.exists():
        return str(path)
    if cfg.mode != "scratch" and rank == 0:
        print(f"{path} is not there: run python {script}.py first, or name a file with --init")
    if only_tests(cfg):
        raise InputError("--eval-only and --predict need --init FILE: a checkpoint of this script, or a public "
                         "classifier")  # fmt: skip
    if cfg.mode in PROBES:
        raise InputError(f"--mode {cfg.mode} needs --init FILE: a network without pretraining knows nothing")
    return ""


def classes_of(found, path):
    """How many classes the classifier in a file knows.   Raises InputError if there is none."""
    head = next((found.state[k] for k in ("head.weight", "head.1.weight") if k in found.state), None)
    if head is None:
        raise InputError(f"{path} holds no classifier, only a pretrained encoder: train one first, without --eval-only "
                         "and --predict")  # fmt: skip
    return len(head)


def open_aligned(files, cfg, train):
    return AlignedDataset(cfg.data, files, planes_of(cfg), cfg.img_size, cfg.maps, cfg.seed, cfg.min_crop,
                          cfg.flip, train)  # fmt: skip


def open_data(cfg):
    """-> dataset for training, files for training, files for testing."""
    if cfg.model == "multimae" and max(cfg.rand_augment, cfg.erase, cfg.mixup, cfg.cutmix) > 0:
        raise InputError("--rand-augment, --erase, --mixup and --cutmix are not built for multimae: set them to 0")

    def open_files(split):
        if cfg.model == "multimae":
            return list_aligned(cfg.data, split, planes_of(cfg))
        if is_video(cfg):
            return data.list_videos(cfg.data, split, cfg.fold, cfg.allow_missing)
        return data.list_images(cfg.data, split, cfg.allow_missing)

    train, test = open_files("train"), open_files("val")
    if train.pixels is not None:  # STL-10: images without a label are for pretraining
        train = select(train, train.labels >= 0)
    if not (cfg.dense or cfg.mode == "features"):
        check_labels(train, test, cfg)
    train = take_share(train, cfg.share, cfg.seed)
    if cfg.model == "multimae":
        dataset = open_aligned(train, cfg, train=True)
    elif is_video(cfg):
        dataset = data.ClipDataset(train, cfg.frames, cfg.stride, cfg.img_size, cfg.seed, cfg.sampling, "random",
                                   cfg.min_crop, cfg.flip, cfg.repeat)  # fmt: skip
    else:
        dataset = data.ImageDataset(train, cfg.img_size, cfg.seed, cfg.min_crop, cfg.flip)
    if cfg.rand_augment:
        dataset = Augmented(dataset, cfg.rand_ops, cfg.rand_augment)
    return dataset, train, test


def main():
    cfg = read_config(Config, PRESETS, __doc__, "finetune", limits=LIMITS, may_change=TEST_FLAGS, adapt=for_mode)
    rank, world, device = start_processes(cfg)
    if cfg.resume:  # the weights come later, with the optimiser; how MAE-ST was built is seen in the file alone
        found = read_init(Path(cfg.out) / "checkpoint.pt")
    else:
        init = find_init(cfg, rank)
        found = read_init(init) if init else None
        if not init and cfg.mode == "finetune":
            cfg = replace(cfg, mode="scratch")
        cfg = settle(replace(cfg, init=init), found)
        seen = found.settings.get("fold", cfg.fold) if found and cfg.mode != "scratch" else cfg.fold
        if seen != cfg.fold and rank == 0:
            print(f"warning: {init} has seen fold {seen}: of the same data, that is test files of fold {cfg.fold}")
    torch.manual_seed(cfg.seed)
    if cfg.predict:
        return predict(cfg, found, device)
    data.fetch(cfg.data, rank, world)
    train, train_files, test_files = open_data(cfg)
    classes = train.classes
    if cfg.eval_only and len(classes) != (known := classes_of(found, cfg.init)):
        raise InputError(f"{cfg.data} has {len(classes)} classes, the classifier in {cfg.init} was trained for {known}")
    if cfg.eval_only and len(found.classes) and list(found.classes) != list(classes):
        raise InputError(f"the classes of {cfg.data} ({', '.join(classes[:3])} ...) are not those of {cfg.init} "
                         f"({', '.join(found.classes[:3])} ...)")  # fmt: skip
    if (cfg.eval_only or cfg.mode == "knn") and (Path(cfg.out) / "checkpoint.pt").exists():
        raise InputError(f"{cfg.out} holds a trained run, whose results would be lost: name another --out")
    model, said = build(cfg, max(len(classes), 1), None if cfg.mode == "scratch" and not cfg.eval_only else found)
    if rank == 0:
        counts = f"{len(train)} files to train, {len(test_files.paths)} to test, {len(classes)} classes"
        print(f"{counts}; {said}" if not cfg.resume else counts, flush=True)
        if (empty := len(classes) - len(set(test_files.labels.tolist()))) > 0:
            print(f"warning: {empty} of {len(classes)} classes have no test file: make folders train/ and val/")
    model.to(device)
    test = lambda clips, crops: run_views(model, test_files, cfg, clips, crops, model.answers)

    def look(model):
        results, _ = test(1, 1)
        if cfg.dense:
            return report_dense(results, cfg, cfg.maps, last=False)
        return f"test, one view: top-1 {summarise(results, torch.from_numpy(test_files.labels))['top1']:.1%}"

    run, finished, result = None, True, ""
    if cfg.mode in ("knn", "features"):
        both = (train_files, test_files)
        (a, lost), (b, broken) = (run_views(model, files, cfg, 1, 1, model.features) for files in both)
        if rank == 0:
            for path, reason in lost + broken:
                print(f"left out, unreadable: {path}: {reason}")
        if cfg.mode == "features":
            return save_features(cfg, rank, {"train": (a[:, 0], train_files), "test": (b[:, 0], test_files)})
        known = a[:, 0, 0].isfinite()
        results = nearest_neighbours(a[known, 0], torch.from_numpy(train_files.labels)[known], b[:, 0],
                                     len(classes))[:, None]  # fmt: skip
    else:
        if not cfg.eval_only:
            run, finished = train_classifier(model, train, look, cfg, {"classes": list(classes)})
        if finished:
            try:
                results, broken = test(cfg.clips, cfg.crops)
            except (KeyboardInterrupt, InputError):
                if run and rank == 0:
                    print(f"\nthe training is saved, its test is not done: python finetune.py --resume --out {cfg.out}")
                raise
    if finished and rank == 0:
        result = (report_dense(results, cfg, cfg.maps, broken) if cfg.dense else
                  report(results, test_files, classes, cfg, broken))  # fmt: skip
    if run:
        run.finish(run.total, result)
    elif rank == 0:
        print(f"done: {result}, see {cfg.out}")


def save_features(cfg, rank, splits):
    """features.npz: for train and test the vectors (N, D) float32, labels (N,) and paths (N,) of readable files."""
    if rank:
        return
    arrays = {}
    for name, (vectors, files) in splits.items():
        readable = vectors.isfinite().all(dim=1).numpy()
        for what, value in (("features", vectors), ("labels", files.labels), ("paths", files.paths)):
            arrays[f"{name}_{what}"] = np.asarray(value)[readable]
    np.savez(file := io.BytesIO(), **arrays)
    write(Path(cfg.out, "features.npz"), file.getvalue())
    print(f"done: {', '.join(f'{k} {v.shape}' for k, v in arrays.items())} in {cfg.out}/features.npz")


def predict(cfg, found, device):
    """Class names with probabilities for one file, the mean over its views."""
    if cfg.model == "multimae" and planes_of(cfg) != ["rgb"]:
        raise InputError(f"--predict reads one file, but the classifier in {cfg.init} sees {cfg.inputs}")
    if Path(cfg.predict).suffix.lower() not in (kinds := data.VIDEO if is_video(cfg) else data.IMAGE):
        raise InputError(f"--predict {cfg.predict}: the classifier in {cfg.init} reads one file, {', '.join(kinds)}")
    rows = classes_of(found, cfg.init)
    classes = found.classes if len(found.classes) == rows else [f"class {i}" for i in range(rows)]
    model = build(cfg, rows, found)[0].to(device)
    files, here = data.Files(np.array([cfg.predict]), np.array([-1]), classes), replace(cfg, workers=0)
    probabilities, broken = run_views(model, files, here, cfg.clips, cfg.crops, model.answers)
    if broken:
        raise InputError(f"cannot read {cfg.predict}: {broken[0][1]}")
    for name, p in top5(probabilities[0].mean(dim=0), classes):
        print(f"{p:6.1%}  {name}")


if __name__ == "__main__":
    run_script(main)
