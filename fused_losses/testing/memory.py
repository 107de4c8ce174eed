"""How much memory a call needs beyond what was there before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..backends import empty_cache


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that a call has allocated at any one moment, its result included.

    Example:
        >>> import torch
        >>> from fused_losses.testing import peak_bytes
        >>> peak_bytes(lambda: torch.zeros(1000).add(1)) >= 8000
        True
    """
    if torch.device(device).type == "cuda":
        return _peak_of_cuda(function, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write lines of its own
    empty_cache()  # memory that is kept from before would not be seen
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    del kept
    # Ready-made summaries give what an operator keeps, not what it needs on the way.
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def _peak_of_cuda(function: Callable[[], object], device: str) -> int:
    tile = torch.zeros(16, 16, device=device, requires_grad=True)
    torch.mm(tile, tile).sum().backward()  # cuBLAS takes memory of its own with the first product of each thread
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
