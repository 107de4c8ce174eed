"""What runs on this machine, and for what does not, why."""

from __future__ import annotations

import sys
from typing import Any

import torch

from . import choice, loading


def backend_report() -> dict[str, Any]:
    """Which backend runs on this machine and why the others do not.

    Returns:
        A dict with ``backends`` (name to ``{"runs": bool, "device": str, "reason": str | None}``),
        ``automatic`` (device type to the backend chosen for it), ``cpu_capability`` (the instruction set of
        the C++ kernels, or None), ``versions`` and ``build`` (what the build recorded).

    Example:
        >>> import fused_losses
        >>> fused_losses.backend_report()["backends"]["reference"]["runs"]
        True
    """
    here = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "backends": {name: _describe(name) for name in choice.BACKENDS},
        "automatic": {device: _automatic(device) for device in here},
        "cpu_capability": cpu_capability(),
        "versions": _versions(),
        "build": loading.build_log(),
    }


def cpu_capability() -> str | None:
    """The instruction set the C++ kernels use (default, avx2 or avx512), or None where they are not loaded."""
    if loading.unavailable_reason("_C_cpu") is not None:
        return None
    return torch.ops.fused_losses.cpu_capability()


def _describe(backend: str) -> dict[str, Any]:
    device = {"reference": "any", "cpp": "cpu", "cuda": "cuda", "triton": "cuda"}[backend]
    if backend == "triton" and choice.unavailable_reason(backend, "cpu", torch.float32) is None:
        device = "cpu (interpreted)"
    reason = choice.unavailable_reason(backend, device.split()[0], torch.float32)
    if reason is None and device == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    return {"runs": reason is None, "device": device, "reason": reason}


def _automatic(device_type: str) -> str:
    return choice.resolve(device_type, torch.float32, None)


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "fused_losses": installed("fused-losses"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "python": sys.version.split()[0],
    }
