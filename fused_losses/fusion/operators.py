"""What torch's operators compute, as values: the table of a trace. Others are decomposed or left to torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .extents import Extent, is_one, mask_of, product
from .ir import WIDE, Combine, Expression
from .lowering import Lowering
from .masks import NOTHING, without_others
from .piecewise import reduction
from .signs import is_nonpositive
from .values import Computed, Iota, Map, Positions, Scalar, Stored, Value, View, Where, as_whole

OPERATORS: dict[str, Callable[..., Any]] = {}  # by the name in namespaces aten and prims; handler(tracer, *arguments)
ORDERED: set[str] = set()  # those that depend on where elements stand among others, which masks do not say


def operator(*names: str, ordered: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update(dict.fromkeys(names, handler))
        ORDERED.update(names if ordered else ())
        return handler

    return register


# Dtypes.


def promoted(*arguments: Any) -> torch.dtype:
    """The dtype in which torch combines tensors, 0-d tensors and numbers."""
    groups: list[torch.dtype | None] = [None, None, None]  # of tensors, 0-d tensors, numbers
    for argument in arguments:
        if isinstance(argument, Value):
            group, dtype = (0 if argument.ndim else 1), argument.dtype
        else:
            group, dtype = 2, _dtype_of_number(argument)
        groups[group] = dtype if groups[group] is None else torch.promote_types(groups[group], dtype)  # type: ignore
    result: torch.dtype | None = None
    for dtype in groups:
        if dtype is not None and (result is None or _category(dtype) > _category(result)):
            keeps_precision = dtype.is_complex and result is not None and result.is_floating_point
            result = result.to_complex() if keeps_precision else dtype  # type: ignore[union-attr]
    assert result is not None
    return result


def _dtype_of_number(number: Any) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    if isinstance(number, complex):
        return torch.get_default_dtype().to_complex()
    return torch.int64 if isinstance(number, (int, torch.SymInt)) else torch.get_default_dtype()


def _category(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 0 if dtype is torch.bool else 1


def floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def as_value(argument: Any, dtype: torch.dtype) -> Value:
    return argument if isinstance(argument, Value) else Scalar(argument, dtype)


def cast(value: Value, dtype: torch.dtype) -> Value:
    if value.dtype is dtype:
        return value
    return Map("cast", dtype, [value])


def mapped(op: str, dtype: torch.dtype, *arguments: Any, computed: torch.dtype | None = None) -> Value:
    computed = computed or dtype
    return Map(op, dtype, [as_value(a, computed) for a in arguments], computed)


# Elementwise.


def _unary(op: str, tracer: Any, x: Value) -> Value:
    return mapped(op, x.dtype, x)


def _unary_float(op: str, tracer: Any, x: Value) -> Value:
    return mapped(op, floating(x.dtype), x)


def _binary(op: str, tracer: Any, a: Any, b: Any) -> Value:
    return mapped(op, promoted(a, b), a, b)


def _binary_float(op: str, tracer: Any, a: Any, b: Any) -> Value:
    return mapped(op, floating(promoted(a, b)), a, b)


def _comparison(op: str, tracer: Any, a: Any, b: Any) -> Value:
    return mapped(op, torch.bool, a, b, computed=promoted(a, b))


def _logical(op: str, tracer: Any, a: Any, b: Any) -> Value:
    return mapped(op, torch.bool, a, b, computed=torch.bool)


for _names, _handler in {
    "neg abs sign floor ceil round trunc bitwise_not": _unary,
    "exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tan sinh cosh tanh asin acos atan asinh acosh "
    "atanh sigmoid erf erfc erfinv lgamma digamma": _unary_float,
    "mul maximum minimum fmax fmin fmod remainder bitwise_and bitwise_or bitwise_xor": _binary,
    "atan2 hypot copysign": _binary_float,
    "lt le gt ge eq ne": _comparison,
    "logical_and logical_or logical_xor": _logical,
}.items():
    for _name in _names.split():
        OPERATORS[_name] = partial(_handler, _name)
OPERATORS["sgn"] = OPERATORS["sign"]
OPERATORS["special_erfinv"] = OPERATORS["erfinv"]


@operator("exp", ordered=False)
def _exp(tracer: Any, x: Value) -> Value:
    return _unary_float("exp_nonpositive" if is_nonpositive(x) else "exp", tracer, x)


@operator("add", ordered=False)
def _add(tracer: Any, a: Any, b: Any, alpha: Any = 1) -> Value:
    dtype = promoted(a, b)
    return mapped("add", dtype, a, b if alpha == 1 else mapped("mul", dtype, b, alpha))


@operator("sub", ordered=False)
def _sub(tracer: Any, a: Any, b: Any, alpha: Any = 1) -> Value:
    dtype = promoted(a, b)
    return mapped("sub", dtype, a, b if alpha == 1 else mapped("mul", dtype, b, alpha))


@operator("rsub", ordered=False)
def _rsub(tracer: Any, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _sub(tracer, b, a, alpha)


@operator("div", ordered=False)
def _div(tracer: Any, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    dtype = promoted(a, b)
    if rounding_mode is None:
        return mapped("div", floating(dtype), a, b)
    if rounding_mode == "floor":
        return mapped("floor_divide", dtype, a, b)
    quotient = mapped("div", dtype if dtype.is_floating_point else torch.float64, a, b)
    return cast(mapped("trunc", quotient.dtype, quotient), dtype)


@operator("floor_divide", ordered=False)
def _floor_divide(tracer: Any, a: Any, b: Any) -> Value:
    return _div(tracer, a, b, "floor")


@operator("pow", ordered=False)
def _pow(tracer: Any, a: Any, b: Any) -> Value:
    dtype = promoted(a, b)
    if isinstance(b, (int, float)) and isinstance(a, Value):
        x = cast(a, dtype)
        if b == 0:
            return Scalar(1, dtype, a.shape)
        if b == 1:
            return x
        if b in (2, 3):
            square = mapped("mul", dtype, x, x)
            return square if b == 2 else mapped("mul", dtype, square, x)
        if dtype.is_floating_point and b in (0.5, -0.5, -1):
            return mapped({0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}[b], dtype, x)
    return mapped("pow", dtype, a, b)


@operator("square", ordered=False)
def _square(tracer: Any, x: Value) -> Value:
    return _pow(tracer, x, 2)


@operator("logical_not", ordered=False)
def _logical_not(tracer: Any, x: Value) -> Value:
    return mapped("logical_not", torch.bool, x, computed=torch.bool)


def _is(op: str, tracer: Any, x: Value) -> Value:
    if not x.dtype.is_floating_point:
        return Scalar(False, torch.bool, x.shape)
    return mapped(op, torch.bool, x, computed=x.dtype)


OPERATORS["isnan"], OPERATORS["isinf"] = partial(_is, "isnan"), partial(_is, "isinf")


@operator("relu", ordered=False)
def _relu(tracer: Any, x: Value) -> Value:
    return mapped("maximum", x.dtype, x, 0)


@operator("clamp", "clip", ordered=False)
def _clamp(tracer: Any, x: Value, min: Any = None, max: Any = None) -> Value:
    bounds = [bound for bound in (min, max) if bound is not None]
    dtype = promoted(x, *bounds)
    result = cast(x, dtype)
    if min is not None:
        result = mapped("maximum", dtype, result, min)
    return result if max is None else mapped("minimum", dtype, result, max)


@operator("clamp_min", ordered=False)
def _clamp_min(tracer: Any, x: Value, min: Any) -> Value:
    return _clamp(tracer, x, min)


@operator("clamp_max", ordered=False)
def _clamp_max(tracer: Any, x: Value, max: Any) -> Value:
    return _clamp(tracer, x, None, max)


@operator("where", ordered=False)
def _where(tracer: Any, condition: Value, a: Any, b: Any) -> Value:
    dtype = promoted(a, b)
    return Where(cast(condition, torch.bool), as_value(a, dtype), as_value(b, dtype), dtype)


@operator("masked_fill", ordered=False)
def _masked_fill(tracer: Any, x: Value, mask: Value, value: Any) -> Value:
    return Where(mask, as_value(value, x.dtype), x, x.dtype)


@operator("_to_copy", "convert_element_type", ordered=False)
def _to_copy(tracer: Any, x: Value, dtype: torch.dtype | None = None, **options: Any) -> Value:
    device = options.get("device")
    if device is not None and torch.device(device).type != tracer.device.type:
        raise tracer.refusal(f"it moves a tensor to {device}")
    if dtype in WIDE and x.dtype in (torch.float32, torch.float64) and tracer.is_asked_by_loss:
        return Map("rounded", dtype, [x])
    return cast(x, dtype or x.dtype)


@operator("alias", "detach", "view_of", ordered=False)
def _alias(tracer: Any, x: Value) -> Value:
    return x


@operator("clone", "contiguous", "lift_fresh", "lift_fresh_copy", "conj", "_conj", ordered=False)
def _same(tracer: Any, x: Value, **options: Any) -> Value:
    return View(x, x.shape, x.digits, lambda lowering, positions: positions)


# Tensors made of numbers.


def _full(tracer: Any, shape: Sequence[Extent], number: Any, dtype: torch.dtype | None = None, **options: Any) -> Value:
    return Scalar(number, dtype or _dtype_of_number(number), shape)


OPERATORS["full"] = _full


@operator("zeros", "empty", ordered=False)
def _zeros(tracer: Any, shape: Sequence[Extent], dtype: torch.dtype | None = None, **options: Any) -> Value:
    return Scalar(0, dtype or torch.get_default_dtype(), shape)


@operator("ones", ordered=False)
def _ones(tracer: Any, shape: Sequence[Extent], dtype: torch.dtype | None = None, **options: Any) -> Value:
    return Scalar(1, dtype or torch.get_default_dtype(), shape)


@operator("scalar_tensor", ordered=False)
def _scalar_tensor(tracer: Any, number: Any, dtype: torch.dtype | None = None, **options: Any) -> Value:
    return Scalar(number, dtype or torch.get_default_dtype())


@operator("zeros_like", "empty_like", ordered=False)
def _zeros_like(tracer: Any, x: Value, dtype: torch.dtype | None = None, **options: Any) -> Value:
    return Scalar(0, dtype or x.dtype, x.shape)


@operator("ones_like", ordered=False)
def _ones_like(tracer: Any, x: Value, dtype: torch.dtype | None = None, **options: Any) -> Value:
    return Scalar(1, dtype or x.dtype, x.shape)


@operator("full_like", ordered=False)
def _full_like(tracer: Any, x: Value, number: Any, dtype: torch.dtype | None = None, **options: Any) -> Value:
    return Scalar(number, dtype or x.dtype, x.shape)


@operator("new_zeros", "new_empty", "new_empty_strided", ordered=False)
def _new_zeros(tracer: Any, x: Value, shape: Any, *strides: Any, dtype: Any = None, **options: Any) -> Value:
    return Scalar(0, dtype or x.dtype, shape)


@operator("new_ones", ordered=False)
def _new_ones(tracer: Any, x: Value, shape: Any, dtype: Any = None, **options: Any) -> Value:
    return Scalar(1, dtype or x.dtype, shape)


@operator("new_full", ordered=False)
def _new_full(tracer: Any, x: Value, shape: Any, number: Any, dtype: Any = None, **options: Any) -> Value:
    return Scalar(number, dtype or x.dtype, shape)


@operator("fill", ordered=False)
def _fill(tracer: Any, x: Value, number: Any) -> Value:
    return expanded(cast(as_value(number, x.dtype), x.dtype), x.shape)


@operator("zero", ordered=False)
def _zero(tracer: Any, x: Value) -> Value:
    return Scalar(0, x.dtype, x.shape)


@operator("arange")
def _arange(tracer: Any, *bounds: Any, step: Any = 1, dtype: Any = None, **options: Any) -> Any:
    if len(bounds) == 3:
        *bounds, step = bounds  # type: ignore[assignment]
    start, end = (0, *bounds) if len(bounds) == 1 else bounds
    if not all(isinstance(n, (int, torch.SymInt)) for n in (start, end, step)):
        return NotImplemented
    length = -((start - end) // step)
    return Iota(length, start, step, dtype or torch.int64)


# Reductions.


def reduced(
    tracer: Any, x: Value, dimensions: Any, combine: Combine, dtype: torch.dtype, keepdim: bool = False
) -> Value:
    """A reduction over dimensions; over all of them where there are none."""
    if dimensions is None or (isinstance(dimensions, (list, tuple)) and not dimensions):
        dimensions = range(x.ndim)
    elif isinstance(dimensions, int):
        dimensions = [dimensions]
    chosen = sorted({d % x.ndim if x.ndim else 0 for d in dimensions})
    for d in chosen if x.ndim else ():
        if mask_of(x.shape[d]) is not None:
            if combine not in NOTHING:
                raise tracer.refusal(f"{combine} over what a boolean mask chooses, which may be nothing")
            x = without_others(x, d, NOTHING[combine])
    result = reduction(tracer.outline, x, chosen, combine, dtype)
    if keepdim and x.ndim:
        return with_ones(result, chosen)
    return result


def with_ones(value: Value, dimensions: Sequence[int]) -> Value:
    """A value with dimensions of size 1 put in."""
    shape, digits = list(value.shape), list(value.digits)
    for d in sorted(dimensions):
        shape.insert(d, 1)
        digits.insert(d, (1,))
    rest = [d for d in range(len(shape)) if d not in dimensions]
    return View(value, shape, digits, lambda lowering, positions: tuple(positions[d] for d in rest))


def expanded(value: Value, shape: Sequence[Extent]) -> Value:
    """A value broadcast to a shape."""
    if value.ndim == len(shape) and all(a is b or a == b for a, b in zip(value.shape, shape)):
        return value
    return Map("cast", value.dtype, [value, Scalar(0, value.dtype, shape)])


def count(x: Value, dimensions: Any) -> Any:
    if dimensions is None or (isinstance(dimensions, (list, tuple)) and not dimensions):
        return product(x.shape)
    chosen = [dimensions] if isinstance(dimensions, int) else dimensions
    return product([x.shape[d] for d in chosen]) if x.ndim else 1


def _sum_dtype(x: Value, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (x.dtype if x.dtype.is_floating_point else torch.int64)


@operator("sum", ordered=False)
def _sum(tracer: Any, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    dtype = _sum_dtype(x, dtype)
    return reduced(tracer, cast(x, dtype), dim, "sum", dtype, keepdim)


@operator("mean", ordered=False)
def _mean(tracer: Any, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    dtype = dtype or x.dtype
    return mapped("div", dtype, reduced(tracer, cast(x, dtype), dim, "sum", dtype, keepdim), count(x, dim))


@operator("prod", ordered=False)
def _prod(tracer: Any, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    dtype = _sum_dtype(x, dtype)
    return reduced(tracer, cast(x, dtype), dim, "prod", dtype, keepdim)


@operator("amax", ordered=False)
def _amax(tracer: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduced(tracer, x, dim, "max", x.dtype, keepdim)


@operator("amin", ordered=False)
def _amin(tracer: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduced(tracer, x, dim, "min", x.dtype, keepdim)


def _extreme(combine: Combine, arg: Combine, tracer: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, Value):
        return _binary("maximum" if combine == "max" else "minimum", tracer, x, dim)
    values = reduced(tracer, x, dim, combine, x.dtype, keepdim)
    if dim is None:
        return values
    return values, _position(tracer, arg, x, dim, keepdim)


def _position(tracer: Any, arg: Combine, x: Value, dim: int | None, keepdim: bool) -> Value:
    result = reduced(tracer, x, dim, arg, torch.int64, keepdim)
    alone = x.ndim == 0 or (dim is not None and is_one(x.shape[dim]))
    return Scalar(0, torch.int64, result.shape) if alone else result


def _arg_extreme(arg: Combine, tracer: Any, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _position(tracer, arg, x, dim, keepdim)


OPERATORS["max"], OPERATORS["min"] = partial(_extreme, "max", "argmax"), partial(_extreme, "min", "argmin")
OPERATORS["argmax"], OPERATORS["argmin"] = partial(_arg_extreme, "argmax"), partial(_arg_extreme, "argmin")


def _boolean(combine: Combine, tracer: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduced(tracer, cast(x, torch.bool), dim, combine, torch.bool, keepdim)


OPERATORS["any"], OPERATORS["all"] = partial(_boolean, "any"), partial(_boolean, "all")
OPERATORS["_is_any_true"], OPERATORS["_is_all_true"] = OPERATORS["any"], OPERATORS["all"]


@operator("count_nonzero", ordered=False)
def _count_nonzero(tracer: Any, x: Value, dim: Any = None) -> Value:
    return reduced(tracer, cast(cast(x, torch.bool), torch.int64), dim, "sum", torch.int64)


def _variance_and_mean(tracer: Any, x: Value, dim: Any, correction: Any, keepdim: bool) -> tuple[Value, Value]:
    mean = _mean(tracer, x, dim, True) if x.ndim else x
    difference = mapped("sub", x.dtype, x, mean)
    squares = reduced(tracer, mapped("mul", x.dtype, difference, difference), dim, "sum", x.dtype, keepdim)
    divisor = count(x, dim) - (1 if correction is None else correction)
    variance = mapped("div", x.dtype, squares, torch.sym_max(divisor, 0))
    return variance, _mean(tracer, x, dim, keepdim)


@operator("var", ordered=False)
def _var(tracer: Any, x: Value, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Value:
    return _variance_and_mean(tracer, x, dim, correction, keepdim)[0]


@operator("std", ordered=False)
def _std(tracer: Any, x: Value, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Value:
    return mapped("sqrt", x.dtype, _var(tracer, x, dim, correction, keepdim))


@operator("var_mean", ordered=False)
def _var_mean(tracer: Any, x: Value, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    return _variance_and_mean(tracer, x, dim, correction, keepdim)


LONGEST = 4096  # of what is added up along: a row that stays in cache, of which there should be many


@operator("cumsum")
def _cumsum(tracer: Any, x: Value, dim: int, dtype: Any = None) -> Any:
    dim = dim % max(x.ndim, 1)
    dtype = _sum_dtype(x, dtype)
    if all(is_one(extent) for d, extent in enumerate(x.shape) if d != dim) or not x.shape[dim] <= LONGEST:
        return NotImplemented
    operand = cast(as_whole(x), dtype)
    if is_one(x.shape[dim]):
        return operand

    def element(lowering: Lowering, positions: Positions) -> Expression:
        index = (positions[dim][0].as_index(),)
        return lowering.make("cumulated", dtype, lowering.element(operand, positions), index=index)

    return Stored(Computed(operand.shape, dtype, operand.digits, element))
