"""Drop-in modules: torch's class, constructor, state and habits."""

import copy
import inspect
import pickle

import pytest
import torch
from sets import each_drop_in, each_pair
from torch import nn

import fused_losses
from fused_losses import functional

FUNCTIONS = {
    "CrossEntropyLoss": "cross_entropy",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "KLDivLoss": "kl_div",
    "BCELoss": "binary_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
}


@each_drop_in
def test_constructor_and_class(spec):
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (spec.loss, spec.original))
    shared = list(ours)[: len(theirs)]
    assert shared == list(theirs)
    assert [ours[name].default for name in shared] == [theirs[name].default for name in shared]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(theirs) :])
    assert issubclass(spec.loss, spec.original) and spec.loss.__name__ == spec.original.__name__


@each_drop_in
def test_functions_take_what_torch_takes(spec):
    ours, theirs = (
        inspect.signature(getattr(module, FUNCTIONS[spec.name])).parameters
        for module in (functional, torch.nn.functional)
    )
    named = [name for name in ours if ours[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert named == list(theirs)[: len(named)] and len(named) == len(theirs)
    assert [ours[name].default for name in named] == [theirs[name].default for name in named]


@each_pair
def test_repr_names_the_class(spec):
    assert repr(spec.loss()).startswith(spec.name + "(")


@each_pair
def test_modules_are_pickled_with_their_options(spec):
    module = spec.loss(reduction="sum", backend="reference").eval()
    twin = pickle.loads(pickle.dumps(module))
    assert type(twin) is spec.loss and repr(twin) == repr(module) and not twin.training
    assert (twin.reduction, twin.backend) == ("sum", "reference")


@each_pair
def test_state_survives_everything(spec, backend, device):
    for sample in spec.samples():
        if not any(isinstance(value, torch.Tensor) for value in sample.options.values()):
            continue
        moved = sample.to(torch.float32, device)
        module = spec.build(moved, backend)
        other = spec.loss(**{**moved.options, **{n: torch.zeros_like(v) for n, v in weights(moved)}}, backend=backend)
        other.load_state_dict(module.state_dict())
        expected = module(*moved.tensors, **moved.extras)
        for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(*moved.tensors, **moved.extras), expected)


def weights(sample):
    return [(name, value) for name, value in sample.options.items() if isinstance(value, torch.Tensor)]


@each_drop_in
def test_state_dicts_are_exchanged_with_torch(spec):
    for sample in spec.samples():
        options = dict(weights(sample))
        original, ours = spec.original(**options), spec.loss(**options)
        assert list(original.state_dict()) == list(ours.state_dict())
        ours.load_state_dict(original.state_dict())
        original.load_state_dict(ours.state_dict())


def test_weights_move_with_the_module():
    loss = fused_losses.CrossEntropyLoss(weight=torch.ones(3))
    assert loss.to(torch.float64).weight.dtype is torch.float64
    assert loss.to("meta").weight.device.type == "meta"


@each_drop_in
@pytest.mark.parametrize("legacy", [{"reduce": False}, {"size_average": False}, {"size_average": True, "reduce": True}])
def test_deprecated_arguments(spec, legacy, backend, device):
    if "reduce" not in inspect.signature(spec.original.__init__).parameters:
        assert spec.name == "HuberLoss"
        return
    sample = spec.samples()[0].to(torch.float32, device)
    with pytest.warns(UserWarning, match="please use reduction"):
        ours, theirs = spec.loss(**legacy, backend=backend), spec.original(**legacy)
    assert ours.reduction == theirs.reduction
    torch.testing.assert_close(ours(*sample.tensors), theirs(*sample.tensors))


@each_pair
def test_reduction_is_read_at_call_time(spec, backend, device):
    """Trainers switch it, for instance to weight the rows of one batch."""
    sample = spec.samples()[0].to(torch.float64, device)
    module = spec.build(sample, backend)
    module.reduction = "none"
    each = module(*sample.tensors)
    module.reduction = "sum"
    torch.testing.assert_close(module(*sample.tensors), each.sum())
    module.reduction = "median"
    with pytest.raises(ValueError, match="median"):
        module(*sample.tensors)


@each_pair
def test_normalizer(spec, backend, device):
    """It replaces the denominator; a number, an integer tensor and a 0-d tensor mean the same."""
    sample = spec.samples()[0].to(torch.float64, device)
    options = {**sample.options, "reduction": "sum"}
    total = spec.loss(**options, backend=backend)(*sample.tensors)
    mean = spec.loss(**{**options, "reduction": "mean"}, backend=backend)
    for normalizer in (8, 8.0, torch.tensor(8, device=device), torch.tensor(8.0, device=device)):
        result = mean(*sample.tensors, normalizer=normalizer)
        torch.testing.assert_close(result, total / 8)
        assert result.dtype is torch.float64


@each_pair
def test_a_weighted_mean_is_a_normalizer_away(spec, backend, device):
    sample = spec.samples()[0].to(torch.float64, device)
    each = spec.loss(**{**sample.options, "reduction": "none"}, backend=backend)(*sample.tensors)
    weight = torch.linspace(0.1, 2, each.numel(), dtype=torch.float64, device=device).view(each.shape)
    loss = spec.loss(**{**sample.options, "reduction": "mean"}, backend=backend)
    got = loss(*sample.tensors, sample_weight=weight, normalizer=weight.sum())
    torch.testing.assert_close(got, (each * weight).sum() / weight.sum())


def test_huge_sums_in_low_precision_survive_a_normalizer(kernels, device):
    """fp16 ends at 65504: the sum must not pass through it on its way to the mean."""
    x = torch.full((400, 300), 3.0, device=device, dtype=torch.float16)
    loss = fused_losses.MSELoss(backend=kernels)(x, -x, normalizer=x.numel())
    assert loss.item() == 36.0


def test_torch_scripts_see_through_isinstance():
    assert isinstance(fused_losses.CrossEntropyLoss(), nn.CrossEntropyLoss)
    assert isinstance(fused_losses.MSELoss(), nn.modules.loss._Loss)


class Decorated(torch.Tensor):
    """What fastai and others pass around."""


@each_pair
def test_decorated_tensors(spec, backend, device):
    sample = spec.samples()[0].to(torch.float32, device)
    module = spec.build(sample, backend)
    decorated = [tensor.as_subclass(Decorated) for tensor in sample.tensors]
    torch.testing.assert_close(torch.Tensor(module(*decorated)), module(*sample.tensors))
