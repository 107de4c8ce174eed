"""Elementary functions that Triton does not have or that would cancel."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    # What the rounding of 1 + x lost is put back.
    u = 1.0 + x
    corrected = tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(u == 1.0, x, tl.where(x == float("inf"), x, corrected))


@triton.jit
def expm1(x):
    p = 1.0 / 3628800.0
    p = p * x + 1.0 / 362880.0
    p = p * x + 1.0 / 40320.0
    p = p * x + 1.0 / 5040.0
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.35, p * x * x + x, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) with 1 - e from expm1: nothing cancels near 0.
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)
