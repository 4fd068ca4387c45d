"""Models of text and images or sound together, whose types begin with A to G."""

from typing import Any

import torch
from matrix.inputs import BATCH, draw, grid, patches_of, pixels, tokens
from matrix.row import Row
from torch import Tensor

IMAGE = 70  # the token that stands for an image's features: none that is drawn
AUDIO = 90  # and that for a sound's


def around_image(count: int, seed: int = 1) -> Tensor:
    """Tokens of text, and between them as many as an image has features."""
    ids = tokens(count + 12, seed)
    ids[:, 6 : 6 + count] = IMAGE
    return ids


def seen_and_heard() -> Tensor:
    """Tokens of text, and between them an image of four and a sound of four."""
    ids = around_image(8)
    ids[:, 10:14] = AUDIO
    return ids


def with_image(count: int) -> Any:
    """Arguments with an image for each sequence, of so many features."""
    return lambda model: {"input_ids": around_image(count), "pixel_values": pixels(model)}


def with_square_grids(model: Any) -> dict[str, Any]:
    """An image of four by four patches for each sequence, of which two by two are merged."""
    return {
        "input_ids": around_image(4),
        "pixel_values": draw(BATCH, 16, patches_of(model).shape[-1]),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    }


def emu_image(model: Any) -> dict[str, Any]:
    """An image for each sequence, and how large it is."""
    return {"pixel_values": draw(BATCH, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * BATCH)}


def with_positions(model: Any, name: str = "image_position_ids") -> dict[str, Any]:
    """An image of four by four patches for each sequence, whose places are given."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, 16, 2)
    return {"pixel_values": draw(BATCH, 16, 3 * 4 * 4), name: places}


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IN_THREE_AXES = {
    "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
}
# Codes of an image, as tokens of the text's vocabulary.
CODES = {f"IMGIMG{letter}Z": 80 + n for n, letter in enumerate("ABCDEFGH")}
EMU_CODES = {f"<|visual token {n:06}|>": 80 + n for n in range(8)}

# Layers of both kinds, of which those that see all have larger heads.
ALTERNATING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "num_key_value_heads": 2,
    "global_head_dim": 16,
}
GEMMA4 = {
    **ALTERNATING,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
    "laurel_rank": 8,
    "intermediate_size": 48,
}
GEMMA3N_AUDIO = {
    "conf_attention_chunk_size": 4,
    "conf_attention_context_left": 5,
    "input_feat_size": 16,
    "sscp_conv_channel_size": [8, 4],
}
PATCHES = {
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
OCR_TEXT = {
    "num_key_value_heads": 4,
    "mlp_layer_types": ["dense", "sparse"],
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
# One layer of windows and one that sees the whole image.
OCR_SAM = {
    "image_size": 32,
    "patch_size": 4,
    "output_channels": 16,
    "window_size": 3,
    "global_attn_indexes": [1],
    "downsample_channels": [16, 32],
}
OCR_VISION = {"sam_config": OCR_SAM, "encoder_config": {"num_key_value_heads": 4}}
ERNIE = {
    "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
    "num_key_value_heads": 2,
    "moe_intermediate_size": [48, 24],
}
DAVIT = {
    "embed_dim": [16, 32],
    "depths": [1, 1],
    "num_heads": [2, 2],
    "num_groups": [2, 2],
    "patch_size": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [3, 1],
    "patch_prenorm": [False, True],
    "window_size": 3,
    "projection_dim": 32,
}

ROWS: dict[str, Row] = {
    "align": Row(
        config={
            "projection_dim": 16,
            "vision_config": {
                "image_size": 32,
                "width_coefficient": 1.0,
                "depth_coefficient": 1.0,
                "kernel_sizes": [3, 3],
                "in_channels": [32, 16],
                "out_channels": [16, 16],
                "strides": [1, 2],
                "num_block_repeats": [1, 1],
                "expand_ratios": [1, 2],
                "hidden_dim": 32,
            },
        },
    ),
    "aria": Row(
        config={"image_token_index": IMAGE, "projector_patch_to_query_dict": {16: 4}},
        more=with_image(4),
    ),
    "aya_vision": Row(config={"vision_config": {"image_size": 64, "patch_size": 16}}),
    "blip": Row(more=lambda model: {"input_ids": tokens()}),
    "blip-2": Row(
        config={"image_token_index": IMAGE, "num_query_tokens": 4},
        more=lambda model: {"input_ids": around_image(4)},
    ),
    "blip_2_qformer": Row(
        inputs=lambda model: {
            "query_embeds": draw(BATCH, 6, 32),
            "encoder_hidden_states": draw(BATCH, 9, model.config.encoder_hidden_size),
        },
    ),
    "blip_text_model": Row(
        model="BlipTextLMHeadModel",
        more=lambda model: {
            "encoder_hidden_states": draw(BATCH, 9, model.config.encoder_hidden_size)
        },
    ),
    "bridgetower": Row(
        config={
            "hidden_size": 128,
            "text_config": {"hidden_size": 128},
            "vision_config": {"hidden_size": 128, "image_size": 32},
        },
        because="A head of its images has 64 features in any case.",
    ),
    "bridgetower_vision_model": Row(
        config={"hidden_size": 128, "image_size": 32},
        inputs=lambda model: {"image": pixels(model)},
        because="A head has 64 features in any case.",
    ),
    "bros": Row(
        config={"hidden_size": 64},
        more=lambda model: {"bbox": draw(BATCH, 12, 4).sigmoid()},
    ),
    "chameleon": Row(
        config={
            "vocabulary_map": {"<image>": IMAGE, **CODES},
            "vq_config": {
                "num_embeddings": 8,
                "resolution": 8,
                "base_channels": 32,
                "latent_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
            },
        },
        more=lambda model: {"pixel_values": draw(BATCH, 3, 8, 8), "input_ids": around_image(16)},
        calls={"get_image_features": lambda model: {"pixel_values": draw(BATCH, 3, 8, 8)}},
    ),
    "cohere_compass": Row(
        config={
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "num_key_value_heads": 2,
                "sliding_window": 4,
                "rope_parameters": {
                    "sliding_attention": {**ROPE, "mrope_section": [2, 1, 1]},
                    "full_attention": None,
                },
            },
            "vision_config": {
                "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 16,
                "out_hidden_size": 32,
            },
        },
    ),
    "colpali": Row(
        config={
            "vlm_config": {"image_token_index": IMAGE, "text_config": {"num_key_value_heads": 4}}
        },
        more=with_image(9),
        reference="sdpa",
        because="Its attention is bidirectional. Eager attention is given a causal mask "
        "nevertheless where no token types are passed.",
    ),
    "colqwen2": Row(
        config={"vlm_config": {"image_token_id": IMAGE, "text_config": IN_THREE_AXES}},
        inputs=with_square_grids,
    ),
    "deepseek_ocr2": Row(
        config={"image_token_id": IMAGE, "text_config": OCR_TEXT, "vision_config": OCR_VISION},
    ),
    "deepseek_ocr2_encoder": Row(
        config={"num_key_value_heads": 4},
        inputs=lambda model: {"inputs_embeds": draw(BATCH, 12, 32), "num_patches": 5},
    ),
    "deepseek_ocr2_sam_vision_model": Row(config=OCR_SAM),
    "deepseek_ocr2_text": Row(config=OCR_TEXT),
    "deepseek_ocr2_vision": Row(config=OCR_VISION),
    "deepseek_vl": Row(config={"image_token_id": IMAGE}, more=with_image(16)),
    "deepseek_vl_hybrid": Row(
        config={
            "image_token_id": IMAGE,
            "high_res_vision_config": {
                "image_size": 32,
                "patch_size": 4,
                "window_size": 3,
                "global_attn_indexes": [1],
                "output_channels": 8,
            },
        },
        more=lambda model: {
            "input_ids": around_image(16),
            "high_res_pixel_values": draw(BATCH, 3, 32, 32),
            "pixel_values": draw(BATCH, 3, 64, 64),
        },
    ),
    "diffusion_gemma": Row(
        config={
            "image_token_id": IMAGE,
            "canvas_length": 6,
            "text_config": {
                **ALTERNATING,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 48,
            },
            "vision_config": PATCHES,
        },
        calls={"model.encoder.get_image_features": with_positions},
        generates=False,
        because="It generates by drawing noise.",
    ),
    "dots3_note": Row(
        model="Dots3NoteForConditionalGeneration",
        config={
            "image_token_id": IMAGE,
            "text_config": {
                "layer_types": ["indexed_attention", "sliding_attention"],
                "mlp_layer_types": ["dense", "sparse"],
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "n_routed_experts": 4,
                "moe_intermediate_size": 48,
                "shared_experts_intermediate_size": 48,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
                "head_dim": 16,
                "index_topk": 4,
                "index_n_heads": 2,
                "index_head_dim": 16,
                "sliding_window": 4,
                "swa_num_attention_heads": 2,
                "swa_num_key_value_heads": 2,
                "swa_q_lora_rank": 16,
                "swa_kv_lora_rank": 16,
                "swa_qk_nope_head_dim": 8,
                "swa_head_dim": 16,
                "swa_v_head_dim": 16,
            },
            "vision_config": {
                "pyramid_num_routed": [-1, 4],
                "moe_intermediate_size": 48,
                "adapter_in_dim": 32,
                "adapter_out_dim": 32,
            },
            "audio_config": {
                "adapter_input_size": 32,
                "adapter_out_dim": 32,
                "downsample_hidden_size": 16,
            },
        },
        calls={
            "model.get_image_features": lambda model: {
                "pixel_values": patches_of(model),
                "image_grid_thw": grid(model),
            },
            "get_audio_features": lambda model: {
                "input_features": draw(BATCH, 16, 64),
                "chunk_sample_lengths": torch.tensor([64 * 160, 40 * 160]),
            },
        },
    ),
    "embedding_gemma2": Row(
        config={"text_config": {**ALTERNATING, "hidden_size_per_layer_input": 8}},
        inputs=lambda model: {"input_ids": tokens()},
        calls={"get_image_features": None, "get_audio_features": None},
        because="By default it has no towers.",
    ),
    "emu3": Row(
        model="Emu3ForConditionalGeneration",
        config={
            "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 79, **EMU_CODES},
            "text_config": {"num_key_value_heads": 2},
            "vq_config": {
                "codebook_size": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [1],
                "hidden_size": 32,
                "temporal_downsample_factor": 2,
            },
        },
        more=lambda model: {**emu_image(model), "input_ids": around_image(20)},
        calls={"model.get_image_features": emu_image},
        because="The codes of an image end each of its rows with one more.",
    ),
    "emu3_vqgan": Row(
        config={
            "attn_resolutions": (1,),
            "base_channels": 32,
            "channel_multiplier": (1, 2),
            "hidden_size": 64,
            "num_res_blocks": 1,
        },
        calls={"encoder": lambda model: {"pixel_values": draw(BATCH, 4, 3, 16, 16)}},
    ),
    "ernie4_5_vl_moe": Row(config={"text_config": ERNIE}),
    "ernie4_5_vl_moe_text": Row(config=ERNIE),
    "fast_vlm": Row(
        config={
            "image_token_index": IMAGE,
            "vision_config": {
                "model_type": "resnet",
                "layer_type": "basic",
                "embedding_size": 16,
                "hidden_size": 32,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
            },
        },
        more=lambda model: {**with_image(16)(model), "pixel_values": draw(BATCH, 3, 32, 32)},
        because="Its own tower is one of timm's, without attention.",
    ),
    "flava_multimodal_model": Row(inputs=lambda model: {"hidden_states": draw(BATCH, 9, 32)}),
    "florence2": Row(config={"vision_config": DAVIT}),
    "florence_vision": Row(
        config=DAVIT, inputs=lambda model: {"hidden_states": draw(BATCH, 3, 64, 64)}
    ),
    "gemma3": Row(
        config={"mm_tokens_per_image": 4, "image_token_index": IMAGE},
        more=lambda model: {
            **with_image(4)(model),
            "token_type_ids": (around_image(4) == IMAGE).long(),
        },
    ),
    "gemma3n": Row(
        needs="timm",
        config={
            "audio_soft_tokens_per_image": 4,
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "vision_soft_tokens_per_image": 4,
            "audio_config": {**GEMMA3N_AUDIO, "vocab_offset": 80, "vocab_size": 19},
            "text_config": GEMMA3N,
            "vision_config": {
                "architecture": "convnext_atto",
                "image_size": 64,
                "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32]},
                "vocab_offset": 64,
                "vocab_size": 16,
            },
        },
        inputs=lambda model: {
            "input_ids": seen_and_heard(),
            "pixel_values": pixels(model),
            "input_features": draw(BATCH, 40, 16),
            "input_features_mask": torch.arange(40) < torch.tensor([[40], [28]]),
        },
    ),
    "gemma3n_audio": Row(
        config=GEMMA3N_AUDIO,
        inputs=lambda model: {
            "audio_mel": draw(BATCH, 40, 16),
            "audio_mel_mask": torch.arange(40) >= torch.tensor([[40], [28]]),
        },
    ),
    "gemma3n_text": Row(config=GEMMA3N),
    "gemma4": Row(
        config={"text_config": GEMMA4, "vision_config": PATCHES, "image_token_id": IMAGE},
        more=lambda model: {**with_positions(model), "input_ids": around_image(4)},
        calls={"get_image_features": with_positions},
    ),
    "gemma4_assistant": Row(broken="The set of layer types producing a cache is different"),
    "gemma4_text": Row(config=GEMMA4),
    "gemma4_unified": Row(
        config={
            "image_token_id": IMAGE,
            "text_config": {**ALTERNATING, "num_kv_shared_layers": 2},
            "vision_config": {
                "patch_size": 4,
                "pooling_kernel_size": 1,
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
            },
        },
        more=lambda model: {
            **with_positions(model),
            "input_ids": around_image(16),
            "mm_token_type_ids": (around_image(16) == IMAGE).long(),
        },
        calls={"get_image_features": None},
        because="Images go to the text without attention.",
    ),
    "gemma4_unified_assistant": Row(broken="The set of layer types producing a cache is different"),
    "gemma4_vision": Row(
        config=PATCHES,
        inputs=lambda model: with_positions(model, "pixel_position_ids"),
    ),
    "git": Row(more=lambda model: {"pixel_values": pixels(model)}),
    "glm46v": Row(config={"text_config": IN_THREE_AXES}),
    "glm4v": Row(config={"text_config": IN_THREE_AXES}),
    "glm4v_moe": Row(config={"text_config": IN_THREE_AXES}),
    "glm4v_moe_text": Row(config=IN_THREE_AXES),
    "glm4v_text": Row(config=IN_THREE_AXES),
    "glm_image": Row(
        config={
            "text_config": IN_THREE_AXES,
            "vq_config": {"num_embeddings": 8, "embed_dim": 16, "latent_channels": 32},
            "vision_config": {"image_size": 64},
        },
        inputs=lambda model: {"input_ids": tokens()},
    ),
    "glm_image_text": Row(config=IN_THREE_AXES),
    "glm_ocr": Row(config={"text_config": IN_THREE_AXES}),
    "glm_ocr_text": Row(config=IN_THREE_AXES),
    "glmga": Row(config={"text_config": IN_THREE_AXES}),
    "granite4_vision": Row(
        config={
            "image_token_index": IMAGE,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0], [1, 1]],
            "spatial_target_layers": [0, 1],
            "image_grid_pinpoints": [[32, 32]],
            "vision_config": {"hidden_size": 128, "image_size": 32, "patch_size": 8},
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "vocab_size": 99,
                "num_hidden_layers": 2,
                "intermediate_size": 48,
                "max_position_embeddings": 16,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        },
        calls={
            "get_image_features": lambda model: {
                "pixel_values": draw(BATCH, 2, 3, 32, 32),
                "image_sizes": torch.tensor([[32, 32]] * BATCH),
            },
        },
        because="A head of its towers has 64 features in any case.",
    ),
    "granite_docling": Row(
        config={"image_token_id": IMAGE},
        calls={
            "get_image_features": lambda model: {
                "pixel_values": pixels(model)[:, None].expand(-1, 2, -1, -1, -1),
                "pixel_attention_mask": torch.tensor([[True, True], [True, False]]),
            },
        },
    ),
}
