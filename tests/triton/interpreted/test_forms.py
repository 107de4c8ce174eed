"""Kernels of few long rows, which programs share, and of many short ones, each of which one program has as a whole."""

import pytest
import torch

from fused_losses import fuse
from fused_losses.fusion.triton import blocks
from fused_losses.fusion.triton import runtime as triton_runtime
from fused_losses.testing import check_loss

pytestmark = pytest.mark.usefixtures("only_triton")


def overlap(x, y):
    """Sums of rows, a value made of them, and their total."""
    p = x.sigmoid()
    return (1 - (2 * (p * y).sum((1, 2)) + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)).mean()


def softmax(x, y):
    """Sums that take another reduction of the same row, and an elementwise result."""
    log_p = x.flatten(1).log_softmax(-1)
    return log_p - (log_p.exp() * y.flatten(1)).sum()


def neighbours(x, y):
    """A total, and elements that are read again next to where they were made."""
    near = torch.nn.functional.avg_pool2d(x, 3, 1)
    return ((near * y[:, 1:-1, 1:-1] - near.square()).clamp(0, 1) / 2).mean()


def batches(x, y):
    """Statistics of rows and of all rows of a sample, and columns of what they make."""
    centred = x - x.mean(-1, keepdim=True)
    whole = centred / (centred.square().mean((1, 2), keepdim=True) + 1).sqrt()
    return (whole * y).sum((0, 1)).square().sum() + whole.exp().mean()


def channels(x, y):
    """Rows that are adjacent in memory."""
    x, y = x.reshape(-1, 4), y.reshape(-1, 4)
    centred = x - x.mean(0)
    return (centred * y / (centred.square().mean(0) + 1).sqrt()).sigmoid().sum()


def truths(x, y):
    """What is no sum, and rows that nothing is read along."""
    return (x > y).any(-1).sum() + x.amax((1, 2)) * y[:, 0, 0] + (x - x.amin((1, 2), keepdim=True)).mul(y).sum()


LOSSES = [overlap, softmax, neighbours, batches, channels, truths]


def draw(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)


@pytest.fixture
def launched(monkeypatch):
    """Small blocks, and how many programs each launch had."""
    for name, value in {"BLOCK": 16, "LONG": 16, "COLUMNS": 4, "PROGRAMS": 24, "FEW": 12, "LASTING": 4}.items():
        monkeypatch.setattr(blocks, name, value)
    counts = []

    class Planner(triton_runtime._Planner):
        def plan(self):
            counts.append(self.programs)
            return super().plan()

    monkeypatch.setattr(triton_runtime, "_Planner", Planner)
    return counts


@pytest.mark.parametrize("shape", [(2, 12, 13), (1, 3, 72), (40, 3, 4)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_both_forms_equal_the_plain_loss(loss, shape, launched):
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    check_loss(fuse(loss, strict=True), loss, [draw(*shape)], dtypes=dtypes, checks=["value", "gradient"])


def run(loss, *shape):
    """The value and the gradient."""
    x, y = draw(*shape)
    value = fuse(loss, strict=True)(x.requires_grad_(), y)
    return value, torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("loss", [overlap, softmax, neighbours, channels])
def test_few_long_rows_have_many_programs(loss, launched):
    run(loss, 1, 40, 40)
    joining = [count for count in launched if count < 12]  # of few numbers each
    assert len(launched) - len(joining) >= 2 and max(joining, default=0) <= 4


def test_many_short_rows_have_a_program_each(launched):
    run(overlap, 40, 3, 4)
    assert launched == [24, 1, 40]  # sums and total, the parts of the total, the gradient


@pytest.mark.parametrize("shape", [(2, 12, 13), (40, 3, 4)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_results_have_the_same_bits(loss, shape, launched):
    assert all(map(torch.equal, run(loss, *shape), run(loss, *shape)))


@pytest.mark.parametrize(("shape", "whole"), [((40, 3, 4), True), ((40, 3, 6), False)], ids=str)
def test_a_row_that_a_block_holds_has_no_loops(shape, whole, monkeypatch, launched):
    plan, seen = triton_runtime._Planner.plan, []

    def noted(planner):
        planned = plan(planner)
        seen.append(planned.constants["WHOLE"])
        return planned

    monkeypatch.setattr(triton_runtime._Planner, "plan", noted)
    run(overlap, *shape)
    assert seen == [whole, True, whole]  # of parts there are few


def test_a_loss_takes_both_forms(launched):
    fused = fuse(overlap, strict=True)
    for shape in ((40, 3, 4), (2, 12, 13), (40, 3, 4)):
        launched.clear()
        x, y = draw(*shape)
        torch.testing.assert_close(fused(x, y), overlap(x, y))
        assert len(launched) == {40: 2, 2: 3}[shape[0]] or not launched  # what is known is not planned again
    assert "piece" in fused.source("triton")


def test_choices_that_guards_make_are_left_out():
    x = draw(2, 5, 6)[0].requires_grad_()
    fused = fuse(lambda x: torch.nn.functional.avg_pool2d(x, 3, 1).square().sum(), strict=True)
    fused(x)
    assert "is_inside" in fused.source("triton") and "tl.where(v" not in fused.source("triton")
