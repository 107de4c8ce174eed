"""Values of the plain losses: torch's own losses and distributions, closed forms, and what has to add up to 1."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D

from . import CORPUS
from .classification import FocalLoss, GeneralizedCrossEntropyLoss, LabelSmoothingLoss, Poly1CrossEntropyLoss
from .counts import GammaDevianceLoss, NegativeBinomialLoss, ZeroInflatedPoissonLoss, poisson_nll_loss
from .generative import DiscretizedLogisticLoss, EvidenceLowerBoundLoss, VectorQuantizationLoss
from .guidance import DistillationLoss
from .imbalance import BiTemperedLoss, ClassBalancedLoss
from .ordinal import CumulativeLinkLoss
from .probabilistic import (
    BetaNLLLoss,
    EvidentialRegressionLoss,
    GaussianCRPSLoss,
    HeteroscedasticGaussianLoss,
    MixtureDensityLoss,
    StudentTLoss,
    laplace_nll_loss,
)
from .quantile import QuantileLoss
from .robust import AdaptiveRobustLoss, WingLoss
from .segmentation import DiceLoss, FocalTverskyLoss, LovaszHingeLoss, MatthewsLoss
from .similarity import ConcordanceLoss, CosineEmbeddingLoss, TripletLoss, margin_ranking_loss
from .survival import DiscreteHazardLoss, LogNormalSurvivalLoss, WeibullLoss, cox_loss
from .waveform import SISDRLoss

BY_LOSS = {entry.loss: entry for entry in CORPUS}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def nll(distribution, values):
    return -distribution.log_prob(values).mean()


def zero_inflated(log_rate, logits, counts):
    p, poisson = torch.sigmoid(logits), D.Poisson(log_rate.exp()).log_prob(counts).exp()
    return -torch.log(p * (counts == 0) + (1 - p) * poisson).mean()


def gamma_deviance(log_mean, targets):
    """Twice what the exponential distribution's log-likelihood lacks of its best."""
    lack = D.Exponential(1 / targets).log_prob(targets) - D.Exponential(torch.exp(-log_mean)).log_prob(targets)
    return 2 * lack.mean()


def beta_nll(mean, log_variance, targets):
    values = F.gaussian_nll_loss(mean, targets, log_variance.exp(), reduction="none")
    return (values * torch.exp(0.5 * log_variance)).mean()


def evidential(predictions, targets):
    """The marginal likelihood is Student's t with 2 alpha degrees of freedom."""
    mean, v, alpha, beta = predictions.unbind(-1)
    v, alpha, beta = F.softplus(v) + 1e-6, F.softplus(alpha) + 1, F.softplus(beta) + 1e-6
    marginal = D.StudentT(2 * alpha, mean, torch.sqrt(beta * (1 + v) / (v * alpha)))
    return nll(marginal, targets) + (0.01 * (targets - mean).abs() * (2 * v + alpha)).mean()


def mixture(logits, means, log_scales, targets):
    parts = D.Normal(means, log_scales.exp())
    return nll(D.MixtureSameFamily(D.Categorical(logits=logits), parts), targets)


def crps(mean, log_scale, targets):
    """The integral of (CDF - step)^2 on both sides of the step, by the trapezoidal rule."""
    law = D.Normal(mean.unsqueeze(1), log_scale.exp().unsqueeze(1))
    x = torch.linspace(0, 30, 30_001, dtype=torch.float64)
    below, above = law.cdf(targets.unsqueeze(1) - x), law.cdf(targets.unsqueeze(1) + x)
    return torch.trapezoid(below.square() + (1 - above).square(), x).mean()


def distillation(student, teacher, labels):
    soft = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")
    return 0.9 * 16 * soft + 0.1 * F.cross_entropy(student, labels)


def evidence_lower_bound(logits, data, mean, log_variance):
    code, prior = D.Normal(mean, torch.exp(0.5 * log_variance)), D.Normal(double(0.0), double(1.0))
    return (D.kl_divergence(code, prior).sum(1) - D.Bernoulli(logits=logits).log_prob(data).sum(1)).mean()


def weibull(log_scale, log_shape, times, events):
    scale, shape = log_scale.exp(), log_shape.exp()
    return -torch.where(events, D.Weibull(scale, shape).log_prob(times), -((times / scale) ** shape)).mean()


def log_normal(mean, log_scale, times, events):
    law = D.LogNormal(mean, log_scale.exp())
    return -torch.where(events, law.log_prob(times), torch.log1p(-law.cdf(times))).mean()


def concordance(x, t):
    covariance = torch.cov(torch.stack([x, t]), correction=0)
    return 1 - 2 * covariance[0, 1] / (covariance.trace() + (x.mean() - t.mean()) ** 2)


COUNTERPARTS = {
    poisson_nll_loss: lambda x, t: nll(D.Poisson(x.exp()), t),
    NegativeBinomialLoss: lambda m, r, t: nll(D.NegativeBinomial(r.exp(), logits=m - r), t),
    ZeroInflatedPoissonLoss: zero_inflated,
    GammaDevianceLoss: gamma_deviance,
    HeteroscedasticGaussianLoss: lambda m, v, t: F.gaussian_nll_loss(m, t, v.exp()),
    BetaNLLLoss: beta_nll,
    laplace_nll_loss: lambda m, s, t: nll(D.Laplace(m, s.exp()), t),
    StudentTLoss: lambda m, s, n, t: nll(D.StudentT(2 + F.softplus(n), m, s.exp()), t),
    EvidentialRegressionLoss: evidential,
    MixtureDensityLoss: mixture,
    GaussianCRPSLoss: crps,
    LabelSmoothingLoss: lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    ClassBalancedLoss: lambda x, y: F.cross_entropy(
        x, y, weight=ClassBalancedLoss().double().weight, reduction="none"
    ).mean(),
    DistillationLoss: distillation,
    EvidenceLowerBoundLoss: evidence_lower_bound,
    WeibullLoss: weibull,
    LogNormalSurvivalLoss: log_normal,
    ConcordanceLoss: concordance,
    CosineEmbeddingLoss: lambda a, b, y: F.cosine_embedding_loss(a, b, y, margin=0.1),
    TripletLoss: lambda a, p, n: F.triplet_margin_loss(a, p, n, eps=0.0),
    margin_ranking_loss: lambda a, b, y: F.margin_ranking_loss(a, b, y, margin=0.2),
}


@pytest.mark.parametrize("loss", COUNTERPARTS, ids=lambda loss: loss.__name__)
def test_the_value_is_that_of_its_counterpart(loss):
    entry = BY_LOSS[loss]
    tensors = entry.samples()[0].tensors
    plain = entry.build()
    plain = plain.double() if isinstance(plain, torch.nn.Module) else plain
    torch.testing.assert_close(plain(*tensors), COUNTERPARTS[loss](*tensors), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "loss",
    [
        FocalLoss(gamma=0.0),
        Poly1CrossEntropyLoss(epsilon=0.0),
        GeneralizedCrossEntropyLoss(q=1e-9),
        BiTemperedLoss(t1=1 - 1e-7, t2=1 + 1e-7),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_the_limit_is_cross_entropy(loss):
    logits, labels = BY_LOSS[LabelSmoothingLoss].samples()[1].tensors
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels), rtol=1e-5, atol=0.0)


def test_probabilities_of_all_outcomes_add_up_to_one():
    """Of the bytes of a logistic, the ranks of a score, the intervals of a life."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    bytes_ = DiscretizedLogisticLoss("none")(levels * 0 + 0.3, levels * 0 - 2.0, levels)
    ranks = torch.stack([CumulativeLinkLoss()(double(0.7), torch.tensor([rank])) for rank in range(5)])
    hazards = double(-1.0, 0.5, 2.0).expand(4, 3)
    seen, last = torch.tensor([True, True, True, False]), torch.tensor([0, 1, 2, 2])
    lives = DiscreteHazardLoss("none")(hazards, last, seen)
    for outcomes in (bytes_, ranks, lives):
        torch.testing.assert_close(torch.exp(-outcomes).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_byte_far_out_of_its_logistic():
    """sigmoid(u) - sigmoid(l) is exp(-l) - exp(-u) there, though both are 1 in floating point."""
    mean, log_scale, pixel = double(-0.9), double(-4.0), double(0.1)
    lower, upper = (1.0 - 1 / 255) * math.exp(4), (1.0 + 1 / 255) * math.exp(4)
    expected = lower - math.log(-math.expm1(lower - upper))
    assert DiscretizedLogisticLoss()(mean, log_scale, pixel).item() == pytest.approx(expected, rel=1e-3)


def test_hard_masks_count_pixels():
    """Three of four predicted pixels are right, and of five true ones two are missed; twelve pixels in all."""
    predicted = double(1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0).view(1, 1, 3, 4)
    true = double(1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0).view(1, 1, 3, 4)
    logits = 2000 * predicted - 1000
    assert DiceLoss(smooth=0.0)(logits, true).item() == pytest.approx(1 - 6 / 9)
    matthews = (3 * 6 - 1 * 2) / math.sqrt(4 * 5 * 7 * 8)
    assert MatthewsLoss(eps=0.0)(logits, true).item() == pytest.approx(1 - matthews)
    # A score of -1 or 1 is wrong by 2 or 0: the hinge counts twice the Jaccard loss.
    assert LovaszHingeLoss()(2 * predicted - 1, true).item() == pytest.approx(2 * (1 - 3 / 6))


def test_a_perfect_mask_has_a_finite_gradient():
    masks = double(1, 0, 0, 1).view(1, 1, 2, 2)
    logits = (2000 * masks - 1000).requires_grad_()
    assert torch.autograd.grad(FocalTverskyLoss()(logits, masks), logits)[0].isfinite().all()


@pytest.mark.parametrize(
    "value, expected",
    [
        # alpha = 1 and a scale of 1 + softplus(0) - log 2: sqrt(z^2 + 1) - 1.
        (AdaptiveRobustLoss(1, 1 - math.log(2))(double(math.sqrt(3)), double(0.0)), 1.0),
        (WingLoss(10.0, 2.0)(double(10.0), double(0.0)), 10 * math.log(6)),
        (QuantileLoss((0.9,))(double(1.0).view(1, 1), double(3.0)), 1.8),
        (QuantileLoss((0.9,))(double(3.0).view(1, 1), double(1.0)), 0.2),
        # Equal hazards: a subject is as likely as each of those at risk.
        (cox_loss(torch.ones(4), torch.tensor([0, 1, 0, 1])), (math.log(2) + math.log(4)) / 2),
        # An error of a tenth of the signal, at right angles to it: 20 dB.
        (SISDRLoss()(double(1.1, -0.9, -1.1, 0.9), double(1.0, -1.0, -1.0, 1.0)), -20.0),
        (SISDRLoss()(7 * double(1.1, -0.9, -1.1, 0.9), double(1.0, -1.0, -1.0, 1.0)), -20.0),
    ],
)
def test_closed_forms(value, expected):
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_no_gradient_flows_through_what_is_stopped():
    z, e = double(3.0).requires_grad_(), double(1.0).requires_grad_()
    VectorQuantizationLoss(0.25)(z, e).backward()
    assert z.grad.item() == 0.25 * 2 * 2.0 and e.grad.item() == -2 * 2.0
    mean, log_variance, target = double(1.0), double(math.log(4)), double(4.0)
    gradient = torch.func.grad(lambda v: BetaNLLLoss(0.5)(mean, v, target).sum())(log_variance)
    assert gradient.item() == pytest.approx(2.0 * 0.5 * (1 - 9.0 / 4.0))  # sqrt(variance) (1 - d^2 / variance) / 2
