"""From scheduled kernels to tiles: what one program of a Triton kernel computes.

A tile has rows, along the outer axes of a kernel, and lanes, along the inner axes of each loop. What adds up over the
rows, or along lanes that programs share, is reduced twice: each program stores its part, and a second kernel joins the
parts in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..ir import ONE, WIDE, Axis, Buffer, Expression, Extern, Index, Program, Size, Stage, spread
from ..schedule import Kernel, Loop, memory_order, reads_itself, schedule
from .guards import without_needless_choices
from .places import written_out

# Axes of the parts: among programs with the same rows, among all, and where they are joined.
PARTS = PART, PROGRAM, PIECE = "part", "each", "piece"

MANY = 8  # loads for each element, whose results fill registers


@dataclass(frozen=True)
class Nest:
    """Stages in one loop over ``lanes``, which run along the tile, and ``steps``, which are taken one by one.

    Steps lie inside the loop over lanes where the lanes are kept and the steps reduced; otherwise outside.
    """

    lanes: tuple[Axis, ...]
    steps: tuple[Axis, ...]
    stages: tuple[Stage, ...]

    @property
    def is_steps_inside(self) -> bool:
        first = self.stages[0]  # the others treat the lanes alike
        keeps_lanes = all(axis in first.axes for axis in self.lanes)
        return bool(self.steps) and keeps_lanes and not _cumulates(first, self.lanes)


@dataclass(frozen=True)
class Tile:
    """One Triton kernel: nests that run one after the other for a block of rows of one point of the batch."""

    rows: tuple[Axis, ...]
    batch: tuple[Axis, ...]
    nests: tuple[Nest, ...]
    shares: Literal["", "rows", "lanes"] = ""  # what the programs of a part share out

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for nest in self.nests for stage in nest.stages)

    @property
    def has_lanes(self) -> bool:
        return any(nest.lanes for nest in self.nests)

    @property
    def looks_around(self) -> bool:
        """Whether a nest has many loads for each of its elements, most of them next to one another."""
        loads = [{load for stage in nest.stages for load in stage.loads} for nest in self.nests]
        return any(len(each) > max(MANY, 2 * len({load["buffer"] for load in each})) for each in loads)

    @property
    def runs_along_lanes(self) -> bool:
        """Whether the fastest axis in memory is one of the lanes."""
        lanes = {axis for nest in self.nests for axis in nest.lanes}
        order = [axis for axis in memory_order(self.stages) if axis in lanes or axis in self.rows]
        return bool(order) and order[-1] in lanes

    def is_point(self, stage: Stage) -> bool:
        """Whether a stage has one value for each row, which stays in registers."""
        return len(stage.values) == 1 and set(kept(stage)) == {*self.batch, *self.rows}


def scheduled(program: Program) -> list[Kernel | Extern]:
    """Kernels, where sums whose terms say where they belong look at every term for each place: their order is fixed."""
    steps = (
        step if isinstance(step, Extern) else replace(step, expression=spread(step.expression))
        for step in program.steps
    )
    return schedule(written_out(without_needless_choices(replace(program, steps=tuple(steps)))))


def merged(steps: Iterable[Tile | Extern]) -> list[Tile | Extern]:
    """What runs, in order; scalars that follow the joining of parts are computed with it."""
    result: list[Tile | Extern] = []
    for step in steps:
        last = result[-1] if result else None
        if isinstance(last, Tile) and isinstance(step, Tile) and _is_scalar(last) and _is_scalar(step):
            result[-1] = replace(last, nests=last.nests + step.nests)
        else:
            result.append(step)
    return result


def kept(stage: Stage) -> tuple[Axis, ...]:
    return tuple(axis for axis in stage.axes if axis.extent != ONE)


def reduced(stage: Stage) -> tuple[Axis, ...]:
    return tuple(axis for axis in stage.reduced if axis.extent != ONE)


def _is_scalar(tile: Tile) -> bool:
    return not tile.rows and not tile.batch and not tile.shares


def tiles(kernel: Kernel) -> Iterator[Tile]:
    """The tiles of a kernel whose rows are many, or short: a program has the whole of a row."""
    apart = [stage for stage in kernel.stages if _is_apart(kernel, stage)]
    together = [stage for stage in kernel.stages if stage not in apart]
    if together and len(by_domain(together)) == 1 and reduced(together[0]) and not reads_itself(kernel.stages):
        yield from reduction(together)
    elif together:
        yield from _together(kernel, together)
    for stages in by_domain(apart):
        yield from reduction(stages)


def _is_apart(kernel: Kernel, stage: Stage) -> bool:
    """Whether a stage gets a kernel of its own: it has many results for a program, or no reader that wants them near.

    What it costs is another read of its inputs; what it gains is that all of the GPU takes part.
    """
    if kernel.is_local(stage):
        inner = set(kept(stage)) - set(kernel.outer)
        return bool(inner and reduced(stage)) and not reads_itself(kernel.stages)
    return not set(kept(stage)) <= set(kernel.batch) or stage.combine in ("argmax", "argmin")


def by_domain(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages that keep and reduce the same axes."""
    groups: dict[tuple[frozenset[Axis], frozenset[Axis]], list[Stage]] = {}
    for stage in stages:
        groups.setdefault((frozenset(kept(stage)), frozenset(reduced(stage))), []).append(stage)
    return list(groups.values())


def reduction(stages: Sequence[Stage]) -> Iterator[Tile]:
    """Rows are what is kept, lanes what is reduced, shared out to several programs where places are not asked for."""
    order = memory_order(stages)
    rows = tuple(axis for axis in order if axis in kept(stages[0]))
    lanes = tuple(axis for axis in order if axis in reduced(stages[0]))
    if any(stage.combine in ("argmax", "argmin") for stage in stages):
        yield Tile(rows, (), (Nest(lanes, (), tuple(stages)),))
        return
    yield Tile(rows, (), (Nest(lanes, (), tuple(in_parts(stage, PART) for stage in stages)),), "lanes")
    yield joining(stages, PART)


def _together(kernel: Kernel, stages: Sequence[Stage]) -> Iterator[Tile]:
    adding = [stage for stage in stages if not kernel.is_local(stage)]
    if not adding:
        yield Tile(kernel.outer, (), tuple(_nests(kernel, stages, {})))
        return
    axes = {stage.buffer.name: PART if kept(stage) or not kernel.batch else PROGRAM for stage in adding}
    yield Tile(kernel.rest, kernel.batch, tuple(_nests(kernel, stages, axes)), "rows")
    for axis in (PART, PROGRAM):
        if joined := [stage for stage in adding if axes[stage.buffer.name] == axis]:
            domains = dict.fromkeys(kept(stage) for stage in joined)
            yield from (joining([s for s in joined if kept(s) == each], axis) for each in domains)


def _nests(kernel: Kernel, stages: Sequence[Stage], parts: dict[str, str]) -> Iterator[Nest]:
    for loop in kernel.loops:
        grouped: dict[tuple[tuple[Axis, ...] | None, bool], list[Stage]] = {}
        for stage in loop.stages:
            if stage in stages:
                axes = tuple(axis for axis in loop.inner if axis in stage.axes)
                key = axes if axes and axes != loop.inner else None, _cumulates(stage, loop.along)
                grouped.setdefault(key, []).append(stage)
        for group in grouped.values():
            made = [in_parts(s, parts[s.buffer.name]) if s.buffer.name in parts else s for s in group]
            yield Nest(loop.along, _steps(loop), tuple(made))


def _cumulates(stage: Stage, lanes: Sequence[Axis]) -> bool:
    """Whether a stage adds up along the lanes."""
    return stage.cumulated in [axis.name for axis in lanes]


def _steps(loop: Loop) -> tuple[Axis, ...]:
    return tuple(axis for axis in loop.inner if axis not in loop.along)


def in_parts(stage: Stage, axis: str) -> Stage:
    """The stage that stores a result for each program."""
    name = f"{stage.buffer.name}_parts"
    axes = kept(stage)
    count = Size("size", (name, len(axes)))
    dtype = WIDE.get(stage.buffer.dtype, stage.buffer.dtype)
    buffer = Buffer(name, (*(axis.extent for axis in axes), count), dtype)
    return replace(stage, buffer=buffer, axes=(*axes, Axis(axis, count)))


def joining(stages: Sequence[Stage], axis: str) -> Tile:
    """The tile that combines the parts of stages that keep the same axes."""
    joined = []
    for stage in stages:
        parts = in_parts(stage, axis)
        pieces = Axis(PIECE, parts.axes[-1].extent)
        index = tuple(Index(((each.name, 1),)) for each in (*parts.axes[:-1], pieces))
        attributes = (("buffer", parts.buffer.name), ("index", index), ("guarded", False))
        load = Expression("load", stage.expression.dtype, (), attributes)
        joined.append(replace(stage, expression=load, reduced=(pieces,)))
    # The parts of all of them are as many.
    lanes = joined[0].reduced
    return Tile(kept(stages[0]), (), (Nest(lanes, (), tuple(replace(s, reduced=lanes) for s in joined)),))
