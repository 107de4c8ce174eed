"""Every loss in Triton against fp64 truth, dtypes in turn; a planted fault must be seen."""

import pytest
import torch
from divergences import check_tvd_gradients
from sets import dtypes_in_turn, each_spec

from fused_losses.backends import choice
from fused_losses.specs import SPECS
from fused_losses.testing import check_loss

CHECKS = ("value", "gradient")


def samples(spec):
    """Long samples cost seconds an interpreted program and take no other path."""
    return [sample for sample in spec.samples() if sample.name not in ("long", "wide_image")]


@pytest.mark.parametrize("check", CHECKS)
@each_spec
def test_accuracy(spec, check):
    for sample, dtypes in dtypes_in_turn(samples(spec)):
        check_loss(
            spec.build(sample, "triton"), spec.build(sample, "reference"), [sample], dtypes=dtypes, checks=[check]
        )


@pytest.mark.parametrize("check", ["upstream", "layouts", "repeated_backward", "unmutated", "no_grad"])
@each_spec
def test_behaviour(spec, check):
    chosen = {"mean", "none", "everything_none", "probabilities_mean", "image", "both_weights"}
    most = 3 if "jsd" in spec.name.lower() else 6  # its programs are the longest
    for sample in [sample for sample in samples(spec) if sample.name.split("-")[0] in chosen][:most]:
        check_loss(
            spec.build(sample, "triton"),
            spec.build(sample, "reference"),
            [sample],
            dtypes=(torch.float32,),
            checks=[check],
        )


def test_gradients_of_the_total_variation_are_right_relative_to_themselves():
    check_tvd_gradients("triton")


def test_label_out_of_range_is_nan_in_its_row_alone():
    from fused_losses.functional import cross_entropy

    logits = torch.randn(4, 100, requires_grad=True)
    for bad in (100, -1, 2**40):
        loss = cross_entropy(logits, torch.tensor([0, bad, 2, -100]), reduction="none", backend="triton")
        gradient = torch.autograd.grad(loss, logits, torch.ones(4))[0]
        assert loss.isnan().tolist() == [False, True, False, False]
        assert gradient.isnan().all(dim=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("count", [1, 8192, 8193, 20_001])
def test_sums_of_many_programs(count):
    from fused_losses.triton_kernels.sums import FEW, few_sums

    partial = torch.rand(2, count)
    few = few_sums(partial)
    assert few.shape[1] <= FEW and torch.equal(few, few_sums(partial))
    torch.testing.assert_close(few.sum(dim=1).double(), partial.double().sum(dim=1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("fault", ["scale", "unmasked"])
def test_a_planted_fault_is_seen(fault, monkeypatch):
    spec = next(spec for spec in SPECS if spec.name == "MSELoss")
    sample = next(sample for sample in spec.samples() if sample.name == "mean")
    loss, reference = spec.build(sample, "triton"), spec.build(sample, "reference")
    check_loss(loss, reference, [sample], dtypes=(torch.float32,), checks=["gradient"])
    kernels = choice.KERNELS["triton"]

    def broken(*arguments):
        grad_input, grad_target = kernels.pointwise_backward(*arguments)
        if fault == "unmasked":
            grad_input.view(-1)[-1] = float("nan")
            return grad_input, grad_target
        return grad_input * 1.0001, grad_target

    monkeypatch.setitem(choice.KERNELS, "triton", kernels._replace(pointwise_backward=broken))
    with pytest.raises(AssertionError):
        check_loss(loss, reference, [sample], dtypes=(torch.float32,), checks=["gradient"])
