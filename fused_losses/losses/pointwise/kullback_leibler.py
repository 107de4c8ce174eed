"""The Kullback-Leibler divergence of log-probabilities from a target distribution, element by element."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .._common import check_tensors, is_small, reduction_name
from ._function import pointwise_loss
from ._module import PointwiseModule


class KLDivLoss(PointwiseModule, nn.KLDivLoss):
    """Kullback-Leibler divergence, a drop-in for :class:`torch.nn.KLDivLoss`.

    Formula: ``t (log t - x)``, and 0 for ``t = 0``; with ``log_target``, ``exp(t) (t - x)``

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"batchmean"`` (the sum divided by the input's first size: the divergence itself),
            ``"mean"`` (by the number of elements, with torch's warning) or ``"sum"``; read at call time.
        log_target: whether the target holds log-probabilities, as the input does.
        backend: a backend by name; None chooses automatically.

    Shape:
        input ``(*)``, log-probabilities, and target ``(*)``, probabilities, float64, float32, bfloat16 or float16;
        other shapes broadcast. Called as ``loss(input, target, *, sample_weight=None, normalizer=None)`` as in
        :class:`~fused_losses.MSELoss`; ``normalizer`` replaces the denominator of ``"batchmean"`` and of ``"mean"``,
        which are then the same and warn of nothing.

    Returns:
        A 0-d tensor, or the input's shape for ``"none"``, in the input's dtype (float32 under autocast). A negative
        target gives NaN, as does the target's gradient where the target is 0.

    Raises:
        ValueError: for an unknown reduction, or a normalizer of ``"none"`` or ``"sum"``.
        RuntimeError: for tensors that are not floating, on different devices or of shapes that do not broadcast.

    Example:
        >>> import torch, fused_losses
        >>> input, target = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]])
        >>> fused_losses.KLDivLoss(reduction="batchmean")(input, target)
        tensor(0.1308)

    Source: :class:`torch.nn.KLDivLoss`.
    """

    def __init__(
        self,
        size_average=None,
        reduce=None,
        reduction: str = "mean",
        log_target: bool = False,
        *,
        backend: str | None = None,
    ):
        super().__init__(size_average, reduce, reduction, log_target)
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return kl_div(
            input, target, reduction=self.reduction, log_target=self.log_target, backend=self.backend, **extras
        )


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    **extras: Any,
) -> Tensor:
    """Kullback-Leibler divergence; see :class:`KLDivLoss`.

    Example:
        >>> import torch, fused_losses
        >>> input, target = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25])
        >>> fused_losses.functional.kl_div(input, target, reduction="sum")
        tensor(0.1308)
    """
    _check_floating(input, target)
    formula = "kl_div_log_target" if log_target else "kl_div"
    if reduction == "batchmean":
        # The deprecated arguments replace the sum, but not the division: torch's way.
        summed = reduction_name(size_average, reduce, "sum")
        return _batchmean(formula, input, target, summed, **extras)
    if reduction == "mean" and size_average is None and reduce is None and extras.get("normalizer") is None:
        _warn_mean()
    reduction = reduction_name(size_average, reduce, reduction)
    return pointwise_loss(formula, input, target, reduction=reduction, **extras)


def _batchmean(
    formula: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    normalizer: Tensor | float | None = None,
    **extras: Any,
) -> Tensor:
    rows = input.shape[0] if input.dim() > 0 else 1
    if normalizer is None and (reduction != "sum" or is_small(input, extras.get("backend"))):
        return pointwise_loss(formula, input, target, reduction=reduction, **extras) / rows
    # The sum stays in fp32 or wider until it is divided.
    normalizer = rows if normalizer is None else normalizer
    return pointwise_loss(formula, input, target, reduction="mean", normalizer=normalizer, **extras)


def _check_floating(input: Tensor, target: Tensor) -> None:
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        check_tensors(input=input, target=target, optional={})
    if not input.is_floating_point():
        raise RuntimeError(f"input must be floating, got {input.dtype}; convert it: input.float()")
    if not target.is_floating_point():
        raise RuntimeError(f"target must be floating, got {target.dtype}; convert it: target.to(input.dtype)")


def _warn_mean() -> None:
    if torch.compiler.is_compiling():
        return  # a graph holds no warning
    warnings.warn(
        "reduction: 'mean' divides the total loss by the number of elements, which is not the divergence; "
        "use reduction='batchmean', which divides by the number of rows, as torch's 'mean' is announced to do.",
        stacklevel=3,
    )
