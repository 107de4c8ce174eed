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
    is_rounded: bool = False  # whether combining rounds

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

    def joined(self, name: str, stage: Stage, axis: str, keeps: bool) -> str:
        """The lanes as one; those that add up or multiply in fp64, which costs a conversion for each lane."""
        every, kind = f"{name}_all", COMPUTED[stage.expression.dtype]
        is_widened = self.is_rounded and kind == "tl.float32"
        widened = f"{every}.to(tl.float64)" if is_widened else every
        joined = self.join.format(all=widened, place=f"{name}_place", axis=axis, keeps=keeps)
        return f"{joined}.to({kind})" if is_widened else joined


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
    "sum": Reduction("0", "{all} + {x}", "tl.sum({all}, {axis}, keep_dims={keeps})", is_rounded=True),
    "prod": Reduction("1", "{all} * {x}", "tl.reduce({all}, {axis}, fl.multiply, keep_dims={keeps})", is_rounded=True),
    "max": Reduction("lowest", "fl.maximum({all}, {x})", _LARGEST),
    "min": Reduction("highest", "fl.minimum({all}, {x})", _SMALLEST),
    "any": Reduction("0", "{all} | {x}", _TRUTH.format(name="max")),
    "all": Reduction("1", "{all} & {x}", _TRUTH.format(name="min")),
    "argmax": Reduction("lowest", "", _FIRST.format(extreme=_LARGEST), True),
    "argmin": Reduction("highest", "", _FIRST.format(extreme=_SMALLEST), True),
}
