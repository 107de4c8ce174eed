"""Specs of the pointwise losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import pointwise as losses
from ._spec import Bench, ErrorSample, LossSpec, Sample, repeated

Pair = tuple[Tensor, Tensor]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regression_pair(*shape: int, scale: float = 2.0) -> Pair:
    generator = _generator(len(shape))
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(2)]
    return draw[0], draw[1]


def logit_pair(*shape: int) -> Pair:
    """Logits from near 0 to saturated, with hard targets and, every fifth, a soft one."""
    logits, soft = regression_pair(*shape, scale=6.0)
    hard = (soft > 0).double()
    every_fifth = torch.arange(soft.numel()).reshape(shape) % 5 == 0
    return logits, torch.where(every_fifth, torch.sigmoid(soft), hard)


def probability_pair(*shape: int) -> Pair:
    logits, target = logit_pair(*shape)
    return torch.sigmoid(logits / 4), target


def divergence_pair(*shape: int) -> Pair:
    """Log-probabilities and probabilities, mostly larger and none of them 0 in any dtype."""
    logits, target = regression_pair(*shape)
    return torch.nn.functional.logsigmoid(logits - 2.0), torch.sigmoid(target)


def log_divergence_pair(*shape: int) -> Pair:
    input, target = divergence_pair(*shape)
    return input, target.log()


def _samples(pair: Callable[..., Pair], variants: tuple[Mapping[str, Any], ...]) -> list[Sample]:
    """Every reduction and parameter on a ragged shape, then the shapes that are easy to get wrong."""
    weight = torch.rand(7, 33, generator=_generator(), dtype=torch.float64)
    samples = [
        Sample(f"{reduction}{_label(variant)}", pair(7, 33), {"reduction": reduction, **variant})
        for reduction in ("mean", "sum", "none")
        for variant in variants
    ]
    first = {"reduction": "mean", **variants[0]}
    return samples + [
        Sample("sample_weight", pair(7, 33), first, {"sample_weight": weight}),
        Sample("row_weight", pair(7, 33), {**first, "reduction": "none"}, {"sample_weight": weight[:, :1]}),
        Sample("normalizer", pair(7, 33), first, {"normalizer": 11.0}),
        Sample("tensor_normalizer", pair(7, 33), first, {"normalizer": torch.tensor(5.0, dtype=torch.float64)}),
        Sample("scalar", pair(), first),
        Sample("single", pair(1), first),
        Sample("empty_mean", pair(0, 3), first),
        Sample("empty_sum", pair(0, 3), {**first, "reduction": "sum"}),
        Sample("empty_none", pair(0, 3), {**first, "reduction": "none"}),
        Sample("image", pair(2, 3, 5, 7), first),
        Sample("long", pair(9001), first),
        Sample("transposed", tuple(t.t() for t in pair(33, 7)), first),
        Sample("mixed_layouts", (pair(33, 7)[0].t(), pair(7, 33)[1]), first),
        Sample("sliced", tuple(t[::2, 1::3] for t in pair(14, 99)), {**first, "reduction": "none"}),
    ]


def _label(variant: Mapping[str, Any]) -> str:
    return "".join(f"-{name}={value}" for name, value in variant.items() if not isinstance(value, Tensor)) + "".join(
        f"-{name}" for name, value in variant.items() if isinstance(value, Tensor)
    )


def _regression_samples(*variants: Mapping[str, Any]) -> Callable[[], list[Sample]]:
    return lambda: _samples(regression_pair, variants or ({},))


def _common_errors(pair: Callable[..., Pair]) -> list[ErrorSample]:
    input, target = pair(4, 3)
    return [
        ErrorSample(Sample("reduction", (input, target), {"reduction": "median"}), ValueError, "reduction"),
        ErrorSample(
            Sample("normalizer_of_sum", (input, target), {"reduction": "sum"}, {"normalizer": 2.0}),
            ValueError,
            "normalizer",
        ),
        ErrorSample(Sample("device", (input, target.to("meta"))), RuntimeError, "device"),
        ErrorSample(
            Sample("sample_weight_shape", (input, target), {}, {"sample_weight": torch.ones(4).double()}),
            RuntimeError,
            "sample_weight|size of tensor|weight",
        ),
    ]


# torch's own kernels refuse integers; what is composed of operations computes with them.
_INTEGERS = ErrorSample(
    Sample("integers", (torch.ones(4, 3).long(), torch.ones(4, 3).long())),
    RuntimeError,
    "not implemented|floating|dtype",
)


def _regression_errors(*more: ErrorSample) -> Callable[[], list[ErrorSample]]:
    def errors() -> list[ErrorSample]:
        input, target = regression_pair(4, 3)
        shapes = ErrorSample(Sample("shapes", (input, target[:, :2])), RuntimeError, "size")
        return [*_common_errors(regression_pair), shapes, *more]

    return errors


def _binary_errors(pair: Callable[..., Pair], *more: ErrorSample) -> Callable[[], list[ErrorSample]]:
    def errors() -> list[ErrorSample]:
        input, target = pair(4, 3)
        return [
            *_common_errors(pair),
            _INTEGERS,
            ErrorSample(Sample("shapes", (input, target[:, :2])), ValueError, "size|shape"),
            ErrorSample(Sample("integer_target", (input, target.round().long())), RuntimeError, "target|dtype|Long"),
            *more,
        ]

    return errors


def _bench(pair: Callable[..., Pair], reduction: str = "mean") -> tuple[Bench, ...]:
    def make(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensor, ...]]:
        return lambda dtype, device: tuple(t.to(device, dtype) for t in pair(*shape))

    large = (torch.float32, torch.bfloat16)
    return (
        Bench("4096x8192", make(4096, 8192), large, {"reduction": reduction}, traffic=3),
        Bench(
            "65536x8192", repeated(make(4096, 8192), 16), large, {"reduction": reduction}, traffic=3, devices=("cuda",)
        ),
        Bench("1024", make(1024), options={"reduction": reduction}, traffic=3),
        Bench("16", make(16), options={"reduction": reduction}, traffic=3),
    )


def _regression(loss: type[nn.Module], summary: str, original: type[nn.Module] | None, *variants, **rest) -> LossSpec:
    return LossSpec(
        loss=loss,
        family="pointwise",
        summary=summary,
        original=original,
        samples=_regression_samples(*variants),
        errors=_regression_errors(*rest.get("errors", ()), *([_INTEGERS] if original else [])),
        benches=_bench(regression_pair),
    )


def _binary_samples(pair: Callable[..., Pair], *variants: Mapping[str, Any]) -> Callable[[], list[Sample]]:
    return lambda: _samples(pair, variants)


def _divergence_samples() -> list[Sample]:
    pair, logs, batchmean = divergence_pair, log_divergence_pair, {"reduction": "batchmean"}
    log_target = [
        Sample(f"{reduction}-log_target", logs(7, 33), {"reduction": reduction, "log_target": True})
        for reduction in ("mean", "sum", "none", "batchmean")
    ]
    weight = torch.linspace(0.0, 2.0, 7, dtype=torch.float64)[:, None]
    return [
        *_samples(pair, ({},)),
        *log_target,
        Sample("log_target_layouts", (logs(33, 7)[0].t(), logs(7, 33)[1]), {"log_target": True, **batchmean}),
        Sample("batchmean", pair(7, 33), batchmean),
        Sample("batchmean_weight", pair(7, 33), batchmean, {"sample_weight": weight}),
        Sample("batchmean_normalizer", pair(7, 33), batchmean, {"normalizer": 5.5}),
        Sample("batchmean_scalar", pair(), batchmean),
        Sample("batchmean_empty", pair(0, 3), batchmean),
        Sample("batchmean_long", logs(9001), {"log_target": True, **batchmean}),
    ]


def _divergence_errors() -> list[ErrorSample]:
    input, target = divergence_pair(4, 3)
    return [
        *_common_errors(divergence_pair),
        _INTEGERS,
        ErrorSample(Sample("shapes", (input, target[:, :2])), RuntimeError, "size"),
        ErrorSample(Sample("integer_target", (input, target.round().long())), RuntimeError, "target must be floating"),
        ErrorSample(Sample("complex", (input + 0j, target + 0j)), RuntimeError, "input must be floating"),
    ]


_COLUMN_WEIGHT = torch.linspace(0.5, 3.0, 33, dtype=torch.float64)
_FIRST = regression_pair(4, 3)

SPECS = (
    _regression(losses.MSELoss, "squared error", nn.MSELoss),
    _regression(losses.L1Loss, "absolute error", nn.L1Loss),
    _regression(
        losses.SmoothL1Loss,
        "squared near zero, absolute beyond beta",
        nn.SmoothL1Loss,
        {"beta": 1.0},
        {"beta": 0.3},
        {"beta": 0.0},
        errors=[ErrorSample(Sample("beta", _FIRST, {"beta": -1.0}), RuntimeError, "beta")],
    ),
    _regression(
        losses.HuberLoss,
        "squared near zero, linear beyond delta",
        nn.HuberLoss,
        {"delta": 1.0},
        {"delta": 0.3},
        errors=[ErrorSample(Sample("delta", _FIRST, {"delta": 0.0}), RuntimeError, "delta")],
    ),
    _regression(losses.LogCoshLoss, "log cosh of the error", None),
    _regression(
        losses.CharbonnierLoss,
        "differentiable absolute error",
        None,
        {"eps": 1e-12},
        {"eps": 0.01},
        errors=[ErrorSample(Sample("eps", _FIRST, {"eps": 0.0}), ValueError, "eps")],
    ),
    LossSpec(
        loss=losses.BCEWithLogitsLoss,
        family="pointwise",
        summary="binary cross entropy of logits",
        original=nn.BCEWithLogitsLoss,
        samples=lambda: (
            _samples(logit_pair, ({},))
            + [
                Sample("pos_weight", logit_pair(7, 33), {"pos_weight": _COLUMN_WEIGHT}),
                Sample("weight", logit_pair(7, 33), {"weight": _COLUMN_WEIGHT}),
                Sample(
                    "both_weights",
                    logit_pair(7, 33),
                    {"weight": _COLUMN_WEIGHT, "pos_weight": 1 / _COLUMN_WEIGHT, "reduction": "none"},
                    {"sample_weight": _COLUMN_WEIGHT.flip(0)},
                ),
            ]
        ),
        errors=_binary_errors(logit_pair),
        benches=_bench(logit_pair),
    ),
    LossSpec(
        loss=losses.BCELoss,
        family="pointwise",
        summary="binary cross entropy of probabilities",
        original=nn.BCELoss,
        samples=lambda: (
            _samples(probability_pair, ({},)) + [Sample("weight", probability_pair(7, 33), {"weight": _COLUMN_WEIGHT})]
        ),
        errors=_binary_errors(
            probability_pair,
            ErrorSample(Sample("range", (torch.tensor([1.5]), torch.tensor([1.0]))), RuntimeError, "between 0 and 1"),
            ErrorSample(
                Sample("target_range", (torch.tensor([0.5]), torch.tensor([2.0]))),
                RuntimeError,
                "between 0 and 1",
            ),
        ),
        benches=_bench(probability_pair),
    ),
    LossSpec(
        loss=losses.SigmoidFocalLoss,
        family="pointwise",
        summary="focal loss of logits",
        samples=_binary_samples(
            logit_pair,
            {"alpha": 0.25, "gamma": 2.0},
            {"alpha": -1.0, "gamma": 0.0},
            {"alpha": 0.7, "gamma": 1.5},
            {"alpha": 0.7, "gamma": 0.5},
        ),
        errors=_binary_errors(
            logit_pair,
            ErrorSample(Sample("alpha", _FIRST, {"alpha": 1.5}), ValueError, "alpha"),
            ErrorSample(Sample("gamma", _FIRST, {"gamma": -1.0}), ValueError, "gamma"),
        ),
        benches=_bench(logit_pair),
    ),
    LossSpec(
        loss=losses.KLDivLoss,
        family="pointwise",
        summary="Kullback-Leibler divergence of log-probabilities",
        original=nn.KLDivLoss,
        samples=_divergence_samples,
        errors=_divergence_errors,
        benches=_bench(divergence_pair, "batchmean"),
    ),
)
