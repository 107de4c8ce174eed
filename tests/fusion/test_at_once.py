"""Gradients that are made with the loss: for any upstream gradient, as often as asked, and nobody else's memory."""

import pytest
import torch

from fused_losses import fuse
from fused_losses.testing import peak_bytes


def products(x, y):
    return (x * y).sum()


def sums(x, y):
    return (x + y).sum()


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def makes_at_once(loss, *tensors):
    found = fuse(loss, strict=True).explain(*tensors)
    return found.backward.moved == 0


def test_where_one_number_scales_them():
    x, y = drawn(4, 5), drawn(4, 5, seed=1)
    assert makes_at_once(products, x, y) and makes_at_once(products, x.double().detach().requires_grad_(), y.double())
    assert makes_at_once(lambda x: x.square().mean((0, 1), keepdim=True), x)
    assert not makes_at_once(lambda x: x.square().mean(1), x)
    assert not makes_at_once(lambda x: (x.square().mean(), x.sum()), x)
    low = x.detach().bfloat16().requires_grad_()  # small ones would be lost before they are multiplied
    assert not makes_at_once(products, low, low)


@pytest.mark.parametrize("loss", [products, sums])
@pytest.mark.parametrize("factor", [1.0, 2.5, 0.0, -1.0, 2.0**20])
def test_upstream(loss, factor):
    """Neither an input that is a gradient nor one gradient of two inputs is multiplied in place."""
    x, y = drawn(4, 5), drawn(4, 5, seed=1)
    before = [x.detach().clone(), y.detach().clone()]
    fused = fuse(loss, strict=True)
    found = torch.autograd.grad(fused(x, y) * factor, [x, y])
    torch.testing.assert_close(found, torch.autograd.grad(loss(x, y) * factor, [x, y]), rtol=0, atol=0)
    torch.testing.assert_close([x.detach(), y.detach()], before, rtol=0, atol=0)
    assert len({gradient.data_ptr() for gradient in (*found, x, y)}) == 4


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_upstream_that_is_not_finite(factor):
    """What a mask leaves out has no gradient, whatever the upstream one is."""

    def masked(x):
        return torch.where(x > 0, x, 0.0).sum()

    x = drawn(40)
    gradients = [
        torch.autograd.grad(loss(x), x, torch.tensor(factor))[0] for loss in (fuse(masked, strict=True), masked)
    ]
    torch.testing.assert_close(*gradients, equal_nan=True, rtol=0, atol=0)


def test_repeated_backward():
    x, y = drawn(4, 5), drawn(4, 5, seed=1)
    loss = fuse(products, strict=True)(x, y)
    first, second, third = (torch.autograd.grad(loss * k, x, retain_graph=True)[0] for k in (1.0, 1.0, 3.0))
    assert first.data_ptr() not in (second.data_ptr(), third.data_ptr())
    torch.testing.assert_close([first, second, third / 3], [y.detach()] * 3)
    with torch.no_grad():
        first.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], y.detach())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_input_that_changed_is_an_error():
    x, y = drawn(4, 5), drawn(4, 5, seed=1)
    loss = fuse(products, strict=True)(x, y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_outputs():
    """One that has no gradient may stand beside the loss."""

    @fuse(strict=True)
    def with_hits(x, labels):
        return x.square().mean(), (x.argmax(1) == labels).sum()

    x, labels = drawn(6, 5), torch.arange(6) % 5
    loss, hits = with_hits(x, labels)
    assert not hits.requires_grad and hits == (x.argmax(1) == labels).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], 2 * x.detach() / 30)
    assert with_hits.explain().backward.moved == 0


def test_without_gradients_none_is_made():
    x, y = drawn(100_000), drawn(100_000, seed=1)
    loss = fuse(products, strict=True)
    loss(x, y).backward()
    with torch.no_grad():
        torch.testing.assert_close(loss(x, y), products(x, y))
        assert peak_bytes(lambda: loss(x, y)) < 10_000
    assert loss.explain().backward is None


def test_backward_takes_no_memory():
    x, y = drawn(100_000), drawn(100_000, seed=1).detach()
    loss = fuse(products, strict=True)
    for factor in (1.0, 3.0):
        value = loss(x, y)
        assert peak_bytes(lambda: torch.autograd.grad(value, x, torch.tensor(factor))) < 10_000  # noqa: B023
