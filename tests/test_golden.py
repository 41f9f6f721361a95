"""Our models beside numbers of the official ones, and of a plain implementation for rectangles.

All official numbers are of squares. So a plain implementation is held against them first, then it
predicts for rectangles what our models must replay. (Slow loops for losses of rectangles are in
test_mae_image.py and test_multimae.py.)
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import replay_golden

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))
MODELS = [p for p in FILES if not p.stem.startswith(("functions", "mask"))]
# frames for fine-tuning: ours are those of pretraining, and drawn from another random stream
NOT_OURS = {"clips_finetune_dense", "clips_ssv2_train"}
each_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_numbers_are_the_official_ones(path):
    r = replay_golden.replay(path)
    results = {name for name, doc in r.meta["arrays"].items() if doc["role"] == "out"}
    assert set(r.shares) == results - NOT_OURS and max(r.shares.values()) <= 1, r.shares


def test_a_wrong_number_is_noticed(tmp_path, capsys):
    source = Path(__file__).parent / "golden/mae_vit_cls.npz"
    (tmp_path / "x.json").write_text(source.with_suffix(".json").read_text())
    arrays = dict(np.load(source))
    arrays["features"].flat[7] += 1e-3
    np.savez(tmp_path / "x.npz", **arrays)
    for path, code in ((tmp_path / "x.npz", 1), (source, 0)):
        with pytest.raises(SystemExit) as stop:
            replay_golden.main([str(path)])
        assert stop.value.code == code and ("TOO FAR" in capsys.readouterr().out) == bool(code)


# A plain implementation.   w: tensors by our names; q, k, v as the official code has them


def linear(w, x, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w, x, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def attend(q, k, v, heads):
    parts = zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)))
    return torch.cat([(a @ b.mT / a.shape[-1] ** 0.5).softmax(dim=-1) @ c for a, b, c in parts], -1)


def mlp(w, x, name):
    return linear(w, F.gelu(linear(w, x, f"{name}.fc1")), f"{name}.fc2")


def blocks(w, x, name, heads):
    i = 0
    while f"{name}.{i}.norm1.weight" in w:
        one, y = f"{name}.{i}", norm(w, x, f"{name}.{i}.norm1")
        if f"{one}.attn.q.weight" in w:
            q, k, v = (linear(w, y, f"{one}.attn.{letter}") for letter in "qkv")
        else:
            q, k, v = linear(w, y, f"{one}.attn.qkv").chunk(3, dim=-1)
            q, v = q + w.get(f"{one}.attn.q_bias", 0), v + w.get(f"{one}.attn.v_bias", 0)
        y = linear(w, attend(q, k, v, heads), f"{one}.attn.proj")
        x = x + y * w.get(f"{one}.gamma_1", 1)
        x = x + mlp(w, norm(w, x, f"{one}.norm2"), f"{one}.mlp") * w.get(f"{one}.gamma_2", 1)
        i += 1
    return x


def embed(w, x, name):
    """The strided convolution.   (B, C, [T,] H, W) -> (B, N, D)"""
    x, kernel = (v if v.ndim == 5 else v[:, :, None] for v in (x, w[f"{name}.weight"]))
    return F.conv3d(x, kernel, w[f"{name}.bias"], stride=kernel.shape[2:]).flatten(2).mT


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


def positions(w, r, part=""):
    """-> table (N, width), row of the class token; part "decoder_" or ""."""
    (t, gh, gw), method = r.config["grid"], r.meta["method"]
    if f"{part}pos_embed_spatial" in w:
        space, time = w[f"{part}pos_embed_spatial"][0], w[f"{part}pos_embed_temporal"][0]
        rows = [space[place] + time[slot] for slot in range(t) for place in range(gh * gw)]
        return torch.stack(rows), w.get(f"{part}pos_embed_class", torch.zeros(1))
    if f"{part}pos_embed" in w:
        return w[f"{part}pos_embed"][0, -t * gh * gw :], w[f"{part}pos_embed"][:, :1]
    # OmniMAE's decoder adds them before its first layer
    width = r.config["decoder_embed_dim" if part and method != "OmniMAE" else "embed_dim"]
    if method in ("VideoMAE", "OmniMAE"):
        return table_1d(width, t * gh * gw), torch.zeros(1)
    return table_2d(width, gh, gw, rows_first=method == "MultiMAE"), torch.zeros(1)


def with_class_token(w, y, row, part=""):
    return torch.cat([(w[f"{part}cls_token"] + row).expand(len(y), -1, -1), y], dim=1)


def pretrain(r, w, kind):
    """MAE, MAE-ST, VideoMAE or OmniMAE -> {name of the array: value}."""
    c, a, method = r.config, r.arrays, r.meta["method"]
    x = replay_golden.pixels(r, f"{kind}_u8")
    if method == "OmniMAE" and kind == "image":  # a clip one cube long
        x = x[:, :, None].repeat(1, 1, 2, 1, 1)
    if "noise" in a:
        keep = torch.from_numpy(a["noise"]).argsort(dim=1)[:, : c["len_keep"]]
        mask = torch.ones(a["noise"].shape).scatter(1, keep, 0).bool()
    else:
        mask = torch.from_numpy(a["mask" if method == "VideoMAE" else f"{kind}/mask"]).bool()
        keep = torch.stack([(~row).nonzero()[:, 0] for row in mask])
    (B, N), K = mask.shape, keep.shape[1]
    (table, row), (places, first) = (positions(w, r, part) for part in ("", "decoder_"))
    y = take(embed(w, x, "patch_embed.proj") + table[:N], keep)
    y = with_class_token(w, y, row) if "cls_token" in w else y
    y = norm(w, blocks(w, y, "blocks", c["num_heads"]), "norm")
    z = y if method == "OmniMAE" else linear(w, y, "decoder_embed")
    full = put(z[:, -K:], keep, w["mask_token"].flatten(), N) + places[:N]
    if method == "OmniMAE":
        full = linear(w, full, "decoder_embed")
    elif method == "MAE":  # the decoder has the class token of the encoder
        full = torch.cat([z[:, :1], full], dim=1)
    elif "decoder_cls_token" in w:
        full = with_class_token(w, full, first, "decoder_")
    full = norm(w, blocks(w, full, "decoder_blocks", c["decoder_num_heads"]), "decoder_norm")
    pred = linear(w, full[:, -N:], "head" if method == "OmniMAE" else "decoder_pred")
    if method == "VideoMAE":
        pred = pred[mask].unflatten(0, (B, -1))
    return {"latent": y if method == "MAE" else y[:, -K:], "pred": pred}


def classify(r, w, key):
    """Features and logits of a classifier; key: the array of its pixels."""
    c, method, x = r.config, r.meta["method"], replay_golden.pixels(r, f"{key}_u8")
    (table, row), (_, *grid) = positions(w, r), c["grid"]
    if method == "OmniMAE" and x.ndim == 4:
        square = table[: math.prod(grid)].T.reshape(1, -1, *grid)
        size = [n // c["patch_size"] for n in x.shape[2:]]
        table = F.interpolate(square, size, mode="bicubic")[0].flatten(1).T
        x = x[:, :, None].repeat(1, 1, 2, 1, 1)
    y = embed(w, x, f"{'input_adapters.rgb' if method == 'MultiMAE' else 'patch_embed'}.proj")
    y = y + table
    y = with_class_token(w, y, row) if "cls_token" in w else y
    if method == "MultiMAE":
        y = torch.cat([y, w["global_tokens"].expand(len(x), -1, -1)], dim=1)
    y = blocks(w, y, "blocks", c["num_heads"])
    if "norm over all tokens" in c["pooling"]:
        y = y[:, 0]
    else:  # MAE-ST leaves out a cube where it has no class token
        y = y[:, int("cls_token" in w or method == "MAE-ST") :].mean(dim=1)
    features = norm(w, y, "fc_norm" if "fc_norm.weight" in w else "norm")
    return {"features": features, "logits": linear(w, features, "head")}


class Scenario:
    """MultiMAE on some inputs {modality: map}, of whose tokens those in `keep` are visible."""

    def __init__(self, r, w, inputs, keep):
        self.c, self.w, self.inputs, self.keep = r.config, w, inputs, keep
        m, x = next(iter(inputs.items()))
        self.size = [n // self.side(m) for n in x.shape[-2:]]  # grid of tokens

    def side(self, m):
        return self.c["patch_size"] // self.c["stride"][m]

    def table(self, width, mode):
        grid = self.c["grid"][1:]
        x = table_2d(width, *grid, rows_first=True).T.reshape(1, width, *grid)
        return F.interpolate(x, self.size, mode=mode)[0].flatten(1).T

    def latent(self):
        tokens = []
        for m, x in self.inputs.items():
            if m == "semseg":
                x = self.w["input_adapters.semseg.class_emb.weight"][x].movedim(-1, 1)
            table = self.table(self.c["embed_dim"], "bilinear" if m == "semseg" else "bicubic")
            tokens.append(embed(self.w, x, f"input_adapters.{m}.proj") + table)
        x = take(torch.cat(tokens, dim=1), self.keep)
        x = torch.cat([x, self.w["global_tokens"].expand(len(x), -1, -1)], dim=1)
        return blocks(self.w, x, "blocks", self.c["num_heads"])

    def pred(self, task, latent):
        w, one, m = self.w, f"output_adapters.{task}", task.removeprefix("norm_")
        E, heads = self.c["decoder_embed_dim"], self.c["decoder_num_heads"]
        table = self.table(E, "bilinear")
        places = {k: table + w[f"{one}.task_embeddings.{k}"][0] for k in ("rgb", "depth", "semseg")}
        y, token = linear(w, latent, f"{one}.proj_context"), w[f"{one}.mask_token"][0, 0]
        full = put(y[:, :-1], self.keep, token, len(table) * len(self.inputs))
        full = full + torch.cat([places[k] for k in self.inputs])
        context = torch.cat([take(full, self.keep), y[:, -1:]], dim=1)
        queries = (token + places[m]).expand(len(y), -1, -1)
        if m in self.inputs:
            queries = full.chunk(len(self.inputs), dim=1)[list(self.inputs).index(m)]
        keys = linear(w, norm(w, context, f"{one}.context_norm"), f"{one}.decoder.kv").chunk(2, -1)
        q = linear(w, norm(w, queries, f"{one}.query_norm"), f"{one}.decoder.q")
        x = linear(w, attend(q, *keys, heads), f"{one}.decoder.proj")
        x = x + mlp(w, norm(w, x, f"{one}.out_norm"), f"{one}.mlp")
        x = blocks(w, x, f"{one}.decoder_transformer", heads)
        size, p = [n * self.side(m) for n in self.size], self.side(m)
        return F.fold(linear(w, x, f"{one}.out_proj").mT, size, p, stride=p)


def multimae(r, w):
    """All scenarios of a MultiMAE file -> {name of the array: value}."""
    c, a, out = r.config, r.arrays, {}
    depth = torch.from_numpy(a["depth_u8"].astype(np.float32)) / 255
    n = depth[0].numel()
    middle = depth.flatten(1).sort(dim=1).values[:, int(0.1 * n) : int(0.9 * n)]
    mean, var = (f(dim=1)[:, None, None, None] for f in (middle.mean, middle.var))
    rgb, classes = replay_golden.pixels(r, "rgb_u8"), torch.from_numpy(a["semseg"]).long()
    maps = {"rgb": rgb, "depth": (depth - mean) / (var + 1e-6).sqrt(), "semseg": classes}
    large = {"rgb": replay_golden.pixels(r, "hires/rgb_u8"),
             "semseg": torch.from_numpy(a["hires/semseg"]).long()}
    scenarios = {"all": maps, "edge": maps, "rgb_only": {"rgb": maps["rgb"]}, "full": maps,
                 "depth_only": {"depth": maps["depth"]}, "hires": large}
    for name, inputs in scenarios.items():
        B, _, H, W = next(iter(inputs.values())).shape
        everything = np.tile(np.arange(H * W // c["patch_size"] ** 2 * len(inputs)), (B, 1))
        keep = torch.from_numpy(a.get(f"{name}/ids_keep", everything)).long()
        one = Scenario(r, w, inputs, keep)
        latent = out[f"{name}/latent"] = one.latent()
        out |= {f"{name}/pred/{task}": one.pred(task, latent) for task in c["decoders"]}
    return out


def plain(r):
    """What a model's file holds of tokens, predictions, answers -> {name of the array: value}."""
    w = {replay_golden.our_name(r, name): x for name, x in r.weights.items()}
    if r.meta["method"] == "MultiMAE" and "steps" in r.config:
        return multimae(r, w)
    out, step = {}, pretrain if "steps" in r.config else classify
    for kind in ("image", "video", "rgb", "hires/image"):
        if f"{kind}_u8" in r.arrays:
            prefix = f"{kind.split('/')[0]}/" if r.meta["method"] == "OmniMAE" else ""
            out |= {prefix + name: value for name, value in step(r, w, kind).items()}
    return out


@each_model
def test_the_plain_implementation_has_the_official_numbers(path):
    r = replay_golden.Replay(path)
    for name, value in plain(r).items():
        r.check(name, value)
    assert len(r.shares) >= 2 and max(r.shares.values()) <= 1, r.shares


def rectangle(path, size):
    """A golden file with pictures of another height and width, and the results of plain()."""
    r = replay_golden.Replay(path)
    c, docs, rng = r.config, r.meta["arrays"], np.random.default_rng(0)
    p, (t, *square), grid = c["patch_size"], c["grid"], [side // c["patch_size"] for side in size]
    n, more = math.prod(grid), math.prod(grid) - math.prod(square)
    N, ratio, large = t * n, c.get("mask_ratio", 0), [2 * size[0], size[1] + p]
    c |= {"img_size": size, "hires_img_size": large, "grid": [t, *grid], "num_patches": N,
          "num_patches_per_modality": n, "len_keep": int(N * (1 - ratio)), "pos_rows": [0],
          "masked_per_frame": int(ratio * n), "num_visible": N - t * int(ratio * n),
          "num_hidden_image": int(c.get("mask_ratio_image", 0) * n),
          "num_hidden_video": int(c.get("mask_ratio_video", 0) * N)}
    for name, shape, _ in r.meta["tensors"]:  # learned tables of positions
        if "pos_embed" in name and not name.endswith(("temporal", "class")):
            shape[1] += more * (1 if name.endswith("spatial") else t)
    r.weights = r.draw_weights()

    def hide(count, tokens):
        return np.stack([rng.permutation(tokens) < count for _ in range(c["batch"])])

    for name in [name for name, doc in docs.items() if doc["role"] == "in"]:
        x, (H, W) = r.arrays[name], large if name.startswith("hires") else size
        if name.endswith("_u8"):
            x = rng.integers(0, 256, (*x.shape[:-2], H, W), dtype=np.uint8)
        elif name.endswith("semseg"):
            x = rng.integers(0, c["num_classes_semseg"], (len(x), H // 4, W // 4), dtype=np.uint8)
        elif name == "noise":
            x = rng.random((len(x), N), dtype=np.float32)
        elif name == "mask":
            x = np.tile(hide(c["masked_per_frame"], n), (1, t))
        elif name.endswith("/mask"):
            kind = name.removesuffix("/mask")
            x = hide(c[f"num_hidden_{kind}"], n if kind == "image" else N)
        elif name.endswith("ids_keep"):
            tokens = n if name.startswith("rgb_only") else 3 * n
            x = np.apply_along_axis(lambda row: rng.permutation(tokens)[: len(row)], -1, x)
        r.arrays[name] = x
    results = {name: x.numpy() for name, x in plain(r).items() if name in docs}
    r.arrays = {k: x for k, x in r.arrays.items() if docs[k]["role"] == "in"} | results
    for name, x in results.items():
        docs[name] |= {"shape": list(x.shape), "stride": 1}
    r.meta["arrays"] = {name: docs[name] for name in results}
    return r


@each_model
@pytest.mark.parametrize("size", [[24, 32], [40, 24]], ids=["wide", "tall"])
def test_every_model_replays_rectangles(path, size):
    r = rectangle(path, size)
    assert set(replay_golden.compare(r).shares) == set(r.meta["arrays"]) and len(r.shares) >= 2
    assert max(r.shares.values()) <= 1, r.shares
