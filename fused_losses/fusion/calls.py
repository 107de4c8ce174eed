"""From a call of a fused loss to the programs that serve it: patterns, and the one autograd function."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from ..backends import choice
from .state import Reading, State, frozen
from .tracing import CannotFuse

MOST_SHAPES = 1024  # exact calls that are remembered
MOST_TRACES = 16  # of one pattern, before its loss is left to torch


class Marker:
    """Stands for the n-th tensor or number in the arguments of a call."""

    def __init__(self, kind: str, index: int):
        self.kind, self.index = kind, index


class Call:
    """One call taken apart: its tensors, its open numbers, and all that fixes a pattern."""

    __slots__ = ("arguments", "fixed", "key", "keywords", "numbers", "requires_grad", "state", "tensors")

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
        reading: Reading = state.read()
        self.tensors += reading.tensors
        self.numbers += reading.numbers
        self.fixed += reading.fixed
        grad = torch.is_grad_enabled()
        self.requires_grad = [grad and t.requires_grad for t in self.tensors]
        self.fixed += (torch.get_default_dtype(), *_autocast(self.tensors[0].device.type if self.tensors else "cpu"))
        self.key = (*self.fixed, *self.requires_grad, *((t.dtype, t.shape) for t in self.tensors))

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
            self.fixed += (kind, frozen(argument))

    def pattern(self) -> Any:
        """The key without sizes: ranks, which sizes are equal, and which are 0 or 1."""
        seen = {0: 0, 1: 1}
        sizes = tuple(tuple(seen.setdefault(size, len(seen)) for size in t.shape) for t in self.tensors)
        return (*self.fixed, *self.requires_grad, *(t.dtype for t in self.tensors), sizes)

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


def _autocast(device: str) -> tuple[Any, ...]:
    enabled = torch.is_autocast_enabled(device)
    return (device, torch.get_autocast_dtype(device)) if enabled else (device, None)


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
    """Whether the plain loss must run for these tensors: subclasses, other layouts and devices, empty ones."""
    if not tensors:
        return True
    device = tensors[0].device
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.layout is not torch.strided:
            return True
        if tensor.device != device or tensor.is_neg() or not tensor.numel():
            return True
    return False


class Programs:
    """The programs of one loss, and how a call finds them."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.last: Any = None  # what served the last call: programs, or the reason why none did
        self._state: State | None = None
        self._exact: dict[Any, list[Any]] = {}
        self._patterns: dict[Any, list[Any]] = {}
        self._reasons: dict[Any, str] = {}
        self._warned: set[str] = set()
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return Programs, (self.strict,)  # a copy traces for itself

    def call(self, loss: Any, forward: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        """The loss of the arguments; ``forward`` is the plain one, of the loss itself where it is a module."""
        call = None if plain_runs() else self._taken(loss, forward, arguments, keywords)
        served = None if call is None or unsuitable(call.tensors) else self._find(call, forward)
        if call is None or served is None:
            own = (loss,) if isinstance(loss, torch.nn.Module) else ()
            return forward(*own, *arguments, **keywords)
        self.last = served
        return served.run(call.tensors, call.numbers, any(call.requires_grad))

    def _taken(self, loss: Any, forward: Any, arguments: Any, keywords: Any) -> Call | None:
        try:
            if self._state is None or not self._state.is_current():
                self._state = State(loss, forward)
            try:
                return Call(self._state, arguments, keywords)
            except KeyError:  # an attribute is gone
                self._state = State(loss, forward)
                return Call(self._state, arguments, keywords)
        except CannotFuse as reason:
            self._refuse(loss, str(reason))
            return None

    def _find(self, call: Call, forward: Any) -> Any:
        candidates = self._exact.get(call.key)
        for served in candidates or ():
            if served.serves_numbers(call.numbers):
                return served
        with self._lock:
            return self._find_by_pattern(call, forward)

    def _find_by_pattern(self, call: Call, forward: Any) -> Any:
        pattern = call.pattern()
        if pattern in self._reasons:
            return None
        known = self._patterns.setdefault(pattern, [])
        for served in known:
            if served.serves(call.tensors, call.numbers):
                break
        else:
            served = self._build(call, forward, pattern, known)
            if served is None:
                return None
            known.append(served)
        if len(self._exact) >= MOST_SHAPES:
            self._exact.clear()
        self._exact.setdefault(call.key, []).append(served)
        return served

    def _build(self, call: Call, forward: Any, pattern: Any, known: Sequence[Any]) -> Any:
        from .served import Served

        try:
            if len(known) >= MOST_TRACES:
                raise CannotFuse(
                    f"{MOST_TRACES} traces of it differ in sizes or numbers that its code depends on, and each takes a build"
                )
            return Served(call, forward)
        except Exception as error:  # an error of the loss itself comes again from the plain loss
            own = (call.state.loss,) if isinstance(call.state.loss, torch.nn.Module) else ()
            with torch.no_grad():
                forward(*own, *call.arguments, **call.keywords)
            known_reason = isinstance(error, CannotFuse)
            reason = str(error) if known_reason else f"{type(error).__name__}: {error}"
            self._reasons[pattern] = reason
            self._refuse(call.state.loss, reason, error)
            return None

    def _refuse(self, loss: Any, reason: str, cause: Exception | None = None) -> None:
        name = getattr(loss, "__name__", type(loss).__name__)
        self.last = reason
        if self.strict:
            raise CannotFuse(f"{name} cannot be fused: {reason}") from cause
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"{name} runs as plain torch, because it cannot be fused: {reason}", stacklevel=6)
