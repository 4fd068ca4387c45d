"""From a call's tensors and options to what the kernels take.

Nothing is checked here, and nothing reads data: what may be asked is decided before, in dispatch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashpatch_kernels import dropout, masks, tuning
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import tile_masks
from flashpatch_kernels.tuning import Tile

INTERPRET = triton.knobs.runtime.interpret
# Whether kernels may use NVIDIA's own instructions.
NVIDIA = not INTERPRET and torch.version.hip is None
LOG2E = math.log2(math.e)

# Beyond any length, yet far from overflow when positions are added to it.
UNLIMITED = 1 << 29


class Constants(NamedTuple):
    """What a kernel is compiled for, beside types.

    D, DV are head sizes, D0 + D1 and V0 + V1 the chunks that cover them; UNIT is the number of
    elements that strides are given in; PRECISION as in `tiles.dot`; PLAIN says that a score is its
    product times a positive factor, CAP that it is capped, with an APPROXIMATE hyperbolic tangent
    or a good one; DROPOUT that weights are dropped; FAR that tiles on which a table is constant
    are computed with those that are seen wholly, and the others, which are few, with NEAR_STAGES
    tiles in flight, so that they take no more memory; OWN how many of the terms, the last, are a
    user's function and its derivative; X, Y and Z are the sizes of the vectors by distance of
    queries, keys and values, 0 without, of which EB elements are taken at a time; W is how many
    distances a tile may have (see `relative`).
    """

    D: int
    DV: int
    D0: int
    D1: int
    V0: int
    V1: int
    BM: int
    BN: int
    UNIT: int
    TMA: bool
    FAR: bool
    NEAR_STAGES: int | None
    PRECISION: str
    PLAIN: bool
    CAP: bool
    APPROXIMATE: bool
    DROPOUT: bool
    OWN: int
    X: int
    Y: int
    Z: int
    W: int
    EB: int


class MaskCode(NamedTuple):
    """A mask as kernels take it: six functions (see `tile_masks`) and their arguments.

    Attributes:
        band: left, right, offset.
        bounds: Those of Intervals or what a Boolean allows, and the batch, head and row strides.
        runs: With its batch stride.
        n_masks: How many rows of the batch, and how many heads, have a mask of their own.
    """

    rows: Any
    seen: Any
    keys: Any
    queries: Any
    at: Any
    whole: Any
    band: tuple[int, int, int] = (0, 0, 0)
    bounds: tuple[Tensor | None, int, int, int] = (None, 0, 0, 0)
    runs: tuple[Tensor | None, int] = (None, 0)
    n_masks: tuple[int, int] = (1, 1)

    def arguments(self, tiles: Tensor | None = None) -> tuple[Any, ...]:
        """In the kernels' order, with the lists of tiles [B|1, H|1, ...] where there are some."""
        where = (0, 0) if tiles is None else (batch_stride(tiles), head_stride(tiles))
        return (*self.band, *self.bounds, *self.runs, tiles, *where)

    @property
    def has_runs(self) -> bool:
        """Whether some keys may be hidden from everybody."""
        return self.runs[0] is not None

    @property
    def is_boolean(self) -> bool:
        """Whether tiles stand in lists."""
        return self.at is tile_masks.listed


def mask_code(mask: masks.Mask) -> MaskCode:
    """The device functions of a mask, with their arguments."""
    if isinstance(mask, masks.Band):
        left, right = (
            UNLIMITED if x is None else max(-UNLIMITED, min(x, UNLIMITED))
            for x in (mask.left, mask.right)
        )
        return MaskCode(
            tile_masks.band_rows,
            tile_masks.interval_seen,
            tile_masks.band_keys,
            tile_masks.band_queries,
            tile_masks.number_itself,
            tile_masks.band_whole,
            (left, right, mask.offset),
        )
    if isinstance(mask, masks.Boolean):
        allowed = mask.allowed if mask.allowed.stride(-1) == 1 else mask.allowed.contiguous()
        allowed = allowed.view(torch.uint8)
        row_stride = 0 if allowed.shape[2] == 1 else allowed.stride(2)
        return MaskCode(
            tile_masks.boolean_rows,
            tile_masks.boolean_seen,
            tile_masks.boolean_keys,
            tile_masks.boolean_queries,
            tile_masks.listed,
            tile_masks.never_whole,
            bounds=(allowed, batch_stride(allowed), head_stride(allowed), row_stride),
            n_masks=(allowed.shape[0], allowed.shape[1]),
        )
    bounds = mask.bounds.contiguous()
    runs = None if mask.runs is None else mask.runs.contiguous()
    n_masks = max(bounds.shape[0], 1 if runs is None else runs.shape[0])
    return MaskCode(
        tile_masks.interval_rows,
        tile_masks.interval_seen,
        tile_masks.interval_keys,
        tile_masks.interval_queries,
        tile_masks.number_itself,
        tile_masks.never_whole,
        bounds=(bounds, batch_stride(bounds), 0, 0 if bounds.shape[1] == 1 else 2),
        runs=(runs, 0 if runs is None else batch_stride(runs)),
        n_masks=(n_masks, 1),
    )


def head_stride(t: Tensor) -> int:
    """Stride of the second dimension, 0 where it broadcasts."""
    return 0 if t.shape[1] == 1 else t.stride(1)


def batch_stride(t: Tensor) -> int:
    """Stride of the first dimension, 0 where it broadcasts."""
    return 0 if t.shape[0] == 1 else t.stride(0)


def chunks(size: int) -> tuple[int, int]:
    """Two powers of two that cover a head size with the least padding; 0 where one is enough."""
    first = max(16, 1 << (size.bit_length() - 1))
    rest = size - first
    if rest <= 0:
        return first, 0
    second = max(16, 1 << (rest - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


def precision(dtype: torch.dtype) -> str:
    """How products are taken: in full precision unless torch was told that less will do."""
    if INTERPRET:
        return "upcast"
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32x3"


def readable(t: Tensor) -> Tensor:
    """The tensor, or a copy where kernels cannot read its rows."""
    return t if rows_readable(t.stride()) else t.contiguous()


def rows_readable(strides: tuple[int, ...]) -> bool:
    """Whether rows are contiguous and near enough to each other for 32-bit offsets."""
    return strides[-1] == 1 and strides[-2] < 1 << 22


class Layout(NamedTuple):
    """What memory is allocated by."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def output_layouts(q: Tensor, v: Tensor) -> tuple[Layout, Layout]:
    """Of the output (B, H, N, Dv), laid out as (B, N, H, Dv), and of lse, fp32 (B, H, N)."""
    n_batch, n_heads, n_queries, _ = q.shape
    dv = v.shape[3]
    row = n_heads * dv
    size, rows = (n_batch, n_heads, n_queries, dv), (n_heads * n_queries, n_queries, 1)
    return (
        Layout(size, (n_queries * row, dv, row, 1), q.dtype),
        Layout(size[:3], rows, torch.float32),
    )


def strides(t: Tensor) -> list[int]:
    """Batch, head and row strides of (B, H, N, D); 0 where a dimension has one entry or none."""
    batch, head, row, _ = t.stride()
    n_batch, n_heads, n_rows, _ = t.shape
    return [batch if n_batch > 1 else 0, head if n_heads > 1 else 0, row if n_rows > 1 else 0]


def cdiv(n: int, size: int) -> int:
    """How many parts of this size cover n; Triton's own takes longer than what it is for."""
    return -(-n // size)


@dataclass(frozen=True)
class Setup:
    """What the kernels of one call share.

    Attributes:
        sizes: n_batch, n_heads, group, n_queries, n_keys, as kernels take them.
        head_sizes: D and Dv.
        unit: Elements in which strides are given: 16 bytes if every row of every tensor starts at a
            multiple of them, else 1.
    """

    device: torch.device
    dtype: torch.dtype
    architecture: str
    sizes: tuple[int, int, int, int, int]
    head_sizes: tuple[int, int]
    unit: int
    mask: MaskCode
    options: Options

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, others: Iterable[Tensor], options: Options) -> "Setup":
        """The setup of a call on these tensors, all of which the kernels read or write."""
        n_batch, n_heads, n_queries, d = q.shape
        unit = 16 // q.element_size()
        for t in (q, k, v, *others):
            if t.data_ptr() % 16 or math.gcd(*strides(t)) % unit:
                unit = 1
        return Setup(
            q.device,
            q.dtype,
            tuning.architecture(q.device),
            (n_batch, n_heads, n_heads // k.shape[1], n_queries, k.shape[2]),
            (d, v.shape[3]),
            unit,
            mask_code(options.mask),
            options,
        )

    @cached_property
    def question(self) -> tuning.Question:
        """What decides about tiles."""
        o = self.options
        kind = ""
        if any(self.vector_sizes):
            kind = "relative"
        elif o.score is not None:
            kind = "score"
        elif o.bias is not None and o.bias.shape[2] > 1:
            kind = "bias"
        elif o.table is not None:
            kind = "ends" if self.far else "bias"
        elif o.dropout > 0:
            kind = "dropout"
        elif self.mask.is_boolean:
            kind = "boolean"
        size = max(self.head_sizes)
        return tuning.Question(self.architecture, self.dtype, size, self.unit > 1, kind)

    @cached_property
    def plain(self) -> bool:
        """Whether a score is its product times a positive factor."""
        o = self.options
        added = (o.softcap, o.score, o.table, o.slopes, o.bias)
        return o.scale > 0 and all(x is None for x in added) and not any(self.vector_sizes[:2])

    @property
    def own(self) -> int:
        """How many of the terms are a user's function and its derivative."""
        score = self.options.score
        return 0 if score is None else 1 if score.derivative is None else 2

    @cached_property
    def vector_sizes(self) -> tuple[int, int, int]:
        """The sizes of vectors by distance: of queries, of keys, of values; 0 without."""
        o = self.options
        every = (o.relative_queries, o.relative_keys, o.relative_values)
        x, y, z = (0 if one is None else one.embeddings.shape[2] for one in every)
        return x, y, z

    @property
    def clamped(self) -> bool:
        """Whether a table has fewer entries than there are distances."""
        return self.options.table is not None and self.options.first is not None

    @property
    def first(self) -> int:
        """The distance of a table's entry 0."""
        first = self.options.first
        return 1 - self.sizes[3] if first is None else first

    @property
    def origin(self) -> int:
        """The place of query 0 among the keys, for slopes."""
        offset = self.options.offset
        return self.sizes[4] - self.sizes[3] if offset is None else offset

    @property
    def far(self) -> bool:
        """Whether tiles on which a table is constant are a range of tiles."""
        return self.clamped and not self.mask.is_boolean

    @property
    def to_log2(self) -> float:
        """The factor from scores to base 2, in which a plain score's own is folded."""
        return LOG2E * (self.options.scale if self.plain else 1.0)

    @property
    def cap(self) -> tuple[float, float]:
        """The factor of the products, which a cap divides, and the cap."""
        cap = float(self.options.softcap or 1.0)
        return self.options.scale / cap, cap

    @property
    def drop(self) -> tuple[Tensor | None, int, float]:
        """Seed, threshold and factor of dropout."""
        p = self.options.dropout
        if not p:
            return None, 0, 1.0
        probability = dropout.keep_probability(p)
        return self.options.seed, dropout.threshold(p), 1 / probability if probability else 0.0

    def tuned(self, name: tuning.Pass) -> tuple[Tile, Constants]:
        """The tile of a pass, and what it is compiled for."""
        return self.passes[name]

    @cached_property
    def passes(self) -> "Passes":
        """What `tuned` gives, of all passes."""
        return passes(self.question, self.head_sizes, self.unit, self.far, *self.kinds)

    @cached_property
    def kinds(self) -> tuple[Any, ...]:
        """What else kernels are compiled for, in the order in which `Constants` has it."""
        products = (precision(self.dtype), self.plain, self.options.softcap is not None)
        approximate = self.dtype != torch.float32 and NVIDIA
        return (
            *(*products, approximate, bool(self.options.dropout)),
            *(self.own, *self.vector_sizes),
        )

    def strides(self, *tensors: Tensor) -> list[int]:
        """Three strides of each tensor, in units."""
        return [stride // self.unit for t in tensors for stride in strides(t)]

    def wave(self, n_tiles: int, n_rows: int, sharers: int) -> int:
        """How many heads to work on together, see `tiles.place`.

        Args:
            n_tiles: Programs a head.
            n_rows: Rows that they read.
            sharers: Heads that read the same rows.
        """
        fit = tuning.WAVE_BYTES // (n_rows * sum(self.head_sizes) * self.dtype.itemsize)
        fill = cdiv(tuning.WAVE_PROGRAMS, n_tiles * sharers)
        return max(fit, fill) * sharers

    def key_passes(self, needs: frozenset[str]) -> tuple[tuning.Pass, ...]:
        """The passes that give the gradients of k and v, as far as they are needed."""
        if not {"k", "v"} <= needs:
            return ("dk",) if "k" in needs else ("dv",) if "v" in needs else ()
        return ("dkdv",) if tuning.has_tile(self.question, "dkdv") else ("dk", "dv")


class Passes(dict[tuning.Pass, tuple[Tile, Constants]]):
    """The tile of each pass of alike calls, and what it is compiled for, made when it is asked for.

    Arguments as `passes` has them.
    """

    def __init__(self, *alike: Any) -> None:
        super().__init__()
        self.alike = alike

    def __missing__(self, name: tuning.Pass) -> tuple[Tile, Constants]:
        question, (d, dv), unit, far, *kinds = self.alike
        tile = tuning.tile(question, name)
        fixed = Constants(
            *(d, dv, *chunks(d), *chunks(dv)),
            *(tile.BM, tile.BN, unit, tile.tma and unit > 1),
            *(far, max(1, tile.stages - 1) if far else None, *kinds),
            *(2 * max(tile.BM, tile.BN), 64 if name == "sums" else 32),
        )
        self[name] = tile, fixed
        return tile, fixed


@lru_cache
def passes(
    question: tuning.Question, sizes: tuple[int, int], unit: int, far: bool, *kinds: Any
) -> Passes:
    """One record for all calls that are alike in this, because each asks several times.

    What replaces `tuning.tile` for a while must replace this by `Passes`.
    """
    return Passes(question, sizes, unit, far, *kinds)
