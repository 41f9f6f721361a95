"""omni.py - one plain ViT for images and videos: an image is a clip that is one cube long.

Paper   OmniMAE: Single Model Masked Pretraining on Images and Videos. Girdhar, El-Nouby, Singh, Alwala, Joulin,
        Misra, 2022, arXiv 2206.08356. Of the paper itself only the abstract, the start of the introduction and
        the caption of Fig. 1 were read: what goes beyond them follows the public code, and is named so.
Covers  abstract, "90 % of image and 95 % of video patches"     random_mask on both, --mask-ratio-image, --mask-ratio
        public code, images as clips one cube long              OmniMAE.as_clip, positions
        public code, the decoder                                OmniMAE.forward_decoder
        public code, the target                                 OmniMAE.target_patches, standardise
        public code, every step images or clips                 JointDataset, joint_plan
        public code, sample replication                         --repeat, data.ClipDataset
        ours: images and clips in one step                      run_blocks, --joint mixed
Not     fine-tuning (finetune.py takes the checkpoint for images and for videos); the block masks after BEiT of
        the public code.

What changes against mae_video.py:
                     VideoMAE                              OmniMAE
    input            clips                                 images (B, 3, H, W) and clips (B, 3, T, H, W)
    positions        one sine over the token number        the same; an image has those of the first time slot
    mask token       decoder width                         encoder width, put in before the projection
    decoder's sine   decoder width, after the projection   encoder width, before it, on every token
    decoder order    visible, then hidden                  raster
    target's scale   sqrt(variance) + epsilon              sqrt(variance + epsilon)
Nothing tells the network whether it sees an image or a clip, and every weight serves both.

Run     python omni.py                                     (4 min on 2 CPU cores: toy images and toy videos)
        python omni.py --joint mixed                       (both in every step, packed)
        python omni.py --data SSv2 --images IMAGENET --preset paper
        python omni.py --resume                            (goes on where a run was stopped)
        It ends with "done: ... see runs/omni".
Next    multimae.py: several modalities of one image instead of two kinds of input.
"""

import math
import typing
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import data
from data import seeded
from mae_image import (ENCODERS, IMAGENET_MEAN, IMAGENET_STD, LEAK_NOTE, Block, PatchEmbed, check_mask, encoder_size,
                       held_out, init_weights, normalize, picture_table, pretrain, read_config, reconstruct,
                       save_picture, shuffled, start_processes, to_unit_range)  # fmt: skip
from mae_video import VideoMAE, check_clip, patchify, sinusoid, standardise_channels, unpatchify
from masking import MASKS, InputError, hidden, restore, run_script, say, visible

# ============================================================================================================
#  THE PAPER, part 1: images and clips in one pass                                              (needs: torch)
# ============================================================================================================


def packed_attention(attention, x, shapes):
    """Attention within each sample of each group.   x (sum of B*N, D), shapes [(B, N), ...] -> as x

    The projections see one long row of tokens; only the attention itself needs samples of equal length."""
    D, parts = x.shape[1], []
    for qkv, (B, N) in zip(attention.qkv(x).split([B * N for B, N in shapes]), shapes):
        q, k, v = qkv.reshape(B, N, 3, attention.heads, D // attention.heads).permute(2, 0, 3, 1, 4)
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * N, D))
    return attention.proj(torch.cat(parts))


def run_blocks(blocks, groups):
    """Groups of samples of different lengths through the same blocks.   [(B, N, D), ...] -> [(B, N, D), ...]

    A masked batch has two lengths only, visible image tokens and visible clip tokens. LayerNorm, MLP and the
    projections work token by token, so all tokens are packed into one tensor for them: one large matrix product
    instead of two small ones. The result is that of two separate passes (tested).
    """
    if len(groups) == 1:  # nothing to pack: the blocks themselves, which in finetune.py do more than the lines below
        for block in blocks:
            groups = [block(groups[0])]
        return groups
    shapes = [g.shape[:2] for g in groups]
    x = torch.cat([g.flatten(0, 1) for g in groups])  # (sum of B*N, D)
    for block in blocks:
        x = x + packed_attention(block.attn, block.norm1(x), shapes)
        x = x + block.mlp(block.norm2(x))
    return [part.reshape(B, N, -1) for part, (B, N) in zip(x.split([B * N for B, N in shapes]), shapes)]


# ============================================================================================================
#  THE PAPER, part 2: the model
#  (needs: torch, part 1; mae_image.py ENCODERS, IMAGENET_*, parts 1-3; mae_video.py parts 1, 2;
#   masking.py InputError, part 3)
# ============================================================================================================


class OmniMAE(nn.Module):
    """OmniMAE.   loss, pred = model(x, mask)

    x     images (B, 3, H, W) or clips (B, 3, T, H, W), float, normalised with MEAN and STD; or a pair (images, clips)
    mask  (B, N) bool, True = hidden: N = h*w for images, t*h*w for clips; for a pair a pair
    loss  float32 scalar, of a pair the mean of both;   pred (B, M, u*p*p*3), of a pair a list of both

    size      name in ENCODERS, or (width, blocks, heads)
    decoder   (width, blocks, heads); published: base (384, 4, 16), large (512, 4, 16), huge (512, 8, 16)
    decoder_bias  True: q, k and v of the decoder have a bias, as in the training recipe. False: it stays zero, as in
              the public code that reads the released files (whatever its flag says)
    raises    InputError if frames or sides cannot be cut evenly, or a width by its heads
    """

    MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
    NO_DECAY = ()
    WARMUP_INCLUSIVE = False

    def __init__(self, frames=16, img_size=224, tubelet=2, patch=16, size="base", decoder=(384, 4, 16), norm_pix=True,
                 decoder_bias=True):  # fmt: skip
        super().__init__()
        self.grid, self.img_size = check_clip(frames, img_size, tubelet, patch), img_size
        self.frames, self.tubelet, self.patch, self.norm_pix = frames, tubelet, patch, norm_pix
        D, depth, heads = ENCODERS[size] if isinstance(size, str) else size
        E, decoder_depth, decoder_heads = decoder
        N, P = math.prod(self.grid), tubelet * patch * patch * 3

        self.patch_embed = PatchEmbed((tubelet, patch, patch), 3, D)
        self.blocks = nn.ModuleList([Block(D, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

        self.mask_token = nn.Parameter(torch.zeros(1, D))  # important: encoder width, begun at zero
        self.decoder_embed = nn.Linear(D, E)
        self.decoder_blocks = nn.ModuleList([Block(E, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.decoder_pred = nn.Linear(E, P)

        # One table serves encoder and decoder: both are encoder width.   (1, N, D)
        self.register_buffer("pos_embed", sinusoid(D, N)[None], persistent=False)

        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.trunc_normal_(self.decoder_pred.weight, std=0.02)
        if not decoder_bias:
            for block in self.decoder_blocks:
                block.attn.qkv.bias.requires_grad_(False)

    def normalize(self, batch):
        """Batch from the loader, uint8 images (B, H, W, 3), clips (B, T, H, W, 3) or rows of both -> float32."""
        if batch.ndim == 2:  # see JointDataset: each row is a clip and some images
            clip_bytes, side = self.frames * self.img_size**2 * 3, self.img_size
            clips = batch[:, :clip_bytes].reshape(-1, self.frames, side, side, 3)
            imgs = batch[:, clip_bytes:].reshape(-1, side, side, 3)
            return normalize(imgs, self.MEAN, self.STD), normalize(clips, self.MEAN, self.STD)
        return normalize(batch, self.MEAN, self.STD)

    def as_clip(self, x):
        """An image is repeated until it is one cube long.   (B, 3, H, W) -> (B, 3, u, H, W); clips stay"""
        return x[:, :, None].expand(-1, -1, self.tubelet, -1, -1) if x.ndim == 4 else x

    def positions(self, N):
        """-> (1, N, D). An image, N = h*w, has the rows of the first time slot."""
        if N not in (self.grid[1] * self.grid[2], math.prod(self.grid)):
            raise InputError(f"{N} patches, but the model was built for images of (h, w) = {self.grid[1:]} and clips "
                             f"of (t, h, w) = {self.grid}")  # fmt: skip
        return self.pos_embed[:, :N]

    def forward(self, x, mask):
        pair = not torch.is_tensor(x)
        xs, masks = (x, self.split_mask(mask, len(x[0]))) if pair else ([x], [mask])
        patches = [patchify(self.as_clip(x), self.tubelet, self.patch) for x in xs]  # each (B, N, P)
        latents = self.forward_encoder(patches, masks)
        outputs = self.forward_decoder(latents, masks)
        preds = [self.decoder_pred(hidden(x, mask)) for x, mask in zip(outputs, masks)]  # each (B, M, P)
        losses = [self.forward_loss(x, pred, mask) for x, pred, mask in zip(xs, preds, masks)]
        return (torch.stack(losses).mean(), preds) if pair else (losses[0], preds[0])

    def split_mask(self, mask, images):
        """A mask of rows (clip, images) -> image masks, clip masks; a pair stays a pair.

        important: in a row the clip comes first, everywhere else images do."""
        if not torch.is_tensor(mask):
            return mask
        N = math.prod(self.grid)
        return mask[:, N:].reshape(images, -1), mask[:, :N]

    def forward_encoder(self, patches, masks):
        """Visible patches only.   patches [(B, N, P), ...], masks [(B, N), ...] -> [(B, K, D), ...]"""
        groups = []
        for patch, mask in zip(patches, masks):
            B, N, P = patch.shape
            if mask.shape[1] != N:
                raise InputError(f"{N} patches, but a mask of {mask.shape[1]}")
            pos = self.positions(N).expand(B, -1, -1)  # (B, N, D)
            groups.append(self.patch_embed(visible(patch, mask)) + visible(pos, mask))
        return [self.norm(x) for x in run_blocks(self.blocks, groups)]

    def forward_decoder(self, latents, masks):
        """[(B, K, D), ...] -> [(B, N, E), ...] in raster order."""
        groups = [self.decoder_embed(self.decoder_input(x, mask)) for x, mask in zip(latents, masks)]
        return [self.decoder_norm(x) for x in run_blocks(self.decoder_blocks, groups)]

    def decoder_input(self, latent, mask):
        """Mask tokens and positions join at encoder width, so visible tokens get positions twice.   -> (B, N, D)"""
        B, N = mask.shape
        return restore(latent, mask, self.mask_token) + self.positions(N)

    def target_patches(self, x):
        """Cubes of pixels in [0, 1]; of an image both copies are to be painted.   -> (B, N, P)"""
        pixels = to_unit_range(self.as_clip(x).float(), self.MEAN, self.STD)
        return patchify(pixels, self.tubelet, self.patch)

    def standardise(self, patches):
        """standardise_channels with the epsilon inside the root (VideoMAE: outside)."""
        return standardise_channels(patches, lambda var: (var + 1e-6).sqrt())

    # mean squared error on hidden cubes only, as in VideoMAE; no weight for either modality
    forward_target, forward_loss = VideoMAE.forward_target, VideoMAE.forward_loss

    def encode(self, x):
        """Every token, no mask.   images (B, 3, H, W) -> (B, h*w, D); clips (B, 3, T, H, W) -> (B, t*h*w, D)"""
        patches = patchify(self.as_clip(x), self.tubelet, self.patch)  # (B, N, P)
        return self.forward_encoder([patches], [torch.zeros(patches.shape[:2], dtype=torch.bool)])[0]

    def to_pictures(self, patches):
        """Target cubes (B, N, P) -> frames (B, T, 3, H, W) in [0, 1]; of an image one of the two copies."""
        t, h, w = self.grid
        if patches.shape[1] == h * w:
            return unpatchify(patches, self.patch, 1, h, w).transpose(1, 2)[:, :1]
        return unpatchify(patches, self.patch, t, h, w).transpose(1, 2)

    def from_public(self, state):
        """Names of facebookresearch/omnivore's files -> ours: those of the hub and those of the trainer.

        Their tables are computed here; where the decoder has no q, k, v bias, ours is zero."""
        renamed = {}
        for key, value in state.items():
            key = key.removeprefix("trunk.").replace("patch_embed.proj.1.", "patch_embed.proj.")
            key = key.replace("decoder.decoder_", "decoder_").replace("decoder.norm.", "decoder_norm.")
            key = key.replace("heads.0.projector.", "head.")
            if not key.endswith("pos_embed"):
                renamed[key] = value
        P = self.tubelet * self.patch**2 * 3
        if "decoder_embed.weight" in renamed and len(renamed.get("head.weight", ())) == P:  # the pixel head
            renamed.update({f"decoder_pred.{k}": renamed.pop(f"head.{k}") for k in ("weight", "bias")})
        for key in [k for k in renamed if k.startswith("decoder_blocks.") and k.endswith("attn.qkv.weight")]:
            renamed.setdefault(key.replace("weight", "bias"), torch.zeros(len(renamed[key])))
        return renamed


# ============================================================================================================
#  THE PAPER, part 3: joint batches                      (needs: torch; data.py seeded; mae_image.py shuffled)
# ============================================================================================================


class JointDataset(Dataset):
    """Images and videos as one dataset for pretrain().

    mixed False: items 0 .. I-1 are the images, I .. I+V-1 the videos, and joint_plan() makes pure updates of them
    mixed True:  item i is video i with `per_clip` images drawn at random, for each of its R clips one row of bytes
                 (R, clip + images); OmniMAE.normalize takes it apart
    """

    def __init__(self, images, videos, mixed, per_clip, seed):
        self.images, self.videos, self.mixed, self.per_clip, self.seed = images, videos, mixed, per_clip, seed
        self.repeat = videos.repeat
        self.paths = [*videos.paths, *images.paths] if mixed else [*images.paths, *videos.paths]

    def __len__(self):
        return len(self.videos) if self.mixed else len(self.paths)

    def __getitem__(self, key):
        epoch, i = key
        if not self.mixed:
            if i < len(self.images):
                return self.images[epoch, i]
            pixels, number, broken = self.videos[epoch, i - len(self.images)]
            return pixels, number + len(self.images), broken
        pixels, number, broken = self.videos[epoch, i]
        g = seeded(self.seed, 8, epoch, i)
        chosen = torch.randint(len(self.images), (self.repeat * self.per_clip,), generator=g).tolist()
        found = [self.images[epoch, n] for n in chosen]
        imgs = torch.cat([x for x, _, _ in found]).reshape(self.repeat, -1)
        return torch.cat([pixels.flatten(1), imgs], dim=1), number, sum((b for _, _, b in found), broken)


def joint_plan(epoch, images, videos, batch, repeat, shares, seed):
    """The updates of an epoch: each of images only or of videos only, in a random order (public code).

    images, videos  how many there are; videos are numbered behind the images
    shares          which share of the image and of the video updates an epoch has; the public recipe's are 1 and
                    1/4, because each decoded video is replicated 4 times. What an epoch mixes is updates, not
                    samples: with the public recipe one update in nine is of videos
    """
    of_images = shuffled(seed, epoch, images, batch)
    of_videos = [[images + i for i in update] for update in shuffled(seed + 1, epoch, videos, batch // repeat)]
    first = lambda part, share: part[: max(round(share * len(part)), 1 if share else 0)]
    updates = first(of_images, shares[0]) + first(of_videos, shares[1])
    return [updates[i] for i in torch.randperm(len(updates), generator=seeded(seed, 9, epoch)).tolist()]


# ============================================================================================================
#  THE RUN
# ============================================================================================================


@dataclass
class Config:
    # data
    data: str = "toy"  # videos: UCF101, HMDB51, folder or list file; "toy" is written first if it is not there
    images: str = "toy"  # images: folder, list file, cifar10 or stl10
    fold: int = 1  # of the official lists: 1, 2 or 3
    allow_missing: bool = False  # a list may name files that are not there: use the others
    frames: int = 8  # frames per clip; the public code has 16
    stride: int = 2  # frames from one to the next
    sampling: typing.Literal["dense", "linspace", "segments"] = "dense"  # segments: the whole video
    img_size: int = 64  # side of images and frames that the model sees, in pixels
    min_crop: float = 0.5  # smallest share of a frame that a random crop takes; the public code: 0.08
    min_crop_image: float = 0.2  # smallest share of an image that a random crop takes
    flip: bool = False  # mirror half of the clips; the public code does not
    flip_image: bool = True  # mirror half of the images
    repeat: int = 1  # clips of every decoded video: sample replication; the public code has 4
    workers: int = 2  # processes that load data
    # how images and videos are joined
    joint: typing.Literal["interleaved", "mixed"] = "interleaved"  # a step has images or clips, as published; or both
    image_share: float = 1.0  # interleaved: share of the image updates that an epoch has, 0: none
    video_share: float = 1.0  # interleaved: share of the video updates; the public recipe with --repeat 4: 0.25
    per_clip: int = 1  # mixed: images beside every clip of a step
    # model
    size: str = "nano"  # encoder: nano, tiny, small, base, large, huge, or WIDTHxBLOCKSxHEADS
    patch: int = 8  # side of a cube in pixels
    tubelet: int = 2  # frames in a cube
    decoder_width: int = 64  # the public code's base has 384
    decoder_depth: int = 1  # blocks; the public code's base has 4
    decoder_heads: int = 2  # the public code's base has 16
    mask: typing.Literal["random", "tube", "frame", "causal"] = "random"  # of videos; images are always random
    mask_ratio: float = 0.75  # share of a clip's cubes that are hidden; the paper 0.95, the released recipe 0.9
    mask_ratio_image: float = 0.75  # share of an image's patches; the paper 0.9, the released recipe 0.75
    norm_pix: bool = False  # predict cubes normalised by their own mean and deviation, as the public code does
    # optimiser
    epochs: int = 30  # passes over images and videos, by their shares; mixed: over the videos
    batch: int = 16  # images or clips per update, over all processes, accumulation steps and repeats
    accum: int = 1  # forward-backward passes per update: raise it when memory runs out
    lr: float = 5e-2  # base rate, for a batch of 256; the public code's is 2e-4, for much longer runs
    min_lr: float = 0.0  # base rate at the end of the cosine
    warmup: float = 2  # epochs of linear warm-up
    weight_decay: float = 0.05  # of matrices; vectors have none
    clip: float = 0.0  # largest norm of the gradient, 0: no clipping
    # run
    out: str = "runs/omni"  # folder for checkpoint, log and pictures
    resume: bool = False  # go on with the run in --out
    init: str = ""  # start from the weights in this file: ours, or a public OmniMAE one
    seed: int = 0  # of weights, masks, order, crops
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format of the matrix products
    compile: bool = False  # torch.compile: slow start, faster steps
    log_every: int = 10  # updates between two lines of the log
    pictures: int = 5  # how often pictures are drawn, evenly over the run, the last at its end; and once before
    smoke: bool = False  # three updates only, to see that everything runs; its folder may be written again


LIMITS = [("image_share", 0, 1), ("video_share", 0, 1), ("per_clip", 1, 1000), ("min_crop_image", 0.01, 1)]
PRESETS = {
    # The public recipe for ViT-B (64 GPUs); ratios of the abstract, where the recipe has 0.75 and 0.9. Its clips are
    # 2.7 s long, whatever the frame rate; stride 4 is 2.1 s at 30 frames a second
    "paper": dict(frames=16, img_size=224, patch=16, size="base", decoder_width=384, decoder_depth=4, decoder_heads=16,
                  mask_ratio=0.95, mask_ratio_image=0.9, norm_pix=True, min_crop=0.08, repeat=4, video_share=0.25,
                  batch=2048, lr=2e-4, epochs=800, warmup=40, workers=16, stride=4, out="runs/omni_paper"),
    "gpu": dict(frames=16, img_size=112, patch=8, size="small", decoder_width=192, decoder_depth=4, decoder_heads=3,
                mask_ratio=0.9, mask_ratio_image=0.75, norm_pix=True, repeat=4, batch=128, lr=3e-4, epochs=200,
                warmup=10, workers=8, stride=4, out="runs/omni_gpu"),
}  # fmt: skip


def draw_masks(model, cfg):
    """-> draw_mask(batch, rows, generator) for pretrain(): by its dimensions a batch is of images, clips or both."""
    t, h, w = model.grid
    # OmniMAE's code counts the hidden tokens ("hide"), where MAE's counts the visible ones
    image = lambda rows, g: MASKS["random"](rows, (1, h, w), cfg.mask_ratio_image, g, "hide")
    options = ("hide",) if cfg.mask == "random" else ()
    clip = lambda rows, g: MASKS[cfg.mask](rows, model.grid, cfg.mask_ratio, g, *options)

    def draw_mask(batch, rows, generator):
        if batch.ndim == 4:
            return image(rows, generator)
        if batch.ndim == 5:
            return clip(rows, generator)
        return torch.cat([clip(rows, generator), image(rows * cfg.per_clip, generator).reshape(rows, -1)], dim=1)

    return draw_mask


def main():
    cfg = read_config(Config, PRESETS, __doc__, "omni", limits=LIMITS, may_change=("images",))
    rank, world, device = start_processes(cfg)
    for name in sorted({cfg.data, cfg.images}):
        data.fetch(name, rank, world)
    torch.manual_seed(cfg.seed)
    decoder = (cfg.decoder_width, cfg.decoder_depth, cfg.decoder_heads)
    model = OmniMAE(cfg.frames, cfg.img_size, cfg.tubelet, cfg.patch, encoder_size(cfg.size), decoder, cfg.norm_pix)
    draw_mask = draw_masks(model, cfg)
    for what, batch in (("images: ", torch.empty(0, 0, 0, 0)), ("clips: ", torch.empty(0, 0, 0, 0, 0))):
        check_mask(draw_mask(batch, 1, torch.Generator()), what)
    if max(cfg.image_share, cfg.video_share) == 0:
        raise InputError("--image-share 0 and --video-share 0 leave nothing to train on")

    def open_videos(split):
        files = data.list_videos(cfg.data, split, cfg.fold, cfg.allow_missing)
        return data.ClipDataset(files, cfg.frames, cfg.stride, cfg.img_size, cfg.seed, cfg.sampling, "random",
                                cfg.min_crop, cfg.flip, cfg.repeat, train=split == "train")  # fmt: skip

    def open_images(split):
        files = data.list_images(cfg.images, split, cfg.allow_missing)
        return data.ImageDataset(files, cfg.img_size, cfg.seed, cfg.min_crop_image, cfg.flip_image,
                                 train=split == "train")  # fmt: skip

    mixed = cfg.joint == "mixed"
    if mixed and (cfg.image_share, cfg.video_share) != (1, 1):
        raise InputError("--image-share and --video-share are for --joint interleaved: mixed has --per-clip")
    if not mixed and cfg.per_clip != 1:
        raise InputError("--per-clip is for --joint mixed: interleaved has --image-share and --video-share")
    images, videos = open_images("train"), open_videos("train")
    train = JointDataset(images, videos, mixed, cfg.per_clip, cfg.seed)
    counts, shares = (len(images), len(videos)), (cfg.image_share, cfg.video_share)
    for name, count, needed, share in (("images", counts[0], cfg.batch, shares[0]),
                                       ("videos", counts[1], cfg.batch // cfg.repeat, shares[1])):  # fmt: skip
        if share and count < needed and not mixed:
            raise InputError(f"{count} {name} do not fill one update of {needed}: use a smaller --batch")
    plan = None if mixed else lambda e: joint_plan(e, *counts, cfg.batch, cfg.repeat, shares, cfg.seed)
    samples = {"images": held_out(open_images("val"), draw_mask, cfg.seed, 64),
               "videos": held_out(open_videos("val"), draw_mask, cfg.seed, 16)}  # fmt: skip

    # the weight of images in the loss of an epoch: what is shown beside it must have the same
    pure = [] if mixed else [update[0] < len(images) for update in plan(0)]
    share = 0.5 if mixed else sum(pure) / max(len(pure), 1)

    def validate(model, path):
        """Losses of both, and one picture: images above, clips below."""
        scores, tables = {}, []
        for name, (batch, mask) in samples.items():
            loss, chance, pictures = reconstruct(model, model.normalize(batch.to(device)), mask)
            scores[name], scores[f"chance_{name}"] = loss, chance
            some = torch.linspace(0, len(batch) - 1, min(3, len(batch))).long()
            cells = torch.stack([p[some] for p in pictures.values()], dim=1)  # (3, kinds, frames, 3, H, W)
            frames = torch.linspace(0, cells.shape[2] - 1, min(3, cells.shape[2])).long()
            rows = cells[:, :, frames].permute(0, 2, 1, 3, 4, 5).flatten(0, 1)  # a row per frame, a column per kind
            tables.append((rows, list(pictures)))
        save_picture(picture_table(torch.cat([rows for rows, _ in tables]), tables[0][1],
                                   LEAK_NOTE if model.norm_pix else ""), f"{path}.png")  # fmt: skip
        say("held-out " + ", ".join(f"{n} {scores[n]:.4f} (chance {scores[f'chance_{n}']:.3f})" for n in samples))
        both = lambda prefix: share * scores[f"{prefix}images"] + (1 - share) * scores[f"{prefix}videos"]
        return {"val_loss": both(""), "chance": both("chance_"), **scores}

    pretrain(model, train, draw_mask, validate, cfg, "omni", plan)


if __name__ == "__main__":
    run_script(main)
