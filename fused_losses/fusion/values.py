"""Tensors of a trace as functions of an index: nothing is computed until a program asks for an element.

Every dimension has digits: the sizes whose product it is, outermost first. A dimension of an input is one digit;
flattening concatenates digits and splitting divides them, so that an index never needs a division.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .extents import Extent, as_size, digits_of, is_counted, is_one, number_of, product, quotient, same
from .ir import Combine, Expression, Index
from .refusals import refused
from .sizes import Number

if TYPE_CHECKING:
    from .lowering import Lowering

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default}  # which take matrices that lie across in memory as they are
Digits = tuple[Extent, ...]  # where there are several, none of them is 1


class Position(NamedTuple):
    """Where along one digit an element is read: an affine function of axes over a divisor, or a computed index.

    Where it does not divide, it lies outside, and what is read there is looked at by nobody: a multiple of a position
    may therefore be exact where the position is not.
    """

    terms: tuple[tuple[str, int | Number], ...] = ()  # axes, sorted, with their coefficients
    offset: int | Number = 0
    computed: Expression | None = None
    guarded: bool = False  # whether it may lie outside
    divisor: int = 1

    @staticmethod
    def of(
        coefficients: Mapping[str, int | Number], offset: int | Number, guarded: bool = False, divisor: int = 1
    ) -> Position:
        if divisor > 1:
            numbers = [number for number in (*coefficients.values(), offset) if isinstance(number, int)]
            if len(numbers) > len(coefficients):
                shared = math.gcd(divisor, *numbers)
                coefficients = {axis: c // shared for axis, c in coefficients.items()}  # type: ignore[operator]
                offset, divisor = offset // shared, divisor // shared  # type: ignore[operator]
        return Position(tuple(sorted(coefficients.items())), offset, None, guarded, divisor)

    @staticmethod
    def at(expression: Expression, guarded: bool = False) -> Position:
        return Position(computed=expression, guarded=guarded)

    def as_index(self) -> Index | Expression:
        """For a load or an "index" expression."""
        if self.computed is not None:
            return self.computed
        terms = tuple([(axis, c if isinstance(c, int) else c.size) for axis, c in self.terms])
        return Index(terms, as_size(self.offset), self.divisor)

    def expression(self, lowering: Lowering) -> Expression:
        if self.computed is not None:
            return self.computed
        if self.is_outside:
            return lowering.number(-1, torch.int64)
        if self.constant is not None:
            return lowering.number(self.constant, torch.int64)
        return lowering.make("index", torch.int64, value=self.as_index())

    @property
    def constant(self) -> int | None:
        """The place, where it is one and known."""
        is_known = self.computed is None and not self.terms and self.divisor == 1
        return self.offset if is_known and isinstance(self.offset, int) else None

    @property
    def is_outside(self) -> bool:
        """Whether it divides nowhere."""
        if self.divisor == 1 or not isinstance(self.offset, int):
            return False
        numbers = [c for _, c in self.terms if isinstance(c, int)]
        return len(numbers) == len(self.terms) and self.offset % math.gcd(self.divisor, *numbers) != 0

    def moved(self, lowering: Lowering, scale: Extent, offset: Extent, guarded: bool = False) -> Position:
        """scale * position + offset."""
        guarded |= self.guarded
        if self.computed is None:
            factor, start, divisor = number_of(scale), number_of(offset), self.divisor
            if isinstance(factor, int):
                shared = math.gcd(factor, divisor)
                factor, divisor = factor // shared, divisor // shared
            coefficients = {axis: c * factor for axis, c in self.terms}
            return Position.of(coefficients, self.offset * factor + start * divisor, guarded, divisor)
        moved = lowering.make("mul", torch.int64, self.computed, lowering.number(scale, torch.int64))
        moved = lowering.make("add", torch.int64, moved, lowering.number(offset, torch.int64))
        return Position.at(moved, guarded)

    def plus(self, lowering: Lowering, other: Position) -> Position:
        if self == ORIGIN or other == ORIGIN:
            return other if self == ORIGIN else self
        guarded = self.guarded or other.guarded
        if self.computed is None and other.computed is None:
            divisor = math.lcm(self.divisor, other.divisor)
            (mine, start), (theirs, further) = (p._numerator(divisor) for p in (self, other))
            sums = mine | {axis: mine.get(axis, 0) + c for axis, c in theirs.items()}
            return Position.of(sums, start + further, guarded, divisor)
        both = (p.expression(lowering) for p in (self, other))
        return Position.at(lowering.binary("add", torch.int64, *both), guarded)

    def _numerator(self, divisor: int) -> tuple[dict[str, int | Number], int | Number]:
        """Coefficients and offset over a multiple of the divisor."""
        scale = divisor // self.divisor
        return {axis: c * scale for axis, c in self.terms}, self.offset * scale

    def over(self, lowering: Lowering, divisor: int) -> Position:
        """position / divisor, which lies outside where that is not whole."""
        if divisor == 1:
            return self
        if self.computed is None:
            return Position.of(dict(self.terms), self.offset, True, self.divisor * divisor)
        by = lowering.number(divisor, torch.int64)
        quotient = lowering.make("floor_divide", torch.int64, self.computed, by)
        rest = lowering.make("remainder", torch.int64, self.computed, by)
        divides = lowering.make("eq", torch.bool, rest, lowering.number(0, torch.int64))
        return Position.at(lowering.where(divides, quotient, lowering.number(-1, torch.int64)), True)


ORIGIN = Position()
Positions = tuple[tuple[Position, ...], ...]  # for each dimension, one for each digit


def everywhere(value: Value) -> Positions:
    """Positions along an axis for each digit of a value, named by its dimension and its place there."""
    return tuple(
        tuple(ORIGIN if is_one(n) else Position.of({f"{d}.{k}": 1}, 0) for k, n in enumerate(digits))
        for d, digits in enumerate(value.digits)
    )


def merged(lowering: Lowering, positions: Sequence[Position], digits: Digits) -> Position:
    """The position along the product of digits."""
    result = ORIGIN
    for position, digit in zip(positions, digits, strict=True):
        result = result.moved(lowering, digit, 0).plus(lowering, position)
    return result


def refined(a: Digits, b: Digits) -> Digits | None:
    """Digits of which both are products, where there are some; the two products are known to be equal."""
    if len(a) == len(b) == 1:
        return a
    left, right = [d for d in a if not is_one(d)], [d for d in b if not is_one(d)]
    common: list[Extent] = []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if same(x, y):
            common.append(x)
        elif (rest := quotient(x, y)) is not None:
            common.append(y)
            left.insert(0, rest)
        elif (rest := quotient(y, x)) is not None:
            common.append(x)
            right.insert(0, rest)
        else:
            return None
    return None if left or right else tuple(common) or (1,)


def regrouped(
    lowering: Lowering, positions: Sequence[Position], digits: Digits, wanted: Digits
) -> tuple[Position, ...]:
    """Positions along finer digits as positions along coarser ones."""
    if len(digits) == len(wanted):
        return tuple(positions)
    if len(wanted) == 1:  # its size may have another formula than the product
        return (merged(lowering, positions, digits),)
    rest = [(p, d) for p, d in zip(positions, digits, strict=True) if not is_one(d)]
    result = []
    for whole in wanted:
        taken: list[tuple[Position, Extent]] = []
        while not same(product([d for _, d in taken]), whole):
            taken.append(rest.pop(0))
        result.append(merged(lowering, [p for p, _ in taken], tuple(d for _, d in taken)))
    return tuple(result)


class Value:
    """A tensor of a trace: shape, dtype, the digits of every dimension, and an expression for each element."""

    def __init__(self, shape: Sequence[Extent], dtype: torch.dtype, digits: Sequence[Digits] | None = None):
        self.shape, self.ndim, self.dtype = tuple(shape), len(shape), dtype
        self.digits = tuple(digits) if digits is not None else tuple(map(digits_of, shape))
        # How many digits each dimension has, or 0 where it is of size 1.
        self.counts = tuple([0 if is_one(n) else len(own) for n, own in zip(self.shape, self.digits)])

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        raise NotImplementedError


class Scalar(Value):
    """A number: a constant, a size or a hyper-parameter."""

    def __init__(self, number: Any, dtype: torch.dtype, shape: Sequence[Extent] = ()):
        super().__init__(shape, dtype)
        self.number = number

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        return lowering.number(self.number, self.dtype)


class Input(Value):
    """A tensor that a program is given."""

    def __init__(self, name: str, shape: Sequence[Extent], dtype: torch.dtype):
        super().__init__(shape, dtype)
        self.name = name

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        return lowering.load(lowering.buffer(self).name, self.dtype, [p for each in positions for p in each])


class Drawn(Input):
    """Random numbers, which only the loss has: it may write over them."""


class Iota(Value):
    """start + step * i."""

    def __init__(self, length: Extent, start: Any, step: Any, dtype: torch.dtype):
        super().__init__((length,), dtype)
        self.start, self.step = start, step

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        index = lowering.cast(positions[0][0].expression(lowering), self.dtype)
        scaled = lowering.binary("mul", self.dtype, index, lowering.number(self.step, self.dtype))
        return lowering.binary("add", self.dtype, scaled, lowering.number(self.start, self.dtype))


class Map(Value):
    """An elementwise operation of broadcast operands; ``cast`` is what they are computed in."""

    def __init__(self, op: str, dtype: torch.dtype, operands: Sequence[Value], computed: torch.dtype | None = None):
        shape, digits, operands = broadcast(operands)
        super().__init__(shape, dtype, digits)
        self.op, self.operands, self.computed = op, operands, computed

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        arguments = []
        for operand in self.operands:
            argument = lowering.element(operand, restricted(lowering, positions, self, operand))
            arguments.append(lowering.cast(argument, self.computed) if self.computed else argument)
        if self.op == "cast":
            return lowering.cast(arguments[0], self.dtype)
        return lowering.make(self.op, self.dtype, *arguments)


class Where(Value):
    """One of two operands, each in the common dtype."""

    def __init__(self, condition: Value, a: Value, b: Value, dtype: torch.dtype):
        shape, digits, operands = broadcast([condition, a, b])
        super().__init__(shape, dtype, digits)
        self.operands = operands

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        condition, a, b = (
            lowering.element(operand, restricted(lowering, positions, self, operand)) for operand in self.operands
        )
        return lowering.where(condition, lowering.cast(a, self.dtype), lowering.cast(b, self.dtype))


class View(Value):
    """The elements of an operand under other indices."""

    def __init__(
        self,
        operand: Value,
        shape: Sequence[Extent],
        digits: Sequence[Digits],
        source: Callable[[Lowering, Positions], Positions],
    ):
        super().__init__(shape, operand.dtype, digits)
        self.operand, self.source = operand, source

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        return lowering.element(self.operand, self.source(lowering, positions))


class Permuted(View):
    """The elements of an operand, with its dimensions in another order."""

    def __init__(self, operand: Value, order: Sequence[int]):
        inverse = [order.index(d) for d in range(operand.ndim)]
        shape, digits = [operand.shape[d] for d in order], [operand.digits[d] for d in order]
        super().__init__(operand, shape, digits, lambda _, positions: tuple(positions[d] for d in inverse))
        self.order = tuple(order)


def permuted(x: Value, order: Sequence[int]) -> Value:
    """A value with its dimensions in another order; a product of matrices comes out in that order itself."""
    if list(order) == list(range(x.ndim)):
        return x
    if isinstance(x, Permuted):
        return permuted(x.operand, [x.order[d] for d in order])
    if isinstance(x, External) and x.call.target in PRODUCTS and tuple(order) == across(x.ndim):
        return x.across()
    return Permuted(x, order)


def across(rank: int) -> tuple[int, ...]:
    """The order in which the rows of matrices are their columns."""
    return (*range(rank - 2), rank - 1, rank - 2)


def place_of(x: Value, dim: int, place: Extent) -> View:
    """The elements at one place of a dimension, which is dropped."""
    at = Position.of({}, number_of(place))
    shape, digits = list(x.shape), list(x.digits)
    del shape[dim], digits[dim]
    return View(x, shape, digits, lambda lowering, positions: (*positions[:dim], (at,), *positions[dim:]))


class Computed(Value):
    """Elements given by a function; how padding, concatenation, gathers and their like are written."""

    def __init__(
        self,
        shape: Sequence[Extent],
        dtype: torch.dtype,
        digits: Sequence[Digits] | None,
        function: Callable[[Lowering, Positions], Expression],
    ):
        super().__init__(shape, dtype, digits)
        self.function = function

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        return self.function(lowering, positions)


class Reduction(Value):
    """An operand combined over some of its dimensions, which are dropped."""

    def __init__(
        self,
        operand: Value,
        dimensions: Sequence[int],
        combine: Combine,
        dtype: torch.dtype,
        piecewise: Sequence[int] = (),  # of the dimensions that are kept, those along which tensors are stacked
    ):
        self.kept = [d for d in range(operand.ndim) if d not in dimensions]
        super().__init__([operand.shape[d] for d in self.kept], dtype, [operand.digits[d] for d in self.kept])
        self.operand, self.dimensions = operand, tuple(dimensions)
        self.combine: Combine = combine
        self.piecewise = tuple(piecewise)
        self._parts: dict[tuple[int, int], Reduction] = {}

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        for dim in self.piecewise:
            place = positions[dim][0].constant
            if place is not None and 0 <= place < self.shape[dim]:
                return lowering.element(self._part(dim, place), positions[:dim] + positions[dim + 1 :])
        lone = lowering.lone_term(self, positions)
        return lowering.load_stored(self, positions) if lone is None else lone

    def around(self, positions: Positions, reduced: Position) -> Positions:
        """Positions along the operand, of which every one that is reduced is the same."""
        rest = iter(positions)
        return tuple(
            next(rest) if d in self.kept else (reduced,) * len(digits) for d, digits in enumerate(self.operand.digits)
        )

    def _part(self, dim: int, place: int) -> Reduction:
        """What there is at one place of a dimension, the same each time."""
        if (dim, place) not in self._parts:
            at = self.kept[dim]
            self._parts[dim, place] = Reduction(
                place_of(self.operand, at, place),
                [d - (d > at) for d in self.dimensions],
                self.combine,
                self.dtype,
                [d - (d > dim) for d in self.piecewise if d != dim],
            )
        return self._parts[dim, place]


class Stored(Value):
    """An operand that a program writes to memory before it is read."""

    def __init__(self, operand: Value):
        super().__init__(operand.shape, operand.dtype, operand.digits)
        self.operand = operand

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        return lowering.load_stored(self, positions)


class External(Value):
    """A result of an operator that torch runs."""

    def __init__(self, call: ExternalCall, output: int, shape: Sequence[Extent], dtype: torch.dtype):
        super().__init__(shape, dtype)
        self.call, self.output = call, output
        self.twin: External | None = None  # a product of matrices is its twin across

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        return lowering.load_result(self, positions)

    def across(self) -> External:
        """What a product of matrices is across, as a product of its own: whichever is asked for first is computed."""
        if self.twin is None:
            rows = across(self.ndim)
            a, b = (permuted(operand, rows) for operand in self.call.arguments)
            shape = [self.shape[d] for d in rows]
            self.twin = external(self.call.target, (b, a), shape, self.dtype)
            self.twin.twin = self
        return self.twin

    @cached_property
    def pairs(self) -> External:
        """Complex numbers as their real and imaginary parts, along a last dimension: the same memory."""
        return external(aten.view_as_real.default, (self,), (*self.shape, 2), self.dtype.to_real())


@dataclass(eq=False)
class ExternalCall:
    """The operator, its arguments (values among them) and what it returns."""

    target: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: list[External] = field(default_factory=list)


def external(target: Any, arguments: tuple[Any, ...], shape: Sequence[Extent], dtype: torch.dtype) -> External:
    """What an operator that torch runs returns, where that is one tensor."""
    check_known(shape)
    call = ExternalCall(target, arguments, {})
    call.outputs.append(External(call, 0, shape, dtype))
    return call.outputs[0]


def check_known(shape: Sequence[Extent]) -> None:
    """Checks the shape of what is to be in memory.

    Raises:
        CannotFuse: if a size depends on values.
    """
    if any(map(is_counted, shape)):
        raise refused("it needs what a boolean mask chooses one after the other in memory")


class Complex(Value):
    """Complex numbers, whose parts are computed like anything else, and lie side by side where torch reads them."""

    def __init__(self, real: Value, imag: Value):
        shape, digits, self.parts = broadcast([real, imag])
        super().__init__(shape, real.dtype.to_complex(), digits)

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        return lowering.make("beside", self.dtype.to_real(), *self.elements(lowering, positions))

    def elements(self, lowering: Lowering, positions: Positions) -> list[Expression]:
        """The real and the imaginary part of an element."""
        return [lowering.element(part, restricted(lowering, positions, self, part)) for part in self.parts]

    @cached_property
    def in_memory(self) -> External:
        return external(aten.view_as_complex.default, (Pairs(self),), self.shape, self.dtype)


class Pairs(Value):
    """Real and imaginary parts along a last dimension."""

    def __init__(self, operand: Complex):
        super().__init__((*operand.shape, 2), operand.dtype.to_real(), (*operand.digits, (2,)))
        self.operand = operand

    def element(self, lowering: Lowering, positions: Positions) -> Expression:
        *rest, (last,) = positions
        is_real = lowering.compare("eq", last.expression(lowering), lowering.number(0, torch.int64))
        return lowering.where(is_real, *self.operand.elements(lowering, tuple(rest)))


def broadcast(operands: Sequence[Value]) -> tuple[list[Extent], list[Digits], list[Value]]:
    """The common shape, its digits, and the operands, of which some may have to be stored to have fitting digits."""
    operands = list(operands)
    rank = max([operand.ndim for operand in operands])
    shape: list[Extent] = [1] * rank
    digits: list[Digits] = [(1,)] * rank
    for operand in operands:
        for d in range(operand.ndim):
            out = rank - operand.ndim + d
            if is_one(operand.shape[d]):
                continue
            if is_one(shape[out]):
                shape[out], digits[out] = operand.shape[d], operand.digits[d]
                continue
            if shape[out] is not operand.shape[d] and not shape[out] == operand.shape[d]:
                raise RuntimeError(f"sizes {shape[out]} and {operand.shape[d]} do not broadcast")
            common = refined(digits[out], operand.digits[d])
            if common is None:
                return broadcast([as_whole(o) for o in operands])
            digits[out] = common
    return shape, digits, operands


def as_whole(value: Value) -> Value:
    """The same tensor with one digit for each dimension; in memory, where it has more."""
    if all(len(digits) == 1 for digits in value.digits):
        return value
    return external(aten.reshape.default, (value, list(value.shape)), value.shape, value.dtype)


def restricted(lowering: Lowering, positions: Positions, of: Value, operand: Value) -> Positions:
    """The positions of a broadcast result as positions of an operand."""
    if operand.counts == of.counts and all(of.counts):
        return positions
    missing = of.ndim - operand.ndim
    dimensions = zip(positions[missing:], of.digits[missing:], operand.digits, operand.shape)
    return tuple(
        [
            (ORIGIN,) * len(wanted) if is_one(size) else regrouped(lowering, at, digits, wanted)
            for at, digits, wanted, size in dimensions
        ]
    )
