"""The derivative of the gradients, for engine `tiled`: a tile of queries at a time in PyTorch.

The gradients are sums over queries, so that a tile of them can be differentiated by itself: the
equations of `reference` twice, on R x M scores.

Letters: B batch, H query heads, N queries, M keys, R queries of a tile.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flashpatch_kernels import reference
from flashpatch_kernels.masks import rows
from flashpatch_kernels.options import Options, Relative

ROWS = 64


def differentiate(
    inputs: Mapping[str, Tensor], options: Options, cotangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradient, by `inputs`, of the sum of cotangents times first gradients.

    Args:
        inputs: "q", "k", "v", "dout", and where there are some "dlse" and the terms of the call.
        options: The rest of the call.
        cotangents: By the names of the tensors whose gradients they weigh.

    Returns:
        By the names of `inputs`, each in its tensor's dtype.
    """
    n_queries, n_keys = inputs["q"].shape[2], inputs["k"].shape[2]
    totals = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in inputs.items()}
    for start in range(0, n_queries, ROWS):
        stop = min(start + ROWS, n_queries)
        at = {name: _part(name, x, start, stop) for name, x in inputs.items()}
        found = _of_tile(
            {name: x[at[name]] for name, x in inputs.items()},
            _rows(options, start, stop, n_queries, n_keys),
            {name: x[at[name]] for name, x in cotangents.items()},
        )
        for name, x in found.items():
            totals[name][at[name]] += x
    return {name: total.to(inputs[name].dtype) for name, total in totals.items()}


def _part(name: str, x: Tensor, start: int, stop: int) -> tuple[slice, ...]:
    """What of a tensor the queries start..stop meet."""
    if name in ("q", "dout", "dlse", "query_vectors") or (name == "bias" and x.shape[2] > 1):
        return (slice(None), slice(None), slice(start, stop))
    return (slice(None),)


def _rows(options: Options, start: int, stop: int, n_queries: int, n_keys: int) -> Options:
    """The options of the queries start..stop alone: distances count from their first."""

    def moved(relative: Relative | None) -> Relative | None:
        return None if relative is None else replace(relative, first=relative.first + start)

    first = 1 - n_queries if options.first is None else options.first
    offset = n_keys - n_queries if options.offset is None else options.offset
    return replace(
        options,
        mask=rows(options.mask, start, stop),
        first=first + start,
        offset=offset + start,
        relative_queries=moved(options.relative_queries),
        relative_keys=moved(options.relative_keys),
        relative_values=moved(options.relative_values),
    )


def _of_tile(
    inputs: Mapping[str, Tensor], options: Options, cotangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    with torch.enable_grad():
        x = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
        options = options.with_terms({name: x[name] for name in options.terms})
        out, lse = reference.attention(x["q"], x["k"], x["v"], options)
        weighed = (out * x["dout"]).sum()
        if "dlse" in x:
            weighed = weighed + (torch.where(lse > -torch.inf, lse, 0) * x["dlse"]).sum()
        names = list(cotangents)
        first = torch.autograd.grad(weighed, [x[name] for name in names], create_graph=True)
        total = torch.stack(
            [(grad * cotangents[name]).sum() for name, grad in zip(names, first, strict=True)]
        ).sum()
    second = torch.autograd.grad(total, list(x.values()), allow_unused=True)
    return {name: grad for name, grad in zip(x, second, strict=True) if grad is not None}
