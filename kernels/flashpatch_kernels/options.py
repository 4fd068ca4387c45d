"""One attention call's options, as the record that every engine takes beside q, k and v."""

from dataclasses import dataclass, field

from torch import Tensor

from flashpatch_kernels.masks import Band, Mask


@dataclass(frozen=True)
class Options:
    """What is added to softmax(q k^T * scale) v.

    The score of query i and key j, before the mask and the softmax, is
    `cap(q_i . k_j * scale) + table[h, j - i + N - 1] + bias[b, h, i, j]` with
    `cap(s) = softcap * tanh(s / softcap)`.

    Attributes:
        mask: Who sees whom. A query that sees no key gives 0, lse -inf, gradient 0.
        scale: Factor on the products.
        softcap: Bound on the scores, or None. Source: Gemma 2 (2024), section 2.
        table: float [H, N + M - 1], one bias per head and distance, or None. Differentiable.
        bias: float [B|1, H|1, N|1, M], any stride (0 too), or None. Differentiable.
        sinks: float [H], a logit per head that takes weight and gives no value, or None.
            Differentiable. Source: gpt-oss, `eager_attention_forward`.
        dropout: Probability that a weight is dropped; the rest is scaled by 1 / (1 - dropout).
        seed: int64 [1], of the counter-based dropout mask; None when dropout is 0.
    """

    mask: Mask = field(default_factory=Band)
    scale: float = 1.0
    softcap: float | None = None
    table: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
