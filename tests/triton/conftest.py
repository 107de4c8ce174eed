"""What tests of generated Triton kernels share."""

import pytest

from fused_losses.fusion import runtime


@pytest.fixture
def only_triton(monkeypatch):
    """CPU tensors run the kernels that are for a GPU, where numbers are not read."""
    from fused_losses.fusion.triton.runtime import InTriton  # as the folder's own settings have Triton

    monkeypatch.setattr(runtime, "reads_numbers", lambda device: False)
    monkeypatch.setattr(runtime, "compile_program", lambda program, device: InTriton(program))
