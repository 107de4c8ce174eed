"""Triton of one tile: a function that computes a block of rows, in loops over blocks of lanes."""

from __future__ import annotations

from collections.abc import Mapping

from ..ir import Size
from .nests import NestWriter, Value
from .numbers import Numbers
from .spaces import LANE, ROW, STEP, Space, indented
from .tiles import Tile


class Writer:
    """The source of one tile; ``lines`` holds the body, the other attributes what it is launched with."""

    def __init__(self, tile: Tile, stored: frozenset[str], sizes: Mapping[str, tuple[Size, ...]]) -> None:
        self.tile, self.stored, self.sizes = tile, stored, sizes
        self.numbers = Numbers()
        self.operands: dict[str, None] = {}  # buffers, in the order of the arguments
        self.parameters: dict[str, None] = {}
        self.moves: dict[tuple[tuple[str, str], ...], None] = {}  # of each pointer, along axes by numbers
        self.rows = Space(ROW, "rows", tile.rows)
        self.lanes = [Space(LANE, f"lanes{k}", nest.lanes) for k, nest in enumerate(tile.nests)]
        self.made = {stage.buffer.name: stage for stage in tile.stages}
        self.locals: dict[str, Value] = {}
        self.at_start: list[str] = []
        self.at_end: list[str] = []
        self.at_row_end: list[str] = []
        self._count = 0
        self.known: dict[str, Value] = {}  # values of rows, by their text
        body = [line for k, nest in enumerate(tile.nests) for line in NestWriter(self, nest, self.lanes[k]).lines]
        self.lines = self._framed([*body, *self.at_row_end])

    def name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    @property
    def row_shape(self) -> str:
        return "(ROWS, 1)" if self.tile.has_lanes else "(ROWS,)"

    @property
    def spaces(self) -> list[Space]:
        return [self.rows, *self.lanes]

    def spread(self, size: str, form: str) -> str:
        """The places in a block; loads that look around an element are seldom aligned."""
        text = f"tl.arange(0, {size}){form}"
        return f"fl.apart({text}, program)" if self.tile.looks_around else text

    def _framed(self, body: list[str]) -> list[str]:
        """The rows of a program, around what is computed for them."""
        tile, head = self.tile, ["program = fl.place(tl.program_id(0), NARROW)"]
        if tile.shares:
            head.append("part, block = program % parts, program // parts")
        batch = Space(STEP, "batch", tile.batch)
        head += batch.decoded("block", self.numbers)
        if not tile.rows:
            return [*head, *self.at_start, *body, *self.at_end]
        count = self.rows.extent(self.numbers)
        spread = self.spread("ROWS", "[:, None]" if self.tile.has_lanes else "")
        start = {"": "program * ROWS", "lanes": "block * ROWS", "rows": "first"}[tile.shares]
        rows = [f"rows = {start} + {spread}", f"row_mask = rows < {count}", *self.rows.decoded("rows", self.numbers)]
        if tile.shares != "rows":
            return [*head, *self.at_start, *rows, *body, *self.at_end]
        loop = f"for first in range(part * ROWS, {count}, parts * ROWS):"
        return [*head, *self.at_start, loop, *indented([*rows, *body]), *self.at_end]
