"""What families whose methods are replaced share: checkpoints, compilation, copies and hooks."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import flashpatch

pytestmark = pytest.mark.usefixtures("tiled_calls")

TOKENS = torch.randint(4, 51, (2, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[1, -5:] = 0

# A model of `tiny` -> the class that computes its attention.
ATTENTION = {
    "bloom": "BloomAttention",
    "codegen": "CodeGenAttention",
    "gpt_neo": "GPTNeoSelfAttention",
    "gptj": "GPTJAttention",
    "mpnet": "MPNetSelfAttention",
}
# Those that are given padding too.
PADDED = ("codegen", "mpnet")


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


def step(model: Any, masked: bool, run: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    model.config.use_cache = False
    inputs = {"input_ids": TOKENS, "labels": TOKENS}
    if masked:
        inputs["attention_mask"] = MASK
    loss = (model if run is None else run)(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [n for n in ATTENTION if n != "mpnet"])  # which has none
def test_gradient_checkpointing_gives_the_same_gradients(tiny, name, reentrant, tiled_calls):
    model, masked = tiny(name).train(), name in PADDED
    expected = step(model, masked)
    flashpatch.apply(model, on_fallback=forbid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(step(model, masked), expected)
    assert len(tiled_calls) == 4  # two layers, and each once more in the backward pass


@pytest.mark.parametrize("name", ATTENTION)
def test_compiles_without_a_graph_break(tiny, name):
    model, masked = tiny(name), name in PADDED
    expected = step(model, masked)
    flashpatch.apply(model, on_fallback=forbid)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(model, masked, compiled), expected)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ATTENTION)
def test_a_copy_of_a_patched_model_uses_its_own_weights(tiny, name, copied):
    model = tiny(name)
    flashpatch.apply(model, on_fallback=forbid)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    patched = other(TOKENS).logits
    flashpatch.revert(other)
    torch.testing.assert_close(patched, other(TOKENS).logits)


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_hooks_of_accelerate_compose_in_both_orders(tiny, name, hooked_first):
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    model = tiny(name)
    expected = model(TOKENS).logits
    attention = [m for m in model.modules() if type(m).__name__ == ATTENTION[name]]
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
    assert calls == attention * 2
    assert not any("_attn" in vars(m) for m in attention)
