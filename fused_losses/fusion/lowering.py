"""From values to programs: stages for reductions and results, everything else inside their expressions."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .extents import as_argument, is_one, size_of, sizes_of
from .ir import ALIASES, TWO, WHOLE, WIDE, Axis, Buffer, Expression, Extern, Program, Read, Size, Stage, spread
from .lone import lone_term
from .refusals import CannotFuse
from .sizes import is_counted
from .values import (
    ORIGIN,
    PRODUCTS,
    Complex,
    External,
    ExternalCall,
    Input,
    Pairs,
    Permuted,
    Position,
    Positions,
    Reduction,
    Stored,
    Value,
    across,
    aten,
)

if TYPE_CHECKING:
    from .tracing import Trace


WORTH_MEMORY = 32  # operations for each element, above which it is written to memory and read again
COSTLY = frozenset(
    [
        "exp",
        "exp_nonpositive",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "pow",
        "sin",
        "cos",
        "tan",
        "tanh",
        "sigmoid",
        "erf",
        "erfc",
        "lgamma",
        "digamma",
    ]
)


def cost(*expressions: Expression) -> int:
    """About how many operations it takes to compute some expressions together."""
    seen: set[Expression] = set()
    waiting = [*expressions]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.arguments
    return sum((8 if node.op in COSTLY else 1) for node in seen if node.arguments)


@dataclass(eq=False)  # compared by identity
class Element:
    """A value at some positions: its expression, and the elements that it was made of."""

    value: Value
    positions: Positions
    expression: Expression
    parts: Sequence[Element]

    def __post_init__(self) -> None:
        # How often it is computed where it is read: a strided piece, between its elements too.
        self.times = math.prod([position.divisor for each in self.positions for position in each])


class Lowering:
    """Builds one program.

    ``given`` are inputs and what an earlier program has saved, with their buffers; ``ones`` are values that are 1.
    """

    def __init__(self, given: Mapping[Any, Buffer], prefix: str, ones: Collection[Value] = ()):
        self.prefix = prefix  # of the names of new buffers
        self.buffers: dict[Value, Buffer] = dict(given)
        self.ones = ones
        self.steps: list[Stage | Extern] = []
        self.used: dict[str, None] = {}  # buffers that are read
        self.parameters: dict[str, None] = {}
        self._elements: dict[Value, dict[Positions, Element]] = {}  # all that were looked at, each worked out once
        self._parts: list[Element] = []  # of the element that is worked out
        self._stored: set[Value] = set()  # what is kept in memory, as one stage reads it at many places
        self._crossed: dict[str, Buffer] = {}  # by name, those that are looked at with rows for columns
        self._computed_in: dict[Any, Buffer] = {}  # by what stages compute
        self._nodes: dict[Any, Expression] = {}
        self._looking_up: set[Expression] = set()

    # Expressions, of which equal ones are one object.

    def make(self, op: str, dtype: torch.dtype, *arguments: Expression, **attributes: Any) -> Expression:
        items = tuple(attributes.items())
        key = (op, dtype, arguments, items, *map(type, attributes.values()))
        node = self._nodes.get(key)
        if node is None:
            self._nodes[key] = node = Expression(op, dtype, arguments, items)
            if op == "checked" or not self._looking_up.isdisjoint(node.children):
                self._looking_up.add(node)
        return node

    def looks_up(self, expression: Expression) -> bool:
        """Whether it takes a checked index."""
        return expression in self._looking_up

    def number(self, number: Any, dtype: torch.dtype) -> Expression:
        """A constant, a size or a hyper-parameter in a dtype."""
        if isinstance(number, (torch.SymInt, torch.SymFloat)):
            return self.cast(self._scalar(number.node.expression), dtype)
        kind = float if dtype.is_floating_point else bool if dtype is torch.bool else int
        return self.make("constant", dtype, value=kind(number))

    def _scalar(self, expression: Expression) -> Expression:
        if expression.op == "size":
            return self.cast(self._size(expression["value"]), expression.dtype)
        if expression.op == "parameter":
            self.parameters[expression["name"]] = None
        arguments = (self._scalar(argument) for argument in expression.arguments)
        return self.make(expression.op, expression.dtype, *arguments, **dict(expression.attributes))

    def _size(self, size: Size) -> Expression:
        """A size as a number, of which counts of masks are computed."""
        if size.op == "count":
            return self.element(size.value.count, ())
        if not is_counted(size):
            return self.make("size", torch.int64, value=size)
        op = {"floordiv": "floor_divide", "max": "maximum", "min": "minimum"}.get(size.op, size.op)
        return self.make(op, torch.int64, *map(self._size, size.arguments))

    def cast(self, expression: Expression, dtype: torch.dtype) -> Expression:
        if expression.dtype is dtype:
            return expression
        if expression.op == "constant":
            return self.number(expression["value"], dtype)
        return self.make("cast", dtype, expression)

    def binary(self, op: str, dtype: torch.dtype, a: Expression, b: Expression) -> Expression:
        """An operation without those that change nothing."""
        neutral = {"add": 0, "mul": 1}[op]
        for one, other in ((a, b), (b, a)):
            if one.op == "constant" and one["value"] == neutral:
                return other
        return self.make(op, dtype, a, b)

    def compare(self, op: str, a: Expression, b: Expression) -> Expression:
        """A comparison, decided where both numbers are known."""
        if a.op == b.op == "constant":
            return self.number(getattr(operator, op)(a["value"], b["value"]), torch.bool)
        return self.make(op, torch.bool, a, b)

    def where(self, condition: Expression, a: Expression, b: Expression) -> Expression:
        if condition.op == "constant":
            return a if condition["value"] else b
        return a if a is b else self.make("where", a.dtype, condition, a, b)

    def load(self, buffer: str, dtype: torch.dtype, positions: Sequence[Position]) -> Expression:
        self.used[buffer] = None
        index = tuple(position.as_index() for position in positions)
        return self.make("load", dtype, buffer=buffer, index=index, guarded=any(p.guarded for p in positions))

    def element(self, value: Value, positions: Positions) -> Expression:
        if value in self._stored:
            return self.load_stored(value, positions)
        known = self._elements.setdefault(value, {})
        element = known.get(positions)
        if element is None:
            element = self._worked_out(value, positions)
            known[positions] = element
        self._parts.append(element)
        return element.expression

    def _worked_out(self, value: Value, positions: Positions) -> Element:
        """An element as the value itself gives it, wherever it may be stored."""
        around, self._parts = self._parts, []
        expression = self.number(1, value.dtype) if value in self.ones else value.element(self, positions)
        element = Element(value, positions, expression, self._parts)
        self._parts = around
        return element

    def lone_term(self, value: Reduction, positions: Positions) -> Expression | None:
        """An element of a sum of which one term alone is not 0; it needs no buffer."""
        if value.combine != "sum" or value in self.buffers or len(value.dimensions) != 1:
            return None
        (dimension,) = value.dimensions
        extent, *more = value.operand.digits[dimension]
        if more or is_one(extent) or not self.may_be_lone(value, positions):
            return None
        along = (Position.of({"term": 1}, 0),)
        term = self._worked_out(value.operand, (*positions[:dimension], along, *positions[dimension:])).expression
        lone = lone_term(self, term, "term", size_of(extent))
        return None if lone is None else self.cast(lone, value.dtype)

    def may_be_lone(self, value: Reduction, positions: Positions) -> bool:
        """Whether one term alone is not 0, wherever it is read."""
        _, (axis,), along = _along_axes(value.operand, value.dimensions)
        term = self._worked_out(value.operand, along).expression
        return self.looks_up(term) and lone_term(self, term, axis.name, axis.extent) is not None

    # Buffers.

    def load_stored(self, value: Value, positions: Positions) -> Expression:
        """An element of a value that has a buffer of its own, which lacks the digits of size 1."""
        buffer = self.buffer(value)
        flat = [p for each, digits in zip(positions, value.digits) for p, d in zip(each, digits) if not is_one(d)]
        return self.load(buffer.name, value.dtype, flat)

    def load_result(self, value: External, positions: Positions) -> Expression:
        """An element of what torch computes."""
        if (twin := self._present_twin(value)) is not None:
            value, positions = twin, tuple(positions[d] for d in across(value.ndim))
        return self.load(self.buffer(value).name, value.dtype, [p for each in positions for p in each])

    def _present_twin(self, value: Value) -> External | None:
        """What a product of matrices is across, where that is in memory and it itself is not."""
        if not isinstance(value, External) or value in self.buffers:
            return None
        return value.twin if value.twin in self.buffers else None

    def buffer(self, value: Value) -> Buffer:
        """Where a value is in memory; its step is added where there is none yet."""
        if value not in self.buffers:
            if isinstance(value, Complex):
                self.buffers[value] = self.buffer(value.in_memory)
            elif isinstance(value, External) and self._present_twin(value) is None:
                self.call(value.call)
            elif isinstance(value, Reduction):
                self._reduce(value)
            else:
                self._store(value)
        return self.buffers[value]

    def _new_name(self) -> str:
        return f"{self.prefix}{len(self.steps)}"

    def _stage(self, value: Value, operand: Value, reduced: Sequence[int], combine: Any) -> None:
        """Adds the stage that loops over the digits of an operand."""
        outer, inner, positions = _along_axes(operand, reduced)
        expression = self._computed(operand, positions)
        if combine in ("any", "all"):
            expression = self.cast(expression, torch.bool)
        elif combine in ("sum", "prod"):
            expression = self.cast(expression, value.dtype)
        if any(node.op in WHOLE for node in expression.nodes[:-1]):  # a kernel would compute something else
            raise CannotFuse("it takes a part of what only a whole pass can be, a fault of fuse")
        extents = [axis.extent for axis in outer] + [TWO] * (expression.op == "beside")
        if not inner:
            combine = None
            expression = self.cast(spread(expression), value.dtype)
        computed = (tuple(outer), expression, tuple(inner), combine, value.dtype)
        if computed not in self._computed_in:
            buffer = Buffer(self._new_name(), tuple(extents), value.dtype)
            self.steps.append(Stage(buffer, *computed[:-1]))
            self._computed_in[computed] = buffer
        self.buffers[value] = self._computed_in[computed]

    def _computed(self, operand: Value, positions: Positions) -> Expression:
        """The expression of a stage, in which nothing large is computed at many places."""
        while True:
            element = self._worked_out(operand, positions)
            repeated = _most_repeated(element)
            if repeated is None:
                return element.expression
            self._stored.add(repeated)
            self._forget(repeated)

    def _forget(self, value: Value) -> None:
        """Lets every element that is made of a value's be worked out again."""
        made_of_it: dict[Element, bool] = {}

        def is_made_of_it(element: Element) -> bool:
            if element not in made_of_it:
                made_of_it[element] = element.value is value or any(map(is_made_of_it, element.parts))
            return made_of_it[element]

        for elements in self._elements.values():
            for element in [*elements.values()]:
                if is_made_of_it(element):
                    del elements[element.positions]

    def _reduce(self, value: Reduction) -> None:
        self._stage(value, value.operand, value.dimensions, value.combine)

    def _store(self, value: Value) -> None:
        operand = value.operand if isinstance(value, (Pairs, Stored)) else value
        self._stage(value, operand, (), None)

    def call(self, call: ExternalCall) -> None:
        """Adds the step that runs an operator of torch's."""
        matrices = self._matrices(call.arguments) if call.target in PRODUCTS else call.arguments
        arguments, keywords = (as_argument(given, self._readable) for given in (matrices, call.keywords))
        for output in call.outputs:
            self.buffers[output] = Buffer(f"{self._new_name()}_{output.output}", sizes_of(output.shape), output.dtype)
        buffers = tuple(self.buffers[output] for output in call.outputs)
        self.steps.append(Extern(buffers, call.target, arguments, keywords))

    def _readable(self, argument: Any) -> Any:
        """An argument of an operator, with values in memory."""
        if isinstance(argument, Value):
            argument = self.shaped(argument)
        return Read(argument.name) if isinstance(argument, Buffer) else argument

    def _matrices(self, operands: Sequence[Value]) -> list[Buffer]:
        """Operands of a product; those that are others across are just looked at that way."""
        found: list[tuple[Buffer, bool]] = []
        for operand in operands:
            value, is_across = self._lying(operand)
            found.append((self.shaped(value), is_across))
        return [self._across(buffer) if is_across else buffer for buffer, is_across in found]

    def _lying(self, matrices: Value) -> tuple[Value, bool]:
        """What holds matrices in memory, and whether they lie across there."""
        if (twin := self._present_twin(matrices)) is not None:
            return twin, True
        if isinstance(matrices, Permuted) and matrices.order == across(matrices.ndim):
            return matrices.operand, True
        return matrices, False

    def _across(self, buffer: Buffer) -> Buffer:
        if buffer.name not in self._crossed:
            order = across(len(buffer.sizes))
            sizes = tuple(buffer.sizes[d] for d in order)
            self._crossed[buffer.name] = self._seen(buffer, sizes, aten.permute.default, order)
        return self._crossed[buffer.name]

    def shaped(self, value: Value) -> Buffer:
        """A buffer with the very shape of a value."""
        buffer = self.buffer(value)
        sizes = sizes_of(value.shape)
        self.used[buffer.name] = None
        return buffer if buffer.sizes == sizes else self._seen(buffer, sizes, aten.reshape.default, sizes)

    def _seen(self, buffer: Buffer, sizes: tuple[Size, ...], target: Any, how: Sequence[int | Size]) -> Buffer:
        """The memory of a buffer in another shape."""
        seen = Buffer(self._new_name(), sizes, buffer.dtype)
        self.steps.append(Extern((seen,), target, (Read(buffer.name), [*how])))
        self.used[seen.name] = None
        return seen


def _most_repeated(element: Element) -> Value | None:
    """The value whose recomputation costs most, where memory is cheaper: a stencil's gradient is one."""
    costs: dict[Value, int] = {}
    for value, elements in _by_value(element).items():
        if repetitions := _repetitions(elements):
            costs[value] = repetitions * cost(elements[0].expression)
    value = max(costs, key=lambda value: costs[value], default=None)
    return value if value is not None and costs[value] > WORTH_MEMORY else None


def _by_value(element: Element) -> dict[Value, list[Element]]:
    """The elements that one is made of, directly or not, in the order in which they were worked out."""
    found: dict[Value, list[Element]] = {}
    seen: set[Element] = set()

    def look(element: Element) -> None:
        for part in element.parts:
            if part not in seen:
                seen.add(part)
                look(part)
                found.setdefault(part.value, []).append(part)

    look(element)
    return found


def _repetitions(elements: Sequence[Element]) -> int:
    """How often a value that is read at some positions is computed for each of its elements, beyond the first time."""
    if sum([element.times for element in elements]) <= 2:
        return 0
    # What is only read at some places of a dimension, as stacked tensors are, is computed once at each.
    by_place: dict[Any, int] = {}
    for element in elements:
        place = tuple([None if at.terms else at.constant for each in element.positions for at in each])
        by_place[place] = by_place.get(place, 0) + element.times
    return sum(count - 1 for count in by_place.values() if count > 2)


def _along_axes(operand: Value, reduced: Collection[int]) -> tuple[list[Axis], list[Axis], Positions]:
    """Axes along the digits of an operand, those that are reduced apart, and the positions that they are."""
    outer: list[Axis] = []
    inner: list[Axis] = []
    positions: list[tuple[Position, ...]] = []
    for d, digits in enumerate(operand.digits):
        along: list[Position] = []
        for digit in digits:
            if is_one(digit):
                along.append(ORIGIN)
                continue
            axis = Axis(f"i{len(outer) + len(inner)}", size_of(digit))
            (inner if d in reduced else outer).append(axis)
            along.append(Position.of({axis.name: 1}, 0))
        positions.append(tuple(along))
    return outer, inner, tuple(positions)


@dataclass(frozen=True)
class Lowered:
    """The two programs of a trace. Buffers named alike are the same tensor."""

    forward: Program  # inputs → outputs, then what is saved
    backward: Program | None  # inputs, saved, gradients of outputs → gradients of inputs


def lower(trace: Trace) -> Lowered:
    """The programs of a trace; a forward that saves nothing is the same without a backward."""
    inputs = _inputs(trace)
    forward = Lowering(inputs, "f")
    outputs = [forward.buffer(value) for value in trace.outputs]
    _check(forward, trace.checks)
    if not any(cotangent is not None for cotangent in trace.cotangents):
        return Lowered(_program(forward, inputs.values(), outputs), None)
    cotangents = {value: _buffer(value) for value in trace.cotangents if value is not None}
    saved = {value: buffer for value, buffer in forward.buffers.items() if _is_kept(value)}
    backward = Lowering({**inputs, **saved, **cotangents}, "g")
    gradients = [backward.buffer(value) for value in trace.gradients if value is not None]
    _check(backward, trace.checks_of_gradient)
    names = {buffer.name for buffer in gradients}
    read = [buffer for buffer in saved.values() if buffer.name in backward.used or buffer.name in names]
    kept = list(dict.fromkeys(read))  # equal values are in one
    return Lowered(
        _program(forward, inputs.values(), [*outputs, *kept]),
        _program(backward, [*inputs.values(), *kept, *cotangents.values()], gradients),
    )


def lower_draws(trace: Trace) -> Program | None:
    """Inputs → random numbers."""
    if not trace.drawn:
        return None
    inputs = tuple([_buffer(value) for value in (*trace.inputs, *trace.constants)])
    return Program(inputs, (), trace.draws, tuple([value.name for value in trace.drawn]))


def lower_at_once(trace: Trace) -> Program | None:
    """Inputs → outputs, then gradients of inputs for a loss whose own gradient is 1, of which others are multiples.

    Not where gradients are of low precision: rounded before they are multiplied, small ones would be lost.
    """
    learnt = [value for value in trace.cotangents if value is not None]
    gradients = [value for value in trace.gradients if value is not None]
    if len(learnt) != 1 or not all(map(is_one, learnt[0].shape)):
        return None
    if not gradients or any(value.dtype in WIDE for value in (*learnt, *gradients)):
        return None
    inputs = _inputs(trace)
    lowering = Lowering(inputs, "f", learnt)
    results = [lowering.buffer(value) for value in (*trace.outputs, *gradients)]
    _check(lowering, [*trace.checks, *trace.checks_of_gradient])
    return _program(lowering, inputs.values(), results)


def _check(lowering: Lowering, checks: Iterable[ExternalCall]) -> None:
    for call in checks:
        lowering.call(call)


def _inputs(trace: Trace) -> dict[Value, Buffer]:
    return {value: _buffer(value) for value in (*trace.inputs, *trace.drawn, *trace.constants)}


def _is_kept(value: Value) -> bool:
    """Whether backward reads the forward's result rather than computing it again."""
    if isinstance(value, External):
        return value.call.target not in ALIASES
    return isinstance(value, Reduction)


def _buffer(value: Input) -> Buffer:
    return Buffer(value.name, sizes_of(value.shape), value.dtype)


def shapes_of(values: Iterable[Value]) -> list[tuple[Size, ...]]:
    return [sizes_of(value.shape) for value in values]


def _program(lowering: Lowering, inputs: Iterable[Buffer], outputs: Sequence[Buffer]) -> Program:
    names = tuple(buffer.name for buffer in outputs)
    return Program(tuple(inputs), tuple(lowering.parameters), tuple(lowering.steps), names)
