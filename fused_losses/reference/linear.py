"""Losses of logits that a head makes from hidden states: whole logits, in plain torch.

``input`` is (N, D), ``linear_weight`` (V, D) and ``linear_bias`` (V) or None. The weight may have dimensions
(C, d1, ..., D): then the logits are (N, C, d1, ...).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import softmax


def logits_of(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """x W^T + b"""
    bias = None if linear_bias is None else linear_bias.flatten()
    return F.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, linear_weight.shape[:-1])


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """cross_entropy(x W^T + b, t)"""
    return softmax.cross_entropy(logits_of(input, linear_weight, linear_bias), target, **options)


def log_probs_of(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z_t - logsumexp(z), logsumexp(z) and -sum_c p_c log p_c for each row; 0 where the target is ignored"""
    return softmax.token_statistics(softmax.transform_logits(logits, softcap, temperature), target, ignore_index)


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs_of(x W^T + b, t)"""
    return log_probs_of(logits_of(input, linear_weight, linear_bias), target, ignore_index, softcap, temperature)
