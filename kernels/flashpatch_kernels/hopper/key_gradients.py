"""The gradients of k and v on Hopper, by themselves: two warpgroups share four products.

A program owns BN keys in blocks of R, and reads BM queries at a time. Its warpgroups do not share
keys but products, in the letters of `triton.backward_pass`: for each block and each tile of queries
    `weigh`            S^T = K Q^T     P^T      dV += P^T dO
    `differentiate`    dP^T = V dO^T   dS^T     dK += dS^T Q
P goes from one to the other through shared memory. Each keeps one gradient, of a whole head's
width, in registers: wide products read shared memory least, and while one computes, the other
multiplies.

Letters: B batch, H query heads, N queries, M keys, D head size.
"""

from flashpatch_kernels.hopper import biases, learnt, table
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
from flashpatch_kernels.hopper.rings import give, leave, matrix, put, put_numbers, ring, take
from flashpatch_kernels.hopper.scheduling import meet, place, step_place, turns
from flashpatch_kernels.hopper.weights import read_stats, weights
from flashpatch_kernels.triton import scores


@jit
def produce(given, QUERIES: gl.constexpr, C: gl.constexpr):
    """Reads what the others need for every tile of keys of this program."""
    (Q, K, V, DO, STATS, q_strides, k_strides, v_strides, do_strides, sizes, mask,
     score, bias, n_tiles, queries, douts, keys, values, lse, minus_delta) = given  # fmt: skip
    n_batch, n_heads, group, n_queries, n_keys = sizes
    kv_heads = n_heads // group
    q = matrix(Q, q_strides, n_batch, n_heads, n_queries, C.SIZE, C.BM, C.D)
    do = matrix(DO, do_strides, n_batch, n_heads, n_queries, C.VALUE_SIZE, C.BM, C.DV)
    k = matrix(K, k_strides, n_batch, kv_heads, n_keys, C.SIZE, C.BN, C.D)
    v = matrix(V, v_strides, n_batch, kv_heads, n_keys, C.VALUE_SIZE, C.BN, C.DV)
    n_rows = n_batch.to(gl.int64) * n_heads * n_queries
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        tile, _, batch, g = place(turn, n_tiles, n_batch, kv_heads, C.PAIRED)
        start = tile * C.BN
        t0, _, _, t3 = QUERIES(mask, batch, g, start, n_queries, n_keys, C.BM, C.BN)
        n = gl.maximum(t3 - t0, 1)
        put(keys, turn, k, batch, g, start, 1)
        for y in range(n * group):
            head, x = step_place(y, 0, turn, g * group, n, group, C)
            row = (t0 + x) * C.BM
            table.ask(bias, row, start, head, score, True, C)
            # Read before their slots are free, because either takes its time.
            its_lse, its_delta = read_stats(
                STATS, batch * n_heads + head, row, n_rows, n_queries, C
            )
            put(queries, done + y, q, batch, head, row, C.SLOTS)
            put_numbers(queries, lse, done + y, its_lse, C.SLOTS)
            if y == 0:
                put(values, turn, v, batch, g, start, 1)
            put(douts, done + y, do, batch, head, row, C.SLOTS)
            put_numbers(douts, minus_delta, done + y, -its_delta, C.SLOTS)
        done += n * group


@jit
def block(ring, number: gl.constexpr, x, C: gl.constexpr):
    """A block [R, ...] of the tile of keys or values that is there."""
    # Asked for anew in every step: kept, its addresses would take registers that are needed.
    memory = ring[0].index(anew(0 * x))
    memory = memory.reshape([C.BN, memory.shape[3]])
    return memory.slice(number * C.R, C.R, 0)


@jit
def replaced(xs, number: gl.constexpr, x):
    """The tuple, with another entry in one place."""
    return xs[:number] + (x,) + xs[number + 1 :]


@jit
def nothing_yet(COLUMNS: gl.constexpr, C: gl.constexpr):
    """Sums [R, COLUMNS] of every block."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(COLUMNS, 128), 16])
    sums = ()
    for _b in gl.static_range(C.BN // C.R):
        sums = sums + (gl.full([C.R, COLUMNS], 0.0, gl.float32, layout),)
    return sums


@jit
def put_back(grads, ring, matrix, batch, g, start, turn, C: gl.constexpr):
    """Writes a gradient through the memory of what it belongs to, which nobody reads any more."""
    for b in gl.static_range(C.BN // C.R):
        block(ring, b, turn, C).store(grads[b].to(matrix.dtype))
    fence_async_shared()
    tma_store(matrix, [batch, g, start, 0], ring[0].index(0))
    store_wait(0)
    leave(ring, turn, 1)


@jit
def weigh(
    given, ROWS: gl.constexpr, SEEN: gl.constexpr, QUERIES: gl.constexpr, RUNS: gl.constexpr,
    OPENS: gl.constexpr, ADDS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """P of every tile of this program, and dV."""
    (DV, dv_strides, sizes, mask, score, bias, pointers, to_log2, n_tiles,
     queries, douts, keys, values, lse, ps) = given  # fmt: skip
    n_batch, n_heads, group, n_queries, n_keys = sizes
    kv_heads = n_heads // group
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    BLOCKS: gl.constexpr = C.BN // C.R
    dtype: gl.constexpr = DV.dtype.element_ty
    dv_matrix = matrix(DV, dv_strides, n_batch, kv_heads, n_keys, C.VALUE_SIZE, C.BN, C.DV)
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        tile, _, batch, g = place(turn, n_tiles, n_batch, kv_heads, C.PAIRED)
        start = tile * C.BN
        t0, t1, t2, t3 = QUERIES(mask, batch, g, start, n_queries, n_keys, C.BM, C.BN)
        within = start + gl.arange(0, C.R, gl.SliceLayout(1, S))
        # Keys that nobody sees, or that do not exist, must not reach dQ.
        always = start + C.BN > n_keys
        if RUNS:
            run = mask[7] + batch.to(gl.int64) * mask[8]
            for b in gl.static_range(BLOCKS):
                j = within + b * C.R
                ends = gl.load(run + j, mask=j < n_keys, other=0)
                always = always | (gl.min(ends, 0) <= 0)
        of_row = scores.of_row(score, batch)
        sources = scores.opened(of_row, g * group, start, pointers, OPENS, C.R, C.BM)
        where = (sizes, t1, t2, always, batch)
        dvs = nothing_yet(C.DV, C)
        take(keys, turn, 1)
        met = gl.maximum(t3 - t0, 1)
        for y in range(met * group):
            x = done + y
            head, i = step_place(y, 0, turn, g * group, met, group, C)
            q = take(queries, x, C.SLOTS)
            for b in gl.static_range(BLOCKS):
                n = start + b * C.R
                m = (t0 + i) * C.BM
                entries = table.begin(bias, m, n, head, of_row, C.BM, True, C)
                k = chunks(block(keys, b, x, C), C)
                started = biases.start_scores(k, chunks(q, C), C.BM, (), entries, C)
                less = lse.index(x % C.SLOTS).load(gl.SliceLayout(0, S))
                st = warpgroup_mma_wait(0, deps=(started,))  # [R, BM]
                if b == BLOCKS - 1:
                    leave(queries, x, C.SLOTS)
                of_keys = biases.of_rows(bias, batch, head, n, n_keys, S, C)
                pt, factor = weights(
                    st, less, within + b * C.R, n, of_keys, bias, t0 + i, head,
                    where, mask, of_row, sources, to_log2, ROWS, SEEN, RUNS, ADDS, C,
                )  # fmt: skip
                give(ps, x * BLOCKS + b, factor.to(dtype), 2 * BLOCKS)
                do = take(douts, x, C.SLOTS)
                started = warpgroup_mma(
                    operand(pt, dtype, min(C.DV, 128)), do, dvs[b], is_async=True
                )
                dvs = replaced(dvs, b, warpgroup_mma_wait(0, deps=(started,)))
            leave(douts, x, C.SLOTS)
        done += met * group
        meet(1, C.CONSUMERS, done)
        put_back(dvs, values, dv_matrix, batch, g, start, turn, C)


@jit
def differentiate(given, QUERIES: gl.constexpr, C: gl.constexpr):
    """DS of every tile of this program, and dK; and sums of dS, where these have a place."""
    (DK, DBIAS, ENDS, near, dk_strides, sizes, mask, scale, n_tiles,
     queries, douts, keys, values, minus_delta, ps) = given  # fmt: skip
    n_batch, n_heads, group, n_queries, n_keys = sizes
    kv_heads = n_heads // group
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    BLOCKS: gl.constexpr = C.BN // C.R
    dtype: gl.constexpr = DK.dtype.element_ty
    dk_matrix = matrix(DK, dk_strides, n_batch, kv_heads, n_keys, C.SIZE, C.BN, C.D)
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        tile, bh, batch, g = place(turn, n_tiles, n_batch, kv_heads, C.PAIRED)
        start = tile * C.BN
        t0, _, _, t3 = QUERIES(mask, batch, g, start, n_queries, n_keys, C.BM, C.BN)
        dks = nothing_yet(C.D, C)
        sums = ()
        for _b in gl.static_range(BLOCKS):
            sums = sums + (learnt.no_sums(DBIAS, ENDS, S, C),)
        take(values, turn, 1)
        met = gl.maximum(t3 - t0, 1)
        for y in range(met * group):
            x = done + y
            _, i = step_place(y, 0, turn, g * group, met, group, C)
            m = (t0 + i) * C.BM
            do = take(douts, x, C.SLOTS)
            for b in gl.static_range(BLOCKS):
                # Products begin with these numbers: subtracted later, all that follows would wait.
                less = minus_delta.index(x % C.SLOTS).load(gl.SliceLayout(0, S))
                v = value_chunks(block(values, b, x, C), C)
                started = start_inner(v, value_chunks(do, C), C.BM, C, less)
                dpt = warpgroup_mma_wait(0, deps=(started,))  # [R, BM]
                if b == BLOCKS - 1:
                    leave(douts, x, C.SLOTS)
                pt = take(ps, x * BLOCKS + b, 2 * BLOCKS).load(S)
                dst = pt.to(gl.float32) * dpt
                its_sums = learnt.with_ds(sums[b], dst, m, start + b * C.R, near)
                sums = replaced(sums, b, its_sums)
                dst = dst.to(dtype)
                leave(ps, x * BLOCKS + b, 2 * BLOCKS)
                q = take(queries, x, C.SLOTS)
                started = warpgroup_mma(
                    operand(dst, dtype, min(C.D, 128)), q, dks[b], is_async=True
                )
                dks = replaced(dks, b, warpgroup_mma_wait(0, deps=(started,)))
            leave(queries, x, C.SLOTS)
        done += met * group
        for b in gl.static_range(BLOCKS):
            j = start + b * C.R + gl.arange(0, C.R, gl.SliceLayout(1, S))
            learnt.store_sums(sums[b], DBIAS, ENDS, bh, tile * BLOCKS + b, j, sizes, C)
            dks = replaced(dks, b, dks[b] * scale)
        meet(1, C.CONSUMERS, done)
        put_back(dks, keys, dk_matrix, batch, g, start, turn, C)


@kernel
def key_kernel(
    Q, K, V, DO, STATS, DBIAS, ENDS, DK, DV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    near_first, near_end, near_rows,
    n_batch, n_heads, group, n_queries, n_keys, n_tiles, scale, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, bias, table, unit, pointers,
    bias_batch, bias_head, bias_row, table_rows, table_row, first, last, origin,
    ROWS: gl.constexpr, SEEN: gl.constexpr, QUERIES: gl.constexpr, RUNS: gl.constexpr,
    OPENS: gl.constexpr, ADDS: gl.constexpr, CODE: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """All tiles of keys, shared by as many programs as there are. Strides are in 16 bytes."""
    mask = (left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
            tiles_of, tiles_batch, tiles_head)  # fmt: skip
    sizes = (n_batch, n_heads, group, n_queries, n_keys)
    score = (factor, cap, 0, n_batch, n_heads, n_queries, n_keys, bias_batch, bias_head, bias_row,
             table_rows, table_row, first, last, origin)  # fmt: skip
    dtype: gl.constexpr = Q.dtype.element_ty
    BLOCKS: gl.constexpr = C.BN // C.R
    # Tiles of queries are full when they are read and the numbers beside them are written.
    queries = ring(C.SLOTS, C.BM, C.D, 2, 2, dtype)
    douts = ring(C.SLOTS, C.BM, C.DV, 2, 2, dtype)
    keys = ring(1, C.BN, C.D, 1, 1, dtype)
    values = ring(1, C.BN, C.DV, 1, 1, dtype)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse = gl.allocate_shared_memory(gl.float32, [C.SLOTS, C.BM], row)
    minus_delta = gl.allocate_shared_memory(gl.float32, [C.SLOTS, C.BM], row)
    ps = ring(2 * BLOCKS, C.R, C.BM, 1, 1, dtype)
    fence_async_shared()
    q_strides = (q_batch, q_head, q_row)
    k_strides = (k_batch, k_head, k_row)
    v_strides = (v_batch, v_head, v_row)
    do_strides = (do_batch, do_head, do_row)
    dk_strides = (dk_batch, dk_head, dk_row)
    dv_strides = (dv_batch, dv_head, dv_row)
    biased = (bias, bias_batch, bias_head, table, unit)
    given = (Q, K, V, DO, STATS, q_strides, k_strides, v_strides, do_strides, sizes, mask,
             score, biased, n_tiles, queries, douts, keys, values, lse, minus_delta)  # fmt: skip
    of_weights = (DV, dv_strides, sizes, mask, score, biased, pointers, to_log2, n_tiles,
                  queries, douts, keys, values, lse, ps)  # fmt: skip
    of_keys = (DK, DBIAS, ENDS, (near_first, near_end, near_rows), dk_strides, sizes, mask, scale,
               n_tiles, queries, douts, keys, values, minus_delta, ps)  # fmt: skip
    gl.warp_specialize(
        [
            (produce, (given, QUERIES, C)),
            (weigh, (of_weights, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
            (differentiate, (of_keys, QUERIES, C)),
        ],
        [4, 4],
        [C.REGISTERS, C.REGISTERS],
    )
