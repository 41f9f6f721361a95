"""The video models where they differ from others, frames and crops, public files, the script."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

import mae_image
import mae_video
from conftest import TINY_VIDEO
from layouts import official_videomae
from mae_video import MAEST, VideoMAE


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)  # the numbers are measured on the official models at ViT-B
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
        assert torch.allclose(found[s], places[0] * (1 - share) + places[1] * share, atol=1e-6)


each_length = pytest.mark.parametrize("n", [1, 9, 16, 33, 64, 99])  # 4 divides 9 - 1, 33 - 1


@each_length
def test_a_dense_clip_takes_every_fourth_frame_and_repeats_the_last_one_it_reaches(n):
    for start in {0, min(3, n - 1)}:
        want = [start]
        while len(want) < 16:
            want.append(want[-1] + 4 * (want[-1] + 4 < n))
        assert mae_video.dense_clip(n, 16, 4, start).tolist() == want
    g, starts = torch.Generator().manual_seed(0), range(max(n - 64, 0) + 1)
    drawn = [mae_video.random_clip("dense", n, 16, 4, g)[0] for _ in range(3000)]
    assert set(drawn) == set(starts) and np.bincount(drawn).min() > 1800 / len(starts)


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
    places = {(y / ((H - 21) // 4), x / ((W - 43) // 4)) for y, x, *hw in boxes if hw == [21, 43]}
    sides = {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2)}
    assert places == sides | {(1, 1), (1, 3), (3, 1), (3, 3)}


@pytest.mark.parametrize("kind, size, decoder, millions", [
    (VideoMAE, "small", (192, 4, 3), 24.0), (VideoMAE, "base", (384, 4, 6), 94.2),
    (VideoMAE, "large", (512, 12, 8), 343.0), (VideoMAE, "huge", (640, 12, 8), 692.5),
    (MAEST, "base", (512, 4, 16), 99.9), (MAEST, "large", (512, 4, 16), 317.7)])
def test_a_public_file_has_the_published_size_and_tells_what_it_can(kind, size, decoder, millions):
    with torch.device("meta"):
        model = kind(16, 224, 2, 16, size, decoder)
    theirs = {VideoMAE: (official_videomae, mae_video.public_videomae, "dense"),
              MAEST: (torch.nn.Module.state_dict, mae_video.public_maest, "linspace")}
    official, read, sampling = theirs[kind]
    state = official(model)
    assert abs(sum(x.numel() for x in state.values()) / 1e6 - millions) < 0.06
    said, ours, guesses = read(mae_image.fuse_qkv(state))
    encoder, decoder = ("x".join(map(str, x)) for x in (mae_image.ENCODERS[size], decoder))
    assert said == {"patch": 16, "tubelet": 2, "size": encoder, "decoder": decoder, "frames": 16,
                    "norm_pix": True, "stride": 4, "sampling": sampling, "img_size": "224"}
    assert guesses == ["size", "decoder", "norm_pix"] + ["frames", "img_size"] * (kind is VideoMAE)
    assert set(ours) == set(model.state_dict())


def test_a_run_starts_from_a_file_of_slowfast_whose_decoder_is_not_the_papers(toy, run, tmp_path):
    own = MAEST(4, 16, 2, 8, (24, 1, 1), (16, 1, 16)).state_dict()
    own = {k: x for k, x in own.items() if not k.startswith(mae_image.DECODER)}
    theirs = ("dec_pos_embed_spatial", "decoder_embed.weight", "mask_token", "pred_head.weight")
    state = own | dict.fromkeys(theirs, torch.zeros(3))
    torch.save({"model_state": state, "epoch": 1600}, tmp_path / "x.pth")
    text = run(mae_video, "--data", toy, "--init", "x.pth", "--smoke", "--lr", 0, "--batch", 4,
               "--workers", 0, "--pictures", 0)
    found = torch.load(tmp_path / "runs/mae_video/checkpoint.pt")
    assert " start new; guesses" in text and " 0 start" not in text
    assert (found["config"]["frames"], found["config"]["img_size"]) == (4, "16")  # by its tables
    assert all(torch.equal(found["model"][k], x) for k, x in own.items())


def film(path):
    return [np.asarray(f.convert("RGB"), float) for f in ImageSequence.Iterator(Image.open(path))]


@pytest.mark.parametrize("flags, painted, height", [  # frames that are painted, pixels of a clip
    (["--img-size", "16x32", "--crop", "multiscale"], 4, 4 * 48),
    (["--model", "mae_st", "--repeat", 4, "--sampling", "linspace", "--norm-pix"], 2, 5 * 96)])
def test_the_script_trains_films_resumes_and_paints(toy, run, tmp_path, flags, painted, height):
    run(mae_video, *TINY_VIDEO, "--data", toy, *flags)
    last = max((tmp_path / "runs/mae_video/pictures").glob("*.png"))
    frames = film(last.with_suffix(".gif"))
    assert np.asarray(Image.open(last)).std() > 20 and len(frames) == painted
    assert all(np.abs(a - b).mean() > 0.1 for a, b in zip(frames, frames[1:]))
    assert "done: " in run(mae_video, "--resume")
    clip = next((toy / "videos/Wheel").glob("*.mp4"))
    assert f"wrote {clip.stem}_painted.png" in run(mae_video, "--picture", clip)
    assert len(film(tmp_path / f"{clip.stem}_painted.gif")) == painted
    assert Image.open(tmp_path / f"{clip.stem}_painted.png").height >= height


def test_bad_input_is_one_line_and_exit_code_2(refused, toy, tmp_path):
    there = next((toy / "videos").rglob("*.mp4"))
    (tmp_path / "x.csv").write_text(f"{there} 0\n{there.with_name('gone.mp4')} 0\n")
    assert "missing; --allow-missing uses the others" in refused(mae_video, "--data", "x.csv")
    assert "multiple of 4: 4 and 8 are" in refused(mae_video, "--data", toy, "--frames", 5)
    assert "multiple of 3" in refused(mae_video, "--data", toy, "--repeat", 3)
