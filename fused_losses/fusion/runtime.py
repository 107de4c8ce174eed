"""Runs programs: builds their kernels, allocates what they fill, and calls them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import loading
from . import compiler, cpp
from .ir import Buffer, Extern, Program, Read, Size
from .sizes import ARITHMETIC

LARGE = 8 << 20  # bytes from which memory that was used before is worth asking for
Sizes = Callable[[Mapping[str, Tensor]], Sequence[int]]


class Compiled:
    """A program as built kernels; ``source`` is their C++."""

    def __init__(self, program: Program) -> None:
        source = cpp.source_of(program)
        library = compiler.load(source.text) if any(isinstance(step, cpp.Call) for step in source.steps) else None
        buffers = program.buffers
        self.source = source.text
        self._inputs = tuple(buffer.name for buffer in program.inputs)
        self._outputs = program.outputs
        self._steps = [
            _Operator(step) if isinstance(step, Extern) else _Kernels(step, library, buffers, len(program.parameters))
            for step in source.steps
        ]

    def __call__(self, inputs: Sequence[Tensor], parameters: Sequence[float] = ()) -> list[Tensor]:
        """The outputs, in order.

        Raises:
            IndexError: if an index that the program reads is out of range.
        """
        tensors = dict(zip(self._inputs, inputs))
        for step in self._steps:
            step(tensors, parameters)
        return [tensors[name] for name in self._outputs]


def compile_program(program: Program, device: torch.device) -> Compiled:
    """Kernels of a program for tensors on a device.

    Raises:
        BuildError: if they cannot be built here.
    """
    if device.type != "cpu":
        raise compiler.BuildError(f"there are no generated kernels for {device.type} tensors")
    return Compiled(program)


class _Kernels:
    """One function of a built source."""

    def __init__(self, call: cpp.Call, library: Any, buffers: Mapping[str, Buffer], parameters: int) -> None:
        self._function = getattr(library, call.name)
        self._function.restype = ctypes.c_int32
        self._operands = call.operands
        self._results = [(name, _shape(buffers[name].sizes), buffers[name].dtype) for name in call.results]
        layout = sum(2 * len(buffers[name].sizes) for name in call.operands)
        self._pointers = ctypes.c_void_p * (len(call.operands) + len(call.results))
        self._layout = ctypes.c_int64 * layout
        self._parameters = ctypes.c_double * parameters

    def __call__(self, tensors: dict[str, Tensor], parameters: Sequence[float]) -> None:
        pointers, layout = [], []
        for name in self._operands:
            tensor = tensors[name]
            pointers.append(tensor.data_ptr())
            layout += tensor.shape
            layout += tensor.stride()
        for name, shape, dtype in self._results:
            tensors[name] = tensor = _empty(shape(tensors), dtype)
            pointers.append(tensor.data_ptr())
        failed = self._function(
            self._pointers(*pointers), self._layout(*layout), self._parameters(*parameters), _parallel_for()
        )
        if failed:
            raise IndexError(
                "an index of the loss is out of range; with integer targets, check them against the classes"
            )


class _Operator:
    """An operator that torch runs between kernels."""

    def __init__(self, extern: Extern) -> None:
        self._extern = extern

    def __call__(self, tensors: dict[str, Tensor], parameters: Sequence[float]) -> None:
        extern = self._extern
        keywords = {name: _given(value, tensors) for name, value in extern.keywords.items()}
        results = extern.target(*(_given(value, tensors) for value in extern.arguments), **keywords)
        results = results if isinstance(results, (tuple, list)) else (results,)
        tensors.update(zip((buffer.name for buffer in extern.buffers), results))


def _given(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Read):
        return tensors[value.name]
    if isinstance(value, Size):
        return _number(value)(tensors)
    if isinstance(value, (list, tuple)):
        return [_given(item, tensors) for item in value]
    return value


def _number(size: Size) -> Callable[[Mapping[str, Tensor]], int]:
    if size.op == "const":
        return lambda tensors: size.value
    if size.op == "size":
        name, dimension = size.value
        return lambda tensors: tensors[name].shape[dimension]
    x, y = map(_number, size.arguments)
    combine = ARITHMETIC[size.op]
    return lambda tensors: combine(x(tensors), y(tensors))


def _shape(sizes: tuple[Size, ...]) -> Sizes:
    numbers = [_number(size) for size in sizes]
    return lambda tensors: [number(tensors) for number in numbers]


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; a large one is of memory that was used before, which needs no faulting in."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if size >= LARGE and dtype.is_floating_point and loading.unavailable_reason("_C_cpu") is None:
        return torch.ops.fused_losses.empty.default(shape, dtype)
    return torch.empty(shape, dtype=dtype)


@functools.cache
def _parallel_for() -> ctypes.c_void_p:
    """The address of torch's own parallel loop: generated kernels run on torch's threads, as many as it is set to."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p)
