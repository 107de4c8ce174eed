"""Statistics of a head's logits that are never written: against fp64, where tiles end and where numbers are hard."""

import pytest
import torch
import triton.language as tl
from fused_losses.triton_kernels import head, linear

SHAPES = {"less_than_a_tile": (5, 8, 37), "several_tiles": (70, 40, 1000), "ragged": (130, 70, 129)}
OPTIONS = {"plain": (0.0, 1.0), "softcap": (4.0, 2.0)}


def made(rows, features, classes, dtype):
    torch.manual_seed(rows)
    labels = torch.randint(classes, (rows,))
    labels[0], labels[1] = -100, classes
    input, weight, bias = torch.randn(rows, features), torch.randn(classes, features), torch.randn(classes)
    return *(tensor.to(dtype) for tensor in (input, weight, bias)), labels


def expected(input, weight, bias, labels, *options):
    logits = torch.nn.functional.linear(input.float(), weight.float(), bias.float()).to(input.dtype).double()
    return linear.row_statistics(logits, labels, None, *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_statistics(shape, options, dtype):
    arguments = (*made(*shape, dtype), *options)
    statistics, prediction = head.head_statistics(*arguments)
    truth, places = expected(*arguments)
    torch.testing.assert_close(statistics.double(), truth, rtol=2e-6, atol=1e-5)  # of products in fp32
    assert torch.equal(prediction, places)


def logits_as_they_are(logits):
    """A head that makes given logits: of one-hot hidden states."""
    rows, classes = logits.shape
    return torch.eye(rows), logits.t().contiguous(), torch.zeros(classes)


def test_hard_rows():
    logits = torch.randn(5, 300)
    logits[0, 7] = 40.0  # p = 1 but for 1e-15
    logits[1] += 2.0**24
    logits[2] = 0.5
    logits[3] = -40.0
    logits[3, 290] = 40.0
    logits[4, 130:] = -3e38
    labels = torch.tensor([7, 3, 299, 290, 4])
    arguments = (*logits_as_they_are(logits), labels, 0.0, 1.0)
    statistics, prediction = head.head_statistics(*arguments)
    truth, places = expected(*arguments)
    for row in range(len(logits)):
        torch.testing.assert_close(statistics[:, row].double(), truth[:, row], rtol=1e-5, atol=0.0)
    assert torch.equal(prediction, places)


def test_a_masked_beginning_leaves_the_entropy_right():
    """Logits of -3e38 before any others, in blocks of their own."""
    logits = torch.full((1, 9000), -3e38)
    logits[:, 8500:] = torch.randn(500)
    labels = torch.tensor([8600])
    truth, _ = linear.row_statistics(logits.double(), labels, None, 0.0, 1.0)
    written, _ = linear.row_statistics(logits, labels, None, 0.0, 1.0)
    unwritten, _ = head.head_statistics(torch.zeros(1, 4), torch.zeros(9000, 4), logits[0], labels, 0.0, 1.0)
    for ours in (written, unwritten):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_infinities_and_nan_are_those_of_the_written_logits():
    bias = torch.randn(4, 200)
    bias[0, 150], bias[1, 3], bias[2] = float("inf"), float("nan"), float("-inf")
    bias[3, :140] = float("-inf")
    for row in bias:
        arguments = torch.zeros(1, 16), torch.zeros(200, 16), row, torch.tensor([5]), 0.0, 1.0
        statistics, _ = head.head_statistics(*arguments)
        truth, _ = expected(*arguments)
        torch.testing.assert_close(statistics[1].double(), truth[1], equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("programs", [1, 3, 10_000])
def test_segments_do_not_matter(programs, monkeypatch):
    monkeypatch.setattr(head, "PROGRAMS", programs)
    test_statistics(SHAPES["several_tiles"], OPTIONS["softcap"], torch.float32)


def test_a_planted_fault_is_seen(monkeypatch):
    """A merge that forgets how far the maximum has moved."""
    monkeypatch.setattr(head, "merged", head.merged.__class__(forgetful))
    with pytest.raises(AssertionError):
        test_statistics(SHAPES["several_tiles"], OPTIONS["plain"], torch.float32)


def forgetful(maximum, top, rest, moment, maximum_2, top_2, rest_2, moment_2):
    return tl.maximum(maximum, maximum_2), top + top_2, rest + rest_2, moment + moment_2
