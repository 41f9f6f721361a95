"""The claims' script: its commands are valid, and a tiny run of it ends in a verdict."""

import importlib
import types

import pytest
import torch

import claims
import mae_image
import mask_tokens


@pytest.mark.parametrize("number", claims.CLAIMS)
def test_every_command_of_a_claim_is_one_that_its_script_takes(number, tmp_path):
    scripts = {"tests/mask_tokens.py": "mae_image.py"}  # the script whose flags it takes
    claim, args = claims.CLAIMS[number], types.SimpleNamespace(folds=3, seeds=2, quick=False, list=True, work=tmp_path)
    for name in claim.sets:
        before, after = claims.plan(claim, name, args)
        commands = [*before.values(), *(command for _, command in after.values())]
        assert len(after) == len(claim.arms) * min(3, claims.SETS[name].folds) * 2
        assert len({run for run, _ in after.values()}) == len(after), "two arms would write into one folder"
        for script, *flags in map(str.split, commands):
            module = importlib.import_module(scripts.get(script, script).removesuffix(".py"))
            mae_image.parse_config(module.Config, module.PRESETS, "", flags)
    assert all(arm in claim.arms for pair in claim.pairs for arm in pair)


def test_a_tiny_run_ends_in_verdicts_and_is_not_repeated(run, toy, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/toy").symlink_to(toy)
    flags = ["--quick", "--only", "M7,V1", "--sets", "toy,toy-images", "--work", "work"]
    text = run("tests/claims.py", *flags)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 8 and "| toy | pretrained - scratch |" in text and "| toy-images | block - random |" in text
    again = run("tests/claims.py", *flags)
    assert rows == [line for line in again.splitlines() if line.startswith("|")] and " min\n" not in again


def test_mask_tokens_in_the_encoder_hide_as_much_and_their_checkpoint_can_be_fine_tuned(run, toy):
    """A hidden patch has no part in the encoder's result, and where nothing is hidden the model is MAE."""
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch=4, size=(32, 2, 2), decoder=(16, 1, 2))
    model, mae = mask_tokens.MAEWithMaskTokens(**sizes), mae_image.MAE(**sizes)
    patches, mask = torch.randn(2, 16, 48), torch.arange(16).expand(2, 16) % 4 > 0
    changed = torch.where(mask[..., None], torch.randn(2, 16, 48), patches)
    latent = model.forward_encoder(patches, mask)
    assert latent.shape == (2, 17, 32) and torch.equal(latent, model.forward_encoder(changed, mask))
    assert model.forward_decoder(latent, mask).shape == (2, 16, 16)
    mae.load_state_dict({k: v for k, v in model.state_dict().items() if k != "mask_token"}, strict=False)
    imgs = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.encode(imgs), mae.encode(imgs))
    small = ["--data", toy, "--smoke", "--workers", 0, "--batch", 8]
    run("tests/mask_tokens.py", *small, "--out", "with")
    assert "mask_token" in run("finetune.py", *small, "--clips", 1, "--init", "with/checkpoint.pt", "--out", "tuned")


def test_unknown_claims_are_named(run):
    assert "Z9 is unknown" in run("tests/claims.py", "--only", "Z9", code=2)
