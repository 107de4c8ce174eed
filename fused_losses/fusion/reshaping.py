"""Tensors in another shape, as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .extents import Extent, is_one, product, quotient, same
from .lowering import Lowering
from .operators import operator
from .values import Digits, Positions, Value, View, external, merged


@operator("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy", ordered=False)
def viewed(tracer: Any, x: Value, shape: Any, *strides: Any) -> Value:
    if isinstance(shape, torch.dtype):
        return NotImplemented
    shape = list(shape)
    for d, size in enumerate(shape):
        if isinstance(size, int) and size == -1:
            shape[d] = product(x.shape) // product([1, *shape[:d], *shape[d + 1 :]])
    if not product(shape) == product(x.shape):
        raise RuntimeError(f"shape {list(shape)} is invalid for a tensor of shape {list(x.shape)}")
    if len(shape) == x.ndim and all(map(same, shape, x.shape)):
        return x
    regrouping = _regrouping(x, shape)
    if regrouping is None:
        return _stored_as(x, shape)
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


def _stored_as(x: Value, shape: Sequence[Extent]) -> Value:
    """The value in memory, seen in another shape there."""
    return external(torch.ops.aten.reshape.default, (x, list(shape)), shape, x.dtype)


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
