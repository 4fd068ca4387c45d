"""Attention weights that a model is asked for, and its attention classes are not told of."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

import flashpatch
from flashpatch import weights

TOKENS = torch.randint(2, 51, (2, 9), generator=torch.Generator().manual_seed(1))


def mpt(**overrides: Any) -> Any:
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=51, **overrides)
    return MptForCausalLM(config).eval()


def by_name(model: Any) -> Any:
    return model(TOKENS, output_attentions=True).attentions


def by_place(model: Any) -> Any:
    # past_key_values, attention_mask, inputs_embeds, labels, use_cache
    return model(TOKENS, None, None, None, None, None, True).attentions


def of_the_model_within(model: Any) -> Any:
    return model.transformer(TOKENS, output_attentions=True).attentions


def copied(model: Any) -> Any:
    return by_name(deepcopy(model))


def pickled(model: Any) -> Any:
    return by_name(pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize("ask", [by_name, by_place, of_the_model_within, copied, pickled])
def test_a_model_that_is_asked_gives_them_and_the_reason(ask):
    model = mpt()
    expected = by_name(model)
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    torch.testing.assert_close(ask(model), expected)
    assert {reason.name for reason in reasons} == (
        {"OUTPUT_ATTENTIONS"} if ask is not pickled else set()
    )


def test_a_config_may_ask():
    model = mpt()
    expected = by_name(model)
    flashpatch.apply(model)
    model.config.output_attentions = True
    torch.testing.assert_close(model(TOKENS).attentions, expected)


def test_an_engine_serves_the_next_call_whether_the_last_one_ended_or_not():
    model = mpt()
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    by_name(model)
    reasons.clear()
    model(TOKENS)
    with pytest.raises(IndexError):
        model(TOKENS + 100, output_attentions=True)
    model(TOKENS)
    assert not reasons
    assert not weights.asked()


def test_reverting_leaves_no_hook():
    model = mpt()
    flashpatch.apply(model)
    flashpatch.apply(model)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 2  # two models
    flashpatch.revert(model)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called
