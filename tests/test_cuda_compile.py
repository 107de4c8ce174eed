"""The CUDA extension: compiles for every architecture, spills nothing, moves 128 bits at a time, registers itself.

``setup.py`` builds it whole, as it does for users; nvcc makes an error of every spill on the way.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton.backends.nvidia
from building import exclusively

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
pytestmark = pytest.mark.skipif(
    not Path(NVCC).exists(), reason="CUDA C++ IS NOT CHECKED HERE: nvcc is not installed (nvidia-cuda-toolkit has it)"
)
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}
KERNELS = [
    "pointwise_forward_kernel",
    "pointwise_backward_kernel",
    "pointwise_finish_kernel",
    "softmax_forward_kernel",
    "softmax_backward_kernel",
    "softmax_target_backward_kernel",
    "softmax_finish_kernel",
    "row_statistics_kernel",
    "row_gradient_kernel",
    "divergence_forward_kernel",
    "divergence_backward_kernel",
]
# The most that leaves two blocks of 256 threads to a multiprocessor.
MOST_REGISTERS = 128


def run(*command, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def library():
    """_C_cuda, built once by whichever test comes first; ninja rebuilds only what changed."""
    folder = ROOT / "build" / "cuda"
    switches = {"FORCE_CUDA": "1", "FUSED_LOSSES_BUILD": "require", "MAX_JOBS": "2"}
    environment = {**os.environ, **switches, "PATH": f"{Path(NVCC).parent}:{os.environ['PATH']}"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = ["setup.py", "-q", "build_ext", "--build-temp", folder / "temporary", "--build-lib", folder]
    with exclusively(folder / "library"):
        run(sys.executable, *command, cwd=ROOT, env=environment)
    return folder / "fused_losses" / "_C_cuda.abi3.so"


def resource_usage(library):
    """Registers and bytes of stack and local memory of every kernel for every architecture."""
    output = run(CUOBJDUMP, "--dump-resource-usage", library)
    for part in re.split(r"\nFatbin elf code:\n", output):
        architecture = re.search(r"arch = (\w+)", part)
        pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        for name, *numbers in re.findall(pattern, part):
            yield architecture[1], name, *map(int, numbers)


def test_no_kernel_spills(library):
    found = list(resource_usage(library))
    for architecture in ARCHITECTURES:
        names = [name for arch, name, *_ in found if arch == architecture]
        assert all(any(kernel in name for name in names) for kernel in KERNELS), architecture
    assert {architecture for architecture, *_ in found} == ARCHITECTURES
    worst = sorted(found, key=lambda entry: entry[2])[-5:]
    print("\n".join(f"{registers} registers {arch} {readable(name)}" for arch, name, registers, *_ in worst))
    assert all(stack == local == 0 for *_, stack, local in found)
    assert max(registers for _, _, registers, *_ in found) <= MOST_REGISTERS


def readable(name):
    return run("c++filt", name).split("(")[0].replace("fused_losses::", "").removeprefix("void ")


def test_a_spill_is_an_error(tmp_path):
    """The guard of the build: setup.py's own flags refuse a kernel that spills."""
    path = tmp_path / "spills.cu"
    path.write_text("""
__global__ void __launch_bounds__(1024, 2) kernel(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i + threadIdx.x * 64] = v[63 - i] * v[i];
}
""")
    setup = (ROOT / "setup.py").read_text()
    flags = [flag for line in re.findall(r"NVCC_FLAGS \+?= (\[.*\])", setup) for flag in eval(line)]
    command = [NVCC, "-c", *flags, "-arch=sm_90", path, "-o", tmp_path / "out.o"]
    result = subprocess.run(command, capture_output=True)
    assert result.returncode != 0 and b"spilled" in result.stderr


def source_with_few_formulas(family, folder):
    """A family's own bf16 source, with two formulas instead of all: listings of the others are alike."""
    few = f"""
#include "{ROOT}/csrc/formulas/pointwise_names.h"
#undef FL_POINTWISE_FORMULAS
#define FL_POINTWISE_FORMULAS(X) X(MSE, "mse") X(SigmoidFocal, "sigmoid_focal")
"""
    path = folder / f"{family}_kernels.cu"
    path.write_text((few if family == "pointwise" else "") + f'#include "{ROOT}/csrc/cuda/{family}_bf16.cu"\n')
    return path


@pytest.mark.parametrize("family, access", [("pointwise", "Flat"), ("softmax", "AlongClasses"), ("linear", "row_")])
def test_dense_elements_move_128_bits_at_a_time(family, access, tmp_path):
    listing = tmp_path / "out.ptx"
    options = ["-O3", "-std=c++20", f"-I{TORCH / 'include'}", "-arch=compute_80"]
    run(NVCC, "-ptx", *options, source_with_few_formulas(family, tmp_path), "-o", listing)
    entries = re.findall(r"\.entry (\w+)\((.*?)\n\}", listing.read_text(), re.S)
    found = [(name, body) for name, body in entries if access in name]
    assert found
    for name, body in found:
        assert re.search(r"ld\.global\S*\.v4", body), f"{readable(name)} has no 128-bit load"
        writes = "backward" in name or "gradient" in name
        assert not writes or re.search(r"st\.global\S*\.v4", body), f"{readable(name)}: no 128-bit store"
        # A load that the compiler does not know to be of global memory is slower.
        assert not re.search(r"\bld\.(v4|u16|b16|u32|f32)", body), f"{readable(name)} has a generic load"


OF_LIBTORCH_CUDA = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}
# Weak: where torch does not have it, nothing is kept.
MAY_BE_MISSING = {"torch_from_blob"}


def test_what_libtorch_cuda_must_have(library):
    """Every other symbol is in the CUDA runtime or in what CPU builds of torch have too."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(TORCH / "lib")}
    found = subprocess.run(["ldd", "-r", library], capture_output=True, text=True, env=environment).stdout
    missing = [line for line in found.splitlines() if "not found" in line]
    assert all("libtorch_cuda.so" in line for line in missing), missing
    assert set(re.findall(r"undefined symbol: (\w+)", found)) - MAY_BE_MISSING == OF_LIBTORCH_CUDA


def test_loads_and_registers(library, tmp_path):
    """With a stand-in for libtorch_cuda, in a process of its own."""
    stand_in = tmp_path / "stand_in.c"
    stand_in.write_text("".join(f"void {symbol}(void) {{}}\n" for symbol in OF_LIBTORCH_CUDA))
    shared = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    run("gcc", *shared, stand_in, "-o", tmp_path / "libtorch_cuda.so")
    script = f"""
import ctypes, torch, fused_losses
from fused_losses.backends import fake
ctypes.CDLL({str(tmp_path / "libtorch_cuda.so")!r}, mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
for name in fake.OPERATORS:
    for device in ("CPU", "CUDA"):
        full = "fused_losses::" + name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(full, device), (full, device)
print("registered")
"""
    assert "registered" in run(sys.executable, "-c", script, cwd=ROOT)
