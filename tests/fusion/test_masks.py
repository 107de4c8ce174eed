"""What a boolean mask chooses, ``x[mask]``: fused as far as nobody needs to know how many elements there are."""

import pytest
import torch
import torch.nn.functional as F
from masks import LOSSES, drawn

from fused_losses import fuse
from fused_losses.fusion.refusals import CannotFuse
from fused_losses.testing import check_loss


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_values_and_gradients(loss):
    fused = fuse(loss, strict=True)
    samples = [tuple(drawn(7, 5)), tuple(drawn(6, 5, seed=1))]
    report = check_loss(fused, loss, samples, checks=["value", "gradient", "double_backward"])
    assert report.ok, report
    assert not fused.explain().externs and len(fused._fusion._patterns) <= 3  # one for each dtype, whatever is chosen


def test_nothing_and_everything_chosen():
    x, y = drawn(7, 5)
    x.requires_grad_()
    loss = fuse(lambda x, y, least: (x[y > least] - 1).square().mean() + x[y > least].sum(), strict=True)
    for least in (float("-inf"), 0.0, float("inf")):
        found, expected = (f(x, y, torch.tensor(least)) for f in (loss, loss.__wrapped__))
        torch.testing.assert_close(found, expected, equal_nan=True)
        gradients = [torch.autograd.grad(value, x)[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients, equal_nan=True)


def test_what_is_not_chosen_has_no_influence():
    """Neither a NaN, nor the logarithm of what is negative."""
    x, y = drawn(7, 5)
    y[0, 0], y[3] = float("nan"), float("nan")
    x.requires_grad_()
    for loss in (
        lambda x, y: F.mse_loss(x[~torch.isnan(y)], y[~torch.isnan(y)]),
        lambda x, y: (x[x > 0].log() * 2).sum(),
        lambda x, y: x[x > 0].sqrt().mean(),
    ):
        found, expected = (torch.autograd.grad(f(x, y), x)[0] for f in (fuse(loss, strict=True), loss))
        torch.testing.assert_close(found, expected)
        assert found.isfinite().all()


REFUSED = {
    "max over what a boolean mask chooses": lambda x, y: x[y > 0].max(),
    "slice depends on where": lambda x, y: x[y > 0][1:].sum(),
    "flip depends on where": lambda x, y: (x[y > 0] - x[y > 0].flip(0)).square().sum(),
    "sort needs what": lambda x, y: x[y > 0].sort().values.cumsum(0).sum(),
    "cat depends on where": lambda x, y: torch.cat([x[y > 0], y[y < 0]]).sum(),
    "arange depends on where": lambda x, y: (x[y > 0] * torch.arange(x[y > 0].numel())).sum(),
    "embedding depends on where": lambda x, y: F.embedding((y[:, 0] > 1).long()[y[:, 1] > 0], x).sum(),
    "gather depends on where": lambda x, y: x.gather(1, (x[y[:, 0] > 0] > 0).long()).sum(),
    "an index says which": lambda x, y: x[y[:, 0] > 0][torch.tensor([0, 0])].sum(),
    "asks how many elements": lambda x, y: x[y > 0].mean() if x[y > 0].numel() else x.sum() * 0,
    "asks how many elements ": lambda x, y: x.sum() / len(x[y > 0]),
    "asks how many": lambda x, y: x[y[:, 0] > 0][0].sum(),
    "one after the other in memory": lambda x, y: x[y[:, 0] > 0].flatten().sum(),
    "mm needs what": lambda x, y: (x[y[:, 0] > 0] @ x.t()).sum(),
    "among what another has chosen": lambda x, y: x[y > 0][x[y > 0] > 0].sum(),
    "beside other indices": lambda x, y: x[y[:, 0] > 0, (y[:, 0] > 0).long()[:1]].sum(),
    "it returns what a boolean mask chooses": lambda x, y: x[y > 0],
    "size depends on values": lambda x, y: x[(y > 0).nonzero(as_tuple=True)].sum(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_needs_to_know_how_many_there_are_is_refused(reason):
    """With the line that asks, and the loss runs as it is written."""
    loss, (x, y) = REFUSED[reason], drawn(7, 5)
    with pytest.raises(CannotFuse, match=reason.strip()) as refused:
        fuse(loss, strict=True)(x, y)
    if "returns" not in reason:
        assert "test_masks.py:" in str(refused.value)
    with pytest.warns(UserWarning, match="runs as plain torch"):
        torch.testing.assert_close(fuse(loss)(x, y), loss(x, y))


def put_elsewhere(x, y):
    z = x * 1
    z[y > 0] = x[y < 0]
    return z.sum()


@pytest.mark.parametrize("loss", [lambda x, y: (x[y > 0] - x[y < 0]).sum() + 8, put_elsewhere])
def test_masks_of_different_elements_do_not_combine(loss):
    """Though they may choose as many."""
    x, y = torch.arange(4.0), torch.tensor([1.0, -1.0, 1.0, -1.0])
    with pytest.warns(UserWarning, match="asks how many elements"):
        assert fuse(loss)(x, y) == loss(x, y)
