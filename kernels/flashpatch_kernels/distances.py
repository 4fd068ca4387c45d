"""Biases of the distance between key and query, as one table of all distances and back.

For engines that read a table [H, N + M - 1] from the least distance, 1 - N, to the largest, M - 1.
"""

import torch
from torch import Tensor

from flashpatch_kernels.options import Options


def whole_table(options: Options, n_queries: int, n_keys: int) -> Tensor | None:
    """Table and slopes as one table of all distances, [H, N + M - 1], differentiable, or None."""
    table = options.table
    if table is not None and options.first is not None:
        table = table.index_select(1, _entries(options, table, n_queries, n_keys))
    if options.slopes is None:
        return table
    slopes = options.slopes.to(torch.promote_types(options.slopes.dtype, torch.float32))
    sloping = -slopes[:, None] * _away(options, slopes, n_queries, n_keys)
    return sloping if table is None else table + sloping


def gradients_of_whole(
    gradient: Tensor, options: Options, n_queries: int, n_keys: int
) -> dict[str, Tensor]:
    """The gradients of table and slopes from that of the whole table."""
    found: dict[str, Tensor] = {}
    if options.table is not None:
        found["table"] = gradient
        if options.first is not None:
            at = _entries(options, gradient, n_queries, n_keys)
            empty = gradient.new_zeros(options.table.shape)
            found["table"] = empty.index_add_(1, at, gradient)
    if options.slopes is not None:
        found["slopes"] = -(gradient * _away(options, gradient, n_queries, n_keys)).sum(1)
    return found


def _entries(options: Options, table: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """The table's entry of each distance: int64 [N + M - 1]."""
    assert options.table is not None
    assert options.first is not None
    distance = torch.arange(1 - n_queries, n_keys, device=table.device)
    return (distance - options.first).clamp(0, options.table.shape[1] - 1)


def _away(options: Options, x: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """How far the slopes take each distance to be: [N + M - 1]."""
    offset = n_keys - n_queries if options.offset is None else options.offset
    distance = torch.arange(1 - n_queries, n_keys, device=x.device)
    return (distance - offset).abs().to(x.dtype)
