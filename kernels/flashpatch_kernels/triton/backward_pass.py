"""Backward kernels: the gradients of q, k and v from that of the output, in three launches.

With p = 2^(s - lse) of the forward's scores s, and delta = rowsum(dO * O) - dlse:
    dv = dropout(p)^T dO    dp = dropout(dO v^T)    ds = p * (dp - delta)
    dq = ds k * scale       dk = ds^T q * scale     where a cap makes ds ds * (1 - tanh^2)
The terms of a score are given ds itself, in `term_gradients`. p is computed anew, tile by tile.
`stats` prepares delta and lse; `dkdv_kernel` owns a tile of keys and walks over queries;
`dq_kernel` owns a tile of queries and walks over keys. Each sum is taken by one program in a fixed
order, hence no atomics and the same bits every time.

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
    scores,
    terms,
    tile_lists,
    tile_masks,
    tiles,
)
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.stats import Shared, compute_stats, load_stats
from flashpatch_kernels.triton.term_gradients import term_gradients


@triton.jit
def dkdv_step(
    dk, dv, k, v, queries, douts, stats, n_rows, head, first_head, n_heads, m, n, mask, batch,
    n_queries, n_keys, to_log2, score, drop,
    ROWS: tl.constexpr, SEEN: tl.constexpr, PART: tl.constexpr, TERMS: tl.constexpr,
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
        st, tanh = scores.scores(st, inside, at, h, score, C, TERMS)
    pt = tl.math.exp2(st * to_log2 - lse[None, :])
    if MASKED:
        lo, hi = ROWS(mask, batch, i, n_queries, n_keys)
        # Keys hidden from everybody get their gradients' zeros at the end.
        i = i[None, :]
        seen = SEEN(lo[None, :], hi[None, :], i, j, mask, batch, h, n_queries, n_keys, False)
        pt = tl.where(seen, pt, 0.0)
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
        if C.CAP:
            dst = dst * (1 - tanh * tanh)
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
    factor, cap, terms, bias_batch, bias_head, bias_row, table_row, seed, threshold, keep_scale,
    ROWS: tl.constexpr, SEEN: tl.constexpr, QUERIES: tl.constexpr, AT: tl.constexpr,
    RUNS: tl.constexpr, GROUPED: tl.constexpr,
    PART: tl.constexpr, TERMS: tl.constexpr, CODE: tl.constexpr, C: tl.constexpr,
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
    score = (factor, cap, batch, n_queries, n_keys, terms,
             bias_batch, bias_head, bias_row, table_row)  # fmt: skip
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
    part = t1 - t0 + t3 - t2
    for t in tl.range(0, whole * group if GROUPED else whole):
        head = t // whole if GROUPED else 0
        number = t1 + (t % whole if GROUPED else t)
        m = AT(mask, batch, g, tile, number, n_tiles) * C.BM
        dk, dv = dkdv_step(
            dk, dv, k, v, queries, douts, STATS, n_rows, head, h, n_heads, m, n, mask, batch,
            n_queries, n_keys, to_log2, score, drop, ROWS, SEEN, PART, TERMS, C, False,
        )  # fmt: skip
    for t in tl.range(0, part * group if GROUPED else part):
        head = t // part if GROUPED else 0
        number = tile_masks.edge_tile(t % part if GROUPED else t, t0, t1, t2)
        m = AT(mask, batch, g, tile, number, n_tiles) * C.BM
        dk, dv = dkdv_step(
            dk, dv, k, v, queries, douts, STATS, n_rows, head, h, n_heads, m, n, mask, batch,
            n_queries, n_keys, to_log2, score, drop, ROWS, SEEN, PART, TERMS, C, True,
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
    dq, q, do, lse, delta, keys, values, i, n, lo, hi, mask, batch, head, n_heads, n_queries,
    n_keys, to_log2, score, drop,
    SEEN: tl.constexpr, RUNS: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the keys n .. n + BN give."""
    k = tiles.load(keys, 0, n, C.BN, C.D, C.D0, C.D1, C.TMA, MASKED)
    s = tiles.inner(q, k, C)  # [BM, BN]
    i = i[:, None]
    j = (n + tl.arange(0, C.BN))[None, :]
    inside = tl.minimum(j, n_keys - 1) if MASKED else j
    if not C.PLAIN:
        s, tanh = scores.scores(s, i, inside, head, score, C, TERMS)
    p = tl.math.exp2(s * to_log2 - lse[:, None])
    if MASKED:
        seen = SEEN(lo[:, None], hi[:, None], i, j, mask, batch, head, n_queries, n_keys, RUNS)
        p = tl.where(seen, p, 0.0)
    v = tiles.load(values, 0, n, C.BN, C.DV, C.V0, C.V1, C.TMA, MASKED)
    dp = tiles.inner(do, v, C)  # [BM, BN]
    if C.DROPOUT:
        kept = dropout.kept(i, j, batch * n_heads + head, drop)
        dp = tl.where(kept, dp * drop[2], 0.0)
    ds = p * (dp - delta[:, None])
    if C.CAP:
        ds = ds * (1 - tanh * tanh)
    return tiles.add_product(dq, ds, k, C)


@kernel
def dq_kernel(
    Q, K, V, DO, STATS, DQ,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dq_batch, dq_head, dq_row,
    n_batch, n_heads, group, n_queries, n_keys, wave, scale, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, terms, bias_batch, bias_head, bias_row, table_row, seed, threshold, keep_scale,
    ROWS: tl.constexpr, SEEN: tl.constexpr, KEYS: tl.constexpr, AT: tl.constexpr,
    RUNS: tl.constexpr, TERMS: tl.constexpr,
    CODE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, over the keys that it sees."""
    mask = (left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
            tiles_of, tiles_batch, tiles_head)  # fmt: skip
    tile, bh = tiles.place(
        tl.program_id(0), tl.cdiv(n_queries, C.BM), n_batch * n_heads, wave, DESCENDING=True
    )
    batch = bh // n_heads
    b = tl.cast(batch, tl.int64)
    h = tl.cast(bh % n_heads, tl.int64)
    start = tile * C.BM
    score = (factor, cap, batch, n_queries, n_keys, terms,
             bias_batch, bias_head, bias_row, table_row)  # fmt: skip
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
    lse, delta = load_stats(STATS, n_rows, bh, start, n_queries, C.BM, True)
    dq = tiles.zeros(C.BM, C.D0, C.D1)
    i = start + tl.arange(0, C.BM)
    inside = tl.minimum(i, n_queries - 1)
    n_tiles = tl.cdiv(n_keys, C.BN)
    for t in tl.range(t1, t2):
        n = AT(mask, batch, h, tile, t, n_tiles) * C.BN
        dq = dq_step(
            dq, q, do, lse, delta, keys, values, inside, n, None, None, mask, batch, h, n_heads,
            n_queries, n_keys, to_log2, score, drop, SEEN, RUNS, TERMS, C, False,
        )  # fmt: skip
    lo, hi = ROWS(mask, batch, i, n_queries, n_keys)
    for t in tl.range(0, t1 - t0 + t3 - t2):
        n = AT(mask, batch, h, tile, tile_masks.edge_tile(t, t0, t1, t2), n_tiles) * C.BN
        dq = dq_step(
            dq, q, do, lse, delta, keys, values, inside, n, lo, hi, mask, batch, h, n_heads,
            n_queries, n_keys, to_log2, score, drop, SEEN, RUNS, TERMS, C, True,
        )  # fmt: skip
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
    grads = {n: torch.empty_like(t) for n, t in (("q", q), ("k", k), ("v", v)) if n in needs}
    written = {name: writable(grad) for name, grad in grads.items()}
    q, k, v, out, dout = (launching.readable(t) for t in (q, k, v, out, dout))
    call = launching.Setup.of(q, k, v, (out, dout, *written.values()), options)
    with launching.on(q.device):
        stats = compute_stats(call, out, dout, lse, dlse)
        added = terms.terms_of(options, q.shape[2], k.shape[2], q.dtype)
        shared = Shared(call, added, (q, k, v, dout), stats)
        for name in call.key_passes(needs):
            compute_dkdv(shared, name, written.get("k"), written.get("v"))
        if "q" in needs:
            compute_dq(shared, written["q"])
        found = term_gradients(shared, needs)
    for name, grad in grads.items():
        if written[name] is not grad:
            grad.copy_(written[name])
    return grads | found


def writable(grad: Tensor) -> Tensor:
    """The tensor, or one like it with contiguous rows."""
    contiguous = torch.contiguous_format
    return grad if grad.stride(-1) == 1 else torch.empty_like(grad, memory_format=contiguous)


def compute_dkdv(shared: Shared, name: tuning.Pass, dk: Tensor | None, dv: Tensor | None) -> None:
    """Writes dk and dv, or one of them, from q, k, v and dout."""
    call, added, inputs, stats = shared
    n_batch, n_heads, group, n_queries, n_keys = call.sizes
    tile, fixed = call.tuned(name)
    # What a pass does not write it does not touch: any tensor may stand in for it.
    dk = inputs[1] if dk is None else dk
    dv = inputs[2] if dv is None else dv
    lists = tile_lists.query_lists(call.mask, tile, group, n_queries, n_keys)
    n_tiles = triton.cdiv(n_keys, tile.BN)
    launching.launch(
        dkdv_kernel,
        n_tiles * n_batch * (n_heads // group),
        tile,
        *(*inputs, stats, dk, dv),
        *call.strides(*inputs, dk, dv),
        *call.sizes,
        call.wave(n_tiles, n_queries * group, 1),
        *(float(call.options.scale), call.to_log2),
        *call.mask.arguments(lists),
        *(*call.cap, added.transposed_pointers, *added.numbers, *call.drop),
        *(call.mask.rows, call.mask.seen, call.mask.queries, call.mask.at, call.mask.has_runs),
        *(group > 1, name),
        *(added.transposed, added.code, fixed),
    )


def compute_dq(shared: Shared, dq: Tensor) -> None:
    """Writes dq from q, k, v and dout."""
    call, added, inputs, stats = shared
    n_batch, n_heads, group, n_queries, n_keys = call.sizes
    tile, fixed = call.tuned("dq")
    n_tiles = triton.cdiv(n_queries, tile.BM)
    launching.launch(
        dq_kernel,
        n_tiles * n_batch * n_heads,
        tile,
        *(*inputs, stats, dq),
        *call.strides(*inputs, dq),
        *call.sizes,
        call.wave(n_tiles, n_keys, group),
        *(float(call.options.scale), call.to_log2),
        *call.mask.arguments(tile_lists.key_lists(call.mask, tile, n_queries, n_keys)),
        *(*call.cap, added.pointers, *added.numbers, *call.drop),
        *(call.mask.rows, call.mask.seen, call.mask.keys, call.mask.at, call.mask.has_runs),
        *(added.functions, added.code, fixed),
    )
