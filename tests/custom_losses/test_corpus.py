"""The plain losses are right: every gradient is that of finite differences."""

import pytest
import torch
from torch import nn

from . import CORPUS, classification, guidance, imbalance, ordinal, segmentation
from .generative import VectorQuantizationLoss
from .probabilistic import BetaNLLLoss

# A gradient that is stopped on purpose is none that finite differences could find: test_golden.py has closed forms.
DIFFERENTIABLE = [entry for entry in CORPUS if entry.loss not in (BetaNLLLoss, VectorQuantizationLoss)]


OF_LOGITS = [entry for group in (classification, imbalance, ordinal, segmentation, guidance) for entry in group.LOSSES]


def each(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def test_the_corpus_is_large_and_says_where_each_loss_comes_from():
    assert len({entry.name for entry in CORPUS}) == len(CORPUS) >= 45
    for entry in CORPUS:
        line, *rest = entry.loss.__doc__.split("\n\n")
        assert line.endswith(".") and len(rest) == 2 and rest[1].strip().startswith("Source: "), entry.name


@each(DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(entry):
    """Of every floating argument and every parameter."""
    for sample in entry.samples():
        loss = entry.build()
        parameters = dict(loss.double().named_parameters()) if isinstance(loss, nn.Module) else {}
        floating = [t.requires_grad_() for t in sample.tensors if t.is_floating_point()]

        def value(*moved, loss=loss, sample=sample, parameters=parameters):
            rest = iter(moved)
            arguments = tuple(next(rest) if t.is_floating_point() else t for t in sample.tensors)
            if not parameters:
                return loss(*arguments)
            return torch.func.functional_call(loss, dict(zip(parameters, rest)), arguments)

        assert torch.autograd.gradcheck(value, (*floating, *parameters.values()))


@each(OF_LOGITS)
@pytest.mark.parametrize("factor", [1000.0, 0.0])
def test_confident_and_equal_logits_stay_finite(entry, factor):
    """Where probabilities are exactly 0 and 1, and where all classes tie."""
    for sample in entry.samples():
        first, *others = sample.to(torch.float32).tensors
        logits = (first * factor).requires_grad_()
        value = entry.build()(logits, *others)
        assert value.isfinite() and torch.autograd.grad(value, logits)[0].isfinite().all()


@each(CORPUS)
def test_bench_inputs(entry):
    """A scale makes them small; the loss and the gradients that training takes exist and are finite."""
    tensors = entry.bench_inputs(1e-7)
    wanted = [tensors[i] for i in entry.gradients]
    assert all(t.dtype is torch.float32 and t.is_leaf and t.requires_grad for t in wanted)
    value = entry.build()(*tensors)
    assert value.dtype is torch.float32 and value.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), wanted))
