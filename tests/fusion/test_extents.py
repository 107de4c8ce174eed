"""Sizes that are open: arithmetic on them is torch's, without torch."""

import itertools

import pytest
import torch

from fused_losses.fusion.extents import extent_of, number_of, product, quotient, same
from fused_losses.fusion.sizes import Assumptions
from fused_losses.fusion.tracing import trace


@pytest.fixture
def extents():
    assumptions = Assumptions()
    n, m = (assumptions.size("x", dimension, hint) for dimension, hint in enumerate((6, 35)))
    return [0, 1, 2, 6, n, m, n - 2, 2 * n, n * m, n * m - m, n // 4]


def test_arithmetic_is_that_of_torch(extents):
    for x, y in itertools.product(extents, repeat=2):
        assert same(extent_of(number_of(x) + number_of(y)), x + y)
        assert same(product([x, y]), x * y) and same(product([x, 2, y]), 2 * x * y)
        difference = x - y
        assert same(x, y) == (isinstance(difference, int) and difference == 0)


def test_quotients_are_whole_whatever_the_sizes_are(extents):
    for x, y in itertools.product(extents, repeat=2):
        whole = quotient(x, y)
        assert whole is None or same(whole * y, x)
    n, m = extents[4:6]
    for x, y in itertools.product(extents, (2, n, m, n * m)):
        assert same(quotient(x * y, y), x)
    assert same(quotient(n - 2, n - 2), 1) and same(quotient(0, n), 0)
    assert quotient(extents[-1], 2) is None and quotient(7, 2) is None and quotient(3, 0) is None


def test_equal_numbers_are_one_object(extents):
    n = extents[4]
    assert number_of(n - 1 + 1) is number_of(n) and number_of(n * 3 - n) is number_of(n + n)
    assert number_of(n - n + 3) == 3


def test_a_guard_is_kept_once():
    def loss(x):
        return x.sum() if x.shape[0] > 4 and x.shape[0] > 4 else x.mean()

    assumptions = Assumptions()
    trace(lambda given, tracer: loss(*given), [torch.ones(6)], assumptions, [False])
    assert len(assumptions.guards) == 1
