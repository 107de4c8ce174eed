"""Bad input raises torch's exception type, on every backend alike, with a message that helps."""

import pytest
import torch

import fused_losses
from fused_losses.backends import choice
from fused_losses.functional import mse_loss
from fused_losses.specs import SPECS

CASES = [(spec, error) for spec in SPECS for error in spec.errors()]
# Options torch does not have.
OURS = {"normalizer", "softcap", "temperature", "z_loss", "alpha", "gamma", "eps"}


def name_of(value):
    return value.name if value in SPECS else value.sample.name


def call(module, error):
    return module(*error.sample.tensors, **error.sample.extras)


def kept(error):
    return [tensor.clone() for tensor in error.sample.tensors if tensor.device.type != "meta"]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("where", [None, "reference", "cpp"])
@pytest.mark.parametrize(("spec", "error"), CASES, ids=name_of)
def test_raises(spec, error, where):
    before = kept(error)
    kind, match = error.error, error.match
    if where == "cpp" and not error.sample.tensors[0].is_floating_point():
        kind, match = RuntimeError, f"{match}|no kernels for torch.int64"  # asked for by name, they say so themselves
    with pytest.raises(kind, match=match):
        call(spec.build(error.sample, where), error)
    assert all(torch.equal(a, b) for a, b in zip(before, kept(error)))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("spec", "error"),
    [(s, e) for s, e in CASES if s.original and not e.sample.extras and not OURS & set(e.sample.options)],
    ids=name_of,
)
def test_torch_raises_the_same_type(spec, error):
    with pytest.raises(error.error):
        call(spec.original(**error.sample.options), error)


LOGITS, LABELS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
SHARES = torch.softmax(LOGITS.flip(0), 1)
INFINITY, NAN = float("inf"), float("nan")
ONE_INFINITE = torch.tensor([[0.0, -INFINITY, 1.0]])
# What a drop-in may meet: our result, or the type of our error, is torch's.
OUTCOMES = {
    "bytes": (LOGITS, LABELS.byte(), {}),
    "int16": (LOGITS, LABELS.short(), {}),
    "bools": (LOGITS, LABELS.bool(), {}),
    "column_of_labels": (LOGITS, LABELS[:, None], {}),
    "row_of_labels": (LOGITS, LABELS[None], {}),
    "no_rows": (LOGITS[:0], LABELS[:0], {}),
    "no_pixels": (torch.zeros(2, 3, 0), torch.zeros(2, 0).long(), {}),
    "nothing": (torch.zeros(0, 0), torch.zeros(0).long(), {}),
    "no_classes": (torch.zeros(2, 0), torch.zeros(2).long(), {}),
    "no_classes_but_ignored": (torch.zeros(2, 0), torch.full((2,), -100), {}),
    "no_classes_of_shares": (torch.zeros(2, 0), torch.zeros(2, 0), {}),
    "vector": (LOGITS[0], LABELS[0], {}),
    "ignored_vector": (LOGITS[0], torch.tensor(-100), {}),
    "vector_and_one_label": (LOGITS[0], LABELS[:1], {}),
    "integer_shares": (LOGITS, torch.ones(4, 3).long(), {}),
    "wide_shares": (LOGITS, SHARES.double(), {}),
    "shares_of_another_shape": (LOGITS, SHARES[:, :2], {}),
    "negative_shares": (LOGITS, -SHARES, {}),
    "two_dimensional_weight": (LOGITS, LABELS, {"weight": torch.ones(1, 3)}),
    "wide_weight": (LOGITS, LABELS, {"weight": torch.ones(3).double()}),
    "narrow_weight": (LOGITS, LABELS, {"weight": torch.ones(3).half()}),
    "negative_weight": (LOGITS, LABELS, {"weight": -torch.ones(3)}),
    "weight_of_zero": (LOGITS, LABELS, {"weight": torch.zeros(3)}),
    "weight_of_an_absent_class": (LOGITS, LABELS.clamp(max=1), {"weight": torch.tensor([1.0, 2.0, INFINITY])}),
    "ignored_out_of_range": (LOGITS, torch.tensor([0, 1, 7, 0]), {"ignore_index": 7}),
    "negative_label": (LOGITS, torch.tensor([0, -1, 0, 1]), {}),
    "ignored_class_of_shares": (LOGITS, SHARES, {"ignore_index": 1}),
    "all_ignored": (LOGITS, torch.full((4,), -100), {"reduction": "sum"}),
    "other_reduction": (LOGITS, LABELS, {"reduction": "avg"}),
    "none_as_reduction": (LOGITS, LABELS, {"reduction": None}),
    "no_target": (LOGITS, None, {}),
    "a_list": (LOGITS, [0, 1, 2, 0], {}),
    "infinite": (torch.full((4, 3), INFINITY), LABELS, {}),
    "minus_infinite": (torch.full((4, 3), -INFINITY), LABELS, {}),
    "impossible_class": (ONE_INFINITE, LABELS[:1], {"reduction": "none"}),
    "impossible_label": (ONE_INFINITE, LABELS[1:2], {"reduction": "none"}),
    "certain_label": (-ONE_INFINITE, LABELS[1:2], {"reduction": "none"}),
    "impossible_smoothed": (ONE_INFINITE, LABELS[:1], {"label_smoothing": 0.1}),
    "impossible_share_of_zero": (ONE_INFINITE, torch.tensor([[0.5, 0.0, 0.5]]), {}),
    "impossible_weight_of_zero": (ONE_INFINITE, LABELS[1:2], {"weight": torch.tensor([1.0, 0, 1]), "reduction": "sum"}),
    "not_a_number": (torch.full((4, 3), NAN), LABELS, {}),
    "share_not_a_number": (LOGITS, torch.full((4, 3), NAN), {}),
    "largest": (torch.full((4, 3), 3e38), LABELS, {}),
    "farthest": (torch.tensor([[3e38, -3e38, 0.0]]), LABELS[1:2], {}),
}
# Where torch's own kernels on a GPU meet an assertion, after which the process can use the GPU no more.
ENDS_THE_PROCESS = {"no_classes", "negative_label"}


def outcome(module, logits, target):
    """The loss and the gradient, or the exception."""
    x = logits.clone().requires_grad_()
    try:
        loss = module(x, target)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]
    except Exception as error:
        return error


@pytest.mark.parametrize("name", OUTCOMES)
def test_cross_entropy_does_what_torch_does(name, backend, device):
    logits, target, options = OUTCOMES[name]
    logits, target = logits.to(device), target.to(device) if isinstance(target, torch.Tensor) else target
    if device == "cuda" and name in ENDS_THE_PROCESS:
        if backend != "reference":
            loss, gradient = outcome(fused_losses.CrossEntropyLoss(**options, backend=backend), logits, target)
            assert loss.isnan() and gradient.shape == logits.shape
        return
    theirs = outcome(torch.nn.CrossEntropyLoss(**options).to(device), logits, target)
    if name == "ignored_vector":  # of which torch makes 0 on a GPU alone, and of a batch NaN everywhere
        theirs = torch.tensor(NAN, device=device), torch.zeros_like(logits)
    ours = outcome(fused_losses.CrossEntropyLoss(**options, backend=backend).to(device), logits, target)
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        # Torch's kernels on GPUs say NotImplementedError, which is a RuntimeError, of some dtypes.
        assert isinstance(ours, type(theirs)) or isinstance(theirs, type(ours)), ours
    else:
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("shape", [(70,), (2, 9, 7)])
@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**62)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_out_of_range(shape, label, reduction, kernels, device):
    """On a CPU it raises and says which; on a GPU that row alone is NaN."""
    x = torch.randn(shape[0], 5, *shape[1:], device=device, requires_grad=True)
    for position in (0, x[:, 0].numel() // 2, -1):
        y = torch.zeros(shape, dtype=torch.long)
        y.view(-1)[position] = label
        loss = fused_losses.CrossEntropyLoss(reduction=reduction, backend=kernels)
        if device == "cpu":
            with pytest.raises(IndexError, match=f"Target {label} is out of bounds for 5 classes"):
                loss(x, y)
            continue
        value = loss(x, y.to(device))
        gradient = torch.autograd.grad(value.sum(), x)[0].movedim(1, -1).reshape(-1, 5)
        bad = torch.zeros(y.numel(), dtype=torch.bool, device=device)
        bad[position] = True
        assert value.isnan().any() and torch.equal(gradient.isnan().all(1), bad)


@pytest.mark.parametrize("value", [-1e-6, 1.000001, NAN, INFINITY])
@pytest.mark.parametrize("which", [0, 1])
def test_a_probability_out_of_range(value, which, kernels, device):
    pair = [torch.full((100,), 0.5, device=device) for _ in range(2)]
    pair[which][77] = value
    loss = fused_losses.BCELoss(reduction="none", backend=kernels)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="between 0 and 1"):
            loss(*pair)
    else:
        assert torch.equal(loss(*pair).isnan(), torch.arange(100, device=device) == 77)


def test_not_a_tensor():
    for loss in (
        fused_losses.CrossEntropyLoss(z_loss=0.1),
        fused_losses.LogCoshLoss(),
        fused_losses.SigmoidFocalLoss(),
    ):
        with pytest.raises(TypeError, match="target must be a tensor, got list"):
            loss(torch.zeros(2, 3), [0, 1])
        with pytest.raises(TypeError, match="input must be a tensor, got float"):
            loss(1.0, torch.zeros(2, 3))


def test_sparse_is_rejected_as_torch_does():
    dense = torch.zeros(2, 3)
    with pytest.raises(NotImplementedError):
        fused_losses.MSELoss()(dense, dense.to_sparse())


def test_classes_last_names_the_way_out():
    with pytest.raises(RuntimeError, match=r"logits.flatten\(0, -2\)"):
        fused_losses.CrossEntropyLoss()(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 4, 3), (4,), (2, 3)])
def test_a_weight_that_does_not_fit(shape, backend, device):
    """A larger one would broadcast the loss and change its mean."""
    x = torch.zeros(4, 3, device=device)
    with pytest.raises(RuntimeError, match=r"does not broadcast to the input's \(4, 3\)"):
        mse_loss(x, x, sample_weight=torch.ones(shape, device=device), backend=backend)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8, torch.float64, torch.float16])
def test_a_mask_is_a_weight(kind, backend, device):
    x, t = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device)
    mask = torch.tensor([[1], [0], [1], [1]], device=device)
    expected = ((x - t).square() * mask).mean()
    torch.testing.assert_close(mse_loss(x, t, sample_weight=mask.to(kind), backend=backend), expected)
    y, rows = torch.tensor([0, 1, 2, 0], device=device), mask[:, 0]
    rows_loss = torch.nn.functional.cross_entropy(x, y, reduction="none")
    got = fused_losses.CrossEntropyLoss(backend=backend)(x, y, sample_weight=rows.to(kind))
    torch.testing.assert_close(got, (rows_loss * rows).mean())


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("name", ["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "KLDivLoss"])
def test_non_finite_inputs_propagate_as_in_torch(name, value, kernels, device):
    x, t = torch.randn(40, 5, device=device), torch.rand(40, 5, device=device)
    x[1, 2], t[3, 4], x[5, 0], t[5, 0] = value, value, value, value
    theirs, ours = (
        outcome(module, x, t)
        for module in (
            getattr(torch.nn, name)(reduction="none"),
            getattr(fused_losses, name)(reduction="none", backend=kernels),
        )
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_infinite_logits_of_a_binary_loss(kernels, device):
    """A certain and wrong prediction costs infinity; torch says NaN (0 times infinity) in half of the cases."""
    x = torch.tensor([INFINITY, -INFINITY, NAN], device=device)
    wrong = torch.tensor([0.0, 1.0, 0.5], device=device)
    ours = fused_losses.BCEWithLogitsLoss(reduction="none", backend=kernels)(x, wrong)
    torch.testing.assert_close(ours, torch.tensor([INFINITY, INFINITY, NAN], device=device), equal_nan=True)


def operator_arguments():
    x, y = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    options = (-100, 0.0, 0.0, 0.0, 1.0)
    stats = torch.zeros(9)
    tables, rows, kind = (torch.zeros(5, 4), torch.zeros(4, 4)), torch.zeros(4), ("jsd", 0.5, 1.0)
    pair = torch.rand(4, 3), torch.rand(4, 3)
    return {
        "pointwise_forward": ["mse", x, x, None, None, 0.0, 0.0, "mean", torch.float32],
        "pointwise_backward": ["mse", torch.tensor(1.0), x, x, None, None, 0.0, 0.0, "mean", True, True],
        "pointwise_with_gradients": ["mse", x, x, None, None, 0.0, 0.0, "mean", True, True, torch.float32],
        "cross_entropy_forward": [x, y, None, None, "mean", *options, torch.float32],
        "cross_entropy_backward": [torch.tensor(1.0), x, y, None, None, stats, "mean", *options],
        "cross_entropy_backward_": [torch.tensor(1.0), x.clone(), y, None, None, stats, "mean", *options],
        "cross_entropy_target_backward": [torch.tensor(1.0), x, x.clone(), None, None, stats, "mean", *options],
        "cross_entropy_with_gradient": [x, y, None, None, "mean", *options, torch.float32],
        "cross_entropy_with_gradient_": [x.clone(), y, None, None, *options],
        "row_statistics": [x, y, None, 0.0, 1.0],
        "row_gradient_": [x.clone(), y, *tables, None, 0.0, 1.0],
        "divergence_forward": [*pair, *kind],
        "divergence_backward": [rows, *pair, torch.zeros(10, 4), *kind, True, True],
        "divergence_backward_": [rows, *pair, torch.zeros(10, 4), *kind, True, True],
    }


def wrong_values(argument):
    """A wrong word for a string; a wrong shape and wrong dtypes for a tensor."""
    if isinstance(argument, str):
        return ["median"]
    if argument is None:
        return [torch.ones(7, 7), torch.ones(3).long()]
    if isinstance(argument, torch.Tensor):
        moved = [argument.to(kind) for kind in (torch.complex64, torch.int32, torch.bool)]
        return [torch.zeros(5, 2, 2).to(argument.dtype), *moved]
    return []


def refuse(operator, arguments):
    """The operator raises, and has written to nothing."""
    kept = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    with pytest.raises((RuntimeError, NotImplementedError)):
        operator(*arguments)
        pytest.fail(f"{operator} took {arguments}")
    for before, after in zip(kept, arguments):
        assert not isinstance(before, torch.Tensor) or torch.equal(before, after)


@pytest.mark.parametrize("name", operator_arguments())
def test_operators_refuse_what_does_not_fit(name):
    """A direct call, past the checks in Python, stays inside its memory."""
    choice.resolve("cpu", torch.float32, "cpp")
    operator, refused = getattr(choice.KERNELS["cpp"], name), 0
    operator(*operator_arguments()[name])
    for index, argument in enumerate(operator_arguments()[name]):
        for value in wrong_values(argument):
            arguments = operator_arguments()[name]
            arguments[index] = value
            refuse(operator, arguments)
            refused += 1
    assert refused >= 8


def test_operators_on_rows_refuse_other_layouts():
    """Columns that are not neighbours, tables with gaps, a teacher of another dtype, a temperature of 0."""
    choice.resolve("cpu", torch.float32, "cpp")
    columns, gaps = torch.rand(3, 4).t(), torch.zeros(5, 8)[:, ::2]
    wrong = {
        "row_statistics": [{0: columns}],
        "row_gradient_": [{0: columns}, {2: gaps}, {3: gaps[:4]}, {2: torch.zeros(5, 4).double()}],
        "divergence_forward": [{0: columns}, {1: columns}, {1: torch.rand(4, 3).double()}, {4: 0.0}, {4: float("nan")}],
        "divergence_backward": [{1: columns}, {3: torch.zeros(10, 8)[:, ::2]}, {6: -1.0}],
        "divergence_backward_": [{1: columns}, {2: columns}, {3: torch.zeros(10, 4).double()}],
    }
    for name, changes in wrong.items():
        for change in changes:
            arguments = [change.get(i, value) for i, value in enumerate(operator_arguments()[name])]
            refuse(getattr(choice.KERNELS["cpp"], name), arguments)


def test_operators_on_plain_numbers_refuse_what_does_not_fit():
    choice.resolve("cpu", torch.float32, "cpp")
    x, total = torch.rand(4, 3), torch.zeros(4, 3)
    for arguments in ([total, x.t()], [total.t(), x], [total.double(), x], [total, x.int()], [total, x[:2]]):
        refuse(torch.ops.fused_losses.add_, arguments)
    one = torch.tensor(2.0)
    for arguments in (
        [x.t(), one, torch.bfloat16],
        [x.int(), one, torch.bfloat16],
        [x, torch.ones(2), torch.bfloat16],
        [x, one.int(), torch.bfloat16],
        [x, one, torch.int32],
    ):
        refuse(torch.ops.fused_losses.scaled, arguments)


def test_operators_on_heads_refuse_what_does_not_fit():
    choice.resolve("cpu", torch.float32, "cpp")
    x, weight, labels = torch.rand(4, 5), torch.rand(3, 5), torch.tensor([0, 1, 2, 0])
    rest = None, torch.float32, "cpp"
    operator = torch.ops.fused_losses.linear_log_probs_forward
    operator(x, weight, None, labels, -100, 0.0, 1.0, *rest)
    wrong = {
        0: [x[:, :2], x[0]],
        1: [weight[:, :2], weight[0]],
        2: [torch.zeros(2), torch.zeros(3, 3)],
        3: [labels.int(), labels.double(), labels[:2], labels[:, None]],
    }
    for index, values in wrong.items():
        for value in values:
            arguments = [x, weight, None, labels, -100, 0.0, 1.0, *rest]
            arguments[index] = value
            with pytest.raises((RuntimeError, IndexError)):
                operator(*arguments)
                pytest.fail(f"took {value} as its argument {index}")
