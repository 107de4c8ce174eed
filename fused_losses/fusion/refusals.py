"""Why a loss cannot be fused, and where it says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)


class CannotFuse(RuntimeError):
    """Why a loss cannot be fused, in words for its author."""


def location() -> str:
    """The line of the loss that is being run."""
    frame: Any = sys._getframe()
    for _ in range(frames_to_caller() - 1):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame.f_back is not None else ""


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
