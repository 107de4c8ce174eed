"""Specs of the divergences: (student logits, teacher logits[, labels]) in, losses of rows out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses import divergence as losses
from ._spec import Bench, ErrorSample, LossSpec, Sample, repeated
from .softmax import IGNORED


def logit_pair(*shape: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """A student's logits and a teacher's, alike enough for both kinds of errors to matter."""
    generator = torch.Generator().manual_seed(sum(shape))
    student, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student, student / 2 + noise


def _samples(*variants: Mapping[str, Any]) -> Callable[[], list[Sample]]:
    def samples() -> list[Sample]:
        pair, labels = logit_pair(12, 37), torch.arange(12)
        labels[::5] = IGNORED
        row_weight = torch.linspace(0.0, 2.0, 12, dtype=torch.float64)
        first = dict(variants[0])
        found = [
            Sample(f"{reduction}{_label(variant)}", pair, {"reduction": reduction, **variant})
            for variant in variants
            for reduction in ("mean", "sum", "none")
        ]
        return [
            *found,
            *(Sample(f"ignored_{r}", (*pair, labels), {**first, "reduction": r}) for r in ("mean", "none")),
            Sample("sample_weight", pair, first, {"sample_weight": row_weight}),
            Sample("normalizer", (*pair, labels), first, {"normalizer": 7.0}),
            Sample("temperature", pair, {**first, "temperature": 2.0}),
            Sample("vector", logit_pair(11), first),
            Sample("cube", logit_pair(2, 5, 7), first),
            Sample("one_class", logit_pair(4, 1), first),
            Sample("wide", logit_pair(3, 5001, scale=1.0), first),
            Sample("sliced", tuple(t[::2, ::3] for t in logit_pair(24, 111)), first),
            Sample("all_ignored_sum", (*pair, torch.full((12,), IGNORED)), {**first, "reduction": "sum"}),
            Sample("empty_sum", tuple(t[:0] for t in pair), {**first, "reduction": "sum"}),
            Sample("empty_none", tuple(t[:0] for t in pair), {**first, "reduction": "none"}),
        ]

    return samples


def _label(variant: Mapping[str, Any]) -> str:
    return "".join(f"-{name}={value}" for name, value in variant.items())


def _errors() -> list[ErrorSample]:
    student, teacher = logit_pair(4, 3)

    def error(name: str, tensors: tuple[Tensor, ...], kind: type[Exception], match: str, **options: Any) -> ErrorSample:
        return ErrorSample(Sample(name, tensors, options), kind, match)

    return [
        error("reduction", (student, teacher), ValueError, "reduction", reduction="median"),
        error("shapes", (student, teacher[:, :2]), ValueError, "one shape"),
        error("dtypes", (student, teacher.int()), RuntimeError, "one dtype"),
        error("labels", (student, teacher, torch.zeros(3).long()), ValueError, "target must have one value per row"),
        error("temperature", (student, teacher), ValueError, "temperature", temperature=0.0),
        error("device", (student, teacher.to("meta")), RuntimeError, "device"),
        ErrorSample(
            Sample("normalizer_of_sum", (student, teacher), {"reduction": "sum"}, {"normalizer": 2.0}),
            ValueError,
            "normalizer",
        ),
        ErrorSample(
            Sample("sample_weight_shape", (student, teacher), {}, {"sample_weight": torch.ones(3).double()}),
            ValueError,
            "sample_weight",
        ),
    ]


def _jsd_errors() -> list[ErrorSample]:
    return [*_errors(), ErrorSample(Sample("beta", logit_pair(4, 3), {"beta": 1.5}), ValueError, "beta")]


def _bench(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return tuple(t.to(device, dtype) for t in logit_pair(2048, 32000))


_BENCHES = (
    Bench("2048x32000", _bench, (torch.float32, torch.bfloat16), traffic=3),
    Bench("32768x32000", repeated(_bench, 16), (torch.bfloat16,), traffic=3, devices=("cuda",)),
)

SPECS = (
    LossSpec(
        loss=losses.JSDLoss,
        family="divergence",
        summary="Jensen-Shannon divergence of two models' logits, from forward to reverse KL",
        samples=_samples({"beta": 0.5}, {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1}),
        errors=_jsd_errors,
        benches=_BENCHES,
    ),
    LossSpec(
        loss=losses.TVDLoss,
        family="divergence",
        summary="total variation distance of two models' logits",
        samples=_samples({}),
        errors=_errors,
        benches=_BENCHES,
    ),
)
