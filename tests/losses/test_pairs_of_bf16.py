"""The product of bf16 that is added up in fp32, and the heads that take it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fused_losses.backends import choice
from fused_losses.functional import linear_cross_entropy

# Rows, and columns of either matrix: of one tile, of parts of tiles and blocks, and of more rows than one pass takes.
SHAPES = [(1, 1, 1), (2, 8, 32), (3, 65, 33), (480, 130, 70), (513, 9, 31), (1100, 64, 40), (5, 1, 100)]


def add_product(total, left, right, is_fresh):
    choice.resolve("cpu", torch.bfloat16, "cpp")
    torch.ops.fused_losses.add_product_(total, left, right, is_fresh)


def worst_excess(rows, left_columns, right_columns, is_fresh):
    """The largest error, in units of what one rounding to fp32 may be of the sum without signs."""
    left, right = torch.randn(rows, left_columns).bfloat16(), torch.randn(rows, right_columns).bfloat16()
    before = (
        torch.full((left_columns, right_columns), torch.nan) if is_fresh else torch.randn(left_columns, right_columns)
    )
    around = torch.full((left_columns + 2, right_columns), 7.0)
    total = around[1:-1].copy_(before)
    add_product(total, left, right, is_fresh)
    assert (around[0] == 7).all() and (around[-1] == 7).all()
    start = torch.zeros_like(before) if is_fresh else before
    exact = start.double() + left.double().t() @ right.double()
    budget = torch.finfo(torch.float32).eps * (start.abs() + left.abs().float().t() @ right.abs().float())
    return ((total.double() - exact).abs() / budget).max().item()


@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_of_bf16_is_a_sum_in_fp32(shape, is_fresh):
    assert worst_excess(*shape, is_fresh) < 2


@pytest.mark.parametrize("kind", ["default", "avx2", "avx512"])
def test_each_instruction_set(kind):
    script = """
from test_pairs_of_bf16 import SHAPES, worst_excess
print(max(worst_excess(*shape, is_fresh) for shape in SHAPES for is_fresh in (False, True)))
"""
    environment = {**os.environ, "FUSED_LOSSES_CPU_CAPABILITY": kind}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.path.dirname(__file__))
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2


def test_rows_that_lie_apart_and_no_rows():
    left, right = torch.randn(12, 20).bfloat16()[::2, :9], torch.randn(6, 50).bfloat16()[:, 3:36]
    total = torch.empty(9, 33)
    add_product(total, left, right, True)
    torch.testing.assert_close(total, left.float().t() @ right.float())
    add_product(total, left[:0], right[:0], False)
    torch.testing.assert_close(total, left.float().t() @ right.float())
    add_product(total, left[:0], right[:0], True)
    assert (total == 0).all()


def test_it_does_not_write_where_shapes_or_dtypes_differ():
    left, right, total = torch.zeros(4, 3).bfloat16(), torch.zeros(4, 5).bfloat16(), torch.zeros(3, 5)
    for arguments in (
        (total, left.float(), right),
        (total, left[:2], right),
        (total, left.t().contiguous().t(), right),
        (total.double(), left, right),
        (torch.zeros(5, 3).t(), left, right),
        (torch.zeros(3, 4), left, right),
    ):
        with pytest.raises(RuntimeError, match="must be"):
            add_product(*arguments, False)


def test_a_head_is_as_exact_with_it_as_with_products_of_torchs(monkeypatch):
    from fused_losses.losses.linear import _head

    calls, real = [], torch.ops.fused_losses.add_product_
    monkeypatch.setattr(torch.ops.fused_losses, "add_product_", lambda *a: calls.append(a) or real(*a))
    input, weight = torch.randn(96, 24).bfloat16(), torch.randn(700, 24).bfloat16()
    target = torch.randint(700, (96,))

    def gradient(dtype):
        leaf = weight.to(dtype).requires_grad_()
        loss = linear_cross_entropy(input.to(dtype), leaf, target, backend="cpp", max_workspace_mb=1.1)
        return torch.autograd.grad(loss, leaf)[0].double()

    exact, errors = gradient(torch.float64), {}
    for pairs in (False, True):
        monkeypatch.setattr(_head, "_multiplies_pairs", lambda pairs=pairs: pairs)
        errors[pairs] = (gradient(torch.bfloat16) - exact).norm() / exact.norm()
        assert len(calls) == 2 * pairs  # one for each chunk
    # What rounding the logits to bf16 leaves.
    assert errors[True] < min(1.05 * errors[False], 1e-2)
