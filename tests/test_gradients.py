"""Gradients against fp64 truth: any upstream gradient, any subset of inputs, again and again."""

import pytest
import torch
from sets import dtypes_in_turn, each_pair, each_spec

from fused_losses.testing import check_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_on(samples, spec, check, backend, device):
    for sample, dtypes in samples:
        moved = sample.to(torch.float64, device)
        loss, reference = spec.build(moved, backend), spec.build(moved, "reference")
        check_loss(loss, reference, [moved], dtypes=dtypes, checks=[check])


@each_spec
def test_gradient(spec, kernels, device):
    check_on([(sample, DTYPES) for sample in spec.samples()], spec, "gradient", kernels, device)


@each_spec
@pytest.mark.parametrize("check", ["upstream", "linearity", "subsets"])
def test_is_as_accurate_as_the_reference(spec, check, kernels, device):
    check_on(dtypes_in_turn(spec.samples()), spec, check, kernels, device)


@each_spec
@pytest.mark.parametrize("check", ["repeated_backward", "double_backward", "gradcheck"])
def test_check(spec, check, backend, device):
    check_on([(sample, DTYPES) for sample in spec.samples()], spec, check, backend, device)


@each_pair
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_upstream_of_another_dtype(spec, dtype, kernels, device):
    """An operator called with a wider or narrower upstream gradient than its loss reads it as it is."""
    for name in ("mean", "none"):
        sample = next(s for s in spec.samples() if s.name.split("-")[0] == name).to(torch.float32, device)
        loss = spec.build(sample, kernels)
        x = sample.tensors[0].clone().requires_grad_()
        value = loss(x, *sample.tensors[1:])
        upstream = torch.linspace(1, 2, value.numel(), device=device).to(dtype).view(value.shape)
        expected = torch.autograd.grad(value, x, upstream.to(value.dtype), retain_graph=True)[0]
        got = value.grad_fn.apply(upstream)[0]
        torch.testing.assert_close(got, expected)


@each_pair
def test_expanded_and_strided_upstream(spec, kernels, device):
    """What sum().backward() and a transposed consumer hand back."""
    sample = next(s for s in spec.samples() if s.name.split("-")[0] == "none").to(torch.float32, device)
    loss = spec.build(sample, kernels)
    x = sample.tensors[0].clone().requires_grad_()
    value = loss(x, *sample.tensors[1:])
    one = torch.full((1,) * value.ndim, 0.7, device=device).expand(value.shape)
    strided = torch.rand([2 * n for n in value.shape], device=device)[tuple(slice(1, None, 2) for _ in value.shape)]
    for upstream in (one, strided, strided.flip(0)):
        expected = torch.autograd.grad(value, x, upstream.contiguous(), retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(value, x, upstream, retain_graph=True)[0], expected)


@each_pair
def test_learnt_weights_get_gradients(spec, backend, device):
    """A weight that requires grad is an input like any other."""
    sample = next(s for s in spec.samples() if s.name == "sample_weight").to(torch.float64, device)
    weight = sample.extras["sample_weight"].clone().requires_grad_()
    gradients = [
        torch.autograd.grad(spec.build(sample, name)(*sample.tensors, sample_weight=weight), weight)[0]
        for name in (backend, "reference")
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


@each_pair
def test_a_learnt_normalizer_gets_a_gradient(spec, backend, device):
    sample = spec.samples()[0].to(torch.float64, device)
    tokens = torch.tensor(5.0, dtype=torch.float64, device=device, requires_grad=True)
    options = {**sample.options, "reduction": "mean"}
    loss = spec.loss(**options, backend=backend)(*sample.tensors, normalizer=tokens)
    torch.testing.assert_close(torch.autograd.grad(loss, tokens)[0], -loss.detach() / tokens.detach())
