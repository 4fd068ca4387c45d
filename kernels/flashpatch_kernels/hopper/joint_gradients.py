"""The gradients of q, k and v on Hopper by five products, in one kernel.

A program owns BN keys, R of each consumer, and reads BM queries at a time. For each tile of queries
a consumer computes, in the letters of `triton.backward_pass`,
    S^T = K Q^T     dP^T = V dO^T     P^T, dS^T in registers
    dV += P^T dO    dK += dS^T Q
and hands dS on through shared memory, because dQ sums over the keys of all consumers: one more
warpgroup multiplies dQ^T = K^T dS^T, and a warp has the copy engine add it to a matrix in float32.
That is in no fixed order, so that the last bits of dQ may differ from run to run, or in one that
programs wait for (`ordering`); dK and dV are the same every time. Without that matrix dQ is left to
`query_gradients`.

Who waits, for the copy engine or for other programs, is a warp of its own, so that nobody waits for
two things: one reads, one adds, one counts what is added.

What bounds it is shared memory, which products read. Heads of 64 leave room in registers for what
is the same for all tiles of queries: keys and values (see `roomy`).

Programs of one head run at the same time, and read the same tiles at the same time where heads are
wide. Others, which would wait for each other's additions to dQ, begin with another tile of queries
each, as they do where additions have an order (`scheduling.step_place`).

Letters: B batch, H query heads, N queries, M keys, D head size.

Source: Shah et al., FlashAttention-3 (2024), section 3.1 and appendix B.1.
"""

from triton import constexpr_function

from flashpatch_kernels.hopper import biases, learnt, table
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
from flashpatch_kernels.hopper.ordering import (
    await_additions,
    await_count,
    count_of,
    count_one,
    rank,
)
from flashpatch_kernels.hopper.products import (
    anew,
    chunks,
    held,
    operand,
    start_inner,
    times_unpacked,
)
from flashpatch_kernels.hopper.rings import (
    again,
    await_free,
    give,
    leave,
    matrix,
    put,
    put_numbers,
    ring,
    take,
    tell_full,
    tile_of,
)
from flashpatch_kernels.hopper.scheduling import course, met_tile, place, step_place, turns
from flashpatch_kernels.hopper.weights import read_stats, weights
from flashpatch_kernels.triton import scores

# Registers of a thread that only waits and tells, the fewest that there are.
FEW = gl.constexpr(24)


@constexpr_function
def roomy(C):
    """Whether registers hold, beside dK and dV, the keys and the values.

    Never where dQ is left out: in a loop that writes nothing to shared memory the assembler (ptxas
    12.8 to 13.0) gives such registers to others, and results are wrong. `test_hopper_sm90` looks
    for it in the machine code.
    """
    return C.D <= 64 and C.BM <= 64


@constexpr_function
def packed(C):
    """Whether P, until dS is known, is kept in 16 bits: under a cap there are two tiles of it."""
    return C.CAP or C.D > 64 or C.BM > 64


@constexpr_function
def registers_left(C):
    """Of a thread that collects dQ: of 512, what those of consumers and of single warps leave."""
    return 512 - FEW - C.CONSUMERS * C.REGISTERS


@jit
def produce(given, QUERIES: gl.constexpr, C: gl.constexpr):
    """Reads what consumers need for every tile of keys of this program."""
    (Q, K, V, DO, STATS, q_strides, k_strides, v_strides, do_strides, sizes, mask,
     score, bias, n_tiles, queries, douts, keys, values, lse, minus_delta) = given  # fmt: skip
    n_batch, n_heads, group, n_queries, n_keys = sizes
    kv_heads = n_heads // group
    CONSUMERS: gl.constexpr = C.CONSUMERS
    q = matrix(Q, q_strides, n_batch, n_heads, n_queries, C.SIZE, C.BM, C.D)
    do = matrix(DO, do_strides, n_batch, n_heads, n_queries, C.SIZE, C.BM, C.D)
    k = matrix(K, k_strides, n_batch, kv_heads, n_keys, C.SIZE, C.R, C.D)
    v = matrix(V, v_strides, n_batch, kv_heads, n_keys, C.SIZE, C.R, C.D)
    n_rows = n_batch.to(gl.int64) * n_heads * n_queries
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        tile, _, batch, g = place(turn, n_tiles, n_batch, kv_heads, C.PAIRED)
        start = tile * C.BN
        for c in gl.static_range(CONSUMERS):
            put(keys, turn * CONSUMERS + c, k, batch, g, start + c * C.R, CONSUMERS)
            put(values, turn * CONSUMERS + c, v, batch, g, start + c * C.R, CONSUMERS)
        t0, _, _, t3 = QUERIES(mask, batch, g, start, n_queries, n_keys, C.BM, C.BN)
        n = gl.maximum(t3 - t0, 1)
        steps = n * group
        begin = course(tile, n_tiles, t0, n, group, C)
        head, x = step_place(0, begin, turn, g * group, n, group, C)
        row = (t0 + x) * C.BM
        # Read before they are needed, because it takes its time.
        its_lse, its_delta = read_stats(STATS, batch * n_heads + head, row, n_rows, n_queries, C)
        for y in range(steps):
            table.ask(bias, row, start, head, score, True, C)
            put(queries, done + y, q, batch, head, row, C.SLOTS)
            put_numbers(queries, lse, done + y, its_lse, C.SLOTS)
            put(douts, done + y, do, batch, head, row, C.SLOTS)
            put_numbers(douts, minus_delta, done + y, -its_delta, C.SLOTS)
            after = gl.minimum(y + 1, steps - 1)
            head, x = step_place(after, begin, turn, g * group, n, group, C)
            row = (t0 + x) * C.BM
            its_lse, its_delta = read_stats(
                STATS, batch * n_heads + head, row, n_rows, n_queries, C
            )
        done += steps


@jit
def keys_of_part(keys, consumer: gl.constexpr, PART: gl.constexpr, C: gl.constexpr):
    """64 columns of a consumer's keys, as rows: [64, R]."""
    k = keys[0].index(consumer).reshape([C.R, C.D])
    kt = k.slice(PART * 64, 64, 1).permute((1, 0))
    if roomy(C):
        return held(kt, C.BM)
    else:
        return kt


@jit
def part_of_dq(kts, dss, x, C: gl.constexpr):
    """64 rows of dQ^T = K^T dS^T of the x-th tile of queries, from these of the keys: [64, BM]."""
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    CONSUMERS: gl.constexpr = C.CONSUMERS
    dq = gl.full([64, C.BM], 0.0, gl.float32, A)
    for c in gl.static_range(CONSUMERS):
        ds = take(dss, x * CONSUMERS + c, 2 * CONSUMERS)  # [R, BM]
        dq = warpgroup_mma(kts[c], ds, dq, use_acc=c > 0, is_async=True)
    return warpgroup_mma_wait(0, deps=(dq,))


@jit
def collect(given, QUERIES: gl.constexpr, C: gl.constexpr):
    """Multiplies dQ^T = K^T dS^T for every tile of queries.

    In parts of 64 rows: a whole tile at once would take registers that consumers need. It also sums
    dS over queries where that is learnt, by products as well.
    """
    sizes, mask, n_tiles, keys, dss, sums, keys_read, DBIAS, ENDS, near, marks = given
    n_batch, n_heads, group, n_queries, n_keys = sizes
    kv_heads = n_heads // group
    CONSUMERS: gl.constexpr = C.CONSUMERS
    PARTS: gl.constexpr = C.D // 64
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        tile, bh, batch, g = place(turn, n_tiles, n_batch, kv_heads, C.PAIRED)
        t0, _, _, t3 = QUERIES(mask, batch, g, tile * C.BN, n_queries, n_keys, C.BM, C.BN)
        n = gl.maximum(t3 - t0, 1)
        begin = course(tile, n_tiles, t0, n, group, C)
        totals = learnt.no_totals(marks, C)
        for c in gl.static_range(CONSUMERS):
            take(keys, turn * CONSUMERS + c, CONSUMERS)
        kts = ()
        for part in gl.static_range(PARTS):
            of_part = ()
            for c in gl.static_range(CONSUMERS):
                of_part = of_part + (keys_of_part(keys, c, part, C),)
            kts = kts + (of_part,)
        for y in range(n * group):
            x = done + y
            # Told apart for tables alone; where the ends of these are summed, heads are alone.
            row = (t0 + met_tile(y, begin, turn, n, C)) * C.BM
            totals = learnt.start_totals(totals, marks, dss, x, row, tile * C.BN, near, C)
            for part in gl.static_range(PARTS):
                dq = part_of_dq(kts[part], dss, x, C)
                if part == 0:
                    await_free(sums, x, 1)
                columns = tile_of(sums, x, 1).slice(part * 64, 64, 1)
                columns.permute((1, 0)).store(dq)
            if len(totals) > 0:
                totals = warpgroup_mma_wait(0, deps=totals)
            for c in gl.static_range(CONSUMERS):
                leave(dss, x * CONSUMERS + c, 2 * CONSUMERS)
            fence_async_shared()
            tell_full(sums, x, 1)
        done += n * group
        learnt.store_totals(totals, DBIAS, ENDS, bh, tile, sizes, C)
        mbarrier.arrive(keys_read.index(0), count=1)


@jit
def addends(turn, sizes, mask, n_tiles, QUERIES: gl.constexpr, C: gl.constexpr):
    """What adds to dQ in a turn of this program.

    Returns:
        The tile of keys, and its head as `place` has it; the first of the tiles of queries that it
        meets, how many of each head, at least one, and where among them it begins; and the first as
        it is counted: keys that no query sees have a step all the same, for a tile beyond the last.
    """
    n_batch, n_heads, group, n_queries, n_keys = sizes
    tile, bh, batch, g = place(turn, n_tiles, n_batch, n_heads // group, C.PAIRED)
    t0, _, _, t3 = QUERIES(mask, batch, g, tile * C.BN, n_queries, n_keys, C.BM, C.BN)
    n = gl.maximum(t3 - t0, 1)
    counted = gl.where(t3 > t0, t0, gl.cdiv(n_queries, C.BM))
    return tile, bh, batch, g, t0, n, course(tile, n_tiles, t0, n, group, C), counted


@jit
def add(given, QUERIES: gl.constexpr, C: gl.constexpr):
    """Has the copy engine add every tile of dQ to the matrix, in one order where it is counted."""
    DQ, dq_strides, sizes, mask, n_tiles, sums, added, counts = given
    n_batch, n_heads, group, n_queries, _n_keys = sizes
    kv_heads = n_heads // group
    dq = matrix(DQ, dq_strides, n_batch, n_heads, n_queries, C.SIZE, C.BM, C.D)
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        tile, bh, batch, g, t0, n, begin, counted = addends(turn, sizes, mask, n_tiles, QUERIES, C)
        for y in range(n * group):
            head, x = step_place(y, begin, turn, g * group, n, group, C)
            i, number = counted + x, done + y
            if len(counts) > 0:
                before = rank(i, turn, tile, bh, n_tiles, n_queries, mask, C)
                await_count(count_of(counts[0], batch * n_heads + head, i, n_queries, C), before)
            take(sums, number, 1)
            tma_add(dq, [batch, head, (t0 + x) * C.BM, 0], sums[0].index(0))
            if len(counts) > 0:
                await_additions()
                tell_full(added, number, 1)
            else:
                store_wait(0)
                leave(sums, number, 1)
        done += n * group


@jit
def count(given, QUERIES: gl.constexpr, C: gl.constexpr):
    """Counts every tile of dQ that was added, once all programs see it."""
    sizes, mask, n_tiles, added, counts = given
    n_batch, n_heads, group, n_queries, _n_keys = sizes
    kv_heads = n_heads // group
    done = 0
    for turn in range(turns(n_tiles, n_batch * kv_heads, C.PAIRED)):
        _, _, batch, g, _, n, begin, counted = addends(turn, sizes, mask, n_tiles, QUERIES, C)
        for y in range(n * group):
            head, x = step_place(y, begin, turn, g * group, n, group, C)
            at = count_of(counts[0], batch * n_heads + head, counted + x, n_queries, C)
            take(added, done + y, 1)
            leave(added, done + y, 1)
            count_one(at)
        done += n * group


@jit
def own_tiles(kept, keys, values, consumer: gl.constexpr, x, C: gl.constexpr):
    """A consumer's keys and values [R, D], as left operands of the x-th tile's products."""
    if roomy(C):
        return kept
    else:
        # Asked for anew in every step: kept, their addresses would take registers.
        mine = anew(consumer + 0 * x)
        k = keys[0].index(mine).reshape([C.R, C.D])
        v = values[0].index(mine).reshape([C.R, C.D])
        return chunks(k, C), chunks(v, C)


@jit
def consume_step(
    dk, dv, sums, near, kept, rings, x, tile, head, own, place, mask, score, sources, to_log2,
    consumer: gl.constexpr, ROWS: gl.constexpr, SEEN: gl.constexpr, RUNS: gl.constexpr,
    ADDS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Adds what a tile of queries of a head gives to dk, dv and sums of dS, and hands on its dS.

    `own` is (the consumer's keys j [R], the first of them, `bias`); `sums` and `near` are
    as in `learnt.with_ds`.
    """
    j, start, bias = own
    queries, douts, keys, values, dss, lse, minus_delta = rings
    k, v = own_tiles(kept, keys, values, consumer, x, C)
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    dtype: gl.constexpr = keys[0].dtype
    slot = x % C.SLOTS
    of_keys = biases.of_rows(bias, place[4], head, start, place[0][4], S, C)
    entries = table.begin(bias, tile * C.BM, start, head, score, C.BM, True, C)
    q = take(queries, x, C.SLOTS)  # [BM, D]
    s_started = biases.start_scores(k, chunks(q, C), C.BM, (), entries, C)
    st = warpgroup_mma_wait(0, deps=(s_started,))  # [R, BM]
    less = lse.index(slot).load(gl.SliceLayout(0, S))
    pt, factor = weights(
        st, less, j, start, of_keys, bias, tile, head, place, mask, score, sources,
        to_log2, ROWS, SEEN, RUNS, ADDS, C,
    )  # fmt: skip
    do = take(douts, x, C.SLOTS)  # [BM, D]
    less = minus_delta.index(slot).load(gl.SliceLayout(0, S))
    if packed(C):
        pt, factor = pt.to(dtype), factor.to(dtype)
    # Begun with these numbers, which saves registers as well.
    dp_started = start_inner(v, chunks(do, C), C.BM, C, less)
    dv_started = warpgroup_mma(operand(pt, dtype, C.D), do, dv, is_async=True)
    dpt = warpgroup_mma_wait(1, deps=(dp_started,))  # [R, BM]
    dst = times_unpacked(dpt, factor) if packed(C) else dpt * factor
    sums = learnt.with_ds(sums, dst, tile * C.BM, start, near)
    dst = dst.to(dtype)
    dk_started = warpgroup_mma(operand(dst, dtype, C.D), q, dk, is_async=True)
    if len(dss) > 0:  # while that goes on, because its way to memory is awaited
        give(dss, x * C.CONSUMERS + consumer, dst, 2 * C.CONSUMERS)
    dv = warpgroup_mma_wait(1, deps=(dv_started,))
    leave(douts, x, C.SLOTS)
    dk = warpgroup_mma_wait(0, deps=(dk_started,))
    leave(queries, x, C.SLOTS)
    return dk, dv, sums


@jit
def consume(
    given, consumer: gl.constexpr,
    ROWS: gl.constexpr, SEEN: gl.constexpr, QUERIES: gl.constexpr, RUNS: gl.constexpr,
    OPENS: gl.constexpr, ADDS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Dk and dv of R keys of every tile of this program."""
    (DK, DV, DBIAS, ENDS, near, dk_strides, dv_strides, sizes, mask, score, bias, pointers, scale,
     to_log2, n_tiles, queries, douts, keys, values, dss, keys_read,
     lse, minus_delta) = given  # fmt: skip
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
        tile, bh, batch, g = place(turn, n_tiles, n_batch, kv_heads, C.PAIRED)
        start = tile * C.BN
        t0, t1, t2, t3 = QUERIES(mask, batch, g, start, n_queries, n_keys, C.BM, C.BN)
        row = start + consumer * C.R
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
        sums = learnt.no_sums(DBIAS, ENDS, S, C)
        k = take(keys, turn * CONSUMERS + consumer, CONSUMERS)
        v = take(values, turn * CONSUMERS + consumer, CONSUMERS)
        kept = ()
        gl.static_assert(len(dss) > 0 or not roomy(C))
        if roomy(C):
            kept = (held(k, C.BM),), (held(v, C.BM),)
        met = gl.maximum(t3 - t0, 1)
        n = met * group
        rings = (queries, douts, keys, values, dss, lse, minus_delta)
        where = (sizes, t1, t2, always, batch)
        begin = course(tile, n_tiles, t0, met, group, C)
        for y in range(n):
            head, x = step_place(y, begin, turn, g * group, met, group, C)
            dk, dv, sums = consume_step(
                dk, dv, sums, near, kept, rings, done + y, t0 + x, head, (j, row, bias), where,
                mask, of_row, sources, to_log2, consumer, ROWS, SEEN, RUNS, ADDS, C,
            )  # fmt: skip
        done += n
        part = tile * CONSUMERS + consumer
        learnt.store_sums(sums, DBIAS, ENDS, bh, part, j, sizes, C)
        v.store(dv.to(dtype))
        fence_async_shared()
        tma_store(dv_matrix, [batch, g, row, 0], values[0].index(consumer))
        if len(dss) > 0:
            mbarrier.wait(keys_read.index(0), turn & 1)
        k.store((dk * scale).to(dtype))
        fence_async_shared()
        tma_store(dk_matrix, [batch, g, row, 0], keys[0].index(consumer))
        store_wait(0)
        leave(values, turn * CONSUMERS + consumer, CONSUMERS)
        leave(keys, turn * CONSUMERS + consumer, CONSUMERS)


@kernel
def joint_kernel(
    Q, K, V, DO, STATS, DQ, COUNTS, DBIAS, ENDS, DK, DV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    dq_batch, dq_head, dq_row, near_first, near_end, near_rows,
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
    # Tiles of queries are full when they are read and the numbers beside them are written.
    queries = ring(C.SLOTS, C.BM, C.D, 2, C.CONSUMERS, dtype)
    douts = ring(C.SLOTS, C.BM, C.D, 2, C.CONSUMERS, dtype)
    keys = ring(C.CONSUMERS, C.R, C.D, 1, 1, dtype)
    values = ring(C.CONSUMERS, C.R, C.D, 1, 1, dtype)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse = gl.allocate_shared_memory(gl.float32, [C.SLOTS, C.BM], row)
    minus_delta = gl.allocate_shared_memory(gl.float32, [C.SLOTS, C.BM], row)
    # What dQ takes: tiles of dS^T, of dQ, and a barrier for tiles of keys. Nothing without it.
    dss, sums, keys_read = (), (), ()
    if DQ is not None:
        dss = ring(2 * C.CONSUMERS, C.R, C.BM, 1, 1, dtype)
        sums = ring(1, C.BM, C.D, 1, 1, gl.float32)
        keys_read = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(keys_read.index(0), count=1)
    marks = learnt.marks(DBIAS, ENDS, dtype, C) if DQ is not None else ()
    near = near_first, near_end, near_rows
    # The same tiles of dQ, once more full when they have been added.
    counts, added = (), ()
    if COUNTS is not None:
        counts, added = (COUNTS,), again(sums, 1)
    fence_async_shared()
    q_strides = (q_batch, q_head, q_row)
    k_strides = (k_batch, k_head, k_row)
    v_strides = (v_batch, v_head, v_row)
    do_strides = (do_batch, do_head, do_row)
    dk_strides = (dk_batch, dk_head, dk_row)
    dv_strides = (dv_batch, dv_head, dv_row)
    dq_strides = (dq_batch, dq_head, dq_row)
    biased = (bias, bias_batch, bias_head, table, unit)
    given = (Q, K, V, DO, STATS, q_strides, k_strides, v_strides, do_strides, sizes, mask,
             score, biased, n_tiles, queries, douts, keys, values, lse, minus_delta)  # fmt: skip
    # Who collects dS sums it as well; without, consumers do.
    own_bias, own_ends = DBIAS if DQ is None else None, ENDS if DQ is None else None
    kept = (DK, DV, own_bias, own_ends, near, dk_strides, dv_strides, sizes,
            mask, score, biased, pointers, scale, to_log2, n_tiles,
            queries, douts, keys, values, dss, keys_read, lse, minus_delta)  # fmt: skip
    collected = (sizes, mask, n_tiles, keys, dss, sums, keys_read, DBIAS, ENDS, near, marks)
    summed = (DQ, dq_strides, sizes, mask, n_tiles, sums, added, counts)
    counted = (sizes, mask, n_tiles, added, counts)
    if COUNTS is not None:
        gl.warp_specialize(
            [
                (consume, (kept, 0, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
                (consume, (kept, 1, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
                (collect, (collected, QUERIES, C)),
                (produce, (given, QUERIES, C)),
                (add, (summed, QUERIES, C)),
                (count, (counted, QUERIES, C)),
            ],
            [4, 4, 1, 1, 1],
            [C.REGISTERS, registers_left(C), FEW, FEW, FEW],
        )
    elif DQ is not None:
        gl.warp_specialize(
            [
                (consume, (kept, 0, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
                (consume, (kept, 1, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
                (collect, (collected, QUERIES, C)),
                (produce, (given, QUERIES, C)),
                (add, (summed, QUERIES, C)),
            ],
            [4, 4, 1, 1],
            [C.REGISTERS, registers_left(C), FEW, FEW],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (kept, 0, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
                (consume, (kept, 1, ROWS, SEEN, QUERIES, RUNS, OPENS, ADDS, C)),
                (produce, (given, QUERIES, C)),
            ],
            [4, 1],
            [C.REGISTERS, FEW],
        )
