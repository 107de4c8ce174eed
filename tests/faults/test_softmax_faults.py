"""Faults that other libraries had in losses of logits, each a test of ours."""

import pytest
import torch
import torch.nn.functional as F
from sets import each_pair
from untouched import untouched_logits

import fused_losses
from fused_losses.functional import cross_entropy, mse_loss
from fused_losses.testing import peak_bytes


def logits_and_labels(rows=8, classes=50, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(rows, classes).to(dtype).requires_grad_(), torch.randint(classes, (rows,))


def test_logits_are_not_overwritten_for_other_users(kernels):
    x, y = logits_and_labels()
    logits = x * 2
    kept = logits.detach().clone()
    loss = cross_entropy(logits, y, backend=kernels)
    (loss + logits.square().sum()).backward()
    assert torch.equal(logits.detach(), kept)
    expected = torch.autograd.grad(F.cross_entropy(x * 2, y) + (x * 2).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_none_uses_every_upstream_element(kernels):
    x, y = logits_and_labels()
    upstream = torch.arange(8.0) - 3
    ours = torch.autograd.grad(cross_entropy(x, y, reduction="none", backend=kernels), x, upstream)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(F.cross_entropy(x, y, reduction="none"), x, upstream)[0])


@pytest.mark.parametrize("classes", [37, 5000])
@pytest.mark.parametrize("confidence", [8.0, 14.0, 20.0])
def test_confident_rows_keep_their_gradient(kernels, classes, confidence):
    """p - 1 must not cancel: at p = 1 - 1e-6 the label's gradient is still right to 1e-5."""
    x = torch.zeros(2, classes)
    x[:, 3] = confidence
    x.requires_grad_()
    y = torch.tensor([3, 3])
    loss = cross_entropy(x, y, backend=kernels)
    gradient = torch.autograd.grad(loss, x)[0].double()
    wide = x.detach().double().requires_grad_()
    exact = F.cross_entropy(wide, y)
    truth = torch.autograd.grad(exact, wide)[0]
    assert abs(loss.item() / exact.item() - 1) < 1e-5
    assert ((gradient - truth).abs() <= 1e-5 * truth.abs()).all()


def test_bf16_gradients_accumulate_in_fp32(kernels):
    x, y = logits_and_labels(4, 40_000, torch.bfloat16)
    loss = cross_entropy(x, y, backend=kernels, normalizer=torch.tensor(4.0))
    truth = F.cross_entropy(x.detach().double(), y)
    assert abs(loss.item() - truth.item()) <= truth.item() * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_rounded_once(kernels, dtype):
    """Kept in bf16 between forward and backward, they would be rounded before they are scaled."""
    x, y = logits_and_labels(6, 3000, dtype)
    gradient = torch.autograd.grad(cross_entropy(x, y, reduction="sum", backend=kernels) * 3.0, x)[0].double()
    wide = x.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(wide, y, reduction="sum") * 3.0, wide)[0]
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((gradient - truth).abs() <= 0.501 * torch.finfo(dtype).eps * truth.abs() + smallest).all()


def test_confident_rows_in_low_precision(kernels):
    """At p = 0.999 a bf16 p is 1, and p - 1 was 0."""
    x = torch.zeros(2, 33, dtype=torch.bfloat16)
    x[:, 3] = 10.5
    x.requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(x, torch.tensor([3, 3]), backend=kernels), x)[0].double()
    wide = x.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(wide, torch.tensor([3, 3])), wide)[0]
    assert 0 < -truth[0, 3] < 1e-3
    assert ((gradient - truth).abs() <= 2**-8 * truth.abs()).all()


def test_mean_divides_by_valid_tokens(kernels):
    x, y = logits_and_labels()
    y[::2] = -100
    torch.testing.assert_close(cross_entropy(x, y, backend=kernels), F.cross_entropy(x[1::2], y[1::2]))


def test_autocast_mixes_dtypes(kernels, device):
    x, y = logits_and_labels(dtype=torch.bfloat16)
    weight = torch.rand(50)
    with torch.autocast(device, torch.bfloat16):
        ours = cross_entropy(x, y, weight, backend=kernels)
    expected = F.cross_entropy(x.float(), y, weight)  # torch's own rounds to bf16 on the way, on GPUs
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x)[0], torch.autograd.grad(expected, x)[0], atol=1e-3, rtol=2e-2
    )


def test_no_valid_token(kernels):
    x, _ = logits_and_labels()
    ignored = torch.full((8,), -100)
    loss = cross_entropy(x, ignored, backend=kernels)
    assert loss.isnan()
    assert torch.autograd.grad(loss, x)[0].abs().sum() == 0
    explicit = cross_entropy(x, ignored, normalizer=5, backend=kernels)
    assert explicit == 0 and torch.autograd.grad(explicit, x)[0].abs().sum() == 0


def test_ignored_rows_may_hold_anything(kernels):
    for classes in (5, 100):
        x = torch.randn(4, classes)
        x[1] = float("nan")
        x[2] = -float("inf")
        x.requires_grad_()
        y = torch.tensor([0, -100, -100, 3])
        loss = cross_entropy(x, y, z_loss=0.1, backend=kernels)
        gradient = torch.autograd.grad(loss, x)[0]
        assert loss.isfinite() and gradient.isfinite().all() and (gradient[1:3] == 0).all()


def test_more_elements_than_int32(kernels, device):
    """70000 x 65536 bf16 logits of which only two rows are ever touched: offsets need 64 bits."""
    rows, classes = 70_000, 65_536
    logits = untouched_logits(rows, classes, device)
    logits[-1, 5] = 3.0
    y = torch.full((rows,), -100)
    y[-1] = 5
    loss = cross_entropy(logits, y, backend=kernels)
    assert loss.dtype == torch.bfloat16
    expected = F.cross_entropy(logits[-1:].double(), y[-1:])
    assert abs(loss.item() - expected.item()) < 0.05


@pytest.mark.parametrize("strides", [(2**31 + 8, 1), (1, 2**28 + 3)], ids=["rows", "classes"])
def test_strides_beyond_int32(kernels, device, strides):
    """A few elements, 4 GB apart: backward too has offsets of 64 bits."""
    small, y = logits_and_labels(3, 9, torch.bfloat16)
    far = untouched_logits(1, 2 * strides[0] + 8 * strides[1] + 9, device).view(-1).as_strided((3, 9), strides)
    far.copy_(small.detach())
    for loss, target in ((cross_entropy, y), (mse_loss, torch.zeros(3, 9, dtype=torch.bfloat16))):
        results = []
        for x in (small, far.detach().requires_grad_()):
            value = loss(x, target, backend=kernels)
            results.append((value, torch.autograd.grad(value, x)[0]))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("classes", [1, 2, 31, 63, 64, 65, 127, 4095, 4096, 4097, 8193])
def test_ragged_vocabularies(kernels, classes):
    x, y = logits_and_labels(3, classes)
    ours = cross_entropy(x, y, backend=kernels)
    torch.testing.assert_close(ours, F.cross_entropy(x, y))
    torch.testing.assert_close(
        torch.autograd.grad(ours, x)[0],
        torch.autograd.grad(F.cross_entropy(x, y), x)[0],
        atol=1e-6,
        rtol=1e-5,
    )


def test_compiled_ignored_rows(kernels):
    x, y = logits_and_labels()
    y[2:5] = -100
    compiled = torch.compile(lambda a, b: cross_entropy(a, b, backend=kernels), fullgraph=True, backend="aot_eager")
    gradient = torch.autograd.grad(compiled(x, y), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(x, y), x)[0])
    assert (gradient[2:5] == 0).all()


def test_accumulation_with_a_token_count_equals_the_full_batch(kernels):
    x, y = logits_and_labels(12)
    y[[0, 1, 2, 7]] = -100
    tokens = (y != -100).sum()
    parts = sum(
        torch.autograd.grad(cross_entropy(x[i : i + 3], y[i : i + 3], normalizer=tokens, backend=kernels), x)[0]
        for i in range(0, 12, 3)
    )
    torch.testing.assert_close(parts, torch.autograd.grad(F.cross_entropy(x, y), x)[0], atol=1e-7, rtol=1e-6)


def test_upstream_scale_of_zero_and_retained_graphs(kernels):
    x, y = logits_and_labels()
    loss = cross_entropy(x, y, backend=kernels)
    once, scaled, nothing = (
        torch.autograd.grad(loss * factor, x, retain_graph=True)[0] for factor in (1.0, 1024.0, 0.0)
    )
    assert torch.equal(scaled, once * 1024) and nothing.abs().sum() == 0


def test_gradients_are_never_silently_zero(kernels):
    for spec in ("MSELoss", "L1Loss", "HuberLoss", "LogCoshLoss", "CharbonnierLoss", "SmoothL1Loss"):
        x, t = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
        getattr(fused_losses, spec)(backend=kernels)(x, t).backward()
        assert (x.grad != 0).all() and (t.grad != 0).all()


@pytest.mark.parametrize("classes", [2, 100])
def test_large_offsets(kernels, classes):
    """log C at an offset of 2^24, where the log-sum-exp itself has lost the logarithm."""
    logits = torch.full((1, classes), 2.0**24)
    loss = cross_entropy(logits, torch.tensor([0]), backend=kernels)
    torch.testing.assert_close(loss, torch.log(torch.tensor(float(classes))))


def test_options_are_never_dropped(kernels):
    """Every option changes the result."""
    x, y = logits_and_labels()
    options = [
        {"weight": torch.rand(50)},
        {"label_smoothing": 0.1},
        {"z_loss": 0.1},
        {"softcap": 1.0},
        {"temperature": 2.0},
        {"sample_weight": torch.rand(8)},
        {"normalizer": 3},
        {"ignore_index": int(y[0])},
        {"reduction": "sum"},
    ]
    losses = [cross_entropy(x, y, backend=kernels, **option).item() for option in [{}, *options]]
    assert len(set(losses)) == len(losses)


def test_fp16_with_a_loss_scale(kernels, device):
    x, y = logits_and_labels(dtype=torch.float16)
    with torch.autocast(device, torch.float16):
        loss = cross_entropy(x, y, backend=kernels)
    gradient = torch.autograd.grad(loss * 65536.0, x)[0]
    wide = x.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(wide, y) * 65536.0, wide)[0]
    torch.testing.assert_close(gradient.double(), truth, rtol=2e-3, atol=1e-1)


@each_pair
def test_every_option_of_every_loss_counts(kernels, device, spec):
    """No two samples of one call that differ in options alone give one result."""
    results = {}
    with torch.device("cpu"):
        samples = spec.samples()
    for sample in samples:
        moved = sample.to(torch.float64, device)
        loss = spec.build(moved, kernels)(*moved.tensors, **moved.extras)
        if loss.numel() == 1 and loss.isfinite() and sample.tensors[0].numel() > 1:
            same_call = tuple(tuple(tensor.flatten().tolist()) for tensor in sample.tensors)
            options = str((sample.options, sample.extras))
            results.setdefault(same_call, {})[options] = sample.name, loss.item()
    compared = [named for named in results.values() if len(named) > 1]
    assert compared
    for named in compared:
        assert len({value for _, value in named.values()}) == len(named), named


def test_a_frozen_input_costs_nothing(kernels, device):
    """Only what requires grad gets a gradient, in memory too."""
    x, t = (torch.randn(256, 2048) for _ in range(2))
    shares = torch.softmax(t, 1)
    for loss, pair in ((mse_loss, (x, t)), (cross_entropy, (x, shares))):
        for which in range(2):
            leaves = [tensor.clone().requires_grad_(i == which) for i, tensor in enumerate(pair)]
            value = loss(*leaves, backend=kernels)
            peak = peak_bytes(lambda v=value, leaf=leaves[which]: torch.autograd.grad(v, leaf), device)
            assert peak < 1.1 * x.nbytes
