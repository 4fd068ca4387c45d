"""The equations of attention in plain differentiable PyTorch: the oracle of every engine.

It computes in float64 and forms the N x M matrix: for tests and for reading, not for speed.
"""

import torch
from torch import Tensor

from flashpatch_kernels import dropout
from flashpatch_kernels.masks import allowed
from flashpatch_kernels.options import Options

# A bias below this hides its key, as -inf does: float32's lowest number is used for that.
HIDES = -1e38


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """softmax(cap(q k^T * scale) + table + bias, sinks) v, and the log-sum-exp of its scores.

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
        s = s + dense_table(options.table.double(), n_queries, n_keys)
    if options.bias is not None:
        bias = options.bias.double()
        s = s + bias.masked_fill(bias < HIDES, -torch.inf)
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
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def dense_table(table: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """The table [H, N + M - 1] as a bias [H, N, M]: entry j - i + N - 1 for query i and key j."""
    i = torch.arange(n_queries, device=table.device)[:, None]
    j = torch.arange(n_keys, device=table.device)
    return table[:, j - i + n_queries - 1]
