"""Compiles the CUDA kernels for the CPU, under sanitizers, and runs cases on them."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from building import exclusively
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulation"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
# To optimise takes longer than the cases then take less.
SANITIZED = ["-O0", "-fsanitize=address,undefined"]
FLAGS = [
    "-std=c++20",
    "-g1",
    "-fno-strict-aliasing",
    "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas",
    "-DFL_TARGET_HAS_FMA",  # every GPU has it
    "-DFL_INLINE=inline",  # a copy for every caller, with its checks, takes up to four times as long to compile
    f"-I{HERE / 'include'}",
    f"-I{Path(torch.__file__).parent / 'include'}",
]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def build(family: str, tree: Path | None = None) -> Path:
    """The program that runs a family's cases, compiled once for the same sources.

    Of a tree of its own, only what fp32 needs is built.
    """
    dtypes = DTYPES if tree is None else (torch.float32,)
    flags = [*FLAGS, *SANITIZED, *([] if tree is None else ["-DEMULATION_FLOAT_ONLY"])]
    tree = tree or ROOT
    sources = [tree / "tests" / "emulation" / f"{family}.cpp"]
    sources += [tree / "csrc" / "cuda" / f"{family}_{SUFFIXES[dtype]}.cu" for dtype in dtypes]
    return link(CACHE / f"{family}-{fingerprint(tree, flags)}", sources, flags, SANITIZED)


def build_bindings() -> Path:
    """A library of the CUDA operators for CPU tensors, ``torch.ops.emulated_losses``; without sanitizers."""
    torch_flags = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags = [*FLAGS, "-O1", "-fPIC", "-fvisibility=hidden", *torch_flags]
    sources = [HERE / "bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    return link(CACHE / f"bindings-{fingerprint(ROOT, flags)}.so", sources, flags, ["-shared", *libraries])


def link(output: Path, sources: list[Path], flags: list[str], link_flags: list[str]) -> Path:
    with exclusively(output):
        if not output.exists():
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(lambda source: compile_one(source, flags, output.name), sources))
            partial = output.with_suffix(".partial")
            subprocess.run(["g++", *objects, *link_flags, "-o", partial], check=True)
            partial.rename(output)
            for unneeded in objects:
                unneeded.unlink()
    return output


def compile_one(source: Path, flags: list[str], prefix: str) -> Path:
    output = CACHE / f"{prefix}-{source.stem}{source.suffix}.o"
    subprocess.run(["g++", "-x", "c++", "-c", *flags, source, "-o", output], check=True)
    return output


def fingerprint(tree: Path, flags: list[str]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for folder in ("csrc", "tests/emulation"):
        for path in sorted((tree / folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def changed_tree(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the sources with one change, which must apply exactly once."""
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, folder / part)
    path = folder / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))
    return folder


class Case:
    """What a program reads for one case, field after field; its buffers come back as the kernels left them."""

    def __init__(self, seed: int, max_blocks: int):
        self.data = bytearray(b"\x01")
        self.shapes: list[tuple[int, torch.dtype]] = []
        self.integer(seed, max_blocks)

    def integer(self, *values: int) -> None:
        self.data += struct.pack(f"={len(values)}q", *values)

    def real(self, *values: float) -> None:
        self.data += struct.pack(f"={len(values)}d", *values)

    def text(self, value: str) -> None:
        self.integer(len(value))
        self.data += value.encode()

    def dtype(self, dtype: torch.dtype) -> None:
        self.integer([torch.float32, torch.float64, torch.bfloat16, torch.float16].index(dtype))

    def padded(self, values: Iterable[int], count: int = 6) -> None:
        values = list(values)
        self.integer(*values, *[0] * (count - len(values)))

    def buffer(self, tensor: Tensor | None, misalignment: int = 0, pieces: int = 1, distance: int = 0) -> None:
        """The memory between a tensor's first and last element; with pieces, equal parts `distance` bytes apart."""
        if tensor is None:
            return self.integer(-1, 0, 1, 0)
        memory = memory_of(tensor)
        raw = memory.view(torch.uint8).numpy().tobytes()
        self.integer(len(raw) // pieces, misalignment * tensor.element_size(), pieces, distance)
        self.data += raw
        self.shapes.append((memory.numel(), tensor.dtype))


def memory_of(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((span,), (1,)).clone()


def run(program: Path, cases: list[Case], folder: Path) -> list[list[Tensor]]:
    """The memory of every case's buffers after its kernels ran."""
    (folder / "cases").write_bytes(b"".join(bytes(case.data) for case in cases))
    result = subprocess.run(
        [program, folder / "cases", folder / "results"],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    )
    if result.returncode != 0:
        raise RuntimeError(f"exit code {result.returncode}\n{result.stderr[:4000]}")
    raw = bytearray((folder / "results").read_bytes())
    results, at = [], 0
    for case in cases:
        tensors = []
        for count, dtype in case.shapes:
            size = count * dtype.itemsize
            tensors.append(torch.frombuffer(raw[at : at + size] or bytearray(8), dtype=dtype)[:count].clone())
            at += size
        results.append(tensors)
    assert at == len(raw)
    return results


def assert_near(ours: Tensor, truth: Tensor, accumulate: torch.dtype, what: object) -> None:
    """Rounding of the result itself, and a few roundings of the arithmetic before; NaN where the truth is NaN."""
    eps, result_eps = torch.finfo(accumulate).eps, torch.finfo(ours.dtype).eps
    largest = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
    tiny = torch.finfo(ours.dtype).smallest_normal * result_eps  # the spacing of denormals
    torch.testing.assert_close(
        ours.double(),
        truth.double(),
        rtol=max(result_eps, 64 * eps),
        atol=max(16 * eps * largest, tiny),
        equal_nan=True,
        msg=lambda message: f"{what}: {message}",
    )
