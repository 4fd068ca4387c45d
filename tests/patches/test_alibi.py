"""BLOOM: what is particular to a replaced `forward`."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import BloomConfig, BloomForCausalLM, DynamicCache

import flashpatch
from flashpatch import dispatch
from flashpatch_kernels.engines import Reason

TOKENS = torch.randint(2, 51, (2, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[1, :5] = 0


def build(**overrides: Any) -> Any:
    sizes = {"hidden_size": 36, "n_head": 3, "n_layer": 2, "vocab_size": 51}
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(**{**sizes, **overrides})).eval()


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


def step(model: Any, run: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = (model if run is None else run)(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = build().train()
    expected = step(model)
    flashpatch.apply(model, on_fallback=forbid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(step(model), expected)


def test_compiles_without_a_graph_break():
    model = build()
    expected = step(model)
    flashpatch.apply(model, on_fallback=forbid)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(model, compiled), expected)


def test_slow_but_exact_runs_the_original_and_says_so():
    model = build(pretraining_tp=3, slow_but_exact=True)
    expected = model(TOKENS, attention_mask=MASK).logits
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    assert torch.equal(model(TOKENS, attention_mask=MASK).logits, expected)
    assert {r.name for r in reasons} == {"SLOW_BUT_EXACT"}


@pytest.mark.parametrize("patterns", [{}, {"skip": "*.h.1.*"}, {"skip": "*"}])
def test_a_refused_call_runs_the_original_on_the_cache_as_it_is(monkeypatch, patterns):
    model = build()
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


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_model_uses_its_own_weights(copied):
    model = build()
    flashpatch.apply(model, on_fallback=forbid)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    patched = other(TOKENS).logits
    flashpatch.revert(other)
    torch.testing.assert_close(patched, other(TOKENS).logits)


def test_the_replicas_of_data_parallel_use_their_own_weights():
    model = build()
    flashpatch.apply(model, on_fallback=forbid)
    module = model.transformer.h[0].self_attention
    replica = module._replicate_for_data_parallel()
    assert replica.forward.args == (replica,)
    assert module.forward.args == (module,)
    flashpatch.revert(model)
    assert "_replicate_for_data_parallel" not in vars(module)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate_compose_in_both_orders(hooked_first):
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    model = build()
    expected = model(TOKENS).logits
    attention = [block.self_attention for block in model.transformer.h]
    if not hooked_first:
        flashpatch.apply(model, on_fallback=forbid)
    for module in attention:
        add_hook_to_module(module, Counting())
    if hooked_first:
        flashpatch.apply(model, on_fallback=forbid)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert calls == attention
    flashpatch.revert(model)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    for module in attention:
        remove_hook_from_module(module)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert calls == attention * 2


def test_the_config_that_the_user_holds_is_not_changed():
    config = BloomConfig(hidden_size=36, n_head=3, n_layer=2, vocab_size=51)
    model, other = BloomForCausalLM(config).eval(), BloomForCausalLM(config).eval()
    expected = other(TOKENS, attention_mask=MASK).logits
    flashpatch.apply(model, on_fallback=forbid)
    assert torch.equal(other(TOKENS, attention_mask=MASK).logits, expected)
    flashpatch.revert(model)
    assert model.config is config
