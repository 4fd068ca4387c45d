"""Models of text alone."""

from typing import Any

import torch
from matrix.inputs import BATCH, LENGTH, draw, tokens
from matrix.row import Row
from torch import Tensor
from transformers import ViTConfig

DENSE_AND_SPARSE = ["dense", "sparse"]
PATCHES = 4  # of BLT's bytes


def additive(seen: Tensor) -> Tensor:
    """A mask of numbers, [1, 1, N, M], as a model gives its parts."""
    hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return hidden[None, None]


def causal() -> Tensor:
    return additive(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())


def patch_of_byte() -> Tensor:
    return torch.arange(LENGTH) // (LENGTH // PATCHES)


def bytes_and_patches(model: Any) -> Tensor:
    """A mask by which each byte meets the parts of its own patch."""
    patch_of_part = torch.arange(PATCHES * model.config.cross_attn_k) // model.config.cross_attn_k
    return additive(patch_of_byte()[:, None] == patch_of_part)


def blt_encoder(model: Any) -> dict[str, Any]:
    return {
        "input_ids": tokens(),
        "attention_mask": causal(),
        "encoder_attention_mask": bytes_and_patches(model).transpose(2, 3),
        "num_patches": PATCHES,
        "patch_ids": patch_of_byte().expand(BATCH, -1),
    }


def blt_decoder(model: Any) -> dict[str, Any]:
    return {
        "inputs_embeds": draw(BATCH, LENGTH, model.config.hidden_size),
        "patch_embeds": draw(BATCH, PATCHES, model.config.hidden_size_global),
        "attention_mask": causal(),
        "encoder_attention_mask": bytes_and_patches(model),
    }


def documents(model: Any) -> dict[str, Any]:
    """What RAG has retrieved for each question."""
    n = model.config.n_docs
    ids = tokens().repeat(n, 1)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    return {
        "context_input_ids": ids,
        "context_attention_mask": mask,
        "decoder_input_ids": tokens(6, seed=2),
        "doc_scores": draw(BATCH, n),
    }


def picture_and_sound(model: Any) -> dict[str, Any]:
    """Phi-4's: an image with one crop of it, and a sound, before a text."""
    vision, audio = model.config.vision_config, model.config.audio_config
    side, sounds = vision.image_size, 8
    patches = side // vision.patch_size
    # two rows of two and a separator each, for the crop and the whole; between them another
    images = 2 * (2 * 3) + 1
    prefix = [vision.image_token_id] * images + [audio.audio_token_id] * sounds
    return {
        "input_ids": torch.cat((torch.tensor(prefix).expand(BATCH, -1), tokens(6)), dim=1),
        "image_pixel_values": draw(BATCH, 2, 3, side, side),
        "image_sizes": torch.tensor([[side, side]] * BATCH),
        "image_attention_mask": torch.ones(BATCH, 2, patches, patches, dtype=torch.long),
        "audio_input_features": draw(BATCH, sounds * audio.time_reduction, audio.input_size),
        "audio_embed_sizes": torch.tensor([sounds] * BATCH),
    }


def one_video(model: Any) -> dict[str, Any]:
    side = model.config.max_img_size
    return {
        "input_ids": tokens()[:1],
        "pixel_values": draw(1, model.config.num_frames, 3, side, side),
    }


ROWS: dict[str, Row] = {
    "axk2": Row({"index_topk": 4}),
    "bamba": Row(
        {"attn_layer_indices": [1], "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    ),
    "blt": Row(
        {
            "decoder_config": {"hidden_size_global": 32},
            "encoder_config": {"hidden_size_global": 32, "sliding_window": 4},
            "encoder_hash_byte_group_vocab": 50,
            "global_config": {"encoder_cross_output_size": 64},
            "use_cache": False,
        },
        more=lambda model: {"use_cache": False},
        paddings=("right",),
        because="patches of padding on the left are seen; no cache can be made from its config",
    ),
    "blt_global_transformer": Row(
        inputs=lambda model: {
            "inputs_embeds": draw(BATCH, LENGTH, model.config.hidden_size),
            "attention_mask": causal(),
        }
    ),
    "blt_local_decoder": Row({"hidden_size_global": 32}, inputs=blt_decoder),
    "blt_local_encoder": Row(inputs=blt_encoder),
    "cohere_compass_text": Row(
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0}
                for kind in ("full_attention", "sliding_attention")
            },
            "sliding_window": 4,
        }
    ),
    "colmodernvbert": Row(
        {"vlm_config": {"image_token_id": 98, "pixel_shuffle_factor": 2}},
        more=lambda model: {
            "input_ids": torch.cat((torch.full((BATCH, 4), 98), tokens()), dim=1),
            "pixel_values": draw(BATCH, 1, 3, 64, 64),
        },
    ),
    "dbrx": Row({"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}}),
    "deepseek_v2": Row({"num_experts_per_tok": 2}),
    "deepseek_v32": Row({"index_topk": 4, "mlp_layer_types": DENSE_AND_SPARSE}),
    "deepseek_v4": Row(
        {
            "compress_rates": {
                "compressed_sparse_attention": 4,
                "heavily_compressed_attention": 6,
            },
            "index_topk": 2,
            "layer_types": [
                "sliding_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "num_hidden_layers": 3,
            "sliding_window": 4,
        }
    ),
    "diffusion_gemma_text": Row(
        {
            "global_head_dim": 16,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "sliding_window": 4,
            "top_k_experts": 2,
        }
    ),
    "doge": Row({"keep_window_size": 4}),
    "dots1": Row(
        {
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
        }
    ),
    "dots3_note_text": Row(
        {
            "index_topk": 4,
            "mlp_layer_types": DENSE_AND_SPARSE,
            "per_layer_config": {
                1: {
                    "head_dim": 20,
                    "kv_lora_rank": 32,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "qk_nope_head_dim": 12,
                }
            },
            "sliding_window": 4,
        }
    ),
    "embedding_gemma2_text": Row({"global_head_dim": 16, "sliding_window": 4}),
    "glm_moe_dsa": Row(
        {
            "index_topk": 4,
            "indexer_types": ["full", "shared"],
            "mlp_layer_types": DENSE_AND_SPARSE,
        }
    ),
    "gpt_neo": Row({"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "granitemoehybrid": Row(
        {
            "layer_types": ["linear_attention", "full_attention"],
            "mamba_chunk_size": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
        }
    ),
    "hunyuan_v1_dense": Row({"head_dim": 8}),
    "hunyuan_v1_moe": Row({"head_dim": 8, "moe_topk": 2, "num_experts": 4}),
    "hy_v4": Row({"index_topk": 4, "indexer_types": ["full", "shared"]}),
    "jamba": Row({"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 2}),
    "kimi_linear": Row({"num_experts_per_token": 2}),
    "lfm2_moe": Row({"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "llama4_vision_model": Row({"intermediate_size": 128}),
    "longcat_flash": Row({"qk_head_dim": 16, "zero_expert_num": 2, "n_routed_experts": 4}),
    "minimax_m3_vl": Row(
        {
            "text_config": {
                "index_block_size": 3,
                "index_topk_blocks": 2,
                "layer_types": ["full_attention", "minimax_m3_sparse"],
            }
        },
        paddings=("right",),
        because="its indexer scores padding too: on the left it takes the place of keys",
    ),
    "ministral": Row({"head_dim": 8, "sliding_window": 4}),
    "mistral4": Row({"head_dim": 16}),
    "mistral_large4_text": Row(
        {"index_topk": 4, "indexer_types": ["full", "shared"], "no_rope_layers": [1, 0]}
    ),
    "mobilebert": Row(
        {"intra_bottleneck_size": 32, "normalization_type": "layer_norm"},
        because="its default is no norm, by which rounding grows from layer to layer",
    ),
    "nemotron": Row({"num_key_value_heads": 2}),
    "nemotron_h": Row({"n_groups": 2}),
    "nllb-moe": Row({"decoder_sparse_step": 2, "encoder_sparse_step": 2}),
    "pe_video": Row(
        {
            "video_config": {
                "vision_config": ViTConfig(
                    hidden_size=32,
                    image_size=16,
                    intermediate_size=48,
                    num_attention_heads=4,
                    num_hidden_layers=1,
                    num_labels=8,
                    patch_size=4,
                )
            }
        },
        because="its default vision model is timm's",
    ),
    "phi4_multimodal": Row(
        {
            "audio_config": {
                "audio_token_id": 97,
                "depthwise_separable_out_channel": 32,
                "ext_pw_out_channel": 32,
                "input_size": 16,
                "nemo_conv_channels": 8,
                "nemo_final_size": 2,
            },
            "vision_config": {
                "crop_size": 16,
                "image_size": 16,
                "image_token_id": 98,
                "patch_size": 4,
            },
        },
        calls={"forward": picture_and_sound},
    ),
    "rag": Row(
        {"n_docs": 2},
        inputs=documents,
        calls={"question_encoder": lambda model: {"input_ids": tokens()}},
    ),
    "recurrent_gemma": Row({"attention_window_size": 4, "block_types": ["recurrent", "attention"]}),
    "t5gemma2": Row(
        {
            "decoder": {"sliding_window": 4},
            "encoder": {"mm_tokens_per_image": 4, "text_config": {"sliding_window": 4}},
        }
    ),
    "t5gemma2_decoder": Row(
        {"dropout_rate": 0.0, "sliding_window": 4},
        more=lambda model: {
            "encoder_hidden_states": draw(BATCH, LENGTH + 2, model.config.hidden_size)
        },
    ),
    "t5gemma2_encoder": Row(
        {
            "image_token_index": 98,
            "mm_tokens_per_image": 4,
            "text_config": {"dropout_rate": 0.0, "sliding_window": 4},
        },
        more=lambda model: {"input_ids": torch.cat((torch.full((BATCH, 4), 98), tokens()), dim=1)},
    ),
    "t5gemma2_text": Row({"dropout_rate": 0.0, "sliding_window": 4}),
    "tvp": Row(
        {"max_img_size": 64, "num_frames": 2, "visual_prompt_size": 4},
        inputs=one_video,
        because="it takes one video at a time, and puts tokens of its own before the text",
    ),
    "xmod": Row({"default_language": "en_XX"}),
    "zamba": Row(
        {
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "mamba_dt_rank": 2,
            "num_hidden_layers": 3,
        }
    ),
    "zamba2": Row(
        {
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "mamba_d_state": 8,
            "num_hidden_layers": 3,
        }
    ),
}
