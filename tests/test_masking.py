import re
import types

import numpy as np
import pytest
import torch
from PIL import Image

import masking
from data import seeded
from masking import MASKS, num_hidden


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("ratio", [0, 0.3, 0.75, 0.9])
@pytest.mark.parametrize("grid", [(1, 4, 4), (4, 3, 5), (8, 7, 7)])
def test_every_row_hides_the_same_number_of_tokens(kind, ratio, grid):
    (t, h, w), ratio = grid, 0.75 if kind == "grid" else ratio
    mask = MASKS[kind](6, grid, ratio, seeded(0))
    assert mask.shape == (6, t * h * w) and mask.dtype == torch.bool
    assert torch.equal(mask, MASKS[kind](6, grid, ratio, seeded(0)))  # it needs no more
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
    tube = masking.tube_mask(5, (8, 14, 14), 0.9, seeded(0)).reshape(5, 8, 196)
    assert (tube == tube[:, :1]).all() and len({tuple(m[0].tolist()) for m in tube}) == 5
    grid = masking.grid_mask(2, (2, 5, 8)).reshape(2, 2, 5, 8)
    assert not grid[:, :, ::2, ::2].any() and grid[:, :, 1::2].all() and grid[..., 1::2].all()
    frame = masking.frame_mask(4, (8, 3, 3), 0.875, seeded(0)).reshape(4, 8, 9)
    assert (frame.all(dim=2) | ~frame.any(dim=2)).all()
    causal = masking.causal_mask(2, (2, 3, 3), 0.5)
    assert not causal[:, :9].any() and causal[:, 9:].all()
    random = masking.random_mask(4000, (1, 4, 4), 0.75, seeded(0))  # each token equally often
    assert (random.float().mean(dim=0) - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5
    shares = []  # of the hidden tokens those whose right neighbour is hidden, too
    for draw in (masking.random_mask, masking.block_mask):
        mask = draw(64, (1, 14, 14), 0.5, seeded(0)).reshape(64, 14, 14)
        shares.append((mask[:, :, 1:] & mask[:, :, :-1]).sum() / mask[:, :, :-1].sum())
    assert shares[1] > shares[0] + 0.25
    for alpha, subset_first in ((0.01, False), (0.2, True), (5, False)):  # small: beyond its size
        mask = masking.dirichlet_mask(500, [20, 16, 4], 13, seeded(0), alpha, subset_first)
        assert mask.shape == (500, 40) and ((~mask).sum(dim=1) == 13).all()


@pytest.mark.parametrize("ratio", [0, 0.4, 0.9])
def test_visible_hidden_and_restore_agree_with_a_slow_loop(ratio):
    x, token = torch.randn(5, 24, 3), torch.randn(3)
    mask = masking.random_mask(5, (2, 3, 4), ratio, seeded(0))
    see, hide = masking.visible(x, mask), masking.hidden(x, mask)
    back = masking.restore(see, mask, token)
    for b, m in enumerate(mask):
        assert torch.equal(see[b], x[b, ~m]) and torch.equal(hide[b], x[b, m])
        assert torch.equal(back[b], torch.where(m[:, None], token, x[b]))
    mask[0] = ~mask[0]
    with pytest.raises(ValueError, match="must all hide the same number"):
        masking.visible(x, mask)


@pytest.mark.parametrize("H, W, zoom", [(16, 32, 3), (72, 48, 1)])
def test_a_table_has_a_cell_for_each_picture_and_enlarges_small_ones(H, W, zoom):
    cells, line, gap = torch.rand(2, 3, 3, H, W, generator=seeded(0)), 22, 3
    table = np.asarray(masking.picture_table(cells, apart=1))  # 15 pixels
    assert table.shape == (line + 2 * (zoom * H + gap) + 15, gap + 3 * (zoom * W + gap), 3)
    for r, c in np.ndindex(2, 3):
        y, x = line + r * (zoom * H + gap + 15), gap + c * (zoom * W + gap)
        want = (cells[r, c] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(table[y : y + zoom * H : zoom, x : x + zoom * W : zoom], want)
    note = "a note that is longer than the table " * 3
    named = np.asarray(masking.picture_table(cells, ["title"], ["row"], note).convert("L"))
    assert all((part < 128).any() for part in (named[:line], named[-line:], named[line:, :20]))
    assert (named[:, -3:] == 255).all()  # nothing is cut off at the right edge


@pytest.mark.parametrize("error, message", [
    (ValueError("a\nb"), r"error: a\nb"), (torch.OutOfMemoryError("CUDA"), "raise --accum"),
    (MemoryError(), "lower --batch, --workers")])
def test_what_a_user_can_mend_is_one_line_and_no_process_group_stays_open(refused, error, message):
    def main():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        raise error
    assert message in refused(types.SimpleNamespace(__name__="script", main=main))
    assert not torch.distributed.is_initialized()


def test_the_script_shows_and_draws_every_kind_that_has_the_ratio(run, tmp_path):
    shown = re.findall(r"^(.+): \d+ of 32 hidden$", run(masking, "--grid", "2x4x4"), re.M)
    assert shown == [*MASKS, "dirichlet, RGB", "dirichlet, depth", "dirichlet, classes"]
    assert len(Image.open(tmp_path / "masks.png").getcolors()) > 2
    assert "block" in (half := run(masking, "--ratio", 0.5)) and "grid" not in half


@pytest.mark.parametrize("flags, message", [
    (["--ratio", 1], "outside"), (["--ratio", "nan"], "outside"), (["--grid", "0x1x1"], "needed"),
    (["--ratio", 0.99, "--grid", "1x2x2"], "hides all")])
def test_bad_input_is_one_line_and_exit_code_2(refused, flags, message):
    assert message in refused(masking, *flags)
