"""Statistics of rows straight from hidden states and a head: the logits of a tile never leave the chip.

A program takes a tile of rows and a segment of the classes, and keeps running statistics over the segment's tiles of
logits; a second kernel merges the segments of each row, in an order that never changes.
"""

import torch
import triton
import triton.language as tl

from .numerics import log1p
from .softmax import transform

PARTIALS = 5  # maximum, top, rest, moment, label's logit
MERGED_ROWS = 64
PROGRAMS = 512  # enough for any GPU's multiprocessors


@triton.jit
def moved(maximum, top, rest, moment, reference):
    """Sums that are relative to a maximum, relative to a reference that is at least as large."""
    some = top + rest > 0
    # Of nothing, sums are 0; and a NaN stays one.
    step = tl.where(some & (maximum > float("-inf")), reference - maximum, 0.0)
    shrunk = tl.exp(-step)
    # A step from the lowest numbers, as masks have them, would overflow before it vanished.
    moment = tl.where(step == 0, moment, tl.where(shrunk > 0, shrunk * (moment + step * (top + rest)), 0.0))
    rest = tl.where(step == 0, rest, shrunk * (top + rest))
    top = tl.where(step == 0, top, 0.0)
    return top, rest, moment


@triton.jit
def merged(maximum, top, rest, moment, maximum_2, top_2, rest_2, moment_2):
    """Statistics of two parts of a row as one."""
    larger = tl.maximum(maximum, maximum_2)
    reference = tl.where(larger == float("-inf"), 0.0, larger)
    top, rest, moment = moved(maximum, top, rest, moment, reference)
    top_2, rest_2, moment_2 = moved(maximum_2, top_2, rest_2, moment_2, reference)
    return larger, top + top_2, rest + rest_2, moment + moment_2


@triton.jit
def segment_kernel(
    input,
    weight,
    bias,
    labels,
    partials,
    places,
    rows,
    classes,
    features,
    tiles_in_segment,
    stride_input,
    stride_weight,
    softcap: tl.float64,
    temperature: tl.float64,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Statistics of a tile of rows over a segment of the classes, and the first place of its maximum."""
    softcap, temperature = tl.cast(softcap, tl.float32), tl.cast(temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    segment = tl.program_id(1)
    index = tl.arange(0, CLASSES)
    inside = row < rows
    label = tl.load(labels + row, mask=inside, other=-1)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    top = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    label_logit = tl.zeros((ROWS,), tl.float32)
    first = tl.zeros((ROWS,), tl.int64)
    for tile in range(segment * tiles_in_segment, (segment + 1) * tiles_in_segment):
        start_of_tile = tile * CLASSES
        columns = start_of_tile + index.to(tl.int64)
        exists = columns < classes
        x = tl.zeros((ROWS, CLASSES), tl.float32)
        for start in range(0, features, FEATURES):
            feature = start + tl.arange(0, FEATURES)
            within = feature < features
            a = tl.load(
                input + row[:, None] * stride_input + feature[None, :],
                mask=inside[:, None] & within[None, :],
                other=0.0,
            )
            b = tl.load(
                weight + columns[None, :] * stride_weight + feature[:, None],
                mask=exists[None, :] & within[:, None],
                other=0.0,
            )
            x = tl.dot(a, b, x, input_precision=PRECISION)
        if HAS_BIAS:
            x += tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
        mask = inside[:, None] & exists[None, :]
        # Rounded as logits that are written, which a backward may make again.
        x = x.to(input.dtype.element_ty).to(tl.float32)
        z = tl.where(mask, transform(x, softcap, temperature, SOFTCAP), float("-inf"))
        of_tile = tl.max(z, axis=1)
        reference = tl.where(of_tile == float("-inf"), 0.0, of_tile)
        place = tl.min(tl.where(z == of_tile[:, None], index[None, :], CLASSES), axis=1)
        first = tl.where(of_tile > maximum, start_of_tile + place, first)
        is_top = tl.where(z == reference[:, None], 1.0, 0.0)
        e = tl.exp(z - reference[:, None])
        below = reference[:, None] - z
        maximum, top, rest, moment = merged(
            maximum, top, rest, moment, of_tile, tl.sum(is_top, axis=1), tl.sum(e - is_top, axis=1),
            tl.sum(tl.where(e > 0, e * below, 0.0), axis=1),
        )  # fmt: skip
        label_in_tile = (label - start_of_tile)[:, None]
        label_logit += tl.sum(tl.where(exists[None, :] & (index[None, :] == label_in_tile), z, 0.0), axis=1)
    out = partials + segment.to(tl.int64) * 5 * rows + row
    tl.store(out, maximum, mask=inside)
    tl.store(out + rows, top, mask=inside)
    tl.store(out + 2 * rows, rest, mask=inside)
    tl.store(out + 3 * rows, moment, mask=inside)
    tl.store(out + 4 * rows, label_logit, mask=inside)
    tl.store(places + segment.to(tl.int64) * rows + row, first, mask=inside)


@triton.jit
def merge_kernel(partials, places, statistics, prediction, rows, segments, ROWS: tl.constexpr):
    """The statistics of a row, as row_statistics has them without factors, from those of its segments."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    top = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    label_logit = tl.zeros((ROWS,), tl.float32)
    first = tl.zeros((ROWS,), tl.int64)
    part, place_of_part = partials + row, places + row
    for _ in range(segments):
        of_segment = tl.load(part, mask=inside, other=float("-inf"))
        place = tl.load(place_of_part, mask=inside, other=0)
        first = tl.where(of_segment > maximum, place, first)
        maximum, top, rest, moment = merged(
            maximum, top, rest, moment, of_segment, tl.load(part + rows, mask=inside, other=0.0),
            tl.load(part + 2 * rows, mask=inside, other=0.0), tl.load(part + 3 * rows, mask=inside, other=0.0),
        )  # fmt: skip
        label_logit += tl.load(part + 4 * rows, mask=inside, other=0.0)
        part += 5 * rows
        place_of_part += rows
    log_sum = tl.where(maximum == float("-inf"), float("nan"), log1p(rest + (top - 1.0)))
    tl.store(statistics + row, maximum, mask=inside)
    tl.store(statistics + rows + row, log_sum, mask=inside)
    tl.store(statistics + 2 * rows + row, label_logit, mask=inside)
    tl.store(statistics + 3 * rows + row, 0.0, mask=inside)
    tl.store(statistics + 4 * rows + row, moment / (top + rest), mask=inside)
    tl.store(prediction + row, first, mask=inside)


def tile_of(dtype):
    """Rows, classes and features of a tile: what a program can hold without spilling."""
    return (64, 128, 64) if dtype.itemsize == 2 else (64, 64, 16)


def head_statistics(input, weight, bias, labels, softcap, temperature):
    """What ``row_statistics`` says of ``input @ weight.T + bias``, in fp32.

    Args: input (N, D) and weight (V, D) in one dtype, fp32 or narrower; bias (V); labels (N).
    """
    rows, features = input.shape
    classes = weight.shape[0]
    statistics = input.new_empty((5, rows), dtype=torch.float32)
    prediction = input.new_empty((rows,), dtype=torch.int64)
    if rows == 0:
        return statistics, prediction
    input, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (input, weight))
    tile_rows, tile_classes, tile_features = tile_of(input.dtype)
    row_tiles, tiles = triton.cdiv(rows, tile_rows), triton.cdiv(classes, tile_classes)
    tiles_in_segment = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, row_tiles)))
    segments = triton.cdiv(tiles, tiles_in_segment)
    partials = input.new_empty((segments, PARTIALS, rows), dtype=torch.float32)
    places = input.new_empty((segments, rows), dtype=torch.int64)
    exact = torch.get_float32_matmul_precision() == "highest"
    segment_kernel[(row_tiles, segments)](
        input, weight, bias, labels.contiguous(), partials, places, rows, classes, features,
        tiles_in_segment, input.stride(0), weight.stride(0), softcap, temperature, HAS_BIAS=bias is not None,
        SOFTCAP=softcap > 0, PRECISION="ieee" if exact else "tf32", ROWS=tile_rows,
        CLASSES=tile_classes, FEATURES=tile_features, num_warps=8, num_stages=3,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(rows, MERGED_ROWS),)](
        partials, places, statistics, prediction, rows, segments, ROWS=MERGED_ROWS
    )
    return statistics, prediction
