"""Residuals of differential equations on grids, by finite differences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .entry import Draw, Entry, Shape, pair


class HeatResidualLoss(nn.Module):
    """Heat equation with a diffusivity that is learnt from the data; fields (N, time, space).

    mean((u_t - a u_xx)^2), with a = exp(log_diffusivity), forward in time and central in space

    Source: Raissi, Perdikaris and Karniadakis, "Physics-informed neural networks", 2019, section 4.
    """

    def __init__(self, time_step: float = 0.1, space_step: float = 0.5):
        super().__init__()
        self.log_diffusivity = nn.Parameter(torch.tensor(0.0))
        self.time_step = time_step
        self.space_step = space_step

    def forward(self, fields: Tensor) -> Tensor:
        inner = fields[:, :-1, 1:-1]
        time_derivative = (fields[:, 1:, 1:-1] - inner) / self.time_step
        curvature = (fields[:, :-1, 2:] - 2 * inner + fields[:, :-1, :-2]) / self.space_step**2
        return (time_derivative - self.log_diffusivity.exp() * curvature).square().mean()


class BurgersResidualLoss(nn.Module):
    """Viscous Burgers equation, and the data where it was measured; fields (N, time, space).

    mean((u_t + u u_x - nu u_xx)^2) + weight mean((u - data)^2)

    Source: Raissi, Perdikaris and Karniadakis, "Physics-informed neural networks", 2019, section 3.
    """

    def __init__(self, viscosity: float = 0.05, time_step: float = 0.1, space_step: float = 0.5, weight: float = 1.0):
        super().__init__()
        self.viscosity = viscosity
        self.time_step = time_step
        self.space_step = space_step
        self.weight = weight

    def forward(self, fields: Tensor, data: Tensor) -> Tensor:
        u = fields[:, 1:-1, 1:-1]
        u_t = (fields[:, 2:, 1:-1] - fields[:, :-2, 1:-1]) / (2 * self.time_step)
        left, right = fields[:, 1:-1, :-2], fields[:, 1:-1, 2:]
        u_x = (right - left) / (2 * self.space_step)
        u_xx = (right - 2 * u + left) / self.space_step**2
        residual = u_t + u * u_x - self.viscosity * u_xx
        return residual.square().mean() + self.weight * (fields - data).square().mean()


def divergence_loss(velocities: Tensor, step: float = 0.1) -> Tensor:
    """Incompressibility of flows (N, 2, H, W) on a periodic grid.

    mean((dx v_x + dy v_y)^2), by central differences

    Source: Tompson et al., "Accelerating Eulerian fluid simulation with convolutional networks", 2017.
    """
    v_x, v_y = velocities[:, 0], velocities[:, 1]
    dx = v_x.roll(-1, dims=2) - v_x.roll(1, dims=2)
    dy = v_y.roll(-1, dims=1) - v_y.roll(1, dims=1)
    return ((dx + dy) / (2 * step)).square().mean()


class SobolevLoss(nn.Module):
    """Relative error in the norm of values and first derivatives, on periodic grids (N, H, W).

    sqrt((|d|^2 + w |grad d|^2) / (|t|^2 + w |grad t|^2)), with d = x - t, averaged over N

    Source: Li et al., "Learning dissipative dynamics in chaotic systems", 2022.
    """

    def __init__(self, weight: float = 1.0, step: float = 1.0):
        super().__init__()
        self.weight = weight
        self.step = step

    def squared_norm(self, fields: Tensor) -> Tensor:
        dy = (fields.roll(-1, dims=1) - fields.roll(1, dims=1)) / (2 * self.step)
        dx = (fields.roll(-1, dims=2) - fields.roll(1, dims=2)) / (2 * self.step)
        return (fields.square() + self.weight * (dx.square() + dy.square())).sum(dim=(1, 2))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return torch.sqrt(self.squared_norm(predictions - targets) / self.squared_norm(targets)).mean()


def field(draw: Draw, shape: Shape) -> tuple[Tensor]:
    return (draw.normal(*shape),)


LOSSES = (
    Entry(HeatResidualLoss, field, ((2, 5, 7), (1, 3, 4)), (64, 512, 512)),
    Entry(BurgersResidualLoss, pair, ((2, 5, 7), (1, 3, 4)), (64, 512, 512)),
    Entry(divergence_loss, field, ((2, 2, 5, 7), (1, 2, 3, 4)), (8, 2, 1024, 1024)),
    Entry(SobolevLoss, pair, ((2, 5, 7), (3, 3, 4)), (64, 512, 512)),
)
