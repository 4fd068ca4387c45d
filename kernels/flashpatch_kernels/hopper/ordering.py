"""In which order programs add to a tile of dQ, where that is to be the same every time.

A count of each tile of queries tells how many programs have added to it; one that is not the next
waits. Programs of one head run at the same time and keep step, so that an order costs little where
it is the one in which they come by themselves, on the courses of `scheduling.course`: to a tile of
queries at least two steps after each other.
* Where every query sees every key, or those of a window, the t-th tile of keys begins with the
  2t-th tile of queries, and goes round about.
* Where queries see what is before them, the later tile of a pair goes on from the first query that
  sees its keys; then the earlier one goes on from there, and back from there to its own first.
What comes in an earlier turn comes before.

No program waits for a step that comes later than its own in this order, and each takes its steps
in it; so there is always one that goes on, provided that all run, as a cooperative launch warrants.

That the copy engine has done an addition means that it is on its way. Until all programs would find
it in memory half a microsecond passes, in which whoever waits for it can do nothing else: counting
has a warp of its own. Counted before that, a gradient in 14 to 1500 differed in some bit.

Letters: n tiles of keys of BN, m of queries of BM = BN / 2; those of a head.

Source: the `dq_semaphore` of flash-attention (hopper/mainloop_bwd_sm90_tma_gmma_ws.hpp), whose
programs add in the order of their keys.
"""

from flashpatch_kernels.hopper.gluon import gl, jit


@jit
def count_of(COUNTS, head, i, n_queries, C: gl.constexpr):
    """Where the count of a head's i-th tile of queries is; those beyond the last have one more."""
    m = gl.cdiv(n_queries, C.BM)
    return COUNTS + (head.to(gl.int64) * (m + 1) + gl.minimum(i, m))


@jit
def rank(i, turn, tile, bh, n, n_queries, mask, C: gl.constexpr):
    """How many of n tiles of keys are added to the i-th tile of queries before this one.

    `bh` is the head of these keys, and `turn` that of this program which they are for.
    """
    gl.static_assert(C.BN == 2 * C.BM)
    programs = gl.num_programs(0)
    left, right, offset = mask[0], mask[1], mask[2]
    # The i-th tile of queries sees tiles of keys up to `met`, this one not included.
    met = between(gl.cdiv((i + 1) * C.BM + offset + right, C.BN), n)
    if C.PAIRED:
        half = n // 2
        p = gl.minimum(tile, n - 1 - tile)
        # The pairs of this head that have the same turn as this one; one in the middle comes last.
        before = turn // 2 * programs - bh * half
        first = gl.where(p == half, half, between(before, half))
        end = between(before + programs, half)
        # Of later tiles those from the `lacking`-th pair on are added.
        lacking = n - met
        later = gl.where(tile > p, p, end) - gl.maximum(first, lacking)
        earlier = gl.where(tile > p, 0, p - first)
        of_turn = gl.maximum(later, 0) + earlier
        found = gl.maximum(first - lacking, 0) + gl.minimum(first, met) + of_turn
    else:
        since = gl.maximum(i * C.BM + offset - left, 0) // C.BN
        before = turn * programs - bh * n
        first = gl.minimum(gl.maximum(before, since), met)
        end = gl.minimum(gl.maximum(before + programs, since), met)
        begun = gl.minimum(gl.maximum(i // 2 + 1, first), end)
        found = begun - since - (tile + 1) + gl.where(2 * tile > i, end, first)
    return gl.where(i * C.BM < n_queries, found, 0)


@jit
def between(x, most):
    """X, at least 0 and at most so much."""
    return gl.minimum(gl.maximum(x, 0), most)


@jit
def await_count(count, least):
    """Has this warp wait until so many programs have added."""
    # All lanes go on together, even if one of them should have read it before another.
    poll: gl.constexpr = (
        "{ .reg .pred less; again: ld.relaxed.gpu.global.s32 $0, [$1]; "
        "setp.lt.s32 less, $0, $2; vote.sync.any.pred less, less, -1; @less bra again; }"
    )
    gl.inline_asm_elementwise(
        poll, "=&r,l,r", [count.to(gl.int64), least], dtype=gl.int32, is_pure=False, pack=1
    )


@jit
def await_additions():
    """Waits until the copy engine has done what this warp told it to."""
    wait: gl.constexpr = "cp.async.bulk.wait_group 0; mov.u32 $0, $1;"
    gl.inline_asm_elementwise(wait, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


@jit
def count_one(count):
    """Counts an addition that this warp knows of, once all programs see it."""
    # `elect`, and not a thread's number: reading that costs the consumers registers.
    one: gl.constexpr = (
        "{ .reg .pred first; elect.sync _|first, -1; "
        "@first red.release.gpu.global.add.s32 [$1], 1; mov.u32 $0, 0; }"
    )
    gl.inline_asm_elementwise(
        one, "=r,l", [count.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )
