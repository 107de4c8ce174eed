"""Overlap of predicted and true regions: predictions (N, C, ...), each class of each image a region."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import IMAGES, Draw, Entry, Shape, logits_and_labels, logits_and_mask, reduce


class DiceLoss(nn.Module):
    """Twice the intersection over the sum of both, of regions given as masks.

    1 - (2 sum p t + smooth) / (sum p + sum t + smooth), with p = sigmoid(x)

    Source: Milletari, Navab and Ahmadi, "V-Net", 2016; Drozdzal et al., 2016, for sums without squares.
    """

    def __init__(self, smooth: float = 1.0, reduction: str = "mean"):
        super().__init__()
        self.smooth = smooth
        self.reduction = reduction

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        p, t = torch.sigmoid(logits).flatten(2), masks.flatten(2)
        intersection = (p * t).sum(dim=2)
        dice = (2 * intersection + self.smooth) / (p.sum(dim=2) + t.sum(dim=2) + self.smooth)
        return reduce(1 - dice, self.reduction)


class GeneralizedDiceLoss(nn.Module):
    """Dice over all classes at once, each weighted with the square of its inverse volume.

    1 - 2 sum_c w_c sum p t / sum_c w_c sum (p + t), with p = softmax(x), w_c = 1 / (sum t)^2

    Source: Sudre et al., "Generalised dice overlap as a deep learning loss function", 2017.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = F.softmax(logits, dim=1).flatten(2)
        t = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(p.dtype).flatten(2)
        volume = t.sum(dim=2)
        weight = 1 / volume.square().clamp(min=1)
        intersection = (weight * (p * t).sum(dim=2)).sum(dim=1)
        union = (weight * (p.sum(dim=2) + volume)).sum(dim=1)
        return (1 - 2 * intersection / (union + self.eps)).mean()


class TverskyLoss(nn.Module):
    """Dice that weighs false positives and false negatives differently.

    1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth), with p = sigmoid(x)

    Source: Salehi, Erdogmus and Gholipour, "Tversky loss function for image segmentation", 2017.
    """

    def __init__(self, alpha: float = 0.3, beta: float = 0.7, smooth: float = 1.0):
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.smooth = smooth

    def index(self, logits: Tensor, masks: Tensor) -> Tensor:
        p, dims = torch.sigmoid(logits), tuple(range(2, logits.ndim))
        hit = (p * masks).sum(dim=dims)
        false_positive = (p * (1 - masks)).sum(dim=dims)
        miss = ((1 - p) * masks).sum(dim=dims)
        return (hit + self.smooth) / (hit + self.alpha * false_positive + self.beta * miss + self.smooth)

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        return (1 - self.index(logits, masks)).mean()


class FocalTverskyLoss(TverskyLoss):
    """Tversky loss to a power, which regions that are hard to find dominate.

    (1 - tversky index)^gamma

    Source: Abraham and Khan, "A novel focal Tversky loss function with improved attention U-Net", 2019.
    """

    def __init__(self, alpha: float = 0.3, beta: float = 0.7, gamma: float = 0.75, smooth: float = 1.0):
        super().__init__(alpha, beta, smooth)
        self.gamma = gamma

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        # The derivative of a power below 1 is infinite at 0, where a mask is perfect.
        return ((1 - self.index(logits, masks)).clamp(min=1e-7) ** self.gamma).mean()


class LogCoshDiceLoss(DiceLoss):
    """Dice loss with smooth and bounded derivatives.

    log cosh(dice loss)

    Source: Jadon, "A survey of loss functions for semantic segmentation", 2020.
    """

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        return torch.log(torch.cosh(super().forward(logits, masks)))


class JaccardLoss(nn.Module):
    """Intersection over union of the whole batch, of classes.

    1 - mean_c (sum p t + eps) / (sum (p + t - p t) + eps), with p = softmax(x)

    Source: Rahman and Wang, "Optimizing intersection-over-union in deep neural networks", 2016.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = F.softmax(logits, dim=1)
        t = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(p.dtype)
        dims = (0, *range(2, p.ndim))
        intersection = (p * t).sum(dim=dims)
        union = (p + t - p * t).sum(dim=dims)
        return 1 - ((intersection + self.eps) / (union + self.eps)).mean()


class DiceCrossEntropyLoss(nn.Module):
    """Squared-denominator dice and cross entropy of the same logits, added.

    1 - mean_c (2 sum p t + eps) / (sum p^2 + sum t + eps) - weight mean log p_y, with p = softmax(x)

    Source: Isensee et al., "nnU-Net", 2021.
    """

    def __init__(self, weight: float = 1.0, eps: float = 1e-5):
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=1)
        p, dims = log_p.exp(), tuple(range(2, logits.ndim))
        t = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(p.dtype)
        intersection = (p * t).sum(dim=dims)
        dice = (2 * intersection + self.eps) / (p.square().sum(dim=dims) + t.sum(dim=dims) + self.eps)
        return 1 - dice.mean() + self.weight * F.nll_loss(log_p, labels)


class BoundaryLoss(nn.Module):
    """Probabilities weighted with the signed distance to the true boundary, which is negative inside.

    mean(softmax(x) * distance)

    Source: Kervadec et al., "Boundary loss for highly unbalanced segmentation", 2019.
    """

    def forward(self, logits: Tensor, distances: Tensor) -> Tensor:
        return (F.softmax(logits, dim=1) * distances).mean()


class MatthewsLoss(nn.Module):
    """Correlation of prediction and truth over all pixels, true negatives included.

    1 - (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN) + eps), as means, with p = sigmoid(x)

    Source: Abhishek and Hamarneh, "Matthews correlation coefficient loss for deep convolutional networks", 2021.
    """

    def __init__(self, eps: float = 1e-8):
        super().__init__()
        self.eps = eps

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        hit, share_p, share_t = (p * masks).mean(), p.mean(), masks.mean()
        covariance = hit - share_p * share_t
        variances = share_p * (1 - share_p) * share_t * (1 - share_t)
        return 1 - covariance / torch.sqrt(variances + self.eps)


class LovaszHingeLoss(nn.Module):
    """The convex extension of intersection over union, of hinge errors in descending order.

    sum_i max(0, e_i) (J_i - J_{i-1}), with e = 1 - x (2 t - 1) sorted, J the Jaccard loss of the first i

    Source: Berman, Rannen Triki and Blaschko, "The Lovasz-softmax loss", 2018.
    """

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        x, t = logits.flatten(1), masks.flatten(1)
        errors, order = torch.sort(1 - x * (2 * t - 1), dim=1, descending=True)
        sorted_t = t.gather(1, order)
        total = sorted_t.sum(dim=1, keepdim=True)
        intersection = total - sorted_t.cumsum(dim=1)
        union = total + (1 - sorted_t).cumsum(dim=1)
        jaccard = 1 - intersection / union
        step = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], dim=1)
        return (F.relu(errors) * step).sum(dim=1).mean()


def logits_and_distances(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.normal(*shape, std=10.0)


MASKS, CLASSES = (8, 2, 1024, 1024), (8, 8, 512, 512)
LOSSES = (
    Entry(DiceLoss, logits_and_mask, (*IMAGES, (2, 2, 3, 2, 3)), MASKS),
    Entry(GeneralizedDiceLoss, logits_and_labels, IMAGES, CLASSES),
    Entry(TverskyLoss, logits_and_mask, IMAGES, MASKS),
    Entry(FocalTverskyLoss, logits_and_mask, IMAGES, MASKS),
    Entry(LogCoshDiceLoss, logits_and_mask, IMAGES, MASKS),
    Entry(JaccardLoss, logits_and_labels, IMAGES, CLASSES),
    Entry(DiceCrossEntropyLoss, logits_and_labels, IMAGES, CLASSES),
    Entry(BoundaryLoss, logits_and_distances, IMAGES, CLASSES),
    Entry(MatthewsLoss, logits_and_mask, IMAGES, MASKS),
    Entry(LovaszHingeLoss, logits_and_mask, ((2, 3, 5), (3, 7)), (16, 1024, 1024), left_to_torch=("sort", "cumsum")),
)
