"""Cross entropy straight from hidden states and a head's weight. Reads downward: module, function, autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...backends.fake import accumulate_dtype
from ...reference import linear as reference
from ...reference import softmax as softmax_reference
from ...reference.softmax import label_weights
from .._common import (
    IGNORED,
    check_normalizer,
    check_tensors,
    choose_backend,
    learns,
    output_dtype,
    plain,
    reduction_name,
    reference_gradients,
    wants_graph,
    without_values,
)
from .._gradients import as_inputs, keep, saved, scaled
from ..softmax import Options, check_labels, check_weights, checked_options, checked_target
from ._checks import HeadInput, cast, checked_workspace, head_input
from ._operators import linear_cross_entropy_backward, linear_cross_entropy_forward, operator
from .log_probs import TokenStatistics, token_statistics


class _LinearCrossEntropyLoss(nn.modules.loss._WeightedLoss):
    """torch's module of this name, for versions of torch without it."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ):
        super().__init__(weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)


_BASE: Any = getattr(nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)


class LinearCrossEntropyLoss(_BASE):
    """Cross entropy of a linear layer's output, whose logits are never whole in memory.

    A drop-in for ``torch.nn.LinearCrossEntropyLoss``, with the same parameters and state_dict.

    Formula: :class:`~fused_losses.CrossEntropyLoss` of ``input @ linear.weight.T + linear.bias``

    Args:
        in_features, num_classes, bias, device, dtype: of the linear layer, ``self.linear``.
        out_features: dimensions ``(d1, ..., dK)`` of a K-dimensional loss.
        weight: ``(C)``, one weight per class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``; read at call time.
        ignore_index: rows with this label count nothing; None is -100, and no label for class probabilities.
        label_smoothing: in [0, 1].
        options: of torch's chunking; taken for its signature. Chunks here are sized by ``max_workspace_mb``, sums
            are fp32 and backward may be repeated whatever it says.
        z_loss, softcap, temperature: as in :class:`~fused_losses.CrossEntropyLoss`.
        max_workspace_mb: megabytes (2**20 bytes) for a chunk of logits, at least 32 rows of them; None is 64 on a
            CPU and 512 on a GPU. The loss does not depend on it.
        recompute: keep statistics of rows between forward and backward rather than gradients, and make the logits
            again in backward: less memory, four matrix products instead of three.
        backend: a backend by name; None chooses automatically.

    Shape:
        input ``(D)`` or ``(N, D)``, or with any leading dimensions where ``out_features`` is empty; targets are
        class indices ``()``, ``(N)``, ``(N, d1, ...)``, or the input's leading dimensions; or probabilities of
        the logits' shape. Called as ``loss(input, target, *, sample_weight=None, normalizer=None)`` as in
        :class:`~fused_losses.CrossEntropyLoss`.

    Returns:
        A 0-d tensor, or the shape of class indices for ``"none"``, in the input's dtype (float32 under autocast).

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not fit; for a sharded or empty weight.
        IndexError: on a CPU, for a label out of range (on a GPU that row is NaN).
        ValueError: for a batch size that differs, or an option out of range.

    Example:
        >>> import torch, fused_losses
        >>> loss = fused_losses.LinearCrossEntropyLoss(16, 1000)
        >>> loss(torch.zeros(4, 16), torch.tensor([1, 2, 3, -100]))
        tensor(6.9078, grad_fn=<...>)

    Source: ``torch.nn.LinearCrossEntropyLoss``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        max_workspace_mb: float | None = None,
        recompute: bool = False,
        backend: str | None = None,
        **options: Any,
    ):
        super().__init__(in_features, num_classes, **options)
        self.z_loss = z_loss
        self.softcap = softcap
        self.temperature = temperature
        self.max_workspace_mb = max_workspace_mb
        self.recompute = recompute
        self.backend = backend

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        shape = (self.num_classes, *self.out_features)
        linear_bias = None if self.linear.bias is None else self.linear.bias.view(shape)
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*shape, -1),
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            temperature=self.temperature,
            sample_weight=sample_weight,
            normalizer=normalizer,
            max_workspace_mb=self.max_workspace_mb,
            recompute=self.recompute,
            backend=self.backend,
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    max_workspace_mb: float | None = None,
    recompute: bool = False,
    return_stats: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | Any:
    """Cross entropy of ``input @ linear_weight.T + linear_bias``; see :class:`LinearCrossEntropyLoss`.

    Args:
        linear_weight: ``(C, D)``, or ``(C, d1, ..., dK, D)`` for a K-dimensional loss.
        linear_bias: ``(C)`` or ``(C, d1, ..., dK)``.
        return_stats: also returns :class:`TokenStatistics` of every row, without gradients; for class indices and
            a ``(C, D)`` weight.
        out_dtype: of the loss; None is as :class:`LinearCrossEntropyLoss` says.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head = torch.zeros(2, 3, 16), torch.zeros(1000, 16)
        >>> fused_losses.functional.linear_cross_entropy(hidden, head, torch.ones(2, 3).long())
        tensor(6.9078)
    """
    reduction = reduction_name(None, None, reduction)
    if normalizer is not None:
        check_normalizer(reduction)
    head = head_input(input, linear_weight, linear_bias)
    check_tensors(input=input, target=target, optional={"weight": weight, "sample_weight": sample_weight})
    numbers = checked_options(
        IGNORED if ignore_index is None else ignore_index, label_smoothing, z_loss, softcap, temperature
    )
    target = _target_rows(head, plain(target), ignore_index, numbers)
    sample_weight = None if sample_weight is None else head.rows_of("sample_weight", sample_weight)
    check_weights(head.logits_like(), weight, sample_weight)
    backend = choose_backend(backend, *head[:3], target, weight, sample_weight)
    if return_stats and (target.is_floating_point() or len(head.shape) > 1):
        raise ValueError("return_stats describes rows with a class index each; the target or linear_weight has more")
    call = Call(head.shape, numbers, checked_workspace(max_workspace_mb), head.dtype, backend, return_stats)
    tensors = (*head[:3], target, weight, sample_weight)
    loss, statistics = _reduced(call, tensors, reduction, normalizer, out_dtype or output_dtype(input), recompute)
    loss = loss.view((*head.leading, *head.shape[1:])) if reduction == "none" else loss
    if statistics is None:
        return loss
    return loss, TokenStatistics(*(values.view(head.leading) for values in statistics))


class Call(NamedTuple):
    """What a call of a linear cross entropy asks for beside its tensors."""

    shape: tuple[int, ...]  # of a row's logits
    options: Options
    workspace_mb: float | None
    dtype: torch.dtype  # of the products
    backend: str
    describe: bool

    def numbers(self) -> tuple[Any, ...]:
        """The trailing arguments of the operators, but for what is needed."""
        return (list(self.shape), *self.options, self.workspace_mb, self.dtype, self.backend)


# input, weight, bias, target, class_weight, sample_weight
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


def _target_rows(head: HeadInput, target: Tensor, ignore_index: int | None, numbers: Options) -> Tensor:
    """Class indices (N, d1, ...) or probabilities (N, C, d1, ...)."""
    target, logits = head.rows_of("target", target), head.logits_like()
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError(
            f"ignore_index has no meaning for class probabilities, got {ignore_index}; leave it out, and give "
            "ignored rows a sample_weight of 0"
        )
    if target.is_floating_point() and target.shape == logits.shape:
        target = target.to(head.dtype)
    _, target = checked_target(logits, target, numbers)
    if not target.is_floating_point() and target.is_cpu and not without_values():
        check_labels(logits, target, numbers.ignore_index)
    return target


def _reduced(
    call: Call,
    tensors: Tensors,
    reduction: str,
    normalizer: Tensor | float | None,
    out_dtype: torch.dtype,
    recompute: bool,
) -> tuple[Tensor, TokenStatistics | None]:
    *head, target, class_weight, sample_weight = tensors
    if call.backend == "reference" or learns(class_weight, sample_weight):
        statistics = _statistics_by_reference(call, target, *head)
        if normalizer is None:
            dtype = torch.promote_types(call.dtype, out_dtype)
            return _by_reference(call, tensors[3:], reduction, dtype, *head).to(out_dtype), statistics
        total = _by_reference(call, tensors[3:], "sum", accumulate_dtype(call.dtype), *head)
        return (total / normalizer).to(out_dtype), statistics
    # The gradient of probabilities is as large as the logits: it is made in backward, from losses of rows.
    by_rows = recompute or reduction == "none" or learns(target)
    loss, statistics = _rows_or_sum(call, tensors, "none" if by_rows else "sum")
    loss = loss.sum() if by_rows and reduction != "none" else loss
    if normalizer is not None:
        loss = loss / normalizer
    elif reduction == "mean":
        loss = mean_of_labels(loss, call, target, class_weight)
    return loss.to(out_dtype), statistics


def mean_of_labels(total: Tensor, call: Call, target: Tensor, class_weight: Tensor | None) -> Tensor:
    """The sum over what torch divides by; a mean of nothing is NaN, with a gradient of 0."""
    if target.is_floating_point():
        count = total.new_full((), target.numel() // max(1, call.shape[0]))
    else:
        class_weight = None if class_weight is None else class_weight.to(total.dtype)
        count = label_weights(target, class_weight, call.options.ignore_index).sum()
    return torch.where(count == 0, float("nan"), total / count.where(count != 0, 1))


def _rows_or_sum(call: Call, tensors: Tensors, reduction: str) -> tuple[Tensor, TokenStatistics | None]:
    *head, target, class_weight, sample_weight = tensors
    wide = accumulate_dtype(call.dtype)
    factors = [None if t is None else t.to(wide).contiguous() for t in (class_weight, sample_weight)]
    arguments = (*head, target, *factors)
    if learns(*head, target):
        loss, *described = LinearCrossEntropyFunction.apply(*arguments, call, reduction)
    else:
        losses, *_, statistics, prediction = _forward(call, arguments, (False, False, False), reduction)
        loss, described = losses if reduction == "none" else losses.sum(), (statistics, prediction)
    if not call.describe:
        return loss, None
    statistics, prediction = described
    return loss, token_statistics(statistics, prediction, target, call.options.ignore_index, call.shape[0])


def _forward(call: Call, tensors: Any, needs: Sequence[bool], reduction: str) -> tuple[Tensor, ...]:
    forward = operator(linear_cross_entropy_forward)
    return forward(*tensors, *call.numbers(), list(needs), call.describe, reduction == "none")


def _by_reference(
    call: Call,
    rest: tuple[Tensor, Tensor | None, Tensor | None],
    reduction: str,
    dtype: torch.dtype,
    *head: Any,
) -> Tensor:
    """Plain torch, with everything after the products in a dtype."""
    target, class_weight, sample_weight = rest
    return softmax_reference.cross_entropy(
        reference.logits_of(*cast(call.dtype, *head)).view(len(head[0]), *call.shape).to(dtype),
        target.to(dtype) if target.is_floating_point() else target,
        None if class_weight is None else class_weight.to(dtype),
        call.options.ignore_index,
        reduction,
        call.options.label_smoothing,
        z_loss=call.options.z_loss,
        softcap=call.options.softcap or None,
        temperature=call.options.temperature,
        sample_weight=sample_weight,
    )


def _by_reference_in(call: Call, reduction: str, class_weight: Any, sample_weight: Any, *tensors: Any) -> Tensor:
    """In fp32 or wider, as a function of input, weight, bias and target."""
    *head, target = tensors
    wide = accumulate_dtype(call.dtype)
    return _by_reference(call, (target, class_weight, sample_weight), reduction, wide, *head)


def _statistics_by_reference(call: Call, labels: Tensor, input: Any, weight: Any, bias: Any) -> TokenStatistics | None:
    if not call.describe:
        return None
    with torch.no_grad():
        logits, options = reference.logits_of(input, weight, bias), call.options
        values = reference.log_probs_of(
            logits, labels, options.ignore_index, options.softcap or None, options.temperature
        )
        return TokenStatistics(*values, (logits.argmax(dim=1) == labels) & (labels != options.ignore_index))


class LinearCrossEntropyFunction(torch.autograd.Function):
    """A sum whose gradients forward makes, or losses of rows whose logits backward makes again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        sample_weight: Tensor | None,
        call: Call,
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.call, ctx.reduction = call, reduction
        tensors = input, weight, bias, target, class_weight, sample_weight
        needs = (False, False, False) if reduction == "none" else ctx.needs_input_grad[:3]
        losses, stats, *gradients, statistics, prediction = _forward(call, tensors, needs, reduction)
        ctx.mark_non_differentiable(statistics, prediction)
        keep(ctx, (*tensors, stats), () if reduction == "none" else gradients)
        return losses if reduction == "none" else losses.sum(), statistics, prediction

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, stats = saved(ctx)
        call, needed = ctx.call, ctx.needs_input_grad[:4]
        if wants_graph():
            loss = partial(_by_reference_in, call, ctx.reduction, *tensors[4:])
            gradients = reference_gradients(loss, tensors[:4], needed, grad_output)
        elif ctx.reduction == "none":
            backward = operator(linear_cross_entropy_backward, grad_output)
            made = backward(grad_output, *tensors, stats, *call.numbers(), list(needed[:3]), needed[3])
            gradients = as_inputs(made, tensors[:4], needed)
        else:
            gradients = scaled(ctx, grad_output, tensors[:3], lambda: _forward(call, tensors, needed[:3], "sum")[2:5])
        return (*gradients, *[None] * (8 - len(gradients)))
