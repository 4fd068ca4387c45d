"""Every family of the registry, as tiny random models, against its own eager attention.

A row of `FAMILIES` is a model type and what its small config needs beyond `SMALL`. All tests run on
all rows they can: a new family is a new row.
"""

from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

import flashpatch
from flashpatch import dispatch
from flashpatch.dispatch import SKIPPED
from flashpatch_kernels.engines import TILED

BATCH, LENGTH = 2, 13

# What a config gets wherever it, or a config within it, knows the name.
SMALL: dict[str, Any] = {
    "bos_token_id": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_start_token_id": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "encoder_layers": 2,
    "eos_token_id": 66,
    "ffn_dim": 48,
    "head_dim": 12,
    "hidden_size": 32,
    "image_size": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_decoder_layers": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "patch_size": 2,
    "vocab_size": 67,
}
DROPOUTS = (
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "embed_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_dropout",
    "resid_pdrop",
)


@dataclass(frozen=True)
class Family:
    """One row: a model class of transformers and its small config.

    Attributes:
        model: Name of the class.
        kind: Which inputs it takes, a name in `INPUTS`.
        config: What differs from `SMALL`.
        generates: Whether `generate` works.
    """

    model: str
    kind: str = "tokens"
    config: dict[str, Any] = field(default_factory=dict)
    generates: bool = False


def decoder(model: str, **config: Any) -> Family:
    return Family(model, "tokens", config, generates=True)


def encoder(model: str, **config: Any) -> Family:
    return Family(model, "tokens", config)


def seq2seq(model: str, *, kind: str = "pairs", **config: Any) -> Family:
    return Family(model, kind, config, generates=True)


def heard(model: str, **config: Any) -> Family:
    sizes = {f"speech_encoder_{name}": 2 for name in ("layers", "attention_heads")}
    # transformers 5.15 does not ask the adapter for its attention weights
    sizes |= {"feature_projection_input_dim": 8, "add_adapter": False}
    off = dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "speech_encoder_layerdrop"), 0.0)
    sizes |= {"speech_encoder_intermediate_size": 48, "max_source_positions": 8}
    return Family(model, "heard", {**sizes, **off, "t2u_encoder_layers": 1, **config})


def spoken(model: str, kind: str, **config: Any) -> Family:
    quiet = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    return Family(model, kind, {**quiet, "max_source_positions": 8, **config})


T5 = {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
T5 |= {"decoder_start_token_id": 1}
FAMILIES = {
    "albert": encoder("AlbertForMaskedLM", embedding_size=16),
    "bart": seq2seq("BartForConditionalGeneration", d_model=32, forced_eos_token_id=None),
    "bert": encoder("BertForMaskedLM"),
    "bert-decoder": decoder("BertLMHeadModel", is_decoder=True),
    "bert-cross": Family(
        "BertLMHeadModel", "crossing", {"is_decoder": True, "add_cross_attention": True}
    ),
    "bloom": decoder("BloomForCausalLM", n_head=4, n_layer=2),
    "clip": Family("CLIPModel", "both", {"projection_dim": 16}),
    "clip_text_model": encoder("CLIPTextModel"),
    "clip_vision_model": Family("CLIPVisionModel", "pixels"),
    "codegen": decoder("CodeGenForCausalLM", n_embd=32, n_head=4, n_layer=2, rotary_dim=4),
    "deberta": encoder(
        "DebertaForMaskedLM", relative_attention=True, pos_att_type="c2p|p2c", type_vocab_size=2
    ),
    "deberta_v2": encoder(
        "DebertaV2ForMaskedLM",
        relative_attention=True,
        pos_att_type="p2c|c2p",
        position_buckets=4,
        max_relative_positions=7,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
    ),
    "distilbert": encoder("DistilBertForMaskedLM", dim=32, n_heads=4, n_layers=2, hidden_dim=48),
    "electra": encoder("ElectraForMaskedLM", embedding_size=16),
    "electra-cross": Family(
        "ElectraForCausalLM",
        "crossing",
        {"is_decoder": True, "add_cross_attention": True, "embedding_size": 16},
    ),
    "gemma2": decoder(
        "Gemma2ForCausalLM", sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=9
    ),
    "gemma3_text": decoder(
        "Gemma3ForCausalLM",
        sliding_window=5,
        query_pre_attn_scalar=9,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": decoder("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True),
    "gpt2-cross": Family("GPT2LMHeadModel", "crossing", {"add_cross_attention": True}),
    "gpt_neo": decoder(
        "GPTNeoForCausalLM",
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=5,
    ),
    "gpt_neox": decoder("GPTNeoXForCausalLM", head_dim=8),
    "gpt_oss": decoder(
        "GptOssForCausalLM", sliding_window=5, num_local_experts=4, num_experts_per_tok=2
    ),
    "gptj": decoder("GPTJForCausalLM", n_embd=32, n_head=4, n_layer=2, rotary_dim=4),
    "llama": decoder("LlamaForCausalLM"),
    "mistral": decoder("MistralForCausalLM", sliding_window=5),
    "modernbert": encoder(
        "ModernBertForMaskedLM", local_attention=6, global_attn_every_n_layers=2, head_dim=None
    ),
    "mpnet": encoder("MPNetForMaskedLM"),
    "mt5": seq2seq("MT5ForConditionalGeneration", **T5),
    "opt": decoder("OPTForCausalLM", word_embed_proj_dim=32),
    "phi3": decoder("Phi3ForCausalLM", sliding_window=5),
    "qwen2": decoder(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": decoder("Qwen3ForCausalLM"),
    "roberta": encoder("RobertaForMaskedLM"),
    "roberta-cross": Family(
        "RobertaForCausalLM", "crossing", {"is_decoder": True, "add_cross_attention": True}
    ),
    "roformer": encoder("RoFormerForMaskedLM", embedding_size=16),
    "seamless_m4t": heard("SeamlessM4TForSpeechToText"),
    "siglip": Family("SiglipModel", "both"),
    "siglip_text_model": encoder("SiglipTextModel"),
    "siglip_vision_model": Family("SiglipVisionModel", "pixels"),
    "t5": seq2seq("T5ForConditionalGeneration", **T5),
    "umt5": seq2seq("UMT5ForConditionalGeneration", **T5),
    "vit": Family("ViTModel", "pixels"),
    "wav2vec2_bert": spoken(
        "Wav2Vec2BertModel",
        "features",
        feature_projection_input_dim=8,
        left_max_position_embeddings=3,
        right_max_position_embeddings=2,
    ),
    "wav2vec2_conformer": spoken(
        "Wav2Vec2ConformerModel",
        "samples",
        position_embeddings_type="relative",
        conv_dim=(16,),
        conv_kernel=(1,),
        conv_stride=(1,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    "xglm": decoder("XGLMForCausalLM", d_model=32, attention_heads=4, num_layers=2),
    "whisper": seq2seq(
        "WhisperForConditionalGeneration",
        kind="speech",
        d_model=32,
        max_source_positions=15,
        max_target_positions=64,
        num_mel_bins=8,
        begin_suppress_tokens=None,
    ),
}
# Families that take a token mask.
MASKED = ("tokens", "pairs", "crossing", "heard", "features", "samples")
PADDED = [name for name, f in FAMILIES.items() if f.kind in MASKED]
GENERATING = [name for name, f in FAMILIES.items() if f.generates]


def small_config(name: str, **more: Any) -> Any:
    """The config of a family, with `SMALL` and `more` wherever they apply."""
    model_type, overrides = name.split("-")[0], FAMILIES[name].config
    if model_type not in transformers.CONFIG_MAPPING:
        model_type = model_type.replace("_", "-")
    default = transformers.AutoConfig.for_model(model_type)

    def known(config: Any) -> dict[str, Any]:
        names = {**SMALL, **more}
        inner = {
            part: known(getattr(config, part))
            for part in type(config).sub_configs
            if getattr(config, part, None) is not None
        }
        return {**{k: v for k, v in names.items() if hasattr(config, k)}, **inner}

    return transformers.AutoConfig.for_model(model_type, **{**known(default), **overrides})


def build(name: str, attention: str = "eager", **more: Any) -> Any:
    """A tiny model whose attention matters: weights large enough that its scores differ."""
    torch.manual_seed(0)
    cls = getattr(transformers, FAMILIES[name].model)
    model = cls._from_config(small_config(name, **more), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter += torch.randn_like(parameter) / 10
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.normal_()
    return model.eval()


def token_mask(padding: str | None, length: int) -> torch.Tensor | None:
    """Two sequences, one of them five tokens shorter: bool [B, N]."""
    if padding is None:
        return None
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[1, slice(0, 5) if padding == "left" else slice(-5, None)] = False
    return mask


def inputs_of(name: str, padding: str | None = None, length: int = LENGTH) -> dict[str, Any]:
    """What the model takes; fixed random numbers."""
    kind = FAMILIES[name].kind
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 60, (BATCH, length), generator=draw)
    mask = token_mask(padding, length)
    inputs: dict[str, Any] = {}
    if kind in ("tokens", "pairs", "crossing", "both"):
        inputs["input_ids"] = tokens
        if mask is not None:
            inputs["attention_mask"] = mask.long()
    if kind == "both":
        inputs["input_ids"][:, -1] = SMALL["eos_token_id"]  # CLIP looks for it
    if kind in ("pixels", "both"):
        inputs["pixel_values"] = torch.randn(BATCH, 3, 8, 8, generator=draw)
    if kind == "crossing":
        inputs["encoder_hidden_states"] = torch.randn(BATCH, length, 32, generator=draw)
        if mask is not None:
            inputs["encoder_attention_mask"] = mask.long()
    if kind == "speech":
        inputs["input_features"] = torch.randn(BATCH, 8, 30, generator=draw)
    if kind in ("heard", "features"):
        inputs["input_features"] = torch.randn(BATCH, length, 8, generator=draw)
    if kind == "samples":
        inputs["input_values"] = torch.randn(BATCH, length, generator=draw)
    if kind in ("heard", "features", "samples") and mask is not None:
        inputs["attention_mask"] = mask.long()
    if kind in ("pairs", "speech", "heard"):
        inputs["decoder_input_ids"] = tokens.flip(1)[:, : (length + 1) // 2]
        if mask is not None:
            inputs["decoder_attention_mask"] = mask[:, : (length + 1) // 2].long()
    return inputs


def output_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's main output, of real tokens only."""
    names = ("logits", "last_hidden_state", "logits_per_text")
    outputs = model(**inputs)
    output = next(value for n in names if (value := getattr(outputs, n, None)) is not None)
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return output if mask is None else output[mask.bool()]


def step(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradient of a random projection of it to each parameter."""
    model.zero_grad()
    output = output_of(model, inputs)
    torch.manual_seed(2)
    (output.float() * torch.randn(output.shape)).sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


@contextmanager
def engine(monkeypatch: pytest.MonkeyPatch, name: str | None):
    """Counts the calls of each engine; with a name, every call goes to the tiled engine."""
    calls: Counter[str] = Counter()
    run = dispatch.run

    def counted(q: Any, k: Any, v: Any, options: Any, engine: str) -> Any:
        calls[engine] += 1
        return run(q, k, v, options, engine)

    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "run", counted)
        if name is not None:
            patched.setattr(dispatch, "choose", lambda call: TILED)
        yield calls


def error(a: torch.Tensor, b: torch.Tensor, least: float = 1e-3) -> float:
    """The largest difference, relative to the largest value, taken to be no less than `least`."""
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=least))


@pytest.mark.parametrize("forced", ["tiled", None])
@pytest.mark.parametrize(
    ("name", "padding"),
    [(name, None) for name in FAMILIES] + [(n, p) for n in PADDED for p in ("left", "right")],
)
def test_outputs_and_all_gradients_equal_those_of_eager_attention(
    name, padding, forced, monkeypatch
):
    model, inputs = build(name), inputs_of(name, padding)
    expected, expected_gradients = step(model, inputs)
    report = flashpatch.apply(model, on_fallback=forbid)
    with engine(monkeypatch, forced) as calls:
        output, gradients = step(model, inputs)
    repeats = 2 if name == "albert" else 1  # its layers share one module
    assert sum(calls.values()) == report.served * repeats > 0
    assert forced is None or set(calls) == {forced}
    assert error(output, expected) < 1e-5
    assert gradients.keys() == expected_gradients.keys()
    # some gradients are zero but for rounding, such as that of the bias of the keys
    least = max(float(g.abs().max()) for g in expected_gradients.values()) / 100
    for parameter, gradient in gradients.items():
        assert error(gradient, expected_gradients[parameter], least) < 5e-5, parameter


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(
    "name",
    ["bert", "bloom", "deberta_v2", "gpt_neo", "gpt_oss", "mistral", "t5", "wav2vec2_conformer"],
)
def test_sequences_of_several_tiles_give_the_same_gradients(name, padding, monkeypatch):
    model = build(name, max_position_embeddings=640)
    inputs = inputs_of(name, padding, length=600)
    expected, expected_gradients = step(model, inputs)
    flashpatch.apply(model, on_fallback=forbid)
    with engine(monkeypatch, "tiled"):
        output, gradients = step(model, inputs)
    assert error(output, expected) < 2e-5
    least = max(float(g.abs().max()) for g in expected_gradients.values()) / 100
    for parameter, gradient in gradients.items():
        assert error(gradient, expected_gradients[parameter], least) < 1e-4, parameter


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_greedy_generation_with_a_cache_gives_the_tokens_of_eager_attention(
    name, cache, monkeypatch
):
    model = build(name)
    inputs = inputs_of(name, "left" if name in PADDED else None)
    inputs = {n: v for n, v in inputs.items() if not n.startswith("decoder")}
    asked = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    asked |= {"output_scores": True}
    expected = model.generate(**inputs, **asked, cache_implementation="dynamic")
    flashpatch.apply(model, on_fallback=forbid)
    with engine(monkeypatch, None) as calls:
        generated = model.generate(**inputs, **asked, cache_implementation=cache)
    assert calls
    assert torch.equal(generated.sequences, expected.sequences)
    for ours, theirs in zip(generated.scores, expected.scores, strict=True):
        assert error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_revert_restores_every_attribute_by_identity_and_the_logits_bit_by_bit(name):
    model, inputs = build(name, "sdpa" if name in SDPA else "eager"), inputs_of(name)
    before = output_of(model, inputs)
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    flashpatch.apply(model, on_fallback=forbid)
    output_of(model, inputs)
    flashpatch.revert(model)
    for module_name, module in model.named_modules():
        own, was = vars(module), attributes[module_name]
        assert own.keys() == was.keys()
        assert all(own[key] is was[key] for key in was), module_name
    assert torch.equal(output_of(model, inputs), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_weights_are_those_of_eager_attention_and_the_reason_is_told(name):
    model, inputs = build(name), inputs_of(name, "right" if name in PADDED else None)
    expected = model(**inputs, output_attentions=True)
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    outputs = model(**inputs, output_attentions=True)
    assert {r.name for r in reasons} == {"OUTPUT_ATTENTIONS"}
    compared = 0
    for field_name, value in expected.items():
        if field_name.endswith("attentions") and value is not None:
            ours = outputs[field_name]
            assert len(ours) == len(value)
            for a, b in zip(ours, value, strict=True):
                assert torch.equal(a, b), field_name
                compared += 1
    assert compared or FAMILIES[name].kind == "both"


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_left_alone_run_what_they_ran_before(name):
    model, inputs = build(name), inputs_of(name, "left" if name in PADDED else None)
    expected = output_of(model, inputs)
    report = flashpatch.apply(model, skip="*", on_fallback=forbid)
    assert report.served == 0
    assert SKIPPED in report.reasons
    assert {reason.name for reason in report.reasons} <= {SKIPPED.name, "NO_PATCH"}
    assert torch.equal(output_of(model, inputs), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_with_dropout_follows_the_seed_and_gives_finite_gradients(name, monkeypatch):
    model = build(name, **dict.fromkeys(DROPOUTS, 0.3)).train()
    inputs = inputs_of(name, "right" if name in PADDED else None)
    report = flashpatch.apply(model, on_fallback=forbid)
    results = []
    with engine(monkeypatch, "tiled") as calls:
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            results.append(step(model, inputs))
    assert calls["tiled"] >= 3 * report.served
    (one, gradients), (same, _), (other, _) = results
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize(
    "name",
    ["bert", "bloom", "deberta_v2", "gemma2", "gpt_neo", "gptj", "llama", "t5", "wav2vec2_bert"],
)
def test_in_bfloat16_the_error_is_at_most_twice_that_of_eager_attention(name, monkeypatch):
    model, inputs = build(name), inputs_of(name, "left")
    low = model.to(torch.bfloat16)
    inputs = {n: x.bfloat16() if x.is_floating_point() else x for n, x in inputs.items()}
    exact = {n: x.float() if x.is_floating_point() else x for n, x in inputs.items()}
    expected, expected_gradients = step(deepcopy(low).float(), exact)
    eager, eager_gradients = step(low, inputs)
    eager_gradients = {n: g.clone() for n, g in eager_gradients.items()}
    flashpatch.apply(low, on_fallback=forbid)
    with engine(monkeypatch, "tiled"):
        output, gradients = step(low, inputs)

    def distance(gradients: dict[str, torch.Tensor]) -> float:
        return sum(float((g - expected_gradients[n]).norm() ** 2) for n, g in gradients.items())

    assert error(output, expected) <= 2 * error(eager, expected) + 1e-3
    assert distance(gradients) <= 4 * distance(eager_gradients)


SDPA = [
    name
    for name, family in FAMILIES.items()
    if getattr(getattr(transformers, family.model), "_supports_sdpa", False)
]
