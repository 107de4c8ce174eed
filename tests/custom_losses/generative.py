"""Losses of variational autoencoders, diffusion models and adversarial training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import ROWS, VECTORS, Draw, Entry, Shape, pair, reduce


class EvidenceLowerBoundLoss(nn.Module):
    """Negative evidence lower bound of an autoencoder of binary data (N, D) with a normal code (N, Z).

    mean_n (sum_d bce(x, t) + weight sum_z (exp(v) + m^2 - 1 - v) / 2)

    Source: Kingma and Welling, "Auto-encoding variational Bayes", 2014; Higgins et al., "beta-VAE", 2017.
    """

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, logits: Tensor, data: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        reconstruction = F.binary_cross_entropy_with_logits(logits, data, reduction="none").sum(dim=1)
        kl = 0.5 * (torch.expm1(log_variance) + mean.square() - log_variance).sum(dim=1)
        return (reconstruction + self.weight * kl).mean()


class FreeBitsKLLoss(nn.Module):
    """Divergence of a normal code from the prior; what a dimension has below some nats costs nothing.

    sum_z max(free, mean_n (exp(v) + m^2 - 1 - v) / 2)

    Source: Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016.
    """

    def __init__(self, free: float = 0.5):
        super().__init__()
        self.free = free

    def forward(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        kl = 0.5 * (torch.expm1(log_variance) + mean.square() - log_variance)
        return kl.mean(dim=0).clamp(min=self.free).sum()


class MaximumMeanDiscrepancyLoss(nn.Module):
    """Distance between two samples (N, D) in the space of a Gaussian kernel, as InfoVAE takes it.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), with k(x, y) = exp(-|x - y|^2 / (2 s^2 D))

    Source: Gretton et al., "A kernel two-sample test", 2012; Zhao, Song and Ermon, "InfoVAE", 2019.
    """

    def __init__(self, bandwidth: float = 1.0):
        super().__init__()
        self.bandwidth = bandwidth

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        squared = x.square().sum(dim=1).unsqueeze(1) + y.square().sum(dim=1) - 2 * x @ y.T
        return torch.exp(-squared.clamp(min=0) / (2 * self.bandwidth**2 * x.shape[1]))

    def forward(self, codes: Tensor, prior: Tensor) -> Tensor:
        within = self.kernel(codes, codes).mean() + self.kernel(prior, prior).mean()
        return within - 2 * self.kernel(codes, prior).mean()


class DiscretizedLogisticLoss(nn.Module):
    """Negative log-likelihood of bytes, scaled to [-1, 1], under logistic distributions.

    -log(sigmoid((t - m + 1/255) / s) - sigmoid((t - m - 1/255) / s)), with the outermost bytes open-ended

    Source: Salimans et al., "PixelCNN++", 2017.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, mean: Tensor, log_scale: Tensor, pixels: Tensor) -> Tensor:
        centered, inverse = pixels - mean, torch.exp(-log_scale)
        upper, lower = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255)
        middle = inverse * centered
        log_density = middle - log_scale - 2 * F.softplus(middle)
        mass = torch.sigmoid(upper) - torch.sigmoid(lower)
        # A mass that is a difference of nearly equal numbers is taken as density times width.
        inner = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), log_density - math.log(127.5))
        log_p = torch.where(pixels > 0.999, -F.softplus(lower), inner)
        return reduce(-torch.where(pixels < -0.999, F.logsigmoid(upper), log_p), self.reduction)


class VectorQuantizationLoss(nn.Module):
    """Moves the nearest codes to the encoder's outputs, and those, less strongly, to their codes.

    |stop(z) - e|^2 + commitment |z - stop(e)|^2

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", 2017.
    """

    def __init__(self, commitment: float = 0.25):
        super().__init__()
        self.commitment = commitment

    def forward(self, outputs: Tensor, codes: Tensor) -> Tensor:
        return F.mse_loss(codes, outputs.detach()) + self.commitment * F.mse_loss(outputs, codes.detach())


class MinSNRLoss(nn.Module):
    """Mean squared error of a predicted noise (N, ...), weighted by the signal-to-noise ratio (N,) of its time step.

    min(snr, gamma) / snr |x - t|^2

    Source: Hang et al., "Efficient diffusion training via min-SNR weighting strategy", 2023.
    """

    def __init__(self, gamma: float = 5.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, predictions: Tensor, noise: Tensor, snr: Tensor) -> Tensor:
        error = F.mse_loss(predictions, noise, reduction="none").flatten(1).mean(dim=1)
        return (snr.clamp(max=self.gamma) / snr * error).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Scores of a discriminator: real ones above 1, generated ones below -1.

    mean(max(0, 1 - real)) + mean(max(0, 1 + fake))

    Source: Lim and Ye, "Geometric GAN", 2017.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def non_saturating_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Scores of a discriminator as logits.

    mean(softplus(-real)) + mean(softplus(fake))

    Source: Goodfellow et al., "Generative adversarial nets", 2014.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


class RelativisticAverageLoss(nn.Module):
    """A real sample should look more real than generated ones do on average, and the other way round.

    mean(softplus(-(real - mean fake))) + mean(softplus(fake - mean real))

    Source: Jolicoeur-Martineau, "The relativistic discriminator", 2019.
    """

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        above, below = real - fake.mean(), fake - real.mean()
        return F.softplus(-above).mean() + F.softplus(below).mean()


class WassersteinCriticLoss(nn.Module):
    """A critic's scores (N,), and the gradients (N, ...) of its scores of interpolated samples, of norm 1.

    mean fake - mean real + weight mean((|g|_2 - 1)^2) + drift mean real^2

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", 2017; Karras et al., 2018, for the drift.
    """

    def __init__(self, weight: float = 10.0, drift: float = 1e-3):
        super().__init__()
        self.weight = weight
        self.drift = drift

    def forward(self, gradients: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        norm = gradients.flatten(1).norm(dim=1)
        penalty = (norm - 1).square().mean()
        return fake.mean() - real.mean() + self.weight * penalty + self.drift * real.square().mean()


def autoencoder(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    code = shape[0], max(2, shape[1] // 8)
    return draw.normal(*shape), draw.binary(*shape), draw.normal(*code), draw.normal(*code)


def pixels(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    levels = draw.integers(*shape, below=256).to(draw.dtype) / 127.5 - 1
    return draw.normal(*shape, std=0.5), draw.normal(*shape, mean=-2.0, std=0.5), levels


def noise(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return *pair(draw, shape), draw.uniform(shape[0], low=0.1, high=20.0)


def critic(draw: Draw, shape: Shape) -> tuple[Tensor, ...]:
    return draw.normal(*shape), draw.normal(shape[0]), draw.normal(shape[0])


LOSSES = (
    Entry(EvidenceLowerBoundLoss, autoencoder, ((5, 7), (3, 17)), (16384, 1024), gradients=(0, 2, 3)),
    Entry(FreeBitsKLLoss, pair, ((7, 3), (5, 4)), (65536, 256), gradients=(0, 1)),
    Entry(MaximumMeanDiscrepancyLoss, pair, ((5, 3), (7, 2)), (2048, 64), left_to_torch=("mm",)),
    Entry(DiscretizedLogisticLoss, pixels, ((7,), (2, 3, 5)), (16, 4, 512, 512), gradients=(0, 1)),
    Entry(VectorQuantizationLoss, pair, ROWS, (65536, 256), gradients=(0, 1)),
    Entry(MinSNRLoss, noise, ((5, 7), (2, 3, 2, 3)), (64, 4, 256, 256)),
    Entry(hinge_discriminator_loss, pair, VECTORS, (64, 512, 512), gradients=(0, 1)),
    Entry(non_saturating_loss, pair, VECTORS, (64, 512, 512), gradients=(0, 1)),
    Entry(RelativisticAverageLoss, pair, VECTORS, (64, 512, 512), gradients=(0, 1)),
    Entry(WassersteinCriticLoss, critic, ((5, 7), (2, 3, 4)), (64, 512, 512), gradients=(0, 1, 2)),
)
