"""BLOOM: what is particular to a replaced `forward`."""

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DynamicCache

import flashpatch
from flashpatch import dispatch
from flashpatch_kernels.engines import Reason

TOKENS = torch.randint(2, 51, (2, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[1, :5] = 0


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


def test_slow_but_exact_runs_the_original_and_says_so(tiny):
    model = tiny("bloom", pretraining_tp=3, slow_but_exact=True)
    expected = model(TOKENS, attention_mask=MASK).logits
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    assert torch.equal(model(TOKENS, attention_mask=MASK).logits, expected)
    assert {r.name for r in reasons} == {"SLOW_BUT_EXACT"}


@pytest.mark.parametrize("patterns", [{}, {"skip": "*.h.1.*"}, {"skip": "*"}])
def test_a_refused_call_runs_the_original_on_the_cache_as_it_is(tiny, monkeypatch, patterns):
    model = tiny("bloom")
    refused = Reason("REFUSED", "for the test")
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(TOKENS[:, :9], attention_mask=MASK[:, :9], past_key_values=cache)
        expected = model(TOKENS[:, 9:], attention_mask=MASK, past_key_values=cache).logits
        reasons = []
        flashpatch.apply(model, on_fallback=reasons.append, **patterns)
        monkeypatch.setattr(dispatch, "decide", lambda call: refused)
        cache = DynamicCache(config=model.config)
        model(TOKENS[:, :9], attention_mask=MASK[:, :9], past_key_values=cache)
        logits = model(TOKENS[:, 9:], attention_mask=MASK, past_key_values=cache).logits
    assert torch.equal(logits, expected)
    assert cache.get_seq_length() == TOKENS.shape[1]
    assert set(reasons) == (set() if patterns == {"skip": "*"} else {refused})


def test_the_replicas_of_data_parallel_use_their_own_weights(tiny):
    model = tiny("bloom")
    flashpatch.apply(model, on_fallback=forbid)
    module = model.transformer.h[0].self_attention
    replica = module._replicate_for_data_parallel()
    assert replica.forward.args == (replica,)
    assert module.forward.args == (module,)
    flashpatch.revert(model)
    assert "_replicate_for_data_parallel" not in vars(module)


def test_the_config_that_the_user_holds_is_not_changed():
    config = BloomConfig(hidden_size=36, n_head=3, n_layer=2, vocab_size=51)
    model, other = BloomForCausalLM(config).eval(), BloomForCausalLM(config).eval()
    expected = other(TOKENS, attention_mask=MASK).logits
    flashpatch.apply(model, on_fallback=forbid)
    assert torch.equal(other(TOKENS, attention_mask=MASK).logits, expected)
    flashpatch.revert(model)
    assert model.config is config
