"""The causal-LM loss of logits where transformers' Trainer and its models take one."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from ..functional import cross_entropy
from ..losses._common import IGNORED
from .transformers import next_tokens


class CausalLMLoss:
    """The loss of a causal language model, for ``Trainer(compute_loss_func=...)`` or as ``model.loss_function``.

    Labels move by one place to the left, unless there are ``shift_labels``, as context parallelism and collators
    without padding make them. The loss is divided by ``num_items_in_batch``, which Trainer counts over all
    accumulated batches and processes. As a loss of logits it needs them in memory; :func:`~fused_losses.fuse_lm_head`
    does not, and takes nothing of this.

    Formula: ``cross_entropy(logits, shifted labels)``, over ``num_items_in_batch`` if given

    Args:
        label_smoothing, z_loss, softcap, temperature, backend: as of :class:`~fused_losses.CrossEntropyLoss`.

    Shape:
        Called as ``loss(outputs, labels, num_items_in_batch=None)`` with the outputs of a model, or as
        ``loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, ...)`` with
        logits ``(..., L, C)`` and labels ``(..., L)``. Further keywords are a model's own and change nothing.

    Returns:
        A 0-d tensor in float32 or wider that may be changed in place.

    Raises:
        ValueError: without labels.

    A warning says, once, that Trainer ignores its ``label_smoothing_factor`` beside a ``compute_loss_func``.

    Example:
        >>> from fused_losses.integrations.trainer import CausalLMLoss
        >>> import torch
        >>> loss = CausalLMLoss(label_smoothing=0.1)
        >>> loss({"logits": torch.zeros(2, 8, 100)}, torch.ones(2, 8).long(), num_items_in_batch=14)
        tensor(4.6052)

    Source: ``ForCausalLMLoss`` of transformers.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        backend: str | None = None,
    ):
        self.label_smoothing = label_smoothing
        self.options = {"z_loss": z_loss, "softcap": softcap, "temperature": temperature, "backend": backend}
        self.caller_checked = False

    def __call__(
        self,
        logits: Any,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **of_the_model: Any,
    ) -> Tensor:
        if not isinstance(logits, Tensor):
            self._check_caller(sys._getframe(1).f_locals.get("self"))
            logits = logits["logits"] if isinstance(logits, dict) else logits[0]
        targets, normalizer = next_tokens(logits, labels, num_items_in_batch, ignore_index, shift_labels)
        return cross_entropy(
            logits.flatten(0, -2),
            targets.flatten(),
            ignore_index=ignore_index,
            label_smoothing=self.label_smoothing,
            normalizer=normalizer,
            out_dtype=torch.promote_types(logits.dtype, torch.float32),
            **self.options,
        )

    def _check_caller(self, trainer: Any) -> None:
        """Trainer gives its loss function no settings, so those of the caller are looked at, once."""
        if self.caller_checked:
            return
        self.caller_checked = True
        factor = getattr(getattr(trainer, "args", None), "label_smoothing_factor", 0.0)
        if factor not in (0.0, self.label_smoothing):
            warnings.warn(
                f"Trainer ignores label_smoothing_factor={factor} where it has a compute_loss_func, whose own "
                f"label_smoothing is {self.label_smoothing}; use CausalLMLoss(label_smoothing={factor}) instead",
                stacklevel=3,
            )
