"""Fused kernels for losses written in plain torch."""
