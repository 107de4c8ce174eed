"""Triton source of a program: one function for each tile, and what launches them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..cpp import needed
from ..expressions import identifier
from ..ir import WIDE, Axis, Buffer, Extern, Program, Size, Stage
from ..schedule import Kernel
from ..sizes import Shapes
from .blocks import is_wide
from .kernels import Space, Writer, indented
from .numbers import Linear
from .tiles import Tile, merged, scheduled, tiles
from .wide import has_wide_form, wide_tiles

HEAD = '''"""Kernels of a fused loss, generated."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fused_losses.triton_kernels import fusion as fl
'''


Forms = tuple[bool, ...]  # for each kernel that has two forms, whether its rows are shared out
Flat = tuple[str, tuple[Axis, ...], tuple[tuple[int | None, ...], ...]]  # name, axes, views as places of numbers


@dataclass(frozen=True)
class Launch:
    """A function of the source: what it is given, in order, and what decides its grid and blocks."""

    name: str
    tile: Tile
    operands: tuple[str, ...]
    numbers: tuple[Linear, ...]
    parameters: tuple[str, ...]
    results: tuple[Buffer, ...]  # which it fills
    flat: tuple[Flat, ...]
    moves: tuple[tuple[tuple[str, int], ...], ...]  # of each pointer, along axes by places of numbers


@dataclass(frozen=True)
class Text:
    """The text, and the launches and externs that make the program."""

    text: str
    steps: tuple[Launch | Extern, ...]


class Source:
    """The source of a program in each of its forms."""

    def __init__(self, program: Program) -> None:
        self._program, self._steps = program, scheduled(program)
        kernels = [step for step in self._steps if isinstance(step, Kernel)]
        self._formed = [kernel for kernel in kernels if has_wide_form(kernel)]

    def forms(self, shapes: Shapes) -> Forms:
        """What suits inputs of some shapes."""
        return tuple(is_wide(kernel, shapes) for kernel in self._formed)

    @property
    def narrow(self) -> Forms:
        return (False,) * len(self._formed)

    def of(self, forms: Forms) -> Text:
        """
        Raises:
            BuildError: where an operation has no form in Triton.
        """
        return _text(self._program, merged(self._tiles(forms)))

    def _tiles(self, forms: Forms) -> Iterator[Tile | Extern]:
        wide = [kernel for kernel, is_wide in zip(self._formed, forms) if is_wide]
        for step in self._steps:
            if isinstance(step, Extern):
                yield step
            else:
                yield from wide_tiles(step) if step in wide else tiles(step)


def text_of(program: Program, shapes: Shapes) -> str:
    """The source of a program for inputs of some shapes."""
    source = Source(program)
    return source.of(source.forms(shapes)).text


def _text(program: Program, planned: Sequence[Tile | Extern]) -> Text:
    exact = {*program.outputs, *(name for step in planned if isinstance(step, Extern) for name in needed(step))}
    stored = exact | _read_elsewhere(planned)
    sizes = {buffer.name: buffer.sizes for buffer in program.inputs}
    for step in planned:
        buffers = step.buffers if isinstance(step, Extern) else [stage.buffer for stage in step.stages]
        sizes |= {buffer.name: buffer.sizes for buffer in buffers}
    texts, steps = [HEAD], []
    for step in planned:
        if isinstance(step, Extern):
            steps.append(step)
            continue
        writer = Writer(step, frozenset(stored), sizes)
        name = f"fused_{len(texts) - 1}"
        made = [_buffer(stage, exact) for stage in step.stages if stage.buffer.name in writer.operands]
        texts.append("\n".join(_function(name, writer)))
        steps.append(_launch(name, writer, tuple(made)))
    return Text("\n\n".join(texts) + "\n", tuple(steps))


def _buffer(stage: Stage, exact: set[str]) -> Buffer:
    """Where a stage's result is: intermediate ones of low precision keep what they were computed in."""
    name, dtype = stage.buffer.name, stage.buffer.dtype
    sizes = [axis.extent for axis in stage.axes] + [Size("const", len(stage.values))] * (len(stage.values) > 1)
    return Buffer(name, tuple(sizes), dtype if name in exact else WIDE.get(dtype, dtype))


def _read_elsewhere(planned: Sequence[Tile | Extern]) -> set[str]:
    """Buffers that are read outside of the tile that makes them, inputs among them."""
    result: set[str] = set()
    for step in planned:
        if isinstance(step, Tile):
            made = {stage.buffer.name for stage in step.stages}
            result |= {name for stage in step.stages for name in stage.reads} - made
    return result


def _function(name: str, writer: Writer) -> list[str]:
    unspecialised = [*writer.numbers.plain.values(), *(["parts"] if writer.tile.shares else [])]
    arguments = [*map(identifier, writer.operands), *writer.numbers.names.values(), *unspecialised]
    arguments += [f"{identifier(parameter)}: tl.float64" for parameter in writer.parameters]
    constants = [f"FLAT_{space.name.upper()}" for space in collapsible(writer)]
    constants += ["NARROW", *(["ROWS"] if writer.tile.rows else [])]
    constants += ["COLS", "WHOLE"] if writer.tile.has_lanes else []
    arguments += [f"{constant}: tl.constexpr" for constant in constants]
    options = f"(do_not_specialize={unspecialised!r})" if unspecialised else ""
    head = [f"@triton.jit{options}", f"def {name}(", *indented([f"{argument}," for argument in arguments]), "):"]
    return [*head, *indented(writer.lines)]


def collapsible(writer: Writer) -> list[Space]:
    """The spaces of several axes that one may stand for, where every view is flat in memory."""
    return [space for space in writer.spaces if len(space.axes) > 1 and not space.keeps_axes]


def _launch(name: str, writer: Writer, results: tuple[Buffer, ...]) -> Launch:
    places = {name: k for k, (_, name) in enumerate(writer.numbers.every)}
    flat = []
    for space in collapsible(writer):
        views = dict.fromkeys(tuple(None if n is None else places[n] for n in view) for view in space.views)
        flat.append((space.name.upper(), space.axes, tuple(views)))
    return Launch(
        name,
        writer.tile,
        tuple(writer.operands),
        tuple(number for number, _ in writer.numbers.every),
        tuple(writer.parameters),
        results,
        tuple(flat),
        tuple(tuple((axis, places[number]) for axis, number in move) for move in writer.moves),
    )
