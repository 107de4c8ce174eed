"""The CUDA kernels between matrix products against fp64, on the CPU under sanitizers."""

import math
import random

import pytest
import torch
from emulator import DTYPES, Case, accumulate_dtype, assert_near, build, run

from fused_losses.reference.softmax import transform_logits


class Rows:
    """Rows of logits with labels, some of them another block's, and what is known of them in fp64."""

    def __init__(self, logits, labels, factors=None, softcap=None, temperature=1.0, seed=0, padding=0):
        self.logits, self.labels, self.factors = logits, labels, factors
        self.softcap, self.temperature, self.seed, self.padding = softcap, temperature, seed, padding
        self.accumulate = accumulate_dtype(logits.dtype)
        self.z = transform_logits(logits.double(), softcap, temperature)
        self.inside = (labels >= 0) & (labels < logits.shape[1])

    def statistics(self):
        """Maximum, log-sum, label's logit, gap and moment; then the predictions."""
        z = self.z
        maximum = z.amax(1, keepdim=True)
        below = maximum - z
        e = torch.exp(-below)
        moment = (e * below.masked_fill(e == 0, 0.0)).sum(1) / e.sum(1)
        label = z.gather(1, self.labels.where(self.inside, 0)[:, None])[:, 0].where(self.inside, 0.0)
        gap = torch.zeros_like(label) if self.factors is None else (self.factors.double() * below).sum(1)
        return torch.stack([maximum[:, 0], e.sum(1).log(), label, gap, moment]), z.argmax(1)

    def gradient(self, coefficients):
        excess, of_label, entropy, share = (c[:, None] for c in coefficients.double())
        log_p = torch.log_softmax(self.z, 1)
        p = log_p.exp()
        one_hot = torch.zeros_like(p)
        one_hot[self.inside, self.labels[self.inside]] = 1.0
        result = p * (excess + entropy * log_p.masked_fill(p == 0, 0.0)) + of_label * (p - one_hot)
        if self.factors is not None:
            result -= share * self.factors.double()
        slope = 1.0 if self.softcap is None else 1.0 - (self.z * self.temperature / self.softcap) ** 2
        return result * slope / self.temperature

    def case(self, is_gradient):
        case = Case(self.seed, max_blocks=3)
        case.integer(int(is_gradient))
        case.dtype(self.logits.dtype)
        rows, classes = self.logits.shape
        memory = self.logits.new_zeros(rows, classes + self.padding)[:, :classes].copy_(self.logits)
        case.integer(rows, classes, memory.stride(0))
        case.buffer(memory, self.padding % 3)
        case.buffer(self.labels)
        case.buffer(self.factors)
        case.real(self.softcap or 0.0, self.temperature)
        return case

    def statistics_case(self):
        case, rows = self.case(False), len(self.logits)
        case.buffer(torch.full((5, rows), math.nan, dtype=self.accumulate))
        case.buffer(torch.full((rows,), -7))
        return case

    def gradient_case(self, coefficients):
        case = self.case(True)
        case.buffer(self.statistics()[0].to(self.accumulate))
        case.buffer(coefficients)
        return case

    def values_of(self, memory):
        rows, classes = self.logits.shape
        return memory.as_strided((rows, classes), (classes + self.padding, 1))


def some_rows(dtype, seed):
    choose = random.Random(f"{dtype} {seed}")
    generator = torch.Generator().manual_seed(seed)
    rows, classes = choose.choice([1, 4, 7]), choose.choice([1, 2, 9, 31, 250, 1025, 4101])
    logits = (torch.randn(rows, classes, generator=generator) * 4).to(dtype)
    if choose.random() < 0.3:
        logits = logits.round()  # ties
    if classes > 2 and choose.random() < 0.3:
        logits[0, 1] = -math.inf
    labels = torch.randint(-1, classes + 1, (rows,), generator=generator)
    factors = torch.rand(classes, generator=generator).to(accumulate_dtype(dtype))
    return Rows(
        logits,
        labels,
        factors if choose.random() < 0.5 and torch.isfinite(logits).all() else None,
        choose.choice([None, None, 5.0]),
        choose.choice([1.0, 2.0]),
        seed,
        choose.choice([0, 3, 5]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype, tmp_path):
    problems = [some_rows(dtype, seed) for seed in range(30)]
    results = run(build("linear"), [p.statistics_case() for p in problems], tmp_path)
    for problem, result in zip(problems, results):
        expected, prediction = problem.statistics()
        rows = len(problem.logits)
        for name, ours, truth in zip(
            ["maximum", "log_sum", "label", "gap", "moment"], result[-2].view(5, rows), expected
        ):
            assert_near(ours, truth, problem.accumulate, (problem.seed, name))
        # In fp32, softcapped logits may tie that do not in fp64: then either is the prediction.
        chosen = problem.z.gather(1, result[-1][:, None])[:, 0]
        assert_near(chosen, problem.z.amax(1), problem.accumulate, (problem.seed, "prediction"))
        if problem.softcap is None:
            assert torch.equal(result[-1], prediction), problem.seed


def test_a_masked_beginning_leaves_the_entropy_right(tmp_path):
    logits = torch.full((2, 9000), -3e38)
    logits[:, 8500:] = torch.randn(2, 500)
    problem = Rows(logits, torch.tensor([8600, 8999]))
    (result,) = run(build("linear"), [problem.statistics_case()], tmp_path)
    for ours, truth in zip(result[-2].view(5, 2), problem.statistics()[0]):
        assert_near(ours, truth, torch.float32, "masked")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype, tmp_path):
    problems = [some_rows(dtype, 100 + seed) for seed in range(30)]
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(4, len(p.logits), generator=generator).to(p.accumulate) for p in problems]
    for table in tables[::2]:
        table[2] = 0.0
    for table in tables[::3]:
        table[:, 0] = 0.0  # nobody asks for this row
    cases = [p.gradient_case(table) for p, table in zip(problems, tables)]
    for problem, table, result in zip(problems, tables, run(build("linear"), cases, tmp_path)):
        ours, truth = problem.values_of(result[0]), problem.gradient(table)
        assert_near(ours, truth, problem.accumulate, problem.seed)
        if (table[:, 0] == 0).all():
            assert (ours[0] == 0).all()
        gaps = result[0].as_strided((len(ours) - 1, problem.padding), (ours.stride(0), 1), ours.shape[1])
        assert (gaps == 0).all()


def test_a_row_that_nobody_asks_for_may_hold_anything(tmp_path):
    logits = torch.tensor([[math.nan, math.inf, 1.0], [0.0, 1.0, 2.0]])
    problem = Rows(logits, torch.tensor([0, 1]))
    table = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    (result,) = run(build("linear"), [problem.gradient_case(table)], tmp_path)
    ours = problem.values_of(result[0])
    assert (ours[0] == 0).all() and ours[1].isfinite().all()
