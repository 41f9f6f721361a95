"""mae_image.py - hide three quarters of an image, see a quarter, paint the rest.

Trains a masked autoencoder on any folder of images; what it learnt is saved for finetune.py, with
pictures of what it paints. --picture shows what a trained model makes of one image.

Paper   Masked Autoencoders Are Scalable Vision Learners. He, Chen, Xie, Li, Dollar, Girshick, 2021,
        arXiv 2111.06377
Covers  Sec. 3 "Masking", Fig. 6         masking.random_mask, block_mask, grid_mask
        Sec. 3 "MAE encoder"             MAE.forward_encoder: hidden patches are not there at all
        Sec. 3 "MAE decoder"             MAE.forward_decoder
        Sec. 3 "Reconstruction target"   MAE.normalize_patches, MAE.forward_loss
        App. A.1 "ViT architecture"      sincos_2d, Block, ENCODERS
        App. A.1 "Pre-training"          init_weights, lr_at, param_groups, train (Table 8)
Not     fine-tuning and probing (finetune.py); PCA and dVAE targets of Table 1(d)

Run     python mae_image.py                              (2 min on 2 CPU cores, with the toy world)
        python mae_image.py --picture cat.jpg --init mae_visualize_vit_base.pth --no-norm-pix
        python mae_image.py --data cifar10 --preset cifar10
        python mae_image.py --data FOLDER --preset gpu   (any folder of images, or of class folders)
        python mae_image.py --resume                     (continues a run that was stopped)
        torchrun --nproc_per_node=2 mae_image.py ...     (several GPUs, or processes on the CPU)
        It ends with "done: ... see runs/mae_image".
Next    mae_video.py: what changes when the image gets a time axis.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import signal
import time
import typing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import data
from masking import (HOLE, MASKS, as_pixels, hidden, is_first, numbers, picture_table,
                     rank_and_world, report, restore, run_script, settings, visible)

# Published encoders: width D, blocks, heads. tiny is DeiT's (arXiv 2012.12877), small that of
# VideoMAE's code, the others MAE's (huge: patches of 14 in MAE, of 16 in VideoMAE); nano is ours.
ENCODERS = {
    "nano": (96, 4, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ==== THE PAPER, part 1: from pixels to patches and back (needs: torch, F, nn) ====================
def parts_of(length, part, what):
    """How many parts a side has.   Raises ValueError if it cannot be cut evenly"""
    if length % part:
        low = max(length // part, 1) * part
        raise ValueError(f"{what} {length} is not a multiple of {part}: {low} and {low + part} are")
    return length // part


def rows_and_columns(size, p):
    """How many of them an image is cut into.   size: height and width, or one number for both"""
    H, W = (size, size) if isinstance(size, int) else size
    return parts_of(H, p, "image height"), parts_of(W, p, "image width")


def patchify(imgs, p):
    """Cut images into patches: (B, C, H, W) -> (B, N, p*p*C), values (row, col, channel)."""
    B, C, H, W = imgs.shape
    h, w = rows_and_columns((H, W), p)
    x = imgs.reshape(B, C, h, p, w, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
    return x.reshape(B, h * w, p * p * C)


def unpatchify(patches, p, h, w):
    """The inverse: (B, N, p*p*C) -> (B, C, H, W)."""
    B, N, P = patches.shape
    x = patches.reshape(B, h, w, p, p, P // (p * p))
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
    return x.reshape(B, P // (p * p), h * p, w * p)


def check_shape(x, *sizes):
    """Raises ValueError unless x (B, C, ...) has one of the sizes: positions would be wrong."""
    if tuple(x.shape[2:]) not in sizes:
        raise ValueError(f"an input of {tuple(x.shape[2:])}, but the model takes "
                         f"{' or '.join(map(str, sizes))}")


class PatchEmbed(nn.Module):
    """The strided convolution of the papers, applied to patches that are already cut out.

    A convolution whose stride equals its kernel is one matrix product per patch. Written as such it
    can be applied *after* the hidden patches are dropped: a quarter of the work here, a tenth at
    90 %. (And 3-D convolutions in bf16 are many times slower than the product in several releases
    of torch.) The parameters stay those of the convolution, so its initialisation and public
    checkpoints fit: proj.weight (D, C, [u,] p, p).
    """

    def __init__(self, kernel, channels, width):
        super().__init__()
        conv = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
        self.proj = conv(channels, width, kernel, stride=kernel)

    def forward(self, patches):
        # Channels go last, because that is their place in a patch.   (B, K, P) -> (B, K, D)
        return F.linear(patches, self.proj.weight.movedim(1, -1).flatten(1), self.proj.bias)


def sincos_2d(width, h, w):
    """Fixed table of 2-D positions (h*w, width), float32: MAE App. A.1 "ViT architecture".

    Sines, then cosines of 10000^(-4k / width) * column, then the same of the row.
    important: the first half of the channels encodes the column, the second the row. The official
    variable names suggest the opposite, and public checkpoints depend on it. Computed in float64,
    as the official table is.
    """
    n = parts_of(width, 4, "2-D sine-cosine positions: width")  # frequencies
    frequency = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / (width / 4))
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (cols, rows)]  # each (h*w, n)
    # sines and cosines of the column, then of the row
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=1).float()


# ==== THE PAPER, part 2: the Transformer block (ViT, arXiv 2010.11929) ============================
# (needs: F, nn, parts_of)
class Attention(nn.Module):
    """Multi-head self-attention; heads are consecutive slices of the width."""

    def __init__(self, width, heads):
        super().__init__()
        parts_of(width, heads, "heads need equal slices: width")
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


def layer_norm(width):
    """important: epsilon is 1e-6 in all five papers' code, not PyTorch's 1e-5."""
    return nn.LayerNorm(width, eps=1e-6)


class Block(nn.Module):
    """Pre-norm Transformer block, in every encoder and decoder of this project."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def transformer(width, depth, heads):
    """So many blocks, one after the other."""
    return nn.Sequential(*[Block(width, heads) for _ in range(depth)])


def init_weights(module):
    """Xavier-uniform linears, zero bias: App. A.1 "Pre-training". The fused qkv is one matrix."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# ==== THE PAPER, part 3: the model ================================================================
# (needs: torch, F, nn, ENCODERS, IMAGENET_*, parts 1, 2; masking.py part 3)
class MAE(nn.Module):
    """Masked autoencoder for images.   loss, pred = model(imgs, mask)

    imgs  (B, C, H, W) float, normalised with mean and std;   mask (B, N) bool, True = hidden
    loss  float32 scalar;   pred (B, M, P) the painted hidden patches, in the form of the target

    img_size   height and width, or one number for both
    size       name in ENCODERS, or (width, blocks, heads)
    decoder    (width, blocks, heads); (512, 8) in the paper for every encoder, 16 heads in the code
    norm_pix   predict patches normalised by their own mean and variance (Table 1(d)), else pixels
    mean, std  of each channel, in [0, 1]; None: ImageNet's, for other than 3 channels 0.5
    raises     ValueError if the image cannot be cut into patches, or a width into heads
    """

    NO_DECAY = ()  # names of tensors with two or more dimensions that weight decay leaves alone
    WARMUP_INCLUSIVE = False  # see lr_at

    def __init__(self, img_size=224, patch=16, size="base", decoder=(512, 8, 16), norm_pix=True,
                 channels=3, mean=None, std=None):
        super().__init__()
        self.grid = 1, *rows_and_columns(img_size, patch)
        self.patch, self.norm_pix = patch, norm_pix
        self.mean, self.std = mean_and_std(channels, mean, std)
        D, depth, heads = ENCODERS.get(size, size)
        E = decoder[0]

        # encoder: sees the visible patches alone
        self.patch_embed = PatchEmbed((patch, patch), channels, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = transformer(D, depth, heads)
        self.norm = layer_norm(D)

        # decoder: sees all patches, hidden ones as one learned vector; dropped after pretraining
        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_blocks = transformer(*decoder)
        self.decoder_norm = layer_norm(E)
        self.decoder_pred = nn.Linear(E, patch * patch * channels)

        # Fixed tables, (1, N, D) and (1, N, E), not in the state dict: weights load at any image
        # size. A new grid gets a fresh table here; finetune.py resizes that of pretraining instead.
        h, w = self.grid[1:]
        self.register_buffer("pos_embed", sincos_2d(D, h, w)[None], persistent=False)
        self.register_buffer("decoder_pos_embed", sincos_2d(E, h, w)[None], persistent=False)

        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # as the matrix it is
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def normalize(self, batch):
        """uint8 (B, [T,] H, W, C) -> float32 (B, C, [T,] H, W), (x / 255 - mean) / std per channel.

        On the device: uint8 travels faster.
        """
        x = batch.float() / 255
        return ((x - x.new_tensor(self.mean)) / x.new_tensor(self.std)).movedim(-1, 1)

    def forward(self, imgs, mask):
        latent = self.forward_encoder(imgs, mask)  # (B, 1+K, D)
        pred = self.forward_decoder(latent, mask)  # (B, M, P)
        return self.forward_loss(imgs, pred, mask), pred

    def forward_encoder(self, imgs, mask=None):
        """Only visible patches enter: Sec. 3 "MAE encoder".   -> (B, 1+K, D), class token first"""
        patches = self.patches(imgs)  # (B, N, P)
        B, N, P = patches.shape
        x = self.patch_embed(visible(patches, mask)) + visible(self.pos_embed, mask)  # (B, K, D)
        # App. A.1: the class token is a dummy for later use. Its position is zero: nothing is added
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # (B, 1+K, D)
        return self.norm(self.blocks(x))

    encode = forward_encoder  # without a mask every token: fine-tuning, probing, features

    def forward_decoder(self, latent, mask):
        """All tokens, the hidden ones as one learned vector: Sec. 3 "MAE decoder" -> (B, M, P)"""
        x = self.decoder_embed(latent)  # (B, 1+K, E)
        cls, vis = x[:, :1], x[:, 1:]
        x = restore(vis, mask, self.mask_token) + self.decoder_pos_embed  # (B, N, E)
        x = torch.cat([cls, x], dim=1)  # (B, 1+N, E)
        # important: drop the class token before applying the mask. A public re-implementation
        # computed its loss on patches shifted by one for 19 months.
        x = self.decoder_norm(self.decoder_blocks(x))[:, 1:]  # (B, N, E)
        return self.decoder_pred(hidden(x, mask))

    def patches(self, imgs):
        """The image cut into patches: input of the encoder, without norm_pix the target, too."""
        check_shape(imgs, (self.grid[1] * self.patch, self.grid[2] * self.patch))
        return patchify(imgs, self.patch)

    def normalize_patches(self, patches):
        """Each patch by its own mean and variance: Sec. 3 "Reconstruction target".

        patches (B, M, P) -> target, mean, std, each (B, M, P).   Over all channels together,
        unbiased variance, epsilon inside the root; VideoMAE and OmniMAE do it for each channel.
        """
        mean = patches.mean(dim=-1, keepdim=True).expand_as(patches)
        std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt().expand_as(patches)
        return (patches - mean) / std, mean, std

    def target(self, imgs, mask):
        """What pred is compared with: hidden patches, float32 (B, M, P)."""
        target = hidden(self.patches(imgs.float()), mask)  # (B, M, P)
        return self.normalize_patches(target)[0] if self.norm_pix else target

    def forward_loss(self, imgs, pred, mask):
        """Mean squared error on hidden patches only: Sec. 3 "Reconstruction target"."""
        if pred.shape[1] == 0:
            return pred.float().sum()  # nothing hidden: 0, where the public code has 0 / 0
        return F.mse_loss(pred.float(), self.target(imgs, mask))

    def to_pictures(self, patches):
        """Patches (B, N, P) -> pictures (B, 1, C, H, W) in [0, 1]; 1 is the number of frames."""
        x = unpatchify(patches, self.patch, *self.grid[1:])  # (B, C, H, W)
        return to_unit_range(x, self.mean, self.std)[:, None]


def mean_and_std(channels, mean, std):
    """Of each channel: what was given, else ImageNet's for three channels, else 0.5."""
    half = (0.5,) * channels
    default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (half, half)
    return mean or default[0], std or default[1]


def to_unit_range(x, mean, std):
    """Undo normalize, except / 255.   (B, C, ...) -> the same shape; real pixels are in [0, 1]"""
    return (x.movedim(1, -1) * x.new_tensor(std) + x.new_tensor(mean)).movedim(-1, 1)


# ==== THE PAPER, part 4: how it is trained (App. A.1, Table 8) ====================================
# train() uses batches() and start_loader() of data.py, and the class Run, at the end of this file.
def lr_at(step, peak, floor, warmup, total, inclusive=False):
    """Linear warm-up from 0, then half a cosine from `peak` to `floor`.   All counted in updates.

    inclusive: the ramp is at `peak` one step earlier (np.linspace in VideoMAE's, MultiMAE's code).
    """
    if step < warmup:
        return peak * min(step / max(warmup - inclusive, 1), 1)
    share = (step - warmup) / max(total - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share))


def param_groups(model, weight_decay):
    """Weight decay for matrices, none for vectors (biases, LayerNorm) and what is in NO_DECAY.

    important: what counts is the number of dimensions: MAE's class and mask tokens (1, 1, D) decay.
    NO_DECAY None: everything decays, as in MultiMAE's public code.
    """
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        exempt = model.NO_DECAY is not None and (parameter.ndim < 2 or name in model.NO_DECAY)
        (rest if exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(model, dataset, loss_of, optimizer, look, cfg, plan=None):
    """The training loop of every script, finetune.py's too. Papers differ in their `loss_of`.

    dataset  dataset[epoch, i] -> (uint8 (R, ...), i, problems), see data.FileDataset
    loss_of  (net, batch, items, step, piece) -> scalar; items: indices of the files in the batch
    look     (path of a PNG) -> {"val_loss": ...}: held-out numbers; draws pictures
    plan     epoch -> list of updates, each a list of items; None: all items in random order
    returns  the Run, which is `stopping` if it was asked to

    Randomness is a function, not a history: what item i gets in an epoch comes from (seed, epoch,
    i), the masks of an update from (seed, step). So a pretraining is the same with any number of
    workers, processes and pieces (fine-tuning: of workers), and a stopped run continues exactly.
    """
    rank, world = rank_and_world()
    files = cfg.batch // dataset.repeat
    plan = plan or (lambda epoch: data.shuffled(cfg.seed, epoch, len(dataset), files))
    per_epoch = count_updates(plan, dataset, cfg, world)
    total = cfg.epochs * per_epoch
    if cfg.smoke:
        total = min(total, 3)
    scale = cfg.batch / 256  # the linear scaling rule: lr = base rate x batch / 256
    peak, floor, warmup = cfg.lr * scale, cfg.min_lr * scale, cfg.warmup * per_epoch
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model  # averages gradients
    with Run(cfg, model, optimizer, dataset, per_epoch, total) as run:
        start = run.done  # 0, or where a resumed run had come to
        keys = data.batches(plan, start, total, rank, world, cfg.accum)
        loader = data.start_loader(dataset, cfg.workers, batch_sampler=keys,
                                   collate_fn=data.collate,
                                   pin_memory=run.device.type == "cuda")
        if start == 0 and cfg.pictures:
            run.score(look)
        for step in range(start, total):
            lr = lr_at(step, peak, floor, warmup, total, model.WARMUP_INCLUSIVE)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)  # fine-tuning: a rate for each layer

            # one update, in `accum` pieces if the whole does not fit into memory
            model.train()
            seed = data.seeded(cfg.seed, 6, step, rank).initial_seed()
            torch.manual_seed(seed)  # of drop path, Mixup, erasing
            loss = 0.0
            for a in range(cfg.accum):
                batch, items = run.next(loader)
                if world > 1:  # gradients are averaged once, after the update's last piece
                    net.require_backward_grad_sync = a + 1 == cfg.accum
                with run.autocast:
                    part = loss_of(net, batch, items, step, a * world + rank)
                run.scaler.scale(part / cfg.accum).backward()
                loss = loss + part.detach() / cfg.accum
            if cfg.clip:
                run.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad()

            run.after_update(loss, lr, items, look)  # log, pictures, checkpoint
            if run.stopping:
                break
    return run


def pretrain(model, dataset, draw_mask, look, cfg, plan=None):
    """train() with masks: those of an update come from (seed, step), each piece takes its rows.

    draw_mask  (batch from the loader, rows, generator) -> mask (rows, N)
    """
    pieces = rank_and_world()[1] * cfg.accum

    def loss_of(net, batch, items, step, piece):
        mask = draw_mask(batch, cfg.batch, data.seeded(cfg.seed, 1, step)).chunk(pieces)[piece]
        return net(model.normalize(batch), mask)[0]

    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), betas=(0.9, 0.95),
                                  fused=True)  # Table 8
    train(model, dataset, loss_of, optimizer, look, cfg, plan).finish()


# ==== THE RUN, part 1: what a model paints, in pictures ===========================================
@torch.no_grad()
def reconstruct(model, imgs, mask):
    """What the model makes of a masked batch.

    -> loss, baseline, {title: pictures (B, frames, 3, H, W)}, hole (B, frames, 1, H, W) bool
    baseline  loss of the mean prediction, the variance of the target. With patches normalised over
              n values (P, or P / 3 where each channel has its own) it is (n - 1) / n, since the
              deviation is the unbiased one, and less where patches are flat
    important: a normalised prediction has no mean and deviation of its own, so the picture takes
    both from the hidden original: brightness, contrast, and where every channel has its own
    (VideoMAE, OmniMAE) the colour. That alone looks like a reconstruction! An extra picture shows
    what a model that has learnt nothing would "rebuild" that way.
    """
    # model.forward, not model(): pictures come in another batch size, which need not be compiled
    loss, pred = model.forward(imgs, mask)
    target, patches, pred = model.target(imgs, mask), model.patches(imgs), pred.float()

    def fill(painted):
        return model.to_pictures(restore(painted, ~mask, patches))  # painted where mask is True
    original, star = model.to_pictures(patches), "*" * model.norm_pix
    _, frames, _, H, W = original.shape
    hole = as_pixels(mask, frames, H, W, *model.grid[1:]).to(original.device)
    pink = original.new_tensor(HOLE)[:, None, None]
    pictures = {"original": original, "masked": torch.where(hole, pink, original)}
    if model.norm_pix:
        _, mean, std = model.normalize_patches(hidden(patches, mask))
        pictures["knowing nothing*"], pred = fill(mean), pred * std + mean
    pictures[f"prediction{star}"] = torch.where(hole, fill(pred), pink)  # the visible are pink
    pictures[f"pasted in{star}"] = fill(pred)
    return loss.item(), target.var(correction=0).item(), pictures, hole


def object_maps(val, items):
    """Where objects are in held-out files, (B, T, 1, H, W) bool; None without the toy's maps."""
    maps = []
    for i in items:
        path = os.path.abspath(val.paths[i])
        path, toy = re.subn(r"/(videos|rgb)/(.*)\.\w+$", r"/object/\2.png", path)
        if not toy or not os.path.exists(path):
            return None
        x = np.array(Image.open(path), dtype=np.uint8)
        x = x.reshape(-1, x.shape[1], x.shape[1], 1)  # (n, S, S, 1): frames lie below each other
        box, how = data.center_box(x.shape[1:3], val.size), data.v2.InterpolationMode.NEAREST
        maps.append(data.make_crop(x[val.choose(len(x))[0]], val.size, box, how=how))
    return torch.stack(maps).movedim(-1, 2) > 0


def held_out(val, draw_mask, seed, count=64):
    """The same few samples under the same masks every time.

    -> uint8 batch, mask (B, N), see object_maps
    """
    count = min(count, len(val), max(6, 2**25 // val[0, 0][0].numel()))  # 64 large clips: 5 GB
    batch, used, problems = data.collate([  # spread out: the list of a folder goes class by class
        val[0, int(i)] for i in np.linspace(0, len(val) - 1, count)])
    for path, problem in problems:
        report(f"held-out file {path}: {problem}")
    mask = draw_mask(batch, len(batch), data.seeded(seed, 2))
    if not mask.any():
        raise ValueError("this mask hides nothing: raise the mask ratio, or use a smaller --patch")
    return batch, mask, object_maps(val, used)


def paint_held_out(model, sample, draw, path):
    """Draw what a model makes of held_out().   -> numbers

    "object", in the toy world: R2 of the hidden pixels of objects, the share of their variance that
    is explained: 1 perfect, 0 their mean colour.
    """
    batch, mask, objects = sample
    x = model.normalize(batch.to(next(model.parameters()).device))
    loss, baseline, pictures, hole = reconstruct(model, x, mask)
    note = "* mean and deviation of each hidden patch are taken from the original"
    draw(pictures, path, note * model.norm_pix)
    scores = {"val_loss": loss, "baseline": baseline}
    if objects is not None:
        frames = getattr(model, "frame_index", slice(None))  # MAE-ST paints some of them
        where = (hole & objects.to(hole.device)[:, frames])[:, :, 0]  # (B, frames, H, W)
        both = [*pictures.values()][-1], pictures["original"]
        a, b = (x.movedim(2, -1)[where] for x in both)  # each (pixels, 3)
        scores["object"] = 1 - ((a - b).square().sum() / (b - b.mean(dim=0)).square().sum()).item()
    return scores


def draw_losses(folder):
    """loss.png: training and held-out loss over the updates, beside the baseline."""
    records = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    right = records[-1]["step"] or 1
    # 1.5 baselines: the loss of an untrained network may be far above
    top = 1.5 * records[-1].get("baseline", 0) or max(r.get("loss", 0) for r in records) or 1
    kinds = [("loss", "training", "#8899cc"), ("val_loss", "held out", "#cc4433"),
             ("baseline", "baseline", "#777777")]
    picture, font = Image.new("RGB", (640, 360), "white"), ImageFont.load_default(size=14)
    pen = ImageDraw.Draw(picture)
    pen.line([(60, 30), (60, 320), (620, 320)], "black")
    pen.text((4, 22), f"{top:.3g}", "black", font)
    pen.text((530, 324), f"{right} updates", "black", font)
    for i, (kind, title, color) in enumerate(kinds):
        points = [(60 + 560 * r["step"] / right, 320 - 290 * min(r[kind] / top, 1))
                  for r in records if kind in r]
        pen.line(points, color, width=3)
        pen.text((90 + 130 * i, 4), title, color, font)
    save_picture(picture, folder / "loss.png")


def save_picture(picture, path, **options):
    """The first process writes."""
    if is_first():
        with not_fatal(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, **options)


@contextlib.contextmanager
def not_fatal(path):
    """A full disk must not end a run for a picture or a line of the log."""
    try:
        yield
    except (OSError, ValueError, IndexError) as error:  # a disk that was full: half a line or none
        report(f"warning: cannot write {path}: {error}")


# ==== THE RUN, part 2: settings and main ==========================================================
@dataclasses.dataclass
class RunConfig:
    """What every training script can be told."""

    # data
    allow_missing: bool = False  # a list may name files that are not there: use the others
    img_size: str = "48"  # side of what the model sees in pixels, or HEIGHTxWIDTH
    # model
    size: str = "nano"  # encoder: nano, tiny, small, base, large, huge, or WIDTHxBLOCKSxHEADS
    patch: int = 8  # side of a patch or cube in pixels
    # optimiser
    accum: int = 1  # forward-backward passes per update: raise it when memory runs out
    min_lr: float = 0.0  # base rate at the end of the cosine
    weight_decay: float = 0.05  # of matrices; vectors have none
    clip: float = 0.0  # largest norm of the gradient, 0: no clipping
    # run
    init: str = ""  # start from the weights in this file, ours or a public one, and from its sizes
    resume: bool = False  # continue the run in --out
    seed: int = 0  # random seed of weights, masks, order, crops
    workers: int = min(8, os.cpu_count())  # processes that load data
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of products
    compile: bool = False  # torch.compile: slow start, faster steps
    log_every: int = 10  # updates between two lines of the log
    pictures: int = 5  # how often held-out data are looked at, evenly over the run; and once before
    smoke: bool = False  # three updates only, to see that everything runs

    def default_file(self):
        """Where weights are looked for without --init."""
        return f"{self.out}/checkpoint.pt" if getattr(self, "picture", "") else ""


@dataclasses.dataclass
class Config(RunConfig):
    SCRIPT, BASELINE = "mae_image", "mean prediction"

    # data
    data: str = "toy"  # folder of images, list file, or cifar10; the toy world is made
    min_crop: float = 0.2  # smallest share of the image area that a random crop takes
    flip: bool = True  # mirror half of the images
    picture: str = ""  # no training: paint the hidden parts of this one image, with --init
    # model
    decoder: str = "64x2x4"  # WIDTHxBLOCKSxHEADS; the paper's is 512x8x16
    mask: typing.Literal["random", "block", "grid"] = "random"  # which patches are hidden: Fig. 6
    mask_ratio: float = 0.75  # share of patches that are hidden
    norm_pix: bool = False  # predict patches normalised by their own mean and variance: Table 1(d)
    # optimiser
    epochs: int = 40  # passes over the data
    batch: int = 64  # samples per update, over all processes and accumulation steps
    lr: float = 8e-3  # base rate, for a batch of 256; the paper's is 1.5e-4, for a much longer run
    warmup: float = 4  # epochs of linear warm-up
    # run
    out: str = "runs/mae_image"  # folder for checkpoint, log and pictures


PRESETS = {
    "cifar10": dict(data="cifar10", img_size="32", patch=2, size="tiny", decoder="192x4x3",
                    norm_pix=True, epochs=400, batch=512, lr=1.5e-4, warmup=40),
    "gpu": dict(img_size="128", patch=16, size="small", decoder="256x4x8", norm_pix=True,
                epochs=200, batch=256, lr=1.5e-4, warmup=20),
    # App. A.1, Table 8; epochs of Table 3
    "paper": dict(img_size="224", patch=16, size="base", decoder="512x8x16", norm_pix=True,
                  epochs=1600, batch=4096, lr=1.5e-4, warmup=40),
}


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they are
def main(argv=None):
    cfg, found, device = begin(Config, PRESETS, __doc__, {"mae": public_mae}, argv)
    size, encoder, decoder = shapes(cfg)
    model = MAE(size, cfg.patch, encoder, decoder, cfg.norm_pix)
    load_pretrained(model.to(device), found, cfg.resume)

    def draw_mask(batch, rows, generator):  # batch: omni.py draws other masks for images
        return MASKS[cfg.mask](rows, model.grid, cfg.mask_ratio, generator)

    if cfg.picture:
        one = data.ImageDataset(data.one_file(cfg.picture, data.IMAGE), cfg, False)
        return show_one(model, one, draw_mask, draw_images, cfg)
    fetch(cfg.data)
    train_files, val_files = list_both(cfg, data.list_images, cfg.data)
    sample = held_out(data.ImageDataset(val_files, cfg, False), draw_mask, cfg.seed)

    def look(path):
        return paint_held_out(model, sample, draw_images, path)

    pretrain(model, data.ImageDataset(train_files, cfg, True), draw_mask, look, cfg)


def draw_images(pictures, path, note):
    """Some images as a PNG with a row for each, a column for each kind of picture."""
    cells = torch.cat([*pictures.values()], dim=1)  # (images, kinds, 3, H, W)
    table = picture_table(cells[evenly(len(cells), 6)], [*pictures], note=note, side=128)
    save_picture(table, path)


def show_one(model, dataset, draw_mask, draw, cfg):
    """--picture: what the model makes of one image or clip, drawn like the held-out ones."""
    batch, _ = dataset.read(0, None)
    sample = batch, draw_mask(batch, 1, data.seeded(cfg.seed, 2)), None
    path = Path(f"{Path(cfg.picture).stem}_painted.png")
    found = paint_held_out(model.eval(), sample, draw, path)
    report(f"loss {found['val_loss']:.4f} ({cfg.BASELINE} {found['baseline']:.4f})")
    report(f"wrote {path}")


def evenly(count, most=8):
    """Indices of at most `most` of `count` frames or samples, from the first to the last."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def fetch(*names):
    """Data that are made or downloaded: by the first process, while the others wait."""
    if is_first():
        if "toy" in names:
            data.make_toy("toy")
        if "cifar10" in names:
            data.list_images("cifar10")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def list_both(cfg, list_files, root, *options):
    """-> training and held-out files, reported.   list_files: data.list_images or list_videos"""
    train, val = (list_files(root, split, *options) for split in ("train", "val"))
    report(f"training: {len(train.paths)} files of {len(train.classes)} classes ({train.how}); "
           f"held out: {len(val.paths)} ({val.how})")
    if train.missing + val.missing and not cfg.allow_missing:
        raise ValueError(f"{root}: listed files are missing; --allow-missing uses the others")
    return train, val


# ---- Nothing below is about MAE: settings, processes, the folder of a run, files of weights ------
def encoder_size(text):
    """--size, a name in ENCODERS or numbers as in 128x4x4 -> (width, blocks, heads)."""
    return ENCODERS.get(text) or numbers(text, 3)


def shapes(cfg):
    """--img-size, --size and --decoder in numbers."""
    return data.height_width(cfg.img_size), encoder_size(cfg.size), numbers(cfg.decoder, 3)


# What may change when a run is resumed. All else would make it another run.
MAY_CHANGE = "out data images resume workers device compile log_every accum pictures".split()
# Settings that the file of --init fixes: a flag must not say otherwise.
FIXED = "model size decoder patch tubelet classes".split()
# Settings that are taken from it, too: they overrule a preset, not a flag.
FROM_FILE = ("frames stride sampling img_size norm_pix modalities class_width fold pool inputs "
             "classify").split()


def begin(Config, presets, doc, readers, argv):
    """What every script does first.   -> config, what is in the file of --init or None, device

    default < preset < file < flag. A resumed run has the settings it had, except for MAY_CHANGE.
    """
    preset, flags = settings(Config, presets, doc, argv)
    cfg, found = Config(**(preset | flags)), None
    path, stored = cfg.init or cfg.default_file(), {}
    free = MAY_CHANGE  # settings in which a flag may differ from the file
    if cfg.resume:
        path, found = cfg.out, read_file(f"{cfg.out}/checkpoint.pt", readers)
        stored = found.settings
    elif path:
        found = read_file(path, readers)
        told = found.settings | {"model": found.model}
        stored = {k: told[k] for k in FIXED + FROM_FILE if k in told and hasattr(cfg, k)}
        free = [*FROM_FILE, *found.guesses]
    known = {f.name: (float, int) if f.type is float else type(f.default)
             for f in dataclasses.fields(Config)}
    for name, value in stored.items():
        if not isinstance(value, known.get(name, ())):
            raise ValueError(f"{path} says {name} = {value!r}, unknown to {Config.SCRIPT}.py")
        if name not in free and flags.get(name, value) != value:
            raise ValueError(f"--{name.replace('_', '-')} {flags[name]}: "
                             f"{path} has {value}, which cannot be changed")
    cfg = Config(**(preset | stored | flags | {"out": cfg.out}))
    device = start_processes(cfg)
    torch.manual_seed(cfg.seed)
    return cfg, found, device


def start_processes(cfg):
    """-> the device of this process: the only one, or one of those that torchrun started."""
    name = cfg.device
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def choose_precision(cfg, device):
    """-> dtype of matrix products: bfloat16 on a GPU, float16 with a loss scaler on an old one."""
    if cfg.precision != "auto":
        return getattr(torch, cfg.precision)
    if device.type != "cuda":
        return torch.float32
    new = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if new else torch.float16


def count_updates(plan, dataset, cfg, world):
    """-> updates in an epoch.   Raises ValueError if a batch cannot be filled, or not be shared"""
    share, files = world * cfg.accum * dataset.repeat, cfg.batch // dataset.repeat
    if cfg.batch % share:
        raise ValueError(f"--batch {cfg.batch} must be a multiple of {share}: {world} processes x "
                         f"--accum {cfg.accum} x {dataset.repeat} clips of a video")
    per_epoch = len(plan(0))
    if cfg.epochs and not per_epoch:
        raise ValueError(f"{len(dataset)} training files do not fill one update of {files} "
                         "(held-out files do not count): use a smaller --batch")
    return per_epoch


class Run:
    """The folder of one run: checkpoint.pt, log.jsonl, loss.png, pictures/. One process writes.

    `with Run(...)`: Ctrl-C, SIGTERM and a closed terminal ask it to stop after the update at hand.
    """

    def __init__(self, cfg, model, optimizer, dataset, per_epoch, total):
        self.cfg, self.model, self.optimizer, self.dataset = cfg, model, optimizer, dataset
        self.per_epoch, self.total, self.out = per_epoch, total, Path(cfg.out)
        self.world = rank_and_world()[1]
        self.device = next(model.parameters()).device
        self.dtype = choose_precision(cfg, self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.done = self.saved = 0  # updates
        self.asked = self.stopping = False
        self.recent = []  # (update, loss, file numbers) since the last line of the log
        self.scores, self.problems = {}, set()
        self.began = self.clock = time.monotonic()
        self.save_after = self.waited = 0.0
        self.look_at = {math.ceil(total * k / cfg.pictures) for k in range(1, cfg.pictures + 1)}

    def __enter__(self):
        self.open()
        # Windows has no SIGHUP
        stop = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
        self.handlers = {number: signal.signal(number, self.on_signal) for number in stop}
        self.threads = torch.get_num_threads()
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, self.threads // 2))  # the loader needs the others
        if self.cfg.compile:
            self.model.compile()
        learn = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        report(f"{learn:.3g} M parameters learn, {self.dtype} on {self.world} x {self.device}")
        report(f"{self.total} updates, {self.per_epoch} an epoch; learning rate {self.cfg.lr:g} x "
               f"batch {self.cfg.batch} / 256 = {self.cfg.lr * self.cfg.batch / 256:g}")
        return self

    def __exit__(self, *error):
        torch.set_num_threads(self.threads)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        self.asked = True
        signal.signal(number, signal.default_int_handler)
        report("stopping after this update (once more: at once)")

    def open(self):
        """Make the folder, or read it to resume."""
        path, log = self.out / "checkpoint.pt", self.out / "log.jsonl"
        if self.cfg.resume:
            state, files = data.load_file(path), data.fingerprint(self.dataset)
            if state["files"] != files:
                raise ValueError(f"{self.cfg.data} is not the data of {self.out} "
                                 f"({state['files'][0]} training files then, {files[0]} now)")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty if the run began on a device that needs none
                self.scaler.load_state_dict(state["scaler"])
            self.done = self.saved = state["step"]
            self.scores = state["scores"]
            report(f"resumed {self.out} after update {self.done}")
        elif is_first() and path.exists() and not data.load_file(path)["config"]["smoke"]:
            raise ValueError(f"{self.out} holds a run: --resume continues it, or use another --out")
        if is_first():
            self.locked = data.lock(self.out)
            for part in self.out.glob(".*-checkpoint.pt"):  # of a run killed while it saved
                part.unlink()
            log.touch()
            os.truncate(log, state["log"] if self.cfg.resume else 0)  # lines of lost updates go
            if not self.cfg.resume:
                path.unlink(missing_ok=True)  # of a smoke test

    def next(self, loader):
        """-> batch on the device, file numbers. If the loader fails, the run is saved and ends."""
        tick = time.monotonic()
        try:
            batch, items, problems = data.take(loader)
        except ValueError as error:
            if self.done > self.saved:
                self.save()
            raise ValueError(f"{error}; what is saved, if anything, is continued by: --resume "
                             f"--out {self.out}") from None
        self.waited += time.monotonic() - tick
        for path, problem in problems:
            if path not in self.problems:
                report(f"{path}: {problem}")
            self.problems.add(path)
        return batch.to(self.device, non_blocking=True), items

    def after_update(self, loss, lr, items, look):
        """Log, pictures, checkpoint when due. One process reads `loss` from the GPU only then."""
        self.done += 1
        self.recent.append((self.done, loss, items))
        self.stopping = self.average(self.asked) > 0 and self.done < self.total
        ending = self.stopping or self.done == self.total
        looking = self.done in self.look_at
        if self.done % self.cfg.log_every == 0 or looking or ending:
            self.log_losses(lr)
            if looking and self.stopping:
                self.save()  # looking takes a while, and the next signal ends the run at once
            if looking:
                self.score(look)
            if ending or time.monotonic() > self.save_after:
                self.save()

    def average(self, value):
        """The mean over all processes."""
        if self.world == 1:
            return value
        values = torch.tensor(float(value), device=self.device)
        torch.distributed.all_reduce(values)
        return values.item() / self.world

    def log_losses(self, lr):
        """A line of the log: the mean loss since the last one."""
        for update, loss, items in self.recent:
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {float(loss)} in update {update}: try a lower --lr, --clip 1 or "
                    f"--precision float32. The batch was: {', '.join(self.dataset.paths[items])}")
        loss = self.average(sum(float(x) for _, x, _ in self.recent) / len(self.recent))
        seconds = time.monotonic() - self.clock
        speed, waiting = len(self.recent) * self.cfg.batch / seconds, self.waited / seconds
        left = (self.total - self.done) * self.cfg.batch / speed
        report(f"epoch {self.done / self.per_epoch:6.1f}  update {self.done:6d}/{self.total}  "
               f"loss {loss:.4f}{self.beside()}  lr {lr:.1e}  {speed:7.1f} samples/s  "
               f"waiting {waiting:4.0%}  ETA {datetime.timedelta(seconds=round(left))}")
        self.log(step=self.done, epoch=self.done / self.per_epoch, loss=loss, lr=lr,
                 samples_per_second=speed, data_wait=waiting)
        self.clock, self.waited, self.recent = time.monotonic(), 0.0, []

    def log(self, **record):
        path = self.out / "log.jsonl"
        if is_first():
            with not_fatal(path), open(path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def beside(self):
        """What a loss is to be compared with."""
        baseline = self.scores.get("baseline")
        return f" ({self.cfg.BASELINE} {baseline:.3f})" if baseline else ""

    def result(self):
        """The held-out numbers; those with a "_" in their name are for the log alone."""
        shown = [f"{name} {value:.3f}" for name, value in self.scores.items()
                 if name != "baseline" and "_" not in name]
        if "val_loss" in self.scores:
            shown.insert(0, f"held-out loss {self.scores['val_loss']:.4f}{self.beside()}")
        return ", ".join(shown)

    def score(self, look):
        """Numbers of the held-out data, and pictures."""
        self.model.eval()
        with torch.no_grad():
            self.scores = look(self.out / "pictures" / f"update_{self.done:06d}.png")
        report(self.result())
        self.log(step=self.done, **self.scores)
        with not_fatal(self.out / "loss.png"):
            draw_losses(self.out)
        self.clock = time.monotonic()

    def save(self):
        """Everything that is needed to continue, in one file of tensors and plain values."""
        if not is_first():
            return
        tick, path = time.monotonic(), self.out / "checkpoint.pt"
        lock, log = self.out / ".lock", self.out / "log.jsonl"
        if not (lock.exists() and os.path.samefile(lock, self.locked.fileno())):
            if path.exists():
                raise ValueError(f"{self.out} was replaced by another run, which is left alone")
            report(f"warning: {self.out} was removed, and is made again")
            self.locked = data.lock(self.out)
        state = {
            "script": self.cfg.SCRIPT, "config": dataclasses.asdict(self.cfg), "step": self.done,
            "scores": self.scores, "log": log.stat().st_size if log.exists() else 0,
            "files": data.fingerprint(self.dataset), "classes": list(self.dataset.classes),
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

        def save_state(part):
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())

        try:
            data.write_whole(path, save_state)
            self.saved = self.done
        except (OSError, RuntimeError) as error:  # in a RuntimeError torch hides the reason
            report(f"warning: cannot write {path}: "
                   f"{error if isinstance(error, OSError) else error.__context__ or error}; "
                   f"the last one written is of update {self.saved}")
        now = time.monotonic()
        self.save_after = now + 50 * (now - tick)  # it costs at most 2 % of the time

    def finish(self, result=""):
        """The last lines of a script."""
        if self.stopping:
            report(f"stopped after update {self.done}; "
                   f"resume with: python {self.cfg.SCRIPT}.py --resume --out {self.out}")
            raise SystemExit(130)  # what a shell expects after Ctrl-C
        if not self.total:  # --epochs 0: as it was before any training
            self.save()
        report(f"done: {result or self.result()} after "
               f"{datetime.timedelta(seconds=round(time.monotonic() - self.began))}, "
               f"see {self.out}")
        if is_first() and self.saved < self.done:  # the last checkpoint could not be written
            raise SystemExit(1)


@dataclasses.dataclass
class Found:
    """What a file holds. A guess is what no file tells (heads, the size of a public VideoMAE)."""

    path: str
    model: str  # mae, videomae, mae_st, omni, multimae
    settings: dict  # of a file of ours all that its run had
    state: dict
    guesses: tuple = ()  # names of settings that are guesses
    classes: tuple = ()  # names of the classes of a classifier of ours


# How the names of a decoder's parts begin, in all models.
DECODER = ("decoder", "mask_token", "output_adapters")


def read_file(path, readers):
    """Recognise a pretrained file by its contents.   readers {model: function like public_mae}"""
    content = data.load_file(path)
    if "script" in content:
        config, script, state = content.get("config"), content["script"], content.get("model")
        only = f"{script}".replace("mae_image", "mae")  # a script of one model
        model = isinstance(config, dict) and config.get("model", only)
        if model not in readers or not isinstance(state, dict):
            raise ValueError(f"{path}: a {model or 'strange'} model, written by {script}.py")
        return Found(path, model, config, state, classes=content.get("classes", ()))
    # the weights of a public file: perhaps in a dict of their own, with a prefix to all names
    places = ("model", "module", "model_state", "state_dict", "model_state_dict", "model_ema")
    inner = next((content[k] for k in places if isinstance(content.get(k), dict)), content)
    state = {k: v for k, v in inner.items() if torch.is_tensor(v)}
    for prefix in ("module.", "_orig_mod.", "model.") * 2:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    state = fuse_qkv(rename(state, HUGGINGFACE))
    for model, reader in readers.items():
        if found := reader(state):
            return Found(path, model, *found)
    raise ValueError(f"{path} is in no format known here ({', '.join(readers)}, as their papers' "
                     f"code or HuggingFace wrote it); it has {[*state, *inner][:3]}")


def load_into(model, state, fresh=(), unused=("pos_embed", "decoder_pos_embed")):
    """Copy weights by name.   -> how many, names that start new

    fresh, unused  prefixes of names that the file may lack, that it may have in addition
    raises  ValueError for anything else: a tensor that is unknown, missing or of another shape
    """
    try:
        missing, left = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a heading, then a line for each tensor of another shape
        raise ValueError("the file does not fit this model: "
                         f"{str(error).splitlines()[1].strip()}") from None
    wrong = [f"no {k}" for k in missing if not k.startswith(tuple(fresh))]
    wrong += [f"unknown {k}" for k in left if not k.startswith(tuple(unused))]
    if wrong:
        raise ValueError(f"the file does not fit this model: {'; '.join(wrong[:3])}")
    return len(state) - len(left), missing


def load_pretrained(model, found, resume):
    """Start a pretraining from a file, with or without decoder, and say so unless resuming."""
    if not found:
        return
    whole = any(k.startswith(DECODER) for k in found.state)
    if whole and hasattr(model, "norm") and "norm.weight" not in found.state:
        model.norm = nn.Identity()  # HuggingFace's VideoMAE with use_mean_pooling has none
    count, missing = load_into(model, found.state, fresh=() if whole else DECODER)
    if not resume:
        guessed = [f"{name} {found.settings[name]}" for name in found.guesses]
        report(f"{found.path}: {count} tensors used, {len(missing)} start new; guesses, for no "
               f"file tells them: {', '.join(guessed) or 'none'}")


HUGGINGFACE = {  # names on the hub and those of transformers 5: public names of MAE and VideoMAE
    r"^(vit|videomae)\.": "",
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^embeddings\.cls_token": "cls_token",
    r"^embeddings\.position_embeddings": "pos_embed",
    r"^decoder\.(decoder_|mask_token)": r"\1",
    r"^(encoder\.layer|layers)\.": "blocks.",
    r"^(decoder\.)?decoder_(layers|encoder\.layer)\.": "decoder_blocks.",
    r"attention\.attention\.(q|k|v)(uery|ey|alue)\.": r"attn.\1.",
    r"attention\.attention\.(q|v)_bias": r"attn.\1.bias",
    r"attention\.(q|k|v)_proj": r"attn.\1",
    r"attention\.(output\.dense|o_proj)": "attn.proj",
    r"intermediate\.dense": "mlp.fc1",
    r"(blocks\.\d+)\.output\.dense": r"\1.mlp.fc2",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"^layernorm\.": "norm.",
    r"^classifier\.": "head.",
}


def rename(state, names):
    """Other names for the tensors.   names {regular expression: what takes its place}, in order"""
    renamed = {}
    for key, value in state.items():
        for pattern, name in names.items():
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def fuse_qkv(state):
    """Separate q, k and v -> one qkv. VideoMAE has no key bias: zero is the same."""
    state = rename(state, {r"attn\.([qv])_bias$": r"attn.\1.bias"})
    for name in [k for k in state if ".attn.q." in k]:
        q, k, v = (state.pop(name.replace(".attn.q.", f".attn.{x}."), None) for x in "qkv")
        if k is None and name.endswith("bias"):
            k = torch.zeros_like(q)
        if k is not None and v is not None:  # else load_into() misses the whole
            state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([q, k, v])
    return state


def blocks_in(state, prefix):
    """How many blocks a file has under this name."""
    return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})


def sizes_in(state, places=0, decoder_heads=16):
    """What a public file tells of encoder and decoder -> settings, names of those that are guesses.

    No file tells its heads: they are 64 wide in all of ENCODERS' published sizes but huge, with 16.
    places  of the table of positions, if there is one: a guess at their square if they are none
    """
    kernel = state["patch_embed.proj.weight"]  # (D, C, [u,] p, p)
    D, depth = len(kernel), blocks_in(state, "blocks.")
    heads = 16 if D == 1280 else max(D // 64, 1)
    sizes, guesses = {"patch": kernel.shape[-1], "size": f"{D}x{depth}x{heads}"}, ["size"]
    if kernel.ndim == 5:
        sizes["tubelet"] = kernel.shape[2]
    if places:
        side = math.isqrt(places)
        sizes["img_size"] = f"{side * kernel.shape[-1]}"
        guesses += ["img_size"] * (side**2 != places)
    if "decoder_embed.weight" in state:
        E, blocks = len(state["decoder_embed.weight"]), blocks_in(state, "decoder_blocks.")
        heads = decoder_heads or min(max(E // 64, 1), 8)  # VideoMAE's: of width 64, huge 80
        sizes |= {"decoder": f"{E}x{blocks}x{heads}", "norm_pix": True}
        guesses += ["decoder", "norm_pix"]  # MAE's mae_visualize_* need --no-norm-pix
    return sizes, guesses


def public_mae(state):
    """facebookresearch/mae, HuggingFace's ViTMAE, timm's ViT -> settings, our names, guesses."""
    kernel = state.get("patch_embed.proj.weight", torch.empty(0))
    if kernel.ndim != 4 or "cls_token" not in state or not blocks_in(state, "blocks."):
        return None
    places, table = 0, state.get("pos_embed")
    if table is not None:  # (1, 1+N, D): the first row belongs to the class token, ours has none
        places = table.shape[1] - 1
        state = state | {"pos_embed": table[:, 1:], "cls_token": state["cls_token"] + table[:, :1]}
    sizes, guesses = sizes_in(state, places)
    return sizes, state, guesses


if __name__ == "__main__":
    run_script(main)
