"""The table and the picture that the training example ends with."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a canvas without a screen

COLORS = {"torch": "#888888", "fused": "#d1495b"}


def print_table(summary: dict) -> None:
    """Prints what each loss cost and, with two, how far apart their curves are."""
    runs = summary["runs"]
    print(f"\n{'loss':8} {'first':>8} {'last':>8} {'step':>10} {'loss alone':>11} {'its memory':>11}")
    for name, run in runs.items():
        print(
            f"{name:8} {run['losses'][0]:8.3f} {run['losses'][-1]:8.3f} {run['step_seconds'] * 1e3:7.0f} ms"
            f" {run['loss_seconds'] * 1e3:8.1f} ms {run['loss_bytes'] / 2**20:7.0f} MiB"
        )
    if len(runs) == 2:
        torchs, ours = runs["torch"], runs["fused"]
        apart = max(abs(a - b) / a for a, b in zip(torchs["losses"], ours["losses"]))
        print(
            f"\nours ({summary['backend']}) against torch: loss curves agree to {apart:.1e} (relative), "
            f"step {torchs['step_seconds'] / ours['step_seconds']:.2f}x as fast, "
            f"loss {torchs['loss_seconds'] / ours['loss_seconds']:.1f}x as fast "
            f"with {torchs['loss_bytes'] / max(1, ours['loss_bytes']):.1f}x less extra memory"
        )


def save_picture(summary: dict, folder: Path) -> Path:
    """Loss curves beside bars of step time, time of the loss and its extra memory."""
    runs = summary["runs"]
    figure, (curves, *bars) = plt.subplots(1, 4, figsize=(13, 3.6), width_ratios=[2.4, 1, 1, 1])
    for name, run in runs.items():
        style = {"linewidth": 5, "alpha": 0.45} if name == "torch" else {"linewidth": 1.5}
        curves.plot(range(1, len(run["losses"]) + 1), run["losses"], label=name, color=COLORS[name], **style)
    curves.set(xlabel="step", ylabel="cross entropy", title="training loss")
    curves.legend()
    panels = [
        ("step", "ms", "step_seconds", 1e3),
        ("loss, forward + backward", "ms", "loss_seconds", 1e3),
        ("memory of the loss", "MiB", "loss_bytes", 2**-20),
    ]
    for axes, (title, unit, key, scale) in zip(bars, panels):
        values = [run[key] * scale for run in runs.values()]
        drawn = axes.bar(list(runs), values, color=[COLORS[name] for name in runs])
        axes.bar_label(drawn, fmt="%.0f")
        axes.set(title=title, ylabel=unit)
        axes.margins(y=0.15)
    for axes in (curves, *bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = folder / "training.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
