"""The Learner's protocol, and its callbacks in our learner and in a stand-in of miniai's."""

import copy
import sys
import time
import types

import miniai
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_losses
from fused_losses.integrations.learner import (
    AccelerateCB,
    AccelerateCustomCB,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    DataLoaders,
    DeviceCB,
    Learner,
    LRFinderCB,
    MetricsCB,
    ProgressCB,
    TrainCB,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
BOTH = pytest.mark.parametrize("kind", [Learner, miniai.Learner], ids=["ours", "miniai"])
FEATURES, CLASSES, SAMPLES, BATCH, RATE = 6, 4, 26, 4, 0.5


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


class Entropy(nn.Module):
    """A loss of the predictions alone."""

    def forward(self, predictions):
        return torch.special.entr(predictions.softmax(1)).sum(1).mean()


class Custom(nn.Module):
    """A loss as people write them, with a buffer and something to learn."""

    def __init__(self, learns=True):
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 2.0, CLASSES))
        self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=learns)

    def forward(self, predictions, targets):
        return F.cross_entropy(predictions * self.scale, targets, self.weight) + self.scale.square() / 10


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator))


def loaders(batch=BATCH):
    return DataLoaders(DataLoader(data(), batch), DataLoader(data(), batch))


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def trained(net, loss, epochs=1, groups=1, parameters=()):
    """The net, and the mean loss of every epoch, by a loop in plain torch; ``groups`` batches make a step."""
    optimizer, means = torch.optim.SGD([*net.parameters(), *parameters], RATE), []
    batches = list(loaders().train)
    for _ in range(epochs):
        total = 0.0
        for first in range(0, len(batches), groups):
            group = batches[first : first + groups]
            losses = [loss(net(inputs), targets) for inputs, targets in group]
            torch.stack(losses).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            total += sum(value.item() * len(targets) for value, (_, targets) in zip(losses, group))
        means.append(total / SAMPLES)
    return net, means


def assert_alike(net, expected, tolerance=1e-6):
    for made, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(made, wanted, rtol=tolerance, atol=tolerance)


def accuracy(predictions, targets):
    return predictions.argmax(1) == targets


class Recorder(Callback):
    """Writes every event down, and cancels once where it is told to."""

    def __init__(self, cancel_at=None, exception=None):
        self.events, self.cancel_at, self.exception = [], cancel_at, exception

    def __getattr__(self, name):
        if not name.startswith(("before_", "after_", "cleanup_")) and name not in miniai.STEPS:
            raise AttributeError(name)

        def record(learn):
            self.events.append(name)
            if name == self.cancel_at:
                self.cancel_at = None
                raise self.exception

        return record


EVALUATION = ["before_batch", "predict", "after_predict", "get_loss", "after_loss", "after_batch", "cleanup_batch"]
TRAINING = [*EVALUATION[:5], "backward", "after_backward", "step", "after_step", "zero_grad", *EVALUATION[5:]]


def recorded(batches, **options):
    recorder = Recorder(**options)
    Learner(nn.Linear(1, 1), DataLoaders([0] * batches, [0]), cbs=recorder).fit(2)
    return recorder.events


def test_events():
    epochs = ["before_epoch", *TRAINING * 2, "after_epoch", "cleanup_epoch"]
    epochs += ["before_epoch", *EVALUATION, "after_epoch", "cleanup_epoch"]
    assert recorded(2) == ["before_fit", *epochs * 2, "after_fit", "cleanup_fit"]


@pytest.mark.parametrize(
    ("exception", "left_out"),
    [
        (CancelBatchException, {"after_batch": 1, "step": 1}),
        (CancelEpochException, {"after_batch": 2, "step": 2, "after_epoch": 1, "before_batch": 1}),
        (CancelFitException, {"after_fit": 1, "after_epoch": 4, "cleanup_epoch": 3, "cleanup_batch": 5}),
    ],
)
def test_cancelling(exception, left_out):
    events, all_events = recorded(2, cancel_at="after_loss", exception=exception), recorded(2)
    for event, missing in left_out.items():
        assert events.count(event) == all_events.count(event) - missing, event
    assert events.count("before_fit") == events.count("cleanup_fit") == 1


def test_order_and_what_belongs_to_one_fit():
    called = []
    early, late = Recorder(), Recorder()
    early.order, early.before_fit = -1, lambda learn: called.append("early")
    late.before_fit = lambda learn: called.append("late")
    learn = Learner(nn.Linear(1, 1), DataLoaders([]), cbs=[late])
    learn.fit(valid=False, cbs=[early])
    assert called == ["early", "late"] and learn.cbs == [late]


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


@BOTH
@pytest.mark.parametrize("callback", [TrainCB, AccelerateCB])
def test_the_finder_ends_where_the_loss_rises_and_puts_everything_back(kind, callback):
    loss = Custom()
    found = copy.deepcopy(loss)
    finder = LRFinderCB(gamma=2.0, max_lr=1e9)
    learn = kind(model(), loaders(), loss, RATE, [callback()])
    learn.fit(10, cbs=[finder], lr=1e-4)
    assert finder.rates[:3] == pytest.approx([1e-4, 2e-4, 4e-4])
    assert finder.losses[-1] > 3 * min(finder.losses) and len(finder.losses) < 40
    assert_alike(learn.model, model(), 0)
    assert_alike(loss, found, 0)


def test_the_finder_ends_at_nan_and_draws():
    learn = Learner(model(), loaders(), lambda p, t: p.sum() * float("nan"), cbs=TrainCB())
    assert len(learn.lr_find().losses) == 1
    learn.loss_func = F.cross_entropy
    finder = learn.lr_find(start_lr=1.0, gamma=2.0, max_mult=1e9)
    assert finder.rates == [1, 2, 4, 8]
    (line,) = finder.plot().get_lines()
    assert list(line.get_xdata()) == finder.rates and list(line.get_ydata()) == finder.losses
    sys.modules["matplotlib.pyplot"].close()


class Largest:
    """A metric as torcheval and torchmetrics have them."""

    def reset(self):
        self.value = -1e9

    def update(self, predictions, targets):
        self.value = max(self.value, predictions.max().item())

    def compute(self):
        return torch.tensor(self.value)


def test_metrics_with_a_state_and_names():
    metrics = MetricsCB(Largest(), accuracy, error=lambda p, t: (p.argmax(1) != t).float().mean())
    learn = Learner(model(), loaders(), F.cross_entropy, RATE, [TrainCB(), metrics])
    learn.fit(1)
    line = metrics.history[1]
    assert list(line) == ["Largest", "accuracy", "error", "loss", "epoch", "train"]
    assert line["Largest"] == pytest.approx(learn.model(data().tensors[0]).max().item())
    assert line["accuracy"] + line["error"] == pytest.approx(1)


def test_two_inputs_and_no_targets():
    class Distance(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(FEATURES, 3)

        def forward(self, first, second):
            return self.net(first) - self.net(second)

    dataset = TensorDataset(*[data().tensors[0]] * 2)
    metrics = MetricsCB(zero=lambda predictions: predictions.abs().amax(1))
    learn = Learner(Distance(), DataLoaders(DataLoader(dataset, 5)), lambda p: p.square().mean(), cbs=TrainCB(n_inp=2))
    learn.fit(1, valid=False, cbs=metrics)
    assert metrics.history[0]["zero"] == metrics.history[0]["loss"] == 0


def test_the_bar_reads_the_loss_when_it_is_drawn(monkeypatch, capsys):
    reads = []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or float(tensor.detach()))
    slow = Callback()
    slow.before_batch = lambda learn: time.sleep(0.15 * (learn.iter < 3))
    many = DataLoaders([(torch.ones(1, 1), torch.ones(1, 1))] * 300)
    learn = Learner(nn.Linear(1, 1), many, F.mse_loss, cbs=[slow, TrainCB(), MetricsCB(), ProgressCB()])
    learn.fit(1, valid=False)
    assert 2 <= len(reads) < 150
    assert "epoch 1/1 train:   1%" in (shown := capsys.readouterr().err) and ", loss=" in shown


def test_the_curve_in_a_file(tmp_path):
    picture = tmp_path / "loss.png"
    progress = ProgressCB(plot=picture)
    Learner(model(), loaders(), F.cross_entropy, RATE, [TrainCB(), progress]).fit(2)
    assert picture.stat().st_size > 5000 and len(progress.curve.losses) == 14
    assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_the_curve_in_a_notebook(monkeypatch):
    shown = []
    handle = types.SimpleNamespace(update=shown.append)
    display = types.SimpleNamespace(
        Image=lambda png: png, display=lambda image, display_id: shown.append(image) or handle
    )
    shell = types.SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell, display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    learn = Learner(model(), loaders(), F.cross_entropy, RATE, [TrainCB(), ProgressCB(plot=True)])
    learn.fit(2)
    assert len(shown) == 5 and all(png.startswith(b"\x89PNG") for png in shown) and shown[0] != shown[-1]


def test_a_curve_that_nobody_would_see_raises(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    learn = Learner(model(), loaders(), F.cross_entropy, RATE, [TrainCB(), ProgressCB(plot=True)])
    with pytest.raises(RuntimeError, match=r'no window with .* agg; plot="loss.png"'):
        learn.fit(1)


@pytest.mark.parametrize(("module", "made"), [("accelerate", AccelerateCB), ("tqdm.auto", ProgressCB)])
def test_what_is_missing_is_said(monkeypatch, module, made):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "fused_losses\[learner\]"'):
        made()


def test_errors_say_the_way_out():
    learn = Learner(model(), loaders(), F.cross_entropy)
    with pytest.raises(RuntimeError, match=r"no callback has predict.*add TrainCB\(\)"):
        learn.fit(1)
    with pytest.raises(ValueError, match=r"fit\(valid=False\)"):
        Learner(model(), DataLoaders([]), F.cross_entropy, cbs=TrainCB()).fit(1)

    class Forgot(Taught):
        def before_fit(self, learn):
            pass

    learn = Learner(model(), loaders(), Entropy(), cbs=Forgot())
    with pytest.raises(RuntimeError, match=r"super\(\).before_fit\(learn\)"):
        learn.fit(1)
    plain = DataLoaders([(torch.ones(1, FEATURES), torch.ones(1))])
    with pytest.raises(TypeError, match=r"must come from accelerator\.prepare"):
        Learner(model(), plain, F.cross_entropy, cbs=AccelerateCB()).fit(1, valid=False)
