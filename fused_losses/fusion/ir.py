"""What a traced loss is made of between tracing and source: loops over named axes, each with one expression.

A :class:`Program` is a list of steps. A :class:`Stage` computes one buffer: for every point of ``axes`` it combines
``expression`` over every point of ``reduced`` (or just stores it where nothing is reduced). Elementwise operations and
views never appear as steps: they are inlined into the expressions of the stages that read them, so a stage reads its
inputs once. An :class:`Extern` is an operator that torch runs between stages (a matrix product, a sort).

Sizes are sympy-free integer expressions over the sizes of the program's inputs, so one program serves every shape of a
pattern of ranks, dtypes and equal sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch

# What low-precision floats are computed in, and kept in where no tensor holds them.
WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
# Operators that look at memory in another shape.
ALIASES = {getattr(torch.ops.aten, name).default for name in ("reshape", "permute", "view_as_real", "view_as_complex")}
# Operations that are what a stage sums or stores, and part of nothing else.
WHOLE = ("placed", "cumulated", "beside")
T = TypeVar("T")
Combine = Literal["sum", "prod", "max", "min", "any", "all", "argmax", "argmin"]


class Size(NamedTuple):
    """An integer made of input sizes: ``op`` is "const", "size" (of a dimension of an input), or an operation.

    "const" has ``value``; "size" has ``value`` = (input name, dimension); "add", "sub", "mul", "floordiv", "max" and
    "min" have ``arguments``. A trace has "count", too, whose ``value`` is a mask; its program loads what that comes to.
    """

    op: str
    value: Any = None
    arguments: tuple[Size, ...] = ()


ZERO, ONE, TWO = Size("const", 0), Size("const", 1), Size("const", 2)


class Axis(NamedTuple):
    """A loop: its name is unique within its stage, its extent known at run time."""

    name: str
    extent: Size


class Index(NamedTuple):
    """Where along one dimension of a buffer a load looks: offset + the sum of coefficient times axis, over a divisor.

    Where it does not divide, it lies outside of every size.
    """

    # (axis name, coefficient): 1 or -1 but for strided slices and flat tensors, which split axes read at i * C + j.
    terms: tuple[tuple[str, int | Size], ...] = ()
    offset: Size = ZERO
    divisor: int = 1


@dataclass(frozen=True, eq=False)  # a graph: compared by identity, since nodes are shared
class Expression:
    """A node of an elementwise expression; shared nodes are the same object and are computed once.

    ``op`` and what it takes:
        "load": ``attributes`` buffer (str), index (tuple[Index | Expression, ...], one for each dimension of the
            buffer; an int64 expression where another tensor says which element), guarded (bool): whether the index
            may lie outside, where the load must yield 0 without touching memory.
        "constant": value (number).    "parameter": name, a number given at run time (a hyper-parameter).
        "size": value (Size), a size as a number.    "index": value (Index), an int64 position along axes.
        "cast": one argument, to ``dtype``.    "rounded": one that is wider, as ``dtype`` would hold it.
        "checked": one int64 argument and size (Size): the argument where 0 <= it < size; elsewhere 0, and the call
            raises IndexError once it has run.
        "placed": a value and an int64 argument for each of ``index`` (tuple[Index, ...], an axis each): the value where
            the axes are at those places, 0 elsewhere. What a sum is of, and nothing else: such a sum does not loop over
            the axes but adds each value at its place.
        "cumulated": one argument and ``index`` (tuple of one Index, an axis): the sum of it over the points of the axis
            up to here. What a stage stores, and nothing else.
        "beside": arguments that stand along a last dimension of the buffer that is no axis, as the two numbers of a
            complex one do. What a stage stores, and nothing else.
        "exp_nonpositive": one argument that is at most 0, whose exponential it is.
        anything else: an elementwise operation named as torch names it ("add", "exp", "where", "lt", ...).
    ``dtype`` is what torch would give. Low-precision floats are computed in fp32 and rounded only where
    they are stored, and where the loss itself casts.
    """

    op: str
    dtype: torch.dtype
    arguments: tuple[Expression, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        for key, value in self.attributes:
            if key == name:
                return value
        raise KeyError(name)

    @property
    def children(self) -> tuple[Expression, ...]:
        """What it takes; computed indices are among what a load takes."""
        if self.op != "load":
            return self.arguments
        return tuple(index for index in self["index"] if isinstance(index, Expression))

    def rebuilt(self, done: Mapping[Expression, Expression], at: Callable[[Index], Index] | None = None) -> Expression:
        """The node with others for what it takes, and for where it is; itself where they are the same."""

        def new(value: Any) -> Any:
            if isinstance(value, Expression):
                return done[value]
            if isinstance(value, Index):
                return at(value) if at else value
            return tuple(map(new, value)) if type(value) is tuple else value

        arguments = tuple([done[argument] for argument in self.arguments])
        attributes = tuple([(name, new(value)) for name, value in self.attributes])
        is_same = arguments == self.arguments and attributes == self.attributes
        return self if is_same else Expression(self.op, self.dtype, arguments, attributes)

    @cached_property
    def nodes(self) -> tuple[Expression, ...]:
        """Every node once, what it takes before the node itself."""
        found: dict[Expression, None] = {}
        stack: list[tuple[Expression, bool]] = [(self, False)]
        while stack:
            node, is_ready = stack.pop()
            if is_ready:
                found[node] = None
            elif node not in found:
                stack.append((node, True))
                stack += [(child, False) for child in reversed(node.children)]
        return tuple(found)


def spread(expression: Expression) -> Expression:
    """What is placed as a choice at every point of its axes; any other expression as it is."""
    if expression.op != "placed":
        return expression
    value, *places = expression.arguments
    zero = Expression("constant", value.dtype, (), (("value", 0),))
    for index, place in zip(expression["index"], places):
        position = Expression("index", torch.int64, (), (("value", index),))
        is_there = Expression("eq", torch.bool, (position, place))
        value = Expression("where", value.dtype, (is_there, value, zero))
    return value


@dataclass(frozen=True)
class Buffer:
    """A tensor of a program: its dimensions' sizes and dtype."""

    name: str
    sizes: tuple[Size, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Stage:
    """One computed buffer.

    Its dimensions are ``axes`` in order (those of size 1 have one too), then that of ``values`` if they are several.
    Stages over the same domain name its axes alike and share the nodes of their expressions.
    """

    buffer: Buffer
    axes: tuple[Axis, ...]
    expression: Expression
    reduced: tuple[Axis, ...] = ()
    combine: Combine | None = None  # None exactly where nothing is reduced

    @cached_property
    def places(self) -> dict[str, Expression]:
        """Axes that are not looped over, as the expression says where along them it belongs."""
        node = self.expression
        if node.op != "placed":
            return {}
        return {axis: place for index, place in zip(node["index"], node.arguments[1:]) for axis, _ in index.terms}

    @cached_property
    def cumulated(self) -> str | None:
        """The axis that the stage has to run along in order, if any: it adds up what came before."""
        node = self.expression
        return node["index"][0].terms[0][0] if node.op == "cumulated" else None

    @property
    def values(self) -> tuple[Expression, ...]:
        """What it stores for each point, one after the other."""
        return self.expression.arguments if self.expression.op == "beside" else (self.expression,)

    @cached_property
    def domain(self) -> tuple[Axis, ...]:
        """Every axis that it loops over."""
        return tuple(axis for axis in self.mentioned if axis.name not in self.places)

    @cached_property
    def mentioned(self) -> tuple[Axis, ...]:
        """Every axis that is more than one point."""
        return tuple(axis for axis in self.axes + self.reduced if axis.extent != ONE)

    @cached_property
    def loads(self) -> tuple[Expression, ...]:
        return tuple(node for node in self.expression.nodes if node.op == "load")

    @cached_property
    def loaded_along(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """For each load, the buffer and the axes that its indices run along."""
        return _once((load["buffer"], tuple(_axes_of(load["index"]))) for load in self.loads)

    @cached_property
    def loaded_at(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """For each load, the buffer and the axes that its indices simply are."""
        return _once((load["buffer"], tuple(map(plain_axis, load["index"]))) for load in self.loads)

    @cached_property
    def looks_along(self) -> tuple[frozenset[str], ...]:
        """The axes that each load looks along, each position, and each index that may lie outside."""
        found: list[frozenset[str]] = []
        for node in self.expression.nodes:
            if node.op == "index":
                found.append(names_in((node["value"],)))
            elif node.op == "load":
                found.append(names_in(node["index"]))
                found += [names_in((index,)) for index in node["index"] if node["guarded"]]
        return _once(found)

    @cached_property
    def reads(self) -> frozenset[str]:
        """The names of the buffers that it loads from."""
        return frozenset(load["buffer"] for load in self.loads)


def plain_axis(index: Index | Expression) -> str | None:
    """The axis that an index simply is, if so."""
    if isinstance(index, Index) and index.terms and index == Index(((index.terms[0][0], 1),)):
        return index.terms[0][0]
    return None


def names_in(indices: Iterable[Index | Expression]) -> frozenset[str]:
    return frozenset(_axes_of(indices))


def _axes_of(indices: Iterable[Index | Expression]) -> Iterator[str]:
    return (name for index in indices if isinstance(index, Index) for name, _ in index.terms)


def _once(items: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))


@dataclass(frozen=True)
class Extern:
    """An operator of torch between stages: ``target(*arguments, **keywords)``, buffers named by :class:`Read`."""

    buffers: tuple[Buffer, ...]  # what it returns, in order
    target: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """A buffer among the arguments of an :class:`Extern`; a :class:`Size` there is its number."""

    name: str


@dataclass(frozen=True)
class Program:
    """Steps in an order in which each reads only what is there; see the module's docstring."""

    inputs: tuple[Buffer, ...]
    parameters: tuple[str, ...]  # numbers given at run time
    steps: tuple[Stage | Extern, ...]
    outputs: tuple[str, ...]  # names of buffers, inputs among them allowed

    @property
    def buffers(self) -> dict[str, Buffer]:
        """Every buffer by its name, inputs first."""
        made = [b for step in self.steps for b in (step.buffers if isinstance(step, Extern) else (step.buffer,))]
        return {buffer.name: buffer for buffer in (*self.inputs, *made)}
