"""Callbacks that train, in our learner and in a stand-in of miniai's, against a loop in plain torch."""

import types

import miniai
import pytest
import torch
from learning import (
    BOTH,
    RATE,
    Custom,
    Entropy,
    accuracy,
    assert_alike,
    data,
    loaders,
    model,
    trained,
)
from torch import nn

import fused_losses
from fused_losses.integrations.learner import (
    AccelerateCB,
    AccelerateCustomCB,
    Callback,
    CancelEpochException,
    CancelFitException,
    DeviceCB,
    Learner,
    MetricsCB,
    ProgressCB,
    TrainCB,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Taught(AccelerateCB):
    def get_loss(self, learn):
        self.loss = learn.loss_func(learn.preds)

    def backward(self, learn):
        self.acc.backward(self.loss)


class TaughtWithTargets(AccelerateCB):
    def get_loss(self, learn):
        self.loss = learn.loss_func(learn.preds, learn.batch[1])

    def backward(self, learn):
        self.acc.backward(self.loss)


@BOTH
@pytest.mark.parametrize("callback", [Taught, AccelerateCustomCB])
def test_the_taught_pattern(kind, callback):
    """Of the predictions alone, twice, beside metrics and progress."""
    shared, metrics = callback(), MetricsCB(accuracy)
    learn = kind(model(), loaders(), Entropy(), RATE, [shared, metrics, ProgressCB()])
    losses = []
    for _ in range(2):
        learn.fit(1)
        losses.append(metrics.history[0]["loss"])
        assert shared.loss is learn.loss
    expected, means = trained(model(), lambda predictions, targets: Entropy()(predictions), epochs=2)
    assert_alike(learn.model, expected)
    assert losses == pytest.approx(means, abs=1e-6)


@BOTH
@pytest.mark.parametrize("callback", [TaughtWithTargets, AccelerateCB, TrainCB])
@pytest.mark.parametrize("loss", [fused_losses.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss()])
def test_losses_with_targets(kind, callback, loss):
    metrics = MetricsCB(accuracy)
    learn = kind(model(), loaders(), loss, RATE, [callback(), metrics])
    learn.fit(2)
    expected, means = trained(model(), loss, epochs=2)
    assert_alike(learn.model, expected)
    training, evaluation = metrics.history[::2], metrics.history[1::2]
    assert [line["loss"] for line in training] == pytest.approx(means, abs=1e-6)
    inputs, targets = data().tensors
    outputs = expected(inputs)
    assert evaluation[-1]["loss"] == pytest.approx(loss(outputs, targets).item(), abs=1e-6)
    assert evaluation[-1]["accuracy"] == pytest.approx(accuracy(outputs, targets).float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("callback", [Taught, AccelerateCB])
def test_callbacks_of_miniai_beside_ours(callback, capsys):
    loss = Entropy() if callback is Taught else nn.CrossEntropyLoss()
    stock, bar, ours = miniai.MetricsCB(), miniai.ProgressCB(), MetricsCB(accuracy)
    learn = miniai.Learner(model(), loaders(), loss, RATE, [callback(), stock, bar])
    learn.fit(2)
    Learner(model(), loaders(), loss, RATE, [callback(), ours]).fit(2)
    assert [eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")] == bar.lines
    # And the other way round: their metrics in our learner, below our bar.
    mixed = miniai.MetricsCB()
    Learner(model(), loaders(), loss, RATE, [callback(), mixed, ProgressCB()]).fit(2)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown == [list(bar.lines[0])] + [[str(value) for value in line.values()] for line in bar.lines]


@BOTH
@pytest.mark.parametrize("callback", [TrainCB, AccelerateCB])
def test_what_a_loss_learns(kind, callback):
    custom = Custom()
    learn = kind(model(), loaders(), custom, RATE, [callback(), MetricsCB()])
    learn.fit(1)
    learn.fit(1)
    reference = Custom()
    expected, _ = trained(model(), reference, epochs=2, parameters=reference.parameters())
    assert_alike(learn.model, expected)
    assert_alike(custom, reference)
    assert custom.scale.item() != 1.5


class Placed(Custom):
    device = None

    def to(self, device):
        self.device = torch.device(device)
        return super().to(device)


@BOTH
def test_losses_move_to_the_device(kind):
    loss = Custom()
    learn = kind(model(), loaders(), loss, RATE, [DeviceCB("meta"), TrainCB()])
    learn.fit(1)
    assert loss.weight.is_meta and learn.loss.is_meta
    placed, shared = Placed(learns=False), AccelerateCB()
    kind(model(), loaders(), placed, RATE, [shared]).fit(1)
    assert placed.device == shared.acc.device


def test_default_device_and_nested_batches():
    callback = DeviceCB()
    assert callback.device == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    callback.device = "meta"
    learn = types.SimpleNamespace(batch={"inputs": [torch.ones(2)], "names": ("a", torch.ones(1))})
    callback.before_batch(learn)
    assert learn.batch["inputs"][0].is_meta and learn.batch["names"][0] == "a" and learn.batch["names"][1].is_meta


@BOTH
def test_accumulation_with_an_incomplete_group(kind):
    """7 batches, 3 to a step: the last step has one, and is its mean."""
    steps = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    shared = AccelerateCB(gradient_accumulation_steps=3)
    learn = kind(model(), loaders(), nn.CrossEntropyLoss(), RATE, [shared], Counting)
    for _ in range(2):
        learn.fit(1)
    expected, _ = trained(model(), nn.CrossEntropyLoss(), epochs=2, groups=3)
    assert_alike(learn.model, expected)
    assert len(shared.acc._optimizers) == 1  # or clipping would unscale the first fit's once more
    assert len(steps) == 6 and shared.acc.gradient_accumulation_steps == 3


@pytest.mark.parametrize("exception", [CancelFitException, CancelEpochException])
def test_what_is_cancelled_between_two_steps_leaves_nothing_behind(exception):
    class Stop(Callback):
        def after_batch(self, learn):
            if learn.training and learn.epoch == 0:
                raise exception

    shared = AccelerateCB(gradient_accumulation_steps=3)
    learn = Learner(model(), loaders(), nn.CrossEntropyLoss(), RATE, [shared])
    learn.fit(2, cbs=Stop())
    if exception is CancelFitException:
        assert_alike(learn.model, model(), 0)
        learn.fit(1)
    assert_alike(learn.model, trained(model(), nn.CrossEntropyLoss(), groups=3)[0])


def test_the_loss_sees_fp32_of_a_bf16_model():
    seen = []
    net, metrics = model(), MetricsCB(accuracy)
    net[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def loss(predictions, targets):
        seen.append(predictions.dtype)
        return fused_losses.functional.cross_entropy(predictions, targets)

    learn = Learner(net, loaders(), loss, RATE, [AccelerateCB(mixed_precision="bf16"), metrics])
    learn.fit(1)
    assert set(seen[::2]) == {torch.bfloat16} and set(seen[1::2]) == {torch.float32}
    assert learn.loss.dtype is torch.float32
    expected, means = trained(model(), fused_losses.CrossEntropyLoss())
    assert_alike(net, expected, 2e-2)
    assert metrics.history[0]["loss"] == pytest.approx(means[0], abs=1e-2)


def test_fp16_on_a_cpu_raises():
    with pytest.raises(ValueError, match="on a CPU would run in fp32; use 'bf16'"):
        AccelerateCB(mixed_precision="fp16", cpu=True)
