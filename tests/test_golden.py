"""Our models beside numbers of the official ones, and beside plain code for rectangles.

All official numbers are of squares. So what depends on height and width is written here once more:
it must have the official numbers, too, and then says what our models must give for rectangles.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import masking
import replay_golden

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))
MODELS = [path for path in FILES if "pretrain" in path.stem]
# frames for fine-tuning: ours are those of pretraining, and drawn from another random stream
NOT_OURS = {"clips_finetune_dense", "clips_ssv2_train"}
each_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_numbers_are_the_official_ones(path):
    r = replay_golden.Replay(path)
    results = {name for name, doc in r.meta["arrays"].items() if doc["role"] == "out"}
    shares = replay_golden.replay(r)
    assert set(shares) == results - NOT_OURS and max(shares.values()) <= 1, shares


def test_a_wrong_number_is_noticed(tmp_path, capsys):
    source, copy = Path(__file__).parent / "golden/mae_vit_cls.npz", tmp_path / "x.npz"
    copy.with_suffix(".json").write_text(source.with_suffix(".json").read_text())
    arrays = dict(np.load(source))
    arrays["features"].flat[7] += 1e-3
    np.savez(copy, **arrays)
    for path, code in ((copy, 1), (source, 0)):
        with pytest.raises(SystemExit) as stop:
            replay_golden.main([path])
        assert stop.value.code == code and ("TOO FAR" in capsys.readouterr().out) == bool(code)


# Plain code. What knows nothing of height and width (blocks, heads) is that of our models.
def take(x, keep):
    return torch.stack([row[numbers] for row, numbers in zip(x, keep)])


def put(x, keep, token, N):
    """Tokens back at their places, `token` everywhere else."""
    return token.expand(len(x), N, -1).scatter(1, keep[..., None].expand_as(x), x)


def table_1d(width, N):
    angle = [[n / 10000 ** (j // 2 * 2 / width) for j in range(width)] for n in range(N)]
    return torch.tensor([[(math.cos if j % 2 else math.sin)(a) for j, a in enumerate(row)]
                         for row in angle])


def table_2d(width, h, w, rows_first):
    def half(place):
        angles = [place / 10000 ** (k / (width // 4)) for k in range(width // 4)]
        return [f(a) for f in (math.sin, math.cos) for a in angles]
    places = [(r, c) if rows_first else (c, r) for r in range(h) for c in range(w)]
    return torch.tensor([half(first) + half(second) for first, second in places])


def resized(table, old, new, mode):
    return F.interpolate(table.T.reshape(1, -1, *old), new, mode=mode)[0].flatten(1).T


def positions(r, part=""):
    """-> table (N, width), row of the class token; part "decoder_" or ""."""
    w, (t, gh, gw) = r.weights, r.config["grid"]
    if f"{part}pos_embed_spatial" in w:
        space, time = w[f"{part}pos_embed_spatial"][0], w[f"{part}pos_embed_temporal"][0]
        rows = [space[place] + time[slot] for slot in range(t) for place in range(gh * gw)]
        return torch.stack(rows), w.get(f"{part}pos_embed_class", torch.zeros(1))
    if f"{part}pos_embed" in w:
        return w[f"{part}pos_embed"][0, -t * gh * gw :], w[f"{part}pos_embed"][:, :1]
    # OmniMAE's decoder adds them before its first layer
    width = r.config["decoder_embed_dim" if part and r.kind != "omni" else "embed_dim"]
    if r.kind in ("videomae", "omni"):
        return table_1d(width, t * gh * gw), torch.zeros(1)
    return table_2d(width, gh, gw, rows_first=r.kind == "multimae"), torch.zeros(1)


def with_class_token(r, y, row, part=""):
    if f"{part}cls_token" not in r.weights:
        return y
    return torch.cat([(r.weights[f"{part}cls_token"] + row).expand(len(y), -1, -1), y], dim=1)


def pretrain(r, model, x, prefix):
    """Latent and prediction of MAE, MAE-ST, VideoMAE or OmniMAE."""
    (table, row), (places, first) = positions(r), positions(r, "decoder_")
    if r.kind == "omni" and x.ndim == 4:  # a clip one cube long
        x = x[:, :, None].repeat(1, 1, 2, 1, 1)
    y = model.patch_embed.proj(x).flatten(2).mT  # (B, N, D), by the strided convolution
    N, noisy = y.shape[1], "noise" in r.arrays
    order = r.tensor("noise" if noisy else f"{prefix}mask").float()
    count = int(N * (1 - r.config["mask_ratio"])) if noisy else int((order[0] == 0).sum())
    keep = order.argsort(dim=1, stable=True)[:, :count]
    y = model.norm(model.blocks(with_class_token(r, take(y + table[:N], keep), row)))
    z = y if r.kind == "omni" else model.decoder_embed(y)
    full = put(z[:, -count:], keep, model.mask_token, N) + places[:N]
    if r.kind == "omni":
        full = model.decoder_embed(full)
    elif r.kind == "mae":  # the decoder has the class token of the encoder
        full = torch.cat([z[:, :1], full], dim=1)
    full = with_class_token(r, full, first, "decoder_")
    pred = model.decoder_pred(model.decoder_norm(model.decoder_blocks(full))[:, -N:])
    if r.kind == "videomae":
        pred = pred[order.bool()].unflatten(0, (len(x), -1))
    return {"latent": y if r.kind == "mae" else y[:, -count:], "pred": pred}


def multimae(r, model, inputs, keep):
    """Latent and predictions for inputs {modality: map}, of whose tokens `keep` are visible."""
    c, grid, tokens = r.config, r.config["grid"][1:], []
    p = {m: c["patch_size"] // c["stride"][m] for m in c["modalities"]}
    size = [[n // p[m] for n in x.shape[-2:]] for m, x in inputs.items()][0]
    for m, x in inputs.items():
        layer, mode = model.input_adapters[m], "bilinear" if m == "semseg" else "bicubic"
        x = layer.class_emb(x).movedim(-1, 1) if m == "semseg" else x
        table = resized(table_2d(c["embed_dim"], *grid, rows_first=True), grid, size, mode)
        tokens.append(layer.proj(x).flatten(2).mT + table)
    y = take(torch.cat(tokens, dim=1), keep)
    latent = model.blocks(torch.cat([y, model.global_tokens.expand(len(y), -1, -1)], dim=1))
    table = table_2d(c["decoder_embed_dim"], *grid, rows_first=True)
    table, out = resized(table, grid, size, "bilinear"), {"latent": latent}
    for task, d in model.output_adapters.items():
        m, y = task.removeprefix("norm_"), d.proj_context(latent)
        places = {k: table + d.task_embeddings[k][0] for k in p}
        full = put(y[:, :-1], keep, d.mask_token, len(table) * len(inputs))
        full = full + torch.cat([places[k] for k in inputs])
        context = torch.cat([take(full, keep), y[:, -1:]], dim=1)
        queries = (d.mask_token + places[m]).expand(len(y), -1, -1)
        if m in inputs:
            queries = full.chunk(len(inputs), dim=1)[list(inputs).index(m)]
        x = d.decoder(d.query_norm(queries), d.context_norm(context))
        x = d.out_proj(d.decoder_transformer(x + d.mlp(d.out_norm(x))))
        out[f"pred/{task}"] = F.fold(x.mT, [n * p[m] for n in size], p[m], stride=p[m])
    return out


@torch.no_grad()
def plain(r):
    """What a model's file holds of latents and predictions -> {name of the array: value}."""
    model, parts = replay_golden.build(r), {}
    if r.kind == "multimae":
        for name, (inputs, keep, _) in replay_golden.scenarios(r).items():
            parts[f"{name}/"] = multimae(r, model, inputs, keep)
    for kind, prefix in r.inputs() if r.kind != "multimae" else ():
        parts[prefix] = pretrain(r, model, r.pixels(f"{kind}_u8"), prefix)
    return {prefix + k: value for prefix, part in parts.items() for k, value in part.items()}


@each_model
def test_the_plain_code_has_the_official_numbers(path):
    r = replay_golden.Replay(path)
    numbers = plain(r)
    for name, value in numbers.items():
        r.check(name, value)
    assert len(numbers.keys() & r.shares) >= 2 and max(r.shares.values()) <= 1, r.shares


def rectangle(path, size):
    """A golden file with pictures of another height and width, and the results of plain()."""
    r, rng, g = replay_golden.Replay(path), np.random.default_rng(0), torch.Generator()
    c, docs, (t, *square) = r.config, r.meta["arrays"], r.config["grid"]
    large, grid = [2 * size[0], size[1] + c["patch_size"]], [n // c["patch_size"] for n in size]
    c |= {"img_size": size, "hires_img_size": large, "grid": [t, *grid]}
    n = math.prod(grid)
    for name, shape, _ in r.meta["tensors"]:  # learned tables of positions
        if "pos_embed" in name and not name.endswith(("temporal", "class")):
            shape[1] += (n - math.prod(square)) * (1 if name.endswith("spatial") else t)
    r.weights = r.draw_weights()
    r.arrays = {name: x for name, x in r.arrays.items() if docs[name]["role"] == "in"}
    for name, x in r.arrays.items():
        H, W = large if name.startswith("hires") else size
        B, tokens = len(x), n if "image" in name else t * n
        if name.endswith("_u8"):
            x = rng.integers(0, 256, (*x.shape[:-2], H, W), dtype=np.uint8)
        elif name.endswith("semseg"):
            x = rng.integers(0, c["num_classes_semseg"], (B, H // 4, W // 4), dtype=np.uint8)
        elif name == "noise":
            x = rng.random((B, tokens), dtype=np.float32)
        elif name == "mask":
            x = masking.tube_mask(B, c["grid"], c["mask_ratio"], g).numpy()
        elif name.endswith("/mask"):
            ratio = c[f"mask_ratio_{name.removesuffix('/mask')}"]
            x = masking.random_mask(B, (1, 1, tokens), ratio, g, "hide").numpy()
        elif name.endswith("ids_keep"):
            tokens = n if name.startswith("rgb_only") else 3 * n
            x = rng.random((*x.shape[:-1], tokens)).argsort(axis=-1)[..., : x.shape[-1]]
        r.arrays[name] = x
    results = {name: x.numpy() for name, x in plain(r).items() if name in docs}
    for name, x in results.items():
        docs[name] |= {"shape": list(x.shape), "stride": 1}
    r.arrays |= results
    return r, set(results)


@each_model
@pytest.mark.parametrize("size", [[24, 32], [40, 24]], ids=["wide", "tall"])
def test_every_model_replays_rectangles(path, size):
    r, results = rectangle(path, size)
    shares = replay_golden.replay(r)
    assert set(shares) == results and len(shares) >= 2 and max(shares.values()) <= 1, shares
