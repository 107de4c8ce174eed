"""A loss on one sample, beside its reference in the same dtype and in fp64, and how they are run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..specs import Sample, convert

Loss = Callable[..., Tensor]
Upstream = float | Tensor


@dataclass(frozen=True)
class Case:
    """A loss on one sample in one dtype, its reference there, and the truth: the reference in fp64."""

    loss: Loss
    reference: Loss
    truth: Loss
    tensors: tuple[Tensor, ...]
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def floating(self) -> tuple[int, ...]:
        """The arguments that may require grad."""
        return tuple(i for i, tensor in enumerate(self.tensors) if tensor.is_floating_point())

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def rearranged(self, rearrange: Callable[[Tensor], Tensor], only: int | None = None) -> Case:
        """The same values in another memory layout: of one argument, or of every tensor."""
        if only is not None:
            moved = tuple(rearrange(t) if i == only else t for i, t in enumerate(self.tensors))
            return replace(self, tensors=moved)
        extras = {name: rearrange(v) if isinstance(v, Tensor) else v for name, v in self.extras.items()}
        return replace(self, tensors=tuple(map(rearrange, self.tensors)), extras=extras)

    def in_double(self) -> Case:
        """The case in fp64, where the reference is the truth."""
        extras = {name: cast(value, torch.float64) for name, value in self.extras.items()}
        tensors = tuple(cast(tensor, torch.float64) for tensor in self.tensors)
        return Case(_module_in(self.loss, torch.float64), self.truth, self.truth, tensors, extras)


def make_case(loss: Loss, reference: Loss, sample: Sample, dtype: torch.dtype) -> Case:
    """A case in a dtype, from a sample in any floating dtype."""
    ours, theirs = _module_in(loss, dtype), _module_in(reference, dtype)
    truth = _module_in(theirs, torch.float64)  # with weights as the dtype rounds them
    moved = sample.to(dtype)
    return Case(ours, theirs, truth, moved.tensors, moved.extras)


def _module_in(loss: Loss, dtype: torch.dtype) -> Loss:
    return copy.deepcopy(loss).to(dtype) if isinstance(loss, nn.Module) else loss


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in a dtype, in its memory layout; anything else as it is."""
    return convert(value, dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def leaves(tensors: Sequence[Tensor], needed: Sequence[int]) -> list[Tensor]:
    """Copies in the same memory layout, of which some require grad."""
    return [convert(t, t.dtype).requires_grad_(i in needed) for i, t in enumerate(tensors)]


def upstream_like(value: Tensor, upstream: Upstream) -> Tensor:
    """An upstream gradient for a loss: one number for all elements, or one for each."""
    if isinstance(upstream, Tensor):
        return upstream.to(value.device, value.dtype)
    return torch.full_like(value, upstream)


def gradients_of(value: Tensor, inputs: Sequence[Tensor], upstream: Tensor | None = None, **options: Any) -> Any:
    """Gradients, which are 0 where an input has no influence, as a target that is only compared with has none."""
    if not value.requires_grad:
        return tuple(map(torch.zeros_like, inputs))
    return torch.autograd.grad(value, inputs, upstream, allow_unused=True, materialize_grads=True, **options)


def run(
    loss: Loss,
    tensors: Sequence[Tensor],
    extras: Mapping[str, Any],
    needed: Sequence[int],
    upstream: Upstream = 1.0,
) -> list[Tensor]:
    """The loss and its gradients with respect to some inputs."""
    arguments = leaves(tensors, needed)
    value = loss(*arguments, **extras)
    if not needed:
        return [value.detach()]
    gradients = gradients_of(value, [arguments[i] for i in needed], upstream_like(value, upstream))
    return [value.detach(), *gradients]
