"""replay_golden.py - do our models compute what the official ones do?

    python tests/replay_golden.py tests/golden/mae_pretrain_normpix.npz ...

A golden file NAME.npz (with NAME.json beside it) holds inputs and results of an official
implementation with small random weights, which follow from a seed by a fixed rule and are not
stored. For every array this prints the largest difference as a share of its tolerance; the exit
code is 0 only if all shares are at most 1.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune  # noqa: E402
import mae_image  # noqa: E402
import mae_video  # noqa: E402
import multimae  # noqa: E402
import omni  # noqa: E402
from masking import (causal_mask, dirichlet_mask, hidden, hide_largest, num_hidden,  # noqa: E402
                     random_mask, tube_mask)

KIND = {
    "weight": lambda x: x / np.sqrt(np.prod(x.shape[1:])),
    "table": lambda x: 0.5 * x,
    "small": lambda x: 0.02 * x,
    "scale": lambda x: 1 + 0.1 * x,
    "bias": lambda x: 0.1 * x,
}
OURS = {"MAE": "mae", "MAE-ST": "mae_st", "VideoMAE": "videomae"}


class Replay:
    """One golden file: inputs, weights, and what was compared so far."""

    def __init__(self, path):
        path = Path(path)
        if path.suffix != ".npz" or not path.is_file() or not path.with_suffix(".json").is_file():
            raise SystemExit(f"{path}: a golden file is NAME.npz with NAME.json beside it")
        self.name, self.meta = path.stem, json.loads(path.with_suffix(".json").read_text())
        with np.load(path) as content:
            self.arrays = dict(content)
        self.config, self.shares, self.weights = self.meta["config"], {}, self.draw_weights()
        self.names = list(self.weights)
        if self.weights:
            total = sum(float(w.double().abs().sum()) for w in self.weights.values())
            assert abs(total / self.meta["weights_check"]["sum_abs"] - 1) < 1e-5, "drawn wrongly"

    def draw_weights(self):
        draw, weights = np.random.RandomState(self.meta.get("weight_seed") or 0), {}
        for key, shape, kind in self.meta["tensors"]:
            if kind != "fixed":
                x = KIND[kind](draw.standard_normal(tuple(shape)))
                weights[key] = torch.from_numpy(x.astype(np.float32))
        return weights

    def tensor(self, name):
        return torch.from_numpy(self.arrays[name].copy())

    def check(self, name, value):
        """Note how far `value` (the full array) is from what the file has, if it has any."""
        if name not in self.meta["arrays"]:
            return
        doc, want = self.meta["arrays"][name], self.arrays[name].astype(np.float64)
        value = np.asarray(value.detach() if torch.is_tensor(value) else value, dtype=np.float64)
        assert list(value.shape) == doc["shape"], f"{name}: shape {value.shape}, not {doc['shape']}"
        if doc["stride"] > 1:
            value = value.reshape(-1)[:: doc["stride"]]
        if name.endswith("steps_param_norm"):
            value = np.where(want < 0, want, value)  # -1: not compared, see key biases below
        gap = np.abs(value - want)
        allowed = doc.get("atol", 0) + doc.get("rtol", 0) * np.abs(want)
        share = np.where(gap == 0, 0, gap / np.where(allowed == 0, 1e-300, allowed))
        self.shares[name] = float(share.max()) if np.isfinite(value).all() else np.inf


def pixels(r, key):
    """Model input as the golden files define it."""
    x = r.arrays[key].astype(np.float32)
    shape = (1, 3) + (1,) * (x.ndim - 2)
    mean, std = (np.float32(r.config[k]).reshape(shape) for k in ("input_mean", "input_std"))
    return torch.from_numpy((x / np.float32(255) - mean) / std)


def our_name(r, name):
    """Official name of a tensor -> ours, up to the parts of the fused q, k, v."""
    if r.meta["method"] == "VideoMAE":
        name = name.replace("encoder_to_decoder", "decoder_embed").removeprefix("encoder.")
        for part, ours in (("blocks.", "blocks."), ("norm.", "norm."), ("head.", "pred.")):
            name = name.replace(f"decoder.{part}", f"decoder_{ours}")
    if r.meta["method"] == "OmniMAE":
        name = name.removeprefix("trunk.").replace("proj.1.", "proj.")
        name = name.replace("decoder.decoder_", "decoder_").replace("decoder.norm", "decoder_norm")
        name = name.replace("heads.0.projector.", "head.")
    if r.meta["method"] == "MultiMAE":
        name = re.sub(r"^encoder\.", "blocks.", name).replace("output_adapters.cls.norm", "norm")
        name = name.replace("output_adapters.cls.head", "head")
    return name


def per_official_tensor(r, model, of, rename=lambda name: name):
    """The norm of every official tensor.   of: a parameter of ours -> its gradient, or itself

    Ours are renamed, except for q, k, v: their parts are cut out of the fused qkv.
    """
    own, values = dict(model.named_parameters()), []
    for name in r.names:
        ours = rename(our_name(r, name))
        part = re.search(r"attn\.([qkv])\.|([qv])_bias$", ours)
        if part:
            ours = re.sub(r"([qv])_bias$", "qkv.bias", re.sub(r"attn\.[qkv]\.", "attn.qkv.", ours))
        tensor = of(own[ours])
        if part and tensor is not None:
            tensor = tensor.chunk(3)["qkv".index(part[1] or part[2])]
        values.append(-1.0 if tensor is None else float(tensor.detach().double().norm()))
    return np.array(values)


def gradient(p):
    return p.grad


def probe_norms(r, model, rename=lambda name: name):
    """A tiny vector through every LayerNorm: the only array that sees a wrong epsilon."""
    layers = dict(model.named_modules())
    for key in ("norm_probe", "norm_probe_dec"):
        if f"{key}_in" in r.arrays:
            end = "" if r.meta["method"] == "MultiMAE" else "."
            ours = [rename(our_name(r, n + end).removesuffix(".")) for n in r.config[key]]
            x = r.tensor(f"{key}_in")
            r.check(f"{key}_out", torch.stack([layers[name](x) for name in ours]))


def three_updates(r, model, losses_of, rename=lambda name: name):
    """AdamW as in config.steps, on groups of our own.   losses_of(i): those of update i, a list

    The gradient of a key bias is rounding noise around zero, which Adam turns into full-size
    updates: the files exclude tensors that hold one from steps_param_norm.
    """
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
    several = r.meta["method"] == "MultiMAE"
    r.check("steps_loss", rows if several else np.squeeze(rows, 1))
    r.check("steps_param_norm", per_official_tensor(r, model, lambda p: p, rename))


def in_order_of(ids_keep, x):
    """Our visible tokens are in raster order; the official ones in the order of ids_keep."""
    rank = ids_keep.argsort(dim=1).argsort(dim=1)  # place of each official token in raster order
    return x.gather(1, rank[..., None].expand(-1, -1, x.shape[2]))


def load(model, kind, weights):
    """Official weights -> our model, through the same code as a user's --init FILE."""
    mae_image.load_into(model, finetune.READERS[kind](mae_image.fuse_qkv(weights))[1])


def encoder_and_decoder(c):
    return [tuple(c[part + k] for k in ("embed_dim", "depth", "num_heads"))
            for part in ("", "decoder_")]


def everywhere(model, x, mask):
    """Predictions and targets of all patches, as official models have them; ours: hidden ones."""
    caught = []
    hook = model.decoder_norm.register_forward_hook(lambda module, args, out: caught.append(out))
    pred = model(x, mask)[1]
    hook.remove()
    all_pred = model.decoder_pred(caught[0][:, -mask.shape[1] :])
    assert torch.allclose(hidden(all_pred, mask), pred, atol=1e-6)
    patches = model.patches(x)
    return all_pred, model.normalize_patches(patches)[0] if model.norm_pix else patches


def check_step(r, model, x, mask, pred, target, prefix="", rename=lambda name: name):
    """Predictions, losses and every gradient norm."""
    r.check(f"{prefix}pred", pred)
    r.check(f"{prefix}target", target)
    r.check(f"{prefix}token_loss", ((pred - target) ** 2).mean(dim=-1))
    model.zero_grad()
    loss, _ = model(x, mask)
    r.check(f"{prefix}loss", loss)
    loss.backward()
    r.check(f"{prefix}grad_norm", per_official_tensor(r, model, gradient, rename))


def replay_pretrain(r):
    """MAE, MAE-ST and VideoMAE pretraining: every stored step from tokens to the third update."""
    c, method = r.config, r.meta["method"]
    shape = c["img_size"], *(c[k] for k in ("t_patch_size",) if method != "MAE"), c["patch_size"]
    shape = *shape, *encoder_and_decoder(c), c.get("norm_pix_loss", c.get("normalize_target"))
    if method == "MAE":
        model, x = mae_image.MAE(*shape), pixels(r, "image_u8")
    elif method == "VideoMAE":
        model, x = mae_video.VideoMAE(c["num_frames"], *shape), pixels(r, "video_u8")
    else:
        more = c["pred_t_dim"], c["sep_pos_embed"], c["cls_embed"]
        model, x = mae_video.MAEST(c["num_frames"], *shape, *more), pixels(r, "video_u8")
    load(model, OURS[method], r.weights)

    N = c["num_patches"]
    if method == "VideoMAE":
        mask = r.tensor("mask").bool()
        frames, per_frame = c["grid"][0], c["grid"][1] * c["grid"][2]
        assert num_hidden(per_frame, c["mask_ratio"], "hide") == c["masked_per_frame"]
        assert N - frames * c["masked_per_frame"] == c["num_visible"] == int((~mask[0]).sum())
    else:
        noise = r.tensor("noise")
        mask = hide_largest(noise, num_hidden(N, c["mask_ratio"], "keep"))
        ids_keep = noise.argsort(dim=1)[:, : c["len_keep"]]
        r.check("mask", mask.float())
        r.check("ids_keep", ids_keep)
        places = torch.arange(N).expand_as(mask)[~mask].reshape(len(mask), -1)
        assert torch.equal(ids_keep.sort(dim=1).values, places)
    for name, ours in (("pos_encoder", "pos_embed"), ("pos_decoder", "decoder_pos_embed")):
        if name in r.arrays:
            table = getattr(model, ours)[0]
            if method == "MAE":  # the official table has a row of zeros for the class token
                table = torch.cat([torch.zeros(1, table.shape[1]), table])
            r.check(name, table[c["pos_rows"]])
    r.check("tokens", model.patch_embed(model.patches(x) if method == "MAE" else model.cubes(x)))
    probe_norms(r, model)
    r.check("frame_index", getattr(model, "frame_index", ()))

    latent = model.forward_encoder(x, mask)
    if method == "VideoMAE":
        pred, target = model(x, mask)[1], model.target(x, mask)
    else:  # the official models predict the visible patches, too
        pred, target = everywhere(model, x, mask)
        first, rest = latent.split([latent.shape[1] - c["len_keep"], c["len_keep"]], dim=1)
        latent = in_order_of(ids_keep, rest)
        latent = torch.cat([first, latent], dim=1) if method == "MAE" else latent
    r.check("latent", latent)
    check_step(r, model, x, mask, pred, target)
    three_updates(r, model, lambda i: [model(x, mask)[0]])


def pixel_head(name):
    return name.replace("head.", "decoder_pred.")


def replay_omni_pretrain(r):
    """OmniMAE: an image step and a video step, then three updates image, video, image."""
    c, batches = r.config, []
    model = omni.OmniMAE(c["num_frames"], c["img_size"], c["t_patch_size"], c["patch_size"],
                         *encoder_and_decoder(c))
    for block in model.decoder_blocks:  # the code that reads the released files has no bias here
        block.attn.qkv.bias.requires_grad_(c["decoder_qkv_bias"] == "fused")
    load(model, "omni", r.weights)
    for name in ("pos_encoder", "pos_decoder"):
        r.check(name, model.pos_embed[0, c["pos_rows"]])
    probe_norms(r, model)
    for kind in ("image", "video"):
        x, mask = pixels(r, f"{kind}_u8"), r.tensor(f"{kind}/mask").bool()
        count = num_hidden(mask.shape[1], c[f"mask_ratio_{kind}"], "hide")
        assert int(mask[0].sum()) == count == c[f"num_hidden_{kind}"]
        batches.append((x, mask))
        latent = model.forward_encoder(x, mask)
        r.check(f"{kind}/tokens", model.patch_embed(model.cubes(x)))
        r.check(f"{kind}/latent", latent)
        caught = []
        hook = model.decoder_embed.register_forward_pre_hook(lambda module, inputs: caught.extend(inputs))
        model.forward_decoder(latent, mask)
        hook.remove()
        r.check(f"{kind}/dec_in", caught[0])
        check_step(r, model, x, mask, *everywhere(model, x, mask), f"{kind}/", pixel_head)
    three_updates(r, model, lambda i: [model(*batches[i % 2])[0]], pixel_head)


def replay_multimae_pretrain(r):
    """MultiMAE: seven scenarios of given modalities and visible tokens, and three updates."""
    c, n = r.config, r.config["num_patches_per_modality"]
    model = multimae.MultiMAE(c["img_size"], c["patch_size"], *encoder_and_decoder(c),
                              c["modalities"], c["num_classes_semseg"], c["class_emb_dim"])
    load(model, "multimae", r.weights)
    depth = multimae.standardize_depth(r.tensor("depth_u8").float() / 255)
    inputs = {"rgb": pixels(r, "rgb_u8"), "depth": depth, "semseg": r.tensor("semseg").long()}
    for name, table in (("pos_encoder", model.pos_embed), ("pos_decoder", model.decoder_pos_embed)):
        r.check(name, table[0, c["pos_rows"]])
    probe_norms(r, model)
    r.check("target/depth", depth)
    target = model.target("norm_rgb", inputs["rgb"])
    r.check("target/norm_rgb", picture(model, "norm_rgb", target, inputs["rgb"]))

    def mask_of(ids_keep, tokens):
        return torch.ones(len(ids_keep), tokens).scatter(1, ids_keep, 0).bool()

    def scenario(name, given, mask, ids_keep=None):
        latent = model.forward_encoder(given, mask)
        preds = model.forward_decoder(latent, given, mask)
        kept = latent[:, :-1] if ids_keep is None else in_order_of(ids_keep, latent[:, :-1])
        r.check(f"{name}/latent", torch.cat([kept, latent[:, -1:]], dim=1))
        for task, pred in preds.items():
            like = next(iter(given.values()))
            r.check(f"{name}/pred/{task}", picture(model, task, pred, like))
        return preds

    for name, given in (("all", inputs), ("edge", inputs), ("rgb_only", {"rgb": inputs["rgb"]})):
        ids_keep = r.tensor(f"{name}/ids_keep").long()
        mask = mask_of(ids_keep, n * len(given))
        for m, part in zip(given, mask.chunk(len(given), dim=1)):
            r.check(f"{name}/mask/{m}", part.float())
        preds = scenario(name, given, mask, ids_keep)
        losses = model.task_losses(preds, inputs, given, mask)
        losses["total"] = sum(losses.values())
        for task, loss in losses.items():
            r.check(f"{name}/loss/{task}", loss)
        model.zero_grad()
        losses["total"].backward()
        r.check(f"{name}/grad_norm", per_official_tensor(r, model, gradient))
    large = {"rgb": pixels(r, "hires/rgb_u8"), "semseg": r.tensor("hires/semseg").long()}
    h, w = (side // c["patch_size"] for side in c["hires_img_size"])
    for name, given, tokens in (("full", inputs, 3 * n), ("depth_only", {"depth": depth}, n),
                                ("hires", large, 2 * h * w)):
        batch = len(next(iter(given.values())))
        scenario(name, given, torch.zeros(batch, tokens, dtype=torch.bool))

    def losses_of(i):
        mask = mask_of(r.tensor("steps_ids_keep")[i].long(), 3 * n)
        losses = model.task_losses(model(inputs, mask)[1], inputs, inputs, mask)
        return [losses[task] for task in c["decoders"]]

    three_updates(r, model, losses_of)


def picture(model, task, values, like):
    """Our patches (channel, row, col) -> the official image layout (B, C, H, W)."""
    side = model.patch // (multimae.STRIDE if task == "semseg" else 1)
    scale = model.patch // (multimae.STRIDE if like.ndim == 3 else 1)
    h, w = like.shape[-2] // scale, like.shape[-1] // scale
    values = values.unflatten(2, (-1, side * side)).transpose(2, 3).flatten(2)
    return mae_image.unpatchify(values, side, h, w)


def of_classifier(name):
    """Name in the encoder's or the official file -> name in our Classifier."""
    if name.startswith(("fc_norm.", "norm.")) or name in ("fc_norm", "norm"):
        return name.removeprefix("fc_")
    return name if name.startswith("head") else f"encoder.{name}"


def load_classifier(r, kind):
    """The weights of a golden classifier, by the code of a user's --init FILE --eval-only.

    Of so small a model no file tells the heads, and VideoMAE's not the clip: they are flags.
    """
    c = r.config
    said, state, _ = finetune.READERS[kind](mae_image.fuse_qkv(r.weights))
    assert said["patch"] == c["patch_size"]
    h, w = c["img_size"]
    said |= {"model": kind, "frames": c.get("num_frames", 8), "img_size": f"{h}x{w}",
             "size": f"{c['embed_dim']}x{c['depth']}x{c['num_heads']}"}
    found = mae_image.Found(r.name, kind, said, state)
    known = {k: v for k, v in said.items() if hasattr(finetune.Config, k)}
    cfg = finetune.as_it_was_built(finetune.Config(**known, eval_only=True), found)
    model = finetune.build(cfg, c["num_classes"], found)[0].eval()
    assert model.encoder.grid == tuple(c["grid"])
    probe_norms(r, model, of_classifier)
    return model


def compare_classifier(r, model, x, prefix=""):
    """Features, logits, cross-entropy and every gradient norm."""
    logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, r.tensor("labels").long())
    r.check(f"{prefix}features", model.features(x))
    r.check(f"{prefix}logits", logits)
    r.check(f"{prefix}loss", loss)
    model.zero_grad()
    loss.backward()
    norms = per_official_tensor(r, model, gradient, of_classifier)
    if r.meta["method"] == "MAE":  # its table has a row for the class token, to which ours adds it
        both = [p.grad.flatten() for p in (model.encoder.pos_embed, model.encoder.cls_token)]
        norms[r.names.index("pos_embed")] = float(torch.cat(both).double().norm())
    r.check(f"{prefix}grad_norm", norms)


def of_groups(model, groups, names, key):
    """What the groups of an optimiser say of parameters of ours."""
    of, own = {id(p): g[key] for g in groups for p in g["params"]}, dict(model.named_parameters())
    return np.array([of[id(own[name])] for name in names])


def replay_vit(r):
    """The classifiers of MAE, MAE-ST and VideoMAE."""
    kind = OURS[r.meta["method"]]
    model = load_classifier(r, kind)
    x, encoder = pixels(r, "image_u8" if kind == "mae" else "video_u8"), model.encoder
    if "pos_encoder" in r.arrays:
        r.check("pos_encoder", encoder.pos_embed[0, r.config["pos_rows"]])
    patches = encoder.patches(x) if kind == "mae" else encoder.cubes(x)
    r.check("tokens", encoder.patch_embed(patches))
    compare_classifier(r, model, x)


def replay_omni_finetune(r):
    """OmniMAE's classifier on images, clips and a larger image; layer decay."""
    c, model = r.config, load_classifier(r, "omni")
    r.check("pos_encoder", model.encoder.pos_embed[0, c["pos_rows"]])
    for kind in ("image", "video"):
        x = pixels(r, f"{kind}_u8")
        r.check(f"{kind}/tokens", model.encoder.patch_embed(model.encoder.cubes(x)))
        compare_classifier(r, model, x, f"{kind}/")
    groups = finetune.layer_groups(model, 0.05, c["layer_decay"])
    names = [of_classifier(our_name(r, name)) for name in r.names]
    # one step more, see there
    r.check("lr_scale", of_groups(model, groups, names, "lr_scale") * c["layer_decay"])
    h, w = (side // c["patch_size"] for side in c["hires_img_size"])
    finetune.change_grid(model.encoder, (c["grid"][0], h, w))
    r.check("hires/logits", model(pixels(r, "hires/image_u8")))


def replay_multimae_finetune(r):
    """MultiMAE's RGB classifier; layer decay and weight decay."""
    c, model = r.config, load_classifier(r, "multimae")
    compare_classifier(r, model, pixels(r, "rgb_u8"))
    groups = finetune.layer_groups(model, c["weight_decay"], c["layer_decay"])
    names = [of_classifier(our_name(r, name)) for name in r.names]
    for key in ("lr_scale", "weight_decay"):
        r.check(key, of_groups(model, groups, names, key))


def fused(name):
    return re.sub(r"attn\.([qkv]\.|[qv]_)", "attn.qkv.", name).replace("qkv.qkv.", "qkv.")


def weight_decay(r, kind, *shape, more=()):
    """Decay of every official parameter under our param_groups."""
    s = r.config["pretrain"]
    model = kind(*shape, (48, s["depth"], 3), (32, s["decoder_depth"], 4), *more)
    groups = mae_image.param_groups(model, s["weight_decay"])
    names = [fused(our_name(r, name)) for name in r.meta["names"]["pretrain"]]
    r.check("pretrain_weight_decay", of_groups(model, groups, names, "weight_decay"))


def layer_decay(r, kind, *shape, layer_scale=False):
    """Learning rate and weight decay of every official parameter under our layer_groups."""
    s = r.config["layerdecay"]
    encoder = kind(*shape, (48, s["depth"], 3), (32, 1, 4))
    model = finetune.Classifier(encoder, 10, layer_scale=layer_scale, fresh_norm=True)
    groups = finetune.layer_groups(model, s["weight_decay"], s["layer_decay"])
    names = [of_classifier(fused(name)) for name in r.meta["names"]["layerdecay"]]
    for key in ("lr_scale", "weight_decay"):
        r.check(f"layerdecay_{key}", of_groups(model, groups, names, key))


def replay_functions_mae(r):
    c = r.config
    for name in ("sincos_table", "sincos_table_nocls", "sincos_full_rows"):
        s = c[name]
        table = mae_image.sincos_2d(s["embed_dim"], s["grid_size"], s["grid_size"])
        first = torch.zeros(int(s.get("cls_token", True)), s["embed_dim"])
        r.check(name, torch.cat([first, table])[s.get("rows", slice(None))])
    x, p = r.tensor("patchify_in"), c["patchify"]["patch_size"]
    patches = mae_image.patchify(x, p)
    r.check("patchify_out", patches)
    assert torch.equal(mae_image.unpatchify(patches, p, x.shape[2] // p, x.shape[3] // p), x)
    weight_decay(r, mae_image.MAE, 32, 8)
    layer_decay(r, mae_image.MAE, 32, 8)
    s = c["lr"]
    shape = s["lr"], s["min_lr"], s["warmup_epochs"], s["epochs"]
    rates = [mae_image.lr_at(epoch, *shape) for epoch in s["epoch"]]
    r.check("lr_values", np.outer(rates, s["lr_scale"]))
    s, p = c["lars"], {k: torch.nn.Parameter(r.tensor(f"lars_{k}0")) for k in "Wb"}
    group = {"params": list(p.values()), "weight_decay": s["weight_decay"]}
    lars = finetune.LARS([group], s["lr"], s["momentum"], s["trust_coefficient"])
    path = {"W": [], "b": []}
    for step in range(len(r.arrays["lars_gradW"])):
        for k in "Wb":
            p[k].grad = r.tensor(f"lars_grad{k}")[step]
        lars.step()
        for k in "Wb":
            path[k].append(p[k].detach().clone())
    for k in "Wb":
        r.check(f"lars_{k}", torch.stack(path[k]))
    s, table = c["interp"], r.tensor("interp_in")
    grids = [(1, g, g) for g in (s["old_grid"], s["new_grid"])]
    resized = mae_video.resize_table(table[:, 1:], *grids)
    r.check("interp_out", torch.cat([table[:, :1], resized], dim=1))
    encoder = mae_image.MAE(16, 8, (8, 1, 2), (8, 0, 2))
    model = finetune.Classifier(encoder, 5, "first", False, frozen=True)
    keys = [f"head.{k}" for k in sorted(model.head.state_dict())]
    assert keys == sorted(r.meta["names"]["probe_state_keys"])
    with torch.no_grad():
        model.head[1].weight.copy_(r.tensor("probe_weight"))
        model.head[1].bias.copy_(r.tensor("probe_bias"))
    x = r.tensor("probe_features")
    r.check("probe_logits_train", model.train().head(x))
    r.check("probe_logits_eval", model.eval().head(x))


def replay_functions_mae_st(r):
    c = r.config
    for i, (frames, predicted) in enumerate(c["target_frames"]):
        r.check(f"target_frames_{i}", mae_video.target_frames(frames, predicted))
    s, x = c["patchify"], r.tensor("patchify_in")
    shape = s["num_frames"], tuple(x.shape[3:]), s["t_patch_size"], s["patch_size"]
    model = mae_video.MAEST(*shape, (48, 1, 3), (32, 1, 4), False, s["pred_t_dim"])
    r.check("patchify_out", model.patches(x))
    s, shape = c["pretrain"], (8, 32, 2, 8)
    more = True, None, s["sep_pos_embed"], s["cls_embed"]
    weight_decay(r, mae_video.MAEST, *shape, more=more)
    layer_decay(r, mae_video.MAEST, *shape)
    s, start = c["train_clip"], float(r.arrays["train_clip_start_end"][0])
    clip = s["video_frames"], s["num_frames"], s["sampling_rate"]
    r.check("train_clip_frames", mae_video.linspace_clip(*clip, start))
    s = c["test_clip"]
    clip = s["video_frames"], s["num_frames"], s["sampling_rate"]
    r.check("test_clip_frames", mae_video.views_of("linspace", *clip, s["num_views"]))


def replay_functions_videomae(r):
    c = r.config
    s = c["sinusoid_table"]
    r.check("sinusoid_table", mae_video.sinusoid(s["dim"], s["num_positions"])[None])
    s = c["sinusoid_full_rows"]
    rows = mae_video.sinusoid(s["dim"], s["num_positions"])[s["rows"]]
    r.check("sinusoid_full_rows", rows)
    s, n = c["lr"], c["lr"]["iterations_per_epoch"]
    total, warm = s["epochs"] * n, s["warmup_epochs"] * n
    shape = s["base"], s["final"], warm, total, True  # warm-up with both ends
    r.check("lr_schedule", [mae_image.lr_at(i, *shape) for i in range(total)])
    weight_decay(r, mae_video.VideoMAE, 8, 32, 2, 8)
    layer_decay(r, mae_video.VideoMAE, 8, 32, 2, 8, layer_scale=True)
    s = c["tube_mask"]
    mask = tube_mask(3, s["window"], s["mask_ratio"], torch.Generator().manual_seed(0))
    mask = mask.reshape(3, s["window"][0], -1)
    assert (mask == mask[:, :1]).all()
    r.check("tube_counts", [int(mask[0, 0].sum()), int(mask[0].sum())])
    s, clips = c["clips"], []
    for n in s["durations"]:
        np.random.seed(s["numpy_seed"])  # the official code draws from numpy's global generator
        start = np.random.randint(max(n - s["num_frames"] * s["sampling_rate"] + 1, 1))
        clips.append(mae_video.dense_clip(n, s["num_frames"], s["sampling_rate"], start))
    r.check("clips_pretrain", np.stack(clips))
    s = c["clips_test_dense"]
    shape = s["video_frames"], 16, s["sampling_rate"], s["num_views"]
    r.check("clips_test_dense", mae_video.views_of("dense", *shape))
    s = c["clips_ssv2"]
    shape = s["num_frames"], 1, s["num_views"]
    views = [mae_video.views_of("segments", n, *shape) for n in s["durations"]]
    r.check("clips_ssv2_test", np.stack(views))


def replay_mask_statistics(r):
    """Our own draws against the distribution of the official ones."""
    c, n = r.config, r.config["num_draws"]
    rows = {k: [] for k in ("mean", "std", "p_none", "p_all", "quantiles", "corr")}
    for i, (count, tokens, alpha, subset_first) in enumerate(c["multimae"]):
        g = torch.Generator().manual_seed(i)
        mask = dirichlet_mask(n, [tokens] * 3, count, g, alpha, subset_first)
        seen = (~mask).reshape(n, 3, tokens).sum(dim=2).double().numpy()  # (n, 3)
        rows["mean"].append(seen.mean(0))
        rows["std"].append(seen.std(0, ddof=1))
        rows["p_none"].append((seen == 0).mean(0))
        rows["p_all"].append((seen == tokens).mean(0))
        rows["quantiles"].append(np.quantile(seen[:, 0], [0.05, 0.25, 0.5, 0.75, 0.95]))
        rows["corr"].append(np.corrcoef(seen[:, 0], seen[:, 1])[0, 1])
    for key, values in rows.items():
        r.check(f"multimae_{key}", values)
    kinds, counts = {"tube": tube_mask, "causal": causal_mask, "random": random_mask}, []
    for kind, mask_type, size, frames, patch, ratio in c["omnimae"]:
        t = 1 if kind == "image" else frames // c["omnimae_t_patch_size"]
        more = ["hide"] if mask_type == "random" else []
        grid, g = (t, size // patch, size // patch), torch.Generator().manual_seed(0)
        mask = kinds[mask_type](2, grid, ratio, g, *more)
        slots, hid = mask.reshape(2, t, -1), int(mask[0].sum())
        tubes, last = (slots == slots[:, :1]).all(), mask[:, -hid:].all()
        counts.append([mask.shape[1], hid, int(tubes), int(last)])
    r.check("omnimae_counts", counts)


def replay(path):
    """-> Replay with shares filled in.   Raises NotImplementedError if it is not rebuilt here"""
    return compare(Replay(path))


def compare(r):
    """Compare all results of one golden file.   -> r"""
    method, c = r.meta["method"], r.config
    for fits, compare_all in (
        (method in OURS and "steps" in c, replay_pretrain),
        (method in OURS and "num_classes" in c, replay_vit),
        (method == "OmniMAE" and "steps" in c, replay_omni_pretrain),
        (method == "OmniMAE" and "hires_img_size" in c, replay_omni_finetune),
        (method == "MultiMAE" and "steps" in c, replay_multimae_pretrain),
        (method == "MultiMAE" and "layer_decay" in c, replay_multimae_finetune),
        ("mask_statistics" in r.name or "multimae_columns" in c, replay_mask_statistics),
        (method == "MAE" and "sincos_table" in c, replay_functions_mae),
        (method == "MAE-ST" and "target_frames" in c, replay_functions_mae_st),
        (method == "VideoMAE" and "sinusoid_table" in c, replay_functions_videomae),
    ):
        if fits:
            compare_all(r)
            return r
    raise NotImplementedError(f"{r.name}: {method}, {r.meta['what']}: not rebuilt here")


def main(paths):
    if not paths or paths[0].startswith("-"):
        print(__doc__)
        sys.exit(0 if paths else 2)
    worst = 0.0
    for path in paths:
        if not Path(path).is_file():
            raise SystemExit(f"replay_golden.py: error: {path} does not exist")
        try:
            r = replay(path)
        except NotImplementedError as error:
            print(error)
            worst = float("inf")
            continue
        print(r.name)
        for name, share in r.shares.items():
            far = "" if share <= 1 else "   <-- TOO FAR"
            print(f"  {name:24s} {share:8.4f} of its tolerance{far}")
        worst = max([worst, *r.shares.values()])
    sys.exit(0 if worst <= 1 else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
