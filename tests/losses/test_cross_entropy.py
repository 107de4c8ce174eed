"""Golden values of cross entropy: computed by hand or printed in the papers that defined the parts."""

import math

import pytest
import torch

from fused_losses.functional import cross_entropy

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("logits", "target", "options", "expected"),
    [
        # Equal logits: the loss is the entropy of a uniform guess.
        ([[0.0, 0.0]], [0], {}, LN2),
        ([[7.0] * 8], [5], {}, 3 * LN2),
        ([[0.0] * 50_257], [11], {}, math.log(50_257)),  # GPT-2 before training: 10.825
        # A logit of log 3 against 0: the probability is 3/4.
        ([[math.log(3), 0.0]], [0], {}, math.log(4 / 3)),
        ([[math.log(3), 0.0]], [1], {}, math.log(4)),
        # Szegedy et al. 2016, section 7: smoothing mixes the label with the uniform distribution.
        ([[math.log(3), 0.0]], [0], {"label_smoothing": 0.1}, 0.95 * math.log(4 / 3) + 0.05 * math.log(4)),
        # Chowdhery et al. 2022, section 5: 1e-4 log^2 Z beside the cross entropy.
        ([[math.log(3), 0.0]], [0], {"z_loss": 1e-4}, math.log(4 / 3) + 1e-4 * math.log(4) ** 2),
        # Gemma Team 2024, section 2: logits are capped at +-30; tanh(1) is 0.7616.
        ([[30.0, 0.0]], [1], {"softcap": 30.0}, math.log1p(math.exp(30 * math.tanh(1.0)))),
        # Hinton et al. 2015, section 2: a temperature of 2 takes the square root of the odds.
        ([[2 * math.log(3), 0.0]], [0], {"temperature": 2.0}, math.log(4 / 3)),
        # Two rows of which one is ignored: the mean is that of the other.
        ([[0.0, 0.0], [9.0, 1.0]], [1, -100], {}, LN2),
        # Weights 1 and 3 in a mean divide by 4.
        ([[0.0, 0.0], [math.log(3), 0.0]], [0, 1], {"weight": [1.0, 3.0]}, (LN2 + 3 * math.log(4)) / 4),
    ],
)
def test_values(logits, target, options, expected, backend, device):
    options = {k: torch.tensor(v, device=device) if isinstance(v, list) else v for k, v in options.items()}
    loss = cross_entropy(
        torch.tensor(logits, device=device), torch.tensor(target, device=device), backend=backend, **options
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gradient_is_probability_minus_target(backend, device):
    x = torch.tensor([[math.log(3), 0.0]], device=device, requires_grad=True)
    (g,) = torch.autograd.grad(cross_entropy(x, torch.tensor([0], device=device), backend=backend), x)
    torch.testing.assert_close(g, torch.tensor([[-0.25, 0.25]], device=device))


def test_gradient_of_the_z_loss(backend, device):
    """d/dx log^2 Z = 2 log Z p."""
    x = torch.tensor([[math.log(3), 0.0]], device=device, requires_grad=True)
    y = torch.tensor([0], device=device)
    plain, with_z = (torch.autograd.grad(cross_entropy(x, y, z_loss=z, backend=backend), x)[0] for z in (0.0, 0.5))
    torch.testing.assert_close(with_z - plain, math.log(4) * torch.tensor([[0.75, 0.25]], device=device))


def test_distillation_gradient_vanishes_at_the_teacher(backend, device):
    x = torch.randn(6, 9, device=device, dtype=torch.float64, requires_grad=True)
    teacher = torch.softmax(x.detach() / 2, 1)
    loss = cross_entropy(x, teacher, temperature=2.0, backend=backend)
    assert torch.autograd.grad(loss, x)[0].abs().max() < 1e-16
    entropy = -(teacher * teacher.log()).sum(1).mean()
    torch.testing.assert_close(loss, entropy)


@pytest.mark.parametrize("classes", [3, 20, 70, 300])  # few classes go by pixels, many by rows
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_made_with_the_loss_take_any_upstream(classes, smoothing, backend, device):
    x = torch.randn(50, classes, device=device, requires_grad=True)
    y = torch.randint(classes, (50,), device=device)
    y[::5] = -100
    options = {"label_smoothing": smoothing}
    rows = cross_entropy(x, y, reduction="none", backend=backend, **options)
    loss = cross_entropy(x, y, backend=backend, **options)
    for upstream in (1.0, 0.3, 0.0, -2.0, math.inf):  # the second one finds the gradient taken
        upstream = torch.tensor(upstream, device=device)
        (gradient,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        (expected,) = torch.autograd.grad(rows, x, (upstream / 40).expand(50), retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9, equal_nan=True)
        assert (gradient[::5] == 0).all()
