"""Vectors by distance, for engine `tiled`: products of matrices, and views that skew their rows.

A tile of R queries and W keys meets L = R + W - 1 distances. Its queries run backwards, so that row
r and key w meet distance r + w of them. Products of the queries' vectors with the embeddings of all
these distances, [R, L], have that of the pair (r, w) in row r at r + w: the pairs are a view of
them, with strides (L + 1, 1). The way back: numbers of pairs are written through such a view of
zeros, and are then numbers [R, L] of queries and distances, to be multiplied by embeddings or by
vectors. With vectors of keys it is row w at r + w of [W, L], of strides (1, L + 1).

Distances beyond the ends of the embeddings share that of the end. The products are of the n
embeddings that a tile meets, and only then are those at the ends repeated. Far from the diagonal
that is one embedding, and nothing is skewed.

Letters: B batch, H heads computed together, N queries, M keys, T embeddings, E elements of each,
A the vectors of a tile: R of its queries or W of its keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashpatch_kernels.buffers import Buffers
from flashpatch_kernels.options import Options, Relative


class Term:
    """A `Relative` of H heads of one batch row: what a tile of queries and keys takes of it."""

    def __init__(
        self, name: str, relative: Relative, b: int, heads: slice, buffers: Buffers
    ) -> None:
        self.name, self.b, self.buffers = name, b, buffers
        self.of_keys = name == "key"
        self.heads = heads
        self.first, self.vectors = relative.first, relative.vectors
        # Products with one matrix are faster than with one that is repeated for every head.
        embeddings = relative.embeddings
        embeddings = embeddings[0] if embeddings.shape[0] == 1 else embeddings[heads]
        self.embeddings = embeddings.to(buffers.dtype)  # [T, E] or [H, T, E]

    def tile(self, i0: int, i1: int, j0: int, j1: int) -> "Tile":
        """The tile of queries i0..i1 and keys j0..j1."""
        R, W = i1 - i0, j1 - j0
        last, L = self.embeddings.shape[-2] - 1, R + W - 1
        start = j0 - (i1 - 1) - self.first  # the entry of the tile's least distance, if it exists
        lo, hi = (min(max(entry, 0), last) for entry in (start, start + L - 1))
        before = min(max(-start, 0), L - 1)
        place = slice(j0, j1) if self.of_keys else slice(i0, i1)
        return Tile(self, R, W, slice(lo, hi + 1), before, place)

    def part(self, x: Tensor, place: slice) -> Tensor:
        """A tile's part of x [B, H, N or M, E], as a view, in its own order."""
        return x[self.b, self.heads, place]

    def ordered(self, x: Tensor) -> Tensor:
        """Vectors [H, A, E] in the tile's order, or from it."""
        return x if self.of_keys else x.flip(1)


@dataclass(frozen=True)
class Tile:
    """R queries and W keys, and the entries that their distances have.

    Attributes:
        entries: Of the embeddings, n of them.
        before: How many distances of the tile lie before the first entry.
        place: The tile's queries, or the keys if the vectors are theirs.
    """

    term: Term
    R: int
    W: int
    entries: slice
    before: int
    place: slice

    @property
    def embeddings(self) -> Tensor:
        """Those that the tile meets: [n, E] or [H, n, E]."""
        return self.term.embeddings[..., self.entries, :]

    def vectors(self) -> Tensor:
        """The vectors of the tile's queries or keys: [H, A, E]."""
        assert self.term.vectors is not None
        x = self.term.ordered(self.term.part(self.term.vectors, self.place))
        return x.to(self.term.buffers.dtype)

    def products(self, x: Tensor) -> Tensor:
        """The tile's x . w(i, j), from x [H, A, E]: broadcasts to [H, R, W]."""
        embeddings = self.embeddings
        shape = (*x.shape[:2], embeddings.shape[-2])
        y = self.term.buffers.get("products", shape)  # [H, A, n]
        torch.matmul(x, embeddings.transpose(-1, -2), out=y)
        if shape[2] == 1:
            return y.transpose(1, 2) if self.term.of_keys else y
        after = self._length - self.before - shape[2]
        if self.before or after:
            y = pad(y, (self.before, after), mode="replicate")
        return self._pairs(y)

    def by_entry(self, pairs: Tensor) -> Tensor:
        """Numbers of pairs [H, R, W] summed by vector and entry: [H, A, n]."""
        n = self.entries.stop - self.entries.start
        if n == 1:
            sums = pairs.sum(1 if self.term.of_keys else 2)
            return sums[..., None]
        name, length = ("by key", self.W) if self.term.of_keys else ("by query", self.R)
        y = self.term.buffers.zeros(name, (pairs.shape[0], length, self._length))
        self._pairs(y).copy_(pairs)
        if n == self._length:
            return y
        left, middle, right = y.split((self.before, n, self._length - self.before - n), dim=2)
        middle = middle.clone()
        middle[..., 0] += left.sum(2)
        middle[..., -1] += right.sum(2)
        return middle

    def values(self, weights: Tensor) -> Tensor:
        """The sum of the embeddings of a query's pairs, by weights [H, R, W]: [H, R, E]."""
        return self.by_entry(weights) @ self.embeddings

    def add_gradients(
        self, sums: Mapping[str, Tensor], dpairs: Tensor, x: Tensor | None = None
    ) -> None:
        """Adds to the term's `sums` what follows from the gradient [H, R, W] of `products(x)`."""
        term = self.term
        vectors, embeddings = (
            sums.get(f"{term.name}_{part}") for part in ("vectors", "embeddings")
        )
        if vectors is None and embeddings is None:
            return
        dy = self.by_entry(dpairs)
        if vectors is not None:
            part = term.part(vectors, self.place)
            part += term.ordered(dy @ self.embeddings)
        if embeddings is not None:
            x = self.vectors() if x is None else x
            if embeddings.shape[0] == 1:
                embeddings, dy, x = embeddings[0], dy.flatten(0, 1), x.flatten(0, 1)
            else:
                embeddings = embeddings[term.heads]
            embeddings[..., self.entries, :] += dy.transpose(-1, -2) @ x

    @property
    def _length(self) -> int:
        return self.R + self.W - 1

    def _pairs(self, y: Tensor) -> Tensor:
        """The pairs [H, R, W] of y [H, A, L], as a view."""
        skew = y.shape[2] + 1
        strides = (1, skew) if self.term.of_keys else (skew, 1)
        return y.as_strided((y.shape[0], self.R, self.W), (y.stride(0), *strides))


def largest_matrix(options: Options, rows: int, keys: int) -> int:
    """Numbers of a head's largest matrix in a tile of so many queries and keys."""
    relative = (options.relative_queries, options.relative_keys, options.relative_values)
    if all(x is None for x in relative):
        return rows * keys
    vectors = rows if options.relative_keys is None else max(rows, keys)
    return vectors * (rows + keys - 1)
