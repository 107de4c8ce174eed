"""Causal language models of transformers whose forward with labels never makes logits."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..losses._common import IGNORED
from ..losses.linear import LinearCrossEntropyHead

OPTIONS = ("label_smoothing", "z_loss", "max_workspace_mb", "recompute", "backend")


def fuse_lm_head(model: Any, **options: Any) -> Any:
    """Makes a causal language model compute its loss from the hidden states, without logits; in place.

    The head becomes a :class:`~fused_losses.LinearCrossEntropyHead` with the same parameters, tied or not, under the
    same name: state_dict, ``save_pretrained`` and ``generate`` stay as they are, and so does a forward without
    labels. With labels, ``outputs.loss`` is fused, what the model does to its logits before the loss (a softcap, a
    scale) included, and ``outputs.logits`` is a :class:`DeferredLogits`, which becomes logits where they are used.

    Formula: ``cross_entropy(softcap(scale * head(h)), shifted labels)``, over ``num_items_in_batch`` if given

    Args:
        model: a transformers model with an ``nn.Linear`` head and the causal-LM loss: Llama, Qwen, GPT-2, Gemma, ...
        options: of the loss beside the model's own: ``label_smoothing``, ``z_loss``, ``max_workspace_mb``,
            ``recompute``, ``backend``.

    Returns:
        The model.

    Raises:
        TypeError: for a head that is no plain ``nn.Linear``, a loss that is not the causal-LM one, or an option that
            is no option of the loss.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import torch, fused_losses
        >>> config = LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=1)
        >>> model = fused_losses.fuse_lm_head(LlamaForCausalLM(config))
        >>> tokens = torch.arange(8).view(1, 8)
        >>> model(input_ids=tokens, labels=tokens).loss
        tensor(..., grad_fn=<...>)

    Source: ``ForCausalLMLoss`` of transformers.
    """
    _check_options(options)
    head = model.get_output_embeddings()
    if isinstance(head, LinearCrossEntropyHead):
        raise TypeError("the head of this model is fused already")
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"):
        raise TypeError(
            f"the head must be a plain nn.Linear without hooks, got {type(head).__name__}; call fuse_lm_head before "
            "anything that wraps, quantises or dispatches the model"
        )
    original = model.loss_function
    if getattr(original, "__name__", "") != "ForCausalLMLoss":
        raise TypeError(f"fuse_lm_head replaces the causal-LM loss, but model.loss_function is {original!r}")
    model.set_output_embeddings(DeferringHead.from_linear(head))
    model.loss_function = partial(causal_lm_loss, original=original, options=options)
    model.forward = ForwardWithoutLogits(model)
    return model


def _check_options(options: dict[str, Any]) -> None:
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise TypeError(f"fuse_lm_head takes the options {', '.join(OPTIONS)}; got {', '.join(unknown)}")


class DeferringHead(LinearCrossEntropyHead):
    """The head of a fused model: while that computes a loss, its call gives logits that are still to be made."""

    deferring_to: tuple[Any, ...] = ()  # the module to call later: this one, or what wraps it

    def __call__(self, input: Tensor, *arguments: Any, **options: Any) -> Any:
        if self.deferring_to and not arguments:
            return DeferredLogits(self.deferring_to[0], input)
        return super().__call__(input, *arguments, **options)


class ForwardWithoutLogits:
    """The forward of a fused model: defers its head where there are labels."""

    def __init__(self, model: Any):
        self.model = model
        self.inner: Callable[..., Any] | None = model.__dict__.get("forward")
        self.labels_at = list(self.__signature__.parameters).index("labels")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or partial(type(self.model).forward, self.model))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        labels = arguments[self.labels_at] if len(arguments) > self.labels_at else keywords.get("labels")
        if labels is None:
            return self._forward(*arguments, **keywords)
        outer = self.model.get_output_embeddings()
        head = _deferring_head(outer)
        head.deferring_to = (outer,)
        try:
            return self._forward(*arguments, **keywords)
        finally:
            head.deferring_to = ()

    def _forward(self, *arguments: Any, **keywords: Any) -> Any:
        if self.inner is not None:
            return self.inner(*arguments, **keywords)
        return type(self.model).forward(self.model, *arguments, **keywords)


def _deferring_head(module: Any) -> DeferringHead:
    """The head itself, or inside of what wraps it, as FSDP1 does."""
    if isinstance(module, DeferringHead):
        return module
    for inner in module.modules():
        if isinstance(inner, DeferringHead):
            return inner
    raise RuntimeError("the model's head was replaced after fuse_lm_head; call fuse_lm_head on it last")


def causal_lm_loss(
    logits: Any,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    *,
    original: Callable[..., Tensor],
    options: dict[str, Any],
    **rest: Any,
) -> Tensor:
    """The causal-LM loss of transformers, from logits that are still to be made."""
    if not isinstance(logits, DeferredLogits):
        warnings.warn(
            "this model computes with its logits before the loss in a way that fuse_lm_head does not know, so they "
            "are made and its own loss is used",
            stacklevel=2,
        )
        return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **rest)
    targets, normalizer = next_tokens(logits, labels, num_items_in_batch, ignore_index, shift_labels)
    return logits.cross_entropy(targets, ignore_index=ignore_index, normalizer=normalizer, **options)


def next_tokens(
    logits: Any,
    labels: Tensor | None,
    num_items_in_batch: Tensor | float | None,
    ignore_index: int,
    shift_labels: Tensor | None,
) -> tuple[Tensor, Tensor | float | None]:
    """Targets and denominator where the logits are: labels move by one place, unless somebody has moved them."""
    if shift_labels is None:
        if labels is None:
            raise ValueError("a causal-LM loss needs labels or shift_labels, got neither")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return shift_labels.to(logits.device), num_items_in_batch


class DeferredLogits:
    """Logits of hidden states that are made where somebody uses them, as a tensor, and not for the loss.

    What models do to logits is kept as numbers: ``x / divisor``, or ``factor * tanh(x / divisor)``.
    """

    def __init__(
        self,
        head: Any,  # a DeferringHead, or what wraps it
        hidden: Tensor,
        divisor: float = 1.0,
        factor: float | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.head, self.hidden, self.divisor, self.factor = head, hidden, divisor, factor
        device = hidden.device.type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.dtype = dtype or self.autocast or hidden.dtype
        self.device, self.shape = hidden.device, torch.Size((*hidden.shape[:-1], head.out_features))

    def cross_entropy(self, labels: Tensor, **options: Any) -> Tensor:
        """The loss in fp32 or wider, through the head's own call, where its weight is whole."""
        softcap, temperature = None, self.divisor
        if self.factor is not None:
            softcap, temperature = self.divisor, self.divisor / self.factor
        out_dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        return self.head(self.hidden, labels, softcap=softcap, temperature=temperature, out_dtype=out_dtype, **options)

    def materialize(self) -> Tensor:
        """The logits, as the model would have made them."""
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.head(self.hidden, None) / self.divisor  # with labels, were they None, it is not deferred
        logits = logits if self.factor is None else torch.tanh(logits) * self.factor
        return logits.to(self.dtype)

    def float(self) -> DeferredLogits:
        return self._with(dtype=torch.float32)

    def tanh(self) -> Any:
        return self._with(factor=1.0) if self.factor is None else self.materialize().tanh()

    def __mul__(self, other: Any) -> Any:
        if not _is_scale(other):
            return self.materialize() * other
        if self.factor is None:
            return self._with(divisor=self.divisor / other)
        return self._with(factor=self.factor * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if not _is_scale(other):
            return self.materialize() / other
        if self.factor is None:
            return self._with(divisor=self.divisor * other)
        return self._with(factor=self.factor / other)

    def _with(self, **changed: Any) -> DeferredLogits:
        kept = {"divisor": self.divisor, "factor": self.factor, "dtype": self.dtype}
        return DeferredLogits(self.head, self.hidden, **{**kept, **changed})

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialize()[index]

    def __getattr__(self, name: str) -> Any:
        # Only what a tensor has; and not while a copy of this object is still without its own attributes.
        if name.startswith("_") or not hasattr(Tensor, name) or "hidden" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.tanh and isinstance(arguments[0], cls):
            return arguments[0].tanh()
        made = tree_map_only(cls, cls.materialize, (arguments, keywords or {}))
        return function(*made[0], **made[1])


def _is_scale(number: Any) -> bool:
    return isinstance(number, (int, float)) and number > 0
