"""Built programs for the calls of one pattern, and the autograd functions that run them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils._pytree import tree_unflatten

from . import runtime
from .built import Built
from .calls import Call
from .ir import Expression
from .lowering import Lowered, lower, lower_at_once, lower_draws, shapes_of
from .plain import Plain
from .sizes import Assumptions, Guard, Shapes
from .tracing import trace


class Served:
    """The programs of a pattern, and the plain loss with every tensor and number given."""

    def __init__(self, call: Call, forward: Callable[..., Any]):
        self.state, self.plain = call.state, Plain(call, forward)
        self.device = call.tensors[0].device
        self.requires_grad = tuple(call.requires_grad)
        assumptions = Assumptions()
        numbers = [assumptions.parameter(f"number{k}", number) for k, number in enumerate(call.numbers)]
        traced = trace(
            lambda tensors, tracer: self.plain.traced(tensors, numbers, tracer),
            call.tensors,
            assumptions,
            self.requires_grad,
            call.generators(),
            self.plain.may_write,
        )
        self.guards = assumptions.guards
        self.number_guards = [guard for guard in self.guards if _reads_numbers(guard)]
        self.structure = traced.structure
        self.constants = list(traced.constants.values())
        self.differentiable = [cotangent is not None for cotangent in traced.cotangents]
        influences, count = iter(traced.gradients), itertools.count()
        # Which result of backward is the gradient of each tensor.
        self.places = [next(count) if need and next(influences) is not None else None for need in self.requires_grad]
        self.places += [None] * len(traced.drawn)
        self.names = [value.name for value in traced.inputs]
        drawing = lower_draws(traced)
        self.drawing = drawing and Built(drawing, self.device, [])
        self.drawn_shapes = shapes_of(traced.drawn)
        self.shapes = shapes_of(traced.outputs)
        self.gradient_shapes = shapes_of(value for value in traced.gradients if value is not None)
        keeps = self.plain.kept
        self.single = len(self.shapes) == 1 and not keeps and tree_unflatten([0], self.structure) == (0, [])
        # What is changed in this call, and what would tie the loss to a graph that it has no part in.
        self.apart = dict.fromkeys(self.plain.written, Tensor.clone)
        self.apart |= {k: Tensor.detach for k, need in enumerate(self.requires_grad) if need and self.places[k] is None}
        self.at_once = lower_at_once(traced) if runtime.reads_numbers(self.device) else None
        self._trace = traced if self.at_once is None else traced.without_gradients()

    # A call needs few of these, and the others may never be: they are made when they are asked for.

    @functools.cached_property
    def lowered(self) -> Lowered:
        """The programs of calls whose gradients are not made at once."""
        return lower(self._trace)

    @functools.cached_property
    def whole(self) -> Built:
        """The outputs, and the gradients for a loss whose own is 1."""
        assert self.at_once is not None
        return Built(self.at_once, self.device, [*self.shapes, *self.gradient_shapes])

    @functools.cached_property
    def forward(self) -> Built:
        return Built(self.lowered.forward, self.device, self.shapes)

    @functools.cached_property
    def backward(self) -> Built:
        assert self.lowered.backward is not None
        return Built(self.lowered.backward, self.device, self.gradient_shapes)

    def built(self, grad: bool) -> list[Built]:
        """What a call runs, with gradients or without."""
        if grad and self.at_once is not None:
            return [self.whole]
        return [self.forward, self.backward] if grad and self.lowered.backward is not None else [self.forward]

    def prepare(self, call: Call) -> None:
        """Builds what its kernels lack for a call, forward and backward side by side.

        Raises:
            BuildError: if it cannot be built here.
        """
        shapes = self._shapes(call.tensors)
        libraries = [built.compiled.libraries for built in self.built(any(call.requires_grad))]
        lacking = [each for each in libraries if each is not None and each.lack(shapes)]
        if len(lacking) == 1:
            lacking[0].of(shapes)
        elif lacking:
            with ThreadPoolExecutor(len(lacking)) as pool:
                list(pool.map(lambda each: each.of(shapes), lacking))

    def serves(self, call: Call) -> bool:
        """Whether the gradients are the same or none, and every comparison that the trace relied on, too."""
        needed = tuple(call.requires_grad)
        if needed != self.requires_grad and (any(needed) or self.state.asks_for_gradients):
            return False
        return self._hold(self.guards, call)

    def serves_numbers(self, call: Call) -> bool:
        """The same for a call with sizes that it is known to serve."""
        return not self.number_guards or self._hold(self.number_guards, call)

    def _hold(self, guards: Sequence[Guard], call: Call) -> bool:
        shapes, parameters = self._shapes(call.tensors), self._parameters(call.numbers)
        return all(guard.holds(shapes, parameters) for guard in guards)

    def _shapes(self, tensors: Sequence[Tensor]) -> Shapes:
        return {name: tensor.shape for name, tensor in zip(self.names, tensors)}

    def _parameters(self, numbers: Sequence[float]) -> dict[str, float]:
        return {f"number{k}": number for k, number in enumerate(numbers)}

    def run(self, tensors: Sequence[Tensor], numbers: Sequence[float], grad: bool) -> Any:
        """The loss, differentiable where a tensor requires it."""
        given = tensors
        if self.apart:
            tensors = [self.apart[k](tensor) if k in self.apart else tensor for k, tensor in enumerate(tensors)]
        if self.drawing is not None:
            tensors = [*tensors, *self.drawing([*tensors, *self.constants], ())]
        if grad and self.at_once is not None:
            outputs = _whole(self, numbers, *tensors)
        elif grad and self.lowered.backward is not None:
            outputs = _in_turn(self, numbers, *tensors)
        else:
            outputs = self.values(self.forward, tensors, numbers)[0]
        if self.single:
            return outputs[0]
        for kept in self.plain.kept:
            kept.keep(given, outputs)
        return tree_unflatten(list(outputs), self.structure)[0]

    def values(
        self, built: Built, tensors: Sequence[Tensor], numbers: Sequence[float]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The outputs, and what else a program results in."""
        results, count = built([*tensors, *self.constants], numbers), len(self.shapes)
        return tuple(results[:count]), results[count:]

    def placed(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """For each tensor its gradient."""
        return [None if place is None else gradients[place] for place in self.places]

    def of_outputs(self, grad_outputs: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of those outputs that have one."""
        return [grad for grad, does in zip(grad_outputs, self.differentiable) if does]

    def plain_gradients(
        self, tensors: Sequence[Tensor], numbers: Sequence[float], grad_outputs: Sequence[Tensor], create_graph: bool
    ) -> list[Tensor | None]:
        """Gradients through the plain loss, which can be differentiated and mapped over."""
        with torch.enable_grad():
            outputs = self.plain.outputs(tensors, numbers)
            wanted = [tensor for tensor, place in zip(tensors, self.places) if place is not None]
            pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs) if out.requires_grad]
            results = torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        rest = iter(results)
        return [None if place is None else next(rest) for place in self.places]


class Whole(torch.autograd.Function):
    """Makes the gradients with the loss: while the inputs are at hand, they cost one more write."""

    @staticmethod
    def forward(ctx: Any, served: Served, numbers: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, ctx.gradients = served.values(served.whole, tensors, numbers)
        return _begun(ctx, served, numbers, tensors, outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        served, tensors = ctx.served, ctx.saved_tensors
        (grad,) = served.of_outputs(grad_outputs)
        if _is_plain(grad_outputs) or not math.isfinite(factor := grad.item()):  # 0 times infinity is not 0
            return None, None, *served.plain_gradients(tensors, ctx.numbers, grad_outputs, torch.is_grad_enabled())
        gradients = vars(ctx).pop("gradients", None)  # the first to come takes their memory
        if gradients is None:
            gradients = served.values(served.whole, tensors, ctx.numbers)[1]
        if factor != 1:
            gradients = [gradient.mul_(factor) for gradient in gradients]
        return None, None, *served.placed(gradients)


class InTurn(torch.autograd.Function):
    """Saves the inputs and the small results of reductions; backward recomputes everything else."""

    @staticmethod
    def forward(ctx: Any, served: Served, numbers: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, saved = served.values(served.forward, tensors, numbers)
        return _begun(ctx, served, numbers, [*tensors, *saved], outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        served: Served = ctx.served
        everything, count = ctx.saved_tensors, len(served.places)
        tensors, saved = everything[:count], everything[count:]
        if _is_plain(grad_outputs):
            return None, None, *served.plain_gradients(tensors, ctx.numbers, grad_outputs, torch.is_grad_enabled())
        inputs = [*tensors, *served.constants, *saved, *served.of_outputs(grad_outputs)]
        return None, None, *served.placed(served.backward(inputs, ctx.numbers))


# What Function.apply adds to this is for transforms of functorch, under which the plain loss runs.
_whole, _in_turn = (super(torch.autograd.Function, kind).apply for kind in (Whole, InTurn))  # type: ignore[misc]


def _begun(
    ctx: Any, served: Served, numbers: Sequence[float], saved: Sequence[Tensor], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    ctx.served, ctx.numbers = served, numbers
    ctx.save_for_backward(*saved)
    if not all(served.differentiable):
        ctx.mark_non_differentiable(*(o for o, does in zip(outputs, served.differentiable) if not does))
    return outputs


def _is_plain(grad_outputs: Sequence[Tensor]) -> bool:
    """Whether backward itself is differentiated or mapped over, which the plain loss can be."""
    if torch.is_grad_enabled() or _are_functorch_transforms_active():
        return True
    return any(map(is_legacy_batchedtensor, grad_outputs))


def _reads_numbers(guard: Guard) -> bool:
    def reads(side: Any) -> bool:
        if isinstance(side, Expression) and side.op == "parameter":
            return True
        return any(reads(argument) for argument in side.arguments)

    return reads(guard.left) or reads(guard.right)
