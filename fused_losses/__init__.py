"""Losses for PyTorch, fused: drop-in ``nn.Module`` classes on C++, CUDA, Triton or plain torch."""

from __future__ import annotations

import importlib as _importlib
import importlib.util as _util
import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .fusion import fuse as fuse
    from .integrations.replacement import replace_losses as replace_losses
    from .integrations.transformers import fuse_lm_head as fuse_lm_head
    from .losses.preference import (
        CPOLoss as CPOLoss,
        DPOLoss as DPOLoss,
        GRPOLoss as GRPOLoss,
        KTOLoss as KTOLoss,
        LinearCPOLoss as LinearCPOLoss,
        LinearDPOLoss as LinearDPOLoss,
        LinearGRPOLoss as LinearGRPOLoss,
        LinearKTOLoss as LinearKTOLoss,
        LinearORPOLoss as LinearORPOLoss,
        LinearSimPOLoss as LinearSimPOLoss,
        ORPOLoss as ORPOLoss,
        SimPOLoss as SimPOLoss,
    )


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


_PREFERENCE = ("CPOLoss", "DPOLoss", "GRPOLoss", "KTOLoss", "ORPOLoss", "SimPOLoss")
# What few need, and what it imports: the module that has it.
_ON_DEMAND = {
    "fuse": ".fusion",
    "fuse_lm_head": ".integrations.transformers",
    "replace_losses": ".integrations.replacement",
    **dict.fromkeys((name for name in __all__ if name.removeprefix("Linear") in _PREFERENCE), ".losses.preference"),
}


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        return getattr(_importlib.import_module(_ON_DEMAND[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
