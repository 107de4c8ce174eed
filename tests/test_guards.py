"""Planted faults: every check must catch the loss that was broken for it, and the suite a broken kernel."""

import pytest
import torch
from sets import each_pair

from fused_losses.backends import choice
from fused_losses.specs import Sample
from fused_losses.testing import CHECKS, OPTIONAL_CHECKS, check_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class Square(torch.autograd.Function):
    """A right loss by hand: unreduced squares. The faults below each change one thing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, t):
        return (x.double() - t.double()).square().to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        return gradients(x, t, g)


def gradients(x, t, g):
    difference = 2.0 * (x.double() - t.double()) * g.double()
    return difference.to(x.dtype), -difference.to(x.dtype)


def with_backward(backward):
    """The right forward with another backward."""
    function = type("Planted", (Square,), {"backward": staticmethod(backward)})
    return lambda x, t: function.apply(x, t)


def with_gradients(change):
    """The right gradients, changed: change(x, t, g) gives both."""
    return with_backward(lambda ctx, g: change(*ctx.saved_tensors, g))


right = Square.apply


def value_off(x, t):
    return right(x, t) * (1 + 1e-5)


def other_dtype(x, t):
    return right(x, t).float()


def reduced(x, t):
    return right(x, t).sum(0)


def narrow_intermediate(x, t):
    return (x.bfloat16() - t.bfloat16()).square().to(x.dtype)


def swallows_nan(x, t):
    return right(x, t).nan_to_num(nan=0.0, posinf=float("inf"))


def turns_infinity_to_nan(x, t):
    value = right(x, t)
    return value + 0.0 * value


def detached(x, t):
    return right(x.detach(), t.detach())


def forgets_the_target(x, t):
    return right(x, t.detach())


def first_upstream_for_all(x, t, g):
    return gradients(x, t, g.flatten()[:1].expand(g.numel()).view(g.shape) if g.numel() else g)


def ignores_upstream(x, t, g):
    return gradients(x, t, torch.ones_like(g))


def clips_upstream(x, t, g):
    return gradients(x, t, g.clamp(-1, 1))


def wrong_scale(x, t, g):
    return gradients(x, t, g * 0.5)


def one_row_unwritten(x, t, g):
    dx, dt = gradients(x, t, g)
    return torch.cat([dx[:-1], torch.full_like(dx[-1:], float("nan"))]), dt


def wrong_for_the_target_alone(ctx, g):
    dx, dt = gradients(*ctx.saved_tensors, g)
    return dx, dt if ctx.needs_input_grad[0] else 2 * dt


def spends_its_graph(ctx, g):
    dx, dt = gradients(*ctx.saved_tensors, g * getattr(ctx, "left", 1.0))
    ctx.left = 0.5
    return dx, dt


@torch.autograd.function.once_differentiable
def refuses_a_second_derivative(ctx, g):
    return gradients(*ctx.saved_tensors, g)


def forgets_the_second_derivative(ctx, g):
    x, t = ctx.saved_tensors
    return gradients(x.detach(), t.detach(), g)


def writes_its_input(x, t):
    value = right(x, t)
    x.detach().mul_(1 + 1e-3)
    return value


def writes_a_gradient_over_its_input(ctx, g):
    x, t = ctx.saved_tensors
    dx, dt = gradients(x, t, g)
    x.detach().untyped_storage().copy_(dx.contiguous().untyped_storage()[: x.untyped_storage().nbytes()])
    return dx, dt


def writes_between_elements(x, t):
    with torch.no_grad():
        torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, (1,), (1,)).fill_(7)
    return right(x, t)


def assumes_contiguous_memory(x, t):
    flat = [tensor.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()) for tensor in (x, t)]
    return right(*flat)


def assumes_no_offset(x, t):
    return right(x.as_strided(x.shape, x.stride(), 0), t)


def assumes_one_layout(x, t):
    """Reads the target with the strides of the input."""
    if t.untyped_storage().nbytes() != x.untyped_storage().nbytes():
        return right(x, t)
    return right(x, t.as_strided(x.shape, x.stride(), t.storage_offset()))


def random_order(x, t):
    return right(x, t) * (1 + torch.rand((), dtype=x.dtype) * 2 * torch.finfo(x.dtype).eps)


def order_of_the_threads(x, t):
    return right(x, t) * (1 + 2 * torch.finfo(x.dtype).eps * (torch.get_num_threads() > 1))


def another_path_without_gradients(x, t):
    return right(x, t) * (1.0 if torch.is_grad_enabled() else 1 + torch.finfo(x.dtype).eps)


def turns_gradients_on(x, t):
    with torch.enable_grad():
        return right(x, t) + 0.0 * x.clone().requires_grad_(not x.is_inference() and x.is_leaf).sum()


def blind_to_transforms(x, t):
    inside = torch._C._are_functorch_transforms_active()
    return right(x.detach(), t.detach()) + 0.0 * x if inside else right(x, t)


def not_for_transforms(x, t):
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("no rule for vmap")
    return right(x, t)


def looks_at_values(x, t):
    return right(x, t) * (1.0 if x.sum().item() > -1e9 else 2.0)


def wrong_when_compiled(x, t):
    return right(x, t) * (2.0 if torch.compiler.is_compiling() else 1.0)


def keeps_a_copy(x, t):
    return right(x, t) + 0.0 * torch.stack([x, t, x]).mean(0)


class Forgetful(torch.nn.Module):
    """Keeps a factor that no copy takes along."""

    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def __getstate__(self):
        return {**self.__dict__, "factor": 2.0}

    def forward(self, x, t):
        return right(x, t) * self.factor


class Stateless(torch.nn.Module):
    """Has a weight that state_dict does not round-trip."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.0, dtype=torch.float64))

    def _load_from_state_dict(self, *arguments):
        self.factor.fill_(3.0)

    def forward(self, x, t):
        return right(x, t) * self.factor.to(x.dtype)


FAULTS = [
    ("value", value_off),
    ("value", other_dtype),
    ("value", reduced),
    ("value", narrow_intermediate),
    ("value", swallows_nan),
    ("value", turns_infinity_to_nan),
    ("gradient", detached),
    ("gradient", forgets_the_target),
    ("gradient", with_gradients(wrong_scale)),
    ("gradient", with_gradients(one_row_unwritten)),
    ("upstream", with_gradients(first_upstream_for_all)),
    ("upstream", with_gradients(ignores_upstream)),
    ("linearity", with_gradients(ignores_upstream)),
    ("linearity", with_gradients(clips_upstream)),
    ("subsets", with_backward(wrong_for_the_target_alone)),
    ("repeated_backward", with_backward(spends_its_graph)),
    ("double_backward", with_backward(refuses_a_second_derivative)),
    ("double_backward", with_backward(forgets_the_second_derivative)),
    ("gradcheck", with_gradients(wrong_scale)),
    ("gradcheck", with_backward(forgets_the_second_derivative)),
    ("transforms", blind_to_transforms),
    ("transforms", not_for_transforms),
    ("layouts", assumes_contiguous_memory),
    ("layouts", assumes_no_offset),
    ("layouts", assumes_one_layout),
    ("deterministic", random_order),
    ("deterministic", order_of_the_threads),
    ("unmutated", writes_its_input),
    ("unmutated", with_backward(writes_a_gradient_over_its_input)),
    ("unmutated", writes_between_elements),
    ("no_grad", detached),
    ("no_grad", another_path_without_gradients),
    ("no_grad", turns_gradients_on),
    ("copies", Forgetful()),
    ("copies", Stateless()),
    ("compiled", looks_at_values),
    ("compiled", wrong_when_compiled),
    ("memory", keeps_a_copy),
]


def reference(x, t):
    return torch.nn.functional.mse_loss(x, t, reduction="none")


def samples(check):
    """What the check needs to bite: memory wants large tensors, value some that are not finite."""
    generator = torch.Generator().manual_seed(0)
    shape = (256, 256) if check == "memory" else (6, 5)
    x, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = [Sample("plain", (x, t)), Sample("offset", (torch.cat([x[:1], x])[1:], t))]
    if check == "value":
        special = x.clone()
        special[0, 0], special[1, 1] = float("nan"), float("inf")
        pairs.append(Sample("not finite", (special, t)))
    return pairs


@pytest.mark.parametrize("check", [*CHECKS, *OPTIONAL_CHECKS])
def test_the_right_loss_passes(check):
    check_loss(torch.nn.MSELoss(reduction="none"), reference, samples(check), dtypes=DTYPES, checks=[check])
    if check not in ("transforms", "memory"):  # the one by hand has no forward-mode rule and needs fp64 copies
        check_loss(right, reference, samples(check), dtypes=DTYPES, checks=[check])


@pytest.mark.parametrize("check", CHECKS)
def test_a_target_may_be_compared_with_alone(check):
    """Nothing flows back to it; what should flow to the other input must."""

    def chosen(x, t):
        return torch.where(t > 0, x, 0.5 * x).square()

    pair = [tuple(torch.randn(6, 5, dtype=torch.float64) for _ in range(2))]
    check_loss(chosen, chosen, pair, dtypes=DTYPES, checks=[check])
    if check == "gradient":
        cut = lambda x, t: chosen(x.detach(), t)
        assert not check_loss(cut, chosen, pair, dtypes=DTYPES, checks=[check], raise_on_fault=False).ok


@pytest.mark.parametrize(("check", "loss"), FAULTS, ids=[f"{c}-{n}" for n, (c, _) in enumerate(FAULTS)])
def test_a_planted_fault_is_caught(check, loss):
    report = check_loss(loss, reference, samples(check), dtypes=DTYPES, checks=[check], raise_on_fault=False)
    assert not report.ok, f"\n{report}"
    with pytest.raises(AssertionError, match="FAULT"):
        report.raise_for_faults()


def test_every_check_has_a_fault():
    assert {check for check, _ in FAULTS} == {*CHECKS, *OPTIONAL_CHECKS}


def test_bf16_accumulation_is_caught():
    def sums_in_bf16(x, t):
        total = x.new_zeros(())
        for value in (x - t).square():
            total = total + value
        return total

    pair = torch.rand(2000, dtype=torch.float64), torch.zeros(2000, dtype=torch.float64)
    summed = torch.nn.MSELoss(reduction="sum")
    report = check_loss(sums_in_bf16, summed, [pair], dtypes=[torch.bfloat16], checks=["value"], raise_on_fault=False)
    assert not report.ok


# What may go wrong in a kernel: the operator's results, changed.
def scaled(result):
    return tuple(map(scaled, result)) if isinstance(result, tuple) else result * (1 + 3e-6)


def unwritten(result):
    if isinstance(result, tuple):
        return tuple(map(unwritten, result))
    broken = result.clone()
    if broken.numel():
        broken.view(-1)[-1] = float("nan")
    return broken


def broken_kernel(kernel, change):
    return lambda *arguments: change(kernel(*arguments))


@each_pair
@pytest.mark.parametrize("change", [scaled, unwritten])
@pytest.mark.parametrize("check", ["value", "gradient"])
def test_a_broken_kernel_is_caught(spec, change, check, monkeypatch):
    """Three units in 10^6 are far less than a formula gone wrong, and are seen in every loss."""
    choice.resolve("cpu", torch.float32, "cpp")
    kernels = choice.KERNELS["cpp"]
    directions = ("forward",) if check == "value" else ("backward", "with_gradient", "with_gradients")
    names = [name for name in kernels._fields if name.endswith(directions)]
    broken = {name: broken_kernel(getattr(kernels, name), change) for name in names}
    monkeypatch.setitem(choice.KERNELS, "cpp", kernels._replace(**broken))
    sample = spec.samples()[0]
    loss, reference = spec.build(sample, "cpp"), spec.build(sample, "reference")
    report = check_loss(loss, reference, [sample], dtypes=[torch.float32], checks=[check], raise_on_fault=False)
    assert not report.ok


def test_unwritten_memory_is_poisoned():
    """What the suite relies on to see an element that no kernel wrote, in torch and through the stable ABI."""
    assert torch.empty(1000).isnan().all()


def test_a_report_reads_well():
    pair = torch.randn(4, 3), torch.randn(4, 3)
    report = check_loss(
        with_gradients(wrong_scale), reference, [pair], checks=["value", "gradient", "copies"], raise_on_fault=False
    )
    text = str(report)
    assert "gradient" in text and "FAULT" in text and "> budget" in text and "sample 0" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("copies")] == [["copies", "-"]]
    with pytest.raises(ValueError, match="there is no check nonsense"):
        check_loss(reference, reference, [pair], checks=["nonsense"])


def test_an_exception_is_a_fault_and_the_cause():
    def raises(x, t):
        raise KeyError("gone")

    with pytest.raises(AssertionError, match="KeyError: 'gone'") as caught:
        check_loss(raises, reference, [(torch.ones(2), torch.ones(2))], checks=["value"])
    assert isinstance(caught.value.__cause__, KeyError)
