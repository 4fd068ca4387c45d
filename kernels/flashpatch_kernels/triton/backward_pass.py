"""Backward kernels: the gradients of q, k and v from that of the output, in two launches.

With p = 2^(s - lse) of the forward's scores s, and delta = rowsum(dO * O) - dlse:
    dv = dropout(p)^T dO    dp = dropout(dO v^T)    ds = p * (dp - delta)
    dq = ds k * scale       dk = ds^T q * scale     where a cap makes ds ds * (1 - tanh^2)
The terms of a score are given ds itself, in `term_gradients`. p is computed anew, tile by tile.
`dq_kernel` owns a tile of queries and walks over keys; it runs first and keeps delta and lse, see
`stats`, for `dkdv_kernel`, which owns a tile of keys and walks over queries. Each sum is taken by
one program in a fixed order, hence no atomics and the same bits every time.

Letters: B batch, H query heads, N queries, M keys, D head size of q and k, Dv of v; tiles of BM
queries and BN keys.

Source: Dao, FlashAttention-2 (2023), Algorithm 2, with the loop over dq in a kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels import tuning
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import (
    dropout,
    launching,
    plans,
    relative,
    scores,
    setups,
    slopes,
    table,
    terms,
    tile_lists,
    tile_masks,
    tiles,
)
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.relative_gradients import relative_gradients
from flashpatch_kernels.triton.row_sums import exact
from flashpatch_kernels.triton.stats import Shared, compute_stats, load_stats, make_stats
from flashpatch_kernels.triton.term_gradients import term_gradients


@triton.jit
def dkdv_step(
    dk, dv, k, v, queries, douts, stats, n_rows, head, first_head, n_heads, m, n, mask, batch,
    n_queries, n_keys, to_log2, level, score, sources, drop,
    ROWS: tl.constexpr, SEEN: tl.constexpr, PART: tl.constexpr, ADDS: tl.constexpr,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the queries m .. m + BM of one head give to the keys n .. n + BN."""
    q = tiles.load(queries, head, m, C.BM, C.D, C.D0, C.D1, C.TMA, MASKED)
    do = tiles.load(douts, head, m, C.BM, C.DV, C.V0, C.V1, C.TMA, MASKED)
    lse, delta = load_stats(stats, n_rows, head, m, n_queries, C.BM, MASKED)
    st = tiles.inner(k, q, C)  # [BN, BM]
    if PART != "dv":
        dpt = tiles.inner(v, do, C)  # [BN, BM]
    i = m + tl.arange(0, C.BM)
    j = (n + tl.arange(0, C.BN))[:, None]
    inside = (tl.minimum(i, n_queries - 1) if MASKED else i)[None, :]
    h = first_head + head
    if not C.PLAIN:
        at = tl.minimum(j, n_keys - 1)
        st, t = scores.scores(st, inside, at, m, n, h, level, score, sources, C, ADDS)
    pt = tl.math.exp2(st * to_log2 - lse[None, :])
    if MASKED:
        lo, hi = ROWS(mask, batch, i, n_queries, n_keys)
        # Keys hidden from everybody get their gradients' zeros at the end.
        i = i[None, :]
        seen = SEEN(lo[None, :], hi[None, :], i, j, mask, batch, h, n_queries, n_keys, False)
        pt = tl.where(seen, pt, 0.0)
    if C.Z > 0 and PART != "dv":
        dpt = relative.add_value_products(dpt, do, m, n, h, score, True, C)
    if C.DROPOUT:
        kept = dropout.kept(inside, j, batch * n_heads + h, drop)
    if PART != "dk":
        if C.DROPOUT:
            dv = tiles.add_product(dv, tl.where(kept, pt, 0.0), do, C)
        else:
            dv = tiles.add_product(dv, pt, do, C)
    if PART != "dv":
        if C.DROPOUT:
            dpt = tl.where(kept, dpt * drop[2], 0.0)
        dst = pt * (dpt - delta[None, :])
        if not C.PLAIN:
            dst = scores.product_gradient(dst, t, inside, at, h, score, sources, C, ADDS)
        dk = tiles.add_product(dk, dst, q, C)
    return dk, dv


@kernel
def dkdv_kernel(
    Q, K, V, DO, STATS, DK, DV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    n_batch, n_heads, group, n_queries, n_keys, wave, scale, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, pointers,
    bias_batch, bias_head, bias_row, table_rows, table_row, first, last, origin,
    vectors, w_head, w_first, w_entries, u_head, u_first, u_entries, z_head, z_first, z_entries,
    seed, threshold, keep_scale,
    ROWS: tl.constexpr, SEEN: tl.constexpr, QUERIES: tl.constexpr, AT: tl.constexpr,
    RUNS: tl.constexpr, GROUPED: tl.constexpr,
    PART: tl.constexpr, OPENS: tl.constexpr, ADDS: tl.constexpr, FAR_ADDS: tl.constexpr,
    CODE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head, over the query heads that share it and their queries.

    PART is "dkdv", or "dk" or "dv" to compute one alone: both together need too many registers for
    large head sizes.
    """
    mask = (left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
            tiles_of, tiles_batch, tiles_head)  # fmt: skip
    kv_heads = n_heads // group
    tile, bg = tiles.place(
        tl.program_id(0), tl.cdiv(n_keys, C.BN), n_batch * kv_heads, wave, DESCENDING=False
    )
    batch = bg // kv_heads
    b = tl.cast(batch, tl.int64)
    g = tl.cast(bg % kv_heads, tl.int64)
    h = g * group
    n = tile * C.BN
    score = (factor, cap, batch, n_batch, n_heads, n_queries, n_keys, bias_batch, bias_head,
             bias_row, table_rows, table_row, first, last, origin,
             (vectors, w_head, w_first, w_entries, u_head, u_first, u_entries,
              z_head, z_first, z_entries))  # fmt: skip
    sources = scores.opened(score, h, n, pointers, OPENS, C.BN, C.BM)
    drop = (seed, threshold, keep_scale)
    t0, t1, t2, t3 = QUERIES(mask, batch, g, n, n_queries, n_keys, C.BM, C.BN)

    Q += (b * q_batch + h * q_head) * C.UNIT
    K += (b * k_batch + g * k_head) * C.UNIT
    V += (b * v_batch + g * v_head) * C.UNIT
    DO += (b * do_batch + h * do_head) * C.UNIT
    STATS += (b * n_heads + h) * n_queries
    n_rows = tl.cast(n_batch * n_heads, tl.int64) * n_queries
    q_head, q_row = q_head * C.UNIT, q_row * C.UNIT
    do_head, do_row = do_head * C.UNIT, do_row * C.UNIT
    queries = tiles.matrices(Q, q_head, q_row, group, n_queries, C.BM, C.D, C.D0, C.D1, C.TMA)
    douts = tiles.matrices(DO, do_head, do_row, group, n_queries, C.BM, C.DV, C.V0, C.V1, C.TMA)
    keys = tiles.matrices(K, 0, k_row * C.UNIT, 1, n_keys, C.BN, C.D, C.D0, C.D1, False)
    values = tiles.matrices(V, 0, v_row * C.UNIT, 1, n_keys, C.BN, C.DV, C.V0, C.V1, False)

    k = tiles.load(keys, 0, n, C.BN, C.D, C.D0, C.D1, False, True)
    v = k
    if PART != "dv":
        v = tiles.load(values, 0, n, C.BN, C.DV, C.V0, C.V1, False, True)
    dk = tiles.zeros(C.BN, C.D0, C.D1)
    dv = tiles.zeros(C.BN, C.V0, C.V1)
    # One loop over (head, tile) pairs: a group of heads costs no second loop.
    n_tiles = tl.cdiv(n_queries, C.BM)
    whole = t2 - t1
    if C.FAR:
        a, z = tile_masks.near_queries(first, last, n, t1, t2, C.BM, C.BN)
        whole -= z - a
    part = t3 - t0 - whole
    for t in tl.range(0, whole * group if GROUPED else whole):
        head = t // whole if GROUPED else 0
        x = t % whole if GROUPED else t
        if C.FAR:
            low, high = table.levels(score, pointers[0][0], h + head)
            level = tl.where(x < a - t1, high, low)
            number = tile_masks.far_tile(x, t1, a, z)
        else:
            level, number = None, t1 + x
        m = AT(mask, batch, g, tile, number, n_tiles) * C.BM
        dk, dv = dkdv_step(
            dk, dv, k, v, queries, douts, STATS, n_rows, head, h, n_heads, m, n, mask, batch,
            n_queries, n_keys, to_log2, level, score, sources, drop,
            ROWS, SEEN, PART, FAR_ADDS, C, False,
        )  # fmt: skip
    for t in tl.range(0, part * group if GROUPED else part, num_stages=C.NEAR_STAGES):
        head = t // part if GROUPED else 0
        x = t % part if GROUPED else t
        if C.FAR:
            number = tile_masks.near_tile(x, t0, t1, a, z, t2)
        else:
            number = tile_masks.edge_tile(x, t0, t1, t2)
        m = AT(mask, batch, g, tile, number, n_tiles) * C.BM
        dk, dv = dkdv_step(
            dk, dv, k, v, queries, douts, STATS, n_rows, head, h, n_heads, m, n, mask, batch,
            n_queries, n_keys, to_log2, None, score, sources, drop,
            ROWS, SEEN, PART, ADDS, C, True,
        )  # fmt: skip

    # Nobody sees a hidden key, though no tile tested it.
    if RUNS:
        shown = ~tile_masks.hidden(mask, batch, n + tl.arange(0, C.BN), n_keys)[:, None]
        dk = tiles.kept(dk, shown)
        dv = tiles.kept(dv, shown)
    if PART != "dv":
        DK += (b * dk_batch + g * dk_head) * C.UNIT
        dk = tiles.scaled(dk, scale)
        tiles.store(DK, dk_row * C.UNIT, n, n_keys, dk, C.BN, C.D, C.D0, C.D1)
    if PART != "dk":
        if C.DROPOUT:
            dv = tiles.scaled(dv, keep_scale)
        DV += (b * dv_batch + g * dv_head) * C.UNIT
        tiles.store(DV, dv_row * C.UNIT, n, n_keys, dv, C.BN, C.DV, C.V0, C.V1)


@triton.jit
def dq_step(
    dq, sums, q, do, lse, delta, keys, values, start, i, n, lo, hi, mask, batch, head, n_heads,
    n_queries, n_keys, to_log2, level, far_below, score, sources, drop,
    SEEN: tl.constexpr, RUNS: tl.constexpr, ADDS: tl.constexpr,
    SLOPES: tl.constexpr, ENDS: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the keys n .. n + BN give, to dq and to the row sums of ds that terms want."""
    k = tiles.load(keys, 0, n, C.BN, C.D, C.D0, C.D1, C.TMA, MASKED)
    s = tiles.inner(q, k, C)  # [BM, BN]
    i = i[:, None]
    j = (n + tl.arange(0, C.BN))[None, :]
    inside = tl.minimum(j, n_keys - 1) if MASKED else j
    if not C.PLAIN:
        s, t = scores.scores(s, i, inside, start, n, head, level, score, sources, C, ADDS)
    p = tl.math.exp2(s * to_log2 - lse[:, None])
    if MASKED:
        seen = SEEN(lo[:, None], hi[:, None], i, j, mask, batch, head, n_queries, n_keys, RUNS)
        p = tl.where(seen, p, 0.0)
    v = tiles.load(values, 0, n, C.BN, C.DV, C.V0, C.V1, C.TMA, MASKED)
    dp = tiles.inner(do, v, C)  # [BM, BN]
    if C.Z > 0:
        dp = relative.add_value_products(dp, do, start, n, head, score, False, C)
    if C.DROPOUT:
        kept = dropout.kept(i, j, batch * n_heads + head, drop)
        dp = tl.where(kept, dp * drop[2], 0.0)
    ds = p * (dp - delta[:, None])
    mean, sloped, product, below, above = sums
    if SLOPES:
        away = slopes.away(i, inside, score)
        if q[0].dtype == tl.float32:
            product += tl.sum(ds * away, 1)
        else:
            mean += tl.sum(p * dp, 1)
            sloped += tl.sum(p * away, 1)
            product += tl.sum(p * dp * away, 1)
    if ENDS:
        if level is not None:
            row = tl.sum(ds, 1)
            below += tl.where(far_below, row, 0.0)
            above += tl.where(far_below, 0.0, row)
        else:
            below += tl.sum(tl.where(inside - i <= score[12], ds, 0.0), 1)
            above += tl.sum(
                tl.where(inside - i >= tl.maximum(score[13], score[12] + 1), ds, 0.0), 1
            )
    if not C.PLAIN:
        ds = scores.product_gradient(ds, t, i, inside, head, score, sources, C, ADDS)
    return tiles.add_product(dq, ds, k, C), (mean, sloped, product, below, above)


@kernel
def dq_kernel(
    Q, K, V, DO, O, LSE, DLSE, STATS, DQ, SUMS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, o_batch, o_head, o_row, dq_batch, dq_head, dq_row,
    n_batch, n_heads, group, n_queries, n_keys, wave, scale, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, pointers,
    bias_batch, bias_head, bias_row, table_rows, table_row, first, last, origin,
    vectors, w_head, w_first, w_entries, u_head, u_first, u_entries, z_head, z_first, z_entries,
    seed, threshold, keep_scale,
    ROWS: tl.constexpr, SEEN: tl.constexpr, KEYS: tl.constexpr, AT: tl.constexpr,
    RUNS: tl.constexpr, SLOPES: tl.constexpr, ENDS: tl.constexpr,
    OPENS: tl.constexpr, ADDS: tl.constexpr, FAR_ADDS: tl.constexpr,
    CODE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, over the keys that it sees.

    STATS is made here of O and LSE if they are given, and read if not.

    What terms want to know of ds goes to SUMS [3, B, H, query tiles]: with SLOPES the sum of -ds
    times the distance; with ENDS the sums beyond the first and the last distance of a table. For
    slopes delta is summed anew beside half precision: that of the output is as exact as the output,
    and large distances would make much of its error. For float32 `row_sums` has done so.
    """
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
    DO += (b * do_batch + h * do_head) * C.UNIT
    k_row, v_row = k_row * C.UNIT, v_row * C.UNIT
    queries = tiles.matrices(Q, 0, q_row * C.UNIT, 1, n_queries, C.BM, C.D, C.D0, C.D1, False)
    douts = tiles.matrices(DO, 0, do_row * C.UNIT, 1, n_queries, C.BM, C.DV, C.V0, C.V1, False)
    keys = tiles.matrices(K, k_row, k_row, 1, n_keys, C.BN, C.D, C.D0, C.D1, C.TMA)
    values = tiles.matrices(V, v_row, v_row, 1, n_keys, C.BN, C.DV, C.V0, C.V1, C.TMA)

    q = tiles.load(queries, 0, start, C.BM, C.D, C.D0, C.D1, False, True)
    do = tiles.load(douts, 0, start, C.BM, C.DV, C.V0, C.V1, False, True)
    n_rows = tl.cast(n_batch * n_heads, tl.int64) * n_queries
    if O is not None:
        O += (b * o_batch + h * o_head) * C.UNIT
        outs = tiles.matrices(O, 0, o_row * C.UNIT, 1, n_queries, C.BM, C.DV, C.V0, C.V1, False)
        lse, delta = make_stats(outs, do, LSE, DLSE, STATS, n_rows, bh, start, n_queries, C)
    else:
        lse, delta = load_stats(STATS, n_rows, bh, start, n_queries, C.BM, True)
    dq = tiles.zeros(C.BM, C.D0, C.D1)
    i = start + tl.arange(0, C.BM)
    inside = tl.minimum(i, n_queries - 1)
    n_tiles = tl.cdiv(n_keys, C.BN)
    zero = tiles.column(C.BM)
    sums = (zero, zero, zero, zero, zero)
    whole = t2 - t1
    if C.FAR:
        a, z = tile_masks.near_keys(first, last, start, t1, t2, C.BM, C.BN)
        whole -= z - a
        low, high = table.levels(score, pointers[0][0], h)
    for t in tl.range(0, whole):
        if C.FAR:
            far_below = t < a - t1
            level = tl.where(far_below, low, high)
            number = tile_masks.far_tile(t, t1, a, z)
        else:
            far_below, level, number = None, None, t1 + t
        n = AT(mask, batch, h, tile, number, n_tiles) * C.BN
        dq, sums = dq_step(
            dq, sums, q, do, lse, delta, keys, values, start, inside, n, None, None, mask, batch, h,
            n_heads, n_queries, n_keys, to_log2, level, far_below, score, sources, drop,
            SEEN, RUNS, FAR_ADDS, SLOPES, ENDS, C, False,
        )  # fmt: skip
    lo, hi = ROWS(mask, batch, i, n_queries, n_keys)
    for t in tl.range(0, t3 - t0 - whole, num_stages=C.NEAR_STAGES):
        if C.FAR:
            number = tile_masks.near_tile(t, t0, t1, a, z, t2)
        else:
            number = tile_masks.edge_tile(t, t0, t1, t2)
        n = AT(mask, batch, h, tile, number, n_tiles) * C.BN
        dq, sums = dq_step(
            dq, sums, q, do, lse, delta, keys, values, start, inside, n, lo, hi, mask, batch, h,
            n_heads, n_queries, n_keys, to_log2, None, False, score, sources, drop,
            SEEN, RUNS, ADDS, SLOPES, ENDS, C, True,
        )  # fmt: skip
    if SLOPES or ENDS:
        mean, sloped, product, below, above = sums
        at = tl.cast(bh, tl.int64) * n_queries + inside
        if DLSE is not None:
            mean -= tl.load(DLSE + at)
        if q[0].dtype == tl.float32:
            factor = tl.load(STATS + 2 * n_rows + at)
            product, below, above = product * factor, below * factor, above * factor
        n_row_tiles = tl.cdiv(n_queries, C.BM)
        at = SUMS + (tl.cast(bh, tl.int64) * n_row_tiles + tile)
        stride = tl.cast(n_batch * n_heads, tl.int64) * n_row_tiles
        tl.store(at, tl.sum(mean * sloped - product))
        tl.store(at + stride, tl.sum(below))
        tl.store(at + 2 * stride, tl.sum(above))
    if DQ is not None:
        DQ += (b * dq_batch + h * dq_head) * C.UNIT
        dq = tiles.scaled(dq, scale)
        tiles.store(DQ, dq_row * C.UNIT, start, n_queries, dq, C.BM, C.D, C.D0, C.D1)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients that `needs` names, those of q, k and v laid out as these."""
    if lse.numel() == 0 or k.shape[2] == 0:
        tensors = {"q": q, "k": k, "v": v, **options.terms}
        return {name: torch.zeros_like(t) for name, t in tensors.items() if name in needs}
    asked = (q, k, v)
    plan, (q, k, v, dout, out), given = plans.plan_of(
        dq_kernel, (*asked, dout, out), (lse, dlse), options, needs
    )
    with launching.on(q.device):
        known = plan.again(*given)
        if known is not None:
            return dict(zip(sorted(needs), known, strict=True))
        inputs = (q, k, v, dout)
        steps = plan.steps(*given)
        grads = {
            name: steps.own(torch.empty_like(x))
            for name, x in zip("qkv", asked, strict=True)
            if name in needs
        }
        written = {name: writable(grad) for name, grad in grads.items()}
        call = setups.Setup.of(q, k, v, (out, dout, *written.values()), options)
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        stats = steps.own(lse.new_empty(2, *lse.shape))
        added = terms.terms_of(call, steps, both=True)
        shared = Shared(call, added, inputs, call.strides(*inputs), stats, steps)
        queries = "q" in needs or "slopes" in needs or ("table" in needs and call.clamped)
        rounded = q.dtype == torch.float32 and bool(needs - {"q", "k", "v"})
        saved = (out, lse)
        if rounded or not queries:
            compute_stats(shared, *saved, dlse)
            saved = None
        if rounded:
            shared = exact(shared, dlse)
        sums = compute_dq(shared, saved, dlse, written.get("q"), needs) if queries else None
        for name in call.key_passes(needs):
            compute_dkdv(shared, name, written.get("k"), written.get("v"))
        found = term_gradients(shared, sums, needs) | relative_gradients(shared, needs)
        for name, grad in grads.items():
            if written[name] is not grad:
                grad.copy_(written[name])
        found = {name: (grads | found)[name] for name in sorted(needs)}
        plan.keep(steps, *found.values())
    return found


def writable(grad: Tensor) -> Tensor:
    """The tensor, or one like it with contiguous rows."""
    contiguous = torch.contiguous_format
    return grad if grad.stride(-1) == 1 else torch.empty_like(grad, memory_format=contiguous)


def compute_dkdv(shared: Shared, name: tuning.Pass, dk: Tensor | None, dv: Tensor | None) -> None:
    """Writes dk and dv, or one of them, from q, k, v and dout."""
    call, added, inputs, strides, stats, steps = shared
    n_batch, n_heads, group, n_queries, n_keys = call.sizes
    tile, fixed = call.tuned(name)
    # What a pass does not write it does not touch: any tensor may stand in for it.
    dk = inputs[1] if dk is None else dk
    dv = inputs[2] if dv is None else dv
    lists = tile_lists.query_lists(steps, call.mask, tile, group, n_queries, n_keys)
    n_tiles = setups.cdiv(n_keys, tile.BN)
    steps.launch(
        dkdv_kernel,
        n_tiles * n_batch * (n_heads // group),
        tile,
        *(*inputs, stats, dk, dv),
        *(*strides, *call.strides(dk, dv)),
        *call.sizes,
        call.wave(n_tiles, n_queries * group, 1),
        *(float(call.options.scale), call.to_log2),
        *call.mask.arguments(lists),
        *(*call.cap, added.transposed.pointers, *added.numbers, *call.drop),
        *(call.mask.rows, call.mask.seen, call.mask.queries, call.mask.at, call.mask.has_runs),
        *(group > 1, name),
        *(*added.transposed.functions, fixed),
    )


def compute_dq(
    shared: Shared,
    saved: tuple[Tensor, Tensor] | None,
    dlse: Tensor | None,
    dq: Tensor | None,
    needs: frozenset[str],
) -> Tensor | None:
    """Writes dq from q, k, v and dout, and gives the sums of ds that terms want of it.

    Args:
        saved: The output and lse, of which it makes `shared.stats`; None where that is done.

    Returns:
        fp32 [3, B, H, query tiles], as `dq_kernel` says; None if no term wants any.
    """
    call, added, inputs, strides, stats, steps = shared
    n_batch, n_heads, group, n_queries, n_keys = call.sizes
    tile, fixed = call.tuned("dq")
    out, lse = (None, None) if saved is None else saved
    n_tiles = setups.cdiv(n_queries, tile.BM)
    of_slopes, of_ends = "slopes" in needs, "table" in needs and call.clamped
    sums = None
    if of_slopes or of_ends:
        sums = steps.own(stats.new_empty(3, n_batch, n_heads, n_tiles))
    steps.launch(
        dq_kernel,
        n_tiles * n_batch * n_heads,
        tile,
        *(*inputs, out, lse, dlse, stats, dq, sums),
        # What is not there has no strides: those of any tensor may stand in for them.
        *strides,
        *call.strides(inputs[3] if out is None else out, inputs[0] if dq is None else dq),
        *call.sizes,
        call.wave(n_tiles, n_keys, group),
        *(float(call.options.scale), call.to_log2),
        *call.mask.arguments(tile_lists.key_lists(call.mask, tile, n_queries, n_keys)),
        *(*call.cap, added.straight.pointers, *added.numbers, *call.drop),
        *(call.mask.rows, call.mask.seen, call.mask.keys, call.mask.at, call.mask.has_runs),
        *(of_slopes, of_ends),
        *(*added.straight.functions, fixed),
    )
    return sums
