"""What importing the package costs."""

from __future__ import annotations

import statistics
import subprocess
import sys


def import_overhead(rounds: int = 7) -> float:
    """The median seconds that importing fused_losses takes after torch, in fresh processes."""
    code = "import time, torch; t = time.perf_counter(); import fused_losses; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs)
