"""How much one program takes, and which form of a kernel suits some shapes; the same on every GPU, so that sums are."""

from __future__ import annotations

from ..cpp import points
from ..schedule import Kernel, memory_order
from ..sizes import Shapes
from .tiles import Tile

BLOCK = 1024  # elements of a block, but for long rows
LONG = 2048  # the most lanes
ROWS = 64  # the most rows where they are what is adjacent in memory
PROGRAMS = 1024  # that share a sum: a few waves on any GPU
FEW = 512  # programs that leave a GPU idle: four for each of its processors are as many
LASTING = 8  # blocks one after the other that are worth further launches


def block_of(tile: Tile, rows: int, lanes: int) -> tuple[int, int]:
    """Rows and lanes of a block: long along what is adjacent in memory."""
    if not tile.has_lanes or not tile.rows:
        return (BLOCK, 1) if tile.rows else (1, BLOCK)
    return _block(tile.runs_along_lanes, rows, lanes, BLOCK if tile.looks_around else LONG)


def _block(runs_along_lanes: bool, rows: int, lanes: int, longest: int) -> tuple[int, int]:
    if runs_along_lanes:
        length = min(longest, _power_of_two(lanes))
        return min(max(1, BLOCK // length), _power_of_two(rows)), length
    height = min(ROWS, _power_of_two(rows))
    return height, min(BLOCK // height, _power_of_two(lanes))


def is_wide(kernel: Kernel, shapes: Shapes) -> bool:
    """Whether rows are so few and so long that each should be shared out to several programs."""
    rows = points(kernel.outer, shapes)
    lanes = max(points(loop.inner, shapes) for loop in kernel.loops)
    height, length = _block(memory_order(kernel.stages)[-1] not in kernel.outer, rows, lanes, LONG)
    return quotient(rows, height) < FEW and quotient(lanes, length) >= LASTING


def warps_of(tile: Tile, block: tuple[int, int]) -> int:
    """As many as leave each thread eight elements of a block, or four where much is loaded for each."""
    return max(4, block[0] * block[1] // (128 if tile.looks_around else 256))


def quotient(count: int, block: int) -> int:
    return -(-count // block)


def _power_of_two(count: int) -> int:
    """The smallest that is not less."""
    return 1 << max(0, count - 1).bit_length()
