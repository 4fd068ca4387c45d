"""From a call's tensors and options to what the kernels take, and their launches.

Nothing is checked here, and nothing reads data: what may be asked is decided before, in dispatch.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashpatch_kernels import masks, tuning
from flashpatch_kernels.triton import tile_masks
from flashpatch_kernels.tuning import Tile

INTERPRET = triton.knobs.runtime.interpret
LOG2E = math.log2(math.e)

# Beyond any length, yet far from overflow when positions are added to it.
UNLIMITED = 1 << 29


class Constants(NamedTuple):
    """What a kernel is compiled for, beside types.

    D, DV are head sizes, D0 + D1 and V0 + V1 the chunks that cover them; UNIT is the number of
    elements that strides are given in; FOLD as in `tiles.softmax_step`; PRECISION as in
    `tiles.dot`.
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
    FOLD: bool
    PRECISION: str


class MaskCode(NamedTuple):
    """A mask as kernels take it: three functions and their arguments.

    Attributes:
        band: left, right, offset.
        intervals: bounds and its batch and row strides, runs and its batch stride.
        n_masks: 1 if the batch shares one mask, else B.
    """

    rows: Any
    keys: Any
    queries: Any
    band: tuple[int, int, int]
    intervals: tuple[Tensor | None, int, int, Tensor | None, int]
    n_masks: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (*self.band, *self.intervals)

    @property
    def has_runs(self) -> bool:
        return self.intervals[3] is not None


def mask_code(mask: masks.Mask) -> MaskCode:
    """The device functions of a Band or of Intervals, with their arguments."""
    if isinstance(mask, masks.Band):
        left, right = (
            UNLIMITED if x is None else max(-UNLIMITED, min(x, UNLIMITED))
            for x in (mask.left, mask.right)
        )
        return MaskCode(
            tile_masks.band_rows,
            tile_masks.band_keys,
            tile_masks.band_queries,
            (left, right, mask.offset),
            (None, 0, 0, None, 0),
            1,
        )
    assert isinstance(mask, masks.Intervals), mask
    bounds = mask.bounds.contiguous()
    runs = None if mask.runs is None else mask.runs.contiguous()
    n_masks = max(bounds.shape[0], 1 if runs is None else runs.shape[0])
    return MaskCode(
        tile_masks.interval_rows,
        tile_masks.interval_keys,
        tile_masks.interval_queries,
        (0, 0, 0),
        (
            bounds,
            batch_stride(bounds),
            0 if bounds.shape[1] == 1 else 2,
            runs,
            0 if runs is None else batch_stride(runs),
        ),
        n_masks,
    )


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
    three_tf32 = torch.get_float32_matmul_precision() != "highest" and torch.version.hip is None
    return "tf32x3" if dtype == torch.float32 and three_tf32 else "ieee"


def readable(t: Tensor) -> Tensor:
    """The tensor, or a copy where rows are not contiguous or too far apart for 32-bit offsets."""
    return t if t.stride(-1) == 1 and t.stride(-2) < 1 << 22 else t.contiguous()


def strides(t: Tensor) -> tuple[int, int, int]:
    """Batch, head and row strides of (B, H, N, D); 0 where a dimension has one entry or none."""
    return tuple(s if n > 1 else 0 for s, n in zip(t.stride()[:3], t.shape[:3], strict=True))  # type: ignore[return-value]


def unit_of(*tensors: Tensor) -> int:
    """Elements in 16 bytes if every row of every tensor starts at a multiple of them, else 1."""
    unit = 16 // tensors[0].element_size()
    for t in tensors:
        if t.data_ptr() % 16 or any(s % unit for s in strides(t)):
            return 1
    return unit


def constants(
    name: tuning.Pass, q: Tensor, v: Tensor, scale: float, unit: int
) -> tuple[Constants, Tile]:
    """What a pass is compiled for, and its tile."""
    d, dv = q.shape[-1], v.shape[-1]
    aligned = unit > 1
    tile = tuning.tile(
        tuning.architecture(q.device), q.dtype, max(d, dv), name, aligned=aligned
    )
    return Constants(
        d, dv, *chunks(d), *chunks(dv), tile.BM, tile.BN, unit, tile.tma and aligned,
        scale > 0, precision(q.dtype),
    ), tile  # fmt: skip


def wave(n_rows: int, row_bytes: int, sharers: int) -> int:
    """How many heads are worked on together, `sharers` of which read the same rows."""
    return max(1, tuning.WAVE_BYTES // (n_rows * row_bytes)) * sharers


def on(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which kernels go to the device's own card."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:  # noqa: ARG001
    """Memory for the descriptors that a kernel makes, from torch's allocator."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(kernel: Any, n_programs: int, tile: Tile, *arguments: Any) -> None:
    """Runs a kernel on the current device. All programs are in the grid's first, largest dimension."""
    if tile.tma:
        triton.set_allocator(scratch)
    kernel[(n_programs,)](
        *arguments, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True
    )
