"""Settings of the whole suite, and the backends that it loops over."""

import os
import sys

import pytest
import torch

from fused_losses import empty_cache
from fused_losses.backends import choice

# Where each backend's tensors live.
DEVICES = {"reference": "cpu", "cpp": "cpu", "cuda": "cuda", "triton": "cuda"}


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), help="only this device's backends (default: every device)")


def pytest_configure(config):
    # Each worker of a parallel run has one core.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """``backend`` is every backend, ``kernels`` those with kernels of their own, ``each_device`` every device."""
    if "each_device" in metafunc.fixturenames:
        metafunc.parametrize("each_device", devices(metafunc.config.getoption("device")))
    for name, first in (("backend", 0), ("kernels", 1)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, backends(metafunc.config.getoption("device"))[first:])


def backends(device):
    """The backends to test. Kernels for a device that is here must run: a suite that skips them proves nothing."""
    here = devices(device)
    if "cuda" in here:
        gpu = [b for b in ("cuda", "triton") if choice.unavailable_reason(b, "cuda", torch.float32) is None]
        assert gpu, "no backend with kernels runs on this GPU: see python -m fused_losses"
    else:
        gpu = []
    return ["reference"] + (["cpp"] if "cpu" in here else []) + gpu


def devices(device):
    """The devices to test what needs no backend by name."""
    return [device] if device else ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture
def device(request):
    """The device of the test's backend."""
    names = [name for name in ("backend", "kernels") if name in request.fixturenames]
    return DEVICES[request.getfixturevalue(names[0])]


@pytest.fixture(autouse=True)
def seeded():
    """A process draws its own seed, and the error of random tensors would then pass its budget now and then."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, so that an element nobody wrote shows; compiled graphs start clean."""
    torch.compiler.reset()
    empty_cache()  # what another test left in kept memory would pass for written
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def living_gpu():
    """Ends a process whose GPU met an assertion: every later test would fail in it, and faster than others run."""
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the GPU can be used no more: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)  # a parallel run says which test it was, and goes on in a new process


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps precision and processes for the life of a process; a test brings its own."""
    from accelerate.state import AcceleratorState, GradientState

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()
