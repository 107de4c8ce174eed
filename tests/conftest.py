"""Settings of the whole suite."""

import os

import pytest
import torch

from fused_losses.backends import choice


def pytest_configure(config):
    # Each worker of a parallel run has one core.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, so that an element nobody wrote shows; compiled graphs start clean."""
    torch.compiler.reset()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", AVAILABLE)


# The extension must be there: a suite that quietly tested the fallback alone would prove nothing.
AVAILABLE = [
    name
    for name in ("cpp", "cuda", "triton")
    if name == "cpp"
    or (choice.unavailable_reason(name, "cuda", torch.float32) is None and torch.cuda.is_available())
]
