"""omni.py - one plain ViT for images and videos: an image is a clip that is one cube long.

Trains one network on a folder of images and a folder of videos, in turn or both in every update.
--picture shows what a trained one makes of one image or clip.

Paper   OmniMAE: Single Model Masked Pretraining on Images and Videos. Girdhar, El-Nouby, Singh,
        Alwala, Joulin, Misra, 2022, arXiv 2206.08356
Covers  abstract, "90 % of image and 95 % of video patches"   --mask-ratio-image, --mask-ratio
        public code, images as clips one cube long            OmniMAE.as_clip
        public code, the decoder                              OmniMAE.forward_decoder
        public code, the target                               OmniMAE.patches, normalize_patches
        public code, every update images or clips             JointDataset, joint_plan
        public code, sample replication                       --repeat, mae_video.ClipDataset
        ours: images and clips in every update                --joint mixed
Not     fine-tuning (finetune.py takes the checkpoint for images and for videos); other masks.
        Of the paper only the abstract, the start of the introduction and the caption of Fig. 1
        were read: what goes beyond them follows the public code, and is named so.

What changes against mae_video.py:
                     VideoMAE                             OmniMAE
    input            clips                                (B, C, H, W) or (B, C, T, H, W)
    positions        one sine over the token number       the same; an image: of the first slot
    mask token       decoder width                        encoder width, before the projection
    decoder's sine   decoder width, after the projection  encoder width, before it, on every token
    decoder order    visible, then hidden                 raster
    target's scale   sqrt(variance) + epsilon             sqrt(variance + epsilon)
Nothing tells the network whether it sees an image or a clip, and every weight serves both.

Run     python omni.py                                   (4 min on 2 CPU cores, with the toy world)
        python omni.py --joint mixed --out runs/mixed
        python omni.py --picture clip.avi                (or cat.jpg, with the run in runs/omni)
        python omni.py --data SSv2 --images IMAGENET --preset paper
        It ends with "done: ... see runs/omni".
Next    multimae.py: several modalities of one image instead of two kinds of input.
"""

import dataclasses
import math
import typing
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
from mae_image import (ENCODERS, MAE, PatchEmbed, begin, check_shape, draw_images, fetch, held_out,
                       init_weights, layer_norm, list_both, load_pretrained, mean_and_std,
                       paint_held_out, pretrain, rename, shapes, show_one, sizes_in, transformer)
from mae_video import (ClipConfig, ClipDataset, VideoMAE, draw_clips, grid_of, normalize_channels,
                       patchify_clips, sinusoid)
from masking import hidden, random_mask, rank_and_world, report, restore, run_script


# ==== THE PAPER, part 1: the model ================================================================
# (needs: math, torch, nn; mae_image.py parts 1-3; mae_video.py parts 1, 2; masking.py part 3)
class OmniMAE(nn.Module):
    """OmniMAE.   loss, pred = model(x, mask)

    x     images (B, C, H, W) or clips (B, C, T, H, W), float, normalised with mean and std
    mask  (B, N) bool, True = hidden: N = h*w for images, t*h*w for clips
    loss  float32 scalar;   pred (B, M, u*p*p*C)

    decoder   (width, blocks, heads); published: base (384, 4, 16), large (512, 4, 16), huge
              (512, 8, 16)
    size, channels, mean, std, errors: as in MAE
    """

    NO_DECAY = ()
    WARMUP_INCLUSIVE = False

    def __init__(self, frames=16, img_size=224, tubelet=2, patch=16, size="base",
                 decoder=(384, 4, 16), norm_pix=True, channels=3, mean=None, std=None):
        super().__init__()
        self.grid = grid_of(frames, img_size, tubelet, patch)
        self.tubelet, self.patch, self.norm_pix = tubelet, patch, norm_pix
        self.mean, self.std = mean_and_std(channels, mean, std)
        D, depth, heads = ENCODERS.get(size, size)
        E = decoder[0]

        self.patch_embed = PatchEmbed((tubelet, patch, patch), channels, D)
        self.blocks = transformer(D, depth, heads)
        self.norm = layer_norm(D)

        self.mask_token = nn.Parameter(torch.zeros(1, D))  # important: encoder width, begun at zero
        self.decoder_embed = nn.Linear(D, E)
        self.decoder_blocks = transformer(*decoder)
        self.decoder_norm = layer_norm(E)
        self.decoder_pred = nn.Linear(E, tubelet * patch * patch * channels)

        # One table serves encoder and decoder: both are encoder width.   (1, N, D)
        self.register_buffer("pos_embed", sinusoid(D, math.prod(self.grid))[None], persistent=False)

        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.trunc_normal_(self.decoder_pred.weight, std=0.02)

    def as_clip(self, x):
        """An image is repeated to the length of a cube: (B, C, H, W) -> (B, C, u, H, W)."""
        return x[:, :, None].expand(-1, -1, self.tubelet, -1, -1) if x.ndim == 4 else x

    def forward_decoder(self, latent, mask):
        """All tokens in raster order.   (B, K, D) -> (B, M, P)"""
        # mask tokens and positions at encoder width: visible tokens get positions twice
        x = restore(latent, mask, self.mask_token) + self.pos_embed[:, : mask.shape[1]]  # (B, N, D)
        x = self.decoder_embed(x)  # (B, N, E)
        x = self.decoder_norm(self.decoder_blocks(x))  # (B, N, E)
        return self.decoder_pred(hidden(x, mask))

    def cubes(self, x):
        """The network's input, cut; an image is one time slot.   -> (B, N, u*p*p*C)"""
        x, (t, h, w) = self.as_clip(x), self.grid
        size = h * self.patch, w * self.patch
        check_shape(x, (self.tubelet, *size), (t * self.tubelet, *size))
        return patchify_clips(x, self.tubelet, self.patch)

    def patches(self, x):
        """Cubes of pixels in [0, 1]; of an image both copies are to be painted.   -> (B, N, P)"""
        return VideoMAE.patches(self, self.as_clip(x))

    def normalize_patches(self, patches):
        """Each channel of a cube by itself; epsilon inside the root."""
        return normalize_channels(patches, len(self.mean), lambda var: (var + 1e-6).sqrt())

    # Visible cubes only, as in VideoMAE; of an image those of the first slot with their positions.
    forward_encoder, forward = VideoMAE.forward_encoder, VideoMAE.forward
    # As in MAE: mean squared error on hidden cubes only; no weight for either kind of input.
    normalize, target, forward_loss = MAE.normalize, MAE.target, MAE.forward_loss
    encode = forward_encoder

    def to_pictures(self, patches):
        """Cubes (B, N, P) -> frames (B, T, C, H, W) in [0, 1]; of an image one of its copies."""
        frames = VideoMAE.to_pictures(self, patches)
        return frames[:, :1] if patches.shape[1] < math.prod(self.grid) else frames


# ==== THE PAPER, part 2: joint training (needs: np, torch; data.py seeded, part 4) ================
class JointDataset(data.FileDataset):
    """Images and videos as one dataset: items 0 .. I-1 are the images, I .. I+V-1 the videos.

    Of FileDataset only the length is used.
    """

    def __init__(self, images, videos):
        self.images, self.videos, self.repeat, self.classes = images, videos, videos.repeat, []
        self.paths = np.concatenate([images.paths, videos.paths])
        self.labels = np.concatenate([images.labels, videos.labels])

    def __getitem__(self, key):
        epoch, i = key
        if i < len(self.images):
            return self.images[epoch, i]
        pixels, number, problems = self.videos[epoch, i - len(self.images)]
        return pixels, number + len(self.images), problems


def joint_plan(epoch, images, videos, batch, repeat, seed, shares):
    """The updates of an epoch, each of images only or of videos only (public code).

    images, videos  how many there are; videos are numbered behind the images
    shares          of the image and of the video updates that an epoch has. The public recipe's are
                    1 and 1/4, since each decoded video is replicated 4 times. It mixes updates, not
                    samples: with the public recipe one update in nine is of videos
    """
    of_images = data.shuffled(seed, epoch, images, batch)
    of_videos = data.shuffled(seed + 1, epoch, videos, batch // repeat)
    updates = []
    for part, first, share in ((of_images, 0, shares[0]), (of_videos, images, shares[1])):
        count = max(round(share * len(part)), 1) if share else 0
        updates += [[first + i for i in update] for update in part[:count]]
    order = torch.randperm(len(updates), generator=data.seeded(seed, 9, epoch)).tolist()
    return [updates[i] for i in order]


def mixed_plan(epoch, images, videos, batch, repeat, seed, pieces):
    """The updates of an epoch, each of as many images as clips: a list of pieces, images first.

    Each piece is of one kind, and the gradients of all are added up: the same loss and the same
    gradients as if both went through the network together.   pieces: an even number
    """
    of_images = data.shuffled(seed, epoch, images, batch // 2)
    of_videos = data.shuffled(seed + 1, epoch, videos, batch // 2 // repeat)
    half, updates = pieces // 2, []
    for some, clips in zip(of_images, of_videos):
        parts = np.split(np.array(some), half) + np.split(images + np.array(clips), half)
        updates.append([part.tolist() for part in parts])
    return updates


# ==== THE RUN =====================================================================================
@dataclasses.dataclass
class Config(ClipConfig):
    SCRIPT, BASELINE = "omni", "mean prediction"

    # data
    data: str = "toy"  # videos: UCF101, HMDB51, folder or list file; the toy world is made
    images: str = "toy"  # images: folder, list file or cifar10
    min_crop: float = 0.5  # smallest share of a frame that a random crop takes; published: 0.08
    min_crop_image: float = 0.2  # smallest share of an image that a random crop takes
    flip: bool = False  # mirror half of the clips; the public code does not
    flip_image: bool = True  # mirror half of the images
    picture: str = ""  # no training: paint the hidden parts of this image or clip, with --init
    joint: typing.Literal["interleaved", "mixed"] = "interleaved"  # an update has one kind, or both
    image_share: float = 0.4  # interleaved: share of the image updates that an epoch has, 0: none
    video_share: float = 1.0  # the same for videos; the public recipe with --repeat 4: 0.25
    # model
    decoder: str = "64x2x4"  # WIDTHxBLOCKSxHEADS; the public code's base has 384x4x16
    mask_ratio: float = 0.75  # share of a clip's cubes that are hidden; paper 0.95, public code 0.9
    mask_ratio_image: float = 0.75  # share of an image's patches; paper 0.9, public recipe 0.75
    norm_pix: bool = False  # predict cubes normalised by their own mean and deviation, as published
    # optimiser
    epochs: int = 50  # passes over images and videos, by their shares
    batch: int = 16  # images or clips per update, over all processes, pieces and repeats
    lr: float = 3e-2  # base rate, for a batch of 256; the public code's is 2e-4, for longer runs
    warmup: float = 2  # epochs of linear warm-up
    # run
    out: str = "runs/omni"  # folder for checkpoint, log and pictures


PRESETS = {
    # The public recipe for ViT-B (64 GPUs); ratios of the abstract, where it has 0.75 and 0.9. Its
    # clips last 2.7 s, whatever the frame rate; stride 4 is 2.1 s at 30 frames a second
    "paper": dict(frames=16, stride=4, sampling="dense", img_size="224", tubelet=2, patch=16,
                  size="base", decoder="384x4x16", mask_ratio=0.95, mask_ratio_image=0.9,
                  norm_pix=True, min_crop=0.08, repeat=4, image_share=1.0, video_share=0.25,
                  batch=2048, lr=2e-4, epochs=800, warmup=40),
}


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they are
def main(argv=None):
    cfg, found, device = begin(Config, PRESETS, __doc__, {"omni": public_omni}, argv)
    size, encoder, decoder = shapes(cfg)
    model = OmniMAE(cfg.frames, size, cfg.tubelet, cfg.patch, encoder, decoder, cfg.norm_pix)
    load_pretrained(model.to(device), found, cfg.resume)

    def draw_mask(batch, rows, generator):
        grid, ratio = model.grid, cfg.mask_ratio
        if batch.ndim == 4:
            grid, ratio = (1, *grid[1:]), cfg.mask_ratio_image
        # "hide": OmniMAE's code counts hidden tokens, MAE's visible ones
        return random_mask(rows, grid, ratio, generator, "hide")

    of_images = dataclasses.replace(cfg, min_crop=cfg.min_crop_image, flip=cfg.flip_image)
    if cfg.picture:
        kind, draw = data.ImageDataset, draw_images
        if Path(cfg.picture).suffix.lower() in data.VIDEO:
            kind, draw = ClipDataset, draw_clips
        file = data.one_file(cfg.picture, data.IMAGE + data.VIDEO)
        return show_one(model, kind(file, cfg, False), draw_mask, draw, cfg)
    fetch(cfg.data, cfg.images)
    report("images, then videos:")
    images, val_images = list_both(cfg, data.list_images, cfg.images)
    videos, val_videos = list_both(cfg, data.list_videos, cfg.data, cfg.fold)
    dataset = JointDataset(data.ImageDataset(images, of_images, True),
                           ClipDataset(videos, cfg, True))
    samples = [held_out(val, draw_mask, cfg.seed) for val in (
        data.ImageDataset(val_images, of_images, False), ClipDataset(val_videos, cfg, False))]
    sizes = len(images.paths), len(videos.paths), cfg.batch, cfg.repeat, cfg.seed
    world, mixed = rank_and_world()[1], cfg.joint == "mixed"
    if mixed and world * cfg.accum % 2:
        cfg.accum *= 2  # at least a piece of images and one of clips

    def plan(epoch):
        if mixed:
            return mixed_plan(epoch, *sizes, world * cfg.accum)
        return joint_plan(epoch, *sizes, (cfg.image_share, cfg.video_share))

    def look(path):
        """Losses and pictures of both."""
        # the share of image updates in an epoch: both losses are averaged with it, as in the log
        share, updates = 0.5, plan(0)
        if updates and not mixed:
            share = sum(update[0] < len(images.paths) for update in updates) / len(updates)
        scores = {"val_loss": 0.0, "baseline": 0.0}
        kinds = zip(("images", "videos"), samples, (draw_images, draw_clips), (share, 1 - share))
        for name, sample, draw, weight in kinds:
            found = paint_held_out(model, sample, draw, path.with_stem(f"{path.stem}_{name}"))
            loss, baseline = found["val_loss"], found["baseline"]
            report(f"held-out {name} {loss:.4f} ({cfg.BASELINE} {baseline:.4f})")
            scores |= {f"{name}_loss": loss, f"{name}_baseline": baseline}
            scores["val_loss"] += weight * loss
            scores["baseline"] += weight * baseline
            if "object" in found:
                scores[f"object in {name}"] = found["object"]
        return scores

    pretrain(model, dataset, draw_mask, look, cfg, plan)


def public_omni(state):
    """facebookresearch/omnivore, of the hub and of the trainer -> settings, our names, guesses.

    Tables of positions are left out; where the decoder has no q, k, v bias, ours is zero.
    """
    if "trunk.patch_embed.proj.1.weight" not in state:
        return None
    head = "decoder_pred." if "trunk.decoder.decoder_embed.weight" in state else "head."
    names = {r"^trunk\.": "", r"proj\.1\.": "proj.", r"^decoder\.decoder_": "decoder_",
             r"^decoder\.norm\.": "decoder_norm.", r"^(heads\.0\.projector|head)\.": head}
    renamed = {k: v for k, v in rename(state, names).items() if not k.endswith("pos_embed")}
    N = state["trunk.pos_embed"].shape[1] if "trunk.pos_embed" in state else 8 * 14 * 14
    slots = 16 // renamed["patch_embed.proj.weight"].shape[2]
    sizes, guesses = sizes_in(renamed, N // slots)  # huge: 16 x 16 patches of 14 pixels
    sizes |= {"frames": 16, "stride": 4, "sampling": "dense"}
    for key in [k for k in renamed if k.endswith("qkv.weight")]:
        renamed.setdefault(key.replace("weight", "bias"), torch.zeros(len(renamed[key])))
    return sizes, renamed, guesses + ["frames"]


if __name__ == "__main__":
    run_script(main)
