"""Binary classification losses: of a probability or a logit and a target between 0 and 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._common import reduction_name
from ._function import pointwise_loss
from ._module import PointwiseModule


class BCELoss(PointwiseModule, nn.BCELoss):
    """Binary cross entropy of probabilities, a drop-in for :class:`torch.nn.BCELoss`.

    Formula: ``-w (t max(log x, -100) + (1 - t) max(log(1 - x), -100))``

    Args:
        weight: broadcasts to the input and multiplies each element's loss; ``"mean"`` still divides by the
            number of elements.
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``; read at call time.
        backend: a backend by name; None chooses automatically.

    Shape:
        input and target ``(*)``, of one shape and dtype, with values in [0, 1]. Called as
        ``loss(input, target, *, sample_weight=None, normalizer=None)`` as in
        :class:`~fused_losses.MSELoss`.

    Returns:
        A 0-d tensor, or the input's shape for ``"none"``, in the input's dtype (float32 under autocast).

    Raises:
        ValueError: for different shapes or an unknown reduction.
        RuntimeError: for different dtypes or devices, and on a CPU for values outside [0, 1] (on a GPU, where
            looking would wait for the device, such an element's loss is NaN).

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.BCELoss()(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))
        tensor(0.6931)

    Source: :class:`torch.nn.BCELoss`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average=None,
        reduce=None,
        reduction: str = "mean",
        *,
        backend: str | None = None,
    ):
        super().__init__(weight, size_average, reduce, reduction)
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return binary_cross_entropy(
            input, target, self.weight, reduction=self.reduction, backend=self.backend, **extras
        )


class BCEWithLogitsLoss(PointwiseModule, nn.BCEWithLogitsLoss):
    """Binary cross entropy of logits, a drop-in for :class:`torch.nn.BCEWithLogitsLoss`.

    Formula: ``-w (q t log sigmoid(x) + (1 - t) log(1 - sigmoid(x)))``, with ``q`` the ``pos_weight``

    Args:
        weight, size_average, reduce, reduction, backend: as in :class:`BCELoss`.
        pos_weight: broadcasts to the input; multiplies the loss of positives.

    Shape:
        input and target ``(*)``, of one shape, floating. Called as in :class:`BCELoss`.

    Returns:
        As :class:`BCELoss`.

    Raises:
        ValueError: for different shapes or an unknown reduction.
        RuntimeError: for targets that are not floating and tensors on different devices.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.BCEWithLogitsLoss()(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(0.6931)

    Source: :class:`torch.nn.BCEWithLogitsLoss`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average=None,
        reduce=None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        backend: str | None = None,
    ):
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            backend=self.backend,
            **extras,
        )


class SigmoidFocalLoss(PointwiseModule):
    """Focal loss of logits: cross entropy that counts well-classified elements less.

    Formula: ``alpha_t (1 - p_t)^gamma bce_with_logits(x, t)``, with ``p_t`` the probability given to the
    target and ``alpha_t = alpha t + (1 - alpha)(1 - t)``

    Args:
        alpha: weight of positives in [0, 1]; negative switches the weighting off.
        gamma: how strongly easy elements are counted less, at least 0 (0 is cross entropy).
        reduction: ``"none"`` (the default of the original), ``"mean"`` or ``"sum"``.
        backend: a backend by name; None chooses automatically.

    Shape:
        input and target ``(*)``, of one shape, floating; soft targets are allowed. Called as in
        :class:`BCELoss`.

    Returns:
        The input's shape for ``"none"``, else 0-d, in the input's dtype (float32 under autocast).

    Raises:
        ValueError: for different shapes, an unknown reduction, alpha above 1 or gamma below 0.
        RuntimeError: for targets that are not floating and tensors on different devices.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.SigmoidFocalLoss()(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.1300, 0.0433])

    Source: ``torchvision.ops.sigmoid_focal_loss``; Lin et al., Focal Loss for Dense Object Detection, 2017.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "none",
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.backend = backend

    def _loss(self, input: Tensor, target: Tensor, **extras: Any) -> Tensor:
        return sigmoid_focal_loss(input, target, self.alpha, self.gamma, self.reduction, backend=self.backend, **extras)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **extras: Any,
) -> Tensor:
    """Binary cross entropy of probabilities; see :class:`BCELoss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.binary_cross_entropy(torch.tensor([0.5]), torch.tensor([1.0]))
        tensor(0.6931)
    """
    reduction = reduction_name(size_average, reduce, reduction)
    _check_target(input, target, one_dtype=True)
    return pointwise_loss("bce", input, target, reduction=reduction, weight=weight, **extras)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    **extras: Any,
) -> Tensor:
    """Binary cross entropy of logits; see :class:`BCEWithLogitsLoss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.binary_cross_entropy_with_logits(torch.tensor([0.0]), torch.tensor([1.0]))
        tensor(0.6931)
    """
    reduction = reduction_name(size_average, reduce, reduction)
    _check_target(input, target)
    return pointwise_loss(
        "bce_with_logits",
        input,
        target,
        reduction=reduction,
        weight=weight,
        pos_weight=pos_weight,
        **extras,
    )


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    **extras: Any,
) -> Tensor:
    """Focal loss of logits; see :class:`SigmoidFocalLoss`.

    Example:
        >>> import torch, fused_losses
        >>> fused_losses.functional.sigmoid_focal_loss(torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.0433])
    """
    reduction = reduction_name(None, None, reduction)
    _check_target(inputs, targets)
    if alpha > 1.0:
        raise ValueError(f"alpha must be in [0, 1], or negative for no weighting, got {alpha}")
    if gamma < 0.0:
        raise ValueError(f"gamma must be 0 or more, got {gamma}")
    return pointwise_loss("sigmoid_focal", inputs, targets, float(alpha), float(gamma), reduction=reduction, **extras)


def _check_target(input: Tensor, target: Tensor, one_dtype: bool = False) -> None:
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        return  # check_tensors names the culprit
    if target.shape != input.shape:
        raise ValueError(
            f"target must have the input's shape {tuple(input.shape)}, got {tuple(target.shape)}; "
            "reshape it, e.g. target.view_as(input), or one-hot encode class labels"
        )
    if not target.is_floating_point():
        raise RuntimeError(f"target must be floating, got {target.dtype}; convert it: target.to(input.dtype)")
    if one_dtype and input.dtype != target.dtype and not torch.is_autocast_enabled(input.device.type):
        raise RuntimeError(
            f"input is {input.dtype} and target {target.dtype}; give them one dtype: target.to(input.dtype)"
        )
