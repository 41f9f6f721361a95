import dataclasses
import re
import typing

import numpy as np
import pytest
import torch
from PIL import Image

import masking
from masking import MASKS, num_hidden


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- which tokens are hidden ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("ratio", [0, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("grid", [(1, 4, 4), (4, 3, 5), (8, 7, 7)])
def test_every_row_hides_the_same_number_of_tokens(kind, ratio, grid):
    t, h, w = grid
    if kind == "grid" and ratio != 0.75:
        with pytest.raises(ValueError, match=f"not {ratio:.0%}: use --mask-ratio 0.75"):
            MASKS[kind](6, grid, ratio, seeded())
        return
    mask = MASKS[kind](6, grid, ratio, seeded())
    assert mask.shape == (6, t * h * w) and mask.dtype == torch.bool
    count = {"tube": t * num_hidden(h * w, ratio, "hide"), "frame": h * w * int(ratio * t),
             "causal": num_hidden(t * h * w, ratio, "hide"),
             "grid": t * (h * w - -(-h // 2) * -(-w // 2))}
    assert (mask.sum(dim=1) == count.get(kind, num_hidden(t * h * w, ratio, "keep"))).all()


def test_counts_are_those_of_the_official_code_float_traps_included():
    def keep(n, ratio):
        return n - num_hidden(n, ratio, "keep")

    assert keep(196, 0.75) == 49  # MAE
    assert keep(1568, 0.9) == 156  # MAE-ST
    assert keep(50, 0.9) == 4 and keep(160, 0.9) == 15  # 50 * (1 - 0.9) is 4.999...
    assert num_hidden(196, 0.9, "hide") == 176 and 8 * num_hidden(196, 0.95, "hide") == 1488
    assert [num_hidden(n, ratio, "hide") for n, ratio in ((1568, 0.9), (1568, 0.95), (196, 0.75))] \
        == [1411, 1489, 147]  # OmniMAE; above VideoMAE, per time slot


def test_a_tube_has_the_same_pattern_in_every_slot_and_rows_differ():
    mask = masking.tube_mask(5, (8, 14, 14), 0.9, seeded()).reshape(5, 8, 196)
    assert (mask == mask[:, :1]).all() and mask[0, 0].sum() == 176
    assert len({tuple(m[0].tolist()) for m in mask}) == 5


def test_a_grid_keeps_the_first_of_every_two_by_two_patches():
    mask = masking.grid_mask(2, (2, 5, 8)).reshape(2, 2, 5, 8)
    for b, s, r, c in np.ndindex(mask.shape):
        assert mask[b, s, r, c] == (r % 2 == 1 or c % 2 == 1)


def test_frame_masks_hide_whole_slots_and_causal_masks_the_last_tokens():
    mask = masking.frame_mask(4, (8, 3, 3), 0.875, seeded()).reshape(4, 8, 9)
    assert (mask.all(dim=2) | ~mask.any(dim=2)).all() and (mask.all(dim=2).sum(dim=1) == 7).all()
    mask = masking.causal_mask(2, (2, 3, 3), 0.5)
    assert not mask[:, :9].any() and mask[:, 9:].all()


def test_blocks_are_larger_than_chance():
    """Share of hidden tokens whose right neighbour is hidden too, beside that of random masks."""
    share = {}
    for kind in ("random", "block"):
        mask = MASKS[kind](64, (1, 14, 14), 0.5, seeded()).reshape(64, 14, 14)
        share[kind] = (mask[:, :, 1:] & mask[:, :, :-1]).sum() / mask[:, :, :-1].sum()
    assert share["block"] > share["random"] + 0.25


def test_random_masks_hide_each_token_equally_often():
    mask = masking.random_mask(4000, (1, 4, 4), 0.75, seeded())
    assert (mask.float().mean(dim=0) - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5


@pytest.mark.parametrize("kind", MASKS)
def test_masks_depend_on_their_generator_alone(kind):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    mask = MASKS[kind](3, (2, 4, 4), 0.75, seeded(7))
    assert torch.equal(state, torch.get_rng_state()), "it drew from the global generator"
    torch.manual_seed(2)
    assert torch.equal(mask, MASKS[kind](3, (2, 4, 4), 0.75, seeded(7)))


@pytest.mark.parametrize("subset_first", [False, True])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_dirichlet_masks_show_exactly_the_number_asked_for(alpha, subset_first):
    mask = masking.dirichlet_mask(500, [20, 16, 4], 13, seeded(), alpha, subset_first)
    assert mask.shape == (500, 40) and ((~mask).sum(dim=1) == 13).all()


@pytest.mark.parametrize("alpha, low, high", [(0.01, 0.9, 1), (1, 0.015, 0.08), (100, 0, 0.005)])
def test_a_small_alpha_gives_all_to_one_modality_and_a_large_one_shares(alpha, low, high):
    """Of all equally likely splits, 3 * (1/8)^2 = 4.7 % give one modality seven eighths or more."""
    seen = (~masking.dirichlet_mask(400, [16] * 3, 12, seeded(), alpha)).reshape(400, 3, 16).sum(2)
    assert low <= (seen.max(dim=1).values >= 11).float().mean() <= high
    assert (seen.float().mean(dim=0) - 4).abs().max() < 1  # no modality is preferred


def test_a_subset_of_the_modalities_stays_one_even_where_alpha_is_tiny():
    mask = masking.dirichlet_mask(300, [16] * 3, 12, seeded(), 0.001, subset_first=True)
    alone = (~mask).reshape(300, 3, 16).any(dim=2).sum(dim=1) == 1
    assert alone.float().mean() > 0.95  # one modality takes all


@pytest.mark.parametrize("ratio, message", [
    (1, "outside"), (-0.1, "outside"), (float("nan"), "outside"), (0.99, "hides all")])
def test_impossible_ratios_are_named(ratio, message):
    with pytest.raises(ValueError, match=message):
        masking.random_mask(1, (1, 4, 4), ratio, seeded())


# ---- to obey a mask ------------------------------------------------------------------------------


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


def test_gradients_flow_to_visible_tokens_only():
    x = torch.randn(2, 8, 3, requires_grad=True)
    mask = masking.random_mask(2, (1, 2, 4), 0.5, seeded())
    masking.visible(x, mask).sum().backward()
    assert torch.equal(x.grad[..., 0] == 1, ~mask)


def test_rows_that_hide_different_numbers_are_refused():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match="must all hide the same number"):
        masking.visible(torch.zeros(2, 3, 1), mask)


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots, frames", [(1, 1), (3, 3), (3, 6)])
def test_a_mask_as_pixels_is_that_of_a_loop(slots, frames):
    mask = masking.random_mask(2, (slots, 2, 3), 0.5, seeded())
    pixels = masking.as_pixels(mask, frames, 8, 18, 2, 3)  # patches of 4 x 6 pixels
    assert pixels.shape == (2, frames, 1, 8, 18)
    for b, f, _, y, x in np.ndindex(*pixels.shape):
        slot = f * slots // frames
        assert pixels[b, f, 0, y, x] == mask[b, (slot * 2 + y // 4) * 3 + x // 6]


@pytest.mark.parametrize("H, W, zoom", [(16, 16, 6), (16, 32, 3), (72, 48, 1), (224, 224, 1)])
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


@pytest.mark.parametrize("side", [16, 72, 96, 224])
def test_titles_and_notes_fit_into_the_picture(side):
    """Nothing reaches the right edge, the longest title ends before the next column begins."""
    titles = ["original", "knowing nothing*", "a line of some length, as for a clip"]
    note, column = "a note that is longer than a table " * 3, side * max(1, round(96 / side)) + 3
    table = masking.picture_table(torch.zeros(1, 3, 3, side, side), titles, note=note)
    table = np.asarray(table.convert("L"))
    assert (table[:, -3:] == 255).all() and (table[-18:] < 128).any()
    assert (table[:18, column + 3 : 2 * column] < 128).any()
    rows = np.asarray(masking.picture_table(torch.zeros(2, 1, 3, side, side), rows=["", "row 2"]))
    assert (rows[22 + side :, :40] < 128).any() and (rows[: 22 + side, :40] > 128).all()


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, count, want", [
    ("64", 1, (64,)), ("64x112", 2, (64, 112)), ("96x3x10", 3, (96, 3, 10))])
def test_numbers_are_written_with_an_x(text, count, want):
    assert masking.numbers(text, count) == want


@pytest.mark.parametrize("text", ["", "x", "0x2x3", "1x2", "1x2x3x4", "1 x2x3", "-1x2x3", "1.x2x3"])
def test_other_numbers_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"{text}: 3 numbers are needed, as in 8x4x2")):
        masking.numbers(text, 3)


@dataclasses.dataclass
class Config:
    # food
    spoons: int = 3  # how many, up to 100 %
    sugar: bool = True  # sweet
    kind: typing.Literal["tea", "milk"] = "tea"  # which
    # run
    batch: int = 4  # cups
    rate: float = 0.1  # litres
    ignore: int = -1  # what is left


PRESETS = {"big": {"spoons": 9, "sugar": False}}
DOC = "x.py - makes tea.\n\nWith milk.\n\nRun   python x.py --spoons 2"


def test_every_field_is_a_flag_and_presets_stand_apart_from_what_is_given():
    given = "--preset big --spoons 2 --no-sugar --kind milk --ignore -1".split()
    preset, flags = masking.settings(Config, PRESETS, DOC, given)
    assert preset == PRESETS["big"]
    assert flags == {"spoons": 2, "sugar": False, "kind": "milk", "ignore": -1}
    assert masking.settings(Config, PRESETS, DOC, []) == ({}, {})


def test_help_has_groups_comments_defaults_and_presets(capsys):
    with pytest.raises(SystemExit):
        masking.settings(Config, PRESETS, DOC, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("x.py - makes tea. With milk. example: python x.py --spoons 2", "food:", "run:",
                 "--spoons INT how many, up to 100 % (default: 3)", "--sugar, --no-sugar",
                 "--kind {tea,milk} which (default: tea)", "big: spoons 9, sugar False"):
        assert part in text


@pytest.mark.parametrize("flags, message", [
    ("--batch 0", "--batch 0 is too small"), ("--rate -1", "--rate -1.0 is too small"),
    ("--spoons -1", "--spoons -1 is too small"), ("--spoons x", "invalid int value"),
    ("--kind wine", "invalid choice"), ("--preset x", "invalid choice"), ("--spoon 2", "--spoon"),
    ("--rate", "expected one argument")])
def test_flags_that_make_no_sense_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        masking.settings(Config, PRESETS, DOC, flags.split())
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


# ---- the script ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error, message", [
    (ValueError("a\nb"), r"error: a\nb"), (OSError(28, "No space"), "No space"),
    (FloatingPointError("the loss is nan"), "the loss is nan"),
    (torch.OutOfMemoryError("CUDA"), "raise --accum")])
def test_what_a_user_can_mend_is_one_line(capsys, error, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        masking.run_script(main)
    text = capsys.readouterr().err
    assert end.value.code == 2 and message in text and text.count("\n") == 1


def test_a_script_leaves_no_process_group_open(tmp_path):
    """Its threads may abort the ending process."""

    def main():
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)

    masking.run_script(main)
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
    (["--ratio", 1], "outside"), (["--ratio", 0.99, "--grid", "1x2x2"], "hides all"),
    (["--grid", "0x1x1"], "3 numbers are needed"), (["--seed", -1], "--seed -1 is too small"),
    (["--ration", 0.5], "unrecognized"), (["--out", "no/x.png"], "No such file")])
def test_bad_input_is_one_line_and_exit_code_2(refused, flags, message):
    assert message in refused(masking, *flags)
