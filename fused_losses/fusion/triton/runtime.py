"""Launches the Triton kernels of a program."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import compiler
from ..ir import Axis, Extern, Program, Stage
from ..runtime import MOST_LAYOUTS, Compiled, Libraries, Operator, number_of
from ..schedule import product
from . import blocks
from .blocks import quotient
from .numbers import inputs_of, value_of
from .source import Launch, Source, Text
from .tiles import PART, PROGRAM

NARROW = 2**31 - 2**22  # what positions in 32 bits stay below, with room for blocks that reach beyond the last one

ALIGNMENT = 16  # bytes; Triton compiles kernels of their own for pointers that are multiples of it


@dataclass
class Plan:
    """How a kernel is launched for tensors of given shapes, strides and alignments."""

    results: list[tuple[str, Callable[[], Tensor]]]  # each with what allocates it
    numbers: list[int]
    programs: int
    constants: dict[str, Any]  # in the order of the function's arguments
    options: dict[str, Any]
    launch: Callable[..., Any] | None = None  # the kernel itself, once Triton has chosen it: it takes half as long


class InTriton:
    """A program as Triton kernels, in the form that suits a call; Triton compiles those that are launched."""

    language: str = "Triton"
    libraries: Libraries | None = None

    def __init__(self, program: Program) -> None:
        """
        Raises:
            BuildError: if an operation has no form in Triton, or the cache cannot be trusted.
        """
        self._program, self._source = program, Source(program)
        self._names = [buffer.name for buffer in program.inputs]
        self._built = {self._source.narrow: _compiled(program, self._source.of(self._source.narrow))}
        self._chosen: dict[Any, Compiled] = {}  # by shapes

    def __call__(self, inputs: Sequence[Tensor], parameters: Sequence[float] = ()) -> list[Tensor]:
        key = tuple([tensor.shape for tensor in inputs])
        return (self._chosen.get(key) or self._choose(key))(inputs, parameters)

    def _choose(self, key: Sequence[torch.Size]) -> Compiled:
        forms = self._source.forms(dict(zip(self._names, key)))
        if forms not in self._built:
            self._built[forms] = _compiled(self._program, self._source.of(forms))
        if len(self._chosen) >= MOST_LAYOUTS:
            self._chosen.clear()
        self._chosen[key] = compiled = self._built[forms]
        return compiled


def _compiled(program: Program, text: Text) -> Compiled:
    functions = _module(text.text)
    steps = [
        Operator(step) if isinstance(step, Extern) else _Launcher(step, functions[step.name], program.parameters)
        for step in text.steps
    ]
    return Compiled(program, "Triton", steps)


@functools.cache
def _module(text: str) -> dict[str, Any]:
    """What a source defines; it lies in a file, as Triton reads it from there."""
    path = compiler.python_file(text)
    module = types.ModuleType(f"fused_losses_generated_{path.stem[:16]}")
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), vars(module))
    return vars(module)


class _Launcher:
    """One kernel."""

    def __init__(self, launch: Launch, function: Any, parameters: Sequence[str]) -> None:
        self._launch, self._function = launch, function
        self._parameters = [parameters.index(name) for name in launch.parameters]
        tile, made = launch.tile, {buffer.name for buffer in launch.results}
        nests = [axes for nest in tile.nests for axes in (nest.lanes, nest.steps)]
        extents = [axis.extent for axes in (tile.rows, tile.batch, *nests) for axis in axes]
        extents += [axis.extent for stage in tile.stages for axis in stage.axes]
        needed = [*launch.operands, *inputs_of(launch.numbers, extents)]
        self._given = tuple(dict.fromkeys(name for name in needed if name not in made))
        self.touched = (*self._given, *made)
        self._plans: dict[Any, Plan] = {}

    def __call__(self, tensors: dict[str, Tensor], parameters: Sequence[float]) -> None:
        given = [tensors[name] for name in self._given]
        device = next(iter(tensors.values())).device
        # With everything that Triton chooses a kernel by.
        key = (device.index, *[(x.shape, x.stride(), x.data_ptr() % ALIGNMENT) for x in given])
        plan = self._plans.get(key) or self._plan(key, tensors, device)
        for name, allocate in plan.results:
            tensors[name] = allocate()
        if plan.programs:
            arguments = [tensors[name] for name in self._launch.operands]
            arguments += plan.numbers
            arguments += [parameters[k] for k in self._parameters]
            with _current(device):
                self._run(plan, arguments)

    def _run(self, plan: Plan, arguments: Sequence[Any]) -> None:
        if plan.launch is not None:
            return plan.launch(*arguments, *plan.constants.values())
        kernel = self._function[(plan.programs,)](*arguments, **plan.constants, **plan.options)
        if kernel is not None:  # as there is none in the interpreter
            plan.launch = kernel[(plan.programs, 1, 1)]

    def _plan(self, key: Any, tensors: dict[str, Tensor], device: torch.device) -> Plan:
        if len(self._plans) >= MOST_LAYOUTS:
            self._plans.clear()
        self._plans[key] = plan = _Planner(self._launch, tensors, device).plan()
        return plan


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the one that kernels are launched on, where it is not."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


class _Planner:
    """Sizes the blocks and the grid of a launch."""

    def __init__(self, launch: Launch, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.launch, self.tensors, self.device = launch, dict(tensors), device
        tile = launch.tile
        self.rows, self.batch = self._count(tile.rows), self._count(tile.batch)
        self.lanes = [self._count(nest.lanes) for nest in tile.nests]
        self.block = blocks.block_of(tile, self.rows, max(self.lanes, default=1))
        along_rows = quotient(self.rows, self.block[0])
        shared = {"": 1, "rows": along_rows, "lanes": quotient(self.lanes[0], self.block[1])}[tile.shares]
        others = {"": along_rows, "rows": self.batch, "lanes": along_rows}[tile.shares]
        self.parts = max(1, min(shared, blocks.PROGRAMS // max(1, others)))
        self.programs = others * self.parts
        self.own = {PART: self.parts, PROGRAM: self.programs}
        stages = {stage.buffer.name: stage for stage in tile.stages}
        # Of results, only the strides are asked for.
        self.results = [
            torch.empty(self._shape(stages[buffer.name]), dtype=buffer.dtype, device="meta")
            for buffer in launch.results
        ]
        self.tensors.update((buffer.name, result) for buffer, result in zip(launch.results, self.results))

    def _count(self, axes: Sequence[Axis]) -> int:
        return number_of(product([axis.extent for axis in axes]))(self.tensors)

    def _shape(self, stage: Stage) -> list[int]:
        along = [self.own.get(axis.name) or number_of(axis.extent)(self.tensors) for axis in stage.axes]
        return along + [len(stage.values)] * (len(stage.values) > 1)

    def plan(self) -> Plan:
        launch, tile = self.launch, self.launch.tile
        numbers = [value_of(number, self.tensors) for number in launch.numbers]
        constants: dict[str, Any] = {
            f"FLAT_{name}": self._is_flat(axes, views, numbers) for name, axes, views in launch.flat
        }
        constants["NARROW"] = self._reach(numbers) < NARROW
        height, length = self.block
        constants |= {"ROWS": height} if tile.rows else {}
        is_whole = tile.shares != "lanes" and max(self.lanes) <= length
        constants |= {"COLS": length, "WHOLE": is_whole} if tile.has_lanes else {}
        # x * x - y * y is 0 for equal x and y
        options = {"num_warps": blocks.warps_of(tile, self.block), "enable_fp_fusion": False}
        numbers += [self.parts] if tile.shares else []
        return Plan(self._allocators(), numbers, self.programs, constants, options)

    def _allocators(self) -> list[tuple[str, Callable[[], Tensor]]]:
        """What makes each result: of given strides, which is the fastest."""
        make = partial(torch.empty_strided, device=self.device)
        pairs = zip(self.launch.results, self.results)
        return [(buffer.name, partial(make, like.shape, like.stride(), dtype=like.dtype)) for buffer, like in pairs]

    def _reach(self, numbers: Sequence[int]) -> int:
        """The largest position or offset from the start of a pointer."""
        tile = self.launch.tile
        axes = (*tile.rows, *tile.batch, *(axis for nest in tile.nests for axis in (*nest.lanes, *nest.steps)))
        counts = {axis.name: self._count([axis]) for axis in axes} | self.own
        steps = [self._count(nest.steps) for nest in tile.nests]
        offsets = (sum((counts[axis] - 1) * numbers[k] for axis, k in move) for move in self.launch.moves)
        operands = (self.tensors[name] for name in self.launch.operands)
        spans = (sum((size - 1) * step for size, step in zip(x.shape, x.stride())) for x in operands)
        return max(self.rows, self.batch, self.programs, *self.lanes, *steps, *offsets, *spans)

    def _is_flat(self, axes: Sequence[Axis], views: Any, numbers: Sequence[int]) -> bool:
        """Whether one stride leads through all axes, in every view."""
        sizes = [self._count([axis]) for axis in axes]
        if sizes[-1] == 1:
            return False
        for view in views:
            strides = [0 if place is None else numbers[place] for place in view]
            moving = [(stride, size) for stride, size in zip(strides, sizes) if size != 1]
            if any(outer != inner * size for (outer, _), (inner, size) in pairwise(moving)):
                return False
        return True
