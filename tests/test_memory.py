"""Peak memory: the result, the gradients, and little else; without gradients not even those."""

import pytest
import torch
from sets import each_pair

from fused_losses import CrossEntropyLoss
from fused_losses.functional import linear_cross_entropy
from fused_losses.specs import Sample
from fused_losses.specs.softmax import label_pair, probability_pair
from fused_losses.testing import check_loss, peak_bytes

LARGE = {"rows": (512, 2048), "image": (2, 64, 64, 64)}


def large(spec, shape, reduction):
    """The first sample's values, repeated to a large shape; class indices stay in range."""
    if spec.family == "softmax":
        return Sample(str(shape), label_pair(*shape), {"reduction": reduction})
    first = spec.samples()[0]
    rows = torch.arange(torch.Size(shape).numel()) % first.tensors[0].numel()
    tensors = tuple(t.flatten()[rows].view(shape) for t in first.tensors)
    return Sample(str(shape), tensors, {**first.options, "reduction": reduction})


@each_pair
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_check(spec, shape, reduction, kernels, device):
    sample = large(spec, shape, reduction).to(torch.float64, device)
    loss, reference = spec.build(sample, kernels), spec.build(sample, "reference")
    check_loss(loss, reference, [sample], dtypes=(torch.float32, torch.bfloat16), checks=["memory"])


OPTIONS = [
    {"label_smoothing": 0.1},
    {"z_loss": 0.1},
    {"softcap": 5.0},
    {"temperature": 2.0},
    {"weight": torch.linspace(0, 1, 2048)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_no_option_costs_memory(options, kernels, device):
    sample = Sample("rows", label_pair(256, 2048), options).to(torch.float32, device)
    loss = CrossEntropyLoss(**sample.options, backend=kernels)
    check_loss(loss, loss, [sample], dtypes=(torch.float32, torch.bfloat16), checks=["memory"])


def test_class_probabilities_need_no_copy(kernels, device):
    sample = Sample("rows", probability_pair(256, 2048)).to(torch.float32, device)
    loss = CrossEntropyLoss(backend=kernels)
    check_loss(loss, loss, [sample], dtypes=(torch.float32, torch.bfloat16), checks=["memory"])


def test_inplace_backward_allocates_no_gradient(kernels, device):
    x, y = (t.to(device) for t in label_pair(256, 2048, ignored=False))
    x = x.float().requires_grad_()
    logits = x * 2
    loss = CrossEntropyLoss(inplace_backward=True, backend=kernels)(logits, y)
    assert peak_bytes(lambda: torch.autograd.grad(loss, logits), device) < x.nbytes / 8


@each_pair
def test_what_is_saved_between_forward_and_backward(spec, kernels, device):
    """The inputs themselves and two numbers a row."""
    sample = large(spec, LARGE["rows"], "mean").to(torch.float32, device)
    saved = []
    x = sample.tensors[0].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spec.build(sample, kernels)(x, *sample.tensors[1:])
    owned = {t.untyped_storage().data_ptr() for t in (x, *sample.tensors)}
    extra = sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() not in owned)
    assert extra <= 4 * (2 * x.shape[0] + 1)


def test_a_recomputed_head_keeps_no_gradients(kernels, device):
    head = torch.randn(16_384, 64, device=device).requires_grad_()
    hidden, labels = torch.randn(64, 64, device=device), torch.randint(16_384, (64,), device=device)

    def forward(recompute):
        options = {"max_workspace_mb": 1.0, "recompute": recompute, "backend": kernels}
        return peak_bytes(lambda: linear_cross_entropy(hidden, head, labels, **options), device)

    assert forward(True) < head.nbytes < forward(False)


def test_a_chunk_of_logits_is_gone_when_low_precision_gradients_are_made():
    """They are made of their fp32 sums, and on a CPU memory that is kept would stand beside both."""
    head = torch.randn(65_536, 64, dtype=torch.bfloat16, requires_grad=True)
    hidden, labels = torch.randn(128, 64, dtype=torch.bfloat16), torch.randint(65_536, (128,))
    loss = lambda: linear_cross_entropy(hidden, head, labels, max_workspace_mb=32.0, backend="cpp")
    sums, chunk = 2 * head.nbytes, 2 * 128 * 65_536
    assert peak_bytes(lambda: torch.autograd.grad(loss(), head)) < sums + max(chunk, head.nbytes) + head.nbytes / 2


def test_labels_are_never_expanded_to_one_hot(kernels, device):
    x = torch.randn(64, 16_384, device=device).bfloat16()
    y = torch.randint(16_384, (64,), device=device)
    with torch.no_grad():
        assert peak_bytes(lambda: CrossEntropyLoss(backend=kernels)(x, y), device) < 4096
