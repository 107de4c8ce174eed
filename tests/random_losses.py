"""Losses of two tensors, of steps that are drawn at random."""

import torch
from hypothesis import strategies as st


def rows(x):
    return x.reshape(-1, x.shape[-1])


def written(x, values):
    """Values of another shape put into a column."""
    x[:, 0] = values.transpose(0, -1).reshape(-1)
    return x


def written_where(x):
    x[x > 0.3] = 0.3
    return x


def half(x):
    return torch.arange(x.shape[0]) % 2


def pairs(x):
    return torch.arange(x.shape[-1]) // 2


UNARY = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    "softplus": torch.nn.functional.softplus,
    "abs": torch.abs,
    "scaled": lambda x: 0.5 * x - 1,
    "root": lambda x: (x * x + 1).sqrt(),
    "relu": torch.relu,
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 0),
    "shift": lambda x: torch.nn.functional.pad(x[..., 1:], (1, 0), value=0.5),
    "softmax": lambda x: x.softmax(-1),
    "centred": lambda x: x - x.mean(0, keepdim=True),
    "scaled by the largest": lambda x: x / (x.abs().amax(-1, keepdim=True) + 1),
    "flat and back": lambda x: (x.reshape(-1) * 2).view(x.shape),
    "swapped twice": lambda x: x.transpose(0, 1).exp().transpose(0, 1).clamp(max=3),
    "halves": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "written": lambda x: x.clone().mul_(2),
    "added up along rows": lambda x: x.cumsum(-1),
    "added up along columns": lambda x: x.cumsum(0),
    "a column of flat rows": lambda x: (rows(x)[:, :1] * rows(x)).view(x.shape),
    "written to flat rows": lambda x: written(rows(x) * 2, x.sum(-1)).view(x.shape),
    "numbered": lambda x: (x.flatten() + torch.arange(x.numel()).repeat(1)).view(x.shape),
    "repeated": lambda x: x.repeat(*[1] * (x.ndim - 1), 2)[..., 1 : x.shape[-1] + 1],
    "put together": lambda x: x.index_add(0, torch.arange(x.shape[0]) // 2, x),
    "two places for all": lambda x: x.new_zeros(2, *x.shape[1:]).index_add(0, half(x), x)[half(x)],
    "scattered along rows": lambda x: torch.zeros_like(x).scatter_add(-1, pairs(x).expand(x.shape), x),
    "rows in turn": lambda x: x[(torch.arange(x.shape[0]) + 1) % x.shape[0]],
    "a few rows": lambda x: x * x[torch.arange(3) % x.shape[0]].tanh().sum(0),
    "columns from the end": lambda x: x.gather(-1, torch.arange(x.shape[-1]).flip(0).expand(x.shape)),
    "columns of the largest": lambda x: x - x.gather(-1, x.argmax(-1, keepdim=True)),
    "stacked and added up": lambda x: torch.stack([x, x.sin(), 2 * x]).square().sum(0),
    "stacked and scanned": lambda x: torch.stack([x, x.sin(), 2 * x], 1).cumsum(1)[:, 1],
    "stacked and looked up": lambda x: torch.stack([x, x.sin()], 1)[torch.arange(x.shape[0]), half(x)],
    "less the mean of a mask": lambda x: x - x[x > 0.1].sum() / ((x > 0.1).sum() + 1),
    "chosen rows": lambda x: x + x[x.sum(list(range(1, x.ndim))) > 0].sin().sum(0),
    "chosen and looked up": lambda x: x * x[half(x)[x.sum(list(range(1, x.ndim))) > 0]].tanh().sum(0),
    "written where chosen": lambda x: written_where(x * 2),
    "apart by twos": lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1),
    "each twice": lambda x: x.repeat_interleave(2, 0)[: x.shape[0]],
    "triangles of differences": lambda x: (x.unsqueeze(-1) - x.unsqueeze(-2)).tril(-1).square().sum(-1),
    "every other hot": lambda x: x * torch.nn.functional.one_hot(pairs(x) % 2, 2)[:, 0],
    "by how many": lambda x: x / ((x > 0).sum(-1, keepdim=True) + 1),
    "a row written": lambda x: x.select_scatter(x[0] * x[-1], 0, -1),
}
BINARY = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "max": torch.maximum,
    "where": lambda x, y: torch.where(x > y, x * 2, y),
    "ratio": lambda x, y: x / (y * y + 1),
    "row": lambda x, y: x * y.sum(-1, keepdim=True),
    "column": lambda x, y: x + y[:1],
}
LAST = {
    "mean": torch.mean,
    "sum": torch.sum,
    "each": lambda x: x,
    "rows": lambda x: x.logsumexp(-1).sum(),
    "norm": lambda x: (x.square().sum((0, -1)) + 1).sqrt().mean(),
}
STEPS = st.lists(st.sampled_from([*UNARY, *BINARY]), min_size=1, max_size=6)
SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=3).map(tuple)


def drawn(steps, last):
    """The loss that applies the steps in turn; binary ones also read an earlier value."""

    def loss(x, y):
        values = [x, y]
        for name in steps:
            if name in UNARY:
                values.append(UNARY[name](values[-1]))
            else:
                values.append(BINARY[name](values[-1], values[-2]))
        return LAST[last](values[-1])

    return loss


def pair(shape, device="cpu"):
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
