"""Choices of 0 outside of a tensor that its guarded loads make anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..ir import ZERO, Buffer, Expression, Extern, Program, Size

Sizes = Mapping[str, Buffer]


def without_needless_choices(program: Program) -> Program:
    """The program with where(inside, x, 0) as x, where x is sums of loads that are 0 outside."""
    done: dict[Expression, Expression] = {}  # across stages, which share nodes
    buffers = program.buffers
    for step in program.steps:
        for node in () if isinstance(step, Extern) else step.expression.nodes:
            if node not in done:
                done[node] = done[node.arguments[1]] if _is_needless(node, buffers) else node.rebuilt(done)
    steps = (s if isinstance(s, Extern) else replace(s, expression=done[s.expression]) for s in program.steps)
    return replace(program, steps=tuple(steps))


def _is_needless(node: Expression, buffers: Sizes) -> bool:
    if node.op != "where":
        return False
    condition, value, other = node.arguments
    return value.dtype == node.dtype and _is_number(other, 0) and _vanishes(value, condition, buffers)


def _vanishes(value: Expression, condition: Expression, buffers: Sizes) -> bool:
    """Whether a value is 0 wherever a condition does not hold."""
    if value.op == "load":
        return value["guarded"] and _is_guard(condition, value, buffers)
    if value.op == "where":
        holds, kept, other = value.arguments
        return _is_number(other, 0) and (holds is condition or _vanishes(kept, condition, buffers))
    if value.op in ("add", "cast"):
        return all(_vanishes(argument, condition, buffers) for argument in value.arguments)
    return False


def _is_guard(condition: Expression, load: Expression, buffers: Sizes) -> bool:
    """Whether a condition says no more than that indices of a load lie inside."""
    if condition.op == "logical_and":
        return all(_is_guard(argument, load, buffers) for argument in condition.arguments)
    if condition.op not in ("ge", "lt") or condition.arguments[0].op != "index":
        return False
    index, bound = condition.arguments
    sizes = [size for at, size in zip(load["index"], buffers[load["buffer"]].sizes) if at == index["value"]]
    return any(_is_size(bound, ZERO if condition.op == "ge" else size) for size in sizes)


def _is_size(node: Expression, size: Size) -> bool:
    return (node.op == "size" and node["value"] == size) or (size.op == "const" and _is_number(node, size.value))


def _is_number(node: Expression, number: int) -> bool:
    return node.op == "constant" and node["value"] == number
