"""How many bytes the steps of a program move through memory, for given sizes of its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cpp import Run, laid_out, needed
from .ir import ALIASES, Buffer, Expression, Extern, Index, Program, Stage
from .schedule import Kernel, unified
from .sizes import Shapes, evaluate


@dataclass(frozen=True)
class Traffic:
    """What one step moves: the bytes of each buffer that a pass, or an operator of torch, reads and writes.

    What a pass reads more than once is in a cache by then and counts once; of a tensor, the part that is read counts.
    """

    reads: Mapping[str, int]
    writes: Mapping[str, int]
    operator: str | None = None  # of torch, where that runs

    @property
    def moved(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def traffic(program: Program, shapes: Shapes) -> list[tuple[Kernel | Extern, Traffic]]:
    """The steps of a program in order, each with what it moves."""
    found: list[tuple[Kernel | Extern, Traffic]] = []
    for step in laid_out(program):
        if isinstance(step, Run):
            found += [(kernel, _of_pass(kernel, step, shapes)) for kernel in step.kernels]
        else:
            found.append((step, _of_operator(step, program.buffers, shapes)))
    return found


def least(program: Program, saved: Sequence[str], shapes: Shapes) -> int:
    """What cannot be done without: reading the inputs, as much of them as is read, and writing the outputs, once."""
    steps, buffers = unified(program), program.buffers
    read = _elements_read([step for step in steps if isinstance(step, Stage)], buffers, shapes)
    for step in reversed(steps):
        if isinstance(step, Extern):
            for name in needed(step):
                elements = numel(buffers[name], shapes) if computes(step) else read.get(step.buffers[0].name, 0)
                read[name] = max(read.get(name, 0), elements)
    inputs = {buffer.name: buffer for buffer in program.inputs if buffer.name not in saved}
    reading = sum(read.get(name, 0) * buffer.dtype.itemsize for name, buffer in inputs.items())
    return reading + sum(bytes_of(buffers[name], shapes) for name in {*program.outputs} - {*saved})


def computes(step: Extern) -> bool:
    """Whether an operator does more than to look at memory in another shape."""
    return step.target not in ALIASES


def numel(buffer: Buffer, shapes: Shapes) -> int:
    return math.prod(evaluate(size, shapes, {}) for size in buffer.sizes)


def bytes_of(buffer: Buffer, shapes: Shapes) -> int:
    return numel(buffer, shapes) * buffer.dtype.itemsize


def _of_operator(step: Extern, buffers: Mapping[str, Buffer], shapes: Shapes) -> Traffic:
    if not computes(step):
        return Traffic({}, {}, str(step.target))
    reads = {name: bytes_of(buffers[name], shapes) for name in sorted(needed(step))}
    return Traffic(reads, {buffer.name: bytes_of(buffer, shapes) for buffer in step.buffers}, str(step.target))


def _of_pass(kernel: Kernel, run: Run, shapes: Shapes) -> Traffic:
    memory, made = run.memory, [stage.buffer for stage in kernel.stages]
    own = {buffer.name for buffer in made}

    def bytes_in(name: str, elements: int) -> int:
        return elements * memory.dtype(name).itemsize

    elements = _elements_read(kernel.stages, memory.buffers, shapes)
    reads = {name: bytes_in(name, count) for name, count in elements.items() if name not in own}
    return Traffic(reads, {b.name: bytes_in(b.name, numel(b, shapes)) for b in made if b.name in memory.stored})


def _elements_read(stages: Iterable[Stage], buffers: Mapping[str, Buffer], shapes: Shapes) -> dict[str, int]:
    """How many elements of each buffer are looked at: at every place that an index can have, and no more than all."""
    places: dict[str, dict[Any, int]] = {}
    for stage in stages:
        extents = {axis.name: evaluate(axis.extent, shapes, {}) for axis in stage.domain}
        for load in stage.loads:
            axes = {axis for index in load["index"] for axis in _axes(index)}
            where = tuple(index if isinstance(index, Index) else frozenset(_axes(index)) for index in load["index"])
            places.setdefault(load["buffer"], {})[where] = math.prod(extents[axis] for axis in axes)
    return {name: min(numel(buffers[name], shapes), sum(counts.values())) for name, counts in places.items()}


def _axes(index: Index | Expression) -> set[str]:
    """The axes along which an index changes."""
    if isinstance(index, Index):
        return {axis for axis, _ in index.terms}
    found: set[str] = set()
    for node in index.nodes:
        positions = node["index"] if node.op == "load" else (node["value"],) if node.op == "index" else ()
        found.update(axis for position in positions if isinstance(position, Index) for axis in _axes(position))
    return found
