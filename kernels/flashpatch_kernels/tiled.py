"""Engine `tiled`: FlashAttention-2's algorithm in PyTorch, tile by tile, on any device.

Forward, for a tile of queries, over tiles of keys (Dao 2023, Algorithm 1):
    S = cap(Q K^T * scale) + table + bias + vectors by distance + mask
    m' = max(m, rowmax S),  P = exp(S - m')
    l = exp(m - m') l + rowsum P,  O = exp(m - m') O + P V
and at the end O / l and lse = m + log l. A sink is a first key of logit `sink` and value 0.
Backward (Algorithm 2), with P = exp(S - lse) and delta = rowsum(dO O) - dlse:
    dV += P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ += dS K * scale,  dK += dS^T Q * scale

Letters: B batch, H query heads, C key heads computed together, G query heads per key head,
N queries, M keys, D head size, Dv that of v, R queries and W keys of a tile.

Three choices of this file:
Scores are in units of log 2, because PyTorch's exp2 takes a third of the time of its exp on a CPU
and is as exact. Not in float64, which is there to be exact: each change of units rounds the lse.
With a table or vectors by distance, the queries of a tile run backwards. The table's entry for row
r and key j is then a fixed number plus r + j, so that the table's tile [R, W] is a view of it, with
strides (1, 1), and its gradient, the sums of dS over its diagonals, are the column sums of dS with
skewed rows. `tiled_relative` has the vectors.
The gradients of k and v are summed transposed, [C, D, M]: MKL takes a quarter less time for Q^T dS
than for dS^T Q.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashpatch_kernels import dropout
from flashpatch_kernels.buffers import Buffers
from flashpatch_kernels.distances import gradients_of_whole, whole_table
from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask, band_bounds
from flashpatch_kernels.options import HIDES, Options, Relative
from flashpatch_kernels.tiled_relative import Term, Tile, largest_matrix


@dataclass(frozen=True)
class Unit:
    """What scores are counted in: how many make up 1, and the functions of such numbers."""

    per_one: float
    exp_: Callable[[Tensor], Tensor]
    log: Callable[[Tensor], Tensor]


BINARY = Unit(math.log2(math.e), Tensor.exp2_, Tensor.log2)
NATURAL = Unit(1.0, Tensor.exp_, Tensor.log)


@dataclass(frozen=True)
class TileSize:
    """Queries and keys of a tile, and how many scores of all its heads fit its buffer."""

    rows: int
    keys: int
    scores: int


# On an AMD EPYC (1 MB of L2 a core, 32 MB of L3) tiles of 128 x 1024 to 512 x 512 and of one to six
# heads took within 3% of the same time, forward and backward at 1024 x 1024 x 64; the products are
# 70% of it. Larger ones need fewer calls, each of which costs microseconds and, with several
# threads, waits for the slowest. A buffer of this size is 6 MB in float32.
CPU_TILE = TileSize(256, 512, 12 * 256 * 512)
DEVICE_TILE = TileSize(512, 1024, 16 * 512 * 1024)


@torch.no_grad()
def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The output [B, H, N, Dv], laid out as [B, N, H, Dv], and the lse [B, H, N]."""
    B, H, N, _ = q.shape
    Dv = v.shape[3]
    out = q.new_empty((B, N, H, Dv)).transpose(1, 2)
    lse = q.new_empty((B, H, N), dtype=_accumulator(q))
    unit = _unit(q)
    for heads in _head_tiles(q, k, v, options):
        for rows in heads.row_tiles():
            Q = heads.take(q, rows) * (options.scale * unit.per_one)  # [C, G R, D]
            m, l = heads.first_state(rows)  # [C, G R, 1]
            O = Q.new_zeros((*Q.shape[:2], Dv))
            for j0, j1 in heads.key_tiles(rows):
                S, _ = heads.scores(Q, rows, j0, j1)
                m_new = torch.maximum(m, S.amax(-1, keepdim=True))
                # Finite also for a row that has seen nothing yet: -inf - -inf would be NaN.
                shift = m_new.clamp(min=HIDES)
                P = unit.exp_(S.sub_(shift))
                alpha = unit.exp_(m - shift)
                l.mul_(alpha).add_(P.sum(-1, keepdim=True))
                kept = heads.kept(rows, j0, j1)
                if kept is not None:
                    _drop(P, kept)
                O.mul_(alpha).baddbmm_(P, heads.v[:, j0:j1])
                if heads.values is not None:
                    tile = heads.tile(heads.values, rows, j0, j1)
                    heads.by_head(O).add_(tile.values(heads.by_head(P)))
                m = m_new
            seen = l > 0
            l.masked_fill_(~seen, 1)
            heads.put(out, rows, O.div_(l * heads.keep_probability))
            m.add_(unit.log(l)).div_(unit.per_one)
            heads.put(lse[..., None], rows, m.masked_fill_(~seen, -torch.inf))
    return out, lse


@torch.no_grad()
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients named in `needs`, each in its tensor's dtype and shape."""
    grads = {name: torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    terms = {name: x for name, x in options.terms.items() if name in needs}
    shapes = {name: x.shape for name, x in terms.items() if name not in ("table", "slopes")}
    if not needs.isdisjoint(("table", "slopes")):
        shapes["whole table"] = torch.Size((q.shape[1], q.shape[2] + k.shape[2] - 1))
    sums = {
        name: torch.zeros(shape, dtype=_accumulator(q), device=q.device)
        for name, shape in shapes.items()
    }
    unit = _unit(q)
    scored = not needs <= {"v", "sinks", "value_embeddings"}
    for heads in _head_tiles(q, k, v, options):
        dK, dV = (x.new_zeros(x.transpose(1, 2).shape) for x in (heads.k, heads.v))  # [C, D, M]
        for rows in heads.row_tiles():
            Q = heads.take(q, rows) * (options.scale * unit.per_one)
            dO = heads.take(dout, rows)  # [C, G R, Dv]
            L = heads.take(lse[..., None], rows) * unit.per_one  # [C, G R, 1]
            # A row that sees nothing: exp(S - inf) is 0.
            L.masked_fill_(L.isneginf(), torch.inf)
            delta = (dO * heads.take(out, rows)).sum(-1, keepdim=True)
            dL = None if dlse is None else heads.take(dlse[..., None], rows)
            if dL is not None:
                delta -= dL
            if options.dropout:
                dO = dO / heads.keep_probability
            if "sinks" in sums:
                heads.add_sink_gradient(sums["sinks"], L, delta)
            dQ = torch.zeros_like(Q)
            tiles = list(heads.key_tiles(rows))
            for j0, j1 in tiles:
                S, tanh = heads.scores(Q, rows, j0, j1)
                P = unit.exp_(S.sub_(L))
                kept = heads.kept(rows, j0, j1)
                values = None
                if heads.values is not None:
                    values = heads.tile(heads.values, rows, j0, j1)
                if not needs.isdisjoint(("v", "value_embeddings")):
                    Z = P if kept is None else _drop(heads.buffer("Z", P.shape).copy_(P), kept)
                    heads.add_product(dV, dO, Z, j0, j1)
                    if values is not None:
                        values.add_gradients(sums, heads.by_head(Z), heads.by_head(dO))
                if not scored:
                    continue
                dP = heads.buffer("dP", P.shape)
                torch.bmm(dO, heads.v[:, j0:j1].transpose(1, 2), out=dP)
                if values is not None:
                    heads.by_head(dP).add_(values.products(heads.by_head(dO)))
                if kept is not None:
                    _drop(dP, kept)
                dS = heads.skewed(P.shape, rows) if "whole table" in sums else dP
                torch.mul(dP.sub_(delta), P, out=dS)
                if len(tiles) == 1 and heads.sinks is None:
                    _balance(dS, P, dL)
                if "whole table" in sums:
                    heads.add_table_gradient(sums["whole table"], dS, rows, j0, j1)
                if "bias" in sums:
                    heads.add_bias_gradient(sums["bias"], dS, rows, j0, j1)
                for term in heads.added:
                    heads.tile(term, rows, j0, j1).add_gradients(sums, heads.by_head(dS))
                if tanh is not None:
                    dS.mul_(tanh.square_().neg_().add_(1))
                dQ.baddbmm_(dS, heads.k[:, j0:j1])
                heads.add_product(dK, Q, dS, j0, j1)
            heads.put(grads["q"], rows, dQ.mul_(options.scale))
        heads.put_keys(grads["k"], dK.div_(unit.per_one))
        heads.put_keys(grads["v"], dV)
    if "whole table" in sums:
        sums |= gradients_of_whole(sums.pop("whole table"), options, q.shape[2], k.shape[2])
    for name, total in sums.items():
        grads[name] = total.to(options.terms[name].dtype)
    return {name: grads[name] for name in needs}


@dataclass(frozen=True)
class Rows:
    """A tile of queries, i0..i1, and its keys: start..stop, all visible in clear_from..clear_to."""

    i0: int
    i1: int
    start: int
    stop: int
    clear_from: int
    clear_to: int


@dataclass
class _Shared:
    """What all heads of a call share: the tile's size, its buffers, the dropout's hashes."""

    rows: int
    keys: int
    options: Options
    buffers: Buffers
    table: Tensor | None = None  # of all distances, slopes included: [H, N + M - 1]
    row_hashes: Tensor | None = None  # [B, H, N]
    column_hashes: Tensor | None = None  # [ceil(M / 2)]


class _Heads:
    """C key heads of one batch row and their G query heads each: what is computed together."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, shared: _Shared, b: int, g0: int, g1: int
    ) -> None:
        self.b, self.g0, self.g1, self.shared = b, g0, g1, shared
        self.C, self.G = g1 - g0, q.shape[1] // k.shape[1]
        self.h0, self.h1 = g0 * self.G, g1 * self.G
        self.N, self.M = q.shape[2], k.shape[2]
        self.dtype, self.device, self.unit = _accumulator(q), q.device, _unit(q)
        self.k, self.v = (self._keys(x) for x in (k, v))  # [C, M, D], [C, M, Dv]
        self.mask = _Mask(self._of_this_mask(), self.N, self.M, self.device)
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


class _Mask:
    """The mask of the heads of one batch row, as what a tile asks of it."""

    def __init__(self, mask: Mask, n_queries: int, n_keys: int, device: torch.device) -> None:
        self.n_keys, self.readable = n_keys, device.type == "cpu"
        self.band = mask if isinstance(mask, Band) else None
        self.allowed = mask.allowed if isinstance(mask, Boolean) else None  # [H|1, N|1, M]
        self.lo = self.hi = self.hidden = None
        if isinstance(mask, Intervals):
            self.lo, self.hi = mask.bounds.expand(n_queries, 2).unbind(-1)  # [N]
            self.hidden = None if mask.runs is None else mask.runs <= 0  # [M]
        elif isinstance(mask, Band) and mask != Band():
            self.lo, self.hi = band_bounds(mask, n_queries, n_keys, device)[0].unbind(-1)

    def rows(self, i0: int, i1: int) -> Rows:
        """The tile of these queries. Masks are read on a CPU only: a device would have to wait."""
        M = self.n_keys
        if self.band is not None:
            return self._band_rows(self.band, i0, i1)
        if not self.readable:
            return Rows(i0, i1, 0, M, M, 0)
        if self.allowed is not None:
            tile = self.allowed if self.allowed.shape[1] == 1 else self.allowed[:, i0:i1]
            visited = tile.any(0).any(0).nonzero()
            if not len(visited):
                return Rows(i0, i1, 0, 0, 0, 0)
            start, stop = int(visited[0]), int(visited[-1]) + 1
            clear = bool(tile[..., start:stop].all())
            return Rows(i0, i1, start, stop, *((start, stop) if clear else (M, 0)))
        assert self.lo is not None
        assert self.hi is not None
        lo, hi = self.lo[i0:i1], self.hi[i0:i1]
        some = lo < hi
        start = int(torch.where(some, lo, M).amin())
        stop = int(torch.where(some, hi, 0).amax())
        return Rows(i0, i1, start, stop, int(lo.amax()), int(hi.amin()))

    def _band_rows(self, band: Band, i0: int, i1: int) -> Rows:
        first, last, M = i0 + band.offset, i1 - 1 + band.offset, self.n_keys
        lows = (0, 0) if band.left is None else (first - band.left, last - band.left)
        highs = (M, M) if band.right is None else (last + band.right + 1, first + band.right + 1)
        start, clear_from, stop, clear_to = (min(max(j, 0), M) for j in (*lows, *highs))
        return Rows(i0, i1, start, stop, clear_from, clear_to)

    def hide(self, S: Tensor, rows: Rows, j0: int, j1: int, *, backwards: bool) -> None:
        """Adds -inf to the scores [C G, R, W] of keys that a query does not see."""
        if self.allowed is not None:
            if j0 < rows.clear_from or rows.clear_to < j1:
                tile = (
                    self.allowed
                    if self.allowed.shape[1] == 1
                    else self.allowed[:, rows.i0 : rows.i1]
                )
                forbidden = _forbid(tile[..., j0:j1], S)
                S.add_(forbidden.flip(1) if backwards else forbidden)
            return
        if self.lo is not None and self.hi is not None:
            lo, hi = (x[rows.i0 : rows.i1, None] for x in (self.lo, self.hi))  # [R, 1]
            # The edges of the tile: keys that some of its rows do not see.
            left, right = min(max(j0, rows.clear_from), j1), max(min(j1, rows.clear_to), j0)
            for a, b in ((j0, left), (right, j1)) if left < right else ((j0, j1),):
                if a < b:
                    j = torch.arange(a, b, dtype=lo.dtype, device=lo.device)
                    forbidden = _forbid((lo <= j) & (j < hi), S)
                    S[..., a - j0 : b - j0].add_(forbidden.flip(0) if backwards else forbidden)
        if self.hidden is not None:
            S.add_(_forbid(~self.hidden[j0:j1], S))


def _forbid(seen: Tensor, S: Tensor) -> Tensor:
    """0 where `seen`, -inf elsewhere."""
    return S.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _balance(dS: Tensor, P: Tensor, dL: Tensor | None) -> None:
    """Takes delta's rounding out of the dS of rows whose keys are all in this tile, in place.

    A constant added to all scores of a row adds as much to its lse and changes no weight: the dS of
    a row sum to its dlse. What they exceed it by is the rounding of delta, and that of `out` in its
    dtype. Where values are alike, dP and delta are far larger than their difference, and it would
    be the largest error of the gradients.
    """
    excess = dS.sum(-1, keepdim=True)
    if dL is not None:
        excess -= dL
    dS.addcmul_(P, excess, value=-1)


def _drop(x: Tensor, kept: Tensor) -> Tensor:
    """Zeroes the numbers of a tile that are not kept, in place."""
    if x.dtype == torch.float32:
        # PyTorch multiplies by a bool eight times slower than it ands bits.
        x.view(torch.int32).bitwise_and_(kept)
        return x
    return x.mul_(-kept)


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _unit(q: Tensor) -> Unit:
    return NATURAL if q.dtype == torch.float64 else BINARY


def _head_tiles(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Iterator[_Heads]:
    """The heads, as many together as fit the tile's buffer."""
    B, H, N, _ = q.shape
    kv_heads, M = k.shape[1], k.shape[2]
    if 0 in (B, H):
        return
    size = CPU_TILE if q.device.type == "cpu" else DEVICE_TILE
    G = H // kv_heads
    rows = max(1, min(N, size.rows // G))
    # Few queries leave room for more keys. An even number: dropout takes keys in pairs.
    keys = min(M + M % 2, size.rows * size.keys // (G * rows) // 2 * 2)
    keys = max(2, keys)
    if options.relative_keys is not None:
        # Each key is multiplied by all embeddings of the tile, of which it needs one for each row.
        keys = min(keys, max(2 * rows, 32))
    buffers = Buffers(_accumulator(q), q.device)
    shared = _Shared(rows, keys, options, buffers, whole_table(options, N, M))
    if options.dropout:
        assert options.seed is not None
        shared.row_hashes = dropout.row_hashes(options.seed, B, H, N)
        shared.column_hashes = dropout.column_hashes(options.seed, M)
    together = max(1, size.scores // (G * largest_matrix(options, rows, keys)))
    for b in range(B):
        for g0 in range(0, kv_heads, together):
            yield _Heads(q, k, v, shared, b, g0, min(g0 + together, kv_heads))
