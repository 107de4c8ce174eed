"""Kernels of programs written by hand: what tracing seldom asks for."""

import pytest
import torch

from fused_losses.fusion.ir import Axis, Buffer, Expression, Index, Program, Size, Stage
from fused_losses.fusion.runtime import compile_program


def size(name, dimension):
    return Size("size", (name, dimension))


def along(axis):
    return Index(((axis, 1),))


def expression(op, *arguments, dtype=torch.float32, **attributes):
    return Expression(op, dtype, arguments, tuple(attributes.items()))


def load(buffer, *index, dtype=torch.float32, guarded=False):
    return expression("load", dtype=dtype, buffer=buffer, index=index, guarded=guarded)


def picked(index, guarded):
    """out[i] = x[index of t[i]]"""
    buffers = (Buffer("x", (size("x", 0),), torch.float32), Buffer("t", (size("t", 0),), torch.int64))
    value = load("x", index(load("t", along("i"), dtype=torch.int64)), guarded=guarded)
    stage = Stage(Buffer("out", (size("t", 0),), torch.float32), (Axis("i", size("t", 0)),), value)
    return compile_program(Program(buffers, (), (stage,), ("out",)), torch.device("cpu"))


def test_a_computed_index_outside_reads_nothing():
    """A guarded load is 0 there; the memory around the tensor is another's."""
    kernels = picked(lambda index: index, guarded=True)
    surroundings = torch.full((12,), float("nan"))
    surroundings[4:8] = torch.arange(1.0, 5.0)
    (out,) = kernels([surroundings[4:8], torch.tensor([-1, 0, 3, 4, 7, -4])])
    assert out.tolist() == [0, 1, 4, 0, 0, 0]


def test_a_checked_index_outside_raises():
    kernels = picked(lambda index: expression("checked", index, dtype=torch.int64, size=size("x", 0)), guarded=False)
    assert kernels([torch.arange(3.0), torch.tensor([2, 0])])[0].tolist() == [2, 0]
    for tensor, index in ((torch.arange(3.0), 3), (torch.arange(3.0), -1), (torch.empty(0), 0)):
        with pytest.raises(IndexError, match="out of range"):
            kernels([tensor, torch.tensor([index])])
