"""Losses that follow another model, an earlier policy, or the noise of several tasks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import ROWS, Draw, Entry, Shape, logits_and_labels, pair


class DistillationLoss(nn.Module):
    """A student follows a teacher's softened distribution and the labels.

    weight T^2 KL(softmax(teacher / T) | softmax(student / T)) + (1 - weight) cross_entropy(student, y)

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """

    def __init__(self, temperature: float = 4.0, weight: float = 0.9):
        super().__init__()
        self.temperature = temperature
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student / self.temperature, dim=1)
        log_p = F.log_softmax(teacher / self.temperature, dim=1)
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * self.temperature**2
        return self.weight * divergence + (1 - self.weight) * F.cross_entropy(student, labels)


class JensenShannonLoss(nn.Module):
    """Consistency of a clean and two augmented views' class logits (N, C).

    mean_i KL(p_i | (p_1 + p_2 + p_3) / 3)

    Source: Hendrycks et al., "AugMix", 2020.
    """

    def forward(self, clean: Tensor, first: Tensor, second: Tensor) -> Tensor:
        log_p = F.log_softmax(torch.stack([clean, first, second]), dim=-1)
        log_mixture = torch.logsumexp(log_p, dim=0) - math.log(3)
        return (log_p.exp() * (log_p - log_mixture)).sum(dim=-1).mean()


class AttentionTransferLoss(nn.Module):
    """A student's feature map (N, C, H, W) should look where the teacher's does.

    |a(x) / |a(x)| - a(t) / |a(t)||^2, with a = mean_c x^2

    Source: Zagoruyko and Komodakis, "Paying more attention to attention", 2017.
    """

    def attention(self, features: Tensor) -> Tensor:
        return F.normalize(features.square().mean(dim=1).flatten(1), dim=1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.attention(student) - self.attention(teacher)).square().mean()


class ClippedPolicyLoss(nn.Module):
    """Proximal policy optimisation of discrete actions (N,) with a bonus for the entropy of logits (N, A).

    -min(r A, clamp(r, 1 - clip, 1 + clip) A) - bonus H, with r = exp(log pi(a) - old)

    Source: Schulman et al., "Proximal policy optimization algorithms", 2017.
    """

    def __init__(self, clip: float = 0.2, bonus: float = 0.01):
        super().__init__()
        self.clip = clip
        self.bonus = bonus

    def forward(self, logits: Tensor, actions: Tensor, old_log_p: Tensor, advantages: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=1)
        ratio = torch.exp(log_p.gather(1, actions.unsqueeze(1)).squeeze(1) - old_log_p)
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        return -(gain + self.bonus * entropy).mean()


class ConservativeQLoss(nn.Module):
    """Action values (N, A) that fit returns and are low for actions that the data do not take.

    (q_a - y)^2 / 2 + weight (logsumexp q - q_a)

    Source: Kumar et al., "Conservative Q-learning for offline reinforcement learning", 2020.
    """

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, values: Tensor, actions: Tensor, returns: Tensor) -> Tensor:
        taken = values.gather(1, actions.unsqueeze(1)).squeeze(1)
        gap = torch.logsumexp(values, dim=1) - taken
        return (0.5 * (taken - returns).square() + self.weight * gap).mean()


class UncertaintyWeightedLoss(nn.Module):
    """Squared errors of several tasks (..., T), each weighted with a noise that is learnt.

    sum_k (exp(-s_k) mean (x_k - t_k)^2 + s_k) / 2, with s the log-variances

    Source: Kendall, Gal and Cipolla, "Multi-task learning using uncertainty to weigh losses", 2018.
    """

    def __init__(self, tasks: int = 3):
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(tasks))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        errors = (predictions - targets).square().flatten(0, -2).mean(dim=0)
        return 0.5 * (torch.exp(-self.log_variances) * errors + self.log_variances).sum()


def students(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    logits, labels = logits_and_labels(draw, shape)
    return logits, draw.normal(*shape, std=2.0), labels


def views(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return *pair(draw, shape), draw.normal(*shape)


def rollouts(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    logits, actions = logits_and_labels(draw, shape)
    log_p = F.log_softmax(logits, dim=1).gather(1, actions.unsqueeze(1)).squeeze(1)
    return logits, actions, log_p + draw.normal(shape[0], std=0.3), draw.normal(shape[0])


def transitions(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return *logits_and_labels(draw, shape), draw.normal(shape[0])


LOSSES = (
    Entry(DistillationLoss, students, ROWS, (16384, 1000)),
    Entry(JensenShannonLoss, views, ROWS, (16384, 1000), gradients=(0, 1, 2)),
    Entry(AttentionTransferLoss, pair, ((2, 3, 5, 7), (3, 2, 3, 2)), (64, 256, 32, 32)),
    Entry(ClippedPolicyLoss, rollouts, ROWS, (1 << 18, 64)),
    Entry(ConservativeQLoss, transitions, ROWS, (1 << 18, 64)),
    Entry(UncertaintyWeightedLoss, pair, ((7, 3), (2, 5, 3)), (4096, 1365, 3)),
)
