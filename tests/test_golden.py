from pathlib import Path

import numpy as np
import pytest

import replay_golden

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))
# Frame numbers that the official code draws for fine-tuning, where ours are its pretraining's or another stream of numbers.
NOT_OURS = {"clips_finetune_dense", "clips_ssv2_train"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_our_numbers_are_the_official_ones(path):
    shares = replay_golden.replay(path).shares
    assert shares and all(share <= 1 for share in shares.values()), shares


def test_the_files_are_compared_in_every_array():
    """Nothing is passed over: all arrays that a file marks as results were compared, but for two that are named."""
    for path in FILES:
        if path.stem != "mask_statistics":  # 20,000 draws: once is enough
            r = replay_golden.replay(path)
            results = {name for name, doc in r.meta["arrays"].items() if doc["role"] == "out"}
            assert results - NOT_OURS == set(r.shares), path.stem


def test_a_wrong_number_is_noticed(tmp_path, capsys):
    """The comparison itself can fail: one changed value in a copy of a file, and the exit code is 1."""
    source = FILES[[p.stem for p in FILES].index("mae_pretrain_normpix")]
    (tmp_path / "x.json").write_text(source.with_suffix(".json").read_text())
    with np.load(source) as content:
        arrays = dict(content)
    arrays["latent"] = arrays["latent"] + np.float32(1e-3) * (np.arange(arrays["latent"].size) == 7).reshape(
        arrays["latent"].shape
    )
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(SystemExit) as stop:
        replay_golden.main([str(tmp_path / "x.npz")])
    assert stop.value.code == 1 and "TOO FAR" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        replay_golden.main([str(source)])
    assert stop.value.code == 0
