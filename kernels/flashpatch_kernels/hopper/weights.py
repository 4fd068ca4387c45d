"""From products to scores and weights, and what of a query these are taken by.

A cap to which nothing is added is part of the factor from scores to base 2 (`crews.to_log2`).
"""

from flashpatch_kernels.hopper import table
from flashpatch_kernels.hopper.gluon import gl, jit
from flashpatch_kernels.triton import scores
from flashpatch_kernels.triton.tiles import LOG2E


@jit
def read_stats(STATS, head, row, n_rows, n_queries, C: gl.constexpr):
    """Base-2 lse and delta of a tile of queries; beyond the last, P becomes 0."""
    i = row + gl.arange(0, C.BM, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    at = STATS + head.to(gl.int64) * n_queries + i
    lse = gl.load(at, mask=i < n_queries, other=float("inf"))
    return lse, gl.load(at + n_rows, mask=i < n_queries, other=0.0)


@jit
def scored(
    s, row, column, m, n, head, of_keys, bias, score, sources, C: gl.constexpr, ADDS: gl.constexpr
):
    """Scores of products of a tile, but for a cap that is part of the factor.

    The tile begins with query m and key n, and keys may be beyond the last, because no term of
    these kernels reads by their numbers; `of_keys` are their biases beside the tile, if there
    are any.

    Returns:
        The scores, and the hyperbolic tangent that a cap took of the products.
    """
    level = None
    if len(of_keys) > 0:
        level = of_keys[0]
    s, t = scores.scores(s, row, column, m, n, head, level, score, sources, C, ADDS)
    entries = table.entries(bias, m, n, head, score, s.shape[1], row.shape[0] == 1, C)
    if len(entries) > 0:
        s = s + entries[0]
    return s if len(ADDS) + len(of_keys) + len(entries) > 0 else t, t


@jit
def weights(
    st, lse, j, n, of_keys, bias, tile, head, place, mask, score, sources, to_log2,
    ROWS: gl.constexpr, SEEN: gl.constexpr, RUNS: gl.constexpr,
    ADDS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """P^T from products [R, BM] of the keys j [R], from n on, and a tile of queries.

    `place` is (sizes, the tiles t1 .. t2 of queries that see all these keys, whether those must be
    looked at as well, batch); the biases of keys [R, 1] and `bias` as in `biases`.

    Returns:
        P^T [R, BM], and what dP^T is multiplied by: P^T times the derivative of scores by products.
    """
    sizes, t1, t2, always, batch = place
    n_queries, n_keys = sizes[3], sizes[4]
    queries: gl.constexpr = gl.SliceLayout(0, st.type.layout)
    i = tile * C.BM + gl.arange(0, C.BM, queries)
    inside = gl.minimum(i, n_queries - 1)
    row = gl.expand_dims(inside, 0)
    column = gl.expand_dims(j, 1)
    t = st
    less = gl.expand_dims(lse, 0)
    if not C.PLAIN:
        st, t = scored(
            st, row, column, tile * C.BM, n, head, of_keys, bias, score, sources, C, ADDS
        )
    elif len(of_keys) > 0:
        less = less - of_keys[0] * LOG2E
    pt = gl.exp2(st * to_log2 - less)
    if always | (tile < t1) | (tile >= t2):
        lo, hi = ROWS(mask, batch, inside, n_queries, n_keys)
        seen = SEEN(
            gl.expand_dims(lo, 0), gl.expand_dims(hi, 0), row, column, mask, batch, head,
            n_queries, n_keys, RUNS,
        )  # fmt: skip
        pt = gl.where(seen, pt, 0.0)
    factor = pt
    if not C.PLAIN:
        factor = scores.product_gradient(pt, t, row, column, head, score, sources, C, ADDS)
    return pt, factor
