"""Compiles the Triton kernels for GPUs that are not there; cannot share a process with the interpreter."""

import os
import tempfile

import pytest

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    raise pytest.UsageError("these tests compile kernels: run them without TRITON_INTERPRET")
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
