"""Weights of our models under the names that public files have."""

import re

import torch

from mae_video import VideoMAE


def official_mae(model, **more):
    D = model.pos_embed.shape[2]
    table = torch.cat([torch.zeros(1, 1, D), model.pos_embed], dim=1)
    return {**model.state_dict(), "pos_embed": table, **more}


def official_videomae(model):
    names = {"decoder_embed": "encoder_to_decoder", "decoder_blocks": "decoder.blocks",
             "decoder_norm": "decoder.norm", "decoder_pred": "decoder.head", "mask_token": "mask_token"}
    state = {}
    for key, value in model.state_dict().items():
        first = key.split(".")[0]
        key = key.replace(first, names[first], 1) if first in names else f"encoder.{key}"
        if key.endswith("qkv.bias"):  # no bias of the keys
            q, _, v = value.chunk(3)
            state |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
        else:
            state[key] = value
    return state


def official_omni(model, trainer=False):
    names = {"decoder_embed": "trunk.decoder.decoder_embed", "decoder_norm": "trunk.decoder.norm",
             "decoder_blocks": "trunk.decoder.decoder_blocks",
             "decoder_pred": "heads.0.projector" if trainer else "head"}
    state = {"trunk.pos_embed": model.pos_embed}
    for key, value in model.state_dict().items():
        first = key.split(".")[0]
        key = key.replace(first, names.get(first, f"trunk.{first}"), 1)
        state[key.replace("patch_embed.proj", "patch_embed.proj.1")] = value
    return state


def huggingface(model, new=False):
    """MAE or VideoMAE under the names on the hub, or (MAE, new) those that transformers 5 writes."""
    video, state = isinstance(model, VideoMAE), {}
    root = "videomae." if video else "vit."
    inner = {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
             "mlp.fc2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    if new:
        inner |= {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for key, value in model.state_dict().items():
        block = re.match(r"blocks\.(\d+)\.(.*)", key)
        if key.startswith("decoder"):
            state[f"decoder.decoder_{key[8:]}"] = value
        elif key == "mask_token":
            state[key if video else f"decoder.{key}"] = value
        elif not block:
            key = key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            key = key.replace("cls_token", "embeddings.cls_token")
            state[root + re.sub(r"^norm\.", "layernorm.", key)] = value
        else:
            layer = f"{root}layers.{block[1]}." if new else f"{root}encoder.layer.{block[1]}."
            if block[2].startswith("attn.qkv"):
                kind = block[2].removeprefix("attn.qkv.")
                for name, x in zip(("query", "key", "value"), value.chunk(3)):
                    if new:
                        state[f"{layer}attention.{name[0]}_proj.{kind}"] = x
                    elif not video or kind == "weight":
                        state[f"{layer}attention.attention.{name}.{kind}"] = x
                    elif name != "key":
                        state[f"{layer}attention.attention.{name[0]}_bias"] = x
                continue
            part, kind = block[2].rsplit(".", 1)
            state[f"{layer}{inner[part]}.{kind}"] = value
    if not video:
        table = official_mae(model)["pos_embed"]
        state["vit.embeddings.position_embeddings"] = table
    return state
