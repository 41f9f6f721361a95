import importlib
import re
import types

import pytest
import torch

import claims
import finetune
import mae_image
import mask_tokens
from masking import settings


@pytest.mark.parametrize("number", claims.CLAIMS)
def test_every_command_of_a_claim_is_one_that_its_script_takes(number, tmp_path):
    claim = claims.CLAIMS[number]
    args = types.SimpleNamespace(folds=1, seeds=2, quick=False, list=True, work=tmp_path)
    for name in claim.sets:
        assert claims.SETS[name].long or number != "M8"  # or long training is the short one again
        before, after = claims.plan(claim, name, args)
        assert len({run for run, _ in after.values()}) == len(claim.arms) * 2  # each has its folder
        for command in [*before.values(), *(command for _, command in after.values())][::2]:
            script, *flags = command.replace("tests/mask_tokens", "mae_image").split()
            module = importlib.import_module(script.removesuffix(".py"))
            settings(module.Config, module.PRESETS, module.__doc__, flags)
    named = {arm for pair in claim.pairs for side in pair for arm in side.split(" - ")}
    assert named <= set(claim.arms)


def test_a_tiny_run_ends_in_verdicts_and_is_not_repeated(run, toy, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/toy").symlink_to(toy)
    flags = ["--quick", "--only", "V1", "--sets", "toy", "--work", "work"]
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


def test_arms_and_gains_are_compared_run_by_run():
    runs = {"a": (0.9, 0.8), "b": (0.5, 0.5), "c": (0.6, 0.7), "d": (0.4, 0.5)}
    scores = {(arm, 1, seed): x for arm, row in runs.items() for seed, x in enumerate(row)}
    assert claims.differences(scores, "a", "b") == pytest.approx([0.4, 0.3])
    assert claims.differences(scores, "a - b", "c - d") == pytest.approx([0.2, 0.1])


def test_mask_tokens_in_the_encoder_hide_as_much_and_can_be_fine_tuned(script, run, toy):
    """A hidden patch has no part in the latent, and where nothing is hidden the model is MAE."""
    model, mae = (kind(16, 4, (32, 2, 2), (16, 1, 2), True)
                  for kind in (mask_tokens.MAEWithMaskTokens, mae_image.MAE))
    imgs, mask = torch.randn(2, 3, 16, 16), torch.arange(16).expand(2, 16) % 4 > 0
    changed = torch.where(torch.arange(16) > 3, 0.0, imgs)  # the hidden columns
    assert torch.equal(*(model.forward_encoder(x, mask) for x in (imgs, changed)))
    mae.load_state_dict(model.state_dict() | {"mask_token": mae.mask_token})
    assert torch.equal(model.encode(imgs), mae.encode(imgs))
    small = ["--data", toy, "--smoke", "--workers", 0, "--batch", 8]
    script("tests/mask_tokens.py", *small, "--out", "with")
    text = run(finetune, *small, "--clips", 1, "--init", "with/checkpoint.pt", "--out", "tuned")
    assert "tensors used; new: head, norm" in text


def test_unknown_claims_are_named_and_a_list_writes_nothing(run, tmp_path):
    assert "Z9 is unknown" in run(claims, "--only", "Z9", code=2)
    flags = ["--list", "--only", "V1, V8", "--sets", "toy", "--work", "w"]
    assert "finetune.py" in run(claims, *flags) and not (tmp_path / "w").exists()
