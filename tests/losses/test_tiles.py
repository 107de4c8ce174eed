"""Losses by tiles of rows and classes: what is known of parts is joined to what is known of all."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_losses.functional import linear_cross_entropy, linear_log_probs
from fused_losses.losses.linear import _tiles
from fused_losses.losses.linear._head import Head
from fused_losses.losses.linear._statistics import joined
from fused_losses.losses.linear._tiles import VECTOR, Tiling
from fused_losses.testing import peak_bytes

INFINITE = float("-inf")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 5000), st.integers(1, 200_000), st.sampled_from([None, 1e-4, 1e-3, 0.1, 3.0, 100.0]))
def test_tiles_fit_and_cover_everything(rows, classes, megabytes):
    head = Head(torch.empty(classes, 2, dtype=torch.bfloat16, device="cpu"), None)
    tiling = Tiling.of(rows, head, megabytes)
    for parts, count in zip(tiling, (rows, classes)):
        assert [part.start for part in parts] == [0, *[part.stop for part in parts[:-1]]][: len(parts)]
        assert sum(part.stop - part.start for part in parts) == count
        assert all((part.stop - part.start) % VECTOR == 0 or part.stop - part.start < VECTOR for part in parts[:-1])
    largest = math.prod(max([part.stop - part.start for part in parts], default=0) for parts in tiling)
    assert largest <= max(_tiles.MOST_LOGITS if megabytes is None else megabytes * 2**20 / 2, VECTOR)


def rows_of_logits():
    """Peaked and flat ones, ties, parts and rows of nothing but -inf, and NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 100, generator=generator, dtype=torch.float64) * 3
    logits[1] = 0.0
    logits[2, [40, 70]] = 50.0
    logits[3, 20:60] = INFINITE
    logits[4] = INFINITE
    logits[5, 50] = float("nan")
    logits[6] = torch.linspace(-1e4, 1e4, 100, dtype=torch.float64)
    logits[7, 0], logits[7, 1:] = 20.0, INFINITE
    logits[8] += 2.0**24
    logits[9, :50] = float("nan")
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cuts", [[0], [0, 50], [0, 16, 32, 48, 64, 80, 96], [0, 1, 99]])
def test_statistics_of_parts_are_joined(cuts, dtype):
    logits, labels = rows_of_logits().to(dtype), torch.tensor([0, 99, 70, 30, 5, 3, 99, 0, 50, 99])
    row_statistics = torch.ops.fused_losses.row_statistics
    ends = [*cuts[1:], logits.shape[1]]
    parts = [
        row_statistics(logits[:, a:b].contiguous(), labels - a, None, 0.0, 1.0) for a, b in zip(cuts, ends, strict=True)
    ]
    statistics, prediction = joined(parts, cuts, torch.zeros(len(cuts), dtype=torch.float64))
    exact = logits.double()
    log_p = exact.log_softmax(1)
    maximum, _, label_logit, _, _ = statistics
    torch.testing.assert_close(
        maximum[:9], logits[:9].masked_fill(logits[:9].isnan(), INFINITE).amax(1), rtol=0, atol=0
    )
    torch.testing.assert_close(label_logit, logits.gather(1, labels[:, None])[:, 0], rtol=0, atol=0, equal_nan=True)
    log_sum = torch.logsumexp(exact - maximum[:, None], 1).to(dtype)
    near = {"rtol": 1e-6 if dtype is torch.float32 else 1e-14, "atol": 1e-7 if dtype is torch.float32 else 1e-14}
    usual = torch.tensor([0, 1, 2, 3, 6, 7, 8])
    torch.testing.assert_close(statistics[1][usual], log_sum[usual], **near)
    entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(1).to(dtype)
    torch.testing.assert_close((statistics[1] + statistics[4])[usual], entropy[usual], **near)
    assert statistics[1][[4, 5, 9]].isnan().all()
    assert prediction[usual].tolist() == exact[usual].argmax(1).tolist()


def drawn(ignored):
    """Hidden states, a head and its bias; labels, of which some are ignored; upstream gradients of three values."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((80, 8), (100, 8), (100,))]
    labels, upstream = torch.randint(100, (80,), generator=generator), torch.randn(3, 80, generator=generator)
    labels[torch.randperm(80, generator=generator)[:ignored]] = -100
    return [leaf.requires_grad_() for leaf in leaves], labels, upstream.double()


def tokens_of(hidden, head, labels, **options):
    return torch.stack(tuple(linear_log_probs(hidden, head, labels, **options)))


def recomputed(hidden, head, labels, **options):
    return linear_cross_entropy(hidden, head, labels, recompute=True, label_smoothing=0.1, z_loss=1e-3, **options)


@pytest.mark.parametrize("loss", [tokens_of, recomputed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_logits_nor_a_sum_beside_the_gradient_are_in_memory(loss, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 64, generator=generator).to(dtype).requires_grad_() for n in (512, 40_000))
    labels = torch.randint(40_000, (512,), generator=generator)

    def step():
        value = loss(hidden, head, labels, max_workspace_mb=1.0)
        return torch.autograd.grad(value.sum(), (hidden, head))

    step()
    assert peak_bytes(step, "cpu") < hidden.nbytes + head.nbytes + (4 << 20)


OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "weight": True, "sample_weight": True},
    {"weight": True, "z_loss": 0.1},
    {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "temperature": 2.0, "return_stats": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "none")
@pytest.mark.parametrize("ignored", [0, 5, 70, 80])
@pytest.mark.parametrize("by_rows", [{"reduction": "none"}, {"reduction": "sum", "recompute": True}])
def test_cross_entropy_of_every_tiling_is_that_of_the_reference(options, ignored, by_rows):
    leaves, labels, upstream = drawn(ignored)
    given = {"weight": torch.linspace(0, 2, 100).double(), "sample_weight": torch.linspace(0, 3, 80).double()}
    options = {name: given[name] if value is True and name in given else value for name, value in options.items()}
    results = []
    for backend, megabytes in (("reference", None), *(("cpp", each) for each in (None, 1e-2, 1e-3, 1e-6))):
        call = {"linear_bias": leaves[2], "max_workspace_mb": megabytes, "backend": backend, **options, **by_rows}
        value = linear_cross_entropy(*leaves[:2], labels, **call)
        loss, *statistics = value if isinstance(value, tuple) and "return_stats" in options else (value,)
        gradients = torch.autograd.grad((loss * upstream[0]).sum(), leaves)
        results.append((loss, *(each.double() for of_rows in statistics for each in of_rows), gradients))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


@pytest.mark.parametrize("ignored", [0, 5, 70, 80])
@pytest.mark.parametrize("biased", [False, True])
def test_every_tiling_gives_the_same(ignored, biased):
    """Where few rows, many or all are ignored; each of what is needed alone."""
    leaves, labels, upstream = drawn(ignored)
    leaves, results = leaves[: 3 if biased else 2], []
    for megabytes in (None, 1e-2, 1e-3, 1e-6):
        bias = {"linear_bias": leaves[2]} if biased else {}
        tokens = torch.stack(tuple(linear_log_probs(*leaves[:2], labels, **bias, max_workspace_mb=megabytes)))
        alone = [torch.autograd.grad((tokens * upstream).sum(), leaf, retain_graph=True) for leaf in leaves]
        results.append((tokens, *alone, torch.autograd.grad((tokens * upstream).sum(), leaves)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)
