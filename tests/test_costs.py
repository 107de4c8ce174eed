"""What check_loss says a loss costs: what is planted is seen, and what does not run says so."""

import time

import pytest
import torch

from fused_losses import fuse
from fused_losses.testing import check_loss, costs, measure


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Little time for each sample, and no compiler, which takes seconds; the documents run it."""
    monkeypatch.setattr(costs, "SECONDS", 0.05)
    monkeypatch.setattr(torch, "compile", lambda loss: loss)


def squares(x, t):
    return (x - t).square().mean()


def slowly(x, t):
    time.sleep(4e-3)
    return squares(x, t)


def wastefully(x, t):
    return squares(x.repeat(64, 1), t.repeat(64, 1))


def report_of(loss, reference=squares, checks=(), dtypes=(torch.float32,)):
    pair = torch.randn(50, 40), torch.randn(50, 40)
    return check_loss(loss, reference, [pair], dtypes=dtypes, checks=checks, costs=True, raise_on_fault=False)


def by_contender(report):
    assert [cost.contender for cost in report.costs] == ["ours", "eager", "torch.compile"]
    return {cost.contender: cost for cost in report.costs}


def test_a_fused_loss():
    report = report_of(fuse(squares, strict=True), checks=["value"], dtypes=(torch.float64, torch.float32))
    assert report.ok and len(report.costs) == 6
    single = {cost.contender: cost for cost in report.costs if cost.dtype is torch.float32}
    gradients = 2 * 50 * 40 * 4
    assert gradients <= single["ours"].peak < single["eager"].peak
    assert all(0 < cost.seconds < 1 and cost.ratio > 0 for cost in report.costs)
    lines = str(report).splitlines()
    assert lines[0].startswith("check") and "sample 0 in float64" in lines and "sample 0 in float32" in lines
    assert sum(line.split()[0] in ("ours", "eager", "torch.compile") for line in lines) == 6


def test_a_slow_loss_is_seen_to_be_slow():
    slow, usual = by_contender(report_of(slowly)), by_contender(report_of(squares, slowly))
    assert slow["ours"].seconds >= 4e-3 and slow["ours"].ratio == 1 and slow["eager"].ratio < 0.5
    assert usual["eager"].seconds >= 4e-3 and usual["eager"].ratio > 2


def test_an_allocation_is_seen():
    found = by_contender(report_of(wastefully))
    assert found["ours"].peak >= 2 * 64 * 50 * 40 * 4 > 8 * found["eager"].peak


@pytest.mark.parametrize("at", ["once", "when called"])
def test_a_compiler_that_fails_says_so(monkeypatch, at):
    def failing(*_):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", failing if at == "once" else lambda loss: failing)
    report = report_of(squares)
    found = by_contender(report)
    assert found["torch.compile"].failure == "RuntimeError: no C++ compiler" and found["eager"].ratio > 0
    assert "  torch.compile     does not run: RuntimeError: no C++ compiler" in str(report).splitlines()
    assert report.ok


def test_a_loss_that_fails_is_no_success():
    def failing(x, t):
        raise ValueError("wrong")

    report = report_of(failing)
    assert not report.ok and by_contender(report)["ours"].failure == "ValueError: wrong"
    with pytest.raises(AssertionError, match="ValueError: wrong"):
        report.raise_for_faults()


def test_what_is_left_on_a_gpu_is_waited_for(monkeypatch):
    """A step there only hands out work: a pretended device does it when it is waited for."""
    waiting = []

    def synchronize(device):
        assert str(device) == "cuda:1"
        while waiting:
            time.sleep(waiting.pop())

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    steps = {"long": lambda: waiting.append(8e-3), "short": lambda: waiting.append(2e-3)}
    taken = measure.rounds(steps, reset=lambda: None, device="cuda:1", seconds=0.03)
    assert all(min(taken[name]) >= least for name, least in {"long": 8e-3, "short": 2e-3}.items())
    assert measure.median_ratio(taken["long"], taken["short"]) > 1.3
