"""Models of text and images or sound together, H to Z."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from matrix.inputs import BATCH, LENGTH, draw, grid, look, patches_of, pixels, side, tokens, video
from matrix.row import Row
from torch import Tensor

IMAGE = 98  # the token in whose place an image's features are put

Made = dict[str, Any]


def with_placeholders(count: int) -> Tensor:
    """Tokens of which the first, or those behind the first, stand for an image's features."""
    ids = tokens(max(LENGTH, count + 6))
    ids[:, 1 : 1 + count] = IMAGE
    return ids


def images(model: Any) -> Made:
    """One image a text: pixels [B, 1, C, H, W], and which of them are padding."""
    height, width = side(model.config)
    mask = torch.ones(BATCH, 1, height, width, dtype=torch.bool)
    mask[1, :, :, width // 2 :] = False
    return {"pixel_values": pixels(model)[:, None], "pixel_attention_mask": mask}


def sized_image(model: Any) -> Made:
    """Images of which the second is half as wide as its place."""
    height, width = side(model.config)
    sizes = torch.tensor([[height, width], [height, width // 2]])
    return {"pixel_values": pixels(model), "image_sizes": sizes}


def tiles(model: Any, count: int = 3) -> Made:
    """Images twice as wide as high, each as a small one and its parts: [B, parts, C, H, W]."""
    height, width = side(model.config)
    sizes = torch.tensor([[height, 2 * width]] * BATCH)
    return {"pixel_values": draw(BATCH, count, 3, height, width), "image_sizes": sizes}


def flat_patches(model: Any, names: tuple[str, str, str]) -> Made:
    """Patches in a row, of the second image fewer; names of patches, mask and sizes."""
    size = look(model.config, "patch_size")
    mask = torch.ones(BATCH, 16, dtype=torch.long)
    mask[1, 8:] = 0
    sizes = torch.tensor([[4, 4], [2, 4]])
    return dict(zip(names, (draw(BATCH, 16, 3 * size * size), mask, sizes), strict=True))


def siglip2_image(model: Any) -> Made:
    return flat_patches(model, ("pixel_values", "pixel_attention_mask", "spatial_shapes"))


def placed_patches(model: Any) -> Tensor:
    """Patches [B, N, 2 + size], each behind its row and column, counted from 1; 0 is padding."""
    size = look(model.config, "patch_embed_hidden_size")
    places = torch.tensor([[1.0 + i // 3, 1.0 + i % 3] for i in range(6)])
    patches = torch.cat((places.expand(BATCH, 6, 2), draw(BATCH, 6, size)), -1)
    patches[1, 4:] = 0
    return patches


def square_patches(model: Any) -> Tensor:
    """The patches of `grid` in one sequence: [N, C, H, W]."""
    size = look(model.config, "patch_size")
    return draw(int(grid(model).prod(-1).sum()), 3, size, size)


def merged_patches(model: Any) -> Made:
    """Patches that are put together, two by two, before they are given: [N, H, W, C]."""
    size = 2 * look(model.config, "patch_size")
    sizes = torch.tensor([[1, 2, 2], [1, 1, 2]])
    return {"pixel_values": draw(6, size, size, 3), "image_grid_thw": sizes}


def patches_in_a_row(model: Any) -> Made:
    """Two images of 4 x 4 and 4 x 8 patches side by side, [1, C, H, W]."""
    size = look(model.config, "patch_size")
    sizes = torch.tensor([[4, 4], [4, 8]], dtype=torch.int32)
    return {"pixel_values": draw(1, 3, size, 48 * size), "target_sizes": sizes}


def pooled_patches() -> Tensor:
    """Of two images of 4 x 4 patches, those that each of eight tokens pools; -1 is none."""
    patches = torch.arange(32).reshape(8, 4).clone()
    patches[3, 2:] = -1
    return patches


def mllama_image(model: Any) -> Made:
    """An image of two tiles, and one of one: pixels [B, 1, tiles, C, H, W]."""
    height, width = side(model.config)
    return {
        "pixel_values": draw(BATCH, 1, 2, 3, height, width),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
    }


def mllama_tiles_seen() -> Tensor:
    """Which tiles each token sees: [B, N, 1, tiles]; the first tokens see none."""
    seen = torch.ones(BATCH, LENGTH, 1, 2, dtype=torch.long)
    seen[1, :, :, 1] = 0
    seen[:, :2] = 0
    return seen


def boxes(length: int = LENGTH) -> Tensor:
    """Where on a page each token is: left, top, right, bottom, of 100."""
    generator = torch.Generator().manual_seed(3)
    start, size = torch.randint(0, 49, (2, BATCH, length, 2), generator=generator)
    return torch.cat((start, start + size + 1), -1)


def sections(*sizes: int) -> Made:
    """Rotary positions in three axes with these shares of half a head."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes)}
    return {"rope_parameters": rope}


def one_call(make: Callable[[Any], Made]) -> Mapping[str, Callable[[Any], Made] | None]:
    return {"get_image_features": make}


TILES_OF_MLLAMA = {
    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    "intermediate_layers_indices": [0, 1],
    "vision_output_dim": 96,
}
# A window that does not divide the patches, and a layer without one.
SAM = {"window_size": 3, "global_attn_indexes": [1]}
NECK = {
    "output_channels": 16,
    "post_conv_in_channels": 16,
    "post_conv_mid_channels": 16,
    "post_conv_out_channels": 32,
}
INDEXER_OF_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
}
LAYERS_OF_STEP3P5 = {
    "layer_types": ["full_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "sliding_window": 5,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

ROWS: dict[str, Row] = {
    "hunyuan_vl": Row(
        config={
            "text_config": {"head_dim": 8, **sections(1, 1, 1, 1)},
            "vision_config": {"max_image_size": 64},
        },
        because="The default config has no size of a head and no sections.",
    ),
    "hunyuan_vl_text": Row(
        config={"head_dim": 8, **sections(1, 1, 1, 1)},
        because="The default config has no size of a head and no sections.",
    ),
    "idefics": Row(
        config={"use_resampler": True, "perceiver_config": {"resampler_n_latents": 4}},
        more=lambda model: {
            "pixel_values": pixels(model)[:, None],
            "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
        },
    ),
    "idefics2": Row(
        config={"perceiver_config": {"resampler_n_latents": 4}}, calls=one_call(images)
    ),
    "idefics2_perceiver": Row(
        config={"resampler_n_latents": 4},
        inputs=lambda model: {
            "context": draw(BATCH, LENGTH, 32),
            "attention_mask": torch.tensor([[1] * 12, [1] * 8 + [0] * 4]),
        },
    ),
    "idefics3": Row(calls=one_call(images)),
    "inkling2": Row(
        config={"text_config": {"sliding_window_size": 5, "rel_extent": 9}},
        calls=one_call(merged_patches),
    ),
    "inkling2_text": Row(config={"sliding_window_size": 5, "rel_extent": 9}),
    "inkling2_vision": Row(inputs=merged_patches),
    "inkling_mm_model": Row(
        config={"text_config": {"sliding_window_size": 5, "rel_extent": 9}},
        calls={"get_image_features": None, "get_audio_features": None},
        because="Neither of the towers has attention.",
    ),
    "instructblip": Row(
        config={"num_query_tokens": 4, "image_token_index": IMAGE},
        inputs=lambda model: {
            "pixel_values": pixels(model),
            "qformer_input_ids": tokens(5),
            "input_ids": with_placeholders(4),
        },
        calls={"get_image_features": None},
        because="`forward` runs the vision tower already.",
    ),
    "instructblipvideo": Row(
        config={"num_query_tokens": 4, "video_token_index": IMAGE},
        inputs=lambda model: {
            "pixel_values": video(model)[:, :2],
            "qformer_input_ids": tokens(5),
            "input_ids": with_placeholders(8),
        },
    ),
    "janus": Row(
        config={
            "image_token_id": IMAGE,
            "vision_config": {"image_size": 32, "num_image_tokens": 4},
            "vq_config": {
                "num_embeddings": 64,
                "base_channels": 32,
                "latent_channels": 32,
                "channel_multiplier": [1, 1],
            },
        },
        more=lambda model: {
            "input_ids": with_placeholders(4),
            "pixel_values": pixels(model),
        },
    ),
    "kimi_k25": Row(
        config={"vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}},
        calls=one_call(
            lambda model: {"pixel_values": square_patches(model), "image_grid_thw": grid(model)}
        ),
    ),
    "kimi_k25_vision": Row(
        config={"pos_emb_height": 8, "pos_emb_width": 8},
        inputs=lambda model: {"pixel_values": square_patches(model), "grid_thw": grid(model)},
    ),
    "kosmos-2": Row(
        config={"latent_query_num": 4},
        inputs=lambda model: {
            "input_ids": with_placeholders(4),
            "pixel_values": pixels(model),
            "image_embeds_position_mask": with_placeholders(4) == IMAGE,
        },
    ),
    "kosmos-2.5": Row(
        config={"latent_query_num": 4, "vision_config": {"max_num_patches": 16}},
        inputs=lambda model: {
            "input_ids": with_placeholders(4),
            "flattened_patches": placed_patches(model),
            "image_embeds_position_mask": with_placeholders(4) == IMAGE,
        },
    ),
    "kosmos_2_5_vision_model": Row(
        config={"max_num_patches": 16},
        inputs=lambda model: {"flattened_patches": placed_patches(model)},
    ),
    "layoutlmv2": Row(
        more=lambda model: {"bbox": boxes(), "image": draw(BATCH, 3, 224, 224)},
        needs="detectron2",
        because="Its encoder has a test of its own, which needs no such package.",
    ),
    "layoutlmv3": Row(
        config={"coordinate_size": 6, "shape_size": 4, "input_size": 32},
        more=lambda model: {"bbox": boxes()},
    ),
    "lfm2_vl": Row(config={"vision_config": {"num_patches": 16}}, calls=one_call(siglip2_image)),
    "lighton_ocr": Row(config={"vision_config": {"patch_size": 14}}, calls=one_call(sized_image)),
    "lilt": Row(config={"hidden_size": 48}, more=lambda model: {"bbox": boxes()}),
    "llama4": Row(
        model="Llama4ForConditionalGeneration",
        config={
            "vision_config": {"intermediate_size": 128},
            "text_config": {
                "attention_chunk_size": 5,
                "no_rope_layers": [1, 0],
                "moe_layers": [1],
                "intermediate_size_mlp": 48,
            },
        },
    ),
    "llava_next": Row(config={"image_grid_pinpoints": [[56, 112]]}, calls=one_call(tiles)),
    "llava_next_video": Row(config={"image_grid_pinpoints": [[56, 112]]}, calls=one_call(tiles)),
    "llava_onevision": Row(config={"image_grid_pinpoints": [[56, 112]]}, calls=one_call(tiles)),
    "lxmert": Row(
        more=lambda model: {"visual_feats": draw(BATCH, 5, 32), "visual_pos": draw(BATCH, 5, 4)}
    ),
    "minicpm_ocr": Row(
        config={"vision_config": {"insert_layer_id": 0}},
        calls=one_call(lambda model: {**patches_in_a_row(model), "downsample_mode": "16x"}),
    ),
    "minicpm_ocr_vision": Row(config={"insert_layer_id": 0}, inputs=patches_in_a_row),
    "minicpmv4_6": Row(
        config={"vision_config": {"insert_layer_id": 0}}, calls=one_call(patches_in_a_row)
    ),
    "minicpmv4_6_vision": Row(config={"insert_layer_id": 0}, inputs=patches_in_a_row),
    "minicpmv4_7": Row(
        config={"vision_config": {"insert_layer_id": 0}}, calls=one_call(patches_in_a_row)
    ),
    "minicpmv4_7_vision": Row(config={"insert_layer_id": 0}, inputs=patches_in_a_row),
    "mistral3": Row(config={"vision_config": {"patch_size": 14}}, calls=one_call(sized_image)),
    "mistral_large4": Row(
        config={
            "text_config": {"index_topk": 4, "no_rope_layers": [1, 0]},
            "vision_config": {"patch_size": 14},
        },
        calls=one_call(sized_image),
    ),
    "mllama": Row(
        model="MllamaForConditionalGeneration",
        config={
            "vision_config": {"max_num_tiles": 2, **TILES_OF_MLLAMA},
            "text_config": {"cross_attention_layers": [1]},
        },
        more=lambda model: {**mllama_image(model), "cross_attention_mask": mllama_tiles_seen()},
    ),
    "mllama_vision_model": Row(config={"max_num_tiles": 2, **TILES_OF_MLLAMA}, inputs=mllama_image),
    "modernvbert": Row(
        config={"text_config": {"local_attention": 6}},
        more=lambda model: {"pixel_values": None},
        calls=one_call(images),
    ),
    "molmo2": Row(
        config={
            "vision_config": {"num_position_embeddings": 16},
            "adapter_config": {"vision_feature_layer": [1, 0]},
        },
        calls=one_call(
            lambda model: {
                "pixel_values": draw(BATCH, 16, 588),
                "image_token_pooling": pooled_patches(),
                "image_grids": torch.tensor([[1, 2, 1, 2]] * BATCH),
            }
        ),
    ),
    "molmo2_adapter": Row(
        config={"vision_feature_layer": [1, 0]},
        inputs=lambda model: {
            "image_features": draw(BATCH, 16, 64),
            "pooled_patches_idx": pooled_patches(),
        },
    ),
    "molmo2_vision": Row(
        config={"num_position_embeddings": 16},
        inputs=lambda model: {"pixel_values": draw(BATCH, 16, 588)},
    ),
    "muse_glimmer": Row(config={"text_config": {"sliding_window": 5}, "out_hidden_size": 128}),
    "muse_glimmer_assistant": Row(
        config={"sliding_window": 12},
        inputs=lambda model: {
            "noise_embeds": draw(BATCH, 6, 32),
            "context_hidden_states": draw(BATCH, 9, 32 * 5),
        },
        calls={
            "forward": lambda model: {
                "noise_embeds": draw(BATCH, 6, 32),
                "context_hidden_states": draw(BATCH, 9, 32 * 5),
                "attention_mask": torch.tensor([[1] * 15, [0] * 4 + [1] * 11]),
            }
        },
    ),
    "muse_spark": Row(
        config={
            "audio_config": {"num_hidden_layers": 4},
            "text_config": {"sliding_window": 5},
            "out_hidden_size": 128,
        },
        calls={"get_audio_features": None},
        because="Its sound is heard without attention.",
    ),
    "neomme": Row(
        config={"head_dim": 16, "sliding_window": 5},
        more=lambda model: {"pixel_values": None},
        calls={"get_image_features": None},
        because="Images have no attention but in the text.",
    ),
    "paddleocr_vl": Row(
        config={"text_config": sections(2, 1, 1)},
        calls=one_call(
            lambda model: {"pixel_values": square_patches(model), "image_grid_thw": grid(model)}
        ),
    ),
    "paddleocr_vl_text": Row(config=sections(2, 1, 1)),
    "paddleocr_vl_vision": Row(
        inputs=lambda model: {"pixel_values": square_patches(model)[None], "grid_thw": grid(model)}
    ),
    "paligemma": Row(
        config={"text_config": {"num_key_value_heads": 1}},
        more=lambda model: {"token_type_ids": torch.tensor([[0] * 8 + [1] * 4] * BATCH)},
        because="Without types its own sdpa sees later tokens, and its eager does not.",
    ),
    "perception_lm": Row(
        config={
            "image_token_id": IMAGE,
            "vision_use_cls_token": False,
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 64,
                "model_args": {"embed_dim": 32},
            },
        },
        more=lambda model: {
            "input_ids": with_placeholders(16),
            "pixel_values": pixels(model)[:, None],
        },
        because="The default vision tower is one of timm's, which is not installed.",
    ),
    "pix2struct": Row(
        config={"vision_config": {"seq_len": 16}},
        inputs=lambda model: {
            "flattened_patches": placed_patches(model),
            "attention_mask": torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2]),
            "decoder_input_ids": tokens(6),
        },
    ),
    "pix2struct_text_model": Row(
        config={"initializer_range": 0.02},
        because="The config lacks a number that the model's initialisation reads.",
    ),
    "pix2struct_vision_model": Row(
        config={"seq_len": 16},
        inputs=lambda model: {"flattened_patches": placed_patches(model)},
    ),
    "pp_chart2table": Row(config={"vision_config": {**SAM, "output_channels": 16}}),
    "pp_formulanet": Row(config={"vision_config": {**SAM, **NECK}}),
    "pp_formulanet_vision": Row(config={**SAM, **NECK}),
    "qwen2_5_vl": Row(
        config={
            "text_config": sections(2, 1, 1),
            "vision_config": {"window_size": 28, "fullatt_block_indexes": [1]},
        }
    ),
    "qwen2_5_vl_text": Row(config=sections(2, 1, 1)),
    "qwen2_vl": Row(config={"text_config": sections(2, 1, 1)}),
    "qwen2_vl_text": Row(config=sections(2, 1, 1)),
    "qwen3_5": Row(model="Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": Row(model="Qwen3_5MoeForConditionalGeneration"),
    "qwen4_exp": Row(
        model="Qwen4ExpForConditionalGeneration", config={"text_config": INDEXER_OF_QWEN4}
    ),
    "qwen4_exp_text": Row(config=INDEXER_OF_QWEN4),
    "shieldgemma2": Row(
        config={"mm_tokens_per_image": 4, "text_config": {"sliding_window": 5}},
    ),
    "siglip2": Row(
        config={"vision_config": {"num_patches": 16}},
        more=siglip2_image,
        calls=one_call(siglip2_image),
    ),
    "siglip2_vision_model": Row(config={"num_patches": 16}, inputs=siglip2_image),
    "smolvlm": Row(calls=one_call(images)),
    "step3p5": Row(config=LAYERS_OF_STEP3P5),
    "step3p7": Row(config={"text_config": LAYERS_OF_STEP3P5}),
    "udop": Row(
        config={"decoder_start_token_id": 0},
        more=lambda model: {"bbox": boxes() / 100, "pixel_values": pixels(model)},
    ),
    "ultravbert": Row(
        config={"text_config": {"sliding_window": 5}},
        more=lambda model: {"pixel_values": None},
        calls=one_call(images),
    ),
    "unlimited_ocr": Row(
        config={
            "vision_config": {"sam_config": {**SAM, "output_channels": 16}},
            "text_config": {"sliding_window": 5},
        }
    ),
    "unlimited_ocr_sam_vision_model": Row(config={**SAM, "output_channels": 16}),
    "unlimited_ocr_text": Row(config={"sliding_window": 5}),
    "unlimited_ocr_vision": Row(config={"sam_config": {**SAM, "output_channels": 16}}),
    "unlimited_ocr_vision_encoder": Row(
        inputs=lambda model: {"patch_embeds": draw(BATCH, 32, 4, 4)}
    ),
    "video_llama_3": Row(
        calls=one_call(
            lambda model: {
                "pixel_values": patches_of(model),
                "image_grid_thw": grid(model),
                "image_merge_sizes": torch.tensor([2, 2]),
            }
        )
    ),
    "video_llama_3_vision": Row(
        inputs=lambda model: {
            "pixel_values": patches_of(model),
            "grid_thw": grid(model),
            "merge_sizes": torch.tensor([2, 2]),
        }
    ),
    "vilt": Row(
        inputs=lambda model: {
            "input_ids": tokens(),
            "image_embeds": draw(BATCH, 9, 32),
            "pixel_mask": torch.tensor([[[1, 1, 1]] * 3, [[1, 1, 0]] * 3]),
        },
        because="Of pixels it would take patches in a random order.",
    ),
    "vipllava": Row(config={"vision_feature_layer": [-2, -1]}),
    "vision-encoder-decoder": Row(
        config={
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "decoder": {"is_decoder": True, "add_cross_attention": True},
        }
    ),
    "vit_mae": Row(
        model="ViTMAEForPreTraining",
        more=lambda model: {"noise": draw(BATCH, 16)},
        because="Without noise it hides random patches.",
    ),
    "xclip": Row(
        config={"vision_config": {"num_frames": 2}},
        more=lambda model: {"pixel_values": video(model)},
    ),
    "xclip_vision_model": Row(config={"num_frames": 2}),
}
