"""Losses with boolean masks as indices, which are compared with plain torch in C++ and in Triton."""

import torch
import torch.nn.functional as F


def chosen_rows(x, y):
    keep = y[:, 0] > 0
    return F.kl_div(x[keep].log_softmax(1), y[keep].softmax(1), reduction="batchmean")


def labelled(x, y):
    """Labels of what is not chosen are out of range, as 255 or -100 are."""
    labels = torch.where(y[:, 1] > 0, (y[:, 0].abs() * 2).long().clamp(max=4), -5)
    return F.cross_entropy(x[labels >= 0], labels[labels >= 0], label_smoothing=0.1)


def depth(x, y):
    valid = (y > 0.1) & (y < 2)
    difference = x[valid].abs().clamp(min=1e-3).log() - y[valid].log()
    return (difference.square().mean() - 0.5 * difference.mean() ** 2 + 1).sqrt()


def written(x, y):
    z = torch.zeros_like(x)
    z[y > 0] = x[y > 0] * y[y > 0]
    return z.square().sum() + F.smooth_l1_loss(x[~(y > 0)], y[~(y > 0)], beta=0.5)


def inside(x, y):
    z = 2 * x[:, 0][y[:, 0] > 0]
    z[z > 1] = 0.5
    return z.exp().sum()


def pairs(x, y):
    chosen = x[y[:, 0] > 0]
    return (chosen.unsqueeze(1) - chosen.unsqueeze(0)).square().mean() + (chosen.unsqueeze(1) - y).abs().mean()


def counted(x, y):
    chosen = x[y > 0]
    return chosen.exp().sum() / chosen.numel() + chosen.sum() / (1.5 * chosen.shape[0] + 1)


def selected(x, y):
    return torch.masked_select(x * y, y > 0).square().sum() + x.masked_select(y[0] > 0).abs().mean()


def looked_up(x, y):
    """The gradient of x adds up at computed places what the mask chooses."""
    keep, index = y[:, 0] > 0, y[:, 1].abs().long().clamp(max=x.shape[0] - 1)
    return (x[index[keep]] * y[keep]).sin().sum()


LOSSES = {
    "looked up": looked_up,
    "mean": lambda x, y: (x[y > 0] - y[y > 0]).abs().mean(),
    "functional": lambda x, y: F.binary_cross_entropy_with_logits(
        x[y.abs() > 0.3], (y[y.abs() > 0.3] > 0).to(x.dtype), weight=y.abs()[y.abs() > 0.3].detach()
    ),
    "columns": lambda x, y: (x[:, y[0] > 0].sum(1) - y[:, y[0] > 0].mean(1)).square().sum(),
    "last dimension": lambda x, y: x[..., y[0] > 0].square().mean(),
    "a column": lambda x, y: x[y[:, 0] > 0, 1].sum(),
    "two masks": lambda x, y: (x[y[:, 0] > 0].mean(0) - y[y[:, 0] < 0].mean(0)).square().sum(),
    "spread": lambda x, y: x[y > 0].std() + x[y[:, 0] > 0].var(1).sum(),
    "norm": lambda x, y: x[y > 0].norm() + x[y[:, 0] > 0].logsumexp(1).mean(),
    "ones": lambda x, y: F.mse_loss(x[y > 0], torch.ones_like(x[y > 0])),
    "cosine": lambda x, y: F.cosine_similarity(x[y[:, 0] > 0], y[y[:, 0] > 0]).mean(),
    "whole planes": lambda x, y: x[:, :, None].expand(-1, -1, 3)[y > 0].square().mean(),
    "added": lambda x, y: (x + 0).index_put((y > 0,), x[y > 0], accumulate=True).square().sum(),
    "any": lambda x, y: (x[y > 0] > 1).any().to(x.dtype) * x.sum(),
    **{f.__name__: f for f in (chosen_rows, labelled, depth, written, inside, pairs, counted, selected)},
}


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in "xy"]
