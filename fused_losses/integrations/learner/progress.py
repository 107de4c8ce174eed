"""The callback that shows a fit: a bar for each epoch, the metrics below each other, and the loss as a curve."""

from __future__ import annotations

from operator import length_hint
from pathlib import Path
from typing import Any

from .core import Callback
from .curve import LossCurve
from .metrics import MetricsCB, accelerator_of


class ProgressCB(Callback):
    """A progress bar in terminals and notebooks, the lines of :class:`MetricsCB`, and a curve of the loss if asked for.

    The bar reads the loss when it is drawn, ten times a second, and not after every batch. Of several processes, the
    first shows.

    Args:
        plot: True draws the curve while training runs, below a notebook's cell or in a window; a path writes it to
            that file instead, once a second.

    Raises:
        ImportError: without tqdm, or for a plot without matplotlib.
        RuntimeError: for ``plot=True`` where there is neither a notebook nor a window.

    Example:
        >>> ProgressCB(plot="loss.png").order > MetricsCB.order
        True
    """

    order = MetricsCB.order + 1

    def __init__(self, plot: bool | str | Path = False):
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError('ProgressCB needs tqdm: pip install "fused_losses[learner]"') from error
        self.tqdm, self.plot = tqdm, plot
        self.bar = tqdm(disable=True)

    def before_fit(self, learn: Any) -> None:
        accelerator = accelerator_of(learn)
        self.hidden = accelerator is not None and not accelerator.is_main_process
        self.curve = LossCurve(self.plot) if self.plot and not self.hidden else None
        self.header: list[str] = []
        if hasattr(learn, "metrics"):
            learn.metrics._log = self._log

    def before_epoch(self, learn: Any) -> None:
        stage = "train" if learn.training else "eval"
        self.bar = self.tqdm(
            total=length_hint(learn.dl) or None,
            desc=f"epoch {learn.epoch + 1}/{learn.n_epochs} {stage}",
            leave=False,
            disable=self.hidden,
        )

    def after_batch(self, learn: Any) -> None:
        if self.bar.update():
            self.bar.set_postfix(loss=f"{learn.loss.item():.3f}", refresh=False)
        if self.curve is not None and learn.training:
            self.curve.add(learn.loss.detach())

    def after_epoch(self, learn: Any) -> None:
        if self.curve is not None:
            self.curve.draw()

    def cleanup_epoch(self, learn: Any) -> None:
        self.bar.close()

    def _log(self, line: dict[str, Any]) -> None:
        if list(line) != self.header:
            self.header = list(line)
            self.tqdm.write(_row(self.header))
        self.tqdm.write(_row(line.values()))


def _row(cells: Any) -> str:
    return "  ".join(f"{cell!s:>9}" for cell in cells)
