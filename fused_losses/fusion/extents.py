"""Sizes of traced tensors, and what follows of them whatever they are: worked out without torch, which takes longer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .ir import Size
from .sizes import Number

Extent = Any  # int or torch.SymInt, whose arithmetic type checkers take for that of floats


def number_of(extent: Extent) -> int | Number:
    """An extent for arithmetic; equal ones are the same."""
    return extent if isinstance(extent, int) else extent.node.plain


def extent_of(number: int | Number) -> Extent:
    return number if isinstance(number, int) else number.extent


def as_size(number: int | Number) -> Size:
    return Size("const", number) if isinstance(number, int) else number.size


def size_of(extent: Extent) -> Size:
    return as_size(number_of(extent))


def sizes_of(shape: Sequence[Extent]) -> tuple[Size, ...]:
    return tuple(map(size_of, shape))


def as_argument(argument: Any, named: Callable[[Any], Any]) -> Any:
    """An argument of an operator as a step has it: sizes as their formulas, and all but containers as it is named."""
    if isinstance(argument, torch.SymInt):
        return argument.node.size
    if isinstance(argument, (list, tuple)):
        return type(argument)(as_argument(item, named) for item in argument)
    if isinstance(argument, dict):
        return {name: as_argument(item, named) for name, item in argument.items()}
    return named(argument)


def is_one(extent: Extent) -> bool:
    """Whether an extent is 1; open sizes never are."""
    return isinstance(extent, int) and extent == 1


def mask_of(extent: Extent) -> Any:
    """The mask that chooses so many elements, where an extent is that."""
    return extent.node.mask if isinstance(extent, torch.SymInt) else None


def is_counted(extent: Extent) -> bool:
    """Whether it depends on how many elements a mask chooses."""
    return isinstance(extent, torch.SymInt) and extent.node.is_counted


def digits_of(extent: Extent) -> tuple[Extent, ...]:
    """What a dimension of some size runs over: all that a mask chooses from."""
    mask = mask_of(extent)
    return (extent,) if mask is None else mask.digits


def same(x: Extent, y: Extent) -> bool:
    """Whether two extents are equal whatever the sizes are."""
    return x is y or number_of(x) == number_of(y)


def product(extents: Sequence[Extent]) -> Extent:
    return extent_of(math.prod(map(number_of, extents)))


def quotient(a: Extent, b: Extent) -> Extent | None:
    """a / b where it is a whole number whatever the sizes are."""
    x, y = number_of(a), number_of(b)
    if y == 0:
        return None
    if isinstance(x, Number):
        whole = x.over(y)
        return None if whole is None else extent_of(whole)
    if isinstance(y, int):
        return None if x % y else x // y
    return None if x else 0
