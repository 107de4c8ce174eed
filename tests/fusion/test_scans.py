"""Sums up to each point of a dimension: as autograd has them, in programs and kernels, on any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import SCANS, drawn
from test_lowering import check, externs, traced

from fused_losses import fuse
from fused_losses.fusion.lowering import lower
from fused_losses.fusion.operators import LONGEST

SIZES = st.integers(1, 5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(SCANS)), st.tuples(SIZES, SIZES, SIZES).filter(lambda shape: sorted(shape)[1] > 1))
def test_programs(name, shape):
    assert not externs(check(SCANS[name], drawn(*shape)))


def every(x):
    return tuple(loss(x) for loss in SCANS.values())


@pytest.fixture(scope="module")
def fused():
    """All of them in one loss."""
    return fuse(every, strict=True)


def run(loss, x, threads):
    """Every output of a loss and the gradient."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaf = x.clone().requires_grad_()
        outputs = loss(leaf)
        weights = [torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaf, weights)]
    finally:
        torch.set_num_threads(before)


# Short rows and long ones, blocks that are not full, several tasks, rows of several blocks.
@pytest.mark.parametrize("shape", [(3, 5, 7), (5, 33, 40), (40, 3, 700), (2, 3, 2500), (2, 1100, 3)], ids=str)
def test_kernels(fused, shape):
    x = drawn(*shape) / 30
    torch.testing.assert_close(run(fused, x, 2), run(every, x, 1))
    for one, other in zip(run(fused, x, 1), run(fused, x, 2)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_rounded_once(dtype):
    x = drawn(3, 2000, dtype=dtype).abs()
    found = fuse(lambda x: x.cumsum(-1), strict=True)(x)
    assert torch.equal(found, x.double().cumsum(-1).to(dtype))


def test_long_dimensions_stay_with_torch():
    """Few rows are too few tasks, and a vector is one."""
    loss = lambda x: x.cumsum(-1).exp().sum()
    shapes = (2, LONGEST + 1), (100,), (1, 1, 100)
    assert all("cumsum" in externs(lower(traced(loss, [torch.zeros(shape)], (0,)))) for shape in shapes)
