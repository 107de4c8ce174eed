"""The Learner: a training loop that is nothing but events, which callbacks fill."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class CancelFitException(Exception):
    """Ends the fit; ``cleanup_fit`` still runs."""


class CancelEpochException(Exception):
    """Ends the epoch; ``cleanup_epoch`` still runs."""


class CancelBatchException(Exception):
    """Ends the batch; ``cleanup_batch`` still runs."""


CANCEL: dict[str, type[Exception]] = {
    "fit": CancelFitException,
    "epoch": CancelEpochException,
    "batch": CancelBatchException,
}


class Callback:
    """Has a method ``name(learn)`` for every event that it takes part in; a lower ``order`` runs earlier."""

    order = 0


@dataclass
class DataLoaders:
    """The two loaders of a learner."""

    train: Any
    valid: Any = None


class Learner:
    """Trains a model with a loss, by callbacks.

    Events, each called as ``callback.<event>(learn)``: ``before_``, ``after_`` and ``cleanup_`` of ``fit``, ``epoch``
    and ``batch``; in a batch ``predict``, ``after_predict``, ``get_loss``, ``after_loss`` and, in training,
    ``backward``, ``after_backward``, ``step``, ``after_step``, ``zero_grad``. :class:`TrainCB` or
    :class:`AccelerateCB` has what a batch needs. A Cancel exception goes on at the end of what it names.

    Callbacks find and set: ``model``, ``dls``, ``loss_func``, ``opt``, ``dl``, ``batch``, ``preds``, ``loss``,
    ``epoch``, ``n_epochs``, ``iter``, ``training``.

    Args:
        model: a module.
        dls: has the loaders ``train`` and ``valid``, as :class:`DataLoaders` has.
        loss_func: from predictions, or predictions and targets, to a 0-d tensor; as a module it may have parameters,
            which are trained, and buffers.
        lr: handed to ``opt_func`` after the parameters.
        cbs: callbacks.
        opt_func: makes the optimizer of each fit.

    Example:
        >>> import torch, fused_losses
        >>> from fused_losses.integrations.learner import DataLoaders, Learner, MetricsCB, TrainCB
        >>> batches = [(torch.eye(4), torch.arange(4))] * 50
        >>> dls = DataLoaders(batches, batches[:1])
        >>> learn = Learner(torch.nn.Linear(4, 4), dls, fused_losses.CrossEntropyLoss(), lr=5.0)
        >>> metrics = MetricsCB(accuracy=lambda predictions, targets: predictions.argmax(1) == targets)
        >>> learn.fit(1, cbs=[TrainCB(), metrics])
        {'accuracy': ..., 'loss': ..., 'epoch': 0, 'train': 'train'}
        {'accuracy': '1.000', 'loss': ..., 'epoch': 0, 'train': 'eval'}

    Source: the protocol of the Learner that fast.ai's course "From deep learning foundations to Stable Diffusion"
    builds in its lessons, so that callbacks work in both.
    """

    def __init__(
        self,
        model: nn.Module,
        dls: Any,
        loss_func: Callable[..., torch.Tensor] = F.mse_loss,
        lr: float = 0.1,
        cbs: Any = (),
        opt_func: Callable[..., Any] = torch.optim.SGD,
    ):
        self.model, self.dls, self.loss_func, self.lr, self.opt_func = model, dls, loss_func, lr, opt_func
        self.cbs = _as_list(cbs)

    def fit(
        self, n_epochs: int = 1, train: bool = True, valid: bool = True, cbs: Any = (), lr: float | None = None
    ) -> None:
        """Trains and evaluates for this many epochs, with a new optimizer; ``cbs`` belong to this fit alone."""
        if valid and self.dls.valid is None:
            raise ValueError("there is no loader to evaluate on: set dls.valid, or call fit(valid=False)")
        added = _as_list(cbs)
        self.cbs += added
        try:
            self.n_epochs, self.epochs = n_epochs, range(n_epochs)
            self.opt = self.opt_func(self.model.parameters(), self.lr if lr is None else lr)
            add_loss_parameters(self)
            self._stage("fit", self._fit, train, valid)
        finally:
            for callback in added:
                self.cbs.remove(callback)

    def _fit(self, train: bool, valid: bool) -> None:
        for epoch in self.epochs:
            self.epoch = epoch
            if train:
                self.one_epoch(True)
            if valid:
                with torch.no_grad():
                    self.one_epoch(False)

    def one_epoch(self, training: bool) -> None:
        self.model.train(training)
        self.dl = self.dls.train if training else self.dls.valid
        self._stage("epoch", self._epoch)

    def _epoch(self) -> None:
        for index, batch in enumerate(self.dl):
            self.iter, self.batch = index, batch
            self._stage("batch", self._batch)

    def _batch(self) -> None:
        self.predict()
        self.callback("after_predict")
        self.get_loss()
        self.callback("after_loss")
        if self.training:
            self.backward()
            self.callback("after_backward")
            self.step()
            self.callback("after_step")
            self.zero_grad()

    def _stage(self, name: str, body: Callable[..., None], *arguments: Any) -> None:
        try:
            self.callback(f"before_{name}")
            body(*arguments)
            self.callback(f"after_{name}")
        except CANCEL[name]:
            pass
        finally:
            self.callback(f"cleanup_{name}")

    def callback(self, event: str) -> int:
        """Calls everyone who takes part in the event, and returns their number."""
        methods = [getattr(callback, event, None) for callback in sorted(self.cbs, key=attrgetter("order"))]
        methods = [method for method in methods if method is not None]
        for method in methods:
            method(self)
        return len(methods)

    # What a subclass may do by itself instead of a callback.
    def predict(self) -> None:
        self._needed("predict")

    def get_loss(self) -> None:
        self._needed("get_loss")

    def backward(self) -> None:
        self._needed("backward")

    def step(self) -> None:
        self._needed("step")

    def zero_grad(self) -> None:
        self._needed("zero_grad")

    def _needed(self, event: str) -> None:
        if self.callback(event) == 0:
            raise RuntimeError(f"no callback has {event}(learn); add TrainCB() or AccelerateCB() to cbs")

    @property
    def training(self) -> bool:
        return self.model.training

    def lr_find(self, start_lr: float = 1e-5, gamma: float = 1.3, max_mult: float = 3.0, max_epochs: int = 10) -> Any:
        """Raises the rate batch by batch until the loss does; returns the :class:`LRFinderCB` with both."""
        from .lr_finder import LRFinderCB

        finder = LRFinderCB(gamma, max_mult)
        self.fit(max_epochs, valid=False, cbs=finder, lr=start_lr)
        return finder


def cancelled(learn: Any, stage: str) -> Exception:
    """The exception by which this learner's own module cancels a stage, in whichever package it lives."""
    for kind in type(learn).__mro__:
        found = getattr(sys.modules[kind.__module__], f"Cancel{stage.title()}Exception", None)
        if found is not None:
            return found()
    raise TypeError(f"{type(learn).__name__} has no Cancel{stage.title()}Exception in its module")


def add_loss_parameters(learn: Any) -> None:
    """Lets the optimizer train what the loss has to learn too; learners make it of the model's parameters alone."""
    if not isinstance(learn.loss_func, nn.Module):
        return
    known = {id(parameter) for group in learn.opt.param_groups for parameter in group["params"]}
    missing = [p for p in learn.loss_func.parameters() if p.requires_grad and id(p) not in known]
    if missing:
        learn.opt.add_param_group({"params": missing})


def _as_list(callbacks: Any) -> list[Any]:
    return list(callbacks) if isinstance(callbacks, Iterable) else [callbacks] if callbacks is not None else []
