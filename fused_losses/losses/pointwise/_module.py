"""The forward that every pointwise module shares."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PointwiseModule(nn.Module):
    """``loss(input, target, *, sample_weight=None, normalizer=None)`` on top of a module's ``_loss``."""

    reduction: str
    backend: str | None

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        return self._loss(input, target, sample_weight=sample_weight, normalizer=normalizer)

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        raise NotImplementedError
