"""What every family does before and after its kernels: the checks, the choice, the gradient of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn.parameter import Parameter

from ..backends.choice import resolve

REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's own enumeration
LOW_PRECISION = (torch.bfloat16, torch.float16)


def reduction_name(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction to apply, with torch's deprecated arguments and torch's errors."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    if reduction in REDUCTIONS:
        return reduction
    return REDUCTIONS[_reduction.get_enum(reduction)]


def plain(tensor: Tensor) -> Tensor:
    """The tensor without a decorating subclass (fastai's TensorImage); DTensor and its like stay."""
    kind = type(tensor)
    if kind is Tensor or kind is Parameter or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(Tensor)


def check_tensors(**tensors: Tensor | None) -> None:
    """Raises where an argument is no tensor or where two of them live on different devices."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise RuntimeError(
                f"{first} is on {device} and {name} on {tensor.device}; "
                f"move them to one device: {name}.to({first}.device)"
            )


def choose_backend(backend: str | None, *tensors: Tensor | None) -> str:
    """The backend for these tensors; the first decides device and dtype.

    The reference runs what kernels cannot: torch.func transforms, forward-mode AD, sparse layouts, and
    tensor subclasses with a dispatch of their own.
    """
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return "reference"
    for tensor in tensors:
        if tensor is not None and (tensor.layout is not torch.strided or _dispatches_itself(tensor)):
            return "reference"
    first = tensors[0]
    return resolve(first.device.type, first.dtype, backend)


def _dispatches_itself(tensor: Tensor) -> bool:
    kind = type(tensor)
    if kind is Tensor or kind is Parameter:
        return False
    from torch._subclasses.fake_tensor import FakeTensor  # operators have shape functions for these

    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(kind, FakeTensor)


def output_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the loss: the input's, or fp32 for a low-precision input under autocast, as torch's."""
    dtype = input.dtype
    if dtype in LOW_PRECISION and torch.is_autocast_enabled(input.device.type):
        return torch.float32
    return dtype


def divided_sum(
    sum_loss: Callable[..., Tensor], input: Tensor, reduction: str, normalizer: Tensor | float
) -> Tensor:
    """The mean with an explicit denominator: a fused sum, kept in fp32 or wider until it is divided."""
    if reduction != "mean":
        raise ValueError(
            f"normalizer divides a mean, got reduction={reduction!r}; "
            "use reduction='mean', or divide the result yourself"
        )
    dtype = output_dtype(input)
    wide = torch.promote_types(dtype, torch.float32)
    return (sum_loss(reduction="sum", out_dtype=wide) / normalizer).to(dtype)


def reference_gradients(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    """Differentiable gradients of a loss, taken through its reference: what create_graph=True needs."""
    with torch.enable_grad():
        value = loss(*inputs)
        wanted = [tensor for tensor, need in zip(inputs, needed) if need]
        gradients = iter(torch.autograd.grad(value, wanted, grad_output, create_graph=True))
    return [next(gradients) if need else None for need in needed]


def wants_graph() -> bool:
    """Whether a backward runs under create_graph=True: exactly then grad mode is on inside it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
