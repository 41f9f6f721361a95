import re

import benchmark
import pytest
import torch


@pytest.mark.parametrize("row, dropped, dense", [(0, 20.8, 67.0), (1, 81.6, 628.6)])
def test_dropping_hidden_patches_saves_what_the_papers_say(row, dropped, dense):
    """MAE Table 1(c) and 2, MAE-ST Table 1: 3.3x and 7.7x, by 12 D^2 n + 2 n^2 D multiply-adds a block."""
    few, all_of_them = benchmark.multiply_adds(*benchmark.published_sizes()[row][1:])
    assert abs(all_of_them / dense - 1) < 0.002
    assert 0.97 * dropped < few < dropped  # ours also embeds visible and predicts hidden patches only


def test_memory_is_counted_beside_the_weights_and_with_their_copies_in_bfloat16():
    model, x = torch.nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    assert benchmark.kept_for_backward(lambda: model(x), model.parameters()) == 4 * 8 * 4  # x; the weight is no extra

    def half():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert benchmark.kept_for_backward(half, model.parameters()) == 4 * 8 * 2 + 16 * 8 * 2


def test_the_benchmark_runs(run):
    text = run("tests/benchmark.py", "--quick")
    for row in (
        "PyAV, from the first frame, nothing else",
        "ours",
        "ours, 4 clips a video (per clip)",
        "MAE, ours",
        "MAE, ours, nothing dropped",
        "VideoMAE, ours",
        "VideoMAE, ours, nothing dropped",
        "MAE-ST, ours",
        "MAE ViT-L, 75 %",
        "90% / 95%, packed",
        "nothing dropped",
        "import mae_video",
        "find 2020 files of UCF101 and read its lists, train and test",
        "attention written out",
        "50%, 4 x 32 px, batch 1: 32 tokens",
    ):
        assert re.search(rf"^{re.escape(row)} {{2,}}[\d.]", text, re.M), row
