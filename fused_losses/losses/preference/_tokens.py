"""What preference and policy losses do with log-probabilities of tokens, given or made from hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._common import IGNORED, check_tensors
from ..linear import TokenLogProbs, linear_log_probs


class Head(NamedTuple):
    """Where log-probabilities come from: hidden states (B, T, D), and a weight (C, D) with or without a bias."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def tokens(self, target: Tensor, temperature: float = 1.0) -> TokenLogProbs:
        """Of labels (B, T)."""
        return linear_log_probs(
            self.input, self.weight, target, linear_bias=self.bias, ignore_index=IGNORED, temperature=temperature
        )


class Reference(NamedTuple):
    """A reference model's log-probabilities, or the head they come from."""

    log_probs: Tensor | None
    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def of(self, target: Tensor, temperature: float) -> Tensor | None:
        """Log-probabilities without gradients, or None where there is no reference."""
        if (self.input is None) != (self.weight is None):
            raise ValueError("reference_input and reference_weight come together")
        if self.input is None or self.weight is None:
            return self.log_probs
        if self.log_probs is not None:
            raise ValueError("pass the reference as log-probabilities or as a head, not as both")
        with torch.no_grad():
            return Head(self.input, self.weight, self.bias).tokens(target, temperature).log_probs


def check_tokens(log_probs: Tensor, mask: Tensor, **others: Tensor | None) -> None:
    """Raises where log-probabilities of tokens, their mask and what belongs to them differ in shape or device."""
    check_tensors(input=log_probs, mask=mask, optional=others)
    if log_probs.ndim != 2:
        raise ValueError(f"log_probs must be (B, T), one for each token, got shape {tuple(log_probs.shape)}")
    for name, tensor in {"mask": mask, **others}.items():
        if tensor is not None and tensor.shape != log_probs.shape:
            raise ValueError(
                f"{name} must have the shape {tuple(log_probs.shape)} of log_probs, got {tuple(tensor.shape)}"
            )


def check_pairs(log_probs: Tensor) -> None:
    if len(log_probs) % 2:
        raise ValueError(
            f"pairs come as a batch of all chosen sequences, then all rejected ones; got {len(log_probs)} sequences"
        )


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """The sum over the tokens of every sequence; what is masked may hold anything.  # (B, T) -> (B,)"""
    return values.masked_fill(~mask.bool(), 0.0).sum(dim=1)


def lengths(mask: Tensor) -> Tensor:
    """Tokens of every sequence, at least 1."""
    return mask.sum(dim=1).clamp(min=1)


def negative_log_likelihood(log_probs: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens.  # (B, T) -> ()"""
    return -masked_sum(log_probs, mask).sum() / mask.sum()


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()
