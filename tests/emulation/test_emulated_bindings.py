"""The CUDA operators, emulated on CPU tensors, through the public losses and the checks of every other backend."""

import pytest
import torch
from divergences import check_tvd_gradients
from emulator import build_bindings
from sets import dtypes_in_turn, each_spec

from fused_losses.backends import choice, fake
from fused_losses.testing import check_loss

LAYOUT_DTYPES = (torch.float32, torch.bfloat16)  # 4 and 8 elements to a load; the layouts take the most time


@pytest.fixture(scope="module")
def operators():
    torch.ops.load_library(str(build_bindings()))

    def of(names):
        return {name: getattr(torch.ops.emulated_losses, name).default for name in names}

    return choice.Kernels(*of(fake.OPERATORS).values(), **of(fake.AT_ONCE["cuda"]))


@pytest.fixture(autouse=True)
def emulated(operators, monkeypatch):
    """The CPU's kernels are these."""
    choice.resolve("cpu", torch.float32, "cpp")
    monkeypatch.setitem(choice.KERNELS, "cpp", operators)


@each_spec
def test_check(spec):
    laid_out = set()
    for sample, dtypes in dtypes_in_turn(spec.samples()):
        elements = max(t.numel() for t in sample.tensors)
        if elements > 20_000:
            continue
        wide = sample.to(torch.float64, "cpu")
        loss, reference = spec.build(wide, "cpp"), spec.build(wide, "reference")
        check_loss(loss, reference, [wide], dtypes=dtypes, checks=["value", "gradient"])
        path = sample.name.split("-")[0]
        # Linear kernels see contiguous chunks only, and the emulator takes seconds for each layout of long rows.
        if spec.family != "linear" and elements < 5_000 and path not in laid_out:
            laid_out.add(path)
            check_loss(loss, reference, [wide], dtypes=LAYOUT_DTYPES, checks=["layouts"])
            if spec.family == "pointwise":  # whose gradients are written over where the upstream number is not 1
                check_loss(loss, reference, [wide], dtypes=LAYOUT_DTYPES[:1], checks=["upstream", "repeated_backward"])


def test_gradients_of_the_total_variation_are_right_relative_to_themselves():
    check_tvd_gradients("cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("elements", [0, 1, 7, 8, 4099])
def test_scaled(operators, dtype, elements):
    """Rounded once, also where the memory starts at no multiple of 16 bytes."""
    memory, factor = torch.randn(elements + 3), torch.tensor(1.7)
    for x in (memory[:elements], memory[3:]):
        got = torch.ops.emulated_losses.scaled(x, factor, dtype)
        assert got.dtype is dtype and torch.equal(got, (x * factor).to(dtype))
