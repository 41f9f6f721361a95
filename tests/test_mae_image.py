"""The image model, what all models of pixels share, files of weights, and whole runs."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

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
from masking import random_mask

SIZE = 16, 32  # height, width: 2 x 4 patches of 8 pixels, never a square
each_model = pytest.mark.parametrize("kind", ["mae", "videomae", "mae_st", "omni", "omni image"])


def build(kind, **options):
    torch.manual_seed(0)
    shape = (SIZE, 8) if kind == "mae" else (4, SIZE, 2, 8)
    return finetune.MODELS[kind.split()[0]](*shape, (24, 1, 2), (16, 1, 2), **options)


def sample(kind, channels=3):
    g, slots = torch.Generator().manual_seed(0), 1 if kind in ("mae", "omni image") else 2
    x = torch.randn(3, channels, *[4] * (slots - 1), *SIZE, generator=g)
    return x, random_mask(3, (slots, 2, 4), 0.5, g)


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
def test_the_loss_is_that_of_a_loop_over_hidden_patches_or_0(kind, norm_pix, channels):
    model = build(kind, norm_pix=norm_pix, channels=channels)
    x, mask = sample(kind, channels)
    loss, pred = model(x, mask)
    errors = [(pred[b, k] - slow_target(kind, model, x, b, token)).square().mean()
              for b in range(3) for k, token in enumerate(mask[b].nonzero()[:, 0].tolist())]
    assert pred.shape[:2] == (3, mask[0].sum()) and len(errors) == mask.sum()
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-4)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model(torch.zeros_like(x), mask)[0].isfinite()  # flat patches have no deviation
    with pytest.raises(ValueError, match=r"32, 16\), but the model takes"):
        model(x.transpose(-2, -1), mask)
    model.zero_grad()
    mask[:] = False  # nothing is hidden: the encoder sees all
    loss, pred = model(x, mask)
    loss.backward()
    assert loss == 0 and pred.shape[1] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model.encode(x), model.forward_encoder(x, mask))


@each_model
@pytest.mark.parametrize("channels, given", [(1, None), (3, None), (4, (0.1, 0.2, 0.3, 0.4))])
def test_pixels_are_normalised_by_channel_and_become_pictures_again(kind, channels, given):
    model = build(kind, channels=channels, mean=given, std=given)
    shape = (2, *SIZE, channels) if kind in ("mae", "omni image") else (2, 4, *SIZE, channels)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    usual = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else (0.5, 0.5)
    mean, std = (0.45, 0.225) if kind == "mae_st" else usual
    x = model.normalize(pixels)
    want = (pixels / 255 - torch.tensor(given or mean)) / torch.tensor(given or std)
    assert torch.allclose(x.movedim(1, -1), want, atol=1e-5)
    frames = pixels[:, None] if pixels.ndim == 4 else pixels[:, [0, 3] if kind == "mae_st" else ...]
    pictures = model.to_pictures(model.patches(x))  # (B, frames, C, H, W)
    assert torch.allclose(pictures.movedim(2, -1), frames / 255, atol=1e-5)


@each_model
@pytest.mark.parametrize("star", ["", "*"])
def test_pictures_have_holes_where_the_mask_is_and_a_perfect_one_none(kind, star, monkeypatch):
    model, (x, mask) = build(kind, norm_pix=star == "*"), sample(kind)
    loss, baseline, pictures, hole = mae_image.reconstruct(model, x, mask)
    target, original = model.target(x, mask), pictures["original"]
    assert math.isclose(loss, model(x, mask)[0].item(), rel_tol=1e-5)
    assert math.isclose(baseline, (target - target.mean()).square().mean().item(), rel_tol=1e-5)
    frames = {"mae": 1, "omni image": 1, "mae_st": 2}.get(kind, 4)
    assert original.shape == (3, frames, 3, *SIZE) and hole.shape == (3, frames, 1, *SIZE)
    for b, f, _, i, j in np.ndindex(hole.shape):
        assert hole[b, f, 0, i, j] == mask[b, f * 2 // frames * 8 + i // 8 * 4 + j // 8]
    pink, pasted = torch.tensor((1.0, 0.8, 0.85))[:, None, None], pictures["pasted in" + star]
    assert torch.equal(pictures["masked"], torch.where(hole, pink, original))
    assert torch.equal(pictures["prediction" + star], torch.where(hole, pasted, pink))
    assert torch.equal(pasted, torch.where(hole, pasted, original))
    assert not torch.allclose(pasted, original, atol=1e-2)
    monkeypatch.setattr(model, "forward", lambda x, mask: (torch.zeros(()), target))
    pictures = mae_image.reconstruct(model, x, mask)[2]
    assert torch.allclose(pictures["pasted in" + star], original, atol=1e-4)
    nothing = pictures.get("knowing nothing*", original)  # the mean of every patch
    assert torch.allclose(nothing, original, atol=0.1) == (star == "")


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = MAE(32, 16, (768, 1, 12), (512, 1, 16))
    assert abs(model.blocks[0].attn.qkv.weight.std() - 0.0255) < 2e-4  # measured: one fused matrix
    bound = (6 / (768 + 768)) ** 0.5  # Xavier of the flattened convolution
    assert 0.99 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert abs(model.cls_token.std() - 0.02) < 2e-3 and not model.blocks[0].mlp.fc1.bias.any()


def test_compiled_steps_equal_eager_ones():
    model, (x, mask) = build("mae"), sample("mae")
    want = model(x, mask)
    model.compile(backend="aot_eager")  # graph capture without a compiler of machine code
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(want, model(x, mask), strict=True))


def test_an_inclusive_warm_up_is_numpys_linspace():
    assert {k for k, m in finetune.MODELS.items() if m.WARMUP_INCLUSIVE} == {"videomae", "multimae"}
    for warmup in (1, 2, 40):
        rates = [mae_image.lr_at(i, 0.3, 0, warmup, 100, inclusive=True) for i in range(warmup)]
        assert np.allclose(rates, np.linspace(0, 0.3, warmup), rtol=1e-12)
        rates = [mae_image.lr_at(i, 1, 0, warmup + 0.5, 100, inclusive=True) for i in range(100)]
        assert rates[0] == 0 and 0.999 < max(rates) <= 1  # also if it ends between two updates


@pytest.mark.parametrize("kind, list_files", [
    (data.ImageDataset, data.list_images), (mae_video.ClipDataset, data.list_videos)])
def test_of_objects_their_hidden_pixels_count_and_no_others(toy, kind, list_files, monkeypatch):
    cfg = mae_video.Config(frames=4, stride=2, sampling="dense", img_size="24x48")
    val = kind(list_files(toy, "val"), cfg, False)
    original = torch.cat([val[0, i][0] for i in range(4)]).movedim(-1, -3) / 255
    original = original.reshape(4, -1, 3, 24, 48)
    where = torch.zeros(4, original.shape[1], 1, 24, 48).bool()
    for i in range(4):
        path = re.sub(r"/(rgb|videos)/(.*)\.\w+$", r"/object/\2.png", val.paths[i])
        maps = torch.from_numpy(np.array(Image.open(path))).reshape(-1, 48, 48).bool()
        where[i, :, 0] = maps[val.choose(len(maps))[0]][:, 12:36]  # held-out samples: the middle
    assert torch.equal(mae_image.object_maps(val, range(4)), where)
    val.paths = data.list_images(toy / "object").paths  # other people's PNG images have none
    assert mae_image.object_maps(val, range(4)) is None
    hole, near = torch.rand(where.shape) < 0.5, original + 0.1 * torch.rand(original.shape)
    painted = torch.where(where & hole, near, 0.123)  # wrong everywhere else
    a, b = (x.movedim(2, -1)[(where & hole)[:, :, 0]] for x in (near, original))  # (pixels, 3)
    share = 1 - ((a - b).square().mean(dim=0).sum() / b.var(dim=0, correction=0).sum()).item()
    pictures = {"original": original, "pasted in": painted}
    monkeypatch.setattr(mae_image, "reconstruct", lambda *_: (0.5, 1.0, pictures, hole))
    held_out = torch.zeros(4, *SIZE, 3, dtype=torch.uint8), None, where
    found = mae_image.paint_held_out(build("mae"), held_out, lambda *_: None, None)
    assert found == {"val_loss": 0.5, "baseline": 1.0, "object": pytest.approx(share, rel=1e-4)}


@pytest.mark.parametrize("whole, says", [
    (True, "0 start new; guesses, for no file tells them: size 64x2x1, decoder 16x1x16, norm_pix"),
    (False, "31 start new; guesses, for no file tells them: size 64x2x1\n")])
def test_a_run_starts_from_a_public_file(toy, run, tmp_path, whole, says):
    state = official_mae(MAE(32, 8, (64, 2, 1), (16, 1, 16)))
    state = {k: v for k, v in state.items() if whole or not k.startswith(mae_image.DECODER)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "mae.pth")
    text = run(mae_image, "--data", toy, "--init", "mae.pth", "--batch", 1000, "--epochs", 0)
    del state["pos_embed"]  # no batch is filled, but what the file can paint is drawn
    assert f"mae.pth: {len(state)} tensors used, {says}" in text and "done: held-out loss" in text
    assert (tmp_path / "runs/mae_image/pictures/update_000000.png").exists()
    found = weights(tmp_path / "runs/mae_image")  # a checkpoint even of no training
    assert (found["config"]["img_size"], found["config"]["patch"]) == ("32", 8)
    assert all(torch.equal(found["model"][k], v) for k, v in state.items())


@pytest.mark.parametrize("change, message", [
    ({"stranger": torch.ones(1)}, "unknown stranger"),
    ({"norm.bias": torch.ones(3)}, "size mismatch for norm.bias"),
    ({"decoder_norm.bias": None}, "no decoder_norm.bias"),
    ({"cls_token": None}, "it has ['mask_token', 'patch_embed.proj.weight', "),
    ({"script": "mae_video", "config": {"model": "mae_st"}}, "a mae_st model, written by ma")])
def test_a_wrong_file_is_refused_with_one_line(tmp_path, refused, change, message):
    state = official_mae(MAE(32, 8, (32, 2, 1), (16, 1, 16))) | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "x.pth")
    assert message in refused(mae_image, "--init", "x.pth")


def records(folder, kind):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if kind in line]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
    """An uninterrupted run: 8 epochs of 4 updates, a log line every 3.   -> folder, flags"""
    out = tmp_path_factory.mktemp("straight") / "run"
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 8, "--log-every", 3]
    mae_image.main([str(x) for x in [*flags, "--out", out]])
    return out, flags


def test_a_run_writes_its_folder_and_its_file_tells_sizes(straight, toy, run, refused, tmp_path):
    folder, image = straight[0], next((toy / "rgb/val").rglob("*.jpg"))
    assert {*os.listdir(folder)} == {"checkpoint.pt", "log.jsonl", "loss.png", "pictures", ".lock"}
    losses, looks = records(folder, "loss"), records(folder, "val_loss")
    assert [x["step"] for x in losses] == [*range(3, 32, 3), 32]
    assert losses[-1]["loss"] < 0.9 * losses[0]["loss"]
    assert set(losses[0]) == {"step", "epoch", "loss", "lr", "samples_per_second", "data_wait"}
    assert [set(x) for x in looks] == [{"step", "val_loss", "baseline", "object"}] * 2
    assert sorted(os.listdir(folder / "pictures")) == ["update_000000.png", "update_000032.png"]
    assert np.asarray(Image.open(folder / "pictures/update_000032.png")).std() > 20
    last, lines = looks[-1], np.asarray(Image.open(folder / "loss.png"))[:, 615].tolist()
    for value, color in ((last["val_loss"], [204, 68, 51]), (last["baseline"], [119] * 3),
                         (losses[-1]["loss"], [136, 153, 204])):
        assert abs(lines.index(color) - 320 + 290 * value / last["baseline"] / 1.5) < 4
    flags = ["--init", folder / "checkpoint.pt", "--data", toy, "--epochs", 0, "--workers", 0]
    for flag, value, there in ("--decoder", "16x1x4", "16x1x2"), ("--patch", 4, 8):
        said = refused(mae_image, *flags, flag, value)
        assert f"{flag} {value}: {flags[1]} has {there}, which cannot be changed" in said
    run(mae_image, *flags, "--norm-pix", "--img-size", "32x64", "--preset", "gpu")
    text = run(mae_image, *flags, "--picture", image)
    assert re.search(rf"loss \d\.\d+ \(mean prediction \d\.\d+\)\nwrote {image.stem}_painted", text)
    assert Image.open(tmp_path / f"{image.stem}_painted.png").width > 4 * 96


def test_the_number_format_is_the_devices_unless_one_is_asked_for(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for new, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: new)
        assert mae_image.choose_precision(mae_image.Config(), cuda) == dtype
    assert mae_image.choose_precision(mae_image.Config(), cpu) == torch.float32
    assert mae_image.choose_precision(mae_image.Config(precision="float16"), cpu) == torch.float16


def test_two_processes_and_accumulation_do_what_one_does_and_one_writes(straight, tmp_path):
    (reference, flags), out = straight, tmp_path / "runs/mae_image"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               ROOT / "mae_image.py", *map(str, flags), "--accum", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and result.stdout.count("done: ") == 1, result.stderr
    # equal but for the order in which float32 numbers are added
    for x, y in zip(records(reference, "loss"), records(out, "loss"), strict=True):
        assert x["step"] == y["step"] and math.isclose(x["loss"], y["loss"], rel_tol=1e-5)
    a, b = weights(reference)["model"], weights(out)["model"]
    for k in a:  # but for key biases: their gradient is rounding noise, which Adam enlarges
        u, v = (x.chunk(3)[::2] if k.endswith("qkv.bias") else (x,) for x in (a[k], b[k]))
        assert all(torch.allclose(p, q, atol=2e-4) for p, q in zip(u, v)), k


def test_a_full_disk_is_told_and_the_old_checkpoint_stays(toy, run, tmp_path, monkeypatch):
    size, limits = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    def log_losses(run, lr):
        if run.done == 5:  # from now on no file can grow beyond 4096 bytes
            resource.setrlimit(size, (4096, limits[1]))
    monkeypatch.setattr(mae_image.Run, "log_losses", log_losses)
    try:
        text = run(mae_image, *TINY_IMAGE, "--data", toy, code=1)
    finally:  # at once: pytest's own output may go to a file
        resource.setrlimit(size, limits)
    step = weights(folder := tmp_path / "runs/mae_image")["step"]
    assert f"[Errno 27] File too large; the last one written is of update {step}\n" in text
    assert 1 <= step < 5 and not list(folder.glob(".*checkpoint.pt"))


def test_a_killed_worker_ends_the_run_with_a_checkpoint(toy, refused, tmp_path, monkeypatch):
    read = data.ImageDataset.__getitem__
    def kill(self, key):  # a worker that reads for update 21
        return os.kill(os.getpid(), signal.SIGKILL) if key[0] == 5 else read(self, key)
    monkeypatch.setattr(data.ImageDataset, "__getitem__", kill)
    monkeypatch.setattr(sys, "stdout", open(os.devnull))  # no line can be written: it continues
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 6, "--log-every", 1000]
    said = refused(mae_image, *flags, "--workers", 1)
    assert "the loader failed: " in said and "continued by: --resume --out runs/mae_image" in said
    assert weights(tmp_path / "runs/mae_image")["step"] >= 16


def test_broken_files_are_named_and_a_run_is_only_resumed_as_it_is(toy, run, refused, tmp_path):
    shutil.copytree(toy / "rgb", tmp_path / "here")
    held_out = sorted((tmp_path / "here/val").rglob("*.jpg"))[3].relative_to(tmp_path)
    for path in [held_out, *sorted((tmp_path / "here/train").rglob("*.jpg"))[::4]]:
        (tmp_path / path).write_bytes(b"no image")
    flags, out = [*TINY_IMAGE, "--data", "here", "--epochs", 1], "runs/mae_image"
    text = run(mae_image, *flags, "--workers", 1)
    assert f"held-out file {held_out}: broken, another file is used: Unidentified" in text
    assert len(re.findall(r"^here/train/\w+/\d+.jpg: broken, another", text, re.M)) == 16
    assert f"{out} holds a run: --resume continues it" in refused(mae_image, *flags)
    assert f"--batch 32: {out} has 16, which" in refused(mae_image, "--resume", "--batch", 32)
    (tmp_path / "here").rename(tmp_path / "there")  # which is allowed
    assert "No such file or directory: 'here'" in refused(mae_image, "--resume")
    assert "done: " in run(mae_image, "--resume", "--data", "there", "--batch", 16)
    next((tmp_path / "there/train").rglob("*.jpg")).unlink()
    said = refused(mae_image, "--resume", "--data", "there")
    assert f"there is not the data of {out} (64 training files then, 63 now)" in said
    for name, value in (("colour", "red"), ("batch", "16"), ("img_size", 16)):  # another version's
        torch.save(weights(tmp_path / out) | {"config": {name: value}}, tmp_path / "checkpoint.pt")
        said = refused(mae_image, "--resume", "--out", ".")
        assert f". says {name} = {value!r}, unknown to mae_image.py" in said


def test_a_smoke_test_is_overwritten_and_a_loss_of_nan_is_not_saved(toy, run, refused, tmp_path):
    flags, out = [*TINY_IMAGE, "--data", toy, "--out", "x", "--log-every"], tmp_path / "x"
    run(mae_image, *flags, 1, "--smoke")
    assert [x["step"] for x in records(out, "loss")] == [1, 2, 3]
    names = ", ".join(data.list_images(toy).paths[data.shuffled(0, 0, 64, 16)[1]])
    for every in (1000, 1):  # only then there is a checkpoint, of the first update
        said = refused(mae_image, *flags, every, "--lr", 1e30, "--warmup", 0)
        assert "the loss is nan in update 2: " in said and said.endswith(names)
        assert (out / "checkpoint.pt").exists() == (every == 1)
    assert [x["step"] for x in records(out, "loss")] == [1] and weights(out)["step"] == 1
    assert all(x.isfinite().all() for x in weights(out)["model"].values())
    assert "x holds a run" in refused(mae_image, *flags, 1, "--smoke")


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "directory: 'nowhere'"), (["--data", "."], "has no .jpg"),
    (["--img-size", "48x60"], "image width 60 is not a multiple of 8: 56 and 64 are"),
    (["--decoder", "64x2x5"], "64 is not a multiple of 5"), (["--init", "."], ". is no file"),
    (["--decoder", "90x1x3"], "width 90 is not a multiple of 4"), (["--lr", -1], "too small"),
    (["--batch", 1000], "64 training files do not fill one"), (["--device", "cuda:9"], "be used"),
    (["--mask", "grid", "--mask-ratio", 0.5], "hides 75 %"), (["--out", "/proc/x"], "/proc/x"),
    (["--mask-ratio", 0], "hides nothing"), (["--picture", "x"], "/checkpoint.pt is no file")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(mae_image, "--data", toy, *flags)


@pytest.mark.parametrize("module", [mae_image, mae_video, omni, multimae, finetune])
def test_help_explains_every_flag_and_presets_are_settings(module, run):
    text = run(module, "--help")
    assert f"example: python {module.__name__}.py" in text and "(default: 48)" in text
    for field in module.Config.__dataclass_fields__:
        flag = f"--{field.replace('_', '-')}"
        assert re.search(rf"^  {flag}\b[^\n]*(\n {{20,}}|  )\S", text, re.M), field
    for name, preset in module.PRESETS.items():
        module.Config(**preset)
        assert f"preset {name}: " in text
