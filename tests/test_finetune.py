import contextlib
import csv
import functools
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import data
import finetune
import mae_video
from conftest import TINY_VIDEO
from finetune import Classifier, Config
from layouts import huggingface, official_mae, official_omni, official_videomae
from mae_image import MAE
from mae_video import MAEST, VideoMAE
from omni import OmniMAE

TINY = ["--epochs", 2, "--warmup", 1, "--batch", 12, "--workers", 0, "--log-every", 1, "--clips", 1,
        "--pictures", 1]
TEST = ["--eval-only", "--clips", 1, "--workers", 0, "--out", "e", "--init"]


def tiny(kind=VideoMAE, **options):
    torch.manual_seed(0)
    shape = (32, 8) if kind is MAE else (8, 32, 2, 8)
    return Classifier(kind(*shape, (32, 3, 4), (16, 1, 2)), 5, **options)


def sample(kind, frames=8, size=(32, 32)):
    return torch.randn(2, 3, *size) if kind is MAE else torch.randn(2, 3, frames, *size)


def of_views(**options):
    return Config(frames=8, stride=1, sampling="dense", img_size="32", device="cpu", **options)


def test_drop_path_skips_whole_samples_in_training_more_of_them_in_deeper_blocks():
    blocks, x = tiny(drop_path=0.4).encoder.blocks.train(), torch.ones(20000, 1, 4)
    assert np.allclose([b.drop_path for b in blocks], [0, 0.2, 0.4])
    y = blocks[-1].branch(x, None)
    assert set(y.flatten().tolist()) == {0.0, float(torch.tensor(1.0) / 0.6)}
    assert (y == y[:, :, :1]).all() and abs(y.mean().item() - 1) < 0.03  # 4 standard errors
    assert torch.equal(blocks.eval()[-1].branch(x, None), x)


@pytest.mark.parametrize("kind", [VideoMAE, MAEST, MAE])
def test_other_sizes_interpolate_every_table(kind):
    model, grid = tiny(kind), (1 if kind is MAE else 8, 6, 5)
    finetune.change_grid(model.encoder, grid)
    assert model(sample(kind, 16, (48, 40))).shape == (2, 5)
    assert not [k for k in model.state_dict() if "decoder" in k or "mask_token" in k]
    if kind is not MAEST:
        table = tiny(kind).encoder.pos_embed
        want = mae_video.resize_table(table, (4 if kind is VideoMAE else 1, 4, 4), grid)
        assert torch.equal(model.encoder.pos_embed, want)
        assert model.encoder.pos_embed.requires_grad == (kind is MAE)


@pytest.mark.parametrize("kind", [MAE, MAEST])
def test_a_frozen_encoder_has_no_drop_path_and_learns_nothing_at_another_size_either(kind):
    model, x = tiny(kind, frozen=True, fresh_norm=False, drop_path=0.3).train(), sample(kind)
    assert torch.equal(model.features(x), model.features(x))
    finetune.change_grid(model.encoder, (1 if kind is MAE else 4, 6, 6))
    learn = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learn == {"head.1.weight", "head.1.bias"}


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
    noise = x[changed[:, None].expand_as(x)]
    assert len(noise.unique()) > 0.9 * len(noise)  # every pixel of every frame its own


class Still(torch.utils.data.Dataset):
    cfg, repeat, paths, labels, classes = finetune.Config(), 2, ["x"], np.zeros(1), ["x"]

    def __getitem__(self, key):
        shape, generator = (2, 1, 16, 16, 3), torch.Generator().manual_seed(key[1])
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return pixels.expand(-1, 5, -1, -1, -1), key[1], []


def test_frames_of_a_clip_are_augmented_alike_and_by_epoch_and_item_alone():
    augmented, before = finetune.Augmented(Still(), 4, 9), torch.random.get_rng_state()
    x = [augmented[0, i][0] for i in range(8)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all((c == c[:, :1]).all() for c in x)
    assert any(not torch.equal(c, Still()[0, i][0]) for i, c in enumerate(x))
    assert all(torch.equal(augmented[0, i][0], c) for i, c in enumerate(x))
    assert not torch.equal(augmented[1, 3][0], x[3])


def test_a_share_is_taken_of_each_class_and_at_least_one_file_always_the_same():
    labels, names = np.repeat([0, 1, 2], [40, 10, 1]), np.array([str(i) for i in range(51)])
    files = data.Files(names, labels, list("abc"), pixels=np.arange(51)[:, None])
    few = finetune.take_share(files, 0.3, 0)
    assert np.bincount(few.labels).tolist() == [12, 3, 1] and len(set(few.paths)) == 16
    numbers = few.paths.astype(int)
    assert (labels[numbers] == few.labels).all() and (few.pixels[:, 0] == numbers).all()
    assert (few.paths == finetune.take_share(files, 0.3, 0).paths).all()
    assert (few.paths != finetune.take_share(files, 0.3, 1).paths).any()


def test_crops_lie_at_both_ends_and_in_the_middle_of_the_long_side():
    wide = np.random.default_rng(0).integers(0, 256, (2, 16, 40, 3), dtype=np.uint8)
    views = finetune.spatial_views(wide, (16, 16), 3)
    for view, left in zip(views, (0, 12, 24)):
        assert torch.equal(view, torch.from_numpy(wide[:, :, left : left + 16]))
    tall = finetune.spatial_views(wide.transpose(0, 2, 1, 3).copy(), (16, 16), 3)
    assert torch.equal(tall, views.transpose(2, 3))
    assert torch.equal(finetune.spatial_views(wide, (16, 16), 1)[0], views[1])
    low = finetune.spatial_views(wide, (8, 32), 3)  # resized to 13 x 32: too high for it
    assert low.shape == (3, 2, 8, 32, 3) and not torch.equal(low[0], low[2])


def test_views_are_answered_as_if_one_by_one_and_a_broken_file_is_left_out(toy, tmp_path, capsys):
    files = data.list_videos(toy, "val").select(np.arange(6))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    files.paths = np.array([*files.paths[:3], str(tmp_path / "broken.mp4"), *files.paths[4:]])
    cfg, model = of_views(batch=15, clips=3, crops=2, workers=0), tiny().eval()
    torch.nn.init.normal_(model.head.weight)
    views = finetune.ViewDataset(files, cfg)
    together = finetune.run_views(model, files, cfg, model.answers)
    assert together.shape == (6, 6, 5) and together[3].isnan().all()
    assert "broken.mp4: broken, left out" in capsys.readouterr().out
    for i in (0, 1, 2, 4, 5):
        singly = [model(model.encoder.normalize(v[None])).softmax(-1)[0] for v in views[i][0]]
        assert torch.allclose(together[i], torch.stack(singly), atol=1e-5)
    model.head.bias.data.fill_(float("nan"))  # not the files' fault
    with pytest.raises(ValueError, match="answers are not finite"):
        finetune.run_views(model, files, cfg, model.answers)


def test_a_worker_killed_while_testing_is_one_line(toy, monkeypatch):
    """Also while the network computes: torch's handler would raise right there."""
    files, read, model = data.list_videos(toy, "val"), finetune.ViewDataset.__getitem__, tiny()

    def kill(self, i):  # asked for after batch 0
        return os.kill(os.getpid(), signal.SIGKILL) if i == 4 else read(self, i)

    def answers(x):
        time.sleep(0.5)
        return model.answers(x)

    monkeypatch.setattr(finetune.ViewDataset, "__getitem__", kill)
    with pytest.raises(ValueError, match="the loader failed: .*(killed|exited)"):
        finetune.run_views(model, files, of_views(batch=1, clips=1, workers=1), answers)


def test_scores_are_those_of_a_loop_and_unreadable_files_are_left_out():
    p = torch.rand(40, 3, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    labels = torch.arange(40) % 6  # class 6 has no test file
    p[5] = float("nan")
    s, good = finetune.summarise(p, labels), [i for i in range(40) if i != 5]
    answer = {i: int(p[i].mean(0).argmax()) for i in good}
    right = {i: answer[i] == labels[i] for i in good}
    assert (s["files"], s["unreadable"], s["views"]) == (39, 1, 3)
    assert np.isclose(s["top1"], np.mean([right[i] for i in good]))
    views = [p[i, v].argmax() == labels[i] for i in good for v in range(3)]
    assert np.isclose(s["view_top1"], np.mean(views))
    assert np.isclose(s["top5"], np.mean([labels[i] in p[i].mean(0).topk(5).indices for i in good]))
    per_class = [np.mean([right[i] for i in good if labels[i] == c]) for c in range(6)]
    assert np.allclose((s["class_mean"], s["most_frequent"]), (np.mean(per_class), 7 / 39))
    for a, b in np.ndindex(7, 7):
        assert s["confusion"][a][b] == sum(labels[i] == a and answer[i] == b for i in good)


def test_nearest_neighbours_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(30, 8, generator=g) + 1, torch.randn(6, 8, generator=g)
    labels, mean = torch.arange(30) % 4, train.mean(0)
    votes, neighbours = finetune.nearest_neighbours(train, labels, test, 4, k=5)
    for x, vote, near in zip(test, votes, neighbours):
        cosines = [torch.cosine_similarity(x - mean, t - mean, 0).item() for t in train]
        order, want = np.argsort(cosines)[::-1][:5], torch.zeros(4)
        assert near.tolist() == order.tolist()
        for i in order:
            want[labels[i]] += np.exp(cosines[i] / 0.07)
        assert torch.allclose(vote, want / want.sum(), atol=1e-4)


# ---- pretrained files ----------------------------------------------------------------------------


class Caught(Exception):
    pass


@pytest.fixture
def stopped(toy, tmp_path, monkeypatch):
    """stopped("run_views", "--flag", value) -> with what main calls finetune.run_views."""

    def call(name, *flags):
        def stop(*arguments):
            raise Caught(*arguments)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(finetune, name, stop)
        with pytest.raises(Caught) as caught:
            finetune.main([str(flag) for flag in ("--data", toy, "--workers", 0, *flags)])
        return caught.value.args

    return call


@pytest.fixture
def built(stopped, tmp_path, capsys):
    """built(state, "--flag", value) -> the Classifier of such a file, the config, the report."""

    def call(state, *flags):
        torch.save(state, tmp_path / "x.pth")
        model, _, cfg, *_ = stopped("run_views", "--init", "x.pth", *flags)
        return model, cfg, capsys.readouterr().out

    return call


def filled(kind):
    """Every weight random, so that a mix-up cannot hide; no key bias if public files have none."""
    torch.manual_seed(3)
    shape = (112, 8) if kind is MAE else (16, 112, 2, 8)
    model = kind(*shape, (64, 2, 1), (16, 1, 2))  # 64: no file tells its heads, 1 is the guess
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1)
        if name.endswith("qkv.bias") and kind is VideoMAE:
            p.data.chunk(3)[1].zero_()
    return model.eval()


# Other layouts: test_open.py, test_golden.py
LAYOUTS = {"hf mae": (MAE, huggingface), "hf videomae": (VideoMAE, huggingface),
           "hf mae 5": (MAE, functools.partial(huggingface, new=True)),
           "omni trainer": (OmniMAE, functools.partial(official_omni, trainer=True))}


@pytest.mark.parametrize("kind, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_public_layout_gives_the_features_of_its_model(kind, layout, built):
    model, x = filled(kind), sample(kind, 16, (112, 112))
    flags = ["--model", "omni"] if kind is OmniMAE else []
    got, _, text = built(layout(model), "--mode", "features", *flags)
    assert re.search(r"\d+ tensors used; new: ", text)
    if kind is MAE:
        want = model.encode(x)[:, 0]  # after its final norm
    else:  # ours pools first and normalises then
        model.norm = torch.nn.Identity()
        want = got.norm(model.encode(x).mean(dim=1))
    assert torch.allclose(got.eval().features(x), want, atol=2e-5)


def test_a_public_classifier_is_a_place_to_start_from_and_not_tested_on_other_classes(built):
    state = {k.removeprefix("encoder."): v for k, v in official_videomae(filled(VideoMAE)).items()
             if not k.startswith(("decoder", "mask", "encoder_to", "encoder.norm"))}
    state |= {"fc_norm.weight": torch.rand(64), "fc_norm.bias": torch.rand(64),
              "head.weight": torch.randn(6, 64), "head.bias": torch.randn(6)}
    got, _, text = built({"module": state}, "--smoke", "--batch", 4)
    assert "new: head, norm" in text and (got.head.bias == 0).all()
    for damage, message in (({"head.bias": torch.zeros(4)}, "size mismatch for head.bias"),
                            ({"rope": torch.zeros(3)}, "unknown encoder.rope")):
        with pytest.raises(ValueError, match=message):
            built({"module": state | damage}, "--eval-only")


def test_a_public_linear_probe_is_tested(built):
    state = official_mae(filled(MAE))
    state |= {"head.0.running_mean": torch.randn(64), "head.0.running_var": torch.rand(64),
              "head.0.num_batches_tracked": torch.tensor(9),
              "head.1.weight": torch.randn(4, 64), "head.1.bias": torch.randn(4)}
    got, cfg, _ = built({"model": state}, "--eval-only", "--model", "mae")
    assert cfg.mode == "linear" and torch.equal(got.head[1].weight, state["head.1.weight"])
    assert got.eval()(sample(MAE, size=(112, 112))).shape == (2, 4)


# ---- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """A pretraining run of three updates, where finetune.py looks for it, and a classifier."""
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        mae_video.main([str(flag) for flag in [*TINY_VIDEO, "--smoke", "--data", toy]])
        finetune.main([str(flag) for flag in [*TINY, "--smoke", "--data", toy, "--out", "tuned"]])
    return folder


@pytest.fixture
def pretrained(made, tmp_path):
    """A copy of it: runs/mae_video and tuned/ in the working folder."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def test_what_is_reported_is_the_last_model_which_can_be_tested_again(pretrained, run, toy):
    text = run(finetune, *TINY, "--data", toy)
    last = r"done: finetune: top-1 [\d.]+% \(most frequent class 16.7%\) after .*see runs/finetune"
    assert "tensors used" in text and re.search(last, text)
    folder = pretrained / "runs/finetune"
    results = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader(open(folder / "predictions.csv")))
    assert len(rows) == results["files"] == 24
    assert np.isclose(np.mean([r["answer"] == r["label"] for r in rows]), results["top1"])
    assert (folder / "confusion.png").exists() and (folder / "loss.png").exists()
    text = run(finetune, *TEST, "runs/finetune/checkpoint.pt", "--data", toy)
    assert "new: nothing" in text
    assert json.loads((pretrained / "e/results.json").read_text())["top1"] == results["top1"]
    table = (pretrained / "e/predictions.csv").read_text()
    assert table == (folder / "predictions.csv").read_text()
    text = run(finetune, "--predict", rows[4]["path"], "--clips", 1)  # with the default run
    shown = re.findall(r"^ *([\d.]+)%  (\w+)$", text, re.M)
    assert len(shown) == 5 and shown[0][1] == rows[4]["answer"]  # as the test said of it
    assert abs(float(shown[0][0]) / 100 - float(rows[4]["score"])) < 6e-4


def test_scratch_takes_sizes_from_a_file_and_from_flags_but_no_weights(pretrained, run, toy):
    flags = ["--init", "runs/mae_video/checkpoint.pt", "--mode", "scratch", "--data", toy]
    text = run(finetune, *TINY, *flags, "--smoke", "--size", "32x1x2", "--out", "s")
    config = torch.load(pretrained / "s/checkpoint.pt", weights_only=True)["config"]
    assert "random weights" in text and config["frames"] == 4 and config["size"] == "32x1x2"


def test_odd_names_are_written_but_no_formula_and_a_full_disk_leaves_the_older_results(
        pretrained, toy, run, refused):
    for i, path in enumerate(sorted((toy / "videos").rglob("*_c01.mp4"))[:8]):
        place = (b"train", b"val")[i // 4], (b"a", b"=cmd")[i % 2], i
        name = pretrained / os.fsdecode(b"odd/%s/%s/caf\xe9_%d.mp4" % place)
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(path)
    flags = ["--data", "odd", "--mode", "knn", "--workers", 0, "--out", "o"]
    assert "done: top-1" in run(finetune, *flags) and (pretrained / "o/neighbours.png").exists()
    table = (pretrained / "o/predictions.csv").read_bytes()
    assert table.count(b"caf\xe9") == 4 and b",'=cmd" in table and b",=cmd" not in table
    before = (pretrained / "o/results.json").read_bytes()
    (pretrained / f"o/.{os.getpid()}-results.json").symlink_to("/dev/full")
    assert "No space left on device: 'o/results.json'" in refused(finetune, *flags)
    assert (pretrained / "o/results.json").read_bytes() == before


def test_features_are_saved_of_every_file_that_can_be_read(pretrained, run, toy):
    shutil.copytree(toy / "videos/Wheel", pretrained / "videos")
    (pretrained / "videos/a.mp4").write_bytes(b"no video")
    text = run(finetune, "--mode", "features", "--workers", 0, "--out", "f", "--data", "videos")
    assert "videos/a.mp4: broken, left out" in text
    assert "15 training and 1 test files, vectors of 24" in text
    with np.load(pretrained / "f/features.npz") as f:
        assert f["test_features"].shape == (1, 24)
        assert len(f["train_labels"]) == len(f["train_paths"]) == 15
        assert np.isfinite(f["train_features"]).all() and f["train_features"].std() > 0


def test_a_classifier_is_tested_on_its_fold_and_one_of_another_fold_is_named(pretrained, run, toy):
    text = run(finetune, *TINY, "--smoke", "--data", toy, "--fold", 2, "--out", "two")
    assert "has seen fold 1, and with it tests of fold 2" in text
    run(finetune, *TEST, "two/checkpoint.pt", "--data", toy)
    paths = re.findall(r"/\w+_(g\d\d)_c\d\d.mp4,", (pretrained / "e/predictions.csv").read_text())
    assert len(paths) == 24 and set(paths) == {"g03"}


@pytest.mark.parametrize("flags, message", [
    ([], "no checkpoint runs/mae_video/checkpoint.pt: python mae_video.py makes it"),
    (["--eval-only"], "no checkpoint runs/finetune/checkpoint.pt"),
    (["--mode", "scratch", "--mixup", 0.8, "--model", "multimae"], "--model multimae takes no"),
    (["--mode", "scratch", "--dense", "semseg"], "--dense semseg takes --model multimae"),
    (["--mode", "scratch", "--dense", "semseg", "--model", "multimae", "--inputs", "rgb,semseg"],
     "and other --inputs")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(finetune, "--data", toy, "--workers", 0, *flags)


def test_files_that_do_not_fit_are_refused_and_no_run_is_overwritten(pretrained, run, refused, toy):
    kinds = sorted((toy / "videos").glob("[A-Z]*"))
    for name, kind in zip(("one/a", "other/a", "other/b"), kinds):
        shutil.copytree(kind, pretrained / name)
    flags = ["--eval-only", "--init", "tuned/checkpoint.pt", "--data", "other", "--out", "e"]
    assert "other has other classes than tuned/checkpoint.pt" in refused(finetune, *flags)
    init = ["--data", toy, "--init", "runs/mae_video/checkpoint.pt"]
    assert "--model mae_st: " in refused(finetune, *init, "--model", "mae_st")
    assert "holds an encoder, no classifier" in refused(finetune, *init, "--eval-only")
    assert "holds a run" in refused(finetune, *init, "--mode", "knn", "--out", "tuned")
    assert "ends in .avi" in refused(finetune, "--predict", "no.mp4", "--out", "tuned")
    assert "one has one class" in refused(finetune, "--mode", "scratch", "--data", "one")
    run(finetune, *TINY, "--data", "other", "--smoke", "--out", "f")
    (pretrained / "other/a").rename(pretrained / "other/z")  # as many files and classes
    assert "is not the data of f" in refused(finetune, "--resume", "--out", "f")


def test_a_probe_has_its_own_rate_and_no_augmentation_whatever_the_preset(pretrained, stopped):
    flags = ["train_classifier", "--preset", "ucf101", "--init", "runs/mae_video/checkpoint.pt"]
    _, dataset, _, cfg = stopped(*flags, "--mode", "linear")
    assert (cfg.lr, cfg.mixup, cfg.erase, cfg.clips) == (100.0, 0, 0, 5)
    assert not isinstance(dataset, finetune.Augmented)
    _, dataset, _, cfg = stopped(*flags)
    assert (cfg.lr, cfg.mixup) == (1e-3, 0.8) and isinstance(dataset, finetune.Augmented)
