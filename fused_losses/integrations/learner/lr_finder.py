"""The callback that looks for a learning rate."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .core import Callback, cancelled
from .curve import pyplot
from .metrics import accelerator_of


class LRFinderCB(Callback):
    """Raises the rate after every step until the loss is ``max_mult`` times its minimum, then ends the fit.

    ``rates`` and ``losses`` hold what was seen, one entry a step; ``plot()`` shows them. The model and the loss are
    put back as they were.
    Reads the loss of every batch, and so waits for a GPU.

    Args:
        gamma: factor of the rate from step to step.
        max_mult: when to end.
        max_lr: ends the fit too, for a loss that does not rise.

    Example:
        >>> import torch, fused_losses
        >>> from fused_losses.integrations.learner import DataLoaders, Learner, TrainCB
        >>> batches = [(torch.eye(4), torch.arange(4))] * 100
        >>> learn = Learner(torch.nn.Linear(4, 4), DataLoaders(batches), fused_losses.CrossEntropyLoss(), cbs=TrainCB())
        >>> finder = learn.lr_find()
        >>> len(finder.rates) == len(finder.losses) > 10
        True
    """

    def __init__(self, gamma: float = 1.3, max_mult: float = 3.0, max_lr: float = 10.0):
        self.gamma, self.max_mult, self.max_lr = gamma, max_mult, max_lr

    def before_fit(self, learn: Any) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        modules = [part for part in (learn.model, learn.loss_func) if isinstance(part, nn.Module)]
        self._found = [(module, copy.deepcopy(module.state_dict())) for module in modules]
        self.accelerator = accelerator_of(learn)

    def after_batch(self, learn: Any) -> None:
        if not learn.training:
            raise cancelled(learn, "epoch")
        loss = learn.loss.detach()
        if self.accelerator is not None:
            if not self.accelerator.sync_gradients:
                return
            loss = self.accelerator.reduce(loss, "mean")  # processes have to end at the same batch
        self.rates.append(learn.opt.param_groups[0]["lr"])
        self.losses.append(loss.item())
        smallest = min(self.losses)
        if not self.losses[-1] <= smallest + (self.max_mult - 1) * abs(smallest):  # NaN ends it too
            raise cancelled(learn, "fit")
        for group in learn.opt.param_groups:
            group["lr"] *= self.gamma
        if learn.opt.param_groups[0]["lr"] > self.max_lr:
            raise cancelled(learn, "fit")

    def cleanup_fit(self, learn: Any) -> None:
        for module, state in self._found:
            module.load_state_dict(state)

    def plot(self) -> Any:
        """Draws the loss over the rate; returns the axes."""
        _, axes = pyplot().subplots()
        axes.plot(self.rates, self.losses)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        return axes
