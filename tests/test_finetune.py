import csv
import json
import os
import re
import shutil
import signal
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
from conftest import TINY_VIDEO
from finetune import Classifier, Config
from layouts import huggingface, official_mae, official_omni, official_videomae
from mae_image import MAE
from mae_video import MAEST, VideoMAE

TINY = ["--epochs", 2, "--warmup", 1, "--batch", 12, "--workers", 0, "--log-every", 1, "--clips", 1,
        "--pictures", 1]


def tiny(kind=VideoMAE, classes=5, size=32, **options):
    torch.manual_seed(0)
    shape = (size, 8) if kind is MAE else (8, size, 2, 8)
    return Classifier(kind(*shape, (32, 3, 4), (16, 1, 2)), classes, **options)


def clips(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 32, 32, generator=generator)


def of_views(**options):
    sizes = dict(frames=8, stride=1, sampling="dense", img_size="32", clips=1)
    return Config(model="videomae", **sizes | dict(workers=0, device="cpu") | options)


# ---- the classifier ------------------------------------------------------------------------------


def test_the_classifier_pools_what_encode_gives_and_has_no_decoder():
    encoder, x = VideoMAE(8, 32, 2, 8, (32, 3, 4), (16, 1, 2)), clips()
    blocks = list(encoder.blocks)
    tokens = encoder.patch_embed(mae_video.patchify_clips(x, 2, 8)) + encoder.pos_embed
    for block in blocks:
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
        want = tokens[:, 0]
        if pool == "mean":
            want = torch.stack([t[1:].sum(0) / (len(t) - 1) for t in tokens])
        assert torch.allclose(model.features(x), model.norm(want), atol=1e-5)


def test_drop_path_is_for_training_only_and_higher_in_deeper_blocks():
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
    assert torch.equal(model.train().features(clips()), model.features(clips()))  # no drop path in it
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cfg = of_views(mode="linear", stride=2, batch=12, epochs=1, lr=10.0, warmup=0, pictures=0)
    files = data.list_videos(toy, "train")
    files = files.select(files.labels >= 0)
    dataset = mae_video.ClipDataset(files, 8, 2, (32, 32), 0)
    finetune.train_classifier(model, finetune.Augmented(dataset, 2, 0), files, cfg)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == statistics | {"head.1.weight", "head.1.bias"}


def test_other_sizes_interpolate_every_table():
    for kind in (VideoMAE, MAEST):
        model = tiny(kind)
        finetune.change_grid(model.encoder, (8, 6, 5))
        assert model(torch.randn(2, 3, 16, 48, 40)).shape == (2, 5)
    model = tiny(MAE)
    finetune.change_grid(model.encoder, (1, 6, 5))
    assert model(torch.randn(2, 3, 48, 40)).shape == (2, 5)
    assert isinstance(model.encoder.pos_embed, torch.nn.Parameter)
    table = torch.arange(4.0)[None, :, None].repeat_interleave(9, 1)  # the slot's number
    want = torch.nn.functional.interpolate(torch.arange(4.0)[None, None], 8, mode="linear").flatten()
    assert torch.allclose(mae_video.resize_table(table, (4, 3, 3), (8, 3, 3))[0, ::9, 0], want)


@pytest.mark.parametrize("kind", [MAE, MAEST])
def test_a_probe_at_another_size_still_trains_its_head_alone(kind):
    """Positions that began to learn would be one more group of the optimiser: no --resume."""
    model = tiny(kind, frozen=True)
    finetune.change_grid(model.encoder, (4 if kind is MAEST else 1, 6, 6))
    assert all(n.startswith("head.") for n, p in model.named_parameters() if p.requires_grad)


# ---- the recipe ----------------------------------------------------------------------------------


def test_layers_below_learn_slower_and_vectors_do_not_decay():
    model = tiny(MAEST)
    groups = finetune.layer_groups(model, 0.05, 0.5)
    of = {id(p): g for g in groups for p in g["params"]}
    scale = {n: of[id(p)]["lr_scale"] for n, p in model.named_parameters()}
    assert scale["head.weight"] == scale["norm.bias"] == 1
    assert scale["encoder.blocks.2.mlp.fc1.weight"] == 0.5
    for name in ("cls_token", "pos_embed_spatial", "patch_embed.proj.bias"):
        assert scale[f"encoder.{name}"] == 0.5**4
    decayed = {n for n, p in model.named_parameters() if of[id(p)]["weight_decay"]}
    assert "encoder.patch_embed.proj.weight" in decayed
    assert not [n for n in decayed if "pos" in n or "token" in n or "bias" in n]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("alphas", [(0.8, 0), (0, 1.0)])
def test_frames_of_a_clip_are_mixed_alike_and_labels_with_them(alphas):
    still = torch.randn(6, 3, 1, 16, 16).expand(-1, -1, 4, -1, -1)
    torch.manual_seed(1)
    x, soft = finetune.mix(still, torch.arange(6), 6, *alphas)
    assert (x == x[:, :, :1]).all() and not torch.equal(x, still)
    assert torch.allclose(soft.sum(dim=1), torch.ones(6)) and (soft.max(dim=1).values < 1).any()
    assert finetune.mix(still, torch.arange(6), 6, 0, 0)[0] is still


def test_clips_of_one_video_are_rarely_mixed_with_each_other():
    twins, x = torch.arange(8).repeat_interleave(2), torch.randn(16, 3, 1, 16, 16)
    soft = torch.stack([finetune.mix(x, twins, 8, 0.8, 0)[1] for _ in range(50)])
    assert (soft.max(dim=2).values == 1).float().mean() < 0.15


def test_one_box_is_erased_in_all_frames_with_other_noise_in_each():
    still = torch.randn(6, 3, 1, 16, 16).repeat(1, 1, 4, 1, 1)
    x = finetune.erase(still, 1.0)
    changed = (x != still).any(dim=1)  # (6, 4, 16, 16)
    assert (changed == changed[:, :1]).all() and 0 < changed.float().mean() < 0.5
    inside = changed[:, :1, None].expand(-1, 3, 4, -1, -1) if changed.ndim == 5 else changed[:, None]
    noise = x.masked_select(inside.expand_as(x)).reshape(-1)
    assert len(noise.unique()) > 0.9 * len(noise)  # every pixel of every frame its own


class Still(torch.utils.data.Dataset):
    seed, repeat, paths, labels, classes = 0, 2, ["x"], np.zeros(1), ["x"]

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(key[1])
        pixels = torch.randint(0, 256, (2, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
        return pixels.expand(-1, 5, -1, -1, -1), key[1], []


def test_frames_of_a_clip_are_augmented_alike_and_by_epoch_and_item_alone():
    augmented = finetune.Augmented(Still(), 4, 9)
    before = torch.random.get_rng_state()
    x = [augmented[0, i][0] for i in range(8)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all((c == c[:, :1]).all() for c in x)
    assert any(not torch.equal(c, Still()[0, i][0]) for i, c in enumerate(x))
    assert all(torch.equal(augmented[0, i][0], c) for i, c in enumerate(x))
    assert not torch.equal(augmented[1, 3][0], x[3])


def test_a_share_is_taken_of_each_class_and_at_least_one_file_always_the_same():
    labels = np.repeat([0, 1, 2], [40, 10, 1])
    names = np.array([str(i) for i in range(51)])
    files = data.Files(names, labels, list("abc"), pixels=np.arange(51)[:, None])
    few = finetune.take_share(files, 0.3, 0)
    assert np.bincount(few.labels).tolist() == [12, 3, 1] and len(set(few.paths)) == 16
    numbers = few.paths.astype(int)
    assert (labels[numbers] == few.labels).all() and (few.pixels[:, 0] == numbers).all()
    assert (few.paths == finetune.take_share(files, 0.3, 0).paths).all()
    assert (few.paths != finetune.take_share(files, 0.3, 1).paths).any()
    assert len(finetune.take_share(files, 1, 3).paths) == 51


# ---- testing -------------------------------------------------------------------------------------


def test_crops_lie_at_both_ends_and_in_the_middle_of_the_long_side():
    wide = np.random.default_rng(0).integers(0, 256, (2, 16, 40, 3), dtype=np.uint8)
    views = finetune.spatial_views(wide, (16, 16), 3)
    for view, left in zip(views, (0, 12, 24)):
        assert torch.equal(view, torch.from_numpy(wide[:, :, left : left + 16]))
    tall = finetune.spatial_views(wide.transpose(0, 2, 1, 3).copy(), (16, 16), 3)
    assert torch.equal(tall, views.transpose(2, 3))
    assert torch.equal(finetune.spatial_views(wide, (16, 16), 1)[0], views[1])


def test_crops_of_a_rectangle_have_its_height_and_width():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    views = finetune.spatial_views(pixels, (20, 40), 3)  # resized to 27 x 40: too high
    assert views.shape == (3, 2, 20, 40, 3)
    assert not torch.equal(views[0], views[2])


def test_the_mean_over_views_is_that_of_views_done_one_by_one(toy):
    files = data.list_videos(toy, "val")
    cfg, model = of_views(batch=5, clips=3, crops=2), tiny().eval()
    torch.nn.init.normal_(model.head.weight)
    together = finetune.run_views(model, files, cfg, model.answers)
    assert together.shape == (len(files.paths), 6, 5)
    views = finetune.ViewDataset(files, cfg)
    for i in (0, 5, len(files.paths) - 1):
        singly = [model(model.encoder.normalize(v[None])).softmax(-1)[0] for v in views[i][0]]
        assert torch.allclose(together[i], torch.stack(singly), atol=1e-5)


def test_a_broken_test_file_is_named_left_out_and_not_replaced(toy, tmp_path, capsys):
    files = data.list_videos(toy, "val").select(np.arange(5))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    files.paths = np.array([*files.paths[:3], str(tmp_path / "broken.mp4"), files.paths[4]])
    model = tiny()
    answers = finetune.run_views(model, files, of_views(batch=2), model.answers)
    assert answers[:, 0].isfinite().all(dim=1).tolist() == [True, True, True, False, True]
    assert "broken.mp4: broken, left out" in capsys.readouterr().out


def test_a_network_that_answers_nan_is_not_a_broken_file(toy):
    model = tiny().eval()
    model.head.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="answers are not finite"):
        finetune.run_views(model, data.list_videos(toy, "val"), of_views(), model.answers)


def test_a_worker_killed_while_testing_is_one_line(toy, monkeypatch):
    """Also while the network computes: torch's handler would raise right there."""
    files, read = data.list_videos(toy, "val"), finetune.ViewDataset.__getitem__

    def kill(self, i):  # asked for after batch 0
        return os.kill(os.getpid(), signal.SIGKILL) if i == 4 else read(self, i)

    def answers(x):
        time.sleep(0.5)
        return model.answers(x)

    monkeypatch.setattr(finetune.ViewDataset, "__getitem__", kill)
    model = tiny()
    with pytest.raises(ValueError, match="the loader failed: .*(killed|exited)"):
        finetune.run_views(model, files, of_views(batch=1, workers=1), answers)


def test_scores_are_those_of_a_loop_and_unreadable_files_are_left_out():
    p = torch.rand(40, 3, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    labels = torch.arange(40) % 6  # class 6 has no test file
    p[5] = float("nan")
    s = finetune.summarise(p, labels)
    good = [i for i in range(40) if i != 5]
    right = {i: p[i].mean(0).argmax() == labels[i] for i in good}
    assert (s["files"], s["unreadable"], s["views"]) == (39, 1, 3)
    assert np.isclose(s["top1"], np.mean([right[i] for i in good]))
    views = [p[i, v].argmax() == labels[i] for i in good for v in range(3)]
    assert np.isclose(s["view_top1"], np.mean(views))
    assert np.isclose(s["top5"], np.mean([labels[i] in p[i].mean(0).topk(5).indices for i in good]))
    per_class = [np.mean([right[i] for i in good if labels[i] == c]) for c in range(6)]
    assert np.allclose(s["per_class"][:6], per_class) and np.isnan(s["per_class"][6])
    assert np.isclose(s["class_mean"], np.mean(per_class)) and np.isclose(s["most_frequent"], 7 / 39)
    for a in range(7):
        for b in range(7):
            count = sum(labels[i] == a and p[i].mean(0).argmax() == b for i in good)
            assert s["confusion"][a][b] == count


def test_nearest_neighbours_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(30, 8, generator=g) + 1, torch.randn(6, 8, generator=g)
    labels, mean = torch.arange(30) % 4, train.mean(0)
    votes, neighbours = finetune.nearest_neighbours(train, labels, test, 4, k=5)
    for x, vote, near in zip(test, votes, neighbours):
        cosines = [torch.cosine_similarity(x - mean, t - mean, 0).item() for t in train]
        order = np.argsort(cosines)[::-1][:5]
        assert near.tolist() == order.tolist()
        want = torch.zeros(4)
        for i in order:
            want[labels[i]] += np.exp(cosines[i] / 0.07)
        assert torch.allclose(vote, want / want.sum(), atol=1e-4)


# ---- pretrained files ----------------------------------------------------------------------------


class Caught(Exception):
    pass


@pytest.fixture
def built(toy, tmp_path, monkeypatch, capsys):
    """built(state, "--flag", value) -> the Classifier that --init of such a file gives, the report."""

    def call(state, *flags):
        def stop(model, files, cfg, *_):
            raise Caught(model, cfg)

        torch.save(state, tmp_path / "x.pth")
        monkeypatch.setattr(finetune, "run_views", stop)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(finetune, "check_classes", lambda *_: None)
        flags = ["--data", toy, "--init", "x.pth", "--workers", 0, *flags]
        with pytest.raises(Caught) as caught:
            finetune.main([str(flag) for flag in flags])
        return *caught.value.args, capsys.readouterr().out

    return call


def filled(model):
    """Every weight random, so that a mix-up cannot hide; no key bias where the public file has none."""
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1)
        if name.endswith("qkv.bias") and isinstance(model, VideoMAE):
            p.data.chunk(3)[1].zero_()
    return model


WIDE = (64, 2, 1)  # no file tells its heads: 1 for 64 channels unless the size is a published one


def public_file(layout):
    """-> model of ours, its state in this layout, tokens to leave out of the mean."""
    if "mae_st" in layout:
        model = filled(MAEST(16, 112, 2, 8, WIDE, (16, 1, 2)))
        return model, {"model_state": model.state_dict()}, 1
    if "omni" in layout:
        model = filled(omni.OmniMAE(16, 112, 2, 8, WIDE, (16, 1, 2)))
        state = official_omni(model, trainer="trainer" in layout)
        return model, {"model": state} if "trainer" in layout else state, 0
    if "videomae" in layout:
        model = filled(VideoMAE(16, 112, 2, 8, WIDE, (16, 1, 2)))
        key = "module" if "module" in layout else "model"
        return model, huggingface(model) if "hf" in layout else {key: official_videomae(model)}, 0
    model = filled(MAE(112, 8, WIDE, (16, 1, 2)))
    state = huggingface(model, "5" in layout) if "hf" in layout else {"model": official_mae(model)}
    if "only" in layout:
        own = state["model"].items()
        state = {k: v for k, v in own if "decoder" not in k and k != "mask_token"}
        state = {"state_dict": {f"module.{k}": v for k, v in state.items()}}  # wrapped twice
    return model, state, 0


LAYOUTS = ["mae", "mae encoder only", "videomae", "videomae module", "mae_st", "hf mae", "hf mae 5",
           "hf videomae", "omni hub", "omni trainer"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_public_layout_gives_the_features_of_its_model(layout, built):
    model, state, skip = public_file(layout)
    flags = ["--model", "omni"] if "omni" in layout else []
    got, cfg, text = built(state, "--mode", "features", *flags)
    image = isinstance(model, MAE)
    x = torch.randn(2, 3, 112, 112) if image else torch.randn(2, 3, 16, 112, 112)
    assert got.pool == ("first" if image else "mean")
    assert re.search(r"\d+ tensors used; left over, as expected: ", text)
    with torch.no_grad():
        if image:
            want = model.eval().encode(x)[:, 0]  # after its final norm
        else:  # ours pools first and normalises then
            model.norm = torch.nn.Identity()
            want = got.norm(model.eval().encode(x)[:, skip:].mean(dim=1))
        assert torch.allclose(got.eval().features(x), want, atol=2e-5)


def tuned_state(model, norm=True):
    encoder = {k.removeprefix("encoder."): v for k, v in official_videomae(model).items()
               if not k.startswith(("decoder", "mask", "encoder_to", "encoder.norm"))}
    head = {"fc_norm.weight": torch.rand(64), "fc_norm.bias": torch.rand(64),
            "head.weight": torch.randn(6, 64), "head.bias": torch.randn(6)}
    return {"module": {**encoder, **head}}, head


def test_a_fine_tuned_public_file_is_a_classifier_or_a_place_to_start_from(built):
    model = filled(VideoMAE(16, 112, 2, 8, WIDE, (16, 1, 2)))
    state, head = tuned_state(model)
    got, _, _ = built(state, "--eval-only")
    x, model.norm = torch.randn(1, 3, 16, 112, 112), torch.nn.Identity()
    with torch.no_grad():
        norm = head["fc_norm.weight"], head["fc_norm.bias"], 1e-6
        y = torch.nn.functional.layer_norm(model.encode(x).mean(dim=1), (64,), *norm)
        want = y @ head["head.weight"].T + head["head.bias"]
        assert torch.allclose(got.eval()(x), want, atol=1e-4)
    got, _, text = built(state, "--smoke", "--batch", 4)
    assert "left over, as expected: fc_norm, head" in text and (got.head.bias == 0).all()


@pytest.mark.parametrize("damage, message", [
    (lambda s: s.pop("blocks.1.norm1.weight"), "no encoder.blocks.1.norm1.weight"),
    (lambda s: s.update(rope=torch.zeros(3)), "unknown encoder.rope"),
    (lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(9)}), "fc1.bias (9,), here (256,)"),
    (lambda s: s.pop("cls_token"), "is in no format known here"),
    (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(32, 192)}), "first names are: cls_token"),
])
def test_nothing_is_half_loaded(tmp_path, refused, toy, damage, message):
    state = official_mae(MAE(32, 8, WIDE, (16, 1, 2)))
    damage(state)
    torch.save({"model": state}, tmp_path / "x.pth")
    assert message in refused(finetune, "--data", toy, "--model", "mae", "--init", "x.pth")


def test_a_classifier_of_other_classes_is_not_tested(built):
    state, _ = tuned_state(filled(VideoMAE(16, 112, 2, 8, WIDE, (16, 1, 2))))
    state["module"] |= {"head.weight": torch.randn(4, 64), "head.bias": torch.randn(4)}
    with pytest.raises(ValueError, match=r"head.weight \(4, 64\), here \(6, 64\)"):
        built(state, "--eval-only")


def test_a_public_linear_probe_is_tested(built):
    state = official_mae(filled(MAE(32, 8, WIDE, (16, 1, 2))))
    state |= {"head.0.running_mean": torch.randn(64), "head.0.running_var": torch.rand(64),
              "head.0.num_batches_tracked": torch.tensor(9),
              "head.1.weight": torch.randn(4, 64), "head.1.bias": torch.randn(4)}
    got, cfg, _ = built({"model": state}, "--eval-only", "--model", "mae")
    assert cfg.mode == "linear" and torch.equal(got.head[1].weight, state["head.1.weight"])
    assert got.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize("flags, message", [
    (["--model", "multimae", "--mixup", 0.8], "--model multimae takes no"),
    (["--dense", "depth"], "--dense depth takes --model multimae")])
def test_what_multimae_cannot_do_is_refused(refused, toy, flags, message):
    assert message in refused(finetune, "--data", toy, "--mode", "scratch", *flags)


def test_safetensors_are_read_if_the_package_is_there(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = huggingface(filled(MAE(32, 8, WIDE, (16, 1, 2))))
    path = tmp_path / "x.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    assert mae_image.read_file(path, finetune.READERS).model == "mae"


@pytest.mark.parametrize("images", [False, True])
def test_a_public_classifier_of_omnimae_is_tested_on_images_or_videos(built, images):
    model = filled(omni.OmniMAE(16, 112, 2, 8, WIDE, (16, 1, 2)))
    state = {k: v for k, v in official_omni(model, True).items() if "decoder" not in k}
    kind, n = ("images", 4) if images else ("videos", 6)  # classes of the toy world
    state |= {"heads.0.projector.weight": torch.randn(n, 64), "heads.0.projector.bias": torch.randn(n)}
    got, cfg, _ = built({"model": state}, "--eval-only", "--model", "omni", "--classify", kind)
    x = torch.randn(1, 3, 112, 112) if images else torch.randn(1, 3, 16, 112, 112)
    assert cfg.classify == kind and got(x).shape == (1, n)


# ---- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """A pretraining run of three updates, where finetune.py looks for it, and a classifier."""
    folder = tmp_path_factory.mktemp("made")
    before = os.getcwd()
    os.chdir(folder)
    flags = [*TINY_VIDEO, "--smoke", "--data", toy]
    mae_video.main([str(flag) for flag in flags])
    flags = [*TINY, "--smoke", "--data", toy, "--out", "tuned"]
    finetune.main([str(flag) for flag in flags])
    os.chdir(before)
    return folder


@pytest.fixture
def pretrained(made, tmp_path):
    """A copy of it: runs/mae_video and tuned/ in the working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_what_is_reported_is_the_last_model_which_can_be_tested_again(pretrained, run, toy):
    text = run(finetune, *TINY, "--data", toy)
    assert "tensors used" in text
    last = r"done: finetune: top-1 [\d.]+% \(most frequent class 16.7%\) after .*see runs/finetune"
    assert re.search(last, text)
    folder = pretrained / "runs/finetune"
    results = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader(open(folder / "predictions.csv")))
    assert len(rows) == results["files"] == 24 and {"path", "label", "class1", "score5"} <= set(rows[0])
    assert np.isclose(np.mean([r["class1"] == r["label"] for r in rows]), results["top1"])
    assert (folder / "confusion.png").exists() and (folder / "loss.png").exists()
    again = ["--eval-only", "--clips", 1, "--workers", 0, "--out", "e", "--data", toy]
    text = run(finetune, *again, "--init", "runs/finetune/checkpoint.pt")
    assert "left over, as expected: nothing" in text
    assert json.loads((pretrained / "e/results.json").read_text())["top1"] == results["top1"]
    assert (pretrained / "e/predictions.csv").read_text() == (folder / "predictions.csv").read_text()

    text = run(finetune, "--predict", rows[4]["path"], "--clips", 1)  # the default run is where it looks
    shown = re.findall(r"^ *([\d.]+)%  (\w+)$", text, re.M)
    assert [name for _, name in shown] == [rows[4][f"class{k}"] for k in range(1, 6)]
    for k, (p, _) in enumerate(shown, 1):  # as the test said of the same file
        assert abs(float(p) / 100 - float(rows[4][f"score{k}"])) < 6e-4


@pytest.mark.parametrize("mode", ["scratch", "linear", "knn"])
def test_the_other_modes_run(pretrained, run, toy, mode):
    text = run(finetune, *TINY, "--mode", mode, "--out", mode, "--data", toy)
    assert re.search(r"done: .*top-1", text) and (pretrained / mode / "predictions.csv").exists()
    assert (pretrained / "knn/neighbours.png").exists() == (mode == "knn")
    if mode == "scratch":
        assert "random weights" in text
        again = ["--eval-only", "--clips", 1, "--workers", 0, "--out", "e", "--data", toy]
        run(finetune, *again, "--init", "scratch/checkpoint.pt")  # not the network it began with
        tables = [(pretrained / name / "predictions.csv").read_text() for name in ("e", "scratch")]
        assert tables[0] == tables[1]


def test_features_are_saved_of_every_file_that_can_be_read(pretrained, run, toy):
    (pretrained / "videos").mkdir()
    (pretrained / "videos/a.mp4").write_bytes(b"no video")
    for i, path in enumerate(sorted((toy / "videos").rglob("*.mp4"))[:3]):
        (pretrained / f"videos/b{i}.mp4").symlink_to(path)
    flags = ["--mode", "features", "--workers", 0, "--out", "f"]
    text = run(finetune, *flags, "--data", "videos")
    assert "videos/a.mp4: broken, left out" in text and "train_features (2, 24)" in text
    with np.load(pretrained / "f/features.npz") as f:
        assert f["test_features"].shape == (1, 24) and len(f["train_labels"]) == len(f["train_paths"]) == 2
        assert np.isfinite(f["train_features"]).all() and f["train_features"].std() > 0


def test_a_classifier_that_was_not_finished_resumes_from_its_joint_table(run, toy, tmp_path):
    model = MAEST(16, 112, 2, 8, (32, 1, 2), (16, 1, 2), separable=False, cls=False)
    torch.save({"model": model.state_dict()}, tmp_path / "joint.pt")
    flags = ["--data", toy, "--frames", 4, "--stride", 2, "--img-size", 16, "--init", "joint.pt"]
    run(finetune, *TINY, *flags, "--out", "j")
    text = run(finetune, "--resume", "--out", "j")
    assert "random weights" not in text and "done: finetune: top-1" in text


def test_a_classifier_is_tested_on_the_fold_it_was_trained_on(pretrained, run, toy):
    run(finetune, *TINY, "--smoke", "--data", toy, "--fold", 2, "--out", "two")
    again = ["--eval-only", "--workers", 0, "--data", toy, "--init", "two/checkpoint.pt", "--out", "e"]
    run(finetune, *again)
    rows = list(csv.DictReader(open(pretrained / "e/predictions.csv")))
    assert {Path(r["path"]).name.split("_")[2] for r in rows} == {"g03"}


def test_a_start_that_has_seen_another_fold_is_named(pretrained, run, toy):
    flags = [*TINY, "--smoke", "--data", toy, "--fold", 2]
    assert "has seen fold 1, and with it tests of fold 2" in run(finetune, *flags, "--out", "a")


def test_without_a_pretrained_run_it_says_which_script_makes_one(refused, toy):
    text = refused(finetune, *TINY, "--data", toy)
    assert "no checkpoint runs/mae_video/checkpoint.pt: python mae_video.py makes it" in text


def test_another_number_of_classes_or_files_is_another_run(pretrained, toy, run, refused):
    for kind in (toy / "videos").glob("[A-Z]*"):
        shutil.copytree(kind, pretrained / "own" / kind.name)
    run(finetune, *TINY, "--data", "own", "--smoke", "--out", "f")
    kind = sorted((pretrained / "own").iterdir())[0]
    kind.rename(kind.with_name("zzz"))  # as many classes and files, other labels
    assert "is not the data of f" in refused(finetune, "--resume", "--out", "f")


def test_a_classifier_is_not_tested_on_classes_of_other_names(pretrained, toy, refused):
    for i, folder in enumerate(sorted((toy / "videos").glob("[A-Z]*"))):
        (pretrained / "other").mkdir(exist_ok=True)
        (pretrained / f"other/class{i}").symlink_to(folder)
    flags = ["--eval-only", "--init", "tuned/checkpoint.pt", "--data", "other", "--out", "e"]
    assert "other has other classes than tuned/checkpoint.pt" in refused(finetune, *flags)


def test_names_that_are_no_text_are_written_as_they_are_and_no_formula(pretrained, toy, run):
    videos = sorted((toy / "videos").rglob("*_c01.mp4"))[:8]
    for i, path in enumerate(videos):
        folder = (b"a", b"=cmd")[i % 2]
        split = b"train" if i < 4 else b"val"
        name = pretrained / os.fsdecode(b"odd/%s/%s/caf\xe9_%d.mp4" % (split, folder, i))
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(path)
    flags = ["--data", "odd", "--mode", "knn", "--workers", 0, "--out", "o"]
    run(finetune, *flags)
    table = (pretrained / "o/predictions.csv").read_bytes()
    assert table.count(b"caf\xe9") == 4 and b",'=cmd" in table and b",=cmd" not in table


def test_a_full_disk_leaves_the_older_results(pretrained, toy, run, refused):
    flags = ["--data", toy, "--mode", "knn", "--workers", 0, "--out", "o"]
    run(finetune, *flags)
    before = (pretrained / "o/results.json").read_bytes()
    (pretrained / f"o/.{os.getpid()}-results.json").symlink_to("/dev/full")
    assert "No space left on device: 'o/results.json'" in refused(finetune, *flags)
    assert (pretrained / "o/results.json").read_bytes() == before


@pytest.mark.parametrize("flags, message", [
    (["--mode", "knn"], "no checkpoint runs/mae_video/checkpoint.pt"),
    (["--eval-only"], "no checkpoint runs/finetune/checkpoint.pt"),
    (["--init", "no.pth"], "no checkpoint no.pth"),
    (["--mode", "scratch", "--img-size", 60], "60 is not a multiple of 8: 56 and 64 are"),
    (["--mode", "scratch", "--frames", 7], "clip length 7"),
    (["--mode", "scratch", "--batch", 6, "--repeat", 4], "multiple of 4"),
    (["--mode", "scratch", "--batch", 1000], "do not fill one update"),
    (["--mode", "tune"], "invalid choice"),
    (["--mixupp", 1], "unrecognized arguments: --mixupp"),
    (["--mode", "scratch", "--model", "multimae", "--inputs", "rgb,flow"], "use any of rgb,depth,semseg"),
    (["--mode", "scratch", "--model", "multimae", "--inputs", "depth", "--dense", "depth"], "and other --inputs"),
])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(finetune, "--data", toy, "--workers", 0, *flags)


def test_files_that_are_no_classifier_or_of_another_shape_are_refused(pretrained, refused, toy):
    init = ["--data", toy, "--init", "runs/mae_video/checkpoint.pt"]
    assert "--size tiny: " in refused(finetune, *init, "--size", "tiny")
    assert "--patch 4: " in refused(finetune, *init, "--patch", 4)
    assert "--model mae_st: " in refused(finetune, *init, "--model", "mae_st")
    assert "holds an encoder, no classifier" in refused(finetune, *init, "--eval-only")
    assert "holds a run" in refused(finetune, "--data", toy, "--mode", "knn", "--out", "tuned", *init[2:])
    assert "is no file that ends in .avi" in refused(finetune, "--predict", "toy", "--out", "tuned")
    assert "is no file that ends in .avi" in refused(finetune, "--predict", "no.mp4", "--out", "tuned")


@pytest.mark.parametrize("train, val, message", [
    ([0, 1, 2], [0, 1, 3], "labels beyond the 3 classes"),
    ([0, 2, 2], [0, 1, 2], "1 of 3 classes have no training file, e.g. 1"),
    ([0, 0, 0], [0, 0, 0], "has one class or none: 0"),
])
def test_labels_that_cannot_be_learnt_from_are_named(refused, toy, tmp_path, train, val, message):
    videos = sorted((toy / "videos").rglob("*_g01_c01.mp4"))
    for name, labels in (("train.csv", train), ("val.csv", val)):
        lines = [f"{p} {i}\n" for p, i in zip(videos, labels)]
        (tmp_path / name).write_text("".join(lines))
    assert message in refused(finetune, "--data", "train.csv", "--mode", "scratch", "--workers", 0)


def test_scratch_takes_sizes_from_a_file_and_from_flags_but_no_weights(pretrained, run, toy):
    init = ["--init", "runs/mae_video/checkpoint.pt", "--mode", "scratch", "--data", toy]
    text = run(finetune, *TINY, *init, "--smoke", "--size", "32x1x2", "--out", "s")
    state = torch.load(pretrained / "s/checkpoint.pt", weights_only=True)
    assert "random weights" in text and state["config"]["frames"] == 4  # of the file
    assert state["model"]["encoder.blocks.0.norm1.weight"].shape == (32,)


def test_a_probe_has_its_own_rate_and_no_augmentation_whatever_the_preset(pretrained, toy, monkeypatch):
    def stop(model, dataset, test_files, cfg):
        raise Caught(cfg, dataset)

    monkeypatch.chdir(pretrained)
    monkeypatch.setattr(finetune, "train_classifier", stop)
    flags = ["--preset", "ucf101", "--data", str(toy), "--init", "runs/mae_video/checkpoint.pt"]
    with pytest.raises(Caught) as caught:
        finetune.main([*flags, "--mode", "linear"])
    cfg, dataset = caught.value.args
    assert (cfg.lr, cfg.mixup, cfg.erase, cfg.clips) == (100.0, 0, 0, 5)
    assert not isinstance(dataset, finetune.Augmented)
    with pytest.raises(Caught) as caught:
        finetune.main(flags)
    assert (caught.value.args[0].lr, caught.value.args[0].mixup) == (1e-3, 0.8)
