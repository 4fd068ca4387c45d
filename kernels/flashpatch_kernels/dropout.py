"""Which attention weights a seed drops: a hash of the weight's place, the same in every engine.

Weight (b, h, i, j) is kept when a 16-bit number is below a threshold. Two neighbours, j even and
j + 1, share a 32-bit word: the mixed sum of a hash of (seed, b, h, i) and one of (seed, j // 2).
So nothing is stored between forward and backward, tiles of any size agree, and a tile costs a dozen
integer operations for two weights. All arithmetic is that of uint32, done in int32.
"""

import torch
from torch import Tensor

# As int32. The first two are those of MurmurHash3's finaliser.
MULTIPLIER_1 = 0x85EBCA6B - (1 << 32)
MULTIPLIER_2 = 0xC2B2AE35 - (1 << 32)
GOLDEN = 0x9E3779B9 - (1 << 32)


def threshold(p: float) -> int:
    """How many of the 65,536 values of a weight's number keep it."""
    return round((1 - p) * 65536)


def keep_probability(p: float) -> float:
    """The probability that a weight is kept: 1 - p to the nearest 1 / 65536."""
    return threshold(p) / 65536


def mix(x: Tensor) -> Tensor:
    """Mixes the bits of int32 `x` in place: MurmurHash3's finaliser."""
    shifted = torch.empty_like(x)
    for bits, multiplier in ((16, MULTIPLIER_1), (13, MULTIPLIER_2), (16, 1)):
        # The mask makes the shift a logical one.
        torch.bitwise_right_shift(x, bits, out=shifted).bitwise_and_((1 << (32 - bits)) - 1)
        x.bitwise_xor_(shifted)
        if multiplier != 1:
            x.mul_(multiplier)
    return x


def row_hashes(seed: Tensor, batch: int, heads: int, n_queries: int) -> Tensor:
    """The hashes of (seed, b, h, i): int32 [B, H, N]."""
    low, _ = _seed_words(seed)
    bh = torch.arange(batch * heads, dtype=torch.int32, device=seed.device)
    i = torch.arange(n_queries, dtype=torch.int32, device=seed.device)
    x = mix(mix(bh * GOLDEN + low)[:, None] + i * GOLDEN)
    return x.view(batch, heads, n_queries)


def column_hashes(seed: Tensor, n_keys: int) -> Tensor:
    """The hashes of (seed, j // 2), one for each pair of keys: int32 [ceil(M / 2)]."""
    _, high = _seed_words(seed)
    pair = torch.arange((n_keys + 1) // 2, dtype=torch.int32, device=seed.device)
    return mix(pair * GOLDEN + high)


def keep(seed: Tensor, p: float, batch: int, heads: int, n_queries: int, n_keys: int) -> Tensor:
    """The whole mask, bool [B, H, N, M]: for tests and small calls."""
    words = row_hashes(seed, batch, heads, n_queries)[..., None] + column_hashes(seed, n_keys)
    return kept(words, p)[..., :n_keys] != 0


def kept(words: Tensor, p: float) -> Tensor:
    """All ones where a weight is kept, else 0: sums of hashes int32 [..., W] -> int32 [..., 2 W].

    Changes `words`. There is no comparison, because on a CPU a bool is slow to make and to use.
    """
    numbers = mix(words).view(torch.int16).to(torch.int32)
    return numbers.sub_(threshold(p) - 32768).bitwise_right_shift_(31)


def _seed_words(seed: Tensor) -> tuple[Tensor, Tensor]:
    """Two mixed int32 [1] words of an int64 [1] seed."""
    low, high = seed.view(torch.int32).chunk(2)
    low = mix(low ^ GOLDEN)
    return low, mix(high ^ low)
