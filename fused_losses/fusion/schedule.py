"""Groups the stages of a program into kernels: passes over the data that read it once.

A :class:`Kernel` runs in parallel over its ``outer`` axes. Its loops run one after the other for every point of them,
so a later loop may read what an earlier one computed for that point (the row's maximum, then its sum of exponentials,
then its gradient), while the row is in cache. A stage whose outer axes are all reduced adds up over the whole kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .ir import ONE, Axis, Expression, Extern, Index, Program, Size, Stage


@dataclass(frozen=True)
class Loop:
    """Stages that are computed together, in one loop nest over the ``inner`` axes of a kernel, in memory order."""

    inner: tuple[Axis, ...]
    along: tuple[Axis, ...]  # the inner axes that lanes run along where the outer ones are rows
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Kernel:
    """Loops that run one after the other for every point of ``outer``, whose axes are in memory order.

    Stages that are not local add up along all of the outer axes, or along those after the first few, ``batch``.
    """

    outer: tuple[Axis, ...]
    batch: tuple[Axis, ...]
    loops: tuple[Loop, ...]
    split: tuple[Kernel, ...] = ()  # what does the same where the outer axes have few points; see _split

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for loop in self.loops for stage in loop.stages)

    def is_local(self, stage: Stage) -> bool:
        """Whether a stage has a result for every point of the outer axes, rather than one for all of them."""
        return set(self.outer) <= set(stage.axes)

    def is_point(self, stage: Stage) -> bool:
        """Whether a stage has one result for every point of the outer axes."""
        is_one = len(stage.values) == 1 and len([x for x in stage.axes if x.extent != ONE]) == len(self.outer)
        return is_one and self.is_local(stage)

    @property
    def rest(self) -> tuple[Axis, ...]:
        return self.outer[len(self.batch) :]


def schedule(program: Program) -> list[Kernel | Extern]:
    """Kernels and externs, in an order in which each reads only what is there."""
    groups = _grouped(unified(program), _joins)
    return [group if isinstance(group, Extern) else _split(_kernel(group), group) for group in groups]


Group = list[Stage] | Extern


def _grouped(steps: Sequence[Stage | Extern], joins: Callable[[Stage, Group], bool]) -> list[Group]:
    """Steps by kernel; a stage is in the first that it joins."""
    groups: list[Group] = []
    home: dict[str, int] = {}
    for step in steps:
        if isinstance(step, Extern):
            groups.append(step)
            home.update((buffer.name, len(groups)) for buffer in step.buffers)
            continue
        first = max([0, *(home[name] for name in step.reads if name in home)])
        place = next((g for g in range(first, len(groups)) if joins(step, groups[g])), len(groups))
        if place == len(groups):
            groups.append([])
        groups[place].append(step)  # type: ignore[union-attr]
        home[step.buffer.name] = place
    return groups


def product(sizes: Sequence[Size]) -> Size:
    result = ONE
    for size in sizes:
        result = size if result == ONE else Size("mul", arguments=(result, size))
    return result


def place_along(axes: Sequence[Axis]) -> Index:
    """Where a point is among all points of some axes."""
    factors = (product([later.extent for later in axes[k + 1 :]]) for k in range(len(axes)))
    return Index(tuple((axis.name, 1 if factor == ONE else factor) for axis, factor in zip(axes, factors)))


def unified(program: Program) -> list[Stage | Extern]:
    """The steps with axes that mean the same named the same across stages, so that equal axes are one loop."""
    extents: dict[str, Size] = {}
    along: dict[str, list[str | None]] = {buffer.name: [None] * len(buffer.sizes) for buffer in program.inputs}
    steps: list[Stage | Extern] = []
    made: set[str] = set()
    for step in program.steps:
        if isinstance(step, Extern):
            along.update((buffer.name, [None] * len(buffer.sizes)) for buffer in step.buffers)
            steps.append(step)
            continue
        names = _common_names(step, along, extents, made)
        steps.append(_renamed(step, names))
        along[step.buffer.name] = [names.get(axis.name) for axis in step.axes] + [None] * (len(step.values) > 1)
        made.add(step.buffer.name)
    return steps


def _common_names(
    stage: Stage, along: dict[str, list[str | None]], extents: dict[str, Size], made: set[str]
) -> dict[str, str]:
    """For each axis of a stage the name it has where the same buffers are made or read by others, or a fitting one."""
    axes = {axis.name: axis for axis in stage.mentioned}
    names: dict[str, str] = {}
    plain = [
        (buffer, dimension, axis)
        for buffer, along_it in sorted(stage.loaded_at, key=lambda load: (load[0] not in made, -len(load[1])))
        for dimension, axis in enumerate(along_it)
        if axis in axes
    ]

    def offer(axis: Axis, name: str | None) -> None:
        is_free = name is not None and axis.name not in names and name not in names.values()
        if name is not None and is_free and extents.setdefault(name, axis.extent) == axis.extent:
            names[axis.name] = name

    for buffer, dimension, axis in plain:
        offer(axes[axis], along[buffer][dimension])
    for axis in axes.values():
        # Not what another dimension of the same buffer has: lanes would run across memory.
        across = {
            name
            for buffer, dimension, read_along in plain
            if read_along == axis.name
            for other, name in enumerate(along[buffer])
            if other != dimension
        }
        for name in [axis.name, *extents, f"i{len(extents)}", f"j{len(extents)}"]:
            offer(axis, name if name not in across else None)
    for buffer, dimension, axis in plain:
        along[buffer][dimension] = along[buffer][dimension] or names[axis]
    return names


def _renamed(stage: Stage, names: dict[str, str]) -> Stage:
    """Axes of one point are taken out of every index."""
    if all(names.get(axis.name) == axis.name for axis in stage.axes + stage.reduced):
        return stage

    def at(index: Index) -> Index:
        return index._replace(terms=tuple((names[axis], factor) for axis, factor in index.terms if axis in names))

    done: dict[Expression, Expression] = {}
    for node in stage.expression.nodes:
        done[node] = node.rebuilt(done, at)
    rename = lambda axes: tuple(axis._replace(name=names.get(axis.name, axis.name)) for axis in axes)
    expression = done[stage.expression]
    return replace(stage, axes=rename(stage.axes), reduced=rename(stage.reduced), expression=expression)


def _joins(stage: Stage, group: Group) -> bool:
    """Whether a stage may run in a kernel, and gains from it: it reads the kernel's results or shares its loops."""
    if isinstance(group, Extern) or (axes := _outer([*group, stage])) is None:
        return False
    is_cut_alike = axes[0] == (_outer(group) or axes)[0]
    if reads_itself(group) and not is_cut_alike:
        return False  # fewer rows would run in parallel, and no longer stay in cache
    mine = set(stage.domain)
    shares = any(set(other.domain) == mine for other in group) or (is_cut_alike and mine == set(axes[0]))
    return shares or not stage.reads.isdisjoint(other.buffer.name for other in group)


def reads_itself(stages: Sequence[Stage]) -> bool:
    """Whether some of the stages read what others of them make."""
    made = {stage.buffer.name for stage in stages}
    return any(not made.isdisjoint(stage.reads) for stage in stages)


Outer = tuple[tuple[Axis, ...], tuple[Axis, ...]]  # the outer axes, and those of the batch among them


def _outer(stages: Sequence[Stage]) -> Outer | None:
    """The axes that a kernel of these stages runs over in parallel, or None if they cannot be one kernel."""
    order = memory_order(stages)
    if not order:
        return (), ()
    outer = _shared(order, stages)
    if reads_itself(stages):
        return _batched(outer, stages)
    settled = _settled(outer, stages)
    return (_narrowed(settled, order, stages), ()) if settled else None


def _shared(order: Sequence[Axis], stages: Sequence[Stage]) -> tuple[Axis, ...]:
    """The axes that every stage has, and along which none reads another but where it is."""
    inside = {stage.buffer.name: stage for stage in stages}
    shared = set(order)
    for stage in stages:
        shared &= {axis for axis in stage.domain if axis.name != stage.cumulated}
        for buffer, along in stage.loaded_at:
            if (source := inside.get(buffer)) is not None:
                shared &= {axis for axis, at in zip(source.axes, along) if at == axis.name}
    return tuple(axis for axis in order if axis in shared)


def _batched(outer: tuple[Axis, ...], stages: Sequence[Stage]) -> Outer | None:
    """The first of the outer axes are a batch where some stages keep just those."""
    partly = {kept for stage in stages if (kept := _kept(outer, stage)) not in ((), outer)}
    if not outer or len(partly) > 1:
        return None
    batch = partly.pop() if partly else ()
    return (outer, batch) if outer[: len(batch)] == batch else None


def _kept(outer: tuple[Axis, ...], stage: Stage) -> tuple[Axis, ...]:
    return tuple(axis for axis in outer if axis in stage.axes)


def _settled(outer: tuple[Axis, ...], stages: Sequence[Stage]) -> tuple[Axis, ...] | None:
    """The part of some axes that every stage keeps as a whole or reduces as a whole."""
    for stage in stages:
        kept = _kept(outer, stage)
        reduced = tuple(axis for axis in outer if axis not in kept)
        if kept and reduced:
            # Rows that lie one after the other are rows; otherwise adding up along the slow axes reads in order.
            leading = outer[: len(kept)] == kept
            first, second = (kept, reduced) if leading else (reduced, kept)
            return _settled(first, stages) or _settled(second, stages)
    return outer or None


def _narrowed(outer: tuple[Axis, ...], order: Sequence[Axis], stages: Sequence[Stage]) -> tuple[Axis, ...]:
    """Fewer outer axes, where tensors that lack some of them are then read once rather than for every element.

    What lacks axes between its own fastest and slowest (a number for each pixel of many classes) sets the outer axes;
    otherwise they are as many of the slowest as leave every tensor either whole or constant along the others. Positions
    along some of the axes are such tensors: what is next to an element is looked for along whole rows.
    """
    if list(outer) != list(order):
        return outer
    cut = 0
    for names in (names for stage in stages for names in stage.looks_along):
        has = [axis.name in names for axis in outer]
        if all(has) or not any(has):
            continue
        first, last = has.index(True), len(has) - has[::-1].index(True)
        if last == len(has) and not all(has[first:]):
            middle = tuple(axis for axis, is_there in zip(outer, has) if is_there)
            return _settled(middle, stages) or outer
        cut = max(cut, last if last < len(has) else first)
    return (_settled(outer[:cut], stages) or outer) if cut else outer


def memory_order(stages: Sequence[Stage]) -> list[Axis]:
    """Every axis of some stages, as the tensor with most of them has them, slowest first.

    What no tensor has (which of several stacked tensors is meant) comes before: lanes run along memory.
    """
    axes = {axis.name: axis for stage in stages for axis in stage.domain}
    made = {stage.buffer.name for stage in stages}
    by_load = [along for stage in stages for buffer, along in stage.loaded_along if buffer not in made]
    names = [name for load in sorted(by_load, key=len, reverse=True) for name in load]
    along = list(dict.fromkeys(name for name in names if name in axes))
    return [axes[name] for name in (*(name for name in axes if name not in along), *along)]


def _kernel(stages: Sequence[Stage], axes: Outer | None = None) -> Kernel:
    axes = axes or _outer(stages)
    assert axes is not None  # every group was checked when it grew
    outer, batch = axes
    order = [axis for axis in memory_order(stages) if axis not in outer]
    loops: list[Loop] = []
    home: dict[str, int] = {}
    for stage in stages:
        inner = tuple(axis for axis in order if axis in stage.domain)
        along = _along(stage, inner)
        first = max([0, *(home[name] + 1 for name in stage.reads if name in home)])
        fits = (i for i in range(first, len(loops)) if (loops[i].inner, loops[i].along) == (inner, along))
        place = next(fits, len(loops))
        if place == len(loops):
            loops.append(Loop(inner, along, ()))
        loops[place] = replace(loops[place], stages=(*loops[place].stages, stage))
        home[stage.buffer.name] = place
    return Kernel(outer, batch, tuple(loops))


def _split(kernel: Kernel, stages: Sequence[Stage]) -> Kernel:
    """A kernel, and what does the same where its outer axes have few points: kernels that read no result of their own.

    A kernel over fast axes that reads what it reduces along slower ones has lanes along the fast ones alone, which are
    too few where those are short: a statistic of each of three channels, say. One over rows has tasks of whole rows,
    which are too few where those are long: a statistic of each of four images. Its parts share them out.
    """
    order = memory_order(stages)
    outer = kernel.outer
    across = bool(outer) and outer[-1] == order[-1] and order[0] not in outer
    along = bool(outer) and not kernel.batch and outer == tuple(order[: len(outer)]) != tuple(order)
    if not along and not (across and reads_itself(stages)):
        return kernel

    def joins(stage: Stage, group: Group) -> bool:
        return not isinstance(group, Extern) and _joins(stage, group) and not reads_itself([*group, stage])

    groups = [group for group in _grouped(stages, joins) if not isinstance(group, Extern)]
    axes = [_batched(_shared(memory_order(group), group), group) if along else None for group in groups]
    return replace(kernel, split=tuple(map(_kernel, groups, axes)))


def _along(stage: Stage, inner: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """The inner axes that the stage treats like the fastest one: it keeps them, reduces them or adds up along them."""
    treated = [(axis in stage.axes, axis.name == stage.cumulated) for axis in inner]
    return tuple(axis for axis, how in zip(inner, treated) if how == treated[-1])
