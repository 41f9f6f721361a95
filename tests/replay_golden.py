"""replay_golden.py - do our models compute what the official ones do?

    python tests/replay_golden.py tests/golden/mae_pretrain_normpix.npz ...

A golden file NAME.npz (with NAME.json beside it) holds inputs and results of an official
implementation with small random weights, which follow from a seed and are not stored. This prints
the largest difference in every array as a share of its tolerance. Exit code 0: all are at most 1.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune  # noqa: E402
import mae_image  # noqa: E402
import mae_video  # noqa: E402
import masking  # noqa: E402
import multimae  # noqa: E402

FACTORS = {"table": 0.5, "small": 0.02, "scale": 0.1, "bias": 0.1}  # of random weights
OPTIONS = {"img_size": "img_size", "patch_size": "patch", "num_frames": "frames",
           "t_patch_size": "tubelet", "norm_pix_loss": "norm_pix", "normalize_target": "norm_pix",
           "pred_t_dim": "predicted", "sep_pos_embed": "separable", "modalities": "modalities",
           "cls_embed": "cls", "num_classes_semseg": "classes", "class_emb_dim": "class_width"}
NAMES = {  # of tensors, in all papers: regular expressions, applied in this order
    r"^(trunk\.|output_adapters\.cls\.|fc_(?=norm))": "", r"proj\.1\.": "proj.",
    r"^encoder_to_decoder": "decoder_embed", r"^encoder\.(\d)": r"blocks.\1", r"^encoder\.": "",
    r"^decoder\.(decoder_)?(blocks|norm|embed)": r"decoder_\2",
    r"^(decoder\.head|heads\.0\.projector)": "decoder_pred",
    r"attn\.([qkv]\.|[qv]_)": "attn.qkv.",
}


class Replay:
    """One golden file: inputs, weights, and what was compared so far."""

    def __init__(self, path):
        path = Path(path)
        self.name, self.meta = path.stem, json.loads(path.with_suffix(".json").read_text())
        self.arrays = dict(np.load(path))
        self.kind = self.meta["method"].lower().replace("-", "_").replace("omnimae", "omni")
        self.config, self.shares, self.weights = self.meta["config"], {}, self.draw_weights()

    def draw_weights(self):
        draw, weights = np.random.RandomState(self.meta.get("weight_seed") or 0), {}
        for name, shape, kind in self.meta["tensors"]:
            if kind != "fixed":
                x = draw.standard_normal(tuple(shape))
                x = x / np.sqrt(np.prod(shape[1:])) if kind == "weight" else FACTORS[kind] * x
                weights[name] = torch.from_numpy((x + (kind == "scale")).astype(np.float32))
        return weights

    def tensor(self, name):
        return torch.from_numpy(self.arrays[name].copy())

    def inputs(self):
        kinds = [kind for kind in ("image", "video", "rgb") if f"{kind}_u8" in self.arrays]
        return [(kind, f"{kind}/" * (self.kind == "omni")) for kind in kinds]  # of its results

    def pixels(self, name):
        """Model input as the golden files define it."""
        x = self.arrays[name].astype(np.float32)
        shape = (1, 3) + (1,) * (x.ndim - 2)
        mean, std = (np.float32(self.config[f"input_{k}"]).reshape(shape) for k in ("mean", "std"))
        return torch.from_numpy((x / np.float32(255) - mean) / std)

    def check_all(self, prefix="", **values):
        for name, value in values.items():
            self.check(f"{prefix}{name}", value)

    def check(self, name, value):
        """Note how far `value` (the full array) is from what the file has, if it has any."""
        if name not in self.arrays:
            return
        doc, want = self.meta["arrays"][name], self.arrays[name].astype(np.float64)
        value = np.asarray(value.detach() if torch.is_tensor(value) else value, dtype=np.float64)
        assert list(value.shape) == doc["shape"], f"{name}: shape {value.shape}, not {doc['shape']}"
        value = value.reshape(-1)[:: doc["stride"]].reshape(want.shape)
        # -1: not compared. The gradient of a key bias is noise, which Adam blows up
        gap = np.abs(value - want) * ((want >= 0) | (name != "steps_param_norm"))
        allowed = np.maximum(doc.get("atol", 0) + doc.get("rtol", 0) * np.abs(want), 1e-300)
        self.shares[name] = float((gap / allowed).max()) if np.isfinite(value).all() else np.inf


def our_name(name, tuned):
    """Official name of a tensor -> ours, in a classifier if tuned; of q, k, v the fused qkv."""
    for pattern, ours in NAMES.items():
        name = re.sub(pattern, ours, name)
    if tuned:
        return name if name.startswith(("norm.", "head.")) else f"encoder.{name}"
    return re.sub(r"^head\.", "decoder_pred.", name)


def norms(r, model, loss=None):
    """The norm of every official tensor, or of a loss's gradient by it; -1 where there is none."""
    own, values = dict(model.named_parameters()), []
    if loss is not None:
        model.zero_grad()
        loss.backward()
    for name in r.weights:
        tensor = own[our_name(name, "num_classes" in r.config)]
        tensor = tensor.detach() if loss is None else tensor.grad
        part = re.search(r"attn\.([qkv])[._]", name)
        if part and tensor is not None:
            tensor = tensor.chunk(3)["qkv".index(part[1])]
        values.append(-1.0 if tensor is None else float(tensor.double().norm()))
    return values


def check_groups(r, prefix, model, groups, names, tuned):
    own = dict(model.named_parameters())
    group_of = {id(p): group for group in groups for p in group["params"]}
    for key in ("lr_scale", "weight_decay"):
        values = [group_of[id(own[our_name(name, tuned)])].get(key) for name in names]
        r.check(f"{prefix}{key}", values)


def check_parts(r, model, encoder, tuned):
    """Tables of positions, and a tiny vector through every LayerNorm, which shows its epsilon."""
    for name, part in (("pos_encoder", ""), ("pos_decoder", "decoder_")):
        if name in r.arrays:
            table = getattr(encoder, f"{part}pos_embed", encoder.pos_embed)[0]
            if r.kind == "mae":  # the official table has a row of zeros for the class token
                table = torch.cat([torch.zeros(1, table.shape[1]), table])
            r.check(name, table[r.config["pos_rows"]])
    for key in ("norm_probe", "norm_probe_dec"):
        if f"{key}_in" in r.arrays:
            names = [our_name(f"{name}.", tuned)[:-1] for name in r.config[key]]
            outs = [model.get_submodule(name)(r.tensor(f"{key}_in")) for name in names]
            r.check(f"{key}_out", torch.stack(outs))


def in_order_of(ids_keep, x):
    """Our visible tokens are in raster order; the official ones in the order of ids_keep."""
    rank = ids_keep.argsort(dim=1).argsort(dim=1)  # place of each official token in raster order
    return x.gather(1, rank[..., None].expand(-1, -1, x.shape[2]))


def three_updates(r, model, losses_of):
    """AdamW as in config.steps, on groups of our own.   losses_of(i): those of update i, a list"""
    s, rows = r.config["steps"], []
    groups = mae_image.param_groups(model, s["weight_decay"])
    optimizer = torch.optim.AdamW(groups, s["lr"], betas=tuple(s["betas"]), eps=s["eps"])
    for i in range(s["updates"] + 1):
        losses = losses_of(i)
        rows.append([loss.item() for loss in losses])
        if i < s["updates"]:
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    r.check("steps_loss", rows if len(losses) > 1 else np.squeeze(rows, 1))
    r.check("steps_param_norm", norms(r, model))


def build(r):
    """The model of a file, with its weights read by the code of a user's --init FILE."""
    c = r.config
    options = {ours: c[theirs] for theirs, ours in OPTIONS.items() if theirs in c}
    for name, part in (("size", ""), ("decoder", "decoder_")):
        options[name] = tuple(c[part + k] for k in ("embed_dim", "depth", "num_heads"))
    model = finetune.MODELS[r.kind](**options)
    mae_image.load_into(model, finetune.READERS[r.kind](mae_image.fuse_qkv(r.weights))[1])
    check_parts(r, model, model, tuned=False)
    return model


def replay_pretrain(r):
    """MAE, MAE-ST, VideoMAE and OmniMAE: every stored step from tokens to the third update."""
    c, model, batches, seen = r.config, build(r), [], {}
    for layer in model.children():  # seen: input and output of each layer
        layer.register_forward_hook(lambda layer, x, y: seen.update({layer: (x[0], y)}))
    for block in model.decoder_blocks if r.kind == "omni" else ():  # released ones have no bias
        block.attn.qkv.bias.requires_grad_(c["decoder_qkv_bias"] == "fused")
    r.check("frame_index", getattr(model, "frame_index", None))
    for kind, prefix in r.inputs():
        x = r.pixels(f"{kind}_u8")
        noisy = "noise" in r.arrays
        order = r.tensor("noise" if noisy else f"{prefix}mask").float()
        N = order.shape[1]
        count = masking.num_hidden(N, c["mask_ratio"], "keep") if noisy else int(order[0].sum())
        mask = masking.hide_largest(order, count)
        ids_keep = order.argsort(dim=1, stable=True)[:, : N - count]
        if noisy:
            r.check_all(mask=mask.float(), ids_keep=ids_keep)
        patches = model.patches(x) if r.kind == "mae" else model.cubes(x)
        r.check(f"{prefix}tokens", model.patch_embed(patches))
        first, latent = model.forward_encoder(x, mask).tensor_split([-ids_keep.shape[1]], dim=1)
        parts = [first] * (r.kind == "mae") + [in_order_of(ids_keep, latent)]
        r.check(f"{prefix}latent", torch.cat(parts, dim=1))
        (loss, pred), target = model(x, mask), model.target(x, mask)
        r.check_all(prefix, loss=loss, dec_in=seen[model.decoder_embed][0])
        if r.kind != "videomae":  # official models paint and normalise the visible patches, too
            every = model.decoder_pred(seen[model.decoder_norm][1][:, -mask.shape[1] :])
            assert torch.allclose(masking.hidden(every, mask), pred, atol=1e-6)
            pred, target = every, model.patches(x)
            target = model.normalize_patches(target)[0] if model.norm_pix else target
        r.check_all(prefix, pred=pred, target=target, grad_norm=norms(r, model, loss))
        r.check(f"{prefix}token_loss", ((pred - target) ** 2).mean(dim=-1))
        batches.append((x, mask))
    three_updates(r, model, lambda i: [model(*batches[i % len(batches)])[0]])


def scenarios(r):
    """MultiMAE -> {name: ({modality: map}, numbers of the visible tokens, mask)}."""
    depth = multimae.standardize_depth(r.tensor("depth_u8").float() / 255)
    maps = {"rgb": r.pixels("rgb_u8"), "depth": depth, "semseg": r.tensor("semseg").long()}
    large = {"rgb": r.pixels("hires/rgb_u8"), "semseg": r.tensor("hires/semseg").long()}
    found = {"all": maps, "edge": maps, "rgb_only": {"rgb": maps["rgb"]}, "full": maps,
             "depth_only": {"depth": depth}, "hires": large}
    for name, inputs in found.items():
        B, _, H, W = next(iter(inputs.values())).shape
        N = H * W // r.config["patch_size"] ** 2 * len(inputs)
        keep = torch.tensor(r.arrays.get(f"{name}/ids_keep", [range(N)] * B)).long()
        found[name] = inputs, keep, torch.ones(B, N).scatter(1, keep, 0).bool()
    return found


def replay_multimae_pretrain(r):
    """MultiMAE: scenarios of given modalities and visible tokens, and three updates."""
    model, found = build(r), scenarios(r)
    maps, _, mask_of_all = found["all"]
    def picture(task, values, like):
        """Our patches (channel, row, col) -> the official image layout (B, C, H, W)."""
        side = model.side(task)
        size = [n // model.patch * side for n in like.shape[-2:]]
        return F.fold(values.mT, size, side, stride=side)
    normalised = picture("norm_rgb", model.target("norm_rgb", maps["rgb"]), maps["rgb"])
    r.check_all("target/", depth=maps["depth"], norm_rgb=normalised)
    for name, (inputs, keep, mask) in found.items():
        latent = model.forward_encoder(inputs, mask)
        preds = model.forward_decoder(latent, inputs, mask)
        latent = torch.cat([in_order_of(keep, latent[:, :-1]), latent[:, -1:]], dim=1)
        r.check(f"{name}/latent", latent)
        for task, pred in preds.items():
            r.check(f"{name}/pred/{task}", picture(task, pred, next(iter(inputs.values()))))
        for m, part in zip(inputs, mask.chunk(len(inputs), dim=1)):
            r.check(f"{name}/mask/{m}", part.float())
        if f"{name}/grad_norm" in r.arrays:
            losses = model.task_losses(preds, maps, inputs, mask)
            total = sum(losses.values())
            r.check_all(f"{name}/loss/", **losses, total=total)
            r.check(f"{name}/grad_norm", norms(r, model, total))
    def losses_of(i):
        mask = torch.ones_like(mask_of_all).scatter(1, r.tensor("steps_ids_keep")[i].long(), False)
        losses = model.task_losses(model(maps, mask)[1], maps, maps, mask)
        return [losses[task] for task in r.config["decoders"]]
    three_updates(r, model, losses_of)


def load_classifier(r):
    """A classifier with its weights, by the code of a user's --init FILE --eval-only."""
    c, (h, w) = r.config, r.config["img_size"]
    said, state, _ = finetune.READERS[r.kind](mae_image.fuse_qkv(r.weights))
    said |= {"model": r.kind, "frames": c.get("num_frames", 8), "img_size": f"{h}x{w}",
             "size": f"{c['embed_dim']}x{c['depth']}x{c['num_heads']}"}
    found = mae_image.Found(r.name, r.kind, said, state)
    known = {k: v for k, v in said.items() if hasattr(finetune.Config, k)}
    cfg = finetune.Config(**known, eval_only=True)
    finetune.as_it_was_built(cfg, found)
    model = finetune.build(cfg, c["num_classes"], found).eval()
    assert model.encoder.grid == tuple(c["grid"])
    check_parts(r, model, model.encoder, tuned=True)
    return model


def replay_classifier(r):
    """Features, logits, loss and every gradient norm; groups of the optimiser; a larger image."""
    c, model = r.config, load_classifier(r)
    encoder = model.encoder
    for kind, prefix in r.inputs():
        x = r.pixels(f"{kind}_u8")
        if kind != "rgb":
            patches = encoder.patches(x) if r.kind == "mae" else encoder.cubes(x)
            r.check(f"{prefix}tokens", encoder.patch_embed(patches))
        logits = model(x)
        loss = F.cross_entropy(logits, r.tensor("labels").long())
        r.check_all(prefix, features=model.features(x), logits=logits, loss=loss)
        values = norms(r, model, loss)
        if r.kind == "mae":  # its table has a row for the class token, to which ours adds it
            both = torch.cat([p.grad.flatten() for p in (encoder.pos_embed, encoder.cls_token)])
            values[list(r.weights).index("pos_embed")] = float(both.double().norm())
        r.check(f"{prefix}grad_norm", values)
    if "layer_decay" in c:
        groups = finetune.layer_groups(model, c.get("weight_decay", 0.05), c["layer_decay"])
        for group in groups if r.kind == "omni" else ():
            group["lr_scale"] *= c["layer_decay"]  # one step more, see there
        check_groups(r, "", model, groups, r.weights, tuned=True)
    if "hires/image_u8" in r.arrays:
        h, w = (side // c["patch_size"] for side in c["hires_img_size"])
        finetune.change_grid(encoder, (c["grid"][0], h, w))
        r.check("hires/logits", model(r.pixels("hires/image_u8")))


def check_decay(r, *shape, layer_scale=False):
    """Weight decay in pretraining; it and the learning rates in fine-tuning, by our groups."""
    Model, names, s = finetune.MODELS[r.kind], r.meta["names"], r.config["pretrain"]
    model = Model(*shape, (48, s["depth"], 3), (32, s["decoder_depth"], 4))
    groups = mae_image.param_groups(model, s["weight_decay"])
    check_groups(r, "pretrain_", model, groups, names["pretrain"], tuned=False)
    s = r.config["layerdecay"]
    model = Model(*shape, (48, s["depth"], 3), (32, 1, 4))
    model = finetune.Classifier(model, 10, layer_scale=layer_scale)
    groups = finetune.layer_groups(model, s["weight_decay"], s["layer_decay"])
    check_groups(r, "layerdecay_", model, groups, names["layerdecay"], tuned=True)


def replay_functions_mae(r):
    """Single functions. Where .values() are arguments they stand in that order in the file."""
    c = r.config
    check_decay(r, 32, 8)
    for name in ("sincos_table", "sincos_table_nocls", "sincos_full_rows"):
        width, side, cls, *rows = c[name].values()
        table = torch.cat([torch.zeros(int(cls), width), mae_image.sincos_2d(width, side, side)])
        r.check(name, table[rows[0]] if rows else table)
    patch = c["patchify"]["patch_size"]
    r.check("patchify_out", mae_image.patchify(r.tensor("patchify_in"), patch))
    *schedule, epochs, scales = c["lr"].values()
    r.check("lr_values", np.outer([mae_image.lr_at(e, *schedule) for e in epochs], scales))
    lr, momentum, _, decay = c["lars"].values()
    params, path = [torch.nn.Parameter(r.tensor(f"lars_{k}0")) for k in "Wb"], []
    lars = finetune.LARS([{"params": params, "weight_decay": decay}], lr, momentum)
    for gradients in zip(r.tensor("lars_gradW"), r.tensor("lars_gradb")):
        params[0].grad, params[1].grad = gradients
        lars.step()
        path.append([p.detach().clone() for p in params])
    for k, values in zip("Wb", zip(*path)):
        r.check(f"lars_{k}", torch.stack(values))
    table, (old, new, _) = r.tensor("interp_in"), c["interp"].values()
    resized = mae_video.resize_table(table[:, 1:], (1, old, old), (1, new, new))
    r.check("interp_out", torch.cat([table[:, :1], resized], dim=1))
    encoder = mae_image.MAE(16, 8, (8, 1, 2), (8, 0, 2))
    model = finetune.Classifier(encoder, 5, "first", False, frozen=True)
    assert {f"head.{k}" for k in model.head.state_dict()} == {*r.meta["names"]["probe_state_keys"]}
    model.head[1].weight.data = r.tensor("probe_weight")
    model.head[1].bias.data = r.tensor("probe_bias")
    r.check("probe_logits_train", model.train().head(r.tensor("probe_features")))
    r.check("probe_logits_eval", model.eval().head(r.tensor("probe_features")))


def replay_functions_mae_st(r):
    c = r.config
    check_decay(r, 8, 32, 2, 8)
    for i, (frames, predicted) in enumerate(c["target_frames"]):
        r.check(f"target_frames_{i}", mae_video.target_frames(frames, predicted))
    x, (frames, tubelet, predicted, patch) = r.tensor("patchify_in"), c["patchify"].values()
    sizes = (48, 1, 3), (32, 1, 4)
    model = mae_video.MAEST(frames, x.shape[3:], tubelet, patch, *sizes, False, predicted)
    r.check("patchify_out", model.patches(x))
    train = *c["train_clip"].values(), float(r.arrays["train_clip_start_end"][0])
    r.check("train_clip_frames", mae_video.linspace_clip(*train))
    r.check("test_clip_frames", mae_video.views_of("linspace", *c["test_clip"].values()))


def replay_functions_videomae(r):
    c = r.config
    check_decay(r, 8, 32, 2, 8, layer_scale=True)
    for name in ("sinusoid_table", "sinusoid_full_rows"):
        N, width, rows = [*c[name].values(), None][:3]  # [None]: the whole table, a batch of one
        r.check(name, mae_video.sinusoid(width, N)[rows])
    peak, floor, epochs, n, warmup, _ = c["lr"].values()
    schedule = peak, floor, warmup * n, epochs * n, True  # both ends of the warm-up
    r.check("lr_schedule", [mae_image.lr_at(i, *schedule) for i in range(epochs * n)])
    window, ratio = c["tube_mask"].values()
    mask = masking.tube_mask(1, window, ratio, torch.Generator().manual_seed(0))
    r.check("tube_counts", [mask.reshape(window[0], -1)[0].sum(), mask.sum()])
    clips, (length, stride, seed, durations) = [], c["clips"].values()
    for n in durations:
        np.random.seed(seed)  # the official code draws from numpy's global generator
        start = np.random.randint(max(n - length * stride + 1, 1))
        clips.append(mae_video.dense_clip(n, length, stride, start))
    r.check("clips_pretrain", np.stack(clips))
    n, views, stride = c["clips_test_dense"].values()
    r.check("clips_test_dense", mae_video.views_of("dense", n, 16, stride, views))
    length, _, durations, views = c["clips_ssv2"].values()
    clips = [mae_video.views_of("segments", n, length, 1, views) for n in durations]
    r.check("clips_ssv2_test", np.stack(clips))


def replay_mask_statistics(r):
    c, n, rows, counts = r.config, r.config["num_draws"], [], []
    for i, (count, size, alpha, subset_first) in enumerate(c["multimae"]):
        g = torch.Generator().manual_seed(i)
        mask = masking.dirichlet_mask(n, [size] * 3, count, g, alpha, subset_first)
        seen = (~mask).reshape(n, 3, size).sum(dim=2).double().numpy()  # (n, 3)
        rows.append({"mean": seen.mean(0), "std": seen.std(0, ddof=1),
                     "p_none": (seen == 0).mean(0), "p_all": (seen == size).mean(0),
                     "quantiles": np.quantile(seen[:, 0], [0.05, 0.25, 0.5, 0.75, 0.95]),
                     "corr": np.corrcoef(seen[:, 0], seen[:, 1])[0, 1]})
    r.check_all("multimae_", **{key: [row[key] for row in rows] for key in rows[0]})
    for kind, mask_type, size, frames, patch, ratio in c["omnimae"]:
        t = 1 if kind == "image" else frames // c["omnimae_t_patch_size"]
        grid, more = (t, size // patch, size // patch), ["hide"] * (mask_type == "random")
        mask = masking.MASKS[mask_type](2, grid, ratio, torch.Generator().manual_seed(0), *more)
        slots, hid = mask.reshape(2, t, -1), mask[0].sum()
        counts.append([mask.shape[1], hid, (slots == slots[:, :1]).all(), mask[:, -hid:].all()])
    r.check("omnimae_counts", counts)


# What compares a file: the first of these whose words are in the file's name.
REPLAYS = {"functions_mae_st": replay_functions_mae_st, "functions_mae": replay_functions_mae,
           "functions_videomae": replay_functions_videomae, "mask": replay_mask_statistics,
           "multimae_pretrain": replay_multimae_pretrain, "pretrain": replay_pretrain,
           "": replay_classifier}


def replay(r):
    """Compare all results of one golden file.   -> {name of the array: share of its tolerance}"""
    REPLAYS[next(words for words in REPLAYS if words in r.name)](r)
    return r.shares


def main(paths):
    if not paths:
        sys.exit(__doc__)
    shares = {f"{r.name}: {k:24s}": x for r in map(Replay, paths) for k, x in replay(r).items()}
    for name, share in shares.items():
        print(f"{name} {share:8.4f} of its tolerance{'   <-- TOO FAR' * (share > 1)}")
    sys.exit(max(shares.values()) > 1)


if __name__ == "__main__":
    main(sys.argv[1:])
