"""Trains a small causal language model through Accelerate, with one loss or with several beside each other.

`torch` and `fused` are the cross entropy of torch and ours, of logits; `head` is a model with a fused head, which
makes no logits. With several, the same model is trained from the same seed, step by step in turn, so that times can
be compared. Ends with a table and a picture. Runs unchanged under `torchrun --nproc-per-node 2` and on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from corpus import load_tokenizer, token_blocks
from report import print_table, save_picture
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import fused_losses
from fused_losses.integrations.accelerate import check_accelerator
from fused_losses.testing import peak_bytes

LOSSES = ("torch", "fused", "head")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, nargs="+", default=LOSSES, help="one or several")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per process and backward")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="mixed precision")
    parser.add_argument("--accumulation", type=int, default=1, help="backwards per optimizer step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens of the BPE")
    parser.add_argument("--width", type=int, default=256, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--output", type=Path, default=Path("outputs/language_model"), help="folder for results")
    return parser.parse_args()


def build_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    set_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.width // 64),
        max_position_embeddings=arguments.sequence_length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss_of_logits(name: str) -> nn.Module:
    return fused_losses.CrossEntropyLoss() if name == "fused" else nn.CrossEntropyLoss()


def build_accelerator(arguments: argparse.Namespace) -> Accelerator:
    return check_accelerator(
        Accelerator(
            # Without this, processes on a machine without a GPU would each train alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=arguments.precision,
            # Batches go on beyond the end of the loader, which is no reason for a step.
            gradient_accumulation_plugin=GradientAccumulationPlugin(arguments.accumulation, sync_with_dataloader=False),
        )
    )


@dataclass
class Measured:
    """What a run keeps for the table: one entry per step."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    loss_bytes: int = 0


class Run:
    """One model with one loss, trained a step at a time."""

    def __init__(self, name: str, arguments: argparse.Namespace, blocks: Tensor):
        self.name, self.arguments, self.measured = name, arguments, Measured()
        self.accelerator = build_accelerator(arguments)
        model = build_model(arguments)
        if name == "head":
            model = fused_losses.fuse_lm_head(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
        order = torch.Generator().manual_seed(arguments.seed)
        loader = DataLoader(blocks, batch_size=arguments.batch_size, shuffle=True, generator=order)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.loss_of_logits = loss_of_logits(name)
        self.batches = self._endless()

    def _endless(self):
        while True:
            yield from self.loader

    def step(self) -> float:
        """One optimizer step: forward, loss and backward for every accumulated batch."""
        start, total = time.perf_counter(), 0.0
        for _ in range(self.arguments.accumulation):
            batch = next(self.batches)
            with self.accelerator.accumulate(self.model):
                loss = self.loss(batch[:, :-1], batch[:, 1:])
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += self.accelerator.gather(loss.detach()).mean().item() / self.arguments.accumulation
        self.measured.losses.append(total)
        self.measured.step_seconds.append(time.perf_counter() - start)
        return total

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        if self.name == "head":
            return self.model(input_ids=input, labels=target, shift_labels=target).loss
        return self.loss_of_logits(self.model(input_ids=input).logits.flatten(0, 1), target.flatten())

    def measure_loss(self, rounds: int) -> None:
        """Forward and backward of head and loss alone, from hidden states like the model's."""
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        rows = self.arguments.batch_size * self.arguments.sequence_length
        device = self.accelerator.device
        hidden = torch.randn(rows, self.arguments.width, device=device).requires_grad_()
        target = torch.randint(self.arguments.vocabulary, (rows,), device=device)

        def step() -> None:
            loss = head(hidden, target) if self.name == "head" else self.loss_of_logits(head(hidden), target)
            loss.backward()
            hidden.grad = head.weight.grad = None

        for _ in range(rounds):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            self.measured.loss_seconds.append(time.perf_counter() - start)
        self.measured.loss_bytes = peak_bytes(step, str(device))


def memory_in_use(device: torch.device) -> int:
    """Bytes of the device's memory, or of this process's, that are in use."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(arguments: argparse.Namespace, runs: list[Run]) -> None:
    main = runs[0].accelerator.is_main_process
    world = runs[0].accelerator.num_processes
    tokens = arguments.batch_size * arguments.sequence_length * arguments.accumulation * world
    with tqdm(total=arguments.steps, unit="step", disable=not main) as bar:
        for _ in range(arguments.steps):
            shown = {run.name: f"{run.step():.3f}" for run in runs}
            shown["tokens/s"] = f"{tokens / runs[-1].measured.step_seconds[-1]:.0f}"
            shown["memory"] = f"{memory_in_use(runs[0].accelerator.device) / 2**20:.0f} MiB"
            bar.set_postfix(shown)
            bar.update()
    for _ in range(3):
        for run in runs:
            run.measure_loss(rounds=5)


def summarize(arguments: argparse.Namespace, runs: list[Run]) -> dict:
    """The numbers of the table; the first steps warm up and are left out of times."""
    warm = min(3, arguments.steps - 1)
    return {
        "processes": runs[0].accelerator.num_processes,
        "device": str(runs[0].accelerator.device),
        "backend": fused_losses.backend_report()["automatic"][runs[0].accelerator.device.type],
        "runs": {
            run.name: {
                "losses": run.measured.losses,
                "step_seconds": statistics.median(run.measured.step_seconds[warm:]),
                "loss_seconds": statistics.median(run.measured.loss_seconds),
                "loss_bytes": run.measured.loss_bytes,
            }
            for run in runs
        },
    }


def main() -> None:
    arguments = parse_arguments()
    accelerator = build_accelerator(arguments)
    with accelerator.main_process_first():
        tokenizer = load_tokenizer(arguments.output, arguments.vocabulary)
    world = accelerator.num_processes
    needed = min(arguments.steps * arguments.accumulation, 200) * arguments.batch_size * world
    blocks = token_blocks(tokenizer, arguments.sequence_length, needed)
    runs = [Run(name, arguments, blocks) for name in arguments.loss]
    accelerator.print(
        f"{sum(p.numel() for p in runs[0].model.parameters()) / 1e6:.1f} M parameters, {world} process(es)"
    )
    train(arguments, runs)
    if accelerator.is_main_process:
        summary = summarize(arguments, runs)
        print_table(summary)
        (arguments.output / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"\npicture: {save_picture(summary, arguments.output)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
