"""The weights of a tile of keys and queries once more, for the gradients of keys."""

from flashpatch_kernels.hopper.gluon import gl, jit
from flashpatch_kernels.triton import scores


@jit
def weights(
    st, lse, j, tile, head, place, mask, score, sources, to_log2,
    ROWS: gl.constexpr, SEEN: gl.constexpr, RUNS: gl.constexpr,
    ADDS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """P^T from products [R, BM] of the keys j [R] and a tile of queries.

    `place` is (sizes, the tiles t1 .. t2 of queries that see all these keys, whether those must be
    looked at as well, batch).

    Returns:
        P^T [R, BM], and what `scores.product_gradient` asks for: t, row, column.
    """
    sizes, t1, t2, always, batch = place
    n_queries, n_keys = sizes[3], sizes[4]
    queries: gl.constexpr = gl.SliceLayout(0, st.type.layout)
    i = tile * C.BM + gl.arange(0, C.BM, queries)
    inside = gl.minimum(i, n_queries - 1)
    row = gl.expand_dims(inside, 0)
    column = gl.expand_dims(j, 1)
    t = st
    if not C.PLAIN:  # no term of these kernels reads by j, which may be beyond the last key
        st, t = scores.scores(st, row, column, 0, 0, head, None, score, sources, C, ADDS)
    pt = gl.exp2(st * to_log2 - gl.expand_dims(lse, 0))
    if always | (tile < t1) | (tile >= t2):
        lo, hi = ROWS(mask, batch, inside, n_queries, n_keys)
        seen = SEEN(
            gl.expand_dims(lo, 0), gl.expand_dims(hi, 0), row, column, mask, batch, head,
            n_queries, n_keys, RUNS,
        )  # fmt: skip
        pt = gl.where(seen, pt, 0.0)
    return pt, t, row, column
