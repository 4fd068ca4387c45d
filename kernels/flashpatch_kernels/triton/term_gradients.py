"""The gradients of a score's terms: sums of ds over all that share an entry of a table or a bias.

ds of a tile is computed anew from what the backward pass saved, and summed by one program in a
fixed order, so that there are no atomics. What the tiles have in common that a program sums is told
by three device functions: `steps` counts them, `place` says where the next one lies, and `finish`
stores the sum.

* a bias of pairs: one tile of queries and keys, in all the rows and heads that share the bias;
* a bias of keys: the tiles of all queries on top of that;
* a table: the tiles on one diagonal, in all rows; `diagonals_kernel` then sums along diagonals
  within the tiles.

Letters as in `backward_pass`; T = N + M - 1 entries of a table, tiles of S x S.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.masks import Band
from flashpatch_kernels.triton import dropout, launching, scores, tiles
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.stats import Shared, load_stats

# Tiles that one program sums along a diagonal, so that long diagonals keep many programs busy.
CHUNK = 32


@triton.jit
def bias_steps(walk, pid, n_batch, n_heads, n_queries, n_keys, C: tl.constexpr):
    """How many rows and heads share the bias."""
    rows, heads = walk[0], walk[1]
    return (n_batch // rows) * (n_heads // heads)


@triton.jit
def bias_place(walk, pid, t, n_batch, n_heads, n_queries, n_keys, C: tl.constexpr):
    """Row, head, first query and first key of the t-th tile."""
    heads = walk[1]
    key_tiles = tl.cdiv(n_keys, C.BN)
    query_tiles = tl.cdiv(n_queries, C.BM)
    part = pid // (key_tiles * query_tiles)
    shared = n_heads // heads
    start = (pid // key_tiles) % query_tiles * C.BM
    return part // heads + t // shared, part % heads + t % shared, start, pid % key_tiles * C.BN


@triton.jit
def bias_finish(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores a tile of the gradient [rows, heads, N, M]."""
    key_tiles = tl.cdiv(n_keys, C.BN)
    query_tiles = tl.cdiv(n_queries, C.BM)
    part = tl.cast(pid // (key_tiles * query_tiles), tl.int64)
    i = (pid // key_tiles) % query_tiles * C.BM + tl.arange(0, C.BM)[:, None]
    j = pid % key_tiles * C.BN + tl.arange(0, C.BN)[None, :]
    at = out + part * n_queries * n_keys + (i.to(tl.int64) * n_keys + j)
    tl.store(at, acc.to(out.dtype.element_ty), mask=(i < n_queries) & (j < n_keys))


@triton.jit
def keys_steps(walk, pid, n_batch, n_heads, n_queries, n_keys, C: tl.constexpr):
    """How many tiles of queries, in how many rows and heads that share the bias."""
    shared = (n_batch // walk[0]) * (n_heads // walk[1])
    return shared * tl.cdiv(n_queries, C.BM)


@triton.jit
def keys_place(walk, pid, t, n_batch, n_heads, n_queries, n_keys, C: tl.constexpr):
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
def diagonal(walk, pid, n_queries, n_keys, C: tl.constexpr):
    """A program's diagonal: key tile minus query tile, its first query tile and their number."""
    first_diagonal, n_diagonals, n_chunks = walk[0], walk[1], walk[2]
    offset = first_diagonal + (pid // n_chunks) % n_diagonals
    start = tl.maximum(0, -offset)
    stop = tl.minimum(tl.cdiv(n_queries, C.BM), tl.cdiv(n_keys, C.BN) - offset)
    return offset, start, stop - start


@triton.jit
def table_steps(walk, pid, n_batch, n_heads, n_queries, n_keys, C: tl.constexpr):
    """How many tiles of the diagonal are this program's."""
    n_chunks, chunk = walk[2], walk[3]
    _, _, n_tiles = diagonal(walk, pid, n_queries, n_keys, C)
    return tl.minimum(n_tiles * n_batch - pid % n_chunks * chunk, chunk)


@triton.jit
def table_place(walk, pid, t, n_batch, n_heads, n_queries, n_keys, C: tl.constexpr):
    """Row, head, first query and first key of the t-th tile."""
    n_diagonals, n_chunks, chunk = walk[1], walk[2], walk[3]
    offset, start, n_tiles = diagonal(walk, pid, n_queries, n_keys, C)
    t = pid % n_chunks * chunk + t
    tile = start + t % n_tiles
    head = pid // (n_chunks * n_diagonals)
    return t // n_tiles, head, tile * C.BM, (tile + offset) * C.BN


@triton.jit
def table_finish(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores the sum of the tiles [heads, diagonals, chunks, S, S]."""
    r = tl.arange(0, C.BM)[:, None]
    c = tl.arange(0, C.BN)[None, :]
    tl.store(out + tl.cast(pid, tl.int64) * (C.BM * C.BN) + (r * C.BN + c), acc)


@kernel
def sums_kernel(
    Q, K, V, DO, STATS, OUT,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row,
    n_batch, n_heads, group, n_queries, n_keys, wave, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, terms, bias_batch, bias_head, bias_row, table_row, seed, threshold, keep_scale,
    walk0, walk1, walk2, walk3,
    ROWS: tl.constexpr, SEEN: tl.constexpr, RUNS: tl.constexpr, TERMS: tl.constexpr,
    CODE: tl.constexpr,
    STEPS: tl.constexpr, PLACE: tl.constexpr, FINISH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One sum of the ds of several tiles."""
    mask = (left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
            tiles_of, tiles_batch, tiles_head)  # fmt: skip
    walk = (walk0, walk1, walk2, walk3)
    drop = (seed, threshold, keep_scale)
    pid = tl.program_id(0)
    n_rows = tl.cast(n_batch * n_heads, tl.int64) * n_queries
    acc = tiles.zeros(C.BM, C.BN, 0)[0]
    for t in tl.range(0, STEPS(walk, pid, n_batch, n_heads, n_queries, n_keys, C)):
        batch, head, m, n = PLACE(walk, pid, t, n_batch, n_heads, n_queries, n_keys, C)
        score = (factor, cap, batch, n_queries, n_keys, terms,
                 bias_batch, bias_head, bias_row, table_row)  # fmt: skip
        b = tl.cast(batch, tl.int64)
        h = tl.cast(head, tl.int64)
        q_at = Q + (b * q_batch + h * q_head) * C.UNIT
        k_at = K + (b * k_batch + h // group * k_head) * C.UNIT
        v_at = V + (b * v_batch + h // group * v_head) * C.UNIT
        do_at = DO + (b * do_batch + h * do_head) * C.UNIT
        queries = tiles.matrices(
            q_at, 0, q_row * C.UNIT, 1, n_queries, C.BM, C.D, C.D0, C.D1, False
        )
        keys = tiles.matrices(k_at, 0, k_row * C.UNIT, 1, n_keys, C.BN, C.D, C.D0, C.D1, False)
        values = tiles.matrices(v_at, 0, v_row * C.UNIT, 1, n_keys, C.BN, C.DV, C.V0, C.V1, False)
        douts = tiles.matrices(
            do_at, 0, do_row * C.UNIT, 1, n_queries, C.BM, C.DV, C.V0, C.V1, False
        )
        q = tiles.load(queries, 0, m, C.BM, C.D, C.D0, C.D1, False, True)
        k = tiles.load(keys, 0, n, C.BN, C.D, C.D0, C.D1, False, True)
        i = m + tl.arange(0, C.BM)
        lo, hi = ROWS(mask, batch, i, n_queries, n_keys)
        i = i[:, None]
        j = (n + tl.arange(0, C.BN))[None, :]
        seen = SEEN(lo[:, None], hi[:, None], i, j, mask, batch, h, n_queries, n_keys, RUNS)
        i = tl.minimum(i, n_queries - 1)
        j = tl.minimum(j, n_keys - 1)
        s, _ = scores.scores(tiles.inner(q, k, C), i, j, h, score, C, TERMS)  # [S, S]
        lse, delta = load_stats(STATS, n_rows, b * n_heads + h, m, n_queries, C.BM, True)
        p = tl.math.exp2(s * to_log2 - lse[:, None])
        p = tl.where(seen, p, 0.0)
        do = tiles.load(douts, 0, m, C.BM, C.DV, C.V0, C.V1, False, True)
        v = tiles.load(values, 0, n, C.BN, C.DV, C.V0, C.V1, False, True)
        dp = tiles.inner(do, v, C)
        if C.DROPOUT:
            kept = dropout.kept(i, j, b * n_heads + h, drop)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        acc += p * (dp - delta[:, None])
    FINISH(walk, pid, acc, OUT, n_queries, n_keys, C)


@kernel
def diagonals_kernel(
    SUMS, OUT, n_queries, n_entries, first_diagonal, n_diagonals, n_chunks,
    S: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """X entries of the gradient [H, T] of a table, from the sums of tiles."""
    n_parts = tl.cdiv(n_entries, X)
    head = tl.cast(tl.program_id(0) // n_parts, tl.int64)
    x = tl.program_id(0) % n_parts * X + tl.arange(0, X)
    distance = x - (n_queries - 1)
    total = tl.zeros([X], tl.float32)
    for r in tl.range(0, S):
        # The keys of query r of a tile that are so far from it, as tile and place within the tile.
        key = distance + (r + (1 << 20) * S)
        which = key // S - (1 << 20) - first_diagonal
        at = SUMS + ((head * n_diagonals + which) * n_chunks * (S * S) + (r * S + key % S))
        real = (which >= 0) & (which < n_diagonals)
        for chunk in tl.range(0, n_chunks):
            total += tl.load(at + chunk * (S * S), mask=real, other=0.0)
    tl.store(OUT + head * n_entries + x, total.to(OUT.dtype.element_ty), mask=x < n_entries)


def term_gradients(shared: Shared, needs: frozenset[str]) -> dict[str, Tensor]:
    """The gradients of a call's terms that `needs` names, among "table", "bias" and "sinks"."""
    options = shared.call.options
    table, bias, sinks = options.table, options.bias, options.sinks
    grads: dict[str, Tensor] = {}
    if table is not None and "table" in needs:
        grads["table"] = table_gradient(shared, table)
    if bias is not None and "bias" in needs:
        grads["bias"] = bias_gradient(shared, bias)
    if sinks is not None and "sinks" in needs:
        grads["sinks"] = sinks_gradient(shared.stats, sinks)
    return grads


def sum_gradient(
    shared: Shared,
    out: Tensor,
    functions: tuple[Any, Any, Any],
    n_programs: int,
    walk: tuple[int, int, int, int],
) -> None:
    """Launches `sums_kernel` with the three functions of one kind of sum."""
    call, added, inputs, stats = shared
    tile, fixed = call.tuned("sums")
    launching.launch(
        sums_kernel,
        n_programs,
        tile,
        *(*inputs, stats, out),
        *call.strides(*inputs),
        *(*call.sizes, 0, call.to_log2),
        *call.mask.arguments(),
        *(*call.cap, added.pointers, *added.numbers, *call.drop),
        *walk,
        *(
            call.mask.rows,
            call.mask.seen,
            call.mask.has_runs,
            added.functions,
            added.code,
            *functions,
            fixed,
        ),
    )


def bias_gradient(shared: Shared, bias: Tensor) -> Tensor:
    """The gradient of a bias [B|1, H|1, N|1, M]."""
    call = shared.call
    _, _, _, n_queries, n_keys = call.sizes
    rows, heads, n_rows, _ = bias.shape
    tile, _ = call.tuned("sums")
    out = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    n_programs = rows * heads * triton.cdiv(n_keys, tile.BN)
    functions = (keys_steps, keys_place, keys_finish)
    if n_rows == n_queries > 1:
        n_programs *= triton.cdiv(n_queries, tile.BM)
        functions = (bias_steps, bias_place, bias_finish)
    sum_gradient(shared, out, functions, n_programs, (rows, heads, 0, 0))
    return out


def table_gradient(shared: Shared, table: Tensor) -> Tensor:
    """The gradient of a table [H, T]."""
    call = shared.call
    n_batch, n_heads, _, n_queries, n_keys = call.sizes
    tile, _ = call.tuned("sums")
    size = tile.BM
    query_tiles, key_tiles = triton.cdiv(n_queries, size), triton.cdiv(n_keys, size)
    first, last = visible_diagonals(call.options.mask, size)
    first, last = max(first, 1 - query_tiles), min(last, key_tiles - 1)
    n_diagonals = max(0, last - first + 1)
    out = torch.empty(table.shape, dtype=table.dtype, device=table.device)
    if not n_diagonals:
        return out.zero_()
    n_chunks = triton.cdiv(min(query_tiles, key_tiles) * n_batch, CHUNK)
    sums = torch.empty(
        (n_heads, n_diagonals, n_chunks, size, size), dtype=torch.float32, device=table.device
    )
    functions = (table_steps, table_place, table_finish)
    walk = (first, n_diagonals, n_chunks, CHUNK)
    n_programs = n_heads * n_diagonals * n_chunks
    sum_gradient(shared, sums, functions, n_programs, walk)
    n_entries, width = table.shape[1], 128
    launching.launch(
        diagonals_kernel,
        n_heads * triton.cdiv(n_entries, width),
        tile._replace(warps=4, stages=1, tma=False),
        *(sums, out, n_queries, n_entries, first, n_diagonals, n_chunks, size, width),
    )
    return out


def visible_diagonals(mask: Any, size: int) -> tuple[int, int]:
    """The first and last diagonal of tiles that a mask, as far as it is known, shows a part of."""
    first, last = -launching.UNLIMITED, launching.UNLIMITED
    if isinstance(mask, Band):
        if mask.left is not None:
            first = (mask.offset - mask.left) // size
        if mask.right is not None:
            last = -((-mask.offset - mask.right) // size)
    return first, last


def sinks_gradient(stats: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of the sinks [H]: their weight is 2^(sink - lse) and their value 0."""
    weights = torch.exp2(sinks.float()[:, None] * launching.LOG2E - stats[0])
    return -(weights * stats[1]).sum((0, 2)).to(sinks.dtype)
