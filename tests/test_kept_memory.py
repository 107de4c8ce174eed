"""Large CPU gradients are made in memory that is kept from the one before, and nobody notices but by the time."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import fused_losses
from fused_losses.functional import mse_loss

ELEMENTS = 4 << 20  # 16 MiB of fp32


def gradient(elements=ELEMENTS, dtype=torch.float32):
    x = torch.ones(elements, dtype=dtype, requires_grad=True)
    return torch.autograd.grad(mse_loss(x, torch.zeros_like(x), reduction="sum", backend="cpp"), x)[0]


def test_memory_is_used_again():
    first = gradient()
    address = first.data_ptr()
    del first
    again = gradient()
    assert again.data_ptr() == address and (again == 2).all()


def test_what_is_alive_is_never_lent():
    """Through every way of holding on to it."""
    holders = [lambda g: g, lambda g: g[5:7], lambda g: g.untyped_storage(), lambda g: g.numpy(), lambda g: g.detach()]
    addresses, held = set(), []
    for hold in holders:
        g = gradient()
        addresses.add(g.data_ptr())
        held.append(hold(g))
        del g
    assert len(addresses) == len(holders)
    assert (held[0] == 2).all() and (held[1] == 2).all() and (held[3] == 2).all() and (held[4] == 2).all()


@pytest.mark.parametrize("change", [0.7, 1.0, 1.5])
def test_only_memory_of_about_the_size_is_lent(change):
    g = gradient()
    address = g.data_ptr()
    del g
    other = gradient(int(ELEMENTS * change))
    assert (other == 2).all() and (other.data_ptr() == address) == (change == 1.0)


def test_other_dtypes_and_shapes_take_it_too():
    g = gradient()
    address = g.data_ptr()
    del g
    x = torch.ones(2, 1024, 2048, dtype=torch.float64).transpose(1, 2).requires_grad_()
    (wide,) = torch.autograd.grad(mse_loss(x, torch.zeros_like(x), reduction="sum", backend="cpp"), x)
    assert wide.stride() == x.stride() and (wide == 2).all() and wide.data_ptr() != address
    g = gradient(2 * ELEMENTS, torch.bfloat16)
    assert g.data_ptr() == address and (g == 2).all()


def test_a_small_gradient_is_not_kept():
    assert gradient(1000).untyped_storage().resizable()


def resident():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) * 1024


def lazily_free():
    with open("/proc/self/smaps") as maps:
        return sum(int(size) for size in re.findall(r"LazyFree:\s+(\d+)", maps.read())) * 1024


def test_the_system_may_take_it_back_and_so_may_the_user():
    g = gradient(8 * ELEMENTS)
    size = g.nbytes
    alive = lazily_free()
    del g
    assert lazily_free() - alive > size // 2
    before = resident()
    fused_losses.empty_cache()
    assert before - resident() > size // 2
    fused_losses.empty_cache()


def test_threads_do_not_share_it():
    wrong = []

    def work(value):
        for _ in range(10):
            x = torch.full((ELEMENTS,), float(value), requires_grad=True)
            (g,) = torch.autograd.grad(mse_loss(x, torch.zeros_like(x), reduction="sum", backend="cpp"), x)
            if not (g == 2 * value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_gradients_than_are_kept():
    held = [gradient() for _ in range(12)]
    assert len({g.data_ptr() for g in held}) == 12
    del held
    assert (gradient() == 2).all()


def test_it_survives_a_fork_and_a_pickle(tmp_path):
    g = gradient()
    torch.save(g, tmp_path / "gradient.pt")
    del g
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads stay with the parent
        os._exit(0 if (gradient() == 2).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(torch.load(tmp_path / "gradient.pt"), gradient())


def test_it_can_be_shared_with_processes():
    g = gradient()
    g.share_memory_()
    assert g.is_shared() and (g == 2).all()


def test_it_accumulates_into_a_leaf():
    x = torch.ones(ELEMENTS, requires_grad=True)
    for _ in range(2):
        mse_loss(x, torch.zeros_like(x), reduction="sum", backend="cpp").backward()
    assert (x.grad == 4).all()


def test_it_can_be_switched_off():
    code = f"""
import torch, fused_losses
x = torch.ones({ELEMENTS}, requires_grad=True)
fused_losses.functional.mse_loss(x, torch.zeros_like(x)).backward()
print(x.grad.untyped_storage().resizable())
"""
    for value, resizable in (("0", "True"), ("1", "False")):
        environment = {**os.environ, "FUSED_LOSSES_CPU_CACHE": value}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert run.stdout.strip() == resizable
