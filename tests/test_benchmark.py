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
    ):
        assert row in text
