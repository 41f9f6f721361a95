"""The training loop, whole runs of it, against the few plain lines that it should amount to.

What it adds for the user (log, checkpoints, processes) is left out here; batches, masks, rates,
accumulation, clipping, augmentation and the optimiser's steps must give the same weights. And what a
script's flags reach.
"""

import math
import os

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
    """Items of R samples that differ by epoch, number and sample; labels neither sorted nor equal."""

    classes = list("abcde")

    def __init__(self, shape, repeat=1, count=18):
        self.shape, self.repeat, self.seed = shape, repeat, 0
        self.paths = np.array([str(i) for i in range(count)])
        self.labels = np.arange(count) * 3 % 5

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, i = key
        g, shape = torch.Generator().manual_seed(1000 * epoch + i), (self.repeat, *self.shape)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g), i, []


def rate_at(step, peak, floor, warmup, total, inclusive=False):
    if step < warmup:
        return np.linspace(0, peak, warmup)[step] if inclusive else peak * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def order(cfg, count, items, step):
    epoch, i = divmod(step, count // items)
    numbers = torch.randperm(count, generator=data.seeded(cfg.seed, epoch)).tolist()
    return epoch, numbers[i * items : (i + 1) * items]


def same_weights(model, reference):
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), name


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


def draw(model):
    return lambda batch, rows, generator: random_mask(rows, model.grid, 0.75, generator)


def look(path):
    return {"val_loss": 0.0, "baseline": 1.0}


def pretrain(model, dataset, cfg):
    mae_image.pretrain(model, dataset, draw(model), look, cfg)


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
        epoch, items = order(cfg, 18, 6, step)
        x = reference.normalize(torch.cat([dataset[epoch, i][0] for i in items]))
        mask = random_mask(6, reference.grid, 0.75, data.seeded(cfg.seed, 1, step))
        for a, b in zip(x.chunk(cfg.accum), mask.chunk(cfg.accum)):
            (reference(a, b)[0] / cfg.accum).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        biggest = max(biggest, float(norm))
        optimizer.step()
        optimizer.zero_grad()
    same_weights(model, reference)
    assert not torch.equal(reference.norm.weight, image_model().norm.weight) and biggest > cfg.clip


RECIPE = dict(accum=3, clip=0.05, min_lr=0.1, erase=0.9, mixup=0.8, cutmix=1.0, smoothing=0.2)


@pytest.mark.parametrize("mode", ["finetune", "scratch", "linear"])
@pytest.mark.parametrize("recipe", [{}, RECIPE], ids=["plain", "recipe"])
def test_finetuning_is_the_plain_loop(tmp_path, monkeypatch, mode, recipe):
    options = dict(frozen=True, fresh_norm=False)
    if mode != "linear":
        options = dict(drop_path=0.5 * bool(recipe))
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
        epoch, items = order(cfg, 18, 3, step)
        reference.train()
        for part in np.split(np.array(items), cfg.accum):
            x = torch.cat([dataset[epoch, int(i)][0] for i in part])
            x = reference.encoder.normalize(x)
            labels = torch.tensor([int(dataset.labels[i]) for i in part for _ in range(2)])
            if recipe:
                x, labels = finetune.mix(finetune.erase(x, 0.9), labels, 5, 0.8, 1.0)
            loss = F.cross_entropy(reference(x), labels, label_smoothing=cfg.smoothing)
            (loss / cfg.accum).backward()
        if cfg.clip:
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in parameters], cfg.clip)
            assert norm > cfg.clip
        optimizer.step()
        optimizer.zero_grad()
    same_weights(model, reference)
    pairs = zip(reference.named_parameters(), video_classifier(**options).parameters())
    same = {n for (n, a), b in pairs if torch.equal(a, b)}
    assert same == {n for n, p in reference.named_parameters() if not p.requires_grad}


def test_bfloat16_is_for_the_products_only(tmp_path):
    """Close to float32 but not equal, and the weights themselves stay float32."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        model, record = image_model(), []
        cfg = loop_config(mae_image.Config, tmp_path, precision=precision, log_every=1,
                          out=str(tmp_path / precision))
        inner = model.forward
        model.forward = lambda x, mask: record.append(inner(x, mask)) or record[-1]
        pretrain(model, Noise((16, 16, 3)), cfg)
        losses[precision] = torch.stack([loss for loss, _ in record])
        assert {p.dtype for p in model.parameters()} == {torch.float32} == {losses[precision].dtype}
        assert record[0][1].dtype == getattr(torch, precision)
    a, b = losses["float32"], losses["bfloat16"]
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=0.02)


def test_testing_switches_to_eval(toy):
    """Drop path would make the answers random; BatchNorm would look at the test batch."""
    files = data.list_videos(toy, "val")
    cfg = finetune.Config(model="videomae", frames=4, stride=1, sampling="dense", img_size="16",
                          clips=1, workers=0, device="cpu")
    for options in (dict(drop_path=0.9), dict(frozen=True, fresh_norm=False)):
        model = video_classifier(**options)
        torch.nn.init.normal_([p for p in model.head.parameters() if p.ndim > 1][0])
        answers = [finetune.run_views(mode, files, cfg, model.answers)
                   for mode in (model.train(), model.eval())]
        assert torch.equal(*answers)


# ---- what the flags reach ------------------------------------------------------------------------


class Caught(Exception):
    pass


def caught(monkeypatch, tmp_path, module, *flags):
    """Run a script up to its training loop.   -> model, dataset, draw_mask (finetune.py: loss_of)"""

    def stop(model, dataset, draw_mask, *_):
        raise Caught(model, dataset, draw_mask)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "train" if module is finetune else "pretrain", stop)
    with pytest.raises(Caught) as error:
        module.main([str(flag) for flag in flags])
    return error.value.args


def groups(paths):
    return {os.path.basename(p).split("_g")[1][:2] for p in paths}


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_the_fold_that_is_asked_for_is_the_one_that_is_read(toy, monkeypatch, tmp_path, fold):
    """The toy world here has 4 groups, of which each fold tests on one."""
    tested = {1: "02", 2: "03", 3: "01"}[fold]
    expected = {f"{g:02d}" for g in range(1, 5)} - {tested}
    assert groups(data.list_videos(toy, "val", fold).paths) == {tested}
    flags = ["--data", toy, "--fold", fold, "--frames", 4, "--tubelet", 2, "--workers", 0]
    assert groups(caught(monkeypatch, tmp_path, mae_video, *flags)[1].paths) == expected
    joint = caught(monkeypatch, tmp_path, omni, *flags, "--images", toy)[1]
    assert groups(joint.videos.paths) == expected
    cfg = finetune.Config(data=str(toy), model="videomae", fold=fold, frames=4, stride=1)
    train, listed, test = finetune.open_data(cfg)
    assert groups(train.paths) == groups(listed.paths) == expected
    assert groups(test.paths) == {tested}


def test_flags_of_the_video_script_reach_model_mask_and_data(toy, monkeypatch, tmp_path):
    flags = ["--data", toy, "--frames", 4, "--tubelet", 2, "--img-size", "16x32", "--patch", 8]
    more = ["--mask-ratio", 0.75, "--no-flip", "--min-crop", 0.9, "--crop", "multiscale", "--sampling",
            "segments", "--stride", 3, "--repeat", 2, "--seed", 5]
    for kind, sign in (("videomae", "--norm-pix"), ("mae_st", "--no-norm-pix")):
        model, dataset, draw_mask = caught(monkeypatch, tmp_path, mae_video, *flags, *more, "--model",
                                           kind, sign)
        mask = draw_mask(None, 8, torch.Generator().manual_seed(0)).reshape(8, 2, 8)
        assert torch.equal(mask[:, 0], mask[:, 1]) == (kind == "videomae")
        assert type(model) is mae_video.MODELS[kind] and model.norm_pix == (sign == "--norm-pix")
        assert (dataset.frames, dataset.stride, dataset.size, dataset.seed) == (4, 3, (16, 32), 5)
        assert (dataset.sampling, dataset.crop, dataset.flip) == ("segments", "multiscale", False)
        assert (dataset.min_crop, dataset.repeat, dataset.train) == (0.9, 2, True)
    for kind in ("random", "tube"):  # and what is asked for comes before the paper's
        draw_mask = caught(monkeypatch, tmp_path, mae_video, *flags, "--mask", kind)[2]
        mask = draw_mask(None, 8, torch.Generator().manual_seed(0)).reshape(8, 2, 8)
        assert torch.equal(mask[:, 0], mask[:, 1]) == (kind == "tube")


def test_flags_of_the_image_script_reach_model_mask_and_data(toy, monkeypatch, tmp_path):
    flags = ["--data", toy, "--no-flip", "--min-crop", 0.7, "--img-size", 32, "--patch", 8,
             "--norm-pix", "--mask-ratio", 0.5, "--seed", 5]
    model, dataset, draw_mask = caught(monkeypatch, tmp_path, mae_image, *flags)
    assert (dataset.size, dataset.seed, dataset.min_crop) == ((32, 32), 5, 0.7)
    assert not dataset.flip and dataset.train and model.norm_pix
    assert draw_mask(None, 2, torch.Generator()).sum(dim=1).tolist() == [8, 8]


def test_flags_of_the_joint_script_reach_model_masks_and_data(toy, monkeypatch, tmp_path):
    flags = ["--data", toy, "--images", toy, "--flip", "--no-flip-image", "--min-crop", 0.9,
             "--min-crop-image", 0.4, "--norm-pix", "--img-size", 32, "--patch", 8, "--frames", 4,
             "--tubelet", 2, "--mask-ratio", 0.5, "--mask-ratio-image", 0.25]
    model, dataset, draw_mask = caught(monkeypatch, tmp_path, omni, *flags)
    assert (dataset.videos.min_crop, dataset.videos.flip) == (0.9, True) and model.norm_pix
    assert (dataset.images.min_crop, dataset.images.flip) == (0.4, False)
    assert draw_mask(torch.empty(0, 0, 0, 0), 1, torch.Generator()).sum() == 4
    assert draw_mask(torch.empty(0, 0, 0, 0, 0), 1, torch.Generator()).sum() == 16


def test_flags_of_the_multimodal_script_reach_mask_and_data(toy, monkeypatch, tmp_path):
    flags = ["--data", toy, "--no-flip", "--min-crop", 0.7, "--img-size", 32, "--patch", 8, "--visible",
             0.25, "--workers", 0]
    model, dataset, draw_mask = caught(monkeypatch, tmp_path, multimae, *flags)
    assert dataset.min_crop == 0.7 and not dataset.flip
    assert (~draw_mask(None, 2, torch.Generator())).sum(dim=1).tolist() == [12, 12]


def test_flags_of_finetuning_reach_classifier_and_data(toy, monkeypatch, tmp_path):
    flags = ["--mode", "scratch", "--data", toy, "--no-flip", "--min-crop", 0.7, "--repeat", 2,
             "--rand-augment", 3, "--drop-path", 0.2, "--dropout", 0.3, "--share", 0.5, "--sampling",
             "segments", "--frames", 4, "--tubelet", 2]
    model, dataset, _ = caught(monkeypatch, tmp_path, finetune, *flags)
    inner = dataset.dataset
    assert (inner.min_crop, inner.flip, inner.repeat) == (0.7, False, 2)
    assert (inner.sampling, inner.frames) == ("segments", 4)
    assert dataset.augment is not None and len(dataset) == 36 and model.dropout.p == 0.3
    assert math.isclose(model.encoder.blocks[-1].drop_path, 0.2, rel_tol=1e-6)
