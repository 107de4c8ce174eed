"""Who is measured: ours, by backend on a GPU, torch's own, torch.compile of it, peers, and what bounds them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_losses.backends import choice
from fused_losses.specs import Bench, LossSpec, Sample
from fused_losses.testing.measure import Step, Timing, forget_gradients, interleaved, peak_of, step_of

from .peers import peers

Loss = Callable[..., Tensor]
# What no loss can be faster than, measured beside them.
COPY, PRODUCTS = "copy", "products"


class PassThrough(torch.autograd.Function):
    """Makes logits that are no leaf, as a model's are, without moving them."""

    @staticmethod
    def forward(ctx, input, anchor):
        return input.view_as(input)

    @staticmethod
    def backward(ctx, gradient):
        return None, None


@dataclass
class Measurement:
    """Everything measured of one loss, shape and dtype."""

    loss: str
    shape: str
    dtype: str
    bytes: int  # of the gradients
    traffic: int  # least reads and writes of the size of the input, forward and backward; 0 where products bound
    forward_backward: dict[str, Timing]
    forward: dict[str, Timing]
    bound: Timing  # a copy of the input, or the matrix products alone
    peak: dict[str, int]
    first_call: dict[str, float]


def contenders(spec: LossSpec, bench: Bench, tensors: tuple[Tensor, ...], compile: bool) -> dict[str, Loss]:
    """The contenders: ours as users get it and by backend, torch's (or the reference where it has none), peers."""
    device, call = tensors[0].device.type, Sample("bench", tensors, bench.options)
    original = spec.original(**bench.options) if spec.original else spec.build(call, "reference")
    found: dict[str, Loss] = {"ours": spec.build(call), "torch": original}
    for backend in ("cuda", "triton") if device == "cuda" else ():
        if choice.unavailable_reason(backend, device, torch.float32) is None:
            found[backend] = spec.build(call, backend)
    found.update(peers(spec.name, dict(bench.options), tensors))
    if compile:
        found["compile"] = torch.compile(original, fullgraph=True)
    return {name: loss.to(device) if isinstance(loss, nn.Module) else loss for name, loss in found.items()}


def in_place_step(spec: LossSpec, tensors: tuple[Tensor, ...]) -> Step:
    """Cross entropy whose backward writes over the logits, which are a copy of the input."""
    module, anchor = spec.loss(inplace_backward=True), torch.zeros((), requires_grad=True)
    logits = tensors[0].detach().clone()
    return lambda: module(PassThrough.apply(logits, anchor), *tensors[1:]).backward()


def bound_of(bench: Bench, tensors: tuple[Tensor, ...]) -> Step:
    """A copy of the input; for a head, its products into memory that is there already."""
    input = tensors[0].detach()
    if not bench.products:
        target = torch.empty_like(input)
        return lambda: target.copy_(input)
    weight = tensors[1].detach()
    logits, grad_input, grad_weight = input @ weight.t(), torch.empty_like(input), torch.empty_like(weight)

    def products() -> None:
        for _ in range(bench.products - 2):
            torch.mm(input, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_input)
        torch.mm(logits.t(), input, out=grad_weight)

    return products


def measure(
    spec: LossSpec, bench: Bench, dtype: torch.dtype, device: str, seconds: float, compile: bool
) -> Measurement:
    """All contenders on one input, in turn."""
    torch.compiler.reset()
    leaves = [tensor.requires_grad_(i in bench.differentiable) for i, tensor in enumerate(bench.make(dtype, device))]
    tensors, wanted = tuple(leaves), [leaves[i] for i in bench.differentiable]
    losses = contenders(spec, bench, tensors, compile)
    reset = forget_gradients(losses.values(), tensors)
    steps = {name: step_of(loss, tensors) for name, loss in losses.items()}
    first_call = {name: first_seconds(step, reset) for name, step in steps.items()}
    if spec.name == "CrossEntropyLoss" and tensors[0].numel() > 10_000:
        steps["in place"] = in_place_step(spec, tensors)
    detached = tuple(tensor.detach() for tensor in tensors)
    forward: Mapping[str, Step] = {name: lambda loss=loss: loss(*detached) for name, loss in losses.items()}
    bound = PRODUCTS if bench.products else COPY
    timings = interleaved({**steps, bound: bound_of(bench, tensors)}, reset=reset, device=device, seconds=seconds)
    forwards = interleaved(forward, reset=reset, device=device, seconds=seconds / 3)
    return Measurement(
        spec.name,
        bench.name,
        str(dtype).removeprefix("torch."),
        sum(leaf.nbytes for leaf in wanted),
        0 if bench.products else bench.traffic,
        timings,
        forwards,
        timings.pop(bound),
        {name: peak_of(step, reset, device) for name, step in steps.items()},
        first_call,
    )


def first_seconds(step: Step, reset: Callable[[], None]) -> float:
    reset()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
