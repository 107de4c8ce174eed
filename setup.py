"""Builds two extensions against torch's stable ABI; either may fail without taking the other or the install along.

FUSED_LOSSES_BUILD=auto|off|require, FORCE_CUDA=1, FUSED_LOSSES_SKIP_CUDA=1, MAX_JOBS and TORCH_CUDA_ARCH_LIST
steer it. What happened is recorded in fused_losses/_build_log.json, which `python -m fused_losses` reads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import __version__ as setuptools_version
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("FUSED_LOSSES_BUILD", "auto").lower()
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # a formula has the same bits wherever it is inlined; what profits says fma_
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
# As on CPUs, what profits from contraction says fma_; a kernel that spills registers is a fault of the kernel.
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-fmad=false"]
NVCC_FLAGS += ["-Xptxas", "-Werror,-warn-spills,-warn-lmem-usage"]
NVCC_FLAGS += ["-Xfatbin", "-compress-all"]
record: dict[str, Any] = {"torch": None, "cuda": None, "log": [], "extensions": {}}


def note(message: str, extension: str | None = None, status: str | None = None) -> None:
    print(f"fused_losses: {message}", file=sys.stderr)
    record["log"].append(message)
    if extension is not None:
        record["extensions"][extension] = {"status": status, "reason": None if status == "built" else message}


def import_torch() -> Any:
    """torch's extension tools, or None with the reason noted."""
    if MODE not in ("auto", "off", "require"):
        raise SystemExit(f"FUSED_LOSSES_BUILD must be auto, off or require, got {MODE!r}")
    if MODE == "off":
        return skip_all("the native build is switched off (FUSED_LOSSES_BUILD=off)")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return skip_all(
            f"torch cannot be imported at build time ({error}), so this is a pure-Python install; for the kernels "
            "run `pip install --no-build-isolation .` in an environment that has torch"
        )
    record["torch"], record["cuda"] = torch.__version__, torch.version.cuda
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        return skip_all(f"torch {torch.__version__} has no stable ABI; the kernels need torch 2.10 or newer")
    return cpp_extension


def skip_all(reason: str) -> None:
    if MODE == "require":
        raise SystemExit(f"fused_losses: FUSED_LOSSES_BUILD=require, but {reason}")
    note(reason)
    for extension in ("_C_cpu", "_C_cuda"):
        record["extensions"][extension] = {"status": "skipped", "reason": reason}
    write_record(ROOT / "fused_losses")


def sources(*folders: str, endings: tuple[str, ...] = (".cpp",)) -> list[str]:
    """Every source of some folders of csrc: a new family needs no line here."""
    found = [path for folder in folders for path in sorted((ROOT / "csrc" / folder).iterdir())]
    return [str(path.relative_to(ROOT)) for path in found if path.suffix in endings]


def cpu_extension(tools: Any) -> Any:
    return tools.CppExtension(
        "fused_losses._C_cpu",
        sources("ops", "cpu"),
        py_limited_api=True,
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-s"],
    )


def cuda_home(tools: Any) -> str | None:
    """Where the CUDA toolkit is: as named, or as nvcc itself says, for the one on the path may be a wrapper."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return named
    if (nvcc := shutil.which("nvcc")) is None:
        return tools.CUDA_HOME
    steps = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1] for line in steps.splitlines() if "TOP=" in line), nvcc + "/../..")
    return os.path.realpath(top)


def cuda_extension(tools: Any) -> Any:
    """The CUDA extension, or None with the reason noted. No GPU is looked for: machines that build have none."""
    if not sources("cuda", endings=(".cu",)):
        return note("this version has no CUDA kernels", "_C_cuda", "skipped")
    if os.environ.get("FUSED_LOSSES_SKIP_CUDA", "0") == "1":
        return note("skipped (FUSED_LOSSES_SKIP_CUDA=1)", "_C_cuda", "skipped")
    if record["cuda"] is None and os.environ.get("FORCE_CUDA", "0") != "1":
        return note("this torch is built for CPUs only (FORCE_CUDA=1 builds anyway)", "_C_cuda", "skipped")
    home = cuda_home(tools)
    if home is None or not (Path(home) / "bin" / "nvcc").is_file():
        return note("there is no CUDA toolkit; set CUDA_HOME", "_C_cuda", "skipped")
    tools.CUDA_HOME = home
    libraries = [str(Path(home) / "lib64")]
    if record["cuda"] is None:
        libraries.insert(0, stand_in_for_torch_cuda())
    return tools.CppExtension(
        "fused_losses._C_cuda",
        sources("cuda", endings=(".cpp", ".cu")),
        py_limited_api=True,
        include_dirs=[str(Path(home) / "include")],
        libraries=["cudart"],
        library_dirs=libraries,
        extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": [*NVCC_FLAGS, *architecture_flags(home)]},
        extra_link_args=["-s", "-Wl,--no-as-needed", "-ltorch_cuda"],
    )


def architecture_flags(home: str) -> list[str]:
    """Code for every architecture that this nvcc knows, unless TORCH_CUDA_ARCH_LIST names others.

    All of it comes from one PTX, which is most of what compiling takes: no kernel asks where it runs.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    known = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout
    codes = [code for code in ARCHITECTURES if code in known.split()]
    return [f"-gencode=arch=compute_80,code={code}" for code in (*codes, "compute_80")]


def stand_in_for_torch_cuda() -> str:
    """A folder with an empty libtorch_cuda: beside a CPU-only torch, it only names what to load later."""
    folder = ROOT / "build" / "stand_in"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libtorch_cuda.so"
    command = ["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(library), "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run(command, check=True)
    return str(folder)


def drop_stale_objects(folder: str) -> None:
    """Beside a CPU-only torch nobody keeps track of what a .cu includes."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*h"))
    for built in Path(folder).rglob("csrc/cuda/*.o"):
        if built.stat().st_mtime < newest:
            built.unlink()


def build_command(tools: Any) -> type:
    class Build(tools.BuildExtension):
        """Builds the extensions one by one; only FUSED_LOSSES_BUILD=require lets one of them end the install."""

        def build_extensions(self) -> None:
            everything = list(self.extensions)
            for extension in everything:
                name = extension.name.rsplit(".", 1)[-1]
                self.extensions = [extension]
                if name == "_C_cuda" and record["cuda"] is None:
                    drop_stale_objects(self.build_temp)
                try:
                    super().build_extensions()
                    note(f"built {name} with torch {record['torch']}", name, "built")
                except (Exception, SystemExit) as error:
                    if MODE == "require":
                        raise
                    note(
                        f"building failed: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
                        name,
                        "failed",
                    )
            self.extensions = [e for e in everything if Path(self.get_ext_fullpath(e.name)).is_file()]
            write_record(Path(self.get_ext_fullpath("fused_losses._")).parent)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            write_record(ROOT / "fused_losses")

    return Build


def write_record(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_log.json").write_text(json.dumps(record, indent=2) + "\n")


def check_setuptools() -> None:
    """Older ones do not know the metadata of pyproject.toml, and say so at length."""
    if int(setuptools_version.split(".")[0]) < 77:
        raise SystemExit(
            f"fused_losses needs setuptools 77 or newer to build, got {setuptools_version}; "
            "run `pip install 'setuptools>=77'` first, or leave out --no-build-isolation for pure Python"
        )


def main() -> None:
    check_setuptools()
    tools = import_torch()
    arguments: dict[str, Any] = {}
    if tools is not None:
        extensions = [extension for extension in (cpu_extension(tools), cuda_extension(tools)) if extension]
        arguments = {
            "ext_modules": extensions,
            "cmdclass": {"build_ext": build_command(tools)},
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        }
    packages = find_packages(include=["fused_losses", "fused_losses.*"])
    data = {"fused_losses": ["py.typed", "_build_log.json"]}
    folders = {
        # Triton's own project ships an importable `triton_kernels`; ours is installed inside our package.
        "fused_losses.triton_kernels": "triton_kernels",
        # The kernels that `fuse` generates include these.
        "fused_losses._csrc.common": "csrc/common",
        "fused_losses._csrc.fusion": "csrc/fusion",
    }
    if all((ROOT / folder).is_dir() for folder in folders.values()):
        packages += folders
        arguments["package_dir"] = folders
        data |= {name: ["*.h"] for name in folders}
    setup(packages=packages, package_data=data, **arguments)


main()
