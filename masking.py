"""masking.py - which tokens does the encoder not get to see?

An image or a clip becomes a grid of tokens, t time slots x h rows x w columns (t = 1 for an image). A masked
autoencoder hides most of them and asks a network to paint them back. *How the hidden ones are chosen* is one
thing in which papers differ; this file holds every kind, and the gather / scatter that obeys a mask.

    MAE       He et al. 2021, arXiv 2111.06377         random 75 %                    random_mask
    VideoMAE  Tong et al. 2022, arXiv 2203.12602       tubes 90 %  (small sets 75 %)  tube_mask
    MAE-ST    Feichtenhofer et al. 2022, 2205.09113    random in space-time 90 %      random_mask
    OmniMAE   Girdhar et al. 2022, arXiv 2206.08356    images 90 %, videos 95 %       random_mask
              also in its public code:           the last tokens in raster order       causal_mask
    MultiMAE  Bachmann et al. 2022, arXiv 2204.01678   1/6 visible over modalities    dirichlet_mask
    ablations MAE Fig. 6, MAE-ST Fig. 4, VideoMAE Table 1(b)                          block_mask, grid_mask, frame_mask

A mask is a bool tensor (B, N) with N = t*h*w, True = hidden. Tokens are time-major: the token in time slot s,
row r, column c has the number (s*h + r)*w + c ("raster order"). Every row of a batch hides the same number of
tokens, or the visible ones would not fit into one tensor (B, K, D).

Run   python masking.py                       (3 s; ends with "wrote masks.png")
      python masking.py --ratio 0.9 --grid 8 14 14 --out my_masks.png
Next  data.py: from a file on disk to a batch.
"""

import argparse
import contextlib
import difflib
import errno
import os
import signal
import sys

import numpy as np
import torch


class InputError(ValueError):
    """What the user gave (a flag, a path, a file, a shape) cannot be used. The message is one line for people."""


# ============================================================================================================
#  THE PAPER, part 1: how many tokens are hidden                                           (needs: InputError)
# ============================================================================================================


def num_hidden(tokens, ratio, rule):
    """How many of `tokens` tokens a mask hides.

    tokens  int, size of the set that is drawn from (the whole grid, or one time slot of it)
    ratio   float in [0, 1), share of hidden tokens
    rule    "keep": int(tokens * (1 - ratio)) stay visible     MAE, MAE-ST (public code)
            "hide": int(tokens * ratio) are hidden             VideoMAE, OmniMAE (public code)
    raises  InputError for a ratio outside [0, 1) or one that leaves nothing visible

    important: both rules truncate, so they differ (196 tokens at 0.9: 177 or 176 hidden), and floats bite:
    50 * (1 - 0.9) is 4.999..., so 4 tokens stay and not 5. Whoever wants the official counts copies the trap.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"mask ratio {ratio} is outside [0, 1): 0.75 hides three quarters of the tokens")
    hidden = tokens - int(tokens * (1 - ratio)) if rule == "keep" else int(tokens * ratio)
    if hidden == tokens:
        raise InputError(f"mask ratio {ratio} hides all {tokens} tokens: use a lower ratio or smaller patches")
    return hidden


# ============================================================================================================
#  THE PAPER, part 2: which tokens are hidden                        (needs: torch, numpy, InputError, part 1)
#
#  The kinds in MASKS take (batch, grid, ratio, generator) and return a mask, bool (B, N), on the CPU.
#  The generator is an explicit torch.Generator: the same seed gives the same masks on every machine.
# ============================================================================================================


def hide_largest(noise, count):
    """Mask that hides, in each row, the `count` tokens with the largest noise.

    MAE Sec. 3 "Simple implementation": shuffle by sorting noise, keep the first part. Uniform noise makes this
    a draw without replacement.   noise (B, N) float -> mask (B, N) bool
    """
    order = noise.argsort(dim=1)  # (B, N)
    mask = torch.zeros(noise.shape, dtype=torch.bool)  # (B, N)
    return mask.scatter(1, order[:, noise.shape[1] - count :], True)


def random_mask(batch, grid, ratio, generator, rule="keep"):
    """Each token by chance, wherever it is: MAE Sec. 3 "Masking"; MAE-ST Fig. 4, "space-time agnostic"."""
    t, h, w = grid
    noise = torch.rand(batch, t * h * w, generator=generator)  # (B, N)
    return hide_largest(noise, num_hidden(t * h * w, ratio, rule))


def tube_mask(batch, grid, ratio, generator):
    """One pattern of h*w places, the same in all t time slots: VideoMAE Sec. 3.3 "tube masking".

    Neighbouring frames look alike. If a hidden patch had a visible twin one slot earlier, the network could copy
    it; a tube leaves no twin. (The paper writes a Bernoulli draw, its code hides an exact count.)
    """
    t, h, w = grid
    noise = torch.rand(batch, h * w, generator=generator)  # (B, h*w)
    return hide_largest(noise, num_hidden(h * w, ratio, "hide")).repeat(1, t)


def frame_mask(batch, grid, ratio, generator):
    """Whole time slots: "frame" in VideoMAE Table 1(b), "time-only" in MAE-ST Fig. 4. int(ratio*t) slots go."""
    t, h, w = grid
    noise = torch.rand(batch, t, generator=generator)  # (B, t)
    return hide_largest(noise, num_hidden(t, ratio, "hide")).repeat_interleave(h * w, dim=1)


def causal_mask(batch, grid, ratio, generator=None):
    """The last int(ratio*N) tokens in raster order: predict the future (in OmniMAE's public code)."""
    t, h, w = grid
    return hide_largest(torch.arange(t * h * w).repeat(batch, 1), num_hidden(t * h * w, ratio, "hide"))


def block_mask(batch, grid, ratio, generator):
    """Large boxes in space-time, until the count is reached: MAE Fig. 6 "block", MAE-ST Fig. 4 "block-wise".

    DIFFERS from the official code (BEiT's): box sides are drawn uniformly, a quarter to a half of the grid's
    side (in time: 1 to t slots), and the last box loses a random part, so that every row hides the same number.
    """
    t, h, w = grid
    count = num_hidden(t * h * w, ratio, "keep")
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))
    rows = []
    for _ in range(batch):
        hidden = torch.zeros(t, h, w, dtype=torch.bool)
        while hidden.sum() < count:
            before = hidden.clone()
            dt, dh, dw = draw(1, t), draw(max(1, h // 4), max(1, h // 2)), draw(max(1, w // 4), max(1, w // 2))
            s, r, c = draw(0, t - dt), draw(0, h - dh), draw(0, w - dw)
            hidden[s : s + dt, r : r + dh, c : c + dw] = True
        if count:  # the last box may go too far: keep all earlier boxes and a random part of this one
            rank = before.float() * 2 + hidden.float() + torch.rand(t, h, w, generator=generator)
            hidden = hide_largest(rank.reshape(1, -1), count)
        rows.append(hidden.reshape(-1))
    return torch.stack(rows)


def grid_mask(batch, grid, ratio=0.75, generator=None):
    """One patch of every 2 x 2 stays, always the same: MAE Fig. 6 "grid". Easier to fill in than a random mask.

    So it is 75 % and nothing else (a little less where a side is odd).   Raises InputError for another ratio
    """
    t, h, w = grid
    if ratio != 0.75:
        raise InputError(f"a grid hides 75 % of the tokens, not {ratio:.0%}: use --mask-ratio 0.75")
    hidden = torch.ones(t, h, w, dtype=torch.bool)
    hidden[:, ::2, ::2] = False
    return hidden.reshape(1, -1).repeat(batch, 1)


def dirichlet_mask(batch, sizes, num_visible, generator, alpha=1.0, subset_first=False):
    """Shares of a fixed number of visible tokens over several modalities: MultiMAE (public code).

    sizes         tokens of each modality, e.g. [196, 196, 196] for RGB, depth, classes
    num_visible   tokens that stay visible over all modalities, in every row (MultiMAE: 98, 1/6 of 588)
    alpha         symmetric Dirichlet: 1 = every split equally likely, small = one modality takes all
    subset_first  choose a non-empty subset of the modalities first, then share among these only (an option of the
                  public code that no script here uses)
    returns       mask (B, sum(sizes)) bool; `mask.split(sizes, dim=1)` gives one per modality
    """
    total, modalities = sum(sizes), len(sizes)
    if not 0 < num_visible <= total:
        raise InputError(f"{num_visible} visible tokens cannot be drawn from {total}: give 1 to {total}")
    # torch's Dirichlet takes no generator; numpy's does, so it is seeded from ours
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    chosen = np.ones((batch, modalities), bool)
    if subset_first:  # the bits of a number in 1 .. 2^modalities - 1 are a non-empty subset, all equally likely
        chosen = rng.integers(1, 2**modalities, (batch, 1)) >> np.arange(modalities) & 1 > 0
    shares = np.zeros(chosen.shape)
    for row, here in zip(shares, chosen):
        row[here] = rng.dirichlet([alpha] * here.sum())
    counts = torch.from_numpy(shares * num_visible).round()  # (B, modalities); the sum can miss num_visible
    masks = []
    for size, count in zip(sizes, counts.T):
        rank = torch.rand(batch, size, generator=generator).argsort(dim=1).argsort(dim=1)  # (B, size), a random order
        masks.append(rank >= count[:, None])  # (B, size)
    # Rounding, or a share above its modality's size, makes the sum miss num_visible. The repair: visible tokens
    # first, hidden ones behind, both in random order, cut after num_visible. A missing token comes at random from all
    # the hidden ones, of any modality; a surplus one is dropped at random.
    draft = torch.cat(masks, dim=1).float()  # (B, N), 1 = hidden
    return hide_largest(draft + torch.rand(draft.shape, generator=generator), total - num_visible)


# the kinds of any ratio; each is called as f(batch, grid, ratio, generator)
MASKS = {"random": random_mask, "tube": tube_mask, "frame": frame_mask, "block": block_mask, "causal": causal_mask}


# ============================================================================================================
#  THE PAPER, part 3: to obey a mask                                                (needs: torch, InputError)
#
#  The only gather and scatter of the project. Masks may lie on the CPU while x is on a GPU, and better do:
#  counting the visible tokens of a mask on the GPU would make the CPU wait for it.
# ============================================================================================================


@torch.compiler.disable  # K is a number, which cannot be captured: what stands before and after it is compiled
def token_order(mask, device):
    """Token numbers, visible ones first, each part in raster order, and how many are visible.

    mask (B, N) bool -> order (B, N) int64 on `device`, K int.   Raises InputError if rows hide different numbers.
    """
    counts = mask.sum(dim=1)
    if (counts != counts[0]).any():
        raise InputError(f"rows of one mask hide {int(counts.min())} to {int(counts.max())} tokens: all must agree")
    return mask.to(device, non_blocking=True).byte().argsort(dim=1, stable=True), mask.shape[1] - int(counts[0])


def visible(x, mask):
    """The tokens that are not hidden, in raster order.   x (B, N, D), mask (B, N) -> (B, K, D)"""
    order, K = token_order(mask, x.device)
    return x.gather(1, order[:, :K, None].expand(-1, -1, x.shape[2]))


def hidden(x, mask):
    """The tokens that are hidden, in raster order.   x (B, N, D), mask (B, N) -> (B, M, D)"""
    order, K = token_order(mask, x.device)
    return x.gather(1, order[:, K:, None].expand(-1, -1, x.shape[2]))


def restore(vis, mask, token):
    """Visible tokens back at their places, `token` everywhere else: MAE Sec. 3 "MAE decoder".

    vis (B, K, D), mask (B, N), token (D,) or anything that expands to (B, N, D) -> (B, N, D)
    """
    (B, N), D = mask.shape, vis.shape[2]
    order, K = token_order(mask, vis.device)
    full = token.to(vis.dtype).expand(B, N, D)
    return full.scatter(1, order[:, :K, None].expand(-1, -1, D), vis)


# ============================================================================================================
#  THE RUN: show every kind in the terminal and in one picture
# ============================================================================================================


def run_script(main):
    """Call main(); an InputError, a path that the system refuses or a full GPU becomes one line and exit code 2.

    A traceback is for our own mistakes only."""
    for stream in (sys.stdout, sys.stderr):  # a file name need not be valid in the terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not at once: pools are closed, half a folder is removed
    try:
        main()
        if torch.distributed.is_initialized():  # its threads may abort a process that ends with them
            torch.distributed.destroy_process_group()
    except BrokenPipeError:  # as in: ... | head
        sys.stdout = open(os.devnull, "w")  # or the interpreter would fail on what is left to print
        sys.exit(141)
    except (InputError, OSError) as error:
        if not isinstance(error, InputError) and error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: error: {last_line(error)}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        what = "the memory of the GPU is full: raise --accum if the script has it, or lower --batch or the sizes"
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: error: {what}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def say(text):
    """print, for long work: a closed terminal or pipe, or a full disk behind it, does not end it."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def last_line(error):
    """The last line of an error: one that a loader's worker raised arrives as a whole traceback, and ends with it."""
    text = str(error).strip() or type(error).__name__  # an EOFError has no words of its own
    return text.splitlines()[-1].removeprefix("masking.InputError: ")


class OneLineParser(argparse.ArgumentParser):
    """argparse without abbreviations, and with one line instead of a page of usage when a flag is wrong."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        flag = message.rpartition("unrecognized arguments: ")[2].split(" ")[0].split("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        raise InputError(f"{message} ({f'did you mean {near[0]}? ' if near else ''}--help lists the flags)")


def as_text(mask, grid):
    """A mask (N,) as lines of text, time slots side by side: '#' hidden, '.' visible."""
    slots = mask.reshape(grid).tolist()
    lines = zip(*[["".join("#" if hide else "." for hide in row) for row in slot] for slot in slots])
    return "\n".join("  " + "  ".join(line) for line in lines)


def draw(masks, grid, path, cell=8):
    """Write one PNG: a row per kind of mask, a column per time slot; dark = hidden.   masks {title: (N,)}"""
    from PIL import Image, ImageDraw  # pillow comes with torchvision

    t, h, w = grid
    slot_w, row_h, left = w * cell + cell, h * cell + 3 * cell, cell
    picture = Image.new("RGB", (left + max(t * slot_w, 420), row_h * len(masks) + cell), "white")
    pen = ImageDraw.Draw(picture)
    for i, (title, mask) in enumerate(masks.items()):
        pen.text((left, i * row_h + cell // 2), title, fill="black")
        for s, r, c in np.ndindex(t, h, w):
            x, y = left + s * slot_w + c * cell, i * row_h + 2 * cell + r * cell
            color = (60, 66, 82) if mask.reshape(grid)[s, r, c] else (255, 196, 84)
            pen.rectangle([x, y, x + cell - 2, y + cell - 2], fill=color)
    picture.save(path)


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=[4, 8, 8], metavar=("T", "H", "W"), help="tokens; 4 8 8")
    parser.add_argument("--ratio", type=float, default=0.75, help="share of tokens that are hidden, in [0, 1); 0.75")
    parser.add_argument("--seed", type=int, default=0, help="of the generator that draws the masks; 0")
    parser.add_argument("--out", default="masks.png", help="file for the picture; masks.png")
    args = parser.parse_args()
    grid, n = tuple(args.grid), int(np.prod(args.grid))
    if min(grid) < 1:
        raise InputError(f"a grid of {grid} tokens is empty: every side must be at least 1")

    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: must be 0 to 2^63 - 1")
    generator = torch.Generator().manual_seed(args.seed)
    masks = {name: draw_one(1, grid, args.ratio, generator)[0] for name, draw_one in MASKS.items()}
    if args.ratio == 0.75:
        masks["grid"] = grid_mask(1, grid)[0]
    count = max(1, n // 2)  # MultiMAE shows 1/6 of the 3 n tokens, whatever the ratio of the others
    for name, part in zip(("RGB", "depth", "classes"), dirichlet_mask(1, [n] * 3, count, generator)[0].split(n)):
        masks[f"dirichlet, {name}"] = part

    for name, mask in masks.items():
        count = int(mask.sum())
        print(f"{name}: {count} of {n} tokens hidden, {n - count} visible\n{as_text(mask, grid)}\n")
    try:
        draw({f"{name}: {int(m.sum())} of {n} hidden": m for name, m in masks.items()}, grid, args.out)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {args.out}: {error}") from None
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
