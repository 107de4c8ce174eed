"""A call of a fused loss taken apart: what may change freely, and what makes it a pattern."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter
from torch.utils._pytree import tree_leaves

from ..backends import choice
from .state import SIMPLE, State, frozen


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
        is_served = device in ("cpu", "cuda")  # not every other knows autocast
        autocast = torch.get_autocast_dtype(device) if is_served and torch.is_autocast_enabled(device) else None
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
        elif (items := _items(argument)) is not None:
            self.fixed += (kind, len(items))
            for name, item in items:
                self.fixed.append(name)
                self._take(item)
        else:
            self.fixed.append(frozen(argument))

    def pattern(self) -> Any:
        """The key without sizes and gradients: ranks, which sizes are equal, and which are 0 or 1."""
        seen = {0: 0, 1: 1}
        sizes = tuple(tuple(seen.setdefault(size, len(seen)) for size in t.shape) for t in self.tensors)
        return (*self.fixed, *(t.dtype for t in self.tensors), sizes)

    def generators(self) -> list[torch.Generator]:
        """Those that it gives, or that the loss holds."""
        return [part for part in tree_leaves(self.fixed) if isinstance(part, torch.Generator)]

    def template(self) -> tuple[Any, Any]:
        """The arguments with markers for tensors and numbers."""
        counts = {"tensor": 0, "number": 0}

        def marked(argument: Any) -> Any:
            kind = type(argument)
            if isinstance(argument, Tensor) or (kind is float and self.state.open_numbers):
                name = "tensor" if isinstance(argument, Tensor) else "number"
                counts[name] += 1
                return Marker(name, counts[name] - 1)
            return _rebuilt(argument, marked)

        return [marked(a) for a in self.arguments], {name: marked(a) for name, a in self.keywords.items()}


def filled(template: Any, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """A template with tensors and numbers in the place of its markers."""
    if isinstance(template, Marker):
        return (tensors if template.kind == "tensor" else numbers)[template.index]
    return _rebuilt(template, lambda item: filled(item, tensors, numbers))


def _items(argument: Any) -> Sequence[tuple[Any, Any]] | None:
    """What a container holds, each with its name; None for anything else."""
    kind = type(argument)
    if kind in SIMPLE:
        return None
    if kind is list or kind is tuple or hasattr(kind, "_fields"):
        return list(enumerate(argument))
    if isinstance(argument, dict):
        return list(argument.items())
    if dataclasses.is_dataclass(kind):
        return [(field.name, getattr(argument, field.name)) for field in dataclasses.fields(kind)]
    return None


def _rebuilt(argument: Any, change: Callable[[Any], Any]) -> Any:
    """A container of the same kind whose items are changed; anything else as it is."""
    items = _items(argument)
    if items is None:
        return argument
    kind, changed = type(argument), [(name, change(item)) for name, item in items]
    if isinstance(argument, (list, tuple)):
        values = [item for _, item in changed]
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    result = copy.copy(argument)
    for name, item in changed:
        if isinstance(argument, dict):
            result[name] = item
        else:
            object.__setattr__(result, name, item)
    return result


def plain_runs() -> bool:
    """Whether the plain loss must run whatever it is called with: on request, under transforms and other modes."""
    return (
        _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or choice.requested() == "reference"
    )


def unsuitable(call: Call) -> bool:
    """Whether the plain loss must run for its tensors: subclasses, wrappers, other layouts, devices, empty ones."""
    if not call.tensors or call.tensors[0].is_meta:
        return True
    device, is_saved = call.tensors[0].device, any(call.requires_grad)
    for tensor in call.tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.layout is not torch.strided:
            return True
        if tensor.device != device or tensor.is_neg() or not tensor.numel() or is_functorch_wrapped_tensor(tensor):
            return True
        if is_saved and tensor.is_inference():  # the plain loss may do without saving it
            return True
    return False
