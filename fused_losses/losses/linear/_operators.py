"""Linear losses as operators: what is between hidden states and losses, chunk by chunk.

Called as they are, or by ``torch.ops.fused_losses`` in a compiled graph, which cannot look inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.choice import KERNELS, resolve
from ...backends.fake import accumulate_dtype
from .._common import is_batched, without_values
from ..softmax import Options
from ._head import Head, HeadGradients, Needs, Rows, logit_chunks, rows_that_count
from ._labels import TiledCrossEntropy
from ._tiles import TiledRows

Gradients = tuple[Tensor, Tensor, Tensor]


def linear_cross_entropy_forward(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    target: Tensor,  # (N, d1, ...) class indices or (N, C, d1, ...) probabilities
    class_weight: Tensor | None,  # (C)
    sample_weight: Tensor | None,  # (N, d1, ...)
    shape: Sequence[int],  # (C, d1, ...), whose product is V
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
    workspace_mb: float | None,
    dtype: torch.dtype,
    backend: str,
    needs: Sequence[bool],
    describe: bool,
    by_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their sum or, where nobody asks for those, the statistics of the rows.

    Described, rows have those of ``row_statistics`` and its predictions, too. ``by_rows`` says that backward makes the
    gradients; then the losses are the same without any.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    head, wide = Head.cast(weight, bias, dtype), accumulate_dtype(dtype)
    kernels = KERNELS[resolve(input.device.type, dtype, backend)]
    if by_rows and _goes_by_tiles(target):
        tiled = TiledCrossEntropy(kernels, head, input, target, class_weight, sample_weight, options, workspace_mb)
        losses, statistics, prediction = tiled.losses()
        described = (statistics, prediction) if describe else _described(input, wide, False)
        return losses, statistics[:2].clone(), *HeadGradients(head, 0, Needs(*needs)).tensors(), *described
    losses = input.new_zeros((len(input), *shape[1:]), dtype=wide)
    stats = input.new_zeros((2, 0 if any(needs) else len(input), *shape[1:]), dtype=wide)
    counted = rows_that_count(target, ignore_index)
    gradients = HeadGradients(head, len(input), Needs(*needs), counted)
    described = _described(input, wide, describe)
    for rows, part, logits in logit_chunks(input, head, workspace_mb, counted):
        arguments = logits.unflatten(1, shape), target[rows], class_weight, _part(sample_weight, rows)
        if describe:
            of_chunk = kernels.row_statistics(logits, target[rows], None, softcap, temperature)
            described[0][:, rows], described[1][rows] = of_chunk
        if any(needs):
            losses[rows] = kernels.cross_entropy_with_gradient_(*arguments, *options)
            gradients.add(rows, part, logits)
        else:
            losses[rows], of_rows = kernels.cross_entropy_forward(*arguments, "none", *options, wide)
            stats[:, rows] = of_rows[:-1].view(2, *losses[rows].shape)
    return losses, stats, *gradients.tensors(), *described


def _described(input: Tensor, wide: torch.dtype, describe: bool) -> tuple[Tensor, Tensor]:
    rows = input.shape[0] if describe else 0
    return input.new_zeros((5, rows), dtype=wide), input.new_zeros((rows,), dtype=torch.int64)


def linear_cross_entropy_backward(
    grad_losses: Tensor,  # as the losses
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    stats: Tensor,
    shape: Sequence[int],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
    workspace_mb: float | None,
    dtype: torch.dtype,
    backend: str,
    needs: Sequence[bool],
    needs_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for an upstream gradient of every row; the logits are made again."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    head = Head.cast(weight, bias, dtype)
    kernels, one = KERNELS[resolve(input.device.type, dtype, backend)], stats.new_ones(1)
    if _goes_by_tiles(target):
        tiled = TiledCrossEntropy(kernels, head, input, target, class_weight, sample_weight, options, workspace_mb)
        return *tiled.gradients(grad_losses, stats, Needs(*needs)), target.new_empty(0)
    counted = rows_that_count(target, ignore_index)
    gradients = HeadGradients(head, len(input), Needs(*needs), counted)
    of_target = torch.empty_like(target) if needs_target else target.new_empty(0)
    for rows, part, logits in logit_chunks(input, head, workspace_mb, counted):
        of_rows = torch.cat([stats[:, rows].flatten(), one])
        arguments = logits.unflatten(1, shape), target[rows], class_weight, _part(sample_weight, rows), of_rows
        arguments = grad_losses[rows], *arguments, "none", *options
        if needs_target:
            of_target[rows] = kernels.cross_entropy_target_backward(*arguments)
        kernels.cross_entropy_backward_(*arguments)
        gradients.add(rows, part, logits)
    of_input, of_weight, of_bias = gradients.tensors()
    return of_input, of_weight.to(dtype), of_bias, of_target


def _goes_by_tiles(target: Tensor) -> bool:
    """Whether rows have a class index each, on a CPU; a GPU's kernels for whole rows need fewer passes."""
    return target.is_cpu and not target.is_floating_point() and target.ndim == 1


def linear_log_probs_forward(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    labels: Tensor,  # (N)
    ignore_index: int,
    softcap: float,
    temperature: float,
    workspace_mb: float | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What ``row_statistics`` says of every row's logits: the statistics (5, N) and the predictions (N)."""
    head, kernels = Head.cast(weight, bias, dtype), KERNELS[resolve(input.device.type, dtype, backend)]
    # Backward multiplies another way: an only class would not have a probability of exactly 1.
    if kernels.head_statistics is not None and dtype is not torch.float64 and len(weight) > 1:
        return kernels.head_statistics(input.to(dtype), *head, labels, softcap, temperature)
    options = ignore_index, None, softcap, temperature, workspace_mb
    return TiledRows(kernels, head, input, labels, *options).statistics()


def linear_log_probs_backward(
    upstream: Tensor,  # (3, N), of log-probability, log-sum-exp and entropy
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,  # (5, N)
    ignore_index: int,
    softcap: float,
    temperature: float,
    workspace_mb: float | None,
    dtype: torch.dtype,
    backend: str,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of the head; the logits are made again."""
    head, kernels = Head.cast(weight, bias, dtype), KERNELS[resolve(input.device.type, dtype, backend)]
    of_label, of_log_sum_exp, of_entropy = upstream.to(statistics.dtype)
    entropy = statistics[1] + statistics[4]
    # dz = p (of_log_sum_exp - of_entropy (entropy + log p)) - of_label (p - 1 at the label, else p)
    excess = of_log_sum_exp - of_entropy * entropy
    coefficients = torch.stack([excess, -of_label, -of_entropy, torch.zeros_like(excess)])
    coefficients.masked_fill_(labels == ignore_index, 0.0)
    coefficients[1].masked_fill_(((labels < 0) | (labels >= len(weight))) & (labels != ignore_index), float("nan"))
    tiled = TiledRows(kernels, head, input, labels, ignore_index, None, softcap, temperature, workspace_mb)
    return tiled.gradients(lambda rows: (statistics[:, rows], coefficients[:, rows]), Needs(*needs))


def linear_divergence(
    input: Tensor,  # (N, D) of the student
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V)
    teacher_input: Tensor,  # (N, D')
    teacher_weight: Tensor,  # (V, D')
    teacher_bias: Tensor | None,  # (V)
    labels: Tensor,  # (N); only those that are ignored matter without hard labels
    row_weight: Tensor,  # (N), the upstream gradient of every row
    divergence: str,
    beta: float,
    temperature: float,
    soft: float,  # factors of the divergence and of the labels' cross entropy
    hard: float,
    ignore_index: int,
    workspace_mb: float | None,
    dtype: torch.dtype,
    backend: str,
    needs: Sequence[bool],
    teacher_needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of every row, and gradients of their sum weighted by row: of the student's head, then the teacher's."""
    kernels, kind = KERNELS[resolve(input.device.type, dtype, backend)], (divergence, beta, temperature)
    heads = Head.cast(weight, bias, dtype), Head.cast(teacher_weight, teacher_bias, dtype)
    counted = rows_that_count(labels, ignore_index)
    losses = input.new_zeros(len(input), dtype=accumulate_dtype(dtype))
    gradients = [HeadGradients(h, len(input), Needs(*n), counted) for h, n in zip(heads, (needs, teacher_needs))]
    asked, buffers = (any(needs), any(teacher_needs)), 2 if hard == 0.0 else 3
    chunks = [logit_chunks(i, head, workspace_mb, counted, buffers) for i, head in zip((input, teacher_input), heads)]
    for (rows, part, student), (_, teacher_part, teacher) in zip(*chunks):
        upstream, of_labels = row_weight[rows], student.clone() if hard != 0.0 else None
        of_rows, statistics = kernels.divergence_forward(student, teacher, *kind)
        losses[rows] = soft * of_rows
        if any(asked):
            kernels.divergence_backward_(soft * upstream, student, teacher, statistics, *kind, *asked)
        if of_labels is not None:
            options = labels[rows], None, None, ignore_index, 0.0, 0.0, 0.0, 1.0
            losses[rows] += hard * kernels.cross_entropy_with_gradient_(of_labels, *options)
            student.addcmul_(of_labels, (hard * upstream)[:, None].to(student.dtype))
        if asked[0]:
            gradients[0].add(rows, part, student)
        if asked[1]:
            gradients[1].add(rows, teacher_part, teacher)
    return losses, *gradients[0].tensors(), *gradients[1].tensors()


def _divergence_shapes(
    input: Tensor, weight: Tensor, bias: Any, teacher_input: Tensor, teacher_weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    dtype, needs, teacher_needs = rest[-4], rest[-2], rest[-1]
    losses = input.new_empty((input.shape[0],), dtype=accumulate_dtype(dtype))
    of_student = gradient_shapes(input, weight, dtype, needs)
    return losses, *of_student, *gradient_shapes(teacher_input, teacher_weight, dtype, teacher_needs)


def _part(tensor: Tensor | None, rows: Rows) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def gradient_shapes(input: Tensor, weight: Tensor, dtype: torch.dtype, needs: Sequence[bool]) -> Gradients:
    wide = accumulate_dtype(dtype)
    return (
        input.new_empty(input.shape if needs[0] else (0,), dtype=dtype),
        input.new_empty(weight.shape if needs[1] else (0,), dtype=wide),
        input.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=wide),
    )


def _shapes_by_rows(input: Tensor, weight: Tensor, dtype: torch.dtype, needs: Sequence[bool]) -> Gradients:
    """Where upstream gradients are in it already, the weight's is of the head's dtype."""
    of_input, of_weight, of_bias = gradient_shapes(input, weight, dtype, needs)
    return of_input, of_weight.to(dtype), of_bias


def _forward_shapes(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape, dtype, needs, describe = rest[4], rest[-5], rest[-3], rest[-2]
    losses = input.new_empty((input.shape[0], *shape[1:]), dtype=accumulate_dtype(dtype))
    stats = losses.new_empty((2, 0 if any(needs) else input.shape[0], *shape[1:]))
    gradients = gradient_shapes(input, weight, dtype, needs)
    return losses, stats, *gradients, *_described(input, losses.dtype, describe)


def _described_shapes(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _described(input, accumulate_dtype(rest[-2]), True)


def _backward_shapes(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    return _shapes_by_rows(input, weight, rest[-3], rest[-1])


def _backward_shapes_with_target(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    target, needs_target = rest[1], rest[-1]
    gradients = _shapes_by_rows(input, weight, rest[-4], rest[-2])
    return *gradients, torch.empty_like(target) if needs_target else target.new_empty((0,))


_LIBRARY = torch.library.Library("fused_losses", "FRAGMENT")


def register(function: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Makes a function of this family an operator, with a function of the shapes of its results."""
    name = function.__name__
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_losses::{name}", shapes, lib=_LIBRARY)


register(linear_cross_entropy_forward, _forward_shapes)
register(linear_cross_entropy_backward, _backward_shapes_with_target)
register(linear_log_probs_forward, _described_shapes)
register(linear_log_probs_backward, _backward_shapes)
register(linear_divergence, _divergence_shapes)


def operator(function: Callable[..., Any], *upstream: Tensor) -> Callable[..., Any]:
    """The function itself, or its operator in a compiled graph and for batches of upstream gradients."""
    if without_values() or any(map(is_batched, upstream)):
        return getattr(torch.ops.fused_losses, function.__name__).default
    return function
