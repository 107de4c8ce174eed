"""Any strides: the same accuracy, gradients laid out like their inputs, nothing written between elements."""

import pytest
import torch
from sets import dtypes_in_turn, each_pair, each_spec

from fused_losses.functional import cross_entropy, mse_loss
from fused_losses.specs import Sample, convert
from fused_losses.testing import check_loss, peak_bytes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@each_spec
def test_check(spec, backend, device):
    for sample, dtypes in dtypes_in_turn(spec.samples()):
        moved = sample.to(torch.float64, device)
        loss, reference = spec.build(moved, backend), spec.build(moved, "reference")
        check_loss(loss, reference, [moved], dtypes=dtypes, checks=["layouts"])


def image(spec, device):
    return next(s for s in spec.samples() if s.name == "image").to(torch.float32, device)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "width_first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced_classes": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "sliced_pixels": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "expanded_batch": lambda t: t[:1].expand(t.shape),
    "expanded_classes": lambda t: t[:, :1].expand(t.shape),
    "expanded_pixels": lambda t: t[..., :1].expand(t.shape),
}


@each_pair
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", ["contiguous", "channels_last", "expanded_pixels"])
def test_every_pair_of_layouts(spec, first, second, kernels, device):
    sample = image(spec, device)
    x, t = LAYOUTS[first](sample.tensors[0]), sample.tensors[1]
    t = LAYOUTS[second](t) if t.ndim == 4 else t
    for reduction in ("mean", "none"):
        pair = Sample(f"{first} {second}", (x, t), {**sample.options, "reduction": reduction})
        loss, reference = spec.build(pair, kernels), spec.build(pair, "reference")
        check_loss(loss, reference, [pair], dtypes=(torch.float32, torch.bfloat16), checks=["value", "gradient"])


@each_pair
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "width_first"])
def test_a_gradient_is_laid_out_like_its_input(spec, layout, kernels, device):
    sample = image(spec, device)
    x = convert(LAYOUTS[layout](sample.tensors[0]), torch.float32).requires_grad_()
    loss = spec.build(sample, kernels)(x, *sample.tensors[1:])
    assert torch.autograd.grad(loss.sum(), x)[0].stride() == torch.empty_like(x).stride()


@each_pair
def test_an_unreduced_pointwise_loss_is_laid_out_like_its_input(spec, kernels, device):
    if spec.family != "pointwise":
        return
    sample = image(spec, device)
    x, t = (LAYOUTS["channels_last"](tensor) for tensor in sample.tensors)
    loss = spec.loss(**{**sample.options, "reduction": "none"}, backend=kernels)(x, t)
    assert loss.stride() == x.stride()


@pytest.mark.parametrize("shape", [(512, 1), (2048,), ()], ids=["rows", "columns", "scalar"])
def test_broadcast_operands_are_read_in_place(shape, kernels, device):
    x, t, weight = (torch.randn(s, device=device) for s in [(512, 2048), (512, 2048), shape])
    loss = mse_loss(x, t, sample_weight=weight, backend=kernels)
    torch.testing.assert_close(loss, ((x - t).square() * weight).mean())
    peak = peak_bytes(lambda: mse_loss(x, t, sample_weight=weight, backend=kernels), device)
    assert device != "cpu" or peak < x.nbytes / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4300, 8001), (4, 5, 1319, 1321)], ids=["rows", "image"])
def test_an_output_written_past_the_caches(shape, dtype, kernels, device):
    """Large gradients and unreduced losses take another way to memory, to the same bits as small ones."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    t = x.detach().flip(0)
    labels = torch.arange(x[:, 0].numel(), device=device).view(x[:, 0].shape) % shape[1]
    for loss, target in ((mse_loss, t), (cross_entropy, labels)):

        def run(x, target, loss=loss):
            value = loss(x, target, reduction="none", backend=kernels)
            return value.detach(), torch.autograd.grad(value, x, torch.ones_like(value))[0]

        large = run(x, target)
        for i in range(0, shape[0], max(1, shape[0] // 7)):
            for whole, part in zip(large, run(x[i : i + 1], target[i : i + 1])):
                assert torch.equal(whole[i : i + 1], part)
