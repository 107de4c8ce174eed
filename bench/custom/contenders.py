"""A custom loss as it is written, under torch.compile, and fused: what each costs."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_losses import fuse
from fused_losses.testing.measure import Timing, forget_gradients, median_ratio, peak_of, rounds, step_of, summary
from tests.custom_losses import Entry

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Measurement:
    """Everything measured of one loss; each mapping is by contender: fused, plain, compile."""

    loss: str
    shape: str
    elements: int  # of the arguments
    left_to_torch: tuple[str, ...]
    step: dict[str, Timing]  # forward and backward
    speedup: dict[str, float]  # of fused over the others: the median of the rounds' ratios
    peak: dict[str, int]
    tiny: dict[str, float]  # seconds of a step of a few elements
    first: dict[str, float]  # seconds of the first step of a few elements, "cold" and "warm"


def contenders(entry: Entry, device: str, compile: bool) -> dict[str, Loss]:
    plain = entry.build()
    plain = plain.to(device) if isinstance(plain, nn.Module) else plain
    found = {"fused": fuse(copy.deepcopy(plain)), "plain": plain}
    if compile:
        found["compile"] = torch.compile(copy.deepcopy(plain))
    return found


def tiny_inputs(entry: Entry, device: str) -> list[Tensor]:
    tensors = entry.samples()[0].to(torch.float32, device).tensors
    return [tensor.requires_grad_(i in entry.gradients) for i, tensor in enumerate(tensors)]


def measure(
    entry: Entry, scale: float, device: str, seconds: float, compile: bool, first: dict[str, float]
) -> Measurement:
    """All contenders on one large input, in turn, and on a tiny one."""
    torch.compiler.reset()
    leaves = [t.detach().to(device).requires_grad_(t.requires_grad) for t in entry.bench_inputs(scale)]
    losses = contenders(entry, device, compile)
    reset = forget_gradients(losses.values(), leaves)
    steps = {name: step_of(loss, leaves) for name, loss in losses.items()}
    taken = rounds(steps, reset=reset, device=device, seconds=seconds)
    peak = {name: peak_of(step, reset, device) for name, step in steps.items()}
    small = tiny_inputs(entry, device)
    small_steps = {name: step_of(loss, small) for name, loss in losses.items()}
    tiny = rounds(small_steps, reset=forget_gradients(losses.values(), small), device=device, seconds=seconds / 10)
    return Measurement(
        entry.name,
        "x".join(map(str, entry.bench_shape(scale))),
        sum(leaf.numel() for leaf in leaves),
        entry.left_to_torch,
        {name: summary(times) for name, times in taken.items()},
        {name: median_ratio(times, taken["fused"]) for name, times in taken.items() if name != "fused"},
        peak,
        {name: statistics.median(times) for name, times in tiny.items()},
        first,
    )
