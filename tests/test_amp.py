"""Low precision: what autocast returns, what plain bf16 and fp16 return, loss scales."""

import pytest
import torch
from sets import each_drop_in, each_pair, each_spec

from fused_losses import BCELoss, CrossEntropyLoss, MSELoss
from fused_losses.testing.accuracy import compare

LOW = (torch.bfloat16, torch.float16)
each_low = pytest.mark.parametrize("dtype", LOW, ids=str)


def chosen(spec):
    paths = ("mean", "none", "sum", "weight_mean", "sample_weight")
    return [sample for sample in spec.samples() if sample.name.split("-")[0] in paths]


def step(module, sample, dtype, autocast):
    """The loss and the gradients of low-precision tensors, with or without autocast."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in sample.tensors]
    with torch.autocast(leaves[0].device.type, dtype, enabled=autocast):
        loss = module(*leaves, **sample.extras)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), wanted)]


@each_spec
@each_low
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_and_values(spec, dtype, autocast, backend, device):
    """fp32 losses under autocast, the input's dtype without; gradients always in the input's dtype."""
    for sample in chosen(spec):
        low = sample.to(dtype, device)
        ours, reference = (step(spec.build(low, b), low, dtype, autocast) for b in (backend, "reference"))
        wide = low.to(torch.float64)
        truth = step(spec.build(wide, "reference"), wide, dtype, False)
        assert ours[0].dtype == (torch.float32 if autocast else dtype)
        assert all(gradient.dtype == dtype for gradient in ours[1:])
        for three in zip(ours, reference, truth):
            assert compare(*three).ok, (sample.name, compare(*three))


@each_drop_in
@each_low
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_as_in_torch(spec, dtype, mixed, backend, device):
    """Also where one tensor of the two is still fp32."""
    if spec.loss is BCELoss and device == "cuda":
        return  # which torch refuses to autocast there
    sample = spec.samples()[0].to(torch.float32, device)
    tensors = [sample.tensors[0].to(dtype), sample.tensors[1]]
    if not mixed and tensors[1].is_floating_point():
        tensors[1] = tensors[1].to(dtype)
    with torch.autocast(device, dtype):
        theirs, ours = spec.original(**sample.options)(*tensors), spec.build(sample, backend)(*tensors)
    assert ours.dtype == theirs.dtype
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    comparison = compare(ours, theirs, spec.original(**sample.options).double()(*wide))
    assert comparison.ok, comparison


@each_low
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_takes_any_class_weight(dtype, weight_dtype, backend, device):
    x, y = torch.randn(6, 5, device=device).to(dtype), torch.arange(6, device=device) % 5
    weight = (torch.arange(5, device=device) / 4).to(weight_dtype)
    with torch.autocast(device, dtype):
        ours = CrossEntropyLoss(weight, backend=backend)(x, y)
    torch.testing.assert_close(ours, torch.nn.CrossEntropyLoss(weight.float())(x.float(), y))


@each_pair
def test_a_loss_scale(spec, backend, device):
    """fp16 gradients of 1e-8 survive where they are scaled by 65536 first, as a GradScaler does."""
    sample = next(s for s in spec.samples() if s.name.split("-")[0] == "sum").to(torch.float16, device)
    x = sample.tensors[0].clone().requires_grad_()
    with torch.autocast(device, torch.float16):
        loss = spec.build(sample, backend)(x, *sample.tensors[1:]) * 1e-6
    gradient = torch.autograd.grad(loss * 65536.0, x)[0].double() / 65536.0
    wide = sample.to(torch.float64)
    y = wide.tensors[0].clone().requires_grad_()
    truth = torch.autograd.grad(spec.build(wide, "reference")(y, *wide.tensors[1:]) * 1e-6, y)[0]
    torch.testing.assert_close(gradient, truth, rtol=4e-3, atol=float(truth.abs().max()) * 4e-3)


@each_low
def test_a_real_grad_scaler(dtype, kernels, device):
    torch.manual_seed(0)
    losses = []
    for module in (torch.nn.CrossEntropyLoss(), CrossEntropyLoss(backend=kernels)):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 30, device=device)
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.5), torch.amp.GradScaler(device)
        x, y = torch.randn(64, 16, device=device), torch.arange(64, device=device) % 30
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss = module(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=2e-3, atol=1e-3)


def test_autocast_of_another_device_changes_nothing(backend, device):
    if device != "cpu":
        return
    x = torch.randn(4, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert MSELoss(backend=backend)(x, x).dtype is torch.bfloat16
