"""Gradients of the total variation distance against fp64, relative to themselves, on any backend."""

import torch

from fused_losses.functional import tvd_loss


def check_tvd_gradients(backend):
    """Neither a row's log-sum may round its probabilities, nor their sum the gradient of one that is nearly 1."""
    eps = torch.finfo(torch.float32).eps
    for which in range(2):
        assert tvd_errors(even_and_uneven(which), backend)[which] <= 2 * eps
    assert max(tvd_errors(confident(), backend)) <= 16 * eps


def even_and_uneven(even):
    """One model gives every class the same, with a logarithm as far from numbers of fp32 as can be."""
    logits = torch.zeros(2, 3100)
    logits[1 - even, ::2] = -1.0
    return logits[:1], logits[1:]


def confident():
    """Rows in which a model gives most to one class; the other agrees or does not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 64, 11, generator=generator, device="cpu") * 3
    return logits.to(torch.get_default_device()).unbind()


def tvd_errors(pair, backend):
    """The largest error of a row's gradient over the gradient's largest element, for student and teacher."""
    ours, exact = (
        torch.autograd.grad(tvd_loss(*leaves, reduction="sum", backend=name), leaves)
        for leaves, name in (
            ([t.clone().requires_grad_() for t in pair], backend),
            ([t.double().requires_grad_() for t in pair], "reference"),
        )
    )
    errors = ((a.double() - b).abs().amax(1) / b.abs().amax(1) for a, b in zip(ours, exact))
    return [error.max().item() for error in errors]
