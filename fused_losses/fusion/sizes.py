"""Sizes and hyper-parameters that a trace leaves open: numbers with a formula, and the comparisons it relied on.

A :class:`Number` speaks the protocol of torch's symbolic integers, so ``torch.SymInt(number)`` can be the size of a
tensor. It has a formula (a polynomial of input sizes, or an expression of hyper-parameters) and the value it has in
the call that is traced. Where Python must know a truth value, the answer follows from the formula alone or becomes a
:class:`Guard`: the trace serves exactly the calls in which every guard holds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch

from .ir import ZERO, Expression, Size
from .refusals import is_asked_by_torch, refused

Polynomial = dict[tuple[int, ...], int]  # monomial (indices of atoms, sorted) to coefficient, never 0
Formula = Polynomial | Expression

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
Shapes = Mapping[str, Sequence[int]]  # of inputs, by name
LARGEST = 2**60  # no size is as large
ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "abs": abs,
    "floordiv": operator.floordiv,
    "max": max,
    "min": min,
}


@dataclass(frozen=True)
class Guard:
    """A comparison that a trace relied on: ``left`` compared with ``right`` came out as ``outcome``."""

    comparison: str
    left: Size | Expression
    right: Size | Expression
    outcome: bool

    def holds(self, shapes: Shapes, parameters: Mapping[str, float]) -> bool:
        left, right = (evaluate(side, shapes, parameters) for side in (self.left, self.right))
        return COMPARISONS[self.comparison](left, right) is self.outcome


def evaluate(number: Size | Expression, shapes: Shapes, parameters: Mapping[str, float]) -> Any:
    """The value of a size or of a scalar expression for given inputs."""
    if isinstance(number, Size):
        if number.op == "const":
            return number.value
        if number.op == "size":
            name, dimension = number.value
            return shapes[name][dimension]
    else:
        if number.op == "constant":
            return number["value"]
        if number.op == "parameter":
            return parameters[number["name"]]
        if number.op == "size":
            return float(evaluate(number["value"], shapes, parameters))
    return ARITHMETIC[number.op](*(evaluate(a, shapes, parameters) for a in number.arguments))


class Assumptions:
    """The open sizes of one trace, what is known of them, and the guards it made."""

    def __init__(self) -> None:
        self.atoms: list[Size] = []
        self.hints: list[int] = []
        self.least: list[int] = []  # what an atom is at least
        self.guards: list[Guard] = []
        self.settled: set[Number] = set()  # truth values that are in the guards, sizes that are empty or not
        self._indices: dict[Size, int] = {}
        self._numbers: dict[Any, Number] = {}
        self.worked_out: dict[Any, Number] = {}  # results of arithmetic, by method and operands
        self.truth = {
            value: Number(self, Guard("eq" if value else "ne", ZERO, ZERO, True), value) for value in (True, False)
        }

    def integer(self, polynomial: Polynomial, hint: int) -> Number:
        """The number that a polynomial is: one object, so that equal ones are the same."""
        key = tuple(sorted(polynomial.items()))
        number = self._numbers.get(key)
        if number is None:
            self._numbers[key] = number = Number(self, polynomial, hint)
        return number

    def size(self, name: str, dimension: int, hint: int) -> torch.SymInt:
        """A dimension of an input; those of 0 and 1 are fixed by the pattern, so this one is at least 2."""
        return torch.SymInt(self.atom(Size("size", (name, dimension)), hint, 2))

    def parameter(self, name: str, hint: float) -> torch.SymFloat:
        return torch.SymFloat(Number(self, Expression("parameter", torch.float64, (), (("name", name),)), hint))

    def atom(self, size: Size, hint: int, least: int) -> Number:
        if size not in self._indices:
            self._indices[size] = len(self.atoms)
            self.atoms.append(size)
            self.hints.append(hint)
            self.least.append(least)
        return self.integer({(self._indices[size],): 1}, hint)

    def as_size(self, polynomial: Polynomial) -> Size:
        terms = []
        for monomial, coefficient in sorted(polynomial.items()):
            factors = [self.atoms[i] for i in monomial]
            if coefficient != 1 or not factors:
                factors = [Size("const", coefficient), *factors]
            terms.append(_chain("mul", factors))
        return _chain("add", terms) if terms else ZERO

    def bounds(self, polynomial: Polynomial) -> tuple[int, int]:
        """What a polynomial is at least and at most, where its signs say so."""
        if len(polynomial) == 1 and () not in polynomial:  # nearly always one size
            ((monomial, coefficient),) = polynomial.items()
            least = [self.least[index] for index in monomial]
            if min(least) >= 0:
                constant = coefficient * math.prod(least)
                return (constant, LARGEST) if coefficient > 0 else (-LARGEST, constant)
        shifted: Polynomial = {}
        for monomial, coefficient in polynomial.items():
            product: Polynomial = {(): coefficient}
            for index in monomial:  # an atom is its least value plus something not negative
                product = _multiplied(product, {(index,): 1, (): self.least[index]})
            shifted = _added(shifted, product)
        constant = shifted.pop((), 0)
        low = constant if all(c >= 0 for c in shifted.values()) else -LARGEST
        high = constant if all(c <= 0 for c in shifted.values()) else LARGEST
        return low, high

    def are_counted(self, formula: Formula | Guard) -> bool:
        """The same of a formula."""
        if isinstance(formula, dict):
            return any(is_counted(self.atoms[index]) for monomial in formula for index in monomial)
        sides = (formula.left, formula.right) if isinstance(formula, Guard) else (formula,)
        return any(map(is_counted, sides))

    def differ(self, polynomial: Polynomial) -> bool:
        """Whether a polynomial is the difference of two input sizes: a pattern says which of them are equal."""
        return sorted(polynomial.values()) == [-1, 1] and all(
            len(m) == 1 and self.atoms[m[0]].op == "size" for m in polynomial
        )


def is_counted(number: Size | Expression) -> bool:
    """Whether a number depends on how many elements a mask chooses."""
    if number.op == "size" and isinstance(number, Expression):
        return is_counted(number["value"])
    return number.op == "count" or any(map(is_counted, number.arguments))


def _chain(op: str, sizes: list[Size]) -> Size:
    result = sizes[0]
    for size in sizes[1:]:
        result = Size(op, arguments=(result, size))
    return result


def _added(a: Polynomial, b: Polynomial) -> Polynomial:
    result = dict(a)
    for monomial, coefficient in b.items():
        result[monomial] = result.get(monomial, 0) + coefficient
    return {monomial: coefficient for monomial, coefficient in result.items() if coefficient}


def _subtracted(a: Polynomial, b: Polynomial) -> Polynomial:
    return {} if a == b else _added(a, {monomial: -coefficient for monomial, coefficient in b.items()})


def _multiplied(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for left, c in a.items():
        for right, d in b.items():
            monomial = tuple(sorted(left + right))
            result[monomial] = result.get(monomial, 0) + c * d
    return {monomial: coefficient for monomial, coefficient in result.items() if coefficient}


def _divided(a: Polynomial, b: Polynomial) -> Polynomial | None:
    """a / b where it is exact and b one monomial."""
    if len(b) != 1:
        return {(): 1} if a == b else None
    ((divisor, c),) = b.items()
    result: Polynomial = {}
    for monomial, coefficient in a.items():
        left = list(monomial)
        for index in divisor:
            if index not in left:
                return None
            left.remove(index)
        if coefficient % c:
            return None
        result[tuple(left)] = coefficient // c
    return result


def _once(method: Callable[..., Number]) -> Callable[..., Number]:
    """Decorates what is worked out once for each of its arguments."""

    def given(self: Number, *arguments: Any) -> Number:
        known, key = self.assumptions.worked_out, (method, self, *arguments)
        result = known.get(key)
        if result is None:
            known[key] = result = method(self, *arguments)
        return result

    return given


class Number:
    """A symbolic int, float or bool in torch's protocol; every public method's name is torch's.

    Integers with equal formulas are one object.
    """

    def __init__(self, assumptions: Assumptions, formula: Formula | Guard, hint: Any):
        self.assumptions, self.formula, self.hint = assumptions, formula, hint
        is_constant = isinstance(formula, dict) and len(formula) <= (() in formula)
        self.plain: int | Number = hint if is_constant else self  # an int where that is all it is

    # What it is.

    def is_int(self) -> bool:
        return isinstance(self.formula, dict)

    def is_float(self) -> bool:
        return isinstance(self.formula, Expression)

    def is_bool(self) -> bool:
        return isinstance(self.formula, Guard)

    def is_nested_int(self) -> bool:
        return False

    def nested_int(self) -> None:
        return None

    def is_symbolic(self) -> bool:
        return True

    @property
    def _hint(self) -> Any:
        return self.hint

    def has_hint(self) -> bool:
        return True

    def is_constant(self) -> bool:
        return self.plain is not self

    def maybe_as_int(self) -> int | None:
        return self.plain if isinstance(self.plain, int) else None

    def clone(self) -> Number:
        return self

    def str(self) -> str:
        return f"{self.hint}?"

    __str__ = __repr__ = _graph_repr = str

    @cached_property
    def is_counted(self) -> bool:
        return self.assumptions.are_counted(self.formula)

    @cached_property
    def mask(self) -> Any:
        """The mask that chooses so many elements, where the number is that."""
        if isinstance(self.formula, dict) and [*self.formula.values()] == [1]:
            (monomial,) = self.formula
            if len(monomial) == 1 and (atom := self.assumptions.atoms[monomial[0]]).op == "count":
                return atom.value
        return None

    @cached_property
    def extent(self) -> torch.SymInt:
        """As a size of a tensor."""
        return torch.SymInt(self)

    @cached_property
    def size(self) -> Size:
        assert isinstance(self.formula, dict)
        return self.assumptions.as_size(self.formula)

    @property
    def expression(self) -> Expression:
        """As a scalar of an expression: float64, or int64 for an integer."""
        if isinstance(self.formula, Expression):
            return self.formula
        constant = self.maybe_as_int()
        if constant is not None:
            return Expression("constant", torch.int64, (), (("value", constant),))
        return Expression("size", torch.int64, (), (("value", self.size),))

    # Constants.

    def wrap_int(self, number: int) -> Number:
        return self.assumptions.integer({(): number} if number else {}, number)

    def wrap_float(self, number: float) -> Number:
        return Number(self.assumptions, Expression("constant", torch.float64, (), (("value", number),)), number)

    def wrap_bool(self, value: bool) -> Number:
        return self.assumptions.truth[value]

    # Arithmetic: torch's, and Python's own among integers.

    def _beside(self, other: int | Number) -> Number:
        return self.wrap_int(other) if isinstance(other, int) else other

    def __add__(self, other: int | Number) -> int | Number:
        return self.add(self._beside(other)).plain

    def __mul__(self, other: int | Number) -> int | Number:
        return self.mul(self._beside(other)).plain

    __radd__, __rmul__ = __add__, __mul__

    def over(self, other: int | Number) -> int | Number | None:
        """The quotient, where it is a whole number whatever the sizes are."""
        divisor = self._beside(other)
        exact = _divided(self.formula, divisor.formula)  # type: ignore[arg-type]
        return None if exact is None else self.assumptions.integer(exact, self.hint // divisor.hint).plain

    def _number(self, op: str, *others: Number) -> Number:
        operands = (self, *others)
        expression = Expression(op, torch.float64, tuple(n.sym_float().formula for n in operands))  # type: ignore[misc]
        return Number(self.assumptions, expression, ARITHMETIC[op](*(float(n.hint) for n in operands)))

    @_once
    def add(self, other: Number) -> Number:
        if isinstance(self.formula, dict) and isinstance(other.formula, dict):
            return self.assumptions.integer(_added(self.formula, other.formula), self.hint + other.hint)
        return self._number("add", other)

    @_once
    def mul(self, other: Number) -> Number:
        if isinstance(self.formula, dict) and isinstance(other.formula, dict):
            return self.assumptions.integer(_multiplied(self.formula, other.formula), self.hint * other.hint)
        return self._number("mul", other)

    def neg(self) -> Number:
        return self.mul(self.wrap_int(-1)) if self.is_int() else self._number("neg")

    @_once
    def sub(self, other: Number) -> Number:
        if isinstance(self.formula, dict) and isinstance(other.formula, dict):
            return self.assumptions.integer(_subtracted(self.formula, other.formula), self.hint - other.hint)
        return self._number("sub", other)

    @_once
    def int_floordiv(self, other: Number) -> Number:
        exact = _divided(self.formula, other.formula)  # type: ignore[arg-type]
        if exact is not None:
            return self.assumptions.integer(exact, self.hint // other.hint)
        low, _ = self.assumptions.bounds(self.formula)  # type: ignore[arg-type]
        divisor = other.maybe_as_int()
        least = low // divisor if low > -LARGEST and divisor is not None and divisor > 0 else None
        return self._atom("floordiv", other, self.hint // other.hint, least)

    def _atom(self, op: str, other: Number, hint: int, least: int | None) -> Number:
        if least is None:  # nothing is known, so nothing may be concluded
            least = -LARGEST
        return self.assumptions.atom(Size(op, arguments=(self.size, other.size)), hint, least)

    def mod(self, other: Number) -> Number:
        return self.sub(self.int_floordiv(other).mul(other))

    def sym_min(self, other: Number) -> Number:
        return self if self.le(other).guard_bool() else other

    def sym_max(self, other: Number) -> Number:
        if self.is_counted:
            return self._atom("max", other, max(self.hint, other.hint), other.maybe_as_int())
        return self if self.ge(other).guard_bool() else other

    def pow_by_natural(self, other: Number) -> Number:
        result = self.wrap_int(1)
        for _ in range(other.guard_int()):
            result = result.mul(self)
        return result

    def float_truediv(self, other: Number) -> Number:
        return self._number("div", other)

    truediv = int_truediv = float_truediv
    floordiv = int_floordiv

    def float_pow(self, other: Number) -> Number:
        return self._number("pow", other)

    pow = float_pow

    def abs(self) -> Number:
        if self.is_int():
            return self if self.ge(self.wrap_int(0)).guard_bool() else self.neg()
        return self._number("abs")

    def sym_float(self) -> Number:
        if self.is_float():
            return self
        constant = self.maybe_as_int()
        if constant is not None:
            return self.wrap_float(float(constant))
        expression = Expression("size", torch.float64, (), (("value", self.size),))
        return Number(self.assumptions, expression, float(self.hint))

    def floor(self) -> Number:
        return self if self.is_int() else self.wrap_int(math.floor(self.guard_float()))

    def ceil(self) -> Number:
        return self if self.is_int() else self.wrap_int(math.ceil(self.guard_float()))

    def trunc(self) -> Number:
        return self if self.is_int() else self.wrap_int(math.trunc(self.guard_float()))

    sym_int = trunc

    # Comparisons and what Python or C++ must know.

    @_once
    def _compared(self, comparison: str, other: Number) -> Number:
        outcome = COMPARISONS[comparison](self.hint, other.hint)
        if isinstance(self.formula, dict) and isinstance(other.formula, dict):
            difference = _subtracted(self.formula, other.formula)
            constant = difference.pop((), 0)  # kept apart: one near the largest integer means "no bound"
            low, high = (bound + constant for bound in self.assumptions.bounds(difference))
            decided = low > 0 or high < 0 or low == high == 0
            decided |= comparison in ("ge", "lt") and low >= 0
            decided |= comparison in ("le", "gt") and high <= 0
            decided |= comparison in ("eq", "ne") and self.assumptions.differ(difference)
            if decided:
                return self.wrap_bool(outcome)
            return Number(self.assumptions, Guard(comparison, self.size, other.size, outcome), outcome)
        left, right = (n.sym_float().formula for n in (self, other))
        return Number(self.assumptions, Guard(comparison, left, right, outcome), outcome)  # type: ignore[arg-type]

    def eq(self, other: Number) -> Number:
        if self.is_bool():
            return self.wrap_bool(self.guard_bool() == other.guard_bool())
        return self._compared("eq", other)

    def ne(self, other: Number) -> Number:
        return self._compared("ne", other)

    def lt(self, other: Number) -> Number:
        return self._compared("lt", other)

    def le(self, other: Number) -> Number:
        return self._compared("le", other)

    def gt(self, other: Number) -> Number:
        return self._compared("gt", other)

    def ge(self, other: Number) -> Number:
        return self._compared("ge", other)

    def sym_not(self) -> Number:
        return self.wrap_bool(not self.guard_bool())

    def sym_and(self, other: Number) -> Number:
        return self.wrap_bool(self.guard_bool() and other.guard_bool())

    def sym_or(self, other: Number) -> Number:
        return self.wrap_bool(self.guard_bool() or other.guard_bool())

    and_, or_ = sym_and, sym_or

    def guard_bool(self, file: Any = "", line: int = 0) -> bool:
        if self in self.assumptions.settled:
            return self.hint
        self.assumptions.settled.add(self)
        assert isinstance(self.formula, Guard)
        guard = self.formula
        if self.is_counted:  # torch itself asks, of a number like no other: see Tracer.count
            return self.hint
        constant = guard.left.op == guard.right.op == "const"
        if not constant and guard not in self.assumptions.guards:
            self.assumptions.guards.append(guard)
        return self.hint

    expect_true = guard_size_oblivious = guard_or_false = guard_or_true = statically_known_true = guard_bool

    def bool_(self) -> bool:
        if self.is_counted and not is_asked_by_torch():
            self._refuse()
        return self.guard_bool()

    def _refuse(self) -> NoReturn:
        raise refused("it asks how many elements a mask chooses, which depends on values")

    def guard_int(self, file: Any = "", line: int = 0) -> int:
        """The value itself, which fixes it for this trace."""
        if self.is_counted:
            self._refuse()
        self.eq(self.wrap_int(self.hint)).guard_bool()
        return self.hint

    def int_(self) -> int:
        return self.guard_int()

    def guard_float(self, file: Any = "", line: int = 0) -> float:
        if self.is_counted:
            self._refuse()
        number = self.sym_float()
        number.eq(number.wrap_float(number.hint)).guard_bool()
        return number.hint

    def settle_emptiness(self) -> None:
        """A trace serves tensors with elements or without, as what reduces the latter may raise."""
        if self in self.assumptions.settled:
            return
        self.assumptions.settled.add(self)
        if self.is_counted:
            return  # what would raise then is refused
        (monomial, *others) = self.formula or [()]  # type: ignore[misc]
        if others or any(self.assumptions.least[index] < 1 for index in monomial):
            self.eq(self.wrap_int(0)).guard_bool()

    # Strides mean nothing to a trace, in which every tensor is its values: the call's own answer needs no guard.

    def is_contiguous(self, sizes: Sequence[Number], strides: Sequence[Number]) -> Number:
        expected, contiguous = 1, True
        for size, stride in zip(reversed([n.hint for n in sizes]), reversed([n.hint for n in strides])):
            contiguous &= size == 1 or stride == expected
            expected *= size
        return self.wrap_bool(contiguous)

    is_non_overlapping_and_dense = is_contiguous

    def is_channels_last_contiguous_2d(self, sizes: Sequence[Number], strides: Sequence[Number]) -> Number:
        return self.wrap_bool(False)

    is_channels_last_contiguous_3d = is_channels_last_strides_2d = is_channels_last_contiguous_2d
    is_channels_last_strides_3d = is_channels_last_contiguous_2d
