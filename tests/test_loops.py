"""Both training loops, whole runs of them, against the few plain lines that they should amount to.

What the loops add for the user (log, checkpoints, processes) is left out here; batches, masks, rates, accumulation,
clipping, augmentation and the optimiser's steps must give the same weights. And what a script's flags reach.
"""

import math
import sys

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
        self.paths, self.labels = np.array([str(i) for i in range(count)]), np.arange(count) * 3 % 5

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, i = key
        g = torch.Generator().manual_seed(1000 * epoch + i)
        return torch.randint(0, 256, (self.repeat, *self.shape), dtype=torch.uint8, generator=g), i, []


def rate_at(step, peak, floor, warmup, total):
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def order(cfg, count, items, step):
    epoch, i = divmod(step, count // items)
    return epoch, torch.randperm(count, generator=data.seeded(cfg.seed, epoch)).tolist()[i * items : (i + 1) * items]


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
    common = dict(img_size=16, patch=8, batch=6, epochs=4, warmup=1, workers=0, device="cpu", out=str(tmp_path / "run"))
    return Config(**{**common, **options})


def draw(model):
    return lambda batch, rows, generator: random_mask(rows, model.grid, 0.75, generator)


NO_PICTURE = lambda model, path: {"val_loss": 0.0, "chance": 1.0}


@pytest.mark.parametrize("options", [{}, dict(accum=3, clip=0.05, min_lr=0.3, weight_decay=0.5)], ids=["plain", "all"])
def test_pretraining_is_the_plain_loop(tmp_path, options):
    model, reference, train = image_model(), image_model(), Noise((16, 16, 3))
    cfg = loop_config(mae_image.Config, tmp_path, lr=2.0, **options)
    mae_image.pretrain(model, train, draw(model), NO_PICTURE, cfg, "mae_image")

    parameters = list(reference.parameters())
    decay = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
             {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer, biggest = torch.optim.AdamW(decay, betas=(0.9, 0.95), fused=True), 0.0
    for step in range(12):  # 18 images, 6 an update, 4 epochs
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, 2.0 * 6 / 256, cfg.min_lr * 6 / 256, 3, 12)
        epoch, items = order(cfg, 18, 6, step)
        x = reference.normalize(torch.cat([train[epoch, i][0] for i in items]))
        mask = random_mask(6, reference.grid, 0.75, data.seeded(cfg.seed, 1, step))
        for a, b in zip(x.chunk(cfg.accum), mask.chunk(cfg.accum)):
            (reference(a, b)[0] / cfg.accum).backward()
        biggest = max(biggest, float(torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)))
        optimizer.step()
        optimizer.zero_grad()
    same_weights(model, reference)
    assert not torch.equal(reference.norm.weight, image_model().norm.weight) and biggest > cfg.clip


@pytest.mark.parametrize("mode", ["finetune", "scratch", "linear"])
@pytest.mark.parametrize("whole_recipe", [False, True])
def test_finetuning_is_the_plain_loop(tmp_path, mode, whole_recipe):
    options = dict(frozen=True, fresh_norm=False) if mode == "linear" else dict(drop_path=0.5 * whole_recipe)
    model, reference = video_classifier(**options), video_classifier(**options)
    train = Noise((4, 16, 16, 3), repeat=2)
    recipe = dict(accum=3, clip=0.05, min_lr=0.1, erase=0.9, mixup=0.8, cutmix=1.0, smoothing=0.2) if whole_recipe else {}
    cfg = loop_config(finetune.Config, tmp_path, mode=mode, lr=1.0, layer_decay=0.5, check_every=1, **recipe)
    look = lambda model: str(model.eval())  # after which training has to go on in training mode
    _, finished = finetune.train_classifier(model, train, look, cfg, {})
    assert finished

    parameters = [(n, p) for n, p in reference.named_parameters() if p.requires_grad]
    depth = lambda name: 3 if not name.startswith("encoder.") else 1 + int(name.split(".")[2]) if "blocks" in name else 0
    scale = lambda name: 0.5 ** (3 - depth(name)) if mode == "finetune" else 1.0
    groups = [{"params": [p], "scale": scale(n), "weight_decay": cfg.weight_decay * (p.ndim > 1)} for n, p in parameters]
    if mode == "linear":  # without weight decay: MAE Table 10
        optimizer = finetune.LARS([{"params": [p]} for _, p in parameters], 0.0)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    for step in range(24):  # 18 videos, 3 an update, 4 epochs
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, 6 / 256, cfg.min_lr * 6 / 256, 6, 24) * group.get("scale", 1.0)
        torch.manual_seed(int(data.seeded(cfg.seed, 6, step, 0).initial_seed()))
        epoch, items = order(cfg, 18, 3, step)
        reference.train()
        for part in np.split(np.array(items), cfg.accum):
            x = reference.encoder.normalize(torch.cat([train[epoch, int(i)][0] for i in part]))
            labels = torch.tensor([int(train.labels[i]) for i in part for _ in range(2)])
            if whole_recipe:
                x, labels = finetune.mix(finetune.erase(x, 0.9), labels, 5, 0.8, 1.0)
            logits = reference(x)
            (F.cross_entropy(logits, labels, label_smoothing=cfg.smoothing) / cfg.accum).backward()
        if cfg.clip:
            assert torch.nn.utils.clip_grad_norm_([p for _, p in parameters], cfg.clip) > cfg.clip
        optimizer.step()
        optimizer.zero_grad()
    same_weights(model, reference)
    untouched = video_classifier(**options)
    same = [n for (n, a), b in zip(reference.named_parameters(), untouched.parameters()) if torch.equal(a, b)]
    assert (set(same) == {n for n, _ in reference.named_parameters()} - {n for n, _ in parameters}), same


def test_bfloat16_is_for_the_products_only(tmp_path):
    """Close to float32 but not equal, and the weights themselves stay float32."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        model, record = image_model(), []
        cfg = loop_config(mae_image.Config, tmp_path, precision=precision, out=str(tmp_path / precision), log_every=1)
        inner = model.forward
        model.forward = lambda x, mask: (record.append(out := inner(x, mask)), out)[1]
        mae_image.pretrain(model, Noise((16, 16, 3)), draw(model), NO_PICTURE, cfg, "mae_image")
        losses[precision] = torch.stack([loss for loss, _ in record])
        assert {p.dtype for p in model.parameters()} == {torch.float32} == {losses[precision].dtype}
        assert record[0][1].dtype == getattr(torch, precision)
    a, b = losses["float32"], losses["bfloat16"]
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=0.02)


def test_testing_switches_to_eval(toy):
    """Drop path would make the answers random; BatchNorm would look at the test batch."""
    files = data.list_videos(toy, "val")
    cfg = finetune.Config(model="videomae", frames=4, stride=1, sampling="dense", img_size=16, workers=0, device="cpu")
    for options in (dict(drop_path=0.9), dict(frozen=True, fresh_norm=False)):
        model = video_classifier(**options)
        torch.nn.init.normal_([p for p in model.head.parameters() if p.ndim > 1][0])
        answers = [finetune.run_views(model.train(), files, cfg, 1, 1, model.answers)[0]]
        answers += [finetune.run_views(model.eval(), files, cfg, 1, 1, model.answers)[0]]
        assert torch.equal(*answers)


# ---- what the flags reach ---------------------------------------------------------------------------------------


class Caught(Exception):
    pass


def caught(monkeypatch, tmp_path, module, *flags):
    """Run a script up to its training loop.   -> the loop's arguments: model, train, draw_mask, validate, cfg, ..."""

    def stop(*arguments):
        raise Caught(arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "train_classifier" if module is finetune else "pretrain", stop)
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    with pytest.raises(Caught) as error:
        module.main()
    return error.value.args[0]


def groups(paths):
    return {str(p).split("_g")[1][:2] for p in paths}


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_the_fold_that_is_asked_for_is_the_one_that_is_read(toy, monkeypatch, tmp_path, fold):
    """The toy world here has 4 groups, and fold k tests on group k."""
    expected = {f"{g:02d}" for g in range(1, 5)} - {f"{fold:02d}"}
    assert groups(data.list_videos(toy, "val", fold).paths) == {f"{fold:02d}"}
    flags = ["--data", toy, "--fold", fold, "--frames", 4, "--workers", 0]
    assert groups(caught(monkeypatch, tmp_path, mae_video, *flags)[1].paths) == expected
    assert groups(caught(monkeypatch, tmp_path, omni, *flags, "--images", toy)[1].videos.paths) == expected
    cfg = finetune.Config(data=str(toy), model="videomae", fold=fold, frames=4, stride=1, img_size=16, sampling="dense")
    train, listed, tested = finetune.open_data(cfg)
    assert groups(train.paths) == groups(listed.paths) == expected and groups(tested.paths) == {f"{fold:02d}"}


def test_flags_of_the_video_script_reach_model_mask_and_data(toy, monkeypatch, tmp_path):
    flags = ["--data", toy, "--frames", 4, "--img-size", 32, "--patch", 8, "--mask-ratio", 0.75]
    for model, sign in (("videomae", "--norm-pix"), ("mae_st", "--no-norm-pix")):
        net, train, draw_mask, *_ = caught(monkeypatch, tmp_path, mae_video, *flags, "--model", model, sign, "--no-flip",
                                           "--min-crop", 0.9, "--crop", "multiscale", "--sampling", "segments", "--stride",
                                           3, "--repeat", 2, "--seed", 5)  # fmt: skip
        mask = draw_mask(None, 8, torch.Generator().manual_seed(0)).reshape(8, 2, 16)
        tubes = torch.equal(mask[:, 0], mask[:, 1])
        assert type(net) is mae_video.MODELS[model] and tubes == (model == "videomae") and net.norm_pix == (sign == "--norm-pix")
        got = (train.frames, train.stride, train.size, train.seed, train.sampling, train.crop, train.min_crop, train.flip)
        assert got == (4, 3, 32, 5, "segments", "multiscale", 0.9, False) and train.repeat == 2 and train.train
    for kind in ("random", "tube"):  # and what is asked for comes before the paper's
        draw_mask = caught(monkeypatch, tmp_path, mae_video, *flags, "--model", "videomae", "--mask", kind)[2]
        mask = draw_mask(None, 8, torch.Generator().manual_seed(0)).reshape(8, 2, 16)
        assert torch.equal(mask[:, 0], mask[:, 1]) == (kind == "tube")


def test_flags_of_the_other_scripts_reach_their_data(toy, monkeypatch, tmp_path):
    net, train, draw_mask, *_ = caught(monkeypatch, tmp_path, mae_image, "--data", toy, "--no-flip", "--min-crop", 0.7,
                                       "--img-size", 32, "--norm-pix", "--mask-ratio", 0.5, "--seed", 5)  # fmt: skip
    assert (train.size, train.seed, train.min_crop, train.flip, train.crop) == (32, 5, 0.7, False, "random") and net.norm_pix
    assert draw_mask(None, 2, torch.Generator()).sum(dim=1).tolist() == [8, 8]
    net, train, draw_mask, *_ = caught(monkeypatch, tmp_path, omni, "--data", toy, "--images", toy, "--flip", "--no-flip-image",
                                       "--min-crop", 0.9, "--min-crop-image", 0.4, "--norm-pix", "--img-size", 32, "--frames",
                                       4, "--mask-ratio", 0.5, "--mask-ratio-image", 0.25)  # fmt: skip
    assert (train.videos.min_crop, train.videos.flip, train.images.min_crop, train.images.flip) == (0.9, True, 0.4, False)
    assert net.norm_pix and draw_mask(torch.empty(0, 0, 0, 0), 1, torch.Generator()).sum() == 4
    assert draw_mask(torch.empty(0, 0, 0, 0, 0), 1, torch.Generator()).sum() == 16
    net, train, draw_mask, *_ = caught(monkeypatch, tmp_path, multimae, "--data", toy, "--no-flip", "--min-crop", 0.7,
                                       "--img-size", 32, "--visible", 0.25, "--workers", 0)  # fmt: skip
    assert train.min_crop == 0.7 and not train.flip and (~draw_mask(None, 2, torch.Generator())).sum(dim=1).tolist() == [12, 12]
    flags = ["--mode", "scratch", "--data", toy, "--no-flip", "--min-crop", 0.7, "--repeat", 2, "--rand-augment", 3, "--drop-path",
             0.2, "--dropout", 0.3, "--share", 0.5, "--sampling", "segments", "--frames", 4]  # fmt: skip
    net, train, *_ = caught(monkeypatch, tmp_path, finetune, *flags)
    inner = train.dataset
    assert (inner.min_crop, inner.flip, inner.repeat, inner.sampling, inner.frames) == (0.7, False, 2, "segments", 4)
    assert train.augment is not None and len(train) == 18 and net.dropout.p == 0.3
    assert math.isclose(net.encoder.blocks[-1].drop_path, 0.2, rel_tol=1e-6)
