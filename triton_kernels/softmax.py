"""The softmax family. A program takes a tile of rows and runs over their classes in blocks.

Where classes are adjacent in memory a tile is one row and long blocks; where pixels are, it is many rows and short
blocks: the same kernels, coalesced either way.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl

from .numerics import expm1, log1p, over, tanh
from .sums import SUM_BLOCK, few_sums


@triton.jit
def transform(x, softcap, temperature, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = softcap * tanh(x / softcap)
    return over(x, temperature)


@triton.jit
def row_offsets(row, pixels, stride_outer, stride_pixel):
    return (row // pixels) * stride_outer + (row % pixels) * stride_pixel


@triton.jit
def load_factors(
    target,
    weight,
    offsets,
    columns,
    stride_class,
    mask,
    classes,
    smoothing,
    accumulate: tl.constexpr,
    LABELS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Smoothed target probabilities times class weights; for labels only what smoothing spreads. # (R, B)"""
    share = smoothing / classes
    if LABELS:
        factors = tl.where(mask, share, 0.0)
    else:
        t = tl.load(target + offsets[:, None] + columns[None, :] * stride_class, mask=mask, other=0.0)
        factors = tl.where(mask, t.to(accumulate) * (1.0 - smoothing) + share, 0.0)
    if HAS_WEIGHT:
        factors *= tl.load(weight + columns, mask=columns < classes, other=0.0)[None, :]
    return factors


@triton.jit
def forward_kernel(
    logits,
    target,
    weight,
    sample_weight,
    losses,
    stats,
    rows,
    classes,
    pixels,
    stride_outer,
    stride_class,
    stride_pixel,
    target_outer,
    target_class,
    target_pixel,
    ignore_index,
    smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    LABELS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SAMPLE_WEIGHT: tl.constexpr,
    SPREADS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REDUCE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum, log-sum and loss of each row of a tile; or, of losses, what the tile adds to them and to the mean's
    denominator."""
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    smoothing, z_loss = tl.cast(smoothing, accumulate), tl.cast(z_loss, accumulate)
    softcap, temperature = tl.cast(softcap, accumulate), tl.cast(temperature, accumulate)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    offsets = row_offsets(row, pixels, stride_outer, stride_pixel)
    target_offsets = row_offsets(row, pixels, target_outer, target_pixel)
    maximum = tl.full((ROWS,), float("-inf"), accumulate)
    top = tl.zeros((ROWS,), accumulate)
    rest = tl.zeros((ROWS,), accumulate)
    gap = tl.zeros((ROWS,), accumulate)
    spread = tl.zeros((ROWS,), accumulate)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = inside[:, None] & (columns < classes)[None, :]
        x = tl.load(logits + offsets[:, None] + columns[None, :] * stride_class, mask=mask, other=float("-inf"))
        z = transform(x.to(accumulate), softcap, temperature, SOFTCAP)
        z = tl.where(mask, z, float("-inf"))
        larger = tl.maximum(maximum, tl.max(z, axis=1))
        # A row of nothing but -inf so far: exp(-inf) = 0 is added, and a NaN stays one.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        grown = larger > maximum
        rest = tl.where(grown, (rest + top) * tl.exp(maximum - reference), rest)
        top = tl.where(grown, 0.0, top)
        is_top = tl.where(z == reference[:, None], 1.0, 0.0)
        top += tl.sum(is_top, axis=1)
        # Terms below the rounding of 1 must not be added to the maximum's 1: they are summed apart.
        rest += tl.sum(tl.exp(z - reference[:, None]) - is_top, axis=1)
        if SPREADS:
            factors = load_factors(
                target, weight, target_offsets, columns, target_class, mask, classes, smoothing, accumulate,
                LABELS, HAS_WEIGHT,
            )  # fmt: skip
            gap += tl.where(grown & (spread != 0), (larger - maximum) * spread, 0.0)
            gap += tl.sum(tl.where(mask, factors * (larger[:, None] - z), 0.0), axis=1)
            spread += tl.sum(factors, axis=1)
        maximum = larger
    log_sum = tl.where(maximum == float("-inf"), float("nan"), log1p(rest + (top - 1.0)))
    loss = gap + spread * log_sum if SPREADS else tl.zeros((ROWS,), accumulate)
    counted = tl.full((ROWS,), 1.0, accumulate)
    ignored = row < 0
    if LABELS:
        label = tl.load(target + row, mask=inside, other=0)
        ignored = label == ignore_index
        valid = inside & (label >= 0) & (label < classes)
        x = tl.load(logits + offsets + label * stride_class, mask=valid, other=float("nan"))
        z = transform(x.to(accumulate), softcap, temperature, SOFTCAP)
        if HAS_WEIGHT:
            counted = tl.load(weight + label, mask=valid, other=0.0)
        loss += (1.0 - smoothing) * counted * ((maximum - z) + log_sum)
        loss = tl.where(valid, loss, float("nan"))
    log_sum_exp = maximum + log_sum
    loss += tl.where(z_loss == 0, 0.0, z_loss * log_sum_exp * log_sum_exp)
    if HAS_SAMPLE_WEIGHT:
        loss *= tl.load(sample_weight + row, mask=inside, other=0.0)
    loss, counted = tl.where(ignored, 0.0, loss), tl.where(ignored, 0.0, counted)
    if REDUCE:
        tl.store(losses + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0)))
        tl.store(losses + tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(inside, counted, 0.0)))
    else:
        tl.store(losses + row, loss.to(losses.dtype.element_ty), mask=inside)
    tl.store(stats + row, tl.where(ignored, 0.0, maximum), mask=inside)
    tl.store(stats + rows + row, tl.where(ignored, 0.0, log_sum), mask=inside)


@triton.jit
def finish_kernel(partial, stats, loss, count, rows, REDUCTION: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds what the tiles add to the loss and to its denominator. # partial (2, count)"""
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    total = tl.zeros((BLOCK,), accumulate)
    counted = tl.zeros((BLOCK,), accumulate)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partial + index, mask=index < count, other=0.0)
        counted += tl.load(partial + count + index, mask=index < count, other=0.0)
    result = tl.sum(total)
    denominator = tl.sum(counted) if REDUCTION == "mean" else tl.full((), 1.0, accumulate)
    tl.store(stats + 2 * rows, denominator)
    tl.store(loss, (result / denominator).to(loss.dtype.element_ty))


@triton.jit
def backward_kernel(
    grad_output,
    logits,
    target,
    weight,
    sample_weight,
    stats,
    out,
    rows,
    classes,
    pixels,
    stride_outer,
    stride_class,
    stride_pixel,
    target_outer,
    target_class,
    target_pixel,
    out_outer,
    out_class,
    out_pixel,
    ignore_index,
    smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    LABELS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SAMPLE_WEIGHT: tl.constexpr,
    SPREADS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REDUCED: tl.constexpr,
    OF_TARGET: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the rows of a tile with respect to the logits, or to the class probabilities."""
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    smoothing, z_loss = tl.cast(smoothing, accumulate), tl.cast(z_loss, accumulate)
    softcap, temperature = tl.cast(softcap, accumulate), tl.cast(temperature, accumulate)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    offsets = row_offsets(row, pixels, stride_outer, stride_pixel)
    target_offsets = row_offsets(row, pixels, target_outer, target_pixel)
    out_offsets = row_offsets(row, pixels, out_outer, out_pixel)
    maximum = tl.load(stats + row, mask=inside, other=0.0)
    log_sum = tl.load(stats + rows + row, mask=inside, other=0.0)
    k = tl.load(grad_output + (row * 0 if REDUCED else row), mask=inside, other=0.0).to(accumulate)
    k = k / tl.load(stats + 2 * rows)
    if not OF_TARGET:
        k = k / temperature  # once a row, not once a class
    if HAS_SAMPLE_WEIGHT:
        k *= tl.load(sample_weight + row, mask=inside, other=0.0)
    ignored = row < 0
    label = tl.full((ROWS,), -1, tl.int64)
    label_factor = tl.zeros((ROWS,), accumulate)
    if LABELS:
        label = tl.load(target + row, mask=inside, other=0)
        ignored = label == ignore_index
        valid = inside & (label >= 0) & (label < classes)
        label_factor = tl.where(valid, 1.0 - smoothing, float("nan"))
        if HAS_WEIGHT:
            label_factor *= tl.load(weight + label, mask=valid, other=0.0)
    spread = tl.zeros((ROWS,), accumulate)
    if SPREADS and not OF_TARGET:
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK).to(tl.int64)
            mask = inside[:, None] & (columns < classes)[None, :]
            spread += tl.sum(
                load_factors(
                    target, weight, target_offsets, columns, target_class, mask, classes, smoothing, accumulate,
                    LABELS, HAS_WEIGHT,
                ),
                axis=1,
            )  # fmt: skip
    excess = k * (spread + 2.0 * z_loss * (maximum + log_sum))
    label_factor *= k
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = inside[:, None] & (columns < classes)[None, :]
        x = tl.load(logits + offsets[:, None] + columns[None, :] * stride_class, mask=mask, other=0.0)
        z = transform(x.to(accumulate), softcap, temperature, SOFTCAP)
        log_p = (z - maximum[:, None]) - log_sum[:, None]
        if OF_TARGET:
            result = -k[:, None] * (1.0 - smoothing) * log_p
            if HAS_WEIGHT:
                result *= tl.load(weight + columns, mask=columns < classes, other=0.0)[None, :]
        else:
            # At the label, p - 1 comes from expm1: it must not cancel where p is near 1.
            at_label = columns[None, :] == label[:, None]
            result = excess[:, None] * tl.exp(log_p)
            result += label_factor[:, None] * tl.where(at_label, expm1(log_p), tl.exp(log_p))
            if SPREADS:
                result -= k[:, None] * load_factors(
                    target, weight, target_offsets, columns, target_class, mask, classes, smoothing, accumulate,
                    LABELS, HAS_WEIGHT,
                )  # fmt: skip
            result = tl.where(ignored[:, None], 0.0, result)
            if SOFTCAP:
                capped = z * temperature / softcap
                result *= tl.where(ignored[:, None], 0.0, 1.0 - capped * capped)
                result = tl.where(ignored[:, None], 0.0, result)
        place = out + out_offsets[:, None] + columns[None, :] * out_class
        tl.store(place, result.to(out.dtype.element_ty), mask=mask)


def class_strides(tensor):
    """(outer, class, pixel) strides and the number of pixels, or None where row dimensions do not merge so."""
    if tensor.ndim == 1:
        return (0, tensor.stride(0), 0), 1
    if tensor.ndim == 2:
        return (tensor.stride(0), tensor.stride(1), 0), 1
    sizes, strides = tensor.shape[2:], tensor.stride()[2:]
    kept = [(size, stride) for size, stride in zip(sizes, strides) if size != 1]
    for (_, outer), (size, inner) in pairwise(kept):
        if outer != size * inner:
            return None
    pixels = 1
    for size in sizes:
        pixels *= size
    return (tensor.stride(0), tensor.stride(1), kept[-1][1] if kept else 0), pixels


def mergeable(tensor):
    """The tensor, or a contiguous copy where its row dimensions do not merge."""
    return tensor if class_strides(tensor) is not None else tensor.contiguous()


def tile_of(classes, class_stride):
    """Rows and classes of a tile, by static rules: long blocks along classes, or many rows along pixels."""
    if class_stride == 1 and classes > 64:
        return 1, min(4096, triton.next_power_of_2(classes))
    return 64, min(16, triton.next_power_of_2(max(classes, 1)))


def shared_arguments(logits, target, weight, sample_weight, label_smoothing, softcap):
    """What forward and backward kernels are specialised and strided by."""
    labels = target.dtype == torch.int64
    strides, pixels = class_strides(logits)
    target_strides = (0, 0, 0) if labels else class_strides(target)[0]
    classes = logits.shape[0 if logits.ndim == 1 else 1]
    rows_in_tile, block = tile_of(classes, strides[1])
    constants = {
        "LABELS": labels,
        "HAS_WEIGHT": weight is not None,
        "HAS_SAMPLE_WEIGHT": sample_weight is not None,
        "SPREADS": not labels or label_smoothing > 0,
        "SOFTCAP": softcap > 0,
        "WIDE": logits.dtype == torch.float64,
        "ROWS": rows_in_tile,
        "BLOCK": block,
        "num_warps": 8 if block >= 2048 else 4,
    }
    return classes, pixels, strides, target_strides, constants


def cross_entropy_forward(
    logits, target, weight, sample_weight, reduction, ignore_index, label_smoothing, z_loss, softcap, temperature,
    out_dtype,
):  # fmt: skip
    """The loss and the statistics of every row; arguments as the operator's."""
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    label_shape = logits.shape[:1] + logits.shape[2:] if logits.ndim > 1 else ()
    logits, target = mergeable(logits), target.contiguous() if target.dtype == torch.int64 else mergeable(target)
    classes, pixels, strides, target_strides, constants = shared_arguments(
        logits, target, weight, sample_weight, label_smoothing, softcap
    )
    rows = torch.Size(label_shape).numel()
    stats = logits.new_empty(2 * rows + 1, dtype=accumulate)
    tiles, reduce = triton.cdiv(rows, constants["ROWS"]), reduction != "none"
    losses = (
        logits.new_empty((2, tiles), dtype=accumulate) if reduce else logits.new_empty(label_shape, dtype=out_dtype)
    )
    if rows > 0:
        forward_kernel[(tiles,)](
            logits, target, weight, sample_weight, losses, stats, rows, classes, pixels, *strides, *target_strides,
            ignore_index, label_smoothing, z_loss, softcap, temperature, REDUCE=reduce, **constants,
        )  # fmt: skip
    if not reduce:
        stats[-1:].fill_(1.0)
        return losses, stats
    loss, partial = logits.new_empty((), dtype=out_dtype), few_sums(losses)
    finish_kernel[(1,)](
        partial, stats, loss, partial.shape[1], rows, REDUCTION=reduction, WIDE=constants["WIDE"], BLOCK=SUM_BLOCK,
        num_warps=8,
    )  # fmt: skip
    return loss, stats


def launch_backward(
    out, of_target, grad_output, logits, target, weight, sample_weight, stats, reduction, ignore_index,
    label_smoothing, z_loss, softcap, temperature,
):  # fmt: skip
    """Writes a gradient into out, whose row dimensions merge."""
    logits, target = mergeable(logits), target.contiguous() if target.dtype == torch.int64 else mergeable(target)
    classes, pixels, strides, target_strides, constants = shared_arguments(
        logits, target, weight, sample_weight, label_smoothing, softcap
    )
    rows = stats.numel() // 2
    if rows > 0:
        backward_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
            grad_output.contiguous(), logits, target, weight, sample_weight, stats, out, rows, classes, pixels,
            *strides, *target_strides, *class_strides(out)[0], ignore_index, label_smoothing, z_loss, softcap,
            temperature, REDUCED=reduction != "none", OF_TARGET=of_target, **constants,
        )  # fmt: skip


def gradient_like(tensor, of_target, *arguments):
    """A gradient in torch.empty_like's layout."""
    out = torch.empty_like(tensor)
    if class_strides(out) is not None:
        launch_backward(out, of_target, *arguments)
        return out
    merged = tensor.new_empty(tensor.shape)
    launch_backward(merged, of_target, *arguments)
    return out.copy_(merged)


def cross_entropy_backward(grad_output, logits, *arguments):
    """The gradient with respect to the logits."""
    return gradient_like(logits, False, grad_output, logits, *arguments)


def cross_entropy_backward_(grad_output, logits, *arguments):
    """Writes the gradient over the logits."""
    if class_strides(logits) is None:
        logits.copy_(gradient_like(logits, False, grad_output, logits, *arguments))
    else:
        launch_backward(logits, False, grad_output, logits, *arguments)


def cross_entropy_with_gradient_(logits, target, weight, sample_weight, *options):
    """Losses of the rows; the logits become the gradient of their sum."""
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    arguments = (target, weight, sample_weight)
    loss, stats = cross_entropy_forward(logits, *arguments, "none", *options, accumulate)
    # The denominator of unreduced losses is a 1 that is on the device already.
    cross_entropy_backward_(stats[-1:].view(()), logits, *arguments, stats, "sum", *options)
    return loss


def cross_entropy_target_backward(grad_output, logits, target, *arguments):
    """The gradient with respect to the class probabilities."""
    return gradient_like(target, True, grad_output, logits, target, *arguments)
