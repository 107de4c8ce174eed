"""Regression losses: functions of the difference of prediction and target."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._common import reduction_name
from ._function import pointwise_loss
from ._module import PointwiseModule


class MSELoss(PointwiseModule, nn.MSELoss):
    """Mean squared error, a drop-in for :class:`torch.nn.MSELoss`.

    Formula: ``(x - t)^2``

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``; read at call time.
        backend: a backend by name; None chooses automatically.

    Shape:
        input and target ``(*)``, float64, float32, bfloat16 or float16; other shapes broadcast with torch's
        warning. Called as ``loss(input, target, *, sample_weight=None, normalizer=None)``: ``sample_weight``
        broadcasts to the input and multiplies each element's loss, ``normalizer`` (number or 0-d tensor)
        replaces the number of elements as the denominator of ``"mean"``.

    Returns:
        A 0-d tensor, or the input's shape for ``"none"``, in the input's dtype (float32 under autocast).

    Raises:
        ValueError: for an unknown reduction, or a normalizer without ``reduction="mean"``.
        RuntimeError: for tensors on different devices or of shapes that do not broadcast.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.MSELoss()(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor(2.5000)

    Source: :class:`torch.nn.MSELoss`.
    """

    def __init__(self, size_average=None, reduce=None, reduction: str = "mean", *, backend: str | None = None):
        super().__init__(size_average, reduce, reduction)
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction, backend=self.backend, **extras)


class L1Loss(PointwiseModule, nn.L1Loss):
    """Mean absolute error, a drop-in for :class:`torch.nn.L1Loss`.

    Formula: ``|x - t|``; the derivative at 0 is 0.

    Args, shapes, result and errors are those of :class:`MSELoss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.L1Loss()(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor(1.5000)

    Source: :class:`torch.nn.L1Loss`.
    """

    def __init__(self, size_average=None, reduce=None, reduction: str = "mean", *, backend: str | None = None):
        super().__init__(size_average, reduce, reduction)
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return l1_loss(input, target, reduction=self.reduction, backend=self.backend, **extras)


class SmoothL1Loss(PointwiseModule, nn.SmoothL1Loss):
    """Squared near zero and absolute beyond ``beta``, a drop-in for :class:`torch.nn.SmoothL1Loss`.

    Formula: ``d^2 / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``, with ``d = x - t``

    Args:
        size_average, reduce, reduction, backend: as in :class:`MSELoss`.
        beta: where the loss turns from squared to absolute, at least 0 (0 is :class:`L1Loss`).

    Shapes, result and errors are those of :class:`MSELoss`; a negative ``beta`` raises RuntimeError.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.SmoothL1Loss()(torch.tensor([0.5, 2.0]), torch.tensor([0.0, 0.0]))
        tensor(0.8125)

    Source: :class:`torch.nn.SmoothL1Loss`.
    """

    def __init__(
        self,
        size_average=None,
        reduce=None,
        reduction: str = "mean",
        beta: float = 1.0,
        *,
        backend: str | None = None,
    ):
        super().__init__(size_average, reduce, reduction, beta)
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta, backend=self.backend, **extras)


class HuberLoss(PointwiseModule, nn.HuberLoss):
    """Squared near zero and linear beyond ``delta``, a drop-in for :class:`torch.nn.HuberLoss`.

    Formula: ``d^2 / 2`` where ``|d| <= delta``, else ``delta (|d| - delta / 2)``, with ``d = x - t``

    Args:
        reduction, backend: as in :class:`MSELoss`.
        delta: where the loss turns from squared to linear, above 0.

    Shapes, result and errors are those of :class:`MSELoss`; ``delta`` of 0 or less raises RuntimeError.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.HuberLoss(delta=0.5)(torch.tensor([0.5, 2.0]), torch.tensor([0.0, 0.0]))
        tensor(0.5000)

    Source: :class:`torch.nn.HuberLoss`.
    """

    def __init__(self, reduction: str = "mean", delta: float = 1.0, *, backend: str | None = None):
        super().__init__(reduction, delta)
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta, backend=self.backend, **extras)


class LogCoshLoss(PointwiseModule):
    """Logarithm of the hyperbolic cosine of the error: squared near zero, absolute far away, smooth between.

    Formula: ``log cosh d = |d| + log(1 + exp(-2 |d|)) - log 2``, with ``d = x - t``; its derivative is
    ``tanh d``.

    Args:
        reduction, backend: as in :class:`MSELoss`.

    Shapes, result and errors are those of :class:`MSELoss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.LogCoshLoss()(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor(0.8794)

    Source: ``keras.losses.LogCosh``.
    """

    def __init__(self, reduction: str = "mean", *, backend: str | None = None):
        super().__init__()
        self.reduction = reduction
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return log_cosh_loss(input, target, reduction=self.reduction, backend=self.backend, **extras)


class CharbonnierLoss(PointwiseModule):
    """A differentiable absolute error, common in image restoration.

    Formula: ``sqrt((x - t)^2 + eps)``

    Args:
        reduction, backend: as in :class:`MSELoss`.
        eps: rounds the corner at 0, above 0.

    Shapes, result and errors are those of :class:`MSELoss`; ``eps`` of 0 or less raises ValueError.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.CharbonnierLoss(eps=9.0)(torch.tensor([4.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor(4.)

    Source: ``CharbonnierLoss`` of BasicSR and MMagic (the default ``eps`` is theirs).
    """

    def __init__(self, reduction: str = "mean", eps: float = 1e-12, *, backend: str | None = None):
        super().__init__()
        self.reduction = reduction
        self.eps = eps
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return charbonnier_loss(input, target, reduction=self.reduction, eps=self.eps, backend=self.backend, **extras)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    **extras: Any,
) -> Tensor:
    """Mean squared error; see :class:`MSELoss`.

    Args:
        weight: of the input's shape; multiplies each element's loss, and ``"mean"`` divides by its sum.
        extras: ``sample_weight``, ``normalizer`` and ``backend``, keyword-only, as in :class:`MSELoss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.mse_loss(torch.tensor([3.0]), torch.tensor([1.0]), reduction="none")
        tensor([4.])
    """
    reduction = reduction_name(size_average, reduce, reduction)
    return _weighted_mean("mse", input, target, weight, reduction, **extras)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    **extras: Any,
) -> Tensor:
    """Mean absolute error; see :class:`L1Loss`, and :func:`mse_loss` for the arguments.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.l1_loss(torch.tensor([3.0]), torch.tensor([1.0]), reduction="none")
        tensor([2.])
    """
    reduction = reduction_name(size_average, reduce, reduction)
    return _weighted_mean("l1", input, target, weight, reduction, **extras)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
    **extras: Any,
) -> Tensor:
    """Squared near zero and absolute beyond ``beta``; see :class:`SmoothL1Loss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.smooth_l1_loss(torch.tensor([3.0]), torch.tensor([1.0]), reduction="none")
        tensor([1.5000])
    """
    reduction = reduction_name(size_average, reduce, reduction)
    if beta < 0:
        raise RuntimeError(f"smooth_l1_loss needs beta of 0 or more, got {beta}; 0 is l1_loss")
    # The limit of beta to 0 is the absolute error; the quadratic branch would divide by 0.
    formula = "smooth_l1" if beta > 0 else "l1"
    return pointwise_loss(formula, input, target, float(beta), reduction=reduction, **extras)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
    **extras: Any,
) -> Tensor:
    """Squared near zero and linear beyond ``delta``; see :class:`HuberLoss`.

    Args:
        weight: of the input's shape; multiplies each element's loss, and ``"mean"`` divides by the number of
            elements, as torch's ``huber_loss`` does.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.huber_loss(torch.tensor([3.0]), torch.tensor([1.0]), reduction="none")
        tensor([1.5000])
    """
    reduction = reduction_name(None, None, reduction)
    _check_weight(input, weight)
    if delta <= 0:
        raise RuntimeError(f"huber_loss needs delta above 0, got {delta}")
    return pointwise_loss("huber", input, target, float(delta), reduction=reduction, weight=weight, **extras)


def log_cosh_loss(input: Tensor, target: Tensor, reduction: str = "mean", **extras: Any) -> Tensor:
    """Logarithm of the hyperbolic cosine of the error; see :class:`LogCoshLoss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.log_cosh_loss(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor(1.3250)
    """
    reduction = reduction_name(None, None, reduction)
    return pointwise_loss("log_cosh", input, target, reduction=reduction, **extras)


def charbonnier_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", eps: float = 1e-12, **extras: Any
) -> Tensor:
    """A differentiable absolute error; see :class:`CharbonnierLoss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.charbonnier_loss(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor(2.)
    """
    reduction = reduction_name(None, None, reduction)
    if eps <= 0:
        raise ValueError(f"charbonnier_loss needs eps above 0, got {eps}; without it, use l1_loss")
    return pointwise_loss("charbonnier", input, target, float(eps), reduction=reduction, **extras)


def _weighted_mean(
    formula: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, **extras: Any
) -> Tensor:
    _check_weight(input, weight)
    if weight is not None and reduction == "mean" and extras.get("normalizer") is None:
        extras["normalizer"] = weight.sum()
    return pointwise_loss(formula, input, target, reduction=reduction, weight=weight, **extras)


def _check_weight(input: Tensor, weight: Tensor | None) -> None:
    if weight is not None and weight.shape != input.shape:
        raise ValueError(
            f"weight must have the input's shape {tuple(input.shape)}, got {tuple(weight.shape)}; "
            "sample_weight= broadcasts"
        )
