"""What a loss may be given and give back: containers of tensors, and results of every dtype."""

import dataclasses
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from test_fuse import built, pair

from fused_losses import fuse


class SimpleOutput(OrderedDict):
    """As models of many libraries return."""


def test_structures_of_arguments_and_results():
    @fuse(strict=True)
    def elbo(outputs, target, options=None):
        mean, spread = outputs["mean"], outputs["parts"][0]
        fit = (mean - target).square().sum()
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum()
        return {"loss": fit + options["beta"] * divergence, "parts": (fit.detach(), divergence)}

    x, y = (t.requires_grad_() for t in pair(4, 3))
    arguments = {"mean": x, "parts": [y]}, torch.zeros(4, 3)
    found, expected = (f(*arguments, options={"beta": 0.5}) for f in (elbo, elbo.__wrapped__))
    torch.testing.assert_close(found, expected)
    assert not found["parts"][0].requires_grad
    gradients = [torch.autograd.grad(r["loss"] + r["parts"][1], [x, y]) for r in (found, expected)]
    torch.testing.assert_close(*gradients)


class Pair(NamedTuple):
    mean: torch.Tensor
    spread: torch.Tensor


@dataclasses.dataclass
class Prediction:
    mean: torch.Tensor
    spread: torch.Tensor


@pytest.mark.parametrize("kind", [Pair, Prediction, lambda *pair: SimpleOutput(zip(["mean", "spread"], pair))])
def test_containers_of_arguments(kind):
    """The tensors in them are arguments, new ones in every call."""

    @fuse(strict=True)
    def likelihood(outputs, target):
        mean, spread = (getattr(outputs, name, None) for name in ("mean", "spread"))
        if mean is None:
            mean, spread = outputs["mean"], outputs["spread"]
        return (((mean - target) / spread.exp()).square() + 2 * spread).mean()

    for seed in (0, 1):
        leaves = [t.requires_grad_() for t in pair(4, 3, seed=seed)]
        results = [f(kind(*leaves), torch.ones(4, 3)) for f in (likelihood, likelihood.__wrapped__)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*[torch.autograd.grad(result, leaves) for result in results])
    assert built(likelihood) == 1


def test_results_of_every_kind():
    @fuse(strict=True)
    def parts(x, t):
        error = (x - t).square()
        return {
            "mean": error.mean(),
            "half": [error.mean().half(), error.sum(1).bfloat16()],
            "where": (error.argmax(1), error.max(0).indices),
            "count": (error > 1).sum(),
            "wrong": error > 1,
            "short": error.int(),
        }

    x, t = pair(5, 7)
    found, expected = (f(x.requires_grad_(), t) for f in (parts, parts.__wrapped__))
    torch.testing.assert_close(found, expected)
    assert {name for name, result in found.items() if getattr(result, "requires_grad", False)} == {"mean"}
    gradients = [torch.autograd.grad(r["mean"] + r["half"][0] + r["half"][1].sum(), x)[0] for r in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-2)
