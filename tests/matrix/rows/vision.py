"""Images and videos: classification, detection, segmentation, depth."""

from typing import Any

import torch
from matrix.inputs import BATCH, draw, look, side
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
    "reshape_hidden_states": False,
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


def pairs(model: Any) -> dict[str, Tensor]:
    """Two images to be matched."""
    channels = look(model.config, "num_channels", default=3)
    return {"pixel_values": draw(1, 2, channels, 64, 64)}


ROWS: dict[str, Row] = {
    "chmv2": Row(
        config={
            "backbone_config": {**FOUR_LAYERS, "reshape_hidden_states": True},
            "fusion_hidden_size": 16,
            "head_hidden_size": 16,
            "number_output_channels": 16,
            "post_process_channels": [8, 8, 8, 8],
        },
    ),
    "conditional_detr": Row(
        config={"backbone_config": RESNET, "num_queries": 10}, more=images_in_a_frame()
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
            "backbone_config": FOUR_LAYERS,
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "reassemble_hidden_size": 32,
        },
    ),
    "detr": Row(config={"backbone_config": RESNET, "num_queries": 10}, more=images_in_a_frame()),
    "donut-swin": Row(config=SWIN),
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
    "mm-grounding-dino": Row(
        config={
            "backbone_config": SWIN_OF_FOUR,
            "num_queries": 10,
        },
        more=images_in_a_frame(),
        reference={"": "eager", "text_config": "sdpa"},
        because="eager BERT adds the boolean mask of phrases to the scores as zeros and ones",
    ),
    "pp_doclayout_v2": Row(config={**SCALES, "backbone_config": HGNET}, more=images()),
    "pp_doclayout_v3": Row(config={**SCALES, "backbone_config": HGNET}, more=images()),
    "pp_doclayout_v4": Row(config={**SCALES, "backbone_config": HGNET}, more=images()),
    "prompt_depth_anything": Row(
        config={
            "backbone_config": FOUR_LAYERS,
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "reassemble_hidden_size": 32,
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
    "segformer": Row(more=images(64, 64)),
    "swin": Row(config=SWIN),
    "swin2sr": Row(config={**SWIN, "image_size": 8}),
    "swinv2": Row(config=SWIN),
    "table-transformer": Row(
        config={"backbone_config": RESNET, "num_queries": 10}, more=images_in_a_frame()
    ),
    "timesformer": Row(more=frames),
    "tipsv2_dpt": Row(
        config={
            "backbone_config": FOUR_LAYERS,
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 8, 8],
        },
    ),
    "upernet": Row(
        config={
            "backbone_config": {**SWIN_OF_FOUR, "model_type": "swin"},
            "hidden_size": 16,
            "auxiliary_channels": 16,
        }
    ),
    "videomae": Row(config={"num_frames": 4}, more=frames),
    "vivit": Row(config={"num_frames": 4, "image_size": 32}, more=frames),
    "zoedepth": Row(
        config={
            "backbone_config": FOUR_LAYERS,
            "bottleneck_features": 16,
            "fusion_hidden_size": 16,
            "neck_hidden_sizes": [8, 8, 8, 8],
        },
    ),
}
