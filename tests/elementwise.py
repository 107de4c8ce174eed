"""Every elementwise operation of generated kernels, in a few functions of two tensors."""

import torch

UNARY = (
    "neg abs sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tan sinh cosh tanh asin acos atan "
    "asinh acosh atanh sigmoid erf erfc erfinv lgamma digamma floor ceil round trunc isnan isinf logical_not"
)
BINARY = (
    "add sub mul div pow maximum minimum fmax fmin fmod remainder floor_divide atan2 hypot copysign lt le gt ge eq ne "
    "logical_and logical_or logical_xor"
)
WHOLE = "abs sign add sub mul maximum minimum fmod remainder floor_divide bitwise_and bitwise_or bitwise_xor eq lt"


def of_one(x, y):
    rounded = (x.to(low).to(x.dtype) for low in (torch.bfloat16, torch.float16))
    return *(getattr(torch, name)(x) for name in UNARY.split()), *rounded


def of_two(x, y):
    powers = (x.abs() ** 0.5, x.abs() ** 2.5, x**3, x**-1)
    return *(getattr(torch, name)(x, y) for name in BINARY.split()), torch.where(x > 0, 2.0, 0.1), *powers


def of_whole_numbers(x, y):
    two = (getattr(torch, name) for name in WHOLE.split()[2:])
    sums = (x.sum(), x.amax(), x.amin(), x.argmax(), x.clamp(max=3), ~x, ~(x > 0), x.float() / 3, x.bool().double())
    return x.abs(), x.sign(), *(function(x, y) for function in two), *sums


def floats(dtype):
    """Ordinary numbers, and those where functions end."""
    hard = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    x = torch.cat([hard, torch.linspace(-4, 4, 30, dtype=dtype)])
    return torch.meshgrid(x, x.flip(0), indexing="ij")


def whole(dtype):
    """Without zeros to divide by, and sums that wrap."""
    small = torch.arange(1, 4) if not dtype.is_signed else torch.tensor([-3, -2, -1, 1, 2, 5])
    return torch.meshgrid(torch.arange(3 if dtype is torch.uint8 else -4, 7).to(dtype), small.to(dtype), indexing="ij")
