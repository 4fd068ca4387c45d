"""From products to scores, on the device: the cap, and terms that a kernel is composed of.

The score of query i and key j is cap(q_i . k_j * scale) + the sum of the terms, in natural units. A
term is a function that adds its bias to a tile of scores. It is given the tile's queries i and keys
j as index tensors that broadcast to the tile, so that the same function serves tiles [queries,
keys] and tiles [keys, queries]; both are clamped to what exists, and no load needs a mask.

What all terms may read is one record, `score` = (factor, cap, batch, n_queries, n_keys, terms,
bias_batch, bias_head, bias_row, table_row): the products' factor, which is scale / cap if there is
a cap, and in `terms` a tuple of pointers for each term.
"""

import triton
import triton.language as tl

from flashpatch_kernels.triton.tiles import LOG2E


@triton.jit
def scores(product, i, j, head, score, C: tl.constexpr, TERMS: tl.constexpr):
    """Scores of products, and the hyperbolic tangent that the cap took of them."""
    s = product * score[0]
    t = s
    if C.CAP:
        t = tanh(s, C)
        s = t * score[1]
    for x in tl.static_range(len(TERMS)):
        s = TERMS[x](s, i, j, head, score, score[5][x])
    return s, t


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


@triton.jit
def bias_at(score, head, pointers):
    """The bias of a head: a pointer to its row 0."""
    at = tl.cast(score[2], tl.int64) * score[6] + tl.cast(head, tl.int64) * score[7]
    return pointers[0] + at


@triton.jit
def add_bias(s, i, j, head, score, pointers):
    """The bias of a pair: bias[b, h, i, j]."""
    at = bias_at(score, head, pointers) + (i.to(tl.int64) * score[8] + j)
    return s + tl.load(at).to(tl.float32)


@triton.jit
def add_key_bias(s, i, j, head, score, pointers):
    """The bias of a key: bias[b, h, 0, j]."""
    return s + tl.load(bias_at(score, head, pointers) + j).to(tl.float32)


@triton.jit
def add_table(s, i, j, head, score, pointers):
    """The bias of a distance, from copies of the table for tiles [queries, keys].

    Copy r serves the queries i with i % 8 = r and is shifted by r entries, so that what a query
    reads of it begins at a multiple of 8 entries and is loaded as vectors.
    """
    row = score[9]
    r = i % 8
    first = tl.multiple_of(r * row - (i - r), (8, 8))
    at = pointers[0] + tl.cast(head, tl.int64) * 8 * row + (first + j)
    return s + tl.load(at).to(tl.float32)


@triton.jit
def add_table_transposed(s, i, j, head, score, pointers):
    """The bias of a distance, from copies of the reversed table for tiles [keys, queries]."""
    row = score[9]
    r = j % 8
    first = tl.multiple_of(r * row - (j - r), (8, 8))
    at = pointers[0] + tl.cast(head, tl.int64) * 8 * row + (first + i)
    return s + tl.load(at).to(tl.float32)
