"""apply, revert and applied: what they change, and that nothing else changes."""

import copy
import pickle
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import flashpatch
from flashpatch import patching, registry
from flashpatch.packing import LEAK, warn_of_leaks
from flashpatch.registry import Patch
from flashpatch_kernels.engines import Reason


def llama_config(**overrides) -> LlamaConfig:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaConfig(**{**sizes, **overrides})


def llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**overrides)).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return BertModel(config).eval()


def ids(batch=2, length=19) -> torch.Tensor:
    return torch.randint(5, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def forbid(reason: Reason):
    raise AssertionError(f"fell back: {reason}")


def state(model: nn.Module) -> list[dict]:
    """Every attribute of every module, and of the hook dictionaries among them."""
    return [
        {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()}
        for m in model.modules()
    ]


def same(a: list[dict], b: list[dict]) -> bool:
    """Whether two states hold the same objects under the same names."""

    def alike(x, y):
        if isinstance(x, dict) and isinstance(y, dict):
            return x.keys() == y.keys() and all(x[k] is y[k] for k in x)
        return x is y

    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(alike(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


def served(model: nn.Module) -> int:
    return len(patching.patched_modules(model))


@pytest.mark.parametrize("make", [llama, bert])
def test_a_patched_model_gives_the_same_outputs_without_a_fallback(make):
    model, batch = make(), padded(ids())
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        before = model(**batch)[0]
        flashpatch.apply(model, on_fallback=forbid)
        after = model(**batch)[0]
    torch.testing.assert_close(after[real], before[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [llama, bert])
def test_revert_restores_every_attribute_by_identity(make):
    model = make()
    batch = padded(ids())
    before, weights = state(model), list(model.parameters())
    with torch.no_grad():
        logits = model(**batch)[0]
        flashpatch.apply(model)
        assert not same(before, state(model))
        model(**batch)
        flashpatch.revert(model)
        assert same(before, state(model))
        assert torch.equal(model(**batch)[0], logits)
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


def test_applying_twice_is_applying_once():
    model = llama()
    before = state(model)
    first = flashpatch.apply(model)
    once = state(model)
    second = flashpatch.apply(model)
    assert str(first) == str(second)
    differing = [
        k
        for a, b in zip(once, state(model), strict=True)
        for k in a
        if a[k] is not b.get(k) and not isinstance(a[k], dict)
    ]
    assert set(differing) <= {"_flashpatch"}
    flashpatch.revert(model)
    assert same(before, state(model))


def test_reverting_an_unpatched_model_changes_nothing():
    model = llama()
    before = state(model)
    flashpatch.revert(model)
    assert same(before, state(model))


def test_a_model_built_from_the_same_config_object_is_untouched():
    config = llama_config()
    patched, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    untouched = state(other)
    flashpatch.apply(patched)
    assert same(untouched, state(other))
    assert other.config is config
    assert config._attn_implementation == "sdpa"
    assert patched.config._attn_implementation == "fpatch"
    assert LlamaForCausalLM(config).config._attn_implementation == "sdpa"


def test_what_is_set_on_the_config_meanwhile_survives_the_revert():
    model = llama()
    config = model.config
    flashpatch.apply(model)
    model.config.use_cache = False
    flashpatch.revert(model)
    assert model.config is config
    assert config.use_cache is False
    assert config._attn_implementation == "sdpa"


def test_only_and_skip_choose_modules_by_name():
    model = llama()
    report = flashpatch.apply(model, only="model.layers.[01].*", skip=["*.1.self_attn"])
    assert patching.patched_modules(model) == ["model.layers.0.self_attn"]
    assert report.served == 1
    assert report.total == 3
    assert {r.name for r in report.reasons} == {"SKIPPED"}


def test_a_skipped_module_runs_its_original_attention_silently():
    reasons = []
    model, batch = llama(), padded(ids())
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        before = model(**batch).logits
        flashpatch.apply(model, skip="*.1.*", on_fallback=reasons.append)
        after = model(**batch).logits
    torch.testing.assert_close(after[real], before[real], atol=1e-5, rtol=1e-5)
    assert reasons == []


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"only": "decoder.*"}, ValueError, r"'decoder\.\*' matches no .*3 of them"),
        ({"skip": ["model.*", "x"]}, ValueError, "'x' matches no"),
        ({"only": [3]}, TypeError, "not 3"),
        ({"on_fallback": "warn"}, TypeError, "'warn'"),
        ({"packing": "auto"}, ValueError, "'auto'"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_changed(arguments, error, word):
    model = llama()
    before = state(model)
    with pytest.raises(error, match=word):
        flashpatch.apply(model, **arguments)
    assert same(before, state(model))


def test_something_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="not str"):
        flashpatch.apply("llama")


def test_applied_reverts_even_when_the_block_raises():
    model = llama()
    before = state(model)
    served = []

    def fail():
        with flashpatch.applied(model) as report:
            served.append(report.served)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert served == [3]
    assert same(before, state(model))


def test_applied_within_applied_gives_the_outer_settings_back():
    model = llama()
    with flashpatch.applied(model, only="*.0.*"):
        with flashpatch.applied(model):
            assert served(model) == 3
        assert served(model) == 1
    assert served(model) == 0


def test_an_unknown_attention_class_is_reported_and_its_model_left_alone():
    class MyAttention(type(llama().model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)  # softmax( matmul( happens up there

    model = llama()
    model.model.layers[1].self_attn = MyAttention(model.config, 1)
    report = flashpatch.apply(model)
    assert report.served == 0
    assert {r.name for r in report.reasons} == {"SHARED_MASKS", "NO_PATCH"}
    assert model.config._attn_implementation == "sdpa"


class OldAttention(nn.Module):
    """Computes attention itself, and holds no config."""

    def forward(self, hidden_states, **kwargs):
        scores = torch.matmul(hidden_states, hidden_states.mT)
        return torch.matmul(torch.softmax(scores, dim=-1), hidden_states), None


def own_attention_in_layer_1(monkeypatch, **patch) -> LlamaForCausalLM:
    """A llama with `OldAttention`, and with a patch for it if there are any arguments."""
    if patch:
        owner = f"{__name__}.OldAttention"
        monkeypatch.setattr(
            registry, "_PATCHES", {**registry._PATCHES, owner: Patch(owner, **patch)}
        )
    model = llama()
    model.model.layers[1].self_attn = OldAttention()
    return model


def test_attention_without_a_config_is_given_the_masks_of_the_model_around_it(monkeypatch):
    report = flashpatch.apply(own_attention_in_layer_1(monkeypatch))
    assert report.served == 0
    assert {r.name for r in report.reasons} == {"SHARED_MASKS", "NO_PATCH"}


def test_the_key_alone_serves_no_class_that_does_not_ask_the_interface(monkeypatch):
    report = flashpatch.apply(own_attention_in_layer_1(monkeypatch, keyed=True))
    assert report.served == 0
    assert {r.name for r in report.reasons} == {"SHARED_MASKS", "NO_PATCH"}


def test_a_patch_that_needs_no_key_serves_where_the_config_cannot_get_it(monkeypatch):
    class StrangeAttention(OldAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)  # softmax( matmul( happens up there

    swaps = {"forward": lambda module: partial(OldAttention.forward, module)}
    model = own_attention_in_layer_1(monkeypatch, swaps=swaps, needs_key=False)
    model.model.layers[2].self_attn = StrangeAttention()
    report = flashpatch.apply(model)
    assert report.served == 1
    assert "forward" in vars(model.model.layers[1].self_attn)
    assert model.config._attn_implementation == "sdpa"


def test_a_class_around_attention_is_changed_and_restored_and_not_reported(monkeypatch):
    swaps = {"forward": lambda module: partial(OldAttention.forward, module)}
    model = own_attention_in_layer_1(monkeypatch, keyed=False, swaps=swaps, attends=False)
    around = model.model.layers[1].self_attn
    report = flashpatch.apply(model, on_fallback=forbid)
    assert "forward" in vars(around)
    assert report.total == report.served == len(patching.patched_modules(model)) == 2
    assert patching.report_of(model) == report
    assert patching.matching(model, "*.1.self_attn") == ()
    with pytest.raises(ValueError, match="there are 2 of them"):
        flashpatch.apply(model, skip="*.1.self_attn")
    flashpatch.revert(model)
    assert "forward" not in vars(around)


def test_the_report_names_pattern_class_engine_and_count():
    text = str(flashpatch.apply(llama()))
    assert "serves 3 of 3" in text
    assert "model.layers.*.self_attn" in text
    assert "LlamaAttention" in text
    assert "x3" in text
    assert "runs on" in text


def test_the_report_of_a_model_without_attention_says_so():
    assert "no attention modules" in str(flashpatch.apply(nn.Linear(2, 2)))


def test_a_counter_counts_the_fallbacks():
    model, counts = llama(), Counter()
    flashpatch.apply(model, on_fallback=lambda reason: counts.update([reason.name]))
    with torch.no_grad():
        out = model(ids(), output_attentions=True)
    assert counts == {"OUTPUT_ATTENTIONS": 3}
    assert len(out.attentions) == 3
    assert out.attentions[0].shape == (2, 4, 19, 19)


def test_a_deepcopy_is_patched_and_uses_its_own_weights():
    model = llama()
    flashpatch.apply(model, on_fallback=forbid)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
        changed = twin(ids()).logits
        assert not torch.allclose(changed, model(ids()).logits)
        flashpatch.revert(twin)
        torch.testing.assert_close(twin(ids()).logits, changed, atol=1e-5, rtol=1e-5)
    assert served(twin) == 0
    assert served(model) == 3
    assert twin.config is not model.config


def test_a_pickled_model_comes_back_patched_and_can_be_reverted():
    model = llama()
    flashpatch.apply(model)
    again = pickle.loads(pickle.dumps(model))
    assert served(again) == 3
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)
    flashpatch.revert(again)
    assert again.config._attn_implementation == "sdpa"
    assert "_flashpatch" not in vars(again.model.layers[0].self_attn)


def test_a_saved_checkpoint_carries_no_trace_and_reloads(tmp_path):
    model = llama()
    plain, patched = tmp_path / "plain", tmp_path / "patched"
    model.save_pretrained(plain)
    flashpatch.apply(model)
    model.save_pretrained(patched)
    assert (plain / "config.json").read_text() == (patched / "config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(patched).eval()
    assert reloaded.config._attn_implementation == "sdpa"
    assert model.state_dict().keys() == reloaded.state_dict().keys()
    flashpatch.apply(reloaded)
    with torch.no_grad():
        assert torch.equal(reloaded(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_patched_model_compiles_in_one_graph(mode, padding):
    model = llama(use_cache=False)
    getattr(model, mode)()
    batch = padded(ids()) if padding else {"input_ids": ids()}
    flashpatch.apply(model, on_fallback=forbid)
    expected = model(**batch).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(**batch).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if mode == "train":
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_patching_after_compiling_is_seen():
    model = llama(use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(ids()).logits
        report = flashpatch.apply(compiled, only="model.layers.*")
        assert report.served == 3
        torch.testing.assert_close(compiled(ids()).logits, before, atol=1e-5, rtol=1e-5)
        flashpatch.revert(compiled)
        assert torch.equal(compiled(ids()).logits, before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_agree_under_gradient_checkpointing(use_reentrant):
    model = llama(use_cache=False, attention_dropout=0.0).train()
    batch = padded(ids())

    def gradients():
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    flashpatch.apply(model, on_fallback=forbid)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_dropout_is_replayed_by_gradient_checkpointing():
    model = llama(use_cache=False, attention_dropout=0.4).train()
    flashpatch.apply(model, on_fallback=forbid)

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_autocast_runs_attention_in_its_dtype():
    model = llama()
    flashpatch.apply(model, on_fallback=forbid)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        after = model(**padded(ids())).logits
        flashpatch.revert(model)
        before = model(**padded(ids())).logits
    real = padded(ids())["attention_mask"].bool()
    assert after.dtype == before.dtype == torch.bfloat16
    torch.testing.assert_close(after[real], before[real], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("patch_first", [False, True])
def test_it_composes_with_accelerate_hooks_in_both_orders(patch_first):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            type(self).calls += 1
            return args, kwargs

    model = llama()
    attentions = [layer.self_attn for layer in model.model.layers]
    with torch.no_grad():
        expected = model(ids()).logits
        if patch_first:
            flashpatch.apply(model, on_fallback=forbid)
        for module in attentions:
            add_hook_to_module(module, Counting())
        if not patch_first:
            flashpatch.apply(model, on_fallback=forbid)
        after = model(ids()).logits
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
        assert Counting.calls == 3
        flashpatch.revert(model)
        assert torch.equal(model(ids()).logits, expected)
        assert Counting.calls == 6
        for module in attentions:
            remove_hook_from_module(module)
        assert torch.equal(model(ids()).logits, expected)


@pytest.mark.parametrize("patch_first", [False, True])
def test_it_composes_with_peft_in_both_orders(patch_first):
    from peft import LoraConfig, get_peft_model

    model = llama()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    if patch_first:
        flashpatch.apply(model, on_fallback=forbid)
    tuned = get_peft_model(model, lora).eval()
    if not patch_first:
        assert flashpatch.apply(tuned, only="model.layers.*", on_fallback=forbid).served == 3
    with torch.no_grad():
        after = tuned(ids()).logits
        flashpatch.revert(tuned)
        before = tuned(ids()).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def positions() -> torch.Tensor:
    """Three documents in a row of 19 tokens."""
    return torch.cat([torch.arange(7), torch.arange(9), torch.arange(3)])[None].expand(2, -1)


def leak(model: nn.Module, **call) -> float:
    """How far the second document's logits move when the first document changes."""
    tokens = ids()
    other = tokens.clone()
    other[:, :7] = (other[:, :7] + 11) % 90 + 5
    with torch.no_grad():
        outs = [model(t, position_ids=positions(), **call).logits[:, 7:] for t in (tokens, other)]
    return (outs[0] - outs[1]).abs().max().item()


ones = torch.ones(2, 19, dtype=torch.long)
WAYS = {
    "alone": {"use_cache": False},
    "beside a mask of ones": {"use_cache": False, "attention_mask": ones},
    "with a cache": {"use_cache": True},
    "with both": {"use_cache": True, "attention_mask": ones},
}


@pytest.mark.parametrize("way", WAYS)
def test_packing_by_position_ids_keeps_documents_apart(way):
    model = llama()
    flashpatch.apply(model, packing="position_ids", on_fallback=forbid)
    assert leak(model, **WAYS[way]) == 0.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:position_ids were passed")
def test_without_packing_the_model_keeps_its_own_answer(way):
    model = llama()
    before = leak(model, **WAYS[way])
    flashpatch.apply(model, on_fallback=forbid)
    assert leak(model, **WAYS[way]) == pytest.approx(before, abs=1e-4)
    assert (before == 0) == (way == "alone")


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_may_leak_warns_once(way):
    from flashpatch import packing

    packing._warn_once.cache_clear()
    model = llama()
    flashpatch.apply(model)
    expected = nullcontext() if way == "alone" else pytest.warns(UserWarning, match="packed doc")
    with expected:
        leak(model, **WAYS[way])
    leak(model, **WAYS[way])  # a second warning would be an error
    flashpatch.revert(model)
    assert warn_of_leaks not in model._forward_pre_hooks.values()
    assert "packing=" in LEAK


def test_the_leak_warning_leaves_generation_alone():
    model = llama()
    flashpatch.apply(model)
    model.generate(**padded(ids()), max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_agrees_token_for_token(cache):
    model = llama()
    call = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**padded(ids()), **call)
    flashpatch.apply(model, on_fallback=forbid)
    got = model.generate(**padded(ids()), cache_implementation=cache, **call)
    assert torch.equal(got, expected)
