"""Correlation, similarity of embeddings, and rankings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import ROWS, VECTORS, Draw, Entry, Shape, pair, reduce


class PearsonLoss(nn.Module):
    """One minus the correlation of predictions and targets over the last dimension.

    1 - cov(x, t) / sqrt(var(x) var(t) + eps)

    Source: Pearson, 1895; as a loss in Avsec et al., "Effective gene expression prediction from sequence", 2021.
    """

    def __init__(self, eps: float = 1e-8):
        super().__init__()
        self.eps = eps

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        x = predictions - predictions.mean(dim=-1, keepdim=True)
        t = targets - targets.mean(dim=-1, keepdim=True)
        variances = x.square().mean(dim=-1) * t.square().mean(dim=-1)
        return (1 - (x * t).mean(dim=-1) / torch.sqrt(variances + self.eps)).mean()


class ConcordanceLoss(nn.Module):
    """One minus Lin's concordance: correlation that also asks for the same mean and scale, over the batch.

    1 - 2 cov(x, t) / (var(x) + var(t) + (mean x - mean t)^2 + eps)

    Source: Lin, "A concordance correlation coefficient to evaluate reproducibility", 1989.
    """

    def __init__(self, eps: float = 1e-8):
        super().__init__()
        self.eps = eps

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        mean_x, mean_t = predictions.mean(), targets.mean()
        covariance = ((predictions - mean_x) * (targets - mean_t)).mean()
        variances = predictions.var(correction=0) + targets.var(correction=0)
        return 1 - 2 * covariance / (variances + (mean_x - mean_t).square() + self.eps)


class CosineEmbeddingLoss(nn.Module):
    """Pairs of embeddings (N, D) that belong together (1) or do not (-1).

    1 - cos(a, b) where y = 1, else max(0, cos(a, b) - margin)

    Source: torch.nn.CosineEmbeddingLoss.
    """

    def __init__(self, margin: float = 0.1, reduction: str = "mean"):
        super().__init__()
        self.margin = margin
        self.reduction = reduction

    def forward(self, first: Tensor, second: Tensor, same: Tensor) -> Tensor:
        cosine = F.cosine_similarity(first, second, dim=1)
        apart = F.relu(cosine - self.margin)
        return reduce(torch.where(same == 1, 1 - cosine, apart), self.reduction)


class TripletLoss(nn.Module):
    """An anchor should be nearer to its positive than to its negative, by a margin; embeddings (N, D).

    max(0, |a - p| - |a - n| + margin)

    Source: Schroff, Kalenichenko and Philbin, "FaceNet", 2015, without the squares.
    """

    def __init__(self, margin: float = 1.0, eps: float = 1e-12):
        super().__init__()
        self.margin = margin
        self.eps = eps

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sqrt((a - b).square().sum(dim=-1) + self.eps)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return F.relu(self.distance(anchor, positive) - self.distance(anchor, negative) + self.margin).mean()


def nt_xent_loss(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Two views (N, D) of each sample: find the other one among all 2 N - 1.

    cross_entropy(cos(z_i, z_j) / temperature without i = j, index of the other view)

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", 2020.
    """
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.T / temperature
    itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    similarity = similarity.masked_fill(itself, float("-inf"))
    other = torch.arange(z.shape[0], device=z.device).roll(first.shape[0])
    return F.cross_entropy(similarity, other)


class BarlowTwinsLoss(nn.Module):
    """The cross-correlation (D, D) of two views (N, D) should be the identity.

    sum_i (1 - c_ii)^2 + weight sum_{i != j} c_ij^2

    Source: Zbontar et al., "Barlow Twins: self-supervised learning via redundancy reduction", 2021.
    """

    def __init__(self, weight: float = 5e-3, eps: float = 1e-5):
        super().__init__()
        self.weight = weight
        self.eps = eps

    def normalize(self, z: Tensor) -> Tensor:
        centered = z - z.mean(dim=0)
        return centered / torch.sqrt(centered.square().mean(dim=0) + self.eps)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        correlation = self.normalize(first).T @ self.normalize(second) / first.shape[0]
        identity = torch.eye(correlation.shape[0], dtype=correlation.dtype, device=correlation.device)
        error = (correlation - identity).square()
        return torch.where(identity == 1, error, self.weight * error).sum()


def margin_ranking_loss(first: Tensor, second: Tensor, order: Tensor, margin: float = 0.2) -> Tensor:
    """Pairs of scores of which the first should be the larger (1) or the smaller (-1).

    mean(max(0, -y (a - b) + margin))

    Source: Herbrich, Graepel and Obermayer, "Large margin rank boundaries for ordinal regression", 2000.
    """
    return F.relu(margin - order * (first - second)).mean()


class ListNetLoss(nn.Module):
    """Lists (N, L): the probability of each item to be first, by score and by relevance.

    -sum_i softmax(t)_i log softmax(x)_i

    Source: Cao et al., "Learning to rank: from pairwise approach to listwise approach", 2007.
    """

    def forward(self, scores: Tensor, relevance: Tensor) -> Tensor:
        return -(F.softmax(relevance, dim=-1) * F.log_softmax(scores, dim=-1)).sum(dim=-1).mean()


class RankNetLoss(nn.Module):
    """Every two items of a list (N, L) whose relevance differs, by the difference of their scores.

    mean over t_i > t_j of softplus(-sigma (x_i - x_j))

    Source: Burges et al., "Learning to rank using gradient descent", 2005.
    """

    def __init__(self, sigma: float = 1.0):
        super().__init__()
        self.sigma = sigma

    def forward(self, scores: Tensor, relevance: Tensor) -> Tensor:
        better = relevance.unsqueeze(2) > relevance.unsqueeze(1)
        difference = scores.unsqueeze(2) - scores.unsqueeze(1)
        losses = torch.where(better, F.softplus(-self.sigma * difference), 0.0)
        return losses.sum() / better.sum().clamp(min=1)


def two_embeddings(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return *pair(draw, shape), 2 * draw.integers(shape[0], below=2) - 1


def triplets(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return *pair(draw, shape), draw.normal(*shape)


def ordered_pairs(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return *pair(draw, shape), 2 * draw.integers(*shape, below=2) - 1


def graded_lists(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.normal(*shape), draw.integers(*shape, below=4)


LOSSES = (
    Entry(PearsonLoss, pair, ((3, 7), (2, 2, 5)), (4096, 4096)),
    Entry(ConcordanceLoss, pair, VECTORS, (4096, 4096)),
    Entry(CosineEmbeddingLoss, two_embeddings, ROWS, (65536, 256), gradients=(0, 1)),
    Entry(TripletLoss, triplets, ROWS, (65536, 256), gradients=(0, 1, 2)),
    Entry(nt_xent_loss, pair, ROWS, (2048, 128), gradients=(0, 1), left_to_torch=("mm",)),
    Entry(BarlowTwinsLoss, pair, ((7, 3), (5, 4)), (4096, 4096), gradients=(0, 1), left_to_torch=("mm",)),
    Entry(margin_ranking_loss, ordered_pairs, VECTORS, (4096, 4096), gradients=(0, 1)),
    Entry(ListNetLoss, pair, ((3, 7), (2, 2, 5)), (65536, 256)),
    Entry(RankNetLoss, graded_lists, ((2, 5), (3, 4)), (4096, 64)),
)
