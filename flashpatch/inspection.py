"""Tells, from its source alone, how a class computes attention."""

import inspect
import re
from functools import cache

_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS|_ATTENTION_FUNCTIONS\b")
_SOFTMAX = re.compile(r"softmax\(|scaled_dot_product_attention\(|MultiheadAttention\(")
_PRODUCT = re.compile(r"matmul\(|bmm\(|einsum\(|@ |scaled_dot_product_attention\(")


@cache
def own_attention(cls: type) -> bool:
    """Whether the class itself calls an attention function or computes a softmax of products.

    Containers, routers and poolers do neither.
    """
    if cls.__module__.startswith("torch."):
        return cls.__name__ == "MultiheadAttention"
    if not cls.__module__.startswith("transformers.models.") and "Attention" not in cls.__name__:
        return False
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # built at run time, or without a source file
        return "Attention" in cls.__name__
    if _INTERFACE.search(source):
        return True
    return bool(_SOFTMAX.search(source) and _PRODUCT.search(source)) and "Attention" in cls.__name__


@cache
def calls_interface(cls: type) -> bool:
    """Whether the class or one above it names transformers' attention interface.

    Where no source can be read, it is taken to.
    """
    for above in cls.__mro__:
        if above.__module__.startswith(("torch.", "builtins")):
            continue
        try:
            source = inspect.getsource(above)
        except (OSError, TypeError):
            return True
        if _INTERFACE.search(source):
            return True
    return False
