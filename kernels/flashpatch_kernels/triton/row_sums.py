"""What the backward pass reads of a query in float32, as exact as its scores are.

The output and the lse are rounded, and what a query's are off by, all its weights and ds are: the
sum of its ds, which is dlse, is off by more than PyTorch's, which takes delta from the weights and
dp themselves. Gradients of terms that many pairs share are made of such sums. So two are taken anew
here, by the arithmetic of the kernels that follow:
    total = sum_j p_ij + the sink's p        delta = sum_j p_ij dp_ij / total - dlse
and lse becomes the one of which the weights sum to 1. What is left of its rounding is a factor on
weights and ds that those apply which sum over whole queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.triton import setups, tiles
from flashpatch_kernels.triton.stats import Shared
from flashpatch_kernels.triton.sums import Walk, own_tile, query_place, query_steps, sum_ds
from flashpatch_kernels.triton.term_gradients import sink_weights, visible


@triton.jit
def start_rows(C: tl.constexpr):
    """Two numbers for each query, 0."""
    return tiles.column(C.BM), tiles.column(C.BM)


@triton.jit
def add_rows(acc, p, ds, weights, do, m, n, head, score, C: tl.constexpr):
    """Adds the sums of ds and of p."""
    return acc[0] + tl.sum(ds, 1), acc[1] + tl.sum(p, 1)


@triton.jit
def finish_rows(walk, pid, acc, out, n_queries, n_keys, C: tl.constexpr):
    """Stores both sums, [2, B, H, N]; walk[3] = B H N."""
    bh, m = own_tile(walk, pid, n_queries, C.BM)
    i = m + tl.arange(0, C.BM)
    at = out + tl.cast(bh, tl.int64) * n_queries + i
    tl.store(at, acc[0], mask=i < n_queries)
    tl.store(at + tl.cast(walk[3], tl.int64), acc[1], mask=i < n_queries)


def exact(shared: Shared, dlse: Tensor | None) -> Shared:
    """The same with stats [3, B, H, N]: lse in base 2, delta, and the factor that is left."""
    call, stats = shared.call, shared.stats
    n_batch, n_heads, _, n_queries, n_keys = call.sizes
    tile, _ = call.tuned("sums")
    low, high = visible(call.options.mask, 1 - n_queries, n_keys - 1)
    sums = torch.empty_like(stats)
    n_programs = n_batch * n_heads * setups.cdiv(n_queries, tile.BM)
    numbers = (low, high, 1, stats[0].numel())
    functions = (query_steps, query_place, finish_rows, None, numbers)
    sum_ds(shared, sums, Walk(*functions, n_programs, start_rows, add_rows))
    (lse, delta), (sum_ds_, total) = stats, sums
    mean = sum_ds_ + delta * total
    if call.options.sinks is not None:
        total = total + sink_weights(stats, call.options.sinks)
    total = torch.where(total > 0, total, 1)  # of queries that see nothing
    more = torch.log2(total)
    new = lse + more
    delta = mean / total if dlse is None else mean / total - dlse
    # What rounding took from the sum of two numbers of which the first is the larger.
    left = torch.where(new == torch.inf, 0, lse - new + more)
    return shared._replace(stats=torch.stack((new, delta, torch.exp2(left.neg()))))
