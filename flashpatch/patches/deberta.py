"""DeBERTa and SEW-D: attention of contents to positions and of positions to contents.

Their encoders build a mask and the distances of all pairs, their attention three matrices of scores
per head. Here the encoder gives the mask as intervals and no distances, and `forward` is replaced
by the class's own steps around attention, with the positions as the relative terms of
`flashpatch_kernels.options`. A call that cannot be served goes to the class's own `forward`, with
what the encoder would have built.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashpatch.dispatch import DEFAULT, Settings, attend, fall_back
from flashpatch.inspection import places
from flashpatch.masks import expand, pack
from flashpatch.patches.interface import read_call, why_blocked
from flashpatch.registry import Patch, register
from flashpatch_kernels.engines import Reason
from flashpatch_kernels.masks import Intervals, key_mask
from flashpatch_kernels.options import Relative

TALKING_HEADS = Reason(
    "TALKING_HEADS", "the heads of this model mix their scores, which only the original computes"
)


@dataclass(frozen=True)
class Version:
    """What DeBERTa, DeBERTa-v2 and SEW-D do differently.

    Attributes:
        project: (module, x [B, N, E]) -> queries, keys and values, [B, H, N, D] each.
        keys: Name of the projection of positions to what queries meet.
        queries: Name of the projection of positions to what keys meet.
        terms: (module) -> how many terms the scores are the sum of.
        builds: Whether the class's own `forward` builds the distances where it is given none.
        pairs: Whether it returns a pair even where an argument says that no weights are wanted.
    """

    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    keys: str
    queries: str
    terms: Callable[[Any], int]
    builds: bool
    pairs: bool = True


def get_attention_mask(encoder: Any, attention_mask: Tensor) -> Tensor:
    """Stands for the encoder's: a token that is hidden, of [B, N], neither sees nor is seen.

    Returns:
        int32 as `masks.pack` makes it; of a mask that is not 2-D, the class's own as booleans.
    """
    if attention_mask.dim() != 2:
        return type(encoder).get_attention_mask(encoder, attention_mask).bool()
    visible = attention_mask != 0
    keys = key_mask(visible)
    return pack(Intervals(torch.where(visible[..., None], keys.bounds, 0), keys.runs))


def get_rel_pos(
    encoder: Any,
    hidden_states: Tensor,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
) -> Tensor | None:
    """Stands for the encoder's: an empty tensor in the place of the distances of all pairs."""
    if not encoder.relative_attention or query_states is not None or relative_pos is not None:
        return type(encoder).get_rel_pos(encoder, hidden_states, query_states, relative_pos)
    return torch.empty(0, dtype=torch.long, device=hidden_states.device)


def forward(
    version: Version,
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Stands for `DisentangledSelfAttention.forward`.

    Args:
        version: Facts about the class.
        module: The attention module.
        hidden_states: [B, N, E].
        attention_mask: As `get_attention_mask` makes it, or [B, 1, N|1, N] of any dtype.
        output_attentions: Whether the attention weights are wanted.
        query_states: Refused unless None.
        relative_pos: As `get_rel_pos` makes it; others are refused.
        rel_embeddings: [T, E], those of the distances, or None.
        kwargs: What else the model passes.

    Returns:
        The output [B, N, H * D], and the attention weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    n = hidden_states.shape[1]
    # what `pack` makes is always wider
    mask = attention_mask.bool() if attention_mask.shape[-1] == n else attention_mask
    if relative_pos is not None and relative_pos.numel() == 0:
        relative_pos, given = None, True
    else:
        given = relative_pos is None and version.builds

    def original() -> Any:
        dense = expand(mask, n, n, hidden_states, causal=False, additive=False)
        distances = relative_pos
        if given and not version.builds:
            distances = _file_of(module).build_relative_position(hidden_states, hidden_states)
        return type(module).forward(
            module,
            hidden_states,
            dense,
            output_attentions=output_attentions,
            query_states=query_states,
            relative_pos=distances,
            rel_embeddings=rel_embeddings,
            **kwargs,
        )

    arguments = {
        **kwargs,
        "dropout": _probability(module.dropout),
        "output_attentions": output_attentions,
        "query_states": query_states,
        "relative_pos": relative_pos,
        "scaling": (module.attention_head_size * version.terms(module)) ** -0.5,
    }
    blocked = why_blocked(module, settings, arguments)
    if blocked is None and getattr(module, "talking_head", False):
        blocked = TALKING_HEADS
    if blocked is not None:
        return fall_back(blocked, settings, original)
    q, k, v = version.project(module, hidden_states)
    q, k, v, options = read_call(q, k, v, mask, False, settings, arguments)
    if module.relative_attention and given and rel_embeddings is not None:
        p, rows, first = _positions(module, n, module.pos_dropout(rel_embeddings))

        shared = getattr(module, "share_att_key", False)

        def relative(projection: str, vectors: Tensor) -> Relative:
            projected = _heads(module, getattr(module, projection)(p))  # [H, T, D]
            return Relative(projected.index_select(1, rows) * options.scale, first, vectors)

        if "c2p" in module.pos_att_type:
            keys = relative("key_proj" if shared else version.keys, q)
            options = replace(options, relative_queries=keys)
        if "p2c" in module.pos_att_type:
            queries = relative("query_proj" if shared else version.queries, k)
            options = replace(options, relative_keys=queries)
    out = attend(q, k, v, options, settings, lambda: None)
    if out is None:
        return original()
    out = out.transpose(1, 2).flatten(2)
    return (out, None) if version.pairs or "output_attentions" not in places(type(module)) else out


def _probability(dropout: Any) -> float:
    """With which PyTorch's dropout or a `StableDropout` drops now."""
    if not dropout.training:
        return 0.0
    return dropout.p if hasattr(dropout, "p") else dropout.drop_prob


def _file_of(module: Any) -> Any:
    """The file that defines the module's class."""
    return sys.modules[type(module).__module__]


def _heads(module: Any, x: Tensor) -> Tensor:
    """[..., T, H * D] -> [..., H, T, D]."""
    return x.unflatten(-1, (module.num_attention_heads, -1)).transpose(-3, -2)


def _positions(module: Any, n: int, p: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which of the embeddings p, [T, E], N tokens need of their distances.

    Returns:
        Those embeddings, the row of each distance j - i, and the least distance: the first's. All
        distances beyond the first's and the last's have the same rows as these.
    """
    span = getattr(module, "pos_ebd_size", module.max_relative_positions)
    buckets, farthest = getattr(module, "position_buckets", -1), module.max_relative_positions
    if buckets <= 0:
        middle, span = span, min(n, span)
        p = p[middle - span : middle + span]
    last = min(n - 1, _reach(span, buckets, farthest))
    x = torch.arange(last, -last - 1, -1, device=p.device)  # i - j
    if buckets > 0:
        x = _file_of(module).make_log_bucket_position(x, buckets, farthest).long()
    # the row is that of c2p_pos, and of p2c_pos: numbers of buckets are odd functions of distance
    return p[: 2 * span], (x + span).clamp(0, 2 * span - 1), -last


def _reach(span: int, buckets: int, farthest: int) -> int:
    """A distance beyond which, on either side, all have the same embedding."""
    middle = buckets // 2
    if buckets <= 0:
        return span
    if middle < 2 or farthest <= middle + 1:  # the buckets do not grow
        return sys.maxsize
    # where the logarithm of `make_log_bucket_position` passes the last row
    growth = (farthest - 1) / middle
    return math.ceil(middle * growth ** ((span - middle) / (middle - 1)))


def _project_v1(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads(module, module.in_proj(x)).chunk(3, dim=-1)
    return q + _heads(module, module.q_bias[None]), k, v + _heads(module, module.v_bias[None])


def _project_v2(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        _heads(module, f(x)) for f in (module.query_proj, module.key_proj, module.value_proj)
    )
    return q, k, v


def _terms_v1(module: Any) -> int:
    return 1 + len(module.pos_att_type)


def _terms_v2(module: Any) -> int:
    return 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)


VERSIONS = {
    "deberta.modeling_deberta.DisentangledSelfAttention": Version(
        project=_project_v1,
        keys="pos_proj",
        queries="pos_q_proj",
        terms=_terms_v1,
        builds=False,
    ),
    "deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": Version(
        project=_project_v2,
        keys="pos_key_proj",
        queries="pos_query_proj",
        terms=_terms_v2,
        builds=True,
    ),
    "sew_d.modeling_sew_d.DisentangledSelfAttention": Version(
        project=_project_v2,
        keys="pos_key_proj",
        queries="pos_query_proj",
        terms=_terms_v2,
        builds=True,
        pairs=False,  # in transformers 5.15
    ),
}
STAND_INS = {"get_attention_mask": get_attention_mask, "get_rel_pos": get_rel_pos}
# Encoders, and what is replaced of them. SEW-D's mask is one of keys alone.
ENCODERS = {
    "deberta.modeling_deberta.DebertaEncoder": ("get_attention_mask", "get_rel_pos"),
    "deberta_v2.modeling_deberta_v2.DebertaV2Encoder": ("get_attention_mask", "get_rel_pos"),
    "sew_d.modeling_sew_d.SEWDTransformerEncoder": ("get_rel_pos",),
}


def _register(owner: str, version: Version) -> None:
    swaps = {"forward": lambda module: partial(forward, version, module)}
    register(Patch(owner, keyed=False, swaps=swaps))


for _name, _version in VERSIONS.items():
    _register(f"transformers.models.{_name}", _version)


def _stands_in(name: str) -> Callable[[Any], Any]:
    return lambda encoder: partial(STAND_INS[name], encoder)


for _name, _replaced in ENCODERS.items():
    register(
        Patch(
            f"transformers.models.{_name}",
            keyed=False,
            swaps={name: _stands_in(name) for name in _replaced},
            attends=False,
        )
    )
