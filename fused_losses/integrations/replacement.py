"""Losses of torch inside a model or a training object, replaced where they are, and put back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

# What every module has for its own bookkeeping.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def replace_losses(target: Any) -> Replacement:
    """Makes ours of every loss of torch in a module tree or a training object, in place.

    Modules keep their identity: whatever else refers to them, their options, buffers, parameters, hooks and training
    mode stay, and only their class becomes ours. Functions of ``torch.nn.functional``, also inside of
    ``functools.partial``, are replaced where they are the value of an attribute or a member of a dict or list.
    Only torch's very classes are replaced, never subclasses. Losses that code calls by name are not found.

    Args:
        target: a module, or an object that holds some, such as a trainer or a learner: its attributes, theirs one
            level down, dicts, lists and tuples in them, and modules at any depth are searched.

    Returns:
        A report: ``print`` shows what was replaced and what was left, and why; ``undo()`` puts everything back, as
        does the end of a ``with`` block.

    Raises:
        TypeError: for a target that holds nothing, such as a function or a class.

    Example:
        >>> import torch, fused_losses
        >>> model = torch.nn.ModuleDict({"main": torch.nn.CrossEntropyLoss(), "aux": torch.nn.MultiMarginLoss()})
        >>> print(fused_losses.replace_losses(model))
        replaced
          main: CrossEntropyLoss
        left
          aux: MultiMarginLoss, which fused_losses does not have
        >>> isinstance(model["main"], fused_losses.CrossEntropyLoss)
        True
    """
    if isinstance(target, FunctionType) or not (isinstance(target, (dict, list)) or _is_plain_object(target)):
        raise TypeError(f"replace_losses needs the module or object that holds the loss, got {target!r}")
    report = Replacement()
    _Search(report).visit("", target, None, depth=0)
    return report


class Change(NamedTuple):
    """One replacement."""

    where: str
    name: str
    undo: Callable[[], None]


class Replacement:
    """What :func:`replace_losses` did; ``replaced`` and ``left`` pair each place with a name or a reason."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.left: list[tuple[str, str]] = []

    @property
    def replaced(self) -> list[tuple[str, str]]:
        return [(change.where, change.name) for change in self.changes]

    def undo(self) -> None:
        """Puts back what is still as it was left; a second call does nothing."""
        while self.changes:
            self.changes.pop().undo()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __str__(self) -> str:
        sections = {"replaced": self.replaced, "left": self.left}
        shown = [
            "\n".join([title, *(f"  {where}: {what}" for where, what in rows)])
            for title, rows in sections.items()
            if rows
        ]
        return "\n".join(shown or ["found no loss"])


class _Search:
    def __init__(self, report: Replacement):
        self.report = report
        self.seen: dict[int, Any] = {}  # holds what was seen, so that no identity is given twice

    def visit(self, where: str, value: Any, place: Place | None, depth: int) -> None:
        if isinstance(value, FunctionType) or (type(value) is partial and isinstance(value.func, FunctionType)):
            self._function(where, value, place)
        elif id(value) not in self.seen:
            self.seen[id(value)] = value
            if isinstance(value, nn.Module):
                self._module(where or "(itself)", value)
            for name, member, its_place, deeper in _members(value, depth):
                dot = "" if not where or name.startswith("[") else "."
                self.visit(f"{where}{dot}{name}", member, its_place, deeper)

    def _module(self, where: str, module: nn.Module) -> None:
        kind = type(module)
        ours = _modules().get(kind)
        if ours is not None and "forward" not in vars(module):
            self.report.changes.append(Change(where, kind.__name__, _swap_class(module, ours)))
        elif ours is not None:
            self.report.left.append((where, f"{kind.__name__}, whose forward was replaced"))
        elif kind.__module__ == nn.modules.loss.__name__:
            self.report.left.append((where, f"{kind.__name__}, which fused_losses does not have"))
        elif isinstance(module, tuple(_modules())) and not isinstance(module, tuple(_modules().values())):
            self.report.left.append((where, f"{kind.__name__}, a subclass, which may compute something else"))

    def _function(self, where: str, value: Any, place: Place | None) -> None:
        function = value if isinstance(value, FunctionType) else value.func
        name, ours = function.__name__, _functions().get(function)
        if ours is not None and place is not None:
            new = ours if function is value else partial(ours, *value.args, **value.keywords)
            self.report.changes.append(Change(where, name, place.replace(value, new)))
        elif ours is not None:
            self.report.left.append((where, f"{name}, in a tuple, which cannot be changed"))
        elif name.endswith("_loss") and getattr(F, name, None) is function:
            self.report.left.append((where, f"{name}, which fused_losses does not have"))


class Place(NamedTuple):
    """Where a value is held: the members of a dict or list, or the attributes of an object, by key."""

    holder: Any
    key: Any

    def replace(self, old: Any, new: Any) -> Callable[[], None]:
        self.holder[self.key] = new

        def undo() -> None:
            if self.holder[self.key] is new:
                self.holder[self.key] = old

        return undo


def _members(value: Any, depth: int) -> Iterator[tuple[str, Any, Place | None, int]]:
    """Name, value, place and depth of what a value holds; objects deep down may be anything and are left alone."""
    if isinstance(value, dict):
        for key, member in list(value.items()):
            yield f"[{key!r}]", member, Place(value, key), depth
    elif isinstance(value, (list, tuple)):
        for index, member in enumerate(value):
            yield f"[{index}]", member, Place(value, index) if isinstance(value, list) else None, depth
    elif isinstance(value, partial):
        yield "func", value.func, None, depth
    elif isinstance(value, nn.Module) or (depth < 2 and _is_plain_object(value)):
        attributes = vars(value)
        own = [name for name in attributes if not (isinstance(value, nn.Module) and name in _MODULE_ATTRIBUTES)]
        for name in own:
            yield name, attributes[name], Place(attributes, name), depth + 1
        for name, module in value.named_children() if isinstance(value, nn.Module) else ():
            yield name, module, None, depth + 1


def _is_plain_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType, MethodType, Tensor))


def _swap_class(module: nn.Module, ours: type) -> Callable[[], None]:
    """Everything that refers to the module keeps doing so; what only ours has gets its default."""
    theirs = type(module)
    added = {name: value for name, value in _own_options(ours, theirs).items() if name not in vars(module)}
    vars(module).update(added)
    module.__class__ = ours

    def undo() -> None:
        if type(module) is ours:
            module.__class__ = theirs
            for name in added:
                vars(module).pop(name, None)

    return undo


def _own_options(ours: type, theirs: type) -> dict[str, Any]:
    known = inspect.signature(theirs).parameters
    named = inspect.signature(ours).parameters.values()
    return {p.name: p.default for p in named if p.kind is p.KEYWORD_ONLY and p.name not in known}


@lru_cache
def _modules() -> dict[type, type]:
    """Ours by torch's."""
    import fused_losses

    pairs = [(getattr(nn, name, None), getattr(fused_losses, name)) for name in fused_losses.__all__]
    return {theirs: ours for theirs, ours in pairs if isinstance(theirs, type) and issubclass(ours, theirs)}


@lru_cache
def _functions() -> dict[Any, Any]:
    """Ours by torch's."""
    from .. import functional

    return {getattr(F, name): getattr(functional, name) for name in functional.__all__ if hasattr(F, name)}
