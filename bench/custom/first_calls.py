"""What the first call of a loss costs, in a process of its own: with empty caches, and again with full ones."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fused_losses.testing.measure import step_of
from tests.custom_losses import CORPUS, Entry

from .contenders import contenders, tiny_inputs


def first_calls(names: Sequence[str], device: str, compile: bool) -> dict[str, dict[str, float]]:
    """Seconds of the first step of each loss and contender, cold and warm, by the loss's name."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        caches = {"FUSED_LOSSES_CACHE": f"{folder}/fused", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        for state in ("cold", "warm"):
            command = [sys.executable, "-m", __name__, device, str(compile), *names]
            run = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, check=True)
            for name, seconds in json.loads(run.stdout).items():
                found[name] |= {f"{contender} {state}": taken for contender, taken in seconds.items()}
    return found


def measure_here(names: Sequence[str], device: str, compile: bool) -> dict[str, dict[str, float]]:
    """The same in this process, whose caches are as they are."""
    entries = {entry.name: entry for entry in CORPUS}
    # The first loss of a process pays for imports, which are nobody's: of sympy too, by torch's decompositions.
    seconds_of(Entry(mean_of_norms, lambda draw, shape: (draw.normal(*shape),), ((3,),), (3,)), device, compile)
    return {name: seconds_of(entries[name], device, compile) for name in tqdm(names, desc="first calls")}


def mean_of_norms(x: Tensor) -> Tensor:
    return x.norm(dim=0).mean()


def seconds_of(entry: Entry, device: str, compile: bool) -> dict[str, float]:
    """Of the first step, by contender."""
    if compile:  # which imports the compiler: a loss that imports it in its first call is to be seen
        torch.compiler.reset()
    tensors, found = tiny_inputs(entry, device), {}
    for name, loss in contenders(entry, device, compile).items():
        gc.collect()  # what other losses left behind is not for this one to collect
        start = time.perf_counter()
        step_of(loss, tensors)()
        found[name] = time.perf_counter() - start
    return found


if __name__ == "__main__":
    device, compile, *names = sys.argv[1:]
    print(json.dumps(measure_here(names, device, compile == "True")))
