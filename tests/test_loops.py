"""Whole runs of the training loop against a few plain lines, and what a script's flags reach."""

import copy
import math
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import finetune
import mae_image
import mae_video
import multimae
import omni
from masking import random_mask


class Noise:
    """18 items of R samples, all different; labels neither sorted nor equal."""

    paths, labels, classes = np.arange(18).astype(str), np.arange(18) * 3 % 5, list("abcde")

    def __init__(self, shape, repeat=1):
        self.shape, self.repeat = shape, repeat

    def __len__(self):
        return 18

    def __getitem__(self, key):
        shape, g = (self.repeat, *self.shape), data.seeded(9, *key)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g), key[1], []


def rate_at(step, peak, floor, warmup, total, inclusive=False):
    if step < warmup:
        return np.linspace(0, peak, warmup)[step] if inclusive else peak * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def keys_of(cfg, items, step):
    epoch, i = divmod(step, 18 // items)
    numbers = torch.randperm(18, generator=data.seeded(cfg.seed, epoch)).tolist()
    return [(epoch, k) for k in numbers[i * items : (i + 1) * items]]


def changed(model, other):
    """Names of parameters that differ in any bit."""
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    return {name for (name, a), b in pairs if not torch.equal(a, b)}


def loop_config(module, tmp_path, **options):
    return module.Config(img_size="16", patch=8, batch=6, epochs=4, warmup=1, workers=0, pictures=1,
                         device="cpu", out=str(tmp_path / "run"), **options)


@pytest.mark.parametrize("options", [
    {}, dict(accum=3, clip=0.05, min_lr=0.3, weight_decay=0.5), dict(precision="bfloat16")])
def test_pretraining_is_the_plain_loop(tmp_path, options):
    torch.manual_seed(4)
    model = mae_image.MAE(16, 8, (16, 2, 2), (16, 1, 2))
    reference, untrained = copy.deepcopy(model), copy.deepcopy(model)
    cfg, dataset = loop_config(mae_image, tmp_path, lr=2.0, **options), Noise((16, 16, 3))
    rounded = cfg.precision == "bfloat16"
    def draw_mask(batch, rows, generator):
        return random_mask(rows, model.grid, 0.75, generator)
    mae_image.pretrain(model, dataset, draw_mask, lambda path: {"val_loss": 0.0}, cfg)
    parameters = list(reference.parameters())
    decay = [{"params": [p], "weight_decay": cfg.weight_decay * (p.ndim > 1)} for p in parameters]
    optimizer = torch.optim.AdamW(decay, betas=(0.9, 0.95), fused=True)
    for step in range(12):  # 18 images, 6 an update, 4 epochs
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, 2.0 * 6 / 256, cfg.min_lr * 6 / 256, 3, 12)
        x = torch.cat([dataset[key][0] for key in keys_of(cfg, 6, step)])
        mask = random_mask(6, reference.grid, 0.75, data.seeded(cfg.seed, 1, step))
        for a, b in zip(reference.normalize(x).chunk(cfg.accum), mask.chunk(cfg.accum)):
            with torch.autocast("cpu", torch.bfloat16, rounded):  # products only
                loss, pred = reference(a, b)
            assert (loss.dtype, pred.dtype == torch.bfloat16) == (torch.float32, rounded)
            (loss / cfg.accum).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        assert norm > cfg.clip
        optimizer.step()
        optimizer.zero_grad()
    assert not changed(model, reference) and "norm.weight" in changed(model, untrained)


@pytest.mark.parametrize("mode", ["finetune", "scratch", "linear"])
@pytest.mark.parametrize("recipe", [{}, dict(
    accum=3, clip=0.05, min_lr=0.1, erase=0.9, mixup=0.8, cutmix=1.0, smoothing=0.2)])
def test_finetuning_is_the_plain_loop(tmp_path, monkeypatch, mode, recipe):
    options = dict(drop_path=0.5 * bool(recipe))
    if mode == "linear":
        options = dict(frozen=True, fresh_norm=False)
    torch.manual_seed(4)
    encoder = mae_video.VideoMAE(4, 16, 2, 8, (16, 2, 2), (16, 1, 2))
    model, dataset = finetune.Classifier(encoder, 5, **options), Noise((4, 16, 16, 3), repeat=2)
    reference, untrained = copy.deepcopy(model), copy.deepcopy(model)
    cfg = loop_config(finetune, tmp_path, mode=mode, lr=1.0, layer_decay=0.5, **recipe)
    def run_views(model, files, *_):  # after which training has to be in training mode again
        return model.eval() and torch.full((len(files.paths), 1, 5), 0.2), files
    monkeypatch.setattr(finetune, "run_views", run_views)
    monkeypatch.setattr(finetune, "write_results", lambda *_: "done")
    finetune.train_classifier(model, dataset, dataset, cfg)
    def scale(name):
        if mode != "finetune" or not name.startswith("encoder."):
            return 1.0
        return 0.5 ** (2 - int(name.split(".")[2]) if "blocks" in name else 3)
    parameters = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    optimizer = finetune.LARS(list(parameters.values()), momentum=0.9)  # no decay: MAE Table 10
    if mode != "linear":
        optimizer = torch.optim.AdamW([
            {"params": [p], "scale": scale(n), "weight_decay": cfg.weight_decay * (p.ndim > 1)}
            for n, p in parameters.items()], betas=(0.9, 0.999), fused=True)
    for step in range(24):  # 18 videos, 3 an update, 4 epochs
        for group in optimizer.param_groups:
            rate = rate_at(step, 6 / 256, cfg.min_lr * 6 / 256, 6, 24, inclusive=True)
            group["lr"] = rate * group.get("scale", 1.0)
        torch.manual_seed(data.seeded(cfg.seed, 6, step, 0).initial_seed())
        reference.train()
        for keys in np.split(np.array(keys_of(cfg, 3, step)), cfg.accum):
            x = reference.encoder.normalize(torch.cat([dataset[key][0] for key in keys.tolist()]))
            labels = torch.from_numpy(dataset.labels[keys[:, 1]].repeat(2))
            if recipe:
                x, labels = finetune.mix(finetune.erase(x, 0.9), labels, 5, 0.8, 1.0)
            loss = F.cross_entropy(reference(x), labels, label_smoothing=cfg.smoothing)
            (loss / cfg.accum).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), cfg.clip or math.inf)
        assert norm > cfg.clip
        optimizer.step()
        optimizer.zero_grad()
    assert not changed(model, reference) and changed(model, untrained) == set(parameters)


@pytest.mark.parametrize("module, flags, masks, reached", [
    (mae_image, "--no-flip --min-crop 0.7 --norm-pix --seed 5 --mask-ratio 0.5", {4: 8},
     {"size": (16, 64), "cfg.flip": False, "cfg.min_crop": 0.7, "cfg.seed": 5, "train": True,
      "model.norm_pix": True}),
    (mae_video, "--fold 2 --no-flip --min-crop 0.9 --crop multiscale --sampling segments "
     "--stride 3 --repeat 2 --seed 5 --model mae_st --norm-pix --mask-ratio 0.6", {5: 20},
     {"size": (16, 64), "cfg.flip": False, "cfg.min_crop": 0.9, "cfg.crop": "multiscale",
      "cfg.sampling": "segments", "cfg.frames": 4, "cfg.stride": 3, "cfg.seed": 5, "repeat": 2,
      "train": True, "model.__class__": mae_video.MAEST, "model.norm_pix": True}),
    (mae_video, "--mask-ratio 0.6", {5: 18}, {"model.__class__": mae_video.VideoMAE}),  # tubes
    (mae_video, "--mask-ratio 0.6 --mask random", {5: 20}, {"train": True}),
    (omni, "--fold 2 --flip --no-flip-image --min-crop 0.9 --min-crop-image 0.4 --norm-pix "
     "--mask-ratio 0.5 --mask-ratio-image 0.25", {4: 4, 5: 16},
     {"videos.cfg.min_crop": 0.9, "videos.cfg.flip": True, "images.cfg.min_crop": 0.4,
      "images.cfg.flip": False, "model.norm_pix": True}),
    (multimae, "--no-flip --min-crop 0.7 --visible 0.25", {4: 36},
     {"cfg.flip": False, "cfg.min_crop": 0.7}),
    (finetune, "--mode scratch --fold 2 --no-flip --min-crop 0.7 --repeat 2 --rand-augment 3 "
     "--share 0.5 --drop-path 0.25 --dropout 0.3 --sampling segments", {},
     {"dataset.cfg.flip": False, "dataset.cfg.min_crop": 0.7, "dataset.repeat": 2,
      "dataset.cfg.sampling": "segments", "dataset.cfg.frames": 4, "paths.size": 36,
      "augment.magnitude": 3, "model.dropout.p": 0.3, "model.encoder.blocks.3.drop_path": 0.25})])
def test_flags_reach_model_data_masks(module, flags, masks, reached, toy, monkeypatch, tmp_path):
    """masks: of an image with 16 tokens (4) or a clip with 2 x 16 (5) so many are hidden."""
    monkeypatch.chdir(tmp_path)
    common = ["--data", toy, "--img-size", "16x64", "--patch", 8, "--workers", 0]
    common += ["--images", toy] * (module is omni)
    common += ["--frames", 4, "--tubelet", 2] * hasattr(module.Config, "frames")
    given, name = [], "train_classifier" if module is finetune else "pretrain"
    monkeypatch.setattr(module, name, lambda *found: given.extend(found[:3]))
    module.main([*map(str, common), *flags.split()])
    model, dataset, draw_mask = given  # to the training loop
    for name, value in reached.items():
        owner = model if name.startswith("model.") else dataset
        assert operator.attrgetter(name.removeprefix("model."))(owner) == value, name
    for ndim, count in masks.items():
        mask = draw_mask(torch.empty([0] * ndim), 8, data.seeded(0))
        assert (mask.sum(dim=1) == count).all()
    if "--fold 2" in flags:  # group 3 is for testing
        assert "_g02_" in " ".join(dataset.paths) and "_g03_" not in " ".join(dataset.paths)
