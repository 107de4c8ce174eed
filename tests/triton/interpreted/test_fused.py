"""Generated kernels: every loss of the corpus against fp64 truth, and what few losses ask for against plain torch."""

import mmap

import elementwise
import masks
import numpy as np
import pytest
import scans
import scatters
import torch
import torch.nn.functional as F
from custom_losses import CORPUS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_losses import LAST, SHAPES, STEPS, drawn, pair
from triton.runtime.errors import InterpreterError

from fused_losses import fuse
from fused_losses.fusion.triton import blocks, nests, reductions
from fused_losses.fusion.triton import runtime as triton_runtime
from fused_losses.testing import check_loss

pytestmark = pytest.mark.usefixtures("only_triton")


def check(entry):
    plain = entry.build()
    sample = min(entry.samples(), key=lambda sample: sample.tensors[0].numel())
    check_loss(fuse(plain, strict=True), plain, [sample], dtypes=[torch.float32], checks=["gradient", "value"])


@pytest.mark.parametrize("entry", CORPUS, ids=lambda entry: entry.name)
def test_equals_the_plain_loss(entry):
    check(entry)


def same(plain, *tensors):
    """Values and, of what is differentiable, gradients."""
    fused = fuse(plain, strict=True)
    results = []
    for loss in (fused, plain):
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        outputs = loss(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        learnt = [output for output in outputs if output.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        weights = [torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in learnt]
        options = {"allow_unused": True, "materialize_grads": True}
        results.append([*outputs, *(torch.autograd.grad(learnt, wanted, weights, **options) if learnt else ())])
    torch.testing.assert_close(*results, equal_nan=True)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", [elementwise.of_one, elementwise.of_two])
def test_operations(function, dtype):
    found, expected = (f(*elementwise.floats(dtype)) for f in (fuse(function, strict=True), function))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_operations_on_whole_numbers(dtype):
    same(elementwise.of_whole_numbers, *elementwise.whole(dtype))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.sampled_from(list(LAST)), SHAPES)
def test_random_losses(steps, last, shape):
    same(drawn(steps, last), *(tensor.float() for tensor in pair(shape)))


def reductions_of(x):
    return x.amax(), x.amin((0, 2)), x.max(1).values, x.prod(-1), (x > 0).any(0), (x > -2).all(), (x > 0).sum((0, 1))


def places(x):
    return x.argmax(), x.argmin(0), x.argmax(-1), x.min(1).indices


def test_reductions():
    same(reductions_of, draw(3, 5, 7))


@pytest.mark.parametrize("loss", masks.LOSSES.values(), ids=masks.LOSSES)
def test_what_masks_choose(loss):
    same(loss, *masks.drawn(7, 5))


@pytest.mark.parametrize("loss", scans.SCANS.values(), ids=scans.SCANS)
def test_sums_up_to_each_point(loss, monkeypatch):
    monkeypatch.setattr(blocks, "LONG", 4)
    same(loss, scans.drawn(3, 5, 7))


@pytest.mark.parametrize("loss", scatters.SCATTERS.values(), ids=scatters.SCATTERS)
def test_sums_at_computed_places(loss):
    same(loss, *scatters.drawn(5, 3, 7))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_ties_and_values_that_are_not_finite(value):
    x = torch.zeros(3, 4, 5)
    x[1, 2:, 1:3] = value
    same(lambda x: (*places(x), x.amax(), x.amin(1), x.amax(0)), x.long() if value == 0.0 else x)


@pytest.mark.parametrize("shape", [(700,), (40, 33), (3, 20, 15)], ids=str)
def test_several_blocks_and_parts(shape, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "PROGRAMS", 3)
    same(lambda x: (x.exp().mean(), x.square().sum(0), (x * 2).log_softmax(-1).sum(), x.amax(-1)), draw(*shape))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 2),
    "sliced": lambda x: x[::2, 1:, ::3],
    "expanded": lambda x: x[:, :1].expand(-1, 6, -1),
    "rows_apart": lambda x: x[:, :, :5],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout):
    x, y = layout(draw(4, 6, 9)), layout(draw(4, 6, 9, seed=1))
    same(lambda x, y: ((x - y).square().mean(), (x.softmax(1) * y).sum((0, 2)), x * y), x, y)


def of_parts(x):
    """Tensors that lie beside each other, as networks predict them."""
    place, scale, weight = x.unbind(-1)
    return (place.exp() * scale.sin() + weight.tanh() * place).square().mean()


def beside(x):
    """The same as results, of which the last is read again."""
    last = torch.stack([x.exp(), x * 2, x.sin()], -1)
    return last, torch.stack([x.tanh(), -x]), torch.cat([x[..., :1].exp(), x[..., 1:2]], -1), last.flip(-1).cumsum(0)


@pytest.mark.parametrize("loss", [of_parts, beside])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tensors_beside_each_other(loss, dtype):
    same(loss, draw(4, 5, 3).to(dtype))


def test_tensors_beside_each_other_are_made_once_each():
    loss = fuse(of_parts, strict=True)
    loss(draw(4, 5, 3).requires_grad_()).backward()
    kernels = loss.source("triton").split("@triton.jit")
    of_gradient = kernels[-1]
    assert of_gradient.count("tl.store") == 3 and of_gradient.count("libdevice.cos") == 1
    assert "tl.where" not in of_gradient


def of_a_batch(x):
    """Statistics of rows, then of a batch, then columns of what they make."""
    rows = x - x.mean(-1, keepdim=True)
    whole = rows / (rows.square().mean((1, 2), keepdim=True) + 1).sqrt()
    return (whole.softmax(-1).sum((0, 1)) * whole.diff(dim=-1).abs().sum()).sum()


def of_memory(x):
    """Sums of columns that a later loop of the same kernel reads in another order."""
    return (x - x.sum(1, keepdim=True).flip(2)).square().sum((1, 2)).mean()


@pytest.mark.parametrize("loss", [of_a_batch, of_memory])
def test_loops_that_read_each_other(loss):
    dtypes, checks = [torch.float64, torch.float32, torch.bfloat16], ["value", "gradient"]
    check_loss(fuse(loss, strict=True), loss, [(draw(3, 5, 7),)], dtypes=dtypes, checks=checks)


def test_an_index_out_of_range_is_nan_where_it_goes():
    loss = fuse(lambda x, labels: F.nll_loss(x.log_softmax(-1), labels, reduction="none"), strict=True)
    x = draw(4, 7).requires_grad_()
    for bad in (7, -1, 2**40):
        values = loss(x, torch.tensor([0, bad, 6, -100]))
        (gradient,) = torch.autograd.grad(values, x, torch.ones(4))
        assert values.isnan().tolist() == [False, True, False, False]
        assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False, False]


def test_offsets_beyond_int32():
    memory = mmap.mmap(-1, 6 * (2**31 + 16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # no page is there
    x = torch.from_numpy(np.frombuffer(memory, dtype=np.float16)).view(3, -1)[:, :50]
    x[2] = draw(50)
    loss = lambda x: (x.float().logsumexp(1), x.float().sum(), x.float().square().sum(0))
    torch.testing.assert_close(fuse(loss, strict=True)(x), loss(x))


def fault_start(patch):
    patch.setitem(reductions.REDUCTIONS, "sum", reductions.Reduction("1", *sum_lines(), is_rounded=True))


def fault_mask(patch):
    patch.setattr(nests.NestWriter, "_full_mask", lambda self: "")


def fault_flat(patch):
    patch.setattr(triton_runtime._Planner, "_is_flat", lambda *arguments: True)


def fault_barrier(patch):
    patch.setattr(nests.NestWriter, "_is_in_memory", lambda self, node: False)


def fault_place(patch):
    patch.setattr(nests.NestWriter, "_place", lambda self, stage: "tl.full((), 0, tl.int64)")


def sum_lines():
    stock = reductions.REDUCTIONS["sum"]
    return stock.update, stock.join


FAULTS = {
    fault_start: lambda: test_reductions(),
    fault_mask: lambda: same(lambda x: x.exp().sum(-1), draw(5, 7)),
    fault_flat: lambda: test_layouts(LAYOUTS["transposed"]),
    fault_barrier: lambda: test_loops_that_read_each_other(of_memory),
    fault_place: lambda: same(places, draw(3, 5, 7)),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_seen(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises((AssertionError, InterpreterError)):
        FAULTS[fault]()


def test_strided_slices_and_stacks():
    def loss(x, y):
        z = (x * y).clone()
        z[:, 1::3] = x[:, 1::3].tanh()
        halves = z[:, 0:-1:2] + z[:, 1::2]
        rows = halves[:, ::2].square().sum(0).sqrt()
        stacked = torch.stack([x, y, x - y]).log_softmax(-1).logsumexp(0)
        return (halves[:, ::2] / rows).sum() + z.square().mean() + stacked.sum()

    same(loss, draw(5, 13), draw(5, 13, seed=1))
    same(loss, draw(33, 70), draw(33, 70, seed=1))
