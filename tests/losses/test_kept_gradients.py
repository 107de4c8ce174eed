"""Gradients that forward makes with the loss on a CPU, whatever the loss."""

from functools import partial

import pytest
import torch

from fused_losses import functional as F
from fused_losses.backends import choice

# The operator, the place of the input's gradient among its results, and a loss of logits.
MADE = {
    "pointwise": ("pointwise_with_gradients", 1, lambda x: F.mse_loss(x, torch.ones_like(x), backend="cpp")),
    "softmax": ("cross_entropy_with_gradient", 2, lambda x: F.cross_entropy(x, torch.arange(len(x)), backend="cpp")),
}


@pytest.fixture
def made(monkeypatch):
    """A function of an operator's name, which gathers what its calls give."""
    choice.resolve("cpu", torch.float32, "cpp")
    kernels = choice.KERNELS["cpp"]

    def counted(results, kernel, *arguments):
        results.append(kernel(*arguments))
        return results[-1]

    def gather(name):
        results = []
        counting = partial(counted, results, getattr(kernels, name))
        monkeypatch.setitem(choice.KERNELS, "cpp", kernels._replace(**{name: counting}))
        return results

    return gather


@pytest.mark.parametrize(("name", "place", "loss_of"), MADE.values(), ids=MADE)
def test_they_are_not_made_again(name, place, loss_of, made):
    """Their memory is that of the first backward, as torch's own is not kept for a second one either."""
    results = made(name)
    x = torch.randn(30, 200, requires_grad=True)
    loss = loss_of(x)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert len(results) == 1 and first.data_ptr() == results[0][place].data_ptr()
    (second,) = torch.autograd.grad(loss, x)
    assert len(results) == 2 and torch.equal(first, second) and second.data_ptr() != first.data_ptr()
    with torch.no_grad():
        loss_of(x)
    loss_of(x.bfloat16()).backward()
    assert len(results) == 2
