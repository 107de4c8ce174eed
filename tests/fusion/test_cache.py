"""The cache of built kernels: only its user's, whole, built once; and what is said where nothing can be built."""

import hashlib
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_losses import fuse
from fused_losses.fusion import compiler

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
# Another process that is at building the library whose lock it is given.
BUILDING = """
import fcntl, sys, time
with open(sys.argv[1], "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSED_LOSSES_CACHE", str(folder))
    return folder


@pytest.fixture
def compile_by(tmp_path, monkeypatch):
    """Makes a shell script the compiler."""

    def choose(script):
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setenv("CXX", str(path))
        compiler.command.cache_clear()
        return path

    yield choose
    compiler.command.cache_clear()


def library(cache):
    (path,) = cache.glob("*.so")
    return path


def answer():
    return compiler.load(SOURCE).answer()


def squares(x, t):
    return (x - t).square().mean()


def test_only_the_user_may_write(cache):
    before = os.umask(0)
    try:
        assert answer() == 42
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not library(cache).stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    cache.chmod(0o777)
    with pytest.raises(compiler.BuildError, match=r"chmod 700.*FUSED_LOSSES_CACHE"):
        answer()


def test_a_library_is_built_once(cache, compile_by, tmp_path):
    compile_by(f'echo >> {tmp_path}/builds; exec g++ "$@"')
    assert answer() == answer() == 42
    assert len((tmp_path / "builds").read_text()) == 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:100] + b"x" + b[101:], lambda b: b""])
def test_a_damaged_library_is_built_again(cache, damage):
    cache.mkdir(0o700)
    compiler.load(SOURCE + "// another\n")
    whole = library(cache).read_bytes()
    library(cache).unlink()
    path = cache / f"{compiler.key_of(SOURCE)}.so"
    path.write_bytes(damage(whole))
    assert answer() == 42
    assert path.read_bytes() != damage(whole)


def test_what_cannot_be_loaded_says_so(cache):
    """As in a folder whose files may not be run."""
    cache.mkdir(0o700)
    content = b"no library"
    (cache / f"{compiler.key_of(SOURCE)}.so").write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(compiler.BuildError, match=r"cannot be used.*FUSED_LOSSES_CACHE"):
        answer()


def test_a_cache_that_cannot_be_written_says_so(cache, tmp_path, monkeypatch):
    (cache / f"{compiler.key_of(SOURCE)}.lock").mkdir(parents=True)  # stands for a disk that is full or read only
    with pytest.raises(compiler.BuildError, match=r"cannot be used.*FUSED_LOSSES_CACHE"):
        answer()
    (cache / f"{hashlib.sha256(b'x = 1').hexdigest()}.py").mkdir()
    with pytest.raises(compiler.BuildError, match=r"cannot be used.*FUSED_LOSSES_CACHE"):
        compiler.python_file("x = 1")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSED_LOSSES_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(compiler.BuildError, match=r"cannot be made.*FUSED_LOSSES_CACHE"):
        answer()


def test_a_killed_build_leaves_no_lock(cache):
    cache.mkdir(0o700)
    lock = cache / f"{compiler.key_of(SOURCE)}.lock"
    other = subprocess.Popen([sys.executable, "-c", BUILDING, lock], stdout=subprocess.PIPE)
    other.stdout.readline()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(answer()))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not list(cache.glob("*.so"))
    other.kill()
    other.communicate()
    waiting.join(60)
    assert answers == [42]


def test_a_build_that_fails_leaves_nothing(cache, compile_by):
    compile_by('while [ "$1" != -o ]; do shift; done; echo half > "$2"; echo out of memory >&2; exit 1')
    with pytest.raises(compiler.BuildError, match=r"CXX(.|\n)*out of memory"):
        answer()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_compiler_that_lacks_a_parameter_does_without(cache, compile_by):
    compile_by('case "$*" in *--param*) echo invalid name >&2; exit 1;; esac; exec g++ "$@"')
    assert answer() == 42


def losses_of_ranks(compiler_path, folder):
    """The gradient of a model whose loss every rank fuses, averaged over ranks."""
    os.environ.update(CXX=compiler_path, FUSED_LOSSES_CACHE=folder)
    torch.manual_seed(0)
    model, loss = DistributedDataParallel(nn.Linear(3, 2)), fuse(squares, strict=True)
    x, t = torch.randn(8, 3), torch.randn(8, 2)
    own = slice(dist.get_rank(), None, dist.get_world_size())
    loss(model(x[own]), t[own]).backward()
    expected = nn.Linear(3, 2)
    expected.load_state_dict(model.module.state_dict())
    squares(expected(x), t).backward()
    torch.testing.assert_close(model.module.weight.grad, expected.weight.grad)


def test_ranks_share_one_build(cache, compile_by, tmp_path):
    path = compile_by(f'echo >> {tmp_path}/builds; exec g++ "$@"')
    run(losses_of_ranks, 2, str(path), str(cache))
    assert len((tmp_path / "builds").read_text()) == 1  # of the loss with its gradient


def rows(x):
    return x.softmax(1).square().mean()


def test_a_form_is_built_where_sizes_ask_for_it(cache, compile_by):
    """Short rows and long ones have kernels of their own."""
    loss = fuse(rows, strict=True)
    for width, built in ((5, 1), (7, 1), (40, 2), (50, 2), (6, 2)):
        x = torch.randn(3, width, requires_grad=True)
        torch.testing.assert_close(loss(x), rows(x))
        gradients = [torch.autograd.grad(each(x), x)[0] for each in (loss, rows)]
        torch.testing.assert_close(*gradients)
        assert len(list(cache.glob("*.so"))) == built
    other = fuse(rows)
    other(torch.ones(3, 5, requires_grad=True))
    compile_by("exit 4")
    with pytest.warns(UserWarning, match=r"plain torch.*fails"):
        other(torch.ones(3, 40, requires_grad=True))


WITHOUT = {
    "no compiler": ("", r"there is no C\+\+ compiler; install g\+\+"),
    "no such compiler": ("clang-0", "CXX names clang-0"),
    "a failing one": (None, r"fails; name another in CXX(.|\n)*internal error"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_without_a_compiler_the_plain_loss_runs(cache, compile_by, monkeypatch, case):
    name, reason = WITHOUT[case]
    compile_by("echo internal error >&2; exit 4")
    if name is not None:
        monkeypatch.setenv("CXX", name)
        monkeypatch.setenv("PATH", str(cache))
    x, t = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    loss = fuse(squares)
    with pytest.warns(UserWarning, match=f"squares runs as plain torch.*{reason}") as caught:
        assert torch.equal(loss(x, t), squares(x, t)) and torch.equal(loss(x, t), squares(x, t))
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match=reason):
        fuse(squares, strict=True)(x, t)
