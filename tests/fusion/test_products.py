"""Products of matrices, whose operands and results lie in memory whichever way round they are made."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fused_losses import fuse
from fused_losses.fusion.ir import Extern, Stage
from fused_losses.fusion.schedule import Kernel, schedule
from fused_losses.testing import check_loss

MM = torch.ops.aten.mm.default


def rows_and_columns(x, y):
    """Both ways round, as CLIP's loss reads its logits."""
    logits = 5 * normalize(x, dim=1) @ normalize(y, dim=1).t()
    labels = torch.arange(x.shape[0])
    return cross_entropy(logits, labels) + cross_entropy(logits.t(), labels)


def correlation(x, y):
    """Of columns: its gradient is read as it lies."""
    centered = [z - z.mean(0) for z in (x, y)]
    return (centered[0].T @ centered[1]).square().mean()


def sorted_across(x, y):
    """Where an operator of torch's asks for a product that is there the other way round."""
    product = x.t() @ y
    return (product.t().sort(1).values @ product).sin().sum() + product.t().cumsum(0).mean()


def similarities(x, y):
    """Of what is given, as it is."""
    return (x @ y.t()).sin().mean() + (y @ y.t()).cos().mean()


def batches(x, y):
    gram = lambda z: torch.bmm(z, z.transpose(1, 2))
    return (gram(x) - gram(y)).square().mean()


def matmul_of_batches(x, y):
    return (x @ y.mT).square().mean() + (x.mT @ y).sin().mean()


SHAPES = {batches: (2, 3, 5), matmul_of_batches: (2, 3, 5)}
LOSSES = [rows_and_columns, correlation, sorted_across, similarities, batches, matmul_of_batches]


def drawn(loss, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPES.get(loss, (4, 6)), generator=generator, requires_grad=True) for _ in "xy"]


def program_of(loss):
    """Of the value and the gradients."""
    fused = fuse(loss, strict=True)
    fused(*drawn(loss)).backward()
    return fused._fusion.last.at_once


def steps_of(loss):
    """How often a program calls each operator of torch's, and the stages that store tensors."""
    steps = program_of(loss).steps
    called = Counter(step.target.overloadpacket.__name__ for step in steps if isinstance(step, Extern))
    return called, [step for step in steps if isinstance(step, Stage) and step.axes and not step.reduced]


@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(loss):
    samples = [tuple(x.detach() for x in drawn(loss))]
    report = check_loss(fuse(loss, strict=True), loss, samples, checks=["value", "gradient", "double_backward"])
    assert report.ok, report


@pytest.mark.parametrize(
    "loss, products",
    [
        (rows_and_columns, 3),
        (correlation, 3),
        (sorted_across, 6),
        (similarities, 6),
        (batches, 6),
        (matmul_of_batches, 6),
    ],
)
def test_each_product_is_made_once_of_matrices_as_they_lie(loss, products):
    called, stored = steps_of(loss)
    assert called["mm"] + called["bmm"] == products
    assert all(stage.expression.op != "load" for stage in stored)


def test_what_products_are_made_of_is_stored_once():
    """As rows for one product, as columns for another."""
    _, stored = steps_of(correlation)
    assert len(stored) == 2 + 1 + 2  # both centered, the gradient of their product, and their own


def test_a_product_is_read_once():
    """Though its gradient is asked for when the next products have been made."""
    program = program_of(similarities)
    kernels = [step for step in schedule(program) if isinstance(step, Kernel)]
    readers = Counter(name for kernel in kernels for name in {name for s in kernel.stages for name in s.reads})
    products = [step.buffers[0].name for step in program.steps if isinstance(step, Extern) and step.target is MM]
    assert [readers[name] for name in products[:2]] == [1, 1] and max(readers[name] for name in products) == 1


def test_a_product_is_given_across():
    x, y = drawn(correlation)
    outputs = lambda x, y: ((x.t() @ y).t(), (x.t() @ y).sin().sum())
    (found, value), (expected, _) = fuse(outputs, strict=True)(x, y), outputs(x, y)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(a.square().sum() + b, (x, y)) for a, b in ((found, value), outputs(x, y))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("large", [True, False])
def test_a_large_product_takes_memory_that_was_used_before(large):
    """Whose first touch would take longer than to compute it; what is handed out is not lent again."""
    rows = 1536 if large else 1024  # 9 MiB or 4
    x, y = (torch.randn(rows, 8) for _ in "xy")
    fused = fuse(lambda x, y: x @ y.t(), strict=True)
    first = fused(x, y)
    address = first.data_ptr()
    held = fused(x, y)
    assert held.data_ptr() != address and torch.equal(held, x @ y.t())
    del first
    again = fused(x, y)
    assert torch.equal(again, held) and (again.data_ptr() == address or not large)
