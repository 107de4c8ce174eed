"""Gradients that forward has made with the loss, and when they may be taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import LOW_PRECISION, is_batched, without_values

Gradients = Sequence[Tensor]


def is_made_with_loss(input: Tensor, reduction: str) -> bool:
    """Whether one upstream number scales the gradients, without a second rounding that would be seen."""
    return reduction != "none" and input.dtype not in LOW_PRECISION and not without_values()


def scales(factor: Tensor) -> bool:
    """Whether an upstream gradient is one finite number: 0 times infinity is not 0."""
    return not is_batched(factor) and math.isfinite(factor.item())


def keep(ctx: Any, tensors: Sequence[Tensor | None], gradients: Gradients) -> None:
    """Saves a call's tensors, and the gradients of its summed loss for one backward."""
    ctx.counts = len(tensors), len(gradients)
    if without_values():
        ctx.save_for_backward(*tensors, *gradients)
    else:
        ctx.save_for_backward(*tensors)
        ctx.kept = gradients


def saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """The tensors of the call."""
    return ctx.saved_tensors[: ctx.counts[0]]


def scaled(
    ctx: Any, factor: Tensor, like: Sequence[Tensor | None], again: Callable[[], Gradients]
) -> list[Tensor | None]:
    """The kept gradients times the upstream one, each in the dtype of its input.

    The first backward takes the memory itself, so that there is never a second copy of it; another one makes the
    gradients again. In a compiled graph, which backward runs is not known, and a copy is made.
    """
    if without_values():
        return as_inputs([g * factor for g in ctx.saved_tensors[ctx.counts[0] :]], like, ctx.needs_input_grad)
    if is_batched(factor):
        return as_inputs([g * factor for g in getattr(ctx, "kept", None) or again()], like, ctx.needs_input_grad)
    gradients = ctx.__dict__.pop("kept", None) or again()
    return [
        _scale_over(gradient, factor, tensor.dtype) if need and tensor is not None else None
        for gradient, tensor, need in zip(gradients, like, ctx.needs_input_grad)
    ]


def as_inputs(gradients: Gradients, like: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in the dtypes of their inputs; None where nobody asks for one."""
    return [
        gradient.to(tensor.dtype) if need and tensor is not None else None
        for gradient, tensor, need in zip(gradients, like, needed)
    ]


def _scale_over(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in a dtype: in the gradient's own memory where that is its dtype."""
    if gradient.dtype != dtype:
        if gradient.is_cpu and gradient.dtype is torch.float32:
            return torch.ops.fused_losses.scaled(gradient, factor, dtype)
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    if factor.is_cpu and factor.item() == 1.0:  # a number that is here already
        return gradient
    return gradient.mul_(factor)
