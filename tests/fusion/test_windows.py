"""Means over windows are loops like any other, and so are their gradients."""

import pytest
import torch
import torch.nn.functional as F
from test_lowering import check, externs

from fused_losses import fuse

IMAGE = torch.linspace(-2, 2, 2 * 3 * 8 * 9, dtype=torch.float64).sin().view(2, 3, 8, 9)
POOLED = {
    "each": lambda x: F.avg_pool2d(x, 3, stride=1),
    "apart": lambda x: F.avg_pool2d(x, 2),
    "overlapping": lambda x: F.avg_pool2d(x, (3, 4), stride=(2, 3)),
    "with gaps": lambda x: F.avg_pool2d(x, (1, 2), stride=(2, 3)),
    "padded": lambda x: F.avg_pool2d(x, (3, 5), stride=(2, 1), padding=(1, 2)),
    "divided": lambda x: F.avg_pool2d(x, 3, padding=1, divisor_override=5),
    "lines": lambda x: F.avg_pool1d(x[0], 3, 2, 1),
    "one image": lambda x: F.avg_pool2d(x[0].exp(), 2),
}
LEFT = {
    "large": lambda x: F.avg_pool2d(x, (5, 7)),
    "ceiled": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "of what is there": lambda x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False),
}


def squares(pooled):
    return lambda x: (pooled(x) * pooled(x.square())).sin().sum()


@pytest.mark.parametrize("name", POOLED)
def test_windows(name):
    assert externs(check(squares(POOLED[name]), IMAGE)) <= {"reshape"}


@pytest.mark.parametrize("name", LEFT)
def test_other_windows_are_left_to_torch(name):
    assert {"avg_pool2d", "avg_pool2d_backward"} <= externs(check(squares(LEFT[name]), IMAGE))


@pytest.mark.parametrize("name", POOLED)
def test_kernels(name):
    x = IMAGE.float().repeat(1, 1, 7, 8).requires_grad_()
    loss = squares(POOLED[name])
    truth = x.detach().double().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(fuse(loss, strict=True)(x), x)[0].double(),
        torch.autograd.grad(loss(truth), truth)[0],
        rtol=1e-5,
        atol=1e-6,
    )
