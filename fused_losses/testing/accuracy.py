"""The one rule by which results are judged: fp64 truth, with the reference's own error as the budget.

An error is taken twice, as its maximum and as its root mean square over the tensor. Each may be ``FACTOR`` times
the reference's own, plus some units in the last place of the truth's maximum or root mean square. A result that
is not finite must be exactly what truth is there (NaN, or the same infinity). Only where the reference overflows
the dtype although truth does not, both what the reference gives and what truth is are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 1.5
ULPS = 2.0
# fp64 truth is itself rounded, also before its terms cancel, so fp64 is granted more: units of truth, and of 1.
DOUBLE_ULPS, DOUBLE_FLOOR = 64.0, 8.0


@dataclass(frozen=True)
class Comparison:
    """An error and what was allowed, or a message that says what is wrong beyond an error."""

    error: float
    budget: float
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.message and self.error <= self.budget

    @property
    def ratio(self) -> float:
        """The share of the budget that was used."""
        if self.message:
            return float("inf")
        return 0.0 if self.error == 0.0 else self.error / max(self.budget, 1e-300)


def fault(message: str) -> Comparison:
    return Comparison(0.0, 0.0, message)


def compare(result: Tensor, reference: Tensor, truth: Tensor) -> Comparison:
    """Judges a result against truth.

    Args:
        result: what is judged, in the dtype under test.
        reference: the reference's result in the same dtype; its error is the budget.
        truth: the reference's result in fp64.

    Returns:
        The worse of the two errors, with its budget.
    """
    if result.shape != reference.shape or result.dtype != reference.dtype:
        return fault(f"expected {_describe(reference)}, got {_describe(result)}")
    ours, theirs, expected = (t.detach().double() for t in (result, reference, truth))
    overflow = torch.isfinite(expected) & ~torch.isfinite(theirs)
    special = ~torch.isfinite(expected) | (overflow & ~torch.isfinite(ours))
    wrong = ~_identical(ours, torch.where(overflow, theirs, expected)) & special
    wrong |= ~special & ~torch.isfinite(ours)
    if wrong.any():
        first = wrong.flatten().nonzero()[0, 0]
        got, wanted = float(ours.flatten()[first]), float(expected.flatten()[first])
        return fault(f"{int(wrong.sum())} values are wrongly finite or not: {got}, expected {wanted}")
    if special.all():
        return Comparison(0.0, 0.0)
    return _worst_error(ours[~special], theirs[~special], expected[~special], result.dtype)


def _worst_error(ours: Tensor, theirs: Tensor, expected: Tensor, dtype: torch.dtype) -> Comparison:
    double, eps = dtype is torch.float64, torch.finfo(dtype).eps
    ulps, floor = (DOUBLE_ULPS, DOUBLE_FLOOR * eps) if double else (ULPS, 0.0)
    tensors = ours - expected, (theirs - expected).nan_to_num(0.0, 0.0, 0.0), expected
    comparisons = []
    for norm in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
        error, reference_error, scale = (float(norm(tensor)) for tensor in tensors)
        comparisons.append(Comparison(error, FACTOR * reference_error + ulps * eps * scale + floor))
    return max(comparisons, key=lambda comparison: comparison.ratio)


def _identical(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same_zero = torch.signbit(a) == torch.signbit(b)
    return bool((_identical(a, b) & (same_zero | a.isnan())).all())


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
