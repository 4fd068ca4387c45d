"""Classes that write attention out: what is particular to a forward that is read."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DabDetrConfig,
    DabDetrModel,
    LayoutLMv2Config,
    ResNetConfig,
)
from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder

import flashpatch

pytestmark = pytest.mark.usefixtures("tiled_calls")

TOKENS = torch.randint(4, 51, (2, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[1, -5:] = 0

NAMES = ["codegen", "mpnet"]


def forbid(reason: Any) -> None:
    raise AssertionError(f"fell back: {reason}")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_saved_while_patched_loads_as_an_ordinary_one(tiny, name, tmp_path):
    model = tiny(name)
    expected = model.base_model(TOKENS).last_hidden_state
    flashpatch.apply(model, on_fallback=forbid)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert not any("_flashpatch" in vars(m) for m in loaded.modules())
    torch.testing.assert_close(loaded(TOKENS).last_hidden_state, expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_implementation_set_while_patched_leaves_the_results(tiny, name):
    model = tiny(name)
    expected = model(TOKENS, attention_mask=MASK).logits
    flashpatch.apply(model, on_fallback=forbid)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(TOKENS, attention_mask=MASK).logits, expected)
    flashpatch.revert(model)
    assert torch.equal(model(TOKENS, attention_mask=MASK).logits, expected)


def test_a_causal_model_without_a_mask_stays_causal(tiny):
    """Its class adds the mask it is given: none would let tokens see those after them."""
    model = tiny("codegen")
    flashpatch.apply(model, on_fallback=forbid)
    longer = model(TOKENS[:1]).logits
    shorter = model(TOKENS[:1, :9]).logits
    torch.testing.assert_close(longer[:, :9], shorter)


def test_dropout_of_an_attention_module_is_the_engines(tiny):
    model = tiny("mpnet").train()
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


def test_weights_that_a_layer_always_asks_for_are_computed_for_who_wants_them(tiled_calls):
    model = dab_detr()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = model(images, output_attentions=True)
    reasons: list[Any] = []
    flashpatch.apply(model, on_fallback=reasons.append)
    ours = model(images)
    # two layers of the encoder, and two with two attentions of the decoder
    assert len(tiled_calls) == 6
    assert not reasons
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state)
    ours = model(images, output_attentions=True)
    assert len(tiled_calls) == 6
    assert {reason.name for reason in reasons} == {"OUTPUT_ATTENTIONS"}
    torch.testing.assert_close(ours.decoder_attentions, expected.decoder_attentions)
    torch.testing.assert_close(ours.cross_attentions, expected.cross_attentions)


class Sharpened(nn.Module):
    """What somebody might put in the place of an attention's dropout."""

    def forward(self, weights: Tensor) -> Tensor:
        return weights.sqrt().softmax(dim=-1)


def test_a_call_of_which_nothing_can_be_read_says_so_and_runs_as_written(tiny, tiled_calls):
    model = tiny("mpnet")
    model.mpnet.encoder.layer[1].attention.attn.dropout = Sharpened()
    expected = model.base_model(TOKENS, attention_mask=MASK).last_hidden_state
    reasons = []
    flashpatch.apply(model, on_fallback=reasons.append)
    ours = model.base_model(TOKENS, attention_mask=MASK).last_hidden_state
    assert [reason.name for reason in reasons] == ["UNREAD"]
    assert len(tiled_calls) == 1
    torch.testing.assert_close(ours, expected)
