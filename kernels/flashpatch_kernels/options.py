"""One attention call's options, as the record that every engine takes beside q, k and v."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flashpatch_kernels.masks import Band, Mask

# A bias below this hides its key, as -inf does. Models write -1e9, -1e10 or their dtype's lowest
# number for that, beside which float32 has no digits left for what the key is worth.
HIDES = -1e7


@dataclass(frozen=True)
class Relative:
    """Vectors that depend on the distance of key and query, and what they are multiplied by.

    The vector of query i and key j is w(i, j) = embeddings[h, clamp(j - i - first, 0, T - 1)].

    Attributes:
        embeddings: float [H|1, T, E], a vector per distance. Differentiable.
        first: Distance j - i of entry 0; those beyond either end have the vector of that end.
        vectors: float [B, H, N, E] of queries or [B, H, M, E] of keys; None where weights take
            their place. Differentiable.
    """

    embeddings: Tensor
    first: int
    vectors: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """A function of the user's own, in Triton, that makes scores of scores.

    Both functions are `triton.jit` functions of a tile and work element by element. i and j are
    the places of its queries and keys, counted from 0: index tensors that broadcast to the tile;
    batch and head are numbers; arguments is a tuple of pointers.

    What torch.compile compiles may use a Score, not make one.

    Attributes:
        function: (s, i, j, batch, head, arguments) -> the new scores, finite or -inf, which hides
            a key.
        derivative: (s, i, j, batch, head, arguments, ds) -> the gradient of s from that of the new
            scores. None says that `function` only adds to s.
        arguments: Tensors; they get no gradient.
        name: What operators call it by, whose schema can say no function.

    Raises:
        TypeError: `function` or `derivative` is not a `triton.jit` function of so many arguments.
        RuntimeError: It is made inside of what torch.compile compiles.
    """

    function: Any
    derivative: Any = None
    arguments: tuple[Tensor, ...] = ()
    name: str = field(init=False)

    def __post_init__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError("torch.compile cannot make a Score: make it outside and pass it in")
        parts = {"function": (self.function, 6), "derivative": (self.derivative, 7)}
        if self.derivative is None:
            del parts["derivative"]
        for part, (function, n_arguments) in parts.items():
            # What Triton makes of a function has both, compiled or interpreted.
            if not hasattr(function, "fn") or not hasattr(function, "arg_names"):
                raise TypeError(
                    f"{part} of a score must be a triton.jit function, not {function!r}"
                )
            if len(function.arg_names) != n_arguments:
                taken = ", ".join(function.arg_names)
                raise TypeError(f"{part} of a score takes {n_arguments} arguments, not ({taken})")
        name = " ".join(f"{f.fn.__module__}.{f.fn.__qualname__}.{id(f)}" for f, _ in parts.values())
        # Kept for good, so that no other function ever gets its address.
        _FUNCTIONS[name] = (self.function, self.derivative)
        object.__setattr__(self, "name", name)

    @staticmethod
    def named(name: str, arguments: tuple[Tensor, ...]) -> "Score":
        """The score of that name with other arguments."""
        return Score(*_FUNCTIONS[name], arguments)


# Function and derivative of every score that was made, by its name.
_FUNCTIONS: dict[str, tuple[Any, Any]] = {}


@dataclass(frozen=True)
class Options:
    """What is added to softmax(q k^T * scale) v.

    The score of query i and key j, before the mask and the softmax, is
        function(cap(q_i . k_j * scale)) + table[h, clamp(j - i - first, 0, T - 1)]
        - slopes[h] |i + offset - j| + bias[b, h, i, j] + x_i . w(i, j) + y_j . u(i, j)
    with cap(s) = softcap * tanh(s / softcap), and x, w, y, u of `relative_queries` and
    `relative_keys`. The output of query i is sum_j p_ij (v_j + z(i, j)), z of `relative_values`.

    Attributes:
        mask: Who sees whom. A query that sees no key gives 0, lse -inf, gradient 0.
        scale: Factor on the products.
        softcap: Bound on the scores, or None. Source: Gemma 2 (2024), section 2.
        table: float [H, T], one bias per head and distance, or None. Differentiable.
        first: Distance j - i of the table's entry 0; beyond either end its last entry holds. None
            is 1 - N, of a table that has all N + M - 1 distances.
        slopes: float [H], or None. Differentiable. Source: Press et al., ALiBi (2022), section 3.
        offset: The key position of query 0, for slopes. None is M - N: the last query stands at the
            last key.
        bias: float [B|1, H|1, N|1, M], any stride (0 too), or None. Differentiable.
        sinks: float [H], a logit per head that takes weight and gives no value, or None.
            Differentiable. Source: gpt-oss, `eager_attention_forward`.
        relative_queries: Shaw's keys, Transformer-XL's and DeBERTa's content to position.
        relative_keys: DeBERTa's position to content.
        relative_values: Shaw's values. Source: Shaw et al. (2018), equations 3 and 4.
        score: A function of the user's own, or None.
        dropout: Probability that a weight is dropped; the rest is scaled by 1 / (1 - dropout).
        seed: int64 [1], of the counter-based dropout mask; None when dropout is 0.
    """

    mask: Mask = field(default_factory=Band)
    scale: float = 1.0
    softcap: float | None = None
    table: Tensor | None = None
    first: int | None = None
    slopes: Tensor | None = None
    offset: int | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    relative_queries: Relative | None = None
    relative_keys: Relative | None = None
    relative_values: Relative | None = None
    score: Score | None = None
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def relative(self) -> bool:
        """Whether vectors by distance take part."""
        return not (self.relative_queries is self.relative_keys is self.relative_values is None)

    @property
    def terms(self) -> dict[str, Tensor]:
        """The differentiable tensors that the call has, by the names of `TERMS`."""
        found = {}
        for name, (owner, part) in TERMS.items():
            x = getattr(self, owner)
            if part and x is not None:
                x = getattr(x, part)
            if x is not None:
                found[name] = x
        return found

    def without_terms(self) -> "Options":
        """The same without its differentiable tensors."""
        return self.with_terms(dict.fromkeys(self.terms)) if self.terms else self

    def with_terms(self, terms: Mapping[str, Tensor | None]) -> "Options":
        """The same with other tensors in the place of those named."""
        changed: dict[str, Any] = {}
        for name, x in terms.items():
            owner, part = TERMS[name]
            whole = changed.get(owner, getattr(self, owner))
            changed[owner] = replace(whole, **{part: x}) if part else x
        return replace(self, **changed)


# The names of the differentiable tensors: the attribute of Options, and what of it, or "".
TERMS = {
    "table": ("table", ""),
    "slopes": ("slopes", ""),
    "bias": ("bias", ""),
    "sinks": ("sinks", ""),
    "query_vectors": ("relative_queries", "vectors"),
    "query_embeddings": ("relative_queries", "embeddings"),
    "key_vectors": ("relative_keys", "vectors"),
    "key_embeddings": ("relative_keys", "embeddings"),
    "value_embeddings": ("relative_values", "embeddings"),
}
