"""How far a student's distribution over classes is from a teacher's; imports only torch.

Both are given as logits (..., C); the results have one value for each row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def times_log(log_p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio, 0 where p is 0"""
    p = log_p.exp()
    return p * log_ratio.masked_fill(p == 0, 0.0)


def forward_kl(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """t (log t - log s)"""
    return times_log(log_t, log_t - log_s)


def reverse_kl(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """s (log s - log t)"""
    return times_log(log_s, log_s - log_t)


def jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """beta t (log t - log m) + (1 - beta) s (log s - log m), with m = beta t + (1 - beta) s"""
    # With no probability in either, m has no derivative, and needs none.
    absent = (log_t == -math.inf) & (log_s == -math.inf)
    parts = log_t + math.log(beta), log_s + math.log1p(-beta)
    log_m = torch.logaddexp(*(part.masked_fill(absent, 0.0) for part in parts))
    return beta * times_log(log_t, log_t - log_m) + (1.0 - beta) * times_log(log_s, log_s - log_m)


def tvd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """|s - t| / 2"""
    return 0.5 * (log_s.exp() - log_t.exp()).abs()


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "tvd": tvd}


def divergence(student: Tensor, teacher: Tensor, name: str, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """The sum over classes of a divergence of s = softmax(student / temperature) and t, likewise"""
    log_s, log_t = (torch.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return DIVERGENCES[name](log_s, log_t, beta).sum(dim=-1)
