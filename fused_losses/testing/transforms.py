"""A loss under the transforms of torch.func; each function returns tensors to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .case import Case, Loss, gradients_of, leaves


def _summed(loss: Loss, case: Case) -> Any:
    return lambda *tensors: loss(*tensors, **case.extras).sum()


def grad(loss: Loss, case: Case) -> Sequence[Tensor]:
    return torch.func.grad(_summed(loss, case), argnums=case.floating)(*case.tensors)


def vmap(loss: Loss, case: Case) -> Sequence[Tensor]:
    twice = [torch.stack([t, t.flip(0) if t.ndim else t]) for t in case.tensors]
    return [torch.func.vmap(lambda *tensors: loss(*tensors, **case.extras))(*twice)]


def jvp(loss: Loss, case: Case) -> Sequence[Tensor]:
    def of_floating(*floating: Tensor) -> Tensor:
        rest = iter(floating)
        return loss(*(next(rest) if i in case.floating else t for i, t in enumerate(case.tensors)), **case.extras)

    primals = tuple(case.tensors[i] for i in case.floating)
    return torch.func.jvp(of_floating, primals, tuple(torch.ones_like(p) for p in primals))


def batched_gradient(loss: Loss, case: Case) -> Sequence[Tensor]:
    """Several upstream gradients at once, as a vectorised Jacobian takes them."""
    arguments = leaves([t.contiguous() for t in case.tensors], case.floating)
    value = loss(*arguments, **case.extras)
    each = torch.stack([torch.ones_like(value), torch.full_like(value, 3.0)])
    return gradients_of(value, [arguments[i] for i in case.floating], each, is_grads_batched=True)


TRANSFORMS = (grad, vmap, jvp, batched_gradient)
