"""The one rule by which results are judged: fp64 truth, with the reference's own error as the budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What the reference's error is multiplied with, and the units in the last place (of the largest value, or of
# the root mean square) that are granted on top. fp64 truth is itself rounded, so fp64 is granted more.
FACTOR = 1.5
ULPS = {torch.float64: 32.0}
DEFAULT_ULPS = 4.0


@dataclass(frozen=True)
class Comparison:
    """An error and what was allowed; non-finite values must stand at the same places."""

    error: float
    budget: float
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.message and self.error <= self.budget

    @property
    def ratio(self) -> float:
        if self.message:
            return float("inf")
        return 0.0 if self.error == 0.0 else self.error / max(self.budget, 1e-300)


def compare(result: Tensor, reference: Tensor, truth: Tensor) -> Comparison:
    """Judges a result against truth: maximum and root mean square of its error, whichever is worse.

    Args:
        result: what is judged, in the dtype under test.
        reference: the reference's result in the same dtype; its error is the budget.
        truth: the reference's result in fp64.
    """
    if result.shape != reference.shape or result.dtype != reference.dtype:
        return Comparison(
            0.0,
            0.0,
            f"expected {reference.dtype} of shape {tuple(reference.shape)}, "
            f"got {result.dtype} of shape {tuple(result.shape)}",
        )
    values, expected = result.detach().double(), truth.detach().double()
    finite = torch.isfinite(expected)
    # What is finite in fp64 may overflow fp16 in the reference too.
    finite_here = finite & torch.isfinite(reference.detach().double())
    if not torch.equal(torch.isfinite(values) & finite, finite_here):
        return Comparison(
            0.0, 0.0, f"{int((torch.isfinite(values) != finite).sum())} values are wrongly finite or not"
        )
    if not finite_here.any():
        return Comparison(0.0, 0.0)
    eps = torch.finfo(result.dtype).eps * ULPS.get(result.dtype, DEFAULT_ULPS)
    ours = (values - expected)[finite_here]
    theirs = (reference.detach().double() - expected)[finite_here]
    scale = expected[finite_here]
    candidates = [
        Comparison(float(norm(ours)), FACTOR * float(norm(theirs)) + eps * float(norm(scale)))
        for norm in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt())
    ]
    return max(candidates, key=lambda comparison: comparison.ratio)
