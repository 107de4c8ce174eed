"""Runs the Triton kernels in Triton's interpreter, on CPU tensors, under a sanitizer."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("these tests need the interpreter: TRITON_INTERPRET=1 pytest tests/triton/interpreted")

import repairs
import sanitizer
import torch

repairs.install()
sanitizer.install()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
