"""Where options and the engine are noted of calls of `attention`, for those that are alike.

To check what a call is given, and to choose its engine, takes longer than to compute a short one.
"""

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from flashpatch_kernels.engines import computing_dtype
from flashpatch_kernels.options import Options
from flashpatch_kernels.recent import Recent

Decided = tuple[Options, str]


def recent_of(
    q: Tensor, terms: tuple[Tensor | None, ...], plain: tuple[Any, ...]
) -> Recent[Decided] | None:
    """What was last decided for calls with the same of these terms, and else of plain arguments.

    Noted are options without tensors, which each call has of its own.

    Args:
        plain: All arguments but tensors; where one is not plain nothing is noted.
    """
    # Sizes of other types may be symbols, which must not be compared.
    if torch.compiler.is_compiling() or type(q) not in (Tensor, Parameter):
        return None
    if not _PLAIN.issuperset(map(type, plain)):
        return None
    # Whatever else decides, beside what `Recent` looks at: off a card, whether Triton interprets.
    interpret = None if q.is_cuda else os.environ.get("TRITON_INTERPRET")
    missing = tuple([x is None for x in terms])
    return _recent(*plain, missing, torch.is_grad_enabled(), computing_dtype(q), interpret)


def forget() -> None:
    """Forgets all decisions."""
    _recent.cache_clear()


_PLAIN = frozenset((bool, int, float, str, type(None)))


# Typed, because True is 1 but no window.
@lru_cache(256, typed=True)
def _recent(*_: Any) -> Recent[Decided]:
    return Recent()
