"""Engine `sdpa`: PyTorch's fused attention, for the calls it computes exactly in linear memory."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashpatch_kernels import masks
from flashpatch_kernels.engines import key_range
from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options
from flashpatch_kernels.reference import dense_table


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """The output [B, H, N, Dv], differentiable by PyTorch's own formula.

    Dropout draws from torch's generator: `options.seed` has no part in it.
    """
    mask, causal, N, M = options.mask, False, q.shape[2], k.shape[2]
    if isinstance(mask, Band) and N == 1:
        start, stop = key_range(mask, M)
        if start < stop:
            k, v, mask = k[:, :, start:stop], v[:, :, start:stop], Band()
    if options.bias is None and options.table is None and mask == Band(right=0) and N == M:
        causal, mask = True, Band()
    seen = None if mask == Band() else masks.allowed(mask, N, M, q.device)
    terms = []
    if options.table is not None:
        terms.append(dense_table(options.table, N, M)[None])
    if options.bias is not None:
        terms.append(options.bias)
    if terms:
        added = sum(terms[1:], start=terms[0]).to(q.dtype)
        seen = added if seen is None else added.masked_fill(~seen, -torch.inf)
    # A branch, because the argument must be a bool also where sizes are symbols.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        dropout_p=options.dropout,
        is_causal=causal,
        scale=options.scale,
        **grouped,
    )
