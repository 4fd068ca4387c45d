"""From products to scores, on the device: the cap, and the terms that a kernel is composed of.

The score of query i and key j is cap(q_i . k_j * scale) + the sum of the terms, in natural units.
A term is three functions (`slopes`, `table` and `bias` each have theirs, see `terms.Term`):
* `open` prepares what it reads, once in a program: its source;
* `add` adds it to a tile of scores [queries, keys];
* `add_transposed` to one [keys, queries].
They are given where the tile lies: i and j, the queries and keys as index tensors that broadcast to
it, clamped to what exists so that no load needs a mask; m and n, its first query and key.

A user's function, and its derivative if it has one, are the last of the terms, C.OWN of them; what
they are given is told in `options.Score`. It comes between the cap and the other terms.

What all terms may read is one record, `score` = (factor, cap, batch, n_batch, n_heads, n_queries,
n_keys, bias_batch, bias_head, bias_row, table_rows, table_row, first, last, offset, distant): the
products' factor, which is scale / cap if there is a cap; strides of a bias; how many rows of how
many entries a table or its copies have for a head, and the distances at which it begins and ends;
the place of query 0 among the keys; and what belongs to vectors by distance, which are products
themselves and stand in `relative`.
"""

import triton
import triton.language as tl

from flashpatch_kernels.triton import relative
from flashpatch_kernels.triton.tiles import LOG2E


@triton.jit
def of_row(score, batch):
    """The record for another row of the batch."""
    return score[:2] + (batch,) + score[3:]


@triton.jit
def opened(
    score, head, start, pointers,
    OPENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sources of all terms, for a program's tiles [ROWS, COLUMNS].

    `head` is its first head, `start` the first query or key of its rows.
    """
    sources = ()
    for x in tl.static_range(len(OPENS)):
        sources = sources + (OPENS[x](score, head, start, pointers[x], ROWS, COLUMNS),)
    return sources


@triton.jit
def scores(product, i, j, m, n, head, level, score, sources, C: tl.constexpr, ADDS: tl.constexpr):
    """Scores of products, and the hyperbolic tangent that the cap took of them.

    `level` is what terms add that is known already: a number, a tile or None.
    """
    s = product * score[0]
    t = s
    if C.CAP:
        t = tanh(s, C)
        s = t * score[1]
    if C.OWN > 0:
        arguments = sources[len(ADDS) - C.OWN]
        s = ADDS[len(ADDS) - C.OWN](s, i, j, score[2], head, arguments).to(tl.float32)
    if level is not None:
        s = s + level
    for x in tl.static_range(len(ADDS) - C.OWN):
        s = ADDS[x](s, i, j, m, n, head, score, sources[x])
    if C.X > 0 or C.Y > 0:
        s = relative.add_terms(s, m, n, head, score, i.shape[0] == 1, C)
    return s, t


@triton.jit
def nothing(s, i, j, m, n, head, score, source):
    """The `add` of a term that is taken into account elsewhere."""
    return s


@triton.jit
def product_gradient(ds, t, i, j, head, score, sources, C: tl.constexpr, ADDS: tl.constexpr):
    """The gradient of products * scale from that of their scores; t as `scores` gave it."""
    if C.OWN == 2:
        s = t * score[1] if C.CAP else t
        arguments = sources[len(ADDS) - 1]
        ds = ADDS[len(ADDS) - 1](s, i, j, score[2], head, arguments, ds).to(tl.float32)
    if C.CAP:
        ds = ds * (1 - t * t)
    return ds


@triton.jit
def open_arguments(score, head, start, pointers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What a user's function reads."""
    return pointers


@triton.jit
def tanh(x, C: tl.constexpr):
    """The hyperbolic tangent: one instruction where an error of 2^-11 is below the type's."""
    if C.APPROXIMATE:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.math.exp2(tl.abs(x) * (-2 * LOG2E))
        t = (1 - e) / (1 + e)
        return tl.where(x < 0, -t, t)
