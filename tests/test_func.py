"""torch.func, forward-mode AD and higher derivatives: nothing is silently zero."""

import pytest
import torch
from sets import each_pair, each_spec
from torch.autograd import forward_ad

from fused_losses.functional import cross_entropy, mse_loss
from fused_losses.specs import Sample
from fused_losses.testing import check_loss


def scalar(spec, device):
    return next(s for s in spec.samples() if s.name.split("-")[0] == "sum").to(torch.float64, device)


def functions(spec, sample, backend):
    """The loss as a function of its first tensor: ours and the reference's."""
    rest = sample.tensors[1:]
    modules = [spec.build(sample, name) for name in (backend, "reference")]
    return [lambda x, module=module: module(x, *rest) for module in modules]


@each_spec
def test_check(spec, backend, device):
    for sample in spec.samples():
        moved = sample.to(torch.float64, device)
        loss, reference = spec.build(moved, backend), spec.build(moved, "reference")
        check_loss(loss, reference, [moved], dtypes=(torch.float64, torch.float32), checks=["transforms"])


@each_pair
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "grad_and_value"])
def test_transforms_of_transforms(spec, transform, backend, device):
    sample = scalar(spec, device)
    small = Sample("two rows", tuple(tensor[:2] for tensor in sample.tensors), sample.options)
    ours, theirs = (getattr(torch.func, transform)(f)(small.tensors[0]) for f in functions(spec, small, backend))
    torch.testing.assert_close(ours, theirs)


@each_pair
def test_forward_mode(spec, backend, device):
    sample = scalar(spec, device)
    results = []
    for function in functions(spec, sample, backend):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(sample.tensors[0], torch.ones_like(sample.tensors[0]))
            results.append(forward_ad.unpack_dual(function(dual)).tangent)
    assert results[0] is not None
    torch.testing.assert_close(*results)


@each_pair
@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobian_of_an_unreduced_loss(spec, vectorize, backend, device):
    """Vectorised, the backward operator meets batched tensors."""
    sample = next(s for s in spec.samples() if s.name.split("-")[0] == "none").to(torch.float64, device)
    rest = sample.tensors[1][:3]
    ours, theirs = (
        torch.autograd.functional.jacobian(lambda x, b=b: spec.build(sample, b)(x, rest), x, vectorize=vectorize)
        for b in (backend, "reference")
        for x in [sample.tensors[0][:3]]
    )
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().sum() > 0


@each_pair
def test_second_derivative_of_every_pair_of_inputs(spec, backend, device):
    """Also the mixed one, of input and target."""
    chosen = "probabilities_sum" if spec.family == "softmax" else "sample_weight"
    sample = next(s for s in spec.samples() if s.name == chosen).to(torch.float64, device)
    results = []
    for name in (backend, "reference"):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in sample.tensors]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        loss = spec.build(sample, name)(*leaves, **sample.extras)
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first) + loss, wanted)
        results.append((*first, *second))
    torch.testing.assert_close(*results)


def test_per_sample_gradients(backend, device):
    """vmap of grad, as differential privacy takes it."""
    x, y = torch.randn(5, 7, device=device), torch.randint(7, (5,), device=device)
    each = torch.func.vmap(torch.func.grad(lambda x, y: cross_entropy(x, y, backend=backend)))(x, y)
    expected = torch.softmax(x, 1) - torch.nn.functional.one_hot(y, 7)
    torch.testing.assert_close(each, expected)


def test_functional_call_with_grad(backend, device):
    model = torch.nn.Linear(4, 3, device=device)
    x, t = torch.randn(5, 4, device=device), torch.randn(5, 3, device=device)

    def loss(parameters):
        return mse_loss(torch.func.functional_call(model, parameters, (x,)), t, backend=backend)

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    mse_loss(model(x), t, backend="reference").backward()
    torch.testing.assert_close(gradients["weight"], model.weight.grad)
