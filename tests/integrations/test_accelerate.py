"""Losses under Accelerate, on one process and on two: gradients of the global mean, every sample counted once."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fused_losses
from fused_losses.integrations.accelerate import GlobalBatches, check_accelerator, gather_with_grad, global_normalizer
from fused_losses.integrations.learner import (
    AccelerateCB,
    AccelerateCustomCB,
    DataLoaders,
    Learner,
    LRFinderCB,
    MetricsCB,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CLASSES, LENGTH, RATE = 7, 5, 1.0


def sentences(number, ignored_at=()):
    """Labels with very different numbers of targets; ``ignored_at`` have none."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(CLASSES, (number, LENGTH), generator=generator)
    for index, row in enumerate(labels):
        row[: LENGTH if index in ignored_at else (3 * index) % LENGTH] = -100
    return labels


def targets_in(labels):
    return (labels != -100).sum()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(CLASSES, 8), nn.Tanh(), fused_losses.LinearCrossEntropyHead(8, CLASSES))


class WithLoss(nn.Module):
    """A model that computes its loss inside, from its hidden states."""

    def __init__(self):
        super().__init__()
        self.net = model()

    def forward(self, labels, normalizer):
        return self.net[2](self.net[:2](labels.clamp(min=0)), labels, normalizer=normalizer)


class OfLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = model()

    def forward(self, labels, normalizer):
        logits = self.net(labels.clamp(min=0)).mT
        return fused_losses.functional.cross_entropy(logits, labels, normalizer=normalizer)


def trained_at_once(net, groups):
    """One process, one batch to a step: what every other arrangement must equal."""
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    means = []
    for group in groups:
        optimizer.zero_grad()
        loss = net(group, targets_in(group).clamp(min=1))
        loss.backward()
        optimizer.step()
        means.append(loss.item())
    return net, means


def trained_by_accelerate(accelerator, net, labels, batch):
    net, optimizer, loader = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), RATE), DataLoader(labels, batch)
    )
    batches = GlobalBatches(accelerator, loader, targets_in)
    means, group = [], []
    for own in batches:
        with accelerator.accumulate(net):
            loss = net(own, batches.normalizer)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        group.append(loss.detach())
        if accelerator.sync_gradients:
            means.append(accelerator.reduce(torch.stack(group).mean(), "mean").item())
            group.clear()
    return accelerator.unwrap_model(net), means


def assert_alike(net, expected, tolerance=1e-6):
    for made, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(made, wanted, rtol=tolerance, atol=tolerance)


def check_the_global_mean(accelerator, kind, labels, batch):
    steps, world = accelerator.gradient_accumulation_steps, accelerator.num_processes
    groups = labels.split(batch * steps * world)  # as Accelerate deals batches out to processes
    net, means = trained_by_accelerate(accelerator, kind(), labels, batch)
    expected, at_once = trained_at_once(kind(), groups)
    assert_alike(net, expected)
    assert means == pytest.approx(at_once, abs=1e-6)
    assert accelerator.gradient_accumulation_steps == steps
    return at_once


@pytest.mark.parametrize("kind", [OfLogits, WithLoss])
def test_one_process(kind):
    from accelerate import Accelerator

    # 8 batches: the last step of three has two; one batch has nothing but ignored labels.
    labels, accelerator = sentences(15, ignored_at=(2, 3)), Accelerator(cpu=True, gradient_accumulation_steps=3)
    at_once = check_the_global_mean(accelerator, kind, labels, 2)
    per_batch = [kind()(batch, targets_in(batch)).item() for batch in labels[:6].split(2) if targets_in(batch)]
    assert abs(sum(per_batch) / len(per_batch) - at_once[0]) > 1e-3  # what a mean of means would be off
    accelerator.gradient_accumulation_steps = 1
    assert check_the_global_mean(accelerator, kind, labels, 2)[1] == 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sentences(7))


def test_loaders_without_a_length():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    net, _ = trained_by_accelerate(accelerator, OfLogits(), Stream(), 1)
    assert_alike(net, trained_at_once(OfLogits(), sentences(7).split(3))[0])


def test_a_loop_that_is_left_early():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    batches = GlobalBatches(accelerator, accelerator.prepare(DataLoader(sentences(6))), targets_in)
    assert len(batches) == 6
    for index, _ in enumerate(batches):
        if index == 4:
            assert accelerator.gradient_accumulation_steps == 2
            break
    assert accelerator.gradient_accumulation_steps == 4
    with pytest.raises(TypeError, match=r"must come from accelerator\.prepare"):
        GlobalBatches(accelerator, DataLoader(sentences(6)))


def test_gradients_scaled_for_fp16():
    """With the scaler that Accelerate has on a GPU: steps take true gradients, and an overflow skips one."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    net, labels = OfLogits(), sentences(4)
    net, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), RATE), DataLoader(labels))
    batches = GlobalBatches(accelerator, loader, targets_in)
    for index, own in enumerate(batches):
        with accelerator.accumulate(net):
            loss = net(own, batches.normalizer) * (1e38 if index == 3 else 1.0)
            accelerator.backward(loss)
            optimizer.step()
            assert optimizer.step_was_skipped is (index == 3)
            optimizer.zero_grad()
    assert_alike(net, trained_at_once(OfLogits(), [labels[:2]])[0])


def test_what_would_go_wrong_unsaid_raises(monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = type("Alone", (), {"mixed_precision": "no", "device": torch.device("cpu"), "num_processes": 1})
    with pytest.raises(RuntimeError, match="2 processes were launched and Accelerate sees 1"):
        check_accelerator(alone)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="on a CPU would run in fp32"):
        check_accelerator(Accelerator(cpu=True, mixed_precision="fp16"))


# On two processes.


class Scaled(nn.Module):
    """A loss that learns, with fewer tokens in some batches than in others."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, predictions, targets, normalizer):
        summed = F.cross_entropy(predictions.mT * self.scale, targets, reduction="sum")
        return summed / normalizer + self.scale.square() / 100


def pairs(labels):
    return list(zip(labels.clamp(min=0), labels))


def learner(labels, batch, loss, callbacks):
    loaders = DataLoaders(DataLoader(pairs(labels), batch), DataLoader(pairs(labels), batch))
    return Learner(model(), loaders, loss, RATE, callbacks)


def counted(batch):
    return targets_in(batch[1])


def right_tokens(predictions, targets):
    return (predictions.argmax(-1) == targets).float().mean(1)


def check_learner_with_uneven_tokens():
    """Also with a loss that learns; twice; equal on both ranks, and to one process on the global batches."""
    labels, loss = sentences(16), Scaled()
    shared, metrics = AccelerateCB(count=counted, gradient_accumulation_steps=2), MetricsCB(right_tokens)
    learn = learner(labels, 2, loss, [shared, metrics])
    learn.fit(1)
    net, scale = model(), Scaled()
    optimizer = torch.optim.SGD([*net.parameters(), *scale.parameters()], RATE)
    losses = []
    for group in labels.split(8) * 2:
        optimizer.zero_grad()
        losses.append(scale(net(group.clamp(min=0)), group, targets_in(group)))
        losses[-1].backward()
        optimizer.step()
    learn.fit(1)
    assert_alike(shared.acc.unwrap_model(learn.model), net)
    assert_alike(loss, scale)
    weights = [targets_in(group) for group in labels.split(8)]
    mean = sum(value.item() * weight for value, weight in zip(losses[2:], weights)) / sum(weights)
    assert metrics.history[0]["loss"] == pytest.approx(mean.item(), abs=1e-6)
    return scale.scale.item(), metrics.history


def check_every_sample_counts_once():
    """9 samples in batches of 2 on 2 ranks: the last round, a step by itself, has one of them and three repeats."""
    labels = sentences(9)
    for loss, callback, count in (
        (lambda predictions: predictions.square().mean(), AccelerateCustomCB, None),
        (lambda p, t, normalizer: F.cross_entropy(p.mT, t, reduction="sum") / normalizer, AccelerateCB, counted),
    ):
        metrics = MetricsCB(right_tokens)
        learn = learner(labels, 2, loss, [callback(count=count, gradient_accumulation_steps=2), metrics])
        learn.fit(1, lr=0.0)
        net = learn.cbs[0].acc.unwrap_model(learn.model).eval()
        predictions = net(labels.clamp(min=0))
        expected = loss(predictions) if count is None else loss(predictions, labels, targets_in(labels))
        assert metrics.history[1]["loss"] == pytest.approx(expected.item(), abs=1e-6)
        for line in metrics.history:
            assert line["right_tokens"] == pytest.approx(right_tokens(predictions, labels).mean().item())


def check_the_finder_ends_together():
    finder = LRFinderCB(gamma=2.0)
    only_here = lambda predictions: predictions.square().mean() * (dist.get_rank() + 1)
    learn = learner(sentences(16), 2, only_here, [AccelerateCustomCB(gradient_accumulation_steps=1)])
    before = copy.deepcopy(learn.model)
    learn.fit(30, valid=False, cbs=finder, lr=1e-2)
    assert_alike(learn.cbs[0].acc.unwrap_model(learn.model), before, 0)
    return finder.losses


def check_processes_that_would_train_alone():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(RuntimeError, match="2 processes were launched and Accelerate sees 1"):
        AccelerateCB(cpu=False)
    AcceleratorState._reset_state(reset_partial_state=True)


def contrastive(accelerator, images, texts, scale):
    """CLIP's loss of a process's own pairs against those of all processes."""
    own = torch.arange(len(images)) + accelerator.process_index * len(images)
    every_image, every_text = gather_with_grad(accelerator, images), gather_with_grad(accelerator, texts)
    cross_entropy = fused_losses.functional.cross_entropy
    return cross_entropy(scale * images @ every_text.T, own) + cross_entropy(scale * texts @ every_image.T, own)


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.scale = nn.Linear(6, 4), nn.Linear(5, 4), nn.Parameter(torch.tensor(2.0))

    def forward(self, images, texts):
        return F.normalize(self.image(images)), F.normalize(self.text(texts)), self.scale


def check_a_contrastive_loss():
    from accelerate import Accelerator

    accelerator, generator = Accelerator(cpu=True), torch.Generator().manual_seed(1)
    images, texts = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
    whole, of_rank = Pairs(), lambda tensor: tensor.chunk(accelerator.num_processes)[accelerator.process_index]
    alone = type("Alone", (), {"num_processes": 1, "process_index": 0})
    expected = contrastive(alone, *whole(images, texts))
    expected.backward()
    net = accelerator.prepare(Pairs())
    loss = contrastive(accelerator, *net(of_rank(images), of_rank(texts)))
    accelerator.backward(loss)
    torch.testing.assert_close(accelerator.reduce(loss.detach(), "mean"), expected.detach(), rtol=0, atol=1e-6)
    for made, wanted in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(made.grad, wanted.grad, rtol=0, atol=1e-6)


def on_two_ranks():
    from accelerate import Accelerator

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, OMP_NUM_THREADS="1")
    check_processes_that_would_train_alone()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    assert accelerator.num_processes == 2
    for kind in (OfLogits, WithLoss):
        # 8 batches on 2 ranks, 3 to a step: 6 and 2. The second rank's first batch has no target.
        check_the_global_mean(accelerator, kind, sentences(16, ignored_at=(2, 3)), 2)
    normalizer = global_normalizer(accelerator, targets_in(sentences(4)) * (dist.get_rank() + 1))
    torch.testing.assert_close(normalizer, targets_in(sentences(4)) * 3 / 6.0)
    check_a_contrastive_loss()
    check_every_sample_counts_once()
    return check_learner_with_uneven_tokens(), check_the_finder_ends_together()


def test_two_processes():
    first, second = run(on_two_ranks, 2)
    assert first == second
