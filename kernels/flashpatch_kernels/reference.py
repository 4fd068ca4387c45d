"""The equations of attention in plain differentiable PyTorch: the oracle of every engine.

It computes in float64 and forms the N x M matrix: for tests and for reading, not for speed.
"""

import torch
from torch import Tensor

from flashpatch_kernels import dropout
from flashpatch_kernels.masks import allowed
from flashpatch_kernels.options import HIDES, Options, Relative


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The equations of `Options`, and the log-sum-exp of the scores.

    Returns:
        out [B, H, N, Dv] in q's dtype and lse [B, H, N] in float32 (float64 for float64).
    """
    batch, heads, n_queries, _ = q.shape
    n_keys = k.shape[2]
    groups = heads // max(k.shape[1], 1)
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))

    s = q.double() @ k.transpose(-1, -2) * options.scale  # [B, H, N, M]
    if options.softcap is not None:
        s = options.softcap * torch.tanh(s / options.softcap)
    if options.table is not None:
        first = 1 - n_queries if options.first is None else options.first
        at = distances(n_queries, n_keys, first, options.table.shape[1], q.device)
        s = s + options.table.double()[:, at]
    if options.slopes is not None:
        offset = n_keys - n_queries if options.offset is None else options.offset
        away = distances(n_queries, n_keys, offset, None, q.device).abs()
        s = s - options.slopes.double()[:, None, None] * away
    if options.bias is not None:
        bias = options.bias.double()
        s = s + bias.masked_fill(bias < HIDES, -torch.inf)
    if options.relative_queries is not None:
        x, w = vectors(options.relative_queries, n_queries, n_keys)
        s = s + torch.einsum("bhne,hnme->bhnm", x, w.expand(heads, -1, -1, -1))
    if options.relative_keys is not None:
        y, u = vectors(options.relative_keys, n_queries, n_keys)
        s = s + torch.einsum("bhme,hnme->bhnm", y, u.expand(heads, -1, -1, -1))
    s = s.masked_fill(~allowed(options.mask, n_queries, n_keys, q.device), -torch.inf)

    sinks = s.new_full((heads,), -torch.inf) if options.sinks is None else options.sinks.double()
    sinks = sinks[:, None, None].expand(batch, heads, n_queries, 1)
    # A row that sees nothing: its maximum is -inf, and -inf - -inf would be NaN.
    m = torch.cat((s, sinks), dim=-1).detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)
    p = torch.exp(s - m)
    l = p.sum(-1, keepdim=True) + torch.exp(sinks - m)
    seen = l > 0
    p = p / torch.where(seen, l, 1)
    lse = torch.where(seen, m + torch.log(torch.where(seen, l, 1)), -torch.inf)[..., 0]
    if options.dropout:
        assert options.seed is not None
        kept = dropout.keep(options.seed, options.dropout, batch, heads, n_queries, n_keys)
        p = p * kept / dropout.keep_probability(options.dropout)
    out = p @ v
    if options.relative_values is not None:
        _, z = vectors(options.relative_values, n_queries, n_keys)
        out = out + torch.einsum("bhnm,hnme->bhne", p, z.expand(heads, -1, -1, -1))
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def distances(
    n_queries: int, n_keys: int, first: int, entries: int | None, device: torch.device
) -> Tensor:
    """The distance j - i of query i and key j, less `first`, among 0 .. entries - 1: [N, M]."""
    i = torch.arange(n_queries, device=device)[:, None]
    at = torch.arange(n_keys, device=device) - i - first
    return at if entries is None else at.clamp(0, entries - 1)


def vectors(relative: Relative, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """The vectors, and the embedding of every pair, [H|1, N, M, E], in float64."""
    table = relative.embeddings.double()
    at = distances(n_queries, n_keys, relative.first, table.shape[1], table.device)
    x = table if relative.vectors is None else relative.vectors.double()
    return x, table[:, at]
