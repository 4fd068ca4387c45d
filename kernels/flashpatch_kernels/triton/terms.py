"""The terms of a call, from its options to what kernels are composed of."""

import hashlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import launching, scores
from flashpatch_kernels.triton.compiling import kernel
from flashpatch_kernels.triton.tiles import LOWEST
from flashpatch_kernels.tuning import Tile

# Entries that copies of a table have on either side of it, for tiles that reach beyond the ends.
BEYOND = 128


class Terms(NamedTuple):
    """What is added to the scores, as kernels take it.

    Attributes:
        functions: Device functions for tiles [queries, keys].
        pointers: The tensors of each.
        transposed: Functions for tiles [keys, queries].
        transposed_pointers: The tensors of each.
        numbers: bias_batch, bias_head, bias_row, table_row, as kernels take them.
    """

    functions: tuple[Any, ...]
    pointers: tuple[tuple[Tensor, ...], ...]
    transposed: tuple[Any, ...]
    transposed_pointers: tuple[tuple[Tensor, ...], ...]
    numbers: tuple[int, ...]

    @property
    def code(self) -> str:
        """Tells functions of one name apart, of which Triton's cache on disk knows the names."""
        return _code(*self.functions, *self.transposed)


@lru_cache
def _code(*functions: Any) -> str:
    keys = "".join(getattr(function, "cache_key", "") for function in functions)
    return hashlib.sha256(keys.encode()).hexdigest()[:16]


def terms_of(options: Options, n_queries: int, n_keys: int, dtype: torch.dtype) -> Terms:
    """The terms of a call of N queries and M keys."""
    terms: list[tuple[Any, Tensor]] = []
    transposed: list[tuple[Any, Tensor]] = []
    bias_strides, table_row = [0, 0, 0], 0
    if options.table is not None:
        copies, reversed_copies = table_copies(options.table, n_queries, n_keys, dtype)
        terms.append((scores.add_table, copies[..., _middle(n_queries) :]))
        transposed.append((scores.add_table_transposed, reversed_copies[..., _middle(n_keys) :]))
        table_row = copies.shape[-1]
    if options.bias is not None:
        bias = options.bias
        bias = bias if bias.stride(-1) == 1 or n_keys == 1 else bias.contiguous()
        add = scores.add_key_bias if bias.shape[2] == 1 else scores.add_bias
        terms.append((add, bias))
        transposed.append((add, bias))
        bias_strides = launching.strides(bias)
    return Terms(
        tuple(function for function, _ in terms),
        tuple((tensor,) for _, tensor in terms),
        tuple(function for function, _ in transposed),
        tuple((tensor,) for _, tensor in transposed),
        (*bias_strides, table_row),
    )


def _middle(n: int) -> int:
    """Where in a copy of the table the distance 0 of n rows lies, a multiple of 8."""
    return (n + BEYOND + 7) // 8 * 8


def table_copies(
    table: Tensor, n_queries: int, n_keys: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Eight shifted copies of a table [H, N + M - 1], and eight of it reversed: [H, 8, row] each.

    In half precision beside half precision: what that loses is less than what the weights lose.
    """
    n_heads, row = table.shape[0], _middle(n_queries) + _middle(n_keys) + 8
    kind = torch.float32 if dtype == torch.float32 else torch.float16
    copies = table.new_empty((2, n_heads, 8, row), dtype=kind)
    tile = Tile(8, 1024, 4, 1)
    launching.launch(
        copies_kernel,
        2 * n_heads * triton.cdiv(row, tile.BN),
        tile,
        *(table.contiguous(), copies, n_heads, n_queries, n_keys, row),
        *(_middle(n_queries), _middle(n_keys), kind == torch.float16, tile.BN),
    )
    return copies[0], copies[1]


@kernel
def copies_kernel(
    TABLE, COPIES, n_heads, n_queries, n_keys, row, middle_queries, middle_keys,
    HALF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A part of the copies of one head; entry y of copy r is the distance y - middle - r.

    Those of the reversed table, which come second, hold the distance r + middle - y.
    """
    n_parts = tl.cdiv(row, BN)
    which = tl.program_id(0) // n_parts  # the head, then the head of the reversed table
    y = (tl.program_id(0) % n_parts) * BN + tl.arange(0, BN)[None, :]
    r = tl.arange(0, 8)[:, None]
    distance = y - middle_queries - r
    if which >= n_heads:
        distance = r + middle_keys - y
    at = tl.minimum(tl.maximum(distance + (n_queries - 1), 0), n_queries + n_keys - 2)
    head = tl.cast(which % n_heads, tl.int64)
    x = tl.load(TABLE + head * (n_queries + n_keys - 1) + at).to(tl.float32)
    if HALF:
        # Beyond the range of half precision a bias stays finite, unless it hides its keys.
        x = tl.where(x < LOWEST, float("-inf"), tl.minimum(tl.maximum(x, -65504.0), 65504.0))
    to = COPIES + tl.cast(which, tl.int64) * 8 * row + (r * row + y)
    tl.store(to, x.to(COPIES.dtype.element_ty), mask=y < row)
