"""Results whose last dimension chooses between a few tensors, as gradients of ``x.unbind(-1)`` do: place by place.

A program would compute every tensor at each of the places; so it computes each once, and stores them side by side.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..expressions import COMPARISONS
from ..ir import WHOLE, ZERO, Expression, Extern, Index, Program, Size, Stage
from ..lowering import Lowering
from ..piecewise import MOST_PLACES, chooses


def written_out(program: Program) -> Program:
    steps = (step if isinstance(step, Extern) else _written_out(step) for step in program.steps)
    return replace(program, steps=tuple(steps))


def _written_out(stage: Stage) -> Stage:
    count = _places(stage)
    if not count:
        return stage
    *axes, last = stage.axes
    lowering = Lowering({}, "")
    values = [_at(lowering, stage.expression, last.name, place) for place in range(count)]
    beside = Expression("beside", stage.expression.dtype, tuple(values))
    return replace(stage, axes=tuple(axes), expression=beside)


def _places(stage: Stage) -> int:
    """How many places to write out; 0 where the stage stays as it is."""
    expression = stage.expression
    if stage.combine is not None or not stage.axes or expression.op in WHOLE:
        return 0
    name, extent = stage.axes[-1]
    is_few = extent.op == "const" and 1 < extent.value <= MOST_PLACES
    return extent.value if is_few and chooses(expression, name) else 0


def _at(lowering: Lowering, expression: Expression, axis: str, place: int) -> Expression:
    """An expression at one place along an axis, without the choices that are known there."""
    done: dict[Expression, Expression] = {}
    for node in expression.nodes:
        done[node] = _made(lowering, node.rebuilt(done, lambda index: _index_at(index, axis, place)))
    return done[expression]


def _made(lowering: Lowering, node: Expression) -> Expression:
    """A node as the one that equals it, or what it comes to."""
    if node.op in COMPARISONS:
        return lowering.compare(node.op, *node.arguments)
    if node.op == "where":
        return lowering.where(*node.arguments)
    if node.op == "logical_and" and any(argument.op == "constant" for argument in node.arguments):
        known, other = sorted(node.arguments, key=lambda argument: argument.op != "constant")
        return other if known["value"] else known
    if node.op == "index" and _is_known(node["value"]):
        return lowering.number(node["value"].offset.value, torch.int64)
    return lowering.make(node.op, node.dtype, *node.arguments, **dict(node.attributes))


def _is_known(index: Index) -> bool:
    return not index.terms and index.offset.op == "const" and index.divisor == 1


def _index_at(index: Index, axis: str, place: int) -> Index:
    offset = index.offset
    for name, factor in index.terms:
        if name == axis:
            offset = _sum(offset, _times(factor, place))
    return index._replace(terms=tuple(term for term in index.terms if term[0] != axis), offset=offset)


def _times(factor: int | Size, place: int) -> Size:
    if isinstance(factor, int):
        return Size("const", factor * place)
    return ZERO if place == 0 else Size("mul", arguments=(factor, Size("const", place)))


def _sum(a: Size, b: Size) -> Size:
    if a.op == b.op == "const":
        return Size("const", a.value + b.value)
    return a if b == ZERO else b if a == ZERO else Size("add", arguments=(a, b))
