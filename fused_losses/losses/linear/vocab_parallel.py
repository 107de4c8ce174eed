"""Cross entropy of a head that is split over the vocabulary. Reads downward: function, autograd, reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...backends.fake import accumulate_dtype
from .._common import (
    check_normalizer,
    check_tensors,
    choose_backend,
    learns,
    output_dtype,
    plain,
    reduction_name,
    wants_graph,
)
from .._gradients import as_inputs, keep, saved, scaled
from ..softmax import check_weights, checked_options
from ._checks import HeadInput, checked_workspace, head_input
from ._operators import operator
from ._shard_operators import check_whole_vocabulary, vocab_parallel_backward, vocab_parallel_forward
from ._shards import Ranks, replicated, shard_of
from .cross_entropy import Call, linear_cross_entropy, mean_of_labels

WHOLE = "gather the weight to every rank and use linear_cross_entropy"


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of ``input @ W.T + b`` with the rows of ``W`` and ``b`` split over the ranks of a process group.

    Formula: :class:`~fused_losses.LinearCrossEntropyLoss` with ``W`` the shards of ranks 0, 1, ... one below the other

    Every rank of the group calls it with the same input, target and options, and gets the same loss: that of one
    process with all of ``W``. For each chunk of rows ranks exchange four numbers a row. The gradient of a shard is
    the shard's own; that of the input is the whole one on every rank, summed over the group once, so the layers below
    must not sum it again. Gradients are made in forward, and only those that somebody asks for.

    Args:
        input: ``(..., D)``, float64, float32, bfloat16 or float16, the same on all ranks; plain, or a replicated
            DTensor.
        linear_weight: this rank's rows ``(V_r, D)``, of any number on each rank; or a DTensor ``(V, D)`` sharded on
            dimension 0 over a one-dimensional mesh, which then gets a DTensor as gradient.
        target: class indices of the whole vocabulary, of the input's leading dimensions, the same on all ranks.
        group: the process group; None is that of the DTensor's mesh, or all processes.
        linear_bias: this rank's ``(V_r)``, or a DTensor ``(V)``.
        weight: ``(V)``, one weight for every class of all ranks, whole on each of them.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index, label_smoothing, z_loss, softcap, temperature: as in :class:`~fused_losses.CrossEntropyLoss`.
        sample_weight: one weight per row, of the target's shape.
        normalizer: replaces the denominator of ``"mean"``.
        max_workspace_mb: as in :class:`~fused_losses.LinearCrossEntropyLoss`; the largest shard sizes the chunks.
        backend: a backend by name; None chooses automatically. The reference gathers the whole weight on every rank.

    Returns:
        A 0-d tensor, or the target's shape for ``"none"``, in the input's dtype (float32 under autocast).

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not fit, class probabilities, a DTensor that is placed
            otherwise, ranks given different inputs, without a process group, and under ``create_graph=True``.
        IndexError: on a CPU, for a label outside of the whole vocabulary (on a GPU that row is NaN).
        ValueError: for an option out of range, or a rank that is not in the group.

    With plain shards ranks first ask each other for their sizes, which waits for a GPU; a DTensor knows them.

    Example:
        >>> import tempfile, torch, fused_losses
        >>> with tempfile.TemporaryDirectory() as folder:  # torchrun does this for you, with more processes
        ...     torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        ...     hidden, shard, labels = torch.zeros(4, 16), torch.zeros(1000, 16), torch.tensor([1, 2, 3, -100])
        ...     loss = fused_losses.functional.vocab_parallel_linear_cross_entropy(hidden, shard, labels)
        ...     torch.distributed.destroy_process_group()
        >>> loss
        tensor(6.9078)

    Source: Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism,
    2019.
    """
    reduction = reduction_name(None, None, reduction)
    if normalizer is not None:
        check_normalizer(reduction)
    optional = {"linear_bias": linear_bias, "weight": weight, "sample_weight": sample_weight}
    check_tensors(input=input, linear_weight=linear_weight, target=target, optional=optional)
    shard = shard_of(linear_weight, linear_bias, group)
    input, target = replicated("input", input), replicated("target", target)
    weight, sample_weight = replicated("weight", weight), replicated("sample_weight", sample_weight)
    head = head_input(input, shard.weight, shard.bias, whole=False)
    numbers = checked_options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    labels = _labels(head, plain(target))
    sample_weight = None if sample_weight is None else head.rows_of("sample_weight", sample_weight)
    _check_factors(head, weight, sample_weight)
    backend = choose_backend(backend, *head[:3], labels, weight, sample_weight)
    local = Call(head.shape, numbers, checked_workspace(max_workspace_mb), head.dtype, backend, False)
    call = SplitCall(local, shard.sizes, shard.group)
    tensors = (*head[:3], labels, weight, sample_weight)
    loss = _reduced(call, tensors, reduction, normalizer).to(output_dtype(input))
    return loss.view(head.leading) if reduction == "none" else loss


class SplitCall(NamedTuple):
    """What a call asks for beside its tensors, and of whom."""

    local: Call
    sizes: tuple[int, ...]
    group: str

    def numbers(self) -> tuple[Any, ...]:
        """The trailing arguments of the operators, but for what is needed."""
        call = self.local
        return (list(self.sizes), self.group, *call.options, call.workspace_mb, call.dtype, call.backend)


# input, weight, bias, labels, class_weight, sample_weight
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


def _labels(head: HeadInput, target: Tensor) -> Tensor:
    """Class indices (N)."""
    if target.is_floating_point():
        raise RuntimeError(f"target must be class indices, int64, got {target.dtype}; for class probabilities, {WHOLE}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"class indices must be int64, got {target.dtype}: target.long()")
    if target.shape != head.leading:
        raise ValueError(f"target must have the input's leading dimensions {head.leading}, got {tuple(target.shape)}")
    return target.reshape(-1).long()


def _check_factors(head: HeadInput, weight: Tensor | None, sample_weight: Tensor | None) -> None:
    """All but whether there is a weight for each class: how many classes there are, ranks know together."""
    classes = 1 if weight is None else weight.numel()
    check_weights(head.input.new_empty((), dtype=head.dtype).expand(len(head.input), classes), weight, sample_weight)


def _reduced(call: SplitCall, tensors: Tensors, reduction: str, normalizer: Tensor | float | None) -> Tensor:
    labels, class_weight, sample_weight = tensors[3:]
    if call.local.backend == "reference" or learns(class_weight, sample_weight):
        return _by_reference(call, tensors, reduction, normalizer)
    wide = accumulate_dtype(call.local.dtype)
    factors = [None if t is None else t.to(wide).contiguous() for t in (class_weight, sample_weight)]
    loss = _rows_or_sum(call, (*tensors[:3], labels, *factors), reduction)
    if normalizer is not None:
        return loss / normalizer
    return mean_of_labels(loss, call.local, labels, class_weight) if reduction == "mean" else loss


def _rows_or_sum(call: SplitCall, tensors: Any, reduction: str) -> Tensor:
    if learns(*tensors[:3]):
        return VocabParallelFunction.apply(*tensors, call, reduction)
    losses = _forward(call, tensors, (False, False, False))[0]
    return losses if reduction == "none" else losses.sum()


def _forward(call: SplitCall, tensors: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    return operator(vocab_parallel_forward)(*tensors, *call.numbers(), list(needs))


class VocabParallelFunction(torch.autograd.Function):
    """A sum whose gradients forward makes, or losses of rows whose logits backward makes again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        class_weight: Tensor | None,
        sample_weight: Tensor | None,
        call: SplitCall,
        reduction: str,
    ) -> Tensor:
        ctx.call, ctx.reduction = call, reduction
        tensors = input, weight, bias, labels, class_weight, sample_weight
        needs = (False, False, False) if reduction == "none" else ctx.needs_input_grad[:3]
        losses, stats, *gradients = _forward(call, tensors, needs)
        keep(ctx, (*tensors, stats), () if reduction == "none" else gradients)
        return losses if reduction == "none" else losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order()
        tensors, call, needed = saved(ctx), ctx.call, ctx.needs_input_grad[:3]
        if ctx.reduction == "none":
            backward = operator(vocab_parallel_backward, grad_output)
            made = backward(grad_output, *tensors, *call.numbers(), list(needed))
            gradients = as_inputs(made, tensors[:3], needed)
        else:
            gradients = scaled(ctx, grad_output, tensors[:3], lambda: _forward(call, tensors[:6], needed)[2:])
        return (*gradients, *[None] * 5)


def check_first_order() -> None:
    if wants_graph():
        raise RuntimeError(
            "a split vocabulary has first derivatives only, and create_graph=True asks for second ones, which would "
            f"cross ranks; {WHOLE}"
        )


def _by_reference(call: SplitCall, tensors: Tensors, reduction: str, normalizer: Tensor | float | None) -> Tensor:
    """The loss of one process with all of the head."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(f"torch.func transforms and forward-mode AD do not see the shards of other ranks; {WHOLE}")
    input, weight, bias, labels, class_weight, sample_weight = tensors
    ranks = Ranks.of(call.group, call.sizes, input, weight, labels)
    options = call.local.options
    check_whole_vocabulary(ranks, labels, class_weight, options)
    return linear_cross_entropy(
        input,
        WholeFunction.apply(weight, ranks),
        labels,
        linear_bias=None if bias is None else WholeFunction.apply(bias, ranks),
        weight=class_weight,
        reduction=reduction,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        softcap=options.softcap or None,
        temperature=options.temperature,
        sample_weight=sample_weight,
        normalizer=normalizer,
        backend="reference",
    )


class WholeFunction(torch.autograd.Function):
    """All ranks' rows; as every rank computes the whole loss, the gradient of its own are its own."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, ranks: Ranks) -> Tensor:
        ctx.rows = ranks.rows(ranks.rank)
        return ranks.whole(shard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        check_first_order()
        return gradient[ctx.rows], None
