"""Direct preference optimisation: a policy is to prefer what people chose, more than its reference does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common import reduction_name
from ._tokens import (
    IGNORED,
    Head,
    Reference,
    check_choice,
    check_pairs,
    check_tokens,
    lengths,
    masked_sum,
    negative_log_likelihood,
    reduced,
)

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Whose formula is of scores, and so of the divergence.
OF_SCORES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
LARGEST_EXPONENT = {torch.float16: 11.0}  # others: 80


class Pairs(NamedTuple):
    """Every chosen sequence beside the one that was rejected for it.  # each (B,)"""

    chosen: Tensor  # log-ratio of policy and reference
    rejected: Tensor
    chosen_log_prob: Tensor
    rejected_log_prob: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    @property
    def mean_margin(self) -> Tensor:
        return self.chosen_score / self.chosen_length - self.rejected_score / self.rejected_length


class DPOLoss(nn.Module):
    """Direct preference optimisation from log-probabilities of tokens.

    Formula: ``-log sigmoid(beta (r_chosen - r_rejected))`` with ``r = sum_t log p - sum_t log p_reference``, or
    another ``loss_type``.

    Args:
        beta: how strongly the policy is held to its reference.
        loss_type: one of ``sigmoid``, ``hinge``, ``ipo``, ``exo_pair``, ``nca_pair``, ``robust``, ``bco_pair``,
            ``sppo_hard``, ``aot``, ``aot_unpaired``, ``apo_zero``, ``apo_down``, ``discopop``, ``sft``,
            ``sigmoid_norm``; or several, summed with ``loss_weights``.
        loss_weights: one for each loss type; None is 1 for each.
        label_smoothing: how often the preference is taken to be the wrong way round; of ``exo_pair`` (above 0),
            ``robust`` (below 0.5), ``aot`` and ``aot_unpaired``.
        f_divergence: what holds the policy: ``reverse_kl``, ``forward_kl``, ``js_divergence`` or
            ``alpha_divergence``.
        alpha: of the alpha divergence.
        ld_alpha: factor of the tokens that a sequence has beyond the length of the other of its pair; None is 1.
        discopop_tau: temperature of ``discopop``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; read at call time.

    Shape:
        log_probs, reference_log_probs and mask ``(2 B, T)``: all chosen sequences, then all rejected ones in the
        same order. The mask is 1 for the tokens of completions.

    Returns:
        A 0-d tensor, or ``(B,)`` for ``"none"``.

    Raises:
        ValueError: for an unknown option, an option that its loss type does not take, or shapes that differ.

    Example:
        >>> import torch, fused_losses
        >>> log_probs = torch.tensor([[-1.0, -1.0], [-2.0, -3.0]])
        >>> reference = torch.tensor([[-1.5, -1.5], [-2.0, -2.0]])
        >>> fused_losses.DPOLoss()(log_probs, torch.ones(2, 2), reference)
        tensor(0.5981)

    Source: Rafailov et al., Direct Preference Optimization, 2023; the variants as in TRL's ``DPOTrainer``.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        *,
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        f_divergence: str = "reverse_kl",
        alpha: float = 0.5,
        ld_alpha: float | None = None,
        discopop_tau: float = 0.05,
        reduction: str = "mean",
    ):
        super().__init__()
        self.beta, self.label_smoothing, self.ld_alpha = beta, label_smoothing, ld_alpha
        self.loss_types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
        self.loss_weights = tuple(loss_weights) if loss_weights is not None else (1.0,) * len(self.loss_types)
        self.f_divergence, self.alpha, self.discopop_tau = f_divergence, alpha, discopop_tau
        self.reduction = reduction
        self._check_options()

    def _check_options(self) -> None:
        for loss_type in self.loss_types:
            check_choice("loss_type", loss_type, (*LOSSES, "sft"))
        check_choice("f_divergence", self.f_divergence, DIVERGENCES)
        if len(self.loss_weights) != len(self.loss_types):
            raise ValueError(f"loss_weights must be one for each of {self.loss_types}, got {self.loss_weights}")
        without = set(self.loss_types) - OF_SCORES
        if self.f_divergence != "reverse_kl" and without:
            raise ValueError(
                f"{', '.join(sorted(without))} are of log-ratios, which only f_divergence='reverse_kl' has"
            )
        if self.label_smoothing and not SMOOTHED & set(self.loss_types):
            raise ValueError(
                f"label_smoothing is of {', '.join(sorted(SMOOTHED))}; {', '.join(self.loss_types)} takes none, got "
                f"{self.label_smoothing}"
            )
        if "robust" in self.loss_types and not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing of robust must be in [0, 0.5), got {self.label_smoothing}")
        if "exo_pair" in self.loss_types and not 0.0 < self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing of exo_pair must be above 0, e.g. 1e-3, got {self.label_smoothing}")

    def forward(self, log_probs: Tensor, mask: Tensor, reference_log_probs: Tensor) -> Tensor:
        check_tokens(log_probs, mask, reference_log_probs=reference_log_probs)
        check_pairs(log_probs)
        reduction = reduction_name(None, None, self.reduction)
        pairs = self._pairs(log_probs, mask, reference_log_probs)
        losses = torch.zeros_like(pairs.chosen)
        for loss_type, weight in zip(self.loss_types, self.loss_weights):
            if loss_type == "sft":
                of_type = negative_log_likelihood(log_probs.chunk(2)[0], mask.chunk(2)[0])
            else:
                of_type = LOSSES[loss_type](self, pairs)
            losses = losses + weight * of_type
        return reduced(losses, reduction)

    def rewards(self, log_probs: Tensor, mask: Tensor, reference_log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """The implicit rewards ``beta r`` of chosen and rejected sequences, without gradients.  # (B,), (B,)"""
        with torch.no_grad():
            pairs = self._pairs(log_probs, mask, reference_log_probs)
            return self.beta * pairs.chosen, self.beta * pairs.rejected

    def _pairs(self, log_probs: Tensor, mask: Tensor, reference_log_probs: Tensor) -> Pairs:
        chosen, rejected = self._of_sequences(log_probs, mask).chunk(2)
        reference_chosen, reference_rejected = self._of_sequences(reference_log_probs, mask).chunk(2)
        ratios = chosen - reference_chosen, rejected - reference_rejected
        return Pairs(*ratios, chosen, rejected, *map(self._score, ratios), *lengths(mask).chunk(2))

    def _of_sequences(self, log_probs: Tensor, mask: Tensor) -> Tensor:
        if self.ld_alpha is None:
            return masked_sum(log_probs, mask)
        place = mask.bool().cumsum(dim=1)
        shared = torch.minimum(*mask.bool().sum(dim=1).chunk(2)).repeat(2)[:, None]
        factor = torch.ones_like(log_probs).masked_fill(place > shared, self.ld_alpha)
        return masked_sum(log_probs * factor, mask.bool() & (place > 0))

    def _score(self, ratio: Tensor) -> Tensor:
        """f'(exp(ratio)), the derivative of the divergence's generator."""
        if self.f_divergence == "forward_kl":
            return 1.0 - torch.exp(-ratio)
        if self.f_divergence == "js_divergence":
            return math.log(2.0) + F.logsigmoid(ratio)
        if self.f_divergence == "alpha_divergence" and abs(self.alpha - 1.0) >= 1e-6:
            exponent = ((self.alpha - 1.0) * ratio).float() if ratio.dtype.itemsize < 4 else (self.alpha - 1.0) * ratio
            bounded = exponent.clamp(max=LARGEST_EXPONENT.get(ratio.dtype, 80.0))
            return (torch.exp(bounded) - 1.0).to(ratio.dtype) / (self.alpha - 1.0)
        return ratio


def _smoothed(loss: DPOLoss, margin: Tensor) -> Tensor:
    keep, turn = F.logsigmoid(loss.beta * margin), F.logsigmoid(-loss.beta * margin)
    return -keep * (1.0 - loss.label_smoothing) - turn * loss.label_smoothing


def _exo_pair(loss: DPOLoss, pairs: Pairs) -> Tensor:
    """KL from the policy's choice between the two to the smoothed one."""
    logit, smoothing = loss.beta * pairs.margin, loss.label_smoothing
    chosen = torch.sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-smoothing))
    return chosen + torch.sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(smoothing))


def _nca_pair(loss: DPOLoss, pairs: Pairs) -> Tensor:
    chosen, rejected = loss.beta * pairs.chosen, loss.beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(loss: DPOLoss, pairs: Pairs) -> Tensor:
    logit, smoothing = loss.beta * pairs.margin, loss.label_smoothing
    clean, flipped = -(1.0 - smoothing) * F.logsigmoid(logit), -smoothing * F.logsigmoid(-logit)
    return (clean - flipped) / (1.0 - 2.0 * smoothing)


def _sppo_hard(loss: DPOLoss, pairs: Pairs) -> Tensor:
    return (pairs.chosen - 0.5 / loss.beta) ** 2 + (pairs.rejected + 0.5 / loss.beta) ** 2


def _aot(loss: DPOLoss, pairs: Pairs) -> Tensor:
    """Compares the sorted margins of the policy with those of the reference, whatever pairs they are of."""
    policy = pairs.chosen_log_prob - pairs.rejected_log_prob
    reference = policy - (pairs.chosen - pairs.rejected)
    return _smoothed(loss, policy.sort().values - reference.sort().values)


def _aot_unpaired(loss: DPOLoss, pairs: Pairs) -> Tensor:
    return _smoothed(loss, pairs.chosen.sort().values - pairs.rejected.sort().values)


def _apo_zero(loss: DPOLoss, pairs: Pairs) -> Tensor:
    return torch.sigmoid(-loss.beta * pairs.chosen) + torch.sigmoid(loss.beta * pairs.rejected)


def _apo_down(loss: DPOLoss, pairs: Pairs) -> Tensor:
    return torch.sigmoid(loss.beta * pairs.chosen) + torch.sigmoid(-loss.beta * (pairs.chosen - pairs.rejected))


def _discopop(loss: DPOLoss, pairs: Pairs) -> Tensor:
    """Between a logistic and an exponential loss, by how large the margin is."""
    logit = loss.beta * pairs.margin
    share = torch.sigmoid(logit / loss.discopop_tau)
    return -F.logsigmoid(logit) * (1.0 - share) + torch.exp(-logit) * share


# By loss type, but for sft, which is of tokens; each gives one number for every pair.
LOSSES: dict[str, Callable[[DPOLoss, Pairs], Tensor]] = {
    "sigmoid": lambda loss, pairs: -F.logsigmoid(loss.beta * pairs.margin),
    "hinge": lambda loss, pairs: torch.relu(1.0 - loss.beta * pairs.margin),
    "ipo": lambda loss, pairs: (pairs.mean_margin - 1.0 / (2.0 * loss.beta)) ** 2,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": lambda loss, pairs: -F.logsigmoid(loss.beta * pairs.chosen) - F.logsigmoid(-loss.beta * pairs.rejected),
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": lambda loss, pairs: -F.logsigmoid(loss.beta * pairs.mean_margin),
}


class LinearDPOLoss(DPOLoss):
    """:class:`DPOLoss` straight from hidden states and a head's weight, whose logits are never whole in memory.

    Arguments are those of :class:`DPOLoss`.

    Shape:
        input ``(2 B, T, D)``, linear_weight ``(C, D)``, target ``(2 B, T)`` with -100 outside of completions, already
        shifted so that ``input[:, t]`` predicts ``target[:, t]``. The reference is ``reference_log_probs``
        ``(2 B, T)``, or a head of its own: ``reference_input`` and ``reference_weight``.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head, target = torch.zeros(2, 3, 8), torch.zeros(50, 8), torch.ones(2, 3).long()
        >>> fused_losses.LinearDPOLoss()(hidden, head, target, reference_input=hidden, reference_weight=head)
        tensor(0.6931)

    Source: :class:`DPOLoss`.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        reference_input: Tensor | None = None,
        reference_weight: Tensor | None = None,
        reference_bias: Tensor | None = None,
        reference_log_probs: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        reference = Reference(reference_log_probs, reference_input, reference_weight, reference_bias)
        frozen = reference.of(target, temperature)
        if frozen is None:
            raise ValueError("a reference is needed: reference_log_probs, or reference_input and reference_weight")
        log_probs = Head(input, linear_weight, linear_bias).tokens(target, temperature).log_probs
        return super().forward(log_probs, target != IGNORED, frozen)
