"""Kernels of programs written by hand: what tracing seldom asks for."""

import math

import pytest
import torch

from fused_losses import fuse
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


@pytest.fixture(scope="module")
def power():
    """out[i] = x[i] to the power of a number given at each call"""
    buffers = (Buffer("x", (size("x", 0),), torch.float32),)
    exponent = expression("cast", expression("parameter", dtype=torch.float64, name="exponent"))
    value = expression("pow", load("x", along("i")), exponent)
    stage = Stage(Buffer("out", (size("x", 0),), torch.float32), (Axis("i", size("x", 0)),), value)
    return compile_program(Program(buffers, ("exponent",), (stage,), ("out",)), torch.device("cpu"))


@pytest.mark.parametrize("exponent", [-4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 0.2, -1.7, 40.0])
def test_powers(power, exponent):
    """The exponents that have loops of their own are as right as the others, at the edges of floats too."""
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-42, 3e38, -3e38, math.inf, -math.inf, math.nan])
    x = torch.cat([special, torch.linspace(-3, 3, 101), torch.logspace(-30, 30, 101)])
    (out,) = power([x], [exponent])
    expected = x.double() ** torch.tensor(exponent, dtype=torch.float32).item()
    torch.testing.assert_close(out, expected.float(), rtol=2.4e-7, atol=0, equal_nan=True)


FUNCTIONS = ("sin", "cos", "tan", "lgamma", "digamma")


@pytest.fixture(scope="module")
def functions():
    """Each of some functions of x."""
    buffers, axis = (Buffer("x", (size("x", 0),), torch.float32),), Axis("i", size("x", 0))
    stages = tuple(
        Stage(Buffer(op, (size("x", 0),), torch.float32), (axis,), expression(op, load("x", along("i"))))
        for op in FUNCTIONS
    )
    kernels = compile_program(Program(buffers, (), stages, FUNCTIONS), torch.device("cpu"))
    return lambda x: dict(zip(FUNCTIONS, kernels([x])))


def test_angles_far_from_zero(functions):
    x = torch.tensor([1.0, 3e4, 1e6, 2e6, -7e8, 1e15, 3e38, -1e20, math.inf, math.nan])
    found = functions(x)
    for op in ("sin", "cos", "tan"):
        torch.testing.assert_close(found[op], getattr(torch, op)(x.double()).float(), equal_nan=True)


@pytest.mark.parametrize("lowest", [1e-6, -9.7])
def test_gamma_functions(functions, lowest):
    """Blocks of positive numbers alone are computed in another way; near 1 and 2 the logarithm vanishes."""
    near = torch.tensor([1.0, 2.0])[:, None] + torch.logspace(-7, -1, 50) * torch.tensor([1.0, -1.0])[:, None, None]
    x = torch.cat([torch.linspace(lowest, 30, 1000), near.flatten(), torch.logspace(1, 6, 50)])
    found = functions(x)
    for op in ("lgamma", "digamma"):
        torch.testing.assert_close(found[op], getattr(torch, op)(x.double()).float(), rtol=2.4e-7, atol=1e-9)


PLACES = (  # factor, offset and divisor
    *((1, 0, 1), (1, -3, 1), (1, 2, 1), (-1, 4, 1), (2, -5, 1), (-2, 9, 1), (1, 50, 1), (1, -50, 1)),
    *((1, 0, 2), (1, -3, 2), (-1, 4, 3), (2, -5, 3), (6, 2, 4), (6, 1, 4), (4, -8, 4), (3, 50, 5), (1, 1, 1000)),
)


@pytest.fixture(scope="module")
def shifted():
    """out[i, j] = x[(i - 1) / 3, (factor j + offset) / divisor] for each place, 0 outside and between"""
    x = Buffer("x", (size("x", 0), size("x", 1)), torch.float32)
    axes, names = (Axis("i", size("x", 0)), Axis("j", size("x", 1))), tuple(f"out{k}" for k in range(len(PLACES)))
    third = Index((("i", 1),), Size("const", -1), 3)
    stages = tuple(
        Stage(
            Buffer(name, x.sizes, torch.float32),
            axes,
            load("x", third, Index((("j", factor),), Size("const", offset), divisor), guarded=True),
        )
        for name, (factor, offset, divisor) in zip(names, PLACES)
    )
    return compile_program(Program((x,), (), stages, names), torch.device("cpu"))


@pytest.mark.parametrize("rows, columns", [(700, 7), (3, 1500), (1, 4), (2, 0)])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.t().contiguous().t()], ids=["rows", "columns"])
def test_lanes_outside_are_zero(shifted, rows, columns, layout):
    x = layout(torch.arange(1.0, 1.0 + rows * columns).view(rows, columns))
    thirds = x[: (rows + 1) // 3]
    for out, (factor, offset, divisor) in zip(shifted([x]), PLACES):
        place, rest = (numerator := torch.arange(columns) * factor + offset) // divisor, numerator % divisor
        inside = (place >= 0) & (place < columns) & (rest == 0)
        expected = torch.zeros(rows, columns)
        expected[1::3] = torch.where(inside, thirds[:, place.clamp(0, max(columns - 1, 0))], 0.0)
        assert torch.equal(out, expected)


DIAGONALS = ((1, 2), (2, 1), (2, 3), (4, 6))  # divisors


def test_diagonals_of_every_few_elements():
    """out[j] = x[j / one divisor, (j + 1) / the other], 0 outside and between"""
    x = Buffer("x", (size("x", 0), size("x", 1)), torch.float32)
    stages = tuple(
        Stage(
            Buffer(f"out{a}{b}", (size("x", 1),), torch.float32),
            (Axis("j", size("x", 1)),),
            load("x", Index((("j", 1),), divisor=a), Index((("j", 1),), Size("const", 1), b), guarded=True),
        )
        for a, b in DIAGONALS
    )
    kernels = compile_program(Program((x,), (), stages, tuple(s.buffer.name for s in stages)), torch.device("cpu"))
    x = torch.arange(1.0, 1.0 + 30 * 41).view(30, 41)
    for out, (a, b) in zip(kernels([x]), DIAGONALS):
        inside = [j % a == 0 and (j + 1) % b == 0 and j // a < 30 and (j + 1) // b < 41 for j in range(41)]
        assert out.tolist() == [x[j // a, (j + 1) // b].item() if inside[j] else 0 for j in range(41)]


def test_a_position_that_is_divided():
    """out[i] = (i - 2) / 6 where that is whole and not negative, as lanes and as a single number"""
    n = size("x", 0)
    place = expression("index", dtype=torch.int64, value=Index((("i", 1),), Size("const", -2), 6))
    inside = expression(
        "logical_and",
        expression("ge", place, expression("constant", dtype=torch.int64, value=0), dtype=torch.bool),
        expression("lt", place, expression("size", dtype=torch.int64, value=n), dtype=torch.bool),
        dtype=torch.bool,
    )
    none = expression("constant", dtype=torch.int64, value=-1)
    stage = Stage(
        Buffer("out", (n,), torch.int64),
        (Axis("i", n),),
        expression("where", inside, place, none, dtype=torch.int64),
    )
    kernels = compile_program(Program((Buffer("x", (n,), torch.float32),), (), (stage,), ("out",)), torch.device("cpu"))
    (out,) = kernels([torch.zeros(40)])
    assert out.tolist() == [(i - 2) // 6 if i >= 2 and (i - 2) % 6 == 0 else -1 for i in range(40)]


SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0, 1e-45, 1e-42, 1e-38, 3e38, -3e38, math.inf, -math.inf, math.nan]
DIVISORS = [*SPECIAL, 0.1, 7.0, 1e-20, 1e20, 2.0**-61, 2.0**61, 2.0**-149, 2.0**127]


def by_one(dtype):
    """out[i] = x[i] / a number, and x[i] where that is above 1, else -x[i]"""
    buffers = (Buffer("x", (size("x", 0),), dtype), Buffer("by", (), dtype))
    x, by = load("x", along("i"), dtype=dtype), load("by", dtype=dtype)
    above = expression("gt", by, expression("constant", dtype=dtype, value=1.0), dtype=torch.bool)
    values = {
        "quotient": expression("div", x, by, dtype=dtype),
        "chosen": expression("where", above, x, expression("neg", x, dtype=dtype), dtype=dtype),
    }
    axis = Axis("i", size("x", 0))
    stages = tuple(Stage(Buffer(name, (axis.extent,), dtype), (axis,), value) for name, value in values.items())
    return compile_program(Program(buffers, (), stages, tuple(values)), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_the_same_for_all_lanes(dtype):
    """A division by one number is a few multiplications, right to a last digit, where torch's is special, too."""
    kernels = by_one(dtype)
    x = torch.cat([torch.tensor(SPECIAL), torch.linspace(-3, 3, 101), torch.logspace(-37, 37, 101)]).to(dtype)
    for number in DIVISORS:
        by = torch.tensor(number, dtype=dtype)
        quotient, chosen = kernels([x, by])
        exact = x / by
        usual = exact.abs() >= torch.finfo(dtype).tiny
        torch.testing.assert_close(quotient[usual], exact[usual], rtol=torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(quotient[~usual], exact[~usual], rtol=0, atol=1e-44, equal_nan=True)
        torch.testing.assert_close(chosen, x if number > 1 else -x, rtol=0, atol=0, equal_nan=True)
    whole = torch.arange(-1000.0, 1000.0, dtype=dtype)
    for number in (3.0, 7.0, 10.0, 0.5, 1024.0):
        quotient, _ = kernels([whole * number, torch.tensor(number, dtype=dtype)])
        assert torch.equal(quotient, whole)


def test_a_position_times_the_larger_of_two_sizes():
    """out[i] = x[i] * i * max(sizes of x and t): a size that is computed where lanes are."""
    larger = Size("max", arguments=(size("x", 0), size("t", 0)))
    buffers = (Buffer("x", (size("x", 0),), torch.float32), Buffer("t", (size("t", 0),), torch.float32))
    place = expression("index", dtype=torch.int64, value=Index((("i", larger),)))
    value = expression("mul", load("x", along("i")), expression("cast", place))
    stage = Stage(Buffer("out", (size("x", 0),), torch.float32), (Axis("i", size("x", 0)),), value)
    kernels = compile_program(Program(buffers, (), (stage,), ("out",)), torch.device("cpu"))
    assert kernels([torch.ones(5), torch.ones(7)])[0].tolist() == [0, 7, 14, 21, 28]


def spread(x):
    """Of columns: their sums are read by the pass that makes them."""
    sums = x.sum(0)
    return sums, (x - sums / x.shape[0]).square().sum(0)


def test_lanes_add_up_as_exactly_as_blocks():
    """One term after the other in fp32 alone is wrong by some 1e-5."""
    x = torch.rand(20000, 600, generator=torch.manual_seed(0)) + 1
    fused = fuse(spread, strict=True)
    results = fused(x)
    assert "take(few_" in fused.source()
    for own, exact in zip(results, spread(x.double())):
        assert ((own.double() - exact) / exact).abs().max() < 3e-7
