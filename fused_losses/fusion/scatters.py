"""Operators that put elements, or add them, where another tensor says, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .extents import is_counted, is_one, product, same
from .ir import Expression, Index
from .lookups import around, checked, wrapped
from .lowering import Lowering
from .masks import Mask, alone_in, put_back
from .operators import as_value, cast, expanded, mapped, operator, reduced, with_ones
from .values import ORIGIN, Computed, Positions, Scalar, Value, View, Where, as_whole, broadcast, restricted
from .views import dimension_of, replaced

MOST_TERMS = 16  # of a scattered sum that looks at all of them for each element
# Of a sum that adds each term at its place, every task has a copy: few results, as many as a near cache holds, or so
# many terms for each that a task's copy (see task_size in csrc/fusion/passes.h) is little beside them.
MOST_RESULTS = 4096
TERMS_EACH = 32
MOST_PLACES = 256  # on a GPU, where each place looks at every term


def _scattered(tracer: Any, x: Value, dim: int, index: Value, source: Value, add: bool) -> Any:
    """x with elements of a source put, or added, where an index says; where only one index is looked at."""
    dim = dimension_of(x, dim)
    if not x.ndim or not index.ndim:
        return NotImplemented
    x, index, source = as_whole(x), as_whole(index), as_whole(source)
    whole = all(same(a, b) for d, (a, b) in enumerate(zip(x.shape, index.shape)) if d != dim)
    if not whole or not (is_one(index.shape[dim]) or add):
        return NotImplemented
    chosen = checked(index, x.shape[dim])
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
    if not is_one(index.shape[dim]):
        return mapped("add", x.dtype, x, reduced(tracer, terms, [x.ndim], "sum", x.dtype))
    alone = View(terms, x.shape, x.digits, lambda lowering, positions: (*positions, (ORIGIN,)))
    return mapped("add", x.dtype, x, alone) if add else alone


@operator("scatter", ordered=False)
def _scatter(tracer: Any, x: Value, dim: int, index: Value, source: Any, reduce: Any = None) -> Any:
    if reduce is not None:
        return NotImplemented
    value = source if isinstance(source, Value) and source.ndim else expanded(as_value(source, x.dtype), index.shape)
    if isinstance(source, Value) and source.ndim and not all(same(a, b) for a, b in zip(source.shape, index.shape)):
        return NotImplemented
    return _scattered(tracer, x, dim, index, value, add=False)


@operator("scatter_add")
def _scatter_add(tracer: Any, x: Value, dim: int, index: Value, source: Value) -> Any:
    dim = dimension_of(x, dim)
    if not x.ndim or not index.ndim or not all(a == b for a, b in zip(source.shape, index.shape)):
        return NotImplemented
    terms = index.shape[dim]
    if isinstance(terms, int) and terms <= MOST_TERMS:
        return _scattered(tracer, x, dim, index, source, add=True)
    others = {d: d for d in range(x.ndim) if d != dim}
    if not all(x.shape[d] == index.shape[d] for d in others):
        return NotImplemented
    return _summed(tracer, as_whole(x), source, {dim: checked(index, x.shape[dim])}, others)


@operator("scatter_reduce")
def _scatter_reduce(
    tracer: Any, x: Value, dim: int, index: Value, source: Value, reduce: str, include_self: bool = True
) -> Any:
    return _scatter_add(tracer, x, dim, index, source) if reduce == "sum" and include_self else NotImplemented


@operator("index_put", "_unsafe_index_put", ordered=False)
def _index_put(
    tracer: Any, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False, *options: Any
) -> Any:
    if any(map(is_counted, values.shape)) and (found := alone_in(tracer, x, indices)) is not None:
        return _put_chosen(tracer, x, *found, values, accumulate)
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if not accumulate and not values.ndim and list(given) == [0] and given[0].dtype is torch.bool:
        chosen = with_ones(given[0], range(given[0].ndim, x.ndim))
        return Where(chosen, cast(values, x.dtype), x, x.dtype)
    if not accumulate or any(i.dtype in (torch.bool, torch.uint8) for i in given.values()):
        return NotImplemented
    return _put(tracer, as_whole(x), {d: wrapped(i, x.shape[d]) for d, i in given.items()}, values)


def _put_chosen(tracer: Any, x: Value, dim: int, mask: Mask, values: Value, accumulate: bool) -> Value:
    """x with values put, or added, where a mask chose them."""
    x = as_whole(x)
    values = expanded(values, [*x.shape[:dim], tracer.count(mask), *x.shape[dim + mask.value.ndim :]])
    if not accumulate:
        return put_back(x, dim, mask, values)
    return mapped("add", x.dtype, x, put_back(Scalar(0, x.dtype, x.shape), dim, mask, values))


def _put(tracer: Any, x: Value, indices: Mapping[int, Value], values: Value) -> Any:
    """x with values added to x[indices], which are checked."""
    middle, _, chosen = broadcast(list(indices.values()))
    before, after = around(x, list(indices))
    shape = [*(x.shape[d] for d in before), *middle, *(x.shape[d] for d in after)]
    own = {d: k for k, d in enumerate(before)} | {d: k for k, d in enumerate(after, len(shape) - len(after))}
    places = {d: with_ones(i, range(i.ndim, i.ndim + len(after))) for d, i in zip(indices, chosen)}
    return _summed(tracer, x, expanded(values, shape), places, own)


@operator("index_add")
def _index_add(tracer: Any, x: Value, dim: int, index: Value, source: Value, alpha: Any = 1) -> Any:
    if not x.ndim or not index.ndim:
        return NotImplemented
    dim = dimension_of(x, dim)
    source = source if alpha == 1 else mapped("mul", x.dtype, source, alpha)
    return _put(tracer, as_whole(x), {dim: checked(index, x.shape[dim])}, source)


def _summed(tracer: Any, x: Value, values: Value, places: Mapping[int, Value], own: Mapping[int, int]) -> Any:
    """x with every one of some values added to an element of it.

    ``places`` has a tensor that says where along a dimension of x, ``own`` the values' own dimension for the others.
    """
    shape, digits, (values, *chosen) = broadcast([values, *places.values()])
    count = product([x.shape[d] for d in places])
    if x.dtype is torch.bool or not _is_worthwhile(tracer, count, product(x.shape), product(shape)):
        return NotImplemented
    over = [k for k in range(len(shape)) if k not in own.values()]
    whole = Value(shape, x.dtype, digits)

    def term(lowering: Lowering, positions: Positions) -> Expression:
        by_dimension = {k: positions[d] for d, k in own.items()} | dict(zip(over, positions[x.ndim :]))
        at = tuple(by_dimension[k] for k in range(len(shape)))
        value, *where = (lowering.element(v, restricted(lowering, at, whole, v)) for v in (values, *chosen))
        value, along = lowering.cast(value, x.dtype), [positions[d][0] for d in places]
        index = tuple(position.as_index() for position in along)
        if all(isinstance(each, Index) for each in index):
            return lowering.make("placed", x.dtype, value, *where, index=index)
        # An outline of what is read of the sum at computed places.
        for position, place in zip(along, where):
            is_there = lowering.make("eq", torch.bool, position.expression(lowering), place)
            value = lowering.where(is_there, value, lowering.number(0, x.dtype))
        return value

    of_x = [digits[own[d]] if d in own else x.digits[d] for d in range(x.ndim)]
    terms = Computed([*x.shape, *(shape[k] for k in over)], x.dtype, [*of_x, *(digits[k] for k in over)], term)
    sums = reduced(tracer, terms, range(x.ndim, terms.ndim), "sum", x.dtype)
    return sums if isinstance(x, Scalar) and x.number == 0 else mapped("add", x.dtype, x, sums)


def _is_worthwhile(tracer: Any, places: Any, results: Any, terms: Any) -> bool:
    """Whether a sum whose terms go to computed places is better taken here than left to torch."""
    if not results > 0:
        return False
    if tracer.device.type != "cpu":
        return places <= MOST_PLACES
    return results <= MOST_RESULTS or results * TERMS_EACH <= terms
