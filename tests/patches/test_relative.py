"""Conformers: Transformer-XL's and Shaw's vectors by distance, and what is built around them."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    SeamlessM4TConfig,
    SeamlessM4Tv2Config,
    VitsConfig,
    VitsModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
)
from transformers.models.seamless_m4t.modeling_seamless_m4t import (
    SeamlessM4TConformerSelfAttention,
    SeamlessM4TSpeechEncoder,
)
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

import flashpatch
from flashpatch import dispatch
from flashpatch.inspection import calls_interface
from flashpatch_kernels.engines import Reason

pytestmark = pytest.mark.usefixtures("tiled_calls")

SPEECH = {
    "hidden_size": 24,
    "speech_encoder_attention_heads": 3,
    "speech_encoder_intermediate_size": 20,
    "speech_encoder_layerdrop": 0.0,
    "speech_encoder_layers": 2,
    "feature_projection_input_dim": 8,
    "max_source_positions": 9,
}
WAV2VEC2 = {
    "feature_projection_input_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 20,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "max_source_positions": 9,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "output_hidden_size": 24,
}
SAMPLES = {
    "conv_dim": (16,),
    "conv_kernel": (1,),
    "conv_stride": (1,),
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 4,
    "num_feat_extract_layers": 1,
}
# How far Shaw's vectors reach, before and after.
SHAW = {"position_embeddings_type": "relative_key"}
NEAR = SHAW | {"left_max_position_embeddings": 3, "right_max_position_embeddings": 1}
FAR = SHAW | {"left_max_position_embeddings": 64, "right_max_position_embeddings": 8}
ONLY_BEFORE = SHAW | {"left_max_position_embeddings": 5, "right_max_position_embeddings": 0}
XL = {"position_embeddings_type": "relative"}
ROTARY = {"position_embeddings_type": "rotary"}
NONE = {"position_embeddings_type": None}
ADAPTED = {"add_adapter": True, "num_adapter_layers": 1}
CASES = {
    "wav2vec2_conformer-xl": (Wav2Vec2ConformerModel, XL),
    "wav2vec2_conformer-rotary": (Wav2Vec2ConformerModel, ROTARY),
    "wav2vec2_conformer-none": (Wav2Vec2ConformerModel, NONE),
    "wav2vec2_bert-near": (Wav2Vec2BertModel, NEAR),
    "wav2vec2_bert-far": (Wav2Vec2BertModel, FAR),
    "wav2vec2_bert-only_before": (Wav2Vec2BertModel, ONLY_BEFORE),
    "wav2vec2_bert-xl": (Wav2Vec2BertModel, XL),
    "wav2vec2_bert-rotary": (Wav2Vec2BertModel, ROTARY),
    "wav2vec2_bert-none": (Wav2Vec2BertModel, NONE),
    "wav2vec2_bert-adapted": (Wav2Vec2BertModel, NEAR | ADAPTED),
    "seamless_m4t-xl": (SeamlessM4TSpeechEncoder, XL),
    "seamless_m4t-rotary": (SeamlessM4TSpeechEncoder, ROTARY),
    "seamless_m4t_v2-one_chunk": (SeamlessM4Tv2SpeechEncoder, NEAR),
    "seamless_m4t_v2-chunks": (
        SeamlessM4Tv2SpeechEncoder,
        NEAR | {"speech_encoder_chunk_size": 5, "speech_encoder_left_chunk_num": 1},
    ),
    "seamless_m4t_v2-all_chunks_before": (
        SeamlessM4Tv2SpeechEncoder,
        FAR | {"speech_encoder_chunk_size": 6, "speech_encoder_left_chunk_num": -1},
    ),
}
SOME = ["wav2vec2_conformer-xl", "wav2vec2_bert-near", "seamless_m4t-xl", "seamless_m4t_v2-chunks"]
CONFIGS = {
    Wav2Vec2ConformerModel: (Wav2Vec2ConformerConfig, WAV2VEC2 | SAMPLES),
    Wav2Vec2BertModel: (Wav2Vec2BertConfig, WAV2VEC2),
    SeamlessM4TSpeechEncoder: (SeamlessM4TConfig, SPEECH),
    SeamlessM4Tv2SpeechEncoder: (SeamlessM4Tv2Config, SPEECH),
}


def original(cls: Any) -> str:
    """The attention to compare with: eager, except where it adds a boolean mask to the scores."""
    return "sdpa" if cls is SeamlessM4Tv2SpeechEncoder and cls._supports_sdpa else "eager"


def build(case: str, attention: str | None = None, **overrides: Any) -> Any:
    cls, kind = CASES[case]
    of, sizes = CONFIGS[cls]
    torch.manual_seed(0)
    config = of(**{**sizes, **kind, **overrides})
    model = cls._from_config(config, attn_implementation=attention or original(cls)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.ndim > 1
            parameter.normal_(0, parameter[0].numel() ** -0.5 if wide else 0.3)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
    return model


def batch(case: str, padding: bool = True, length: int = 23) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if CASES[case][0] is Wav2Vec2ConformerModel:
        inputs = {"input_values": torch.randn(2, length, generator=draw)}
    else:
        inputs = {"input_features": torch.randn(2, length, 8, generator=draw)}
    if padding:
        inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        inputs["attention_mask"][1, -7:] = 0
    return inputs


def step(model: Any, inputs: dict[str, torch.Tensor], run: Any = None) -> Any:
    """The output, and the gradient of a random projection of it to each parameter."""
    model.zero_grad()
    inputs = {name: x.clone() for name, x in inputs.items()}
    output = (model if run is None else run)(**inputs).last_hidden_state
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients_equal_those_of_the_original(case, padding, assert_same_step):
    model, inputs = build(case), batch(case, padding)
    expected = step(model, inputs)
    report = flashpatch.apply(model, on_fallback=forbid)
    assert report.served == report.total > 0
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("length", [1, 2, 5, 150])
@pytest.mark.parametrize("case", SOME)
def test_short_and_long_inputs_give_the_same_gradients(case, length, assert_same_step):
    model, inputs = build(case), batch(case, False, length)
    expected = step(model, inputs)
    flashpatch.apply(model, on_fallback=forbid)
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("case", SOME)
def test_neither_forward_nor_backward_allocates_a_matrix_of_all_pairs(case):
    if "chunks" in case and not asks_interface():
        pytest.skip("this transformers computes with its matrix of chunks")
    length, one_head = 1024, "speech_encoder_attention_heads"
    model = build(
        case,
        **{one_head if "seamless" in case else "num_attention_heads": 1},
        max_source_positions=length,
    )
    flashpatch.apply(model, on_fallback=forbid)
    inputs = {name: x[1:] for name, x in batch(case, True, length).items()}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(model, inputs)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < length * length  # of booleans


def asks_interface() -> bool:
    """Whether the conformers of the installed transformers ask the attention interface."""
    return calls_interface(SeamlessM4TConformerSelfAttention)


@pytest.mark.parametrize("case", SOME)
def test_the_reason_of_a_fallback_is_told_once_per_module(case):
    model, inputs = build(case, "eager"), batch(case, "chunks" not in case)
    expected = model(**inputs, output_attentions=True)
    reasons = []
    report = flashpatch.apply(model, only="encoder.*", on_fallback=reasons.append)
    outputs = model(**inputs, output_attentions=True)
    assert [r.name for r in reasons] == ["OUTPUT_ATTENTIONS"] * report.served
    if "chunks" in case and asks_interface():
        return  # eager attention adds the boolean chunks to its scores
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    for ours, theirs in zip(outputs.attentions or (), expected.attentions or (), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("patterns", [{"skip": "*"}, {"only": "*.layers.0.*"}, {}])
@pytest.mark.parametrize("case", SOME)
def test_what_is_skipped_or_refused_runs_the_original(case, patterns, monkeypatch):
    model, inputs = build(case), batch(case)
    expected = model(**inputs).last_hidden_state
    reasons = []
    report = flashpatch.apply(model, on_fallback=reasons.append, **patterns)
    refused = Reason("REFUSED", "for the test")
    monkeypatch.setattr(dispatch, "decide", lambda call: refused)
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert reasons == [refused] * report.served


def test_positions_that_differ_by_text_are_left_to_the_classs_own_forward():
    module = build("wav2vec2_bert-xl").encoder.layers[0].self_attn
    x, positions = torch.randn(2, 4, 24), torch.randn(2, 7, 24)
    expected = module(x, relative_position_embeddings=positions)[0]
    reasons = []
    flashpatch.apply(module, on_fallback=reasons.append)
    output = module(x, relative_position_embeddings=positions)[0]
    torch.testing.assert_close(output, expected)
    # the interface serves the matrix of scores that the class builds
    assert {r.name for r in reasons} == (set() if asks_interface() else {"UNKNOWN_ARGUMENT"})


@pytest.mark.parametrize("case", ["wav2vec2_conformer-xl", "wav2vec2_bert-rotary"])
def test_missing_positions_are_an_error_of_the_originals(case):
    model = build(case)
    flashpatch.apply(model, on_fallback=forbid)
    with pytest.raises(ValueError, match="relative_position_embeddings"):
        model.encoder.layers[0].self_attn(torch.randn(1, 4, 24))


@pytest.mark.parametrize("case", SOME)
def test_revert_restores_every_attribute_by_identity(case):
    model, inputs = build(case), batch(case)
    before = step(model, inputs)
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    flashpatch.apply(model, on_fallback=forbid)
    flashpatch.revert(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items()), name
    assert torch.equal(step(model, inputs)[0], before[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", SOME)
def test_gradient_checkpointing_gives_the_same_gradients(case, reentrant, assert_same_step):
    model, inputs = build(case), batch(case)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    expected = step(model, inputs)
    flashpatch.apply(model, on_fallback=forbid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("case", SOME)
def test_attention_compiles_without_a_graph_break(case):
    encoder = build(case).encoder
    module, x = encoder.layers[0].self_attn, torch.randn(2, 23, 24, requires_grad=True)
    embed = getattr(encoder, "embed_positions", None)
    positions = {} if embed is None else {"relative_position_embeddings": embed(x.detach())}
    expected = module(x, **positions)[0]
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    flashpatch.apply(encoder, on_fallback=forbid)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = compiled(x, **positions)[0]
    torch.testing.assert_close(output, expected)
    (ours,) = torch.autograd.grad(output.square().sum(), x)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("case", ["wav2vec2_bert-xl", *SOME[1:]])
def test_a_copy_of_a_patched_model_uses_its_own_weights(case, copied, assert_same_step):
    model, inputs = build(case), batch(case)
    flashpatch.apply(model, on_fallback=forbid)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    patched = step(other, inputs)
    flashpatch.revert(other)
    assert_same_step(patched, step(other, inputs))


@pytest.mark.parametrize("case", SOME)
def test_autocast_computes_in_its_dtype(case):
    model, inputs = build(case), batch(case)
    exact = step(model, inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, inputs)[0]
    flashpatch.apply(model, on_fallback=forbid)
    with torch.autocast("cpu", torch.bfloat16):
        output = step(model, inputs)[0]
    assert (output - exact).norm() <= 2 * (expected - exact).norm()


def test_the_text_side_of_seamless_is_served_where_it_asks_the_interface():
    sizes = {"vocab_size": 51, "encoder_layers": 1, "decoder_layers": 1, "hidden_size": 24}
    sizes |= {f"{side}_attention_heads": 3 for side in ("encoder", "decoder")}
    config = SeamlessM4TConfig(**SPEECH | sizes, encoder_ffn_dim=20, decoder_ffn_dim=20)
    model = transformers.SeamlessM4TForTextToText._from_config(config)
    report = flashpatch.apply(model)
    assert report.served == (report.total if asks_interface() else 0)


def build_vits(**overrides: Any) -> Any:
    """The text encoder of VITS, which is where it attends."""
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "ffn_dim": 20}
    sizes |= {"flow_size": 8, "spectrogram_bins": 9, "upsample_initial_channel": 16}
    torch.manual_seed(0)
    config = VitsConfig(**sizes, layerdrop=0.0, **overrides)
    return VitsModel._from_config(config).text_encoder.eval()


def texts(padded: bool, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 38, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0 if padded else 1
    return {"input_ids": ids, "padding_mask": mask[..., None].float(), "attention_mask": mask}


def step_of_text(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    model.zero_grad()
    output = model(**inputs).prior_means
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("window", "length"), [(4, 23), (4, 3), (2, 1)])
def test_vits_computes_the_same(window, length, padded, assert_same_step):
    model, inputs = build_vits(window_size=window), texts(padded, length)
    expected = step_of_text(model, inputs)
    report = flashpatch.apply(model, on_fallback=forbid)
    assert report.served == report.total == 2
    assert_same_step(step_of_text(model, inputs), expected)
    flashpatch.apply(model, skip="*", on_fallback=forbid)
    assert torch.allclose(step_of_text(model, inputs)[0], expected[0], atol=1e-6)


def test_the_weights_of_vits_are_the_originals():
    model, inputs = build_vits(), texts(padded=True, length=9)
    expected = model(**inputs, output_attentions=True).attentions
    reasons: list[Any] = []
    flashpatch.apply(model, on_fallback=reasons.append)
    weights = model(**inputs, output_attentions=True).attentions
    assert {r.name for r in reasons} == {"OUTPUT_ATTENTIONS"}
    assert all(map(torch.equal, weights, expected))
