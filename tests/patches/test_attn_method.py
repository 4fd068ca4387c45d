"""GPT-J and GPT-Neo: what is particular to classes with an `_attn` method."""

from typing import Any

import torch

import flashpatch

TOKENS = torch.randint(2, 51, (2, 17), generator=torch.Generator().manual_seed(1))


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


def test_packed_documents_are_kept_apart_when_asked(tiny):
    model = tiny("gptj")
    alone = [model(TOKENS[:1, :7]).logits, model(TOKENS[:1, 7:]).logits]
    positions = torch.cat((torch.arange(7), torch.arange(10)))[None]
    flashpatch.apply(model, on_fallback=forbid, packing="position_ids")
    packed = model(TOKENS[:1], position_ids=positions, use_cache=True).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))
