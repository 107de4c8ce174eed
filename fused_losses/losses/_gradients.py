"""Gradients that forward has made with the loss, and when they may be taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.loading import unavailable_reason
from ._common import LOW_PRECISION, is_batched, without_values

Gradients = Sequence[Tensor]


def is_made_with_loss(input: Tensor, reduction: str, again: bool = False) -> bool:
    """Whether gradients are made for an upstream number of 1, without a second rounding that would be seen.

    ``again``: for another number kernels make them again, so that nothing is rounded twice. In fp16 that would be
    always: its losses are scaled.
    """
    exact = input.dtype not in LOW_PRECISION or (again and input.dtype is torch.bfloat16)
    return reduction != "none" and exact and not without_values()


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


def take(ctx: Any, factor: Tensor) -> Gradients | None:
    """The kept gradients, for kernels that write over them unless the upstream number is 1: a GPU alone knows it.

    None where a backward has taken them already, or a batch of upstream numbers asks for them.
    """
    return None if is_batched(factor) else ctx.__dict__.pop("kept", None)


def as_inputs(gradients: Gradients, like: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in the dtypes of their inputs; None where nobody asks for one."""
    return [
        gradient.to(tensor.dtype) if need and tensor is not None else None
        for gradient, tensor, need in zip(gradients, like, needed)
    ]


def _scale_over(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in a dtype: in the gradient's own memory where that is its dtype."""
    if gradient.dtype != dtype:
        extension = "_C_cpu" if gradient.is_cpu else "_C_cuda"
        if gradient.dtype is torch.float32 and unavailable_reason(extension) is None:
            return torch.ops.fused_losses.scaled(gradient, factor, dtype)
        return gradient.mul_(factor).to(dtype)
    if factor.is_cpu and factor.item() == 1.0:  # a number that is here already
        return gradient
    return gradient.mul_(factor)
