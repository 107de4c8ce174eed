"""Backends: which exist, what runs here and why not, and how one is chosen."""

from .choice import BACKENDS, use_backend
from .loading import empty_cache, load
from .report import backend_report

__all__ = ["BACKENDS", "backend_report", "empty_cache", "use_backend"]

load()
