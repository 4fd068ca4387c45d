"""Sums of ds over tiles that share a parameter: what the gradients of a table and a bias are.

ds of a tile is computed anew from what the backward pass saved, and summed by one program in a
fixed order, so that there are no atomics. What the tiles have in common that a program sums is told
by three device functions, a walk: `steps` counts them, `place` says where the next one lies, and
`finish` stores the sum. Its tiles come in two parts, first those of which every pair is seen.

Letters as in `backward_pass`; tiles of BM queries and BN keys, BM a multiple of BN.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.triton import dropout, relative, scores, tiles
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.stats import Shared, load_stats


@triton.jit
def no_ds(C: tl.constexpr):
    """A tile of zeros."""
    return tiles.zeros(C.BM, C.BN, 0)[0]


@triton.jit
def add_ds(acc, p, ds, weights, do, m, n, head, score, C: tl.constexpr):
    """The sum of ds itself."""
    return acc + ds


class Walk(NamedTuple):
    """Which tiles a program sums, and what it does with the sum.

    Attributes:
        steps: (walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE, C) -> how many tiles
            are seen wholly, how many there are.
        place: (the same, t) -> row, head, first query and first key of the t-th tile.
        finish: (walk, pid, acc, out, n_queries, n_keys, C) stores the sum.
        fixed: Which of the terms add the same to all of a program's tiles.
        numbers: What the functions are given as `walk`.
        n_programs: In all.
        start: (C) -> the sum of no tiles.
        add: (acc, p, ds, weights, dO, m, n, head, score, C) -> the sum with the tile that begins at
            m and n; its weights are what v was multiplied by.
    """

    steps: Any
    place: Any
    finish: Any
    fixed: int | None
    numbers: tuple[int, int, int, int]
    n_programs: int
    start: Any = no_ds
    add: Any = add_ds


@triton.jit
def own_tile(walk, pid, n_rows, ROWS: tl.constexpr):
    """Batch row and head, as one number, and first row of a tile that walk[2] programs share."""
    n_tiles = tl.cdiv(n_rows, ROWS)
    pid = pid // walk[2]
    return pid // n_tiles, pid % n_tiles * ROWS


@triton.jit
def met(start, low, high, n_others, ROWS: tl.constexpr, OTHERS: tl.constexpr):
    """Which tile is the first that a tile meets at the distances low .. high, and how many do."""
    first = tl.maximum(start + low, 0) // OTHERS
    end = tl.maximum(tl.minimum(n_others, start + ROWS + high), 0)
    return first, tl.maximum(tl.cdiv(end, OTHERS) - first, 0)


@triton.jit
def query_steps(
    walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """How many key tiles a query tile meets at the distances walk[0] .. walk[1]."""
    _, m = own_tile(walk, pid, n_queries, C.BM)
    return 0, met(m, walk[0], walk[1], n_keys, C.BM, C.BN)[1]


@triton.jit
def query_place(
    walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """Row, head, first query and first key of the t-th tile."""
    bh, m = own_tile(walk, pid, n_queries, C.BM)
    first = met(m, walk[0], walk[1], n_keys, C.BM, C.BN)[0]
    return bh // n_heads, bh % n_heads, m, (first + t) * C.BN


@triton.jit
def key_steps(
    walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """How many query tiles a key tile meets at the distances walk[0] .. walk[1]."""
    _, n = own_tile(walk, pid, n_keys, C.BN)
    return 0, met(n, -walk[1], -walk[0], n_queries, C.BN, C.BM)[1]


@triton.jit
def key_place(
    walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE: tl.constexpr, C: tl.constexpr
):
    """Row, head, first query and first key of the t-th tile."""
    bh, n = own_tile(walk, pid, n_keys, C.BN)
    first = met(n, -walk[1], -walk[0], n_queries, C.BN, C.BM)[0]
    return bh // n_heads, bh % n_heads, (first + t) * C.BM, n


@triton.jit
def operand(
    base, batch_stride, head_stride, row_stride, n_batch, n_heads, n_rows,
    ROWS: tl.constexpr, SIZE: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What `load` needs of a tensor [n_batch, n_heads, n_rows, SIZE], read ROWS rows at a time."""
    batch_stride = tl.cast(batch_stride, tl.int64) * C.UNIT
    head_stride = tl.cast(head_stride, tl.int64) * C.UNIT
    row_stride = row_stride * C.UNIT
    if C.TMA:
        # A dimension of one entry has a stride of 0, which is never stepped along.
        batch_stride = tl.where(n_batch > 1, batch_stride, row_stride)
        head_stride = tl.where(n_heads > 1, head_stride, row_stride)
        first = tl.make_tensor_descriptor(
            base, [n_batch, n_heads, n_rows, SIZE], [batch_stride, head_stride, row_stride, 1],
            [1, 1, ROWS, W0],
        )  # fmt: skip
        if W1 > 0:
            second = tl.make_tensor_descriptor(
                base, [n_batch, n_heads, n_rows, SIZE], [batch_stride, head_stride, row_stride, 1],
                [1, 1, ROWS, W1],
            )  # fmt: skip
            return (first, second)
        else:
            return (first,)
    else:
        return (base, batch_stride, head_stride, row_stride, n_rows)


@triton.jit
def load(
    source, batch, head, start, ROWS: tl.constexpr, SIZE: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows start .. of a head: [ROWS, W0], [ROWS, W1], zero beyond the last and SIZE."""
    if C.TMA:
        at = [batch, tl.cast(head, tl.int32), start, 0]
        first = source[0].load(at).reshape(ROWS, W0)
        if W1 > 0:
            at = [batch, tl.cast(head, tl.int32), start, W0]
            return (first, source[1].load(at).reshape(ROWS, W1))
        else:
            return (first,)
    else:
        base, batch_stride, head_stride, row_stride, n_rows = source
        base += batch * batch_stride + head * head_stride
        return tiles.load((base, 0, row_stride, n_rows), 0, start, ROWS, SIZE, W0, W1, False, True)


@triton.jit
def sums_step(
    acc, queries, keys, values, douts, stats, n_rows, batch, head, m, n, mask, n_heads, group,
    n_queries, n_keys, to_log2, level, score, sources, drop,
    ROWS: tl.constexpr, SEEN: tl.constexpr, RUNS: tl.constexpr, ADDS: tl.constexpr,
    ADD: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the ds of the queries m .. m + BM and keys n .. n + BN of a head."""
    q = load(queries, batch, head, m, C.BM, C.D, C.D0, C.D1, C)
    k = load(keys, batch, head // group, n, C.BN, C.D, C.D0, C.D1, C)
    i = (m + tl.arange(0, C.BM))[:, None]
    j = (n + tl.arange(0, C.BN))[None, :]
    inside_i = tl.minimum(i, n_queries - 1) if MASKED else i
    inside_j = tl.minimum(j, n_keys - 1) if MASKED else j
    s = tiles.inner(q, k, C)  # [BM, BN]
    if not C.PLAIN:
        s, _ = scores.scores(s, inside_i, inside_j, m, n, head, level, score, sources, C, ADDS)
    bh = tl.cast(batch * n_heads + head, tl.int64)
    lse, delta = load_stats(stats, n_rows, bh, m, n_queries, C.BM, MASKED)
    p = tl.math.exp2(s * to_log2 - lse[:, None])
    if MASKED:
        lo, hi = ROWS(mask, batch, m + tl.arange(0, C.BM), n_queries, n_keys)
        seen = SEEN(lo[:, None], hi[:, None], i, j, mask, batch, head, n_queries, n_keys, RUNS)
        p = tl.where(seen, p, 0.0)
    do = load(douts, batch, head, m, C.BM, C.DV, C.V0, C.V1, C)
    v = load(values, batch, head // group, n, C.BN, C.DV, C.V0, C.V1, C)
    dp = tiles.inner(do, v, C)
    if C.Z > 0:
        dp = relative.add_value_products(dp, do, m, n, head, score, False, C)
    weights = p
    if C.DROPOUT:
        kept = dropout.kept(inside_i, inside_j, batch * n_heads + head, drop)
        dp = tl.where(kept, dp * drop[2], 0.0)
        weights = tl.where(kept, p * drop[2], 0.0)
    return ADD(acc, p, p * (dp - delta[:, None]), weights, do, m, n, head, score, C)


@kernel
def sums_kernel(
    Q, K, V, DO, STATS, OUT,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row,
    n_batch, n_heads, group, n_queries, n_keys, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, pointers,
    bias_batch, bias_head, bias_row, table_rows, table_row, first, last, origin,
    vectors, w_head, w_first, w_entries, u_head, u_first, u_entries, z_head, z_first, z_entries,
    seed, threshold, keep_scale,
    walk0, walk1, walk2, walk3,
    ROWS: tl.constexpr, SEEN: tl.constexpr, WHOLE: tl.constexpr, RUNS: tl.constexpr,
    OPENS: tl.constexpr, ADDS: tl.constexpr, FIXED: tl.constexpr, CODE: tl.constexpr,
    STEPS: tl.constexpr, PLACE: tl.constexpr, START: tl.constexpr, ADD: tl.constexpr,
    FINISH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One sum of the ds of several tiles."""
    mask = (left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
            tiles_of, tiles_batch, tiles_head)  # fmt: skip
    walk = (walk0, walk1, walk2, walk3)
    drop = (seed, threshold, keep_scale)
    pid = tl.program_id(0)
    whole, steps = STEPS(walk, pid, mask, n_batch, n_heads, n_queries, n_keys, WHOLE, C)
    b, h, m, n = PLACE(walk, pid, 0, mask, n_batch, n_heads, n_queries, n_keys, WHOLE, C)
    score = (factor, cap, b, n_batch, n_heads, n_queries, n_keys, bias_batch, bias_head,
             bias_row, table_rows, table_row, first, last, origin,
             (vectors, w_head, w_first, w_entries, u_head, u_first, u_entries,
              z_head, z_first, z_entries))  # fmt: skip
    sources = scores.opened(score, h, m, pointers, OPENS, C.BM, C.BN)
    level = None
    if FIXED is not None:
        level = tiles.zeros(C.BM, C.BN, 0)[0]
        i = tl.minimum(tl.maximum(m, 0) + tl.arange(0, C.BM), n_queries - 1)[:, None]
        j = tl.minimum(tl.maximum(n, 0) + tl.arange(0, C.BN), n_keys - 1)[None, :]
        level = FIXED[0](level, i, j, m, n, h, score, sources[FIXED[1]])
    n_rows = tl.cast(n_batch * n_heads, tl.int64) * n_queries
    kv_heads = n_heads // group
    queries = operand(
        Q, q_batch, q_head, q_row, n_batch, n_heads, n_queries, C.BM, C.D, C.D0, C.D1, C
    )
    keys = operand(K, k_batch, k_head, k_row, n_batch, kv_heads, n_keys, C.BN, C.D, C.D0, C.D1, C)
    values = operand(
        V, v_batch, v_head, v_row, n_batch, kv_heads, n_keys, C.BN, C.DV, C.V0, C.V1, C
    )
    douts = operand(
        DO, do_batch, do_head, do_row, n_batch, n_heads, n_queries, C.BM, C.DV, C.V0, C.V1, C
    )
    acc = START(C)
    for t in tl.range(0, whole):
        b, h, m, n = PLACE(walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE, C)
        score = scores.of_row(score, b)
        acc = sums_step(
            acc, queries, keys, values, douts, STATS, n_rows, b, h, m, n, mask, n_heads, group,
            n_queries, n_keys, to_log2, level, score, sources, drop,
            ROWS, SEEN, RUNS, ADDS, ADD, C, False,
        )  # fmt: skip
    for t in tl.range(whole, steps):
        b, h, m, n = PLACE(walk, pid, t, mask, n_batch, n_heads, n_queries, n_keys, WHOLE, C)
        score = scores.of_row(score, b)
        acc = sums_step(
            acc, queries, keys, values, douts, STATS, n_rows, b, h, m, n, mask, n_heads, group,
            n_queries, n_keys, to_log2, level, score, sources, drop,
            ROWS, SEEN, RUNS, ADDS, ADD, C, True,
        )  # fmt: skip
    FINISH(walk, pid, acc, OUT, n_queries, n_keys, C)


def sum_ds(shared: Shared, out: Tensor, walk: Walk) -> None:
    """Launches `sums_kernel` on one walk."""
    call, added, inputs, strides, stats, steps = shared
    tile, fixed = call.tuned("sums")
    steps.launch(
        sums_kernel,
        walk.n_programs,
        tile,
        *(*inputs, stats, out),
        *strides,
        *(*call.sizes, call.to_log2),
        *call.mask.arguments(),
        *(*call.cap, added.straight.pointers, *added.numbers, *call.drop),
        *walk.numbers,
        *(call.mask.rows, call.mask.seen, call.mask.whole, call.mask.has_runs),
        *added.straight.without(walk.fixed),
        *(walk.steps, walk.place, walk.start, walk.add, walk.finish, fixed),
    )
