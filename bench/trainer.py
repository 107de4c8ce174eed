"""Measures one run of transformers' Trainer with its own loss, with ours, and with Liger's where that can run."""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from fused_losses import fuse_lm_head
from fused_losses.integrations.trainer import CausalLMLoss
from fused_losses.testing import peak_bytes


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trainer", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every contender, in turns")
    return parser.parse_args(arguments)


class StepTimes(transformers.TrainerCallback):
    """Seconds of every step but the first."""

    def __init__(self, device: str):
        self.seconds: list[float] = []
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.wait()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.wait()
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)


def with_liger(model: Any) -> Any:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    # Its loss alone: the other kernels are no matter of losses.
    others = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True, **others)
    return model


def contenders(device: str) -> dict[str, tuple[Callable[[Any], Any], dict[str, Any]]]:
    """What is done to the model, and what Trainer is told."""
    made: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
        "Trainer's own loss": (lambda model: model, {}),
        "CausalLMLoss": (lambda model: model, {"compute_loss_func": CausalLMLoss()}),
        "fuse_lm_head": (fuse_lm_head, {}),
    }
    if device == "cuda":
        made["Liger"] = (with_liger, {})
    return made


def train(
    arguments: argparse.Namespace, prepare: Callable[[Any], Any], options: dict[str, Any], steps: int
) -> list[float]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.width // 64),
        use_cache=False,
    )
    model = prepare(transformers.LlamaForCausalLM(config))
    tokens = torch.randint(arguments.vocabulary, (arguments.rows * steps, arguments.length))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    times = StepTimes(arguments.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.rows,
            max_steps=steps,
            use_cpu=arguments.device == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        transformers.Trainer(model, settings, train_dataset=rows, callbacks=[times], **options).train()
    return times.seconds


def main() -> None:
    arguments = parse_arguments()
    chosen = contenders(arguments.device)
    seconds: dict[str, list[list[float]]] = {name: [] for name in chosen}
    for _ in range(arguments.rounds):
        for name, contender in chosen.items():
            seconds[name].append(train(arguments, *contender, arguments.steps + 1))
    first = next(iter(chosen))
    print(f"{'':20} {'step':>9} {'of the first':>13} {'peak of a run':>14}")
    for name, contender in chosen.items():
        medians = [statistics.median(run) for run in seconds[name]]
        ratio = statistics.median(a / statistics.median(b) for a, b in zip(medians, seconds[first]))
        peak = peak_bytes(partial(train, arguments, *contender, 1), arguments.device) / 2**20
        print(f"{name:20} {statistics.median(medians) * 1e3:6.0f} ms {ratio:12.2f}x {peak:10.0f} MiB")
    if arguments.device == "cpu":
        print("Liger's kernels are Triton's, which has no driver for a CPU")


if __name__ == "__main__":
    main()
