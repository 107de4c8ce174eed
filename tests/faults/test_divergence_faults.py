"""Faults that other libraries had in divergences of two models' logits, each a test of ours."""

import math

import pytest
import torch
from divergences import check_tvd_gradients
from untouched import untouched_logits

from fused_losses.functional import jsd_loss, tvd_loss
from fused_losses.testing import peak_bytes

KINDS = {
    "jsd": jsd_loss,
    "skewed": lambda *tensors, **options: jsd_loss(*tensors, beta=0.1, **options),
    "forward_kl": lambda *tensors, **options: jsd_loss(*tensors, beta=0.0, **options),
    "reverse_kl": lambda *tensors, **options: jsd_loss(*tensors, beta=1.0, **options),
    "tvd": tvd_loss,
}
each_kind = pytest.mark.parametrize("loss", KINDS.values(), ids=KINDS)


def pair(rows=8, classes=50, dtype=torch.float32):
    torch.manual_seed(0)
    return tuple((torch.randn(rows, classes) * 2).to(dtype).requires_grad_() for _ in range(2))


def both_gradients(loss, pair, **options):
    return torch.autograd.grad(loss, pair, **options)


def in_double(loss, tensors, *rest, **options):
    """The reference's loss and both gradients in fp64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    value = loss(*wide, *rest, backend="reference", **options)
    return value.detach(), *both_gradients(value.sum(), wide)


@each_kind
@pytest.mark.parametrize("lowest", [-1e4, -float("inf")])
def test_no_nan_where_both_underflow(loss, lowest, backend):
    """A class that neither model gives costs nothing, however it was masked."""
    student, teacher = (tensor.detach().clone() for tensor in pair())
    for tensor in (student, teacher):
        tensor[:, 40:] = lowest
        tensor.requires_grad_()
    value = loss(student, teacher, backend=backend)
    expected = in_double(loss, [tensor.detach()[:, :40] for tensor in (student, teacher)])
    torch.testing.assert_close(value.double(), expected[0])
    for gradient, exact in zip(both_gradients(value, (student, teacher)), expected[1:]):
        torch.testing.assert_close(gradient[:, :40].double(), exact, atol=1e-7, rtol=1e-5)
        assert (gradient[:, 40:] == 0).all()


@pytest.mark.parametrize("lowest", [-1e4, -float("inf")])
@pytest.mark.parametrize("swapped", [False, True])
def test_no_nan_where_one_underflows(swapped, lowest, backend):
    """Models without a class in common: log 2, as far apart as can be."""
    logits = torch.tensor([[0.0, 0.0, lowest, lowest], [lowest, lowest, 0.0, 0.0]])
    student, teacher = (logits[i : i + 1].clone().requires_grad_() for i in ((1, 0) if swapped else (0, 1)))
    for loss, farthest in ((jsd_loss, math.log(2)), (tvd_loss, 1.0)):
        value = loss(student, teacher, backend=backend)
        assert value.item() == pytest.approx(farthest, rel=1e-6)
        assert all(gradient.isfinite().all() for gradient in both_gradients(value, (student, teacher)))


@each_kind
def test_ignored_rows_count_nothing(loss, backend):
    student, teacher = pair()
    labels = torch.tensor([0, -100, 3, -100, -100, 49, 7, -100])
    counted = labels != -100
    value = loss(student, teacher, labels, backend=backend)
    expected = in_double(loss, [student[counted], teacher[counted]])
    torch.testing.assert_close(value.double(), expected[0])
    for gradient, exact in zip(both_gradients(value, (student, teacher)), expected[1:]):
        torch.testing.assert_close(gradient[counted].double(), exact, atol=1e-7, rtol=1e-5)
        assert (gradient[~counted] == 0).all()


@each_kind
def test_ignored_rows_may_hold_anything(loss, kernels):
    student, teacher = (tensor.detach().clone() for tensor in pair())
    student[1], teacher[2], student[3] = float("nan"), float("inf"), -float("inf")
    student.requires_grad_()
    labels = torch.tensor([0, -100, -100, -100, 1, 1, 1, 1])
    value = loss(student, teacher, labels, backend=kernels)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all() and (gradient[1:4] == 0).all()


@each_kind
def test_no_valid_token(loss, backend):
    student, teacher = pair()
    ignored = torch.full((8,), -100)
    assert loss(student, teacher, ignored, backend=backend).isnan()
    for options in ({"reduction": "sum"}, {"normalizer": 5}):
        value = loss(student, teacher, ignored, backend=backend, **options)
        assert value == 0 and all((g == 0).all() for g in both_gradients(value, (student, teacher)))


@each_kind
def test_none_uses_every_upstream_element(loss, kernels):
    student, teacher = pair()
    upstream = torch.arange(8.0) - 3
    results = []
    for backend in (kernels, "reference"):
        losses = loss(student, teacher, reduction="none", backend=backend)
        results.append(both_gradients(losses, (student, teacher), grad_outputs=upstream))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@each_kind
@pytest.mark.parametrize("classes", [1, 2, 31, 4097, 32_003])
def test_ragged_vocabularies(loss, classes, kernels):
    tensors = pair(3, classes)
    value = loss(*tensors, backend=kernels)
    truth = in_double(loss, tensors)
    torch.testing.assert_close(value.double(), truth[0], atol=1e-7, rtol=2e-6)
    for gradient, exact in zip(both_gradients(value, tensors), truth[1:]):
        torch.testing.assert_close(gradient.double(), exact, atol=1e-8, rtol=1e-4)


@each_kind
def test_a_large_vocabulary_in_low_precision(loss, kernels):
    """Sums over 131072 classes in bf16 would stop at 256."""
    tensors = pair(2, 131_072, torch.bfloat16)
    value = loss(*tensors, backend=kernels)
    truth = in_double(loss, tensors)
    assert abs(value.double() - truth[0]) <= 2**-8 * truth[0]
    for gradient, exact in zip(both_gradients(value, tensors), truth[1:]):
        assert (gradient.double() - exact).norm() <= 2**-8 * exact.norm()


@each_kind
@pytest.mark.parametrize("offset", [2.0**24, -(2.0**24)])
def test_large_offsets(loss, offset, kernels):
    """Where the log-sum-exp itself has lost the logarithm."""
    student = torch.full((1, 4), offset, requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    value = loss(student, teacher, backend=kernels)
    expected = loss(torch.zeros(1, 4).double(), teacher.double(), backend="reference")
    torch.testing.assert_close(value.double(), expected, atol=0.0, rtol=1e-6)


@pytest.mark.parametrize("confidence", [8.0, 14.0, 20.0])
@each_kind
def test_confident_rows(loss, confidence, kernels):
    """Two models almost certain of one class: the value keeps its digits, gradients are right to a rounding of 1."""
    student, teacher = torch.zeros(1, 37), torch.zeros(1, 37)
    student[0, 3], teacher[0, 3] = confidence, confidence - 1
    tensors = student.requires_grad_(), teacher.requires_grad_()
    value = loss(*tensors, backend=kernels)
    truth = in_double(loss, tensors)
    exact, *gradients = truth
    torch.testing.assert_close(value.double(), exact, atol=0.0, rtol=5e-6)
    for ours, exact in zip(both_gradients(value, tensors), gradients):
        assert (ours.double() - exact).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("confidence", [14.0, 20.0])
@pytest.mark.parametrize(("kind", "which"), [("forward_kl", 1), ("reverse_kl", 0)])
def test_confident_rows_of_a_kl_divergence_keep_value_and_gradient(kind, which, confidence, kernels):
    """Relative to themselves: p - 1 cancels neither in the value nor in the gradient of the averaging model."""
    student, teacher = torch.zeros(1, 37), torch.zeros(1, 37)
    student[0, 3], teacher[0, 3] = confidence, confidence - 1
    tensors = student.requires_grad_(), teacher.requires_grad_()
    value = KINDS[kind](*tensors, backend=kernels)
    truth = in_double(KINDS[kind], tensors)
    assert abs(value.double() - truth[0]) <= 1e-5 * truth[0]
    gradient, exact = both_gradients(value, tensors)[which], truth[1 + which]
    assert (gradient.double() - exact).norm() <= 1e-5 * exact.norm()


def test_gradients_of_the_total_variation_are_right_relative_to_themselves(kernels):
    check_tvd_gradients(kernels)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_gives_the_same_gradients(loss, dtype, kernels):
    tensors = pair(dtype=dtype)
    value = loss(*tensors, backend=kernels)
    first = both_gradients(value, tensors, retain_graph=True)
    for factor in (1.0, 1024.0, 0.0, 2.0**-20):
        again = both_gradients(value.float() * factor, tensors, retain_graph=True)
        assert all(torch.equal(a, b * factor) for a, b in zip(again, first))


@each_kind
def test_inputs_are_not_overwritten(loss, kernels):
    tensors = pair()
    kept = [tensor.detach().clone() for tensor in tensors]
    both_gradients(loss(*tensors, backend=kernels), tensors)
    assert all(torch.equal(a.detach(), b) for a, b in zip(tensors, kept))


@each_kind
def test_a_frozen_teacher_costs_nothing(loss, kernels, device):
    student, teacher = pair(256, 2048)
    for leaves in ((student, teacher.detach()), (student.detach(), teacher)):
        value = loss(*leaves, backend=kernels)
        leaf = next(tensor for tensor in leaves if tensor.requires_grad)
        assert peak_bytes(lambda v=value, of=leaf: torch.autograd.grad(v, of), device) < 1.1 * student.nbytes


@each_kind
def test_every_frozen_combination_has_the_same_gradients(loss, kernels):
    tensors = pair()
    whole = both_gradients(loss(*tensors, backend=kernels), tensors)
    for which in range(2):
        leaves = [tensor.detach().clone().requires_grad_(i == which) for i, tensor in enumerate(tensors)]
        (alone,) = torch.autograd.grad(loss(*leaves, backend=kernels), leaves[which])
        assert torch.equal(alone, whole[which]) and (alone != 0).all()


@each_kind
def test_compiled_ignored_rows(loss, kernels):
    student, teacher = pair()
    labels = torch.arange(8)
    labels[2:5] = -100
    compiled = torch.compile(lambda *a: loss(*a, backend=kernels), fullgraph=True, backend="aot_eager")
    results = [both_gradients(f(student, teacher, labels), (student, teacher)) for f in (compiled, loss)]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
        assert (a[2:5] == 0).all()


@each_kind
def test_accumulation_with_a_token_count_equals_the_full_batch(loss, kernels):
    tensors = pair(12)
    labels = torch.arange(12)
    labels[[0, 1, 2, 7]] = -100
    for start in range(0, 12, 3):
        part = [tensor[start : start + 3] for tensor in (*tensors, labels)]
        loss(*part, normalizer=(labels != -100).sum(), backend=kernels).backward()
    expected = both_gradients(loss(*tensors, labels, backend=kernels), tensors)
    for tensor, gradient in zip(tensors, expected):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-7, rtol=1e-5)


@each_kind
def test_a_repeated_step_is_the_same_to_the_bit(loss, kernels):
    results = []
    for _ in range(3):
        tensors = pair(33, 5001)
        value = loss(*tensors, backend=kernels)
        results.append((value, *both_gradients(value, tensors)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


def test_options_are_never_dropped(backend):
    student, teacher = pair()
    labels = torch.arange(8)
    alternatives = [
        {},
        {"temperature": 2.0},
        {"ignore_index": 3},
        {"reduction": "sum"},
        {"sample_weight": torch.linspace(0.0, 1.5, 8)},
        {"normalizer": 3},
    ]
    values = [tvd_loss(student, teacher, labels, **o, backend=backend).item() for o in alternatives]
    assert len(set(values)) == len(values)
    alternatives += [{"beta": 0.0}, {"beta": 0.1}, {"beta": 1.0}]
    values = [jsd_loss(student, teacher, labels, **o, backend=backend).item() for o in alternatives]
    assert len(set(values)) == len(values)


def test_an_autocast_loss_is_fp32(kernels, device):
    tensors = pair(dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        value = jsd_loss(*tensors, backend=kernels)
    assert value.dtype == torch.float32
    assert abs(value.double() - in_double(jsd_loss, tensors)[0]) < 1e-5
    assert all(gradient.dtype == torch.bfloat16 for gradient in both_gradients(value, tensors))


@each_kind
def test_strides_beyond_int32(loss, kernels, device):
    """Rows of a few elements, 4 GB apart."""
    small = pair(3, 9, torch.bfloat16)
    far = []
    for tensor in small:
        memory = untouched_logits(1, 2 * (2**31 + 8) + 9, device).view(-1)
        far.append(memory.as_strided((3, 9), (2**31 + 8, 1)))
        far[-1].copy_(tensor.detach()).requires_grad_()
    results = []
    for tensors in (small, far):
        value = loss(*tensors, backend=kernels)
        results.append((value, *both_gradients(value, tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
