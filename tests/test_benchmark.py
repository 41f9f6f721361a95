def test_the_benchmark_runs(run):
    text = run("tests/benchmark.py", "--quick")
    for row in (
        "PyAV, decoding alone",
        "ours, 4 clips a video",
        "MAE, ours",
        "VideoMAE, ours, nothing dropped",
        "MAE-ST, ours",
        "90% / 95%, packed",
        "nothing dropped",
        "import mae_video",
        "files of UCF101",
        "attention written out",
        "50%, 4 x 32 px, batch 1",
    ):
        assert row in text
