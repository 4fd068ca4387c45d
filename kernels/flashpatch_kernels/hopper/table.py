"""A bias of distances, one table per head: as products begin with it, and how it is laid out.

In the layout of products a thread has, of every 8 columns, two in each of two rows that are 8
apart: of the first's distance x these are x, x + 1, x - 8 and x - 7. So a table is copied as quads,
the four numbers for each distance, and a thread loads from one address what all its scores take, a
quad at a time, into the registers in which its products are summed. That is for tiles [queries,
keys], where distances grow with the columns; tiles [keys, queries] read quads of the reversed
table, in which they do as well.

Quads go on beyond the ends, with what the ends have, as far as a tile reaches: tiles that lie
farther read there, and what is beyond the last query or key as well.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from flashpatch_kernels.hopper.gluon import gl, jit
from flashpatch_kernels.triton import setups
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.plans import Steps
from flashpatch_kernels.tuning import Tile

# How far quads reach beyond the ends: the most rows and columns that a tile has together.
REACH = tl.constexpr(256)

# Of more distances `ask` asks.
MANY = tl.constexpr(512)


@constexpr_function
def loads(quads):
    """Assembly that loads so many quads of numbers, each 8 distances after the one before."""
    at = f"${4 * quads}"
    texts = [
        f"ld.global.nc.v4.f32 {{${x}, ${x + 1}, ${x + 2}, ${x + 3}}}, [{at} + {32 * x}];"
        for x in range(0, 4 * quads, 4)
    ]
    return " ".join(texts)


@constexpr_function
def registers(quads):
    """What `loads` writes, and the addresses that it is given, of which it uses the first."""
    return ",".join(["=&f"] * (4 * quads) + ["l"] * (4 * quads))


@jit
def first_distance(m, n, score, OF_KEYS: gl.constexpr):
    """Of query m and key n, counted from the first of a table, of keys of the reversed one."""
    return m - n + score[13] if OF_KEYS else n - m - score[12]


@jit
def entries(bias, m, n, head, score, COLUMNS: gl.constexpr, OF_KEYS: gl.constexpr, C: gl.constexpr):
    """A table's biases of the distances of a tile [R, COLUMNS]; nothing without a table.

    The tile begins with query m and key n; its rows are keys, or else queries.
    """
    if bias[3] is not None:
        S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
        # Each of four warps has 16 rows, and so each thread two.
        gl.static_assert(C.R == 64 and C.R + COLUMNS <= REACH)
        start = first_distance(m, n, score, OF_KEYS)
        start = gl.maximum(gl.minimum(start, score[13] - score[12] + C.R), -COLUMNS) + REACH
        row = gl.expand_dims(gl.arange(0, C.R, gl.SliceLayout(1, S)), 1)
        column = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, S)), 0)
        first = bias[3] + (head.to(gl.int64) * score[11] + start) * 4
        at = (first + (column - row) * 4).to(gl.uint64)
        QUADS: gl.constexpr = COLUMNS // 8
        x = gl.inline_asm_elementwise(
            loads(QUADS), registers(QUADS), [at], dtype=gl.float32, is_pure=True, pack=4 * QUADS
        )
        return (x,)
    else:
        return ()


@jit
def ask(bias, m, n, head, score, OF_KEYS: gl.constexpr, C: gl.constexpr):
    """Has the L1 read what consumers will load for a tile, if a table has so many distances.

    Fewer stay there by themselves. The tile [BM, BN], or [BN, BM] of keys, is as in `entries`.
    """
    if bias[3] is not None:
        SECTOR: gl.constexpr = 32
        SECTORS: gl.constexpr = REACH * 16 // SECTOR
        gl.static_assert(C.BM + C.BN <= REACH)
        if score[13] - score[12] > MANY:
            start = first_distance(m, n, score, OF_KEYS) - (C.BN if OF_KEYS else C.BM)
            sectors = gl.arange(0, SECTORS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
            at = (start + 1 + REACH) * 4 + sectors * (SECTOR // 4)
            # What is far beyond the ends is not told apart from what is at them.
            at = gl.minimum(gl.maximum(at, 0), (score[11] - 1) * 4)
            at = bias[3] + (head.to(gl.int64) * score[11] * 4 + at)
            text: gl.constexpr = "prefetch.global.L1 [$1]; mov.u32 $0, 0;"
            gl.inline_asm_elementwise(
                text, "=r,l", [at.to(gl.uint64)], dtype=gl.int32, is_pure=False, pack=1
            )


@jit
def begin(bias, m, n, head, score, COLUMNS: gl.constexpr, OF_KEYS: gl.constexpr, C: gl.constexpr):
    """As `entries`, for products to begin with, where scores are products; else nothing."""
    if C.PLAIN:
        return entries(bias, m, n, head, score, COLUMNS, OF_KEYS, C)
    else:
        return ()


def row(table: Tensor) -> int:
    """How many quads a head of a table [H, T] has."""
    return table.shape[1] + 2 * REACH.value


def quads_of(steps: Steps, table: Tensor, unit: float, *, reverse: bool) -> Tensor:
    """The quads of a table [H, T] or of the reversed one, float32 and times `unit`: [H, row, 4]."""
    n_heads, entries = table.shape
    quads = steps.own(table.new_empty((n_heads, row(table), 4), dtype=torch.float32))
    tile = Tile(4, 256, 4, 1)
    steps.launch(
        quads_kernel,
        n_heads * setups.cdiv(row(table), tile.BN),
        tile,
        *(table, quads, *table.stride(), entries, row(table), unit, reverse, tile.BN),
    )
    return quads


@kernel
def quads_kernel(
    TABLE, QUADS, table_head, table_entry, entries, row, unit,
    REVERSE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN quads of a head."""
    n_parts = tl.cdiv(row, BN)
    head = tl.program_id(0) // n_parts
    y = tl.program_id(0) % n_parts * BN + tl.arange(0, BN)[:, None]
    z = tl.arange(0, 4)[None, :]
    at = tl.minimum(tl.maximum(y - REACH + z % 2 - z // 2 * 8, 0), entries - 1)
    if REVERSE:
        at = entries - 1 - at
    of_head = TABLE + tl.cast(head, tl.int64) * table_head
    x = tl.load(of_head + tl.cast(at, tl.int64) * table_entry).to(tl.float32)
    to = QUADS + (tl.cast(head, tl.int64) * row + y) * 4 + z
    tl.store(to, x * unit, mask=y < row)
