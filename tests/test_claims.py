"""The claims' script: its commands are valid, and a tiny run of it ends in a verdict."""

import importlib
import types

import pytest

import claims
import mae_image


@pytest.mark.parametrize("number", claims.CLAIMS)
def test_every_command_of_a_claim_is_one_that_its_script_takes(number, tmp_path):
    claim, args = claims.CLAIMS[number], types.SimpleNamespace(folds=3, seeds=2, quick=False, list=True, work=tmp_path)
    for name in claim.sets:
        before, after = claims.plan(claim, name, args)
        commands = [*before.values(), *(command for _, command in after.values())]
        assert len(after) == len(claim.arms) * min(3, claims.SETS[name].folds) * 2
        assert len({run for run, _ in after.values()}) == len(after), "two arms would write into one folder"
        for script, *flags in map(str.split, commands):
            module = importlib.import_module(script.removesuffix(".py"))
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


def test_unknown_claims_are_named(run):
    assert "Z9 is unknown" in run("tests/claims.py", "--only", "Z9", code=2)
