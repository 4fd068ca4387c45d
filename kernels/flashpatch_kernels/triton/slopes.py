"""ALiBi on the device: a slope per head times how far a key lies from its query."""

import triton
import triton.language as tl


@triton.jit
def open(score, head, start, pointers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The slopes."""
    return pointers[0]


@triton.jit
def away(i, j, score):
    """How far the keys j lie from the queries i; exact up to 2^23.

    A float32 with the bits of 2^23 + j, without the conversion, which is as slow as an exponential.
    """
    key = (j + 0x4B000000).to(tl.float32, bitcast=True)
    return tl.abs(((i + score[14]).to(tl.float32) + 8388608.0) - key)


@triton.jit
def add(s, i, j, m, n, head, score, source):
    """The bias -slopes[h] |i + offset - j|, of tiles of either orientation."""
    return s - away(i, j, score) * tl.load(source + head).to(tl.float32)
