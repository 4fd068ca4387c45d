"""GPT-J and GPT-Neo: what is particular to classes with an `_attn` method."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

import flashpatch

TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1}


def gptj() -> Any:
    config = GPTJConfig(n_embd=32, n_head=2, n_layer=2, n_positions=64, rotary_dim=8, vocab_size=51)
    torch.manual_seed(0)
    return GPTJForCausalLM(config).eval()


def gpt_neo() -> Any:
    config = GPTNeoConfig(
        attention_types=[[["global", "local"], 1]],
        hidden_size=32,
        max_position_embeddings=64,
        num_heads=2,
        num_layers=2,
        vocab_size=51,
        window_size=5,
        **TOKEN_IDS,
    )
    torch.manual_seed(0)
    return GPTNeoForCausalLM(config).eval()


BUILDERS = [gptj, gpt_neo]
TOKENS = torch.randint(2, 51, (2, 17), generator=torch.Generator().manual_seed(1))


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


def step(model: Any, run: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = (model if run is None else run)(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("build", BUILDERS)
def test_gradient_checkpointing_gives_the_same_gradients(build, reentrant):
    model = build().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = step(model)
    flashpatch.apply(model, on_fallback=forbid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(step(model), expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_compiles_without_a_graph_break(build):
    model = build()
    expected = step(model)
    flashpatch.apply(model, on_fallback=forbid)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(model, compiled), expected)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("build", BUILDERS)
def test_a_copy_of_a_patched_model_uses_its_own_weights(build, copied):
    model = build()
    flashpatch.apply(model, on_fallback=forbid)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    patched = other(TOKENS).logits
    flashpatch.revert(other)
    torch.testing.assert_close(patched, other(TOKENS).logits)


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("build", BUILDERS)
def test_hooks_of_accelerate_compose_in_both_orders(build, hooked_first):
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    model = build()
    expected = model(TOKENS).logits
    attention = [m for m in model.modules() if hasattr(m, "_attn")]
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
    assert calls == attention * 2
    for module in attention:
        remove_hook_from_module(module)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert not any("_attn" in vars(m) for m in attention)


def test_packed_documents_are_kept_apart_when_asked():
    model = gptj()
    alone = [model(TOKENS[:1, :7]).logits, model(TOKENS[:1, 7:]).logits]
    positions = torch.cat((torch.arange(7), torch.arange(10)))[None]
    flashpatch.apply(model, on_fallback=forbid, packing="position_ids")
    packed = model(TOKENS[:1], position_ids=positions, use_cache=True).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))
