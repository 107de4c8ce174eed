"""The specification itself: each reference against its closed form in Python floats, and its functions' habits."""

import ast
import inspect
import math

import pytest
import torch

from fused_losses import reference
from fused_losses.reference import pointwise, softmax

PAIRS = [(-3.0, 1.0), (-0.4, 0.0), (0.0, 0.5), (0.1, 0.3), (0.9, 1.0), (2.5, 0.0), (40.0, 1.0), (-40.0, 0.25)]
SHARES = [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.2, 0.9), (0.5, 0.5), (0.999999, 0.0), (1e-30, 1.0)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def smooth_l1(d, beta):
    return d * d / (2 * beta) if abs(d) < beta else abs(d) - beta / 2


def huber(d, delta):
    return d * d / 2 if abs(d) <= delta else delta * (abs(d) - delta / 2)


def bce(x, t):
    logs = [max(math.log(p), -100.0) if p > 0 else -100.0 for p in (x, 1 - x)]
    return -(t * logs[0] + (1 - t) * logs[1])


def bce_with_logits(x, t, q=1.0):
    return -(q * t * log_sigmoid(x) + (1 - t) * log_sigmoid(-x))


def focal(x, t, alpha, gamma):
    missed = sigmoid(-x) * t + sigmoid(x) * (1 - t)
    balance = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0
    return balance * missed**gamma * bce_with_logits(x, t)


CLOSED_FORMS = [
    (pointwise.mse, {}, lambda x, t: (x - t) ** 2),
    (pointwise.l1, {}, lambda x, t: abs(x - t)),
    (pointwise.smooth_l1, {"beta": 0.7}, lambda x, t: smooth_l1(x - t, 0.7)),
    (pointwise.huber, {"delta": 0.7}, lambda x, t: huber(x - t, 0.7)),
    (pointwise.log_cosh, {}, lambda x, t: math.log(math.cosh(x - t))),
    (pointwise.charbonnier, {"eps": 0.01}, lambda x, t: math.hypot(x - t, 0.1)),
    (pointwise.bce, {}, bce),
    (pointwise.bce_with_logits, {}, bce_with_logits),
    (pointwise.bce_with_logits, {"pos_weight": torch.tensor(3.0)}, lambda x, t: bce_with_logits(x, t, 3.0)),
    (pointwise.sigmoid_focal, {"alpha": 0.25, "gamma": 2.0}, lambda x, t: focal(x, t, 0.25, 2.0)),
    (pointwise.sigmoid_focal, {"alpha": -1.0, "gamma": 0.5}, lambda x, t: focal(x, t, -1.0, 0.5)),
    (pointwise.sigmoid_focal, {"alpha": 0.6, "gamma": 0.0}, lambda x, t: focal(x, t, 0.6, 0.0)),
    (pointwise.kl_div, {}, lambda x, t: t * (math.log(t) - x) if t else 0.0),
    (pointwise.kl_div_log_target, {}, lambda x, t: math.exp(t) * (t - x)),
]


@pytest.mark.parametrize(("loss", "options", "form"), CLOSED_FORMS, ids=lambda v: getattr(v, "__name__", None))
def test_closed_forms(loss, options, form):
    pairs = SHARES if loss is pointwise.bce else PAIRS
    x, t = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs))
    expected = torch.tensor([form(*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(loss(x, t, reduction="none", **options), expected, rtol=1e-13, atol=1e-15)
    weight = torch.arange(len(pairs), dtype=torch.float64)
    weighted = expected * weight
    for reduction, total in (("none", weighted), ("sum", weighted.sum()), ("mean", weighted.sum() / len(pairs))):
        torch.testing.assert_close(loss(x, t, weight, reduction, **options), total, rtol=1e-12, atol=1e-15)


def row(z, shares, weight, smoothing, z_loss):
    """One row of cross entropy by hand."""
    total = math.log(sum(math.exp(value) for value in z))
    mixed = [(1 - smoothing) * share + smoothing / len(z) for share in shares]
    return sum(w * m * (total - value) for w, m, value in zip(weight, mixed, z)) + z_loss * total**2


LOGITS = [[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3.0, 2.0, -7.0], [0.2, 0.1, 0.4]]
LABELS = [0, 2, -100, 1]
CLASS_WEIGHT, ROW_WEIGHT = [1.0, 0.5, 2.0], [1.0, 3.0, 5.0, 0.5]


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("rows", [None, ROW_WEIGHT])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (2.0, 1.0), (3.0, 0.5)])
def test_cross_entropy_of_labels(weight, smoothing, z_loss, rows, softcap, temperature):
    w = weight or [1.0] * 3
    cap = (lambda x: softcap * math.tanh(x / softcap)) if softcap else (lambda x: x)
    z = [[cap(x) / temperature for x in logits] for logits in LOGITS]
    losses, counts = [], []
    for values, label, factor in zip(z, LABELS, rows or [1.0] * 4):
        one_hot = [float(c == label) for c in range(3)]
        # Smoothing weighs each class by its own weight, the label's share by the label's.
        losses.append(0.0 if label < 0 else factor * row(values, one_hot, w, smoothing, z_loss))
        counts.append(0.0 if label < 0 else w[label])
    expected = {"none": losses, "sum": sum(losses), "mean": sum(losses) / sum(counts)}
    options = {"z_loss": z_loss, "softcap": softcap, "temperature": temperature}
    for reduction, value in expected.items():
        got = softmax.cross_entropy(
            torch.tensor(LOGITS, dtype=torch.float64),
            torch.tensor(LABELS),
            None if weight is None else torch.tensor(weight, dtype=torch.float64),
            -100,
            reduction,
            smoothing,
            sample_weight=None if rows is None else torch.tensor(rows, dtype=torch.float64),
            **options,
        )
        torch.testing.assert_close(got, torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
def test_cross_entropy_of_probabilities(smoothing, weight):
    shares = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.6, 0.4], [0.1, 0.1, 0.1]]
    losses = [row(z, t, weight or [1.0] * 3, smoothing, 0.2) for z, t in zip(LOGITS, shares)]
    got = softmax.cross_entropy(
        torch.tensor(LOGITS, dtype=torch.float64),
        torch.tensor(shares, dtype=torch.float64),
        None if weight is None else torch.tensor(weight, dtype=torch.float64),
        label_smoothing=smoothing,
        z_loss=0.2,
    )
    assert abs(got.item() - sum(losses) / 4) < 1e-13


def test_images_are_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (2, 4, 5), generator=generator)
    y[0, 0] = -100
    flat = softmax.cross_entropy(x.movedim(1, -1).reshape(-1, 3), y.flatten(), reduction="none", z_loss=0.1)
    torch.testing.assert_close(softmax.cross_entropy(x, y, reduction="none", z_loss=0.1).flatten(), flat)


def public_functions():
    return [f for module in (pointwise, softmax) for _, f in inspect.getmembers(module, inspect.isfunction)]


@pytest.mark.parametrize("module", [pointwise, softmax], ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_a_reference_imports_only_torch(module):
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported <= {"torch", "math", "typing", "collections", "__future__"}


def test_references_are_short_and_described():
    own = [f for f in public_functions() if f.__module__.startswith(reference.__name__)]
    for function in own:
        assert len(inspect.getsource(function).splitlines()) <= 50, function
        assert function.__doc__ or function.__name__.startswith(("_", "reduce")), function
