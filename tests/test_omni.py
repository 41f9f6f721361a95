"""The joint model where it differs from the others (see test_mae_image.py), and joint training."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import data
import finetune
import mae_image
import omni
from conftest import TINY_VIDEO
from layouts import official_omni
from mae_video import ClipDataset, Config
from masking import random_mask
from omni import JointDataset, OmniMAE, joint_plan, mixed_plan


def tiny(frames=8):
    torch.manual_seed(0)
    return OmniMAE(frames, (16, 32), 2, 8, (24, 1, 2), (16, 1, 2))


def test_an_image_is_a_clip_of_one_cube_and_other_lengths_are_refused():
    """So the cube embedding is 2-D with the kernel summed over time."""
    model, x = tiny(), torch.randn(2, 3, 16, 32)
    kernel, bias = model.patch_embed.proj.weight.sum(dim=2), model.patch_embed.proj.bias
    want = torch.nn.functional.conv2d(x, kernel, bias, stride=8).flatten(2).transpose(1, 2)
    assert torch.allclose(model.patch_embed(model.cubes(x)), want, atol=1e-5)
    one = tiny(frames=2)
    one.load_state_dict(model.state_dict())
    assert torch.allclose(model.encode(x), one.encode(torch.stack([x, x], dim=2)), atol=1e-6)
    with pytest.raises(ValueError, match=r"takes 8 frames or one image of \(16, 32\)"):
        model.encode(torch.randn(1, 3, 10, 16, 32))


def test_a_joint_plan_mixes_pure_updates_by_their_shares():
    def plan(epoch, *shares):
        return joint_plan(epoch, 100, 40, 8, 4, shares, 0)

    updates = plan(3, 1, 0.5)
    of_images = [u for u in updates if u[0] < 100]
    of_videos = [u for u in updates if u[0] >= 100]
    assert all(max(u) < 100 and len(u) == 8 for u in of_images) and len(of_images) == 12
    assert all(min(u) >= 100 and len(u) == 2 for u in of_videos) and len(of_videos) == 10
    assert len(set(sum(updates, []))) == 12 * 8 + 10 * 2
    assert updates == plan(3, 1, 0.5) != plan(4, 1, 0.5)
    assert updates not in (of_images + of_videos, of_videos + of_images)
    assert max(sum(plan(0, 1, 0), [])) < 100 <= min(sum(plan(0, 0, 1), []))


@pytest.mark.parametrize("pieces", [2, 6])
def test_a_mixed_plan_has_as_many_images_as_clips_in_every_update(pieces):
    def plan(epoch):
        return mixed_plan(epoch, 100, 40, 24, 2, pieces, 0)

    assert len(plan(3)) == 40 // 6  # 12 clips of 6 videos each
    for update in plan(3):
        images, videos = update[: pieces // 2], update[pieces // 2 :]
        assert [len(p) for p in images] == [24 // pieces] * (pieces // 2)
        assert [len(p) for p in videos] == [12 // pieces] * (pieces // 2)
        assert max(sum(images, [])) < 100 <= min(sum(videos, []))
    flat = [i for update in plan(3) for piece in update for i in piece]
    assert len(set(flat)) == len(flat) and max(flat) < 140
    assert plan(3) == plan(3) != plan(4)


def open_both(toy):
    cfg = Config(frames=8, stride=1, sampling="dense", img_size="16x32", repeat=2)
    images = data.ImageDataset(data.list_images(toy), cfg, True)
    return images, ClipDataset(data.list_videos(toy), cfg, True)


def test_the_items_of_a_joint_dataset_are_the_images_and_then_the_videos(toy, tmp_path):
    images, videos = open_both(toy)
    joint = JointDataset(images, videos)
    assert len(joint) == len(joint.paths) == len(joint.labels) == 64 + 72 and joint.repeat == 2
    for item, (source, i) in {5: (images, 5), 64 + 7: (videos, 7)}.items():
        pixels, number, problems = joint[1, item]
        assert torch.equal(pixels, source[1, i][0]) and number == item and not problems
        assert joint.paths[item] == source.paths[i]
    videos.paths = videos.paths.copy()
    videos.paths[7] = broken = str(tmp_path / "gone.mp4")
    pixels, number, problems = joint[1, 64 + 7]
    assert problems[0][0] == broken and torch.equal(pixels, videos[1, number - 64][0])


def test_a_mixed_update_has_the_loss_and_gradients_of_both_together(toy, tmp_path, monkeypatch):
    joint, model, gradients = JointDataset(*open_both(toy)), tiny(), []
    cfg = omni.Config(batch=8, repeat=2, accum=2, epochs=1, workers=0, lr=0.0, log_every=1,
                      pictures=0, device="cpu", smoke=True, out=str(tmp_path / "run"))

    def plan(epoch):
        return mixed_plan(epoch, 64, 72, 8, 2, 2, 0)

    def draw_mask(batch, rows, generator):
        return random_mask(rows, (1, 2, 4) if batch.ndim == 4 else model.grid, 0.5, generator)

    def step(self):
        gradients.append([p.grad.clone() for p in model.parameters()])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    mae_image.pretrain(model, joint, draw_mask, None, cfg, plan)
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    for step in range(3):
        losses, seed = [], data.seeded(0, 1, step).initial_seed()
        for k, piece in enumerate(plan(0)[step]):
            batch = torch.cat([joint[0, i][0] for i in piece])
            mask = draw_mask(batch, 8, torch.Generator().manual_seed(seed))
            losses.append(model(model.normalize(batch), mask[4 * k : 4 * k + 4])[0])
        model.zero_grad()
        (sum(losses) / 2).backward()
        assert math.isclose(json.loads(lines[step])["loss"], sum(losses).item() / 2, rel_tol=1e-6)
        for p, caught in zip(model.parameters(), gradients[step], strict=True):
            assert torch.allclose(p.grad, caught, atol=1e-6)


@pytest.mark.parametrize("trainer", [False, True])
def test_a_public_file_tells_its_sizes_and_the_heads_are_a_guess(trainer):
    with torch.device("meta"):
        model = OmniMAE(16, 224, 2, 14, "huge", (512, 8, 16))
        state = official_omni(model, trainer)
    if not trainer:  # there the decoder's q, k, v have no bias
        state = {k: v for k, v in state.items() if "decoder" not in k or "qkv.bias" not in k}
    said, ours, guesses = omni.public_omni(state)
    assert said == {"patch": 14, "tubelet": 2, "size": "1280x32x16", "decoder": "512x8x16",
                    "norm_pix": True, "frames": 16, "stride": 4, "sampling": "dense",
                    "img_size": "224"}
    assert guesses == ["size", "decoder", "norm_pix", "frames"]
    assert set(ours) == set(model.state_dict())


@pytest.mark.parametrize("flags, weight", [
    (["--image-share", 0.5, "--img-size", "16x32"], 2 / (2 + 9)),  # 72 videos, 8 an update
    (["--joint", "mixed", "--norm-pix"], 0.5)])
def test_the_script_trains_on_both_draws_both_resumes_and_paints_one_of_either(
        toy, run, tmp_path, flags, weight):
    text = run(omni, *TINY_VIDEO, "--data", toy, "--images", toy, "--repeat", 2, *flags)
    folder, image = tmp_path / "runs/omni", next((toy / "rgb/val").rglob("*.jpg"))
    assert "held-out images" in text and "held-out videos" in text and "done: " in text
    assert np.asarray(Image.open(max((folder / "pictures").glob("*.png")))).std() > 20
    scores = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    for both, part in (("val_loss", "loss"), ("baseline", "baseline")):
        parts = scores[f"images_{part}"], scores[f"videos_{part}"]
        assert math.isclose(scores[both], weight * parts[0] + (1 - weight) * parts[1], rel_tol=1e-6)
    assert {"object in images", "object in videos"} <= set(scores)
    assert "done: " in run(omni, "--resume")
    for path in (image, next((toy / "videos/Wheel").glob("*.mp4"))):
        assert f"wrote {path.stem}_painted.png" in run(omni, "--picture", path)
        assert (tmp_path / f"{path.stem}_painted.gif").exists() == (path != image)
    for kind in ("images", "videos"):  # one checkpoint, two tasks
        text = run(finetune, "--init", folder / "checkpoint.pt", "--data", toy, "--classify", kind,
                   "--batch", 8, "--workers", 0, "--clips", 1, "--smoke", "--out", kind)
        assert "tensors used" in text and "done: finetune: top-1" in text


def test_an_epoch_without_updates_of_either_kind_draws_both(toy, run, tmp_path):
    run(omni, *TINY_VIDEO, "--data", toy, "--images", toy, "--epochs", 0, "--batch", 1000)
    assert (tmp_path / "runs/omni/pictures/update_000000_images.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--mask-ratio-image", 1], "outside [0, 1)"),
    (["--image-share", 0, "--video-share", 0], "do not fill one update"),
    (["--joint", "mixed", "--batch", 9], "must be a multiple of 2")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(omni, "--data", toy, "--images", toy, "--workers", 0, *flags)
