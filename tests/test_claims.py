import importlib
import re

import numpy as np
import pytest
import torch

import claims
import finetune
import mae_image
import mask_tokens
from masking import settings


@pytest.mark.parametrize("number", claims.CLAIMS)
def test_every_command_of_a_claim_is_one_that_its_script_takes(number, run, tmp_path):
    claim = claims.CLAIMS[number]
    lines = run(claims, "--list", "--only", number, "--folds", 1, "--seeds", 2).splitlines()
    commands = [line.split()[1:] for line in lines if line.startswith("  python ")]
    tuned = {command[-1] for command in commands if command[0] == "finetune.py"}
    assert len(tuned) == len(claim.arms) * len(claim.sets) * 2  # each has its folder
    for script, *flags in commands[::2]:
        module = importlib.import_module(script[:-3].replace("tests/mask_tokens", "mae_image"))
        settings(module.Config, module.PRESETS, module.__doc__, flags)
    named = {arm for pair in claim.pairs for side in pair for arm in side.split(" - ")}
    assert named <= set(claim.arms) and not list(tmp_path.iterdir())  # a list writes nothing
    assert number != "M8" or all(claims.SETS[x].long for x in claim.sets)  # longer than V1's


def test_a_tiny_run_ends_in_verdicts_and_is_not_repeated(run, toy, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    flags = ["--quick", "--only", "V1", "--sets", "toy", "--work", "."]
    first, again = run(claims, *flags), run(claims, *flags)
    rows = [line for line in first.splitlines() if line.startswith("|")]
    assert rows == [line for line in again.splitlines() if line.startswith("|")]
    assert " min\n" in first and " min\n" not in again  # lines of the runs
    scratch, pretrained, gap = (float(re.search(r"[+-]?\d+\.\d", row)[0]) for row in rows)
    assert abs(pretrained - scratch - gap) < 0.11
    assert rows[2].startswith("| toy | pretrained - (scratch) | ") and "cannot be seen" in rows[2]


@pytest.mark.parametrize("gaps, equal, text", [
    ((0.1, 0.12, 0.14), False, "holds"), ((-0.1, -0.12, -0.14), True, "does not hold here"),
    ((0.3, -0.3, 0.1), False, "cannot be seen at this size"),
    ((0.3, -0.3, 0.1), True, "no difference can be seen at this size"),
    ((0.5,), True, "cannot be seen at this size")])
def test_a_verdict_compares_the_mean_difference_of_pairs_with_its_spread(gaps, equal, text):
    assert claims.verdict(gaps, equal) == text
    scores = {"a": np.array(gaps), "b": 2 * np.array(gaps)}
    assert list(claims.values(scores, "b - a")) == list(claims.values(scores, "a")) == list(gaps)


def test_mask_tokens_in_the_encoder_hide_as_much_and_can_be_fine_tuned(run, toy, monkeypatch):
    sizes = 16, 4, (32, 2, 2), (16, 1, 2), True
    model, mae = mask_tokens.MAEWithMaskTokens(*sizes), mae_image.MAE(*sizes)
    imgs, mask = torch.randn(2, 3, 16, 16), torch.arange(16).expand(2, 16) % 4 > 0
    changed = torch.where(torch.arange(16) > 3, 0.0, imgs)  # the hidden columns
    assert torch.equal(*(model.forward_encoder(x, mask) for x in (imgs, changed)))
    mae.load_state_dict(model.state_dict() | {"mask_token": mae.mask_token})
    assert torch.equal(model.encode(imgs), mae.encode(imgs))  # nothing hidden: the model is MAE
    small = ["--data", toy, "--smoke", "--workers", 0, "--batch", 8]
    monkeypatch.setattr(mae_image, "MAE", mask_tokens.MAEWithMaskTokens)  # as the script does
    run(mae_image, *small, "--out", "with")
    text = run(finetune, *small, "--clips", 1, "--init", "with/checkpoint.pt", "--out", "tuned")
    assert "tensors used; new: head, norm" in text


def test_unknown_claims_are_named(run):
    assert "Z9 is unknown" in run(claims, "--only", "V1, Z9", code=2)
