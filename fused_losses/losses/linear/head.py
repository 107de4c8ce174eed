"""A head that makes logits, or the loss of its logits without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cross_entropy import linear_cross_entropy


class LinearCrossEntropyHead(nn.Linear):
    """A linear layer that, called with labels too, gives the cross entropy of its output without making it.

    As a module of the model it holds the weight and computes the loss in one place, so that whatever shards, gathers
    or ties the weight (FSDP, DDP, ZeRO) finds both together. Parameters are named as in ``torch.nn.Linear``.

    Formula: ``head(h) = h @ weight.T + bias``; ``head(h, labels) = cross_entropy(head(h), labels)``

    Args:
        in_features, out_features, bias, device, dtype: as of ``torch.nn.Linear``.

    Shape:
        h ``(..., D)``; labels ``(...)`` class indices, or ``(..., C)`` probabilities.

    Returns:
        Logits ``(..., C)``; with labels, the loss of :func:`~fused_losses.functional.linear_cross_entropy`, whose
        options (``label_smoothing``, ``softcap``, ``normalizer``, ...) the call takes as keywords.

    Raises:
        TypeError: for options of a loss without labels.

    Example:
        >>> import torch, fused_losses
        >>> head = fused_losses.LinearCrossEntropyHead(16, 1000, bias=False)
        >>> hidden = torch.zeros(2, 3, 16)
        >>> head(hidden).shape
        torch.Size([2, 3, 1000])
        >>> head(hidden, torch.ones(2, 3).long())
        tensor(6.9078, grad_fn=<...>)

    Source: the layer of ``torch.nn.Linear``, the loss of ``torch.nn.functional.linear_cross_entropy``.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LinearCrossEntropyHead:
        """A head with the very parameters of a linear layer, so that what is tied stays tied."""
        meta = torch.device("meta")
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device=meta)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, input: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        if labels is not None:
            return linear_cross_entropy(input, self.weight, labels, linear_bias=self.bias, **options)
        if options:
            raise TypeError(f"{', '.join(options)} belong to the loss, which needs labels; got none")
        return super().forward(input)
