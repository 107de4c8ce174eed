"""Cross entropy of rows with a class index each, from what is known of parts of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.fake import accumulate_dtype
from ..softmax import Options
from ._head import Head, Needs, Rows
from ._statistics import Totals
from ._tiles import TiledRows


class LabelledRows:
    """What the losses and the gradients of rows are made of, in fp64; labels are of all classes."""

    def __init__(
        self,
        labels: Tensor,  # (N)
        class_weight: Tensor | None,  # (C)
        sample_weight: Tensor | None,  # (N)
        classes: int,
        options: Options,
        wide: torch.dtype,
    ):
        self.options, self.wide, self.ignored = options, wide, labels == options.ignore_index
        self.smooths = options.label_smoothing != 0.0
        weighted = self.smooths and class_weight is not None
        self.factors = (class_weight if weighted else torch.ones(classes, device=labels.device)).to(wide)  # type: ignore[union-attr]
        self.mass = self.factors.double().sum()
        scale = torch.ones_like(labels, dtype=torch.float64) if sample_weight is None else sample_weight.double()
        self.scale = scale.masked_fill(self.ignored, 0.0)
        self.of_label = (1.0 - options.label_smoothing) * self.scale * self._label_weight(labels, classes, class_weight)
        self.of_class = options.label_smoothing / classes * self.scale

    def _label_weight(self, labels: Tensor, classes: int, class_weight: Tensor | None) -> Tensor:
        """1 or the class's weight; NaN for a label out of range."""
        inside = (labels >= 0) & (labels < classes)
        weight = self.scale.new_ones(()) if class_weight is None else class_weight[labels.where(inside, 0)].double()
        return weight.where(inside | self.ignored, float("nan"))

    def losses(self, rows: Rows, totals: Totals) -> Tensor:
        losses = self.of_label[rows] * (totals.below + totals.log_sum)
        if self.smooths:
            losses += self.of_class[rows] * (totals.gap + self.mass * totals.log_sum)
        if self.options.z_loss != 0.0:
            losses += self.scale[rows] * self.options.z_loss * (totals.maximum + totals.log_sum).square()
        return losses.masked_fill(self.ignored[rows], 0.0)

    def coefficients(self, rows: Rows, stats: Tensor, upstream: Tensor | None = None) -> Tensor:
        """Excess, label, entropy and share, as ``row_gradient_`` takes them, of maxima and log-sums.  # (2, n)"""
        excess = self.of_class[rows] * self.mass
        if self.options.z_loss != 0.0:
            excess = excess + self.scale[rows] * (2.0 * self.options.z_loss) * stats.double().sum(0)
        table = torch.stack([excess, self.of_label[rows], torch.zeros_like(excess), self.of_class[rows]])
        if upstream is not None:
            table = table * upstream
        return table.masked_fill(self.ignored[rows], 0.0).to(self.wide)


class TiledCrossEntropy:
    """Cross entropy of rows of a head with a class index each, by tiles."""

    def __init__(
        self,
        kernels: Any,
        head: Head,
        input: Tensor,  # (N, D)
        labels: Tensor,  # (N)
        class_weight: Tensor | None,  # (C)
        sample_weight: Tensor | None,  # (N)
        options: Options,
        workspace_mb: float | None,
    ):
        wide = accumulate_dtype(head.weight.dtype)
        self.terms = LabelledRows(labels, class_weight, sample_weight, len(head.weight), options, wide)
        factors = self.terms.factors if self.terms.smooths else None
        numbers = options.softcap, options.temperature, workspace_mb
        self.rows = TiledRows(kernels, head, input, labels, options.ignore_index, factors, *numbers)

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every row, with the statistics and predictions of ``row_statistics``."""
        statistics, prediction = self.rows.statistics()
        return self.terms.losses(slice(None), Totals.of(statistics)).to(self.terms.wide), statistics, prediction

    def gradients(self, grad_losses: Tensor, stats: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the head, of maxima and log-sums of rows.  # (N), (2, N)"""

        def tables(rows: Rows) -> Sequence[Tensor]:
            of_rows = stats[:, rows]
            statistics = torch.cat([of_rows, of_rows.new_zeros((3, of_rows.shape[1]))])
            return statistics, self.terms.coefficients(rows, of_rows, grad_losses[rows])

        return self.rows.gradients(tables, needs)
