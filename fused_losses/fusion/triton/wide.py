"""Tiles of a kernel whose rows are few and long: programs share the lanes of a row.

What one program makes of a row the others see in the next launch. Long loops and rows take turns: sums along lanes are
made in parts by the one and joined by the other, with whatever else has a value for each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..ir import Stage
from ..schedule import Kernel
from .tiles import PART, PROGRAM, Nest, Tile, by_domain, in_parts, joining, kept, reduced, reduction


def has_wide_form(kernel: Kernel) -> bool:
    """Whether lanes can be shared out: not where they are taken in order, or the first of equals is looked for."""
    is_ordered = any(s.cumulated is not None or s.combine in ("argmax", "argmin") for s in kernel.stages)
    return bool(kernel.outer) and any(loop.inner for loop in kernel.loops) and not is_ordered


def wide_tiles(kernel: Kernel) -> Iterator[Tile]:
    turns = _turns(kernel)
    sums: list[list[Stage]] = []  # along lanes, whose parts the turn before has made
    totals: list[Tile] = []
    for turn in range(min(turns.values()), max(turns.values()) + 2):
        stages = [stage for stage in kernel.stages if turns[stage.buffer.name] == turn]
        together = [stage for stage in stages if _is_together(kernel, stage)]
        groups = [[stage for stage in loop.stages if stage in together] for loop in kernel.loops]
        groups = [group for group in groups if group]
        if _is_long(turn):
            yield from (Tile(kernel.outer, (), (_nest(kernel, group),), "lanes") for group in groups)
            sums = [same for group in groups if (same := [s for s in group if kernel.is_local(s) and reduced(s)])]
        elif sums or groups:
            nests = [*(joining(same, PART).nests[0] for same in sums), *(_nest(kernel, group) for group in groups)]
            adds_up = not all(map(kernel.is_local, together))
            yield Tile(kernel.outer, (), tuple(nests), "rows" if adds_up else "")
        added = ([stage for stage in group if not kernel.is_local(stage)] for group in groups)
        totals += [joining(same, PROGRAM) for same in added if same]
        for same in by_domain([stage for stage in stages if stage not in together]):
            yield from reduction(same)
    yield from totals


def _is_long(turn: int) -> bool:
    return turn % 2 == 0


def _turns(kernel: Kernel) -> dict[str, int]:
    """When each buffer is made: in an even turn where that takes a loop along lanes, in an odd one otherwise."""
    turns: dict[str, int] = {}
    seen: dict[str, int] = {}  # the first turn that sees a buffer
    for stage in kernel.stages:
        name, is_long = stage.buffer.name, not set(stage.domain) <= set(kernel.outer)
        first = max([-1, *(seen[read] for read in stage.reads if read in seen)])
        turns[name] = first if _is_long(first) == is_long else first + 1
        is_near = not is_long and _is_together(kernel, stage)
        seen[name] = turns[name] if is_near else turns[name] + 1
    return turns


def _is_together(kernel: Kernel, stage: Stage) -> bool:
    """Whether a stage is one of rows as they are: elementwise, or with a sum for each row or for all."""
    return not reduced(stage) or set(kept(stage)) in (set(), set(kernel.outer))


def _nest(kernel: Kernel, stages: Sequence[Stage]) -> Nest:
    along = next(loop.along for loop in kernel.loops if stages[0] in loop.stages)
    return Nest(along, (), tuple(_parted(kernel, stage) for stage in stages))


def _parted(kernel: Kernel, stage: Stage) -> Stage:
    """The stage as a program makes it, which has a part of what is summed."""
    return in_parts(stage, PART if kernel.is_local(stage) else PROGRAM) if reduced(stage) else stage
