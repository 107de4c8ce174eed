"""Divergences of a student's distribution over classes from a teacher's. Reads downward: module, function, autograd."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.choice import KERNELS
from ..backends.fake import accumulate_dtype
from ..reference import divergence as reference
from ._common import (
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


class JSDLoss(nn.Module):
    """Generalised Jensen-Shannon divergence of a student's logits and a teacher's.

    Formula: ``beta KL(t || m) + (1 - beta) KL(s || m)`` for each row, with ``s = softmax(student / temperature)``,
    ``t`` likewise and ``m = beta t + (1 - beta) s``; ``KL(t || s)`` for ``beta = 0``, ``KL(s || t)`` for ``beta = 1``

    Args:
        beta: in [0, 1], from mode-covering to mode-seeking.
        temperature: divides both logits.
        ignore_index: rows with this label count nothing and get a gradient of exactly 0.
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` of rows; read at call time. ``"mean"`` divides by the rows that
            count.
        backend: a backend by name; None chooses automatically.

    Shape:
        student and teacher ``(..., C)``, of one shape, float64, float32, bfloat16 or float16; target ``(...)``, class
        labels of which only the ignored ones matter, or None. Called as ``loss(student, teacher, target=None, *,
        sample_weight=None, normalizer=None)``: ``sample_weight`` has a row's shape and multiplies its loss,
        ``normalizer`` (number or 0-d tensor) replaces the denominator of ``"mean"``.

    Returns:
        A 0-d tensor, or ``(...)`` for ``"none"``, in the student's dtype (float32 under autocast).

    Raises:
        ValueError: for shapes that differ, an unknown reduction, beta or temperature out of range.
        RuntimeError: for different dtypes or devices.

    Example:
        >>> import torch, fused_losses
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> fused_losses.JSDLoss()(student, teacher)
        tensor(0.0895)

    Source: Agarwal et al., On-Policy Distillation of Language Models, 2024; ``LigerJSD``, ``GKDTrainer`` of TRL.
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = IGNORED,
        reduction: str = "mean",
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.beta, self.temperature, self.ignore_index = beta, temperature, ignore_index
        self.reduction, self.backend = reduction, backend

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None, **extras: Any) -> Tensor:
        return jsd_loss(
            student,
            teacher,
            target,
            self.beta,
            self.temperature,
            self.ignore_index,
            self.reduction,
            backend=self.backend,
            **extras,
        )


class TVDLoss(nn.Module):
    """Total variation distance of a student's logits and a teacher's.

    Formula: ``sum_c |s_c - t_c| / 2`` for each row, with ``s = softmax(student / temperature)`` and ``t`` likewise

    Args:
        temperature, ignore_index, reduction, backend: as in :class:`JSDLoss`.

    Shapes, result and errors are those of :class:`JSDLoss`.

    Example:
        >>> import torch, fused_losses
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> fused_losses.TVDLoss()(student, teacher)
        tensor(0.3808)

    Source: ``LigerTVDLoss``.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        ignore_index: int = IGNORED,
        reduction: str = "mean",
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.temperature, self.ignore_index = temperature, ignore_index
        self.reduction, self.backend = reduction, backend

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None, **extras: Any) -> Tensor:
        return tvd_loss(
            student,
            teacher,
            target,
            self.temperature,
            self.ignore_index,
            self.reduction,
            backend=self.backend,
            **extras,
        )


def jsd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    **extras: Any,
) -> Tensor:
    """Generalised Jensen-Shannon divergence; see :class:`JSDLoss`.

    Example:
        >>> import torch, fused_losses
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> fused_losses.functional.jsd_loss(student, teacher, beta=0.0)
        tensor(0.3278)
    """
    kind = divergence_kind(beta, temperature)
    return _divergence_loss(kind, student, teacher, target, ignore_index, reduction, **extras)


def tvd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    **extras: Any,
) -> Tensor:
    """Total variation distance; see :class:`TVDLoss`.

    Example:
        >>> import torch, fused_losses
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> fused_losses.functional.tvd_loss(student, teacher, reduction="none")
        tensor([0.3808])
    """
    kind = Kind("tvd", 0.5, checked_temperature(temperature))
    return _divergence_loss(kind, student, teacher, target, ignore_index, reduction, **extras)


class Kind(NamedTuple):
    """Which divergence: the trailing arguments of its operators."""

    name: str
    beta: float
    temperature: float


def divergence_kind(beta: float, temperature: float) -> Kind:
    """A Jensen-Shannon divergence, or what it becomes at its ends."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "jsd")
    return Kind(name, float(beta) if name == "jsd" else 0.5, checked_temperature(temperature))


def checked_temperature(temperature: float) -> float:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return float(temperature)


def _divergence_loss(
    kind: Kind,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    ignore_index: int,
    reduction: str,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    reduction = reduction_name(None, None, reduction)
    optional = {"target": target, "sample_weight": sample_weight}
    check_tensors(input=student, teacher=teacher, optional=optional)
    _check_shapes(student, teacher, optional)
    student, teacher = plain(student), plain(teacher)
    rows, classes = student.shape[:-1], student.shape[-1]
    losses = divergence_rows(kind, student.reshape(-1, classes), teacher.reshape(-1, classes), backend)
    counted = None if target is None else (target != ignore_index).flatten()
    weight = None if sample_weight is None else sample_weight.flatten()
    losses = reduce_rows(losses, counted, weight, reduction, normalizer)
    return (losses.view(rows) if reduction == "none" else losses).to(output_dtype(student))


def reduce_rows(
    losses: Tensor,
    counted: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    normalizer: Tensor | float | None,
) -> Tensor:
    """Losses of rows (N) reduced: a mean is over the rows that count, or over a normalizer."""
    if counted is not None:
        losses = losses.masked_fill(~counted, 0.0)
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    if normalizer is not None:
        check_normalizer(reduction)
        return losses.sum() / normalizer
    if reduction == "none":
        return losses
    if reduction == "sum" or counted is None:
        return losses.sum() if reduction == "sum" else losses.mean()
    return losses.sum() / counted.sum()


def _check_shapes(student: Tensor, teacher: Tensor, of_rows: dict[str, Tensor | None]) -> None:
    if student.ndim == 0 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape (..., C), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.dtype != teacher.dtype:
        raise RuntimeError(
            f"student is {student.dtype} and teacher {teacher.dtype}; give them one dtype: teacher.to(student.dtype)"
        )
    for name, tensor in of_rows.items():
        if tensor is not None and tensor.shape != student.shape[:-1]:
            raise ValueError(
                f"{name} must have one value per row, shape {tuple(student.shape[:-1])}, got {tuple(tensor.shape)}"
            )


def divergence_rows(kind: Kind, student: Tensor, teacher: Tensor, backend: str | None) -> Tensor:
    """The divergence of every row, in fp32 or wider.  # (N, C), (N, C) -> (N,)"""
    backend = choose_backend(backend, student, teacher)
    if backend == "reference":
        return _by_reference(kind, accumulate_dtype(student.dtype), student, teacher)
    student, teacher = (t if t.stride(1) == 1 else t.contiguous() for t in (student, teacher))
    if learns(student, teacher):
        return DivergenceFunction.apply(student, teacher, kind, backend)
    return KERNELS[backend].divergence_forward(student, teacher, *kind)[0]


class DivergenceFunction(torch.autograd.Function):
    """Saves the logits and ten numbers a row; backward recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kind: Kind, backend: str) -> Tensor:
        losses, statistics = KERNELS[backend].divergence_forward(student, teacher, *kind)
        ctx.save_for_backward(student, teacher, statistics)
        ctx.kind, ctx.backend = kind, backend
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if wants_graph():
            loss = partial(_by_reference, ctx.kind, statistics.dtype)
            gradients = reference_gradients(loss, (student, teacher), needed, grad_losses)
        else:
            backward = KERNELS[ctx.backend].divergence_backward
            both = backward(grad_losses, student, teacher, statistics, *ctx.kind, *needed)
            gradients = [gradient if need else None for gradient, need in zip(both, needed)]
        return (*gradients, None, None)


def _by_reference(kind: Kind, dtype: torch.dtype, student: Tensor, teacher: Tensor) -> Tensor:
    return reference.divergence(student.to(dtype), teacher.to(dtype), *kind)
