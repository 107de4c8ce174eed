"""Triton of what reduces: where it starts, how a block is taken in lane by lane, and how lanes are joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir import Stage
from .expressions import COMPUTED, fitting, literal


@dataclass(frozen=True)
class Reduction:
    """``update`` combines ``{all}`` and ``{x}``; ``join`` reduces ``{all}`` along an axis."""

    start: str  # a number, or "lowest" or "highest" of the dtype
    update: str
    join: str
    is_place: bool = False

    def lines(
        self, name: str, stage: Stage, value: str, mask: str, shape: str, place: str
    ) -> tuple[list[str], list[str]]:
        """What stands before the loop, and in it."""
        dtype = stage.expression.dtype
        kind, start = COMPUTED[dtype], _start(self.start, dtype)
        every = f"{name}_all"
        before = [f"{every} = tl.full({shape}, {start}, {kind})"]
        x = f"tl.where({mask}, {value}, {fitting(start, dtype)})" if mask else value
        if not self.is_place:
            return before, [f"{every} = {self.update.format(all=every, x=x)}"]
        largest = self.start == "lowest"
        before.append(f"{name}_place = tl.full({shape}, 0x7FFFFFFFFFFFFFFF, tl.int64)")
        won = f"fl.is_before({value}, {place}, {every}, {name}_place, {largest})"
        inside = [
            f"{name}_won = {f'{mask} & ' if mask else ''}{won}",
            f"{every} = tl.where({name}_won, {value}, {every})",
            f"{name}_place = tl.where({name}_won, {place}, {name}_place)",
        ]
        return before, inside

    def joined(self, name: str, axis: str) -> str:
        """The lanes of each row as one, or everything."""
        is_row = axis == "1"
        is_all = "WHOLE" if is_row else False
        return self.join.format(all=f"{name}_all", place=f"{name}_place", axis=axis, keeps=is_row, is_all=is_all)


def _start(start: str, dtype: torch.dtype) -> str:
    if start not in ("lowest", "highest"):
        return literal(float(start), dtype)
    if dtype.is_floating_point:
        return f'float("{"-" if start == "lowest" else ""}inf")'
    if dtype is torch.bool:
        return str(start == "highest")
    limits = torch.iinfo(dtype)
    return str(limits.min if start == "lowest" else limits.max)


_EXTREME = "fl.{name}({{all}}, {{axis}}, {{keeps}})"
_LARGEST, _SMALLEST = _EXTREME.format(name="largest"), _EXTREME.format(name="smallest")
_FIRST = "fl.first_place({{all}}, {{place}}, {extreme}, {{axis}}, {{keeps}})"
_TRUTH = "tl.{name}({{all}}.to(tl.int32), {{axis}}, keep_dims={{keeps}}) != 0"
REDUCTIONS = {
    "sum": Reduction("0", "{all} + {x}", "fl.total({all}, {axis}, {keeps}, {is_all})"),
    "prod": Reduction("1", "{all} * {x}", "fl.product({all}, {axis}, {keeps}, {is_all})"),
    "max": Reduction("lowest", "fl.maximum({all}, {x})", _LARGEST),
    "min": Reduction("highest", "fl.minimum({all}, {x})", _SMALLEST),
    "any": Reduction("0", "{all} | {x}", _TRUTH.format(name="max")),
    "all": Reduction("1", "{all} & {x}", _TRUTH.format(name="min")),
    "argmax": Reduction("lowest", "", _FIRST.format(extreme=_LARGEST), True),
    "argmin": Reduction("highest", "", _FIRST.format(extreme=_SMALLEST), True),
}
