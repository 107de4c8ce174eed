"""The Learner's events and errors, and the callbacks that look for a rate, keep count and show."""

import copy
import sys
import time
import types

import miniai
import pytest
import torch
import torch.nn.functional as F
from learning import BOTH, FEATURES, RATE, Custom, Entropy, accuracy, assert_alike, data, loaders, model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fused_losses.integrations.learner import (
    AccelerateCB,
    AccelerateCustomCB,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    DataLoaders,
    Learner,
    LRFinderCB,
    MetricsCB,
    ProgressCB,
    TrainCB,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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
    hooks = types.SimpleNamespace(register=lambda event, function: None)  # matplotlib's, once it is imported
    shell = types.SimpleNamespace(kernel=None, events=hooks, enable_gui=lambda gui: None)
    monkeypatch.setitem(
        sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell, display=display, version_info=(9, 0))
    )
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

    class Forgot(AccelerateCustomCB):
        def before_fit(self, learn):
            pass

    learn = Learner(model(), loaders(), Entropy(), cbs=Forgot())
    with pytest.raises(RuntimeError, match=r"super\(\).before_fit\(learn\)"):
        learn.fit(1)
    plain = DataLoaders([(torch.ones(1, FEATURES), torch.ones(1))])
    with pytest.raises(TypeError, match=r"must come from accelerator\.prepare"):
        Learner(model(), plain, F.cross_entropy, cbs=AccelerateCB()).fit(1, valid=False)
