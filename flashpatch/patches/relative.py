"""Conformers and VITS: attention with a vector per distance, Transformer-XL's or Shaw's.

Their classes build the scores of these vectors as a matrix of all pairs before they call attention,
if they call any. `forward` is replaced by the class's own steps around attention, with the vectors
as the relative terms of `flashpatch_kernels.options`; a call that cannot be served goes to the
class's own `forward`. Transformers 5.15 computes attention there, later releases ask the interface;
VITS computes it itself, with vectors for the values too, and none beyond a window.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flashpatch.dispatch import DEFAULT, Settings, attend, fall_back
from flashpatch.inspection import calls_interface
from flashpatch.masks import expand, pack
from flashpatch.patches.interface import KEYS, read_call, why_blocked
from flashpatch.registry import KEEP, Patch, register
from flashpatch_kernels.masks import Intervals, intersect, key_mask
from flashpatch_kernels.options import Options, Relative

CLASSES = (
    "seamless_m4t.modeling_seamless_m4t.SeamlessM4TConformerSelfAttention",
    "seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2ConformerSelfAttention",
    "wav2vec2_bert.modeling_wav2vec2_bert.Wav2Vec2BertSelfAttention",
    "wav2vec2_conformer.modeling_wav2vec2_conformer.Wav2Vec2ConformerSelfAttention",
)


def forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    relative_position_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stands for the class's `forward`.

    Args:
        module: The attention module.
        hidden_states: [B, N, H * D].
        attention_mask: As `fpatch_mask` makes it, or a 4-D boolean or additive mask.
        relative_position_embeddings: What the model's encoder computes for the kind of positions:
            [1, 2 N - 1, H * D] from the largest i - j to the least, [2, N, 1, 1, D] or None.
        kwargs: `output_attentions` and what else the model passes.

    Returns:
        The output [B, N, H * D], and the attention weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    positions = relative_position_embeddings
    keyed = getattr(getattr(module, "config", None), "_attn_implementation", None) in KEYS
    if keyed:
        # the class's own forward asks the interface, which then tells the reason itself
        settings = replace(settings, on_fallback=_be_silent)

    def original() -> tuple[Tensor, Tensor | None]:
        n, mask = hidden_states.shape[1], attention_mask
        if mask is not None and mask.dtype == torch.int32 and not keyed:
            mask = expand(mask, n, n, hidden_states, causal=False, additive=True)
        named = {} if positions is None else {"relative_position_embeddings": positions}
        return type(module).forward(module, hidden_states, mask, **named, **kwargs)

    arguments = {
        **kwargs,
        "dropout": module.dropout.p if module.dropout.training else 0.0,
        "scaling": module.head_size**-0.5,
    }
    if positions is None and module.position_embeddings_type in ("relative", "rotary"):
        return original()  # which says what is missing
    if module.position_embeddings_type == "relative":
        n = hidden_states.shape[1]
        # others than a vector for each distance, the same for all texts
        odd = positions is not None and positions.shape[:2] != (1, 2 * n - 1)
        arguments["relative_position_embeddings"] = positions if odd else None
    blocked = why_blocked(module, settings, arguments)
    if blocked is not None:
        return fall_back(blocked, settings, original)
    q, k, v = _project(module, hidden_states, positions)
    q, k, v, options = read_call(q, k, v, _one_row(attention_mask), False, settings, arguments)
    q, options = _with_positions(module, q, positions, options)
    out = attend(q, k, v, options, settings, original)
    if isinstance(out, tuple):
        return out
    return module.linear_out(out.transpose(1, 2).flatten(2)), None


def _be_silent(_: Any) -> None:
    """Tells nobody."""


def _one_row(mask: Tensor | None) -> Tensor | None:
    """The mask without its rows where they are one row, expanded: as transformers 5.15 makes it."""
    if mask is None or mask.dtype == torch.int32 or mask.stride(2) != 0:
        return mask
    return mask[:, :, :1]


def _project(module: Any, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [B, H, N, D] each."""
    turned = x
    if module.position_embeddings_type == "rotary":
        turned = module._apply_rotary_embedding(x, positions)
    q, k, v = module.linear_q(turned), module.linear_k(turned), module.linear_v(x)
    q, k, v = (y.unflatten(2, (module.num_heads, module.head_size)) for y in (q, k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _with_positions(
    module: Any, q: Tensor, positions: Tensor | None, options: Options
) -> tuple[Tensor, Options]:
    """The queries as they meet the keys, and the options with the vectors of the distances."""
    if module.position_embeddings_type == "relative" and positions is not None:
        embeddings = module.linear_pos(positions[0]).unflatten(1, (-1, module.head_size))
        relative = Relative(
            embeddings.transpose(0, 1) * options.scale,  # [H, 2 N - 1, D]
            first=1 - q.shape[2],
            vectors=q + module.pos_bias_v[:, None],
        )
        return q + module.pos_bias_u[:, None], replace(options, relative_queries=relative)
    if module.position_embeddings_type == "relative_key":
        left, right = module.left_max_position_embeddings, module.right_max_position_embeddings
        embeddings = module.distance_embedding(torch.arange(left + right + 1, device=q.device))
        relative = Relative(
            embeddings[None].to(q.dtype) * options.scale,  # [1, left + right + 1, D]
            first=-left,
            vectors=q,
        )
        return q, replace(options, relative_queries=relative)
    return q, options


def apply_chunk_attention(
    encoder: Any, attention_mask: Tensor | None, hidden_states: Tensor
) -> Tensor | None:
    """Stands for `_apply_chunk_attention` of SeamlessM4Tv2's encoder: the chunks as intervals.

    Args:
        encoder: The conformer encoder.
        attention_mask: [B, N], true for what is not padding, or None.
        hidden_states: [B, N, E].

    Returns:
        int32 as `masks.pack` makes it; the mask as it is where there is one chunk.
    """
    n, device = hidden_states.shape[1], hidden_states.device
    size, left = (
        encoder.config.speech_encoder_chunk_size,
        encoder.config.speech_encoder_left_chunk_num,
    )
    if n <= size:
        return attention_mask
    chunk = torch.arange(n, device=device) // size
    lo = torch.zeros_like(chunk) if left < 0 else (chunk - left).clamp(min=0) * size
    bounds = torch.stack((lo, ((chunk + 1) * size).clamp(max=n)), dim=-1)
    mask = Intervals(bounds[None].to(torch.int32))
    if attention_mask is not None:
        mask = intersect(key_mask(attention_mask.bool()), mask, n, n, device)
    assert isinstance(mask, Intervals)
    return pack(mask)


def forward_within_window(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stands for `VitsAttention.forward`.

    Args:
        module: The attention module.
        hidden_states: [B, N, H * D].
        key_value_states: Of no effect.
        attention_mask: As `fpatch_mask` makes it, or a 4-D boolean or additive mask.
        output_attentions: Whether the attention weights are wanted.
        kwargs: What else the model passes.

    Returns:
        The output [B, N, H * D], and the attention weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    batch, n = hidden_states.shape[:2]

    def original() -> tuple[Tensor, Tensor | None]:
        mask = expand(attention_mask, n, n, hidden_states, causal=False, additive=True)
        mask = mask if mask is None else mask.expand(batch, -1, -1, -1)
        return type(module).forward(
            module,
            hidden_states,
            key_value_states=key_value_states,
            attention_mask=mask,
            output_attentions=output_attentions,
            **kwargs,
        )

    arguments = {
        **kwargs,
        "dropout": module.dropout if module.training else 0.0,
        "output_attentions": output_attentions,
        "scaling": module.scaling,
    }
    blocked = why_blocked(module, settings, arguments)
    if blocked is not None:
        return fall_back(blocked, settings, original)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    heads = (module.num_heads, module.head_dim)
    q, k, v = (f(hidden_states).unflatten(2, heads).transpose(1, 2) for f in projections)
    q, k, v, options = read_call(q, k, v, _one_row(attention_mask), False, settings, arguments)
    if module.window_size is not None:
        keys, values = (_zero_beyond(x) for x in (module.emb_rel_k, module.emb_rel_v))
        first = -module.window_size - 1
        options = replace(
            options,
            relative_queries=Relative(keys * options.scale, first, vectors=q),
            relative_values=Relative(values, first),
        )
    out = attend(q, k, v, options, settings, original)
    if isinstance(out, tuple):
        return out
    return module.out_proj(out.transpose(1, 2).flatten(2)), None


def _zero_beyond(embeddings: Tensor) -> Tensor:
    """[1, T, D] with a vector of zeros at either end, [1, T + 2, D]."""
    return functional.pad(embeddings, (0, 0, 1, 1))


def _chunks(encoder: Any) -> Any:
    """Only where the mask is handed on as it is: transformers 5.15 computes with it."""
    attention = type(encoder.layers[0].self_attn)
    return partial(apply_chunk_attention, encoder) if calls_interface(attention) else KEEP


for _name in CLASSES:
    register(
        Patch(
            f"transformers.models.{_name}",
            swaps={"forward": lambda module: partial(forward, module)},
            needs_key=False,
        )
    )
register(
    Patch(
        "transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2ConformerEncoder",
        keyed=False,
        swaps={"_apply_chunk_attention": _chunks},
        attends=False,
    )
)
register(
    Patch(
        "transformers.models.vits.modeling_vits.VitsAttention",
        swaps={"forward": lambda module: partial(forward_within_window, module)},
        needs_key=False,
    )
)
