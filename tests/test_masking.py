import re

import numpy as np
import pytest
import torch
from PIL import Image

import masking
from masking import MASKS, num_hidden


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("ratio", [0, 0.3, 0.75, 0.9])
@pytest.mark.parametrize("grid", [(1, 4, 4), (4, 3, 5), (8, 7, 7)])
def test_every_row_hides_the_same_number_of_tokens(kind, ratio, grid):
    t, h, w = grid
    if kind == "grid" and ratio != 0.75:
        with pytest.raises(ValueError, match=f"not {ratio:.0%}: use --mask-ratio 0.75"):
            MASKS[kind](6, grid, ratio, seeded())
        return
    mask = MASKS[kind](6, grid, ratio, seeded())
    assert mask.shape == (6, t * h * w) and mask.dtype == torch.bool
    assert torch.equal(mask, MASKS[kind](6, grid, ratio, seeded()))  # the generator is all it needs
    count = {"tube": t * num_hidden(h * w, ratio, "hide"), "frame": h * w * int(ratio * t),
             "causal": num_hidden(t * h * w, ratio, "hide"),
             "grid": t * (h * w - -(-h // 2) * -(-w // 2))}
    assert (mask.sum(dim=1) == count.get(kind, num_hidden(t * h * w, ratio, "keep"))).all()


@pytest.mark.parametrize("tokens, ratio, rule, hidden", [
    (196, 0.75, "keep", 147), (1568, 0.9, "keep", 1412),  # MAE, MAE-ST
    (50, 0.9, "keep", 46), (160, 0.9, "keep", 145),  # 50 * (1 - 0.9) is 4.999...
    (196, 0.9, "hide", 176), (196, 0.95, "hide", 186),  # VideoMAE, in each time slot
    (1568, 0.9, "hide", 1411), (1568, 0.95, "hide", 1489), (196, 0.75, "hide", 147)])  # OmniMAE
def test_counts_are_those_of_the_official_code_float_traps_included(tokens, ratio, rule, hidden):
    assert num_hidden(tokens, ratio, rule) == hidden


def test_every_kind_hides_what_its_name_says():
    tube = masking.tube_mask(5, (8, 14, 14), 0.9, seeded()).reshape(5, 8, 196)
    assert (tube == tube[:, :1]).all() and len({tuple(m[0].tolist()) for m in tube}) == 5
    grid = masking.grid_mask(2, (2, 5, 8)).reshape(2, 2, 5, 8)
    for b, s, r, c in np.ndindex(grid.shape):
        assert grid[b, s, r, c] == (r % 2 == 1 or c % 2 == 1)
    frame = masking.frame_mask(4, (8, 3, 3), 0.875, seeded()).reshape(4, 8, 9)
    assert (frame.all(dim=2) | ~frame.any(dim=2)).all() and (frame.all(dim=2).sum(dim=1) == 7).all()
    causal = masking.causal_mask(2, (2, 3, 3), 0.5)
    assert not causal[:, :9].any() and causal[:, 9:].all()
    random = masking.random_mask(4000, (1, 4, 4), 0.75, seeded())  # each token equally often
    assert (random.float().mean(dim=0) - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5
    neighbours = {}  # share of hidden tokens whose right neighbour is hidden, too
    for kind in ("random", "block"):
        mask = MASKS[kind](64, (1, 14, 14), 0.5, seeded()).reshape(64, 14, 14)
        neighbours[kind] = (mask[:, :, 1:] & mask[:, :, :-1]).sum() / mask[:, :, :-1].sum()
    assert neighbours["block"] > neighbours["random"] + 0.25


@pytest.mark.parametrize("alpha", [0.01, 0.2, 5])
@pytest.mark.parametrize("subset_first", [False, True])
def test_dirichlet_masks_show_exactly_the_number_asked_for(alpha, subset_first):
    """Also where a modality gets more than it has. (Their statistics: mask_statistics.npz.)"""
    mask = masking.dirichlet_mask(500, [20, 16, 4], 13, seeded(), alpha, subset_first)
    assert mask.shape == (500, 40) and ((~mask).sum(dim=1) == 13).all()


@pytest.mark.parametrize("ratio", [0, 0.4, 0.9])
def test_visible_hidden_and_restore_agree_with_a_slow_loop(ratio):
    x, token = torch.randn(5, 24, 3), torch.randn(3)
    mask = masking.random_mask(5, (2, 3, 4), ratio, seeded())
    see, hide = masking.visible(x, mask), masking.hidden(x, mask)
    back = masking.restore(see, mask, token)
    for b in range(5):
        assert see[b].tolist() == [x[b, i].tolist() for i in range(24) if not mask[b, i]]
        assert hide[b].tolist() == [x[b, i].tolist() for i in range(24) if mask[b, i]]
        for i in range(24):
            assert torch.equal(back[b, i], token if mask[b, i] else x[b, i])
    assert masking.visible(x, None) is x
    mask[0] = ~mask[0]
    with pytest.raises(ValueError, match="must all hide the same number"):
        masking.visible(x, mask)


@pytest.mark.parametrize("H, W, zoom", [(16, 32, 3), (72, 48, 1)])
def test_a_table_has_a_cell_for_each_picture_and_enlarges_small_ones(H, W, zoom):
    cells = torch.rand(2, 3, 3, H, W, generator=seeded())
    table = np.asarray(masking.picture_table(cells))
    left, line, gap = 3, 22, 3
    assert table.shape == (line + 2 * (zoom * H + gap), left + 3 * (zoom * W + gap), 3)
    for r, c in np.ndindex(2, 3):
        y, x = line + r * (zoom * H + gap), left + c * (zoom * W + gap)
        want = (cells[r, c] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(table[y : y + zoom * H : zoom, x : x + zoom * W : zoom], want)
    apart = np.asarray(masking.picture_table(cells, apart=1))
    assert np.array_equal(apart[y + 15 :, x:], table[y:, x:]) and len(apart) == len(table) + 15
    words = "a title or note that is longer than the table " * 3
    named = np.asarray(masking.picture_table(cells, ["short", words], ["row"], words).convert("L"))
    assert all((part < 128).any() for part in (named[:line], named[-line:], named[line:, :20]))
    assert (named[:, -3:] == 255).all()  # nothing is cut off at the right edge


@pytest.mark.parametrize("error, message", [
    (ValueError("a\nb"), r"error: a\nb"), (OSError(28, "No space"), "No space"),
    (FloatingPointError("the loss is nan"), "the loss is nan"),
    (torch.OutOfMemoryError("CUDA"), "raise --accum")])
def test_what_a_user_can_mend_is_one_line_and_no_process_group_stays_open(capsys, error, message):
    """Its threads may abort the ending process."""

    def main():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        raise error

    with pytest.raises(SystemExit) as end:
        masking.run_script(main)
    text = capsys.readouterr().err
    assert end.value.code == 2 and message in text and text.count("\n") == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_the_script_shows_and_draws_every_kind(run, tmp_path, ratio):
    text = run(masking, "--grid", "2x4x4", "--ratio", ratio)
    shown = set(re.findall(r"^(.+): \d+ of 32 hidden$", text, re.M))
    assert shown == set(MASKS) - ({"grid"} if ratio == 0.5 else set()) | {
        "dirichlet, RGB", "dirichlet, depth", "dirichlet, classes"}
    assert text.endswith("wrote masks.png\n")
    assert len(Image.open(tmp_path / "masks.png").getcolors()) > 2


@pytest.mark.parametrize("flags, message", [
    (["--ratio", 1], "outside"), (["--ratio", "nan"], "outside"), (["--grid", "0x1x1"], "needed"),
    (["--ratio", 0.99, "--grid", "1x2x2"], "hides all"), (["--out", "no/x.png"], "No such file"),
    (["--seed", -1], "--seed -1 is too small")])
def test_bad_input_is_one_line_and_exit_code_2(refused, flags, message):
    assert message in refused(masking, *flags)
