"""Loads the compiled extensions once, at import, and remembers why one is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from . import fake

PACKAGE = Path(__file__).resolve().parent.parent
# _C_cuda adds CUDA implementations to the operators that _C_cpu defines, so the order matters.
EXTENSIONS = ("_C_cpu", "_C_cuda")

_unavailable: dict[str, str | None] = {}


def unavailable_reason(extension: str) -> str | None:
    """Why an extension does not run here, or None if it is loaded."""
    return _unavailable[extension]


def build_log() -> dict[str, Any]:
    """What the build recorded about each extension; empty where nothing was ever built."""
    path = PACKAGE / "_build_log.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _load(extension: str) -> str | None:
    libraries = sorted(PACKAGE.glob(f"{extension}*.so"))
    if not libraries:
        return _not_built_reason(extension)
    if extension == "_C_cuda":
        if _unavailable["_C_cpu"] is not None:
            return "it needs the operators that _C_cpu defines, and _C_cpu is not loaded"
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) is built without CUDA"
    try:
        torch.ops.load_library(str(libraries[-1]))
    except OSError as error:
        return f"loading {libraries[-1].name} failed: {error}"
    return None


def _not_built_reason(extension: str) -> str:
    recorded = build_log().get("extensions", {}).get(extension, {}).get("reason")
    nothing = "no build was attempted; run `pip install --no-build-isolation .` in an environment that has torch"
    return f"not built: {recorded or nothing}"


def empty_cache() -> None:
    """Frees the memory that is kept to make the next large CPU gradient in.

    Under memory pressure the system takes it back by itself; ``FUSED_LOSSES_CPU_CACHE=0`` keeps none.

    Example:
        >>> import fused_losses
        >>> fused_losses.empty_cache()
    """
    if _unavailable["_C_cpu"] is None:
        torch.ops.fused_losses.empty_cache()


def load() -> None:
    """Loads what is built and registers the shape functions that torch.compile needs."""
    for extension in EXTENSIONS:
        _unavailable[extension] = _load(extension)
    if _unavailable["_C_cpu"] is None:
        for name in (*fake.OPERATORS, *fake.EXTENSION_OPERATORS):
            torch.library.register_fake(f"fused_losses::{name}", getattr(fake, name))
