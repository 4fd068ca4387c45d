"""How a pass of the Hopper engine is cut and shared out, from a call's setup to its constants."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from flashpatch_kernels import tuning
from flashpatch_kernels.masks import Band, Mask
from flashpatch_kernels.triton import setups, tile_masks
from flashpatch_kernels.tuning import Tile

# The passes whose programs own queries; those of the others own keys.
OF_QUERIES = ("forward", "dq")

# Keys of a part, in the passes for keys: the rows of a warpgroup's products.
PART = 64

# From so many queries on, which are 32 tiles of 192, the tiles of the last rounds are dealt out.
LONG = 6144


class Constants(NamedTuple):
    """What a kernel is compiled for, beside types.

    SIZE and VALUE_SIZE are head sizes, D and DV the columns of their tiles, zero beyond the size;
    products over a head take its chunks D0 and D1 (0 where one is enough). R are the queries of a
    consumer, BM those of a program, BN the keys of a tile; in the passes for keys BM are the
    queries of a tile, BN the keys of a program, R those of a part. Of CONSUMERS warpgroups each
    thread has REGISTERS; they issue products IN_TURN or as they come; SLOTS tiles of keys and of
    values, and Q_SLOTS of queries, are in flight; PAIRED and DEALT as in `scheduling`, ALONE where
    every head has its own keys, STAGGERED and PACED as in `scheduling.course`. The rest is as in
    `setups.Constants`.
    """

    SIZE: int
    VALUE_SIZE: int
    D: int
    DV: int
    D0: int
    D1: int
    R: int
    BM: int
    BN: int
    CONSUMERS: int
    REGISTERS: int
    IN_TURN: bool
    SLOTS: int
    Q_SLOTS: int
    PAIRED: bool
    ALONE: bool
    STAGGERED: bool
    PACED: bool
    DEALT: bool
    PLAIN: bool
    CAP: bool
    APPROXIMATE: bool
    OWN: int
    X: int
    Y: int


def tuned(
    call: setups.Setup, name: tuning.CrewPass, *, in_order: bool = False
) -> tuple[Tile, Constants]:
    """The tile of a pass, and what it is compiled for."""
    of_keys, pairs = name not in OF_QUERIES, paired(call.options.mask, name)
    alone = of_keys and call.sizes[2] == 1
    # Additions to the dQ of one tile at a time take longer than the products of heads of 64.
    staggered = name == "dqdkdv" and (in_order or max(call.head_sizes) <= 64)
    paced = staggered and pairs and not (alone or in_order)
    shares = pairs, alone, staggered, paced, dealt(call, name)
    return constants(name, call.head_sizes, shares, plain(call), *call.kinds[2:4], call.own)


def paired(mask: Mask, name: tuning.CrewPass) -> bool:
    """Whether tiles are taken in pairs, because the work of most grows or shrinks from the first.

    Of Intervals only the forward pass guesses so: its programs gain more by staying.
    """
    if isinstance(mask, Band):
        return mask.right is not None and mask.left is None
    return name in OF_QUERIES


def dealt(call: setups.Setup, name: tuning.CrewPass) -> bool:
    """Whether the tiles of the last rounds of pairs are dealt out one by one.

    This is all that a kernel is compiled for by length. What programs of a head then read at
    different times may have left the L2: it is worth it in the forward pass of heads of 64 alone.
    """
    n_queries, band = call.sizes[3], isinstance(call.options.mask, Band)
    small = name == "forward" and max(call.head_sizes) <= 64
    return small and n_queries >= LONG and band and paired(call.options.mask, name)


@lru_cache
def constants(
    name: tuning.CrewPass, sizes: tuple[int, int], shares: tuple[bool, ...], *rest: Any
) -> tuple[Tile, Constants]:
    """As `tuned`: one object for all calls alike, by which launches know it."""
    crew = tuning.crew(name, *sizes)
    assert crew is not None
    d, dv = map(tuning.width, sizes)
    chunks = setups.chunks(sizes[0]) if sizes[0] > 64 else (64, 0)
    tile = crew.tile(name)
    rows = tile.BM // crew.consumers if name in OF_QUERIES else PART
    return tile, Constants(
        *(*sizes, d, dv, *chunks, rows, tile.BM, tile.BN),
        *(crew.consumers, crew.registers, crew.in_turn, crew.slots, crew.own_slots),
        *(*shares, *rest, 0, 0),
    )


def to_log2(call: setups.Setup) -> float:
    """The factor from scores to base 2: with the cap, where nothing is added to what it gives."""
    o = call.options
    alone = o.table is o.slopes is o.bias is None
    return setups.LOG2E * (o.scale if plain(call) else call.cap[1] if alone else 1.0)


def plain(call: setups.Setup) -> bool:
    """Whether scores are products times a positive factor, but for what `biases` add."""
    o = call.options
    return o.scale > 0 and o.softcap is o.slopes is o.score is None


def programs(call: setups.Setup, name: tuning.CrewPass, n_items: int) -> int:
    """As many programs as the card runs at a time, one on each multiprocessor.

    Under Intervals one for each tile in the backward pass: nobody knows who has how much work, and
    the card gives the next tile to the multiprocessor that is free.
    """
    if name not in OF_QUERIES and not isinstance(call.options.mask, Band):
        return n_items
    return min(n_items, processors(call.device))


@lru_cache
def processors(device: torch.device) -> int:
    """The card's multiprocessors; Hopper's usual number where there is no card."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def keys_of(mask: setups.MaskCode) -> Any:
    """The device function that tells which key tiles a tile of queries meets."""
    return mask.keys if mask.bounds[0] is None else tile_masks.interval_listed_keys
