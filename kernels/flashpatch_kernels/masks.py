"""Who sees whom: the three kinds of mask an attention call may ask for.

Nearly every mask of transformers lets query i see a contiguous run of keys [lo_i, hi_i). A `Band`
says so in two numbers, `Intervals` in one int32 tensor of O(N) memory; `Boolean` is for the rest.

Letters: B batch, H query heads, N queries, M keys.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """Query i stands at key position p = i + offset and sees keys p - left .. p + right.

    None means no limit on that side: `Band()` is full attention, `Band(right=0)` causal,
    `Band(left=w - 1, right=0)` a causal window of w keys.
    """

    left: int | None = None
    right: int | None = None
    offset: int = 0


@dataclass(frozen=True)
class Intervals:
    """Query i sees the keys j with lo_i <= j < hi_i that are not hidden.

    Attributes:
        bounds: int32 [B|1, N|1, 2], (lo, hi) of each query, within 0..M. lo >= hi sees nothing.
        runs: int32 [B|1, M] or None. For a visible key, the end of the run of visible keys it
            belongs to; 0 for a key hidden from every query (padding). None: no key is hidden. A
            tile that starts at key n is wholly visible when runs[n] reaches its end.
    """

    bounds: Tensor
    runs: Tensor | None = None


@dataclass(frozen=True)
class Boolean:
    """Query i sees key j where `allowed` is true: bool [B|1, H|1, N|1, M]."""

    allowed: Tensor


Mask = Band | Intervals | Boolean

_NO_LIMIT = None, None, 0


def parts(
    mask: Mask,
) -> tuple[tuple[int | None, int | None, int], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """What tells masks apart: left, right and offset; bounds, runs and what is allowed.

    The numbers are those of a band without limits, and tensors None, where a mask has none.
    """
    if isinstance(mask, Band):
        return (mask.left, mask.right, mask.offset), (None, None, None)
    if isinstance(mask, Intervals):
        return _NO_LIMIT, (mask.bounds, mask.runs, None)
    return _NO_LIMIT, (None, None, mask.allowed)


def band_bounds(band: Band, n_queries: int, n_keys: int, device: torch.device | str) -> Tensor:
    """The intervals of a band: int32 [1, N, 2]."""
    p = torch.arange(n_queries, dtype=torch.int32, device=device) + band.offset
    lo = torch.zeros_like(p) if band.left is None else p - band.left
    hi = torch.full_like(p, n_keys) if band.right is None else p + (band.right + 1)
    return torch.stack((lo, hi), dim=-1).clamp(0, n_keys)[None]


def runs_of(visible: Tensor) -> Tensor:
    """Ends of the runs of visible keys: bool [B, M] -> int32 [B, M], 0 where hidden."""
    n_keys = visible.shape[-1]
    j = torch.arange(n_keys, dtype=torch.int32, device=visible.device)
    hidden_at = torch.where(visible, n_keys, j)  # [B, M]
    next_hidden = hidden_at.flip(-1).cummin(-1).values.flip(-1)
    return torch.where(visible, next_hidden, 0).to(torch.int32)


def key_mask(visible: Tensor) -> Intervals:
    """The mask of padded keys, bool [B, M] with True = real; holes are exact.

    Bounds are tight (first to last visible key), so that whole tiles of padding are skipped.
    """
    n_keys = visible.shape[-1]
    j = torch.arange(n_keys, dtype=torch.int32, device=visible.device)
    lo = torch.where(visible, j, n_keys).amin(-1) if n_keys else j.new_zeros(visible.shape[0])
    hi = torch.where(visible, j + 1, 0).amax(-1) if n_keys else j.new_zeros(visible.shape[0])
    bounds = torch.stack((lo.minimum(hi), hi), dim=-1).to(torch.int32)
    return Intervals(bounds[:, None], runs_of(visible))


def documents(ids: Tensor) -> Intervals:
    """Packed documents: a query sees its own document's run of equal `ids`, int [B, N]."""
    n = ids.shape[-1]
    j = torch.arange(n, dtype=torch.int32, device=ids.device)
    change = ids[:, 1:] != ids[:, :-1]
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    starts = torch.cat((edge, change), dim=-1)
    ends = torch.cat((change, edge), dim=-1)
    lo = torch.where(starts, j, 0).cummax(-1).values
    hi = torch.where(ends, j + 1, n).flip(-1).cummin(-1).values.flip(-1)
    return Intervals(torch.stack((lo, hi), dim=-1).to(torch.int32))


def cu_seqlens(cumulative: Tensor, n: int) -> Intervals:
    """Packed documents from their cumulative lengths, int [documents + 1], for n tokens in one row.

    Tokens beyond the last length form a document of their own.
    """
    j = torch.arange(n, dtype=cumulative.dtype, device=cumulative.device)
    return documents(torch.searchsorted(cumulative.contiguous(), j, right=True)[None])


def varlen(
    queries: Tensor, keys: Tensor, n: int, left: int | None = None, right: int | None = None
) -> Intervals:
    """Documents of queries and of keys, from their cumulative lengths, int [documents + 1] each.

    Query i of n sees its document's keys p - left .. p + right, where p is its own position if the
    last query of a document stands at its last key. One outside of all documents sees nothing.
    """
    i = torch.arange(n, dtype=queries.dtype, device=queries.device)
    after = torch.searchsorted(queries.contiguous(), i, right=True)
    document = (after - 1).clamp(0, queries.shape[0] - 2)
    start, end = keys[document], keys[document + 1]
    p = i - queries[document + 1] + end
    lo = start if left is None else start.maximum(p - left)
    hi = end if right is None else end.minimum(p + right + 1)
    inside = (after > 0) & (after < queries.shape[0])
    bounds = torch.stack((lo, hi.maximum(lo)), dim=-1)
    return Intervals(torch.where(inside[:, None], bounds, 0).to(torch.int32)[None])


def intersect(a: Mask, b: Mask, n_queries: int, n_keys: int, device: torch.device | str) -> Mask:
    """The mask that allows what both allow."""
    if a == Band():
        return b
    if b == Band():
        return a
    a, b = (_of_keys(m) for m in (a, b))
    if isinstance(a, Boolean) or isinstance(b, Boolean):
        return Boolean(
            allowed(a, n_queries, n_keys, device) & allowed(b, n_queries, n_keys, device)
        )
    x, y = (
        Intervals(band_bounds(m, n_queries, n_keys, device)) if isinstance(m, Band) else m
        for m in (a, b)
    )
    lo = torch.maximum(x.bounds[..., 0], y.bounds[..., 0])
    hi = torch.minimum(x.bounds[..., 1], y.bounds[..., 1])
    runs = x.runs if y.runs is None else y.runs
    if x.runs is not None and y.runs is not None:
        runs = runs_of((x.runs > 0) & (y.runs > 0))
    return Intervals(torch.stack((lo, hi), dim=-1), runs)


def _of_keys(mask: Mask) -> Mask:
    """A boolean mask of keys alone as intervals, which stay of O(N) memory; others as they are."""
    if isinstance(mask, Boolean) and mask.allowed.shape[1:3] == (1, 1):
        return key_mask(mask.allowed[:, 0, 0])
    return mask


def allowed(mask: Mask, n_queries: int, n_keys: int, device: torch.device | str) -> Tensor:
    """The mask as bool [B|1, H|1, N|1, M]: what the compact forms mean, for N x M memory."""
    if isinstance(mask, Boolean):
        return mask.allowed
    if isinstance(mask, Band):
        return allowed(
            Intervals(band_bounds(mask, n_queries, n_keys, device)), n_queries, n_keys, device
        )
    j = torch.arange(n_keys, dtype=torch.int32, device=device)
    lo, hi = mask.bounds[:, None, :, :, None].unbind(-2)  # [B|1, 1, N|1, 1]
    seen = (lo <= j) & (j < hi)
    if mask.runs is not None:
        seen = seen & (mask.runs > 0)[:, None, None]
    return seen


def rows(mask: Mask, start: int, stop: int) -> Mask:
    """The mask of queries start..stop alone, as if they were the only ones."""
    if isinstance(mask, Band):
        return replace(mask, offset=mask.offset + start)
    if isinstance(mask, Boolean):
        one = mask.allowed.shape[-2] == 1
        return mask if one else Boolean(mask.allowed[..., start:stop, :])
    one = mask.bounds.shape[1] == 1
    return mask if one else replace(mask, bounds=mask.bounds[:, start:stop])
