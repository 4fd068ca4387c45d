"""Speech, music and what listens."""

from typing import Any

import torch
from matrix.inputs import BATCH, draw, tokens
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
# A wave's convolutions with a stride of 10 instead of 320.
WAVE = {
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
# Hubert with few filters, as codecs have it beside their own encoder.
HEARING = {
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
UNHEARD = "its new codes are all alike, so that attention changes no sound: it is called itself too"
# Clap's audio tower: 8 x 8 patches in windows of 4 x 4, shifted in every other layer.
CLAP = {
    "spec_size": 32,
    "num_mel_bins": 8,
    "window_size": 4,
    "depths": [2, 2],
    "num_attention_heads": [2, 4],
    "num_hidden_layers": 2,
    "patch_embeds_hidden_size": 16,
}
ENCODEC = {
    "num_filters": 4,
    "upsampling_ratios": [2, 2],
    "hidden_size": 16,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
    "sampling_rate": 240,
    "target_bandwidths": [2.4],
}
# PyTorch warns of an even kernel.
LASR = {"subsampling_conv_channels": 8, "conv_kernel_size": 5}
PARAKEET = {"subsampling_conv_channels": 8}


# Parts of a text config.
QWEN = {"num_key_value_heads": 2, "head_dim": 8}


MUSICGEN = {
    "audio_encoder": ENCODEC,
    "decoder": {"vocab_size": 64, "pad_token_id": 64, "bos_token_id": 64},
}
CONFORMER = {"context_size": 8, "max_pos_emb": 16, "conv_kernel_size": 5, "dim_head": 8}
GRANITE = {
    "encoder_config": CONFORMER,
    "projector_config": {"encoder_hidden_size": 32},
    "window_size": 6,
    "downsample_rate": 3,
}
FASTSPEECH = {
    "speaking_speed": 10.0,
    "encoder_linear_units": 48,
    "decoder_linear_units": 48,
    "speech_decoder_postnet_units": 16,
    "duration_predictor_channels": 16,
    "energy_predictor_channels": 16,
    "pitch_predictor_channels": 16,
    "decoder_kernel_size": 7,
}


def half_a_wave(model: Any) -> dict[str, Any]:
    """Two waves, the second half as long."""
    return {"input_values": draw(BATCH, 400), "attention_mask": frames(400, 200)}


def converse(model: Any) -> dict[str, Any]:
    """A text of twelve tokens, and two voices of as many frames."""
    return {
        "input_ids": tokens(),
        "user_input_values": draw(BATCH, 1, 96),
        "moshi_input_values": draw(BATCH, 1, 96) / 2,
    }


def codes(length: int, books: int) -> Tensor:
    """Tokens of several codebooks: int64 [B, N, books]."""
    return torch.stack([tokens(length, seed) for seed in range(books)], dim=-1)


def stacked(length: int) -> dict[str, Any]:
    """Features of so many stacked frames, of which the second sound has fewer."""
    return {
        "input_features": draw(BATCH, length, 32),
        "input_features_mask": frames(length, length // 2),
    }


def listen(length: int) -> dict[str, Any]:
    """Features of sounds and a text in which they stand."""
    return {
        "input_features": draw(BATCH, 16, length),
        "input_features_mask": frames(length),
        "input_ids": torch.full((BATCH, length // 4), 90),
    }


def speak(model: Any) -> dict[str, Any]:
    """Text with a sound of 20 frames in it."""
    ids = tokens(24)
    ids[:, 2:22] = 90
    ids[:, 22] = 91
    return {
        "input_ids": ids,
        "input_values": draw(BATCH, 1, 160),
        "input_values_cutoffs": torch.full((BATCH, 1), 160),
    }


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
            "input_features": draw(BATCH, 1, 128, 8),
        },
        calls={"get_audio_features": lambda model: {"input_features": draw(BATCH, 1, 128, 8)}},
    ),
    "clap_audio_model": Row(
        config=CLAP, inputs=lambda model: {"input_features": draw(BATCH, 1, 128, 8)}
    ),
    "clvp_encoder": Row(config={"hidden_size": 64, "num_attention_heads": 2}),
    "cohere_asr": Row(
        config={"encoder_config": PARAKEET, "decoder_start_token_id": 1},
        inputs=transcribe,
        calls={
            "forward": lambda model: {**transcribe(model), "attention_mask": frames(64, 40)},
        },
    ),
    "csm": Row(
        config={
            "num_codebooks": 4,
            "text_vocab_size": 99,
            "audio_token_id": 90,
            "audio_eos_token_id": 91,
            "codebook_pad_token_id": 98,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "depth_decoder_config": {
                "num_codebooks": 4,
                "backbone_hidden_size": 32,
                "max_position_embeddings": 5,
            },
            "codec_config": MIMI,
        },
        calls={
            "forward": speak,
            "depth_decoder.forward": lambda model: {
                "input_ids": tokens(4),
                "backbone_last_hidden_state": draw(BATCH, 32),
            },
        },
    ),
    "data2vec-audio": Row(
        config={**WAVE, "conv_pos_kernel_size": 5},
        calls={"forward": half_a_wave},
    ),
    "dia": Row(
        config={"decoder_config": {"cross_num_attention_heads": 4}},
        more=lambda model: {"decoder_input_ids": codes(6, 9)},
    ),
    "dia_decoder": Row(
        inputs=lambda model: {
            "input_ids": codes(6, 9),
            "encoder_hidden_states": draw(BATCH, 10, 32),
        }
    ),
    "dots3_note_audio_encoder": Row(
        config={
            "adapter_input_size": 32,
            "adapter_out_dim": 32,
            "downsample_hidden_size": 8,
            "conv_output_size": 16,
        },
        inputs=lambda model: {
            "input_features": draw(BATCH, 16, 96),
            "chunk_sample_lengths": torch.tensor([96 * 160, 50 * 160]),
        },
    ),
    "fastspeech2_conformer": Row(config=FASTSPEECH),
    "fastspeech2_conformer_with_hifigan": Row(
        config={
            "model_config": FASTSPEECH,
            "vocoder_config": {
                "model_in_dim": 16,
                "upsample_initial_channel": 16,
                "upsample_rates": [2, 2],
                "upsample_kernel_sizes": [4, 4],
            },
        },
    ),
    "fun_asr_nano": Row(
        config={
            "adaptor_config": {"intermediate_size": 8},
            "audio_config": {"num_stacked_frames": 2, "num_timestamp_prediction_layers": 1},
            "text_config": {"num_key_value_heads": 2, "head_dim": 8},
        },
        calls={"get_audio_features": lambda model: stacked(20)},
    ),
    "fun_asr_nano_encoder": Row(
        config={"num_stacked_frames": 2, "num_timestamp_prediction_layers": 1},
        inputs=lambda model: stacked(20),
    ),
    "gemma4_audio": Row(
        config={"subsampling_conv_channels": [16, 8], "output_proj_dims": 32},
        inputs=lambda model: {"input_features": draw(BATCH, 128, 16)},
        calls={
            "forward": lambda model: {
                "input_features": draw(BATCH, 128, 16),
                "attention_mask": frames(128, 84),
            }
        },
    ),
    "glmasr": Row(
        config={
            "audio_config": {"intermediate_size": 128},
            "text_config": {"num_key_value_heads": 2},
        },
        calls={
            "get_audio_features": lambda model: {
                "input_features": draw(BATCH, 16, 64),
                "input_features_mask": frames(64, 40),
            }
        },
    ),
    "granite_speech": Row(
        config=GRANITE,
        calls={"get_audio_features": lambda model: {"input_features": draw(BATCH, 22, 32)}},
    ),
    "granite_speech5_ctc": Row(
        config={"encoder_config": {"context_size": 8, "max_position_embeddings": 16}},
        inputs=lambda model: {"input_features": draw(BATCH, 48, 64)},
        generates=False,
        because="its generate is one forward, and takes the options of generation for others",
    ),
    "granite_speech5_encoder": Row(
        config={"context_size": 8, "max_position_embeddings": 16},
        inputs=lambda model: {"input_features": draw(BATCH, 48, 64)},
        calls={
            "forward": lambda model: {
                "input_features": draw(BATCH, 48, 64),
                "attention_mask": frames(48, 36),
            }
        },
    ),
    "granite_speech_encoder": Row(
        config=CONFORMER, inputs=lambda model: {"hidden_states": draw(BATCH, 22, 32)}
    ),
    "granite_speech_plus": Row(
        config=GRANITE,
        calls={"get_audio_features": lambda model: {"input_features": draw(BATCH, 22, 32)}},
    ),
    "granite_speech_plus_encoder": Row(
        config=CONFORMER, inputs=lambda model: {"hidden_states": draw(BATCH, 22, 32)}
    ),
    "higgs_audio_v2": Row(generates=False, because="it generates codes of sound, in its own way"),
    "higgs_audio_v2_tokenizer": Row(
        config={
            "target_bandwidths": [0.3],
            "acoustic_model_config": {
                "encoder_hidden_size": 2,
                "downsampling_ratios": [8, 5, 4, 2, 3],
                "upsampling_ratios": [8, 5, 4, 2, 3],
            },
            "semantic_model_config": HEARING,
        },
        inputs=lambda model: {"input_values": draw(BATCH, 1, 5760)},
        calls={"semantic_model": lambda model: {"input_values": draw(BATCH, 3840)}},
        because=UNHEARD,
    ),
    "hubert": Row(config=WAVE, calls={"forward": half_a_wave}),
    "kyutai_speech_to_text": Row(
        config={
            "codebook_vocab_size": 65,
            "num_codebooks": 4,
            "audio_bos_token_id": 64,
            "audio_pad_token_id": 70,
            "bos_token_id": 98,
            "sliding_window": 5,
            "codec_config": MIMI,
        },
        inputs=lambda model: {"input_ids": codes(12, 5)},
        calls={
            "generate": lambda model: {
                "input_values": draw(BATCH, 1, 160),
                "do_sample": False,
                "max_new_tokens": 6,
                "return_dict_in_generate": True,
                "output_logits": True,
            }
        },
        generates=False,
        because="it generates from sound alone, and as a call here",
    ),
    "lasr_ctc": Row(
        config={"encoder_config": LASR},
        inputs=lambda model: {"input_features": draw(BATCH, 64, 16)},
        generates=False,
        because="its generate is one forward, and takes the options of generation for others",
    ),
    "lasr_encoder": Row(
        config=LASR,
        inputs=lambda model: {"input_features": draw(BATCH, 64, 16)},
        calls={
            "forward": lambda model: {
                "input_features": draw(BATCH, 64, 16),
                "attention_mask": frames(64, 40),
            }
        },
    ),
    "mimi": Row(config=MIMI, inputs=lambda model: {"input_values": draw(BATCH, 1, 160)}),
    "mimi_decoder": Row(config=MIMI, inputs=lambda model: {"latents": draw(BATCH, 32, 10)}),
    "mimi_encoder": Row(config=MIMI, inputs=lambda model: {"input_values": draw(BATCH, 1, 160)}),
    "moonshine": Row(
        config={"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
        inputs=lambda model: {
            "input_values": draw(BATCH, 384 * 8),
            "decoder_input_ids": tokens(6, seed=2),
        },
        calls={
            "forward": lambda model: {
                "input_values": draw(BATCH, 384 * 8),
                "attention_mask": frames(384 * 8, 384 * 5),
                "decoder_input_ids": tokens(6, seed=2),
            }
        },
    ),
    "moonshine_streaming": Row(
        config={
            "num_key_value_heads": 4,
            "encoder_config": {"sliding_windows": [[4, 2], [4, 0]]},
        },
        inputs=lambda model: {
            "input_values": draw(BATCH, 80 * 48),
            "decoder_input_ids": tokens(6, seed=2),
        },
        calls={
            "forward": lambda model: {
                "input_values": draw(BATCH, 80 * 48),
                "attention_mask": frames(80 * 48, 80 * 30),
                "decoder_input_ids": tokens(6, seed=2),
            }
        },
    ),
    "moshi": Row(
        config={
            "num_codebooks": 4,
            "sliding_window": 5,
            "ffn_dim": 48,
            "audio_encoder_config": MIMI,
            "depth_decoder_config": {"ffn_dim": 48, "input_size": 32, "num_codebooks": 4},
        },
        model="MoshiForConditionalGeneration",
        inputs=converse,
        calls={
            "forward": lambda model: {
                **converse(model),
                "text_labels": tokens(seed=5),
                "audio_labels": codes(12, 4).transpose(1, 2),
            }
        },
        reference="sdpa",
        because="without a mask its depth decoder's eager attention sees the future",
    ),
    "moshi_depth": Row(
        config={"input_size": 32, "ffn_dim": 48, "num_codebooks": 8},
        inputs=lambda model: {
            "input_ids": tokens(4),
            "last_hidden_state": draw(BATCH, 1, 32),
        },
        reference="sdpa",
        because="without a mask its eager attention sees the future, which sdpa does not",
    ),
    "moss_transcribe_diarize": Row(
        config={"text_config": QWEN},
        calls={
            "get_audio_features": lambda model: {
                "input_features": draw(BATCH, 16, 256),
                "input_features_mask": frames(256, 100),
                "padding_mask": None,
            }
        },
    ),
    "musicflamingo": Row(
        config={"audio_token_id": 90, "audio_bos_token_id": 91, "audio_eos_token_id": 92},
        calls={"get_audio_features": lambda model: listen(256)},
    ),
    "musicgen": Row(
        config=MUSICGEN,
        model="MusicgenForConditionalGeneration",
        more=lambda model: {"decoder_input_ids": tokens(6).repeat(4, 1)},
    ),
    "musicgen_decoder": Row(
        inputs=lambda model: {
            "input_ids": tokens(6).repeat(4, 1),
            "encoder_hidden_states": draw(BATCH, 10, 32),
        },
    ),
    "musicgen_melody": Row(
        config=MUSICGEN,
        model="MusicgenMelodyForConditionalGeneration",
        more=lambda model: {"decoder_input_ids": tokens(6).repeat(4, 1)},
    ),
    "musicgen_melody_decoder": Row(
        inputs=lambda model: {
            "input_ids": tokens(6).repeat(4, 1),
            "encoder_hidden_states": draw(BATCH, 10, 32),
        },
    ),
}
