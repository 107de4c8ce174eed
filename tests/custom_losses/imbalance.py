"""Losses of classes that are rare, noisy or of unequal number: they know the counts of the training set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, logits_and_labels

COUNTS = (500.0, 120.0, 40.0, 9.0)  # of the samples of four classes
SHAPES = ((5, 4), (2, 4, 3))


class ClassBalancedLoss(nn.Module):
    """Cross entropy weighted with the effective number of samples of each class.

    -(1 - beta) / (1 - beta^n_y) log p_y, with weights that add up to the number of classes

    Source: Cui et al., "Class-balanced loss based on effective number of samples", 2019.
    """

    weight: Tensor

    def __init__(self, counts: tuple[float, ...] = COUNTS, beta: float = 0.999):
        super().__init__()
        weight = (1 - beta) / (1 - beta ** torch.tensor(counts))
        self.register_buffer("weight", weight / weight.sum() * len(counts))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        nll = -F.log_softmax(logits, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
        return (self.weight[labels] * nll).mean()


class LDAMLoss(nn.Module):
    """Cross entropy with a margin that is larger for rare classes.

    cross_entropy(s (x - m_y one_hot(y)), y), with m_c proportional to n_c^(-1/4)

    Source: Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", 2019.
    """

    margins: Tensor

    def __init__(self, counts: tuple[float, ...] = COUNTS, largest_margin: float = 0.5, scale: float = 3.0):
        super().__init__()
        margins = torch.tensor(counts) ** -0.25
        self.register_buffer("margins", margins * largest_margin / margins.max())
        self.scale = scale

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        is_label = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).bool()
        margins = self.margins[labels].unsqueeze(1)
        return F.cross_entropy(self.scale * torch.where(is_label, logits - margins, logits), labels)


class LogitAdjustedLoss(nn.Module):
    """Cross entropy of logits that are shifted by how frequent their classes are.

    cross_entropy(x + tau log prior, y)

    Source: Menon et al., "Long-tail learning via logit adjustment", 2021.
    """

    log_prior: Tensor

    def __init__(self, counts: tuple[float, ...] = COUNTS, tau: float = 1.0):
        super().__init__()
        prior = torch.tensor(counts)
        self.register_buffer("log_prior", torch.log(prior / prior.sum()))
        self.tau = tau

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        shift = self.log_prior.view(1, -1, *[1] * (logits.ndim - 2))
        return F.cross_entropy(logits + self.tau * shift, labels)


class BiTemperedLoss(nn.Module):
    """Cross entropy with a bounded logarithm and a heavy-tailed softmax, which five iterations normalise.

    sum_c y_c (log_t1 y_c - log_t1 p_c) - (y_c^(2 - t1) - p_c^(2 - t1)) / (2 - t1), with p = exp_t2(x - lambda(x)),
    log_t u = (u^(1 - t) - 1) / (1 - t), exp_t u = max(0, 1 + (1 - t) u)^(1 / (1 - t))

    Source: Amid et al., "Robust bi-tempered logistic loss based on Bregman divergences", 2019.
    """

    def __init__(self, t1: float = 0.8, t2: float = 1.2, iterations: int = 5):
        super().__init__()
        self.t1 = t1
        self.t2 = t2
        self.iterations = iterations

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = self.tempered_softmax(logits)
        p_label = p.gather(1, labels.unsqueeze(1)).squeeze(1)
        power = 2 - self.t1
        # y is one-hot: log_t 1 = 0, and what is left of the sums over y stands at the label.
        fit = (1 - (p_label + 1e-10) ** (1 - self.t1)) / (1 - self.t1)
        return (fit - (1 - (p**power).sum(dim=1)) / power).mean()

    def tempered_softmax(self, logits: Tensor) -> Tensor:
        largest = logits.amax(dim=1, keepdim=True)
        shifted = logits - largest
        scaled = shifted
        for _ in range(self.iterations):
            scaled = shifted * self.exp_t(scaled).sum(dim=1, keepdim=True) ** (1 - self.t2)
        total = self.exp_t(scaled).sum(dim=1, keepdim=True)
        normalizer = (1 - total ** (self.t2 - 1)) / (1 - self.t2)
        return self.exp_t(shifted - normalizer)

    def exp_t(self, u: Tensor) -> Tensor:
        return torch.relu(1 + (1 - self.t2) * u) ** (1 / (1 - self.t2))


LOSSES = (
    Entry(ClassBalancedLoss, logits_and_labels, SHAPES, (16, 4, 512, 512)),
    Entry(LDAMLoss, logits_and_labels, SHAPES, (16, 4, 512, 512)),
    Entry(LogitAdjustedLoss, logits_and_labels, SHAPES, (16, 4, 512, 512)),
    Entry(BiTemperedLoss, logits_and_labels, SHAPES, (16384, 1000)),
)
