import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import finetune
import multimae
from conftest import TINY_IMAGE
from layouts import renamed
from mae_image import to_unit_range
from masking import HOLE, dirichlet_mask
from multimae import MODALITIES, STRIDE, MultiMAE, masked_mean, paint_from

TINY = [*TINY_IMAGE, "--img-size", "16x32"]
MASK = dirichlet_mask(3, [8, 8, 8], 8, torch.Generator().manual_seed(0))


def tiny(**options):
    torch.manual_seed(0)
    return MultiMAE((16, 32), 8, (24, 1, 2), (16, 1, 2), classes=6, class_width=4, **options)


def inputs(B=3, channels=3):
    g = torch.Generator().manual_seed(0)
    rgb, depth = (torch.randn(B, c, 16, 32, generator=g) for c in (channels, 1))
    return {"rgb": rgb, "depth": depth, "semseg": torch.randint(0, 6, (B, 4, 8), generator=g)}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_losses_are_those_of_a_loop_over_samples_and_hidden_pixels(channels):
    model, x, hide = tiny(channels=channels, ignore=255), inputs(channels=channels), MASK.clone()
    hide[0] = torch.arange(24) >= 8  # of this sample nothing counts in RGB
    x["semseg"][x["semseg"] == 5] = 255
    loss, preds = model(x, hide)
    losses = model.task_losses(preds, x, x, hide)
    for task in model.tasks:
        m, errors = task.removeprefix("norm_"), [[], [], []]
        p, hidden = 2 if m == "semseg" else 8, hide.reshape(3, 3, 8)[:, MODALITIES.index(m)]
        for b, n in hidden.nonzero().tolist():
            r, c, pred = n // 4 * p, n % 4 * p, preds[task][b, n]
            want = x[m][b][..., r : r + p, c : c + p].flatten()  # in the order channel, row, column
            if task == "norm_rgb":
                want = (want - want.mean()) / (want.var() + 1e-6).sqrt()
            if task == "semseg":
                pred = pred.reshape(6, 4).log_softmax(dim=0)
                errors[b] += [-pred[c, k] for k, c in enumerate(want) if c != 255]
            else:
                errors[b] += (pred - want).abs() if task == "depth" else (pred - want).square()
        means = [torch.stack(one).mean() for one in errors if one]
        assert len(means) == (2 if m == "rgb" else 3)
        assert torch.allclose(losses[task], torch.stack(means).mean(), rtol=1e-4), task
    assert torch.allclose(loss, sum(losses.values()), rtol=1e-6)
    for m, other in ("flow", x["rgb"]), ("depth", x["depth"].mT):  # unknown, of another size
        with pytest.raises(ValueError, match="takes any of rgb, depth, semseg, all of one size"):
            model(x | {m: other}, hide)


def test_the_guarded_mean_leaves_empty_samples_out():
    error = torch.tensor([[1.0, 3.0], [5.0, 7.0]], requires_grad=True)
    mean = masked_mean(error, torch.tensor([[True, True], [False, False]]))
    mean.backward()
    assert mean == 2 and torch.equal(error.grad, torch.tensor([[0.5, 0.5], [0, 0]]))
    assert tiny()(inputs(), torch.zeros(3, 24, dtype=torch.bool))[0] == 0  # nothing is hidden


def test_a_drawing_has_the_maps_with_holes_and_void_is_embedded_as_zeros(monkeypatch, tmp_path):
    model, x, drawn = tiny(ignore=255), inputs(), []
    x["semseg"][0] = 255
    adapter = model.input_adapters["semseg"]
    void = adapter(model.patches("semseg", x["semseg"]))[0]
    assert torch.equal(void, adapter.proj.bias.expand_as(void))
    monkeypatch.setattr(multimae, "picture_table", lambda *args, **more: drawn.extend(args))
    monkeypatch.setattr(multimae, "save_picture", lambda *args: None)
    multimae.draw(model, x, MASK, model(x, MASK)[1], tmp_path / "x.png")
    cells, titles = drawn  # (3, columns, 3, H, W)
    assert titles[::3] == [*MODALITIES, "rgb > depth"] and len(titles) == cells.shape[1] == 12
    colors = multimae.PALETTE[x["semseg"] % 6].movedim(-1, 1) / 255  # void has one, too
    maps = (to_unit_range(x["rgb"], model.mean, model.std), 0.5 - x["depth"] / 6,
            colors.repeat_interleave(4, 2).repeat_interleave(4, 3))
    holes, pink = MASK.reshape(3, 3, 1, 2, 4), torch.tensor(HOLE)[:, None, None]
    for k, one in enumerate(maps):
        hole = holes[:, k].repeat_interleave(8, 2).repeat_interleave(8, 3)
        whole, seen, painted = cells[:, 3 * k : 3 * k + 3].unbind(1)
        assert torch.allclose(whole, one.expand_as(whole), atol=1e-6)
        assert torch.equal(seen, torch.where(hole, pink, whole))
        assert torch.equal(painted, torch.where(hole, painted, whole))


def test_constant_maps_look_at_nothing_and_what_rgb_tells_of_the_others_is_that_of_a_loop():
    """Where the constant map is right or void is, nothing counts; "other": half the set away."""
    model, x = tiny(ignore=5), inputs(4)
    maps = multimae.constant_maps(model, x)
    rgb, depth, classes = (model.target(m, x[m]) for m in MODALITIES)
    assert torch.allclose(maps["rgb"][0], rgb.mean(dim=0), atol=1e-6)
    assert torch.equal(maps["depth"][0], depth.median(dim=0).values)
    assert maps["norm_rgb"].mean().abs() < 1e-6
    for n, c, k in np.ndindex(8, 6, 4):  # how often each class is there; void, 5, never
        share = (c != 5) * (classes[:, n, k] == c).float().mean()
        assert abs(maps["semseg"][0, n].reshape(6, 4)[c, k].exp() - (1e-3 + share)) < 1e-6
    numbers, y = multimae.cross_modal(model, x, "rgb", maps), x["rgb"]
    preds = [paint_from(model, "rgb", y), maps, paint_from(model, "rgb", y.roll(2, 0))]
    errors = [(pred["depth"] - depth).abs().mean().item() for pred in preds]
    assert np.allclose(numbers["depth error"], errors, rtol=1e-5)
    named = [pred["semseg"].reshape(-1, 8, 6, 4).argmax(2).expand(4, -1, -1) for pred in preds]
    where = [i for i in np.ndindex(4, 8, 4) if classes[i] != 5 and classes[i] != named[1][i]]
    recall = [np.mean([bool(guess[i] == classes[i]) for i in where]) for guess in named]
    assert np.allclose(numbers["object recall"], recall) and len(where) > 30
    assert set(multimae.cross_modal(model, x, "depth", maps)) == {"object recall"}


def test_the_dense_head_averages_the_tokens_at_one_place_and_is_scored_as_in_a_loop():
    x, given, norm = inputs(), ["rgb", "depth"], torch.nn.LayerNorm(24)
    tokens = tiny().encode({m: x[m] for m in given})  # (3, 8 + 8 + 1, 24): the last one is global
    head = multimae.DenseHead(tiny(ignore=5), norm, given)
    want = torch.stack([(tokens[:, n] + tokens[:, 8 + n]) / 2 for n in range(8)], dim=1)
    assert torch.allclose(head(x), head.head(norm(want)), atol=1e-5)
    found, truth = head.answers(x).chunk(2, dim=1)
    assert torch.equal(found, head(x).reshape(3, 8, 6, 4).argmax(dim=2).flatten(1).float())
    assert torch.equal(truth, head.encoder.target("semseg", x["semseg"]).flatten(1).float())
    guess, truth = torch.randint(0, 4, (2, 5, 12), generator=torch.Generator().manual_seed(0))
    truth[guess == truth] %= 3  # of 6 classes 4 are there
    truth[:3, :4] = 5  # void does not count, and is more often there than any class
    scores = head.score(torch.cat([guess, truth], dim=1).float())
    often = [max(range(5), key=column.tolist().count) for column in truth.T]
    for name, answers in ("mean IoU", guess), ("constant map", torch.tensor([often] * 5)):
        g, t = answers[truth != 5], truth[truth != 5]
        shares = [((g == c) & (t == c)).sum() / ((g == c) | (t == c)).sum() for c in t.unique()]
        assert math.isclose(scores[name], np.mean(shares, dtype=float), rel_tol=1e-6)


@pytest.fixture(params=[8, 16])
def maps(tmp_path, request):
    """Aligned maps, depth of 8 or 16 bits, in which every pixel says where it is: column // 8."""
    place = np.broadcast_to(np.arange(48) // 8, (40, 48)).astype(np.uint8)
    depth = place * np.uint8(40) if request.param == 8 else place.astype(np.uint16) * 10280
    images = [Image.fromarray(x) for x in (np.stack([place * 40] * 3, -1), depth, place)]
    images[2].putpalette([7 * k % 256 for k in range(768)])  # numbers, not colours
    for m, image in zip(MODALITIES, images):
        (tmp_path / m / "train").mkdir(parents=True)
        image.save(tmp_path / m / "train/0.png")
    return tmp_path


def open_maps(root, train=True, classes=6, ignore=-1):
    files = data.Files([str(root / "rgb/train/0.png")], [-1], [])
    cfg = multimae.Config(data=root, img_size="16x32", classes=classes, ignore=ignore, min_crop=0.3)
    return multimae.AlignedDataset(files, list(MODALITIES), cfg, train)


def test_one_crop_and_one_flip_for_all_modalities_and_no_mixed_classes(maps):
    dataset, rising = open_maps(maps), set()
    for epoch in range(8):
        x = dataset[epoch, 0][0][0].long()  # (H, W, 6)
        depth, classes = x[..., 3] * 256 + x[..., 4], x[..., 5]
        assert x.shape == (16, 32, 6) and set(classes.unique().tolist()) <= set(range(6))
        around = torch.max_pool2d(torch.stack([classes, -classes])[None].float(), 5, 1, 2)[0]
        inside = around[0] == -around[1]  # where all neighbours are of one class
        assert ((depth - classes * 40 * 257).abs() <= 1)[inside].all()  # 8 bits become 16
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


@pytest.mark.parametrize("m, image, message", [
    ("depth", Image.new("I;16", (10, 10)), r"'rgb': \(40, 48\), 'depth': \(10, 10\)"),
    ("semseg", Image.new("RGB", (48, 40)), "is no semseg map, one channel of whole numbers"),
    ("semseg", Image.new("L", (48, 40), 255), "class 255: raise --classes 6, or name a void class"),
    ("depth", None, "has no counterpart in .*depth")])
def test_wrong_maps_are_named_unless_a_class_is_void(maps, m, image, message):
    path = maps / m / "train/0.png"
    path.unlink()
    if image:
        image.save(path)
    with pytest.raises(ValueError, match=message):
        open_maps(maps)[0, 0]
    for options in (dict(ignore=255), dict(classes=256)) if "255" in message else ():
        assert (open_maps(maps, **options)[0, 0][0][..., 5] == 255).all()


def official(model):
    """The names of EPFL-VILAB/MultiMAE, with the frozen tables that public files hold."""
    state = {renamed(k, {"blocks.": "encoder."}): v for k, v in model.state_dict().items()}
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
    assert round(multimae.PRESETS["paper"]["visible"] * 3 * 196) == 98  # the paper's masks


def test_the_script_trains_draws_resumes_and_finetune_takes_its_checkpoint(toy, run, tmp_path):
    text, folder = run(multimae, *TINY, "--data", toy), tmp_path / "runs/multimae"
    assert "  from rgb alone: object recall" in text and "from another's rgb" in text
    assert np.asarray(Image.open(max((folder / "pictures").glob("*.png")))).std() > 20
    assert "done: " in run(multimae, "--resume")
    flags = ["--data", toy, "--init", folder / "checkpoint.pt", "--batch", 16, "--workers", 0]
    flags += ["--smoke", "--img-size", "24x16"]  # another size
    for mode, chosen in ("finetune", "rgb,depth"), ("linear", "rgb"), ("knn", "rgb"):
        text = run(finetune, *flags, "--mode", mode, "--inputs", chosen, "--out", mode)
        assert "tensors used" in text and "top-1" in text.splitlines()[-1]
    table = (tmp_path / "finetune/predictions.csv").read_text()
    run(finetune, "--eval-only", "--init", "finetune/checkpoint.pt", "--data", toy, "--out", "test")
    assert (tmp_path / "test/predictions.csv").read_text() == table


def test_a_map_new_to_the_encoder_is_painted_and_broken_files_are_named(toy, run, tmp_path):
    shutil.copytree(toy, tmp_path / "world")
    run(multimae, *TINY, "--data", "world", "--modalities", "rgb", "--smoke")
    bad = min((tmp_path / "world/rgb/val").rglob("*.jpg"))
    bad.write_bytes(b"no image")
    flags = ["--data", "world", "--workers", 0, "--smoke", "--dense", "semseg"]
    text = run(finetune, *flags, "--init", "runs/multimae/checkpoint.pt", "--share", 0.5)
    assert "done: mean IoU" in text and f"{bad.relative_to(tmp_path)}: broken, left out" in text
    flags += ["--model", "multimae", "--mode", "scratch", "--inputs", "rgb,depth", "--out", "s"]
    run(finetune, *flags, "--img-size", 16)
    assert json.loads((tmp_path / "s/results.json").read_text())["constant map"] > 0


@pytest.mark.parametrize("flags, message", [
    (["--modalities", "rgb,flow"], "use any of rgb,depth,semseg"), (["--visible", 1], "hides noth"),
    (["--patch", 2, "--img-size", 16], "class maps have a quarter of the size: patch 2")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(multimae, "--data", toy, "--workers", 0, *flags)
