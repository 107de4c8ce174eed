"""Smoothness, edges and structure of images (N, C, H, W)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import IMAGES, Draw, Entry, Shape, pair, reduce


def total_variation_loss(images: Tensor) -> Tensor:
    """Sum of the differences between neighbours, for each image.

    mean_n (sum |x[i+1, j] - x[i, j]| + sum |x[i, j+1] - x[i, j]|)

    Source: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", 1992.
    """
    vertical = images.diff(dim=-2).abs().sum(dim=(1, 2, 3))
    horizontal = images.diff(dim=-1).abs().sum(dim=(1, 2, 3))
    return (vertical + horizontal).mean()


class GradientDifferenceLoss(nn.Module):
    """Differences between neighbours should be as large as the target's, which keeps edges sharp.

    sum of ||dx x| - |dx t||^alpha + ||dy x| - |dy t||^alpha

    Source: Mathieu, Couprie and LeCun, "Deep multi-scale video prediction beyond mean square error", 2016.
    """

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        self.alpha = alpha

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        def difference(dim: int) -> Tensor:
            return (predictions.diff(dim=dim).abs() - targets.diff(dim=dim).abs()).abs() ** self.alpha

        return difference(-2).mean() + difference(-1).mean()


class SobelLoss(nn.Module):
    """Mean absolute difference of Sobel edge magnitudes.

    | |sobel(x)| - |sobel(t)| |, with |sobel| = sqrt(gx^2 + gy^2 + eps)

    Source: Seif and Androutsos, "Edge-based loss function for single image super-resolution", 2018.
    """

    def __init__(self, eps: float = 1e-6, reduction: str = "mean"):
        super().__init__()
        self.eps = eps
        self.reduction = reduction

    def magnitude(self, images: Tensor) -> Tensor:
        smooth_x = images[..., :-2] + 2 * images[..., 1:-1] + images[..., 2:]
        smooth_y = images[..., :-2, :] + 2 * images[..., 1:-1, :] + images[..., 2:, :]
        gradient_y = smooth_x[..., 2:, :] - smooth_x[..., :-2, :]
        gradient_x = smooth_y[..., 2:] - smooth_y[..., :-2]
        return torch.sqrt(gradient_x.square() + gradient_y.square() + self.eps)

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return reduce((self.magnitude(predictions) - self.magnitude(targets)).abs(), self.reduction)


class EdgeAwareSmoothnessLoss(nn.Module):
    """Disparities (N, 1, H, W), over their mean, should change only where the image (N, C, H, W) does.

    mean(|dx d| exp(-mean_c |dx I|)) + mean(|dy d| exp(-mean_c |dy I|))

    Source: Godard et al., "Digging into self-supervised monocular depth estimation", 2019.
    """

    def __init__(self, eps: float = 1e-7):
        super().__init__()
        self.eps = eps

    def forward(self, disparities: Tensor, images: Tensor) -> Tensor:
        relative = disparities / (disparities.mean(dim=(2, 3), keepdim=True) + self.eps)
        terms = []
        for dim in (2, 3):
            edges = images.diff(dim=dim).abs().mean(dim=1, keepdim=True)
            terms.append((relative.diff(dim=dim).abs() * torch.exp(-edges)).mean())
        return terms[0] + terms[1]


class SSIMLoss(nn.Module):
    """Structural similarity in windows of 3 by 3, as self-supervised depth estimation uses it.

    clamp((1 - ssim) / 2, 0, 1)

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """

    def __init__(self, c1: float = 0.01**2, c2: float = 0.03**2):
        super().__init__()
        self.c1 = c1
        self.c2 = c2

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        def mean(images: Tensor) -> Tensor:
            return F.avg_pool2d(images, 3, stride=1)

        mean_x, mean_t = mean(predictions), mean(targets)
        variance_x = mean(predictions.square()) - mean_x.square()
        variance_t = mean(targets.square()) - mean_t.square()
        covariance = mean(predictions * targets) - mean_x * mean_t
        structure = (2 * mean_x * mean_t + self.c1) * (2 * covariance + self.c2)
        scale = (mean_x.square() + mean_t.square() + self.c1) * (variance_x + variance_t + self.c2)
        return ((1 - structure / scale) / 2).clamp(0, 1).mean()


def one_image(draw: Draw, shape: Shape) -> tuple[Tensor]:
    return (draw.uniform(*shape),)


def two_images(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.uniform(*shape), draw.uniform(*shape)


def disparities(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.uniform(shape[0], 1, *shape[2:], low=0.1), draw.uniform(*shape)


BENCH = (8, 2, 1024, 1024)
LOSSES = (
    Entry(total_variation_loss, one_image, IMAGES, BENCH),
    Entry(GradientDifferenceLoss, two_images, IMAGES, BENCH),
    Entry(SobelLoss, pair, IMAGES, BENCH),
    Entry(EdgeAwareSmoothnessLoss, disparities, IMAGES, (5, 3, 1024, 1024)),
    Entry(SSIMLoss, two_images, IMAGES, BENCH),
)
