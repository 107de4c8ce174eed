"""The linear family against torch's LinearCrossEntropyLoss, and what torch's has not."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_losses import LinearCrossEntropyLoss
from fused_losses.functional import linear_cross_entropy, linear_log_probs

ORIGINAL = getattr(torch.nn, "LinearCrossEntropyLoss", None)
needs_the_original = pytest.mark.skipif(ORIGINAL is None, reason="this torch has no LinearCrossEntropyLoss")
FEATURES, CLASSES, ROWS = 6, 11, 9
PER_CLASS = torch.linspace(0.3, 2.0, CLASSES, dtype=torch.float64)


@pytest.fixture(autouse=True)
def on_the_device(request):
    """Tensors are made where the kernels run."""
    torch.manual_seed(0)
    on_backends = {"backend", "kernels"} & set(request.fixturenames)
    with torch.device(request.getfixturevalue("device") if on_backends else "cpu"):
        yield


def rows(*leading, dtype=torch.float64):
    return torch.randn(*leading, FEATURES, dtype=dtype)


def labels_of(*shape):
    labels = torch.randint(CLASSES, shape)
    if shape:
        labels.view(-1)[::4] = -100
    return labels


def shares_of(*shape):
    """Class probabilities, whose second dimension is the class, or the only one."""
    return torch.softmax(torch.randn(*shape, dtype=torch.float64), dim=min(1, len(shape) - 1))


# Constructor options beside the tensors that torch's module takes.
CALLS = {
    "rows": ({}, rows(ROWS), labels_of(ROWS)),
    "bias": ({"bias": True}, rows(ROWS), labels_of(ROWS)),
    "weight": ({"weight": PER_CLASS}, rows(ROWS), labels_of(ROWS)),
    "smoothing": ({"label_smoothing": 0.2, "bias": True}, rows(ROWS), labels_of(ROWS)),
    "weight_and_smoothing": ({"label_smoothing": 0.2, "weight": PER_CLASS}, rows(ROWS), labels_of(ROWS)),
    "ignore_index": ({"ignore_index": 3}, rows(ROWS), torch.arange(ROWS)),
    "probabilities": ({"bias": True}, rows(ROWS), shares_of(ROWS, CLASSES)),
    "weighted_probabilities": ({"weight": PER_CLASS, "label_smoothing": 0.1}, rows(ROWS), shares_of(ROWS, CLASSES)),
    "unbatched": ({"bias": True}, rows(), torch.tensor(3)),
    "unbatched_probabilities": ({}, rows(), shares_of(CLASSES)),
    "dimensions": ({"out_features": (3, 2), "bias": True}, rows(ROWS), labels_of(ROWS, 3, 2)),
    "weighted_dimensions": ({"out_features": (4,), "weight": PER_CLASS}, rows(ROWS), labels_of(ROWS, 4)),
    "dimensions_smoothed": ({"out_features": (4,), "label_smoothing": 0.2}, rows(ROWS), labels_of(ROWS, 4)),
    "dimensions_of_probabilities": ({"out_features": (3, 2)}, rows(ROWS), shares_of(ROWS, CLASSES, 3, 2)),
    "no_rows": ({"bias": True}, rows(0), labels_of(0)),
    "all_ignored": ({}, rows(ROWS), torch.full((ROWS,), -100)),
}


def twins(options, dtype=torch.float64, **ours):
    """torch's module and ours, of the same parameters."""
    theirs = ORIGINAL(FEATURES, CLASSES, dtype=dtype, **options)
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, dtype=dtype, **options, **ours)
    module.load_state_dict(theirs.state_dict())
    return theirs, module


def step(module, input, target):
    """The loss, and the gradients of the input and every parameter."""
    leaf = input.clone().requires_grad_()
    loss = module(leaf, target)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, [leaf, *module.parameters()], upstream)


@needs_the_original
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_torch(name, reduction, backend, device):
    options, *tensors = CALLS[name]
    theirs, ours = (m.to(device) for m in twins({**options, "reduction": reduction}, backend=backend))
    tensors = [tensor.to(device) for tensor in tensors]
    expected, got = step(theirs, *tensors), step(ours, *tensors)
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12, equal_nan=True)


@needs_the_original
def test_torchs_chunking_options_are_taken(backend):
    """And change nothing: chunks here have a size of their own."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    theirs, ours = twins({"options": options}, torch.float32, backend=backend)
    input, target = rows(ROWS, dtype=torch.float32), labels_of(ROWS)
    for a, b in zip(step(ours, input, target), step(theirs, input, target)):
        torch.testing.assert_close(a, b)


@needs_the_original
def test_is_a_drop_in():
    theirs, ours = twins({"bias": True, "weight": PER_CLASS, "out_features": (2,)})
    assert isinstance(ours, ORIGINAL)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "linear.weight", "linear.bias"]
    assert [tuple(p.shape) for p in ours.parameters()] == [tuple(p.shape) for p in theirs.parameters()]
    taken = inspect.signature(ORIGINAL.__init__).parameters
    assert all(name in "self in_features num_classes" or p.kind is p.KEYWORD_ONLY for name, p in taken.items())
    attributes = {name: getattr(theirs, name) for name in taken if hasattr(theirs, name)}
    for name in ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "options"):
        assert attributes[name] == getattr(ours, name)


@needs_the_original
@pytest.mark.parametrize(
    "options", [{"weight": torch.ones(CLASSES + 1)}, {"label_smoothing": 1.5}, {"label_smoothing": -0.1}]
)
def test_refuses_what_torch_refuses_of_options(options):
    for kind in (ORIGINAL, LinearCrossEntropyLoss):
        with pytest.raises(RuntimeError):
            kind(FEATURES, CLASSES, **options)


REFUSED = {
    "features": ({}, rows(ROWS)[:, :5], labels_of(ROWS)),
    "rows": ({}, rows(ROWS), labels_of(ROWS - 1)),
    "unbatched_dimensions": ({"out_features": (2,)}, rows(), labels_of(2)),
    "ignored_probabilities": ({"ignore_index": 1}, rows(ROWS), shares_of(ROWS, CLASSES)),
    "too_large": ({}, rows(ROWS), torch.full((ROWS,), CLASSES)),
    "negative": ({}, rows(ROWS), torch.full((ROWS,), -1)),
    "floats": ({}, rows(ROWS), torch.zeros(ROWS, dtype=torch.float64)),
    "dtypes": ({}, rows(ROWS, dtype=torch.float32), labels_of(ROWS)),
    "reduction": ({"reduction": "median"}, rows(ROWS), labels_of(ROWS)),
}


@needs_the_original
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_torch_refuses(name):
    options, *tensors = REFUSED[name]
    theirs, ours = twins(options)
    with pytest.raises((RuntimeError, ValueError, IndexError)) as of_torch:
        theirs(*tensors)
    with pytest.raises(of_torch.type):
        ours(*tensors)


def test_the_default_ignores_minus_100_but_no_class(backend):
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, backend=backend)
    assert module.ignore_index is None
    input, target = rows(4, dtype=torch.float32), torch.tensor([1, -100, 0, 10])
    logits = module.linear(input)
    torch.testing.assert_close(module(input, target), F.cross_entropy(logits, target))
    torch.testing.assert_close(module(input, logits.detach().softmax(1)), F.cross_entropy(logits, logits.softmax(1)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_sequence_is_its_tokens(reduction, backend):
    """(B, T, D), which torch's module refuses."""
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, dtype=torch.float64, reduction=reduction, backend=backend)
    input, target = rows(2, 5), labels_of(2, 5)
    expected = step(module, input.flatten(0, 1), target.flatten())
    got = step(module, input, target)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.flatten(), b.flatten())
    assert got[0].shape == ((2, 5) if reduction == "none" else ()) and got[1].shape == input.shape


def plain_statistics(logits, target, ignore_index=-100):
    log_p = torch.log_softmax(logits, -1)
    counted = target != ignore_index
    label = log_p.gather(-1, target.where(counted, 0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    values = [tensor.where(counted, 0.0) for tensor in (label, logits.logsumexp(-1), entropy)]
    return *values, (logits.argmax(-1) == target) & counted


@pytest.mark.parametrize("leading", [(), (ROWS,), (2, 5), (70,)])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 0.5}, {"ignore_index": 4}])
@pytest.mark.parametrize("learnt", [False, True])
def test_statistics(leading, options, learnt, backend):
    input, weight, bias = rows(*leading), rows(CLASSES), torch.randn(CLASSES, dtype=torch.float64)
    input.requires_grad_(learnt)
    target = labels_of(*leading) if "ignore_index" not in options else torch.randint(CLASSES, leading)
    call = {**options, "linear_bias": bias, "max_workspace_mb": 1e-3, "backend": backend}
    loss, statistics = linear_cross_entropy(input, weight, target, return_stats=True, **call)
    logits = F.linear(input.detach(), weight, bias)
    if "softcap" in options:
        logits = 2.0 * torch.tanh(logits / 2.0) / 0.5
    expected = plain_statistics(logits, target, options.get("ignore_index", -100))
    for name, value, exact in zip(statistics._fields, statistics, expected):
        assert value.shape == torch.Size(leading) and not value.requires_grad, name
        torch.testing.assert_close(value, exact, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(loss, linear_cross_entropy(input, weight, target, **call))
    tokens = linear_log_probs(input, weight, target, **call)
    for value, exact in zip(tokens, expected[:3]):
        torch.testing.assert_close(value, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_statistics_leave_the_gradient_as_it_is(reduction, backend):
    input, weight, target = rows(ROWS).requires_grad_(), rows(CLASSES).requires_grad_(), labels_of(ROWS)
    results = []
    for described in (False, True):
        options = {"reduction": reduction, "return_stats": described, "backend": backend}
        result = linear_cross_entropy(input, weight, target, **options)
        loss = result[0] if described else result
        results.append((loss, *torch.autograd.grad(loss.sum(), [input, weight])))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_accuracy_counts_the_first_of_equal_logits(backend):
    """As argmax does, so that a head of zeros is not always right."""
    weight, input = torch.zeros(4, 3), torch.ones(5, 3)
    _, statistics = linear_cross_entropy(
        input, weight, torch.tensor([0, 1, 3, -100, 0]), return_stats=True, backend=backend
    )
    assert statistics.correct.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_either_library_of_products_gives_the_same(in_blocks, biased, monkeypatch):
    """MKL's on the processors of its maker, oneDNN's in blocks of classes on others."""
    from fused_losses.losses.linear import _head

    monkeypatch.setattr(_head, "_packing_is_slow", lambda: in_blocks)
    monkeypatch.setattr(_head, "BLOCK_BYTES", 1)
    products = []
    monkeypatch.setattr(torch, "mm", lambda *of, mm=torch.mm, **to: products.append(of) or mm(*of, **to))
    input, weight, target = rows(40), rows(700), torch.arange(40)
    bias = torch.randn(700, dtype=torch.float64) if biased else None
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (input, weight, bias)]
        loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], backend="cpp")
        results.append((loss, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])))
    assert any(of[0].dtype is torch.float32 for of in products) is not in_blocks
    for exact, value in zip(*results):
        torch.testing.assert_close(value.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 31, 33, 100, 256, 257, 2047, 2048, 5000])
@pytest.mark.parametrize("megabytes", [None, 1.2, 4.0])
def test_chunks_are_whole_tiles_that_fit(rows, megabytes):
    from fused_losses.losses.linear._head import LEAST_ROWS, WORKSPACE_MB, Head, chunk_rows

    head = Head(torch.empty(1000, 2, dtype=torch.bfloat16), None)
    size = chunk_rows(rows, head, megabytes)
    assert size == rows or (size % LEAST_ROWS == 0 and size < rows)
    assert size <= LEAST_ROWS or size * 1000 * 2 <= (megabytes or WORKSPACE_MB["cpu"]) * 2**20


@pytest.mark.parametrize("value", [0, -1.0, 0.0, float("nan")])
def test_a_workspace_of_nothing(value):
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, max_workspace_mb=value)
    with pytest.raises(ValueError, match="max_workspace_mb must be above 0"):
        module(rows(2, dtype=torch.float32), torch.tensor([0, 1]))


@pytest.mark.parametrize("label", [-1, CLASSES, 2**40])
@pytest.mark.parametrize("call", [linear_cross_entropy, linear_log_probs])
def test_a_label_out_of_range_is_found_before_any_product(call, label, monkeypatch):
    from fused_losses.losses.linear import _head

    def no_product(*_):
        raise AssertionError("logits were made")

    for name in ("write_logits", "logits"):
        monkeypatch.setattr(_head.Head, name, no_product)
    target = torch.zeros(70, dtype=torch.long)
    target[-1] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds for {CLASSES} classes"):
        call(rows(70), rows(CLASSES), target, backend="cpp")


def test_messages_name_the_argument_and_the_way_out(backend):
    input, weight, target = rows(ROWS), rows(CLASSES), labels_of(ROWS)
    cases = {
        r"one last dimension \(features\), got 5 and 6": (input[:, :5], weight, target, {}),
        r"linear_bias must have the shape \(11,\)": (input, weight, target, {"linear_bias": torch.zeros(3)}),
        r"torch.float64 and linear_weight torch.float32.*input.to\(linear_weight.dtype\).*autocast": (
            input,
            weight.float(),
            target,
            {},
        ),
        r"linear_bias torch.float16": (input, weight, target, {"linear_bias": torch.zeros(CLASSES).half()}),
        r"flatten its leading dimensions": (rows(2, 3), weight[:, None], labels_of(2, 3), {}),
        r"class indices must be int64, got torch.float64: target.long\(\)": (input, weight, target.double(), {}),
    }
    for match, (*tensors, options) in cases.items():
        with pytest.raises(RuntimeError, match=match):
            linear_cross_entropy(*tensors, **options, backend=backend)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_computes_the_same(copied, backend):
    weight = PER_CLASS.float().to(torch.get_default_device())
    module = LinearCrossEntropyLoss(
        FEATURES, CLASSES, bias=True, weight=weight, z_loss=0.1, softcap=3.0, backend=backend
    )
    input, target = rows(ROWS, dtype=torch.float32), labels_of(ROWS)
    for a, b in zip(step(copied(module), input, target), step(module, input, target)):
        assert torch.equal(a, b)


def test_a_saved_state_is_loaded(backend):
    modules = [LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, backend=backend) for _ in range(2)]
    file = io.BytesIO()
    torch.save(modules[0].state_dict(), file)
    file.seek(0)
    modules[1].load_state_dict(torch.load(file, weights_only=True))
    input, target = rows(ROWS, dtype=torch.float32), labels_of(ROWS)
    assert torch.equal(*(module(input, target) for module in modules))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_derivatives(reduction, backend):
    target = torch.tensor([1, -100, 3])
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4, 2), (4,))]

    def loss(input, weight, bias):
        options = {"linear_bias": bias, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}
        return linear_cross_entropy(input, weight, target, reduction=reduction, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


def test_second_derivatives_of_tokens(backend):
    target = torch.tensor([1, -100, 3])
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4, 2))]
    assert torch.autograd.gradgradcheck(lambda *t: linear_log_probs(*t, target, backend=backend), tensors)


@pytest.fixture
def functions(backend):
    """Our loss and the plain one, of a batch (N, D) and a weight (C, D)."""
    target = torch.tensor([1, -100, 3, 0])
    return (
        lambda input, weight: linear_cross_entropy(input, weight, target, backend=backend),
        lambda input, weight: F.cross_entropy(F.linear(input, weight), target),
    )


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
@pytest.mark.parametrize("argument", [0, 1])
def test_transforms(transform, argument, functions):
    tensors = rows(4), rows(CLASSES)
    torch.testing.assert_close(*(transform(f, argnums=argument)(*tensors) for f in functions))


def test_vmap_over_a_batch_of_heads(functions):
    heads = torch.randn(3, CLASSES, FEATURES, dtype=torch.float64)
    input = rows(4)
    torch.testing.assert_close(*(torch.func.vmap(f, in_dims=(None, 0))(input, heads) for f in functions))
    per_head = [torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(None, 0))(input, heads) for f in functions]
    torch.testing.assert_close(*per_head)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic, kernels, device):
    """The whole step; the dynamic one through code generation, for several numbers of rows."""
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, backend=kernels)

    def loss(input, target):
        return module(torch.tanh(input), target) * 2

    generated = {} if dynamic else {"backend": "aot_eager"}
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, **generated)
    for count in (ROWS, 5, 14) if dynamic else (ROWS,):
        input, target = rows(count, dtype=torch.float32).requires_grad_(), labels_of(count)
        results = []
        for function in (compiled, loss):
            value = function(input, target)
            results.append((value, *torch.autograd.grad(value, [input, *module.parameters()])))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_tokens_compile_as_one_graph(dynamic, kernels):
    weight = rows(CLASSES, dtype=torch.float32).requires_grad_()

    def loss(input, target):
        tokens = linear_log_probs(input, weight, target, backend=kernels)
        return (tokens.log_probs + 0.1 * tokens.entropy).sum() + tokens.log_sum_exp.square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (ROWS, 5) if dynamic else (ROWS,):
        input, target = rows(count, dtype=torch.float32).requires_grad_(), labels_of(count)
        results = [torch.autograd.grad(f(input, target), [input, weight]) for f in (compiled, loss)]
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors_give_shapes(reduction):
    with FakeTensorMode():
        input, weight = torch.empty(6, 8, requires_grad=True), torch.empty(30, 8, requires_grad=True)
        labels = torch.zeros(6, dtype=torch.long)
        loss = linear_cross_entropy(input, weight, labels, reduction=reduction)
        of_input, of_weight = torch.autograd.grad(loss, (input, weight), torch.ones_like(loss))
        values = linear_log_probs(input, weight, labels)
    assert loss.shape == (() if reduction == "mean" else (6,))
    assert (of_input.shape, of_weight.shape) == (input.shape, weight.shape)
    assert [value.shape for value in values] == [(6,)] * 3
