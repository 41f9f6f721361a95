import json
import math
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

import data
import finetune
import mae_image
import multimae
from mae_image import sincos_2d, to_unit_range
from masking import dirichlet_mask
from multimae import MODALITIES, STRIDE, MultiMAE, masked_mean

TINY = ["--img-size", "16x32", "--patch", 8, "--size", "16x1x2", "--decoder", "16x1x2", "--batch", 16,
        "--class-width", 4, "--epochs", 2, "--warmup", 1, "--workers", 0, "--log-every", 1,
        "--pictures", 1, "--visible", 0.3]


def tiny(modalities=MODALITIES, size=(16, 32), depth=1, **options):
    torch.manual_seed(0)
    shape = size, 8, (24, depth, 2), (16, 1, 2)
    return MultiMAE(*shape, modalities, **dict(classes=6, class_width=4) | options)


def inputs(B=3, H=16, W=32, channels=3):
    g = torch.Generator().manual_seed(0)
    return {"rgb": torch.randn(B, channels, H, W, generator=g),
            "depth": torch.randn(B, 1, H, W, generator=g),
            "semseg": torch.randint(0, 6, (B, H // 4, W // 4), generator=g)}


def masks(visible=8, modalities=3, B=3):
    return dirichlet_mask(B, [8] * modalities, visible, torch.Generator().manual_seed(0))


def block(m, x, token):
    """The pixels of one token (2 x 4 of them) of one sample, (C, p, p) or (p, p)."""
    p = 2 if m == "semseg" else 8
    r, c = token // 4, token % 4
    return x[..., p * r : p * r + p, p * c : p * c + p]


# ---- tokens --------------------------------------------------------------------------------------


def test_the_class_embedding_is_the_strided_convolution_and_void_is_zeros():
    model, x = tiny(ignore=255), inputs()["semseg"]
    adapter = model.input_adapters["semseg"]
    x[:, 1:3, 2:5] = 255
    vectors = adapter.class_emb(x % 255) * (x != 255)[..., None]
    want = adapter.proj(vectors.movedim(-1, 1)).flatten(2).transpose(1, 2)
    assert torch.allclose(adapter(model.patches("semseg", x)), want, atol=1e-5)


def test_positions_are_maes_with_rows_and_columns_exchanged():
    ours, maes = multimae.sincos_rows_first(16, 3, 5)[0], sincos_2d(16, 3, 5)
    assert torch.equal(ours, torch.cat([maes[:, 8:], maes[:, :8]], dim=1))


@pytest.mark.parametrize("m", MODALITIES)
def test_positions_are_resized_bilinearly_for_class_maps_and_else_bicubically(m):
    model, x = tiny(depth=0), inputs(H=32, W=40)[m]  # without blocks: tokens as they are
    tokens = model.encode({m: x})[:, :-1] - model.input_adapters[m](model.patches(m, x))
    table = model.pos_embed.reshape(1, 2, 4, 24).permute(0, 3, 1, 2)
    mode = "bilinear" if m == "semseg" else "bicubic"
    want = F.interpolate(table, (4, 5), mode=mode, align_corners=False).flatten(2).transpose(1, 2)
    assert torch.allclose(tokens, want.expand_as(tokens), atol=1e-5)


def test_depth_is_standardized_by_its_middle():
    depth = torch.rand(2, 1, 10, 10) * 5 + 3
    values = sorted(depth[1].flatten().tolist())[10:90]
    mean = sum(values) / 80
    want = (depth[1] - mean) / math.sqrt(sum((v - mean) ** 2 for v in values) / 79 + 1e-6)
    assert torch.allclose(multimae.standardize_depth(depth)[1], want, atol=1e-4)
    assert torch.isfinite(multimae.standardize_depth(torch.ones(1, 1, 4, 4))).all()


def test_cross_attention_is_torchs_own():
    ours = multimae.CrossAttention(16, 4)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    assert torch.allclose(ours(x, context), theirs(x, context, context)[0], atol=1e-5)


def test_hidden_tokens_of_no_modality_reach_the_encoder():
    model, x, hide = tiny(), inputs(), masks()
    other = {m: v.clone() for m, v in x.items()}
    for b, n in hide.nonzero().tolist():
        m = MODALITIES[n // 8]
        block(m, other[m][b], n % 8)[:] = 5 if m == "semseg" else 9
    assert all((other[m] != x[m]).any() for m in MODALITIES)
    assert torch.equal(model.forward_encoder(x, hide), model.forward_encoder(other, hide))


@pytest.mark.parametrize("given", [["rgb"], ["depth"], ["semseg"], ["depth", "semseg"]])
def test_any_subset_of_modalities_goes_in_and_every_task_comes_out(given):
    model, x = tiny(), inputs()
    some = {m: x[m] for m in given}
    loss, preds = model(some, masks(3, len(given)))
    assert set(preds) == {"rgb", "depth", "semseg", "norm_rgb"} and torch.isfinite(loss)
    assert model.encode(some).shape == (3, 8 * len(given) + 1, 24)
    larger = inputs(H=48, W=24)
    assert model.encode({m: larger[m] for m in given}).shape == (3, 18 * len(given) + 1, 24)
    assert torch.equal(model.encode(x["rgb"]), model.encode({"rgb": x["rgb"]}))


@pytest.mark.parametrize("change, message", [
    ({"flow": inputs()["rgb"]}, "inputs .*flow.*: this model takes any of rgb, depth, semseg"),
    ({"depth": inputs(H=48)["depth"]}, "all of one size"),
    ({"depth": inputs(H=32, W=16)["depth"]}, "all of one size"),  # as many patches, turned
    ({"semseg": inputs(H=32, W=16)["semseg"]}, "all of one size"),
    ({"rgb": torch.zeros(3, 3, 20, 32)}, "all of one size"), (None, "takes any of")])
def test_wrong_inputs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny()({} if change is None else inputs() | change, masks())


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("void", [False, True])
def test_losses_are_those_of_a_loop_over_samples_and_hidden_pixels(channels, void):
    model, x, hide = tiny(channels=channels, ignore=255), inputs(channels=channels), masks()
    hide[0, :8] = False  # of this sample nothing counts in RGB
    hide[0, 8:16] = hide[0, 16:] = True
    if void:
        x["semseg"][x["semseg"] == 5] = 255
    preds = model.forward_decoder(model.forward_encoder(x), x)
    losses, rows = model.task_losses(preds, x, x, hide), {task: [] for task in model.tasks}
    for task in model.tasks:
        m = task.removeprefix("norm_")
        for b in range(3):
            errors = []
            for n in range(8):
                if not hide[b, 8 * MODALITIES.index(m) + n]:
                    continue
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
    assert len(rows["rgb"]) == 2 and len(rows["depth"]) == len(rows["semseg"]) == 3
    for task, values in rows.items():
        assert torch.allclose(losses[task], torch.stack(values).mean(), rtol=1e-4), task
    assert torch.allclose(model(x, masks())[0], sum(model.task_losses(
        model(x, masks())[1], x, x, masks()).values()), rtol=1e-6)


@pytest.mark.parametrize("case", ["all visible of one", "nothing visible of one", "nothing hidden"])
def test_no_nan_where_a_modality_has_no_visible_or_no_hidden_token(case):
    model, x = tiny(), inputs()
    hide = torch.full((3, 24), case != "nothing hidden")
    if case == "all visible of one":
        hide[0, :8] = hide[1, 8:16] = hide[2, 16:] = False
    elif case == "nothing visible of one":
        hide[:, :4] = False
    loss, _ = model(x, hide)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)
    assert (loss == 0) == (case == "nothing hidden")


def test_the_guarded_mean_leaves_empty_samples_out():
    error = torch.tensor([[1.0, 3.0], [5.0, 7.0]], requires_grad=True)
    count = torch.tensor([[True, True], [False, False]])
    masked_mean(error, count).backward()
    assert masked_mean(error, count) == 2
    assert torch.equal(error.grad, torch.tensor([[0.5, 0.5], [0, 0]]))


# ---- pictures, constant maps, one map from another -----------------------------------------------


def test_pictures_are_the_maps_themselves():
    model, x = tiny(), inputs()
    x["semseg"][0] = 255  # void has a colour, too
    shown = {m: multimae.to_pictures(model, m, model.target(m, x[m])) for m in MODALITIES}
    rgb = to_unit_range(x["rgb"], model.mean, model.std).clamp(0, 1)
    assert torch.allclose(shown["rgb"], rgb, atol=1e-6)
    assert torch.allclose(shown["depth"], (0.5 - x["depth"] / 6).clamp(0, 1).expand(-1, 3, -1, -1))
    for b, i, j in np.ndindex(3, 16, 32):
        color = multimae.PALETTE[x["semseg"][b, i // 4, j // 4] % 6] / 255
        assert torch.equal(shown["semseg"][b, :, i, j], color)


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_other_channels_are_their_pixels(channels):
    model = tiny(["rgb"], channels=channels)
    pixels = torch.randint(0, 256, (2, 16, 32, channels), dtype=torch.uint8)
    x = mae_image.normalize(pixels, model.mean, model.std)
    found = multimae.to_pictures(model, "rgb", model.target("rgb", x))
    assert torch.allclose(found.movedim(1, -1), pixels / 255, atol=1e-5)


def test_a_drawing_has_its_holes_where_the_mask_is(monkeypatch, tmp_path):
    model, x, hide, caught = tiny(), inputs(), masks(), []
    original = multimae.picture_table
    monkeypatch.setattr(multimae, "picture_table",
                        lambda *args, **more: caught.append(args) or original(*args, **more))
    multimae.draw(model, x, hide, model(x, hide)[1], tmp_path / "x.png")
    cells, titles = caught[0]  # (3, columns, 3, H, W)
    assert titles[:9:3] == list(MODALITIES) and len(titles) == cells.shape[1] == 12
    assert titles[9:] == ["rgb > depth", "rgb > semseg", "depth > rgb"]
    pink = torch.tensor((1.0, 0.8, 0.85))
    for b, k, i, j in np.ndindex(3, 3, 16, 32):
        whole, seen, painted = cells[b, 3 * k : 3 * k + 3, :, i, j]
        hole = hide[b, 8 * k + i // 8 * 4 + j // 8]
        assert torch.equal(seen, pink if hole else whole) and (hole or torch.equal(painted, whole))


def test_constant_maps_are_the_best_that_looks_at_nothing():
    model, x = tiny(ignore=5), inputs(5)
    maps = multimae.constant_maps(model, x)
    mean = x["rgb"].mean(dim=(0, 2, 3))[:, None]
    assert torch.allclose(maps["rgb"].unflatten(2, (3, 64)), mean, atol=1e-6)
    depths = torch.stack([block("depth", x["depth"][b, 0], 6) for b in range(5)])
    assert torch.equal(maps["depth"][0, 6], depths.median(dim=0).values.flatten())
    assert not maps["norm_rgb"].any()
    found = maps["semseg"][0, 6].exp().reshape(6, 4)
    for c, k in np.ndindex(6, 4):  # how often each class is there; void, 5, never
        count = sum(block("semseg", x["semseg"][b], 6).flatten()[k] == c for b in range(5))
        assert abs(found[c, k] - (1e-3 + (c != 5) * count / 5)) < 1e-6


def test_what_one_modality_tells_of_the_others_is_counted_as_in_a_loop():
    """Where the constant map is right or void is, nothing counts; "other": half the set away."""
    model, x = tiny(ignore=5), inputs(4)
    constant = multimae.constant_maps(model, x)
    numbers = multimae.cross_modal(model, x, "rgb", constant)

    def alone(rgb):
        nothing = torch.zeros(4, 8, dtype=torch.bool)
        return model.forward_decoder(model.forward_encoder({"rgb": rgb}, nothing), {"rgb": rgb}, nothing)

    def named(preds):
        return preds["semseg"].reshape(-1, 8, 6, 4).argmax(dim=2).expand(4, -1, -1)

    ours, other = alone(x["rgb"]), alone(x["rgb"][[2, 3, 0, 1]])
    depth, truth = model.target("depth", x["depth"]), model.target("semseg", x["semseg"])
    errors = [(a["depth"] - depth).abs().mean().item() for a in (ours, constant, other)]
    assert np.allclose(numbers["depth error"], errors, rtol=1e-5)
    where = [i for i in np.ndindex(4, 8, 4) if truth[i] != 5 and truth[i] != named(constant)[i]]
    recall = [np.mean([bool(named(a)[i] == truth[i]) for i in where]) for a in (ours, other)]
    assert np.allclose(numbers["object recall"], [recall[0], 0, recall[1]]) and len(where) > 30
    assert set(multimae.cross_modal(model, x, "depth", constant)) == {"object recall"}


# ---- a map from the encoder ----------------------------------------------------------------------


def test_the_dense_head_averages_the_tokens_at_one_place_and_leaves_the_global_one_out():
    x, given = inputs(), ["rgb", "depth"]
    tokens = tiny().encode({m: x[m] for m in given})  # (3, 8 + 8 + 1, 24)
    head = multimae.DenseHead(tiny(), torch.nn.LayerNorm(24), given, "semseg")
    want = torch.stack([(tokens[:, n] + tokens[:, 8 + n]) / 2 for n in range(8)], dim=1)
    assert torch.allclose(head(x), head.head(head.norm(want)), atol=1e-5)
    found, truth = head.answers(x).chunk(2, dim=1)
    assert torch.equal(found, head(x).reshape(3, 8, 6, 4).argmax(dim=2).flatten(1).float())
    assert torch.equal(truth, head.encoder.target("semseg", x["semseg"]).flatten(1).float())


def slow_iou(guess, truth, classes):
    shares = []
    for c in set(truth):
        both = sum(g == t == c for g, t in zip(guess, truth))
        shares.append(both / sum(c in pair for pair in zip(guess, truth)))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("void", [-1, 255])
def test_the_score_of_class_maps_is_that_of_a_loop_and_void_does_not_count(void):
    g = torch.Generator().manual_seed(0)
    guess, truth = torch.randint(0, 4, (2, 5, 12), generator=g)  # of 6 classes 4 are there
    truth[guess == truth] %= 3
    truth[:, :2] = 3 if void == -1 else void
    head = multimae.DenseHead(tiny(ignore=void), torch.nn.LayerNorm(24), ["rgb"], "semseg")
    scores = head.score(torch.cat([guess, truth], dim=1).float())
    constant = [max(range(6), key=lambda c: (column == c).sum().item()) for column in truth.T]
    flat = truth.flatten().tolist()
    kept = [i for i, t in enumerate(flat) if t != void]
    for name, answers in (("mean IoU", guess.flatten().tolist()), ("constant map", constant * 5)):
        pairs = [answers[i] for i in kept], [flat[i] for i in kept]
        assert math.isclose(scores[name], slow_iou(*pairs, 6), rel_tol=1e-6)


def test_the_score_of_depth_is_the_mean_error_beside_that_of_the_median():
    guess, truth = torch.randn(2, 5, 7)
    head = multimae.DenseHead(tiny(), torch.nn.LayerNorm(24), ["rgb"], "depth")
    scores = head.score(torch.cat([guess, truth], dim=1))
    errors = [[abs(a - b) for a, b in zip(x, truth.flatten().tolist())] for x in (
        guess.flatten().tolist(), truth.median(dim=0).values.tolist() * 5)]
    assert np.allclose([scores["depth error"], scores["constant map"]], np.mean(errors, axis=1))


# ---- data ----------------------------------------------------------------------------------------


def write_maps(root, count=3, size=(40, 48), bits=16):
    """Aligned maps in which every pixel says where it is: all three hold column // 8."""
    place = np.broadcast_to(np.arange(size[1]) // 8, size)
    depth = (place * 10000).astype(np.uint16) if bits == 16 else (place * 40).astype(np.uint8)
    images = [Image.fromarray(np.stack([place * 40] * 3, -1).astype(np.uint8)),
              Image.fromarray(depth), Image.fromarray(place.astype(np.uint8))]
    images[2].putpalette([7 * k % 256 for k in range(768)])  # numbers, not colours
    for m, image in zip(MODALITIES, images):
        (root / m / "train").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image.save(root / m / "train" / f"{i}.png")


def open_maps(root, train=True, modalities=MODALITIES, classes=6, ignore=-1, size=(32, 32)):
    files = data.list_images(root / modalities[0], "train")
    files = data.Files(np.array(sorted(str(p) for p in (root / modalities[0]).rglob("*.png"))),
                       np.full(3, -1), files.classes)
    return multimae.AlignedDataset(root, files, list(modalities), size, classes, ignore, 0, 0.3, True,
                                   train)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [(32, 32), (16, 32)])
def test_one_crop_and_one_flip_for_all_modalities_and_no_mixed_classes(tmp_path, bits, size):
    write_maps(tmp_path, bits=bits)
    dataset, unit, rising = open_maps(tmp_path, size=size), 10000 if bits == 16 else 40 * 257, set()
    for epoch in range(8):
        x = dataset[epoch, 1][0][0].long()  # (H, W, 6)
        depth, classes = x[..., 3] * 256 + x[..., 4], x[..., 5]
        assert x.shape == (*size, 6) and set(classes.unique().tolist()) <= set(range(6))
        around = F.max_pool2d(torch.stack([classes, -classes])[None].float(), 5, 1, 2)[0]
        inside = around[0] == -around[1]  # where all neighbours are of one class
        assert ((depth - classes * unit).abs() < unit / 4)[inside].all()
        assert ((x[..., 0] - classes * 40).abs() < 10)[inside].all()
        rising.add(bool(classes[0, 0] < classes[0, -1]))
    assert rising == {True, False}  # some are mirrored
    assert torch.equal(dataset[0, 1][0], dataset[0, 1][0])
    assert not torch.equal(dataset[0, 1][0], dataset[1, 1][0])


def test_maps_become_inputs_and_depth_keeps_its_16_bits(tmp_path):
    write_maps(tmp_path)
    model, x = tiny(), open_maps(tmp_path, train=False)[0, 0][0]
    found = model.normalize(x)
    assert {m: v.shape[1:] for m, v in found.items()} == {
        "rgb": (3, 32, 32), "depth": (1, 32, 32), "semseg": (8, 8)}
    raw = (x[..., 3].float() * 256 + x[..., 4]) / 65536
    assert torch.equal(found["depth"], multimae.standardize_depth(raw[:, None]))
    assert torch.equal(found["semseg"], x[:, 2::STRIDE, 2::STRIDE, 5].long())


def test_a_void_class_beyond_the_others_is_accepted_if_it_is_named(tmp_path):
    write_maps(tmp_path)
    path = tmp_path / "semseg/train/0.png"
    classes = np.array(Image.open(path))
    classes[classes == 5] = 255
    Image.fromarray(classes).save(path)
    x = open_maps(tmp_path, False, classes=5, ignore=255)[0, 0][0]
    assert set(x[..., 5].unique().tolist()) <= {0, 1, 2, 3, 4, 255} and (x[..., 5] == 255).any()
    with pytest.raises(ValueError, match="has class 255: raise --classes 5, or name a void class"):
        open_maps(tmp_path, False, classes=5)[0, 0]


def save(root, name, kind, **options):
    array = isinstance(kind, np.ndarray)
    image = Image.fromarray(kind) if array else Image.new(kind, options.pop("size", (48, 40)))
    image.save(root / name, **options)


def turned():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


@pytest.mark.parametrize("name, kind, options, message", [
    ("depth/train/1.png", "I;16", {"size": (10, 10)}, r"'rgb': \(40, 48\), 'depth': \(10, 10\)"),
    ("semseg/train/1.png", "RGB", {}, "is no semseg map, one channel of whole numbers < 2^8: 3-D"),
    ("depth/train/1.png", np.full((40, 48), 70000, np.int32), {"format": "TIFF"}, "70000"),
    ("depth/train/1.png", np.full((40, 48), 2.5, np.float32), {"format": "TIFF"}, "no depth map"),
    ("semseg/train/1.png", np.full((40, 48), 6, np.uint8), {}, "has class 6: raise --classes 6"),
    ("rgb/train/1.png", "RGB", {"exif": turned()}, "sizes differ .is one turned by EXIF"),
    ("depth/train/1.png", None, {}, "has no counterpart in .*depth")])
def test_wrong_maps_are_named(tmp_path, name, kind, options, message):
    write_maps(tmp_path)
    (tmp_path / name).unlink()
    if kind is not None:
        save(tmp_path, name, kind, **options)
    with pytest.raises(ValueError, match=message.replace("^", r"\^")):
        open_maps(tmp_path)[0, 1]


@pytest.mark.parametrize("m", MODALITIES)
def test_a_broken_map_is_named_and_another_sample_is_taken(tmp_path, m):
    write_maps(tmp_path)
    (tmp_path / m / "train/2.png").write_bytes(b"no image")
    pixels, i, problems = open_maps(tmp_path)[0, 2]
    assert i != 2 and "2.png" in problems[0][0] and "broken" in problems[0][1]


# ---- files of weights ----------------------------------------------------------------------------


def official(model):
    """The names of EPFL-VILAB/MultiMAE, with the frozen tables that public files hold."""
    state = {k.replace("blocks.", "encoder.") if k.startswith("blocks.") else k: v
             for k, v in model.state_dict().items()}
    h, w = model.grid[1:]
    for part, names, table in (("input", model.modalities, model.pos_embed),
                               ("output", model.tasks, model.decoder_pos_embed)):
        table = table.transpose(1, 2).unflatten(2, (h, w))
        state |= {f"{part}_adapters.{name}.pos_emb": table for name in names}
    return state


def test_a_public_file_tells_its_sizes_and_the_heads_are_a_guess():
    with torch.device("meta"):
        model = MultiMAE((224, 448), 16, "base")
        said, state, guesses = multimae.public_multimae(official(model))
    assert said == {"patch": 16, "size": "768x12x12", "decoder": "256x2x8", "img_size": "224x448",
                    "modalities": "rgb,depth,semseg", "classes": 133, "class_width": 64}
    assert set(state) == set(model.state_dict()) and guesses == ["size", "decoder"]


@pytest.mark.parametrize("part", ["whole", "encoder"])
def test_a_run_starts_from_a_public_file(toy, run, tmp_path, part):
    model = MultiMAE((16, 32), 8, (24, 1, 1), (16, 1, 8), ("rgb", "semseg"), 6, 4)
    state = official(model)
    state = {k: v for k, v in state.items() if part == "whole" or not k.startswith("output")}
    torch.save({"model": state, "epoch": 3}, tmp_path / "x.pth")
    flags = ["--data", toy, "--init", "x.pth", "--decoder", "16x1x8", "--workers", 0, "--lr", 0]
    text = run(multimae, *flags, "--smoke", "--pictures", 0)
    assert ("the decoder starts new" in text) == (part == "encoder")
    found = torch.load(tmp_path / "runs/multimae/checkpoint.pt")["model"]
    same = [torch.equal(found[k], v) for k, v in model.state_dict().items() if k in state or
            k.startswith("blocks")]
    assert all(same) and len(same) > 10


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


def test_a_classifier_of_another_size_is_resumed_and_tested(toy, run, tmp_path):
    run(multimae, *TINY, "--data", toy, "--smoke", "--pictures", 0)
    flags = ["--model", "multimae", "--data", toy, "--img-size", "24x16", "--smoke", "--workers", 0]
    trained = run(finetune, *flags, "--out", "other").splitlines()
    for more in (["--resume", "--out", "other"],
                 ["--eval-only", "--init", "other/checkpoint.pt", "--data", toy, "--out", "test"]):
        assert run(finetune, *more).splitlines()[-2] == trained[-2]  # the same test


@pytest.mark.parametrize("chosen", ["rgb,semseg", "depth"])
def test_a_missing_modality_is_no_hindrance(toy, run, tmp_path, chosen):
    run(multimae, *TINY, "--data", toy, "--modalities", chosen, "--smoke")
    picture = np.asarray(Image.open(tmp_path / "runs/multimae/pictures/update_000003.png"))
    assert picture.std() > 20


@pytest.mark.parametrize("task, chosen", [("semseg", "rgb"), ("semseg", "rgb,depth"),
                                          ("depth", "rgb")])
def test_a_linear_layer_paints_a_map_from_the_encoder(toy, run, refused, tmp_path, task, chosen):
    flags = ["--mode", "scratch", "--model", "multimae", "--size", "16x1x2", "--data", toy,
             "--img-size", 16, "--batch", 16, "--epochs", 1, "--warmup", 0, "--workers", 0,
             "--dense", task]
    assert f"done: {task}: " in run(finetune, *flags, "--inputs", chosen)
    scores = json.loads((tmp_path / "runs/finetune/results.json").read_text())
    assert scores["mean IoU" if task == "semseg" else "depth error"] >= 0 < scores["constant map"]
    assert "and other --inputs" in refused(finetune, *flags, "--inputs", task)


def test_a_map_that_pretraining_did_not_have_is_painted_and_broken_files_are_named(toy, run,
                                                                                   tmp_path):
    for part in ("rgb", "semseg", "depth"):
        shutil.copytree(toy / part, tmp_path / "world" / part)
    run(multimae, *TINY, "--data", "world", "--modalities", "rgb,semseg", "--smoke")
    bad = sorted((tmp_path / "world/rgb/val").rglob("*.jpg"))[0]
    bad.write_bytes(b"no image")
    flags = ["--init", "runs/multimae/checkpoint.pt", "--data", "world", "--workers", 0, "--smoke"]
    text = run(finetune, *flags, "--dense", "depth", "--share", 0.5)
    assert "done: depth: depth error" in text
    assert f"{bad.relative_to(tmp_path)}: broken, left out" in text


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
    (["--modalities", "rgb,flow"], "use any of rgb,depth,semseg"), (["--modalities", ","], "use any"),
    (["--img-size", 60], "height 60 is not a multiple of 8"), (["--decoder", "64x1x5"], "of 5"),
    (["--patch", 2, "--img-size", 16], "class maps have a quarter of the size: patch 2"),
    (["--data", "."], "No such file or directory: 'rgb'"), (["--visible", 1], "hides noth"),
    (["--classes", 3], "raise --classes 3"), (["--batch", 1000], "do not fill one update"),
    (["--init", "no.pth"], "no checkpoint"), (["--alpha", -1], "too small")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    base = [] if "--data" in flags else ["--data", toy]
    assert message in refused(multimae, *base, "--workers", 0, *flags)


def test_the_papers_masks_hide_five_sixths():
    """MultiMAE, public code: 98 of the 3 x 196 patches of 224 px are visible."""
    assert round(multimae.Config(**multimae.PRESETS["paper"]).visible * 588) == 98
