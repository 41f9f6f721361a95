import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import finetune
import mae_image
import mae_video
import multimae
import omni
from conftest import ROOT, TINY_IMAGE, copy_encoder
from mae_image import MAE
from masking import InputError, hidden, random_mask


def tiny(norm_pix=True, **options):
    torch.manual_seed(0)
    return MAE(32, 8, (32, 2, 4), (16, 1, 2), norm_pix, **options)


def masked(model, batch=4, ratio=0.75, seed=0):
    imgs = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return imgs, random_mask(batch, model.grid, ratio, torch.Generator().manual_seed(seed))


# ---- the model against slow loops and well-known modules ----------------------------------------------------


def test_patchify_matches_a_loop_and_has_an_inverse():
    imgs = torch.randn(2, 3, 8, 12)
    patches = mae_image.patchify(imgs, 4)
    for r in range(2):
        for c in range(3):
            patch = imgs[1, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
            assert torch.equal(patches[1, r * 3 + c], patch.permute(1, 2, 0).flatten())
    assert torch.equal(mae_image.unpatchify(patches, 4, 2, 3), imgs)


def test_the_patch_embedding_is_the_strided_convolution():
    embed, imgs = mae_image.PatchEmbed((4, 4), 3, 10), torch.randn(2, 3, 8, 12)
    want = embed.proj(imgs).flatten(2).transpose(1, 2)
    assert torch.allclose(embed(mae_image.patchify(imgs, 4)), want, atol=1e-5)


def test_the_encoder_is_torchvisions_vision_transformer():
    model = tiny()
    vit = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 128, num_classes=5)
    with torch.no_grad():
        vit.conv_proj.weight.copy_(model.patch_embed.proj.weight)
        vit.conv_proj.bias.copy_(model.patch_embed.proj.bias)
        vit.class_token.copy_(model.cls_token)
        vit.encoder.pos_embedding.copy_(torch.cat([torch.zeros(1, 1, 32), model.pos_embed], dim=1))
        copy_encoder(model, vit.encoder)
    imgs, _ = masked(model)
    vit.eval()
    x = torch.cat([vit.class_token.expand(4, -1, -1), vit._process_input(imgs)], dim=1)
    assert torch.allclose(model.encode(imgs), vit.encoder(x), atol=1e-5)


def test_hidden_pixels_do_not_reach_the_encoder_and_visible_ones_not_the_loss():
    model = tiny()
    imgs, mask = masked(model)
    patches = mae_image.patchify(imgs, 8)
    other = torch.where(mask[..., None], torch.randn_like(patches), patches)
    assert torch.equal(model.forward_encoder(patches, mask), model.forward_encoder(other, mask))
    pred = torch.randn(4, 12, 192)
    other = torch.where(mask[..., None], patches, torch.randn_like(patches))
    assert torch.equal(model.forward_loss(patches, pred, mask), model.forward_loss(other, pred, mask))


def test_encode_is_the_encoder_without_mask_and_ratio_0_has_no_loss():
    model = tiny()
    imgs, mask = masked(model, ratio=0)
    assert torch.equal(model.encode(imgs), model.forward_encoder(mae_image.patchify(imgs, 8), mask))
    loss, pred = model(imgs, mask)
    loss.backward()
    assert loss == 0 and pred.shape == (4, 0, 192)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_chance_level_of_normalised_patches_is_one():
    model = tiny()
    imgs, mask = masked(model, batch=64)
    target = model.forward_target(hidden(model.target_patches(imgs), mask))
    assert abs(float((target**2).mean()) - 191 / 192) < 1e-4  # unbiased variance of 192 numbers


def test_flat_patches_give_finite_targets():
    model = tiny()
    loss, _ = model(torch.zeros(2, 3, 32, 32), masked(model, 2)[1])
    assert torch.isfinite(loss)


def test_images_need_not_be_square():
    model = MAE((16, 32), 8, (32, 1, 4), (16, 1, 2))
    mask = random_mask(2, model.grid, 0.5, torch.Generator())
    assert model.grid == (1, 2, 4) and model(torch.randn(2, 3, 16, 32), mask)[1].shape == (2, 4, 192)


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = MAE(32, 16, (768, 1, 12), (512, 1, 16))
    assert abs(model.blocks[0].attn.qkv.weight.std().item() - 0.0255) < 2e-4  # fused matrix, measured officially
    bound = (6 / (768 + 768)) ** 0.5  # Xavier of the flattened convolution
    assert 0.99 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert abs(model.cls_token.std().item() - 0.02) < 2e-3 and model.blocks[0].mlp.fc1.bias.abs().max() == 0


def test_parameter_counts_are_the_published_ones():
    """facts measured on the official models, in millions; ours leave out the fixed tables (0.25 M for ViT-B)."""
    with torch.device("meta"):
        for size, millions, tables in (("base", 111.9, 197 * (768 + 512)), ("large", 329.5, 197 * (1024 + 512))):
            count = sum(p.numel() for p in MAE(224, 16, size, (512, 8, 16)).parameters())
            assert abs((count + tables) / 1e6 - millions) < 0.06, size


def test_the_loss_falls():
    torch.manual_seed(0)
    model = tiny(norm_pix=False)
    ramp = torch.linspace(-1, 1, 32)
    imgs = (torch.rand(64, 3, 1, 1) * 2 - 1) * ramp + (torch.rand(64, 3, 1, 1) * 2 - 1) * ramp[:, None]
    optimizer = torch.optim.AdamW(mae_image.param_groups(model, 0.05), 6e-3)
    losses = []
    for step in range(200):
        loss, _ = model(imgs, random_mask(64, model.grid, 0.75, torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    chance = imgs.var().item()
    assert losses[-1] < 0.5 * chance < losses[0]


def test_compiled_steps_equal_eager_ones():
    model = tiny()
    imgs, mask = masked(model)
    want = model(imgs, mask)
    model.compile(backend="aot_eager")  # graph capture without a compiler of machine code
    got = model(imgs, mask)
    assert torch.allclose(want[0], got[0], atol=1e-6) and torch.allclose(want[1], got[1], atol=1e-5)
    assert not any("_orig_mod" in k for k in model.state_dict())


# ---- pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [False, True])
def test_pictures_show_what_was_hidden_and_paste_the_visible_back(norm_pix):
    model = tiny(norm_pix)
    imgs, mask = masked(model)
    imgs = imgs.clamp(-1, 1)
    loss, chance, pictures = mae_image.reconstruct(model, imgs, mask)
    assert math.isclose(loss, model(imgs, mask)[0].item(), rel_tol=1e-5)
    target = model.forward_target(hidden(mae_image.patchify(imgs, 8), mask))
    assert math.isclose(chance, ((target - target.mean()) ** 2).mean().item(), rel_tol=1e-5)  # the best constant's loss
    original = (imgs.movedim(1, -1) * torch.tensor(MAE.STD) + torch.tensor(MAE.MEAN)).movedim(-1, 1)
    hole = mae_image.unpatchify(mask[..., None].expand(-1, -1, 192), 8, 4, 4)
    star = "*" * norm_pix
    assert torch.allclose(pictures["original"][:, 0], original, atol=1e-5)
    assert torch.allclose(pictures["masked"][:, 0], torch.where(hole, 0.5, original), atol=1e-5)
    assert torch.allclose(pictures["pasted in" + star][:, 0][~hole], original[~hole], atol=1e-5)
    assert not torch.allclose(pictures["pasted in" + star][:, 0][hole], original[hole], atol=1e-2)
    assert ("knowing nothing*" in pictures) == norm_pix


def test_a_perfect_prediction_gives_the_original_back(monkeypatch):
    model = tiny(norm_pix=True)
    imgs, mask = masked(model)
    perfect = model.forward_target(hidden(model.target_patches(imgs), mask))
    monkeypatch.setattr(model, "forward", lambda imgs, mask: (torch.zeros(()), perfect))
    pictures = mae_image.reconstruct(model, imgs, mask)[2]
    assert torch.allclose(pictures["pasted in*"], pictures["original"], atol=1e-4)


# ---- public checkpoints -----------------------------------------------------------------------------------------


def official(model):
    """The state dict as facebookresearch/mae would write it."""
    row = lambda table: torch.cat([torch.zeros(1, 1, table.shape[2]), table], dim=1)
    return {**model.state_dict(), "pos_embed": row(model.pos_embed), "decoder_pos_embed": row(model.decoder_pos_embed)}


def test_full_and_encoder_only_public_files_load(tmp_path):
    source, full, encoder = tiny(), tmp_path / "full.pth", tmp_path / "encoder.pth"
    state = official(source)
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}, full)
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}}, encoder)
    torch.manual_seed(5)
    for path, text in ((full, "tensors used"), (encoder, "of the decoder start fresh")):
        model = MAE(32, 8, (32, 2, 4), (16, 1, 2))
        assert text in mae_image.load_weights(model, path, "mae_image")
        assert torch.equal(model.encode(torch.ones(1, 3, 32, 32)), source.encode(torch.ones(1, 3, 32, 32)))
    model = MAE(64, 8, (32, 2, 4), (16, 1, 2))  # another image size: positions are computed, so it fits
    mae_image.load_weights(model, full, "mae_image")


def test_a_checkpoint_of_another_grid_is_taken_and_named(tmp_path):
    config = {"size": "32x2x4", "decoder_heads": 2, "img_size": 32, "patch": 8}
    torch.save({"script": "mae_image", "model": tiny().state_dict(), "config": config}, tmp_path / "x.pt")
    said = lambda side: mae_image.load_weights(MAE(side, 8, (32, 2, 4), (16, 1, 2)), tmp_path / "x.pt", "mae_image")
    assert "trained on 4 x 4 patches, so the positions of 8 x 8 are new to it" in said(64) and "trained on" not in said(32)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("how, message", [
    ("cut off", "damaged or cut off"), ("text", "no checkpoint at all"), ("code", "Python code"), ("gone", "cannot read"),
    ("folder", "cannot read"), ("list", "holds a list"), ("larger", "does not fit"), ("strange", "unknown stranger"),
    ("less", "no norm.bias"), ("half", "no decoder_norm.bias"), ("video", "written by mae_video.py"), ("empty", "no checkpoint at all"), ("words", "no cls_token"),
])  # fmt: skip
def test_a_wrong_file_is_refused_with_one_line(tmp_path, how, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "x.pth", official(tiny())
    if how == "cut off":
        torch.save({"model": state}, path)
        path.write_bytes(path.read_bytes()[:9000])
    elif how == "text":
        path.write_text("hello")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.mkdir()
    elif how != "gone":
        state = {"code": {**state, "evil": Evil()}, "list": [1], "strange": {**state, "stranger": torch.ones(1)},
                 "less": {k: v for k, v in state.items() if k != "norm.bias"},
                 "half": {k: v for k, v in state.items() if k != "decoder_norm.bias"},
                 "words": {"model": "mae_vit_base"}, "video": {"script": "mae_video", "model": state},
                 "larger": official(MAE(32, 8, (64, 2, 4), (16, 1, 2)))}[how]  # fmt: skip
        torch.save(state, path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        mae_image.load_weights(tiny(), path, "mae_image")
    assert "\n" not in str(error.value) and not (tmp_path / "hacked").exists()


# ---- the loop: order, resume, processes, faults -----------------------------------------------------------------


def test_batches_of_two_processes_are_those_of_one():
    plan = lambda epoch: mae_image.shuffled(0, epoch, 30, 8)
    one = list(mae_image.Batches(plan, 0, 6, 0, 1, 1))
    ranks = [list(mae_image.Batches(plan, 0, 6, rank, 2, 1)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks)] == one
    pieces = list(mae_image.Batches(plan, 0, 6, 0, 1, 4))
    assert [sum(pieces[i : i + 4], []) for i in range(0, 24, 4)] == one
    assert list(mae_image.Batches(plan, 4, 6, 0, 1, 1)) == one[4:]
    first = [item for batch in one[:3] for _, item in batch]
    assert len(set(first)) == 24 and first != [item for batch in one[3:] for _, item in batch]


def test_the_number_format_is_the_devices_unless_one_is_asked_for(monkeypatch):
    cfg = mae_image.Config()
    assert mae_image.choose_precision(cfg, torch.device("cpu")) == torch.float32
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
        assert mae_image.choose_precision(cfg, torch.device("cuda")) == dtype
    cfg.precision = "float16"
    assert mae_image.choose_precision(cfg, torch.device("cpu")) == torch.float16


def losses(folder):
    lines = [json.loads(x) for x in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [(x["step"], x["loss"]) for x in lines if "loss" in x]


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def same_state(a, b):
    a, b = weights(a), weights(b)
    same = all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    moments = list(zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True))
    assert moments and a["step"] > 0
    return same and a["step"] == b["step"] and all(torch.equal(x[k], y[k]) for x, y in moments for k in x)


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
    """An uninterrupted run: 8 epochs of 4 updates, a log line every 3."""
    folder = tmp_path_factory.mktemp("straight")
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 8, "--log-every", 3]
    subprocess.run(
        [sys.executable, ROOT / "mae_image.py", *map(str, flags)], cwd=folder, check=True, capture_output=True
    )
    return folder / "runs/mae_image", flags


@pytest.mark.parametrize("extra", [[], ["--workers", 2, "--accum", 2]], ids=["plain", "workers and accumulation"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(toy, run, tmp_path, straight, extra):
    """SIGKILL at a random moment, --resume: bit-identical weights, moments and logged losses."""
    reference, flags = straight
    if extra:  # accumulation adds in another order, so it has a reference of its own
        run("mae_image.py", *flags, *extra, "--out", "whole")
        reference = tmp_path / "whole"
    for attempt in range(5):
        out = tmp_path / f"killed{attempt}"
        process = subprocess.Popen([sys.executable, ROOT / "mae_image.py", *map(str, flags + extra), "--out", out],
                                   cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        while not (out / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(np.random.default_rng().uniform(0, 0.15))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if weights(out)["step"] < 32:
            break
    else:
        pytest.fail("the run was too fast to be killed, five times")
    assert "resumed" in run("mae_image.py", "--resume", "--out", out)
    assert same_state(out, reference) and losses(out) == losses(reference)


def test_a_run_goes_on_where_auto_means_another_number_format(straight, tmp_path, monkeypatch, capsys):
    """From a CPU to a GPU without bfloat16: the file has no state of a loss scaler, which float16 needs."""
    shutil.copytree(straight[0], tmp_path / "run")
    monkeypatch.setattr(mae_image, "choose_precision", lambda cfg, device: torch.float16)
    monkeypatch.setattr(sys, "argv", ["mae_image.py", "--resume", "--out", str(tmp_path / "run")])
    mae_image.main()
    assert "float16 on 1 x cpu" in capsys.readouterr().out


def test_ctrl_c_saves_and_says_how_to_go_on(toy, run, tmp_path):
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 500, "--workers", 1]
    process = subprocess.Popen([sys.executable, ROOT / "mae_image.py", *map(str, flags)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    for line in process.stdout:
        if " update " in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to the workers, too
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130, text
    assert "go on with: python mae_image.py --resume --out runs/mae_image" in text and "Traceback" not in text
    step = weights(tmp_path / "runs/mae_image")["step"]
    assert 0 < step < 2000 and f"stopped after update {step}" in text


def test_accumulation_and_workers_do_not_change_the_result(straight, run, tmp_path):
    reference, flags = straight
    run("mae_image.py", *flags, "--out", "w", "--workers", 2)
    assert same_state(tmp_path / "w", reference)
    run("mae_image.py", *flags, "--out", "a", "--accum", 4)
    close_runs(reference, tmp_path / "a")


def close_runs(a, b):
    """Equal but for the order in which float32 numbers are added."""
    for (step, x), (other, y) in zip(losses(a), losses(b), strict=True):
        assert step == other and abs(x - y) < 1e-5 * abs(x) + 1e-6
    a, b = weights(a)["model"], weights(b)["model"]
    # Key biases have a gradient of zero plus rounding noise, which Adam turns into full updates: not compared.
    for k in a:
        u, v = (x.chunk(3)[::2] if k.endswith("qkv.bias") else (x,) for x in (a[k], b[k]))
        for p, q in zip(u, v):
            assert torch.allclose(p, q, atol=2e-4), (k, (p - q).abs().max())


def test_two_processes_do_what_one_does_and_one_writes(straight, tmp_path):
    reference, flags = straight
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(ROOT / "mae_image.py"), *map(str, flags), "--out", "two"]  # fmt: skip
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done: ") == 1
    close_runs(reference, tmp_path / "two")


def test_a_warm_up_that_ends_between_two_updates_does_not_pass_the_peak():
    for inclusive in (True, False):
        rates = [mae_image.lr_at(step, 1.0, 0.0, 2.5, 100, inclusive) for step in range(100)]
        assert rates[0] == 0 and 0.999 < max(rates) <= 1


def test_a_full_disk_is_reported_and_the_previous_checkpoint_stays(tmp_path):
    path = tmp_path / "checkpoint.pt"
    mae_image.save_checkpoint(path, {"step": 1})
    code = (
        "import resource, sys, torch, mae_image; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"  # writing more fails, as on a full disk
        "try: mae_image.save_checkpoint(Path(sys.argv[1]), {'step': 2, 'x': torch.zeros(10**6)})\n"
        "except OSError as error: print('reported:', error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert "reported: cannot write" in result.stdout, result.stderr
    assert torch.load(path, weights_only=True) == {"step": 1} and sorted(os.listdir(tmp_path)) == ["checkpoint.pt"]
    assert result.stdout.strip().endswith(": File too large")  # the system's reason, not torch's


def test_a_run_whose_last_checkpoint_cannot_be_written_ends_with_an_error(toy, run, tmp_path):
    (tmp_path / "x/checkpoint.pt.tmp").mkdir(parents=True)
    text = run("mae_image.py", *TINY_IMAGE, "--data", toy, "--epochs", 1, "--out", "x", code=1)
    assert "warning: cannot write x/checkpoint.pt: Is a directory; there is none yet" in text
    assert text.splitlines()[-1] == "stopped after update 0"


def test_a_run_goes_on_when_nobody_reads_what_it_says(toy, tmp_path):
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 2]
    process = subprocess.Popen([sys.executable, ROOT / "mae_image.py", *map(str, flags)], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=120)
    assert b"Traceback" not in process.stderr.read()
    assert weights(tmp_path / "runs/mae_image")["step"] == 8  # 2 epochs x 64 images / 16


def test_a_run_goes_on_with_the_same_files_only_but_they_may_have_moved(toy, run, refused, tmp_path):
    shutil.copytree(toy / "rgb", tmp_path / "here")
    run("mae_image.py", *TINY_IMAGE, "--data", "here", "--epochs", 1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert "here does not exist" in refused(mae_image, "--resume")
    assert "done: " in run("mae_image.py", "--resume", "--data", "there")
    next(p for p in (tmp_path / "there/train").rglob("*.*")).unlink()
    assert "(64 training files then, 63 now): a resumed run needs the same" in refused(
        mae_image, "--resume", "--data", "there")  # fmt: skip


class FakeRun:
    """What pretrain() needs of a dataset, without files."""

    repeat = 1

    def __init__(self):
        self.paths = np.array([f"image {i}" for i in range(32)])

    def __len__(self):
        return 32

    def __getitem__(self, key):
        _, i = key
        return torch.full((1, 16, 16, 3), i * 7, dtype=torch.uint8), i, []


def fake_config(tmp_path, **options):
    return mae_image.Config(**{**dict(img_size=16, patch=8, batch=16, epochs=1, workers=0, log_every=1, warmup=1,
                                      out=str(tmp_path / "run"), device="cpu"), **options})  # fmt: skip


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path, capsys):
    model = MAE(16, 8, (16, 1, 2), (16, 1, 2))
    model.normalize = lambda batch: MAE.normalize(model, batch) + (math.nan if (batch == 7 * 9).any() else 0)
    draw = lambda batch, rows, generator: random_mask(rows, model.grid, 0.5, generator)
    with pytest.raises(SystemExit, match="loss is nan in update .* The batch was: .*image 9[, ]") as stop:
        mae_image.pretrain(
            model,
            FakeRun(),
            draw,
            lambda *a: {"val_loss": 0.0, "chance": 1.0},
            fake_config(tmp_path, batch=32),
            "mae_image",
        )
    assert "image 9" in str(stop.value)
    assert not (tmp_path / "run/checkpoint.pt").exists()  # nothing was saved after it


def test_a_run_is_not_overwritten_and_a_finished_one_says_so(straight, refused, run, tmp_path):
    reference, flags = straight
    assert "already holds a run: --resume" in refused(mae_image, *flags, "--out", reference)
    assert "done: " in run("mae_image.py", "--resume", "--out", reference)
    assert "must keep it" in refused(mae_image, "--resume", "--out", reference, "--batch", 32)
    assert "not of mae_video.py" in refused(mae_video, "--resume", "--out", reference)
    state = torch.load(reference / "checkpoint.pt")
    state["config"]["colour"] = state["config"].pop("min_crop")
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old/checkpoint.pt")
    assert "another version of mae_image.py, which differs in colour, min_crop" in refused(
        mae_image, "--resume", "--out", tmp_path / "old")  # fmt: skip


def test_a_smoke_test_does_not_stand_in_the_way_of_the_run(toy, run, refused):
    flags = [*TINY_IMAGE, "--data", toy, "--out", "x"]
    run("mae_image.py", *flags, "--smoke")
    run("mae_image.py", *flags, "--epochs", 1)
    assert "already holds a run" in refused(mae_image, *flags)
    assert "x/checkpoint.pt?" in refused(mae_image, *flags, "--out", "y", "--init", "x")
    assert "--init x/checkpoint.pt" in refused(mae_image, "--resume", "--out", "x", "--epochs", 9)
    assert "holds no run to go on with" in refused(mae_image, "--resume", "--out", "y")


def test_a_run_that_dies_early_leaves_nothing_of_the_smoke_test_before_it(toy, run, refused, tmp_path):
    flags = [*TINY_IMAGE, "--data", toy, "--out", "x"]
    run("mae_image.py", *flags, "--smoke")
    assert "loss is" in run("mae_image.py", *flags, "--lr", 1e9, "--warmup", 0, code=1)
    assert "holds no run to go on with" in refused(mae_image, "--resume", "--out", "x")
    assert os.listdir(tmp_path / "x/pictures") == ["update_000000.png"]


def test_a_copied_run_goes_on_where_it_is(toy, straight, run, tmp_path):
    shutil.copytree(straight[0], tmp_path / "runs/mae_image")
    assert "see runs/mae_image" in run("mae_image.py", "--resume")


def test_what_no_shape_shows_is_compared_too(straight, run, refused, toy):
    """Other heads have weights of the same shapes, and raw pixels are no normalised ones. (Public files may hold anything.)"""
    torch.save({"model": official(tiny()), "config": argparse.Namespace(lr=1)}, straight[0].parent / "public.pth")
    assert "tensors used" in mae_image.load_weights(tiny(), straight[0].parent / "public.pth", "mae_image")
    reference, flags = straight
    flags = [*flags, "--init", reference / "checkpoint.pt", "--epochs", 0]
    assert "3 heads in blocks, here 2" in refused(mae_image, *flags, "--size", "96x3x2", "--out", "a")
    assert "2 heads in decoder_blocks, here 4" in refused(mae_image, *flags, "--decoder-heads", 4, "--out", "b")
    assert "its decoder was trained with --no-norm-pix" in run("mae_image.py", *flags, "--norm-pix", "--out", "c")


def test_broken_held_out_files_are_named(toy, run, tmp_path):
    shutil.copytree(toy / "rgb", tmp_path / "images")
    bad = sorted((tmp_path / "images/val").rglob("*.jpg"))[3]
    bad.write_bytes(b"no image")
    text = run("mae_image.py", *TINY_IMAGE, "--data", "images", "--smoke")
    assert f"broken held-out file, another one taken: {bad.relative_to(tmp_path)}: " in text


@pytest.mark.parametrize("side", [16, 72, 96, 224])
def test_titles_and_notes_fit_into_the_picture(side):
    """Nothing reaches the right edge, and the longest of our titles ends before the next column begins."""
    titles, note = ["original", "knowing nothing*", "a line of some length, as for a clip"], "a note that is longer than a table " * 3
    table = np.asarray(mae_image.picture_table(torch.zeros(1, 3, 3, side, side), titles, note).convert("L"))
    assert (table[:, -4:] == 255).all() and (table[-18:] < 128).any() and (table[:18] < 128).any()
    column = side * math.ceil(96 / side) + 4
    assert (table[:16, 2 * column - 1 : 2 * column + 3] == 255).all() and (table[:16, column + 4 : 2 * column] < 128).any()
    assert mae_image.picture_table(torch.zeros(1, 2, 3, side, side), ["a", "b"]).width == 2 * column + 4


def test_a_run_writes_checkpoint_log_and_pictures(straight):
    folder, _ = straight
    assert {"checkpoint.pt", "log.jsonl", "pictures"} <= set(os.listdir(folder))
    assert [step for step, _ in losses(folder)] == [*range(3, 32, 3), 32]
    picture = np.asarray(Image.open(folder / "pictures/update_000032.png"))
    assert picture.std() > 20
    record = json.loads((folder / "log.jsonl").read_text().splitlines()[1])
    assert {"step", "epoch", "loss", "chance", "lr", "samples_per_second", "data_wait"} <= set(record)


def test_broken_files_are_named_and_counted_in_the_log(toy, run, tmp_path):
    folder = tmp_path / "images"
    for i, path in enumerate(sorted((toy / "rgb/train").rglob("*.jpg"))[:40]):
        target = folder / "a" / f"{i:02d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() if i % 4 else b"broken")
    text = run("mae_image.py", *TINY_IMAGE, "--data", folder, "--workers", 1, "--epochs", 4)
    assert "broken file, another one taken" in text and re.search(
        r"\d+ broken files were met \d+ times: .*00.jpg", text
    )


def test_starting_from_a_public_file_without_training_draws_its_picture(toy, run, tmp_path):
    model = MAE(16, 8, "nano", (16, 1, 2), norm_pix=False)
    torch.save({"model": official(model)}, tmp_path / "mae.pth")
    text = run("mae_image.py", *TINY_IMAGE, "--data", toy, "--init", "mae.pth", "--epochs", 0)
    assert "tensors used" in text and "done: " in text
    assert (tmp_path / "runs/mae_image/pictures/update_000000.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere"], "nowhere does not exist"), (["--data", "."], "holds no files that end in"),
    (["--img-size", 60], "image height 60 is not a multiple of patch 8: use --img-size 56 or 64"),
    (["--decoder-heads", 5], "width 64 is not a multiple of 5 heads"), (["--decoder-width", 90, "--decoder-heads", 3], "multiple of 4"),
    (["--mask-ratio", 1], "outside [0, 1)"), (["--mask-ratio", 0.999], "hides all"), (["--mask-ratio", 0], "hides nothing"),
    (["--mask-ration", 0.5], "did you mean --mask-ratio"), (["--size", "giant"], "use one of nano"), (["--mask", "tube"], "invalid choice"),
    (["--batch", 10, "--accum", 3], "use a multiple of 3"), (["--batch", 1000], "do not fill one update"),
    (["--init", "no.pth"], "cannot read checkpoint no.pth"), (["--init", "x" * 300], "File name too long"), (["--out", "x" * 300], "File name too long"), (["--resume"], "holds no run to go on with"), (["--device", "cuda:9"], "cannot be used"),
    (["--out", "/proc/x"], "cannot write the run folder"), (["--preset", "x"], "invalid choice"), (["--lr"], "expected one argument"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(refused, toy, flags, message):
    base = [] if "--data" in flags else ["--data", toy]
    assert message in refused(mae_image, *base, *flags)


def test_help_explains_every_flag(capsys, monkeypatch):
    for module in (mae_image, mae_video, omni, multimae, finetune):
        monkeypatch.setattr(sys, "argv", ["x", "--help"])
        with pytest.raises(SystemExit):
            module.main()
        text = capsys.readouterr().out
        for field in module.Config.__dataclass_fields__:
            assert re.search(rf"--{field.replace('_', '-')}\b", text), field
        for name, preset in module.PRESETS.items():
            module.Config(**preset)
            assert name in text


def test_presets_are_overruled_by_flags():
    given = mae_image.parse_config(
        mae_image.Config, mae_image.PRESETS, "", ["--preset", "cifar10", "--batch", "64", "--no-flip"]
    )
    cfg = mae_image.Config(**given)
    assert (cfg.batch, cfg.patch, cfg.flip, cfg.mask_ratio) == (64, 2, False, 0.75)


@pytest.mark.parametrize("flag, value", [("--seed", -1), ("--decoder-heads", 0), ("--decoder-depth", 0), ("--pictures", 0), ("--log-every", 0), ("--workers", -1),
                                         ("--min-crop", 0.0), ("--epochs", -1), ("--accum", 0), ("--patch", 0)])  # fmt: skip
def test_numbers_out_of_range_are_named(refused, toy, flag, value):
    assert f"{flag} {value}: must be" in refused(mae_image, "--data", toy, flag, value)


def test_a_run_that_died_before_its_first_checkpoint_can_begin_again(toy, run, tmp_path):
    folder = tmp_path / "runs/mae_image"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 0, "val_loss": 1.0, "chance": 1.0}\n{"step": 4, "lo')
    run("mae_image.py", *TINY_IMAGE, "--data", toy, "--smoke")
    assert [step for step, _ in losses(folder)] == [1, 2, 3]


def test_a_log_that_a_crash_cut_off_does_not_hinder_resuming(straight, run, tmp_path):
    reference, _ = straight
    out = tmp_path / "copy"
    shutil.copytree(reference, out)
    with open(out / "log.jsonl", "a") as file:  # written after the last checkpoint, which has update 32
        file.write('{"step": 33, "loss": 1.0}\n{"step": 34, "los')
    run("mae_image.py", "--resume", "--out", out)
    assert losses(out) == losses(reference)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), RuntimeError("a\nb")])
def test_a_worker_that_is_killed_while_it_hands_a_batch_over_ends_the_run_too(error, tmp_path):
    """A matter of milliseconds: torch passes these errors on as they are, not as its own RuntimeError."""

    def loader():
        yield torch.zeros(1), [0], []
        raise error

    cfg = mae_image.Config(out=str(tmp_path / "run"))
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    run = mae_image.Run(tmp_path / "run", cfg, "mae_image", model, optimizer, torch.amp.GradScaler("cpu", enabled=False),
                        FakeRun(), True)  # fmt: skip
    run.open()
    run.begin(0, 5, 1, 1, torch.device("cpu"))
    batches = loader()
    run.next_batch(batches, 0)
    run.after_update(1, torch.tensor(0.5), ["a"], 0.1, False)
    with pytest.raises(SystemExit, match="the loader failed: .+; go on with --resume"):
        run.next_batch(batches, 1)
    assert weights(tmp_path / "run")["step"] == 1


def test_a_killed_worker_ends_the_run_with_one_line_and_a_checkpoint(toy, tmp_path):
    flags = [*TINY_IMAGE, "--data", toy, "--epochs", 5000, "--workers", 1]
    process = subprocess.Popen([sys.executable, ROOT / "mae_image.py", *map(str, flags)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    for line in process.stdout:
        if "update     20/" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "the loader failed: " in text and "--resume" in text, text
    assert "Traceback" not in text and weights(tmp_path / "runs/mae_image")["step"] >= 20
