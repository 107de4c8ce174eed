"""replace_losses: every loss of torch becomes ours where it is, keeps what it has, and comes back."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sets import each_drop_in
from torch import nn

import fused_losses
from fused_losses import functional, replace_losses
from fused_losses.integrations.learner import Learner


@each_drop_in
def test_modules_keep_what_they_have(spec):
    """The same object with the same values, options, state, hooks and mode; also with ours' own options to set."""
    sample = spec.samples()[0].to(torch.float64, "cpu")
    options = {n: value for n, value in sample.options.items() if n not in ("z_loss", "softcap", "temperature")}
    original = spec.original(**options).eval()
    calls, attributes = [], dict(vars(original))
    original.register_forward_hook(lambda *_: calls.append(1))
    expected, state = original(*sample.tensors), copy.deepcopy(original.state_dict())
    with replace_losses(original) as report:
        assert type(original) is spec.loss and report.replaced == [("(itself)", spec.name)]
        torch.testing.assert_close(original(*sample.tensors), expected)
        assert len(calls) == 2 and not original.training
        assert list(original.state_dict()) == list(state)
        assert vars(original).keys() == vars(spec.loss()).keys()
        original.backend = "reference"
    assert type(original) is spec.original and vars(original).keys() == attributes.keys()


class MyCrossEntropy(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.same = self.criterion
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.MSELoss(reduction="sum"))])
        self.function = F.cross_entropy
        self.smoothed = partial(F.cross_entropy, label_smoothing=0.2)
        self.losses = {"a": F.mse_loss, "b": [nn.L1Loss(), F.l1_loss]}
        self.pair = (nn.HuberLoss(delta=2.0), F.huber_loss)
        self.mine, self.other, self.another = MyCrossEntropy(), nn.MultiMarginLoss(), F.multi_margin_loss
        self.called = partial(nn.SmoothL1Loss(beta=2.0))
        self.changed = nn.MSELoss()
        self.changed.forward = lambda input, target: input.sum()
        self.ours = fused_losses.MSELoss()


FOUND = {
    "criterion": "CrossEntropyLoss",
    "blocks.0.1": "MSELoss",
    "function": "cross_entropy",
    "smoothed": "cross_entropy",
    "losses['a']": "mse_loss",
    "losses['b'][0]": "L1Loss",
    "losses['b'][1]": "l1_loss",
    "pair[0]": "HuberLoss",
    "called.func": "SmoothL1Loss",
}
LEFT = {
    "mine": "MyCrossEntropy, a subclass, which may compute something else",
    "other": "MultiMarginLoss, which fused_losses does not have",
    "another": "multi_margin_loss, which fused_losses does not have",
    "changed": "MSELoss, whose forward was replaced",
    "pair[1]": "huber_loss, in a tuple, which cannot be changed",
}


def test_everything_in_a_module():
    net = Net()
    report = replace_losses(net)
    assert dict(report.replaced) == FOUND and dict(report.left) == LEFT
    assert len(report.replaced) == len(FOUND)
    assert type(net.criterion) is fused_losses.CrossEntropyLoss and net.same is net.criterion
    assert net.criterion.label_smoothing == 0.1 and net.blocks[0][1].reduction == "sum" and net.pair[0].delta == 2.0
    assert net.function is functional.cross_entropy and net.losses["b"][1] is functional.l1_loss
    assert net.smoothed.func is functional.cross_entropy and net.smoothed.keywords == {"label_smoothing": 0.2}
    assert type(net.mine) is MyCrossEntropy and net.pair[1] is F.huber_loss and F.cross_entropy is not net.function
    lines = str(report).splitlines()
    assert lines[0] == "replaced" and "  criterion: CrossEntropyLoss" in lines and lines[len(FOUND) + 1] == "left"
    assert replace_losses(net).replaced == []


def test_undo():
    net, report = Net(), None
    functions = net.function, net.smoothed, dict(net.losses)
    report = replace_losses(net)
    net.losses["a"] = F.l1_loss  # set since: stays
    report.undo()
    report.undo()
    assert report.replaced == [] and str(report).startswith("left")
    assert type(net.criterion) is nn.CrossEntropyLoss and type(net.losses["b"][0]) is nn.L1Loss
    assert (net.function, net.smoothed) == functions[:2] and net.losses["a"] is F.l1_loss
    assert net.losses["b"][1] is F.l1_loss


def test_training_objects():
    learn = Learner(Net(), None, nn.CrossEntropyLoss())
    learn.loss_wrapper = SimpleNamespace(func=nn.BCEWithLogitsLoss(), axis=-1)  # as fastai keeps them
    learn.too_deep = SimpleNamespace(inner=SimpleNamespace(func=nn.MSELoss()))
    learn.myself, learn.torch, learn.kind = learn, torch.nn, Net
    places = dict(replace_losses(learn).replaced)
    assert places["loss_func"] == "CrossEntropyLoss" and places["model.criterion"] == "CrossEntropyLoss"
    assert places["loss_wrapper.func"] == "BCEWithLogitsLoss" and len(places) == len(FOUND) + 2
    assert type(learn.too_deep.inner.func) is nn.MSELoss and nn.functional.cross_entropy is F.cross_entropy
    trainer = SimpleNamespace(criterion=F.binary_cross_entropy)
    with replace_losses(trainer):
        assert trainer.criterion is functional.binary_cross_entropy
    assert trainer.criterion is F.binary_cross_entropy
    assert replace_losses({"loss": F.mse_loss}).replaced == [("['loss']", "mse_loss")]


def test_a_model_trains_on_and_its_head_keeps_its_parameters():
    loss = nn.LinearCrossEntropyLoss(4, 9, bias=True)
    optimizer = torch.optim.SGD(loss.parameters(), 0.1)
    inputs, targets = torch.randn(5, 4), torch.randint(9, (5,))
    expected = loss(inputs, targets).item()
    replace_losses(loss)
    value = loss(inputs, targets)
    value.backward()
    optimizer.step()
    assert value.item() == pytest.approx(expected, rel=1e-6) and loss(inputs, targets) < value


@pytest.mark.parametrize("target", [F.cross_entropy, nn.CrossEntropyLoss, 3, torch.nn])
def test_what_holds_no_loss_raises(target):
    with pytest.raises(TypeError, match="replace_losses"):
        replace_losses(target)


def test_nothing_found():
    assert str(replace_losses(nn.Linear(2, 2))) == "found no loss"
