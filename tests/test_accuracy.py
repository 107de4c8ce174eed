"""Values against fp64 truth, on every backend, dtype and instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from sets import each_drop_in, each_pair, each_spec

from fused_losses.specs import SPECS, Sample
from fused_losses.testing import check_loss
from fused_losses.testing.accuracy import same_bits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {spec.name: spec for spec in SPECS}
OURS = {"z_loss", "softcap", "temperature"}


@each_spec
@pytest.mark.parametrize("check", ["value", "no_grad", "deterministic", "unmutated"])
def test_check(spec, check, backend, device):
    for sample in spec.samples():
        moved = sample.to(torch.float64, device)
        loss, reference = spec.build(moved, backend), spec.build(moved, "reference")
        check_loss(loss, reference, [moved], dtypes=DTYPES, checks=[check])


@each_spec
def test_samples_are_drawn_alike(spec):
    """One that is drawn anew in each process would now and then exceed its budget, and nobody could say why."""
    for first, again in zip(spec.samples(), spec.samples(), strict=True):
        assert all(map(same_bits, first.tensors, again.tensors)), first.name


@each_drop_in
def test_equals_the_original(spec, backend, device):
    """The reference shares our argument handling; torch's own module does not."""
    compared = 0
    for sample in spec.samples():
        if sample.extras or OURS & set(sample.options):
            continue
        moved = sample.to(torch.float64, device)
        loss, original = spec.build(moved, backend), spec.original(**moved.options)
        check_loss(loss, original, [moved], dtypes=DTYPES, checks=["value", "gradient"])
        compared += 1
    assert compared > 10


@each_pair
@pytest.mark.parametrize("elements", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1023, 1025])
def test_every_tail_of_a_vector_loop(spec, elements, kernels, device):
    pair = spec.samples()[0].tensors
    rows = tuple(
        t.flatten()[torch.arange(elements) % t.numel()] if t.is_floating_point() else t[1] % elements for t in pair
    )
    sample = Sample(f"{elements} elements", rows).to(torch.float64, device)
    loss, reference = spec.build(sample, kernels), spec.build(sample, "reference")
    check_loss(loss, reference, [sample], dtypes=DTYPES, checks=["value", "gradient"])


@each_pair
def test_many_elements_keep_their_sum(spec, kernels, device):
    """A sum in one fp32 accumulator loses digits; a mean of millions of equal elements shows it."""
    generator = torch.Generator().manual_seed(0)
    shape = (40_000, 32)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    t = torch.rand(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(32, shape[:1], generator=generator)
    sample = Sample("many", (x, labels if spec.family == "softmax" else t), {"reduction": "sum"})
    sample = sample.to(torch.float64, device)
    loss, reference = spec.build(sample, kernels), spec.build(sample, "reference")
    check_loss(loss, reference, [sample], dtypes=(torch.float32,), checks=["value", "deterministic"])


@pytest.mark.parametrize("kind", ["default", "avx2", "avx512"])
def test_each_instruction_set(kind):
    """The variable only lowers the choice, so a processor without a set runs the next lower one."""
    script = f"""
import torch, fused_losses
from fused_losses.specs import SPECS
from fused_losses.testing import check_loss
used = fused_losses.backend_report()["cpu_capability"]
order = ["default", "avx2", "avx512"]
assert order.index(used) <= order.index("{kind}"), used
for spec in SPECS:
    for sample in spec.samples():
        loss, reference = spec.build(sample, "cpp"), spec.build(sample, "reference")
        check_loss(loss, reference, [sample], dtypes=(torch.float32, torch.bfloat16, torch.float16),
                   checks=["value", "gradient"])
print(used)
"""
    environment = {**os.environ, "FUSED_LOSSES_CPU_CAPABILITY": kind, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    supported = torch.backends.cpu.get_cpu_capability().lower()
    if kind == "default" or kind in supported:
        assert result.stdout.split()[-1] == kind


def test_an_unknown_instruction_set_is_named():
    command = [sys.executable, "-c", "import fused_losses; fused_losses.backend_report()"]
    environment = {**os.environ, "FUSED_LOSSES_CPU_CAPABILITY": "sse9"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "must be default, avx2 or avx512, got sse9" in result.stderr
