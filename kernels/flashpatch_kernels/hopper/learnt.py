"""Sums of dS that gradients of what is added to scores are made of: who has dS sums it.

For a bias of keys over all queries that a key meets; for a table what lies beyond its ends, tile by
tile: between them `triton.term_gradients` sums, and what tiles near its ends have. Where one
warpgroup collects dS of all for dQ, it sums by products with columns of zeros and ones, which take
neither instructions nor registers of those that compute dS; else who has dS sums in registers.

`near` is (the first and the end of the distances n - m at which tiles begin that a table's own sums
are of, None where no tile lies beyond, how many queries such a tile has).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashpatch_kernels.hopper import crews
from flashpatch_kernels.hopper.gluon import gl, jit, warpgroup_mma
from flashpatch_kernels.hopper.rings import take
from flashpatch_kernels.hopper.softmax import lane_sums
from flashpatch_kernels.triton import setups, term_gradients
from flashpatch_kernels.triton.plans import Steps
from flashpatch_kernels.triton.stats import Shared


@jit
def side(m, n, near):
    """Of a tile that begins with query m and key n: 0 if it is near, 1 below, 2 above."""
    first, end, rows = near
    distance = n - m // rows * rows
    case = 0
    if first is not None:
        case = gl.where(distance < first, 1, case)
    if end is not None:
        case = gl.where(distance >= end, 2, case)
    return case


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
    """The sums with those of a tile dS^T [R, BM] that begins with query m and key n."""
    of_keys, of_ends = sums
    if len(of_keys) > 0 or len(of_ends) > 0:
        x = lane_sums(dst)
        if len(of_keys) > 0:
            of_keys = (of_keys[0] + x,)
        if len(of_ends) > 0:
            case = side(m, n, near)
            x = thread_sums(x)
            below, above = gl.where(case == 1, x, 0.0), gl.where(case == 2, x, 0.0)
            of_ends = of_ends[0] + below, of_ends[1] + above
    return of_keys, of_ends


@jit
def store_of_keys(x, BIAS, bh, j, n_keys):
    """Stores the sums of the keys j of a head of a row of the batch in BIAS, [B, H_kv, M]."""
    gl.store(BIAS + bh.to(gl.int64) * n_keys + j, x, mask=j < n_keys)


@jit
def places_of_ends(ENDS, bh, part, n_parts, sizes):
    """Where in ENDS, [2, B, H, parts of R keys], a part has what is below and what is above."""
    n_batch, n_heads = sizes[0], sizes[1]
    at = ENDS + bh.to(gl.int64) * n_parts + part
    return at, at + n_batch.to(gl.int64) * n_heads * n_parts


@jit
def store_sums(sums, BIAS, ENDS, bh, part, j, sizes, C: gl.constexpr):
    """Stores the sums of the keys j [R], which are a part, of a head of a row of the batch."""
    of_keys, of_ends = sums
    if len(of_keys) > 0:
        x = gl.convert_layout(gl.sum(of_keys[0], 1), j.type.layout, assert_trivial=True)
        store_of_keys(x, BIAS, bh, j, sizes[4])
    if len(of_ends) > 0:
        n_parts = gl.cdiv(sizes[4], C.R)
        if part < n_parts:
            below, above = places_of_ends(ENDS, bh, part, n_parts, sizes)
            gl.store(below, total(of_ends[0]))
            gl.store(above, total(of_ends[1]))


@jit
def marks(BIAS, ENDS, dtype: gl.constexpr, C: gl.constexpr):
    """Right operands of products that sum dS^T [R, BM] over queries: [BM, 8] of zeros and ones.

    One for each case of `side`: column 0 sums every tile, 1 those below, 2 those above; what is not
    a number all three have. Nothing where nothing is summed.
    """
    if BIAS is not None or ENDS is not None:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for((8, C.BM), dtype)
        columns = gl.allocate_shared_memory(dtype, [3, 8, C.BM], layout)
        rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
        x = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(1, rows)), 1)
        zeros = gl.full([8, C.BM], 0.0, gl.float32, rows)
        for case in gl.static_range(3):
            ones = gl.where((x == 0) | (x == case), 1.0, 0.0)
            columns.index(case).store((zeros + ones).to(dtype))
        return (columns,)
    else:
        return ()


@jit
def no_totals(marks, C: gl.constexpr):
    """Sums of no tiles by `marks`, [R, 8] of each consumer's keys; nothing without."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    CONSUMERS: gl.constexpr = C.CONSUMERS if len(marks) > 0 else 0
    totals = ()
    for _ in gl.static_range(CONSUMERS):
        totals = totals + (gl.full([C.R, 8], 0.0, gl.float32, layout),)
    return totals


@jit
def start_totals(totals, marks, dss, x, m, n, near, C: gl.constexpr):
    """Issues the products that add the x-th tile of dS^T, of queries from m on and keys from n."""
    CONSUMERS: gl.constexpr = len(totals)
    started = ()
    for c in gl.static_range(CONSUMERS):
        ds = take(dss, x * CONSUMERS + c, 2 * CONSUMERS)  # [R, BM]
        columns = marks[0].index(side(m, n + c * C.R, near)).permute((1, 0))
        started = started + (warpgroup_mma(ds, columns, totals[c], is_async=True),)
    return started


@jit
def store_totals(totals, BIAS, ENDS, bh, tile, sizes, C: gl.constexpr):
    """As `store_sums`, of the keys of all consumers."""
    CONSUMERS: gl.constexpr = len(totals)
    for c in gl.static_range(CONSUMERS):
        x = totals[c]
        column = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, x.type.layout)), 0)
        part = tile * CONSUMERS + c
        if BIAS is not None:
            j = part * C.R + gl.arange(0, C.R, gl.SliceLayout(1, x.type.layout))
            store_of_keys(gl.sum(gl.where(column == 0, x, 0.0), 1), BIAS, bh, j, sizes[4])
        if ENDS is not None:
            n_parts = gl.cdiv(sizes[4], C.R)
            if part < n_parts:
                places = places_of_ends(ENDS, bh, part, n_parts, sizes)
                for end in gl.static_range(2):
                    beyond = gl.sum(gl.sum(gl.where(column == end + 1, x, 0.0), 1), 0)
                    gl.store(places[end], beyond)


class Sums(NamedTuple):
    """Memory for the sums of dS by the kernel that has it, for gradients of terms; None for others.

    Attributes:
        bias: For each key, [B, H_kv, 1, M].
        ends: What lies far below and far above the ends of a table, [2, B, H, parts of the keys].
        near: What is not far.
    """

    bias: Tensor | None = None
    ends: Tensor | None = None
    near: tuple[int | None, int | None, int] = (None, None, 1)


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

    bias, ends, near = None, None, Sums().near
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
            below, above = term_gradients.beyond(call)
            end = first + number
            near = (first * tile.BN if below else None, end * tile.BN if above else None, tile.BM)
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
