"""Strided slices, and tensors that are stacked and reduced: in programs for anything drawn, and in kernels."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lowering import check, externs

from fused_losses import fuse
from fused_losses.fusion.ir import Index

PAIR = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.linspace(-2, 2, 35).view(5, 7)
SLICES = st.lists(st.tuples(st.integers(-2, -1), st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=3)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 14))


def at(dim, start, step):
    return (..., slice(start, None, step), *[slice(None)] * (-dim - 1))


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SLICES, SHAPES)
def test_every_few_elements(slices, shape):
    """Slices of slices, each read twice: shifted against itself, and as it is."""

    def loss(x):
        total = x.square().sum()
        for dim, start, step in slices:
            x = x[at(dim, start, step)].tanh()
            total = total + (x * x.roll(1, -1)).sum() + x.exp().sum()
        return total

    assert not externs(check(loss, draw(*shape)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SLICES, SHAPES)
def test_every_few_elements_written(slices, shape):
    def loss(x, y):
        z = x.exp().clone()
        for dim, start, step in slices:
            places = at(dim, start, step)
            z[places] = (x[places] * y[places]).sin()
        return (z * y).sum() + z[at(*slices[0])].square().sum()

    assert not externs(check(loss, draw(*shape), draw(*shape, seed=1), wanted=(0, 1)))


def halved(x):
    total = x.abs().sum()
    for _ in range(2):
        even = x.shape[-1] // 2 * 2
        x = 0.5 * (x[..., 0:even:2] + x[..., 1:even:2])
        total = total + x.abs().sum()
    return total


def against_the_start(x):
    piece = x[:, x.shape[1] // 2 :: 2]
    return (piece * x[:, ::2][:, : piece.shape[1]].exp()).sum()


@pytest.mark.parametrize("loss", [halved, against_the_start])
def test_gradients_of_strided_slices_read_inputs_in_order(loss):
    programs = check(loss, draw(3, 13))
    inputs = {buffer.name for buffer in programs.backward.inputs}
    places = [index for step in programs.backward.steps for load in step.loads for index in load["index"]]
    assert not externs(programs) and all(isinstance(index, Index) for index in places)
    read = [load for step in programs.backward.steps for load in step.loads if load["buffer"] in inputs]
    assert all(index.divisor == 1 for load in read for index in load["index"])


def board(x):
    """A checkerboard of which one colour is another function, and what is divided by norms over the first dimension."""
    z = x.clone()
    z[:, ::2, 1::2] = x[:, ::2, 1::2].tanh()
    z[:, 1::2, ::2] = z[:, 1::2, ::2] * 2
    y = z[:, 1::3, 2::5]
    return (z * z).sum() + (y / (y.square().sum(0).sqrt() + 1)).exp().sum()


@pytest.mark.parametrize("loss", [halved, board])
def test_kernels_of_strided_slices(loss):
    """At sizes of no piece, of one and of several blocks, and in every layout."""
    fused = fuse(loss, strict=True)
    for shape in ((2, 3, 40), (3, 5, 1), (2, 1, 7), (1, 4, 3), (2, 41, 1201)):
        for x in (draw(*shape), draw(*shape[::-1]).permute(2, 1, 0), draw(shape[1], shape[2]).expand(shape)):
            leaves = [x.detach().requires_grad_() for _ in range(2)]
            results = [(value := f(leaf), *torch.autograd.grad(value, leaf)) for f, leaf in zip((fused, loss), leaves)]
            torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "piece",
    [
        lambda x: x[:3],
        lambda x: x[:-1],
        lambda x: x[::2],
        lambda x: torch.cat([x[:2], x[5:6], x[4:5]]),
        lambda x: F.pad(x[1:3], (1, 1)),
        lambda x: x.roll(1, 0)[1:4],
        lambda x: torch.diag(x)[:3, :3].diagonal(),
    ],
)
def test_indices_are_checked_where_they_are_read(piece):
    """Classes that a loss leaves out may be anything, and one that it reads may not."""

    def loss(x, labels, table):
        return (piece(x.exp() * 2) * piece(labels).clamp(max=9).double().exp() * table[piece(labels)]).sum()

    n, table = 7, torch.linspace(-1, 1, 5, dtype=torch.float64)
    read = piece(torch.arange(1, n + 1)).unique() - 1
    read = read[read >= 0]
    labels = torch.full((n,), -100)
    labels[read] = read % 5
    check(loss, draw(n), labels, table)
    labels[read[0]] = 5
    with pytest.raises(IndexError):
        fuse(loss, strict=True)(draw(n), labels, table)


REDUCTIONS = {
    "sum": torch.sum,
    "mean": torch.mean,
    "prod": torch.prod,
    "largest": torch.amax,
    "smallest": torch.amin,
    "logsumexp": torch.logsumexp,
    "spread": lambda x, dim: x.var(dim, correction=0),
    "all": lambda x, dim: (x > -1).all(dim).double(),
    "any": lambda x, dim: (x > 1).any(dim).double(),
    "where": lambda x, dim: x.max(dim).values * (x.argmax(dim) + 1),
}
MAPS = {
    "as it is": lambda x, dim: x,
    "softmax": lambda x, dim: x.softmax(dim),
    "rows": lambda x, dim: x.log_softmax(-1),
    "centred": lambda x, dim: (x - x.mean()).tanh(),
    "weighted": lambda x, dim: x * torch.arange(x.shape[dim]).view([-1 if d == dim else 1 for d in range(x.ndim)]),
    "turned": lambda x, dim: x.transpose(0, -1).square().transpose(0, -1),
    "flipped": lambda x, dim: x.flip(dim) * 2,
}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(0, 2),
    st.lists(st.sampled_from(list(MAPS)), max_size=3),
    st.sampled_from(list(REDUCTIONS)),
    st.booleans(),
)
def test_reduced_stacks(count, dim, maps, last, twice):
    """Stacked tensors, of which there may be too many to be written out, along every dimension."""

    def loss(x, y):
        z = torch.stack([x, y, x * y, x - y, x + 1, y.exp(), -x, x.sin(), y * 2][:count], dim)
        for name in maps:
            z = MAPS[name](z, dim)
        z = REDUCTIONS[last](z, (dim + 1) % 3 if twice else dim)
        z = z.sum(dim % 2) if twice else z
        return (z * (1 + z.tanh())).sum() + x.square().sum() + y.sum()

    check(loss, draw(3, 4), draw(3, 4, seed=1), wanted=(0, 1))


def agreement(x, y):
    log_p = F.log_softmax(torch.stack([x, y, x * y]), dim=-1)
    mixture = torch.logsumexp(log_p, dim=0)
    return (log_p.exp() * (log_p - mixture)).sum(dim=-1).mean()


def test_stacks_are_neither_looped_over_nor_kept():
    programs = check(agreement, *PAIR, wanted=(0, 1))
    steps = [*programs.forward.steps, *programs.backward.steps]
    extents = {axis.extent.value for step in steps for axis in (*step.axes, *step.reduced)}
    assert 3 not in extents
    assert all(len(step.axes) <= 1 for step in programs.forward.steps)


def test_what_lies_in_memory_stays_a_loop():
    programs = check(lambda x: x[:, :3].square().sum(1).sqrt().sum(), PAIR[0])
    assert any(step.reduced and step.reduced[0].extent.value == 3 for step in programs.forward.steps)


def test_expressions_stay_small():
    """Pairs of pairs of stacked tensors, of which only as many are written out as make a short expression."""

    def pairs(x, y):
        z = torch.stack([x, y, x - y, x * y, x + y, x.exp()])
        for _ in range(4):
            z = (z.unsqueeze(0) * z.unsqueeze(1)).tanh().sum(0)
        return z.sum()

    programs = check(pairs, *PAIR, wanted=(0, 1))
    seen = set()
    waiting = [step.expression for step in (*programs.forward.steps, *programs.backward.steps)]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.arguments
    assert len(seen) < 20_000


def test_kernels_of_stacks():
    """NaN goes through; what is largest twice shares the gradient, as in torch."""

    def loss(x, y):
        z = torch.stack([x, y, x * y, y])
        parts = [F.softmax(z, 0).amax(0), z.amin(0), z.prod(0), (z > 0).any(0), (z > 0).all(0), agreement(x, y)]
        return functools.reduce(operator.add, parts).sum(1)

    fused = fuse(loss, strict=True)
    for shape in ((5, 7), (33, 1201)):
        x, y = draw(*shape), draw(*shape, seed=1)
        x[0, 0] = y[1, 1] = float("nan")
        x[2], y[3, 2] = y[2], float("inf")
        results = []
        for f in (fused, loss):
            leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
            value = f(*leaves)
            results.append((value, *torch.autograd.grad(value[2:], leaves, torch.ones_like(value[2:]))))
        torch.testing.assert_close(*results, equal_nan=True)
