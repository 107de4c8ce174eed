"""A small problem that tests train on, by a loop in plain torch and by learners."""

import miniai
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fused_losses.integrations.learner import DataLoaders, Learner

BOTH = pytest.mark.parametrize("kind", [Learner, miniai.Learner], ids=["ours", "miniai"])
FEATURES, CLASSES, SAMPLES, BATCH, RATE = 6, 4, 26, 4, 0.5


class Entropy(nn.Module):
    """A loss of the predictions alone."""

    def forward(self, predictions):
        return torch.special.entr(predictions.softmax(1)).sum(1).mean()


class Custom(nn.Module):
    """A loss as people write them, with a buffer and something to learn."""

    def __init__(self, learns=True):
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 2.0, CLASSES))
        self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=learns)

    def forward(self, predictions, targets):
        return F.cross_entropy(predictions * self.scale, targets, self.weight) + self.scale.square() / 10


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator))


def loaders(batch=BATCH):
    return DataLoaders(DataLoader(data(), batch), DataLoader(data(), batch))


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def trained(net, loss, epochs=1, groups=1, parameters=()):
    """The net, and the mean loss of every epoch, by a loop in plain torch; ``groups`` batches make a step."""
    optimizer, means = torch.optim.SGD([*net.parameters(), *parameters], RATE), []
    batches = list(loaders().train)
    for _ in range(epochs):
        total = 0.0
        for first in range(0, len(batches), groups):
            group = batches[first : first + groups]
            losses = [loss(net(inputs), targets) for inputs, targets in group]
            torch.stack(losses).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            total += sum(value.item() * len(targets) for value, (_, targets) in zip(losses, group))
        means.append(total / SAMPLES)
    return net, means


def assert_alike(net, expected, tolerance=1e-6):
    for made, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(made, wanted, rtol=tolerance, atol=tolerance)


def accuracy(predictions, targets):
    return predictions.argmax(1) == targets
