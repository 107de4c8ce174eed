"""The one path every pointwise loss takes: checks, choice of kernels, autograd."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...backends.choice import KERNELS
from ...reference import pointwise as reference
from .._common import (
    check_tensors,
    choose_backend,
    divided_sum,
    is_small,
    learns,
    output_dtype,
    plain,
    reference_gradients,
    wants_graph,
)
from .._gradients import is_made_with_loss, keep, saved, scaled, scales, take

# torch has these as one operator.
TORCH_HAS = {"mse", "l1", "smooth_l1", "huber", "bce", "bce_with_logits"}
# And these as one that is composed of the operations of the reference, which autocast leaves in low precision.
TORCH_COMPOSES = {"kl_div", "kl_div_log_target"}
# The shapes of these must agree, or torch broadcasts them without a word; the others broadcast with a warning.
QUIET = {"bce", "bce_with_logits", "sigmoid_focal", "kl_div", "kl_div_log_target"}
# What the two numbers of a formula are called in its reference.
PARAMETERS = {
    "smooth_l1": ("beta",),
    "huber": ("delta",),
    "charbonnier": ("eps",),
    "sigmoid_focal": ("alpha", "gamma"),
}


def pointwise_loss(
    formula: str,
    input: Tensor,
    target: Tensor,
    a: float = 0.0,
    b: float = 0.0,
    *,
    reduction: str,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The reduced loss of a formula, fused where there are kernels and by the reference elsewhere."""
    if sample_weight is None and normalizer is None and is_small(input, backend) and _is_torchs(formula):
        return _by_reference(formula, a, b, reduction, weight, pos_weight, input, target)
    if formula not in QUIET:
        _warn_broadcast(input, target)
    optional = {"weight": weight, "pos_weight": pos_weight, "sample_weight": sample_weight}
    check_tensors(input=input, target=target, optional=optional)
    input, target = plain(input), plain(target)
    if input.dtype != target.dtype:
        dtype = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(dtype), target.to(dtype)
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    if sample_weight is not None:
        weight = sample_weight if weight is None else weight * sample_weight
    weight, pos_weight = _expanded("weight", weight, input), _expanded("pos_weight", pos_weight, input)
    out_dtype = out_dtype or output_dtype(input)
    if normalizer is not None:
        fused_sum = partial(
            pointwise_loss,
            formula,
            input,
            target,
            a,
            b,
            weight=weight,
            pos_weight=pos_weight,
            backend=backend,
        )
        return divided_sum(fused_sum, out_dtype, reduction, normalizer)
    backend = choose_backend(backend, input, target, weight, pos_weight)
    if backend == "reference" or learns(weight, pos_weight):
        return _by_reference(formula, a, b, reduction, weight, pos_weight, input.to(out_dtype), target.to(out_dtype))
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        return PointwiseFunction.apply(input, target, weight, pos_weight, formula, a, b, reduction, out_dtype, backend)
    forward = KERNELS[backend].pointwise_forward
    return forward(formula, input, target, weight, pos_weight, a, b, reduction, out_dtype)


def _is_torchs(formula: str) -> bool:
    """Whether the reference of a formula is what torch itself runs on a CPU."""
    return formula in TORCH_HAS or (formula in TORCH_COMPOSES and not torch.is_autocast_enabled("cpu"))


def _warn_broadcast(input: Tensor, target: Tensor) -> None:
    if isinstance(input, Tensor) and isinstance(target, Tensor) and target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size ({input.shape}) "
            "broadcasts them against each other, which is rarely meant; give them the same size.",
            stacklevel=4,
        )


def _expanded(name: str, tensor: Tensor | None, input: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    if not tensor.is_floating_point() and not tensor.is_complex():
        tensor = tensor.to(input.dtype)  # a mask
    if tensor.shape == input.shape:
        return tensor
    try:
        return tensor.expand(input.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to the input's {tuple(input.shape)}; "
            f"give it trailing dimensions of size 1, e.g. {name}.view(-1, 1) for one value per row"
        ) from None


def _by_reference(
    formula: str,
    a: float,
    b: float,
    reduction: str,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    input: Tensor,
    target: Tensor,
) -> Tensor:
    options: dict[str, Any] = {}
    if formula in PARAMETERS:
        options.update(zip(PARAMETERS[formula], (a, b)))
    if pos_weight is not None:
        options["pos_weight"] = pos_weight
    return getattr(reference, formula)(input, target, weight, reduction, **options)


class PointwiseFunction(torch.autograd.Function):
    """Saves the inputs; backward recomputes what it needs from them in one pass.

    Where kernels can, the gradients of the loss are made with the loss, which reads the inputs once less.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        formula: str,
        a: float,
        b: float,
        reduction: str,
        out_dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        tensors = input, target, weight, pos_weight
        ctx.formula, ctx.a, ctx.b = formula, a, b
        ctx.reduction, ctx.out_dtype, ctx.backend = reduction, out_dtype, backend
        kernels = KERNELS[backend]
        again = kernels.pointwise_backward_unless_one_ is not None
        ctx.at_once = kernels.pointwise_with_gradients is not None and is_made_with_loss(input, reduction, again)
        if ctx.at_once:
            loss, *gradients = _with_gradients(ctx, tensors)
        else:
            loss, gradients = kernels.pointwise_forward(formula, *tensors, a, b, reduction, out_dtype), []
        keep(ctx, tensors, gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors = saved(ctx)
        if wants_graph():
            gradients = _differentiable(ctx, tensors, grad_output)
        elif ctx.at_once:
            gradients = _of_kept(ctx, tensors, grad_output)
        else:
            gradients = _gradients(ctx, tensors, grad_output)
        return (*gradients, None, None, None, None, None, None, None, None)


def _with_gradients(ctx: Any, tensors: Sequence[Any]) -> Sequence[Tensor]:
    """The loss, and the gradient of each input that needs one for an upstream gradient of 1."""
    options = ctx.a, ctx.b, ctx.reduction, *ctx.needs_input_grad[:2], ctx.out_dtype
    return KERNELS[ctx.backend].pointwise_with_gradients(ctx.formula, *tensors, *options)


def _of_kept(ctx: Any, tensors: Sequence[Any], grad_output: Tensor) -> list[Tensor | None]:
    write_over = KERNELS[ctx.backend].pointwise_backward_unless_one_
    if write_over is None and scales(grad_output):
        return scaled(ctx, grad_output, tensors[:2], lambda: _with_gradients(ctx, tensors)[1:])
    if write_over is None or (kept := take(ctx, grad_output)) is None:
        return _gradients(ctx, tensors, grad_output)
    write_over(ctx.formula, grad_output, *tensors, ctx.a, ctx.b, ctx.reduction, *kept)
    return [gradient if need else None for gradient, need in zip(kept, ctx.needs_input_grad)]


def _gradients(ctx: Any, tensors: Sequence[Any], grad_output: Tensor) -> list[Tensor | None]:
    needed = ctx.needs_input_grad[:2]
    options = ctx.a, ctx.b, ctx.reduction, *needed
    both = KERNELS[ctx.backend].pointwise_backward(ctx.formula, grad_output, *tensors, *options)
    return [gradient if need else None for gradient, need in zip(both, needed)]


def _differentiable(ctx: Any, tensors: Sequence[Any], grad_output: Tensor) -> list[Tensor | None]:
    input, target, weight, pos_weight = tensors
    loss = partial(_by_reference, ctx.formula, ctx.a, ctx.b, ctx.reduction, weight, pos_weight)
    return reference_gradients(
        lambda *pair: loss(*(t.to(ctx.out_dtype) for t in pair)),
        (input, target),
        ctx.needs_input_grad[:2],
        grad_output,
    )
