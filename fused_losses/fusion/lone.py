"""Sums of which one term alone is not 0, as that term: what the gradient of a lookup adds up along the classes.

Such terms depend on the place along the summed axis only by whether it is a computed one. That 0 times infinity is NaN
is not looked at, as torch's own kernels for lookups do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .ir import Expression, Index, Size

if TYPE_CHECKING:
    from .lowering import Lowering

Folded = Mapping[int, Expression | None]  # by the node's id; None where it depends on the place in another way


def lone_term(lowering: Lowering, term: Expression, axis: str, size: Size) -> Expression | None:
    """The sum of a term along an axis of some size, if it is the term at one computed place."""
    elsewhere = _folded(lowering, term, axis, size, is_there=False)
    if elsewhere is None or elsewhere.op != "constant" or elsewhere["value"] != 0:
        return None
    return _folded(lowering, term, axis, size, is_there=True)


def _folded(lowering: Lowering, term: Expression, axis: str, size: Size, is_there: bool) -> Expression | None:
    """A term where the place along the axis is the computed one, or is not."""
    folded: dict[int, Expression | None] = {}
    for node in term.nodes:
        if _is_comparison(node, axis, size, folded):
            folded[id(node)] = lowering.number(is_there, node.dtype)
        else:
            folded[id(node)] = _of_node(lowering, node, axis, folded)
    return folded[id(term)]


def _is_comparison(node: Expression, axis: str, size: Size, folded: Folded) -> bool:
    """Whether a node compares the place along the axis with one that is computed, and lies on it."""
    if node.op != "eq":
        return False
    a, b = node.arguments
    place, computed = (a, b) if a.op == "index" else (b, a)
    if place.op != "index" or computed.op != "checked" or folded[id(computed)] is not computed:
        return False
    return place["value"] == Index(((axis, 1),)) and computed["size"] == size


def _of_node(lowering: Lowering, node: Expression, axis: str, folded: Folded) -> Expression | None:
    if node.op == "load":
        return node if all(_is_elsewhere(index, axis, folded) for index in node["index"]) else None
    if node.op == "index":
        return node if _is_elsewhere(node["value"], axis, folded) else None
    arguments = [argument for old in node.arguments if (argument := folded[id(old)]) is not None]
    if len(arguments) < len(node.arguments):
        return None
    if all(new is old for new, old in zip(arguments, node.arguments)):
        return node
    return _simplified(lowering, node, arguments)


def _is_elsewhere(index: Index | Expression, axis: str, folded: Folded) -> bool:
    """Whether an index does not depend on the place along an axis."""
    if isinstance(index, Expression):
        return folded[id(index)] is index
    return all(name != axis for name, _ in index.terms)


def _simplified(lowering: Lowering, node: Expression, arguments: list[Expression]) -> Expression:
    """An operation some of whose arguments have become constants."""
    zeros = [argument.op == "constant" and argument["value"] == 0 for argument in arguments]
    if node.op == "where":
        return lowering.where(*arguments)
    if node.op == "cast":
        return lowering.cast(arguments[0], node.dtype)
    if node.op == "add" and any(zeros):
        return arguments[zeros.index(True) - 1]
    if node.op == "sub" and zeros[1]:
        return arguments[0]
    if (node.op == "neg" and zeros[0]) or (node.op == "mul" and any(zeros)) or (node.op == "div" and zeros[0]):
        return lowering.number(0, node.dtype)
    return lowering.make(node.op, node.dtype, *arguments, **dict(node.attributes))
