"""Helpers of the tests: a small toy world, and how to run a script.

Tests with real data are skipped unless MAE_TEST_DATA names a folder with gestures10/, lips20/,
weizmann4/ and real_clips/{ucf101,hmdb51}/, in the official layouts.
"""

import functools
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data  # noqa: E402
from masking import run_script  # noqa: E402

inspect.getsource = functools.cache(inspect.getsource)  # 0.1 s for the settings of every main()


def pytest_configure(config):
    for kind in ("DeprecationWarning", "FutureWarning"):  # what libraries plan to remove
        config.addinivalue_line("filterwarnings", f"error::{kind}")


@pytest.fixture(scope="session", autouse=True)
def one_thread():  # as a run has on two cores: results are compared bit for bit
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy world: 96 clips of 24 frames (6 classes, 4 groups), 64 + 16 images, 48 px."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    data.make_toy(folder, groups=4, images=(64, 16), labelled=3)
    return folder


@pytest.fixture(scope="session")
def real():
    folder = Path(os.environ.get("MAE_TEST_DATA") or "/nowhere")
    if not folder.is_dir():
        pytest.skip("MAE_TEST_DATA names no folder of real clips")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(mae_image, "--flag", "value", code=0) -> what it prints. In this process, in tmp_path."""
    def call(module, *flags, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            status = run_script(module.main) or 0
        except SystemExit as stop:
            status = stop.code or 0
        text = "".join(capsys.readouterr())
        assert status == code, f"exit code {status}\n{text}"
        return text
    return call


@pytest.fixture
def refused(run):
    """refused(mae_image, "--flag", "value") -> the one line of error, exit code 2."""
    def call(module, *flags):
        lines = run(module, *flags, code=2).strip().splitlines()
        mark = f"{module.__name__}.py: error: "
        assert lines[-1].startswith(mark) and sum(mark in line for line in lines) == 1, lines
        return lines[-1]
    return call


# The smallest runs that still go through every line.
TINY_IMAGE = ["--img-size", 16, "--patch", 8, "--size", "24x1x2", "--decoder", "16x1x2",
              "--batch", 16, "--epochs", 2, "--warmup", 1, "--workers", 0, "--log-every", 1,
              "--pictures", 1]
TINY_VIDEO = ["--frames", 4, "--tubelet", 2, *TINY_IMAGE]
