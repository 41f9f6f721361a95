"""The claims' script: its commands are valid, and a tiny run of it ends in a verdict."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch

import claims
import data
import finetune
import mae_image
import mask_tokens
from masking import settings


@pytest.mark.parametrize("number", claims.CLAIMS)
def test_every_command_of_a_claim_is_one_that_its_script_takes(number, tmp_path):
    scripts = {"tests/mask_tokens.py": "mae_image.py"}  # the script whose flags it takes
    claim, args = claims.CLAIMS[number], types.SimpleNamespace(folds=1, seeds=2, quick=False, list=True, work=tmp_path)
    for name in claim.sets:
        before, after = claims.plan(claim, name, args)
        commands = [*before.values(), *(command for _, command in after.values())]
        assert len(after) == len(claim.arms) * 2
        assert len({run for run, _ in after.values()}) == len(after), "two arms would write into one folder"
        for script, *flags in map(str.split, commands[::2]):
            module = importlib.import_module(scripts.get(script, script).removesuffix(".py"))
            settings(module.Config, module.PRESETS, module.__doc__, flags)
    assert all(arm in claim.arms for pair in claim.pairs for side in pair for arm in side.split(" - "))


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """call("--flag", value) -> what claims.py prints. In this process; its runs have their own."""

    def call(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, flags)])
        try:
            claims.main()
        except SystemExit as end:
            assert end.code == 2
        shown = capfd.readouterr()
        return shown.out + shown.err

    return call


def test_a_tiny_run_ends_in_verdicts_and_is_not_repeated(call, toy, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/toy").symlink_to(toy)
    flags = ["--quick", "--only", "V1", "--sets", "toy", "--work", "work"]
    text = call(*flags)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and "| toy | pretrained - scratch |" in text
    again = call(*flags)
    assert rows == [line for line in again.splitlines() if line.startswith("|")]
    assert " min\n" not in again


def made_up(work, scores, equal=False):
    """A claim whose runs are done: {arm: {(fold, seed): accuracy}}, the first arm better by the paper."""
    claim = claims.Claim("Table", "text", "numbers", ("toy",), {arm: claims.Arm() for arm in scores}, (tuple(scores),), equal)
    after = {}
    for arm, runs in scores.items():
        for (fold, seed), accuracy in runs.items():
            folder, before = work / f"{arm}-ft-{fold}-{seed}", work / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            before.mkdir(exist_ok=True)
            (before / "minutes.json").write_text("2.5")
            (folder / "results.json").write_text(json.dumps({"top1": accuracy}))
            (folder / "minutes.json").write_text("1.5")
            after[arm, fold, seed] = folder.name, ""
    return claim, after


@pytest.mark.parametrize("gaps, equal, verdict", [
    ((0.1, 0.12, 0.14), False, "+12.0 ± 2.0, +10.0 to +14.0 | holds"),
    ((-0.1, -0.12, -0.14), False, "-12.0 ± 2.0, -14.0 to -10.0 | does not hold here"),
    ((0.3, -0.3, 0.1), False, "cannot be seen at this size"), ((0.3, -0.3, 0.1), True, "no difference can be seen at this size"),
    ((-0.1, -0.12, -0.14), True, "does not hold here"), ((0.5,), False, "+50.0 ± nan, +50.0 to +50.0 | cannot be seen at this size"),
    ((0.0,), True, "cannot be seen at this size"),
])  # fmt: skip
def test_a_verdict_compares_the_mean_difference_of_pairs_with_its_spread(tmp_path, capsys, gaps, equal, verdict):
    base = {(1, 0): 0.4, (2, 0): 0.2, (2, 1): 0.45}
    worse = {k: base[k] for k, _ in zip(base, gaps)}
    claim, after = made_up(tmp_path, {"a": {k: worse[k] + gap for k, gap in zip(worse, gaps)}, "b": worse}, equal)
    claims.show("toy", claim, after, types.SimpleNamespace(work=tmp_path, quick=False, folds=3))
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| toy | a - b | ") and rows[2].endswith(f"{verdict} |"), rows
    assert f"| b | {100 * np.mean(list(worse.values())):.1f} ± " in rows[1] and f"2.5 min, then {len(gaps)} x 1.5 min" in rows[1]


def test_two_gains_are_compared_run_by_run(tmp_path, capsys):
    runs = {"a": (0.9, 0.8), "b": (0.5, 0.5), "c": (0.6, 0.7), "d": (0.4, 0.5)}
    claim, after = made_up(tmp_path, {arm: {(1, seed): v for seed, v in enumerate(values)} for arm, values in runs.items()})
    claim.pairs = (("a - b", "c - d"),)  # 0.4 - 0.2 and 0.3 - 0.2
    claims.show("toy", claim, after, types.SimpleNamespace(work=tmp_path, quick=False, folds=3))
    assert capsys.readouterr().out.splitlines()[-1] == "| toy | a - b - (c - d) | +15.0 ± 7.1, +10.0 to +20.0 | holds |"


def test_ridge_regression_is_that_of_the_normal_equations_and_chooses_its_strength_on_training_files():
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 8, generator=g).double(), torch.randn(200, 8, generator=g).double()
    axes = torch.randn(8, 3, generator=g).double()
    labels, truth = (train @ axes).argmax(1), (test @ axes).argmax(1)
    assert (claims.ridge(train, labels, test, 3) == truth).double().mean() > 0.85  # it learns what is linear
    # of 40 inputs one matters and all are noisy: little regularisation fits the noise, and that is seen on training files
    x, z = torch.randn(50, 40, generator=g).double(), torch.randn(400, 40, generator=g).double()
    y, t = ((a[:, 0] + 0.7 * torch.randn(len(a), generator=g) > 0).long() for a in (x, z))
    score = {s: (claims.ridge(x, y, z, 2, strengths=s) == t).double().mean() for s in ((1,), (1000,), (1, 1000))}
    assert score[1, 1000] == score[1000,] > score[1,]
    for strength in (1, 1000):
        scale = lambda x: (x - train.mean(0)) / (train.std(0) + 1e-6)
        y = torch.nn.functional.one_hot(labels, 3).double()
        w = torch.linalg.solve(scale(train).T @ scale(train) + strength * 8 / 100 * torch.eye(8).double(), scale(train).T @ (y - y.mean(0)))
        want = (scale(test) @ w + y.mean(0)).argmax(1)
        assert torch.equal(claims.ridge(train, labels, test, 3, strengths=(strength,)), want)


def test_trivial_baselines_see_motion_and_the_most_frequent_class(tmp_path):
    """A dot that moves to the right or to the left on a grey ground: where there was motion does not tell which."""
    for split in ("train", "val"):
        for i in range(20 if split == "train" else 8):
            right = i % 4 > 0 if split == "train" else i % 2 > 0
            frames = np.full((16, 32, 32, 3), 120, np.uint8)
            for t in range(16):
                x = 2 * (t if right else 15 - t)
                frames[t, 4 + 2 * (i % 9) : 12 + 2 * (i % 9), max(x - 4, 0) : x + 4] = 250
            path = tmp_path / split / ("right" if right else "left") / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.write_video(frames, 25, path)
    scores = claims.trivial_baselines(tmp_path, 1)
    assert scores["majority"] == 0.5 and scores["motion over time"] == 1.0 > scores["motion energy"]
    assert set(scores) == {"majority", "small clip", "motion energy", "motion over time"}


def test_mask_tokens_in_the_encoder_hide_as_much_and_their_checkpoint_can_be_fine_tuned(
        script, run, toy, tmp_path):
    """A hidden patch has no part in the latent, and where nothing is hidden the model is MAE."""
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch=4, size=(32, 2, 2), decoder=(16, 1, 2))
    model, mae = mask_tokens.MAEWithMaskTokens(**sizes), mae_image.MAE(**sizes)
    imgs, mask = torch.randn(2, 3, 16, 16), torch.arange(16).expand(2, 16) % 4 > 0
    changed = torch.where(mask.reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3),
                          torch.randn(2, 3, 16, 16), imgs)
    latent = model.forward_encoder(imgs, mask)
    assert latent.shape == (2, 17, 32)
    assert torch.equal(latent, model.forward_encoder(changed, mask))
    assert model(imgs, mask)[1].shape == (2, 12, 48)
    mae.load_state_dict({k: v for k, v in model.state_dict().items() if k != "mask_token"},
                        strict=False)
    assert torch.equal(model.encode(imgs), mae.encode(imgs))
    small = ["--data", toy, "--smoke", "--workers", 0, "--batch", 8]
    script("tests/mask_tokens.py", *small, "--out", "with")
    text = run(finetune, *small, "--clips", 1, "--init", "with/checkpoint.pt", "--out", "tuned")
    assert "mask_token" in text


def test_real_videos_are_shrunk_once(tmp_path, monkeypatch):
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    data.write_whole(tmp_path / "lips20/a/1.mp4", lambda p: data.write_video(frames, 25, p))
    monkeypatch.setenv("MAE_TEST_DATA", str(tmp_path))
    args = types.SimpleNamespace(list=False, work=tmp_path)
    assert [claims.prepare("lips20", 16, args) for _ in range(2)] == ["lips20-16"] * 2
    clip = data.read_clips(tmp_path / "lips20-16/a/1.mp4", lambda n: np.zeros((1, n), int))[0]
    assert clip.shape == (1, 4, 16, 24, 3)


def test_unknown_claims_and_numbers_are_named_and_a_list_writes_nothing(call, tmp_path):
    assert "Z9 is unknown" in call("--only", "Z9")
    assert "must be at least 1" in call("--jobs", 0)
    assert "finetune.py" in call("--list", "--only", "V1, V8", "--sets", "toy", "--work", "w")
    assert not (tmp_path / "w").exists()
