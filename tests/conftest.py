"""Helpers of the tests: a small toy world, and a way to run the scripts as a user does.

Real data is optional: set MAE_TEST_DATA to a folder with gestures10/, real_clips/ucf101/ and real_clips/hmdb51/ (all
three in the official layouts), camvid128.tar.gz and, if there, lips20/, sprites5/ and weizmann4/; tests that need it are
skipped otherwise.
"""

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


def pytest_configure(config):
    for kind in ("DeprecationWarning", "FutureWarning"):  # what a library plans to remove, we do not use
        config.addinivalue_line("filterwarnings", f"error::{kind}")


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy world: 48 clips of 24 frames and 64 + 16 images, 32 px."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    data.make_toy(folder, size=32, groups=4, clips=2, images=(64, 16))
    return folder


@pytest.fixture(scope="session")
def real():
    """Folder of real clips, or skip."""
    folder = os.environ.get("MAE_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MAE_TEST_DATA names no folder of real clips")
    return Path(folder)


@pytest.fixture
def run(tmp_path):
    """run("mae_image.py", "--flag", "value", code=0) -> its output; the working directory is tmp_path."""

    def call(*command, code=0, cwd=tmp_path, env=None, timeout=300):
        script, *flags = [str(x) for x in command]
        result = subprocess.run([sys.executable, "-W", "always::DeprecationWarning", ROOT / script, *flags], cwd=cwd,
                                capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})})  # fmt: skip
        assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        assert "DeprecationWarning" not in result.stderr and "FutureWarning" not in result.stderr, result.stderr
        return result.stdout + result.stderr

    return call


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(module, "--flag", "value") -> the one line of error, exit code 2. In this process: importing torch is slow."""

    def call(module, *flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *[str(x) for x in flags]])
        with pytest.raises(SystemExit) as stop:
            run_script(module.main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith(f"{module.__name__}.py: error: ")
        return lines[0]

    return call


# The smallest runs that still go through every line.
TINY_IMAGE = ["--img-size", 16, "--patch", 8, "--decoder-width", 16, "--decoder-depth", 1, "--decoder-heads", 2,
              "--batch", 16, "--epochs", 2, "--warmup", 1, "--workers", 0, "--log-every", 1, "--pictures", 1]  # fmt: skip
TINY_VIDEO = ["--frames", 4, *TINY_IMAGE]


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
