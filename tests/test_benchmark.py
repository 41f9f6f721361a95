import benchmark
import numpy as np
import pytest
import torch

import data

TABLES = {  # a row of each table, and the number of rows
    "models": ("| ours, nothing dropped | ", 6),
    "levers": ("| attention written out | ", 6),
    # MAE-ST Table 1: 7.7x; by 12 D^2 n + 2 n^2 D products a block 81.6 (ours embeds less), 628.6
    "counts": ("| MAE-ST ViT-L, 90 % | 79.3 | 627.8 | 7.9x |", 3),
    "loader": ("| AVI with B-frames, 4 clips anywhere | ", 12),
    "plan": ("| omni paper | ImageNet + SSv2 | ", 2)}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_printed_as_markdown(run, name):
    row, count = TABLES[name]
    for table in run(benchmark, "--quick", "--only", name).split("\n**")[1:]:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert set(lines[1]) == set("| -") and len({line.count("|") for line in lines}) == 1
        assert any(line.startswith(row) for line in lines)
        count -= len(lines) - 2
    assert count <= 0  # more rows where others' models are installed


@pytest.mark.parametrize("kind, clip, size, decoder, batch, ratio", [
    ("mae", (1, 64, 1, 8), (96, 3, 3), (64, 2, 2), 32, 0.75),
    ("videomae", (8, 64, 2, 8), (96, 3, 3), (64, 1, 2), 16, 0.9),
    ("multimae", (1, 64, 1, 8), (96, 2, 3), (64, 1, 2), 16, 5 / 6)])
def test_planned_memory_is_what_an_update_takes(kind, clip, size, decoder, batch, ratio):
    sizes = kind, clip, size, decoder
    fake = benchmark.fake_update(*benchmark.example(*sizes, batch, ratio, "meta"))
    n, each, *_ = benchmark.estimate(*sizes, ratio)
    model, x, mask = benchmark.example(*sizes, batch, ratio)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    def forward_and_backward():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, mask)[0]
        loss.backward()
    forward_and_backward()
    optimizer.step()
    tensors = [*(x.values() if isinstance(x, dict) else [x]), *model.buffers()]
    there = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in tensors}
    measured = benchmark.peak_bytes(forward_and_backward) + sum(there.values())
    assert abs(fake / measured - 1) < 0.05  # the estimate of a plan may be off by much more
    assert abs((2 * n + batch * each) / fake - 1) < 0.03  # what 64 samples tell of one


@pytest.mark.parametrize("kind", benchmark.CODECS)
def test_all_readers_of_the_loader_table_find_the_same_frames(tmp_path, kind):
    """Except in an AVI with B-frames: there torchcodec 0.17 and decord 0.6 return other frames."""
    path, wanted = benchmark.write_clip(tmp_path, kind), 130 + 4 * np.arange(16)[None]
    clip = data.read_clips(path, lambda n: wanted)[0][0]
    assert (benchmark.bare_loop(path, wanted).to_ndarray(format="rgb24") == clip[-1]).all()
    _, *readers = benchmark.usable_readers(path).values()
    ours, *others = (read(path, wanted)[0].float() for read in readers)
    assert "B-frames" in kind or all((x - ours).abs().max() <= 2 for x in others)  # rounding
