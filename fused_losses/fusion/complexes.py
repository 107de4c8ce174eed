"""Operators on complex tensors, as pairs of real ones: arithmetic, and whatever does the same to both parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from .operators import OPERATORS as REAL
from .operators import as_value, cast, expanded, mapped, operator, promoted
from .values import Complex, External, Pairs, Scalar, Value, broadcast, place_of

OPERATORS: dict[str, Callable[..., Any]] = {}  # of calls with anything complex among the arguments


def complex_operator(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update(dict.fromkeys(names, handler))
        return handler

    return register


def parts(x: Any) -> tuple[Any, Any]:
    """The real and the imaginary part of a tensor or a number."""
    if isinstance(x, Complex):
        real, imag = x.parts
        return real, imag
    if isinstance(x, External) and x.dtype.is_complex:
        return place_of(x.pairs, x.ndim, 0), place_of(x.pairs, x.ndim, 1)
    if isinstance(x, Value):
        return x, Scalar(0, x.dtype, x.shape)
    return (x.real, x.imag) if isinstance(x, complex) else (x, 0)


# What is done to both parts alike.


def _part(argument: Any, k: int) -> Any:
    """An argument with one of its parts in the place of every tensor."""
    if isinstance(argument, (list, tuple)):
        return [_part(item, k) for item in argument]
    if isinstance(argument, torch.dtype) and argument.is_complex:
        return argument.to_real()
    return parts(argument)[k] if isinstance(argument, Value) else argument


def _alike(name: str, number: int | None = None) -> Callable[..., Any]:
    """A handler that does the same to both parts; one of the arguments may be a number, which has parts too."""

    def handler(tracer: Any, *arguments: Any, **keywords: Any) -> Any:
        results = []
        for k in (0, 1):
            given = [parts(a)[k] if at == number else _part(a, k) for at, a in enumerate(arguments)]
            results.append(REAL[name](tracer, *given, **{key: _part(a, k) for key, a in keywords.items()}))
        if NotImplemented in results:
            return NotImplemented
        real, imag = results
        return Complex(real, imag) if isinstance(real, Value) else [Complex(*pair) for pair in zip(real, imag)]

    return handler


for _names in [
    "view _unsafe_view reshape _reshape_alias view_copy _reshape_copy expand broadcast_to permute transpose t",
    "unsqueeze squeeze select slice split split_with_sizes unbind flip unfold diagonal repeat cat stack roll",
    "slice_backward slice_scatter select_backward select_scatter diagonal_scatter diagonal_backward tril triu",
    "clone alias detach contiguous view_of neg sum mean zero zeros empty zeros_like empty_like new_zeros new_empty",
]:
    OPERATORS.update({name: _alike(name) for name in _names.split()})
for _name, _number in {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "fill": 1}.items():
    OPERATORS[_name] = _alike(_name, _number)
OPERATORS["constant_pad_nd"] = _alike("constant_pad_nd", 2)


@complex_operator("_to_copy", "convert_element_type")
def _to_copy(tracer: Any, x: Value, dtype: torch.dtype | None = None, **options: Any) -> Any:
    if dtype is not None and not dtype.is_complex:
        return cast(parts(x)[0], dtype)
    of_parts = (dtype or x.dtype).to_real()
    return _both(lambda part: REAL["_to_copy"](tracer, part, of_parts, **options), parts(x))


@complex_operator("where")
def _where(tracer: Any, condition: Value, a: Any, b: Any) -> Value:
    return _both(lambda pair: _chosen(condition, *pair), zip(parts(a), parts(b)))


@complex_operator("masked_fill")
def _masked_fill(tracer: Any, x: Value, mask: Value, value: Any) -> Value:
    return _both(lambda pair: _chosen(mask, *pair), zip(parts(value), parts(x)))


# From real numbers and to them.


@operator("complex")
def _complex(tracer: Any, real: Value, imag: Value) -> Value:
    shape, _, both = broadcast([real, imag])
    return _both(lambda part: expanded(part, shape), both)


@operator("polar")
def _polar(tracer: Any, size: Value, angle: Value) -> Value:
    return _both(lambda of: mapped("mul", size.dtype, size, mapped(of, size.dtype, angle)), ("cos", "sin"))


@operator("view_as_complex")
def _view_as_complex(tracer: Any, pairs: Value) -> Value:
    return _both(lambda k: place_of(pairs, pairs.ndim - 1, k), (0, 1))


@complex_operator("view_as_real")
def _view_as_real(tracer: Any, x: Value) -> Value:
    return Pairs(Complex(*parts(x)))


@complex_operator("abs")
def _abs(tracer: Any, x: Value) -> Value:
    return mapped("hypot", x.dtype.to_real(), *parts(x))


@complex_operator("angle")
def _angle(tracer: Any, x: Value) -> Value:
    return mapped("atan2", x.dtype.to_real(), *reversed(parts(x)))


# Arithmetic.


@complex_operator("conj", "_conj", "_conj_physical", "conj_physical")
def _conj(tracer: Any, x: Any) -> Value:
    real, imag = (as_value(part, torch.get_default_dtype()) for part in parts(x))
    return Complex(real, mapped("neg", imag.dtype, imag))


def _plus(op: str, tracer: Any, a: Any, b: Any, alpha: Any = 1) -> Value:
    b = b if alpha == 1 else _mul(tracer, b, alpha)
    return _both(lambda pair: mapped(op, _real_dtype(a, b), *pair), zip(parts(a), parts(b)))


OPERATORS["add"], OPERATORS["sub"] = partial(_plus, "add"), partial(_plus, "sub")


@complex_operator("rsub")
def _rsub(tracer: Any, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _plus("sub", tracer, b, a, alpha)


@complex_operator("mul")
def _mul(tracer: Any, a: Any, b: Any) -> Any:
    if not _is_complex(a):
        return _by_real("mul", b, a)
    if not _is_complex(b):
        return _by_real("mul", a, b)
    multiply, add, subtract = (partial(mapped, op, _real_dtype(a, b)) for op in ("mul", "add", "sub"))
    (x, y), (u, v) = parts(a), parts(b)
    return Complex(subtract(multiply(x, u), multiply(y, v)), add(multiply(x, v), multiply(y, u)))


@complex_operator("div")
def _div(tracer: Any, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if not _is_complex(b):
        return _by_real("div", a, b)
    dtype = _real_dtype(a, b)
    multiply, divide, add, subtract = (partial(mapped, op, dtype) for op in ("mul", "div", "add", "sub"))
    (x, y), (u, v) = parts(a), parts(b)
    # By the larger part first, so that no square overflows.
    is_flat = mapped("ge", torch.bool, mapped("abs", dtype, u), mapped("abs", dtype, v), computed=dtype)
    large, small = _chosen(is_flat, u, v), _chosen(is_flat, v, u)
    ratio = divide(small, large)
    divisor = add(large, multiply(small, ratio))
    near, far = _chosen(is_flat, x, y), _chosen(is_flat, y, x)
    imag = subtract(far, multiply(near, ratio))
    return Complex(
        divide(add(near, multiply(far, ratio)), divisor),
        divide(_chosen(is_flat, imag, mapped("neg", dtype, imag)), divisor),
    )


@complex_operator("reciprocal")
def _reciprocal(tracer: Any, x: Value) -> Value:
    return _div(tracer, 1, x)


@complex_operator("sgn")
def _sgn(tracer: Any, x: Value) -> Value:
    size = _abs(tracer, x)
    is_zero = mapped("eq", torch.bool, size, 0, computed=size.dtype)
    return _both(lambda part: _chosen(is_zero, 0, mapped("div", size.dtype, part, size)), parts(x))


@complex_operator("pow")
def _pow(tracer: Any, x: Any, power: Any) -> Any:
    if not isinstance(power, (int, float)) or power not in (1, 2):
        return NotImplemented
    return x if power == 1 else _mul(tracer, x, x)


def _equality(op: str, join: str, tracer: Any, a: Any, b: Any) -> Value:
    dtype = _real_dtype(a, b)
    compared = (mapped(op, torch.bool, *pair, computed=dtype) for pair in zip(parts(a), parts(b)))
    return mapped(join, torch.bool, *compared)


OPERATORS["eq"], OPERATORS["ne"] = partial(_equality, "eq", "logical_and"), partial(_equality, "ne", "logical_or")


@complex_operator("exp")
def _exp(tracer: Any, x: Value) -> Value:
    real, imag = parts(x)
    return _polar(tracer, mapped("exp", real.dtype, real), imag)


@complex_operator("log")
def _log(tracer: Any, x: Value) -> Value:
    size = _abs(tracer, x)
    return Complex(mapped("log", size.dtype, size), _angle(tracer, x))


def _both(function: Callable[[Any], Value], arguments: Iterable[Any]) -> Complex:
    """Complex numbers whose parts a function gives, the real one first."""
    return Complex(*map(function, arguments))


def _by_real(op: str, x: Any, by: Any) -> Complex:
    return _both(lambda part: mapped(op, _real_dtype(x, by), part, by), parts(x))


def _is_complex(x: Any) -> bool:
    return x.dtype.is_complex if isinstance(x, Value) else isinstance(x, complex)


def _real_dtype(*arguments: Any) -> torch.dtype:
    """Of the parts of what some tensors and numbers are combined to."""
    return promoted(*arguments).to_real()


def _chosen(condition: Value, a: Any, b: Any) -> Value:
    return REAL["where"](None, condition, a, b)
