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
import mae_image
import mae_video
import omni
from conftest import TINY_VIDEO
from finetune import Classifier, Config
from layouts import huggingface, official_mae, official_omni, official_videomae
from mae_image import MAE
from mae_video import MAEST, ClipDataset, VideoMAE
from test_data import waves, write_clip

TINY = "--epochs 2 --warmup 1 --batch 12 --workers 0 --log-every 1 --clips 1 --pictures 1".split()
ENCODER = ["--init", "runs/mae_video/checkpoint.pt"]
IMAGE, CLIP, SIZES = (16, 8), (16, 16, 2, 8), ((64, 2, 1), (16, 1, 1))
VIEWS = dict(frames=8, stride=1, sampling="dense", img_size="32", device="cpu")


def tiny(kind=VideoMAE, **options):
    torch.manual_seed(0)
    shape = (32, 8) if kind is MAE else (8, 32, 2, 8)
    return Classifier(kind(*shape, (32, 3, 4), (16, 1, 2)), 5, **options)


def test_drop_path_skips_whole_samples_in_training_more_of_them_in_deeper_blocks():
    blocks, x = tiny(drop_path=0.4).encoder.blocks.train(), torch.ones(20000, 1, 4)
    assert np.allclose([b.drop_path for b in blocks], [0, 0.2, 0.4])
    y = blocks[-1].branch(x, None)
    assert set(y.flatten().tolist()) == {0.0, float(torch.tensor(1.0) / 0.6)}
    assert (y == y[:, :, :1]).all() and abs(y.mean().item() - 1) < 0.03  # 4 standard errors
    assert torch.equal(blocks.eval()[-1].branch(x, None), x)
    assert not any(b.drop_path for b in tiny(frozen=True, drop_path=0.4).encoder.blocks)


@pytest.mark.parametrize("kind", [VideoMAE, MAEST, MAE])
def test_other_sizes_interpolate_every_table(kind):
    model, grid = tiny(kind), (1 if kind is MAE else 8, 6, 5)
    finetune.change_grid(model.encoder, grid)
    assert model(torch.randn(2, 3, *[16] * (kind is not MAE), 48, 40)).shape == (2, 5)
    if kind is not MAEST:
        table = tiny(kind).encoder.pos_embed
        want = mae_video.resize_table(table, (4 if kind is VideoMAE else 1, 4, 4), grid)
        assert torch.equal(model.encoder.pos_embed, want)
        assert model.encoder.pos_embed.requires_grad == (kind is MAE)


def test_all_frames_are_mixed_and_erased_alike_and_clips_of_one_video_rarely_with_each_other():
    still = torch.randn(6, 3, 1, 16, 16).repeat(1, 1, 4, 1, 1)
    for alphas in (0.8, 0), (0, 1.0):
        x, soft = finetune.mix(still, torch.arange(6), 6, *alphas)
        assert (x == x[:, :, :1]).all() and not torch.equal(x, still)
        assert torch.allclose(soft.sum(dim=1), torch.ones(6)) and (soft.max(dim=1).values < 1).any()
    twins, x = torch.arange(8).repeat_interleave(2), torch.randn(16, 3, 1, 16, 16)
    soft = torch.stack([finetune.mix(x, twins, 8, 0.8, 0)[1] for _ in range(50)])
    assert (soft.max(dim=2).values == 1).float().mean() < 0.15
    x = finetune.erase(still, 1.0)
    changed = (x != still).any(dim=1)  # (6, 4, 16, 16)
    assert (changed == changed[:, :1]).all() and 0 < changed.float().mean() < 0.5
    noise = x[changed[:, None].expand_as(x)]
    assert len(noise.unique()) > 0.9 * len(noise)  # every pixel of every frame its own


def test_frames_of_a_clip_are_augmented_alike_and_by_epoch_and_item_alone(tmp_path):
    path = str(write_clip(tmp_path / "x.mp4", frames=waves(1)))  # all frames of a clip are the same
    cfg = Config(img_size="16", rand_ops=4, rand_augment=9)
    plain = ClipDataset(data.Files([path] * 8, [0] * 8, ["x"]), cfg, False)
    augmented, before = finetune.Augmented(plain, cfg), torch.random.get_rng_state()
    x = [augmented[0, i][0] for i in range(8)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all((c == c[:, :1]).all() for c in x)
    assert any(not torch.equal(c, plain[0, i][0]) for i, c in enumerate(x))
    assert all(torch.equal(augmented[0, i][0], c) for i, c in enumerate(x))
    assert not torch.equal(augmented[1, 3][0], x[3]) and not torch.equal(x[2], x[3])


def test_a_share_is_taken_of_each_class_and_at_least_one_file_always_the_same():
    labels, numbers = np.repeat([0, 1, 2], [40, 10, 1]), np.arange(51)
    files = data.Files(numbers.astype(str), labels, list("abc"), pixels=numbers)
    few, again, other = (finetune.take_share(files, 0.3, seed) for seed in (0, 0, 1))
    assert np.bincount(few.labels).tolist() == [12, 3, 1] and len(set(few.paths)) == 16
    assert (labels[few.pixels] == few.labels).all() and (few.pixels == few.paths.astype(int)).all()
    assert (few.paths == again.paths).all() and (few.paths != other.paths).any()


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


def test_views_are_answered_as_if_one_by_one_and_a_broken_file_is_left_out(toy, capsys):
    files = data.list_videos(toy, "val").select(np.arange(6))
    files.paths[3] = "gone.mp4"
    cfg, model = Config(**VIEWS, batch=15, clips=3, crops=2, workers=0), tiny().eval()
    torch.nn.init.normal_(model.head.weight)
    together, read = finetune.run_views(model, files, cfg, model.answers)
    text, good = capsys.readouterr().out, (0, 1, 2, 4, 5)
    assert together.shape == (5, 6, 5) and (read.paths == files.paths[[*good]]).all()
    assert "gone.mp4: broken, left out" in text and "1 unreadable files are left out" in text
    for answers, i in zip(together, good):
        views = finetune.ViewDataset(files, cfg, False)[i][0]
        singly = [model(model.encoder.normalize(v[None])).softmax(-1)[0] for v in views]
        assert torch.allclose(answers, torch.stack(singly), atol=1e-5)
    model.head.bias.data.fill_(float("nan"))  # not the files' fault
    with pytest.raises(ValueError, match="answers are not finite"):
        finetune.run_views(model, files, cfg, model.answers)


def test_a_worker_killed_while_testing_is_one_line(toy, monkeypatch):
    files, read, model = data.list_videos(toy, "val"), finetune.ViewDataset.__getitem__, tiny()
    def kill(self, i):  # asked for after batch 0
        return os.kill(os.getpid(), signal.SIGKILL) if i == 4 else read(self, i)
    def answers(x):
        time.sleep(0.5)  # torch's handler would raise right here
        return model.answers(x)
    monkeypatch.setattr(finetune.ViewDataset, "__getitem__", kill)
    with pytest.raises(ValueError, match="the loader failed: .*(killed|exited)"):
        finetune.run_views(model, files, Config(**VIEWS, batch=1, clips=1, workers=1), answers)


def test_scores_are_those_of_a_loop():
    p = torch.rand(40, 3, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    labels, good = torch.arange(40) % 6, range(40)  # class 6 has no test file
    s, answer = finetune.summarise(p, labels), [int(p[i].mean(0).argmax()) for i in good]
    right = [answer[i] == labels[i] for i in good]
    assert (s["files"], s["views"]) == (40, 3) and np.isclose(s["top1"], np.mean(right))
    views = [p[i, v].argmax() == labels[i] for i in good for v in range(3)]
    assert np.isclose(s["view_top1"], np.mean(views))
    assert np.isclose(s["top5"], np.mean([labels[i] in p[i].mean(0).topk(5).indices for i in good]))
    per_class = [np.mean([right[i] for i in good if labels[i] == c]) for c in range(6)]
    assert np.allclose((s["class_mean"], s["most_frequent"]), (np.mean(per_class), 7 / 40))
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


@pytest.mark.parametrize("module, model, layout", [  # others: test_open.py, test_golden.py
    (mae_image, MAE(*IMAGE, *SIZES), huggingface),
    (mae_image, MAE(*IMAGE, *SIZES), functools.partial(huggingface, new=True)),
    (mae_video, VideoMAE(*CLIP, *SIZES), huggingface),
    (omni, omni.OmniMAE(*CLIP, *SIZES), functools.partial(official_omni, trainer=True))])
def test_public_layouts_give_the_weights_of_a_model(module, model, layout, toy, run, tmp_path):
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p)  # so that a mix-up cannot hide
        if name.endswith("qkv.bias") and module is mae_video:
            p.data.chunk(3)[1].zero_()  # public files have no key bias
    torch.save(layout(model), tmp_path / "x.pth")
    flags = ["--data", toy, *["--images", toy] * (module is omni), "--img-size", 16, "--out", "x"]
    text = run(module, "--init", "x.pth", *flags, "--epochs", 0, "--workers", 0)
    found = torch.load(tmp_path / "x/checkpoint.pt", weights_only=True)["model"]
    assert f"{len(found)} tensors used, 0 start new; guesses" in text
    assert all(torch.equal(found[name], x) for name, x in model.state_dict().items())


def test_public_classifiers_are_tested_or_a_place_to_start_from(toy, run, refused, tmp_path):
    flags = ["--init", "x.pth", "--data", toy, "--img-size", 16, "--workers", 0, "--batch", 4]
    state = {k.removeprefix("encoder."): x
             for k, x in official_videomae(VideoMAE(*CLIP, *SIZES)).items()
             if not k.startswith(("decoder", "mask", "encoder_to", "encoder.norm"))}
    state |= {"fc_norm.weight": torch.rand(64), "fc_norm.bias": torch.rand(64),
              "head.weight": torch.randn(6, 64), "head.bias": torch.randn(6)}
    torch.save({"module": state}, tmp_path / "x.pth")
    assert "new: nothing" in run(finetune, *flags, "--eval-only")
    assert "new: head, norm" in run(finetune, *flags, "--smoke", "--lr", 0)
    found = torch.load(tmp_path / "runs/finetune/checkpoint.pt", weights_only=True)["model"]
    assert not found["head.bias"].any() and (found["norm.weight"] == 1).all()
    torch.save({"module": state | {"head.bias": torch.zeros(4)}}, tmp_path / "x.pth")
    assert "size mismatch for head.bias" in refused(finetune, *flags, "--eval-only", "--out", "e")
    probe = {"head.0.running_mean": torch.randn(64), "head.0.running_var": torch.rand(64),
             "head.0.num_batches_tracked": torch.tensor(9),
             "head.1.weight": torch.randn(4, 64), "head.1.bias": torch.randn(4)}
    torch.save({"model": official_mae(MAE(*IMAGE, *SIZES)) | probe}, tmp_path / "x.pth")
    assert "new: nothing" in run(finetune, *flags, "--eval-only", "--out", "e")
    assert json.loads((tmp_path / "e/results.json").read_text())["mode"] == "linear"


@pytest.fixture
def pretrained(toy, run, tmp_path):
    """The working folder, with a run of three updates where finetune.py looks for one."""
    run(mae_video, *TINY_VIDEO, "--smoke", "--data", toy)
    return tmp_path


def test_what_is_reported_is_the_last_model_which_can_be_tested_again(pretrained, run, toy):
    text, folder = run(finetune, *TINY, "--data", toy), pretrained / "runs/finetune"
    assert "tensors used" in text and re.search(r"done: .*top-1 .*16.7%\).* runs/finetune", text)
    results = json.loads((folder / "results.json").read_text())
    table = (folder / "predictions.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == results["files"] == 24 and (folder / "confusion.png").exists()
    assert np.isclose(np.mean([r["answer"] == r["label"] for r in rows]), results["top1"])
    flags = ["--init", "runs/finetune/checkpoint.pt", "--data", toy, "--clips", 1, "--out", "e"]
    assert "new: nothing" in run(finetune, "--eval-only", *flags)
    assert (pretrained / "e/predictions.csv").read_text() == table
    text = run(finetune, "--predict", rows[4]["path"], "--clips", 1)  # with the default run
    shown = re.findall(r"^ *([\d.]+)%  (\w+)$", text, re.M)
    assert len(shown) == 5 and shown[0][1] == rows[4]["answer"]  # as the test said of it
    assert abs(float(shown[0][0]) / 100 - float(rows[4]["score"])) < 6e-4


def test_each_mode_has_its_settings_and_the_fold_of_training_is_tested(pretrained, run, toy):
    flags = ["--data", toy, *ENCODER, "--preset", "ucf101", "--smoke", "--workers", 0, "--batch", 4]
    for mode, want in ("linear", [100.0, 0, 0, 0, 5]), ("finetune", [1e-3, 0.8, 0.25, 7, 5]):
        run(finetune, *flags, "--mode", mode, "--out", mode)
        config = torch.load(pretrained / mode / "checkpoint.pt", weights_only=True)["config"]
        assert [config[k] for k in ("lr", "mixup", "erase", "rand_augment", "clips")] == want
    flags = ["--data", toy, *ENCODER, "--mode", "scratch", "--fold", 2, "--smoke", "--out", "s"]
    text = run(finetune, *TINY, *flags)  # takes sizes, but no weights
    assert " tensors used" not in text and "has seen fold 1, and with it tests of fold 2" in text
    config = torch.load(pretrained / "s/checkpoint.pt", weights_only=True)["config"]
    assert config["frames"] == 4 and config["size"] == "24x1x2"
    run(finetune, "--eval-only", "--init", "s/checkpoint.pt", "--data", toy, "--out", "e")
    paths = re.findall(r"/\w+_(g\d\d)_c\d\d.mp4,", (pretrained / "e/predictions.csv").read_text())
    assert len(paths) == 24 and set(paths) == {"g03"}


def test_odd_names_are_written_and_a_full_disk_leaves_old_results(pretrained, toy, run, refused):
    for i, path in enumerate([*sorted((toy / "videos").rglob("*_c01.mp4"))[:8], __file__]):
        place = (b"train", b"val")[i // 4 % 2], (b"a", b"=cmd")[i % 2], i
        name = pretrained / os.fsdecode(b"odd/%s/%s/caf\xe9_%d.mp4" % place)
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(path)
    flags, out = ["--data", "odd", "--workers", 0, "--out", "o", "--mode"], pretrained / "o"
    assert "4 training and 4 test files, vectors of 24" in run(finetune, *flags, "features")
    with np.load(out / "features.npz") as f:
        assert f["test_features"].shape == f["train_features"].shape == (4, 24)
        assert len(f["train_labels"]) == len(f["train_paths"]) == 4
        assert np.isfinite(f["train_features"]).all() and f["train_features"].std() > 0
    text = run(finetune, *flags, "knn")
    assert "caf\\udce9_8.mp4: broken, left out" in text and "done: top-1" in text
    table = (out / "predictions.csv").read_bytes()
    assert table.count(b"caf\xe9") == 4 and b",'=cmd" in table and b",=cmd" not in table
    before = (out / "results.json").read_bytes()
    (out / f".{os.getpid()}-results.json").symlink_to("/dev/full")
    assert "No space left on device" in refused(finetune, *flags, "knn")
    assert (out / "results.json").read_bytes() == before and (out / "neighbours.png").exists()


def test_files_that_do_not_fit_are_refused_and_no_run_is_overwritten(pretrained, run, refused, toy):
    for name, kind in zip(("one/a", "other/a", "other/b"), sorted((toy / "videos").glob("[A-Z]*"))):
        shutil.copytree(kind, pretrained / name)
    run(finetune, *TINY, "--data", "other", "--smoke", "--out", "f")
    scratch, multimae = ["--mode", "scratch"], ["--mode", "scratch", "--model", "multimae"]
    for flags, message in (
            (["--eval-only", "--init", "f/checkpoint.pt"], "other classes than f/checkpoint.pt"),
            (["--eval-only"], "runs/finetune/checkpoint.pt is no file. A run of SCRIPT.py"),
            ([*ENCODER, "--model", "mae_st"], "--model mae_st: "),
            ([*ENCODER, "--eval-only"], "holds an encoder, no classifier"),
            ([*ENCODER, "--mode", "knn", "--out", "f"], "holds a run"),
            (["--predict", "no.mp4", "--out", "f"], "ends in .avi"),
            ([*scratch, "--data", "one"], "one has one class"),
            ([*multimae, "--mixup", 0.8], "--model multimae takes no"),
            ([*multimae, "--dense", "semseg", "--inputs", "rgb,semseg"], "and other --inputs")):
        assert message in refused(finetune, "--data", toy, *flags)
    (pretrained / "other/a").rename(pretrained / "other/z")  # as many files and classes
    assert "is not the data of f" in refused(finetune, "--resume", "--out", "f")
