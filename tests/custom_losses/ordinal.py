"""Losses of classes that have an order: grades, ages, ratings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Draw, Entry, Shape, logits_and_labels

RANKS = 5


class CoralLoss(nn.Module):
    """One logit for each threshold: is the label beyond it? Logits (N, K - 1), labels (N,) of 0 to K - 1.

    -sum_k [y > k] log sigmoid(x_k) + [y <= k] log(1 - sigmoid(x_k))

    Source: Cao, Mirjalili and Raschka, "Rank consistent ordinal regression for neural networks", 2020.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        thresholds = torch.arange(logits.shape[1], device=logits.device)
        beyond = (labels.unsqueeze(1) > thresholds).to(logits.dtype)
        log_p = F.logsigmoid(logits)
        return -(beyond * log_p + (1 - beyond) * (log_p - logits)).sum(dim=1).mean()


class CornLoss(nn.Module):
    """The same with conditional probabilities: a threshold learns from what passed those before it.

    -sum_k [y >= k] ([y > k] log sigmoid(x_k) + [y = k] log(1 - sigmoid(x_k))) / sum_k [y >= k], over the batch

    Source: Shi, Cao and Raschka, "Deep neural networks for rank-consistent ordinal regression", 2023.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        thresholds = torch.arange(logits.shape[1], device=logits.device)
        reached = labels.unsqueeze(1) >= thresholds
        beyond = labels.unsqueeze(1) > thresholds
        log_p = F.logsigmoid(logits)
        nll = -torch.where(beyond, log_p, log_p - logits)
        return torch.where(reached, nll, 0.0).sum() / reached.sum().clamp(min=1)


class CumulativeLinkLoss(nn.Module):
    """Proportional odds: one score, and thresholds between the ranks that are learnt with it.

    -log(sigmoid(b_{y+1} - x) - sigmoid(b_y - x)), with b_0 = -inf, b_K = inf

    Source: McCullagh, "Regression models for ordinal data", 1980.
    """

    def __init__(self, ranks: int = RANKS):
        super().__init__()
        self.thresholds = nn.Parameter(torch.linspace(-2, 2, ranks - 1))

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        bounds = F.pad(F.pad(self.thresholds, (1, 0), value=float("-inf")), (0, 1), value=float("inf"))
        low, high = bounds[labels] - scores, bounds[labels + 1] - scores
        # sigmoid(h) - sigmoid(l) = sigmoid(h) sigmoid(-l) (1 - exp(l - h)), whose logarithm does not cancel.
        return -(F.logsigmoid(high) + F.logsigmoid(-low) + torch.log1p(-torch.exp(low - high))).mean()


class SquaredEMDLoss(nn.Module):
    """Distance between the cumulated probabilities and the cumulated label.

    sum_k (sum_{c <= k} p_c - [y <= k])^2

    Source: Hou, Yu and Samaras, "Squared earth mover's distance loss for training deep neural networks", 2016.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        cumulated = torch.cumsum(F.softmax(logits, dim=1), dim=1)
        step = labels.unsqueeze(1) <= torch.arange(logits.shape[1], device=logits.device)
        return (cumulated - step.to(logits.dtype)).square().sum(dim=1).mean()


def thresholds_and_labels(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape, std=2.0), draw.integers(shape[0], below=shape[1] + 1)


def scores_and_labels(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape, std=2.0), draw.integers(*shape, below=RANKS)


LOSSES = (
    Entry(CoralLoss, thresholds_and_labels, ((5, 4), (7, 3)), (1 << 18, 64)),
    Entry(CornLoss, thresholds_and_labels, ((5, 4), (7, 3)), (1 << 18, 64)),
    Entry(CumulativeLinkLoss, scores_and_labels, ((11,), (3, 5)), (4096, 4096)),
    Entry(SquaredEMDLoss, logits_and_labels, ((5, 4), (7, 3)), (1 << 18, 64)),
)
