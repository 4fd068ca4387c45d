"""The gradient of q on Hopper, by itself: three products, in the order that the forward pass has.

A consumer owns R queries. For each tile of BN keys, in the letters of `triton.backward_pass`,
    S = Q K^T     dP = dO V^T     P, dS in registers     dQ = dQ + dS K
so that nothing is added up in memory, and dQ is the same every time.

Source: Dao, FlashAttention-2 (2023), algorithm 2, of which this is the part for dQ.
"""

from triton import constexpr_function

from flashpatch_kernels.hopper import biases, table
from flashpatch_kernels.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    kernel,
    store_wait,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashpatch_kernels.hopper.products import anew, chunks, operand, start_inner, value_chunks
from flashpatch_kernels.hopper.rings import leave, matrix, put, ring, take
from flashpatch_kernels.hopper.scheduling import edges_first, place, turns
from flashpatch_kernels.hopper.weights import scored
from flashpatch_kernels.triton import scores


@constexpr_function
def value_slots(C):
    """Tiles of values in flight: beside heads of 256 there is room for one."""
    return C.SLOTS if C.D <= 128 else 1


@jit
def produce(given, KEYS: gl.constexpr, RUNS: gl.constexpr, C: gl.constexpr):
    """Reads, for every tile of this program, its queries and the keys and values they meet."""
    (Q, K, V, DO, q_strides, k_strides, v_strides, do_strides, sizes, mask, score, bias, n_tiles,
     queries, douts, keys, values, beside_keys) = given  # fmt: skip
    n_batch, n_heads, group, n_queries, n_keys = sizes
    q = matrix(Q, q_strides, n_batch, n_heads, n_queries, C.SIZE, C.R, C.D)
    do = matrix(DO, do_strides, n_batch, n_heads, n_queries, C.VALUE_SIZE, C.R, C.DV)
    k = matrix(K, k_strides, n_batch, n_heads // group, n_keys, C.SIZE, C.BN, C.D)
    v = matrix(V, v_strides, n_batch, n_heads // group, n_keys, C.VALUE_SIZE, C.BN, C.DV)
    CONSUMERS: gl.constexpr = C.CONSUMERS
    done = 0
    for turn in range(turns(n_tiles, n_batch * n_heads, C.PAIRED)):
        tile, _, batch, head = place(turn, n_tiles, n_batch, n_heads, C.PAIRED)
        start = tile * C.BM
        t0, t1, t2, t3 = KEYS(mask, batch, head, start, n_queries, n_keys, C.BM, C.BN, RUNS)
        n = gl.maximum(t3 - t0, 1)
        for x in range(n):
            key = edges_first(x, turn, t0, t1, t2, t3, C) * C.BN
            if x == 0:
                for c in gl.static_range(CONSUMERS):
                    put(queries, turn * CONSUMERS + c, q, batch, head, start + c * C.R, CONSUMERS)
            its_bias = biases.of_columns(bias, batch, head, key, n_keys, C)
            table.ask(bias, start, key, head, score, False, C)
            put(keys, done + x, k, batch, head // group, key, C.SLOTS)
            biases.put(keys, beside_keys, done + x, its_bias, C)
            if x == 0:
                for c in gl.static_range(CONSUMERS):
                    put(douts, turn * CONSUMERS + c, do, batch, head, start + c * C.R, CONSUMERS)
            put(values, done + x, v, batch, head // group, key, value_slots(C))
        done += n


@jit
def consume(
    given, consumer: gl.constexpr,
    ROWS: gl.constexpr, SEEN: gl.constexpr, KEYS: gl.constexpr, RUNS: gl.constexpr,
    OPENS: gl.constexpr, ADDS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """DQ of R queries of every tile of this program."""
    (DQ, STATS, dq_strides, sizes, mask, score, bias, pointers, scale, to_log2, n_tiles,
     queries, douts, keys, values, beside_keys) = given  # fmt: skip
    n_batch, n_heads, _group, n_queries, n_keys = sizes
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BN, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])
    dtype: gl.constexpr = DQ.dtype.element_ty
    dq_matrix = matrix(DQ, dq_strides, n_batch, n_heads, n_queries, C.SIZE, C.R, C.D)
    CONSUMERS: gl.constexpr = C.CONSUMERS
    done = 0
    for turn in range(turns(n_tiles, n_batch * n_heads, C.PAIRED)):
        tile, bh, batch, head = place(turn, n_tiles, n_batch, n_heads, C.PAIRED)
        start = tile * C.BM
        t0, t1, t2, t3 = KEYS(mask, batch, head, start, n_queries, n_keys, C.BM, C.BN, RUNS)
        n = gl.maximum(t3 - t0, 1)
        edges = gl.minimum(n, gl.maximum(t1 - t0 + t3 - t2, 1))
        own_start = start + consumer * C.R
        i = own_start + gl.arange(0, C.R, gl.SliceLayout(1, S))
        stats = STATS + bh.to(gl.int64) * n_queries + i
        n_rows = n_batch.to(gl.int64) * n_heads * n_queries
        lse = gl.load(stats, mask=i < n_queries, other=float("inf"))
        delta = gl.load(stats + n_rows, mask=i < n_queries, other=0.0)
        inside = gl.minimum(i, n_queries - 1)
        lo, hi = ROWS(mask, batch, inside, n_queries, n_keys)
        row = gl.expand_dims(inside, 1)
        of_row = scores.of_row(score, batch)
        sources = scores.opened(of_row, head, start, pointers, OPENS, C.R, C.BN)
        dq = gl.full([C.R, C.D], 0.0, gl.float32, A)
        number = turn * CONSUMERS + consumer
        own = take(queries, number, CONSUMERS)
        take(douts, number, CONSUMERS)
        for x in range(n):
            # Asked for anew in every step: kept, their addresses would take registers.
            mine = anew(consumer + 0 * x)
            q = queries[0].index(mine).reshape([C.R, C.D])
            do = douts[0].index(mine).reshape([C.R, C.DV])
            k = take(keys, done + x, C.SLOTS)
            key = edges_first(x, turn, t0, t1, t2, t3, C) * C.BN
            entries = table.begin(bias, own_start, key, head, of_row, C.BN, False, C)
            of_keys = biases.taken(beside_keys, done + x, S, C)
            s_started = biases.start_scores(chunks(q, C), chunks(k, C), C.BN, of_keys, entries, C)
            do, v = value_chunks(do, C), value_chunks(take(values, done + x, value_slots(C)), C)
            dp_started = start_inner(do, v, C.BN, C)
            s = warpgroup_mma_wait(len(v), deps=(s_started,))  # [R, BN]
            j = gl.expand_dims(key + gl.arange(0, C.BN, gl.SliceLayout(0, S)), 0)
            t = s
            if not C.PLAIN:
                s, t = scored(
                    s, row, j, own_start, key, head, biases.as_row(of_keys), bias, of_row,
                    sources, C, ADDS,
                )  # fmt: skip
            p = gl.exp2(s * to_log2 - gl.expand_dims(lse, 1))
            if not C.PLAIN:
                p = scores.product_gradient(p, t, row, j, head, of_row, sources, C, ADDS)
            if x < edges:
                seen = SEEN(
                    gl.expand_dims(lo, 1), gl.expand_dims(hi, 1), row, j, mask, batch, head,
                    n_queries, n_keys, RUNS,
                )  # fmt: skip
                p = gl.where(seen, p, 0.0)
            dp = warpgroup_mma_wait(0, deps=(dp_started,))  # [R, BN]
            leave(values, done + x, value_slots(C))
            ds = p * (dp - gl.expand_dims(delta, 1))
            started = warpgroup_mma(operand(ds, dtype, C.D), k, dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(started,))
            leave(keys, done + x, C.SLOTS)
        done += n
        leave(douts, number, CONSUMERS)
        # The tile of q is not read any more: its gradient leaves through its memory.
        own.store((dq * scale).to(dtype))
        fence_async_shared()
        at = start + consumer * C.R
        tma_store(dq_matrix, [batch, head, at, 0], queries[0].index(consumer))
        store_wait(0)
        leave(queries, number, CONSUMERS)


@kernel
def query_kernel(
    Q, K, V, DO, STATS, DQ,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dq_batch, dq_head, dq_row,
    n_batch, n_heads, group, n_queries, n_keys, n_tiles, scale, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, bias, table, unit, pointers,
    bias_batch, bias_head, bias_row, table_rows, table_row, first, last, origin,
    ROWS: gl.constexpr, SEEN: gl.constexpr, KEYS: gl.constexpr, RUNS: gl.constexpr,
    OPENS: gl.constexpr, ADDS: gl.constexpr, CODE: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """All tiles of queries, shared by as many programs as there are. Strides are in 16 bytes."""
    mask = (left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
            tiles_of, tiles_batch, tiles_head)  # fmt: skip
    sizes = (n_batch, n_heads, group, n_queries, n_keys)
    score = (factor, cap, 0, n_batch, n_heads, n_queries, n_keys, bias_batch, bias_head, bias_row,
             table_rows, table_row, first, last, origin)  # fmt: skip
    dtype: gl.constexpr = Q.dtype.element_ty
    queries = ring(C.CONSUMERS, C.R, C.D, 1, 1, dtype)
    douts = ring(C.CONSUMERS, C.R, C.DV, 1, 1, dtype)
    beside_keys = biases.room(bias, C)
    keys = ring(C.SLOTS, C.BN, C.D, 1 + len(beside_keys), C.CONSUMERS, dtype)
    values = ring(value_slots(C), C.BN, C.DV, 1, C.CONSUMERS, dtype)
    fence_async_shared()
    q_strides = (q_batch, q_head, q_row)
    k_strides = (k_batch, k_head, k_row)
    v_strides = (v_batch, v_head, v_row)
    do_strides = (do_batch, do_head, do_row)
    dq_strides = (dq_batch, dq_head, dq_row)
    biased = (bias, bias_batch, bias_head, table, unit)
    given = (Q, K, V, DO, q_strides, k_strides, v_strides, do_strides, sizes, mask, score, biased,
             n_tiles, queries, douts, keys, values, beside_keys)  # fmt: skip
    kept = (DQ, STATS, dq_strides, sizes, mask, score, biased, pointers, scale, to_log2, n_tiles,
            queries, douts, keys, values, beside_keys)  # fmt: skip
    gl.warp_specialize(
        [
            (produce, (given, KEYS, RUNS, C)),
            (consume, (kept, 0, ROWS, SEEN, KEYS, RUNS, OPENS, ADDS, C)),
            (consume, (kept, 1, ROWS, SEEN, KEYS, RUNS, OPENS, ADDS, C)),
        ],
        [4, 4],
        [C.REGISTERS, C.REGISTERS],
    )
