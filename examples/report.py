"""The table and the picture that the training example ends with."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a canvas without a screen

COLORS = {"torch": "#888888", "fused": "#d1495b", "head": "#00798c"}


def print_table(summary: dict) -> None:
    """Prints what each loss cost and, with several, how each compares with the first."""
    runs = summary["runs"]
    print(f"\n{'loss':8} {'first':>8} {'last':>8} {'step':>10} {'head + loss':>12} {'its memory':>11}")
    for name, run in runs.items():
        print(
            f"{name:8} {run['losses'][0]:8.3f} {run['losses'][-1]:8.3f} {run['step_seconds'] * 1e3:7.0f} ms"
            f" {run['loss_seconds'] * 1e3:9.1f} ms {run['loss_bytes'] / 2**20:7.0f} MiB"
        )
    first, *others = runs
    for name in others:
        print(f"\n{name} ({summary['backend']}) against {first}: {compared(runs[first], runs[name])}")


def compared(theirs: dict, ours: dict) -> str:
    apart = max(abs(a - b) / a for a, b in zip(theirs["losses"], ours["losses"]))
    return (
        f"loss curves agree to {apart:.1e} (relative), "
        f"step {theirs['step_seconds'] / ours['step_seconds']:.2f}x as fast, "
        f"head and loss {theirs['loss_seconds'] / ours['loss_seconds']:.1f}x as fast "
        f"with {theirs['loss_bytes'] / max(1, ours['loss_bytes']):.1f}x less extra memory"
    )


def save_picture(summary: dict, folder: Path) -> Path:
    """Loss curves beside bars of step time, and time and extra memory of head and loss."""
    runs = summary["runs"]
    figure, (curves, *bars) = plt.subplots(1, 4, figsize=(13, 3.6), width_ratios=[2.4, 1, 1, 1])
    for name, run in runs.items():
        style = {"linewidth": 5, "alpha": 0.45} if name == next(iter(runs)) else {"linewidth": 1.5}
        curves.plot(range(1, len(run["losses"]) + 1), run["losses"], label=name, color=COLORS[name], **style)
    curves.set(xlabel="step", ylabel="cross entropy", title="training loss")
    curves.legend()
    panels = [
        ("step", "ms", "step_seconds", 1e3),
        ("head + loss, fwd + bwd", "ms", "loss_seconds", 1e3),
        ("memory of head + loss", "MiB", "loss_bytes", 2**-20),
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
