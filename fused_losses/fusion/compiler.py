"""Keeps generated sources and what is built of them, once for everybody: a cache on disk, by content."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..backends import loading

PACKAGE = Path(__file__).resolve().parent.parent
# Never -ffast-math or -march=native: what a loss is must not depend on where it was built. Products and sums are not
# contracted, since x * x - y * y is 0 for equal x and y; the polynomials of csrc ask for it where they want it.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)
# Less of what takes up to two thirds of a build, and was measured to make no kernel faster, where a compiler knows it.
QUICKER = (
    "-fno-unswitch-loops",
    "--param=max-completely-peel-times=4",  # what vectors leave over stays a loop; those over a tensor's axes are short
    "--param=max-gcse-memory=1024",
    "-fno-gcse-after-reload",
)
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", *_AVX2)
CAPABILITIES = {"default": (), "avx2": _AVX2, "avx512": _AVX512}
DIGEST_BYTES = 32  # a library ends with its own digest, which tells a damaged one


class BuildError(RuntimeError):
    """Why a source could not be built here."""


def load(source: str) -> ctypes.CDLL:
    """The library of a source: from the cache, or built now.

    Raises:
        BuildError: if there is no compiler, it fails, or the cache cannot be used or trusted.
    """
    with _usable(folder := cache_folder()):
        return ctypes.CDLL(str(_library(source, folder)))


def load_made(recipe: bytes, make: Callable[[], str]) -> ctypes.CDLL:
    """The library of the source that a recipe makes, which is made only where the cache does not know the recipe.

    Raises:
        BuildError: as for a source.
    """
    with _usable(folder := cache_folder()):
        link = folder / f"{_key(recipe)}.recipe"  # to the library
        if not _is_whole(link):
            library = _library(make(), folder)
            with _replaced(link) as made:
                made.symlink_to(library.name)
        return ctypes.CDLL(str(link))


def _library(source: str, folder: Path) -> Path:
    path = folder / f"{key_of(source)}.so"
    if not _is_whole(path):
        with _exclusively(path):
            if not _is_whole(path):  # another process may have built it meanwhile
                with _replaced(path) as library:
                    _build(source, library)
    return path


def python_file(source: str) -> Path:
    """The file in which a generated Python source lies; written now if it is not there or not whole.

    Raises:
        BuildError: if the cache cannot be used or trusted.
    """
    content = source.encode()
    path = cache_folder() / f"{hashlib.sha256(content).hexdigest()}.py"
    with _usable(path.parent):
        if not (path.is_file() and path.read_bytes() == content):
            with _replaced(path) as written:
                written.write_bytes(content)
    return path


@functools.cache
def capability() -> str:
    """The instruction set of generated kernels: the one that the CPU extension chose, or would."""
    if loading.unavailable_reason("_C_cpu") is None:
        return torch.ops.fused_losses.cpu_capability()
    best = torch.backends.cpu.get_cpu_capability().lower()
    wanted = os.environ.get("FUSED_LOSSES_CPU_CAPABILITY") or "avx512"
    order = list(CAPABILITIES)
    return order[min(order.index(name) if name in order else 0 for name in (best, wanted))]


@functools.cache
def command() -> tuple[str, ...]:
    """How the compiler is called: the words of ``$CXX``, or the first that is there.

    Raises:
        BuildError: if none is there, or not the one that is asked for.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for name in named[:1] or ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path, *named[1:]
    if named:
        raise BuildError(f"CXX names {named[0]}, which is not there; name a C++ compiler, or none to have one found")
    raise BuildError("there is no C++ compiler; install g++ (apt-get install g++), or name one in CXX")


def headers() -> Path:
    """The folder that generated sources include from: inside an installed package, or beside an editable one."""
    installed = PACKAGE / "_csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


@functools.cache
def _surroundings(compiler: tuple[str, ...]) -> bytes:
    """What a library depends on besides its source: the headers, the compiler and the machine."""
    digest = hashlib.sha256(platform.machine().encode())
    for word in compiler:  # a compiler may be called by another program
        program = os.path.realpath(shutil.which(word) or word)
        if os.path.exists(program):
            status = os.stat(program)
            word = f"{program} {status.st_size} {status.st_mtime_ns}"
        digest.update(f"{word}\0".encode())
    for path in sorted([*headers().glob("common/*.h"), *headers().glob("fusion/*.h")]):
        digest.update(path.read_bytes())
    return digest.digest()


def _flags() -> tuple[str, ...]:
    return *FLAGS, *CAPABILITIES[capability()]


def key_of(source: str) -> str:
    """The name of a source's library."""
    return _key(source.encode())


def _key(content: bytes) -> str:
    digest = hashlib.sha256(_surroundings(command()))
    digest.update("".join(f"{flag}\0" for flag in (*_flags(), *QUICKER)).encode() + content)
    return digest.hexdigest()


def cache_folder() -> Path:
    """``$FUSED_LOSSES_CACHE``, or ``fused_losses`` in the user's cache; only this user may write there.

    Raises:
        BuildError: if somebody else owns it or may write to it: what is loaded from there runs as this user.
    """
    named = os.environ.get("FUSED_LOSSES_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(named or os.path.join(home, "fused_losses")).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be made ({error}); name another in FUSED_LOSSES_CACHE") from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"the cache {folder} is not only this user's to write; run `chmod 700` on your own, or name another in "
            "FUSED_LOSSES_CACHE"
        )
    return folder


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Says what to do where a full disk, or whatever else, keeps the cache from being used."""
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"the cache {folder} cannot be used ({error}); name another folder in FUSED_LOSSES_CACHE"
        ) from error


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A path in a folder of its own, for a file that takes another's place once it is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        yield written
        os.replace(written, path)


@contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    """Processes that need the same library wait for the first."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(source: str, library: Path) -> None:
    text = library.with_suffix(".cpp")
    text.write_text(source)
    call = [*command(), *_flags(), f"-I{headers()}", str(text), "-o", str(library)]
    try:
        _compile([*call, *QUICKER])
    except BuildError:
        _compile(call)
    content = library.read_bytes()
    with open(library, "ab") as end:
        end.write(hashlib.sha256(content).digest())
    library.chmod(0o700)  # whatever the umask is


def _compile(call: list[str]) -> None:
    try:
        run = subprocess.run(call, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"the C++ compiler cannot be run ({error}); name another in CXX") from error
    if run.returncode != 0:
        raise BuildError(
            f"the C++ compiler fails; name another in CXX if it is at fault:\n{' '.join(call)}\n{run.stderr[-2000:]}"
        )
