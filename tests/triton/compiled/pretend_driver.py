"""A driver without a GPU: the launchers' own host code compiles every launch for an architecture, and runs none."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
stock_run = JITFunction.run


class PretendDriver:
    """What Triton asks of a driver before it launches, and a launcher that notes what it is given."""

    # The kernel of each launch, and its grid and arguments; kernels and their launchers outlive a driver.
    launched: ClassVar[list[tuple[str, tuple]]] = []

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)
        self.utils = self

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, of_launch, enter, leave, *arguments):
            self.launched.append((source.hash(), (x, y, z, *arguments)))

        return launch

    def load_binary(self, name, kernel, shared, device):
        module, function, registers, spills, threads = 0, 0, 0, 0, 1024
        return module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # kernels are cached by device: one for each architecture

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_name):
        return "int"


class Compiled:
    """One compiled kernel and what its binary says."""

    def __init__(self, name: str, kernel):
        self.name, self.shared, self.ptx = name, kernel.metadata.shared, kernel.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = self._tool("cuobjdump", "--dump-resource-usage", file.name)
            self.assembly = self._tool("nvdisasm", "-c", file.name)
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        self.registers, self.stack, self.local = numbers["REG"], numbers["STACK"], numbers["LOCAL"]

    @staticmethod
    def _tool(tool: str, *arguments: str) -> str:
        return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local or re.search(r"\b(STL|LDL)\b", self.assembly))

    @property
    def wide_loads(self) -> int:
        return len(re.findall(r"LDG\.E[.A-Z0-9]*\.(?:128|256)", self.assembly))


def use(architecture: int) -> PretendDriver:
    """From now on launches run up to the launcher of the driver that is returned."""
    JITFunction.run = stock_run
    PretendDriver.launched.clear()
    driver.set_active(PretendDriver(architecture))
    return driver.active


def install(architecture: int) -> list[Compiled]:
    """From now on launches are compiled for an architecture and collected in the list that is returned."""
    collected: list[Compiled] = []
    use(architecture)

    def run(self, *arguments, grid, warmup, **options):
        kernel = stock_run(self, *arguments, grid=grid, warmup=True, **options)
        collected.append(Compiled(self.fn.__name__, kernel))
        return kernel

    JITFunction.run = run
    return collected
