"""The public function `attention`, and the pair of custom operators through which engines run.

`flashpatch::forward` and `flashpatch::backward` take the record of options flattened to what a
schema can say, and the engine's name. They are what autograd, torch.compile and checkpointing see.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.nn import Parameter

from flashpatch_kernels import checks, decisions, masks, reference, schema, sdpa, second_order
from flashpatch_kernels.engines import Call, choose, computing_dtype, device_type
from flashpatch_kernels.masks import Band, Mask
from flashpatch_kernels.options import TERMS, Options, Relative, Score

# Arguments of `attention` that go by the distance of query and key, or by their place.
PLACED = (
    "table",
    "slopes",
    "bias",
    "relative_queries",
    "relative_keys",
    "relative_values",
    "score",
)


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
    table: Float[Tensor, "H T"] | None = None,
    first: int | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    bias: Float[Tensor, "#B #H #N M"] | None = None,
    sinks: Float[Tensor, "H"] | None = None,
    relative_queries: Relative | None = None,
    relative_keys: Relative | None = None,
    relative_values: Relative | None = None,
    score: Score | None = None,
    dropout: float = 0.0,
    engine: str | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H N Dv"] | tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N"]]:
    """softmax(cap(q k^T * scale) + biases) v over the keys that each query sees.

    The N x M matrix is never formed. H may be a multiple of H_kv: each key head then serves
    H / H_kv query heads. `causal`, `window` and `mask` intersect. With `causal` or `window` the
    last query stands at the last key: for 2 queries and 5 keys, causal lets them see
        1 1 1 1 0
        1 1 1 1 1
    A query that sees no key gives 0 and a gradient of 0.

    Args:
        q: Queries, of any stride. Differentiable, as are k, v, table, slopes, bias, sinks and the
            tensors of a Relative.
        k: Keys.
        v: Values; their size may differ from that of the keys.
        causal: Hide the keys after the query.
        window: w keeps the last w keys if causal, else the keys with |i - j| < w. A pair keeps
            `left` keys before the query and `right` after it; None is no limit.
        mask: What may be seen: bool [B|1, M] of keys, bool [B|1, H|1, N|1, M], int32 [B|1, N|1, 2]
            intervals lo <= j < hi, or a record of `flashpatch_kernels.masks`.
        scale: Factor on the products; None means D ** -0.5.
        softcap: Bound on the scores: s becomes softcap * tanh(s / softcap), before the biases.
        table: One bias per head and distance j - i of query i and key j.
        first: The distance of the table's entry 0. Those beyond either end have the bias of that
            end: T5's table needs no more entries than its buckets tell apart. None: the table has
            all N + M - 1 distances, and begins at 1 - N.
        slopes: ALiBi's: adds -slopes[h] |i + M - N - j|.
        bias: Added to the scores. One below -1e7 hides its key, as -inf does; a query of which that
            hides all keys gives 0, or on `sdpa`, unless it is -inf, the mean of the values.
        sinks: One logit per head that takes weight and gives no value.
        relative_queries: Adds x_i . w(i, j) to the scores: x are its vectors [B, H, N, E], and
            w(i, j) its embedding of the distance j - i. Shaw's vectors on keys, with x = q * scale;
            Transformer-XL's; DeBERTa's content to position.
        relative_keys: Adds y_j . u(i, j) likewise, y [B, H, M, E]: DeBERTa's position to content.
        relative_values: Adds to the value of each pair its embedding of the distance: Shaw's
            vectors on values.
        score: A Triton function of your own on the scores, after softcap and before all biases;
            on the Triton engine only.
        dropout: Probability that a weight is dropped. Its mask comes from a seed that is drawn
            from torch's generator.
        engine: Name of the engine that must compute it; None chooses one.
        return_lse: Also return the log-sum-exp of each query's scores, natural logarithm, in
            float32 (float64 for float64), differentiable, -inf where no key is seen.

    Raises:
        TypeError: An argument is of a wrong type or dtype.
        ValueError: An argument has a wrong value, shape or device, or the engine that was asked for
            cannot serve the call; the message has the reason.
        NotImplementedError: A tensor has a tangent, of forward-mode differentiation, and the engine
            is not `reference` or `sdpa`.

    Source: Dao, FlashAttention-2 (2023); the sources of the terms stand in `Options`.
    """
    terms = (table, slopes, bias, sinks)
    given = [q, k, v, *[x for x in terms if x is not None]]
    recent = None
    no_vectors = relative_queries is relative_keys is relative_values is None
    if no_vectors and mask is score is None and not dropout:
        plain = (causal, window, scale, softcap, first, dropout, engine, return_lse)
        recent = decisions.recent_of(q, terms, plain)
    decided = None if recent is None else recent.found(*given)
    if decided is None:
        checks.check_tensors(q, k, v)
        batch, heads, n_queries, head_size = q.shape
        table, first = checks.to_table(table, first, q, k)
        options = Options(
            mask=checks.to_mask(q, k, causal=causal, window=window, mask=mask),
            scale=checks.to_scale(scale, head_size),
            softcap=checks.to_softcap(softcap),
            table=table,
            first=first,
            slopes=checks.to_term("slopes", slopes, (heads,), q),
            bias=checks.to_term(
                "bias", bias, (batch, heads, n_queries, k.shape[2]), q, broadcast=(0, 1, 2)
            ),
            sinks=checks.to_term("sinks", sinks, (heads,), q),
            relative_queries=checks.to_relative("relative_queries", relative_queries, q, None, q),
            relative_keys=checks.to_relative("relative_keys", relative_keys, k, None, q),
            relative_values=checks.to_relative(
                "relative_values", relative_values, None, v.shape[3], q
            ),
            score=checks.to_score(score, q),
            dropout=checks.to_dropout(dropout),
            seed=checks.new_seed(q.device) if dropout else None,
        )
        call = Call.of(q, k, v, options, lse=return_lse)
        name = choose(call).name if engine is None else checks.named(engine, call)
        if recent is not None:
            recent.note((options.without_terms(), name), *given)
    else:
        options, name = decided
        if len(given) > 3:
            options = replace(options, table=table, slopes=slopes, bias=bias, sinks=sinks)
    out, lse = run(q, k, v, options, name)
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
            or by their place (see `PLACED`) only without `cu_seqlens_k`.

    Raises:
        TypeError: As `attention`, or `cu_seqlens` is not of integers.
        ValueError: As `attention`, or `cu_seqlens` has no document, or not as many as
            `cu_seqlens_k`.
    """
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            shape = checks.size(x) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must have 3 dimensions (N, H, D), not {shape}")
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", keys)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be int32 or int64, not {kind}")
        if x.dim() != 1 or x.shape[0] < 2 or x.shape != cu_seqlens.shape:
            raise ValueError(f"{name} must have shape (documents + 1,), not {checks.size(x)}")
        checks.check_device(name, x, q)
    if "mask" in options:
        raise ValueError("attention_varlen takes no mask: the documents are the mask")
    placed = [name for name in PLACED if options.get(name) is not None]
    if placed and cu_seqlens_k is not None:
        raise ValueError(f"{placed[0]} goes by places, which cu_seqlens_k makes differ")
    left, right = checks.to_sides(causal=causal, window=window)
    mask = masks.varlen(cu_seqlens, keys, q.shape[0], left, right)
    found = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask=mask, **options)
    if isinstance(found, Tensor):
        return found[0].transpose(0, 1)
    return found[0][0].transpose(0, 1), found[1][0]


def run(
    q: Tensor, k: Tensor, v: Tensor, options: Options, engine: str
) -> tuple[Tensor, Tensor | None]:
    """The output and lse of one call on the named engine; unchecked. `sdpa` gives no lse."""
    if torch.is_autocast_enabled(device_type(q)):
        q, k, v = (x.to(computing_dtype(x)) for x in (q, k, v))
    if engine != "reference" and (q.numel() == 0 or k.shape[2] == 0):
        engine = "tiled"
    if engine == "sdpa":
        return sdpa.attention(q, k, v, options), None
    if engine == "reference":
        return reference.attention(q, k, v, options)
    compiling = torch.compiler.is_compiling()
    if forward_ad._current_level >= 0 and not compiling:
        _refuse_tangents(engine, q, k, v, *options.terms.values())
    if compiling or _watched(q):
        return torch.ops.flashpatch.forward.default(q, k, v, engine, *schema.flat(options))
    if torch.is_grad_enabled():
        terms = options.terms
        # Autograd's part of a call takes as long as an engine's.
        if q.requires_grad or any(x.requires_grad for x in (k, v, *terms.values())):
            return _Attention.apply(q, k, v, engine, options, tuple(terms), *terms.values())
    return _compute(q, k, v, engine, options)


def _refuse_tangents(engine: str, *tensors: Tensor) -> None:
    """Raises where one has a tangent: operators would go on as if it were 0."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"engine {engine!r} has no forward-mode derivative; engine='reference' has"
        )


def _watched(q: Tensor) -> bool:
    """Whether something wants to see the operators: a mode, a transform, tensors without memory.

    Otherwise they are passed by: the dispatcher takes longer over their many arguments than the
    engines do.
    """
    return (
        type(q) not in (Tensor, Parameter)
        or q.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
    )


# Where the differentiable tensors stand among all arguments.
_DIFFERENTIABLE = {name: 4 + schema.NAMES.index(name) for name in TERMS} | {"q": 0, "k": 1, "v": 2}
_DIFFERENTIABLE = dict(sorted(_DIFFERENTIABLE.items(), key=lambda item: item[1]))

library = torch.library.Library("flashpatch", "DEF")
library.define(
    f"forward(Tensor q, Tensor k, Tensor v, str engine, {schema.OPTIONS}) -> (Tensor, Tensor)"
)
library.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"str engine, str[] needs, {schema.OPTIONS}) -> Tensor[]"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, engine: str, *options: Any) -> tuple[Tensor, Tensor]:
    return _compute(q, k, v, engine, schema.record(*options))


def _compute(
    q: Tensor, k: Tensor, v: Tensor, engine: str, options: Options
) -> tuple[Tensor, Tensor]:
    with _without_autocast(q):
        return _module(engine).forward(q, k, v, options)


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
    tensors = (dout, dlse, q, k, v, out, lse)
    grads = _compute_gradients(tensors, engine, needs, schema.record(*options))
    return [grads[name] for name in needs]


def _compute_gradients(
    tensors: tuple[Tensor | None, ...], engine: str, needs: list[str], options: Options
) -> dict[str, Tensor]:
    dout = tensors[0]
    assert dout is not None
    with _without_autocast(dout):
        return _module(engine).backward(*tensors, options, frozenset(needs))


@cache
def _module(engine: str) -> Any:
    """The engine's module, imported when it is first needed: Triton takes its time."""
    try:
        return import_module(f"flashpatch_kernels.{engine}")
    except (ImportError, AttributeError):
        # Gluon changes from version to version; the same call runs on the portable kernels.
        if engine != "hopper":
            raise
        return import_module("flashpatch_kernels.triton")


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, products keep the dtype of their operands: an engine chooses it by itself."""
    device = device_type(x)
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS


_AS_IT_IS = nullcontext()


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
    record = schema.record(*options)
    tensors = {"q": q, "k": k, "v": v}
    grads = {name: torch.empty_like(x) for name, x in tensors.items()}
    grads.update({name: x.new_empty(x.shape) for name, x in record.terms.items()})
    return [grads[name] for name in needs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options, tensors = schema.apart(inputs[4:])
    _save_call(ctx, inputs[:4], output, None, *tensors)


def _save_call(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: tuple[Tensor, Tensor],
    record: Options | None,
    *tensors: Tensor,
) -> None:
    """Saves the rest, and a record of options that has no tensors or the tensors of the options."""
    ctx.set_materialize_grads(False)
    q, k, v, ctx.engine = inputs
    ctx.record = record
    ctx.save_for_backward(q, k, v, *output, *tensors)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad
    found = _gradients(ctx, [x for x, at in _DIFFERENTIABLE.items() if wanted[at]], dout, dlse)
    grads: list[Any] = [None] * 4 + schema.none_of(ctx.options)
    for name, grad in found.items():
        grads[_DIFFERENTIABLE[name]] = grad
    return tuple(grads)


def _gradients(
    ctx: Any, needs: list[str], dout: Tensor | None, dlse: Tensor | None
) -> dict[str, Tensor]:
    """What was saved, differentiated by these of its tensors."""
    if dout is None and dlse is None:
        return {}
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    # With gradients enabled, the gradients are to be differentiated again.
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or _watched(q)
    given = (dout, dlse, q, k, v, out, lse)
    record = ctx.record
    if watched:
        options = schema.flat(record) if record else schema.together(ctx.options, tensors)
        found = torch.ops.flashpatch.backward.default(*given, ctx.engine, needs, *options)
        return dict(zip(needs, found, strict=True))
    if record is None:
        record = schema.record(*schema.together(ctx.options, tensors))
    return _compute_gradients(given, ctx.engine, needs, record)


class _Attention(torch.autograd.Function):
    """The operators' formula without what the operators and their registration cost.

    Autograd sees tensors that are arguments, not those in a record: its terms come once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        engine: str,
        options: Options,
        names: tuple[str, ...],
        *_terms: Tensor,
    ) -> tuple[Tensor, Tensor]:
        output = _compute(q, k, v, engine, options)
        if names or options.seed is not None or not isinstance(options.mask, Band):
            _save(ctx, (q, k, v, engine, *schema.flat(options)), output)
        else:
            # Without tensors, which autograd must save, the record serves the backward pass too.
            _save_call(ctx, (q, k, v, engine), output, options)
        ctx.names = ("q", "k", "v", None, None, None, *names)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        pairs = zip(ctx.names, ctx.needs_input_grad, strict=True)
        found = _gradients(ctx, [name for name, wanted in pairs if wanted], *grads)
        return tuple(found.get(name) for name in ctx.names)


def _save_twice(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    dout, dlse, q, k, v, _, _, ctx.engine, ctx.needs, *options = inputs
    ctx.options, tensors = schema.apart(options)
    ctx.save_for_backward(dout, dlse, q, k, v, *tensors)


def _differentiate_twice(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    """The derivative of the gradients. The output and the lse are functions of the other inputs."""
    if ctx.engine != "tiled":
        raise NotImplementedError(
            f"engine {ctx.engine!r} has no second derivative; engine='tiled' has"
        )
    dout, dlse, q, k, v, *tensors = ctx.saved_tensors
    flat = schema.together(ctx.options, tensors)
    options = schema.record(*flat)
    if options.dropout:
        raise NotImplementedError("attention with dropout has no second derivative")
    if torch.is_grad_enabled():
        raise NotImplementedError("attention has no third derivative")
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse}
    inputs |= options.terms
    found = second_order.differentiate(
        {name: x for name, x in inputs.items() if x is not None},
        options,
        {name: x for name, x in zip(ctx.needs, cotangents, strict=True) if x is not None},
    )
    first = [found.get(name) for name in ("dout", "dlse", "q", "k", "v")]
    before = [*first, None, None, None, None]  # then the output, the lse, engine and needs
    grads: list[Any] = [*before, *schema.none_of(flat)]
    for name in TERMS:
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
