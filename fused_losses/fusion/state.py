"""What a loss reads besides its arguments: parameters, buffers, attributes, and names from around its code."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .refusals import CannotFuse

SIMPLE = frozenset((int, bool, str, type(None), torch.dtype, torch.device, complex, bytes))
_INTERNAL = set(vars(nn.Module())) - {"training"}
_HELD = ("_parameters", "_buffers", "_modules")  # dictionaries of attributes
_OWN = "_fusion"  # the attribute in which a fused module keeps its programs


class Slot(NamedTuple):
    """A place that holds something: an item of a dictionary, or the contents of a closure's cell."""

    container: Any
    name: str
    module: nn.Module | None  # whose dictionary it is; what stands there can be replaced in a copy

    def reader(self) -> Callable[[], Any]:
        if self.module is None and self.name == "":
            return partial(getattr, self.container, "cell_contents")
        return partial(self.container.__getitem__, self.name)

    def read(self) -> Any:
        return self.reader()()


class State:
    """The slots of a loss, found once and again where the number of its attributes has changed."""

    def __init__(self, loss: Any, forward: Callable[..., Any]):
        self.loss = loss
        self.modules = list(loss.modules()) if isinstance(loss, nn.Module) else []
        functions = [forward]
        for module in self.modules:
            functions += _methods(type(module))
        around = _around(functions)
        # A number that is looked at closely cannot be left open.
        names = {name for code in around.codes for name in code.co_names}
        self.open_numbers = not {"isinstance", "type"} & names
        self.asks_for_gradients = bool({"requires_grad", "is_grad_enabled", "is_inference_mode_enabled"} & names)
        self.slots = [slot for module in self.modules for slot in _slots(module)] + around.slots
        self._reading = [(slot.reader(), self.open_numbers and slot.module is not None) for slot in self.slots]
        self._dictionaries = [d for module in self.modules for d in _dictionaries(module)]
        self._lengths = [len(d) for d in self._dictionaries]

    def is_current(self) -> bool:
        return [len(d) for d in self._dictionaries] == self._lengths

    def read(self, tensors: list[Tensor], numbers: list[float], fixed: list[Any]) -> None:
        """Adds the tensors and numbers that may change freely, and everything else, which is part of a pattern.

        Raises:
            KeyError: where an attribute is gone.
        """
        for read, is_open in self._reading:
            value = read()
            kind = type(value)
            if kind is float and is_open:
                numbers.append(value)
                fixed.append(float)
            elif kind in SIMPLE:
                fixed.append((kind, value))
            elif isinstance(value, Tensor):
                tensors.append(value)
                fixed.append(Tensor)
            else:
                fixed.append(frozen(value))

    def held(self) -> list[Any]:
        """What the slots hold now; of tensors, that they are."""
        return [Tensor if isinstance(value, Tensor) else value for value in (slot.read() for slot in self.slots)]

    def is_own(self, held: Sequence[Any]) -> list[bool]:
        """For each tensor that is held, whether it is a buffer or another attribute, but no parameter."""
        tensors = [slot for slot, value in zip(self.slots, held) if value is Tensor]
        return [slot.module is not None and slot.container is not vars(slot.module)["_parameters"] for slot in tensors]


class Attribute(NamedTuple):
    """An attribute of a module of a loss, or an item of a dictionary that is one: buffers are."""

    module: nn.Module
    dictionary: str
    name: str

    def __str__(self) -> str:
        return self.name if self.dictionary in _INTERNAL or not self.dictionary else self.dictionary

    @property
    def may_change(self) -> bool:
        return self.dictionary == "_buffers" or not {self.dictionary, self.name} & _INTERNAL

    def assign(self, value: Any) -> None:
        self._all_of(self.module)[self.name] = value

    def of(self, module: nn.Module) -> Any:
        """The same of a copy of the module."""
        return self._all_of(module)[self.name]

    def _all_of(self, module: nn.Module) -> dict[str, Any]:
        return vars(module)[self.dictionary] if self.dictionary else vars(module)


class Replaced:
    """Copies of the modules of a loss, in whose dictionaries stands what was given, or else what was held."""

    def __init__(self, state: State, held: Sequence[Any], tensors: Sequence[Any], numbers: Sequence[Any]):
        self.copies = {module: _copied(module) for module in state.modules}
        self.around: dict[int, Any] = {}  # what stands for a tensor that no copy can hold, by the tensor's id
        rest, numbers_left = iter(tensors), iter(numbers)
        for slot, value in zip(state.slots, held, strict=True):
            if value is Tensor and slot.module is None:
                self.around[id(slot.read())] = next(rest)
            elif slot.module is not None:
                is_open = type(value) is float and state.open_numbers
                given = next(rest) if value is Tensor else next(numbers_left) if is_open else _shallow_of(value)
                self._dictionary(slot)[slot.name] = given
        for module, copy in self.copies.items():
            copy._modules = {name: self.copies.get(child, child) for name, child in module._modules.items()}  # type: ignore[arg-type]
        # Each dictionary that a call may change, and what stands in it before.
        self._before = [
            (Attribute(module, name, ""), dictionary, _shallow(dictionary))
            for module, copy in self.copies.items()
            for name, dictionary in {"": vars(copy), **vars(copy)}.items()
            if isinstance(dictionary, dict)
        ]
        everything = [value for _, dictionary, _ in self._before for value in dictionary.values()]
        self._growing = {id(value): value for value in everything if isinstance(value, (list, set))}
        self.loss = self.copies.get(state.loss, state.loss)

    def _dictionary(self, slot: Slot) -> dict[str, Any]:
        copy, module = self.copies[slot.module], slot.module  # type: ignore[index]
        for name in ("_parameters", "_buffers"):
            if slot.container is vars(module)[name]:
                return vars(copy)[name]
        return vars(copy)

    def assigned(self) -> dict[Attribute, Any]:
        """The attributes that a call has assigned, with what they are now: None where one is gone, or grows."""
        found, dictionaries = {}, {(place.module, place.dictionary): each for place, each, _ in self._before}
        for place, after, before in self._before:
            for name in {**before, **after}:
                new = after.get(name)
                if not place.dictionary and new is not None and new is dictionaries.get((place.module, name)):
                    continue  # it is looked at for itself
                if not _identical(before.get(name), new):
                    found[place._replace(name=name)] = None if id(new) in self._growing else new
        return found

    def read(self, attribute: Attribute) -> Any:
        return attribute.of(self.copies[attribute.module])


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, (list, dict, set)) and type(a) is type(b):
        items = (list(a.items()), list(b.items())) if isinstance(a, dict) else (list(a), list(b))
        flat = [[part for item in each for part in (item if isinstance(item, tuple) else (item,))] for each in items]
        return len(flat[0]) == len(flat[1]) and all(x is y for x, y in zip(*flat))
    return a is b


def _shallow(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _shallow_of(value) for name, value in attributes.items()}


def _shallow_of(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict, set)) else value


def _copied(module: nn.Module) -> Any:
    copy = object.__new__(type(module))
    object.__setattr__(copy, "__dict__", {k: v for k, v in _shallow(vars(module)).items() if k != _OWN})
    return copy


def _dictionaries(module: nn.Module) -> list[Any]:
    own = vars(module)
    return [own, *(own[name] for name in _HELD)]


def _slots(module: nn.Module) -> Iterator[Slot]:
    own, parameters, buffers, _ = _dictionaries(module)
    for dictionary in (parameters, buffers):
        yield from (Slot(dictionary, name, module) for name in dictionary)
    yield from (Slot(own, name, module) for name in own if name not in _INTERNAL and name != _OWN)


def _methods(kind: type) -> list[Any]:
    """The functions of a module's classes, but for torch's base class."""
    classes = [c for c in kind.__mro__ if c not in (nn.Module, object)]
    return [member for c in classes for member in vars(c).values() if isinstance(member, types.FunctionType)]


class _Around(NamedTuple):
    codes: list[types.CodeType]
    slots: list[Slot]


def _around(functions: Sequence[Any]) -> _Around:
    """The code of functions and of those that they call by name, and what it takes from outside."""
    codes: list[types.CodeType] = []
    slots: dict[tuple[int, str], Slot] = {}
    waiting = [f for f in map(_plain_function, functions) if f is not None]
    seen = set()
    while waiting:
        function = waiting.pop()
        home = function.__globals__.get("__name__", "")
        if function in seen or home.partition(".")[0] == "torch" or home.startswith(__package__):
            continue
        seen.add(function)
        own = list(_codes(function.__code__))
        codes += own
        names = {name for code in own for name in code.co_names if name in function.__globals__}
        found = [Slot(function.__globals__, name, None) for name in sorted(names)]
        found += [Slot(cell, "", None) for cell in function.__closure__ or () if _is_filled(cell)]
        for slot in found:
            value = slot.read()
            if isinstance(value, (types.ModuleType, type)):
                continue
            helper = _plain_function(value)
            if helper is not None:
                waiting.append(helper)
                continue
            slots[id(slot.container), slot.name] = slot
    return _Around(codes, list(slots.values()))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  raises where it is empty
    except ValueError:
        return False
    return True


def _plain_function(value: Any) -> types.FunctionType | None:
    value = getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def frozen(value: Any, depth: int = 0) -> Any:
    """Something hashable that is equal exactly where a trace would come out the same.

    Raises:
        CannotFuse: for what may change without its being seen.
    """
    kind = type(value)
    if kind is float:
        return kind, repr(value)  # NaN is itself, and 0.0 is not -0.0
    if kind in SIMPLE:
        return kind, value  # 1 is not True
    if depth > 6:
        raise CannotFuse("it reads an object that is nested too deeply to notice when it changes")
    if isinstance(value, (list, tuple)):
        return (kind, *(frozen(item, depth + 1) for item in value))
    if isinstance(value, dict):
        return (kind, *((key, frozen(item, depth + 1)) for key, item in value.items()))
    if isinstance(value, Tensor):
        return Tensor  # a trace that reads it is refused
    if kind in (types.FunctionType, types.BuiltinFunctionType, types.MethodType):
        return value
    if isinstance(value, nn.Module):
        return (kind, *(frozen(v, depth + 1) for k, v in vars(value).items() if k not in _INTERNAL | {_OWN}))
    if isinstance(value, type) or kind.__module__.partition(".")[0] in ("torch", "builtins", "functools", "enum"):
        return _hashable(value)
    if hasattr(value, "__dict__"):
        return (kind, *((name, frozen(item, depth + 1)) for name, item in vars(value).items()))
    return _hashable(value)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        raise CannotFuse(
            f"it reads a {type(value).__name__}, in which a change would go unseen; make it a tensor or plain numbers"
        ) from None
    return value
