"""What the tests of families that compute attention within `forward` share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MPNetConfig,
    MPNetForMaskedLM,
)


def _assert_same_step(ours: Any, theirs: Any) -> None:
    """Compares outputs, and the gradients of all parameters by their names."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    # some gradients are zero but for rounding, such as that of the bias of the keys
    least = max(float(g.abs().max()) for g in theirs[1].values()) / 100
    for name, gradient in theirs[1].items():
        error = float((ours[1][name] - gradient).abs().max())
        assert error <= 5e-5 * max(float(gradient.abs().max()), least), name


@pytest.fixture(scope="session")
def assert_same_step() -> Callable[[Any, Any], None]:
    return _assert_same_step


# Models without dropout, of two layers each: name -> model class, config class, sizes.
TINY: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bloom": (BloomForCausalLM, BloomConfig, {"hidden_size": 36, "n_head": 3, "n_layer": 2}),
    "codegen": (
        CodeGenForCausalLM,
        CodeGenConfig,
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 64},
    ),
    "gpt_neo": (
        GPTNeoForCausalLM,
        GPTNeoConfig,
        {
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": 0,
            "eos_token_id": 1,
            "hidden_size": 32,
            "max_position_embeddings": 64,
            "num_heads": 2,
            "num_layers": 2,
            "window_size": 5,
        },
    ),
    "gptj": (
        GPTJForCausalLM,
        GPTJConfig,
        {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64, "rotary_dim": 8},
    ),
    "mpnet": (
        MPNetForMaskedLM,
        MPNetConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
    ),
}


def _tiny(name: str, **overrides: Any) -> Any:
    """A model of `TINY` with random weights, in evaluation mode."""
    cls, config, sizes = TINY[name]
    torch.manual_seed(0)
    model = cls(config(vocab_size=51, **{**sizes, **overrides})).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    return _tiny
