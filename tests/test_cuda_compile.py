"""The CUDA extension compiles, spills nothing, moves 128 bits at a time, links and registers its operators.

Compiling everything takes minutes, so every kernel template is compiled once per architecture, each time for
another dtype, and the pointwise ones for the cheapest and the most expensive formula. Building the extension
holds all the others to the same rules: spills are errors there too.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
pytestmark = pytest.mark.skipif(
    not Path(NVCC).exists(), reason="CUDA C++ IS NOT CHECKED HERE: nvcc is not installed (nvidia-cuda-toolkit has it)"
)
FLAGS = ["-O3", "-std=c++20", f"-I{TORCH / 'include'}", "-Xptxas", "-Werror,-warn-spills,-warn-lmem-usage,-v"]
TYPES = {"80": "Half", "90": "BFloat16", "100": "float", "120": "double"}
SUFFIXES = {"float": "f32", "double": "f64", "BFloat16": "bf16", "Half": "f16"}
KERNELS = {
    "pointwise": ["pointwise_forward_kernel", "pointwise_backward_kernel", "pointwise_finish_kernel"],
    "softmax": [
        "softmax_forward_kernel",
        "softmax_backward_kernel",
        "softmax_target_backward_kernel",
        "softmax_finish_kernel",
    ],
}
# The most that leaves two blocks of 256 threads to a multiprocessor.
MOST_REGISTERS = 128


def source(family, element_types, folder):
    """A family's own sources for some types, with two formulas instead of all."""
    few = f"""
#include "{ROOT}/csrc/formulas/pointwise_names.h"
#undef FL_POINTWISE_FORMULAS
#define FL_POINTWISE_FORMULAS(X) X(MSE, "mse") X(SigmoidFocal, "sigmoid_focal")
"""
    includes = [f'#include "{ROOT}/csrc/cuda/{family}_{SUFFIXES[element]}.cu"\n' for element in element_types]
    path = folder / f"{family}_kernels.cu"
    path.write_text((few if family == "pointwise" else "") + "".join(includes))
    return path


def run(*command, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
    return result.stdout + result.stderr


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("architecture", TYPES)
def test_no_kernel_spills(family, architecture, tmp_path):
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    output = run(NVCC, "-c", *FLAGS, target, source(family, [TYPES[architecture]], tmp_path), "-o", tmp_path / "out.o")
    pattern = r"Compiling entry function '(\w+)'.*?Used (\d+) registers"
    registers = {name: int(count) for name, count in re.findall(pattern, output, re.S)}
    print(f"{family} {TYPES[architecture]} sm_{architecture}")
    for name, count in sorted(registers.items(), key=lambda item: item[1]):
        print(f"  {count:4} registers  {readable(name)}")
    for kernel in KERNELS[family]:
        assert any(kernel in name for name in registers), f"{kernel} was not compiled"
    assert max(registers.values()) <= MOST_REGISTERS


def readable(name):
    return run("c++filt", name).split("(")[0].replace("fused_losses::", "").removeprefix("void ")


def test_a_spill_is_an_error(tmp_path):
    """The guard of the test above."""
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
    result = subprocess.run([NVCC, "-c", *FLAGS, "-arch=sm_90", path, "-o", tmp_path / "out.o"], capture_output=True)
    assert result.returncode != 0 and b"spilled" in result.stderr


@pytest.mark.parametrize("family, access", [("pointwise", "Flat"), ("softmax", "AlongClasses")])
def test_dense_elements_move_128_bits_at_a_time(family, access, tmp_path):
    listing = tmp_path / "out.ptx"
    run(NVCC, "-ptx", *FLAGS[:3], "-arch=compute_90", source(family, ["BFloat16"], tmp_path), "-o", listing)
    entries = re.findall(r"\.entry (\w+)\((.*?)\n\}", listing.read_text(), re.S)
    found = [(name, body) for name, body in entries if access in name]
    assert found
    for name, body in found:
        assert re.search(r"ld\.global\S*\.v4", body), f"{readable(name)} has no 128-bit load"
        assert "backward" not in name or re.search(r"st\.global\S*\.v4", body), f"{readable(name)}: no 128-bit store"
        # A load that the compiler does not know to be of global memory is slower.
        assert not re.search(r"\bld\.(v4|u16|b16|u32|f32)", body), f"{readable(name)} has a generic load"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """_C_cuda with few formulas and without machine code, linked as setup.py links it."""
    folder = tmp_path_factory.mktemp("cuda")
    home = Path(run(NVCC, "--dryrun", "-c", "-x", "cu", "/dev/null").split("TOP=")[1].split()[0])
    host = ["g++", "-c", "-O1", "-fPIC", "-std=c++20", "-fvisibility=hidden", "-DUSE_CUDA"]
    host += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{TORCH / 'include'}", f"-I{home / 'include'}"]
    device = [NVCC, "-c", "-std=c++20", f"-I{TORCH / 'include'}", "-gencode=arch=compute_90,code=compute_90"]
    device += ["-Xcompiler", "-fPIC"]
    commands = [[*host, ROOT / f"csrc/cuda/{family}.cpp", "-o", folder / f"{family}.o"] for family in KERNELS]
    for family in KERNELS:
        commands.append([*device, source(family, SUFFIXES, folder), "-o", folder / f"{family}_kernels.o"])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: run(*command), commands))
    path = folder / "_C_cuda.so"
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-L{home / 'lib64'}", "-lcudart"]
    run("g++", "-shared", *sorted(folder.glob("*.o")), "-o", path, *libraries, f"-Wl,-rpath,{home / 'lib64'}")
    return path


OF_LIBTORCH_CUDA = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}


def test_what_libtorch_cuda_must_have(library):
    """Every other symbol is in the CUDA runtime or in what CPU builds of torch have too."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(TORCH / "lib")}
    found = subprocess.run(["ldd", "-r", library], capture_output=True, text=True, env=environment).stdout
    assert "not found" not in found
    assert set(re.findall(r"undefined symbol: (\w+)", found)) == OF_LIBTORCH_CUDA


def test_loads_and_registers(library, tmp_path):
    """With a stand-in for libtorch_cuda, in a process of its own."""
    stand_in = tmp_path / "stand_in.c"
    stand_in.write_text("".join(f"void {symbol}(void) {{}}\n" for symbol in OF_LIBTORCH_CUDA))
    run("gcc", "-shared", "-fPIC", stand_in, "-o", tmp_path / "stand_in.so")
    schemas = "".join(path.read_text() for path in (ROOT / "csrc/ops").glob("*.cpp"))
    script = f"""
import ctypes, torch, fused_losses
ctypes.CDLL({str(tmp_path / "stand_in.so")!r}, mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
for name in {re.findall(r'"(?:pointwise|cross_entropy)_[a-z_]*(?=[(])', schemas)!r}:
    for device in ("CPU", "CUDA"):
        full = "fused_losses::" + name.strip('"')
        assert torch._C._dispatch_has_kernel_for_dispatch_key(full, device), (full, device)
print("registered")
"""
    assert "registered" in run(sys.executable, "-c", script, cwd=ROOT)
