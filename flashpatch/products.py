"""Attention that a class computes operation by operation, read while it does.

Such a class multiplies queries and keys, scales, adds masks and biases, takes the softmax, drops
out and multiplies with the values. Within `Reading` no product of tensors is computed at once: a
`Product` stands for it and notes what is done to it. When a softmax of one is multiplied with
values, an engine computes all of it; whatever else is done to one computes it as the class itself
would have, operation by operation. So nothing is taken for attention that is none, and a class
needs no replacement of its own, only to be named.

What a product has become is in `flashpatch.scores`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function
from torch.utils._pytree import tree_map

from flashpatch.dispatch import Settings, attend, fall_back
from flashpatch.masks import expand
from flashpatch.scores import (
    PerQuery,
    Terms,
    UnreadableError,
    constant,
    note_constant,
    number,
    unexpanded,
)
from flashpatch_kernels.engines import Reason
from flashpatch_kernels.masks import Band, intersect


class Product:
    """Stands for a product of tensors and for what becomes of it; computed only where it must be.

    Attributes:
        replay: Computes it as the class would have.
        terms: What it is; None where that is not known.
        is_weights: Whether a softmax was taken on the way here.
        per_query: What it is instead, if it has one number for each query.
    """

    def __init__(
        self,
        replay: Callable[[], Tensor],
        terms: Terms | None,
        is_weights: bool = False,
        per_query: PerQuery | None = None,
    ) -> None:
        self.replay = replay
        self.terms = terms
        self.is_weights = is_weights
        self.per_query = per_query
        self.computed: Tensor | None = None

    def compute(self) -> Tensor:
        """The tensor itself."""
        if self.computed is None:
            # a `Reading` that goes on would only make a product of it again
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                self.computed = self.replay()
            self.terms = None
        return self.computed

    def copy(self) -> "Product":
        """The same, for when this one is changed in place."""
        return Product(self.replay, self.terms, self.is_weights)

    @property
    def shape(self) -> torch.Size:
        """As a tensor's."""
        return self.compute().shape if self.terms is None else self.terms.shape

    @property
    def dtype(self) -> torch.dtype:
        """As a tensor's."""
        return self.compute().dtype if self.terms is None else self.terms.dtype

    @property
    def device(self) -> torch.device:
        """As a tensor's."""
        return self.compute().device if self.terms is None else self.terms.q.device

    @property
    def ndim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        function = getattr(torch.Tensor, name)
        if not callable(function):
            return getattr(self.compute(), name)
        return partial(handle_torch_function, function, (self,), self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What a function makes of products outside of a `Reading`: the tensors'."""
        return func(*computed(args), **computed(kwargs or {}))


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Product, *args: Any) -> Any:
        return handle_torch_function(getattr(torch.Tensor, name), (self, *args), self, *args)

    return operate


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul"):
    setattr(Product, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("rmatmul", "neg", "getitem", "setitem", "lt", "le", "gt", "ge", "pow"):
    setattr(Product, f"__{_name}__", _operator(f"__{_name}__"))


def computed(tree: Any) -> Any:
    """The same with tensors in the place of products."""
    return released(tree, weights=True)


def released(tree: Any, *, weights: bool) -> Any:
    """What a class returns, without products; attention weights are None unless `weights`."""
    kind = type(tree)
    if kind is Product:
        return tree.compute() if weights or not tree.is_weights else None
    if kind is tuple or kind is list:  # plain loops: this runs for every operation that is read
        return kind([released(x, weights=weights) for x in tree])
    if kind is dict:
        return {name: released(x, weights=weights) for name, x in tree.items()}
    if isinstance(tree, tuple | list | dict):
        return tree_map(lambda x: released(x, weights=weights) if type(x) is Product else x, tree)
    return tree


class Reading(TorchFunctionMode):
    """The time in which a module's forward runs and its attention is read.

    Args:
        settings: The module's.
        refused: The reason for which all is computed as the class would.
        changes_output: Whether the class changes the output in place.

    Attributes:
        decided: Whether attention was found, which an engine serves or a reason was told for.
    """

    def __init__(
        self, settings: Settings, refused: Reason | None = None, *, changes_output: bool = False
    ) -> None:
        super().__init__()
        self.settings = settings
        self.refused = refused
        self.changes_output = changes_output
        self.decided = False
        self.made: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _NAMES.get(func, "")
        if self.made and _writes(func, kwargs):
            self.made.clear()
        begin = BEGINNINGS.get(name)
        if begin is not None:
            result = begin(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        if not any(isinstance(x, Product) for x in (*args, *kwargs.values())):
            result = func(*(computed(args) if Product in types else args), **kwargs)
            if name in CONSTANTS:
                _note_made(result, args)
            return result
        return self.follow(name, func, args, kwargs)

    def follow(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function makes of products."""
        step = STEPS.get(name.rstrip("_"))
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Product))
        in_place = name.endswith("_") and first is args[0]
        before = (first.copy(), *args[1:]) if in_place else args
        replay = partial(_replay, func, before, kwargs)
        if step is None:
            if name in DEFERRED and first.is_weights:
                return Product(replay, None, is_weights=True)
            return func(*computed(args), **computed(kwargs))
        try:
            result = step(self, *args, **kwargs)
        except UnreadableError:
            return func(*computed(args), **computed(kwargs))
        if isinstance(result, PerQuery):
            return Product(replay, None, per_query=result)
        if not isinstance(result, Terms):
            return result
        if in_place:
            first.replay, first.terms, first.is_weights = replay, result, result.softmax
            return first
        return Product(replay, result, is_weights=result.softmax)

    def finish(
        self,
        weights: Product,
        v: Any,
        replay: Callable[[], Tensor],
        order: Sequence[int] | None = None,
    ) -> Tensor:
        """The product of attention weights and values, its sizes in an order."""
        terms = weights.terms
        if terms is None or not isinstance(v, Tensor):
            raise UnreadableError
        if self.refused is not None:
            return self.refuse(self.refused, replay)
        q, k, v4, options = terms.call(*_autocast(v))
        self.decided = True
        out = attend(q, k, v4, options, self.settings, lambda: None)
        if out is None:
            return replay()
        out = out.reshape(*terms.shown, *out.shape[-2:])
        out = out if order is None else out.permute(*order)
        # an engine's backward needs its output as it was; that of a product does not
        return out.clone() if self.changes_output else out

    def refuse(self, reason: Reason, original: Callable[[], Any]) -> Any:
        """What the class itself computes, the reason told."""
        self.decided = True
        return fall_back(reason, self.settings, original)


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes a tensor that was there before."""
    name = getattr(func, "__name__", "")
    return "out" in kwargs or name.endswith("_") != name.endswith("__") or name in _WRITING


_WRITING = frozenset(f"__{name}__" for name in ("setitem", "set", "iand", "ior", "ixor"))


def _replay(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A function on tensors, where a compact mask that is added is one of numbers to add."""
    args = computed(args)
    if func in _ADDITIONS and len(args) > 1:
        args = tuple(_as_numbers(x, args[1 - i]) if i < 2 else x for i, x in enumerate(args))
    return func(*args, **computed(kwargs))


def _as_numbers(mask: Any, scores: Any) -> Any:
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 4:
        return mask
    n, m = scores.shape[-2:]
    return expand(mask, n, m, scores, causal=False, additive=True)


_ADDITIONS = frozenset(
    (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__)
)

# Functions that make a tensor of one number, which is then known.
CONSTANTS = ("tensor", "full", "to", "scalar_tensor")


def _note_made(result: Any, args: tuple[Any, ...]) -> None:
    if not isinstance(result, Tensor) or result.ndim != 0:
        return
    given = args[0]
    if isinstance(given, tuple | list | torch.Size) and len(args) > 1:
        given = args[1]
    value = constant(given)
    if isinstance(value, int | float):
        note_constant(result, value)


def know_buffers(module: nn.Module) -> None:
    """Takes note of a module's buffers of one number, which are constants of its class."""
    if torch.compiler.is_compiling():
        return
    for buffer in module._buffers.values():
        if buffer is not None and buffer.ndim == 0 and buffer.device.type != "meta":
            number(buffer)


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


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as a product takes them under autocast, which differ in dtype before at times."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if x.dtype in eligible else x for x in tensors)


# How a product comes to be: (reading, function, arguments) -> what stands for the result.


def _matmul(reading: Reading, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    a, b = args
    if isinstance(a, Product) and a.is_weights:
        replay = partial(_replay, func, args, kwargs)
        try:
            return reading.finish(a, b, replay)
        except UnreadableError:
            return replay()
    a, b = _autocast(*computed(args))
    if a.ndim < 3 or b.ndim < 3 or not a.is_floating_point() or a.dtype != b.dtype:
        return func(a, b)
    return Product(partial(func, a, b), Terms.of(a, b.transpose(-1, -2)))


def _rmatmul(reading: Reading, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _matmul(reading, torch.matmul, args[::-1], kwargs)


def _baddbmm(reading: Reading, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if len(args) != 3 or set(kwargs) - {"beta", "alpha"}:
        return NotImplemented
    bias, a, b = args
    if any(isinstance(x, Product) for x in args):
        return NotImplemented
    a, b = _autocast(a, b)
    terms = Terms.of(a, b.transpose(1, 2)).scaled(alpha)
    if beta != 0:
        terms = terms.plus(bias if beta == 1 else bias * beta)
    return Product(partial(func, bias, a, b, **kwargs), terms)


_OTHERS = "ABCDEFGH"  # stand for the sizes that an equation does not name


def _einsum(reading: Reading, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and isinstance(args[1], tuple | list):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str):
        return NotImplemented
    equation, a, b = args
    inputs, _, output = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if first[:3] == second[:3] == output[:3] == "...":
        dims = a.ndim - len(first) + 3
        if dims == b.ndim - len(second) + 3 and not set(inputs + output) & set(_OTHERS):
            first, second, output = (_OTHERS[:dims] + x[3:] for x in (first, second, output))
    if "." in first + second + output or not output or len(set(first)) < len(first):
        return func(*computed(args))
    if isinstance(a, Product) and a.is_weights and a.terms is not None:
        return _einsum_of_weights(reading, func, args, first, second, output)
    a, b = _autocast(*computed((a, b)))
    shared = [x for x in output if x in first and x in second]
    rows, columns = ([x for x in output if x in own and x not in shared] for own in (first, second))
    inner = [x for x in first if x in second and x not in output]
    if len(rows) != 1 or len(columns) != 1 or len(inner) != 1 or not shared or a.ndim < 3:
        return func(equation, a, b)
    if list(output) != [*shared, *rows, *columns] or len(second) != len(shared) + 2:
        return func(equation, a, b)
    if a.dtype != b.dtype or len(first) != len(shared) + 2:
        return func(equation, a, b)
    q = a.permute([first.index(x) for x in (*shared, *rows, *inner)])
    k = b.permute([second.index(x) for x in (*shared, *columns, *inner)])
    return Product(partial(func, equation, a, b), Terms.of(q, k))


def _einsum_of_weights(
    reading: Reading, func: Any, args: tuple[Any, ...], first: str, second: str, output: str
) -> Any:
    weights, v = args[1:]
    replay = partial(_replay, func, args, {})
    *shared, row, inner = first
    value = [x for x in second if x not in first]
    readable = len(value) == 1 and sorted(second) == sorted([*shared, inner, *value])
    if not readable or sorted(output) != sorted([*shared, row, *value]):
        return replay()
    made = [*shared, row, *value]
    v = v.permute([second.index(x) for x in (*shared, inner, *value)])
    try:
        return reading.finish(weights, v, replay, [made.index(x) for x in output])
    except UnreadableError:
        return replay()


def _fused(reading: Reading, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """PyTorch's own attention function."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, computed(args), strict=False)), **computed(kwargs)}
    q, k, v = _autocast(given["query"], given["key"], given["value"])
    mask = given.get("attn_mask")
    n, m = q.shape[-2], k.shape[-2]

    def original() -> Tensor:
        dense = mask
        if isinstance(mask, Tensor) and mask.dtype == torch.int32:
            dense = expand(mask, n, m, q, causal=False, additive=False)
        return func(**{**given, "attn_mask": dense})

    if reading.refused is not None:
        return reading.refuse(reading.refused, original)
    if q.ndim < 3 or q.dtype != k.dtype or given.get("enable_gqa"):
        return original()
    scale = given.get("scale")
    try:
        terms = Terms.of(q, k).scaled(q.shape[-1] ** -0.5 if scale is None else scale)
        if isinstance(mask, Tensor):
            terms = terms.seen_where(mask) if mask.dtype == torch.bool else terms.plus(mask)
        terms = replace(terms, softmax=True, dropout=given.get("dropout_p") or 0.0)
        q4, k4, v4, options = terms.call(v)
    except UnreadableError:
        return original()
    if given.get("is_causal"):
        causal = Band(right=0)
        options = replace(options, mask=intersect(options.mask, causal, n, m, q.device))
    reading.decided = True
    out = attend(q4, k4, v4, options, reading.settings, original)
    return out if out.ndim != 4 or q.ndim == 4 else out.reshape(*terms.shown, *out.shape[-2:])


@cache
def _entered(func: Any) -> Any:
    """A function of PyTorch that tells a mode of itself only, as one that tells of its steps."""
    known = {**func.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(func.__code__, known, func.__name__, func.__defaults__, func.__closure__)


def _composed(reading: Reading, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inner = _entered(func)
    inner.__kwdefaults__ = func.__kwdefaults__
    with reading:
        return inner(*args, **kwargs)


def _again(reading: Reading, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Whole numbers that are made of the same as before are the same tensor, known as such."""
    if kwargs or not isinstance(args[0], Tensor) or args[0].is_floating_point():
        return NotImplemented
    rest = tuple(constant(x) for x in args[1:])
    if not all(isinstance(x, int | float | tuple) for x in rest):
        return NotImplemented
    key = (func, id(args[0]), *rest)
    if key not in reading.made:
        reading.made[key] = args, func(*args)
    return reading.made[key][1]


BEGINNINGS: dict[str, Callable[..., Any]] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "rmatmul": _rmatmul,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "scaled_dot_product_attention": _fused,
    "multi_head_attention_forward": _composed,
    "eq": _again,
    "view": _again,
}

# What is done to a product: (reading, arguments) -> what it then is.


def _of(x: Any) -> Terms:
    if not isinstance(x, Product) or x.terms is None:
        raise UnreadableError
    return x.terms


def _plus(reading: Reading, a: Any, b: Any, alpha: float = 1) -> Terms:
    if alpha != 1:
        raise UnreadableError
    if isinstance(a, Product) and isinstance(b, Product):
        # the first is the product with the keys if it is not known; the other is a bias
        if b.terms is not None and a.terms is None:
            a, b = b, a
        return _of(a).plus(b.compute())
    return _of(a).plus(b) if isinstance(a, Product) else _of(b).plus(a)


def _minus(reading: Reading, a: Any, b: Any) -> Terms:
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


def _times(reading: Reading, a: Any, b: Any) -> Terms:
    a, b = (a, b) if isinstance(a, Product) else (b, a)
    return _of(a).scaled(constant(b))


def _over(reading: Reading, a: Any, b: Any, rounding_mode: Any = None) -> Terms:
    b = constant(b)
    if rounding_mode is not None or isinstance(b, Product) or not isinstance(a, Product):
        raise UnreadableError
    return _of(a).scaled(1 / b)


def _softmax(
    reading: Reading, x: Product, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Terms:
    terms = _of(x)
    possible = terms.whole and not (terms.softmax or terms.normal)
    if not possible or dim not in (-1, len(terms.shape) - 1):
        raise UnreadableError
    return replace(terms, softmax=True, dtype=dtype or terms.dtype)


def _largest(reading: Reading, x: Product, dim: Any = None, keepdim: bool = False) -> PerQuery:
    terms = _of(x)
    done = terms.softmax or terms.normal or not terms.whole
    if done or dim not in (-1, len(terms.shape) - 1):
        raise UnreadableError
    return PerQuery(terms, kept=keepdim)


def _normaliser(reading: Reading, x: Product, dim: Any = None, keepdim: bool = False) -> PerQuery:
    return replace(_largest(reading, x, dim, keepdim), normaliser=True)


def _exp(reading: Reading, x: Product) -> Terms:
    terms = _of(x)
    if not terms.normal:
        raise UnreadableError
    return replace(terms, normal=False, softmax=True)


def _detach(reading: Reading, x: Product) -> PerQuery:
    if x.per_query is None or x.per_query.normaliser:
        raise UnreadableError
    return x.per_query


def _dropout(
    reading: Reading, x: Product, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Terms:
    terms = _of(x)
    if not terms.softmax or (training and p > 0 and terms.dropout > 0):
        raise UnreadableError
    return replace(terms, dropout=p) if training and p > 0 else terms


def _view(reading: Reading, x: Product, *shape: Any) -> Terms:
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    if not all(isinstance(size, int) for size in shape):
        raise UnreadableError
    return _of(x).view(shape)


def _permute(reading: Reading, x: Product, *order: Any, dims: Any = None) -> Terms:
    order = order if dims is None else (dims,)
    return _of(x).permuted(tuple(order[0] if len(order) == 1 else order))


def _view_as(reading: Reading, x: Any, other: Any) -> Any:
    """A tensor may be given the shape of a product, which is known before it is computed."""
    return _of(x).view(tuple(other.shape)) if isinstance(x, Product) else x.reshape(other.shape)


def _expand_as(reading: Reading, x: Any, other: Any) -> Tensor:
    if isinstance(x, Product):
        raise UnreadableError
    return x.expand(other.shape)


def _unsqueeze(reading: Reading, x: Product, dim: int) -> Terms | PerQuery:
    if x.per_query is not None and not x.per_query.kept and dim == -1:
        return replace(x.per_query, kept=True)
    shape = list(_of(x).shape)
    shape.insert(dim if dim >= 0 else len(shape) + 1 + dim, 1)
    return _of(x).view(tuple(shape))


def _masked_fill(reading: Reading, x: Product, mask: Any, value: Any) -> Terms:
    terms = _of(x)
    if terms.softmax and constant(value) == 0 and any(mask is m for m in terms.hidden):
        return terms  # their weights are 0
    if not _hides(value) or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise UnreadableError
    return replace(terms.seen_where(~unexpanded(mask)), hidden=(*terms.hidden, mask))


def _where(reading: Reading, condition: Any, x: Any, other: Any) -> Terms:
    if isinstance(condition, Product):  # as a tensor's method
        condition, x = x, condition
    if isinstance(x, Product) and _hides(other):
        return _of(x).seen_where(condition)
    if isinstance(other, Product) and _hides(x):
        return _of(other).seen_where(~condition)
    raise UnreadableError


def _at_least(reading: Reading, x: Any, least: Any = None, **kwargs: Any) -> Terms:
    """A maximum or a clamp that keeps scores from being infinite changes none that is finite."""
    least = kwargs.get("min", least)
    if kwargs.get("max") is not None or not _is_least(least) or not isinstance(x, Product):
        raise UnreadableError
    return _of(x)


def _cast(reading: Reading, x: Product, *args: Any, **kwargs: Any) -> Terms:
    """Softmax is taken in float32 in any case."""
    terms = _of(x)
    given = [*args, *kwargs.values()]
    dtypes = [a for a in given if isinstance(a, torch.dtype)]
    dtypes += [a.dtype for a in given if isinstance(a, Tensor | Product)]
    if not all(d.is_floating_point for d in dtypes):
        raise UnreadableError
    return replace(terms, dtype=dtypes[0]) if dtypes else terms


def _same(reading: Reading, x: Product, *args: Any, **kwargs: Any) -> Terms:
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
    "tanh": lambda reading, x: _of(x).capped(),
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
    "float": lambda reading, x: replace(_of(x), dtype=torch.float32),
    "half": lambda reading, x: replace(_of(x), dtype=torch.float16),
    "bfloat16": lambda reading, x: replace(_of(x), dtype=torch.bfloat16),
}
# What may be returned beside the output, and is computed only if it is looked at.
DEFERRED = ("mean", "sum")


def _named() -> dict[Any, str]:
    """The functions of PyTorch that mean something here -> what they are called in the tables."""
    names = {*BEGINNINGS, *STEPS, *CONSTANTS, *DEFERRED}
    homes = (torch, torch.Tensor, functional)
    spelt = {f"{before}{name}{after}": name for name in names for before, after in _SPELLINGS}
    return {
        getattr(home, written): f"{name}_" if written.endswith(f"{name}_") else name
        for written, name in spelt.items()
        for home in homes
        if callable(getattr(home, written, None))
    }


# As a function, in place, as an operator.
_SPELLINGS = (("", ""), ("", "_"), ("__", "__"))
_NAMES = _named()
