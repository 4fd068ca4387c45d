"""T5 and its relatives: a position bias of O(N) where their classes build [1, H, N, M].

They call attention through the interface and hand it a `position_bias`. Here their `compute_bias`
gives the table of all distances instead (see `flashpatch_kernels.options`), and cross-attention,
which has no bias but builds a matrix of zeros, gives one zero. The rest is in `interface`.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flashpatch.registry import KEEP, Patch, register

CLASSES = (
    "longt5.modeling_longt5.LongT5Attention",
    "mt5.modeling_mt5.MT5Attention",
    "pix2struct.modeling_pix2struct.Pix2StructTextAttention",
    "pop2piano.modeling_pop2piano.Pop2PianoAttention",
    "switch_transformers.modeling_switch_transformers.SwitchTransformersAttention",
    "t5.modeling_t5.T5Attention",
    "udop.modeling_udop.UdopAttention",
    "umt5.modeling_umt5.UMT5Attention",
)


def table(
    module: nn.Module,
    query_length: int,
    key_length: int,
    device: torch.device | None = None,
    past_seen_tokens: int | Tensor = 0,
) -> Tensor:
    """The bias of each distance j - i between key and query, [1, H, 1, N + M - 1] from 1 - N.

    The class's own method computes it, as the row that one query at the last position would have on
    N + M - 1 keys. Beyond `relative_attention_max_distance` R all distances share a bucket: without
    a past, those from -R to R say all, [1, H, 1, 2 R + 1] where that is less.
    """
    cls: Any = type(module)
    reach = cast("int", module.relative_attention_max_distance)
    no_past = isinstance(past_seen_tokens, int) and past_seen_tokens == 0
    if no_past and query_length > 1 and 2 * reach + 1 < query_length + key_length - 1:
        near = cls.compute_bias(module, 1, 2 * reach + 1, device=device, past_seen_tokens=reach)
        return near.contiguous()  # here, once for all layers: kernels read rows of distances
    return cls.compute_bias(
        module,
        1,
        key_length + query_length - 1,
        device=device,
        past_seen_tokens=past_seen_tokens + (query_length - 1),
    )


def zero(
    module: nn.Module,
    query_length: int,
    key_length: int,
    device: torch.device | None = None,
    past_seen_tokens: int | Tensor = 0,
) -> Tensor:
    """The bias of a module that has none: [1, 1, 1, 1]."""
    return torch.zeros((1, 1, 1, 1), device=device)


def _has_bias(module: nn.Module) -> bool:
    """Whether the module has a bias of its own: the flag may have been replaced."""
    return hasattr(module, "relative_attention_bias")


def _compute_bias(module: nn.Module) -> Any:
    return partial(table if _has_bias(module) else zero, module)


def _flag(module: nn.Module) -> Any:
    """True, so that modules without a bias ask `compute_bias` for it."""
    return KEEP if _has_bias(module) else True


def _is_causal(module: nn.Module) -> Any:
    """True for self-attention in decoders, of which transformers 5.17 says it is not for UMT5."""
    decodes = getattr(module, "is_decoder", False)
    return True if decodes and _has_bias(module) and not module.is_causal else KEEP


for _name in CLASSES:
    register(
        Patch(
            f"transformers.models.{_name}",
            swaps={
                "compute_bias": _compute_bias,
                "is_causal": _is_causal,
                "has_relative_attention_bias": _flag,
            },
        )
    )
