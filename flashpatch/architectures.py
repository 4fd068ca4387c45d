"""Which architectures of the installed transformers flashpatch serves, found by reading classes.

Nothing is built: a model type's classes are followed from its model classes by the names in their
source, and those that compute attention are looked up in the registry.
"""

import ast
import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from flashpatch.inspection import own_attention, source_of
from flashpatch.patching import patch_of, why_left


@dataclass(frozen=True)
class AttentionClass:
    """A class that computes attention.

    Attributes:
        name: Its name.
        route: "interface", "method", or "left".
        reason: Why it is left.
    """

    name: str
    route: str
    reason: str = ""


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers.

    Attributes:
        model_type: Its name.
        attention: The classes that compute attention in its models; none for other models.
        needs: What they ask for beyond softmax(q k^T) v.
        alternatives: What transformers itself can run it on besides "eager".
    """

    model_type: str
    attention: tuple[AttentionClass, ...]
    needs: tuple[str, ...]
    alternatives: tuple[str, ...]

    @property
    def route(self) -> str:
        """How it is served: "interface", "method", "partly", "left", or "none" to serve."""
        routes = {a.route for a in self.attention}
        if "left" in routes:
            return "partly" if len(routes) > 1 else "left"
        return "method" if "method" in routes else "interface" if routes else "none"


# What an attention class needs -> how that is named where it is computed.
NEEDS = {
    "window": r"sliding_window|local_attention|window_size",
    "sinks": r"\bs_aux\b|\bsinks\b",
    "softcap": r"softcap",
    "position bias": r"position_bias|relative_position|rel_pos|relative_attention_bias",
    "ALiBi": r"alibi",
    "grouped heads": r"num_key_value_groups|num_kv_heads|num_key_value_heads",
    "cross-attention": r"encoder_hidden_states|key_value_states|cross_attention",
    "packed sequences": r"cu_seqlens|cu_seq_lens",
    "latent keys": r"kv_lora_rank",
}
# What transformers can run a model on -> the flag of its class that says so.
FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
# What the route of an architecture means to its user.
ROUTES = {
    "interface": "served, through transformers' attention interface",
    "method": "served, by a method replaced on the model's modules",
    "partly": "served but for the classes that are named",
    "left": "left to transformers",
    "none": "without attention, or without a model class that can be imported",
}
_BUILDERS = re.compile(r"Auto(Model|Backbone)\w*|load_backbone")


def coverage() -> tuple[Architecture, ...]:
    """Every model type of the installed transformers, and how its attention is served."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # default configs complain of themselves
    try:
        return tuple(_architecture(name) for name in sorted(CONFIG_MAPPING))
    finally:
        transformers.logging.set_verbosity(before)


def as_markdown(architectures: Sequence[Architecture]) -> str:
    """A document with a table of all architectures that have attention, and their counts."""
    counts = Counter(a.route for a in architectures)
    lines = [
        f"# Architectures of transformers {transformers.__version__}",
        "",
        "Written by `flashpatch models --markdown`, which reads the classes of the installed",
        "transformers. `tests/matrix` runs each of them as a tiny model, beside its own attention.",
        "",
        *(f"- {counts[route]} {meaning}" for route, meaning in ROUTES.items() if counts[route]),
        "",
        "| Model type | Served by | Attention needs | transformers has | Left |",
        "| --- | --- | --- | --- | --- |",
    ]
    for a in architectures:
        if a.attention:
            left = "; ".join(f"`{c.name}`: {c.reason}" for c in a.attention if c.reason)
            cells = (a.model_type, a.route, ", ".join(a.needs), ", ".join(a.alternatives), left)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _architecture(model_type: str) -> Architecture:
    roots = model_classes(CONFIG_MAPPING[model_type])
    found = sorted(attention_classes(model_type), key=lambda cls: cls.__name__)
    sources = "\n".join(source_of(cls) or "" for cls in found)
    return Architecture(
        model_type,
        tuple(_described(cls) for cls in found),
        tuple(need for need, pattern in NEEDS.items() if re.search(pattern, sources)),
        tuple(n for n, flag in FLAGS.items() if any(getattr(r, flag, False) for r in roots)),
    )


def _described(cls: type) -> AttentionClass:
    patch = patch_of(cls)
    if patch is None:
        return AttentionClass(cls.__name__, "left", why_left(cls).text)
    return AttentionClass(cls.__name__, "method" if "forward" in patch.swaps else "interface")


def model_classes(config: type) -> list[type]:
    """The model classes that take a config: those beside it, and that of another type's file."""
    name = config.__module__.replace(".configuration_", ".modeling_")
    try:
        beside = vars(importlib.import_module(name)).values()
    except ImportError:  # a config of another type's models, or a package that is missing
        beside = ()
    classes = [c for c in beside if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    found = [c for c in classes if c.config_class is config]
    if found:
        return [*found]
    mapped: Any = modeling_auto.MODEL_MAPPING.get(config, ())
    return [*mapped] if isinstance(mapped, tuple) else [mapped]


@cache
def attention_classes(model_type: str) -> frozenset[type]:
    """The classes that compute attention in the models of a type and of the types within it."""
    config = CONFIG_MAPPING[model_type]
    seen: set[type] = set()
    ahead: list[type] = model_classes(config)
    within = False
    while ahead:
        cls = ahead.pop()
        if cls in seen:
            continue
        seen.add(cls)
        names = _names(cls)
        within = within or any(_BUILDERS.fullmatch(name) for name in names)
        ahead += _modules_named(cls, names)
    found = {cls for cls in seen if own_attention(cls)}
    if within:
        for inner in _types_within(config):
            found |= attention_classes(inner)
    return frozenset(found)


def _modules_named(cls: type, names: frozenset[str]) -> Iterator[type]:
    """The classes of modules that a class's source names, alone or within a table."""
    known = vars(sys.modules.get(cls.__module__, object))
    named = [known.get(name) for name in names]
    if "MultiheadAttention" in names:  # of `nn`
        named.append(nn.MultiheadAttention)
    for value in (*named, *cls.__bases__):
        values = value.values() if isinstance(value, dict) else (value,)
        for found in (v for v in values if isinstance(v, type)):
            # those of that name name all classes of a file, for what they record
            if issubclass(found, nn.Module) and not found.__name__.endswith("PreTrainedModel"):
                yield found


def _types_within(config: type) -> Iterator[str]:
    """The model types of the configs that a config holds by default."""
    try:
        default: Any = config()
    except Exception:  # noqa: BLE001  (some say that they have no default)
        return
    for value in vars(default).values():
        inner = isinstance(value, PreTrainedConfig) and type(value) is not config
        if inner and value.model_type in CONFIG_MAPPING:
            yield value.model_type


@cache
def _names(cls: type) -> frozenset[str]:
    """The names and attributes in the source of a class."""
    if not cls.__module__.startswith("transformers."):
        return frozenset()
    nodes = list(ast.walk(ast.parse(source_of(cls) or "")))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    return frozenset(names | {n.attr for n in nodes if isinstance(n, ast.Attribute)})
