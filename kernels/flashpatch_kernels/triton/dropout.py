"""Dropout on the device: which weights a seed keeps, as `flashpatch_kernels.dropout` says.

All functions take the same record, `drop` = (seed, threshold, keep_scale): a pointer to the seed,
how many of 65,536 values keep a weight, and the factor that makes up for the others.
"""

import triton
import triton.language as tl

MULTIPLIER_1 = tl.constexpr(0x85EBCA6B)
MULTIPLIER_2 = tl.constexpr(0xC2B2AE35)
GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def mix(x):
    """Mixes the bits of uint32: MurmurHash3's finaliser."""
    x = (x ^ (x >> 16)) * MULTIPLIER_1
    x = (x ^ (x >> 13)) * MULTIPLIER_2
    return x ^ (x >> 16)


@triton.jit
def kept(i, j, head, drop):
    """Whether the weights of queries i and keys j are kept; `head` counts over the batch too."""
    seed = tl.load(drop[0])
    low = mix(seed.to(tl.uint32) ^ GOLDEN)
    high = mix((seed >> 32).to(tl.uint32) ^ low)
    row = mix(mix(tl.cast(head, tl.uint32) * GOLDEN + low) + i.to(tl.uint32) * GOLDEN)
    pair = mix((j // 2).to(tl.uint32) * GOLDEN + high)
    number = mix(row + pair) >> ((j % 2) * 16).to(tl.uint32)
    return ((number & 0xFFFF) ^ 0x8000) < tl.cast(drop[1], tl.uint32)
