"""Triton of constants, names and elementwise operations."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..compiler import BuildError
from ..expressions import INFIX, simple_power
from ..ir import Expression

# What one element is computed with.
COMPUTED = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.float32",
    torch.float16: "tl.float32",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
_INFIX = {name: sign for name, sign in INFIX.items() if name != "div"}  # which rounds as torch does in libdevice alone
# Functions that literals may be given to as they are.
_BESIDE_LITERALS = {
    "where": "tl.where",
    "maximum": "fl.maximum",
    "minimum": "fl.minimum",
    "fmax": "tl.maximum",
    "fmin": "tl.minimum",
}
# Of libdevice, which is what torch's own kernels call: correct to an ulp or two.
_LIBDEVICE = {
    **{name: name for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan")},
    **{name: name for name in ("sinh", "cosh", "tanh", "asin", "acos", "atan", "asinh", "acosh", "atanh")},
    **{name: name for name in ("erf", "erfc", "erfinv", "lgamma", "rsqrt", "trunc", "atan2", "hypot", "copysign")},
    "exp_nonpositive": "exp",
    "pow": "pow",
    "div": "div_rn",
    "sqrt": "sqrt_rn",
    "round": "rint",
}
FUNCTIONS = {
    **{name: f"libdevice.{function}" for name, function in _LIBDEVICE.items()},
    **{name: f"tl.{name}" for name in ("abs", "floor", "ceil")},
    **{name: f"fl.{name}" for name in ("sign", "reciprocal", "sigmoid", "digamma")},
    **{name: f"fl.{name}" for name in ("fmod", "remainder", "floor_divide")},
}
_POWERS = {
    0.5: "libdevice.sqrt_rn({x})",
    1.0: "{x}",
    2.0: "{x} * {x}",
    3.0: "{x} * {x} * {x}",
    -1.0: "fl.reciprocal({x})",
}


def literal(value: Any, dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return str(bool(value))
    if not dtype.is_floating_point:
        return str(int(value))
    return repr(float(value)) if math.isfinite(value) else f'float("{float(value)}")'


def typed(text: str, dtype: torch.dtype) -> str:
    """A literal as a scalar of a dtype; names have theirs."""
    return f"tl.full((), {text}, {COMPUTED[dtype]})" if is_literal(text) else text


def is_literal(text: str) -> bool:
    return text in ("True", "False") or not text.isidentifier()


def fitting(text: str, dtype: torch.dtype) -> str:
    """A literal as an argument beside a name of a dtype: as it is, where Triton takes it for no wider one."""
    if not is_literal(text) or COMPUTED[dtype] not in ("tl.float32", "tl.int32", "tl.int64"):
        return typed(text, dtype)
    size = abs(float(text.removeprefix('float("').removesuffix('")')))
    is_single = not math.isfinite(size) or size == 0 or 2.0**-126 <= size < 2.0**128
    return text if (is_single if dtype.is_floating_point else size < 2**31) else typed(text, dtype)


def operation(node: Expression, arguments: list[str]) -> str:
    """Triton of one elementwise operation on names and literals.

    Raises:
        BuildError: if there is none.
    """
    op, dtypes = node.op, [argument.dtype for argument in node.arguments]
    values = arguments[1:] if op == "where" else arguments
    if all(map(is_literal, values)) or op in FUNCTIONS or dtypes[-1] is torch.bool:
        arguments = [typed(text, dtype) for text, dtype in zip(arguments, dtypes)]
    elif op in _BESIDE_LITERALS:
        arguments = [fitting(text, dtype) for text, dtype in zip(arguments, dtypes)]
    x = arguments[0]
    if op in _INFIX:
        return f"{x} {_INFIX[op]} {arguments[1]}"
    if op == "cast":
        return f"{x} != 0" if node.dtype is torch.bool else f"{x}.to({COMPUTED[node.dtype]})"
    if op == "rounded":
        return f"{x}.to(tl.{str(node.dtype).removeprefix('torch.')}).to({COMPUTED[node.dtype]})"
    if op in ("maximum", "minimum") and node.dtype is torch.bool:
        return f"{x} {'|' if op == 'maximum' else '&'} {arguments[1]}"
    if op in _BESIDE_LITERALS:
        return f"{_BESIDE_LITERALS[op]}({', '.join(arguments)})"
    if op == "pow":
        if (power := simple_power(node)) in _POWERS:
            return _POWERS[power].format(x=x)
        if not node.dtype.is_floating_point:
            raise BuildError("there is no Triton for whole numbers to a power that is not 2 or 3; use floats")
    if op in FUNCTIONS:
        if op in ("round", "floor", "ceil", "trunc") and not node.dtype.is_floating_point:
            return x
        return f"{FUNCTIONS[op]}({', '.join(arguments)})"
    # Triton's -x is 0 - x, which loses the sign of 0.
    negated = "{x} * -1.0" if node.dtype.is_floating_point else "-{x}"
    inverted = "{x} ^ 255" if node.dtype is torch.uint8 else "~{x}"
    simple = {"neg": negated, "bitwise_not": inverted, "isnan": "{x} != {x}", "isinf": 'tl.abs({x}) == float("inf")'}
    if op == "logical_not" or (op == "bitwise_not" and node.dtype is torch.bool):
        return f"{x} == 0"
    if op in simple:
        return simple[op].format(x=x)
    raise BuildError(f"there is no Triton for the operation {op!r}")
