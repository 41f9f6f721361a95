"""Whole runs of the training loop against the few plain lines that they should amount to.

And what a script's flags reach.
"""

import math
import operator
import os
import types

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
from finetune import Classifier
from mae_image import MAE
from mae_video import VideoMAE
from masking import random_mask


class Noise:
    """Items of R samples, all different; labels neither sorted nor equal."""

    classes = list("abcde")

    def __init__(self, shape, repeat=1):
        self.shape, self.repeat, self.seed = shape, repeat, 0
        self.paths, self.labels = np.arange(18).astype(str), np.arange(18) * 3 % 5

    def __len__(self):
        return 18

    def __getitem__(self, key):
        epoch, i = key
        g, shape = torch.Generator().manual_seed(1000 * epoch + i), (self.repeat, *self.shape)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g), i, []


def rate_at(step, peak, floor, warmup, total, inclusive=False):
    if step < warmup:
        return np.linspace(0, peak, warmup)[step] if inclusive else peak * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def order(cfg, items, step):
    epoch, i = divmod(step, 18 // items)
    numbers = torch.randperm(18, generator=data.seeded(cfg.seed, epoch)).tolist()
    return epoch, numbers[i * items : (i + 1) * items]


def changed(model, other):
    """Names of parameters that differ in any bit."""
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    return {name for (name, a), b in pairs if not torch.equal(a, b)}


def image_model():
    torch.manual_seed(4)
    return MAE(16, 8, (16, 2, 2), (16, 1, 2))


def video_classifier(**options):
    torch.manual_seed(4)
    return Classifier(VideoMAE(4, 16, 2, 8, (16, 2, 2), (16, 1, 2)), 5, **options)


def loop_config(Config, tmp_path, **options):
    common = dict(img_size="16", patch=8, batch=6, epochs=4, warmup=1, workers=0, device="cpu",
                  pictures=1, out=str(tmp_path / "run"))
    return Config(**{**common, **options})


def pretrain(model, dataset, cfg):
    def draw_mask(batch, rows, generator):
        return random_mask(rows, model.grid, 0.75, generator)

    mae_image.pretrain(model, dataset, draw_mask, lambda path: {"val_loss": 0.0}, cfg)


FULL = dict(accum=3, clip=0.05, min_lr=0.3, weight_decay=0.5)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "all"])
def test_pretraining_is_the_plain_loop(tmp_path, options):
    model, reference, dataset = image_model(), image_model(), Noise((16, 16, 3))
    cfg = loop_config(mae_image.Config, tmp_path, lr=2.0, **options)
    pretrain(model, dataset, cfg)
    parameters = list(reference.parameters())
    decay = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
             {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer, biggest = torch.optim.AdamW(decay, betas=(0.9, 0.95), fused=True), 0.0
    for step in range(12):  # 18 images, 6 an update, 4 epochs
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, 2.0 * 6 / 256, cfg.min_lr * 6 / 256, 3, 12)
        epoch, items = order(cfg, 6, step)
        x = reference.normalize(torch.cat([dataset[epoch, i][0] for i in items]))
        mask = random_mask(6, reference.grid, 0.75, data.seeded(cfg.seed, 1, step))
        for a, b in zip(x.chunk(cfg.accum), mask.chunk(cfg.accum)):
            (reference(a, b)[0] / cfg.accum).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        biggest = max(biggest, float(norm))
        optimizer.step()
        optimizer.zero_grad()
    assert not changed(model, reference)
    assert "norm.weight" in changed(model, image_model()) and biggest > cfg.clip


RECIPE = dict(accum=3, clip=0.05, min_lr=0.1, erase=0.9, mixup=0.8, cutmix=1.0, smoothing=0.2)


@pytest.mark.parametrize("mode", ["finetune", "scratch", "linear"])
@pytest.mark.parametrize("recipe", [{}, RECIPE], ids=["plain", "recipe"])
def test_finetuning_is_the_plain_loop(tmp_path, monkeypatch, mode, recipe):
    options = dict(drop_path=0.5 * bool(recipe))
    if mode == "linear":
        options = dict(frozen=True, fresh_norm=False)
    model, reference = video_classifier(**options), video_classifier(**options)
    dataset = Noise((4, 16, 16, 3), repeat=2)
    cfg = loop_config(finetune.Config, tmp_path, mode=mode, lr=1.0, layer_decay=0.5, **recipe)

    def run_views(model, files, *_):  # after which training has to be in training mode again
        return model.eval() and torch.full((len(files.paths), 1, 5), 0.2)

    monkeypatch.setattr(finetune, "run_views", run_views)
    monkeypatch.setattr(finetune, "write_results", lambda *_: "done")
    files = data.Files(dataset.paths, dataset.labels, dataset.classes)
    finetune.train_classifier(model, dataset, files, cfg)
    parameters = [(n, p) for n, p in reference.named_parameters() if p.requires_grad]

    def scale(name):
        layer = 3
        if name.startswith("encoder."):
            layer = 1 + int(name.split(".")[2]) if "blocks" in name else 0
        return 0.5 ** (3 - layer) if mode == "finetune" else 1.0

    if mode == "linear":  # without weight decay: MAE Table 10
        optimizer = finetune.LARS([{"params": [p]} for _, p in parameters], 0.0)
    else:
        optimizer = torch.optim.AdamW([
            {"params": [p], "scale": scale(n), "weight_decay": cfg.weight_decay * (p.ndim > 1)}
            for n, p in parameters], betas=(0.9, 0.999), fused=True)
    for step in range(24):  # 18 videos, 3 an update, 4 epochs
        rate = rate_at(step, 6 / 256, cfg.min_lr * 6 / 256, 6, 24, inclusive=True)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        torch.manual_seed(int(data.seeded(cfg.seed, 6, step, 0).initial_seed()))
        epoch, items = order(cfg, 3, step)
        reference.train()
        for part in np.split(np.array(items), cfg.accum):
            x = torch.cat([dataset[epoch, int(i)][0] for i in part])
            x = reference.encoder.normalize(x)
            labels = torch.tensor([int(dataset.labels[i]) for i in part for _ in range(2)])
            if recipe:
                x, labels = finetune.mix(finetune.erase(x, 0.9), labels, 5, 0.8, 1.0)
            loss = F.cross_entropy(reference(x), labels, label_smoothing=cfg.smoothing)
            (loss / cfg.accum).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in parameters], cfg.clip or math.inf)
        assert norm > cfg.clip
        optimizer.step()
        optimizer.zero_grad()
    assert not changed(model, reference)
    assert changed(model, video_classifier(**options)) == {n for n, _ in parameters}


def test_bfloat16_is_for_the_products_only(tmp_path):
    model, record = image_model(), []
    cfg = loop_config(mae_image.Config, tmp_path, precision="bfloat16")
    model.register_forward_hook(lambda model, inputs, output: record.append(output))
    pretrain(model, Noise((16, 16, 3)), cfg)
    (loss, pred), dtypes = record[-1], {p.dtype for p in model.parameters()}
    assert pred.dtype == torch.bfloat16 and dtypes == {loss.dtype} == {torch.float32}


# ---- what the flags reach ------------------------------------------------------------------------


class Caught(Exception):
    pass


def caught(monkeypatch, module, *flags):
    """Run a script up to its training loop.   -> model, dataset, draw_mask"""

    def stop(model, dataset, draw_mask, *_):
        raise Caught(types.SimpleNamespace(model=model, dataset=dataset), draw_mask)

    monkeypatch.setattr(module, "train" if module is finetune else "pretrain", stop)
    with pytest.raises(Caught) as error:
        module.main([str(flag) for flag in flags])
    return error.value.args


def groups(paths):
    return {os.path.basename(p).split("_g")[1][:2] for p in paths}


@pytest.mark.parametrize("fold, tested", [(1, "02"), (2, "03"), (3, "01")])
def test_the_fold_that_is_asked_for_is_the_one_that_is_read(toy, monkeypatch, fold, tested):
    """The toy world here has 4 groups, of which each fold tests on one."""
    expected = {"01", "02", "03", "04"} - {tested}
    flags = ["--data", toy, "--fold", fold, "--frames", 4, "--tubelet", 2, "--workers", 0]
    assert groups(caught(monkeypatch, mae_video, *flags)[0].dataset.paths) == expected
    joint = caught(monkeypatch, omni, *flags, "--images", toy)[0].dataset
    assert groups(joint.videos.paths) == expected
    cfg = finetune.Config(data=str(toy), model="videomae", fold=fold, frames=4, stride=1)
    train, listed, test = finetune.open_data(cfg)
    assert groups(train.paths) == groups(listed.paths) == expected
    assert groups(test.paths) == {tested}


@pytest.mark.parametrize("module, flags, masks, reached", [
    (mae_image, "--no-flip --min-crop 0.7 --norm-pix --seed 5 --mask-ratio 0.5", {4: 8},
     {"dataset.size": (16, 64), "dataset.flip": False, "dataset.min_crop": 0.7, "dataset.seed": 5,
      "dataset.train": True, "model.norm_pix": True}),
    (mae_video, "--no-flip --min-crop 0.9 --crop multiscale --sampling segments --stride 3 "
     "--repeat 2 --seed 5 --model mae_st --norm-pix --mask-ratio 0.5", {5: 16},
     {"dataset.size": (16, 64), "dataset.flip": False, "dataset.min_crop": 0.9, "dataset.seed": 5,
      "dataset.train": True, "dataset.crop": "multiscale", "dataset.sampling": "segments",
      "dataset.frames": 4, "dataset.stride": 3, "dataset.repeat": 2,
      "model.__class__": mae_video.MAEST, "model.norm_pix": True}),
    (omni, "--flip --no-flip-image --min-crop 0.9 --min-crop-image 0.4 --norm-pix "
     "--mask-ratio 0.5 --mask-ratio-image 0.25", {4: 4, 5: 16},
     {"dataset.videos.min_crop": 0.9, "dataset.videos.flip": True, "dataset.images.min_crop": 0.4,
      "dataset.images.flip": False, "model.norm_pix": True}),
    (multimae, "--no-flip --min-crop 0.7 --visible 0.25", {4: 36},
     {"dataset.flip": False, "dataset.min_crop": 0.7}),
    (finetune, "--mode scratch --no-flip --min-crop 0.7 --repeat 2 --rand-augment 3 --share 0.5 "
     "--drop-path 0.25 --dropout 0.3 --sampling segments", {},
     {"dataset.dataset.flip": False, "dataset.dataset.min_crop": 0.7, "dataset.dataset.repeat": 2,
      "dataset.dataset.sampling": "segments", "dataset.dataset.frames": 4, "dataset.paths.size": 36,
      "dataset.augment.magnitude": 3, "model.dropout.p": 0.3,
      "model.encoder.blocks.3.drop_path": 0.25})])
def test_flags_reach_model_data_and_masks(module, flags, masks, reached, toy, monkeypatch,
                                          tmp_path):
    """masks: of an image with 16 tokens (4) or a clip with 2 x 16 (5) so many are hidden."""
    monkeypatch.chdir(tmp_path)
    common = ["--data", toy, "--img-size", "16x64", "--patch", 8, "--workers", 0]
    common += ["--images", toy] * (module is omni)
    common += ["--frames", 4, "--tubelet", 2] * hasattr(module.Config, "frames")
    found, draw_mask = caught(monkeypatch, module, *common, *flags.split())
    for name, value in reached.items():
        owner, _, last = name.rpartition(".")
        owner = operator.attrgetter(owner)(found)
        owner = owner if hasattr(owner, last) else owner.cfg
        assert getattr(owner, last) == value, name
    for ndim, count in masks.items():
        mask = draw_mask(torch.empty([0] * ndim), 8, torch.Generator().manual_seed(0))
        assert (mask.sum(dim=1) == count).all()


@pytest.mark.parametrize("flags, tubes", [
    ([], True), (["--model", "mae_st"], False), (["--mask", "random"], False)])
def test_videomae_hides_tubes_unless_another_mask_is_asked_for(flags, tubes, toy, monkeypatch):
    sizes = ["--data", toy, "--frames", 4, "--tubelet", 2, "--workers", 0]
    draw_mask = caught(monkeypatch, mae_video, *sizes, *flags)[1]
    mask = draw_mask(None, 8, torch.Generator().manual_seed(0)).reshape(8, 2, -1)
    assert torch.equal(mask[:, 0], mask[:, 1]) == tubes
