"""A bias of pairs, bias[b, h, i, j], and one of keys, bias[b, h, 0, j], on the device."""

import triton
import triton.language as tl


@triton.jit
def of_head(score, head, base):
    """The bias of a head: a pointer to its row 0."""
    at = tl.cast(score[2], tl.int64) * score[7] + tl.cast(head, tl.int64) * score[8]
    return base + at


@triton.jit
def open(score, head, start, pointers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bias as it is, for loads by pointers."""
    return pointers[0]


@triton.jit
def add_keys(s, i, j, m, n, head, score, source):
    """The bias of a key, for tiles of either orientation."""
    return s + tl.load(of_head(score, head, source) + j).to(tl.float32)


@triton.jit
def add_keys_once(s, i, j, m, n, head, score, source):
    """As `add_keys`, on NVIDIA's cards, of float32.

    Each number is loaded by one thread and passed on, where Triton would have every thread load all
    that it needs, which takes more registers than there are. It cannot see through the assembly.
    """
    at = of_head(score, head, source) + tl.reshape(j, (j.shape[0] * j.shape[1],))
    one = tl.inline_asm_elementwise(
        "mov.f32 $0, $1;", "=f,f", [tl.load(at)], dtype=tl.float32, is_pure=False, pack=1
    )
    return s + tl.reshape(one, (j.shape[0], j.shape[1]))


@triton.jit
def open_rows(score, head, start, pointers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The biases of the keys that are a program's rows, where its heads share them: [ROWS, 1]."""
    j = tl.minimum(start + tl.arange(0, ROWS), score[6] - 1)
    return tl.load(of_head(score, head, pointers[0]) + j).to(tl.float32)[:, None]


@triton.jit
def add_rows(s, i, j, m, n, head, score, source):
    """The bias of a key, for tiles [keys, queries] of one tile of keys."""
    return s + source


@triton.jit
def add_pairs(s, i, j, m, n, head, score, source):
    """The bias of a pair, for tiles of either orientation."""
    at = of_head(score, head, source) + (i.to(tl.int64) * score[9] + j)
    return s + tl.load(at).to(tl.float32)


@triton.jit
def descriptor(score, base, n_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bias as Hopper's copy engine reads it, ROWS rows and COLUMNS keys at a time."""
    row = tl.cast(score[9], tl.int64) * 8
    # A dimension that is shared is never stepped along: any stride will do.
    batch = tl.where(score[7] == 0, 8, tl.cast(score[7], tl.int64) * 8)
    head = tl.where(score[8] == 0, 8, tl.cast(score[8], tl.int64) * 8)
    return tl.make_tensor_descriptor(
        base, [score[3], score[4], n_rows, score[6]], [batch, head, tl.maximum(row, 8), 1],
        [1, 1, ROWS, COLUMNS],
    )  # fmt: skip


@triton.jit
def tile(m, n, head, score, source, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows m .. and keys n .. of a head's bias, [ROWS, COLUMNS]; zero beyond the last."""
    batch = tl.where(score[7] == 0, 0, score[2])
    h = tl.where(score[8] == 0, 0, tl.cast(head, tl.int32))
    return source.load([batch, h, m, n]).reshape(ROWS, COLUMNS).to(tl.float32)


@triton.jit
def open_tiles(score, head, start, pointers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A bias of pairs, for tiles [queries, keys]."""
    return descriptor(score, pointers[0], score[5], ROWS, COLUMNS)


@triton.jit
def add_tiles(s, i, j, m, n, head, score, source):
    """The bias of a pair, for tiles [queries, keys]."""
    return s + tile(m, n, head, score, source, s.shape[0], s.shape[1])


@triton.jit
def open_tiles_transposed(score, head, start, pointers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A bias of pairs, for tiles [keys, queries]."""
    return descriptor(score, pointers[0], score[5], COLUMNS, ROWS)


@triton.jit
def add_tiles_transposed(s, i, j, m, n, head, score, source):
    """The bias of a pair, for tiles [keys, queries]."""
    return s + tile(m, n, head, score, source, s.shape[1], s.shape[0]).T
