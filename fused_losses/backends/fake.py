"""Shapes, dtypes and layouts of every operator, for FakeTensor and torch.compile; shared by all backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPERATORS = (
    "pointwise_forward",
    "pointwise_backward",
    "cross_entropy_forward",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "cross_entropy_with_gradient_",
    "cross_entropy_target_backward",
    "row_statistics",
    "row_gradient_",
    "divergence_forward",
    "divergence_backward",
    "divergence_backward_",
)

# By backend, what makes loss and gradients in one pass. Only a GPU knows an upstream number there: its operator writes
# over what was kept unless that is 1.
AT_ONCE = {
    "cpp": ("pointwise_with_gradients", "cross_entropy_with_gradient"),
    "cuda": ("pointwise_with_gradients", "pointwise_backward_unless_one_"),
}
# Of the extensions alone: that, and work on large memory.
EXTENSION_OPERATORS = (*dict.fromkeys(AT_ONCE["cpp"] + AT_ONCE["cuda"]), "add_", "scaled")

# What operators write to, of those that end in an underscore; elsewhere it is the logits.
MUTATED = {"divergence_backward_": ("student", "teacher")}

_ACCUMULATE = {torch.float64: torch.float64}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels sum in: fp64 for fp64, fp32 for everything narrower."""
    return _ACCUMULATE.get(dtype, torch.float32)


def pointwise_forward(
    formula: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    a: float,
    b: float,
    reduction: str,
    out_dtype: torch.dtype,
) -> Tensor:
    if reduction == "none":
        return torch.empty_like(input, dtype=out_dtype)
    return input.new_empty((), dtype=out_dtype)


def pointwise_backward(
    formula: str,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    a: float,
    b: float,
    reduction: str,
    input_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor]:
    def gradient(of: Tensor, asked: bool) -> Tensor:
        return torch.empty_like(of) if asked else of.new_empty((0,))

    return gradient(input, input_grad), gradient(target, target_grad)


def pointwise_with_gradients(formula: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *call, input_grad, target_grad, out_dtype = arguments
    loss = pointwise_forward(formula, *call, out_dtype=out_dtype)
    return loss, *pointwise_backward(formula, loss, *call, input_grad=input_grad, target_grad=target_grad)


def pointwise_backward_unless_one_(*arguments: Any) -> None:
    return None


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    shape = label_shape(logits)
    rows = 1
    for size in shape:
        rows = rows * size
    loss = logits.new_empty(shape if reduction == "none" else (), dtype=out_dtype)
    return loss, logits.new_empty((2 * rows + 1,), dtype=accumulate_dtype(logits.dtype))


def label_shape(logits: Tensor) -> tuple[int, ...]:
    """The shape of class indices for logits (C), (N, C) or (N, C, d1, ...)."""
    return () if logits.ndim == 1 else (logits.shape[0], *logits.shape[2:])


def cross_entropy_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    stats: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
) -> Tensor:
    return torch.empty_like(logits)


def cross_entropy_backward_(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    stats: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
) -> None:
    return None


def cross_entropy_with_gradient(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *cross_entropy_forward(logits, *arguments), torch.empty_like(logits)


def cross_entropy_with_gradient_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
) -> Tensor:
    return logits.new_empty(label_shape(logits), dtype=accumulate_dtype(logits.dtype))


def cross_entropy_target_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    stats: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
) -> Tensor:
    return torch.empty_like(target)


def row_statistics(
    logits: Tensor, labels: Tensor, factors: Tensor | None, softcap: float, temperature: float
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    statistics = logits.new_empty((5, rows), dtype=accumulate_dtype(logits.dtype))
    return statistics, logits.new_empty((rows,), dtype=torch.int64)


def row_gradient_(
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    coefficients: Tensor,
    factors: Tensor | None,
    softcap: float,
    temperature: float,
) -> None:
    return None


def divergence_forward(
    student: Tensor, teacher: Tensor, divergence: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    rows, dtype = student.shape[0], accumulate_dtype(student.dtype)
    return student.new_empty((rows,), dtype=dtype), student.new_empty((10, rows), dtype=dtype)


def divergence_backward(
    grad_losses: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor]:
    rows, classes = student.shape
    return student.new_empty((rows if student_grad else 0, classes)), student.new_empty(
        (rows if teacher_grad else 0, classes)
    )


def divergence_backward_(
    grad_losses: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    student_grad: bool,
    teacher_grad: bool,
) -> None:
    return None


def add_(total: Tensor, x: Tensor) -> None:
    return None


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)
