"""What happens to a chunk of logits between two matrix products: a program to a row, in blocks of its classes."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .numerics import expm1, log1p
from .softmax import transform


@triton.jit
def statistics_kernel(
    logits,
    labels,
    factors,
    statistics,
    prediction,
    rows,
    classes,
    stride_row,
    softcap: tl.float64,
    temperature: tl.float64,
    HAS_FACTORS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum, log-sum, label's logit, gap and moment of a row, and the first place of its maximum."""
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    softcap, temperature = tl.cast(softcap, accumulate), tl.cast(temperature, accumulate)
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.full((), float("-inf"), accumulate)
    top = tl.zeros((), accumulate)
    rest = tl.zeros((), accumulate)
    moment = tl.zeros((), accumulate)
    gap = tl.zeros((), accumulate)
    spread = tl.zeros((), accumulate)
    first = tl.zeros((), tl.int64)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = columns < classes
        x = tl.load(logits + row * stride_row + columns, mask=mask, other=float("-inf")).to(accumulate)
        z = tl.where(mask, transform(x, softcap, temperature, SOFTCAP), float("-inf"))
        of_block = tl.max(z, axis=0)
        grown = of_block > maximum
        place = tl.min(tl.where(z == of_block, columns, classes), axis=0)
        first = tl.where(grown, place, first)
        larger = tl.maximum(maximum, of_block)
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        # Sums of before are relative to a maximum that was smaller by this step; of nothing, they are 0.
        some = grown & (top + rest > 0)
        step = tl.where(some, larger - maximum, 0.0)
        shrunk = tl.exp(-step)
        # A step from the lowest numbers, as masks have them, would overflow before it vanished.
        moment_then = tl.where(shrunk > 0, (moment + step * (top + rest)) * shrunk, 0.0)
        moment = tl.where(grown, moment_then, moment)
        gap += tl.where(grown & (spread != 0), (larger - maximum) * spread, 0.0)
        rest = tl.where(grown, (top + rest) * tl.exp(maximum - reference), rest)
        top = tl.where(grown, 0.0, top)
        is_top = tl.where(z == reference, 1.0, 0.0)
        e = tl.exp(z - reference)
        top += tl.sum(is_top, axis=0)
        rest += tl.sum(e - is_top, axis=0)
        moment += tl.sum(tl.where(e > 0, e * (reference - z), 0.0), axis=0)
        if HAS_FACTORS:
            f = tl.load(factors + columns, mask=mask, other=0.0)
            gap += tl.sum(tl.where(mask, f * (reference - z), 0.0), axis=0)
            spread += tl.sum(f, axis=0)
        maximum = larger
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < classes)
    x = tl.load(logits + row * stride_row + tl.where(inside, label, 0)).to(accumulate)
    label_logit = tl.where(inside, transform(x, softcap, temperature, SOFTCAP), 0.0)
    log_sum = tl.where(maximum == float("-inf"), float("nan"), log1p(rest + (top - 1.0)))
    tl.store(statistics + row, maximum)
    tl.store(statistics + rows + row, log_sum)
    tl.store(statistics + 2 * rows + row, label_logit)
    tl.store(statistics + 3 * rows + row, gap)
    tl.store(statistics + 4 * rows + row, moment / (top + rest))
    tl.store(prediction + row, first)


@triton.jit
def gradient_kernel(
    logits,
    labels,
    factors,
    statistics,
    coefficients,
    rows,
    classes,
    stride_row,
    softcap: tl.float64,
    temperature: tl.float64,
    HAS_FACTORS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p (excess + entropy log p) + label (p - 1 at the label, else p) - share f, over the logits."""
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    softcap, temperature = tl.cast(softcap, accumulate), tl.cast(temperature, accumulate)
    row = tl.program_id(0).to(tl.int64)
    maximum, log_sum = tl.load(statistics + row), tl.load(statistics + rows + row)
    of_row = coefficients + row
    excess, of_label = tl.load(of_row) / temperature, tl.load(of_row + rows) / temperature
    entropy, share = tl.load(of_row + 2 * rows) / temperature, tl.load(of_row + 3 * rows) / temperature
    is_zero = (excess == 0) & (of_label == 0) & (entropy == 0) & (share == 0)
    label = tl.load(labels + row)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = columns < classes
        x = tl.load(logits + row * stride_row + columns, mask=mask, other=0.0).to(accumulate)
        z = transform(x, softcap, temperature, SOFTCAP)
        log_p = (z - maximum) - log_sum
        p = libdevice.exp(log_p)  # tl.exp is off by a rounding of log_p, which labels' gradients would show
        result = p * (excess + tl.where(p > 0, entropy * log_p, 0.0))
        result += of_label * tl.where(columns == label, expm1(log_p), p)
        if HAS_FACTORS:
            result -= share * tl.load(factors + columns, mask=mask, other=0.0)
        if SOFTCAP:
            capped = z * temperature / softcap
            result *= 1.0 - capped * capped
        result = tl.where(is_zero, 0.0, result)
        tl.store(logits + row * stride_row + columns, result.to(logits.dtype.element_ty), mask=mask)


def constants(logits, factors, softcap):
    block = min(4096, triton.next_power_of_2(max(1, logits.shape[1])))
    return {
        "HAS_FACTORS": factors is not None,
        "SOFTCAP": softcap > 0,
        "WIDE": logits.dtype == torch.float64,
        "BLOCK": block,
        "num_warps": 8 if block >= 2048 else 4,
    }


def row_statistics(logits, labels, factors, softcap, temperature):
    """Five numbers for each row, and the class with the largest logit; arguments as the operator's."""
    rows, classes = logits.shape
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    statistics = logits.new_empty((5, rows), dtype=accumulate)
    prediction = logits.new_empty((rows,), dtype=torch.int64)
    if rows > 0 and classes > 0:
        statistics_kernel[(rows,)](
            logits, labels.contiguous(), factors, statistics, prediction, rows, classes, logits.stride(0), softcap,
            temperature, **constants(logits, factors, softcap),
        )  # fmt: skip
    return statistics, prediction


def row_gradient_(logits, labels, statistics, coefficients, factors, softcap, temperature):
    """Writes the gradient over the logits."""
    rows, classes = logits.shape
    if rows > 0 and classes > 0:
        gradient_kernel[(rows,)](
            logits, labels.contiguous(), factors, statistics, coefficients, rows, classes, logits.stride(0), softcap,
            temperature, **constants(logits, factors, softcap),
        )  # fmt: skip
