"""What the caller of `attention` passes, checked: each error names the offending value.

From arguments to the records that engines take. Kept apart from the operators, which trust them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flashpatch_kernels import masks
from flashpatch_kernels.engines import ENGINES, REFERENCE, Call, computing_dtype, why_not
from flashpatch_kernels.masks import Band, Boolean, Intervals, Mask
from flashpatch_kernels.options import Relative, Score


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v are tensors whose shapes, dtypes and devices fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (B, H, N, D), not shape {size(x)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating point dtype, not {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
        if x.dtype != q.dtype and computing_dtype(x) != computing_dtype(q):
            raise TypeError(f"{name} is {x.dtype}, q is {q.dtype}")
    batch, heads, _, head_size = q.shape
    k_batch, kv_heads, n_keys, k_size = k.shape
    v_batch, v_heads, n_values, value_size = v.shape
    if not batch == k_batch == v_batch:
        raise ValueError(f"q, k and v differ in batch: {size(q)}, {size(k)}, {size(v)}")
    if kv_heads != v_heads or n_keys != n_values:
        raise ValueError(f"k and v differ in heads or length: {size(k)}, {size(v)}")
    if head_size != k_size:
        raise ValueError(f"q and k differ in head size: {size(q)}, {size(k)}")
    if 0 in (head_size, value_size):
        raise ValueError(f"a head size is 0: {size(q)}, {size(v)}")
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")


def to_mask(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
    mask: Tensor | Mask | None,
) -> Mask:
    """The intersection of causal, window and mask."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    band = to_band(n_queries, n_keys, causal=causal, window=window)
    if mask is None:
        return band
    return masks.intersect(band, given_mask(mask, q, n_keys), n_queries, n_keys, q.device)


def to_band(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
) -> Band:
    """The band of `causal` and `window`."""
    left, right = to_sides(causal=causal, window=window)
    offset = n_keys - n_queries
    # A limit that hides nothing is none: one query at the end is not causal but full.
    if right is not None and right >= n_queries - 1:
        right = None
    if left is not None and left >= n_keys - 1:
        left = None
    return Band() if left is None and right is None else Band(left, right, offset)


def to_sides(
    *, causal: bool, window: int | tuple[int | None, int | None] | None
) -> tuple[int | None, int | None]:
    """How many keys before a query and after it are seen, None without a limit."""
    left = right = None
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(f"window must be at least 1 key, not {window}")
        left = right = window - 1
    elif isinstance(window, tuple) and len(window) == 2:
        left, right = window
        for side in window:
            if side is not None and (not isinstance(side, int) or side < 0):
                raise ValueError(f"a side of window is None or at least 0, not {side!r}")
    elif window is not None:
        raise TypeError(f"window must be an int or a pair, not {window!r}")
    if causal:
        right = 0
    return left, right


def given_mask(mask: Tensor | Mask, q: Tensor, n_keys: int) -> Mask:
    """The mask as a record whose shapes fit."""
    batch, heads, n_queries, _ = q.shape
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool and mask.dim() == 2:
            check_shape("mask", mask, (batch, n_keys), broadcast=(0,))
            check_device("mask", mask, q)
            return masks.key_mask(mask)
        if mask.dtype == torch.bool and mask.dim() == 4:
            mask = Boolean(mask)
        elif mask.dtype == torch.int32 and mask.dim() == 3:
            mask = Intervals(mask)
        elif mask.dtype not in (torch.bool, torch.int32):
            raise TypeError(f"mask must be bool or int32, not {mask.dtype}; scores go in `bias`")
        else:
            raise ValueError(
                "mask must be bool [B|1, M], bool [B|1, H|1, N|1, M] or int32 [B|1, N|1, 2], "
                f"not {mask.dtype} of shape {size(mask)}"
            )
    if isinstance(mask, Boolean):
        check_dtype("mask", mask.allowed, torch.bool)
        check_shape("mask", mask.allowed, (batch, heads, n_queries, n_keys), broadcast=(0, 1, 2))
        check_device("mask", mask.allowed, q)
        return mask
    if isinstance(mask, Intervals):
        check_dtype("mask", mask.bounds, torch.int32)
        check_shape("mask", mask.bounds, (batch, n_queries, 2), broadcast=(0, 1))
        check_device("mask", mask.bounds, q)
        if mask.runs is not None:
            check_dtype("mask's runs", mask.runs, torch.int32)
            check_shape("mask's runs", mask.runs, (batch, n_keys), broadcast=(0,))
            check_device("mask's runs", mask.runs, q)
        return Intervals(mask.bounds.clamp(0, n_keys), mask.runs)
    if isinstance(mask, Band):
        return mask
    raise TypeError(f"mask must be a tensor or a mask record, not {type(mask).__name__}")


def to_scale(scale: float | None, head_size: int) -> float:
    """The factor on the products."""
    if scale is None:
        return head_size**-0.5
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, not {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    return float(scale)


def to_softcap(softcap: float | None) -> float | None:
    """The bound on the scores."""
    if softcap is None:
        return None
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a number or None, not {softcap!r}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, not {softcap}")
    return float(softcap)


def to_dropout(dropout: float) -> float:
    """The probability that a weight is dropped."""
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool):
        raise TypeError(f"dropout must be a number, not {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    return float(dropout)


def new_seed(device: torch.device) -> Tensor:
    """A seed of torch's generator, which checkpoint rewinds before it computes again."""
    return torch.randint(-(2**62), 2**62, (1,), dtype=torch.int64, device=device)


def to_term(
    name: str, x: Tensor | None, shape: Sequence[int], q: Tensor, broadcast: tuple[int, ...] = ()
) -> Tensor | None:
    """A tensor that is added to scores, of a floating point dtype and this shape."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a floating point dtype, not {x.dtype}")
    # Without queries and keys there is no distance at all.
    check_shape(name, x, tuple(max(n, 0) for n in shape), broadcast)
    check_device(name, x, q)
    return x


def to_table(
    table: Tensor | None, first: int | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, int | None]:
    """The table, and the distance of its entry 0 where that is not the least one."""
    if table is first is None:
        return None, None
    if first is None:
        return to_term("table", table, (q.shape[1], q.shape[2] + k.shape[2] - 1), q), None
    if not isinstance(first, int) or isinstance(first, bool):
        raise TypeError(f"first must be an int or None, not {first!r}")
    if table is None:
        raise ValueError(f"first={first} says where a table begins, and there is no table")
    entries = table.shape[-1] if isinstance(table, Tensor) and table.dim() == 2 else 1
    if entries == 0:
        raise ValueError(f"table must have at least one distance, not shape {size(table)}")
    return to_term("table", table, (q.shape[1], entries), q), first


def to_relative(
    name: str, relative: Relative | None, rows: Tensor | None, width: int | None, q: Tensor
) -> Relative | None:
    """A record of vectors by distance.

    Args:
        rows: Queries or keys, which the record's vectors stand beside; None if it has none.
        width: Elements of a vector; None if that is up to the record.
    """
    if relative is None:
        return None
    if not isinstance(relative, Relative):
        raise TypeError(f"{name} must be a Relative, not {type(relative).__name__}")
    embeddings, vectors = relative.embeddings, relative.vectors
    if not isinstance(relative.first, int) or isinstance(relative.first, bool):
        raise TypeError(f"first of {name} must be an int, not {relative.first!r}")
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 3 or 0 in embeddings.shape[1:]:
        shape = size(embeddings) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise ValueError(f"embeddings of {name} must have shape (heads or 1, T, E), not {shape}")
    width = embeddings.shape[2] if width is None else width
    shape = (q.shape[1], embeddings.shape[1], width)
    to_term(f"embeddings of {name}", embeddings, shape, q, broadcast=(0,))
    if rows is None:
        if vectors is not None:
            raise ValueError(f"{name} takes no vectors: the weights stand in their place")
    else:
        if vectors is None:
            raise ValueError(f"{name} needs the vectors that its embeddings are multiplied by")
        to_term(f"vectors of {name}", vectors, (*q.shape[:2], rows.shape[2], width), q)
    return relative


def to_score(score: Score | None, q: Tensor) -> Score | None:
    """A user's function, with tensors that its device can read."""
    if score is None:
        return None
    if not isinstance(score, Score):
        raise TypeError(f"score must be a Score, not {type(score).__name__}")
    for x in score.arguments:
        if not isinstance(x, Tensor):
            raise TypeError(f"arguments of score must be tensors, not {type(x).__name__}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("an argument of score gets no gradient: pass it detached")
        check_device("an argument of score", x, q)
    return score


def named(engine: str, call: Call) -> str:
    """The engine's name, after asking whether it can serve the call."""
    for candidate in (*ENGINES, REFERENCE):
        if candidate.name == engine:
            reason = why_not(candidate, call)
            if reason is not None:
                raise ValueError(f"engine {engine!r} cannot serve this call: {reason}")
            return engine
    names = ", ".join(candidate.name for candidate in (*ENGINES, REFERENCE))
    raise ValueError(f"engine must be one of {names}, not {engine!r}")


def check_shape(
    name: str, x: Tensor, shape: tuple[int, ...], broadcast: tuple[int, ...] = ()
) -> None:
    """Raises unless x has this shape, or 1 in a dimension of `broadcast`."""
    fits = x.dim() == len(shape) and all(
        n == wanted or (n == 1 and at in broadcast)
        for at, (n, wanted) in enumerate(zip(x.shape, shape, strict=True))
    )
    if not fits:
        words = [f"{n} or 1" if at in broadcast else str(n) for at, n in enumerate(shape)]
        raise ValueError(f"{name} must have shape ({', '.join(words)}), not {size(x)}")


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raises unless x is of this dtype."""
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {x.dtype}")


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    """Raises unless x is where q is."""
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}")


def size(x: Tensor) -> tuple[int, ...]:
    """The shape as people read it."""
    return tuple(x.shape)
