"""What Hopper kernels add to scores beside slopes: a bias of keys, and a table's (see `table`).

A bias of keys is a number for each key of a tile. Where keys are the columns of tiles, a thread has
use for a quarter of the numbers: who reads the keys reads them too, once, and hands them on beside
the keys. Where they are the rows, a thread has use for two, and reads them itself.

Where nothing else is done to products, scores are products (C.PLAIN), and biases are added in their
unit: products of a tile begin with what a table has for it, and with the biases of its keys where
these are its columns. Where they are its rows, what exponents are relative to has those in it.

`bias` is (that of keys in float32, the strides of its batch and heads, a table's quads in that
unit, the unit), None for what there is not; `score` as in `triton.scores`, where a table's row is
that of its quads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashpatch_kernels.hopper import crews, table
from flashpatch_kernels.hopper.gluon import gl, jit
from flashpatch_kernels.hopper.products import start_inner
from flashpatch_kernels.hopper.rings import put_numbers
from flashpatch_kernels.hopper.softmax import lane_sums
from flashpatch_kernels.triton import setups, term_gradients, terms
from flashpatch_kernels.triton.plans import Steps
from flashpatch_kernels.triton.stats import Shared


@jit
def of_keys(bias, batch, head, start, n_keys, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """The biases of the keys from `start` on, [KEYS]; 0 beyond the last."""
    base, batch_stride, head_stride, _table, _unit = bias
    j = start + gl.arange(0, KEYS, LAYOUT)
    at = base + batch.to(gl.int64) * batch_stride + head.to(gl.int64) * head_stride
    return gl.load(at + j, mask=j < n_keys, other=0.0)


@jit
def of_columns(bias, batch, head, start, n_keys, C: gl.constexpr):
    """As `of_keys`, of a tile of keys and beside products, for who reads it; nothing without."""
    if bias[0] is not None:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        return (of_keys(bias, batch, head, start, n_keys, C.BN, layout) * bias[4],)
    else:
        return ()


@jit
def of_rows(bias, batch, head, start, n_keys, S: gl.constexpr, C: gl.constexpr):
    """As `of_keys`, of the R keys that are the rows of tiles of layout S: [R, 1]."""
    if bias[0] is not None:
        column = of_keys(bias, batch, head, start, n_keys, C.R, gl.SliceLayout(1, S))
        return (gl.expand_dims(column, 1),)
    else:
        return ()


@jit
def room(bias, C: gl.constexpr):
    """Memory for the biases of tiles of keys, [SLOTS, BN]; nothing without a bias."""
    if bias is None:
        return ()
    else:
        row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        return (gl.allocate_shared_memory(gl.float32, [C.SLOTS, C.BN], row),)


@jit
def put(keys, beside_keys, number, x, C: gl.constexpr):
    """Writes the biases of a tile of a ring of keys beside it, if there are any."""
    if len(beside_keys) > 0:
        put_numbers(keys, beside_keys[0], number, x[0], C.SLOTS)


@jit
def taken(beside_keys, number, S: gl.constexpr, C: gl.constexpr):
    """The biases [BN] of a tile of keys that is known to be there; nothing without them."""
    if len(beside_keys) > 0:
        return (beside_keys[0].index(number % C.SLOTS).load(gl.SliceLayout(0, S)),)
    else:
        return ()


@jit
def start_scores(a, b, COLUMNS: gl.constexpr, of_keys, entries, C: gl.constexpr):
    """Issues A B^T of queries and keys in either order: [R, D], [COLUMNS, D] -> [R, COLUMNS].

    It begins with biases [COLUMNS] of keys and what `table.begin` gave, if there are any.
    """
    if len(entries) > 0:
        begin = entries[0]
        if len(of_keys) > 0:
            begin = begin + gl.expand_dims(of_keys[0], 0)
        return start_inner(a, b, COLUMNS, C, begin)
    elif C.PLAIN and len(of_keys) > 0:
        return start_inner(a, b, COLUMNS, C, of_keys[0])
    else:
        return start_inner(a, b, COLUMNS, C)


@jit
def as_row(of_keys):
    """Biases [BN] of keys as [1, BN], if there are any."""
    if len(of_keys) > 0:
        return (gl.expand_dims(of_keys[0], 0),)
    else:
        return ()


@jit
def thread_sums(x):
    """Of sums [64, 4] by lanes those of the two rows of each thread: [4, 8, 4]."""
    return gl.sum(x.reshape([4, 2, 8, 4]), 1)


@jit
def total(x):
    """The sum of what `thread_sums` gave."""
    return gl.sum(gl.sum(gl.sum(x, 2), 1), 0)


@jit
def no_sums(BIAS, ENDS, S: gl.constexpr, C: gl.constexpr):
    """Sums of dS^T over no queries, by the lanes that share a row: those that have a place.

    Returns:
        For BIAS one sum [R, 4] of every key; for ENDS two, as `thread_sums` has them, of the tiles
        below and above those that a table's own sums are of.
    """
    zero = lane_sums(gl.full([C.R, C.BM], 0.0, gl.float32, S))
    of_keys, of_ends = (), ()
    if BIAS is not None:
        of_keys = (zero,)
    if ENDS is not None:
        of_ends = (thread_sums(zero), thread_sums(zero))
    return of_keys, of_ends


@jit
def with_ds(sums, dst, m, n, near):
    """The sums with those of a tile dS^T [R, BM] that begins with query m and key n.

    `near` is (the first and the end of the distances n - m at which tiles begin that a table's own
    sums are of, how many queries such a tile has).
    """
    of_keys, of_ends = sums
    if len(of_keys) > 0 or len(of_ends) > 0:
        x = lane_sums(dst)
        if len(of_keys) > 0:
            of_keys = (of_keys[0] + x,)
        if len(of_ends) > 0:
            first, end, rows = near
            distance = n - m // rows * rows
            x = thread_sums(x)
            below = gl.where(distance < first, x, 0.0)
            above = gl.where(distance >= end, x, 0.0)
            of_ends = of_ends[0] + below, of_ends[1] + above
    return of_keys, of_ends


@jit
def store_sums(sums, BIAS, ENDS, bh, part, j, sizes, C: gl.constexpr):
    """Stores the sums of the keys j [R] of a head of a row of the batch.

    BIAS is [B, H_kv, M]; ENDS is [2, B, H, parts], one for every R keys.
    """
    n_batch, n_heads, _group, _n_queries, n_keys = sizes
    of_keys, of_ends = sums
    if len(of_keys) > 0:
        x = gl.convert_layout(gl.sum(of_keys[0], 1), j.type.layout, assert_trivial=True)
        gl.store(BIAS + bh.to(gl.int64) * n_keys + j, x, mask=j < n_keys)
    if len(of_ends) > 0:
        n_parts = gl.cdiv(n_keys, C.R)
        if part < n_parts:
            at = ENDS + bh.to(gl.int64) * n_parts + part
            gl.store(at, total(of_ends[0]))
            at += n_batch.to(gl.int64) * n_heads * n_parts
            gl.store(at, total(of_ends[1]))


class Added(NamedTuple):
    """What is added to the scores of a call, for tiles of both orientations.

    Attributes:
        composed: The terms that kernels are composed of: slopes.
        bias: That of keys, in float32, or None.
        tables: Quads of a table for tiles [queries, keys] and for tiles [keys, queries]; None for
            those that nobody reads.
        unit: What biases are multiplied by beside products; quads have it in them.
        numbers: As in `terms.Terms`, without vectors by distance.
    """

    composed: terms.Composed
    bias: Tensor | None
    tables: tuple[Tensor | None, Tensor | None]
    unit: float
    numbers: tuple[int, ...]


def added_of(call: setups.Setup, steps: Steps, *, of_queries: bool, of_keys: bool) -> Added:
    """What is added to the scores of a call, for tiles [queries, keys], [keys, queries] or both."""
    o = call.options
    unit = 1 / o.scale if crews.plain(call) else 1.0
    slopes = [] if o.slopes is None else [terms.slopes_term(o.slopes)]
    strides, ends, row, tables, bias = [0, 0, 0], (0, 0), 0, (None, None), o.bias
    if o.table is not None:
        row, ends = table.row(o.table), (call.first, call.first + o.table.shape[1] - 1)
        tables = tuple(
            table.quads_of(steps, o.table, unit, reverse=reverse) if wanted else None
            for reverse, wanted in ((False, of_queries), (True, of_keys))
        )
    if bias is not None:
        if bias.dtype != torch.float32 or bias.stride(-1) != 1:
            bias = steps.copied(bias, torch.float32)
        strides = setups.strides(bias)
    numbers = (*strides, 1, row, *ends, call.origin)
    return Added(terms.Composed.of(slopes), bias, tables, unit, numbers)


class Sums(NamedTuple):
    """Memory for the sums of dS by the kernel that has it, for gradients of terms; None for others.

    Attributes:
        bias: For each key, [B, H_kv, 1, M].
        ends: What lies far below and far above the ends of a table, [2, B, H, parts of the keys].
        near: What is not far, as `with_ds` has it.
    """

    bias: Tensor | None = None
    ends: Tensor | None = None
    near: tuple[int, int, int] = (0, 0, 1)


def sums_of(
    call: setups.Setup, steps: Steps, fixed: crews.Constants, needs: frozenset[str]
) -> Sums:
    """Memory for the sums of a call.

    They are of all queries and heads that a tile of keys meets, and of dS before a cap is taken
    into account. What they do not serve engine `triton` sums.

    Args:
        fixed: Of the kernel, whose programs own keys.
    """
    o, (n_batch, n_heads, group, _, n_keys) = call.options, call.sizes

    def memory(*shape: int) -> Tensor:
        return steps.own(torch.empty(shape, dtype=torch.float32, device=call.device))

    bias, ends, near = None, None, (0, 0, 1)
    if o.softcap is None:
        if o.bias is not None and "bias" in needs and (group == 1 or o.bias.shape[1] == 1):
            bias = memory(n_batch, n_heads // group, 1, n_keys)
        tile, _ = call.tuned("sums")
        # A tile of the kernel's lies within tiles of a table's own sums, all of one diagonal of
        # parts: these do either all of it or nothing.
        inside = tile.BM % fixed.BM == tile.BM % crews.PART == crews.PART % tile.BN == 0
        if call.clamped and "table" in needs and group == 1 and inside:
            ends = memory(2, n_batch, n_heads, setups.cdiv(n_keys, crews.PART))
            first, number, _ = term_gradients.table_diagonals(call, crews.PART)
            near = first * tile.BN, (first + number) * tile.BN, tile.BM
    return Sums(bias, ends, near)


def bias_gradient(shared: Shared, bias: Tensor, sums: Tensor) -> Tensor:
    """The gradient of a bias of keys [B|1, H|1, 1, M] from sums of dS [B, H_kv, 1, M]."""
    if bias.dtype == sums.dtype and bias.shape == sums.shape:
        return sums
    steps = shared.steps
    grad = steps.own(torch.empty(bias.shape, dtype=bias.dtype, device=bias.device))
    steps.do(write_sum, sums, grad)
    return grad


def write_sum(x: Tensor, out: Tensor) -> None:
    """Writes the sum of x over the dimensions in which `out` has 1 for all."""
    out.copy_(x.sum_to_size(out.shape))
