import itertools
import json
import math
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import finetune
import multimae
from mae_image import to_unit_range
from masking import dirichlet_mask
from multimae import MODALITIES, STRIDE, MultiMAE, masked_mean

TINY = ["--img-size", "16x32", "--patch", 8, "--size", "16x1x2", "--decoder", "16x1x2",
        "--class-width", 4, "--batch", 16, "--epochs", 2, "--warmup", 1, "--workers", 0,
        "--log-every", 1, "--pictures", 1, "--visible", 0.3]


def tiny(**options):
    torch.manual_seed(0)
    return MultiMAE((16, 32), 8, (24, 1, 2), (16, 1, 2), classes=6, class_width=4, **options)


def inputs(B=3, H=16, W=32, channels=3):
    g = torch.Generator().manual_seed(0)
    return {"rgb": torch.randn(B, channels, H, W, generator=g),
            "depth": torch.randn(B, 1, H, W, generator=g),
            "semseg": torch.randint(0, 6, (B, H // 4, W // 4), generator=g)}


def masks():
    return dirichlet_mask(3, [8, 8, 8], 8, torch.Generator().manual_seed(0))


def block(m, x, token):
    """The pixels of one token (2 x 4 of them) of one sample, (C, p, p) or (p, p)."""
    p = 2 if m == "semseg" else 8
    r, c = token // 4, token % 4
    return x[..., p * r : p * r + p, p * c : p * c + p]


# ---- losses and pictures -------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {"flow": inputs()["rgb"]}, {"depth": inputs(H=32, W=16)["depth"]}])  # as many patches, turned
def test_wrong_inputs_are_refused(change):
    with pytest.raises(ValueError, match="takes any of rgb, depth, semseg, all of one size"):
        tiny()(inputs() | change, masks())


@pytest.mark.parametrize("channels, void", [(1, True), (3, False), (4, True)])
def test_losses_are_those_of_a_loop_over_samples_and_hidden_pixels(channels, void):
    model, x, hide = tiny(channels=channels, ignore=255), inputs(channels=channels), masks()
    hide[0] = torch.arange(24) >= 8  # of this sample nothing counts in RGB
    if void:
        x["semseg"][x["semseg"] == 5] = 255
    loss, preds = model(x, hide)
    losses, rows = model.task_losses(preds, x, x, hide), {task: [] for task in model.tasks}
    for task, b in itertools.product(model.tasks, range(3)):
        m, errors = task.removeprefix("norm_"), []
        places = hide[b].reshape(3, 8)[MODALITIES.index(m)].nonzero()
        for n in places.flatten().tolist():
            pred, want = preds[task][b, n], block(m, x[m][b], n)
            if task == "norm_rgb":
                want = (want - want.mean()) / (want.var() + 1e-6).sqrt()
            if task == "semseg":
                pred = pred.reshape(6, 4).log_softmax(dim=0)
                errors += [-pred[c, k] for k, c in enumerate(want.flatten()) if c != 255]
            else:
                error = pred - want.flatten()  # in the order channel, row, column
                errors += [*(error.abs() if task == "depth" else error.square())]
        rows[task] += [torch.stack(errors).mean()] if errors else []
    assert [len(rows[task]) for task in model.tasks] == [2, 3, 3, 2]
    for task, values in rows.items():
        assert torch.allclose(losses[task], torch.stack(values).mean(), rtol=1e-4), task
    assert torch.allclose(loss, sum(losses.values()), rtol=1e-6)


def test_the_guarded_mean_leaves_empty_samples_out():
    error = torch.tensor([[1.0, 3.0], [5.0, 7.0]], requires_grad=True)
    mean = masked_mean(error, torch.tensor([[True, True], [False, False]]))
    mean.backward()
    assert mean == 2 and torch.equal(error.grad, torch.tensor([[0.5, 0.5], [0, 0]]))
    assert tiny()(inputs(), torch.zeros(3, 24, dtype=torch.bool))[0] == 0  # nothing is hidden


def test_pictures_are_the_maps_themselves_and_void_is_embedded_as_zeros():
    model, x = tiny(ignore=255), inputs()
    x["semseg"][0] = 255
    adapter = model.input_adapters["semseg"]
    void = adapter(model.patches("semseg", x["semseg"]))[0]
    assert torch.equal(void, adapter.proj.bias.expand_as(void))
    shown = {m: multimae.to_pictures(model, m, model.target(m, x[m])) for m in MODALITIES}
    rgb = to_unit_range(x["rgb"], model.mean, model.std)
    assert torch.allclose(shown["rgb"], rgb, atol=1e-6)
    assert torch.allclose(shown["depth"], (0.5 - x["depth"] / 6).expand(-1, 3, -1, -1))
    colors = multimae.PALETTE[x["semseg"] % 6].movedim(-1, 1) / 255  # void has one, too
    assert torch.equal(shown["semseg"], colors.repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_a_drawing_has_its_holes_where_the_mask_is(monkeypatch, tmp_path):
    model, x, hide, caught = tiny(), inputs(), masks(), []
    monkeypatch.setattr(multimae, "picture_table", lambda *args, **more: caught.append(args))
    monkeypatch.setattr(multimae, "save_picture", lambda *args: None)
    multimae.draw(model, x, hide, model(x, hide)[1], tmp_path / "x.png")
    cells, titles = caught[0]  # (3, columns, 3, H, W)
    assert titles[::3] == [*MODALITIES, "rgb > depth"] and len(titles) == cells.shape[1] == 12
    pink = torch.tensor((1.0, 0.8, 0.85))
    for b, k, i, j in np.ndindex(3, 3, 16, 32):
        whole, seen, painted = cells[b, 3 * k : 3 * k + 3, :, i, j]
        hole = hide[b, 8 * k + i // 8 * 4 + j // 8]
        assert torch.equal(seen, pink if hole else whole) and (hole or torch.equal(painted, whole))


def test_constant_maps_are_the_best_that_looks_at_nothing():
    model, x = tiny(ignore=5), inputs(5)
    maps = multimae.constant_maps(model, x)
    colors = torch.stack([block("rgb", x["rgb"][b], 6) for b in range(5)])
    assert torch.allclose(maps["rgb"][0, 6], colors.mean(dim=0).flatten(), atol=1e-6)
    depths = torch.stack([block("depth", x["depth"][b, 0], 6) for b in range(5)])
    assert torch.equal(maps["depth"][0, 6], depths.median(dim=0).values.flatten())
    assert maps["norm_rgb"].mean().abs() < 1e-6
    found = maps["semseg"][0, 6].exp().reshape(6, 4)
    for c, k in np.ndindex(6, 4):  # how often each class is there; void, 5, never
        count = sum(block("semseg", x["semseg"][b], 6).flatten()[k] == c for b in range(5))
        assert abs(found[c, k] - (1e-3 + (c != 5) * count / 5)) < 1e-6


def test_what_one_modality_tells_of_the_others_is_counted_as_in_a_loop():
    """Where the constant map is right or void is, nothing counts; "other": half the set away."""
    model, x = tiny(ignore=5), inputs(4)
    constant = multimae.constant_maps(model, x)
    numbers = multimae.cross_modal(model, x, "rgb", constant)
    ours, other = (multimae.paint_from(model, "rgb", x["rgb"][order])
                   for order in (range(4), [2, 3, 0, 1]))
    depth, truth = model.target("depth", x["depth"]), model.target("semseg", x["semseg"])
    errors = [(a["depth"] - depth).abs().mean().item() for a in (ours, constant, other)]
    assert np.allclose(numbers["depth error"], errors, rtol=1e-5)
    named = [a["semseg"].reshape(-1, 8, 6, 4).argmax(dim=2).expand(4, -1, -1)
             for a in (ours, constant, other)]
    where = [i for i in np.ndindex(4, 8, 4) if truth[i] != 5 and truth[i] != named[1][i]]
    recall = [np.mean([bool(x[i] == truth[i]) for i in where]) for x in named]
    assert np.allclose(numbers["object recall"], recall) and len(where) > 30
    assert set(multimae.cross_modal(model, x, "depth", constant)) == {"object recall"}


def test_the_dense_head_averages_the_tokens_at_one_place_and_leaves_the_global_one_out():
    x, given = inputs(), ["rgb", "depth"]
    tokens = tiny().encode({m: x[m] for m in given})  # (3, 8 + 8 + 1, 24)
    head = multimae.DenseHead(tiny(), torch.nn.LayerNorm(24), given)
    want = torch.stack([(tokens[:, n] + tokens[:, 8 + n]) / 2 for n in range(8)], dim=1)
    assert torch.allclose(head(x), head.head(head.norm(want)), atol=1e-5)
    found, truth = head.answers(x).chunk(2, dim=1)
    assert torch.equal(found, head(x).reshape(3, 8, 6, 4).argmax(dim=2).flatten(1).float())
    assert torch.equal(truth, head.encoder.target("semseg", x["semseg"]).flatten(1).float())


def slow_iou(guess, truth):
    shares = []
    for c in set(truth):
        both = sum(g == t == c for g, t in zip(guess, truth))
        shares.append(both / sum(c in pair for pair in zip(guess, truth)))
    return sum(shares) / len(shares)


def test_the_score_of_class_maps_is_that_of_a_loop_and_void_does_not_count():
    guess, truth = torch.randint(0, 4, (2, 5, 12), generator=torch.Generator().manual_seed(0))
    truth[guess == truth] %= 3  # of 6 classes 4 are there
    truth[:3, :4] = 5  # void, more often than any class
    head = multimae.DenseHead(tiny(ignore=5), torch.nn.LayerNorm(24), ["rgb"])
    scores = head.score(torch.cat([guess, truth], dim=1).float())
    often = [max(range(5), key=column.tolist().count) for column in truth.T]
    for name, answers in (("mean IoU", guess), ("constant map", torch.tensor([often] * 5))):
        pairs = answers[truth != 5].tolist(), truth[truth != 5].tolist()
        assert math.isclose(scores[name], slow_iou(*pairs), rel_tol=1e-6)


# ---- data ----------------------------------------------------------------------------------------


@pytest.fixture(params=[8, 16])
def maps(tmp_path, request):
    """Aligned maps, depth of 8 or 16 bits, in which every pixel says where it is: column // 8."""
    place = np.broadcast_to(np.arange(48) // 8, (40, 48)).astype(np.uint8)
    depth = place * np.uint8(40) if request.param == 8 else place.astype(np.uint16) * 10280
    images = [Image.fromarray(x) for x in (np.stack([place * 40] * 3, -1), depth, place)]
    images[2].putpalette([7 * k % 256 for k in range(768)])  # numbers, not colours
    for m, image in zip(MODALITIES, images):
        (tmp_path / m / "train").mkdir(parents=True)
        for i in range(3):
            image.save(tmp_path / m / f"train/{i}.png")
    return tmp_path


def open_maps(root, train=True, classes=6, ignore=-1):
    names = np.array(sorted(str(p) for p in (root / "rgb").rglob("*.png")))
    cfg = multimae.Config(data=root, img_size="16x32", classes=classes, ignore=ignore, min_crop=0.3)
    files = data.Files(names, np.full(3, -1), [])
    return multimae.AlignedDataset(files, list(MODALITIES), cfg, train)


def test_one_crop_and_one_flip_for_all_modalities_and_no_mixed_classes(maps):
    dataset, rising, unit = open_maps(maps), set(), 40 * 257  # 8 bits become 16
    for epoch in range(8):
        x = dataset[epoch, 1][0][0].long()  # (H, W, 6)
        depth, classes = x[..., 3] * 256 + x[..., 4], x[..., 5]
        assert x.shape == (16, 32, 6) and set(classes.unique().tolist()) <= set(range(6))
        around = F.max_pool2d(torch.stack([classes, -classes])[None].float(), 5, 1, 2)[0]
        inside = around[0] == -around[1]  # where all neighbours are of one class
        assert ((depth - classes * unit).abs() <= 1)[inside].all()
        assert ((x[..., 0] - classes * 40).abs() < 10)[inside].all()
        rising.add(bool(classes[0, 0] < classes[0, -1]))
    assert rising == {True, False}  # some are mirrored


def test_maps_become_inputs_and_depth_keeps_its_16_bits(maps):
    x = open_maps(maps, train=False)[0, 0][0]
    found = tiny().normalize(x)
    assert found["rgb"].shape[1:] == (3, 16, 32) and len(found) == 3
    raw = (x[..., 3].float() * 256 + x[..., 4]) / 65536
    assert torch.equal(found["depth"], multimae.standardize_depth(raw[:, None]))
    assert torch.equal(found["semseg"], x[:, 2::STRIDE, 2::STRIDE, 5].long())


def test_a_void_class_beyond_the_others_is_accepted_if_it_is_named(maps):
    path = maps / "semseg/train/0.png"
    classes = np.array(Image.open(path))
    classes[classes == 5] = 255
    Image.fromarray(classes).save(path)
    for number, ignore in ((5, 255), (256, -1)):
        x = open_maps(maps, False, number, ignore)[0, 0][0]
        assert set(x[..., 5].unique().tolist()) <= {*range(5), 255} and (x[..., 5] == 255).any()
    with pytest.raises(ValueError, match="has class 255: raise --classes 5, or name a void class"):
        open_maps(maps, False, classes=5)[0, 0]


@pytest.mark.parametrize("m, image, message", [
    ("depth", Image.new("I;16", (10, 10)), r"'rgb': \(40, 48\), 'depth': \(10, 10\)"),
    ("semseg", Image.new("RGB", (48, 40)), "is no semseg map, one channel of whole numbers"),
    ("depth", None, "has no counterpart in .*depth")])
def test_wrong_maps_are_named(maps, m, image, message):
    path = maps / m / "train/1.png"
    path.unlink()
    if image:
        image.save(path)
    with pytest.raises(ValueError, match=message):
        open_maps(maps)[0, 1]


def official(model):
    """The names of EPFL-VILAB/MultiMAE, with the frozen tables that public files hold."""
    state = {k.replace("blocks.", "encoder.") if k.startswith("blocks.") else k: v
             for k, v in model.state_dict().items()}
    for part, names, table in (("input", model.modalities, model.pos_embed),
                               ("output", model.tasks, model.decoder_pos_embed)):
        table = table.transpose(1, 2).unflatten(2, model.grid[1:])
        state |= {f"{part}_adapters.{name}.pos_emb": table for name in names}
    return state


def test_a_public_file_tells_its_sizes_and_the_heads_are_a_guess():
    with torch.device("meta"):
        model = MultiMAE((224, 448), 16, "base")
        said, state, guesses = multimae.public_multimae(official(model))
    assert said == {"patch": 16, "size": "768x12x12", "decoder": "256x2x8", "img_size": "224x448",
                    "modalities": "rgb,depth,semseg", "classes": 133, "class_width": 64}
    assert set(state) == set(model.state_dict()) and guesses == ["size", "decoder"]


# ---- the script ----------------------------------------------------------------------------------


def test_the_script_trains_draws_resumes_and_finetune_takes_its_checkpoint(toy, run, tmp_path):
    text = run(multimae, *TINY, "--data", toy)
    folder = tmp_path / "runs/multimae"
    assert "  from rgb alone: object recall" in text and "from another's rgb" in text
    assert np.asarray(Image.open(max((folder / "pictures").glob("*.png")))).std() > 20
    scores = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    names = ["rgb", "depth", "semseg", "norm_rgb"]
    assert {f"{name}_constant" for name in names} | {"object recall_other"} <= set(scores)
    assert math.isclose(scores["val_loss"], sum(scores[f"{n}_loss"] for n in names), rel_tol=1e-6)
    assert "done: " in run(multimae, "--resume")
    flags = ["--data", toy, "--init", folder / "checkpoint.pt", "--batch", 16, "--workers", 0]
    for mode, chosen in (("finetune", "rgb,depth"), ("linear", "rgb"), ("knn", "rgb")):
        more = ["--smoke"] if mode != "knn" else []
        text = run(finetune, *flags, "--mode", mode, "--inputs", chosen, "--out", mode, *more)
        assert "tensors used" in text and "top-1" in text.splitlines()[-1]


def test_a_classifier_of_another_size_is_resumed_and_tested(toy, run):
    run(multimae, *TINY, "--data", toy, "--smoke", "--pictures", 0)
    flags = ["--model", "multimae", "--data", toy, "--img-size", "24x16", "--smoke", "--workers", 0]
    trained = run(finetune, *flags, "--out", "other").splitlines()
    for more in (["--resume", "--out", "other"],
                 ["--eval-only", "--init", "other/checkpoint.pt", "--data", toy, "--out", "test"]):
        assert run(finetune, *more).splitlines()[-2] == trained[-2]  # the same test


def test_a_map_that_pretraining_did_not_have_is_painted_and_broken_files_are_named(
        toy, run, tmp_path):
    for m in MODALITIES:
        shutil.copytree(toy / m, tmp_path / "world" / m)
    run(multimae, *TINY, "--data", "world", "--modalities", "rgb", "--smoke")
    bad = sorted((tmp_path / "world/rgb/val").rglob("*.jpg"))[0]
    bad.write_bytes(b"no image")
    flags = ["--init", "runs/multimae/checkpoint.pt", "--data", "world", "--workers", 0, "--smoke"]
    text = run(finetune, *flags, "--dense", "semseg", "--share", 0.5)
    assert "done: semseg: mean IoU" in text
    assert f"{bad.relative_to(tmp_path)}: broken, left out" in text
    flags = ["--model", "multimae", "--mode", "scratch", "--out", "s", *flags[2:]]
    run(finetune, *flags, "--dense", "semseg", "--inputs", "rgb,depth", "--img-size", 16)
    scores = json.loads((tmp_path / "s/results.json").read_text())
    assert scores["mean IoU"] >= 0 < scores["constant map"]


def test_street_scenes_train(real, run, refused, tmp_path):
    archive = real / "camvid128.tar.gz"
    if not archive.is_file():
        pytest.skip("MAE_TEST_DATA has no camvid128.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    flags = [*TINY, "--data", "camvid128", "--modalities", "rgb,semseg", "--smoke"]
    assert "done: " in run(multimae, *flags, "--classes", 12, "--ignore", 11)
    assert "raise --classes 6" in refused(multimae, *flags, "--classes", 6, "--out", "x")


@pytest.mark.parametrize("flags, message", [
    (["--modalities", "rgb,flow"], "use any of rgb,depth,semseg"),
    (["--patch", 2, "--img-size", 16], "class maps have a quarter of the size: patch 2"),
    (["--data", "."], "No such file or directory: 'rgb'"), (["--visible", 1], "hides noth"),
    (["--classes", 3], "raise --classes 3"), (["--decoder", "64x1x5"], "not a multiple of 5")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    base = [] if "--data" in flags else ["--data", toy]
    assert message in refused(multimae, *base, "--workers", 0, *flags)


def test_the_papers_masks_show_98_of_the_3_x_196_patches():
    assert round(multimae.Config(**multimae.PRESETS["paper"]).visible * 588) == 98
