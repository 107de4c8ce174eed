"""Losses of a softmax over classes; imports only torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def transform_logits(input: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """z = softcap * tanh(x / softcap) / temperature"""
    if softcap is not None:
        input = softcap * torch.tanh(input / softcap)
    return input if temperature == 1.0 else input / temperature


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """sample_weight * (cross_entropy(z, t) + z_loss * logsumexp(z)^2), with z the transformed logits

    ``mean`` divides by what torch divides by: the weights of the labels that are not ignored, or the number
    of rows for class probabilities. ``sample_weight`` and ``z_loss`` do not change it.
    """
    logits = transform_logits(input, softcap, temperature)
    if sample_weight is None and z_loss == 0.0:
        return F.cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    rows = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    labels = not target.is_floating_point()
    if z_loss != 0.0:
        penalty = z_loss * torch.logsumexp(logits, dim=0 if logits.ndim == 1 else 1) ** 2
        rows = rows + (penalty.masked_fill(target == ignore_index, 0.0) if labels else penalty)
    if sample_weight is not None:
        rows = (rows * sample_weight).to(rows.dtype)
    if reduction != "mean":
        return rows if reduction == "none" else rows.sum()
    return rows.sum() / (label_weights(target, weight, ignore_index).sum() if labels else rows.numel())


def label_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The class weight of every label (1 without weights), 0 where it is ignored"""
    valid = target != ignore_index
    if weight is None:
        return valid
    # A label out of range has no weight to look up; its loss says what is wrong with it.
    valid = valid & (target >= 0) & (target < len(weight))
    return weight[target.where(valid, 0)] * valid


def token_statistics(logits: Tensor, target: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """log p_t, logsumexp(z) and -sum_c p_c log p_c for each row; 0 where the target is ignored"""
    ignored = target == ignore_index
    log_probabilities = torch.log_softmax(logits.masked_fill(ignored[:, None], 0.0), dim=1)
    log_probs = log_probabilities.gather(1, target.where(~ignored, 0)[:, None])[:, 0]
    # 0 log 0 is 0, also in the gradient
    certain = log_probabilities == float("-inf")
    entropy = -(log_probabilities.exp() * log_probabilities.masked_fill(certain, 0.0)).sum(dim=1)
    log_sum_exp = torch.logsumexp(logits, dim=1)
    log_probs, log_sum_exp, entropy = (v.masked_fill(ignored, 0.0) for v in (log_probs, log_sum_exp, entropy))
    return log_probs, log_sum_exp, entropy
