"""torch.compile: whole graphs, dynamic shapes, no recompiling, the operators' own declarations."""

import pytest
import torch
import torch._dynamo.testing
from sets import each_pair, each_spec

from fused_losses import CrossEntropyLoss, MSELoss, use_backend
from fused_losses.backends import choice, loading
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


def test_an_attribute_recompiles(kernels, device):
    """Options are read at call time, compiled or not."""
    loss = MSELoss(backend=kernels)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, t = torch.randn(2, 4, 5, device=device)
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


def has_extension(device):
    return loading.unavailable_reason("_C_cpu" if device == "cpu" else "_C_cuda") is None


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
    if has_extension(device):
        pair = x, t.t().contiguous().t(), w, None
        for needed in ((True, False), (False, True), (True, True)):
            yield "pointwise_with_gradients", ("huber", *pair, 1.0, 0.0, "mean", *needed, torch.float32)
        if device == "cuda":
            gradients = torch.rand_like(x), x.new_empty(0)
            two = torch.tensor(2.0, device=device)
            yield "pointwise_backward_unless_one_", ("huber", two, *pair, 1.0, 0.0, "mean", *gradients)
    for target, upstream, reduction in ((y, row, "none"), (t, torch.tensor(1.0, device=device), "mean")):
        options = (-100, 0.1, 0.01, 5.0, 2.0)
        yield "cross_entropy_forward", (x, target, None, row, reduction, *options, torch.float32)
        stats = torch.cat([x.amax(1), torch.ones(6, device=device), torch.ones(1, device=device)])
        saved = (upstream, x.clone(), target, None, row, stats, reduction, *options)
        yield "cross_entropy_backward", saved
        yield "cross_entropy_backward_", saved
        if target.is_floating_point():
            yield "cross_entropy_target_backward", saved


def row_calls(device):
    """Arguments for every operator on a chunk of a head's logits."""
    x, t, w = (torch.rand(6, 5, device=device) * 3 for _ in range(3))
    y = torch.tensor([0, 1, 2, -100, 4, 7], device=device)  # a label outside is another block's
    row, factors = torch.rand(6, device=device), torch.rand(5, device=device)
    for target, weight in ((y.clamp(max=4), factors), (torch.softmax(t, 1), None)):
        options = -100, 0.1, 0.01, 5.0, 2.0
        yield "cross_entropy_with_gradient_", (x.clone(), target, weight, row, *options)
        if device == "cpu":
            yield "cross_entropy_with_gradient", (x, target, weight, row, "mean", *options, torch.float32)
    for of_classes in (None, factors):
        yield "row_statistics", (x, y, of_classes, 5.0, 2.0)
        tables = torch.rand(5, 6, device=device) + 3, torch.rand(4, 6, device=device)
        yield "row_gradient_", (x.clone(), y, *tables, of_classes, 5.0, 2.0)
    for name in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        kind = name, 0.3, 2.0
        yield "divergence_forward", (x, t, *kind)
        statistics = torch.rand(10, 6, device=device) + 3
        yield "divergence_backward", (row, x, t, statistics, *kind, True, name == "jsd")
        yield "divergence_backward_", (row, x.clone(), t.clone(), statistics, *kind, name != "tvd", True)
    if device == "cpu":
        yield "add_", (x.clone(), w.bfloat16())
        yield "add_product_", (torch.zeros(5, 5), x.bfloat16(), w.bfloat16(), False)
    if has_extension(device):
        yield "scaled", (x, torch.tensor(2.0, device=device), torch.bfloat16)


def linear_calls(device, backend):
    """Arguments for every operator from hidden states to losses, which torch.ops has for compiled graphs."""
    x, teacher = torch.randn(6, 4, device=device), torch.randn(6, 3, device=device)
    weight, teacher_weight = torch.randn(5, 4, device=device), torch.randn(5, 3, device=device)
    bias, row = torch.randn(5, device=device), torch.rand(6, device=device)
    y = torch.tensor([0, 1, 2, -100, 4, 0], device=device)
    rest = 1e-3, torch.float32, backend
    numbers = [5], -100, 0.1, 0.01, 5.0, 2.0, *rest
    shares = torch.softmax(torch.randn(6, 5, device=device), 1)
    for target, needs, describe in (
        (y, [True, True, True], True),
        (y, [False] * 3, False),
        (shares, [True, False, True], False),
    ):
        yield (
            "linear_cross_entropy_forward",
            (x, weight, bias, target, None, row, *numbers, needs, describe, not any(needs)),
        )
    stats = torch.rand(2, 6, device=device) + 3
    for target, needs, of_target in ((y, [True, True, False], False), (shares, [False, True, True], True)):
        tensors = row, x, weight, bias, target, torch.rand(5, device=device), None, stats
        yield "linear_cross_entropy_backward", (*tensors, *numbers, needs, of_target)
    tokens = x, weight, bias, y
    yield "linear_log_probs_forward", (*tokens, -100, 5.0, 2.0, *rest)
    statistics = torch.rand(5, 6, device=device) + 3
    upstream = torch.rand(3, 6, device=device)
    yield "linear_log_probs_backward", (upstream, *tokens, statistics, -100, 5.0, 2.0, *rest, [True, True, True])
    heads = x, weight, bias, teacher, teacher_weight, None, y, row
    for hard, teacher_needs in ((0.0, [False] * 3), (0.5, [True, True, False])):
        numbers = "jsd", 0.3, 2.0, 0.7, hard, -100, *rest
        yield "linear_divergence", (*heads, *numbers, [True, True, True], teacher_needs)


def every_call(device, backend):
    yield from operator_calls(device)
    yield from row_calls(device)
    yield from linear_calls(device, backend)


COUNT = len(list(every_call("cpu", "cpp")))


@pytest.mark.parametrize("number", range(COUNT))
def test_opcheck(number, kernels, device):
    calls = list(every_call(device, kernels))
    if number >= len(calls):
        pytest.skip("an operator of CPUs alone")
    name, arguments = calls[number]
    choice.resolve(device, torch.float32, kernels)
    operator = getattr(choice.KERNELS[kernels], name, None) or getattr(torch.ops.fused_losses, name).default
    torch.library.opcheck(operator, arguments)


def test_every_operator_is_checked():
    """But for that of GPUs alone, those without tensors, and those of ranks, checked in their tests."""
    choice.resolve("cpu", torch.float32, "cpp")
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    declared = {name.split(".")[0] for namespace, name in names if namespace == "fused_losses"}
    checked = {name for name, _ in every_call("cpu", "cpp")}
    elsewhere = {"pointwise_backward_unless_one_", "empty", "empty_cache", "cpu_capability"}
    elsewhere |= {"vocab_parallel_forward", "vocab_parallel_backward"}
    assert declared - elsewhere == checked
