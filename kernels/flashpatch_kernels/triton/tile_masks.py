"""Masks on the device: small functions that a kernel is composed of when it is compiled.

In a tile a mask is an interval of keys for each query. A kind of mask is three functions: `rows`
gives the interval of some queries; `keys` the key tiles that a tile of queries sees; `queries` the
query tiles that see a tile of keys. Tiles t0 .. t3 are seen; t1 .. t2 of them wholly, by every row,
so that no element of them is tested.

Every function takes the same record, `mask` = (left, right, offset, bounds, bounds_batch,
bounds_row, runs, runs_batch, tiles, tiles_batch): three integers of a Band, or pointers and strides
of Intervals. Keys hidden by `runs` are tested by the kernels, beside the interval.

Letters: N queries, M keys; BM queries and BN keys a tile.
"""

import triton
import triton.language as tl

from flashpatch_kernels.triton.compiling import kernel


@triton.jit
def split(first, end, full_first, full_end, n, SIZE: tl.constexpr):
    """The tiles of SIZE that [first, end) meets, t0 .. t3, and those inside the full range."""
    t0 = tl.maximum(first, 0) // SIZE
    t3 = tl.maximum(t0, tl.cdiv(tl.minimum(end, n), SIZE))
    t1 = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_first, 0), SIZE), t0), t3)
    t2 = tl.maximum(t1, tl.minimum(tl.minimum(full_end, n) // SIZE, t3))
    return t0, t1, t2, t3


@triton.jit
def edge_tile(t, t0, t1, t2):
    """The t-th of the tiles t0 .. t1 and t2 .. t3, those that are seen in part."""
    return tl.where(t < t1 - t0, t0 + t, t2 + t - (t1 - t0))


@triton.jit
def hidden(mask, batch, j, n_keys):
    """Whether nobody sees the keys j."""
    runs, runs_batch = mask[6], mask[7]
    at = runs + tl.cast(batch, tl.int64) * runs_batch + j
    return tl.load(at, mask=j < n_keys, other=0) <= 0


@triton.jit
def visible(lo, hi, start, mask, batch, n_keys, BN: tl.constexpr, RUNS: tl.constexpr):
    """Who sees whom among queries with bounds lo, hi and the keys start .. start + BN: [BM, BN]."""
    j = start + tl.arange(0, BN)
    seen = (lo[:, None] <= j[None, :]) & (j[None, :] < hi[:, None])
    if RUNS:
        seen = seen & ~hidden(mask, batch, j, n_keys)[None, :]
    return seen


@triton.jit
def band_rows(mask, batch, i, n_queries, n_keys):
    """Keys [lo, hi) of the queries i under a Band."""
    left, right, offset = mask[0], mask[1], mask[2]
    return i + (offset - left), tl.minimum(i + (offset + right + 1), n_keys)


@triton.jit
def band_keys(
    mask, batch, start, n_queries, n_keys, BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr
):
    """Key tiles of the queries start .. start + BM under a Band."""
    left, right, offset = mask[0], mask[1], mask[2]
    last = tl.minimum(start + BM, n_queries) - 1
    lo_first = start + (offset - left)
    lo_last = last + (offset - left)
    hi_first = start + (offset + right + 1)
    hi_last = last + (offset + right + 1)
    return split(lo_first, hi_last, lo_last, hi_first, n_keys, BN)


@triton.jit
def band_queries(mask, batch, start, n_queries, n_keys, BM: tl.constexpr, BN: tl.constexpr):
    """Query tiles of the keys start .. start + BN under a Band."""
    left, right, offset = mask[0], mask[1], mask[2]
    end = tl.minimum(start + BN, n_keys)
    first_any = start - (offset + right)
    end_any = end + (left - offset)
    first_all = end - (offset + right + 1)
    end_all = start + (left - offset + 1)
    return split(first_any, end_any, first_all, end_all, n_queries, BM)


@triton.jit
def interval_rows(mask, batch, i, n_queries, n_keys):
    """Keys [lo, hi) of the queries i under Intervals; rows beyond the last repeat it."""
    bounds, bounds_batch, bounds_row = mask[3], mask[4], mask[5]
    i = tl.minimum(i, n_queries - 1)
    at = bounds + tl.cast(batch, tl.int64) * bounds_batch + i * bounds_row
    return tl.maximum(tl.load(at), 0), tl.minimum(tl.load(at + 1), n_keys)


@triton.jit
def interval_keys(
    mask, batch, start, n_queries, n_keys, BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr
):
    """Key tiles of the queries start .. start + BM under Intervals."""
    lo, hi = interval_rows(mask, batch, start + tl.arange(0, BM), n_queries, n_keys)
    empty = lo >= hi
    first = tl.min(tl.where(empty, n_keys, lo))
    end = tl.max(tl.where(empty, 0, hi))
    full_first = tl.max(lo)
    full_end = tl.min(tl.where(empty, 0, hi))
    if RUNS:
        runs, runs_batch = mask[6], mask[7]
        j = tl.cdiv(full_first, BN) * BN
        at = runs + tl.cast(batch, tl.int64) * runs_batch + j
        full_end = tl.minimum(full_end, tl.load(at, mask=j < n_keys, other=0))
    return split(first, end, full_first, full_end, n_keys, BN)


@triton.jit
def interval_queries(mask, batch, start, n_queries, n_keys, BM: tl.constexpr, BN: tl.constexpr):
    """Query tiles of the keys start .. start + BN, as `query_tiles_kernel` found them."""
    tiles, tiles_batch = mask[8], mask[9]
    at = tiles + tl.cast(batch, tl.int64) * tiles_batch + (start // BN) * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@kernel
def query_tiles_kernel(
    tiles,
    bounds,
    bounds_batch,
    bounds_row,
    runs,
    runs_batch,
    n_queries,
    n_keys,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """For one tile of keys: the query tiles that see it, and a run of those that see all of it.

    Two passes over the bounds, TILES query tiles at a time: the first finds the first and last tile
    that sees something and the first that sees all; the second where that run ends.
    """
    n_key_tiles = tl.cdiv(n_keys, BN)
    batch = tl.program_id(0) // n_key_tiles
    start = (tl.program_id(0) % n_key_tiles) * BN
    end = tl.minimum(start + BN, n_keys)
    n_tiles = tl.cdiv(n_queries, BM)
    base = bounds + tl.cast(batch, tl.int64) * bounds_batch
    t_in = tl.arange(0, TILES)
    i_in = tl.arange(0, BM)

    shown = True
    if RUNS:
        j = start + tl.arange(0, BN)
        at = runs + tl.cast(batch, tl.int64) * runs_batch + j
        shown = tl.max(tl.load(at, mask=j < n_keys, other=0)) != 0

    first = n_tiles
    last = -1
    full_first = n_tiles
    for t in tl.range(0, n_tiles, TILES):
        tile = t + t_in
        sees, sees_all = seen_by(base, bounds_row, tile, i_in, start, end, n_queries, BM)
        real = (tile < n_tiles) & shown
        first = tl.minimum(first, tl.min(tl.where(sees & real, tile, n_tiles)))
        last = tl.maximum(last, tl.max(tl.where(sees & real, tile, -1)))
        full_first = tl.minimum(full_first, tl.min(tl.where(sees_all & real, tile, n_tiles)))
    full_end = last + 1
    for t in tl.range((full_first // TILES) * TILES, last + 1, TILES):
        tile = t + t_in
        _, sees_all = seen_by(base, bounds_row, tile, i_in, start, end, n_queries, BM)
        stop = (tile > full_first) & ~sees_all
        full_end = tl.minimum(full_end, tl.min(tl.where(stop, tile, n_tiles)))
    full_first = tl.minimum(full_first, last + 1)
    at = tiles + tl.cast(tl.program_id(0), tl.int64) * 4
    tl.store(at, tl.minimum(first, last + 1))
    tl.store(at + 1, full_first)
    tl.store(at + 2, tl.maximum(full_end, full_first))
    tl.store(at + 3, last + 1)


@triton.jit
def seen_by(base, bounds_row, tile, i_in, start, end, n_queries, BM: tl.constexpr):
    """Whether any, and whether every query of the tiles sees (all of) the keys start .. end."""
    i = tile[:, None] * BM + i_in[None, :]
    at = base + i * bounds_row
    lo = tl.load(at, mask=i < n_queries, other=0)
    hi = tl.load(at + 1, mask=i < n_queries, other=0)
    sees = (lo < end) & (hi > start) & (lo < hi)
    sees_all = (lo <= start) & (hi >= end) & (i < n_queries)
    return tl.max(sees.to(tl.int32), 1) != 0, tl.min(sees_all.to(tl.int32), 1) != 0
