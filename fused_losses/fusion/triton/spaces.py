"""Axes that rows, lanes or steps run along, as one position that is taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir import Axis
from ..schedule import product
from .numbers import Numbers
from .tiles import PARTS

ROW, LANE, STEP = "row", "lane", "step"


@dataclass
class Space:
    """Axes that rows or lanes run along, flattened, and the strides along them of every view of a buffer."""

    kind: str
    name: str
    axes: tuple[Axis, ...]
    views: list[tuple[str | None, ...]] = field(default_factory=list)  # names of numbers; None where it does not move
    keeps_axes: bool = False  # whether the place along an axis is itself looked at

    def extent(self, numbers: Numbers) -> str:
        is_of_parts = any(axis.name in PARTS for axis in self.axes)
        return numbers.size(product([axis.extent for axis in self.axes]), f"{self.name}_count", is_of_parts)

    def decoded(self, position: str, numbers: Numbers) -> list[str]:
        """The place along each axis; where all views are flat in memory, the last axis stands for all."""
        if len(self.axes) < 2:
            return [f"{axis.name} = {position}" for axis in self.axes]
        first, *others = self.axes
        lines, rest = [], position
        for axis in reversed(others):
            size = numbers.size(axis.extent, f"{axis.name}_size", False)
            lines.append(f"{self.name}_rest, {axis.name} = fl.divided({rest}, {size}, NARROW)")
            rest = f"{self.name}_rest"
        lines.append(f"{first.name} = {rest}")
        if self.kind == STEP or self.keeps_axes:
            return lines
        flat = [*(f"{axis.name} = 0" for axis in self.axes[:-1]), f"{self.axes[-1].name} = {position}"]
        return [f"if FLAT_{self.name.upper()}:", *indented(flat), "else:", *indented(lines)]


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
