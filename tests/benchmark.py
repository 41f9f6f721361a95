"""benchmark.py - what masking saves, what each lever gives, how others compare, what a GPU needs.

    python tests/benchmark.py                 (CPU: 15 minutes; a GPU measures published sizes)
    python tests/benchmark.py --only plan     (or models, levers, cost, counts, joint, loader)
    python tests/benchmark.py --quick         (tiny sizes, to see that it runs)

Prints Markdown tables, for benchmark.md. Times are medians over interleaved rounds, A, B, A, B ...,
so that a busy machine slows all alike. A step is forward, backward and AdamW. transformers,
torchcodec and decord are compared where they are installed.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler need not talk
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import mae_image  # noqa: E402
import mae_video  # noqa: E402
import multimae  # noqa: E402
import omni  # noqa: E402
from masking import (dirichlet_mask, numbers, random_mask, run_script, tube_mask,  # noqa: E402
                     visible)

KINDS = {"mae": mae_image.MAE, "videomae": mae_video.VideoMAE, "mae_st": mae_video.MAEST,
         "omni": omni.OmniMAE, "multimae": multimae.MultiMAE}
SIZES = {  # image, clip: frames, side, tubelet, patch; batch: clips, of images four times as many
    "quick": dict(image=(1, 32, 1, 8), clip=(4, 32, 2, 8), size=(32, 1, 2), batch=2, rounds=1,
                  decoders=dict.fromkeys(KINDS, (16, 1, 2))),
    "cpu": dict(image=(1, 224, 1, 16), clip=(16, 112, 2, 8), size="small", batch=2, rounds=5,
                decoders=dict(mae=(512, 8, 16), videomae=(192, 4, 3), mae_st=(512, 4, 16),
                              omni=(192, 4, 16))),
    "cuda": dict(image=(1, 224, 1, 16), clip=(16, 224, 2, 16), size="base", batch=32, rounds=10,
                 decoders=dict(mae=(512, 8, 16), videomae=(384, 4, 6), mae_st=(512, 4, 16),
                               omni=(384, 4, 16))),
}


def example(kind, clip, size, decoder, batch, ratio, device="cpu", **more):
    """-> model, input, mask (on the CPU).   On the device "meta" they have no memory behind them"""
    (frames, side, u, p), g = clip, torch.Generator().manual_seed(0)
    with torch.device(device):
        if frames > 1:
            model = KINDS[kind](frames, side, u, p, size, decoder)
            x = torch.randn(batch, 3, frames, side, side)
        else:
            model = KINDS[kind](side, p, size, decoder, **more)
            x = torch.randn(batch, 3, side, side)
    if kind == "multimae":
        x = {"rgb": x, "depth": x[:, :1], "semseg": x[:, 0, ::4, ::4].abs().long()}
        sizes = [math.prod(model.grid)] * 3
        return model, x, dirichlet_mask(batch, sizes, round(sum(sizes) * (1 - ratio)), g)
    draw = tube_mask if kind == "videomae" else random_mask
    return model, x, draw(batch, model.grid, ratio, g)


def print_table(title, columns, rows):
    print(f"\n**{title}**\n\n| {' | '.join(map(str, columns))} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def medians(contestants, rounds):
    """{name: function} -> {name: median seconds}, rounds interleaved, after one to warm up."""
    times = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


# ---- a training step -----------------------------------------------------------------------------


def peak_bytes(function):
    """The most that function() holds at a time, beside what was there before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


class Contestant:
    """A model, its optimiser, and its loss on one fixed batch.   loss: model -> scalar"""

    def __init__(self, model, loss, setup, dtype=None, fused=True):
        self.model, self.loss = model.to(setup.device), loss
        self.device, self.dtype = setup.device, dtype or setup.dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused)

    def step(self):
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def race(title, runs, setup):
    """Measure {name: Contestant} side by side and print a line of each."""
    n = 256 if setup.quick else {"cpu": 2048, "cuda": 8192}[setup.device]
    a, b = (torch.randn(n, n, device=setup.device, dtype=setup.dtype) for _ in range(2))
    steps, rows = {name: run.step for name, run in runs.items()}, []
    seconds = medians({"product": lambda: a @ b, **steps}, setup.rounds)
    peak = 2 * n**3 / seconds.pop("product")
    first = next(iter(seconds.values()))
    for name, t in seconds.items():
        share = ""
        if "compiled" not in name and runs[name].dtype == setup.dtype:
            # attention as the products that it is: torch counts these
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                steps[name]()
            share = f"{counter.get_total_flops() / t / peak:.0%}"
        megabytes = peak_bytes(steps[name]) / 2**20
        rows.append((name, f"{t:.4f}", f"{t / first:.2f}x", share, f"{megabytes:.0f}"))
    for run in runs.values():
        run.model.cpu()
    product = f"of a {n} x {n} product's {peak / 1e12:.2f} TFLOP/s"
    memory = "peak MB beside weights and moments"
    print_table(title, ("", "seconds", "against the first", product, memory), rows)


def dense_loss(model, x, mask):
    """The same with nothing dropped: hidden patches go through the encoder, too (Table 1(c))."""
    latent = model.encode(x)
    extra = latent.shape[1] - mask.shape[1]  # class token
    latent = torch.cat([latent[:, :extra], visible(latent[:, extra:], mask)], dim=1)
    return model.forward_loss(x, model.forward_decoder(latent, mask), mask)


def of_transformers(model, x, mask, decoder):
    """HuggingFace's model of the same sizes and its loss, for MAE and VideoMAE."""
    import transformers as hf

    block = model.blocks[0]
    sizes = dict(
        hidden_size=block.norm1.normalized_shape[0], num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.heads, intermediate_size=block.mlp.fc1.out_features,
        image_size=model.grid[1] * model.patch, patch_size=model.patch,
        decoder_hidden_size=decoder[0], decoder_num_hidden_layers=decoder[1],
        decoder_num_attention_heads=decoder[2], decoder_intermediate_size=4 * decoder[0],
        norm_pix_loss=True, layer_norm_eps=1e-6, attn_implementation="sdpa")
    mask = mask.to(x.device)
    if x.ndim == 4:
        noise = mask.float()  # sorting 0 and 1 hides the ones
        theirs = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**sizes, mask_ratio=0.75))
        return theirs, lambda m: m(x, noise=noise).loss
    config = hf.VideoMAEConfig(**sizes, num_frames=x.shape[2], use_mean_pooling=False)
    frames = x.transpose(1, 2).contiguous()
    return hf.VideoMAEForPreTraining(config), lambda m: m(frames, bool_masked_pos=mask).loss


def table_models(setup):
    for kind, clip, batch, ratio in (("mae", setup.image, 4 * setup.batch, 0.75),
                                     ("videomae", setup.clip, setup.batch, 0.9),
                                     ("mae_st", setup.clip, setup.batch, 0.9)):
        decoder = setup.decoders[kind]
        model, x, mask = example(kind, clip, setup.size, decoder, batch, ratio)
        x = x.to(setup.device)
        pairs = {"ours": (model, lambda m: m(x, mask)[0])}
        if kind != "mae_st" and importlib.util.find_spec("transformers"):
            pairs["transformers"] = of_transformers(model, x, mask, decoder)
        runs = {key: Contestant(*pair, setup) for key, pair in pairs.items()}
        for key, (net, loss) in pairs.items() if setup.compile else ():
            twin = torch.compile(net)
            runs[f"{key}, compiled"] = Contestant(net, lambda _, f=loss, m=twin: f(m), setup)
        runs["ours, nothing dropped"] = Contestant(model, lambda m: dense_loss(m, x, mask), setup)
        race(f"{kind} {setup.size}, {tuple(x.shape)}, {setup.dtype}", runs, setup)


def table_levers(setup):
    """VideoMAE's step, and the same with one lever taken back."""
    decoder = setup.decoders["videomae"]
    model, x, mask = example("videomae", setup.clip, setup.size, decoder, setup.batch, 0.9)
    x = x.to(setup.device)

    def as_it_is(m):
        return m(x, mask)[0]

    def embed_all(m):
        """Every cube is embedded before the hidden ones are dropped, as in the papers' code."""
        conv = m.patch_embed.proj
        tokens = F.conv3d(x, conv.weight, conv.bias, conv.stride).flatten(2).transpose(1, 2)
        latent = visible(tokens + m.pos_embed, mask)
        for block in m.blocks:
            latent = block(latent)
        return m.forward_loss(x, m.forward_decoder(m.norm(latent), mask), mask)

    def written_out(q, k, v):
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v

    def without_fused_attention(m):
        with mock.patch.object(F, "scaled_dot_product_attention", written_out):
            return as_it_is(m)

    other = torch.bfloat16 if setup.dtype == torch.float32 else torch.float32
    runs = {
        "as it is": Contestant(model, as_it_is, setup),
        "every cube embedded, then dropped": Contestant(model, embed_all, setup),
        "attention written out": Contestant(model, without_fused_attention, setup),
        "AdamW not fused": Contestant(model, as_it_is, setup, fused=False),
        f"in {other}": Contestant(model, as_it_is, setup, other),
        "nothing dropped": Contestant(model, lambda m: dense_loss(m, x, mask), setup),
    }
    race(f"Levers: VideoMAE {setup.size}, {tuple(x.shape)}", runs, setup)


def table_cost(setup):
    """One step of VideoMAE against ratio, frames, side and batch; all else as in the first line."""
    (T, H, u, p), size, B = setup.clip, setup.size, max(setup.batch // 2, 2)
    if setup.device == "cpu" and not setup.quick:
        H, size = 64, "tiny"
    rows = [(0.9, T, H, B), (0.5, T, H, B), (0.75, T, H, B), (0.95, T, H, B)]
    rows += [(0.9, T * k // 2, H, B) for k in (1, 4, 8)]
    rows += [(0.9, T, H * k // 4, B) for k in (2, 6, 8)] + [(0.9, T, H, B * k) for k in (2, 4)]
    runs, decoder = {}, setup.decoders["videomae"]
    for ratio, frames, side, batch in rows[: 2 if setup.quick else None]:
        model, x, mask = example("videomae", (frames, side, u, p), size, decoder, batch, ratio)
        name = f"{ratio:.0%}, {frames} x {side} px ({mask.shape[1]} tokens), batch {batch}"
        x = x.to(setup.device)
        runs[name] = Contestant(model, lambda m, x=x, mask=mask: m(x, mask)[0], setup)
    race(f"Cost: VideoMAE {size}, patch {p}; hidden, clip", runs, setup)


def table_joint(setup):
    """OmniMAE on images and clips, one after the other: what extreme ratios save."""
    B, decoder = setup.batch, setup.decoders["omni"]
    model, clips, _ = example("omni", setup.clip, setup.size, decoder, B, 0.9)
    clips = clips.to(setup.device)
    imgs = torch.randn(4 * B, 3, *clips.shape[3:], device=setup.device)

    def contestant(ratios, loss):
        g = torch.Generator().manual_seed(0)
        image = random_mask(4 * B, (1, *model.grid[1:]), ratios[0], g, "hide")
        clip = random_mask(B, model.grid, ratios[1], g, "hide")
        return Contestant(model, lambda m: loss(m, imgs, image) + loss(m, clips, clip), setup)

    runs = {f"{a:.0%} / {b:.0%}": contestant((a, b), lambda m, x, mask: m(x, mask)[0])
            for a, b in ((0.75, 0.9), (0.9, 0.95))}
    runs["nothing dropped"] = contestant((0.75, 0.9), dense_loss)
    race(f"OmniMAE {setup.size}, {4 * B} images, then {B} clips: hidden", runs, setup)


# ---- multiply-adds -------------------------------------------------------------------------------

PUBLISHED = {"MAE ViT-L, 75 %": ("mae", (1, 224, 1, 16), "large", (512, 8, 16), 1, 0.75),
             "MAE-ST ViT-L, 90 %": ("mae_st", (16, 224, 2, 16), "large", (512, 4, 16), 1, 0.9),
             "VideoMAE ViT-B, 90 %": ("videomae", (16, 224, 2, 16), "base", (384, 4, 6), 1, 0.9)}


def multiply_adds(forward, *args):
    """Of the matrix products of a forward pass, in units of 1e9."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(*args)
    return counter.get_total_flops() / 2e9  # torch counts a multiply-add as two


def table_counts(setup):
    rows = []
    for name, sizes in PUBLISHED.items():
        model, x, mask = example(*sizes, device="meta")
        few, dense = multiply_adds(model, x, mask), multiply_adds(dense_loss, model, x, mask)
        rows.append((name, f"{few:.1f}", f"{dense:.1f}", f"{dense / few:.1f}x"))
    title = "Multiply-adds of a forward pass, counted, 1e9"
    print_table(title, ("", "hidden ones dropped", "nothing dropped", "ratio"), rows)


# ---- the loader ----------------------------------------------------------------------------------


def write_clip(path, codec, b_frames):
    """300 frames of 320 x 240: a drifting picture. MPEG-4 has a key frame every 12."""
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((480, 320), Image.Resampling.BICUBIC))
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 240, "yuv420p", 400_000
        stream.codec_context.max_b_frames = b_frames
        if codec == "mpeg4":
            stream.codec_context.gop_size = 12
        for i in range(300):
            frame = np.ascontiguousarray(picture[i % 60 : i % 60 + 240, i % 90 : i % 90 + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def bare_loop(path, wanted):
    """The limit: from the key frame before a clip to its last frame, nothing else. -> that frame"""
    times = data.frame_times(path)[1]
    with data.open_video(path) as (container, stream):
        if times is None:  # no jump is possible: frames have to be counted
            return next(itertools.islice(container.decode(stream), wanted[-1], None))
        container.seek(int(times[wanted[0]]), stream=stream)
        for frame in container.decode(stream):
            when = frame.pts if stream.codec_context.has_b_frames else frame.dts
            if when >= times[wanted[-1]]:
                return frame


def crop(clip):
    box = data.random_box(clip.shape[1:3], (112, 112), 0.5, data.seeded(0))
    return data.make_crop(clip, (112, 112), box)


def ours(path, wanted):
    return crop(data.read_clips(path, lambda n: wanted[None])[0][0])


def with_torchcodec(path, wanted):
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    return crop(video.get_frames_at(wanted.tolist()).data.numpy())


def with_decord(path, wanted):
    import decord

    return crop(decord.VideoReader(path, num_threads=1).get_batch(wanted.tolist()).asnumpy())


READERS = {"limit": bare_loop, "ours": ours, "torchcodec": with_torchcodec, "decord": with_decord}


def usable_readers(path):
    """Those that are installed and find the libraries that they need."""
    readers = dict(READERS)
    for name, read in READERS.items():
        try:
            read(path, np.arange(2))
        except (ImportError, RuntimeError, OSError) as error:
            print(f"\n{name} is left out: {str(error).strip().splitlines()[0]}")
            del readers[name]
    return readers


def table_loader(setup):
    """One worker, one thread.   Clips that begin at a file's start, and somewhere in its middle"""
    count, rounds, rows = (1, 1, []) if setup.quick else (20, 7, [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def add(name, readers, samples):
        """readers {name in READERS: function of the number of a clip}"""
        runs = {key: lambda f=f: [f(i) for i in range(count)] for key, f in readers.items()}
        seconds = medians(runs, rounds)
        cells = {key: f"{count * samples / t:.0f}" for key, t in seconds.items()}
        if "limit" in seconds:
            cells["ours"] += f" ({seconds['ours'] / seconds['limit']:.2f}x the time)"
        rows.append((name, *(cells.get(key, "") for key in READERS)))

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{path}" for name, path in (
            ("AVI", "a.avi"), ("AVI with B-frames", "b.avi"), ("MP4, H.264", "c.mp4"),
            ("shrunk", "d.mp4"))}
        for path, kind in zip(paths.values(), (("mpeg4", 0), ("mpeg4", 2), ("libx264", 2))):
            write_clip(path, *kind)
        data.shrink_file((paths["MP4, H.264"], Path(paths["shrunk"]), 128))
        usable = usable_readers(paths["AVI"])
        for (name, path), place in itertools.product(paths.items(), ("start", "middle")):
            first = np.arange(count) + 120 if place == "middle" else np.zeros(count, int)
            clips = first[:, None] + 4 * np.arange(16)
            add(f"{name}, {place}", {key: lambda i, f=f: f(path, clips[i])
                                     for key, f in usable.items()}, 1)
        for name in ("MP4, H.264", "shrunk"):
            one = data.Files(np.array([paths[name]]), np.array([0]), ["a"])
            cfg = mae_video.Config(frames=16, stride=4, sampling="dense", img_size="112", repeat=4)
            four = mae_video.ClipDataset(one, cfg, True)
            add(f"{name}, 4 clips anywhere", {"ours": lambda i: four[i, 0]}, 4)
    torch.set_num_threads(threads)
    title = "Loader, clips a second of one worker: 16 x 4 of 300 frames of 320 x 240, to 112 px"
    print_table(title, ("", *READERS), rows)


# ---- plans for a GPU -----------------------------------------------------------------------------

# Clips a second of one worker, of files as they are and shrunk: --only loader, "middle"
WORKER = {"AVI": (70, 138), "MP4": (22, 138), "MP4, 4 clips": (38, 200)}
GPUS = {"T4": 65, "RTX 3090": 71, "A100": 312, "H100": 989}  # TFLOP/s, dense, half precision
REACHED, CARDS, FULL = 0.3, (8, 16, 24, 80), 0.85  # share that a step reaches; GB; share used
SETS = {"": 0, "CIFAR-10": 50_000, "ImageNet": 1_281_167, "UCF101": 9_537, "HMDB51": 3_570,
        "Kinetics-400": 240_000, "SSv2": 168_913, "100k images": 100_000, "10k videos": 10_000}
PLANS = [  # script, preset, images, videos, what they are: one of WORKER
    (mae_image, "cifar10", "CIFAR-10", "", ""), (mae_image, "gpu", "100k images", "", ""),
    (mae_image, "paper", "ImageNet", "", ""), (mae_video, "gpu", "", "10k videos", "MP4"),
    (mae_video, "ucf101", "", "UCF101", "AVI"), (mae_video, "hmdb51", "", "HMDB51", "AVI"),
    (mae_video, "ucf101_paper", "", "UCF101", "AVI"),
    (mae_video, "hmdb51_paper", "", "HMDB51", "AVI"),
    (mae_video, "mae_st_paper", "", "Kinetics-400", "MP4, 4 clips"),
    (omni, "gpu", "100k images", "10k videos", "MP4, 4 clips"),
    (omni, "paper", "ImageNet", "SSv2", "MP4, 4 clips"),
    (multimae, "gpu", "100k images", "", ""), (multimae, "paper", "ImageNet", "", ""),
]


def fake_update(model, x, mask):
    """Bytes of an update at its peak, beside weights, gradients and moments, in bfloat16 autocast.

    By fake tensors, which have a shape and no memory.   model and x as example() makes them
    """
    fake, tracker = FakeTensorMode(allow_non_fake_inputs=True), MemTracker()
    with fake:
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


@functools.cache
def estimate(kind, clip, size, decoder, ratio, image_ratio, more):
    """-> parameters, bytes a sample needs in an update, 1e9 multiply-adds of an image, of a clip"""
    model, x, mask = example(kind, clip, size, decoder, 64, ratio, "meta", **dict(more))
    n, one = sum(p.numel() for p in model.parameters()), tree_map(lambda v: v[:1], x)
    sample = image = multiply_adds(model, one, mask[:1])
    if kind == "omni":
        of_image = random_mask(1, (1, *model.grid[1:]), image_ratio, torch.Generator(), "hide")
        image = multiply_adds(model, one[:, :, 0], of_image)
    return n, (fake_update(model, x, mask) - 2 * n) / 64, image, sample


def read_preset(script, preset):
    """-> config with what only some scripts have, arguments of estimate()"""
    cfg, more = script.Config(**script.PRESETS[preset]), ()
    usual = dict(model=script.__name__.removesuffix("_image"), frames=1, tubelet=1, repeat=1,
                 mask_ratio_image=0, image_share=1, video_share=1)
    if script is multimae:
        more = ("classes", cfg.classes), ("class_width", cfg.class_width)
        usual["mask_ratio"] = 1 - cfg.visible
    cfg = argparse.Namespace(**{**usual, **vars(cfg)})
    clip = cfg.frames, int(cfg.img_size), cfg.tubelet, cfg.patch
    size, decoder = mae_image.encoder_size(cfg.size), numbers(cfg.decoder, 3)
    return cfg, [cfg.model, clip, size, decoder, cfg.mask_ratio, cfg.mask_ratio_image, more]


def table_plan(setup):
    """Estimates, for every preset of pretraining that is made for a GPU."""
    rows = []
    for script, preset, *sets, worker in PLANS:
        if setup.quick and preset not in ("gpu", "mae_st_paper"):
            continue
        cfg, args = read_preset(script, preset)
        if setup.quick:
            args[2:4] = (96, 1, 3), (64, 1, 4)
        n, each, of_image, of_clip = estimate(*args)
        images = cfg.epochs * cfg.image_share * SETS[sets[0]]
        clips = cfg.epochs * cfg.video_share * cfg.repeat * SETS[sets[1]]

        def gigabytes(accum):
            return (18 * n + each * cfg.batch / accum) / 2**30

        accums = [k for k in range(1, cfg.batch + 1) if cfg.batch % (k * cfg.repeat) == 0]
        fits = [next((k for k in accums if gigabytes(k) < FULL * card), "-") for card in CARDS]
        times = []
        for peak in GPUS.values():
            seconds = 6e9 * (images * of_image + clips * of_clip) / (REACHED * peak * 1e12)
            times.append(f"{seconds / 3600:.1f}")
            if clips:
                workers = [math.ceil(clips / seconds / speed) for speed in WORKER[worker]]
                times[-1] += f"; {workers[0]} ({workers[1]})"
        work = [f"{x / 1e6:,.1f} x {one:.2f}" if x else ""
                for x, one in ((images, of_image), (clips, of_clip))]
        rows.append((f"{script.__name__} {preset}", " + ".join(filter(None, sets)), *work,
                     f"{n / 1e6:.1f}", cfg.batch, f"{each / 2**20:.1f}", f"{gigabytes(1):.1f}",
                     *fits, *times))
    title = "Plans, estimated: memory, --accum for cards, hours; workers for files as is (shrunk)"
    print_table(title, ("preset", "data", "M images x 1e9 multiply-adds", "M clips x the same",
                        "M parameters", "batch", "MB of a sample", "GB",
                        *(f"{card} GB" for card in CARDS), *GPUS), rows)
    print(f"""
- GB = 18 bytes x parameters (weights, gradients, two moments: 4 each; copies in bfloat16: 2)
  + MB of a sample x batch / accum. The smallest accum with which {FULL:.0%} of one card hold that:
  the rest is for CUDA and for gaps between tensors.
- Seconds = 2 operations x 3 (forward once, backward twice) x samples x multiply-adds
  / ({REACHED:.0%} of {", ".join(f"{name} {peak}" for name, peak in GPUS.items())} TFLOP/s).
- Workers = clips / seconds / clips a second of one: {WORKER}.""")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"models": table_models, "levers": table_levers, "cost": table_cost,
              "joint": table_joint, "counts": table_counts, "loader": table_loader,
              "plan": table_plan}
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--compile", action="store_true", help="models: also with torch.compile")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="bfloat16 on a GPU")
    parser.add_argument("--only", choices=tables, help="one table")
    setup = parser.parse_args()
    setup.device = "cuda" if torch.cuda.is_available() else "cpu"
    usual = {"cpu": "float32", "cuda": "bfloat16"}[setup.device]
    setup.dtype = getattr(torch, setup.precision or usual)
    vars(setup).update(SIZES["quick" if setup.quick else setup.device])
    name = f"CPU, {torch.get_num_threads()} threads"
    if setup.device == "cuda":
        name = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}")
    for key, table in tables.items():
        if setup.only in (None, key):
            table(setup)


if __name__ == "__main__":
    run_script(main)
