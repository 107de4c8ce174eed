"""How much one program takes, and which form of a kernel suits some shapes; the same on every GPU, so that sums are."""

from __future__ import annotations

from ..cpp import points
from ..lowering import cost
from ..schedule import Kernel, memory_order
from ..sizes import Shapes
from .tiles import Tile

BLOCK = 1024  # elements of a block, but for long rows
LONG = 2048  # the most lanes of a row
JOINED = 4096  # of everything's parts, where they are many
COLUMNS = 16  # the most lanes where rows are what is adjacent in memory
PROGRAMS = 4096  # that share a sum: a few waves on any GPU
FEW = 512  # programs that leave a GPU idle: four for each of its processors are as many
LASTING = 8  # blocks one after the other that are worth further launches
MOST_WARPS = 32  # that a program can have

# Elements that a thread takes at once. Measured on an H200.
OF_COLUMN, OF_ROW, OF_SURROUNDINGS = 16, 8, 4  # where threads join their elements, more of them leave less to join
PACK = 16  # bytes that a thread loads at once of anything else
LONG_WORK = 100  # operations that take so many registers that a thread had better have half of the elements


def block_of(tile: Tile, rows: int, lanes: int) -> tuple[int, int]:
    """Rows and lanes of a block: long along what is adjacent in memory."""
    if not tile.rows:
        return 1, BLOCK if tile.shares or lanes <= BLOCK else JOINED
    if not tile.has_lanes:
        return BLOCK, 1
    return _block(tile.runs_along_lanes, rows, lanes, BLOCK if tile.looks_around else LONG)


def _block(runs_along_lanes: bool, rows: int, lanes: int, longest: int) -> tuple[int, int]:
    if runs_along_lanes:
        length = min(longest, _power_of_two(lanes))
        return min(max(1, BLOCK // length), _power_of_two(rows)), length
    height = min(BLOCK // min(COLUMNS, _power_of_two(lanes)), _power_of_two(rows))
    return height, min(BLOCK // height, _power_of_two(lanes))


def is_wide(kernel: Kernel, shapes: Shapes) -> bool:
    """Whether rows are so few and so long that each should be shared out to several programs."""
    rows = points(kernel.outer, shapes)
    lanes = max(points(loop.inner, shapes) for loop in kernel.loops)
    height, length = _block(memory_order(kernel.stages)[-1] not in kernel.outer, rows, lanes, LONG)
    return quotient(rows, height) < FEW and quotient(lanes, length) >= LASTING


def warps_of(tile: Tile, block: tuple[int, int]) -> int:
    """As many as leave each thread its elements; two of them join columns faster than four do."""
    wanted = block[0] * block[1] // (32 * _elements_of_thread(tile))
    return min(MOST_WARPS, max(2 if _is_column(tile) else 4, wanted))


def _elements_of_thread(tile: Tile) -> int:
    if tile.looks_around:
        return OF_SURROUNDINGS
    count = OF_COLUMN if _is_column(tile) else OF_ROW if _has_whole_rows(tile) else PACK // _narrowest(tile)
    work = cost(*(stage.expression for stage in tile.stages))
    return count // 2 if work > LONG_WORK else count


def _has_whole_rows(tile: Tile) -> bool:
    """Whether a program sees all of a row's lanes."""
    return bool(tile.rows) and tile.has_lanes and tile.shares != "lanes"


def _is_column(tile: Tile) -> bool:
    return _has_whole_rows(tile) and not tile.runs_along_lanes


def _narrowest(tile: Tile) -> int:
    """Bytes of an element of what is loaded."""
    return min(
        (load.dtype.itemsize for s in tile.stages for load in s.loads if load.dtype.is_floating_point), default=4
    )


def quotient(count: int, block: int) -> int:
    return -(-count // block)


def _power_of_two(count: int) -> int:
    """The smallest that is not less."""
    return 1 << max(0, count - 1).bit_length()
