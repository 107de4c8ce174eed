"""What check_loss found, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .accuracy import Comparison


@dataclass
class Result:
    """One check in one dtype over all samples: the worst comparison and every fault."""

    check: str
    dtype: torch.dtype
    worst: Comparison = field(default_factory=lambda: Comparison(0.0, 0.0))
    worst_sample: str = ""
    faults: list[str] = field(default_factory=list)

    def add(self, sample: str, comparison: Comparison) -> None:
        if comparison.ratio >= self.worst.ratio:
            self.worst, self.worst_sample = comparison, sample
        if not comparison.ok:
            reason = comparison.message or f"error {comparison.error:.3g} > budget {comparison.budget:.3g}"
            self.faults.append(f"{sample}: {reason}")


@dataclass
class Report:
    """Every result of a run; prints as a table."""

    results: list[Result]

    @property
    def ok(self) -> bool:
        return not any(result.faults for result in self.results)

    def raise_for_faults(self) -> None:
        """Raises AssertionError with the table if anything did not hold."""
        if not self.ok:
            raise AssertionError(f"\n{self}")

    def __str__(self) -> str:
        lines = [f"{'check':18} {'dtype':9} {'result':7} worst error / budget"]
        for result in self.results:
            dtype = str(result.dtype).removeprefix("torch.")
            verdict = "FAULT" if result.faults else "ok"
            detail = f"{result.worst.ratio:.2f} ({result.worst_sample})" if result.worst_sample else ""
            lines.append(f"{result.check:18} {dtype:9} {verdict:7} {detail}".rstrip())
            lines += [f"    {fault}" for fault in result.faults[:5]]
        return "\n".join(lines)
