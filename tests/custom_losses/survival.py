"""Likelihoods of times until an event that is not always seen."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import VECTORS, WIDE, Draw, Entry, Shape, reduce


def cox_loss(log_hazards: Tensor, events: Tensor) -> Tensor:
    """Negative partial log-likelihood of subjects (N,) in descending order of time, ties as Breslow takes them.

    -sum_i e_i (x_i - log sum_{j <= i} exp(x_j)) / sum_i e_i

    Source: Cox, "Regression models and life-tables", 1972; Katzman et al., "DeepSurv", 2018.
    """
    log_risk = torch.logcumsumexp(log_hazards, dim=0)
    return -((log_hazards - log_risk) * events).sum() / events.sum().clamp(min=1)


class WeibullLoss(nn.Module):
    """Negative log-likelihood of Weibull times with right censoring.

    (t / s)^k - e (log k - log s + (k - 1) (log t - log s)), with s = exp(log_scale), k = exp(log_shape)

    Source: Martinsson, "WTTE-RNN: Weibull time to event recurrent neural network", 2016.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, log_scale: Tensor, log_shape: Tensor, times: Tensor, events: Tensor) -> Tensor:
        shape, log_ratio = log_shape.exp(), times.log() - log_scale
        hazard = torch.exp(shape * log_ratio)
        log_rate = log_shape - log_scale + (shape - 1) * log_ratio
        return reduce(hazard - events * log_rate, self.reduction)


class LogNormalSurvivalLoss(nn.Module):
    """Negative log-likelihood of log-normal times with right censoring.

    e (z^2 / 2 + log s + log t + log(2 pi) / 2) - (1 - e) log Phi(-z), with z = (log t - m) / s

    Source: Kalbfleisch and Prentice, "The statistical analysis of failure time data", 2002, chapter 3.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, mean: Tensor, log_scale: Tensor, times: Tensor, events: Tensor) -> Tensor:
        log_time = times.log()
        z = (log_time - mean) * torch.exp(-log_scale)
        seen = 0.5 * z.square() + log_scale + log_time + 0.5 * math.log(2 * math.pi)
        return reduce(torch.where(events, seen, -torch.special.log_ndtr(-z)), self.reduction)


class DiscreteHazardLoss(nn.Module):
    """Intervals (N, K) with a hazard each: no event before the last one of a subject, and maybe an event there.

    sum_{k < y} softplus(x_k) + e softplus(-x_y) + (1 - e) softplus(x_y)

    Source: Gensheimer and Narasimhan, "A scalable discrete-time survival model for neural networks", 2019.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, intervals: Tensor, events: Tensor) -> Tensor:
        positions = torch.arange(logits.shape[1], device=logits.device)
        last = intervals.unsqueeze(1)
        happened = ((positions == last) & events.unsqueeze(1)).to(logits.dtype)
        bce = F.binary_cross_entropy_with_logits(logits, happened, reduction="none")
        return reduce(torch.where(positions <= last, bce, 0.0).sum(dim=1), self.reduction)


def sorted_subjects(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.mask(*shape, share=0.4)


def subjects(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    location, log_scale = draw.normal(*shape), draw.normal(*shape, std=0.5)
    return location, log_scale, draw.uniform(*shape, low=0.1, high=5.0), draw.mask(*shape, share=0.4)


def intervals(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return draw.normal(*shape), draw.integers(shape[0], below=shape[1]), draw.mask(shape[0], share=0.4)


LOSSES = (
    Entry(cox_loss, sorted_subjects, ((7,), (13,)), (1 << 24,), left_to_torch=("logcumsumexp",)),
    Entry(WeibullLoss, subjects, VECTORS, (4096, 4096), gradients=(0, 1)),
    # torch has no log_ndtr of bfloat16
    Entry(LogNormalSurvivalLoss, subjects, VECTORS, (4096, 4096), (0, 1), ("erfcx",), WIDE),
    Entry(DiscreteHazardLoss, intervals, ((5, 7), (3, 4)), (1 << 18, 64)),
)
