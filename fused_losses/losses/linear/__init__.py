"""The linear family: losses of a head's logits, from hidden states and the head's weight."""

from .cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from .distillation import LinearJSDLoss, LinearKLDivLoss, linear_jsd
from .head import LinearCrossEntropyHead
from .log_probs import TokenLogProbs, TokenStatistics, linear_log_probs
from .vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = [
    "LinearCrossEntropyHead",
    "LinearCrossEntropyLoss",
    "LinearJSDLoss",
    "LinearKLDivLoss",
    "TokenLogProbs",
    "TokenStatistics",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_log_probs",
    "vocab_parallel_linear_cross_entropy",
]
