"""Tile sizes of the Triton kernels: one table, by architecture, type, pass and head size.

Never by length, and never searched at run time: one compilation of a kernel serves every length.
Kept apart from the kernels because it is all that knows about cards. Rows for Hopper ("sm90") were
measured on an H200 (triton/LOG.md); the others follow from registers and shared memory, by
compiling for those targets.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Pass = Literal["forward", "stats", "dkdv", "dk", "dv", "dq", "sums"]
# Those of the Hopper engine, one of which gives all gradients.
CrewPass = Literal["forward", "dqdkdv", "dkdv", "dq"]


class Tile(NamedTuple):
    """How one pass is cut: BM queries by BN keys, and how a program runs.

    Attributes:
        warps: Warps in a program.
        stages: Tiles in flight, the depth of the software pipeline.
        tma: Read tiles by Hopper's bulk copy engine, where alignment allows.
        registers: The most that a thread may use, where a few less let another program run beside.
        together: Whether all programs run at the same time, because they wait for each other.
    """

    BM: int
    BN: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None
    together: bool = False


class Crew(NamedTuple):
    """How one pass of the Hopper engine is cut, and how the warps of a program share the work.

    Attributes:
        consumers: Warpgroups that compute; one more reads.
        own: Queries of a program, or keys in the passes for these.
        others: Keys, or queries, at a time.
        slots: Tiles of those in flight.
        own_slots: How many parts of `own` are in flight, of which each consumer has one.
        registers: Of a thread that computes.
        in_turn: Whether consumers take turns at the tensor cores.
    """

    consumers: int
    own: int
    others: int
    slots: int
    own_slots: int
    registers: int
    in_turn: bool = False

    def tile(self, name: CrewPass) -> Tile:
        """BM and BN of a pass, the producer's warps, and that descriptors are made."""
        own, others = self.own, self.others
        sizes = (own, others) if name in ("forward", "dq") else (others, own)
        return Tile(*sizes, 4, 1, tma=True)


# (pass, widths of the tiles of q and k and of v) -> crew.
CREWS: dict[tuple[CrewPass, int, int], Crew] = {
    ("forward", 64, 64): Crew(3, 192, 64, 8, 6, 160),
    ("forward", 128, 64): Crew(2, 128, 128, 2, 4, 240, in_turn=True),
    ("forward", 128, 128): Crew(2, 128, 128, 2, 4, 240, in_turn=True),
    ("forward", 256, 128): Crew(2, 128, 64, 3, 2, 240, in_turn=True),
    ("forward", 256, 256): Crew(2, 128, 64, 2, 2, 240, in_turn=True),
    ("dqdkdv", 64, 64): Crew(2, 128, 64, 4, 1, 192),
    ("dqdkdv", 128, 128): Crew(2, 128, 64, 2, 1, 208),
    ("dkdv", 64, 64): Crew(2, 128, 128, 3, 1, 240),
    ("dkdv", 128, 128): Crew(2, 128, 64, 3, 1, 240),
    ("dkdv", 256, 128): Crew(2, 64, 64, 2, 1, 240),
    ("dkdv", 256, 256): Crew(2, 64, 64, 2, 1, 240),
    ("dq", 64, 64): Crew(2, 128, 128, 3, 2, 240),
    ("dq", 128, 128): Crew(2, 128, 128, 2, 2, 240),
    ("dq", 256, 128): Crew(2, 128, 64, 2, 2, 240),
    ("dq", 256, 256): Crew(2, 128, 64, 2, 2, 240),
}


def crew(name: CrewPass, size: int, value_size: int) -> Crew | None:
    """The crew of a pass of the Hopper engine for heads of these sizes, if it has one."""
    return CREWS.get((name, width(size), width(value_size)))


def width(size: int) -> int:
    """Columns of a tile in shared memory that holds rows of a head, zero beyond its size.

    The narrowest that has a crew is 64, of which heads of 32 would use the half.
    """
    return 1 << (size - 1).bit_length()


# Programs run in waves of heads: few, so that what they read stays in the L2 cache, but enough that
# the longest programs of the last wave do not begin when the card is nearly done.
WAVE_BYTES = 16 << 20
WAVE_PROGRAMS = 512

# (architecture, kind of type, pass) -> rows (largest head size, tile), in rising order.
TABLE: dict[tuple[str, str, Pass], tuple[tuple[int, Tile], ...]] = {
    ("sm90", "half", "forward"): (
        (64, Tile(64, 128, 4, 2, tma=True)),
        (80, Tile(128, 64, 8, 3, tma=True)),
        (96, Tile(128, 64, 4, 3, tma=True)),
        (128, Tile(128, 64, 4, 2, tma=True)),
        (192, Tile(128, 64, 8, 3, tma=True)),
        (256, Tile(128, 64, 8, 2, tma=True)),
        (512, Tile(64, 32, 8, 2, tma=True)),
    ),
    ("sm90", "half", "dkdv"): (
        (96, Tile(64, 64, 4, 3, tma=True)),
        (128, Tile(32, 64, 4, 3, tma=True)),
    ),
    ("sm90", "half", "dk"): (
        (160, Tile(32, 64, 4, 3, tma=True)),
        (192, Tile(32, 128, 8, 3, tma=True)),
        (256, Tile(64, 128, 8, 1, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    ("sm90", "half", "dv"): (
        (160, Tile(64, 128, 8, 3, tma=True)),
        (192, Tile(64, 64, 4, 3, tma=True)),
        (256, Tile(32, 128, 8, 4, tma=True)),
        (512, Tile(32, 32, 8, 2, tma=True)),
    ),
    ("sm90", "half", "dq"): (
        (64, Tile(64, 64, 4, 3, tma=True, registers=168)),
        (80, Tile(64, 32, 4, 4, tma=True)),
        (96, Tile(64, 64, 4, 2, tma=True)),
        (128, Tile(128, 64, 8, 4, tma=True)),
        (160, Tile(64, 32, 4, 3, tma=True)),
        (192, Tile(128, 64, 8, 2, tma=True)),
        (256, Tile(128, 32, 8, 3, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    ("sm90", "half", "sums"): (
        (64, Tile(64, 64, 4, 3, tma=True)),
        (128, Tile(128, 64, 8, 2, tma=True)),
        (256, Tile(64, 32, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    # Beside a table or a bias of pairs, of which every tile of scores reads one.
    ("sm90", "half bias", "forward"): (
        (64, Tile(128, 64, 4, 3, tma=True)),
        (128, Tile(128, 64, 4, 2, tma=True)),
        (256, Tile(64, 64, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    ("sm90", "half bias", "dkdv"): (
        (96, Tile(64, 64, 4, 3, tma=True)),
        (128, Tile(32, 64, 4, 3, tma=True)),
    ),
    ("sm90", "half bias", "dq"): (
        (64, Tile(64, 64, 4, 2, tma=True)),
        (128, Tile(64, 64, 4, 2, tma=True)),
        (256, Tile(64, 32, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    # Beside a table that is constant beyond its ends, which few tiles read.
    ("sm90", "half ends", "forward"): (
        (64, Tile(64, 128, 4, 2, tma=True, registers=168)),
        (128, Tile(128, 64, 4, 2, tma=True)),
        (256, Tile(64, 64, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    ("sm90", "half ends", "dq"): (
        (64, Tile(64, 64, 4, 3, tma=True, registers=168)),
        (128, Tile(128, 64, 8, 4, tma=True)),
        (256, Tile(64, 32, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    # Beside dropout, whose hashes want registers of their own.
    ("sm90", "half dropout", "forward"): (
        (128, Tile(64, 64, 4, 2, tma=True)),
        (256, Tile(64, 64, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    # Under a boolean mask, of which tiles that are seen in part read a tile.
    ("sm90", "half boolean", "forward"): (
        (64, Tile(64, 64, 4, 3, tma=True)),
        (128, Tile(64, 128, 8, 2, tma=True)),
        (256, Tile(64, 64, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    # Beside a user's function, which may want many registers. Chosen by compiling, not measured.
    ("sm90", "half score", "forward"): (
        (64, Tile(128, 64, 8, 3, tma=True)),
        (128, Tile(64, 128, 8, 2, tma=True)),
        (256, Tile(64, 64, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    ("sm90", "half score", "dkdv"): ((128, Tile(32, 64, 4, 3, tma=True)),),
    ("sm90", "half score", "dq"): (
        (64, Tile(64, 64, 4, 3, tma=True)),
        (128, Tile(128, 64, 8, 3, tma=True)),
        (256, Tile(64, 32, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    ("sm90", "half score", "sums"): (
        (128, Tile(128, 64, 8, 2, tma=True)),
        (256, Tile(64, 32, 8, 2, tma=True)),
        (512, Tile(32, 32, 8, 1, tma=True)),
    ),
    ("any", "half", "forward"): (
        (64, Tile(64, 64, 4, 2)),
        (128, Tile(64, 32, 4, 2)),
        (256, Tile(64, 32, 8, 2)),
        (512, Tile(32, 32, 8, 1)),
    ),
    ("any", "half", "dkdv"): ((64, Tile(32, 64, 4, 2)), (128, Tile(32, 64, 8, 1))),
    ("any", "half", "dk"): ((512, Tile(32, 32, 8, 1)),),
    ("any", "half", "dv"): ((512, Tile(32, 32, 8, 1)),),
    ("any", "half", "dq"): (
        (64, Tile(64, 32, 4, 2)),
        (128, Tile(64, 32, 8, 1)),
        (512, Tile(32, 32, 8, 1)),
    ),
    ("any", "float", "forward"): (
        (64, Tile(32, 32, 4, 1)),
        (128, Tile(16, 32, 4, 1)),
        (512, Tile(16, 16, 8, 1)),
    ),
    ("any", "float", "dkdv"): ((64, Tile(32, 32, 8, 1)), (128, Tile(16, 16, 4, 1))),
    ("any", "float", "dk"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "float", "dv"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "float", "dq"): ((64, Tile(16, 32, 4, 1)), (512, Tile(16, 16, 8, 1))),
    ("any", "half", "sums"): ((128, Tile(64, 64, 8, 1)), (512, Tile(32, 32, 4, 1))),
    ("any", "float", "sums"): ((128, Tile(32, 32, 4, 1)), (512, Tile(16, 16, 4, 1))),
    # Beside vectors by distance, whose windows are as wide as two tiles: small tiles, of as many
    # keys as queries. Chosen by compiling, not measured.
    ("any", "half relative", "forward"): ((128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("any", "half relative", "dkdv"): ((128, Tile(32, 32, 8, 1)),),
    ("any", "half relative", "dk"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "half relative", "dv"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "half relative", "dq"): ((128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("any", "half relative", "sums"): ((128, Tile(32, 32, 8, 1)), (512, Tile(16, 16, 8, 1))),
    ("any", "float relative", "forward"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "float relative", "dkdv"): ((128, Tile(16, 16, 8, 1)),),
    ("any", "float relative", "dk"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "float relative", "dv"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "float relative", "dq"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "float relative", "sums"): ((512, Tile(16, 16, 8, 1)),),
    ("any", "half", "stats"): ((64, Tile(64, 64, 4, 1)), (512, Tile(16, 64, 4, 1))),
    ("any", "float", "stats"): ((64, Tile(32, 64, 4, 1)), (512, Tile(16, 64, 4, 1))),
}


@lru_cache
def architecture(device: torch.device) -> str:
    """The name under which the table knows a card."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


class Question(NamedTuple):
    """What the table is asked for.

    Attributes:
        arch: As `architecture` gives it; one without rows takes those of "any".
        dtype: Of q, k and v.
        size: Head size, the larger of D and Dv.
        aligned: Every row starts at a multiple of 16 bytes. If not, loads are narrow, need many
            registers, and take the small tiles.
        beside: "relative" if there are vectors by distance, "score" if a user's function takes
            part, "bias" if tiles of a table or of a bias of pairs are read, "ends" if only those of
            a table between its ends, "dropout" if weights are dropped, "boolean" if a mask is read
            as a matrix, else "".
    """

    arch: str
    dtype: torch.dtype
    size: int
    aligned: bool = True
    beside: str = ""


@lru_cache
def tile(asked: Question, name: Pass) -> Tile:
    """The tile of a pass; "dk" or "dv" alone can do with that of both where they have none."""
    if name in ("dk", "dv") and not has_tile(asked, name):
        name = "dkdv"
    return next(t for most, t in _rows(asked, name) if asked.size <= most)


def has_tile(asked: Question, name: Pass) -> bool:
    """Whether a pass has a tile for heads of this size, as "dkdv" has not where two are large."""
    return any(asked.size <= most for most, _ in _rows(asked, name))


def _rows(asked: Question, name: Pass) -> tuple[tuple[int, Tile], ...]:
    """The table's rows for one pass, from the most particular to the most general."""
    kind = "float" if asked.dtype == torch.float32 else "half"
    kinds = (f"{kind} {asked.beside}", kind) if asked.beside else (kind,)
    archs = (asked.arch, "any") if asked.aligned else ("any",)
    keys: list[tuple[str, str, Pass]] = [(arch, k, name) for k in kinds for arch in archs]
    return next((TABLE[key] for key in keys if key in TABLE), ())
