"""Trains a classifier of handwritten digits through Accelerate: output, loss, accelerator.backward(loss).

With gradient accumulation, mixed precision, clipping, and an evaluation in which every sample counts once. The digits
come with scikit-learn. Runs unchanged under `torchrun --nproc-per-node 2` and on a GPU.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm

from fused_losses import CrossEntropyLoss
from fused_losses.integrations.accelerate import GlobalBatches, check_accelerator


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=32, help="images per process and backward")
    parser.add_argument("--accumulation", type=int, default=1, help="backwards per optimizer step")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="mixed precision")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    return parser.parse_args()


def build_loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    train, valid = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(valid, batch_size)


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))


def train(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, batches: GlobalBatches, clip: float
) -> None:
    loss_function = CrossEntropyLoss(label_smoothing=0.05)
    model.train()
    for images, labels in batches:
        with accelerator.accumulate(model):
            output = model(images)
            # The mean over the images of all processes and accumulation steps, of which the last may have fewer.
            loss = loss_function(output, labels, normalizer=batches.normalizer)
            accelerator.backward(loss)  # scales it for fp16
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)  # takes the scale out first
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Loss and accuracy; of one number per sample, the repeats that fill up the last batch can be left out."""
    loss_function = CrossEntropyLoss(reduction="none")
    model.eval()
    losses, right = [], []
    for images, labels in loader:
        output = model(images)
        of_each = loss_function(output, labels), output.argmax(1) == labels
        for seen, gathered in zip((losses, right), accelerator.gather_for_metrics(of_each)):
            seen.append(gathered)
    return torch.cat(losses).mean().item(), torch.cat(right).float().mean().item()


def main() -> None:
    arguments = parse_arguments()
    accelerator = check_accelerator(
        Accelerator(
            # Without this, processes on a machine without a GPU would each train alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=arguments.precision,
            gradient_accumulation_steps=arguments.accumulation,
        )
    )
    set_seed(arguments.seed)
    model, loaders = build_model(), build_loaders(arguments.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    model, optimizer, train_loader, valid_loader = accelerator.prepare(model, optimizer, *loaders)
    batches = GlobalBatches(accelerator, train_loader, count=lambda batch: len(batch[1]))

    bar = tqdm(range(arguments.epochs), unit="epoch", disable=not accelerator.is_main_process)
    loss, accuracy = evaluate(accelerator, model, valid_loader)
    for _ in bar:
        train(accelerator, model, optimizer, batches, arguments.clip)
        loss, accuracy = evaluate(accelerator, model, valid_loader)
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
    accelerator.print(f"{accelerator.num_processes} process(es): loss {loss:.4f}, accuracy {accuracy:.4f}")
    model, optimizer = accelerator.free_memory(model, optimizer)  # or gloo's threads would outlive the interpreter
    accelerator.end_training()


if __name__ == "__main__":
    main()
