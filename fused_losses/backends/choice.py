"""Which backend runs: decided on static facts (family, device type, dtype, request), never on values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from . import fake, loading, triton

BACKENDS = ("reference", "cpp", "cuda", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_AUTOMATIC = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


class Kernels(NamedTuple):
    """The operators of one backend."""

    pointwise_forward: Any
    pointwise_backward: Any
    cross_entropy_forward: Any
    cross_entropy_backward: Any
    cross_entropy_backward_: Any
    cross_entropy_with_gradient_: Any
    cross_entropy_target_backward: Any
    row_statistics: Any
    row_gradient_: Any
    divergence_forward: Any
    divergence_backward: Any
    divergence_backward_: Any
    pointwise_with_gradients: Any = None
    cross_entropy_with_gradient: Any = None
    pointwise_backward_unless_one_: Any = None
    head_statistics: Any = None  # row_statistics of a head's logits without the logits, where a backend has it


def _validated(backend: str | None, source: str) -> str | None:
    if backend in (None, "", "auto"):
        return None
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} or auto, got {backend!r}")
    return backend


_requested: str | None = _validated(os.environ.get("FUSED_LOSSES_BACKEND"), "FUSED_LOSSES_BACKEND")
_resolved: dict[tuple[str, torch.dtype, str | None], str] = {}
# By backend; filled when a backend is first chosen. The reference has no kernels.
KERNELS: dict[str, Kernels] = {}


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Runs every loss inside the block on one backend.

    A loss that was computed inside the block keeps its backend in backward, wherever that runs.

    Args:
        backend: ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``; ``None`` or ``"auto"`` chooses
            automatically again.

    Raises:
        ValueError: if there is no backend of that name.

    Example:
        >>> import torch, fused_losses
        >>> with fused_losses.use_backend("reference"):
        ...     loss = fused_losses.MSELoss()(torch.zeros(2), torch.ones(2))
        >>> loss
        tensor(1.)
    """
    global _requested
    previous, _requested = _requested, _validated(backend, "backend")
    try:
        yield
    finally:
        _requested = previous


def unavailable_reason(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on tensors of this device and dtype, or None if it can."""
    if backend == "reference":
        return None
    if dtype not in DTYPES:
        return f"it has no kernels for {dtype}; it takes {', '.join(map(str, DTYPES))}"
    if backend == "triton":
        return triton.unavailable_reason(device_type)
    device, extension = {"cpp": ("cpu", "_C_cpu"), "cuda": ("cuda", "_C_cuda")}[backend]
    if device_type != device:
        return f"it runs on {device} tensors, and these are on {device_type}"
    return loading.unavailable_reason(extension)


def requested() -> str | None:
    """The backend that was asked for by name for every loss."""
    return _requested


def is_automatic(backend: str | None) -> bool:
    """Whether nobody asked for a backend by name."""
    return backend is None and _requested is None


def resolve(device_type: str, dtype: torch.dtype, backend: str | None) -> str:
    """The name of the backend to run; its operators are then in ``KERNELS``.

    Raises:
        RuntimeError: if a backend was asked for by name and cannot run here.
    """
    requested = backend if backend is not None else _requested
    if torch.compiler.is_compiling():
        return _resolve_constant(device_type, dtype, requested)
    key = (device_type, dtype, requested)
    if key not in _resolved:
        _resolved[key] = _resolve(*key)
    return _resolved[key]


def _resolve(device_type: str, dtype: torch.dtype, requested: str | None) -> str:
    requested = _validated(requested, "backend")
    if requested is None:
        for candidate in _AUTOMATIC.get(device_type, ()):
            if unavailable_reason(candidate, device_type, dtype) is None:
                return _prepared(candidate)
        return "reference"
    reason = unavailable_reason(requested, device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"the backend {requested!r} was asked for and cannot run: {reason}. "
            "`python -m fused_losses` lists what runs here; backend=None chooses automatically."
        )
    return _prepared(requested)


def _resolve_constant(device_type: str, dtype: torch.dtype, requested: str | None) -> str:
    return _resolve(device_type, dtype, requested)


# A compiled graph must not trace the loading of libraries; the request itself stays guarded. This is what
# torch.compiler.assume_constant_result marks, without the second that importing the compiler takes.
_resolve_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _prepared(backend: str) -> str:
    if backend != "reference" and backend not in KERNELS:
        if backend == "triton":
            triton.register()
        namespace = torch.ops.fused_losses_triton if backend == "triton" else torch.ops.fused_losses
        operators = (getattr(namespace, name).default for name in fake.OPERATORS)
        more: dict[str, Any] = {}
        if backend in fake.AT_ONCE:
            more = {name: getattr(namespace, name).default for name in fake.AT_ONCE[backend]}
        elif backend == "triton":
            more = {"head_statistics": triton.head_statistics()}
        KERNELS[backend] = Kernels(*operators, **more)
    return backend
