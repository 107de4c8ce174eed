"""Registers the Triton launchers as operators in the namespace ``fused_losses_triton``, when first asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from . import fake

FAMILIES = ("pointwise", "softmax", "linear", "divergence")
_library: torch.library.Library | None = None


def interpreting() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable_reason(device_type: str) -> str | None:
    """Why Triton cannot run on a device, with the way out, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if device_type == "cpu" and not interpreting():
        return "it runs on cuda tensors; TRITON_INTERPRET=1, set before Python starts, interprets it on the CPU"
    if device_type not in ("cpu", "cuda"):
        return f"it runs on cuda tensors, and these are on {device_type}"
    return None


def head_statistics() -> Any:
    """The one launcher that is no operator: other operators call it."""
    return _module("head").head_statistics


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__.rsplit('.', 2)[0]}.triton_kernels.{name}")


def register() -> None:
    """Defines the operators; their schemas are those of the shape functions."""
    global _library
    if _library is not None:
        return
    families = [_module(name) for name in FAMILIES]
    library = torch.library.Library("fused_losses_triton", "FRAGMENT")
    for name in fake.OPERATORS:
        shapes = getattr(fake, name)
        launcher = next(getattr(family, name) for family in families if hasattr(family, name))
        mutated = fake.MUTATED.get(name, ("logits",)) if name.endswith("_") else ()
        library.define(name + torch.library.infer_schema(shapes, mutates_args=mutated))
        library.impl(name, launcher, "CPU" if interpreting() else "CUDA")
        torch.library.register_fake(f"fused_losses_triton::{name}", shapes, lib=library)
    _library = library
