"""Longformer's attention: a window around each token, and tokens that see all and are seen by all.

Its classes compute the window in overlapping chunks. Here it is a mask of intervals. Where there
are global tokens, every query has two sets of keys, its window and the global ones, each an
interval for the engine, and the two outputs are merged by their log-sum-exps.

Letters: B batch, H heads, N tokens, D head size.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashpatch.dispatch import DEFAULT, Settings, attend_parts, dropout_seed, fall_back
from flashpatch.patches.interface import why_blocked
from flashpatch.registry import Patch, register
from flashpatch_kernels.masks import Band, Intervals, Mask, intersect, key_mask
from flashpatch_kernels.options import Options

CLASSES = (
    "led.modeling_led.LEDEncoderSelfAttention",
    "longformer.modeling_longformer.LongformerSelfAttention",
)


def forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    is_index_masked: Tensor | None = None,
    is_index_global_attn: Tensor | None = None,
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """Stands for the class's `forward`.

    Args:
        module: The attention module.
        hidden_states: [B, N, H * D].
        attention_mask: [B, N]: negative for padding, 0 for local tokens, positive for global ones.
        is_index_masked: bool [B, N], the first of these.
        is_index_global_attn: bool [B, N], the last.
        is_global_attn: Whether there are any of the last, as the model has found.
        output_attentions: Asks for the attention weights.

    Returns:
        The output [B, N, H * D], 0 for padding; and weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    original = partial(
        type(module).forward,
        module,
        hidden_states,
        attention_mask,
        is_index_masked,
        is_index_global_attn,
        is_global_attn,
        output_attentions,
    )
    blocked = why_blocked(module, settings, {"output_attentions": output_attentions})
    if blocked is not None:
        return fall_back(blocked, settings, original)
    if attention_mask is None or is_index_masked is None:
        return original()  # which says that they are missing
    x, n = hidden_states, hidden_states.shape[1]
    reach = module.one_sided_attn_window_size
    local, real = attention_mask == 0, ~is_index_masked
    window = _for(local, intersect(key_mask(local), Band(reach, reach), n, n, x.device))
    q, k, v = _heads(module, x, module.query, module.key, module.value)
    parts = [_part(module, q, k, v, window)]
    if is_global_attn:
        assert is_index_global_attn is not None
        parts.append(_part(module, q, k, v, _for(local, key_mask(is_index_global_attn))))
        q, k, v = _heads(module, x, module.query_global, module.key_global, module.value_global)
        parts.append(_part(module, q, k, v, _for(is_index_global_attn, key_mask(real))))
    found = attend_parts(parts, settings, lse=len(parts) > 1)
    if found is None:
        return original()
    out = found[0][0]
    if len(found) > 1:
        # what is no local query has seen nothing in the first two parts, and their output is 0
        lses = [lse.where(local[:, None], 0.0) for _, lse in found[:2] if lse is not None]
        both = torch.logaddexp(*lses)
        near, far = ((lse - both).exp()[..., None].to(out.dtype) for lse in lses)
        out = near * out + far * found[1][0] + found[2][0]
    return (out.transpose(1, 2).flatten(2),)


def _heads(module: Any, x: Tensor, *projections: Any) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, H, N, D] each."""
    size = (module.num_heads, module.head_dim)
    return tuple(project(x).unflatten(2, size).transpose(1, 2) for project in projections)


def _part(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Any:
    """One call, as `attend_parts` takes it."""
    dropout = module.dropout if module.training else 0.0
    seed = dropout_seed(dropout, q.device)
    scale = module.head_dim**-0.5
    return q, k, v, Options(mask=mask, scale=scale, dropout=dropout, seed=seed)


def _for(queries: Tensor, mask: Mask) -> Intervals:
    """The mask for these queries, bool [B, N]; the others see nothing."""
    assert isinstance(mask, Intervals)
    return replace(mask, bounds=mask.bounds * queries[..., None])


for _name in CLASSES:
    register(
        Patch(
            f"transformers.models.{_name}",
            keyed=False,
            swaps={"forward": lambda module: partial(forward, module)},
            needs_key=False,
        )
    )
