"""Kahneman-Tversky optimisation: sequences that are each desirable or not, without pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._common import reduction_name
from ._tokens import IGNORED, Head, Reference, check_choice, check_tokens, masked_sum, reduced


class KTOLoss(nn.Module):
    """Kahneman-Tversky optimisation from log-probabilities of tokens.

    Formula: ``w_d (1 - sigmoid(beta (r - kl)))`` for a desirable sequence and ``w_u (1 - sigmoid(beta (kl - r)))``
    for another, with ``r = sum_t log p - sum_t log p_reference``

    Args:
        beta: how strongly the policy is held to its reference.
        loss_type: ``"kto"``, or ``"apo_zero_unpaired"``, which takes no ``kl``.
        desirable_weight, undesirable_weight: of the two kinds of sequences.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; read at call time.

    Shape:
        log_probs, mask and reference_log_probs ``(B, T)``; desirable ``(B,)``, true or false; kl 0-d, how far the
        policy is from its reference on other sequences: the mean over all processes of ``r`` for mismatched
        prompts and completions, taken as 0 where it is negative.

    Returns:
        A 0-d tensor, or ``(B,)`` for ``"none"``.

    Raises:
        ValueError: for an unknown option, shapes that differ, or a kl that is missing or not taken.

    Example:
        >>> import torch, fused_losses
        >>> log_probs, reference = torch.tensor([[-1.0, -1.0], [-2.0, -3.0]]), torch.full((2, 2), -1.5)
        >>> loss = fused_losses.KTOLoss()
        >>> loss(log_probs, torch.ones(2, 2), torch.tensor([True, False]), reference, kl=torch.tensor(0.0))
        tensor(0.4626)

    Source: Ethayarajh et al., KTO, 2024; the variants as in TRL's ``KTOTrainer``.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str = "kto",
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reduction: str = "mean",
    ):
        super().__init__()
        check_choice("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
        self.beta, self.loss_type, self.reduction = beta, loss_type, reduction
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def forward(
        self,
        log_probs: Tensor,
        mask: Tensor,
        desirable: Tensor,
        reference_log_probs: Tensor,
        *,
        kl: Tensor | None = None,
    ) -> Tensor:
        check_tokens(log_probs, mask, reference_log_probs=reference_log_probs)
        if desirable.shape != log_probs.shape[:1]:
            raise ValueError(
                f"desirable must be one for each of {len(log_probs)} sequences, got {tuple(desirable.shape)}"
            )
        if (kl is None) != (self.loss_type == "apo_zero_unpaired"):
            raise ValueError(
                f"loss_type {self.loss_type!r} takes {'no kl' if kl is not None else 'a kl, a 0-d tensor'}"
            )
        reduction = reduction_name(None, None, self.reduction)
        ratio = masked_sum(log_probs, mask) - masked_sum(reference_log_probs, mask)
        if kl is not None:
            ratio = ratio - kl.detach().clamp(min=0)
        wanted = self.desirable_weight * torch.sigmoid(-self.beta * ratio)
        unwanted = self.undesirable_weight * torch.sigmoid(self.beta * ratio)
        return reduced(torch.where(desirable.bool(), wanted, unwanted), reduction)


class LinearKTOLoss(KTOLoss):
    """:class:`KTOLoss` straight from hidden states and a head's weight, whose logits are never whole in memory.

    Arguments are those of :class:`KTOLoss`.

    Shape:
        input ``(B, T, D)``, linear_weight ``(C, D)``, target ``(B, T)`` with -100 outside of completions, already
        shifted; desirable ``(B,)``; kl 0-d. The reference is ``reference_log_probs`` ``(B, T)``, or a head of its
        own: ``reference_input`` and ``reference_weight``.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head, target = torch.zeros(2, 3, 8), torch.zeros(50, 8), torch.ones(2, 3).long()
        >>> loss, reference = fused_losses.LinearKTOLoss(loss_type="apo_zero_unpaired"), torch.full((2, 3), -4.0)
        >>> loss(hidden, head, target, torch.tensor([True, False]), reference_log_probs=reference)
        tensor(0.5000)

    Source: :class:`KTOLoss`.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        desirable: Tensor,
        *,
        kl: Tensor | None = None,
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
        return super().forward(log_probs, target != IGNORED, desirable, frozen, kl=kl)
