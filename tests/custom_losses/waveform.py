"""Losses of waveforms (N, T)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .entry import WIDE, Entry, pair


class SpectralMagnitudeLoss(nn.Module):
    """Difference of amplitude spectra, whatever their phases.

    mean | |rfft(x)| - |rfft(t)| | / sqrt(T)

    Source: Wang, Wang and Xu, "Neural source-filter-based waveform model", 2019; Jiang et al., 2021, for images.
    """

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        spectra = [torch.fft.rfft(signal, norm="ortho").abs() for signal in (predictions, targets)]
        return (spectra[0] - spectra[1]).abs().mean()


class STFTLoss(nn.Module):
    """Spectral convergence and difference of log magnitudes of short-time spectra.

    | |X| - |T| |_F / | |T| |_F + mean |log |X| - log |T||, with magnitudes of at least eps

    Source: Yamamoto, Song and Kim, "Parallel WaveGAN", 2020.
    """

    window: Tensor

    def __init__(self, size: int = 16, hop: int = 4, eps: float = 1e-5):
        super().__init__()
        self.size = size
        self.hop = hop
        self.eps = eps
        self.register_buffer("window", torch.hann_window(size))

    def magnitude(self, signal: Tensor) -> Tensor:
        spectrum = torch.stft(signal, self.size, self.hop, window=self.window, return_complex=True)
        return torch.sqrt(torch.view_as_real(spectrum).square().sum(dim=-1) + self.eps**2)

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        x, t = self.magnitude(predictions), self.magnitude(targets)
        convergence = torch.linalg.vector_norm(x - t) / torch.linalg.vector_norm(t)
        return convergence + (x.log() - t.log()).abs().mean()


class SISDRLoss(nn.Module):
    """Negative scale-invariant signal-to-distortion ratio in dB.

    -10 log10(|a t|^2 / |a t - x|^2), with a = <x, t> / |t|^2, both without their mean

    Source: Le Roux et al., "SDR - half-baked or well done?", 2019.
    """

    def __init__(self, eps: float = 1e-8):
        super().__init__()
        self.eps = eps

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        x = predictions - predictions.mean(dim=-1, keepdim=True)
        t = targets - targets.mean(dim=-1, keepdim=True)
        scale = (x * t).sum(dim=-1, keepdim=True) / (t.square().sum(dim=-1, keepdim=True) + self.eps)
        projection = scale * t
        signal, distortion = projection.square().sum(dim=-1), (projection - x).square().sum(dim=-1)
        return -10 * torch.log10((signal + self.eps) / (distortion + self.eps)).mean()


class MultiscaleEnergyLoss(nn.Module):
    """Errors of a signal and of its ever coarser averages, each half as long.

    sum_s mean |mean_{2^s} (x - t)|

    Source: Zhao et al., "Loss functions for image restoration with neural networks", 2017, in one dimension.
    """

    def __init__(self, scales: int = 3):
        super().__init__()
        self.scales = scales

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        error = predictions - targets
        loss = error.abs().mean()
        for _ in range(self.scales - 1):
            even = error.shape[-1] // 2 * 2
            error = 0.5 * (error[..., 0:even:2] + error[..., 1:even:2])
            loss = loss + error.abs().mean()
        return loss


# torch has no Fourier transform of bfloat16
LOSSES = (
    Entry(SpectralMagnitudeLoss, pair, ((2, 15), (3, 8)), (1024, 16384), left_to_torch=("_fft_r2c",), dtypes=WIDE),
    Entry(STFTLoss, pair, ((2, 25), (1, 40)), (256, 65536), left_to_torch=("_fft_r2c",), dtypes=WIDE),
    Entry(SISDRLoss, pair, ((3, 17), (2, 2, 9)), (256, 65536)),
    Entry(MultiscaleEnergyLoss, pair, ((2, 9), (3, 14)), (256, 65536)),
)
