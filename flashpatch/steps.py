"""What functions of PyTorch make of a product: of its arguments what it then is.

A step raises `UnreadableError` where the result is not attention's: the function is then computed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashpatch.products import Product
from flashpatch.scores import PerQuery, Terms, UnreadableError, constant, unexpanded


def _hides(value: Any) -> bool:
    """Whether a key that is given this score is hidden by it.

    From some 100 below the largest score on, a weight is less than any number of float32, so that
    only where all else is below -9 900 another score than minus infinity would make a difference.
    """
    value = constant(value)
    return isinstance(value, int | float) and value <= -1e4


def _is_least(value: Any) -> bool:
    """Whether no score is below this value: the least of a dtype."""
    value = constant(value)
    return isinstance(value, int | float) and value <= torch.finfo(torch.float16).min


def _of(x: Any) -> Terms:
    if not isinstance(x, Product) or x.terms is None:
        raise UnreadableError
    return x.terms


def _plus(a: Any, b: Any, alpha: float = 1) -> Terms:
    if alpha != 1:
        raise UnreadableError
    if isinstance(a, Product) and isinstance(b, Product):
        # the first is the product with the keys if it is not known; the other is a bias
        if b.terms is not None and a.terms is None:
            a, b = b, a
        return _of(a).plus(b.compute())
    return _of(a).plus(b) if isinstance(a, Product) else _of(b).plus(a)


def _minus(a: Any, b: Any) -> Terms:
    if isinstance(a, Product) and isinstance(b, Product) and b.per_query is not None:
        terms = _of(a)
        if not b.per_query.kept:
            raise UnreadableError
        if b.per_query.normaliser and b.per_query.terms is terms:
            return replace(terms, normal=True)
        if b.per_query.normaliser or b.per_query.terms.shape != terms.shape or terms.softmax:
            raise UnreadableError
        return terms  # less a number for each query, which changes no softmax
    if not isinstance(a, Product) or not isinstance(b, Tensor) or not b.is_floating_point():
        raise UnreadableError
    return _of(a).plus(-b)


def _times(a: Any, b: Any) -> Terms:
    a, b = (a, b) if isinstance(a, Product) else (b, a)
    return _of(a).scaled(constant(b))


def _over(a: Any, b: Any, rounding_mode: Any = None) -> Terms:
    b = constant(b)
    if rounding_mode is not None or isinstance(b, Product) or not isinstance(a, Product):
        raise UnreadableError
    return _of(a).scaled(1 / b)


def _softmax(x: Product, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Terms:
    terms = _of(x)
    possible = terms.whole and not (terms.softmax or terms.normal)
    if not possible or dim not in (-1, len(terms.shape) - 1):
        raise UnreadableError
    return replace(terms, softmax=True, dtype=dtype or terms.dtype)


def _largest(x: Product, dim: Any = None, keepdim: bool = False) -> PerQuery:
    terms = _of(x)
    done = terms.softmax or terms.normal or not terms.whole
    if done or dim not in (-1, len(terms.shape) - 1):
        raise UnreadableError
    return PerQuery(terms, kept=keepdim)


def _normaliser(x: Product, dim: Any = None, keepdim: bool = False) -> PerQuery:
    return replace(_largest(x, dim, keepdim), normaliser=True)


def _exp(x: Product) -> Terms:
    terms = _of(x)
    if not terms.normal:
        raise UnreadableError
    return replace(terms, normal=False, softmax=True)


def _detach(x: Product) -> PerQuery:
    if x.per_query is None or x.per_query.normaliser:
        raise UnreadableError
    return x.per_query


def _dropout(x: Product, p: float = 0.5, training: bool = True, inplace: bool = False) -> Terms:
    terms = _of(x)
    if not terms.softmax or (training and p > 0 and terms.dropout > 0):
        raise UnreadableError
    return replace(terms, dropout=p) if training and p > 0 else terms


def _view(x: Product, *shape: Any) -> Terms:
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    if not all(isinstance(size, int) for size in shape):
        raise UnreadableError
    return _of(x).view(shape)


def _permute(x: Product, *order: Any, dims: Any = None) -> Terms:
    order = order if dims is None else (dims,)
    return _of(x).permuted(tuple(order[0] if len(order) == 1 else order))


def _view_as(x: Any, other: Any) -> Any:
    """A tensor may be given the shape of a product, which is known before it is computed."""
    return _of(x).view(tuple(other.shape)) if isinstance(x, Product) else x.reshape(other.shape)


def _expand_as(x: Any, other: Any) -> Tensor:
    if isinstance(x, Product):
        raise UnreadableError
    return x.expand(other.shape)


def _unsqueeze(x: Product, dim: int) -> Terms | PerQuery:
    if x.per_query is not None and not x.per_query.kept and dim == -1:
        return replace(x.per_query, kept=True)
    shape = list(_of(x).shape)
    shape.insert(dim if dim >= 0 else len(shape) + 1 + dim, 1)
    return _of(x).view(tuple(shape))


def _masked_fill(x: Product, mask: Any, value: Any) -> Terms:
    terms = _of(x)
    if terms.softmax and constant(value) == 0 and any(mask is m for m in terms.hidden):
        return terms  # their weights are 0
    if not _hides(value) or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise UnreadableError
    return replace(terms.seen_where(~unexpanded(mask)), hidden=(*terms.hidden, mask))


def _where(condition: Any, x: Any, other: Any) -> Terms:
    if isinstance(condition, Product):  # as a tensor's method
        condition, x = x, condition
    if isinstance(x, Product) and _hides(other):
        return _of(x).seen_where(condition)
    if isinstance(other, Product) and _hides(x):
        return _of(other).seen_where(~condition)
    raise UnreadableError


def _at_least(x: Any, least: Any = None, **kwargs: Any) -> Terms:
    """A maximum or a clamp that keeps scores from being infinite changes none that is finite."""
    least = kwargs.get("min", least)
    if kwargs.get("max") is not None or not _is_least(least) or not isinstance(x, Product):
        raise UnreadableError
    return _of(x)


def _cast(x: Product, *args: Any, **kwargs: Any) -> Terms:
    """Softmax is taken in float32 in any case."""
    terms = _of(x)
    given = [*args, *kwargs.values()]
    dtypes = [a for a in given if isinstance(a, torch.dtype)]
    dtypes += [a.dtype for a in given if isinstance(a, Tensor | Product)]
    if not all(d.is_floating_point for d in dtypes):
        raise UnreadableError
    return replace(terms, dtype=dtypes[0]) if dtypes else terms


def _same(x: Product, *args: Any, **kwargs: Any) -> Terms:
    return _of(x)


STEPS: dict[str, Callable[..., Any]] = {
    "add": _plus,
    "radd": _plus,
    "sub": _minus,
    "mul": _times,
    "multiply": _times,
    "rmul": _times,
    "div": _over,
    "divide": _over,
    "true_divide": _over,
    "truediv": _over,
    "softmax": _softmax,
    "tanh": lambda x: _of(x).capped(),
    "amax": _largest,
    "logsumexp": _normaliser,
    "exp": _exp,
    "detach": _detach,
    "dropout": _dropout,
    "view": _view,
    "reshape": _view,
    "view_as": _view_as,
    "reshape_as": _view_as,
    "expand_as": _expand_as,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    "masked_fill": _masked_fill,
    "where": _where,
    "max": _at_least,
    "maximum": _at_least,
    "clamp": _at_least,
    "clamp_min": _at_least,
    "to": _cast,
    "type_as": _cast,
    "type": _cast,
    "contiguous": _same,
    "clone": _same,
    "float": lambda x: replace(_of(x), dtype=torch.float32),
    "half": lambda x: replace(_of(x), dtype=torch.float16),
    "bfloat16": lambda x: replace(_of(x), dtype=torch.bfloat16),
}
# What may be returned beside the output, and is computed only if it is looked at.
DEFERRED = ("mean", "sum")
