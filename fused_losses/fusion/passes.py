"""C++ of one kernel: a function that runs its loops over blocks of lanes.

Lanes are what one vectorised loop runs along. In *rows*, they run along the inner axes of each loop, for one point of
the outer axes after the other; in *columns*, along the outer axes, for one point of the inner axes after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from .expressions import size_of
from .ir import Axis, Expression
from .memory import Memory, decoded, held, product
from .nest import Nest
from .schedule import Kernel


class Space:
    """Axes that lanes run along, and what steps, reads and writes along them, once for each way of doing so."""

    def __init__(self, name: str, axes: tuple[Axis, ...], new_name: Callable[[str], str]) -> None:
        self.name, self.axes, self._new_name = name, axes, new_name
        self._strides: dict[str, str] = {}
        self._views: dict[tuple[str, str], str] = {}
        self._operands: dict[str, None] = {}

    def strides(self, by_axis: Mapping[str, str]) -> str:
        text = f"{{{{{', '.join(by_axis.get(axis.name, '0') for axis in self.axes)}}}}}"
        if text not in self._strides:
            self._strides[text] = self._new_name("strides")
        return self._strides[text]

    def steps(self, by_axis: Mapping[str, str]) -> str:
        return self._made("Steps", f"{self.name}, {self.strides(by_axis)}")

    def view(self, kind: str, data: str, by_axis: Mapping[str, str], *more: str) -> str:
        """What reads or writes a buffer, whose strides have a say in the order of the axes."""
        strides = self.strides(by_axis)
        self._operands[strides] = None
        return self._made(kind, ", ".join([data, self.name, strides, *more]))

    def _made(self, kind: str, arguments: str) -> str:
        if (kind, arguments) not in self._views:
            self._views[kind, arguments] = self._new_name(kind.lower())
        return self._views[kind, arguments]

    def lines(self, keeps_order: bool) -> list[str]:
        if not self.axes:
            return []
        extents = ", ".join(size_of(axis.extent) for axis in self.axes)
        operands = ", ".join(f"&{name}" for name in self._operands)
        return [
            *(f"const Strides {name} = {text};" for text, name in self._strides.items()),
            f"const Lanes {self.name}({{{extents}}}, {{{operands}}}, {'true' if keeps_order else 'false'});",
            *(f"const {kind} {name}({arguments});" for (kind, arguments), name in self._views.items()),
        ]


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
        read = ({_place_of(load) for stage in loop.stages for load in stage.loads} for loop in kernel.loops)
        loops = Counter(place for places in read for place in places)
        self._again = {place for place, count in loops.items() if count > 1 and not is_rows}
        self._kept: dict[tuple[str, str], str] = {}
        if is_rows:
            self.spaces = [Space(f"lanes_{k}", loop.along, self.name) for k, loop in enumerate(kernel.loops)]
        else:
            self.spaces = [Space("lanes", kernel.rest, self.name)]
        nests = [Nest(self, loop, self.spaces[k if is_rows else 0]) for k, loop in enumerate(kernel.loops)]
        body = [line for nest in nests for line in nest.lines()]
        setup = [line for space in self.spaces for line in space.lines(any(nest.keeps_order for nest in nests))]
        frame = self._rows(body) if is_rows else self._columns(body)
        copy = "const Arguments a = arguments;"
        self.lines = [f"void {name}(const Arguments& arguments) {{", copy, *setup, *frame, *self.finish, "}"]

    def name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def array(self, kind: str, name: str = "") -> str:
        """The name of an array of a block's length."""
        name = name or self.name("r")
        self.scratch.append(f"alignas(64) {held(kind)} {name}[kBlock];")
        return name

    def takes_again(self, load: Expression) -> bool:
        """Whether several loops around lanes read the same element."""
        return _place_of(load) in self._again

    def kept(self, kind: str, where: tuple[str, str], steps: str) -> str:
        """The name of what keeps the blocks of a view from one loop to the next."""
        if where not in self._kept:
            self._kept[where] = kept = self.name("kept")
            self.scratch.append(f"const Kept<{held(kind)}> {kept}({steps});")
        return self._kept[where]

    def _rows(self, body: list[str]) -> list[str]:
        rest = self.kernel.rest
        loop = "for (int64_t row = parts.begin(task); row < parts.end(task); ++row) {"
        cut = f"const Parts parts = rows({self._extents()}, {inner_size(self.kernel)}, {self._results()});"
        return [cut, *self._in_parallel([loop, *decoded("row", rest), *body, "}"])]

    def _columns(self, body: list[str]) -> list[str]:
        blocks = [
            "const int64_t end = parts.end(task);",
            "for (int64_t begin = parts.begin(task), next; begin < end; begin = next) {",
            f"next = {'least(end, lanes.end(begin, parts.width))' if self.kernel.rest else 'end'};",
            "const int64_t n = next - begin;",
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
            body = [loop, *decoded("part", self.kernel.batch), *self.at_part, *body, "}"]
        return [*self.partials, *head, *self.scratch, *self.at_start, *body, *self.at_end, "});"]


def _place_of(load: Expression) -> Any:
    return load["buffer"], load["index"]


def inner_size(kernel: Kernel) -> str:
    """How many elements the largest loop has for one point of the outer axes, in C++."""
    result = "1"
    for size in dict.fromkeys(product([axis.extent for axis in loop.inner]) for loop in kernel.loops):
        result = size if result == "1" else f"most({result}, {size})"
    return result
