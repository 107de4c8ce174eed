"""Losses that draw random numbers: those of the plain loss, in values, in every gradient, and in what comes next."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_losses import fuse


def denoised(x, t):
    """Score matching: the noise is predicted from what it was added to."""
    sigma = 0.1 + torch.rand(len(x), 1, device=x.device)
    noise = torch.randn_like(x)
    return ((x + sigma * noise) * t.sigmoid() + noise / sigma).square().mean()


def sliced(x, t, directions=6):
    """Wasserstein distance along random directions."""
    theta = torch.randn(x.shape[1], directions, dtype=x.dtype, device=x.device)
    theta = theta / theta.norm(dim=0)
    return ((x @ theta).sort(0).values - (t @ theta).sort(0).values).square().mean()


def evidence(x, t):
    posterior, prior = D.Normal(x, t.exp(), validate_args=False), D.Laplace(t, 2.0, validate_args=False)
    return ((posterior.rsample() - prior.sample()) ** 2).mean() + posterior.entropy().mean()


def twice(x, t):
    noise = torch.empty_like(x).uniform_(-1, 1)
    noise.mul_(0.5).add_(torch.rand_like(t))
    return (x * noise).tanh().sum() * torch.randint(1, 4, (), device=x.device)


def other_rows(x, t):
    return F.triplet_margin_loss(x, t, t[torch.randperm(x.shape[0], device=x.device)])


LOSSES = {
    "denoised": denoised,
    "sliced": sliced,
    "evidence": evidence,
    "twice": twice,
    "other_rows": other_rows,
    "dropout": lambda x, t: (F.dropout(x, 0.3) - F.dropout(t)).square().mean(),
    "everything_dropped": lambda x, t: (F.dropout(x, 1.0) - t).square().mean(),
    "native_dropout": lambda x, t: (torch.native_dropout(x, 0.3, True)[0] * t).square().mean(),
    "dropped_rows": lambda x, t: (F.dropout1d(x.unsqueeze(-1), 0.4) * t.unsqueeze(-1)).square().mean(),
    "gumbel": lambda x, t: (F.gumbel_softmax(x, tau=0.7, hard=True) * t).sum(1).square().mean(),
    "by_mean_and_deviation": lambda x, t: (torch.normal(x.detach().sigmoid(), t.exp()) * x).mean(),
    "by_deviation": lambda x, t: (torch.normal(0.5, t.exp()) * x).mean(),
    "by_numbers": lambda x, t: (torch.normal(0.5, 2.0, x.shape, device=x.device) * x).mean(),
    "bernoulli": lambda x, t: (torch.empty_like(x).bernoulli_(0.3) * x).square().mean() + t.bernoulli(0.5).mean(),
    "by_an_argument": lambda x, t: (torch.bernoulli(t) * x).mean() + torch.poisson(t).mean(),
    "chosen": lambda x, t: x.gather(1, torch.multinomial(t, 2)).square().mean(),
    "geometric": lambda x, t: (torch.empty_like(t).geometric_(0.4) * x).mean(),
    "exponential": lambda x, t: (torch.empty_like(t).exponential_(2.0) * x).mean(),
    "unused": lambda x, t: (torch.rand(3, device=x.device), x.exp().sum())[1],
    "unreduced": lambda x, t: (x + 0.1 * torch.randn_like(t)).exp(),
}


def pair(device, rows=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    x, t = torch.randn(rows, 5, generator=generator), torch.rand(rows, 5, generator=generator)
    return x.to(device, dtype).requires_grad_(), t.to(device, dtype)


def drawn_by(loss, *tensors, seed=7):
    """The value, the gradients of a weighted sum, and what torch would draw next."""
    torch.manual_seed(seed)
    value = loss(*tensors)
    (gradient,) = torch.autograd.grad((value * 1.5).sum(), [t for t in tensors if t.requires_grad])
    return value, gradient, torch.rand(3), torch.rand(3, device=tensors[0].device)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_what_the_plain_loss_draws(name, dtype, each_device):
    plain, loss = LOSSES[name], fuse(LOSSES[name], strict=True)
    for rows in (9, 12):
        tensors = pair(each_device, rows, dtype)
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
        for found, expected in zip(drawn_by(loss, *tensors), drawn_by(plain, *tensors), strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_an_argument_that_lies_across_in_memory():
    def loss(x):
        return (torch.rand_like(x) * x).square().mean()

    x = pair("cpu")[0].detach().t().requires_grad_()
    for found, expected in zip(drawn_by(fuse(loss, strict=True), x), drawn_by(loss, x), strict=True):
        torch.testing.assert_close(found, expected)


def test_every_call_draws_anew():
    x, t = pair("cpu")
    loss = fuse(denoised, strict=True)
    assert len({loss(x, t).item() for _ in range(4)}) == 4


@pytest.mark.parametrize("loss", [denoised, LOSSES["dropout"], LOSSES["unreduced"], LOSSES["by_mean_and_deviation"]])
def test_gradients_are_of_the_numbers_that_were_drawn(loss, each_device):
    """In a second backward, in a double one, and where a checkpoint computes the loss again."""
    fused = fuse(loss, strict=True)
    x, t = pair(each_device)
    _, once, *_ = drawn_by(loss, x, t)
    torch.manual_seed(7)
    value = (1.5 * fused(x, t)).sum()
    for _ in range(3):
        (again,) = torch.autograd.grad(value, x, retain_graph=True)
        torch.testing.assert_close(again, once)
    results = []
    for each in (loss, fused):
        torch.manual_seed(7)
        (gradient,) = torch.autograd.grad(each(x, t).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum() + x.sum(), x)[0])
    torch.testing.assert_close(*results)
    torch.manual_seed(7)
    value = (1.5 * checkpoint(fused, x, t, use_reentrant=False)).sum()
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], once)


class Noisy(nn.Module):
    def __init__(self, generator=None):
        super().__init__()
        self.generator, self.scale = generator, 0.5

    def forward(self, x, t):
        noise = torch.randn(x.shape, generator=self.generator, device=x.device)
        return (F.dropout(x, 0.5, self.training) + self.scale * noise - t).square().mean()


def test_generators_attributes_and_training():
    x, t = pair("cpu")
    plain = Noisy(torch.Generator().manual_seed(3))
    loss = fuse(Noisy(torch.Generator().manual_seed(3)), strict=True)
    for change in ({}, {"scale": 2.0}, {"training": False}):
        for module in (plain, loss):
            vars(module).update(change)
        for found, expected in zip(drawn_by(loss, x, t), drawn_by(plain, x, t), strict=True):
            torch.testing.assert_close(found, expected)


def seeded(x, t):
    torch.manual_seed(0)
    return (x * torch.rand_like(x)).mean()


def seeded_apart(x, t):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (x * torch.rand_like(x)).mean()


def by_a_generator_of_its_own(x, t):
    return (x * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).mean()


REFUSED = {
    seeded: "seeds torch's random numbers",
    seeded_apart: "seeds torch's random numbers",
    by_a_generator_of_its_own: "makes a torch.Generator",
    lambda x, t: (x * torch.bernoulli(t * 0.5)).mean(): "draws by what the loss computes",
    lambda x, t: (x[t > 0.5] * torch.rand_like(x[t > 0.5])).sum(): "as many numbers as a mask chooses",
    lambda x, t: F.rrelu(x, training=True).mean(): "random in a way of its own",
    lambda x, t: D.Gamma(x.exp(), t, validate_args=False).rsample().mean(): "random in a way of its own",
}


@pytest.mark.parametrize("plain", REFUSED)
def test_what_draws_in_another_way_runs_plain(plain):
    """It says so, and what is drawn is what the plain loss draws, whatever the seed was before."""
    x, t = pair("cpu")
    loss = fuse(plain)
    with pytest.warns(UserWarning, match=REFUSED[plain]):
        loss(x, t)
    for seed in (0, 1):
        for found, expected in zip(drawn_by(loss, x, t, seed=seed), drawn_by(plain, x, t, seed=seed), strict=True):
            torch.testing.assert_close(found, expected)


def test_seeding_alone_is_seen_whatever_the_seed_was():
    def loss(x):
        torch.manual_seed(0)
        return x.sum()

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="seeds torch's random numbers"):
        fuse(loss)(torch.ones(3))


def test_explains_what_is_drawn():
    x, t = pair("cpu")
    loss = fuse(denoised, strict=True)
    loss(x, t)
    assert loss.explain().reason is None and "drawn" in str(loss.explain())


def test_a_fused_loss_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(evidence)(*pair("cpu"))
