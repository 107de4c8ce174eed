"""The softmax CUDA kernels against the reference in fp64, on the CPU."""

import math
import random

import pytest
import torch
from emulator import DTYPES, Case, accumulate_dtype, assert_near, build, run

from fused_losses.reference.softmax import cross_entropy

REDUCTIONS = ["none", "mean", "sum"]
FORWARD, BACKWARD, IN_PLACE, TARGET_BACKWARD = range(4)
OPTIONS = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "temperature": 1.0, "ignore_index": -100}


class Problem:
    """One cross entropy: logits, labels or probabilities of shape (rows, classes), in a layout of their own."""

    def __init__(self, logits, target, layout="rows", reduction="mean", seed=0, max_blocks=4, **options):
        self.logits, self.target = logits, target
        self.layout, self.reduction, self.seed, self.max_blocks = layout, reduction, seed, max_blocks
        self.weight, self.sample_weight = options.pop("weight", None), options.pop("sample_weight", None)
        self.options = {**OPTIONS, **options}
        self.dtype, self.accumulate = logits.dtype, accumulate_dtype(logits.dtype)
        self.out_dtype = self.accumulate
        self.labels = not target.is_floating_point()
        self.upstream = torch.ones(logits.shape[0]) if reduction == "none" else torch.tensor(1.0)

    def truth(self):
        wide = self.logits.double().requires_grad_()
        target = self.target if self.labels else self.target.double().requires_grad_()
        factors = [None if w is None else w.double() for w in (self.weight, self.sample_weight)]
        loss = cross_entropy(
            wide, target, factors[0], reduction=self.reduction, sample_weight=factors[1], **self.options
        )
        inputs = [wide] if self.labels else [wide, target]
        return loss.detach(), *torch.autograd.grad(loss, inputs, self.upstream.double())

    def memory(self, values):
        """The values in their layout, and how far from an aligned address they start."""
        rows, classes = values.shape
        if self.layout == "rows":
            return values.contiguous(), 0
        if self.layout == "padded":
            return values.new_zeros(rows, classes + 3)[:, :classes].copy_(values), 1
        if self.layout == "pixels":  # (2, classes, rows / 2) as (rows, classes)
            return values.view(2, rows // 2, classes).transpose(1, 2).contiguous(), 0
        if self.layout == "gaps":  # no two of the dimensions are one in memory
            full = values.new_zeros(2, classes + 1, rows // 2, 3)
            view = full[:, :classes, :, 1]
            return view.copy_(values.view(2, rows // 2, classes).transpose(1, 2)), 1
        raise ValueError(self.layout)

    def layout_of(self, memory):
        """Row sizes, row strides and the stride of classes."""
        if memory.ndim == 2:
            return [memory.shape[0]], [memory.stride(0)], memory.stride(1)
        return [memory.shape[0], memory.shape[2]], [memory.stride(0), memory.stride(2)], memory.stride(1)

    def rows_of(self, memory):
        """The values of a buffer that came back, as (rows, classes)."""
        like, _ = self.memory(self.logits)
        view = memory.as_strided(like.shape, like.stride())
        return (view if view.ndim == 2 else view.transpose(1, 2)).reshape(self.logits.shape)

    def put(self, case, tensor):
        if tensor is None:
            case.buffer(None)
            return self.put_layout(case, *self.layout_of(self.memory(self.logits)[0])[1:])
        memory, misalignment = self.memory(tensor)
        case.buffer(memory, misalignment)
        _, row_strides, class_stride = self.layout_of(memory)
        self.put_layout(case, row_strides, class_stride)

    def put_layout(self, case, row_strides, class_stride):
        case.integer(class_stride)
        case.padded(row_strides)

    def start(self, direction):
        case = Case(self.seed, self.max_blocks)
        case.integer(direction)
        case.dtype(self.dtype)
        rows, classes = self.logits.shape
        row_sizes, _, _ = self.layout_of(self.memory(self.logits)[0])
        case.integer(classes, rows, len(row_sizes))
        case.padded(row_sizes)
        self.put(case, self.logits)
        self.put(case, None if self.labels else self.target)
        case.buffer(self.target if self.labels else None)
        case.buffer(self.weight)
        case.buffer(self.sample_weight)
        o = self.options
        case.integer(o["ignore_index"])
        case.real(o["label_smoothing"], o["z_loss"], o["softcap"] or 0.0, o["temperature"])
        return case

    def forward(self):
        case = self.start(FORWARD)
        case.integer(REDUCTIONS.index(self.reduction))
        case.dtype(self.out_dtype)
        rows = self.logits.shape[0]
        loss = torch.full((rows,) if self.reduction == "none" else (), math.nan, dtype=self.out_dtype)
        case.buffer(loss)
        case.buffer(torch.full((2 * rows + 1,), math.nan, dtype=self.accumulate))
        return case

    def backward(self, stats, direction=BACKWARD):
        case = self.start(direction)
        case.dtype(self.upstream.dtype)
        case.buffer(self.upstream)
        case.integer(int(self.reduction != "none"))
        case.buffer(stats)
        self.put(case, torch.full_like(self.logits, math.nan))
        return case


def some_problem(dtype, seed):
    choose = random.Random(f"{dtype} {seed}")
    generator = torch.Generator().manual_seed(seed)
    accumulate = accumulate_dtype(dtype)
    rows = choose.choice([2, 6, 34])
    classes = choose.choice([1, 2, 5, 31, 32, 33, 64, 250, 1024, 1025, 2057, 4101])
    logits = (torch.randn(rows, classes, generator=generator) * 3).to(dtype)
    labels = choose.random() < 0.6
    target = torch.randint(classes, (rows,), generator=generator)
    if labels:
        target[torch.rand(rows, generator=generator) < 0.3] = -100
        target[0] = classes - 1
    else:
        target = torch.rand(rows, classes, generator=generator).softmax(1).to(dtype)

    def maybe(name, value):
        return {name: value} if choose.random() < 0.4 else {}

    problem = Problem(
        logits,
        target,
        choose.choice(["rows", "padded", "pixels", "gaps"]),
        choose.choice(REDUCTIONS),
        seed,
        choose.choice([1, 2, 5, 64]),
        **maybe("weight", torch.rand(classes, generator=generator).to(accumulate) + 0.1),
        **maybe("sample_weight", torch.rand(rows, generator=generator).to(accumulate)),
        **maybe("label_smoothing", 0.15),
        **maybe("z_loss", 0.01),
        **maybe("softcap", 4.0),
        **maybe("temperature", 1.5),
    )
    problem.out_dtype = choose.choice([dtype, accumulate])
    upstream_dtype = choose.choice(DTYPES)
    shape = (rows,) if problem.reduction == "none" else ()
    problem.upstream = torch.randn(shape, generator=generator).to(upstream_dtype)
    return problem


@pytest.fixture(scope="module")
def program():
    return build("softmax")


def results_of(program, problems, folder):
    """Loss, stats, gradient of the logits, the same in place, that of the probabilities if they are the target."""
    forward = run(program, [p.forward() for p in problems], folder)
    cases, keys = [], []
    for i, (p, result) in enumerate(zip(problems, forward)):
        for direction in (BACKWARD, IN_PLACE) if p.labels else (BACKWARD, IN_PLACE, TARGET_BACKWARD):
            cases.append(p.backward(result[-1], direction))
            keys.append((i, direction))
    gradients = {}
    for (i, direction), buffers in zip(keys, run(program, cases, folder)):
        p = problems[i]
        gradients[i, direction] = p.rows_of(buffers[0] if direction == IN_PLACE else buffers[-1])
    return [
        (result[-2], result[-1], *(gradients.get((i, d)) for d in (BACKWARD, IN_PLACE, TARGET_BACKWARD)))
        for i, result in enumerate(forward)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", range(2))
def test_matches_reference(program, dtype, part, tmp_path):
    problems = [some_problem(dtype, seed) for seed in range(part * 24, part * 24 + 24)]
    for p, (loss, _, gradient, in_place, of_target) in zip(problems, results_of(program, problems, tmp_path)):
        what = (p.layout, tuple(p.logits.shape), p.reduction, p.labels, p.options, p.weight is None)
        expected_loss, expected_gradient, *expected_of_target = p.truth()
        assert_near(loss, expected_loss.reshape(-1), p.accumulate, ("loss", *what))
        assert_near(gradient, expected_gradient, p.accumulate, ("gradient", *what))
        assert torch.equal(gradient, in_place), ("in place", *what)
        if not p.labels:
            assert_near(of_target, expected_of_target[0], p.accumulate, ("target gradient", *what))


@pytest.mark.parametrize("layout", ["rows", "pixels"])
@pytest.mark.parametrize("classes", [8, 100, 1500])
def test_stats(program, layout, classes, tmp_path):
    logits, labels = torch.randn(10, classes), torch.arange(10) % classes
    labels[3] = -100
    weight = torch.rand(classes)
    problem = Problem(logits, labels, layout, weight=weight)
    stats = run(program, [problem.forward()], tmp_path)[0][-1]
    maxima = logits.max(1).values
    log_sums = torch.logsumexp(logits.double() - maxima.double()[:, None], 1).float()
    maxima[3] = log_sums[3] = 0
    assert torch.equal(stats[:10], maxima)
    torch.testing.assert_close(stats[10:20], log_sums)
    torch.testing.assert_close(stats[20], weight[labels[labels >= 0]].sum())


@pytest.mark.parametrize("layout", ["rows", "pixels"])
@pytest.mark.parametrize("classes", [8, 100, 1500])
def test_labels_out_of_range(program, layout, classes, tmp_path):
    """That row is NaN, the others are not, and nothing outside is touched."""
    labels = torch.tensor([1, classes, -1, 2**62, -(2**63), -100, 0, 3])
    problem = Problem(torch.randn(8, classes), labels, layout, "none", weight=torch.rand(classes))
    loss, _, gradient, in_place, _ = results_of(program, [problem], tmp_path)[0]
    wrong = [False, True, True, True, True, False, False, False]
    assert loss.isnan().tolist() == wrong
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == wrong
    assert torch.equal(gradient.isnan(), in_place.isnan())


@pytest.mark.parametrize("layout", ["rows", "pixels"])
@pytest.mark.parametrize("classes", [8, 100, 1500])
def test_ignored_rows_may_hold_anything(program, layout, classes, tmp_path):
    logits = torch.randn(4, classes)
    logits[1], logits[2] = math.nan, -math.inf
    problem = Problem(logits, torch.tensor([0, -100, -100, 3]), layout, z_loss=0.1, label_smoothing=0.1)
    loss, _, gradient, in_place, _ = results_of(program, [problem], tmp_path)[0]
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[1:3] == 0).all()
    assert torch.equal(gradient, in_place)


@pytest.mark.parametrize("classes", [8, 100, 1500])
def test_nothing_but_ignored_rows(program, classes, tmp_path):
    problem = Problem(torch.randn(3, classes), torch.full((3,), -100))
    loss, _, gradient, _, _ = results_of(program, [problem], tmp_path)[0]
    assert loss.isnan() and (gradient == 0).all()


@pytest.mark.parametrize("layout", ["rows", "pixels"])
@pytest.mark.parametrize("classes", [8, 100, 1500])
def test_infinite_logits(program, layout, classes, tmp_path):
    """Masked classes, a masked label, and rows that are -inf, +inf or NaN altogether."""
    logits = torch.randn(6, classes)
    logits[0, 2:] = -math.inf
    logits[1, 0] = -math.inf
    logits[2], logits[3, 1], logits[4, 1] = -math.inf, math.inf, math.nan
    labels = torch.zeros(6, dtype=torch.long)
    for smoothing in (0.0, 0.1):
        problem = Problem(logits, labels, layout, "none", label_smoothing=smoothing)
        loss, _, gradient, _, _ = results_of(program, [problem], tmp_path)[0]
        expected = problem.truth()
        torch.testing.assert_close(loss.double(), expected[0], equal_nan=True, rtol=1e-5, atol=1e-6)
        finite = [0, 5] if smoothing else [0, 1, 5]
        torch.testing.assert_close(gradient[finite].double(), expected[1][finite], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 100, 1500])
def test_large_offsets_and_confident_rows(program, classes, tmp_path):
    offset = Problem(torch.full((2, classes), 2.0**24), torch.tensor([0, 1]))
    confident = torch.zeros(2, classes)
    confident[:, 1] = 14.0
    confident = Problem(confident, torch.tensor([1, 1]))
    at_offset, of_confident = results_of(program, [offset, confident], tmp_path)
    torch.testing.assert_close(at_offset[0].item(), math.log(classes), rtol=1e-6, atol=0)
    loss, gradient = confident.truth()
    assert abs(of_confident[0].item() / loss.item() - 1) < 1e-5
    torch.testing.assert_close(of_confident[2].double(), gradient, rtol=1e-5, atol=0)


def test_many_rows_share_no_classes(program, tmp_path):
    """From 2^17 rows on, every thread reads the classes of its rows by itself."""
    rows, classes = 2**17 + 2, 33
    problem = Problem(torch.randn(rows, classes), torch.randint(classes, (rows,)), "pixels", max_blocks=64)
    loss, _, gradient, _, _ = results_of(program, [problem], tmp_path)[0]
    expected_loss, expected_gradient = problem.truth()
    assert_near(loss, expected_loss.reshape(-1), torch.float32, "loss")
    assert_near(gradient, expected_gradient, torch.float32, "gradient")


def test_no_rows(program, tmp_path):
    labels = torch.empty(0, dtype=torch.long)
    problems = [Problem(torch.empty(0, 40), labels, reduction=reduction) for reduction in ("mean", "sum")]
    mean, total = (result[-2] for result in run(program, [p.forward() for p in problems], tmp_path))
    assert mean.isnan() and total == 0


def test_schedule_and_order_do_not_change_a_bit(program, tmp_path):
    logits, labels = torch.randn(40, 1500), torch.randint(1500, (40,))
    problems = [Problem(logits, labels, seed=seed, label_smoothing=0.1) for seed in range(4)]
    first, *others = results_of(program, problems, tmp_path)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first[:4], other[:4]))


def far_apart():
    """Two rows more than 2^31 elements apart."""
    logits = torch.randn(2, 1500, generator=torch.Generator().manual_seed(0))
    problem = Problem(logits, torch.tensor([7, 1400]))
    distance = 2**31 + 8
    problem.put = lambda case, tensor: (
        case.buffer(tensor, 0, 2, 4 * distance),
        problem.put_layout(case, [distance], 1),
    )
    return problem


def test_offsets_beyond_32_bits(program, tmp_path):
    problem = far_apart()
    result = run(program, [problem.forward()], tmp_path)[0]
    loss, gradient = problem.truth()
    torch.testing.assert_close(result[-2].double().reshape(()), loss, rtol=1e-6, atol=0)
    ours = run(program, [problem.backward(result[-1])], tmp_path)[0][-1]
    torch.testing.assert_close(ours.view(2, 1500).double(), gradient, rtol=1e-5, atol=1e-8)
