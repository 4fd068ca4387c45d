"""The gradients of a score's terms: which tiles' ds each is a sum of, and what else it takes.

* a bias of pairs: one tile of queries and keys, in all the rows and heads that share the bias;
* a bias of keys: the tiles of all queries on top of that;
* a table: the tiles on one diagonal, in all rows, summed along the diagonals within them; what lies
  beyond its ends `dq_kernel` has summed;
* slopes: `dq_kernel` has summed ds times the distance;
* sinks: a sum over what every query saved.

Letters as in `backward_pass`; T entries of a table. The diagonal of tiles o has those that begin at
query a BM and key a BM + o BN: BM + BN - 1 distances around o BN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.masks import Band
from flashpatch_kernels.triton import setups
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.stats import Shared
from flashpatch_kernels.triton.sums import Walk, sum_ds
from flashpatch_kernels.tuning import Tile

# As many programs keep a card busy: long diagonals are cut where there are fewer.
PROGRAMS = 384


@triton.jit
def pairs_steps(
    walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """How many rows and heads share the bias. All their tiles are known to be whole, or none."""
    rows, heads = walk[0], walk[1]
    steps = (n_batch // rows) * (n_heads // heads)
    _, _, m, n = pairs_place(walk, pid, 0, mask, n_batch, n_heads, n_queries, n_keys, WHOLE, C)
    whole = WHOLE(mask, n - (m + C.BM - 1), n + C.BN - 1 - m)
    whole = whole & (m + C.BM <= n_queries) & (n + C.BN <= n_keys)
    return tl.where(whole, steps, 0), steps


@triton.jit
def pairs_place(
    walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """Row, head, first query and first key of the t-th tile."""
    heads = walk[1]
    key_tiles = tl.cdiv(n_keys, C.BN)
    query_tiles = tl.cdiv(n_queries, C.BM)
    part = pid // (key_tiles * query_tiles)
    shared = n_heads // heads
    start = (pid // key_tiles) % query_tiles * C.BM
    row = part // heads + t // shared
    return row, part % heads + t % shared, start, pid % key_tiles * C.BN


@triton.jit
def pairs_finish(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores a tile of the gradient [rows, heads, N, M]."""
    key_tiles = tl.cdiv(n_keys, C.BN)
    query_tiles = tl.cdiv(n_queries, C.BM)
    part = tl.cast(pid // (key_tiles * query_tiles), tl.int64)
    i = (pid // key_tiles) % query_tiles * C.BM + tl.arange(0, C.BM)[:, None]
    j = pid % key_tiles * C.BN + tl.arange(0, C.BN)[None, :]
    at = out + part * n_queries * n_keys + (i.to(tl.int64) * n_keys + j)
    tl.store(at, acc.to(out.dtype.element_ty), mask=(i < n_queries) & (j < n_keys))


@triton.jit
def keys_steps(
    walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """How many tiles of queries, in how many rows and heads that share the bias."""
    shared = (n_batch // walk[0]) * (n_heads // walk[1])
    return 0, shared * tl.cdiv(n_queries, C.BM)


@triton.jit
def keys_place(
    walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """Row, head, first query and first key of the t-th tile."""
    heads = walk[1]
    key_tiles = tl.cdiv(n_keys, C.BN)
    query_tiles = tl.cdiv(n_queries, C.BM)
    part = pid // key_tiles
    shared = n_heads // heads
    row = part // heads + t // (query_tiles * shared)
    head = part % heads + (t // query_tiles) % shared
    return row, head, t % query_tiles * C.BM, pid % key_tiles * C.BN


@triton.jit
def keys_finish(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores a part of the gradient [rows, heads, 1, M]."""
    key_tiles = tl.cdiv(n_keys, C.BN)
    j = pid % key_tiles * C.BN + tl.arange(0, C.BN)
    at = out + tl.cast(pid // key_tiles, tl.int64) * n_keys + j
    tl.store(at, tl.sum(acc, 0).to(out.dtype.element_ty), mask=j < n_keys)


@triton.jit
def ordered(walk, pid):
    """A program's diagonal of tiles: those near 0, which are the longest, come first."""
    first_diagonal, n_diagonals, n_chunks = walk[0], walk[1], walk[2]
    x = (pid // n_chunks) % n_diagonals
    middle = tl.minimum(tl.maximum(0, first_diagonal), first_diagonal + n_diagonals - 1)
    below = middle - first_diagonal
    above = n_diagonals - 1 - below
    both = tl.minimum(below, above)
    near = tl.where(x % 2 == 0, x // 2, -(x // 2) - 1)
    far = tl.where(above > below, x - both, both - x)
    return middle + tl.where(x <= 2 * both, tl.where(below >= above, -near, near), far)


@triton.jit
def diagonal(walk, pid, mask, n_batch, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr):
    """A program's diagonal, its first query tile, its query tiles, and those seen wholly."""
    o = ordered(walk, pid)
    ratio: tl.constexpr = C.BM // C.BN
    # Divisions of what is not negative, which round down.
    start = (tl.maximum(0, -o) + ratio - 1) // ratio
    stop = tl.maximum(0, tl.cdiv(n_keys, C.BN) - o + ratio - 1) // ratio
    stop = tl.maximum(start, tl.minimum(tl.cdiv(n_queries, C.BM), stop))
    full = tl.minimum(n_queries // C.BM, tl.maximum(0, n_keys // C.BN - o + ratio - 1) // ratio)
    full = tl.maximum(full - start, 0)
    full = tl.where(WHOLE(mask, o * C.BN - C.BM + 1, o * C.BN + C.BN - 1), full, 0)
    return o, start, stop - start, full


@triton.jit
def table_steps(
    walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """How many tiles of the diagonal are this program's."""
    n_chunks = walk[2]
    _, _, n_tiles, full = diagonal(walk, pid, mask, n_batch, n_queries, n_keys, WHOLE, C)
    chunk = tl.cdiv(n_tiles * n_batch, n_chunks)
    begin = tl.minimum(pid % n_chunks * chunk, n_tiles * n_batch)
    steps = tl.minimum(n_tiles * n_batch - begin, chunk)
    return tl.minimum(tl.maximum(full * n_batch - begin, 0), steps), steps


@triton.jit
def table_place(
    walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """Row, head, first query and first key of the t-th tile; those seen wholly come first."""
    n_diagonals, n_chunks = walk[1], walk[2]
    o, start, n_tiles, full = diagonal(walk, pid, mask, n_batch, n_queries, n_keys, WHOLE, C)
    t += pid % n_chunks * tl.cdiv(n_tiles * n_batch, n_chunks)
    first_part = t < full * n_batch
    n_part = tl.maximum(tl.where(first_part, full, n_tiles - full), 1)
    t -= tl.where(first_part, 0, full * n_batch)
    a = start + tl.where(first_part, 0, full) + t % n_part
    return t // n_part, pid // (n_chunks * n_diagonals), a * C.BM, a * C.BM + o * C.BN


@triton.jit
def table_sum(walk, pid):
    """Where a program's sum stands among those of [heads, diagonals, chunks]."""
    first_diagonal, n_diagonals, n_chunks = walk[0], walk[1], walk[2]
    head = tl.cast(pid // (n_chunks * n_diagonals), tl.int64)
    at = head * n_diagonals + ordered(walk, pid) - first_diagonal
    return at * n_chunks + pid % n_chunks


@triton.jit
def table_finish(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores the sums along diagonals [heads, diagonals, chunks, W]: of o BN - BM + 1 + w."""
    W: tl.constexpr = 2 * C.BM
    w = tl.arange(0, W)[None, :]
    c = w + tl.arange(0, C.BM)[:, None] - (C.BM - 1)
    along = tl.gather(acc, tl.minimum(tl.maximum(c, 0), C.BN - 1), 1)  # [BM, W]
    along = tl.where((c >= 0) & (c < C.BN), along, 0.0)
    tl.store(out + table_sum(walk, pid) * W + tl.arange(0, W), tl.sum(along, 0))


@triton.jit
def of_distances(
    sums, head, place, n_diagonals, n_chunks, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """What the pairs of some distances sum to, of their places in the sums of diagonals of tiles.

    Diagonals of tiles that have a distance have it as place w in their sums: from the largest w.
    """
    W: tl.constexpr = 2 * BM
    total = tl.zeros(place.shape, tl.float32)
    for y in tl.static_range((BM + BN) // BN):
        which = place // BN - y
        w = place - which * BN
        real = (place >= 0) & (which >= 0) & (which < n_diagonals) & (w < BM + BN - 1)
        at = sums + (head * n_diagonals + which) * n_chunks * W + w
        for chunk in tl.range(0, n_chunks):
            total += tl.load(at + chunk * W, mask=real, other=0.0)
    return total


@kernel
def entries_kernel(
    SUMS, ENDS, OUT, first, entries, n_batch, n_heads, n_ends, n_row_tiles,
    first_diagonal, n_diagonals, n_chunks,
    BM: tl.constexpr, BN: tl.constexpr, X: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """X entries of the gradient [H, T] of a table, from the sums of diagonals of tiles.

    ENDS has, as the last of [n_ends, B, H, tiles], what lies beyond the ends of a table that is
    constant there: with what has the distances of the ends themselves, or, with REACH, only what
    lies more than so many distances beyond.
    """
    n_parts = tl.cdiv(entries, X)
    head = tl.cast(tl.program_id(0) // n_parts, tl.int64)
    start = tl.program_id(0) % n_parts * X
    r = tl.arange(0, X)
    x = start + r
    # The place of a distance among the sums.
    place = first + (BM - 1) - first_diagonal * BN
    total = of_distances(SUMS, head, place + x, n_diagonals, n_chunks, BM, BN)
    if ENDS is not None:
        if REACH == 0:
            total = tl.where((x == 0) | (x == entries - 1), 0.0, total)
        for end in tl.static_range(2):
            last = end * (entries - 1)
            here = (start <= last) & (last < start + X)
            beyond = tl.zeros([X], tl.float32)
            for at in tl.range(0, tl.where(here, n_batch * n_row_tiles, 0), X):
                t = at + r
                row = (n_ends - 2 + end) * n_batch + t // n_row_tiles
                at_t = ENDS + (row * n_heads + head) * n_row_tiles + t % n_row_tiles
                beyond += tl.load(at_t, mask=t < n_batch * n_row_tiles, other=0.0)
            for y in tl.range(0, tl.where(here, REACH, 0), X):
                past = place + last + (1 + y + r) * (2 * end - 1)
                near = of_distances(SUMS, head, past, n_diagonals, n_chunks, BM, BN)
                beyond += tl.where(y + r < REACH, near, 0.0)
            total += tl.where(x == last, tl.sum(beyond), 0.0)
    tl.store(OUT + head * entries + x, total.to(OUT.dtype.element_ty), mask=x < entries)


def term_gradients(
    shared: Shared, row_sums: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of a call's terms that `needs` names.

    Args:
        row_sums: What `dq_kernel` summed, [3, B, H, query tiles].
    """
    options = shared.call.options
    grads: dict[str, Tensor] = {}
    if options.table is not None and "table" in needs:
        ends = row_sums if shared.call.clamped else None
        grads["table"] = table_gradient(shared, options.table, ends)
    if options.slopes is not None and "slopes" in needs:
        assert row_sums is not None
        grads["slopes"] = shared.steps.own(torch.empty_like(options.slopes))
        shared.steps.do(write_slopes_gradient, row_sums, grads["slopes"])
    if options.bias is not None and "bias" in needs:
        grads["bias"] = bias_gradient(shared, options.bias)
    if options.sinks is not None and "sinks" in needs:
        grads["sinks"] = shared.steps.own(torch.empty_like(options.sinks))
        shared.steps.do(write_sinks_gradient, shared.stats, options.sinks, grads["sinks"])
    return grads


def bias_gradient(shared: Shared, bias: Tensor) -> Tensor:
    """The gradient of a bias [B|1, H|1, N|1, M]."""
    _, _, _, n_queries, n_keys = shared.call.sizes
    rows, heads, n_rows, _ = bias.shape
    tile, _ = shared.call.tuned("sums")
    out = shared.steps.own(torch.empty(bias.shape, dtype=bias.dtype, device=bias.device))
    n_programs = rows * heads * setups.cdiv(n_keys, tile.BN)
    functions, fixed = (keys_steps, keys_place, keys_finish), None
    if n_rows == n_queries > 1:
        n_programs *= setups.cdiv(n_queries, tile.BM)
        # Of one tile of the bias, the last of the terms but for a user's function.
        functions, fixed = (
            (pairs_steps, pairs_place, pairs_finish),
            len(shared.added.straight.adds) - 1 - shared.call.own,
        )
    sum_ds(shared, out, Walk(*functions, fixed, (rows, heads, 0, 0), n_programs))
    return out


def table_gradient(shared: Shared, table: Tensor, ends: Tensor | None, keys: int = 0) -> Tensor:
    """The gradient of a table [H, T].

    Args:
        ends: As `entries_kernel` takes it.
        keys: As `diagonals` takes it, where `ends` has what lies farther.
    """
    call, steps = shared.call, shared.steps
    n_batch, n_heads = call.sizes[:2]
    tile, _ = call.tuned("sums")
    entries = table.shape[1]
    first_diagonal, n_diagonals, n_chunks = table_diagonals(call, keys)
    out = steps.own(table.new_empty(n_heads, entries))
    shape = n_heads, n_diagonals, n_chunks, 2 * tile.BM
    sums = steps.own(table.new_empty(shape, dtype=torch.float32))
    if n_diagonals:
        functions = (table_steps, table_place, table_finish)
        numbers = (first_diagonal, n_diagonals, n_chunks, 0)
        # On a diagonal the table, the first of the terms, is the same in every tile.
        sum_ds(shared, sums, Walk(*functions, 0, numbers, n_heads * n_diagonals * n_chunks))
    width = 128
    steps.launch(
        entries_kernel,
        n_heads * setups.cdiv(entries, width),
        Tile(tile.BM, tile.BN, 4, 1),
        *(sums, ends, out, call.first, entries, n_batch, n_heads),
        *((0, 0) if ends is None else (ends.shape[0], ends.shape[3])),
        *(first_diagonal, n_diagonals, n_chunks),
        *(tile.BM, tile.BN, width, tile.BM + keys if keys else 0),
    )
    return out


def table_diagonals(call: setups.Setup, keys: int = 0) -> tuple[int, int, int]:
    """The diagonals of tiles that a table's own sums are of, see `diagonals`."""
    table, (_, _, _, n_queries, n_keys) = call.options.table, call.sizes
    assert table is not None
    low, high = max(call.first, 1 - n_queries), min(call.first + table.shape[1], n_keys) - 1
    return diagonals(call, low, high, keys)


def beyond(call: setups.Setup) -> tuple[bool, bool]:
    """Whether a mask, as far as it is known, shows distances below those of a table, and above."""
    table, (_, _, _, n_queries, n_keys) = call.options.table, call.sizes
    assert table is not None
    low, high = visible(call.options.mask, 1 - n_queries, n_keys - 1)
    return low < call.first, high > call.first + table.shape[1] - 1


def diagonals(call: setups.Setup, low: int, high: int, keys: int = 0) -> tuple[int, int, int]:
    """The first diagonal of tiles with visible distances from low to high, how many, and chunks.

    The diagonal o has the distances from o BN - BM + 1 to o BN + BN - 1.

    Args:
        keys: Where a tile of so many keys, a multiple of BN, has such a distance, so have all its
            parts of BN keys; 0 for BN.
    """
    n_batch, n_heads, _, n_queries, n_keys = call.sizes
    tile, _ = call.tuned("sums")
    low, high = visible(call.options.mask, low, high)
    keys = keys or tile.BN
    first = -((keys - 1 - low) // keys)
    number = max(0, (high + tile.BM - 1) // keys - first + 1)
    first, number = (x * (keys // tile.BN) for x in (first, number))
    chunks = setups.cdiv(PROGRAMS, max(1, n_heads * number))
    return first, number, min(chunks, n_batch * setups.cdiv(min(n_queries, n_keys), tile.BM))


def visible(mask: object, low: int, high: int) -> tuple[int, int]:
    """The distances from low to high that a mask, as far as it is known, shows."""
    if isinstance(mask, Band):
        low = low if mask.left is None else max(low, mask.offset - mask.left)
        high = high if mask.right is None else min(high, mask.offset + mask.right)
    return low, high


def write_slopes_gradient(row_sums: Tensor, out: Tensor) -> None:
    """Writes the gradient of the slopes [H] from what `dq_kernel` summed."""
    out.copy_(row_sums[0].sum((0, 2)))


def write_sinks_gradient(stats: Tensor, sinks: Tensor, out: Tensor) -> None:
    """Writes the gradient of the sinks [H], whose value is 0."""
    out.copy_(-(sink_weights(stats, sinks) * stats[1]).sum((0, 2)))


def sink_weights(stats: Tensor, sinks: Tensor) -> Tensor:
    """The weight 2^(sink - lse) of a sink for every query: [B, H, N]."""
    weights = torch.exp2(sinks.float()[:, None] * setups.LOG2E - stats[0])
    return weights * stats[2] if len(stats) == 3 else weights
