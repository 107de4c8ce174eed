"""The checks that every loss here passes, for losses of your own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..specs import Sample
from .case import Loss, make_case
from .checks import CHECKS, OPTIONAL_CHECKS
from .costs import Cost, costs_of, described
from .memory import peak_bytes
from .report import Report, Result

__all__ = ["CHECKS", "OPTIONAL_CHECKS", "Cost", "Report", "Result", "Sample", "check_loss", "peak_bytes"]


def check_loss(
    loss: Loss,
    reference: Loss,
    samples: Iterable[Sample | Sequence[Tensor]],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
    checks: Sequence[str] | None = None,
    costs: bool = False,
    raise_on_fault: bool = True,
) -> Report:
    """Checks a loss against its plain-torch reference: accuracy, gradients, layouts, compile, costs and more.

    A value or gradient may be off from fp64 truth by 1.5 times what the reference is off in the same dtype, plus
    2 units in the last place (64 in fp64, whose truth is itself rounded); NaN and infinity must stand exactly
    where truth has them.

    Args:
        loss: a module or function of tensors that returns a tensor; floating buffers of a module are cast to
            the dtype under test.
        reference: the same loss in plain torch, with the same arguments.
        samples: tuples of tensors to call the loss with, or :class:`Sample` for keyword arguments and names.
            Floating tensors are cast to each dtype; pass fp64 to have the most to round from.
        dtypes: the dtypes to check in.
        checks: names out of ``CHECKS`` and ``OPTIONAL_CHECKS``; None runs all of ``CHECKS``.
        costs: measures what forward and backward cost on each sample in each dtype: the time, interleaved with that
            of the reference and of torch.compile of it, and the memory. Takes a second each, and what compiling
            takes; a loss that is meant for large tensors wants a large sample.
        raise_on_fault: raises at the end if a check did not hold; else only the report says so.

    Returns:
        A report; ``print(report)`` shows a table, ``report.ok`` says whether everything held, ``report.costs`` has
        what was measured.

    Raises:
        AssertionError: with the table, if a check did not hold.
        ValueError: for a check that does not exist.

    Example:
        >>> import torch
        >>> from fused_losses.testing import check_loss
        >>> def mine(x, t):
        ...     return (x - t).square().mean()
        >>> pair = torch.randn(4, 3), torch.randn(4, 3)
        >>> report = check_loss(mine, torch.nn.MSELoss(), [pair], checks=["value", "gradient", "double_backward"])
        >>> report.ok
        True
        >>> def wrong(x, t):
        ...     return (x - t.detach()).square().mean()  # forgets that the target may require grad
        >>> check_loss(wrong, torch.nn.MSELoss(), [pair], checks=["gradient"], raise_on_fault=False).ok
        False
    """
    known = {**CHECKS, **OPTIONAL_CHECKS}
    names = list(CHECKS) if checks is None else list(checks)
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    named = [
        sample if isinstance(sample, Sample) else Sample(f"sample {i}", tuple(sample))
        for i, sample in enumerate(samples)
    ]
    report = Report([_run_check(name, dtype, loss, reference, named) for name in names for dtype in dtypes])
    if costs:
        cases = [(make_case(loss, reference, sample, dtype), sample.name) for sample in named for dtype in dtypes]
        report.costs = [cost for case in cases for cost in costs_of(*case)]
    if raise_on_fault:
        report.raise_for_faults()
    return report


def _run_check(name: str, dtype: torch.dtype, loss: Loss, reference: Loss, samples: Sequence[Sample]) -> Result:
    check = CHECKS.get(name) or OPTIONAL_CHECKS[name]
    result = Result(name, dtype)
    for sample in samples:
        try:
            result.add(sample.name, check(make_case(loss, reference, sample, dtype)))
        except Exception as error:  # whatever a loss raises is a finding
            result.add_exception(sample.name, described(error), error)
    return result
