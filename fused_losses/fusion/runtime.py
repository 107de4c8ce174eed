"""Runs programs: builds their kernels, allocates what they fill, and calls them."""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import loading
from ..backends.triton import unavailable_reason as triton_unavailable_reason
from . import compiler, cpp
from .ir import Buffer, Extern, Program, Read, Size
from .sizes import ARITHMETIC, Shapes
from .values import PRODUCTS

LARGE = 8 << 20  # bytes of a result from which memory that was used before is worth asking for
MOST_LAYOUTS = 1024  # of operands, that are remembered
Sizes = Callable[[Mapping[str, Tensor]], Sequence[int]]
_Plan = tuple[Any, bytes, list[tuple[str, Callable[[], Tensor]]]]  # the function, its layout, what makes each result


class Step(Protocol):
    """What a program does in turn."""

    touched: tuple[str, ...]  # the buffers that it reads or makes

    def __call__(self, tensors: dict[str, Tensor], parameters: Sequence[float], /) -> None:
        """Adds what it makes to the tensors."""


class Kernels(Protocol):
    """A program as kernels of a language."""

    language: str
    libraries: Libraries | None

    def __call__(self, inputs: Sequence[Tensor], parameters: Sequence[float] = ()) -> list[Tensor]:
        """The outputs, in order.

        Raises:
            IndexError: if an index that the program reads is out of range, on the CPU.
        """
        ...


class Compiled:
    """A program whose kernels run in steps."""

    def __init__(
        self, program: Program, language: str, steps: Sequence[Step], libraries: Libraries | None = None
    ) -> None:
        self.language, self.libraries = language, libraries
        self._inputs = tuple(buffer.name for buffer in program.inputs)
        self._outputs = program.outputs
        last = {name: k for k, step in enumerate(steps) for name in step.touched}
        kept = {*self._inputs, *self._outputs}
        # Each step, and what no later one needs.
        self._steps = [
            (step, [name for name, at in last.items() if at == k and name not in kept]) for k, step in enumerate(steps)
        ]

    def __call__(self, inputs: Sequence[Tensor], parameters: Sequence[float] = ()) -> list[Tensor]:
        tensors = dict(zip(self._inputs, inputs))
        for step, done_with in self._steps:
            step(tensors, parameters)
            for name in done_with:
                del tensors[name]
        return [tensors[name] for name in self._outputs]


def reads_numbers(device: torch.device) -> bool:
    """Whether the number in a tensor is there to be looked at, without waiting for a GPU."""
    return device.type == "cpu"


def compile_program(program: Program, device: torch.device) -> Kernels:
    """Kernels of a program for tensors on a device: C++ on the CPU, Triton on GPUs.

    Raises:
        BuildError: if they cannot be built here.
    """
    if device.type == "cpu":
        return _in_cpp(program)
    reason = triton_unavailable_reason(device.type)
    if torch.version.hip is not None:
        reason = "they call CUDA's libdevice, which AMD GPUs do not have"
    if reason is not None:
        raise compiler.BuildError(f"there are no generated kernels for {device.type} tensors here: {reason}")
    from .triton.runtime import InTriton  # imports Triton, which takes a while

    return InTriton(program)


def _in_cpp(program: Program) -> Compiled:
    source = cpp.Source(program)
    libraries = Libraries(source)
    buffers, count = source.buffers, len(program.parameters)
    steps = [
        Operator(step) if isinstance(step, Extern) else _Kernels(step, libraries, buffers, count)
        for step in source.steps
    ]
    return Compiled(program, "C++", steps, libraries)


class Libraries:
    """The libraries of a source, one for each of its forms, built when some shapes first ask for it."""

    def __init__(self, source: cpp.Source) -> None:
        self._source = source
        self._built: dict[cpp.Forms, ctypes.CDLL] = {(): ctypes.CDLL(None)}  # without kernels, nothing is called
        self._lock = threading.Lock()

    def lack(self, shapes: Shapes) -> bool:
        return self._source.forms(shapes) not in self._built

    def of(self, shapes: Shapes) -> ctypes.CDLL:
        """
        Raises:
            BuildError: if it cannot be built here.
        """
        forms = self._source.forms(shapes)
        with self._lock:
            if forms not in self._built:
                make = functools.partial(self._source.text, forms)
                self._built[forms] = compiler.load_made(self._source.recipe(forms), make)
            return self._built[forms]


class _Kernels:
    """One function of a source."""

    def __init__(self, call: cpp.Call, libraries: Libraries, buffers: Mapping[str, Buffer], parameters: int) -> None:
        self._name, self._libraries, self._operands = call.name, libraries, call.operands
        self.touched = (*call.operands, *call.results)
        filled = [*(buffers[name] for name in call.results), *call.scratch]
        self._results = [(buffer.name, _shape(buffer.sizes), buffer.dtype) for buffer in filled]
        self._scratch = [buffer.name for buffer in call.scratch]
        self._pointers = Struct(f"{len(call.operands) + len(filled)}P")
        self._parameters = Struct(f"{parameters}d")
        self._plans: dict[Any, _Plan] = {}

    def __call__(self, tensors: dict[str, Tensor], parameters: Sequence[float]) -> None:
        operands = [tensors[name] for name in self._operands]
        key = tuple([(tensor.shape, tensor.stride()) for tensor in operands])
        function, layout, results = self._plans.get(key) or self._plan(key, tensors)
        for name, allocate in results:
            tensors[name] = tensor = allocate()
            operands.append(tensor)
        pointers = self._pointers.pack(*[tensor.data_ptr() for tensor in operands])
        failed = function(pointers, layout, self._parameters.pack(*parameters), _parallel_for())
        for name in self._scratch:
            del tensors[name]
        if failed:
            raise IndexError(
                "an index of the loss is out of range; with integer targets, check them against the classes"
            )

    def _plan(self, key: Any, tensors: Mapping[str, Tensor]) -> _Plan:
        """What operands of one layout need: made once, as calls on small tensors are short."""
        if len(self._plans) >= MOST_LAYOUTS:
            self._plans.clear()
        numbers = [number for shape, strides in key for number in (*shape, *strides)]
        results = [(name, _allocator(shape_of(tensors), dtype)) for name, shape_of, dtype in self._results]
        library = self._libraries.of({name: tensor.shape for name, tensor in tensors.items()})
        function = getattr(library, self._name)
        function.restype = ctypes.c_int32
        self._plans[key] = plan = function, Struct(f"{len(numbers)}q").pack(*numbers), results
        return plan


class Operator:
    """An operator that torch runs between kernels."""

    def __init__(self, extern: Extern) -> None:
        self._target, self._results = _function(extern.target), [buffer.name for buffer in extern.buffers]
        self.touched = (*cpp.needed(extern), *self._results)
        self._arguments = [_giving(value) for value in extern.arguments]
        self._keywords = {name: _giving(value) for name, value in extern.keywords.items()}

    def __call__(self, tensors: dict[str, Tensor], parameters: Sequence[float]) -> None:
        keywords = {name: give(tensors) for name, give in self._keywords.items()}
        results = self._target(*[give(tensors) for give in self._arguments], **keywords)
        tensors.update(zip(self._results, results if isinstance(results, (tuple, list)) else (results,)))


def _function(target: Any) -> Callable[..., Any]:
    """What runs an operator; a large product of a CPU's goes to memory that was used before."""
    function = _binding(target)
    if target is torch.ops.aten._pdist_forward.default:  # torch's pdist brings the memory in order before
        return lambda x, *rest: function(x.contiguous(), *rest)
    if target not in PRODUCTS:
        return function

    def product(a: Tensor, b: Tensor) -> Tensor:
        shape = (*a.shape[:-1], b.shape[-1])
        if not (a.is_cpu and _is_kept(shape, a.dtype)):
            return function(a, b)
        return function(a, b, out=torch.ops.fused_losses.empty.default(shape, dtype=a.dtype))

    return product


def _binding(target: Any) -> Callable[..., Any]:
    """What torch's own Python calls for an operator, where there is such a function: it takes half as long."""
    is_plain = target._overloadname == "default" and "Tensor?[]" not in str(target._schema)
    name = target.overloadpacket.__name__ if is_plain else ""  # Python's take no None among tensors
    return getattr(torch._C._VariableFunctions, name, target)  # type: ignore[attr-defined]


def _giving(value: Any) -> Callable[[Mapping[str, Tensor]], Any]:
    """The function that gives an argument of an operator, of the tensors by name."""
    if isinstance(value, Read):
        return operator.itemgetter(value.name)
    if isinstance(value, Size):
        return number_of(value)
    if isinstance(value, torch.device) and value.type != "cpu":  # of this call, which may be another of the kind
        return lambda tensors: next(iter(tensors.values())).device
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Read, Size)) for item in value):
        items = [_giving(item) for item in value]
        return lambda tensors: [give(tensors) for give in items]
    return lambda tensors: value


def number_of(size: Size) -> Callable[[Mapping[str, Tensor]], int]:
    """The function that gives a size, of the tensors by name."""
    if size.op == "const":
        return lambda tensors: size.value
    if size.op == "size":
        name, dimension = size.value
        return lambda tensors: tensors[name].shape[dimension]
    x, y = map(number_of, size.arguments)
    combine = ARITHMETIC[size.op]
    return lambda tensors: combine(x(tensors), y(tensors))


def _shape(sizes: tuple[Size, ...]) -> Sizes:
    numbers = [number_of(size) for size in sizes]
    return lambda tensors: [number(tensors) for number in numbers]


def _allocator(shape: Sequence[int], dtype: torch.dtype) -> Callable[[], Tensor]:
    """What makes an uninitialised tensor."""
    if _is_kept(shape, dtype):
        return functools.partial(torch.ops.fused_losses.empty.default, shape, dtype=dtype)
    strides = torch.empty(shape, device="meta").stride()
    # Given strides, which is the fastest, and a device, as there may be another default.
    return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=torch.device("cpu"))


def _is_kept(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a tensor is so large that memory which was used before pays, as it needs no faulting in."""
    is_large = math.prod(shape) * dtype.itemsize >= LARGE
    return is_large and dtype.is_floating_point and loading.unavailable_reason("_C_cpu") is None


@functools.cache
def _parallel_for() -> ctypes.c_void_p:
    """The address of torch's own parallel loop: generated kernels run on torch's threads, as many as it is set to."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p)
