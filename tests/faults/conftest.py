import pytest
import torch


@pytest.fixture(autouse=True)
def on_the_device(device):
    """Tensors are made where the kernels run."""
    with torch.device(device):
        yield
