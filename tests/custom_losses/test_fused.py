"""Every loss of the corpus, fused: as accurate as the plain one, wholly or partly as it says, at any size."""

import copy

import pytest
import torch

from fused_losses import fuse
from fused_losses.testing import check_loss
from fused_losses.testing.accuracy import compare

from . import CORPUS
from .counts import TweedieLoss
from .image import SobelLoss, SSIMLoss
from .quantile import QuantileLoss
from .segmentation import DiceLoss
from .similarity import CosineEmbeddingLoss

# At most so much of a bench shape: several blocks, rows that no vector divides, more than one thread.
LARGEST = {1: (50_021,), 2: (67, 611), 3: (5, 61, 131), 4: (3, 64, 37, 41)}
CHECKS = [
    "gradient",  # first: a call without gradients finds its kernels then
    "value",
    "upstream",
    "repeated_backward",
    "double_backward",
    "layouts",
    "deterministic",
    "unmutated",
    "no_grad",
    "copies",
]


def each(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def modules(kind):
    return [entry for entry in CORPUS if isinstance(entry.loss, type) and kind(entry.build())]


def of(*losses):
    return [entry for entry in CORPUS if entry.loss in losses]


def moved(loss, to):
    return loss.to(to) if isinstance(loss, torch.nn.Module) else loss


def run(loss, sample, dtype):
    """The value, with a graph from every floating tensor and parameter."""
    device = sample.tensors[0].device
    return moved(loss, dtype)(*(t.requires_grad_(t.is_floating_point()) for t in sample.to(dtype, device).tensors))


def compared(fused, plain, sample):
    """The values of a fused loss, the plain one and the truth."""
    return compare(
        run(fused, sample, torch.float32),
        run(plain, sample, torch.float32),
        run(copy.deepcopy(plain), sample, torch.float64),
    )


@each(CORPUS)
def test_equals_the_plain_loss(entry, each_device):
    """And leaves to torch what it says."""
    sample = entry.sample(tuple(map(min, entry.bench, LARGEST[len(entry.bench)]))).to(torch.float64, each_device)
    plain = moved(entry.build(), each_device)
    loss = fuse(plain, strict=True)
    check_loss(loss, plain, [sample], dtypes=[torch.float32], checks=CHECKS)
    run(loss, sample, torch.float32).sum().backward()
    explanation = loss.explain()
    assert explanation.reason is None
    left = {name for name in entry.left_to_torch if any(name in extern for extern in explanation.externs)}
    assert left == set(entry.left_to_torch) and bool(left) == bool(explanation.externs), str(explanation)


@each(CORPUS[::3])
def test_small_shapes_and_other_dtypes(entry, each_device):
    """Losses of each kind meet another shape in another dtype."""
    dtypes = [dtype for dtype in entry.dtypes if dtype is not torch.float32]
    dtype = dtypes[CORPUS.index(entry) // 3 % len(dtypes)]
    plain, sample = moved(entry.build(), each_device), entry.samples()[-1].to(torch.float64, each_device)
    check_loss(fuse(plain, strict=True), plain, [sample], dtypes=[dtype], checks=["gradient", "value"])


@each(of(DiceLoss, SSIMLoss, SobelLoss))
def test_few_long_rows(entry, each_device):
    """Which kernels of GPUs share out to many programs."""
    sample = entry.sample((2, 2, 151, 203)).to(torch.float64, each_device)
    plain = moved(entry.build(), each_device)
    check_loss(
        fuse(plain, strict=True), plain, [sample], dtypes=[torch.float32], checks=["gradient", "value", "deterministic"]
    )


@each(modules(lambda loss: any(True for _ in loss.parameters())))
def test_parameters_learn(entry):
    """A loss's own parameters get gradients as accurate as the plain loss's."""
    sample = entry.samples()[-1]
    losses = [fuse(entry.build(), strict=True), entry.build(), entry.build()]
    for loss, dtype in zip(losses, (torch.float32, torch.float32, torch.float64)):
        run(loss, sample, dtype).backward()
    for parameters in zip(*(loss.parameters() for loss in losses)):
        comparison = compare(*(parameter.grad for parameter in parameters))
        assert comparison.ok, comparison


@each(modules(lambda loss: any(isinstance(value, float) for value in vars(loss).values())))
def test_hyper_parameters_take_effect(entry):
    """The numbers that are attributes may change between two calls."""
    fused, plain, sample = fuse(entry.build(), strict=True), entry.build(), entry.samples()[-1]
    with torch.no_grad():
        before = run(fused, sample, torch.float32)
        names = [name for name, value in vars(plain).items() if isinstance(value, float)]
        for k, name in enumerate(names):
            changed = getattr(plain, name) * 1.0625 + (8 + k) / 128  # more than rounding even of an eps
            setattr(plain, name, changed)
            setattr(fused, name, changed)
            assert getattr(fused, name) == changed
        comparison = compared(fused, plain, sample)
        assert comparison.ok and not torch.equal(run(fused, sample, torch.float32), before), comparison


@each(of(QuantileLoss, TweedieLoss, DiceLoss, CosineEmbeddingLoss))
def test_reduction_is_read_at_each_call(entry):
    fused, plain, sample = fuse(entry.build(), strict=True), entry.build(), entry.samples()[-1]
    for reduction in ("mean", "none", "sum"):
        fused.reduction = plain.reduction = reduction
        comparison = compared(fused, plain, sample)
        assert comparison.ok, (reduction, comparison)
