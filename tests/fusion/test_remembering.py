"""What passes over memory have in common is kept where it takes long to compute, and nowhere else."""

import pytest
import torch

from fused_losses import fuse


def smoothness(depths, images):
    """Per image over its mean, with gradients that go through the mean: every pixel's is in two passes."""
    relative = depths / (depths.mean((1, 2), keepdim=True) + 1e-3)
    down = (relative.diff(dim=1).abs() * torch.exp(-images.diff(dim=1).abs())).mean()
    return down + (relative.diff(dim=2).abs() * torch.exp(-images.diff(dim=2).abs())).mean()


def rows(depths, images):
    """The same of rows, which stay in cache from one loop to the next."""
    relative = depths / (depths.mean(1, keepdim=True) + 1e-3)
    weights = torch.exp(-images.abs()) * torch.exp(-images.square()) * torch.exp(images.sin())
    return (torch.tanh(relative).exp() * weights * torch.log1p(relative)).mean()


def quick(depths, images):
    """What is quick to compute is computed again."""
    relative = depths / (depths.mean((1, 2), keepdim=True) + 1e-3)
    return (relative * images).square().mean()


def inputs(loss, dtype):
    shape = (3, 40) if loss is rows else (3, 9, 11)
    return [torch.rand(shape, dtype=dtype, generator=torch.manual_seed(0)).requires_grad_() for _ in range(2)]


def kept_of(loss, dtype):
    """The buffers that kernels keep for others, as the forward pass of a call writes them."""
    fused, given = fuse(loss, strict=True), inputs(loss, dtype)
    result = fused(*given)
    result.backward()
    explanation = fused.explain()
    steps = [*explanation.forward.steps, *(explanation.backward.steps if explanation.backward else [])]
    plain = [each.detach().double().requires_grad_() for each in given]
    wanted = loss(*plain)
    wanted.backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(result.double(), wanted, rtol=tolerance, atol=0)
    for own, other in zip(given, plain):
        torch.testing.assert_close(
            own.grad.double(), other.grad, rtol=tolerance, atol=tolerance * other.grad.abs().max()
        )
    return {name for step in steps for name in step.writes if name.startswith("k")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_costly_is_kept_for_the_next_pass(dtype):
    assert len(kept_of(smoothness, dtype)) == 1


@pytest.mark.parametrize("loss", [rows, quick])
def test_what_is_in_cache_or_quick_is_computed_again(loss):
    assert not kept_of(loss, torch.float32)


def test_low_precision_is_not_rounded_on_the_way():
    assert not kept_of(smoothness, torch.bfloat16)
