"""The sanitizer sees every kind of fault it claims to see, and nothing in a clean kernel."""

import mmap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fused_losses.triton_kernels import softmax

FAULTS = {
    "unmasked_load": "out of bounds",
    "unmasked_store": "out of bounds",
    "gap": "out of bounds",
    "no_other": "undefined lanes",
    "same_place": "duplicate store",
    "two_writers": "race",
    "read_after_other": "race",
    "no_barrier": "missing barrier",
    "overflow": "int32 overflow",
    "atomic": "atomic",
}


@triton.jit
def faulty_kernel(source, out, count, stride, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    index = program * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    if FAULT == "unmasked_load":
        x = tl.load(source + index)
    elif FAULT == "no_other":
        x = tl.load(source + index, mask=mask)
    elif FAULT == "gap":
        x = tl.load(source + index + count, mask=mask, other=0.0)
    elif FAULT == "overflow":
        x = tl.load(source + index + (program + 3) * stride * 0, mask=mask, other=0.0)
    else:
        x = tl.load(source + index, mask=mask, other=0.0)
    if FAULT == "unmasked_store":
        tl.store(out + index, x)
    elif FAULT == "same_place":
        tl.store(out + index * 0 + program, x)
    elif FAULT == "two_writers":
        tl.store(out, tl.sum(x))
    elif FAULT == "atomic":
        tl.atomic_add(out, tl.sum(x))
    else:
        tl.store(out + index, x, mask=mask)
    if FAULT == "no_barrier":
        tl.store(out + index, tl.load(out + index, mask=mask, other=0.0), mask=mask)
    elif FAULT == "read_after_other":
        tl.debug_barrier()
        tl.store(out + index, x + tl.load(out), mask=mask)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_are_seen(fault):
    source, out = torch.ones(2, 104)[:, :100], torch.empty(100)
    source[1] = 2.0

    def run():
        faulty_kernel[(4,)](source[0] if fault != "gap" else source, out, 100, 2**30, FAULT=fault, BLOCK=32)

    if fault is None:
        run()
        assert torch.equal(out, torch.ones(100))
    else:
        with pytest.raises(Exception, match=FAULTS[fault]):
            run()


def test_fresh_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.ones(2, 3).bfloat16().new_empty(3).isnan().all()


def lazily_mapped(rows, classes):
    """An fp16 tensor of zeros of which only the pages that are touched exist."""
    no_reserve = 0x4000
    memory = mmap.mmap(-1, 2 * rows * classes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.from_numpy(np.frombuffer(memory, dtype=np.float16)).view(rows, classes)


def test_offsets_beyond_int32():
    """Three rows, 2**31 elements and more apart."""
    logits = lazily_mapped(3, 2**31 + 16)[:, :100]
    logits[2] = torch.randn(100)
    target = torch.tensor([0, -100, 5])
    options = (-100, 0.0, 0.0, 0.0, 1.0)
    loss, stats = softmax.cross_entropy_forward(logits, target, None, None, "none", *options, torch.float32)
    expected = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
    torch.testing.assert_close(loss, expected)
    softmax.cross_entropy_backward_(torch.ones(3), logits, target, None, None, stats, "none", *options)
    assert abs(logits[2].float().sum()) < 1e-2 and logits[2, 5] < 0 and (logits[1] == 0).all()
