"""Policy losses against their papers' formulas, and against values that TRL 1.16 gives for the same tokens."""

import math

import pytest
import torch
from tokens import (
    ADVANTAGES,
    ENTROPY,
    LENGTHS,
    LOG_PROBS,
    MASK,
    OLD,
    RATIO,
    REFERENCE,
    SAMPLING,
    TARGET,
    assert_same_step,
    head,
    tokens_of,
)

from fused_losses import GRPOLoss, LinearGRPOLoss

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
EVERYTHING = {"off_policy_threshold": 0.05, "top_entropy_quantile": 0.5, "entropy_coef": 0.1}
SEQUENCE = {"importance_sampling_level": "sequence", "beta": 0.04, "bias_correction_kl": True}

# Of TRL's own code on these tokens: alone, with beta = 0.04, with SEQUENCE, and with EVERYTHING.
GOLDEN = {
    "grpo": (-0.221073070031, -0.196408428719, -0.22641644919, -0.268756832827),
    "bnpo": (-0.291974866666, -0.266423622716, -0.294925736897, -0.390913515654),
    "dr_grpo": (-0.121656194444, -0.111009842798, -0.122885723707, -0.317724802726),
    "dapo": (-0.291974866666, -0.266423622716, -0.294925736897, -0.390913515654),
    "cispo": (0.132631962374, 0.158183206324, 0.156800828301, -0.191672423067),
    "sapo": (-0.585424700262, -0.56076005895, -0.558605002231, -0.302074268697),
    "luspo": (-0.973249555555, -0.888078742387, -0.983085789656, -0.683668367367),
    "vespo": (0.667606996209, 0.693158240159, 0.691775862136, 0.0398419734674),
}


def loss_of(loss_type, **options):
    return GRPOLoss(loss_type, **({"max_completion_length": 8} if loss_type == "dr_grpo" else {}), **options)


def call(loss, log_probs=LOG_PROBS, advantages=ADVANTAGES, **tensors):
    tensors = {"old_log_probs": OLD, "reference_log_probs": REFERENCE, "entropy": ENTROPY, **tensors}
    return loss(log_probs, MASK, advantages, **tensors)


CORRECTED = {"sampling_log_probs": SAMPLING, "importance_ratio": RATIO}


@pytest.mark.parametrize("which", range(4), ids=["alone", "kl", "sequence", "everything"])
@pytest.mark.parametrize("loss_type", TYPES)
def test_values(loss_type, which):
    options = ({}, {"beta": 0.04}, SEQUENCE, EVERYTHING)[which]
    value = call(loss_of(loss_type, **options), **(CORRECTED if options is EVERYTHING else {}))
    assert value.item() == pytest.approx(GOLDEN[loss_type][which], rel=2e-7)  # TRL's temperatures are fp32


@pytest.mark.parametrize(
    ("loss_type", "options", "normalizer", "expected"),
    [
        ("dapo", {"epsilon_high": 0.28, "delta": 1.35}, None, -0.304168254008),
        ("dapo", {}, 13.0, -0.449192102564),
        ("cispo", {"epsilon_high": 1.1}, None, 0.614344586537),
    ],
)
def test_values_of_options(loss_type, options, normalizer, expected):
    value = call(GRPOLoss(loss_type, **options), normalizer=normalizer)
    assert value.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [("grpo", -0.113864587453), ("dapo", -0.253596242303), ("sapo", -0.350718565336), ("vespo", 0.652630814814)],
)
def test_advantages_of_tokens(loss_type, expected):
    value = call(GRPOLoss(loss_type), advantages=ADVANTAGES[:, None] * RATIO)
    assert value.item() == pytest.approx(expected, rel=2e-7)


def averaged(loss_type, losses):
    """Of lists of a sequence's tokens' losses."""
    means = [sum(of_tokens) / len(of_tokens) for of_tokens in losses]
    totals = [sum(of_tokens) for of_tokens in losses]
    if loss_type in ("grpo", "sapo"):
        return sum(means) / 6
    if loss_type == "luspo":
        return sum(totals) / 6
    return sum(totals) / (6 * 8 if loss_type == "dr_grpo" else sum(LENGTHS))


def policy_term(loss_type, log_weight, log_p, sequence_weight, advantage):
    weight = torch.exp(log_weight)
    if loss_type == "cispo":  # MiniMax-M1, equation 4
        return -weight.clamp(max=0.2).detach() * advantage * log_p
    if loss_type == "sapo":  # Gao et al. 2025, soft adaptive policy optimisation, equation 5
        tau = 1.0 if advantage > 0 else 1.05
        return -4 / tau / (1 + torch.exp(-tau * (weight - 1))) * advantage
    if loss_type == "vespo":
        k, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        w = sequence_weight.clamp(1e-8, math.exp(20)).detach()
        return -math.exp(rate) * w**k * torch.exp(-rate * w) * advantage * log_p
    return -torch.minimum(weight * advantage, weight.clamp(0.8, 1.2) * advantage)  # Schulman et al. 2017


def plain(loss_type, log_probs, level="token", beta=0.0, corrected=False):
    losses = []
    for i, length in enumerate(LENGTHS):
        ratios = log_probs[i, :length] - OLD[i, :length]
        of_tokens = []
        for t in range(length):
            log_weight = ratios.mean() if level == "sequence" else ratios[t]
            term = policy_term(loss_type, log_weight, log_probs[i, t], ratios.sum().exp(), ADVANTAGES[i])
            d = REFERENCE[i, t] - log_probs[i, t]
            divergence = torch.exp(d) - d - 1  # Schulman 2020, k3
            of_tokens.append(term + beta * divergence * (torch.exp(log_weight) if corrected else 1.0))
        losses.append(of_tokens)
    return averaged(loss_type, losses)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("beta", "corrected"), [(0.0, False), (0.04, False), (0.04, True)])
@pytest.mark.parametrize("loss_type", TYPES)
def test_is_its_formula(loss_type, beta, corrected, level):
    loss = loss_of(loss_type, beta=beta, bias_correction_kl=corrected, importance_sampling_level=level)
    assert_same_step(
        lambda log_probs: call(loss, log_probs),
        lambda log_probs: plain(loss_type, log_probs, level, beta, corrected),
        [LOG_PROBS],
    )


def test_clipping_stops_the_gradient_on_one_side():
    """A ratio out of bounds pulls back where the advantage asks for it, and pushes no further."""
    old = torch.tensor([[-1.0]]).double()
    for shift, advantage, moves in ((0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)):
        log_probs = (old + shift).requires_grad_()
        loss = GRPOLoss()(log_probs, torch.ones(1, 1), torch.tensor([advantage]).double(), old_log_probs=old)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert (gradient != 0).item() == moves
        assert not moves or gradient.item() == pytest.approx(-advantage * math.exp(shift))


def test_delta_bounds_the_ratio_of_negative_advantages():
    old = torch.tensor([[-3.0]]).double()
    log_probs = (old + 2.0).requires_grad_()
    mask, advantage = torch.ones(1, 1), torch.tensor([-1.0]).double()
    bounded = GRPOLoss(delta=1.5)(log_probs, mask, advantage, old_log_probs=old)
    free = GRPOLoss()(log_probs, mask, advantage, old_log_probs=old)
    assert bounded.item() == pytest.approx(1.5) and free.item() == pytest.approx(math.exp(2.0))
    assert torch.autograd.grad(bounded, log_probs)[0] == 0


def test_the_policy_that_sampled_is_this_one_by_default():
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss = GRPOLoss()(log_probs, MASK, ADVANTAGES)
    expected = -(ADVANTAGES[:, None] * MASK) / MASK.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, log_probs)[0], expected)


def test_only_the_most_uncertain_tokens_count():
    """Wang et al. 2025: those above the quantile of all tokens that are not masked."""
    threshold = torch.quantile(ENTROPY[MASK].float(), 0.7)
    chosen = (threshold <= ENTROPY) & MASK
    loss = GRPOLoss(top_entropy_quantile=0.3)
    log_probs = LOG_PROBS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(loss, log_probs, old_log_probs=None), log_probs)
    torch.testing.assert_close(gradient, -(ADVANTAGES[:, None] * chosen) / MASK.sum())


def test_the_entropy_bonus_has_a_gradient():
    entropy = ENTROPY.clone().requires_grad_()
    loss = call(GRPOLoss(entropy_coef=0.3), entropy=entropy)
    torch.testing.assert_close(torch.autograd.grad(loss, entropy)[0], -0.3 * MASK.double() / MASK.sum())


def test_sequences_off_the_policy_are_left_out_where_they_lost():
    divergence = ((SAMPLING - LOG_PROBS) * MASK).sum(1) / MASK.sum(1)
    kept = (ADVANTAGES >= 0) | (divergence <= 0.05)
    assert not kept.all() and (ADVANTAGES < 0)[~kept].all()
    log_probs = LOG_PROBS.clone().requires_grad_()
    options = {"old_log_probs": None, "sampling_log_probs": SAMPLING}
    (gradient,) = torch.autograd.grad(call(GRPOLoss(off_policy_threshold=0.05), log_probs, **options), log_probs)
    torch.testing.assert_close(gradient, -((ADVANTAGES * kept)[:, None] * MASK) / MASK.sum())


@pytest.mark.parametrize("options", [{}, {"beta": 0.04, "bias_correction_kl": True}, SEQUENCE], ids=str)
@pytest.mark.parametrize("loss_type", [t for t in TYPES if t not in ("cispo", "vespo")])
def test_gradcheck(loss_type, options):
    """But for losses whose weights are constants by definition."""
    loss = loss_of(loss_type, **options)
    assert torch.autograd.gradcheck(lambda x: call(loss, x), LOG_PROBS.clone().requires_grad_())


@pytest.mark.parametrize("loss_type", TYPES)
def test_masked_tokens_may_hold_anything(loss_type):
    loss = loss_of(loss_type, beta=0.04, **EVERYTHING)
    dirty = {"old_log_probs": OLD, "reference_log_probs": REFERENCE, "entropy": ENTROPY, "sampling_log_probs": SAMPLING}
    dirty = {name: tensor.masked_fill(~MASK, float("nan")) for name, tensor in dirty.items()}
    log_probs = LOG_PROBS.masked_fill(~MASK, float("inf")).requires_grad_()
    value = call(loss, log_probs, **dirty)
    (gradient,) = torch.autograd.grad(value, log_probs)
    assert torch.equal(value, call(loss, sampling_log_probs=SAMPLING))
    assert gradient.isfinite().all() and (gradient[~MASK] == 0).all()


@pytest.mark.parametrize("loss_type", TYPES)
def test_a_sequence_without_tokens_counts_nothing(loss_type):
    mask = MASK.clone()
    mask[3] = False
    loss = loss_of(loss_type, beta=0.04)
    log_probs = LOG_PROBS.clone().requires_grad_()
    value = loss(log_probs, mask, ADVANTAGES, old_log_probs=OLD, reference_log_probs=REFERENCE)
    (gradient,) = torch.autograd.grad(value, log_probs)
    assert value.isfinite() and gradient.isfinite().all() and (gradient[3] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"atol": 1e-10, "rtol": 1e-10}), (torch.float32, {"atol": 2e-5, "rtol": 2e-5})],
    ids=["fp64", "fp32"],
)
@pytest.mark.parametrize("loss_type", TYPES)
def test_from_hidden_states_it_is_the_same(loss_type, dtype, tolerance):
    """The entropy's gradient included."""
    options = {"beta": 0.04, "entropy_coef": 0.1, "top_entropy_quantile": 0.6}
    loss = loss_of(loss_type, **options)
    linear = LinearGRPOLoss(loss_type, max_completion_length=loss.max_completion_length, **options)
    leaves, frozen = head(dtype), head(dtype, seed=1)
    old = tokens_of(*head(dtype, seed=2), TARGET)[0] * 0.1 + tokens_of(*leaves, TARGET, 0.8)[0] * 0.9
    reference = tokens_of(*frozen, TARGET, 0.8)[0]

    def fused(hidden, weight):
        given = {"reference_input": frozen[0], "reference_weight": frozen[1], "old_log_probs": old, "temperature": 0.8}
        return linear(hidden, weight, TARGET, ADVANTAGES.to(dtype), **given)

    def whole(hidden, weight):
        log_probs, entropy = tokens_of(hidden, weight, TARGET, 0.8)
        given = {"old_log_probs": old, "reference_log_probs": reference, "entropy": entropy}
        return loss(log_probs, MASK, ADVANTAGES.to(dtype), **given)

    assert_same_step(fused, whole, leaves, **tolerance)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_compiles_as_one_graph(loss_type):
    loss = LinearGRPOLoss(loss_type, beta=0.04, entropy_coef=0.1)

    def step(hidden, weight):
        given = {"old_log_probs": OLD.float(), "reference_log_probs": REFERENCE.float()}
        return loss(hidden, weight, TARGET, ADVANTAGES.float(), **given)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, step, head(torch.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of"),
        ({"loss_type": "dr_grpo"}, "max_completion_length belongs to"),
        ({"max_completion_length": 8}, "max_completion_length belongs to"),
        *(({"loss_type": name, "delta": 2.0}, "takes no delta") for name in TYPES if name not in CLIPPED),
        *(({"loss_type": name, "epsilon_high": 0.3}, "takes no epsilon_high") for name in ("sapo", "vespo")),
        ({"bias_correction_kl": True}, "needs a divergence"),
    ],
    ids=str,
)
def test_an_option_that_would_be_dropped_raises(options, match):
    with pytest.raises(ValueError, match=match):
        GRPOLoss(**options)


def test_tensors_that_an_option_needs():
    with pytest.raises(ValueError, match=r"beta=0.04 needs reference_log_probs"):
        call(GRPOLoss(beta=0.04), reference_log_probs=None)
    for option in ({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        with pytest.raises(ValueError, match="need the entropy"):
            call(GRPOLoss(**option), entropy=None)
    for loss_type in ("grpo", "bnpo", "dr_grpo", "sapo", "luspo"):
        with pytest.raises(ValueError, match="takes no normalizer"):
            call(loss_of(loss_type), normalizer=3.0)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="advantages must be"):
        call(GRPOLoss(), advantages=ADVANTAGES[:4])
    for name in ("old_log_probs", "reference_log_probs", "sampling_log_probs", "entropy", "importance_ratio"):
        with pytest.raises(ValueError, match=f"{name} must have the shape"):
            call(GRPOLoss(), **{name: LOG_PROBS[:, :4]})
