"""Operators that look at some elements of a tensor, or at all in another order, as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .extents import Extent, digits_of, is_one, same
from .lowering import Lowering
from .operators import operator, with_ones
from .values import ORIGIN, Digits, Position, Positions, Value, View, as_whole, permuted, place_of, restricted


def dimension_of(x: Value, dim: int) -> int:
    return dim % x.ndim if x.ndim else 0


def single(x: Value, *dims: int) -> Value:
    """A value of which some dimensions have one digit each."""
    return x if all(len(x.digits[d]) == 1 for d in dims) else as_whole(x)


def replaced(positions: Positions, dim: int, *digits: Position) -> Positions:
    return (*positions[:dim], digits, *positions[dim + 1 :])


@operator("expand", "broadcast_to", ordered=False)
def _expand(tracer: Any, x: Value, shape: Sequence[Any], implicit: bool = False) -> Value:
    rank = len(shape) - x.ndim
    wanted: list[Extent] = []
    digits: list[Digits] = []
    for d, size in enumerate(shape):
        own = x.shape[d - rank] if d >= rank else 1
        keep = (isinstance(size, int) and size == -1) or (d >= rank and not is_one(own))
        wanted.append(own if keep else size)
        digits.append(x.digits[d - rank] if keep else digits_of(size))
        if keep and not (isinstance(size, int) and size == -1) and not size == own:
            raise RuntimeError(f"the expanded size of dimension {d} is {size}, and the tensor has {own}")
    if len(wanted) == x.ndim and all(map(same, wanted, x.shape)):
        return x
    target = Value(wanted, x.dtype, digits)
    return View(x, wanted, digits, lambda lowering, positions: restricted(lowering, positions, target, x))


@operator("broadcast_in_dim", ordered=False)
def _broadcast_in_dim(tracer: Any, x: Value, shape: Sequence[Extent], dimensions: Sequence[int]) -> Value:
    missing = [d for d in range(len(shape)) if d not in dimensions]
    return _expand(tracer, with_ones(x, missing), shape)


@operator("permute", ordered=False)
def _permute(tracer: Any, x: Value, order: Sequence[int]) -> Value:
    return permuted(x, [dimension_of(x, d) for d in order])


@operator("transpose", ordered=False)
def _transpose(tracer: Any, x: Value, a: int, b: int) -> Value:
    if not x.ndim:
        return x
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return _permute(tracer, x, order)


@operator("t", ordered=False)
def _t(tracer: Any, x: Value) -> Value:
    return _permute(tracer, x, list(range(x.ndim))[::-1])


@operator("unsqueeze", ordered=False)
def _unsqueeze(tracer: Any, x: Value, dim: int) -> Value:
    return with_ones(x, [dim % (x.ndim + 1)])


@operator("squeeze", ordered=False)
def _squeeze(tracer: Any, x: Value, dims: Any = None) -> Value:
    chosen = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    dropped = {dimension_of(x, d) for d in chosen if x.ndim and is_one(x.shape[d])}
    kept = [d for d in range(x.ndim) if d not in dropped]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        rest = iter(positions)
        return tuple((ORIGIN,) if d in dropped else next(rest) for d in range(x.ndim))

    return View(x, [x.shape[d] for d in kept], [x.digits[d] for d in kept], source)


@operator("select", ordered=False)
def _select(tracer: Any, x: Value, dim: int, index: Any) -> Value:
    dim = dimension_of(x, dim)
    x = single(x, dim)
    size = x.shape[dim]
    if not (index < size and index >= -size):
        raise IndexError(f"index {index} is out of bounds for dimension {dim} of size {size}")
    return place_of(x, dim, index + size if index < 0 else index)


def range_of(size: Extent, start: Any, end: Any, step: Any) -> tuple[Any, Any]:
    """The first element and the number of elements of a slice."""

    def bound(value: Any, otherwise: Any) -> Any:
        if value is None or (isinstance(value, int) and value >= 2**62):
            return otherwise
        value = value + size if value < 0 else value
        return 0 if value < 0 else size if value > size else value

    start, end = bound(start, 0), bound(end, size)
    if not end > start:
        return start, 0
    return start, end - start if is_one(step) else (end - start + step - 1) // step


@operator("slice")
def slice_of(tracer: Any, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Value:
    dim = dimension_of(x, dim)
    start, length = range_of(x.shape[dim], start, end, step)
    if isinstance(start, int) and start == 0 and same(length, x.shape[dim]):
        return x
    x = single(x, dim)
    shape = [*x.shape[:dim], length, *x.shape[dim + 1 :]]
    digits = [*x.digits[:dim], (length,), *x.digits[dim + 1 :]]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        return replaced(positions, dim, positions[dim][0].moved(lowering, step, start))

    return View(x, shape, digits, source)


@operator("split")
def _split(tracer: Any, x: Value, size: Any, dim: int = 0) -> list[Value]:
    total, start, parts = x.shape[dim], 0, []
    while start < total:
        parts.append(slice_of(tracer, x, dim, start, start + size))
        start = start + size
    return parts


@operator("split_with_sizes")
def _split_with_sizes(tracer: Any, x: Value, sizes: Sequence[Any], dim: int = 0) -> list[Value]:
    start, parts = 0, []
    for size in sizes:
        parts.append(slice_of(tracer, x, dim, start, start + size))
        start = start + size
    return parts


@operator("unbind")
def _unbind(tracer: Any, x: Value, dim: int = 0) -> list[Value]:
    return [_select(tracer, x, dim, k) for k in range(int(x.shape[dim]))]


@operator("flip")
def _flip(tracer: Any, x: Value, dims: Sequence[int]) -> Value:
    chosen = {dimension_of(x, d) for d in dims} if x.ndim else set()

    def source(lowering: Lowering, positions: Positions) -> Positions:
        return tuple(
            tuple(p.moved(lowering, -1, digit - 1) for p, digit in zip(each, x.digits[d])) if d in chosen else each
            for d, each in enumerate(positions)
        )

    return View(x, x.shape, x.digits, source)


@operator("unfold")
def _unfold(tracer: Any, x: Value, dim: int, size: Any, step: Any) -> Value:
    dim = dimension_of(x, dim)
    x = single(x, dim)
    length = (x.shape[dim] - size) // step + 1
    shape = [*x.shape[:dim], length, *x.shape[dim + 1 :], size]
    digits = [*x.digits[:dim], (length,), *x.digits[dim + 1 :], (size,)]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        first = positions[dim][0].moved(lowering, step, 0)
        return replaced(positions[:-1], dim, first.plus(lowering, positions[-1][0]))

    return View(x, shape, digits, source)


@operator("diagonal")
def _diagonal(tracer: Any, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    dim1, dim2 = dimension_of(x, dim1), dimension_of(x, dim2)
    x = single(x, dim1, dim2)
    rows, columns = max(-offset, 0), max(offset, 0)
    length = torch.sym_min(x.shape[dim1] - rows, x.shape[dim2] - columns)
    rest = [d for d in range(x.ndim) if d not in (dim1, dim2)]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        along = positions[-1][0]
        moved = {dim1: along.moved(lowering, 1, rows), dim2: along.moved(lowering, 1, columns)}
        others = dict(zip(rest, positions))
        return tuple((moved[d],) if d in moved else others[d] for d in range(x.ndim))

    return View(x, [*(x.shape[d] for d in rest), length], [*(x.digits[d] for d in rest), (length,)], source)


@operator("repeat")
def _repeat(tracer: Any, x: Value, times: Sequence[Any]) -> Value:
    x = with_ones(x, range(len(times) - x.ndim)) if len(times) > x.ndim else x
    shape = [n * size for n, size in zip(times, x.shape)]
    digits = [tuple(digit for digit in (n, *own) if not is_one(digit)) or (1,) for n, own in zip(times, x.digits)]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        ends = zip(positions, x.digits, x.shape)
        return tuple((ORIGIN,) * len(own) if is_one(size) else each[-len(own) :] for each, own, size in ends)

    return View(x, shape, digits, source)
