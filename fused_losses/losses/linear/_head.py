"""The matrix products of a head, a chunk of rows at a time, and the gradients that gather from them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.fake import accumulate_dtype
from ...backends.loading import unavailable_reason

# The default of max_workspace_mb: what a chunk of logits and the products beside it may take.
WORKSPACE_MB = {"cpu": 64.0, "cuda": 1024.0}
# More rows than these do not make the products faster, and fewer fit a CPU's caches.
MOST_ROWS = {("cpu", torch.float32): 256, ("cpu", torch.float64): 256, ("cpu", torch.bfloat16): 512}
LEAST_ROWS = 32
BLOCK_BYTES = 1 << 20  # of a product that is moved or added elsewhere while a CPU's cache holds it


class Needs(NamedTuple):
    """Which gradients somebody asks for."""

    input: bool
    weight: bool
    bias: bool


class Head(NamedTuple):
    """A linear layer in the dtype of its products."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V)

    @classmethod
    def cast(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
        return cls(weight.to(dtype), None if bias is None else bias.to(dtype))

    def of(self, classes: slice) -> Head:
        """The part of it that some classes have."""
        return Head(self.weight[classes], None if self.bias is None else self.bias[classes])

    def logits(self, input: Tensor) -> Tensor:
        """input @ weight.T + bias  # (n, D) -> (n, V)"""
        if _linear_without_packing(input):
            return torch.ops.mkldnn._linear_pointwise(input, *self, "none", [], "")
        return torch.mm(input, self.weight.t()) if self.bias is None else torch.addmm(self.bias, input, self.weight.t())

    def write_logits(self, input: Tensor, out: Tensor) -> None:
        """The same into memory that is there."""
        if _linear_without_packing(input):
            for block in _blocks(len(self.weight), input.shape[0] * input.element_size()):
                out[:, block] = self.of(block).logits(input)
        elif self.bias is None:
            torch.mm(input, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, input, self.weight.t(), out=out)

    def input_gradient(self, logits_gradient: Tensor) -> Tensor:
        """logits_gradient @ weight  # (n, V) -> (n, D)"""
        if _linear_without_packing(logits_gradient):
            return torch.ops.mkldnn._linear_pointwise(logits_gradient, self.weight.t(), None, "none", [], "")
        return torch.mm(logits_gradient, self.weight)


def _about_cpu() -> Mapping[str, Any]:
    """What this torch says of the processor: nothing, where it is older than that."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _linear_without_packing(input: Tensor) -> bool:
    """oneDNN's fp32 kernels: a general product packs the whole weight again for every chunk."""
    return input.is_cpu and input.dtype is torch.float32 and _packing_is_slow()


@functools.cache
def _packing_is_slow() -> bool:
    """Not where MKL runs the kernels that it has for processors of its maker."""
    for_maker = torch.backends.mkl.is_available() and "Intel" in _about_cpu().get("cpu_name", "")
    return torch.backends.mkldnn.is_available() and not for_maker


def _blocks(count: int, bytes_each: int) -> Iterator[slice]:
    size = max(256, BLOCK_BYTES // max(1, bytes_each) // 256 * 256)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class HeadGradients:
    """Gradients of a head, as sums over chunks of rows: that of the weight in fp32 or wider."""

    def __init__(
        self,
        head: Head,
        rows: int,
        needs: Needs,
        counted: Tensor | None = None,
        input_dtype: torch.dtype | None = None,  # None is the head's
    ):
        classes, width = head.weight.shape
        dtype, wide = head.weight.dtype, accumulate_dtype(head.weight.dtype)
        self.head, self.needs = head, needs
        self.input = empty(head.weight, (rows, width) if needs.input else (0,), input_dtype or dtype)
        self.weight = empty(head.weight, (classes, width) if needs.weight else (0,), wide)
        self.bias = empty(head.weight, (classes,) if needs.bias else (0,), wide)
        self.fresh = True
        if counted is not None:
            self.input.zero_()  # where rows are left out

    def add(self, rows: Rows, input: Tensor, logits_gradient: Tensor) -> None:
        """Adds what a chunk contributes.  # (n, D), (n, V)"""
        if self.needs.input:
            self.input[rows] = self.head.input_gradient(logits_gradient).to(self.input.dtype)
        if self.needs.weight:
            add_product(self.weight, logits_gradient, input, self.fresh)
        if self.needs.bias:
            of_chunk = logits_gradient.sum(0, dtype=self.bias.dtype)
            self.bias.copy_(of_chunk) if self.fresh else self.bias.add_(of_chunk)
        self.fresh = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums; what nobody asked for is empty, and without any rows everything is 0."""
        if self.fresh:
            for tensor in (self.input, self.weight, self.bias):
                tensor.zero_()
        return self.input, self.weight, self.bias


def add_product(total: Tensor, logits_gradient: Tensor, input: Tensor, is_fresh: bool) -> None:
    """total += logits_gradient.T @ input, or = where it is fresh, in the total's dtype.  # (V, D), (n, V), (n, D)"""
    beta = 0.0 if is_fresh else 1.0
    if total.dtype == input.dtype:
        torch.addmm(total, logits_gradient.t(), input, beta=beta, out=total)
    elif input.is_cuda and _adds_wide_products(input.dtype, input.device):
        torch.ops.aten.addmm.dtype_out(total, logits_gradient.t(), input, total.dtype, beta=beta, out=total)
    elif input.is_cpu and input.dtype is torch.bfloat16 and _multiplies_pairs():
        torch.ops.fused_losses.add_product_(total, logits_gradient, input.contiguous(), is_fresh)
    else:
        for block in _blocks(len(total), input.shape[1] * input.element_size()):
            product = torch.mm(logits_gradient[:, block].t(), input)
            if is_fresh:
                total[block] = product
            elif product.is_cpu:
                torch.ops.fused_losses.add_(total[block], product)
            else:
                total[block] += product


@functools.cache
def _multiplies_pairs() -> bool:
    """Whether our kernel multiplies pairs of bf16 here in one instruction; torch's is faster on matrix units."""
    about_cpu = _about_cpu()
    if not about_cpu.get("avx512_bf16") or about_cpu.get("amx_bf16") or unavailable_reason("_C_cpu"):
        return False
    return torch.ops.fused_losses.cpu_capability() == "avx512"


@functools.cache
def _adds_wide_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch multiplies low precision into an fp32 sum: asked once, with a product of nothing."""
    tile, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, tile, tile, total.dtype, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory; on a CPU of what is kept from the last step."""
    if like.is_cpu and unavailable_reason("_C_cpu") is None:
        return torch.ops.fused_losses.empty(shape, dtype)
    return like.new_empty(shape, dtype=dtype)


# Rows of a chunk: neighbours, or those that are listed.
Rows = slice | Tensor
# Below this share of rows that count, the others are left out of the products.
WORTH_DROPPING = 0.9


def rows_that_count(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows whose labels are not ignored, where leaving out the others pays; None for all.

    Only on a CPU: how many there are decides sizes, which a GPU would have to be waited for.
    """
    if not target.is_cpu or target.is_floating_point() or target.ndim != 1:
        return None
    counted = (target != ignore_index).nonzero()[:, 0]
    return counted if len(counted) < WORTH_DROPPING * len(target) else None


def chunk_rows(rows: int, head: Head, workspace_mb: float | None, buffers: int = 1, classes: int | None = None) -> int:
    """Rows of equal chunks whose logits, in so many buffers, fit the workspace, whatever memory happens to be free.

    ``classes`` are those of the largest head that must be cut into the same chunks; None is this head.
    """
    weight, device = head.weight, head.weight.device.type
    budget = (WORKSPACE_MB.get(device, WORKSPACE_MB["cuda"]) if workspace_mb is None else workspace_mb) * 2**20
    row_bytes = buffers * (classes or len(weight)) * weight.element_size()
    fitting = int(budget - (BLOCK_BYTES if device == "cpu" else 0)) // row_bytes
    # In whole tiles of a processor's matrix units.
    most_tiles = max(min(fitting, MOST_ROWS.get((device, weight.dtype), 8192)) // LEAST_ROWS, 1)
    tiles = -(-rows // LEAST_ROWS)
    chunks = max(1, -(-tiles // most_tiles))
    return max(1, min(-(-tiles // chunks) * LEAST_ROWS, rows))


def logit_chunks(
    input: Tensor,
    head: Head,
    workspace_mb: float | None,
    counted: Tensor | None = None,
    buffers: int = 1,
    classes: int | None = None,
) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """Rows, their input in the head's dtype, and their logits in memory that the next chunk takes over."""
    count = len(input) if counted is None else len(counted)
    shape = chunk_rows(count, head, workspace_mb, buffers, classes), len(head.weight)
    # Memory that is kept would stand beside both, when gradients of low precision are made of their sums.
    is_wide = accumulate_dtype(head.weight.dtype) is head.weight.dtype
    memory = empty(head.weight, shape, head.weight.dtype) if is_wide else head.weight.new_empty(shape)
    for start in range(0, count, max(1, shape[0])):
        neighbours = slice(start, min(start + shape[0], count))
        rows = neighbours if counted is None else counted[neighbours]
        part = input[rows].to(head.weight.dtype)
        logits = memory[: len(part)]
        head.write_logits(part, logits)
        yield rows, part, logits
