import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mae_image
import mae_video
import omni
from conftest import TINY_VIDEO
from masking import InputError, hidden, random_mask, restore, tube_mask
from omni import OmniMAE

TINY = [*TINY_VIDEO, "--size", "16x1x2"]


def tiny(norm_pix=True, **options):
    torch.manual_seed(0)
    return OmniMAE(8, 32, 2, 8, (32, 2, 4), (16, 1, 2), norm_pix, **options)


def samples(model, images=4, clips=3):
    g = torch.Generator().manual_seed(0)
    t, h, w = model.grid
    return ((torch.randn(images, 3, 32, 32, generator=g), torch.randn(clips, 3, 8, 32, 32, generator=g)),
            (random_mask(images, (1, h, w), 0.75, g, "hide"), tube_mask(clips, model.grid, 0.75, g)))  # fmt: skip


def test_on_images_the_cube_embedding_is_a_2d_one_with_the_kernel_summed_over_time():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    kernel = model.patch_embed.proj.weight.sum(dim=2)
    want = torch.nn.functional.conv2d(x, kernel, model.patch_embed.proj.bias, stride=8).flatten(2).transpose(1, 2)
    assert torch.allclose(model.patch_embed(mae_video.patchify(model.as_clip(x), 2, 8)), want, atol=1e-5)


def test_an_image_is_a_clip_of_one_cube_in_the_first_time_slot():
    model, one = tiny().eval(), OmniMAE(2, 32, 2, 8, (32, 2, 4), (16, 1, 2))
    one.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.encode(x), one.encode(x[:, :, None].expand(-1, -1, 2, -1, -1)), atol=1e-6)


def test_a_packed_step_is_two_separate_ones_in_loss_and_gradients():
    model = tiny().double()
    xs, masks = samples(model)
    xs = [x.double() for x in xs]
    loss, preds = model(tuple(xs), masks)
    loss.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    losses = [model(x, mask) for x, mask in zip(xs, masks)]
    (sum(x for x, _ in losses) / 2).backward()
    assert abs(loss.item() - sum(x.item() for x, _ in losses) / 2) < 1e-6  # the target is made in float32
    assert all(torch.allclose(a, b, atol=1e-10) for a, (_, b) in zip(preds, losses))
    for n, p in model.named_parameters():
        assert torch.allclose(packed[n], p.grad, atol=1e-6), n


def test_image_and_video_steps_share_every_weight():
    model = tiny()
    for x, mask in zip(*samples(model)):
        model.zero_grad()
        model(x, mask)[0].backward()
        without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert {n for n in without if not n.endswith("qkv.bias")} == set()


def test_the_decoder_is_equal_to_one_of_maes_kind_with_its_tables_projected():
    """Mask token and positions at encoder width, then a linear map: the same as both mapped beforehand."""
    model = tiny()
    torch.nn.init.normal_(model.mask_token)
    (_, x), (_, mask) = samples(model)
    latent = model.forward_encoder([mae_video.patchify(x, 2, 8)], [mask])[0]
    W, b = model.decoder_embed.weight, model.decoder_embed.bias
    tokens = restore(latent @ W.T + b, mask, model.mask_token[0] @ W.T + b) + model.pos_embed @ W.T
    for block in model.decoder_blocks:
        tokens = block(tokens)
    want = model.decoder_norm(tokens)
    assert torch.allclose(model.forward_decoder([latent], [mask])[0], want, atol=1e-4)


def test_both_copies_of_an_image_are_the_target_and_the_divisor_is_511():
    model = tiny()
    (x, _), (mask, _) = samples(model)
    target = model.forward_target(hidden(model.target_patches(x), mask)).reshape(4, -1, 2, 64, 3)
    assert torch.equal(target[:, :, 0], target[:, :, 1])
    pixels = (x * torch.tensor(model.STD)[:, None, None] + torch.tensor(model.MEAN)[:, None, None])[0, 1]
    number = int(mask[0].nonzero()[2])
    patch = pixels.reshape(4, 8, 4, 8)[number // 4, :, number % 4].flatten()
    both = torch.cat([patch, patch])  # unbiased over 2 * 64 values here, 2 * 256 in the paper
    want = (patch - patch.mean()) / (both.var() + 1e-6).sqrt()
    assert torch.allclose(target[0, 2, 0, :, 1], want, atol=1e-4)


def test_the_plan_mixes_pure_updates_by_their_shares():
    updates = omni.joint_plan(3, 100, 40, 8, 4, (1, 0.5), 0)
    pure = [all(i < 100 for i in u) or all(i >= 100 for i in u) for u in updates]
    images = [u for u in updates if u[0] < 100]
    assert all(pure) and len(images) == 12 and len(updates) == 12 + 10 and {len(u) for u in updates} == {8, 2}
    flat = [i for u in images for i in u]
    assert len(set(flat)) == 96 and updates != omni.joint_plan(4, 100, 40, 8, 4, (1, 0.5), 0)
    assert updates == omni.joint_plan(3, 100, 40, 8, 4, (1, 0.5), 0)
    assert [u[0] < 100 for u in updates] != sorted((u[0] < 100 for u in updates), reverse=True)
    assert all(u[0] >= 100 for u in omni.joint_plan(0, 100, 40, 8, 4, (0, 1), 0))


def test_mixed_items_hold_the_clips_and_images_they_name(toy):
    images = data.ImageDataset(data.list_images(toy), 32, 0)
    videos = data.ClipDataset(data.list_videos(toy), 8, 1, 32, 0, repeat=2)
    pixels, number, broken = omni.JointDataset(images, videos, True, 3, 0)[1, 5]
    imgs, clips = tiny().normalize(pixels)
    assert imgs.shape == (6, 3, 32, 32) and clips.shape == (2, 3, 8, 32, 32) and number == 5 and not broken
    assert torch.equal(clips, mae_image.normalize(videos[1, 5][0], OmniMAE.MEAN, OmniMAE.STD))
    first = data.seeded(0, 8, 1, 5)
    chosen = torch.randint(len(images), (6,), generator=first)
    want = mae_image.normalize(images[1, int(chosen[4])][0], OmniMAE.MEAN, OmniMAE.STD)
    assert torch.equal(imgs[4:5], want)
    joint = omni.JointDataset(images, videos, False, 1, 0)
    assert joint[1, len(images) + 5][1] == len(images) + 5 and len(joint.paths) == len(joint) == len(images) + len(
        videos
    )


def test_the_loss_falls_on_both():
    model = tiny(norm_pix=False)
    xs, masks = samples(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    before = [model(x, m)[0].item() for x, m in zip(xs, masks)]
    for _ in range(30):
        loss, _ = model(xs, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(model(x, m)[0].item() < 0.8 * b for x, m, b in zip(xs, masks, before))


def test_other_token_counts_are_named():
    with pytest.raises(InputError, match=r"the model was built for images of \(h, w\) = \(4, 4\) and clips"):
        tiny().encode(torch.randn(1, 3, 4, 32, 32))


@pytest.mark.parametrize(
    "flags", [["--image-share", 0.5], ["--joint", "mixed", "--repeat", 2, "--per-clip", 2, "--norm-pix"]], ids=["pure", "mixed"]
)
def test_the_script_trains_on_both_draws_both_and_resumes(toy, run, tmp_path, flags):
    text = run("omni.py", *TINY, "--data", toy, "--images", toy, "--repeat", 2, *flags)
    folder = tmp_path / "runs/omni"
    assert "held-out images" in text and "done: " in text
    assert np.asarray(Image.open(sorted((folder / "pictures").glob("*.png"))[-1])).std() > 20
    scores = json.loads([x for x in (folder / "log.jsonl").read_text().splitlines() if "chance_videos" in x][-1])
    w = 0.5 if "mixed" in flags else 2 / (2 + 4)  # half of 64 images, two clips of 36 videos each, in updates of 16
    for both, part in (("val_loss", ""), ("chance", "chance_")):
        assert math.isclose(scores[both], w * scores[f"{part}images"] + (1 - w) * scores[f"{part}videos"], rel_tol=1e-6)
    assert "done: " in run("omni.py", "--resume")
    for images in ("--images", "--no-images"):  # one checkpoint, two tasks
        text = run("finetune.py", "--init", folder / "checkpoint.pt", "--data", toy, images, "--epochs", 1, "--batch", 8,
                   "--workers", 0, "--clips", 1, "--check-every", 0, "--smoke", "--out", f"ft{images}")  # fmt: skip
        assert "tensors used" in text and "done: top-1" in text


@pytest.mark.parametrize("flags, message", [
    (["--img-size", 60], "use --img-size 56 or 64"), (["--frames", 5], "clip length 5"), (["--mask-ratio", 0], "hides nothing"),
    (["--mask-ratio-image", 1], "outside [0, 1)"), (["--image-share", 0, "--video-share", 0], "nothing to train on"),
    (["--images", "nowhere"], "nowhere does not exist"), (["--batch", 60], "36 videos do not fill one update"), (["--batch", 100], "64 images do not fill"),
    (["--joint", "mixed", "--image-share", 0], "are for --joint interleaved"), (["--per-clip", 4], "is for --joint mixed"),
    (["--joint", "both"], "invalid choice"), (["--decoder-heads", 5], "multiple of 5 heads"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    assert message in refused(omni, "--data", toy, *([] if "--images" in flags else ["--images", toy]), *flags)


def test_an_empty_modality_is_one_line(refused, toy, tmp_path):
    (tmp_path / "none").mkdir()
    assert "holds no files that end in .jpg" in refused(omni, "--data", toy, "--images", "none")
    assert "holds no files that end in .avi" in refused(omni, "--data", "none", "--images", toy)
