"""Helpers of the tests: a small toy world, and two ways to run a script.

Real data is optional: set MAE_TEST_DATA to a folder with gestures10/, real_clips/ucf101/ and
real_clips/hmdb51/ (all three in the official layouts), camvid128.tar.gz and, if there, lips20/,
sprites5/ and weizmann4/; tests that need it are skipped otherwise.
"""

import functools
import inspect
import os
import subprocess
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
    for kind in ("DeprecationWarning", "FutureWarning"):  # what a library plans to remove, we do not use
        config.addinivalue_line("filterwarnings", f"error::{kind}")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As a run has on two cores: results are compared bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy world: 96 clips of 24 frames (6 classes x 4 groups x 4) and 64 + 16 images, 48 px."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    data.make_toy(folder, groups=4, images=(64, 16), labelled=3)
    return folder


@pytest.fixture(scope="session")
def real():
    """Folder of real clips, or skip."""
    folder = os.environ.get("MAE_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MAE_TEST_DATA names no folder of real clips")
    return Path(folder)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(mae_image, "--flag", "value", code=0) -> what it prints. In this process, in tmp_path."""

    def call(module, *flags, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *[str(x) for x in flags]])
        status = 0
        try:
            run_script(module.main)
        except SystemExit as stop:
            status = stop.code or 0
        shown = capsys.readouterr()
        assert status == code, f"exit code {status}\n{shown.out}\n{shown.err}"
        return shown.out + shown.err

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


@pytest.fixture
def script(tmp_path):
    """script("mae_image.py", "--flag", "value", code=0) -> what it prints. In a process of its own."""

    def call(*command, code=0, cwd=tmp_path, env=None, timeout=300):
        name, *flags = [str(x) for x in command]
        command = [sys.executable, ROOT / name, *flags]
        env = {**os.environ, **(env or {})}
        options = dict(cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
        result = subprocess.run(command, **options)
        shown = f"{result.stdout}\n{result.stderr}"
        assert result.returncode == code, f"exit code {result.returncode}\n{shown}"
        return result.stdout + result.stderr

    return call


# The smallest runs that still go through every line.
TINY_IMAGE = ["--img-size", 16, "--patch", 8, "--size", "24x1x2", "--decoder", "16x1x2", "--batch", 16,
              "--epochs", 2, "--warmup", 1, "--workers", 0, "--log-every", 1, "--pictures", 1]
TINY_VIDEO = ["--frames", 4, "--tubelet", 2, *TINY_IMAGE]


@torch.no_grad()
def copy_encoder(model, encoder):
    """Blocks and final norm of a model of ours -> the encoder of torchvision's VisionTransformer."""
    encoder.ln.load_state_dict(model.norm.state_dict())
    for ours, theirs in zip(model.blocks, encoder.layers):
        theirs.ln_1.load_state_dict(ours.norm1.state_dict())
        theirs.ln_2.load_state_dict(ours.norm2.state_dict())
        theirs.self_attention.in_proj_weight.copy_(ours.attn.qkv.weight)
        theirs.self_attention.in_proj_bias.copy_(ours.attn.qkv.bias)
        theirs.self_attention.out_proj.load_state_dict(ours.attn.proj.state_dict())
        theirs.mlp[0].load_state_dict(ours.mlp.fc1.state_dict())
        theirs.mlp[3].load_state_dict(ours.mlp.fc2.state_dict())
