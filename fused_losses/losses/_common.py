"""What every family does before and after its kernels: the checks, the choice, the gradient of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn.parameter import Parameter

from ..backends.choice import is_automatic, resolve

REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's own enumeration
SMALL = 4096  # elements; where the crossing is was measured with `python -m bench`
IGNORED = -100  # the label of rows that count nothing, unless told otherwise
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
    if kind is Tensor or kind is Parameter or _dispatches_itself(kind):
        return tensor
    return tensor.as_subclass(Tensor)


def _dispatches_itself(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__") is not getattr(Tensor, "__torch_dispatch__")  # noqa: B009


def check_tensors(*, input: Tensor, optional: Mapping[str, Tensor | None], **others: Tensor) -> None:
    """Raises where an argument is no tensor or where two of them live on different devices."""
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in {"input": input, **others, **given}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != input.device:
            raise RuntimeError(
                f"input is on {input.device} and {name} on {tensor.device}; "
                f"move them to one device: {name}.to(input.device)"
            )


def is_small(input: Tensor, backend: str | None) -> bool:
    """Whether torch's own operator, called directly, is the fastest from Python: few elements on a CPU."""
    return (
        type(input) in (Tensor, Parameter)
        and input.numel() <= SMALL
        and input.is_cpu
        and is_automatic(backend)
        and not torch.compiler.is_compiling()
    )


def choose_backend(backend: str | None, input: Tensor, *others: Tensor | None) -> str:
    """The backend for these tensors; the input decides device and dtype.

    The reference runs what kernels cannot: torch.func transforms, forward-mode AD, sparse layouts, and
    tensor subclasses with a dispatch of their own.
    """
    if torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.compiler.is_compiling():
        return resolve(input.device.type, input.dtype, backend)
    if forward_ad._current_level >= 0:
        return "reference"
    for tensor in (input, *others):
        if tensor is not None and not _is_plain(tensor):
            return "reference"
    return resolve(input.device.type, input.dtype, backend)


def _is_plain(tensor: Tensor) -> bool:
    """Whether operators can take the tensor; they have shape functions for fake ones."""
    if tensor.layout is not torch.strided:
        return False
    kind = type(tensor)
    if kind is Tensor or kind is Parameter or not _dispatches_itself(kind):
        return True
    from torch._subclasses.fake_tensor import FakeTensor

    return issubclass(kind, FakeTensor)


def output_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the loss: the input's, or fp32 for a low-precision input under autocast, as torch's."""
    dtype = input.dtype
    if dtype in LOW_PRECISION and torch.is_autocast_enabled(input.device.type):
        return torch.float32
    return dtype


def check_normalizer(reduction: str) -> None:
    """Raises where there is no mean to divide."""
    if reduction != "mean":
        raise ValueError(
            f"normalizer divides a mean, got reduction={reduction!r}; "
            "use reduction='mean', or divide the result yourself"
        )


def divided_sum(
    sum_loss: Callable[..., Tensor], dtype: torch.dtype, reduction: str, normalizer: Tensor | float
) -> Tensor:
    """The mean with an explicit denominator: a fused sum, kept in fp32 or wider until it is divided."""
    check_normalizer(reduction)
    wide = torch.promote_types(dtype, torch.float32)
    return (sum_loss(reduction="sum", out_dtype=wide) / normalizer).to(dtype)


def reference_gradients(
    loss: Callable[..., Any], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad_outputs: Any
) -> list[Tensor | None]:
    """Differentiable gradients of a loss, taken through its reference: what create_graph=True needs."""
    with torch.enable_grad():
        values = loss(*inputs)
        wanted = [tensor for tensor, need in zip(inputs, needed) if need and tensor is not None]
        gradients = iter(torch.autograd.grad(values, wanted, grad_outputs, create_graph=True))
    return [next(gradients) if need and tensor is not None else None for tensor, need in zip(inputs, needed)]


def learns(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for a gradient of one of the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def without_values() -> bool:
    """Whether tensors have shapes only: in a graph that is compiled, and under a fake mode."""
    return torch.compiler.is_compiling() or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None


def wants_graph() -> bool:
    """Whether a backward runs under create_graph=True: exactly then grad mode is on inside it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, as a vectorised Jacobian hands them back."""
    return is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor)
