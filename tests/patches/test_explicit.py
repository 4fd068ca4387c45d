"""Classes that compute attention themselves, which the matrix of all model types cannot build."""

import torch
from torch import Tensor, nn
from transformers import LayoutLMv2Config
from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder

import flashpatch

B, N, HIDDEN = 2, 12, 32


def step(encoder: nn.Module, x: Tensor, bbox: Tensor, mask: Tensor) -> list[Tensor]:
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
    expected = step(encoder, x, bbox, mask)
    reasons: list[object] = []
    report = flashpatch.apply(encoder, on_fallback=reasons.append)
    assert [row.class_name for row in report.rows] == ["LayoutLMv2SelfAttention"]
    for ours, theirs in zip(step(encoder, x, bbox, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not reasons
