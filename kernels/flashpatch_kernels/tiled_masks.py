"""Masks, for engine `tiled`: which keys a tile of queries visits, and which of them are hidden."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask, band_bounds


@dataclass(frozen=True)
class Rows:
    """A tile of queries, i0..i1, and its keys: start..stop, all visible in clear_from..clear_to."""

    i0: int
    i1: int
    start: int
    stop: int
    clear_from: int
    clear_to: int


class TileMask:
    """The mask of the heads of one batch row, as what a tile asks of it."""

    def __init__(self, mask: Mask, n_queries: int, n_keys: int, device: torch.device) -> None:
        self.n_keys, self.readable = n_keys, device.type == "cpu"
        self.band = mask if isinstance(mask, Band) else None
        self.allowed = mask.allowed if isinstance(mask, Boolean) else None  # [H|1, N|1, M]
        self.lo = self.hi = self.hidden = None
        if isinstance(mask, Intervals):
            self.lo, self.hi = mask.bounds.expand(n_queries, 2).unbind(-1)  # [N]
            self.hidden = None if mask.runs is None else mask.runs <= 0  # [M]
        elif isinstance(mask, Band) and mask != Band():
            self.lo, self.hi = band_bounds(mask, n_queries, n_keys, device)[0].unbind(-1)

    def rows(self, i0: int, i1: int) -> Rows:
        """The tile of these queries. Masks are read on a CPU only: a device would have to wait."""
        M = self.n_keys
        if self.band is not None:
            return self._band_rows(self.band, i0, i1)
        if not self.readable:
            return Rows(i0, i1, 0, M, M, 0)
        if self.allowed is not None:
            tile = self.allowed if self.allowed.shape[1] == 1 else self.allowed[:, i0:i1]
            visited = tile.any(0).any(0).nonzero()
            if not len(visited):
                return Rows(i0, i1, 0, 0, 0, 0)
            start, stop = int(visited[0]), int(visited[-1]) + 1
            clear = bool(tile[..., start:stop].all())
            return Rows(i0, i1, start, stop, *((start, stop) if clear else (M, 0)))
        assert self.lo is not None
        assert self.hi is not None
        lo, hi = self.lo[i0:i1], self.hi[i0:i1]
        some = lo < hi
        start = int(torch.where(some, lo, M).amin())
        stop = int(torch.where(some, hi, 0).amax())
        return Rows(i0, i1, start, stop, int(lo.amax()), int(hi.amin()))

    def _band_rows(self, band: Band, i0: int, i1: int) -> Rows:
        first, last, M = i0 + band.offset, i1 - 1 + band.offset, self.n_keys
        lows = (0, 0) if band.left is None else (first - band.left, last - band.left)
        highs = (M, M) if band.right is None else (last + band.right + 1, first + band.right + 1)
        start, clear_from, stop, clear_to = (min(max(j, 0), M) for j in (*lows, *highs))
        return Rows(i0, i1, start, stop, clear_from, clear_to)

    def hide(self, S: Tensor, rows: Rows, j0: int, j1: int, *, backwards: bool) -> None:
        """Adds -inf to the scores [C G, R, W] of keys that a query does not see."""
        if self.allowed is not None:
            if j0 < rows.clear_from or rows.clear_to < j1:
                tile = (
                    self.allowed
                    if self.allowed.shape[1] == 1
                    else self.allowed[:, rows.i0 : rows.i1]
                )
                forbidden = _forbid(tile[..., j0:j1], S)
                S.add_(forbidden.flip(1) if backwards else forbidden)
            return
        if self.lo is not None and self.hi is not None:
            lo, hi = (x[rows.i0 : rows.i1, None] for x in (self.lo, self.hi))  # [R, 1]
            # The edges of the tile: keys that some of its rows do not see.
            left, right = min(max(j0, rows.clear_from), j1), max(min(j1, rows.clear_to), j0)
            for a, b in ((j0, left), (right, j1)) if left < right else ((j0, j1),):
                if a < b:
                    j = torch.arange(a, b, dtype=lo.dtype, device=lo.device)
                    forbidden = _forbid((lo <= j) & (j < hi), S)
                    S[..., a - j0 : b - j0].add_(forbidden.flip(0) if backwards else forbidden)
        if self.hidden is not None:
            S.add_(_forbid(~self.hidden[j0:j1], S))


def _forbid(seen: Tensor, S: Tensor) -> Tensor:
    """0 where `seen`, -inf elsewhere."""
    return S.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
