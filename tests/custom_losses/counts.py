"""Likelihoods and deviances of counts and amounts, most of them with a logarithmic link."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import VECTORS, Draw, Entry, Shape, reduce


def poisson_nll_loss(log_rate: Tensor, counts: Tensor, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of a Poisson distribution.

    exp(x) - t x + log(t!)

    Source: Cameron and Trivedi, "Regression analysis of count data", 1998, section 3.2.
    """
    counts = counts.to(log_rate.dtype)
    return reduce(log_rate.exp() - counts * log_rate + torch.lgamma(counts + 1), reduction)


class NegativeBinomialLoss(nn.Module):
    """Negative log-likelihood of overdispersed counts, as of gene expression: variance m + m^2 / r.

    -(lgamma(t + r) - lgamma(r) - log(t!) + r log(r / (r + m)) + t log(m / (r + m)))

    Source: Lopez et al., "Deep generative modeling for single-cell transcriptomics", 2018.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, log_mean: Tensor, log_dispersion: Tensor, counts: Tensor) -> Tensor:
        counts, r = counts.to(log_mean.dtype), log_dispersion.exp()
        log_total = torch.logaddexp(log_mean, log_dispersion)
        binomial = torch.lgamma(counts + r) - torch.lgamma(r) - torch.lgamma(counts + 1)
        log_likelihood = binomial + r * (log_dispersion - log_total) + counts * (log_mean - log_total)
        return reduce(-log_likelihood, self.reduction)


class ZeroInflatedPoissonLoss(nn.Module):
    """Negative log-likelihood of counts with more zeros than a Poisson distribution has.

    -log(p + (1 - p) exp(-l)) where t = 0, else -log(1 - p) - t log l + l + log(t!), with p = sigmoid(z)

    Source: Lambert, "Zero-inflated Poisson regression", 1992.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, log_rate: Tensor, zero_logits: Tensor, counts: Tensor) -> Tensor:
        numbers, rate = counts.to(log_rate.dtype), log_rate.exp()
        zero = -torch.logaddexp(zero_logits, -rate)
        some = rate - numbers * log_rate + torch.lgamma(numbers + 1)
        return reduce(torch.where(counts == 0, zero, some) + F.softplus(zero_logits), self.reduction)


class TweedieLoss(nn.Module):
    """Quasi-likelihood of amounts that are often zero, as claims and rain, with a logarithmic link.

    exp((2 - p) x) / (2 - p) - t exp((1 - p) x) / (1 - p), with 1 < p < 2

    Source: Jorgensen, "Exponential dispersion models", 1987.
    """

    def __init__(self, power: float = 1.5, reduction: str = "mean"):
        super().__init__()
        if not 1 < power < 2:
            raise ValueError(f"power lies between 1 and 2, got {power}")
        self.power = power
        self.reduction = reduction

    def forward(self, log_mean: Tensor, targets: Tensor) -> Tensor:
        likelihood = targets * torch.exp((1 - self.power) * log_mean) / (1 - self.power)
        return reduce(torch.exp((2 - self.power) * log_mean) / (2 - self.power) - likelihood, self.reduction)


class GammaDevianceLoss(nn.Module):
    """Deviance of positive amounts whose spread grows with their size, with a logarithmic link.

    2 (t exp(-x) - 1 + x - log t)

    Source: McCullagh and Nelder, "Generalized linear models", 1989, section 8.3.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, log_mean: Tensor, targets: Tensor) -> Tensor:
        log_ratio = targets.log() - log_mean
        return reduce(2 * (torch.expm1(log_ratio) - log_ratio), self.reduction)


def rates(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.integers(*shape, below=6)


def two_parameters(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    return draw.normal(*shape), draw.normal(*shape), draw.integers(*shape, below=6)


def claims(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.uniform(*shape, high=4.0) * draw.binary(*shape)


def amounts(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.uniform(*shape, low=0.1, high=4.0)


LOSSES = (
    Entry(poisson_nll_loss, rates, VECTORS, (4096, 4096)),
    Entry(NegativeBinomialLoss, two_parameters, VECTORS, (4096, 4096), gradients=(0, 1)),
    Entry(ZeroInflatedPoissonLoss, two_parameters, VECTORS, (4096, 4096), gradients=(0, 1)),
    Entry(TweedieLoss, claims, VECTORS, (4096, 4096)),
    Entry(GammaDevianceLoss, amounts, VECTORS, (4096, 4096)),
)
