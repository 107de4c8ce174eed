"""Elements that a boolean mask chooses: all there are to choose from, with a size that nobody counts before the end.

``x[mask]`` keeps the elements of ``x`` where they are, under a size that stands for how many the mask chooses. What
goes element by element needs to know no more; a reduction along that size leaves out what is not chosen; and the size
is a number that the program adds up, where the loss divides by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .extents import is_counted, is_one, mask_of
from .ir import Buffer, Expression
from .lowering import Lowering
from .values import ORIGIN, Computed, Map, Position, Positions, Reduction, Value, View, Where, as_whole, everywhere

NOTHING = {"sum": 0, "prod": 1, "any": False, "all": True}  # what makes no difference to a reduction


class Mask:
    """A tensor of truth values as an index: its value, the sizes it chooses among, and how many elements it chooses."""

    def __init__(self, value: Value):
        self.value = as_whole(value)
        self.digits = tuple(size for size in self.value.shape if not is_one(size)) or (1,)
        chosen = Map("cast", torch.int64, [self.value])
        self.count = Reduction(chosen, range(chosen.ndim), "sum", torch.int64)

    def at(self, lowering: Lowering, along: Sequence[Position]) -> Expression:
        """Whether an element is chosen."""
        return lowering.element(self.value, self.positions(along))

    def positions(self, along: Sequence[Position]) -> Positions:
        """Positions along the dimension of what is chosen as those along the mask's own."""
        rest = iter(along)
        return tuple((ORIGIN,) if is_one(size) else (next(rest),) for size in self.value.shape)


class Masks(Lowering):
    """The masks of a trace: those that are computed alike are one, as where ``x[y > 0]`` stands beside ``y[y > 0]``."""

    def __init__(self) -> None:
        super().__init__({}, "")
        self._known: dict[Expression, Mask] = {}

    def __len__(self) -> int:
        return len(self._known)

    def buffer(self, value: Value) -> Buffer:
        """What is in memory has a name, and no step."""
        return self.buffers.setdefault(value, Buffer(f"v{len(self.buffers)}", (), value.dtype))

    def of(self, value: Value) -> Mask:
        expression = self.element(value, everywhere(value))
        if expression not in self._known:
            self._known[expression] = Mask(value)
        return self._known[expression]


def alone_in(tracer: Any, x: Value, indices: Sequence[Value | None]) -> tuple[int, Mask] | None:
    """The mask that is the only one among indices of x, and the dimension it starts at."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype is not torch.bool or not given[0][1].ndim:
        return None
    ((dim, index),) = given
    if any(map(is_counted, index.shape)):
        raise tracer.refusal("a boolean mask chooses among what another has chosen")
    if not all(a == b for a, b in zip(x.shape[dim : dim + index.ndim], index.shape)):
        raise IndexError(f"the shape of the mask, {[*index.shape]}, does not match that of the tensor, {[*x.shape]}")
    return dim, tracer.masks.of(index)


def chosen(tracer: Any, x: Value, dim: int, mask: Mask) -> Value:
    """x[mask], the mask being over dimensions from one on."""
    rank = mask.value.ndim
    x = as_whole(x)
    shape = [*x.shape[:dim], tracer.count(mask), *x.shape[dim + rank :]]
    digits = [*x.digits[:dim], mask.digits, *x.digits[dim + rank :]]

    def source(lowering: Lowering, positions: Positions) -> Positions:
        return (*positions[:dim], *mask.positions(positions[dim]), *positions[dim + 1 :])

    found = View(x, shape, digits, source)
    # What indices are made of is never asked for elsewhere, where it need not be in range.
    return found if x.dtype.is_floating_point else without_others(found, dim, 0)


def without_others(x: Value, dim: int, other: Any) -> Value:
    """x with a number in the place of what its mask does not choose along a dimension."""
    mask = mask_of(x.shape[dim])

    def element(lowering: Lowering, positions: Positions) -> Expression:
        is_chosen, nothing = mask.at(lowering, positions[dim]), lowering.number(other, x.dtype)
        element = lowering.element(x, positions)
        if element.op != "placed":
            return lowering.where(is_chosen, element, nothing)
        value, *places = element.arguments
        return lowering.make(
            "placed", x.dtype, lowering.where(is_chosen, value, nothing), *places, index=element["index"]
        )

    return Computed(x.shape, x.dtype, x.digits, element)


def put_back(x: Value, dim: int, mask: Mask, values: Value) -> Value:
    """x with values in the place of x[mask], of which they have the shape."""
    rank = mask.value.ndim

    def among(lowering: Lowering, positions: Positions) -> Expression:
        along = [p for each, size in zip(positions[dim : dim + rank], x.shape[dim:]) if not is_one(size) for p in each]
        at = (*positions[:dim], tuple(along) or (ORIGIN,), *positions[dim + rank :])
        return lowering.element(values, at)

    def is_chosen(lowering: Lowering, positions: Positions) -> Expression:
        return lowering.element(mask.value, positions[dim : dim + rank])

    condition = Computed(x.shape, torch.bool, x.digits, is_chosen)
    return Where(condition, Map("cast", x.dtype, [Computed(x.shape, values.dtype, x.digits, among)]), x, x.dtype)
