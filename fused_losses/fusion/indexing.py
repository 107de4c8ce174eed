"""Operators that move elements: views, padding, joining, gathers and scatters, as values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .ir import Expression
from .lowering import Lowering
from .operators import as_value, cast, expanded, mapped, operator, promoted, reduced, with_ones
from .values import (
    ORIGIN,
    Computed,
    Digits,
    Extent,
    Position,
    Positions,
    Scalar,
    Value,
    View,
    as_whole,
    broadcast,
    is_one,
    merged,
    product,
    quotient,
    restricted,
    same,
    size_of,
)


def _dimension(x: Value, dim: int) -> int:
    return dim % x.ndim if x.ndim else 0


def single(x: Value, *dims: int) -> Value:
    """A value of which some dimensions have one digit each."""
    return x if all(len(x.digits[d]) == 1 for d in dims) else as_whole(x)


def _replaced(positions: Positions, dim: int, *digits: Position) -> Positions:
    return (*positions[:dim], digits, *positions[dim + 1 :])


# Views.


@operator("expand", "broadcast_to")
def _expand(tracer: Any, x: Value, shape: Sequence[Any], implicit: bool = False) -> Value:
    rank = len(shape) - x.ndim
    wanted: list[Extent] = []
    digits: list[Digits] = []
    for d, size in enumerate(shape):
        own = x.shape[d - rank] if d >= rank else 1
        keep = (isinstance(size, int) and size == -1) or (d >= rank and not is_one(own))
        wanted.append(own if keep else size)
        digits.append(x.digits[d - rank] if keep else (size,))
        if keep and not (isinstance(size, int) and size == -1) and not size == own:
            raise RuntimeError(f"the expanded size of dimension {d} is {size}, and the tensor has {own}")
    target = Computed(wanted, x.dtype, digits, lambda lowering, positions: None)  # type: ignore[arg-type, return-value]
    return View(x, wanted, digits, lambda lowering, positions: restricted(lowering, positions, target, x))


@operator("broadcast_in_dim")
def _broadcast_in_dim(tracer: Any, x: Value, shape: Sequence[Extent], dimensions: Sequence[int]) -> Value:
    missing = [d for d in range(len(shape)) if d not in dimensions]
    return _expand(tracer, with_ones(x, missing), shape)


@operator("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy")
def _view(tracer: Any, x: Value, shape: Any, *strides: Any) -> Value:
    if isinstance(shape, torch.dtype):
        return NotImplemented
    shape = list(shape)
    for d, size in enumerate(shape):
        if isinstance(size, int) and size == -1:
            shape[d] = product(x.shape) // product([1, *shape[:d], *shape[d + 1 :]])
    if not product(shape) == product(x.shape):
        raise RuntimeError(f"shape {list(shape)} is invalid for a tensor of shape {list(x.shape)}")
    regrouping = _regrouping(x, shape)
    if regrouping is None:
        return _view(tracer, _stored_as(x, shape), shape) if not _is_plain(x, shape) else x
    digits, sources = regrouping

    def source(lowering: Lowering, positions: Positions) -> Positions:
        flat = [(p, d) for each, ds in zip(positions, digits) for p, d in zip(each, ds) if not is_one(d)]
        result = []
        for parts in sources:
            along = []
            for part in parts:
                taken, flat = flat[: len(part)], flat[len(part) :]
                along.append(merged(lowering, [p for p, _ in taken], tuple(part)))
            result.append(tuple(along))
        return tuple(result)

    return View(x, shape, digits, source)


def _is_plain(x: Value, shape: Sequence[Extent]) -> bool:
    return x.ndim == len(shape) and all(same(a, b) for a, b in zip(x.shape, shape))


def _stored_as(x: Value, shape: Sequence[Extent]) -> Value:
    """The value in memory, seen in another shape there."""
    from .values import External, ExternalCall

    call = ExternalCall(torch.ops.aten.reshape.default, (x, list(shape)), {}, "")
    call.outputs.append(External(call, 0, tuple(shape), x.dtype))
    return call.outputs[0]


def _regrouping(x: Value, shape: Sequence[Extent]) -> tuple[list[Digits], list[list[list[Extent]]]] | None:
    """The digits of a reshaped value, and for each digit of the value those that make it up."""
    sources: list[list[list[Extent]]] = [[[] for _ in digits] for digits in x.digits]
    waiting = [(digit, parts) for ds, ps in zip(x.digits, sources) for digit, parts in zip(ds, ps) if not is_one(digit)]
    result: list[Digits] = []
    for size in shape:
        digits: list[Extent] = []
        rest = size
        while not is_one(rest):
            if not waiting:
                return None
            digit, parts = waiting.pop(0)
            if (more := quotient(rest, digit)) is not None:
                taken, rest = digit, more
            elif (left := quotient(digit, rest)) is not None:
                taken, rest = rest, 1
                waiting.insert(0, (left, parts))
            else:
                return None
            digits.append(taken)
            parts.append(taken)
        result.append(tuple(digits) or (1,))
    return None if waiting else (result, sources)


@operator("permute")
def _permute(tracer: Any, x: Value, order: Sequence[int]) -> Value:
    order = [_dimension(x, d) for d in order]
    inverse = [order.index(d) for d in range(x.ndim)]
    shape, digits = [x.shape[d] for d in order], [x.digits[d] for d in order]
    return View(x, shape, digits, lambda lowering, positions: tuple(positions[d] for d in inverse))


@operator("transpose")
def _transpose(tracer: Any, x: Value, a: int, b: int) -> Value:
    if not x.ndim:
        return x
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return _permute(tracer, x, order)


@operator("t")
def _t(tracer: Any, x: Value) -> Value:
    return _permute(tracer, x, list(range(x.ndim))[::-1])


@operator("unsqueeze")
def _unsqueeze(tracer: Any, x: Value, dim: int) -> Value:
    return with_ones(x, [dim % (x.ndim + 1)])


@operator("squeeze")
def _squeeze(tracer: Any, x: Value, dims: Any = None) -> Value:
    chosen = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    dropped = {_dimension(x, d) for d in chosen if x.ndim and is_one(x.shape[d])}
    kept = [d for d in range(x.ndim) if d not in dropped]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        rest = iter(positions)
        return tuple((ORIGIN,) if d in dropped else next(rest) for d in range(x.ndim))

    return View(x, [x.shape[d] for d in kept], [x.digits[d] for d in kept], source)


@operator("select")
def _select(tracer: Any, x: Value, dim: int, index: Any) -> Value:
    dim = _dimension(x, dim)
    x = single(x, dim)
    size = x.shape[dim]
    if not (index < size and index >= -size):
        raise IndexError(f"index {index} is out of bounds for dimension {dim} of size {size}")
    at = Position.of({}, index + size if index < 0 else index)
    shape, digits = list(x.shape), list(x.digits)
    del shape[dim], digits[dim]
    return View(x, shape, digits, lambda lowering, positions: (*positions[:dim], (at,), *positions[dim:]))


def _range(size: Extent, start: Any, end: Any, step: Any) -> tuple[Any, Any]:
    """The first element and the number of elements of a slice."""

    def bound(value: Any, otherwise: Any) -> Any:
        if value is None or (isinstance(value, int) and value >= 2**62):
            return otherwise
        value = value + size if value < 0 else value
        return 0 if value < 0 else size if value > size else value

    start, end = bound(start, 0), bound(end, size)
    return start, (end - start + step - 1) // step if end > start else 0


@operator("slice")
def _slice(tracer: Any, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Value:
    dim = _dimension(x, dim)
    start, length = _range(x.shape[dim], start, end, step)
    if isinstance(start, int) and start == 0 and same(length, x.shape[dim]):
        return x
    x = single(x, dim)
    shape = [*x.shape[:dim], length, *x.shape[dim + 1 :]]
    digits = [*x.digits[:dim], (length,), *x.digits[dim + 1 :]]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        return _replaced(positions, dim, positions[dim][0].moved(lowering, step, start))

    return View(x, shape, digits, source)


@operator("split")
def _split(tracer: Any, x: Value, size: Any, dim: int = 0) -> list[Value]:
    total, start, parts = x.shape[dim], 0, []
    while start < total:
        parts.append(_slice(tracer, x, dim, start, start + size))
        start = start + size
    return parts


@operator("split_with_sizes")
def _split_with_sizes(tracer: Any, x: Value, sizes: Sequence[Any], dim: int = 0) -> list[Value]:
    start, parts = 0, []
    for size in sizes:
        parts.append(_slice(tracer, x, dim, start, start + size))
        start = start + size
    return parts


@operator("unbind")
def _unbind(tracer: Any, x: Value, dim: int = 0) -> list[Value]:
    return [_select(tracer, x, dim, k) for k in range(int(x.shape[dim]))]


@operator("flip")
def _flip(tracer: Any, x: Value, dims: Sequence[int]) -> Value:
    chosen = {_dimension(x, d) for d in dims} if x.ndim else set()

    def source(lowering: Lowering, positions: Positions) -> Positions:
        return tuple(
            tuple(p.moved(lowering, -1, digit - 1) for p, digit in zip(each, x.digits[d])) if d in chosen else each
            for d, each in enumerate(positions)
        )

    return View(x, x.shape, x.digits, source)


@operator("unfold")
def _unfold(tracer: Any, x: Value, dim: int, size: Any, step: Any) -> Value:
    dim = _dimension(x, dim)
    x = single(x, dim)
    length = (x.shape[dim] - size) // step + 1
    shape = [*x.shape[:dim], length, *x.shape[dim + 1 :], size]
    digits = [*x.digits[:dim], (length,), *x.digits[dim + 1 :], (size,)]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        first = positions[dim][0].moved(lowering, step, 0)
        return _replaced(positions[:-1], dim, first.plus(lowering, positions[-1][0]))

    return View(x, shape, digits, source)


@operator("diagonal")
def _diagonal(tracer: Any, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    dim1, dim2 = _dimension(x, dim1), _dimension(x, dim2)
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


@operator("diagonal_scatter")
def _diagonal_scatter(tracer: Any, x: Value, source: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    dim1, dim2 = _dimension(x, dim1), _dimension(x, dim2)
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
        inside = lowering.cast(lowering.element(source, at), x.dtype)
        return lowering.where(on, inside, lowering.element(x, positions))

    return Computed(x.shape, x.dtype, [(n,) for n in x.shape], element)


@operator("diagonal_backward")
def _diagonal_backward(tracer: Any, grad: Value, shape: Sequence[Extent], *where: int) -> Value:
    return _diagonal_scatter(tracer, Scalar(0, grad.dtype, shape), grad, *where)


@operator("repeat")
def _repeat(tracer: Any, x: Value, times: Sequence[Any]) -> Value:
    x = with_ones(x, range(len(times) - x.ndim)) if len(times) > x.ndim else x
    shape = [n * size for n, size in zip(times, x.shape)]
    digits = [(n, *own) for n, own in zip(times, x.digits)]
    return View(x, shape, digits, lambda lowering, positions: tuple(each[1:] for each in positions))


# Pieces side by side.


def _within(lowering: Lowering, position: Position, start: Any, end: Any) -> Expression:
    """Whether start <= position < end, leaving out a bound that is None."""
    index = position.expression(lowering)
    tests = []
    if start is not None:
        tests.append(lowering.make("ge", torch.bool, index, lowering.number(start, torch.int64)))
    if end is not None:
        tests.append(lowering.make("lt", torch.bool, index, lowering.number(end, torch.int64)))
    return tests[0] if len(tests) == 1 else lowering.make("logical_and", torch.bool, *tests)


def _guarded(positions: Positions, dim: int, position: Position) -> Positions:
    return _replaced(positions, dim, position)


@operator("constant_pad_nd")
def _pad(tracer: Any, x: Value, padding: Sequence[Any], value: Any = 0) -> Value:
    for k in range(len(padding) // 2):
        before, after = padding[2 * k], padding[2 * k + 1]
        x = _padded(x, x.ndim - 1 - k, before, after, value)
    return x


def _padded(x: Value, dim: int, before: Any, after: Any, value: Any) -> Value:
    if isinstance(before, int) and before <= 0 and isinstance(after, int) and after <= 0:
        return _slice(None, x, dim, -before, x.shape[dim] + after)
    x = single(x, dim)
    size = x.shape[dim]
    length = size + before + after
    shape = [*x.shape[:dim], length, *x.shape[dim + 1 :]]
    digits = [*x.digits[:dim], (length,), *x.digits[dim + 1 :]]

    def element(lowering: Lowering, positions: Positions) -> Expression:
        moved = positions[dim][0].moved(lowering, 1, -before, guarded=True)
        inside = lowering.element(x, _replaced(positions, dim, moved))
        low = None if isinstance(before, int) and before <= 0 else 0
        high = None if isinstance(after, int) and after <= 0 else size
        return lowering.where(_within(lowering, moved, low, high), inside, lowering.number(value, x.dtype))

    return Computed(shape, x.dtype, digits, element)


@operator("cat")
def _cat(tracer: Any, tensors: Sequence[Value], dim: int = 0) -> Value:
    tensors = [t for t in tensors if not (t.ndim == 1 and is_zero(t.shape[0]))] or list(tensors[:1])
    dtype = promoted(*tensors)
    dim = _dimension(tensors[0], dim)
    tensors = [as_whole(t) for t in tensors]
    starts: list[Any] = [0]
    for tensor in tensors:
        starts.append(starts[-1] + tensor.shape[dim])
    shape = [*tensors[0].shape[:dim], starts[-1], *tensors[0].shape[dim + 1 :]]

    def element(lowering: Lowering, positions: Positions) -> Expression:
        result = None
        for tensor, start, end in reversed(list(zip(tensors, starts, starts[1:]))):
            moved = positions[dim][0].moved(lowering, 1, -start, guarded=len(tensors) > 1)
            if is_one(tensor.shape[dim]):
                moved = ORIGIN
            piece = lowering.cast(lowering.element(tensor, _replaced(positions, dim, moved)), dtype)
            before_end = None if result is None else _within(lowering, positions[dim][0], None, end)
            result = piece if before_end is None else lowering.where(before_end, piece, result)  # type: ignore[arg-type]
        assert result is not None
        return result

    return Computed(shape, dtype, None, element)


def is_zero(extent: Extent) -> bool:
    return isinstance(extent, int) and extent == 0


@operator("stack")
def _stack(tracer: Any, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % (tensors[0].ndim + 1)
    return _cat(tracer, [with_ones(t, [dim]) for t in tensors], dim)


@operator("roll")
def _roll(tracer: Any, x: Value, shifts: Any, dims: Any = ()) -> Value:
    shifts = [shifts] if isinstance(shifts, (int, torch.SymInt)) else shifts
    if not dims:
        flat = _view(tracer, x, [product(x.shape)])
        return _view(tracer, _roll(tracer, as_whole(flat), shifts, [0]), x.shape)
    for shift, dim in zip(shifts, [dims] if isinstance(dims, int) else dims):
        size = x.shape[dim]
        start = size - shift % size
        x = _cat(tracer, [_slice(tracer, x, dim, start, size), _slice(tracer, x, dim, 0, start)], dim)
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
    dim = _dimension(x, dim)
    x, source = single(x, dim), single(source, dim)
    size = x.shape[dim]
    start, length = _range(size, start, end, step)
    if isinstance(start, int) and start == 0 and same(length, size):
        return cast(source, x.dtype)
    if not (isinstance(step, int) and step == 1):
        return NotImplemented
    shape, digits, _ = broadcast([x, Scalar(0, x.dtype, x.shape)])

    def element(lowering: Lowering, positions: Positions) -> Expression:
        moved = positions[dim][0].moved(lowering, 1, -start, guarded=True)
        at = _replaced(positions, dim, ORIGIN if is_one(source.shape[dim]) else moved)
        low = None if isinstance(start, int) and start == 0 else 0
        high = None if same(start + length, size) else length
        inside = lowering.cast(lowering.element(source, at), x.dtype)
        return lowering.where(_within(lowering, moved, low, high), inside, lowering.element(x, positions))

    return Computed(shape, x.dtype, digits, element)


@operator("select_backward")
def _select_backward(tracer: Any, grad: Value, shape: Sequence[Extent], dim: int, index: Any) -> Value:
    return _select_scatter(tracer, Scalar(0, grad.dtype, shape), grad, dim, index)


@operator("select_scatter")
def _select_scatter(tracer: Any, x: Value, source: Value, dim: int, index: Any) -> Value:
    dim = _dimension(x, dim)
    index = index + x.shape[dim] if index < 0 else index
    return _slice_scatter(tracer, x, with_ones(source, [dim]), dim, index, index + 1)


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


# Elements that another tensor chooses.


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
    dim = _dimension(x, dim)
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
    return _index(tracer, x, [None] * _dimension(x, dim) + [checked(index, x.shape[dim])])


@operator("embedding")
def _embedding(tracer: Any, weight: Value, indices: Value, *options: Any) -> Value:
    return _index(tracer, weight, [checked(indices, weight.shape[0])])


def _scattered(x: Value, dim: int, index: Value, source: Value, add: bool) -> Any:
    """x with elements of a source put, or added, where an index says; where only one index is looked at."""
    dim = _dimension(x, dim)
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
        at = _replaced(positions[:-1], dim, positions[-1][0])
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
    terms = index.shape[_dimension(x, dim)] if index.ndim else 1
    if not isinstance(terms, int) or terms > MOST_TERMS:
        return NotImplemented
    if not all(same(a, b) for a, b in zip(source.shape, index.shape)):
        return NotImplemented
    return _scattered(x, dim, index, source, add=True)
