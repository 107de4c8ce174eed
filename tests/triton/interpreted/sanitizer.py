"""Watches every access of an interpreted kernel: bounds, undefined lanes, duplicate stores, races, int32 overflow.

Programs run in a shuffled order. What it cannot see: races between the threads of one program beyond a read that
follows a write without a barrier.
"""

from __future__ import annotations

import random
import traceback
from pathlib import Path

import numpy as np
import torch
from triton.runtime import interpreter

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
stock_load, stock_store, stock_barrier = Builder.create_masked_load, Builder.create_masked_store, Builder.create_barrier
stock_grid_index, stock_launch, stock_atomic = Builder.set_grid_idx, Executor.__call__, Builder.create_atomic_rmw

TRITON = Path(interpreter.__file__).parents[1]
NOBODY, SEVERAL = -1, -2
LARGEST_TRACKED = 2**22  # elements; beyond it only bounds are watched


class Fault(AssertionError):
    """What a GPU might not forgive."""


class Memory:
    """One allocation of a launch: the elements its tensors own, and which program touched each."""

    def __init__(self, name: str, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.name, self.item, self.start = name, tensor.element_size(), storage.data_ptr()
        self.count = storage.nbytes() // self.item
        self.tracked = self.count <= LARGEST_TRACKED
        shadow = self.count if self.tracked else 0
        self.owned = np.zeros(shadow, bool)
        self.writer, self.reader, self.phase = (np.full(shadow, NOBODY, np.int64) for _ in range(3))
        self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Owns the elements of a view, so that the gaps between its rows are out of bounds."""
        if self.tracked:
            index = np.full(1, tensor.storage_offset())
            for size, stride in zip(tensor.shape, tensor.stride()):
                index = (index[:, None] + np.arange(size) * stride).ravel()
            self.owned[index] = True

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        return (addresses >= self.start) & (addresses < self.start + self.count * self.item)


class Launch:
    """The kernel that runs now."""

    def __init__(self, memories: list[Memory]):
        self.memories, self.order = memories, []
        self.program = self.barriers = 0


launch = Launch([])


def fail(what: str) -> None:
    machinery = (str(TRITON), str(Path(__file__).parent / "sanitizer.py"), str(Path(__file__).parent / "repairs.py"))
    stack = reversed(traceback.extract_stack())
    frame = next(frame for frame in stack if not frame.filename.startswith(machinery))
    raise Fault(f"{what}, in program {launch.program} at {Path(frame.filename).name}:{frame.lineno}")


def watch(pointers, mask, touch) -> None:
    """Finds the elements that an access touches, and hands them on memory by memory."""
    addresses, active = np.broadcast_arrays(pointers.data, mask.data)
    addresses = addresses[active.astype(bool)].astype(np.int64)
    left = np.ones(addresses.shape, bool)
    for memory in launch.memories:
        here = left & memory.holds(addresses)
        if not here.any():
            continue
        left &= ~here
        if memory.tracked:
            index = (addresses[here] - memory.start) // memory.item
            if not memory.owned[index].all():
                fail(f"out of bounds: {memory.name} is accessed between or beyond its elements")
            touch(memory, index)
    if left.any():
        fail(f"out of bounds: {left.sum()} addresses belong to no tensor of the launch")


def read(memory: Memory, index: np.ndarray) -> None:
    writer, reader = memory.writer[index], memory.reader[index]
    if ((writer != NOBODY) & (writer != launch.program)).any():
        fail(f"race: {memory.name} is read, and another program has written it")
    if ((writer == launch.program) & (memory.phase[index] == launch.barriers)).any():
        fail(f"missing barrier: {memory.name} is read after this program wrote it")
    alone = (reader == NOBODY) | (reader == launch.program)
    memory.reader[index] = np.where(alone, launch.program, SEVERAL)


def write(memory: Memory, index: np.ndarray) -> None:
    writer, reader = memory.writer[index], memory.reader[index]
    if np.unique(index).size != index.size:
        fail(f"duplicate store: one store writes an element of {memory.name} twice")
    if ((writer != NOBODY) & (writer != launch.program)).any():
        fail(f"race: two programs write an element of {memory.name}")
    if ((reader != NOBODY) & (reader != launch.program)).any():
        fail(f"race: {memory.name} is written, and another program has read it")
    memory.writer[index], memory.phase[index] = launch.program, launch.barriers


def masked_load(self, pointers, mask, other, *rest):
    watch(pointers, mask, read)
    if other is None and not mask.data.all() and mask.data.size > 1:  # of one element, a 0 looks like none
        fail("undefined lanes: a masked load without other")
    return stock_load(self, pointers, mask, other, *rest)


def masked_store(self, pointers, value, mask, *rest):
    watch(pointers, mask, write)
    return stock_store(self, pointers, value, mask, *rest)


def atomic(self, *arguments):
    fail("an atomic: sums would depend on the order of programs")


def barrier(self):
    launch.barriers += 1
    return stock_barrier(self)


def grid_index(self, x, y, z):
    """Programs in a shuffled order, the same every time."""
    _, height, depth = self.grid_dim
    if not launch.order:
        launch.order = list(range(self.grid_dim[0] * height * depth))
        random.Random(0).shuffle(launch.order)
    launch.program, launch.barriers = launch.order[(x * height + y) * depth + z], 0
    x, rest = divmod(launch.program, height * depth)
    return stock_grid_index(self, x, *divmod(rest, depth))


def memories_of(arguments) -> list[Memory]:
    found: dict[int, Memory] = {}
    for name, argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.untyped_storage().nbytes():
            start = argument.untyped_storage().data_ptr()
            if start in found:
                found[start].add(argument)
            else:
                found[start] = Memory(name, argument)
    return list(found.values())


def run(self, *arguments, **options):
    global launch
    launch = Launch(memories_of([*zip(self.arg_names, arguments), *options.items()]))
    try:
        return stock_launch(self, *arguments, **options)
    finally:
        launch = Launch([])


def install() -> None:
    Builder.create_masked_load, Builder.create_masked_store, Builder.create_barrier = masked_load, masked_store, barrier
    Builder.create_atomic_rmw, Builder.set_grid_idx, Executor.__call__ = atomic, grid_index, run
    # The arguments are on the CPU already; copying them back onto themselves would touch every page.
    Executor._restore_args_dev = lambda *arguments: None
    # Arithmetic in int32 that overflows then raises.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
