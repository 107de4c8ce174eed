"""Operators that read elements which another tensor chooses, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .extents import Extent, is_counted, is_one, mask_of, size_of
from .ir import Expression
from .lowering import Lowering
from .masks import alone_in, chosen
from .operators import operator
from .refusals import refused
from .values import ORIGIN, Computed, Position, Positions, Value, View, as_whole, broadcast, restricted
from .views import dimension_of, single


def checked(index: Value, size: Extent) -> Value:
    """An index of which every element must be at least 0 and less than a size."""
    if is_counted(size):
        raise refused("an index says which of the elements that a boolean mask chooses")

    def element(lowering: Lowering, positions: Positions) -> Expression:
        position = lowering.cast(lowering.element(index, positions), torch.int64)
        return lowering.make("checked", torch.int64, position, size=size_of(size))

    return Computed(index.shape, torch.int64, index.digits, element)


def wrapped(index: Value, size: Extent) -> Value:
    """An index in which -1 is the last element."""

    def element(lowering: Lowering, positions: Positions) -> Expression:
        position = lowering.cast(lowering.element(index, positions), torch.int64)
        negative = lowering.make("lt", torch.bool, position, lowering.number(0, torch.int64))
        from_end = lowering.make("add", torch.int64, position, lowering.number(size, torch.int64))
        return lowering.where(negative, from_end, position)

    return checked(Computed(index.shape, torch.int64, index.digits, element), size)


@operator("gather", ordered=False)
def _gather(tracer: Any, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    dim = dimension_of(x, dim)
    if not x.ndim or not index.ndim:
        return NotImplemented
    x, index = as_whole(x), as_whole(index)
    others = [(a, b) for d, (a, b) in enumerate(zip(x.shape, index.shape)) if d != dim]
    if any(mask_of(a) is not mask_of(b) for a, b in others) or is_counted(index.shape[dim]):
        raise tracer.refusal("gather depends on where the elements stand that a boolean mask chooses")
    place = checked(index, x.shape[dim])

    def source(lowering: Lowering, positions: Positions) -> Positions:
        at = Position.at(lowering.element(place, positions))
        return tuple((at,) if d == dim else (ORIGIN,) if is_one(x.shape[d]) else positions[d] for d in range(x.ndim))

    return View(x, index.shape, index.digits, source)


def around(x: Value, dims: Sequence[int]) -> tuple[list[int], list[int]]:
    """The dimensions that stand before and after those of the indices in x[indices]."""
    together = list(dims) == list(range(dims[0], dims[0] + len(dims)))
    rest = [d for d in range(x.ndim) if d not in dims]
    return [d for d in rest if together and d < dims[0]], [d for d in rest if not together or d > dims[0]]


@operator("index", ordered=False)
def _index(tracer: Any, x: Value, indices: Sequence[Value | None]) -> Value:
    if (found := alone_in(tracer, x, indices)) is not None:
        return chosen(tracer, x, *found)
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if any(i.dtype in (torch.bool, torch.uint8) for i in given.values()):
        raise tracer.refusal(
            "a mask beside other indices gives a result whose size depends on values; index with one after the other"
        )
    return _indexed(x, {d: wrapped(as_whole(i), x.shape[d]) for d, i in given.items()})


def _indexed(x: Value, indices: Mapping[int, Value]) -> Value:
    """x at indices along some dimensions, which are checked."""
    dims = list(indices)
    x = single(x, *dims)
    shape, digits, chosen = broadcast(list(indices.values()))
    before, after = around(x, dims)
    out_shape = [*(x.shape[d] for d in before), *shape, *(x.shape[d] for d in after)]
    out_digits = [*(x.digits[d] for d in before), *digits, *(x.digits[d] for d in after)]
    common = Value(shape, torch.int64, digits)

    def source(lowering: Lowering, positions: Positions) -> Positions:
        middle = positions[len(before) : len(before) + len(shape)]
        others = dict(zip([*before, *after], positions[: len(before)] + positions[len(before) + len(shape) :]))
        for d, value in zip(dims, chosen):
            others[d] = (Position.at(lowering.element(value, restricted(lowering, middle, common, value))),)
        return tuple(others[d] for d in range(x.ndim))

    return View(x, out_shape, out_digits, source)


@operator("index_select")
def _index_select(tracer: Any, x: Value, dim: int, index: Value) -> Value:
    if not x.ndim or not index.ndim:
        return NotImplemented
    dim = dimension_of(x, dim)
    return _indexed(x, {dim: checked(as_whole(index), x.shape[dim])})


@operator("embedding")
def _embedding(tracer: Any, weight: Value, indices: Value, *options: Any) -> Value:
    return _indexed(weight, {0: checked(as_whole(indices), weight.shape[0])})
