"""Every check, on every loss, on every backend."""

import pytest
import torch

from fused_losses.specs import SPECS
from fused_losses.testing import CHECKS, check_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Compiling takes a second a sample: one of each path.
COMPILED = {
    "mean",
    "none",
    "everything_mean",
    "probabilities_mean",
    "image",
    "sample_weight",
    "normalizer",
    "both_weights",
}


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "compiled"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_check(spec, check, backend):
    for sample in spec.samples():
        loss, reference = spec.build(sample, backend), spec.build(sample, "reference")
        check_loss(loss, reference, [sample], dtypes=DTYPES, checks=[check])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiled(spec, backend):
    samples = [sample for sample in spec.samples() if sample.name.split("-")[0] in COMPILED]
    for sample in samples:
        loss, reference = spec.build(sample, backend), spec.build(sample, "reference")
        check_loss(loss, reference, [sample], dtypes=(torch.float32,), checks=["compiled"])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_inductor(spec, backend):
    sample = spec.samples()[0].to(torch.float32)
    loss = spec.build(sample, backend)
    tensors = [t.clone().requires_grad_(t.is_floating_point()) for t in sample.tensors]

    def gradients(function):
        return torch.autograd.grad(function(*tensors), [t for t in tensors if t.requires_grad])

    for ours, compiled in zip(gradients(loss), gradients(torch.compile(loss, fullgraph=True))):
        torch.testing.assert_close(compiled, ours)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.original], ids=lambda spec: spec.name)
def test_equals_the_original(spec, backend):
    """The reference shares our argument handling; torch's own module does not."""
    compared = 0
    for sample in spec.samples():
        if sample.extras or {"z_loss", "softcap", "temperature"} & set(sample.options):
            continue
        case = sample.to(torch.float64)
        ours, torchs = spec.build(case, backend)(*case.tensors), spec.original(**case.options)(*case.tensors)
        torch.testing.assert_close(ours, torchs, equal_nan=True, msg=lambda text, s=sample: f"{s.name}: {text}")
        compared += 1
    assert compared > 10
