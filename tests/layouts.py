"""Weights of our models under the names that public files have."""

import torch

from mae_video import VideoMAE


def renamed(key, names):
    ours = next((name for name in names if key.startswith(name)), "")
    return names.get(ours, "") + key.removeprefix(ours)


def official_mae(model, **more):
    row = torch.zeros(1, 1, model.pos_embed.shape[2])
    return {**model.state_dict(), "pos_embed": torch.cat([row, model.pos_embed], dim=1), **more}


def official_videomae(model):
    names = {"decoder_embed": "encoder_to_decoder", "decoder_pred": "decoder.head",
             "decoder_": "decoder.", "mask_token": "mask_token", "": "encoder."}
    state = {renamed(key, names): value for key, value in model.state_dict().items()}
    for key in [key for key in state if key.endswith("qkv.bias")]:  # no bias of the keys
        q, _, v = state.pop(key).chunk(3)
        state |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
    return state


def official_omni(model, trainer=False):
    names = {"decoder_pred": "heads.0.projector" if trainer else "head",
             "decoder_norm": "trunk.decoder.norm", "decoder_": "trunk.decoder.decoder_",
             "patch_embed.proj": "trunk.patch_embed.proj.1", "": "trunk."}
    state = {renamed(key, names): value for key, value in model.state_dict().items()}
    return {"trunk.pos_embed": model.pos_embed, **state}


def huggingface(model, new=False):
    """MAE or VideoMAE under the names on the hub, or (MAE, new) those of transformers 5."""
    video, state = isinstance(model, VideoMAE), {}
    root = "videomae" if video else "vit"
    outer = {"patch_embed.proj": f"{root}.embeddings.patch_embeddings.projection",
             "cls_token": f"{root}.embeddings.cls_token", "norm": f"{root}.layernorm",
             "decoder_": "decoder.decoder_", "mask_token": "decoder." * (not video) + "mask_token"}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after",
             "attn.proj": "attention.o_proj" if new else "attention.output.dense",
             "mlp.fc1": "mlp.fc1" if new else "intermediate.dense",
             "mlp.fc2": "mlp.fc2" if new else "output.dense"}
    for key, value in model.state_dict().items():
        if not key.startswith("blocks."):
            state[renamed(key, outer)] = value
            continue
        _, number, part = key.split(".", 2)
        layer = f"{root}.layers.{number}" if new else f"{root}.encoder.layer.{number}"
        if part.startswith("attn.qkv"):
            kind = part.removeprefix("attn.qkv.")
            for name, x in zip(("query", "key", "value"), value.chunk(3)):
                if new:
                    state[f"{layer}.attention.{name[0]}_proj.{kind}"] = x
                elif not video or kind == "weight":
                    state[f"{layer}.attention.attention.{name}.{kind}"] = x
                elif name != "key":
                    state[f"{layer}.attention.attention.{name[0]}_bias"] = x
        else:
            state[f"{layer}.{renamed(part, inner)}"] = value
    if not video:
        state["vit.embeddings.position_embeddings"] = official_mae(model)["pos_embed"]
    return state
