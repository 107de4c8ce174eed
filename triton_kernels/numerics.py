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
    # x (1 + x/2 (1 + x/3 (...))) where exp(x) - 1 would cancel.
    terms: tl.constexpr = 16 if x.dtype == tl.float64 else 9
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(terms - 1):
        series = 1.0 + series * x * (1.0 / (terms - i))
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) with 1 - e from expm1: nothing cancels near 0.
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)
