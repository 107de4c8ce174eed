"""A fused loss in training: the parameters that the plain loss gives."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fused_losses import fuse

SAMPLES, FEATURES, TASKS = 24, 6, 3


class Uncertainty(nn.Module):
    """A loss that is trained too."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight, self.log_variances = weight, nn.Parameter(torch.zeros(TASKS))

    def forward(self, predictions, targets):
        errors = (predictions - targets).square().mean(dim=0)
        return self.weight * (torch.exp(-self.log_variances) * errors + self.log_variances).sum()


def trained(loss, precision, steps):
    """Losses and parameters of a few batches under Accelerate, whose ``steps`` make one of the optimizer."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=steps)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(*(torch.randn(SAMPLES, n, generator=generator) for n in (FEATURES, TASKS)))
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, TASKS)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.1)
    model, loss, optimizer, loader = accelerator.prepare(model, loss, optimizer, DataLoader(data, 4))
    values = []
    for inputs, targets in loader:
        with accelerator.accumulate(model), accelerator.autocast():
            value = loss(model(inputs), targets)
            accelerator.backward(value)
            optimizer.step()
            optimizer.zero_grad()
        values.append(value.detach())
    return [*values, *model.parameters(), *loss.parameters()]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-6), ("bf16", 2e-3)])
def test_accelerate(fresh_accelerate, precision, tolerance, steps):
    plain, fused = Uncertainty(), fuse(Uncertainty(), strict=True)
    found, expected = (trained(loss, precision, steps) for loss in (fused, plain))
    for made, wanted in zip(found, expected, strict=True):
        assert made.dtype is wanted.dtype
        torch.testing.assert_close(made, wanted, rtol=tolerance, atol=tolerance)
    assert fused.log_variances.abs().min() > 1e-3 and fused.explain().reason is None
