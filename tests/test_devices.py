"""Every model and script on a GPU that is not there.

Tensors on the device "cuda" are fake: they have a shape, a type and a device, but no values. Those
on the CPU, such as masks, are real. An operation on both raises, as on a GPU, and so does one for
which the CPU would have to wait for the GPU. Not checked: train() with its backward passes; values.
"""

import types

import pytest
import torch
from torch._subclasses import fake_tensor
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

# a name of its own since torch 2.12
Mismatch = getattr(fake_tensor, "FakeTensorDeviceMismatchError", RuntimeError)


class FakeGPU(TorchFunctionMode):
    """`with FakeGPU():` there is a device "cuda".

    waits  whether the CPU may ask it for values, as for the log: all of them are zero then
    """

    def __init__(self):
        super().__init__()
        self.fake, self.waits = FakeTensorMode(allow_non_fake_inputs=True), False

    def __torch_function__(self, function, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(concerns_gpu(x) for x in tree_leaves((args, kwargs))):
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
            return tree_map(lambda x: self.send(x) if torch.is_tensor(x) else x, result)
        # what is copied to the CPU is a real tensor again
        return tree_map(lambda x: x if is_fake(x) and x.is_cuda else zeros(x), result)

    def send(self, x):
        with self.fake:
            return x.to("cuda")


def is_fake(x):
    return isinstance(x, FakeTensor)


def concerns_gpu(x):
    """A tensor there, or the device itself."""
    return is_fake(x) or isinstance(x, (str, torch.device)) and str(x).startswith("cuda")


def zeros(x):
    """A real tensor in place of a fake one."""
    return torch.zeros(x.shape, dtype=x.dtype) if is_fake(x) else x


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    with_mode = torch.inference_mode  # in which fake tensors are refused

    def inference_mode(mode=None):
        return torch.no_grad() if mode is None else with_mode(mode)

    monkeypatch.setattr("torch.inference_mode", inference_mode)
    with FakeGPU() as gpu:
        yield gpu


# ---- the models ----------------------------------------------------------------------------------

SIZES = (36, 2, 3), (20, 1, 4)
MODELS = {  # model, a batch from the loader, grid of the mask
    "mae": lambda: (mae_image.MAE(16, 4, *SIZES), (2, 16, 16, 3), (1, 4, 4)),
    "videomae": lambda: (mae_video.VideoMAE(4, 16, 2, 4, *SIZES), (2, 4, 16, 16, 3), (2, 4, 4)),
    "mae_st": lambda: (mae_video.MAEST(4, 16, 2, 4, *SIZES), (2, 4, 16, 16, 3), (2, 4, 4)),
    "omni, images": lambda: (omni.OmniMAE(4, 16, 2, 4, *SIZES), (2, 16, 16, 3), (1, 4, 4)),
    "omni, clips": lambda: (omni.OmniMAE(4, 16, 2, 4, *SIZES), (2, 4, 16, 16, 3), (2, 4, 4)),
    "multimae": lambda: (multimae.MultiMAE(16, 4, *SIZES), (2, 16, 16, 6), (3, 4, 4)),
}


def on_gpu(kind):
    """-> model and uint8 batch there, mask here."""
    model, shape, grid = MODELS[kind]()
    mask = masking.random_mask(2, grid, 0.75, torch.Generator())
    return model.to("cuda"), torch.zeros(shape, dtype=torch.uint8).to("cuda"), mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_a_loss_is_computed_on_the_gpu_with_masks_on_the_cpu(gpu, kind, dtype):
    model, batch, mask = on_gpu(kind)
    assert {x.device.type for x in (*model.parameters(), *model.buffers(), batch)} == {"cuda"}
    assert mask.device.type == "cpu" and not isinstance(mask, FakeTensor)
    with torch.autocast("cuda", dtype):
        loss, pred = model(model.normalize(batch), mask)
    assert {x.device.type for x in tree_leaves((loss, pred))} == {"cuda"}
    assert loss.shape == () and loss.dtype == torch.float32
    assert {x.dtype for x in tree_leaves(pred)} == {dtype}


@pytest.mark.parametrize("kind, frozen", [*((kind, False) for kind in MODELS), ("mae", True)])
def test_a_classifier_is_computed_on_the_gpu(gpu, kind, frozen):
    model, shape, _ = MODELS[kind]()
    extras = dict(drop_path=0.2, dropout=0.5, layer_scale=True, frozen=frozen)
    net = finetune.Classifier(model, 5, **extras).to("cuda")
    batch = torch.zeros(shape, dtype=torch.uint8).to("cuda")
    x, labels = model.normalize(batch), torch.tensor([1, 4]).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = net.loss(net(x).float(), x, labels, 0.1)
    assert loss.device.type == "cuda" and net.answers(x).shape == (2, 5)


# ---- what a fault looks like ---------------------------------------------------------------------


def table_on_the_cpu(model):
    model.pos_embed = torch.zeros(model.pos_embed.shape)


def decoder_on_the_cpu(model):
    model.decoder_pred = torch.nn.Linear(20, model.decoder_pred.out_features)


def deviation_made_on_the_cpu(model):
    model.normalize = lambda batch: batch.float().movedim(-1, 1) / torch.ones(3, *batch.shape[1:3])


def painted_by_a_table_on_the_cpu(model):
    model.normalize = lambda batch: torch.rand(256, 3)[batch[..., 0].long()].movedim(-1, 1)


@pytest.mark.parametrize("fault", [table_on_the_cpu, decoder_on_the_cpu, deviation_made_on_the_cpu,
                                   painted_by_a_table_on_the_cpu])
def test_a_tensor_that_was_left_on_the_cpu_is_noticed(gpu, fault):
    model, batch, mask = on_gpu("mae")
    model(model.normalize(batch), mask)
    fault(model)
    with pytest.raises((Mismatch, IndexError), match="two (different )?devices|on the CPU"):
        model(model.normalize(batch), mask)


def test_token_numbers_that_were_left_on_the_cpu_are_noticed(gpu, monkeypatch):
    def order_on_the_cpu(mask, device):
        return mask.byte().argsort(dim=1, stable=True), int((~mask[0]).sum())

    model, batch, mask = on_gpu("videomae")
    monkeypatch.setattr(masking, "token_order", order_on_the_cpu)
    with pytest.raises(Mismatch, match="two (different )?devices"):
        model(model.normalize(batch), mask)


def test_counting_on_the_gpu_is_noticed(gpu):
    """A mask on the GPU: the CPU would wait for the number of visible tokens."""
    model, batch, mask = on_gpu("mae")
    with pytest.raises(DataDependentOutputException):
        model(model.normalize(batch), mask.to("cuda"))


# ---- the scripts ---------------------------------------------------------------------------------

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
    "depth": (finetune, *TUNE, "--model", "multimae", "--dense", "depth"),
    "classes": (finetune, *TUNE, "--model", "multimae", "--dense", "semseg"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_on_the_gpu(name, gpu, toy, run, tmp_path, monkeypatch):
    """All of main(), with one update in place of the training; then pictures and tests."""
    script, *flags = SCRIPTS[name]
    losses = []

    def one_update(model, dataset, loss_of, optimizer, look, cfg, plan=None):
        assert {p.device.type for p in model.parameters()} == {"cuda"}
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
    assert losses and {x.device.type for x in losses} == {"cuda"}
