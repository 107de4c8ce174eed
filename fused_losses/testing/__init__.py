"""The checks that every loss here passes, for losses of your own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..specs import Sample
from .accuracy import Comparison
from .checks import CHECKS, Fault, Loss, make_case
from .report import Report, Result

__all__ = ["CHECKS", "Report", "Sample", "check_loss"]


def check_loss(
    loss: Loss,
    reference: Loss,
    samples: Iterable[Sample | Sequence[Tensor]],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
    checks: Sequence[str] | None = None,
    raise_on_fault: bool = True,
) -> Report:
    """Checks a loss against its plain-torch reference: accuracy, gradients, layouts, compile and more.

    The error of a value or gradient against fp64 may be 1.5 times the reference's own in the same dtype, plus
    4 units in the last place (32 in fp64, whose truth is itself rounded).

    Args:
        loss: a module or function of tensors that returns a tensor; floating buffers of a module are cast to
            the dtype under test.
        reference: the same loss in plain torch, with the same arguments.
        samples: tuples of tensors to call the loss with, or :class:`Sample` for keyword arguments and names.
            Floating tensors are cast to each dtype; pass fp64 to have the most to round from.
        dtypes: the dtypes to check in.
        checks: names out of ``fused_losses.testing.CHECKS``; None runs all.
        raise_on_fault: raises at the end if a check did not hold; else only the report says so.

    Returns:
        A report; ``print(report)`` shows a table, ``report.ok`` says whether everything held.

    Raises:
        AssertionError: with the table, if a check did not hold.
        ValueError: for a check that does not exist.

    Example:
        >>> import torch
        >>> from fused_losses.testing import check_loss
        >>> def mine(x, t):
        ...     return (x - t).square().mean()
        >>> report = check_loss(mine, torch.nn.MSELoss(), [(torch.randn(4), torch.randn(4))], checks=["value"])
        >>> report.ok
        True
    """
    names = list(CHECKS) if checks is None else list(checks)
    unknown = set(names) - set(CHECKS)
    if unknown:
        raise ValueError(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    named = [
        sample if isinstance(sample, Sample) else Sample(f"sample {i}", tuple(sample))
        for i, sample in enumerate(samples)
    ]
    report = Report([_run_check(name, dtype, loss, reference, named) for name in names for dtype in dtypes])
    if raise_on_fault:
        report.raise_for_faults()
    return report


def _run_check(name: str, dtype: torch.dtype, loss: Loss, reference: Loss, samples: Sequence[Sample]) -> Result:
    result = Result(name, dtype)
    for sample in samples:
        try:
            case = make_case(loss, reference, sample.tensors, sample.extras, dtype)
            for comparison in CHECKS[name](case):
                result.add(sample.name, comparison)
        except Exception as error:
            kind = "" if isinstance(error, Fault) else f"{type(error).__name__}: "
            result.add(
                sample.name, Comparison(0.0, 0.0, f"{kind}{str(error).splitlines()[0] if str(error) else ''}")
            )
    return result
