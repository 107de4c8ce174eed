"""Golden values of the pointwise losses: computed by hand or printed in the papers that defined them."""

import math

import pytest
import torch

from fused_losses import functional as F

LN2 = math.log(2)
VALUES = [
    (F.mse_loss, 3.0, 1.0, {}, 4.0, 4.0),
    (F.l1_loss, 3.0, 1.0, {}, 2.0, 1.0),
    (F.l1_loss, 1.0, 1.0, {}, 0.0, 0.0),
    # Girshick 2015, equation 3: quadratic below 1, linear beyond.
    (F.smooth_l1_loss, 0.5, 0.0, {}, 0.125, 0.5),
    (F.smooth_l1_loss, -2.0, 0.0, {}, 1.5, -1.0),
    (F.smooth_l1_loss, 0.5, 0.0, {"beta": 0.25}, 0.375, 1.0),
    # Huber 1964: beyond delta the derivative stays at delta.
    (F.huber_loss, 0.5, 0.0, {"delta": 2.0}, 0.125, 0.5),
    (F.huber_loss, 3.0, 0.0, {"delta": 2.0}, 4.0, 2.0),
    # log cosh(log 2) = log(5/4), tanh(log 2) = 3/5.
    (F.log_cosh_loss, LN2, 0.0, {}, math.log(1.25), 0.6),
    (F.log_cosh_loss, 1000.0, 0.0, {}, 1000.0 - LN2, 1.0),
    # Charbonnier et al. 1994: a triangle of 3, 4 and 5.
    (F.charbonnier_loss, 3.0, 0.0, {"eps": 16.0}, 5.0, 0.6),
    (F.binary_cross_entropy, 0.25, 1.0, {}, 2 * LN2, -4.0),
    (F.binary_cross_entropy, 0.0, 1.0, {}, 100.0, -1e12),  # torch bounds the logarithm
    (F.binary_cross_entropy_with_logits, 0.0, 1.0, {}, LN2, -0.5),
    (F.binary_cross_entropy_with_logits, math.log(3), 0.0, {}, 2 * LN2, 0.75),
    (F.binary_cross_entropy_with_logits, -1000.0, 1.0, {}, 1000.0, -1.0),
    (F.binary_cross_entropy_with_logits, 1000.0, 1.0, {}, 0.0, 0.0),
    # Lin et al. 2017, section 3.2: with gamma = 2, an example at p = 0.9 costs 100 times less.
    (F.sigmoid_focal_loss, math.log(9), 1.0, {"alpha": -1.0}, 0.01 * -math.log(0.9), None),
    (F.sigmoid_focal_loss, math.log(9), 1.0, {"alpha": -1.0, "gamma": 0.0}, -math.log(0.9), -0.1),
    (F.sigmoid_focal_loss, math.log(9), 1.0, {}, 0.25 * 0.01 * -math.log(0.9), None),
    (F.sigmoid_focal_loss, math.log(9), 0.0, {}, 0.75 * 0.81 * -math.log(0.1), None),
]


@pytest.mark.parametrize(
    ("loss", "x", "t", "options", "value", "slope"), VALUES, ids=[f"{v[0].__name__}-{i}" for i, v in enumerate(VALUES)]
)
def test_values(loss, x, t, options, value, slope, backend, device):
    """Alone, and among so many that vector loops and their tails both compute it."""
    for count in (1, 37):
        inputs = torch.full((count,), x, device=device, requires_grad=True)
        targets = torch.full((count,), t, device=device)
        result = loss(inputs, targets, reduction="none", backend=backend, **options)
        assert result.tolist() == pytest.approx([value] * count, rel=2e-6, abs=1e-7)
        if slope is not None:
            (gradient,) = torch.autograd.grad(result.sum(), inputs)
            assert gradient.tolist() == pytest.approx([slope] * count, rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("loss", [F.log_cosh_loss, F.charbonnier_loss])
@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-6])
def test_small_errors_do_not_cancel(loss, size, kernels, device):
    """log cosh d is d^2 / 2 near 0, where log and cosh have both lost it."""
    inputs = torch.full((33,), size, device=device, requires_grad=True)
    result = loss(inputs, torch.zeros(33, device=device), reduction="none", backend=kernels)
    d = inputs.detach().double()
    exact = torch.log(torch.cosh(d)) if loss is F.log_cosh_loss and size > 1e-4 else d.square() / 2
    if loss is F.charbonnier_loss:
        exact = (d.square() + 1e-12).sqrt()
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=0.0)
