"""What Hopper kernels add to scores beside slopes: a bias of keys, and a table's (see `table`).

A bias of keys is a number for each key of a tile. Where keys are the columns of tiles, a thread has
use for a quarter of the numbers: who reads the keys reads them too, once, and hands them on beside
the keys. Where they are the rows, a thread has use for two, and reads them itself.

Where nothing else is done to products, scores are products (C.PLAIN), and biases are added in their
unit: products of a tile begin with what a table has for it, and with the biases of its keys where
these are its columns. Where they are its rows, what exponents are relative to has those in it.

`bias` is (that of keys in float32, the strides of its batch and heads, a table's quads in that
unit, the unit), None for what there is not; `score` as in `triton.scores`, where a table's row is
that of its quads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashpatch_kernels.hopper import crews, table
from flashpatch_kernels.hopper.gluon import gl, jit
from flashpatch_kernels.hopper.products import start_inner
from flashpatch_kernels.hopper.rings import put_numbers
from flashpatch_kernels.triton import setups, terms
from flashpatch_kernels.triton.plans import Steps


@jit
def of_keys(bias, batch, head, start, n_keys, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """The biases of the keys from `start` on, [KEYS]; 0 beyond the last."""
    base, batch_stride, head_stride, _table, _unit = bias
    j = start + gl.arange(0, KEYS, LAYOUT)
    at = base + batch.to(gl.int64) * batch_stride + head.to(gl.int64) * head_stride
    return gl.load(at + j, mask=j < n_keys, other=0.0)


@jit
def of_columns(bias, batch, head, start, n_keys, C: gl.constexpr):
    """As `of_keys`, of a tile of keys and beside products, for who reads it; nothing without."""
    if bias[0] is not None:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        return (of_keys(bias, batch, head, start, n_keys, C.BN, layout) * bias[4],)
    else:
        return ()


@jit
def of_rows(bias, batch, head, start, n_keys, S: gl.constexpr, C: gl.constexpr):
    """As `of_keys`, of the R keys that are the rows of tiles of layout S: [R, 1]."""
    if bias[0] is not None:
        column = of_keys(bias, batch, head, start, n_keys, C.R, gl.SliceLayout(1, S))
        return (gl.expand_dims(column, 1),)
    else:
        return ()


@jit
def room(bias, C: gl.constexpr):
    """Memory for the biases of tiles of keys, [SLOTS, BN]; nothing without a bias."""
    if bias is None:
        return ()
    else:
        row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        return (gl.allocate_shared_memory(gl.float32, [C.SLOTS, C.BN], row),)


@jit
def put(keys, beside_keys, number, x, C: gl.constexpr):
    """Writes the biases of a tile of a ring of keys beside it, if there are any."""
    if len(beside_keys) > 0:
        put_numbers(keys, beside_keys[0], number, x[0], C.SLOTS)


@jit
def taken(beside_keys, number, S: gl.constexpr, C: gl.constexpr):
    """The biases [BN] of a tile of keys that is known to be there; nothing without them."""
    if len(beside_keys) > 0:
        return (beside_keys[0].index(number % C.SLOTS).load(gl.SliceLayout(0, S)),)
    else:
        return ()


@jit
def start_scores(a, b, COLUMNS: gl.constexpr, of_keys, entries, C: gl.constexpr):
    """Issues A B^T of queries and keys in either order: [R, D], [COLUMNS, D] -> [R, COLUMNS].

    It begins with biases [COLUMNS] of keys and what `table.begin` gave, if there are any.
    """
    if len(entries) > 0:
        begin = entries[0]
        if len(of_keys) > 0:
            begin = begin + gl.expand_dims(of_keys[0], 0)
        return start_inner(a, b, COLUMNS, C, begin)
    elif C.PLAIN and len(of_keys) > 0:
        return start_inner(a, b, COLUMNS, C, of_keys[0])
    else:
        return start_inner(a, b, COLUMNS, C)


@jit
def as_row(of_keys):
    """Biases [BN] of keys as [1, BN], if there are any."""
    if len(of_keys) > 0:
        return (gl.expand_dims(of_keys[0], 0),)
    else:
        return ()


class Added(NamedTuple):
    """What is added to the scores of a call, for tiles of both orientations.

    Attributes:
        composed: The terms that kernels are composed of: slopes.
        bias: That of keys, in float32, or None.
        tables: Quads of a table for tiles [queries, keys] and for tiles [keys, queries]; None for
            those that nobody reads.
        unit: What biases are multiplied by beside products; quads have it in them.
        numbers: As in `terms.Terms`, without vectors by distance.
    """

    composed: terms.Composed
    bias: Tensor | None
    tables: tuple[Tensor | None, Tensor | None]
    unit: float
    numbers: tuple[int, ...]


def added_of(call: setups.Setup, steps: Steps, *, of_queries: bool, of_keys: bool) -> Added:
    """What is added to the scores of a call, for tiles [queries, keys], [keys, queries] or both."""
    o = call.options
    unit = 1 / o.scale if crews.plain(call) else 1.0
    slopes = [] if o.slopes is None else [terms.slopes_term(o.slopes)]
    strides, ends, row, tables, bias = [0, 0, 0], (0, 0), 0, (None, None), o.bias
    if o.table is not None:
        row, ends = table.row(o.table), (call.first, call.first + o.table.shape[1] - 1)
        tables = tuple(
            table.quads_of(steps, o.table, unit, reverse=reverse) if wanted else None
            for reverse, wanted in ((False, of_queries), (True, of_keys))
        )
    if bias is not None:
        if bias.dtype != torch.float32 or bias.stride(-1) != 1:
            bias = steps.copied(bias, torch.float32)
        strides = setups.strides(bias)
    numbers = (*strides, 1, row, *ends, call.origin)
    return Added(terms.Composed.of(slopes), bias, tables, unit, numbers)
