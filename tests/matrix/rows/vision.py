"""Images and videos: classification, detection, segmentation, depth."""

from typing import Any

import torch
from matrix.inputs import BATCH, draw, inputs_by_name, look, pixels, side, tokens
from matrix.row import Row
from torch import Tensor

# Tiny backbones of four stages.
STAGES = [f"stage{i}" for i in range(1, 5)]
RESNET = {
    "model_type": "resnet",
    "depths": [1, 1, 1, 1],
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "layer_type": "basic",
    "out_features": STAGES[1:],
}
HGNET = {
    "depths": [1, 1, 1, 1],
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "out_features": STAGES[1:],
    "stage_in_channels": [8, 8, 8, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "stage_out_channels": [8, 8, 16, 16],
    "stem_channels": [3, 8, 8],
}
# Windows that are shifted, in two stages.
SWIN = {
    "depths": [2, 2],
    "embed_dim": 16,
    "image_size": 32,
    "num_heads": [2, 2],
    "window_size": 4,
}
SWIN_OF_FOUR = {
    **SWIN,
    "depths": [2, 1, 1, 1],
    "image_size": 64,
    "num_heads": [2, 2, 2, 2],
    "out_features": STAGES,
}
# Two blocks, as a backbone of four outputs.
FOUR_LAYERS = {
    "num_hidden_layers": 4,
    "out_features": STAGES,
}
SEQUENCES = {**FOUR_LAYERS, "reshape_hidden_states": False}
SUPERPOINT = {
    "decoder_hidden_size": 16,
    "descriptor_decoder_dim": 32,
    "encoder_hidden_sizes": [8, 8, 8, 8],
    "keypoint_decoder_dim": 65,
    "max_keypoints": 12,
}
# What makes a detector of feature maps at three scales.
SCALES = {
    "anchor_image_size": None,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": 2,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 16, 16],
    "num_denoising": 0,
    "num_queries": 10,
}


def images(height: int = 64, width: int = 96) -> Any:
    """Images larger than the config says: of a size that needs no square."""
    return lambda _: {"pixel_values": draw(BATCH, 3, height, width)}


def images_in_a_frame(height: int = 64, width: int = 96) -> Any:
    """Images of which the second is narrower."""

    def make(_: Any) -> dict[str, Tensor]:
        mask = torch.ones(BATCH, height, width, dtype=torch.long)
        mask[1, :, -width // 3 :] = 0
        return {"pixel_values": draw(BATCH, 3, height, width), "pixel_mask": mask}

    return make


def frames(model: Any) -> dict[str, Tensor]:
    """A video as `pixel_values`."""
    count = look(model.config, "num_frames")
    return {"pixel_values": draw(BATCH, count, 3, *side(model.config))}


def mirrored(model: Any) -> dict[str, Tensor]:
    """Other images: with the generic ones a ReLU is so near zero that rounding moves it across."""
    return {"pixel_values": pixels(model).flip(-1)}


def pairs(model: Any) -> dict[str, Tensor]:
    """Two images to be matched."""
    channels = look(model.config, "num_channels", default=3)
    return {"pixel_values": draw(1, 2, channels, 64, 64)}


# SAM: towers for 4 x 4 features of 32 channels, prompts and masks.
SAM_VISION = {
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "num_pos_feats": 16,
    "output_channels": 32,
    "window_size": 3,
}
HIERA = {
    "blocks_per_stage": [1, 2, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "global_attention_blocks": [4],
    "hidden_size": 8,
    "image_size": [64, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_positional_embedding_background_size": [4, 4],
    "window_size_per_stage": [8, 4, 4, 2],
}
PYRAMID = {
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
SAM2_VISION = {**PYRAMID, "backbone_config": HIERA}
SAM3_VISION = {
    "backbone_config": {
        "global_attn_indexes": [1],
        "image_size": 56,
        "pretrain_image_size": 28,
        "window_size": 2,
    },
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
PROMPTS = {"image_size": 64, "mask_input_channels": 4}
SAM3_PROMPTS = {**PROMPTS, "image_size": 56}
MEMORY = {
    "image_size": 64,
    "mask_downsampler_embed_dim": 16,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_fuser_intermediate_dim": 48,
}


def points(model: Any) -> dict[str, Tensor]:
    """Images, and two points in each."""
    return {
        **inputs_by_name(model),
        "input_labels": torch.ones(BATCH, 1, 2, dtype=torch.long),
        "input_points": draw(BATCH, 1, 2, 2).abs() * 20,
    }


def pyramid(batch: int) -> list[Tensor]:
    """What a tower gives of images, at three scales."""
    return [draw(batch, 4, 16, 16), draw(batch, 8, 8, 8), draw(batch, 32, 4, 4)]


def a_frame(size: int) -> Any:
    """A frame of a video and points in it: the step that a session makes, with its gradients."""

    def make(_: Any) -> dict[str, Tensor]:
        return {
            "input_labels": torch.ones(1, 1, 2, dtype=torch.int32),
            "input_points": draw(1, 1, 2, 2).abs() * 20,
            "pixel_values": draw(1, 3, size, size),
        }

    return make


def classes_and_tasks(model: Any) -> dict[str, Tensor]:
    """Two images with two names of classes and a task for each, which are not kept for later."""
    # what is kept would hold the graph of the step before
    for cache in (model.language_cache_class, model.language_cache_prompt):
        cache.put = lambda *_: None
    names = tokens(5).repeat(2, 1) + torch.arange(4)[:, None]
    tasks = tokens(8, seed=3)
    mask = torch.ones_like(tasks)
    mask[1, -2:] = 0
    return {
        "classes_attention_mask": torch.ones_like(names),
        "classes_input_ids": names,
        "classes_structure": torch.tensor([2, 2]),
        "pixel_values": draw(BATCH, 3, 64, 96),
        "tasks_attention_mask": mask,
        "tasks_input_ids": tasks,
    }


def memories(model: Any) -> dict[str, Any]:
    """Features of a frame, and two frames and three objects in memory."""
    return {
        "current_vision_features": draw(16, 1, 32),
        "current_vision_position_embeddings": draw(16, 1, 32) / 2,
        "memory": draw(35, 1, 64),
        "memory_posision_embeddings": draw(35, 1, 64) / 2,
        "num_object_pointer_tokens": 3,
    }


def features(model: Any) -> dict[str, Any]:
    """What SAM3's encoder and decoder are given: images of 3 x 4, and texts of two lengths."""
    mask = torch.ones(BATCH, 6, dtype=torch.bool)
    mask[1, -2:] = False
    return {
        "spatial_shapes": torch.tensor([[3, 4]]),
        "text_features": draw(BATCH, 6, 32),
        "text_mask": mask,
        "vision_features": draw(BATCH, 12, 32),
        "vision_pos_encoding": draw(BATCH, 12, 32) / 2,
    }


def feature_maps(model: Any) -> dict[str, Any]:
    """The same, before they are flattened."""
    given = features(model)
    return {
        "text_features": given["text_features"],
        "text_mask": given["text_mask"],
        "vision_features": [draw(BATCH, 32, 3, 4)],
        "vision_pos_embeds": [draw(BATCH, 32, 3, 4) / 2],
    }


def queries(model: Any) -> dict[str, Any]:
    """What SAM3's mask decoder is given."""
    given = features(model)
    return {
        "backbone_features": [draw(BATCH, 32, 3 * 2**n, 4 * 2**n) for n in (2, 1, 0)],
        "decoder_queries": draw(BATCH, 5, 32),
        "encoder_hidden_states": draw(BATCH, 12, 32),
        "prompt_features": given["text_features"],
        "prompt_mask": given["text_mask"],
    }


ROWS: dict[str, Row] = {
    "chmv2": Row(
        config={
            "backbone_config": {**FOUR_LAYERS, "return_class_token": True},
            "fusion_hidden_size": 16,
            "head_hidden_size": 16,
            "number_output_channels": 16,
            "post_process_channels": [8, 8, 8, 8],
        },
    ),
    "conditional_detr": Row(
        config={"backbone_config": RESNET, "num_queries": 10}, more=images_in_a_frame()
    ),
    "cvt": Row(
        config={"depth": [1, 2, 3], "embed_dim": [16, 32, 32], "num_heads": [1, 2, 2]},
        more=images(64, 64),
    ),
    "d_fine": Row(config={**SCALES, "backbone_config": HGNET}, more=images()),
    "dab-detr": Row(
        config={"backbone_config": RESNET, "num_queries": 10}, more=images_in_a_frame()
    ),
    "deformable_detr": Row(
        config={"backbone_config": RESNET, "d_model": 64, "num_queries": 10},
        more=images_in_a_frame(),
    ),
    "deimv2": Row(config={**SCALES, "backbone_config": HGNET}, more=images()),
    "depth_anything": Row(
        config={
            "backbone_config": SEQUENCES,
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "reassemble_hidden_size": 32,
        },
    ),
    "depth_pro": Row(
        config={
            "fusion_hidden_size": 16,
            "intermediate_feature_dims": [16, 16],
            "intermediate_hook_ids": [1, 0],
            "patch_size": 16,
            "scaled_images_feature_dims": [32, 32, 16],
            "use_fov_model": True,
            **{
                f"{name}_model_config": {"image_size": 16, "patch_size": 4}
                for name in ("image", "patch", "fov")
            },
        },
        more=images(64, 64),
    ),
    "detr": Row(config={"backbone_config": RESNET, "num_queries": 10}, more=images_in_a_frame()),
    "donut-swin": Row(config=SWIN),
    "dots3_note_vision_encoder": Row(
        config={
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "moe_intermediate_size": 16,
            "mlp_layer_types": ["dense", "sparse"],
            "per_layer_config": {1: {"num_local_experts": 4, "num_experts_per_tok": 2}},
        },
    ),
    "edgetam": Row(
        config={
            "vision_config": {**PYRAMID, "backbone_config": RESNET},
            "prompt_encoder_config": PROMPTS,
        },
        inputs=lambda model: {
            "image_embeddings": pyramid(BATCH),
            "input_labels": torch.ones(BATCH, 1, 2, dtype=torch.long),
            "input_points": draw(BATCH, 1, 2, 2).abs() * 20,
        },
        calls={"get_image_features": None},
        because="its images are read by a tower of timm, which has no attention",
    ),
    "edgetam_video": Row(
        config={
            **MEMORY,
            "memory_attention_mlp_hidden_size": 48,
            "memory_attention_rope_k_sizes": [2, 2],
            "perceiver_resampler_attention_head_dim": 64,
            "perceiver_resampler_hidden_size": 64,
            "perceiver_resampler_num_latents": 4,
            "perceiver_resampler_num_latents_2d": 4,
            "perceiver_resampler_mlp_intermediate_size": 32,
            "vision_config": SAM2_VISION,
            "prompt_encoder_config": PROMPTS,
        },
        calls={
            "forward": None,
            "_single_frame_forward": a_frame(64),
            "memory_attention.forward": lambda model: {
                **memories(model),
                "memory": draw(19, 1, 64),
                "memory_posision_embeddings": draw(19, 1, 64) / 2,
                "num_spatial_memory_tokens": 2,
            },
            "spatial_perceiver.forward": lambda model: {
                "hidden_states": draw(1, 64, 4, 4),
                "positional_encoding": draw(1, 64, 4, 4) / 2,
            },
        },
        because="its forward is of a session, without gradients: what it calls is run instead",
    ),
    "efficientloftr": Row(
        config={
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "out_features": [8, 8, 16, 64],
            "stage_num_blocks": [1, 1, 1, 1],
        },
        # its new norms shrink differences a thousandfold: all keys would be alike, and their
        # gradients cancel out
        inputs=lambda model: {"pixel_values": 2e4 * draw(1, 2, 3, 96, 96)},
    ),
    "glpn": Row(more=images(64, 64)),
    "grounding-dino": Row(
        config={
            "backbone_config": SWIN_OF_FOUR,
            "num_queries": 10,
        },
        more=images_in_a_frame(),
        reference={"": "eager", "text_config": "sdpa"},
        because="eager BERT adds the boolean mask of phrases to the scores as zeros and ones",
    ),
    "hiera": Row(config={"depths": [1, 2, 2, 1], "embed_dim": 8, "image_size": [64, 64]}),
    "lightglue": Row(config={"keypoint_detector_config": SUPERPOINT}, inputs=pairs),
    "lw_detr": Row(
        config={
            "backbone_config": {
                **FOUR_LAYERS,
                "image_size": 64,
                "pretrain_image_size": 64,
                "num_windows": 4,
                "window_block_indices": [0, 2],
            },
            "d_model": 32,
            "num_queries": 5,
            "group_detr": 2,
            "projector_scale_factors": [1.0],
        },
        more=images_in_a_frame(64, 64),
    ),
    "lw_detr_vit": Row(
        model="LwDetrViTBackbone",
        config={
            **FOUR_LAYERS,
            "image_size": 64,
            "pretrain_image_size": 64,
            "num_windows": 4,
            "window_block_indices": [0, 2],
        },
    ),
    "mask2former": Row(
        config={"backbone_config": SWIN_OF_FOUR, "feature_size": 32}, more=images_in_a_frame()
    ),
    "maskformer": Row(
        config={
            "backbone_config": SWIN_OF_FOUR,
            "fpn_feature_size": 32,
            "decoder_config": {"num_queries": 10, "backbone_config": None},
        },
        more=images_in_a_frame(),
    ),
    "maskformer-swin": Row(config=SWIN),
    "mgp-str": Row(config={"num_bpe_labels": 60, "num_wordpiece_labels": 60}),
    "mm-grounding-dino": Row(
        config={
            "backbone_config": SWIN_OF_FOUR,
            "num_queries": 10,
        },
        more=images_in_a_frame(),
        reference={"": "eager", "text_config": "sdpa"},
        because="eager BERT adds the boolean mask of phrases to the scores as zeros and ones",
    ),
    "omdet-turbo": Row(
        config={
            "apply_layernorm_after_vision_backbone": False,
            "backbone_config": RESNET,
            "class_embed_dim": 64,
            "encoder_in_channels": [8, 16, 16],
            "num_queries": 5,
            "text_config": {"hidden_size": 64},
            "text_projection_in_dim": 64,
            "text_projection_out_dim": 64,
            "timm_kwargs": {},
            "vision_features_channels": [32, 32, 32],
        },
        inputs=classes_and_tasks,
    ),
    "oneformer": Row(
        config={
            "backbone_config": SWIN_OF_FOUR,
            "conv_dim": 64,
            "mask_dim": 64,
            "num_queries": 5,
            "task_seq_len": 8,
            "is_training": True,
            "text_encoder_n_ctx": 2,
            "text_encoder_width": 64,
            "hidden_dim": 64,
            "text_encoder_context_length": 8,
        },
        inputs=lambda model: {
            **images_in_a_frame()(model),
            "task_inputs": tokens(8),
            "text_inputs": torch.stack([tokens(8), tokens(8, seed=3)], 1),
        },
    ),
    "pp_doclayout_v2": Row(
        config={
            **SCALES,
            "backbone_config": HGNET,
            "class_order": [1, 0, 2],
            "class_thresholds": [0.4, 0.5, 0.6],
            "num_labels": 3,
            "reading_order_config": {
                "coordinate_size": 6,
                "hidden_size": 32,
                "max_2d_position_embeddings": 1024,
                "shape_size": 4,
            },
        },
        more=images(),
    ),
    "pp_doclayout_v3": Row(
        config={
            **SCALES,
            "backbone_config": {**HGNET, "out_features": STAGES},
            "encoder_in_channels": [8, 16, 16],
            "mask_feature_channels": [8, 8],
            "num_prototypes": 4,
            "x4_feat_dim": 8,
        },
        more=images(),
    ),
    "pp_doclayout_v4": Row(config={**SCALES, "backbone_config": HGNET}, more=images()),
    "pp_ocrv5_mobile_rec": Row(
        model="PPOCRV5MobileRecForTextRecognition",
        more=lambda model: {"pixel_values": draw(BATCH, 3, 96, 160)},
    ),
    "pp_ocrv5_server_rec": Row(
        model="PPOCRV5ServerRecForTextRecognition",
        more=lambda model: {"pixel_values": draw(BATCH, 3, 96, 160)},
    ),
    "pp_ocrv6_small_rec": Row(
        model="PPOCRV6SmallRecForTextRecognition",
        config={"from_scratch": True},
        more=lambda model: {"pixel_values": draw(BATCH, 3, 48, 320)},
    ),
    "prompt_depth_anything": Row(
        config={
            "backbone_config": SEQUENCES,
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "reassemble_hidden_size": 32,
        },
    ),
    "rf_detr": Row(
        config={
            "backbone_config": {
                **FOUR_LAYERS,
                "image_size": 56,
                "num_windows": 2,
                "out_features": ["stage2", "stage4"],
            },
            "num_queries": 5,
            "group_detr": 2,
        },
        more=images_in_a_frame(56, 56),
    ),
    "rf_detr_dinov2": Row(
        model="RfDetrDinov2Backbone",
        config={
            **FOUR_LAYERS,
            "image_size": 56,
            "num_windows": 2,
            "out_features": ["stage2", "stage4"],
        },
    ),
    "rt_detr": Row(
        config={**SCALES, "backbone_config": {**RESNET, "model_type": "rt_detr_resnet"}},
        more=images(),
    ),
    "rt_detr_v2": Row(
        config={**SCALES, "backbone_config": {**RESNET, "model_type": "rt_detr_resnet"}},
        more=images(),
    ),
    "sam": Row(
        config={
            "vision_config": SAM_VISION,
            "prompt_encoder_config": {**PROMPTS, "image_embedding_size": 4},
        },
        inputs=points,
    ),
    "sam2": Row(
        config={"vision_config": SAM2_VISION, "prompt_encoder_config": PROMPTS}, inputs=points
    ),
    "sam2_hiera_det_model": Row(config=HIERA),
    "sam2_video": Row(
        config={
            **MEMORY,
            "memory_attention_feed_forward_hidden_size": 48,
            "vision_config": SAM2_VISION,
            "prompt_encoder_config": PROMPTS,
        },
        calls={
            "forward": None,
            "_single_frame_forward": a_frame(64),
            "memory_attention.forward": memories,
        },
        because="its forward is of a session, without gradients: what it calls is run instead",
    ),
    "sam2_vision_model": Row(config=SAM2_VISION),
    "sam3": Row(
        config={"vision_config": SAM3_VISION, "detr_decoder_config": {"num_queries": 5}},
        more=mirrored,
    ),
    "sam3_detr_decoder": Row(config={"num_queries": 5}, inputs=features),
    "sam3_detr_encoder": Row(inputs=feature_maps),
    "sam3_lite_text_detr_decoder": Row(config={"num_queries": 5}, inputs=features),
    "sam3_lite_text_detr_encoder": Row(inputs=feature_maps),
    "sam3_lite_text_mask_decoder": Row(inputs=queries),
    "sam3_lite_text_text_model": Row(config={"num_hidden_layers": 3}),
    "sam3_mask_decoder": Row(inputs=queries),
    "sam3_tracker": Row(
        config={"vision_config": SAM3_VISION, "prompt_encoder_config": SAM3_PROMPTS}, inputs=points
    ),
    "sam3_tracker_video": Row(
        config={
            **MEMORY,
            "image_size": 56,
            "memory_attention_feed_forward_hidden_size": 48,
            "vision_config": SAM3_VISION,
            "prompt_encoder_config": SAM3_PROMPTS,
        },
        calls={
            "forward": None,
            "_single_frame_forward": a_frame(56),
            "memory_attention.forward": memories,
        },
        because="its forward is of a session, without gradients: what it calls is run instead",
    ),
    "sam3_video": Row(
        config={
            "detector_config": {
                "vision_config": SAM3_VISION,
                "detr_decoder_config": {"num_queries": 5},
            },
            "tracker_config": {
                **MEMORY,
                "image_size": 56,
                "memory_attention_feed_forward_hidden_size": 48,
                "vision_config": SAM3_VISION,
                "prompt_encoder_config": SAM3_PROMPTS,
            },
        },
        calls={
            "forward": None,
            "detector_model.forward": lambda model: {
                "pixel_values": draw(BATCH, 3, 56, 56).flip(-1),
                "input_ids": tokens(),
            },
            "tracker_model._single_frame_forward": lambda model: {
                **a_frame(56)(model),
                "image_embeddings": pyramid(1),
                "pixel_values": None,
            },
            "tracker_model.memory_attention.forward": memories,
        },
        because="its forward is of a session, without gradients: what it calls is run instead",
    ),
    "sam_hq": Row(
        config={
            "vision_config": SAM_VISION,
            "prompt_encoder_config": {**PROMPTS, "image_embedding_size": 4},
            "mask_decoder_config": {"vit_dim": 32},
        },
        inputs=points,
    ),
    "sam_hq_vision_model": Row(config=SAM_VISION),
    "sam_vision_model": Row(config=SAM_VISION),
    "segformer": Row(more=images(64, 64)),
    "seggpt": Row(
        config={
            "image_size": [64, 32],
            "pretrain_image_size": 32,
            "num_hidden_layers": 3,
            "merge_index": 0,
            "mlp_dim": 48,
            "intermediate_hidden_state_indices": [1, 2],
            "decoder_hidden_size": 16,
        },
        inputs=lambda model: {
            "pixel_values": draw(BATCH, 3, 32, 32),
            "prompt_pixel_values": draw(BATCH, 3, 32, 32) / 2,
            "prompt_masks": draw(BATCH, 3, 32, 32) / 3,
        },
    ),
    "slanext": Row(
        model="SLANeXtForTableRecognition",
        config={
            "vision_config": {**SAM_VISION, "image_size": 64},
            "hidden_size": 32,
            "post_conv_in_channels": 32,
            "post_conv_out_channels": 32,
            "max_text_length": 3,
        },
    ),
    "slanext_vision": Row(config=SAM_VISION),
    "superglue": Row(
        config={
            "keypoint_detector_config": SUPERPOINT,
            "keypoint_encoder_sizes": [8, 16],
            "gnn_layers_types": ["self", "cross"],
        },
        inputs=pairs,
    ),
    "swin": Row(config=SWIN),
    "swin2sr": Row(config={**SWIN, "image_size": 8}),
    "swinv2": Row(config=SWIN),
    "table-transformer": Row(
        config={"backbone_config": RESNET, "num_queries": 10}, more=images_in_a_frame()
    ),
    "timesformer": Row(more=frames),
    "tipsv2_dpt": Row(
        config={
            "backbone_config": SEQUENCES,
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 8, 8],
        },
        more=mirrored,
    ),
    "videomae": Row(config={"num_frames": 4}, more=frames),
    "videoprism": Row(
        config={
            "vision_config": {
                "image_size": 36,
                "num_frames": 4,
                "num_spatial_layers": 2,
                "num_temporal_layers": 1,
                "num_auxiliary_layers": 1,
            }
        },
        more=lambda model: {"pixel_values_videos": draw(BATCH, 4, 3, 36, 36)},
    ),
    "videoprism_text_model": Row(
        paddings=("right",),
        because="its states have a token more than its mask: left padding would be compared",
    ),
    "vitmatte": Row(config={"backbone_config": {"use_relative_position_embeddings": True}}),
    "vivit": Row(config={"num_frames": 4, "image_size": 32}, more=frames),
    "zoedepth": Row(
        config={
            "backbone_config": SEQUENCES,
            "bottleneck_features": 16,
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 8, 8],
        },
    ),
}
