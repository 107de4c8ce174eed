"""C++ source of a program: one function for each run of kernels between operators that torch runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .expressions import identifier
from .ir import Axis, Buffer, Expression, Extern, Index, Program, Read, Size, Stage
from .passes import Memory, Pass
from .recipes import recipe
from .remembering import scheduled
from .schedule import Kernel, memory_order
from .sizes import Shapes, evaluate

SHORT_ROW = 32  # elements below which a row is too short for lanes of its own
FEW_COLUMNS = 512  # points below which columns are too few to be shared out
FEW_ROWS, LONG_ROW = 64, 2**17  # the same for rows, and elements of those that are worth it


class Form(NamedTuple):
    """How a kernel is written: in parts or whole, and whether the lanes of each run along rows rather than columns."""

    is_split: bool
    rows: tuple[bool, ...]


Forms = tuple[Form, ...]  # of each kernel


@dataclass(frozen=True)
class Call:
    """A function of the source: what it is given, in order."""

    name: str
    operands: tuple[str, ...]  # buffers with sizes and strides, which it reads or whose sizes it needs
    results: tuple[str, ...]  # contiguous buffers that it fills
    scratch: tuple[Buffer, ...]  # contiguous memory that it needs while it runs


@dataclass(frozen=True)
class Run:
    """Kernels of one function, and where it finds and keeps the buffers."""

    kernels: tuple[Kernel, ...]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    memory: Memory

    @property
    def made(self) -> dict[str, Buffer]:
        return _buffers(self.kernels)

    @property
    def scratch(self) -> tuple[Buffer, ...]:
        """What is kept for the time of the call and may be large: torch's memory, as results are."""
        kept = [b for b in self.made.values() if b.name in self.memory.stored and b.name not in self.results]
        return tuple(replace(buffer, dtype=self.memory.dtype(buffer.name)) for buffer in kept if buffer.sizes)


class Source:
    """The calls and externs that make a program, and the text of what is called in each of its forms."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._runs: dict[str, Run] = {}
        self.buffers = program.buffers  # and what kernels keep besides
        self.steps: list[Call | Extern] = []
        for step in laid_out(program):
            if isinstance(step, Run):
                name = f"fused_{len(self._runs)}"
                self._runs[name] = step
                self.buffers |= step.made
                step = Call(name, step.operands, step.results, step.scratch)
            self.steps.append(step)

    def forms(self, shapes: Shapes) -> Forms:
        """What suits inputs of some shapes: few programs meet both forms of a kernel, and each takes long to build."""
        return tuple(_form(kernel, shapes) for run in self._runs.values() for kernel in run.kernels)

    def recipe(self, forms: Forms) -> bytes:
        """What its text is known by."""
        return recipe(self._program, forms)

    def text(self, forms: Forms) -> str:
        rest = iter(forms)
        functions = [
            _function(name, run, [next(rest) for _ in run.kernels], self._program.parameters)
            for name, run in self._runs.items()
        ]
        return "\n".join(['#include "fusion/passes.h"', *functions])


def text_of(program: Program, shapes: Shapes) -> str:
    """The source of a program for inputs of some shapes."""
    source = Source(program)
    return source.text(source.forms(shapes))


def laid_out(program: Program) -> list[Run | Extern]:
    """The functions that a program becomes, between the operators that torch runs."""
    steps: list[Run | Extern] = []
    strided = {buffer.name: buffer for buffer in program.inputs}
    runs = list(_runs(scheduled(program)))
    for position, run in enumerate(runs):
        if isinstance(run, Extern):
            strided.update((buffer.name, buffer) for buffer in run.buffers)
            steps.append(run)
            continue
        later = set(program.outputs).union(*(needed(other) for other in runs[position + 1 :]))
        kernels = _run(run, strided, later)
        strided.update((name, kernels.made[name]) for name in kernels.results)
        steps.append(kernels)
    return steps


def _runs(steps: Sequence[Kernel | Extern]) -> Iterator[list[Kernel] | Extern]:
    run: list[Kernel] = []
    for step in steps:
        if isinstance(step, Kernel):
            run.append(step)
            continue
        if run:
            yield run
            run = []
        yield step
    if run:
        yield run


def _buffers(run: Iterable[Kernel]) -> dict[str, Buffer]:
    return {stage.buffer.name: stage.buffer for kernel in run for stage in kernel.stages}


def needed(run: list[Kernel] | Extern) -> set[str]:
    """Names of the buffers that a run reads."""
    if isinstance(run, Extern):
        return set(_read_names([run.arguments, *run.keywords.values()]))
    return {name for kernel in run for stage in kernel.stages for name in stage.reads}


def _read_names(value: Any) -> Iterator[str]:
    if isinstance(value, Read):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _read_names(item)


def _sizes(stage: Stage) -> Iterator[Size]:
    """Every size that a stage mentions."""
    yield from (axis.extent for axis in stage.axes + stage.reduced)
    yield from stage.buffer.sizes
    for node in stage.expression.nodes:
        for _, value in node.attributes:
            for item in value if type(value) is tuple else (value,):
                if isinstance(item, Size):
                    yield item
                elif isinstance(item, Index):
                    yield item.offset
                    yield from (factor for _, factor in item.terms if isinstance(factor, Size))


def _inputs_of(size: Size) -> Iterator[str]:
    if size.op == "size":
        yield size.value[0]
    for argument in size.arguments:
        yield from _inputs_of(argument)


def _run(kernels: list[Kernel], strided: dict[str, Buffer], later: set[str]) -> Run:
    made = _buffers(kernels)
    stages = [stage for kernel in kernels for stage in kernel.stages]
    wanted = {input for stage in stages for size in _sizes(stage) for input in _inputs_of(size)}
    for stage in stages:
        for read in stage.reads & set(strided):
            wanted |= {read, *(input for size in strided[read].sizes for input in _inputs_of(size))}
    operands = tuple(buffer for buffer in strided if buffer in wanted)
    results = tuple(buffer for buffer in made if buffer in later)
    home = {stage.buffer.name: k for k, kernel in enumerate(kernels) for stage in kernel.stages}
    crossing = {
        read for k, kernel in enumerate(kernels) for s in kernel.stages for read in s.reads if home.get(read, k) != k
    }
    split = [part for kernel in kernels for part in kernel.split]
    crossing |= {read for part in split for stage in part.stages for read in stage.reads if read in home}
    inner = {
        stage.buffer.name for kernel in (*kernels, *split) for stage in kernel.stages if not kernel.is_point(stage)
    }
    memory = Memory(
        {**strided, **made}, frozenset(strided), frozenset({*results, *crossing, *inner}), frozenset(results)
    )
    return Run(tuple(kernels), operands, results, memory)


def _function(name: str, run: Run, forms: Sequence[Form], parameters: Sequence[str]) -> str:
    operands, memory, made = run.operands, run.memory, run.made
    stages = [stage for kernel in run.kernels for stage in kernel.stages]
    chosen = [
        part
        for kernel, form in zip(run.kernels, forms)
        for part in zip(kernel.split if form.is_split else (kernel,), form.rows)
    ]
    passes = {
        f"{name}_pass_{k}": Pass(f"{name}_pass_{k}", kernel, memory, is_rows)
        for k, (kernel, is_rows) in enumerate(chosen)
    }
    arguments = _arguments(operands, made, memory, parameters)
    unpacked = [*_unpacked(run, parameters), *_unread(stages, operands, memory)]
    body = [
        f'extern "C" __attribute__((visibility("default"))) int32_t {name}(void* const* data, const int64_t* layout, '
        "const double* parameters, ParallelFor parallel_for) {",
        *unpacked,
        *(f"{called}(a);" for called in passes),
        "return failed;",
        "}",
    ]
    parts = [arguments, *(each.lines for each in passes.values())]
    text = "\n\n".join(["namespace " + name + "_ {", *("\n".join(indented(part)) for part in parts), "}"])
    return f"\n{text}\n\n" + "\n".join(indented([*body[:1], f"using namespace {name}_;", *body[1:]]))


def _arguments(
    operands: Sequence[str], made: dict[str, Buffer], memory: Memory, parameters: Sequence[str]
) -> list[str]:
    lines = ["struct Arguments {", "ParallelFor parallel_for;", "int32_t* failed;"]
    for name in operands:
        lines.append(f"const {memory.stored_type(name)}* data_{identifier(name)};")
        for kind in ("size", "stride"):
            if count := len(memory.buffers[name].sizes):
                names = ", ".join(f"{kind}_{identifier(name)}_{d}" for d in range(count))
                lines.append(f"int64_t {names};")
    lines += [f"{memory.stored_type(name)}* data_{identifier(name)};" for name in made if name in memory.stored]
    lines += [f"double parameter_{identifier(name)};" for name in parameters]
    return [*lines, "};"]


def _unpacked(run: Run, parameters: Sequence[str]) -> list[str]:
    memory, given = run.memory, (*run.operands, *run.results, *(buffer.name for buffer in run.scratch))
    lines = ["int32_t failed = 0;", "Arguments a;", "a.parallel_for = parallel_for;", "a.failed = &failed;"]
    position = 0
    for k, name in enumerate(given):
        kind = memory.stored_type(name)
        lines.append(
            f"a.data_{identifier(name)} = static_cast<{'const ' if name in memory.strided else ''}{kind}*>(data[{k}]);"
        )
        if name in run.operands:
            for what in ("size", "stride"):
                for dimension in range(len(memory.buffers[name].sizes)):
                    lines.append(f"a.{what}_{identifier(name)}_{dimension} = layout[{position}];")
                    position += 1
    lines += [f"a.parameter_{identifier(name)} = parameters[{k}];" for k, name in enumerate(parameters)]
    for name in run.made:
        if name in memory.stored and name not in given:
            lines.append(f"{memory.stored_type(name)} value_{identifier(name)};")
            lines.append(f"a.data_{identifier(name)} = &value_{identifier(name)};")
    return lines


def _unread(stages: Sequence[Stage], operands: Sequence[str], memory: Memory) -> list[str]:
    """An empty tensor that is read at computed indices: none is in range, and the 0 read in its place must exist."""
    followed = {
        load["buffer"]
        for stage in stages
        for load in stage.loads
        if any(isinstance(index, Expression) for index in load["index"])
    }
    lines = []
    for name in operands:
        if name in followed:
            tensor, dimensions = identifier(name), range(len(memory.buffers[name].sizes))
            lines += [
                f"if ({' * '.join(f'a.size_{tensor}_{d}' for d in dimensions)} == 0) {{",
                f"static const {memory.stored_type(name)} nothing{{}};",
                f"a.data_{tensor} = &nothing;",
                *(f"a.stride_{tensor}_{d} = 0;" for d in dimensions),
                "}",
            ]
    return lines


def _form(kernel: Kernel, shapes: Shapes) -> Form:
    is_split = bool(kernel.split) and _is_few(kernel, shapes)
    parts = kernel.split if is_split else (kernel,)
    return Form(is_split, tuple(_is_in_rows(part, shapes) for part in parts))


def _is_few(kernel: Kernel, shapes: Shapes) -> bool:
    """Whether the outer axes have too few points to be shared out."""
    count = points(kernel.outer, shapes)
    if not _is_in_rows(kernel, shapes):
        return count < FEW_COLUMNS
    return count < FEW_ROWS and max(points(loop.inner, shapes) for loop in kernel.loops) >= LONG_ROW


def _is_in_rows(kernel: Kernel, shapes: Shapes) -> bool:
    """Whether lanes run along the inner axes: of long rows, where those are what is adjacent in memory."""
    if not kernel.outer:
        return True
    longest = max(points(loop.inner, shapes) for loop in kernel.loops)
    return longest >= SHORT_ROW and memory_order(kernel.stages)[-1] not in kernel.outer


def points(axes: Iterable[Axis], shapes: Shapes) -> int:
    return math.prod(evaluate(axis.extent, shapes, {}) for axis in axes)


def indented(lines: Iterable[str]) -> Iterator[str]:
    depth = 0
    for line in lines:
        depth -= line.startswith("}")
        yield "  " * depth + line if line else ""
        depth += line.endswith("{")
