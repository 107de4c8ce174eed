"""Triton kernels of a program: planned as tiles, written as source, launched."""
