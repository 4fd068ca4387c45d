"""DeBERTa and DeBERTa-v2: every kind of position, near and far, with masks of all kinds."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    SEWDConfig,
    SEWDModel,
)

import flashpatch
from flashpatch import dispatch
from flashpatch.masks import expand
from flashpatch.patches import deberta
from flashpatch_kernels.engines import Reason

pytestmark = pytest.mark.usefixtures("tiled_calls")

CONTENT_TO_POSITION = {"relative_attention": True, "pos_att_type": ["c2p"]}
POSITION_TO_CONTENT = {"relative_attention": True, "pos_att_type": ["p2c"]}
BOTH = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
# Settings of DeBERTa-v2. All lengths below are beyond some of their farthest distances.
V2 = {
    "no positions": {},
    "a scale without positions": {"pos_att_type": ["c2p", "p2c"]},
    "positions without a kind": {"relative_attention": True, "pos_att_type": None},
    "content to position": CONTENT_TO_POSITION | {"max_relative_positions": 6},
    "position to content": POSITION_TO_CONTENT | {"max_relative_positions": 40},
    "both": BOTH | {"max_relative_positions": 5, "norm_rel_ebd": "layer_norm"},
    "shared projections": BOTH | {"max_relative_positions": 6, "share_att_key": True},
    "buckets": BOTH | {"position_buckets": 8, "max_relative_positions": 12},
    "shared buckets": BOTH
    | {"position_buckets": 4, "max_relative_positions": 9, "share_att_key": True},
    "odd buckets": BOTH | {"position_buckets": 5, "max_relative_positions": 11},
    "buckets up to the longest": BOTH | {"position_buckets": 6},
    "buckets that grow fast": BOTH | {"position_buckets": 10, "max_relative_positions": 8},
    "two buckets": BOTH | {"position_buckets": 2, "max_relative_positions": 9},
    "convolution": BOTH
    | {"position_buckets": 6, "max_relative_positions": 9, "conv_kernel_size": 3},
}
V1 = {
    "no positions": {},
    "a scale without positions": {"pos_att_type": ["c2p", "p2c"]},
    "content to position": CONTENT_TO_POSITION | {"max_relative_positions": 6},
    "position to content": POSITION_TO_CONTENT | {"max_relative_positions": 40},
    "both": BOTH | {"max_relative_positions": 5},
}
CASES = [(DebertaV2Model, kind) for kind in V2] + [(DebertaModel, kind) for kind in V1]
LONGEST = [(DebertaV2Model, "buckets"), (DebertaModel, "both")]


def build(cls: Any, kind: str, **overrides: Any) -> Any:
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "max_position_embeddings": 64,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "vocab_size": 51,
    }
    of, kinds = (DebertaConfig, V1) if cls is DebertaModel else (DebertaV2Config, V2)
    torch.manual_seed(0)
    model = cls(of(**{**sizes, **kinds[kind], **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.ndim > 1
            parameter.normal_(0, parameter[0].numel() ** -0.5 if wide else 0.3)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
    return model


def batch(padding: str | None = "right", length: int = 23) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(2, 51, (3, length), generator=draw)}
    if padding is not None:
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, slice(5) if padding == "left" else slice(-5, None)] = 0
        mask[2, 4:9] = 0 if padding == "holes" else 1
        inputs["attention_mask"] = mask
    return inputs


def step(model: Any, inputs: dict[str, torch.Tensor], run: Any = None) -> Any:
    """The states of real tokens, and the gradient of a random projection of them."""
    model.zero_grad()
    output = (model if run is None else run)(**inputs).last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is not None:
        output = output[(mask if mask.ndim == 2 else mask.diagonal(dim1=-2, dim2=-1)) != 0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
@pytest.mark.parametrize(("cls", "kind"), CASES)
def test_outputs_and_all_gradients_equal_those_of_the_original(
    cls, kind, padding, assert_same_step
):
    model, inputs = build(cls, kind), batch(padding)
    expected = step(model, inputs)
    report = flashpatch.apply(model, on_fallback=forbid)
    assert report.served == report.total == 2
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("length", [1, 2, 6, 150])
@pytest.mark.parametrize(("cls", "kind"), [*LONGEST, (DebertaV2Model, "odd buckets")])
def test_short_and_long_texts_give_the_same_gradients(cls, kind, length, assert_same_step):
    model, inputs = build(cls, kind, max_position_embeddings=160), batch(None, length)
    expected = step(model, inputs)
    flashpatch.apply(model, on_fallback=forbid)
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("farthest", [2, 3, 4, 5, 7, 8, 12, 17, 25, 39, 128])
def test_all_distances_beyond_the_reach_have_the_embedding_of_the_last(farthest):
    module = build(DebertaV2Model, "both", num_hidden_layers=1).encoder.layer[0].attention.self
    for buckets in range(2, 24):
        module.position_buckets = module.pos_ebd_size = buckets
        module.max_relative_positions = farthest
        p = torch.zeros(2 * buckets, 3)
        _, rows, first = deberta._positions(module, 300, p)
        x = torch.zeros(300, 1)
        file = deberta._file_of(module)
        distances = file.build_relative_position(x, x, buckets, farthest)[0]
        wanted = (distances + buckets).clamp(0, 2 * buckets - 1)
        i, j = torch.arange(300)[:, None], torch.arange(300)
        assert torch.equal(rows[(j - i - first).clamp(0, len(rows) - 1)], wanted)


@pytest.mark.parametrize(("cls", "kind"), LONGEST)
def test_a_mask_of_all_pairs_is_used_as_it_is(cls, kind, assert_same_step):
    model, inputs = build(cls, kind), batch()
    pairs = inputs["attention_mask"][:, None] * inputs["attention_mask"][:, :, None]
    inputs["attention_mask"] = pairs * torch.ones_like(pairs[0]).tril()
    embeddings = model.embeddings
    model.embeddings.forward = lambda mask, **kwargs: type(embeddings).forward(
        embeddings, mask=mask.diagonal(dim1=-2, dim2=-1), **kwargs
    )
    expected = step(model, inputs)
    flashpatch.apply(model, on_fallback=forbid)
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
@pytest.mark.parametrize("cls", [DebertaV2Model, DebertaModel])
def test_the_intervals_mean_the_mask_of_the_encoder(cls, padding):
    encoder = build(cls, "both").encoder
    mask = batch(padding).get("attention_mask", torch.ones(3, 23))
    dense = expand(
        deberta.get_attention_mask(encoder, mask),
        23,
        23,
        torch.zeros(()),
        causal=False,
        additive=False,
    )
    assert dense is not None
    assert torch.equal(dense.expand(3, -1, -1, -1), encoder.get_attention_mask(mask).bool())


@pytest.mark.parametrize(("cls", "kind"), LONGEST)
def test_neither_forward_nor_backward_allocates_a_matrix_of_all_pairs(cls, kind):
    length = 1024
    model = build(cls, kind, num_attention_heads=1, max_position_embeddings=length)
    flashpatch.apply(model, on_fallback=forbid)
    inputs = batch(None, length)
    inputs["input_ids"] = inputs["input_ids"][:1]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(model, inputs)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 2 * length * length


@pytest.mark.parametrize("patterns", [{}, {"only": "*.layer.0.*"}, {"skip": "*"}])
@pytest.mark.parametrize(("cls", "kind"), [*LONGEST, (DebertaModel, "a scale without positions")])
def test_calls_that_fall_back_get_what_the_encoder_would_have_built(cls, kind, patterns):
    model, inputs = build(cls, kind), batch()
    expected = model(**inputs, output_attentions=True)
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append, **patterns)
    outputs = model(**inputs, output_attentions=True)
    assert {r.name for r in reasons} == (set() if "skip" in patterns else {"OUTPUT_ATTENTIONS"})
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    for ours, theirs in zip(outputs.attentions, expected.attentions, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("cls", "kind"), LONGEST)
def test_a_call_that_no_engine_takes_runs_the_original(cls, kind, monkeypatch):
    model, inputs = build(cls, kind), batch()
    expected = model(**inputs).last_hidden_state
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    refused = Reason("REFUSED", "for the test")
    monkeypatch.setattr(dispatch, "decide", lambda call: refused)
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert reasons == [refused] * 2


def test_heads_that_mix_their_scores_run_the_original_and_say_so():
    model, inputs = build(DebertaModel, "both", talking_head=True), batch()
    expected = model(**inputs).last_hidden_state
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert {r.name for r in reasons} == {"TALKING_HEADS"}


@pytest.mark.parametrize("argument", ["query_states", "relative_pos"])
def test_queries_and_distances_of_the_users_own_are_refused(argument):
    model = build(DebertaV2Model, "buckets")
    states = torch.randn(3, 23, 24)
    given = {
        "query_states": states.flip(1),
        "relative_pos": torch.randint(-3, 3, (1, 23, 23)),
    }[argument]
    mask = torch.ones(3, 23)
    expected = model.encoder(states, mask, **{argument: given}).last_hidden_state
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    ours = model.encoder(states, mask, **{argument: given}).last_hidden_state
    assert torch.equal(ours, expected)
    assert {r.name for r in reasons} == {"UNKNOWN_ARGUMENT"}
    assert argument in reasons[0].text


@pytest.mark.parametrize(("cls", "kind"), LONGEST)
def test_attention_alone_can_be_served_without_its_encoder(cls, kind):
    model, inputs = build(cls, kind), batch()
    expected = model(**inputs).last_hidden_state
    reasons = []
    flashpatch.apply(model.encoder.layer, on_fallback=reasons.append)
    outputs = model(**inputs).last_hidden_state
    assert torch.equal(outputs, expected)
    # distances that someone has built are never taken for those that the class would build
    assert {r.name for r in reasons} == {"UNKNOWN_ARGUMENT"}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("cls", "kind"), LONGEST)
def test_gradient_checkpointing_gives_the_same_gradients(cls, kind, reentrant, assert_same_step):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, inputs = build(cls, kind, **off).train(), batch()
    expected = step(model, inputs)
    flashpatch.apply(model, on_fallback=forbid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize(("cls", "kind"), LONGEST)
def test_compiles_without_a_graph_break(cls, kind, assert_same_step):
    model, inputs = build(cls, kind), batch()
    expected = step(model, inputs)
    flashpatch.apply(model, on_fallback=forbid)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(step(model, inputs, compiled), expected)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(("cls", "kind"), LONGEST)
def test_a_copy_of_a_patched_model_uses_its_own_weights(cls, kind, copied, assert_same_step):
    model, inputs = build(cls, kind), batch()
    flashpatch.apply(model, on_fallback=forbid)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    patched = step(other, inputs)
    flashpatch.revert(other)
    assert_same_step(patched, step(other, inputs))


def test_autocast_computes_in_its_dtype():
    # the first DeBERTa itself fails under autocast
    model, inputs = build(DebertaV2Model, "buckets"), batch()
    exact = step(model, inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, inputs)[0]
    flashpatch.apply(model, on_fallback=forbid)
    with torch.autocast("cpu", torch.bfloat16):
        output = step(model, inputs)[0]
    assert (output - exact).norm() <= 2 * (expected - exact).norm()


# SEW-D, which takes sound and whose mask is one of keys.
SOUND = {
    "distances": {"position_buckets": -1, "max_position_embeddings": 6},
    "shared buckets": {"position_buckets": 4, "max_position_embeddings": 9},
    "buckets": {"position_buckets": 4, "max_position_embeddings": 9, "share_att_key": False},
}


def build_sew_d(**overrides: Any) -> Any:
    torch.manual_seed(0)
    config = SEWDConfig(
        hidden_size=24,
        intermediate_size=20,
        num_attention_heads=3,
        num_hidden_layers=2,
        conv_dim=(8,),
        conv_kernel=(2,),
        conv_stride=(2,),
        num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=4,
        mask_time_prob=0.0,
        **overrides,
    )
    model = SEWDModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.ndim > 1
            parameter.normal_(0, parameter[0].numel() ** -0.5 if wide else 0.3)
    return model


def sound(*, padded: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    inputs = {"input_values": torch.randn(2, 92, generator=draw)}
    if padded:
        inputs["attention_mask"] = torch.ones(2, 92, dtype=torch.long)
        inputs["attention_mask"][1, 60:] = 0
    return inputs


def step_of_sound(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    model.zero_grad()
    output = model(**inputs).last_hidden_state
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", SOUND)
def test_sew_d_computes_the_same(kind, padded, assert_same_step):
    model, inputs = build_sew_d(**SOUND[kind]), sound(padded=padded)
    expected = step_of_sound(model, inputs)
    report = flashpatch.apply(model, on_fallback=forbid)
    assert report.served == report.total == 2
    assert_same_step(step_of_sound(model, inputs), expected)


def test_what_sew_d_skips_or_refuses_runs_the_original():
    model, inputs = build_sew_d(**SOUND["buckets"]), sound(padded=True)
    expected = model(**inputs, output_attentions=True)
    reasons: list[Any] = []
    flashpatch.apply(model, on_fallback=reasons.append)
    output = model(**inputs, output_attentions=True)
    assert {r.name for r in reasons} == {"OUTPUT_ATTENTIONS"}
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert all(map(torch.equal, output.attentions, expected.attentions))
    flashpatch.apply(model, skip="*", on_fallback=forbid)
    assert torch.equal(model(**inputs).last_hidden_state, expected.last_hidden_state)


def test_sew_d_drops_as_often_as_its_own_dropout_says():
    model, inputs = build_sew_d(**SOUND["buckets"], attention_dropout=0.4), sound(padded=False)
    attention = model.encoder.encoder.layer[0].attention.self
    assert deberta._probability(attention.dropout) == 0.0
    model.train()
    assert deberta._probability(attention.dropout) == 0.4
    flashpatch.apply(model, on_fallback=forbid)
    model(**inputs)
