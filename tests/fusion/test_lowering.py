"""Programs mean what the loss means: each runs in plain torch, step by step, and is compared with autograd."""

import pytest
import torch
import torch.nn.functional as F
from evaluator import evaluate

from fused_losses.fusion.ir import Extern
from fused_losses.fusion.lowering import Lowering, lower, lower_at_once
from fused_losses.fusion.piecewise import Outline
from fused_losses.fusion.refusals import CannotFuse
from fused_losses.fusion.sizes import Assumptions
from fused_losses.fusion.tracing import trace
from fused_losses.fusion.values import Input


def traced(loss, tensors, wanted):
    return trace(lambda given, tracer: loss(*given), tensors, Assumptions(), [i in wanted for i in range(len(tensors))])


def check(loss, *tensors, wanted=(0,)):
    """Value and gradients by the programs against the loss itself; gives the programs back."""
    result = traced(loss, tensors, wanted)
    programs = lower(result)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    expected = loss(*leaves)
    inputs = [*tensors, *result.constants.values()]
    value, *saved = evaluate(programs.forward, inputs)
    torch.testing.assert_close(value.view(expected.shape), expected.detach(), equal_nan=True)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [leaves[i] for i in wanted], upstream, allow_unused=True)
    found = evaluate(programs.backward, [*inputs, *saved, upstream])
    for ours, theirs in zip(found, [g for g in gradients if g is not None], strict=True):
        torch.testing.assert_close(ours.view(theirs.shape), theirs, equal_nan=True)
    return programs


def externs(programs):
    steps = [*programs.forward.steps, *programs.backward.steps]
    return {step.target.overloadpacket.__name__ for step in steps if isinstance(step, Extern)}


def floating(tensors):
    return tuple(i for i, t in enumerate(tensors) if t.is_floating_point())


def reshaped(x, y):
    flat = x.view(x.size(0), -1) - y.flatten(1)
    return flat.abs().sum(1).mean() + (x.view(-1) * y.reshape(-1)).mean()


def flat(x, y):
    places = torch.arange(x.numel())
    return (x.flatten() * places.cos()).sum() + (places.view(x.shape) * y).mean()


def split(x, y):
    mean, spread = x.chunk(2, -1)
    return -0.5 * (1 + spread - mean * mean - spread.exp()).sum(-1).mean() + y.view(y.size(0), 1, -1).amax(2).sum()


def dice(x, labels):
    p, hot = x.softmax(1), F.one_hot(labels, 5).permute(0, 3, 1, 2).float()
    both = (p * hot).flatten(2).sum(-1)
    return 1 - (2 * both / (p.flatten(2).sum(-1) + hot.flatten(2).sum(-1) + 1e-6)).mean()


def differences(x):
    return (x[:, :, 1:] - x[:, :, :-1]).abs().mean() + torch.diff(x, dim=-1).pow(2).mean()


def moved(x, y):
    z = F.pad(x, (1, 2), value=3.0) * torch.cat([y, y[:, :3]], 1)
    z = torch.roll(z, 1, 1).flip(1) + torch.stack([z, z]).sum(0)
    return z.std(1).sum() + torch.tril(z).norm() + z.diagonal(1).sum()


def written(x, y):
    z = torch.zeros_like(x)
    z[:, 1:] = x[:, :-1] * y[:, 1:]
    z[:, 0].fill_(2.0)
    w = (x * 2).mul_(y)
    w[1] = 0
    w.clamp_(min=-1)
    return (z * w).sum()


def written_by_columns(x, y):
    """The rows of the one are a product of other sizes than those of the other."""
    z = x.reshape(-1, x.size(-1)) * 2
    z[:, 1] = y.flatten()
    z[:, 0].pow_(2)
    return z.exp().sum()


def masked(x, y):
    z = x * y
    z[y > 0.5] = 0.0
    z[y[:, 0] < 0] = 2.0
    return z.exp().sum()


def sized_otherwise(x):
    """Three tensors of one length, known as a product, as a number and as the sizes that it is a product of."""
    flat = x.flatten()
    return torch.where(torch.arange(x.numel()) > 3, torch.ones(len(flat)), flat.exp()).sum()


def repeated(x):
    places = torch.arange(x.shape[1] * x.shape[2])
    return (x.flatten(1) * places.repeat(x.shape[0], 1)).sum() + (x[0].flatten() * places.repeat(1)).sum()


def chosen(x, labels):
    rows = x.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return -rows.mean() + x[labels[:3] % 5].sum() + x.index_select(1, labels[:2]).mean() + x[2, -1]


def extremes(x, y):
    values, places = x.max(1)
    return values.sum() + (places * 0.1 * y[:, 0]).sum() + x.amin() + x.argmin(0).float().mean() + x.logsumexp(0).sum()


def pairs(x):
    return (x.unsqueeze(1) - x.unsqueeze(0)).pow(2).sum(-1).add(1e-4).sqrt().mean()


def stencil(x):
    inner = x[1:-1, 1:-1]
    around = x[2:, 1:-1] + x[:-2, 1:-1] + x[1:-1, 2:] + x[1:-1, :-2]
    return (torch.tanh(around - 4 * inner).exp() * inner.sin()).square().mean()


def contrastive(x, y):
    logits = F.normalize(x) @ F.normalize(y).t() / 0.1
    return F.cross_entropy(logits, torch.arange(x.size(0)))


def spectral(x, y):
    return (torch.fft.rfft(x).abs() - torch.fft.rfft(y).abs()).square().mean()


def convolved(x, y):
    return (F.conv2d(x[None, None], y[None, None, :3, :3], padding=1) * x).sum()


def pooled(x, y):
    return (F.max_pool2d(x[None], 3, 1, 1)[0] * y).sum() + F.max_pool1d(x, 2).square().sum()


def ranked(x, y):
    order = x.sort(1).values
    return (order.cumsum(1) * y).mean()


def tables(x, y):
    return (x * torch.tensor([1.0, 2.0, 0.5]).sum() + torch.linspace(0, 1, 7) * y).clamp(-1, 1).mean()


PAIR = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.linspace(-2, 2, 35).view(5, 7)
IMAGE = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([3, 0, 6, 2, 5])
CASES = {
    "mse": (lambda x, y: ((x - y) ** 2).mean(), *PAIR),
    "unreduced": (lambda x, y: F.smooth_l1_loss(x, y, reduction="none", beta=0.7), *PAIR),
    "cross_entropy": (F.cross_entropy, PAIR[0], LABELS),
    "smoothed": (lambda x, t: F.cross_entropy(x, t, reduction="none", label_smoothing=0.1), PAIR[0], LABELS),
    "ignored": (lambda x, t: F.cross_entropy(x, t, ignore_index=6), PAIR[0], LABELS),
    "bce": (lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="sum"), *PAIR),
    "kl": (lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"), *PAIR),
    "cosine": (lambda x, y: 1 - F.cosine_similarity(x, y).mean(), *PAIR),
    "reshaped": (reshaped, torch.randn(3, 4, 5), torch.randn(3, 4, 5)),
    "flat": (flat, *PAIR),
    "split": (split, torch.randn(4, 12), torch.randn(2, 3)),
    "dice": (dice, torch.randn(2, 5, 3, 4), torch.arange(24).view(2, 3, 4) % 5),
    "differences": (differences, IMAGE),
    "moved": (moved, *PAIR),
    "written": (written, *PAIR),
    "sized otherwise": (sized_otherwise, PAIR[0]),
    "masked": (masked, *PAIR),
    "repeated": (repeated, torch.randn(2, 3, 5)),
    "chosen": (chosen, PAIR[0], LABELS),
    "extremes": (extremes, *PAIR),
    "pairs": (pairs, PAIR[0]),
    "stencil": (stencil, PAIR[0]),
    "tables": (tables, *PAIR),
    "broadcast": (lambda x, y: (x[:, :1] * y.mean(1, keepdim=True) + y.std()).exp().sum(), *PAIR),
    "scalars": (lambda x, y: x.sum() * y.mean(), torch.tensor(2.0), torch.tensor(3.0)),
}


def folded(x, y):
    return (x.unfold(1, 3, 2).prod(-1) * y[:, :3]).mean()


PARTLY = {
    "folded": (folded, {"unfold_backward", "cumprod"}, *PAIR),
    "written by columns": (written_by_columns, {"reshape"}, torch.randn(4, 6, 5), torch.randn(2, 12)),
    "contrastive": (contrastive, {"mm"}, *PAIR),
    "spectral": (spectral, {"_fft_r2c"}, *PAIR),
    "convolved": (convolved, {"convolution", "convolution_backward"}, *PAIR),
    "pooled": (pooled, {"max_pool2d_with_indices", "max_pool2d_with_indices_backward"}, *PAIR),
    "ranked": (ranked, {"sort"}, *PAIR),
}


@pytest.mark.parametrize("name", CASES)
def test_wholly_lowered(name):
    loss, *tensors = CASES[name]
    assert not externs(check(loss, *tensors, wanted=floating(tensors)))


@pytest.mark.parametrize("name", PARTLY)
def test_partly_lowered(name):
    loss, left, *tensors = PARTLY[name]
    assert left <= externs(check(loss, *tensors, wanted=floating(tensors)))


def test_each_element_is_worked_out_once(monkeypatch):
    """Gradients that share what they are made of share the work."""
    seen = []
    work_out = Lowering._worked_out

    def worked_out(lowering, value, positions):
        seen.append((value, positions))
        return work_out(lowering, value, positions)

    def loss(x, y):
        p, q = x.softmax(1), y.softmax(1)
        return ((p - q).square() * (p + q).log()).sum(1).mean()

    result = traced(loss, [torch.randn(5, 7), torch.randn(5, 7)], (0, 1))
    monkeypatch.setattr(Lowering, "_worked_out", worked_out)
    lower_at_once(result)
    # But for the operands of reductions, at which both the search for a lone term and a stage begin.
    stages = {value.operand for value, _ in seen if hasattr(value, "dimensions")}
    again = [value for value, _ in set(seen) if value not in stages and seen.count((value, _)) > 1]
    assert len(seen) > 20 and not again


def test_one_program_serves_every_size():
    """The programs of one call, run on tensors of other sizes."""
    result = traced(F.cross_entropy, [torch.randn(5, 7), torch.zeros(5, dtype=torch.int64)], (0,))
    programs = lower(result)
    assert not result.assumptions.guards
    x, t = torch.randn(11, 3, requires_grad=True), torch.randint(3, (11,))
    expected = F.cross_entropy(x, t)
    value, *saved = evaluate(programs.forward, [x.detach(), t])
    (gradient,) = evaluate(programs.backward, [x.detach(), t, *saved, torch.tensor(1.0)])
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


def test_only_small_results_are_saved():
    programs = lower(traced(F.cross_entropy, [PAIR[0], LABELS], (0,)))
    sizes = {b.name: b.sizes for step in programs.forward.steps for b in [step.buffer]}
    saved = programs.forward.outputs[1:]
    assert saved and all(len(sizes[name]) <= 1 for name in saved)


def sums(program):
    return [step for step in program.steps if step.combine == "sum"]


@pytest.mark.parametrize("name", ["cross_entropy", "ignored"])
def test_the_gradient_of_a_lookup_adds_nothing_up(name):
    loss, *tensors = CASES[name]
    assert not sums(check(loss, *tensors).backward)


def hot(t, size):
    return t[:, None] == torch.arange(size)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: (torch.where(hot(t - 3, x.size(1)), x[:, :1], 0.0).sum(1) * x[:, 1]).sum(),  # places outside
        lambda x, t: (torch.where(hot(t, x.size(1)), x[:, :1], x[:, 1:2]).sum(1) * x[:, 2]).sum(),  # no zeros
        lambda x, t: (torch.where(F.one_hot(t, x.size(1)) == 1, x, 0.0).sum(1) * x[:, 1]).sum(),  # other terms
        lambda x, t: torch.where(torch.arange(7).gather(0, torch.arange(7)) == torch.arange(7), x[:, :1], 0.0).sum(),
    ],
)
def test_other_sums_are_added_up(loss):
    check(loss, PAIR[0], LABELS)


def exponentials(loss, *tensors):
    steps = [*(programs := check(loss, *tensors)).forward.steps, *programs.backward.steps]
    return {node.op for step in steps for node in step.expression.nodes if node.op.startswith("exp")}


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda x, t: (x.softmax(1) * x.log_softmax(1)).sum(1).mean(),
        lambda x, t: (x.softmax(0) * t[:, None]).square().sum(),
    ],
)
def test_a_softmax_takes_exponentials_of_what_is_at_most_0(loss):
    assert exponentials(loss, PAIR[0], LABELS) == {"exp_nonpositive"}


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: (x - x.amin(1, keepdim=True)).exp().sum(),
        lambda x: (x - x.amax(1)).exp().sum(),  # along another dimension
        lambda x: (x - x.amax(1).unsqueeze(0)).exp().sum(),
        lambda x: (x - x.amax(1, keepdim=True).transpose(0, 1)).exp().sum(),
        lambda x: (x * 2 - x.amax(1, keepdim=True)).exp().sum(),
        lambda x: (x - x.amax(1, keepdim=True) - x.exp().sum(1, keepdim=True).log()).exp().sum(),
    ],
)
def test_other_exponentials_are_of_any_number(loss):
    assert "exp" in exponentials(loss, torch.randn(5, 5))


def test_what_is_computed_at_many_places_is_kept_in_memory():
    def blurred(x):
        hot = torch.tanh(x * 2).exp().sigmoid()
        return (hot[2:] * hot[1:-1] * hot[:-2] + hot[2:].sin()).sum()

    assert len(check(blurred, torch.randn(9)).backward.steps) > 1


def written_over(x):
    y = torch.empty_like(x)
    y.copy_(x).mul_(2)
    z = torch.zeros_like(x)
    z[:] = x
    z[0] = y[1].exp()
    return (y * z).sum()


def written_row(x):
    """Its gradient is a copy of the gradient that it is given, which is written over in part."""
    y = x * 1
    y[0] = x.sin()[1]
    return y


@pytest.mark.parametrize("loss", [written_over, written_row])
def test_a_copy_of_an_argument_may_be_written_over(loss):
    for shape in ((3, 4), (2, 1)):
        check(loss, torch.randn(shape, dtype=torch.float64))


def test_what_equals_is_computed_once():
    """A function that a loss calls twice: sums of the same are one, and saved as one."""

    def twice(x, y):
        first, second = (x.square().sum(1) for _ in "ab")
        return (first * y).sin().sum() + (second + y).square().mean()

    programs = check(twice, torch.randn(4, 5), torch.randn(4), wanted=(0, 1))
    sums = [step for step in programs.forward.steps if step.reduced and step.axes]
    assert len(sums) == 1
    assert programs.forward.outputs[1:] == (sums[0].buffer.name,)
    assert [buffer.name for buffer in programs.backward.inputs].count(sums[0].buffer.name) == 1


def test_an_index_out_of_range():
    result = lower(traced(lambda x, i: x.gather(1, i).sum(), [PAIR[0], LABELS[:, None]], (0,)))
    with pytest.raises(IndexError):
        evaluate(result.forward, [PAIR[0], LABELS[:, None] + 3])


def on_value(x):
    return x.sum() if x.mean() > 0 else -x.sum()


def on_input(x):
    x.detach().clamp_(min=0)
    return x.sum()


CAPTURED = torch.ones(7)
REFUSED = {
    "reads the value of a tensor": on_value,
    "random in a way of its own": lambda x: F.rrelu(x, training=True).sum(),
    "writes into an argument": on_input,
    "boolean mask": lambda x: x[x > 0].max(),
    "size depends on values": lambda x: torch.nonzero(x).sum() * x.sum(),
    "neither an argument": lambda x: (x * CAPTURED).sum(),
    "returns float": lambda x: 1.0,
    "unsqueeze_ changes the shape": lambda x: x.exp().unsqueeze_(0).sum(),
    "wants sizes as fixed numbers": lambda x: torch.combinations(x[0]).prod(1).sum(),
    "as_strided": lambda x: x.as_strided((3,), (2,)).sum(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_traced_says_why(reason):
    with pytest.raises(CannotFuse, match=reason) as refused:
        traced(REFUSED[reason], [PAIR[0]], (0,))
    if reason != "returns float":
        assert "test_lowering.py:" in str(refused.value)


def softened(x, steps):
    """Sums over rows, each of what the last has left."""
    for _ in range(steps):
        x = x - x.exp().sum(-1, keepdim=True).log()
    return x.square().sum()


@pytest.fixture
def reads(monkeypatch):
    """Who asks for elements of inputs, once for each time."""
    found = []
    plain = Input.element

    def noted(self, lowering, positions):
        found.append(type(lowering))
        return plain(self, lowering, positions)

    monkeypatch.setattr(Input, "element", noted)
    return found


def test_a_stage_asks_for_an_element_once(reads):
    program = lower_at_once(traced(lambda x: softened(x, 4), [torch.randn(5, 7)], [0]))
    assert reads.count(Lowering) <= len(program.steps)


def test_a_stack_is_outlined_once(reads):
    views = [torch.randn(5, 7) for _ in range(3)]
    traced(lambda *given: softened(torch.stack(given), 2), views, range(3))
    few = reads.count(Outline)
    reads.clear()
    traced(lambda *given: softened(torch.stack(given), 8), views, range(3))
    assert 0 < reads.count(Outline) <= few
