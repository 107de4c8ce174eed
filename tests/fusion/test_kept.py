"""Losses that keep tensors from one call to the next: buffers they move along, and attributes they leave for others."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from fused_losses import fuse


class Dino(nn.Module):
    """Caron et al., 2021: the teacher is centred by a moving mean, which is assigned."""

    def __init__(self, classes=5, momentum=0.9):
        super().__init__()
        self.register_buffer("center", torch.zeros(1, classes))
        self.momentum = momentum

    def forward(self, student, teacher):
        targets = F.softmax((teacher - self.center) / 0.04, dim=-1).detach()
        loss = (-targets * F.log_softmax(student / 0.1, dim=-1)).sum(-1).mean()
        self.update_center(teacher)
        return loss

    @torch.no_grad()
    def update_center(self, teacher):
        self.center = self.center * self.momentum + teacher.mean(0, keepdim=True) * (1 - self.momentum)


class InPlace(nn.Module):
    """The same written in place, with a count, in a submodule."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Module()
        self.mean.register_buffer("value", torch.zeros(5))
        self.mean.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, t):
        if self.training:
            with torch.no_grad():
                self.mean.value.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.mean.calls += 1
        return (x - self.mean.value - t).square().mean() / self.mean.calls


class OfClasses(nn.Module):
    """Means of classes, written at places."""

    def __init__(self):
        super().__init__()
        self.register_buffer("means", torch.zeros(3, 5))

    def forward(self, x, t):
        loss = (x - self.means[0]).abs().mean()
        self.means[1:] = t.detach().mean(0)
        self.means[:, 2] = 0.5
        return loss


class Normalized(nn.Module):
    """By the size that the first call had, and what the last one had, in attributes that are no buffers."""

    def __init__(self):
        super().__init__()
        self.first = None

    def forward(self, x, t):
        error = (x - t).square().mean(1)
        if self.first is None:
            self.first = error.detach().mean()
        self.errors = error.detach()
        return error.mean() / self.first


class Reported(nn.Module):
    """Its parts stay where a log may read them, with their graph."""

    def forward(self, x, t):
        self.near, self.far = F.l1_loss(x, t), F.mse_loss(x, t)
        self.total = self.near + self.far
        return self.total


class Logged(nn.Module):
    """Its parts in dictionaries: one that is made anew, and one that others hold."""

    def __init__(self):
        super().__init__()
        self.held = self.log = {"calls": 0}

    def forward(self, x, t):
        near, far = F.l1_loss(x, t), F.mse_loss(x, t)
        self.parts = {"near": near.detach(), "all": [far.detach(), x.detach().amax(0)]}
        self.log["far"] = far.detach()
        return near + far


LOSSES = [Dino, InPlace, OfClasses, Normalized, Reported, Logged]


def pair(device, rows=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(rows, 5, generator=generator), torch.rand(rows, 5, generator=generator)
    return x.to(device).requires_grad_(), t.to(device)


def kept_by(loss):
    """Every tensor that a loss holds, by name."""
    own = [*vars(nn.Module()), "_fusion"]
    attributes = {name: value for name, value in vars(loss).items() if name not in own}
    return {**tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, attributes), **loss.state_dict()}


def step(loss, x, t):
    value = loss(x, t)
    return value, *torch.autograd.grad(1.5 * value, x)


@pytest.mark.parametrize("kind", LOSSES)
def test_keeps_what_the_plain_loss_keeps(kind, each_device):
    plain, loss = kind().to(each_device), fuse(kind().to(each_device), strict=True)
    for call in range(4):
        x, t = pair(each_device, 7 if call < 3 else 4, seed=call)
        torch.testing.assert_close(step(loss, x, t), step(plain, x, t))
        torch.testing.assert_close(kept_by(loss), kept_by(plain))
    with torch.no_grad():
        torch.testing.assert_close(loss.eval()(x, t), plain.eval()(x, t))
    torch.testing.assert_close(kept_by(loss), kept_by(plain))
    assert loss.explain().reason is None


@pytest.mark.parametrize("kind", LOSSES)
def test_backward_keeps_nothing(kind):
    """Twice, and doubly, through the plain loss: what is kept stays as forward left it."""
    x, t = pair("cpu")
    plain, loss = kind(), fuse(kind(), strict=True)
    results = []
    for each in (plain, loss):
        each(*pair("cpu", seed=1))
        value = each(x, t)
        once, again = (torch.autograd.grad(value, x, retain_graph=True) for _ in range(2))
        doubly = [torch.autograd.grad(value, x, create_graph=True)[0] for _ in range(2)]
        twice = [torch.autograd.grad(g.square().sum() + x.sum(), x, retain_graph=True) for g in doubly]
        results.append((value, once, again, twice, kept_by(each)))
    torch.testing.assert_close(*results)


def test_a_dictionary_stays_the_one_that_others_hold():
    loss = fuse(Logged(), strict=True)
    for seed in range(4):
        loss(*pair("cpu", seed=seed))
        assert loss.held is loss.log and loss.log["far"] is loss.held["far"]
    assert sum(map(len, loss._fusion._patterns.values())) == 2  # before there were parts, and since


def test_what_was_kept_with_its_graph_ties_no_call_to_the_last():
    loss = fuse(Reported(), strict=True)
    for seed in range(3):
        before = getattr(loss, "total", None)
        loss(*pair("cpu", seed=seed)).backward()
        assert loss.near.requires_grad and loss.total is not before
        inputs = {type(node).__name__ for node, _ in loss.total.grad_fn.next_functions if node is not None}
        assert inputs == {"AccumulateGrad"}


def test_the_gradient_of_a_part_that_is_kept():
    x, t = pair("cpu")
    results = []
    for loss in (Reported(), fuse(Reported(), strict=True)):
        loss(x, t)
        results.append(torch.autograd.grad(loss.near + 2 * loss.far, x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_goes_on_for_itself(copied):
    x, t = pair("cpu")
    loss = fuse(Dino(), strict=True)
    loss(x, t)
    other, center = copied(loss), loss.center.clone()
    other(x, t)
    torch.testing.assert_close(loss.center, center)
    assert not torch.equal(other.center, center)


def test_few_traces_serve_what_changes():
    loss = fuse(Dino(), strict=True)
    for seed in range(5):
        loss(*pair("cpu", seed=seed))
    assert sum(map(len, loss._fusion._patterns.values())) == 1


def in_a_list(module, x):
    module.seen.append(x.detach())


def a_number(module, x):
    module.count += 1


def a_parameter(module, x):
    module.scale = nn.Parameter(torch.ones(()))


def to_what_another_is(module, x):
    module.log = module.other


def an_argument(module, x):
    x.detach().clamp_(min=0)


class Changing(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.seen, self.count, self.change = [], 0, change
        self.log, self.other = {}, {"epoch": 3}
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("center", torch.zeros(7, 5))

    def forward(self, x, t):
        self.change(self, x)
        return (x - t + self.center.mul_(0.5)).square().sum() * self.scale


REFUSED = {
    in_a_list: "changes its attribute seen",
    a_number: "changes its attribute count",
    a_parameter: "changes its attribute scale",
    to_what_another_is: "changes its attribute log",
    an_argument: "writes into an argument",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_else_changes_runs_plain(change):
    x, t = pair("cpu")
    plain, loss = Changing(change), fuse(Changing(change))
    for each in (plain, loss):
        with torch.no_grad():
            each.center.add_(1.0)
    with pytest.warns(UserWarning, match=REFUSED[change]):
        torch.testing.assert_close(loss(x, t), plain(x, t))
    torch.testing.assert_close(loss.center, plain.center)
    torch.testing.assert_close((loss.seen, loss.count, loss.log), (plain.seen, plain.count, plain.log))


def test_a_buffer_that_is_an_argument_too_is_not_written_by_kernels():
    loss = fuse(Changing(lambda module, x: None))
    with pytest.warns(UserWarning, match="writes into an argument"):
        loss(loss.center.requires_grad_(False), torch.ones(7, 5))


def test_a_double_backward_is_of_the_loss_as_it_was_called():
    class Powered(nn.Module):
        power, reduction = 3, "mean"

        def __init__(self):
            super().__init__()
            self.power, self.reduction = 3, "mean"

        def forward(self, x):
            return getattr(x**self.power, self.reduction)()

    x = pair("cpu")[0]
    results = []
    for loss in (Powered(), fuse(Powered(), strict=True)):
        value = loss(x)
        loss.power, loss.reduction = 2, "sum"
        results.append(torch.autograd.grad(value, x, create_graph=True))
    torch.testing.assert_close(*results)
