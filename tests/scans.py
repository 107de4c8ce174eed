"""Losses of numbers (A, B, C) that add up along a dimension."""

import torch


def scaled(x):
    """Of whole numbers, which add up in int64."""
    return (x > 0).cumsum(-1) * x + torch.ones_like(x, dtype=torch.int32).cumsum(0) * x


SCANS = {
    "last": lambda x: x.cumsum(-1).exp(),
    "middle": lambda x: x.sin().cumsum(1).square(),
    "first": lambda x: x.cumsum(0).tanh() * x,
    "of a distribution": lambda x: x.softmax(-1).cumsum(-1).square().sum(-1),
    "of a distribution, apart in memory": lambda x: (x.softmax(1).cumsum(1) - x.sigmoid()).square().mean((1, 2)),
    "from the end": lambda x: x.flip(1).cumsum(1).flip(1).logsumexp(1),
    "one after the other": lambda x: x.cumsum(0).cumsum(2).cumsum(1).sin(),
    "one beside the other": lambda x: x.cumsum(-1) * x.cumsum(1) - x.cumsum(0).sum(1, keepdim=True),
    "of whole numbers": scaled,
    "of stacked numbers": lambda x: torch.stack([x, x.exp(), x.sin()]).cumsum(0).tanh().mean(0),
}


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)
