"""A call of a fused loss taken apart: what may change freely, and what makes it a pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from ..backends import choice
from .state import State, frozen


class Marker:
    """Stands for the n-th tensor or number in the arguments of a call."""

    def __init__(self, kind: str, index: int):
        self.kind, self.index = kind, index


class Call:
    """One call taken apart: its tensors, its open numbers, and all that fixes a pattern."""

    __slots__ = ("arguments", "fixed", "given", "key", "keywords", "numbers", "requires_grad", "state", "tensors")

    def __init__(self, state: State, arguments: Sequence[Any], keywords: Mapping[str, Any]):
        self.state, self.arguments, self.keywords = state, arguments, keywords
        self.tensors: list[Tensor] = []
        self.numbers: list[float] = []
        self.fixed: list[Any] = []
        for argument in arguments:
            self._take(argument)
        for name, argument in keywords.items():
            self.fixed.append(name)
            self._take(argument)
        self.given = len(self.tensors), len(self.numbers)  # as arguments
        state.read(self.tensors, self.numbers, self.fixed)
        grad = torch.is_grad_enabled()
        self.requires_grad = [grad and t.requires_grad for t in self.tensors]
        device = self.tensors[0].device.type if self.tensors else "cpu"
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.fixed += (torch.get_default_dtype(), device, autocast)
        self.key = (*self.fixed, *self.requires_grad, *[(t.dtype, t.shape) for t in self.tensors])

    def _take(self, argument: Any) -> None:
        kind = type(argument)
        if kind is Tensor or kind is Parameter or isinstance(argument, Tensor):
            self.tensors.append(argument)
            self.fixed.append(Tensor)
        elif kind is float and self.state.open_numbers:
            self.numbers.append(argument)
            self.fixed.append(float)
        elif kind is list or kind is tuple:
            self.fixed += (kind, len(argument))
            for item in argument:
                self._take(item)
        elif kind is dict:
            self.fixed += (kind, len(argument))
            for name, item in argument.items():
                self.fixed.append(name)
                self._take(item)
        else:
            self.fixed.append(frozen(argument))

    def pattern(self) -> Any:
        """The key without sizes and gradients: ranks, which sizes are equal, and which are 0 or 1."""
        seen = {0: 0, 1: 1}
        sizes = tuple(tuple(seen.setdefault(size, len(seen)) for size in t.shape) for t in self.tensors)
        return (*self.fixed, *(t.dtype for t in self.tensors), sizes)

    def template(self) -> tuple[Any, Any]:
        """The arguments with markers for tensors and numbers."""
        counts = {"tensor": 0, "number": 0}

        def marked(argument: Any) -> Any:
            kind = type(argument)
            if isinstance(argument, Tensor) or (kind is float and self.state.open_numbers):
                name = "tensor" if isinstance(argument, Tensor) else "number"
                counts[name] += 1
                return Marker(name, counts[name] - 1)
            if kind is list or kind is tuple:
                return kind([marked(item) for item in argument])
            if kind is dict:
                return {name: marked(item) for name, item in argument.items()}
            return argument

        return [marked(a) for a in self.arguments], {name: marked(a) for name, a in self.keywords.items()}


def filled(template: Any, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """A template with tensors and numbers in the place of its markers."""
    if isinstance(template, Marker):
        return (tensors if template.kind == "tensor" else numbers)[template.index]
    if isinstance(template, (list, tuple)):
        return type(template)([filled(item, tensors, numbers) for item in template])
    if isinstance(template, dict):
        return {name: filled(item, tensors, numbers) for name, item in template.items()}
    return template


def plain_runs() -> bool:
    """Whether the plain loss must run whatever it is called with: on request, under transforms and other modes."""
    return (
        _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or choice.requested() == "reference"
    )


def unsuitable(tensors: Sequence[Tensor]) -> bool:
    """Whether the plain loss must run for these tensors: subclasses, wrappers, other layouts, devices, empty ones."""
    if not tensors:
        return True
    device = tensors[0].device
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.layout is not torch.strided:
            return True
        if tensor.device != device or tensor.is_neg() or not tensor.numel() or is_functorch_wrapped_tensor(tensor):
            return True
    return False
