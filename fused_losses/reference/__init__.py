"""The specification of every loss in plain torch: what the kernels are tested against and fall back to."""

from . import linear, pointwise, softmax

__all__ = ["linear", "pointwise", "softmax"]
