"""Tells, from its source alone, how a class computes attention."""

import ast
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

_INTERFACE = re.compile(r"(?<!MASK)_ATTENTION_FUNCTIONS\b")  # not the registry of mask functions
# What such names as "AttentionPooling" end with, and "BlockAttentionResidual".
_NOT_OF_TOKENS = (
    "AdditiveAttention",
    "AttentionMap",
    "AttentionResidual",
    "GRUCell",
    "Pooler",
    "Pooling",
)
_EAGER = re.compile(r"\w*eager_attention_forward\b")
_COMMENT = re.compile(r"#.*")
_SOFTMAX = re.compile(
    r"[sS]oftmax(\.apply)?\(|scaled_dot_product_attention\(|MultiheadAttention\(|"
    r"logsumexp\(|multi_head_attention_forward\("
)
_PRODUCT = re.compile(
    r"matmul\w*\(|bmm\(|einsum\(|@ |scaled_dot_product_attention\(|multi_head_attention_forward\("
)


@cache
def _classes_in(file: str) -> dict[str, str]:
    """The classes of a file and their source. `inspect` reads the file anew for each of them."""
    text = Path(file).read_text("utf-8")
    lines = text.splitlines(keepends=True)
    return {
        node.name: "".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    }


@cache
def source_of(cls: type) -> str | None:
    """The source of a class, if it has one that can be read."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    if cls.__module__.startswith("transformers.") and file.endswith(".py"):
        return _classes_in(file).get(cls.__qualname__)
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # built at run time, or without a source file
        return None


@cache
def own_attention(cls: type) -> bool:
    """Whether the class itself calls an attention function or computes a softmax of products.

    Containers, routers and poolers do neither, nor does what mixes a token's own earlier states.
    """
    if cls.__module__.startswith("torch."):
        return cls.__name__ == "MultiheadAttention"
    if not cls.__module__.startswith("transformers.models.") and "Attention" not in cls.__name__:
        return False
    source = source_of(cls)
    if source is None:
        return "Attention" in cls.__name__
    if _INTERFACE.search(_COMMENT.sub("", source)):
        return True
    if "Attention" not in cls.__name__ or cls.__name__.endswith(_NOT_OF_TOKENS):
        return False
    return bool(_SOFTMAX.search(source) and _PRODUCT.search(source))


@cache
def calls_interface(cls: type) -> bool:
    """Whether the class or one above it names transformers' attention interface.

    Where no source can be read, it is taken to.
    """
    for above in cls.__mro__:
        if above.__module__.startswith(("torch.", "builtins")):
            continue
        source = source_of(above)
        if source is None or _INTERFACE.search(source):
            return True
    return False


@cache
def places(cls: Any) -> dict[str, int]:
    """The arguments of a class's `forward`, and where each stands."""
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return {name: place for place, name in enumerate(names)}


@cache
def eager_name(cls: type) -> str:
    """Name of the function that the class gives the attention interface as its own, or "".

    Where no source can be read, it is taken to be the usual one.
    """
    source = source_of(cls)
    if source is None:
        return "eager_attention_forward"
    found = _EAGER.search(source)
    return found[0] if found else ""
