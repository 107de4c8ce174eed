"""Log-probabilities of tokens straight from hidden states: what preference and policy losses are made of."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.fake import accumulate_dtype
from ...reference import linear as reference
from .._common import check_tensors, choose_backend, learns, plain, reference_gradients, wants_graph, without_values
from .._gradients import as_inputs
from ..softmax import Options, check_labels, checked_options, checked_target
from ._checks import cast, checked_workspace, head_input
from ._operators import linear_log_probs_backward, linear_log_probs_forward, operator


class TokenLogProbs(NamedTuple):
    """Of every token; each may be differentiated.

    Attributes:
        log_probs: the logarithm of the probability given to the label.
        log_sum_exp: the logarithm of the sum of exponentials of the logits.
        entropy: of the distribution over the vocabulary, in nats.
    """

    log_probs: Tensor
    log_sum_exp: Tensor
    entropy: Tensor


class TokenStatistics(NamedTuple):
    """Of every token, without gradients; 0 and False where the label is ignored.

    Attributes:
        log_probs, log_sum_exp, entropy: as in :class:`TokenLogProbs`.
        correct: whether no class has a larger logit than the label, and none before it an equal one.
    """

    log_probs: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    correct: Tensor


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
) -> TokenLogProbs:
    """Log-probability, log-sum-exp and entropy of every token, from hidden states and a head's weight.

    Formula: ``z_t - logsumexp(z)``, ``logsumexp(z)`` and ``-sum_c p_c log p_c``, with ``z = softcap
    tanh(x / softcap) / temperature``, ``x = input @ linear_weight.T + linear_bias`` and ``p = softmax(z)``

    The logits are never whole in memory; backward makes them again. Gradients are right for any upstream gradients.

    Args:
        input: ``(..., D)``, float64, float32, bfloat16 or float16.
        linear_weight: ``(C, D)``, of the input's dtype, or any under autocast.
        target: class indices of the input's leading dimensions.
        linear_bias: ``(C)``.
        ignore_index: where a label is this, all three are 0, without a gradient.
        softcap, temperature: as in :class:`~fused_losses.CrossEntropyLoss`.
        max_workspace_mb: as in :class:`~fused_losses.LinearCrossEntropyLoss`.
        backend: a backend by name; None chooses automatically.

    Returns:
        :class:`TokenLogProbs` of the target's shape, float32, or float64 for float64.

    Raises:
        RuntimeError, IndexError, ValueError: as :class:`~fused_losses.LinearCrossEntropyLoss`.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head = torch.zeros(2, 3, 16), torch.zeros(1000, 16)
        >>> tokens = fused_losses.functional.linear_log_probs(hidden, head, torch.ones(2, 3).long())
        >>> tokens.log_probs[0, 0], tokens.entropy[0, 0]
        (tensor(-6.9078), tensor(6.9078))

    Source: ``selective_log_softmax`` and ``entropy_from_logits`` of TRL.
    """
    head = head_input(input, linear_weight, linear_bias)
    if len(head.shape) != 1:
        raise RuntimeError(f"linear_weight must be (C, D), got shape {tuple(linear_weight.shape)}")
    check_tensors(input=input, target=target, optional={})
    numbers = checked_options(ignore_index, 0.0, 0.0, softcap, temperature)
    labels = label_rows(head.rows_of("target", plain(target)), head.logits_like(), numbers)
    backend = choose_backend(backend, *head[:3], labels)
    call = Call(numbers, checked_workspace(max_workspace_mb), head.dtype, backend)
    return TokenLogProbs(*(values.view(head.leading) for values in _log_probs(call, *head[:3], labels)))


def label_rows(target: Tensor, logits: Tensor, numbers: Options) -> Tensor:
    """Class indices (N) for logits (N, C), in range where that can be looked at without waiting."""
    if target.is_floating_point():
        raise RuntimeError(f"target must be class indices, int64, got {target.dtype}")
    _, labels = checked_target(logits, target, numbers)
    if labels.is_cpu and not without_values():
        check_labels(logits, labels, numbers.ignore_index)
    return labels


class Call(NamedTuple):
    """What a call asks for beside its tensors."""

    options: Options
    workspace_mb: float | None
    dtype: torch.dtype  # of the products
    backend: str

    def numbers(self) -> tuple[Any, ...]:
        """The trailing arguments of the operators, but for what is needed."""
        o = self.options
        return (o.ignore_index, o.softcap, o.temperature, self.workspace_mb, self.dtype, self.backend)


def _log_probs(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, ...]:
    if call.backend == "reference":
        return _by_reference(call, labels, input, weight, bias)
    if learns(input, weight, bias):
        return LinearLogProbsFunction.apply(input, weight, bias, labels, call)
    statistics, _ = operator(linear_log_probs_forward)(input, weight, bias, labels, *call.numbers())
    return token_values(statistics, labels, call.options.ignore_index, weight.shape[0])


def token_values(statistics: Tensor, labels: Tensor, ignore_index: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, log-sum-exp and entropy of rows; NaN for a label out of range.  # (5, N)"""
    maximum, log_sum, label_logit, _, moment = statistics
    ignored = labels == ignore_index
    outside = (labels < 0) | (labels >= classes)
    log_probs = ((label_logit - maximum) - log_sum).masked_fill(outside, float("nan"))
    entropy = (log_sum + moment).masked_fill(ignored, 0.0)
    return log_probs.masked_fill(ignored, 0.0), (maximum + log_sum).masked_fill(ignored, 0.0), entropy


def token_statistics(
    statistics: Tensor, prediction: Tensor, labels: Tensor, ignore_index: int, classes: int
) -> TokenStatistics:
    """The same as :class:`TokenStatistics`, with whether the label is what was predicted."""
    correct = (prediction == labels) & (labels != ignore_index)
    return TokenStatistics(*token_values(statistics, labels, ignore_index, classes), correct)


def _by_reference(
    call: Call, labels: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The products in their dtype, everything after them in fp32 or wider."""
    logits, options = reference.logits_of(*cast(call.dtype, input, weight, bias)), call.options
    logits = logits.to(accumulate_dtype(call.dtype))
    return reference.log_probs_of(logits, labels, options.ignore_index, options.softcap or None, options.temperature)


class LinearLogProbsFunction(torch.autograd.Function):
    """Saves the inputs and five numbers a row; backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics, _ = operator(linear_log_probs_forward)(input, weight, bias, labels, *call.numbers())
        ctx.save_for_backward(input, weight, bias, labels, statistics)
        ctx.call = call
        return token_values(statistics, labels, call.options.ignore_index, weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, labels, statistics = ctx.saved_tensors
        call, needed = ctx.call, ctx.needs_input_grad[:3]
        if wants_graph():
            loss = partial(_by_reference, call, labels)
            gradients = reference_gradients(loss, tensors, needed, grad_outputs)
        else:
            backward = operator(linear_log_probs_backward, *grad_outputs)
            made = backward(torch.stack(grad_outputs), *tensors, labels, statistics, *call.numbers(), list(needed))
            gradients = as_inputs(made, tensors, needed)
        return (*gradients, None, None)
