"""Operators that put pieces of tensors beside or into each other, as values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .extents import Extent, is_one, product, same
from .ir import Expression
from .lowering import Lowering
from .operators import cast, operator, promoted, with_ones
from .reshaping import viewed
from .values import ORIGIN, Computed, Position, Positions, Scalar, Value, as_whole, broadcast, restricted
from .views import dimension_of, range_of, replaced, single, slice_of


def within(lowering: Lowering, position: Position, start: Any, end: Any) -> Expression:
    """Whether start <= position < end, leaving out a bound that is None."""
    index = position.expression(lowering)
    bounds = [(op, bound) for op, bound in (("ge", start), ("lt", end)) if bound is not None]
    tests = [lowering.compare(op, index, lowering.number(bound, torch.int64)) for op, bound in bounds]
    if len(tests) == 1:
        return tests[0]
    if tests[0].op == "constant":
        return lowering.where(tests[0], tests[1], tests[0])
    return lowering.make("logical_and", torch.bool, *tests)


def either(
    lowering: Lowering, condition: Expression, a: Callable[[], Expression], b: Callable[[], Expression]
) -> Expression:
    """One of two elements; the other is not even looked at where it is known which."""
    if condition.op == "constant":
        return a() if condition["value"] else b()
    return lowering.where(condition, _only_where(lowering, condition, a()), b())


def _only_where(lowering: Lowering, condition: Expression, expression: Expression) -> Expression:
    """An element of which no index is checked but where a condition holds: elsewhere nobody asked for it."""
    if not lowering.looks_up(expression):
        return expression
    done = {node: node for node in condition.nodes}  # what it takes to know that
    for node in expression.nodes:
        if node in done:
            continue
        new = node.rebuilt(done)
        arguments = new.arguments
        if node.op == "checked":
            arguments = (lowering.where(condition, arguments[0], lowering.number(0, torch.int64)),)
        done[node] = lowering.make(new.op, new.dtype, *arguments, **dict(new.attributes))
    return done[expression]


@operator("constant_pad_nd")
def _pad(tracer: Any, x: Value, padding: Sequence[Any], value: Any = 0) -> Value:
    for k in range(len(padding) // 2):
        before, after = padding[2 * k], padding[2 * k + 1]
        x = _padded(x, x.ndim - 1 - k, before, after, value)
    return x


def _padded(x: Value, dim: int, before: Any, after: Any, value: Any) -> Value:
    if isinstance(before, int) and before <= 0 and isinstance(after, int) and after <= 0:
        return slice_of(None, x, dim, -before, x.shape[dim] + after)
    x = single(x, dim)
    size = x.shape[dim]
    length = size + before + after
    shape = [*x.shape[:dim], length, *x.shape[dim + 1 :]]
    digits = [*x.digits[:dim], (length,), *x.digits[dim + 1 :]]

    def element(lowering: Lowering, positions: Positions) -> Expression:
        moved = positions[dim][0].moved(lowering, 1, -before, guarded=True)
        low = None if isinstance(before, int) and before <= 0 else 0
        high = None if isinstance(after, int) and after <= 0 else size
        return either(
            lowering,
            within(lowering, moved, low, high),
            lambda: lowering.element(x, replaced(positions, dim, moved)),
            lambda: lowering.number(value, x.dtype),
        )

    return Computed(shape, x.dtype, digits, element)


@operator("cat")
def _cat(tracer: Any, tensors: Sequence[Value], dim: int = 0) -> Value:
    tensors = [t for t in tensors if not (t.ndim == 1 and _is_zero(t.shape[0]))] or list(tensors[:1])
    dtype = promoted(*tensors)
    dim = dimension_of(tensors[0], dim)
    tensors = [as_whole(t) for t in tensors]
    starts: list[Any] = [0]
    for tensor in tensors:
        starts.append(starts[-1] + tensor.shape[dim])
    shape = [*tensors[0].shape[:dim], starts[-1], *tensors[0].shape[dim + 1 :]]

    def element(lowering: Lowering, positions: Positions) -> Expression:
        position, result = positions[dim][0], None
        for tensor, start, before_end in reversed(_candidates(lowering, position, tensors, starts)):
            moved = position.moved(lowering, 1, -start, guarded=len(tensors) > 1)
            at = replaced(positions, dim, ORIGIN if is_one(tensor.shape[dim]) else moved)
            piece = lowering.cast(lowering.element(tensor, at), dtype)
            piece = _only_where(lowering, within(lowering, moved, 0, tensor.shape[dim]), piece)
            result = piece if result is None else lowering.where(before_end, piece, result)
        assert result is not None
        return result

    return Computed(shape, dtype, None, element)


def _candidates(
    lowering: Lowering, position: Position, tensors: Sequence[Value], starts: Sequence[Any]
) -> list[tuple[Value, Any, Expression]]:
    """The pieces that a position may lie in, each with its start and whether the position is before its end."""
    result = []
    for k, (tensor, start) in enumerate(zip(tensors, starts)):
        is_last = k == len(tensors) - 1
        before_end = lowering.number(True, torch.bool) if is_last else within(lowering, position, None, starts[k + 1])
        is_known = before_end.op == "constant"
        if not is_known or before_end["value"]:
            result.append((tensor, start, before_end))
            if is_known:
                break
    return result


def _is_zero(extent: Extent) -> bool:
    return isinstance(extent, int) and extent == 0


@operator("stack")
def _stack(tracer: Any, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % (tensors[0].ndim + 1)
    return _cat(tracer, [with_ones(t, [dim]) for t in tensors], dim)


@operator("roll")
def _roll(tracer: Any, x: Value, shifts: Any, dims: Any = ()) -> Value:
    shifts = [shifts] if isinstance(shifts, (int, torch.SymInt)) else shifts
    if not dims:
        flat = viewed(tracer, x, [product(x.shape)])
        return viewed(tracer, _roll(tracer, as_whole(flat), shifts, [0]), x.shape)
    for shift, dim in zip(shifts, [dims] if isinstance(dims, int) else dims):
        size = x.shape[dim]
        if _is_zero(size):
            continue
        start = size - shift % size
        x = _cat(tracer, [slice_of(tracer, x, dim, start, size), slice_of(tracer, x, dim, 0, start)], dim)
    return x


@operator("slice_backward")
def _slice_backward(
    tracer: Any, grad: Value, shape: Sequence[Extent], dim: int, start: Any, end: Any, step: Any
) -> Value:
    return _slice_scatter(tracer, Scalar(0, grad.dtype, shape), grad, dim, start, end, step)


@operator("slice_scatter")
def _slice_scatter(
    tracer: Any, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Value:
    dim = dimension_of(x, dim)
    x, source = single(x, dim), single(source, dim)
    size = x.shape[dim]
    start, length = range_of(size, start, end, step)
    if isinstance(start, int) and start == 0 and same(length, size):
        return cast(source, x.dtype)
    if not isinstance(step, int):
        return NotImplemented
    low = None if step == 1 and isinstance(start, int) and start == 0 else 0
    high = None if step == 1 and same(start + length, size) else length

    def moved(lowering: Lowering, positions: Positions) -> Position:
        return positions[dim][0].moved(lowering, 1, -start, guarded=True).over(lowering, step)

    def shifted(lowering: Lowering, positions: Positions) -> Expression:
        along = ORIGIN if is_one(source.shape[dim]) else moved(lowering, positions)
        return lowering.cast(lowering.element(source, replaced(positions, dim, along)), x.dtype)

    there: Value = Computed(x.shape, x.dtype, [*source.digits[:dim], (size,), *source.digits[dim + 1 :]], shifted)
    shape, digits, (there, x) = broadcast([there, x])  # whose other dimensions may be made of different digits
    whole = Value(shape, x.dtype, digits)

    def element(lowering: Lowering, positions: Positions) -> Expression:
        return either(
            lowering,
            within(lowering, moved(lowering, positions), low, high),
            lambda: lowering.element(there, restricted(lowering, positions, whole, there)),
            lambda: lowering.element(x, restricted(lowering, positions, whole, x)),
        )

    return Computed(shape, x.dtype, digits, element)


@operator("select_backward")
def _select_backward(tracer: Any, grad: Value, shape: Sequence[Extent], dim: int, index: Any) -> Value:
    return _select_scatter(tracer, Scalar(0, grad.dtype, shape), grad, dim, index)


@operator("select_scatter")
def _select_scatter(tracer: Any, x: Value, source: Value, dim: int, index: Any) -> Value:
    dim = dimension_of(x, dim)
    index = index + x.shape[dim] if index < 0 else index
    return _slice_scatter(tracer, x, with_ones(source, [dim]), dim, index, index + 1)


@operator("diagonal_scatter")
def _diagonal_scatter(tracer: Any, x: Value, source: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    dim1, dim2 = dimension_of(x, dim1), dimension_of(x, dim2)
    x, source = as_whole(x), as_whole(source)
    rest = [d for d in range(x.ndim) if d not in (dim1, dim2)]

    def element(lowering: Lowering, positions: Positions) -> Expression:
        row, column = positions[dim1][0], positions[dim2][0]
        on = lowering.make(
            "eq",
            torch.bool,
            row.moved(lowering, 1, offset).expression(lowering),
            column.expression(lowering),
        )
        along = row.moved(lowering, 1, -max(-offset, 0), guarded=True)
        at = tuple(positions[d] for d in rest) + ((ORIGIN if is_one(source.shape[-1]) else along,),)
        return either(
            lowering,
            on,
            lambda: lowering.cast(lowering.element(source, at), x.dtype),
            lambda: lowering.element(x, positions),
        )

    return Computed(x.shape, x.dtype, [(n,) for n in x.shape], element)


@operator("diagonal_backward")
def _diagonal_backward(tracer: Any, grad: Value, shape: Sequence[Extent], *where: int) -> Value:
    return _diagonal_scatter(tracer, Scalar(0, grad.dtype, shape), grad, *where)


def _triangle(lower: bool) -> Callable[..., Value]:
    def handler(tracer: Any, x: Value, diagonal: int = 0) -> Value:
        x = single(x, x.ndim - 1, x.ndim - 2)

        def element(lowering: Lowering, positions: Positions) -> Expression:
            row, column = (positions[d][0].expression(lowering) for d in (-2, -1))
            last = lowering.binary("add", torch.int64, row, lowering.number(diagonal, torch.int64))
            inside = lowering.make("le" if lower else "ge", torch.bool, column, last)
            return lowering.where(inside, lowering.element(x, positions), lowering.number(0, x.dtype))

        return Computed(x.shape, x.dtype, x.digits, element)

    return handler


operator("tril")(_triangle(True))
operator("triu")(_triangle(False))
