"""Speech, music and what listens."""

from typing import Any

import torch
from matrix.inputs import BATCH, draw, token_mask, tokens
from matrix.row import Row
from torch import Tensor


def frames(length: int, short: int | None = None) -> Tensor:
    """A mask of so many frames of sound, of which the second has fewer: int64 [B, N]."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, short:] = 0 if short is not None else 1
    return mask


# Mimi with a stride of 8 instead of 1920, and a window that ends.
MIMI = {
    "num_filters": 8,
    "upsampling_ratios": [2, 2],
    "upsample_groups": 32,
    "vector_quantization_hidden_dimension": 32,
    "num_quantizers": 4,
    "sliding_window": 6,
}
# Clap's audio tower: 16 x 16 patches in windows of 4 x 4, shifted in every other layer.
CLAP = {
    "spec_size": 64,
    "num_mel_bins": 16,
    "window_size": 4,
    "depths": [2, 2],
    "num_attention_heads": [2, 4],
    "num_hidden_layers": 2,
    "patch_embeds_hidden_size": 16,
}
PARAKEET = {"subsampling_conv_channels": 8}


def transcribe(model: Any) -> dict[str, Any]:
    """Features of sound, time first, and the words so far."""
    return {
        "input_features": draw(BATCH, 64, 16),
        "decoder_input_ids": tokens(6, seed=2),
    }


ROWS: dict[str, Row] = {
    "audio-spectrogram-transformer": Row(
        config={"max_length": 64, "num_mel_bins": 32},
        inputs=lambda model: {"input_values": draw(BATCH, 64, 32)},
    ),
    "audioflamingo3_encoder": Row(
        more=lambda model: {"input_features_mask": frames(256)},
        calls={
            "forward": lambda model: {
                "input_features": draw(BATCH, 16, 256),
                "input_features_mask": frames(256, 100),
            }
        },
    ),
    "bark": Row(
        config={
            "semantic_config": {"output_vocab_size": 64},
            "coarse_acoustics_config": {"output_vocab_size": 64},
            "fine_acoustics_config": {"output_vocab_size": 99, "n_codes_total": 3},
        },
        calls={
            "forward": None,
            "semantic.forward": lambda model: {"input_ids": tokens()},
            "coarse_acoustics.forward": lambda model: {
                "input_ids": tokens(),
                "attention_mask": token_mask("left"),
            },
            "fine_acoustics.forward": lambda model: {
                "codebook_idx": 1,
                "input_ids": torch.stack([tokens(), tokens(seed=2), tokens(seed=3)], dim=-1),
            },
        },
        because="it has no forward of its own, only that of each of its three transformers",
    ),
    "canary": Row(
        config={"encoder_config": PARAKEET},
        inputs=transcribe,
        calls={
            "forward": lambda model: {**transcribe(model), "attention_mask": frames(64, 40)},
        },
    ),
    "canary_decoder": Row(
        more=lambda model: {"encoder_hidden_states": draw(BATCH, 10, 32)},
    ),
    "clap": Row(
        config={"audio_config": CLAP},
        inputs=lambda model: {
            "input_ids": tokens(),
            "input_features": draw(BATCH, 1, 256, 16),
        },
        calls={"get_audio_features": lambda model: {"input_features": draw(BATCH, 1, 256, 16)}},
    ),
    "clap_audio_model": Row(
        config=CLAP, inputs=lambda model: {"input_features": draw(BATCH, 1, 256, 16)}
    ),
    "clvp": Row(
        config={
            "text_config": {"hidden_size": 64, "num_attention_heads": 2},
            "speech_config": {"hidden_size": 64, "num_attention_heads": 2},
        },
        inputs=lambda model: {"input_ids": tokens(), "input_features": draw(BATCH, 16, 64)},
    ),
    "clvp_encoder": Row(config={"hidden_size": 64, "num_attention_heads": 2}),
    "cohere_asr": Row(
        config={"encoder_config": PARAKEET, "decoder_start_token_id": 1},
        inputs=transcribe,
        calls={
            "forward": lambda model: {**transcribe(model), "attention_mask": frames(64, 40)},
        },
    ),
    "mimi": Row(config=MIMI, inputs=lambda model: {"input_values": draw(BATCH, 1, 160)}),
    "mimi_decoder": Row(config=MIMI, inputs=lambda model: {"latents": draw(BATCH, 32, 10)}),
    "mimi_encoder": Row(config=MIMI, inputs=lambda model: {"input_values": draw(BATCH, 1, 160)}),
    "dots3_note_audio_encoder": Row(
        config={"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
        inputs=lambda model: {
            "input_features": draw(BATCH, 16, 96),
            "chunk_sample_lengths": torch.tensor([96 * 160, 50 * 160]),
        },
    ),
}
