"""Elementary functions that Triton does not have or that would cancel."""

import triton
import triton.language as tl


@triton.jit
def over(x, divisor):
    """x / divisor. A GPU divides fp32 by such a product, too, but scales every x against overflow before."""
    return x / divisor if x.dtype == tl.float64 else x * (1.0 / divisor)


@triton.jit
def reciprocal(x):
    """1 / x to half a unit in the last place, of which a division has two."""
    return 1.0 / x if x.dtype == tl.float64 else tl.div_rn(1.0, x)


@triton.jit
def log1p(x):
    # What the rounding of 1 + x lost is put back.
    u = 1.0 + x
    corrected = tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(u == 1.0, x, tl.where(x == float("inf"), x, corrected))


@triton.jit
def expm1_near_zero(x):
    """exp(x) - 1 for |x| <= 1/2."""
    if x.dtype == tl.float64:  # x (1 + x/2 (1 + x/3 (...)))
        terms: tl.constexpr = 18
        p = tl.full(x.shape, 1.0, x.dtype)
        for i in tl.static_range(terms - 1):
            p = 1.0 + p * x * (1.0 / (terms - i))
        result = x * p
    else:
        p = x * (1.0 / 40320.0) + 1.0 / 5040.0
        p = p * x + 1.0 / 720.0
        p = p * x + 1.0 / 120.0
        p = p * x + 1.0 / 24.0
        p = p * x + 1.0 / 6.0
        p = p * x + 0.5
        result = p * x * x + x
    return result


@triton.jit
def expm1(x):
    # A series where exp(x) - 1 would cancel.
    return tl.where(tl.abs(x) < 0.5, expm1_near_zero(x), tl.exp(x) - 1.0)


@triton.jit
def log_of_bits(u, below):
    """What log_below_one is of fp32."""
    pattern = u.to(tl.int32, bitcast=True)
    exponent = (pattern - 0x3F3504F3) >> 23  # 0 from sqrt(1/2) on
    f = (pattern - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(u < 0.70710677, f, below)
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    whole = exponent.to(tl.float32)
    tail = p * f * square + (whole * -2.12194440e-4 - 0.5 * square)
    return whole * 0.693359375 + (f + tail)


@triton.jit
def log_below_one(u, below):
    """log(u) for a normal u of at most 1; below is u - 1, and keeps its digits where u has none left for them."""
    return tl.where(u < 0.7, tl.log(u), log1p(below)) if u.dtype == tl.float64 else log_of_bits(u, below)


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) with 1 - e from expm1: nothing cancels near 0.
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)
