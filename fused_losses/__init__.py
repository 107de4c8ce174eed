"""Losses for PyTorch, fused: drop-in ``nn.Module`` classes on C++, CUDA, Triton or plain torch."""

from __future__ import annotations

import importlib.util as _util
import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .fusion import fuse as fuse


def _import_source_folder(name: str) -> None:
    """Makes ``fused_losses.<name>`` importable from the folder beside this package in a source tree."""
    qualified = f"{__name__}.{name}"
    if _util.find_spec(qualified) is not None:
        return
    init = _Path(__file__).resolve().parent.parent / name / "__init__.py"
    spec = _util.spec_from_file_location(qualified, init, submodule_search_locations=[str(init.parent)])
    if not init.is_file() or spec is None or spec.loader is None:
        return
    module = _util.module_from_spec(spec)
    _sys.modules[qualified] = module
    spec.loader.exec_module(module)


_import_source_folder("triton_kernels")

from . import functional
from .backends import backend_report, empty_cache, use_backend
from .integrations.replacement import replace_losses
from .integrations.transformers import fuse_lm_head
from .losses.divergence import JSDLoss, TVDLoss
from .losses.linear import LinearCrossEntropyHead, LinearCrossEntropyLoss, LinearJSDLoss, LinearKLDivLoss
from .losses.pointwise import (
    BCELoss,
    BCEWithLogitsLoss,
    CharbonnierLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    LogCoshLoss,
    MSELoss,
    SigmoidFocalLoss,
    SmoothL1Loss,
)
from .losses.preference import (
    CPOLoss,
    DPOLoss,
    GRPOLoss,
    KTOLoss,
    LinearCPOLoss,
    LinearDPOLoss,
    LinearGRPOLoss,
    LinearKTOLoss,
    LinearORPOLoss,
    LinearSimPOLoss,
    ORPOLoss,
    SimPOLoss,
)
from .losses.softmax import CrossEntropyLoss

__version__ = "0.1.0"

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CPOLoss",
    "CharbonnierLoss",
    "CrossEntropyLoss",
    "DPOLoss",
    "GRPOLoss",
    "HuberLoss",
    "JSDLoss",
    "KLDivLoss",
    "KTOLoss",
    "L1Loss",
    "LinearCPOLoss",
    "LinearCrossEntropyHead",
    "LinearCrossEntropyLoss",
    "LinearDPOLoss",
    "LinearGRPOLoss",
    "LinearJSDLoss",
    "LinearKLDivLoss",
    "LinearKTOLoss",
    "LinearORPOLoss",
    "LinearSimPOLoss",
    "LogCoshLoss",
    "MSELoss",
    "ORPOLoss",
    "SigmoidFocalLoss",
    "SimPOLoss",
    "SmoothL1Loss",
    "TVDLoss",
    "backend_report",
    "empty_cache",
    "functional",
    "fuse",
    "fuse_lm_head",
    "replace_losses",
    "use_backend",
]


def __getattr__(name: str) -> object:
    if name == "fuse":  # with what it imports, only where somebody asks for it
        from .fusion import fuse

        return fuse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
