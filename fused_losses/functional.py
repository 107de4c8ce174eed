"""Every loss as a function, in the style of :mod:`torch.nn.functional`."""

from .losses.divergence import jsd_loss, tvd_loss
from .losses.linear import (
    linear_cross_entropy,
    linear_jsd,
    linear_log_probs,
    vocab_parallel_linear_cross_entropy,
)
from .losses.pointwise import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    charbonnier_loss,
    huber_loss,
    kl_div,
    l1_loss,
    log_cosh_loss,
    mse_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from .losses.softmax import cross_entropy

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "charbonnier_loss",
    "cross_entropy",
    "huber_loss",
    "jsd_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_log_probs",
    "log_cosh_loss",
    "mse_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "tvd_loss",
    "vocab_parallel_linear_cross_entropy",
]
