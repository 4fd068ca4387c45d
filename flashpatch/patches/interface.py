"""Classes that call attention through transformers' attention interface, and what answers there.

Such a class asks the interface for the function named by its config: `fn(module, query, key, value,
attention_mask, **kwargs)`. `apply` gives the config the key `fpatch`; both the attention function
and the mask function under that key are here registered. The key contains none of the words
("flash", "sdpa", ...) that transformers tests names for.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flashpatch import weights
from flashpatch.dispatch import (
    DEFAULT,
    HEAD_MASK,
    OUTPUT_ATTENTIONS,
    SKIPPED,
    Part,
    Settings,
    attend,
    attend_parts,
    dropout_seed,
    fall_back,
    unknown_argument,
)
from flashpatch.inspection import eager_name
from flashpatch.masks import (
    DROP_QUERIES,
    NONE_IS_NO_MASK,
    expand,
    fpatch_mask,
    fpatch_whole_mask,
    of_last_queries,
    read_once,
    separate,
    unpack,
    within_window,
)
from flashpatch.patches.interface_classes import CLASSES
from flashpatch.registry import Patch, register
from flashpatch_kernels import masks
from flashpatch_kernels.engines import Reason
from flashpatch_kernels.masks import Band, Mask
from flashpatch_kernels.options import Options

KEY = "fpatch"
# For models of which an attention class only adds a mask: no mask then stands for a causal one.
MASKED_KEY = "fpatch_masked"
KEYS = (KEY, MASKED_KEY)

# Arguments that models pass on and that change nothing, given the mask.
HARMLESS = frozenset(
    (
        "cu_seq_lens_k",
        "deterministic",
        "grid_thw",
        "input_ids",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "seq_idx",
        "sliding_window",
        "use_cache",
        "vision_feature_layer",
    )
)


def fpatch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function under the key `fpatch`.

    Args:
        module: The attention module, patched or built with `attn_implementation="fpatch"`.
        query: [B, H, N, D].
        key: [B, H_kv, M, D].
        value: [B, H_kv, M, Dv].
        attention_mask: As `fpatch_mask` makes it (int32), or a 4-D boolean or additive mask.
        kwargs: `scaling`, `dropout`, `is_causal`, `position_bias`, `softcap`, `s_aux`,
            `sinks`, `position_ids`, `cu_seq_lens_q`, `indices`, `block_indices` and what else the
            model passes.

    Returns:
        The output [B, N, H, Dv], and the attention weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    if model_type(module) in DROP_QUERIES:
        attention_mask = of_last_queries(attention_mask, query.shape[2], key.shape[2])
    causal = is_causal(module, query.shape[2], attention_mask, kwargs.get("is_causal"))
    selected = selected_keys(module, query.shape[1], key.shape[2], kwargs)
    if selected is not None:
        attention_mask = among(selected, attention_mask, causal)
        kwargs = {n: x for n, x in kwargs.items() if n not in ("indices", "block_indices")}

    def original() -> tuple[Tensor, Tensor | None]:
        return run_original(
            module, query, key, value, attention_mask, causal, settings.original, kwargs
        )

    blocked = why_blocked(module, settings, kwargs)
    if blocked is not None:
        return fall_back(blocked, settings, original)

    q, k, v, options = read_call(query, key, value, attention_mask, causal, settings, kwargs)
    sinks = kwargs.get("sinks")
    if sinks is not None:
        out = attend_with_sinks((q, k, v, options), sinks, settings)
        return original() if out is None else (out.transpose(1, 2), None)
    out = attend(q, k, v, options, settings, original)
    return out if isinstance(out, tuple) else (out.transpose(1, 2), None)


def model_type(module: nn.Module) -> str | None:
    """That of the config which an attention module holds."""
    return getattr(getattr(module, "config", None), "model_type", None)


def attend_with_sinks(part: Part, sinks: Tensor, settings: Settings) -> Tensor | None:
    """Attention in which each query has a sink of its own; None if no engine serves it.

    Without the sink, a query's weights have the sum 1; of exp(lse) + exp(sink) they are but
    exp(lse), which is a sigmoid.

    Args:
        part: q, k, v and the options, as `attend` takes them.
        sinks: Logits that take weight and give no value, [B, H, N, 1].
        settings: Those of the module that makes the call.

    Returns:
        [B, H, N, Dv].
    """
    found = attend_parts([part], settings, lse=True)
    if found is None:
        return None
    (out, lse), *_ = found
    assert lse is not None
    return out * torch.sigmoid(lse[..., None] - sinks).to(out.dtype)


def is_causal(
    module: nn.Module, n: int, attention_mask: Tensor | None, stated: bool | None = None
) -> bool:
    """Whether a call of n queries is causal without a mask saying so.

    Source: transformers, `sdpa_attention_forward`: the argument, else the module, else True; never
    beside a mask or for a single query.
    """
    if model_type(module) in NONE_IS_NO_MASK:
        return False
    causal = getattr(module, "is_causal", True) if stated is None else stated
    return bool(causal) and attention_mask is None and n > 1


def selected_keys(
    module: nn.Module, heads: int, n_keys: int, kwargs: dict[str, Any]
) -> Tensor | None:
    """The keys that an indexer chose for each query, bool [B, H|1, N, M], if the model has one.

    `indices` are keys, int [B, N, T]. `block_indices` are blocks of keys, int [B, H_kv, N, T], of
    the size that the config gives, and -1 is none.

    Source: transformers, `DeepseekV32Attention.forward`, `MiniMaxM3VLIndexer.build_block_mask`.
    """
    indices, blocks = kwargs.get("indices"), kwargs.get("block_indices")
    if indices is not None:
        none = indices.new_zeros((*indices.shape[:-1], n_keys), dtype=torch.bool)
        return none.scatter(-1, indices.long(), True)[:, None]
    if blocks is None:
        return None
    config: Any = module.config
    size = config.index_block_size
    count = -(-n_keys // size)
    none = blocks.new_zeros((*blocks.shape[:-1], count + 1), dtype=torch.bool)
    chosen = none.scatter(-1, blocks.masked_fill(blocks < 0, count), True)[..., :count]
    each = chosen.repeat_interleave(size, dim=-1)[..., :n_keys]
    return each.repeat_interleave(heads // blocks.shape[1], dim=1)


def among(selected: Tensor, attention_mask: Tensor | None, causal: bool) -> Tensor:
    """The mask by which queries see none but the selected keys, bool [B, H|1, N, M]."""
    n, m = selected.shape[2:]
    if attention_mask is None:
        band = Band(right=0) if causal else Band()
        return selected & masks.allowed(band, n, m, selected.device)
    if attention_mask.is_floating_point():
        return attention_mask.masked_fill(~selected, torch.finfo(attention_mask.dtype).min)
    return selected & masks.allowed(unpack(attention_mask, n, m), n, m, selected.device)


def why_blocked(module: nn.Module, settings: Settings, kwargs: dict[str, Any]) -> Reason | None:
    """The reason to run the original attention that is known before the call is read."""
    if not settings.active:
        return SKIPPED
    if kwargs.get("output_attentions") or weights.asked():
        return OUTPUT_ATTENTIONS
    if kwargs.get("head_mask") is not None or kwargs.get("layer_head_mask") is not None:
        return HEAD_MASK
    for name, value in kwargs.items():
        if name not in HARMLESS and name not in READ and value is not None:
            return unknown_argument(name)
    return None


READ = frozenset(
    (
        "cu_seq_lens_q",
        "dropout",
        "head_mask",
        "is_causal",
        "layer_head_mask",
        "output_attentions",
        "position_bias",
        "position_ids",
        "s_aux",
        "scaling",
        "sinks",
        "softcap",
    )
)


def read_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    settings: Settings,
    kwargs: dict[str, Any],
    *,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Options]:
    """The call in flashpatch's terms.

    `window`: of the keys of a causal mask, each query sees so many at most; None if the mask says
    all.
    """
    n, m = q.shape[2], k.shape[2]
    q, k, v = one_batch(q, k, v)
    position_bias = kwargs.get("position_bias")
    if causal and m > n:
        # an empty StaticCache: the keys beyond the queries are unwritten (upper-left alignment)
        position_bias = crop(position_bias, n, m)
        k, v, m = k[:, :, :n], v[:, :, :n], n
    mask: Mask = Band(right=0) if causal else Band()
    bias = None
    if attention_mask is not None and attention_mask.is_floating_point():
        bias = attention_mask[..., :m]
    elif attention_mask is not None:
        read = read_once if window is None else unpack
        mask = read(attention_mask, n, m)
    if window is not None:
        mask = within_window(mask, window, n, m)
    mask = keep_documents_apart(mask, settings, kwargs, n, m)
    table = first = None
    if position_bias is not None and not is_constant(position_bias):
        if is_table(position_bias, n, m):
            table, first = position_bias[0, :, 0], first_distance(position_bias, n, m)
        else:
            bias = position_bias if bias is None else bias + position_bias
    scale, dropout = kwargs.get("scaling"), kwargs.get("dropout") or 0.0
    options = Options(
        mask=mask,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=kwargs.get("softcap"),
        table=table,
        first=first,
        bias=bias,
        sinks=kwargs.get("s_aux"),
        dropout=dropout,
        seed=dropout_seed(dropout, q.device),
    )
    return q, k, v, options


def one_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in a batch of one size: queries that are parameters may come once for all."""
    sizes = {x.shape[0] for x in tensors}
    if len(sizes) == 1:
        return tensors
    return tuple(x.expand(max(sizes), -1, -1, -1) for x in tensors)


def keep_documents_apart(
    mask: Mask, settings: Settings, kwargs: dict[str, Any], n: int, m: int
) -> Mask:
    """The mask within packed documents, where the call says which they are."""
    cumulative, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if n != m:
        return mask
    if cumulative is not None:
        return masks.intersect(mask, masks.cu_seqlens(cumulative, n), n, m, cumulative.device)
    if settings.packing == "position_ids" and position_ids is not None:
        return separate(mask, position_ids, n, m)
    return mask


def is_constant(position_bias: Tensor) -> bool:
    """A bias that is one number changes no softmax: what patched cross-attention layers pass."""
    return position_bias.numel() == 1


def is_table(position_bias: Tensor, n: int, m: int) -> bool:
    """Whether a position bias is one of distances, [1, H, 1, T], instead of [1, H, N, M]."""
    one_row = position_bias.shape[0] == 1 and position_bias.shape[2] == 1
    return one_row and (n > 1 or position_bias.shape[3] == n + m - 1)


def first_distance(position_bias: Tensor, n: int, m: int) -> int | None:
    """The distance of a table's entry 0, where it has not all N + M - 1: as many on either side."""
    entries = position_bias.shape[3]
    return None if entries == n + m - 1 else -(entries // 2)


def crop(position_bias: Tensor | None, n: int, m: int) -> Tensor | None:
    """The position bias of the first n of m keys."""
    if position_bias is None or is_constant(position_bias):
        return position_bias
    if is_table(position_bias, n, m):
        whole = first_distance(position_bias, n, m) is None
        return position_bias[..., : 2 * n - 1] if whole else position_bias
    return position_bias[..., :n]


def dense_position_bias(position_bias: Tensor, n: int, m: int) -> Tensor:
    """The position bias as the original attention expects it: [1, H, N, M]."""
    if is_constant(position_bias):
        return position_bias.expand(1, 1, n, m)
    if n == 1 or not is_table(position_bias, n, m):
        return position_bias
    first = first_distance(position_bias, n, m)
    i = torch.arange(n, device=position_bias.device)[:, None]
    j = torch.arange(m, device=position_bias.device)
    at = j - i - (1 - n if first is None else first)
    return position_bias[:, :, 0, at.clamp(0, position_bias.shape[3] - 1)]


def run_original(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    original: str,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention that the module would have run unpatched, on the mask it would have had."""
    n, m = query.shape[2], key.shape[2]
    named = None if original in KEYS else ALL_ATTENTION_FUNCTIONS.get(original)
    wanted = kwargs.get("output_attentions") or weights.asked()
    own = eager_attention(module) if wanted or named is None else None
    function = own or named
    if function is None:
        raise TypeError(f"{type(module).__name__} has no eager attention to fall back to")
    if kwargs.get("position_bias") is not None:
        position_bias = dense_position_bias(kwargs["position_bias"], n, m).to(query.dtype)
        kwargs = {**kwargs, "position_bias": position_bias}
    mask = expand(attention_mask, n, m, query, causal=causal, additive=own is not None)
    return function(module, query, key, value, mask, **kwargs)


def eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """What the module's class runs where its config names nothing else, if it has that."""
    for cls in type(module).__mro__:
        name = eager_name(cls)
        if name and hasattr(sys.modules.get(cls.__module__), name):
            return getattr(sys.modules[cls.__module__], name)
    return None


def activate() -> None:
    """Registers the functions under their keys, for the models whose config names one."""
    for key, mask in ((KEY, fpatch_mask), (MASKED_KEY, fpatch_whole_mask)):
        AttentionInterface.register(key, fpatch_attention)
        AttentionMaskInterface.register(key, mask)


for _module, _names in CLASSES.items():
    for _name in _names:
        register(Patch(f"transformers.models.{_module}.{_name}"))
activate()
