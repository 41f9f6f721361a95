import json
import math
import re

import av
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import mae_image
import mae_video
from conftest import TINY_VIDEO, copy_encoder
from mae_video import MAEST, VideoMAE
from masking import InputError, hidden, random_mask, restore, tube_mask, visible


def tiny(kind, frames=8, size=32, **options):
    torch.manual_seed(0)
    return kind(frames, size, 2, 8, (32, 2, 4), (16, 1, 2), **options)


def masked(model, batch=3, ratio=0.75, seed=0):
    t, h, w = model.grid
    clips = torch.randn(batch, 3, 2 * t, 8 * h, 8 * w, generator=torch.Generator().manual_seed(seed))
    return clips, tube_mask(batch, model.grid, ratio, torch.Generator().manual_seed(seed))


# ---- the models against slow loops and well-known modules ---------------------------------------------------


def test_patchify_matches_a_loop_and_has_an_inverse():
    clips = torch.randn(2, 3, 6, 8, 12)
    patches = mae_video.patchify(clips, 2, 4)
    for s in range(3):
        for r in range(2):
            for c in range(3):
                cube = clips[1, :, 2 * s : 2 * s + 2, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
                assert torch.equal(patches[1, (s * 2 + r) * 3 + c], cube.permute(1, 2, 3, 0).flatten())
    assert torch.equal(mae_video.unpatchify(patches, 4, 3, 2, 3), clips)


def test_the_cube_embedding_is_the_strided_3d_convolution():
    embed, clips = mae_image.PatchEmbed((2, 4, 4), 3, 10), torch.randn(2, 3, 6, 8, 12)
    want = embed.proj(clips).flatten(2).transpose(1, 2)
    assert torch.allclose(embed(mae_video.patchify(clips, 2, 4)), want, atol=1e-5)


def test_the_encoder_is_torchvisions_transformer_over_cubes():
    model = tiny(VideoMAE)
    vit = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 128).eval()
    with torch.no_grad():
        vit.encoder.pos_embedding = torch.nn.Parameter(model.pos_embed)
        copy_encoder(model, vit.encoder)
    clips, _ = masked(model)
    tokens = model.patch_embed.proj(clips).flatten(2).transpose(1, 2)
    assert torch.allclose(model.encode(clips), vit.encoder(tokens), atol=1e-5)


@pytest.mark.parametrize("kind", [VideoMAE, MAEST])
def test_hidden_pixels_do_not_reach_the_encoder(kind):
    model = tiny(kind)
    clips, mask = masked(model)
    patches = mae_video.patchify(clips, 2, 8)
    other = torch.where(mask[..., None], torch.randn_like(patches), patches)
    assert torch.equal(model.forward_encoder(patches, mask), model.forward_encoder(other, mask))


@pytest.mark.parametrize("kind", [VideoMAE, MAEST])
def test_ratio_0_and_encode_agree_and_pred_fits_the_hidden_cubes(kind):
    model = tiny(kind)
    clips, mask = masked(model, ratio=0)
    assert torch.equal(model.encode(clips), model.forward_encoder(mae_video.patchify(clips, 2, 8), mask))
    assert model(clips, mask)[0] == 0
    clips, mask = masked(model, ratio=0.5)
    P = 384 if kind is VideoMAE else 192
    assert model(clips, mask)[1].shape == (3, int(mask[0].sum()), P)


def test_videomaes_decoder_order_does_not_matter():
    """Visible first and hidden behind gives what raster order gives, because positions are added before."""
    model = tiny(VideoMAE)
    clips, mask = masked(model)
    latent = model.forward_encoder(mae_video.patchify(clips, 2, 8), mask)
    x = restore(model.decoder_embed(latent), mask, model.mask_token) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    want = model.decoder_pred(model.decoder_norm(hidden(x, mask)))
    assert torch.allclose(model.forward_decoder(latent, mask), want, atol=1e-5)


def test_a_key_bias_changes_nothing():
    """Why VideoMAE can do without one, and ours can have it."""
    model = tiny(VideoMAE).double()
    clips, mask = masked(model)
    before = model(clips.double(), mask)[0].item()
    with torch.no_grad():
        for block in [*model.blocks, *model.decoder_blocks]:
            width = block.attn.proj.in_features
            block.attn.qkv.bias[width : 2 * width] += torch.randn(width, dtype=torch.float64)
    assert math.isclose(model(clips.double(), mask)[0].item(), before, rel_tol=1e-12)


def test_videomaes_target_is_each_channel_by_itself_in_0_to_1():
    model = tiny(VideoMAE)
    rgb = torch.rand(3, 3, 8, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (VideoMAE.MEAN, VideoMAE.STD))
    mask = masked(model)[1]
    target = model.forward_target(hidden(model.target_patches((rgb - mean) / std), mask))
    number = int(mask[1].nonzero()[5])  # the sixth hidden cube of the second clip, by a loop
    s, r, c = number // 16, number // 4 % 4, number % 4
    cube = rgb[1, :, 2 * s : 2 * s + 2, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
    want = torch.stack([(x - x.mean()) / (x.var().sqrt() + 1e-6) for x in cube])  # (3, 2, 8, 8)
    assert torch.allclose(target[1, 5], want.permute(1, 2, 3, 0).flatten(), atol=1e-4)


def test_maest_paints_one_frame_of_every_cube_the_last_one_being_the_odd_one():
    assert mae_video.target_frames(16, 8).tolist() == [0, 2, 4, 6, 8, 10, 12, 15]
    model = tiny(MAEST, norm_pix=False)
    clips, mask = masked(model)
    want = mae_image.patchify(clips[:, :, 7], 8)  # frame 7 is the target of the last slot
    assert torch.equal(model.target_patches(clips)[:, 48:], want)


def test_separable_positions_are_space_plus_time():
    model = tiny(MAEST)
    table, _ = model.positions()
    for s, r, c in ((0, 0, 0), (1, 2, 3), (3, 3, 1)):
        want = model.pos_embed_spatial[0, r * 4 + c] + model.pos_embed_temporal[0, s]
        assert torch.equal(table[0, (s * 4 + r) * 4 + c], want)


def test_maests_decoder_does_not_see_the_encoders_class_token():
    model = tiny(MAEST)
    clips, mask = masked(model)
    latent = model.forward_encoder(mae_video.patchify(clips, 2, 8), mask)
    other = torch.cat([torch.randn_like(latent[:, :1]), latent[:, 1:]], dim=1)
    assert torch.equal(model.forward_decoder(latent, mask), model.forward_decoder(other, mask))


@pytest.mark.parametrize("kind", [VideoMAE, MAEST])
@pytest.mark.parametrize("frames, size", [(2, 16), (4, (16, 32)), (12, (24, 8))])
def test_any_number_of_frames_and_any_size_goes(kind, frames, size):
    model = tiny(kind, frames, size)
    clips, mask = masked(model, ratio=0.5)
    loss, _ = model(clips, mask)
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", [VideoMAE, MAEST])
def test_clips_and_masks_of_another_size_are_named(kind):
    model = tiny(kind)
    clips, mask = masked(model)
    with pytest.raises(InputError, match="frame height 30 is not a multiple of patch 8"):
        model(clips[..., :30, :], mask)
    with pytest.raises(InputError, match=r"32 patches and a mask of 64, but the model was built for \(4, 4, 4\)"):
        model(clips[:, :, :4], mask)


def test_initial_weights_have_the_published_spread():
    """Standard deviations measured on the official models at ViT-B."""
    torch.manual_seed(0)
    model = VideoMAE(2, 16, 2, 16, (768, 1, 12), (384, 1, 6))
    assert abs(model.decoder_embed.weight.std().item() - 0.0208) < 2e-4  # PyTorch's default, not Xavier
    assert abs(model.patch_embed.proj.weight.std().item() - 0.0147) < 2e-4
    assert model.mask_token.abs().max() <= 0.02 and abs(model.mask_token.std().item() - 0.011) < 1e-3
    model = MAEST(2, 16, 2, 16, (768, 1, 12), (512, 1, 16))
    assert abs(model.blocks[0].attn.qkv.weight.std().item() - 0.0361) < 2e-4  # q, k, v are separate matrices
    assert model.decoder_cls_token.abs().max() == 0 and model.pos_embed_spatial.std() > 0.015


def test_parameter_counts_are_the_published_ones():
    """Millions, measured on the official models. Ours has key biases (VideoMAE: + D per block)."""
    with torch.device("meta"):
        for size, decoder, millions in (("small", (192, 4, 3), 24.0), ("base", (384, 4, 6), 94.2), ("large", (512, 12, 8), 343.0),
                                        ("huge", (640, 12, 8), 692.5)):  # fmt: skip
            count = sum(p.numel() for p in VideoMAE(16, 224, 2, 16, size, decoder).parameters())
            width, depth, _ = mae_image.ENCODERS[size]
            assert abs((count - width * depth - decoder[0] * decoder[1]) / 1e6 - millions) < 0.06, size
        for size, millions in (("base", 99.9), ("large", 317.7)):
            count = sum(p.numel() for p in MAEST(16, 224, 2, 16, size, (512, 4, 16)).parameters())
            assert abs(count / 1e6 - millions) < 0.06, size


@pytest.mark.parametrize("kind", [VideoMAE, MAEST])
def test_the_loss_falls(kind):
    model = tiny(kind, norm_pix=False)
    color = torch.rand(64, 3, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 4 - 2
    clips = color * torch.linspace(-1, 1, 32) + torch.linspace(-1, 1, 8)[:, None, None] + torch.zeros(32, 32)
    optimizer = torch.optim.AdamW(mae_image.param_groups(model, 0.05), 3e-3)
    draw = tube_mask if kind is VideoMAE else random_mask
    losses = []
    for step in range(90):
        loss, _ = model(clips, draw(64, model.grid, 0.75, torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.65 * model.target_patches(clips).var().item() < losses[0]


@pytest.mark.parametrize("kind", [VideoMAE, MAEST])
def test_a_perfect_prediction_gives_the_original_back(kind, monkeypatch):
    model = tiny(kind)
    clips, mask = masked(model)
    clips = clips.clamp(-1, 1)
    perfect = model.forward_target(hidden(model.target_patches(clips), mask))
    monkeypatch.setattr(model, "forward", lambda clips, mask: (torch.zeros(()), perfect))
    pictures = mae_image.reconstruct(model, clips, mask)[2]
    frames = 8 if kind is VideoMAE else 4
    assert pictures["original"].shape == (3, frames, 3, 32, 32)
    assert torch.allclose(pictures["pasted in*"], pictures["original"], atol=1e-3)
    assert not torch.allclose(pictures["knowing nothing*"], pictures["original"], atol=1e-1)


# ---- public checkpoints ---------------------------------------------------------------------------------------


def as_videomae(model):
    """Our weights under the names of MCG-NJU/VideoMAE."""
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (("decoder_embed.", "encoder_to_decoder."), ("decoder_blocks.", "decoder.blocks."),
                             ("decoder_norm.", "decoder.norm."), ("decoder_pred.", "decoder.head.")):  # fmt: skip
            key = key.replace(ours, theirs)
        if not key.startswith(("decoder.", "encoder_to", "mask_token")):
            key = "encoder." + key
        if key.endswith("qkv.bias"):
            state[key.replace("qkv.bias", "q_bias")], _, state[key.replace("qkv.bias", "v_bias")] = value.chunk(3)
        else:
            state[key] = value
    return state


def as_maest(model, fused):
    """Our weights under the names of facebookresearch/mae_st: q, k, v apart, or fused as in some SlowFast files."""
    state = {}
    for key, value in model.state_dict().items():
        if ".attn.qkv." in key and not fused:
            for letter, part in zip("qkv", value.chunk(3)):
                state[key.replace(".qkv.", f".{letter}.")] = part
        else:
            state[key] = value
    return state


@pytest.mark.parametrize("wrapper", ["model", "module"])
@pytest.mark.parametrize("encoder_only", [False, True])
def test_videomae_files_load(tmp_path, wrapper, encoder_only):
    source, path = tiny(VideoMAE), tmp_path / "checkpoint.pth"
    state = as_videomae(source)
    assert "encoder.blocks.0.attn.q_bias" in state and "encoder_to_decoder.weight" in state
    if encoder_only:
        state = {k: v for k, v in state.items() if k.startswith("encoder.")}
    torch.save({wrapper: state, "epoch": 1600}, path)
    torch.manual_seed(3)
    model = VideoMAE(8, 32, 2, 8, (32, 2, 4), (16, 1, 2))
    report = mae_image.load_weights(model, path, "mae_video")
    clips, mask = masked(model)
    assert torch.allclose(model.encode(clips), source.encode(clips), atol=1e-6)
    assert ("of the decoder start fresh" in report) == encoder_only
    assert torch.allclose(model(clips, mask)[0], source(clips, mask)[0], atol=1e-6) != encoder_only


@pytest.mark.parametrize("wrapper, fused", [("model", False), ("model_state", True), ("model_state", False)])
def test_maest_files_load_with_fused_or_separate_qkv(tmp_path, wrapper, fused):
    source, path = tiny(MAEST), tmp_path / "x.pyth"
    torch.save({wrapper: as_maest(source, fused)}, path)
    torch.manual_seed(3)
    model = MAEST(8, 32, 2, 8, (32, 2, 4), (16, 1, 2))
    mae_image.load_weights(model, path, "mae_video")
    clips, mask = masked(model)
    assert torch.equal(model(clips, mask)[0], source(clips, mask)[0])


def test_of_slowfast_files_the_encoder_is_taken(tmp_path):
    source = tiny(MAEST)
    state = {k: v for k, v in as_maest(source, False).items() if not k.startswith("decoder")}
    others = ("dec_pos_embed_spatial", "pred_head.projections.0.weight", "decoder_embed.weight", "mask_token")
    torch.save({"model_state": {**state, **{k: torch.zeros(3) for k in others}}}, tmp_path / "x.pyth")
    model = tiny(MAEST)
    assert "of the decoder start fresh" in mae_image.load_weights(model, tmp_path / "x.pyth", "mae_video")
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_a_run_of_mae_st_can_begin_from_one_at_another_size_and_length(toy, run, tmp_path):
    run("mae_video.py", *TINY_VIDEO, "--data", toy, "--model", "mae_st", "--smoke", "--out", "a")
    text = run("mae_video.py", *TINY_VIDEO, "--data", toy, "--model", "mae_st", "--smoke", "--out", "b", "--frames", 8,
               "--img-size", 32, "--init", "a/checkpoint.pt")  # fmt: skip
    assert "trained on 2 x 2 patches, so the positions of 4 x 4 are resized" in text


def test_learned_positions_are_resized_to_another_grid(tmp_path):
    source, path = tiny(MAEST), tmp_path / "x.pyth"
    with torch.no_grad():  # a ramp over columns stays a ramp
        source.pos_embed_spatial.copy_(torch.arange(16).remainder(4).float()[None, :, None].expand(1, 16, 32))
    torch.save({"model": as_maest(source, False)}, path)
    model = MAEST(16, (32, 64), 2, 8, (32, 2, 4), (16, 1, 2))
    mae_image.load_weights(model, path, "mae_video")
    row = model.pos_embed_spatial[0, :8, 0]
    assert model.pos_embed_temporal.shape == (1, 8, 32) and (row.diff() > 0).all() and -0.6 < row[0] < 0.6


def test_a_file_of_the_other_paper_is_refused(tmp_path):
    torch.save({"model": as_maest(tiny(MAEST), False)}, tmp_path / "x.pyth")
    torch.save({"model": as_videomae(tiny(VideoMAE))}, tmp_path / "y.pth")
    for kind, name in ((VideoMAE, "x.pyth"), (MAEST, "y.pth")):
        with pytest.raises(InputError, match="does not fit this model"):
            mae_image.load_weights(tiny(kind), tmp_path / name, "mae_video")


# ---- the script -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [["--model", "videomae"], ["--model", "mae_st", "--repeat", 4, "--sampling", "linspace", "--norm-pix"]]
)
def test_the_script_writes_checkpoint_log_strips_and_a_video_file(toy, run, tmp_path, flags):
    text = run("mae_video.py", *TINY_VIDEO, "--data", toy, *flags)
    folder = tmp_path / "runs/mae_video"
    assert "done: " in text and (folder / "checkpoint.pt").exists()
    last = sorted((folder / "pictures").glob("*.png"))[-1]
    assert np.asarray(Image.open(last)).std() > 20
    with av.open(str(last.with_suffix(".mp4"))) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) >= 6 and np.std(frames[0]) > 20
    logged = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    total = int(re.search(r"update +\d+/(\d+)", text)[1])
    assert [x["step"] for x in logged if math.isfinite(x.get("loss", math.nan))] == list(range(1, total + 1)) and total >= 4


def test_a_run_resumes_with_the_settings_it_had(toy, run, tmp_path):
    run("mae_video.py", *TINY_VIDEO, "--data", toy, "--smoke", "--model", "mae_st")
    assert "done: " in run("mae_video.py", "--resume")


@pytest.mark.parametrize("flags, message", [
    (["--frames", 5], "clip length 5 is not a multiple of tubelet 2: use --frames 4 or 6"), (["--img-size", 60], "use --img-size 56 or 64"),
    (["--decoder-heads", 5], "multiple of 5 heads"), (["--mask-ratio", 1.5], "outside [0, 1)"), (["--mask", "random", "--mask-ratio", 0.999], "hides all"),
    (["--mask", "frame", "--mask-ratio", 0.1], "hides nothing"), (["--fold", 7], "folds 1, 2 and 3"), (["--batch", 6, "--repeat", 4], "multiple of 4"),
    (["--data", "nowhere"], "does not exist"), (["--model", "vivit"], "invalid choice"), (["--frame", 8], "did you mean --frames"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    base = [] if "--data" in flags else ["--data", toy]
    assert message in refused(mae_video, *base, *flags)


def test_images_are_no_videos(refused, toy):
    assert "holds no files that end in .avi" in refused(mae_video, "--data", toy / "rgb")


def test_a_list_with_absent_files_is_an_error_that_counts_them(refused, toy, tmp_path):
    (tmp_path / "list.csv").write_text(f"{toy}/videos/Still/v_Still_g01_c01.mp4 0\ngone.mp4 1\n")
    assert re.search(r"1 of 2 files .* gone.mp4; --allow-missing", refused(mae_video, "--data", "list.csv"))


def test_real_clips_train(real, run):
    """Gestures (left and right are classes: no flip), and the few clips that are here of UCF101's and HMDB51's lists."""
    run("mae_video.py", "--data", real / "gestures10", "--no-flip", "--smoke", "--out", "g")
    for name in ("ucf101", "hmdb51"):
        run(
            "mae_video.py",
            "--data",
            real / "real_clips" / name,
            "--smoke",
            "--batch",
            1,
            "--allow-missing",
            "--workers",
            0,
            "--out",
            name,
        )


def test_visible_and_tube_tokens_match_in_time():
    """The visible cubes of a tube mask are the same places in every slot."""
    mask = tube_mask(1, (4, 4, 4), 0.75, torch.Generator().manual_seed(0))
    numbers = visible(torch.arange(64)[None, :, None].float(), mask)[0, :, 0].reshape(4, -1)
    assert torch.equal(numbers - 16 * torch.arange(4)[:, None], numbers[:1].expand(4, -1))
