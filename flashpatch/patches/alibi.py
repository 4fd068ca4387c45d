"""BLOOM: attention within `forward`, on scores that start from a tensor of ALiBi biases.

The bias of a key is the same for every query, a [B, H, 1, M]. `forward` is replaced, by the class's
own steps around attention; a call that cannot be served goes to the class's own `forward`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from flashpatch.dispatch import DEFAULT, Settings, attend, fall_back
from flashpatch.masks import expand
from flashpatch.patches.interface import is_causal, read_call, why_blocked
from flashpatch.registry import Patch, register
from flashpatch_kernels.engines import Reason

SLOW_BUT_EXACT = Reason(
    "SLOW_BUT_EXACT", "slow_but_exact asks for the original's own sums over tensor-parallel ranks"
)


class Updated:
    """A cache that holds one layer's keys and values already, for a second try of the same call."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.states = key, value

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values, [B, H, M, D] each."""
        return self.states


def forward(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stands for `BloomAttention.forward`.

    Args:
        module: The attention module.
        hidden_states: [B, N, H * D].
        residual: [B, N, H * D], added to the result.
        alibi: [B * H, 1, M], added to the scores.
        attention_mask: As `fpatch_mask` makes it, or a 4-D boolean or additive mask.
        layer_past: The cache.
        use_cache: Unused, as in the original.
        output_attentions: Whether the attention weights are wanted.
        kwargs: Unused, as in the original.

    Returns:
        The output [B, N, H * D], and the attention weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    arguments = {
        "dropout": module.attention_dropout.p if module.attention_dropout.training else 0.0,
        "output_attentions": output_attentions,
        "scaling": module.inv_norm_factor,
    }
    causal = is_causal(module, hidden_states.shape[1], attention_mask)

    def original(cache: Any) -> tuple[Tensor, Tensor | None]:
        n, m = hidden_states.shape[1], alibi.shape[-1]
        mask = expand(attention_mask, n, m, hidden_states, causal=causal, additive=True)
        return type(module).forward(module, hidden_states, residual, alibi, mask, cache)

    blocked = why_blocked(module, settings, arguments)
    if module.pretraining_tp > 1 and module.slow_but_exact:
        blocked = blocked or SLOW_BUT_EXACT
    if blocked is not None:
        return fall_back(blocked, settings, partial(original, layer_past))

    q, k, v = module._reshape(module.query_key_value(hidden_states))  # [B, H, N, D] each
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    updated = None if layer_past is None else Updated(k, v)
    q, k, v, options = read_call(q, k, v, attention_mask, causal, settings, arguments)
    bias = alibi.view(q.shape[0], q.shape[1], 1, -1)[..., : k.shape[2]]
    options = replace(options, bias=bias if options.bias is None else bias + options.bias)
    out = attend(q, k, v, options, settings, partial(original, updated))
    if isinstance(out, tuple):
        return out
    context = module.dense(out.transpose(1, 2).flatten(2))
    return residual + functional.dropout(context, module.hidden_dropout, module.training), None


register(
    Patch(
        "transformers.models.bloom.modeling_bloom.BloomAttention",
        swaps={"forward": lambda module: partial(forward, module)},
    )
)
