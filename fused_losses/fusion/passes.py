"""C++ of one kernel: a function that runs its loops over blocks of lanes.

Lanes are what one vectorised loop runs along. In *rows*, they run along the inner axes of each loop, for one point of
the outer axes after the other; in *columns*, along the outer axes, for one point of the inner axes after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .expressions import COMPUTED, HELD, STORED, constant, identifier, operation, size_of
from .ir import Axis, Buffer, Expression, Index, Size, Stage
from .schedule import ONE, Kernel, Loop, nodes, plain_axis

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


@dataclass(frozen=True)
class Memory:
    """What passes know of the buffers: which have strides of their own, and what is stored for others to read."""

    buffers: Mapping[str, Buffer]
    strided: frozenset[str]  # inputs and what torch computed; everything else is contiguous
    stored: frozenset[str]  # computed buffers that are read outside their kernel
    returned: frozenset[str]  # those that become tensors, which keep their dtype

    def stored_type(self, name: str) -> str:
        dtype = self.buffers[name].dtype
        return (STORED if name in self.strided or name in self.returned else HELD)[dtype]

    def stride(self, name: str, dimension: int) -> str:
        if name in self.strided:
            return f"a.stride_{identifier(name)}_{dimension}"
        return product(self.buffers[name].sizes[dimension + 1 :])


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


class Space:
    """Axes that lanes run along, and the views of the buffers along them."""

    def __init__(self, name: str, axes: tuple[Axis, ...]) -> None:
        self.name, self.axes = name, axes
        self.strides: list[str] = []
        self.operands: list[str] = []
        self.views: list[str] = []

    def lines(self, keeps_order: bool) -> list[str]:
        if not self.axes:
            return []
        extents = ", ".join(size_of(axis.extent) for axis in self.axes)
        operands = "" if keeps_order else ", ".join(f"&{name}" for name in self.operands)
        return [*self.strides, f"const Lanes {self.name}({{{extents}}}, {{{operands}}});", *self.views]


class Pass:
    """The source of one kernel; ``lines`` holds the function."""

    def __init__(self, name: str, kernel: Kernel, memory: Memory, is_rows: bool) -> None:
        self.kernel, self.memory, self.is_rows = kernel, memory, is_rows
        self.made = {stage.buffer.name: stage for stage in kernel.stages}
        self._count = 0
        self.partials: list[str] = []  # what tasks add up
        self.scratch: list[str] = []  # of a task
        self.at_start: list[str] = []  # of a task
        self.at_part: list[str] = []  # of a point of the batch
        self.at_end: list[str] = []  # of a task
        self.at_block: list[str] = []  # of a block of columns
        self.finish: list[str] = []
        if is_rows:
            self.spaces = [Space(f"lanes_{k}", loop.along) for k, loop in enumerate(kernel.loops)]
        else:
            self.spaces = [Space("lanes", kernel.rest)]
        nests = [Nest(self, loop, self.spaces[k if is_rows else 0]) for k, loop in enumerate(kernel.loops)]
        body = [line for nest in nests for line in nest.lines()]
        setup = [line for space in self.spaces for line in space.lines(any(nest.keeps_order for nest in nests))]
        frame = self._rows(body) if is_rows else self._columns(body)
        copy = "const Arguments a = arguments;"
        self.lines = [f"void {name}(const Arguments& arguments) {{", copy, *setup, *frame, *self.finish, "}"]

    def name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def array(self, kind: str, name: str) -> str:
        self.scratch.append(f"alignas(64) {held(kind)} {name}[kBlock];")
        return name

    def _rows(self, body: list[str]) -> list[str]:
        rest = self.kernel.rest
        loop = "for (int64_t row = parts.begin(task); row < parts.end(task); ++row) {"
        cut = f"const Parts parts = rows({self._extents()}, {inner_size(self.kernel)}, {self._results()});"
        return [cut, *self._in_parallel([loop, *_decoded("row", rest), *body, "}"])]

    def _columns(self, body: list[str]) -> list[str]:
        blocks = [
            "const int64_t end = parts.end(task);",
            "for (int64_t begin = parts.begin(task); begin < end; begin += parts.width) {",
            "const int64_t n = least(parts.width, end - begin);",
            *self.at_block,
        ]
        cut = f"const Parts parts = columns({self._extents()}, {inner_size(self.kernel)}, {self._results()});"
        return [cut, *self._in_parallel([*blocks, *body, "}"])]

    def _extents(self) -> str:
        batch, rest = (product([axis.extent for axis in axes]) for axes in (self.kernel.batch, self.kernel.rest))
        return f"{batch}, {rest}"

    def _results(self) -> str:
        """How many results a task has of what adds up over the kernel."""
        adding = [stage for stage in self.kernel.stages if not self.kernel.is_local(stage)]
        counts = [product([axis.extent for axis in stage.axes if axis not in self.kernel.batch]) for stage in adding]
        return " + ".join(counts) or "1"

    def _in_parallel(self, body: list[str]) -> list[str]:
        # A copy that nothing can point to: no store in a loop may change a size or a pointer that the loop uses.
        head = [
            "parallel(arguments.parallel_for, parts.tasks, [&](int64_t task) {",
            "const Arguments a = arguments;",
        ]
        if self.kernel.batch:
            loop = "for (int64_t part = parts.first(task); part < parts.last(task); ++part) {"
            body = [loop, *_decoded("part", self.kernel.batch), *self.at_part, *body, "}"]
        return [*self.partials, *head, *self.scratch, *self.at_start, *body, *self.at_end, "});"]


def _decoded(position: str, axes: tuple[Axis, ...]) -> list[str]:
    """The place along each of several axes, of one position along all of them."""
    lines = [f"int64_t {position}_rest = {position};"] if len(axes) > 1 else []
    for axis in reversed(axes[1:]):
        size = size_of(axis.extent)
        lines += [f"const int64_t {axis.name} = {position}_rest % {size};", f"{position}_rest /= {size};"]
    if axes:
        lines.append(f"const int64_t {axes[0].name} = {position}{'_rest' if len(axes) > 1 else ''};")
    return lines


def inner_size(kernel: Kernel) -> str:
    """How many elements the largest loop has for one point of the outer axes, in C++."""
    result = "1"
    for size in dict.fromkeys(product([axis.extent for axis in loop.inner]) for loop in kernel.loops):
        result = size if result == "1" else f"most({result}, {size})"
    return result


class Nest:
    """The source of one loop of a kernel."""

    def __init__(self, of: Pass, loop: Loop, space: Space) -> None:
        self.of, self.loop, self.space, self.memory = of, loop, space, of.memory
        self.lanes, self.lane_names = space.axes, {axis.name for axis in space.axes}
        self.outside = [axis for axis in loop.inner if axis.name not in self.lane_names]  # looped over one by one
        self.keeps_order = any(stage.combine in ("argmax", "argmin") for stage in loop.stages)
        self.before: list[str] = []
        self.scalars: list[str] = []
        self.blocks: list[str] = []
        self.body: list[str] = []
        self.joins: list[str] = []
        self.after: list[str] = []
        self.values: dict[int, str] = {}
        self.texts: dict[tuple[str, bool], str] = {}
        self.varies: set[str] = set()  # names of what differs from lane to lane
        self.viewed: dict[str, str] = {}
        self.arrays: dict[str, str] = {}  # of a value, the block of memory that has it
        for stage in loop.stages:
            for node in nodes(stage.expression):
                self.values[id(node)] = self._value(node)
            self._result(stage, self.values[id(stage.expression)])
        self.body = _without_unused(self.body)

    def lines(self) -> list[str]:
        head = [f"// {stage.buffer.name}{_reduction_note(stage)}" for stage in self.loop.stages]
        loop = ["FL_ELEMENTWISE", "for (int64_t i = 0; i < n; ++i) {", *self.body, "}"] if self.body else []
        inner = [*self.blocks, *loop, *self.joins]
        if self.of.is_rows and self.lanes:
            lanes = self.space.name
            step = f"for (int64_t begin = 0; begin < {lanes}.numel; begin += kBlock) {{"
            inner = [step, f"const int64_t n = least(kBlock, {lanes}.numel - begin);", *inner, "}"]
        loops = [f"for (int64_t {x.name} = 0; {x.name} < {size_of(x.extent)}; ++{x.name}) {{" for x in self.outside]
        closing = ["}"] * len(loops)
        # Braces keep the axes of one nest apart from those of the next.
        return [*head, *self.before, *loops, *self.scalars, *inner, *closing, *self.after]

    # Values

    def _assign(self, kind: str, text: str, varies: bool) -> str:
        if (text, varies) not in self.texts:
            name = self.of.name("v")
            (self.body if varies else self.scalars).append(f"const {kind} {name} = {text};")
            if varies:
                self.varies.add(name)
            self.texts[text, varies] = name
        return self.texts[text, varies]

    def _value(self, node: Expression) -> str:
        kind = COMPUTED[node.dtype]
        if node.op == "load":
            return self._load(node)
        if node.op == "constant":
            return constant(node["value"], node.dtype)
        if node.op == "parameter":
            return self._assign(kind, f"static_cast<{kind}>(a.parameter_{identifier(node['name'])})", False)
        if node.op == "size":
            return self._assign(kind, f"static_cast<{kind}>({size_of(node['value'])})", False)
        if node.op == "index":
            text, varies = self._position(node["value"])
            return self._assign("int64_t", text, varies)
        arguments = [self.values[id(argument)] for argument in node.arguments]
        varies = any(name in self.varies for name in arguments)
        if node.op == "cast" and COMPUTED[node.arguments[0].dtype] == kind:
            return arguments[0]
        if node.op == "checked":
            return self._checked(arguments[0], size_of(node["size"]), varies)
        return self._assign(kind, operation(node, arguments, varies), varies)

    def _checked(self, index: str, size: str, varies: bool) -> str:
        inside = self._assign("bool", f"{index} >= 0 && {index} < {size}", varies)
        if not self.of.at_end:
            self.of.at_start.append("int failed = 0;")
            self.of.at_end.append("if (failed) *a.failed = 1;")
        (self.body if varies else self.scalars).append(f"failed |= !{inside};")
        return self._assign("int64_t", f"{inside} ? {index} : 0", varies)

    def _position(self, index: Index) -> tuple[str, bool]:
        """A position along axes as C++, and whether it differs from lane to lane."""
        base = total([(axis, _factor(factor)) for axis, factor in index.terms if axis not in self.lane_names])
        base = base if index.offset == Size("const", 0) else f"{base} + {size_of(index.offset)}"
        lanes = {axis: _factor(factor) for axis, factor in index.terms if axis in self.lane_names}
        if not lanes:
            return base, False
        if len(self.lanes) == 1:
            ((_, factor),) = lanes.items()
            return f"{base} + (begin + i) * {factor}", True
        return f"{self._offsets(lanes, base)}[i]", True

    def _offsets(self, by_axis: Mapping[str, str], base: str) -> str:
        """A block of positions along lanes that are several axes."""
        steps, block = self.of.name("steps"), self.of.name("k")
        self.space.views.append(f"const Steps {steps}({self.space.name}, {self._strides(by_axis)});")
        scratch = self.of.array("int64_t", self.of.name("s"))
        self.blocks.append(f"const int64_t* {block} = {steps}.block({self._seek(steps)}, n, {base}, {scratch});")
        return block

    def _strides(self, by_axis: Mapping[str, str]) -> str:
        name = self.of.name("strides")
        strides = ", ".join(by_axis.get(axis.name, "0") for axis in self.lanes)
        self.space.strides.append(f"const Strides {name} = {{{{{strides}}}}};")
        return name

    def _seek(self, view: str) -> str:
        if self.of.is_rows:
            return f"{view}.seek(begin)"
        line = f"const Seek {view}_at = {view}.seek(begin);"
        if line not in self.of.at_block:
            self.of.at_block.append(line)
        return f"{view}_at"

    def _load(self, node: Expression) -> str:
        name, kind = node["buffer"], COMPUTED[node.dtype]
        if (source := self.of.made.get(name)) is not None and _is_point(source, self.of.kernel):
            if self.of.is_rows:
                return f"local_{identifier(name)}"
            return self._assign(kind, f"local_{identifier(name)}[i]", True)
        base: list[tuple[str, str]] = []
        lanes: dict[str, list[tuple[str, str]]] = {}
        followed: list[tuple[str, str]] = []
        for dimension, index in enumerate(node["index"]):
            stride = self.memory.stride(name, dimension)
            if isinstance(index, Expression):
                followed.append((self.values[id(index)], stride))
                continue
            base.append((size_of(index.offset), stride))
            for axis, factor in index.terms:
                place = lanes.setdefault(axis, []) if axis in self.lane_names else None
                term = (_factor(factor), stride)
                if place is not None:
                    place.append(term)
                else:
                    base.append((axis, total([term])))
        by_axis = {axis: total(terms) for axis, terms in lanes.items()}
        data, origin = f"a.data_{identifier(name)}", total(base)
        inside = self._guards(node) if node["guarded"] else []
        if followed or (inside and not by_axis):
            return self._follow(kind, data, origin, by_axis, followed, inside)
        if not by_axis:
            return self._assign(kind, f"widen({data}[{origin}])", False)
        if inside:
            return self._guarded(node, kind, data, origin, by_axis)
        return self._view(name, kind, data, origin, by_axis)

    def _view(self, name: str, kind: str, data: str, origin: str, by_axis: Mapping[str, str]) -> str:
        key = f"{name} {sorted(by_axis.items())} {origin}"
        if key not in self.viewed:
            view, block = self.of.name(f"{identifier(name)}_"), self.of.name("x")
            strides = self._strides(by_axis)
            self.space.operands.append(strides)
            self.space.views.append(f"const View {view}({data}, {self.space.name}, {strides});")
            scratch = self.of.array(kind, self.of.name("s"))
            self.blocks.append(
                f"const {held(kind)}* {block} = {view}.block({self._seek(view)}, n, {origin}, {scratch});"
            )
            self.viewed[key] = self._assign(kind, f"{block}[i]", True)
            self.arrays[self.viewed[key]] = block
        return self.viewed[key]

    def _guards(self, node: Expression) -> list[tuple[Index | Expression, str]]:
        """The dimensions whose index may lie outside, each with its size."""
        extents = {axis.name: axis.extent for axis in self.of.kernel.outer + self.loop.inner}
        result: list[tuple[Index | Expression, str]] = []
        for index, size in zip(node["index"], self.memory.buffers[node["buffer"]].sizes):
            if isinstance(index, Expression) or extents.get(plain_axis(index) or "") != size:
                result.append((index, size_of(size)))
        return result

    def _guarded(self, node: Expression, kind: str, data: str, origin: str, by_axis: Mapping[str, str]) -> str:
        guards = []
        for index, size in self._guards(node):
            assert isinstance(index, Index)  # those that are computed are followed
            lanes = {axis: _factor(factor) for axis, factor in index.terms if axis in self.lane_names}
            base = total([(axis, _factor(factor)) for axis, factor in index.terms if axis not in self.lane_names])
            steps = self.of.name("steps")
            self.space.views.append(f"const Steps {steps}({self.space.name}, {self._strides(lanes)});")
            guards.append(f"{{{steps}, {base} + {size_of(index.offset)}, {size}}}")
        steps, block, array = self.of.name("steps"), self.of.name("x"), self.of.name("guards")
        strides = self._strides(by_axis)
        self.space.operands.append(strides)
        self.space.views.append(f"const Steps {steps}({self.space.name}, {strides});")
        scratch = self.of.array(kind, self.of.name("s"))
        self.blocks += [
            f"const std::initializer_list<Guard> {array} = {{{', '.join(guards)}}};",
            f"const {held(kind)}* {block} = guarded_block({data}, {steps}, {origin}, {array}, begin, n, {scratch});",
        ]
        return self._assign(kind, f"{block}[i]", True)

    def _follow(
        self,
        kind: str,
        data: str,
        origin: str,
        by_axis: Mapping[str, str],
        followed: Sequence[tuple[str, str]],
        guards: Sequence[tuple[Index | Expression, str]],
    ) -> str:
        """An element whose place is computed, or that is at one place for all lanes and may lie outside."""
        varies = bool(by_axis) or any(index in self.varies for index, _ in followed)
        place = total([(origin, "1"), *followed])
        if by_axis:
            place = f"{self._offsets(by_axis, origin)}[i] + {total(followed)}"
        conditions = []
        for index, size in guards:
            if isinstance(index, Expression):
                at = self.values[id(index)]
            else:
                text, lane = self._position(index)
                at = self._assign("int64_t", text, lane)
                varies |= lane
            conditions.append(f"{at} >= 0 && {at} < {size}")
        text = f"widen({data}[{place}])"
        if conditions:
            text = f"{' && '.join(conditions)} ? {text} : {kind}(0)"
        return self._assign(kind, text, varies)

    # Results

    def _result(self, stage: Stage, value: str) -> None:
        if stage.combine is not None:
            self._reduce(stage, value, self.of.kernel.is_local(stage))
        elif _is_point(stage, self.of.kernel):
            self._local(stage, value, self.body, self.joins)
        else:
            self._write(stage, value)

    def _local(self, stage: Stage, value: str, body: list[str], joins: list[str]) -> None:
        """A result for each point of the outer axes, which later loops of the kernel read."""
        local, kind = f"local_{identifier(stage.buffer.name)}", COMPUTED[stage.buffer.dtype]
        if self.of.is_rows:
            self.after.append(f"const {kind} {local} = {value};")
            if stage.buffer.name in self.memory.stored:
                self.after.append(f"narrow({local}, a.data_{identifier(stage.buffer.name)}[{self._place(stage)}]);")
            return
        self.of.array(kind, local)
        body.append(f"{local}[i] = {value};")
        if stage.buffer.name in self.memory.stored:
            out, origin = self._output(stage)
            joins.append(f"{out}.put({self._seek(out)}, n, {origin}, {local});")

    def _write(self, stage: Stage, value: str) -> None:
        """A result for each point of outer and inner axes, which goes to its buffer at once."""
        if not self.lanes:
            self.scalars.append(f"narrow({value}, a.data_{identifier(stage.buffer.name)}[{self._place(stage)}]);")
            return
        out, origin = self._output(stage)
        kind, block = COMPUTED[stage.buffer.dtype], self.of.name("o")
        scratch = self.of.array(kind, self.of.name("s"))
        self.blocks.append(f"{held(kind)}* {block} = {out}.place({self._seek(out)}, n, {origin}, {scratch});")
        self.body.append(f"{block}[i] = {value};")
        self.joins.append(f"{out}.put({self._seek(out)}, n, {origin}, {block});")

    def _output(self, stage: Stage) -> tuple[str, str]:
        """The view that writes a buffer, and where its lanes start."""
        name = stage.buffer.name
        by_axis = {
            axis.name: self.memory.stride(name, d) for d, axis in enumerate(stage.axes) if axis.name in self.lane_names
        }
        strides, out = self._strides(by_axis), self.of.name(f"{identifier(name)}_")
        self.space.operands.append(strides)
        numel = product(stage.buffer.sizes) if name in self.memory.returned else "0"
        self.space.views.append(
            f"const Output {out}(a.data_{identifier(name)}, {self.space.name}, {strides}, {numel});"
        )
        return out, self._place(stage)

    def _place(self, stage: Stage) -> str:
        """The offset in a stage's buffer of the point that the loops around the lanes are at."""
        return total(
            [
                (axis.name, self.memory.stride(stage.buffer.name, dimension))
                for dimension, axis in enumerate(stage.axes)
                if axis.extent != ONE and axis.name not in self.lane_names
            ]
        )

    def _how(self, stage: Stage, value: str) -> tuple[str, str, str]:
        """What reduces a stage, the type of the blocks it takes, and the value that is reduced."""
        expression = stage.expression
        if stage.combine == "sum" and expression.op == "cast" and expression.arguments[0].dtype is torch.bool:
            # Counted as truth values: lanes of one byte vectorise where those of eight do not.
            return "Count<uint8_t>", "uint8_t", self.values[id(expression.arguments[0])]
        kind = HELD[expression.dtype]
        return f"{REDUCTIONS[stage.combine or '']}<{kind}>", kind, value

    def _reduce(self, stage: Stage, value: str, is_local: bool) -> None:
        how, kind, value = self._how(stage, value)
        keeps_lanes = bool(self.lanes) and self.lanes[0] in stage.axes
        kept = [axis for axis in self.outside if axis in stage.axes]
        kept += [axis for axis in self.lanes if axis in stage.axes] if self.of.is_rows else []
        count = product([axis.extent for axis in kept])
        if not self.of.is_rows and is_local:
            count = "kBlock" if count == "1" else f"{count} * kBlock"
        sums = self._accumulators(stage, how, count)
        along = [axis for axis in kept if axis.name not in self.lane_names]
        index = total([(x.name, product([y.extent for y in along[k + 1 :]])) for k, x in enumerate(along)])
        place = self._index_of(stage) if stage.combine in ("argmax", "argmin") else None
        element = value if place is None else f"Place<{kind}>{{{value}, {place}}}"
        if keeps_lanes:
            self.keeps_order |= self.of.is_rows  # results stand in the order of the lanes
            start = (
                f"{sums} + ({index}) * kBlock"
                if not self.of.is_rows
                else f"{sums} + ({index}) * {self.space.name}.numel + begin"
            )
            pointer = self.of.name("p")
            self.blocks.append(f"{how}::Result* {pointer} = {start};")
            self.body.append(f"{pointer}[i] = {how}::join({pointer}[i], {element});")
        elif not self.lanes:
            self.scalars.append(f"{sums}[{index}] = {how}::join({sums}[{index}], {element});")
        else:
            block = self._block_of(value, kind)
            positions = "" if place is None else f", {self._block_of(place, 'int64_t')}"
            self.joins.append(f"{sums}[{index}] = {how}::join({sums}[{index}], {how}::block({block}, n{positions}));")
        if is_local:
            self._finish_local(stage, sums, kept)
        else:
            self._finish_sums(stage, how, kept, count)

    def _index_of(self, stage: Stage) -> str:
        """Where along the flattened reduced axes a point is."""
        axes = [axis for axis in stage.reduced if axis.extent != ONE]
        terms = []
        for k, axis in enumerate(axes):
            factor = Size("const", 1)
            for later in axes[k + 1 :]:
                factor = later.extent if factor == ONE else Size("mul", arguments=(factor, later.extent))
            terms.append((axis.name, 1 if factor == ONE else factor))
        text, varies = self._position(Index(tuple(terms)))
        return self._assign("int64_t", text, varies)

    def _block_of(self, value: str, kind: str) -> str:
        """A value as an array along the lanes of a block."""
        if value in self.arrays:
            return self.arrays[value]
        block = self.of.array(kind, self.of.name("r"))
        self.body.append(f"{block}[i] = {value};")
        self.arrays[value] = block
        return block

    def _accumulators(self, stage: Stage, how: str, count: str) -> str:
        sums, partial = f"sums_{identifier(stage.buffer.name)}", f"partial_{identifier(stage.buffer.name)}"
        fill = f"fill({sums}, {count}, {how}::start());"
        if self.of.kernel.is_local(stage):
            if count in ("1", "kBlock"):
                self.of.scratch.append(f"alignas(64) {how}::Result {sums}[{count}];")
            else:
                memory = self.of.name("memory")
                self.of.scratch.append(f"const Memory<{how}::Result> {memory}({count});")
                self.of.scratch.append(f"{how}::Result* {sums} = {memory};")
            self.before.append(fill)
            return sums
        by_part = self._is_by_part(stage)
        slots, slot = ("parts.slots()", "parts.slot(part, task)") if by_part else ("most(1, parts.tasks)", "task")
        self.of.partials.append(f"const Memory<{how}::Result> {partial}({slots} * {count});")
        start = self.of.at_part if by_part else self.of.at_start
        start += [f"{how}::Result* {sums} = {partial} + {slot} * {count};", fill]
        return sums

    def _is_by_part(self, stage: Stage) -> bool:
        """Whether a stage that adds up over the kernel has a result for each point of the batch."""
        batch = self.of.kernel.batch
        return bool(batch) and batch[0] in stage.axes

    def _finish_local(self, stage: Stage, sums: str, kept: Sequence[Axis]) -> None:
        """Results of the reduced inner axes, for the later loops of a kernel and for others."""
        kind = COMPUTED[stage.buffer.dtype]
        if self.of.is_rows:
            if not kept:
                self._local(stage, f"result<{kind}>({sums}[0])", [], [])
            else:
                self.after += self._copied(stage, kind, sums, kept)
            return
        lanes_loop = ["FL_ELEMENTWISE", "for (int64_t i = 0; i < n; ++i) {"]
        if not kept:
            body: list[str] = []
            joins: list[str] = []
            self._local(stage, f"result<{kind}>({sums}[i])", body, joins)
            self.after += [*lanes_loop, *body, "}", *joins]
            return
        out, origin = self._output(stage)
        block = self.of.array(kind, self.of.name("r"))
        index = total([(x.name, product([y.extent for y in kept[k + 1 :]])) for k, x in enumerate(kept)])
        body = [*lanes_loop, f"{block}[i] = result<{kind}>({sums}[({index}) * kBlock + i]);", "}"]
        self.after += _looped(kept, [*body, f"{out}.put({self._seek(out)}, n, {origin}, {block});"])

    def _finish_sums(self, stage: Stage, how: str, kept: Sequence[Axis], count: str) -> None:
        """What tasks added up, in their order."""
        kind, partial = COMPUTED[stage.buffer.dtype], f"partial_{identifier(stage.buffer.name)}"
        if not self._is_by_part(stage):
            joined = [f"join_tasks<{how}>({partial}, parts.tasks, {count});"]
            self.of.finish += [*joined, *self._copied(stage, kind, partial, kept)]
            return
        sums = self.of.name("sums")
        self.of.finish += [
            "for (int64_t part = 0; part < parts.batch; ++part) {",
            *_decoded("part", self.of.kernel.batch),
            f"{how}::Result* {sums} = {partial} + part * parts.pieces * {count};",
            f"join_tasks<{how}>({sums}, parts.pieces, {count});",
            *self._copied(stage, kind, sums, kept),
            "}",
        ]

    def _copied(self, stage: Stage, kind: str, source: str, kept: Sequence[Axis]) -> list[str]:
        index = total([(x.name, product([y.extent for y in kept[k + 1 :]])) for k, x in enumerate(kept)])
        place = total(
            [
                (axis.name, self.memory.stride(stage.buffer.name, dimension))
                for dimension, axis in enumerate(stage.axes)
                if axis.extent != ONE
            ]
        )
        data = f"a.data_{identifier(stage.buffer.name)}"
        return _looped(kept, [f"narrow(result<{kind}>({source}[{index}]), {data}[{place}]);"])


def _without_unused(body: Sequence[str]) -> list[str]:
    """Statements that something is stored by, and what they take."""
    kept: list[str] = []
    used: set[str] = set()
    for line in reversed(body):
        words = re.findall(r"[A-Za-z_]\w*", line)
        if words[0] != "const" or words[2] in used:
            kept.append(line)
            used.update(words)
    return kept[::-1]


def _looped(axes: Sequence[Axis], body: list[str]) -> list[str]:
    heads = [f"for (int64_t {x.name} = 0; {x.name} < {size_of(x.extent)}; ++{x.name}) {{" for x in axes]
    return [*heads, *body, *["}"] * len(heads)]


def _is_point(stage: Stage, kernel: Kernel) -> bool:
    """Whether a stage has one value for each point of the outer axes."""
    return kernel.is_local(stage) and len([x for x in stage.axes if x.extent != ONE]) == len(kernel.outer)


def _factor(factor: int | Size) -> str:
    return str(factor) if isinstance(factor, int) else size_of(factor)


def _reduction_note(stage: Stage) -> str:
    if stage.combine is None:
        return ""
    return f" = {stage.combine} over {', '.join(axis.name for axis in stage.reduced)}"
