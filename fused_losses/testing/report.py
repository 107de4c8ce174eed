"""What check_loss found, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .accuracy import Comparison, fault
from .costs import OURS, Cost


@dataclass
class Result:
    """One check in one dtype over all samples: the worst comparison and every fault."""

    check: str
    dtype: torch.dtype
    worst: Comparison = field(default_factory=lambda: Comparison(0.0, 0.0))
    worst_sample: str = ""
    faults: list[str] = field(default_factory=list)
    applied: bool = False
    exception: Exception | None = None

    def add(self, sample: str, comparisons: Sequence[Comparison] | None) -> None:
        """Takes in what a check returned for a sample; None says that the check does not apply to it."""
        self.applied |= comparisons is not None
        for comparison in comparisons or ():
            if comparison.ratio >= self.worst.ratio:
                self.worst, self.worst_sample = comparison, sample
            if not comparison.ok:
                reason = comparison.message or f"error {comparison.error:.3g} > budget {comparison.budget:.3g}"
                self.faults.append(f"{sample}: {reason}")

    def add_exception(self, sample: str, message: str, exception: Exception) -> None:
        self.exception = self.exception or exception
        self.add(sample, [fault(message)])

    @property
    def verdict(self) -> str:
        """The cell of the table: ok or FAULT, and the share of the error budget that was used."""
        if not self.applied:
            return "-"
        used = f" {self.worst.ratio:.2f}" if self.worst_sample else ""
        return ("FAULT" if self.faults else "ok") + used


@dataclass
class Report:
    """Every result of a run; prints as a table of checks and dtypes, with the faults below, and one of the costs.

    Example:
        >>> import torch
        >>> from fused_losses.testing import Cost, Report
        >>> row = "sample 0", torch.float32
        >>> print(Report([], [Cost(*row, "ours", 2e-3, 1.0, 2**20), Cost(*row, "eager", 9e-3, 4.5, 2**22)]))
        cost                     median ms      times ours        peak MiB
        sample 0 in float32
          ours                           2            1.00               1
          eager                          9            4.50               4
        forward and backward: interleaved time, and what is allocated at the peak, gradients included
    """

    results: list[Result]
    costs: list[Cost] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        fails = any(cost.failure for cost in self.costs if cost.contender == OURS)
        return not fails and not any(result.faults for result in self.results)

    def raise_for_faults(self) -> None:
        """Raises AssertionError with the table if anything did not hold."""
        if not self.ok:
            causes = [result.exception for result in self.results if result.exception is not None]
            raise AssertionError(f"\n{self}") from next(iter(causes), None)

    def __str__(self) -> str:
        lines = [*(self._checks() if self.results else ()), *(self._costs() if self.costs else ())]
        return "\n".join(line.rstrip() for line in lines)

    def _checks(self) -> list[str]:
        dtypes = list(dict.fromkeys(result.dtype for result in self.results))
        lines = ["check".ljust(18) + "".join(_name(dtype).ljust(13) for dtype in dtypes)]
        for check in dict.fromkeys(result.check for result in self.results):
            cells = {result.dtype: result.verdict for result in self.results if result.check == check}
            lines.append(check.ljust(18) + "".join(cells[dtype].ljust(13) for dtype in dtypes))
        lines += ["ok n: at worst, n of the error budget was used; -: does not apply"]
        for result in self.results:
            lines += [f"{result.check} in {_name(result.dtype)}, {text}" for text in result.faults[:5]]
        return lines

    def _costs(self) -> list[str]:
        lines = ["cost".ljust(18) + "".join(name.rjust(16) for name in ("median ms", "times ours", "peak MiB"))]
        for sample, dtype in dict.fromkeys((cost.sample, cost.dtype) for cost in self.costs):
            lines.append(f"{sample} in {_name(dtype)}")
            lines += [_cost(cost) for cost in self.costs if (cost.sample, cost.dtype) == (sample, dtype)]
        return [*lines, "forward and backward: interleaved time, and what is allocated at the peak, gradients included"]


def _cost(cost: Cost) -> str:
    name = f"  {cost.contender}".ljust(18)
    if cost.failure:
        return f"{name}  does not run: {cost.failure}"
    figures = f"{cost.seconds * 1e3:.4g}", f"{cost.ratio:.2f}", f"{cost.peak / 2**20:.4g}"
    return name + "".join(figure.rjust(16) for figure in figures)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
