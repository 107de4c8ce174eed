"""C++ of what loops result in: values that are stored, and reductions of lanes, of loops and of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from .body import LANES
from .expressions import COMPUTED, HELD, identifier
from .ir import ONE, Axis, Stage
from .memory import decoded, held, looped, place_among, product, total
from .schedule import place_along

if TYPE_CHECKING:
    from .nest import Nest

REDUCTIONS = {
    "sum": "Sum",
    "prod": "Product",
    "max": "Max",
    "min": "Min",
    "any": "Any",
    "all": "All",
    "argmax": "ArgMax",
    "argmin": "ArgMin",
}


def result(nest: Nest, stage: Stage, values: Sequence[str]) -> None:
    """Stores the values of a stage, or reduces the only one."""
    value, *_ = values
    if stage.combine is not None:
        _reduce(nest, stage, value)
    elif stage.cumulated is not None:
        _cumulate(nest, stage, value)
    elif nest.of.kernel.is_point(stage):
        _local(nest, stage, value, nest.body.store, nest.joins)
    else:
        for part, value in enumerate(values):
            _write(nest, stage, value, part)


def _local(nest: Nest, stage: Stage, value: str, store: Callable[[str], None], joins: list[str]) -> None:
    """A result for each point of the outer axes, which later loops of the kernel read."""
    local, kind = f"local_{identifier(stage.buffer.name)}", COMPUTED[stage.buffer.dtype]
    is_stored = stage.buffer.name in nest.memory.stored
    if nest.of.is_rows:
        nest.after.append(f"const {kind} {local} = {value};")
        if is_stored:
            nest.after.append(f"narrow({local}, {_data(stage)}[{_place(nest, stage)}]);")
        return
    nest.of.array(kind, local)
    store(f"{local}[i] = {value};")
    if is_stored:
        out, origin = _output(nest, stage)
        joins.append(f"{out}.put({nest.seek(out)}, n, {origin}, {local});")


def _write(nest: Nest, stage: Stage, value: str, part: int) -> None:
    """A result for each point of outer and inner axes, which goes to its buffer at once; it may be part of a pair."""
    if not nest.lanes:
        nest.scalars.append(f"narrow({value}, {_data(stage)}[{_place(nest, stage, part)}]);")
        return
    block, put = _place_of_block(nest, stage, part)
    nest.body.store(f"{block}[i] = {value};")
    nest.joins.append(put)


def _place_of_block(nest: Nest, stage: Stage, part: int = 0) -> tuple[str, str]:
    """Where a block of results is computed, and what takes it to its buffer then."""
    out, origin = _output(nest, stage, part)
    kind, block = COMPUTED[stage.buffer.dtype], nest.of.name("o")
    scratch = nest.of.array(kind)
    nest.blocks.append(f"{held(kind)}* {block} = {out}.place({nest.seek(out)}, n, {origin}, {scratch});")
    return block, f"{out}.put({nest.seek(out)}, n, {origin}, {block});"


def _data(stage: Stage) -> str:
    return f"a.data_{identifier(stage.buffer.name)}"


def _output(nest: Nest, stage: Stage, part: int = 0) -> tuple[str, str]:
    """The view that writes a buffer, and where its lanes start."""
    name = stage.buffer.name
    by_axis = {axis.name: nest.memory.stride(name, d) for d, axis in enumerate(stage.axes)}
    numel = product(stage.buffer.sizes) if name in nest.memory.returned else "0"
    out = nest.space.view("Output", _data(stage), by_axis, numel)
    return out, _place(nest, stage, part)


def _place(nest: Nest, stage: Stage, part: int = 0) -> str:
    """The offset in a stage's buffer of the point that the loops around the lanes are at."""
    along = [
        (axis.name, nest.memory.stride(stage.buffer.name, dimension))
        for dimension, axis in enumerate(stage.axes)
        if axis.extent != ONE and axis.name not in nest.lane_names
    ]
    return total([*along, (str(part), "1")])


def _cumulate(nest: Nest, stage: Stage, value: str) -> None:
    """Writes the sums up to each point of an axis: of a row's lanes, or for each lane of the loop around them."""
    kind = HELD[stage.buffer.dtype]
    how = f"Sum<{kind}>"
    block, put = _place_of_block(nest, stage)
    if stage.cumulated in nest.lane_names:
        carried = nest.of.name("carried")
        nest.scalars.append(f"{how}::Result {carried} = {how}::start();")
        nest.joins.append(f"{carried} = cumulate<{how}>({nest.body.block_of(value, kind)}, n, {carried}, {block});")
    else:
        kept = [axis for axis in nest.outside if axis.name != stage.cumulated]
        index = _first_lane(nest, place_among(kept))
        kept += nest.lanes if nest.of.is_rows else []
        sums = _accumulators(nest, stage, how, product([axis.extent for axis in kept]))
        up_to_here = f"{sums}[{index} + i] = {how}::join({sums}[{index} + i], {value})"
        nest.body.store(f"{block}[i] = result<{kind}>({up_to_here});", is_exact=nest.of.is_rows)
    nest.joins.append(put)


def _how(nest: Nest, stage: Stage, value: str) -> tuple[str, str, str]:
    """What reduces a stage, the type of the blocks it takes, and the value that is reduced."""
    expression = stage.expression
    if stage.combine == "sum" and expression.op == "cast" and expression.arguments[0].dtype is torch.bool:
        # Counted as truth values: lanes of one byte vectorise where those of eight do not.
        return "Count<uint8_t>", "uint8_t", nest.values[id(expression.arguments[0])]
    kind = HELD[expression.dtype]
    return f"{REDUCTIONS[stage.combine or '']}<{kind}>", kind, value


def _reduce(nest: Nest, stage: Stage, value: str) -> None:
    how, kind, value = _how(nest, stage, value)
    places = {axis: nest.values[id(place)] for axis, place in stage.places.items()}
    kept = [axis for axis in stage.axes if axis.name in places]
    kept += [axis for axis in nest.outside if axis in stage.axes]
    kept += [axis for axis in nest.lanes if axis in stage.axes] if nest.of.is_rows else []
    if _adds_few(nest, stage, how, kept):
        _add_few(nest, stage, how, value)
        return
    sums = _accumulators(nest, stage, how, product([axis.extent for axis in kept]))
    index = place_among([axis for axis in kept if axis.name not in nest.lane_names], places)
    if nest.body.vary(places.values()):
        _scatter(nest, stage, f"scatter<{how}>", sums, index, nest.body.block_of(value, kind))
    else:
        _join(nest, stage, how, kind, sums, index, value)
    if nest.of.kernel.is_local(stage):
        _finish_local(nest, stage, sums, kept)
    else:
        _finish_sums(nest, stage, how, kept)


def _join(nest: Nest, stage: Stage, how: str, kind: str, sums: str, index: str, value: str) -> None:
    """Takes a value in where the loops around the lanes are, or a block of them."""
    place = _index_of(nest, stage) if stage.combine in ("argmax", "argmin") else None
    element = value if place is None else f"Place<{kind}>{{{value}, {place}}}"
    if not nest.lanes:
        nest.scalars.append(f"{sums}[{index}] = {how}::join({sums}[{index}], {element});")
    elif nest.lanes[0] in stage.axes:
        pointer = nest.of.name("p")
        nest.blocks.append(f"{how}::Result* {pointer} = {sums} + {_first_lane(nest, index)};")
        # In rows, what is beyond the last lane is another result.
        nest.body.store(f"{pointer}[i] = {how}::join({pointer}[i], {element});", is_exact=nest.of.is_rows)
    else:
        block = nest.body.block_of(value, kind)
        positions = "" if place is None else f", {nest.body.block_of(place, 'int64_t')}"
        nest.joins.append(f"{sums}[{index}] = {how}::join({sums}[{index}], {how}::block({block}, n{positions}));")


def _adds_few(nest: Nest, stage: Stage, how: str, kept: Sequence[Axis]) -> bool:
    """Whether each lane adds up one result, of which a few terms at a time are added in fp32."""
    is_one_result = nest.of.kernel.is_local(stage) and not nest.of.is_rows and not kept
    return is_one_result and bool(nest.outside) and how == "Sum<float>"


def _add_few(nest: Nest, stage: Stage, how: str, value: str) -> None:
    few, sums, rows = (f"{what}_{identifier(stage.buffer.name)}" for what in ("few", "sums", "rows"))
    nest.of.array("float", few)
    nest.of.scratch.append(f"alignas(64) {how}::Result {sums}[kBlock];")
    nest.before += [f"fill({few}, whole(n), 0);", f"int64_t {rows} = 0;"]
    nest.body.store(f"{few}[i] = {few}[i] + {value};")
    nest.joins.append(f"if (++{rows} % kFew == 0) take({few}, n, {sums}, {rows});")
    nest.after.append(f"take_last({few}, n, {sums}, {rows});")
    _finish_lanes(nest, stage, f"{few}[i]")


def _scatter(nest: Nest, stage: Stage, function: str, sums: str, index: str, block: str) -> None:
    """Takes each lane of a block in at its own place."""
    if nest.lanes[0] in stage.axes:
        index = f"{_first_lane(nest, index)} + i"
    place = index if index in nest.body else nest.assign("int64_t", index, True)
    nest.joins.append(f"{function}({block}, {nest.body.block_of(place, 'int64_t')}, n, {sums});")


def _first_lane(nest: Nest, index: str) -> str:
    """Where the results of a block of lanes start, of which each has its own."""
    nest.keeps_order |= nest.of.is_rows  # results stand in the order of the lanes
    width, begin = (f"{nest.space.name}.numel", " + begin") if nest.of.is_rows else ("kBlock", "")
    return f"({index}) * {width}{begin}"


def _index_of(nest: Nest, stage: Stage) -> str:
    """Where along the flattened reduced axes a point is."""
    axes = [axis for axis in stage.reduced if axis.extent != ONE]
    return nest.assign("int64_t", *nest.position(place_along(axes)))


def _accumulators(nest: Nest, stage: Stage, how: str, count: str) -> str:
    """Where a loop, or a task, adds up ``count`` results."""
    of, sums, partial = nest.of, f"sums_{identifier(stage.buffer.name)}", _partial(stage)
    if of.kernel.is_local(stage):
        if not of.is_rows:
            count = "kBlock" if count == "1" else f"{count} * kBlock"
        if count in ("1", "kBlock"):
            of.scratch.append(f"alignas(64) {how}::Result {sums}[{count}];")
        else:
            memory = of.name("memory")
            of.scratch.append(f"const Memory<{how}::Result> {memory}({count});")
            of.scratch.append(f"{how}::Result* {sums} = {memory};")
        nest.before.append(f"fill({sums}, {'whole(n)' if count == 'kBlock' else count}, {how}::start());")
        return sums
    by_part = _is_by_part(nest, stage)
    slots, slot = ("parts.slots()", "parts.slot(part, task)") if by_part else ("most(1, parts.tasks)", "task")
    of.partials.append(f"const Memory<{how}::Result> {partial}({slots} * {count});")
    start = of.at_part if by_part else of.at_start
    start += [f"{how}::Result* {sums} = {partial} + {slot} * {count};", f"fill({sums}, {count}, {how}::start());"]
    return sums


def _partial(stage: Stage) -> str:
    return f"partial_{identifier(stage.buffer.name)}"


def _is_by_part(nest: Nest, stage: Stage) -> bool:
    """Whether a stage that adds up over the kernel has a result for each point of the batch."""
    batch = nest.of.kernel.batch
    return bool(batch) and batch[0] in stage.axes


def _finish_local(nest: Nest, stage: Stage, sums: str, kept: Sequence[Axis]) -> None:
    """Results of the reduced inner axes, for the later loops of a kernel and for others."""
    kind = COMPUTED[stage.buffer.dtype]
    if nest.of.is_rows:
        if not kept:
            _local(nest, stage, f"result<{kind}>({sums}[0])", nest.body.store, [])
        else:
            nest.after += _copied(nest, stage, sums, kept)
        return
    if not kept:
        _finish_lanes(nest, stage, f"result<{kind}>({sums}[i])")
        return
    out, origin = _output(nest, stage)
    block = nest.of.array(kind)
    body = [*LANES, f"{block}[i] = result<{kind}>({sums}[({place_among(kept)}) * kBlock + i]);", "}"]
    nest.after += looped(kept, [*body, f"{out}.put({nest.seek(out)}, n, {origin}, {block});"])


def _finish_lanes(nest: Nest, stage: Stage, value: str) -> None:
    """Of one result for each lane."""
    body: list[str] = []
    joins: list[str] = []
    _local(nest, stage, value, body.append, joins)
    nest.after += [*LANES, *body, "}", *joins]


def _finish_sums(nest: Nest, stage: Stage, how: str, kept: Sequence[Axis]) -> None:
    """What tasks added up, in their order."""
    partial, count = _partial(stage), product([axis.extent for axis in kept])
    if not _is_by_part(nest, stage):
        joined = [f"join_tasks<{how}>({partial}, parts.tasks, {count});"]
        nest.of.finish += [*joined, *_copied(nest, stage, partial, kept)]
        return
    sums = nest.of.name("sums")
    nest.of.finish += [
        "for (int64_t part = 0; part < parts.batch; ++part) {",
        *decoded("part", nest.of.kernel.batch),
        f"{how}::Result* {sums} = {partial} + part * parts.pieces * {count};",
        f"join_tasks<{how}>({sums}, parts.pieces, {count});",
        *_copied(nest, stage, sums, kept),
        "}",
    ]


def _copied(nest: Nest, stage: Stage, source: str, kept: Sequence[Axis]) -> list[str]:
    """Lines that take results of every kept point to their buffer."""
    strides = enumerate(stage.axes)
    place = total([(x.name, nest.memory.stride(stage.buffer.name, d)) for d, x in strides if x.extent != ONE])
    value = f"result<{COMPUTED[stage.buffer.dtype]}>({source}[{place_among(kept)}])"
    return looped(kept, [f"narrow({value}, {_data(stage)}[{place}]);"])
