"""What every kernel of the backward pass reads of a query: its lse in base 2, and its delta.

`dq_kernel` makes them where it runs first; `stats_kernel` where it does not run, or where sums over
queries come before it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.triton import setups, tiles
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.plans import Steps
from flashpatch_kernels.triton.terms import Terms
from flashpatch_kernels.triton.tiles import LOG2E


@triton.jit
def make_stats(
    outs, do, lse, dlse, stats, n_rows, head, start, n_queries, C: tl.constexpr
):  # fmt: skip
    """Stores and gives what `load_stats` then reads of the queries start .. start + BM.

    A query that sees no key has lse = -inf; it becomes +inf, so that its p is 2^(-inf) = 0.
    """
    i = start + tl.arange(0, C.BM)
    at = tl.cast(head, tl.int64) * n_queries + i
    o = tiles.load(outs, 0, start, C.BM, C.DV, C.V0, C.V1, False, True)
    delta = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if C.V1 > 0:
        delta += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + at, mask=i < n_queries, other=0.0)
    lse = tl.load(lse + at, mask=i < n_queries, other=float("-inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    tl.store(stats + at, lse, mask=i < n_queries)
    tl.store(stats + n_rows + at, delta, mask=i < n_queries)
    return lse, delta


@kernel
def stats_kernel(
    O, DO, LSE, DLSE, STATS,
    o_batch, o_head, o_row, do_batch, do_head, do_row, n_heads, n_queries, n_rows,
    C: tl.constexpr,
):  # fmt: skip
    """Per query what the others read: STATS[0] = lse in base 2, STATS[1] = delta."""
    n_tiles = tl.cdiv(n_queries, C.BM)
    bh = tl.program_id(0) // n_tiles
    start = (tl.program_id(0) % n_tiles) * C.BM
    b = tl.cast(bh // n_heads, tl.int64)
    h = tl.cast(bh % n_heads, tl.int64)
    O += (b * o_batch + h * o_head) * C.UNIT
    DO += (b * do_batch + h * do_head) * C.UNIT
    outs = tiles.matrices(O, 0, o_row * C.UNIT, 1, n_queries, C.BM, C.DV, C.V0, C.V1, False)
    douts = tiles.matrices(DO, 0, do_row * C.UNIT, 1, n_queries, C.BM, C.DV, C.V0, C.V1, False)
    do = tiles.load(douts, 0, start, C.BM, C.DV, C.V0, C.V1, False, True)
    make_stats(outs, do, LSE, DLSE, STATS, n_rows, bh, start, n_queries, C)


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


class Shared(NamedTuple):
    """What the launches of one backward pass share.

    Attributes:
        inputs: q, k, v and dout.
        strides: Theirs, as `Setup.strides` gives them.
        stats: Base-2 lse and delta of every query, fp32 [2, B, H, N]; or [3, B, H, N], see
            `row_sums`.
        steps: What launches are made by.
    """

    call: setups.Setup
    added: Terms
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    strides: list[int]
    stats: Tensor
    steps: Steps


def compute_stats(shared: Shared, out: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
    """Writes `shared.stats`."""
    call, stats, dout = shared.call, shared.stats, shared.inputs[3]
    n_batch, n_heads, _, n_queries, _ = call.sizes
    tile, fixed = call.tuned("stats")
    shared.steps.launch(
        stats_kernel,
        setups.cdiv(n_queries, tile.BM) * n_batch * n_heads,
        tile,
        *(out, dout, lse, dlse, stats),
        *call.strides(out, dout),
        *(n_heads, n_queries, lse.numel(), fixed),
    )
