"""Quantiles, expectiles and intervals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .entry import VECTORS, Draw, Entry, Shape, pair, reduce


class QuantileLoss(nn.Module):
    """Pinball loss of several quantiles at once: predictions (..., Q), targets (...).

    max(q d, (q - 1) d) summed over q, with d = t - x_q

    Source: Koenker and Bassett, "Regression quantiles", 1978.
    """

    quantiles: Tensor

    def __init__(self, quantiles: tuple[float, ...] = (0.1, 0.5, 0.9), reduction: str = "mean"):
        super().__init__()
        self.register_buffer("quantiles", torch.tensor(quantiles))
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        error = targets.unsqueeze(-1) - predictions
        pinball = torch.maximum(self.quantiles * error, (self.quantiles - 1) * error)
        return reduce(pinball.sum(dim=-1), self.reduction)


class ExpectileLoss(nn.Module):
    """Least squares that weigh too low and too high differently.

    |tau - 1[d < 0]| d^2, with d = t - x

    Source: Newey and Powell, "Asymmetric least squares estimation and testing", 1987.
    """

    def __init__(self, tau: float = 0.7, reduction: str = "mean"):
        super().__init__()
        self.tau = tau
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        error = targets - predictions
        weight = (self.tau - (error < 0).to(error.dtype)).abs()
        return reduce(weight * error.square(), self.reduction)


class QuantileHuberLoss(nn.Module):
    """Every predicted quantile (B, N) against every sample of the target's distribution (B, M).

    |tau_i - 1[d_ij < 0]| huber(d_ij) / kappa, summed over i, averaged over j, with d_ij = t_j - x_i

    Source: Dabney et al., "Distributional reinforcement learning with quantile regression", 2018.
    """

    def __init__(self, kappa: float = 1.0):
        super().__init__()
        self.kappa = kappa

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        count = predictions.shape[1]
        tau = (torch.arange(count, device=predictions.device, dtype=predictions.dtype) + 0.5) / count
        error = targets.unsqueeze(1) - predictions.unsqueeze(2)
        distance = error.abs()
        huber = torch.where(distance <= self.kappa, 0.5 * error.square(), self.kappa * (distance - 0.5 * self.kappa))
        weight = (tau.view(1, -1, 1) - (error < 0).to(tau.dtype)).abs()
        return (weight * huber / self.kappa).mean(dim=2).sum(dim=1).mean()


class IntervalScoreLoss(nn.Module):
    """Width of a predicted interval, and a penalty for what lies outside; also called Winkler score.

    (u - l) + 2 / alpha max(l - t, 0) + 2 / alpha max(t - u, 0)

    Source: Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007, section 6.2.
    """

    def __init__(self, alpha: float = 0.1, reduction: str = "mean"):
        super().__init__()
        self.alpha = alpha
        self.reduction = reduction

    def forward(self, lower: Tensor, upper: Tensor, targets: Tensor) -> Tensor:
        outside = torch.relu(lower - targets) + torch.relu(targets - upper)
        return reduce((upper - lower) + 2 / self.alpha * outside, self.reduction)


def quantiles(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.normal(*shape[:-1])


def distributions(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.normal(shape[0], shape[1] + 2)


def intervals(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    middle, width = draw.normal(*shape), draw.uniform(*shape)
    return middle - width, middle + width, draw.normal(*shape)


LOSSES = (
    Entry(QuantileLoss, quantiles, ((7, 3), (2, 5, 3)), (4096, 1365, 3)),
    Entry(ExpectileLoss, pair, VECTORS, (4096, 4096)),
    Entry(QuantileHuberLoss, distributions, ((3, 5), (2, 3)), (16384, 30)),
    Entry(IntervalScoreLoss, intervals, VECTORS, (4096, 4096), gradients=(0, 1)),
)
