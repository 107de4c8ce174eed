"""Results as JSON, as a Markdown table and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a canvas without a screen

from .contenders import Measurement
from .targets import Verdict

COLORS = {"ours": "#d1495b", "in place": "#edae49", "torch": "#888888", "compile": "#30638e"}


def save_numbers(
    folder: Path, machine: dict[str, Any], measurements: list[Measurement], verdicts: list[Verdict]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "machine": machine,
        "measurements": [asdict(m) for m in measurements],
        "targets": [asdict(v) | {"met": v.met} for v in verdicts],
    }
    (folder / "results.json").write_text(json.dumps(contents, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(machine, measurements, verdicts))


def markdown(machine: dict[str, Any], measurements: list[Measurement], verdicts: list[Verdict]) -> str:
    lines = ["# " + ", ".join(str(value) for value in machine.values()), ""]
    lines += [
        "Forward and backward, medians of one interleaved run. GB/s counts the least bytes that must move;",
        "",
    ]
    lines += [
        "the share is of the rate at which the input is copied, or of the speed of a head's matrix products alone.",
        "Memory is what a step allocates at its peak.",
        "",
    ]
    lines += [
        "| loss | shape | dtype | contender | ms | quartiles | vs torch | GB/s | of bound | peak MiB | first call s |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    lines += [row for m in measurements for row in rows(m)]
    lines += ["", "| target | measured | asked | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {verdict} |" for verdict in verdicts]) + "\n"


def rows(m: Measurement) -> list[str]:
    found = []
    for name, timing in m.forward_backward.items():
        rate = m.traffic * m.bytes / timing.median
        share = rate * m.bound.median / (2 * m.bytes) if m.traffic else m.bound.median / timing.median
        first = f"{m.first_call[name]:.2f}" if name in m.first_call else ""
        speedup = m.forward_backward["torch"].median / timing.median
        found.append(
            f"| {m.loss} | {m.shape} | {m.dtype} | {name} | {timing.median * 1e3:.4g} | "
            f"{timing.low * 1e3:.4g} to {timing.high * 1e3:.4g} | {speedup:.2f}x | "
            f"{f'{rate / 1e9:.3g}' if m.traffic else ''} | {share:.0%} | {m.peak[name] / 2**20:.1f} | {first} |"
        )
    return found


def save_picture(path: Path, machine: dict[str, Any], measurements: list[Measurement]) -> None:
    """One panel per loss, shape and dtype: bars of the time of a step."""
    columns = min(4, len(measurements))
    lines = -(-len(measurements) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.3 * lines), squeeze=False)
    for panel, m in zip(axes.flat, measurements):
        names = list(m.forward_backward)
        values = [m.forward_backward[name].median * 1e3 for name in names]
        bars = panel.barh(names, values, color=[COLORS.get(name, "#66a182") for name in names])
        panel.bar_label(bars, fmt="%.3g", padding=2)
        panel.set_title(f"{m.loss}\n{m.shape} {m.dtype}, ms", fontsize=9)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[len(measurements) :]:
        panel.set_visible(False)
    figure.suptitle("forward + backward, " + ", ".join(str(value) for value in machine.values()), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
