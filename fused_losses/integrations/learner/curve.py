"""A curve of the loss that grows while training runs."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REDRAW_SECONDS = 1.0


class LossCurve:
    """The loss of every training batch, drawn at most once a second where a person sees it."""

    def __init__(self, target: bool | str | Path):
        self.losses: list[float] = []
        self.pending: list[Tensor] = []  # not read yet, for reading waits for a GPU
        self.drawn = time.monotonic()
        self.figure, self.axes = pyplot().subplots(figsize=(6, 3), layout="constrained")
        self.axes.set(xlabel="batch", ylabel="loss")
        (self.line,) = self.axes.plot([])
        self.show = _display(self.figure, target)

    def add(self, loss: Tensor) -> None:
        self.pending.append(loss)
        if time.monotonic() - self.drawn >= REDRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        if self.pending:
            self.losses += torch.stack(self.pending).tolist()
            self.pending.clear()
        self.line.set_data(range(len(self.losses)), self.losses)
        self.axes.relim()
        self.axes.autoscale_view()
        self.show()
        self.drawn = time.monotonic()


def pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('curves need matplotlib: pip install "fused_losses[learner]"') from error
    return pyplot


def _display(figure: Any, target: bool | str | Path) -> Callable[[], Any]:
    """How to show the figure as it is now: in a file, in a notebook, in a window."""
    window = figure.canvas.required_interactive_framework is not None
    if target is True and window and not _in_notebook():
        figure.show()
        return lambda: (figure.canvas.draw_idle(), figure.canvas.flush_events())
    pyplot().close(figure)  # else a notebook would show it once more
    if target is not True:
        return lambda: figure.savefig(target)
    if not _in_notebook():
        raise RuntimeError(
            f"plot=True finds no notebook, and no window with matplotlib's backend {pyplot().get_backend()}; "
            'plot="loss.png" writes the curve to a file'
        )
    ipython = import_module("IPython.display")
    handle = ipython.display(ipython.Image(_png(figure)), display_id=True)
    return lambda: handle.update(ipython.Image(_png(figure)))


def _in_notebook() -> bool:
    # Whoever runs in a notebook has imported IPython.
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
