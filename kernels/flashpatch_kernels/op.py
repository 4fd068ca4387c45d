"""The public function `attention`, and the pair of custom operators through which engines run.

`flashpatch::forward` and `flashpatch::backward` take the record of options flattened to what a
schema can say, and the engine's name. They are what autograd, torch.compile and checkpointing see.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from flashpatch_kernels import masks, reference, sdpa, second_order
from flashpatch_kernels.engines import (
    ENGINES,
    REFERENCE,
    Call,
    choose,
    computing_dtype,
    why_not,
)
from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask
from flashpatch_kernels.options import Options


def attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H_kv M D"],
    v: Float[Tensor, "B H_kv M Dv"],
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    mask: Bool[Tensor, "..."] | Int32[Tensor, "..."] | Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    table: Float[Tensor, "H N+M-1"] | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    bias: Float[Tensor, "#B #H #N M"] | None = None,
    sinks: Float[Tensor, "H"] | None = None,
    dropout: float = 0.0,
    engine: str | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H N Dv"] | tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N"]]:
    """softmax(cap(q k^T * scale) + table + bias) v over the keys that each query sees.

    The N x M matrix is never formed. H may be a multiple of H_kv: each key head then serves
    H / H_kv query heads. `causal`, `window` and `mask` intersect. With `causal` or `window` the
    last query stands at the last key: for 2 queries and 5 keys, causal lets them see
        1 1 1 1 0
        1 1 1 1 1
    A query that sees no key gives 0 and a gradient of 0.

    Args:
        q: Queries, of any stride. Differentiable, as are k, v, table, slopes, bias and
            sinks.
        k: Keys.
        v: Values; their size may differ from that of the keys.
        causal: Hide the keys after the query.
        window: w keeps the last w keys if causal, else the keys with |i - j| < w. A pair keeps
            `left` keys before the query and `right` after it; None is no limit.
        mask: What may be seen: bool [B|1, M] of keys, bool [B|1, H|1, N|1, M], int32 [B|1, N|1, 2]
            intervals lo <= j < hi, or a record of `flashpatch_kernels.masks`.
        scale: Factor on the products; None means D ** -0.5.
        softcap: Bound on the scores: s becomes softcap * tanh(s / softcap), before the biases.
        table: One bias per head and distance: entry j - i + N - 1 for query i and key j.
        slopes: ALiBi's: adds -slopes[h] |i + M - N - j|, a table that is made of them.
        bias: Added to the scores. One below -1e38 hides its key, as -inf does.
        sinks: One logit per head that takes weight and gives no value.
        dropout: Probability that a weight is dropped. Its mask comes from a seed that is drawn
            from torch's generator.
        engine: Name of the engine that must compute it; None chooses one.
        return_lse: Also return the log-sum-exp of each query's scores, natural logarithm, in
            float32 (float64 for float64), differentiable, -inf where no key is seen.

    Raises:
        TypeError: An argument is of a wrong type or dtype.
        ValueError: An argument has a wrong value, shape or device, or the engine that was asked for
            cannot serve the call; the message has the reason.

    Source: Dao, FlashAttention-2 (2023); for slopes Press et al., ALiBi (2022), section 3.
    """
    _check_tensors(q, k, v)
    options = Options(
        mask=_mask(q, k, causal=causal, window=window, mask=mask),
        scale=_scale(scale, q.shape[3]),
        softcap=_softcap(softcap),
        table=_table(table, slopes, q, k),
        bias=_bias(bias, q, k),
        sinks=_term("sinks", sinks, (q.shape[1],), q),
        dropout=_dropout(dropout),
        seed=_seed(q.device) if dropout else None,
    )
    call = Call.of(q, k, v, options, lse=return_lse)
    out, lse = run(q, k, v, options, choose(call).name if engine is None else _named(engine, call))
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def attention_varlen(
    q: Float[Tensor, "N H D"],
    k: Float[Tensor, "M H_kv D"],
    v: Float[Tensor, "M H_kv Dv"],
    cu_seqlens: Int[Tensor, "documents+1"],
    cu_seqlens_k: Int[Tensor, "documents+1"] | None = None,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    **options: Any,
) -> Float[Tensor, "N H Dv"] | tuple[Float[Tensor, "N H Dv"], Float[Tensor, "H N"]]:
    """`attention` within documents that lie one after the other, without padding.

    Args:
        q: Queries of all documents, of any stride. Differentiable, as are k and v.
        k: Keys.
        v: Values.
        cu_seqlens: Where documents begin, and at last where the last one ends: 0, n_1, n_1 + n_2...
            Queries beyond belong to none and give 0.
        cu_seqlens_k: The same of the keys; None if every document has as many keys as queries.
        causal: As for `attention`, within each document.
        window: Likewise.
        options: The other arguments of `attention`. Those that go by the distance of query and key
            or by their place, `table`, `slopes` and `bias`, only without `cu_seqlens_k`.

    Raises:
        TypeError: As `attention`, or `cu_seqlens` is not of integers.
        ValueError: As `attention`, or `cu_seqlens` has no document, or not as many as
            `cu_seqlens_k`.
    """
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            shape = _size(x) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must have 3 dimensions (N, H, D), not {shape}")
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", keys)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be int32 or int64, not {kind}")
        if x.dim() != 1 or x.shape[0] < 2 or x.shape != cu_seqlens.shape:
            raise ValueError(f"{name} must have shape (documents + 1,), not {_size(x)}")
        _check_device(name, x, q)
    if "mask" in options:
        raise ValueError("attention_varlen takes no mask: the documents are the mask")
    placed = [name for name in ("table", "slopes", "bias") if options.get(name) is not None]
    if placed and cu_seqlens_k is not None:
        raise ValueError(f"{placed[0]} goes by places, which cu_seqlens_k makes differ")
    left, right = _sides(causal=causal, window=window)
    mask = masks.varlen(cu_seqlens, keys, q.shape[0], left, right)
    found = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask=mask, **options)
    if isinstance(found, Tensor):
        return found[0].transpose(0, 1)
    return found[0][0].transpose(0, 1), found[1][0]


def run(
    q: Tensor, k: Tensor, v: Tensor, options: Options, engine: str
) -> tuple[Tensor, Tensor | None]:
    """The output and lse of one call on the named engine; unchecked. `sdpa` gives no lse."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(computing_dtype(x)) for x in (q, k, v))
    if engine != "reference" and 0 in (*q.shape[:3], k.shape[2]):
        engine = "tiled"
    if engine == "sdpa":
        return sdpa.attention(q, k, v, options), None
    if engine == "reference":
        return reference.attention(q, k, v, options)
    arguments = (q, k, v, engine, *_flat(options))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Attention.apply(*arguments)
    return torch.ops.flashpatch.forward.default(*arguments)


def _flat(options: Options) -> tuple[Any, ...]:
    """The record as arguments of the schema."""
    mask = options.mask
    band = mask if isinstance(mask, Band) else Band()
    return (
        band.left,
        band.right,
        band.offset,
        mask.bounds if isinstance(mask, Intervals) else None,
        mask.runs if isinstance(mask, Intervals) else None,
        mask.allowed if isinstance(mask, Boolean) else None,
        options.scale,
        options.softcap,
        options.table,
        options.bias,
        options.sinks,
        options.dropout,
        options.seed,
    )


def _record(
    left: int | None,
    right: int | None,
    offset: int,
    bounds: Tensor | None,
    runs: Tensor | None,
    allowed: Tensor | None,
    *rest: Any,
) -> Options:
    """The arguments of the schema as a record."""
    if allowed is not None:
        return Options(Boolean(allowed), *rest)
    if bounds is not None:
        return Options(Intervals(bounds, runs), *rest)
    return Options(Band(left, right, offset), *rest)


_OPTIONS = (
    "SymInt? left, SymInt? right, SymInt offset, Tensor? bounds, Tensor? runs, Tensor? allowed, "
    "float scale, float? softcap, Tensor? table, Tensor? bias, Tensor? sinks, float dropout, "
    "Tensor? seed"
)
_TERMS = ("table", "bias", "sinks")
_DIFFERENTIABLE = {"q": 0, "k": 1, "v": 2, "table": 12, "bias": 13, "sinks": 14}

library = torch.library.Library("flashpatch", "DEF")
library.define(f"forward(Tensor q, Tensor k, Tensor v, str engine, {_OPTIONS}) -> (Tensor, Tensor)")
library.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"str engine, str[] needs, {_OPTIONS}) -> Tensor[]"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, engine: str, *options: Any) -> tuple[Tensor, Tensor]:
    with _without_autocast(q):
        return _module(engine).forward(q, k, v, _record(*options))


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    engine: str,
    needs: list[str],
    *options: Any,
) -> list[Tensor]:
    with _without_autocast(q):
        grads = _module(engine).backward(
            dout, dlse, q, k, v, out, lse, _record(*options), frozenset(needs)
        )
    return [grads[name] for name in needs]


@cache
def _module(engine: str) -> Any:
    """The engine's module, imported when it is first needed: Triton takes its time."""
    return import_module(f"flashpatch_kernels.{engine}")


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, products keep the dtype of their operands: an engine chooses it by itself."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _fake_forward(
    q: Tensor, _k: Tensor, v: Tensor, _engine: str, *_options: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, n_queries, _ = q.shape
    out = q.new_empty((batch, n_queries, heads, v.shape[3])).transpose(1, 2)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((batch, heads, n_queries), dtype=dtype)


def _fake_backward(
    _dout: Tensor,
    _dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _out: Tensor,
    _lse: Tensor,
    _engine: str,
    needs: list[str],
    *options: Any,
) -> list[Tensor]:
    record = _record(*options)
    tensors = {"q": q, "k": k, "v": v}
    terms = {"table": record.table, "bias": record.bias, "sinks": record.sinks}
    grads = {name: torch.empty_like(x) for name, x in tensors.items()}
    grads.update({name: x.new_empty(x.shape) for name, x in terms.items() if x is not None})
    return [grads[name] for name in needs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.engine = inputs[3]
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs[4:]]
    ctx.save_for_backward(
        *inputs[:3], *output, *(x if isinstance(x, Tensor) else None for x in inputs[4:])
    )


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    options = [p if x is None else x for p, x in zip(ctx.plain, tensors, strict=True)]
    needs = [name for name, at in _DIFFERENTIABLE.items() if ctx.needs_input_grad[at]]
    grads: list[Tensor | None] = [None] * (4 + len(options))
    if dout is None and dlse is None:
        return tuple(grads)
    if dout is None:
        dout = torch.zeros_like(out)
    found = torch.ops.flashpatch.backward.default(
        dout, dlse, q, k, v, out, lse, ctx.engine, needs, *options
    )
    for name, grad in zip(needs, found, strict=True):
        grads[_DIFFERENTIABLE[name]] = grad
    return tuple(grads)


class _Attention(torch.autograd.Function):
    """The operators' formula without what their registration costs: 60 us a call instead of 130."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = torch.ops.flashpatch.forward.default(*arguments)
        _save(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return _differentiate(ctx, *grads)


def _save_twice(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    dout, dlse, q, k, v, _, _, ctx.engine, ctx.needs, *options = inputs
    ctx.plain = [None if isinstance(x, Tensor) else x for x in options]
    tensors = (x if isinstance(x, Tensor) else None for x in options)
    ctx.save_for_backward(dout, dlse, q, k, v, *tensors)


def _differentiate_twice(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    """The derivative of the gradients. The output and the lse are functions of the other inputs."""
    if ctx.engine != "tiled":
        raise NotImplementedError(
            f"engine {ctx.engine!r} has no second derivative; engine='tiled' has"
        )
    dout, dlse, q, k, v, *tensors = ctx.saved_tensors
    flat = [p if x is None else x for p, x in zip(ctx.plain, tensors, strict=True)]
    options = _record(*flat)
    if options.dropout:
        raise NotImplementedError("attention with dropout has no second derivative")
    if torch.is_grad_enabled():
        raise NotImplementedError("attention has no third derivative")
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse}
    inputs |= {name: getattr(options, name) for name in _TERMS}
    found = second_order.differentiate(
        {name: x for name, x in inputs.items() if x is not None},
        options,
        {name: x for name, x in zip(ctx.needs, cotangents, strict=True) if x is not None},
    )
    first = [found.get(name) for name in ("dout", "dlse", "q", "k", "v")]
    before = [*first, None, None, None, None]  # then the output, the lse, engine and needs
    grads: list[Tensor | None] = [*before, *(None for _ in flat)]
    for name in _TERMS:
        # both schemas end with the options; that of `forward` has 4 arguments before them
        grads[_DIFFERENTIABLE[name] - 4 + len(before)] = found.get(name)
    return tuple(grads)


library.impl("forward", _forward, "CompositeExplicitAutograd")
library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("flashpatch::forward", _fake_forward, lib=library)
torch.library.register_fake("flashpatch::backward", _fake_backward, lib=library)
torch.library.register_autograd(
    "flashpatch::forward", _differentiate, setup_context=_save, lib=library
)
torch.library.register_autograd(
    "flashpatch::backward", _differentiate_twice, setup_context=_save_twice, lib=library
)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (B, H, N, D), not shape {_size(x)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating point dtype, not {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
        if computing_dtype(x) != computing_dtype(q):
            raise TypeError(f"{name} is {x.dtype}, q is {q.dtype}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v differ in batch: {_size(q)}, {_size(k)}, {_size(v)}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v differ in heads or length: {_size(k)}, {_size(v)}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k differ in head size: {_size(q)}, {_size(k)}")
    if 0 in (q.shape[3], v.shape[3]):
        raise ValueError(f"a head size is 0: {_size(q)}, {_size(v)}")
    if q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")


def _mask(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
    mask: Tensor | Mask | None,
) -> Mask:
    """The intersection of causal, window and mask."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    band = _band(n_queries, n_keys, causal=causal, window=window)
    if mask is None:
        return band
    return masks.intersect(band, _given_mask(mask, q, n_keys), n_queries, n_keys, q.device)


def _band(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
) -> Band:
    left, right = _sides(causal=causal, window=window)
    offset = n_keys - n_queries
    # A limit that hides nothing is none: one query at the end is not causal but full.
    if right is not None and right >= n_queries - 1:
        right = None
    if left is not None and left >= n_keys - 1:
        left = None
    return Band() if left is None and right is None else Band(left, right, offset)


def _sides(
    *, causal: bool, window: int | tuple[int | None, int | None] | None
) -> tuple[int | None, int | None]:
    """How many keys before a query and after it are seen, None without a limit."""
    left = right = None
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(f"window must be at least 1 key, not {window}")
        left = right = window - 1
    elif isinstance(window, tuple) and len(window) == 2:
        left, right = window
        for side in window:
            if side is not None and (not isinstance(side, int) or side < 0):
                raise ValueError(f"a side of window is None or at least 0, not {side!r}")
    elif window is not None:
        raise TypeError(f"window must be an int or a pair, not {window!r}")
    if causal:
        right = 0
    return left, right


def _given_mask(mask: Tensor | Mask, q: Tensor, n_keys: int) -> Mask:
    """The mask as a record whose shapes fit."""
    batch, heads, n_queries, _ = q.shape
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool and mask.dim() == 2:
            _check_shape("mask", mask, (batch, n_keys), broadcast=(0,))
            _check_device("mask", mask, q)
            return masks.key_mask(mask)
        if mask.dtype == torch.bool and mask.dim() == 4:
            mask = Boolean(mask)
        elif mask.dtype == torch.int32 and mask.dim() == 3:
            mask = Intervals(mask)
        elif mask.dtype not in (torch.bool, torch.int32):
            raise TypeError(f"mask must be bool or int32, not {mask.dtype}; scores go in `bias`")
        else:
            raise ValueError(
                "mask must be bool [B|1, M], bool [B|1, H|1, N|1, M] or int32 [B|1, N|1, 2], "
                f"not {mask.dtype} of shape {_size(mask)}"
            )
    if isinstance(mask, Boolean):
        _check_dtype("mask", mask.allowed, torch.bool)
        _check_shape("mask", mask.allowed, (batch, heads, n_queries, n_keys), broadcast=(0, 1, 2))
        _check_device("mask", mask.allowed, q)
        return mask
    if isinstance(mask, Intervals):
        _check_dtype("mask", mask.bounds, torch.int32)
        _check_shape("mask", mask.bounds, (batch, n_queries, 2), broadcast=(0, 1))
        _check_device("mask", mask.bounds, q)
        if mask.runs is not None:
            _check_dtype("mask's runs", mask.runs, torch.int32)
            _check_shape("mask's runs", mask.runs, (batch, n_keys), broadcast=(0,))
            _check_device("mask's runs", mask.runs, q)
        return Intervals(mask.bounds.clamp(0, n_keys), mask.runs)
    if isinstance(mask, Band):
        return mask
    raise TypeError(f"mask must be a tensor or a mask record, not {type(mask).__name__}")


def _scale(scale: float | None, head_size: int) -> float:
    if scale is None:
        return head_size**-0.5
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, not {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    return float(scale)


def _softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a number or None, not {softcap!r}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, not {softcap}")
    return float(softcap)


def _dropout(dropout: float) -> float:
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool):
        raise TypeError(f"dropout must be a number, not {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    return float(dropout)


def _seed(device: torch.device) -> Tensor:
    """A seed of torch's generator, which checkpoint rewinds before it computes again."""
    return torch.randint(-(2**62), 2**62, (1,), dtype=torch.int64, device=device)


def _term(name: str, x: Tensor | None, shape: tuple[int, ...], q: Tensor) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a floating point dtype, not {x.dtype}")
    # Without queries and keys there is no distance at all.
    _check_shape(name, x, tuple(max(n, 0) for n in shape))
    _check_device(name, x, q)
    return x


def _table(table: Tensor | None, slopes: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The table and what slopes add to it."""
    entries = q.shape[2] + k.shape[2] - 1
    table = _term("table", table, (q.shape[1], entries), q)
    slopes = _term("slopes", slopes, (q.shape[1],), q)
    if slopes is None:
        return table
    distance = (torch.arange(max(entries, 0), device=q.device) - (k.shape[2] - 1)).abs()
    kind = torch.promote_types(slopes.dtype, torch.float32)
    sloping = -slopes.to(kind)[:, None] * distance
    return sloping if table is None else table + sloping


def _bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, not {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"bias must be of a floating point dtype, not {bias.dtype}")
    _check_shape("bias", bias, (*q.shape[:3], k.shape[2]), broadcast=(0, 1, 2))
    _check_device("bias", bias, q)
    return bias


def _named(engine: str, call: Call) -> str:
    """The engine's name, after asking whether it can serve the call."""
    for candidate in (*ENGINES, REFERENCE):
        if candidate.name == engine:
            reason = why_not(candidate, call)
            if reason is not None:
                raise ValueError(f"engine {engine!r} cannot serve this call: {reason}")
            return engine
    names = ", ".join(candidate.name for candidate in (*ENGINES, REFERENCE))
    raise ValueError(f"engine must be one of {names}, not {engine!r}")


def _check_shape(
    name: str, x: Tensor, shape: tuple[int, ...], broadcast: tuple[int, ...] = ()
) -> None:
    fits = x.dim() == len(shape) and all(
        n == wanted or (n == 1 and at in broadcast)
        for at, (n, wanted) in enumerate(zip(x.shape, shape, strict=True))
    )
    if not fits:
        words = [f"{n} or 1" if at in broadcast else str(n) for at, n in enumerate(shape)]
        raise ValueError(f"{name} must have shape ({', '.join(words)}), not {_size(x)}")


def _check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {x.dtype}")


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}")


def _size(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
