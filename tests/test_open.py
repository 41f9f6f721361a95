"""Open to what people have: export, attention maps, public files, any channels; differences.md."""

import argparse
import re
from pathlib import Path

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
from masking import hidden, random_mask, tube_mask
from test_multimae import official as official_multimae

SCRIPTS = {"mae": mae_image, "videomae": mae_video, "mae_st": mae_video, "omni": omni,
           "multimae": multimae}
each_kind = pytest.mark.parametrize("kind", [*SCRIPTS, "omni image"])
each_model = pytest.mark.parametrize("kind", list(SCRIPTS))


def build(kind, size=(16, 32), **options):
    """Patches of 8 pixels, clips of 4 frames, random weights."""
    options |= {"classes": 6, "class_width": 4} if kind == "multimae" else {}
    shape = (size, 8) if kind in ("mae", "multimae") else (4, size, 2, 8)
    return filled(finetune.MODELS[kind.split()[0]](*shape, (24, 2, 2), (16, 1, 2), **options))


def filled(model):
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1)
        if name.endswith("qkv.bias") and isinstance(model, mae_video.VideoMAE):
            p.data.chunk(3)[1].zero_()  # of its keys: public files have none
    return model.eval()


def sample(kind, batch=2, channels=3, size=(16, 32), frames=4):
    frames = [frames] * (kind in ("videomae", "mae_st", "omni"))
    return torch.randn(batch, channels, *frames, *size, generator=data.seeded(batch))


@each_kind
@pytest.mark.parametrize("what", ["encoder", "classifier"])
def test_encoder_and_classifier_are_exported_for_any_batch(kind, what):
    model = build(kind)
    model.forward = model.encode
    model = model if what == "encoder" else filled(finetune.Classifier(model, 5))
    any_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (sample(kind),), dynamic_shapes=any_batch)
    inputs = sample(kind, 1), sample(kind, 5)
    assert all(torch.allclose(program.module()(x), model(x), atol=1e-5) for x in inputs)
    if what == "classifier":
        pytest.importorskip("onnxscript")
        reference = pytest.importorskip("onnx.reference")
        written = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
        session = reference.ReferenceEvaluator(written.model_proto)
        for x in inputs:
            (logits,) = session.run(None, {session.input_names[0]: x.numpy()})
            assert torch.allclose(torch.tensor(logits), model(x), atol=1e-5)


@each_kind
def test_the_readmes_heat_map_of_attention_is_that_of_torchs_own_module(kind):
    (lines,) = re.findall("# Attention of the.*?\n\n", (ROOT / "README.md").read_text(), re.S)
    model, x, tokens = build(kind), sample(kind), []
    last = model.blocks[-1]
    last.norm1.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    scope = {"torch": torch, "model": model, "x": x}
    exec(lines.replace("model.normalize(clip[None])", "x"), scope)
    attention = torch.nn.MultiheadAttention(24, 2, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = last.attn.qkv.weight, last.attn.qkv.bias
    weights = attention(*tokens * 3)[1]  # (B, tokens, tokens), the mean over heads
    row = weights[:, 0, 1:] if kind in ("mae", "mae_st") else weights.mean(dim=1)
    slots = 2 if x.ndim == 5 else 1
    want = row[:, : 8 * slots].reshape(2, slots, 2, 4)  # MultiMAE's global token comes last
    assert torch.allclose(scope["heat"], want, atol=1e-6)


def started(monkeypatch, module, path, *flags):
    """The model with which a pretraining script starts from a file."""
    load = mae_image.load_pretrained

    def stop(model, found, resume):
        load(model, found, resume)
        raise InterruptedError(model)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError) as caught:
        patch.setattr(module, "load_pretrained", stop)
        module.main(["--init", str(path), *map(str, flags)])
    return caught.value.args[0].eval()


def tuned(path, *flags):
    """The classifier that finetune.py makes of a file."""
    flags = ["--init", str(path), *map(str, flags)]
    cfg, found, _ = mae_image.begin(finetune.Config, finetune.PRESETS, finetune.__doc__,
                                    finetune.READERS, flags, finetune.default_file)
    cfg = finetune.as_it_was_built(cfg, found) if cfg.eval_only else cfg
    return finetune.build(cfg, 5, found)[0].eval()


# Weights as the papers' code writes them.
PUBLIC = {"mae": official_mae, "videomae": official_videomae, "mae_st": torch.nn.Module.state_dict,
          "omni": official_omni, "multimae": official_multimae}


@each_model
@pytest.mark.parametrize("place, prefix", [
    ("", "module."), ("model", "_orig_mod."), ("module", "module._orig_mod."),
    ("state_dict", "model."), ("model_state_dict", ""), ("model_ema", "")])
def test_public_files_of_rectangles_are_read_however_wrapped(
        kind, place, prefix, tmp_path, monkeypatch):
    model, x, path = build(kind), sample(kind), tmp_path / "x.pth"
    state = {prefix + name: value for name, value in PUBLIC[kind](model).items()}
    more = {"best": np.float64(0.5), "out": Path("a"), "args": argparse.Namespace(out=Path("b"))}
    torch.save({place: state} | more if place else state | more, path)
    flags = ["--img-size", "16x32", "--size", "24x2x2", *["--frames", 4] * (x.ndim == 5)]
    found = started(monkeypatch, SCRIPTS[kind], path, *flags, "--decoder", "16x1x2").state_dict()
    own = model.state_dict()
    assert found.keys() == own.keys() and all(torch.equal(found[k], own[k]) for k in own)
    model.norm = torch.nn.Identity()  # a classifier's comes after the pooling
    assert torch.allclose(tuned(path, *flags).encoder.encode(x), model.encode(x), atol=1e-6)
    if kind == "mae":
        with pytest.raises(ValueError, match="pos_embed"):
            tuned(path, "--img-size", "16x40", *flags[2:])


@pytest.mark.parametrize("module", [omni, finetune])
def test_of_an_unknown_file_the_first_names_are_shown(module, tmp_path, refused):
    torch.save({"model": {"a.weight": torch.ones(1), "b": torch.ones(1)}}, tmp_path / "x.pth")
    assert "a.weight, b, model" in refused(module, "--init", "x.pth")


HF = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256,
          image_size=32, patch_size=8, layer_norm_eps=1e-6, num_labels=5, norm_pix_loss=True,
          decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_intermediate_size=256,
          num_frames=16, tubelet_size=2)
SHAPE, SIZE = dict(size=(32, 32), frames=16), ["--img-size", 32]  # VideoMAE's files tell neither
each_file = pytest.mark.parametrize("ending", [".safetensors", ".bin"])


def hugging(name, folder, ending, **options):
    """-> a model of transformers, filled, its file: .bin has the names of transformers 5."""
    package = pytest.importorskip("transformers")
    options = HF | {"decoder_num_attention_heads": 1 if "Video" in name else 16} | options
    model = getattr(package, name)(getattr(package, name.split("For")[0] + "Config")(**options))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # VideoMAE's fc_norm and decoder.norm have 1e-5 there alone
    for key, x in filled(model).state_dict().items():
        if key.endswith(("position_embeddings", "decoder_pos_embed")):  # zeros in a new model
            x.copy_(torch.nn.functional.pad(mae_image.sincos_2d(64, 4, 4), (0, 0, 1, 0)))
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "model.bin")
    return model, folder / f"model{ending}"


@each_file
@pytest.mark.parametrize("kind, mean", [("mae", False), ("videomae", False), ("videomae", True)])
def test_huggingfaces_pretraining_gives_the_same_numbers(kind, mean, ending, tmp_path, monkeypatch):
    """mean: VideoMAE's default there, which has no final norm of the encoder."""
    x, clips = sample(kind, **SHAPE), kind == "videomae"
    name = ["ViTMAE", "VideoMAE"][clips] + "ForPreTraining"
    theirs, path = hugging(name, tmp_path, ending, use_mean_pooling=mean)
    ours = started(monkeypatch, SCRIPTS[kind], path, *SIZE)
    mask, inputs = tube_mask(2, ours.grid, 0.75, data.seeded(0)), x.transpose(1, 2) if clips else x
    chosen = {"bool_masked_pos": mask} if clips else {"noise": mask + torch.arange(16) / 32}
    want, (loss, pred) = theirs(inputs, **chosen), ours(x, mask)
    assert torch.allclose(loss, want.loss, atol=1e-6) and pred.std() > 0.01
    assert torch.allclose(pred, want.logits if clips else hidden(want.logits, mask), atol=1e-5)
    encoder = theirs.videomae if clips else theirs.vit
    latent = encoder(inputs, **chosen).last_hidden_state  # visible ones in raster order
    assert torch.allclose(ours.forward_encoder(x, mask), latent, atol=1e-5)
    if not clips:
        encoder.embeddings.config.mask_ratio = 0.0
        features = tuned(path, "--pool", "first", "--mode", "knn").features(x)
        assert torch.allclose(features, encoder(x).last_hidden_state[:, 0], atol=1e-5)


@each_file
@pytest.mark.parametrize("kind", ["ViT", "mean", "first"])
def test_huggingfaces_classifiers_give_the_same_answers(kind, ending, tmp_path):
    name = ["VideoMAEForVideoClassification", "ViTForImageClassification"][kind == "ViT"]
    theirs, path = hugging(name, tmp_path, ending, use_mean_pooling=kind == "mean")
    x = sample("mae" if kind == "ViT" else "videomae", **SHAPE)
    want = theirs(x.transpose(1, 2) if x.ndim == 5 else x).logits
    assert torch.allclose(tuned(path, "--eval-only", *SIZE)(x), want, atol=1e-5)
    assert want.std() > 0.05


def test_a_pretraining_without_final_norm_resumes_and_is_fine_tuned(tmp_path, toy, run):
    state = official_videomae(build("videomae", (16, 16)))
    torch.save({k: v for k, v in state.items() if "encoder.norm." not in k}, tmp_path / "x.pth")
    flags, sizes = ["--data", toy, "--smoke", "--workers", 0], ["--frames", 4, "--img-size", 16]
    run(mae_video, *flags, *sizes, "--size", "24x2x2", "--decoder", "16x1x2", "--init", "x.pth")
    assert "resumed" in run(mae_video, "--resume")
    assert "top-1" in run(finetune, *flags, "--clips", 1)


@each_kind
def test_ten_channels_are_trained_on_and_painted(kind):
    model, x = build(kind, channels=10), sample(kind, channels=10)
    mask = random_mask(2, (1 if x.ndim == 4 else 2, 2, 4), 0.5, torch.Generator())
    loss, _ = model({"rgb": x} if kind == "multimae" else x, mask)
    if kind == "multimae":
        painted = multimae.to_pictures(model, "rgb", model.target("rgb", x))[:, None]
    else:
        painted = model.to_pictures(model.patches(x))
    x = x[:, :, None] if x.ndim == 4 else x[:, :, [0, 3] if kind == "mae_st" else ...]
    want = mae_image.to_unit_range(x, model.mean, model.std).transpose(1, 2)
    assert loss.isfinite() and torch.allclose(painted.clamp(0, 1), want.clamp(0, 1), atol=1e-5)


@each_model
def test_before_fine_tuning_no_fixed_table_is_stored_and_a_new_head_is_near_zero(kind):
    assert any("pos_embed" in x for x in build(kind).state_dict()) == (kind == "mae_st")  # learnt
    model = finetune.Classifier(build(kind), 400)
    assert any("encoder.pos_embed" in name for name in model.state_dict())
    assert abs(model.head.weight.std().item() - 2e-5) < 1e-6 and not model.head.bias.any()


def test_the_class_decoder_has_the_precision_of_the_rest():
    model, inputs = build("multimae"), {"rgb": sample("multimae")}
    with torch.autocast("cpu", torch.bfloat16):
        preds = model.forward_decoder(model.encode(inputs), inputs)
    assert len(preds) == 4 and {x.dtype for x in preds.values()} == {torch.bfloat16}


def test_a_random_crop_lies_in_the_image_and_has_the_area_asked_for():
    for i in range(300):
        top, left, h, w = data.random_box((120, 160), (16, 32), 0.2, data.seeded(i))
        assert 0 <= top <= top + h <= 120 and 0 <= left <= left + w <= 160
        assert h * w > 0.19 * 120 * 160 and 1.45 < w / h < 2.75  # 2 x 3/4 .. 4/3, rounded


@pytest.mark.parametrize("sampling", ["dense", "linspace", "segments"])
def test_repeated_clips_have_frames_of_their_own(sampling):
    files = data.Files(["x.avi"], [0], ["x"])
    cfg = mae_video.Config(frames=8, stride=4, sampling=sampling, img_size="16", repeat=4)
    clips = mae_video.ClipDataset(files, cfg, True)
    assert len(np.unique(clips.choose(300, data.seeded(0)), axis=0)) == 4


def test_resized_depth_does_not_overshoot(tmp_path):
    step = Image.fromarray(np.array([[20000] * 6 + [40000] * 6] * 12, np.uint16))
    data.write_whole(tmp_path / "depth/a.png", lambda p: step.save(p, "png"))
    files = data.Files([str(tmp_path / "depth/a.png")], [0], ["x"])
    cfg = multimae.Config(data=tmp_path, img_size="30")
    maps = multimae.AlignedDataset(files, ["depth"], cfg, False)
    depth = maps[0, 0][0].int() @ torch.tensor([256, 1], dtype=torch.int)
    assert depth.min() == 20000 and depth.max() == 40000 and len(depth.unique()) > 2


def test_an_image_is_tested_on_its_whole_centre(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    files = data.Files([str(tmp_path / "x.png")], [0], ["x"])
    cfg = finetune.Config(model="mae", img_size="20", clips=5, crops=3)
    assert np.array_equal(finetune.ViewDataset(files, cfg)[0][0], pixels[None, :, 5:25])


def test_presets_flip_and_hide_as_the_list_says():
    paper = omni.PRESETS["paper"]
    assert (paper["mask_ratio_image"], paper["mask_ratio"]) == (0.9, 0.95)
    assert mae_video.Config.flip and not mae_video.PRESETS["ucf101_paper"]["flip"]


def test_every_difference_names_a_place_and_a_test_that_exist():
    text = (ROOT / "tests/differences.md").read_text().split("## The same thing")[0]
    lines = [line for line in text.splitlines() if re.match(r"\| (?!-|there \|)", line)]
    for line in lines:
        _, _, place, test = line.strip("| ").split(" | ")
        for cell, folder in ((place, ROOT), (test, ROOT / "tests")):
            file, name = re.fullmatch(r"`(\w+\.py): ([\w.]+)`", cell).groups()
            for part in name.split("."):  # a class and its method
                there = rf"^ *(def|class) {part}\b|^{part} = "
                assert re.search(there, (folder / file).read_text(), re.M), cell
    marks = sum(path.read_text().count("DIFFERS") for path in ROOT.glob("*.py"))
    assert len(lines) > 35 and marks == 7  # each of them a line here, too
