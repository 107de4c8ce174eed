"""Statistics of rows of logits, joined of those of parts of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Totals(NamedTuple):
    """What all parts together say of rows, in fp64."""

    maximum: Tensor
    log_sum: Tensor
    below: Tensor  # by how much the label's logit is below the maximum
    gap: Tensor  # the sum of factor * (maximum - logit) over classes

    @classmethod
    def of(cls, statistics: Tensor) -> Totals:
        """What ``row_statistics`` say of all classes.  # (5, n)"""
        maximum, log_sum, label_logit, gap, _ = statistics.double()
        return cls(maximum, log_sum, maximum - label_logit, gap)


def merged(statistics: Tensor, mass: Tensor) -> Totals:
    """Totals of ``row_statistics`` of every part, taken with factors, and of the factors' sums.  # (P, 4, n), (P, 1)

    As in the kernels, maxima are counted apart from the other exponentials, so that these keep their digits.
    """
    maxima, log_sums, label_logits, gaps = statistics.double().unbind(1)
    maximum = maxima.amax(0)
    # A part of nothing but -inf adds nothing. Its log-sum is NaN, as is that of NaN, whose gap is NaN, too.
    nothing = (maxima == float("-inf")) & ~gaps.isnan()
    top = (maxima == maximum) & ~nothing
    rest = torch.where(top, log_sums.expm1(), (maxima - maximum + log_sums).exp()).masked_fill(nothing, 0.0)
    tops = top.sum(0)
    log_sum = (rest.sum(0) + (tops - 1)).log1p().masked_fill(tops == 0, float("nan"))
    raised = (maximum - maxima).masked_fill(mass == 0.0, 0.0) * mass
    return Totals(maximum, log_sum, maximum - label_logits.sum(0), (gaps + raised).sum(0))


def joined(parts: Sequence[tuple[Tensor, Tensor]], starts: Sequence[int], mass: Tensor) -> tuple[Tensor, Tensor]:
    """``row_statistics`` of all classes, of those of parts: with the first class and the factors' sum of each.

    Args:
        parts: statistics (5, n) and predictions (n).
        mass: (P), 0 where they were taken without factors.
    """
    if len(parts) == 1:
        return parts[0]
    statistics = torch.stack([of_part for of_part, _ in parts])  # (P, 5, n)
    totals = merged(statistics[:, :4], mass[:, None])
    maxima, log_sums, label_logits, _, moments = statistics.double().unbind(1)
    raised = totals.maximum - maxima
    moments = (log_sums - raised - totals.log_sum).exp() * (moments + raised)
    # As in the kernels, what has a probability of 0 adds nothing.
    moment = moments.masked_fill(maxima == float("-inf"), 0.0).sum(0)
    every = totals.maximum, totals.log_sum, label_logits.sum(0), totals.gap, moment
    predictions = torch.stack([prediction + start for (_, prediction), start in zip(parts, starts)])
    first = (maxima == totals.maximum).to(torch.int8).argmax(0, keepdim=True)
    return torch.stack(every).to(statistics.dtype), predictions.gather(0, first)[0]
