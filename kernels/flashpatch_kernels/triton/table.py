"""A bias of the distance j - i, one table per head: as kernels read it, and how it is laid out.

A table is copied once for each row of a tile, each copy shifted by one entry more, so that the tile
of a table is a rectangle of its copies: aligned vectors for loads by pointers, and a box for
Hopper's copy engine. Tiles [keys, queries] read copies of the reversed table. The copies begin a
tile before the first distance and end a tile after the last: a tile that lies farther reads there.

A table that is constant beyond its ends, where those tiles are told apart (C.FAR), is read as it
is, without copies, which every call would make anew: between its ends lie few tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.options import HIDES
from flashpatch_kernels.triton import setups
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.plans import Steps
from flashpatch_kernels.tuning import Tile

HIDDEN = tl.constexpr(HIDES)
# How far copies reach beyond the ends: the most rows or columns of a tile, and 8 for rounding.
REACH = tl.constexpr(136)
TILE = 128


@triton.jit
def open(score, head, start, pointers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The table or its copies, for loads by pointers."""
    return pointers[0]


@triton.jit
def open_tiles(score, head, start, pointers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The copies as Hopper's copy engine reads them."""
    row = score[11] * 8
    return tl.make_tensor_descriptor(
        pointers[0], [score[4] * score[10], row], [row, 1], [ROWS, COLUMNS]
    )


@triton.jit
def entry(distance, first, last):
    """Where in copies a tile begins whose first row and column have this distance."""
    start = (first & -8) - REACH
    return tl.minimum(tl.maximum(distance, start), (last & -8) + REACH) - start


@triton.jit
def rectangle(s, column, head, score, source):
    """The columns from `column` on of a head's copies, by pointers."""
    r = tl.arange(0, s.shape[0])[:, None]
    c = tl.multiple_of(column, 8) + tl.arange(0, s.shape[1])[None, :]
    row = score[11] * 8
    at = source + tl.cast(head, tl.int64) * (score[10] * row)
    return tl.load(at + (r * row + c)).to(tl.float32)


@triton.jit
def add(s, i, j, m, n, head, score, source):
    """The bias of a distance, for tiles [queries, keys]."""
    return s + rectangle(s, entry(n - m, score[12], score[13]), head, score, source)


@triton.jit
def add_transposed(s, i, j, m, n, head, score, source):
    """The bias of a distance, for tiles [keys, queries]."""
    return s + rectangle(s, entry(m - n, -score[13], -score[12]), head, score, source)


@triton.jit
def add_tiles(s, i, j, m, n, head, score, source):
    """As `add`, by the copy engine."""
    row = tl.cast(head, tl.int32) * score[10]
    return s + source.load([row, entry(n - m, score[12], score[13])]).to(tl.float32)


@triton.jit
def add_tiles_transposed(s, i, j, m, n, head, score, source):
    """As `add_transposed`, by the copy engine."""
    row = tl.cast(head, tl.int32) * score[10]
    return s + source.load([row, entry(m - n, -score[13], -score[12])]).to(tl.float32)


@triton.jit
def entries(distance, head, score, source):
    """A head's biases of distances, from the table itself; beyond its ends those of the ends."""
    at = tl.minimum(tl.maximum(distance, score[12]), score[13]) - score[12]
    return tl.load(source + tl.cast(head, tl.int64) * score[11] + at).to(tl.float32)


@triton.jit
def spread(s, distance, at, head, score, source):
    """A tile like s of the biases of `distance` + `at`.

    Each bias is loaded once and handed on through shared memory: an address for each element of a
    tile would take more registers than there are.
    """
    SIZE: tl.constexpr = s.shape[0] * s.shape[1]
    DISTANCES: tl.constexpr = 2 * max(s.shape[0], s.shape[1])
    x = entries(distance + tl.arange(0, DISTANCES), head, score, source)
    return tl.reshape(tl.gather(x, tl.reshape(at, (SIZE,)), 0), (s.shape[0], s.shape[1]))


@triton.jit
def add_entries(s, i, j, m, n, head, score, source):
    """As `add`, from the table itself."""
    ROWS: tl.constexpr = s.shape[0]
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, s.shape[1])[None, :]
    return s + spread(s, n - m - ROWS, c - r + ROWS, head, score, source)


@triton.jit
def add_entries_transposed(s, i, j, m, n, head, score, source):
    """As `add_transposed`, from the table itself."""
    COLUMNS: tl.constexpr = s.shape[1]
    r = tl.arange(0, s.shape[0])[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    return s + spread(s, n - m - COLUMNS, r - c + COLUMNS, head, score, source)


@triton.jit
def levels(score, source, head):
    """The first and the last bias of a head, which hold on all tiles beyond the ends."""
    low = entries(score[12], head, score, source)
    return low, entries(score[13], head, score, source)


def copies_of(
    steps: Steps, table: Tensor, first: int, rows: int, dtype: torch.dtype, *, reverse: bool
) -> Tensor:
    """Copies of a table [H, T] that begins at the distance `first`, or reversed: [H, rows, row].

    In half precision beside half precision: what that loses is less than what the weights lose.

    Args:
        rows: Copies of each table, as many as tiles have rows.
        dtype: Of q.
    """
    n_heads, entries = table.shape
    table = table if table.is_contiguous() else steps.copied(table, table.dtype)
    row = (entries + 2 * REACH.value + TILE + 15) // 8 * 8
    kind = torch.float32 if dtype == torch.float32 else torch.float16
    copies = steps.own(table.new_empty((n_heads, rows, row), dtype=kind))
    tile = Tile(8, 1024, 4, 1)
    steps.launch(
        copies_kernel,
        n_heads * (rows // tile.BM) * setups.cdiv(row, tile.BN),
        tile,
        *(table, copies, rows, row, first, entries),
        *(reverse, kind == torch.float16, tile.BM, tile.BN),
    )
    return copies


@kernel
def copies_kernel(
    TABLE, COPIES, rows, row, first, entries,
    REVERSE: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN entries of BM copies: entry y of copy r is the distance start + y - r, or its opposite."""
    n_parts = tl.cdiv(row, BN)
    y = tl.program_id(0) % n_parts * BN + tl.arange(0, BN)[None, :]
    copy = tl.program_id(0) // n_parts * BM + tl.arange(0, BM)[:, None]
    if REVERSE:
        start = (-(first + entries - 1) & -8) - REACH
        distance = copy % rows - start - y
    else:
        start = (first & -8) - REACH
        distance = start + y - copy % rows
    at = tl.minimum(tl.maximum(distance - first, 0), entries - 1)
    x = tl.load(TABLE + tl.cast(copy // rows, tl.int64) * entries + at).to(tl.float32)
    if HALF:
        # Beyond the range of half precision a bias stays finite, unless it hides its keys.
        x = tl.where(x < HIDDEN, float("-inf"), tl.minimum(tl.maximum(x, -65504.0), 65504.0))
    to = COPIES + tl.cast(copy, tl.int64) * row + y
    tl.store(to, x.to(COPIES.dtype.element_ty), mask=y < row)
