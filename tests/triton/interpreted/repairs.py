"""Makes Triton's interpreter say what a GPU says: rounding and products of bf16, fp64 scalars, NaN in maxima, log(0).

It has no libdevice; torch's functions of the same names stand in for it.

Imported by conftest before any kernel. test_repairs.py fails if Triton's internals change under it.
"""

from __future__ import annotations

import functools
import inspect
import math

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
stock_cast, stock_binary, stock_unary = Builder.cast_impl, Builder.binary_op, Builder.unary_op
stock_convert, stock_sum = interpreter._implicit_cvt, interpreter.ReduceOps.sum


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of fp32 values in bf16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(values))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def is_bfloat16(handle) -> bool:
    return not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == tl.bfloat16


def widened(handle) -> np.ndarray:
    return from_bfloat16(handle.data) if is_bfloat16(handle) else handle.data


def cast(self, source, to):
    if is_bfloat16(source):
        values = from_bfloat16(source.data)
        if to.scalar == tl.bfloat16:
            return Handle(source.data, to.scalar)
        return Handle(values.astype(interpreter._get_np_dtype(to)), to.scalar)
    if to.scalar == tl.bfloat16:
        return Handle(to_bfloat16(source.data.astype(np.float32)), to.scalar)
    return stock_cast(self, source, to)


def binary(self, left, right, operation):
    if is_bfloat16(left) or is_bfloat16(right):
        result = operation(widened(left), widened(right))
        result = Handle(result if result.dtype == bool else to_bfloat16(result), left.dtype.scalar)
    else:
        result = stock_binary(self, left, right, operation)
    if result.data.dtype == bool:
        result.dtype = tl.int1  # the interpreter leaves what was compared, which a broadcast of one goes by
    return result


def unary(self, argument, operation):
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if not is_bfloat16(argument):
            return stock_unary(self, argument, operation)
        return Handle(to_bfloat16(operation(widened(argument))), argument.dtype.scalar)


def dot(self, left, right, total, *precision):
    wide = total.data.dtype
    return Handle(np.matmul(widened(left).astype(wide), widened(right).astype(wide)) + total.data, total.dtype.scalar)


def fma(self, left, right, addend):
    """Rounded once: a product of two numbers of fp32 is one of fp64."""
    wide = [argument.data.astype(np.float64) for argument in (left, right, addend)]
    return Handle((wide[0] * wide[1] + wide[2]).astype(addend.data.dtype), addend.dtype.scalar)


def convert(argument):
    if isinstance(argument, float):  # our kernels declare their scalars fp64; the interpreter would lose that
        return tl.tensor(Handle(np.array([argument], dtype=np.float64), tl.float64), tl.float64)
    return stock_convert(argument)


FUNCTIONS = """
    exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh asin acos atan asinh acosh atanh erf erfc erfinv
    lgamma rsqrt trunc atan2 hypot copysign pow fmod
"""
STAND_INS = {name: getattr(torch, name) for name in FUNCTIONS.split()}
STAND_INS |= {"div_rn": torch.div, "sqrt_rn": torch.sqrt, "rint": torch.round}
STAND_INS |= {"sinpi": lambda x: torch.sin(x * math.pi), "cospi": lambda x: torch.cos(x * math.pi)}


def stand_in(function):
    """An elementwise function of tensors of one dtype, as libdevice has them."""

    def call(*arguments):
        (dtype,) = {argument.dtype.scalar for argument in arguments}
        assert dtype in (tl.float32, tl.float64), f"libdevice has no function of {dtype}"
        result = function(*(torch.from_numpy(np.ascontiguousarray(argument.handle.data)) for argument in arguments))
        shapes = [argument.shape for argument in arguments if argument.type.is_block()]
        kind = tl.block_type(dtype, list(np.broadcast_shapes(*shapes))) if shapes else dtype
        return tl.tensor(Handle(result.numpy(), dtype), kind)

    return call


@functools.cache
def builtin_names(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtins(package, builder, scope) -> None:
    """Looks for the functions of a package once, not in every call of every kernel's function: half of its time."""
    for name in builtin_names(package):
        if tl.core.is_builtin(member := getattr(package, name)):  # no more where a caller has patched it
            interpreter._patch_attr(package, name, member, builder, scope)


def install() -> None:
    for name, function in STAND_INS.items():
        setattr(libdevice, name, stand_in(function))
    Builder.cast_impl, Builder.binary_op, Builder.unary_op = cast, binary, unary
    Builder.create_dot, Builder.create_fma = dot, fma
    # The hardware's maximum drops NaN unless told otherwise.
    Builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    Builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    interpreter._implicit_cvt = convert
    interpreter._patch_builtin = patch_builtins
    np.seterr(divide="ignore", invalid="ignore", over="ignore")  # a GPU gives inf and NaN without a word
