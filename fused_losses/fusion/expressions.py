"""C++ of sizes, constants and elementwise operations."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch

from .ir import WIDE, Expression, Size

# What a dtype is stored as, what a block of it is held as, and what one element is computed with. Loops over memory of
# bool do not vectorise.
STORED = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "half",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "uint8_t",
}
HELD = STORED | {low: STORED[wide] for low, wide in WIDE.items()}
COMPUTED = HELD | {torch.bool: "bool"}

COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
INFIX = COMPARISONS | {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "logical_and": "&",
    "logical_or": "|",
    "logical_xor": "^",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "bitwise_xor": "^",
}
_SHORT = frozenset(
    (
        *("abs", "sign", "sqrt", "rsqrt", "reciprocal", "floor", "ceil", "round", "trunc", "isnan", "isinf"),
        *("maximum", "minimum", "fmax", "fmin", "copysign"),
    )
)
_MIDDLING = frozenset(("exp", "exp_nonpositive", "expm1", "log", "log1p", "sigmoid", "tanh"))
_LONG = frozenset(  # so long that a block of lanes makes a call: inlined, they make builds long, and save little
    (
        *("exp2", "log2", "log10", "sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh"),
        *("atanh", "erf", "erfc", "erfinv", "lgamma", "digamma"),
        *("pow", "fmod", "remainder", "floor_divide", "atan2", "hypot"),
    )
)
_FUNCTIONS = _SHORT | _MIDDLING | _LONG
OPERATIONS = (
    frozenset(INFIX) | _FUNCTIONS | {"neg", "logical_not", "bitwise_not", "where", "cast", "rounded", "checked"}
)
_POWERS = {0.5: "sqrt_({x})", 1.0: "{x}", 2.0: "{x} * {x}", 3.0: "{x} * {x} * {x}", -1.0: "{one} / {x}"}


@functools.cache
def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


@functools.cache
def size_of(size: Size) -> str:
    """C++ of a size, in terms of the arguments ``a`` of a pass."""
    if size.op == "const":
        return str(size.value)
    if size.op == "size":
        return f"a.size_{identifier(size.value[0])}_{size.value[1]}"
    x, y = map(size_of, size.arguments)
    if size.op in ("add", "sub", "mul"):
        return f"({x} {INFIX[size.op]} {y})"
    return {"floordiv": f"floor_divide_<int64_t>({x}, {y})", "max": f"most({x}, {y})", "min": f"least({x}, {y})"}[
        size.op
    ]


def constant(value: Any, dtype: torch.dtype) -> str:
    kind = COMPUTED[dtype]
    if dtype is torch.bool:
        return "true" if value else "false"
    if kind not in ("float", "double"):
        return f"{kind}({int(value)})" if abs(int(value)) < 2**31 else f"int64_t({int(value)}LL)"
    value = float(value)
    if not math.isfinite(value):
        limit = "quiet_NaN" if math.isnan(value) else "infinity"
        return f"{'-' if value < 0 else ''}std::numeric_limits<{kind}>::{limit}()"
    # A double is written in full: float(0.1) in C++ then rounds once, as torch does.
    return f"{kind}({value!r})" if kind == "float" else repr(value)


def operation(node: Expression, arguments: list[str], varies: bool) -> str:
    """C++ of one elementwise operation on values that are already named; inline where it varies along lanes."""
    op, kind = node.op, COMPUTED[node.dtype]
    x = arguments[0]
    if op in INFIX:
        text = f"{x} {INFIX[op]} {arguments[1]}"
        return f"static_cast<{kind}>({text})" if kind in ("int16_t", "int8_t", "uint8_t") else text
    if op == "cast":
        if node.arguments[0].dtype is torch.bool:  # a choice vectorises where a conversion does not
            return f"{x} ? {kind}(1) : {kind}(0)"
        return f"{x} != 0" if node.dtype is torch.bool else f"static_cast<{kind}>({x})"
    if op == "rounded":
        return f"rounded_<{STORED[node.dtype]}>({x})"
    if op == "where":
        return f"{x} ? {arguments[1]} : {arguments[2]}"
    if op == "pow" and (power := simple_power(node)) in _POWERS:
        return _POWERS[power].format(x=x, one=constant(1, node.dtype))
    if op in _FUNCTIONS:
        return f"{'' if varies or op in _SHORT else 'apart::'}{op}_({', '.join(arguments)})"
    if op == "neg":
        return f"static_cast<{kind}>(-{x})"
    if op == "logical_not" or (op == "bitwise_not" and node.dtype is torch.bool):
        return f"!{x}"
    if op == "bitwise_not":
        return f"static_cast<{kind}>(~{x})"
    raise ValueError(
        f"there is no C++ for the operation {op!r}; fused_losses.fusion.expressions.OPERATIONS lists those"
    )


def is_blockwise(node: Expression) -> bool:
    """Whether an operation that varies along lanes is one call for a block of them."""
    if not node.dtype.is_floating_point:  # a division by a constant is short
        return False
    return node.op in _LONG and not (node.op == "pow" and simple_power(node) in _POWERS)


def simple_power(node: Expression) -> float | None:
    """The exponent of a floating power, where it is a constant."""
    exponent = node.arguments[1]
    while exponent.op == "cast":
        exponent = exponent.arguments[0]
    if exponent.op != "constant" or not node.dtype.is_floating_point:
        return None
    return float(exponent["value"])
