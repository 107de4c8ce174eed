"""Likelihoods and scores of predicted distributions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import VECTORS, Draw, Entry, Shape, reduce


class GaussianCRPSLoss(nn.Module):
    """Continuous ranked probability score of a normal distribution.

    s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), with z = (t - m) / s

    Source: Gneiting et al., "Calibrated probabilistic forecasting using ensemble model output statistics", 2005.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, mean: Tensor, log_scale: Tensor, targets: Tensor) -> Tensor:
        scale = log_scale.exp()
        z = (targets - mean) / scale
        density = torch.exp(-0.5 * z * z) * math.sqrt(2 / math.pi)
        score = z * torch.erf(z / math.sqrt(2)) + density - 1 / math.sqrt(math.pi)
        return reduce(scale * score, self.reduction)


class HeteroscedasticGaussianLoss(nn.Module):
    """Negative log-likelihood of a normal distribution with a variance for each element.

    (exp(-v) (t - m)^2 + v) / 2, with v the log-variance

    Source: Kendall and Gal, "What uncertainties do we need in Bayesian deep learning for computer vision?", 2017.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, mean: Tensor, log_variance: Tensor, targets: Tensor) -> Tensor:
        error = (targets - mean).square()
        return reduce(0.5 * (torch.exp(-log_variance) * error + log_variance), self.reduction)


class BetaNLLLoss(nn.Module):
    """The same, weighted with a power of the variance that no gradient flows through.

    stop(exp(beta v)) (exp(-v) (t - m)^2 + v) / 2, with v the log-variance

    Source: Seitzer et al., "On the pitfalls of heteroscedastic uncertainty estimation", 2022.
    """

    def __init__(self, beta: float = 0.5, reduction: str = "mean"):
        super().__init__()
        self.beta = beta
        self.reduction = reduction

    def forward(self, mean: Tensor, log_variance: Tensor, targets: Tensor) -> Tensor:
        nll = 0.5 * (torch.exp(-log_variance) * (targets - mean).square() + log_variance)
        return reduce(torch.exp(self.beta * log_variance).detach() * nll, self.reduction)


def laplace_nll_loss(mean: Tensor, log_scale: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of a Laplace distribution.

    |t - m| exp(-s) + s + log 2, with s the log-scale

    Source: Ilg et al., "Uncertainty estimates and multi-hypotheses networks for optical flow", 2018.
    """
    return reduce((targets - mean).abs() * torch.exp(-log_scale) + log_scale + math.log(2), reduction)


class StudentTLoss(nn.Module):
    """Negative log-likelihood of Student's t with predicted degrees of freedom: outliers widen the tails.

    (n + 1) / 2 log(1 + z^2 / n) + log s + log(n pi) / 2 + lgamma(n / 2) - lgamma((n + 1) / 2), with z = (t - m) / s

    Source: Salinas et al., "DeepAR", 2020; Takahashi et al., "Student-t variational autoencoder", 2018.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, mean: Tensor, log_scale: Tensor, raw_freedom: Tensor, targets: Tensor) -> Tensor:
        freedom = 2 + F.softplus(raw_freedom)  # a variance exists beyond 2
        z = (targets - mean) * torch.exp(-log_scale)
        normalizer = torch.lgamma(0.5 * freedom) - torch.lgamma(0.5 * (freedom + 1))
        nll = 0.5 * (freedom + 1) * torch.log1p(z * z / freedom) + 0.5 * torch.log(freedom * math.pi)
        return reduce(nll + log_scale + normalizer, self.reduction)


class EvidentialRegressionLoss(nn.Module):
    """Evidence about mean and variance: predictions (..., 4) of a normal-inverse-gamma distribution.

    log(pi / v) / 2 - a log w + (a + 1/2) log((t - g)^2 v + w) + lgamma(a) - lgamma(a + 1/2)
    + weight |t - g| (2 v + a), with w = 2 b (1 + v)

    Source: Amini et al., "Deep evidential regression", 2020, equations 8 and 9.
    """

    def __init__(self, weight: float = 0.01):
        super().__init__()
        self.weight = weight

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        gamma, raw_v, raw_alpha, raw_beta = predictions.unbind(dim=-1)
        v, alpha, beta = F.softplus(raw_v) + 1e-6, F.softplus(raw_alpha) + 1, F.softplus(raw_beta) + 1e-6
        error = targets - gamma
        omega = 2 * beta * (1 + v)
        nll = 0.5 * torch.log(math.pi / v) - alpha * torch.log(omega)
        nll = nll + (alpha + 0.5) * torch.log(error.square() * v + omega)
        nll = nll + torch.lgamma(alpha) - torch.lgamma(alpha + 0.5)
        return (nll + self.weight * error.abs() * (2 * v + alpha)).mean()


class MixtureDensityLoss(nn.Module):
    """Negative log-likelihood of a mixture of normals: weights, means and scales (N, K), targets (N,).

    -logsumexp_k(log softmax(w)_k - ((t - m_k) / s_k)^2 / 2 - log s_k - log(2 pi) / 2)

    Source: Bishop, "Mixture density networks", 1994.
    """

    def forward(self, logits: Tensor, means: Tensor, log_scales: Tensor, targets: Tensor) -> Tensor:
        z = (targets.unsqueeze(1) - means) * torch.exp(-log_scales)
        log_density = -0.5 * z.square() - log_scales - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(F.log_softmax(logits, dim=1) + log_density, dim=1).mean()


def location_and_scale(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return draw.normal(*shape), draw.normal(*shape, std=0.5), draw.normal(*shape)


def location_scale_and_freedom(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return draw.normal(*shape), draw.normal(*shape, std=0.5), draw.normal(*shape), draw.normal(*shape, std=2.0)


def evidence(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return draw.normal(*shape), draw.normal(*shape[:-1])


def mixture(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return draw.normal(*shape), draw.normal(*shape), draw.normal(*shape, std=0.5), draw.normal(shape[0])


LOSSES = (
    Entry(GaussianCRPSLoss, location_and_scale, VECTORS, (4096, 4096), gradients=(0, 1)),
    Entry(HeteroscedasticGaussianLoss, location_and_scale, VECTORS, (4096, 4096), gradients=(0, 1)),
    Entry(BetaNLLLoss, location_and_scale, VECTORS, (4096, 4096), gradients=(0, 1)),
    Entry(laplace_nll_loss, location_and_scale, VECTORS, (4096, 4096), gradients=(0, 1)),
    Entry(StudentTLoss, location_scale_and_freedom, ((7,), (5, 3)), (4096, 4096), gradients=(0, 1, 2)),
    Entry(EvidentialRegressionLoss, evidence, ((7, 4), (2, 3, 4)), (4096, 1024, 4)),
    Entry(MixtureDensityLoss, mixture, ((5, 3), (3, 4)), (1 << 20, 16), gradients=(0, 1, 2)),
)
