"""Preference losses against their papers' formulas, and against values that TRL 1.16 gives for the same tokens."""

import math

import pytest
import torch
from tokens import (
    DESIRABLE,
    LENGTHS,
    LOG_PROBS,
    MASK,
    REFERENCE,
    SEQUENCES,
    TARGET,
    assert_same_step,
    head,
    of_sequences,
    tokens_of,
)

import fused_losses
from fused_losses import CPOLoss, DPOLoss, KTOLoss, ORPOLoss, SimPOLoss

BETA = 0.3
SMOOTHED = {"label_smoothing": 0.2}

# Of TRL's own code on these tokens, in fp64 where it takes it.
DPO_GOLDEN = [
    ({"loss_type": "sigmoid"}, 1.1706576157),
    ({"loss_type": "hinge"}, 1.61625179721),
    ({"loss_type": "ipo", "beta": 0.5}, 5.69439797909),
    ({"loss_type": "exo_pair", **SMOOTHED}, 0.551864055561),
    ({"loss_type": "nca_pair"}, 1.66441395554),
    ({"loss_type": "robust", **SMOOTHED}, 1.37607488144),
    ({"loss_type": "bco_pair"}, 1.79656429613),
    ({"loss_type": "sppo_hard"}, 21.6947942839),
    ({"loss_type": "aot", **SMOOTHED}, 1.04740725626),
    ({"loss_type": "aot_unpaired", **SMOOTHED}, 0.952135018418),
    ({"loss_type": "apo_zero"}, 1.14781496893),
    ({"loss_type": "apo_down"}, 1.06877911092),
    ({"loss_type": "discopop"}, 1.19486766794),
    ({"loss_type": "sft"}, 1.48682545203),
    ({"loss_type": "sigmoid_norm"}, 0.869426908596),
    ({"f_divergence": "forward_kl"}, 2.91746948276),
    ({"f_divergence": "js_divergence"}, 0.95288163634),
    ({"f_divergence": "alpha_divergence", "alpha": 0.5}, 1.55287134647),
    ({"f_divergence": "alpha_divergence", "alpha": 1.0}, 1.17065775394),
    ({"f_divergence": "alpha_divergence", "alpha": 2.0}, 1.61478805542),
    ({"ld_alpha": 0.4}, 0.872945319607),
    ({"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}, 2.78266440382),
]
CPO_GOLDEN = [
    ({}, 3.17499023008),
    (SMOOTHED, 2.97085881356),
    ({"loss_type": "hinge"}, 3.72161377186),
    ({"loss_type": "ipo"}, 8.74444178938),
    ({"loss_type": "simpo"}, 2.62195762125),
    ({"loss_type": "simpo", "label_smoothing": 0.1, "simpo_gamma": 1.5, "cpo_alpha": 0.0}, 1.7262034454),
    ({"alpha": 0.05, "cpo_alpha": 0.5}, 2.77953976519),
    ({"loss_type": "simpo", "alpha": 0.25}, 2.68106589103),
]


@pytest.mark.parametrize(("options", "expected"), DPO_GOLDEN, ids=str)
def test_dpo_values(options, expected):
    loss = DPOLoss(**{"beta": BETA, **options})(LOG_PROBS, MASK, REFERENCE)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # TRL's alpha divergence is fp32


@pytest.mark.parametrize(("options", "expected"), CPO_GOLDEN, ids=str)
def test_cpo_values(options, expected):
    assert CPOLoss(BETA, **options)(LOG_PROBS, MASK).item() == pytest.approx(expected, rel=2e-7)


def test_simpo_values():
    assert SimPOLoss(2.0, 0.5)(LOG_PROBS, MASK).item() == pytest.approx(2.54626608583, rel=2e-7)


@pytest.mark.parametrize(("nll_mask", "expected"), [(None, 2.29434797543), (torch.ones(3, 5), 2.17158742725)])
def test_orpo_values(nll_mask, expected):
    loss = ORPOLoss(BETA)(LOG_PROBS - 0.3, MASK, nll_mask=nll_mask)
    assert loss.item() == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize(("kl", "expected"), [(0.25, 0.6360253325), (-0.4, 0.63005330495), (None, 0.63005330495)])
def test_kto_values(kl, expected):
    loss = KTOLoss(BETA, "apo_zero_unpaired" if kl is None else "kto", desirable_weight=1.5, undesirable_weight=0.7)
    kl = None if kl is None else torch.tensor(kl, dtype=torch.float64)
    assert loss(LOG_PROBS, MASK, DESIRABLE, REFERENCE, kl=kl).item() == pytest.approx(expected, rel=2e-7)


def sigmoid(x):
    return 1.0 / (1.0 + torch.exp(-x))


def softplus(x):
    """-log sigmoid(-x)"""
    return torch.log1p(torch.exp(x))


def smoothed(margin, epsilon):
    return (1 - epsilon) * softplus(-BETA * margin) + epsilon * softplus(BETA * margin)


def exo(c, r, epsilon=0.2):
    """Ji et al. 2024, equation 16: KL of the two sequences' shares from (1 - epsilon, epsilon)."""
    share = sigmoid(BETA * (c - r))
    return share * torch.log(share / (1 - epsilon)) + (1 - share) * torch.log((1 - share) / epsilon)


def discopop(c, r):
    """Lu et al. 2024, equation 5."""
    rho = BETA * (c - r)
    share = sigmoid(rho / 0.05)
    return (1 - share) * softplus(-rho) + share * torch.exp(-rho)


# Of one pair's log-ratios.
PAIRWISE = {
    "sigmoid": lambda c, r: softplus(-BETA * (c - r)),
    "hinge": lambda c, r: torch.clamp(1 - BETA * (c - r), min=0),
    "exo_pair": exo,
    "nca_pair": lambda c, r: softplus(-BETA * c) + 0.5 * softplus(BETA * c) + 0.5 * softplus(BETA * r),
    "robust": lambda c, r: (0.8 * softplus(-BETA * (c - r)) - 0.2 * softplus(BETA * (c - r))) / 0.6,
    "bco_pair": lambda c, r: softplus(-BETA * c) + softplus(BETA * r),
    "sppo_hard": lambda c, r: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "apo_zero": lambda c, r: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    "apo_down": lambda c, r: sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r)),
    "discopop": discopop,
}


def pairs(log_probs):
    """Log-ratios of chosen and rejected sequences."""
    ratios = [a - b for a, b in zip(of_sequences(log_probs), of_sequences(REFERENCE))]
    return list(zip(ratios[:3], ratios[3:]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", PAIRWISE)
def test_dpo_is_its_formula(loss_type, reduction):
    options = SMOOTHED if loss_type in ("exo_pair", "robust") else {}
    loss = DPOLoss(BETA, loss_type, reduction=reduction, **options)

    def plain(log_probs):
        losses = torch.stack([PAIRWISE[loss_type](*pair) for pair in pairs(log_probs)])
        return losses if reduction == "none" else getattr(losses, reduction)()

    assert_same_step(lambda log_probs: loss(log_probs, MASK, REFERENCE), plain, [LOG_PROBS])


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_dpo_of_means_is_its_formula(loss_type):
    """Azar et al. 2023, equation 17, per token; and SimPO's kind of mean."""

    def plain(log_probs):
        ratios = [ratio for pair in zip(*pairs(log_probs)) for ratio in pair]
        mean = [ratio / length for ratio, length in zip(ratios, LENGTHS)]
        margins = torch.stack([c - r for c, r in zip(mean[:3], mean[3:])])
        return ((margins - 1 / (2 * BETA)) ** 2 if loss_type == "ipo" else softplus(-BETA * margins)).mean()

    loss = DPOLoss(BETA, loss_type)
    assert_same_step(lambda log_probs: loss(log_probs, MASK, REFERENCE), plain, [LOG_PROBS])


def test_aot_sorts_margins():
    """Melnyk et al. 2024: the i-th smallest of one against the i-th smallest of the other."""

    def plain(log_probs):
        sums, frozen = of_sequences(log_probs), of_sequences(REFERENCE)
        policy, reference = (torch.stack(s[:3]) - torch.stack(s[3:]) for s in (sums, frozen))
        return smoothed(policy.sort().values - reference.sort().values, 0.2).mean()

    def unpaired(log_probs):
        chosen, rejected = (torch.stack(ratios) for ratios in zip(*pairs(log_probs)))
        return smoothed(chosen.sort().values - rejected.sort().values, 0.2).mean()

    for loss_type, formula in (("aot", plain), ("aot_unpaired", unpaired)):
        loss = DPOLoss(BETA, loss_type, **SMOOTHED)
        assert_same_step(lambda log_probs, loss=loss: loss(log_probs, MASK, REFERENCE), formula, [LOG_PROBS])


# The derivative f'(t) of a divergence's generator, at t = exp(ratio).
DERIVATIVES = {
    "reverse_kl": torch.log,
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: torch.log(2 * t / (t + 1)),
    "alpha_divergence": lambda t: (t ** (0.7 - 1) - 1) / (0.7 - 1),
}


@pytest.mark.parametrize("divergence", DERIVATIVES)
def test_dpo_of_a_divergence_is_its_formula(divergence):
    """Wang et al. 2023, equation 5."""
    derivative = DERIVATIVES[divergence]

    def plain(log_probs):
        scores = [[derivative(ratio.exp()) for ratio in pair] for pair in pairs(log_probs)]
        return torch.stack([softplus(-BETA * (c - r)) for c, r in scores]).mean()

    loss = DPOLoss(BETA, f_divergence=divergence, alpha=0.7)
    assert_same_step(lambda log_probs: loss(log_probs, MASK, REFERENCE), plain, [LOG_PROBS], atol=1e-10, rtol=1e-10)


def test_dpo_discounts_what_is_beyond_the_shorter_of_a_pair():
    """Liu et al. 2024, LD-DPO."""

    def discounted(log_probs):
        sums = []
        for i, length in enumerate(LENGTHS):
            shared = min(length, LENGTHS[(i + 3) % 6])
            sums.append(log_probs[i, :shared].sum() + 0.4 * log_probs[i, shared:length].sum())
        return sums

    def plain(log_probs):
        ratios = [a - b for a, b in zip(discounted(log_probs), discounted(REFERENCE))]
        return torch.stack([softplus(-BETA * (c - r)) for c, r in zip(ratios[:3], ratios[3:])]).mean()

    loss = DPOLoss(BETA, ld_alpha=0.4)
    assert_same_step(lambda log_probs: loss(log_probs, MASK, REFERENCE), plain, [LOG_PROBS])


def test_dpo_rewards():
    chosen, rejected = DPOLoss(BETA).rewards(LOG_PROBS.clone().requires_grad_(), MASK, REFERENCE)
    expected = [torch.stack(ratios) * BETA for ratios in zip(*pairs(LOG_PROBS))]
    torch.testing.assert_close([chosen, rejected], expected)
    assert not chosen.requires_grad


def mean_likelihood(log_probs):
    return sum(of_sequences(log_probs)[:3]) / sum(LENGTHS[:3])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_orpo_is_its_formula(reduction):
    """Hong et al. 2024, equations 4 to 7."""

    def plain(log_probs):
        p = [torch.exp(s / length) for s, length in zip(of_sequences(log_probs), LENGTHS)]
        odds = [p_i / (1 - p_i) for p_i in p]
        ratios = torch.stack([torch.log(c / r) for c, r in zip(odds[:3], odds[3:])])
        losses = -mean_likelihood(log_probs) + BETA * softplus(-ratios)
        return losses if reduction == "none" else getattr(losses, reduction)()

    loss = ORPOLoss(BETA, reduction=reduction)
    assert_same_step(lambda log_probs: loss(log_probs, MASK), plain, [LOG_PROBS - 0.3], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("log_p", [-1e-6, -1e-3, -0.69, -0.7, -20.0, -200.0])
def test_orpo_of_probabilities_near_0_and_1(log_p):
    """log(1 - p) cancels in neither."""
    chosen, rejected = torch.tensor([[log_p]], requires_grad=True), torch.tensor([[-1.0]])
    loss = ORPOLoss(1.0)(torch.cat([chosen, rejected]), torch.ones(2, 1))
    wide = chosen.detach().double().requires_grad_()
    odds = wide - torch.log(-torch.expm1(wide)) + 1.0 + math.log(-math.expm1(-1.0))
    exact = (-wide - torch.nn.functional.logsigmoid(odds)).mean()
    torch.testing.assert_close(loss.double(), exact, atol=0.0, rtol=2e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, chosen)[0].double(), torch.autograd.grad(exact, wide)[0], atol=0.0, rtol=2e-6
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_is_its_formula(loss_type, reduction):
    """Xu et al. 2024, equation 3, beside the chosen ones' likelihood; Meng et al. 2024, equation 6."""

    def plain(log_probs):
        sums = of_sequences(log_probs)
        if loss_type in ("ipo", "simpo"):
            sums = [s / length for s, length in zip(sums, LENGTHS)]
        margins = torch.stack([c - r for c, r in zip(sums[:3], sums[3:])])
        losses = {
            "sigmoid": softplus(-BETA * margins),
            "hinge": torch.clamp(1 - BETA * margins, min=0),
            "ipo": (margins - 1 / (2 * BETA)) ** 2,
            "simpo": softplus(-(BETA * margins - 0.5)),
        }[loss_type] - 0.6 * mean_likelihood(log_probs)
        return losses if reduction == "none" else getattr(losses, reduction)()

    loss = CPOLoss(BETA, loss_type, cpo_alpha=0.6, reduction=reduction)
    assert_same_step(lambda log_probs: loss(log_probs, MASK), plain, [LOG_PROBS])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kl", [0.25, -0.4])
def test_kto_is_its_formula(kl, reduction):
    """Ethayarajh et al. 2024, equations 7 and 8; a negative estimate of the divergence is 0."""

    def plain(log_probs):
        losses = []
        for a, b, wanted in zip(of_sequences(log_probs), of_sequences(REFERENCE), DESIRABLE):
            gain = BETA * (a - b - max(kl, 0.0))
            losses.append(1.5 * (1 - sigmoid(gain)) if wanted else 0.7 * (1 - sigmoid(-gain)))
        losses = torch.stack(losses)
        return losses if reduction == "none" else getattr(losses, reduction)()

    loss = KTOLoss(BETA, desirable_weight=1.5, undesirable_weight=0.7, reduction=reduction)
    estimate = torch.tensor(kl, dtype=torch.float64)
    assert_same_step(lambda log_probs: loss(log_probs, MASK, DESIRABLE, REFERENCE, kl=estimate), plain, [LOG_PROBS])


def call(loss, log_probs, reference=REFERENCE, mask=MASK):
    """A loss of log-probabilities, whichever it is."""
    if isinstance(loss, DPOLoss):
        return loss(log_probs, mask, reference)
    if isinstance(loss, KTOLoss):
        return loss(log_probs, mask, DESIRABLE, reference, kl=torch.tensor(0.1, dtype=log_probs.dtype))
    return loss(log_probs, mask)


DPO_TYPES = [*PAIRWISE, "ipo", "aot", "aot_unpaired", "sft", "sigmoid_norm"]
EVERY = {
    **{
        f"dpo-{name}": lambda name=name: DPOLoss(
            BETA, name, **(SMOOTHED if name in ("exo_pair", "robust", "aot", "aot_unpaired") else {})
        )
        for name in DPO_TYPES
    },
    "dpo-js": lambda: DPOLoss(BETA, f_divergence="js_divergence"),
    "dpo-alpha": lambda: DPOLoss(BETA, f_divergence="alpha_divergence"),
    "dpo-ld": lambda: DPOLoss(BETA, ld_alpha=0.4),
    "kto": lambda: KTOLoss(BETA),
    **{f"cpo-{name}": lambda name=name: CPOLoss(BETA, name) for name in ("sigmoid", "hinge", "ipo", "simpo")},
    "cpo-alpha": lambda: CPOLoss(BETA, alpha=0.1, label_smoothing=0.1),
    "simpo": SimPOLoss,
    "orpo": ORPOLoss,
}
each_loss = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


@each_loss
def test_gradcheck(make):
    loss = make()
    log_probs = (LOG_PROBS - 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(loss, x), log_probs)


@each_loss
def test_masked_tokens_may_hold_anything(make):
    loss = make()
    log_probs, reference = LOG_PROBS - 0.3, REFERENCE.clone()
    expected = call(loss, log_probs)
    dirty = log_probs.masked_fill(~MASK, float("nan")).requires_grad_()
    value = call(loss, dirty, reference.masked_fill(~MASK, float("inf")))
    (gradient,) = torch.autograd.grad(value, dirty)
    assert torch.equal(value, expected) and gradient.isfinite().all() and (gradient[~MASK] == 0).all()


@each_loss
def test_a_mask_of_any_dtype(make):
    loss = make()
    expected = call(loss, LOG_PROBS - 0.3)
    for dtype in (torch.int64, torch.float32, torch.uint8):
        torch.testing.assert_close(call(loss, LOG_PROBS - 0.3, mask=MASK.to(dtype)), expected)


LINEAR = {
    "dpo": (fused_losses.LinearDPOLoss, DPOLoss, {"beta": BETA}),
    "dpo-sft": (fused_losses.LinearDPOLoss, DPOLoss, {"loss_type": ("sigmoid", "sft")}),
    "kto": (fused_losses.LinearKTOLoss, KTOLoss, {"beta": BETA, "undesirable_weight": 0.6}),
    "cpo": (fused_losses.LinearCPOLoss, CPOLoss, {"beta": BETA, "cpo_alpha": 0.7}),
    "simpo": (fused_losses.LinearSimPOLoss, SimPOLoss, {"gamma": 0.7}),
    "orpo": (fused_losses.LinearORPOLoss, ORPOLoss, {"beta": BETA}),
}


def linear_call(loss, hidden, weight, bias, **reference):
    options = {"linear_bias": bias, "temperature": 0.8}
    if isinstance(loss, DPOLoss):
        return loss(hidden, weight, TARGET, **options, **reference)
    if isinstance(loss, KTOLoss):
        kl = torch.tensor(0.1, dtype=hidden.dtype)
        return loss(hidden, weight, TARGET, DESIRABLE, kl=kl, **options, **reference)
    return loss(hidden, weight, TARGET, **options)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"atol": 1e-10, "rtol": 1e-10}), (torch.float32, {"atol": 2e-5, "rtol": 2e-5})],
    ids=["fp64", "fp32"],
)
@pytest.mark.parametrize("as_head", [False, True], ids=["log_probs", "head"])
@pytest.mark.parametrize("name", LINEAR)
def test_from_hidden_states_it_is_the_same(name, as_head, dtype, tolerance):
    kind, plain_kind, options = LINEAR[name]
    leaves = *head(dtype), torch.linspace(-1, 1, 23, dtype=dtype)
    frozen = head(dtype, seed=1)
    reference = tokens_of(*frozen, TARGET, 0.8)[0]
    given = (
        {"reference_input": frozen[0], "reference_weight": frozen[1]} if as_head else {"reference_log_probs": reference}
    )

    def plain(hidden, weight, bias):
        logits = hidden @ weight.t() + bias
        log_p = torch.log_softmax(logits / 0.8, -1).gather(-1, TARGET.clamp(min=0)[..., None])[..., 0]
        return call(plain_kind(**options), log_p, reference)

    assert_same_step(lambda *heads: linear_call(kind(**options), *heads, **given), plain, leaves, **tolerance)


def test_orpo_learns_the_prompts_likelihood_from_a_mask_of_completions():
    hidden, weight = head()
    target = TARGET
    completion = MASK & (torch.arange(5) > 0)
    completion[5, 0] = True  # a sequence of one token
    loss = fused_losses.LinearORPOLoss(BETA)(hidden, weight, target, mask=completion)
    log_probs = tokens_of(hidden, weight, target)[0]
    expected = ORPOLoss(BETA)(log_probs, completion, nll_mask=MASK[:3])
    torch.testing.assert_close(loss, expected)
    assert loss != ORPOLoss(BETA)(log_probs, completion)


@pytest.mark.parametrize("name", LINEAR)
def test_compiles_as_one_graph(name):
    kind, _, options = LINEAR[name]
    leaves = *head(torch.float32), torch.linspace(-1, 1, 23)
    given = {"reference_log_probs": REFERENCE.float()} if name[:3] in ("dpo", "kto") else {}

    module = kind(**options)

    def loss(*heads):
        return linear_call(module, *heads, **given)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, loss, leaves, atol=1e-5, rtol=1e-5)


REFUSED_OPTIONS = [
    (DPOLoss, {"loss_type": "simpo"}, "loss_type must be one of"),
    (DPOLoss, {"f_divergence": "kl"}, "f_divergence must be one of"),
    (DPOLoss, {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "one for each"),
    (DPOLoss, {"loss_type": "robust", "label_smoothing": 0.5}, r"\[0, 0.5\)"),
    (DPOLoss, {"loss_type": "exo_pair"}, "above 0"),
    (DPOLoss, SMOOTHED, "sigmoid takes none"),
    (DPOLoss, {"loss_type": ("hinge", "sft"), **SMOOTHED}, "hinge, sft takes none"),
    *(
        (DPOLoss, {"loss_type": name, "f_divergence": "forward_kl"}, "log-ratios")
        for name in ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
    ),
    (KTOLoss, {"loss_type": "bco"}, "loss_type must be one of"),
    (CPOLoss, {"loss_type": "dpo"}, "loss_type must be one of"),
    (CPOLoss, {"loss_type": "hinge", **SMOOTHED}, "takes no label_smoothing"),
    (CPOLoss, {"loss_type": "ipo", **SMOOTHED}, "takes no label_smoothing"),
]


@pytest.mark.parametrize(("kind", "options", "match"), REFUSED_OPTIONS, ids=str)
def test_an_option_that_would_be_dropped_raises(kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind(**options)


@each_loss
def test_shapes_that_do_not_fit(make):
    loss = make()
    with pytest.raises(ValueError, match="mask must have the shape"):
        call(loss, LOG_PROBS, mask=MASK[:, :4])
    with pytest.raises(ValueError, match=r"log_probs must be \(B, T\)"):
        call(loss, LOG_PROBS[0], mask=MASK[0])
    loss.reduction = "median"
    with pytest.raises(ValueError, match="median"):
        call(loss, LOG_PROBS)


def test_a_batch_without_pairs():
    for loss in (DPOLoss(), CPOLoss(), SimPOLoss(), ORPOLoss()):
        with pytest.raises(ValueError, match="got 5 sequences"):
            call(loss, LOG_PROBS[:5], REFERENCE[:5], MASK[:5])


def test_references_that_do_not_fit():
    hidden, weight = head()
    target, dpo = TARGET, fused_losses.LinearDPOLoss()
    for loss, rest in ((dpo, ()), (fused_losses.LinearKTOLoss(loss_type="apo_zero_unpaired"), (DESIRABLE,))):
        with pytest.raises(ValueError, match="a reference is needed"):
            loss(hidden, weight, target, *rest)
        with pytest.raises(ValueError, match="come together"):
            loss(hidden, weight, target, *rest, reference_input=hidden)
        both = {"reference_input": hidden, "reference_weight": weight, "reference_log_probs": REFERENCE}
        with pytest.raises(ValueError, match="not as both"):
            loss(hidden, weight, target, *rest, **both)
    with pytest.raises(ValueError, match="reference_log_probs must have the shape"):
        DPOLoss()(LOG_PROBS, MASK, REFERENCE[:, :4])


def test_kto_asks_for_what_its_loss_type_takes():
    arguments = LOG_PROBS, MASK, DESIRABLE, REFERENCE
    with pytest.raises(ValueError, match="a kl"):
        KTOLoss()(*arguments)
    with pytest.raises(ValueError, match="no kl"):
        KTOLoss(loss_type="apo_zero_unpaired")(*arguments, kl=torch.tensor(0.0))
    with pytest.raises(ValueError, match=f"one for each of {SEQUENCES} sequences"):
        KTOLoss()(LOG_PROBS, MASK, DESIRABLE[:4], REFERENCE, kl=torch.tensor(0.0))


def test_the_kl_estimate_gets_no_gradient():
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss = KTOLoss(BETA)(log_probs, MASK, DESIRABLE, REFERENCE, kl=kl)
    assert torch.autograd.grad(loss, [log_probs, kl], allow_unused=True)[1] is None
