"""The examples run: alone, in two processes, with every option that changes the path."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, CLASSIFIER = "examples/train_language_model.py", "examples/accelerate_direct.py"
TINY = [
    "--steps",
    "3",
    "--batch-size",
    "2",
    "--sequence-length",
    "32",
    "--vocabulary",
    "600",
    "--width",
    "64",
    "--layers",
    "1",
]


def run(*arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            "29517",
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("output")


def agreement(results):
    runs = results["runs"]
    assert list(runs) == ["torch", "fused", "head"]
    return max(abs(a - b) for run in runs.values() for a, b in zip(runs["torch"]["losses"], run["losses"]))


def test_every_loss_trains_alike(output):
    printed = run(SCRIPT, *TINY, "--output", output)
    results = json.loads((output / "results.json").read_text())
    assert agreement(results) < 1e-5 and results["processes"] == 1 and results["backend"] == "cpp"
    assert (output / "training.png").stat().st_size > 10_000
    assert "loss curves agree" in printed
    extra = {name: run["loss_bytes"] for name, run in results["runs"].items()}
    assert extra["fused"] < extra["torch"]


def test_two_processes(output):
    run(SCRIPT, *TINY, "--output", output, processes=2)
    results = json.loads((output / "results.json").read_text())
    assert results["processes"] == 2 and agreement(results) < 1e-5


@pytest.mark.parametrize("options", [["--precision", "bf16", "--accumulation", "2"], ["--loss", "head"]])
def test_options(output, options):
    run(SCRIPT, *TINY, "--output", output, *options)


@pytest.mark.parametrize(
    ("processes", "options"), [(1, ["--precision", "bf16", "--accumulation", "4"]), (2, ["--batch-size", "16"])]
)
def test_the_classifier_learns(processes, options):
    printed = run(CLASSIFIER, *options, processes=processes)
    count, accuracy = re.search(r"(\d) process\(es\): loss \S+, accuracy (\S+)", printed).groups()
    assert int(count) == processes and float(accuracy) > 0.93


@pytest.mark.parametrize("command", [[SCRIPT], [CLASSIFIER], ["-m", "fused_losses"], ["-m", "fused_losses", "check"]])
def test_help(command):
    assert "usage" in run(*command, "--help")
