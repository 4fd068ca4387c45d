"""Attention that a class computes operation by operation, read while it does.

Such a class multiplies queries and keys, scales, adds masks and biases, takes the softmax, drops
out and multiplies with the values. Within `Reading` no product of tensors is computed at once: a
`Product` stands for it and notes what is done to it. When a softmax of one is multiplied with
values, an engine computes all of it; whatever else is done to one computes it as the class itself
would have, operation by operation. So nothing is taken for attention that is none, and a class
needs no replacement of its own, only to be named.

What becomes of a product is in `flashpatch.steps`, what it then is in `flashpatch.scores`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flashpatch.dispatch import Settings, attend, fall_back
from flashpatch.masks import expand
from flashpatch.products import Product, computed, replayed, under_autocast
from flashpatch.scores import PerQuery, Terms, UnreadableError, constant, note_constant, number
from flashpatch.steps import DEFERRED, STEPS
from flashpatch_kernels.engines import Reason
from flashpatch_kernels.masks import Band, intersect


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
        replay = partial(replayed, func, before, kwargs)
        if step is None:
            if name in DEFERRED and first.is_weights:
                return Product(replay, None, is_weights=True)
            return func(*computed(args), **computed(kwargs))
        try:
            result = step(*args, **kwargs)
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
        q, k, v4, options = terms.call(*under_autocast(v))
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


# How a product comes to be: (reading, function, arguments) -> what stands for the result.


def _matmul(reading: Reading, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    a, b = args
    if isinstance(a, Product) and a.is_weights:
        replay = partial(replayed, func, args, kwargs)
        try:
            return reading.finish(a, b, replay)
        except UnreadableError:
            return replay()
    a, b = under_autocast(*computed(args))
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
    a, b = under_autocast(a, b)
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
    a, b = under_autocast(*computed((a, b)))
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
    replay = partial(replayed, func, args, {})
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
    q, k, v = under_autocast(given["query"], given["key"], given["value"])
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
