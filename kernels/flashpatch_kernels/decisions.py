"""Where it is noted what was decided for a call, for those that are alike.

To check what a call is given, and to choose its engine, takes longer than to compute a short one.
"""

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from flashpatch_kernels import masks
from flashpatch_kernels.engines import computing_dtype
from flashpatch_kernels.options import Options
from flashpatch_kernels.recent import Recent


def recent_of(
    q: Tensor, tensors: tuple[Tensor | None, ...], plain: tuple[Any, ...]
) -> Recent[Any] | None:
    """What was last decided for calls with the same of these tensors, and else of plain arguments.

    Args:
        tensors: Beside q, k and v.
        plain: All arguments but tensors; where one is not plain nothing is noted.
    """
    # Sizes of other types may be symbols, which must not be compared.
    if torch.compiler.is_compiling() or type(q) not in (Tensor, Parameter):
        return None
    if not _PLAIN.issuperset(map(type, plain)):
        return None
    # Whatever else decides, beside what `Recent` looks at: off a card, whether Triton interprets.
    interpret = None if q.is_cuda else os.environ.get("TRITON_INTERPRET")
    missing = tuple([x is None for x in tensors])
    return _recent(*plain, missing, torch.is_grad_enabled(), computing_dtype(q), interpret)


def recent_of_options(
    q: Tensor, k: Tensor, v: Tensor, options: Options, *, lse: bool
) -> tuple[Recent[Any] | None, list[Tensor]]:
    """What was last decided for calls on such tensors with such options, and its tensors in order.

    Nothing is noted where vectors by distance or a user's function take part.
    """
    o = options
    if o.relative or o.score is not None:
        return None, []
    band, of_mask = masks.parts(o.mask)
    tensors = (o.table, o.slopes, o.bias, o.sinks, *of_mask)
    plain = (*band, o.softcap is None, o.dropout, lse)
    return recent_of(q, tensors, plain), [q, k, v, *[x for x in tensors if x is not None]]


def forget() -> None:
    """Forgets all decisions."""
    _recent.cache_clear()


_PLAIN = frozenset((bool, int, float, str, type(None)))


# Typed, because True is 1 but no window.
@lru_cache(256, typed=True)
def _recent(*_: Any) -> Recent[Any]:
    return Recent()
