"""The two video models where they differ, frames and crops, public files, the script.

What they share with the other models of pixels is in test_mae_image.py.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

import mae_image
import mae_video
from conftest import TINY_VIDEO
from layouts import official_videomae
from mae_image import fuse_qkv
from mae_video import MAEST, VideoMAE
from masking import hidden, restore, tube_mask


def tiny(kind, frames=8, size=(16, 32), **options):
    torch.manual_seed(0)
    return kind(frames, size, 2, 8, (24, 1, 2), (16, 1, 2), **options)


def masked(model, batch=3, ratio=0.75):
    g, (t, h, w) = torch.Generator().manual_seed(0), model.grid
    clips = torch.randn(batch, 3, 2 * t, 8 * h, 8 * w, generator=g)
    return clips, tube_mask(batch, model.grid, ratio, g)


# ---- the models ----------------------------------------------------------------------------------


def test_videomaes_decoder_order_does_not_matter():
    """Visible first, hidden behind is as good as raster order: positions are added before."""
    model = tiny(VideoMAE)
    clips, mask = masked(model)
    latent = model.forward_encoder(clips, mask)
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


def test_videomaes_positions_alternate_sine_and_cosine_of_the_tokens_number():
    table = mae_video.sinusoid(6, 5)
    for n, j in np.ndindex(5, 6):
        angle = n / 10000 ** (2 * (j // 2) / 6)
        assert abs(table[n, j] - (math.cos if j % 2 else math.sin)(angle)) < 1e-6


@pytest.mark.parametrize("frames, predicted, want", [
    (16, 8, [0, 2, 4, 6, 8, 10, 12, 15]), (8, 8, list(range(8))), (8, 4, [0, 2, 4, 7])])
def test_maest_paints_frames_from_first_to_last_and_one_step_is_longer(frames, predicted, want):
    assert mae_video.target_frames(frames, predicted).tolist() == want
    model = tiny(MAEST, frames, predicted=predicted, norm_pix=False)
    clips, mask = masked(model)
    pictures = model.to_pictures(model.patches(clips))  # (B, predicted, C, H, W)
    pixels = mae_image.to_unit_range(clips[:, :, want], model.mean, model.std)
    assert torch.allclose(pictures.transpose(1, 2), pixels, atol=1e-6)
    assert model(clips, mask)[1].shape[2] == predicted // model.grid[0] * 8 * 8 * 3


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("prefix, width", [("", 24), ("decoder_", 16)])
def test_separable_positions_are_space_plus_time_and_joint_ones_a_table(cls, prefix, width):
    model = tiny(MAEST, cls=cls)
    table, row = model.positions(prefix)
    space, time = (getattr(model, f"{prefix}pos_embed_{x}")[0] for x in ("spatial", "temporal"))
    for s, r, c in np.ndindex(4, 2, 4):
        assert torch.equal(table[0, (s * 2 + r) * 4 + c], space[r * 4 + c] + time[s])
    assert (row is not None) == cls
    model = tiny(MAEST, cls=cls, separable=False)
    table, row = model.positions(prefix)
    joint = getattr(model, f"{prefix}pos_embed")
    assert joint.shape == (1, 32 + cls, width) and torch.equal(table, joint[:, -32:])
    assert not cls or torch.equal(row, joint[:, :1])


def test_maests_decoder_does_not_see_the_encoders_class_token():
    model = tiny(MAEST)
    clips, mask = masked(model)
    latent = model.forward_encoder(clips, mask)
    other = torch.cat([torch.randn_like(latent[:, :1]), latent[:, 1:]], dim=1)
    assert torch.equal(model.forward_decoder(latent, mask), model.forward_decoder(other, mask))


@pytest.mark.parametrize("kind, options", [
    (VideoMAE, {}), (MAEST, {}), (MAEST, {"separable": False}), (MAEST, {"cls": False})])
@pytest.mark.parametrize("frames, size", [(2, 16), (4, (16, 32)), (12, (24, 8))])
def test_any_number_of_frames_and_any_size_goes(kind, options, frames, size):
    model = tiny(kind, frames, size, **options)
    clips, mask = masked(model, ratio=0.5)
    loss, _ = model(clips, mask)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match=rf"clips of \({frames + 2}, .*but the model takes"):
        model(torch.cat([clips, clips[:, :, :2]], dim=2), mask)


def test_initial_weights_have_the_published_spread():
    """Standard deviations measured on the official models at ViT-B."""
    torch.manual_seed(0)
    model = VideoMAE(2, 16, 2, 16, (768, 1, 12), (384, 1, 6))
    assert abs(model.decoder_embed.weight.std() - 0.0208) < 2e-4  # PyTorch's default, not Xavier
    assert abs(model.patch_embed.proj.weight.std() - 0.0147) < 2e-4
    assert model.mask_token.abs().max() <= 0.02 and abs(model.mask_token.std() - 0.011) < 1e-3
    model = MAEST(2, 16, 2, 16, (768, 1, 12), (512, 1, 16))
    assert abs(model.blocks[0].attn.qkv.weight.std() - 0.0361) < 2e-4  # three matrices
    assert model.decoder_cls_token.abs().max() == 0 and model.pos_embed_spatial.std() > 0.015


@pytest.mark.parametrize("kind, size, decoder, millions", [
    (VideoMAE, "small", (192, 4, 3), 24.0), (VideoMAE, "base", (384, 4, 6), 94.2),
    (VideoMAE, "large", (512, 12, 8), 343.0), (VideoMAE, "huge", (640, 12, 8), 692.5),
    (MAEST, "base", (512, 4, 16), 99.9), (MAEST, "large", (512, 4, 16), 317.7)])
def test_parameter_counts_are_the_published_ones(kind, size, decoder, millions):
    """Measured on the official models, of which VideoMAE has no key biases."""
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(16, 224, 2, 16, size, decoder).parameters())
    width, depth, _ = mae_image.ENCODERS[size]
    keys = (width * depth + decoder[0] * decoder[1]) * (kind is VideoMAE)
    assert abs((count - keys) / 1e6 - millions) < 0.06


def test_positions_are_resized_over_places_and_linearly_over_time():
    table = torch.randn(1, 2 * 3 * 4, 5)
    assert mae_video.resize_table(table, (2, 3, 4), (2, 3, 4)).equal(table)
    found = mae_video.resize_table(table, (2, 3, 4), (2, 6, 5)).reshape(2, 6, 5, 5)
    for s in range(2):
        x = table.reshape(2, 3, 4, 5)[s].permute(2, 0, 1)[None]
        want = F.interpolate(x, (6, 5), mode="bicubic", align_corners=False)
        assert torch.allclose(found[s], want[0].permute(1, 2, 0), atol=1e-6)
    ends = table.reshape(2, 12, 5)
    found = mae_video.resize_table(table, (2, 3, 4), (4, 3, 4)).reshape(4, 12, 5)
    for s, share in enumerate((0, 0.25, 0.75, 1)):  # slots have their places in their middles
        assert torch.allclose(found[s], ends[0] * (1 - share) + ends[1] * share, atol=1e-6)


# ---- which frames, which crop --------------------------------------------------------------------


LENGTHS = [1, 2, 5, 9, 16, 33, 61, 64, 100]  # also n - 1 that the stride divides, and short videos


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("start", [0, 3])
def test_a_dense_clip_takes_every_fourth_frame_and_repeats_the_last_one_it_reaches(n, start):
    want, frame = [], min(start, n - 1)
    for _ in range(16):
        want.append(frame)
        frame += 4 if frame + 4 < n else 0
    assert mae_video.dense_clip(n, 16, 4, want[0]).tolist() == want


@pytest.mark.parametrize("n", [20, 64, 70])
def test_dense_starts_are_all_equally_likely_if_the_clip_fits_and_else_0(n):
    g = torch.Generator().manual_seed(0)
    starts = [mae_video.random_clip("dense", n, 16, 4, g)[0] for _ in range(700)]
    assert set(starts) == set(range(max(n - 64, 0) + 1))
    assert np.bincount(starts).min() > 60 or n < 65


@pytest.mark.parametrize("n", LENGTHS)
def test_one_random_frame_comes_from_each_of_equal_segments(n):
    g = torch.Generator().manual_seed(0)
    clips = np.stack([mae_video.segment_clip(n, 8, g) for _ in range(300)])
    for k in range(8):
        first = k * n // 8
        assert set(clips[:, k]) == set(range(first, max((k + 1) * n // 8, first + 1)))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("views", [1, 2, 5])
def test_views_for_testing_are_those_of_slow_loops(n, views):
    thin = list(range(0, n, 4))  # VideoMAE: every fourth frame, then a window moves over these
    room = max(len(thin) - 16, 0)
    starts = [room // 2] if views == 1 else [i * room // (views - 1) for i in range(views)]
    want = [[thin[min(s + k, len(thin) - 1)] for k in range(16)] for s in starts]
    assert mae_video.views_of("dense", n, 16, 4, views).tolist() == want
    gap = max(n - 64, 0)  # MAE-ST: 16 points from s to s + 63
    starts = [gap // 2] if views == 1 else [i * (gap // (views - 1)) for i in range(views)]
    points = [[np.float32(s + k * (63 / 15)) for k in range(16)] for s in starts]
    want = [[min(int(x), n - 1) for x in clip] for clip in points]
    assert mae_video.views_of("linspace", n, 16, 4, views).tolist() == want
    shifts = [0.5] if views == 1 else [i / views for i in range(views)]
    want = [[min(int((k + s) * n / 8), n - 1) for k in range(8)] for s in shifts]
    assert mae_video.views_of("segments", n, 8, 1, views).tolist() == want


@pytest.mark.parametrize("shape, size, heights, widths", [
    ((100, 140), (64, 64), (100, 87, 75, 64), (100, 87, 75, 64)),  # 66 is near to 64
    ((48, 66), (32, 64), (32, 28, 24, 21), (64, 57, 49, 43)),  # 33 and 66, too
    ((30, 30), (32, 32), (30, 26, 22, 19), (30, 26, 22, 19))])  # too small: nothing to take
def test_multi_scale_crops_have_four_sizes_one_of_them_perhaps_the_inputs(shape, size, heights,
                                                                          widths):
    g, (H, W) = torch.Generator().manual_seed(0), shape
    boxes = [mae_video.multi_scale_box(shape, size, g) for _ in range(3000)]
    pairs = {(heights[i], widths[j]) for i, j in np.ndindex(4, 4) if abs(i - j) <= 1}
    assert {box[2:] for box in boxes} == pairs
    assert all(0 <= y <= y + h <= H and 0 <= x <= x + w <= W for y, x, h, w in boxes)
    h, w = heights[-1], widths[-1]
    quarters = {(y / max((H - h) // 4, 1), x / max((W - w) // 4, 1))
                for y, x, *sides in boxes if sides == [h, w]}
    corners = {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2)}
    assert quarters == corners | {(1, 1), (1, 3), (3, 1), (3, 3)}


# ---- public files --------------------------------------------------------------------------------


def apart(state):
    """q, k and v as three matrices, as in facebookresearch/mae_st."""
    found = {}
    for key, value in state.items():
        parts = zip("qkv", value.chunk(3)) if ".qkv." in key else [("", value)]
        found |= {key.replace(".qkv.", f".{x}."): part for x, part in parts}
    return found


@pytest.mark.parametrize("size, decoder", [("small", (192, 4, 3)), ("base", (384, 4, 6)),
                                           ("large", (512, 12, 8)), ("huge", (640, 12, 8))])
def test_a_public_videomae_tells_its_sizes_and_the_rest_is_a_guess(size, decoder):
    with torch.device("meta"):
        model = VideoMAE(16, 224, 2, 16, size, decoder)
    said, ours, guesses = mae_video.public_videomae(fuse_qkv(official_videomae(model)))
    shapes = ["x".join(map(str, shape)) for shape in (mae_image.ENCODERS[size], decoder)]
    assert said == {"patch": 16, "tubelet": 2, "size": shapes[0], "decoder": shapes[1],
                    "norm_pix": True, "frames": 16, "stride": 4, "sampling": "dense",
                    "img_size": "224"}
    assert guesses == ["size", "decoder", "norm_pix", "frames", "img_size"]
    assert set(ours) == set(model.state_dict())


@pytest.mark.parametrize("separable", [True, False])
def test_a_public_mae_st_tells_frames_and_image_size_by_its_tables(separable):
    state = apart(tiny(MAEST, 8, 32, separable=separable).state_dict())
    said, ours, guesses = mae_video.public_maest(fuse_qkv(state))
    assert said == {"patch": 8, "tubelet": 2, "size": "24x1x1", "decoder": "16x1x16",
                    "norm_pix": True, "stride": 4, "sampling": "linspace",
                    "frames": 8 if separable else 16, "img_size": "32" if separable else "112"}
    assert guesses == ["size", "decoder", "norm_pix"]
    assert set(ours) == set(tiny(MAEST, 8, 32, separable=separable).state_dict())


@pytest.mark.parametrize("name, wrapper", [("videomae", "model"), ("videomae", "module"),
                                           ("mae_st", "model"), ("mae_st fused", "model_state")])
@pytest.mark.parametrize("part", ["whole", "encoder"])
def test_a_run_starts_from_a_public_file_of_either_paper(toy, run, tmp_path, name, wrapper, part):
    kind, shape = (VideoMAE, (16, 1, 1)) if name == "videomae" else (MAEST, (16, 1, 16))
    model = kind(4, 16, 2, 8, (24, 1, 1), shape)
    state = official_videomae(model) if kind is VideoMAE else model.state_dict()
    state = apart(state) if name == "mae_st" else state
    if part == "encoder":
        own = ("decoder", "encoder_to_decoder", "mask_token")
        state = {k: v for k, v in state.items() if not k.startswith(own)}
        if name == "mae_st fused":  # SlowFast's files have a decoder of their own
            state |= {k: torch.zeros(3) for k in ("dec_pos_embed_spatial", "decoder_embed.weight",
                                                  "pred_head.projections.0.weight", "mask_token")}
    torch.save({wrapper: state, "epoch": 1600}, tmp_path / "x.pth")
    text = run(mae_video, "--data", toy, "--init", "x.pth", "--smoke", "--frames", 4, "--stride", 1,
               "--img-size", 16, "--workers", 0, "--pictures", 0, "--lr", 0, "--batch", 4)
    assert ("the decoder starts new" in text) == (part == "encoder")
    content = torch.load(tmp_path / "runs/mae_video/checkpoint.pt")
    assert content["config"]["model"] == name[:8].strip().replace(" f", "")
    for key, value in model.state_dict().items():
        key_bias = key.endswith("qkv.bias") and kind is VideoMAE
        if part == "whole" or not key.startswith(mae_image.DECODER):
            found = content["model"][key]
            assert torch.equal(found, value) or key_bias and not found.any(), key


def test_a_flag_that_contradicts_the_files_paper_is_refused(refused, tmp_path):
    torch.save(tiny(MAEST, 4, 16).state_dict(), tmp_path / "x.pth")
    said = refused(mae_video, "--init", "x.pth", "--model", "videomae")
    assert "--model videomae: x.pth has mae_st, which cannot be changed" in said
    torch.save({"z": torch.ones(1)}, tmp_path / "y.pth")
    assert "(videomae, mae_st, as their papers' code or HuggingFace wrote it); its first names " \
        "are: z" in refused(mae_video, "--init", "y.pth")


# ---- the script ----------------------------------------------------------------------------------


def film(path):
    return [np.asarray(f.convert("RGB"), float) for f in ImageSequence.Iterator(Image.open(path))]


@pytest.mark.parametrize("flags", [
    ["--model", "videomae", "--img-size", "16x32", "--crop", "multiscale"],
    ["--model", "mae_st", "--repeat", 4, "--sampling", "linspace", "--stride", 1, "--norm-pix"]])
def test_the_script_trains_draws_films_resumes_and_paints_one_clip(toy, run, tmp_path, flags):
    text = run(mae_video, *TINY_VIDEO, "--data", toy, *flags)
    folder = tmp_path / "runs/mae_video"
    total = int(re.search(r"update +\d+/(\d+)", text)[1])
    logged = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in logged if math.isfinite(x.get("loss", math.nan))] == [
        *range(1, total + 1)] and total >= 8
    assert {"step", "val_loss", "baseline", "object"} == set(logged[-1])
    last = folder / f"pictures/update_{total:06d}.png"
    painted = 2 if "mae_st" in flags else 4  # frames
    frames = film(last.with_suffix(".gif"))
    assert np.asarray(Image.open(last)).std() > 20 and len(frames) == painted
    assert all(np.abs(a - b).mean() > 0.1 for a, b in zip(frames, frames[1:]))
    assert "done: " in run(mae_video, "--resume")
    clip = next((toy / "videos/Wheel").glob("*.mp4"))
    assert f"wrote {clip.stem}_painted.png" in run(mae_video, "--picture", clip)
    assert len(film(tmp_path / f"{clip.stem}_painted.gif")) == painted
    rows = 5 if "--norm-pix" in flags else 4
    side = 48 if "16x32" in flags else 96
    assert Image.open(tmp_path / f"{clip.stem}_painted.png").height >= rows * side


def test_a_clip_that_cannot_be_read_is_one_line(toy, run, refused, tmp_path):
    run(mae_video, *TINY_VIDEO, "--data", toy, "--smoke", "--pictures", 0)
    (tmp_path / "x.avi").write_text("no video")
    assert "x.avi" in refused(mae_video, "--picture", "x.avi")


@pytest.mark.parametrize("flags, message", [
    (["--frames", 5], "clip length 5 is not a multiple of 4: 4 and 8 are"),
    (["--img-size", 60], "image height 60 is not a multiple of 8"), (["--fold", 7], "choose from 1, 2, 3"),
    (["--decoder", "64x1x5"], "not a multiple of 5"), (["--mask-ratio", 1.5], "outside [0, 1)"),
    (["--mask", "random", "--mask-ratio", 0.999], "hides all"),
    (["--data", "nowhere"], "No such file or directory"),
    (["--mask", "frame", "--mask-ratio", 0.1], "hides nothing"), (["--model", "vivit"], "choice"),
    (["--batch", 6, "--repeat", 4], "multiple of 4"), (["--batch", 2, "--repeat", 4], "of 4"),
    (["--frame", 8], "unrecognized"), (["--frames", 0], "too small"), (["--stride", 0], "small")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(mae_video, *([] if "--data" in flags else ["--data", toy]), *flags)


def test_images_and_lists_with_absent_files_are_named(refused, toy, tmp_path):
    assert "has no .avi .mp4" in refused(mae_video, "--data", toy / "rgb")
    (tmp_path / "list.csv").write_text(f"{toy}/videos/Still/v_Still_g01_c01.mp4 0\ngone.mp4 1\n")
    said = refused(mae_video, "--data", "list.csv")
    assert re.search(r"1 of 2 files .* gone.mp4; --allow-missing", said)


def test_real_clips_train(real, run):
    """Gestures (left and right are classes: no flip), some clips of UCF101's and HMDB51's lists."""
    run(mae_video, "--data", real / "gestures10", "--no-flip", "--smoke", "--out", "g")
    flags = ["--smoke", "--batch", 1, "--allow-missing", "--workers", 0]
    for name in ("ucf101", "hmdb51"):
        run(mae_video, "--data", real / "real_clips" / name, *flags, "--out", name)
