"""The linear family: losses of a head's logits, from hidden states and the head's weight."""

from .cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from .log_probs import TokenLogProbs, TokenStatistics, linear_log_probs

__all__ = [
    "LinearCrossEntropyLoss",
    "TokenLogProbs",
    "TokenStatistics",
    "linear_cross_entropy",
    "linear_log_probs",
]
