"""Attention to few of the keys: Longformer's window and global tokens, BigBird's blocks."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BigBirdConfig,
    BigBirdModel,
    LongformerConfig,
    LongformerModel,
    LongT5Config,
    LongT5EncoderModel,
)

import flashpatch

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def forbid(reason: Any) -> None:
    raise AssertionError(reason)


def ids(length: int) -> torch.Tensor:
    return torch.randint(4, 60, (2, length), generator=torch.Generator().manual_seed(0))


def padding(length: int) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -length // 3 :] = 0
    return mask


def step(model: Any, **inputs: Any) -> Any:
    """The outputs at real tokens, and the gradients of their squares' sum."""
    model.zero_grad()
    out = model(**inputs).last_hidden_state
    out = out[inputs["attention_mask"].bool()]
    out.square().sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def longformer() -> Any:
    torch.manual_seed(0)
    sizes = {"attention_window": [4, 8], "max_position_embeddings": 64, "pad_token_id": 1}
    return LongformerModel(LongformerConfig(**SMALL, **sizes), add_pooling_layer=False)


def bigbird(length: int) -> Any:
    torch.manual_seed(0)
    config = BigBirdConfig(
        **SMALL, block_size=4, num_random_blocks=2, max_position_embeddings=length
    )
    return BigBirdModel(config, add_pooling_layer=False)


GLOBAL: dict[str, tuple[tuple[int, int], ...]] = {
    "none": (),
    "one text's": ((0, 0),),
    "both texts', apart": ((0, 3), (0, 17), (1, 0), (1, 5)),
    "padding's": ((0, 0), (1, 20)),
}


@pytest.mark.usefixtures("tiled_calls")
@pytest.mark.parametrize("places", GLOBAL.values(), ids=GLOBAL.keys())
def test_longformer_computes_the_same_with_global_tokens(places, assert_same_step):
    theirs = longformer().train()
    ours = copy.deepcopy(theirs)
    flashpatch.apply(ours, on_fallback=forbid)
    mask = torch.zeros(2, 21, dtype=torch.long)
    for place in places:
        mask[place] = 1
    inputs = {
        "input_ids": ids(21),
        "attention_mask": padding(21),
        "global_attention_mask": mask,
    }
    assert_same_step(step(ours, **inputs), step(theirs, **inputs))


def test_longformer_says_so_when_it_falls_back():
    reasons: list[Any] = []
    model = longformer()
    flashpatch.apply(model, on_fallback=reasons.append)
    found = model(ids(16), output_attentions=True)
    assert len(found.attentions) == 2
    assert {r.name for r in reasons} == {"OUTPUT_ATTENTIONS"}


@pytest.mark.usefixtures("tiled_calls")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [40, 52])
def test_bigbird_computes_the_same_with_random_blocks(length, training, assert_same_step):
    theirs = bigbird(length).train(training)
    ours = copy.deepcopy(theirs)
    flashpatch.apply(ours, on_fallback=forbid)
    inputs = {"input_ids": ids(length), "attention_mask": padding(length)}
    assert_same_step(step(ours, **inputs), step(theirs, **inputs))


@pytest.mark.usefixtures("tiled_calls")
def test_bigbird_stays_patched_when_a_short_text_makes_its_attention_full(assert_same_step):
    theirs = bigbird(64)
    ours = copy.deepcopy(theirs)
    flashpatch.apply(ours, on_fallback=forbid)
    inputs = {"input_ids": ids(12), "attention_mask": padding(12)}
    assert_same_step(step(ours, **inputs), step(theirs, **inputs))
    assert type(ours.encoder.layer[0].attention.self).__name__ == "BigBirdSelfAttention"
    assert "encoder.layer.0.attention.self" in flashpatch.patching.patched_modules(ours)
    flashpatch.revert(ours)
    left = {name for module in ours.modules() for name in vars(module)}
    assert not {"_flashpatch", "_flashpatch_record", "forward", "set_attention_type"} & left
    assert_same_step(step(ours, **inputs), step(theirs, **inputs))


@pytest.mark.usefixtures("tiled_calls")
@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_longt5_computes_the_same_in_blocks(kind, assert_same_step):
    torch.manual_seed(0)
    theirs = LongT5EncoderModel(
        LongT5Config(
            vocab_size=60,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_heads=4,
            num_layers=2,
            dropout_rate=0.0,
            local_radius=3,
            global_block_size=4,
            encoder_attention_type=kind,
        )
    )
    ours = copy.deepcopy(theirs)
    report = flashpatch.apply(ours, on_fallback=forbid)
    assert [row.count for row in report.rows] == [2]
    inputs = {"input_ids": ids(21), "attention_mask": padding(21)}
    assert_same_step(step(ours, **inputs), step(theirs, **inputs))
