"""Bad input raises torch's exception type, on every backend alike, with a message that helps."""

import dataclasses

import pytest
import torch

import fused_losses
from fused_losses.specs import SPECS

CASES = [(spec, error) for spec in SPECS for error in spec.errors()]
IDS = [f"{spec.name}-{error.sample.name}" for spec, error in CASES]
# Options torch does not have.
OURS = {"normalizer", "softcap", "temperature", "z_loss", "alpha", "gamma", "eps", "beta", "delta"}


def call(module, error):
    return module(*error.sample.tensors, **error.sample.extras)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("where", ["auto", "reference", "cpp"])
@pytest.mark.parametrize(("spec", "error"), CASES, ids=IDS)
def test_raises(spec, error, where):
    if (
        where == "cpp"
        and error.sample.name.startswith("integer")
        and not error.sample.tensors[0].is_floating_point()
    ):
        # Kernels that were asked for by name say so themselves.
        error = dataclasses.replace(error, error=RuntimeError, match="no kernels for torch.int64|floating")
    tensors = [tensor.clone() for tensor in error.sample.tensors if tensor.device.type == "cpu"]
    with pytest.raises(error.error, match=error.match):
        call(spec.build(error.sample, None if where == "auto" else where), error)
    kept = [tensor for tensor in error.sample.tensors if tensor.device.type == "cpu"]
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("spec", "error"),
    [(s, e) for s, e in CASES if s.original and not e.sample.extras and not OURS & set(e.sample.options)],
    ids=lambda value: getattr(value, "name", None) or getattr(getattr(value, "sample", None), "name", None),
)
def test_torch_raises_the_same_type(spec, error):
    with pytest.raises(error.error):
        call(spec.original(**error.sample.options), error)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="target must be a tensor"):
        fused_losses.CrossEntropyLoss()(torch.zeros(2, 3), [0, 1])


def test_sparse_and_quantised_are_rejected_as_torch_does():
    dense = torch.zeros(2, 3)
    with pytest.raises(NotImplementedError):
        fused_losses.MSELoss()(dense, dense.to_sparse())


def test_integer_input_cannot_require_grad():
    with pytest.raises(RuntimeError, match="floating"):
        torch.ones(3, dtype=torch.long).requires_grad_()


def test_classes_last_names_the_way_out():
    with pytest.raises(RuntimeError, match=r"logits.flatten\(0, -2\)"):
        fused_losses.CrossEntropyLoss()(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_propagate_as_in_torch(value):
    x, t = torch.randn(4, 5), torch.rand(4, 5)
    x[1, 2] = value
    for name in ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        results = [
            module(reduction="none")(leaf, t)
            for module, leaf in zip((getattr(fused_losses, name), getattr(torch.nn, name)), leaves)
        ]
        gradients = [torch.autograd.grad(r.sum(), leaf)[0] for r, leaf in zip(results, leaves)]
        torch.testing.assert_close(*results, equal_nan=True)
        torch.testing.assert_close(*gradients, equal_nan=True)
    # Here torch gives NaN (0 times infinity) where the loss is infinite: only finiteness is compared.
    ours = fused_losses.BCEWithLogitsLoss(reduction="none")(x, t)
    assert torch.equal(ours.isfinite(), torch.nn.BCEWithLogitsLoss(reduction="none")(x, t).isfinite())
    for classes in (5, 100):
        logits = torch.randn(3, classes)
        logits[1, 2] = value
        labels = torch.tensor([0, 1, 2])
        ours = fused_losses.CrossEntropyLoss(reduction="none")(logits, labels)
        torchs = torch.nn.CrossEntropyLoss(reduction="none")(logits, labels)
        torch.testing.assert_close(ours, torchs, equal_nan=True)
