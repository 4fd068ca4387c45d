"""Which tiles a tile meets, where a mask's bounds alone do not tell: lists made before a pass.

Letters: N queries, M keys, tiles of BM queries and BN keys.
"""

import torch
from torch import Tensor

from flashpatch_kernels.triton import launching, setups, tile_masks
from flashpatch_kernels.triton.plans import Steps
from flashpatch_kernels.tuning import Tile


def key_lists(mask: setups.MaskCode, tile: Tile, n_queries: int, n_keys: int) -> Tensor | None:
    """The key tiles of every query tile under a Boolean, as `ordered` gives them."""
    if not mask.is_boolean:
        return None
    return ordered(states(mask, tile, n_queries, n_keys))


def key_tiles(
    steps: Steps, mask: setups.MaskCode, tile: Tile, rows: int, n_queries: int, n_keys: int
) -> Tensor | None:
    """The key tiles of every query tile under Intervals, for programs that stay for many.

    Four numbers, as `tile_masks.interval_keys` gives them: int32 [1|B, 1, query tiles, 4].

    Args:
        rows: Queries to look at together, a power of two that divides the tile's.
    """
    bounds, batch, _, row = mask.bounds
    if bounds is None:
        return None
    runs, runs_batch = mask.runs
    n_tiles = setups.cdiv(n_queries, tile.BM)
    found = steps.own(bounds.new_empty(mask.n_masks[0], 1, n_tiles, 4))
    steps.launch(
        tile_masks.key_tiles_kernel,
        mask.n_masks[0] * n_tiles,
        Tile(tile.BM, tile.BN, 4, 1),
        *(found, bounds, batch, row, runs, runs_batch, n_queries, n_keys),
        *(rows, tile.BM, tile.BN, runs is not None),
    )
    return found


def query_lists(
    steps: Steps, mask: setups.MaskCode, tile: Tile, group: int, n_queries: int, n_keys: int
) -> Tensor | None:
    """The query tiles of every key tile, where a mask needs lists of them.

    Under Intervals four numbers, int32 [1|B, 1, key tiles, 4]; under a Boolean as `ordered` gives
    them, for all query heads of a key head together.
    """
    if mask.is_boolean:
        found = states(mask, tile, n_queries, n_keys)
        if found.shape[1] > 1 and group > 1:
            heads = found.unflatten(1, (-1, group))
            some, every = heads.amax(2).clamp(max=1), heads.amin(2) == 2
            found = some + every
        return ordered(found.mT)
    bounds, batch, _, row = mask.bounds
    if bounds is None:
        return None
    runs, runs_batch = mask.runs
    n_key_tiles = setups.cdiv(n_keys, tile.BN)
    seen = steps.own(bounds.new_empty(mask.n_masks[0], 1, n_key_tiles, 4))
    steps.launch(
        tile_masks.query_tiles_kernel,
        mask.n_masks[0] * n_key_tiles,
        Tile(tile.BM, tile.BN, 4, 1),
        *(seen, bounds, batch, row, runs, runs_batch, n_queries, n_keys),
        *(tile.BM, tile.BN, 2048 // tile.BM, runs is not None),
    )
    return seen


def states(mask: setups.MaskCode, tile: Tile, n_queries: int, n_keys: int) -> Tensor:
    """How much of a tile is seen, 0 nothing, 1 a part, 2 all: [B|1, H|1, query, key tiles]."""
    allowed, *strides = mask.bounds
    assert allowed is not None
    shape = (*mask.n_masks, setups.cdiv(n_queries, tile.BM), setups.cdiv(n_keys, tile.BN))
    found = allowed.new_empty(shape, dtype=torch.int8)
    launching.launch(
        tile_masks.states_kernel,
        found.numel(),
        Tile(tile.BM, tile.BN, 4, 1),
        *(found, allowed, *strides, mask.n_masks[1], n_queries, n_keys, tile.BM, tile.BN),
    )
    return found


def ordered(found: Tensor) -> Tensor:
    """For each tile how many others it meets wholly, how many at all, and which, in that order.

    Returns:
        int32 [B|1, H|1, tiles, 2 + others]; what stands beyond the last is undefined.
    """
    *matrices, n_tiles, n_others = found.shape
    lists = found.new_empty((*matrices, n_tiles, 2 + n_others), dtype=torch.int32)
    launching.launch(
        tile_masks.lists_kernel,
        found[..., 0].numel(),
        Tile(1, 256, 4, 1),
        *(lists, found, n_tiles, n_others, found.stride(1), *found.stride()[2:], 256),
    )
    return lists
