"""Who is measured: our backends, torch's own loss, torch.compile of it, and a copy of the input."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_losses.backends import choice
from fused_losses.specs import Bench, LossSpec
from fused_losses.testing import peak_bytes

from .measure import Step, Timing, interleaved


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
    bytes: int  # of the input
    traffic: int  # least input-sized reads and writes of forward and backward
    forward_backward: dict[str, Timing]
    forward: dict[str, Timing]
    copy: Timing
    peak: dict[str, int]
    first_call: dict[str, float]


def modules(spec: LossSpec, bench: Bench, device: str, compile: bool) -> dict[str, nn.Module]:
    """The contenders: ours as users get it and by backend, torch's (or the reference where it has none)."""
    torchs = spec.original(**bench.options) if spec.original else spec.loss(**bench.options, backend="reference")
    found = {"ours": spec.loss(**bench.options), "torch": torchs}
    for backend in ("cuda", "triton") if device == "cuda" else ():
        if choice.unavailable_reason(backend, device, torch.float32) is None:
            found[backend] = spec.loss(**bench.options, backend=backend)
    if compile:
        found["compile"] = torch.compile(torchs, fullgraph=True)
    return {name: module.to(device) for name, module in found.items()}


def step_of(module: nn.Module, tensors: tuple[Tensor, ...]) -> Step:
    return lambda: module(*tensors).sum().backward() if module.reduction == "none" else module(*tensors).backward()


def in_place_step(spec: LossSpec, tensors: tuple[Tensor, ...]) -> Step:
    """Cross entropy whose backward writes over the logits, which are a copy of the input."""
    module, anchor = spec.loss(inplace_backward=True), torch.zeros((), requires_grad=True)
    logits = tensors[0].detach().clone()
    return lambda: module(PassThrough.apply(logits, anchor), *tensors[1:]).backward()


def measure(
    spec: LossSpec, bench: Bench, dtype: torch.dtype, device: str, seconds: float, compile: bool
) -> Measurement:
    """All contenders on one input, in turn."""
    torch.compiler.reset()
    tensors = bench.make(dtype, device)
    tensors = (tensors[0].requires_grad_(), *tensors[1:])
    first_call: dict[str, float] = {}
    steps: dict[str, Step] = {}
    forward: dict[str, Step] = {}
    for name, module in modules(spec, bench, device, compile).items():
        steps[name] = step_of(module, tensors)
        forward[name] = without_grad(module, tensors)
        first_call[name] = first_seconds(steps[name])
    if spec.name == "CrossEntropyLoss" and tensors[0].numel() > 10_000:
        steps["in place"] = in_place_step(spec, tensors)
    target = torch.empty_like(tensors[0])
    steps["copy"] = lambda: target.copy_(tensors[0].detach())

    def reset() -> None:
        tensors[0].grad = None

    timings = interleaved(steps, reset=reset, device=device, seconds=seconds)
    forwards = interleaved(forward, reset=reset, device=device, seconds=seconds / 3)
    peak = {}
    for name, step in steps.items():
        reset()
        peak[name] = peak_bytes(step, device)
    size = tensors[0].numel() * tensors[0].element_size()
    copy = timings.pop("copy")
    return Measurement(
        spec.name,
        bench.name,
        str(dtype).removeprefix("torch."),
        size,
        bench.traffic,
        timings,
        forwards,
        copy,
        peak,
        first_call,
    )


def without_grad(module: nn.Module, tensors: tuple[Tensor, ...]) -> Step:
    detached = tuple(tensor.detach() for tensor in tensors)
    return lambda: module(*detached)


def first_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
