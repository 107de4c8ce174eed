"""A built program as calls use it: with its open numbers, and results that are the caller's alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import runtime
from .ir import Extern, Program, Size
from .sizes import Shapes, evaluate

Shape = tuple[Size, ...]


class Built:
    """A program for a device, whose first results get the shapes that a trace gave them; the others are saved."""

    def __init__(self, program: Program, device: torch.device, shapes: Sequence[Shape]):
        self.program = program
        self.compiled = runtime.compile_program(program, device)
        self._device = device.type
        self._names = [buffer.name for buffer in program.inputs]
        self._numbers = [int(name.removeprefix("number")) for name in program.parameters]
        self._has_externs = any(isinstance(step, Extern) for step in program.steps)
        names, own, saved = self._names, program.outputs[: len(shapes)], program.outputs[len(shapes) :]
        # Results that are something else too.
        self._shared = [k for k, name in enumerate(own) if name in names or name in own[:k] or name in saved]
        # Buffers lack dimensions of size 1.
        buffers = program.buffers
        self._reshaped = {k: shape for k, (name, shape) in enumerate(zip(own, shapes)) if buffers[name].sizes != shape}

    def __call__(self, inputs: Sequence[Tensor], numbers: Sequence[float]) -> list[Tensor]:
        results = self._run(inputs, [numbers[k] for k in self._numbers])
        for k in self._shared:
            results[k] = results[k].clone()
        if self._reshaped:
            shapes = self._shapes(inputs)
            for k, shape in self._reshaped.items():
                results[k] = results[k].view([evaluate(size, shapes, {}) for size in shape])
        return results

    def _run(self, inputs: Sequence[Tensor], parameters: Sequence[float]) -> list[Tensor]:
        if not self._has_externs or not torch.is_autocast_enabled(self._device):
            return self.compiled(inputs, parameters)
        with torch.autocast(self._device, enabled=False):  # its casts are in the programs
            return self.compiled(inputs, parameters)

    def _shapes(self, inputs: Sequence[Tensor]) -> Shapes:
        return {name: tensor.shape for name, tensor in zip(self._names, inputs)}
