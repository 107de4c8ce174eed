"""What is known of the signs of values: a softmax takes exponentials of numbers that are at most 0."""

from __future__ import annotations

from .extents import is_one
from .ir import Combine
from .values import Map, Reduction, Value, View


def is_nonpositive(x: Value) -> bool:
    """Whether no element is above 0, NaN aside: a difference from the maximum, or the logarithm of a softmax."""
    if isinstance(x, View):
        return is_nonpositive(x.operand)
    if isinstance(x, Map) and x.op == "cast":
        return is_nonpositive(x.operands[0])
    return _shifted_along(x) is not None or _is_log_softmax(x)


def _shifted_along(x: Value) -> tuple[int, ...] | None:
    """The dimensions along which a value is something minus its maximum."""
    if not (isinstance(x, Map) and x.op == "sub"):
        return None
    whole, largest = x.operands
    reduction = _in_place(largest, "max")
    return reduction.dimensions if reduction is not None and reduction.operand is whole else None


def _is_log_softmax(x: Value) -> bool:
    """Whether a value is minus the logarithm of a sum of exponentials, of which one is 1."""
    if not (isinstance(x, Map) and x.op == "sub"):
        return False
    shifted, logarithm = x.operands
    along = _shifted_along(shifted)
    if along is None or not (isinstance(logarithm, Map) and logarithm.op == "log"):
        return False
    total = _in_place(logarithm.operands[0], "sum")
    if total is None or total.dimensions != along or not isinstance(total.operand, Map):
        return False
    return total.operand.op == "exp_nonpositive" and total.operand.operands[0] is shifted


def _in_place(x: Value, combine: Combine) -> Reduction | None:
    """The reduction that a value is, if it stands where its operand does, with dimensions of size 1."""
    reduction = x.operand if isinstance(x, View) else None
    if not isinstance(reduction, Reduction) or reduction.combine != combine or x.ndim != reduction.operand.ndim:
        return None
    return reduction if all(is_one(x.shape[d]) for d in reduction.dimensions) else None
