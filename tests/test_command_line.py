"""`python -m fused_losses`: the report, the check and the table that the README shows."""

import subprocess
import sys
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


def test_a_new_loss_passes_its_test(tmp_path, capsys):
    assert command_line.main(["new", "my_loss", "--folder", str(tmp_path)]) == 0
    assert "class MyLoss(nn.Module)" in (tmp_path / "my_loss.py").read_text()
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_loss.py"]
    passed = subprocess.run(test, cwd=tmp_path, capture_output=True, text=True)
    assert passed.returncode == 0 and "4 passed" in passed.stdout, passed.stdout + passed.stderr


@pytest.mark.parametrize(("name", "reason"), [("my-loss", "named like a module"), ("my_loss", "would be overwritten")])
def test_a_new_loss_overwrites_nothing(tmp_path, capsys, name, reason):
    (tmp_path / "my_loss.py").write_text("mine")
    assert command_line.main(["new", name, "--folder", str(tmp_path)]) == 1
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["my_loss.py"]
