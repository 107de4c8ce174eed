"""Measures every loss beside torch, torch.compile and a copy of its input, in one interleaved run."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from fused_losses.specs import SPECS

from .contenders import measure
from .import_time import import_overhead
from .machine import machine, results_folder
from .report import save_numbers, save_picture
from .targets import verdicts


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--loss", nargs="+", choices=[spec.name for spec in SPECS], help="only these losses")
    parser.add_argument("--shape", nargs="+", help="only these shapes, as the table names them")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each loss, shape and dtype")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="folder for results; bench/results/<machine>-<date> without")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    chosen = [
        (spec, bench, dtype)
        for spec in SPECS
        for bench in spec.benches
        for dtype in bench.dtypes
        if arguments.device in bench.devices
        and not (arguments.loss and spec.name not in arguments.loss)
        and not (arguments.shape and bench.name not in arguments.shape)
    ]
    here, overhead = machine(arguments.device), import_overhead()
    folder = arguments.output or results_folder(here)
    measurements, promises = [], []
    for spec, bench, dtype in (bar := tqdm(chosen)):
        bar.set_description(f"{spec.name} {bench.name} {str(dtype).removeprefix('torch.')}")
        measurements.append(measure(spec, bench, dtype, arguments.device, arguments.seconds, not arguments.no_compile))
        promises = verdicts(measurements, overhead, arguments.device)
        save_numbers(folder, here, measurements, promises)  # a run that is cut short keeps these
    save_picture(folder / "speed.png", here, measurements)
    for promise in promises:
        print(promise)
    print(f"\nresults: {folder}")


if __name__ == "__main__":
    main()
