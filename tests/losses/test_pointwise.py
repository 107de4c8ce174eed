"""Golden values of the pointwise losses: computed by hand or printed in the papers that defined them."""

import math
import pickle
import warnings
from functools import partial

import pytest
import torch

from fused_losses import KLDivLoss
from fused_losses import functional as F
from fused_losses.backends import choice

LN2 = math.log(2)
VALUES = [
    (F.mse_loss, 3.0, 1.0, {}, 4.0, 4.0),
    (F.l1_loss, 3.0, 1.0, {}, 2.0, 1.0),
    (F.l1_loss, 1.0, 1.0, {}, 0.0, 0.0),
    # Girshick 2015, equation 3: quadratic below 1, linear beyond.
    (F.smooth_l1_loss, 0.5, 0.0, {}, 0.125, 0.5),
    (F.smooth_l1_loss, -2.0, 0.0, {}, 1.5, -1.0),
    (F.smooth_l1_loss, 0.5, 0.0, {"beta": 0.25}, 0.375, 1.0),
    # Huber 1964: beyond delta the derivative stays at delta.
    (F.huber_loss, 0.5, 0.0, {"delta": 2.0}, 0.125, 0.5),
    (F.huber_loss, 3.0, 0.0, {"delta": 2.0}, 4.0, 2.0),
    # log cosh(log 2) = log(5/4), tanh(log 2) = 3/5.
    (F.log_cosh_loss, LN2, 0.0, {}, math.log(1.25), 0.6),
    (F.log_cosh_loss, 1000.0, 0.0, {}, 1000.0 - LN2, 1.0),
    # Charbonnier et al. 1994: a triangle of 3, 4 and 5.
    (F.charbonnier_loss, 3.0, 0.0, {"eps": 16.0}, 5.0, 0.6),
    (F.binary_cross_entropy, 0.25, 1.0, {}, 2 * LN2, -4.0),
    (F.binary_cross_entropy, 0.0, 1.0, {}, 100.0, -1e12),  # torch bounds the logarithm
    (F.binary_cross_entropy_with_logits, 0.0, 1.0, {}, LN2, -0.5),
    (F.binary_cross_entropy_with_logits, math.log(3), 0.0, {}, 2 * LN2, 0.75),
    (F.binary_cross_entropy_with_logits, -1000.0, 1.0, {}, 1000.0, -1.0),
    (F.binary_cross_entropy_with_logits, 1000.0, 1.0, {}, 0.0, 0.0),
    # Lin et al. 2017, section 3.2: with gamma = 2, an example at p = 0.9 costs 100 times less.
    (F.sigmoid_focal_loss, math.log(9), 1.0, {"alpha": -1.0}, 0.01 * -math.log(0.9), None),
    (F.sigmoid_focal_loss, math.log(9), 1.0, {"alpha": -1.0, "gamma": 0.0}, -math.log(0.9), -0.1),
    (F.sigmoid_focal_loss, math.log(9), 1.0, {}, 0.25 * 0.01 * -math.log(0.9), None),
    (F.sigmoid_focal_loss, math.log(9), 0.0, {}, 0.75 * 0.81 * -math.log(0.1), None),
    # Kullback and Leibler 1951: p log(p / q), here 3/4 log(3/2).
    (F.kl_div, -LN2, 0.75, {}, 0.75 * math.log(1.5), -0.75),
    (F.kl_div, -3.0, 0.0, {}, 0.0, 0.0),
    (F.kl_div, math.log(0.75), math.log(0.75), {"log_target": True}, 0.0, -0.75),
    (F.kl_div, -200.0, 1.0, {}, 200.0, -1.0),
    (F.kl_div, -1.0, -200.0, {"log_target": True}, 0.0, 0.0),
]


@pytest.mark.parametrize(
    ("loss", "x", "t", "options", "value", "slope"), VALUES, ids=[f"{v[0].__name__}-{i}" for i, v in enumerate(VALUES)]
)
def test_values(loss, x, t, options, value, slope, backend, device):
    """Alone, and among so many that vector loops and their tails both compute it."""
    for count in (1, 37):
        inputs = torch.full((count,), x, device=device, requires_grad=True)
        targets = torch.full((count,), t, device=device)
        result = loss(inputs, targets, reduction="none", backend=backend, **options)
        assert result.tolist() == pytest.approx([value] * count, rel=2e-6, abs=1e-7)
        if slope is not None:
            (gradient,) = torch.autograd.grad(result.sum(), inputs)
            assert gradient.tolist() == pytest.approx([slope] * count, rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("loss", [F.log_cosh_loss, F.charbonnier_loss])
@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-6])
def test_small_errors_do_not_cancel(loss, size, kernels, device):
    """log cosh d is d^2 / 2 near 0, where log and cosh have both lost it."""
    inputs = torch.full((33,), size, device=device, requires_grad=True)
    result = loss(inputs, torch.zeros(33, device=device), reduction="none", backend=kernels)
    d = inputs.detach().double()
    exact = torch.log(torch.cosh(d)) if loss is F.log_cosh_loss and size > 1e-4 else d.square() / 2
    if loss is F.charbonnier_loss:
        exact = (d.square() + 1e-12).sqrt()
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=0.0)


REDUCTIONS = ("none", "mean", "sum", "batchmean")
# Torch runs itself below 4096 elements: one shape on each side.
each_shape = pytest.mark.parametrize("shape", [(6, 5), (70, 81), (), (5000,), (0, 4)], ids=str)
INFINITY, NAN = float("inf"), float("nan")


def distributions(shape, log_target, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    x, t = (torch.log_softmax(z, -1) for z in logits)
    return x, t if log_target else t.exp()


def step(loss, *tensors, **options):
    """The loss and the gradients of both tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


@each_shape
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("automatic", [False, True])
def test_kl_div_is_torchs(shape, reduction, log_target, automatic, backend, device):
    pair = distributions(shape, log_target, device)
    options = {"reduction": reduction, "log_target": log_target}
    ours = step(F.kl_div, *pair, **options, backend=None if automatic else backend)
    torch.testing.assert_close(ours, step(torch.nn.functional.kl_div, *pair, **options), equal_nan=True)
    ours = step(KLDivLoss(**options, backend=None if automatic else backend), *pair)
    torch.testing.assert_close(ours, step(torch.nn.KLDivLoss(**options), *pair), equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shapes", [((1, 5), (4, 5)), ((4, 5), (1, 5)), ((5,), (4, 5)), ((4, 5), ()), ((), (4, 5))])
def test_kl_div_broadcasts_in_silence(reduction, shapes, backend, device):
    """Rows are the input's own, before it is broadcast, as torch counts them."""
    x, t = torch.randn(shapes[0], device=device), torch.rand(shapes[1], device=device) + 0.1
    for chosen in (backend, None):
        ours = step(F.kl_div, x, t, reduction=reduction, backend=chosen)
        torch.testing.assert_close(ours, step(torch.nn.functional.kl_div, x, t, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_kl_div_under_autocast_is_torchs(reduction, log_target, dtypes, backend, device):
    x, t = (p.to(dtype) for p, dtype in zip(distributions((6, 5), log_target, device), dtypes))
    options = {"reduction": reduction, "log_target": log_target}
    for chosen in (backend, None):
        with torch.autocast(device, torch.bfloat16):
            ours, theirs = F.kl_div(x, t, **options, backend=chosen), torch.nn.functional.kl_div(x, t, **options)
        torch.testing.assert_close(ours, theirs)


def test_kl_div_has_a_rule_for_vmap(backend, device):
    x, t = distributions((4, 6, 5), False, device)
    for chosen in (backend, None):
        ours = torch.func.vmap(lambda *pair, b=chosen: F.kl_div(*pair, reduction="batchmean", backend=b))(x, t)
        theirs = [torch.nn.functional.kl_div(*pair, reduction="batchmean") for pair in zip(x, t)]
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_at_the_edges_is_torchs(log_target, backend, device):
    """An impossible target costs nothing and has no derivative; a negative one is no probability."""
    t = torch.tensor([0.0, -0.0, 0.0, -0.5, 0.5, 0.5, NAN, INFINITY, INFINITY, -INFINITY, 1e-40], device=device)
    x = torch.tensor([-1.0, 2.0, -INFINITY, -1.0, -INFINITY, NAN, -1.0, -1.0, 1.0, -1.0, -1.0], device=device)
    options = {"reduction": "none", "log_target": log_target}
    expected = step(torch.nn.functional.kl_div, x, t, **options)
    if not log_target:
        assert expected[0][:2].abs().sum() == 0 and expected[0][3].isnan() and expected[2][:4].isnan().all()
    ours = step(F.kl_div, x, t, **options, backend=backend)
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("legacy", [(True, None), (False, None), (None, False), (True, True)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_arguments_of_kl_div(legacy, reduction, backend, device):
    """They override the reduction; torch still divides by the rows where it was batchmean."""
    pair = distributions((6, 5), False, device)
    ours = F.kl_div(*pair, *legacy, reduction, backend=backend)
    torch.testing.assert_close(ours, torch.nn.functional.kl_div(*pair, *legacy, reduction))


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [(warning.category, str(warning.message)[:33]) for warning in caught]


@pytest.mark.parametrize("count", [4, 5000])
@pytest.mark.parametrize("arguments", [(None, None, name) for name in (*REDUCTIONS, "elementwise_mean")] + [(True,)])
def test_kl_div_warns_where_torch_does(count, arguments):
    """Once a call; where a normalizer says what mean divides by, there is nothing to warn of."""
    x, t = torch.zeros(count), torch.ones(count)
    theirs = warned(lambda: torch.nn.functional.kl_div(x, t, *arguments))
    assert warned(lambda: F.kl_div(x, t, *arguments)) == theirs
    assert len(theirs) == (arguments[-1] in ("mean", "elementwise_mean", True))
    assert not warned(lambda: F.kl_div(x, t, normalizer=2.0))


def test_kl_div_warns_its_caller():
    with pytest.warns(UserWarning, match="use reduction='batchmean'") as caught:
        F.kl_div(torch.zeros(3), torch.ones(3))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("count", [6, 6000])
def test_a_normalizer_replaces_the_rows(count, backend, device):
    x, t = distributions((count, 3), False, device)
    total = torch.nn.functional.kl_div(x, t, reduction="sum")
    for reduction in ("batchmean", "mean"):
        ours = F.kl_div(x, t, reduction=reduction, normalizer=7, backend=backend)
        torch.testing.assert_close(ours, total / 7)
    with pytest.raises(ValueError, match="normalizer divides a mean"):
        F.kl_div(x, t, reduction="sum", normalizer=7, backend=backend)


def test_batchmean_sums_in_fp32(kernels, device):
    """fp16 ends at 65504: the sum of the rows must not pass through it."""
    x, t = torch.full((4000, 9), -3.0, device=device).half(), torch.ones(4000, 9, device=device).half()
    assert F.kl_div(x, t, reduction="batchmean", backend=kernels) == 27.0
    ours = F.kl_div(x, t.float(), reduction="batchmean", backend=kernels)
    assert ours.dtype is torch.float32 and ours.item() == pytest.approx(27.0, rel=1e-6)


@pytest.mark.parametrize(
    "pair",
    [
        (torch.zeros(3, dtype=torch.long), torch.ones(3)),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool)),
        (torch.zeros(3) + 0j, torch.ones(3) + 0j),
        (torch.zeros(3), torch.ones(2)),
        ([0.0], torch.ones(1)),
        (torch.zeros(1), None),
        (torch.zeros(3), torch.ones(3, device="meta")),
    ],
    ids=["labels", "mask", "complex", "shapes", "a list", "nothing", "devices"],
)
@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_kl_div_raises_as_torch_does(pair, reduction, backend):
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        torch.nn.functional.kl_div(*pair, reduction=reduction)
    for chosen in (None, backend):
        with pytest.raises(type(theirs.value)):
            F.kl_div(*pair, reduction=reduction, backend=chosen)


def test_kl_div_module_keeps_its_options():
    ours, theirs = KLDivLoss(reduction="batchmean", log_target=True), torch.nn.KLDivLoss(log_target=True)
    assert ours.state_dict() == theirs.state_dict() == {}
    ours.load_state_dict(theirs.state_dict())
    twin = pickle.loads(pickle.dumps(ours))
    assert isinstance(twin, torch.nn.KLDivLoss) and (twin.reduction, twin.log_target) == ("batchmean", True)
    pair = distributions((6, 5), True)
    assert torch.equal(twin(*pair), ours(*pair))


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"weighted": True}])
@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_gradients_made_with_the_loss_take_any_upstream(options, needed, backend, device):
    reduction, weighted = options.get("reduction", "mean"), options.get("weighted", False)
    x, t = (torch.rand(50, 70, device=device).requires_grad_(need) for need in needed)
    weight = torch.rand(50, 1, device=device) if weighted else None
    call = partial(F.binary_cross_entropy_with_logits, x, t, sample_weight=weight, backend=backend)
    elements, loss = call(reduction="none"), call(reduction=reduction)
    count = elements.numel() if reduction == "mean" else 1
    wanted = [tensor for tensor in (x, t) if tensor.requires_grad]
    for upstream in (1.0, 0.3, 0.0, -2.0, math.inf):  # the second one finds the gradients taken
        upstream = torch.tensor(upstream, device=device)
        gradients = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
        each = (upstream / count).expand_as(elements)
        expected = torch.autograd.grad(elements, wanted, each, retain_graph=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-9, equal_nan=True)


def layouts(shape):
    """Pairs of tensors that lie in memory alike, differently, with gaps and with repetition."""
    a, b = torch.rand(*shape), torch.rand(*shape)
    turned = torch.rand(*shape[::-1]).t()
    return {
        "alike": (a, b),
        "turned": (turned, turned.clone()),
        "different": (a, turned),
        "gaps": (torch.rand(shape[0], 2 * shape[1])[:, ::2], b),
        "repeated": (a, torch.rand(shape[0], 1).expand(shape)),
        "repeated_input": (torch.rand(shape[0], 1).expand(shape), turned),
    }


@pytest.mark.parametrize("layout", layouts((2, 2)))
@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_one_pass_gives_the_bits_of_two(layout, needed):
    """Evaluating without gradients, and training in low precision, are not another loss."""
    choice.resolve("cpu", torch.float32, "cpp")
    kernels = choice.KERNELS["cpp"]
    x, t = layouts((300, 301))[layout]
    for formula in ("mse", "bce_with_logits", "log_cosh"):
        options = formula, x, t, None, None, 0.0, 0.0, "mean"
        loss, *gradients = kernels.pointwise_with_gradients(*options, *needed, torch.float32)
        assert torch.equal(loss, kernels.pointwise_forward(*options, torch.float32))
        two = kernels.pointwise_backward(formula, torch.tensor(1.0), *options[1:], *needed)
        for one, other in zip(gradients, two):
            assert torch.equal(one, other) and one.stride() == other.stride()
