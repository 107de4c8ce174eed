"""How the losses live in a graph: hooks, checkpoints, frozen parts, saved tensors, threads."""

import threading
import weakref

import pytest
import torch
from sets import each_spec
from torch.utils.checkpoint import checkpoint

from fused_losses import CrossEntropyLoss, MSELoss
from fused_losses.functional import cross_entropy


def first(spec, device, dtype=torch.float32):
    return spec.samples()[0].to(dtype, device)


def gradient(loss, x, *rest):
    return torch.autograd.grad(loss(x, *rest).sum(), x)[0]


@each_spec
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(spec, reentrant, backend, device):
    sample = first(spec, device)
    loss, x = spec.build(sample, backend), sample.tensors[0].clone().requires_grad_()
    expected = gradient(lambda x, *rest: loss(x * 0.5, *rest), x, *sample.tensors[1:])
    checkpoint(lambda x: loss(x * 0.5, *sample.tensors[1:]).sum(), x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected)


@each_spec
def test_saved_tensors_can_be_moved_away(spec, backend, device):
    sample = first(spec, device)
    loss, x = spec.build(sample, backend), sample.tensors[0].clone().requires_grad_()
    expected = gradient(loss, x, *sample.tensors[1:])
    with torch.autograd.graph.save_on_cpu():
        value = loss(x, *sample.tensors[1:])
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], expected)


@each_spec
def test_a_changed_input_is_noticed(spec, kernels, device):
    """Writing to what backward reads must raise, not give another gradient."""
    sample = first(spec, device)
    x = sample.tensors[0].clone().requires_grad_()
    y = x * 1.0
    value = spec.build(sample, kernels)(y, *sample.tensors[1:])
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@each_spec
def test_the_graph_is_freed(spec, backend, device):
    sample = first(spec, device)
    x = sample.tensors[0].clone().requires_grad_()
    value = spec.build(sample, backend)(x, *sample.tensors[1:]).sum()
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@each_spec
def test_no_reference_cycle_keeps_inputs(spec, backend, device):
    sample = first(spec, device)
    x = sample.tensors[0].clone().requires_grad_()
    gone = weakref.ref(x)
    value = spec.build(sample, backend)(x, *sample.tensors[1:])
    del x, value
    assert gone() is None


@each_spec
def test_hooks_and_accumulation(spec, backend, device):
    sample = first(spec, device)
    loss, x = spec.build(sample, backend), sample.tensors[0].clone().requires_grad_()
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()))
    for _ in range(2):
        loss(x, *sample.tensors[1:]).sum().backward()
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(x.grad, seen[0] * 2)


@each_spec
def test_the_loss_may_be_scaled_in_place(spec, backend, device):
    """Trainers multiply it by processes and divide it by steps, before backward."""
    sample = first(spec, device)
    loss, x = spec.build(sample, backend), sample.tensors[0].clone().requires_grad_()
    expected = gradient(loss, x, *sample.tensors[1:])
    value = loss(x, *sample.tensors[1:])
    value *= 3.0
    value /= 2.0
    value.sum().backward()
    torch.testing.assert_close(x.grad, expected * 1.5)


@each_spec
def test_anomaly_mode(spec, backend, device):
    sample = first(spec, device)
    x = sample.tensors[0].clone().requires_grad_()
    expected = gradient(spec.build(sample, backend), x, *sample.tensors[1:])
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        assert torch.equal(gradient(spec.build(sample, backend), x, *sample.tensors[1:]), expected)


@each_spec
def test_several_python_threads(spec, backend, device):
    sample = first(spec, device)
    loss = spec.build(sample, backend)
    expected = gradient(loss, sample.tensors[0].clone().requires_grad_(), *sample.tensors[1:])
    results = []

    def work():
        for _ in range(5):
            results.append(gradient(loss, sample.tensors[0].clone().requires_grad_(), *sample.tensors[1:]))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15 and all(torch.equal(result, expected) for result in results)


def test_penalty_on_the_gradient_under_autocast(kernels, device):
    """The second derivative is taken in the precision of the loss, not of the logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 50, generator=generator).bfloat16().to(device).requires_grad_()
    t = torch.randn(8, 50, generator=generator).bfloat16().to(device)
    labels = torch.randint(50, (8,), generator=generator).to(device)
    for loss, target in ((MSELoss(backend=kernels), t), (CrossEntropyLoss(backend=kernels), labels)):
        with torch.autocast(device, torch.bfloat16):
            value = loss(x, target)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        wide = x.detach().double().requires_grad_()
        truth = type(loss)(backend="reference")(wide, target.double() if target.is_floating_point() else target)
        (exact,) = torch.autograd.grad(truth, wide, create_graph=True)
        torch.testing.assert_close(first.double(), exact, rtol=2**-8, atol=1e-9)
        second = torch.autograd.grad(first.float().square().sum(), x)[0]
        expected = torch.autograd.grad(exact.square().sum(), wide)[0]
        torch.testing.assert_close(second.double(), expected, rtol=2**-5, atol=float(expected.abs().max()) / 64)


class TestInplaceBackward:
    """inplace_backward=True: the gradient is written over the logits, and nobody is fooled by that."""

    @pytest.fixture
    def data(self, device):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 33, generator=generator).to(device).requires_grad_()
        return x, torch.randint(33, (6,), generator=generator).to(device)

    def test_same_gradient(self, data, backend):
        x, y = data
        expected, got = (
            torch.autograd.grad(cross_entropy(x * 2, y, inplace_backward=inplace, backend=backend), x)[0]
            for inplace in (False, True)
        )
        assert torch.equal(expected, got)

    def test_memory_is_shared(self, data, kernels):
        x, y = data
        logits = x * 2
        (g,) = torch.autograd.grad(cross_entropy(logits, y, inplace_backward=True, backend=kernels), logits)
        assert g.data_ptr() == logits.data_ptr()

    def test_another_use_raises_or_is_right(self, data, kernels):
        """What was computed before the loss runs its backward after it, and would read the gradient."""
        x, y = data
        logits = x * 2
        before = logits.square().sum()
        loss = cross_entropy(logits, y, inplace_backward=True, backend=kernels)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (before + loss).backward()
        x.grad, logits = None, x * 2
        loss = cross_entropy(logits, y, inplace_backward=True, backend=kernels)
        (logits.square().sum() + loss).backward()
        expected = torch.autograd.grad((x * 2).square().sum() + cross_entropy(x * 2, y, backend=kernels), x)[0]
        torch.testing.assert_close(x.grad, expected)

    def test_a_second_backward_raises(self, data, kernels):
        x, y = data
        loss = cross_entropy(x * 2, y, inplace_backward=True, backend=kernels)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_a_leaf_is_refused(self, data, kernels):
        with pytest.raises(ValueError, match="leaf"):
            cross_entropy(*data, inplace_backward=True, backend=kernels)

    def test_without_gradients_it_does_nothing(self, data, kernels):
        x, y = data
        with torch.no_grad():
            kept = x.clone()
            cross_entropy(x, y, inplace_backward=True, backend=kernels)
        assert torch.equal(x.detach(), kept)

    def test_create_graph(self, data, kernels):
        x, y = data
        loss = cross_entropy(x * 2, y, inplace_backward=True, backend=kernels)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (plain,) = torch.autograd.grad(cross_entropy(x * 2, y, backend="reference"), x, create_graph=True)
        torch.testing.assert_close(
            torch.autograd.grad(g.square().sum(), x)[0], torch.autograd.grad(plain.square().sum(), x)[0]
        )
