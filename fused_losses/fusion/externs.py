"""Operators that torch runs between stages: what they return, for sizes that are open."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .values import Value, broadcast

# Torch's decompositions and shape functions of these import the compiler, which takes a second.
SPECIAL = [f"special_{name}" for name in ("erfcx", "ndtri", "i0e", "i1", "i1e", "bessel_j0", "bessel_j1")]
MAX_POOLING = [f"max_pool{n}d_with_indices{end}" for n in (2, 3) for end in ("", "_backward")]
# Its decompositions of the first two look at all pairs of elements; the third wants sizes of the compiler's kind; those
# of pooling look at a window twice and scatter its gradient.
LEFT_TO_TORCH = {"cumsum", "cumprod", "unfold_backward", *MAX_POOLING, *SPECIAL}


def _meta(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _same(x: Value, *options: Any, dtype: torch.dtype | None = None) -> Tensor:
    return _meta(x.shape, dtype or (torch.int64 if not x.dtype.is_floating_point else x.dtype))


def _floating(x: Value) -> Tensor:
    return _meta(x.shape, x.dtype if x.dtype.is_floating_point else torch.get_default_dtype())


def _real_to_complex(x: Value, dims: list[int], norm: int, onesided: bool) -> Tensor:
    shape = list(x.shape)
    if onesided:
        shape[dims[-1]] = shape[dims[-1]] // 2 + 1
    return _meta(shape, x.dtype.to_complex())


def _complex_to_real(x: Value, dims: list[int], norm: int, length: Any) -> Tensor:
    shape = list(x.shape)
    shape[dims[-1]] = length
    return _meta(shape, x.dtype.to_real())


def _solved(right: Value, other: Value) -> Tensor:
    """Solutions for a right-hand side, with the batches of both."""
    batch, *_ = broadcast([Value(x.shape[:-2], x.dtype) for x in (right, other)])
    return _meta([*batch, *right.shape[-2:]], right.dtype)


RESIZED = [f"_upsample_{name}2d_aa" for name in ("bilinear", "bicubic")]
RESIZED_BACK = [
    *[f"{name}_backward" for name in RESIZED],
    *[f"upsample_{name}_backward" for name in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")],
    *[f"{name}{n}d_backward" for name in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)],
]
# Of those whose shape functions in torch would fix every size, or import the compiler.
SHAPES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(SPECIAL, _floating),
    **dict.fromkeys(RESIZED, lambda x, size, *_: _meta([*x.shape[:2], *size], x.dtype)),
    **dict.fromkeys(RESIZED_BACK, lambda grad, size, shape, *_: _meta(shape, grad.dtype)),
    "linalg_solve_triangular": lambda matrix, right, **_: _solved(right, matrix),
    "cholesky_solve": lambda right, matrix, *_: _solved(right, matrix),
    "cumsum": _same,
    "cumprod": _same,
    "logcumsumexp": _same,
    "_fft_c2c": lambda x, *_: _meta(x.shape, x.dtype),
    "_fft_r2c": _real_to_complex,
    "_fft_c2r": _complex_to_real,
    "unfold_backward": lambda x, shape, *_: _meta(shape, x.dtype),
    "sort": lambda x, *_, **__: (_meta(x.shape, x.dtype), _meta(x.shape, torch.int64)),
}


def results(tracer: Any, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """What an operator returns, as tensors without elements."""
    values, keywords = tree_map(tracer.value, args), tree_map(tracer.value, kwargs)
    if name in SHAPES:
        return SHAPES[name](*values, **keywords)

    def empty(argument: Any, device: torch.device) -> Any:
        if isinstance(argument, torch.device):
            return device
        if not isinstance(argument, Value):
            return argument
        return torch.empty(argument.shape, dtype=argument.dtype, device=device)

    def called(device: torch.device) -> Any:
        place = partial(empty, device=device)
        return func(*tree_map(place, values), **tree_map(place, keywords))

    try:
        return called(torch.device("meta"))
    except Exception:  # the shape function does not take open sizes, and says so in one of many ways
        from torch._subclasses.fake_tensor import FakeTensorMode

        with _without_log("torch._subclasses.fake_tensor"), FakeTensorMode() as mode:
            mode.cache_enabled = False  # its keys need sizes of the compiler's own kind
            return called(tracer.device)


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    """Keeps a logger silent: what fails here is said in a reason."""
    logger = logging.getLogger(name)
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was
