"""Why a loss cannot be fused, and where it says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_DISTRIBUTIONS = str(Path(_TORCH) / "distributions")


class CannotFuse(RuntimeError):
    """Why a loss cannot be fused, in words for its author."""


def refused(reason: str, where: str | None = None) -> CannotFuse:
    """A reason with the place it is about: the line of the loss that is being run, unless another is given."""
    where = location() if where is None else where
    return CannotFuse(f"{reason} ({where})" if where else reason)


def location() -> str:
    """The line of the loss that is being run."""
    frame: Any = sys._getframe()
    for _ in range(frames_to_caller() - 1):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame.f_back is not None else ""


def on_reading() -> str:
    """Why a loss that reads a value cannot be fused, and what it can do without."""
    frame: Any = sys._getframe()
    for _ in range(frames_to_caller() - 1):
        if frame.f_code.co_filename.startswith(_DISTRIBUTIONS):
            return (
                "torch.distributions reads what it is given, to check it; pass validate_args=False, or call "
                "torch.distributions.Distribution.set_default_validate_args(False)"
            )
        frame = frame.f_back
    return (
        "it reads the value of a tensor (.item(), bool(), int(), or an if on a tensor); torch.where chooses without, "
        "and .detach() keeps a number for a log"
    )


def is_asked_by_torch() -> bool:
    """Whether it is code of torch's that asks a number, rather than a loss or this package."""
    frame: Any = sys._getframe(2)  # past the number
    while frame.f_globals["__name__"] == "torch":  # what Python's operators on numbers are
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(_TORCH)


def frames_to_caller() -> int:
    """How many frames up is the first outside torch and this package, counted as warnings do."""
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _PACKAGE)):
        frame, count = frame.f_back, count + 1
    return count
