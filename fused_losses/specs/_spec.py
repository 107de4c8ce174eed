"""What a loss declares about itself: tests, benches, checks and documentation tables loop over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def convert(tensor: Tensor, dtype: torch.dtype, device: str | torch.device | None = None) -> Tensor:
    """A copy in a dtype and on a device with the strides, the offset and the unused memory of the original."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.detach().as_strided((elements,), (1,), 0)
    moved = flat.to(device or tensor.device, dtype, copy=True)
    return moved.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass(frozen=True)
class Sample:
    """One call of a loss: ``loss(**options)(*tensors, **extras)``; floating tensors are fp64 until cast."""

    name: str
    tensors: tuple[Tensor, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str | torch.device | None = None) -> Sample:
        """The sample with its floating tensors in a dtype, on a device or where they are."""

        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return convert(value, dtype if value.is_floating_point() else value.dtype, device)

        def cast_all(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: cast(value) for name, value in values.items()}

        return Sample(self.name, tuple(map(cast, self.tensors)), cast_all(self.options), cast_all(self.extras))


@dataclass(frozen=True)
class ErrorSample:
    """A call that must raise: ``error`` where torch rejects it too, with a message matching ``match``."""

    sample: Sample
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Bench:
    """One measured shape, and what bounds it: ``traffic``, the input-sized tensors that forward and backward must at
    least read and write, each once; or ``products``, the matrix products of both.
    """

    name: str
    make: Callable[[torch.dtype, str], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    options: Mapping[str, Any] = field(default_factory=dict)
    traffic: int = 2
    products: int = 0
    differentiable: tuple[int, ...] = (0,)
    devices: tuple[str, ...] = ("cpu", "cuda")


def repeated(make: Callable[[torch.dtype, str], tuple[Tensor, ...]], times: int) -> Callable[..., tuple[Tensor, ...]]:
    """Makes the tensors of a bench with so many times the rows: too many to draw on a CPU."""
    return lambda dtype, device: tuple(t.repeat(times, *[1] * (t.ndim - 1)) for t in make(dtype, device))


class Called(nn.Module):
    """A function of tensors as a module that keeps its options; those that are tensors are buffers."""

    def __init__(self, function: Callable[..., Tensor], options: Mapping[str, Any], backend: str | None):
        super().__init__()
        self.function, self.options = function, dict(options, backend=backend)
        for name in [name for name, value in options.items() if isinstance(value, Tensor)]:
            self.register_buffer(name, self.options.pop(name))

    def forward(self, *tensors: Tensor, **extras: Any) -> Tensor:
        return self.function(*tensors, **self.options, **dict(self.named_buffers()), **extras)


@dataclass(frozen=True)
class LossSpec:
    """A loss, its original, and everything that is checked and measured of it.

    A loss with parameters of its own is checked as a ``function`` of them: tensors like any other.
    """

    loss: type[nn.Module]
    family: str
    summary: str
    samples: Callable[[], list[Sample]]
    errors: Callable[[], list[ErrorSample]]
    benches: tuple[Bench, ...]
    original: type[nn.Module] | None = None
    function: Callable[..., Tensor] | None = None

    @property
    def name(self) -> str:
        return self.loss.__name__ if self.function is None else self.function.__name__

    def build(self, sample: Sample, backend: str | None = None) -> nn.Module:
        """The module of a sample on a backend."""
        if self.function is not None:
            return Called(self.function, sample.options, backend)
        return self.loss(**sample.options, backend=backend)

    def backends(self) -> tuple[str, ...]:
        """The backends this loss is written for."""
        return ("reference", "cpp", "cuda", "triton")
