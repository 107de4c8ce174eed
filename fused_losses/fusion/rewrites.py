"""Functions of torch that look at values or at memory, written again without: what a trace runs in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lookups import checked


def one_hot(tracer: Any, tensor: Tensor, num_classes: Any = -1) -> Tensor:
    """Whether the classes are in range is seen when they are read."""
    if isinstance(num_classes, int) and num_classes < 0:
        raise tracer.refusal("one_hot without num_classes looks at the values; pass num_classes")
    classes = torch.arange(num_classes, device=tensor.device)
    return (tracer.traced(checked(tracer.value(tensor), num_classes)).unsqueeze(-1) == classes).to(torch.int64)


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
    transform = torch.fft.rfft if onesided or onesided is None else torch.fft.fft
    spectrum = transform(frames, norm="ortho" if normalized else "backward").transpose(-1, -2)
    return spectrum if input.ndim == 2 else spectrum.squeeze(0)


REWRITES: dict[Any, Callable[..., Tensor]] = {F.one_hot: one_hot, torch.stft: stft, Tensor.stft: stft}
