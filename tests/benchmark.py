"""benchmark.py - what masking saves, what each lever gives, how we compare with others: side by side in one run.

    python tests/benchmark.py                 (CPU: about 10 minutes; GPU: published sizes, about 3 minutes)
    python tests/benchmark.py --only cost     (one of: start, loader, models, counts, joint, cost, levers)
    python tests/benchmark.py --quick         (tiny sizes, to see that it runs)

Prints medians over interleaved rounds: A, B, A, B, ... so that a busy machine slows all alike. A step is forward,
backward and AdamW. transformers, torchcodec and decord are used if they are installed.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import mae_image  # noqa: E402
import mae_video  # noqa: E402
import omni  # noqa: E402
from masking import OneLineParser, random_mask, run_script, tube_mask, visible  # noqa: E402


def medians(contestants, rounds):
    """{name: function} -> {name: median seconds}, rounds interleaved, after one round to warm up."""
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


def kept_for_backward(function, parameters):
    """Bytes that a forward pass keeps for its backward pass beside the weights: what limits the batch size."""
    seen, weights = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(seen.values())


def setting(quick, device, tiny, cpu, gpu):
    """-> generator, and what to measure here: tiny if --quick, else by machine."""
    return torch.Generator().manual_seed(0), tiny if quick else gpu if device == "cuda" else cpu


def table(title, runs, rounds):
    """Measure {name: Contestant} and print a line of each beside the first."""
    seconds = medians({key: run.step for key, run in runs.items()}, rounds)
    first = next(iter(seconds.values()))
    print(f"\n{title:52s} {'seconds':>9s} {'against the first':>18s} {'MB':>8s}")
    for key, s in seconds.items():
        print(f"{key:52s} {s:9.4f} {s / first:17.2f}x {runs[key].megabytes():8.1f}")


class Contestant:
    """A model, its optimiser and one fixed batch."""

    def __init__(self, model, loss, device, dtype):
        self.model, self.loss, self.device, self.dtype = model.to(device), loss, device, dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def forward(self):
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.loss(self.model)

    def step(self):
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def megabytes(self):
        if self.device == "cuda":
            weights = sum(p.untyped_storage().nbytes() for p in self.model.parameters())
            others = torch.cuda.memory_allocated() - 3 * weights  # all but ours and AdamW's two moments of them
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return (torch.cuda.max_memory_allocated() - others) / 2**20
        return kept_for_backward(self.forward, self.model.parameters()) / 2**20


def matmul_peak(device, dtype, quick):
    """Multiply-adds x 2 per second of one large matrix product: what this machine reaches at best."""
    n = 256 if quick else 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / medians({"": lambda: a @ b}, 3 if quick else 10)[""]


def counted_flops(run):
    """Floating-point operations of the matrix products of one step, counted by torch."""
    # with attention written out as the products that it is: not every fused kernel is known to the counter
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run.step()
    return counter.get_total_flops()


def dense_loss(model, patches, x, mask):
    """The same model with nothing dropped: hidden patches go through the encoder, too (MAE Table 1(c), MAE-ST Table 1)."""
    everything = torch.zeros_like(mask)
    latent = model.forward_encoder(patches, everything)
    extra = latent.shape[1] - mask.shape[1]  # class token
    latent = torch.cat([latent[:, :extra], visible(latent[:, extra:], mask)], dim=1)
    if isinstance(model, mae_video.VideoMAE):
        return model.forward_loss(x, model.forward_decoder(latent, mask), mask)
    pred = model.decoder_pred(mae_image.hidden(model.forward_decoder(latent, mask), mask))
    return model.forward_loss(patches if isinstance(model, mae_image.MAE) else x, pred, mask)


def transformers_models(image, video, decoders):
    """{name: (model, loss)} of HuggingFace with the same sizes, or {} if transformers is not installed."""
    try:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining, ViTMAEConfig, ViTMAEForPreTraining
    except ImportError:
        print("transformers is not installed: no comparison with it")
        return {}

    def config(model, kind, decoder, **more):
        block = model.blocks[0]
        return kind(hidden_size=block.norm1.normalized_shape[0], num_hidden_layers=len(model.blocks),
                    num_attention_heads=block.attn.heads, intermediate_size=block.mlp.fc1.out_features,
                    image_size=model.grid[1] * model.patch, patch_size=model.patch, decoder_hidden_size=decoder[0],
                    decoder_num_hidden_layers=decoder[1], decoder_num_attention_heads=decoder[2],
                    decoder_intermediate_size=4 * decoder[0], norm_pix_loss=True, layer_norm_eps=1e-6,
                    attn_implementation="sdpa", **more)  # fmt: skip

    (mae, imgs, image_mask), (videomae, clips, video_mask) = image, video
    hf_image = ViTMAEForPreTraining(config(mae, ViTMAEConfig, decoders[0], mask_ratio=0.75))
    hf_video = VideoMAEForPreTraining(config(videomae, VideoMAEConfig, decoders[1], num_frames=clips.shape[2],
                                             use_mean_pooling=False))  # fmt: skip
    noise, mask = image_mask.float().to(imgs.device), video_mask.to(clips.device)  # sorting 0 and 1 hides the ones
    frames = clips.transpose(1, 2).contiguous()
    return {
        "MAE": (hf_image, lambda m: m(imgs, noise=noise).loss),
        "VideoMAE": (hf_video, lambda m: m(frames, bool_masked_pos=mask).loss),
    }


def benchmark_models(quick, device, dtype, compiled):
    generator, (image, video, decoders, size, B, rounds) = setting(
        quick, device,
        tiny=((32, 8), (4, 32, 8), ((16, 1, 2), (16, 1, 2), (16, 1, 2)), (32, 1, 2), 2, 1),
        cpu=((224, 16), (16, 112, 8), ((512, 8, 16), (192, 4, 3), (512, 4, 16)), "small", 2, 5),
        gpu=((224, 16), (16, 224, 16), ((512, 8, 16), (384, 4, 6), (512, 4, 16)), "base", 32, 10))  # fmt: skip
    (side, p), (T, H, patch) = image, video
    mae = mae_image.MAE(side, p, size, decoders[0])
    videomae = mae_video.VideoMAE(T, H, 2, patch, size, decoders[1])
    maest = mae_video.MAEST(T, H, 2, patch, size, decoders[2])
    imgs = torch.randn(B * 4, 3, side, side, generator=generator).to(device)
    clips = torch.randn(B, 3, T, H, H, generator=generator).to(device)
    masks = {"MAE": random_mask(B * 4, mae.grid, 0.75, generator), "VideoMAE": tube_mask(B, videomae.grid, 0.9, generator),
             "MAE-ST": random_mask(B, maest.grid, 0.9, generator)}  # fmt: skip
    peers = transformers_models((mae, imgs, masks["MAE"]), (videomae, clips, masks["VideoMAE"]), decoders)

    peak = matmul_peak(device, dtype, quick)
    print(f"\nthis machine's matrix products: {peak / 1e12:.2f} TFLOP/s in {dtype}".replace("torch.", ""))
    print(f"{'model, step of one batch':40s} {'seconds':>9s} {'samples/s':>10s} {'against ours':>13s} "
          f"{'of the peak':>12s} {'peak MB' if device == 'cuda' else 'MB kept for backward':>21s}")  # fmt: skip
    for name, model in (("MAE", mae), ("VideoMAE", videomae), ("MAE-ST", maest)):
        x, mask, B = (imgs if name == "MAE" else clips), masks[name], len(masks[name])
        cut = mae_image.patchify if name == "MAE" else mae_video.patchify
        sizes = (mae.patch,) if name == "MAE" else (2, videomae.patch)
        runs = {"ours": Contestant(model, lambda m: m(x, mask)[0], device, dtype)}
        runs["ours, nothing dropped"] = Contestant(model, lambda m: dense_loss(m, cut(x, *sizes), x, mask), device, dtype)
        if name in peers:
            runs["transformers"] = Contestant(*peers[name], device, dtype)
        if compiled:
            for key in [k for k in ("ours", "transformers") if k in runs]:
                loss = runs[key].loss
                twin = torch.compile(runs[key].model)
                step = lambda m, twin=twin, loss=loss: loss(twin)
                runs[f"{key}, compiled"] = Contestant(runs[key].model, step, device, dtype)
        seconds = medians({key: run.step for key, run in runs.items()}, rounds)
        for key, t in seconds.items():
            flops = counted_flops(runs[key.removesuffix(", compiled")])
            print(f"{name + ', ' + key:40s} {t:9.4f} {B / t:10.1f} {t / seconds['ours']:12.2f}x "
                  f"{flops / t / peak:12.0%} {runs[key].megabytes():21.1f}")  # fmt: skip
        for run in runs.values():
            run.model.cpu()


def benchmark_joint(quick, device, dtype):
    """OmniMAE: what extreme ratios save on an image step and a clip step, and what packing both into one step does."""
    generator, (frames, side, patch, size, decoder, B, rounds) = setting(
        quick, device,
        tiny=(4, 32, 8, (32, 1, 2), (16, 1, 2), 2, 1),
        cpu=(16, 112, 8, "small", (192, 4, 16), 2, 5),
        gpu=(16, 224, 16, "base", (384, 4, 16), 32, 10))  # fmt: skip
    model = omni.OmniMAE(frames, side, 2, patch, size, decoder)
    t, h, w = model.grid
    imgs = torch.randn(4 * B, 3, side, side, generator=generator).to(device)
    clips = torch.randn(B, 3, frames, side, side, generator=generator).to(device)

    def step(image, clip):
        return Contestant(model, lambda m: m((imgs, clips), (image, clip))[0], device, dtype)

    def dense(m):
        """Every token goes through the encoder; the loss is that of the lowest ratios."""
        image, clip = masks[-1]
        total = 0
        for x, mask in ((imgs, image), (clips, clip)):
            patches = mae_video.patchify(m.as_clip(x), m.tubelet, m.patch)
            latent = visible(m.forward_encoder([patches], [torch.zeros_like(mask)])[0], mask)
            pred = m.decoder_pred(mae_image.hidden(m.forward_decoder([latent], [mask])[0], mask))
            total = total + m.forward_loss(x, pred, mask) / 2
        return total

    runs, masks = {}, []
    for a, b in ((0.9, 0.95), (0.75, 0.9)):
        masks.append((random_mask(4 * B, (1, h, w), a, generator, "hide"),
                      random_mask(B, model.grid, b, generator, "hide")))  # fmt: skip
        runs[f"{a:.0%} / {b:.0%}, packed"] = step(*masks[-1])
        apart = lambda m, mask=masks[-1]: (m(imgs, mask[0])[0] + m(clips, mask[1])[0]) / 2
        runs[f"{a:.0%} / {b:.0%}, one after the other"] = Contestant(model, apart, device, dtype)
    runs["nothing dropped"] = Contestant(model, dense, device, dtype)
    table(f"OmniMAE {size}, {4 * B} images and {B} clips, hidden", runs, rounds)


def multiply_adds(model, patches, x, mask):
    """Of one forward pass, in units of 1e9: with hidden patches dropped, and with nothing dropped."""
    counts = []
    for loss in (lambda: model(x, mask), lambda: dense_loss(model, patches, x, mask)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            loss()
        counts.append(counter.get_total_flops() / 2e9)  # torch counts a multiply-add as two
    return counts


def published_sizes():
    """(name, model, patches, input, mask) of the papers' ablations, without memory behind them."""
    g = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        mae = mae_image.MAE(224, 16, "large", (512, 8, 16))
        maest = mae_video.MAEST(16, 224, 2, 16, "large", (512, 4, 16))
        videomae = mae_video.VideoMAE(16, 224, 2, 16, "base", (384, 4, 6))
        imgs, clips = torch.empty(1, 3, 224, 224), torch.empty(1, 3, 16, 224, 224)
    cubes = mae_video.patchify(clips, 2, 16)
    return [("MAE ViT-L, 75 %", mae, mae_image.patchify(imgs, 16), imgs, random_mask(1, mae.grid, 0.75, g)),
            ("MAE-ST ViT-L, 90 %", maest, cubes, clips, random_mask(1, maest.grid, 0.9, g)),
            ("VideoMAE ViT-B, 90 %", videomae, cubes, clips, tube_mask(1, videomae.grid, 0.9, g))]  # fmt: skip


def benchmark_counts():
    print(f"\n{'multiply-adds of a forward pass, 1e9':44s} {'dropped':>9s} {'nothing dropped':>16s} {'ratio':>7s}")
    for name, *run in published_sizes():
        few, all_of_them = multiply_adds(*run)
        print(f"{name:44s} {few:9.1f} {all_of_them:16.1f} {all_of_them / few:6.1f}x")


def benchmark_cost(quick, device, dtype):
    """One step of VideoMAE against ratio, frames, size and batch; all else as in the first line."""
    generator, (frames, side, patch, size, decoder, B, rounds) = setting(
        quick, device,
        tiny=(4, 32, 8, (32, 1, 2), (16, 1, 2), 1, 1),
        cpu=(16, 64, 8, "tiny", (96, 2, 2), 2, 3),
        gpu=(16, 224, 16, "base", (384, 4, 6), 16, 5))  # fmt: skip
    base = dict(ratio=0.9, frames=frames, side=side, batch=B)
    rows = [base] + [{**base, "ratio": r} for r in (0.5, 0.75, 0.95)]
    rows += [{**base, "frames": frames * k // 2} for k in (1, 4, 8)]
    rows += [{**base, "side": side * k // 4} for k in (2, 6, 8)] + [{**base, "batch": B * k} for k in (2, 4)]
    runs = {}
    for row in rows[: 2 if quick else None]:
        model = mae_video.VideoMAE(row["frames"], row["side"], 2, patch, size, decoder)
        x = torch.randn(row["batch"], 3, row["frames"], row["side"], row["side"], generator=generator).to(device)
        mask = tube_mask(row["batch"], model.grid, row["ratio"], generator)
        loss = lambda m, x=x, mask=mask: m(x, mask)[0]
        name = f"{row['ratio']:.0%}, {row['frames']} x {row['side']} px, batch {row['batch']}: {np.prod(model.grid)} tokens"
        runs[name] = Contestant(model, loss, device, dtype)
    table(f"VideoMAE {size}, patch {patch}: hidden, clip", runs, rounds)


def plain_attention(q, k, v):
    """Attention as the papers' code writes it."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return weights @ v


def benchmark_levers(quick, device, dtype):
    """VideoMAE's step, and the same with one lever taken back."""
    generator, (frames, side, patch, size, decoder, B, rounds) = setting(
        quick, device,
        tiny=(4, 32, 8, (32, 1, 2), (16, 1, 2), 2, 1),
        cpu=(16, 112, 8, "small", (192, 4, 3), 2, 5),
        gpu=(16, 224, 16, "base", (384, 4, 6), 32, 10))  # fmt: skip
    model = mae_video.VideoMAE(frames, side, 2, patch, size, decoder)
    x = torch.randn(B, 3, frames, side, side, generator=generator).to(device)
    mask = tube_mask(B, model.grid, 0.9, generator)

    def embed_all(m):
        """Every cube is embedded before the hidden ones are dropped, as in the papers' code (a convolution)."""
        tokens = F.conv3d(x, m.patch_embed.proj.weight, m.patch_embed.proj.bias, m.patch_embed.proj.weight.shape[2:])
        latent = visible(tokens.flatten(2).transpose(1, 2) + m.pos_embed, mask)
        for block in m.blocks:
            latent = block(latent)
        return m.forward_loss(x, m.forward_decoder(m.norm(latent), mask), mask)

    def predict_all(m):
        """The decoder's last layer on every token, hidden ones picked afterwards."""
        latent = m.forward_encoder(mae_video.patchify(x, 2, patch), mask)
        pos, K = m.decoder_pos_embed.expand(len(x), -1, -1), latent.shape[1]
        tokens = torch.cat([m.decoder_embed(latent) + visible(pos, mask), m.mask_token + mae_image.hidden(pos, mask)], 1)
        for block in m.decoder_blocks:
            tokens = block(tokens)
        return m.forward_loss(x, m.decoder_pred(m.decoder_norm(tokens))[:, K:], mask)

    def without_sdpa(m):
        with_sdpa, F.scaled_dot_product_attention = F.scaled_dot_product_attention, plain_attention
        loss = m(x, mask)[0]
        F.scaled_dot_product_attention = with_sdpa
        return loss

    runs = {"as it is": Contestant(model, lambda m: m(x, mask)[0], device, dtype)}
    for name, loss in (("every cube embedded, then dropped", embed_all), ("a prediction for every token", predict_all),
                       ("attention written out", without_sdpa)):  # fmt: skip
        runs[name] = Contestant(model, loss, device, dtype)
    runs["AdamW not fused"] = Contestant(model, runs["as it is"].loss, device, dtype)
    runs["AdamW not fused"].optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    runs[f"in {other}".replace("torch.", "")] = Contestant(model, runs["as it is"].loss, device, other)
    dense = lambda m: dense_loss(m, mae_video.patchify(x, 2, patch), x, mask)
    runs["nothing dropped"] = Contestant(model, dense, device, dtype)
    table(f"levers: VideoMAE {size}, {B} clips of {frames} x {side} px", runs, rounds)


def benchmark_start(quick):
    """What a user waits for before the first update, and the memory of a worker."""
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"

    def seconds(module):
        command = [sys.executable, "-c", code.format(module)]
        return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    count, rounds = (2020, 1) if quick else (13_320, 5)
    print(f"\n{'before the first update':60s} {'seconds':>9s}")
    for module in ("torch, torchvision", "mae_video", "finetune"):
        print(f"{'import ' + module:60s} {statistics.median(seconds(module) for _ in range(rounds)):9.2f}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "ucfTrainTestlist").mkdir()
        names = [f"v_Class{i % 101:03d}_g{i // 101 % 25 + 1:02d}_c{i // 2525:02d}.avi" for i in range(count)]
        lines = {"train": [], "test": []}
        for name in names:
            kind = name.split("_")[1]
            (root / "UCF-101" / kind).mkdir(parents=True, exist_ok=True)
            (root / "UCF-101" / kind / name).touch()
            test = name.split("_g")[1][:2] <= "07"
            listed = "CLASS007" if kind == "Class007" else kind  # as UCF101's lists and folders disagree about one class
            lines["test" if test else "train"].append(f"{listed}/{name}" + ("" if test else f" {int(kind[5:]) + 1}"))
        for split, listed in lines.items():
            (root / "ucfTrainTestlist" / f"{split}list01.txt").write_text("\n".join(listed) + "\n")
        classes = sorted({name.split("_")[1] for name in names})
        (root / "ucfTrainTestlist" / "classInd.txt").write_text("".join(f"{int(c[5:]) + 1} {c}\n" for c in classes))
        index = medians({"": lambda: [data.list_videos(root, split) for split in ("train", "val")]}, rounds)[""]
        print(f"{f'find {count} files of UCF101 and read its lists, train and test':60s} {index:9.2f}")
        clip = str(root / "clip.avi")
        ucf_like(clip)
        files = data.Files(np.array([clip] * 4), np.zeros(4, int), ["a"])
        dataset = MemoryOfWorker(data.ClipDataset(files, 16, 4, 112, 0, crop="multiscale"))
        worker = max(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1))
        print(f"memory of its own of a worker, 16 x 4 frames of 320 x 240: {worker:.0f} MB")


class MemoryOfWorker:
    """Dataset: what the process that loads an item holds alone, in MB (Linux; elsewhere 0)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        self.dataset[0, i]
        rollup = Path(f"/proc/{os.getpid()}/smaps_rollup")
        own = re.findall(r"Private_\w+: +(\d+) kB", rollup.read_text()) if rollup.exists() else []
        return sum(map(int, own)) / 1024


def ucf_like(path, n=186, b_frames=0):
    """A clip as in UCF101: 320 x 240, MPEG-4 in AVI, a key frame every 12, a drifting picture of coloured squares.

    Of four genuine clips that were looked at three have no B-frames; the fourth has them, and a single key frame."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 255, (40, 60, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 240, "yuv420p", 400_000
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = b_frames, 12
        for i in range(n):
            frame = np.ascontiguousarray(picture[i % 60 : i % 60 + 240, i % 90 : i % 90 + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def benchmark_loader(quick):
    """Clips per second of one worker, against a bare loop that decodes from the first frame to the clip's last."""
    T, stride, size = 16, 4, 112
    with tempfile.TemporaryDirectory() as folder:
        path, reordered = (str(Path(folder) / name) for name in ("clip.avi", "b_frames.avi"))
        ucf_like(path)
        ucf_like(reordered, b_frames=2)
        clips = lambda path, repeat: data.ClipDataset(data.Files(np.array([path]), np.array([0]), ["a"]), T, stride, size, 0,
                                                      crop="multiscale", repeat=repeat)  # fmt: skip
        one, four, unjumped = clips(path, 1), clips(path, 4), clips(reordered, 1)
        count, n = 2 if quick else 40, data.count_frames(path)
        starts = [data.dense_start(n, T, stride, data.seeded(0, 0, e, 0)) for e in range(count)]

        def bare():
            for start in starts:
                container, stream = data.open_video(path)
                with container:
                    for i, _ in enumerate(container.decode(stream)):
                        if i == start + (T - 1) * stride:
                            break

        contestants = {"PyAV, from the first frame, nothing else": bare, "ours": lambda: [one[e, 0] for e in range(count)],
                       "ours, a file with B-frames": lambda: [unjumped[e, 0] for e in range(count)],
                       "ours, 4 clips a video (per clip)": lambda: [four[e, 0] for e in range(max(count // 4, 1))]}  # fmt: skip
        with contextlib.suppress(ImportError, RuntimeError, OSError):
            from torchcodec.decoders import VideoDecoder

            def torchcodec():
                for e, start in enumerate(starts):
                    frames = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC").get_frames_at(
                        list(range(start, start + T * stride, stride))).data  # fmt: skip
                    data.make_crop(frames.numpy(), size, "multiscale", 1, True, data.seeded(e))

            torchcodec()
            contestants["torchcodec, our crop"] = torchcodec
        with contextlib.suppress(ImportError):
            import decord

            def with_decord():
                for e, start in enumerate(starts):
                    wanted = list(range(start, start + T * stride, stride))
                    frames = decord.VideoReader(path, num_threads=1).get_batch(wanted)
                    data.make_crop(frames.asnumpy(), size, "multiscale", 1, True, data.seeded(e))

            contestants["decord, our crop"] = with_decord
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker
        seconds = medians(contestants, 1 if quick else 7)
        torch.set_num_threads(threads)
    title = "loader, one worker, 16 x 4 frames of 320 x 240"
    print(f"\n{title:48s} {'clips/s':>9s} {'time against the first':>23s}")
    for name, t in seconds.items():
        print(f"{name:48s} {count / t:9.1f} {t / seconds['PyAV, from the first frame, nothing else']:22.2f}x")


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of all steps (default: bfloat16 on a GPU)")
    parser.add_argument("--only", choices=("start", "loader", "models", "counts", "joint", "cost", "levers"), help="one table")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.precision or ("bfloat16" if device == "cuda" else "float32"))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}")
    tables = {
        "start": lambda: benchmark_start(args.quick),
        "loader": lambda: benchmark_loader(args.quick),
        "models": lambda: benchmark_models(args.quick, device, dtype, args.compile),
        "counts": benchmark_counts,
        "joint": lambda: benchmark_joint(args.quick, device, dtype),
        "cost": lambda: benchmark_cost(args.quick, device, dtype),
        "levers": lambda: benchmark_levers(args.quick, device, dtype),
    }
    for key, table in tables.items():
        if args.only in (None, key):
            table()


if __name__ == "__main__":
    run_script(main)
