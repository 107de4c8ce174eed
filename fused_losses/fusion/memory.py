"""What kernels know of the buffers they read and write, and places in them as C++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .expressions import STORED, identifier, size_of
from .ir import ONE, WIDE, Axis, Buffer, Size


@dataclass(frozen=True)
class Memory:
    """What passes know of the buffers: which have strides of their own, and what is stored for others to read."""

    buffers: Mapping[str, Buffer]
    strided: frozenset[str]  # inputs and what torch computed; everything else is contiguous
    stored: frozenset[str]  # computed buffers that are read outside their kernel
    returned: frozenset[str]  # those that become tensors, which keep their dtype

    def dtype(self, name: str) -> torch.dtype:
        """What the numbers of a buffer are stored as."""
        dtype, is_tensor = self.buffers[name].dtype, name in self.strided or name in self.returned
        return dtype if is_tensor else WIDE.get(dtype, dtype)

    def stored_type(self, name: str) -> str:
        return STORED[self.dtype(name)]

    def stride(self, name: str, dimension: int) -> str:
        if name in self.strided:
            return f"a.stride_{identifier(name)}_{dimension}"
        return product(self.buffers[name].sizes[dimension + 1 :])

    def last(self, name: str) -> str:
        """Where the last element is."""
        sizes = enumerate(self.buffers[name].sizes)
        return total([(f"({size_of(size)} - 1)", self.stride(name, d)) for d, size in sizes if size != ONE])


def held(kind: str) -> str:
    """What a block of a C++ type is held as: see ``expressions.HELD``."""
    return "uint8_t" if kind == "bool" else kind


def product(sizes: Sequence[Size]) -> str:
    return " * ".join(size_of(size) for size in sizes if size != ONE) or "1"


def total(terms: Sequence[tuple[str, str]]) -> str:
    """A sum of products, in C++."""
    parts = []
    for x, y in terms:
        if "0" not in (x, y):
            parts.append(x if y == "1" else y if x == "1" else f"{x} * {y if y.isidentifier() else f'({y})'}")
    return " + ".join(parts) or "0"


def factor_of(factor: int | Size) -> str:
    return str(factor) if isinstance(factor, int) else size_of(factor)


def place_among(axes: Sequence[Axis], places: Mapping[str, str] = MappingProxyType({})) -> str:
    """Where a point stands among all points of some axes, in C++: that of their loops, where no place is given."""
    widths = (product([later.extent for later in axes[k + 1 :]]) for k in range(len(axes)))
    return total([(places.get(axis.name, axis.name), width) for axis, width in zip(axes, widths)])


def looped(axes: Sequence[Axis], body: Sequence[str]) -> list[str]:
    heads = [f"for (int64_t {x.name} = 0; {x.name} < {size_of(x.extent)}; ++{x.name}) {{" for x in axes]
    return [*heads, *body, *["}"] * len(heads)]


def decoded(position: str, axes: tuple[Axis, ...]) -> list[str]:
    """The place along each of several axes, of one position along all of them."""
    lines = [f"int64_t {position}_rest = {position};"] if len(axes) > 1 else []
    for axis in reversed(axes[1:]):
        size = size_of(axis.extent)
        lines += [f"const int64_t {axis.name} = {position}_rest % {size};", f"{position}_rest /= {size};"]
    if axes:
        lines.append(f"const int64_t {axes[0].name} = {position}{'_rest' if len(axes) > 1 else ''};")
    return lines
