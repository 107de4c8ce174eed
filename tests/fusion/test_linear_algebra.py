"""Losses around factorings and inverses, which torch computes: their values, their gradients and their errors."""

import pytest
import torch
from torch import distributions as D

from fused_losses import fuse


def definite(x):
    return x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def normal(x, t):
    density = D.MultivariateNormal(x[..., 0], definite(t), validate_args=False)
    return -density.log_prob(t[..., 1]).mean()


def of_low_rank(x, t):
    density = D.LowRankMultivariateNormal(x[..., 0], t[..., :2], t[..., 2].exp(), validate_args=False)
    return -density.log_prob(t[..., 1]).mean()


LOSSES = {
    "normal": normal,
    "of_low_rank": of_low_rank,
    "stein": lambda x, t: torch.logdet(definite(x)).mean() - torch.linalg.slogdet(definite(x + t))[1].mean(),
    "cholesky": lambda x, t: (torch.linalg.cholesky(definite(x)) - t).square().mean(),
    "one_factor_for_all": lambda x, t: torch.linalg.solve_triangular(definite(t[0]), x, upper=True).tanh().mean(),
    "of_a_factor": lambda x, t: torch.cholesky_solve(x, torch.linalg.cholesky(definite(t[0]))).square().mean(),
    "inverse": lambda x, t: (torch.linalg.inv(definite(x)) * t).tanh().mean(),
    "solved": lambda x, t: torch.linalg.solve(definite(x), t).abs().mean(),
    "log_euclidean": lambda x, t: torch.linalg.eigvalsh(definite(x)).log().square().mean(),
    "coral": lambda x, t: (torch.cov(x[0].t()) - t[0].t().cov(correction=0)).square().sum() + x[:, 0, 0].cov(),
    "nuclear": lambda x, t: torch.linalg.matrix_norm(x - t, "nuc").mean(),
    "orthogonal": lambda x, t: torch.linalg.qr(x)[1].abs().mean(),
}


def pair(device, count=6, size=4):
    generator = torch.Generator().manual_seed(count)
    x, t = (torch.randn(count, size, size, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    return x.requires_grad_(), t


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name, each_device):
    loss = fuse(LOSSES[name], strict=True)
    for shape in ((6, 4), (3, 5)):
        x, t = pair(each_device, *shape)
        results = []
        for each in (loss, LOSSES[name]):
            value = each(x, t)
            results.append((value, *torch.autograd.grad(3 * value, x)))
        torch.testing.assert_close(*results)
    assert loss.explain().externs


SINGULAR = {
    "cholesky": lambda x: torch.linalg.cholesky(x - 1).square().sum(),
    "inverse": lambda x: torch.linalg.inv(2 * x).sum(),
    "solve": lambda x: torch.linalg.solve(2 * x, x + 1).sum(),
    "factors": lambda x: torch.linalg.lu_factor(2 * x)[0].sum(),
}


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_cannot_be_factored_raises_as_in_torch(name, requires_grad, each_device):
    x = torch.zeros(3, 4, 4, device=each_device, requires_grad=requires_grad)
    loss = fuse(SINGULAR[name], strict=True)
    with pytest.raises(RuntimeError, match=r"Batch element 0") as plain:
        SINGULAR[name](x)
    with pytest.raises(RuntimeError, match=r"Batch element 0") as fused:
        loss(x)
    assert type(fused.value) is type(plain.value)
    good = torch.eye(4, device=each_device).repeat(3, 1, 1) * 5 + (name == "cholesky")
    torch.testing.assert_close(loss(good.requires_grad_(requires_grad)), SINGULAR[name](good))
    assert "raises where" in str(loss.explain())
