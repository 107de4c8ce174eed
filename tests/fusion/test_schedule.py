"""How kernels are cut, and that every form of one gives the same: few and many channels, short and long rows."""

import functools

import pytest
import torch

from fused_losses import fuse
from fused_losses.fusion import cpp
from fused_losses.fusion.ir import plain_axis
from fused_losses.fusion.lowering import lower
from fused_losses.fusion.schedule import schedule, unified
from fused_losses.fusion.sizes import Assumptions
from fused_losses.fusion.tracing import trace


def programs(loss, *tensors):
    return lower(trace(lambda given, tracer: loss(*given), tensors, Assumptions(), [True] * len(tensors)))


def variation(x):
    return (x.diff(dim=-2).abs().sum((1, 2)) + x.diff(dim=-1).abs().sum((1, 2))).mean()


def standardised(x, scale):
    """With a mean and a variance for each channel of x[..., C]: what is reduced along slow axes is read again."""
    centred = x - x.mean((0, 1))
    variance = centred.square().mean((0, 1))
    return (centred * scale.exp() / (variance + 1e-3).sqrt()).sigmoid().sum() + variance.log1p().sum()


def softmax(x):
    return x.log_softmax(-1)[..., 0].mean()


def certainty(x):
    """With the logarithms of a softmax over all that a row has."""
    return x.flatten(1).log_softmax(-1)[:, 0].mean()


def instances(x):
    """A mean and a variance for each row of x[N, ...], and the gradients that go through them."""
    centred = x - x.mean((1, 2), keepdim=True)
    return (centred / (centred.square().mean((1, 2), keepdim=True) + 1e-3).sqrt()).sigmoid().square().mean()


def overlap(x):
    p = x.sigmoid()
    return (1 - p.square().sum((1, 2)) / (p.sum((1, 2)) + 1)).mean()


def ends(x, weight):
    return (x[:, :, -1] * x[:, :, 0] * weight[:, 0]).sum() + x[:, :, 0].square().sum(1).exp().sum()


fused_once = functools.cache(functools.partial(fuse, strict=True))


def check(loss, *tensors):
    """The value and the gradients, against double; the same on any number of threads."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    truth = [t.double().requires_grad_() for t in tensors]
    fused, threads = fused_once(loss), torch.get_num_threads()
    value = fused(*leaves)
    found = [value, *torch.autograd.grad(value, leaves)]
    expected = [(exact := loss(*truth)), *torch.autograd.grad(exact, truth)]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=3e-5)
    try:
        torch.set_num_threads(1)
        value = fused(*leaves)
        alone = [value, *torch.autograd.grad(value, leaves)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, alone))


@pytest.mark.parametrize("channels", [1, 3, 5, 31, 32, 511, 512, 530])
def test_statistics_of_channels(channels):
    check(standardised, torch.randn(37, 11, channels), torch.rand(channels))


def test_few_channels_are_split():
    """Kernels that read what they reduce along slow axes have others in their place, which do not."""
    few = programs(standardised, torch.randn(5, 4, 3), torch.randn(3))
    kernels = [kernel for program in (few.forward, few.backward) for kernel in schedule(program)]
    assert any(kernel.split for kernel in kernels)
    for kernel in kernels:
        if kernel.split:
            assert [s.buffer for part in kernel.split for s in part.stages] == [s.buffer for s in kernel.stages]
            for part in kernel.split:
                made = {stage.buffer.name for stage in part.stages}
                assert not any(load["buffer"] in made for stage in part.stages for load in stage.loads)


@pytest.mark.parametrize("rows", [1, 3, 63, 64])
@pytest.mark.parametrize("loss", [certainty, instances, overlap])
def test_few_long_rows_are_shared_out(loss, rows, monkeypatch):
    """Each row is many tasks then, whose results are joined; many rows, or short ones, are a task or less each."""
    monkeypatch.setattr(cpp, "LONG_ROW", 150)
    x = torch.randn(rows, 3, 70)
    source = cpp.Source(programs(loss, x).forward)
    split = [form.is_split for form in source.forms({"input0": x.shape})]
    assert any(split) == (1 < rows < cpp.FEW_ROWS)
    assert not any(form.is_split for form in source.forms({"input0": (rows, 3, 40)}))
    check(loss, x)


def test_a_value_for_each_channel_leaves_the_others_their_rows():
    """A gradient of few numbers does not make a kernel run over these alone."""
    backward = programs(lambda x, w: (x.square().mean((0, 1)) * w).sum(), torch.randn(5, 4, 3), torch.randn(3)).backward
    assert [len(kernel.outer) for kernel in schedule(backward)] == [2, 1]


@pytest.mark.parametrize("height", [7, 8])
def test_lanes_run_along_memory(height):
    """Where an image is a square, too: axes of the same length are not the same axis."""
    both = programs(variation, torch.randn(2, height, 8))
    for program in (both.forward, both.backward):
        dimensions = {}
        for stage in unified(program):
            for load in stage.loads:
                if load["buffer"] == "input0":
                    for dimension, axis in enumerate(map(plain_axis, load["index"])):
                        dimensions.setdefault(axis, set()).add(dimension)
        assert all(len(found) == 1 for axis, found in dimensions.items() if axis is not None)


def test_neighbours_are_looked_for_along_rows():
    (kernel,) = schedule(programs(variation, torch.randn(2, 7, 8)).backward)
    assert len(kernel.outer) == 2 and [len(loop.along) for loop in kernel.loops] == [1]


@pytest.mark.parametrize("width", [1, 2, 9, 33, 255, 256, 257, 1024, 1025, 1100, 2049])
def test_rows_of_any_length(width):
    check(variation, torch.randn(2, 5, width + 1))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("size", [1, 40, 1300])
def test_strides(step, size):
    check(ends, 0.1 * torch.randn(3, size, step), torch.randn(size, step))
