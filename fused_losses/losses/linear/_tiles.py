"""Logits of some rows and some classes at a time, for what knows the log-sums of rows, or joins them of parts.

On a CPU a tile stays in the caches from its product to those of its gradient, and the gradient of the weight is made
block by block of classes, rounded once: neither a chunk of logits nor a sum beside the gradient has to be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.fake import accumulate_dtype
from ._head import Head, Needs, Rows, add_product, chunk_rows, empty, rows_that_count
from ._statistics import joined

# Of a CPU's tiles: products of fewer are slower, and larger tiles leave the caches.
MOST_ROWS, MOST_LOGITS = 1024, 2 << 20
VECTOR = 16  # what rows and classes are multiples of, where there are as many


class Tiling(NamedTuple):
    """Parts of rows and of classes, each of which with each is a tile."""

    rows: Sequence[slice]
    classes: Sequence[slice]

    @classmethod
    def of(cls, rows: int, head: Head, workspace_mb: float | None) -> Tiling:
        """On a GPU, where a tile fits no cache, all classes are one part."""
        classes = len(head.weight)
        if not head.weight.is_cpu:
            return cls(_parts(rows, chunk_rows(rows, head, workspace_mb)), _parts(classes, classes))
        logits = MOST_LOGITS
        if workspace_mb is not None:
            logits = min(logits, int(workspace_mb * 2**20) // head.weight.element_size())
        most_rows = max(1, min(rows, MOST_ROWS, logits // VECTOR))
        return cls(_parts(rows, most_rows), _parts(classes, max(VECTOR, logits // most_rows)))


def _parts(count: int, most: int) -> list[slice]:
    """As few as there can be, of about one size."""
    size = -(-count // max(1, -(-count // most)))
    if VECTOR <= size < count:
        size = min(most // VECTOR, -(-size // VECTOR)) * VECTOR
    return [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]


class TiledGradients:
    """Gradients of a head, gathered over tiles: for one part of the classes after the other, all rows in order."""

    def __init__(self, head: Head, rows: int, needs: Needs, tiling: Tiling):
        (classes, width), dtype, wide = head.weight.shape, head.weight.dtype, accumulate_dtype(head.weight.dtype)
        self.head, self.needs, self.tiling = head, needs, tiling
        in_parts = len(tiling.classes) > 1
        self.input = empty(head.weight, (rows, width) if needs.input else (0,), wide if in_parts else dtype)
        # One part is rounded when its tiles are gone; of several, sums of one at a time are beside the gradient.
        self.weight = empty(head.weight, (classes, width) if needs.weight else (0,), dtype if in_parts else wide)
        self.bias = empty(head.weight, (classes,) if needs.bias else (0,), wide)
        most_classes = tiling.classes[0].stop if needs.weight and self.weight.dtype is not wide else 0
        self.sums = empty(head.weight, (most_classes, width), wide)
        if not tiling.rows:
            for tensor in (self.input, self.weight, self.bias):
                tensor.zero_()

    def add(self, rows: slice, classes: slice, input: Tensor, logits_gradient: Tensor) -> None:
        """Adds what a tile contributes.  # (n, D), (n, c)"""
        is_first, is_last = rows.start == 0, rows is self.tiling.rows[-1]
        if self.needs.input:
            of_tile = self.head.of(classes).input_gradient(logits_gradient)
            self.input[rows].copy_(of_tile) if classes.start == 0 else self.input[rows].add_(of_tile)
        if self.needs.weight:
            weight = self.weight[classes]
            total = self.sums[: len(weight)] if len(self.sums) else weight
            add_product(total, logits_gradient, input, is_first)
            if is_last and total is not weight:
                weight.copy_(total)
        if self.needs.bias:
            of_tile = logits_gradient.sum(0, dtype=self.bias.dtype)
            self.bias[classes].copy_(of_tile) if is_first else self.bias[classes].add_(of_tile)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums in the head's dtype, but for the bias; what nobody asked for is empty."""
        dtype = self.head.weight.dtype
        return self.input.to(dtype), self.weight.to(dtype), self.bias


class TiledRows:
    """The rows of a head that count, and what is asked of their logits, which are made a tile at a time."""

    def __init__(
        self,
        kernels: Any,
        head: Head,
        input: Tensor,  # (N, D)
        labels: Tensor,  # (N)
        ignore_index: int,
        factors: Tensor | None,  # (V), of the classes' logits in a gap
        softcap: float,
        temperature: float,
        workspace_mb: float | None,
    ):
        if labels.shape != input.shape[:1]:
            raise RuntimeError(f"labels must be one for each of {len(input)} rows, got shape {tuple(labels.shape)}")
        counted = rows_that_count(labels, ignore_index)
        self.every, self.counted = len(labels), slice(None) if counted is None else counted
        self.kernels, self.head, self.factors, self.transform = kernels, head, factors, (softcap, temperature)
        self.input, self.labels = input[self.counted].to(head.weight.dtype), labels[self.counted]
        self.tiling = Tiling.of(len(self.labels), head, workspace_mb)

    def _logits(self, rows: slice, classes: slice) -> tuple[Tensor, Tensor]:
        """A tile, and where its labels are in it."""
        return self.head.of(classes).logits(self.input[rows]), self.labels[rows] - classes.start

    def _factors(self, classes: slice) -> Tensor | None:
        return None if self.factors is None else self.factors[classes]

    def _mass(self, classes: slice) -> Tensor:
        factors = self._factors(classes)
        return self.input.new_zeros((), dtype=torch.float64) if factors is None else factors.double().sum()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """What ``row_statistics`` says of all rows, 0 of those that do not count: (5, N), and the predictions (N)."""
        wide = accumulate_dtype(self.head.weight.dtype)
        statistics = self.input.new_zeros((5, self.every), dtype=wide)
        prediction = self.labels.new_zeros(self.every)
        starts = [classes.start for classes in self.tiling.classes]
        mass = torch.stack([self._mass(classes) for classes in self.tiling.classes])
        for rows in self.tiling.rows:
            parts = [
                self.kernels.row_statistics(*self._logits(rows, classes), self._factors(classes), *self.transform)
                for classes in self.tiling.classes
            ]
            places = self._places(rows)
            statistics[:, places], prediction[places] = joined(parts, starts, mass)
        return statistics, prediction

    def _places(self, rows: slice) -> Rows:
        """Where rows that count are among all."""
        return rows if isinstance(self.counted, slice) else self.counted[rows]

    def gradients(self, tables_of: Callable[[Rows], Sequence[Tensor]], needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the head, of rows' statistics (5, n) and coefficients (4, n), as ``row_gradient_`` takes them."""
        gradients = TiledGradients(self.head, len(self.labels), needs, self.tiling)
        tables = [[table.contiguous() for table in tables_of(self._places(rows))] for rows in self.tiling.rows]
        for classes in self.tiling.classes:
            for rows, of_rows in zip(self.tiling.rows, tables):
                self._add(gradients, rows, classes, of_rows)
        of_input, of_weight, of_bias = gradients.tensors()
        if needs.input and isinstance(self.counted, Tensor):
            of_input = of_input.new_zeros((self.every, of_input.shape[1])).index_copy_(0, self.counted, of_input)
        return of_input, of_weight, of_bias

    def _add(self, gradients: TiledGradients, rows: slice, classes: slice, tables: Sequence[Tensor]) -> None:
        """A tile's share; a function of its own, so that its memory is there for the next."""
        logits, labels = self._logits(rows, classes)
        self.kernels.row_gradient_(logits, labels, *tables, self._factors(classes), *self.transform)
        gradients.add(rows, classes, self.input[rows], logits)
