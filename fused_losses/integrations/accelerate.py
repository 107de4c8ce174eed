"""Losses under Accelerate: one denominator for the batch that all processes and accumulation steps make up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class GlobalBatches:
    """The batches of a prepared loader, with what a mean over the whole global batch divides by.

    A global batch is what one optimizer step learns from: the batches of all accumulation steps on all processes.
    Where they hold different numbers of targets, a mean of each batch's mean is not the global mean. Given
    ``normalizer`` as the denominator of its sum, a loss's gradient after Accelerate's division by the accumulation
    steps and DDP's by the processes is that of one process on the global batch; the mean of the losses over both is
    the global mean. The last global batch of an epoch may have fewer accumulation steps than the others: it is
    divided by those it has, with and without ``count``.

    Formula: ``normalizer = targets of the global batch / (processes * accumulation steps)``

    Args:
        accelerator: an ``accelerate.Accelerator``; its ``gradient_accumulation_steps`` batches are fetched ahead.
        loader: a DataLoader that ``accelerator.prepare`` returned.
        count: from a batch, its number of targets (or the sum of their weights), a number or a 0-d tensor; None
            leaves ``normalizer`` None, and losses to their own denominators.

    Raises:
        TypeError: for a loader that was not prepared.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from torch.utils.data import DataLoader
        >>> from fused_losses.functional import cross_entropy
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> labels = torch.tensor([[1, -100, -100], [2, 3, 4]])
        >>> model, loader = accelerator.prepare(torch.nn.Embedding(5, 5), DataLoader(labels))
        >>> batches = GlobalBatches(accelerator, loader, count=lambda labels: (labels != -100).sum())
        >>> for labels in batches:
        ...     with accelerator.accumulate(model):
        ...         loss = cross_entropy(model(labels.clamp(min=0)).mT, labels, normalizer=batches.normalizer)
        ...         accelerator.backward(loss)  # then optimizer.step() and optimizer.zero_grad()
        >>> batches.normalizer
        tensor(2.)

    Source: the denominator that ``transformers.Trainer`` hands on as ``num_items_in_batch``, with both divisions in it.
    """

    normalizer: Tensor | None = None

    def __init__(self, accelerator: Any, loader: Any, count: Callable[[Any], Tensor | float] | None = None):
        if not hasattr(loader, "end_of_dataloader"):
            raise TypeError(
                f"loader must come from accelerator.prepare(loader), got {type(loader).__name__}; batches of "
                "something else than a torch DataLoader are not split over processes"
            )
        self.accelerator, self.loader, self.count = accelerator, loader, count

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        accelerator, loader = self.accelerator, self.loader
        steps, batches = accelerator.gradient_accumulation_steps, iter(loader)
        try:
            while group := _fetch(batches, loader, steps):
                last = loader.end_of_dataloader
                accelerator.step, accelerator.gradient_accumulation_steps = 0, len(group)
                if self.count is not None:
                    self.normalizer = global_normalizer(accelerator, sum(map(self.count, group)))
                for index, batch in enumerate(group, 1):
                    # Fetched ahead, the loader is at its end before its last batch is in use.
                    loader.end_of_dataloader = last and index == len(group)
                    yield batch
        finally:
            accelerator.gradient_accumulation_steps = steps


def _fetch(batches: Iterator[Any], loader: Any, steps: int) -> list[Any]:
    """Up to this many batches; asked beyond its last one, a loader would no longer say which of its samples repeat."""
    group = list(islice(batches, 1))
    while group and len(group) < steps and not loader.end_of_dataloader:
        group.append(next(batches))
    return group


def global_normalizer(accelerator: Any, count: Tensor | float) -> Tensor:
    """What a loss divides its sum by, so that its gradient becomes that of the mean over the global batch.

    For loops that gather the batches of an optimizer step themselves; :class:`GlobalBatches` does so for others.

    Formula: ``max(1, sum of count over processes) / (processes * accumulation steps)``

    Args:
        accelerator: an ``accelerate.Accelerator``.
        count: targets of this process's batches of one optimizer step, a number or a 0-d tensor.

    Returns:
        A 0-d float32 tensor on the accelerator's device. With no target anywhere a loss is 0, and not 0 / 0.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> labels = torch.tensor([1, -100, 3])
        >>> global_normalizer(Accelerator(cpu=True, gradient_accumulation_steps=2), (labels != -100).sum())
        tensor(1.)
    """
    count = torch.as_tensor(count, device=accelerator.device)
    total = accelerator.reduce(count, "sum").float().clamp(min=1)
    return total / (accelerator.num_processes * accelerator.gradient_accumulation_steps)


def gather_with_grad(accelerator: Any, tensor: Tensor) -> Tensor:
    """The samples of all processes, through which gradients flow back to the process that each came from.

    For losses that compare samples with each other (contrastive, triplet, correlation): ``accelerator.gather`` has no
    gradient. A loss of what is gathered, or of a process's own samples against what is gathered, whose mean over
    processes is the loss of the global batch, has that batch's gradient once DDP has averaged it.

    Formula: ``output = concatenation of tensor over processes, in their order``

    Args:
        accelerator: an ``accelerate.Accelerator``.
        tensor: ``(N, ...)``, with the same shape on every process, as Accelerate's batches have by default.

    Returns:
        ``(processes * N, ...)``; the tensor itself on one process.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> embeddings = torch.ones(2, 3, requires_grad=True)
        >>> gather_with_grad(Accelerator(cpu=True), embeddings).sum().backward()
        >>> embeddings.grad.sum()
        tensor(6.)

    Source: OpenCLIP's loss with ``gather_with_grad``; the gradient of an all-gather is a sum over processes.
    """
    if accelerator.num_processes == 1:
        return tensor
    return _Gathered.apply(tensor, accelerator.num_processes)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(processes)]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        parts = list(grad_output.contiguous().chunk(ctx.processes))
        gradient = torch.empty_like(parts[0])
        dist.reduce_scatter(gradient, parts)
        return gradient, None


def real_samples(accelerator: Any, size: int) -> int:
    """How many of this process's ``size`` samples are no repeats, which fill up the last batch of an epoch."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return size
    return min(max(state.remainder - accelerator.process_index * size, 0), size)


def check_accelerator(accelerator: Any) -> Any:
    """Raises where Accelerate would train otherwise than it was asked to, and say nothing.

    Args:
        accelerator: an ``accelerate.Accelerator``.

    Returns:
        The accelerator.

    Raises:
        ValueError: for fp16 on a CPU, which Accelerate runs in fp32.
        RuntimeError: where several processes were launched and each would train alone.

    Example:
        >>> from accelerate import Accelerator
        >>> check_accelerator(Accelerator(cpu=True)).num_processes
        1
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision='fp16' on a CPU would run in fp32; use 'bf16' or 'no'")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"{launched} processes were launched and Accelerate sees {accelerator.num_processes}; "
            "on a machine without a GPU, build it as Accelerator(cpu=True)"
        )
    return accelerator
