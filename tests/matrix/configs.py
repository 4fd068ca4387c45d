"""A tiny config for any model type: transformers' default one, with every size made small.

Sizes are known by the names that transformers' configs give them. What does not follow from a name
is a `Row`.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# (the end of a name, the largest value); the first that matches holds.
SIZES = tuple(
    (re.compile(rf"(.*_)?({names})\Z"), largest)
    for names, largest in (
        ("vocab_size|n_words", 99),
        ("codebook_size|num_codevectors_per_group", 64),
        ("num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|kv_heads", 2),
        ("heads|n_head|num_head", 4),
        ("layers|layer|num_blocks|depth|num_stages", 2),
        ("head_dim|d_kv|attention_head_size|d_head|kv_channels|head_size", 8),
        ("rotary_dim", 4),
        ("intermediate_size|ffn_dim|mlp_dim|d_ff|n_inner|feedforward_dim|inner_dim|ffn_size", 48),
        ("ffn_hidden_size|dim_feedforward|ffn_intermediate_size", 48),
        ("hidden_size|hidden_dim|d_model|embed_dim|n_embd|embedding_size|dim|width|emb_dim", 32),
        ("embedding_dim|hidden_channels|output_dim|projection_dim|projector_dim|output_size", 32),
        ("lora_rank", 16),
        ("num_experts|routed_experts|local_experts", 4),
        ("experts_per_tok|top_k|moe_k|moe_topk", 2),
        ("n_group|topk_group|num_expert_group", 1),
        ("position_embeddings|n_positions|max_seq_len|n_ctx|max_seq_length", 128),
        ("source_positions|target_positions|context_length|max_sequence_length", 128),
        ("num_mel_bins|n_mels|feature_size", 16),
        ("sliding_window|sliding_window_size|local_attention|attention_chunk_size", 5),
    )
)
# Names that end like a size and are none.
NO_SIZE = re.compile(
    r"(vision|text|audio)_feature_layer|select_layer|adapter_kernel_size|first_k_.*|.*conv_dim|"
    r".*num_hidden_groups|insert_layer_id|.*out_layer|num_feat_extract_layers|"
    r".*_(start|end)_layer|.*layer_interval|.*_every_n_layers?|merged_hidden_size"
)
TOKEN = re.compile(r"(.*_)?(pad|bos|eos|sep|cls|unk|mask|start|end)_token_id\Z")
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "sep": 2, "cls": 1, "unk": 3, "start": 1, "end": 2}
PATCHES = 4  # of an image, in height and width
DROPOUT = re.compile(
    r".*(drop(out|path|_path)?(_rate|_prob|_p|_ratio)?|layerdrop|pdrop|jitter_noise|"
    r"mask_(time|feature)_prob|_drop_prob)\Z"
)


def small(name: str, value: Any) -> Any:
    """A number of a config, no larger than it is in a tiny model."""
    if isinstance(value, bool) or NO_SIZE.match(name):
        return value
    if isinstance(value, float):
        return 0.0 if DROPOUT.match(name) else value
    if not isinstance(value, int):
        return value
    token = TOKEN.match(name)
    if token is not None:
        return TOKENS.get(token[2], 3) if value > 60 else value
    for pattern, largest in SIZES:
        if pattern.match(name):
            return min(largest, value)
    return value


# Lists of a number for each stage: the end of a name, what each number becomes.
STAGES = (
    (re.compile(r"(.*_)?(depths|stage_depths|num_layers|layers_per_stage)\Z"), 2),
    (re.compile(r"(.*_)?(heads|num_attention_heads|num_heads)\Z"), 2),
    (re.compile(r"(.*_)?(hidden_sizes|embed_dims|dims|widths|channels)\Z"), 32),
)


def small_list(name: str, value: list[int]) -> list[int]:
    """A list of one number for each stage, none larger than in a tiny model."""
    for pattern, largest in STAGES:
        if pattern.match(name):
            return [min(largest, number) for number in value]
    return value


def small_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a config, and of those within it, is to be smaller: as its constructor takes it."""
    values: dict[str, Any] = {}
    # of layers that differ the defaults' sizes are read, whatever single layers say
    config.allow_global_per_layer_attribute_access = True
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = {"model_type": value.model_type, **small_values(value)}
        elif not name.startswith("_"):
            numbers = isinstance(value, list | tuple) and all(type(x) is int for x in value)
            smaller = small_list(name, list(value)) if numbers else small(name, value)
            if smaller is not value and smaller != value:
                values[name] = smaller
    for rule in (_heads_in_pairs, _kinds_of_layers, _few_patches, _sections_of_rotation):
        rule(config, values)
    return values


def _heads_in_pairs(config: Any, values: dict[str, Any]) -> None:
    """As many heads of keys as of queries, where that is so by default."""
    heads = getattr(config, "num_attention_heads", None)
    if heads == getattr(config, "num_key_value_heads", 0) and "num_attention_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]


def _kinds_of_layers(config: Any, values: dict[str, Any]) -> None:
    """One layer of each kind, and no fewer than two."""
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, list | tuple) or "num_hidden_layers" not in values:
        return
    name = type(config).attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(type(config), name, None), property):
        return
    distinct = list(dict.fromkeys(kinds))
    if len(distinct) > 1:
        values[name] = distinct
        values["num_hidden_layers"] = len(distinct)


def _few_patches(config: Any, values: dict[str, Any]) -> None:
    """An image of few patches."""
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(image, int) and isinstance(patch, int) and image > PATCHES * patch:
        values["image_size"] = PATCHES * patch


def _sections_of_rotation(config: Any, values: dict[str, Any]) -> None:
    """Rotary positions in three axes, whose shares make up half of a head."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return
    heads = values.get("num_attention_heads", getattr(config, "num_attention_heads", 4))
    hidden = values.get("hidden_size", getattr(config, "hidden_size", 32))
    size = values.get("head_dim", getattr(config, "head_dim", None)) or hidden // heads
    half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
    rest = half // 3
    values["rope_parameters"] = {**rope, "mrope_section": [half - 2 * rest, rest, rest]}


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the overrides in their place, dict by dict."""
    result = dict(values)
    for name, value in overrides.items():
        inner = result.get(name)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[name] = merged(inner, value) if both else value
    return result


def tiny_config(model_type: str, overrides: Mapping[str, Any]) -> Any:
    """The tiny config of a model type."""
    if overrides.get("from_scratch"):
        values = {k: v for k, v in overrides.items() if k != "from_scratch"}
    else:
        values = merged(small_values(CONFIG_MAPPING[model_type]()), overrides)
    return CONFIG_MAPPING[model_type](**deepcopy(values))  # some take what they need out of them
