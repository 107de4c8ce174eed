"""Losses of one prediction and one target element each; imports only torch.

Every function takes tensors of one shape and returns the reduced loss. ``weight`` multiplies each element's
loss and never changes what ``mean`` divides by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reduce(values: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weights per-element losses and reduces them: none, sum, or mean over the number of elements."""
    if weight is not None:
        values = (values * weight.expand(values.shape)).to(values.dtype)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.mean()


def _torch_loss(
    loss: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    **options: Any,
) -> Tensor:
    if weight is None:
        return loss(input, target, reduction=reduction, **options)
    return reduce(loss(input, target, reduction="none", **options), weight, reduction)


def mse(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """(x - t)^2"""
    return _torch_loss(F.mse_loss, input, target, weight, reduction)


def l1(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """|x - t|"""
    return _torch_loss(F.l1_loss, input, target, weight, reduction)


def smooth_l1(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    beta: float = 1.0,
) -> Tensor:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = x - t"""
    return _torch_loss(F.smooth_l1_loss, input, target, weight, reduction, beta=beta)


def huber(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    delta: float = 1.0,
) -> Tensor:
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2), with d = x - t"""
    return _torch_loss(F.huber_loss, input, target, weight, reduction, delta=delta)


def log_cosh(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """log cosh d = |d| + log(1 + exp(-2 |d|)) - log 2, with d = x - t"""
    # logsigmoid, for softplus gives up its small terms early; without |d| the gradient at 0 is exactly 0.
    difference = input - target
    return reduce(difference - F.logsigmoid(2.0 * difference) - math.log(2.0), weight, reduction)


def charbonnier(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    eps: float = 1e-12,
) -> Tensor:
    """sqrt((x - t)^2 + eps)"""
    return reduce(torch.sqrt((input - target) ** 2 + eps), weight, reduction)


def bce(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """-(t max(log x, -100) + (1 - t) max(log(1 - x), -100))"""
    if not torch.is_autocast_enabled(input.device.type):
        return _torch_loss(F.binary_cross_entropy, input, target, weight, reduction)
    # GPUs refuse it under autocast, for low precision that these tensors are not in.
    with torch.autocast(input.device.type, enabled=False):
        return _torch_loss(F.binary_cross_entropy, input, target, weight, reduction)


def bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """-(q t log sigmoid(x) + (1 - t) log(1 - sigmoid(x))), with q = pos_weight"""
    loss = F.binary_cross_entropy_with_logits
    return _torch_loss(loss, input, target, weight, reduction, pos_weight=pos_weight)


def sigmoid_focal(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """alpha_t (1 - p_t)^gamma bce_with_logits(x, t), with p_t the probability given to the target"""
    # sigmoid(-x) rather than 1 - sigmoid(x): the latter is 0 for a confident prediction.
    miss = torch.sigmoid(-input) * target + torch.sigmoid(input) * (1 - target)
    values = miss**gamma * F.binary_cross_entropy_with_logits(input, target, reduction="none")
    if alpha >= 0:
        values = values * (alpha * target + (1 - alpha) * (1 - target))
    return reduce(values, weight, reduction)


def kl_div(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """t (log t - x), 0 for t = 0"""
    # torch's operator is composed of the same operations, and has no rule for vmap.
    return reduce(torch.xlogy(target, target) - target * input, weight, reduction)


def kl_div_log_target(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """exp(t) (t - x)"""
    return reduce(torch.exp(target) * (target - input), weight, reduction)
