"""masking.py - which tokens does the encoder not get to see?

An image or a clip becomes a grid of tokens: t time slots x h rows x w columns (t = 1 for an image).
A masked autoencoder hides most of them and learns to paint them back. *How the hidden ones are
chosen* is where papers differ. This file draws every kind of mask, and applies it.

    MAE       He et al. 2021, arXiv 2111.06377         random 75 %                   random_mask
    VideoMAE  Tong et al. 2022, arXiv 2203.12602       tubes 90 % (small sets 75 %)  tube_mask
    MAE-ST    Feichtenhofer et al. 2022, 2205.09113    random in space-time 90 %     random_mask
    OmniMAE   Girdhar et al. 2022, arXiv 2206.08356    images 90 %, videos 95 %      random_mask
              also in its public code                  the last tokens               causal_mask
    MultiMAE  Bachmann et al. 2022, arXiv 2204.01678   1/6 visible of 3 modalities   dirichlet_mask
    ablations MAE Fig. 6, MAE-ST Fig. 4, VideoMAE Table 1(b)   block_mask, grid_mask, frame_mask

A mask is a bool tensor (B, N) with N = t*h*w, True = hidden. Tokens are time-major: the token in
slot s, row r, column c has number (s*h + r)*w + c ("raster order"). Every row of a batch hides the
same number of tokens, or the visible ones would not fit into one tensor (B, K, D).

Run   python masking.py                       (3 s; ends with "wrote masks.png")
      python masking.py --ratio 0.9 --grid 8x14x14 --out my_masks.png
Next  data.py: from a file on disk to a batch.
"""

import argparse
import dataclasses
import inspect
import re
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


# ==== THE PAPER, part 1: how many tokens are hidden (needs: nothing) ==============================
def num_hidden(tokens, ratio, rule):
    """How many of `tokens` tokens a mask of `ratio`, in [0, 1), hides.

    rule    "keep": int(tokens * (1 - ratio)) stay visible     MAE, MAE-ST (public code)
            "hide": int(tokens * ratio) are hidden             VideoMAE, OmniMAE (public code)
    raises  ValueError if the ratio is outside [0, 1) or leaves nothing visible

    important: both rules truncate, so they differ (196 tokens at 0.9: 177 or 176 hidden), and
    floats bite: 50 * (1 - 0.9) is 4.999..., so 4 tokens stay and not 5. The official counts have
    this trap, too.
    """
    hidden = tokens
    if 0 <= ratio < 1:
        hidden = tokens - int(tokens * (1 - ratio)) if rule == "keep" else int(tokens * ratio)
    if hidden == tokens:
        raise ValueError(f"mask ratio {ratio} is outside [0, 1) or hides all {tokens} tokens")
    return hidden


# ==== THE PAPER, part 2: which tokens are hidden (needs: np, torch, part 1) =======================
# The kinds in MASKS take (batch, grid, ratio, generator) and return a mask (B, N) on the CPU. The
# generator is an explicit torch.Generator: the same seed gives the same masks on every machine.
def hide_largest(noise, count):
    """Mask that hides, in each row, the `count` tokens with the largest noise.

    MAE Sec. 3 "Simple implementation", except that kept tokens stay in raster order: no unshuffle.
    Uniform noise makes it a draw without replacement.   noise (B, N) float -> mask (B, N) bool
    """
    rank = noise.argsort(dim=1).argsort(dim=1)  # (B, N), of each token by its noise
    return rank >= noise.shape[1] - count


def random_mask(batch, grid, ratio, generator, rule="keep"):
    """Tokens at random, wherever they are: MAE Sec. 3 "Masking"; MAE-ST Fig. 4 "agnostic"."""
    t, h, w = grid
    noise = torch.rand(batch, t * h * w, generator=generator)  # (B, N)
    return hide_largest(noise, num_hidden(t * h * w, ratio, rule))


def tube_mask(batch, grid, ratio, generator):
    """One pattern of h*w places, the same in all t time slots: VideoMAE Sec. 3.3 "tube masking".

    Neighbouring frames look alike. If a hidden patch had a visible twin one slot earlier, the
    network could copy it; a tube leaves no twin. (Bernoulli in the paper, a count in its code.)
    """
    t, h, w = grid
    noise = torch.rand(batch, h * w, generator=generator)  # (B, h*w)
    return hide_largest(noise, num_hidden(h * w, ratio, "hide")).repeat(1, t)


def frame_mask(batch, grid, ratio, generator):
    """int(ratio*t) whole time slots: VideoMAE Table 1(b) "frame", MAE-ST Fig. 4 "time-only"."""
    t, h, w = grid
    noise = torch.rand(batch, t, generator=generator)  # (B, t)
    return hide_largest(noise, num_hidden(t, ratio, "hide")).repeat_interleave(h * w, dim=1)


def causal_mask(batch, grid, ratio, generator=None):
    """The last int(ratio*N) tokens in raster order: predict the future (OmniMAE's public code)."""
    t, h, w = grid
    numbers = torch.arange(t * h * w).repeat(batch, 1)  # (B, N)
    return hide_largest(numbers, num_hidden(t * h * w, ratio, "hide"))


def block_mask(batch, grid, ratio, generator):
    """Large boxes in space-time, until enough is hidden: MAE Fig. 6 "block", MAE-ST Fig. 4.

    DIFFERS from the official code (BEiT's): box sides are drawn uniformly, a quarter to a half of
    the grid's side (in time 1 to t slots), and the last box loses a random part, so that every row
    hides the same number.
    """
    t, h, w = grid
    count = num_hidden(t * h * w, ratio, "keep")

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    rows = []
    for _ in range(batch):
        rank = torch.zeros(t, h, w)  # 0: in no box; 1: in the last one alone; 2, 3: in earlier ones
        while (rank > 0).sum() < count:
            dt, dh = draw(1, t), draw(max(1, h // 4), max(1, h // 2))
            dw = draw(max(1, w // 4), max(1, w // 2))
            s, r, c = draw(0, t - dt), draw(0, h - dh), draw(0, w - dw)
            rank = 2 * rank.sign()
            rank[s : s + dt, r : r + dh, c : c + dw] += 1
        rows.append(rank + torch.rand(t, h, w, generator=generator))
    return hide_largest(torch.stack(rows).flatten(1), count)


def grid_mask(batch, grid, ratio=0.75, generator=None):
    """One patch of every 2 x 2 stays, always the same one: MAE Fig. 6 "grid". Easier than random.

    So it hides 75 % (a little less where a side is odd).   Raises ValueError for another ratio
    """
    t, h, w = grid
    if ratio != 0.75:
        raise ValueError(f"a grid mask hides 75 %, not {ratio:.0%}: use --mask-ratio 0.75")
    hidden = torch.ones(t, h, w, dtype=torch.bool)
    hidden[:, ::2, ::2] = False
    return hidden.reshape(1, -1).repeat(batch, 1)


def dirichlet_mask(batch, sizes, num_visible, generator, alpha=1.0, subset_first=False):
    """A fixed number of visible tokens, shared by chance among modalities: MultiMAE (public code).

    sizes         tokens of each modality, e.g. [196, 196, 196] for RGB, depth, classes
    num_visible   tokens that stay visible over all modalities, in every row (MultiMAE: 98 of 588)
    alpha         symmetric Dirichlet: 1 = every split equally likely, small = one has nearly all
    subset_first  draw a non-empty subset of the modalities first and share among these only (an
                  option of the public code)
    returns       mask (B, sum(sizes)) bool; `mask.split(sizes, dim=1)` gives one per modality
    """
    modalities = len(sizes)
    # torch's Dirichlet takes no generator; numpy's does, so it is seeded from ours
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    shares = rng.dirichlet([alpha] * modalities, batch)  # (batch, modalities)
    for row in shares if subset_first else ():
        chosen, row[:] = np.zeros(modalities, bool), 0
        while not chosen.any():  # the empty subset is drawn again: all others are equally likely
            chosen = rng.random(modalities) < 0.5
        row[chosen] = rng.dirichlet([alpha] * chosen.sum())
    counts = torch.from_numpy(shares * num_visible).round()  # (B, modalities)
    masks = []
    for size, count in zip(sizes, counts.T):
        noise = torch.rand(batch, size, generator=generator)
        rank = noise.argsort(dim=1).argsort(dim=1)  # (B, size), of each token in a random order
        masks.append(rank >= count[:, None])
    # Rounding, or a share above its modality's size, makes the sum miss num_visible. The repair:
    # visible tokens first, hidden ones behind, both in random order, cut after num_visible. A
    # missing token comes at random from the hidden ones of all modalities; a surplus one goes.
    draft = torch.cat(masks, dim=1).float()  # (B, N), 1 = hidden
    noise = draft + torch.rand(draft.shape, generator=generator)  # (B, N)
    return hide_largest(noise, sum(sizes) - num_visible)


MASKS = {"random": random_mask, "tube": tube_mask, "frame": frame_mask, "block": block_mask,
         "causal": causal_mask, "grid": grid_mask}


# ==== THE PAPER, part 3: applying a mask (needs: torch) ===========================================
# All gathering and scattering of tokens. Keep masks on the CPU even where x is on a GPU: counting
# the visible tokens of a mask on the GPU would make the CPU wait for it.
@torch.compiler.disable  # K is a Python number: torch.compile takes what is before and after this
def token_order(mask, device):
    """Token indices, visible ones first, each part in raster order, and how many are visible.

    mask (B, N) bool -> order (B, N) int64 on `device`, K int.
    Raises ValueError if the rows hide different numbers of tokens.
    """
    counts = mask.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError("the rows of a mask must all hide the same number of tokens")
    order = mask.to(device, non_blocking=True).byte().argsort(dim=1, stable=True)  # (B, N)
    return order, mask.shape[1] - int(counts[0])


def visible(x, mask):
    """The tokens that are not hidden, in raster order.   x (B, N, D), mask (B, N) -> (B, K, D)

    A table (1, N, D) is the same for all samples. mask None: nothing is hidden, as in fine-tuning.
    """
    if mask is None:
        return x
    order, K = token_order(mask, x.device)
    return x.expand(len(mask), -1, -1).gather(1, order[:, :K, None].expand(-1, -1, x.shape[2]))


def hidden(x, mask):
    """The tokens that are hidden, in raster order.   x (B, N, D), mask (B, N) -> (B, M, D)"""
    order, K = token_order(mask, x.device)
    return x.expand(len(mask), -1, -1).gather(1, order[:, K:, None].expand(-1, -1, x.shape[2]))


def restore(vis, mask, token):
    """Visible tokens back at their places, `token` everywhere else: MAE Sec. 3 "MAE decoder".

    vis (B, K, D), mask (B, N), token (D,) or anything that expands to (B, N, D) -> (B, N, D)
    """
    (B, N), D = mask.shape, vis.shape[2]
    order, K = token_order(mask, vis.device)
    full = token.to(vis.dtype).expand(B, N, D)
    return full.scatter(1, order[:, :K, None].expand(-1, -1, D), vis)


# ==== THE RUN, part 1: pictures and printing ======================================================
HOLE = (1.0, 0.8, 0.85)  # left-out patches in every picture: pink, as depth maps have all greys


def printable(text):
    """One line that a terminal can show: file names may hold newlines and control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def rank_and_world():
    """Number of this process, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_first():
    """Whether this is the only process, or the first of several: the one that prints and writes."""
    return rank_and_world()[0] == 0


def report(text):
    """Print one line. A closed terminal, or a full disk behind it, must not end a long run."""
    if is_first():
        try:
            print(printable(text), flush=True)
        except OSError:
            pass


def picture_table(cells, columns=(), rows=(), note="", side=96, apart=1000):
    """A labelled table of pictures.   cells (R, C, 3, H, W) in [0, 1] -> PIL image

    columns, rows  titles
    side           small pictures are enlarged to about so many pixels
    apart          rows of a sample: the next one stands a little apart
    """
    R, C, _, H, W = cells.shape
    zoom, cells = max(1, round(side / max(H, W))), (cells.clamp(0, 1) * 255).round().byte().cpu()
    H, W, gap, line, font = zoom * H, zoom * W, 3, 22, ImageFont.load_default(size=14)
    left = gap + int(max([0, *(8 + font.getlength(title) for title in rows)]))
    lefts = [left + c * (W + gap) for c in range(C + 1)]  # where columns begin and the last ends
    tops = [line + r * (H + gap) + r // apart * 5 * gap for r in range(R)]
    width = int(max(lefts[C], gap + font.getlength(note) + 8))
    table = Image.new("RGB", (width, tops[-1] + H + gap + line * bool(note)), "white")
    pen = ImageDraw.Draw(table)
    for x, title in zip(lefts, columns):
        pen.text((x, 2), title, "black", font)
    for y, title in zip(tops, rows):
        pen.text((gap, y + 4), title, "black", font)
    for y, row in zip(tops, cells):
        for x, cell in zip(lefts, row):
            cell = Image.fromarray(cell.permute(1, 2, 0).numpy())
            table.paste(cell.resize((W, H), Image.Resampling.NEAREST), (x, y))
    pen.text((gap, table.height - line + 2), note, "black", font)
    return table


def as_pixels(mask, frames, H, W, h, w):
    """Where a clip or image is hidden.   mask (B, slots*h*w) -> (B, frames, 1, H, W) bool"""
    x = mask.reshape(len(mask), -1, h, w)  # (B, slots, h, w)
    x = x.repeat_interleave(frames // x.shape[1], 1)  # (B, frames, h, w)
    return x.repeat_interleave(H // h, 2).repeat_interleave(W // w, 3)[:, :, None]


# ==== THE RUN, part 2: the command line of all scripts (no paper needs it) ========================
def run_script(main):
    """main(), in which an error that the user can fix becomes one line and exit code 2.

    That is a ValueError, an OSError (paths, disks), a missing package, a full memory, a loss that
    is not finite. To see where it was raised: python -X dev SCRIPT.
    """
    try:
        main()
    except (ValueError, OSError, ImportError, MemoryError, FloatingPointError,
            torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            raise
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            error = "the memory is full: raise --accum, or lower --batch, --workers or the sizes"
        print(f"{sys.argv[0].rpartition('/')[2]}: error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():  # or its threads may abort the ending process
            torch.distributed.destroy_process_group()


def numbers(text, count):
    """ "64x2x4" -> (64, 2, 4), if `count` is 3.   Raises ValueError for anything else"""
    if not re.fullmatch("x".join([r"[1-9]\d*"] * count), text):
        raise ValueError(f"{text}: {count} numbers are needed, as in {'x'.join('842'[:count])}")
    return tuple(int(n) for n in text.split("x"))


# The smallest value of some settings; of all others but --ignore it is 0.
LEAST = dict.fromkeys(
    "batch accum log_every fold frames stride repeat clips crops patch tubelet".split(), 1)


def settings(Config, presets, doc, argv=None):
    """Command line -> settings of the preset, settings given as flags: two dicts {field: value}.

    Every field of the dataclass Config is a flag; the comment behind it is its --help text, a
    comment line above some fields is the name of their group.
    """
    summary, example = doc.split("\n\n")[:2], re.search(r"^Run +(python .*)$", doc, re.M)[1]
    lines = []
    for name, preset in presets.items():
        lines.append(f"preset {name}: {', '.join(f'{k} {v}' for k, v in preset.items())}")
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag value ...]    (--help explains every flag)",
        description="\n\n".join([*summary, f"example: {example}"]), epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets,
                        help="many settings at once, see below; --out ends in its name")
    fields, groups, group = {f.name: f for f in dataclasses.fields(Config)}, {}, None
    for line in "".join(inspect.getsource(cls) for cls in Config.__mro__[:-1]).splitlines():
        title, found = re.fullmatch(r"    # (.*)", line), re.match(r"    (\w+): .*?  # (.*)", line)
        if title:
            group = groups.setdefault(title[1], parser.add_argument_group(title[1]))
        elif found:
            add_flag(group, fields[found[1]], found[2])
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, (int, float)) and value < LEAST.get(name, 0) and name != "ignore":
            parser.error(f"--{name.replace('_', '-')} {value} is too small")
    chosen = given.pop("preset")
    return ({"out": f"{Config.out}_{chosen}"} | presets[chosen] if chosen else {}), given


def add_flag(group, field, text):
    """One flag: on and off for a bool, one of several words for a Literal, else a value."""
    text = f"{text} (default: {field.default})" if field.default != "" else text
    options = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if field.type is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif words := getattr(field.type, "__args__", None):
        options["choices"] = words
    else:
        options["type"] = field.type
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


@dataclasses.dataclass
class Config:
    # masks
    grid: str = "4x8x8"  # tokens: time slots x rows x columns
    ratio: float = 0.75  # share of tokens that are hidden, in [0, 1)
    seed: int = 0  # random seed of the masks
    out: str = "masks.png"  # file for the picture


def main(argv=None):
    cfg = Config(**settings(Config, {}, __doc__, argv)[1])
    grid = t, h, w = numbers(cfg.grid, 3)
    n = t * h * w
    generator = torch.Generator().manual_seed(cfg.seed)
    kinds = [kind for kind in MASKS if kind != "grid" or cfg.ratio == 0.75]
    masks = {kind: MASKS[kind](1, grid, cfg.ratio, generator)[0] for kind in kinds}
    parts = dirichlet_mask(1, [n] * 3, n // 2, generator)[0].split(n)  # 1/6 of 3n stays
    masks |= {f"dirichlet, {m}": part for m, part in zip(("RGB", "depth", "classes"), parts)}

    # a row for each kind of mask, a column for each time slot
    rows = [f"{name}: {int(mask.sum())} of {n} hidden" for name, mask in masks.items()]
    where = as_pixels(torch.stack(list(masks.values())), t, 9 * h, 9 * w, h, w)
    cells = torch.where(where, torch.tensor(HOLE)[:, None, None], 0.27)  # visible: dark grey
    cells[..., ::9, :], cells[..., ::9] = 1, 1  # lines between the tokens
    picture_table(cells, [f"slot {s}" for s in range(t)], rows, apart=1).save(cfg.out)
    print(*rows, f"wrote {cfg.out}", sep="\n")


if __name__ == "__main__":
    run_script(main)
