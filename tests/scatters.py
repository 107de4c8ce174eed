"""Losses of a table (K, M), numbers (N, M) and indices (N, M) below K, in which terms are added at computed places."""

import torch
import torch.nn.functional as F


def apart(table, x, index):
    """Indices of the first and the last dimension."""
    twice = torch.stack([table, table.sin()])
    return twice[index[:, 0] % 2, :, index[:, 0] % table.shape[1]].square() * x[:, :1]


# The gradient of the table is such a sum.
LOOKUPS = {
    "rows": lambda table, x, index: table[index[:, 0]] * x,
    "rows of rows": lambda table, x, index: table[index].square().mean(1) * x,
    "rows from the end": lambda table, x, index: table[index[:, 0] - table.shape[0]].exp() * x,
    "elements": lambda table, x, index: table[index, index % table.shape[1]].exp() * x,
    "elements of dimensions apart": apart,
    "flattened": lambda table, x, index: table[:, 0][index.flatten()].exp() * x.flatten(),
    "gathered": lambda table, x, index: table.gather(0, index).sin() * x,
    "selected": lambda table, x, index: table.index_select(0, index[:, 0]) * x.exp(),
    # As many as are written out, were they stacked tensors.
    "a few by number": lambda table, x, index: (
        table[torch.arange(3) % len(table), torch.arange(3) % table.shape[1]].sin().sum() * x
    ),
    "a few rows by number": lambda table, x, index: table[torch.arange(3) % len(table) - len(table)].sin().sum(0) * x,
    "a few gathered by number": lambda table, x, index: (
        table.gather(0, torch.arange(2)[:, None] % len(table)).sin().sum() * x
    ),
    "embedded": lambda table, x, index: F.embedding(index, table, padding_idx=0).tanh().sum(1) * x,
}
# The loss itself takes one.
SUMS = {
    "rows added": lambda table, x, index: table.index_add(0, index[:, 0], x.tanh(), alpha=2).square(),
    "elements added": lambda table, x, index: table.scatter_add(0, index, x.tanh()).square(),
    "elements reduced": lambda table, x, index: table.scatter_reduce(0, index, x, "sum").sin(),
    "for each row": lambda table, x, index: (
        x.new_zeros(len(x), len(table)).scatter_add(1, index, x.softmax(1)).exp() * table[:, 0]
    ),
    "a few added by number": lambda table, x, index: table.index_add(
        0, torch.arange(4) % len(table), torch.stack([x[0], x[-1].exp(), x[0].sin(), x[0]])
    ).square(),
    "whole numbers": lambda table, x, index: (
        index.new_zeros(len(table)).index_add(0, index[:, 0], index[:, 0] + 1) * table[:, 0] + x.sum()
    ),
}
SCATTERS = {**LOOKUPS, **SUMS}


def drawn(places, width, count, dtype=torch.float64):
    """Tensors that such a loss takes."""
    generator = torch.Generator().manual_seed(places + width + count)
    table = torch.randn(places, width, generator=generator, dtype=dtype)
    x = torch.randn(count, width, generator=generator, dtype=dtype)
    return table, x, torch.randint(places, (count, width), generator=generator)
