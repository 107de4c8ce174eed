"""The specification of every loss in plain torch: what the kernels are tested against and fall back to."""

from . import divergence, linear, pointwise, softmax

__all__ = ["divergence", "linear", "pointwise", "softmax"]
