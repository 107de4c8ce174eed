"""Log-probabilities of six ragged sequences, the same on every machine, and heads that make such."""

import torch

LENGTHS = [5, 3, 4, 2, 5, 1]
SEQUENCES, LENGTH = 6, 5
MASK = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
_NUMBERS = torch.arange(30, dtype=torch.float64).view(SEQUENCES, LENGTH)
LOG_PROBS = -1.2 - torch.sin(0.7 * _NUMBERS)
REFERENCE = -1.3 - 0.8 * torch.cos(1.3 * _NUMBERS)
OLD = LOG_PROBS + 0.4 * torch.sin(2.1 * _NUMBERS)
SAMPLING = OLD + 0.2 * torch.cos(_NUMBERS)
ENTROPY = 2.0 + torch.cos(0.9 * _NUMBERS)
RATIO = 1.0 + 0.3 * torch.sin(1.7 * _NUMBERS)
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -1.5, 0.8, 2.0], dtype=torch.float64)
DESIRABLE = torch.tensor([True, False, True, True, False, False])
FEATURES, CLASSES = 6, 23
TARGET = (torch.arange(30).view(SEQUENCES, LENGTH) * 7 % CLASSES).masked_fill(~MASK, -100)


def of_sequences(log_probs):
    """One 0-d sum for each sequence."""
    return [log_probs[i, :length].sum() for i, length in enumerate(LENGTHS)]


def head(dtype=torch.float64, seed=0):
    """Hidden states (B, T, D) and a weight (C, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (SEQUENCES, LENGTH, FEATURES), (CLASSES, FEATURES)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden.to(dtype), weight.to(dtype)


def tokens_of(hidden, weight, target, temperature=1.0):
    """Log-probabilities and entropies with whole logits, 0 where nothing is predicted."""
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    of_label = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    counted = target != -100
    return of_label.where(counted, 0.0), (-(log_p.exp() * log_p).sum(-1)).where(counted, 0.0)


def step(loss, *leaves):
    """A loss of leaves, and their gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def assert_same_step(ours, plain, leaves, **tolerance):
    tolerance = tolerance or {"atol": 1e-12, "rtol": 1e-12}
    for a, b in zip(step(ours, *leaves), step(plain, *leaves)):
        torch.testing.assert_close(a.double(), b.double(), **tolerance)
