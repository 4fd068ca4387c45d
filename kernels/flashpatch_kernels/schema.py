"""The record of options as what the schema of an operator can say: arguments that are all flat.

A schema takes no records, and autograd saves tensors apart from the rest.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask, parts
from flashpatch_kernels.options import Options, Relative, Score

OPTIONS = (
    "SymInt? left, SymInt? right, SymInt offset, Tensor? bounds, Tensor? runs, Tensor? allowed, "
    "float scale, float? softcap, Tensor? table, SymInt? first, Tensor? slopes, SymInt? origin, "
    "Tensor? bias, Tensor? sinks, "
    "Tensor? query_vectors, Tensor? query_embeddings, SymInt query_first, "
    "Tensor? key_vectors, Tensor? key_embeddings, SymInt key_first, "
    "Tensor? value_vectors, Tensor? value_embeddings, SymInt value_first, "
    "str? score, Tensor[] score_arguments, float dropout, Tensor? seed"
)
# Where the tensors stand among the options.
_TENSORS = [at for at, x in enumerate(OPTIONS.split(", ")) if x.startswith("Tensor?")]
NAMES = [argument.split()[1] for argument in OPTIONS.split(", ")]


def flat(options: Options) -> tuple[Any, ...]:
    """The record as arguments of the schema."""
    band, of_mask = parts(options.mask)
    score = options.score
    return (
        *band,
        *of_mask,
        options.scale,
        options.softcap,
        options.table,
        options.first,
        options.slopes,
        options.offset,
        options.bias,
        options.sinks,
        *_flat_relative(options.relative_queries),
        *_flat_relative(options.relative_keys),
        *_flat_relative(options.relative_values),
        None if score is None else score.name,
        [] if score is None else list(score.arguments),
        options.dropout,
        options.seed,
    )


def record(
    left: int | None,
    right: int | None,
    offset: int,
    bounds: Tensor | None,
    runs: Tensor | None,
    allowed: Tensor | None,
    *rest: Any,
) -> Options:
    """The arguments of the schema as a record."""
    plain, relative, (name, tensors, *drop) = rest[:8], rest[8:17], rest[17:]
    mask: Mask = Band(left, right, offset)
    if allowed is not None:
        mask = Boolean(allowed)
    elif bounds is not None:
        mask = Intervals(bounds, runs)
    score = None if name is None else Score.named(name, tuple(tensors))
    records = [
        None if embeddings is None else Relative(embeddings, first, vectors)
        for vectors, embeddings, first in (relative[:3], relative[3:6], relative[6:])
    ]
    return Options(mask, *plain, *records, score, *drop)  # pyright: ignore[reportCallIssue]


def _flat_relative(relative: Relative | None) -> tuple[Tensor | None, Tensor | None, int]:
    if relative is None:
        return None, None, 0
    return relative.vectors, relative.embeddings, relative.first


# Stands for a tensor among options that are saved.
_TENSOR = object()


def apart(options: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """The options without their tensors, and these."""
    plain, tensors = list(options), []
    for at in _TENSORS:
        if plain[at] is not None:
            tensors.append(plain[at])
            plain[at] = _TENSOR
    return plain, tensors


def together(plain: list[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The options with their tensors."""
    rest = iter(tensors)
    return [next(rest) if x is _TENSOR else x for x in plain]


def none_of(options: list[Any]) -> list[Any]:
    """No gradient for any of the options: a list of none for a list."""
    return [[None] * len(x) if isinstance(x, list) else None for x in options]
