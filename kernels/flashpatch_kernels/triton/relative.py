"""Vectors by distance: products with the embeddings that the pairs of a tile meet.

The pairs of a tile, of BM queries from m and BN keys from n, have BM + BN - 1 distances j - i. The
embeddings of those, from distance n - m - (BM - 1) on, are the tile's window, [W, E], and the pair
of query m + r and key n + c has its entry c - r + BM - 1. So no pair has a vector of its own:
    x_i . w(i, j)        = (x window^T)[r, c - r + BM - 1]      x [BM, E]
    y_j . u(i, j)        = (window y^T)[c - r + BM - 1, c]      y [BN, E]
    sum_j p_ij z(i, j)   = (p' window)[r]                       p'[r, d] = p[r, d + r - (BM - 1)]
Functions that kernels call take the record `score` of `scores`. Its last entry belongs to this
module: (vectors, w_head, w_first, w_entries, u_head, u_first, u_entries, z_head, z_first,
z_entries), with vectors = ((x, w), (y, u), (z,)), of which those that a call has not are empty.

Letters: those of `Options`, x . w of relative queries, y . u of relative keys, z of relative
values; B batch, H query heads, N queries, M keys, T embeddings of E elements, read EB at a time;
W = 2 max(BM, BN).

Source: Shaw et al. (2018), section 3.3; Huang et al., Music Transformer (2018), section 3.4.1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.options import Options, Relative
from flashpatch_kernels.triton import tiles


def arguments(options: Options, dtype: torch.dtype) -> tuple[Any, ...]:
    """The tensors of a call, and the head stride, first distance and number of its embeddings."""
    every = (options.relative_queries, options.relative_keys, options.relative_values)
    if every == NONE:
        return NOTHING
    vectors: list[tuple[Tensor, ...]] = []
    numbers: list[int] = []
    for relative in every:
        vectors.append(() if relative is None else _tensors(relative, dtype))
        numbers += (0, 0, 1) if relative is None else _numbers(relative)
    return tuple(vectors), *numbers


NONE = (None, None, None)
NOTHING = ((), (), ()), *(0, 0, 1) * 3


def _tensors(relative: Relative, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Vectors, where there are some, and embeddings, of the type of q and without gaps."""
    both = (relative.vectors, relative.embeddings)
    return tuple(x.to(dtype).contiguous() for x in both if x is not None)


def _numbers(relative: Relative) -> tuple[int, int, int]:
    heads, entries, size = relative.embeddings.shape
    return 0 if heads == 1 else entries * size, relative.first, entries


@triton.jit
def add_terms(s, m, n, head, score, TRANSPOSED: tl.constexpr, C: tl.constexpr):
    """Adds x_i . w(i, j) and y_j . u(i, j) to a tile, [keys, queries] if TRANSPOSED."""
    if C.X > 0:
        x, w = query_vectors(head, score, C), query_embeddings(m, n, head, score, C)
        s += products(x, m, score[5], w, TRANSPOSED, TRANSPOSED, C.BM, C.X, C)
    if C.Y > 0:
        y, u = key_vectors(head, score, C), key_embeddings(m, n, head, score, C)
        s += products(y, n, score[6], u, not TRANSPOSED, TRANSPOSED, C.BN, C.Y, C)
    return s


@triton.jit
def add_value_products(dp, do, m, n, head, score, TRANSPOSED: tl.constexpr, C: tl.constexpr):
    """Adds dO_i . z(i, j) to a tile, [keys, queries] if TRANSPOSED."""
    z = value_window(m, n, head, score, C)
    if TRANSPOSED:
        return dp + of_pairs(tiles.inner(z, do, C), True, True, C)
    else:
        return dp + of_pairs(tiles.inner(do, z, C), False, False, C)


@triton.jit
def add_values(acc, p, m, n, head, score, C: tl.constexpr):
    """Adds sum_j p_ij z(i, j): [BM, Dv] from p [BM, BN]."""
    z = value_window(m, n, head, score, C)
    return tiles.add_product(acc, by_query_and_distance(p, C), z, C)


@triton.jit
def query_vectors(head, score, C: tl.constexpr):
    """The vectors x of the queries of a head: [N, E]."""
    of_head = tl.cast(score[2], tl.int64) * score[4] + head
    return score[15][0][0][0] + of_head * score[5] * C.X


@triton.jit
def key_vectors(head, score, C: tl.constexpr):
    """The vectors y of the keys of a head: [M, E]."""
    of_head = tl.cast(score[2], tl.int64) * score[4] + head
    return score[15][0][1][0] + of_head * score[6] * C.Y


@triton.jit
def query_embeddings(m, n, head, score, C: tl.constexpr):
    """The embeddings w of a head, as `window` takes them."""
    distant = score[15]
    first = n - m - (C.BM - 1) - distant[2]
    return distant[0][0][1] + tl.cast(head, tl.int64) * distant[1], first, distant[3]


@triton.jit
def key_embeddings(m, n, head, score, C: tl.constexpr):
    """The embeddings u of a head, as `window` takes them."""
    distant = score[15]
    first = n - m - (C.BM - 1) - distant[5]
    return distant[0][1][1] + tl.cast(head, tl.int64) * distant[4], first, distant[6]


@triton.jit
def value_window(m, n, head, score, C: tl.constexpr):
    """The embeddings z that a tile meets: [W, V0], [W, V1]."""
    distant = score[15]
    first = n - m - (C.BM - 1) - distant[8]
    z = (distant[0][2][0] + tl.cast(head, tl.int64) * distant[7], first, distant[9])
    if C.V1 > 0:
        return (window(z, 0, C.V0, C.DV, C), window(z, C.V0, C.V1, C.DV, C))
    else:
        return (window(z, 0, C.V0, C.DV, C),)


@triton.jit
def window(embeddings, column, WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr):
    """Columns column .. column + WIDTH of the embeddings that a tile meets: [W, WIDTH].

    `embeddings` are those of a head, [T, E], which of them has the tile's first distance, and T.
    Beyond either end stands that of the end, beyond E zero.
    """
    base, first, entries = embeddings
    row = tl.minimum(tl.maximum(first + tl.arange(0, C.W), 0), entries - 1)[:, None]
    c = column + tl.arange(0, WIDTH)[None, :]
    if E % WIDTH == 0:
        return tl.load(base + (row * E + c))
    else:
        return tl.load(base + (row * E + c), mask=c < E, other=0.0)


@triton.jit
def vectors(x, start, n_rows, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """Rows start .. and columns column .. of [n_rows, E], zero beyond either: [ROWS, WIDTH]."""
    row = (start + tl.arange(0, ROWS))[:, None]
    c = column + tl.arange(0, WIDTH)[None, :]
    inside = row < n_rows
    if E % WIDTH != 0:
        inside = inside & (c < E)
    return tl.load(x + (row.to(tl.int64) * E + c), mask=inside, other=0.0)


@triton.jit
def products(
    x, start, n_rows, embeddings,
    SWAPPED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The product of the vector and the embedding of every pair, as `of_pairs` gives it.

    The vectors are the rows start .. start + ROWS of x [n_rows, E], the tile's queries or its keys.
    """
    if SWAPPED:
        every = tiles.zeros(C.W, ROWS, 0)[0]
        for e in tl.range(0, E, C.EB):
            rows = vectors(x, start, n_rows, e, ROWS, C.EB, E)
            every = tiles.dot(window(embeddings, e, C.EB, E, C), rows.T, every, C)
    else:
        every = tiles.zeros(ROWS, C.W, 0)[0]
        for e in tl.range(0, E, C.EB):
            rows = vectors(x, start, n_rows, e, ROWS, C.EB, E)
            every = tiles.dot(rows, window(embeddings, e, C.EB, E, C).T, every, C)
    return of_pairs(every, SWAPPED, TRANSPOSED, C)


@triton.jit
def of_pairs(every, SWAPPED: tl.constexpr, TRANSPOSED: tl.constexpr, C: tl.constexpr):
    """Of the products of a tile's vectors and window those of pairs: [BM, BN], or [BN, BM].

    Args:
        every: [rows, W], or [W, rows] if SWAPPED.
        TRANSPOSED: The tile is [keys, queries].
    """
    r = tl.arange(0, C.BM)
    c = tl.arange(0, C.BN)
    if TRANSPOSED:
        entry = c[:, None] - r[None, :] + (C.BM - 1)
    else:
        entry = c[None, :] - r[:, None] + (C.BM - 1)
    return tl.gather(every, entry, 0 if SWAPPED else 1)


@triton.jit
def by_query_and_distance(p, C: tl.constexpr):
    """A tile's numbers by the entry of the window that their pair has: [BM, BN] -> [BM, W]."""
    c = tl.arange(0, C.W)[None, :] + tl.arange(0, C.BM)[:, None] - (C.BM - 1)
    found = tl.gather(p, tl.minimum(tl.maximum(c, 0), C.BN - 1), 1)
    return tl.where((c >= 0) & (c < C.BN), found, 0.0)


@triton.jit
def by_distance_and_key(p, C: tl.constexpr):
    """A tile's numbers by the entry of the window that their pair has: [BM, BN] -> [W, BN]."""
    r = tl.arange(0, C.BN)[None, :] - tl.arange(0, C.W)[:, None] + (C.BM - 1)
    found = tl.gather(p, tl.minimum(tl.maximum(r, 0), C.BM - 1), 0)
    return tl.where((r >= 0) & (r < C.BM), found, 0.0)
