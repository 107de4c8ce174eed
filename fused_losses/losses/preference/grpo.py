"""Group relative policy optimisation and its variants."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._tokens import IGNORED, Head, Reference, check_choice, check_tokens, lengths, masked_sum

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CLIPPED = {"grpo", "bnpo", "dr_grpo", "dapo", "luspo"}


class GRPOLoss(nn.Module):
    """Group relative policy optimisation from log-probabilities of tokens.

    Formula: ``-min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A) + beta kl``, averaged as the ``loss_type`` says, with
    ``w = exp(log p - log p_old)``, ``A`` the advantage and ``kl = exp(d) - d - 1`` with ``d = log p_reference - log p``

    Args:
        loss_type: how tokens are averaged: ``"grpo"`` and ``"sapo"`` first within sequences, ``"bnpo"`` over the
            batch's tokens, ``"dr_grpo"`` over ``max_completion_length`` each, ``"dapo"``, ``"cispo"`` and
            ``"vespo"`` over ``normalizer`` tokens, ``"luspo"`` over sequences. ``cispo``, ``sapo`` and ``vespo``
            also weigh tokens in a way of their own rather than clip.
        epsilon, epsilon_high: how far the ratio may leave 1 below and above; None is ``epsilon`` above, too.
            ``cispo`` bounds the ratio itself by ``epsilon_high``.
        delta: an upper bound of the unclipped ratio, above ``1 + epsilon_high``; None is off.
        beta: factor of the divergence from the reference; 0 is off.
        importance_sampling_level: ``"token"``, or ``"sequence"`` for one ratio, of the mean, per sequence.
        bias_correction_kl: multiplies the divergence by the ratio.
        top_entropy_quantile: only tokens whose entropy is in this share from the top count; 1 is all.
        off_policy_threshold: leaves out sequences of negative advantage whose divergence from the sampling
            policy is larger; None is off.
        entropy_coef: factor of the mean entropy that is subtracted.
        max_completion_length: of ``dr_grpo``.
        sapo_temperatures: of ``sapo``, for positive advantages and others.
        vespo_k, vespo_lambda: of ``vespo``, for advantages of at least 0 and others.

    Shape:
        log_probs and mask ``(B, T)``; advantages ``(B,)`` or ``(B, T)``. old_log_probs ``(B, T)`` of the policy that
        sampled, None for this one; reference_log_probs for ``beta``; sampling_log_probs for
        ``off_policy_threshold`` (None is old_log_probs); entropy ``(B, T)`` for ``entropy_coef`` and
        ``top_entropy_quantile``; importance_ratio ``(B, T)`` multiplies the policy's terms; normalizer, a number or
        0-d tensor, replaces the number of tokens of ``dapo``, ``cispo`` and ``vespo``: the count over all
        processes and accumulation steps divided by the processes.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: for an unknown option, a tensor that an option needs, or shapes that differ.

    Example:
        >>> import torch, fused_losses
        >>> log_probs, advantages = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]]), torch.tensor([1.0, -1.0])
        >>> fused_losses.GRPOLoss()(log_probs, torch.ones(2, 2), advantages, old_log_probs=log_probs - 0.5)
        tensor(0.2244)

    Source: Shao et al., DeepSeekMath, 2024; the variants as in TRL's ``GRPOTrainer``.
    """

    def __init__(
        self,
        loss_type: str = "dapo",
        *,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        beta: float = 0.0,
        importance_sampling_level: str = "token",
        bias_correction_kl: bool = False,
        top_entropy_quantile: float = 1.0,
        off_policy_threshold: float | None = None,
        entropy_coef: float = 0.0,
        max_completion_length: int | None = None,
        sapo_temperatures: tuple[float, float] = (1.0, 1.05),
        vespo_k: tuple[float, float] = (2.0, 3.0),
        vespo_lambda: tuple[float, float] = (3.0, 2.0),
    ):
        super().__init__()
        check_choice("loss_type", loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
        if (loss_type == "dr_grpo") != (max_completion_length is not None):
            raise ValueError("max_completion_length belongs to loss_type='dr_grpo', which needs it")
        if delta is not None and loss_type not in CLIPPED:
            raise ValueError(f"loss_type {loss_type!r} takes no delta, got {delta}")
        if epsilon_high is not None and loss_type not in CLIPPED | {"cispo"}:
            raise ValueError(f"loss_type {loss_type!r} takes no epsilon_high, got {epsilon_high}")
        if bias_correction_kl and beta == 0.0:
            raise ValueError("bias_correction_kl needs a divergence to correct: a beta other than 0")
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.epsilon, self.epsilon_high = epsilon, epsilon if epsilon_high is None else epsilon_high
        self.delta, self.beta, self.bias_correction_kl = delta, beta, bias_correction_kl
        self.top_entropy_quantile, self.entropy_coef = top_entropy_quantile, entropy_coef
        self.off_policy_threshold, self.max_completion_length = off_policy_threshold, max_completion_length
        self.sapo_temperatures, self.vespo_k, self.vespo_lambda = sapo_temperatures, vespo_k, vespo_lambda

    def forward(
        self,
        log_probs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        *,
        old_log_probs: Tensor | None = None,
        reference_log_probs: Tensor | None = None,
        sampling_log_probs: Tensor | None = None,
        entropy: Tensor | None = None,
        importance_ratio: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        advantages = self._checked(log_probs, mask, advantages, reference_log_probs, entropy)
        check_tokens(
            log_probs,
            mask,
            old_log_probs=old_log_probs,
            reference_log_probs=reference_log_probs,
            sampling_log_probs=sampling_log_probs,
            entropy=entropy,
            importance_ratio=importance_ratio,
        )
        if normalizer is not None and self.loss_type not in ("dapo", "cispo", "vespo"):
            raise ValueError(f"loss_type {self.loss_type!r} takes no normalizer")
        log_probs = log_probs.masked_fill(~mask.bool(), 0.0)
        old = log_probs.detach() if old_log_probs is None else old_log_probs.masked_fill(~mask.bool(), 0.0)
        log_ratio = log_probs - old
        log_weight = log_ratio
        if self.importance_sampling_level == "sequence":
            log_weight = (masked_sum(log_ratio, mask) / lengths(mask))[:, None]
        losses = self._of_policy(log_weight, log_ratio, log_probs, mask, advantages, importance_ratio)
        if self.off_policy_threshold is not None:
            sampled = old if sampling_log_probs is None else sampling_log_probs
            losses = losses * self._is_on_policy(
                log_probs.detach(), sampled, mask, advantages, self.off_policy_threshold
            )
        counted = mask
        if entropy is not None and self.top_entropy_quantile < 1.0:
            counted = self._of_high_entropy(entropy, mask)
            losses = losses * counted
        if importance_ratio is not None and self.loss_type != "vespo":
            losses = losses * importance_ratio
        if reference_log_probs is not None and self.beta != 0.0:
            losses = losses + self.beta * self._divergence(log_probs, reference_log_probs, mask, log_weight)
        loss = self._averaged(losses.expand(mask.shape), mask, normalizer)
        if entropy is not None and self.entropy_coef != 0.0:
            loss = loss - self.entropy_coef * masked_sum(entropy, counted).sum() / counted.sum().clamp(min=1)
        return loss

    def _checked(
        self, log_probs: Tensor, mask: Tensor, advantages: Tensor, reference: Tensor | None, entropy: Tensor | None
    ) -> Tensor:
        """Advantages (B, 1) or (B, T)."""
        if self.beta != 0.0 and reference is None:
            raise ValueError(f"beta={self.beta} needs reference_log_probs")
        if entropy is None and (self.entropy_coef != 0.0 or self.top_entropy_quantile < 1.0):
            raise ValueError("entropy_coef and top_entropy_quantile need the entropy of every token")
        if advantages.shape not in (log_probs.shape, log_probs.shape[:1]):
            raise ValueError(
                f"advantages must be (B,) or (B, T) for log_probs {tuple(log_probs.shape)}, got "
                f"{tuple(advantages.shape)}"
            )
        return advantages[:, None] if advantages.ndim == 1 else advantages

    def _of_policy(
        self,
        log_weight: Tensor,
        log_ratio: Tensor,
        log_probs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        importance_ratio: Tensor | None,
    ) -> Tensor:
        """The policy's terms.  # (B, T), or (B, 1) where sequences have one"""
        weight = torch.exp(log_weight)
        if self.loss_type == "cispo":
            return -weight.clamp(max=self.epsilon_high).detach() * advantages * log_probs
        if self.loss_type == "sapo":
            temperature = _by(advantages > 0, self.sapo_temperatures, weight)
            return -torch.sigmoid(temperature * (weight - 1.0)) * 4.0 / temperature * advantages
        if self.loss_type == "vespo":
            return -self._vespo_weight(log_ratio, mask, advantages, importance_ratio) * advantages * log_probs
        clipped = weight.clamp(1.0 - self.epsilon, 1.0 + self.epsilon_high)
        weight = weight if self.delta is None else weight.clamp(max=self.delta)
        return -torch.minimum(weight * advantages, clipped * advantages)

    @torch.no_grad()
    def _vespo_weight(
        self, log_ratio: Tensor, mask: Tensor, advantages: Tensor, importance_ratio: Tensor | None
    ) -> Tensor:
        """exp(lambda) w^k exp(-lambda w) of a sequence's ratio w; bounded as the original bounds it."""
        lowest = math.log(1e-8)
        log_w = masked_sum(log_ratio.clamp(-20.0, 20.0), mask)[:, None]
        if importance_ratio is not None:
            log_w = log_w + importance_ratio.log().clamp(lowest, 20.0).sum(dim=1, keepdim=True)
        log_w = log_w.clamp(lowest, 20.0)
        k = _by(advantages >= 0, self.vespo_k, log_w)
        rate = _by(advantages >= 0, self.vespo_lambda, log_w).clamp(min=1e-4)
        return torch.exp(rate + k * log_w - rate * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    @staticmethod
    def _is_on_policy(log_probs: Tensor, sampled: Tensor, mask: Tensor, advantages: Tensor, threshold: float) -> Tensor:
        divergence = masked_sum((sampled - log_probs).nan_to_num(nan=0.0), mask) / lengths(mask)
        return ((advantages >= 0) | (divergence[:, None] <= threshold)).to(log_probs.dtype)

    def _of_high_entropy(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """The tokens of the batch whose entropy is in the wanted share from the top."""
        # Looking for the masked ones would wait for a GPU: they become NaN, which a quantile can leave out.
        counted = entropy.detach().float().masked_fill(~mask.bool(), float("nan"))
        threshold = torch.nanquantile(counted, 1.0 - self.top_entropy_quantile)
        return (entropy >= threshold) & mask.bool()

    def _divergence(self, log_probs: Tensor, reference: Tensor, mask: Tensor, log_weight: Tensor) -> Tensor:
        d = reference.masked_fill(~mask.bool(), 0.0) - log_probs
        divergence = torch.exp(d) - d - 1.0
        return divergence * torch.exp(log_weight) if self.bias_correction_kl else divergence

    def _averaged(self, losses: Tensor, mask: Tensor, normalizer: Tensor | float | None) -> Tensor:
        of_sequences = masked_sum(losses, mask)
        if self.loss_type in ("grpo", "sapo"):
            return (of_sequences / lengths(mask)).mean()
        if self.loss_type == "luspo":
            return of_sequences.mean()
        if self.max_completion_length is not None:
            return of_sequences.sum() / (len(losses) * self.max_completion_length)
        return of_sequences.sum() / (mask.sum().clamp(min=1) if normalizer is None else normalizer)


def _by(condition: Tensor, numbers: tuple[float, float], like: Tensor) -> Tensor:
    """The first number where the condition holds, else the second; unlike torch.where's, fp64 ones for fp64."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_full(condition.shape, numbers[1], dtype=dtype).masked_fill(condition, numbers[0])


class LinearGRPOLoss(GRPOLoss):
    """:class:`GRPOLoss` straight from hidden states and a head's weight, whose logits are never whole in memory.

    Arguments are those of :class:`GRPOLoss`; log-probabilities and entropies are made here.

    Shape:
        input ``(B, T, D)``, linear_weight ``(C, D)``, target ``(B, T)`` with -100 outside of completions, already
        shifted; advantages ``(B,)`` or ``(B, T)``. The reference is ``reference_log_probs`` ``(B, T)``, or a head of
        its own: ``reference_input`` and ``reference_weight``. The rest is passed on.

    Example:
        >>> import torch, fused_losses
        >>> hidden, head, target = torch.zeros(2, 3, 8), torch.zeros(50, 8), torch.ones(2, 3).long()
        >>> fused_losses.LinearGRPOLoss()(hidden, head, target, torch.tensor([1.0, 0.0]))
        tensor(-0.5000)

    Source: :class:`GRPOLoss`.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        advantages: Tensor,
        *,
        linear_bias: Tensor | None = None,
        reference_input: Tensor | None = None,
        reference_weight: Tensor | None = None,
        reference_bias: Tensor | None = None,
        reference_log_probs: Tensor | None = None,
        temperature: float = 1.0,
        **rest: Tensor | float | None,
    ) -> Tensor:
        reference = Reference(reference_log_probs, reference_input, reference_weight, reference_bias)
        tokens = Head(input, linear_weight, linear_bias).tokens(target, temperature)
        uses_entropy = self.entropy_coef != 0.0 or self.top_entropy_quantile < 1.0
        return super().forward(
            tokens.log_probs,
            target != IGNORED,
            advantages,
            reference_log_probs=reference.of(target, temperature),
            entropy=tokens.entropy if uses_entropy else None,
            **rest,  # type: ignore[arg-type]
        )
