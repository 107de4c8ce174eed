"""The pointwise CUDA kernels against the reference in fp64, on the CPU."""

import random

import pytest
import torch
from emulator import DTYPES, Case, accumulate_dtype, assert_near, build, run

from fused_losses.reference import pointwise as reference

# The reference's arguments, then the kernels' a and b.
FORMULAS = {
    "mse": (reference.mse, {}, 0.0, 0.0),
    "l1": (reference.l1, {}, 0.0, 0.0),
    "smooth_l1": (reference.smooth_l1, {"beta": 0.5}, 0.5, 0.0),
    "huber": (reference.huber, {"delta": 0.75}, 0.75, 0.0),
    "log_cosh": (reference.log_cosh, {}, 0.0, 0.0),
    "charbonnier": (reference.charbonnier, {"eps": 1e-3}, 1e-3, 0.0),
    "bce": (reference.bce, {}, 0.0, 0.0),
    "bce_with_logits": (reference.bce_with_logits, {}, 0.0, 0.0),
    "sigmoid_focal": (reference.sigmoid_focal, {"alpha": 0.3, "gamma": 1.5}, 0.3, 1.5),
    "sigmoid_focal_2": (reference.sigmoid_focal, {"alpha": -1.0, "gamma": 2.0}, -1.0, 2.0),
    "kl_div": (reference.kl_div, {}, 0.0, 0.0),
    "kl_div_log_target": (reference.kl_div_log_target, {}, 0.0, 0.0),
}
# Each is how a tensor of 2 x 3 x n comes to be, from random numbers.
LAYOUTS = {
    "dense": lambda make, n: make(2, 3, n),
    "shifted": lambda make, n: make(6 * n + 1)[1:].view(2, 3, n),
    "transposed": lambda make, n: make(n, 3, 2).permute(2, 1, 0),
    "gaps": lambda make, n: make(3, 3, 2 * n)[:2, :, ::2],
    "column": lambda make, n: make(n).expand(2, 3, n),
    "row": lambda make, n: make(2, 3, 1).expand(2, 3, n),
    "number": lambda make, n: make(()).expand(2, 3, n),
}
FORWARD, BACKWARD, WITH_GRADIENTS = range(3)


class Problem:
    """Tensors of one case, as both the reference and the kernels take them."""

    def __init__(self, formula, dtype, seed):
        choose = random.Random(f"{formula} {dtype} {seed}")
        generator = torch.Generator().manual_seed(seed)
        n = choose.choice([1, 3, 5, 43, 172, 501])
        flat = choose.random() < 0.6
        self.formula, self.dtype, self.seed = formula, dtype, seed
        self.accumulate = accumulate_dtype(dtype)
        self.reduction = choose.choice(["mean", "sum", "none"])
        self.out_dtype = choose.choice([dtype, self.accumulate, *DTYPES])
        self.max_blocks = choose.choice([1, 2, 7])
        probabilities = formula in ("bce", "bce_with_logits", "sigmoid_focal", "sigmoid_focal_2", "kl_div")

        def tensor(layouts, of_dtype, unit=False, scale=2.0):
            def make(*shape):
                if unit:
                    return (torch.rand(*shape, generator=generator) * 0.98 + 0.01).to(of_dtype)
                return (torch.randn(*shape, generator=generator) * scale).to(of_dtype)

            return LAYOUTS[choose.choice(layouts)](make, n)

        main = ["dense", "shifted"] if flat else list(LAYOUTS)
        factors = ["dense", "shifted", "number"] if flat else list(LAYOUTS)
        self.input = tensor(main, dtype, unit=formula == "bce")
        # An exponential of the target, larger, would leave fp16.
        scale = 0.5 if formula == "kl_div_log_target" else 2.0
        self.target = tensor(main, dtype, unit=probabilities, scale=scale)
        self.weight = tensor(factors, choose.choice(DTYPES)) if choose.random() < 0.5 else None
        self.pos_weight = None
        if formula == "bce_with_logits" and choose.random() < 0.5:
            self.pos_weight = tensor(factors, choose.choice(DTYPES), unit=True)
        self.upstream = tensor(factors, choose.choice(DTYPES))
        if self.reduction != "none":
            self.upstream = self.upstream.reshape(-1)[0].clone()

    def truth(self):
        function, options, _, _ = FORMULAS[self.formula]
        wide = [None if t is None else t.double() for t in (self.input, self.target, self.weight, self.pos_weight)]
        x, t = wide[0].requires_grad_(), wide[1].requires_grad_()
        if self.pos_weight is not None:
            options = {**options, "pos_weight": wide[3]}
        values = function(x, t, wide[2], reduction="none", **options)
        loss = reference.reduce(values, None, self.reduction)
        gradients = torch.autograd.grad(loss, (x, t), self.upstream.double())
        return loss.detach(), *gradients

    def case(self, direction, misalignment=0):
        x = self.input
        case = Case(self.seed, self.max_blocks)
        case.integer(direction)
        case.text(self.formula)
        case.integer(x.ndim)
        case.padded(x.shape)
        case.integer(x.numel())
        case.real(*FORMULAS[self.formula][2:])
        case.integer(int(self.reduction != "none"))
        case.real(float(x.numel()) if self.reduction == "mean" else 1.0)
        for operand in (x, self.target, self.weight, self.pos_weight, self.upstream if direction == BACKWARD else None):
            case.dtype(torch.float32 if operand is None else operand.dtype)
            case.padded([] if operand is None else operand.stride())
            # Views start where their slice does: not at an aligned address.
            shift = 0 if operand is None else (operand.storage_offset() + misalignment) % 16
            case.buffer(operand, shift)
        if direction != FORWARD:
            case.buffer(torch.full(x.shape, float("nan"), dtype=self.dtype), misalignment)
            case.buffer(torch.full(x.shape, float("nan"), dtype=self.dtype), misalignment)
        if direction != BACKWARD:
            case.dtype(self.out_dtype)
            shape = x.shape if self.reduction == "none" else ()
            case.buffer(torch.full(shape, float("nan"), dtype=self.out_dtype), misalignment)
        return case


@pytest.fixture(scope="module")
def program():
    return build("pointwise")


@pytest.mark.parametrize("formula", FORMULAS)
def test_matches_reference(program, formula, tmp_path):
    problems = [Problem(formula, dtype, seed) for dtype in DTYPES for seed in range(14)]
    cases = [p.case(direction, p.seed % 3) for p in problems for direction in (FORWARD, BACKWARD)]
    results = iter(run(program, cases, tmp_path))
    for p in problems:
        what = (formula, p.dtype, p.seed, p.reduction)
        loss, input_gradient, target_gradient = p.truth()
        assert_near(next(results)[-1], loss.reshape(-1), p.accumulate, ("loss", *what))
        *_, ours, of_target = next(results)
        assert_near(ours, input_gradient.reshape(-1), p.accumulate, ("input gradient", *what))
        assert_near(of_target, target_gradient.reshape(-1), p.accumulate, ("target gradient", *what))


@pytest.mark.parametrize("formula", FORMULAS)
def test_gradients_that_are_made_with_the_loss(program, formula, tmp_path):
    """Those of an upstream number of 1, to the bit, and the loss of forward alone."""
    problems = [Problem(formula, dtype, seed) for dtype in DTYPES for seed in range(14)]
    problems = [p for p in problems if p.reduction != "none"]
    for p in problems:
        p.upstream = torch.tensor(1.0)
    cases = [p.case(d, p.seed % 3) for p in problems for d in (FORWARD, BACKWARD, WITH_GRADIENTS)]
    results = iter(run(program, cases, tmp_path))
    for p in problems:
        (*_, loss), (*_, input_gradient, target_gradient) = next(results), next(results)
        *_, of_input, of_target, with_gradients = next(results)
        assert torch.equal(loss, with_gradients), (formula, p.dtype, p.seed)
        assert torch.equal(input_gradient, of_input) and torch.equal(target_gradient, of_target)


def single(formula, input, target, reduction="mean", upstream=1.0):
    problem = Problem(formula, input.dtype, 0)
    problem.input, problem.target, problem.weight, problem.pos_weight = input, target, None, None
    problem.reduction, problem.out_dtype, problem.upstream = reduction, torch.float32, torch.tensor(upstream)
    return problem


def test_empty_tensors(program, tmp_path):
    nothing = torch.empty(2, 0, 3)
    cases = [single("mse", nothing, nothing, reduction).case(FORWARD) for reduction in ("mean", "sum")]
    mean, total = (result[-1] for result in run(program, cases, tmp_path))
    assert mean.isnan() and total == 0


def test_numbers(program, tmp_path):
    problem = single("mse", torch.tensor(3.0), torch.tensor(1.0), "none")
    values, gradients = run(program, [problem.case(FORWARD), problem.case(BACKWARD)], tmp_path)
    assert values[-1].tolist() == [4.0]
    assert [g.tolist() for g in gradients[-2:]] == [[4.0], [-4.0]]


def test_bce_outside_of_the_unit_interval_is_nan(program, tmp_path):
    x = torch.tensor([0.5, 1.5, -0.5, 0.5, 0.5, float("nan"), 0.0, 1.0])
    t = torch.tensor([0.5, 1.0, 0.0, 1.5, -0.5, 0.5, 0.0, 1.0])
    problem = single("bce", x, t, "none", 1.0)
    problem.upstream = torch.ones(8)
    values, gradients = run(program, [problem.case(FORWARD), problem.case(BACKWARD)], tmp_path)
    wrong = [False, True, True, True, True, True, False, False]
    assert values[-1].isnan().tolist() == wrong
    assert all(gradient.isnan().tolist() == wrong for gradient in gradients[-2:])


def test_schedule_and_order_do_not_change_a_bit(program, tmp_path):
    x, t = torch.randn(12_345), torch.randn(12_345)
    problem = single("log_cosh", x, t)
    cases = []
    for seed in range(4):
        problem.seed = seed
        cases.append(problem.case(FORWARD))
    losses = [result[-1].item() for result in run(program, cases, tmp_path)]
    assert len(set(losses)) == 1


def test_offsets_beyond_32_bits(program, tmp_path):
    """Two rows more than 2^31 elements apart."""
    x, t = torch.randn(2, 5), torch.randn(2, 5)
    case = Case(0, 7)
    case.integer(0)
    case.text("mse")
    case.integer(2)
    case.padded([2, 5])
    case.integer(10)
    case.real(0.0, 0.0)
    case.integer(0)
    case.real(1.0)
    distance = 2**31 + 8
    for operand in (x, t):
        case.dtype(torch.float32)
        case.padded([distance, 1])
        case.buffer(operand, 0, 2, 4 * distance)
    for _ in range(3):
        case.dtype(torch.float32)
        case.padded([])
        case.buffer(None)
    case.dtype(torch.float32)
    case.buffer(torch.zeros(10))
    (result,) = run(program, [case], tmp_path)
    torch.testing.assert_close(result[-1], (x - t).square().reshape(-1))
