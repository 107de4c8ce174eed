"""The same values in other memory layouts."""

from __future__ import annotations

from torch import Tensor


def permuted(tensor: Tensor) -> Tensor:
    """Dense, with the dimensions in memory in the opposite order."""
    order = list(range(tensor.ndim))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def spread(tensor: Tensor) -> Tensor:
    """Every second element of a larger tensor, in every dimension."""
    wide = tensor.new_zeros([2 * size for size in tensor.shape])
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def shifted(tensor: Tensor) -> Tensor:
    """Contiguous, but beginning three elements into its memory, which no vector load is aligned to."""
    return tensor.new_zeros(tensor.numel() + 3)[3:].view(tensor.shape).copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The last row for every row, at a stride of 0."""
    return tensor[-1:].expand(tensor.shape) if tensor.ndim > 1 and tensor.shape[0] else tensor


LAYOUTS = (permuted, spread, shifted, expanded)
