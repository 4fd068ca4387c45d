"""Engine `tiled`: FlashAttention-2's algorithm in PyTorch, tile by tile, on any device.

Forward, for a tile of queries, over tiles of keys (Dao 2023, Algorithm 1):
    S = cap(Q K^T * scale) + table + bias + mask
    m' = max(m, rowmax S),  P = exp(S - m')
    l = exp(m - m') l + rowsum P,  O = exp(m - m') O + P V
and at the end O / l and lse = m + log l. A sink is a first key of logit `sink` and value 0.
Backward (Algorithm 2), with P = exp(S - lse) and delta = rowsum(dO O) - dlse:
    dV += P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ += dS K * scale,  dK += dS^T Q * scale

Letters: B batch, H query heads, C key heads computed together, G query heads per key head,
N queries, M keys, D head size, Dv that of v, R queries and W keys of a tile.

The queries of a tile run backwards. The table's entry for row r and key j is then a fixed number
plus r + j, so that the tile [R, W] of the table is a view of it, with strides (1, 1), and so is its
gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashpatch_kernels import dropout
from flashpatch_kernels.masks import Band, Boolean, Intervals, band_bounds
from flashpatch_kernels.options import Options

TILE_ROWS = 128
TILE_KEYS = 512
TILE_SCORES = 12 * TILE_ROWS * TILE_KEYS


@dataclass(frozen=True)
class Rows:
    """A tile of queries i0..i1 and the keys it visits: start..stop, clear_from..clear_to freely."""

    i0: int
    i1: int
    start: int
    stop: int
    clear_from: int
    clear_to: int


@torch.no_grad()
def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The output [B, H, N, Dv], laid out as [B, N, H, Dv], and the lse [B, H, N]."""
    B, H, N, _ = q.shape
    Dv = v.shape[3]
    out = q.new_empty((B, N, H, Dv)).transpose(1, 2)
    lse = q.new_empty((B, H, N), dtype=_accumulator(q))
    for heads in _chunks(q, k, v, options):
        for rows in heads.row_tiles():
            Q = heads.take(q, rows).mul_(options.scale)  # [C, G R, D]
            m, l = heads.sink_state(rows)  # [C, G R, 1]
            O = Q.new_zeros((*Q.shape[:2], Dv))
            for j0, j1 in heads.key_tiles(rows):
                S, _ = heads.scores(Q, rows, j0, j1)
                m_new = torch.maximum(m, S.amax(-1, keepdim=True))
                # A row that has seen nothing: -inf - -inf would be NaN.
                shift = m_new.masked_fill(m_new == -torch.inf, 0)
                P = S.sub_(shift).exp_()
                alpha = torch.exp(m - shift)
                l.mul_(alpha).add_(P.sum(-1, keepdim=True))
                heads.drop(P, rows, j0, j1)
                O.mul_(alpha).baddbmm_(P, heads.v[:, j0:j1])
                m = m_new
            seen = l > 0
            l = l.masked_fill(~seen, 1)
            heads.put(out, rows, O.div_(l * heads.keep_probability))
            heads.put(lse[..., None], rows, (m + l.log()).masked_fill(~seen, -torch.inf))
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
    terms = {"table": options.table, "bias": options.bias, "sinks": options.sinks}
    sums = {
        name: torch.zeros(x.shape, dtype=_accumulator(q), device=q.device)
        for name, x in terms.items()
        if x is not None and name in needs
    }
    for heads in _chunks(q, k, v, options):
        dK, dV = torch.zeros_like(heads.k), torch.zeros_like(heads.v)  # [C, M, D], [C, M, Dv]
        for rows in heads.row_tiles():
            Q = heads.take(q, rows).mul_(options.scale)
            dO = heads.take(dout, rows).div_(heads.keep_probability)  # [C, G R, Dv]
            L = heads.take(lse[..., None], rows)  # [C, G R, 1]
            # A row that sees nothing: exp(S - inf) is 0.
            L.masked_fill_(L == -torch.inf, torch.inf)
            delta = (dO * heads.take(out, rows)).sum(-1, keepdim=True).mul_(heads.keep_probability)
            if dlse is not None:
                delta -= heads.take(dlse[..., None], rows)
            if "sinks" in sums:
                heads.add_sink_gradient(sums["sinks"], L, delta)
            dQ = torch.zeros_like(Q)
            for j0, j1 in heads.key_tiles(rows):
                S, tanh = heads.scores(Q, rows, j0, j1)
                P = S.sub_(L).exp_()
                dP = heads.buffer("dP", P.shape)
                torch.bmm(dO, heads.v[:, j0:j1].transpose(1, 2), out=dP)
                if options.dropout:
                    heads.drop(dP, rows, j0, j1)
                    Z = heads.drop(heads.buffer("Z", P.shape).copy_(P), rows, j0, j1)
                else:
                    Z = P
                dV[:, j0:j1].baddbmm_(Z.transpose(1, 2), dO)
                dS = dP.sub_(delta).mul_(P)
                if "table" in sums:
                    heads.add_table_gradient(sums["table"], dS, rows, j0, j1)
                if "bias" in sums:
                    heads.add_bias_gradient(sums["bias"], dS, rows, j0, j1)
                if tanh is not None:
                    dS.addcmul_(dS * tanh, tanh, value=-1)
                dQ.baddbmm_(dS, heads.k[:, j0:j1])
                dK[:, j0:j1].baddbmm_(dS.transpose(1, 2), Q)
            heads.put(grads["q"], rows, dQ.mul_(options.scale))
        grads["k"][heads.b, heads.g0 : heads.g1] = dK
        grads["v"][heads.b, heads.g0 : heads.g1] = dV
    grads.update({name: x.to(terms[name].dtype) for name, x in sums.items()})
    return {name: grads[name] for name in needs}


class _Heads:
    """C key heads of one batch row and their G query heads each: what is computed together."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        b: int,
        g0: int,
        g1: int,
        R: int,
        W: int,
        buffers: dict[str, Tensor],
    ) -> None:
        self.options, self.b, self.g0, self.g1, self.R, self.W = options, b, g0, g1, R, W
        self.C, self.G = g1 - g0, q.shape[1] // k.shape[1]
        self.h0, self.h1 = g0 * self.G, g1 * self.G
        self.N, self.M = q.shape[2], k.shape[2]
        self.dtype, self.device = _accumulator(q), q.device
        self.buffers = buffers
        self.k, self.v = (x[b, g0:g1].to(self.dtype) for x in (k, v))  # [C, M, D], [C, M, Dv]
        self.table = self.sinks = self.bias = None
        if options.table is not None:
            self.table = options.table[self.h0 : self.h1].to(self.dtype).contiguous()
        if options.sinks is not None:
            self.sinks = options.sinks[self.h0 : self.h1].to(self.dtype)
        if options.bias is not None:
            self.bias = self._of_these_heads(options.bias)
        self.keep_probability = 1.0
        if options.dropout:
            assert options.seed is not None
            self.keep_probability = dropout.keep_probability(options.dropout)
            hashes = dropout.row_hashes(options.seed, q.shape[0], q.shape[1], self.N)
            self.row_hashes = hashes[b, self.h0 : self.h1, :, None]  # [C G, N, 1]
            self.column_hashes = dropout.column_hashes(options.seed, self.M)  # [M / 2]
        self._read_mask()

    def take(self, x: Tensor, rows: Rows) -> Tensor:
        """The tile of x [B, H, N, E] as [C, G R, E], in the accumulator's dtype, a copy."""
        tile = x[self.b, self.h0 : self.h1, rows.i0 : rows.i1].flip(1).to(self.dtype)
        return tile.reshape(self.C, -1, x.shape[3])

    def put(self, x: Tensor, rows: Rows, tile: Tensor) -> None:
        """Stores a tile [C, G R, E] into x [B, H, N, E]."""
        part = x[self.b, self.h0 : self.h1, rows.i0 : rows.i1]
        part.copy_(tile.view(self.C * self.G, -1, x.shape[3]).flip(1))

    def buffer(self, name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Memory of this shape that stays the same from tile to tile."""
        size = 1
        for n in shape:
            size *= n
        memory = self.buffers.get(name)
        if memory is None or memory.numel() < size:
            memory = self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return memory[:size].view(shape)

    def row_tiles(self) -> Iterator[Rows]:
        """The tiles of queries."""
        for i0 in range(0, self.N, self.R):
            yield self._visited(i0, min(i0 + self.R, self.N))

    def key_tiles(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """The tiles of keys that these queries visit. They start at even keys, for dropout."""
        for j0 in range(rows.start - rows.start % 2, rows.stop, self.W):
            yield j0, min(j0 + self.W, rows.stop)

    def sink_state(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The running maximum and sum before the first key: those of the sink, if there is one."""
        shape = (self.C, self.G * (rows.i1 - rows.i0), 1)
        if self.sinks is None:
            m = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.device)
            return m, torch.zeros_like(m)
        m = self.sinks.view(self.C, self.G, 1, 1).expand(-1, -1, rows.i1 - rows.i0, 1)
        m = m.reshape(shape)
        return m, torch.ones_like(m)

    def scores(self, Q: Tensor, rows: Rows, j0: int, j1: int) -> tuple[Tensor, Tensor | None]:
        """The scores [C, G R, W] after every term and the mask, and the softcap's tanh."""
        S = self.buffer("S", (self.C, Q.shape[1], j1 - j0))
        torch.bmm(Q, self.k[:, j0:j1].transpose(1, 2), out=S)
        tanh = None
        cap = self.options.softcap
        if cap is not None:
            tanh = torch.mul(S, 1 / cap, out=self.buffer("tanh", S.shape)).tanh_()
            torch.mul(tanh, cap, out=S)
        by_head = S.view(self.C * self.G, -1, j1 - j0)  # [C G, R, W]
        if self.table is not None:
            by_head.add_(self._hankel(self.table, rows, j0, j1))
        if self.bias is not None:
            by_head.add_(_tile(self.bias, rows, j0, j1))
        self._hide(by_head, rows, j0, j1)
        return S, tanh

    def drop(self, P: Tensor, rows: Rows, j0: int, j1: int) -> Tensor:
        """Zeroes the dropped weights of a tile, in place."""
        if not self.options.dropout:
            return P
        by_head = P.view(self.C * self.G, -1, j1 - j0)
        words = (
            self.row_hashes[:, rows.i0 : rows.i1].flip(1)
            + self.column_hashes[j0 // 2 : (j1 + 1) // 2]
        )
        numbers = dropout.mix(words).view(torch.int16)[..., : j1 - j0].to(torch.int32)
        # All ones where the weight is kept.
        kept = numbers.sub_(dropout.threshold(self.options.dropout) - 32768).bitwise_right_shift_(
            31
        )
        if self.dtype == torch.float32:
            by_head.view(torch.int32).bitwise_and_(kept)
        else:
            by_head.mul_(-kept)
        return P

    def add_sink_gradient(self, total: Tensor, L: Tensor, delta: Tensor) -> None:
        """The sink's weight is exp(sink - lse), and its value 0."""
        assert self.sinks is not None
        shape = (self.C * self.G, -1)
        P = torch.exp(self.sinks[:, None] - L.view(shape))
        total[self.h0 : self.h1] -= (P * delta.view(shape)).sum(-1)

    def add_table_gradient(self, total: Tensor, dS: Tensor, rows: Rows, j0: int, j1: int) -> None:
        """The diagonal sums of dS: a skewed copy of it, summed over its rows."""
        R, W = rows.i1 - rows.i0, j1 - j0
        heads, width = self.C * self.G, R + W - 1
        skewed = self.buffer("skewed", (heads, R, width)).zero_()
        skewed.as_strided((heads, R, W), (R * width, width + 1, 1)).copy_(dS.view(heads, R, W))
        first = self.N - rows.i1 + j0
        total[self.h0 : self.h1, first : first + width] += skewed.sum(1)

    def add_bias_gradient(self, total: Tensor, dS: Tensor, rows: Rows, j0: int, j1: int) -> None:
        """Sums dS over what the bias is broadcast over."""
        part = _tile(self._of_these_heads(total), rows, j0, j1, backwards=False)  # [H|1, R|1, W]
        dS = dS.view(self.C * self.G, -1, j1 - j0)
        dS = dS.sum(1, keepdim=True) if part.shape[1] == 1 else dS.flip(1)
        part += dS.sum(0, keepdim=True) if part.shape[0] == 1 else dS

    def _of_these_heads(self, x: Tensor) -> Tensor:
        """x [B|1, H|1, ...] without its batch, cut to these heads."""
        x = x[self.b if x.shape[0] > 1 else 0]
        return x[self.h0 : self.h1] if x.shape[0] > 1 else x

    def _hankel(self, table: Tensor, rows: Rows, j0: int, j1: int) -> Tensor:
        """The table's tile [C G, R, W]: row r, which is query i1 - 1 - r, begins r entries on."""
        length = table.shape[1]
        shape = (self.C * self.G, rows.i1 - rows.i0, j1 - j0)
        first = table.storage_offset() + self.N - rows.i1 + j0
        return table.as_strided(shape, (length, 1, 1), first)

    def _read_mask(self) -> None:
        """Cuts the mask to this batch row."""
        mask = self.options.mask
        self.lo = self.hi = self.hidden = self.allowed = None
        if isinstance(mask, Boolean):
            self.allowed = self._of_these_heads(mask.allowed)  # [H|1, N|1, M]
        elif isinstance(mask, Intervals):
            bounds = mask.bounds[self.b if mask.bounds.shape[0] > 1 else 0]
            self.lo, self.hi = bounds.expand(self.N, 2).unbind(-1)  # [N]
            if mask.runs is not None:
                self.hidden = mask.runs[self.b if mask.runs.shape[0] > 1 else 0] <= 0  # [M]
        elif mask != Band():
            self.lo, self.hi = band_bounds(mask, self.N, self.M, self.device)[0].unbind(-1)

    def _visited(self, i0: int, i1: int) -> Rows:
        """The tile of these queries. On a CPU the mask is read; elsewhere that would wait."""
        mask, M = self.options.mask, self.M
        if isinstance(mask, Band):
            first, last = i0 + mask.offset, i1 - 1 + mask.offset
            lows = (0, 0) if mask.left is None else (first - mask.left, last - mask.left)
            highs = (
                (M, M) if mask.right is None else (last + mask.right + 1, first + mask.right + 1)
            )
            start, clear_from, stop, clear_to = (min(max(j, 0), M) for j in (*lows, *highs))
            return Rows(i0, i1, start, stop, clear_from, clear_to)
        if self.device.type != "cpu":
            return Rows(i0, i1, 0, M, M, 0)
        if self.allowed is not None:
            one = self.allowed.shape[1] == 1
            seen = (self.allowed if one else self.allowed[:, i0:i1]).flatten(0, 1)
            visited = seen.any(0).nonzero()
            if not len(visited):
                return Rows(i0, i1, 0, 0, 0, 0)
            start, stop = int(visited[0]), int(visited[-1]) + 1
            clear = bool(seen[:, start:stop].all())
            return Rows(i0, i1, start, stop, *((start, stop) if clear else (M, 0)))
        assert self.lo is not None
        assert self.hi is not None
        lo, hi = self.lo[i0:i1], self.hi[i0:i1]
        some = lo < hi
        start = int(torch.where(some, lo, M).amin())
        stop = int(torch.where(some, hi, 0).amax())
        return Rows(i0, i1, start, stop, int(lo.amax()), int(hi.amin()))

    def _hide(self, S: Tensor, rows: Rows, j0: int, j1: int) -> None:
        """Adds -inf to the scores [C G, R, W] of keys that a query does not see."""
        if self.allowed is not None:
            if not rows.clear_from <= j0 <= j1 <= rows.clear_to:
                S.add_(_forbid(_tile(self.allowed, rows, j0, j1), S))
            return
        if self.lo is not None and self.hi is not None:
            lo, hi = (x[rows.i0 : rows.i1].flip(0)[:, None] for x in (self.lo, self.hi))  # [R, 1]
            # The edges of the tile: keys that some of its rows do not see.
            left, right = max(j0, min(rows.clear_from, j1)), min(j1, max(rows.clear_to, j0))
            edges = ((j0, j1),) if left >= right else ((j0, left), (right, j1))
            for a, b in edges:
                if a < b:
                    j = torch.arange(a, b, dtype=lo.dtype, device=lo.device)
                    S[..., a - j0 : b - j0].add_(_forbid((lo <= j) & (j < hi), S))
        if self.hidden is not None:
            S.add_(_forbid(~self.hidden[j0:j1], S))


def _forbid(seen: Tensor, S: Tensor) -> Tensor:
    """0 where `seen`, -inf elsewhere."""
    return S.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _tile(x: Tensor, rows: Rows, j0: int, j1: int, *, backwards: bool = True) -> Tensor:
    """The tile of x [H|1, N|1, M], with its queries in the tile's order."""
    if x.shape[1] > 1:
        x = x[:, rows.i0 : rows.i1]
        x = x.flip(1) if backwards else x
    return x[..., j0:j1]


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _chunks(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Iterator[_Heads]:
    """The heads, as many together as make a tile of the wanted size."""
    B, H, N, _ = q.shape
    kv_heads, M = k.shape[1], k.shape[2]
    G = H // max(kv_heads, 1)
    R = min(N, max(1, TILE_ROWS // max(G, 1)))
    W = min(M, max(TILE_KEYS, TILE_KEYS * TILE_ROWS // max(G * R, 1)))
    W += W % 2
    C = max(1, TILE_SCORES // max(G * R * W, 1))
    buffers: dict[str, Tensor] = {}
    for b in range(B):
        for g0 in range(0, kv_heads, C):
            yield _Heads(q, k, v, options, b, g0, min(g0 + C, kv_heads), R, W, buffers)
