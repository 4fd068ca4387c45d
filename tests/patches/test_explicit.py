"""Classes that write attention out: what is particular to a forward that is read."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CodeGenConfig,
    CodeGenForCausalLM,
    DabDetrConfig,
    DabDetrModel,
    LayoutLMv2Config,
    MPNetConfig,
    MPNetForMaskedLM,
    ResNetConfig,
)
from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder

import flashpatch
from flashpatch import dispatch
from flashpatch_kernels.engines import TILED

TOKENS = torch.randint(4, 51, (2, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[1, -5:] = 0


def codegen() -> Any:
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 64}
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    torch.manual_seed(0)
    return CodeGenForCausalLM(CodeGenConfig(vocab_size=51, **sizes, **quiet)).eval()


def mpnet() -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    return MPNetForMaskedLM(
        MPNetConfig(vocab_size=51, intermediate_size=48, **sizes, **quiet)
    ).eval()


BUILDERS = [codegen, mpnet]


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the tiled engine, which gets all of them."""
    calls: list[str] = []
    run = dispatch.run

    def counted(q: Any, k: Any, v: Any, options: Any, name: str) -> Any:
        calls.append(name)
        return run(q, k, v, options, name)

    monkeypatch.setattr(dispatch, "run", counted)
    monkeypatch.setattr(dispatch, "choose", lambda call: TILED)
    return calls


def step(model: Any, run: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    inputs = {"input_ids": TOKENS, "attention_mask": MASK, "labels": TOKENS}
    loss = (model if run is None else run)(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, engine):
    model = codegen().train()
    expected = step(model)
    flashpatch.apply(model, on_fallback=forbid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(step(model), expected)
    assert len(engine) == 4  # two layers, and each once more in the backward pass


@pytest.mark.parametrize("build", BUILDERS)
def test_compiles_without_a_graph_break(build, engine):
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
    if not hooked_first:
        flashpatch.apply(model, on_fallback=forbid)
    names = ("CodeGenAttention", "MPNetSelfAttention")
    attention = [m for m in model.modules() if type(m).__name__ in names]
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


@pytest.mark.parametrize("build", BUILDERS)
def test_a_model_saved_while_patched_loads_as_an_ordinary_one(build, tmp_path):
    model = build()
    expected = model.base_model(TOKENS).last_hidden_state
    flashpatch.apply(model, on_fallback=forbid)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert not any("_flashpatch" in vars(m) for m in loaded.modules())
    torch.testing.assert_close(loaded(TOKENS).last_hidden_state, expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_an_implementation_set_while_patched_leaves_the_results(build):
    model = build()
    expected = model(TOKENS, attention_mask=MASK).logits
    flashpatch.apply(model, on_fallback=forbid)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(TOKENS, attention_mask=MASK).logits, expected)
    flashpatch.revert(model)
    assert torch.equal(model(TOKENS, attention_mask=MASK).logits, expected)


def test_a_causal_model_without_a_mask_stays_causal(engine):
    """Its class adds the mask it is given: none would let tokens see those after them."""
    model = codegen()
    flashpatch.apply(model, on_fallback=forbid)
    longer = model(TOKENS[:1]).logits
    shorter = model(TOKENS[:1, :9]).logits
    torch.testing.assert_close(longer[:, :9], shorter)


def test_dropout_of_an_attention_module_is_the_engines(engine):
    model = mpnet().train()
    for module in model.modules():
        if type(module).__name__ == "MPNetSelfAttention":
            module.dropout.p = 0.5
    flashpatch.apply(model, on_fallback=forbid)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(model(TOKENS).logits)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


B, N, HIDDEN = 2, 12, 32


def encoder_step(encoder: nn.Module, x: Tensor, bbox: Tensor, mask: Tensor) -> list[Tensor]:
    """Output and gradients."""
    encoder.zero_grad()
    x = x.clone().requires_grad_()
    places = torch.arange(N).expand(B, -1)
    out = encoder(x, mask, bbox=bbox, position_ids=places).last_hidden_state
    (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
    assert x.grad is not None
    grads = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *grads]


def test_layoutlmv2_adds_biases_of_places_in_the_text_and_on_the_page():
    torch.manual_seed(0)
    config = LayoutLMv2Config(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    encoder = LayoutLMv2Encoder(config)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.3)
    x, bbox = torch.randn(B, N, HIDDEN), torch.randint(0, 99, (B, N, 4))
    mask = torch.zeros(B, 1, 1, N)
    mask[1, ..., 8:] = torch.finfo(torch.float32).min
    expected = encoder_step(encoder, x, bbox, mask)
    reasons: list[object] = []
    report = flashpatch.apply(encoder, on_fallback=reasons.append)
    assert [row.class_name for row in report.rows] == ["LayoutLMv2SelfAttention"]
    for ours, theirs in zip(encoder_step(encoder, x, bbox, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not reasons


def dab_detr() -> Any:
    backbone = ResNetConfig(
        depths=[1, 1, 1, 1],
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        layer_type="basic",
        out_features=["stage4"],
    )
    sizes = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in LAYERS.items()}
    torch.manual_seed(0)
    config = DabDetrConfig(backbone_config=backbone, hidden_size=32, num_queries=5, **sizes)
    return DabDetrModel._from_config(config, attn_implementation="eager").eval()


LAYERS = {"layers": 2, "ffn_dim": 48}


def test_weights_that_a_layer_always_asks_for_are_computed_for_who_wants_them(engine):
    model = dab_detr()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = model(images, output_attentions=True)
    reasons: list[Any] = []
    flashpatch.apply(model, on_fallback=reasons.append)
    ours = model(images)
    # two layers of the encoder, and two with two attentions of the decoder
    assert len(engine) == 6
    assert not reasons
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state)
    ours = model(images, output_attentions=True)
    assert len(engine) == 10  # the decoder's are served nevertheless
    assert {reason.name for reason in reasons} == {"OUTPUT_ATTENTIONS"}
    torch.testing.assert_close(ours.decoder_attentions, expected.decoder_attentions)
    torch.testing.assert_close(ours.cross_attentions, expected.cross_attentions)
