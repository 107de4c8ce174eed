"""Times and memory of steps, measured in turn so that contenders can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .case import Loss
from .memory import peak_bytes

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: the median and the quartiles around it."""

    median: float
    low: float
    high: float


def step_of(loss: Loss, tensors: Sequence[Tensor], extras: Mapping[str, Any] | None = None) -> Step:
    """Forward, and backward where anything requires a gradient."""
    keywords = extras or {}

    def step() -> None:
        value = loss(*tensors, **keywords)
        if value.requires_grad:
            value.sum().backward()

    return step


def forget_gradients(losses: Iterable[Loss], tensors: Iterable[Tensor]) -> Callable[[], None]:
    """What resets a step: no tensor, and no parameter of a loss, has a gradient then."""
    parameters = [p for loss in losses if isinstance(loss, nn.Module) for p in loss.parameters()]
    leaves = [t for t in (*tensors, *parameters) if t.requires_grad]

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    return reset


def synchronize(device: str | torch.device) -> None:
    """Waits for what an accelerator was given to do; a CPU has done it."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def interleaved(
    steps: Mapping[str, Step], *, reset: Callable[[], None], device: str, seconds: float, least: int = 5
) -> dict[str, Timing]:
    """Times steps in turn: see :func:`rounds`."""
    taken = rounds(steps, reset=reset, device=device, seconds=seconds, least=least)
    return {name: summary(times) for name, times in taken.items()}


def rounds(
    steps: Mapping[str, Step], *, reset: Callable[[], None], device: str, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Times steps in turn, round after round, so that a busy moment of the machine meets all of them.

    reset runs before each step and is not timed: what a step frees of the one before is not its cost.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}

    def too_slow(times: list[float]) -> bool:
        """For more than two rounds."""
        return len(times) >= 2 and times[0] > seconds / 2

    for step in steps.values():
        reset()
        step()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or any(len(t) < least and not too_slow(t) for t in taken.values()):
        for name, step in steps.items():
            times = taken[name]
            if too_slow(times):
                continue
            reset()
            times.append(seconds_of(step, reset, device, repeats=1 if not times or times[0] > 1e-3 else 100))
        if all(map(too_slow, taken.values())):
            break
    return {name: times[1:] for name, times in taken.items()}


def seconds_of(step: Step, reset: Callable[[], None], device: str, repeats: int) -> float:
    """Of one step. A GPU forgets gradients between repeats, which it does not wait for: it would add to them."""
    between = reset if torch.device(device).type != "cpu" else None
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        if between is not None:
            between()
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def summary(times: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else list(times) * 3
    return Timing(median, low, high)


def median_ratio(times: Sequence[float], of: Sequence[float]) -> float:
    """How many times longer one contender took than another: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(times, of))


def peak_of(step: Step, reset: Callable[[], None], device: str) -> int:
    """The bytes that a step has allocated at its peak, gradients included."""
    reset()
    return peak_bytes(step, device)
