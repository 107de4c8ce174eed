"""Command line: what runs on this machine, whether it is right, the table of losses, and a start for a new one."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from . import template
from .backends import backend_report, choice
from .specs import SPECS, LossSpec
from .testing import check_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fused_losses", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("report", help="which backends run here, and why the others do not (the default)")
    commands.add_parser("table", help="losses and backends as a Markdown table")
    check = commands.add_parser("check", help="compare every loss with its reference on this machine's devices")
    check.add_argument("--loss", nargs="+", choices=[spec.name for spec in SPECS], help="only these losses")
    check.add_argument("--backend", nargs="+", choices=choice.BACKENDS[1:], help="only these backends")
    new = commands.add_parser("new", help="write a loss of your own and its test, to start from")
    new.add_argument("name", help="of its module, as in my_loss; the class is then MyLoss")
    new.add_argument("--folder", type=Path, default=Path("."), help="where to write (default: here)")
    return parser.parse_args(arguments)


def print_report() -> None:
    """The report as a table."""
    report = backend_report()
    versions = ", ".join(f"{name} {version or '-'}" for name, version in report["versions"].items())
    print(f"{versions}\nautomatic choice: {report['automatic']}   CPU kernels: {report['cpu_capability'] or '-'}\n")
    print(f"{'backend':10} {'device':18} {'runs':5} why not")
    for name, entry in report["backends"].items():
        print(f"{name:10} {entry['device']:18} {'yes' if entry['runs'] else 'no':5} {entry['reason'] or ''}".rstrip())
    for line in report["build"].get("log", []):
        print(f"build: {line}")


def table() -> str:
    """Losses and backends in Markdown, from the specs."""
    backends = choice.BACKENDS
    lines = ["| loss | of | " + " | ".join(backends) + " |", "|---|---|" + "---|" * len(backends)]
    for spec in SPECS:
        marks = " | ".join("yes" if backend in spec.backends() else "" for backend in backends)
        lines.append(f"| `{spec.name}` | {spec.summary} | {marks} |")
    return "\n".join(lines)


def devices_of(backend: str) -> list[str]:
    """This machine's devices on which a backend runs."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [d for d in devices if choice.unavailable_reason(backend, d, torch.float32) is None]


def check_spec(spec: LossSpec, backend: str, device: str) -> list[Any]:
    """The faulty results of one loss on one backend and device."""
    faults = []
    for sample in spec.samples():
        moved = sample.to(torch.float64, device)
        loss, reference = spec.build(moved, backend), spec.build(moved, "reference")
        report = check_loss(loss, reference, [moved], dtypes=DTYPES, checks=["value", "gradient"], raise_on_fault=False)
        faults += [result for result in report.results if result.faults]
    return faults


def check(losses: list[str] | None, backends: list[str] | None) -> bool:
    """Prints a line per loss, backend and device; whether all held."""
    warnings.filterwarnings("ignore", "reduction: 'mean' divides")  # KLDivLoss, of what is checked on purpose
    ok, ran = True, 0
    for backend in backends or choice.BACKENDS[1:]:
        devices = devices_of(backend)
        if not devices:
            print(f"{backend}: does not run here")
            ok &= backends is None
        for device in devices:
            for spec in SPECS:
                if losses and spec.name not in losses:
                    continue
                faults = check_spec(spec, backend, device)
                ok, ran = ok and not faults, ran + 1
                print(f"{spec.name:20} {backend:7} {device:5} {'FAULT' if faults else 'ok'}", flush=True)
                for result in faults:
                    print(f"    {result.check} {result.dtype}: {result.faults[0]}")
    print(f"{ran} combinations checked")
    return ok


def write_new(name: str, folder: Path) -> int:
    """Writes a loss and its test, and says how to go on."""
    try:
        loss, test = template.write(name, folder)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{loss}: a loss in plain torch, to be changed\n{test}: run `python -m pytest {test}`")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    if parsed.command == "check":
        return 0 if check(parsed.loss, parsed.backend) else 1
    if parsed.command == "new":
        return write_new(parsed.name, parsed.folder)
    if parsed.command == "table":
        print(table())
    else:
        print_report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
