import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import finetune
import mae_image
import mae_video
import omni
from conftest import ROOT
from finetune import Classifier, Config
from mae_image import MAE
from mae_video import MAEST, VideoMAE
from masking import InputError
from test_mae_image import losses, same_state, weights

TINY = ["--epochs", 2, "--warmup", 1, "--batch", 12, "--workers", 0, "--log-every", 1, "--clips", 1, "--check-every", 1]


def tiny(kind=VideoMAE, classes=5, **options):
    torch.manual_seed(0)
    shape = (32, 8) if kind is MAE else (8, 32, 2, 8)
    return Classifier(kind(*shape, (32, 3, 4), (16, 1, 2)), classes, **options)


def clips(batch=3, seed=0):
    return torch.randn(batch, 3, 8, 32, 32, generator=torch.Generator().manual_seed(seed))


# ---- the classifier ---------------------------------------------------------------------------------------------


def test_the_classifier_pools_what_encode_gives_and_has_no_decoder():
    encoder = VideoMAE(8, 32, 2, 8, (32, 3, 4), (16, 1, 2))
    want = [block for block in encoder.blocks]
    x = clips()
    tokens = encoder.patch_embed(mae_video.patchify(x, 2, 8)) + encoder.pos_embed
    for block in want:
        tokens = block(tokens)
    model = Classifier(encoder, 5).eval()
    assert torch.allclose(model(x), model.head(model.norm(tokens.mean(dim=1))), atol=1e-6)
    assert not [k for k in model.state_dict() if "decoder" in k or "mask_token" in k]


@pytest.mark.parametrize("kind", [MAE, MAEST])
def test_the_mean_leaves_the_class_token_out_and_first_takes_it(kind):
    x = torch.randn(2, 3, 32, 32) if kind is MAE else clips(2)
    for pool in ("mean", "first"):
        model = tiny(kind, pool=pool).eval()
        tokens = model.encoder.encode(x)
        want = tokens[:, 0] if pool == "first" else torch.stack([t[1:].sum(0) / (len(t) - 1) for t in tokens])
        assert torch.allclose(model.features(x), model.norm(want), atol=1e-5)


def test_encode_in_eval_mode_is_deterministic_and_drop_path_is_for_training_only():
    model, x = tiny(drop_path=0.5), clips()
    model.train()
    assert not torch.equal(model.features(x), model.features(x))
    model.eval()
    assert torch.equal(model.features(x), model.features(x))
    assert [b.drop_path for b in model.encoder.blocks] == [0, 0.25, 0.5]


def test_drop_path_skips_whole_samples_and_keeps_the_mean():
    block, x = tiny(drop_path=0.4).encoder.blocks[-1].train(), torch.ones(20000, 1, 4)
    y = block.branch(x, None)
    assert set(y.flatten().tolist()) == {0.0, float(torch.tensor(1.0) / 0.6)}
    assert (y == y[:, :, :1]).all() and abs(y.mean().item() - 1) < 0.03  # 4 standard errors


def test_frozen_means_frozen(toy, tmp_path, monkeypatch):
    """In linear mode no parameter and no statistic of the encoder changes, and the probe learns."""
    monkeypatch.chdir(tmp_path)
    model = tiny(VideoMAE, classes=6, frozen=True, fresh_norm=False, drop_path=0.3)
    assert torch.equal(model.train().features(clips()), model.features(clips()))  # no drop path in it either
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cfg = Config(data=str(toy), mode="linear", img_size=32, frames=8, stride=2, sampling="dense", batch=12, epochs=1,
                 workers=0, lr=10.0, warmup=0, check_every=0, device="cpu")  # fmt: skip
    train = finetune.Augmented(data.ClipDataset(data.list_videos(toy, "train"), 8, 2, 32, 0), 2, 0)
    finetune.train_classifier(model, train, None, cfg, {})
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        "head.0.running_mean",
        "head.0.running_var",
        "head.0.num_batches_tracked",
        "head.1.weight",
        "head.1.bias",
    }


def test_other_sizes_interpolate_every_table():
    for kind in (VideoMAE, MAEST):
        model = tiny(kind)
        finetune.change_grid(model.encoder, (8, 6, 6))
        assert model(torch.randn(2, 3, 16, 48, 48)).shape == (2, 5)
    model = tiny(MAE)
    finetune.change_grid(model.encoder, (1, 6, 6))
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 5) and isinstance(model.encoder.pos_embed, torch.nn.Parameter)
    table = torch.arange(4.0)[None, :, None].repeat_interleave(9, 1)  # the slot's number
    want = torch.nn.functional.interpolate(torch.arange(4.0)[None, None], 8, mode="linear").flatten()
    assert torch.allclose(mae_video.resize_table(table, (4, 3, 3), (8, 3, 3))[0, ::9, 0], want)


@pytest.mark.parametrize("kind", [MAE, MAEST])
def test_a_probe_at_another_size_still_trains_its_head_alone(kind):
    """Positions that began to learn would be a group more for the optimiser, which --resume could not read."""
    model = tiny(kind, frozen=True)
    finetune.change_grid(model.encoder, (4 if kind is MAEST else 1, 6, 6))
    assert all(name.startswith("head.") for name, p in model.named_parameters() if p.requires_grad)


def test_an_inflated_image_model_sees_a_still_clip_as_the_image():
    image, video = MAE(32, 8, (32, 2, 4), (16, 1, 2)), VideoMAE(8, 32, 2, 8, (32, 2, 4), (16, 1, 2))
    state = finetune.inflate(image.state_dict(), video, 4)
    video.patch_embed.load_state_dict({k[12:]: v for k, v in state.items() if k.startswith("patch_embed")})
    x = torch.randn(2, 3, 32, 32)
    still = video.patch_embed(mae_video.patchify(x[:, :, None].expand(-1, -1, 8, -1, -1), 2, 8))
    assert torch.allclose(still[:, :16], image.patch_embed(mae_image.patchify(x, 8)), atol=1e-5)


# ---- the recipe -------------------------------------------------------------------------------------------------


def test_layers_below_learn_slower_and_vectors_do_not_decay():
    model = tiny(MAEST)
    groups = finetune.layer_groups(model, 0.05, 0.5)
    of = {id(p): g for g in groups for p in g["params"]}
    scale = {n: of[id(p)]["lr_scale"] for n, p in model.named_parameters()}
    assert scale["head.weight"] == scale["norm.bias"] == 1 and scale["encoder.blocks.2.mlp.fc1.weight"] == 0.5
    assert (
        scale["encoder.cls_token"]
        == scale["encoder.pos_embed_spatial"]
        == scale["encoder.patch_embed.proj.bias"]
        == 0.5**4
    )
    decayed = {n for n, p in model.named_parameters() if of[id(p)]["weight_decay"]}
    assert "encoder.patch_embed.proj.weight" in decayed and not [
        n for n in decayed if "pos" in n or "token" in n or "bias" in n
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_frames_of_a_clip_are_mixed_erased_and_augmented_alike():
    still = torch.randn(6, 3, 1, 16, 16).expand(-1, -1, 4, -1, -1)
    for alphas in ((0.8, 0), (0, 1.0)):
        torch.manual_seed(1)
        x, soft = finetune.mix(still, torch.arange(6), 6, *alphas)
        assert (x == x[:, :, :1]).all() and not torch.equal(x, still)
        assert torch.allclose(soft.sum(dim=1), torch.ones(6)) and (soft.max(dim=1).values < 1).any()
    assert finetune.mix(still, torch.arange(6), 6, 0, 0)[0] is still
    twins = torch.arange(8).repeat_interleave(2)  # --repeat 2: neighbours are clips of one video
    alone = [finetune.mix(still[:1].repeat(16, 1, 1, 1, 1), twins, 8, 0.8, 0)[1].max(dim=1).values == 1 for _ in range(50)]
    assert torch.cat(alone).float().mean() < 0.15
    x = finetune.erase(still.contiguous(), 1.0)
    changed = (x != still).any(dim=1)
    assert (changed == changed[:, :1]).all() and 0 < changed.float().mean() < 0.5

    class Still(torch.utils.data.Dataset):
        seed, repeat, paths, labels, classes = 0, 2, ["x"], np.zeros(1), ["x"]

        def __getitem__(self, key):
            pixels = torch.randint(
                0, 256, (2, 1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(key[1])
            )
            return pixels.expand(-1, 5, -1, -1, -1), key[1], []

    augmented = finetune.Augmented(Still(), 4, 9)
    before = torch.random.get_rng_state()
    x = [augmented[0, i][0] for i in range(8)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all((c == c[:, :1]).all() for c in x) and any(not torch.equal(c, Still()[0, i][0]) for i, c in enumerate(x))
    assert all(torch.equal(augmented[0, i][0], c) for i, c in enumerate(x)) and not torch.equal(
        augmented[1, 3][0], x[3]
    )


def test_a_share_of_the_labels_is_the_same_every_time_and_keeps_every_class(toy):
    files = data.list_videos(toy, "train")
    few = finetune.take_share(files, 0.2, 3)
    assert len(few.paths) == 6 * round(0.2 * len(files.paths) / 6) and set(few.labels) == set(range(6))
    assert (few.paths == finetune.take_share(files, 0.2, 3).paths).all()
    assert (few.paths != finetune.take_share(files, 0.2, 4).paths).any() and finetune.take_share(files, 1, 3) is files


def test_a_share_is_taken_of_each_class_and_at_least_one_file():
    labels = np.repeat([0, 1, 2], [40, 10, 1])
    files = data.Files(np.array([str(i) for i in range(51)]), labels, list("abc"), np.arange(51)[:, None])
    few = finetune.take_share(files, 0.3, 0)
    assert np.bincount(few.labels).tolist() == [12, 3, 1] and len(set(few.paths)) == 16
    assert (labels[few.paths.astype(int)] == few.labels).all() and (few.pixels[:, 0] == few.paths.astype(int)).all()


# ---- testing ----------------------------------------------------------------------------------------------------


def test_crops_lie_at_both_ends_and_in_the_middle_of_the_long_side():
    wide = np.random.default_rng(0).integers(0, 256, (2, 16, 40, 3), dtype=np.uint8)
    views = finetune.spatial_views(wide, 16, 3)
    for view, left in zip(views, (0, 12, 24)):
        assert torch.equal(view, torch.from_numpy(wide[:, :, left : left + 16]))
    tall = finetune.spatial_views(wide.transpose(0, 2, 1, 3).copy(), 16, 3)
    assert torch.equal(tall, views.transpose(2, 3)) and torch.equal(finetune.spatial_views(wide, 16, 1)[0], views[1])


def test_the_mean_over_views_is_that_of_views_done_one_by_one(toy):
    files = data.list_videos(toy, "val")
    cfg = Config(model="videomae", frames=8, stride=1, sampling="dense", img_size=32, batch=5, workers=0, device="cpu")
    model = tiny().eval()
    torch.nn.init.normal_(model.head.weight)
    together, broken = finetune.run_views(model, files, cfg, 3, 2, model.answers)
    assert together.shape == (len(files.paths), 6, 5) and not broken
    views = finetune.ViewDataset(files, cfg, 3, 2)
    for i in (0, 5, len(files.paths) - 1):
        singly = torch.stack([model(model.encoder.normalize(v[None])).softmax(-1)[0] for v in views[i][0]])
        assert torch.allclose(together[i], singly, atol=1e-5)


def test_a_network_that_answers_nan_is_not_a_broken_file(toy):
    files = data.list_videos(toy, "val")
    cfg = Config(model="videomae", frames=8, stride=1, sampling="dense", img_size=32, workers=0, device="cpu")
    model = tiny().eval()
    model.head.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match="answers are not finite"):
        finetune.run_views(model, files, cfg, 1, 1, model.answers)


def test_a_worker_killed_while_testing_is_one_line(toy, monkeypatch):
    """Also while the network computes: torch's handler would raise right there."""
    files, read = data.list_videos(toy, "val"), finetune.ViewDataset.__getitem__
    cfg = Config(model="videomae", frames=8, stride=1, sampling="dense", img_size=32, batch=1, workers=1, device="cpu")
    kill = lambda self, i: os.kill(os.getpid(), signal.SIGKILL) if i == 4 else read(self, i)  # asked for after batch 0
    monkeypatch.setattr(finetune.ViewDataset, "__getitem__", kill)
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)  # as in a new process
    model = tiny()
    with pytest.raises(InputError, match="the loader failed: .*(killed|exited)"):
        finetune.run_views(model, files, cfg, 1, 1, lambda x: (time.sleep(1), model.answers(x))[1])


def test_mean_iou_is_that_of_a_loop_and_void_counts_neither_as_truth_nor_as_a_class():
    g = torch.Generator().manual_seed(0)
    guess, truth = (torch.randint(0, 4, (6, 50), generator=g) for _ in range(2))  # class 2 is void
    said = finetune.report_dense(torch.cat([guess, truth], 1)[:, None].float(), Config(dense="semseg", ignore=2), 4, last=False)
    known = truth != 2

    def loop(x):
        both = [((x == c) & (truth == c) & known).sum() / (((x == c) | (truth == c)) & known).sum() for c in (0, 1, 3)]
        return np.mean(both)

    most = [max((0, 1, 3), key=lambda c: ((truth[:, i] == c).sum(), -c)) for i in range(50)]
    constant = loop(torch.tensor(most).expand(6, 50))
    assert said == f"semseg mean IoU {loop(guess):.3f} (the same map for all: {constant:.3f})"


def test_stl10s_images_without_a_label_are_not_for_finetuning(monkeypatch):
    pixels, labels = np.zeros((9, 8, 8, 3), np.uint8), np.array([-1, 0, 1, -1, 2, 0, 1, 2, -1])
    files = data.Files(np.array([f"stl10/{i}" for i in range(9)]), labels, list("abc"), pixels)
    monkeypatch.setattr(data, "list_images", lambda name, split, allow: files if split == "train" else
                        finetune.replace(files, paths=files.paths[1:3], labels=labels[1:3]))  # fmt: skip
    train, listed, _ = finetune.open_data(Config(data="stl10", model="mae", img_size=8))
    assert len(train) == 6 and listed.labels.tolist() == [0, 1, 2, 0, 1, 2] and listed.pixels.shape[0] == 6


def test_scores_are_those_of_a_loop_and_unreadable_files_are_left_out():
    p = torch.rand(40, 3, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    labels = torch.arange(40) % 6  # class 6 has no test file
    p[5] = float("nan")
    s = finetune.summarise(p, labels)
    good = [i for i in range(40) if i != 5]
    right = {i: p[i].mean(0).argmax() == labels[i] for i in good}
    assert s["files"] == 39 and s["unreadable"] == 1 and s["views"] == 3
    assert np.isclose(s["top1"], np.mean([right[i] for i in good]))
    assert np.isclose(s["view_top1"], np.mean([p[i, v].argmax() == labels[i] for i in good for v in range(3)]))
    assert np.isclose(s["top5"], np.mean([labels[i] in p[i].mean(0).topk(5).indices for i in good]))
    per_class = [np.mean([right[i] for i in good if labels[i] == c]) for c in range(6)]
    assert np.allclose(s["per_class"][:6], per_class) and np.isclose(s["class_mean"], np.mean(per_class))
    a, b, n = s["confused"][0]
    assert n == sum(labels[i] == a and p[i].mean(0).argmax() == b for i in good)
    with pytest.raises(InputError, match="not one test file"):
        finetune.summarise(p[5:6], labels[5:6])


def test_nearest_neighbours_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    train, test, labels = torch.randn(30, 8, generator=g) + 1, torch.randn(6, 8, generator=g), torch.arange(30) % 4
    votes = finetune.nearest_neighbours(train, labels, test, 4, k=5)
    mean = train.mean(0)
    for x, vote in zip(test, votes):
        near = sorted(
            ((torch.cosine_similarity(x - mean, t - mean, 0).item(), int(y)) for t, y in zip(train, labels)),
            reverse=True,
        )
        want = torch.zeros(4)
        for cosine, y in near[:5]:
            want[y] += np.exp(cosine / 0.07)
        assert torch.allclose(vote, want / want.sum(), atol=1e-4)


def test_training_and_test_files_never_share_a_group(toy):
    real = Path(os.environ.get("MAE_TEST_DATA") or "nowhere")
    names = [n for n in ("gestures10", "lips20", "sprites5", "weizmann4") if (real / n).is_dir()]
    for root in [toy, *(real / n for n in names)]:
        for fold in (1, 2, 3):
            groups = [
                {re.search(r"_g(\d+)_", p)[1] for p in data.list_videos(root, s, fold).paths} for s in ("train", "val")
            ]
            assert groups[0] and groups[1] and not groups[0] & groups[1]


# ---- pretrained files -------------------------------------------------------------------------------------------


def public_videomae(model):
    """State of our VideoMAE under the public names."""
    state = {}
    for k, v in model.state_dict().items():
        if k.endswith("qkv.bias"):
            q, _, value = v.chunk(3)
            state |= {k.replace("qkv.bias", "q_bias"): q, k.replace("qkv.bias", "v_bias"): value}
        else:
            state[k] = v
    names = (("decoder_embed", "encoder_to_decoder"), ("decoder_blocks", "decoder.blocks"), ("decoder_norm", "decoder.norm"),
             ("decoder_pred", "decoder.head"))  # fmt: skip
    rename = lambda k: next(
        (k.replace(a, b) for a, b in names if k.startswith(a)), k if k == "mask_token" else f"encoder.{k}"
    )
    return {rename(k): v for k, v in state.items()}


def huggingface(model, new):
    """State of our MAE or VideoMAE under HuggingFace's names, those of the hub or those of transformers 5."""
    video, state = isinstance(model, VideoMAE), {}
    root = "videomae." if video else "vit."
    for k, v in model.state_dict().items():
        k = k.replace("patch_embed.proj", "embeddings.patch_embeddings.projection").replace(
            "cls_token", "embeddings.cls_token"
        )
        if m := re.match(r"blocks\.(\d+)\.(.*)", k):
            layer = f"layers.{m[1]}." if new and not video else f"encoder.layer.{m[1]}."
            part = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
            if m[2].startswith("attn.qkv"):
                for name, x in zip(("query", "key", "value"), v.chunk(3)):
                    if new and not video:
                        state[f"{root}{layer}attention.{name[0]}_proj.{m[2][9:]}"] = x
                    elif video and m[2].endswith("bias"):
                        if name != "key":
                            state[f"{root}{layer}attention.attention.{name[0]}_bias"] = x
                    else:
                        state[f"{root}{layer}attention.attention.{name}.{m[2][9:]}"] = x
                continue
            inner = m[2]
            for a, b in ([("attn.proj", "attention.o_proj")] if new and not video else
                         [("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")]):  # fmt: skip
                inner = inner.replace(a, b)
            for a, b in part.items():
                inner = inner.replace(a, b)
            k = layer + inner
        if k.startswith(("decoder", "mask_token")):
            state["decoder.decoder_" + k[8:] if k.startswith("decoder") else k] = v
        else:
            state[root + k.replace("norm.", "layernorm.") if k.startswith("norm.") else root + k] = v
    if not video:
        N, D = model.pos_embed.shape[1:]
        state["vit.embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 1, D), model.pos_embed], dim=1)
    return state


def official_mae(model, **more):
    D = model.pos_embed.shape[2]
    table = torch.cat([torch.zeros(1, 1, D), model.pos_embed], dim=1)
    return {**model.state_dict(), "pos_embed": table, **more}


def from_file(state, path, **flags):
    """Save, recognise, settle and build, as `--init FILE` does.   -> Classifier, report, cfg"""
    torch.save(state, path)
    found = finetune.read_init(path)
    cfg = finetune.settle(Config(init=str(path), **flags), found)
    return *finetune.build(cfg, 4, found), cfg


@pytest.mark.parametrize("change", [{"cls_token": None}, {"patch_embed.proj.weight": torch.zeros(32, 192)}])
def test_what_is_nearly_a_public_file_is_named(tmp_path, change):
    state = official_mae(MAE(32, 8, WIDE, (16, 1, 2)), **change)
    with pytest.raises(InputError, match="has no layout that is known here"):
        from_file({k: v for k, v in state.items() if v is not None}, tmp_path / "x.pth")


def filled(model):
    """Every weight random, so that a mix-up cannot hide; key biases zero where the public file has none."""
    torch.manual_seed(3)
    for n, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1)
        if n.endswith("qkv.bias") and isinstance(model, VideoMAE):
            p.data.chunk(3)[1].zero_()
    return model


WIDE = (64, 2, 1)  # the number of heads is not in a file: one for every 64 channels unless the size is a published one


@pytest.mark.parametrize("layout", ["mae", "mae encoder only", "videomae", "videomae module", "mae_st", "hf mae", "hf mae 5",
                                    "hf videomae", "omni hub", "omni trainer"])  # fmt: skip
def test_every_public_layout_gives_the_features_of_its_model(layout, tmp_path):
    flags = dict(mode="features", img_size=32, frames=16)
    x = torch.randn(2, 3, 16, 32, 32)
    if "mae_st" in layout:
        model = filled(MAEST(16, 32, 2, 8, WIDE, (16, 1, 2)))
        state, skip = {"model_state": model.state_dict()}, 1
    elif "omni" in layout:
        model = filled(omni.OmniMAE(16, 112, 2, 8, WIDE, (16, 1, 2)))
        names = {
            "decoder_embed": "decoder.decoder_embed",
            "decoder_blocks": "decoder.decoder_blocks",
            "decoder_norm": "decoder.norm",
        }
        rename = lambda k: next(
            (f"trunk.{b}{k.removeprefix(a)}" for a, b in names.items() if k.startswith(a)), f"trunk.{k}"
        )
        head = "head." if "hub" in layout else "heads.0.projector."
        state = {f"{head}{k[13:]}" if k.startswith("decoder_pred") else rename(k).replace("embed.proj", "embed.proj.1"): v
                 for k, v in model.state_dict().items()}  # fmt: skip
        state["trunk.pos_embed"] = model.pos_embed
        state, skip, flags = state if "hub" in layout else {"model": state}, 0, {**flags, "img_size": 112}
        x = torch.randn(2, 3, 16, 112, 112)
    elif "videomae" in layout:
        model = filled(VideoMAE(16, 112, 2, 8, WIDE, (16, 1, 2)))
        x, flags, skip = torch.randn(2, 3, 16, 112, 112), {**flags, "img_size": 112}, 0
        state = (
            {"module" if "module" in layout else "model": public_videomae(model)}
            if "hf" not in layout
            else huggingface(model, False)
        )
    else:
        model, x, skip = filled(MAE(32, 8, WIDE, (16, 1, 2))), torch.randn(2, 3, 32, 32), 0
        state = {"model": official_mae(model)} if "hf" not in layout else huggingface(model, "5" in layout)
        if "only" in layout:
            state = {"model": {k: v for k, v in state["model"].items() if "decoder" not in k and k != "mask_token"}}
    got, said, cfg = from_file(state, tmp_path / "x.pth", **flags)
    with torch.no_grad():
        tokens = model.eval().encode(x)  # after its final norm
        assert got.pool == ("first" if isinstance(model, MAE) else "mean")
        if got.pool == "first":
            want = tokens[:, 0]
        else:  # ours pools first and normalises then
            model.norm = torch.nn.Identity()
            want = got.norm(model.encode(x)[:, skip:].mean(dim=1))
        assert torch.allclose(got.eval().features(x), want, atol=2e-5)
    assert re.search(r"\d+ tensors used; left over, as expected: ", said)


def test_a_fine_tuned_public_file_is_a_classifier(tmp_path):
    torch.manual_seed(1)
    model = filled(VideoMAE(16, 112, 2, 8, WIDE, (16, 1, 2)))
    encoder = {k.removeprefix("encoder."): v for k, v in public_videomae(model).items()
               if not k.startswith(("decoder", "mask", "encoder_to", "encoder.norm"))}  # fmt: skip
    head = {
        "fc_norm.weight": torch.rand(64),
        "fc_norm.bias": torch.rand(64),
        "head.weight": torch.randn(4, 64),
        "head.bias": torch.randn(4),
    }
    got, said, cfg = from_file({"module": {**encoder, **head}}, tmp_path / "ft.pth", eval_only=True)
    x = torch.randn(1, 3, 16, 112, 112)
    model.norm = torch.nn.Identity()
    norm = torch.nn.functional.layer_norm(
        model.encode(x).mean(dim=1), (64,), head["fc_norm.weight"], head["fc_norm.bias"], 1e-6
    )
    with torch.no_grad():
        assert torch.allclose(got.eval()(x), norm @ head["head.weight"].T + head["head.bias"], atol=1e-4)
    got, said, cfg = from_file({"module": {**encoder, **head}}, tmp_path / "ft.pth")  # or a place to start from
    assert "left over, as expected: fc_norm, head" in said and (got.head.bias == 0).all()


@pytest.mark.parametrize("damage, message", [
    (lambda s: s.pop("blocks.1.norm1.weight"), "no encoder.blocks.1.norm1.weight"),
    (lambda s: s.update(rope=torch.zeros(3)), "unknown rope"),
    (lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(9)}), r"blocks.0.mlp.fc1.bias \(9,\), here \(256,\)"),
])  # fmt: skip
def test_nothing_is_half_loaded(tmp_path, damage, message):
    state = official_mae(MAE(32, 8, WIDE, (16, 1, 2)))
    damage(state)
    with pytest.raises(InputError, match=message):
        from_file({"model": state}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="no layout that is known"):
        from_file({"conv1.weight": torch.zeros(3)}, tmp_path / "x.pth")


def test_an_image_mae_starts_both_video_models(tmp_path):
    model = filled(MAE(32, 8, WIDE, (16, 1, 2)))
    for kind in ("videomae", "mae_st"):
        got, said, cfg = from_file({"model": official_mae(model)}, tmp_path / "x.pth", model=kind, frames=4)
        assert got(torch.randn(1, 3, 4, 32, 32)).shape == (1, 4) and cfg.tubelet == 2
        assert torch.equal(got.encoder.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


def test_safetensors_are_read_if_the_package_is_there(tmp_path):
    path, state = tmp_path / "x.safetensors", huggingface(filled(MAE(32, 8, WIDE, (16, 1, 2))), False)
    try:
        from safetensors.torch import save_file
    except ImportError:
        path.write_bytes(b"x")
        with pytest.raises(InputError, match="pip install safetensors"):
            finetune.read_init(path)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        assert finetune.read_init(path).model == "mae"
        path.write_bytes(b"x")
        with pytest.raises(InputError, match="cannot read"):
            finetune.read_init(path)


# ---- the script -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(pretrained):
    """A classifier of the six motions, after three updates."""
    command = [ROOT / "finetune.py", *TINY, "--smoke", "--out", "tuned"]
    subprocess.run([sys.executable, *map(str, command)], cwd=pretrained, check=True, stdout=subprocess.DEVNULL)
    return pretrained / "tuned/checkpoint.pt"


@pytest.fixture(scope="module")
def pretrained(toy, tmp_path_factory):
    """A pretraining run of three updates, in the place where --init auto looks for it."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "toy").symlink_to(toy)
    flags = "--data toy --frames 4 --img-size 16 --decoder-width 16 --decoder-heads 2 --workers 0 --smoke --pictures 1"
    subprocess.run([sys.executable, ROOT / "mae_video.py", *flags.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_the_four_modes_run_and_what_is_reported_is_the_last_epochs_model(pretrained, run):
    text = run("finetune.py", *TINY, cwd=pretrained)
    assert "tensors used" in text and re.search(r"done: top-1 [\d.]+% \(chance 16.7%\) after .*see runs/finetune", text)
    folder = pretrained / "runs/finetune"
    results, rows = (
        json.loads((folder / "results.json").read_text()),
        list(csv.DictReader(open(folder / "predictions.csv"))),
    )
    assert len(rows) == results["files"] == 12 and {"path", "label", "class1", "score5"} <= set(rows[0])
    assert np.isclose(np.mean([r["class1"] == r["label"] for r in rows]), results["top1"])
    test_again = ["finetune.py", "--eval-only", "--clips", 1, "--workers", 0, "--out", "e", "--init"]
    again = run(*test_again, "runs/finetune/checkpoint.pt", cwd=pretrained)
    assert "left over, as expected: nothing" in again
    assert json.loads((pretrained / "e/results.json").read_text())["top1"] == results["top1"]
    said = run("finetune.py", "--predict", rows[4]["path"], "--clips", 1, "--init", "runs/finetune/checkpoint.pt", cwd=pretrained)
    default = run("finetune.py", "--predict", rows[4]["path"], "--clips", 1, cwd=pretrained)
    assert said == default, "the default run is where --predict looks"
    shown = re.findall(r"^ *([\d.]+)%  (\w+)$", said, re.M)  # what the test said of the same file
    assert [name for _, name in shown] == [rows[4][f"class{k}"] for k in range(1, 6)]
    assert all(abs(float(p) / 100 - float(rows[4][f"score{k}"])) < 6e-4 for k, (p, _) in enumerate(shown, 1))
    for wrong, message in ((["--predict", "toy"], "reads one file, .avi"), (["--mode", "knn"], "name another --out")):
        asked = ["finetune.py", *wrong, "--init", "runs/finetune/checkpoint.pt"]
        assert message in run(*asked, cwd=pretrained, code=2)
    for mode in ("scratch", "linear", "knn"):
        assert "done: top-1" in run("finetune.py", *TINY, "--mode", mode, "--out", mode, cwd=pretrained)
    run(*test_again, "scratch/checkpoint.pt", cwd=pretrained)  # not the random network it began with
    assert (pretrained / "e/predictions.csv").read_text() == (pretrained / "scratch/predictions.csv").read_text()
    (pretrained / "videos").mkdir()
    (pretrained / "videos/a.mp4").write_bytes(b"no video")
    for i, path in enumerate(sorted((pretrained / "toy/videos").rglob("*.mp4"))[:3]):
        (pretrained / f"videos/b{i}.mp4").symlink_to(path)
    text = run("finetune.py", "--mode", "features", "--data", "videos", "--workers", 0, "--out", "g", cwd=pretrained)
    assert "left out, unreadable: videos/a.mp4" in text and "train_features (2, 96)" in text  # 3 and 1 files, no labels
    run("finetune.py", "--mode", "features", "--workers", 0, "--out", "f", cwd=pretrained)
    with np.load(pretrained / "f/features.npz") as f:
        assert f["test_features"].shape == (12, 96) and len(f["train_labels"]) == len(f["train_paths"]) == 36
        assert np.isfinite(f["train_features"]).all() and f["train_features"].std() > 0


def test_the_whole_recipe_runs_and_goes_on_after_a_kill_bit_by_bit(pretrained, run, tmp_path):
    flags = ["--data", "toy", "--epochs", 6, "--warmup", 1, "--batch", 12, "--workers", 1, "--log-every", 1, "--clips", 1,
             "--check-every", 0, "--repeat", 2, "--rand-augment", 9, "--mixup", 0.8, "--cutmix", 1.0, "--erase", 0.25,
             "--drop-path", 0.2, "--dropout", 0.1, "--clip", 1, "--accum", 2]  # fmt: skip
    run("finetune.py", *flags, "--out", "whole", cwd=pretrained)
    out = pretrained / "killed"
    process = subprocess.Popen([sys.executable, ROOT / "finetune.py", *map(str, flags), "--out", out], cwd=pretrained,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert weights(out)["step"] < 36
    assert "resumed" in run("finetune.py", "--resume", "--out", out, cwd=pretrained)
    assert same_state(out, pretrained / "whole") and losses(out) == losses(pretrained / "whole")
    assert (out / "predictions.csv").read_text() == (pretrained / "whole/predictions.csv").read_text()


def test_a_run_that_began_from_a_joint_table_of_mae_st_goes_on(pretrained, run, toy, tmp_path):
    model = MAEST(16, 112, 2, 8, (32, 1, 2), (16, 1, 2), separable=False, cls=False)
    torch.save({"model": model.state_dict()}, tmp_path / "joint.pt")
    flags = ["--data", toy, "--frames", 4, "--stride", 2, "--img-size", 16, "--init", tmp_path / "joint.pt"]
    run("finetune.py", *TINY, *flags, "--out", tmp_path / "j")
    text = run("finetune.py", "--resume", "--out", tmp_path / "j")
    assert "from scratch" not in text and "done: top-1" in text


def test_a_classifier_is_tested_on_the_fold_it_was_trained_on(tmp_path):
    model = tiny(classes=3)
    config = {**vars(Config(mode="finetune", model="videomae", size="32x3x4", frames=8, img_size=32, patch=8, tubelet=2,
                            fold=2, inputs="rgb"))}  # fmt: skip
    torch.save({"script": "finetune", "model": model.state_dict(), "config": config}, tmp_path / "x.pt")
    found = finetune.read_init(tmp_path / "x.pt")
    settle = lambda **given: finetune.settle(Config(init="x.pt", **given), found)
    assert settle(eval_only=True).fold == settle(eval_only=True, fold=2).fold == 2
    with pytest.raises(InputError, match="was trained on fold 2"):
        settle(eval_only=True, fold=3)
    assert settle().fold == 1


def test_a_start_that_has_seen_another_fold_is_named(pretrained, run):
    warning = "has seen fold 1: of the same data, that is test files of fold 2"
    flags = ["finetune.py", *TINY, "--smoke", "--fold", 2]
    assert warning in run(*flags, "--out", "fold2", cwd=pretrained)
    assert "has seen" not in run(*flags, "--mode", "scratch", "--out", "fold2s", cwd=pretrained)


def test_without_a_pretrained_run_it_is_from_scratch_and_says_so(toy, run, tmp_path):
    said = run("finetune.py", *TINY, "--smoke", "--data", toy)
    assert "runs/mae_video/checkpoint.pt is not there" in said
    assert json.loads((tmp_path / "runs/finetune/results.json").read_text())["mode"] == "scratch"


def test_a_last_test_that_is_stopped_says_how_to_do_it_again(pretrained, run, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(pretrained)
    monkeypatch.setattr(finetune, "run_views", stop)
    flags = [*TINY, "--check-every", 0, "--out", "stopped"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    with pytest.raises(KeyboardInterrupt):
        finetune.main()
    assert "its test is not done: python finetune.py --resume --out stopped" in capsys.readouterr().out
    assert "done: top-1" in run("finetune.py", "--resume", "--out", "stopped", cwd=pretrained)


def test_a_run_whose_last_checkpoint_cannot_be_written_is_tested_all_the_same(pretrained, run):
    (pretrained / "lost/checkpoint.pt.tmp").mkdir(parents=True)
    text = run("finetune.py", *TINY, "--smoke", "--out", "lost", cwd=pretrained, code=1)
    assert "warning: cannot write lost/checkpoint.pt" in text and "file level  top-1" in text
    assert (pretrained / "lost/predictions.csv").exists()


def test_a_run_does_not_go_on_with_other_classes(pretrained, toy, run, refused):
    for kind in (toy / "videos").glob("[A-Z]*"):
        shutil.copytree(kind, pretrained / "own" / kind.name)
    kinds = sorted((pretrained / "own").iterdir())
    flags = [*TINY, "--data", pretrained / "own", "--smoke", "--out", "f"]
    run("finetune.py", *flags, cwd=pretrained)
    kinds[0].rename(kinds[0].with_name("zzz"))  # as many classes and files, other labels
    assert "a resumed run needs the same" in refused(finetune, "--resume", "--out", pretrained / "f")
    shutil.copytree(pretrained / "own/zzz", pretrained / "own/one more")
    assert "a resumed run needs the same" in refused(finetune, "--resume", "--out", pretrained / "f")


def test_a_classifier_is_not_tested_on_classes_of_other_names(tuned, toy, refused, tmp_path):
    for i, folder in enumerate(sorted((toy / "videos").glob("[A-Z]*"))):
        (tmp_path / "other" / f"class{i}").parent.mkdir(exist_ok=True)
        (tmp_path / "other" / f"class{i}").symlink_to(folder)
    said = refused(finetune, "--eval-only", "--init", tuned, "--data", "other", "--out", "e")
    assert f"the classes of other (class0, class1, class2 ...) are not those of {tuned}" in said


def test_names_that_are_no_text_are_written_as_they_are_and_a_full_disk_leaves_the_older_file(pretrained, toy, run, refused):
    videos = sorted((toy / "videos").rglob("*_c01.mp4"))[:8]
    for i, path in enumerate(videos):
        name = os.fsdecode(b"odd/%s/%s/caf\xe9_%d.mp4" % (b"train" if i < 4 else b"val", b"ab"[i % 2 : i % 2 + 1], i))
        (pretrained / name).parent.mkdir(parents=True, exist_ok=True)
        (pretrained / name).symlink_to(path)
    flags = ["--data", "odd", "--mode", "knn", "--workers", 0, "--out", "o"]
    run("finetune.py", *flags, cwd=pretrained)
    assert (pretrained / "o/predictions.csv").read_bytes().count(b"caf\xe9") == 4
    before = (pretrained / "o/results.json").read_bytes()
    (pretrained / "o/results.json.tmp").mkdir()  # so that the new one cannot be written
    assert "cannot write o/results.json: Is a directory" in run("finetune.py", *flags, cwd=pretrained, code=2)
    assert (pretrained / "o/results.json").read_bytes() == before


def test_two_processes_test_every_video_once(pretrained, run, toy):
    """Five test videos for two processes, one of them broken: the same table as one process gives."""
    folder = pretrained / "five"
    folder.mkdir()
    videos = sorted((toy / "videos").rglob("*_g0[12]_c01.mp4"))
    (folder / "train.csv").write_text("".join(f"{p} {i % 3}\n" for i, p in enumerate(videos)))
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "val.csv").write_text("".join(f"{p} {i % 3}\n" for i, p in enumerate(videos[:4])) + "broken.mp4 1\n")
    flags = ["--data", "five/train.csv", "--workers", 0, "--epochs", 1, "--batch", 4, "--clips", 2, "--check-every", 0]
    run("finetune.py", *flags, "--out", "one", cwd=pretrained)
    test = [
        ROOT / "finetune.py",
        "--data",
        "five/train.csv",
        "--eval-only",
        "--init",
        "one/checkpoint.pt",
        "--clips",
        2,
        "--workers",
        0,
    ]
    run(*test, "--out", "a", cwd=pretrained)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        *test,
        "--out",
        "b",
    ]
    result = subprocess.run(
        list(map(str, command)),
        cwd=pretrained,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0 and result.stdout.count("done: ") == 1, result.stderr
    a, b = (list(csv.reader(open(pretrained / n / "predictions.csv"))) for n in "ab")
    assert (
        len(a) == 6 and a[5][2] == "unreadable" and [[r[0], r[1], r[2]] for r in a] == [[r[0], r[1], r[2]] for r in b]
    )
    assert (
        "1 files unreadable" in result.stdout and json.loads((pretrained / "b/results.json").read_text())["files"] == 4
    )


@pytest.mark.parametrize("flags, message", [
    (["--mode", "knn", "--init", "auto"], "needs --init FILE"), (["--eval-only"], "need --init FILE"), (["--init", "no.pth"], "cannot read checkpoint no.pth"),
    (["--mode", "scratch", "--size", "nano", "--img-size", 60], "use --img-size 56 or 64"), (["--mode", "scratch", "--frames", 7], "clip length 7"),
    (["--mode", "scratch", "--batch", 6, "--repeat", 4], "multiple of 4"), (["--mode", "scratch", "--share", 0.0], "--share 0.0: must be"),
    (["--mode", "scratch", "--batch", 1000], "do not fill one update"), (["--mode", "tune"], "invalid choice"), (["--mixupp", 1], "did you mean --mixup"),
    (["--mode", "scratch", "--model", "multimae", "--mixup", 0.8], "are not built for multimae"), (["--mode", "scratch", "--model", "multimae", "--inputs", "rgb,flow"], "unknown modality flow"),
    (["--mode", "scratch", "--model", "multimae", "--dense", "semseg", "--ignore", 6], "classes of the maps are 0 to 5"),
    (["--mode", "scratch", "--images"], "--images is for OmniMAE"), (["--mode", "scratch", "--inputs", "rgb,depth"], "is for --model multimae"),
    (["--mode", "scratch", "--model", "mae", "--repeat", 2], "images have none"),
    (["--mode", "scratch", "--model", "mae", "--fold", 2], "--fold 2 is of the lists"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(finetune, "--data", toy, *flags)


def test_flags_that_do_not_go_together_are_named(pretrained, tuned, refused, toy):
    init = ["--data", toy, "--init", pretrained / "runs/mae_video/checkpoint.pt"]
    assert "two samples at a time" in refused(finetune, *init, "--mode", "linear", "--batch", 4, "--accum", 4)
    assert "leave --images and --mode out" in refused(finetune, "--data", toy, "--init", tuned, "--eval-only", "--mode", "knn")


def test_a_public_classifier_of_omnimae_is_tested_on_images_or_videos(tmp_path):
    model = filled(omni.OmniMAE(16, 112, 2, 8, WIDE, (16, 1, 2)))
    state = {f"trunk.{k}".replace("embed.proj", "embed.proj.1"): v for k, v in model.state_dict().items() if "decoder" not in k}
    state |= {"heads.0.projector.weight": torch.randn(4, 64), "heads.0.projector.bias": torch.randn(4)}
    for images in (False, True):
        x = torch.randn(1, 3, 112, 112) if images else torch.randn(1, 3, 16, 112, 112)
        got, _, cfg = from_file({"model": state}, tmp_path / "x.pth", eval_only=True, images=images)
        assert cfg.images == images and got(x).shape == (1, 4)


def test_scratch_takes_what_is_asked_for_and_the_rest_from_the_file(pretrained):
    found = finetune.read_init(pretrained / "runs/mae_video/checkpoint.pt")
    cfg = finetune.settle(Config(mode="scratch", size="64x1x2"), found)
    assert (cfg.size, cfg.img_size, cfg.frames, cfg.model) == ("64x1x2", 16, 4, "videomae")
    cfg = finetune.settle(Config(mode="scratch", model="mae_st"), found)
    assert (cfg.size, cfg.img_size, cfg.model) == ("nano", 64, "mae_st")


def test_the_toy_world_is_looked_at_as_a_whole_unless_told_otherwise(pretrained):
    found = finetune.read_init(pretrained / "runs/mae_video/checkpoint.pt")
    settled = [finetune.settle(Config(**x), found).sampling for x in ({}, dict(sampling="dense"), dict(data="UCF101"))]
    assert settled == ["segments", "dense", "dense"]


def test_a_probe_has_its_own_rate_whatever_the_preset():
    settings = lambda *flags: Config(**mae_image.parse_config(Config, finetune.PRESETS, "", flags, finetune.for_mode))
    probe, tuned = settings("--preset", "ucf101", "--mode", "linear"), settings("--preset", "ucf101")
    assert (probe.lr, probe.mixup, probe.rand_augment, probe.clips) == (0, 0, 0, 5) and (tuned.lr, tuned.mixup) == (1e-3, 0.8)
    assert settings("--preset", "ucf101", "--mode", "linear", "--lr", "3").lr == 3
    assert settings("--preset", "mae_probe_paper").lr == 0.1


def test_labels_and_checkpoints_that_do_not_fit_are_refused(pretrained, tuned, refused, toy, tmp_path):
    init = pretrained / "runs/mae_video/checkpoint.pt"
    assert "--size tiny: the model in" in refused(finetune, "--data", toy, "--init", init, "--size", "tiny")
    assert "--patch 4: the model in" in refused(finetune, "--data", toy, "--init", init, "--patch", 4)
    assert "holds no classifier" in refused(finetune, "--data", toy, "--init", init, "--eval-only")
    assert "only an image MAE can become another" in refused(finetune, "--data", toy, "--init", init, "--model", "mae")
    videos = sorted((toy / "videos").rglob("*_g01_c01.mp4"))
    for train, val, message in (([0, 1, 2], [0, 1, 3], "have label 3, but the 3 classes"), ([0, 2, 2], [0, 1, 2], "class 1 of train.csv has no training file"),
                                ([0, -1, 2], [0, 1, 2], "files without a class")):  # fmt: skip
        for name, labels in (("train.csv", train), ("val.csv", val)):
            (tmp_path / name).write_text("".join(f"{p} {i}\n" for p, i in zip(videos, labels)))
        assert message in refused(finetune, "--data", "train.csv", "--mode", "scratch")
    for name in ("a", "b"):
        (tmp_path / "classes/train" / name).mkdir(parents=True)
        (tmp_path / "classes/val" / name).mkdir(parents=True)
    for part in ("train/a", "val/a"):
        (tmp_path / "classes" / part / "x.mp4").symlink_to(videos[0])
    assert "class b of classes has no training file" in refused(finetune, "--data", "classes", "--mode", "scratch")
    (tmp_path / "classes/train/b/x.mp4").symlink_to(videos[1])
    assert "2 classes, the classifier in" in refused(finetune, "--data", "classes", "--eval-only", "--init", tuned)
