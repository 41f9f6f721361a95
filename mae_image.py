"""mae_image.py - hide three quarters of an image, see a quarter, paint the rest.

Paper   Masked Autoencoders Are Scalable Vision Learners. He, Chen, Xie, Li, Dollar, Girshick, 2021, arXiv 2111.06377
Covers  Sec. 3 "Masking", Fig. 6         masking.random_mask, block_mask, grid_mask
        Sec. 3 "MAE encoder"             MAE.forward_encoder: the hidden patches are not masked out but absent
        Sec. 3 "MAE decoder"             MAE.forward_decoder
        Sec. 3 "Reconstruction target"   MAE.standardise, MAE.forward_loss
        App. A.1 "ViT architecture"      sincos_2d, Block, ENCODERS
        App. A.1 "Pre-training"          init_weights, lr_at, param_groups, pretrain (Table 8)
Not     fine-tuning and probing (finetune.py); PCA and dVAE targets of Table 1(d).

Run     python mae_image.py                                 (3 min on 2 CPU cores: writes a toy world, pretrains)
        python mae_image.py --data cifar10 --preset cifar10
        python mae_image.py --data FOLDER --preset gpu      (any folder of images, or of class folders)
        python mae_image.py --resume                        (goes on where a run was stopped)
        torchrun --nproc_per_node=2 mae_image.py ...        (several GPUs, or processes on the CPU)
        It ends with "done: ... see runs/mae_image".
Next    mae_video.py: what changes when the image gets a time axis.
"""

import argparse
import contextlib
import dataclasses
import datetime
import errno
import inspect
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import typing
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import data
from data import seeded
from masking import MASKS, InputError, OneLineParser, grid_mask, hidden, last_line, restore, run_script, say, visible

# Published encoders: width D, blocks, heads. tiny is DeiT's (arXiv 2012.12877), small that of VideoMAE's code, the
# others MAE's; huge comes with 14 x 14 patches in MAE, 16 x 16 in VideoMAE. nano is ours, for a laptop.
ENCODERS = {
    "nano": (96, 3, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ============================================================================================================
#  THE PAPER, part 1: from pixels to patches and back                    (needs: torch; masking.py InputError)
# ============================================================================================================


def check_divides(length, part, what, of, flag):
    """Raise InputError, with the two nearest sizes that work, if `part` does not divide `length`."""
    if part < 1 or length < part or length % part:
        low = max(length // max(part, 1), 1) * part
        raise InputError(f"{what} {length} is not a multiple of {of} {part}: use {flag} {low} or {low + part}")


def patchify(imgs, p):
    """Cut images into patches: (B, C, H, W) -> (B, N, p*p*C), N = h*w in raster order, values (row, col, channel)."""
    B, C, H, W = imgs.shape
    check_divides(H, p, "image height", "patch", "--img-size")
    check_divides(W, p, "image width", "patch", "--img-size")
    h, w = H // p, W // p
    x = imgs.reshape(B, C, h, p, w, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
    return x.reshape(B, h * w, p * p * C)


def unpatchify(patches, p, h, w):
    """The inverse: (B, N, p*p*C) -> (B, C, H, W)."""
    B, N, P = patches.shape
    x = patches.reshape(B, h, w, p, p, P // (p * p))
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
    return x.reshape(B, P // (p * p), h * p, w * p)


class PatchEmbed(nn.Module):
    """The strided convolution of the papers, applied to patches that are already cut out.

    A convolution whose stride equals its kernel is one matrix product per patch. Written as such it can be
    applied *after* the hidden patches are dropped: a quarter of the work here, a tenth at 90 % masking. (And bf16
    3-D convolutions are many times slower than the product in several releases of torch.) The parameters stay
    those of the convolution, so its initialisation and public checkpoints fit: proj.weight (D, C, [u,] p, p).
    """

    def __init__(self, kernel, channels, width):
        super().__init__()
        conv = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
        self.proj = conv(channels, width, kernel, stride=kernel)

    def forward(self, patches):
        # Channels go last, because that is their place in a patch.   (B, K, P) -> (B, K, D)
        return F.linear(patches, self.proj.weight.movedim(1, -1).flatten(1), self.proj.bias)


def sincos_1d(width, positions):
    """(N,) positions -> (N, width) float64: [all sines | all cosines], frequencies 10000^(-k / (width/2))."""
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = positions.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(width, h, w):
    """Fixed table of 2-D positions (h*w, width), float32: MAE App. A.1 "ViT architecture".

    important: the first half of the channels encodes the column, the second the row. The official variable names
    suggest the opposite, and public checkpoints depend on it. Computed in float64, as the official table is.
    """
    if width % 4:
        raise InputError(f"width {width} is not a multiple of 4, which the 2-D sine-cosine positions need")
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([sincos_1d(width // 2, cols.flatten()), sincos_1d(width // 2, rows.flatten())], dim=1).float()


# ============================================================================================================
#  THE PAPER, part 2: the Transformer block (ViT, arXiv 2010.11929)      (needs: torch; masking.py InputError)
# ============================================================================================================


class Attention(nn.Module):
    """Multi-head self-attention; heads are consecutive slices of the width."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise InputError(f"width {width} is not a multiple of {heads} heads: each head needs an equal slice")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows [q; k; v]
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block, used by every encoder and decoder of this project.

    important: LayerNorm's epsilon is 1e-6 in all five papers' code, not PyTorch's 1e-5.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_weights(module):
    """Xavier-uniform linears with zero bias, MAE App. A.1 "Pre-training"; the fused qkv counts as one matrix."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# ============================================================================================================
#  THE PAPER, part 3: the model
#  (needs: torch, ENCODERS, IMAGENET_*, parts 1, 2; masking.py InputError, part 3)
# ============================================================================================================


class MAE(nn.Module):
    """Masked autoencoder for images.   loss, pred = model(imgs, mask)

    imgs  (B, 3, H, W) float, normalised with MEAN and STD;   mask (B, N) bool, True = hidden
    loss  float32 scalar;   pred (B, M, P) the painted hidden patches, in the form of the target

    size       name in ENCODERS, or (width, blocks, heads)
    decoder    (width, blocks, heads); the paper's is 512 wide with 8 blocks for every encoder; 16 heads in the code
    norm_pix   predict patches normalised by their own mean and variance (better features, Table 1(d)), else pixels
    raises     InputError if the image is not a multiple of the patch, or a width of its heads
    """

    MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
    NO_DECAY = ()  # names of tensors with two or more dimensions that weight decay leaves alone
    WARMUP_INCLUSIVE = False  # see lr_at

    def __init__(self, img_size=224, patch=16, size="base", decoder=(512, 8, 16), norm_pix=True):
        super().__init__()
        H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
        check_divides(H, patch, "image height", "patch", "--img-size")
        check_divides(W, patch, "image width", "patch", "--img-size")
        D, depth, heads = ENCODERS[size] if isinstance(size, str) else size
        E, decoder_depth, decoder_heads = decoder
        self.patch, self.grid, self.norm_pix = patch, (1, H // patch, W // patch), norm_pix
        P = patch * patch * 3

        self.patch_embed = PatchEmbed((patch, patch), 3, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.ModuleList([Block(D, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_blocks = nn.ModuleList([Block(E, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.decoder_pred = nn.Linear(E, P)

        # Fixed tables, made for this grid and not in the state dict.   (1, N, D), (1, N, E)
        # So the weights fit any image size, but have not seen the positions of another grid: finetune.py resizes
        self.register_buffer("pos_embed", sincos_2d(D, *self.grid[1:])[None], persistent=False)
        self.register_buffer("decoder_pos_embed", sincos_2d(E, *self.grid[1:])[None], persistent=False)

        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # as the matrix it is
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def normalize(self, imgs):
        """Batch from the loader, uint8 (B, H, W, 3) -> (B, 3, H, W) float32. On the device: uint8 travels faster."""
        return normalize(imgs, self.MEAN, self.STD)

    def forward(self, imgs, mask):
        patches = patchify(imgs, self.patch)  # (B, N, P)
        latent = self.forward_encoder(patches, mask)  # (B, 1+K, D)
        x = self.forward_decoder(latent, mask)  # (B, N, E)
        pred = self.decoder_pred(hidden(x, mask))  # (B, M, P)
        return self.forward_loss(patches, pred, mask), pred

    def forward_encoder(self, patches, mask):
        """Only visible patches enter: Sec. 3 "MAE encoder".   (B, N, P), (B, N) -> (B, 1+K, D), class token first"""
        B, N, P = patches.shape
        check_grid(N, self.grid, mask)
        x = self.patch_embed(visible(patches, mask))  # (B, K, D)
        x = x + visible(self.pos_embed.expand(B, -1, -1), mask)  # (B, K, D)
        # App. A.1: the class token is a dummy for later use. Its position is zero, so nothing is added.
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # (B, 1+K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent, mask):
        """All tokens, hidden ones as one learned vector: Sec. 3 "MAE decoder".   (B, 1+K, D) -> (B, N, E)"""
        x = self.decoder_embed(latent)  # (B, 1+K, E)
        cls, vis = x[:, :1], x[:, 1:]
        x = restore(vis, mask, self.mask_token) + self.decoder_pos_embed  # (B, N, E)
        x = torch.cat([cls, x], dim=1)  # (B, 1+N, E)
        for block in self.decoder_blocks:
            x = block(x)
        # important: off with the class token before anything is matched with the mask. A public re-implementation
        # computed its loss on patches shifted by one for 19 months.
        return self.decoder_norm(x)[:, 1:]

    def target_patches(self, imgs):
        """The patches that are to be painted, in the units of pred when norm_pix is off.   -> (B, N, P)"""
        return patchify(imgs, self.patch)

    def standardise(self, patches):
        """Each patch by its own mean and variance, Sec. 3 "Reconstruction target".

        patches (B, M, P) -> target, mean, std, each (B, M, P).   Over all three channels together, unbiased
        variance, epsilon inside the root. VideoMAE and OmniMAE do it per channel, VideoMAE with epsilon outside.
        """
        mean = patches.mean(dim=-1, keepdim=True).expand_as(patches)
        std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt().expand_as(patches)
        return (patches - mean) / std, mean, std

    @torch.no_grad()
    def forward_target(self, patches):
        """Hidden patches -> what pred is compared with, float32 (B, M, P)."""
        return self.standardise(patches.float())[0] if self.norm_pix else patches.float()

    def forward_loss(self, patches, pred, mask):
        """Mean squared error on hidden patches only: Sec. 3 "Reconstruction target"."""
        if pred.shape[1] == 0:
            return pred.float().sum()  # nothing hidden: 0, not 0 / 0
        return F.mse_loss(pred.float(), self.forward_target(hidden(patches, mask)))

    def encode(self, imgs):
        """Every token, no mask: what fine-tuning, probing and features use.   (B, 3, H, W) -> (B, 1+N, D)"""
        patches = patchify(imgs, self.patch)  # (B, N, P)
        return self.forward_encoder(patches, torch.zeros(patches.shape[:2], dtype=torch.bool))

    def to_pictures(self, patches):
        """Target patches (B, N, P) -> pictures (B, 1, 3, H, W) in [0, 1]; the 1 is the number of frames."""
        x = unpatchify(patches, self.patch, *self.grid[1:])  # (B, 3, H, W)
        return to_unit_range(x, self.MEAN, self.STD)[:, None]

    @staticmethod
    def from_public(state):
        """Names of facebookresearch/mae -> ours: the same. Its fixed tables are computed here, so they go."""
        return {k: v for k, v in state.items() if k not in ("pos_embed", "decoder_pos_embed")}


def check_grid(N, grid, mask):
    """Raise InputError if an input, or its mask, has not the N = t*h*w tokens that the model was built for."""
    if not N == math.prod(grid) == mask.shape[1]:
        raise InputError(f"{N} patches and a mask of {mask.shape[1]}, but the model was built for {grid} (t, h, w)")


def normalize(pixels, mean, std):
    """uint8 (B, [T,] H, W, C) -> float32 (B, C, [T,] H, W), (x / 255 - mean) / std per channel."""
    x = pixels.float() / 255
    return ((x - x.new_tensor(mean)) / x.new_tensor(std)).movedim(-1, 1)


def to_unit_range(x, mean, std):
    """Undo the mean and deviation of normalize.   (B, C, ...) float -> the same shape, pixels in [0, 1]"""
    return (x.movedim(1, -1) * x.new_tensor(std) + x.new_tensor(mean)).movedim(-1, 1)


# ============================================================================================================
#  THE PAPER, part 4: how it is trained (App. A.1, Table 8)                                      (needs: math)
# ============================================================================================================


def lr_at(step, base, floor, warmup, total, inclusive=False):
    """Linear warm-up from 0, then half a cosine from `base` to `floor`. Units of step: updates, or epochs.

    inclusive: VideoMAE's warm-up ends on `base` one step earlier (its ramp includes both ends), and never passes it.
    """
    if step < warmup:
        return base * min(step / max(warmup - inclusive, 1), 1)
    return floor + (base - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def param_groups(model, weight_decay):
    """Weight decay for matrices, none for vectors (biases, LayerNorm) and what the model lists in NO_DECAY.

    NO_DECAY None: everything decays, as in MultiMAE's public code.

    important: the rule goes by the number of dimensions, so the class and mask tokens (1, 1, D) do decay in MAE.
    """
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        exempt = model.NO_DECAY is not None and (parameter.ndim < 2 or name in model.NO_DECAY)
        (rest if exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


# ============================================================================================================
#  THE RUN, part 1: settings from the command line
# ============================================================================================================


@dataclass
class Config:
    # data
    data: str = "toy"  # folder of images, list file, cifar10 or stl10; "toy" is written first if it is not there
    img_size: int = 64  # side of the square that the model sees, in pixels
    min_crop: float = 0.2  # smallest share of the image area that a random crop takes; 1: nearly all of it
    flip: bool = True  # mirror half of the images
    allow_missing: bool = False  # a list may name files that are not there: use the others
    workers: int = 2  # processes that load data
    # model
    size: str = "nano"  # encoder: nano, tiny, small, base, large, huge, or WIDTHxBLOCKSxHEADS
    patch: int = 8  # side of a patch in pixels
    decoder_width: int = 64  # the paper's is 512
    decoder_depth: int = 2  # blocks; the paper has 8
    decoder_heads: int = 4  # the public code has 16
    mask: typing.Literal["random", "block", "grid"] = "random"  # which patches are hidden: Fig. 6
    mask_ratio: float = 0.75  # share of patches that are hidden
    norm_pix: bool = False  # predict patches normalised by their own mean and variance, as the paper's best
    # optimiser
    epochs: int = 60  # passes over the data
    batch: int = 64  # samples per update, over all processes and accumulation steps
    accum: int = 1  # forward-backward passes per update: raise it when memory runs out
    lr: float = 8e-3  # base rate, for a batch of 256; the paper's is 1.5e-4, for 500,000 updates instead of 1,500
    min_lr: float = 0.0  # base rate at the end of the cosine
    warmup: float = 4  # epochs of linear warm-up
    weight_decay: float = 0.05  # of matrices; vectors have none
    clip: float = 0.0  # largest norm of the gradient, 0: no clipping, as in the paper
    # run
    out: str = "runs/mae_image"  # folder for checkpoint, log and pictures
    resume: bool = False  # go on with the run in --out
    init: str = ""  # start from the weights in this file: ours, or a public MAE checkpoint
    seed: int = 0  # of weights, masks, order, crops
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format of the matrix products
    compile: bool = False  # torch.compile: slow start, faster steps
    log_every: int = 10  # updates between two lines of the log
    pictures: int = 5  # how often pictures are drawn, evenly over the run, the last at its end; and once before
    smoke: bool = False  # three updates only, to see that everything runs; its folder may be written again


PRESETS = {
    "cifar10": dict(data="cifar10", img_size=32, patch=2, size="tiny", decoder_width=192, decoder_depth=4,
                    decoder_heads=3, norm_pix=True, epochs=400, batch=512, lr=1.5e-4, warmup=40, flip=True,
                    out="runs/mae_cifar10"),
    "gpu": dict(img_size=128, patch=16, size="small", decoder_width=256, decoder_depth=4, decoder_heads=8,
                norm_pix=True, epochs=200, batch=256, lr=1.5e-4, warmup=20, workers=8, out="runs/mae_gpu"),
    # App. A.1, Table 8; epochs of Table 3
    "paper": dict(img_size=224, patch=16, size="base", decoder_width=512, decoder_depth=8, decoder_heads=16,
                  norm_pix=True, epochs=1600, batch=4096, lr=1.5e-4, warmup=40, workers=16,
                  out="runs/mae_paper"),
}  # fmt: skip


def parse_config(Config, presets, doc, argv=None, adapt=None):
    """Command line -> settings. Every field is a flag; the comment behind a field is its --help text.

    Returns {field: value} of what the user gave. Precedence: default < preset < flag.
    adapt  (preset, flags) -> what of the preset suits these flags; None: all of it
    """
    as_flag = lambda k, v: f"--{'no-' * (v is False)}{k.replace('_', '-')}" + ("" if isinstance(v, bool) else f" {v}")
    epilog = "presets:\n" + "\n".join(f"  {name}: {' '.join(as_flag(k, v) for k, v in preset.items())}"
                                      for name, preset in presets.items())  # fmt: skip
    parser = OneLineParser(description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(presets), help="many settings at once, see below; flags overrule")
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        default = f"{field.default:.4g}" if field.type is float else field.default if field.default != "" else "none"
        options = {"default": argparse.SUPPRESS, "help": f"{helps[field.name]} (default: {default})"}
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif choices := typing.get_args(field.type):
            parser.add_argument(flag, choices=choices, **options)
        else:
            parser.add_argument(flag, type=field.type, metavar=field.type.__name__.upper(), **options)
    given = vars(parser.parse_args(argv))
    given = {k: os.path.expanduser(v) if isinstance(v, str) else v for k, v in given.items()}  # --out=~/runs
    preset = presets.get(given.pop("preset"), {})
    return {**(adapt(preset, given) if adapt else preset), **given}


# What a number may be, for all scripts. Sizes that must divide each other are checked where they meet.
BIG = 10**9
AT_LEAST_1 = "img_size patch frames tubelet stride repeat batch accum log_every pictures"
AT_LEAST_1 += " decoder_width decoder_heads decoder_depth"
AT_LEAST_0 = "workers seed epochs warmup lr min_lr weight_decay clip"
LIMITS = [(n, 1, BIG) for n in AT_LEAST_1.split()] + [(n, 0, BIG) for n in AT_LEAST_0.split()] + [("min_crop", 0.01, 1)]

# What may change when a run goes on. All else would make it another run.
MAY_CHANGE = ("out", "data", "resume", "workers", "device", "compile", "log_every", "accum", "pictures")


def read_config(Config, presets, doc, script, limits=(), may_change=(), adapt=None):
    """The config of this run: from the flags or, with --resume, from the checkpoint that it goes on with.

    limits, may_change: what a script adds to LIMITS (or has otherwise) and to MAY_CHANGE; adapt: see parse_config."""
    given = parse_config(Config, presets, doc, adapt=adapt)
    cfg = Config(**given)
    for name, (low, high) in {name: bounds for name, *bounds in [*LIMITS, *limits]}.items():
        if not low <= getattr(cfg, name, low) <= high:
            bounds = f"at least {low:g}" if high == BIG else f"{low:g} to {high:g}"
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be {bounds}")
    if not cfg.resume:
        return cfg
    if not (Path(cfg.out) / "checkpoint.pt").exists():
        raise InputError(f"{cfg.out} holds no run to go on with: leave --resume out, or name the run with --out")
    content = load_file(Path(cfg.out) / "checkpoint.pt")
    if content.get("script") != script:
        raise InputError(f"{cfg.out} holds a run of {content.get('script')}.py, not of {script}.py")
    saved, may_change = content["config"], (*MAY_CHANGE, *may_change)
    if other := saved.keys() ^ {f.name for f in dataclasses.fields(Config)}:
        raise InputError(f"the run in {cfg.out} was begun with another version of {script}.py, which differs in "
                         f"{', '.join(sorted(other))}: go on with that, or --init {cfg.out}/checkpoint.pt")  # fmt: skip
    for name, value in given.items():
        if name not in may_change and value != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {value}: the run in {cfg.out} has {saved[name]}, and a resumed run must keep it; "
                             f"a new one may start with --init {cfg.out}/checkpoint.pt")  # fmt: skip
    return Config(**{**saved, "out": cfg.out, **{k: v for k, v in given.items() if k in may_change}})


def encoder_size(size):
    """--size, a name in ENCODERS or numbers as in 128x4x4 -> (width, blocks, heads)."""
    if size in ENCODERS:
        return ENCODERS[size]
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", size):
        raise InputError(f"--size {size} is unknown: use one of {', '.join(ENCODERS)}, or WIDTHxBLOCKSxHEADS")
    return tuple(int(n) for n in size.split("x"))


# ============================================================================================================
#  THE RUN, part 2: checkpoints
# ============================================================================================================


def save_checkpoint(path, state):
    write_whole(path, lambda file: torch.save(state, file))


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
    except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if getattr(error, "strerror", None) else error.__context__  # torch's own error hides the reason
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {path}: {reason}") from None


def load_file(path):
    """Read a checkpoint, ours or a public one, as tensors and plain values. Raises InputError with one line."""
    try:
        # weights_only refuses pickles that would run code; a Namespace of flags, common in public files, is harmless
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # torch's own for a file cut off
            inside = f"; did you mean {path}/checkpoint.pt?" if os.path.isdir(path) else ""
            raise InputError(f"cannot read checkpoint {path}: {error.strerror}{inside}") from None
        code = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)
        why = "it holds Python code besides numbers, which could do anything" if code else "it is damaged or cut off"
        raise InputError(f"checkpoint {path} is refused: {why}, or no checkpoint at all") from None
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} holds a {type(content).__name__}, not a dict of weights")
    return content


def public_tensors(content):
    """The weights in a public checkpoint: a dict of tensors, or one inside it under a name that differs by paper."""
    inner = next((v for k in ("model", "module", "model_state") if isinstance(v := content.get(k), dict)), content)
    return {k: v for k, v in inner.items() if torch.is_tensor(v)}


DECODER = ("decoder", "mask_token", "output_adapters")  # how the names of its parts begin, in all models
SHAPES = ("model", "size", "patch", "tubelet", "frames", "img_size", "decoder_width", "decoder_depth", "decoder_heads",
          "modalities", "classes", "class_width")  # fmt: skip


def load_weights(model, path, script):
    """Start `model` from a file: a checkpoint of this script, or a public one of its paper. Returns a report.

    A file without decoder is fine (most releases are encoders only), half a decoder is not. Raises InputError for
    whatever else does not fit: a missing, left-over or misshapen tensor.
    """
    content = load_file(path)
    if content.get("script", script) != script:
        raise InputError(f"checkpoint {path} was written by {content['script']}.py, not by {script}.py")
    state = model.from_public(public_tensors(content))
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    fresh = [k for k in missing if k.startswith(DECODER) and not any(s.startswith(DECODER) for s in state)]
    left = [k for k in state if k not in own]
    misfits = [f"{k} {tuple(v.shape)}, here {tuple(own[k].shape)}" for k, v in state.items()
               if k in own and v.shape != own[k].shape]  # fmt: skip
    wrong = [f"no {k}" for k in missing if k not in fresh] + [f"unknown {k}" for k in left] + misfits
    made = content["config"] if "script" in content else {}  # the settings of the run that wrote the file
    said, here = "", model.grid[1]
    resized = any("pos_embed" in k for k in own)  # MAE-ST's are learned
    if made:  # what no shape shows
        heads = {name.split(".")[0]: m.heads for name, m in model.named_modules() if hasattr(m, "heads")}
        theirs = {k: made["decoder_heads"] if k.startswith(DECODER) else encoder_size(made["size"])[2] for k in heads}
        wrong += [f"{theirs[k]} heads in {k}, here {heads[k]}" for k in heads if heads[k] != theirs[k]]
        if made.get("norm_pix", getattr(model, "norm_pix", None)) != getattr(model, "norm_pix", None):
            said = f"; its decoder was trained with --{'no-' * model.norm_pix}norm-pix"
        if (side := made["img_size"] // made["patch"]) != here:
            said += f"; trained on {side} x {side} patches, so the positions of {here} x {here} are "
            said += "resized" if resized else "new to it"
    elif not resized:
        said = f"; it must have been trained on {here} x {here} patches: other positions would be new to it"
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        flags = " ".join(f"--{k.replace('_', '-')} {made[k]}" for k in SHAPES if k in made) or "its --size and --patch"
        raise InputError(f"checkpoint {path} does not fit this model: {wrong[0]}{more}; it needs {flags}")
    model.load_state_dict(state, strict=False)
    return f"{path}: {len(state)} tensors used" + (f", {len(fresh)} of the decoder start fresh" if fresh else "") + said


# ============================================================================================================
#  THE RUN, part 3: the training loop, which knows nothing of images
# ============================================================================================================


def start_processes(cfg):
    """-> rank, world, device. One process, or one of those that torchrun started."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = cfg.device
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not torch.distributed.is_initialized():
        patience = datetime.timedelta(hours=2)  # one process may have data to download while the others wait
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return rank, world, device


def choose_precision(cfg, device):
    """-> dtype of the matrix products. bfloat16 where the GPU has it, float16 (with a loss scaler) on older ones."""
    if cfg.precision != "auto":
        return getattr(torch, cfg.precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def shuffled(seed, epoch, n, items):
    """One pass over n items in the order of (seed, epoch): a list of updates, each a list of `items` numbers.

    The rest that does not fill an update is left out; another epoch's order leaves out others."""
    order = torch.randperm(n, generator=seeded(seed, epoch)).tolist()
    return [order[i : i + items] for i in range(0, n - items + 1, items)]


class Batches:
    """Batch sampler: the keys (epoch, item) that this process loads, from update `start` to update `stop`.

    plan(epoch) -> list of updates, each a list of items. One update is cut into world * accum equal pieces, and
    every process loads its own. So two processes together see what one sees, and a run can begin anywhere.
    """

    def __init__(self, plan, start, stop, rank, world, accum):
        self.plan, self.steps, self.pieces = plan, range(start, stop), [a * world + rank for a in range(accum)]
        self.per_epoch, self.all_pieces = len(plan(0)), world * accum

    def __len__(self):
        return len(self.steps) * len(self.pieces)

    def __iter__(self):
        for step in self.steps:
            epoch, i = divmod(step, self.per_epoch)
            if i == 0 or step == self.steps[0]:
                updates = self.plan(epoch)
            size = len(updates[i]) // self.all_pieces
            for piece in self.pieces:
                yield [(epoch, item) for item in updates[i][piece * size : (piece + 1) * size]]


def pieces_of(cfg, world, repeat):
    """Forward-backward passes of an update, over all processes.   Raises InputError if they cannot be of one size."""
    pieces = world * cfg.accum
    if cfg.batch % (pieces * repeat):
        factors = ((world, "processes"), (cfg.accum, "pieces (--accum)"), (repeat, "clips of one video (--repeat)"))
        shares = " x ".join(f"{n} {what}" for n, what in factors if n > 1)
        raise InputError(f"--batch {cfg.batch} cannot be shared by {shares}: use a multiple of {pieces * repeat}")
    return pieces


def pretrain(model, train, draw_mask, validate, cfg, script, plan=None):
    """Masked pretraining: the only such loop of the project.

    model      loss, pred = model(x, mask); x = model.normalize(batch from the loader); see MAE
    train      dataset: train[(epoch, i)] -> (uint8 (R, ...), i, broken), see data.py; .repeat is R, .paths names
    draw_mask  (batch from the loader, number of rows, generator) -> mask (rows, N)
    validate   (model, path without suffix) -> {"val_loss": ..., "chance": ...}, and draws pictures
    cfg        Config of the script
    plan       epoch -> list of updates, each a list of items; None: all items in random order

    "Randomness is a function, not a history": what item i gets in an epoch comes from (seed, epoch, i), the masks
    of an update from (seed, step). So the result does not depend on the number of workers, processes or
    accumulation pieces, and a stopped run goes on as if nothing had happened.
    """
    rank, world, device = start_processes(cfg)
    pieces = pieces_of(cfg, world, train.repeat)
    items = cfg.batch // train.repeat
    plan = plan or (lambda epoch: shuffled(cfg.seed, epoch, len(train), items))
    per_epoch = len(plan(0))
    if not per_epoch:
        raise InputError(f"{len(train)} items do not fill one update of {items}: use a smaller --batch")
    total = min(cfg.epochs * per_epoch, 3 if cfg.smoke else math.inf)
    peak = cfg.lr * cfg.batch / 256  # the linear scaling rule: App. A.1 "Pre-training"

    said = load_weights(model, cfg.init, script) if cfg.init and not cfg.resume else ""
    model.to(device)
    dtype = choose_precision(cfg, device)
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), peak, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # or small gradients become 0
    run = Run(Path(cfg.out), cfg, script, model, optimizer, scaler, train, writes=rank == 0)
    start = run.open()
    if said:
        run.say(said)
    run.say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {dtype} on {world} x {device}"
            f", {per_epoch} updates x {cfg.epochs} epochs".replace("torch.", ""))  # fmt: skip
    run.say(f"learning rate {cfg.lr:g} x batch {cfg.batch} / 256 = {peak:g}")
    if 0 < cfg.epochs <= cfg.warmup:
        run.say(f"warning: all {cfg.epochs} epochs are warm-up, the rate never reaches its peak: lower --warmup")

    if cfg.compile:
        model.compile()
    # no device_ids: masks stay on the CPU
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    loader = open_loader(train, Batches(plan, start, total, rank, world, cfg.accum), cfg.workers, device)
    if rank == 0 and start == 0:
        run.score(validate(model, run.picture(0)), 0)
    picture_after = {math.ceil(total * k / cfg.pictures) for k in range(1, cfg.pictures + 1)}
    run.begin(start, total, per_epoch, world, device)

    with StopOnSignal() as stop:
        for step in range(start, total):
            lr = lr_at(step, peak, cfg.min_lr * cfg.batch / 256, cfg.warmup * per_epoch, total, model.WARMUP_INCLUSIVE)
            for group in optimizer.param_groups:
                group["lr"] = lr
            update_loss, names = 0.0, []
            for a in range(cfg.accum):
                batch, index = run.next_batch(loader, step)
                names += [str(train.paths[i]) for i in index]
                mask = draw_mask(batch, cfg.batch, seeded(cfg.seed, 1, step)).chunk(pieces)[a * world + rank]
                x = model.normalize(batch.to(device, non_blocking=True))
                hold = parallel.no_sync() if world > 1 and a + 1 < cfg.accum else contextlib.nullcontext()
                with hold:
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        loss, _ = parallel(x, mask)
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
            if rank == 0 and done in picture_after and (done == total or not stop):
                run.score(validate(model, run.picture(done)), done)
            run.save_if_due(done, ending)
            if ending:
                break
    run.finish(total)


def open_loader(train, batches, workers, device):
    """Start the loader. torch's signal handler would raise at any line when a worker is killed; without it next()
    raises, where Run.next_batch saves and finetune.deliver makes it one line."""
    loader = iter(data.make_loader(train, batches, workers, device))
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return loader


def agree(flag, world, device):
    """True on every process as soon as it is True on one: they must leave the loop after the same update."""
    if world == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)


def average_over_processes(losses, world, device):
    """Losses of this process (tensors or numbers) -> numbers, averaged over all processes."""
    values = torch.tensor([float(x) for x in losses], dtype=torch.float64)
    if world > 1:
        values = values.float().to(device)  # some accelerators have no float64
        torch.distributed.all_reduce(values)
        values = values.cpu().double() / world
    return values.tolist()


class StopOnSignal:
    """Ctrl-C (or SIGTERM) sets a flag; the loop ends after the update at hand. A second Ctrl-C stops at once."""

    def __bool__(self):
        return self.flag

    def __enter__(self):
        self.flag, self.before = False, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for s in self.before:
            signal.signal(s, self.ask)
        return self

    def ask(self, number, frame):
        self.flag = True
        signal.signal(number, self.before[number])
        say("\nstopping after this update (once more: at once)")

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def fingerprint(train):
    """Number of training files, and a checksum of names and labels. Not of folders: the data may have moved."""
    labels = getattr(train, "labels", itertools.repeat(""))
    names = [f"{os.path.basename(path)} {label}" for path, label in zip(train.paths, labels)]
    return [len(names), zlib.crc32("\n".join(names).encode("utf-8", "surrogateescape"))]


class Run:
    """The folder of one run: checkpoint.pt, log.jsonl, pictures/. Only one process writes."""

    def __init__(self, out, cfg, script, model, optimizer, scaler, train, writes, extra=None):
        # what else is in the checkpoint: the files it was trained on, and what a script wants to find there
        self.extra = {"files": fingerprint(train), **(extra or {})}
        self.out, self.cfg, self.script, self.writes = out, cfg, script, writes
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.saved_step, self.losses, self.scores = 0, [], {"chance": float("nan"), "val_loss": float("nan")}
        self.broken, self.began, self.save_seconds, self.saved_at, self.board = {}, time.perf_counter(), 0.0, 0.0, None
        self.failed = False  # to write the last checkpoint

    def open(self):
        """-> the first update to do. Makes the folder or reads it."""
        checkpoint, log = self.out / "checkpoint.pt", self.out / "log.jsonl"
        if self.cfg.resume:
            state = load_file(checkpoint)
            if state["files"] != (files := self.extra["files"]):
                raise InputError(f"{self.cfg.data} is not what {self.out} was begun with ({state['files'][0]} training "
                                 f"files then, {files[0]} now): a resumed run needs the same")  # fmt: skip
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty if the run began on a device that needs none
                self.scaler.load_state_dict(state["scaler"])
            self.saved_step, self.losses, self.scores = state["step"], state["losses"], state["scores"]
        elif self.writes and checkpoint.exists() and not load_file(checkpoint).get("config", {}).get("smoke"):
            raise InputError(f"{self.out} already holds a run: --resume to go on with it, or another --out")
        if self.writes:
            try:
                (self.out / "pictures").mkdir(parents=True, exist_ok=True)
                self.lock()
                if not self.cfg.resume:  # what a smoke test left; --resume would take it for a part of this run
                    for old in (checkpoint, *(self.out / "pictures").glob("update_*")):
                        old.unlink(missing_ok=True)
                lines = log.read_text().splitlines() if log.exists() and self.cfg.resume else []
                (self.out / "log.tmp").write_text("".join(x + "\n" for x in lines if self.belongs(x)))
                os.replace(self.out / "log.tmp", log)
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot write the run folder {self.out}: {error}") from None
            with contextlib.suppress(ImportError):  # TensorBoard only if it is installed
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.out)
            if self.cfg.resume:
                self.say(f"resumed {self.out} after update {self.saved_step}")
        return self.saved_step

    def lock(self):
        """Two runs in one folder would overwrite each other. The lock ends with the process, however that ends."""
        with contextlib.suppress(ImportError, OSError):  # not on Windows, nor on every network disk
            import fcntl

            self.locked = open(self.out / ".lock", "w")
            try:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise InputError(f"another run is writing to {self.out}: wait for it, or take another --out") from None

    def belongs(self, line):
        """Whether a line of the log was written before the checkpoint; not one that a crash cut off."""
        try:
            return json.loads(line)["step"] <= self.saved_step
        except (ValueError, KeyError):
            return False

    def say(self, text):
        if self.writes:
            say(text)

    def log(self, record):
        """One JSON line. A full disk is reported and does not end the training."""
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self.say(f"warning: cannot write the log: {error}")
        if self.board:
            for name, value in record.items():
                if name != "step" and isinstance(value, float):
                    self.board.add_scalar(name, value, record["step"])

    def begin(self, start, total, per_epoch, world, device):
        """Counters of the log, just before the first update."""
        self.total, self.per_epoch, self.world, self.device = total, per_epoch, world, device
        self.unchecked, self.wait, self.mark, self.clock = [], 0.0, start, time.perf_counter()

    def after_update(self, done, loss, names, lr, ending):
        """Look at the loss, and write a line of the log when it is due. names: the files of the batch."""
        logging = done % self.cfg.log_every == 0 or done == self.total
        due = logging or done % self.per_epoch == 0 or ending
        self.losses.append(loss)  # since the last line of the log
        self.unchecked.append((done - 1, loss, names))
        # A loss is looked at one update later: asking for its value at once makes the CPU wait for the GPU.
        self.check_finite(self.unchecked if due else self.unchecked[:-1])
        self.unchecked = self.unchecked[-1:]
        if due:
            self.losses = average_over_processes(self.losses, self.world, self.device)
        if logging:
            self.log_step(done, sum(self.losses) / len(self.losses), lr)
            self.losses = []

    def log_step(self, done, loss, lr):
        now = time.perf_counter()
        speed, waiting = (done - self.mark) * self.cfg.batch / (now - self.clock), self.wait / (now - self.clock)
        self.mark, self.wait, self.clock = done, 0.0, now
        if not self.writes:
            return
        eta, chance = (self.total - done) * self.cfg.batch / speed, self.scores["chance"]
        beside = f" (chance {chance:.3f})" if math.isfinite(chance) else ""
        self.say(f"epoch {done / self.per_epoch:6.1f}  update {done:6d}/{self.total}  loss {loss:.4f}{beside}  "
                 f"lr {lr:.1e}  {speed:7.1f} samples/s  waiting for data {waiting:4.0%}  ETA {clock_text(eta)}")
        self.log({"step": done, "epoch": done / self.per_epoch, "loss": loss, "chance": chance, "lr": lr,
                  "samples_per_second": speed, "data_wait": waiting})  # fmt: skip

    def score(self, scores, done):
        """Result of validate(): the held-out loss, and its chance level that the log shows from now on."""
        self.scores = scores
        self.say(f"held-out loss {scores['val_loss']:.4f} (chance {scores['chance']:.3f})  {self.picture(done)}.png")
        self.log({"step": done, **scores})

    def picture(self, done):
        return self.out / "pictures" / f"update_{done:06d}"

    def next_batch(self, loader, step):
        """-> batch, file numbers. When the loader cannot deliver, the state is saved before the run ends."""
        tick = time.perf_counter()
        try:
            batch, index, broken = next(loader)
        # a worker was killed (OSError or EOFError: while it handed a batch over), or too many files in a row are broken
        except (RuntimeError, OSError, EOFError, InputError) as error:
            if step > self.saved_step:
                self.losses = [float(x) for x in self.losses]
                self.save(step, must=True)
            hint = f"; go on with --resume --out {self.out}" if self.saved_step else ""
            sys.exit(f"{self.script}.py: the loader failed: {last_line(error)}{hint}")
        self.wait += time.perf_counter() - tick
        self.report_broken(broken)
        return batch, index

    def report_broken(self, broken):
        for path, reason in broken:
            if path not in self.broken:
                self.say(f"broken file, another one taken: {path}: {reason}")
            self.broken[path] = self.broken.get(path, 0) + 1

    def check_finite(self, losses):
        for step, loss, names in losses:
            if not math.isfinite(loss):
                sys.exit(f"{self.script}.py: loss is {float(loss)} in update {step + 1}, stopped; try a lower --lr, "
                         f"--clip 1 or --precision float32. The batch was: {', '.join(names)}")  # fmt: skip

    def save_if_due(self, done, ending):
        if done % self.per_epoch == 0 or ending:
            self.save(done, must=ending)

    def save(self, done, must):
        """After an epoch, unless saving would take more than a twentieth of the time; always at the end."""
        big = self.save_seconds > 0.5
        if not self.writes or (big and not must and time.perf_counter() - self.saved_at < 20 * self.save_seconds):
            return
        tick = time.perf_counter()
        try:
            save_checkpoint(self.out / "checkpoint.pt", {
                "script": self.script, "config": dataclasses.asdict(self.cfg), "step": done, "losses": self.losses,
                "scores": self.scores, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), **self.extra})  # fmt: skip
            self.saved_step = done
        except OSError as error:
            stays = f"the checkpoint of update {self.saved_step} stays" if self.saved_step else "there is none yet"
            self.say(f"warning: {error}; {stays}")
            self.failed = must
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - tick

    def finish(self, total, result=""):
        if self.broken:
            self.say(f"{len(self.broken)} broken files were met {sum(self.broken.values())} times: "
                     + ", ".join(sorted(self.broken)[:20]))  # fmt: skip
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if self.writes and self.saved_step < total:
            how = f"; go on with: python {self.script}.py --resume --out {self.out}" if self.saved_step else ""
            self.say(f"stopped after update {self.saved_step}{how}")
            sys.exit(1 if self.failed else 130)  # 130: what a shell expects after Ctrl-C
        if total:
            self.say(f"weights in {self.out}/checkpoint.pt")
        result = result or f"held-out loss {self.scores['val_loss']:.4f} (chance {self.scores['chance']:.3f})"
        self.say(f"done: {result} after {clock_text(time.perf_counter() - self.began)}, see {self.out}")


def clock_text(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# ============================================================================================================
#  THE RUN, part 4: pictures
# ============================================================================================================


@torch.no_grad()
def reconstruct(model, imgs, mask):
    """What the model makes of a masked batch.

    -> loss, chance, {title: pictures (B, frames, 3, H, W) in [0, 1]}
    chance is the loss of the best constant prediction: the variance of the target. With patches normalised over n
    values (P, or P / 3 where each channel has its own) it is (n - 1) / n, since they are divided by the unbiased
    deviation, and less where patches are flat.
    important: a normalised prediction has no mean and deviation of its own, so the picture takes both from the hidden
    original: brightness and contrast, and where every channel has its own (VideoMAE, OmniMAE) the colour. That alone
    looks like a reconstruction! The extra picture shows what a model that has learnt nothing would "rebuild" that way.
    """
    # model.forward, not model(): pictures come in another batch size, for which nothing need be compiled
    loss, pred = model.forward(imgs, mask)
    patches = model.target_patches(imgs)  # (B, N, P)
    target = model.forward_target(hidden(patches, mask))  # (B, M, P)
    # hidden patches as painted, visible ones as they are
    fill = lambda painted: model.to_pictures(restore(painted, ~mask, patches))
    original = model.to_pictures(patches)
    # 1 where hidden, in picture form: paint the hidden patches in two ways and see what changes
    hole = (fill(torch.zeros_like(pred)) - fill(torch.ones_like(pred))).abs() > 1e-3
    pictures = {"original": original, "masked": torch.where(hole, 0.5, original)}
    pred = pred.float()
    if model.norm_pix:
        _, mean, std = model.standardise(hidden(patches, mask))
        pictures["knowing nothing*"] = fill(mean)
        pred = pred * std + mean
    painted = fill(pred)
    pictures["prediction" + "*" * model.norm_pix] = torch.where(hole, painted, 0.5)
    pictures["pasted in" + "*" * model.norm_pix] = painted
    return loss.item(), target.var(correction=0).item(), {k: v.clamp(0, 1) for k, v in pictures.items()}


LEAK_NOTE = "* mean and deviation of each hidden patch are taken from the original"


def picture_table(cells, titles, note=""):
    """Pictures in a table with a line of titles.   cells (rows, columns, 3, H, W) in [0, 1] -> PIL image"""
    rows, columns, C, H, W = cells.shape
    zoom = math.ceil(96 / W)
    cells = (cells * 255).round().byte().cpu().repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
    gap, top = 4, 18
    H, W = H * zoom + gap, W * zoom + gap
    ends = [c * W + ImageFont.load_default().getlength(title) for c, title in [*enumerate(titles), (0, note)]]
    width = max(columns * W + gap, math.ceil(max(ends)) + 2 * gap)
    table = Image.new("RGB", (width, top + rows * H + (top if note else 0)), "white")
    pen = ImageDraw.Draw(table)
    for c, title in enumerate(titles):
        pen.text((gap + c * W, 3), title, fill="black")
    for r, c in np.ndindex(rows, columns):
        table.paste(Image.fromarray(cells[r, c].permute(1, 2, 0).numpy()), (gap + c * W, top + r * H))
    pen.text((gap, top + rows * H + 1), note, fill="black")
    return table


def held_out(val, draw_mask, seed, count, what="held-out"):
    """The same few samples under the same masks every time.   -> uint8 batch, mask"""
    chosen = np.linspace(0, len(val) - 1, min(len(val), count)).astype(int)  # over all classes
    items = [val[0, int(i)] for i in chosen]
    if is_first():
        for path, reason in dict.fromkeys(one for _, _, broken in items for one in broken):
            print(f"broken {what} file, another one taken: {path}: {reason}")
    batch = torch.cat([pixels for pixels, _, _ in items])
    return batch, draw_mask(batch, len(batch), seeded(seed, 2))


def is_first():
    """Whether this is the only process or the first of several: the one that prints."""
    return int(os.environ.get("RANK", 0)) == 0


def save_picture(image, path):
    try:
        image.save(path)
    except OSError as error:
        say(f"warning: cannot write {path}: {error}")


# ============================================================================================================
#  THE RUN, part 5: main
# ============================================================================================================


def check_mask(mask, what="", hint="raise the mask ratio, or have more tokens: a smaller --patch"):
    """Complain now about a mask (1, N) that hides nothing, not after the data is read; else say how much it hides."""
    if not mask.any():
        raise InputError(f"{what}this mask hides nothing, so there is nothing to learn: {hint}")
    if is_first():  # whole slots, or odd sides: not always the share that was asked for
        print(f"{what}{int(mask.sum())} of {mask.shape[1]} tokens hidden")


def main():
    cfg = read_config(Config, PRESETS, __doc__, "mae_image")
    rank, world, device = start_processes(cfg)
    data.fetch(cfg.data, rank, world)
    torch.manual_seed(cfg.seed)
    decoder = (cfg.decoder_width, cfg.decoder_depth, cfg.decoder_heads)
    model = MAE(cfg.img_size, cfg.patch, encoder_size(cfg.size), decoder, cfg.norm_pix)
    draw = grid_mask if cfg.mask == "grid" else MASKS[cfg.mask]
    draw_mask = lambda batch, rows, generator: draw(rows, model.grid, cfg.mask_ratio, generator)
    check_mask(draw_mask(None, 1, torch.Generator()))

    open_split = lambda split: data.list_images(cfg.data, split, cfg.allow_missing)
    train = data.ImageDataset(open_split("train"), cfg.img_size, cfg.seed, min_crop=cfg.min_crop, flip=cfg.flip)
    val = data.ImageDataset(open_split("val"), cfg.img_size, cfg.seed, train=False)
    batch, mask = held_out(val, draw_mask, cfg.seed, 64)

    def validate(model, path):
        loss, chance, pictures = reconstruct(model, model.normalize(batch.to(device)), mask)
        some = torch.linspace(0, len(batch) - 1, min(6, len(batch))).long()
        cells = torch.stack([p[some, 0] for p in pictures.values()], dim=1)  # (6, columns, 3, H, W)
        save_picture(picture_table(cells, list(pictures), LEAK_NOTE if model.norm_pix else ""), f"{path}.png")
        return {"val_loss": loss, "chance": chance}

    pretrain(model, train, draw_mask, validate, cfg, "mae_image")


if __name__ == "__main__":
    run_script(main)
