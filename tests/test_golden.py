"""Our models beside numbers of the official ones, and of a plain implementation for rectangles.

All official numbers are of squares. So a plain implementation that works on the official tensors
is held against them first. Then it fills files of the same kind with rectangles, and our models
must replay these, too.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import replay_golden

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))
# Frames that the official code draws for fine-tuning: ours are those of its pretraining, and
# another stream of random numbers.
NOT_OURS = {"clips_finetune_dense", "clips_ssv2_train"}
MODELS = [p for p in FILES if not p.stem.startswith(("functions", "mask"))]
replay = functools.cache(replay_golden.replay)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of so little work, threads wait for each other longer than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_numbers_are_the_official_ones(path):
    shares = replay(path).shares
    assert shares and all(share <= 1 for share in shares.values()), shares


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_are_compared_in_every_array(path):
    r = replay(path)
    results = {name for name, doc in r.meta["arrays"].items() if doc["role"] == "out"}
    assert results - NOT_OURS == set(r.shares)


def test_a_wrong_number_is_noticed(tmp_path, capsys):
    """The comparison itself can fail: one changed value in a copy, and the exit code is 1."""
    source = FILES[[path.stem for path in FILES].index("mae_vit_cls")]
    (tmp_path / "x.json").write_text(source.with_suffix(".json").read_text())
    with np.load(source) as content:
        arrays = dict(content)
    arrays["features"].flat[7] += 1e-3
    np.savez(tmp_path / "x.npz", **arrays)
    for path, code in ((tmp_path / "x.npz", 1), (source, 0)):
        with pytest.raises(SystemExit) as stop:
            replay_golden.main([str(path)])
        assert stop.value.code == code and ("TOO FAR" in capsys.readouterr().out) == bool(code)


# ---- a plain implementation; w: tensors by their official names ----------------------------------


def linear(w, x, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w, x, name):
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


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
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    return convolve(x, weight, bias, stride=weight.shape[2:]).flatten(2).mT


def cut(x, u, p):
    """(B, C, T, H, W) -> (B, N, u*p*p*C), one token after the other."""
    _, _, T, H, W = x.shape
    cubes = [x[:, :, s : s + u, r : r + p, c : c + p]
             for s in range(0, T, u) for r in range(0, H, p) for c in range(0, W, p)]
    return torch.stack([cube.permute(0, 2, 3, 4, 1).flatten(1) for cube in cubes], dim=1)


def table_1d(width, N):
    angle = [[n / 10000 ** (j // 2 * 2 / width) for j in range(width)] for n in range(N)]
    return torch.tensor([[(math.cos if j % 2 else math.sin)(a) for j, a in enumerate(row)]
                         for row in angle])


def table_2d(width, h, w, rows_first=False):
    def half(place):
        angles = [place / 10000 ** (k / (width // 4)) for k in range(width // 4)]
        return [f(a) for f in (math.sin, math.cos) for a in angles]

    places = [(r, c) if rows_first else (c, r) for r in range(h) for c in range(w)]
    return torch.tensor([half(first) + half(second) for first, second in places])


def take(x, keep):
    return torch.stack([row[numbers] for row, numbers in zip(x, keep)])


def put(x, keep, token, N):
    """Tokens back at their places, `token` everywhere else."""
    return token.expand(len(x), N, -1).scatter(1, keep[..., None].expand_as(x), x)


def standard(x, channels=1, outside=0.0):
    """Each patch, or each channel of it, by its own mean and deviation."""
    x = x.unflatten(-1, (-1, channels))
    x = x - x.mean(dim=-2, keepdim=True)
    inside = 0.0 if outside else 1e-6
    return (x / ((x.var(dim=-2, keepdim=True) + inside).sqrt() + outside)).flatten(-2)


def positions(w, c, method, part=""):
    """-> table (N, width), row of the class token; part "decoder_" or ""."""
    t, gh, gw = c["grid"]
    width = c["decoder_embed_dim" if part else "embed_dim"]
    if f"{part}pos_embed_spatial" in w:
        space, time = w[f"{part}pos_embed_spatial"][0], w[f"{part}pos_embed_temporal"][0]
        rows = [space[place] + time[slot] for slot in range(t) for place in range(gh * gw)]
        return torch.stack(rows), w.get(f"{part}pos_embed_class", torch.zeros(1))
    if f"{part}pos_embed" in w:
        return w[f"{part}pos_embed"][0, -t * gh * gw :], w[f"{part}pos_embed"][:, :1]
    table = table_2d(width, gh, gw) if method == "MAE" else table_1d(width, t * gh * gw)
    return table, torch.zeros(1)


def mae(r, w, kind=""):
    """A pretraining step of MAE or MAE-ST -> {name of the array: value}."""
    c, method = r.config, r.meta["method"]
    x = replay_golden.pixels(r, "image_u8" if method == "MAE" else "video_u8")
    keep = torch.from_numpy(r.arrays["noise"]).argsort(dim=1)[:, : c["len_keep"]]
    B, N, heads = len(x), c["num_patches"], c["decoder_num_heads"]
    out = {"ids_keep": keep, "mask": torch.ones(B, N).scatter(1, keep, 0)}
    out["tokens"] = embed(w, x, "patch_embed.proj")
    (table, row), (places, first) = (positions(w, c, method, part) for part in ("", "decoder_"))
    y = take(out["tokens"] + table, keep)
    if "cls_token" in w:
        y = torch.cat([(w["cls_token"] + row).expand(B, -1, -1), y], dim=1)
    y = norm(w, blocks(w, y, "blocks", c["num_heads"]), "norm")
    out["latent"] = y if method == "MAE" else y[:, -c["len_keep"] :]
    z = linear(w, y, "decoder_embed")
    full = put(z[:, -c["len_keep"] :], keep, w["mask_token"][0, 0], N) + places
    if method == "MAE":
        full = torch.cat([z[:, :1], full], dim=1)
    elif "decoder_cls_token" in w:
        full = torch.cat([(w["decoder_cls_token"] + first).expand(B, -1, -1), full], dim=1)
    full = norm(w, blocks(w, full, "decoder_blocks", heads), "decoder_norm")
    out["pred"] = linear(w, full[:, -N:], "decoder_pred")
    frames, u = x[:, :, None] if method == "MAE" else x, 1
    if method == "MAE-ST":
        last, count = c["num_frames"] - 1, c["pred_t_dim"]
        out["frame_index"] = torch.tensor([int(last * i / (count - 1)) for i in range(count)])
        frames, u = x[:, :, out["frame_index"]], count // c["grid"][0]
    target = cut(frames, u, c["patch_size"])
    out["target"] = standard(target) if c["norm_pix_loss"] else target
    out["token_loss"] = (out["pred"] - out["target"]).square().mean(dim=-1)
    out["loss"] = (out["token_loss"] * out["mask"]).sum() / out["mask"].sum()
    return out | tables(r, table, places, zero=method == "MAE")


def tables(r, table, places, zero=False):
    """The rows of fixed tables that a file holds; MAE's begin with a row of zeros."""
    found = {}
    for name, x in (("pos_encoder", table), ("pos_decoder", places)):
        if name in r.meta["arrays"]:
            found[name] = F.pad(x, (0, 0, int(zero), 0))[r.config["pos_rows"]]
    return found


def unit(r, x):
    """The network's input as pixels in [0, 1]."""
    mean, std = (torch.tensor(r.config[f"input_{k}"])[:, None, None, None] for k in ("mean", "std"))
    return x * std + mean


def videomae(r, w, kind=""):
    c, x = r.config, replay_golden.pixels(r, "video_u8")
    mask, N = torch.from_numpy(r.arrays["mask"]).bool(), c["num_patches"]
    (keep, hide) = (torch.stack([m.nonzero()[:, 0] for m in part]) for part in (~mask, mask))
    table, places = (table_1d(c[k], N) for k in ("embed_dim", "decoder_embed_dim"))
    out = {"tokens": embed(w, x, "encoder.patch_embed.proj")} | tables(r, table, places)
    y = blocks(w, take(out["tokens"] + table, keep), "encoder.blocks", c["num_heads"])
    out["latent"] = norm(w, y, "encoder.norm")
    y = linear(w, out["latent"], "encoder_to_decoder") + places[keep]
    y = torch.cat([y, w["mask_token"] + places[hide]], dim=1)
    y = blocks(w, y, "decoder.blocks", c["decoder_num_heads"])[:, keep.shape[1] :]
    out["pred"] = linear(w, norm(w, y, "decoder.norm"), "decoder.head")
    target = take(cut(unit(r, x), c["t_patch_size"], c["patch_size"]), hide)
    out["target"] = standard(target, 3, outside=1e-6) if c["normalize_target"] else target
    out["token_loss"] = (out["pred"] - out["target"]).square().mean(dim=-1)
    return out | {"loss": out["token_loss"].mean()}


def omnimae(r, w, kind):
    c, x = r.config, replay_golden.pixels(r, f"{kind}_u8")
    x = x[:, :, None].repeat(1, 1, c["t_patch_size"], 1, 1) if kind == "image" else x
    mask = torch.from_numpy(r.arrays[f"{kind}/mask"]).bool()
    keep = torch.stack([(~row).nonzero()[:, 0] for row in mask])
    table = table_1d(c["embed_dim"], c["num_patches"])
    pos = table[: mask.shape[1]]
    out = {"tokens": embed(w, x, "trunk.patch_embed.proj.1")}
    y = blocks(w, take(out["tokens"] + pos, keep), "trunk.blocks", c["num_heads"])
    out["latent"] = norm(w, y, "trunk.norm")
    out["dec_in"] = put(out["latent"], keep, w["trunk.mask_token"][0], mask.shape[1]) + pos
    y = linear(w, out["dec_in"], "trunk.decoder.decoder_embed")
    y = blocks(w, y, "trunk.decoder.decoder_blocks", c["decoder_num_heads"])
    head = "head" if "head.weight" in w else "heads.0.projector"
    out["pred"] = linear(w, norm(w, y, "trunk.decoder.norm"), head)
    out["target"] = standard(cut(unit(r, x), c["t_patch_size"], c["patch_size"]), 3)
    out["token_loss"] = (out["pred"] - out["target"]).square().mean(dim=-1)
    out["loss"] = (out["token_loss"] * mask).sum() / mask.sum()
    return {f"{kind}/{name}": x for name, x in out.items()} | tables(r, table, table)


def classifier(r, w, key, prefix=""):
    """Features, logits and loss of a classifier; key: the array of its pixels."""
    c, method, x = r.config, r.meta["method"], replay_golden.pixels(r, key)
    out, old = {}, c["grid"]
    if method == "OmniMAE" and x.ndim == 4:
        h, v = (n // c["patch_size"] for n in x.shape[2:])
        x, table = x[:, :, None].repeat(1, 1, 2, 1, 1), table_1d(c["embed_dim"], old[1] * old[2])
        square = table.T.reshape(1, -1, *old[1:])
        table = F.interpolate(square, (h, v), mode="bicubic")[0].flatten(1).T
    elif method == "MultiMAE":
        table = table_2d(c["embed_dim"], *old[1:], rows_first=True)
    else:
        table, row = positions(w, c, method)
    name = {"OmniMAE": "trunk.patch_embed.proj.1", "MultiMAE": "input_adapters.rgb.proj"}
    tokens = out["tokens"] = embed(w, x, name.get(method, "patch_embed.proj"))
    y, first = tokens + table, method == "MAE-ST"  # which leaves a cube out without a class token
    if "cls_token" in w:
        y, first = torch.cat([(w["cls_token"] + row).expand(len(x), -1, -1), y], dim=1), True
    if method == "MultiMAE":
        y = torch.cat([y, w["global_tokens"].expand(len(x), -1, -1)], dim=1)
    name = {"OmniMAE": "trunk.blocks", "MultiMAE": "encoder"}.get(method, "blocks")
    y = blocks(w, y, name, c["num_heads"])
    takes_first = "norm over all tokens" in c["pooling"]
    y = y[:, 0] if takes_first else y[:, int(first) :].mean(dim=1)
    names = ("fc_norm", "norm", "trunk.norm", "output_adapters.cls.norm")
    out["features"] = norm(w, y, next(n for n in names if f"{n}.weight" in w))
    head = "head" if "head.weight" in w else "output_adapters.cls.head"
    out["logits"] = linear(w, out["features"], head)
    labels = torch.from_numpy(r.arrays["labels"]).long()
    if len(labels) == len(x):
        out["loss"] = F.cross_entropy(out["logits"], labels)
    if "pos_rows" in c and method == "VideoMAE":
        out["pos_encoder"] = table[c["pos_rows"]]
    return {f"{prefix}{name}": x for name, x in out.items()}


class Maps:
    """MultiMAE: inputs, tokens, tasks and losses of a golden file."""

    def __init__(self, r, w):
        self.c, self.w, self.grid = r.config, w, r.config["grid"][1:]
        depth = torch.from_numpy(r.arrays["depth_u8"].astype(np.float32)) / 255
        n = depth[0].numel()
        middle = depth.flatten(1).sort(dim=1).values[:, int(0.1 * n) : int(0.9 * n)]
        mean, var = (f(dim=1)[:, None, None, None] for f in (middle.mean, middle.var))
        self.inputs = {"rgb": replay_golden.pixels(r, "rgb_u8"),
                       "depth": (depth - mean) / (var + 1e-6).sqrt(),
                       "semseg": torch.from_numpy(r.arrays["semseg"]).long()}

    def side(self, m):
        return self.c["patch_size"] // self.c["stride"][m]

    def size(self, inputs):
        """-> grid of tokens (h, w)."""
        m, x = next(iter(inputs.items()))
        return tuple(n // self.side(m) for n in x.shape[-2:])

    def table(self, width, size, mode):
        x = table_2d(width, *self.grid, rows_first=True).T.reshape(1, width, *self.grid)
        return F.interpolate(x, size, mode=mode)[0].flatten(1).T

    def encode(self, inputs, keep):
        tokens = []
        for m, x in inputs.items():
            if m == "semseg":
                x = self.w["input_adapters.semseg.class_emb.weight"][x].movedim(-1, 1)
            mode = "bilinear" if m == "semseg" else "bicubic"
            table = self.table(self.c["embed_dim"], self.size(inputs), mode)
            tokens.append(embed(self.w, x, f"input_adapters.{m}.proj") + table)
        x = take(torch.cat(tokens, dim=1), keep)
        x = torch.cat([x, self.w["global_tokens"].expand(len(x), -1, -1)], dim=1)
        return blocks(self.w, x, "encoder", self.c["num_heads"])

    def decode(self, task, latent, inputs, keep):
        """-> (B, values of a pixel, H, W)"""
        w, one, m = self.w, f"output_adapters.{task}", task.removeprefix("norm_")
        h, v = self.size(inputs)
        table = self.table(self.c["decoder_embed_dim"], (h, v), "bilinear")
        places = {k: table + w[f"{one}.task_embeddings.{k}"][0] for k in ("rgb", "depth", "semseg")}
        y, token = linear(w, latent, f"{one}.proj_context"), w[f"{one}.mask_token"][0, 0]
        full = put(y[:, :-1], keep, token, h * v * len(inputs))
        full = full + torch.cat([places[k] for k in inputs])
        context = torch.cat([take(full, keep), y[:, -1:]], dim=1)
        queries = (token + places[m]).expand(len(y), -1, -1)
        if m in inputs:
            queries = full.chunk(len(inputs), dim=1)[list(inputs).index(m)]
        keys = linear(w, norm(w, context, f"{one}.context_norm"), f"{one}.decoder.kv").chunk(2, -1)
        q = linear(w, norm(w, queries, f"{one}.query_norm"), f"{one}.decoder.q")
        x = linear(w, attend(q, *keys, self.c["decoder_num_heads"]), f"{one}.decoder.proj")
        x = x + mlp(w, norm(w, x, f"{one}.out_norm"), f"{one}.mlp")
        x = blocks(w, x, f"{one}.decoder_transformer", self.c["decoder_num_heads"])
        p = self.side(m)
        return F.fold(linear(w, x, f"{one}.out_proj").mT, (h * p, v * p), p, stride=p)

    def target(self, task):
        x, p = self.inputs[task.removeprefix("norm_")], self.c["patch_size"]
        if task == "norm_rgb":
            patches = standard(F.unfold(x, p, stride=p).mT).mT
            return F.fold(patches, x.shape[-2:], p, stride=p)
        return x

    def masks(self, inputs, keep):
        h, v = self.size(inputs)
        mask = torch.ones(len(keep), h * v * len(inputs)).scatter(1, keep, 0)
        return dict(zip(inputs, mask.chunk(len(inputs), dim=1)))

    def losses(self, preds, inputs, keep):
        """A loop over samples; those in which nothing counts are left out."""
        losses, masks, (h, v) = {}, self.masks(inputs, keep), self.size(inputs)
        for task, pred in preds.items():
            m, target = task.removeprefix("norm_"), self.target(task)
            count = masks.get(m, torch.ones(len(pred), h * v)).reshape(-1, h, v)
            count = count.repeat_interleave(self.side(m), 1).repeat_interleave(self.side(m), 2)
            if m == "semseg":
                error = -pred.log_softmax(dim=1).gather(1, target[:, None])[:, 0]
            elif m == "depth":
                error = (pred - target).abs().mean(dim=1)
            else:
                error = (pred - target).square().mean(dim=1)
            each = [e[n == 1].mean() for e, n in zip(error, count) if n.any()]
            losses[task] = torch.stack(each).mean()
        return losses

    def step(self, inputs, keep):
        latent = self.encode(inputs, keep)
        preds = {t: self.decode(t, latent, inputs, keep) for t in self.c["decoders"]}
        return latent, preds


def multimae(r, w):
    """All scenarios of a MultiMAE file."""
    maps, c, a = Maps(r, w), r.config, r.arrays
    out = {}
    widths = (c[k] for k in ("embed_dim", "decoder_embed_dim"))
    out |= tables(r, *(table_2d(width, *maps.grid, rows_first=True) for width in widths))
    out |= {f"target/{task}": maps.target(task) for task in ("depth", "norm_rgb")}
    large = {"rgb": replay_golden.pixels(r, "hires/rgb_u8"),
             "semseg": torch.from_numpy(a["hires/semseg"]).long()}
    scenarios = {"all": maps.inputs, "edge": maps.inputs, "rgb_only": {"rgb": maps.inputs["rgb"]},
                 "full": maps.inputs, "depth_only": {"depth": maps.inputs["depth"]}, "hires": large}
    for name, inputs in scenarios.items():
        tokens = math.prod(maps.size(inputs)) * len(inputs)
        everything = np.arange(tokens)[None].repeat(len(next(iter(inputs.values()))), 0)
        keep = torch.from_numpy(a.get(f"{name}/ids_keep", everything)).long()
        latent, preds = maps.step(inputs, keep)
        out |= {f"{name}/latent": latent} | {f"{name}/pred/{t}": x for t, x in preds.items()}
        if f"{name}/ids_keep" in a:
            losses = maps.losses(preds, inputs, keep)
            losses["total"] = sum(losses.values())
            out |= {f"{name}/mask/{m}": x for m, x in maps.masks(inputs, keep).items()}
            out |= {f"{name}/loss/{t}": x for t, x in losses.items()}
            out[f"{name}/grad_norm"] = gradients(losses["total"], w)
    return out


def gradients(loss, w):
    """-1: no gradient reaches this tensor."""
    found = torch.autograd.grad(loss, list(w.values()), allow_unused=True, retain_graph=True)
    return torch.tensor([-1.0 if g is None else g.norm() for g in found])


def leaves(r):
    return {name: x.clone().requires_grad_() for name, x in r.weights.items()}


def train(r, losses_of):
    """Three updates of AdamW.   losses_of(w, i) -> losses of update i, whose sum is minimised"""
    w, s, method = leaves(r), r.config["steps"], r.meta["method"]
    groups = [{"params": [], "weight_decay": s["weight_decay"]}, {"params": [], "weight_decay": 0}]
    for name, x in w.items():
        spared = method == "VideoMAE" and name == "mask_token"
        decays = method == "MultiMAE" or (x.ndim > 1 and not spared)
        groups[not decays]["params"].append(x)
    optimizer = torch.optim.AdamW(groups, s["lr"], betas=tuple(s["betas"]), eps=s["eps"])
    rows = []
    for i in range(s["updates"] + 1):
        losses = losses_of(w, i)
        rows.append([loss.item() for loss in losses])
        if i < s["updates"]:
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    norms = torch.tensor([x.detach().norm() for x in w.values()])
    rows = torch.tensor(rows)
    return {"steps_loss": rows if method == "MultiMAE" else rows[:, 0], "steps_param_norm": norms}


def plain(r):
    """All results of a golden file -> {name of the array: value}."""
    method, w = r.meta["method"], leaves(r)
    out = {f"{key}_out": torch.stack([norm(w, torch.from_numpy(r.arrays[f"{key}_in"]), name)
                                      for name in r.config[key]])
           for key in ("norm_probe", "norm_probe_dec") if key in r.config}
    if "steps" in r.config and method == "MultiMAE":
        def losses_of(w, i):
            maps, keep = Maps(r, w), torch.from_numpy(r.arrays["steps_ids_keep"][i]).long()
            preds = maps.step(maps.inputs, keep)[1]
            return list(maps.losses(preds, maps.inputs, keep).values())

        return out | multimae(r, w) | train(r, losses_of)
    if "steps" in r.config:
        step = {"VideoMAE": videomae, "OmniMAE": omnimae}.get(method, mae)
        kinds = ["image", "video"] if method == "OmniMAE" else [""]
        prefixes = [f"{kind}/" if kind else "" for kind in kinds]
        for kind, prefix in zip(kinds, prefixes):
            found = step(r, w, kind)
            out |= found | {f"{prefix}grad_norm": gradients(found[f"{prefix}loss"], w)}
        return out | train(r, lambda w, i: [
            step(r, w, kinds[i % len(kinds)])[f"{prefixes[i % len(kinds)]}loss"]])
    both = {"OmniMAE": {"image/": "image_u8", "video/": "video_u8"},
            "MAE": {"": "image_u8"}, "MultiMAE": {"": "rgb_u8"}}.get(method, {"": "video_u8"})
    for prefix, key in both.items():
        found = classifier(r, w, key, prefix)
        out |= found | {f"{prefix}grad_norm": gradients(found[f"{prefix}loss"], w)}
    if "hires/image_u8" in r.arrays:
        out |= classifier(r, w, "hires/image_u8", "hires/")
        out["pos_encoder"] = table_1d(r.config["embed_dim"], r.config["num_patches"])
        out["pos_encoder"] = out["pos_encoder"][r.config["pos_rows"]]
    return out


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_plain_implementation_has_the_official_numbers(path):
    r = replay_golden.Replay(path)
    for name, value in plain(r).items():
        if name in r.meta["arrays"]:
            r.check(name, value)
    assert len(r.shares) > 3 and all(share <= 1 for share in r.shares.values()), r.shares


# ---- the same for rectangles ---------------------------------------------------------------------


def rectangle(source, folder, size):
    """A file like `source` for pictures of another height and width, results from plain()."""
    meta = json.loads(source.with_suffix(".json").read_text())
    with np.load(source) as content:
        arrays = dict(content)
    c, docs, rng = meta["config"], meta["arrays"], np.random.default_rng(0)
    p, (t, *square), grid = c["patch_size"], c["grid"], [side // c["patch_size"] for side in size]
    n, more = math.prod(grid), math.prod(grid) - math.prod(square)
    N = t * n
    c |= {"img_size": list(size), "grid": [t, *grid], "num_patches": N, "num_patches_image": n,
          "num_patches_per_modality": n, "pos_rows": list(range(N + (meta["method"] == "MAE")))}
    if "hires_img_size" in c:
        c["hires_img_size"] = [2 * size[0], size[1] + p]
    if "masked_per_frame" in c:
        c["masked_per_frame"] = int(c["mask_ratio"] * n)
        c["num_visible"] = N - t * c["masked_per_frame"]
    elif "mask_ratio" in c:
        c["len_keep"] = int(N * (1 - c["mask_ratio"]))
    for kind, tokens in (("image", n), ("video", N)):
        if f"mask_ratio_{kind}" in c:
            c[f"num_hidden_{kind}"] = int(c[f"mask_ratio_{kind}"] * tokens)

    for tensor in meta["tensors"]:  # tables of positions
        name, shape, _ = tensor
        if name.endswith("pos_emb"):
            shape[2:] = grid
        elif "pos_embed" in name and not name.endswith(("temporal", "class")):
            shape[1] += more * (1 if name.endswith("spatial") else t)
    draw = np.random.RandomState(meta["weight_seed"])
    drawn = [replay_golden.KIND[kind](draw.standard_normal(shape)).astype(np.float32)
             for _, shape, kind in meta["tensors"] if kind != "fixed"]
    meta["weights_check"]["sum_abs"] = sum(float(np.abs(x).sum(dtype=np.float64)) for x in drawn)

    def hide(count, tokens):
        return np.stack([rng.permutation(tokens) < count for _ in range(c["batch"])])

    for name, doc in docs.items():
        x, (H, W) = arrays[name], c["hires_img_size"] if name.startswith("hires") else size
        if doc["role"] != "in":
            continue
        if name.endswith("_u8"):
            x = rng.integers(0, 256, (*x.shape[:-2], H, W), dtype=np.uint8)
        elif name.endswith("semseg"):
            x = rng.integers(0, c["num_classes_semseg"], (len(x), H // 4, W // 4), dtype=np.uint8)
        elif name == "noise":
            x = rng.random((len(x), N), dtype=np.float32)
        elif name == "mask":
            x = np.tile(hide(c["masked_per_frame"], n), (1, t))
        elif name.endswith("/mask"):
            kind = name.split("/")[0]
            x = hide(c[f"num_hidden_{kind}"], n if kind == "image" else N)
        elif name == "edge/ids_keep":  # of the first sample, all of RGB and nothing else
            x = np.stack([np.arange(n), *(rng.permutation(3 * n)[:n] for _ in x[1:])])
        elif name.endswith("ids_keep"):
            tokens = n if name.startswith("rgb_only") else 3 * n
            x = np.apply_along_axis(lambda row: rng.permutation(tokens)[: len(row)], -1, x)
        arrays[name], doc["shape"] = x, list(x.shape)

    path = folder / f"{source.stem}.npz"
    for results in (False, True):  # the inputs are written, read, and written with the results
        if results:
            r = replay_golden.Replay(path)
            found = {k: x.detach().numpy() for k, x in plain(r).items() if k in docs}
            if "steps_param_norm" in found:  # gradients of key biases are noise, see there
                found["steps_param_norm"][arrays["steps_param_norm"] < 0] = -1
            arrays |= found
            for name, x in found.items():
                docs[name] |= {"shape": list(x.shape), "stride": 1}
        np.savez(path, **arrays)
        path.with_suffix(".json").write_text(json.dumps(meta))
    return path


@pytest.mark.parametrize("source", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", [(24, 32), (40, 24)], ids=["wide", "tall"])
def test_every_model_replays_rectangles(source, size, tmp_path):
    r = replay_golden.replay(rectangle(source, tmp_path, size))
    assert r.config["grid"][1:] == [side // r.config["patch_size"] for side in size]
    results = {name for name, doc in r.meta["arrays"].items() if doc["role"] == "out"}
    assert set(r.shares) == results and all(share <= 1 for share in r.shares.values()), r.shares
