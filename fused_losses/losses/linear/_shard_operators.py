"""Cross entropy over a split vocabulary as operators: each rank's share of every chunk, and what ranks exchange.

The ranks of a group run the same collectives in the same order, whatever is in their shards: chunks are sized by
the largest shard, and a rank without any rows takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.choice import KERNELS, resolve
from ...backends.fake import accumulate_dtype
from ..softmax import DEBUG, Options, check_labels
from ._head import Head, HeadGradients, Needs, Rows, logit_chunks, rows_that_count
from ._labels import LabelledRows
from ._operators import Gradients, gradient_shapes, register
from ._shards import Ranks
from ._statistics import Totals, merged

STATISTICS, SENT = 5, 4  # of row_statistics, and of those that other ranks need


def vocab_parallel_forward(
    input: Tensor,  # (N, D), the same on all ranks
    weight: Tensor,  # (V_r, D), this rank's
    bias: Tensor | None,  # (V_r)
    labels: Tensor,  # (N), of the whole vocabulary
    class_weight: Tensor | None,  # (V)
    sample_weight: Tensor | None,  # (N)
    sizes: Sequence[int],
    group: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
    workspace_mb: float | None,
    dtype: torch.dtype,
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, maxima and log-sums of rows, and the gradients of the losses' sum: that of the input over all ranks."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    split = _Split(input, weight, bias, labels, class_weight, sample_weight, sizes, group, options, dtype, backend)
    losses = input.new_zeros((len(input),), dtype=split.wide)
    stats = input.new_zeros((2, len(input)), dtype=split.wide)
    gradients = split.gradients(needs)
    for rows, part, logits in split.chunks(workspace_mb):
        totals = split.totals(rows, logits)
        losses[rows] = split.terms.losses(rows, totals).to(split.wide)
        stats[:, rows] = torch.stack(totals[:2]).to(split.wide)
        if any(needs):
            split.add(gradients, rows, part, logits, stats[:, rows])
    return losses, stats, *split.summed(gradients)


def vocab_parallel_backward(
    grad_losses: Tensor,  # (N)
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    stats: Tensor,  # (2, N)
    sizes: Sequence[int],
    group: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    temperature: float,
    workspace_mb: float | None,
    dtype: torch.dtype,
    backend: str,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients for an upstream gradient of every row; the logits are made again."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    split = _Split(input, weight, bias, labels, class_weight, sample_weight, sizes, group, options, dtype, backend)
    gradients = split.gradients(needs)
    for rows, part, logits in split.chunks(workspace_mb):
        split.add(gradients, rows, part, logits, stats[:, rows], grad_losses[rows])
    return split.summed(gradients)


class _Split:
    """A call's tensors as this rank's share of the work sees them."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        class_weight: Tensor | None,
        sample_weight: Tensor | None,
        sizes: Sequence[int],
        group: str,
        options: Options,
        dtype: torch.dtype,
        backend: str,
    ):
        self.input, self.options, self.wide = input, options, accumulate_dtype(dtype)
        self.head, self.kernels = Head.cast(weight, bias, dtype), KERNELS[resolve(input.device.type, dtype, backend)]
        self.ranks = Ranks.of(group, sizes, input, weight, labels)
        check_whole_vocabulary(self.ranks, labels, class_weight, options)
        self.counted = rows_that_count(labels, options.ignore_index)
        self.labels = labels - self.ranks.rows(self.ranks.rank).start
        self.terms = LabelledRows(labels, class_weight, sample_weight, self.ranks.total, options, self.wide)
        of_ranks = [self.terms.factors[self.ranks.rows(rank)] for rank in range(len(self.ranks.sizes))]
        self.factors, self.mass = of_ranks[self.ranks.rank], torch.stack([f.double().sum() for f in of_ranks])

    def chunks(self, workspace_mb: float | None) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        return logit_chunks(self.input, self.head, workspace_mb, self.counted, classes=max(self.ranks.sizes))

    def totals(self, rows: Rows, logits: Tensor) -> Totals:
        """What all ranks know of a chunk's rows."""
        return merged(self.ranks.gather(self._statistics(rows, logits)[:SENT]), self.mass[:, None])

    def _statistics(self, rows: Rows, logits: Tensor) -> Tensor:
        if logits.shape[1] == 0:
            statistics = logits.new_zeros((STATISTICS, len(logits)), dtype=self.wide)
            statistics[:2] = float("-inf")
            return statistics
        options = self.options.softcap, self.options.temperature
        return self.kernels.row_statistics(logits, self.labels[rows], self.factors, *options)[0]

    def add(
        self,
        gradients: HeadGradients,
        rows: Rows,
        input: Tensor,
        logits: Tensor,
        stats: Tensor,
        upstream: Tensor | None = None,
    ) -> None:
        """Adds what a chunk contributes to gradients; writes over its logits."""
        if logits.shape[1] == 0:
            return
        statistics = stats.new_zeros((STATISTICS, len(logits)))
        statistics[:2] = stats
        coefficients = self.terms.coefficients(rows, stats, upstream)
        factors = self.factors if self.terms.smooths else None
        options = self.options.softcap, self.options.temperature
        self.kernels.row_gradient_(logits, self.labels[rows], statistics, coefficients, factors, *options)
        gradients.add(rows, input, logits)

    def gradients(self, needs: Sequence[bool]) -> HeadGradients:
        return HeadGradients(self.head, len(self.input), Needs(*needs), self.counted, self.wide)

    def summed(self, gradients: HeadGradients) -> Gradients:
        """The sums over chunks, and for the input over ranks: in fp32 or wider, for each rank's is rounded already."""
        tensors = gradients.tensors()
        if gradients.needs.input:
            self.ranks.sum_(tensors[0])
        return tensors


def check_whole_vocabulary(ranks: Ranks, labels: Tensor, class_weight: Tensor | None, options: Options) -> None:
    """Raises on every rank for what does not fit all rows together.

    Raises:
        IndexError: on a CPU, for a label outside of all shards.
        RuntimeError: for class weights of another number of classes.
    """
    if class_weight is not None and class_weight.shape != (ranks.total,):
        raise RuntimeError(
            f"weight must have one value for each of the {ranks.total} classes of all ranks (shards of "
            f"{list(ranks.sizes)}), also of those of others, got shape {tuple(class_weight.shape)}"
        )
    if labels.is_cpu or DEBUG:
        check_labels(labels.new_empty(()).expand(len(labels), ranks.total), labels, options.ignore_index)


def _forward_shapes(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide, needs = accumulate_dtype(rest[-3]), rest[-1]
    losses = input.new_empty((input.shape[0],), dtype=wide)
    return losses, input.new_empty((2, input.shape[0]), dtype=wide), *gradient_shapes(input, weight, wide, needs)


def _backward_shapes(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    return gradient_shapes(input, weight, accumulate_dtype(rest[-3]), rest[-1])


register(vocab_parallel_forward, _forward_shapes)
register(vocab_parallel_backward, _backward_shapes)
