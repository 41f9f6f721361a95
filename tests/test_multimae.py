import copy
import json
import math
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import finetune
import masking
import multimae
from mae_image import load_weights, sincos_2d
from masking import InputError, dirichlet_mask
from multimae import MODALITIES, MultiMAE, masked_mean

TINY = ["--img-size", 16, "--patch", 8, "--size", "16x1x2", "--decoder-width", 16, "--decoder-heads", 2, "--class-width", 4,
        "--batch", 16, "--epochs", 2, "--warmup", 1, "--workers", 0, "--log-every", 1, "--pictures", 1, "--visible", 0.3]  # fmt: skip


def tiny(modalities=MODALITIES, **options):
    torch.manual_seed(0)
    return MultiMAE(32, 8, (32, 2, 4), (16, 1, 2), modalities, classes=6, class_width=4, **options)


def inputs(B=3, side=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"rgb": torch.randn(B, 3, side, side, generator=g), "depth": torch.randn(B, 1, side, side, generator=g),
            "semseg": torch.randint(0, 6, (B, side // 4, side // 4), generator=g)}  # fmt: skip


def mask(B=3, tokens=48, visible=8, seed=0):
    return dirichlet_mask(B, [16] * (tokens // 16), visible, torch.Generator().manual_seed(seed))


def test_the_class_embedding_is_the_strided_convolution_over_embedded_classes():
    model, x = tiny(), inputs()["semseg"]
    adapter = model.input_adapters["semseg"]
    want = adapter.proj(adapter.class_emb(x).movedim(-1, 1)).flatten(2).transpose(1, 2)
    assert torch.allclose(adapter(model.patches("semseg", x)), want, atol=1e-5)


def test_positions_are_maes_with_rows_and_columns_exchanged():
    ours, maes = multimae.sincos_rows_first(16, 3, 5)[0], sincos_2d(16, 3, 5)
    assert torch.equal(ours, torch.cat([maes[:, 8:], maes[:, :8]], dim=1))


def test_depth_is_standardised_by_its_middle():
    depth = torch.rand(2, 1, 10, 10) * 5 + 3
    values = sorted(depth[1].flatten().tolist())[10:90]
    mean = sum(values) / 80
    var = sum((v - mean) ** 2 for v in values) / 79
    assert torch.allclose(multimae.standardise_depth(depth)[1], (depth[1] - mean) / math.sqrt(var + 1e-6), atol=1e-4)
    assert torch.isfinite(multimae.standardise_depth(torch.ones(1, 1, 4, 4))).all()


def test_cross_attention_is_torchs_own():
    ours, theirs = multimae.CrossAttention(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    assert torch.allclose(ours(x, context), theirs(x, context, context)[0], atol=1e-5)


def test_hidden_tokens_of_no_modality_reach_the_encoder():
    model, x, hide = tiny(), inputs(), mask()
    other = {m: v.clone() for m, v in x.items()}
    for m, part in (("rgb", hide[:, :16]), ("depth", hide[:, 16:32])):
        for b, n in part.nonzero().tolist():
            other[m][b, :, n // 4 * 8 : n // 4 * 8 + 8, n % 4 * 8 : n % 4 * 8 + 8] = 9
    for b, n in hide[:, 32:].nonzero().tolist():
        other["semseg"][b, n // 4 * 2 : n // 4 * 2 + 2, n % 4 * 2 : n % 4 * 2 + 2] = 5
    assert all((other[m] != x[m]).any() for m in MODALITIES)
    assert torch.equal(model.forward_encoder(x, hide), model.forward_encoder(other, hide))


def test_losses_are_those_of_a_loop_over_samples_and_hidden_pixels():
    model, x, hide = tiny(), inputs(), mask()
    preds = model(x, hide)[1]
    losses = model.task_losses(preds, x, x, hide)
    for task, where, error in (
        ("rgb", hide[:, :16], lambda p, t: (p - t) ** 2),
        ("depth", hide[:, 16:32], lambda p, t: (p - t).abs()),
    ):
        target = model.target(task, x[task])
        rows = [error(preds[task][b][where[b]], target[b][where[b]]).mean().item() for b in range(3)]
        assert math.isclose(losses[task].item(), sum(rows) / len(rows), rel_tol=1e-5)
    rows = []
    for b in range(3):
        logits = preds["semseg"][b].reshape(16, 6, 4).transpose(1, 2)[hide[b, 32:]].reshape(-1, 6)
        rows.append(
            torch.nn.functional.cross_entropy(
                logits, model.target("semseg", x["semseg"])[b][hide[b, 32:]].flatten()
            ).item()
        )
    assert math.isclose(losses["semseg"].item(), sum(rows) / 3, rel_tol=1e-5)
    assert math.isclose(model(x, hide)[0].item(), sum(losses.values()).item(), rel_tol=1e-6)


def test_predictions_are_in_the_order_channel_row_column():
    model, x = tiny(), inputs(1)
    patch = x["rgb"][0, :, 8:16, 16:24]  # row 1, column 2 of the grid
    assert torch.equal(model.target("rgb", x["rgb"])[0, 6], patch.flatten())


@pytest.mark.parametrize("case", ["all visible of one", "nothing visible of one", "nothing hidden"])
def test_no_nan_when_a_modality_has_no_visible_or_no_hidden_token(case):
    model, x = tiny(), inputs()
    hide = torch.ones(3, 48, dtype=torch.bool)
    if case == "nothing hidden":
        hide[:] = False
    elif case == "all visible of one":
        hide[0, :16], hide[1, 16:32], hide[2, 32:] = False, False, False
    else:
        hide[:, :4] = False
    loss, _ = model(x, hide)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if case == "nothing hidden":
        assert loss == 0


def test_the_guarded_mean_leaves_empty_samples_out():
    error = torch.tensor([[1.0, 3.0], [5.0, 7.0]], requires_grad=True)
    count = torch.tensor([[True, True], [False, False]])
    masked_mean(error, count).backward()
    assert masked_mean(error, count) == 2 and torch.equal(error.grad, torch.tensor([[0.5, 0.5], [0, 0]]))


def test_any_subset_of_modalities_goes_in_and_every_task_comes_out():
    model, x = tiny(), inputs()
    for given in (["rgb"], ["depth"], ["semseg"], ["depth", "semseg"]):
        some = {m: x[m] for m in given}
        hide = mask(tokens=16 * len(given), visible=5)
        loss, preds = model(some, hide)
        assert set(preds) == {"rgb", "depth", "semseg", "norm_rgb"} and torch.isfinite(loss)
        assert model.encode(some).shape == (3, 16 * len(given) + 1, 32)
    assert torch.equal(model.encode(x["rgb"]), model.encode({"rgb": x["rgb"]}))
    larger = inputs(side=48)
    assert model.encode({"rgb": larger["rgb"], "semseg": larger["semseg"]}).shape == (3, 73, 32)


def test_wrong_inputs_are_named():
    model, x = tiny(), inputs()
    with pytest.raises(InputError, match="unknown modality flow: this model knows rgb, depth, semseg"):
        model({"flow": x["rgb"]}, mask(tokens=16))
    with pytest.raises(InputError, match="sizes must agree"):
        model({"rgb": x["rgb"], "depth": inputs(side=48)["depth"]}, mask(tokens=32))
    with pytest.raises(InputError, match="but a mask of 16"):
        model(x, mask(tokens=16))
    with pytest.raises(InputError, match="no modality given"):
        model({}, mask(tokens=16))


def test_void_has_no_part_in_the_loss():
    model, x, hide = tiny(ignore=5), inputs(), mask()
    preds = model(x, hide)[1]
    before = model.task_losses(preds, x, x, hide)["semseg"]
    preds["semseg"] = preds["semseg"].clone()
    void = model.target("semseg", x["semseg"]) == 5
    preds["semseg"].view(3, 16, 6, 4).transpose(2, 3)[void] += torch.randn(6) * 10
    assert torch.equal(model.task_losses(preds, x, x, hide)["semseg"], before)


def public(model):
    """State of our model under the public names, with the frozen tables that public files hold."""
    state = {
        k.replace("blocks.", "encoder.", 1) if k.startswith("blocks.") else k: v for k, v in model.state_dict().items()
    }
    table = lambda x: x.transpose(1, 2).unflatten(2, model.grid[1:])
    state |= {f"input_adapters.{m}.pos_emb": table(model.pos_embed) for m in model.modalities}
    return state | {f"output_adapters.{t}.pos_emb": table(model.decoder_pos_embed) for t in model.tasks}


def timm(model):
    """The RGB encoder alone, as a plain ViT: token and its row of zeros in front."""
    zero = torch.zeros(1, 1, model.pos_embed.shape[2])
    state = {k: v for k, v in model.state_dict().items() if k.startswith("blocks.")}
    state |= {f"patch_embed.proj.{k}": getattr(model.input_adapters["rgb"].proj, k) for k in ("weight", "bias")}
    return state | {"cls_token": model.global_tokens, "pos_embed": torch.cat([zero, model.pos_embed], dim=1)}


def test_public_files_load_with_all_adapters_and_as_a_plain_vit(tmp_path):
    model, other = tiny(), MultiMAE(32, 8, (32, 2, 4), (16, 1, 2), MODALITIES, classes=6, class_width=4)
    torch.save({"model": public(model), "epoch": 3}, tmp_path / "multivit.pth")
    assert "tensors used" in load_weights(other, tmp_path / "multivit.pth", "multimae")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    rgb = tiny(("rgb",))
    torch.save({"model": timm(model)}, tmp_path / "timm.pth")
    assert "of the decoder start fresh" in load_weights(rgb, tmp_path / "timm.pth", "multimae")
    x = inputs()["rgb"]
    assert torch.equal(rgb.encode(x), model.encode(x))


@pytest.mark.parametrize("layout, chosen", [("multivit", "rgb"), ("multivit", "rgb,depth"), ("timm", "rgb")])
def test_finetune_takes_public_files(tmp_path, layout, chosen):
    torch.manual_seed(0)
    model = MultiMAE(32, 8, (64, 2, 1), (16, 1, 2), MODALITIES, classes=6, class_width=4)
    torch.save({"model": public(model) if layout == "multivit" else timm(model)}, tmp_path / "x.pth")
    found = finetune.read_init(tmp_path / "x.pth")
    got, said = finetune.build(cfg := finetune.settle(finetune.Config(init="x.pth", inputs=chosen), found), 5, found)
    x = {m: v for m, v in inputs().items() if m in chosen.split(",")}
    x = x["rgb"] if layout == "timm" else x
    tokens = model.encode(x)  # the global token last; as a plain ViT it is in front, and left out of the mean
    want = tokens.mean(dim=1) if layout == "multivit" else tokens[:, :-1].mean(dim=1)
    assert cfg.model == ("multimae" if layout == "multivit" else "mae") and "tensors used" in said
    assert torch.allclose(got.eval().features(x), got.norm(want), atol=1e-5)


# ---- data -------------------------------------------------------------------------------------------------------


def write_maps(root, count=6, size=(40, 48), depth_bits=16):
    """Aligned maps in which every pixel says where it is: all three hold column // 8."""
    place = np.broadcast_to(np.arange(size[1]) // 8, size)
    for i in range(count):
        for split in ("train", "val"):
            for m in MODALITIES:
                path = root / m / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if m == "rgb":
                    Image.fromarray(np.stack([place * 40] * 3, -1).astype(np.uint8)).save(path)
                elif m == "depth" and depth_bits == 16:
                    Image.fromarray((place * 10000).astype(np.uint16)).save(path)
                elif m == "depth":
                    Image.fromarray((place * 40).astype(np.uint8)).save(path)
                else:
                    image = Image.fromarray(place.astype(np.uint8))
                    image.putpalette([7 * k % 256 for k in range(768)])  # a palette image: numbers, not colours
                    image.save(path)


def open_maps(root, train=True, modalities=MODALITIES, classes=6):
    return multimae.AlignedDataset(
        root, multimae.list_aligned(root, "train", modalities), list(modalities), 32, classes, 0, 0.3, True, train
    )


@pytest.mark.parametrize("bits", [8, 16])
def test_one_crop_and_one_flip_for_all_modalities_and_no_mixed_classes(tmp_path, bits):
    write_maps(tmp_path, depth_bits=bits)
    dataset = open_maps(tmp_path)
    for epoch in range(6):
        x = dataset[epoch, 1][0][0].long()  # (32, 32, 6)
        depth, classes = x[..., 3] * 256 + x[..., 4], x[..., 5]
        assert set(classes.unique().tolist()) <= set(range(6))
        inside = torch.nn.functional.max_pool2d(classes[None].float(), 5, 1, 2) == -torch.nn.functional.max_pool2d(
            -classes[None].float(), 5, 1, 2
        )
        unit = 10000 if bits == 16 else 40 * 257
        assert ((depth - classes * unit).abs() < unit / 4)[inside[0]].all() and ((x[..., 0] - classes * 40).abs() < 10)[
            inside[0]
        ].all()
    assert torch.equal(dataset[0, 1][0], dataset[0, 1][0]) and not torch.equal(dataset[0, 1][0], dataset[1, 1][0])


def test_maps_become_inputs_and_depth_keeps_its_16_bits(tmp_path):
    write_maps(tmp_path)
    model, x = tiny(), open_maps(tmp_path, train=False)[0, 0][0]
    got = model.normalize(x)
    assert {m: tuple(v.shape) for m, v in got.items()} == {
        "rgb": (1, 3, 32, 32),
        "depth": (1, 1, 32, 32),
        "semseg": (1, 8, 8),
    }
    raw = (x[..., 3].float() * 256 + x[..., 4]) / 65536
    assert torch.equal(got["depth"], multimae.standardise_depth(raw[:, None])) and torch.equal(
        got["semseg"], x[:, 2::4, 2::4, 5].long()
    )


def test_wrong_maps_are_named(tmp_path):
    write_maps(tmp_path)
    with pytest.raises(InputError, match=r"has class 5, the model 0 to 3: --classes"):
        open_maps(tmp_path, False, classes=4)[0, 0]
    (tmp_path / "depth/train/0.png").unlink()
    with pytest.raises(InputError, match="has no counterpart in .*depth"):
        open_maps(tmp_path)[0, 0]
    Image.new("I;16", (10, 10)).save(tmp_path / "depth/train/0.png")
    with pytest.raises(InputError, match="modalities of different sizes: rgb 48x40, depth 10x10"):
        open_maps(tmp_path)[0, 0]
    Image.new("RGB", (48, 40)).save(tmp_path / "semseg/train/1.png")
    with pytest.raises(InputError, match="one channel of whole numbers is needed"):
        open_maps(tmp_path)[0, 1]
    for depth, message in (((2.5, np.float32), "2-D float32 is no depth map"), ((70000, np.int32), "70000, 16 bits hold")):
        Image.fromarray(np.full((40, 48), *depth)).save(tmp_path / "depth/train/2.tif")
        with pytest.raises(InputError, match=message):  # not rounded or cut off unseen
            multimae.read_map(tmp_path / "depth/train/2.tif", "depth")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    Image.new("RGB", (48, 40)).save(tmp_path / "rgb/train/1.png", exif=turned)
    with pytest.raises(InputError, match="1.png is turned by EXIF"):
        open_maps(tmp_path, modalities=("rgb", "depth"))[0, 1]
    (tmp_path / "rgb/train/2.png").write_bytes(b"no image")  # broken is not wrong: named, and another one taken
    (tmp_path / "depth/train/0.png").unlink()
    dataset = open_maps(tmp_path, modalities=("rgb",))
    assert "2.png" in dataset[0, 2][2][0][0]


def test_void_has_no_share_in_the_constant_map():
    model = multimae.MultiMAE(8, 8, (12, 1, 3), (12, 1, 3), ["semseg"], classes=3, class_width=4, ignore=2)
    reference = {"semseg": torch.tensor([[[2, 2], [0, 1]], [[2, 2], [0, 1]], [[1, 0], [0, 1]]])}  # (3, 2, 2)
    best = multimae.constant_maps(model, reference)["semseg"].reshape(3, 4).argmax(dim=0)
    assert best.tolist() == [1, 0, 0, 1]
    losses = model.task_losses({"semseg": torch.zeros(3, 1, 12)}, reference, reference, torch.ones(3, 1, dtype=bool))
    assert math.isclose(losses["semseg"], math.log(3), rel_tol=1e-6)


def test_constant_maps_are_the_best_that_looks_at_nothing():
    model, x = tiny(), inputs(5)
    maps = multimae.constant_maps(model, x)
    assert torch.allclose(maps["rgb"].unflatten(2, (3, 64)), x["rgb"].mean(dim=(0, 2, 3))[:, None], atol=1e-6)
    assert torch.equal(maps["depth"][0, 6], x["depth"][:, 0, 8:16, 16:24].flatten(1).median(dim=0).values)
    assert not maps["norm_rgb"].any()
    of_place = [x["semseg"][:, 2 + k // 2, 4 + k % 2].bincount(minlength=6) / 5 for k in range(4)]  # row 1, column 2
    got = maps["semseg"][0, 6].unflatten(0, (6, 4)).softmax(dim=0)
    assert torch.allclose(got, (torch.stack(of_place, dim=1) + 1e-3) / 1.006, atol=1e-6)


def test_what_one_modality_tells_of_the_others_is_counted_as_in_a_loop(monkeypatch):
    """Where the constant map is right, and where it is void, does not count; shuffled: the input of a sample half the set away."""
    model, x = tiny(ignore=5), inputs(4)
    constant = multimae.constant_maps(model, x)
    preds, numbers = multimae.paint_from(model, "rgb", x["rgb"]), multimae.cross_modal(model, x, "rgb", constant)
    alone = lambda rgb: model.forward_decoder(model.forward_encoder({"rgb": rgb}, torch.zeros(4, 16, dtype=torch.bool)),
                                              {"rgb": rgb}, torch.zeros(4, 16, dtype=torch.bool))  # fmt: skip
    other = alone(x["rgb"][[2, 3, 0, 1]])
    assert all(torch.allclose(preds[t], p, atol=1e-6) for t, p in alone(x["rgb"]).items())
    target, truth = model.target("depth", x["depth"]), model.target("semseg", x["semseg"])
    errors = [(a["depth"] - target).abs().mean().item() for a in (preds, constant, other)]
    assert np.allclose(numbers["depth error"], errors, rtol=1e-5)
    named = lambda a: a["semseg"].reshape(len(a["semseg"]), 16, 6, 4).argmax(dim=2).expand(4, -1, -1)
    where = [i for i in np.ndindex(4, 16, 4) if truth[i] != 5 and truth[i] != named(constant)[i]]
    recall = [np.mean([bool(named(a)[i] == truth[i]) for i in where]) for a in (preds, other)]
    assert np.allclose(numbers["object recall"], [recall[0], 0, recall[1]]) and len(where) > 50
    assert set(multimae.cross_modal(model, x, "depth", constant)) == {"object recall"}


def test_the_dense_head_averages_the_tokens_at_one_place_and_leaves_the_global_one_out():
    model, x = tiny(), inputs()
    encoder = copy.deepcopy(model)
    head = finetune.DenseHead(finetune.Classifier(model, 6), ["rgb", "depth"], "semseg").eval()
    tokens = encoder.encode({m: x[m] for m in ("rgb", "depth")})  # (3, 16 + 16 + 1, 32)
    want = torch.stack([torch.stack([(tokens[b, n] + tokens[b, 16 + n]) / 2 for n in range(16)]) for b in range(3)])
    assert torch.allclose(head(x), head.head(head.norm(want)), atol=1e-5)
    found, truth = head.answers(x).chunk(2, dim=1)
    assert torch.equal(found, head(x).reshape(3, 16, 6, 4).argmax(dim=2).flatten(1).float())
    assert torch.equal(truth, model.target("semseg", x["semseg"]).flatten(1).float())


# ---- the script -------------------------------------------------------------------------------------------------


def test_the_script_trains_draws_resumes_and_finetune_takes_its_checkpoint(toy, run, tmp_path):
    text = run("multimae.py", *TINY, "--data", toy)
    folder = tmp_path / "runs/multimae"
    assert "rgb alone: object recall" in text and "constant" in text and "done: " in text
    assert np.asarray(Image.open(sorted((folder / "pictures").glob("*.png"))[-1])).std() > 20
    scores = json.loads([x for x in (folder / "log.jsonl").read_text().splitlines() if "val_loss" in x][-1])
    assert {"rgb_loss", "depth_constant", "object recall shuffled"} <= set(scores)
    assert "done: " in run("multimae.py", "--resume")
    for chosen in ("rgb", "rgb,depth"):
        text = run("finetune.py", "--init", folder / "checkpoint.pt", "--data", toy, "--inputs", chosen, "--batch", 8,
                   "--workers", 0, "--smoke", "--out", chosen)  # fmt: skip
        assert "tensors used" in text and "done: top-1" in text


def test_a_missing_modality_is_no_hindrance(toy, run, tmp_path):
    assert "done: " in run("multimae.py", *TINY, "--data", toy, "--modalities", "rgb,semseg", "--smoke")
    assert "done: " in run("multimae.py", *TINY, "--data", toy, "--modalities", "depth", "--smoke")
    assert np.asarray(Image.open(tmp_path / "runs/multimae/pictures/update_000003.png")).std() > 20


def test_street_scenes_train(real, run, tmp_path):
    archive = real / "camvid128.tar.gz"
    if not archive.is_file():
        pytest.skip("MAE_TEST_DATA has no camvid128.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    flags = ["--data", "camvid128", "--modalities", "rgb,semseg", "--classes", 12, "--ignore", 11]
    assert "done: " in run("multimae.py", *TINY, *flags, "--smoke")
    assert "the model 0 to 5" in run("multimae.py", *TINY, *flags, "--classes", 6, "--ignore", -1, "--out", "x", code=2)


@pytest.mark.parametrize("flags, message", [
    (["--modalities", "rgb,flow"], "unknown modality flow"), (["--modalities", ","], "is empty"), (["--img-size", 60], "use --img-size 56 or 64"),
    (["--patch", 2, "--img-size", 16], "is not a multiple of the stride of class maps 4"), (["--decoder-heads", 5], "multiple of 5 heads"),
    (["--data", "."], "has no folder rgb/"), (["--classes", 3], "the model 0 to 2"), (["--ignore", 6], "--classes 6 allows 0 to 5"), (["--visible", 1.0], "must be"), (["--visible", 0.999], "lower --visible"), (["--batch", 1000], "do not fill"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(multimae, *([] if "--data" in flags else ["--data", toy]), "--workers", 0, *flags)


def test_the_papers_masks_hide_five_sixths():
    """MultiMAE, public code: 98 of the 3 x 196 patches of 224 px are visible."""
    assert round(multimae.Config(**multimae.PRESETS["paper"]).visible * 588) == 98
    hide = dirichlet_mask(4, [196] * 3, 98, torch.Generator().manual_seed(0))
    assert ((~hide).sum(dim=1) == 98).all() and masking.visible(torch.zeros(4, 588, 1), hide).shape == (4, 98, 1)


@pytest.mark.parametrize("task, chosen", [("semseg", "rgb"), ("semseg", "rgb,depth"), ("depth", "rgb")])
def test_a_linear_layer_paints_a_map_from_the_encoder(toy, run, tmp_path, task, chosen):
    flags = ["--mode", "scratch", "--model", "multimae", "--size", "16x1x2", "--data", toy, "--img-size", 16, "--inputs", chosen,
             "--dense", task, "--batch", 16, "--epochs", 1, "--warmup", 0, "--workers", 0, "--check-every", 0]  # fmt: skip
    text = run("finetune.py", *flags)
    assert "done: " + task in text
    scores = json.loads((tmp_path / "runs/finetune/results.json").read_text())
    assert 0 <= scores["mean IoU" if task == "semseg" else "depth error"] and 0 < scores["constant map"] < 1
    assert "nothing would be left to do" in run("finetune.py", *flags, "--inputs", task, code=2)
    again = ["finetune.py", "--data", toy, "--eval-only", "--init", "runs/finetune/checkpoint.pt"]
    assert f"paints {task} maps and is no classifier" in run(*again, code=2)


def test_a_probe_and_a_head_for_a_map_that_pretraining_did_not_have(toy, run):
    run("multimae.py", *TINY, "--data", toy, "--modalities", "rgb,semseg", "--smoke", "--out", "pre")
    flags = ["--data", toy, "--init", "pre/checkpoint.pt", "--batch", 16, "--epochs", 1, "--warmup", 0, "--workers", 0,
             "--check-every", 0]  # fmt: skip
    for mode in ("linear", "knn"):
        assert "done: top-1" in run("finetune.py", *flags, "--mode", mode, "--out", mode)
    assert "done: depth error" in run("finetune.py", *flags, "--dense", "depth", "--share", 0.5, "--out", "depth")


def test_a_map_with_other_classes_than_in_pretraining_is_painted_and_broken_files_are_named(toy, run, refused, tmp_path):
    run("multimae.py", *TINY, "--data", toy, "--smoke", "--out", "pre")
    shutil.copytree(toy / "rgb", tmp_path / "more/rgb")
    for path in (toy / "semseg").rglob("*.png"):
        target = (tmp_path / "more" / path.relative_to(toy)).with_suffix(".PNG")  # in capitals, as some cameras write
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path)) * 4).save(target)
    bad = sorted((tmp_path / "more/rgb/val").rglob("*.jpg"))
    bad[0].write_bytes(b"no image")
    flags = ["--init", "pre/checkpoint.pt", "--data", "more", "--workers", 0, "--smoke", "--dense", "semseg"]
    text = run("finetune.py", *flags, "--maps", 21, "--out", "ft")
    assert f"test: 15 files, 1 files unreadable and left out: {bad[0].relative_to(tmp_path)}" in text
    assert json.loads((tmp_path / "ft/results.json").read_text())["unreadable"] == 1
    assert "the model 0 to 5: --classes, in finetune.py --maps" in run("finetune.py", *flags, "--out", "x", code=1)
    said = refused(finetune, *flags[:-2], "--inputs", "rgb,semseg", "--maps", 21, "--out", "x")
    assert "--maps 21: the model in pre/checkpoint.pt has 6" in said
    for path in bad:
        path.write_bytes(b"no image")
    said = run("finetune.py", *flags, "--maps", 21, "--out", "none", code=2)
    assert "not one test file could be read" in said
