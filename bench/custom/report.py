"""The corpus's results as JSON, as a Markdown table and as a picture, and what was promised of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a canvas without a screen

from ..report import COLORS
from ..targets import Verdict
from .contenders import Measurement

# What the other contenders are called in tables, and in the colours of the other bench.
NAMES = {"plain": "eager", "compile": "torch.compile"}
HUES = {"plain": COLORS["torch"], "compile": COLORS["compile"], "fused": COLORS["ours"]}


def save_numbers(
    folder: Path, machine: dict[str, Any], measurements: Sequence[Measurement], judged: Sequence[Verdict]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "machine": machine,
        "measurements": [asdict(m) for m in measurements],
        "targets": [asdict(v) | {"met": v.met} for v in judged],
    }
    (folder / "results.json").write_text(json.dumps(contents, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(machine, measurements, judged))


# How many times as fast as others, by device.
SPEED = {"cpu": {"plain": 4.0, "compile": 1.2}, "cuda": {"compile": 1.0}}


def verdicts(measurements: Sequence[Measurement], device: str) -> list[Verdict]:
    """Geometric means over the corpus, and on a CPU the worst of what a call costs beside its work."""
    found = []
    for name, bound in SPEED[device].items():
        ratios = [m.speedup[name] for m in measurements if name in m.speedup]
        if ratios:
            found.append(Verdict(f"{NAMES[name]} ÷ fused, geometric mean", statistics.geometric_mean(ratios), bound))
    if device != "cpu":
        return found
    if all(m.first for m in measurements):
        firsts = {state: max(m.first[f"fused {state}"] for m in measurements) for state in ("cold", "warm")}
        found += [
            Verdict("longest cold first call, s", firsts["cold"], 3.0, at_least=False),
            Verdict("longest first call from the cache, ms", firsts["warm"] * 1e3, 50.0, at_least=False),
        ]
    overhead = max(m.tiny["fused"] - m.tiny["plain"] for m in measurements)
    return [*found, Verdict("largest overhead of a tiny step over eager's, µs", overhead * 1e6, 30.0, at_least=False)]


def markdown(machine: dict[str, Any], measurements: Sequence[Measurement], judged: Sequence[Verdict]) -> str:
    others = list(measurements[0].speedup)
    lines = [
        "# Custom losses on " + ", ".join(str(value) for value in machine.values()),
        "",
        "Forward and backward in fp32: medians of one interleaved run, and the medians of its rounds' ratios. Memory",
        "is what a step allocates at its peak, gradients included. The tiny step has a few elements; the first call",
        "is one of those, with empty caches (cold) and in a new process with full ones (warm).",
        "",
        "| target | measured | asked | |",
        "|---|---|---|---|",
        *(f"| {verdict} |" for verdict in judged),
        "",
    ]
    header = ["loss", "shape", "fused ms", *(f"{NAMES[name]} ÷ fused" for name in others), "peak MiB, fused"]
    header += [f"peak MiB, {NAMES[name]}" for name in others] + ["tiny µs, fused"]
    header += [f"tiny µs, {NAMES[name]}" for name in others] + ["first call ms, fused cold, warm"]
    header += ["first call ms, torch.compile cold, warm"] * ("compile" in others) + ["left to torch"]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + [row(m) for m in measurements]) + "\n"


def row(m: Measurement) -> str:
    others = list(m.speedup)
    cells = [m.loss, m.shape, f"{m.step['fused'].median * 1e3:.4g}", *(f"{m.speedup[name]:.2f}" for name in others)]
    cells += [f"{m.peak[name] / 2**20:.1f}" for name in ("fused", *others)]
    cells += [f"{m.tiny[name] * 1e6:.0f}" for name in ("fused", *others)]
    for name in ("fused", "compile") if "compile" in others else ("fused",):
        states = [f"{name} {state}" for state in ("cold", "warm")]
        cells.append(", ".join(f"{m.first[state] * 1e3:.0f}" for state in states if m.first))
    return "| " + " | ".join([*cells, ", ".join(m.left_to_torch)]) + " |"


def save_picture(path: Path, machine: dict[str, Any], measurements: Sequence[Measurement]) -> None:
    """How many times eager's speed fused and compiled losses have, the fastest on top."""
    ordered = sorted(measurements, key=lambda m: m.speedup["plain"])
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.17 * len(ordered)))
    positions = range(len(ordered))
    if "compile" in ordered[0].speedup:
        compiled = [m.speedup["plain"] / m.speedup["compile"] for m in ordered]
        axes.scatter(compiled, positions, color=HUES["compile"], s=14, label="torch.compile")
    axes.scatter([m.speedup["plain"] for m in ordered], positions, color=HUES["fused"], s=14, label="fused")
    axes.axvline(1.0, color=HUES["plain"], linewidth=1, label="eager")
    axes.set_yticks(positions, [m.loss + " *" * bool(m.left_to_torch) for m in ordered], fontsize=6)
    axes.set_xscale("log")
    axes.set_xticks(ticks := [0.5, 1, 2, 4, 8, 16, 32], [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    axes.set_title(
        "forward + backward over eager, * part of it left to torch\n" + ", ".join(map(str, machine.values())),
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
