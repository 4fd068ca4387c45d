"""Engine `sdpa`: PyTorch's fused attention, for the calls it computes exactly in linear memory.

Which those are, and which small ones besides, is told by the rows of `engines.SDPA`.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashpatch_kernels import masks
from flashpatch_kernels.distances import whole_table
from flashpatch_kernels.engines import key_range
from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """The output [B, H, N, Dv], differentiable by PyTorch's own formula.

    Dropout draws from torch's generator: `options.seed` has no part in it.
    """
    mask, bias = options.mask, _bias(q, k, options)
    if isinstance(mask, Band) and q.shape[2] == 1:
        # One query sees a slice of the keys.
        start, stop = key_range(mask, k.shape[2])
        if start < stop:
            k, v, mask = k[:, :, start:stop], v[:, :, start:stop], Band()
            bias = None if bias is None else bias[..., start:stop]
    causal = False
    if mask == Band(right=0) and q.shape[2] == k.shape[2] and bias is None:
        causal, mask = True, Band()
    seen = None if mask == Band() else masks.allowed(mask, q.shape[2], k.shape[2], q.device)
    added = _added(seen, bias)
    # A branch, because the argument must be a bool also where sizes are symbols.
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if q.is_cuda and (added is not None or q.dtype == torch.float32 or q.shape[3] > 256):
            # PyTorch would leave its fused kernels for the sake of grouped heads.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        else:
            grouped = {"enable_gqa": True}
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=added,
        dropout_p=options.dropout,
        is_causal=causal,
        scale=options.scale,
        **grouped,
    )
    if q.is_cuda and seen is not None:
        # cuDNN's kernel gives a row that sees nothing the mean of the values.
        out = out.masked_fill(~seen.any(-1, keepdim=True), 0)
    return out


def _bias(q: Tensor, k: Tensor, options: Options) -> Tensor | None:
    """Table and bias as one tensor in q's dtype, [B|1, H|1, N|1, M]."""
    whole = whole_table(options, q.shape[2], k.shape[2])
    if whole is None:
        if options.bias is None:
            return None
        # A parameter would keep PyTorch from its fused kernel even where no gradient is wanted.
        bias = options.bias if torch.is_grad_enabled() else options.bias.detach()
        return bias.to(q.dtype)
    # Row i begins at entry N - 1 - i; PyTorch's gradient of this is faster than that of a gather.
    table = whole.unfold(1, k.shape[2], 1).flip(1)[None]
    return (table if options.bias is None else table + options.bias).to(q.dtype)


def _added(seen: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Mask and bias as PyTorch takes them: bool if there is only a mask."""
    if seen is None or bias is None:
        return bias if seen is None else seen
    # On a GPU not -inf, of which a whole row makes NaN in cuDNN's kernel.
    hides = torch.finfo(bias.dtype).min if bias.is_cuda else -torch.inf
    return bias.masked_fill(~seen, hides)
