"""Every model and script on a GPU that is not there.

Tensors on "cuda" are fake: shape, type and device, but no values. Those on the CPU, such as masks,
are real. An operation on both raises, as on a GPU, and one for which the CPU would wait for the
GPU. Not checked: train() with its backward passes; values.
"""

import types

import pytest
import torch
from torch._subclasses.fake_tensor import (DataDependentOutputException,
                                           DynamicOutputShapeException, FakeTensor, FakeTensorMode)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import data
import finetune
import mae_image
import mae_video
import masking
import multimae
import omni
from conftest import TINY_IMAGE, TINY_VIDEO


class FakeGPU(TorchFunctionMode):
    """`with FakeGPU():` there is a device "cuda"; values the CPU `waits` for are zero."""
    fake, waits = FakeTensorMode(allow_non_fake_inputs=True), False

    def __torch_function__(self, function, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(is_fake(x) or isinstance(x, (str, torch.device)) and str(x).startswith("cuda")
                   for x in tree_leaves((args, kwargs))):  # a tensor there, or the device itself
            return function(*args, **kwargs)
        if function is torch.Tensor.__getitem__ and not is_fake(args[0]):
            raise IndexError("a tensor on the CPU is indexed by one on the GPU")
        try:
            with self.fake:
                result = function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, TypeError):
            if not self.waits:
                raise
            result = function(*tree_map(zeros, args), **tree_map(zeros, kwargs))
            with self.fake:
                return tree_map(lambda x: x.to("cuda") if torch.is_tensor(x) else x, result)
        # what is copied to the CPU is a real tensor again
        return tree_map(lambda x: x if is_fake(x) and x.is_cuda else zeros(x), result)


def is_fake(x):
    return isinstance(x, FakeTensor)


def zeros(x):
    return torch.zeros(x.shape, dtype=x.dtype) if is_fake(x) else x


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    real = torch.inference_mode  # refuses fake tensors; torch's own calls give a mode
    monkeypatch.setattr("torch.inference_mode",
                        lambda mode=None: torch.no_grad() if mode is None else real(mode))
    with FakeGPU() as gpu:
        yield gpu


def test_what_was_left_on_the_cpu_and_waiting_for_the_gpu_are_noticed(gpu):
    model = mae_image.MAE(16, 4, (36, 2, 3), (20, 1, 4)).to("cuda")
    batch = torch.zeros(2, 16, 16, 3, dtype=torch.uint8).to("cuda")
    x, mask = model.normalize(batch), masking.random_mask(2, model.grid, 0.75, torch.Generator())
    model(x, mask)
    with pytest.raises(DataDependentOutputException):  # for the number of visible tokens
        model(x, mask.to("cuda"))
    with pytest.raises(IndexError, match="on the CPU"):
        torch.rand(256, 3)[batch.long()]
    model.pos_embed = torch.zeros(model.pos_embed.shape)
    with pytest.raises(RuntimeError, match="two (different )?devices"):
        model(x, mask)


RECIPE = ["--mixup", 0.8, "--cutmix", 1, "--erase", 1, "--drop-path", 0.1, "--smoothing", 0.1]
TUNE = [x for x in TINY_VIDEO if x not in ("--decoder", "16x1x2")]
TUNE += ["--mode", "scratch", "--clips", 2, "--crops", 2]
SCRIPTS = {
    "mae": (mae_image, *TINY_IMAGE, "--norm-pix"),
    "videomae": (mae_video, *TINY_VIDEO, "--norm-pix"),
    "mae_st": (mae_video, *TINY_VIDEO, "--model", "mae_st"),
    "omni": (omni, *TINY_VIDEO, "--norm-pix"),
    "omni, mixed": (omni, *TINY_VIDEO, "--joint", "mixed"),
    "multimae": (multimae, *TINY_IMAGE),
    "tuned videomae": (finetune, *TUNE, *RECIPE),
    "tuned mae": (finetune, *TUNE, *RECIPE, "--model", "mae", "--pool", "first"),
    "tuned mae_st": (finetune, *TUNE, "--model", "mae_st", "--dropout", 0.5),
    "tuned omni": (finetune, *TUNE, "--model", "omni"),
    "classes": (finetune, *TUNE, "--model", "multimae", "--dense", "semseg"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_on_the_gpu(name, gpu, toy, run, tmp_path, monkeypatch):
    (script, *flags), losses = SCRIPTS[name], []
    def one_update(model, dataset, loss_of, optimizer, look, cfg, plan=None):
        assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"cuda"}
        plan = plan or (lambda epoch: data.shuffled(0, epoch, len(dataset), cfg.batch))
        gpu.waits = False
        for piece, keys in enumerate(data.batches(plan, 0, 1, 0, 1, cfg.accum)):
            batch, items, _ = data.collate([dataset[key] for key in keys])
            with torch.autocast("cuda", torch.bfloat16):
                losses.append(loss_of(model, batch.to("cuda"), items, 0, piece))
        gpu.waits = True
        with torch.no_grad():
            look(tmp_path / "picture.png")
        return types.SimpleNamespace(stopping=False, finish=lambda result="": None)
    monkeypatch.setattr(mae_image, "start_processes", lambda cfg: torch.device("cuda"))
    monkeypatch.setattr(finetune if script is finetune else mae_image, "train", one_update)
    gpu.waits = True
    (tmp_path / "toy").symlink_to(toy)
    run(script, *flags)
    assert {(x.device.type, x.dtype, x.shape) for x in losses} == {("cuda", torch.float32, ())}
