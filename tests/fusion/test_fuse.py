"""What fuse promises of a module, a function and a class beside speed."""

import copy
import functools
import inspect
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses import fuse
from fused_losses.fusion import runtime
from fused_losses.fusion.compiler import BuildError, python_file
from fused_losses.fusion.programs import MOST_TRACES
from fused_losses.testing import check_loss


class Focal(nn.Module):
    """A loss with everything: open numbers, a reduction, a parameter and a buffer."""

    def __init__(self, gamma=2.0, reduction="mean"):
        super().__init__()
        self.gamma, self.reduction = gamma, reduction
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("weight", torch.linspace(0.5, 2.0, 7))

    def forward(self, input, target):
        p = input.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(input, target, reduction="none")
        loss = self.scale * self.weight * entropy * (1 - p * target - (1 - p) * (1 - target)) ** self.gamma
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()


@fuse
class Decorated(nn.Module):
    def __init__(self):
        super(Decorated, self).__init__()  # noqa: UP008  as many still write it
        self.delta = 0.5

    def forward(self, input, target):
        return F.huber_loss(input, target, delta=self.delta)


@fuse
def charbonnier(input, target, eps=1e-3, *, power=0.5):
    """A smooth absolute error."""
    return ((input - target).square() + eps**2).pow(power).mean()


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.rand(*shape, generator=generator)


def built(loss):
    """How many programs were built for a loss."""
    return sum(map(len, loss._fusion._patterns.values()))


@pytest.fixture(scope="module")
def focal():
    return fuse(Focal(), strict=True)


def test_module(focal):
    plain = Focal()
    check_loss(focal, plain, [pair(5, 7)], dtypes=[torch.float64, torch.float32])


def test_a_fused_module_is_the_loss(focal):
    plain = Focal()
    fused = fuse(plain)
    assert isinstance(fused, Focal) and fused.state_dict().keys() == plain.state_dict().keys()
    assert fused.scale is plain.scale and "Focal" in repr(fused)
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    fused.gamma = 4.0
    assert plain.gamma == 4.0
    fused.double()
    assert plain.weight.dtype is torch.float64
    fused.load_state_dict({"scale": torch.tensor(2.0), "weight": torch.ones(7)})
    assert plain.scale.item() == 2.0
    assert fuse(fused) is fused


def test_numbers_reduction_and_parameters_are_read_in_every_call():
    plain = Focal()
    fused, x = fuse(copy.deepcopy(plain), strict=True), pair(5, 7)
    for gamma in (2.0, 3.0, 0.5):
        fused.gamma = plain.gamma = gamma
        torch.testing.assert_close(fused(*x), plain(*x))
    assert built(fused) == 1
    for reduction in ("sum", "none", "mean"):
        fused.reduction = plain.reduction = reduction
        torch.testing.assert_close(fused(*x), plain(*x))
    assert built(fused) == 3
    with torch.no_grad():
        fused.scale.mul_(2)
        plain.scale.mul_(2)
    fused.weight = plain.weight = torch.ones(7)
    torch.testing.assert_close(fused(*x), plain(*x))
    assert built(fused) == 3


def test_an_attribute_may_change_its_kind():
    fused, x = fuse(Focal(), strict=True), pair(5, 7)
    for gamma in (2, torch.tensor(3.0), 2.0):
        fused.gamma = gamma
        expected = Focal(gamma)(*x)
        torch.testing.assert_close(fused(*x), expected)
    fused.extra = "new"
    torch.testing.assert_close(fused(*x), expected)


class Multiple(nn.Module):
    options = None

    def forward(self, x):
        return x.sum() * (3 if self.options[0] is True else self.options[0])


def test_equal_values_of_other_kinds():
    loss, x = fuse(Multiple(), strict=True), torch.ones(2)
    for option, expected in ((1, 2.0), (True, 6.0), (1.0, 2.0), (float("nan"), float("nan"))):
        loss.options = [option]
        torch.testing.assert_close(loss(x), torch.tensor(expected), equal_nan=True)
    before = built(loss)
    loss.options = [float("nan")]
    loss(x)
    assert built(loss) == before


def test_patterns():
    """Sizes are open; ranks, dtypes, what requires grad, and sizes that are 1 or equal are not."""
    loss = fuse(lambda x, y: (x - y).square().mean(), strict=True)
    with torch.no_grad():
        for shape in ((5, 7), (9, 4), (64, 33)):
            loss(*pair(*shape))
        assert built(loss) == 1
        loss(*pair(6, 6))
        assert built(loss) == 2
        torch.testing.assert_close(loss(torch.ones(5, 1), torch.zeros(5, 7)), torch.tensor(1.0))
        loss(*(t.double() for t in pair(5, 7)))
        assert built(loss) == 4
    loss(pair(5, 7)[0].requires_grad_(), pair(5, 7)[1])
    assert built(loss) == 5
    with torch.no_grad():
        loss(*pair(11, 7))
    assert built(loss) == 5
    assert loss(torch.zeros(0, 3), torch.zeros(0, 3)).isnan()


def test_a_loss_that_asks_for_gradients():
    loss, x = fuse(lambda x: x.sum() * (2 if x.requires_grad else 1), strict=True), torch.ones(3)
    assert loss(x.requires_grad_()).item() == 6 and loss(x.detach()).item() == 3


def test_code_that_depends_on_sizes_and_numbers():
    class Choosy(nn.Module):
        threshold = 0.0

        def __init__(self):
            super().__init__()
            self.margin = 1.0

        def forward(self, x):
            scale = 2.0 if x.shape[0] > 8 else 1.0
            return (x * scale).sum() if self.margin > 0.5 else x.sum() * self.margin

    loss = fuse(Choosy(), strict=True)
    for rows in (5, 6, 9, 12):
        for loss.margin in (1.0, 0.7, 0.25, 0.125):
            x = torch.ones(rows)
            torch.testing.assert_close(loss(x), type(loss)._plain_forward(loss, x))
    assert built(loss) == 4


def test_a_number_beside_a_size_that_code_depends_on():
    """It is looked at in every call, where the sizes are known from the first."""

    class Smoothed(nn.Module):
        def __init__(self):
            super().__init__()
            self.smoothing = 0.1

        def forward(self, x):
            return x.topk(int(self.smoothing * x.shape[1])).values.sum()

    loss = fuse(Smoothed(), strict=True)
    for loss.smoothing in (0.1, 0.1, 0.3, 0.1):
        for columns in (40, 60):
            x, _ = pair(3, columns)
            torch.testing.assert_close(loss(x), type(loss)._plain_forward(loss, x))


def test_numbers_that_fill_a_tensor_are_open():
    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.smoothing = 0.1

        def forward(self, x, t):
            share = torch.full((x.shape[0],), 1.0 / x.shape[0])
            smooth = torch.full_like(x, self.smoothing).masked_fill(t > 0.5, self.smoothing / x.shape[1])
            rest = torch.zeros_like(x).fill_(self.smoothing / (x.size(1) - 1))
            return (share[:, None] * (x - smooth - rest).square()).sum()

    loss = fuse(Uniform(), strict=True)
    for loss.smoothing in (0.1, 0.3):
        for shape in ((5, 7), (9, 4)):
            torch.testing.assert_close(loss(*pair(*shape)), type(loss)._plain_forward(loss, *pair(*shape)))
    assert built(loss) == 1


def test_too_many_traces_end_in_the_plain_loss():
    loss = fuse(lambda x, n: x.sum() * (1.0 if n > 0 else 2.0) * float(n))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(MOST_TRACES + 3):
            assert loss(torch.ones(2), k + 0.5).item() == 2 * (k + 0.5)
    assert len(caught) == 1 and "depends on" in str(caught[0].message)


def test_too_many_whole_numbers_end_in_the_plain_loss():
    loss = fuse(lambda x, epoch: x.sum() * min(1, epoch / 100))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(MOST_TRACES + 3):
            torch.testing.assert_close(loss(torch.ones(2), epoch), torch.tensor(epoch / 50))
    assert built(loss) == MOST_TRACES and len(caught) == 1 and "make a float" in str(caught[0].message)
    loss(torch.ones(2), 0.5)
    assert loss.explain().reason is None


WEIGHT = torch.tensor([1.0, 2.0])
FACTOR = 2.0


def around(x):
    return (helper(x) * WEIGHT * FACTOR).sum()


def helper(x):
    return x * FACTOR


def test_names_around_a_function(monkeypatch):
    loss, x = fuse(around, strict=True), torch.ones(3, 2)
    assert loss(x).item() == 36
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert loss(x).item() == 81
    WEIGHT.mul_(2)
    assert loss(x).item() == 162
    WEIGHT.div_(2)


def test_learnt_tensors_around_a_function_get_gradients():
    weight = torch.ones(2, requires_grad=True)
    fuse(lambda x: (x * weight).sum(), strict=True)(torch.full((3, 2), 2.0)).backward()
    assert weight.grad.tolist() == [6, 6]


def test_function():
    plain = charbonnier.__wrapped__
    check_loss(charbonnier, plain, [pair(4, 3)], dtypes=[torch.float32])
    assert charbonnier.__name__ == "charbonnier" and "smooth" in charbonnier.__doc__
    assert inspect.signature(charbonnier) == inspect.signature(plain)
    assert pickle.loads(pickle.dumps(charbonnier)) is charbonnier
    x, t = pair(4, 3)
    torch.testing.assert_close(charbonnier(x, t, 0.1, power=0.25), plain(x, t, 0.1, power=0.25))
    torch.testing.assert_close(charbonnier(target=t, input=x), plain(x, t))


def test_class():
    loss = Decorated()
    check_loss(loss, lambda *a: Decorated._plain_forward(loss, *a), [pair(4, 3)], dtypes=[torch.float32])
    assert type(pickle.loads(pickle.dumps(loss))) is Decorated and loss.explain(*pair(4, 3)).reason is None


def test_in_place_on_a_result_that_backward_reads():
    def total_and_root(x):
        total = x.square().sum()
        return total, total.sqrt()

    x = torch.ones(4, requires_grad=True)
    total, root = fuse(total_and_root, strict=True)(x)
    total.div_(2)
    root.backward()
    torch.testing.assert_close(x.grad, torch.full((4,), 0.5))


def test_fallbacks_warn_once_and_strict_raises():
    def branching(x):
        return x.sum() if x.mean() > 0 else -x.sum()

    loss, x = fuse(branching), -torch.ones(3)
    with pytest.warns(UserWarning, match=r"branching runs as plain torch.*reads the value.*test_fuse.py:") as caught:
        assert loss(x).item() == loss(x).item() == 3
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "reads the value" in loss.explain().reason
    with pytest.raises(RuntimeError, match="branching cannot be fused"):
        fuse(branching, strict=True)(x)


def test_tensors_without_elements():
    loss = fuse(F.mse_loss)
    assert loss(torch.ones(3, device="meta"), torch.ones(3, device="meta")).device.type == "meta"


def test_what_torch_brings_in_order_in_memory_first():
    x = torch.randn(5, 4).t()
    torch.testing.assert_close(fuse(lambda x: F.pdist(x).mean(), strict=True)(x), F.pdist(x).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_what_a_loss_rounds_is_rounded(low, dtype):
    """An error of quantisation is not 0, as it would be without the cast in between; nor is what overflows finite."""

    @functools.partial(fuse, strict=True)
    def error(x):
        return x.to(low).to(x.dtype) - 0.5 * x

    numbers = [1.0, 0.1, -1 / 3, 1e-6, 70000.0, 3.4e38, float("nan"), -float("inf"), *torch.randn(50).tolist()]
    x = torch.tensor(numbers, dtype=dtype, requires_grad=True)
    assert torch.equal(error(x).nan_to_num(7.0), error.__wrapped__(x).nan_to_num(7.0))
    (gradient,) = torch.autograd.grad(error(x).sum(), x)
    assert (gradient == 0.5).all()


def test_distributions_fuse_unless_they_check_what_they_are_given():
    def elbo(mean, scale, logits, labels, **options):
        posterior, prior = D.Normal(mean, scale, **options), D.Normal(torch.zeros_like(mean), 1.0, **options)
        choice = D.Categorical(logits=logits, **options)
        return D.kl_divergence(posterior, prior).mean() - choice.log_prob(labels).mean() - choice.entropy().mean()

    mean, scale, logits = (torch.rand(n, dtype=torch.float64, requires_grad=True) for n in ((6, 3), (6, 3), (6, 4)))
    given = mean, scale, logits, torch.randint(4, (6,))
    checking = fuse(functools.partial(elbo, validate_args=True))
    unchecked = fuse(functools.partial(elbo, validate_args=False), strict=True)
    with pytest.warns(UserWarning, match=r"torch.distributions reads.*pass validate_args=False.*test_fuse.py:"):
        plain = checking(*given)
    fused = unchecked(*given)
    torch.testing.assert_close(fused, plain)
    for own, other in zip(*(torch.autograd.grad(loss, given[:3]) for loss in (fused, plain))):
        torch.testing.assert_close(own, other)
    assert not unchecked.explain().externs


def test_a_loss_with_side_effects_runs_as_it_is():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.seen = 0, []

        def forward(self, x):
            self.calls += 1
            self.seen.append(x)
            return x.sum()

    loss = fuse(Counting())
    with pytest.warns(UserWarning, match="changes its attribute (calls|seen)"):
        loss(torch.ones(3))
    assert loss.calls == len(loss.seen) and all(type(x) is torch.Tensor for x in loss.seen)
    before = loss.calls
    loss(torch.ones(3))
    assert loss.calls == before + 1


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python(draw):
    loss = fuse(lambda x: x.sum() * draw())
    for seed in (random.seed, np.random.seed):
        seed(1)
    with pytest.warns(UserWarning, match="draws random numbers in Python"):
        found = [loss(torch.ones(1)).item() for _ in range(2)]
    for seed in (random.seed, np.random.seed):
        seed(1)
    assert found == pytest.approx([draw(), draw()]) and found[0] != found[1]


def test_errors_of_the_loss_itself():
    with pytest.raises(RuntimeError, match="must match the size"):
        charbonnier(torch.ones(3), torch.ones(4))
    with pytest.raises(IndexError):
        fuse(F.nll_loss, strict=True)(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="a class of modules or a function"):
        fuse(3)


def test_tensors_that_lose_all_elements_are_traced_apart():
    @fuse(strict=True)
    def counted(x):
        return x.sum() + torch.ones(x.size(0) - 2).sum()

    assert [counted(torch.ones(n)).item() for n in (5, 4, 2)] == [8, 6, 2]
    assert built(counted) == 2


def test_modes_in_which_the_plain_loss_runs():
    x, t = pair(5, 7)
    loss = fuse(Focal())
    with fused_losses.use_backend("reference"):
        loss(x, t)
    torch.func.vmap(loss)(x[None], t[None])
    with torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(x, x), t)
    assert loss._fusion.last is None


def test_checkpoints():
    """Their hooks take what is saved, while a loss is traced as well."""
    x, t = pair(5, 7)
    gradients = []
    for loss in (fuse(Focal(), strict=True), Focal()):
        leaf = x.clone().requires_grad_()
        checkpoint(lambda x, loss=loss: loss(2 * x, t), leaf, use_reentrant=False).backward()
        gradients.append((leaf.grad, loss.scale.grad))
    torch.testing.assert_close(*gradients)


def test_targets_of_inference_mode():
    """They cannot be saved for backward, which the plain loss may not need."""
    loss = fuse(lambda x, t: (x - t).abs().mean(), strict=True)
    with torch.inference_mode():
        x, t = pair(5, 7)
        assert loss(x, t) == loss.__wrapped__(x, t)
    x = x.clone().requires_grad_()
    torch.testing.assert_close(*[torch.autograd.grad(f(x, t), x) for f in (loss, loss.__wrapped__)])


def test_a_tensor_that_outlived_a_transform():
    kept = []
    x, t = pair(5, 7)
    torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(charbonnier(kept[0], t), charbonnier(x, t))


def test_results_lie_where_the_arguments_do():
    """Whatever the default device is."""
    x, t = pair(5, 7)
    expected = charbonnier(x, t)
    with torch.device("meta"):
        found = charbonnier(x, t)
    torch.testing.assert_close(found, expected)


def test_autocast():
    @fuse(strict=True)
    def similarity(x, y):
        return F.cross_entropy(x @ y.t(), torch.arange(x.size(0)))

    x, y = (t.requires_grad_() for t in pair(6, 4))
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found, expected = similarity(x, y), similarity.__wrapped__(x, y)
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
        pairs = [torch.autograd.grad(value, [x, y]) for value in (found, expected)]
        torch.testing.assert_close(*pairs, atol=2e-2, rtol=2e-2)
    assert built(similarity) == 2


def test_a_compiled_model_that_contains_one():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.loss = nn.Linear(7, 7), fuse(Focal())

        def forward(self, x, t):
            return self.loss(self.layer(x), t) + charbonnier(x, t)

    model = Model()
    compiled, (x, t) = torch.compile(model, fullgraph=True, backend="aot_eager"), pair(5, 7)
    for model.loss.gamma in (2.0, 3.0):
        results = [call(x, t) for call in (compiled, model)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(result, list(model.parameters())) for result in results))


def test_explanation_and_source(focal):
    focal(*pair(5, 7))
    explanation = focal.explain()
    assert explanation.reason is None and not explanation.externs and "sum over" in str(explanation)
    assert "extern" in focal.source("cpp")
    for text in focal.source("triton").split('"""Kernels of a fused loss, generated."""')[1:]:
        compile(text, "source", "exec")
        assert "tl.store(" in text
    with pytest.raises(ValueError, match="cpp"):
        focal.source("fortran")
    with pytest.raises(RuntimeError, match="call the loss first"):
        fuse(Focal()).explain()
    partly = fuse(lambda x: (x @ x.t()).exp().mean(), strict=True)
    assert partly.explain(torch.ones(3, 2)).externs == ("aten.mm.default",)


def test_devices_without_kernels_say_why(focal, monkeypatch):
    focal(*pair(5, 7))
    program = focal._fusion.last.lowered.forward
    with pytest.raises(BuildError, match="meta tensors here: it runs on cuda tensors"):
        runtime.compile_program(program, torch.device("meta"))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(BuildError, match="AMD"):
        runtime.compile_program(program, torch.device("cuda"))


def test_generated_python_is_kept_and_repaired(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LOSSES_CACHE", str(tmp_path / "cache"))
    path = python_file("x = 1\n")
    assert path.read_text() == "x = 1\n" and python_file("x = 1\n") == path != python_file("x = 2\n")
    path.write_text("x = ")
    python_file("x = 1\n")
    assert path.read_text() == "x = 1\n" and len(list(path.parent.iterdir())) == 2
    path.parent.chmod(0o777)
    with pytest.raises(BuildError, match="chmod 700"):
        python_file("x = 1\n")


def test_copies_keep_strictness_and_build_for_themselves(focal):
    for twin in (copy.deepcopy(focal), pickle.loads(pickle.dumps(focal))):
        assert twin._fusion.strict and twin._fusion is not focal._fusion and twin.scale is not focal.scale
        x = pair(5, 7)
        torch.testing.assert_close(twin(*x), focal(*x))
