"""Speech, music and what listens, N to Z."""

from typing import Any

import torch
from matrix.inputs import BATCH, draw, look, tokens
from matrix.row import Row
from torch import Tensor
from transformers import ViTConfig

FRAMES = 64


def frames(model: Any, count: int = FRAMES) -> Tensor:
    """A spectrogram, [B, T, bins]."""
    return draw(BATCH, count, look(model.config, "num_mel_bins", default=16))


def frame_mask(count: int = FRAMES, of_last: int = 40) -> Tensor:
    """Frames of two recordings, the second shorter: int64 [B, T]."""
    mask = torch.ones(BATCH, count, dtype=torch.long)
    mask[-1, of_last:] = 0
    return mask


def spectrogram(model: Any) -> dict[str, Any]:
    return {"input_features": frames(model)}


def padded_spectrogram(model: Any) -> dict[str, Any]:
    return {"input_features": frames(model), "attention_mask": frame_mask()}


# A vocabulary of 99 whose last token is the blank one, in front of few convolutions.
TRANSDUCER = {
    "blank_token_id": 98,
    "decoder_start_token_id": 98,
    "encoder_config": {"subsampling_conv_channels": 16},
}


def transducer(model: Any) -> dict[str, Any]:
    return {"input_features": frames(model), "decoder_input_ids": tokens(4)}


def padded_transducer(model: Any) -> dict[str, Any]:
    return {**transducer(model), "attention_mask": frame_mask()}


def transcribing(**exceptions: Any) -> Row:
    """A row of a model that gives tokens of sound."""
    return Row(
        config=TRANSDUCER,
        inputs=transducer,
        calls={"forward": padded_transducer, "get_audio_features": spectrogram},
        **exceptions,
    )


# A codec that makes one frame of 16 samples, and images without timm.
FEW_SAMPLES = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 2, 2, 2]}
IMAGES = ViTConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_hidden_layers=1,
    image_size=32,
    patch_size=16,
    num_labels=32,
)
# Few filters, and a window that is shorter than what is heard.
TOKENIZER = {"num_filters": 4, "sliding_window": 8, "upsample_groups": 32}


def waves() -> Tensor:
    return draw(BATCH, 1, 160)


def film() -> dict[str, Any]:
    return {"input_values": waves(), "pixel_values_videos": draw(BATCH, 6, 3, 32, 32)}


LISTENING = Row(inputs=spectrogram, calls={"forward": padded_spectrogram})
INVERTED = "it negates the mask, which eager attention would have it given as numbers to add"
WORDS = {"blank_token_id": 98}

ROWS: dict[str, Row] = {
    "nemo_speechlm": Row(
        config={
            "word_timestamp_config": WORDS,
            "text_config": {"n_groups": 2, "num_key_value_heads": 2},
        },
        calls={
            "get_audio_features": lambda model: {
                "input_features": frames(model),
                "input_features_mask": frame_mask(),
            }
        },
    ),
    "nemotron3_5_asr": transcribing(reference="sdpa", because=INVERTED),
    "nemotron3_5_transcribe_asr_audio": LISTENING,
    "nemotron3_5_transcribe_audio": Row(
        inputs=lambda model: {"input_features": frames(model)},
        calls={
            "forward": lambda model: {
                "input_features": frames(model),
                "input_features_mask": frame_mask(),
            }
        },
    ),
    "nemotron3_5_transcribe_word_timestamp": Row(config=WORDS),
    "nemotron3_diarization": LISTENING,
    "nemotron3_diarization_audio": LISTENING,
    "nemotron_asr_streaming": transcribing(reference="sdpa", because=INVERTED),
    "nemotron_asr_streaming_encoder": Row(
        config={"subsampling_conv_channels": 16},
        inputs=spectrogram,
        calls={"forward": padded_spectrogram},
        reference="sdpa",
        because=INVERTED,
    ),
    "nemotron_h_omni": Row(
        config={
            "text_config": {"n_groups": 2, "num_key_value_heads": 2},
            "vision_config": {
                "video_temporal_patch_size": 2,
                "patch_dim": 768,
                "video_patch_dim": 1536,
                "max_img_size": 128,
            },
        },
        calls={
            "get_audio_features": None,
            "get_image_features": lambda model: {
                "pixel_values": draw(32, 768),
                "image_grid_hw": torch.tensor([[4, 4], [2, 8]]),
            },
            "get_video_features": lambda model: {"pixel_values_videos": draw(4, 3, 64, 64)},
        },
        because="its default config has no audio tower",
    ),
    "parakeet_ctc": Row(
        config={"encoder_config": {"subsampling_conv_channels": 16}},
        inputs=spectrogram,
        calls={"forward": padded_spectrogram},
        generates=False,
        because="its `generate` is one `forward`, and hands attention what is meant for decoding",
    ),
    "parakeet_encoder": Row(
        config={"subsampling_conv_channels": 16},
        inputs=spectrogram,
        calls={"forward": padded_spectrogram},
    ),
    "parakeet_rnnt": transcribing(),
    "parakeet_tdt": transcribing(),
    "pe_audio": Row(
        config={"audio_config": {"dac_config": FEW_SAMPLES}},
        inputs=lambda model: {"input_ids": tokens(), "input_values": waves()},
        calls={
            "forward": lambda model: {
                "input_ids": tokens(),
                "input_values": waves(),
                "padding_mask": frame_mask(160, 96),
            }
        },
    ),
    "pe_audio_encoder": Row(
        config={"dac_config": FEW_SAMPLES},
        inputs=lambda model: {"input_values": waves()},
        calls={
            "forward": lambda model: {
                "input_values": waves(),
                "padding_mask": frame_mask(160, 96),
            }
        },
    ),
    "pe_audio_video": Row(
        config={
            "audio_video_config": {
                "audio_config": {"dac_config": FEW_SAMPLES},
                "video_config": {"vision_config": IMAGES},
            }
        },
        inputs=lambda model: {"input_ids": tokens(), **film()},
        calls={
            "forward": lambda model: {
                "input_ids": tokens(),
                **film(),
                "padding_mask": frame_mask(160, 96),
                "padding_mask_videos": frame_mask(6, 4),
            }
        },
        because="its default images need timm",
    ),
    "pe_audio_video_encoder": Row(
        config={
            "audio_config": {"dac_config": FEW_SAMPLES},
            "video_config": {"vision_config": IMAGES},
        },
        inputs=lambda model: film(),
        calls={
            "forward": lambda model: {
                **film(),
                "padding_mask": frame_mask(160, 96),
                "padding_mask_videos": frame_mask(6, 4),
            }
        },
        because="its default images need timm",
    ),
    "pe_video_encoder": Row(
        config={"vision_config": IMAGES},
        inputs=lambda model: {"pixel_values_videos": draw(BATCH, 6, 3, 32, 32)},
        calls={
            "forward": lambda model: {
                "pixel_values_videos": draw(BATCH, 6, 3, 32, 32),
                "padding_mask_videos": frame_mask(6, 4),
            }
        },
        because="its default images need timm",
    ),
    "phi4_multimodal_audio": Row(
        config={
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
            "input_size": 16,
            "nemo_final_size": 2,
        },
        inputs=lambda model: {"hidden_states": draw(BATCH, FRAMES, 16), "mask": None},
        calls={
            "forward": lambda model: {
                "hidden_states": draw(BATCH, FRAMES, 16),
                "mask": frame_mask().bool(),
            }
        },
    ),
    "pocket_tts_audio_tokenizer": Row(
        config=TOKENIZER, inputs=lambda model: {"input_values": draw(BATCH, 1, 3840)}
    ),
    "pocket_tts_audio_tokenizer_decoder": Row(
        config=TOKENIZER, inputs=lambda model: {"latents": draw(BATCH, 32, 2)}
    ),
    "pocket_tts_audio_tokenizer_encoder": Row(
        config=TOKENIZER, inputs=lambda model: {"input_values": draw(BATCH, 1, 3840)}
    ),
}
