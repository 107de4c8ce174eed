"""Fused kernels for losses written in plain torch."""

from .module import fuse

__all__ = ["fuse"]
