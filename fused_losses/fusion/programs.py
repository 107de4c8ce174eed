"""The programs of one loss: which serves a call, when a new one is built, and what happens where none can be."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .calls import Call, plain_runs, unsuitable
from .compiler import BuildError
from .refusals import CannotFuse, frames_to_caller
from .served import Served
from .state import State

MOST_SHAPES = 1024  # exact calls that are remembered
MOST_TRACES = 16  # of one pattern, before its loss is left to torch; and of patterns that differ in whole numbers


class Refusal(NamedTuple):
    """Why a loss runs as it is written."""

    reason: str
    cause: Exception | None = None


class Programs:
    """The programs of one loss, and how a call finds them."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.last: Served | Refusal | None = None  # what the last call came to
        self.last_key: Any = ()  # of the last call that was served, at whose end are its tensors' dtypes and shapes
        self._state: State | None = None
        self._exact: dict[Any, list[Served]] = {}
        self._patterns: dict[Any, list[Served]] = {}
        self._alike: Counter[Any] = Counter()  # of patterns, those that differ in whole numbers alone
        self._refusals: dict[Any, Refusal] = {}
        self._warned: set[str] = set()
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return Programs, (self.strict,)  # a copy traces for itself

    def call(self, loss: Any, forward: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        """The loss of the arguments; ``forward`` is the plain one, of the loss itself where it is a module."""
        call = None if plain_runs() else self._taken(loss, forward, arguments, keywords)
        served = None if call is None or unsuitable(call) else self._find(call, forward)
        if call is not None and isinstance(served, Served):
            self.last, self.last_key = served, call.key
            return served.run(call.tensors, call.numbers, any(call.requires_grad))
        own = (loss,) if isinstance(loss, torch.nn.Module) else ()
        result = forward(*own, *arguments, **keywords)  # if the arguments are wrong, its error is the one to raise
        if isinstance(served, Refusal):
            self._refuse(loss, served)
        return result

    def _taken(self, loss: Any, forward: Any, arguments: Any, keywords: Any) -> Call | None:
        try:
            if self._state is None or not self._state.is_current():
                self._state = State(loss, forward)
            try:
                return Call(self._state, arguments, keywords)
            except KeyError:  # an attribute is gone
                self._state = State(loss, forward)
                return Call(self._state, arguments, keywords)
        except CannotFuse as error:
            self._refuse(loss, Refusal(str(error), error))
            return None

    def _find(self, call: Call, forward: Any) -> Served | Refusal:
        for served in self._exact.get(call.key, ()):
            if served.serves_numbers(call):
                return served
        with self._lock:
            return self._find_by_pattern(call, forward)

    def _find_by_pattern(self, call: Call, forward: Any) -> Served | Refusal:
        pattern = call.pattern()
        needed = (pattern, *call.requires_grad)
        refusal = self._refusals.get(needed)
        if refusal is not None:
            return refusal
        if pattern not in self._patterns:
            alike = tuple([int if type(part) is tuple and part[:1] == (int,) else part for part in pattern])
            if self._alike[alike] >= MOST_TRACES:
                return Refusal(
                    f"whole numbers that it is given have had {MOST_TRACES} values, and each takes a build; make a "
                    "float of what changes from call to call"
                )
            self._alike[alike] += 1
        known = self._patterns.setdefault(pattern, [])
        served = self._prepared(call, forward, known)
        if isinstance(served, Refusal):
            self._refusals[needed] = served
            return served
        if served not in known:
            known.append(served)
        if len(self._exact) >= MOST_SHAPES:
            self._exact.clear()
        self._exact.setdefault(call.key, []).append(served)
        return served

    def _prepared(self, call: Call, forward: Any, known: Sequence[Served]) -> Served | Refusal:
        served = next((served for served in known if served.serves(call)), None)
        if served is None and len(known) >= MOST_TRACES:
            return Refusal(
                f"{len(known)} traces differ in sizes or numbers that its code depends on, and each takes a build; "
                "x.shape[0] is open where len(x) and int(...) are one number"
            )
        try:
            served = served or Served(call, forward)
            served.prepare(call)
            return served
        except (CannotFuse, BuildError) as error:
            return Refusal(str(error), error)
        except Exception as error:  # an error of the loss itself comes again from the plain loss
            return Refusal(f"{type(error).__name__}: {error}", error)

    def _refuse(self, loss: Any, refusal: Refusal) -> None:
        name = getattr(loss, "__name__", type(loss).__name__)
        self.last = refusal
        if self.strict:
            raise CannotFuse(f"{name} cannot be fused: {refusal.reason}") from refusal.cause
        if refusal.reason not in self._warned:
            self._warned.add(refusal.reason)
            text = f"{name} runs as plain torch, because it cannot be fused: {refusal.reason}"
            warnings.warn(text, stacklevel=frames_to_caller())
