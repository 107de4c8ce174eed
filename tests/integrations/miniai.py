"""A stand-in with the protocol of the learner in fast.ai's miniai, which no package index has.

What differs from ours and what callbacks may rely on there: the five steps of a batch are looked up by name, callbacks
are called as bound methods, the learner has Cancel exceptions of its own, and progress bars take the place of
``learn.dl`` and ``learn.epochs``.
"""

from functools import partial

import torch

STEPS = ("predict", "get_loss", "backward", "step", "zero_grad")


class CancelFitException(Exception):
    pass


class CancelEpochException(Exception):
    pass


class CancelBatchException(Exception):
    pass


class Learner:
    def __init__(self, model, dls, loss_func, lr=0.1, cbs=None, opt_func=torch.optim.SGD):
        self.model, self.dls, self.loss_func, self.lr, self.opt_func = model, dls, loss_func, lr, opt_func
        self.cbs = list(cbs or [])

    def __getattr__(self, name):
        if name in STEPS:
            return partial(self.callback, name)
        raise AttributeError(name)

    @property
    def training(self):
        return self.model.training

    def callback(self, event):
        for callback in sorted(self.cbs, key=lambda callback: callback.order):
            method = getattr(callback, event, None)
            if method is not None:
                assert method.__self__ is callback
                method(self)

    def within(self, stage, cancel, body):
        try:
            self.callback(f"before_{stage}")
            body()
            self.callback(f"after_{stage}")
        except cancel:
            pass
        finally:
            self.callback(f"cleanup_{stage}")

    def fit(self, n_epochs=1, train=True, valid=True, cbs=None, lr=None):
        added = list(cbs or [])
        self.cbs.extend(added)
        self.n_epochs, self.epochs = n_epochs, range(n_epochs)
        self.opt = self.opt_func(self.model.parameters(), lr or self.lr)
        try:
            self.within("fit", CancelFitException, lambda: self.all_epochs(train, valid))
        finally:
            self.cbs = [callback for callback in self.cbs if callback not in added]

    def all_epochs(self, train, valid):
        for epoch in self.epochs:
            self.epoch = epoch
            for training in [True] * train + [False] * valid:
                self.model.train(training)
                self.dl = self.dls.train if training else self.dls.valid
                with torch.set_grad_enabled(training):
                    self.within("epoch", CancelEpochException, self.all_batches)

    def all_batches(self):
        for index, batch in enumerate(self.dl):
            self.iter, self.batch = index, batch
            self.within("batch", CancelBatchException, self.one_batch)

    def one_batch(self):
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


class MetricsCB:
    """Reads the learner's batch, predictions and loss on the CPU after every batch; lines go through ``_log``."""

    order = 0

    def __init__(self):
        self.lines = []
        self._log = self.lines.append

    def before_fit(self, learn):
        learn.metrics = self

    def before_epoch(self, learn):
        self.right = self.loss = self.samples = 0.0

    def after_batch(self, learn):
        inputs, targets, *_ = (part.detach().cpu() for part in learn.batch)
        self.right += (learn.preds.detach().cpu().argmax(1) == targets).sum().item()
        self.loss += learn.loss.detach().cpu().item() * len(inputs)
        self.samples += len(inputs)

    def after_epoch(self, learn):
        train = "train" if learn.model.training else "eval"
        accuracy, loss = (f"{total / self.samples:.3f}" for total in (self.right, self.loss))
        self._log({"accuracy": accuracy, "loss": loss, "epoch": learn.epoch, "train": train})


class Bar:
    """Goes through a loader or the epochs, with a comment beside it."""

    comment = ""

    def __init__(self, items):
        self.items, self.total = items, len(items)

    def __iter__(self):
        return iter(self.items)


class ProgressCB:
    order = MetricsCB.order + 1

    def __init__(self):
        self.lines = []

    def before_fit(self, learn):
        learn.epochs = Bar(learn.epochs)
        learn.metrics._log = self.lines.append

    def before_epoch(self, learn):
        learn.dl = Bar(learn.dl)

    def after_batch(self, learn):
        learn.dl.comment = f"{learn.loss:.3f}"
