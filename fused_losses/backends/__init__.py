"""Backends: which exist, what runs here and why not, and how one is chosen."""

from .choice import BACKENDS, use_backend
from .loading import load
from .report import backend_report

__all__ = ["BACKENDS", "backend_report", "use_backend"]

load()
