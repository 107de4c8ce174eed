"""Preference losses without a reference: CPO, SimPO and ORPO."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common import reduction_name
from ._tokens import (
    IGNORED,
    Head,
    check_choice,
    check_pairs,
    check_tokens,
    lengths,
    masked_sum,
    negative_log_likelihood,
    reduced,
)


class CPOLoss(nn.Module):
    """Contrastive preference optimisation from log-probabilities of tokens.

    Formula: ``-log sigmoid(beta (l_chosen - l_rejected)) + cpo_alpha nll_chosen``, with ``l`` the sum of a sequence's
    log-probabilities (their mean for ``ipo`` and ``simpo``), or another ``loss_type``

    Args:
        beta: factor of the margin.
        loss_type: ``"sigmoid"``, ``"hinge"``, ``"ipo"`` or ``"simpo"``.
        label_smoothing: how often the preference is taken to be the wrong way round; of ``sigmoid`` and ``simpo``.
        cpo_alpha: factor of the chosen sequences' negative log-likelihood, a mean over tokens; 0 is off.
        simpo_gamma: the margin that ``simpo`` asks for.
        alpha: of AlphaPO, which compares ``(1 - exp(-alpha l)) / alpha`` instead of ``l``; 0 is off.
        reduction: of pairs, ``"mean"``, ``"sum"`` or ``"none"``; read at call time.

    Shape:
        log_probs and mask ``(2 B, T)``: all chosen sequences, then all rejected ones in the same order. The mask
        is 1 for the tokens of completions.

    Returns:
        A 0-d tensor, or ``(B,)`` for ``"none"``.

    Raises:
        ValueError: for an unknown option or shapes that differ.

    Example:
        >>> import torch, fused_losses
        >>> log_probs = torch.tensor([[-1.0, -1.0], [-2.0, -3.0]])
        >>> fused_losses.CPOLoss()(log_probs, torch.ones(2, 2))
        tensor(1.5544)

    Source: Xu et al., Contrastive Preference Optimization, 2024; the variants as in TRL's ``CPOTrainer``.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        *,
        label_smoothing: float = 0.0,
        cpo_alpha: float = 1.0,
        simpo_gamma: float = 0.5,
        alpha: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__()
        check_choice("loss_type", loss_type, ("sigmoid", "hinge", "ipo", "simpo"))
        if label_smoothing and loss_type in ("hinge", "ipo"):
            raise ValueError(f"loss_type {loss_type!r} takes no label_smoothing, got {label_smoothing}")
        self.beta, self.loss_type, self.label_smoothing = beta, loss_type, label_smoothing
        self.cpo_alpha, self.simpo_gamma, self.alpha, self.reduction = cpo_alpha, simpo_gamma, alpha, reduction

    def forward(self, log_probs: Tensor, mask: Tensor) -> Tensor:
        check_tokens(log_probs, mask)
        check_pairs(log_probs)
        reduction = reduction_name(None, None, self.reduction)
        of_sequences = masked_sum(log_probs, mask)
        if self.loss_type in ("ipo", "simpo"):
            of_sequences = of_sequences / lengths(mask)
        if self.alpha != 0.0:
            of_sequences = -torch.expm1(-self.alpha * of_sequences) / self.alpha
        chosen, rejected = of_sequences.chunk(2)
        losses = self._of_margin(chosen - rejected)
        if self.cpo_alpha != 0.0:
            losses = losses + self.cpo_alpha * negative_log_likelihood(log_probs.chunk(2)[0], mask.chunk(2)[0])
        return reduced(losses, reduction)

    def _of_margin(self, margin: Tensor) -> Tensor:
        if self.loss_type == "hinge":
            return torch.relu(1.0 - self.beta * margin)
        if self.loss_type == "ipo":
            return (margin - 1.0 / (2.0 * self.beta)) ** 2
        logit = self.beta * margin - (self.simpo_gamma if self.loss_type == "simpo" else 0.0)
        keep, turn = F.logsigmoid(logit), F.logsigmoid(-logit)
        return -keep * (1.0 - self.label_smoothing) - turn * self.label_smoothing


class SimPOLoss(CPOLoss):
    """Simple preference optimisation: mean log-probabilities that are to differ by a margin.

    Formula: ``-log sigmoid(beta (m_chosen - m_rejected) - gamma)``, with ``m`` the mean of a sequence's
    log-probabilities

    Args:
        beta: factor of the margin.
        gamma: how much of it is asked for.
        label_smoothing, reduction: as in :class:`CPOLoss`.

    Shapes, result and errors are those of :class:`CPOLoss`.

    Example:
        >>> import torch, fused_losses
        >>> log_probs = torch.tensor([[-1.0, -1.0], [-2.0, -3.0]])
        >>> fused_losses.SimPOLoss()(log_probs, torch.ones(2, 2))
        tensor(0.0789)

    Source: Meng et al., SimPO, 2024; ``loss_type="simpo"`` and ``cpo_alpha=0`` of TRL's ``CPOTrainer``.
    """

    def __init__(self, beta: float = 2.0, gamma: float = 0.5, *, label_smoothing: float = 0.0, reduction: str = "mean"):
        super().__init__(
            beta,
            "simpo",
            label_smoothing=label_smoothing,
            cpo_alpha=0.0,
            simpo_gamma=gamma,
            reduction=reduction,
        )


class ORPOLoss(nn.Module):
    """Odds ratio preference optimisation from log-probabilities of tokens.

    Formula: ``nll_chosen - beta log sigmoid(log odds_chosen - log odds_rejected)``, with ``odds = p / (1 - p)`` and
    ``log p`` the mean of a sequence's log-probabilities

    Args:
        beta: factor of the odds ratio.
        reduction: of pairs, ``"mean"``, ``"sum"`` or ``"none"``; read at call time.

    Shape:
        log_probs and mask as in :class:`CPOLoss`; nll_mask ``(B, T)``, the tokens of the chosen sequences whose
        likelihood counts, prompts included where they are to be learnt; None is the mask.

    Returns:
        A 0-d tensor, or ``(B,)`` for ``"none"``.

    Raises:
        ValueError: for shapes that differ or an unknown reduction.

    Example:
        >>> import torch, fused_losses
        >>> log_probs = torch.tensor([[-1.0, -1.0], [-2.0, -3.0]])
        >>> fused_losses.ORPOLoss()(log_probs, torch.ones(2, 2))
        tensor(1.0143)

    Source: Hong et al., ORPO, 2024; ``ORPOTrainer`` of TRL.
    """

    def __init__(self, beta: float = 0.1, *, reduction: str = "mean"):
        super().__init__()
        self.beta, self.reduction = beta, reduction

    def forward(self, log_probs: Tensor, mask: Tensor, *, nll_mask: Tensor | None = None) -> Tensor:
        check_tokens(log_probs, mask)
        check_pairs(log_probs)
        reduction = reduction_name(None, None, self.reduction)
        chosen, rejected = (masked_sum(log_probs, mask) / lengths(mask)).chunk(2)
        log_odds = (chosen - rejected) - (log_of_complement(chosen) - log_of_complement(rejected))
        nll_mask = mask.chunk(2)[0] if nll_mask is None else nll_mask
        likelihood = negative_log_likelihood(log_probs.chunk(2)[0], nll_mask)
        return reduced(likelihood - self.beta * F.logsigmoid(log_odds), reduction)


def log_of_complement(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p, by whichever of two ways does not cancel."""
    far = log_p < -math.log(2.0)
    near = torch.log(-torch.expm1(log_p.masked_fill(far, -1.0)))
    return torch.where(far, torch.log1p(-torch.exp(log_p.masked_fill(~far, -1.0))), near)


class LinearCPOLoss(CPOLoss):
    """:class:`CPOLoss` straight from hidden states and a head's weight, whose logits are never whole in memory.

    Arguments are those of :class:`CPOLoss`.

    Shape:
        input ``(2 B, T, D)``, linear_weight ``(C, D)``, target ``(2 B, T)`` with -100 outside of completions, already
        shifted so that ``input[:, t]`` predicts ``target[:, t]``.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head, target = torch.zeros(2, 3, 8), torch.zeros(50, 8), torch.ones(2, 3).long()
        >>> fused_losses.LinearCPOLoss(cpo_alpha=0.0)(hidden, head, target)
        tensor(0.6931)

    Source: :class:`CPOLoss`.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        log_probs = Head(input, linear_weight, linear_bias).tokens(target, temperature).log_probs
        return super().forward(log_probs, target != IGNORED)


class LinearSimPOLoss(SimPOLoss, LinearCPOLoss):
    """:class:`SimPOLoss` straight from hidden states and a head's weight; called as :class:`LinearCPOLoss`.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head, target = torch.zeros(2, 3, 8), torch.zeros(50, 8), torch.ones(2, 3).long()
        >>> fused_losses.LinearSimPOLoss(gamma=0.0)(hidden, head, target)
        tensor(0.6931)

    Source: :class:`SimPOLoss`.
    """


class LinearORPOLoss(ORPOLoss):
    """:class:`ORPOLoss` straight from hidden states and a head's weight, whose logits are never whole in memory.

    Arguments are those of :class:`ORPOLoss`.

    Shape:
        input ``(2 B, T, D)``, linear_weight ``(C, D)``, target ``(2 B, T)`` with -100 where nothing is predicted,
        already shifted. mask ``(2 B, T)``: the tokens of completions; None is every label. The likelihood is of
        every label of the chosen sequences, prompts included where target has them.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head, target = torch.zeros(2, 3, 8), torch.zeros(50, 8), torch.ones(2, 3).long()
        >>> fused_losses.LinearORPOLoss()(hidden, head, target)
        tensor(3.9813)

    Source: :class:`ORPOLoss`.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        linear_bias: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        log_probs = Head(input, linear_weight, linear_bias).tokens(target, temperature).log_probs
        predicted = target != IGNORED
        completion = predicted if mask is None else mask
        return super().forward(log_probs, completion, nll_mask=predicted.chunk(2)[0])
