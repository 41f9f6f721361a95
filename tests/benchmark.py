"""benchmark.py - what masking saves, how others compare, what a GPU needs.

    python tests/benchmark.py                 (CPU: 10 minutes; a GPU measures published sizes)
    python tests/benchmark.py --only plan     (or models, levers, counts, loader)
    python tests/benchmark.py --quick         (tiny sizes, to see that it runs)

Prints Markdown tables, for benchmark.md. Times are medians over interleaved rounds, A, B, A, B ...,
so that a busy machine slows all alike. Of others' code what is installed is compared.
"""

import importlib.util
import itertools
import math
import os
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler need not talk
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import finetune  # noqa: E402
import mae_image  # noqa: E402
import mae_video  # noqa: E402
import multimae  # noqa: E402
import omni  # noqa: E402
from masking import dirichlet_mask, random_mask, run_script, tube_mask, visible  # noqa: E402

SIZES = {  # image, clip: frames, side, tubelet, patch; encoder, its width; clips, rounds
    "quick": ((1, 32, 1, 8), (4, 32, 2, 8), "nano", 64, 2, 1),
    "cpu": ((1, 224, 1, 16), (16, 112, 2, 8), "small", 192, 2, 5),
    "cuda": ((1, 224, 1, 16), (16, 224, 2, 16), "base", 384, 32, 10),
}


def example(kind, clip, size, decoder, batch, ratio, device="cpu", **more):
    """-> model, input, mask (on the CPU).   On the device "meta" they have no memory behind them"""
    (frames, side, _, p), g = clip, torch.Generator().manual_seed(0)
    sides, shape = ((side, p), (side, side)) if frames == 1 else (clip, (frames, side, side))
    with torch.device(device):
        model = finetune.MODELS[kind](*sides, size, decoder, **more)
        x = torch.randn(batch, 3, *shape)
    if kind == "multimae":
        x = {"rgb": x, "depth": x[:, :1], "semseg": x[:, 0, ::4, ::4].abs().long()}
        sizes = [math.prod(model.grid)] * 3
        return model, x, dirichlet_mask(batch, sizes, round(sum(sizes) * (1 - ratio)), g)
    return model, x, (tube_mask if kind == "videomae" else random_mask)(batch, model.grid, ratio, g)


def print_table(title, columns, rows):
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def medians(contestants, rounds):
    """{name: function} -> {name: median seconds}, rounds interleaved, after one to warm up."""
    times = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: np.median(t[1:]) for name, t in times.items()}


def peak_bytes(function):
    """The most that function() holds at a time, beside what was there before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


def training_step(setup, model, loss, dtype=None, fused=True):
    """-> function that makes an update.   loss: model -> scalar"""
    optimizer = torch.optim.AdamW(model.to(setup.device).parameters(), 1e-4, fused=fused)
    dtype = dtype or setup.dtype
    def step():
        with torch.autocast(setup.device, dtype, enabled=dtype != torch.float32):
            value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def race(title, runs, setup, rounds):
    """Measure {name: (model, loss ...)} side by side and print a line of each."""
    steps, rows = {name: training_step(setup, *run) for name, run in runs.items()}, []
    seconds = medians(steps, rounds)
    for name, t in seconds.items():
        times = f"{t:.4f}", f"{t / next(iter(seconds.values())):.2f}x"
        rows.append((name, *times, f"{peak_bytes(steps[name]) / 2**20:.0f}"))
    columns = "", "seconds", "against the first", "peak MB beside weights and moments"
    print_table(title, columns, rows)


def dense_loss(model, x, mask):
    """The same with nothing dropped: hidden patches go through the encoder, too (Table 1(c))."""
    latent = model.encode(x)
    extra = latent.shape[1] - mask.shape[1]  # class token
    latent = torch.cat([latent[:, :extra], visible(latent[:, extra:], mask)], dim=1)
    return model.forward_loss(x, model.forward_decoder(latent, mask), mask)


def of_transformers(model, x, mask):
    """HuggingFace's model of the same sizes and its loss, for MAE and VideoMAE."""
    import transformers as hf
    mask, sizes = mask.to(x.device), dict(
        image_size=model.grid[1] * model.patch, patch_size=model.patch, norm_pix_loss=True,
        layer_norm_eps=1e-6, attn_implementation="sdpa")
    for part, blocks in (("", model.blocks), ("decoder_", model.decoder_blocks)):
        D, attn = blocks[0].norm1.normalized_shape[0], blocks[0].attn
        sizes |= {f"{part}hidden_size": D, f"{part}num_hidden_layers": len(blocks),
                  f"{part}num_attention_heads": attn.heads, f"{part}intermediate_size": 4 * D}
    if x.ndim == 4:
        theirs = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**sizes, mask_ratio=0.75))
        return theirs, lambda m: m(x, noise=mask.float()).loss  # sorting 0 and 1 hides the ones
    config = hf.VideoMAEConfig(**sizes, num_frames=x.shape[2], use_mean_pooling=False)
    frames = x.transpose(1, 2).contiguous()
    return hf.VideoMAEForPreTraining(config), lambda m: m(frames, bool_masked_pos=mask).loss


def table_models(setup):
    """A training step: forward, backward, AdamW.   Of images there are four times as many"""
    image, clip, size, width, batch, rounds = SIZES["quick" if setup.quick else setup.device]
    for kind, *sizes in (("mae", image, size, (512, 8, 16), 4 * batch, 0.75),
                         ("videomae", clip, size, (width, 4, width // 64), batch, 0.9),
                         ("mae_st", clip, size, (512, 4, 16), batch, 0.9)):
        model, x, mask = example(kind, *sizes)
        x = x.to(setup.device)
        runs = {"ours": (model, lambda m: m(x, mask)[0])}
        if kind != "mae_st" and importlib.util.find_spec("transformers"):
            runs["transformers"] = of_transformers(model, x, mask)
        for name, (net, loss) in list(runs.items()) if setup.compile else ():
            runs[f"{name}, compiled"] = net, lambda _, f=loss, m=torch.compile(net): f(m)
        runs["ours, nothing dropped"] = model, lambda m: dense_loss(m, x, mask)
        race(f"{kind} {size}, {tuple(x.shape)}, {setup.dtype}", runs, setup, rounds)


def table_levers(setup):
    """VideoMAE's step, and the same with one lever taken back."""
    _, clip, size, width, batch, rounds = SIZES["quick" if setup.quick else setup.device]
    model, x, mask = example("videomae", clip, size, (width, 4, width // 64), batch, 0.9)
    x = x.to(setup.device)
    def as_it_is(m):
        return m(x, mask)[0]
    def embed_all(m):
        """Every cube is embedded before the hidden ones are dropped, as in the papers' code."""
        tokens = m.patch_embed.proj(x).flatten(2).transpose(1, 2)
        latent = m.norm(m.blocks(visible(tokens + m.pos_embed, mask)))
        return m.forward_loss(x, m.forward_decoder(latent, mask), mask)
    def written_out(m):
        def attention(q, k, v):
            return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            return as_it_is(m)
    other = torch.bfloat16 if setup.dtype == torch.float32 else torch.float32
    runs = {"as it is": (model, as_it_is), "every cube embedded, then dropped": (model, embed_all),
            "attention written out": (model, written_out), f"in {other}": (model, as_it_is, other),
            "AdamW not fused": (model, as_it_is, None, False),
            "nothing dropped": (model, lambda m: dense_loss(m, x, mask))}
    race(f"Levers: VideoMAE {size}, {tuple(x.shape)}", runs, setup, rounds)


def multiply_adds(forward, *args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(*args)
    return counter.get_total_flops() / 2e9  # torch counts a multiply-add as two


def table_counts(setup):
    rows, clip = [], (16, 224, 2, 16)
    for name, *sizes in (
            ("MAE ViT-L, 75 %", "mae", (1, 224, 1, 16), "large", (512, 8, 16), 1, 0.75),
            ("MAE-ST ViT-L, 90 %", "mae_st", clip, "large", (512, 4, 16), 1, 0.9),
            ("VideoMAE ViT-B, 90 %", "videomae", clip, "base", (384, 4, 6), 1, 0.9)):
        model, x, mask = example(*sizes, device="meta")
        few, dense = multiply_adds(model, x, mask), multiply_adds(dense_loss, model, x, mask)
        rows.append((name, f"{few:.1f}", f"{dense:.1f}", f"{dense / few:.1f}x"))
    title = "Multiply-adds of a forward pass, counted, 1e9"
    print_table(title, ("", "hidden ones dropped", "nothing dropped", "ratio"), rows)


CODECS = {"AVI": ("a.avi", "mpeg4", 0), "AVI with B-frames": ("b.avi", "mpeg4", 2),
          "MP4, H.264": ("c.mp4", "libx264", 2)}  # file, codec, B-frames


def write_clip(folder, kind):
    """300 frames: a drifting picture.   -> path"""
    (name, codec, b_frames), path = CODECS[kind], f"{folder}/{CODECS[kind][0]}"
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((480, 320), Image.Resampling.BICUBIC))
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, 25, width=320, height=240, bit_rate=400_000)
        stream.codec_context.max_b_frames = b_frames
        for i in range(300):
            frame = np.ascontiguousarray(picture[i % 60 : i % 60 + 240, i % 90 : i % 90 + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def bare_loop(path, wanted):
    """The limit: from the key frame before `wanted` to the last of them, nothing else. -> that"""
    times = data.frame_times(path)[1]
    with data.open_video(path) as (container, stream):
        if times is None:  # no jump is possible: frames have to be counted
            return next(itertools.islice(container.decode(stream), int(wanted.max()), None))
        container.seek(int(times[wanted.min()]), stream=stream)
        last = times[wanted.max()]
        return next(f for f in container.decode(stream)
                    if (f.pts if stream.codec_context.has_b_frames else f.dts) >= last)


def crop(clip):
    return data.make_crop(clip, (112, 112), (10, 20, 200, 240))


def ours(path, wanted):
    """wanted (R, T): R clips, cropped."""
    return [crop(clip) for clip in data.read_clips(path, lambda n: wanted)[0]]


def with_torchcodec(path, wanted):
    from torchcodec.decoders import VideoDecoder
    video = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    return [crop(video.get_frames_at(frames.tolist()).data.numpy()) for frames in wanted]


def with_decord(path, wanted):
    import decord
    video = decord.VideoReader(path, num_threads=1)
    return [crop(video.get_batch(frames.tolist()).asnumpy()) for frames in wanted]


def usable_readers(path):
    """Those that are installed and find the libraries that they need."""
    readers = {"limit": bare_loop, "ours": ours}
    for read in (with_torchcodec, with_decord):
        name = read.__name__.removeprefix("with_")
        try:
            read(path, np.arange(2)[None])
            readers[name] = read
        except (ImportError, RuntimeError, OSError) as error:
            print(f"\n{name} is left out: {str(error).strip().splitlines()[0]}")
    return readers


def table_loader(setup):
    """One worker, one thread.   Clips that begin at a file's start, in its middle, four anywhere"""
    count, rounds, rows = (1, 1, []) if setup.quick else (20, 7, [])
    torch.set_num_threads(1)
    places = {"start": np.zeros((count, 1), int), "middle": 120 + np.arange(count)[:, None],
              "4 clips anywhere": np.random.default_rng(0).integers(0, 200, (count, 4))}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: write_clip(folder, name) for name in CODECS} | {"shrunk": f"{folder}/d.mp4"}
        data.shrink_file((files["MP4, H.264"], Path(files["shrunk"]), 128))
        readers = usable_readers(files["AVI"])
        for (name, path), (place, first) in itertools.product(files.items(), places.items()):
            jobs = first[:, :, None] + 4 * np.arange(16)
            runs = {key: lambda f=f: [f(path, wanted) for wanted in jobs]
                    for key, f in readers.items()}
            seconds = medians(runs, rounds)
            cells = {key: f"{first.size / t:.0f}" for key, t in seconds.items()}
            cells["ours"] += f" ({seconds['ours'] / seconds['limit']:.2f}x the time)"
            rows.append((f"{name}, {place}", *cells.values()))
    title = "Loader, clips a second of one worker: 16 x 4 of 300 frames of 320 x 240, to 112 px"
    print_table(title, ("", *readers), rows)


# Clips a second of one worker, of files as they are and shrunk; a slow run of --only loader
WORKER = {"AVI": (70, 138), "MP4": (22, 138), "MP4, 4 clips": (38, 200), "": ()}
GPUS = {"T4": 65, "RTX 3090": 71, "A100": 312, "H100": 989}  # TFLOP/s, dense, half precision
REACHED, CARDS, FULL = 0.3, (8, 16, 24, 80), 0.85  # share that a step reaches; GB; share used
PLANS = [  # script, preset, data, images, videos, what they are: one of WORKER
    (mae_image, "cifar10", "CIFAR-10", 50_000, 0, ""),
    (mae_image, "gpu", "100k images", 100_000, 0, ""),
    (mae_image, "paper", "ImageNet", 1_281_167, 0, ""),
    (mae_video, "gpu", "10k videos", 0, 10_000, "MP4"),
    (mae_video, "ucf101", "UCF101", 0, 9_537, "AVI"),
    (mae_video, "hmdb51", "HMDB51", 0, 3_570, "AVI"),
    (mae_video, "ucf101_paper", "UCF101", 0, 9_537, "AVI"),
    (mae_video, "hmdb51_paper", "HMDB51", 0, 3_570, "AVI"),
    (mae_video, "mae_st_paper", "Kinetics-400", 0, 240_000, "MP4, 4 clips"),
    (omni, "paper", "ImageNet + SSv2", 1_281_167, 168_913, "MP4, 4 clips"),
    (multimae, "paper", "ImageNet", 1_281_167, 0, "")]
USUAL = dict(frames=1, tubelet=1, repeat=1, mask_ratio_image=0, image_share=1, video_share=1)


def fake_update(model, x, mask):
    """Bytes of an update at its peak, beside weights, gradients, moments, in bfloat16 autocast."""
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors with a shape and no memory
        model.to_empty(device="cpu")
        x = tree_map(lambda v: torch.empty_like(v, device="cpu"), x)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
    tracker.track_external(model, *tree_leaves(x))
    with tracker:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, mask)[0]
        loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - 8 * sum(p.numel() for p in model.parameters())


def estimate(kind, clip, size, decoder, ratio, image_ratio=0, **more):
    """-> parameters, bytes a sample needs in an update, 1e9 multiply-adds of an image, of a clip"""
    model, x, mask = example(kind, clip, size, decoder, 64, ratio, "meta", **more)
    n, one = sum(p.numel() for p in model.parameters()), tree_map(lambda v: v[:1], x)
    sample = image = multiply_adds(model, one, mask[:1])
    if kind == "omni":
        of_image = random_mask(1, (1, *model.grid[1:]), image_ratio, torch.Generator(), "hide")
        image = multiply_adds(model, one[:, :, 0], of_image)
    return n, (fake_update(model, x, mask) - 2 * n) / 64, image, sample


def table_plan(setup):
    """Estimates, for every preset made for a GPU.   USUAL: settings that only some scripts have"""
    rows = []
    for script, preset, name, images, videos, worker in PLANS[-2:] if setup.quick else PLANS:
        cfg = Namespace(**USUAL | vars(script.Config(**script.PRESETS[preset])))
        kind = getattr(cfg, "model", script.__name__.removesuffix("_image"))
        more = {k: v for k, v in vars(cfg).items() if k in ("classes", "class_width")}
        ratios = 1 - cfg.visible if kind == "multimae" else cfg.mask_ratio, cfg.mask_ratio_image
        (side, _), *sizes = mae_image.shapes(cfg)
        clip = cfg.frames, side, cfg.tubelet, cfg.patch
        n, each, of_image, of_clip = estimate(kind, clip, *sizes, *ratios, **more)
        images *= cfg.epochs * cfg.image_share
        clips = videos * cfg.epochs * cfg.video_share * cfg.repeat
        # weights, gradients, two moments: 4 bytes each; copies in bfloat16: 2
        gigabytes = {k: (18 * n + each * cfg.batch / k) / 2**30  # k: --accum
                     for k in range(1, cfg.batch + 1) if cfg.batch % (k * cfg.repeat) == 0}
        fits = [next((k for k, x in gigabytes.items() if x < FULL * card), "-") for card in CARDS]
        times = []
        for peak in GPUS.values():
            # 2 operations x 3: forward once, backward twice
            seconds = 6e9 * (images * of_image + clips * of_clip) / (REACHED * peak * 1e12)
            workers = [math.ceil(clips / seconds / speed) for speed in WORKER[worker]]
            files = "; {} ({})".format(*workers) if workers else ""
            times.append(f"{seconds / 3600:.1f}{files}")
        work = [f"{x / 1e6:,.1f} x {one:.2f}" if x else ""
                for x, one in ((images, of_image), (clips, of_clip))]
        rows.append((f"{script.__name__} {preset}", name, *work, f"{n / 1e6:.1f}", cfg.batch,
                     f"{each / 2**20:.1f}", f"{gigabytes[1]:.1f}", *fits, *times))
    title = "Plans, estimated: memory, --accum for cards, hours; workers for files as is (shrunk)"
    print_table(title, ("preset", "data", "M images x 1e9 multiply-adds", "M clips x the same",
                        "M parameters", "batch", "MB of a sample", "GB",
                        *(f"{card} GB" for card in CARDS), *GPUS), rows)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    tables = {"models": table_models, "levers": table_levers, "counts": table_counts,
              "plan": table_plan, "loader": table_loader}
    device, usual = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=usual)
    parser.add_argument("--compile", action="store_true", help="compiled models, too")
    parser.add_argument("--only", choices=tables, help="one table")
    setup = parser.parse_args()
    setup.device, setup.dtype = device, getattr(torch, setup.precision)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for key, table in tables.items():
        if setup.only in (None, key):
            table(setup)


if __name__ == "__main__":
    run_script(main)
