"""Losses of a softmax over classes. Reads downward: module, function, autograd."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.choice import KERNELS
from ..backends.fake import accumulate_dtype, label_shape
from ..reference import softmax as reference
from ._common import (
    check_tensors,
    choose_backend,
    divided_sum,
    is_small,
    output_dtype,
    plain,
    reduction_name,
    reference_gradients,
    wants_graph,
)
from ._gradients import is_made_with_loss, keep, saved, scaled, scales

# Looking at labels on a GPU waits for the device, so it is only done when asked for.
DEBUG = os.environ.get("FUSED_LOSSES_DEBUG", "0") == "1"


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross entropy of logits, a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Formula: ``w_y (logsumexp(z) - z_y)`` for a class index ``y``, with ``z = softcap tanh(x / softcap) /
    temperature``; ``sum_c w_c t_c (logsumexp(z) - z_c)`` for class probabilities ``t``. Smoothing replaces
    the target by ``(1 - label_smoothing) t + label_smoothing / C``, and ``z_loss logsumexp(z)^2`` is added.

    Args:
        weight: ``(C)``, of the logits' dtype, one weight per class.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this label count nothing and get a gradient of exactly 0.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``; read at call time. ``"mean"`` divides by the weights of
            the labels that are not ignored, or by the number of rows for class probabilities.
        label_smoothing: in [0, 1].
        z_loss: factor of the squared log-sum-exp (PaLM uses 1e-4); 0 is off.
        softcap: bounds the logits by ``softcap * tanh(logits / softcap)`` (Gemma 2 uses 30); None is off.
        temperature: divides the logits, after the softcap.
        inplace_backward: lets backward write the gradient over the logits, which saves their size in memory.
            Another use of the logits in the graph then raises; reading their values after backward finds the
            gradient. Needs logits that are not a leaf. Where no kernel can do so, a new tensor is made.
        backend: a backend by name; None chooses automatically.

    Shape:
        logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)`` in any memory layout, float64, float32, bfloat16 or
        float16; targets are int64 class indices ``()``, ``(N)`` or ``(N, d1, ...)``, or probabilities of the
        logits' shape. Called as ``loss(input, target, *, sample_weight=None, normalizer=None)``:
        ``sample_weight`` has the class indices' shape and multiplies each row's loss, ``normalizer`` (number or
        0-d tensor, for instance a global token count) replaces the denominator of ``"mean"``.

    Returns:
        A 0-d tensor, or the class indices' shape for ``"none"``, in the logits' dtype (float32 under autocast).

    Raises:
        ValueError: for a batch size that differs, an unknown reduction, z_loss, softcap or temperature out of
            range.
        IndexError: on a CPU, for a label out of range. On a GPU, where looking would wait for the device, that
            row's loss and gradient are NaN; ``FUSED_LOSSES_DEBUG=1`` looks, and raises there too.
        RuntimeError: for other shapes and dtypes that do not fit, and tensors on different devices.

    Example:
        >>> import torch, fused_losses
        >>> loss = fused_losses.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
        >>> loss(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        tensor(0.2274)

    Source: :class:`torch.nn.CrossEntropyLoss`; z_loss from Chowdhery et al., PaLM, 2022.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = -100,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        inplace_backward: bool = False,
        backend: str | None = None,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.temperature = temperature
        self.inplace_backward = inplace_backward
        self.backend = backend

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            temperature=self.temperature,
            sample_weight=sample_weight,
            normalizer=normalizer,
            inplace_backward=self.inplace_backward,
            backend=self.backend,
        )


class Options(NamedTuple):
    """What a softmax loss does with its logits: the trailing numbers of its operators, in their order."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0 is off
    temperature: float


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    inplace_backward: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of logits; see :class:`CrossEntropyLoss` for the arguments.

    Args:
        out_dtype: of the loss; None is as :class:`CrossEntropyLoss` says.

    Example:
        >>> import torch, fused_losses
        >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, -100])
        >>> fused_losses.functional.cross_entropy(logits, target, reduction="none")
        tensor([0.1269, 0.0000])
    """
    reduction = reduction_name(size_average, reduce, reduction)
    plainly = z_loss == 0.0 and softcap is None and temperature == 1.0 and sample_weight is None and normalizer is None
    if plainly and out_dtype is None and label_smoothing >= 0.0 and is_small(input, backend):
        try:
            return reference.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        except (RuntimeError, TypeError, ValueError, IndexError):
            pass  # the checks below say the same and the way out
    check_tensors(input=input, target=target, optional={"weight": weight, "sample_weight": sample_weight})
    options = checked_options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    input, target = checked_target(plain(input), plain(target), options)
    check_weights(input, weight, sample_weight)
    fused = partial(_softmax_loss, input, target, weight, sample_weight, options, inplace_backward, backend)
    if normalizer is not None:
        return divided_sum(fused, out_dtype or output_dtype(input), reduction, normalizer)
    return fused(reduction, out_dtype or output_dtype(input))


def checked_options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, temperature: float
) -> Options:
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must be 0 (off) or more, got {z_loss}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be above 0, got {softcap}; None switches it off")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return Options(ignore_index, float(label_smoothing), float(z_loss), softcap or 0.0, float(temperature))


def checked_target(input: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Input and target in dtypes the kernels take, or an error that says which shape was expected."""
    if input.ndim == 0:
        raise RuntimeError("logits need a class dimension: (C), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    if target.shape == input.shape:
        return _checked_probabilities(input, target, options)
    if target.dtype is torch.uint8:
        target = target.long()
    elif target.dtype is not torch.int64:
        raise RuntimeError(
            f"class indices must be int64, got {target.dtype}: target.long(); class probabilities must have "
            f"the logits' shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    expected = label_shape(input)
    if target.shape != expected:
        _raise_target_shape(input, target, expected)
    if DEBUG and target.device.type != "cpu":
        check_labels(input, target, options.ignore_index)
    return input, target


def check_labels(input: Tensor, target: Tensor, ignore_index: int) -> None:
    classes = input.shape[0 if input.ndim == 1 else 1]
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        raise IndexError(f"Target {target[outside][0].item()} is out of bounds for {classes} classes")


def _checked_probabilities(input: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    if not target.is_floating_point():
        raise RuntimeError(
            f"a target of the logits' shape {tuple(input.shape)} holds class probabilities, which are "
            f"floating, got {target.dtype}; class indices have shape {tuple(label_shape(input))}"
        )
    if options.ignore_index >= 0:
        raise RuntimeError(
            f"ignore_index is not supported for class probabilities, got {options.ignore_index}; "
            "give ignored rows a sample_weight of 0"
        )
    if input.dtype != target.dtype:
        dtype = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(dtype), target.to(dtype)
    return input, target


def _raise_target_shape(input: Tensor, target: Tensor, expected: tuple[int, ...]) -> None:
    message = (
        f"class indices for logits of shape {tuple(input.shape)} must have shape {tuple(expected)}, "
        f"got {tuple(target.shape)}"
    )
    if input.ndim > 2 and target.shape == input.shape[:-1]:
        message += "; classes are dimension 1: pass logits.flatten(0, -2) and target.flatten()"
    if target.ndim > 0 and len(expected) > 0 and target.shape[0] != expected[0]:
        raise ValueError(
            f"Expected input batch_size ({expected[0]}) to match target batch_size ({target.shape[0]}): {message}"
        )
    raise RuntimeError(message)


def check_weights(input: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> None:
    if weight is not None:
        classes = input.shape[0 if input.ndim == 1 else 1]
        if weight.shape != (classes,):
            raise RuntimeError(
                f"weight must have one value for each of the {classes} classes, got shape {tuple(weight.shape)}"
            )
        if weight.dtype is not input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise RuntimeError(
                f"weight must have the logits' dtype {input.dtype}, got {weight.dtype}: weight.to(logits.dtype)"
            )
    if sample_weight is not None and sample_weight.shape != label_shape(input):
        raise ValueError(
            f"sample_weight must have one value per row, shape {tuple(label_shape(input))}, "
            f"got {tuple(sample_weight.shape)}"
        )


def _softmax_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
    inplace_backward: bool,
    backend: str | None,
    reduction: str,
    out_dtype: torch.dtype,
) -> Tensor:
    grad = torch.is_grad_enabled()
    backend = choose_backend(backend, input, target, weight, sample_weight)
    learnt_weights = grad and any(w is not None and w.requires_grad for w in (weight, sample_weight))
    if backend == "reference" or learnt_weights:
        wide = target.to(out_dtype) if target.is_floating_point() else target
        return _by_reference(weight, sample_weight, options, reduction, input.to(out_dtype), wide)
    accumulate = accumulate_dtype(input.dtype)
    weight = weight.to(accumulate).contiguous() if weight is not None else None
    sample_weight = sample_weight.to(accumulate).contiguous() if sample_weight is not None else None
    if grad and (input.requires_grad or target.requires_grad):
        if inplace_backward:
            _check_inplace(input)
        return CrossEntropyFunction.apply(
            input, target, weight, sample_weight, options, reduction, out_dtype, inplace_backward, backend
        )
    forward = KERNELS[backend].cross_entropy_forward
    return _computed(forward, input, target, weight, sample_weight, reduction, *options, out_dtype)[0]


def _computed(forward: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():
        return forward(*arguments)
    try:
        return forward(*arguments)
    except RuntimeError as error:
        # The stable ABI can only raise RuntimeError; torch raises IndexError for this.
        label = re.search(r"Target -?\d+ is out of bounds for \d+ classes", str(error))
        if label is None:
            raise
        raise IndexError(f"{label[0]}; class indices are 0 to classes - 1, or ignore_index") from None


def _check_inplace(input: Tensor) -> None:
    if input.is_leaf:
        raise ValueError(
            "inplace_backward writes the gradient over the logits, which a leaf that requires grad does not "
            "allow; pass the output of a layer, or leave inplace_backward off"
        )


def _by_reference(
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
    reduction: str,
    input: Tensor,
    target: Tensor,
) -> Tensor:
    return reference.cross_entropy(
        input,
        target,
        weight if weight is None else weight.to(input.dtype),
        options.ignore_index,
        reduction,
        options.label_smoothing,
        z_loss=options.z_loss,
        softcap=options.softcap or None,
        temperature=options.temperature,
        sample_weight=sample_weight,
    )


class CrossEntropyFunction(torch.autograd.Function):
    """Saves the inputs and each row's maximum and log-sum; backward recomputes the softmax from them.

    Where a CPU's kernels can, the gradient of the loss is made with the loss, while the logits are in the caches.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        options: Options,
        reduction: str,
        out_dtype: torch.dtype,
        inplace_backward: bool,
        backend: str,
    ) -> Tensor:
        arguments = input, target, weight, sample_weight, reduction, *options, out_dtype
        kernels = KERNELS[backend]
        with_gradient = kernels.cross_entropy_with_gradient
        one = not inplace_backward and ctx.needs_input_grad[:2] == (True, False)
        ctx.at_once = one and with_gradient is not None and is_made_with_loss(input, reduction)
        forward: Any = with_gradient if ctx.at_once else kernels.cross_entropy_forward
        loss, stats, *gradients = _computed(forward, *arguments)
        keep(ctx, (input, target, weight, sample_weight, stats), gradients)
        ctx.options, ctx.reduction, ctx.out_dtype = options, reduction, out_dtype
        ctx.inplace_backward, ctx.backend = inplace_backward, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors = saved(ctx)  # once: a checkpoint recomputes them for one access only
        input, target, weight, sample_weight, _ = tensors
        needed = ctx.needs_input_grad[:2]
        if wants_graph():
            loss = partial(_by_reference, weight, sample_weight, ctx.options, ctx.reduction)
            gradients = reference_gradients(
                lambda x, t: loss(x.to(ctx.out_dtype), t.to(ctx.out_dtype) if t.is_floating_point() else t),
                (input, target),
                needed,
                grad_output,
            )
        elif ctx.at_once and scales(grad_output):
            gradients = [*scaled(ctx, grad_output, (input,), lambda: _made_again(ctx, tensors)), None]
        else:
            gradients = _gradients(ctx, tensors, grad_output, needed)
        return (*gradients, None, None, None, None, None, None, None)


def _made_again(ctx: Any, tensors: tuple[Any, ...]) -> Sequence[Tensor]:
    with_gradient = KERNELS[ctx.backend].cross_entropy_with_gradient
    return with_gradient(*tensors[:-1], ctx.reduction, *ctx.options, ctx.out_dtype)[2:]


def _gradients(
    ctx: Any, tensors: tuple[Any, ...], grad_output: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    arguments = (grad_output, *tensors, ctx.reduction, *ctx.options)
    kernels, input = KERNELS[ctx.backend], tensors[0]
    grad_target = kernels.cross_entropy_target_backward(*arguments) if needed[1] else None
    if not needed[0]:
        return [None, grad_target]
    if ctx.inplace_backward and not torch.compiler.is_compiling():
        gradient = input.detach()
        kernels.cross_entropy_backward_(grad_output, gradient, *arguments[2:])
        # A raw operator does not count as a change: without this a later use would read the gradient.
        torch.autograd.graph.increment_version(input)
        return [gradient, grad_target]
    return [kernels.cross_entropy_backward(*arguments), grad_target]
