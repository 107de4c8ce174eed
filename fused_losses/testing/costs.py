"""What a loss costs beside the plain one, eager and under torch.compile, measured in turn."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from .case import Case, Loss, leaves
from .measure import forget_gradients, median_ratio, peak_of, rounds, step_of, summary

OURS, EAGER, COMPILED = "ours", "eager", "torch.compile"
SECONDS = 1.0  # for each sample and dtype, shared by the contenders


@dataclass(frozen=True)
class Cost:
    """What forward and backward of one contender cost on one sample in one dtype, or why it does not run."""

    sample: str
    dtype: torch.dtype
    contender: str
    seconds: float = math.nan  # the median of the rounds
    ratio: float = math.nan  # how many times as long as ours it takes: the median of the rounds' ratios
    peak: int = 0  # bytes that are allocated at the peak, gradients included
    failure: str = ""


def costs_of(case: Case, sample: str) -> list[Cost]:
    """The costs of a case, one for each contender; a compiler that is missing or fails says so in its own."""
    torch.compiler.reset()
    tensors, device = leaves(case.tensors, case.floating), str(case.tensors[0].device)
    makers = {
        OURS: lambda: case.loss,
        EAGER: lambda: case.reference,
        COMPILED: lambda: torch.compile(copy.deepcopy(case.reference)),
    }
    losses: dict[str, Loss] = {}
    failures: dict[str, str] = {}
    for name, make in makers.items():
        try:
            loss = make()
            step_of(loss, tensors, case.extras)()
            losses[name] = loss
        except Exception as error:  # whatever a contender raises is a finding
            failures[name] = described(error)
    steps = {name: step_of(loss, tensors, case.extras) for name, loss in losses.items()}
    reset = forget_gradients(losses.values(), tensors)
    taken = rounds(steps, reset=reset, device=device, seconds=SECONDS)

    def cost(name: str) -> Cost:
        if name in failures:
            return Cost(sample, case.dtype, name, failure=failures[name])
        ratio = median_ratio(taken[name], taken[OURS]) if OURS in taken else math.nan
        peak = peak_of(steps[name], reset, device)
        return Cost(sample, case.dtype, name, summary(taken[name]).median, ratio, peak)

    return [cost(name) for name in makers]


def described(error: Exception) -> str:
    """What an exception is, and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
