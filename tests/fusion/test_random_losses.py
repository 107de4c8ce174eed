"""Losses drawn at random: value and gradients agree with autograd's, in programs and, for a few, in kernels."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_losses import LAST, SHAPES, STEPS, drawn, pair
from test_lowering import check

from fused_losses import fuse


@settings(max_examples=400, deadline=None, derandomize=True)
@given(STEPS, st.sampled_from(list(LAST)), SHAPES)
def test_programs(steps, last, shape):
    x, y = pair(shape)
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    influences = torch.autograd.grad(drawn(steps, last)(*leaves).sum(), leaves, allow_unused=True)
    check(drawn(steps, last), x, y, wanted=tuple(i for i, g in enumerate(influences) if g is not None))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(STEPS, st.sampled_from(list(LAST)), SHAPES, SHAPES)
def test_kernels(each_device, steps, last, shape, other):
    plain = drawn(steps, last)
    fused = fuse(plain, strict=True)
    for sizes in (shape, other):
        results = []
        for loss in (plain, fused):
            leaves = [t.requires_grad_() for t in pair(sizes, each_device)]
            value = loss(*leaves)
            results.append((value, torch.autograd.grad(value.square().sum(), leaves, allow_unused=True)))
        torch.testing.assert_close(*results, equal_nan=True)
