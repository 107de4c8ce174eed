"""Errors of a prediction, absolute and relative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import VECTORS, Draw, Entry, Shape, pair, positive_pair, reduce


class RMSELoss(nn.Module):
    """Root mean square error.

    sqrt(mean((x - t)^2) + eps)

    Source: Hyndman and Koehler, "Another look at measures of forecast accuracy", 2006.
    """

    def __init__(self, eps: float = 1e-8):
        super().__init__()
        self.eps = eps

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return torch.sqrt(F.mse_loss(predictions, targets) + self.eps)


class MSLELoss(nn.Module):
    """Mean squared logarithmic error of counts and prices, which are not negative.

    (log(1 + x) - log(1 + t))^2

    Source: Tofallis, "A better measure of relative prediction accuracy", 2015.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        error = torch.log1p(predictions) - torch.log1p(targets)
        return reduce(error.square(), self.reduction)


def mape_loss(predictions: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean absolute percentage error, as a fraction.

    mean(|x - t| / max(|t|, eps))

    Source: Hyndman and Koehler, "Another look at measures of forecast accuracy", 2006.
    """
    return ((predictions - targets).abs() / targets.abs().clamp(min=eps)).mean()


class SMAPELoss(nn.Module):
    """Symmetric mean absolute percentage error, between 0 and 2.

    2 |x - t| / (|x| + |t| + eps)

    Source: Makridakis, "Accuracy measures: theoretical and practical concerns", 1993.
    """

    def __init__(self, eps: float = 1e-8, reduction: str = "mean"):
        super().__init__()
        self.eps = eps
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        scale = predictions.abs() + targets.abs() + self.eps
        return reduce(2 * (predictions - targets).abs() / scale, self.reduction)


class ScaleInvariantLogLoss(nn.Module):
    """Error of depth maps up to a common factor, over the pixels whose depth was measured.

    mean(d^2) - weight * mean(d)^2 for each image, with d = log x - log t

    Source: Eigen, Puhrsch and Fergus, "Depth map prediction from a single image", 2014.
    """

    def __init__(self, weight: float = 0.5):
        super().__init__()
        self.weight = weight

    def forward(self, predictions: Tensor, targets: Tensor, measured: Tensor) -> Tensor:
        error = torch.where(measured, predictions.log() - targets.log(), 0.0).flatten(1)
        count = measured.flatten(1).sum(dim=1).clamp(min=1)
        mean = error.sum(dim=1) / count
        return (error.square().sum(dim=1) / count - self.weight * mean.square()).mean()


class RelativeL2Loss(nn.Module):
    """Relative error of each sample in the Euclidean norm, usual for neural operators.

    |x - t|_2 / (|t|_2 + eps)

    Source: Li et al., "Fourier neural operator for parametric partial differential equations", 2021.
    """

    def __init__(self, eps: float = 1e-8, reduction: str = "mean"):
        super().__init__()
        self.eps = eps
        self.reduction = reduction

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        error = torch.linalg.vector_norm((predictions - targets).flatten(1), dim=1)
        norm = torch.linalg.vector_norm(targets.flatten(1), dim=1)
        return reduce(error / (norm + self.eps), self.reduction)


class NashSutcliffeLoss(nn.Module):
    """Error of time series (time, gauges) relative to their variance: 1 - R^2, averaged over the gauges.

    sum_time (x - t)^2 / (sum_time (t - mean_time t)^2 + eps)

    Source: Nash and Sutcliffe, "River flow forecasting through conceptual models", 1970.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        error = (predictions - targets).square().sum(dim=0)
        spread = (targets - targets.mean(dim=0, keepdim=True)).square().sum(dim=0)
        return (error / (spread + self.eps)).mean()


def depths(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    return *positive_pair(draw, shape), draw.mask(*shape, share=0.8)


LOSSES = (
    Entry(RMSELoss, pair, VECTORS, (4096, 4096)),
    Entry(MSLELoss, positive_pair, VECTORS, (4096, 4096)),
    Entry(mape_loss, positive_pair, VECTORS, (4096, 4096)),
    Entry(SMAPELoss, pair, VECTORS, (4096, 4096)),
    Entry(ScaleInvariantLogLoss, depths, ((3, 5, 7), (2, 3, 4)), (64, 512, 512)),
    Entry(RelativeL2Loss, pair, ((5, 7), (3, 2, 5)), (64, 512, 512)),
    Entry(NashSutcliffeLoss, pair, ((7, 3), (5, 2, 3)), (16384, 1024)),
)
