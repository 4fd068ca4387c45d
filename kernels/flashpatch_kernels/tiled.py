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

Three choices of this engine:
Scores are in units of log 2, because PyTorch's exp2 takes a third of the time of its exp on a CPU
and is as exact. Not in float64, which is there to be exact: each change of units rounds the lse.
With a table or vectors by distance, the queries of a tile run backwards. The table's entry for row
r and key j is then a fixed number plus r + j, so that the table's tile [R, W] is a view of it, with
strides (1, 1), and its gradient, the sums of dS over its diagonals, are the column sums of dS with
skewed rows.
The gradients of k and v are summed transposed, [C, D, M]: MKL takes a quarter less time for Q^T dS
than for dS^T Q.

Beside this file, `tiled_heads` has what a tile of the heads computed together takes and gives,
`tiled_masks` which keys it visits, and `tiled_relative` its vectors by distance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashpatch_kernels import dropout
from flashpatch_kernels.buffers import Buffers
from flashpatch_kernels.distances import gradients_of_whole, whole_table
from flashpatch_kernels.options import HIDES, Options
from flashpatch_kernels.tiled_heads import Heads, Shared, accumulator, unit_of
from flashpatch_kernels.tiled_relative import largest_matrix


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
    lse = q.new_empty((B, H, N), dtype=accumulator(q))
    unit = unit_of(q)
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
        name: torch.zeros(shape, dtype=accumulator(q), device=q.device)
        for name, shape in shapes.items()
    }
    unit = unit_of(q)
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
                if len(tiles) == 1 and heads.sinks is None:  # a sink would have a part of the sum
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


def _head_tiles(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Iterator[Heads]:
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
    buffers = Buffers(accumulator(q), q.device)
    shared = Shared(rows, keys, options, buffers, whole_table(options, N, M))
    if options.dropout:
        assert options.seed is not None
        shared.row_hashes = dropout.row_hashes(options.seed, B, H, N)
        shared.column_hashes = dropout.column_hashes(options.seed, M)
    together = max(1, size.scores // (G * largest_matrix(options, rows, keys)))
    for b in range(B):
        for g0 in range(0, kv_heads, together):
            yield Heads(q, k, v, shared, b, g0, min(g0 + together, kv_heads))
