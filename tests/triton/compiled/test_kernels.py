"""Every kernel compiles for six architectures: no spills, few registers, wide loads, shared memory that fits."""

import pretend_driver
import pytest
import torch
import triton
from fused_losses.triton_kernels import divergence, head, linear, pointwise, softmax, sums

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # what a block may have
FORMULAS = (
    ("mse", 0.0, 0.0),
    ("l1", 0.0, 0.0),
    ("smooth_l1", 1.0, 0.0),
    ("huber", 1.0, 0.0),
    ("log_cosh", 0.0, 0.0),
    ("charbonnier", 1e-12, 0.0),
    ("bce", 0.0, 0.0),
    ("bce_with_logits", 0.0, 0.0),
    ("sigmoid_focal", 0.25, 2.0),
    ("kl_div", 0.0, 0.0),
    ("kl_div_log_target", 0.0, 0.0),
)
LOW = (torch.float32, torch.bfloat16)


@pytest.fixture(params=sorted(SHARED_KIB), ids=lambda architecture: f"sm_{architecture}")
def gpu(request):
    return request.param, pretend_driver.install(request.param)


def check(gpu, wide, registers=255):
    architecture, compiled = gpu
    assert compiled
    for kernel in compiled:
        assert not kernel.spills, f"{kernel.name} spills: {kernel.stack} stack, {kernel.local} local"
        assert kernel.registers <= registers, f"{kernel.name} takes {kernel.registers} registers"
        assert kernel.shared <= SHARED_KIB[architecture] * 1024
        if wide and kernel.name != "finish_kernel":
            assert kernel.wide_loads, f"{kernel.name} has no 128-bit loads"


def in_turn(cases):
    """Each case with one of the dtypes: what a dtype changes is alike in all of them."""
    return [(*case, LOW[k % len(LOW)]) for k, case in enumerate(cases)]


@pytest.mark.parametrize(("formula", "a", "b", "dtype"), in_turn(FORMULAS), ids=str)
def test_pointwise(gpu, formula, a, b, dtype):
    x, t, grad = torch.empty(4096, dtype=dtype), torch.empty(4096, dtype=dtype), torch.empty(())
    pointwise.pointwise_forward(formula, x, t, None, None, a, b, "mean", dtype)
    pointwise.pointwise_backward(formula, grad, x, t, None, None, a, b, "mean", True, False)
    check(gpu, wide=True, registers=128)


def cross_entropy(logits, target, weight=None, label_smoothing=0.0, softcap=0.0):
    options = (-100, label_smoothing, 0.0, softcap, 1.0)
    _, stats = softmax.cross_entropy_forward(logits, target, weight, None, "mean", *options, logits.dtype)
    softmax.cross_entropy_backward(torch.empty(()), logits, target, weight, None, stats, "mean", *options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_sums_of_many_programs(gpu, dtype):
    sums.few_sums(torch.empty(2, 3 * sums.FEW, dtype=dtype))
    check(gpu, wide=False, registers=128)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rows(gpu, dtype):
    cross_entropy(torch.empty(4, 32000, dtype=dtype), torch.zeros(4, dtype=torch.long))
    check(gpu, wide=True)


def test_rows_with_every_option(gpu):
    logits, weight = torch.empty(4, 32000, dtype=torch.bfloat16), torch.empty(32000)
    cross_entropy(logits, torch.zeros(4, dtype=torch.long), weight, 0.1, 30.0)
    check(gpu, wide=True)


def test_probabilities(gpu):
    logits = torch.empty(4, 32000)
    cross_entropy(logits, torch.empty(4, 32000))
    check(gpu, wide=True)


def test_pixels(gpu):
    cross_entropy(torch.empty(2, 21, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long))
    check(gpu, wide=False)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rows_between_products(gpu, dtype):
    logits, labels, factors = torch.empty(4, 32000, dtype=dtype), torch.zeros(4, dtype=torch.long), torch.empty(32000)
    statistics, _ = linear.row_statistics(logits, labels, factors, 30.0, 1.0)
    linear.row_gradient_(logits, labels, statistics, torch.empty(4, 4), factors, 30.0, 1.0)
    check(gpu, wide=True)


@pytest.mark.parametrize(("kind", "dtype"), in_turn([("forward_kl",), ("jsd",), ("tvd",)]), ids=str)
def test_divergences(gpu, kind, dtype):
    student, teacher = torch.empty(4, 32000, dtype=dtype), torch.empty(4, 32000, dtype=dtype)
    losses, statistics = divergence.divergence_forward(student, teacher, kind, 0.5, 2.0)
    divergence.divergence_backward(losses, student, teacher, statistics, kind, 0.5, 2.0, True, True)
    check(gpu, wide=True)


def test_double():
    """Some functions have another branch for it; it may spill."""
    compiled = pretend_driver.install(90)
    rows, labels = torch.empty(4, 64).double(), torch.zeros(4, dtype=torch.long)
    for formula in ("log_cosh", "bce_with_logits"):
        pointwise.pointwise_forward(formula, rows, rows, None, None, 0.0, 0.0, "mean", torch.float64)
    cross_entropy(rows, labels, torch.empty(64).double(), 0.1, 30.0)
    statistics, _ = linear.row_statistics(rows, labels, None, 30.0, 2.0)
    linear.row_gradient_(rows, labels, statistics, torch.empty(4, 4).double(), None, 30.0, 2.0)
    for kind in ("jsd", "tvd"):
        losses, statistics = divergence.divergence_forward(rows, rows, kind, 0.5, 2.0)
        divergence.divergence_backward(losses, rows, rows, statistics, kind, 0.5, 2.0, True, True)
    assert compiled


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_statistics_of_a_head(gpu, dtype):
    rows, classes, features = 512, 32000, 1024
    input, weight = torch.empty(rows, features, dtype=dtype), torch.empty(classes, features, dtype=dtype)
    bias, labels = torch.empty(classes, dtype=dtype), torch.zeros(rows, dtype=torch.long)
    head.head_statistics(input, weight, bias, labels, 30.0, 1.0)
    check(gpu, wide=False)


def test_sizes_of_one():
    """Triton takes a 1 for a constant, not for a number on the GPU."""
    gpu = (90, pretend_driver.install(90))
    one, row, label = torch.empty(1), torch.empty(1, 1), torch.zeros(1, dtype=torch.long)
    for reduction in ("mean", "sum", "none"):
        pointwise.pointwise_forward("mse", one, one, one, None, 0.0, 0.0, reduction, torch.float32)
        pointwise.pointwise_backward("mse", one, one, one, one, None, 0.0, 0.0, reduction, True, True)
    cross_entropy(row, label, one, 0.1, 30.0)
    cross_entropy(row, row)
    cross_entropy(row[..., None], label[:, None])
    statistics, _ = linear.row_statistics(row, label, one, 30.0, 1.0)
    linear.row_gradient_(row, label, statistics, torch.empty(4, 1), one, 30.0, 1.0)
    losses, statistics = divergence.divergence_forward(row, row, "jsd", 0.5, 2.0)
    divergence.divergence_backward(losses, row, row, statistics, "jsd", 0.5, 2.0, True, True)
    head.head_statistics(row, row, one, label, 30.0, 1.0)
    check(gpu, wide=False)


@pytest.mark.parametrize("fault", ["spill", "narrow"])
def test_planted_faults_are_seen(fault, monkeypatch):
    """A block too large for its warps spills; a row stride that is not divisible loads element by element."""
    compiled = pretend_driver.install(90)
    classes = 32000 if fault == "spill" else 32001
    if fault == "spill":
        monkeypatch.setattr(softmax, "tile_of", lambda classes, stride: (4, 16384))
    cross_entropy(torch.empty(4, classes, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long))
    with pytest.raises(AssertionError, match="spills" if fault == "spill" else "no 128-bit loads"):
        check((90, compiled), wide=True)


def test_versions_that_are_supported():
    assert tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
