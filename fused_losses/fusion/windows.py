"""Means over windows of a few elements, as sums of shifted tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from .extents import Extent
from .ir import Expression
from .lowering import Lowering
from .operators import OPERATORS, mapped, operator
from .pieces import either, within
from .values import Computed, Positions, Stored, Value, place_of
from .views import replaced, single

LARGEST = 32  # elements of a window, each an operation


@operator("avg_pool2d")
def _avg_pool2d(tracer: Any, x: Value, size: Sequence[int], *options: Any) -> Any:
    windows = _windows(size, *options)
    if windows is None:
        return NotImplemented
    divisor, along = windows
    for dim, (length, step, padding) in along:
        x = OPERATORS["constant_pad_nd"](tracer, x, [0, 0] * (-1 - dim) + [padding, padding])
        frames = OPERATORS["unfold"](tracer, x, dim, length, step)
        x = _sum(place_of(frames, frames.ndim - 1, k) for k in range(length))
    return mapped("div", x.dtype, x, divisor)


@operator("avg_pool2d_backward")
def _avg_pool2d_backward(tracer: Any, grad: Value, x: Value, size: Sequence[int], *options: Any) -> Any:
    windows = _windows(size, *options)
    if windows is None:
        return NotImplemented
    divisor, along = windows
    grad = Stored(mapped("div", grad.dtype, grad, divisor))  # each is read by every element of its window
    for dim, (length, step, padding) in along:
        grad = _sum(_spread(grad, dim % x.ndim, x.shape[dim], k - padding, step) for k in range(length))
    return grad


def _windows(
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    is_ceiled: bool = False,
    counts_padding: bool = True,
    divisor: int | None = None,
) -> Any:
    """What sums are divided by, and length, step and padding for each dimension; None where torch does it."""
    lengths, steps, paddings = ([*given, *given][:2] for given in (size, stride or size, padding))
    is_fixed = all(isinstance(number, int) for number in (*lengths, *steps, *paddings))
    if not is_fixed or lengths[0] * lengths[1] > LARGEST or is_ceiled or (any(paddings) and not counts_padding):
        return None
    return divisor or lengths[0] * lengths[1], list(zip((-1, -2), zip(*(lengths[::-1], steps[::-1], paddings[::-1]))))


def _spread(x: Value, dim: int, size: Extent, start: int, step: int) -> Value:
    """Elements a step apart along a dimension, with zeros in between."""
    x = single(x, dim)

    def element(lowering: Lowering, positions: Positions) -> Expression:
        moved = positions[dim][0].moved(lowering, 1, -start, guarded=True).over(lowering, step)
        return either(
            lowering,
            within(lowering, moved, 0, x.shape[dim]),
            lambda: lowering.element(x, replaced(positions, dim, moved)),
            lambda: lowering.number(0, x.dtype),
        )

    shape, digits = list(x.shape), list(x.digits)
    shape[dim], digits[dim] = size, (size,)
    return Computed(shape, x.dtype, digits, element)


def _sum(values: Any) -> Value:
    return reduce(lambda a, b: mapped("add", a.dtype, a, b), values)
