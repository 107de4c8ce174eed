"""fastai's Learner trains with our losses as with torch's, given raw or inside of fastai's BaseLoss."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_losses import CrossEntropyLoss

pytestmark = pytest.mark.frameworks
ROWS, WIDTH, CLASSES, AT_ONCE = 24, 6, 5, 6
BY_KERNELS = {"backend": "cpp"}  # so few elements would be torch's own operator


def learner(loss, *callbacks, decorated=False):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import SGD
    from fastai.torch_core import TensorCategory, TensorImage

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    if decorated:
        inputs, labels = TensorImage(inputs), TensorCategory(labels)
    loader = DataLoader(list(zip(inputs, labels)), bs=AT_ONCE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return Learner(DataLoaders(loader, loader), model, loss_func=loss, opt_func=SGD, lr=0.1, cbs=callbacks)


def results(*arguments, **options):
    """Trained parameters, the recorded validation losses, and the loss of every row."""
    made = learner(*arguments, **options)
    with made.no_bar(), made.no_logging():
        made.fit(2)
        _, _, losses = made.get_preds(with_loss=True)
    assert losses.shape == (ROWS,)
    return list(made.model.parameters()), torch.tensor(made.recorder.values), losses


def raw():
    return CrossEntropyLoss(**BY_KERNELS)


def in_base_loss():
    from fastai.losses import BaseLoss

    return BaseLoss(CrossEntropyLoss, **BY_KERNELS)


@pytest.mark.parametrize("loss", [raw, in_base_loss])
@pytest.mark.parametrize("decorated", [False, True])
def test_trains_as_with_torch(loss, decorated):
    from fastai.callback.training import GradientAccumulation

    for callbacks in ((), (GradientAccumulation(2 * AT_ONCE),)):
        ours = results(loss(), *callbacks, decorated=decorated)
        theirs = results(nn.CrossEntropyLoss(), *callbacks, decorated=decorated)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_reduction_is_read_at_call_time():
    from fastai.torch_core import TensorCategory, TensorImage

    loss, logits, labels = raw(), torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 3])
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        for reduction in ("none", "sum", "mean"):
            other.reduction = reduction
            expected = nn.functional.cross_entropy(logits, labels, reduction=reduction)
            torch.testing.assert_close(other(TensorImage(logits), TensorCategory(labels)), expected)
