"""Device helpers: tiles of a matrix, products over them, and one step of the online softmax.

A head size that is no power of two is a pair of chunks, 96 = 64 + 32, so that nothing is computed
on padding: every operand and accumulator is a tuple of one or two tiles, its chunks, of widths
W0 and W1 (0 where one chunk is enough).
"""

import math

import triton
import triton.language as tl

from flashpatch_kernels.options import HIDES

LOG2E = tl.constexpr(1.4426950408889634)
# The running maximum's start, in base 2: what is far below it is as hidden as -inf.
LOWEST = tl.constexpr(HIDES * math.log2(math.e))


@triton.jit
def place(pid, n_tiles, n_heads, wave, DESCENDING: tl.constexpr):
    """Which tile of which head a program works on.

    Heads go in waves, so that what they read is still in the cache when the next tile reads it.
    Within a wave the same tile of every head comes first that has most work under a causal mask:
    the last of the queries (DESCENDING), the first of the keys.
    """
    first = (pid // (wave * n_tiles)) * wave
    width = tl.minimum(wave, n_heads - first)
    place_in_wave = pid % (wave * n_tiles)
    tile = place_in_wave // width
    if DESCENDING:
        tile = n_tiles - 1 - tile
    return tile, first + place_in_wave % width


@triton.jit
def matrices(
    base, head_stride, row_stride, n_heads, n_rows,
    ROWS: tl.constexpr, SIZE: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What `load` needs of n_heads matrices [n_rows, SIZE] that are read ROWS rows at a time."""
    if TMA:
        first = tl.make_tensor_descriptor(
            base, [n_heads, n_rows, SIZE], [head_stride, row_stride, 1], [1, ROWS, W0]
        )
        if W1 > 0:
            second = tl.make_tensor_descriptor(
                base, [n_heads, n_rows, SIZE], [head_stride, row_stride, 1], [1, ROWS, W1]
            )
            return (first, second)
        else:
            return (first,)
    else:
        return (base, head_stride, row_stride, n_rows)


@triton.jit
def load_chunk(
    source, head, start, ROWS: tl.constexpr, SIZE: tl.constexpr,
    AT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Columns AT .. AT + WIDTH of `load`'s tile."""
    if TMA:
        descriptor = source[0 if AT == 0 else 1]
        return descriptor.load([head, start, AT]).reshape(ROWS, WIDTH)
    else:
        base, head_stride, row_stride, n_rows = source
        r = tl.arange(0, ROWS)
        c = AT + tl.arange(0, WIDTH)
        at = base + tl.cast(head, tl.int64) * head_stride + tl.cast(start, tl.int64) * row_stride
        at = at + (r[:, None] * row_stride + c[None, :])
        if EDGE and AT + WIDTH > SIZE:
            return tl.load(at, mask=(start + r < n_rows)[:, None] & (c < SIZE)[None, :], other=0.0)
        elif EDGE:
            return tl.load(at, mask=(start + r < n_rows)[:, None], other=0.0)
        elif AT + WIDTH > SIZE:
            return tl.load(at, mask=(c < SIZE)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def load(
    source, head, start, ROWS: tl.constexpr, SIZE: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, TMA: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of one of `matrices`: [ROWS, W0], [ROWS, W1], zero beyond SIZE.

    EDGE says that rows beyond the last may be asked for: they are zero.
    """
    first = load_chunk(source, head, start, ROWS, SIZE, 0, W0, TMA, EDGE)
    if W1 > 0:
        return (first, load_chunk(source, head, start, ROWS, SIZE, W0, W1, TMA, EDGE))
    else:
        return (first,)


@triton.jit
def store_chunk(
    base, row_stride, start, n_rows, x,
    ROWS: tl.constexpr, SIZE: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns AT .. AT + WIDTH of `store`'s tile."""
    r = tl.arange(0, ROWS)
    c = AT + tl.arange(0, WIDTH)
    at = base + tl.cast(start, tl.int64) * row_stride + (r[:, None] * row_stride + c[None, :])
    inside = (start + r < n_rows)[:, None]
    if AT + WIDTH > SIZE:
        inside = inside & (c < SIZE)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store(
    base, row_stride, start, n_rows, x,
    ROWS: tl.constexpr, SIZE: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    """Writes the chunks x as the rows start .. of a matrix [n_rows, SIZE]."""
    store_chunk(base, row_stride, start, n_rows, x[0], ROWS, SIZE, 0, W0)
    if W1 > 0:
        store_chunk(base, row_stride, start, n_rows, x[1], ROWS, SIZE, W0, W1)


@triton.jit
def dot(a, b, acc, C: tl.constexpr):
    """A b + acc, where acc may be None. "upcast" is for the interpreter, which cannot do bf16."""
    if C.PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=C.PRECISION)


@triton.jit
def inner(a, b, C: tl.constexpr):
    """A b^T over the chunks of both: [R, W], [S, W] -> [R, S]."""
    product = dot(a[0], b[0].T, None, C)
    if len(a) > 1:
        product = dot(a[1], b[1].T, product, C)
    return product


@triton.jit
def add_product(acc, p, b, C: tl.constexpr):
    """Acc + p b, chunk by chunk, p rounded to b's type: [R, W], [R, S], [S, W] -> [R, W]."""
    p = p.to(b[0].dtype)
    first = dot(p, b[0], acc[0], C)
    if len(acc) > 1:
        return (first, dot(p, b[1], acc[1], C))
    else:
        return (first,)


@triton.jit
def zeros(ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """The chunks of an empty accumulator."""
    first = tl.zeros([ROWS, W0], tl.float32)
    if W1 > 0:
        return (first, tl.zeros([ROWS, W1], tl.float32))
    else:
        return (first,)


@triton.jit
def column(ROWS: tl.constexpr):
    """A number for each row, 0."""
    return tl.zeros([ROWS], tl.float32)


@triton.jit
def scaled(acc, factor):
    """The chunks times a scalar or a column."""
    if len(acc) > 1:
        return (acc[0] * factor, acc[1] * factor)
    else:
        return (acc[0] * factor,)


@triton.jit
def kept(acc, condition):
    """The chunks where the column `condition` holds, else 0."""
    first = tl.where(condition, acc[0], 0.0)
    if len(acc) > 1:
        return (first, tl.where(condition, acc[1], 0.0))
    else:
        return (first,)


@triton.jit
def softmax_start(sinks, head, ROWS: tl.constexpr):
    """The running maximum and sum before the first key: those of the head's sink, if it has one.

    Without, the maximum starts at a finite number below that of any key that is seen, not at -inf,
    so that a row that sees nothing never meets -inf - (-inf): its weights are 2^(-inf) = 0 and its
    sum stays 0.
    """
    m = tl.full([ROWS], LOWEST, tl.float32)
    l = tl.full([ROWS], 0.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        m = tl.maximum(m, sink)
        l = tl.math.exp2(sink - m)
    return m, l


@triton.jit
def softmax_step(s, m, l, to_log2):
    """The weights of one tile of scores, and the running maximum and sum with them.

    All in base 2: p = 2^(s * to_log2 - m); the factor is positive and costs nothing. Masked scores
    are -inf.

    Returns:
        p [BM, BN], m [BM], l [BM], and the factor [BM] that rescales what was accumulated.

    Source: Dao, FlashAttention-2 (2023), Algorithm 1, lines 9 and 10.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * to_log2)
    p = tl.math.exp2(s * to_log2 - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    return p, m_new, l * alpha + tl.sum(p, 1), alpha
