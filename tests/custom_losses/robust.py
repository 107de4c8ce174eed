"""Errors that outliers do not dominate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import IMAGES, VECTORS, Draw, Entry, Shape, pair, reduce


class TukeyBiweightLoss(nn.Module):
    """Constant beyond c, so that outliers have no gradient at all.

    c^2 / 6 (1 - (1 - (d / c)^2)^3) where |d| <= c, else c^2 / 6, with d = x - t

    Source: Beaton and Tukey, "The fitting of power series, meaning polynomials", 1974.
    """

    def __init__(self, c: float = 4.685, reduction: str = "mean"):
        super().__init__()
        self.c = c
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        inside = (1 - ((predictions - targets) / self.c).square()).clamp(min=0)
        return reduce(self.c**2 / 6 * (1 - inside**3), self.reduction)


class CauchyLoss(nn.Module):
    """Grows as a logarithm; also called Lorentzian.

    c^2 / 2 log(1 + (d / c)^2), with d = x - t

    Source: Black and Anandan, "The robust estimation of multiple motions", 1996.
    """

    def __init__(self, c: float = 1.0, reduction: str = "mean"):
        super().__init__()
        self.c = c
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        z = (predictions - targets) / self.c
        return reduce(0.5 * self.c**2 * torch.log1p(z * z), self.reduction)


def geman_mcclure_loss(predictions: Tensor, targets: Tensor, c: float = 1.0, reduction: str = "mean") -> Tensor:
    """Bounded by 1.

    d^2 / (d^2 + c^2), with d = x - t

    Source: Geman and McClure, "Bayesian image analysis: an application to single photon emission tomography", 1985.
    """
    squared = (predictions - targets) ** 2
    return reduce(squared / (squared + c**2), reduction)


class WelschLoss(nn.Module):
    """Bounded by 1; also called Leclerc, or correntropy.

    1 - exp(-(d / c)^2 / 2), with d = x - t

    Source: Dennis and Welsch, "Techniques for nonlinear least squares and robust regression", 1978.
    """

    def __init__(self, c: float = 1.0, reduction: str = "mean"):
        super().__init__()
        self.c = c
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        z = (predictions - targets) / self.c
        return reduce(-torch.expm1(-0.5 * z.square()), self.reduction)


class AdaptiveRobustLoss(nn.Module):
    """Between Cauchy and L2 with a shape and a scale for each feature, both learnt; without the partition function.

    b / a ((z^2 / b + 1)^(a / 2) - 1) + log c, with z = (x - t) / c, a in (0, 2), b = 2 - a

    Source: Barron, "A general and adaptive robust loss function", 2019, equations 13 and 16.
    """

    def __init__(self, features: int = 4, smallest_scale: float = 1e-3):
        super().__init__()
        self.latent_alpha = nn.Parameter(torch.zeros(features))
        self.latent_scale = nn.Parameter(torch.zeros(features))
        self.smallest_scale = smallest_scale

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        alpha = 0.001 + 1.998 * torch.sigmoid(self.latent_alpha)
        scale = self.smallest_scale + F.softplus(self.latent_scale)
        beta = 2 - alpha
        z = (predictions - targets) / scale
        # exp(a/2 log(1 + ...)) - 1 by expm1 and log1p: a difference of nearly equal powers for small z otherwise.
        rho = beta / alpha * torch.expm1(0.5 * alpha * torch.log1p(z.square() / beta))
        return (rho + torch.log(scale)).mean()


class WingLoss(nn.Module):
    """Logarithmic within w pixels, linear beyond: landmarks that are nearly right still get a gradient.

    w log(1 + |d| / e) where |d| < w, else |d| - (w - w log(1 + w / e)), with d = x - t

    Source: Feng et al., "Wing loss for robust facial landmark localisation", 2018.
    """

    def __init__(self, width: float = 10.0, curvature: float = 2.0, reduction: str = "mean"):
        super().__init__()
        self.width = width
        self.curvature = curvature
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        offset = self.width - self.width * math.log1p(self.width / self.curvature)
        distance = (predictions - targets).abs()
        inner = self.width * torch.log1p(distance / self.curvature)
        return reduce(torch.where(distance < self.width, inner, distance - offset), self.reduction)


class AdaptiveWingLoss(nn.Module):
    """Wing loss of heat maps, whose shape depends on how bright a target pixel is.

    w log(1 + |d / e|^(a - t)) where |d| < theta, else A |d| - C, with d = x - t and A, C that join both smoothly

    Source: Wang, Bo and Fuxin, "Adaptive wing loss for robust face alignment via heatmap regression", 2019.
    """

    def __init__(self, omega: float = 14.0, theta: float = 0.5, epsilon: float = 1.0, alpha: float = 2.1):
        super().__init__()
        self.omega = omega
        self.theta = theta
        self.epsilon = epsilon
        self.alpha = alpha

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        distance = (predictions - targets).abs()
        power = self.alpha - targets
        threshold = (self.theta / self.epsilon) ** power
        slope = self.omega * power * threshold / (1 + threshold) / self.theta
        offset = self.theta * slope - self.omega * torch.log1p(threshold)
        inner = self.omega * torch.log1p((distance / self.epsilon) ** power)
        return torch.where(distance < self.theta, inner, slope * distance - offset).mean()


class BerHuLoss(nn.Module):
    """Reverse Huber: L1 for small errors, L2 beyond a share of the largest error of the batch.

    |d| where |d| <= c, else (d^2 + c^2) / (2 c), with d = x - t, c = share * max |d|

    Source: Laina et al., "Deeper depth prediction with fully convolutional residual networks", 2016.
    """

    def __init__(self, share: float = 0.2):
        super().__init__()
        self.share = share

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        distance = (predictions - targets).abs()
        c = (self.share * distance.amax()).clamp(min=1e-12)
        return torch.where(distance <= c, distance, (distance.square() + c.square()) / (2 * c)).mean()


def landmarks(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    """Positions in pixels, some of them far off."""
    return draw.normal(*shape, std=9.0), draw.normal(*shape, std=9.0)


def heat_maps(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.uniform(*shape), draw.uniform(*shape)


LOSSES = (
    Entry(TukeyBiweightLoss, landmarks, VECTORS, (4096, 4096)),
    Entry(CauchyLoss, pair, VECTORS, (4096, 4096)),
    Entry(geman_mcclure_loss, pair, VECTORS, (4096, 4096)),
    Entry(WelschLoss, pair, VECTORS, (4096, 4096)),
    Entry(AdaptiveRobustLoss, pair, ((7, 4), (3, 5, 4)), (4096, 1024, 4)),
    Entry(WingLoss, landmarks, VECTORS, (65536, 128, 2)),
    Entry(AdaptiveWingLoss, heat_maps, IMAGES, (16, 64, 128, 128)),
    Entry(BerHuLoss, pair, VECTORS, (64, 512, 512)),
)
