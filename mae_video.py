"""mae_video.py - the same idea with a time axis: hide 90 % of a clip, two models side by side.

Papers  VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training.
        Tong, Song, Wang, Wang, 2022, arXiv 2203.12602
        MAE-ST: Masked Autoencoders As Spatiotemporal Learners. Feichtenhofer, Fan, Li, He, 2022, arXiv 2205.09113
Covers  VideoMAE Sec. 3.3 "cube embedding", Table 8      patchify, PatchEmbed with a kernel (u, p, p)
        VideoMAE Sec. 3.3 "tube masking"                 masking.tube_mask
        VideoMAE Eq. (1); per channel: public code       VideoMAE.forward_loss, standardise_channels
        MAE-ST Sec. 3 "Masking", Fig. 4                  masking.random_mask, block_mask, frame_mask
        MAE-ST Sec. 3 "Autoencoding", one frame a cube   MAEST.target_patches, target_frames
        MAE-ST Sec. 4 "Architecture", separable tables   MAEST.positions
        MAE-ST Sec. 4 "Data pre-processing", Table 2(d)  --repeat (repeated sampling), data.ClipDataset
Not     fine-tuning (finetune.py); MAE-ST's HOG and dVAE targets (Table 2(b)).

What changes against mae_image.py, and where the two papers part:
                     MAE                     MAE-ST                            VideoMAE
    token            p x p pixels            u x p x p                         u x p x p
    mask             random 75 %             random in space-time 90 %         tubes 90 % (UCF101, HMDB51: 75 %)
    positions        fixed, rows and columns learned, space + time             fixed, one sine over the token number
    class token      one for both parts      one each, the decoder's its own   none
    decoder order    raster                  raster                            visible first, then hidden
    target           the patch               one frame of every cube           the cube, in [0, 1]
    normalised over  all channels            all channels                      each channel by itself

Run     python mae_video.py                                  (4 min on 2 CPU cores: writes a toy world, pretrains)
        python mae_video.py --model mae_st
        python mae_video.py --data UCF101 --preset ucf101    (one GPU, 112 px; ucf101_paper is the paper's recipe)
        python mae_video.py --resume                         (goes on where a run was stopped)
        It ends with "done: ... see runs/mae_video".
Next    omni.py: one model for images and videos.
"""

import math
import typing
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from mae_image import (ENCODERS, IMAGENET_MEAN, IMAGENET_STD, LEAK_NOTE, MAE, Block, PatchEmbed, check_divides,
                       check_grid, check_mask, encoder_size, held_out, init_weights, normalize, picture_table, pretrain,
                       read_config, reconstruct, save_picture, start_processes, to_unit_range)  # fmt: skip
from masking import MASKS, InputError, hidden, restore, run_script, say, visible

# ============================================================================================================
#  THE PAPERS, part 1: from frames to cubes and back, positions, the target
#  (needs: torch; mae_image.py check_divides; masking.py InputError)
# ============================================================================================================


def check_clip(frames, img_size, tubelet, patch):
    """-> token grid (t, h, w).   Raises InputError if a side cannot be cut evenly."""
    H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
    check_divides(frames, tubelet, "clip length", "tubelet", "--frames")
    check_divides(H, patch, "frame height", "patch", "--img-size")
    check_divides(W, patch, "frame width", "patch", "--img-size")
    return frames // tubelet, H // patch, W // patch


def patchify(clips, u, p):
    """Cut clips into cubes: (B, C, T, H, W) -> (B, N, u*p*p*C), time-major, values (frame, row, col, channel)."""
    B, C, T, H, W = clips.shape
    t, h, w = check_clip(T, (H, W), u, p)
    x = clips.reshape(B, C, t, u, h, p, w, p)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, t, h, w, u, p, p, C)
    return x.reshape(B, t * h * w, u * p * p * C)


def unpatchify(patches, p, t, h, w):
    """The inverse: (B, N, u*p*p*3) -> (B, 3, t*u, h*p, w*p); u follows from the number of values."""
    B, N, P = patches.shape
    u = P // (p * p * 3)
    x = patches.reshape(B, t, h, w, u, p, p, 3)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, t, u, h, p, w, p)
    return x.reshape(B, 3, t * u, h * p, w * p)


def sinusoid(width, N):
    """VideoMAE's fixed table (N, width), float32: one position per token number, sine on even, cosine on odd channels.

    important: it knows only the token's number, not its row, column and slot, and sine and cosine alternate. MAE's
    table has row and column, and its sines and cosines stand in blocks.
    """
    j = torch.arange(width)
    angle = torch.arange(N).double()[:, None] / 10000.0 ** (2 * (j // 2).double() / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def resize_table(table, old, new, mode="bicubic"):
    """Positions of one token grid (t, h, w) for another: by `mode` over rows and columns, linear over time slots.

    table (1, N, D) -> (1, N', D).   Over space as MAE's public code does for
    fine-tuning; linear over time is ours.
    """
    (t, h, w), D = old, table.shape[2]
    x = table.reshape(t, h, w, D).permute(0, 3, 1, 2)  # (t, D, h, w)
    if (h, w) != tuple(new[1:]):
        x = F.interpolate(x, new[1:], mode=mode, align_corners=False)
    if t != new[0]:
        x = F.interpolate(x.flatten(1).T[None], new[0], mode="linear")[0].T.reshape(new[0], D, *new[1:])
    return x.permute(0, 2, 3, 1).reshape(1, -1, D)


def standardise_channels(patches, deviation):
    """Each cube by its own mean and standard deviation, each channel by itself.

    patches    (B, M, P) -> target, mean, std, each (B, M, P)
    deviation  function, unbiased variance -> standard deviation: VideoMAE adds epsilon outside the root, OmniMAE inside
    """
    B, M, P = patches.shape
    per_channel = lambda v: v.expand(B, M, P // 3, 3).reshape(B, M, P)
    mean = per_channel(patches.reshape(B, M, P // 3, 3).mean(dim=2, keepdim=True))
    x = patches - mean
    # torch's var takes four times as long as this where the channels come last
    var = x.reshape(B, M, P // 3, 3).square().sum(dim=2, keepdim=True) / (P // 3 - 1)  # (B, M, 1, 3)
    std = per_channel(deviation(var))
    return x / std, mean, std


# ============================================================================================================
#  THE PAPERS, part 2: VideoMAE
#  (needs: torch, part 1; mae_image.py ENCODERS, IMAGENET_*, parts 1-3; masking.py InputError, part 3)
# ============================================================================================================


class VideoMAE(nn.Module):
    """VideoMAE.   loss, pred = model(clips, mask)

    clips  (B, 3, T, H, W) float, normalised with MEAN and STD;   mask (B, N) bool, True = hidden
    loss   float32 scalar;   pred (B, M, u*p*p*3), the painted hidden cubes, in the form of the target

    size     name in ENCODERS or (width, blocks, heads)
    decoder  (width, blocks, heads); published: half the encoder's width, heads of 64 (huge 80), 4 blocks (12 from
             large on)
    raises   InputError if frames or sides cannot be cut evenly, or a width by its heads

    DIFFERS from the official code: its attention has no key bias, ours does. A constant added to every key changes
    no softmax, so the numbers agree; public files load with a key bias of zero.
    """

    MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
    NO_DECAY = ("mask_token",)
    WARMUP_INCLUSIVE = True

    def __init__(self, frames=16, img_size=224, tubelet=2, patch=16, size="base", decoder=(384, 4, 6), norm_pix=True):
        super().__init__()
        self.grid = check_clip(frames, img_size, tubelet, patch)
        self.tubelet, self.patch, self.norm_pix = tubelet, patch, norm_pix
        D, depth, heads = ENCODERS[size] if isinstance(size, str) else size
        E, decoder_depth, decoder_heads = decoder
        N, P = math.prod(self.grid), tubelet * patch * patch * 3

        self.patch_embed = PatchEmbed((tubelet, patch, patch), 3, D)
        self.blocks = nn.ModuleList([Block(D, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

        self.decoder_embed = nn.Linear(D, E, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_blocks = nn.ModuleList([Block(E, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.decoder_pred = nn.Linear(E, P)

        self.register_buffer("pos_embed", sinusoid(D, N)[None], persistent=False)  # (1, N, D)
        self.register_buffer("decoder_pos_embed", sinusoid(E, N)[None], persistent=False)  # (1, N, E)

        # patch_embed and decoder_embed keep PyTorch's default: the official initialisation never reaches them.
        self.blocks.apply(init_weights)
        self.decoder_blocks.apply(init_weights)
        init_weights(self.decoder_pred)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def normalize(self, clips):
        """Batch from the loader, uint8 (B, T, H, W, 3) -> (B, 3, T, H, W) float32."""
        return normalize(clips, self.MEAN, self.STD)

    def forward(self, clips, mask):
        patches = patchify(clips, self.tubelet, self.patch)  # (B, N, P)
        latent = self.forward_encoder(patches, mask)  # (B, K, D)
        pred = self.forward_decoder(latent, mask)  # (B, M, P)
        return self.forward_loss(clips, pred, mask), pred

    def forward_encoder(self, patches, mask):
        """Joint space-time attention over the visible cubes.   (B, N, P), (B, N) -> (B, K, D)"""
        B, N, P = patches.shape
        check_grid(N, self.grid, mask)
        x = self.patch_embed(visible(patches, mask))  # (B, K, D)
        x = x + visible(self.pos_embed.expand(B, -1, -1), mask)  # (B, K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent, mask):
        """Visible tokens, then mask tokens; the positions alone say where each belongs.   (B, K, D) -> (B, M, P)"""
        B, K, D = latent.shape
        pos = self.decoder_pos_embed.expand(B, -1, -1)  # (B, N, E)
        vis = self.decoder_embed(latent) + visible(pos, mask)  # (B, K, E)
        hid = self.mask_token + hidden(pos, mask)  # (B, M, E)
        x = torch.cat([vis, hid.to(vis.dtype)], dim=1)  # (B, N, E)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, K:]))

    def target_patches(self, clips):
        """Cubes of pixels in [0, 1], the network's normalisation undone.   (B, 3, T, H, W) -> (B, N, P)

        For a target that is normalised per channel this matters by its epsilon only; for raw pixels it sets the scale.
        """
        return patchify(to_unit_range(clips.float(), self.MEAN, self.STD), self.tubelet, self.patch)

    def standardise(self, patches):
        """standardise_channels with the epsilon outside the root (MAE: inside)."""
        return standardise_channels(patches, lambda var: var.sqrt() + 1e-6)

    @torch.no_grad()
    def forward_target(self, patches):
        """Hidden cubes -> what pred is compared with, float32 (B, M, P)."""
        return self.standardise(patches)[0] if self.norm_pix else patches

    def forward_loss(self, clips, pred, mask):
        """Eq. (1): mean squared error on hidden cubes only."""
        if pred.shape[1] == 0:
            return pred.float().sum()  # nothing hidden: 0, not 0 / 0
        return F.mse_loss(pred.float(), self.forward_target(hidden(self.target_patches(clips), mask)))

    def encode(self, clips):
        """Every token, no mask: fine-tuning, probing, features.   (B, 3, T, H, W) -> (B, N, D)"""
        patches = patchify(clips, self.tubelet, self.patch)  # (B, N, P)
        return self.forward_encoder(patches, torch.zeros(patches.shape[:2], dtype=torch.bool))

    def to_pictures(self, patches):
        """Target cubes (B, N, P) -> frames (B, T, 3, H, W) in [0, 1]."""
        return unpatchify(patches, self.patch, *self.grid).transpose(1, 2)

    def from_public(self, state):
        """Names of MCG-NJU/VideoMAE -> ours; q_bias and v_bias become one bias with a zero for the keys."""
        renamed = {}
        for key, value in state.items():
            key = key.removeprefix("encoder.").replace("encoder_to_decoder.", "decoder_embed.")
            key = key.replace("decoder.blocks.", "decoder_blocks.").replace("decoder.norm.", "decoder_norm.")
            renamed[key.replace("decoder.head.", "decoder_pred.")] = value
        for key in [k for k in renamed if k.endswith("q_bias")]:
            q, v = renamed.pop(key), renamed.pop(key.replace("q_bias", "v_bias"), None)
            if v is None:
                raise InputError(f"the file has {key} but no v_bias")
            renamed[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
        return renamed


# ============================================================================================================
#  THE PAPERS, part 3: MAE-ST
#  (needs: torch, parts 1, 2; mae_image.py ENCODERS, parts 1-3; masking.py InputError, part 3)
# ============================================================================================================


def target_frames(frames, predicted):
    """Which frames are painted: `predicted` points from the first to the last, truncated (public code).

    16 frames, 8 painted: 0 2 4 6 8 10 12 15. Mind the 15: not every second frame, as one might write it.
    """
    return torch.linspace(0, frames - 1, predicted).long()


class MAEST(nn.Module):
    """MAE-ST.   loss, pred = model(clips, mask)

    clips  (B, 3, T, H, W) float, normalised with MEAN and STD;   mask (B, N) bool, True = hidden
    loss   float32 scalar;   pred (B, M, P), the painted hidden cubes: `predicted` of the T frames, P = u'*p*p*3
           with u' = u * predicted / T, 1 in the paper: of each cube of two frames, one is painted

    size       name in ENCODERS or (width, blocks, heads)
    decoder    (width, blocks, heads); (512, 4) in the paper, 16 heads in mae_st's code (8 in SlowFast's)
    predicted  frames that are painted, a multiple of the time slots; None: one per time slot
    separable  positions are a spatial plus a temporal table, else one joint table
    cls        class token; its encoder output is dropped, the decoder begins with a class token of its own
    """

    MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)  # not ImageNet's
    NO_DECAY = ()  # so the tokens and the learned tables decay
    WARMUP_INCLUSIVE = False

    def __init__(self, frames=16, img_size=224, tubelet=2, patch=16, size="base", decoder=(512, 4, 16), norm_pix=True,
                 predicted=None, separable=True, cls=True):  # fmt: skip
        super().__init__()
        self.grid = t, h, w = check_clip(frames, img_size, tubelet, patch)
        predicted = predicted or t
        check_divides(predicted, t, "number of predicted frames", "time slots", "predicted =")
        self.tubelet, self.patch, self.norm_pix, self.cls = tubelet, patch, norm_pix, cls
        D, depth, heads = ENCODERS[size] if isinstance(size, str) else size
        E, decoder_depth, decoder_heads = decoder
        P = predicted // t * patch * patch * 3

        self.patch_embed = PatchEmbed((tubelet, patch, patch), 3, D)
        self.blocks = nn.ModuleList([Block(D, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_blocks = nn.ModuleList([Block(E, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.decoder_pred = nn.Linear(E, P)
        self.register_buffer("frame_index", target_frames(frames, predicted), persistent=False)

        if cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
            self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, E))
        for prefix, width in (("", D), ("decoder_", E)):
            tables = {"_spatial": h * w, "_temporal": t, "_class": int(cls)} if separable else {"": t * h * w + cls}
            for part, rows in tables.items():
                if rows:
                    self.register_parameter(f"{prefix}pos_embed{part}", nn.Parameter(torch.zeros(1, rows, width)))

        self.apply(init_weights)
        for block in [*self.blocks, *self.decoder_blocks]:  # the official q, k, v are three matrices: so is the bound
            for part in block.attn.qkv.weight.data.chunk(3):
                nn.init.xavier_uniform_(part)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)
        for name, parameter in self.named_parameters():  # the decoder's class token stays zero
            if "pos_embed" in name or name == "cls_token":
                nn.init.trunc_normal_(parameter, std=0.02)

    def positions(self, prefix=""):
        """-> table of the tokens (1, N, D), row of the class token (1, 1, D) or None; width E for the decoder's."""
        get = lambda part: getattr(self, f"{prefix}pos_embed{part}", None)
        if (joint := get("")) is not None:
            return joint[:, self.cls :], joint[:, :1] if self.cls else None
        t, h, w = self.grid
        # token (s, r, c) gets spatial[r, c] + temporal[s]; time-major, so space repeats and time is held
        table = get("_spatial").repeat(1, t, 1) + get("_temporal").repeat_interleave(h * w, dim=1)
        return table, get("_class")

    def forward(self, clips, mask):
        patches = patchify(clips, self.tubelet, self.patch)  # (B, N, u*p*p*3)
        latent = self.forward_encoder(patches, mask)  # (B, 1+K, D)
        x = self.forward_decoder(latent, mask)  # (B, N, E)
        pred = self.decoder_pred(hidden(x, mask))  # (B, M, P)
        return self.forward_loss(clips, pred, mask), pred

    def forward_encoder(self, patches, mask):
        """Visible cubes, wherever in space-time they are.   (B, N, u*p*p*3) -> (B, 1+K, D), or (B, K, D) without cls"""
        B, N, _ = patches.shape
        check_grid(N, self.grid, mask)
        table, cls_row = self.positions()
        x = self.patch_embed(visible(patches, mask)) + visible(table.expand(B, -1, -1), mask)  # (B, K, D)
        if self.cls:
            x = torch.cat([(self.cls_token + cls_row).expand(B, -1, -1), x], dim=1)  # (B, 1+K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent, mask):
        """All tokens in raster order.   (B, [1+]K, D) -> (B, N, E)"""
        table, cls_row = self.positions("decoder_")
        vis = self.decoder_embed(latent[:, self.cls :])  # (B, K, E)
        x = restore(vis, mask, self.mask_token) + table  # (B, N, E)
        if self.cls:  # important: the decoder's own; MAE hands on the encoder's
            x = torch.cat([(self.decoder_cls_token + cls_row).expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.cls :]

    def target_patches(self, clips):
        """The frames that are painted, as cubes of u' frames: Sec. 3 "Autoencoding".   -> (B, N, P)"""
        return patchify(clips.float()[:, :, self.frame_index], len(self.frame_index) // self.grid[0], self.patch)

    standardise = MAE.standardise  # each cube by its own mean and variance, over all channels together
    normalize, forward_target, forward_loss = VideoMAE.normalize, VideoMAE.forward_target, VideoMAE.forward_loss
    encode = VideoMAE.encode  # (B, 3, T, H, W) -> (B, 1+N, D), class token first

    def to_pictures(self, patches):
        """Target cubes (B, N, P) -> the painted frames (B, predicted, 3, H, W) in [0, 1]."""
        x = unpatchify(patches, self.patch, *self.grid)  # (B, 3, predicted, H, W)
        return to_unit_range(x, self.MEAN, self.STD).transpose(1, 2)

    def from_public(self, state):
        """Names of facebookresearch/mae_st (and of the SlowFast files it reads) -> ours.

        q, k, v are three linears there, or one where a file was written so; learned tables are resized to our
        grid. Of SlowFast files only the encoder fits: its decoder is another one.
        """
        slowfast = any(k.startswith(("dec_pos_embed", "pred_head")) for k in state)
        decoder = ("dec_pos_embed", "pred_head", "decoder_embed", "mask_token") if slowfast else ()
        renamed = {k: v for k, v in state.items() if not k.startswith(decoder)}
        for key in [k for k in renamed if ".attn.q." in k]:
            parts = [renamed.pop(key.replace(".attn.q.", f".attn.{part}."), None) for part in "qkv"]
            if any(p is None for p in parts):
                raise InputError(f"the file has {key} but not its k and v")
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        for key in [k for k in renamed if "pos_embed" in k]:
            renamed[key] = self.resize(key, renamed[key])
        return renamed

    def resize(self, name, table):
        """A learned table for another grid -> ours; one that cannot be resized stays, and load_weights names it."""
        t, h, w = self.grid
        own, side = getattr(self, name, None), math.isqrt(table.shape[1]) if table.ndim == 3 else 0
        if own is None or not side or own.shape == table.shape or own.shape[2] != table.shape[2]:
            return table
        if name.endswith("spatial") and side * side == table.shape[1]:
            return resize_table(table, (1, side, side), (1, h, w))
        return resize_table(table, (table.shape[1], 1, 1), (t, 1, 1)) if name.endswith("temporal") else table


# ============================================================================================================
#  THE RUN
# ============================================================================================================

MODELS = {"videomae": VideoMAE, "mae_st": MAEST}


@dataclass
class Config:
    # data
    data: str = "toy"  # UCF101, HMDB51, folder of videos or list file; "toy" is written first if it is not there
    fold: int = 1  # of the official lists: 1, 2 or 3
    allow_missing: bool = False  # a list may name files that are not there: use the others
    frames: int = 8  # frames per clip; the papers have 16
    stride: int = 2  # frames from one to the next (Kinetics, UCF101: 4; SSv2, HMDB51: 2)
    sampling: typing.Literal["dense", "linspace", "segments"] = "dense"  # linspace: MAE-ST's; segments: whole video
    img_size: int = 64  # side of the square that the model sees, in pixels
    crop: typing.Literal["random", "multiscale", "center"] = "random"  # multiscale: VideoMAE's
    min_crop: float = 0.5  # smallest share of the frame that a random crop takes (only --crop random)
    flip: bool = True  # mirror half of the clips (not with --crop center); --no-flip where left and right are classes
    repeat: int = 1  # clips taken from every decoded video: repeated sampling
    workers: int = 2  # processes that load data
    # model
    model: typing.Literal["videomae", "mae_st"] = "videomae"  # which paper
    size: str = "nano"  # encoder: nano, tiny, small, base, large, huge, or WIDTHxBLOCKSxHEADS
    patch: int = 8  # side of a cube in pixels
    tubelet: int = 2  # frames in a cube
    decoder_width: int = 64  # VideoMAE: half of the encoder; MAE-ST: 512
    decoder_depth: int = 1  # blocks; both papers have 4 (VideoMAE large and huge 12)
    decoder_heads: int = 2  # VideoMAE: decoder width / 64 (huge: / 80); MAE-ST: 16
    mask: typing.Literal["auto", "tube", "random", "frame", "block", "causal"] = "auto"  # auto: tube; mae_st: random
    mask_ratio: float = 0.75  # share of cubes that are hidden; the papers: 0.9, on UCF101 and HMDB51 0.75
    norm_pix: bool = False  # predict cubes normalised by their own mean and deviation, as the papers do
    # optimiser
    epochs: int = 70  # passes over the videos; each gives --repeat clips
    batch: int = 16  # clips per update, over all processes, accumulation steps and repeats
    accum: int = 1  # forward-backward passes per update: raise it when memory runs out
    lr: float = 8e-2  # base rate, for a batch of 256; papers and public codes: 1.5e-4 to 4e-4, for much longer runs
    min_lr: float = 0.0  # base rate at the end of the cosine; VideoMAE: 1e-5
    warmup: float = 5  # epochs of linear warm-up
    weight_decay: float = 0.05  # of matrices; vectors have none
    clip: float = 0.0  # largest norm of the gradient, 0: no clipping (MAE-ST's public code: 0.02)
    # run
    out: str = "runs/mae_video"  # folder for checkpoint, log and pictures
    resume: bool = False  # go on with the run in --out
    init: str = ""  # start from the weights in this file: ours, or a public one of the same paper
    seed: int = 0  # of weights, masks, order, crops
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format of the matrix products
    compile: bool = False  # torch.compile: slow start, faster steps
    log_every: int = 10  # updates between two lines of the log
    pictures: int = 5  # how often pictures are drawn, evenly over the run, the last at its end; and once before
    smoke: bool = False  # three updates only, to see that everything runs; its folder may be written again


_one_gpu = dict(frames=16, img_size=112, patch=8, size="small", decoder_width=192, decoder_depth=4, decoder_heads=3,
                mask_ratio=0.75, norm_pix=True, crop="multiscale", flip=False, batch=64, lr=3e-4, warmup=20,
                workers=8)  # fmt: skip
_paper = dict(frames=16, img_size=224, patch=16, size="base", decoder_width=384, decoder_depth=4, decoder_heads=6,
              mask_ratio=0.75, norm_pix=True, crop="multiscale", batch=192, lr=3e-4, min_lr=1e-5, warmup=40,
              flip=False, workers=16)  # fmt: skip
PRESETS = {
    "ucf101": dict(_one_gpu, stride=4, epochs=200, out="runs/ucf101"),
    "hmdb51": dict(_one_gpu, stride=2, epochs=400, out="runs/hmdb51"),
    # VideoMAE App. 7 "UCF101" and "HMDB51" (8 GPUs); no flip and the end of the cosine as in the public code
    "ucf101_paper": dict(_paper, stride=4, epochs=3200, out="runs/ucf101_paper"),
    "hmdb51_paper": dict(_paper, stride=2, epochs=4800, out="runs/hmdb51_paper"),
    # MAE-ST Sec. 4: 800 epochs are 200 passes x 4 clips. Passes from SlowFast's configuration; warm-up 30 passes, the
    # 120 epochs of Table 5. Rate and clipping from mae_st's PRETRAIN.md, where 1.6e-3 is for 256 videos, that is 1024
    # clips; here it is for 256 clips, so a quarter. not verified: whether the paper's batch of 512 counts clips, as
    # here, or videos
    "mae_st_paper": dict(model="mae_st", frames=16, stride=4, sampling="linspace", img_size=224, patch=16, size="large",
                         decoder_width=512, decoder_depth=4, decoder_heads=16, mask_ratio=0.9, norm_pix=True, repeat=4,
                         batch=512, lr=4e-4, clip=0.02, epochs=200, warmup=30, workers=16, out="runs/mae_st_paper"),
}  # fmt: skip


def write_strips(pictures, titles, path, note):
    """Three of the clips as a PNG (a line per kind of picture, a column per frame) and as a video file.

    pictures (clips, kinds, frames, 3, H, W) in [0, 1]"""
    columns = torch.linspace(0, pictures.shape[2] - 1, min(8, pictures.shape[2])).round().long()
    # from the second quarter on: the first clips of the toy world stand still
    pictures = pictures[torch.linspace(len(pictures) // 4, len(pictures) - 1, min(3, len(pictures))).long()]
    rows = pictures[:, :, columns].flatten(0, 1)  # (3 * kinds, frames, 3, H, W)
    save_picture(picture_table(rows, [", ".join(titles)], note), f"{path}.png")
    # the film: a row per clip, a column per kind of picture; three times over, or it would last a second
    frames = [picture_table(pictures[:, :, f], titles, note) for f in range(pictures.shape[2])]
    even = [np.asarray(f)[: f.height // 2 * 2, : f.width // 2 * 2] for f in frames]
    try:
        data.write_video(f"{path}.mp4", even * 3, Fraction(8))
    except OSError as error:
        say(f"warning: cannot write {path}.mp4: {error}")


def main():
    cfg = read_config(Config, PRESETS, __doc__, "mae_video")
    rank, world, device = start_processes(cfg)
    data.fetch(cfg.data, rank, world)
    torch.manual_seed(cfg.seed)
    decoder = (cfg.decoder_width, cfg.decoder_depth, cfg.decoder_heads)
    model = MODELS[cfg.model](cfg.frames, cfg.img_size, cfg.tubelet, cfg.patch, encoder_size(cfg.size), decoder,
                              cfg.norm_pix)  # fmt: skip
    kind = {"videomae": "tube", "mae_st": "random"}[cfg.model] if cfg.mask == "auto" else cfg.mask
    draw_mask = lambda batch, rows, generator: MASKS[kind](rows, model.grid, cfg.mask_ratio, generator)
    check_mask(draw_mask(None, 1, torch.Generator()))

    def open_clips(split):
        files = data.list_videos(cfg.data, split, cfg.fold, cfg.allow_missing)
        return data.ClipDataset(files, cfg.frames, cfg.stride, cfg.img_size, cfg.seed, cfg.sampling, cfg.crop,
                                cfg.min_crop, cfg.flip, cfg.repeat, train=split == "train")  # fmt: skip

    train = open_clips("train")
    batch, mask = held_out(open_clips("val"), draw_mask, cfg.seed, 16)

    def validate(model, path):
        loss, chance, pictures = reconstruct(model, model.normalize(batch.to(device)), mask)
        cells = torch.stack(list(pictures.values()), dim=1)  # (clips, kinds, frames, 3, H, W)
        write_strips(cells, list(pictures), path, LEAK_NOTE if model.norm_pix else "")
        return {"val_loss": loss, "chance": chance}

    pretrain(model, train, draw_mask, validate, cfg, "mae_video")


if __name__ == "__main__":
    run_script(main)
