"""Sums of what programs leave behind, in an order that never changes."""

import triton
import triton.language as tl

SUM_BLOCK = 4096
# Up to here, one program adds them all in a few microseconds.
FEW = 2 * SUM_BLOCK


@triton.jit
def sum_kernel(partial, out, count, BLOCK: tl.constexpr):
    """Sums of adjacent blocks of a row of partial sums. # partial (R, count), out (R, blocks)"""
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(partial + row * count + index, mask=index < count, other=0.0)
    tl.store(out + row * tl.num_programs(0) + block, tl.sum(values))


def few_sums(partial):
    """Rows of partial sums in which so few are left that a single program adds them. # (R, count)"""
    while partial.shape[1] > FEW:
        rows, count = partial.shape
        blocks = triton.cdiv(count, SUM_BLOCK)
        out = partial.new_empty((rows, blocks))
        sum_kernel[(blocks, rows)](partial, out, count, BLOCK=SUM_BLOCK, num_warps=8)
        partial = out
    return partial
