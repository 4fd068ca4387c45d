"""Heads computed together, for engine `tiled`: their tiles, scores and sums of gradients.

Letters as in `tiled`, which has the algorithm.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashpatch_kernels import dropout
from flashpatch_kernels.buffers import Buffers
from flashpatch_kernels.masks import Boolean, Intervals, Mask
from flashpatch_kernels.options import Options, Relative
from flashpatch_kernels.tiled_masks import Rows, TileMask
from flashpatch_kernels.tiled_relative import Term, Tile


@dataclass(frozen=True)
class Unit:
    """What scores are counted in: how many make up 1, and the functions of such numbers."""

    per_one: float
    exp_: Callable[[Tensor], Tensor]
    log: Callable[[Tensor], Tensor]


BINARY = Unit(math.log2(math.e), Tensor.exp2_, Tensor.log2)
NATURAL = Unit(1.0, Tensor.exp_, Tensor.log)


def accumulator(q: Tensor) -> torch.dtype:
    """What tiles are computed in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def unit_of(q: Tensor) -> Unit:
    """Of the scores of a call."""
    return NATURAL if q.dtype == torch.float64 else BINARY


@dataclass
class Shared:
    """What all heads of a call share: the tile's size, its buffers, the dropout's hashes."""

    rows: int
    keys: int
    options: Options
    buffers: Buffers
    table: Tensor | None = None  # of all distances, slopes included: [H, N + M - 1]
    row_hashes: Tensor | None = None  # [B, H, N]
    column_hashes: Tensor | None = None  # [ceil(M / 2)]


class Heads:
    """C key heads of one batch row and their G query heads each: what is computed together."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, shared: Shared, b: int, g0: int, g1: int
    ) -> None:
        self.b, self.g0, self.g1, self.shared = b, g0, g1, shared
        self.C, self.G = g1 - g0, q.shape[1] // k.shape[1]
        self.h0, self.h1 = g0 * self.G, g1 * self.G
        self.N, self.M = q.shape[2], k.shape[2]
        self.dtype, self.device, self.unit = accumulator(q), q.device, unit_of(q)
        self.k, self.v = (self._keys(x) for x in (k, v))  # [C, M, D], [C, M, Dv]
        self.mask = TileMask(self._of_this_mask(), self.N, self.M, self.device)
        self.softcap = shared.options.softcap
        self.table = self.sinks = self.bias = None
        if shared.table is not None:
            self.table = shared.table[self.h0 : self.h1].to(self.dtype) * self.unit.per_one
            self.table = self.table.contiguous()
        if shared.options.sinks is not None:
            self.sinks = shared.options.sinks[self.h0 : self.h1].to(self.dtype) * self.unit.per_one
        if shared.options.bias is not None:
            self.bias = self._of_these_heads(shared.options.bias)
        options = shared.options
        query = self._term("query", options.relative_queries)
        key = self._term("key", options.relative_keys)
        self.values = self._term("value", options.relative_values)
        self.added = [term for term in (query, key) if term is not None]
        self.backwards = self.table is not None or self.values is not None or bool(self.added)
        p = shared.options.dropout
        self.keep_probability = dropout.keep_probability(p) if p else 1.0

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        """The tile of x [B, H, N, E] as [C, G R, E], in the accumulator's dtype."""
        tile = self.ordered(x[self.b, self.h0 : self.h1, rows.i0 : rows.i1]).to(self.dtype)
        tile = tile.reshape(self.C, -1, x.shape[3])
        return tile if tile.stride(-1) == 1 else tile.contiguous()

    def put(self, x: Tensor, rows: Rows, tile: Tensor) -> None:
        """Stores a tile [C, G R, E] into x [B, H, N, E]."""
        part = x[self.b, self.h0 : self.h1, rows.i0 : rows.i1]
        part.copy_(self.ordered(tile.view(self.C * self.G, -1, x.shape[3])))

    def ordered(self, x: Tensor) -> Tensor:
        """Queries [C G, R, ...] in the tile's order, or from it."""
        return x.flip(1) if self.backwards else x

    def put_keys(self, x: Tensor, total: Tensor) -> None:
        """Stores [C, E, M] into x [B, H_kv, M, E]."""
        x[self.b, self.g0 : self.g1] = total.transpose(1, 2)

    def add_product(self, total: Tensor, x: Tensor, tile: Tensor, j0: int, j1: int) -> None:
        """Adds x^T tile, of x [C, G R, E] and a tile [C, G R, W], to total [C, E, M]."""
        part = self.buffer("part", (self.C, x.shape[2], j1 - j0))
        total[:, :, j0:j1].add_(torch.bmm(x.transpose(1, 2), tile, out=part))

    def row_tiles(self) -> Iterator[Rows]:
        """The tiles of queries."""
        for i0 in range(0, self.N, self.shared.rows):
            yield self.mask.rows(i0, min(i0 + self.shared.rows, self.N))

    def key_tiles(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """The tiles of keys that these queries visit. They start at even keys, for dropout."""
        for j0 in range(rows.start - rows.start % 2, rows.stop, self.shared.keys):
            yield j0, min(j0 + self.shared.keys, rows.stop)

    def first_state(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The running maximum and sum before the first key: those of the sink, if there is one."""
        R = rows.i1 - rows.i0
        m = torch.full((self.C, self.G * R, 1), -torch.inf, dtype=self.dtype, device=self.device)
        if self.sinks is None:
            return m, torch.zeros_like(m)
        m.view(self.C * self.G, R, 1).copy_(self.sinks[:, None, None])
        return m, torch.ones_like(m)

    def scores(self, Q: Tensor, rows: Rows, j0: int, j1: int) -> tuple[Tensor, Tensor | None]:
        """The scores [C, G R, W] after every term and the mask, and the cap's tanh."""
        S = self.buffer("S", (self.C, Q.shape[1], j1 - j0))
        torch.bmm(Q, self.k[:, j0:j1].transpose(1, 2), out=S)
        tanh = None
        if self.softcap is not None:
            tanh = self.buffer("tanh", S.shape)
            cap = self.softcap * self.unit.per_one
            torch.mul(S, 1 / cap, out=tanh).tanh_()
            torch.mul(tanh, cap, out=S)
        by_head = self.by_head(S)
        if self.table is not None:
            by_head.add_(self._diagonals(self.table, rows, j0, j1))
        if self.bias is not None:
            one = self.bias.shape[1] == 1
            bias = self.bias if one else self.ordered(self.bias[:, rows.i0 : rows.i1])
            by_head.add_(bias[..., j0:j1], alpha=self.unit.per_one)
        for term in self.added:
            tile = self.tile(term, rows, j0, j1)
            by_head.add_(tile.products(tile.vectors()), alpha=self.unit.per_one)
        self.mask.hide(by_head, rows, j0, j1, backwards=self.backwards)
        return S, tanh

    def kept(self, rows: Rows, j0: int, j1: int) -> Tensor | None:
        """All ones where a weight of the tile survives dropout, else 0: int32 [C, G R, W]."""
        if self.shared.row_hashes is None or self.shared.column_hashes is None:
            return None
        row = self.ordered(self.shared.row_hashes[self.b, self.h0 : self.h1, rows.i0 : rows.i1])
        words = row[..., None] + self.shared.column_hashes[j0 // 2 : (j1 + 1) // 2]
        kept = dropout.kept(words, self.shared.options.dropout)[..., : j1 - j0]
        return kept.reshape(self.C, -1, j1 - j0)

    def add_sink_gradient(self, total: Tensor, L: Tensor, delta: Tensor) -> None:
        """The sink's weight is exp(sink - lse), and its value 0."""
        assert self.sinks is not None
        shape = (self.C * self.G, -1)
        P = self.unit.exp_(self.sinks[:, None] - L.view(shape))
        total[self.h0 : self.h1] -= (P * delta.view(shape)).sum(-1)

    def skewed(self, shape: torch.Size, rows: Rows) -> Tensor:
        """Memory for dS [C, G R, W] with a gap of zeros after each row, as wide as a block.

        Read with a pitch that is one less, the rows of a block of them are skewed.
        """
        pitch = shape[2] + self._block(rows)
        return self.shared.buffers.zeros("skewed", (*shape[:2], pitch))[..., : shape[2]]

    def add_table_gradient(self, total: Tensor, dS: Tensor, rows: Rows, j0: int, j1: int) -> None:
        """The sums of dS, which lies in skewed memory, over its diagonals: in blocks, then them."""
        block, R, W = self._block(rows), rows.i1 - rows.i0, j1 - j0
        heads, blocks, pitch = self.C * self.G, R // block, W + block
        shape = (heads, blocks, block, pitch - 1)
        skewed = dS.as_strided(shape, (R * pitch, block * pitch, pitch - 1, 1))
        sums = skewed.sum(2)  # [C G, blocks, W + block - 1]
        width = R + W - 1
        whole = sums.new_zeros(heads, blocks, width)
        whole.as_strided(sums.shape, (blocks * width, width + block, 1)).copy_(sums)
        first = self.N - rows.i1 + j0
        total[self.h0 : self.h1, first : first + width] += whole.sum(1)

    def _block(self, rows: Rows) -> int:
        """How many rows are skewed together: a divisor of those of the tile."""
        return math.gcd(rows.i1 - rows.i0, 32)

    def add_bias_gradient(self, total: Tensor, dS: Tensor, rows: Rows, j0: int, j1: int) -> None:
        """Sums dS over what the bias is broadcast over."""
        part = self._of_these_heads(total)  # [H|1, N|1, M]
        dS = self.by_head(dS)
        if part.shape[1] == 1:
            dS = dS.sum(1, keepdim=True)
        else:
            part, dS = part[:, rows.i0 : rows.i1], self.ordered(dS)
        part[..., j0:j1] += dS.sum(0, keepdim=True) if part.shape[0] == 1 else dS

    def buffer(self, name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Memory of this shape that stays the same from tile to tile."""
        return self.shared.buffers.get(name, shape)

    def by_head(self, x: Tensor) -> Tensor:
        """A tile [C, G R, W] as [C G, R, W]."""
        return x.unflatten(1, (self.G, -1)).flatten(0, 1)

    def tile(self, term: Term, rows: Rows, j0: int, j1: int) -> Tile:
        """The part of a term of vectors by distance."""
        return term.tile(rows.i0, rows.i1, j0, j1)

    def _term(self, name: str, relative: Relative | None) -> Term | None:
        """The vectors by distance of these heads."""
        if relative is None:
            return None
        return Term(name, relative, self.b, slice(self.h0, self.h1), self.shared.buffers)

    def _keys(self, x: Tensor) -> Tensor:
        """These heads of k or v, in the accumulator's dtype and with rows that a product takes."""
        x = x[self.b, self.g0 : self.g1].to(self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def _of_these_heads(self, x: Tensor) -> Tensor:
        """A term [B|1, H|1, ...] without its batch, cut to these heads."""
        x = x[self.b if x.shape[0] > 1 else 0]
        return x[self.h0 : self.h1] if x.shape[0] > 1 else x

    def _of_this_mask(self) -> Mask:
        """The call's mask, cut to this batch row and these heads, without the batch."""
        mask = self.shared.options.mask
        if isinstance(mask, Boolean):
            return Boolean(self._of_these_heads(mask.allowed))
        if isinstance(mask, Intervals):
            bounds = mask.bounds[self.b if mask.bounds.shape[0] > 1 else 0]
            if mask.runs is None:
                return Intervals(bounds)
            return Intervals(bounds, mask.runs[self.b if mask.runs.shape[0] > 1 else 0])
        return mask

    def _diagonals(self, table: Tensor, rows: Rows, j0: int, j1: int) -> Tensor:
        """The table's tile [C G, R, W]: row r, which is query i1 - 1 - r, begins r entries on."""
        shape = (self.C * self.G, rows.i1 - rows.i0, j1 - j0)
        return table.as_strided(shape, (table.shape[1], 1, 1), self.N - rows.i1 + j0)
