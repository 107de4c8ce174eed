"""`python -m fused_losses`: the report, the check and the table that the README shows."""

from pathlib import Path

import pytest
import torch

import fused_losses
from fused_losses import __main__ as command_line
from fused_losses.backends import choice

README = Path(__file__).resolve().parent.parent / "README.md"


def test_report_names_every_backend(capsys):
    assert command_line.main([]) == 0
    printed = capsys.readouterr().out
    assert all(backend in printed for backend in choice.BACKENDS)


def test_check_passes_and_counts(capsys):
    assert command_line.main(["check", "--loss", "MSELoss", "--backend", "cpp"]) == 0
    assert "1 combinations checked" in capsys.readouterr().out


def test_check_exits_with_1_on_a_fault(monkeypatch, capsys):

    fused_losses.MSELoss(backend="cpp")(torch.zeros(2), torch.zeros(2))
    kernels = choice.KERNELS["cpp"]
    broken = kernels._replace(pointwise_forward=lambda *a: kernels.pointwise_forward(*a) * 1.001)
    monkeypatch.setitem(choice.KERNELS, "cpp", broken)
    assert command_line.main(["check", "--loss", "MSELoss", "--backend", "cpp"]) == 1
    assert "FAULT" in capsys.readouterr().out


def test_check_exits_with_1_where_a_backend_cannot_run():
    assert command_line.main(["check", "--backend", "cuda"]) == (0 if command_line.devices_of("cuda") else 1)


def test_unknown_loss_is_refused(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["check", "--loss", "NoLoss"])


def test_the_table_in_the_readme_is_current():
    assert command_line.table() in README.read_text()
