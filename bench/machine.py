"""The machine that is measured, and where its results go."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": f"{torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
        "python": f"Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The processor's own name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def results_folder(here: dict[str, Any]) -> Path:
    return Path("bench/results") / f"{here['name']}-{here['date']}".replace(" ", "-")
