"""Measures the corpus of custom losses: plain, under torch.compile and fused, in one interleaved run."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from tests.custom_losses import CORPUS

from ..machine import machine, results_folder
from .contenders import measure
from .first_calls import first_calls
from .report import save_numbers, save_picture, verdicts


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.custom", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    names = [entry.name for entry in CORPUS]
    parser.add_argument("--loss", nargs="+", choices=names, metavar="NAME", help="only these losses")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 16M elements of each loss")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each loss")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-first-calls", action="store_true", help="leave first calls in fresh processes out")
    parser.add_argument("--output", type=Path, help="folder for results; bench/results/<machine>-<date>/custom without")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    chosen = [entry for entry in CORPUS if not (arguments.loss and entry.name not in arguments.loss)]
    here, compile = machine(arguments.device), not arguments.no_compile
    folder = arguments.output or results_folder(here) / "custom"
    firsts = {entry.name: {} for entry in chosen}
    if not arguments.no_first_calls:
        firsts = first_calls([entry.name for entry in chosen], arguments.device, compile)
    measurements = []
    for entry in (bar := tqdm(chosen)):
        bar.set_description(entry.name)
        measurements.append(
            measure(entry, arguments.scale, arguments.device, arguments.seconds, compile, firsts[entry.name])
        )
        judged = verdicts(measurements, arguments.device)
        save_numbers(folder, here, measurements, judged)  # a run that is cut short keeps these
    save_picture(folder / "speed.png", here, measurements)
    print(*judged, sep="\n")
    print(f"\nresults: {folder}")


if __name__ == "__main__":
    main()
