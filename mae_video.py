"""mae_video.py - the same idea with a time axis: hide 90 % of a clip, two models side by side.

Trains VideoMAE or MAE-ST on any folder of videos, on UCF101 or HMDB51 as they are downloaded; draws
what it paints, as pictures and films. --picture shows what a trained model makes of one clip.

Papers  VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
        Pre-Training. Tong, Song, Wang, Wang, 2022, arXiv 2203.12602
        MAE-ST: Masked Autoencoders As Spatiotemporal Learners. Feichtenhofer, Fan, Li, He, 2022,
        arXiv 2205.09113
Covers  VideoMAE Sec. 3.3 "cube embedding", Table 8      patchify_clips, PatchEmbed (u, p, p)
        VideoMAE Sec. 3.3 "tube masking"                 masking.tube_mask
        VideoMAE Sec. 3.3 "temporal downsampling"        dense_clip, segment_clip
        VideoMAE Eq. (1); per channel: public code       VideoMAE.normalize_patches
        MAE-ST Sec. 3 "Masking", Fig. 4                  masking.random_mask, block_mask, frame_mask
        MAE-ST Sec. 3 "Autoencoding", one frame a cube   MAEST.patches, target_frames
        MAE-ST Sec. 4 "Architecture", separable tables   MAEST.positions
        MAE-ST Sec. 4 "Data pre-processing", Table 2(d)  ClipDataset, --repeat
Not     fine-tuning (finetune.py); MAE-ST's HOG and dVAE targets (Table 2(b))

What changes against mae_image.py, and where the two papers part:
                     MAE                   MAE-ST                         VideoMAE
    token            p x p pixels          u x p x p                      u x p x p
    mask             random 75 %           random in space-time 90 %      tubes 90 % (UCF101: 75 %)
    positions        fixed, row + column   learned, space + time          fixed, of the token number
    class token      one for both parts    one each                       none
    decoder order    raster                raster                         visible first, then hidden
    target           the patch             one frame of every cube        the cube, in [0, 1]
    normalised over  all channels          all channels                   each channel by itself

Run     python mae_video.py                                  (5 min on 2 CPU cores)
        python mae_video.py --model mae_st --out runs/mae_st
        python mae_video.py --picture clip.avi               (with the run in runs/mae_video)
        python mae_video.py --data my_videos --preset small  (some hundred clips of your own)
        python mae_video.py --data UCF101 --preset ucf101    (one GPU; ucf101_paper: the paper's)
        It ends with "done: ... see runs/mae_video".
Next    omni.py: one model for images and videos.
"""

import dataclasses
import math
import typing

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from mae_image import (ENCODERS, MAE, PatchEmbed, RunConfig, begin, check_shape, evenly, fetch,
                       held_out, init_weights, layer_norm, list_both, load_pretrained, mean_and_std,
                       paint_held_out, parts_of, pretrain, rename, rows_and_columns, save_picture,
                       shapes, show_one, sizes_in, to_unit_range, transformer)
from masking import MASKS, hidden, picture_table, restore, run_script, visible


# ==== THE PAPERS, part 1: from frames to cubes and back, positions, the target ====================
# (needs: torch, F; mae_image.py parts_of, rows_and_columns)
def grid_of(frames, img_size, tubelet, patch):
    """-> token grid (t, h, w).   Raises ValueError if a side cannot be cut evenly"""
    return parts_of(frames, tubelet, "clip length"), *rows_and_columns(img_size, patch)


def patchify_clips(clips, u, p):
    """Cut clips into cubes: (B, C, T, H, W) -> (B, N, u*p*p*C), values (frame, row, col, C)."""
    B, C, T, H, W = clips.shape
    t, h, w = grid_of(T, (H, W), u, p)
    x = clips.reshape(B, C, t, u, h, p, w, p)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, t, h, w, u, p, p, C)
    return x.reshape(B, t * h * w, u * p * p * C)


def unpatchify_clips(patches, p, h, w, channels=3):
    """The inverse: (B, N, u*p*p*C) -> (B, C, t*u, h*p, w*p); t and u follow from the others."""
    B, N, P = patches.shape
    t, u, C = N // (h * w), P // (p * p * channels), channels
    x = patches.reshape(B, t, h, w, u, p, p, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, t, u, h, p, w, p)
    return x.reshape(B, C, t * u, h * p, w * p)


def sinusoid(width, N):
    """VideoMAE's fixed table (N, width), float32: sine on even channels, cosine on odd ones.

    important: it knows only the token's number, not its row, column and slot, and sine and cosine
    alternate. MAE's table has row and column, and its sines and cosines stand in blocks.
    """
    j = torch.arange(width)
    angle = torch.arange(N).double()[:, None] / 10000.0 ** (2 * (j // 2).double() / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def resize_table(table, old, new, mode="bicubic"):
    """Positions of one token grid (t, h, w) for another.   table (1, N, D) -> (1, N', D)

    By `mode` over rows and columns, as MAE's public code does for fine-tuning; linear over time
    slots, which is ours.
    """
    if old == new:
        return table
    (t, h, w), D = old, table.shape[2]
    x = table.reshape(t, h, w, D).permute(0, 3, 1, 2)  # (t, D, h, w)
    x = F.interpolate(x, new[1:], mode=mode, align_corners=False)  # (t, D, h', w')
    x = F.interpolate(x.flatten(1).T[None], new[0], mode="linear")  # (1, D*h'*w', t')
    return x[0].T.reshape(new[0], D, *new[1:]).permute(0, 2, 3, 1).reshape(1, -1, D)


def normalize_channels(patches, channels, deviation):
    """Each cube by its own mean and standard deviation, each channel by itself.

    patches    (B, M, P), channels last -> target, mean, std, each (B, M, P)
    deviation  of the unbiased variance: VideoMAE adds its epsilon outside the root, OmniMAE inside
    """
    B, M, P = patches.shape
    values = patches.reshape(B, M, P // channels, channels)  # (B, M, P / C, C)
    mean = values.mean(dim=2, keepdim=True)
    # torch's var takes four times as long as this where the channels come last
    var = (values - mean).square().sum(dim=2, keepdim=True) / (P // channels - 1)  # (B, M, 1, C)
    std = deviation(var)
    return tuple(x.expand_as(values).reshape(B, M, P) for x in ((values - mean) / std, mean, std))


# ==== THE PAPERS, part 2: VideoMAE ================================================================
# (needs: math, torch, nn, part 1; mae_image.py parts 1-3; masking.py part 3)
class VideoMAE(nn.Module):
    """VideoMAE.   loss, pred = model(clips, mask)

    clips  (B, C, T, H, W) float, normalised with mean and std;   mask (B, N) bool, True = hidden
    loss   float32 scalar;   pred (B, M, u*p*p*C) the painted hidden cubes, as the target

    decoder   (width, blocks, heads); published: half the encoder's width, heads of 64 (huge 80),
              4 blocks (12 from large on)
    size, channels, mean, std, errors: as in MAE

    DIFFERS from the official code: its attention has no key bias, ours does. A constant added to
    every key changes no softmax, so the numbers agree; public files load with a key bias of zero.
    """

    NO_DECAY = ("mask_token",)
    WARMUP_INCLUSIVE = True

    def __init__(self, frames=16, img_size=224, tubelet=2, patch=16, size="base",
                 decoder=(384, 4, 6), norm_pix=True, channels=3, mean=None, std=None):
        super().__init__()
        self.grid = grid_of(frames, img_size, tubelet, patch)
        self.tubelet, self.patch, self.norm_pix = tubelet, patch, norm_pix
        self.mean, self.std = mean_and_std(channels, mean, std)
        D, depth, heads = ENCODERS.get(size, size)
        E, N = decoder[0], math.prod(self.grid)

        self.patch_embed = PatchEmbed((tubelet, patch, patch), channels, D)
        self.blocks = transformer(D, depth, heads)
        self.norm = layer_norm(D)

        self.decoder_embed = nn.Linear(D, E, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_blocks = transformer(*decoder)
        self.decoder_norm = layer_norm(E)
        self.decoder_pred = nn.Linear(E, tubelet * patch * patch * channels)

        # fixed tables, (1, N, D) and (1, N, E)
        self.register_buffer("pos_embed", sinusoid(D, N)[None], persistent=False)
        self.register_buffer("decoder_pos_embed", sinusoid(E, N)[None], persistent=False)

        # patch_embed and decoder_embed keep PyTorch's default: the official code never reaches them
        self.blocks.apply(init_weights)
        self.decoder_blocks.apply(init_weights)
        init_weights(self.decoder_pred)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, clips, mask):
        latent = self.forward_encoder(clips, mask)  # (B, K, D)
        pred = self.forward_decoder(latent, mask)  # (B, M, P)
        return self.forward_loss(clips, pred, mask), pred

    def forward_encoder(self, clips, mask=None):
        """Joint space-time attention over the visible cubes.   -> (B, K, D)"""
        patches = self.cubes(clips)  # (B, N, P)
        B, N, P = patches.shape
        pos = self.pos_embed[:, :N]  # (1, N, D); OmniMAE's images are one slot: the first N
        x = self.patch_embed(visible(patches, mask)) + visible(pos, mask)  # (B, K, D)
        return self.norm(self.blocks(x))

    def forward_decoder(self, latent, mask):
        """Visible tokens, then mask tokens; positions say where each belongs.   -> (B, M, P)"""
        B, K, D = latent.shape
        vis = self.decoder_embed(latent) + visible(self.decoder_pos_embed, mask)  # (B, K, E)
        hid = self.mask_token + hidden(self.decoder_pos_embed, mask)  # (B, M, E)
        x = self.decoder_blocks(torch.cat([vis, hid.to(vis.dtype)], dim=1))  # (B, N, E)
        return self.decoder_pred(self.decoder_norm(x[:, K:]))

    def cubes(self, clips):
        """The network's input, cut.   (B, C, T, H, W) -> (B, N, u*p*p*C)"""
        t, h, w = self.grid
        check_shape(clips, (t * self.tubelet, h * self.patch, w * self.patch))
        return patchify_clips(clips, self.tubelet, self.patch)

    def patches(self, clips):
        """What is to be painted: cubes of pixels in [0, 1], not normalised.   -> (B, N, P)

        Where the target is normalised per channel only epsilon differs, for raw pixels the scale.
        """
        pixels = to_unit_range(clips.float(), self.mean, self.std)
        return patchify_clips(pixels, self.tubelet, self.patch)

    def normalize_patches(self, patches):
        """Each channel by itself; epsilon outside the root (MAE: together, inside)."""
        return normalize_channels(patches, len(self.mean), lambda var: var.sqrt() + 1e-6)

    # as in MAE: mean squared error on hidden cubes only, Eq. (1)
    normalize, target, forward_loss = MAE.normalize, MAE.target, MAE.forward_loss
    encode = forward_encoder

    def to_pictures(self, patches):
        """Cubes (B, N, P) -> frames (B, T, C, H, W) in [0, 1]."""
        return unpatchify_clips(patches, self.patch, *self.grid[1:], len(self.mean)).transpose(1, 2)


# ==== THE PAPERS, part 3: MAE-ST ==================================================================
# (needs: torch, nn, parts 1, 2; mae_image.py parts 1-3; masking.py part 3)
def target_frames(frames, predicted):
    """Which frames are painted: `predicted` points from first to last, truncated (public code).

    16 frames, 8 painted: 0 2 4 6 8 10 12 15. Mind the 15: it is not every second frame.
    """
    return torch.linspace(0, frames - 1, predicted).long()


class MAEST(nn.Module):
    """MAE-ST.   loss, pred = model(clips, mask)

    clips  (B, C, T, H, W) float, normalised with mean and std;   mask (B, N) bool, True = hidden
    loss   float32 scalar;   pred (B, M, P), the painted hidden cubes: `predicted` of the T frames,
           P = u'*p*p*C, u' = u * predicted / T. In the paper u' = 1: of two frames one is painted

    size       name in ENCODERS or (width, blocks, heads)
    decoder    (width, blocks, heads); (512, 4) in the paper, 16 heads in its code, 8 in SlowFast's
    predicted  frames that are painted, a multiple of the time slots; None: one per time slot
    separable  positions are a spatial plus a temporal table, else one joint table
    cls        class token; its encoder output is dropped, the decoder begins with one of its own
    mean, std  of each channel; None: 0.45 and 0.225 for all, not ImageNet's
    """

    NO_DECAY = ()  # so the tokens and the learned tables decay
    WARMUP_INCLUSIVE = False

    def __init__(self, frames=16, img_size=224, tubelet=2, patch=16, size="base",
                 decoder=(512, 4, 16), norm_pix=True, predicted=None, separable=True, cls=True,
                 channels=3, mean=None, std=None):
        super().__init__()
        self.grid = t, h, w = grid_of(frames, img_size, tubelet, patch)
        predicted = predicted or t
        self.tubelet, self.patch, self.norm_pix, self.cls = tubelet, patch, norm_pix, cls
        self.mean, self.std = mean or (0.45,) * channels, std or (0.225,) * channels
        D, depth, heads = ENCODERS.get(size, size)
        E = decoder[0]
        P = parts_of(predicted, t, "number of painted frames") * patch * patch * channels

        self.patch_embed = PatchEmbed((tubelet, patch, patch), channels, D)
        self.blocks = transformer(D, depth, heads)
        self.norm = layer_norm(D)

        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_blocks = transformer(*decoder)
        self.decoder_norm = layer_norm(E)
        self.decoder_pred = nn.Linear(E, P)
        self.register_buffer("frame_index", target_frames(frames, predicted), persistent=False)

        if cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
            self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, E))
        tables = {"": t * h * w + cls}
        if separable:
            tables = {"_spatial": h * w, "_temporal": t} | ({"_class": 1} if cls else {})
        for prefix, width in (("", D), ("decoder_", E)):
            for part, rows in tables.items():
                table = nn.Parameter(torch.zeros(1, rows, width))
                self.register_parameter(f"{prefix}pos_embed{part}", table)

        self.apply(init_weights)
        for block in [*self.blocks, *self.decoder_blocks]:
            for part in block.attn.qkv.weight.data.chunk(3):  # three matrices in the official code
                nn.init.xavier_uniform_(part)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)
        for name, parameter in self.named_parameters():  # the decoder's class token stays zero
            if "pos_embed" in name or name == "cls_token":
                nn.init.trunc_normal_(parameter, std=0.02)

    def positions(self, prefix=""):
        """-> table of the tokens (1, N, D), row of the class token, if there is one; decoder: E"""
        parts = ("", "_spatial", "_temporal", "_class")
        joint, space, time, row = (getattr(self, f"{prefix}pos_embed{x}", None) for x in parts)
        if joint is not None:
            return joint[:, self.cls :], joint[:, : self.cls]
        t, h, w = self.grid
        # token (s, r, c) gets space[r, c] + time[s]; time-major, so space repeats and time is held
        return space.repeat(1, t, 1) + time.repeat_interleave(h * w, dim=1), row

    def forward_encoder(self, clips, mask=None):
        """Visible cubes, wherever in space-time they are.   -> (B, [1+]K, D)"""
        patches = self.cubes(clips)  # (B, N, u*p*p*C)
        table, cls_row = self.positions()
        x = self.patch_embed(visible(patches, mask)) + visible(table, mask)  # (B, K, D)
        if self.cls:
            cls = (self.cls_token + cls_row).expand(x.shape[0], -1, -1)
            x = torch.cat([cls, x], dim=1)  # (B, 1+K, D)
        return self.norm(self.blocks(x))

    def forward_decoder(self, latent, mask):
        """All tokens in raster order.   (B, [1+]K, D) -> (B, M, P)"""
        table, cls_row = self.positions("decoder_")
        vis = self.decoder_embed(latent[:, self.cls :])  # (B, K, E)
        x = restore(vis, mask, self.mask_token) + table  # (B, N, E)
        if self.cls:  # important: the decoder's own; MAE hands on the encoder's
            cls = (self.decoder_cls_token + cls_row).expand(len(x), -1, -1)
            x = torch.cat([cls.to(x.dtype), x], dim=1)  # (B, 1+N, E)
        x = self.decoder_norm(self.decoder_blocks(x))[:, self.cls :]  # (B, N, E)
        return self.decoder_pred(hidden(x, mask))

    def patches(self, clips):
        """The frames that are painted, as cubes of u' frames: Sec. 3 "Autoencoding" -> (B, N, P)"""
        painted = clips.float()[:, :, self.frame_index]
        return patchify_clips(painted, len(self.frame_index) // self.grid[0], self.patch)

    # each cube is normalised by its own mean and variance, over all channels together, as in MAE
    forward, normalize_patches, cubes = VideoMAE.forward, MAE.normalize_patches, VideoMAE.cubes
    normalize, target, forward_loss = MAE.normalize, MAE.target, MAE.forward_loss
    encode = forward_encoder

    def to_pictures(self, patches):
        """Cubes (B, N, P) -> the painted frames (B, predicted, C, H, W) in [0, 1]."""
        x = unpatchify_clips(patches, self.patch, *self.grid[1:], len(self.mean))
        return to_unit_range(x, self.mean, self.std).transpose(1, 2)


# ==== THE PAPERS, part 4: which frames, which crop (needs: np, torch; data.py parts 2-4) ==========
# n is the number of frames of the video. Frame numbers are int (T,) in [0, n); a video that is too
# short gives its last frames several times.
def dense_clip(n, length, stride, start):
    """`length` frames, `stride` apart: VideoMAE Sec. 3.3 "temporal downsampling" (4, on SSv2 2)."""
    frames = start + stride * np.arange(length)
    return np.minimum(frames, start + (n - 1 - start) // stride * stride)


def linspace_clip(n, length, stride, start):
    """MAE-ST's (public code): `length` points from a real-valued start, truncated.

    The last is start + length * stride - 1, so the step drifts: 0, 4, 8, 12, 16, 21, ...
    """
    points = np.linspace(start, start + length * stride - 1, length, dtype=np.float32)
    return np.clip(points, 0, n - 1).astype(np.int64)


def segment_clip(n, length, generator):
    """One random frame from each of `length` equal segments of the video (TSN; VideoMAE on SSv2).

    DIFFERS from VideoMAE's public code, which rounds segments down and never sees a video's end.
    """
    edges = np.arange(length + 1) * n // length  # first frame of each segment, and the end
    u = torch.rand(length, generator=generator).double().numpy()
    return edges[:-1] + (u * np.maximum(np.diff(edges), 1)).astype(np.int64)


def random_clip(sampling, n, length, stride, generator):
    """A clip for training: frame numbers (T,) anywhere in a video of n frames."""
    if sampling == "segments":
        return segment_clip(n, length, generator)
    room = max(n - length * stride, 0)  # a video that is too short begins at 0
    if sampling == "dense":  # each start is equally likely
        start = int(torch.randint(room + 1, (1,), generator=generator))
        return dense_clip(n, length, stride, start)
    return linspace_clip(n, length, stride, torch.rand(1, generator=generator).numpy()[0] * room)


def even_starts(room, count):
    """Where `count` clips or crops begin: evenly from 0 to `room`, a single one in the middle."""
    if count == 1:
        return [room // 2]
    return [i * room // (count - 1) for i in range(count)]


def views_of(sampling, n, length, stride, views):
    """Test-time clips of a video of n frames: frame numbers (views, T). One view: the middle.

    Of "segments" one frame each. Two views are their starts and their middles, as in VideoMAE's
    public code for SSv2.
    """
    if sampling == "segments":
        shifts = np.array([0.5]) if views == 1 else np.arange(views) / views
        return ((np.arange(length) + shifts[:, None]) * n / length).astype(np.int64)
    if sampling == "dense":  # VideoMAE's code moves a window over every stride-th frame
        room = max(-(-n // stride) - length, 0)
        starts = even_starts(room, views)
        return np.stack([dense_clip(n, length, stride, stride * s) for s in starts])
    room = max(n - length * stride, 0)
    room -= room % max(views - 1, 1)  # MAE-ST's code: whole distances
    return np.stack([linspace_clip(n, length, stride, s) for s in even_starts(room, views)])


def multi_scale_box(shape, size, generator):
    """VideoMAE's crop (public code).   shape, size (H, W) -> top, left, height, width

    Sides are 1, .875, .75 or .66 of the largest box of the shape of `size`, height and width at
    most one step apart, and `size` itself where they are within 2 pixels of it. The corner is one
    of 13 places on a grid of quarters, rows and columns 0 to 4.
    """

    def pick(n):
        return int(torch.randint(n, (1,), generator=generator))

    scales, sides = (1, 0.875, 0.75, 0.66), []
    pairs = [(i, j) for i in range(4) for j in range(4) if abs(i - j) <= 1]
    for k, side, goal in zip(pairs[pick(len(pairs))], data.center_box(shape, size)[2:], size):
        x = max(1, int(side * scales[k]))
        sides.append(goal if abs(x - goal) <= 2 and goal <= side else x)
    h, w = sides
    row, col = map(int, "00 04 40 44 22 20 24 42 02 11 13 31 33".split()[pick(13)])
    return row * ((shape[0] - h) // 4), col * ((shape[1] - w) // 4), h, w


class ClipDataset(data.FileDataset):
    """Items uint8 (R, T, H, W, 3): R clips of a video, one crop and flip for all frames of a clip.

    cfg    settings, see ClipConfig. Each of the R = `repeat` clips has its own place and crop:
           MAE-ST Sec. 4 "Data pre-processing". Decoding is slow: R clips cost little more than one
    train  False: one clip, the middle of the video or of every segment; centre crop
    """

    def __init__(self, files, cfg, train):
        super().__init__(files, cfg, train)
        self.repeat = cfg.repeat

    def read(self, i, generator):
        clips, problem = data.read_clips(self.paths[i], lambda n: self.choose(n, generator))
        samples = []
        for clip in clips:
            box, flip = self.draw_crop(clip.shape[1:3], generator)
            samples.append(data.make_crop(clip, self.size, box, flip))
        return torch.stack(samples), problem

    def choose(self, n, generator=None):
        """Frame numbers (R, T) for a video of n frames."""
        how = self.cfg.sampling, n, self.cfg.frames, self.cfg.stride
        if not self.train:
            return views_of(*how, 1)
        return np.stack([random_clip(*how, generator) for _ in range(self.repeat)])

    def draw_box(self, shape, generator):
        if self.cfg.crop == "multiscale":
            return multi_scale_box(shape, self.size, generator)
        return super().draw_box(shape, generator)


# ==== THE RUN =====================================================================================
MODELS = {"videomae": VideoMAE, "mae_st": MAEST}
Mask = typing.Literal["paper", "tube", "random", "frame", "block", "causal"]


@dataclasses.dataclass
class ClipConfig(RunConfig):
    """What every script that reads clips can be told, in addition."""

    # data
    fold: int = 1  # of the official lists: 1, 2 or 3
    frames: int = 8  # frames per clip; the papers have 16
    stride: int = 2  # frames from one to the next (Kinetics, UCF101: 4; SSv2, HMDB51: 2)
    sampling: typing.Literal["segments", "dense", "linspace"] = "segments"  # whole video or window
    repeat: int = 1  # clips of every decoded video: repeated sampling, augmentation, replication
    crop: typing.Literal["random", "multiscale"] = "random"  # multiscale: VideoMAE's
    # model
    tubelet: int = 4  # frames in a cube; the papers have 2


@dataclasses.dataclass
class Config(ClipConfig):
    SCRIPT, BASELINE = "mae_video", "mean prediction"

    # data
    data: str = "toy"  # UCF101, HMDB51, folder of videos or list file; the toy world is made
    min_crop: float = 0.5  # smallest share of the frame that a random crop takes
    flip: bool = True  # mirror half of the clips; --no-flip where left and right are classes
    picture: str = ""  # no training: paint the hidden parts of this one clip, with --init
    # model
    model: typing.Literal["videomae", "mae_st"] = "videomae"  # which paper
    decoder: str = "64x2x4"  # WIDTHxBLOCKSxHEADS; VideoMAE's base 384x4x6, MAE-ST's 512x4x16
    mask: Mask = "paper"  # which cubes are hidden; paper: tube or random, by --model
    mask_ratio: float = 0.75  # share of cubes that are hidden; the papers' 0.9, on UCF101 0.75
    norm_pix: bool = False  # predict cubes normalised by their own mean and deviation, as papers do
    # optimiser
    epochs: int = 150  # passes over the videos; each gives --repeat clips
    batch: int = 16  # clips per update, over all processes, accumulation steps and repeats
    lr: float = 5e-2  # base rate, for a batch of 256; the papers: 1.5e-4 to 4e-4, for longer runs
    warmup: float = 5  # epochs of linear warm-up
    # run
    out: str = "runs/mae_video"  # folder for checkpoint, log and pictures


_video = dict(frames=16, stride=4, sampling="dense", tubelet=2, mask_ratio=0.75, norm_pix=True,
              lr=3e-4, crop="multiscale", flip=False)
_gpu = dict(_video, img_size="112", patch=8, size="small", decoder="192x4x3", epochs=200, batch=64,
            warmup=20)
_paper = dict(_video, img_size="224", patch=16, size="base", decoder="384x4x6", epochs=3200,
              batch=192, min_lr=1e-5, warmup=40)
PRESETS = {
    # some hundred clips of your own, on a CPU or one GPU
    "small": dict(tubelet=2, size="96x4x3", decoder="64x1x2", mask_ratio=0.85,
                  norm_pix=True, batch=32, lr=2e-2, epochs=300, warmup=15),
    "gpu": _gpu,
    "ucf101": _gpu,
    "hmdb51": dict(_gpu, stride=2, epochs=400),
    # VideoMAE App. 7 "UCF101" and "HMDB51" (8 GPUs); flip, end of the cosine: public code
    "ucf101_paper": _paper,
    "hmdb51_paper": dict(_paper, stride=2, epochs=4800),
    # MAE-ST Sec. 4: 800 epochs are 200 passes x 4 clips. Passes from SlowFast's configuration;
    # warm-up 30 passes, the 120 epochs of Table 5. Rate and clipping from mae_st's PRETRAIN.md,
    # where 1.6e-3 is for 256 videos, that is 1024 clips; here it is for 256 clips, so a quarter.
    # not verified: whether the paper's batch of 512 counts clips, as here, or videos
    "mae_st_paper": dict(model="mae_st", frames=16, stride=4, sampling="linspace", tubelet=2,
                         img_size="224", patch=16, size="large", decoder="512x4x16", mask_ratio=0.9,
                         norm_pix=True, repeat=4, batch=512, lr=4e-4, clip=0.02, epochs=200,
                         warmup=30),
}


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they are
def main(argv=None):
    readers = {"videomae": public_videomae, "mae_st": public_maest}
    cfg, found, device = begin(Config, PRESETS, __doc__, readers, argv)
    size, encoder, decoder = shapes(cfg)
    model = MODELS[cfg.model](cfg.frames, size, cfg.tubelet, cfg.patch, encoder, decoder,
                              cfg.norm_pix)
    load_pretrained(model.to(device), found, cfg.resume)
    kind = {"videomae": "tube", "mae_st": "random"}[cfg.model] if cfg.mask == "paper" else cfg.mask

    def draw_mask(batch, rows, generator):
        return MASKS[kind](rows, model.grid, cfg.mask_ratio, generator)

    if cfg.picture:
        one = ClipDataset(data.one_file(cfg.picture, data.VIDEO), cfg, False)
        return show_one(model, one, draw_mask, draw_clips, cfg)
    fetch(cfg.data)
    files, val_files = list_both(cfg, data.list_videos, cfg.data, cfg.fold)
    sample = held_out(ClipDataset(val_files, cfg, False), draw_mask, cfg.seed)

    def look(path):
        return paint_held_out(model, sample, draw_clips, path)

    pretrain(model, ClipDataset(files, cfg, True), draw_mask, look, cfg)


def draw_clips(pictures, path, note):
    """Some clips as a film, a column for each, and as a PNG, a column for each frame."""
    kinds, clips = [*pictures], torch.stack([*pictures.values()], dim=1)
    clips = clips[evenly(len(clips), 6)]  # (clips, kinds, frames, 3, H, W)
    film = [picture_table(cells, (), kinds, note, 128) for cells in clips.transpose(0, 2)]
    save_picture(film[0], path.with_suffix(".gif"), save_all=True, append_images=film[1:],
                 duration=150, loop=0)
    frames = evenly(clips.shape[2])
    rows, columns = clips[:, :, frames].flatten(0, 1), [f"frame {f}" for f in frames]
    table = picture_table(rows, columns, kinds * len(clips), note, apart=len(kinds))
    save_picture(table, path)


# ---- Public files of the two papers --------------------------------------------------------------
def public_videomae(state):
    """MCG-NJU/VideoMAE, HuggingFace's VideoMAE -> settings, our names, guesses."""
    names = {r"^(encoder|backbone)\.": "", "^encoder_to_decoder": "decoder_embed",
             r"^decoder\.blocks": "decoder_blocks", r"^decoder\.norm": "decoder_norm",
             r"^decoder\.head": "decoder_pred"}
    state = rename(state, names)
    kernel = state.get("patch_embed.proj.weight", torch.empty(0))
    if kernel.ndim != 5 or any("pos_embed" in k for k in state):
        return None
    sizes, guesses = sizes_in(state, 14 * 14, decoder_heads=None)
    sizes |= {"frames": 16, "stride": 4, "sampling": "dense"}
    return sizes, state, guesses + ["frames", "img_size"]


def public_maest(state):
    """facebookresearch/mae_st, SlowFast's encoders -> settings, our names, guesses."""
    kernel = state.get("patch_embed.proj.weight", torch.empty(0))
    if kernel.ndim != 5 or not any(k.startswith("pos_embed") for k in state):
        return None
    if "decoder_pred.weight" not in state:  # SlowFast has a decoder of its own
        theirs = ("dec", "pred_head", "mask_token")
        state = {k: v for k, v in state.items() if not k.startswith(theirs)}
    separable = "pos_embed_spatial" in state
    places = state["pos_embed_spatial"].shape[1] if separable else 14 * 14
    sizes, guesses = sizes_in(state, places)
    sizes |= {"frames": 16, "stride": 4, "sampling": "linspace"}
    if separable:
        sizes["frames"] = state["pos_embed_temporal"].shape[1] * sizes["tubelet"]
    else:  # a joint table tells how many cubes in all
        guesses += ["frames", "img_size"]
    return sizes, state, guesses


if __name__ == "__main__":
    run_script(main)
