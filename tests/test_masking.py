import pytest
import torch
from PIL import Image

import masking
from masking import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", masking.MASKS)
@pytest.mark.parametrize("ratio", [0, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("grid", [(1, 4, 4), (4, 3, 5), (8, 7, 7)])
def test_every_row_hides_the_same_number_of_tokens(kind, ratio, grid):
    mask = masking.MASKS[kind](6, grid, ratio, seeded())
    t, h, w = grid
    assert mask.shape == (6, t * h * w) and mask.dtype == torch.bool
    counts = mask.sum(dim=1)
    assert (counts == counts[0]).all()
    if kind == "tube":
        assert counts[0] == t * masking.num_hidden(h * w, ratio, "hide")
    elif kind == "frame":
        assert counts[0] == h * w * min(round(ratio * t), t - 1)
    else:
        assert counts[0] == masking.num_hidden(t * h * w, ratio, "hide" if kind == "causal" else "keep")


def test_counts_are_those_of_the_official_code_float_traps_included():
    keep = lambda n, ratio: n - masking.num_hidden(n, ratio, "keep")
    assert keep(196, 0.75) == 49  # MAE
    assert keep(1568, 0.9) == 156  # MAE-ST
    assert keep(50, 0.9) == 4 and keep(160, 0.9) == 15  # 50 * (1 - 0.9) is 4.999...
    hide = lambda n, ratio: masking.num_hidden(n, ratio, "hide")
    assert hide(196, 0.9) == 176 and 8 * hide(196, 0.95) == 1488  # VideoMAE, per time slot
    assert hide(1568, 0.9) == 1411 and hide(1568, 0.95) == 1489 and hide(196, 0.75) == 147  # OmniMAE


def test_a_tube_has_the_same_pattern_in_every_slot_and_rows_differ():
    mask = masking.tube_mask(5, (8, 14, 14), 0.9, seeded()).reshape(5, 8, 196)
    assert (mask == mask[:, :1]).all() and mask[0, 0].sum() == 176
    assert len({tuple(m[0].tolist()) for m in mask}) == 5


def test_a_grid_keeps_one_patch_of_every_four_and_knows_no_other_ratio():
    mask = masking.grid_mask(2, (1, 6, 8)).reshape(2, 3, 2, 4, 2)
    assert (mask.sum(dim=(2, 4)) == 3).all() and torch.equal(mask[0], mask[1])
    with pytest.raises(InputError, match="use --mask-ratio 0.75"):
        masking.grid_mask(2, (1, 6, 8), 0.5)


def test_frame_masks_hide_whole_slots_and_causal_masks_the_last_tokens():
    mask = masking.frame_mask(4, (8, 3, 3), 0.875, seeded()).reshape(4, 8, 9)
    assert (mask.all(dim=2) | ~mask.any(dim=2)).all() and (mask.all(dim=2).sum(dim=1) == 7).all()
    mask = masking.causal_mask(2, (2, 3, 3), 0.5)
    assert not mask[:, :9].any() and mask[:, 9:].all()


def test_blocks_are_larger_than_chance():
    """Share of hidden tokens whose right neighbour is hidden too, against random masks of the same ratio."""
    share = {}
    for kind in ("random", "block"):
        mask = masking.MASKS[kind](64, (1, 14, 14), 0.5, seeded()).reshape(64, 14, 14)
        share[kind] = (mask[:, :, 1:] & mask[:, :, :-1]).sum() / mask[:, :, :-1].sum()
    assert share["block"] > share["random"] + 0.25


def test_random_masks_hide_each_token_equally_often():
    mask = masking.random_mask(4000, (1, 4, 4), 0.75, seeded())
    assert (mask.float().mean(dim=0) - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5


def test_masks_depend_on_the_generator_alone():
    for kind in masking.MASKS:
        torch.manual_seed(1)
        a = masking.MASKS[kind](3, (2, 4, 4), 0.5, seeded(7))
        state = torch.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(a, masking.MASKS[kind](3, (2, 4, 4), 0.5, seeded(7)))
        torch.manual_seed(1)
        assert torch.equal(state, torch.get_rng_state()), f"{kind} drew from the global generator"


@pytest.mark.parametrize("ratio", [0, 0.4, 0.9])
def test_visible_hidden_and_restore_agree_with_a_slow_loop(ratio):
    x, mask = torch.randn(5, 24, 3), masking.random_mask(5, (2, 3, 4), ratio, seeded())
    token = torch.randn(3)
    see, hide, back = (
        masking.visible(x, mask),
        masking.hidden(x, mask),
        masking.restore(masking.visible(x, mask), mask, token),
    )
    for b in range(5):
        assert torch.equal(see[b], torch.stack([x[b, i] for i in range(24) if not mask[b, i]]))
        slow = [x[b, i] for i in range(24) if mask[b, i]]
        assert hide[b].shape == (len(slow), 3) and all(torch.equal(u, v) for u, v in zip(hide[b], slow))
        for i in range(24):
            assert torch.equal(back[b, i], token if mask[b, i] else x[b, i])


def test_gradients_flow_to_visible_tokens_only():
    x = torch.randn(2, 8, 3, requires_grad=True)
    mask = masking.random_mask(2, (1, 2, 4), 0.5, seeded())
    masking.visible(x, mask).sum().backward()
    assert torch.equal(x.grad[..., 0] == 1, ~mask)


def test_rows_that_hide_different_numbers_are_refused():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(InputError, match="1 to 2"):
        masking.visible(torch.zeros(2, 3, 1), mask)


@pytest.mark.parametrize("subset_first", [False, True])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_dirichlet_masks_show_exactly_the_number_asked_for(alpha, subset_first):
    mask = masking.dirichlet_mask(500, [20, 16, 4], 13, seeded(), alpha, subset_first)
    assert mask.shape == (500, 40) and ((~mask).sum(dim=1) == 13).all()


def test_a_subset_of_the_modalities_stays_one_even_where_alpha_is_tiny():
    mask = masking.dirichlet_mask(300, [16] * 3, 12, seeded(), 0.001, subset_first=True)
    assert ((~mask).reshape(300, 3, 16).any(dim=2).sum(dim=1) == 1).float().mean() > 0.95  # one modality takes all


@pytest.mark.parametrize(
    "ratio, message", [(1, "outside"), (-0.1, "outside"), (float("nan"), "outside"), (0.99, "hides all")]
)
def test_impossible_ratios_are_named(ratio, message):
    with pytest.raises(InputError, match=message):
        masking.random_mask(1, (1, 4, 4), ratio, seeded())


def test_a_full_gpu_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit) as end:
        masking.run_script(main)
    assert end.value.code == 2 and "raise --accum" in capsys.readouterr().err


def test_a_script_leaves_no_process_group_open(tmp_path):
    """Its threads abort one process in a dozen or so at the end (terminate called without an active exception)."""

    def main():
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)

    masking.run_script(main)
    assert not torch.distributed.is_initialized()


def test_the_script_shows_and_draws_every_kind(run, tmp_path):
    text = run("masking.py", "--grid", 2, 4, 4)
    assert all(kind in text for kind in [*masking.MASKS, "dirichlet, depth"]) and text.endswith("wrote masks.png\n")
    assert len(Image.open(tmp_path / "masks.png").getcolors()) > 2


@pytest.mark.parametrize("flags, message", [
    (["--ratio", 1], "outside"), (["--ratio", 0.99, "--grid", 1, 2, 2], "hides all"), (["--grid", 0, 1, 1], "at least 1"),
    (["--seed", 10**20], "--seed 100000000000000000000: must be"), (["--ration", 0.5], "did you mean --ratio"), (["--out", "no/such/folder/x.png"], "cannot write"), (["--ratio", "x"], "invalid float"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(refused, flags, message):
    assert message in refused(masking, *flags)
