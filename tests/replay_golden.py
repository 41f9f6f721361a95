"""replay_golden.py - do our models compute what the official ones do?

    python tests/replay_golden.py tests/golden/mae_pretrain_normpix.npz ...

A golden file NAME.npz (with NAME.json beside it) holds inputs and results of an official implementation with
small random weights. The weights follow from a seed by a fixed rule, so they are not stored. For every array this
prints the largest difference as a share of its tolerance; the exit code is 0 only if all shares are at most 1.
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
from masking import dirichlet_mask, hidden, hide_largest, num_hidden, tube_mask  # noqa: E402
from masking import causal_mask, random_mask  # noqa: E402

KIND = {
    "weight": lambda x: x / np.sqrt(np.prod(x.shape[1:])),
    "table": lambda x: 0.5 * x,
    "small": lambda x: 0.02 * x,
    "scale": lambda x: 1 + 0.1 * x,
    "bias": lambda x: 0.1 * x,
}


class Replay:
    """One golden file: inputs, weights, and what was compared so far."""

    def __init__(self, path):
        path = Path(path)
        if path.suffix != ".npz" or not path.is_file() or not path.with_suffix(".json").is_file():
            raise SystemExit(f"{path}: a golden file is NAME.npz with NAME.json beside it")
        self.name, self.meta = path.stem, json.loads(path.with_suffix(".json").read_text())
        with np.load(path) as content:
            self.arrays = {key: content[key] for key in content.files}
        self.config, self.names = self.meta["config"], [k for k, _, kind in self.meta["tensors"] if kind != "fixed"]
        self.shares, self.weights = {}, {}
        if self.meta["tensors"]:
            draw = np.random.RandomState(self.meta["weight_seed"])
            for key, shape, kind in self.meta["tensors"]:
                if kind != "fixed":
                    self.weights[key] = torch.from_numpy(
                        KIND[kind](draw.standard_normal(tuple(shape))).astype(np.float32)
                    )
            total = sum(float(w.double().abs().sum()) for w in self.weights.values())
            assert abs(total / self.meta["weights_check"]["sum_abs"] - 1) < 1e-5, "the weights were drawn wrongly"

    def check(self, name, value):
        """Note how far `value` (the full array) is from the stored one, as a share of the tolerance."""
        doc, want = self.meta["arrays"][name], self.arrays[name].astype(np.float64)
        value = np.asarray(value.detach() if torch.is_tensor(value) else value, dtype=np.float64)
        assert list(value.shape) == doc["shape"], f"{name}: shape {value.shape}, not {doc['shape']}"
        if doc["stride"] > 1:
            value = value.reshape(-1)[:: doc["stride"]]
        if name.endswith("steps_param_norm"):
            value = np.where(want < 0, want, value)  # -1: not compared, see the note on key biases below
        gap, allowed = np.abs(value - want), doc.get("atol", 0) + doc.get("rtol", 0) * np.abs(want)
        share = np.where(gap == 0, 0, gap / np.where(allowed == 0, 1e-300, allowed))
        self.shares[name] = float(share.max()) if np.isfinite(value).all() else np.inf


def pixels(r, key):
    """Model input as the golden files define it."""
    c, x = r.config, r.arrays[key].astype(np.float32)
    shape = (1, 3) + (1,) * (x.ndim - 2)
    mean, std = (np.float32(c[k]).reshape(shape) for k in ("input_mean", "input_std"))
    return torch.from_numpy((x / np.float32(255) - mean) / std)


def our_name(r, name):
    """Official name of a tensor -> ours, up to the parts of the fused q, k, v."""
    if r.meta["method"] == "VideoMAE":
        name = name.replace("encoder_to_decoder", "decoder_embed").removeprefix("encoder.")
        for part, ours in (("blocks.", "blocks."), ("norm.", "norm."), ("head.", "pred.")):
            name = name.replace(f"decoder.{part}", f"decoder_{ours}")
    if r.meta["method"] == "OmniMAE":
        name = name.removeprefix("trunk.").replace("proj.1.", "proj.").replace("decoder.decoder_", "decoder_")
        name = name.replace("decoder.norm", "decoder_norm").replace("heads.0.projector.", "head.")
    if r.meta["method"] == "MultiMAE":
        name = re.sub(r"^encoder\.", "blocks.", name)
        name = name.replace("output_adapters.cls.norm", "norm").replace("output_adapters.cls.head", "head")
    return name


def per_official_tensor(r, model, of, rename=lambda name: name):
    """A number per official tensor. `of` maps a parameter of ours to a tensor of its shape (its gradient, itself).

    Ours are the official tensors renamed, except for q, k, v: their parts are cut out of the fused qkv."""
    own, values = dict(model.named_parameters()), []
    part = lambda key, i: of(own[key]).chunk(3)[i] if of(own[key]) is not None else None
    for name in r.names:
        ours = rename(our_name(r, name))
        if ours.endswith(("q_bias", "v_bias")):
            tensor = part(ours[:-6] + "qkv.bias", 0 if "q_bias" in ours else 2)
        elif ".attn.q." in ours or ".attn.k." in ours or ".attn.v." in ours:
            letter = ours.split(".attn.")[1][0]
            tensor = part(ours.replace(f".attn.{letter}.", ".attn.qkv."), "qkv".index(letter))
        else:
            tensor = of(own[ours])
        values.append(-1.0 if tensor is None else float(tensor.detach().double().norm()))
    return np.array(values)


def probe_norms(r, model, rename=lambda name: name):
    """One tiny vector through every LayerNorm: the only array that sees a wrong epsilon in each of them."""
    layers = dict(model.named_modules())
    for key in [k for k in ("norm_probe", "norm_probe_dec") if f"{k}_in" in r.arrays]:
        x = torch.from_numpy(r.arrays[f"{key}_in"])
        ours = [
            rename(our_name(r, n if r.meta["method"] == "MultiMAE" else f"{n}.").removesuffix("."))
            for n in r.config[key]
        ]
        r.check(f"{key}_out", torch.stack([layers[n](x) for n in ours]))


def three_updates(r, model, batches, rename=lambda name: name):
    """AdamW as in config.steps, with the groups of our own param_groups; batches[i]: what step i is given.

    The gradient of a key bias is rounding noise around zero, which Adam turns into full-size updates: the files
    exclude tensors that hold one from steps_param_norm.
    """
    s = r.config["steps"]
    groups = mae_image.param_groups(model, s["weight_decay"])
    optimizer = torch.optim.AdamW(groups, s["lr"], betas=tuple(s["betas"]), eps=s["eps"])
    losses = []
    for i in range(s["updates"]):
        loss, _ = model(*batches[i])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(model(*batches[s["updates"]])[0].item())
    r.check("steps_loss", losses)
    r.check("steps_param_norm", per_official_tensor(r, model, lambda p: p, rename))


def in_order_of(ids_keep, x):
    """Our visible tokens are in raster order; the official ones in the order of ids_keep."""
    rank = ids_keep.argsort(dim=1).argsort(dim=1)  # place of each official token in raster order
    return x.gather(1, rank[..., None].expand(-1, -1, x.shape[2]))


def load(model, kind, weights):
    """Official weights -> our model, through the same code as a user's --init FILE."""
    _, state, _ = finetune.READERS[kind](mae_image.fuse_qkv(weights))
    mae_image.load_into(model, state)


def everywhere(model, x, mask):
    """Predictions and targets of all patches: the official models compute them, ours those of hidden patches only."""
    caught = []
    hook = model.decoder_norm.register_forward_hook(lambda module, inputs, output: caught.append(output))
    pred = model(x, mask)[1]
    hook.remove()
    all_pred = model.decoder_pred(caught[0][:, -mask.shape[1] :])
    assert torch.allclose(hidden(all_pred, mask), pred, atol=1e-6)
    patches = model.patches(x)
    return all_pred, model.normalize_patches(patches)[0] if model.norm_pix else patches


def replay_pretrain(r):
    """MAE, MAE-ST and VideoMAE pretraining: every stored step from tokens to the third update."""
    c, a, method = r.config, r.arrays, r.meta["method"]
    size = (c["embed_dim"], c["depth"], c["num_heads"])
    decoder = (c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"])
    norm_pix = c.get("norm_pix_loss", c.get("normalize_target"))
    if method == "MAE":
        model, x = mae_image.MAE(c["img_size"], c["patch_size"], size, decoder, norm_pix), pixels(r, "image_u8")
        patches = model.patches(x)
    else:
        shape = (c["num_frames"], c["img_size"], c["t_patch_size"], c["patch_size"], size, decoder, norm_pix)
        if method == "VideoMAE":
            model = mae_video.VideoMAE(*shape)
        else:
            model = mae_video.MAEST(*shape, c["pred_t_dim"], c["sep_pos_embed"], c["cls_embed"])
        x = pixels(r, "video_u8")
        patches = model.cubes(x)
    load(model, {"MAE": "mae", "MAE-ST": "mae_st", "VideoMAE": "videomae"}[method], r.weights)

    N = c["num_patches"]
    if method == "VideoMAE":
        mask = torch.from_numpy(a["mask"]).bool()
        frames, per_frame = c["grid"][0], c["grid"][1] * c["grid"][2]
        assert num_hidden(per_frame, c["mask_ratio"], "hide") == c["masked_per_frame"]
        assert N - frames * c["masked_per_frame"] == c["num_visible"] == int((~mask[0]).sum())
    else:
        noise = torch.from_numpy(a["noise"])
        mask = hide_largest(noise, num_hidden(N, c["mask_ratio"], "keep"))
        r.check("mask", mask.float())
        ids_keep = noise.argsort(dim=1)[:, : c["len_keep"]]
        r.check("ids_keep", ids_keep)
        assert torch.equal(ids_keep.sort(dim=1).values, torch.arange(N).expand_as(mask)[~mask].reshape(len(mask), -1))

    for name, table in (
        ("pos_encoder", getattr(model, "pos_embed", None)),
        ("pos_decoder", getattr(model, "decoder_pos_embed", None)),
    ):
        if name in a:
            rows = c["pos_rows"]
            if method == "MAE":  # the official table has a row of zeros for the class token
                table = torch.cat([torch.zeros(1, 1, table.shape[2]), table], dim=1)
            r.check(name, table[0, rows])
    r.check("tokens", model.patch_embed(patches))
    probe_norms(r, model)
    if "frame_index" in a:
        r.check("frame_index", model.frame_index)

    latent = model.forward_encoder(x, mask)
    loss, pred = model(x, mask)
    target = model.target(x, mask)
    if method == "VideoMAE":
        all_pred = pred
        r.check("latent", latent)
    else:  # the official models predict the visible patches, too
        all_pred, target = everywhere(model, x, mask)
        cls = latent[:, : len(latent[0]) - c["len_keep"]]
        kept = in_order_of(ids_keep, latent[:, cls.shape[1] :])
        r.check("latent", torch.cat([cls, kept], dim=1) if method == "MAE" else kept)
    r.check("pred", all_pred)
    r.check("target", target)
    r.check("token_loss", ((all_pred - target) ** 2).mean(dim=-1))
    r.check("loss", loss)
    loss.backward()
    r.check("grad_norm", per_official_tensor(r, model, lambda p: p.grad))
    three_updates(r, model, [(x, mask)] * 4)


def pixel_head(name):
    return name.replace("head.", "decoder_pred.")


def replay_omni_pretrain(r):
    """OmniMAE: an image step and a video step, then three updates image, video, image."""
    c, a = r.config, r.arrays
    size = (c["embed_dim"], c["depth"], c["num_heads"])
    decoder = (c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"])
    model = omni.OmniMAE(c["num_frames"], c["img_size"], c["t_patch_size"], c["patch_size"], size, decoder, True,
                         c["decoder_qkv_bias"] == "fused")  # fmt: skip
    load(model, "omni", r.weights)
    for name in ("pos_encoder", "pos_decoder"):
        r.check(name, model.pos_embed[0, c["pos_rows"]])
    probe_norms(r, model)
    batches = []
    for kind in ("image", "video"):
        x, mask = pixels(r, f"{kind}_u8"), torch.from_numpy(a[f"{kind}/mask"]).bool()
        assert (
            int(mask[0].sum()) == num_hidden(mask.shape[1], c[f"mask_ratio_{kind}"], "hide") == c[f"num_hidden_{kind}"]
        )
        batches.append((x, mask))
        r.check(f"{kind}/tokens", model.patch_embed(model.cubes(x)))
        latent = model.forward_encoder(x, mask)
        r.check(f"{kind}/latent", latent)
        r.check(f"{kind}/dec_in", model.decoder_input(latent, mask))
        all_pred, target = everywhere(model, x, mask)
        r.check(f"{kind}/pred", all_pred)
        r.check(f"{kind}/target", target)
        r.check(f"{kind}/token_loss", ((all_pred - target) ** 2).mean(dim=-1))
        model.zero_grad()
        loss, _ = model(x, mask)
        r.check(f"{kind}/loss", loss)
        loss.backward()
        r.check(f"{kind}/grad_norm", per_official_tensor(r, model, lambda p: p.grad, pixel_head))
    three_updates(r, model, batches * 2, pixel_head)


def replay_multimae_pretrain(r):
    """MultiMAE: seven scenarios of given modalities and visible tokens, and three updates."""
    c, a = r.config, r.arrays
    size = (c["embed_dim"], c["depth"], c["num_heads"])
    decoder = (c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"])
    model = multimae.MultiMAE(c["img_size"], c["patch_size"], size, decoder, c["modalities"], c["num_classes_semseg"],
                              c["class_emb_dim"])  # fmt: skip
    load(model, "multimae", r.weights)
    depth = torch.from_numpy(a["depth_u8"].astype(np.float32)) / 255
    inputs = {
        "rgb": pixels(r, "rgb_u8"),
        "depth": multimae.standardize_depth(depth),
        "semseg": torch.from_numpy(a["semseg"]).long(),
    }
    for name, table in (("pos_encoder", model.pos_embed), ("pos_decoder", model.decoder_pos_embed)):
        r.check(name, table[0, c["pos_rows"]])
    probe_norms(r, model)
    r.check("target/depth", inputs["depth"])
    r.check("target/norm_rgb", picture(model, "norm_rgb", model.target("norm_rgb", inputs["rgb"]), inputs["rgb"]))

    def mask_of(ids_keep, tokens):
        return torch.ones(len(ids_keep), tokens).scatter(1, torch.from_numpy(ids_keep).long(), 0).bool()

    def scenario(name, inputs, mask, ids_keep=None):
        latent = model.forward_encoder(inputs, mask)
        preds = model.forward_decoder(latent, inputs, mask)
        if f"{name}/latent" in a:
            kept = (
                latent[:, :-1] if ids_keep is None else in_order_of(torch.from_numpy(ids_keep).long(), latent[:, :-1])
            )
            r.check(f"{name}/latent", torch.cat([kept, latent[:, -1:]], dim=1))
        for task, pred in preds.items():
            if f"{name}/pred/{task}" in a:
                r.check(f"{name}/pred/{task}", picture(model, task, pred, next(iter(inputs.values()))))
        return preds

    for name, given in (("all", inputs), ("edge", inputs), ("rgb_only", {"rgb": inputs["rgb"]})):
        tokens = c["num_patches_per_modality"] * len(given)
        mask = mask_of(a[f"{name}/ids_keep"], tokens)
        for m, part in zip(given, mask.chunk(len(given), dim=1)):
            r.check(f"{name}/mask/{m}", part.float())
        preds = scenario(name, given, mask, a[f"{name}/ids_keep"])
        losses = model.task_losses(preds, inputs, given, mask)
        for task, loss in losses.items():
            r.check(f"{name}/loss/{task}", loss)
        total = sum(losses.values())
        r.check(f"{name}/loss/total", total)
        model.zero_grad()
        total.backward()
        r.check(f"{name}/grad_norm", per_official_tensor(r, model, lambda p: p.grad))
    nothing = lambda given, n: torch.zeros(len(next(iter(given.values()))), n, dtype=torch.bool)
    n = c["num_patches_per_modality"]
    scenario("full", inputs, nothing(inputs, 3 * n))
    scenario("depth_only", {"depth": inputs["depth"]}, nothing(inputs, n))
    large = {"rgb": pixels(r, "hires/rgb_u8"), "semseg": torch.from_numpy(a["hires/semseg"]).long()}
    h, w = (side // c["patch_size"] for side in c["hires_img_size"])
    scenario("hires", large, nothing(large, 2 * h * w))

    s = c["steps"]
    optimizer = torch.optim.AdamW(
        mae_image.param_groups(model, s["weight_decay"]), s["lr"], betas=tuple(s["betas"]), eps=s["eps"]
    )
    rows = []
    for i in range(s["updates"] + 1):
        mask = mask_of(a["steps_ids_keep"][i], 3 * n)
        losses = model.task_losses(model(inputs, mask)[1], inputs, inputs, mask)
        rows.append([losses[t].item() for t in c["decoders"]])
        if i < s["updates"]:
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    r.check("steps_loss", rows)
    r.check("steps_param_norm", per_official_tensor(r, model, lambda p: p))


def picture(model, task, values, like):
    """Our patches (channel, row, col) -> the official image layout (B, C, H, W)."""
    side = model.patch // (multimae.STRIDE if task == "semseg" else 1)
    scale = model.patch // (multimae.STRIDE if like.ndim == 3 else 1)
    h, w = like.shape[-2] // scale, like.shape[-1] // scale
    B, N, P = values.shape
    return mae_image.unpatchify(values.reshape(B, N, -1, side * side).transpose(2, 3).flatten(2), side, h, w)


def of_classifier(name):
    """Name in the encoder's or the official file -> name in our Classifier."""
    if name.startswith(("fc_norm.", "norm.")) or name in ("fc_norm", "norm"):
        return name.removeprefix("fc_")
    return name if name.startswith("head") else f"encoder.{name}"


def load_classifier(r, model):
    """The weights of a golden classifier, through the same code as a user's --init FILE --eval-only.

    Of so small a model no file tells the heads, and VideoMAE's not the clip: they are flags, as for a user."""
    c = r.config
    said, state, _ = finetune.READERS[model](mae_image.fuse_qkv(r.weights))
    found = mae_image.Found(r.name, model, said | {"model": model}, state)
    h, w = c["img_size"]
    flags = {"frames": c.get("num_frames", 8), "img_size": f"{h}x{w}", "size": f"{c['embed_dim']}x{c['depth']}x{c['num_heads']}"}
    assert said["patch"] == c["patch_size"]
    found.settings |= flags
    known = {k: v for k, v in found.settings.items() if hasattr(finetune.Config, k)}
    cfg = finetune.as_it_was_built(finetune.Config(**{**known, "eval_only": True}), found)
    encoder = finetune.build(cfg, c["num_classes"], found)[0].eval()
    assert encoder.encoder.grid == tuple(c["grid"])
    return encoder


def compare_classifier(r, model, x, prefix=""):
    """Features, logits, cross-entropy and every gradient norm."""
    r.check(f"{prefix}features", model.features(x))
    logits = model(x)
    r.check(f"{prefix}logits", logits)
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(r.arrays["labels"]).long())
    r.check(f"{prefix}loss", loss)
    loss.backward()
    r.check(f"{prefix}grad_norm", gradient_norms(r, model))


def gradient_norms(r, model):
    """MAE's table of positions has a row for the class token, and joint tables one too: ours is apart or in front."""
    grads = {n: p.grad for n, p in model.named_parameters()}
    norm = lambda *names: float(torch.cat([grads[n].flatten() for n in names]).double().norm())
    values = per_official_tensor(r, model, lambda p: p.grad, of_classifier)
    if r.meta["method"] == "MAE":  # the class token gets its own position by addition: both have the same gradient
        values[r.names.index("pos_embed")] = norm("encoder.pos_embed", "encoder.cls_token")
    return values


def replay_vit(r):
    """The classifiers of MAE, MAE-ST and VideoMAE."""
    c, method = r.config, {"MAE": "mae", "MAE-ST": "mae_st", "VideoMAE": "videomae"}[r.meta["method"]]
    model = load_classifier(r, method)
    x, encoder = pixels(r, "image_u8" if method == "mae" else "video_u8"), model.encoder
    patches = encoder.patches(x) if method == "mae" else encoder.cubes(x)
    if "pos_encoder" in r.arrays:
        r.check("pos_encoder", encoder.pos_embed[0, c["pos_rows"]])
    r.check("tokens", encoder.patch_embed(patches))
    probe_norms(r, model, of_classifier)
    compare_classifier(r, model, x)


def replay_omni_finetune(r):
    """OmniMAE's classifier on images, clips and a larger image; layer decay."""
    c = r.config
    model = load_classifier(r, "omni")
    r.check("pos_encoder", model.encoder.pos_embed[0, c["pos_rows"]])
    probe_norms(r, model, of_classifier)
    for kind in ("image", "video"):
        x = pixels(r, f"{kind}_u8")
        r.check(f"{kind}/tokens", model.encoder.patch_embed(model.encoder.cubes(x)))
        compare_classifier(r, model, x, f"{kind}/")
    groups = finetune.layer_groups(model, 0.05, c["layer_decay"])
    scale = {id(p): g["lr_scale"] * c["layer_decay"] for g in groups for p in g["params"]}  # one step more, see there
    own = dict(model.named_parameters())
    r.check("lr_scale", [scale[id(own[of_classifier(our_name(r, n))])] for n in r.names])
    h, w = (side // c["patch_size"] for side in c["hires_img_size"])
    finetune.change_grid(model.encoder, (c["grid"][0], h, w))
    r.check("hires/logits", model(pixels(r, "hires/image_u8")))


def replay_multimae_finetune(r):
    """MultiMAE's RGB classifier; layer decay and weight decay."""
    c = r.config
    model = load_classifier(r, "multimae")
    probe_norms(r, model, of_classifier)
    compare_classifier(r, model, pixels(r, "rgb_u8"))
    groups = finetune.layer_groups(model, c["weight_decay"], c["layer_decay"])
    of, own = {id(p): g for g in groups for p in g["params"]}, dict(model.named_parameters())
    for key in ("lr_scale", "weight_decay"):
        r.check(key, [of[id(own[of_classifier(our_name(r, n))])][key] for n in r.names])


def weight_decays(model, names, weight_decay, ours):
    """Decay of every named official parameter under our param_groups."""
    groups = mae_image.param_groups(model, weight_decay)
    of = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    own = dict(model.named_parameters())
    return [of[id(own[ours(name)])] for name in names]


def layer_decay(r, encoder, layer_scale=False):
    """Learning rate and weight decay of every official parameter under our layer_groups."""
    s = r.config["layerdecay"]
    model = finetune.Classifier(encoder, 10, layer_scale=layer_scale, fresh_norm=True)
    groups = finetune.layer_groups(model, s["weight_decay"], s["layer_decay"])
    of, own = {id(p): g for g in groups for p in g["params"]}, dict(model.named_parameters())
    fused = re.compile(r"attn\.([qkv]\.|q_|v_)")
    names = [
        of_classifier(fused.sub("attn.qkv.", n).replace("qkv.qkv.", "qkv.")) for n in r.meta["names"]["layerdecay"]
    ]
    for key in ("lr_scale", "weight_decay"):
        r.check(f"layerdecay_{key}", [of[id(own[n])][key] for n in names])


def replay_functions_mae(r):
    c, a = r.config, r.arrays
    for name in ("sincos_table", "sincos_table_nocls"):
        s = c[name]
        table = mae_image.sincos_2d(s["embed_dim"], s["grid_size"], s["grid_size"])
        r.check(name, torch.cat([torch.zeros(int(s["cls_token"]), s["embed_dim"]), table]))
    s = c["sincos_full_rows"]
    table = mae_image.sincos_2d(s["embed_dim"], s["grid_size"], s["grid_size"])
    r.check("sincos_full_rows", torch.cat([torch.zeros(1, s["embed_dim"]), table])[s["rows"]])
    x, p = torch.from_numpy(a["patchify_in"]), c["patchify"]["patch_size"]
    r.check("patchify_out", mae_image.patchify(x, p))
    assert torch.equal(mae_image.unpatchify(mae_image.patchify(x, p), p, x.shape[2] // p, x.shape[3] // p), x)
    s = c["pretrain"]
    model = mae_image.MAE(32, 8, (48, s["depth"], 3), (32, s["decoder_depth"], 4))
    r.check("pretrain_weight_decay", weight_decays(model, r.meta["names"]["pretrain"], s["weight_decay"], lambda n: n))
    s = c["lr"]
    values = [mae_image.lr_at(e, s["lr"], s["min_lr"], s["warmup_epochs"], s["epochs"]) for e in s["epoch"]]
    r.check("lr_values", np.outer(values, s["lr_scale"]))
    layer_decay(r, mae_image.MAE(32, 8, (48, c["layerdecay"]["depth"], 3), (32, 1, 4)))
    s, p = c["lars"], {k: torch.nn.Parameter(torch.from_numpy(a[f"lars_{k}0"].copy())) for k in "Wb"}
    lars = finetune.LARS([{"params": list(p.values()), "weight_decay": s["weight_decay"]}], s["lr"], s["momentum"],
                         s["trust_coefficient"])  # fmt: skip
    path = {"W": [], "b": []}
    for gradW, gradb in zip(a["lars_gradW"], a["lars_gradb"]):
        p["W"].grad, p["b"].grad = torch.from_numpy(gradW.copy()), torch.from_numpy(gradb.copy())
        lars.step()
        for k in "Wb":
            path[k].append(p[k].detach().clone())
    for k in "Wb":
        r.check(f"lars_{k}", torch.stack(path[k]))
    s, table = c["interp"], torch.from_numpy(a["interp_in"])
    grids = [(1, g, g) for g in (s["old_grid"], s["new_grid"])]
    r.check("interp_out", torch.cat([table[:, :1], mae_video.resize_table(table[:, 1:], *grids)], dim=1))
    model = finetune.Classifier(mae_image.MAE(16, 8, (8, 1, 2), (8, 0, 2)), 5, "first", False, frozen=True)
    head = model.head
    assert [f"head.{k}" for k in sorted(head.state_dict())] == sorted(r.meta["names"]["probe_state_keys"])
    with torch.no_grad():
        head[1].weight.copy_(torch.from_numpy(a["probe_weight"]))
        head[1].bias.copy_(torch.from_numpy(a["probe_bias"]))
    x = torch.from_numpy(a["probe_features"])
    r.check("probe_logits_train", model.train().head(x))
    r.check("probe_logits_eval", model.eval().head(x))


def replay_functions_mae_st(r):
    c, a = r.config, r.arrays
    for i, (frames, predicted) in enumerate(c["target_frames"]):
        r.check(f"target_frames_{i}", mae_video.target_frames(frames, predicted))
    s, x = c["patchify"], torch.from_numpy(a["patchify_in"])
    model = mae_video.MAEST(s["num_frames"], tuple(x.shape[3:]), s["t_patch_size"], s["patch_size"], (48, 1, 3), (32, 1, 4),
                            False, s["pred_t_dim"])  # fmt: skip
    r.check("patchify_out", model.patches(x))
    s = c["pretrain"]
    fused = lambda name: name.replace(".q.", ".qkv.").replace(".k.", ".qkv.").replace(".v.", ".qkv.")
    model = mae_video.MAEST(8, 32, 2, 8, (48, s["depth"], 3), (32, s["decoder_depth"], 4), True, None, s["sep_pos_embed"],
                            s["cls_embed"])  # fmt: skip
    r.check("pretrain_weight_decay", weight_decays(model, r.meta["names"]["pretrain"], s["weight_decay"], fused))
    s = c["layerdecay"]
    layer_decay(r, mae_video.MAEST(8, 32, 2, 8, (48, s["depth"], 3), (32, 1, 4)))
    s, start = c["train_clip"], float(a["train_clip_start_end"][0])
    r.check("train_clip_frames", mae_video.linspace_clip(s["video_frames"], s["num_frames"], s["sampling_rate"], start))
    s = c["test_clip"]
    r.check(
        "test_clip_frames",
        mae_video.views_of("linspace", s["video_frames"], s["num_frames"], s["sampling_rate"], s["num_views"]),
    )


def replay_functions_videomae(r):
    c = r.config
    s = c["sinusoid_table"]
    r.check("sinusoid_table", mae_video.sinusoid(s["dim"], s["num_positions"])[None])
    s = c["sinusoid_full_rows"]
    r.check("sinusoid_full_rows", mae_video.sinusoid(s["dim"], s["num_positions"])[s["rows"]])
    s, n = c["lr"], c["lr"]["iterations_per_epoch"]
    total, warm = s["epochs"] * n, s["warmup_epochs"] * n
    r.check(
        "lr_schedule", [mae_image.lr_at(i, s["base"], s["final"], warm, total, inclusive=True) for i in range(total)]
    )
    layer_decay(r, mae_video.VideoMAE(8, 32, 2, 8, (48, c["layerdecay"]["depth"], 3), (32, 1, 4)), layer_scale=True)
    s = c["pretrain"]
    model = mae_video.VideoMAE(8, 32, 2, 8, (48, s["depth"], 3), (32, s["decoder_depth"], 4))
    ours = lambda n: (n.replace("encoder_to_decoder", "decoder_embed").removeprefix("encoder.").replace("decoder.head", "decoder_pred")
                      .replace("decoder.", "decoder_").replace("q_bias", "qkv.bias").replace("v_bias", "qkv.bias"))  # fmt: skip
    r.check("pretrain_weight_decay", weight_decays(model, r.meta["names"]["pretrain"], s["weight_decay"], ours))
    s = c["tube_mask"]
    mask = tube_mask(3, s["window"], s["mask_ratio"], torch.Generator().manual_seed(0)).reshape(3, s["window"][0], -1)
    assert (mask == mask[:, :1]).all()
    r.check("tube_counts", [int(mask[0, 0].sum()), int(mask[0].sum())])
    s, clips = c["clips"], []
    for n in s["durations"]:
        np.random.seed(s["numpy_seed"])  # the official code draws from numpy's global generator
        start = np.random.randint(max(n - s["num_frames"] * s["sampling_rate"] + 1, 1))
        clips.append(mae_video.dense_clip(n, s["num_frames"], s["sampling_rate"], start))
    r.check("clips_pretrain", np.stack(clips))
    s = c["clips_test_dense"]
    r.check("clips_test_dense", mae_video.views_of("dense", s["video_frames"], 16, s["sampling_rate"], s["num_views"]))
    s = c["clips_ssv2"]
    views = [mae_video.views_of("segments", n, s["num_frames"], 1, s["num_views"]) for n in s["durations"]]
    r.check("clips_ssv2_test", np.stack(views))


def replay_mask_statistics(r):
    """Our own draws against the distribution of the official ones."""
    c, n = r.config, r.config["num_draws"]
    rows = {k: [] for k in ("mean", "std", "p_none", "p_all", "quantiles", "corr")}
    for i, (count, tokens, alpha, subset_first) in enumerate(c["multimae"]):
        mask = dirichlet_mask(n, [tokens] * 3, count, torch.Generator().manual_seed(i), alpha, subset_first)
        seen = (~mask).reshape(n, 3, tokens).sum(dim=2).double()  # (n, 3)
        rows["mean"].append(seen.mean(0).tolist())
        rows["std"].append(seen.std(0).tolist())
        rows["p_none"].append((seen == 0).double().mean(0).tolist())
        rows["p_all"].append((seen == tokens).double().mean(0).tolist())
        rows["quantiles"].append(np.quantile(seen[:, 0].numpy(), [0.05, 0.25, 0.5, 0.75, 0.95]).tolist())
        rows["corr"].append(np.corrcoef(seen[:, 0], seen[:, 1])[0, 1])
    for key, values in rows.items():
        r.check(f"multimae_{key}", values)
    kinds = {"tube": tube_mask, "causal": causal_mask, "random": lambda *args: random_mask(*args, rule="hide")}
    counts = []
    for kind, mask_type, size, frames, patch, ratio in c["omnimae"]:
        t = 1 if kind == "image" else frames // c["omnimae_t_patch_size"]
        mask = kinds[mask_type](2, (t, size // patch, size // patch), ratio, torch.Generator().manual_seed(0))
        slots, hid = mask.reshape(2, t, -1), int(mask[0].sum())
        counts.append([mask.shape[1], hid, int((slots == slots[:, :1]).all()), int(mask[:, -hid:].all())])
    r.check("omnimae_counts", counts)


def replay(path):
    """-> Replay with shares filled in.   Raises NotImplementedError for a method that is not rebuilt here."""
    r = Replay(path)
    method, name = r.meta["method"], r.name
    if method in ("MAE", "MAE-ST", "VideoMAE") and "steps" in r.config:
        replay_pretrain(r)
    elif method == "OmniMAE" and "steps" in r.config:
        replay_omni_pretrain(r)
    elif method == "OmniMAE" and "hires_img_size" in r.config:
        replay_omni_finetune(r)
    elif method in ("MAE", "MAE-ST", "VideoMAE") and "num_classes" in r.config:
        replay_vit(r)
    elif method == "MultiMAE" and "steps" in r.config:
        replay_multimae_pretrain(r)
    elif method == "MultiMAE" and "layer_decay" in r.config:
        replay_multimae_finetune(r)
    elif "mask_statistics" in name or "multimae_columns" in r.config:
        replay_mask_statistics(r)
    elif method == "MAE" and "sincos_table" in r.config:
        replay_functions_mae(r)
    elif method == "MAE-ST" and "target_frames" in r.config:
        replay_functions_mae_st(r)
    elif method == "VideoMAE" and "sinusoid_table" in r.config:
        replay_functions_videomae(r)
    else:
        raise NotImplementedError(f"{name}: {method}, {r.meta['what']}: not rebuilt here")
    return r


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
            print(f"{error}")
            worst = float("inf")
            continue
        print(f"{r.name}")
        for name, share in r.shares.items():
            print(f"  {name:24s} {share:8.4f} of its tolerance{'' if share <= 1 else '   <-- TOO FAR'}")
        worst = max([worst, *r.shares.values()])
    sys.exit(0 if worst <= 1 else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
