"""The loss as it is written, with every tensor and number given: to be traced, and for what kernels do not compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .calls import Call, filled
from .draws import Redrawn
from .refusals import CannotFuse
from .state import Attribute, Replaced
from .tracing import Traced, Tracer


class Kept(NamedTuple):
    """What a loss keeps for later calls: where, and of which outputs it is made."""

    where: Attribute | int  # an attribute that is assigned, or which of the call's tensors is written
    structure: Any
    outputs: list[int]

    def keep(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        value = tree_unflatten([outputs[k] for k in self.outputs], self.structure)
        if isinstance(self.where, Attribute):
            self.where.assign(value)
        else:
            tensors[self.where].copy_(value)


class Plain:
    """The plain loss as it was in one call, of given tensors and numbers; what was drawn for it follows the tensors."""

    def __init__(self, call: Call, forward: Callable[..., Any]):
        self._forward, self._state, self._template = forward, call.state, call.template()
        self._given, self._count = call.given, len(call.tensors)
        self._held = call.state.held()
        self._device, self._autocast = call.tensors[0].device.type, call.fixed[-1]
        # Buffers and attributes that may be written; not where that would show in another tensor of the call.
        own = [False] * self._given[0] + call.state.is_own(self._held)
        ids = [id(tensor) for tensor in call.tensors]
        alone = [ids.count(each) == 1 for each in ids]
        self.may_write = [
            a and b and not tensor.requires_grad for a, b, tensor in zip(own, alone, call.tensors, strict=True)
        ]
        self.kept: list[Kept] = []

    @property
    def written(self) -> list[int]:
        """Which of the call's tensors the loss writes."""
        return [kept.where for kept in self.kept if isinstance(kept.where, int)]

    def traced(self, tensors: Sequence[Traced], numbers: Sequence[Any], tracer: Tracer) -> tuple[Any, list[Traced]]:
        """The result, and what the loss keeps besides."""
        inputs = [tensor.value for tensor in tensors]
        replaced, result = self._called(tensors, numbers, tracer)
        written = {k: tensor for k, tensor in enumerate(tensors) if tensor.value is not inputs[k]}
        outputs = tree_leaves(result)
        count = len(outputs)
        for where, value in {**replaced.assigned(), **written}.items():
            leaves, structure = tree_flatten(value)
            if isinstance(where, Attribute) and not (where.may_change and all(isinstance(x, Traced) for x in leaves)):
                raise CannotFuse(f"it changes its attribute {where}; keep it in a buffer, or change it outside forward")
            self.kept.append(Kept(where, structure, [_place(leaf, outputs) for leaf in leaves]))
        return result, outputs[count:]

    def outputs(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> list[Any]:
        """The outputs in the order of the trace's."""
        written = self.written
        tensors = [tensor.clone() if k in written else tensor for k, tensor in enumerate(tensors)]
        drawn = tensors[self._count :]
        with Redrawn(drawn) if drawn else nullcontext():
            replaced, result = self._called(tensors, numbers)
        outputs = dict(enumerate(tree_leaves(result)))
        for where, _, places in self.kept:
            value = replaced.read(where) if isinstance(where, Attribute) else tensors[where]
            outputs |= zip(places, tree_leaves(value))
        return [outputs[place] for place in range(len(outputs))]

    def _called(self, tensors: Sequence[Any], numbers: Sequence[Any], tracer: Tracer | None = None) -> Any:
        given, open_given = self._given
        arguments, keywords = filled(self._template, tensors[:given], numbers[:open_given])
        replaced = Replaced(self._state, self._held, tensors[given:], numbers[open_given:])
        if tracer is not None:
            tracer.lifted.update({key: t for key, t in replaced.around.items() if isinstance(t, Traced)})
        own = (replaced.loss,) if isinstance(self._state.loss, torch.nn.Module) else ()
        dtype = self._autocast
        with torch.autocast(self._device, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            return replaced, self._forward(*own, *arguments, **keywords)


def _place(tensor: Any, outputs: list[Any]) -> int:
    """Where a tensor is among the outputs; it is added where it is new."""
    place = next((k for k, output in enumerate(outputs) if output is tensor), len(outputs))
    if place == len(outputs):
        outputs.append(tensor)
    return place
