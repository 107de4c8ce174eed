"""Functions of torch that look at values or at memory, written again without: what a trace runs in their place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lookups import checked
from .values import Scalar

aten = torch.ops.aten


def one_hot(tracer: Any, tensor: Tensor, num_classes: Any = -1) -> Tensor:
    """Whether the classes are in range is seen when they are read."""
    if isinstance(num_classes, int) and num_classes < 0:
        raise tracer.refusal("one_hot without num_classes looks at the values; pass num_classes")
    classes = torch.arange(num_classes, device=tensor.device)
    return (tracer.traced(checked(tracer.value(tensor), num_classes)).unsqueeze(-1) == classes).to(torch.int64)


class RealTransform(torch.autograd.Function):
    """The Fourier transform of real numbers, whose gradient is a transform to real ones, as the other way round.

    Torch's own pads half a spectrum with zeros and transforms as many complex numbers, of which it takes the real part.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, normalization: int) -> Tensor:
        ctx.dim, ctx.normalization, ctx.length = dim, normalization, x.shape[dim]
        return aten._fft_r2c(x, [dim], normalization, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Frequencies that stand for two count twice in a transform to real numbers; the others are taken as real.
        place = torch.arange(grad.shape[ctx.dim], device=grad.device).unflatten(
            0, [-1, *[1] * (grad.ndim - ctx.dim - 1)]
        )
        stands_for_one = (place == 0) | (2 * place == ctx.length)
        real, imag = torch.view_as_real(grad).unbind(-1)
        weighted = torch.complex(torch.where(stands_for_one, real, real / 2), torch.where(stands_for_one, 0, imag / 2))
        return aten._fft_c2r(weighted, [ctx.dim], ctx.normalization, ctx.length), None, None


NORMALIZATIONS = {None: 0, "backward": 0, "ortho": 1, "forward": 2}


def rfft(tracer: Any, input: Tensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> Tensor:
    if not input.is_floating_point() or norm not in NORMALIZATIONS:
        return torch.fft.rfft(input, n, dim, norm)
    dim = dim % input.ndim
    return RealTransform.apply(_resized(input, n, dim), dim, NORMALIZATIONS[norm])


def rfftn(tracer: Any, input: Tensor, s: Any = None, dim: Any = None, norm: str | None = None) -> Tensor:
    if dim is None:
        dim = range(input.ndim) if s is None else range(-len(s), 0)
    *others, last = dim
    half = rfft(tracer, input, None if s is None else s[-1], last, norm)
    return torch.fft.fftn(half, None if s is None else s[:-1], others, norm) if others else half


def rfft2(tracer: Any, input: Tensor, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Tensor:
    return rfftn(tracer, input, s, dim, norm)


def _resized(input: Tensor, n: int | None, dim: int) -> Tensor:
    """As many elements along a dimension as are transformed: what is missing is 0."""
    if n is None or n == -1:
        return input
    return aten.constant_pad_nd(input, [0, 0] * (input.ndim - dim - 1) + [0, n - input.shape[dim]])


def stft(
    tracer: Any,
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    **options: Any,
) -> Tensor:
    """Frames as a view, times the window, transformed."""
    if not return_complex or any(option is not None for option in options.values()):
        raise tracer.refusal("stft is fused with return_complex=True and its first eleven arguments alone")
    hop, length = hop_length or n_fft // 4, win_length or n_fft
    signal = input if input.ndim == 2 else input.unsqueeze(0)
    if center:
        signal = F.pad(signal, (n_fft // 2, n_fft // 2), mode=pad_mode)
    frames = signal.unfold(-1, n_fft, hop)
    if window is not None or length < n_fft:
        window = torch.ones(length, dtype=input.dtype, device=input.device) if window is None else window
        before = (n_fft - length) // 2
        frames = frames * F.pad(window, (before, n_fft - length - before))
    norm = "ortho" if normalized else "backward"
    half = onesided or onesided is None
    spectrum = (rfft(tracer, frames, norm=norm) if half else torch.fft.fft(frames, norm=norm)).transpose(-1, -2)
    return spectrum if input.ndim == 2 else spectrum.squeeze(0)


RESIZING = {  # by mode, dimensions and whether it is antialiased
    ("nearest", 1, False): aten.upsample_nearest1d,
    ("nearest", 2, False): aten.upsample_nearest2d,
    ("nearest", 3, False): aten.upsample_nearest3d,
    ("nearest-exact", 1, False): aten._upsample_nearest_exact1d,
    ("nearest-exact", 2, False): aten._upsample_nearest_exact2d,
    ("nearest-exact", 3, False): aten._upsample_nearest_exact3d,
    ("linear", 1, False): aten.upsample_linear1d,
    ("bilinear", 2, False): aten.upsample_bilinear2d,
    ("bilinear", 2, True): aten._upsample_bilinear2d_aa,
    ("trilinear", 3, False): aten.upsample_trilinear3d,
    ("bicubic", 2, False): aten.upsample_bicubic2d,
    ("bicubic", 2, True): aten._upsample_bicubic2d_aa,
}


def interpolate(
    tracer: Any,
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """By the operators whose sizes may be open; what they do not do, and what is wrong, is torch's function's."""
    spatial, is_nearest = input.ndim - 2, mode.startswith("nearest")
    resize = RESIZING.get((mode, spatial, antialias))
    is_wrong = (size is None) is (scale_factor is None) or (is_nearest and align_corners is not None)
    if resize is None or is_wrong:
        return F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    given = scale_factor if size is None else size
    given = list(given) if isinstance(given, (list, tuple)) else [given] * spatial
    factors: list[float | None] = [None] * spatial
    if size is None:
        scales = [float(factor) for factor in given]
        given = [_scaled(length, factor) for length, factor in zip(input.shape[2:], scales)]
        factors = factors if recompute_scale_factor else [*scales]
    return resize(input, given, *([] if is_nearest else [bool(align_corners)]), *factors)


def _scaled(length: Any, factor: float) -> Any:
    """A length times a factor, rounded down; open where that is exact for every length."""
    if factor.is_integer():
        return length * int(factor)
    if math.frexp(factor)[0] == 0.5:
        return length // int(1 / factor)
    return int(length * factor)


def full(tracer: Any, size: Any, fill_value: Any, **options: Any) -> Tensor:
    return _filled(tracer, torch.full, size, fill_value, options)


def full_like(tracer: Any, input: Tensor, fill_value: Any, **options: Any) -> Tensor:
    return _filled(tracer, torch.full_like, input, fill_value, options)


def _filled(tracer: Any, function: Any, like: Any, number: Any, options: Any) -> Tensor:
    """Filled with a number that may be open."""
    if not isinstance(number, torch.SymFloat):
        return function(like, number, **options)
    result = function(like, 0.0, **options)
    return result.fill_(tracer.traced(Scalar(number, result.dtype)))


def masked_select(tracer: Any, input: Tensor, mask: Tensor) -> Tensor:
    """As an index, whose gradient needs no more than a choice."""
    input, mask = torch.broadcast_tensors(input, mask)
    return input[mask]


def cov(tracer: Any, input: Tensor, *, correction: int = 1, fweights: Any = None, aweights: Any = None) -> Tensor:
    """As a product of what is left of the means."""
    if fweights is not None or aweights is not None or input.ndim > 2 or not input.is_floating_point():
        return torch.cov(input, correction=correction, fweights=fweights, aweights=aweights)
    rows = input if input.ndim == 2 else input.reshape(1, -1)
    centered = rows - rows.mean(1, keepdim=True)
    covariance = centered @ (centered.t() / torch.sym_max(rows.shape[1] - correction, 0))
    return covariance if input.ndim == 2 else covariance.squeeze()


REWRITES: dict[Any, Callable[..., Tensor]] = {
    torch.full: full,
    torch.full_like: full_like,
    torch.cov: cov,
    Tensor.cov: cov,
    F.one_hot: one_hot,
    F.interpolate: interpolate,
    torch.masked_select: masked_select,
    Tensor.masked_select: masked_select,
    torch.stft: stft,
    Tensor.stft: stft,
    torch.fft.rfft: rfft,
    torch.fft.rfft2: rfft2,
    torch.fft.rfftn: rfftn,
}
