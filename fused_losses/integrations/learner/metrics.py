"""The callback that keeps count: the loss and metrics of every epoch, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..accelerate import real_samples
from .core import Callback


class MetricsCB(Callback):
    """Logs the mean loss and metrics at the end of every epoch; ``history`` keeps the numbers of a fit.

    Over several processes, metrics get the predictions and targets of all of them, and every sample of an evaluation
    counts once, also where Accelerate repeats samples to fill up the last batch. The loss of a training epoch is that
    of the batches that were trained on. Nothing of it waits for a GPU before the epoch ends.

    Args:
        metrics: objects with ``reset()``, ``update(predictions, *targets)`` and ``compute()`` as torcheval and
            torchmetrics have, or functions of predictions and targets, whose value, one or one per sample, is
            averaged over samples; known by their names.
        named: the same, under names of your choice.

    Example:
        >>> MetricsCB(accuracy=lambda predictions, targets: predictions.argmax(1) == targets).history
        []
    """

    def __init__(self, *metrics: Any, **named: Any):
        unnamed = {getattr(metric, "__name__", type(metric).__name__): metric for metric in metrics}
        self.metrics = {
            name: metric if hasattr(metric, "update") else Average(metric)
            for name, metric in {**unnamed, **named}.items()
        }
        self.history: list[dict[str, Any]] = []

    def before_fit(self, learn: Any) -> None:
        learn.metrics = self
        self.history = []
        self.training_callback = next((callback for callback in learn.cbs if hasattr(callback, "n_inp")), None)
        self.accelerator = accelerator_of(learn)

    def before_epoch(self, learn: Any) -> None:
        self.total: Any = 0.0
        self.weight: Any = 0.0
        for metric in self.metrics.values():
            metric.reset()

    @torch.no_grad()
    def after_batch(self, learn: Any) -> None:
        size = samples = batch_size(learn.batch)
        if self.accelerator is not None and not learn.training:
            samples = real_samples(self.accelerator, size)
        if samples == size:
            self._add_loss(learn, size)
        elif samples > 0:
            with only_first(learn, samples):
                learn.get_loss()
                self._add_loss(learn, samples)
        if self.metrics:
            self._update_metrics(tree_map_only(Tensor, Tensor.detach, learn.preds), self._targets(learn))

    def _add_loss(self, learn: Any, samples: int) -> None:
        # A loss with a normalizer is a sum over it, and the normalizers of all batches add up to the targets.
        normalizer = getattr(self.training_callback, "normalizer", None)
        weight = samples if normalizer is None else normalizer
        self.total = self.total + learn.loss.detach().double() * weight
        self.weight = self.weight + weight

    def _targets(self, learn: Any) -> Sequence[Any]:
        if not isinstance(learn.batch, Sequence):
            return (learn.batch,)
        return learn.batch[getattr(self.training_callback, "n_inp", 1) :]

    def _update_metrics(self, predictions: Any, targets: Sequence[Any]) -> None:
        if self.accelerator is not None:
            predictions, targets = self.accelerator.gather_for_metrics((predictions, targets))
        for metric in self.metrics.values():
            metric.update(predictions, *targets)

    def after_epoch(self, learn: Any) -> None:
        values = {name: metric.compute() for name, metric in self.metrics.items()}
        values["loss"] = self._mean_loss()
        where = {"epoch": learn.epoch, "train": "train" if learn.training else "eval"}
        self.history.append({**{name: float(value) for name, value in values.items()}, **where})
        if self.accelerator is None or self.accelerator.is_main_process:
            self._log({**{name: f"{value:.3f}" for name, value in values.items()}, **where})

    def _mean_loss(self) -> float:
        device = None if self.accelerator is None else self.accelerator.device
        sums = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=device) for s in (self.total, self.weight)])
        if self.accelerator is not None:
            sums = self.accelerator.reduce(sums, "sum")
        total, weight = sums.tolist()
        return total / weight if weight else float("nan")

    def _log(self, line: dict[str, Any]) -> None:
        """Replaced by callbacks that show lines elsewhere, under this name in other learners too."""
        print(line)


class Average:
    """The mean over samples of a function of predictions and targets."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.reset()

    def reset(self) -> None:
        self.total: Any = 0.0
        self.samples = 0

    def update(self, predictions: Any, *targets: Any) -> None:
        samples = batch_size(predictions)
        value = torch.as_tensor(self.function(predictions, *targets))
        self.total = self.total + value.double().mean() * samples
        self.samples += samples

    def compute(self) -> float:
        return float(self.total) / self.samples if self.samples else float("nan")


def accelerator_of(learn: Any) -> Any:
    """The Accelerator that this learner trains through, if there is one."""
    return next((callback.acc for callback in learn.cbs if hasattr(callback, "acc")), None)


def batch_size(batch: Any) -> int:
    """The length of a batch's first tensor."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0)


@contextmanager
def only_first(learn: Any, samples: int) -> Iterator[None]:
    """The learner's batch, predictions and loss, cut to the first samples while the block runs."""
    from accelerate.utils import recursively_apply

    kept = learn.batch, learn.preds, learn.loss
    cut = lambda tensor: tensor[:samples] if tensor.ndim else tensor
    learn.batch, learn.preds = recursively_apply(cut, kept[:2])
    try:
        yield
    finally:
        learn.batch, learn.preds, learn.loss = kept
