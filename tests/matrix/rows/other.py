"""Time series, proteins, actions and the rest."""

from collections.abc import Callable
from typing import Any

import torch
from matrix.inputs import BATCH, draw, token_mask, tokens
from matrix.row import Row

HISTORY, HORIZON, LAGS = 12, 4, 7
# The sizes of the forecasters with an encoder and a decoder.
FORECASTER = {"prediction_length": HORIZON, "num_time_features": 1, "input_size": 1}


def forecast(model: Any) -> dict[str, Any]:
    """A past with what its lags need, and the future that a decoder is taught."""
    past = (BATCH, HISTORY + LAGS)
    return {
        "past_values": draw(*past),
        "past_time_features": draw(*past, 1),
        "past_observed_mask": torch.ones(past),
        "future_values": draw(BATCH, HORIZON),
        "future_time_features": draw(BATCH, HORIZON, 1),
    }


def trajectory(padding: str | None = None, steps: int = 12) -> Callable[[Any], dict[str, Any]]:
    """States, actions and returns of a game, some of its steps padding."""
    mask = {} if padding is None else {"attention_mask": token_mask(padding, steps)}
    return lambda model: {
        "states": draw(BATCH, steps, model.config.state_dim),
        "actions": draw(BATCH, steps, model.config.act_dim),
        "rewards": draw(BATCH, steps, 1),
        "returns_to_go": draw(BATCH, steps, 1),
        "timesteps": torch.arange(steps).expand(BATCH, -1),
        **mask,
    }


def past(padded: bool, length: int = 128) -> dict[str, Any]:
    """A series, the second of the batch with a patch that is missing."""
    padding = torch.zeros(BATCH, length, dtype=torch.long)
    padding[1, 32 : 64 if padded else 32] = 1
    return {"past_values": draw(BATCH, length), "past_values_padding": padding}


def robot(padded: bool) -> dict[str, Any]:
    """A camera image as four tokens, a sentence, and the actions to be made less noisy."""
    ids = tokens()
    ids[:, :4] = 90
    mask = token_mask("right") if padded else torch.ones_like(ids)
    return {
        "input_ids": ids,
        "pixel_values": draw(BATCH, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "attention_mask": mask,
        "state": draw(BATCH, 32),
        "noise": draw(BATCH, 6, 32),
        "timestep": torch.tensor([0.3, 0.7]),
    }


ROWS: dict[str, Row] = {
    "decision_transformer": Row(
        config={"max_ep_len": 32, "n_head": 2},
        inputs=trajectory(),
        calls={"forward": trajectory("left")},
    ),
    "informer": Row(
        config={**FORECASTER, "context_length": HISTORY, "encoder_layers": 2},
        inputs=forecast,
        because="with so few queries its sample of them is all of them, whatever it draws",
    ),
    "jev": Row(
        inputs=lambda model: {
            "input_ids": tokens()[:1],
            "marks": torch.tensor([[5, 12]]),
            "num_options": torch.tensor([[2, 3]]),
            "question_type_ids": torch.tensor([[0, 1]]),
        }
    ),
    "patchtsmixer": Row(
        config={"self_attn": True, "self_attn_heads": 2, "num_input_channels": 2},
        inputs=lambda model: {"past_values": draw(BATCH, 32, 2)},
    ),
    "patchtst": Row(
        config={"channel_attention": True, "num_input_channels": 3},
        inputs=lambda model: {"past_values": draw(BATCH, 32, 3)},
    ),
    "perceiver": Row(
        config={
            "num_latents": 8,
            "d_latents": 32,
            "num_self_attends_per_block": 2,
            "max_position_embeddings": 12,
        },
        model="PerceiverForMaskedLM",
        inputs=lambda model: {"input_ids": tokens()},
    ),
    "pi0": Row(
        config={
            "chunk_size": 6,
            "vlm_config": {
                "image_token_id": 90,
                "projection_dim": 32,
                "text_config": {"num_key_value_heads": 1, "head_dim": 8},
                "vision_config": {"image_size": 16, "patch_size": 8},
            },
            "dit_config": {"num_key_value_heads": 1, "head_dim": 8},
        },
        inputs=lambda model: robot(padded=False),
        calls={"forward": lambda model: robot(padded=True)},
    ),
    "time_series_transformer": Row(
        config={**FORECASTER, "context_length": HISTORY}, inputs=forecast
    ),
    "timesfm": Row(
        inputs=lambda model: {**past(padded=False), "freq": torch.zeros(BATCH, 1).long()},
        calls={
            "forward": lambda model: {**past(padded=True), "freq": torch.zeros(BATCH, 1).long()}
        },
    ),
    "timesfm2_5": Row(
        inputs=lambda model: past(padded=False),
        calls={"forward": lambda model: past(padded=True)},
    ),
}
