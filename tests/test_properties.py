"""Random shapes, strides, dtypes and options: kernels agree with the reference on whatever comes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_losses.specs import SPECS, Sample
from fused_losses.testing import check_loss
from fused_losses.testing.case import make_case, run

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
POINTWISE = [spec for spec in SPECS if spec.family == "pointwise"]
PROBABILITY = "BCELoss"
bounded = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def layouts(draw, shape):
    """How a tensor of a shape lies in memory: an order of dimensions, gaps, an offset, repeated dimensions."""
    return {
        "order": draw(st.permutations(range(len(shape)))),
        "steps": draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape))),
        "offset": draw(st.integers(0, 5)),
        "repeated": draw(st.sets(st.integers(0, max(0, len(shape) - 1)), max_size=1)),
    }


def place(tensor, layout):
    """The tensor's values in a memory layout; along a repeated dimension the first ones everywhere."""
    for dimension in layout["repeated"]:
        if dimension < tensor.ndim and tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, 0, 1)
    order, steps = layout["order"], layout["steps"]
    sizes = [tensor.shape[d] * steps[d] for d in order]
    memory = tensor.new_zeros(layout["offset"] + int(torch.tensor(sizes or [1]).prod()))
    wide = memory[layout["offset"] :].view(sizes or ())
    back = [order.index(d) for d in range(tensor.ndim)]
    return wide.permute(back)[tuple(slice(None, None, step) for step in steps)].copy_(tensor)


def placed(tensor, layout):
    """The same, at the full shape again."""
    return place(tensor, layout).expand(tensor.shape)


def values(shape, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


@st.composite
def pointwise_calls(draw):
    spec = draw(st.sampled_from(POINTWISE))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    seed, scale = draw(st.integers(0, 99)), draw(st.sampled_from([0.01, 1.0, 8.0]))
    x, t = values(shape, seed, scale), values(shape, seed + 100, scale)
    if spec.name == PROBABILITY:
        x = torch.sigmoid(x / 4)
    if spec.name in (PROBABILITY, "BCEWithLogitsLoss", "SigmoidFocalLoss", "KLDivLoss"):
        t = torch.sigmoid(t)
    options = {**draw(st.sampled_from([s.options for s in spec.samples()[:9]])), "reduction": draw(REDUCTIONS)}
    extras = {}
    if draw(st.booleans()):
        narrow = tuple(draw(st.sampled_from([1, size])) for size in shape)
        extras["sample_weight"] = placed(values(narrow, seed + 200, 1.0), draw(layouts(narrow)))
    pair = placed(x, draw(layouts(shape))), placed(t, draw(layouts(shape)))
    return spec, Sample(f"{spec.name} {shape}", pair, options, extras), draw(DTYPES)


@st.composite
def softmax_calls(draw):
    (spec,) = (spec for spec in SPECS if spec.name == "CrossEntropyLoss")
    classes = draw(st.integers(1, 40))
    shape = (draw(st.integers(0, 6)), classes, *draw(st.lists(st.integers(0, 6), max_size=2)))
    rows = shape[:1] + shape[2:]
    seed, scale = draw(st.integers(0, 99)), draw(st.sampled_from([0.01, 1.0, 8.0]))
    x = values(shape, seed, scale)
    options = {
        "reduction": draw(REDUCTIONS),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.01])),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "temperature": draw(st.sampled_from([1.0, 0.5, 3.0])),
    }
    if draw(st.booleans()):
        options["weight"] = values((classes,), seed + 1, 1.0).abs()
    if draw(st.booleans()):
        target = torch.softmax(values(shape, seed + 2, 2.0), 1)
    else:
        target = values(rows, seed + 2, 100.0).long().abs() % classes
        target = torch.where(values(rows, seed + 3, 1.0) > 1.0, -100, target)
    extras = {"sample_weight": values(rows, seed + 4, 1.0)} if draw(st.booleans()) else {}
    tensors = placed(x, draw(layouts(shape))), placed(target, draw(layouts(tuple(target.shape))))
    return spec, Sample(f"{shape}", tensors, options, extras), draw(DTYPES)


# Units in the last place of 1 or of the largest value: low precision is one rounding of fp32.
UNITS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 2, torch.float16: 4}


def check(spec, sample, dtype):
    """Against fp64, not against the error of the reference, which is 0 by chance in a single element."""
    case = make_case(spec.build(sample, "cpp"), spec.build(sample, "reference"), sample, dtype)
    wide = case.in_double()
    ours = run(case.loss, case.tensors, case.extras, case.floating)
    truth = run(case.truth, wide.tensors, wide.extras, case.floating)
    unit = torch.finfo(dtype).eps * UNITS[dtype]
    for result, exact in zip(ours, truth):
        assert result.dtype == dtype
        exact = exact.to(dtype).double()  # which may overflow
        largest = float(exact[exact.isfinite()].abs().amax()) if exact.isfinite().any() else 0.0
        torch.testing.assert_close(result.double(), exact, rtol=unit, atol=unit * max(1.0, largest), equal_nan=True)
    check_loss(case.loss, case.reference, [sample], dtypes=[dtype], checks=["unmutated"])


@bounded
@given(pointwise_calls())
def test_pointwise(call):
    check(*call)


@bounded
@given(softmax_calls())
def test_softmax(call):
    check(*call)
