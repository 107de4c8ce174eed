"""The bytes that explain() counts, against those counted by hand."""

import torch
import torch.nn.functional as F

from fused_losses import fuse
from fused_losses.testing import peak_bytes


def explained(loss, *tensors, wanted=(0,)):
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    return fuse(loss, strict=True).explain(*leaves)


def test_squares():
    found = explained(lambda x, t: (x - t).square().mean(), torch.randn(1000), torch.randn(1000))
    x, t = 4000, 4000
    assert found.forward.least == x + t + 4 + x  # the gradient is made with the loss
    assert found.forward.moved == found.forward.least + 4 + 4  # the sum, before it is divided
    first, _ = found.forward.steps
    assert sorted(first.reads.values()) == [x, t] and sorted(first.writes.values()) == [4, x]
    assert found.backward.least == found.backward.moved == 0 and list(found.saved.values()) == [x]
    assert not found.externs and (found.language, found.device, found.reason) == ("C++", "cpu", None)


def test_squares_of_many():
    """An upstream gradient for each element waits for backward."""
    found = explained(lambda x, t: (x - t).square(), torch.randn(1000), torch.randn(1000))
    x, t, each = 4000, 4000, 4000
    assert found.forward.least == found.forward.moved == x + t + each
    assert found.backward.least == found.backward.moved == x + t + each + x
    (only,) = found.backward.steps
    assert sorted(only.reads.values()) == [each, t, x] and list(only.writes.values()) == [x] and only.operator is None
    assert not found.saved


def test_cross_entropy():
    found = explained(F.cross_entropy, torch.randn(64, 100), torch.randint(100, (64,)))
    logits, labels, row, value, count = 4 * 64 * 100, 8 * 64, 4 * 64, 4, 8
    first, *_, gradient = found.forward.steps
    assert sorted(first.reads.values()) == [labels, logits]
    assert sorted(first.writes.values()) == [value, count, row, row]  # maxima, sums of exponentials
    assert sorted(gradient.reads.values()) == [count, row, row, labels, logits]
    assert found.forward.least == logits + labels + value + logits
    assert found.forward.moved == first.moved + value + count + value + gradient.moved
    assert list(found.saved.values()) == [logits]


def test_rows_of_cross_entropy():
    found = explained(lambda x, t: F.cross_entropy(x, t, reduction="none"), torch.randn(64, 100), torch.arange(64))
    logits, labels, row = 4 * 64 * 100, 8 * 64, 4 * 64
    assert sorted(found.saved.values()) == [row, row]
    assert found.forward.least == logits + labels + row
    assert found.backward.least == logits + labels + row + logits
    assert found.backward.moved == found.backward.least + 2 * row


def test_a_part_that_is_read_counts_alone():
    with torch.no_grad():
        found = explained(lambda x, i: x.gather(1, i).exp().sum(), torch.randn(64, 100), torch.randint(100, (64, 1)))
    assert found.forward.moved == found.forward.least == 4 * 64 + 8 * 64 + 4


def test_what_is_kept_between_passes():
    """In fp32, where a loss of bf16 reads it at many places."""

    def blurred(x):
        hot = torch.tanh(x * 2).exp().sigmoid()
        return (hot[2:] * hot[1:-1] * hot[:-2] + hot[2:].sin()).sum()

    loss, x = fuse(blurred, strict=True), torch.randn(9999).bfloat16()
    with torch.no_grad():
        found = loss.explain(x)
        assert found.forward.least == 2 * 9999 + 2 and found.forward.moved == found.forward.least + 2 * 4 * 9999
        assert found.backward is None
        assert 4 * 9999 <= peak_bytes(lambda: loss(x)) < 4 * 9999 + 1024


def test_what_torch_runs():
    def loss(x, y):
        return (x @ y).flatten().exp()

    found = explained(loss, torch.randn(8, 4), torch.randn(4, 16), wanted=(0, 1))
    x, y, product = 4 * 8 * 4, 4 * 4 * 16, 4 * 8 * 16
    assert found.externs == ("aten.mm.default",) and sum(found.saved.values()) == product
    operator = found.forward.steps[0]
    assert operator.operator == "aten.mm.default" and operator.moved == x + y + product
    assert found.forward.least == x + y + product and found.forward.moved == x + y + 3 * product
    assert found.backward.least == x + y + product + x + y


def test_what_has_been_read_is_let_go_of():
    """At no time is more there than what an operator gives, and what it takes."""

    def again_and_again(x, y):
        for _ in range(6):
            x = torch.sin(x @ y)
        return x.sum()

    x, y = torch.randn(256, 64), torch.randn(64, 64)
    loss = fuse(again_and_again, strict=True)
    loss(x, y)
    assert peak_bytes(lambda: loss(x, y)) < 2.5 * x.nbytes


def test_the_last_call_counts():
    loss = fuse(lambda x: x.square().sum(), strict=True)
    with torch.no_grad():
        for n in (10, 5000):
            explanation = loss.explain(torch.ones(n))
            assert explanation.forward.moved == 4 * n + 4
    assert len(loss._fusion._patterns) == 1
    lines = str(explanation).splitlines()
    assert lines[:2] == ["C++ on cpu", "forward: moves 19.54 KiB; inputs and outputs once are 19.54 KiB"]
    assert len(lines) == 4 and "reads input0 19.53 KiB; writes f0 4 B" in lines[2]
