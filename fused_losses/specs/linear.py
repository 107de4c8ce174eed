"""Specs of the linear family: (hidden states, weight, target[, bias]) in, losses out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses import linear as losses
from ._spec import Bench, ErrorSample, LossSpec, Sample
from .softmax import IGNORED

FEATURES, CLASSES, ROWS = 8, 37, 12
PER_CLASS = torch.linspace(0.3, 2.0, CLASSES, dtype=torch.float64)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    return losses.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **options)


def linear_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The three results as one tensor."""
    return torch.stack(losses.linear_log_probs(input, linear_weight, target, linear_bias=linear_bias, **options))


def linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    heads = student_input, student_weight, teacher_input, teacher_weight
    return losses.linear_jsd(*heads, target, student_bias=student_bias, teacher_bias=teacher_bias, **options)


def head_tensors(
    *leading: int, classes: tuple[int, ...] = (CLASSES,), bias: bool = False, ignored: bool = True
) -> tuple[Tensor, ...]:
    """Hidden states (..., D), a weight (C, ..., D), labels with every sixth ignored, and a bias if asked for."""
    generator = torch.Generator().manual_seed(sum(leading) + sum(classes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(classes[0], (*leading, *classes[1:]), generator=generator)
    if ignored and labels.ndim > 0:
        labels.view(-1)[::6] = IGNORED
    tensors = normal(*leading, FEATURES), normal(*classes, FEATURES), labels
    return (*tensors, normal(*classes)) if bias else tensors


def probability_tensors(*leading: int) -> tuple[Tensor, ...]:
    """The same with class probabilities."""
    input, weight, _, bias = head_tensors(*leading, bias=True)
    return input, weight, torch.softmax(input @ weight.t() / 2, dim=-1).flip(0), bias


# Small enough for several chunks: 64 rows at least go into one.
SEVERAL_CHUNKS = {"max_workspace_mb": 1e-3}


def _chunked() -> tuple[Tensor, ...]:
    return head_tensors(100, bias=True)


def _cross_entropy_samples() -> list[Sample]:
    rows, biased = head_tensors(ROWS), head_tensors(ROWS, bias=True)
    row_weight = torch.linspace(0.0, 2.0, ROWS, dtype=torch.float64)
    every = {"weight": PER_CLASS, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "temperature": 2.0}
    mostly_ignored = head_tensors(100, bias=True)
    mostly_ignored[2][torch.arange(100) % 5 != 0] = IGNORED
    return [
        *(Sample(reduction, rows, {"reduction": reduction}) for reduction in ("mean", "sum", "none")),
        *(Sample(f"bias_{r}", biased, {"reduction": r}) for r in ("mean", "none")),
        *(Sample(f"chunks_{r}", _chunked(), {"reduction": r, **SEVERAL_CHUNKS}) for r in ("mean", "none")),
        Sample("recomputed", _chunked(), {**every, **SEVERAL_CHUNKS, "recompute": True}, {"normalizer": 7.0}),
        Sample("smoothing", biased, {"label_smoothing": 0.1}),
        Sample("weight", biased, {"weight": PER_CLASS}),
        Sample("z_loss", biased, {"z_loss": 1e-2}),
        Sample("softcap", biased, {"softcap": 4.0}),
        Sample("sample_weight", rows, {}, {"sample_weight": row_weight}),
        Sample("normalizer", rows, {}, {"normalizer": 7.0}),
        *(
            Sample(f"everything_{r}", biased, {**every, "reduction": r}, {"sample_weight": row_weight})
            for r in ("mean", "none")
        ),
        *(Sample(f"probabilities_{r}", probability_tensors(ROWS), {"reduction": r}) for r in ("mean", "none")),
        Sample("probabilities_everything", probability_tensors(ROWS), every, {"sample_weight": row_weight}),
        *(Sample(f"mostly_ignored_{r}", mostly_ignored, {"reduction": r}) for r in ("mean", "none")),
        Sample("unbatched", head_tensors(bias=True)),
        Sample("sequence", head_tensors(3, 7, bias=True)),
        Sample("sequence_none", head_tensors(3, 7), {"reduction": "none"}),
        # Enough rows that the reference's error, which is the budget, is no accident of a few roundings.
        Sample("sequence_probabilities", probability_tensors(5, 8)),
        Sample("dimensions", head_tensors(6, classes=(5, 3, 2), bias=True)),
        Sample("dimensions_none", head_tensors(6, classes=(5, 3)), {"reduction": "none", "label_smoothing": 0.1}),
        Sample("one_class", head_tensors(4, classes=(1,))),
        Sample("transposed", (rows[0], rows[1].t().contiguous().t(), rows[2])),
        Sample("all_ignored_sum", (*rows[:2], torch.full((ROWS,), IGNORED)), {"reduction": "sum"}),
        Sample("all_ignored_mean", (*rows[:2], torch.full((ROWS,), IGNORED))),
        Sample("empty_mean", head_tensors(0, bias=True)),
        Sample("empty_sum", head_tensors(0, bias=True), {"reduction": "sum"}),
        Sample("empty_none", head_tensors(0), {"reduction": "none"}),
    ]


def _log_prob_samples() -> list[Sample]:
    mostly_ignored = head_tensors(100, bias=True)
    mostly_ignored[2][torch.arange(100) % 5 != 0] = IGNORED
    return [
        Sample("rows", head_tensors(ROWS)),
        Sample("bias", head_tensors(ROWS, bias=True)),
        Sample("softcap", head_tensors(ROWS, bias=True), {"softcap": 4.0, "temperature": 2.0}),
        Sample("chunks", _chunked(), SEVERAL_CHUNKS),
        Sample("mostly_ignored", mostly_ignored),
        Sample("sequence", head_tensors(3, 7, bias=True)),
        Sample("unbatched", head_tensors(bias=True)),
        Sample("one_class", head_tensors(4, classes=(1,))),
        Sample("empty", head_tensors(0, bias=True)),
    ]


def two_heads(*leading: int, bias: bool = False) -> tuple[Tensor, ...]:
    """A student and a teacher of another width, labels, and biases if asked for."""
    input, weight, labels, student_bias = head_tensors(*leading, bias=True)
    generator = torch.Generator().manual_seed(1)
    shapes = ((*leading, FEATURES + 3), (CLASSES, FEATURES + 3), (CLASSES,))
    teacher = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return (input, weight, *teacher[:2], labels, *((student_bias, teacher[2]) if bias else ()))


def _jsd_samples() -> list[Sample]:
    rows, biased = two_heads(ROWS), two_heads(ROWS, bias=True)
    row_weight = torch.linspace(0.0, 2.0, ROWS, dtype=torch.float64)
    mixed = {"hard_weight": 0.5, "soft_weight": 0.7, "temperature": 2.0}
    return [
        *(Sample(reduction, rows, {"reduction": reduction}) for reduction in ("mean", "sum", "none")),
        Sample("bias", biased),
        *(Sample(f"beta-{beta}", biased, {"beta": beta}) for beta in (0.0, 0.1, 1.0)),
        *(Sample(f"mixed_{r}", biased, {**mixed, "reduction": r}) for r in ("mean", "none")),
        Sample("sample_weight", biased, mixed, {"sample_weight": row_weight}),
        Sample("normalizer", rows, {}, {"normalizer": 7.0}),
        *(
            Sample(f"chunks_{r}", two_heads(100, bias=True), {**mixed, **SEVERAL_CHUNKS, "reduction": r})
            for r in ("sum", "none")
        ),
        Sample("without_labels", rows[:4]),
        Sample("sequence", two_heads(3, 7)),
        Sample("empty", two_heads(0), {"reduction": "sum"}),
    ]


def _jsd_errors() -> list[ErrorSample]:
    student, weight, teacher, teacher_weight, labels = two_heads(4)

    def error(name: str, tensors: tuple[Tensor, ...], kind: type[Exception], match: str, **options: Any) -> ErrorSample:
        return ErrorSample(Sample(name, tensors, options), kind, match)

    heads = student, weight, teacher, teacher_weight
    return [
        error("vocabularies", (student, weight, teacher, teacher_weight[:5]), RuntimeError, "vocabularies"),
        error("features", (student[:, :3], *heads[1:]), RuntimeError, "last dimension"),
        error("leading", (student, weight, teacher[:3], teacher_weight), RuntimeError, "leading dimensions"),
        error("no_labels", heads, ValueError, "pass target", hard_weight=1.0),
        error("label", (*heads, torch.full((4,), CLASSES)), IndexError, "out of bounds"),
        error("beta", (*heads, labels), ValueError, "beta", beta=-0.1),
        error("temperature", (*heads, labels), ValueError, "temperature", temperature=0.0),
        error("reduction", (*heads, labels), ValueError, "reduction", reduction="median"),
    ]


def _head_errors() -> list[ErrorSample]:
    input, weight, labels, bias = head_tensors(4, classes=(3,), bias=True, ignored=False)

    def error(name: str, tensors: tuple[Tensor, ...], kind: type[Exception], match: str, **options: Any) -> ErrorSample:
        return ErrorSample(Sample(name, tensors, options), kind, match)

    return [
        error("features", (input[:, :5], weight, labels), RuntimeError, "last dimension.*5 and 8"),
        error("flat_weight", (input, weight.flatten(), labels), RuntimeError, "FSDP.*LinearCrossEntropyHead"),
        error(
            "empty_weight", (input, weight.new_empty(0), labels), RuntimeError, "empty.*ZeRO.*LinearCrossEntropyHead"
        ),
        error("no_features", (input[0, 0], weight, labels), RuntimeError, "feature dimension"),
        error("bias_shape", (input, weight, labels, bias[:2]), RuntimeError, r"linear_bias must have the shape \(3,\)"),
        error("weight_dtype", (input, weight.int(), labels), RuntimeError, "one dtype"),
        error("bias_dtype", (input, weight, labels, bias.int()), RuntimeError, "one dtype"),
        error("device", (input, weight.to("meta"), labels), RuntimeError, "device"),
        error("batch_size", (input, weight, labels[:3]), ValueError, "batch_size"),
        error("leading", (input.view(2, 2, -1), weight, labels), ValueError, "leading dimensions"),
        error("too_large", (input, weight, torch.full((4,), 3)), IndexError, "out of bounds"),
        error("negative", (input, weight, torch.full((4,), -1)), IndexError, "out of bounds"),
        error("int32", (input, weight, labels.int()), RuntimeError, "int64"),
        error("temperature", (input, weight, labels), ValueError, "temperature", temperature=0.0),
        error("softcap", (input, weight, labels), ValueError, "softcap", softcap=-1.0),
        error("workspace", (input, weight, labels), ValueError, "max_workspace_mb", max_workspace_mb=0.0),
    ]


def _cross_entropy_errors() -> list[ErrorSample]:
    input, weight, labels = head_tensors(4, classes=(3,), ignored=False)
    probabilities = torch.softmax(input @ weight.t(), dim=1)
    cube = head_tensors(2, 2, classes=(3,))[0], weight.view(3, 1, -1), labels.view(2, 2)

    def error(name: str, tensors: tuple[Tensor, ...], kind: type[Exception], match: str, **options: Any) -> ErrorSample:
        return ErrorSample(Sample(name, tensors, options), kind, match)

    return [
        *_head_errors(),
        error("reduction", (input, weight, labels), ValueError, "reduction", reduction="median"),
        error("smoothing", (input, weight, labels), RuntimeError, "label_smoothing", label_smoothing=1.5),
        error("z_loss", (input, weight, labels), ValueError, "z_loss", z_loss=-1.0),
        error("ignored_probabilities", (input, weight, probabilities), RuntimeError, "ignore_index", ignore_index=1),
        error("dimensions", cube, RuntimeError, "K-dimensional"),
        error("stats", (input, weight, probabilities), ValueError, "return_stats", return_stats=True),
        ErrorSample(
            Sample("normalizer_of_sum", (input, weight, labels), {"reduction": "sum"}, {"normalizer": 2.0}),
            ValueError,
            "normalizer",
        ),
        ErrorSample(
            Sample("sample_weight_shape", (input, weight, labels), {}, {"sample_weight": torch.ones(3).double()}),
            ValueError,
            "sample_weight",
        ),
    ]


_DTYPES = (torch.float32, torch.bfloat16)


def _bench(
    rows: int, features: int, classes: int, peak: float = 0.0
) -> Callable[[torch.dtype, str], tuple[Tensor, ...]]:
    """Drawn on the device: logits of unit variance, and those of the labels larger by about ``peak``."""

    def make(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        input = torch.randn(rows, features, generator=generator, device=device)
        weight = torch.randn(classes, features, generator=generator, device=device) * features**-0.5
        labels = torch.randint(classes, (rows,), generator=generator, device=device)
        if peak:
            input += peak * weight[labels]
        return input.to(dtype), weight.to(dtype), labels

    return make


def _bench_of_two(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    student, teacher = _bench(2048, 512, 32000)(dtype, device), _bench(2048, 512, 32000)(dtype, device)
    return *student[:2], *(tensor * 1.1 for tensor in teacher[:2]), student[2]


def _benches(products: int) -> tuple[Bench, ...]:
    def bench(*shape: int, peak: float = 0.0, **rest: Any) -> Bench:
        name = "x".join(map(str, shape)) + (" peaked" if peak else "")
        return Bench(name, _bench(*shape, peak=peak), products=products, differentiable=(0, 1), **rest)

    on_gpu: dict[str, Any] = {"dtypes": (torch.bfloat16,), "devices": ("cuda",)}
    return (
        bench(2048, 512, 32000, dtypes=_DTYPES),
        bench(1024, 256, 128256, dtypes=_DTYPES),
        bench(8192, 4096, 128256, **on_gpu),
        bench(8192, 4096, 128256, peak=30.0, **on_gpu),
    )


SPECS = (
    LossSpec(
        loss=losses.LinearCrossEntropyLoss,
        function=linear_cross_entropy,
        family="linear",
        summary="cross entropy from hidden states and a head's weight, without its logits",
        samples=_cross_entropy_samples,
        errors=_cross_entropy_errors,
        benches=_benches(3),
    ),
    LossSpec(
        loss=losses.LinearCrossEntropyLoss,
        function=linear_log_probs,
        family="linear",
        summary="log-probability, log-sum-exp and entropy of every token, likewise",
        samples=_log_prob_samples,
        errors=_head_errors,
        benches=_benches(4),
    ),
    LossSpec(
        loss=losses.LinearJSDLoss,
        function=linear_jsd,
        family="linear",
        summary="Jensen-Shannon divergence over two heads, with hard labels if asked for",
        samples=_jsd_samples,
        errors=_jsd_errors,
        benches=(
            Bench("2048x512x32000", _bench_of_two, (torch.float32, torch.bfloat16), products=4, differentiable=(0, 1)),
        ),
    ),
)
