"""What every linear loss asks of hidden states and a head, and the shapes its kernels see."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common import check_tensors, plain
from ._shards import is_distributed


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """Tensors in a dtype; what is None stays so."""
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


class HeadInput(NamedTuple):
    """Hidden states as rows beside the head that makes logits of them."""

    input: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V)
    shape: tuple[int, ...]  # of a row's logits: (C, d1, ...), whose product is V
    leading: tuple[int, ...]  # dimensions of the caller's input before D
    dtype: torch.dtype  # of the products

    def logits_like(self) -> Tensor:
        """Shape, dtype and device of the logits, at the price of one number."""
        return self.input.new_empty((), dtype=self.dtype).expand(len(self.input), *self.shape)

    def rows_of(self, name: str, tensor: Tensor) -> Tensor:
        """A caller's tensor with the input's leading dimensions as one."""
        count = len(self.leading)
        if count == 1:
            return tensor
        if tensor.shape[:count] != self.leading:
            raise ValueError(
                f"{name} must begin with the input's leading dimensions {self.leading}, got {tuple(tensor.shape)}"
            )
        return tensor.reshape(len(self.input), *tensor.shape[count:])


def head_input(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, whole: bool = True) -> HeadInput:
    """The arguments as the kernels take them, of a head that is whole or this rank's rows of one.

    Raises:
        TypeError: where an argument is no tensor.
        RuntimeError: for shapes, dtypes or devices that do not fit, and for a weight that is sharded.
    """
    check_tensors(input=input, linear_weight=linear_weight, optional={"linear_bias": linear_bias})
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and whole:
            _check_whole(name, tensor)
    _check_shapes(input, linear_weight, linear_bias)
    input, shape, width = plain(input), tuple(linear_weight.shape[:-1]), linear_weight.shape[-1]
    dtype = _product_dtype(input, linear_weight, linear_bias)
    return HeadInput(
        input.reshape(-1, width),
        linear_weight.reshape(-1, width),
        None if linear_bias is None else linear_bias.reshape(-1),
        shape,
        tuple(input.shape[:-1]),
        dtype,
    )


WAY_OUT = (
    "call the loss where the whole weight is: replace the head with fused_losses.LinearCrossEntropyHead "
    "(fuse_lm_head(model) does it) before wrapping the model, and pass it the labels; for a vocabulary that is "
    "split over processes, use fused_losses.functional.vocab_parallel_linear_cross_entropy"
)


def checked_workspace(max_workspace_mb: float | None) -> float | None:
    if max_workspace_mb is not None and not max_workspace_mb > 0:
        raise ValueError(f"max_workspace_mb must be above 0, got {max_workspace_mb}; None takes the default")
    return max_workspace_mb


def _check_whole(name: str, tensor: Tensor) -> None:
    if is_distributed(tensor):
        raise RuntimeError(f"{name} is a DTensor, of which this process holds a part; {WAY_OUT}")
    if tensor.numel() == 0:
        whole = tuple(getattr(tensor, "ds_shape", ())) or "its own"
        raise RuntimeError(
            f"{name} is empty, shape {tuple(tensor.shape)}, as ZeRO leaves a parameter of shape {whole} outside "
            f"its module's forward; {WAY_OUT}"
        )


def _check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.ndim < 1:
        raise RuntimeError("input needs a feature dimension: (D), (N, D) or (N, ..., D), got a 0-d tensor")
    if weight.ndim < 2:
        hint = f"; a flat weight is what FSDP leaves outside its module's forward: {WAY_OUT}" if weight.ndim else ""
        raise RuntimeError(f"linear_weight must be (C, D) or (C, d1, ..., D), got shape {tuple(weight.shape)}{hint}")
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"input and linear_weight must have one last dimension (features), got {input.shape[-1]} and "
            f"{weight.shape[-1]}, of shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(
            f"linear_bias must have the shape {tuple(weight.shape[:-1])} of linear_weight without its features, "
            f"got {tuple(bias.shape)}"
        )
    if weight.ndim > 2 and input.ndim != 2:
        raise RuntimeError(
            f"a linear_weight of shape {tuple(weight.shape)} makes a K-dimensional loss, which needs an input "
            f"(N, {weight.shape[-1]}), got {tuple(input.shape)}; flatten its leading dimensions"
        )


def _product_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    device = input.device.type
    if input.dtype is not torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.dtype is not input.dtype:
            raise RuntimeError(
                f"input is {input.dtype} and {name} {tensor.dtype}; give them one dtype, e.g. "
                f"input.to({name}.dtype), or compute under torch.autocast"
            )
    return input.dtype
