"""T5's bias as a table of distances: the same numbers in O(N) memory, however it is used."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MT5Config, T5Config, T5ForConditionalGeneration, UMT5Config
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

import flashpatch
from flashpatch.patches import t5
from flashpatch.patches.interface import dense_position_bias

BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def config(cls: Any = T5Config, **overrides: Any) -> Any:
    sizes = {
        "d_ff": 24,
        "d_kv": 8,
        "d_model": 16,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "num_layers": 2,
        "relative_attention_max_distance": 12,
        "relative_attention_num_buckets": 8,
        "vocab_size": 51,
    }
    return cls(**{**sizes, **overrides})


def build(**overrides: Any) -> Any:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration._from_config(
        config(**overrides), attn_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter)
    return model.eval()


def batch(length: int = 17) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 51, (2, length), generator=draw)
    mask = torch.ones_like(tokens)
    mask[1, -5:] = 0
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.flip(1)[:, :11].contiguous(),
    }


def step(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


def assert_same_step(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("past", [0, 5, "tensor"])
@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize(
    ("cls", "of"), [(T5Attention, T5Config), (MT5Attention, MT5Config), (UMT5Attention, UMT5Config)]
)
def test_the_table_holds_the_bias_of_every_distance(cls, of, is_decoder, past):
    module = cls(config(of, is_decoder=is_decoder), has_relative_attention_bias=True, layer_idx=0)
    nn.init.normal_(module.relative_attention_bias.weight)
    past = torch.tensor([5]) if past == "tensor" else past
    for n, m in ((1, 1), (1, 9), (4, 9), (9, 9), (9, 4), (30, 40)):
        table = t5.table(module, n, m, past_seen_tokens=past)
        shared = n > 1 and past == 0  # beyond the largest distance all have one bucket
        reach = 2 * module.relative_attention_max_distance + 1
        assert table.shape == (1, 2, 1, min(n + m - 1, reach) if shared else n + m - 1)
        # Kernels read rows of distances: as columns every layer would copy them.
        assert table.is_contiguous() or table.shape[3] == n + m - 1
        dense = module.compute_bias(n, m, past_seen_tokens=past)
        assert torch.equal(dense_position_bias(table, n, m), dense)


def test_neither_forward_nor_backward_allocates_a_matrix_of_queries_and_keys():
    length = 1024
    model = build(num_heads=1)
    flashpatch.apply(model, on_fallback=forbid)
    inputs = {"input_ids": torch.ones(1, length, dtype=torch.long)}
    inputs["labels"] = inputs["input_ids"]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(model, **inputs)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < length * length * 4


@pytest.mark.parametrize("only", ["encoder.*", "decoder.*", "*EncDecAttention", "*.block.1.*"])
def test_a_part_of_the_model_can_be_served_alone(only):
    model = build()
    expected = step(model, **batch())
    report = flashpatch.apply(model, only=only, on_fallback=forbid)
    assert 0 < report.served < report.total
    assert_same_step(step(model, **batch()), expected)


def test_applying_again_changes_what_is_served_and_nothing_else():
    model = build()
    expected = step(model, **batch())
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    for patterns in ({}, {"only": "encoder.*"}, {"skip": "*.block.0.*"}, {}):
        flashpatch.apply(model, on_fallback=forbid, **patterns)
        assert_same_step(step(model, **batch()), expected)
    flashpatch.revert(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items())


@pytest.mark.parametrize("patterns", [{}, {"only": "encoder.*"}])
def test_calls_that_fall_back_get_the_matrix(patterns):
    model = build()
    inputs = batch()
    expected = model(**inputs, output_attentions=True)
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append, **patterns)
    outputs = model(**inputs, output_attentions=True)
    assert {r.name for r in reasons} == {"OUTPUT_ATTENTIONS"}
    assert torch.equal(outputs.logits, expected.logits)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for ours, theirs in zip(outputs[kind], expected[kind], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("original", ["eager", "sdpa"])
def test_modules_left_alone_run_in_bfloat16_too(original):
    model = build().to(torch.bfloat16)
    model.set_attn_implementation(original)
    expected = step(model, **batch())
    flashpatch.apply(model, skip="*", on_fallback=forbid)
    ours = step(model, **batch())
    assert torch.equal(ours[0], expected[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = build().train()
    expected = step(model, **batch())
    flashpatch.apply(model, on_fallback=forbid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours = step(model, **batch(), use_cache=False)
    assert float(ours[1][BIAS].abs().max()) > 0
    assert_same_step(ours, expected)


def test_compiles_without_a_graph_break_with_the_same_gradients():
    model = build(num_layers=1)
    expected = step(model, **batch(), use_cache=False)
    flashpatch.apply(model, on_fallback=forbid)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch(), use_cache=False).loss
    model.zero_grad()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert_same_step((loss.detach(), gradients), expected)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_model_uses_its_own_weights_and_can_be_reverted(copied):
    model = build()
    flashpatch.apply(model, on_fallback=forbid)
    other = copied(model)
    changed = other.get_parameter(BIAS)
    with torch.no_grad():
        changed.add_(torch.arange(8.0)[:, None])
    patched = other(**batch()).logits
    flashpatch.revert(other)
    torch.testing.assert_close(patched, other(**batch()).logits)
    assert not torch.allclose(patched, model(**batch()).logits)
    cross = other.decoder.block[0].layer[1].EncDecAttention
    assert cross.has_relative_attention_bias is False
    assert "compute_bias" not in vars(cross)
