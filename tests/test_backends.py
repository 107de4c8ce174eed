"""Which backend runs, and what is said where one cannot."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fused_losses
from fused_losses import MSELoss, use_backend
from fused_losses.backends import BACKENDS, choice, fake
from fused_losses.functional import mse_loss

X, T = torch.randn(80, 100), torch.randn(80, 100)


def python(script, **variables):
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", f"import torch, fused_losses\n{script}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def used(**options):
    """The operator that a loss of CPU tensors calls, or reference."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        mse_loss(X, T, **options)
    names = {event.name for event in profiler.events()}
    return "cpp" if "fused_losses::pointwise_forward" in names else "reference"


def test_automatic_choice():
    assert used() == "cpp"
    assert fused_losses.backend_report()["automatic"]["cpu"] == "cpp"


def test_few_elements_take_the_operator_of_torch():
    x, t = X[:2].contiguous(), T[:2].contiguous()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        loss = MSELoss()(x, t)
    assert not any("fused_losses" in event.name for event in profiler.events())
    torch.testing.assert_close(loss, MSELoss(backend="cpp")(x, t))


def test_precedence_and_nesting():
    assert used(backend="reference") == "reference"
    with use_backend("reference"):
        assert used() == "reference"
        assert used(backend="cpp") == "cpp"
        with use_backend(None):
            assert used() == "cpp"
        with use_backend("auto"):
            assert used() == "cpp"
        assert used() == "reference"
    assert used() == "cpp"


def test_an_exception_restores_the_choice():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert used() == "cpp"


def test_backward_stays_with_the_backend_of_its_forward():
    x = X.bfloat16().requires_grad_()  # whose gradient is made in backward on every device
    loss = mse_loss(x, T.bfloat16(), backend="cpp")
    with use_backend("reference"), torch.profiler.profile() as profiler:
        loss.backward()
    assert any("fused_losses::pointwise_backward" in event.name for event in profiler.events())


@pytest.mark.parametrize("name", ["Cpp", "gpu", "torch"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"must be one of reference, cpp, cuda, triton or auto, got '{name}'"):
        mse_loss(X, T, backend=name)
    with pytest.raises(ValueError, match=name), use_backend(name):
        pass
    result = python("", FUSED_LOSSES_BACKEND=name)
    assert result.returncode != 0 and "FUSED_LOSSES_BACKEND must be one of" in result.stderr


@pytest.mark.parametrize(("name", "reason"), [("cuda", "it runs on cuda tensors"), ("triton", "TRITON_INTERPRET=1")])
def test_a_backend_that_cannot_run_says_why(name, reason):
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return
    for loss in (MSELoss(backend=name), fused_losses.LogCoshLoss(backend=name)):
        with pytest.raises(RuntimeError, match=f"the backend '{name}' was asked for and cannot run") as caught:
            loss(X, T)
        assert reason in str(caught.value) and "python -m fused_losses" in str(caught.value)


def test_a_dtype_without_kernels_says_so():
    with pytest.raises(RuntimeError, match=r"no kernels for torch\.complex64"):
        fused_losses.L1Loss(backend="cpp")(X.to(torch.complex64), T.to(torch.complex64))
    plain = torch.nn.L1Loss()(X.to(torch.complex64), T.to(torch.complex64))
    torch.testing.assert_close(fused_losses.L1Loss()(X.to(torch.complex64), T.to(torch.complex64)), plain)


def test_environment_variable():
    script = "print(fused_losses.backends.choice.resolve('cpu', torch.float32, None))"
    assert python(script, FUSED_LOSSES_BACKEND="reference").stdout.strip() == "reference"
    for value in ("cpp", "auto", ""):
        assert python(script, FUSED_LOSSES_BACKEND=value).stdout.strip() == "cpp"
    result = python("fused_losses.MSELoss()(torch.ones(2), torch.ones(2))", FUSED_LOSSES_BACKEND="cuda")
    assert result.returncode != 0 and "cannot run: it runs on cuda tensors" in result.stderr


def test_report_is_complete_and_serialisable():
    report = fused_losses.backend_report()
    assert tuple(report["backends"]) == BACKENDS
    for entry in report["backends"].values():
        assert entry["runs"] is (entry["reason"] is None)
    assert report["backends"]["cpp"]["runs"] and report["cpu_capability"] in ("default", "avx2", "avx512")
    assert report["versions"]["torch"] == torch.__version__
    json.dumps(report)


def test_without_extensions_the_reference_runs(tmp_path):
    """An install whose build failed computes, and says what is missing."""
    script = f"""
import sys, shutil, pathlib
source, copy = pathlib.Path({str(os.path.dirname(fused_losses.__file__))!r}), pathlib.Path({str(tmp_path)!r})
shutil.copytree(source, copy / "fused_losses", ignore=shutil.ignore_patterns("*.so", "_build_log.json"))
shutil.copytree(source.parent / "triton_kernels", copy / "triton_kernels")
sys.path.insert(0, str(copy))
import torch, fused_losses
assert str(copy) in fused_losses.__file__
print(fused_losses.CrossEntropyLoss()(torch.zeros(100, 100), torch.zeros(100).long()).item())
print(fused_losses.backend_report()["backends"]["cpp"]["reason"])
fused_losses.MSELoss(backend="cpp")(torch.ones(2), torch.ones(2))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    value, reason = result.stdout.splitlines()
    assert abs(float(value) - 4.60517) < 1e-4
    assert "not built" in reason and "pip install" in reason
    assert "the backend 'cpp' was asked for and cannot run: not built" in result.stderr


def test_kernels_table_names_every_operator():
    choice.resolve("cpu", torch.float32, "cpp")
    assert all(getattr(choice.KERNELS["cpp"], name) is not None for name in fake.OPERATORS)


def test_debug_looks_at_labels_anywhere():
    """FUSED_LOSSES_DEBUG=1 looks on devices where looking waits; meta tensors have nothing to look at."""
    script = "print(fused_losses.losses.softmax.DEBUG)"
    assert python(script, FUSED_LOSSES_DEBUG="1").stdout.strip() == "True"
    assert python(script).stdout.strip() == "False"
