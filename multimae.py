"""multimae.py - hide most of an image, its depth map and its class map; paint all three.

Trains on a folder with rgb/, depth/ and semseg/, or some of them; prints and draws how well one
whole map predicts the others.

Paper   MultiMAE: Multi-modal Multi-task Masked Autoencoders. Bachmann, Mizrahi, Atanov, Zamir,
        2022, arXiv 2204.01678
Covers  Fig. 1, "1/6 of the patches visible over all modalities"   masking.dirichlet_mask
        public code, input adapters                                PatchEmbed, ClassEmbed
        public code, one encoder and one global token              MultiMAE.forward_encoder
        public code, a cross-attention decoder for each task       Decoder
        public code, masked losses per sample                      MultiMAE.task_losses, masked_mean
        public code, robustly standardized depth                   standardize_depth
        Fig. 1, any input predicts any output                      paint_from, cross_modal
        dense transfers                                            DenseHead; finetune.py --dense
Not     the uncertainty weighting of the losses; DPT and ConvNeXt heads (DenseHead is linear).
        Of the paper only the abstract, the start of the introduction and the caption of Fig. 1
        were read: what goes beyond them follows the public code, and is named so.

What changes against mae_image.py:
                     MAE                       MultiMAE
    input            RGB                       any of RGB, depth, classes (a quarter of H and W)
    modality known   -                         by patch projection; in decoders by task embeddings
    visible          a quarter of each image   a sixth of all tokens, by chance from each modality
    positions        columns, then rows        rows, then columns
    extra token      class token, in front     global token, at the end, without position
    encoder's norm   at the end                none
    decoder          self-attention on all     queries of a task look at visible tokens of all maps
    predicted patch  (row, column, channel)    (channel, row, column)
    loss             mean over hidden patches  the same in each sample, then over samples

Run     python multimae.py                       (5 min on 2 CPU cores)
        python multimae.py --data FOLDER --modalities rgb,semseg --classes 12
        It ends with "done: ... see runs/multimae".
Next    finetune.py: what all this was for.
"""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode

import data
from mae_image import (ENCODERS, MAE, MLP, PatchEmbed, RunConfig, begin, blocks_in, evenly, fetch,
                       held_out, init_weights, layer_norm, list_both, load_pretrained, mean_and_std,
                       parts_of, patchify, pretrain, rename, rows_and_columns, save_picture, shapes,
                       sincos_2d, sizes_in, to_unit_range, transformer)
from mae_video import resize_table
from masking import (HOLE, as_pixels, dirichlet_mask, picture_table, report, restore, run_script,
                     visible)

MODALITIES = ("rgb", "depth", "semseg")  # their order is that of the tokens
PLANES = {"rgb": 3, "depth": 2, "semseg": 1}  # bytes of a pixel in a batch; depth: high and low
STRIDE = 4  # class maps have a quarter of the height and width, and so have their patches


# ==== THE PAPER, part 1: from modalities to tokens (needs: nn; mae_image.py part 1) ===============
def sincos_rows_first(width, h, w):
    """Fixed positions (1, h*w, width): the first half of the channels is the row (MAE: column)."""
    return sincos_2d(width, h, w).roll(width // 2, dims=1)[None]


class ClassEmbed(nn.Module):
    """Patches of class numbers -> tokens: each number becomes a vector, then as in PatchEmbed.

    Numbers beyond the classes (a void of 255) become zeros.
    """

    def __init__(self, classes, kernel, width, D):
        super().__init__()
        self.class_emb = nn.Embedding(classes, width)
        self.proj = nn.Conv2d(width, D, kernel, stride=kernel)

    def forward(self, patches):
        known = patches < self.class_emb.num_embeddings
        x = self.class_emb(patches * known) * known[..., None]
        return PatchEmbed.forward(self, x.flatten(2))  # values of a patch: (row, col, channel)


def standardize_depth(depth):
    """Each depth map by mean and deviation of its middle 80 % of values: public code. (B, 1, H, W)

    The nearest and farthest tenth, often errors of a sensor, have no say; unbiased variance,
    epsilon inside the root. The result is input and target.
    """
    values = depth.flatten(1).sort(dim=1).values  # (B, H*W)
    n = values.shape[1]
    middle = values[:, int(0.1 * n) : int(0.9 * n)]
    mean, std = middle.mean(dim=1, keepdim=True), (middle.var(dim=1, keepdim=True) + 1e-6).sqrt()
    return ((depth.flatten(1) - mean) / std).reshape(depth.shape)


# ==== THE PAPER, part 2: one decoder per task =====================================================
# (needs: torch, F, nn; mae_image.py part 2; masking.py part 3)
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
        kv = self.kv(context).reshape(B, context.shape[1], 2, self.heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (B, heads, K, E / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, E))


class Decoder(nn.Module):
    """From the encoder's tokens to the patches of one task.

    The visible tokens of all modalities can be attended to, whatever their number; the queries are
    the full grid of this task alone, so a decoder costs as much as that of one image.
    """

    def __init__(self, task, modalities, width, depth, heads, D, values):
        super().__init__()
        self.task = task  # the modality whose grid is painted
        self.proj_context = nn.Linear(D, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        drawn = {m: nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02) for m in modalities}
        self.task_embeddings = nn.ParameterDict(drawn)
        self.query_norm = layer_norm(width)
        self.context_norm = layer_norm(width)
        self.out_norm = layer_norm(width)
        self.decoder = CrossAttention(width, heads)
        self.mlp = MLP(width)
        self.decoder_transformer = transformer(width, depth, heads)
        self.out_proj = nn.Linear(width, values)

    def forward(self, latent, mask, given, table):
        """latent (B, K+1, D), mask (B, sum of N) or None, table (1, N, E) -> (B, N, P)

        given  modalities in token order;   mask None: nothing is hidden
        """
        x = self.proj_context(latent)  # (B, K+1, E)
        vis, glob = x[:, :-1], x[:, -1:]
        # every token gets its position and the embedding of its modality; the global token neither
        positions = torch.cat([table + self.task_embeddings[m] for m in given], dim=1)
        tokens = vis if mask is None else restore(vis, mask, self.mask_token)
        tokens = tokens + positions  # (B, sum of N, E)
        context = torch.cat([visible(tokens, mask), glob.to(tokens.dtype)], dim=1)  # (B, K+1, E)
        if self.task in given:  # visible tokens of this task are among the queries
            queries = tokens.chunk(len(given), dim=1)[given.index(self.task)]  # (B, N, E)
        else:
            queries = self.mask_token + table + self.task_embeddings[self.task]
            queries = queries.expand(len(latent), -1, -1)  # (B, N, E)
        # important: no residual around the cross-attention
        x = self.decoder(self.query_norm(queries), self.context_norm(context))  # (B, N, E)
        x = x + self.mlp(self.out_norm(x))
        return self.out_proj(self.decoder_transformer(x))


# ==== THE PAPER, part 3: the model ================================================================
# (needs: torch, F, nn, MODALITIES, PLANES, STRIDE, parts 1, 2; mae_image.py parts 1-3;
# mae_video.py resize_table; masking.py part 3)
class MultiMAE(nn.Module):
    """MultiMAE.   loss, preds = model(inputs, mask)

    inputs  dict with any of   rgb (B, C, H, W) float, normalised with mean and std
                               depth (B, 1, H, W) float, standardized
                               semseg (B, H/4, W/4) int64, class numbers
    mask    (B, sum of N) bool over the tokens of the given modalities in the order of MODALITIES,
            True = hidden; every row has as many visible tokens, but not of each modality
    loss    float32 scalar, the sum over tasks;   preds {task: (B, N, P)}, (channel, row, col)

    modalities  inputs that the model knows. It paints the same, and with rgb also norm_rgb, patches
                normalised as MAE's
    decoder     (width, blocks, heads); published (256, 2, 8)
    ignore      class number that has no part in the loss (void), -1: none
    size, channels, mean, std: as in MAE, the last three of rgb
    """

    NO_DECAY = None  # important: here even biases, norms and tokens decay (public code)
    WARMUP_INCLUSIVE = True

    def __init__(self, img_size=224, patch=16, size="base", decoder=(256, 2, 8),
                 modalities=MODALITIES, classes=133, class_width=64, ignore=-1, channels=3,
                 mean=None, std=None):
        super().__init__()
        self.grid = 1, *rows_and_columns(img_size, patch)
        D, depth, heads = ENCODERS.get(size, size)
        self.patch, self.classes, self.ignore = patch, classes, ignore
        self.mean, self.std = mean_and_std(channels, mean, std)
        # of a prediction; of classes the logits
        self.channels = {"rgb": channels, "norm_rgb": channels, "depth": 1, "semseg": classes}
        self.modalities = [m for m in MODALITIES if m in modalities]
        self.tasks = [*self.modalities, "norm_rgb"] if "rgb" in modalities else self.modalities
        self.input_adapters = nn.ModuleDict()
        for m in self.modalities:
            if m == "semseg":
                side = parts_of(patch, STRIDE, "class maps have a quarter of the size: patch")
                self.input_adapters[m] = ClassEmbed(classes, side, class_width, D)
            else:
                self.input_adapters[m] = PatchEmbed((patch, patch), self.channels[m], D)
        self.global_tokens = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = transformer(D, depth, heads)
        self.output_adapters = nn.ModuleDict()
        for task in self.tasks:
            m, values = task.removeprefix("norm_"), self.channels[task] * self.side(task) ** 2
            self.output_adapters[task] = Decoder(m, self.modalities, *decoder, D, values)
        # Fixed tables, resized where the input has another size.   (1, N, D), (1, N, E)
        h, w = self.grid[1:]
        self.register_buffer("pos_embed", sincos_rows_first(D, h, w), persistent=False)
        table = sincos_rows_first(decoder[0], h, w)
        self.register_buffer("decoder_pos_embed", table, persistent=False)

        self.apply(init_weights)
        for name, module in self.named_modules():
            if name.endswith((".qkv", ".kv")):  # q, k and v have the bound of separate matrices
                for part in module.weight.data.split(module.in_features):
                    nn.init.xavier_uniform_(part)
            if isinstance(module, (PatchEmbed, ClassEmbed)):
                nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
            if isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.normal_(self.global_tokens, std=0.02)

    def normalize(self, batch):
        """Batch of an AlignedDataset, uint8 (B, H, W, planes) -> the dict of inputs."""
        inputs = {}
        for m, x in zip(self.modalities, batch.split([PLANES[m] for m in self.modalities], dim=-1)):
            if m == "rgb":
                inputs[m] = MAE.normalize(self, x)
            elif m == "depth":
                depth = x[..., 0].float() * 256 + x[..., 1].float()  # (B, H, W)
                inputs[m] = standardize_depth(depth[:, None] / 65536)
            else:  # one pixel of every 4 x 4
                inputs[m] = x[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE, 0].long()
        return inputs

    def side(self, m):
        """Height and width of a patch in the pixels of this map."""
        return self.patch // STRIDE if m == "semseg" else self.patch

    def patches(self, m, x):
        """One modality -> patches (B, N, P), values (row, col, channel); of classes the numbers."""
        return patchify(x[:, None] if m == "semseg" else x, self.side(m))

    def given(self, inputs):
        """-> the modalities among the inputs, in token order, and their token grid (1, h, w).

        Raises ValueError for none, unknown ones, and ones of another size.
        """
        given = [m for m in self.modalities if m in inputs]
        grids = {m: rows_and_columns(x.shape[-2:], self.side(m)) for m, x in inputs.items()}
        if len(given) < len(inputs) or len(set(grids.values())) != 1:
            raise ValueError(f"inputs of {grids} patches: this model takes any of "
                             f"{', '.join(self.modalities)}, all of one size (classes: a quarter)")
        return given, (1, *grids[given[0]])

    def forward(self, inputs, mask):
        latent = self.forward_encoder(inputs, mask)  # (B, K+1, D)
        preds = self.forward_decoder(latent, inputs, mask)
        return sum(self.task_losses(preds, inputs, inputs, mask).values()), preds

    def forward_encoder(self, inputs, mask=None):
        """Visible tokens of all given modalities, then the global token.   -> (B, K+1, D)

        Patches are embedded before the hidden ones are dropped: how many of a modality stay differs
        from row to row, so only the tokens, all of one width, can be gathered. No final LayerNorm.
        """
        (given, grid), tokens = self.given(inputs), []
        for m in given:
            mode = "bilinear" if m == "semseg" else "bicubic"  # public code
            table = resize_table(self.pos_embed, self.grid, grid, mode)  # (1, N, D)
            patches = self.patches(m, inputs[m])  # (B, N, P)
            tokens.append(self.input_adapters[m](patches) + table)  # (B, N, D)
        x = visible(torch.cat(tokens, dim=1), mask)  # (B, K, D)
        token = self.global_tokens.expand(x.shape[0], -1, -1)  # len(x): no export for any batch
        return self.blocks(torch.cat([x, token.to(x.dtype)], dim=1))  # (B, K+1, D)

    def forward_decoder(self, latent, inputs, mask=None):
        """Every task from the same latent.   -> {task: (B, N, P)}

        DIFFERS from the official code: there the decoder of the classes always runs in float32.
        """
        given, grid = self.given(inputs)
        table = resize_table(self.decoder_pos_embed, self.grid, grid, "bilinear")
        return {task: decoder(latent, mask, given, table)
                for task, decoder in self.output_adapters.items()}

    def target(self, task, x):
        """What a task is compared with: (B, N, P) as its prediction; classes (B, N, p*p)."""
        patches = self.patches(task.removeprefix("norm_"), x)
        if task == "semseg":
            return patches
        if task == "norm_rgb":  # each patch by its own mean and variance over all channels
            patches = MAE.normalize_patches(self, patches)[0]
        # from (row, col, channel) to (channel, row, col), the order of the decoders
        return patches.unflatten(2, (-1, self.channels[task])).transpose(2, 3).flatten(2)

    def painted(self, task, pred):
        """A prediction in the units of the map: of classes the most likely number (B, N, p*p)."""
        return pred.unflatten(2, (self.classes, -1)).argmax(dim=2) if task == "semseg" else pred

    def task_losses(self, preds, targets, inputs, mask=None):
        """{task: loss}: squared error of RGB, absolute error of depth, cross-entropy of classes.

        targets: dict as inputs, may have more modalities. Loss on hidden patches only; a task that
        was not an input has no mask, and its whole map counts.
        """
        (given, _), losses = self.given(inputs), {}
        hide = {} if mask is None else dict(zip(given, mask.chunk(len(given), dim=1)))
        for task, pred in preds.items():
            m, pred = task.removeprefix("norm_"), pred.float()
            if m not in targets:
                continue
            target = self.target(task, targets[m])
            everywhere = torch.tensor(m not in given)  # of a map that was no input all counts
            count = hide.get(m, everywhere).to(pred.device)[..., None].expand_as(target)
            if task == "semseg":  # logits (B, C, N, p*p)
                logits = pred.unflatten(2, (self.classes, -1)).transpose(1, 2)
                error = F.cross_entropy(logits, target, reduction="none", ignore_index=self.ignore)
                count = count & (target != self.ignore)
            else:
                error = (pred - target).abs() if task == "depth" else (pred - target) ** 2
            losses[task] = masked_mean(error, count)
        return losses

    def encode(self, inputs):
        """Every token of what is given, no mask; a tensor is RGB.   -> (B, sum of N + 1, D)"""
        return self.forward_encoder({"rgb": inputs} if torch.is_tensor(inputs) else inputs)


def masked_mean(error, count):
    """Mean over what counts in each sample, then over samples.   error, count (B, ...) -> scalar

    important: a sample in which nothing counts is not among those that are averaged. The public
    code divides 0 by 0 and drops the NaN afterwards, but its gradient has spread by then. Samples
    of one forward pass are averaged: where some are left out, --accum changes the result a little.
    """
    n = count.flatten(1).sum(dim=1)  # (B,)
    means = (error * count).flatten(1).sum(dim=1) / n.clamp(min=1)
    return means.sum() / (n > 0).sum().clamp(min=1)


class DenseHead(nn.Module):
    """A class map from a MultiMAE encoder: one linear layer on every patch.   -> (B, N, P)

    MultiMAE's public code puts ConvNeXt blocks or a DPT head here. This one is ours, and as plain
    as can be: what it finds was in the tokens. Of several modalities their mean is taken.

    encoder, norm  of a finetune.Classifier;   inputs: modalities it sees
    """

    def __init__(self, encoder, norm, inputs):
        super().__init__()
        self.encoder, self.norm, self.inputs = encoder, norm, inputs
        self.WARMUP_INCLUSIVE = encoder.WARMUP_INCLUSIVE
        values = encoder.classes * encoder.side("semseg") ** 2
        self.head = nn.Linear(norm.normalized_shape[0], values)

    def forward(self, x):
        tokens = self.encoder.encode({m: x[m] for m in self.inputs})[:, :-1]  # no global token
        tokens = tokens.unflatten(1, (len(self.inputs), -1)).mean(dim=1)  # (B, N, D)
        return self.head(self.norm(tokens))

    def loss(self, pred, x):
        inputs = {m: x[m] for m in self.inputs}
        return self.encoder.task_losses({"semseg": pred}, x, inputs)["semseg"]

    def answers(self, x):
        """-> (B, 2 * pixels): class numbers that are painted, and those that would be right."""
        pred = self.encoder.painted("semseg", self(x))
        target = self.encoder.target("semseg", x["semseg"])
        return torch.cat([pred.flatten(1), target.flatten(1)], dim=1)

    def score(self, answers):
        """Mean IoU, and that of one map for all.   answers (files, 2 * pixels)"""
        guess, truth = answers.long().chunk(2, dim=1)  # each (files, pixels)
        classes, counted = self.encoder.classes, truth != self.encoder.ignore
        votes = torch.stack([((truth == c) & counted).sum(dim=0) for c in range(classes)])
        constant = votes.argmax(dim=0).expand_as(truth)
        return {name: mean_iou(x[counted], truth[counted], classes)
                for name, x in (("mean IoU", guess), ("constant map", constant))}


def mean_iou(guess, truth, classes):
    """Intersection over union, averaged over the classes that there are.   guess, truth (n,)"""
    pairs = torch.bincount(truth * classes + guess, minlength=classes**2)
    pairs = pairs.reshape(classes, classes).double()
    right, union = pairs.diag(), pairs.sum(0) + pairs.sum(1) - pairs.diag()
    return (right / union)[pairs.sum(1) > 0].mean().item()


# ==== THE PAPER, part 4: aligned files ============================================================
# (needs: Path, np, torch, InterpolationMode; data.py IMAGE, parts 2-4)
class AlignedDataset(data.FileDataset):
    """Items uint8 (1, H, W, planes): RGB 3, depth 2 (high, low byte), classes 1.

    cfg     settings. `data` is a folder of rgb/, depth/, semseg/ with the same file names below, in
            any image format: depth 8 or 16 bits, class maps 8 bits or palette. One crop and flip
            for all; classes by nearest neighbour: nothing is between class 3 and class 5
    raises  ValueError for a map that is missing or of another size, and for a class number of
            `classes` or more that is not `ignore`
    """

    def __init__(self, files, modalities, cfg, train):
        super().__init__(files, cfg, train)
        self.root, self.modalities = Path(cfg.data), modalities

    def find(self, i, m):
        """The file of modality m that belongs to file i."""
        own = self.root / self.modalities[0]
        path = self.root / m / Path(self.paths[i]).relative_to(own)
        for suffix in (path.suffix, *data.IMAGE):
            if path.with_suffix(suffix).is_file():
                return path.with_suffix(suffix)
        raise ValueError(f"{self.paths[i]} has no counterpart in {self.root / m}")

    def read(self, i, generator):
        maps = {m: read_map(self.find(i, m), m) for m in self.modalities}
        sizes = {m: x.shape[:2] for m, x in maps.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{self.paths[i]}: sizes differ (is one turned by EXIF?): {sizes}")
        if "semseg" in maps:
            classes = maps["semseg"]
            found = classes[classes != self.cfg.ignore].max(initial=0)
            if found >= self.cfg.classes:
                raise ValueError(f"{self.find(i, 'semseg')} has class {found}: raise --classes "
                                 f"{self.cfg.classes}, or name a void class with --ignore")
        box, flip = self.draw_crop(sizes[self.modalities[0]], generator)
        planes = []
        for m, x in maps.items():
            how = {"rgb": InterpolationMode.BICUBIC, "depth": InterpolationMode.BILINEAR,
                   "semseg": InterpolationMode.NEAREST}[m]
            x = data.make_crop(x[None], self.size, box, flip, how)  # (1, H, W, C)
            if m == "depth":
                x = x.round().int()
                x = torch.cat([x // 256, x % 256], dim=-1)
            planes.append(x.to(torch.uint8))
        return torch.cat(planes, dim=-1), ""  # (1, H, W, planes)


def read_map(path, m):
    """-> uint8 RGB (H, W, 3), float32 depth (H, W, 1) in 0 .. 65535, or uint8 classes (H, W, 1).

    Raises BrokenFile, and ValueError for something that is no map
    """
    if m == "rgb":
        return data.read_image(path)
    with data.open_image(path) as image:
        x = np.array(image)  # a palette image gives its numbers
    bits = 8 if m == "semseg" else 16
    if x.ndim != 2 or x.dtype.kind not in "iu" or not 0 <= x.min() <= x.max() < 2**bits:
        raise ValueError(f"{path} is no {m} map, one channel of whole numbers < 2^{bits}: "
                         f"{x.ndim}-D {x.dtype} {x.min()} to {x.max()}")
    if m == "semseg":
        return x.astype(np.uint8)[..., None]
    return x.astype(np.float32)[..., None] * (257 if x.dtype == np.uint8 else 1)


# ==== THE RUN =====================================================================================
@dataclasses.dataclass
class Config(RunConfig):
    SCRIPT, BASELINE = "multimae", "constant maps"

    # data
    data: str = "toy"  # folder with rgb/, depth/, semseg/; the toy world is made
    modalities: str = "rgb,depth,semseg"  # what goes in and is painted, any of these
    classes: int = 6  # number of classes of the semantic maps; the toy world has 6
    ignore: int = -1  # class that has no part in the loss (void, often 255), -1: none
    min_crop: float = 0.2  # smallest share of the image area that a random crop takes
    flip: bool = True  # mirror half of the images
    # model
    decoder: str = "64x1x4"  # of each task, WIDTHxBLOCKSxHEADS; the public code has 256x2x8
    class_width: int = 16  # width of a class's learned vector; the public code has 64
    visible: float = 0.25  # share of all tokens, over modalities, that is visible; paper 1/6
    alpha: float = 1.0  # of the Dirichlet shares: 1 all splits equally likely, small: one has all
    # optimiser
    epochs: int = 30  # passes over the data
    batch: int = 32  # images per update, over all processes and accumulation steps
    lr: float = 1.6e-2  # base rate, for a batch of 256; the public code's is 1e-4, for longer runs
    warmup: float = 2  # epochs of linear warm-up
    # run
    out: str = "runs/multimae"  # folder for checkpoint, log and pictures


PRESETS = {
    # The public recipe: ViT-B on ImageNet with pseudo-labels, 8 GPUs
    "paper": dict(classes=133, img_size="224", patch=16, size="base", class_width=64, visible=1 / 6,
                  decoder="256x2x8", epochs=1600, batch=2048, lr=1e-4, warmup=40),
}


def parse_modalities(text):
    """ "rgb,depth" -> ["rgb", "depth"], in the order of MODALITIES."""
    names = set(text.replace(" ", "").strip(",").split(","))
    if names - set(MODALITIES):
        raise ValueError(f"modalities {text or 'none'}: use any of {','.join(MODALITIES)}")
    return [m for m in MODALITIES if m in names]


def constant_maps(model, reference):
    """What a predictor that looks at nothing would paint.   -> {task: (1, N, P)}

    From `reference`, training samples, at each pixel what is best for the loss: the mean of rgb and
    norm_rgb, the median depth, the logarithm of how often each class is there.
    """
    maps = {}
    for task in model.tasks:
        target = model.target(task, reference[task.removeprefix("norm_")])  # (B, N, P)
        if task == "semseg":
            classes = torch.arange(model.classes, device=target.device)
            there = (target[..., None] == classes) & (classes != model.ignore)  # (B, N, p*p, C)
            best = (there.float().mean(dim=0) + 1e-3).log().transpose(1, 2).flatten(1)
        else:
            best = target.median(dim=0).values if task == "depth" else target.mean(dim=0)
        maps[task] = best[None]
    return maps


def paint_from(model, source, x):
    """All tasks from one modality alone, every patch of it visible.   x its input -> preds"""
    return model.forward_decoder(model.forward_encoder({source: x}), {source: x})


def cross_modal(model, inputs, source, constant):
    """How well depth and classes are painted from one map alone.   -> {name: three numbers}

    For depth the mean absolute error (standardized), for classes the share of right ones among the
    pixels where the constant map is wrong: in the toy world those of objects. Each for the model,
    for the constant map, and for the model given another sample's map: that gap is what was really
    read. The other one is half the set away: files come class by class, neighbours are alike.
    """
    x, scores = inputs[source], {}
    other = x.roll(len(x) // 2, 0)
    contestants = paint_from(model, source, x), constant, paint_from(model, source, other)
    if "depth" in inputs and source != "depth":
        target = model.target("depth", inputs["depth"])
        scores["depth error"] = [(p["depth"] - target).abs().mean().item() for p in contestants]
    if "semseg" in inputs and source != "semseg":
        target = model.target("semseg", inputs["semseg"])
        found = [model.painted("semseg", p["semseg"]) for p in contestants]
        hard = (target != found[1]) & (target != model.ignore)  # so the constant map scores 0
        scores["object recall"] = [(f == target)[hard].float().mean().item() for f in found]
    return scores


PALETTE = torch.tensor([(90, 130, 90), (120, 140, 190), (220, 70, 60), (240, 180, 50),
                        (150, 80, 190), (60, 190, 200)])


def to_pictures(model, task, values):
    """Patches of a task in its own units -> pictures (B, 3, H, W), to be clamped to [0, 1]."""
    values = values.cpu()
    if task == "semseg":  # numbers (B, N, p*p) become colors (B, N, 3*p*p)
        values = PALETTE[values % len(PALETTE)].movedim(-1, 2).flatten(2) / 255
    x = values.transpose(1, 2).unflatten(2, model.grid[1:])  # (B, P, h, w)
    x = F.pixel_shuffle(x, model.side(task))  # (B, C, H, W)
    if task == "semseg":
        return F.interpolate(x, scale_factor=STRIDE)
    if task == "depth":  # near is bright
        return (0.5 - x / 6).expand(-1, 3, -1, -1)
    return to_unit_range(x, model.mean, model.std)


def draw(model, inputs, mask, preds, path):
    """One PNG, a row per sample: of each map the original, what is visible, what is painted."""
    columns, titles, pink = [], [], torch.tensor(HOLE)[:, None, None]
    for m, hide in zip(model.modalities, mask.chunk(len(model.modalities), dim=1)):
        original = to_pictures(model, m, model.target(m, inputs[m]))
        painted = to_pictures(model, m, model.painted(m, preds[m]))
        hole = as_pixels(hide, 1, *original.shape[2:], *model.grid[1:])[:, 0]  # (B, 1, H, W)
        columns += [original, *(torch.where(hole, x, original) for x in (pink, painted))]
        titles += [m, "visible", "painted"]
    for source, goal in list(itertools.permutations(inputs, 2))[:3]:
        pred = paint_from(model, source, inputs[source])[goal]
        columns.append(to_pictures(model, goal, model.painted(goal, pred)))
        titles.append(f"{source} > {goal}")
    some = evenly(len(mask), 6)  # over all classes
    cells = torch.stack([c[some] for c in columns], dim=1)  # (6, columns, 3, H, W)
    note = "the last columns are painted from one whole other map alone"
    save_picture(picture_table(cells, titles, note=note * (len(inputs) > 1)), path)


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay as they are
def main(argv=None):
    cfg, found, device = begin(Config, PRESETS, __doc__, {"multimae": public_multimae}, argv)
    modalities = parse_modalities(cfg.modalities)
    size, encoder, decoder = shapes(cfg)
    model = MultiMAE(size, cfg.patch, encoder, decoder, modalities, cfg.classes, cfg.class_width,
                     cfg.ignore)
    load_pretrained(model.to(device), found, cfg.resume)
    sizes = [math.prod(model.grid)] * len(modalities)
    count = max(1, round(cfg.visible * sum(sizes)))

    def draw_mask(batch, rows, generator):
        return dirichlet_mask(rows, sizes, count, generator, cfg.alpha)

    fetch(cfg.data)
    # files that have counterparts in the folders of the other modalities
    train_files, val_files = list_both(cfg, data.list_images, Path(cfg.data, modalities[0]))
    val = AlignedDataset(val_files, modalities, cfg, False)
    some = AlignedDataset(train_files, modalities, cfg, False)
    batch, mask, _ = held_out(val, draw_mask, cfg.seed)
    reference = held_out(some, draw_mask, cfg.seed, 128)[0]

    def look(path):
        """Losses beside those of a constant map, and what one map alone tells of the others."""
        inputs = model.normalize(batch.to(device))
        preds = model.forward(inputs, mask)[1]
        constant = constant_maps(model, model.normalize(reference.to(device)))
        everywhere = {t: x.expand(len(batch), -1, -1) for t, x in constant.items()}
        losses, baseline = (model.task_losses(x, inputs, inputs, mask) for x in (preds, everywhere))
        record = {"val_loss": sum(losses.values()).item(),
                  "baseline": sum(baseline.values()).item()}
        for task, loss in losses.items():
            report(f"held-out {task} {loss:.3f} (constant map {baseline[task]:.3f})")
            record |= {f"{task}_loss": loss.item(), f"{task}_constant": baseline[task].item()}
        found = cross_modal(model, inputs, modalities[0], constant)
        for name, (alone, fixed, other) in found.items():
            report(f"  from {modalities[0]} alone: {name} {alone:.3f} (constant map {fixed:.3f}, "
                   f"from another's {modalities[0]} {other:.3f})")
            record |= {f"{name}_alone": alone, f"{name}_constant": fixed, f"{name}_other": other}
        draw(model, inputs, mask, preds, path)
        return record

    pretrain(model, AlignedDataset(train_files, modalities, cfg, True), draw_mask, look, cfg)


def public_multimae(state):
    """EPFL-VILAB/MultiMAE, its MultiViT layout -> settings, our names, guesses."""
    kernel = state.get("input_adapters.rgb.proj.weight", torch.empty(0))
    if kernel.ndim != 4:
        return None
    names = {r"^encoder\.": "blocks.", r"^output_adapters\.cls\.norm\.": "fc_norm.",
             r"^output_adapters\.cls\.head\.": "head."}
    renamed = {k: v for k, v in rename(state, names).items() if not k.endswith("pos_emb")}
    sizes, guesses = sizes_in(renamed | {"patch_embed.proj.weight": kernel})
    p, given = sizes["patch"], [m for m in MODALITIES if f"input_adapters.{m}.proj.weight" in state]
    table = state.get("input_adapters.rgb.pos_emb", torch.empty(1, 1, 14, 14))  # (1, D, h, w)
    h, w = table.shape[2:]
    sizes |= {"modalities": ",".join(given), "img_size": f"{h * p}x{w * p}"}
    if (embedding := state.get("input_adapters.semseg.class_emb.weight")) is not None:
        sizes |= {"classes": embedding.shape[0], "class_width": embedding.shape[1]}
    if "output_adapters.rgb.proj_context.weight" in state:
        E = len(state["output_adapters.rgb.proj_context.weight"])
        blocks = blocks_in(state, "output_adapters.rgb.decoder_transformer.")
        sizes["decoder"] = f"{E}x{blocks}x8"
        guesses.append("decoder")
    return sizes, renamed, guesses


if __name__ == "__main__":
    run_script(main)
