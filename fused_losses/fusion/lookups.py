"""Operators that read or write elements which another tensor chooses, as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .ir import Expression
from .lowering import Lowering
from .operators import as_value, expanded, mapped, operator, reduced
from .values import (
    ORIGIN,
    Computed,
    Extent,
    Position,
    Positions,
    Value,
    View,
    as_whole,
    broadcast,
    is_one,
    restricted,
    same,
    size_of,
)
from .views import dimension_of, replaced, single


def checked(index: Value, size: Extent) -> Value:
    """An index of which every element must be at least 0 and less than a size."""

    def element(lowering: Lowering, positions: Positions) -> Expression:
        position = lowering.cast(lowering.element(index, positions), torch.int64)
        return lowering.make("checked", torch.int64, position, size=size_of(size))

    return Computed(index.shape, torch.int64, index.digits, element)


def _wrapped(index: Value, size: Extent) -> Value:
    """An index in which -1 is the last element."""

    def element(lowering: Lowering, positions: Positions) -> Expression:
        position = lowering.cast(lowering.element(index, positions), torch.int64)
        negative = lowering.make("lt", torch.bool, position, lowering.number(0, torch.int64))
        from_end = lowering.make("add", torch.int64, position, lowering.number(size, torch.int64))
        return lowering.where(negative, from_end, position)

    return checked(Computed(index.shape, torch.int64, index.digits, element), size)


@operator("gather")
def _gather(tracer: Any, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    dim = dimension_of(x, dim)
    if not x.ndim or not index.ndim:
        return NotImplemented
    x, index = as_whole(x), as_whole(index)
    chosen = checked(index, x.shape[dim])

    def source(lowering: Lowering, positions: Positions) -> Positions:
        at = Position.at(lowering.element(chosen, positions))
        return tuple((at,) if d == dim else (ORIGIN,) if is_one(x.shape[d]) else positions[d] for d in range(x.ndim))

    return View(x, index.shape, index.digits, source)


@operator("index")
def _index(tracer: Any, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if any(i.dtype in (torch.bool, torch.uint8) for _, i in given):
        raise tracer.refusal(
            "a boolean mask as an index gives a result whose size depends on values; "
            "use torch.where(mask, x, 0) and divide by mask.sum()"
        )
    dims = [d for d, _ in given]
    x = single(x, *dims)
    shape, digits, chosen = broadcast([_wrapped(as_whole(i), x.shape[d]) for d, i in given])
    together = dims == list(range(dims[0], dims[0] + len(dims)))
    place = dims[0] if together else 0
    rest = [d for d in range(x.ndim) if d not in dims]
    before, after = [d for d in rest if together and d < place], [d for d in rest if not (together and d < place)]
    out_shape = [*(x.shape[d] for d in before), *shape, *(x.shape[d] for d in after)]
    out_digits = [*(x.digits[d] for d in before), *digits, *(x.digits[d] for d in after)]
    common = Computed(shape, torch.int64, digits, lambda lowering, positions: None)  # type: ignore[arg-type, return-value]

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
    return _index(tracer, x, [None] * dimension_of(x, dim) + [checked(index, x.shape[dim])])


@operator("embedding")
def _embedding(tracer: Any, weight: Value, indices: Value, *options: Any) -> Value:
    return _index(tracer, weight, [checked(indices, weight.shape[0])])


def _scattered(x: Value, dim: int, index: Value, source: Value, add: bool) -> Any:
    """x with elements of a source put, or added, where an index says; where only one index is looked at."""
    dim = dimension_of(x, dim)
    if not x.ndim or not index.ndim:
        return NotImplemented
    x, index, source = as_whole(x), as_whole(index), as_whole(source)
    whole = all(same(a, b) for d, (a, b) in enumerate(zip(x.shape, index.shape)) if d != dim)
    if not whole or not (is_one(index.shape[dim]) or add):
        return NotImplemented
    chosen = checked(index, x.shape[dim])
    many = not is_one(index.shape[dim])
    # Dimensions of the terms: those of x, and that of the index at the end.
    shape = [*x.shape, index.shape[dim]]

    def term(lowering: Lowering, positions: Positions) -> Expression:
        at = replaced(positions[:-1], dim, positions[-1][0])
        at = tuple((ORIGIN,) if is_one(index.shape[d]) else p for d, p in enumerate(at))
        equal = lowering.make("eq", torch.bool, lowering.element(chosen, at), positions[dim][0].expression(lowering))
        put = lowering.cast(lowering.element(source, at), x.dtype)
        otherwise = lowering.number(0, x.dtype) if add else lowering.element(x, positions[:-1])
        return lowering.where(equal, put, otherwise)

    terms: Value = Computed(shape, x.dtype, None, term)
    if not add:
        return View(terms, x.shape, x.digits, lambda lowering, positions: (*positions, (ORIGIN,)))
    sums = (
        reduced(terms, [x.ndim], "sum", x.dtype)
        if many
        else View(terms, x.shape, x.digits, lambda lowering, positions: (*positions, (ORIGIN,)))
    )
    return mapped("add", x.dtype, x, sums)


@operator("scatter")
def _scatter(tracer: Any, x: Value, dim: int, index: Value, source: Any, reduce: Any = None) -> Any:
    if reduce is not None:
        return NotImplemented
    value = source if isinstance(source, Value) and source.ndim else expanded(as_value(source, x.dtype), index.shape)
    if isinstance(source, Value) and source.ndim and not all(same(a, b) for a, b in zip(source.shape, index.shape)):
        return NotImplemented
    return _scattered(x, dim, index, value, add=False)


MOST_TERMS = 16  # of a scattered sum, which looks at all of them for each element


@operator("scatter_add")
def _scatter_add(tracer: Any, x: Value, dim: int, index: Value, source: Value) -> Any:
    terms = index.shape[dimension_of(x, dim)] if index.ndim else 1
    if not isinstance(terms, int) or terms > MOST_TERMS:
        return NotImplemented
    if not all(same(a, b) for a, b in zip(source.shape, index.shape)):
        return NotImplemented
    return _scattered(x, dim, index, source, add=True)
