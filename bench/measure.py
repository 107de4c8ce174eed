"""Times and memory of a step, measured so that contenders can be compared."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: the median and the quartiles around it."""

    median: float
    low: float
    high: float


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


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
            inner = 1 if not times or times[0] > 1e-3 else 100
            synchronize(device)
            start = time.perf_counter()
            for _ in range(inner):
                step()
            synchronize(device)
            times.append((time.perf_counter() - start) / inner)
        if all(map(too_slow, taken.values())):
            break
    return {name: times[1:] for name, times in taken.items()}


def summary(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Timing(median, low, high)


def import_overhead(rounds: int = 7) -> float:
    """The median seconds that importing fused_losses takes after torch, in fresh processes."""
    code = "import time, torch; t = time.perf_counter(); import fused_losses; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs)
