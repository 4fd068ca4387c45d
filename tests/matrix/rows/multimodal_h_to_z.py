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
    "inkling_mm_model": Row(
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
        )
    ),
    "kimi_k25_vision": Row(
        config={"pos_emb_height": 8, "pos_emb_width": 8},
        inputs=lambda model: {"pixel_values": square_patches(model), "grid_thw": grid(model)}
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
    "layoutlmv3": Row(
        config={"coordinate_size": 6, "shape_size": 4, "input_size": 32},
        more=lambda model: {"bbox": boxes()},
    ),
    "lfm2_vl": Row(config={"vision_config": {"num_patches": 16}}, calls=one_call(siglip2_image)),
    "lighton_ocr": Row(
        config={"vision_config": {"patch_size": 14}}, calls=one_call(sized_image)
    ),
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
}
