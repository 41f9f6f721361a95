"""The two video models where they differ, frames and crops, public files, the script.

What they share with others is in test_mae_image.py; numbers and positions are in test_golden.py.
"""

import json
import math

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
from masking import tube_mask


def tiny(kind, frames=8, size=(16, 32), **options):
    torch.manual_seed(0)
    return kind(frames, size, 2, 8, (24, 1, 2), (16, 1, 2), **options)


def test_a_key_bias_changes_nothing():
    model, g = tiny(VideoMAE).double(), torch.Generator().manual_seed(0)
    clips, mask = torch.randn(3, 3, 8, 16, 32).double(), tube_mask(3, model.grid, 0.75, g)
    before = model(clips, mask)[0].item()
    for block in [*model.blocks, *model.decoder_blocks]:
        width = block.attn.proj.in_features
        block.attn.qkv.bias.data[width : 2 * width] += torch.randn(width, dtype=torch.float64)
    assert math.isclose(model(clips, mask)[0].item(), before, rel_tol=1e-12)


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


def test_positions_are_resized_over_places_and_linearly_over_time():
    table = torch.randn(1, 2 * 3 * 4, 5)
    found = mae_video.resize_table(table, (2, 3, 4), (4, 6, 5)).reshape(4, 30, 5)
    places = table.reshape(2, 3, 4, 5).permute(0, 3, 1, 2)
    places = F.interpolate(places, (6, 5), mode="bicubic", align_corners=False).flatten(2).mT
    for s, share in enumerate((0, 0.25, 0.75, 1)):  # slots have their places in their middles
        want = places[0] * (1 - share) + places[1] * share
        assert torch.allclose(found[s], want, atol=1e-6)


each_length = pytest.mark.parametrize("n", [1, 9, 16, 33, 64, 100])  # 4 divides 9 - 1, 33 - 1


@each_length
@pytest.mark.parametrize("start", [0, 3])
def test_a_dense_clip_takes_every_fourth_frame_and_repeats_the_last_one_it_reaches(n, start):
    want, frame = [], min(start, n - 1)
    for _ in range(16):
        want.append(frame)
        frame += 4 if frame + 4 < n else 0
    assert mae_video.dense_clip(n, 16, 4, want[0]).tolist() == want


@pytest.mark.parametrize("n", [20, 70])
def test_dense_starts_are_all_equally_likely_if_the_clip_fits_and_else_0(n):
    g = torch.Generator().manual_seed(0)
    starts = [mae_video.random_clip("dense", n, 16, 4, g)[0] for _ in range(700)]
    assert set(starts) == set(range(max(n - 64, 0) + 1)) and np.bincount(starts).min() > 60


@each_length
def test_one_random_frame_comes_from_each_of_equal_segments(n):
    g = torch.Generator().manual_seed(0)
    clips = np.stack([mae_video.segment_clip(n, 8, g) for _ in range(300)])
    for k in range(8):
        first = k * n // 8
        assert set(clips[:, k]) == set(range(first, max((k + 1) * n // 8, first + 1)))


@each_length
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


def test_multi_scale_crops_have_four_sizes_one_of_them_perhaps_the_inputs():
    g, (H, W) = torch.Generator().manual_seed(0), (48, 66)
    heights, widths = (32, 28, 24, 21), (64, 57, 49, 43)  # 33 and 66 are near to the input's
    boxes = [mae_video.multi_scale_box((H, W), (32, 64), g) for _ in range(3000)]
    pairs = {(heights[i], widths[j]) for i, j in np.ndindex(4, 4) if abs(i - j) <= 1}
    assert {box[2:] for box in boxes} == pairs
    assert all(0 <= y <= y + h <= H and 0 <= x <= x + w <= W for y, x, h, w in boxes)
    quarters = {(y / ((H - 21) // 4), x / ((W - 43) // 4)) for y, x, *sides in boxes
                if sides == [21, 43]}
    corners = {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2)}
    assert quarters == corners | {(1, 1), (1, 3), (3, 1), (3, 3)}


def apart(state):
    """q, k and v as three matrices, as in facebookresearch/mae_st."""
    found = {}
    for key, value in state.items():
        parts = zip("qkv", value.chunk(3)) if ".qkv." in key else [("", value)]
        found |= {key.replace(".qkv.", f".{x}."): part for x, part in parts}
    return found


@pytest.mark.parametrize("kind, size, decoder, millions", [
    (VideoMAE, "small", (192, 4, 3), 24.0), (VideoMAE, "base", (384, 4, 6), 94.2),
    (VideoMAE, "large", (512, 12, 8), 343.0), (VideoMAE, "huge", (640, 12, 8), 692.5),
    (MAEST, "base", (512, 4, 16), 99.9), (MAEST, "large", (512, 4, 16), 317.7)])
def test_a_public_file_has_the_published_size_and_tells_what_it_can(kind, size, decoder, millions):
    with torch.device("meta"):
        model = kind(16, 224, 2, 16, size, decoder)
    state = official_videomae(model) if kind is VideoMAE else apart(model.state_dict())
    assert abs(sum(x.numel() for x in state.values()) / 1e6 - millions) < 0.06
    read = mae_video.public_videomae if kind is VideoMAE else mae_video.public_maest
    said, ours, guesses = read(fuse_qkv(state))
    shapes = ["x".join(map(str, shape)) for shape in (mae_image.ENCODERS[size], decoder)]
    sampling, more = ("dense", ["frames", "img_size"]) if kind is VideoMAE else ("linspace", [])
    assert said == {"patch": 16, "tubelet": 2, "size": shapes[0], "decoder": shapes[1],
                    "norm_pix": True, "frames": 16, "stride": 4, "sampling": sampling,
                    "img_size": "224"}
    assert guesses == ["size", "decoder", "norm_pix", *more]
    assert set(ours) == set(model.state_dict())


@pytest.mark.parametrize("separable, told", [(True, (8, "32")), (False, (16, "112"))])
def test_a_public_mae_st_tells_frames_and_image_size_by_its_tables(separable, told):
    state = fuse_qkv(apart(tiny(MAEST, 8, 32, separable=separable).state_dict()))
    said, ours, _ = mae_video.public_maest(state)
    assert (said["frames"], said["img_size"]) == told and set(ours) == set(state)


@pytest.mark.parametrize("name", ["videomae", "mae_st", "SlowFast"])
def test_a_run_starts_from_a_public_file_of_either_paper(toy, run, tmp_path, name):
    kind, shape = (VideoMAE, (16, 1, 1)) if name == "videomae" else (MAEST, (16, 1, 16))
    model = kind(4, 16, 2, 8, (24, 1, 1), shape)
    own = model.state_dict()
    state = official_videomae(model) if kind is VideoMAE else apart(own)
    if name == "SlowFast":  # q, k and v in one; the decoder is not the paper's
        own = {k: x for k, x in own.items() if not k.startswith(mae_image.DECODER)}
        state = own | {k: torch.zeros(3) for k in ("dec_pos_embed_spatial", "decoder_embed.weight",
                                                   "pred_head.projections.0.weight", "mask_token")}
    torch.save({"model_state": state, "epoch": 1600}, tmp_path / "x.pth")
    text = run(mae_video, "--data", toy, "--init", "x.pth", "--smoke", "--frames", 4, "--stride", 1,
               "--img-size", 16, "--workers", 0, "--pictures", 0, "--lr", 0, "--batch", 4)
    assert ("the decoder starts new" in text) == (name == "SlowFast")
    content = torch.load(tmp_path / "runs/mae_video/checkpoint.pt")
    assert mae_video.MODELS[content["config"]["model"]] is kind
    assert all(torch.equal(content["model"][k], x) for k, x in own.items())


def test_a_flag_that_contradicts_the_files_paper_is_refused(refused, tmp_path):
    torch.save(tiny(MAEST, 4, 16).state_dict(), tmp_path / "x.pth")
    assert "x.pth has mae_st" in refused(mae_video, "--init", "x.pth", "--model", "videomae")
    torch.save({"z": torch.ones(1)}, tmp_path / "y.pth")
    assert "first names are: z" in refused(mae_video, "--init", "y.pth")


def film(path):
    return [np.asarray(f.convert("RGB"), float) for f in ImageSequence.Iterator(Image.open(path))]


@pytest.mark.parametrize("flags, painted, height", [  # frames that are painted, pixels of a clip
    (["--img-size", "16x32", "--crop", "multiscale"], 4, 4 * 48),
    (["--model", "mae_st", "--repeat", 4, "--sampling", "linspace", "--norm-pix"], 2, 5 * 96)])
def test_the_script_trains_draws_films_resumes_and_paints_one_clip(
        toy, run, refused, tmp_path, flags, painted, height):
    run(mae_video, *TINY_VIDEO, "--data", toy, *flags)
    folder = tmp_path / "runs/mae_video"
    logged = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "val_loss", "baseline", "object"} == set(logged)
    last = max(folder.glob("pictures/*.png"))
    frames = film(last.with_suffix(".gif"))
    assert np.asarray(Image.open(last)).std() > 20 and len(frames) == painted
    assert all(np.abs(a - b).mean() > 0.1 for a, b in zip(frames, frames[1:]))
    assert "done: " in run(mae_video, "--resume")
    clip = next((toy / "videos/Wheel").glob("*.mp4"))
    assert f"wrote {clip.stem}_painted.png" in run(mae_video, "--picture", clip)
    assert len(film(tmp_path / f"{clip.stem}_painted.gif")) == painted
    assert Image.open(tmp_path / f"{clip.stem}_painted.png").height >= height
    (tmp_path / "x.avi").write_text("no video")
    assert "x.avi" in refused(mae_video, "--picture", "x.avi")


def test_bad_input_is_one_line_and_exit_code_2(refused, toy):
    assert "multiple of 4: 4 and 8 are" in refused(mae_video, "--data", toy, "--frames", 5)
    flags = ["--data", toy, "--batch", 6, "--repeat", 4]
    assert "multiple of 4" in refused(mae_video, *flags)


def test_real_clips_train(real, run):
    run(mae_video, "--data", real / "gestures10", "--no-flip", "--smoke", "--out", "g")
    flags = ["--smoke", "--batch", 1, "--allow-missing", "--workers", 0]
    for name in ("ucf101", "hmdb51"):
        run(mae_video, "--data", real / "real_clips" / name, *flags, "--out", name)
