"""The callbacks that train: in plain torch, and through Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..accelerate import GlobalBatches, check_accelerator
from .core import Callback, add_loss_parameters


class DeviceCB(Callback):
    """Moves the model, the loss's buffers and parameters, and every batch to a device.

    Args:
        device: None is this machine's accelerator, or its CPU.
    """

    def __init__(self, device: torch.device | str | None = None):
        self.device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def before_fit(self, learn: Any) -> None:
        learn.model.to(self.device)
        if isinstance(learn.loss_func, nn.Module):
            learn.loss_func.to(self.device)

    def before_batch(self, learn: Any) -> None:
        learn.batch = tree_map(lambda leaf: leaf.to(self.device) if hasattr(leaf, "to") else leaf, learn.batch)


class TrainCB(Callback):
    """Predicts from a batch's first ``n_inp`` parts, hands the others to the loss as targets, and steps.

    ``self.loss`` and ``learn.loss`` are one thing, so a ``get_loss`` may set either.

    Args:
        n_inp: how many parts of a batch are inputs.
    """

    def __init__(self, n_inp: int = 1):
        self.n_inp = n_inp

    @property
    def loss(self) -> Tensor:
        return self._met().loss

    @loss.setter
    def loss(self, loss: Tensor) -> None:
        self._met().loss = loss

    def _met(self) -> Any:
        if "learn" not in vars(self):
            raise RuntimeError(
                f"{type(self).__name__} shares its loss with the learner, which it meets in before_fit: "
                "call super().before_fit(learn) where you override that"
            )
        return self.learn

    def before_fit(self, learn: Any) -> None:
        self.learn = learn
        add_loss_parameters(learn)
        learn.opt.zero_grad()  # what a fit that was cancelled left

    def predict(self, learn: Any) -> None:
        learn.preds = learn.model(*learn.batch[: self.n_inp])

    def get_loss(self, learn: Any) -> None:
        learn.loss = learn.loss_func(learn.preds, *learn.batch[self.n_inp :])

    def backward(self, learn: Any) -> None:
        learn.loss.backward()

    def step(self, learn: Any) -> None:
        learn.opt.step()

    def zero_grad(self, learn: Any) -> None:
        learn.opt.zero_grad()


class AccelerateCB(TrainCB):
    """Trains through Accelerate: devices, processes, mixed precision, gradient accumulation.

    Prepares model, optimizer and loaders; moves a loss's buffers to the device, and prepares a loss with parameters,
    so that processes agree on them. The last step of an epoch is divided by the batches it has.

    Args:
        n_inp: how many parts of a batch are inputs.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; None is what ``accelerate config`` says.
        count: from a batch, its number of targets. The loss then gets ``normalizer=`` (in training, of the global
            batch), so that its gradient is that of the mean over all targets of all processes and accumulation
            steps, as with :class:`~fused_losses.integrations.accelerate.GlobalBatches`.
        options: of ``accelerate.Accelerator``, for instance ``gradient_accumulation_steps``.

    Raises:
        ImportError: without accelerate.
        ValueError: for fp16 on a CPU.
        RuntimeError: where several processes were launched and each would train alone.

    Example:
        >>> import torch, fused_losses
        >>> from torch.utils.data import DataLoader
        >>> from fused_losses.integrations.learner import AccelerateCB, DataLoaders, Learner
        >>> loader = DataLoader(list(zip(torch.eye(4), torch.arange(4))), batch_size=1)
        >>> learn = Learner(torch.nn.Linear(4, 4), DataLoaders(loader), fused_losses.CrossEntropyLoss())
        >>> learn.fit(1, valid=False, cbs=AccelerateCB(gradient_accumulation_steps=2))
        >>> learn.loss
        tensor(..., grad_fn=<...>)
    """

    order = DeviceCB.order + 10

    def __init__(
        self,
        n_inp: int = 1,
        mixed_precision: str | None = None,
        count: Callable[[Any], Tensor | float] | None = None,
        **options: Any,
    ):
        super().__init__(n_inp)
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError('AccelerateCB needs accelerate: pip install "fused_losses[learner]"') from error
        # Without cpu=True, processes on a machine without a GPU would each train alone.
        options.setdefault("cpu", not torch.accelerator.is_available())
        self.acc = check_accelerator(Accelerator(mixed_precision=mixed_precision, **options))
        self.count = count
        self._accumulating = ExitStack()

    def before_fit(self, learn: Any) -> None:
        super().before_fit(learn)
        self.acc.free_memory()  # forgets the optimizer of the last fit, which clipping would unscale once more
        if isinstance(learn.loss_func, nn.Module):
            learn.loss_func.to(self.acc.device)
            if any(parameter.requires_grad for parameter in learn.loss_func.parameters()):
                learn.loss_func = self.acc.prepare(learn.loss_func)
        dls = learn.dls
        learn.model, learn.opt, dls.train, dls.valid = self.acc.prepare(learn.model, learn.opt, dls.train, dls.valid)
        dls.train = GlobalBatches(self.acc, dls.train, self.count)

    def before_batch(self, learn: Any) -> None:
        if learn.training:
            modules = [part for part in (learn.model, learn.loss_func) if isinstance(part, nn.Module)]
            self._accumulating.enter_context(self.acc.accumulate(*modules))

    @property
    def normalizer(self) -> Tensor | float | None:
        """What the loss of the batch at hand divides its sum by, where there is a ``count``."""
        if self.count is None:
            return None
        if self.learn.training:
            return self.learn.dls.train.normalizer
        return torch.as_tensor(self.count(self.learn.batch)).clamp(min=1)

    def get_loss(self, learn: Any) -> None:
        extras = {} if self.count is None else {"normalizer": self.normalizer}
        learn.loss = learn.loss_func(learn.preds, *learn.batch[self.n_inp :], **extras)

    def backward(self, learn: Any) -> None:
        self.acc.backward(learn.loss)

    def cleanup_batch(self, learn: Any) -> None:
        self._accumulating.close()

    def cleanup_epoch(self, learn: Any) -> None:
        if not self.acc.sync_gradients:  # cancelled between two steps
            self.acc.sync_gradients = True
            learn.opt.zero_grad()

    def cleanup_fit(self, learn: Any) -> None:
        if isinstance(learn.dls.train, GlobalBatches):
            learn.dls.train = learn.dls.train.loader


class AccelerateCustomCB(AccelerateCB):
    """:class:`AccelerateCB` for losses of the predictions alone, and the pattern for a loss call of your own.

    Example:
        >>> class WithTwoTargets(AccelerateCustomCB):
        ...     def get_loss(self, learn):
        ...         self.loss = learn.loss_func(learn.preds, *learn.batch[1:]) + learn.preds.square().mean()
    """

    def get_loss(self, learn: Any) -> None:
        self.loss = learn.loss_func(learn.preds)

    def backward(self, learn: Any) -> None:
        self.acc.backward(self.loss)
