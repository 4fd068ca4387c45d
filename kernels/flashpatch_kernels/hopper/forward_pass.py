"""Forward on Hopper: softmax(scores) v, with reading, products and softmax in warps of their own.

One producer reads tiles of q, k and v through the copy engine; CONSUMERS warpgroups own R queries
each and do the rest. A consumer starts the scores of tile x together with the values of tile x - 1,
    S = Q K(x)^T        O = O + P V(x-1)
and takes the softmax of S while O is still being computed. Consumers take turns at the tensor
cores, so that one computes exponentials while the other multiplies. Programs stay for all their
tiles, so that the first reads of the next go on while the last is finished.

Letters: B batch, H query heads, N queries, M keys, D head size of q and k, DV of v; a program owns
BM = CONSUMERS * R queries of one head and reads BN keys at a time. All in base 2, as in
`triton.forward_pass`.

Source: Shah et al., FlashAttention-3 (2024), sections 3.1 and 3.2.
"""

from torch import Tensor

from flashpatch_kernels import triton as portable
from flashpatch_kernels.hopper import biases, crews, softmax, table, weights
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
from flashpatch_kernels.hopper.powers import polynomials
from flashpatch_kernels.hopper.products import chunks
from flashpatch_kernels.hopper.rings import (
    beside,
    leave,
    matrix,
    put,
    put_both,
    ring,
    take,
    tell_full,
    tile_of,
)
from flashpatch_kernels.hopper.scheduling import (
    await_turn,
    edges_first,
    pass_turn,
    place,
    turns,
)
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import launching, memory, plans, scores, setups, tile_lists

LN2 = gl.constexpr(0.6931471805599453)


@jit
def produce(given, KEYS: gl.constexpr, RUNS: gl.constexpr, C: gl.constexpr):
    """Reads, for every tile of this program, its queries and the keys and values they meet."""
    (Q, K, V, q_strides, k_strides, v_strides, sizes, mask, score, bias, n_tiles,
     queries, keys, values, beside_keys) = given  # fmt: skip
    n_batch, n_heads, group, n_queries, n_keys = sizes
    q = matrix(Q, q_strides, n_batch, n_heads, n_queries, C.SIZE, C.R, C.D)
    k = matrix(K, k_strides, n_batch, n_heads // group, n_keys, C.SIZE, C.BN, C.D)
    v = matrix(V, v_strides, n_batch, n_heads // group, n_keys, C.VALUE_SIZE, C.BN, C.DV)
    CONSUMERS: gl.constexpr = C.CONSUMERS
    done = 0
    for turn in range(turns(n_tiles, n_batch * n_heads, C.PAIRED, C.DEALT)):
        tile, _, batch, head = place(turn, n_tiles, n_batch, n_heads, C.PAIRED, C.DEALT)
        start = tile * C.BM
        for c in gl.static_range(CONSUMERS):
            put(queries, turn * CONSUMERS + c, q, batch, head, start + c * C.R, C.Q_SLOTS)
        t0, t1, t2, t3 = KEYS(mask, batch, head, start, n_queries, n_keys, C.BM, C.BN, RUNS)
        n = gl.maximum(t3 - t0, 1)
        kv_head = head // group
        key = edges_first(0, turn, t0, t1, t2, t3, C) * C.BN
        # Biases are read before a slot is free, because it takes its time.
        first_bias = biases.of_columns(bias, batch, head, key, n_keys, C)
        table.ask(bias, start, key, head, score, False, C)
        put(keys, done, k, batch, kv_head, key, C.SLOTS)
        biases.put(keys, beside_keys, done, first_bias, C)
        for x in range(1, n):
            before = key
            key = edges_first(x, turn, t0, t1, t2, t3, C) * C.BN
            its_bias = biases.of_columns(bias, batch, head, key, n_keys, C)
            table.ask(bias, start, key, head, score, False, C)
            put_both(keys, values, done + x, k, v, batch, kv_head, key, before, C.SLOTS)
            biases.put(keys, beside_keys, done + x, its_bias, C)
        put(values, done + n, v, batch, kv_head, key, C.SLOTS)
        if len(beside_keys) > 0:
            tell_full(keys, done + n, C.SLOTS)
        done += n + 1


@jit
def scored(
    s, i, m, of_keys, bias, lo, hi, tile, batch, head, sizes, mask, score, sources,
    SEEN: gl.constexpr, RUNS: gl.constexpr, ADDS: gl.constexpr, C: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """From the products [R, BN] of a tile of keys to its scores, -inf where nothing is seen."""
    n_queries, n_keys = sizes[3], sizes[4]
    n = tile * C.BN
    j = gl.expand_dims(n + gl.arange(0, C.BN, gl.SliceLayout(0, s.type.layout)), 0)
    row = gl.expand_dims(i, 1)
    if not C.PLAIN:
        of_keys = biases.as_row(of_keys)
        s, _ = weights.scored(s, row, j, m, n, head, of_keys, bias, score, sources, C, ADDS)
    if MASKED:
        low = gl.expand_dims(lo, 1)
        seen = SEEN(low, gl.expand_dims(hi, 1), row, j, mask, batch, head, n_queries, n_keys, RUNS)
        s = gl.where(seen, s, float("-inf"))
    return s


@jit
def consume(
    given, consumer: gl.constexpr,
    ROWS: gl.constexpr, SEEN: gl.constexpr, KEYS: gl.constexpr, RUNS: gl.constexpr,
    OPENS: gl.constexpr, ADDS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """The output and lse of R queries of every tile of this program."""
    (O, LSE, o_strides, sizes, mask, score, bias, pointers, sinks, to_log2, n_tiles,
     queries, keys, values, beside_keys) = given  # fmt: skip
    n_batch, n_heads, _group, n_queries, n_keys = sizes
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BN, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.DV, 16])
    dtype: gl.constexpr = O.dtype.element_ty
    o = matrix(O, o_strides, n_batch, n_heads, n_queries, C.VALUE_SIZE, C.R, C.DV)
    CONSUMERS: gl.constexpr = C.CONSUMERS
    # The output is on its way while the next tile begins, where there is another slot for that.
    LATER: gl.constexpr = C.Q_SLOTS > CONSUMERS
    done = 0
    if C.IN_TURN and consumer == CONSUMERS - 1:
        pass_turn(consumer, CONSUMERS, done)
    for turn in range(turns(n_tiles, n_batch * n_heads, C.PAIRED, C.DEALT)):
        tile, bh, batch, head = place(turn, n_tiles, n_batch, n_heads, C.PAIRED, C.DEALT)
        start = tile * C.BM
        t0, t1, t2, t3 = KEYS(mask, batch, head, start, n_queries, n_keys, C.BM, C.BN, RUNS)
        n = gl.maximum(t3 - t0, 1)
        edges = gl.minimum(n, gl.maximum(t1 - t0 + t3 - t2, 1))
        own_start = start + consumer * C.R
        i = own_start + gl.arange(0, C.R, gl.SliceLayout(1, S))
        inside = gl.minimum(i, n_queries - 1)
        lo, hi = ROWS(mask, batch, inside, n_queries, n_keys)
        of_row = scores.of_row(score, batch)
        sources = scores.opened(of_row, head, start, pointers, OPENS, C.R, C.BN)
        m, l = softmax.start(sinks, head, C.R, gl.SliceLayout(1, S))
        acc = gl.full([C.R, C.DV], 0.0, gl.float32, A)

        key = edges_first(0, turn, t0, t1, t2, t3, C) * C.BN
        entries = table.begin(bias, own_start, key, head, of_row, C.BN, False, C)
        number = turn * CONSUMERS + consumer
        own = take(queries, number, C.Q_SLOTS)
        q = chunks(own, C)
        k = take(keys, done, C.SLOTS)
        of_keys = biases.taken(beside_keys, done, S, C)
        if C.IN_TURN:
            await_turn(consumer, done)
        started = biases.start_scores(q, chunks(k, C), C.BN, of_keys, entries, C)
        if C.IN_TURN:
            pass_turn(consumer, CONSUMERS, done)
        if LATER and turn > 0:
            store_wait(0)
            leave(queries, number - CONSUMERS, C.Q_SLOTS)
        s = warpgroup_mma_wait(0, deps=(started,))
        leave(keys, done, C.SLOTS)
        first = edges_first(0, turn, t0, t1, t2, t3, C)
        s = scored(
            s, inside, own_start, of_keys, bias, lo, hi, first, batch, head, sizes, mask,
            of_row, sources, SEEN, RUNS, ADDS, C, True,
        )  # fmt: skip
        p, m, l = softmax.first_step(s, m, l, to_log2, dtype, C.DV)
        # Two loops, so that the instructions of whole tiles lie in a row.
        for x in range(1, edges):
            m, l, acc, p = consume_step(
                m, l, acc, p, q, keys, values, beside_keys, bias, done + x,
                edges_first(x, turn, t0, t1, t2, t3, C), inside, own_start, lo, hi, batch, head,
                sizes, mask, of_row, sources, to_log2, consumer,
                SEEN, RUNS, ADDS, C, True,
            )  # fmt: skip
        for x in range(gl.maximum(edges, 1), n):
            m, l, acc, p = consume_step(
                m, l, acc, p, q, keys, values, beside_keys, bias, done + x,
                edges_first(x, turn, t0, t1, t2, t3, C), inside, own_start, lo, hi, batch, head,
                sizes, mask, of_row, sources, to_log2, consumer,
                SEEN, RUNS, ADDS, C, False,
            )  # fmt: skip
        v = take(values, done + n, C.SLOTS)
        added = warpgroup_mma(p, v, acc, is_async=True)
        l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, S), assert_trivial=True)
        # A row that sees no key has l = 0: it gives 0 and -inf.
        inverse = gl.where(l > 0, 1.0 / l, 0.0)
        lse = (m + gl.log2(l)) * LN2
        at = LSE + bh.to(gl.int64) * n_queries + i
        gl.store(at, lse, mask=i < n_queries)
        acc = warpgroup_mma_wait(0, deps=(added,))
        leave(values, done + n, C.SLOTS)
        done += n + 1
        acc = acc * softmax.like_rows(inverse, acc)
        # The tile of q is not read any more: the output leaves through its memory.
        own.slice(0, C.DV, 1).store(acc.to(dtype))
        fence_async_shared()
        out = queries[0].index(number % C.Q_SLOTS).slice(0, C.DV, 3)
        tma_store(o, [batch, head, start + consumer * C.R, 0], out)
        if not LATER:
            store_wait(0)
            leave(queries, number, C.Q_SLOTS)
    if LATER:
        store_wait(0)


@jit
def consume_step(
    m, l, acc, p, q, keys, values, beside_keys, bias, x, tile, i, start, lo, hi, batch, head, sizes,
    mask, score, sources, to_log2, consumer: gl.constexpr,
    SEEN: gl.constexpr, RUNS: gl.constexpr, ADDS: gl.constexpr, C: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds the values of tile x - 1, of weights p, and computes the weights of tile x meanwhile."""
    entries = table.begin(bias, start, tile * C.BN, head, score, C.BN, False, C)
    k = take(keys, x, C.SLOTS)
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BN, 16])
    of_keys = biases.taken(beside_keys, x, S, C)
    if C.IN_TURN:
        await_turn(consumer, x)
    started = biases.start_scores(q, chunks(k, C), C.BN, of_keys, entries, C)
    v = tile_of(values, x, C.SLOTS)
    added = warpgroup_mma(p, v, acc, is_async=True)
    if C.IN_TURN:
        pass_turn(consumer, C.CONSUMERS, x)
    s = warpgroup_mma_wait(1, deps=(started,))
    s = scored(
        s, i, start, of_keys, bias, lo, hi, tile, batch, head, sizes, mask, score, sources,
        SEEN, RUNS, ADDS, C, MASKED,
    )  # fmt: skip
    share: gl.constexpr = polynomials(C)
    p, sums, moves = softmax.step(s, m, to_log2, p.dtype, C.DV, share)
    if C.CONSUMERS > 2:
        # Instructions of three consumers hardly fit in their cache: one branch, not two.
        acc = warpgroup_mma_wait(0, deps=(added,))
        leave(keys, x, C.SLOTS)
        if moves != 0:
            p, sums, m, l, alpha = softmax.move(s, m, l, sums, to_log2, p.dtype, C.DV, share)
            acc = acc * softmax.like_rows(alpha, acc)
    else:
        # A branch before the wait, which the assembler would else move before the exponentials.
        alpha = gl.full([C.R], 1.0, gl.float32, m.type.layout)
        if moves != 0:
            p, sums, m, l, alpha = softmax.move(s, m, l, sums, to_log2, p.dtype, C.DV, share)
        acc = warpgroup_mma_wait(0, deps=(added,))
        leave(keys, x, C.SLOTS)
        if moves != 0:
            acc = acc * softmax.like_rows(alpha, acc)
    return m, l + sums, acc, p


@kernel
def forward_kernel(
    Q, K, V, O, LSE,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    n_batch, n_heads, group, n_queries, n_keys, n_tiles, to_log2,
    left, right, offset, bounds, bounds_batch, bounds_head, bounds_row, runs, runs_batch,
    tiles_of, tiles_batch, tiles_head,
    factor, cap, bias, table, unit, sinks, pointers,
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
    queries = ring(C.Q_SLOTS, C.R, C.D, 1, 1, dtype)
    # Keys of a tile come with the values of the one before, as a step needs them, and with biases.
    beside_keys = biases.room(bias, C)
    keys = ring(C.SLOTS, C.BN, C.D, 1 + len(beside_keys), C.CONSUMERS, dtype)
    values = beside(keys, C.BN, C.DV)
    fence_async_shared()
    q_strides = (q_batch, q_head, q_row)
    k_strides = (k_batch, k_head, k_row)
    v_strides = (v_batch, v_head, v_row)
    o_strides = (o_batch, o_head, o_row)
    biased = (bias, bias_batch, bias_head, table, unit)
    given = (Q, K, V, q_strides, k_strides, v_strides, sizes, mask, score, biased, n_tiles,
             queries, keys, values, beside_keys)  # fmt: skip
    kept = (O, LSE, o_strides, sizes, mask, score, biased, pointers, sinks, to_log2, n_tiles,
            queries, keys, values, beside_keys)  # fmt: skip
    if C.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (produce, (given, KEYS, RUNS, C)),
                (consume, (kept, 0, ROWS, SEEN, KEYS, RUNS, OPENS, ADDS, C)),
                (consume, (kept, 1, ROWS, SEEN, KEYS, RUNS, OPENS, ADDS, C)),
            ],
            [4, 4],
            [C.REGISTERS, C.REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (produce, (given, KEYS, RUNS, C)),
                (consume, (kept, 0, ROWS, SEEN, KEYS, RUNS, OPENS, ADDS, C)),
                (consume, (kept, 1, ROWS, SEEN, KEYS, RUNS, OPENS, ADDS, C)),
                (consume, (kept, 2, ROWS, SEEN, KEYS, RUNS, OPENS, ADDS, C)),
            ],
            [4, 4, 4],
            [C.REGISTERS, C.REGISTERS, C.REGISTERS],
        )


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
        call = setups.Setup.of(q, k, v, (out,), options)
        if call.unit == 1:  # an address that no stride told of
            return portable.forward(q, k, v, options)
        tile, fixed = crews.tuned(call, "forward")
        n_batch, n_heads, _, n_queries, n_keys = call.sizes
        n_tiles = setups.cdiv(n_queries, tile.BM)
        added = biases.added_of(call, steps, of_queries=True, of_keys=False)
        steps.launch(
            forward_kernel,
            crews.programs(call, "forward", n_tiles * n_batch * n_heads),
            tile,
            *(q, k, v, out, lse),
            *call.strides(q, k, v, out),
            *(*call.sizes, n_tiles),
            crews.to_log2(call),
            *call.mask.arguments(
                tile_lists.key_tiles(steps, call.mask, tile, fixed.R, n_queries, n_keys)
            ),
            *(*call.cap, added.bias, added.tables[0], added.unit, options.sinks),
            *(added.composed.pointers, *added.numbers),
            *(call.mask.rows, call.mask.seen, crews.keys_of(call.mask), call.mask.has_runs),
            *(added.composed.opens, added.composed.adds, added.composed.code, fixed),
        )
        plan.keep(steps, out, lse)
    return out, lse
