"""Distillation over two heads: neither's logits are ever whole in memory."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...backends.fake import accumulate_dtype
from ...reference import divergence as divergence_reference
from ...reference import linear as reference
from ...reference import softmax as softmax_reference
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
)
from .._gradients import as_inputs, keep, saved, scaled
from ..divergence import Kind, divergence_kind, reduce_rows
from ..softmax import checked_options
from ._checks import HeadInput, cast, checked_workspace, head_input
from ._operators import linear_divergence, operator
from .log_probs import label_rows


class LinearJSDLoss(nn.Module):
    """Jensen-Shannon divergence of two heads' distributions, mixed with the cross entropy of labels.

    Formula: ``soft_weight JSD_beta(s, t) + hard_weight cross_entropy(x, target)`` for each row, with ``x`` the
    student's logits, ``s = softmax(x / temperature)``, ``t`` likewise the teacher's, and the divergence of
    :class:`~fused_losses.JSDLoss`

    Args:
        beta, temperature, ignore_index, reduction: as in :class:`~fused_losses.JSDLoss`.
        soft_weight, hard_weight: factors of the divergence and of the labels' cross entropy; a hard_weight other
            than 0 needs labels.
        max_workspace_mb: as in :class:`~fused_losses.LinearCrossEntropyLoss`.
        backend: a backend by name; None chooses automatically.

    Shape:
        student_input ``(..., D)``, student_weight ``(C, D)``, teacher_input ``(..., D')``, teacher_weight ``(C, D')``,
        of one dtype or under autocast; target ``(...)``, class labels, or None. Called as ``loss(student_input,
        student_weight, teacher_input, teacher_weight, target=None, *, student_bias=None, teacher_bias=None,
        sample_weight=None, normalizer=None)``.

    Returns:
        A 0-d tensor, or ``(...)`` for ``"none"``, in the student's dtype (float32 under autocast).

    Raises:
        ValueError: for beta, temperature or a reduction out of range, or labels that are missing.
        RuntimeError: as :class:`~fused_losses.LinearCrossEntropyLoss`, and for vocabularies that differ.

    Example:
        >>> import torch, fused_losses
        >>> student, teacher = torch.ones(2, 3, 4), torch.ones(2, 3, 8)
        >>> heads = torch.zeros(50, 4), torch.eye(50, 8)
        >>> fused_losses.LinearJSDLoss()(student, heads[0], teacher, heads[1])
        tensor(0.0222)

    Source: Agarwal et al., On-Policy Distillation of Language Models, 2024; ``LigerFusedLinearJSD``.
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = IGNORED,
        reduction: str = "mean",
        *,
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self.beta, self.temperature, self.ignore_index = beta, temperature, ignore_index
        self.soft_weight, self.hard_weight = soft_weight, hard_weight
        self.reduction, self.max_workspace_mb, self.backend = reduction, max_workspace_mb, backend

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        target: Tensor | None = None,
        **extras: Any,
    ) -> Tensor:
        return linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            target,
            beta=self.beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            soft_weight=self.soft_weight,
            hard_weight=self.hard_weight,
            max_workspace_mb=self.max_workspace_mb,
            backend=self.backend,
            **extras,
        )


class LinearKLDivLoss(LinearJSDLoss):
    """Kullback-Leibler divergence of two heads' distributions, mixed with the cross entropy of labels.

    Formula: ``soft_weight KL(t || s) + hard_weight cross_entropy(x, target)`` for each row, ``KL(s || t)`` with
    ``reverse``; ``x``, ``s`` and ``t`` as in :class:`LinearJSDLoss`

    Args:
        reverse: takes the divergence the other way round, which seeks modes rather than covers them.
        temperature, ignore_index, reduction, soft_weight, hard_weight, max_workspace_mb, backend: as in
            :class:`LinearJSDLoss`.

    Shapes, result and errors are those of :class:`LinearJSDLoss`.

    Example:
        >>> import torch, fused_losses
        >>> student, teacher = torch.ones(2, 3, 4), torch.ones(2, 3, 8)
        >>> heads = torch.zeros(50, 4), torch.eye(50, 8)
        >>> fused_losses.LinearKLDivLoss()(student, heads[0], teacher, heads[1])
        tensor(0.0983)

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        ignore_index: int = IGNORED,
        reduction: str = "mean",
        *,
        reverse: bool = False,
        **options: Any,
    ):
        super().__init__(1.0 if reverse else 0.0, temperature, ignore_index, reduction, **options)


def linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Jensen-Shannon divergence over two heads; see :class:`LinearJSDLoss`.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head = torch.zeros(2, 4), torch.zeros(50, 4)
        >>> fused_losses.functional.linear_jsd(hidden, head, hidden, head, torch.tensor([1, 2]), hard_weight=0.5)
        tensor(1.9560)
    """
    reduction = reduction_name(None, None, reduction)
    if normalizer is not None:
        check_normalizer(reduction)
    student = head_input(student_input, student_weight, student_bias)
    teacher = head_input(teacher_input, teacher_weight, teacher_bias)
    check_tensors(
        input=student_input,
        teacher_input=teacher_input,
        optional={"target": target, "sample_weight": sample_weight},
    )
    _check_heads(student, teacher)
    if target is None and hard_weight != 0.0:
        raise ValueError(f"hard_weight={hard_weight} is of labels: pass target, or leave hard_weight at 0")
    labels = _labels(student, target, ignore_index)
    kind = divergence_kind(beta, temperature)
    backend = choose_backend(backend, *student[:3], *teacher[:3], labels)
    call = Call(kind, float(soft_weight), float(hard_weight), ignore_index, checked_workspace(max_workspace_mb))
    call = call._replace(dtype=student.dtype, backend=backend)
    counted = labels != ignore_index
    weight = torch.ones_like(labels, dtype=accumulate_dtype(student.dtype))
    if sample_weight is not None:
        weight = student.rows_of("sample_weight", sample_weight).to(weight.dtype)
    tensors = (*student[:3], *teacher[:3], labels)
    if _goes_by_rows(tensors, weight, reduction, backend):
        losses = _rows(call, tensors)
        loss = reduce_rows(losses, counted, None if sample_weight is None else weight, reduction, normalizer)
    else:
        total = LinearDivergenceFunction.apply(*tensors, weight.masked_fill(~counted, 0.0), call)
        denominator = counted.sum() if normalizer is None else normalizer
        loss = total if reduction == "sum" else total / denominator
    loss = loss.view(student.leading) if reduction == "none" else loss
    return loss.to(output_dtype(student_input))


class Call(NamedTuple):
    """What a call asks for beside its tensors."""

    kind: Kind
    soft: float
    hard: float
    ignore_index: int
    workspace_mb: float | None
    dtype: torch.dtype = torch.float32
    backend: str = ""

    def numbers(self) -> tuple[Any, ...]:
        """The trailing arguments of the operator, but for what is needed."""
        return (*self.kind, self.soft, self.hard, self.ignore_index, self.workspace_mb, self.dtype, self.backend)


def _check_heads(student: HeadInput, teacher: HeadInput) -> None:
    if len(student.shape) != 1 or student.shape != teacher.shape:
        raise RuntimeError(
            f"student_weight and teacher_weight must be (C, D) with one C, got vocabularies {student.shape} and "
            f"{teacher.shape}"
        )
    if student.leading != teacher.leading:
        raise RuntimeError(
            f"student_input and teacher_input must have the same leading dimensions, got {student.leading} and "
            f"{teacher.leading}"
        )
    if student.dtype != teacher.dtype:
        raise RuntimeError(f"the student's products are {student.dtype} and the teacher's {teacher.dtype}; cast one")


def _labels(student: HeadInput, target: Tensor | None, ignore_index: int) -> Tensor:
    """Labels (N); without any, ones that no row ignores."""
    if target is None:
        return student.input.new_full((len(student.input),), 0 if ignore_index != 0 else 1, dtype=torch.int64)
    numbers = checked_options(ignore_index, 0.0, 0.0, None, 1.0)
    return label_rows(student.rows_of("target", plain(target)), student.logits_like(), numbers)


def _goes_by_rows(tensors: tuple[Any, ...], weight: Tensor, reduction: str, backend: str) -> bool:
    """Whether losses of rows are needed: for their own sake, for learnt weights, or because nothing is learnt."""
    return reduction == "none" or weight.requires_grad or backend == "reference" or not learns(*tensors)


def _rows(call: Call, tensors: tuple[Any, ...]) -> Tensor:
    if call.backend == "reference":
        return _by_reference(call, tensors[6], *tensors[:6])
    if learns(*tensors):
        return LinearDivergenceFunction.apply(*tensors, None, call)
    return _run(call, tensors, _ones(call, tensors), (False,) * 6)[0]


def _ones(call: Call, tensors: tuple[Any, ...]) -> Tensor:
    return tensors[0].new_ones(len(tensors[0]), dtype=accumulate_dtype(call.dtype))


def _run(call: Call, tensors: Any, weight: Tensor, needs: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
    needs = [bool(need) for need in needs]
    return operator(linear_divergence, *upstream)(*tensors, weight, *call.numbers(), needs[:3], needs[3:])


def _by_reference(call: Call, labels: Tensor, *heads: Any) -> Tensor:
    """Losses of rows in plain torch: the products in their dtype, everything after them in fp32 or wider."""
    wide = accumulate_dtype(call.dtype)
    student, teacher = (reference.logits_of(*cast(call.dtype, *heads[i : i + 3])).to(wide) for i in (0, 3))
    losses = call.soft * divergence_reference.divergence(student, teacher, *call.kind)
    if call.hard != 0.0:
        of_labels = softmax_reference.cross_entropy(student, labels, None, call.ignore_index, "none")
        losses = losses + call.hard * of_labels
    return losses


def _summed_by_reference(call: Call, labels: Any, weight: Tensor | None, *heads: Any) -> Tensor:
    losses = _by_reference(call, labels, *heads)
    return losses if weight is None else (losses.masked_fill(weight == 0, 0.0) * weight).sum()


class LinearDivergenceFunction(torch.autograd.Function):
    """With weights of rows, a sum whose gradients forward makes; without, losses whose logits backward makes again."""

    @staticmethod
    def forward(
        ctx: Any,
        student_input: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        labels: Tensor,
        weight: Tensor | None,
        call: Call,
    ) -> Tensor:
        heads = student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias
        ctx.call = call
        if weight is None:
            keep(ctx, (*heads, labels, None), ())
            return _run(call, (*heads, labels), _ones(call, heads), (False,) * 6)[0]
        losses, *gradients = _run(call, (*heads, labels), weight, ctx.needs_input_grad[:6])
        keep(ctx, (*heads, labels, weight), gradients)
        return (losses.masked_fill(weight == 0, 0.0) * weight).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *heads, labels, weight = saved(ctx)
        call, needed = ctx.call, ctx.needs_input_grad[:6]
        if wants_graph():
            loss = partial(_summed_by_reference, call, labels, weight)
            gradients = reference_gradients(loss, heads, needed, grad_output)
        elif weight is None:
            upstream = grad_output.masked_fill(labels == call.ignore_index, 0.0)
            gradients = as_inputs(_run(call, (*heads, labels), upstream, needed, grad_output)[1:], heads, needed)
        else:
            gradients = scaled(ctx, grad_output, heads, lambda: _run(call, (*heads, labels), weight, needed)[1:])
        return (*gradients, None, None, None)
