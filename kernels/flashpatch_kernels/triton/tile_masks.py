"""Masks on the device: small functions that a kernel is composed of when it is compiled.

A kind of mask is six functions. `rows` gives the interval of keys that some queries see, `seen`
says who sees whom in a tile. `keys` gives the tiles of keys that a tile of queries sees, `queries`
the tiles of queries that see a tile of keys: those numbered t0 .. t3, of which t1 .. t2 are seen
wholly, by every row, so that no element of them is tested. `at` tells which tile has a number: the
number itself, or what stands in a list. `whole` tells whether all pairs of some distances are seen.

Every function takes the same record, `mask` = (left, right, offset, bounds, bounds_batch,
bounds_head, bounds_row, runs, runs_batch, tiles, tiles_batch, tiles_head): three integers of a
Band; pointers and strides of Intervals; or a Boolean in the place of bounds, with its lists in that
of tiles. Keys hidden by `runs` are tested beside the interval.

Letters: N queries, M keys; BM queries and BN keys a tile.
"""

import triton
import triton.language as tl

from flashpatch_kernels.triton.compiling import kernel

# Tiles added before a division, which rounds towards zero, so that nothing negative is divided.
BEYOND = tl.constexpr(1 << 20)


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
def far_tile(t, t1, a, b):
    """The t-th of the tiles t1 .. a and b .. , those on which a term by distance is constant."""
    return tl.where(t < a - t1, t1 + t, b + t - (a - t1))


@triton.jit
def near_tile(t, t0, t1, a, b, t2):
    """The t-th of the tiles t0 .. t1, a .. b and t2 .. , all that `far_tile` leaves."""
    near = t - (t1 - t0)
    after = near - (b - a)
    return tl.where(near < 0, t0 + t, tl.where(after < 0, a + near, t2 + after))


@triton.jit
def near_keys(first, last, m, t1, t2, BM: tl.constexpr, BN: tl.constexpr):
    """The tiles a .. b of the key tiles t1 .. t2 that have distances between `first` and `last`.

    Those before a have none above `first`, those from b on none below `last`.
    """
    a = (first + m + 1 + BEYOND * BN) // BN - BEYOND
    b = (last + m + BM - 1 + BN - 1 + BEYOND * BN) // BN - BEYOND
    a = tl.minimum(tl.maximum(a, t1), t2)
    return a, tl.minimum(tl.maximum(b, a), t2)


@triton.jit
def near_queries(first, last, n, t1, t2, BM: tl.constexpr, BN: tl.constexpr):
    """The tiles a .. b of the query tiles t1 .. t2 that have distances between `first` and `last`.

    Those before a have none below `last`, those from b on none above `first`.
    """
    a = (n + 1 - last + BEYOND * BM) // BM - BEYOND
    b = (n + BN - 1 - first + BM - 1 + BEYOND * BM) // BM - BEYOND
    a = tl.minimum(tl.maximum(a, t1), t2)
    return a, tl.minimum(tl.maximum(b, a), t2)


@triton.jit
def band_whole(mask, low, high):
    """Whether everybody sees all keys at the distances low .. high."""
    left, right, offset = mask[0], mask[1], mask[2]
    return (low >= offset - left) & (high <= offset + right)


@triton.jit
def never_whole(mask, low, high):
    """No telling without a look at the bounds."""
    return False


@triton.jit
def hidden(mask, batch, j, n_keys):
    """Whether nobody sees the keys j."""
    runs, runs_batch = mask[7], mask[8]
    at = runs + tl.cast(batch, tl.int64) * runs_batch + j
    return tl.load(at, mask=j < n_keys, other=0) <= 0


@triton.jit
def interval_seen(lo, hi, i, j, mask, batch, head, n_queries, n_keys, RUNS: tl.constexpr):
    """Whether queries of the bounds lo, hi see the keys j."""
    seen = (lo <= j) & (j < hi)
    if RUNS:
        seen = seen & ~hidden(mask, batch, j, n_keys)
    return seen


@triton.jit
def boolean_seen(lo, hi, i, j, mask, batch, head, n_queries, n_keys, RUNS: tl.constexpr):
    """Whether the queries i see the keys j."""
    allowed, row = mask[3], mask[6]
    at = allowed + tl.cast(batch, tl.int64) * mask[4] + tl.cast(head, tl.int64) * mask[5]
    real = (i < n_queries) & (j < n_keys)
    return tl.load(at + (i.to(tl.int64) * row + j), mask=real, other=0) != 0


@triton.jit
def number_itself(mask, batch, head, tile, t, n_others):
    """The t-th of the others that a tile meets, where they are a range."""
    return t


@triton.jit
def listed(mask, batch, head, tile, t, n_others):
    """The t-th of the others that a tile meets, where they are a list."""
    return tl.load(list_of(mask, batch, head, tile, n_others) + 2 + t)


@triton.jit
def list_of(mask, batch, head, tile, n_others):
    """A tile's list: how many others it meets wholly, how many at all, and which in that order."""
    lists = mask[9] + tl.cast(batch, tl.int64) * mask[10] + tl.cast(head, tl.int64) * mask[11]
    return lists + tl.cast(tile, tl.int64) * (n_others + 2)


@triton.jit
def boolean_rows(mask, batch, i, n_queries, n_keys):
    """No bounds: all is told by `boolean_seen`."""
    return i, i


@triton.jit
def boolean_keys(
    mask, batch, head, start, n_queries, n_keys,
    BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Numbers of the key tiles in the list of the queries start .. start + BM."""
    at = list_of(mask, batch, head, start // BM, tl.cdiv(n_keys, BN))
    return 0, 0, tl.load(at), tl.load(at + 1)


@triton.jit
def boolean_queries(
    mask, batch, head, start, n_queries, n_keys, BM: tl.constexpr, BN: tl.constexpr
):
    """Numbers of the query tiles in the list of the keys start .. start + BN."""
    at = list_of(mask, batch, head, start // BN, tl.cdiv(n_queries, BM))
    return 0, 0, tl.load(at), tl.load(at + 1)


@triton.jit
def band_rows(mask, batch, i, n_queries, n_keys):
    """Keys [lo, hi) of the queries i under a Band."""
    left, right, offset = mask[0], mask[1], mask[2]
    return i + (offset - left), tl.minimum(i + (offset + right + 1), n_keys)


@triton.jit
def band_keys(
    mask, batch, head, start, n_queries, n_keys,
    BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Key tiles of the queries start .. start + BM under a Band."""
    left, right, offset = mask[0], mask[1], mask[2]
    last = tl.minimum(start + BM, n_queries) - 1
    lo_first = start + (offset - left)
    lo_last = last + (offset - left)
    hi_first = start + (offset + right + 1)
    hi_last = last + (offset + right + 1)
    return split(lo_first, hi_last, lo_last, hi_first, n_keys, BN)


@triton.jit
def band_queries(mask, batch, head, start, n_queries, n_keys, BM: tl.constexpr, BN: tl.constexpr):
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
    bounds, bounds_batch, bounds_row = mask[3], mask[4], mask[6]
    i = tl.minimum(i, n_queries - 1)
    at = bounds + tl.cast(batch, tl.int64) * bounds_batch + i * bounds_row
    return tl.maximum(tl.load(at), 0), tl.minimum(tl.load(at + 1), n_keys)


@triton.jit
def interval_keys(
    mask, batch, head, start, n_queries, n_keys,
    BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Key tiles of the queries start .. start + BM under Intervals."""
    lo, hi = interval_rows(mask, batch, start + tl.arange(0, BM), n_queries, n_keys)
    empty = lo >= hi
    first = tl.min(tl.where(empty, n_keys, lo))
    end = tl.max(tl.where(empty, 0, hi))
    full_first = tl.max(lo)
    full_end = tl.min(tl.where(empty, 0, hi))
    if RUNS:
        runs, runs_batch = mask[7], mask[8]
        j = tl.cdiv(full_first, BN) * BN
        at = runs + tl.cast(batch, tl.int64) * runs_batch + j
        full_end = tl.minimum(full_end, tl.load(at, mask=j < n_keys, other=0))
    return split(first, end, full_first, full_end, n_keys, BN)


@kernel
def key_tiles_kernel(
    tiles, bounds, bounds_batch, bounds_row, runs, runs_batch, n_queries, n_keys,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """What `interval_keys` says of the BM queries of each tile, ROWS of them at a time."""
    n_tiles = tl.cdiv(n_queries, BM)
    batch = tl.program_id(0) // n_tiles
    start = (tl.program_id(0) % n_tiles) * BM
    mask = (0, 0, 0, bounds, bounds_batch, 0, bounds_row, runs, runs_batch)
    t0, t1, t2, t3 = interval_keys(mask, batch, 0, start, n_queries, n_keys, ROWS, BN, RUNS)
    for part in tl.static_range(1, BM // ROWS):
        at = start + part * ROWS
        a0, a1, a2, a3 = interval_keys(mask, batch, 0, at, n_queries, n_keys, ROWS, BN, RUNS)
        t0, t1, t2, t3 = (
            tl.minimum(t0, a0),
            tl.maximum(t1, a1),
            tl.minimum(t2, a2),
            tl.maximum(t3, a3),
        )
    t1 = tl.minimum(t1, t3)
    to = tiles + tl.cast(tl.program_id(0), tl.int64) * 4
    tl.store(to, t0)
    tl.store(to + 1, t1)
    tl.store(to + 2, tl.maximum(t2, t1))
    tl.store(to + 3, t3)


@triton.jit
def tile_range(mask, batch, tile):
    """The four numbers that stand in the place of a tile's list."""
    tiles, tiles_batch = mask[9], mask[10]
    at = tiles + tl.cast(batch, tl.int64) * tiles_batch + tile * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def interval_listed_keys(
    mask, batch, head, start, n_queries, n_keys,
    BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Key tiles of the queries start .. start + BM, as `key_tiles_kernel` found them."""
    return tile_range(mask, batch, start // BM)


@triton.jit
def interval_queries(
    mask, batch, head, start, n_queries, n_keys, BM: tl.constexpr, BN: tl.constexpr
):
    """Query tiles of the keys start .. start + BN, as `query_tiles_kernel` found them."""
    return tile_range(mask, batch, start // BN)


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


@kernel
def states_kernel(
    STATES, ALLOWED, batch_stride, head_stride, row_stride, n_heads, n_queries, n_keys,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """How much of each tile of a Boolean is seen: 0 nothing, 1 a part, 2 all."""
    pid = tl.program_id(0)
    key_tiles = tl.cdiv(n_keys, BN)
    query_tiles = tl.cdiv(n_queries, BM)
    which = pid // (key_tiles * query_tiles)
    i = (pid // key_tiles) % query_tiles * BM + tl.arange(0, BM)[:, None]
    j = pid % key_tiles * BN + tl.arange(0, BN)[None, :]
    batch = tl.cast(which // n_heads, tl.int64)
    head = tl.cast(which % n_heads, tl.int64)
    at = ALLOWED + batch * batch_stride + head * head_stride + (i.to(tl.int64) * row_stride + j)
    inside = (i < n_queries) & (j < n_keys)
    seen = tl.load(at, mask=inside, other=0) != 0
    some = tl.max(seen.to(tl.int32))
    # A tile that reaches beyond the last query or key is never seen wholly.
    tl.store(STATES + pid, some + tl.min(seen.to(tl.int32)))


@kernel
def lists_kernel(
    LISTS, STATES, n_tiles, n_others, matrix_stride, tile_stride, other_stride, SIZE: tl.constexpr
):  # fmt: skip
    """A tile's list from the states of its pairs with all others, SIZE of them at a time."""
    pid = tl.program_id(0)
    states = STATES + tl.cast(pid // n_tiles, tl.int64) * matrix_stride
    states += tl.cast(pid % n_tiles, tl.int64) * tile_stride
    to = LISTS + tl.cast(pid, tl.int64) * (n_others + 2)
    n_whole = 0
    n_part = 0
    for start in tl.range(0, n_others, SIZE):
        other = start + tl.arange(0, SIZE)
        state = tl.load(states + other * other_stride, mask=other < n_others, other=0)
        n_whole += tl.sum((state == 2).to(tl.int32))
        n_part += tl.sum((state == 1).to(tl.int32))
    tl.store(to, n_whole)
    tl.store(to + 1, n_whole + n_part)
    whole_at = 2
    part_at = 2 + n_whole
    for start in tl.range(0, n_others, SIZE):
        other = start + tl.arange(0, SIZE)
        state = tl.load(states + other * other_stride, mask=other < n_others, other=0)
        whole = (state == 2).to(tl.int32)
        part = (state == 1).to(tl.int32)
        at = tl.where(state == 2, whole_at + tl.cumsum(whole), part_at + tl.cumsum(part)) - 1
        tl.store(to + at, other, mask=(state > 0) & (other < n_others))
        whole_at += tl.sum(whole)
        part_at += tl.sum(part)
