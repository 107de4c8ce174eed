"""Importing is cheap and pulls nothing heavy in."""

import os
import subprocess
import sys

LIMIT_MS = 60


def python(script, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    return result.stdout.strip()


def test_import_time(tmp_path):
    # Compiled once, as an installed package is; of this process alone, as other tests run beside it.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    script = """
import time, torch
start = time.process_time()
import fused_losses
print((time.process_time() - start) * 1e3)
"""
    assert min(float(python(script, **compiled)) for _ in range(5)) < LIMIT_MS


def test_nothing_heavy_is_imported():
    script = """
import sys, torch
before = set(sys.modules)
import fused_losses
heavy = ("triton", "numpy", "torch._dynamo", "torch._inductor", "fused_losses.testing", "fused_losses.specs")
print([name for name in heavy if name in set(sys.modules) - before])
"""
    assert python(script) == "[]"


def test_a_first_call_does_not_import_triton():
    script = """
import sys, torch, fused_losses
fused_losses.MSELoss()(torch.ones(100, 100), torch.ones(100, 100))
print("triton" in sys.modules)
"""
    assert python(script) == "False"


def test_fusing_does_not_import_the_compiler():
    """A second of every user's first call. Torch's own decompositions of these do."""
    script = """
import sys, torch, torch.nn.functional as F, fused_losses

def loss(x, y):
    seen = F.softplus(x) + torch.logaddexp(x, y) + F.elu(x) + torch.special.erfcx(y) + torch.special.log_ndtr(x)
    return (torch.logsumexp(seen, 1) + F.leaky_relu(y).sum(1)).mean()

x, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
fused = fused_losses.fuse(loss, strict=True)
fused(x, y).backward()
torch.testing.assert_close(fused(x, y), loss(x, y))
print("torch._dynamo" in sys.modules)
"""
    assert python(script) == "False"


def test_fusing_does_not_import_sympy():
    """A third of a second. Torch's own look at the shapes of gradients does."""
    script = """
import sys, torch, fused_losses

x = torch.randn(3, 5, requires_grad=True)
fused_losses.fuse(lambda x: (x[:, 1:] - x[:, :-1]).square().mean(), strict=True)(x).backward()
print("sympy" in sys.modules)
"""
    assert python(script) == "False"


def test_every_public_name_exists():
    import fused_losses
    from fused_losses import functional, testing

    for module in (fused_losses, functional, testing):
        assert all(hasattr(module, name) for name in module.__all__)
