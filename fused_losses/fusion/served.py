"""Built programs for the calls of one pattern, and the autograd function that runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import runtime
from .calls import Call, filled
from .ir import Expression, Extern, Program, Size
from .lowering import Lowered, lower
from .sizes import Assumptions, Guard, evaluate
from .tracing import Traced, trace


class Served:
    """The programs of a pattern, and the plain loss with every tensor and number given."""

    def __init__(self, call: Call, forward: Callable[..., Any]):
        self.forward_function, self.state = forward, call.state
        self.template = call.template()
        self.given = call.given
        self.device = call.tensors[0].device
        self.autocast = call.fixed[-1]
        self.requires_grad = tuple(call.requires_grad)
        assumptions = Assumptions()
        numbers = [assumptions.parameter(f"number{k}", number) for k, number in enumerate(call.numbers)]
        traced = trace(
            lambda tensors, tracer: self.plain(tensors, numbers, tracer), call.tensors, assumptions, self.requires_grad
        )
        self.guards = assumptions.guards
        self.number_guards = [guard for guard in self.guards if _reads_numbers(guard)]
        self.lowered: Lowered = lower(traced)
        self.structure = traced.structure
        self.constants = list(traced.constants.values())
        self.differentiable = [cotangent is not None for cotangent in traced.cotangents]
        influences, count = iter(traced.gradients), itertools.count()
        # Which result of backward is the gradient of each tensor.
        self.places = [next(count) if need and next(influences) is not None else None for need in self.requires_grad]
        self.names = [value.name for value in traced.inputs]
        self._build()

    def _build(self) -> None:
        lowered = self.lowered
        programs = [program for program in (lowered.forward, lowered.backward) if program is not None]
        self.compiled = [runtime.compile_program(program, self.device) for program in programs]
        self.forward, self.backward = self.compiled[0], self.compiled[1] if len(self.compiled) > 1 else None
        self.forward_numbers = _indices(lowered.forward)
        self.backward_numbers = _indices(lowered.backward)
        inputs = {buffer.name for buffer in lowered.forward.inputs}
        outputs = lowered.forward.outputs
        count = len(self.differentiable)
        # Outputs that are something else too must be the caller's alone.
        self.shared = [
            k
            for k, name in enumerate(outputs[:count])
            if name in inputs or name in outputs[:k] or name in lowered.saved
        ]
        ranks = [len(shape) for shape in lowered.shapes]
        self.reshaped = _reshaped(lowered.forward, lowered.shapes)
        self.single = count == 1 and isinstance(tree_unflatten([0] * count, self.structure), int) and bool(ranks)
        if lowered.backward is not None:
            shapes = [shape for shape in lowered.gradient_shapes if shape is not None]
            self.gradients_reshaped = _reshaped(lowered.backward, shapes)
        self.has_externs = any(isinstance(step, Extern) for program in programs for step in program.steps)

    def prepare(self, call: Call) -> None:
        """Builds what its kernels lack for the shapes of a call, forward and backward side by side.

        Raises:
            BuildError: if it cannot be built here.
        """
        shapes = self._shapes(call.tensors)
        libraries = [compiled.libraries for compiled in self.compiled if compiled.libraries is not None]
        lacking = [each for each in libraries if each.lack(shapes)]
        if lacking:
            with ThreadPoolExecutor(len(lacking)) as pool:
                list(pool.map(lambda each: each.of(shapes), lacking))

    def serves(self, call: Call) -> bool:
        """Whether the gradients are the same or none, and every comparison that the trace relied on, too."""
        needed = tuple(call.requires_grad)
        if needed != self.requires_grad and (any(needed) or self.state.asks_for_gradients):
            return False
        shapes, parameters = self._shapes(call.tensors), self._parameters(call.numbers)
        return all(guard.holds(shapes, parameters) for guard in self.guards)

    def serves_numbers(self, numbers: Sequence[float]) -> bool:
        if not self.number_guards:
            return True
        parameters = self._parameters(numbers)
        return all(guard.holds({}, parameters) for guard in self.number_guards)

    def _shapes(self, tensors: Sequence[Tensor]) -> Mapping[str, Sequence[int]]:
        return {name: tensor.shape for name, tensor in zip(self.names, tensors)}

    def _parameters(self, numbers: Sequence[float]) -> dict[str, float]:
        return {f"number{k}": number for k, number in enumerate(numbers)}

    def plain(self, tensors: Sequence[Any], numbers: Sequence[Any], tracer: Any = None) -> Any:
        """The plain loss as it was in the call that was traced, of given tensors and numbers."""
        given, open_given = self.given
        arguments, keywords = filled(self.template, tensors[:given], numbers[:open_given])
        replaced = self.state.replaced(tensors[given:], numbers[open_given:])
        if tracer is not None:
            tracer.lifted.update({key: t for key, t in replaced.around.items() if isinstance(t, Traced)})
        own = (replaced.loss,) if isinstance(self.state.loss, torch.nn.Module) else ()
        device, dtype = self.device.type, self.autocast
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            result = self.forward_function(*own, *arguments, **keywords)
        if tracer is not None:
            replaced.check_unchanged()
        return result

    def run(self, tensors: Sequence[Tensor], numbers: Sequence[float], grad: bool) -> Any:
        """The loss, differentiable where a tensor requires it."""
        if grad and self.backward is not None:
            outputs = _apply(self, numbers, *tensors)
        else:
            outputs = self.values(tensors, numbers)[0]
        if self.single:
            return outputs[0]
        return tree_unflatten(list(outputs), self.structure)

    def values(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The outputs, and what is saved."""
        results = self._called(self.forward, [*tensors, *self.constants], numbers, self.forward_numbers)
        for k in self.shared:
            results[k] = results[k].clone()
        self._reshape(results, self.reshaped, tensors)
        count = len(self.differentiable)
        return tuple(results[:count]), results[count:]

    def gradients(
        self,
        tensors: Sequence[Tensor],
        numbers: Sequence[float],
        saved: Sequence[Tensor],
        grad_outputs: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradient of each tensor that requires one."""
        learnt = [grad for grad, does in zip(grad_outputs, self.differentiable) if does]
        inputs = [*tensors, *self.constants, *saved, *learnt]
        results = self._called(self.backward, inputs, numbers, self.backward_numbers)
        self._reshape(results, self.gradients_reshaped, tensors)
        return [None if place is None else results[place] for place in self.places]

    def _called(self, compiled: Any, inputs: Sequence[Tensor], numbers: Sequence[float], wanted: Sequence[int]) -> Any:
        parameters = [numbers[k] for k in wanted]
        if not self.has_externs or not torch.is_autocast_enabled(self.device.type):
            return compiled(inputs, parameters)
        with torch.autocast(self.device.type, enabled=False):  # its casts are in the programs
            return compiled(inputs, parameters)

    def _reshape(
        self, results: list[Tensor], reshaped: Mapping[int, Sequence[Size]], tensors: Sequence[Tensor]
    ) -> None:
        for k, shape in reshaped.items():
            shapes = self._shapes(tensors)
            results[k] = results[k].view([evaluate(size, shapes, {}) for size in shape])

    def plain_gradients(
        self, tensors: Sequence[Tensor], numbers: Sequence[float], grad_outputs: Sequence[Tensor], create_graph: bool
    ) -> list[Tensor | None]:
        """Gradients through the plain loss, which can be differentiated and mapped over."""
        with torch.enable_grad():
            outputs = tree_flatten(self.plain(tensors, numbers))[0]
            wanted = [tensor for tensor, need in zip(tensors, self.requires_grad) if need]
            pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs) if out.requires_grad]
            results = torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        rest = iter(results)
        return [next(rest) if need else None for need in self.requires_grad]


class FusedFunction(torch.autograd.Function):
    """Saves the inputs and the small results of reductions; backward recomputes everything else."""

    @staticmethod
    def forward(ctx: Any, served: Served, numbers: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.served, ctx.numbers = served, numbers
        outputs, saved = served.values(tensors, numbers)
        ctx.save_for_backward(*tensors, *saved)
        if not all(served.differentiable):
            ctx.mark_non_differentiable(*(o for o, does in zip(outputs, served.differentiable) if not does))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        served: Served = ctx.served
        count = len(served.requires_grad)
        everything = ctx.saved_tensors
        tensors, saved = everything[:count], everything[count:]
        graph = torch.is_grad_enabled()
        if graph or _are_functorch_transforms_active() or any(map(is_legacy_batchedtensor, grad_outputs)):
            return None, None, *served.plain_gradients(tensors, ctx.numbers, grad_outputs, graph)
        return None, None, *served.gradients(tensors, ctx.numbers, saved, grad_outputs)


# What Function.apply adds to this is for transforms of functorch, under which the plain loss runs.
_apply: Callable[..., Any] = super(torch.autograd.Function, FusedFunction).apply  # type: ignore[misc]


def _reshaped(program: Program, shapes: Sequence[Sequence[Size]]) -> dict[int, Sequence[Size]]:
    """Which of the first outputs lack dimensions of size 1, and their shapes with them."""
    buffers = program.buffers
    named = enumerate(zip(program.outputs, shapes))
    return {k: shape for k, (name, shape) in named if buffers[name].sizes != shape}


def _reads_numbers(guard: Guard) -> bool:
    def reads(side: Any) -> bool:
        if isinstance(side, Expression) and side.op == "parameter":
            return True
        return any(reads(argument) for argument in side.arguments)

    return reads(guard.left) or reads(guard.right)


def _indices(program: Program | None) -> list[int]:
    return [int(name.removeprefix("number")) for name in program.parameters] if program is not None else []
