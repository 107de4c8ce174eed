"""Losses of class logits (N, C) or (N, C, ...) and class labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import ROWS, VECTORS, Draw, Entry, Shape, logits_and_labels, reduce

DENSE = ((5, 4), (2, 3, 3, 5))


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the label's class."""
    return F.log_softmax(logits, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)


class FocalLoss(nn.Module):
    """Cross entropy that turns away from what is already right; labels may be ignored.

    -(1 - p)^gamma log p, with p the label's probability

    Source: Lin et al., "Focal loss for dense object detection", 2017.
    """

    def __init__(self, gamma: float = 2.0, ignore_index: int = -100):
        super().__init__()
        self.gamma = gamma
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        valid = labels != self.ignore_index
        log_p = log_probability(logits, labels.masked_fill(~valid, 0))
        focal = -((-torch.expm1(log_p)) ** self.gamma) * log_p
        return (focal * valid).sum() / valid.sum().clamp(min=1)


class Poly1CrossEntropyLoss(nn.Module):
    """Cross entropy with another weight for the first term of its expansion in 1 - p.

    -log p + epsilon (1 - p), with p the label's probability

    Source: Leng et al., "PolyLoss", 2022.
    """

    def __init__(self, epsilon: float = 1.0, reduction: str = "mean"):
        super().__init__()
        self.epsilon = epsilon
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        cross_entropy = F.cross_entropy(logits, labels, reduction="none")
        p = torch.exp(-cross_entropy)
        return reduce(cross_entropy + self.epsilon * (1 - p), self.reduction)


class LabelSmoothingLoss(nn.Module):
    """Cross entropy against labels of which a share is spread over all classes.

    -(1 - s) log p - s mean_c log p_c, with p the label's probability

    Source: Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016.
    """

    def __init__(self, smoothing: float = 0.1, reduction: str = "mean"):
        super().__init__()
        self.smoothing = smoothing
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=1)
        nll = -log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
        return reduce((1 - self.smoothing) * nll - self.smoothing * log_p.mean(dim=1), self.reduction)


class GeneralizedCrossEntropyLoss(nn.Module):
    """Between cross entropy (q = 0) and mean absolute error (q = 1), for noisy labels.

    (1 - p^q) / q, with p the label's probability

    Source: Zhang and Sabuncu, "Generalized cross entropy loss for training deep networks with noisy labels", 2018.
    """

    def __init__(self, q: float = 0.7, reduction: str = "mean"):
        super().__init__()
        self.q = q
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return reduce(-torch.expm1(self.q * log_probability(logits, labels)) / self.q, self.reduction)


class SymmetricCrossEntropyLoss(nn.Module):
    """Cross entropy, and the same with the roles of prediction and label exchanged.

    -alpha log p_y - beta sum_c p_c log max(1[c = y], 1e-4)

    Source: Wang et al., "Symmetric cross entropy for robust learning with noisy labels", 2019.
    """

    def __init__(self, alpha: float = 0.1, beta: float = 1.0):
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        log_p = F.log_softmax(logits, dim=1)
        forward = -(one_hot * log_p).sum(dim=1)
        reverse = -(log_p.exp() * one_hot.clamp(min=1e-4).log()).sum(dim=1)
        return (self.alpha * forward + self.beta * reverse).mean()


class AsymmetricLoss(nn.Module):
    """Multi-label loss that forgives easy negatives; targets are 0 and 1.

    -t (1 - p)^g+ log p - (1 - t) q^g- log(1 - q), with p = sigmoid(x), q = max(p - clip, 0)

    Source: Ridnik et al., "Asymmetric loss for multi-label classification", 2021.
    """

    def __init__(self, gamma_negative: float = 4.0, gamma_positive: float = 1.0, clip: float = 0.05):
        super().__init__()
        self.gamma_negative = gamma_negative
        self.gamma_positive = gamma_positive
        self.clip = clip

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        positive = torch.sigmoid(-logits) ** self.gamma_positive * F.logsigmoid(logits)
        shifted = (torch.sigmoid(logits) - self.clip).clamp(min=0)
        negative = shifted**self.gamma_negative * torch.log1p(-shifted)
        return -(targets * positive + (1 - targets) * negative).sum(dim=1).mean()


class EvidentialClassificationLoss(nn.Module):
    """Evidence for each class as a Dirichlet distribution, pulled to no evidence where it misleads.

    sum_c (y_c - p_c)^2 + p_c (1 - p_c) / (S + 1) + weight KL(Dir(y + (1 - y) a) | Dir(1)), with p = a / S, S = sum a

    Source: Sensoy, Kaplan and Kandemir, "Evidential deep learning to quantify classification uncertainty", 2018.
    """

    def __init__(self, weight: float = 0.1):
        super().__init__()
        self.weight = weight

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        y = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        alpha = F.softplus(logits) + 1
        total = alpha.sum(dim=1, keepdim=True)
        p = alpha / total
        fit = ((y - p).square() + p * (1 - p) / (total + 1)).sum(dim=1)
        misleading = y + (1 - y) * alpha
        strength = misleading.sum(dim=1)
        classes = torch.full_like(strength, logits.shape[1])
        kl = torch.lgamma(strength) - torch.lgamma(classes) - torch.lgamma(misleading).sum(dim=1)
        difference = torch.digamma(misleading) - torch.digamma(strength).unsqueeze(1)
        kl = kl + ((misleading - 1) * difference).sum(dim=1)
        return (fit + self.weight * kl).mean()


class MultiClassHingeLoss(nn.Module):
    """The strongest wrong class must stay a margin below the right one.

    max(0, margin - x_y + max_{c != y} x_c)

    Source: Crammer and Singer, "On the algorithmic implementation of multiclass kernel-based vector machines", 2001.
    """

    def __init__(self, margin: float = 1.0, reduction: str = "mean"):
        super().__init__()
        self.margin = margin
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        is_right = F.one_hot(labels, logits.shape[1]).bool()
        strongest = logits.masked_fill(is_right, float("-inf")).amax(dim=1)
        return reduce(F.relu(self.margin - right + strongest), self.reduction)


def squared_hinge_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Hinge loss with a smooth foot; targets are -1 and 1.

    mean(max(0, 1 - t x)^2)

    Source: Tang, "Deep learning using linear support vector machines", 2013.
    """
    return F.relu(1 - targets * predictions).square().mean()


def logits_and_tags(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape, std=2.0), draw.binary(*shape, share=0.1)


def partly_labelled(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    logits, labels = logits_and_labels(draw, shape)
    return logits, labels.masked_fill(~draw.mask(*labels.shape, share=0.9), -100)


def scores_and_signs(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.signs(*shape)


LOSSES = (
    Entry(FocalLoss, partly_labelled, DENSE, (8, 32, 256, 256)),
    Entry(Poly1CrossEntropyLoss, logits_and_labels, DENSE, (16384, 1000)),
    Entry(LabelSmoothingLoss, logits_and_labels, DENSE, (16384, 1000)),
    Entry(GeneralizedCrossEntropyLoss, logits_and_labels, DENSE, (16384, 1000)),
    Entry(SymmetricCrossEntropyLoss, logits_and_labels, ROWS, (16384, 1000)),
    Entry(AsymmetricLoss, logits_and_tags, ROWS, (16384, 1000)),
    Entry(EvidentialClassificationLoss, logits_and_labels, ROWS, (16384, 1000), left_to_torch=("polygamma",)),
    Entry(MultiClassHingeLoss, logits_and_labels, ROWS, (16384, 1000)),
    Entry(squared_hinge_loss, scores_and_signs, VECTORS, (4096, 4096)),
)
