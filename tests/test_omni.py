"""The joint model where it differs from the others (see test_mae_image.py), and joint training."""

import functools
import json
import math

import pytest
import torch

import data
import finetune
import mae_image
import omni
from conftest import TINY_VIDEO
from layouts import official_omni
from mae_video import ClipDataset, Config
from masking import random_mask
from omni import JointDataset, OmniMAE, joint_plan, mixed_plan


def test_a_joint_plan_mixes_pure_updates_by_their_shares():
    plan = functools.partial(joint_plan, images=100, videos=40, batch=8, repeat=4, seed=0)
    updates = plan(3, shares=(1, 0.5))
    images = [u for u in updates if max(u) < 100 and len(u) == 8]
    videos = [u for u in updates if min(u) >= 100 and len(u) == 2]
    assert (len(images), len(videos), len(updates)) == (12, 10, 22)
    assert len(set(sum(updates, []))) == 12 * 8 + 10 * 2
    assert updates == plan(3, shares=(1, 0.5)) != plan(4, shares=(1, 0.5))
    assert updates not in (images + videos, videos + images)
    assert max(sum(plan(0, shares=(1, 0)), [])) < 100 <= min(sum(plan(0, shares=(0, 1)), []))


@pytest.mark.parametrize("pieces", [2, 6])
def test_a_mixed_plan_has_as_many_images_as_clips_in_every_update(pieces):
    plan, again, other = (mixed_plan(epoch, 100, 40, 24, 2, 0, pieces) for epoch in (3, 3, 4))
    assert plan == again != other and len(plan) == 40 // 6  # 12 clips of 6 videos each
    half = pieces // 2
    for update in plan:
        assert [len(piece) for piece in update] == [24 // pieces] * half + [12 // pieces] * half
        assert max(sum(update[:half], [])) < 100 <= min(sum(update[half:], []))
    flat = [i for update in plan for piece in update for i in piece]
    assert len(set(flat)) == len(flat) and max(flat) < 140


@pytest.fixture
def joint(toy):
    cfg = Config(frames=8, stride=1, sampling="dense", img_size="16x32", repeat=2)
    images = data.ImageDataset(data.list_images(toy), cfg, True)
    return JointDataset(images, ClipDataset(data.list_videos(toy), cfg, True))


def test_the_items_of_a_joint_dataset_are_the_images_and_then_the_videos(joint):
    assert len(joint) == len(joint.paths) == len(joint.labels) == 64 + 72 and joint.repeat == 2
    for item, source, i in (5, joint.images, 5), (64 + 7, joint.videos, 7):
        pixels, number, problems = joint[1, item]
        assert torch.equal(pixels, source[1, i][0]) and number == item and not problems
        assert joint.paths[item] == source.paths[i]
    joint.videos.paths[7] = "gone.mp4"
    pixels, number, problems = joint[1, 64 + 7]
    assert problems[0][0] == "gone.mp4" and torch.equal(pixels, joint.videos[1, number - 64][0])


def test_a_mixed_update_has_the_gradients_of_both_together(joint, tmp_path, monkeypatch):
    model, gradients = OmniMAE(8, (16, 32), 2, 8, (24, 1, 2), (16, 1, 2)), []
    with pytest.raises(ValueError, match=r"takes \(2, 16, 32\) or \(8, 16, 32\)"):
        model.encode(torch.zeros(1, 3, 10, 16, 32))  # another length
    cfg = omni.Config(batch=8, repeat=2, accum=2, epochs=1, workers=0, lr=0.0, log_every=1,
                      pictures=0, device="cpu", smoke=True, out=str(tmp_path / "run"))
    plan = functools.partial(mixed_plan, images=64, videos=72, batch=8, repeat=2, pieces=2, seed=0)
    def draw_mask(batch, rows, generator):
        return random_mask(rows, (1, 2, 4) if batch.ndim == 4 else model.grid, 0.5, generator)
    def step(self):
        gradients.append([p.grad.clone() for p in model.parameters()])
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    mae_image.pretrain(model, joint, draw_mask, None, cfg, plan)
    for step in range(3):
        losses, seed = [], data.seeded(0, 1, step).initial_seed()
        for k, piece in enumerate(plan(0)[step]):
            batch = torch.cat([joint[0, i][0] for i in piece])
            mask = draw_mask(batch, 8, torch.Generator().manual_seed(seed))
            losses.append(model(model.normalize(batch), mask[4 * k : 4 * k + 4])[0])
        found = torch.autograd.grad(sum(losses) / 2, list(model.parameters()))
        for gradient, caught in zip(found, gradients[step], strict=True):
            assert torch.allclose(gradient, caught, atol=1e-6)


def test_a_public_file_tells_its_sizes_and_the_heads_are_a_guess():
    with torch.device("meta"):
        model = OmniMAE(16, 224, 2, 14, "huge", (512, 8, 16))
    state = official_omni(model)  # the decoder's q, k, v have no bias there
    state = {k: v for k, v in state.items() if "decoder" not in k or "qkv.bias" not in k}
    said, ours, guesses = omni.public_omni(state)
    assert said == dict(patch=14, tubelet=2, size="1280x32x16", decoder="512x8x16", norm_pix=True,
                        frames=16, stride=4, sampling="dense", img_size="224")
    assert guesses == ["size", "decoder", "norm_pix", "frames"]
    assert set(ours) == set(model.state_dict())


@pytest.mark.parametrize("flags, weight", [
    (["--image-share", 0.5, "--img-size", "16x32"], 2 / (2 + 9)),  # 72 videos, 8 an update
    (["--joint", "mixed", "--norm-pix"], 0.5)])
def test_the_script_trains_on_both_resumes_and_paints_either(toy, run, tmp_path, flags, weight):
    flags = [*TINY_VIDEO, "--data", toy, "--images", toy, "--repeat", 2, *flags]
    text, folder = run(omni, *flags), tmp_path / "runs/omni"
    assert "held-out images" in text and "held-out videos" in text and "done: " in text
    scores = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    for both, part in ("val_loss", "loss"), ("baseline", "baseline"):
        parts = scores[f"images_{part}"], scores[f"videos_{part}"]
        assert math.isclose(scores[both], weight * parts[0] + (1 - weight) * parts[1], rel_tol=1e-6)
    assert {"object in images", "object in videos"} <= set(scores)
    assert "done: " in run(omni, "--resume")
    for path in next((toy / "rgb/val").rglob("*.jpg")), next((toy / "videos").rglob("*.mp4")):
        assert f"wrote {path.stem}_painted.png" in run(omni, "--picture", path)
        assert (tmp_path / f"{path.stem}_painted.gif").exists() == (path.suffix == ".mp4")
    for kind in ("images", "videos"):  # one checkpoint, two tasks
        text = run(finetune, "--init", folder / "checkpoint.pt", "--data", toy, "--classify", kind,
                   "--batch", 8, "--workers", 0, "--clips", 1, "--smoke", "--out", kind)
        assert "tensors used" in text and "done: finetune: top-1" in text
    run(omni, *flags, "--epochs", 0, "--batch", 1000, "--out", "none")  # no updates of either kind
    assert (tmp_path / "none/pictures/update_000000_images.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--mask-ratio-image", 1], "outside [0, 1)"), (["--joint", "mixed", "--batch", 9], "of 2"),
    (["--image-share", 0, "--video-share", 0], "do not fill one update")])
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(omni, "--data", toy, "--images", toy, "--workers", 0, *flags)
