"""Sums whose terms go to computed places: as autograd has them, in programs and kernels, on any number of threads."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scatters import LOOKUPS, SCATTERS, SUMS, drawn
from test_lowering import check, externs, traced

from fused_losses import fuse
from fused_losses.fusion import scatters
from fused_losses.fusion.lowering import lower

SIZES = st.integers(1, 5)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(list(SCATTERS)), SIZES, SIZES, SIZES)
def test_programs(name, places, width, count):
    programs = check(SCATTERS[name], *drawn(places, width, count), wanted=(0, 1))
    assert externs(programs) <= {"reshape"}


def run(loss, tensors, threads):
    """Every output of a loss and the gradients of its table and numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        table, x, index = tensors
        leaves = [table.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = loss(*leaves, index)
        weights = [torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]
    finally:
        torch.set_num_threads(before)


def lookups(*tensors):
    return tuple(loss(*tensors) for loss in LOOKUPS.values())


def sums(*tensors):
    return tuple(loss(*tensors) for loss in SUMS.values())


@pytest.fixture(scope="module", params=[lookups, sums])
def pair(request):
    """Many such sums in one loss, plain and fused."""
    return request.param, fuse(request.param, strict=True)


# Short rows and long ones, blocks that are not full, several tasks.
@pytest.mark.parametrize("places, width, count", [(5, 3, 7), (6, 50, 300), (11, 3, 40_000), (2, 1100, 5)])
def test_kernels(pair, places, width, count):
    plain, fused = pair
    tensors = drawn(places, width, count)
    torch.testing.assert_close(run(fused, tensors, 2), run(plain, tensors, 1))
    for one, other in zip(run(fused, tensors, 1), run(fused, tensors, 2)):
        assert torch.equal(one, other)


def test_low_precision_is_rounded_once():
    """Added in bf16 one by one, the terms of a place would stop to count."""
    table, x, index = drawn(3, 1, 20_000, torch.bfloat16)
    table.requires_grad_()
    fused = fuse(lambda table, x, index: (table[index[:, 0]] * x).sum(), strict=True)
    (gradient,) = torch.autograd.grad(fused(table, x.abs(), index), table)
    expected = torch.zeros(3, 1, dtype=torch.float64).index_add(0, index[:, 0], x.abs().double())
    torch.testing.assert_close(gradient, expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [3, -1])
def test_a_place_out_of_range(bad):
    fused = fuse(lambda x, index: x.new_zeros(3).index_add(0, index, x), strict=True)
    assert fused(torch.ones(4), torch.tensor([0, 2, 2, 2])).tolist() == [1, 0, 3]
    with pytest.raises(IndexError, match="out of range"):
        fused(torch.ones(4), torch.tensor([0, 2, bad, 2]))


def looked_up(places, count):
    tensors = torch.zeros(places, 2), torch.zeros(count, dtype=torch.int64)
    return externs(lower(traced(lambda table, index: table[index].exp().sum(), tensors, (0,))))


def test_many_results_for_few_terms_stay_with_torch():
    assert looked_up(5000, 100) == {"index_put"}
    assert not looked_up(5000, 32 * 5000)
    assert not looked_up(2000, 3)


def test_on_a_gpu_each_place_looks_at_every_term():
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert scatters._is_worthwhile(gpu, places=5, results=5 * 10**6, terms=10**6)
    assert not scatters._is_worthwhile(gpu, places=5000, results=5000, terms=10**6)
