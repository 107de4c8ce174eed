"""``fuse``: a loss in plain torch, run by generated kernels."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .explain import Explanation, explained, source_of
from .programs import Programs


def fuse(loss: Any = None, *, strict: bool = False) -> Any:
    """Runs a loss that is written in plain torch as fused kernels, with exact gradients.

    The loss is traced once for each pattern of ranks, dtypes and equal sizes, and C++, or Triton for a GPU, is
    generated for its value and its gradient. Hyper-parameters, ``reduction`` and learnable parameters are read in
    every call. What cannot be fused says why, once, in a warning, and runs as it is written.

    Args:
        loss: an ``nn.Module``, a function of tensors, or (as a decorator) a class of modules.
        strict: raises instead of running as written where the loss cannot be fused.

    Returns:
        A module that shares parameters, buffers and attributes with the loss; a function of the same signature; or
        the class itself, whose instances are fused.

    Raises:
        TypeError: for what is none of these.
        RuntimeError: in a call, with ``strict``, where the loss cannot be fused.

    Example:
        >>> import torch
        >>> from fused_losses import fuse
        >>> @fuse
        ... def charbonnier(prediction, target, eps=1e-3):
        ...     return ((prediction - target).square() + eps**2).sqrt().mean()
        >>> x = torch.ones(4, requires_grad=True)
        >>> charbonnier(x, torch.zeros(4)).backward()
        >>> x.grad
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if loss is None:
        return functools.partial(fuse, strict=strict)
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        return _fused_class(loss, strict)
    if isinstance(loss, torch.jit.ScriptModule):
        raise TypeError("a scripted module cannot be fused: its Python is gone; pass the module before scripting")
    if isinstance(loss, nn.Module):
        return _fused_module(loss, strict)
    if isinstance(loss, Fused):
        return loss
    if callable(loss) and not isinstance(loss, type):
        return Fused(loss, strict)
    raise TypeError(f"fuse takes an nn.Module, a class of modules or a function, got {type(loss).__name__}")


class Fused:
    """A function whose calls run as fused kernels; it has the function's name, signature and documentation."""

    def __init__(self, function: Callable[..., Any], strict: bool):
        functools.update_wrapper(self, function)
        self._fusion = Programs(strict)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        function = self.__wrapped__  # type: ignore[attr-defined]
        if torch.compiler.is_compiling():  # the compiler fuses it with what stands around it
            return function(*arguments, **keywords)
        return self._fusion.call(function, function, arguments, keywords)

    def explain(self, *arguments: Any, **keywords: Any) -> Explanation:
        """What the last call ran, or one with arguments."""
        if arguments or keywords:
            self(*arguments, **keywords)
        return explained(self._fusion)

    def source(self, language: str = "cpp") -> str:
        """The kernels of the last call, in ``"cpp"`` or ``"triton"``, whichever ran."""
        return source_of(self._fusion, language)

    def __repr__(self) -> str:
        return f"fuse({self.__wrapped__!r})"  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        function = self.__wrapped__  # type: ignore[attr-defined]
        found: Any = sys.modules.get(function.__module__)
        for name in function.__qualname__.split("."):
            found = getattr(found, name, None)
        return function.__qualname__ if found is self else (Fused, (function, self._fusion.strict))


def _fused_module(loss: nn.Module, strict: bool) -> nn.Module:
    """A module of a class of its own that shares all that the loss has."""
    kind = type(loss)
    if hasattr(kind, "_plain_forward"):
        return loss
    fused = object.__new__(_fused_kind(kind))
    object.__setattr__(fused, "__dict__", vars(loss))
    vars(loss)["_fusion"] = Programs(strict)
    return fused


@functools.cache
def _fused_kind(kind: type[nn.Module]) -> Any:
    members = {**_members(kind.forward), "__reduce_ex__": _reduced, "__doc__": kind.__doc__}
    return type(f"Fused{kind.__name__}", (kind,), {**members, "__module__": kind.__module__})


def _fused_class(kind: type[nn.Module], strict: bool) -> type[nn.Module]:
    """The class itself, with another forward."""
    for name, member in {**_members(kind.forward), "_strict": strict}.items():
        setattr(kind, name, member)
    return kind


def _members(plain: Callable[..., Any]) -> dict[str, Any]:
    @functools.wraps(plain)
    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler fuses it with what stands around it
            return plain(self, *arguments, **keywords)
        return _programs(self).call(self, plain, arguments, keywords)

    def explain(self: Any, *arguments: Any, **keywords: Any) -> Explanation:
        """What the last call ran, or one with arguments."""
        if arguments or keywords:
            self(*arguments, **keywords)
        return explained(_programs(self))

    def source(self: Any, language: str = "cpp") -> str:
        """The kernels of the last call, in ``"cpp"`` or ``"triton"``, whichever ran."""
        return source_of(_programs(self), language)

    return {"forward": forward, "_plain_forward": plain, "explain": explain, "source": source}


def _programs(module: Any) -> Programs:
    own = vars(module)
    if "_fusion" not in own:
        own["_fusion"] = Programs(getattr(module, "_strict", False))
    return own["_fusion"]


def _reduced(self: Any, protocol: Any) -> Any:
    """For copies and pickles: the plain module's, and what it is called then."""
    kind = type(self).__mro__[1]
    _, (_, *arguments), *rest = kind.__reduce_ex__(self, protocol)  # type: ignore[arg-type, misc]
    return _restored, (kind, *arguments), *rest


def _restored(kind: type[nn.Module], *arguments: Any) -> Any:
    return object.__new__(_fused_kind(kind))
