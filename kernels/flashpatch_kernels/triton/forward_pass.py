"""Forward: softmax(scores) v, a tile of queries at a time over tiles of keys.

For each tile of keys, in base 2:
    s = (cap(q k^T * scale) + terms) * log2(e)    m' = max(m, rowmax(s))
    p = 2^(s - m')                                l  = 2^(m - m') l + rowsum(p)
    o = 2^(m - m') o + dropout(p) v               m  = m'
and at the end o / l and lse = ln(2) (m + log2(l)), a natural logarithm. A sink is a key of its own
logit and no value: m and l begin with it.

Letters: B batch, H query heads, N queries, M keys, D head size of q and k, Dv of v; a program owns
BM queries of one head and reads BN keys at a time.

Source: Dao, FlashAttention-2 (2023), Algorithm 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import (
    dropout,
    launching,
    memory,
    plans,
    relative,
    scores,
    setups,
    table,
    terms,
    tile_lists,
    tile_masks,
    tiles,
)
from flashpatch_kernels.triton.compiling import kernel

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_step(
    m, l, acc, q, keys, values, start, i, n, lo, hi, mask, batch, head, n_heads, n_queries, n_keys,
    to_log2, level, score, sources, drop,
    SEEN: tl.constexpr, RUNS: tl.constexpr, ADDS: tl.constexpr, C: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys n .. n + BN into account."""
    k = tiles.load(keys, 0, n, C.BN, C.D, C.D0, C.D1, C.TMA, MASKED)
    s = tiles.inner(q, k, C)  # [BM, BN]
    i = i[:, None]
    j = (n + tl.arange(0, C.BN))[None, :]
    inside = tl.minimum(j, n_keys - 1) if MASKED else j
    if not C.PLAIN:
        s, _ = scores.scores(s, i, inside, start, n, head, level, score, sources, C, ADDS)
    if MASKED:
        seen = SEEN(lo[:, None], hi[:, None], i, j, mask, batch, head, n_queries, n_keys, RUNS)
        s = tl.where(seen, s, float("-inf"))
    p, m, l, alpha = tiles.softmax_step(s, m, l, to_log2)
    if C.DROPOUT:
        p = tl.where(dropout.kept(i, j, batch * n_heads + head, drop), p, 0.0)
    v = tiles.load(values, 0, n, C.BN, C.DV, C.V0, C.V1, C.TMA, MASKED)
    acc = tiles.add_product(tiles.scaled(acc, alpha[:, None]), p, v, C)
    if C.Z > 0:
        acc = relative.add_values(acc, p, start, n, head, score, C)
    return m, l, acc


@kernel
def forward_kernel(
    Q, K, V, O, LSE,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    n_batch, n_heads, group, n_queries, n_keys, wave, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, sinks, pointers,
    bias_batch, bias_head, bias_row, table_rows, table_row, first, last, origin,
    vectors, w_head, w_first, w_entries, u_head, u_first, u_entries, z_head, z_first, z_entries,
    seed, threshold, keep_scale,
    ROWS: tl.constexpr, SEEN: tl.constexpr, KEYS: tl.constexpr, AT: tl.constexpr,
    RUNS: tl.constexpr, OPENS: tl.constexpr, ADDS: tl.constexpr, FAR_ADDS: tl.constexpr,
    CODE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Strides come in units of C.UNIT elements, so that alignment is known."""
    mask = (left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
            tiles_of, tiles_batch, tiles_head)  # fmt: skip
    tile, bh = tiles.place(
        tl.program_id(0), tl.cdiv(n_queries, C.BM), n_batch * n_heads, wave, DESCENDING=True
    )
    batch = bh // n_heads
    b = tl.cast(batch, tl.int64)
    h = tl.cast(bh % n_heads, tl.int64)
    start = tile * C.BM
    score = (factor, cap, batch, n_batch, n_heads, n_queries, n_keys, bias_batch, bias_head,
             bias_row, table_rows, table_row, first, last, origin,
             (vectors, w_head, w_first, w_entries, u_head, u_first, u_entries,
              z_head, z_first, z_entries))  # fmt: skip
    sources = scores.opened(score, h, start, pointers, OPENS, C.BM, C.BN)
    drop = (seed, threshold, keep_scale)
    t0, t1, t2, t3 = KEYS(mask, batch, h, start, n_queries, n_keys, C.BM, C.BN, RUNS)

    Q += (b * q_batch + h * q_head) * C.UNIT
    K += (b * k_batch + h // group * k_head) * C.UNIT
    V += (b * v_batch + h // group * v_head) * C.UNIT
    O += (b * o_batch + h * o_head) * C.UNIT
    k_row = k_row * C.UNIT
    v_row = v_row * C.UNIT
    q_row = q_row * C.UNIT
    queries = tiles.matrices(Q, q_row, q_row, 1, n_queries, C.BM, C.D, C.D0, C.D1, C.TMA)
    keys = tiles.matrices(K, k_row, k_row, 1, n_keys, C.BN, C.D, C.D0, C.D1, C.TMA)
    values = tiles.matrices(V, v_row, v_row, 1, n_keys, C.BN, C.DV, C.V0, C.V1, C.TMA)

    q = tiles.load(queries, 0, start, C.BM, C.D, C.D0, C.D1, C.TMA, True)
    m, l = tiles.softmax_start(sinks, h, C.BM)
    acc = tiles.zeros(C.BM, C.V0, C.V1)
    i = start + tl.arange(0, C.BM)
    inside = tl.minimum(i, n_queries - 1)
    n_tiles = tl.cdiv(n_keys, C.BN)
    # Whole tiles first, of which no element is tested; under a table that is constant beyond its
    # ends, those there alone.
    whole = t2 - t1
    if C.FAR:
        a, b = tile_masks.near_keys(first, last, start, t1, t2, C.BM, C.BN)
        whole -= b - a
        low, high = table.levels(score, pointers[0][0], h)
    for t in tl.range(0, whole):
        if C.FAR:
            level = tl.where(t < a - t1, low, high)
            number = tile_masks.far_tile(t, t1, a, b)
        else:
            level, number = None, t1 + t
        n = AT(mask, batch, h, tile, number, n_tiles) * C.BN
        m, l, acc = forward_step(
            m, l, acc, q, keys, values, start, inside, n, None, None, mask, batch, h, n_heads,
            n_queries, n_keys, to_log2, level, score, sources, drop, SEEN, RUNS, FAR_ADDS, C, False,
        )  # fmt: skip
    lo, hi = ROWS(mask, batch, i, n_queries, n_keys)
    for t in tl.range(0, t3 - t0 - whole, num_stages=C.NEAR_STAGES):
        if C.FAR:
            number = tile_masks.near_tile(t, t0, t1, a, b, t2)
        else:
            number = tile_masks.edge_tile(t, t0, t1, t2)
        n = AT(mask, batch, h, tile, number, n_tiles) * C.BN
        m, l, acc = forward_step(
            m, l, acc, q, keys, values, start, inside, n, lo, hi, mask, batch, h, n_heads,
            n_queries, n_keys, to_log2, None, score, sources, drop, SEEN, RUNS, ADDS, C, True,
        )  # fmt: skip

    # A row that sees no key has l = 0: it gives 0 and -inf.
    inverse = tl.where(l > 0, 1.0 / l, 0.0)
    if C.DROPOUT:
        inverse = inverse * keep_scale
    lse = (m + tl.math.log2(l)) * LN2
    tl.store(LSE + tl.cast(bh, tl.int64) * n_queries + i, lse, mask=i < n_queries)
    o = tiles.scaled(acc, inverse[:, None])
    tiles.store(O, o_row * C.UNIT, start, n_queries, o, C.BM, C.DV, C.V0, C.V1)


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """softmax(cap(q k^T * scale) + terms) v and the natural logarithm of the softmax's sums.

    Returns:
        Output (B, H, N, Dv), laid out as (B, N, H, Dv), and lse, fp32 (B, H, N).
    """
    plan, (q, k, v), given = plans.plan_of(forward_kernel, (q, k, v), (), options)
    with launching.on(q.device):
        known = plan.again(*given)
        if known is not None:
            return known[0], known[1]
        steps = plan.steps(*given)
        out, lse = (steps.own(memory.empty(*x, q.device)) for x in setups.output_layouts(q, v))
        if lse.numel() == 0:
            return out, lse
        if k.shape[2] == 0:
            return out.zero_(), lse.fill_(float("-inf"))
        call = setups.Setup.of(q, k, v, (out,), options)
        tile, fixed = call.tuned("forward")
        n_batch, n_heads, group, n_queries, n_keys = call.sizes
        n_tiles = setups.cdiv(n_queries, tile.BM)
        added = terms.terms_of(call, steps, both=False)
        steps.launch(
            forward_kernel,
            n_tiles * n_batch * n_heads,
            tile,
            *(q, k, v, out, lse),
            *call.strides(q, k, v, out),
            *call.sizes,
            call.wave(n_tiles, n_keys, group),
            call.to_log2,
            *call.mask.arguments(tile_lists.key_lists(call.mask, tile, n_queries, n_keys)),
            *(*call.cap, options.sinks, added.straight.pointers, *added.numbers, *call.drop),
            *(call.mask.rows, call.mask.seen, call.mask.keys, call.mask.at, call.mask.has_runs),
            *(*added.straight.functions, fixed),
        )
        plan.keep(steps, out, lse)
    return out, lse
