"""The image model, what all models of pixels share, files of weights, and the training loop."""

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
import torchvision
from PIL import Image

import data
import finetune
import mae_image
import mae_video
import multimae
import omni
from conftest import ROOT, TINY_IMAGE, copy_encoder
from layouts import official_mae
from mae_image import MAE
from mae_video import MAEST, VideoMAE
from masking import random_mask
from omni import OmniMAE

PIXEL_MODELS = ["mae", "videomae", "mae_st", "omni clip", "omni image"]
SIZE = 16, 32  # height, width: 2 x 4 patches of 8 pixels, never a square


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


@pytest.mark.parametrize("kind", PIXEL_MODELS)
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


@pytest.mark.parametrize("kind", PIXEL_MODELS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_normalised_pixels_become_pictures_again(kind, channels):
    model = build(kind, channels=channels)
    shape = (2, *SIZE, channels) if kind in ("mae", "omni image") else (2, 4, *SIZE, channels)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    pictures = model.to_pictures(model.patches(model.normalize(pixels)))  # (B, frames, C, H, W)
    frames = pixels[:, None] if pixels.ndim == 4 else pixels[:, [0, 3] if kind == "mae_st" else ...]
    assert torch.allclose(pictures.movedim(2, -1), frames / 255, atol=1e-5)


@pytest.mark.parametrize("kind", PIXEL_MODELS)
def test_mean_and_deviation_are_the_papers_unless_they_are_given(kind):
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for channels, usual in ((3, imagenet), (4, ((0.5,) * 4, (0.5,) * 4))):
        want = ((0.45,) * channels, (0.225,) * channels) if kind == "mae_st" else usual
        model = build(kind, channels=channels)
        assert (model.mean, model.std) == want
    own = build(kind, channels=2, mean=(0.1, 0.2), std=(0.3, 0.4))
    assert (own.mean, own.std) == ((0.1, 0.2), (0.3, 0.4))


@pytest.mark.parametrize("kind", PIXEL_MODELS)
@pytest.mark.parametrize("size", [(32, 16), (16, 16), (16, 40), (8, 64)])
def test_an_input_of_another_height_or_width_is_refused(kind, size):
    model = build(kind)
    x, mask = sample(kind, model)
    with pytest.raises(ValueError, match=rf"{size[0]}, {size[1]}\), but the model takes"):
        model(torch.zeros(*x.shape[:-2], *size), mask)


@pytest.mark.parametrize("kind", PIXEL_MODELS)
def test_hidden_pixels_do_not_reach_the_encoder(kind):
    model = build(kind)
    x, mask = sample(kind, model)
    other = torch.randn(x.shape)
    for b, token in (~mask).nonzero().tolist():  # visible pixels are equal
        slot, r, c = token // 8, token // 4 % 2, token % 4
        place = (b, slice(None), *[slice(2 * slot, 2 * slot + 2)] * (x.ndim == 5),
                 slice(8 * r, 8 * r + 8), slice(8 * c, 8 * c + 8))
        other[place] = x[place]
    assert torch.equal(model.forward_encoder(x, mask), model.forward_encoder(other, mask))
    assert not torch.allclose(model.encode(x), model.encode(other))


@pytest.mark.parametrize("kind", PIXEL_MODELS)
def test_where_nothing_is_hidden_the_loss_is_0_and_the_encoder_sees_all(kind):
    model = build(kind)
    x, mask = sample(kind, model, ratio=0)
    loss, pred = model(x, mask)
    loss.backward()
    assert loss == 0 and pred.shape[1] == 0
    assert torch.equal(model.encode(x), model.forward_encoder(x, mask))
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", PIXEL_MODELS)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_pictures_have_their_holes_where_the_mask_is(kind, norm_pix):
    model = build(kind, norm_pix=norm_pix)
    x, mask = sample(kind, model)
    x = x.clamp(-1, 1)
    loss, baseline, pictures, hole = mae_image.reconstruct(model, x, mask)
    target, star = model.target(x, mask), "*" * norm_pix
    assert math.isclose(loss, model(x, mask)[0].item(), rel_tol=1e-5)
    assert math.isclose(baseline, (target - target.mean()).square().mean().item(), rel_tol=1e-5)
    original = pictures["original"]
    frames = {"mae": 1, "omni image": 1, "mae_st": 2}.get(kind, 4)
    assert original.shape == (3, frames, 3, *SIZE) and hole.shape == (3, frames, 1, *SIZE)
    for b, f, _, i, j in np.ndindex(hole.shape):
        slot = f * 2 // frames if frames > 1 else 0
        assert hole[b, f, 0, i, j] == mask[b, slot * 8 + i // 8 * 4 + j // 8]
    hole = hole.expand_as(original)
    pink = torch.tensor((1.0, 0.8, 0.85))[:, None, None].expand_as(original)
    titles = ["masked", f"prediction{star}", f"pasted in{star}"]
    masked, painted, pasted = (pictures[title] for title in titles)
    assert torch.equal(masked[~hole], original[~hole]) and torch.equal(masked[hole], pink[hole])
    assert torch.equal(painted[~hole], pink[~hole]) and torch.equal(painted[hole], pasted[hole])
    assert torch.equal(pasted[~hole], original[~hole])
    assert not torch.allclose(pasted[hole], original[hole], atol=1e-2)


@pytest.mark.parametrize("kind", PIXEL_MODELS)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_prediction_gives_the_original_back(kind, norm_pix, monkeypatch):
    model = build(kind, norm_pix=norm_pix)
    x, mask = sample(kind, model)
    perfect = torch.zeros(()), model.target(x, mask)
    monkeypatch.setattr(model, "forward", lambda x, mask: perfect)
    pictures = mae_image.reconstruct(model, x, mask)[2]
    assert torch.allclose(pictures["pasted in" + "*" * norm_pix], pictures["original"], atol=1e-4)
    assert ("knowing nothing*" in pictures) == norm_pix  # the mean of every patch
    if norm_pix:
        assert not torch.allclose(pictures["knowing nothing*"], pictures["original"], atol=0.1)


@pytest.mark.parametrize("kind", PIXEL_MODELS)
def test_the_loss_falls(kind):
    model = build(kind, norm_pix=False)
    x, _ = sample(kind, model, batch=32)
    color = torch.rand(32, 3, *[1] * (x.ndim - 2), generator=torch.Generator().manual_seed(0))
    x = (4 * color - 2 + torch.linspace(-0.5, 0.5, 32)).expand_as(x)
    optimizer, losses = torch.optim.AdamW(mae_image.param_groups(model, 0.05), 1e-2), []
    for step in range(60):
        g, shape = torch.Generator().manual_seed(step), (model.grid[0] ** (x.ndim - 4), 2, 4)
        loss, _ = model(x, random_mask(32, shape, 0.5, g))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * model.patches(x).var().item() < 0.2 * losses[0]


# ---- MAE: parts, and well-known modules ----------------------------------------------------------


@pytest.mark.parametrize("length, message", [(60, "56 and 64 are"), (5, "8 and 16 are")])
def test_a_side_that_cannot_be_cut_evenly_is_refused_with_the_next_ones(length, message):
    with pytest.raises(ValueError, match=f"image width {length} is not a multiple of 8: {message}"):
        MAE((16, length), 8, (24, 1, 2), (16, 1, 2))


@pytest.mark.parametrize("kernel", [(4, 4), (2, 4, 4)])
def test_the_patch_embedding_is_the_strided_convolution(kernel):
    embed = mae_image.PatchEmbed(kernel, 3, 10)
    x = torch.randn(2, 3, *[6] * (len(kernel) - 2), 8, 12)
    patches = mae_image.patchify(x, 4) if x.ndim == 4 else mae_video.patchify_clips(x, 2, 4)
    assert torch.allclose(embed(patches), embed.proj(x).flatten(2).transpose(1, 2), atol=1e-5)


def test_positions_have_the_column_in_the_first_half_and_the_row_in_the_second():
    table = mae_image.sincos_2d(16, 3, 5)
    for r, c, k in np.ndindex(3, 5, 4):
        token, omega = table[r * 5 + c], 10000 ** (-k / 4)
        want = [f(omega * place) for place in (c, r) for f in (math.sin, math.cos)]
        assert np.allclose(token[k::4], want, atol=1e-6)


@pytest.mark.parametrize("kind", ["mae", "videomae"])
def test_the_encoder_is_torchvisions_vision_transformer(kind):
    model, vit = build(kind), torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 96).eval()
    cls = model.cls_token.expand(3, -1, -1) if kind == "mae" else torch.empty(3, 0, 24)
    pos = torch.cat([torch.zeros(1, cls.shape[1], 24), model.pos_embed], dim=1)
    vit.encoder.pos_embedding = torch.nn.Parameter(pos)
    copy_encoder(model, vit.encoder)
    x, _ = sample(kind, model)
    tokens = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    assert torch.allclose(model.encode(x), vit.encoder(torch.cat([cls, tokens], dim=1)), atol=1e-5)


def test_the_best_constant_for_normalised_patches_has_a_loss_of_almost_one():
    model = build("mae")
    baseline = mae_image.reconstruct(model, *sample("mae", model, batch=64))[1]
    assert abs(baseline - 191 / 192) < 1e-4  # unbiased variance of 192 numbers


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = MAE(32, 16, (768, 1, 12), (512, 1, 16))
    std = model.blocks[0].attn.qkv.weight.std().item()
    assert abs(std - 0.0255) < 2e-4  # one fused matrix, measured on the official model
    bound = (6 / (768 + 768)) ** 0.5  # Xavier of the flattened convolution
    assert 0.99 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert abs(model.cls_token.std().item() - 0.02) < 2e-3
    assert model.blocks[0].mlp.fc1.bias.abs().max() == 0


@pytest.mark.parametrize("size, millions, widths", [
    ("base", 111.9, 768 + 512), ("large", 329.5, 1024 + 512)])
def test_parameter_counts_are_the_published_ones(size, millions, widths):
    """Of the official models, which count the fixed tables of 197 positions, too."""
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
    rates = [mae_image.lr_at(step, 0.3, 0, warmup, 100, inclusive=True) for step in range(warmup)]
    assert np.allclose(rates, np.linspace(0, 0.3, warmup), rtol=1e-12)
    rates = [mae_image.lr_at(step, 0.3, 0.1, warmup, 100) for step in range(warmup + 1)]
    assert np.allclose(rates, np.linspace(0, 0.3, warmup + 1), rtol=1e-12)


@pytest.mark.parametrize("inclusive", [True, False])
def test_a_warm_up_that_ends_between_two_updates_does_not_pass_the_peak(inclusive):
    rates = [mae_image.lr_at(step, 1.0, 0.0, 2.5, 100, inclusive) for step in range(100)]
    assert rates[0] == 0 and 0.999 < max(rates) <= 1


def test_the_warm_up_is_inclusive_where_the_public_code_uses_linspace():
    models = VideoMAE, multimae.MultiMAE, MAE, MAEST, OmniMAE
    assert [m.WARMUP_INCLUSIVE for m in models] == [True, True, False, False, False]


# ---- numbers and pictures of held-out data -------------------------------------------------------


def test_explained_is_the_share_of_the_variance_as_in_a_loop():
    original, painted = torch.rand(2, 2, 3, 3, 4, 5)
    where = torch.rand(2, 3, 1, 4, 5) < 0.4
    places = [(b, f, slice(None), i, j) for b, f, _, i, j in where.nonzero().tolist()]
    values = torch.stack([original[p] for p in places])
    mean = values.mean(dim=0)
    error = sum((painted[p] - original[p]).square().sum() for p in places)
    want = 1 - error / (values - mean).square().sum()
    assert math.isclose(mae_image.explained(painted, original, where), want, rel_tol=1e-5)
    assert mae_image.explained(original, original, where) == 1
    flat = mean[:, None, None].expand_as(original)
    assert abs(mae_image.explained(flat, original, where)) < 1e-6


@pytest.mark.parametrize("size", [(48, 48), (24, 48)])
@pytest.mark.parametrize("part", ["images", "videos"])
def test_of_objects_their_hidden_pixels_count_and_no_others(toy, size, part, monkeypatch):
    """Held-out samples are cropped in the middle; so are the maps that say where objects are."""
    if part == "images":
        val = data.ImageDataset(data.list_images(toy, "val"), size, 0, train=False)
    else:
        val = mae_video.ClipDataset(data.list_videos(toy, "val"), 4, 2, size, 0, train=False)
    original = torch.cat([val[0, i][0] for i in range(4)]).movedim(-1, -3) / 255
    original = original[:, None] if part == "images" else original
    where, top = torch.zeros(original.shape).bool(), (48 - size[0]) // 2
    for i in range(4):
        path = Path(re.sub("/(rgb|videos)/", "/object/", str(val.paths[i]))).with_suffix(".png")
        maps = torch.from_numpy(np.array(Image.open(path))).reshape(-1, 48, 48).bool()
        where[i] = maps[val.choose(len(maps))[0]][:, None, top : top + size[0]]
    objects = mae_image.object_maps(val, range(4))
    assert torch.equal(objects, where[:, :, :1])
    hole = torch.rand(objects.shape) < 0.5
    painted = torch.where(where & hole, original, 0.123)  # wrong everywhere else
    pictures = {"original": original, "pasted in": painted}
    monkeypatch.setattr(mae_image, "reconstruct", lambda *_: (0.5, 1.0, pictures, hole))
    sample = torch.zeros(4, *SIZE, 3, dtype=torch.uint8), None, objects
    found = mae_image.paint_held_out(build("mae"), sample, lambda *_: None, None)
    assert found == {"val_loss": 0.5, "baseline": 1.0, "object": 1.0}
    val.paths = np.array(["elsewhere/x.jpg"])
    assert mae_image.object_maps(val, [0]) is None


def test_held_out_samples_and_masks_are_always_the_same_and_some_are_hidden(toy):
    val, draws = data.ImageDataset(data.list_images(toy, "val"), SIZE, 0, train=False), []

    def draw_mask(batch, rows, generator):
        draws.append(batch.shape)
        return random_mask(rows, (1, 2, 4), 0.5, generator)

    a, b = (mae_image.held_out(val, draw_mask, 3, 5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and draws[0] == (5, *SIZE, 3)
    assert torch.equal(a[0], torch.cat([val[0, i][0] for i in (0, 3, 7, 11, 15)]))
    assert not torch.equal(a[1], mae_image.held_out(val, draw_mask, 4, 5)[1])
    with pytest.raises(ValueError, match="hides nothing"):
        mae_image.held_out(val, lambda batch, rows, g: random_mask(rows, (1, 2, 4), 0, g), 3, 5)
    val.read = lambda i, generator: (torch.empty(1, 2**24, dtype=torch.uint8), "")
    assert len(mae_image.held_out(val, draw_mask, 3, 64)[0]) == 6  # large samples: only a few


@pytest.mark.parametrize("flags", [[], ["--norm-pix", "--img-size", "16x32"]])
def test_one_picture_is_painted_by_a_trained_model(toy, run, refused, tmp_path, flags):
    image = next((toy / "rgb/val").rglob("*.jpg"))
    said = refused(mae_image, "--picture", image)
    assert said.endswith("runs/mae_image/checkpoint.pt: python mae_image.py makes it")
    run(mae_image, *TINY_IMAGE, "--data", toy, "--smoke", *flags)
    text = run(mae_image, "--picture", image)
    assert re.search(rf"loss \d\.\d+ \(mean prediction \d\.\d+\)\nwrote {image.stem}_painted", text)
    assert Image.open(tmp_path / f"{image.stem}_painted.png").width > 4 * 96


@pytest.mark.parametrize("name", ["gone.jpg", "x.jpg"])
def test_a_picture_that_cannot_be_read_is_one_line(toy, run, refused, tmp_path, name):
    run(mae_image, *TINY_IMAGE, "--data", toy, "--smoke")
    (tmp_path / "x.jpg").write_text("no image")
    assert name in refused(mae_image, "--picture", name)


# ---- files of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("theirs, ours", [
    ("vit.embeddings.cls_token", "cls_token"), ("decoder.mask_token", "mask_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"), ("vit.layernorm.bias", "norm.bias"),
    ("videomae.embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
    ("vit.encoder.layer.11.layernorm_before.weight", "blocks.11.norm1.weight"),
    ("vit.layers.11.layernorm_after.bias", "blocks.11.norm2.bias"),
    ("vit.layers.0.attention.q_proj.weight", "blocks.0.attn.q.weight"),
    ("vit.encoder.layer.0.attention.attention.key.bias", "blocks.0.attn.k.bias"),
    ("videomae.encoder.layer.0.attention.attention.v_bias", "blocks.0.attn.v.bias"),
    ("vit.encoder.layer.0.attention.output.dense.weight", "blocks.0.attn.proj.weight"),
    ("vit.layers.0.attention.o_proj.weight", "blocks.0.attn.proj.weight"),
    ("vit.encoder.layer.0.intermediate.dense.bias", "blocks.0.mlp.fc1.bias"),
    ("decoder.decoder_embed.weight", "decoder_embed.weight"),
    ("decoder.decoder_layers.0.attention.attention.query.bias", "decoder_blocks.0.attn.q.bias"),
    ("decoder.decoder_layers.0.output.dense.bias", "decoder_blocks.0.mlp.fc2.bias"),
    ("decoder.decoder_pos_embed", "decoder_pos_embed"), ("classifier.bias", "head.bias"),
    ("blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc1.bias"), ("decoder.head.bias", "decoder.head.bias")])
def test_huggingfaces_names_old_and_new_become_the_papers(theirs, ours):
    assert mae_image.rename({theirs: 1}, mae_image.HUGGINGFACE) == {ours: 1}


def test_separate_q_k_and_v_are_fused_and_a_missing_key_bias_is_zero():
    parts = {x: torch.randn(4, 4) for x in "qkv"}
    state = {f"b.attn.{x}.weight": w for x, w in parts.items()} | {"other": parts["q"]}
    state |= {"b.attn.q_bias": torch.ones(4), "b.attn.v_bias": torch.ones(4) * 2}
    found = mae_image.fuse_qkv(state)
    assert set(found) == {"b.attn.qkv.weight", "b.attn.qkv.bias", "other"}
    assert torch.equal(found["b.attn.qkv.weight"], torch.cat([parts[x] for x in "qkv"]))
    assert found["b.attn.qkv.bias"].tolist() == [1] * 4 + [0] * 4 + [2] * 4
    for lost in ("b.attn.k.weight", "b.attn.v.weight", "b.attn.v_bias"):
        fused = mae_image.fuse_qkv({k: v for k, v in state.items() if k != lost})
        assert f"b.attn.qkv.{lost.replace('_', '.').split('.')[-1]}" not in fused


@pytest.mark.parametrize("place", ["", "model", "module", "model_state", "state_dict",
                                   "model_state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "_orig_mod.module.",
                                    "module._orig_mod.", "model._orig_mod."])
def test_weights_are_found_where_public_code_puts_them(place, prefix):
    state = {f"{prefix}a.weight": torch.ones(2), f"{prefix}module.b": torch.zeros(1), "epoch": 3}
    content = {place: state, "args": {"lr": 1}} if place else state
    assert set(mae_image.unwrap(content)) == {"a.weight", "module.b"}


def test_weights_are_copied_by_name_or_not_at_all():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "pos_embed": torch.ones(9)}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for more, fresh, message in (
            ({"0.weight": torch.ones(2, 2)}, ["1."], r"0.weight \(2, 2\), here \(3, 2\)$"),
            ({"x": torch.ones(1), "y": torch.ones(1)}, ["1."], "unknown x; unknown y"),
            ({}, [], "no 1.weight; no 1.bias")):
        with pytest.raises(ValueError, match=message):
            mae_image.load_into(model, state | more, fresh)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    found = mae_image.load_into(model, state, ["1."])
    assert found == (2, ["1.weight", "1.bias"], ["pos_embed"])
    assert (model[0].weight == 1).all() and torch.equal(model[1].weight, before["1.weight"])


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
    encoder = {k: v for k, v in state.items() if not k.startswith(mae_image.DECODER)}
    said, _, guesses = mae_image.public_mae(encoder)
    assert "decoder" not in said and guesses == ["size"]
    for lost in ("cls_token", "patch_embed.proj.weight"):
        assert mae_image.public_mae({k: v for k, v in state.items() if k != lost}) is None


@pytest.mark.parametrize("part", ["whole", "encoder"])
def test_a_run_starts_from_a_public_file_with_or_without_decoder(toy, run, tmp_path, part):
    """Also where no batch can be filled: with --epochs 0 it draws what the file can paint."""
    state = official_mae(MAE(32, 8, (32, 2, 1), (16, 1, 16)))
    if part == "encoder":
        state = {k: v for k, v in state.items() if not k.startswith(mae_image.DECODER)}
    args = argparse.Namespace(lr=1.0, out=Path("x"))
    torch.save({"model": state, "args": args, "epoch": 3}, tmp_path / "mae.pth")
    flags = ["--data", toy, "--init", "mae.pth", "--workers", 0]
    text = run(mae_image, *flags, "--batch", 1000, "--epochs", 0, "--out", "drawn")
    new = {"whole": "", "encoder": ", the decoder starts new"}[part]
    guessed = {"whole": ", decoder 16x1x16, norm_pix True\n", "encoder": "\n"}[part]
    count = sum("pos_embed" not in k for k in state)
    assert f"mae.pth: {count} tensors used{new}; guessed, for no file tells them: size 32x2x1" \
        f"{guessed}" in text and "done: held-out loss" in text
    assert (tmp_path / "drawn/pictures/update_000000.png").exists()
    drawn = weights(tmp_path / "drawn")["model"]  # a checkpoint all the same: of no training
    assert all(torch.equal(drawn[k], v) for k, v in state.items() if "pos_embed" not in k)
    run(mae_image, *flags, "--smoke", "--lr", 0, "--out", "trained")
    found = weights(tmp_path / "trained")["model"]
    assert all(torch.equal(found[k], v) for k, v in state.items() if "pos_embed" not in k)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("content, message", [
    ("cut off", "damaged, cut off"), ("hello", "or no checkpoint"), ("", "or no checkpoint at all"),
    (None, "there is no checkpoint"), ("folder", "did you mean x.pth/checkpoint.pt?"),
    ([1], "or no checkpoint at all"), ({"evil": Evil()}, "Python code"), ({"stranger": 1}, "unknown stranger"),
    ({"norm.bias": None}, "no norm.bias"), ({"decoder_norm.bias": None}, "no decoder_norm.bias"),
    ({"script": "mae_video", "config": {"model": "videomae"}, "model": {}},
     "a videomae model, written by mae_video.py"),
    ({"script": "omni", "config": {}}, "a omni model, written by omni.py"),
    ({"cls_token": None}, "known here (mae, as their papers' code or HuggingFace wrote it); its "
                          "first names are: mask_token, patch_embed.proj.weight, "),
    ({"model": "mae_vit_base", "epoch": 3}, "its first names are: model, epoch")])
def test_a_wrong_file_is_refused_with_one_line(tmp_path, refused, content, message):
    path, state = tmp_path / "x.pth", official_mae(MAE(32, 8, (32, 2, 1), (16, 1, 16)))
    if content == "folder":
        path.mkdir()
    elif content == "cut off":
        torch.save({"model": state}, path)
        path.write_bytes(path.read_bytes()[:9000])
    elif isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, dict) and not content.keys() & {"script", "model"}:
        content = {k: torch.ones(1) if v == 1 else v for k, v in content.items()}
        torch.save({k: v for k, v in (state | content).items() if v is not None}, path)
    elif content is not None:
        torch.save(content, path)
    assert message in refused(mae_image, "--init", "x.pth") and not (tmp_path / "hacked").exists()


def test_sizes_come_from_the_file_and_a_flag_must_not_contradict_it(straight, run, refused, toy):
    flags = ["--data", toy, "--init", straight[0] / "checkpoint.pt", "--epochs", 0, "--workers", 0]
    for flag, value, there in (("--size", "24x1x3", "24x1x2"), ("--decoder", "16x1x4", "16x1x2"),
                               ("--patch", 4, 8)):
        said = refused(mae_image, *flags, flag, value)
        path = f"{straight[0]}/checkpoint.pt"
        assert f"{flag} {value}: {path} has {there}, which cannot be changed" in said
    run(mae_image, *flags, "--size", "24x1x2", "--norm-pix", "--out", "a")
    run(mae_image, *flags, "--img-size", "32x64", "--preset", "gpu", "--out", "b")


def test_a_flag_may_say_what_the_file_says_in_other_words(toy, run):
    flags = ["--data", toy, "--smoke", "--workers", 0]
    run(mae_image, *flags, "--out", "a")
    run(mae_image, *flags, "--init", "a/checkpoint.pt", "--size", "96x4x3", "--out", "b")


def test_a_flag_may_correct_what_is_only_a_guess(toy, run, tmp_path):
    torch.save(official_mae(MAE(32, 8, (32, 2, 4), (16, 1, 8))), tmp_path / "mae.pth")
    run(mae_image, "--data", toy, "--init", "mae.pth", "--epochs", 0, "--workers", 0,
        "--size", "32x2x4", "--decoder", "16x1x8")


# ---- the loop: order, resume, processes, faults --------------------------------------------------


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [(x["step"], x["loss"]) for x in lines if "loss" in x]


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def same_state(a, b):
    a, b = weights(a), weights(b)
    moments = [x["optimizer"]["state"].values() for x in (a, b)]
    assert moments[0] and a["step"] > 0
    same = all(torch.equal(x[k], y[k]) for x, y in zip(*moments, strict=True) for k in x)
    same &= all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    return same and a["step"] == b["step"]


def close_runs(a, b):
    """Equal but for the order in which float32 numbers are added."""
    for (step, x), (other, y) in zip(losses(a), losses(b), strict=True):
        assert step == other and abs(x - y) < 1e-5 * abs(x) + 1e-6
    a, b = weights(a)["model"], weights(b)["model"]
    for k in a:  # but for key biases: their gradient is rounding noise, which Adam enlarges
        u, v = (x.chunk(3)[::2] if k.endswith("qkv.bias") else (x,) for x in (a[k], b[k]))
        for p, q in zip(u, v):
            assert torch.allclose(p, q, atol=2e-4), (k, (p - q).abs().max())


def start(tmp_path, *flags, before=()):
    """A script in a process group of its own, with one thread, as the tests have."""
    command = [sys.executable, *before, ROOT / "mae_image.py", *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, env=env,
                            stderr=subprocess.STDOUT, start_new_session=True)


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
    """An uninterrupted run: 8 epochs of 4 updates, a log line every 3."""
    out = tmp_path_factory.mktemp("straight") / "run"
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 8, "--log-every", 3]
    mae_image.main([str(x) for x in [*flags, "--out", out]])
    return out, flags


def test_a_run_writes_checkpoint_log_loss_and_pictures(straight):
    folder, _ = straight
    there = {"checkpoint.pt", "log.jsonl", "loss.png", "pictures", ".lock"}
    assert set(os.listdir(folder)) == there
    assert [step for step, _ in losses(folder)] == [*range(3, 32, 3), 32]
    assert sorted(os.listdir(folder / "pictures")) == ["update_000000.png", "update_000032.png"]
    assert np.asarray(Image.open(folder / "pictures/update_000032.png")).std() > 20
    records = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert {"step", "val_loss", "baseline", "object"} == set(records[0]) == set(records[-1])
    assert {"step", "epoch", "loss", "lr", "samples_per_second", "data_wait"} == set(records[1])


def test_the_picture_of_the_losses_has_a_line_for_each_kind(tmp_path):
    log = [{"step": 0, "val_loss": 1.0, "baseline": 0.8}, {"step": 5, "loss": 0.8},
           {"step": 10, "loss": 0.4}, {"step": 10, "val_loss": 0.5, "baseline": 0.8}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    mae_image.draw_losses(tmp_path, "nothing")
    picture = np.asarray(Image.open(tmp_path / "loss.png"))
    for step, loss, color in ((6, 0.72, "8899cc"), (2, 0.9, "cc4433"), (2, 0.8, "777777"),
                              (2, 0.7, "ffffff"), (8, 0.9, "ffffff")):
        pixel = picture[320 - round(290 * loss), 60 + 56 * step]
        assert bytes(pixel.tolist()).hex() == color
    log[0]["val_loss"] = 90.0  # an untrained network: the scale ends at 1.5 baselines
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    mae_image.draw_losses(tmp_path, "nothing")
    pixel = np.asarray(Image.open(tmp_path / "loss.png"))[320 - round(290 / 1.5), 60 + 56 * 8]
    assert bytes(pixel.tolist()).hex() == "777777"


def test_batches_of_two_processes_are_those_of_one():
    def plan(epoch):
        return data.shuffled(0, epoch, 30, 8)

    one = list(data.batches(plan, 0, 6, 0, 1, 1))
    ranks = [list(data.batches(plan, 0, 6, rank, 2, 1)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks)] == one
    pieces = list(data.batches(plan, 0, 6, 0, 1, 4))
    assert [sum(pieces[i : i + 4], []) for i in range(0, 24, 4)] == one
    assert list(data.batches(plan, 4, 6, 0, 1, 1)) == one[4:]
    first = [item for batch in one[:3] for _, item in batch]
    assert len(set(first)) == 24 and first != [item for batch in one[3:] for _, item in batch]


def test_the_number_format_is_the_devices_unless_one_is_asked_for(monkeypatch):
    cfg = mae_image.Config()
    assert mae_image.choose_precision(cfg, torch.device("cpu")) == torch.float32
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
        assert mae_image.choose_precision(cfg, torch.device("cuda")) == dtype
    cfg.precision = "float16"
    assert mae_image.choose_precision(cfg, torch.device("cpu")) == torch.float16


def test_a_copied_run_is_resumed_where_auto_means_another_number_format(straight, run, tmp_path,
                                                                        monkeypatch):
    """From a CPU to a GPU without bfloat16: the file has no state of a loss scaler."""
    shutil.copytree(straight[0], tmp_path / "runs/mae_image")
    monkeypatch.setattr(mae_image, "choose_precision", lambda cfg, device: torch.float16)
    text = run(mae_image, "--resume")
    assert "float16 on 1 x cpu" in text and "see runs/mae_image" in text


def test_accumulation_and_workers_do_not_change_the_result(straight, run, tmp_path):
    reference, flags = straight
    run(mae_image, *flags, "--out", "w", "--workers", 2)
    assert same_state(tmp_path / "w", reference)
    run(mae_image, *flags, "--out", "a", "--accum", 4)
    close_runs(reference, tmp_path / "a")


def test_two_processes_do_what_one_does_and_one_writes(straight, tmp_path):
    reference, flags = straight
    before = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    process = start(tmp_path, *flags, "--out", "two", before=before)
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and text.count("done: ") == 1, text
    close_runs(reference, tmp_path / "two")


def test_a_full_disk_is_reported_and_the_previous_checkpoint_stays(toy, run, tmp_path):
    flags = [*TINY_IMAGE, "--data", toy, "--out", "x", "--pictures", 0]
    run(mae_image, *flags, "--epochs", 1)
    before = (tmp_path / "x/checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk: no more is taken
    try:
        text = run(mae_image, *flags, "--out", "y", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # the system's words, not torch's
    assert "warning: cannot write y/checkpoint.pt: [Errno 27] File too large; the last one" in text
    assert (tmp_path / "x/checkpoint.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "y")) == [".lock", "log.jsonl"]


def test_a_run_continues_when_nobody_reads_what_it_says(toy, tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    mae_image.main([str(x) for x in [*TINY_IMAGE, "--data", toy, "--out", tmp_path]])
    assert weights(tmp_path)["step"] == 8  # 2 epochs x 64 images / 16


def test_a_run_needs_the_same_files_but_they_may_have_moved(toy, run, refused, tmp_path):
    shutil.copytree(toy / "rgb", tmp_path / "here")
    run(mae_image, *TINY_IMAGE, "--data", "here", "--epochs", 1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert "No such file or directory: 'here'" in refused(mae_image, "--resume")
    assert "done: " in run(mae_image, "--resume", "--data", "there")
    next((tmp_path / "there/train").rglob("*.jpg")).unlink()
    said = refused(mae_image, "--resume", "--data", "there")
    assert "there is not the data of runs/mae_image (64 training files then, 63 now)" in said


class Fake:
    """A dataset without files; what happens when an item is read can be told."""

    repeat, classes = 1, []

    def __init__(self, act=lambda epoch, i: None):
        self.paths, self.labels = np.array([f"image {i}" for i in range(32)]), np.full(32, -1)
        self.act = act

    def __len__(self):
        return 32

    def __getitem__(self, key):
        self.act(*key)
        return torch.full((1, 16, 16, 3), key[1] * 7, dtype=torch.uint8), key[1], []


def train_on(dataset, tmp_path, spoil=lambda batch: 0.0):
    cfg = mae_image.Config(batch=8, epochs=2, workers=0, log_every=1, warmup=1, device="cpu",
                           out=str(tmp_path / "run"), pictures=0)
    model = MAE(16, 8, (16, 1, 2), (16, 1, 2))
    optimizer = torch.optim.AdamW(model.parameters())

    def loss_of(net, batch, items, step, piece):
        g = torch.Generator().manual_seed(step)
        return net(model.normalize(batch), random_mask(8, (1, 2, 2), 0.75, g))[0] + spoil(batch)

    return mae_image.train(model, dataset, loss_of, optimizer, None, cfg)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_batch(tmp_path):
    epochs = []
    update = 5 + [9 in items for items in data.shuffled(0, 1, 32, 8)].index(True)
    with pytest.raises(FloatingPointError, match=f"loss is nan in update {update}: .*image 9(,|$)"):
        train_on(Fake(lambda epoch, i: epochs.append(epoch)), tmp_path,
                 lambda batch: math.nan if epochs[-1] and (batch == 7 * 9).any() else 0.0)
    assert all(v.isfinite().all() for v in weights(tmp_path / "run")["model"].values())


@pytest.mark.parametrize("error, words", [
    (ConnectionResetError(104, "reset by peer"), "reset by peer"), (EOFError(), "EOFError"),
    (RuntimeError("a\nb"), "b")])
def test_what_the_loader_raises_ends_a_run_that_can_be_resumed(error, words, tmp_path):
    def fail(epoch, i):
        if epoch == 1:
            raise error

    with pytest.raises(ValueError, match=f"^the loader failed: .*{words}; resume with: --resume"):
        train_on(Fake(fail), tmp_path)
    assert weights(tmp_path / "run")["step"] == 4  # all of the first epoch


def test_a_killed_worker_ends_the_run_with_one_line_and_a_checkpoint(toy, refused, tmp_path,
                                                                     monkeypatch):
    before = mae_image.Run.after_update

    def after_update(self, *args):
        before(self, *args)
        if self.done == 20:
            for child in multiprocessing.active_children():
                child.kill()

    monkeypatch.setattr(mae_image.Run, "after_update", after_update)
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 500, "--workers", 1, "--log-every", 1000]
    said = refused(mae_image, *flags)
    assert "the loader failed: " in said and "resume with: --resume --out runs/mae_image" in said
    assert weights(tmp_path / "runs/mae_image")["step"] >= 20


def test_a_run_is_not_overwritten_and_only_resumed_as_it_is(straight, refused, run):
    (reference, flags), resume = straight, ("--resume", "--out", straight[0])
    said = refused(mae_image, *flags, "--out", reference)
    assert f"{reference} holds a run: --resume continues it" in said
    assert "done: " in run(mae_image, *resume, "--batch", 16, "--log-every", 1)
    said = refused(mae_image, *resume, "--batch", 32)
    assert f"--batch 32: {reference} has 16, which cannot be changed" in said
    said = refused(mae_video, *resume)
    assert f"{reference}/checkpoint.pt: a mae model, written by mae_image.py" in said
    assert "there is no checkpoint y/checkpoint.pt" in refused(mae_image, "--resume", "--out", "y")


@pytest.mark.parametrize("name, value", [("colour", "red"), ("batch", "16"), ("img_size", 16)])
def test_settings_of_another_version_are_refused(straight, refused, tmp_path, name, value):
    state = weights(straight[0])
    state["config"][name] = value
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old/checkpoint.pt")
    said = refused(mae_image, "--resume", "--out", "old")
    assert f"old says {name} = {value!r}, unknown to mae_image.py" in said


def test_a_smoke_test_makes_three_updates_and_may_be_overwritten(toy, run, refused, tmp_path):
    flags = [*TINY_IMAGE, "--data", toy, "--out", "x"]
    run(mae_image, *flags, "--smoke")
    assert [step for step, _ in losses(tmp_path / "x")] == [1, 2, 3]
    run(mae_image, *flags, "--epochs", 1)
    assert [step for step, _ in losses(tmp_path / "x")] == [1, 2, 3, 4]
    assert "x holds a run" in refused(mae_image, *flags, "--smoke")


def test_a_run_that_dies_early_leaves_nothing_of_the_smoke_test_before_it(toy, run, refused,
                                                                          tmp_path):
    flags = [*TINY_IMAGE, "--data", toy, "--out", "x"]
    run(mae_image, *flags, "--smoke")
    flags += ["--lr", 1e30, "--warmup", 0, "--log-every", 1000]
    assert "the loss is nan in update" in refused(mae_image, *flags)
    assert "there is no checkpoint" in refused(mae_image, "--resume", "--out", "x")
    assert os.listdir(tmp_path / "x/pictures") == ["update_000000.png"]


@pytest.mark.parametrize("how", ["begun anew", "resumed"])
def test_lines_of_lost_updates_leave_the_log(straight, run, tmp_path, how):
    out, flags = tmp_path / "run", straight[1] if how == "begun anew" else ["--resume"]
    if how == "resumed":
        shutil.copytree(straight[0], out)
    out.mkdir(exist_ok=True)
    with open(out / "log.jsonl", "a") as file:  # written after the last checkpoint, then cut off
        file.write('{"step": 33, "loss": 1.0}\n{"step": 34, "los')
    run(mae_image, *flags, "--out", out)
    assert losses(out) == losses(straight[0])


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
    (["--data", "nowhere"], "No such file or directory: 'nowhere'"), (["--data", "."], "has no .jpg"),
    (["--img-size", 60], "image height 60 is not a multiple of 8: 56 and 64 are"),
    (["--img-size", "48x60"], "image width 60"), (["--img-size", "a"], "1 numbers are needed"),
    (["--decoder", "64x2x5"], "equal slices: width 64 is not a multiple of 5"),
    (["--decoder", "90x1x3"], "positions: width 90 is not a multiple of 4"),
    (["--decoder", "64"], "3 numbers are needed"), (["--size", "giant"], "3 numbers are needed"),
    (["--mask-ratio", 1], "outside [0, 1)"), (["--mask-ratio", 0.999], "hides all"),
    (["--mask-ratio", 0], "hides nothing"), (["--mask-ration", 0.5], "unrecognized"),
    (["--mask", "grid", "--mask-ratio", 0.5], "not 50%"), (["--mask", "tube"], "invalid choice"),
    (["--batch", 10, "--accum", 3], "must be a multiple of 3"), (["--patch", 0], "multiple of 0"),
    (["--batch", 1000], "64 training files do not fill one update of 1000"),
    (["--init", "no.pth"], "is no checkpoint no.pth"), (["--init", "x" * 300], "no checkpoint"),
    (["--out", "x" * 300], "File name too long"), (["--out", "/proc/x"], "/proc/x"),
    (["--resume"], "there is no checkpoint runs/mae_image"), (["--device", "cuda:9"], "be used"),
    (["--preset", "x"], "invalid choice"), (["--lr"], "expected one"), (["--epochs", -1], "small")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    base = [] if "--data" in flags else ["--data", toy]
    assert message in refused(mae_image, *base, *flags)


@pytest.mark.parametrize("module", [mae_image, mae_video, omni, multimae, finetune])
def test_help_explains_every_flag_and_presets_are_settings(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    for field in module.Config.__dataclass_fields__:
        flag = f"--{field.replace('_', '-')}"
        assert re.search(rf"^  {flag}\b[^\n]*(\n {{20,}}|  )\S", text, re.M), field
    for name, preset in module.PRESETS.items():
        module.Config(**preset)
        assert f"  {name}: " in text
