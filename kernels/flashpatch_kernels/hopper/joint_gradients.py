"""The gradients of q, k and v on Hopper by five products, in one kernel.

A program owns BN keys, R of each consumer, and reads BM queries at a time. For each tile of queries
a consumer computes, in the letters of `triton.backward_pass`,
    S^T = K Q^T     dP^T = V dO^T     P^T, dS^T in registers
    dV += P^T dO    dK += dS^T Q      dQ = dS K
where dS goes through shared memory, because dQ sums over the keys of all consumers: each computes
some of the rows, or of the columns where rows are few, and multiplies them while it computes the
weights of the next tile. The producer, which reads, also adds dQ to a matrix in float32, by the
copy engine: in no fixed order, so that its last bits may differ from run to run. dK and dV are the
same every time. Without that matrix dQ is left to `query_gradients`.

Letters: B batch, H query heads, N queries, M keys, D head size.

Source: Shah et al., FlashAttention-3 (2024), section 3.1 and appendix B.1.
"""

from triton import constexpr_function

from flashpatch_kernels.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    kernel,
    mbarrier,
    store_wait,
    tma_add,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashpatch_kernels.hopper.products import anew, chunks, operand, start_inner
from flashpatch_kernels.hopper.rings import leave, matrix, put, put_numbers, ring, take
from flashpatch_kernels.hopper.scheduling import meet, place, step_place, turns
from flashpatch_kernels.hopper.weights import weights
from flashpatch_kernels.triton import scores


@constexpr_function
def part_rows(rows, consumers):
    """Rows of the part of a tile of dQ that a consumer computes: of a product 64 at least."""
    return max(64, rows // consumers)


@constexpr_function
def part_columns(rows, columns, consumers):
    """Columns of that part: where rows are too few to be shared, columns are."""
    return rows * columns // consumers // part_rows(rows, consumers)


@jit
def add_dq(memory, dq, number, batch, head, row, C: gl.constexpr):
    """Adds all parts of a tile of dQ to the matrix, once they are there."""
    CONSUMERS: gl.constexpr = C.CONSUMERS
    ROWS: gl.constexpr = part_rows(C.BM, C.CONSUMERS)
    COLUMNS: gl.constexpr = part_columns(C.BM, C.D, C.CONSUMERS)
    _, _, _, _, sums, ready, taken = memory
    mbarrier.wait(ready.index(0), number & 1)
    for c in gl.static_range(CONSUMERS):
        at = (row + c * ROWS % C.BM, c * COLUMNS % C.D)
        tma_add(dq, [batch, head, at[0], at[1]], sums.index(c))
    store_wait(0)
    mbarrier.arrive(taken.index(0), count=1)


@jit
def produce(given, QUERIES: gl.constexpr, C: gl.constexpr):
    """Reads what consumers need for every tile of keys of this program, and writes dQ."""
    (Q, K, V, DO, STATS, q_strides, k_strides, v_strides, do_strides, sizes, mask,
     n_tiles, queries, douts, keys, values, lse, delta, memory) = given  # fmt: skip
    n_batch, n_heads, group, n_queries, n_keys = sizes
    kv_heads = n_heads // group
    CONSUMERS: gl.constexpr = C.CONSUMERS
    q = matrix(Q, q_strides, n_batch, n_heads, n_queries, C.SIZE, C.BM, C.D)
    do = matrix(DO, do_strides, n_batch, n_heads, n_queries, C.SIZE, C.BM, C.D)
    k = matrix(K, k_strides, n_batch, kv_heads, n_keys, C.SIZE, C.R, C.D)
    v = matrix(V, v_strides, n_batch, kv_heads, n_keys, C.SIZE, C.R, C.D)
    PART_ROWS: gl.constexpr = part_rows(C.BM, C.CONSUMERS)
    PART_COLUMNS: gl.constexpr = part_columns(C.BM, C.D, C.CONSUMERS)
    dq = q
    if len(memory) > 0:
        base, strides = memory[0], memory[1]
        dq = matrix(base, strides, n_batch, n_heads, n_queries, C.SIZE, PART_ROWS, PART_COLUMNS)
    n_rows = n_batch.to(gl.int64) * n_heads * n_queries
    within = gl.arange(0, C.BM, gl.BlockedLayout([1], [32], [4], [0]))
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        tile, bg = place(turn, n_tiles, n_batch * kv_heads, C.PAIRED)
        batch = bg // kv_heads
        g = bg % kv_heads
        start = tile * C.BN
        for c in gl.static_range(CONSUMERS):
            put(keys, turn * CONSUMERS + c, k, batch, g, start + c * C.R, CONSUMERS)
            put(values, turn * CONSUMERS + c, v, batch, g, start + c * C.R, CONSUMERS)
        t0, t1, t2, t3 = QUERIES(mask, batch, g, start, n_queries, n_keys, C.BM, C.BN)
        n = gl.maximum(t3 - t0, 1)
        for y in range(n * group):
            head, row = step_place(y, g * group, n, t0, t1, t2, t3, C.BM)
            i = row + within
            at = STATS + (batch * n_heads + head).to(gl.int64) * n_queries + i
            put(queries, done + y, q, batch, head, row, C.SLOTS)
            put_numbers(queries, lse, done + y, at, i < n_queries, float("inf"), C.SLOTS)
            put(douts, done + y, do, batch, head, row, C.SLOTS)
            put_numbers(douts, delta, done + y, at + n_rows, i < n_queries, 0.0, C.SLOTS)
            if len(memory) > 0 and y >= C.SLOTS:
                before = y - C.SLOTS
                head, row = step_place(before, g * group, n, t0, t1, t2, t3, C.BM)
                add_dq(memory, dq, done + before, batch, head, row, C)
        if len(memory) > 0:
            for y in range(gl.maximum(n * group - C.SLOTS, 0), n * group):
                head, row = step_place(y, g * group, n, t0, t1, t2, t3, C.BM)
                add_dq(memory, dq, done + y, batch, head, row, C)
        done += n * group


@jit
def store_ds(ds, memory, x, consumer: gl.constexpr, C: gl.constexpr):
    """Stores dS^T [R, BM] of this consumer's keys."""
    _, _, dss, _, _, _, _ = memory
    dss.index(x % 2 * C.CONSUMERS + consumer).store(ds)


@jit
def tell_of_ds(memory, x):
    """Says that this consumer's dS^T is stored."""
    _, _, _, stored, _, _, _ = memory
    fence_async_shared()
    mbarrier.arrive(stored.index(x % 2), count=1)


@jit
def start_dq(memory, keys, x, consumer: gl.constexpr, C: gl.constexpr):
    """Issues this consumer's part of dQ = dS K, once all consumers have stored their dS."""
    CONSUMERS: gl.constexpr = C.CONSUMERS
    PART_ROWS: gl.constexpr = part_rows(C.BM, C.CONSUMERS)
    PART_COLUMNS: gl.constexpr = part_columns(C.BM, C.D, C.CONSUMERS)
    row: gl.constexpr = consumer * PART_ROWS % C.BM
    column: gl.constexpr = consumer * PART_COLUMNS % C.D
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART_COLUMNS, 16])
    _, _, dss, stored, _, _, _ = memory
    mbarrier.wait(stored.index(x % 2), x // 2 & 1)
    dq = gl.full([PART_ROWS, PART_COLUMNS], 0.0, gl.float32, layout)
    for c in gl.static_range(CONSUMERS):
        k = keys[0].index(anew(c + 0 * x)).reshape([C.R, C.D])
        ds = dss.index(x % 2 * CONSUMERS + c)  # [R, BM]
        ds = ds.slice(row, PART_ROWS, 1).permute((1, 0))
        dq = warpgroup_mma(ds, k.slice(column, PART_COLUMNS, 1), dq, use_acc=c > 0, is_async=True)
    return dq


@jit
def hand_over(dq, memory, x, consumer: gl.constexpr, C: gl.constexpr):
    """Hands this consumer's part of a tile of dQ to the producer."""
    _, _, _, _, sums, ready, taken = memory
    PART_ROWS: gl.constexpr = part_rows(C.BM, C.CONSUMERS)
    PART_COLUMNS: gl.constexpr = part_columns(C.BM, C.D, C.CONSUMERS)
    mbarrier.wait(taken.index(0), x & 1 ^ 1)
    sums.index(consumer).reshape([PART_ROWS, PART_COLUMNS]).store(dq)
    fence_async_shared()
    mbarrier.arrive(ready.index(0), count=1)


@jit
def consume_step(
    dk, dv, rings, memory, x, at, head, j, place, mask, score, sources, to_log2,
    consumer: gl.constexpr, ROWS: gl.constexpr, SEEN: gl.constexpr, RUNS: gl.constexpr,
    ADDS: gl.constexpr, C: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Adds what the at-th tile of queries of a head gives to dk and dv.

    dQ of the tile before is multiplied while the weights of this one are computed.
    """
    queries, douts, keys, values, lse, delta = rings
    # Asked for anew in every step: kept, their addresses would take registers that are needed.
    mine = anew(consumer + 0 * x)
    k = keys[0].index(mine).reshape([C.R, C.D])
    v = values[0].index(mine).reshape([C.R, C.D])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    CONSUMERS: gl.constexpr = C.CONSUMERS
    dtype: gl.constexpr = k.dtype
    slot = x % C.SLOTS
    q = take(queries, x, C.SLOTS)  # [BM, D]
    s_started = start_inner(chunks(k, C), chunks(q, C), C.BM, C)
    BEFORE: gl.constexpr = len(memory) > 0 and not FIRST
    dq_started = s_started
    if BEFORE:
        dq_started = start_dq(memory, keys, x - 1, consumer, C)
    st = warpgroup_mma_wait(CONSUMERS if BEFORE else 0, deps=(s_started,))  # [R, BM]
    less = lse.index(slot).load(gl.SliceLayout(0, S))
    pt, t, row, column = weights(
        st, less, j, at, head, place, mask, score, sources, to_log2, ROWS, SEEN, RUNS, ADDS, C
    )
    if BEFORE:
        dq = warpgroup_mma_wait(0, deps=(dq_started,))
        hand_over(dq, memory, x - 1, consumer, C)
    do = take(douts, x, C.SLOTS)  # [BM, D]
    dp_started = start_inner(chunks(v, C), chunks(do, C), C.BM, C)
    dv_started = warpgroup_mma(operand(pt, dtype, C.D), do, dv, is_async=True)
    dpt = warpgroup_mma_wait(1, deps=(dp_started,))  # [R, BM]
    dst = pt * (dpt - gl.expand_dims(delta.index(slot).load(gl.SliceLayout(0, S)), 0))
    if not C.PLAIN:
        dst = scores.product_gradient(dst, t, row, column, head, score, sources, C, ADDS)
    if len(memory) > 0:
        store_ds(dst.to(dtype), memory, x, consumer, C)
    dk_started = warpgroup_mma(operand(dst, dtype, C.D), q, dk, is_async=True)
    if len(memory) > 0:
        tell_of_ds(memory, x)
    dv = warpgroup_mma_wait(1, deps=(dv_started,))
    leave(douts, x, C.SLOTS)
    dk = warpgroup_mma_wait(0, deps=(dk_started,))
    leave(queries, x, C.SLOTS)
    return dk, dv


@jit
def consume(
    given, consumer: gl.constexpr,
    ROWS: gl.constexpr, SEEN: gl.constexpr, QUERIES: gl.constexpr, RUNS: gl.constexpr,
    OPENS: gl.constexpr, ADDS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Dk and dv of R keys of every tile of this program."""
    (DK, DV, dk_strides, dv_strides, sizes, mask, score, pointers, scale, to_log2, n_tiles,
     queries, douts, keys, values, lse, delta, memory) = given  # fmt: skip
    n_batch, n_heads, group, n_queries, n_keys = sizes
    kv_heads = n_heads // group
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])
    CONSUMERS: gl.constexpr = C.CONSUMERS
    dtype: gl.constexpr = DK.dtype.element_ty
    dk_matrix = matrix(DK, dk_strides, n_batch, kv_heads, n_keys, C.SIZE, C.R, C.D)
    dv_matrix = matrix(DV, dv_strides, n_batch, kv_heads, n_keys, C.SIZE, C.R, C.D)
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        tile, bg = place(turn, n_tiles, n_batch * kv_heads, C.PAIRED)
        batch = bg // kv_heads
        g = bg % kv_heads
        start = tile * C.BN
        t0, t1, t2, t3 = QUERIES(mask, batch, g, start, n_queries, n_keys, C.BM, C.BN)
        edges = gl.maximum(t1 - t0 + t3 - t2, 1)
        j = start + consumer * C.R + gl.arange(0, C.R, gl.SliceLayout(1, S))
        # Keys that nobody sees, or that do not exist, must not reach dQ.
        always = start + C.BN > n_keys
        if RUNS:
            at = mask[7] + batch.to(gl.int64) * mask[8] + j
            always = always | (gl.min(gl.load(at, mask=j < n_keys, other=0), 0) <= 0)
        of_row = scores.of_row(score, batch)
        sources = scores.opened(of_row, g * group, start, pointers, OPENS, C.R, C.BM)
        dk = gl.full([C.R, C.D], 0.0, gl.float32, A)
        dv = gl.full([C.R, C.D], 0.0, gl.float32, A)
        for c in gl.static_range(CONSUMERS):
            take(keys, turn * CONSUMERS + c, CONSUMERS)
        k = take(keys, turn * CONSUMERS + consumer, CONSUMERS)
        v = take(values, turn * CONSUMERS + consumer, CONSUMERS)
        met = gl.maximum(t3 - t0, 1)
        n = met * group
        rings = (queries, douts, keys, values, lse, delta)
        where = (sizes, (t0, t1, t2, t3), edges, always, batch)
        dk, dv = consume_step(
            dk, dv, rings, memory, done, 0, g * group, j, where, mask, of_row, sources, to_log2,
            consumer, ROWS, SEEN, RUNS, ADDS, C, True,
        )  # fmt: skip
        at = 0
        for y in range(1, n):
            at = gl.where(at + 1 < met, at + 1, 0)
            dk, dv = consume_step(
                dk, dv, rings, memory, done + y, at, g * group + y // met, j, where, mask, of_row,
                sources, to_log2, consumer, ROWS, SEEN, RUNS, ADDS, C, False,
            )  # fmt: skip
        done += n
        if len(memory) > 0:
            started = start_dq(memory, keys, done - 1, consumer, C)
            dq = warpgroup_mma_wait(0, deps=(started,))
            hand_over(dq, memory, done - 1, consumer, C)
            # The others may still read these keys for their part of dQ.
            meet(1, CONSUMERS, done)
        k.store((dk * scale).to(dtype))
        v.store(dv.to(dtype))
        fence_async_shared()
        row = start + consumer * C.R
        tma_store(dk_matrix, [batch, g, row, 0], keys[0].index(consumer))
        tma_store(dv_matrix, [batch, g, row, 0], values[0].index(consumer))
        store_wait(0)
        leave(values, turn * CONSUMERS + consumer, CONSUMERS)
        leave(keys, turn * CONSUMERS + consumer, CONSUMERS)


@kernel
def joint_kernel(
    Q, K, V, DO, STATS, DQ, DK, DV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    dq_batch, dq_head, dq_row,
    n_batch, n_heads, group, n_queries, n_keys, n_tiles, scale, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, pointers,
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
    # Tiles of queries are full when they are read and the numbers beside them are written.
    queries = ring(C.SLOTS, C.BM, C.D, 2, C.CONSUMERS, dtype)
    douts = ring(C.SLOTS, C.BM, C.D, 2, C.CONSUMERS, dtype)
    keys = ring(C.CONSUMERS, C.R, C.D, 1, 1, dtype)
    values = ring(C.CONSUMERS, C.R, C.D, 1, 1, dtype)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse = gl.allocate_shared_memory(gl.float32, [C.SLOTS, C.BM], row)
    delta = gl.allocate_shared_memory(gl.float32, [C.SLOTS, C.BM], row)
    # What dQ takes: the matrix, tiles of dS^T, of dQ, and who waits for them. Nothing without it.
    memory = ()
    if DQ is not None:
        square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.R, C.BM], dtype)
        dss = gl.allocate_shared_memory(dtype, [2 * C.CONSUMERS, C.R, C.BM], square)
        PART_ROWS: gl.constexpr = part_rows(C.BM, C.CONSUMERS)
        PART_COLUMNS: gl.constexpr = part_columns(C.BM, C.D, C.CONSUMERS)
        block: gl.constexpr = (1, 1, PART_ROWS, PART_COLUMNS)
        wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for(block, gl.float32)
        sums = gl.allocate_shared_memory(
            gl.float32, [C.CONSUMERS, 1, 1, PART_ROWS, PART_COLUMNS], wide
        )
        stored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for at in gl.static_range(2):
            mbarrier.init(stored.index(at), count=C.CONSUMERS)
        ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(ready.index(0), count=C.CONSUMERS)
        mbarrier.init(taken.index(0), count=1)
        memory = (DQ, (dq_batch, dq_head, dq_row), dss, stored, sums, ready, taken)
    fence_async_shared()
    q_strides = (q_batch, q_head, q_row)
    k_strides = (k_batch, k_head, k_row)
    v_strides = (v_batch, v_head, v_row)
    do_strides = (do_batch, do_head, do_row)
    dk_strides = (dk_batch, dk_head, dk_row)
    dv_strides = (dv_batch, dv_head, dv_row)
    given = (Q, K, V, DO, STATS, q_strides, k_strides, v_strides, do_strides, sizes,
             mask, n_tiles, queries, douts, keys, values, lse, delta, memory)  # fmt: skip
    kept = (DK, DV, dk_strides, dv_strides, sizes, mask, score, pointers, scale, to_log2, n_tiles,
            queries, douts, keys, values, lse, delta, memory)  # fmt: skip
    gl.warp_specialize(
        [
            (produce, (given, QUERIES, C)),
            (consume, (kept, 0, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
            (consume, (kept, 1, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
        ],
        [4, 4],
        [C.REGISTERS, C.REGISTERS],
    )
