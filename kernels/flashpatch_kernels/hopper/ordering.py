"""In which order programs add to a tile of dQ, where that is to be the same every time.

A count of each tile of queries tells how many programs have added to it; one that is not the next
waits. Programs of one head run at the same time and keep step, so that an order costs little where
it is the one in which they come by themselves: where every query sees every key, the t-th tile of
keys begins with the 2t-th tile of queries (`scheduling.course`), and so they come to each of these
two steps after each other. What comes in an earlier turn comes before.

No program waits for a step that comes later than its own in this order, and each takes its steps
in it; so there is always one that goes on, provided that all run, as a cooperative launch warrants.

Letters: n tiles of keys of BN, m of queries of BM = BN / 2; those of a head.

Source: the `dq_semaphore` of flash-attention (hopper/mainloop_bwd_sm90_tma_gmma_ws.hpp), whose
programs add in the order of their keys.
"""

from flashpatch_kernels.hopper.gluon import barrier, gl, jit


@jit
def rank(i, turn, tile, bh, n):
    """How many of n tiles of keys are added to the i-th tile of queries before this one.

    `bh` is the head of these keys, and `turn` that of this program which they are for.
    """
    programs = gl.num_programs(0)
    # The tiles of this head that have the same turn: first .. end, in each program another.
    before = turn * programs - bh * n
    first = gl.minimum(gl.maximum(before, 0), n)
    end = gl.minimum(gl.maximum(before + programs, 0), n)
    # Those up to `begun` have gone on to the i-th from a place before it, the last of them first.
    begun = gl.minimum(gl.maximum(i // 2 + 1, first), end)
    return begun - (tile + 1) + gl.where(2 * tile > i, end, first)


@jit
def read_count(count):
    """How many programs have added."""
    text: gl.constexpr = "ld.relaxed.gpu.global.s32 $0, [$1];"
    return gl.inline_asm_elementwise(
        text, "=r,l", [count.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@jit
def look_up(counts, head, i, n_queries, C: gl.constexpr):
    """Where the count of a head's i-th tile of queries is, if they are counted, and what it is."""
    if len(counts) > 0:
        of_head = head.to(gl.int64) * gl.cdiv(n_queries, C.BM)
        count = counts[0] + (of_head + i)
        return count, read_count(count)
    else:
        return (), 0


@jit
def await_count(count, found, least):
    """Waits until so many programs have added, of which some were found before."""
    while found < least:
        found = read_count(count)


@jit
def tell_count(count, added):
    """Tells how many programs have added, once the copy engine has done so for this one.

    What it has added is in memory then, where others add. To release it as well would be to wait
    for all that this thread has ever written, half a microsecond a step.
    """
    wait: gl.constexpr = "cp.async.bulk.wait_group 0; mov.u32 $0, $1;"
    gl.inline_asm_elementwise(wait, "=r,r", [added], dtype=gl.int32, is_pure=False, pack=1)
    barrier()
    tell: gl.constexpr = (
        "{ .reg .pred first; .reg .u32 x; mov.u32 x, %tid.x; and.b32 x, x, 127; "
        "setp.eq.u32 first, x, 0; @first st.relaxed.gpu.global.s32 [$1], $2; mov.u32 $0, $2; }"
    )
    gl.inline_asm_elementwise(
        tell, "=r,l,r", [count.to(gl.int64), added], dtype=gl.int32, is_pure=False, pack=1
    )
