"""Specs of the softmax losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import softmax as losses
from ._spec import Bench, ErrorSample, LossSpec, Sample, repeated

IGNORED = -100
PER_CLASS = torch.linspace(0.3, 2.0, 37, dtype=torch.float64)


def label_pair(*shape: int, ignored: bool = True, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits of a shape (N, C, ...) and labels, every sixth ignored."""
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    labels_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    labels = torch.randint(0, max(1, shape[min(1, len(shape) - 1)]), labels_shape, generator=generator)
    if ignored and labels.ndim > 0:
        labels.view(-1)[::6] = IGNORED
    return logits, labels


def probability_pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Logits and class probabilities of a shape (N, C, ...)."""
    logits, _ = label_pair(*shape)
    return logits, torch.softmax(logits.flip(0), dim=1 if len(shape) > 1 else 0)


def _peaked() -> tuple[Tensor, Tensor]:
    """Rows whose labels have a probability of 1 - 1e-6 and of 1e-6."""
    logits, labels = label_pair(12, 37, ignored=False, scale=0.1)
    logits[torch.arange(0, 12, 2), labels[::2]] += 17.5
    logits[torch.arange(1, 12, 2), (labels[1::2] + 1) % 37] += 17.5
    return logits, labels


def _samples() -> list[Sample]:
    labels, probabilities, image = label_pair(12, 37), probability_pair(12, 37), label_pair(2, 5, 6, 7)
    row_weight = torch.linspace(0.0, 2.0, 12, dtype=torch.float64)
    every: dict[str, Any] = {"weight": PER_CLASS, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}
    return [
        *(Sample(reduction, labels, {"reduction": reduction}) for reduction in ("mean", "sum", "none")),
        *(Sample(f"smoothing_{r}", labels, {"label_smoothing": 0.1, "reduction": r}) for r in ("mean", "none")),
        *(Sample(f"weight_{r}", labels, {"weight": PER_CLASS, "reduction": r}) for r in ("mean", "sum", "none")),
        Sample("weight_smoothing", labels, {"weight": PER_CLASS, "label_smoothing": 0.2}),
        Sample("smoothing_only", labels, {"label_smoothing": 1.0}),
        Sample("ignore_index", (labels[0], labels[1].clamp(min=0)), {"ignore_index": 3}),
        Sample("z_loss", labels, {"z_loss": 1e-2}),
        Sample("softcap", labels, {"softcap": 4.0}),
        Sample("temperature", labels, {"temperature": 0.5}),
        Sample("sample_weight", labels, {}, {"sample_weight": row_weight}),
        Sample("normalizer", labels, {}, {"normalizer": 7.0}),
        *(
            Sample(
                f"everything_{r}",
                labels,
                {**every, "temperature": 2.0, "reduction": r},
                {"sample_weight": row_weight},
            )
            for r in ("mean", "sum", "none")
        ),
        *(Sample(f"probabilities_{r}", probabilities, {"reduction": r}) for r in ("mean", "sum", "none")),
        *(
            Sample(
                f"probabilities_everything_{r}",
                probabilities,
                {**every, "reduction": r},
                {"sample_weight": row_weight},
            )
            for r in ("mean", "none")
        ),
        Sample("vector", label_pair(11)),
        Sample("vector_probabilities", probability_pair(11)),
        Sample("one_class", label_pair(4, 1)),
        Sample("one_row", label_pair(1, 9, ignored=False)),
        Sample("image", image),
        Sample("image_none", image, {"reduction": "none", "label_smoothing": 0.1}),
        Sample("image_everything", image, {**every, "weight": PER_CLASS[:5]}),
        Sample("image_probabilities", probability_pair(2, 5, 6, 7)),
        Sample("image_channels_last", (image[0].to(memory_format=torch.channels_last), image[1])),
        Sample("sequence", label_pair(3, 8, 10)),
        Sample("classes_last_view", (label_pair(3, 10, 8)[0].transpose(1, 2), label_pair(3, 8, 10)[1])),
        Sample("transposed", (label_pair(37, 12)[0].t(), labels[1])),
        Sample("sliced", (label_pair(24, 111)[0][::2, ::3], labels[1])),
        Sample("permuted_image", (label_pair(2, 7, 6, 5)[0].permute(0, 3, 1, 2), label_pair(2, 5, 7, 6)[1])),
        Sample("wide_image", label_pair(2, 5, 70, 90), {"label_smoothing": 0.1}),
        Sample("wide", label_pair(3, 9001, ignored=False)),
        Sample("peaked", _peaked()),
        Sample("offset", (labels[0] + 2.0**10, labels[1])),
        Sample("all_ignored_sum", (labels[0], torch.full((12,), IGNORED)), {"reduction": "sum"}),
        Sample("all_ignored_mean", (labels[0], torch.full((12,), IGNORED))),
        Sample("empty_mean", (labels[0][:0], labels[1][:0])),
        Sample("empty_sum", (labels[0][:0], labels[1][:0]), {"reduction": "sum"}),
        Sample("empty_none", (labels[0][:0], labels[1][:0]), {"reduction": "none"}),
    ]


def _errors() -> list[ErrorSample]:
    logits, labels = label_pair(4, 3, ignored=False)
    _, probabilities = probability_pair(4, 3)

    def error(name: str, tensors: tuple[Tensor, ...], kind: type[Exception], match: str, **options: Any) -> ErrorSample:
        return ErrorSample(Sample(name, tensors, options), kind, match)

    return [
        error("reduction", (logits, labels), ValueError, "reduction", reduction="median"),
        error("batch_size", (logits, labels[:3]), ValueError, "batch_size"),
        error("spatial", (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 4).long()), RuntimeError, "shape|size"),
        error("classes_last", (torch.zeros(2, 5, 3), torch.zeros(2, 5).long()), RuntimeError, "shape|size"),
        error("no_classes", (torch.tensor(1.0), torch.tensor(0)), RuntimeError, "class"),
        error("int32", (logits, labels.int()), RuntimeError, "int64|Long"),
        error("float_labels", (logits, labels.double()), RuntimeError, "int64|Long"),
        error("integer_probabilities", (logits, torch.ones(4, 3).long()), RuntimeError, "floating"),
        error("integer_logits", (torch.ones(4, 3).long(), labels), NotImplementedError, "not implemented"),
        error("too_large", (logits, torch.full((4,), 3)), IndexError, "out of bounds"),
        error("negative", (logits, torch.full((4,), -1)), IndexError, "out of bounds"),
        error("zero_classes", (torch.zeros(2, 0), torch.zeros(2).long()), IndexError, "out of bounds"),
        error("smoothing", (logits, labels), RuntimeError, "label_smoothing", label_smoothing=1.5),
        error("weight_length", (logits, labels), RuntimeError, "weight", weight=torch.ones(2).double()),
        error(
            "weight_dtype",
            (logits, labels),
            RuntimeError,
            "weight|scalar type",
            weight=torch.ones(3).half().long(),
        ),
        error("ignored_probabilities", (logits, probabilities), RuntimeError, "ignore_index", ignore_index=1),
        error("device", (logits, labels.to("meta")), RuntimeError, "device"),
        error("softcap", (logits, labels), ValueError, "softcap", softcap=-1.0),
        error("temperature", (logits, labels), ValueError, "temperature", temperature=0.0),
        error("z_loss", (logits, labels), ValueError, "z_loss", z_loss=-1.0),
        ErrorSample(
            Sample("sample_weight_shape", (logits, labels), {}, {"sample_weight": torch.ones(3).double()}),
            ValueError,
            "sample_weight",
        ),
    ]


def _bench(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensor, ...]]:
    def make(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        logits, labels = label_pair(*shape, ignored=False)
        return logits.to(device, dtype), labels.to(device)

    return make


_LARGE = (torch.float32, torch.bfloat16)
SPECS = (
    LossSpec(
        loss=losses.CrossEntropyLoss,
        family="softmax",
        summary="cross entropy of logits, with z-loss, softcap and temperature",
        original=nn.CrossEntropyLoss,
        samples=_samples,
        errors=_errors,
        benches=(
            Bench("2048x32000", _bench(2048, 32000), _LARGE),
            Bench("8192x128256", repeated(_bench(512, 128256), 16), _LARGE, devices=("cuda",)),
            Bench("8x21x512x512", _bench(8, 21, 512, 512)),
            Bench("128x10", _bench(128, 10)),
            Bench("4x4", _bench(4, 4)),
        ),
    ),
)
