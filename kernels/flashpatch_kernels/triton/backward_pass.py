"""Backward kernels: the gradients of q, k and v from that of the output, in three launches.

With p = 2^(s - lse) of the forward's scores s, and delta = rowsum(dO * O) - dlse:
    dv = p^T dO        dp = dO v^T        ds = p * (dp - delta)
    dq = ds k * scale  dk = ds^T q * scale
p is computed anew, tile by tile. `stats_kernel` prepares delta and lse; `dkdv_kernel` owns a tile
of keys and walks over queries; `dq_kernel` owns a tile of queries and walks over keys. Each sum is
taken by one program in a fixed order, hence no atomics and the same bits every time.

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
from flashpatch_kernels.triton import launching, tile_masks, tiles
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.tuning import Tile

LOG2E = tl.constexpr(1.4426950408889634)


@kernel
def stats_kernel(
    O, DO, LSE, DLSE, STATS,
    o_batch, o_head, o_row, do_batch, do_head, do_row, n_heads, n_queries, n_rows,
    C: tl.constexpr,
):  # fmt: skip
    """Per query what the other two read: STATS[0] = lse in base 2, STATS[1] = delta.

    A query that sees no key has lse = -inf; it becomes +inf, so that its p is 2^(-inf) = 0.
    """
    n_tiles = tl.cdiv(n_queries, C.BM)
    bh = tl.program_id(0) // n_tiles
    start = (tl.program_id(0) % n_tiles) * C.BM
    b = tl.cast(bh // n_heads, tl.int64)
    h = tl.cast(bh % n_heads, tl.int64)
    i = start + tl.arange(0, C.BM)
    at = tl.cast(bh, tl.int64) * n_queries + i
    O += (b * o_batch + h * o_head) * C.UNIT
    DO += (b * do_batch + h * do_head) * C.UNIT
    os = tiles.matrices(O, 0, o_row * C.UNIT, 1, n_queries, C.BM, C.DV, C.V0, C.V1, False)
    dos = tiles.matrices(DO, 0, do_row * C.UNIT, 1, n_queries, C.BM, C.DV, C.V0, C.V1, False)
    o = tiles.load(os, 0, start, C.BM, C.DV, C.V0, C.V1, False, True)
    do = tiles.load(dos, 0, start, C.BM, C.DV, C.V0, C.V1, False, True)
    delta = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if C.V1 > 0:
        delta += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + at, mask=i < n_queries, other=0.0)
    lse = tl.load(LSE + at, mask=i < n_queries, other=0.0) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    tl.store(STATS + at, lse, mask=i < n_queries)
    tl.store(STATS + n_rows + at, delta, mask=i < n_queries)


@triton.jit
def load_stats(stats, n_rows, head, start, n_queries, BM: tl.constexpr, EDGE: tl.constexpr):
    """Base-2 lse and delta of the queries start .. start + BM; beyond the last, p becomes 0."""
    i = start + tl.arange(0, BM)
    at = stats + tl.cast(head, tl.int64) * n_queries + i
    if EDGE:
        lse = tl.load(at, mask=i < n_queries, other=float("inf"))
        return lse, tl.load(at + n_rows, mask=i < n_queries, other=0.0)
    else:
        return tl.load(at), tl.load(at + n_rows)


@triton.jit
def dkdv_step(
    dk, dv, k, v, queries, douts, stats, n_rows, head, m, n, mask, batch,
    n_queries, n_keys, qk_scale,
    ROWS: tl.constexpr, PART: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the queries m .. m + BM of one head give to the keys n .. n + BN."""
    q = tiles.load(queries, head, m, C.BM, C.D, C.D0, C.D1, C.TMA, MASKED)
    do = tiles.load(douts, head, m, C.BM, C.DV, C.V0, C.V1, C.TMA, MASKED)
    lse, delta = load_stats(stats, n_rows, head, m, n_queries, C.BM, MASKED)
    st = tiles.inner(k, q, C)  # [BN, BM]
    if PART != "dv":
        dpt = tiles.inner(v, do, C)  # [BN, BM]
    pt = tl.math.exp2(st * qk_scale - lse[None, :])
    if MASKED:
        lo, hi = ROWS(mask, batch, m + tl.arange(0, C.BM), n_queries, n_keys)
        j = n + tl.arange(0, C.BN)
        pt = tl.where((lo[None, :] <= j[:, None]) & (j[:, None] < hi[None, :]), pt, 0.0)
    if PART != "dk":
        dv = tiles.add_product(dv, pt, do, C)
    if PART != "dv":
        dst = pt * (dpt - delta[None, :])  # pyright: ignore[reportPossiblyUnboundVariable]
        dk = tiles.add_product(dk, dst, q, C)
    return dk, dv


@kernel
def dkdv_kernel(
    Q, K, V, DO, STATS, DK, DV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    n_batch, n_heads, group, n_queries, n_keys, wave, scale, qk_scale,
    left, right, offset, bounds, bounds_batch, bounds_row, runs, runs_batch, query_tiles,
    tiles_batch,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, RUNS: tl.constexpr, GROUPED: tl.constexpr,
    PART: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head, over the query heads that share it and their queries.

    PART is "dkdv", or "dk" or "dv" to compute one alone: both together need too many registers for
    large head sizes.
    """
    mask = (left, right, offset, bounds, bounds_batch, bounds_row, runs, runs_batch,
            query_tiles, tiles_batch)  # fmt: skip
    kv_heads = n_heads // group
    tile, bg = tiles.place(
        tl.program_id(0), tl.cdiv(n_keys, C.BN), n_batch * kv_heads, wave, DESCENDING=False
    )
    batch = bg // kv_heads
    b = tl.cast(batch, tl.int64)
    g = tl.cast(bg % kv_heads, tl.int64)
    h = g * group
    n = tile * C.BN
    t0, t1, t2, t3 = QUERIES(mask, batch, n, n_queries, n_keys, C.BM, C.BN)

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
    whole = t2 - t1
    part = t1 - t0 + t3 - t2
    for t in tl.range(0, whole * group if GROUPED else whole):
        head = t // whole if GROUPED else 0
        m = (t1 + (t % whole if GROUPED else t)) * C.BM
        dk, dv = dkdv_step(
            dk, dv, k, v, queries, douts, STATS, n_rows, head, m, n, mask, batch,
            n_queries, n_keys, qk_scale, ROWS, PART, C, False,
        )  # fmt: skip
    for t in tl.range(0, part * group if GROUPED else part):
        head = t // part if GROUPED else 0
        m = tile_masks.edge_tile(t % part if GROUPED else t, t0, t1, t2) * C.BM
        dk, dv = dkdv_step(
            dk, dv, k, v, queries, douts, STATS, n_rows, head, m, n, mask, batch,
            n_queries, n_keys, qk_scale, ROWS, PART, C, True,
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
        DV += (b * dv_batch + g * dv_head) * C.UNIT
        tiles.store(DV, dv_row * C.UNIT, n, n_keys, dv, C.BN, C.DV, C.V0, C.V1)


@triton.jit
def dq_step(
    dq, q, do, lse, delta, keys, values, n, lo, hi, mask, batch, n_keys, qk_scale,
    RUNS: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the keys n .. n + BN give."""
    k = tiles.load(keys, 0, n, C.BN, C.D, C.D0, C.D1, C.TMA, MASKED)
    s = tiles.inner(q, k, C)  # [BM, BN]
    p = tl.math.exp2(s * qk_scale - lse[:, None])
    if MASKED:
        p = tl.where(tile_masks.visible(lo, hi, n, mask, batch, n_keys, C.BN, RUNS), p, 0.0)
    v = tiles.load(values, 0, n, C.BN, C.DV, C.V0, C.V1, C.TMA, MASKED)
    dp = tiles.inner(do, v, C)  # [BM, BN]
    ds = p * (dp - delta[:, None])
    return tiles.add_product(dq, ds, k, C)


@kernel
def dq_kernel(
    Q, K, V, DO, STATS, DQ,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dq_batch, dq_head, dq_row,
    n_batch, n_heads, group, n_queries, n_keys, wave, scale, qk_scale,
    left, right, offset, bounds, bounds_batch, bounds_row, runs, runs_batch,
    ROWS: tl.constexpr, KEYS: tl.constexpr, RUNS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, over the keys that it sees."""
    mask = (left, right, offset, bounds, bounds_batch, bounds_row, runs, runs_batch)
    tile, bh = tiles.place(
        tl.program_id(0), tl.cdiv(n_queries, C.BM), n_batch * n_heads, wave, DESCENDING=True
    )
    batch = bh // n_heads
    b = tl.cast(batch, tl.int64)
    h = tl.cast(bh % n_heads, tl.int64)
    start = tile * C.BM
    t0, t1, t2, t3 = KEYS(mask, batch, start, n_queries, n_keys, C.BM, C.BN, RUNS)

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
    for n in tl.range(t1 * C.BN, t2 * C.BN, C.BN):
        dq = dq_step(
            dq, q, do, lse, delta, keys, values, n, None, None, mask, batch, n_keys, qk_scale,
            RUNS, C, False,
        )  # fmt: skip
    lo, hi = ROWS(mask, batch, start + tl.arange(0, C.BM), n_queries, n_keys)
    for t in tl.range(0, t1 - t0 + t3 - t2):
        n = tile_masks.edge_tile(t, t0, t1, t2) * C.BN
        dq = dq_step(
            dq, q, do, lse, delta, keys, values, n, lo, hi, mask, batch, n_keys, qk_scale,
            RUNS, C, True,
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
    """The gradients that `needs` names, among "q", "k" and "v", each laid out as its tensor."""
    inputs = {"q": q, "k": k, "v": v}
    grads = {name: torch.empty_like(t) for name, t in inputs.items() if name in needs}
    if lse.numel() == 0 or k.shape[2] == 0:
        return {name: grad.zero_() for name, grad in grads.items()}
    written = {name: writable(grad) for name, grad in grads.items()}
    q, k, v, out, dout = (launching.readable(t) for t in (q, k, v, out, dout))
    call = launching.Setup.of(q, k, v, (out, dout, *written.values()), options)
    with launching.on(q.device):
        stats = compute_stats(call, out, dout, lse, dlse)
        for name in call.key_passes(needs):
            compute_dkdv(call, name, (q, k, v, dout), stats, written.get("k"), written.get("v"))
        if "q" in needs:
            compute_dq(call, (q, k, v, dout), stats, written["q"])
    for name, grad in grads.items():
        if written[name] is not grad:
            grad.copy_(written[name])
    return grads


def writable(grad: Tensor) -> Tensor:
    """The tensor, or one like it with contiguous rows."""
    contiguous = torch.contiguous_format
    return grad if grad.stride(-1) == 1 else torch.empty_like(grad, memory_format=contiguous)


def compute_stats(
    call: launching.Setup, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None
) -> Tensor:
    """Base-2 lse and delta of every query: fp32 [2, B, H, N]."""
    n_batch, n_heads, _, n_queries, _ = call.sizes
    tile, fixed = call.tuned("stats")
    stats = torch.empty(2, *lse.shape, dtype=torch.float32, device=lse.device)
    launching.launch(
        stats_kernel,
        triton.cdiv(n_queries, tile.BM) * n_batch * n_heads,
        tile,
        *(out, dout, lse.contiguous(), None if dlse is None else dlse.contiguous(), stats),
        *call.strides(out, dout),
        *(n_heads, n_queries, lse.numel(), fixed),
    )
    return stats


def compute_dkdv(
    call: launching.Setup,
    name: tuning.Pass,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    stats: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    """Writes dk and dv, or one of them, from q, k, v and dout."""
    n_batch, n_heads, group, n_queries, n_keys = call.sizes
    tile, fixed = call.tuned(name)
    # What a pass does not write it does not touch: any tensor may stand in for it.
    dk = inputs[1] if dk is None else dk
    dv = inputs[2] if dv is None else dv
    seen = query_tiles(call.mask, tile, n_queries, n_keys)
    n_tiles = triton.cdiv(n_keys, tile.BN)
    launching.launch(
        dkdv_kernel,
        n_tiles * n_batch * (n_heads // group),
        tile,
        *(*inputs, stats, dk, dv),
        *call.strides(*inputs, dk, dv),
        *call.sizes,
        call.wave(n_tiles, n_queries * group, 1),
        *(call.scale, call.scale * launching.LOG2E),
        *(*call.mask.arguments, seen, 0 if seen is None else launching.batch_stride(seen)),
        *(call.mask.rows, call.mask.queries, call.mask.has_runs, group > 1, name, fixed),
    )


def compute_dq(
    call: launching.Setup,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    stats: Tensor,
    dq: Tensor,
) -> None:
    """Writes dq from q, k, v and dout."""
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
        *(call.scale, call.scale * launching.LOG2E),
        *call.mask.arguments,
        *(call.mask.rows, call.mask.keys, call.mask.has_runs, fixed),
    )


def query_tiles(mask: launching.MaskCode, tile: Tile, n_queries: int, n_keys: int) -> Tensor | None:
    """The query tiles of every key tile under Intervals: int32 [1|B, key tiles, 4]."""
    bounds, _, _, runs, _ = mask.intervals
    if bounds is None:
        return None
    n_key_tiles = triton.cdiv(n_keys, tile.BN)
    seen = bounds.new_empty(mask.n_masks, n_key_tiles, 4)
    launching.launch(
        tile_masks.query_tiles_kernel,
        mask.n_masks * n_key_tiles,
        Tile(tile.BM, tile.BN, 4, 1),
        *(seen, *mask.intervals, n_queries, n_keys),
        *(tile.BM, tile.BN, 2048 // tile.BM, runs is not None),
    )
    return seen
