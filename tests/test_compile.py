"""torch.compile: whole graphs, dynamic shapes, no recompiling, the operators' own declarations."""

import pytest
import torch
import torch._dynamo.testing
from sets import each_pair, each_spec

from fused_losses import CrossEntropyLoss, MSELoss, use_backend
from fused_losses.backends import choice
from fused_losses.functional import cross_entropy, mse_loss
from fused_losses.specs import SPECS
from fused_losses.testing import check_loss

# Compiling takes a second a sample: one of each path.
PATHS = (
    "mean",
    "none",
    "sample_weight",
    "both_weights",
    "everything_mean",
    "probabilities_mean",
    "image",
    "normalizer",
    "batchmean",
)


def of_each_path(spec):
    """The first sample of every path that a loss has."""
    by_path = {}
    for sample in spec.samples():
        by_path.setdefault(sample.name.split("-")[0], sample)
    return [by_path[path] for path in PATHS if path in by_path]


@each_spec
def test_check(spec, backend, device):
    for sample in of_each_path(spec)[: 2 if backend == "reference" else None]:
        moved = sample.to(torch.float64, device)
        loss, reference = spec.build(moved, backend), spec.build(moved, "reference")
        check_loss(loss, reference, [moved], dtypes=(torch.float32,), checks=["compiled"])


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss", "SigmoidFocalLoss"])
def test_inductor(loss, kernels, device):
    """The whole step of one loss of each kind, through code generation, in one graph for every size."""
    spec = next(spec for spec in SPECS if spec.name == loss)
    sample = next(s for s in spec.samples() if s.name.split("-")[0] == "mean").to(torch.float32, device)
    module = spec.build(sample, kernels)

    def step(x, t):
        return module(torch.tanh(x) * 3, t) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (12, 5, 7):
        x, t = (tensor[:rows].clone() for tensor in sample.tensors)
        x.requires_grad_()
        torch.testing.assert_close(compiled(x, t), step(x, t))
        gradients = [torch.autograd.grad(f(x, t), x)[0] for f in (compiled, step)]
        torch.testing.assert_close(*gradients)


@each_pair
def test_sizes_share_one_graph(spec, kernels, device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    sample = of_each_path(spec)[0].to(torch.float32, device)
    compiled = torch.compile(spec.build(sample, kernels), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (4, 5, 6, 7):
        x = sample.tensors[0][:rows].clone().requires_grad_()
        compiled(x, sample.tensors[1][:rows]).sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_an_attribute_recompiles(kernels):
    """Options are read at call time, compiled or not."""
    loss = MSELoss(backend=kernels)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, t = torch.randn(4, 5), torch.randn(4, 5)
    assert compiled(x, t).shape == ()
    loss.reduction = "none"
    assert compiled(x, t).shape == (4, 5)


def test_use_backend_is_guarded():
    """A graph that was compiled for one backend is not used for another."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x, t: mse_loss(x, t), fullgraph=True, backend=counter)
    x, t = torch.randn(4, 5), torch.randn(4, 5)
    compiled(x, t)
    kernels = {str(node.target) for node in counter.graphs[0].graph.nodes}
    with use_backend("reference"):
        compiled(x, t)
    plain = {str(node.target) for node in counter.graphs[-1].graph.nodes}
    assert counter.frame_count == 2
    assert any("fused_losses" in name for name in kernels) and not any("fused_losses" in name for name in plain)


def test_autocast_inside_a_graph(kernels, device):
    def step(x, w, y):
        with torch.autocast(device, torch.bfloat16):
            return CrossEntropyLoss(backend=kernels)(x @ w, y)

    x, w = torch.randn(6, 8, device=device), torch.randn(8, 20, device=device, requires_grad=True)
    y = torch.randint(20, (6,), device=device)
    results = [f(x, w, y) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    assert results[0].dtype == results[1].dtype == torch.float32
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result, w)[0] for result in results))


def test_a_gradient_inside_a_graph(kernels, device):
    """torch.func.grad under torch.compile once met kernels without a derivative, and gave zeros."""
    x, y = torch.randn(6, 20, device=device), torch.randint(20, (6,), device=device)
    inside = torch.func.grad(lambda x: cross_entropy(x, y, backend=kernels))
    expected = torch.func.grad(lambda x: torch.nn.functional.cross_entropy(x, y))(x)
    torch.testing.assert_close(torch.compile(inside, fullgraph=True, backend="aot_eager")(x), expected)


def test_export(kernels, device):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = CrossEntropyLoss(backend=kernels)

        def forward(self, x, y):
            return self.loss(x, y)

    x, y = torch.randn(6, 20, device=device), torch.randint(20, (6,), device=device)
    program = torch.export.export(Model(), (x, y))
    torch.testing.assert_close(program.module()(x, y), torch.nn.functional.cross_entropy(x, y))


def operator_calls(device):
    """Arguments for every operator, of both kinds of targets and all reductions."""
    x, t, w = (torch.rand(6, 5, device=device) * 0.8 + 0.1 for _ in range(3))
    y, row = torch.tensor([0, 1, 2, -100, 4, 0], device=device), torch.rand(6, device=device)
    for reduction, upstream in (
        ("mean", torch.tensor(2.0, device=device)),
        ("none", torch.rand(6, 5, device=device)),
    ):
        common = ("bce_with_logits", x, t, w, None, 0.0, 0.0, reduction)
        yield "pointwise_forward", (*common, torch.float32)
        yield "pointwise_backward", ("mse", upstream, x, t, None, None, 0.0, 0.0, reduction, True, False)
        moved = (tensor.t() if tensor.ndim else tensor for tensor in (upstream, x, t, w, w))
        yield "pointwise_backward", ("bce_with_logits", *moved, 0.0, 0.0, reduction, True, True)
    for target, upstream, reduction in ((y, row, "none"), (t, torch.tensor(1.0, device=device), "mean")):
        options = (-100, 0.1, 0.01, 5.0, 2.0)
        yield "cross_entropy_forward", (x, target, None, row, reduction, *options, torch.float32)
        stats = torch.cat([x.amax(1), torch.ones(6, device=device), torch.ones(1, device=device)])
        saved = (upstream, x.clone(), target, None, row, stats, reduction, *options)
        yield "cross_entropy_backward", saved
        yield "cross_entropy_backward_", saved
        if target.is_floating_point():
            yield "cross_entropy_target_backward", saved


@pytest.mark.parametrize("number", range(13))
def test_opcheck(number, kernels, device):
    name, arguments = list(operator_calls(device))[number]
    assert len(list(operator_calls(device))) == 13
    choice.resolve(device, torch.float32, kernels)
    torch.library.opcheck(getattr(choice.KERNELS[kernels], name), arguments)
