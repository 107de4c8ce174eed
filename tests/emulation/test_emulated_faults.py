"""Faults planted in the CUDA kernels, each of which the emulation must catch and name."""

import re

import pytest
import torch
from emulator import build, changed_tree, run
from test_emulated_linear import Rows
from test_emulated_pointwise import BACKWARD, FORWARD, single
from test_emulated_softmax import Problem, far_apart

LAUNCH = "csrc/common/launch.cuh"
MEMORY = "csrc/cuda/memory.cuh"
POINTWISE = "csrc/cuda/pointwise.cuh"
WAYS = "csrc/cuda/softmax_ways.cuh"
SOFTMAX = "csrc/cuda/softmax.cuh"
LINEAR = "csrc/cuda/linear.cuh"


def pointwise_cases():
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(6001, generator=generator) for _ in range(2))
    problem = single("mse", x, t)
    problem.max_blocks = 3
    values = single("mse", x, t, "none")
    return [problem.case(FORWARD), values.case(FORWARD, 3), problem.case(BACKWARD)]


def pointwise_is_right(results):
    x, t = results[0][:2]
    assert (results[0][-1] - (x - t).square().mean()).abs() < 1e-5
    torch.testing.assert_close(results[1][-1], (x - t).square())
    torch.testing.assert_close(results[2][-2], 2 * (x - t) / 6001)


def softmax_problems():
    generator = torch.Generator().manual_seed(0)
    problems = [
        Problem(
            torch.randn(6, classes, generator=generator),
            torch.randint(classes, (6,), generator=generator),
            layout,
            seed=seed,
            max_blocks=2,
        )
        for seed, (layout, classes) in enumerate(
            [("rows", 1501), ("padded", 1501), ("rows", 100), ("pixels", 100), ("pixels", 7)]
        )
    ]
    return [*problems, far_apart()]


def softmax_cases():
    return [problem.forward() for problem in softmax_problems()]


def softmax_is_right(results):
    for problem, result in zip(softmax_problems(), results):
        torch.testing.assert_close(result[-2].double().reshape(()), problem.truth()[0], rtol=1e-5, atol=0)


def linear_problem():
    """Two places of the maximum, of which different threads find the later one first."""
    logits = torch.randn(3, 1501, generator=torch.Generator().manual_seed(0))
    logits[:, 700] = logits[:, 301] = 5.0
    return Rows(logits, torch.tensor([0, 1500, 700]), torch.rand(1501, generator=torch.Generator().manual_seed(1)))


def linear_cases():
    table = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    return [linear_problem().statistics_case(), linear_problem().gradient_case(table)]


def linear_is_right(results):
    problem = linear_problem()
    statistics, prediction = problem.statistics()
    torch.testing.assert_close(results[0][-2].view(5, 3).double(), statistics, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][-1], prediction)
    table = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    ours = problem.values_of(results[1][0]).double()
    torch.testing.assert_close(ours, problem.gradient(table), rtol=1e-4, atol=1e-7)


FAMILIES = {
    "linear": (linear_cases, linear_is_right),
    "pointwise": (pointwise_cases, pointwise_is_right),
    "softmax": (softmax_cases, softmax_is_right),
}
WRONG = "Tensor-likes|Scalars are not close|assert"
# family, file, what is replaced, by what, how the fault shows
FAULTS = {
    "no barrier before the parts are read": (
        "pointwise",
        LAUNCH,
        "  __syncthreads();\n  value = parts[0];",
        "  value = parts[0];",
        WRONG,
    ),
    "no barrier before the parts are written again": (
        "softmax",
        LAUNCH,
        "  __syncthreads();  // the memory may be used again\n",
        "",
        WRONG,
    ),
    "a barrier that some threads skip": (
        "pointwise",
        LAUNCH,
        "  __syncthreads();\n  value = parts[0];",
        "  if (threadIdx.x < 100) __syncthreads();\n  value = parts[0];",
        "threads at different barriers",
    ),
    "a return before a barrier": (
        "pointwise",
        LAUNCH,
        "  V* parts = shared_memory<V>();",
        "  if (threadIdx.x >= 224) return value;\n  V* parts = shared_memory<V>();",
        "others have returned",
    ),
    "a shuffle that some lanes skip": (
        "pointwise",
        LAUNCH,
        "offset > 0; offset /= 2) value.merge",
        "offset > (threadIdx.x % 2); offset /= 2) value.merge",
        "deadlock|names a lane that has left|different warp operations",
    ),
    "a reduction that loses a warp": (
        "softmax",
        LAUNCH,
        "i < kThreads / kWarp; ++i) value.merge",
        "i < kThreads / kWarp - 1; ++i) value.merge",
        WRONG,
    ),
    "too little shared memory": (
        "pointwise",
        LAUNCH,
        "sizeof(V) * (kThreads / kWarp)",
        "sizeof(V) * (kThreads / kWarp - 1)",
        "AddressSanitizer: use-after-poison",
    ),
    "a step past the end of dense elements": (
        "pointwise",
        POINTWISE,
        "i < p.numel - packed; i += step",
        "i <= p.numel - packed; i += step",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "packs at addresses that are not aligned": (
        "pointwise",
        POINTWISE,
        "if (aligned && head < p_.numel) access.head = head",
        "if (aligned && head < p_.numel) access.head = 0",
        "misaligned address",
    ),
    "offsets of 32 bits": (
        "softmax",
        SOFTMAX,
        "at.logits += i * p.logits_layout.rows[d];",
        "at.logits += static_cast<int>(i * p.logits_layout.rows[d]);",
        "AddressSanitizer",
    ),
    "one class too many in a row": (
        "softmax",
        WAYS,
        "for (int64_t c = tail + lane(); c < classes; c += kThreadsPerRow)",
        "for (int64_t c = tail + lane(); c <= classes; c += kThreadsPerRow)",
        "AddressSanitizer: heap-buffer-overflow|Tensor-likes|Scalars are not close",
    ),
    "a maximum that does not rescale": (
        "softmax",
        SOFTMAX,
        "rest = (top + rest) * exp_nonpositive(maximum - larger);",
        "rest = top + rest;",
        WRONG,
    ),
    "a last tile without a bound": (
        "softmax",
        SOFTMAX,
        "    if (!inside || Way::lane() != 0) continue;",
        "    if (Way::lane() != 0) continue;",
        "AddressSanitizer|Tensor-likes|Scalars are not close",
    ),
    "a moment that does not follow its maximum": (
        "linear",
        LINEAR,
        "(moment + step * total) * shrunk",
        "moment * shrunk",
        WRONG,
    ),
    "a later place of the maximum": ("linear", LINEAR, "other.first < first", "other.first > first", WRONG),
    "a label's gradient for everybody": (
        "linear",
        MEMORY,
        "k == place ? value :",
        "k >= place ? value :",
        WRONG,
    ),
    "an entropy without its logarithm": (
        "linear",
        LINEAR,
        "p > A(0) ? entropy * log_p : A(0)",
        "p > A(0) ? entropy : A(0)",
        WRONG,
    ),
    "a wrong number of shares of a row": (
        "softmax",
        WAYS,
        "for (int i = 1; i < kSplit; ++i)",
        "for (int i = 2; i < kSplit; ++i)",
        WRONG,
    ),
}


def only_mse(tree):
    """One formula instead of all: a fault of the kernels shows in any."""
    names = tree / "csrc/formulas/pointwise_names.h"
    names.write_text(
        re.sub(
            r"^  X\((?!MSE,).*\n",
            "",
            names.read_text().replace('"mse")                        \\', '"mse")'),
            flags=re.M,
        )
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault, tmp_path):
    family, file, old, new, diagnosis = FAULTS[fault]
    tree = changed_tree(tmp_path / "tree", file, old, new)
    only_mse(tree)
    cases, check = FAMILIES[family]
    with pytest.raises((RuntimeError, AssertionError), match=diagnosis):
        check(run(build(family, tree), cases(), tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_fault_nothing_is_caught(family, tmp_path):
    cases, check = FAMILIES[family]
    check(run(build(family), cases(), tmp_path))
