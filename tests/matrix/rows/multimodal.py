"""Models of text and images or sound together, whose types begin with A to G."""

from typing import Any

import torch
from matrix.inputs import BATCH, draw, patches_of, pixels, tokens
from matrix.row import Row
from torch import Tensor

IMAGE = 70  # the token that stands for an image's features: none that is drawn


def around_image(count: int, seed: int = 1) -> Tensor:
    """Tokens of text, and between them as many as an image has features."""
    ids = tokens(count + 12, seed)
    ids[:, 6 : 6 + count] = IMAGE
    return ids


def with_image(count: int) -> Any:
    """Arguments with an image for each sequence, of so many features."""
    return lambda model: {"input_ids": around_image(count), "pixel_values": pixels(model)}


def with_square_grids(model: Any) -> dict[str, Any]:
    """An image of four by four patches for each sequence, of which two by two are merged."""
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    size = patches_of(model).shape[-1]
    patches = draw(BATCH, 16, size)
    return {"input_ids": around_image(4), "pixel_values": patches, "image_grid_thw": grid}


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IN_THREE_AXES = {
    "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
}
# Codes of an image, as tokens of the text's vocabulary.
CODES = {f"IMGIMG{letter}Z": 80 + n for n, letter in enumerate("ABCDEFGH")}

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
        because="Its attention is bidirectional. Eager attention is given a causal mask nevertheless "
        "where no token types are passed.",
    ),
    "colqwen2": Row(config={"vlm_config": {"image_token_id": IMAGE, "text_config": IN_THREE_AXES}}, inputs=with_square_grids),
    "deepseek_vl": Row(config={"image_token_id": IMAGE}, more=with_image(16)),
    "emu3": Row(
        model="Emu3ForConditionalGeneration",
        config={
            "vocabulary_map": {"<image>": IMAGE, **CODES},
        },
    ),
    "exaone4_5": Row(),
    "flava_multimodal_model": Row(inputs=lambda model: {"hidden_states": draw(BATCH, 9, 32)}),
    "gemma3": Row(
        config={"mm_tokens_per_image": 4, "image_token_index": IMAGE},
        more=lambda model: {
            **with_image(4)(model),
            "token_type_ids": (around_image(4) == IMAGE).long(),
        },
    ),
    "git": Row(more=lambda model: {"pixel_values": pixels(model)}),
    "glm46v": Row(config={"text_config": IN_THREE_AXES}),
    "glm4v": Row(config={"text_config": IN_THREE_AXES}),
    "glm4v_moe": Row(config={"text_config": IN_THREE_AXES}),
    "glm4v_moe_text": Row(config=IN_THREE_AXES),
    "glm4v_text": Row(config=IN_THREE_AXES),
    "glm_image_text": Row(config=IN_THREE_AXES),
    "glm_ocr": Row(config={"text_config": IN_THREE_AXES}),
    "glm_ocr_text": Row(config=IN_THREE_AXES),
    "glmga": Row(config={"text_config": IN_THREE_AXES}),
}
