"""Reductions over dimensions along which a few tensors lie, as torch.stack puts them: written out, place by place.

A loop over such a dimension would look at every tensor, and choose, at each of the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from .extents import Extent
from .ir import Buffer, Combine, Expression
from .lowering import Lowering, cost
from .values import ORIGIN, Map, Pairs, Positions, Reduction, Stored, Value, everywhere, place_of

MOST_PLACES = 8
MOST_OPERATIONS = 1024  # at all places together, with everything that goes into them
JOINS = {
    "sum": "add",
    "prod": "mul",
    "max": "maximum",
    "min": "minimum",
    "any": "logical_or",
    "all": "logical_and",
}


def reduction(outline: Outline, x: Value, dimensions: Sequence[int], combine: Combine, dtype: torch.dtype) -> Value:
    """A value combined over some of its dimensions: pieces by operations, everything else by a loop."""
    rest = list(dimensions)
    for dim in reversed(dimensions if combine in JOINS else ()):
        if is_piecewise(outline, x, dim):
            places = [place_of(x, dim, k) for k in range(x.shape[dim])]
            x = reduce(lambda a, b: Map(JOINS[combine], dtype, [a, b], dtype), places)
            rest = [d - (d > dim) for d in rest if d != dim]
    if dimensions and not rest:
        return x
    kept = [d for d in range(x.ndim) if d not in rest]
    return Reduction(x, rest, combine, dtype, [k for k, d in enumerate(kept) if is_piecewise(outline, x, d)])


def is_piecewise(outline: Outline, x: Value, dim: int) -> bool:
    """Whether the place along a dimension, of which there are a few, alone decides between tensors."""
    if not (x.ndim and _is_few(x.shape[dim]) and len(x.digits[dim]) == 1):
        return False
    expression = outline.element(x, everywhere(x))
    if expression.op == "placed":  # only a loop adds up where it belongs
        return False
    return chooses(expression, f"{dim}.0") and x.shape[dim] * cost(expression) <= MOST_OPERATIONS


def _is_few(extent: Extent) -> bool:
    return isinstance(extent, int) and 1 < extent <= MOST_PLACES


def chooses(expression: Expression, axis: str) -> bool:
    """Whether the place along an axis alone decides between elements."""
    return any(node.op == "where" and _is_along(node.arguments[0], axis) for node in expression.nodes)


def _is_along(condition: Expression, axis: str) -> bool:
    """Whether a condition depends on the place along one axis alone."""
    parts = condition.nodes
    axes = {name for node in parts if node.op == "index" for name, _ in node["value"].terms}
    return axes == {axis} and all(node.op != "load" for node in parts)


class Outline(Lowering):
    """Elements as if everything reduced were one point: with all in sight that they choose from, and without steps."""

    def __init__(self) -> None:
        super().__init__({}, "")

    def may_be_lone(self, value: Reduction, positions: Positions) -> bool:
        return self.looks_up(self.load_stored(value, positions))

    def load_stored(self, value: Value, positions: Positions) -> Expression:
        if isinstance(value, Reduction):
            return self.element(value.operand, value.around(positions, ORIGIN))
        assert isinstance(value, (Pairs, Stored))
        return self.element(value.operand, positions)

    def buffer(self, value: Value) -> Buffer:
        return Buffer(str(id(value)), (), value.dtype)
