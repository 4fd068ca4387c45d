"""VITS: vectors of near distances on keys and on values, Shaw's, within `forward`.

Its class multiplies them with queries and with weights as matrices of all pairs. `forward` is
replaced by the class's own steps around attention, with the vectors as relative terms.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from flashpatch.dispatch import DEFAULT, Settings, attend, fall_back
from flashpatch.patches.interface import read_call, why_blocked
from flashpatch.products import unexpanded
from flashpatch.registry import Patch, register
from flashpatch_kernels.options import Options, Relative


def forward(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Stands for the class's `forward`.

    Args:
        module: The attention module.
        hidden_states: [B, N, H * D].
        key_value_states: The class never looks at them.
        attention_mask: Added to the scores, [B, 1, N, N].
        output_attentions: Asks for the attention weights.

    Returns:
        The output [B, N, H * D], and the attention weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    original = partial(
        type(module).forward,
        module,
        hidden_states,
        key_value_states,
        attention_mask,
        output_attentions,
    )
    arguments = {
        "dropout": module.dropout if module.training else 0.0,
        "output_attentions": output_attentions,
        "scaling": module.scaling,
    }
    blocked = why_blocked(module, settings, arguments)
    if blocked is not None:
        return fall_back(blocked, settings, original)
    projections, size = (module.q_proj, module.k_proj, module.v_proj), (-1, module.head_dim)
    q, k, v = (project(hidden_states).unflatten(2, size) for project in projections)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if attention_mask is None else unexpanded(attention_mask)
    q, k, v, options = read_call(q, k, v, mask, False, settings, arguments)
    out = attend(q, k, v, _with_vectors(module, q, options), settings, original)
    if isinstance(out, tuple):
        return out
    return module.out_proj(out.transpose(1, 2).flatten(2)), None


def _with_vectors(module: Any, q: Tensor, options: Options) -> Options:
    """The options with the vectors of distances, which are 0 beyond the window."""
    if not module.window_size:
        return options
    first = -module.window_size - 1
    on_keys, on_values = (
        functional.pad(x, (0, 0, 1, 1)) for x in (module.emb_rel_k, module.emb_rel_v)
    )  # [1, 2 window_size + 3, D]
    return replace(
        options,
        relative_queries=Relative(on_keys * options.scale, first, vectors=q),
        relative_values=Relative(on_values, first),
    )


register(
    Patch(
        "transformers.models.vits.modeling_vits.VitsAttention",
        keyed=False,
        swaps={"forward": lambda module: partial(forward, module)},
        needs_key=False,
    )
)
