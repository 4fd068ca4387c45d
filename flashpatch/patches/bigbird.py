"""BigBird's attention: in blocks, of which most see few others.

The first and the last block see all tokens. Each of the others sees those two, itself and its
neighbours, and blocks drawn at random: of these the keys are gathered, and the blocks of queries
become a batch. The class's own function computes the pieces apart, and a matrix of all pairs to
return the weights.

Letters: B batch, H heads, N tokens, D head size; S tokens of a block, W = N / S blocks, C blocks
that one sees.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashpatch.dispatch import DEFAULT, Settings, attend_parts, fall_back
from flashpatch.patches.interface import why_blocked
from flashpatch.registry import Patch, register
from flashpatch_kernels.masks import Boolean, key_mask
from flashpatch_kernels.options import Options

CLASSES = (
    "big_bird.modeling_big_bird.BigBirdBlockSparseAttention",
    "bigbird_pegasus.modeling_bigbird_pegasus.BigBirdPegasusBlockSparseAttention",
)
# Which hold one, or after a short text one of full attention in its place.
HOLDERS = (
    "big_bird.modeling_big_bird.BigBirdAttention",
    "bigbird_pegasus.modeling_bigbird_pegasus.BigBirdPegasusEncoderAttention",
)


def sparse(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    band_mask: Tensor,
    from_mask: Tensor,
    to_mask: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stands for `bigbird_block_sparse_attention`.

    Args:
        module: The attention module.
        query: [B, H, N, D].
        key: [B, H, N, D].
        value: [B, H, N, D].
        band_mask: What the others say, for the blocks in the middle.
        from_mask: [B, 1, N, 1], 0 for padding, of which the output is 0.
        to_mask: [B, 1, 1, N], 0 for padding.
        args: The sizes of all this.
        kwargs: The seed of the random blocks, and a plan of them.

    Returns:
        The output [B, N, H, D], and the attention weights where the original computes them.
    """
    settings: Settings = getattr(module, "_flashpatch", DEFAULT)
    original = partial(
        type(module).bigbird_block_sparse_attention,
        module,
        *(query, key, value, band_mask, from_mask, to_mask),
        *args,
        **kwargs,
    )
    blocked = why_blocked(module, settings, {})
    if blocked is not None:
        return fall_back(blocked, settings, original)
    (batch, heads, n, size), block = query.shape, module.block_size
    visible = to_mask[:, 0, 0] != 0  # [B, N]
    seen = _blocks_seen(module, n // block, kwargs.get("seed"), query.device)  # [H, W - 2, C]
    at = torch.arange(heads, device=query.device)[:, None, None]

    def gather(x: Tensor) -> Tensor:  # [B, H, N, D] -> [B * (W - 2), H, C * S, D]
        chosen = x.unflatten(2, (-1, block))[:, at, seen]
        return chosen.flatten(3, 4).transpose(1, 2).flatten(0, 1)

    def ends(x: Tensor) -> Tensor:  # [B, H, 2 S, D]
        return torch.cat((x[:, :, :block], x[:, :, -block:]), dim=2)

    shown = visible[:, None, :, None].expand(-1, heads, -1, 1)
    mask = gather(shown)[..., 0].unflatten(2, (-1, block)) & _once(seen, batch)[..., None]
    few = Options(mask=Boolean(mask.flatten(2)[:, :, None]), scale=size**-0.5)
    middle = query[:, :, block:-block].unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)
    every = Options(mask=key_mask(visible), scale=size**-0.5)
    parts = (middle, gather(key), gather(value), few), (ends(query), key, value, every)
    found = attend_parts(parts, settings, lse=False)
    if found is None:
        return original()
    (out, _), (outer, _) = found
    out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)  # [B, H, N - 2 S, D]
    out = torch.cat((outer[:, :, :block], out, outer[:, :, block:]), dim=2)
    return (out * from_mask).transpose(1, 2), None


def _blocks_seen(module: Any, n_blocks: int, seed: Any, device: torch.device) -> Tensor:
    """The blocks that each of those in the middle sees, drawn as the class draws: [H, W - 2, C]."""
    block, heads, count = module.block_size, module.num_attention_heads, module.num_random_blocks
    n, most = n_blocks * block, module.max_seqlen
    if module.training:
        np.random.seed(seed)
    if n in (1024, 3072, 4096):
        draw = partial(module._bigbird_block_rand_mask, most, most, block, block, count)
        drawn = [draw(last_idx=1024)[: n_blocks - 2] for _ in range(heads)]
    else:
        length, counts = module._get_rand_attn_plan(n, block, count)
        drawn = module._bigbird_block_rand_mask_with_head(
            from_seq_length=n,
            to_seq_length=n,
            from_block_size=block,
            to_block_size=block,
            num_heads=heads,
            plan_from_length=length,
            plan_num_rand_blocks=counts,
        )
    random = torch.tensor(np.stack(drawn), device=device, dtype=torch.long)
    own = torch.arange(1, n_blocks - 1, device=device)[:, None]
    first, last = torch.zeros_like(own), torch.full_like(own, n_blocks - 1)
    fixed = torch.cat((first, own - 1, own, own + 1, last), dim=1)
    return torch.cat((fixed.expand(heads, -1, -1), random), dim=2)


def _once(seen: Tensor, batch: int) -> Tensor:
    """False where the first or last block is a neighbour too: bool [B * (W - 2), H, C].

    The random ones may be those again, and then count again.
    """
    heads, count, _ = seen.shape
    once = torch.ones_like(seen, dtype=torch.bool)
    once[:, 0, 0] = False
    once[:, count - 1, 4] = False
    return once.transpose(0, 1).expand(batch, count, heads, -1).flatten(0, 1)


for _name in CLASSES:
    register(
        Patch(
            f"transformers.models.{_name}",
            keyed=False,
            swaps={"bigbird_block_sparse_attention": lambda module: partial(sparse, module)},
            needs_key=False,
        )
    )
for _name in HOLDERS:
    register(
        Patch(
            f"transformers.models.{_name}",
            keyed=False,
            replaces={"set_attention_type": "self"},
            needs_key=False,
            attends=False,
        )
    )
