"""The image model, what all models of pixels share, files of weights, and whole runs."""

import argparse
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import finetune
import mae_image
import mae_video
import multimae
import omni
from conftest import ROOT, TINY_IMAGE
from layouts import official_mae
from mae_image import MAE
from mae_video import MAEST, VideoMAE
from masking import random_mask
from omni import OmniMAE

SIZE = 16, 32  # height, width: 2 x 4 patches of 8 pixels, never a square
each_model = pytest.mark.parametrize(
    "kind", ["mae", "videomae", "mae_st", "omni clip", "omni image"])


def build(kind, size=SIZE, **options):
    torch.manual_seed(0)
    shape = size, 8, (24, 1, 2), (16, 1, 2)
    if kind == "mae":
        return MAE(*shape, **options)
    Model = {"videomae": VideoMAE, "mae_st": MAEST}.get(kind, OmniMAE)
    return Model(4, size, 2, *shape[1:], **options)


def sample(kind, model, batch=3, channels=3, ratio=0.5):
    g, (t, h, w) = torch.Generator().manual_seed(0), model.grid
    frames = () if kind in ("mae", "omni image") else (2 * t,)
    x = torch.randn(batch, channels, *frames, 8 * h, 8 * w, generator=g)
    return x, random_mask(batch, (t if frames else 1, h, w), ratio, g)


# ---- every model of pixels, against slow loops ---------------------------------------------------


def slow_target(kind, model, x, b, token):
    """What is to be painted of one token: the papers' formulas on a block of pixels."""
    frames = x[b] if x.ndim == 5 else x[b][:, None]  # (C, T, H, W)
    if kind in ("mae_st", "omni image"):
        frames = frames[:, [0, 3] if kind == "mae_st" else [0, 0]]
    u, slot, r, c = 1 if kind in ("mae", "mae_st") else 2, token // 8, token // 4 % 2, token % 4
    block = frames[:, slot * u : slot * u + u, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
    of_channels = kind not in ("mae", "mae_st")
    if of_channels:  # in [0, 1]
        block = torch.stack([v * s + m for v, m, s in zip(block, model.mean, model.std)])
    if model.norm_pix:
        groups = block if of_channels else block[None]
        inside, outside = (0, 1e-6) if kind == "videomae" else (1e-6, 0)
        groups = [(v - v.mean()) / ((v.var() + inside).sqrt() + outside) for v in groups]
        block = torch.stack(groups).reshape(block.shape)
    return block.permute(1, 2, 3, 0).flatten()


@each_model
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_loss_is_that_of_a_loop_over_hidden_patches(kind, norm_pix, channels):
    model = build(kind, norm_pix=norm_pix, channels=channels)
    x, mask = sample(kind, model, channels=channels)
    loss, pred = model(x, mask)
    errors = [(pred[b, k] - slow_target(kind, model, x, b, token)).square().mean()
              for b in range(3) for k, token in enumerate(mask[b].nonzero()[:, 0].tolist())]
    assert pred.shape[:2] == (3, mask[0].sum()) and len(errors) == mask.sum()
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-4)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model(torch.zeros_like(x), mask)[0].isfinite()  # flat patches have no deviation


@each_model
@pytest.mark.parametrize("channels, given", [(1, None), (3, None), (4, (0.1, 0.2, 0.3, 0.4))])
def test_pixels_are_normalised_by_channel_and_become_pictures_again(kind, channels, given):
    model = build(kind, channels=channels, mean=given, std=given)
    shape = (2, *SIZE, channels) if kind in ("mae", "omni image") else (2, 4, *SIZE, channels)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    x = model.normalize(pixels)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    usual = imagenet if channels == 3 else (0.5, 0.5)
    mean, std = (0.45, 0.225) if kind == "mae_st" else usual
    want = (pixels / 255 - torch.tensor(given or mean)) / torch.tensor(given or std)
    assert torch.allclose(x.movedim(1, -1), want, atol=1e-5)
    frames = pixels[:, None] if pixels.ndim == 4 else pixels[:, [0, 3] if kind == "mae_st" else ...]
    pictures = model.to_pictures(model.patches(x))  # (B, frames, C, H, W)
    assert torch.allclose(pictures.movedim(2, -1), frames / 255, atol=1e-5)


@each_model
def test_an_input_of_another_height_or_width_is_refused(kind):
    x, mask = sample(kind, build(kind))
    with pytest.raises(ValueError, match=r"32, 16\), but the model takes"):
        build(kind)(x.transpose(-2, -1), mask)


@each_model
def test_where_nothing_is_hidden_the_loss_is_0_and_the_encoder_sees_all(kind):
    model = build(kind)
    x, mask = sample(kind, model, ratio=0)
    loss, pred = model(x, mask)
    loss.backward()
    assert loss == 0 and pred.shape[1] == 0
    assert torch.equal(model.encode(x), model.forward_encoder(x, mask))
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@each_model
@pytest.mark.parametrize("star", ["", "*"])
def test_pictures_have_holes_where_the_mask_is_and_a_perfect_one_none(kind, star, monkeypatch):
    model = build(kind, norm_pix=star == "*")
    x, mask = sample(kind, model)
    loss, baseline, pictures, hole = mae_image.reconstruct(model, x, mask)
    target, original = model.target(x, mask), pictures["original"]
    assert math.isclose(loss, model(x, mask)[0].item(), rel_tol=1e-5)
    assert math.isclose(baseline, (target - target.mean()).square().mean().item(), rel_tol=1e-5)
    frames = {"mae": 1, "omni image": 1, "mae_st": 2}.get(kind, 4)
    assert original.shape == (3, frames, 3, *SIZE) and hole.shape == (3, frames, 1, *SIZE)
    for b, f, _, i, j in np.ndindex(hole.shape):
        slot = f * 2 // frames if frames > 1 else 0
        assert hole[b, f, 0, i, j] == mask[b, slot * 8 + i // 8 * 4 + j // 8]
    pink = torch.tensor((1.0, 0.8, 0.85))[:, None, None]
    masked, painted, pasted = (pictures[title] for title in
                               ("masked", "prediction" + star, "pasted in" + star))
    assert torch.equal(masked, torch.where(hole, pink, original))
    assert torch.equal(painted, torch.where(hole, pasted, pink))
    assert torch.equal(pasted, torch.where(hole, pasted, original))
    assert not torch.allclose(pasted, original, atol=1e-2)
    monkeypatch.setattr(model, "forward", lambda x, mask: (torch.zeros(()), target))
    pictures = mae_image.reconstruct(model, x, mask)[2]
    assert torch.allclose(pictures["pasted in" + star], original, atol=1e-4)
    nothing = pictures.get("knowing nothing*", original)  # the mean of every patch
    assert torch.allclose(nothing, original, atol=0.1) == (star == "")


@pytest.mark.parametrize("kernel", [(4, 4), (2, 4, 4)])
def test_the_patch_embedding_is_the_strided_convolution(kernel):
    embed = mae_image.PatchEmbed(kernel, 3, 10)
    x = torch.randn(2, 3, *[6] * (len(kernel) - 2), 8, 12)
    patches = mae_image.patchify(x, 4) if x.ndim == 4 else mae_video.patchify_clips(x, 2, 4)
    assert torch.allclose(embed(patches), embed.proj(x).flatten(2).transpose(1, 2), atol=1e-5)


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = MAE(32, 16, (768, 1, 12), (512, 1, 16))
    # one fused matrix, measured on the official model
    assert abs(model.blocks[0].attn.qkv.weight.std().item() - 0.0255) < 2e-4
    bound = (6 / (768 + 768)) ** 0.5  # Xavier of the flattened convolution
    assert 0.99 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert abs(model.cls_token.std().item() - 0.02) < 2e-3
    assert model.blocks[0].mlp.fc1.bias.abs().max() == 0


def test_parameter_counts_are_the_published_ones():
    """Of the official models, which count the fixed tables of 197 positions, too."""
    for size, millions, widths in (("base", 111.9, 768 + 512), ("large", 329.5, 1024 + 512)):
        with torch.device("meta"):
            count = sum(p.numel() for p in MAE(224, 16, size, (512, 8, 16)).parameters())
        assert abs((count + 197 * widths) / 1e6 - millions) < 0.06


def test_compiled_steps_equal_eager_ones():
    model = build("mae")
    imgs, mask = sample("mae", model)
    want = model(imgs, mask)
    model.compile(backend="aot_eager")  # graph capture without a compiler of machine code
    got = model(imgs, mask)
    assert torch.allclose(want[0], got[0], atol=1e-6) and torch.allclose(want[1], got[1], atol=1e-5)
    assert not any("_orig_mod" in k for k in model.state_dict())


@pytest.mark.parametrize("warmup", [1, 2, 5, 40])
def test_an_inclusive_warm_up_is_numpys_linspace(warmup):
    """VideoMAE's and MultiMAE's; one that ends between two updates does not pass the peak."""
    models = VideoMAE, multimae.MultiMAE, MAE, MAEST, OmniMAE
    assert [m.WARMUP_INCLUSIVE for m in models] == [True, True, False, False, False]
    for inclusive in (True, False):
        steps = warmup + 1 - inclusive
        rates = [mae_image.lr_at(i, 0.3, 0, warmup, 100, inclusive) for i in range(steps)]
        assert np.allclose(rates, np.linspace(0, 0.3, steps), rtol=1e-12)
        rates = [mae_image.lr_at(i, 1, 0, warmup + 0.5, 100, inclusive) for i in range(100)]
        assert rates[0] == 0 and 0.999 < max(rates) <= 1


@pytest.mark.parametrize("part", ["images", "videos"])
def test_of_objects_their_hidden_pixels_count_and_no_others(toy, part, monkeypatch):
    """Held-out samples are cropped in the middle; so are the maps that say where objects are."""
    cfg = mae_video.Config(frames=4, stride=2, sampling="dense", img_size="24x48")
    val = mae_video.ClipDataset(data.list_videos(toy, "val"), cfg, False)
    if part == "images":
        val = data.ImageDataset(data.list_images(toy, "val"), cfg, False)
    original = torch.cat([val[0, i][0] for i in range(4)]).movedim(-1, -3) / 255
    original = original.reshape(4, -1, 3, 24, 48)
    where = torch.zeros(original.shape).bool()
    for i in range(4):
        path = Path(re.sub("/(rgb|videos)/", "/object/", str(val.paths[i]))).with_suffix(".png")
        maps = torch.from_numpy(np.array(Image.open(path))).reshape(-1, 48, 48).bool()
        where[i] = maps[val.choose(len(maps))[0]][:, None, 12:36]
    objects = mae_image.object_maps(val, range(4))
    assert torch.equal(objects, where[:, :, :1])
    hole = torch.rand(objects.shape) < 0.5
    chosen, near = (where & hole)[:, :, 0], original + 0.1 * torch.rand(original.shape)
    painted = torch.where(where & hole, near, 0.123)  # wrong everywhere else
    error = sum((near - original)[:, :, c][chosen].square().sum() for c in range(3))
    variance = sum(original[:, :, c][chosen].var(correction=0) for c in range(3))
    pictures = {"original": original, "pasted in": painted}
    monkeypatch.setattr(mae_image, "reconstruct", lambda *_: (0.5, 1.0, pictures, hole))
    held_out = torch.zeros(4, *SIZE, 3, dtype=torch.uint8), None, objects
    found = mae_image.paint_held_out(build("mae"), held_out, lambda *_: None, None)
    share = pytest.approx(1 - (error / variance / chosen.sum()).item(), rel=1e-4)
    assert found == {"val_loss": 0.5, "baseline": 1.0, "object": share}


def test_one_picture_is_painted_by_a_trained_model(toy, run, refused, tmp_path):
    image = next((toy / "rgb/val").rglob("*.jpg"))
    said = refused(mae_image, "--picture", image)
    assert said.endswith("runs/mae_image/checkpoint.pt: python mae_image.py makes it")
    run(mae_image, *TINY_IMAGE, "--data", toy, "--smoke", "--norm-pix", "--img-size", "16x32")
    text = run(mae_image, "--picture", image)
    assert re.search(rf"loss \d\.\d+ \(mean prediction \d\.\d+\)\nwrote {image.stem}_painted", text)
    assert Image.open(tmp_path / f"{image.stem}_painted.png").width > 4 * 96
    (tmp_path / "x.jpg").write_text("no image")
    for name in ("gone.jpg", "x.jpg"):
        assert name in refused(mae_image, "--picture", name)


# ---- files of weights ----------------------------------------------------------------------------


def test_huggingfaces_names_of_a_decoder_old_and_new_become_the_papers():
    names = {"attention.attention.query.bias": "attn.q.bias", "output.dense.bias": "mlp.fc2.bias",
             "attention.k_proj.weight": "attn.k.weight", "attention.o_proj.bias": "attn.proj.bias"}
    names = {f"decoder.decoder_layers.0.{k}": f"decoder_blocks.0.{v}" for k, v in names.items()}
    names |= {"decoder.decoder_embed.bias": "decoder_embed.bias", "classifier.bias": "head.bias"}
    assert mae_image.rename(names, mae_image.HUGGINGFACE) == {v: v for v in names.values()}


@pytest.mark.parametrize("size, patch, heads", [
    ("small", 16, 6), ("base", 16, 12), ("large", 16, 16), ("huge", 14, 16), ((128, 2, 4), 8, 2)])
def test_a_public_file_tells_its_sizes_and_the_heads_are_a_guess(size, patch, heads):
    D, depth, _ = mae_image.ENCODERS.get(size, size)
    with torch.device("meta"):
        state = official_mae(MAE(224, patch, size, (512, 8, 16)))
    said, ours, guesses = mae_image.public_mae(state)
    assert said == {"patch": patch, "size": f"{D}x{depth}x{heads}", "decoder": "512x8x16",
                    "norm_pix": True, "img_size": "224"}
    assert guesses == ["size", "decoder", "norm_pix"] and set(ours) == set(state)


@pytest.mark.parametrize("part, new, guessed", [
    ("whole", "", ", decoder 16x1x16, norm_pix True\n"),
    ("encoder", ", the decoder starts new", "\n")])
def test_a_run_starts_from_a_public_file(toy, run, tmp_path, part, new, guessed):
    """Also where no batch can be filled: with --epochs 0 it draws what the file can paint."""
    state = official_mae(MAE(32, 8, (32, 2, 1), (16, 1, 16)))
    if part == "encoder":
        state = {k: v for k, v in state.items() if not k.startswith(mae_image.DECODER)}
    args = argparse.Namespace(lr=1.0, out=Path("x"))
    torch.save({"model": state, "args": args, "epoch": 3}, tmp_path / "mae.pth")
    flags = ["--data", toy, "--init", "mae.pth", "--workers", 0]
    text = run(mae_image, *flags, "--batch", 1000, "--epochs", 0, "--out", "drawn")
    del state["pos_embed"]
    says = f"{len(state)} tensors used{new}; guessed, for no file tells them: size 32x2x1{guessed}"
    assert f"mae.pth: {says}" in text and "done: held-out loss" in text
    assert (tmp_path / "drawn/pictures/update_000000.png").exists()
    run(mae_image, *flags, "--smoke", "--lr", 0, "--out", "trained")
    for folder in ("drawn", "trained"):  # a checkpoint even of no training
        found = weights(tmp_path / folder)["model"]
        assert all(torch.equal(found[k], v) for k, v in state.items())


@pytest.mark.parametrize("content, message", [
    ({"stranger": torch.ones(1)}, "unknown stranger"),
    ({"norm.bias": torch.ones(3)}, "size mismatch for norm.bias"),
    ({"decoder_norm.bias": None}, "no decoder_norm.bias"),
    ({"cls_token": None}, "its first names are: mask_token, patch_embed.proj.weight, "),
    ({"script": "mae_video", "config": {"model": "videomae"}, "model": {}},
     "a videomae model, written by mae_video.py"),
    ({"script": "omni", "config": {}}, "a omni model, written by omni.py")])
def test_a_wrong_file_is_refused_with_one_line(tmp_path, refused, content, message):
    if "script" not in content:
        content = official_mae(MAE(32, 8, (32, 2, 1), (16, 1, 16))) | content
        content = {k: v for k, v in content.items() if v is not None}
    torch.save(content, tmp_path / "x.pth")
    assert message in refused(mae_image, "--init", "x.pth")


def test_sizes_come_from_the_file_and_a_flag_must_not_contradict_it(straight, run, refused, toy,
                                                                    tmp_path):
    path = f"{straight[0]}/checkpoint.pt"
    flags = ["--data", toy, "--epochs", 0, "--workers", 0, "--init"]
    for flag, value, there in (("--size", "24x1x3", "24x1x2"), ("--decoder", "16x1x4", "16x1x2"),
                               ("--patch", 4, 8)):
        said = refused(mae_image, *flags, path, flag, value)
        assert f"{flag} {value}: {path} has {there}, which cannot be changed" in said
    run(mae_image, *flags, path, "--norm-pix", "--img-size", "32x64", "--preset", "gpu")
    run(mae_image, *flags[:-1], "--out", "b")  # --size nano, the same in other words:
    run(mae_image, *flags, "b/checkpoint.pt", "--size", "96x4x3", "--out", "c")
    torch.save(official_mae(MAE(32, 8, (32, 2, 4), (16, 1, 8))), tmp_path / "mae.pth")
    run(mae_image, *flags, "mae.pth", "--size", "32x2x4", "--decoder", "16x1x8", "--out", "d")


# ---- whole runs: resume, processes, faults -------------------------------------------------------


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [(x["step"], x["loss"]) for x in lines if "loss" in x]


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
    """An uninterrupted run: 8 epochs of 4 updates, a log line every 3.   -> folder, flags"""
    out = tmp_path_factory.mktemp("straight") / "run"
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 8, "--log-every", 3]
    mae_image.main([str(x) for x in [*flags, "--out", out]])
    return out, flags


def test_a_run_writes_checkpoint_log_loss_and_pictures(straight):
    folder, _ = straight
    there = {"checkpoint.pt", "log.jsonl", "loss.png", "pictures", ".lock"}
    assert set(os.listdir(folder)) == there
    assert [step for step, _ in losses(folder)] == [*range(3, 32, 3), 32]
    assert losses(folder)[-1][1] < 0.9 * losses(folder)[0][1]
    assert sorted(os.listdir(folder / "pictures")) == ["update_000000.png", "update_000032.png"]
    assert np.asarray(Image.open(folder / "pictures/update_000032.png")).std() > 20
    records = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert {"step", "val_loss", "baseline", "object"} == set(records[0]) == set(records[-1])
    assert {"step", "epoch", "loss", "lr", "samples_per_second", "data_wait"} == set(records[1])


def test_the_picture_of_the_losses_has_a_line_for_each_kind(tmp_path):
    """Where an untrained network is far above the baseline, the scale ends at 1.5 baselines."""
    log = [{"step": 0, "val_loss": 90.0, "baseline": 0.8}, {"step": 5, "loss": 0.8},
           {"step": 10, "loss": 0.4}, {"step": 10, "val_loss": 0.5, "baseline": 0.8}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    mae_image.draw_losses(tmp_path, "nothing")
    picture = np.asarray(Image.open(tmp_path / "loss.png"))
    for step, loss, color in ((6, 0.72, "8899cc"), (2, 0.8, "777777"), (10, 0.5, "cc4433"),
                              (2, 0.7, "ffffff")):
        pixel = picture[320 - round(290 * loss / 1.2), 60 + 56 * step]
        assert bytes(pixel.tolist()).hex() == color


def test_the_number_format_is_the_devices_unless_one_is_asked_for(monkeypatch):
    cfg = mae_image.Config()
    assert mae_image.choose_precision(cfg, torch.device("cpu")) == torch.float32
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
        assert mae_image.choose_precision(cfg, torch.device("cuda")) == dtype
    cfg.precision = "float16"
    assert mae_image.choose_precision(cfg, torch.device("cpu")) == torch.float16


def test_two_processes_and_accumulation_do_what_one_does_and_one_writes(straight, tmp_path):
    (reference, flags), out = straight, tmp_path / "runs/mae_image"
    command = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "mae_image.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as the tests have
    result = subprocess.run([sys.executable, "-m", *command, *map(str, flags), "--accum", "2"],
                            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and result.stdout.count("done: ") == 1, result.stderr
    # equal but for the order in which float32 numbers are added
    for (step, x), (other, y) in zip(losses(reference), losses(out), strict=True):
        assert step == other and abs(x - y) < 1e-5 * abs(x) + 1e-6
    a, b = weights(reference)["model"], weights(out)["model"]
    for k in a:  # but for key biases: their gradient is rounding noise, which Adam enlarges
        u, v = (x.chunk(3)[::2] if k.endswith("qkv.bias") else (x,) for x in (a[k], b[k]))
        assert all(torch.allclose(p, q, atol=2e-4) for p, q in zip(u, v)), k


def after_update(monkeypatch, number, act):
    """Do something in the middle of a run.   act(run)"""
    before = mae_image.Run.after_update

    def later(run, *args):
        before(run, *args)
        if run.done == number:
            act(run)

    monkeypatch.setattr(mae_image.Run, "after_update", later)


def test_a_full_disk_is_reported_and_the_previous_checkpoint_stays(toy, run, tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(run):  # no file can grow any more
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    after_update(monkeypatch, 5, fill_the_disk)
    try:
        text = run(mae_image, *TINY_IMAGE, "--data", toy, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    step = weights(tmp_path / "runs/mae_image")["step"]
    assert f"[Errno 27] File too large; the last one written is of update {step}\n" in text
    assert 1 <= step <= 5 and not list((tmp_path / "runs/mae_image").glob(".*checkpoint.pt"))


def test_a_run_continues_when_nobody_reads_what_it_says(toy, tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    mae_image.main([str(x) for x in [*TINY_IMAGE, "--data", toy, "--out", tmp_path]])
    assert weights(tmp_path)["step"] == 8  # 2 epochs x 64 images / 16


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_batch(toy, refused, tmp_path,
                                                                    monkeypatch):
    after_update(monkeypatch, 5, lambda run: run.model.mask_token.data.fill_(math.nan))
    said = refused(mae_image, *TINY_IMAGE, "--data", toy, "--log-every", 4)
    names = ", ".join(data.list_images(toy).paths[data.shuffled(0, 1, 64, 16)[1]])
    assert "the loss is nan in update 6: " in said and said.endswith(names)
    found = weights(tmp_path / "runs/mae_image")["model"]
    assert all(v.isfinite().all() for v in found.values())


def test_a_killed_worker_ends_the_run_with_one_line_and_a_checkpoint(toy, refused, tmp_path,
                                                                     monkeypatch):
    def kill_the_workers(run):
        for child in multiprocessing.active_children():
            child.kill()

    after_update(monkeypatch, 20, kill_the_workers)
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 500, "--workers", 1, "--log-every", 1000]
    said = refused(mae_image, *flags)
    assert "the loader failed: " in said and "resume with: --resume --out runs/mae_image" in said
    assert weights(tmp_path / "runs/mae_image")["step"] >= 20


def test_a_run_is_not_overwritten_and_only_resumed_as_it_is(toy, run, refused, tmp_path):
    """But its files may have moved."""
    shutil.copytree(toy / "rgb", tmp_path / "here")
    flags, out = [*TINY_IMAGE, "--data", "here", "--epochs", 1], "runs/mae_image"
    run(mae_image, *flags)
    assert f"{out} holds a run: --resume continues it" in refused(mae_image, *flags)
    said = refused(mae_image, "--resume", "--batch", 32)
    assert f"--batch 32: {out} has 16, which cannot be changed" in said
    said = refused(mae_video, "--resume", "--out", out)
    assert f"{out}/checkpoint.pt: a mae model, written by mae_image.py" in said
    (tmp_path / "here").rename(tmp_path / "there")
    assert "No such file or directory: 'here'" in refused(mae_image, "--resume")
    assert "done: " in run(mae_image, "--resume", "--data", "there", "--batch", 16)
    next((tmp_path / "there/train").rglob("*.jpg")).unlink()
    said = refused(mae_image, "--resume", "--data", "there")
    assert f"there is not the data of {out} (64 training files then, 63 now)" in said


def test_settings_of_another_version_are_refused(straight, refused, tmp_path):
    (tmp_path / "old").mkdir()
    for name, value in (("colour", "red"), ("batch", "16"), ("img_size", 16)):
        state = weights(straight[0])
        state["config"][name] = value
        torch.save(state, tmp_path / "old/checkpoint.pt")
        said = refused(mae_image, "--resume", "--out", "old")
        assert f"old says {name} = {value!r}, unknown to mae_image.py" in said


def test_a_smoke_test_makes_three_updates_and_may_be_overwritten(toy, run, refused, tmp_path):
    """A run that dies before its first checkpoint leaves nothing of it."""
    flags = [*TINY_IMAGE, "--data", toy, "--out", "x"]
    run(mae_image, *flags, "--smoke")
    assert [step for step, _ in losses(tmp_path / "x")] == [1, 2, 3]
    said = refused(mae_image, *flags, "--lr", 1e30, "--warmup", 0, "--log-every", 1000)
    assert "the loss is nan in update" in said
    assert "there is no checkpoint" in refused(mae_image, "--resume", "--out", "x")
    assert os.listdir(tmp_path / "x/pictures") == ["update_000000.png"]
    run(mae_image, *flags, "--epochs", 1)
    assert [step for step, _ in losses(tmp_path / "x")] == [1, 2, 3, 4]
    assert "x holds a run" in refused(mae_image, *flags, "--smoke")


def test_broken_files_are_named_and_counted(toy, run, tmp_path):
    shutil.copytree(toy / "rgb", tmp_path / "images")
    held_out = sorted((tmp_path / "images/val").rglob("*.jpg"))[3]
    for path in [held_out, *sorted((tmp_path / "images/train").rglob("*.jpg"))[::4]]:
        path.write_bytes(b"no image")
    text = run(mae_image, *TINY_IMAGE, "--data", "images", "--workers", 1)
    name = held_out.relative_to(tmp_path)
    assert f"held-out file {name}: broken, another file is used: Unidentified" in text
    assert len(re.findall(r"^images/train/\w+/\d+.jpg: broken, another", text, re.M)) == 16
    assert re.search(r"16 files with problems: images/train/Ball/00000.jpg", text)


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "directory: 'nowhere'"), (["--data", "."], "has no .jpg"),
    (["--img-size", 60], "image height 60 is not a multiple of 8: 56 and 64 are"),
    (["--img-size", "48x60"], "image width 60"), (["--img-size", "a"], "1 numbers are needed"),
    (["--decoder", "64x2x5"], "width 64 is not a multiple of 5"), (["--size", "giant"], "needed"),
    (["--decoder", "90x1x3"], "width 90 is not a multiple of 4"), (["--mask-ratio", 1], "[0, 1)"),
    (["--mask-ratio", 0], "hides nothing"), (["--mask-ration", 0.5], "unrecognized"),
    (["--mask", "grid", "--mask-ratio", 0.5], "not 50%"), (["--patch", 0], "too small"),
    (["--batch", 10, "--accum", 3], "must be a multiple of 3"), (["--batch", 0], "too small"),
    (["--batch", 1000], "64 training files do not fill one"), (["--lr", -1], "too small"),
    (["--init", "no.pth"], "is no checkpoint no.pth"), (["--out", "/proc/x"], "/proc/x"),
    (["--out", "x" * 300], "File name too long"), (["--device", "cuda:9"], "be used"),
    (["--init", "."], "did you mean ./check"), (["--resume"], "no checkpoint runs/mae")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    base = [] if "--data" in flags else ["--data", toy]
    assert message in refused(mae_image, *base, *flags)


@pytest.mark.parametrize("module", [mae_image, mae_video, omni, multimae, finetune])
def test_help_explains_every_flag_and_presets_are_settings(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    for part in (f"example: python {module.__name__}.py", "\ndata:\n", "\nrun:\n", "(default: 48)"):
        assert part in text
    for field in module.Config.__dataclass_fields__:
        flag = f"--{field.replace('_', '-')}"
        assert re.search(rf"^  {flag}\b[^\n]*(\n {{20,}}|  )\S", text, re.M), field
    for name, preset in module.PRESETS.items():
        module.Config(**preset)
        assert f"  {name}: " in text
