"""Built programs for the calls of one pattern, and the autograd function that runs them."""

from __future__ import annotations

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
        own = call.state.read()
        self.given = len(call.tensors) - len(own.tensors)  # tensors that are arguments
        self.device = call.tensors[0].device
        self.autocast = call.fixed[-1]
        self.own_numbers = len(own.numbers)
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
        self.influences = [gradient is not None for gradient in traced.gradients]
        self.names = [value.name for value in traced.inputs]
        self._build()

    def _build(self) -> None:
        lowered = self.lowered
        programs = [program for program in (lowered.forward, lowered.backward) if program is not None]
        with ThreadPoolExecutor(len(programs)) as pool:
            built = list(pool.map(lambda program: runtime.compile_program(program, self.device), programs))
        self.forward, self.backward = built[0], built[1] if len(built) > 1 else None
        self.forward_numbers = _indices(lowered.forward)
        self.backward_numbers = _indices(lowered.backward)
        inputs = {buffer.name for buffer in lowered.forward.inputs}
        outputs = lowered.forward.outputs
        count = len(self.differentiable)
        # Outputs that are something else too must be the caller's alone.
        self.shared = [name in inputs or name in outputs[:k] or name in lowered.saved for k, name in enumerate(outputs)]
        ranks = [len(shape) for shape in lowered.shapes]
        buffers = lowered.forward.buffers
        self.reshaped = [
            None if buffers[name].sizes == shape else shape for name, shape in zip(outputs[:count], lowered.shapes)
        ]
        self.single = count == 1 and isinstance(tree_unflatten([0] * count, self.structure), int) and bool(ranks)
        if lowered.backward is not None:
            made = lowered.backward.buffers
            shapes = [shape for shape in lowered.gradient_shapes if shape is not None]
            self.gradients_reshaped = [
                None if made[name].sizes == shape else shape for name, shape in zip(lowered.backward.outputs, shapes)
            ]
        self.has_externs = any(isinstance(step, Extern) for program in programs for step in program.steps)

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
        split = len(numbers) - self.own_numbers
        arguments, keywords = filled(self.template, tensors[: self.given], numbers[:split])
        replaced = self.state.replaced(tensors[self.given :], numbers[split:])
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
            outputs = FusedFunction.apply(self, numbers, *tensors)
        else:
            outputs = self.values(tensors, numbers)[0]
        if self.single:
            return outputs[0]
        return tree_unflatten(list(outputs), self.structure)

    def values(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The outputs, and what is saved."""
        results = self._called(self.forward, [*tensors, *self.constants], numbers, self.forward_numbers)
        outputs = []
        for k, shape in enumerate(self.reshaped):
            output = results[k].clone() if self.shared[k] else results[k]
            outputs.append(output if shape is None else output.view(self._sizes(shape, tensors)))
        return tuple(outputs), results[len(outputs) :]

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
        results = iter(
            zip(self._called(self.backward, inputs, numbers, self.backward_numbers), self.gradients_reshaped)
        )
        gradients: list[Tensor | None] = []
        influences = iter(self.influences)
        for need in self.requires_grad:
            if not need or not next(influences):
                gradients.append(None)
                continue
            gradient, shape = next(results)
            gradients.append(gradient if shape is None else gradient.view(self._sizes(shape, tensors)))
        return gradients

    def _called(self, compiled: Any, inputs: Sequence[Tensor], numbers: Sequence[float], wanted: Sequence[int]) -> Any:
        parameters = [numbers[k] for k in wanted]
        if not self.has_externs or not torch.is_autocast_enabled(self.device.type):
            return compiled(inputs, parameters)
        with torch.autocast(self.device.type, enabled=False):  # its casts are in the programs
            return compiled(inputs, parameters)

    def _sizes(self, shape: Sequence[Size], tensors: Sequence[Tensor]) -> list[int]:
        shapes = self._shapes(tensors)
        return [evaluate(size, shapes, {}) for size in shape]

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


def _reads_numbers(guard: Guard) -> bool:
    def reads(side: Any) -> bool:
        if isinstance(side, Expression) and side.op == "parameter":
            return True
        return any(reads(argument) for argument in side.arguments)

    return reads(guard.left) or reads(guard.right)


def _indices(program: Program | None) -> list[int]:
    return [int(name.removeprefix("number")) for name in program.parameters] if program is not None else []
