"""multimae.py - hide most of an image, its depth map and its class map, and paint all three from what is left.

Paper   MultiMAE: Multi-modal Multi-task Masked Autoencoders. Bachmann, Mizrahi, Atanov, Zamir, 2022, arXiv
        2204.01678. Of the paper itself only the abstract, the start of the introduction and the caption of
        Fig. 1 were read: what goes beyond them follows the public code, and is named so.
Covers  Fig. 1, "1/6 of the patches visible over all modalities"    masking.dirichlet_mask
        public code, input adapters                                 PatchEmbed, ClassEmbed, MultiMAE.forward_encoder
        public code, one encoder and one global token               MultiMAE.forward_encoder
        public code, a cross-attention decoder for each task        Decoder
        public code, masked losses per sample                       MultiMAE.task_losses, masked_mean
        public code, robustly standardised depth                    standardise_depth
        Fig. 1, any input predicts any output                       paint_from; cross_modal: how well from RGB alone
Not     the uncertainty weighting of the losses; DPT and ConvNeXt heads (finetune.py has plain linear ones).

What changes against mae_image.py:
                     MAE                         MultiMAE
    input            RGB                         any of RGB, depth (1 channel), classes (numbers, a quarter the size)
    told apart by    -                           their own patch projection only; task embeddings in decoders alone
    visible          a quarter of each image     a sixth of all tokens; each modality's share is random
    positions        columns, then rows          rows, then columns
    extra token      class token, in front       global token, at the end, without position
    encoder's norm   at the end                  none
    decoder          self-attention on all       queries of one task look at the visible tokens of all modalities
    predicted patch  (row, column, channel)      (channel, row, column)
    loss             mean over hidden patches    mean over hidden patches of each sample, then over samples

Run     python multimae.py                                    (6 min on 2 CPU cores: the toy world's three maps)
        python multimae.py --epochs 80 --alpha 0.3 --visible 0.33     (half an hour: RGB alone gives depth and classes)
        python multimae.py --data FOLDER --modalities rgb,semseg --classes 12    (FOLDER/rgb, FOLDER/semseg)
        python multimae.py --resume                           (goes on where a run was stopped)
        It ends with "done: ... see runs/multimae".
Next    finetune.py: what all this was for.
"""

import math
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import data
from data import BrokenFile, one_line, read_image
from mae_image import (ENCODERS, IMAGENET_MEAN, IMAGENET_STD, MLP, Attention, Block, PatchEmbed, check_divides,
                       check_mask, encoder_size, held_out, init_weights, normalize, patchify, picture_table, pretrain,
                       read_config, save_picture, sincos_2d, start_processes, to_unit_range, unpatchify)  # fmt: skip
from mae_video import resize_table
from masking import InputError, dirichlet_mask, restore, run_script, say, visible

MODALITIES = ("rgb", "depth", "semseg")  # their order is that of the tokens
CHANNELS = {"rgb": 3, "depth": 1}
PLANES = {"rgb": 3, "depth": 2, "semseg": 1}  # bytes of a pixel in a batch: depth has a high and a low one
STRIDE = 4  # class maps have a quarter of the resolution, so their patch has a quarter of the pixels


# ============================================================================================================
#  THE PAPER, part 1: from modalities to tokens                            (needs: torch; mae_image.py part 1)
# ============================================================================================================


def sincos_rows_first(width, h, w):
    """Fixed positions (1, h*w, width), float32: the first half of the channels encodes the row. (MAE: the column.)"""
    cols, rows = sincos_2d(width, h, w).chunk(2, dim=1)  # each (h*w, width / 2)
    return torch.cat([rows, cols], dim=1)[None]


class ClassEmbed(nn.Module):
    """Patches of class numbers -> tokens: each number becomes a learned vector, then as in PatchEmbed."""

    def __init__(self, classes, kernel, width, D):
        super().__init__()
        self.class_emb = nn.Embedding(classes, width)
        self.proj = nn.Conv2d(width, D, kernel, stride=kernel)

    def forward(self, patches):
        x = self.class_emb(patches).flatten(2)  # (B, N, p*p*width), values (row, col, channel)
        return F.linear(x, self.proj.weight.movedim(1, -1).flatten(1), self.proj.bias)


def standardise_depth(depth):
    """Each depth map by mean and deviation of its middle 80 % of values: the public code.   (B, 1, H, W) -> the same

    The nearest and farthest tenth, often errors of a sensor, have no say; unbiased variance, epsilon inside the root.
    The result is input and target."""
    values = depth.flatten(1).sort(dim=1).values  # (B, H*W)
    n = values.shape[1]
    middle = values[:, int(0.1 * n) : int(0.9 * n)]
    mean, var = middle.mean(dim=1), middle.var(dim=1)
    return (depth - mean[:, None, None, None]) / (var + 1e-6).sqrt()[:, None, None, None]


def channels_first(patches, channels):
    """Values of each patch from (row, col, channel) to (channel, row, col), the order of this paper's decoders."""
    B, N, P = patches.shape
    return patches.reshape(B, N, P // channels, channels).transpose(2, 3).flatten(2)


# ============================================================================================================
#  THE PAPER, part 2: one decoder per task  (needs: torch; mae_image.py part 2; masking.py InputError, part 3)
# ============================================================================================================


class CrossAttention(nn.Module):
    """Queries look at another set of tokens.   x (B, N, E), context (B, K, E) -> (B, N, E)"""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)  # rows [k; v]
        self.proj = nn.Linear(width, width)

    def forward(self, x, context):
        B, N, E = x.shape
        q = self.q(x).reshape(B, N, self.heads, -1).transpose(1, 2)  # (B, heads, N, E / heads)
        k, v = self.kv(context).reshape(B, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, E))


class Decoder(nn.Module):
    """From the encoder's tokens to the patches of one task.

    The scattered visible tokens of all modalities can be attended to, whatever their number; the queries are the
    full grid of this task alone, so a decoder costs as much as that of one image.
    """

    def __init__(self, task, modalities, width, depth, heads, D, values):
        super().__init__()
        if width % heads:
            raise InputError(f"decoder width {width} is not a multiple of {heads} heads: each head needs an equal "
                             "slice")  # fmt: skip
        self.task = task  # the modality whose grid is painted
        self.proj_context = nn.Linear(D, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        embedding = lambda: nn.init.trunc_normal_(nn.Parameter(torch.zeros(1, 1, width)), std=0.02)
        self.task_embeddings = nn.ParameterDict({m: embedding() for m in modalities})
        self.query_norm, self.context_norm, self.out_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.decoder = CrossAttention(width, heads)
        self.mlp = MLP(width)
        self.decoder_transformer = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.out_proj = nn.Linear(width, values)

    def forward(self, latent, mask, given, table):
        """latent (B, K+1, D), mask (B, sum of N), given [modality, ...] in token order, table (1, N, E) -> (B, N, P)"""
        B, N = len(latent), table.shape[1]
        x = self.proj_context(latent)  # (B, K+1, E)
        vis, glob = x[:, :-1], x[:, -1:]
        # every slot of every given modality gets its position and the embedding of its modality; the global token none
        places = torch.cat([table + self.task_embeddings[m] for m in given], dim=1)  # (1, sum of N, E)
        slots = restore(vis, mask, self.mask_token) + places  # (B, sum of N, E)
        context = torch.cat([visible(slots, mask), glob.to(slots.dtype)], dim=1)  # (B, K+1, E)
        if self.task in given:  # visible tokens of this task are among the queries, with their content
            start = given.index(self.task) * N
            queries = slots[:, start : start + N]
        else:
            queries = (self.mask_token + table + self.task_embeddings[self.task]).expand(B, -1, -1)
        # important: no residual around the cross-attention
        x = self.decoder(self.query_norm(queries), self.context_norm(context))  # (B, N, E)
        x = x + self.mlp(self.out_norm(x))
        for block in self.decoder_transformer:
            x = block(x)
        return self.out_proj(x)


# ============================================================================================================
#  THE PAPER, part 3: the model
#  (needs: torch, MODALITIES, CHANNELS, PLANES, STRIDE, parts 1, 2; mae_image.py ENCODERS, IMAGENET_*,
#   parts 1-3; mae_video.py resize_table; masking.py InputError, part 3)
# ============================================================================================================


class MultiMAE(nn.Module):
    """MultiMAE.   loss, preds = model(inputs, mask)

    inputs  dict with any of   rgb (B, 3, H, W) float, normalised with MEAN and STD
                               depth (B, 1, H, W) float, standardised
                               semseg (B, H/4, W/4) int64, class numbers
    mask    (B, sum of N) bool over the tokens of the given modalities in the order of MODALITIES, True = hidden; the
            number of visible tokens is the same in every row, its share of a modality is not
    loss    float32 scalar, the sum over tasks;   preds {task: (B, N, P)}, values (channel, row, col)

    modalities  inputs that the model knows. It paints the same, and with rgb also norm_rgb, patches normalised as MAE's
    size        name in ENCODERS, or (width, blocks, heads)
    decoder     (width, blocks, heads); published (256, 2, 8)
    ignore      class number that has no part in the loss (void), -1: none
    """

    MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
    NO_DECAY = None  # important: here even biases, norms and tokens decay (public code)
    WARMUP_INCLUSIVE = False

    def __init__(self, img_size=224, patch=16, size="base", decoder=(256, 2, 8), modalities=MODALITIES, classes=133,
                 class_width=64, ignore=-1):  # fmt: skip
        super().__init__()
        check_divides(img_size, patch, "image side", "patch", "--img-size")
        if "semseg" in modalities:
            check_divides(patch, STRIDE, "patch", "the stride of class maps", "--patch")
        D, depth, heads = ENCODERS[size] if isinstance(size, str) else size
        E = decoder[0]
        self.grid = (1, img_size // patch, img_size // patch)
        self.patch, self.classes, self.ignore = patch, classes, ignore
        self.modalities = [m for m in MODALITIES if m in modalities]
        self.tasks = self.modalities + ["norm_rgb"] * ("rgb" in modalities)

        embed = lambda m: (ClassEmbed(classes, patch // STRIDE, class_width, D) if m == "semseg" else
                           PatchEmbed((patch, patch), CHANNELS[m], D))  # fmt: skip
        self.input_adapters = nn.ModuleDict({m: embed(m) for m in self.modalities})
        self.global_tokens = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.ModuleList([Block(D, heads) for _ in range(depth)])

        values = lambda m: classes * (patch // STRIDE) ** 2 if m == "semseg" else CHANNELS[m] * patch**2
        decode = lambda m: Decoder(m, self.modalities, *decoder, D, values(m))
        self.output_adapters = nn.ModuleDict({t: decode(t.removeprefix("norm_")) for t in self.tasks})
        # Fixed tables, resized where the input has another size.   (1, N, D), (1, N, E)
        self.register_buffer("pos_embed", sincos_rows_first(D, *self.grid[1:]), persistent=False)
        self.register_buffer("decoder_pos_embed", sincos_rows_first(E, *self.grid[1:]), persistent=False)

        self.apply(init_weights)
        for module in self.modules():  # q, k and v have the bound of separate matrices
            if isinstance(module, (Attention, CrossAttention)):
                fused, parts = (module.qkv, 3) if isinstance(module, Attention) else (module.kv, 2)
                for part in fused.weight.data.chunk(parts):
                    nn.init.xavier_uniform_(part)
            if isinstance(module, (PatchEmbed, ClassEmbed)):
                nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
            if isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.normal_(self.global_tokens, std=0.02)

    def normalize(self, batch):
        """Batch from the loader, uint8 (B, H, W, planes), see AlignedDataset -> the dict of inputs."""
        inputs = {}
        for m, x in zip(self.modalities, batch.split([PLANES[m] for m in self.modalities], dim=-1)):
            if m == "rgb":
                inputs[m] = normalize(x, self.MEAN, self.STD)
            elif m == "depth":
                inputs[m] = standardise_depth((x[..., 0].float() * 256 + x[..., 1].float())[:, None] / 65536)
            else:  # one pixel of every 4 x 4
                inputs[m] = x[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE, 0].long()
        return inputs

    def patches(self, m, x):
        """One modality -> its patches (B, N, P), values (row, col, channel); of classes numbers (B, N, p*p)."""
        return patchify(x[:, None], self.patch // STRIDE) if m == "semseg" else patchify(x, self.patch)

    def resize(self, table, inputs, mode):
        """Positions for the size of these inputs: bicubic for RGB and depth, else bilinear (public code)."""
        m, x = next(iter(inputs.items()))
        scale = self.patch // STRIDE if m == "semseg" else self.patch
        return resize_table(table, self.grid, (1, x.shape[-2] // scale, x.shape[-1] // scale), mode)

    def given(self, inputs):
        """The modalities among the inputs, in token order.   Raises InputError for an unknown one or none."""
        unknown = set(inputs) - set(self.modalities)
        if unknown or not inputs:
            raise InputError(f"unknown modality {sorted(unknown)[0]}: this model knows {', '.join(self.modalities)}"
                             if unknown else "no modality given")  # fmt: skip
        return [m for m in self.modalities if m in inputs]

    def forward(self, inputs, mask):
        latent = self.forward_encoder(inputs, mask)  # (B, K+1, D)
        preds = self.forward_decoder(latent, inputs, mask)
        return sum(self.task_losses(preds, inputs, inputs, mask).values()), preds

    def forward_encoder(self, inputs, mask):
        """Visible tokens of all given modalities and the global token.   -> (B, K+1, D), global token last

        Patches are embedded before the hidden ones are dropped: how many of a modality stay differs from row to
        row, so only the tokens, all of one width, can be gathered. No final LayerNorm.
        """
        tokens = []
        for m in self.given(inputs):
            patches = self.patches(m, inputs[m])  # (B, N, P)
            table = self.resize(self.pos_embed, inputs, "bilinear" if m == "semseg" else "bicubic")
            if table.shape[1] != patches.shape[1]:
                raise InputError(f"{m} has {patches.shape[1]} patches, another modality {table.shape[1]}: sizes must "
                                 "agree")  # fmt: skip
            tokens.append(self.input_adapters[m](patches) + table)  # (B, N, D)
        x = torch.cat(tokens, dim=1)  # (B, sum of N, D)
        if mask.shape[1] != x.shape[1]:
            raise InputError(f"{x.shape[1]} tokens of {', '.join(self.given(inputs))}, but a mask of {mask.shape[1]}")
        x = visible(x, mask)  # (B, K, D)
        x = torch.cat([x, self.global_tokens.expand(len(x), -1, -1).to(x.dtype)], dim=1)  # (B, K+1, D)
        for block in self.blocks:
            x = block(x)
        return x

    def forward_decoder(self, latent, inputs, mask):
        """Every task from the same latent.   -> {task: (B, N, P)}

        DIFFERS from the official code: there the decoder of the classes runs in float32, here as the others."""
        table = self.resize(self.decoder_pos_embed, inputs, "bilinear")
        return {t: d(latent, mask, self.given(inputs), table) for t, d in self.output_adapters.items()}

    def target(self, task, x):
        """What a task is compared with: (B, N, P) in the order of its prediction, classes (B, N, p*p)."""
        patches = self.patches(task.removeprefix("norm_"), x)
        if task == "norm_rgb":  # as MAE: each patch by its own mean and variance over all channels
            mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
            patches = (patches - mean) / (var + 1e-6).sqrt()
        return patches if task == "semseg" else channels_first(patches, CHANNELS[task.removeprefix("norm_")])

    def task_losses(self, preds, targets, inputs, mask):
        """{task: loss}: squared error of RGB, absolute error of depth, cross-entropy of classes.

        targets: dict as inputs, may have more modalities. Loss on hidden patches only; a task that was not an input
        has no mask, and its whole map counts."""
        hide, losses = dict(zip(self.given(inputs), mask.chunk(len(inputs), dim=1))), {}
        for task, pred in preds.items():
            m, pred = task.removeprefix("norm_"), pred.float()
            if m not in targets:
                continue
            with torch.no_grad():
                target = self.target(task, targets[m])
            B, N, _ = target.shape
            count = hide[m].to(pred.device) if m in hide else torch.ones(B, N, dtype=torch.bool, device=pred.device)
            count = count[..., None].expand_as(target)
            if task == "semseg":
                logits = pred.reshape(B, N, self.classes, -1).transpose(1, 2)  # (B, classes, N, p*p)
                error = F.cross_entropy(logits, target, reduction="none", ignore_index=self.ignore)  # (B, N, p*p)
                count = count & (target != self.ignore)
            else:
                error = (pred - target).abs() if task == "depth" else (pred - target) ** 2
            losses[task] = masked_mean(error, count)
        return losses

    def encode(self, inputs):
        """Every token of what is given, no mask; a tensor is taken as RGB.   -> (B, sum of N + 1, D)"""
        inputs = {"rgb": inputs} if torch.is_tensor(inputs) else inputs
        N = sum(self.patches(m, x).shape[1] for m, x in inputs.items())
        return self.forward_encoder(inputs, torch.zeros(len(next(iter(inputs.values()))), N, dtype=torch.bool))

    def from_public(self, state):
        """Names of EPFL-VILAB/MultiMAE -> ours: the MultiViT layout, or timm's (RGB only, token and table in front)."""
        renamed = {}
        for key, value in state.items():
            if key.startswith("encoder."):
                key = "blocks." + key.removeprefix("encoder.")
            key = key.replace("patch_embed.proj", "input_adapters.rgb.proj").replace("cls_token", "global_tokens")
            if not key.endswith(("pos_emb", "pos_embed")):  # fixed tables are computed here
                renamed[key] = value
        return renamed


def masked_mean(error, count):
    """Mean over what counts in each sample, then over samples.   error (B, ...), count (B, ...) bool -> scalar

    important: a sample in which nothing counts has the mean 0 and is not among those that are averaged. The public code
    divides 0 by 0 and drops the NaN afterwards, but its gradient has spread by then. Samples of one forward pass are
    averaged: where some are left out, --accum changes the result a little.
    """
    n = count.flatten(1).sum(dim=1)  # (B,)
    means = (error * count).flatten(1).sum(dim=1) / n.clamp(min=1)
    return means.sum() / (n > 0).sum().clamp(min=1)


# ============================================================================================================
#  THE PAPER, part 4: aligned files
#  (needs: numpy, torch, torchvision, pillow; data.py IMAGE, parts 1, 3-5; masking.py InputError)
# ============================================================================================================


def list_aligned(root, split, modalities):
    """The files of the first modality of one split, see data.list_images; the others are found by their names."""
    first = Path(root) / modalities[0]
    if not first.is_dir():
        raise InputError(f"{root} has no folder {modalities[0]}/: expected {', '.join(f'{m}/' for m in modalities)}")
    return data.list_images(first, split)


class AlignedDataset(torch.utils.data.Dataset):
    """dataset[epoch, i] -> uint8 (1, H, W, planes), number of the file used, [(path, reason) of broken files].

    planes  those of the modalities in order: RGB 3, depth 2 (16 bits: high byte, low byte), classes 1
    root    folder of rgb/, depth/, semseg/ with the same file names below, in any image format: depth 8 or 16 bits,
            class maps 8 bits or palette. One crop and one flip for all; classes by nearest neighbour, for there is
            nothing between class 3 and class 5
    raises  InputError for a missing or differently sized map, and for class numbers of `classes` or more
    """

    repeat = 1

    def __init__(self, root, files, modalities, size, classes, seed, min_crop=0.2, flip=True, train=True):
        self.paths, self.labels, self.classes = files.paths, files.labels, files.classes
        self.root, self.modalities, self.size, self.number, self.seed = Path(root), modalities, size, classes, seed
        self.min_crop, self.flip, self.train = min_crop, flip, train

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        return data.read_or_redraw(self, *key)

    def find(self, i, m):
        """The file of modality m that belongs to file i."""
        first = self.root / self.modalities[0]
        inside = Path(self.paths[i]).relative_to(first)
        path = self.root / m / inside
        if not path.is_file():
            suffixes = [*data.IMAGE, *(s.upper() for s in data.IMAGE)]
            path = next((p for s in suffixes if (p := path.with_suffix(s)).is_file()), None)
        if path is None:
            raise InputError(f"{self.paths[i]} has no counterpart in {self.root / m}: every modality needs the same "
                             "names")  # fmt: skip
        return path

    def read(self, i, generator):
        maps = {m: read_map(self.find(i, m), m) for m in self.modalities}
        sizes = {m: x.shape[-2:] for m, x in maps.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"{self.paths[i]}: modalities of different sizes: "
                             + ", ".join(f"{m} {w}x{h}" for m, (h, w) in sizes.items()))  # fmt: skip
        if "rgb" in maps and len(maps) > 1:
            with Image.open(self.find(i, "rgb")) as image:
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    raise InputError(f"{self.find(i, 'rgb')} is turned by EXIF, its maps perhaps not: save it upright")
        if "semseg" in maps and maps["semseg"].max() >= self.number:
            raise InputError(f"{self.find(i, 'semseg')} has class {int(maps['semseg'].max())}, the model 0 to "
                             f"{self.number - 1}: --classes, in finetune.py --maps, says how many")  # fmt: skip
        x = next(iter(maps.values()))
        box = data.random_box(x, (self.min_crop, 1.0), generator) if self.train else data.center_box(x)
        flip = self.train and self.flip and torch.rand(1, generator=generator) < 0.5
        planes = []
        for m, x in maps.items():
            how = {"rgb": InterpolationMode.BICUBIC, "depth": InterpolationMode.BILINEAR,
                   "semseg": InterpolationMode.NEAREST}[m]  # fmt: skip
            x = TF.resized_crop(x, *box, [self.size, self.size], interpolation=how, antialias=m != "semseg")
            x = TF.horizontal_flip(x) if flip else x
            if m == "depth":
                x = x.round().clamp(0, 65535).int()
                x = torch.cat([x // 256, x % 256])
            planes.append(x.to(torch.uint8))
        return torch.cat(planes).permute(1, 2, 0)[None].contiguous()  # (1, size, size, planes)


def read_map(path, m):
    """-> (3, H, W) uint8 RGB, (1, H, W) float32 depth in 0 .. 65535, or (1, H, W) uint8 classes.   Raises BrokenFile"""
    if m == "rgb":
        return torch.from_numpy(read_image(path)).permute(2, 0, 1)
    try:
        with Image.open(path) as image:
            x = np.array(image)  # a palette image gives its numbers
    except Exception as error:
        raise BrokenFile(one_line(error)) from None
    if x.ndim != 2 or x.dtype.kind not in "iu" or (m == "semseg" and x.dtype != np.uint8):
        raise InputError(f"{path}: {x.ndim}-D {x.dtype} is no {m} map: one channel of whole numbers is needed, "
                         + ("8 bits" if m == "semseg" else "8 or 16 bits"))  # fmt: skip
    if m == "depth" and not 0 <= x.min() <= x.max() < 65536:
        raise InputError(f"{path}: depth {x.min()} to {x.max()}, 16 bits hold 0 to 65535: scale the map")
    x = x.astype(np.float32) * (257 if x.dtype == np.uint8 else 1) if m == "depth" else x
    return torch.from_numpy(x)[None]


# ============================================================================================================
#  THE RUN
# ============================================================================================================


@dataclass
class Config:
    # data
    data: str = "toy"  # folder with rgb/, depth/, semseg/; "toy" is written first if it is not there
    modalities: str = "rgb,depth,semseg"  # what goes in and is painted, any of these
    classes: int = 6  # number of semantic classes; the toy world has 6
    ignore: int = -1  # class that has no part in the loss (void), -1: none
    img_size: int = 64  # side of the square that the model sees, in pixels
    min_crop: float = 0.2  # smallest share of the image area that a random crop takes; 1: nearly all of it
    flip: bool = True  # mirror half of the images
    workers: int = 2  # processes that load data
    # model
    size: str = "nano"  # encoder: nano, tiny, small, base, large, huge, or WIDTHxBLOCKSxHEADS
    patch: int = 8  # side of a patch in pixels
    class_width: int = 16  # width of a class's learned vector; the public code has 64
    decoder_width: int = 64  # of each decoder; the public code has 256
    decoder_depth: int = 1  # blocks after the cross-attention; the public code has 2
    decoder_heads: int = 4  # the public code has 8
    visible: float = 1 / 6  # share of all tokens, over all modalities, that stays visible
    alpha: float = 1.0  # of the Dirichlet shares: 1 every split equally likely, small: one modality takes all
    # optimiser
    epochs: int = 30  # passes over the data
    batch: int = 32  # images per update, over all processes and accumulation steps
    accum: int = 1  # forward-backward passes per update: raise it when memory runs out
    lr: float = 1.6e-2  # base rate, for a batch of 256; the public code's is 1e-4, for much longer runs
    min_lr: float = 0.0  # base rate at the end of the cosine
    warmup: float = 2  # epochs of linear warm-up
    weight_decay: float = 0.05  # of all tensors
    clip: float = 0.0  # largest norm of the gradient, 0: no clipping
    # run
    out: str = "runs/multimae"  # folder for checkpoint, log and pictures
    resume: bool = False  # go on with the run in --out
    init: str = ""  # start from the weights in this file: ours, or a public MultiMAE one
    seed: int = 0  # of weights, masks, order, crops
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format of the matrix products
    compile: bool = False  # torch.compile: slow start, faster steps
    log_every: int = 10  # updates between two lines of the log
    pictures: int = 3  # how often pictures are drawn, evenly over the run, the last at its end; and once before
    smoke: bool = False  # three updates only, to see that everything runs; its folder may be written again


LIMITS = [("classes", 2, 256), ("ignore", -1, 255), ("class_width", 1, 10**6), ("visible", 1e-6, 0.999)]
LIMITS += [("alpha", 1e-3, 1e6), ("decoder_depth", 0, 10**9)]  # 0: the cross-attention alone
PRESETS = {
    # The public recipe: ViT-B on ImageNet with pseudo-labels, 8 GPUs
    "paper": dict(classes=133, img_size=224, patch=16, size="base", class_width=64, decoder_width=256, decoder_depth=2,
                  decoder_heads=8, epochs=1600, batch=2048, lr=1e-4, warmup=40, workers=16, out="runs/multimae_paper"),
    "gpu": dict(img_size=64, patch=8, size="tiny", decoder_width=192, decoder_depth=2, decoder_heads=3, epochs=400,
                batch=256, lr=1e-3, warmup=20, workers=8, out="runs/multimae_gpu"),
}  # fmt: skip


def parse_modalities(text, flag="--modalities"):
    names = [m.strip() for m in text.split(",") if m.strip()]
    for m in names:
        if m not in MODALITIES:
            raise InputError(f"{flag} {text}: unknown modality {m}, use any of {','.join(MODALITIES)}")
    if not names:
        raise InputError(f"{flag} is empty: use any of {','.join(MODALITIES)}")
    return [m for m in MODALITIES if m in names]


def constant_maps(model, reference):
    """What a predictor that looks at nothing would paint: {task: (1, N, P)} in the form of the predictions.

    Learnt from `reference`, training samples: the mean colour, 0 for norm_rgb, at each pixel the median depth, and at
    each pixel how often each class is there (as log-probabilities: the best that a constant can do in cross-entropy;
    void has no share).
    """
    maps = {}
    for task in model.tasks:
        target = model.target(task, reference[task.removeprefix("norm_")])  # (B, N, P)
        if task == "semseg":
            share = F.one_hot(target, model.classes).float().mean(dim=0) + 1e-3  # (N, p*p, classes)
            if model.ignore >= 0:
                share[..., model.ignore] = 1e-3
            maps[task] = share.log().transpose(1, 2).flatten(1)[None]  # softmax makes them sum to 1
        elif task == "depth":
            maps[task] = target.median(dim=0).values[None]
        else:
            colour = target.unflatten(2, (3, -1)).mean(dim=(0, 1, 3)) * (task == "rgb")
            maps[task] = colour.repeat_interleave(target.shape[2] // 3).expand(1, *target.shape[1:])
    return maps


def paint_from(model, source, x):
    """All tasks from one modality alone, every patch of it visible.   x its input -> preds"""
    mask = torch.zeros(len(x), math.prod(model.grid), dtype=torch.bool)
    return model.forward_decoder(model.forward_encoder({source: x}, mask), {source: x}, mask)


@torch.no_grad()
def cross_modal(model, inputs, source, constant):
    """How well all other modalities are painted from one alone.   -> {name: numbers}

    For depth the mean absolute error (standardised), for classes the share of right ones among the pixels where the
    constant map is wrong: in the toy world those of objects. (Most pixels are floor and wall, which a constant gets
    right.) Each for the model, the constant map, and the model given another sample's input: that gap is what was
    really read from it. The other one is half the set away: files come class by class, and a neighbour would show the
    same kind of object.
    """
    other = inputs[source].roll(len(inputs[source]) // 2, 0)
    preds, shuffled = (paint_from(model, source, x) for x in (inputs[source], other))
    numbers = {}
    if "depth" in inputs and source != "depth":
        target = model.target("depth", inputs["depth"])
        error = lambda x: (x["depth"] - target).abs().mean().item()
        numbers["depth error"] = (error(preds), error(constant), error(shuffled))
    if "semseg" in inputs and source != "semseg":
        target = model.target("semseg", inputs["semseg"])
        classes = lambda x: x["semseg"].unflatten(2, (model.classes, -1)).argmax(dim=2)
        count = (target != classes(constant)) & (target != model.ignore)
        recall = lambda x: (classes(x) == target)[count].float().mean().item()
        numbers["object recall"] = (recall(preds), 0.0, recall(shuffled))
    return numbers


PALETTE = torch.tensor([[90, 130, 90], [120, 140, 190], [220, 70, 60], [240, 180, 50], [150, 80, 190], [60, 190, 200]])
HOLE = torch.tensor([1.0, 0.8, 0.85])[:, None, None]  # a hidden patch in a picture: no grey, depth has them all


def to_pictures(model, task, values):
    """Patches of a task in its own units -> pictures (B, 3, H, W) in [0, 1]."""
    t, h, w = model.grid
    if task == "semseg":  # numbers (B, N, p*p)
        ids = unpatchify(values, model.patch // STRIDE, h, w)[:, 0]
        x = PALETTE[ids.cpu() % len(PALETTE)].movedim(-1, 1) / 255
        return x.repeat_interleave(STRIDE, 2).repeat_interleave(STRIDE, 3)
    C = CHANNELS[task]
    x = unpatchify(values.unflatten(2, (C, -1)).transpose(2, 3).flatten(2).cpu(), model.patch, h, w)
    if task == "depth":  # near is bright
        return (0.5 - x / 6).clamp(0, 1).expand(-1, 3, -1, -1)
    return to_unit_range(x, model.MEAN, model.STD).clamp(0, 1)


def draw(model, inputs, mask, preds, path):
    """One PNG: a row per sample; per modality original, what is visible, painted; then each from one other alone."""
    columns, titles = [], []
    values = lambda m, pred: pred.unflatten(2, (model.classes, -1)).argmax(dim=2) if m == "semseg" else pred.float()
    for m, hide in zip(model.modalities, mask.chunk(len(model.modalities), dim=1)):
        target = model.target(m, inputs[m])
        original, painted = to_pictures(model, m, target), to_pictures(model, m, values(m, preds[m]))
        t, h, w = model.grid
        hole = hide.reshape(-1, 1, h, w).repeat_interleave(model.patch, 2).repeat_interleave(model.patch, 3)
        columns += [original, torch.where(hole, HOLE, original), torch.where(hole, painted, original)]
        titles += [m, "visible", "painted"]
    pairs = [("rgb", "depth"), ("rgb", "semseg"), ("depth", "rgb"), ("semseg", "rgb")]
    pairs = [pair for pair in pairs if all(m in inputs for m in pair)][:3]  # as many as fit beside the others
    for source, goal in pairs:
        columns.append(to_pictures(model, goal, values(goal, paint_from(model, source, inputs[source])[goal])))
        titles.append(f"{source}>{goal}")
    some = torch.linspace(0, len(mask) - 1, min(4, len(mask))).long()  # over all classes
    cells = torch.stack([c[some] for c in columns], dim=1)  # (4, columns, 3, H, W)
    note = "the last columns are painted from one whole other modality alone" if pairs else ""
    save_picture(picture_table(cells, titles, note), path)


def main():
    cfg = read_config(Config, PRESETS, __doc__, "multimae", limits=LIMITS)
    rank, world, device = start_processes(cfg)
    modalities = parse_modalities(cfg.modalities)
    if cfg.ignore >= cfg.classes:
        raise InputError(f"--ignore {cfg.ignore}: --classes {cfg.classes} allows 0 to {cfg.classes - 1}, -1 is none")
    data.fetch(cfg.data, rank, world)
    torch.manual_seed(cfg.seed)
    decoder = (cfg.decoder_width, cfg.decoder_depth, cfg.decoder_heads)
    model = MultiMAE(cfg.img_size, cfg.patch, encoder_size(cfg.size), decoder, modalities, cfg.classes, cfg.class_width,
                     cfg.ignore)  # fmt: skip
    sizes = [math.prod(model.grid)] * len(modalities)
    count = max(1, round(cfg.visible * sum(sizes)))
    draw_mask = lambda batch, rows, generator: dirichlet_mask(rows, sizes, count, generator, cfg.alpha)
    check_mask(draw_mask(None, 1, torch.Generator()), hint="lower --visible")
    files = {split: list_aligned(cfg.data, split, modalities) for split in ("train", "val")}
    options = (modalities, cfg.img_size, cfg.classes, cfg.seed, cfg.min_crop, cfg.flip)
    open_files = lambda split, train: AlignedDataset(cfg.data, files[split], *options, train)
    train = open_files("train", True)
    batch, mask = held_out(open_files("val", False), draw_mask, cfg.seed, 64)
    reference, _ = held_out(open_files("train", False), draw_mask, cfg.seed, 128, "training")

    @torch.no_grad()
    def validate(model, path):
        """Loss of every task beside that of a constant map, and what one modality alone tells of the others."""
        inputs = model.normalize(batch.to(device))
        preds = model.forward_decoder(model.forward_encoder(inputs, mask), inputs, mask)
        constant = constant_maps(model, model.normalize(reference.to(device)))
        everywhere = {t: x.expand(len(batch), -1, -1) for t, x in constant.items()}
        losses, chance = (model.task_losses(x, inputs, inputs, mask) for x in (preds, everywhere))
        say("held-out " + ", ".join(f"{t} {x:.3f} (constant {chance[t]:.3f})" for t, x in losses.items()))
        record = {f"{t}_{k}": float(v[t]) for t in losses for k, v in (("loss", losses), ("constant", chance))}
        if len(modalities) > 1:
            for name, numbers in cross_modal(model, inputs, modalities[0], constant).items():
                say(f"  {modalities[0]} alone: {name} {numbers[0]:.3f} (constant map {numbers[1]:.3f}, another's "
                    f"{modalities[0]} {numbers[2]:.3f})")  # fmt: skip
                record |= {f"{name} {k}": v for k, v in zip(("alone", "constant", "shuffled"), numbers)}
        draw(model, inputs, mask, preds, f"{path}.png")
        return {"val_loss": sum(losses.values()).item(), "chance": sum(chance.values()).item(), **record}

    pretrain(model, train, draw_mask, validate, cfg, "multimae")


if __name__ == "__main__":
    run_script(main)
