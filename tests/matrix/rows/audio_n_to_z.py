"""Speech, music and what listens, N to Z."""

from dataclasses import replace
from typing import Any

import torch
from matrix.inputs import BATCH, LENGTH, draw, inputs_by_name, look, tokens
from matrix.row import Row
from matrix.rows.audio import HEARING, UNHEARD
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


# Qwen's three axes of positions for heads of 8, and windows of two chunks of a hundred frames.
SECTIONS = {"rope_theta": 1000000.0, "rope_type": "default", "mrope_section": [2, 1, 1]}
FEW_CHUNKS = {"n_window_infer": 200}
# Chunks of a power of two: a GPU divides lengths by multiplying, and finds more than 5 in 300 / 60.
SHORT_CHUNKS = {"n_window": 32}
OMNI_THINKER = {
    "vision_start_token_id": 98,
    "audio_config": SHORT_CHUNKS,
    "vision_config": {"fullatt_block_indexes": [1]},
    "text_config": {"rope_parameters": SECTIONS},
}
MOE_THINKER = {
    "vision_start_token_id": 98,
    "audio_config": FEW_CHUNKS,
    "vision_config": {"deepstack_visual_indexes": [0]},
    "text_config": {"rope_parameters": SECTIONS},
}
MOE_TALKER = {"rope_parameters": SECTIONS, "shared_expert_intermediate_size": 48}
DIT = {
    "block_size": 4,
    "look_ahead_layers": [1],
    "look_backward_layers": [0],
    "num_embeds": 99,
    "enc_channels": [32, 32, 32, 32, 96],
    "enc_attention_channels": 16,
    "enc_se_channels": 16,
}
VOCODER = {
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "upsample_rates": [5, 3],
    "upsample_kernel_sizes": [11, 7],
}


def wave_inputs(model: Any) -> dict[str, Any]:
    """Few codes to be made sound of, in few steps."""
    return {
        "code": tokens(LENGTH // 2),
        "conditioning": draw(BATCH, 32),
        "reference_mel": draw(BATCH, 10, 32),
        "num_steps": 3,
    }


def heard(model: Any) -> dict[str, Any]:
    return {"input_features": draw(BATCH, 16, 300), "feature_attention_mask": frame_mask(300, 140)}


def heard_long(model: Any) -> dict[str, Any]:
    return {"input_features": draw(BATCH, 16, 300), "input_features_mask": frame_mask(300, 140)}


def seen(model: Any) -> dict[str, Any]:
    return inputs_by_name(model.thinker, "get_image_features")


def chunks(model: Any) -> dict[str, Any]:
    """Two recordings one behind the other."""
    return {"input_features": draw(16, 440), "feature_lens": torch.tensor([300, 140])}


# Few convolutions in front, which make one token of 20 samples.
SPEECH = {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
SPEAKING = Row(
    config=SPEECH,
    inputs=lambda model: {"input_values": draw(BATCH, 400)},
    calls={
        "forward": lambda model: {
            "input_values": draw(BATCH, 400),
            "attention_mask": frame_mask(400, 250),
        }
    },
)
TEXT_FIRST = "the class that is found first has no conformers"
HEARD_BY_CONFORMERS: dict[str, Any] = {
    "inputs": lambda model: {
        "input_features": draw(BATCH, FRAMES, 32),
        "decoder_input_ids": tokens(LENGTH // 2),
    },
    "calls": {
        "forward": lambda model: {
            "input_features": draw(BATCH, FRAMES, 32),
            "decoder_input_ids": tokens(LENGTH // 2),
            "attention_mask": frame_mask(),
        }
    },
}
FEW_FILTERS = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
CODEC = Row(
    config={"encoder_hidden_size": 2, "quantization_dim": 64},
    inputs=lambda model: {
        "input_values": draw(BATCH, 1, 2560),
        "input_features": draw(BATCH, 8, 32),
    },
)
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
    "neucodec": CODEC,
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
    "pop2piano": Row(generates=False, because="it generates from a spectrogram, for a composer"),
    "qwen2_5_omni": Row(
        config={
            "thinker_config": OMNI_THINKER,
            "talker_config": {"rope_parameters": SECTIONS},
            "token2wav_config": {"dit_config": DIT, "bigvgan_config": VOCODER},
        },
        calls={
            "forward": None,
            "thinker": lambda model: {"input_ids": tokens()},
            "thinker.get_audio_features": heard,
            "thinker.get_image_features": seen,
            "talker.model": lambda model: {"inputs_embeds": draw(BATCH, LENGTH, 32)},
            "token2wav": wave_inputs,
        },
        because="it has no `forward`: its parts are called one by one",
    ),
    "qwen2_5_omni_audio_encoder": Row(config=SHORT_CHUNKS, inputs=chunks),
    "qwen2_5_omni_dit": Row(
        config=DIT,
        inputs=lambda model: {
            "hidden_states": draw(BATCH, LENGTH, 32),
            "condition_vector": draw(BATCH, 10, 32),
            "speaker_embedding": draw(BATCH, LENGTH, 32),
            "quantized_code": tokens(LENGTH // 2),
            "time_step": torch.tensor(0.5),
        },
        reference="sdpa",
        because="it has no eager attention",
    ),
    "qwen2_5_omni_talker": Row(config={"rope_parameters": SECTIONS}),
    "qwen2_5_omni_text": Row(config={"rope_parameters": SECTIONS}),
    "qwen2_5_omni_thinker": Row(config=OMNI_THINKER, calls={"get_audio_features": heard}),
    "qwen2_5_omni_token2wav": Row(
        config={"dit_config": DIT, "bigvgan_config": VOCODER}, inputs=wave_inputs
    ),
    "qwen2_audio": Row(
        calls={"model.audio_tower": lambda model: {"input_features": draw(BATCH, 16, 256)}}
    ),
    "qwen3_asr": Row(config={"audio_config": FEW_CHUNKS}, calls={"get_audio_features": heard_long}),
    "qwen3_asr_encoder": Row(config=FEW_CHUNKS, inputs=heard_long),
    "qwen3_omni_moe": Row(
        config={
            "thinker_config": MOE_THINKER,
            "talker_config": {
                "text_config": MOE_TALKER,
                "spatial_merge_size": 2,
                "code_predictor_config": {"num_code_groups": 4},
            },
            "code2wav_config": {
                "num_quantizers": 4,
                "decoder_dim": 16,
                "upsample_rates": [2],
                "upsampling_ratios": [2],
                "sliding_window": 4,
            },
        },
        calls={
            "forward": None,
            "thinker": lambda model: {"input_ids": tokens()},
            "thinker.get_audio_features": heard,
            "thinker.get_image_features": seen,
            "talker": lambda model: {"inputs_embeds": draw(BATCH, LENGTH, 32)},
            "talker.code_predictor": lambda model: {"inputs_embeds": draw(BATCH, 4, 32)},
            "code2wav": lambda model: {"codes": tokens(4 * LENGTH).view(BATCH, 4, LENGTH)},
        },
        because="it has no `forward`: its parts are called one by one",
    ),
    "qwen3_omni_moe_audio_encoder": Row(config=FEW_CHUNKS, inputs=chunks),
    "qwen3_omni_moe_talker_code_predictor": Row(
        config={"num_code_groups": 4},
        inputs=lambda model: {"inputs_embeds": draw(BATCH, LENGTH, 32)},
    ),
    "qwen3_omni_moe_talker_text": Row(
        config=MOE_TALKER, inputs=lambda model: {"inputs_embeds": draw(BATCH, LENGTH, 32)}
    ),
    "qwen3_omni_moe_thinker": Row(config=MOE_THINKER, calls={"get_audio_features": heard}),
    "seamless_m4t": Row(
        model="SeamlessM4TForSpeechToText", **HEARD_BY_CONFORMERS, because=TEXT_FIRST
    ),
    "seamless_m4t_v2": Row(
        model="SeamlessM4Tv2ForSpeechToText",
        config={"speech_encoder_chunk_size": 16, "speech_encoder_left_chunk_num": 1},
        **HEARD_BY_CONFORMERS,
        reference="sdpa",
        because=f"{TEXT_FIRST}, and eager attention adds their mask of chunks, which is boolean",
    ),
    "sew": SPEAKING,
    "sew-d": replace(SPEAKING, config={**SPEECH, "position_buckets": 8}),
    "speech-encoder-decoder": Row(
        config={"encoder": SPEECH, "decoder_start_token_id": 1},
        inputs=lambda model: {"input_values": draw(BATCH, 400), "decoder_input_ids": tokens(6)},
    ),
    "speech_to_text": Row(
        config={"conv_channels": 16, "input_feat_per_channel": 16},
        inputs=transducer,
        calls={"forward": padded_transducer},
    ),
    "speecht5": Row(config=SPEECH),
    "unispeech": SPEAKING,
    "unispeech-sat": SPEAKING,
    "vibevoice": Row(
        config={
            "audio_config": FEW_FILTERS,
            "semantic_model_config": FEW_FILTERS,
        },
        calls={"get_audio_features": None},
        generates=False,
        because="its sound meets no attention, and to generate sound it needs diffusers",
    ),
    "vibevoice_asr": Row(
        config={
            "acoustic_tokenizer_encoder_config": FEW_FILTERS,
            "semantic_tokenizer_encoder_config": FEW_FILTERS,
        },
        calls={"get_audio_features": None},
        because="its sound meets no attention",
    ),
    "voxtral": Row(
        config={"audio_config": {"intermediate_size": 128}},
        calls={"get_audio_features": lambda model: {"input_features": draw(BATCH, 16, 256)}},
    ),
    "voxtral_realtime": Row(
        config={"audio_config": {"sliding_window": 8}, "text_config": {"sliding_window": 6}},
        inputs=lambda model: {
            "input_ids": tokens(),
            "input_features": draw(BATCH, 16, 8 * LENGTH),
        },
        calls={
            "get_audio_features": lambda model: {"input_features": draw(BATCH, 16, 8 * LENGTH)},
            "generate": lambda model: {
                "input_ids": tokens(8),
                "input_features": draw(BATCH, 16, 8 * LENGTH),
                "do_sample": False,
                "max_new_tokens": 4,
                "output_logits": True,
                "return_dict_in_generate": True,
            },
        },
        generates=False,
        because="it is to generate a token for each piece of sound, of which a call has no more",
    ),
    "voxtral_realtime_text": Row(
        config={"sliding_window": 6},
        model="VoxtralRealtimeTextModel",
        more=lambda model: {"t_cond": draw(1, 32)},
    ),
    "wav2vec2": SPEAKING,
    "wav2vec2-bert": Row(
        inputs=lambda model: {"input_features": draw(BATCH, FRAMES, 32)},
        calls={
            "forward": lambda model: {
                "input_features": draw(BATCH, FRAMES, 32),
                "attention_mask": frame_mask(),
            }
        },
    ),
    "wav2vec2-conformer": SPEAKING,
    "wavlm": SPEAKING,
    "whisper": Row(
        model="WhisperForConditionalGeneration",
        config={"decoder_start_token_id": 1},
        inputs=lambda model: {
            "input_features": draw(BATCH, 16, 256),
            "decoder_input_ids": tokens(LENGTH // 2),
        },
        because="the class that is found first is its decoder alone",
    ),
    "xcodec": Row(
        config={
            "codebook_dim": 64,
            "acoustic_model_config": {"encoder_hidden_size": 2},
            "semantic_model_config": HEARING,
        },
        inputs=lambda model: {"input_values": draw(BATCH, 1, 3200)},
        calls={"semantic_model": lambda model: {"input_values": draw(BATCH, 3200)}},
        because=UNHEARD,
    ),
    "xcodec2": CODEC,
}
