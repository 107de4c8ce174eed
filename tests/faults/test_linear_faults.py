"""Faults that other libraries had in losses of hidden states and a head, each a test of ours."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses import LinearCrossEntropyLoss
from fused_losses.functional import linear_cross_entropy, linear_jsd, linear_log_probs
from fused_losses.testing import peak_bytes

CLASSES, FEATURES, FIRST_LABEL = 50, 16, 44


def head_of(rows=8, classes=CLASSES, features=FEATURES, dtype=torch.float32):
    """Hidden states and a weight that are learnt, and labels."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, features), torch.randn(classes, features) * features**-0.5
    labels = torch.randint(classes, (rows,))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def negative_log_probs(hidden, weight, labels, **options):
    return -linear_log_probs(hidden, weight, labels, **options).log_probs.sum()


def self_distillation(hidden, weight, labels, **options):
    """Both heads learn, from the same hidden states."""
    options = {"hard_weight": 0.5, "reduction": "sum", **options}
    return linear_jsd(hidden, weight, hidden.detach().flip(1), -weight.detach(), labels, **options)


def summed(hidden, weight, labels, **options):
    return linear_cross_entropy(hidden, weight, labels, reduction="sum", **options)


def of_rows(hidden, weight, labels, **options):
    return linear_cross_entropy(hidden, weight, labels, reduction="none", **options).sum()


LOSSES = {
    "sum": summed,
    "none": of_rows,
    "mean": linear_cross_entropy,
    "log_probs": negative_log_probs,
    "jsd": self_distillation,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def gradients(loss, *leaves, **options):
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], **options)


def truth_of(hidden, weight, labels, **options):
    """The loss and both gradients in fp64, with whole logits."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    loss = F.cross_entropy(F.linear(*wide), labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, wide)


def assert_near(values, truths, relative):
    """Every element, relative to its own size."""
    for value, truth in zip(values, truths):
        assert ((value.double() - truth).abs() <= relative * truth.abs() + 1e-30).all()


@each_loss
def test_inputs_are_not_overwritten(loss, kernels):
    leaves = head_of(200)
    before = [tensor.detach().clone() for tensor in leaves]
    versions = [tensor._version for tensor in leaves]
    gradients(loss(*leaves, backend=kernels, max_workspace_mb=1e-3), *leaves[:2])
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, leaves))
    assert versions == [tensor._version for tensor in leaves]


def test_none_uses_every_upstream_element(kernels):
    hidden, weight, labels = head_of()
    upstream = torch.arange(8.0) - 3
    ours = linear_cross_entropy(hidden, weight, labels, reduction="none", backend=kernels)
    theirs = F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")
    for a, b in zip(
        gradients(ours, hidden, weight, grad_outputs=upstream), gradients(theirs, hidden, weight, grad_outputs=upstream)
    ):
        torch.testing.assert_close(a, b)


def test_tokens_use_every_upstream_element(kernels):
    """Of log-probability, log-sum-exp and entropy, each with an upstream of its own."""
    hidden, weight, labels = head_of()
    upstream = torch.arange(24.0).view(3, 8) - 7
    tokens = linear_log_probs(hidden, weight, labels, backend=kernels)
    logits = F.linear(hidden, weight)
    log_p = torch.log_softmax(logits, 1)
    plain = log_p.gather(1, labels[:, None])[:, 0], logits.logsumexp(1), -(log_p.exp() * log_p).sum(1)
    ours, theirs = (gradients(torch.stack(values), hidden, weight, grad_outputs=upstream) for values in (tokens, plain))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_divergences_use_every_upstream_element(kernels):
    hidden, weight, labels = head_of()
    upstream = torch.arange(8.0) - 3
    results = []
    for backend in (kernels, "reference"):
        losses = self_distillation(hidden, weight, labels, reduction="none", backend=backend)
        results.append(gradients(losses, hidden, weight, grad_outputs=upstream))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_low_precision_weight_gradients_accumulate_in_fp32(kernels):
    """A sum of a thousand chunks in bf16 stops growing at half of this one."""
    rows, classes = 32_768, 7
    hidden, weight = torch.ones(rows, 4).bfloat16(), torch.zeros(classes, 4).bfloat16().requires_grad_()
    labels = torch.zeros(rows, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", backend=kernels, max_workspace_mb=1e-3)
    (gradient,) = gradients(loss, weight)
    expected = torch.full((classes, 4), rows / classes, dtype=torch.float64)
    expected[0] -= rows
    assert_near([gradient], [expected], 2**-7)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("confidence", [8.0, 14.0, 20.0])
def test_confident_rows_keep_their_gradient(kernels, reduction, confidence):
    """p - 1 must not cancel: at p = 1 - 1e-6 both gradients are still right to 1e-5."""
    hidden, weight = torch.eye(2, requires_grad=True), torch.zeros(37, 2)
    weight[3] = confidence  # products of zeros and ones are exact
    weight.requires_grad_()
    labels = torch.tensor([3, 3])
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend=kernels).sum()
    truth = truth_of(hidden, weight, labels, reduction="sum")
    assert_near((loss, *gradients(loss, hidden, weight)), truth, 1e-5)
    log_probs = -linear_log_probs(hidden, weight, labels, backend=kernels).log_probs.sum()
    assert_near((log_probs, *gradients(log_probs, hidden, weight)), truth, 1e-5)


def test_confident_rows_in_low_precision(kernels):
    """At p = 0.999 a bf16 p is 1, and p - 1 was 0."""
    hidden, weight = torch.eye(2, dtype=torch.bfloat16).requires_grad_(), torch.zeros(33, 2, dtype=torch.bfloat16)
    weight[3] = 10.5
    weight.requires_grad_()
    labels = torch.tensor([3, 3])
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", backend=kernels)
    truth = truth_of(hidden, weight, labels, reduction="sum")
    assert 0 < -truth[2][3, 0] < 1e-2
    assert_near(gradients(loss, hidden, weight), truth[1:], 2**-7)


def test_near_uniform_rows(kernels):
    """The loss is log C, and what little there is of a gradient is right."""
    hidden, weight, labels = head_of(64, 5000)
    weight = (weight.detach() * 1e-5).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", backend=kernels)
    truth = truth_of(hidden, weight, labels, reduction="sum")
    assert_near([loss], truth, 1e-6)
    for gradient, exact in zip(gradients(loss, hidden, weight), truth[1:]):
        assert (gradient - exact).norm() <= 1e-6 * exact.norm()
    entropy = linear_log_probs(hidden, weight, labels, backend=kernels).entropy
    torch.testing.assert_close(entropy, torch.full((64,), math.log(5000)), rtol=1e-6, atol=0.0)


def test_a_large_vocabulary_in_low_precision(kernels):
    """Sums over 131072 classes in bf16 would stop at 256."""
    classes = 131_072
    hidden, weight = torch.eye(4, dtype=torch.bfloat16).requires_grad_(), torch.randn(classes, 4).bfloat16()
    weight.requires_grad_()
    labels = torch.tensor([0, 1000, 70_000, classes - 1])
    loss = linear_cross_entropy(hidden, weight, labels, backend=kernels)
    truth = truth_of(hidden, weight, labels)
    assert_near([loss], truth, 2**-8)
    assert_near(gradients(loss, weight), truth[2:], 2**-6)
    tokens = linear_log_probs(hidden, weight, labels, backend=kernels)
    assert_near([-tokens.log_probs.mean()], truth, 1e-5)
    log_p = torch.log_softmax(F.linear(hidden, weight).double(), 1)
    torch.testing.assert_close(tokens.entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("classes", [2, 100])
def test_large_offsets(kernels, classes):
    """log C at an offset of 2^24, where the log-sum-exp itself has lost the logarithm."""
    hidden, weight, bias = torch.ones(1, 3), torch.zeros(classes, 3), torch.full((classes,), 2.0**24)
    hidden.requires_grad_()
    labels = torch.tensor([0])
    uniform = torch.tensor(math.log(classes))
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction=reduction, backend=kernels)
        torch.testing.assert_close(loss.sum(), uniform)
    tokens = linear_log_probs(hidden, weight, labels, linear_bias=bias, backend=kernels)
    torch.testing.assert_close(-tokens.log_probs[0], uniform)
    torch.testing.assert_close(tokens.entropy[0], uniform)
    shares = torch.arange(1.0, classes + 1).softmax(0)
    heads = hidden, weight, torch.ones(1, 1), shares.log()[:, None]
    distilled = linear_jsd(*heads, beta=0.0, student_bias=bias, backend=kernels)
    torch.testing.assert_close(distilled, uniform + (shares * shares.log()).sum())


@each_loss
def test_mean_and_sum_leave_ignored_rows_out(loss, kernels):
    """Few of them, so that they are multiplied along, and many, so that they are not."""
    for ignored in (slice(0, 1), slice(0, None, 2)):
        hidden, weight, labels = head_of(20)
        labels[ignored] = -100
        counted = labels != -100
        ours = loss(hidden, weight, labels, backend=kernels)
        expected = loss(hidden[counted], weight, labels[counted], backend="reference")
        torch.testing.assert_close(ours, expected)
        of_hidden, of_weight = gradients(ours, hidden, weight)
        for a, b in zip((of_hidden, of_weight), gradients(expected, hidden, weight)):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
        assert (of_hidden[~counted] == 0).all()


@each_loss
def test_no_valid_token(loss, kernels):
    hidden, weight, labels = head_of()
    value = loss(hidden, weight, torch.full_like(labels, -100), backend=kernels)
    assert value.isnan() if loss is linear_cross_entropy else value == 0
    assert all((gradient == 0).all() for gradient in gradients(value, hidden, weight))


def test_no_valid_token_with_a_token_count(kernels):
    hidden, weight, labels = head_of()
    for loss in (linear_cross_entropy, self_distillation):
        ignored = torch.full_like(labels, -100)
        value = loss(hidden, weight, ignored, reduction="mean", normalizer=torch.tensor(5.0), backend=kernels)
        assert value == 0 and all((gradient == 0).all() for gradient in gradients(value, hidden, weight))


@pytest.mark.parametrize("classes", [1, 2, 31, 257, 32_003])
def test_ragged_vocabularies(kernels, classes):
    hidden, weight, labels = head_of(6, classes)
    truth = truth_of(hidden, weight, labels)
    for loss in (
        linear_cross_entropy,
        lambda *a, **o: of_rows(*a, **o) / 6,
        lambda *a, **o: negative_log_probs(*a, **o) / 6,
    ):
        value = loss(hidden, weight, labels, backend=kernels)
        torch.testing.assert_close(value.double(), truth[0])
        for gradient, exact in zip(gradients(value, hidden, weight), truth[1:]):
            torch.testing.assert_close(gradient.double(), exact, atol=1e-6, rtol=1e-5)


class Products(TorchDispatchMode):
    """The shapes of matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(name in function.__name__ for name in ("mm", "linear_pointwise", "add_product_")):
            self.shapes.append(tuple((args[0] if result is None else result).shape))
        return result


@pytest.mark.parametrize("loss", [summed, of_rows, negative_log_probs], ids=["sum", "none", "log_probs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_computes_no_gradient_of_it(loss, dtype, kernels, device):
    hidden, weight, labels = head_of(8, 4000, 64, dtype)
    of_weight = []
    for head in (weight, weight.detach()):
        with Products() as products:
            gradients(loss(hidden, head, labels, backend=kernels), hidden)
        of_weight.append([shape for shape in products.shapes if shape[0] > 8])
        assert len(products.shapes) > len(of_weight[-1])
    assert of_weight[0] and not of_weight[1]
    peak = peak_bytes(lambda: gradients(loss(hidden, weight.detach(), labels, backend=kernels), hidden), device)
    # Some processors' products copy the weight first.
    packed = peak_bytes(lambda: hidden.new_empty(8, 4000) @ weight.detach(), device)
    assert peak < weight.nbytes + packed


def test_a_frozen_teacher_computes_no_gradient_of_it(kernels):
    hidden, weight, labels = head_of(8, 4000, 64)
    teacher = torch.randn(8, 48), torch.randn(4000, 48)
    of_teacher = []
    for learnt in (True, False):
        heads = hidden, weight, *(tensor.requires_grad_(learnt) for tensor in teacher)
        with Products() as products:
            gradients(linear_jsd(*heads, labels, backend=kernels), hidden)
        of_teacher.append([shape for shape in products.shapes if shape[1] == 48])
    assert of_teacher[0] and not of_teacher[1]


def test_frozen_hidden_states_compute_no_gradient_of_them(kernels, device):
    hidden, weight, labels = head_of(20_000, 8, 64)
    for loss in (summed, of_rows, negative_log_probs):
        value = loss(hidden.detach(), weight, labels, backend=kernels)
        peak = peak_bytes(lambda v=value: gradients(v, weight), device)
        assert peak < hidden.nbytes / 2


@each_loss
def test_every_frozen_combination_has_the_same_gradients(loss, kernels):
    """With the hidden states frozen, the weight's gradient was lost."""
    hidden, weight, labels = head_of()
    bias = torch.randn(CLASSES, requires_grad=True)
    name = "student_bias" if loss is self_distillation else "linear_bias"
    tensors = hidden, weight, bias
    whole = gradients(loss(hidden, weight, labels, **{name: bias}, backend=kernels), *tensors)
    assert all((gradient != 0).any() for gradient in whole)
    for needed in range(1, 7):
        leaves = [t.detach().clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(tensors)]
        value = loss(leaves[0], leaves[1], labels, **{name: leaves[2]}, backend=kernels)
        expected = [gradient for i, gradient in enumerate(whole) if needed >> i & 1]
        for a, b in zip(gradients(value, *leaves), expected):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_gives_the_same_gradients(loss, dtype, kernels):
    """And leaves those of the first as they were."""
    leaves = head_of(40, dtype=dtype)
    value = loss(*leaves, backend=kernels)
    first = gradients(value, *leaves[:2], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for factor in (1.0, 1024.0, 0.0, 2.0**-20):
        again = gradients(value.float() * factor, *leaves[:2], retain_graph=True)
        assert all(torch.equal(a, b * factor) for a, b in zip(again, kept))
    assert all(torch.equal(a, b) for a, b in zip(first, kept))


@each_loss
def test_upstream_scales_of_a_first_backward(loss, kernels):
    leaves = head_of(40)
    once = gradients(loss(*leaves, backend=kernels), *leaves[:2])
    for factor in (0.0, 2.0**-60, 2.0**80, -1.0):
        scaled = gradients(loss(*leaves, backend=kernels) * factor, *leaves[:2])
        assert all(torch.equal(a, b * factor) for a, b in zip(scaled, once))


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
def test_fp16_with_a_loss_scale(scale, kernels, device):
    hidden, weight, labels = head_of(64, 5000, dtype=torch.float16)
    with torch.autocast(device, torch.float16):
        loss = linear_cross_entropy(hidden, weight, labels, backend=kernels)
    truth = truth_of(hidden, weight, labels)
    for gradient, exact in zip(gradients(loss * scale, hidden, weight), truth[1:]):
        assert (gradient.double() - exact * scale).norm() <= 2e-3 * scale * exact.norm()


@each_loss
def test_the_loss_does_not_depend_on_the_chunks(loss, kernels):
    hidden, weight, labels = head_of(300, 1000, dtype=torch.float64)
    labels[::7] = -100
    results = []
    for workspace in (1e-3, 1.0, 2.0, 64.0, None):
        value = loss(hidden, weight, labels, backend=kernels, max_workspace_mb=workspace)
        results.append((value, *gradients(value, hidden, weight)))
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_workspace_bounds_the_memory(dtype, kernels, device):
    hidden, weight, labels = head_of(2048, 4000, 8, dtype)
    for loss in (summed, of_rows, negative_log_probs):
        peak = peak_bytes(
            lambda f=loss: gradients(f(hidden, weight, labels, backend=kernels, max_workspace_mb=1.0), hidden, weight),
            device,
        )
        assert peak < 2.5 * 2**20, loss


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@each_loss
def test_autocast_mixes_dtypes(loss, hidden_dtype, kernels, device):
    """fp32 weights meet bf16 hidden states; each gets a gradient of its own dtype."""
    hidden, weight, labels = head_of(dtype=hidden_dtype)
    weight = weight.detach().float().requires_grad_()
    results = []
    for backend in (kernels, "reference"):
        with torch.autocast(device, torch.bfloat16):
            value = loss(hidden, weight, labels, backend=backend)
        assert value.dtype == torch.float32
        results.append((value, *gradients(value, hidden, weight)))
    for (a, b), of in zip(zip(*results), (None, hidden, weight)):
        assert of is None or a.dtype == of.dtype
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_different_dtypes_without_autocast_say_the_way_out(kernels):
    hidden, weight, labels = head_of(dtype=torch.bfloat16)
    for loss in LOSSES.values():
        with pytest.raises(RuntimeError, match="one dtype"):
            loss(hidden, weight.float(), labels, backend=kernels)


@each_loss
def test_compiled_ignored_rows(loss, kernels):
    hidden, weight, labels = head_of()
    labels[2:5] = -100
    compiled = torch.compile(lambda *a: loss(*a, backend=kernels), fullgraph=True, backend="aot_eager")
    of_hidden, of_weight = gradients(compiled(hidden, weight, labels), hidden, weight)
    expected = gradients(loss(hidden, weight, labels, backend="reference"), hidden, weight)
    torch.testing.assert_close(of_hidden, expected[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(of_weight, expected[1], atol=1e-6, rtol=1e-5)
    assert (of_hidden[2:5] == 0).all()


@pytest.mark.parametrize("loss", [linear_cross_entropy, self_distillation], ids=["cross_entropy", "jsd"])
def test_accumulation_with_a_token_count_equals_the_full_batch(loss, kernels):
    hidden, weight, labels = head_of(12)
    labels[[0, 1, 2, 7]] = -100
    tokens = (labels != -100).sum()
    for start in range(0, 12, 3):
        part = slice(start, start + 3)
        loss(hidden[part], weight, labels[part], reduction="mean", normalizer=tokens, backend=kernels).backward()
    expected = gradients(loss(hidden, weight, labels, reduction="mean", backend=kernels), hidden, weight)
    for tensor, gradient in zip((hidden, weight), expected):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-7, rtol=1e-5)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_step_is_the_same_to_the_bit(loss, dtype, kernels):
    results = []
    for _ in range(3):
        leaves = head_of(300, 999, dtype=dtype)
        value = loss(*leaves, backend=kernels, max_workspace_mb=1e-3)
        results.append((value, *gradients(value, *leaves[:2])))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


ALTERNATIVES = {
    "cross_entropy": {
        "weight": torch.linspace(0.5, 2.0, CLASSES),
        "linear_bias": torch.linspace(-1.0, 1.0, CLASSES),
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 1.0,
        "temperature": 2.0,
        "sample_weight": torch.linspace(0.0, 1.5, 8),
        "normalizer": 3,
        "ignore_index": FIRST_LABEL,
        "reduction": "sum",
    },
    "log_probs": {
        "linear_bias": torch.linspace(-1.0, 1.0, CLASSES),
        "softcap": 1.0,
        "temperature": 2.0,
        "ignore_index": FIRST_LABEL,
    },
    "jsd": {
        "student_bias": torch.linspace(-1.0, 1.0, CLASSES),
        "teacher_bias": torch.linspace(-1.0, 1.0, CLASSES),
        "beta": 0.3,
        "temperature": 2.0,
        "soft_weight": 0.4,
        "hard_weight": 0.3,
        "sample_weight": torch.linspace(0.0, 1.5, 8),
        "normalizer": 3,
        "ignore_index": FIRST_LABEL,
        "reduction": "sum",
    },
}


@pytest.mark.parametrize("which", ALTERNATIVES)
def test_options_are_never_dropped(which, backend, device):
    """Every option changes the loss, and the gradient beside it."""
    loss = {"cross_entropy": linear_cross_entropy, "log_probs": negative_log_probs, "jsd": self_distillation}[which]
    base = {"reduction": "mean"} if which == "jsd" else {}
    hidden, weight, labels = head_of()
    labels[0] = FIRST_LABEL
    results = []
    for name, option in {"": None, **ALTERNATIVES[which]}.items():
        moved = option.to(device) if isinstance(option, torch.Tensor) else option
        options = {**base, name: moved} if name else base
        value = loss(hidden, weight, labels, **options, backend=backend)
        results.append((value.item(), gradients(value, weight)[0].norm().item()))
    for of_results in zip(*results):
        assert len(set(of_results)) == len(results)


def test_attributes_of_the_module_are_never_dropped(backend):
    hidden, _, labels = head_of()
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, backend=backend)
    changes = {
        "weight": torch.linspace(0.5, 2.0, CLASSES),
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 1.0,
        "temperature": 2.0,
        "ignore_index": int(labels[0]),
        "reduction": "sum",
    }
    values = [module(hidden, labels).item()]
    for name, value in changes.items():
        before = getattr(module, name)
        setattr(module, name, value)
        values.append(module(hidden, labels).item())
        setattr(module, name, before)
    assert len(set(values)) == len(values)


@each_loss
def test_gradients_are_never_silently_zero(loss, backend):
    hidden, weight, labels = head_of()
    value = loss(hidden, weight, labels, backend=backend)
    assert all((gradient != 0).all() for gradient in gradients(value, hidden, weight))


def test_a_vocabulary_padded_with_minus_infinity(backend):
    """Classes that neither head can give cost nothing, and are no NaN."""
    hidden, weight, labels = head_of()
    bias = torch.zeros(CLASSES)
    bias[45:] = -float("inf")
    labels.clamp_(max=44)
    values = (
        linear_cross_entropy(hidden, weight, labels, linear_bias=bias, backend=backend),
        negative_log_probs(hidden, weight, labels, linear_bias=bias, backend=backend),
        self_distillation(hidden, weight, labels, student_bias=bias, teacher_bias=bias, backend=backend),
        linear_log_probs(hidden, weight, labels, linear_bias=bias, backend=backend).entropy.sum(),
    )
    for value in values:
        of_hidden, of_weight = gradients(value, hidden, weight)
        assert value.isfinite() and of_hidden.isfinite().all() and (of_weight[45:] == 0).all()
    expected = F.cross_entropy(F.linear(hidden, weight[:45]), labels)
    torch.testing.assert_close(values[0], expected)


def test_a_weight_that_is_not_whole_says_the_way_out(backend):
    """What ZeRO and FSDP leave outside of a head's own forward: nothing, or a flat part."""
    hidden, weight, labels = head_of()
    flat = weight.detach().flatten()
    for loss in LOSSES.values():
        for part in (weight.new_empty(0), flat, flat[:100]):
            with pytest.raises(RuntimeError, match=r"LinearCrossEntropyHead.*vocab_parallel_linear_cross_entropy"):
                loss(hidden, part, labels, backend=backend)


@pytest.fixture
def mesh(device):
    torch.distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield torch.distributed.device_mesh.init_device_mesh(device, (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_weight_says_the_way_out(mesh, kernels):
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, labels = head_of()
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)])
    for loss in LOSSES.values():
        with pytest.raises(RuntimeError, match=r"DTensor.*vocab_parallel_linear_cross_entropy"):
            loss(hidden, sharded, labels, backend=kernels)
