"""What the corpus says of each of its losses, and how inputs are drawn for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_losses.specs import Sample

Shape = tuple[int, ...]
Loss = Callable[..., Tensor]


class Draw:
    """Random tensors from a seed, in one floating dtype."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype) * std + mean

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=self.dtype) * (high - low) + low

    def integers(self, *shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def mask(self, *shape: int, share: float = 0.5) -> Tensor:
        """True for about a share of the elements, and for the first."""
        chosen = torch.rand(shape, generator=self.generator) < share
        chosen.view(-1)[:1] = True
        return chosen

    def binary(self, *shape: int, share: float = 0.5) -> Tensor:
        """The same as numbers, 0 and 1."""
        return self.mask(*shape, share=share).to(self.dtype)

    def signs(self, *shape: int) -> Tensor:
        return 2 * self.binary(*shape) - 1


@dataclass(frozen=True)
class Entry:
    """A published loss, written plainly, and what it is called with.

    Args:
        loss: a module class that needs no arguments, or a function.
        inputs: draws the arguments of a call from a shape, which is the first argument's unless said otherwise.
        shapes: small ones, of odd sizes and several ranks.
        bench: one with about 16M elements, whose first dimension can be scaled.
        gradients: the arguments that get gradients in training.
        left_to_torch: the operators that no kernel is generated for; empty where the loss is fused wholly.
        dtypes: in which the plain loss runs.
    """

    loss: type[nn.Module] | Loss
    inputs: Callable[[Draw, Shape], tuple[Tensor, ...]]
    shapes: tuple[Shape, ...]
    bench: Shape
    gradients: tuple[int, ...] = (0,)
    left_to_torch: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)

    @property
    def name(self) -> str:
        return self.loss.__name__

    def build(self) -> Loss:
        return self.loss() if isinstance(self.loss, type) else self.loss

    def sample(self, shape: Shape) -> Sample:
        """A call in fp64."""
        return Sample("x".join(map(str, shape)), self.inputs(Draw(sum(shape), torch.float64), shape))

    def samples(self) -> list[Sample]:
        return [self.sample(shape) for shape in self.shapes]

    def bench_shape(self, scale: float) -> Shape:
        return max(1, round(self.bench[0] * scale)), *self.bench[1:]

    def bench_inputs(self, scale: float = 1.0) -> tuple[Tensor, ...]:
        """A large call in fp32; those of ``gradients`` require grad."""
        tensors = self.inputs(Draw(0, torch.float32), self.bench_shape(scale))
        return tuple(tensor.requires_grad_(i in self.gradients) for i, tensor in enumerate(tensors))


def reduce(values: Tensor, reduction: str) -> Tensor:
    """One loss for each element or sample: as they are, added up, or their mean."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.mean()
    raise ValueError(f"reduction is one of none, sum and mean, got {reduction!r}")


# Shapes, dtypes and draws that many losses share.
WIDE = (torch.float64, torch.float32)
VECTORS = ((7,), (5, 3), (2, 3, 5))
ROWS = ((5, 4), (7, 3))
IMAGES = ((2, 3, 5, 7), (1, 2, 4, 3))


def pair(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    """Predictions and targets of unit variance."""
    return draw.normal(*shape), draw.normal(*shape)


def positive_pair(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    return draw.uniform(*shape, low=0.1, high=3.0), draw.uniform(*shape, low=0.1, high=3.0)


def logits_and_labels(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    """Logits (N, C, ...) and the classes (N, ...)."""
    return draw.normal(*shape, std=2.0), draw.integers(shape[0], *shape[2:], below=shape[1])


def logits_and_mask(draw: Draw, shape: Shape) -> tuple[Tensor, Tensor]:
    """Logits and, for each, whether it should be positive: 0 or 1."""
    return draw.normal(*shape, std=2.0), draw.binary(*shape, share=0.3)
