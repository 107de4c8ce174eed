"""What generated kernels are made of where Triton and libdevice have no such function; results are torch's."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def largest(x, AXIS: tl.constexpr, KEEP: tl.constexpr):
    """The maximum along an axis; tl.max drops NaN."""
    if x.dtype.is_floating():
        has_nan = tl.max((x != x).to(tl.int32), AXIS, keep_dims=KEEP) != 0
        return tl.where(has_nan, float("nan"), tl.max(tl.where(x == x, x, float("-inf")), AXIS, keep_dims=KEEP))
    else:
        return tl.max(x, AXIS, keep_dims=KEEP)


@triton.jit
def smallest(x, AXIS: tl.constexpr, KEEP: tl.constexpr):
    if x.dtype.is_floating():
        return -largest(-x, AXIS, KEEP)
    else:
        return tl.min(x, AXIS, keep_dims=KEEP)


@triton.jit
def is_before(a, place_a, b, place_b, LARGEST: tl.constexpr):
    """Whether a wins: a NaN does, then the better one, and among equals the first."""
    better = a > b if LARGEST else a < b
    better = (better & (b == b)) | ((a != a) & (b == b))
    return better | (((a == b) | ((a != a) & (b != b))) & (place_a < place_b))


@triton.jit
def first_place(x, place, extreme, AXIS: tl.constexpr, KEEP: tl.constexpr):
    """The first place of an extreme value along an axis."""
    holds = (x == extreme) | ((x != x) & (extreme != extreme))
    return tl.min(tl.where(holds, place, 0x7FFFFFFFFFFFFFFF), AXIS, keep_dims=KEEP)


@triton.jit
def place(x, NARROW: tl.constexpr):
    """A position; in 32 bits where all of them fit, which is many times faster."""
    return tl.cast(x, tl.int32 if NARROW else tl.int64)


@triton.jit
def apart(position, program):
    """The same positions, of which the compiler no longer knows that wide loads fit: neighbours get one each."""
    return position + (program < 0).to(position.dtype)


@triton.jit
def is_inside(x, size):
    """Whether 0 <= x < size, in one comparison."""
    kind: tl.constexpr = tl.uint32 if x.dtype == tl.int32 else tl.uint64
    return x.to(kind) < tl.cast(size, kind)


@triton.jit
def divided(x, size, NARROW: tl.constexpr):
    """Quotient and rest of positions."""
    if NARROW:
        small, by = x.to(tl.uint32), tl.cast(size, tl.uint32)
        return (small // by).to(tl.int32), (small % by).to(tl.int32)
    else:
        return x // size, x % size


@triton.jit
def sigmoid(x):
    return libdevice.div_rn(tl.full((), 1.0, x.dtype), 1.0 + libdevice.exp(-x))


@triton.jit
def reciprocal(x):
    return libdevice.div_rn(tl.full((), 1.0, x.dtype), x)


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def fmod(x, y):
    if x.dtype.is_floating():
        return libdevice.fmod(x, y)
    else:
        return tl.where(y == 0, 0, x % tl.where(y == 0, 1, y)).to(x.dtype)


@triton.jit
def remainder(x, y):
    """The sign is the divisor's, as in Python."""
    rest = fmod(x, y)
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
def floor_divide(x, y):
    if x.dtype.is_floating():
        rest = libdevice.fmod(x, y)
        quotient = libdevice.div_rn(x - rest, y)
        quotient = tl.where((rest != 0) & ((rest < 0) != (y < 0)), quotient - 1.0, quotient)
        below = tl.floor(quotient)
        whole = tl.where(quotient - below > 0.5, below + 1.0, below)
        exact = libdevice.div_rn(x, y)
        whole = tl.where(quotient == 0, libdevice.copysign(tl.zeros_like(exact), exact), whole)
        return tl.where(y == 0, exact, whole)
    else:
        by = tl.where(y == 0, 1, y)
        quotient = x // by
        is_above = (x % by != 0) & ((x < 0) != (by < 0))
        return tl.where(y == 0, 0, quotient - is_above.to(x.dtype)).to(x.dtype)


@triton.jit
def digamma(value):
    """The recurrence moves x above 8, where the asymptotic series holds; below 1/2, the reflection formula."""
    x = value.to(tl.float64)
    is_low = x < 0.5
    y = tl.where(is_low, 1.0 - x, x)
    near = y < 8.0
    # 1/y + 1/(y + 1) + ... as one fraction, and all divisions as one.
    small = tl.where(near, y, 1.0)
    below, product = tl.full(y.shape, 1.0, tl.float64), small
    for k in tl.static_range(1, 8):
        below = below * (small + k) + product
        product *= small + k
    far = tl.where(near, y + 8.0, y)
    by_both = 1.0 / (far * product)
    by_far = by_both * product
    z = by_far * by_far
    p = 1.0 / 12 - z * 3617.0 / 8160
    p = p * z - 691.0 / 32760
    p = p * z + 1.0 / 132
    p = p * z - 1.0 / 240
    p = p * z + 1.0 / 252
    p = p * z - 1.0 / 120
    p = p * z + 1.0 / 12
    result = libdevice.log(far) - 0.5 * by_far - p * z - tl.where(near, below * by_both * far, 0.0)
    if holds_anywhere(is_low):
        turn = x - libdevice.rint(x)
        reflected = result - 3.14159265358979323846 * libdevice.cospi(turn) / libdevice.sinpi(turn)
        result = tl.where(is_low, reflected, result)
        result = tl.where((x < 0) & (x == tl.floor(x)), float("nan"), result)
        pole = -libdevice.copysign(tl.full(x.shape, float("inf"), tl.float64), x)
        result = tl.where(x == 0, pole, result)
    return tl.where(x == float("inf"), x, result).to(value.dtype)


@triton.jit
def holds_anywhere(condition):
    """Whether a block has something to do that few have."""
    if condition.type.is_block():
        return tl.max(condition.to(tl.int32), None) != 0
    else:
        return condition
