"""Open to what people have: export, attention maps, public files; differences.md."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import finetune
import mae_image
import mae_video
import multimae
import omni
from conftest import ROOT
from layouts import official_mae, official_omni, official_videomae
from masking import hidden, tube_mask
from test_multimae import official as official_multimae

# Each model's script, and its weights as the paper's code writes them.
KINDS = {"mae": (mae_image, official_mae), "videomae": (mae_video, official_videomae),
         "mae_st": (mae_video, torch.nn.Module.state_dict), "omni": (omni, official_omni),
         "multimae": (multimae, official_multimae)}
each_kind = pytest.mark.parametrize("kind", [*KINDS, "omni image"])


def build(kind, size=(16, 32)):
    options = {"classes": 6, "class_width": 4} if kind == "multimae" else {}
    shape = (size, 8) if kind in ("mae", "multimae") else (4, size, 2, 8)
    return filled(finetune.MODELS[kind.split()[0]](*shape, (24, 2, 2), (16, 1, 2), **options))


def filled(model):
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1)
        if name.endswith("qkv.bias") and isinstance(model, mae_video.VideoMAE):
            p.data.chunk(3)[1].zero_()  # of its keys: public files have none
    return model.eval()


def sample(kind, batch=2, size=(16, 32), frames=4):
    frames = [frames] * (kind in ("videomae", "mae_st", "omni"))
    return torch.randn(batch, 3, *frames, *size, generator=data.seeded(batch))


@each_kind
def test_the_readmes_heat_map_of_attention_is_that_of_torchs_own_module(kind):
    (lines,) = re.findall("# Attention of the.*?\n\n", (ROOT / "README.md").read_text(), re.S)
    model, x, tokens = build(kind), sample(kind), []
    last = model.blocks[-1]
    last.norm1.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    lines = lines.replace("model.normalize(clip[None])", "x")
    exec(lines, scope := {"torch": torch, "model": model, "x": x})
    attention = torch.nn.MultiheadAttention(24, 2, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = last.attn.qkv.weight, last.attn.qkv.bias
    weights = attention(*tokens * 3)[1]  # (B, tokens, tokens), the mean over heads
    row = weights[:, 0, 1:] if kind in ("mae", "mae_st") else weights.mean(dim=1)
    row = row[:, : 16 if x.ndim == 5 else 8]  # MultiMAE's global token comes last
    assert torch.allclose(scope["heat"], row.reshape(2, -1, 2, 4), atol=1e-6)


def begun(module, path, *flags):  # -> settings of a script, what is in the file
    about = module.Config, module.PRESETS, module.__doc__, finetune.READERS
    return mae_image.begin(*about, ["--init", str(path), *map(str, flags)])[:2]


def tuned(path, *flags):
    """The classifier that finetune.py makes of a file."""
    cfg, found = begun(finetune, path, *flags)
    if cfg.eval_only:
        finetune.as_it_was_built(cfg, found)
    return finetune.build(cfg, 5, found).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place, prefix", [
    ("", "module."), ("model", "_orig_mod."), ("module", "module._orig_mod."),
    ("state_dict", "model."), ("model_state_dict", ""), ("model_ema", "")])
def test_public_files_are_read_however_wrapped(kind, place, prefix, tmp_path, toy, run):
    model, x, path, (module, layout) = build(kind), sample(kind), tmp_path / "x.pth", KINDS[kind]
    own, state = model.state_dict(), {prefix + k: v for k, v in layout(model).items()}
    torch.save({"epoch": 3} | ({place: state} if place else state), path)
    flags = ["--img-size", "16x32", "--size", "24x2x2", *["--frames", 4] * (x.ndim == 5)]
    more = ["--data", toy, "--epochs", 0, "--pictures", 0, *["--images", toy] * (kind == "omni")]
    run(module, "--init", path, *flags, "--decoder", "16x1x2", *more, "--out", "x")
    found = torch.load(tmp_path / "x/checkpoint.pt", weights_only=True)["model"]
    assert found.keys() == own.keys() and all(torch.equal(found[k], own[k]) for k in own)
    model.norm = torch.nn.Identity()  # a classifier's comes after the pooling
    assert torch.allclose(tuned(path, *flags).encoder.encode(x), model.encode(x), atol=1e-6)


HF = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256,
          image_size=32, patch_size=8, layer_norm_eps=1e-6, num_labels=5, norm_pix_loss=True,
          decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_intermediate_size=256)
SHAPE, SIZE = dict(size=(32, 32), frames=16), ["--img-size", 32]  # VideoMAE's files tell neither


def hugging(name, folder, ending, mean=False):
    """-> a model of transformers, filled, its file: .bin has the names of transformers 5."""
    package, heads = pytest.importorskip("transformers"), 1 if "Video" in name else 16
    config = getattr(package, name.split("For")[0] + "Config")
    config = config(**HF, decoder_num_attention_heads=heads, use_mean_pooling=mean)
    model = filled(getattr(package, name)(config))
    for norm in [x for x in model.modules() if isinstance(x, torch.nn.LayerNorm)]:
        norm.eps = 1e-6  # VideoMAE's fc_norm and decoder.norm have 1e-5 there alone
    for key, x in model.state_dict().items():
        if key.endswith(("position_embeddings", "decoder_pos_embed")):  # zeros in a new model
            x.copy_(torch.nn.functional.pad(mae_image.sincos_2d(64, 4, 4), (0, 0, 1, 0)))
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "model.bin")
    return model, folder / f"model{ending}"


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("name, mean", [  # mean: no final norm in pretraining
    ("ViTMAEForPreTraining", False), ("ViTForImageClassification", False),
    ("VideoMAEForPreTraining", False), ("VideoMAEForPreTraining", True),
    ("VideoMAEForVideoClassification", False), ("VideoMAEForVideoClassification", True)])
def test_huggingfaces_models_give_the_same_numbers(name, mean, ending, tmp_path):
    kind = "videomae" if "Video" in name else "mae"
    (theirs, path), x = hugging(name, tmp_path, ending, mean), sample(kind, **SHAPE)
    frames = x.transpose(1, 2) if x.ndim == 5 else x
    if "Classification" in name:
        want, answers = theirs(frames).logits, tuned(path, "--eval-only", *SIZE)(x)
        assert want.std() > 0.05 and torch.allclose(answers, want, atol=1e-5)
        return
    cfg, found = begun(KINDS[kind][0], path, *SIZE)
    shape = [16, 32, 2, 8] if x.ndim == 5 else [32, 8]
    ours = finetune.MODELS[kind](*shape, *mae_image.shapes(cfg)[1:], cfg.norm_pix).eval()
    mae_image.load_pretrained(ours, found, resume=False)
    mask = tube_mask(2, ours.grid, 0.75, data.seeded(0))
    if kind == "mae":
        want = theirs(x, noise=mask + torch.arange(16) / 32)  # hidden ones last, in raster order
        want.logits = hidden(want.logits, mask)
    else:
        want = theirs(frames, bool_masked_pos=mask)
    loss, pred = ours(x, mask)
    assert torch.allclose(loss, want.loss, atol=1e-6) and pred.std() > 0.01
    assert torch.allclose(pred, want.logits, atol=1e-5)


def test_a_pretraining_without_final_norm_resumes_and_is_fine_tuned(tmp_path, toy, run):
    state = official_videomae(build("videomae", (16, 16)))
    torch.save({k: v for k, v in state.items() if "encoder.norm." not in k}, tmp_path / "x.pth")
    flags, sizes = ["--data", toy, "--smoke", "--workers", 0], ["--frames", 4, "--img-size", 16]
    run(mae_video, *flags, *sizes, "--size", "24x2x2", "--decoder", "16x1x2", "--init", "x.pth")
    assert "resumed" in run(mae_video, "--resume")
    assert "top-1" in run(finetune, *flags, "--clips", 1)


@each_kind
def test_fixed_tables_are_stored_with_a_classifier_whose_head_begins_near_zero(kind):
    assert any("pos_embed" in x for x in build(kind).state_dict()) == (kind == "mae_st")  # learnt
    model = finetune.Classifier(build(kind), 400)
    assert any("encoder.pos_embed" in name for name in model.state_dict())
    assert abs(model.head.weight.std().item() - 2e-5) < 1e-6 and not model.head.bias.any()
    filled(model)  # and it can be exported, for any batch
    any_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (sample(kind),), dynamic_shapes=any_batch).module()
    for x in (sample(kind, 1), sample(kind, 5)):
        assert torch.allclose(program(x), model(x), atol=1e-5)


def test_the_class_decoder_has_the_precision_of_the_rest():
    model, inputs = build("multimae"), {"rgb": sample("multimae")}
    with torch.autocast("cpu", torch.bfloat16):
        preds = model.forward_decoder(model.encode(inputs), inputs)
    assert len(preds) == 4 and {x.dtype for x in preds.values()} == {torch.bfloat16}


def test_random_crops_have_the_area_asked_for_and_repeated_clips_frames_of_their_own():
    files = data.Files(["x"], [0], ["x"])
    images = data.ImageDataset(files, mae_image.Config(img_size="16x32"), True)
    for i in range(300):
        top, left, h, w = images.draw_box((120, 160), data.seeded(i))
        assert 0 <= top <= top + h <= 120 and 0 <= left <= left + w <= 160
        assert h * w > 0.19 * 120 * 160 and 1.45 < w / h < 2.75  # 2 x 3/4 .. 4/3, rounded
    for how in ("dense", "linspace", "segments"):
        cfg = mae_video.Config(frames=8, stride=4, sampling=how, img_size="16", repeat=4)
        clips = mae_video.ClipDataset(files, cfg, True).choose(300, data.seeded(0))
        assert len(np.unique(clips, axis=0)) == 4


def test_an_image_is_tested_on_its_whole_centre_and_resized_depth_does_not_overshoot(tmp_path):
    (tmp_path / "depth").mkdir()
    files = data.Files([str(tmp_path / "depth/a.png")], [0], ["x"])
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(files.paths[0])
    cfg = finetune.Config(model="mae", img_size="20", clips=5, crops=3)
    assert np.array_equal(finetune.ViewDataset(files, cfg, False)[0][0], pixels[None, :, 5:25])
    Image.fromarray(np.array([[20000] * 6 + [40000] * 6] * 12, np.uint16)).save(files.paths[0])
    cfg = multimae.Config(data=tmp_path, img_size="30")
    maps = multimae.AlignedDataset(files, ["depth"], cfg, False)[0, 0][0].int()
    depth = 256 * maps[..., 0] + maps[..., 1]
    assert depth.min() == 20000 and depth.max() == 40000 and len(depth.unique()) > 2


def test_presets_flip_and_hide_as_the_list_says():
    assert {"mask_ratio_image": 0.9, "mask_ratio": 0.95}.items() <= omni.PRESETS["paper"].items()
    assert mae_video.Config.flip and not mae_video.PRESETS["ucf101_paper"]["flip"]


def test_every_difference_names_a_place_and_a_test_that_exist():
    text = (ROOT / "tests/differences.md").read_text().split("## The same thing")[0]
    lines = re.findall(r"^\| (?!-|there \|)(.*) \|$", text, re.M)
    for line in lines:
        for cell, folder in zip(line.split(" | ")[2:], (ROOT, ROOT / "tests"), strict=True):
            file, name = re.fullmatch(r"`(\w+\.py): ([\w.]+)`", cell).groups()
            for part in name.split("."):  # a class and its method
                there = rf"^ *(def|class) {part}\b|^{part} = "
                assert re.search(there, (folder / file).read_text(), re.M), cell
    assert len(lines) > 35 and sum(p.read_text().count("DIFFERS") for p in ROOT.glob("*.py")) == 7
