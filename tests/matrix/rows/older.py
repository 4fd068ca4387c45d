"""What differs from the other rows in the older transformers that are supported.

Much of it is what their configs and models did not do for themselves yet.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from matrix.configs import merged, small_values
from matrix.inputs import BATCH, LENGTH, draw, pixels, tokens
from matrix.row import Row
from matrix.rows.audio import ENCODEC, MUSICGEN
from matrix.rows.audio_n_to_z import IMAGES
from packaging.version import Version
from transformers import CONFIG_MAPPING, EdgeTamMaskDecoderConfig, Sam2VideoMaskDecoderConfig

Changes = Mapping[str, Any]


def small(model_type: str, **overrides: Any) -> dict[str, Any]:
    """The values of a small config within another, which the older ones must be given whole."""
    values = small_values(CONFIG_MAPPING[model_type]())
    return {**values, "model_type": model_type, **overrides}


def music(name: str) -> Changes:
    """Of a model that is told in a text what to play."""
    return {
        "config": {
            "from_scratch": True,
            "text_encoder": small("t5"),
            "audio_encoder": small("encodec", **ENCODEC),
            "decoder": small(f"{name}_decoder", **MUSICGEN["decoder"]),
        }
    }


TIMM: Changes = {"needs": "timm"}
NAN: Changes = {
    "reference": "sdpa",
    "because": "queries that see no key are NaN in eager attention, and then all gradients are",
}
TEXT_SIDE = "its text side does not ask the interface yet"

# A type -> what of its row was different before a version; values of configs and calls join those
# of the row.
BEFORE_5_23: Mapping[str, Changes] = {
    "canary": NAN,
    "cohere_asr": NAN,
    "cohere_compass_text": {
        "config": {
            "rope_parameters": {
                kind: {"mrope_section": [1, 1, 2]}
                for kind in ("full_attention", "sliding_attention")
            }
        }
    },
    "edgetam": {
        "config": {
            "from_scratch": True,
            "vision_config": {"fpn_hidden_size": 32, "has_no_defaults_at_init": True},
            "prompt_encoder_config": {"hidden_size": 32},
            "mask_decoder_config": small_values(EdgeTamMaskDecoderConfig()),
        },
        "because": "its default config is read from the Hub, even to print another",
    },
    "gemma4_audio": {
        "reference": "sdpa",
        "because": "eager attention is given numbers, and negates them",
    },
    "granite4_vision": {
        "config": {
            "qformer_config": {
                "encoder_hidden_size": 128,
                "hidden_size": 128,
                "num_attention_heads": 2,
            },
            "text_config": small("granite"),
            "vision_feature_select_strategy": "full",
        }
    },
    "kosmos-2": {
        "reference": "sdpa",
        "because": "its images meet queries in a class that says it is causal, unheard by eager",
    },
    "kyutai_speech_to_text": {
        "reference": "sdpa",
        "because": "it makes no mask where nothing is padded, and eager attention sees the future",
    },
    "lightglue": {"config": {"intermediate_size": 64}},
    "llama4": {
        "calls": {
            "get_image_features": lambda model: {
                "pixel_values": pixels(model),
                "vision_feature_select_strategy": "default",
            }
        }
    },
    "minicpmv4_6_vision": {
        "inputs": lambda model: {
            "pixel_values": draw(1, 3, model.config.patch_size, 32 * model.config.patch_size),
            "target_sizes": torch.tensor([[4, 4], [4, 4]], dtype=torch.int32),
        },
        "because": "its images must be of one size",
    },
    "moshi": {"generates": False, "because": "it decodes tokens that its codec lacks"},
    "musicgen": music("musicgen"),
    "musicgen_melody": music("musicgen_melody"),
    "parakeet_ctc": NAN,
    "parakeet_encoder": NAN,
    "parakeet_rnnt": NAN,
    "parakeet_tdt": NAN,
    "pe_audio_video": TIMM,
    "pe_audio_video_encoder": TIMM,
    "pe_video": TIMM,
    "pe_video_encoder": {
        "config": {
            "from_scratch": True,
            "head_dim": 8,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "vision_config": IMAGES,
        }
    },
    "perception_lm": {
        **TIMM,
        "config": {
            "vision_use_cls_token": True,
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "vit_tiny_patch16_224",
                "model_args": {"depth": 2, "img_size": 64, "num_heads": 4},
            },
        },
        "left": ("Attention",),
        "because": "Its vision tower is one of timm's, whatever its config says, with attention.",
    },
    "qwen3_omni_moe": {
        "calls": {
            "talker": lambda model: {
                "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
                "inputs_embeds": draw(BATCH, LENGTH, 32),
                "talker_input_ids": tokens(),
            }
        }
    },
    "qwen4_exp": NAN,
    "qwen4_exp_text": NAN,
    "sam2_video": {
        "config": {
            # values of a dict would become a config of the prompts
            "mask_decoder_config": Sam2VideoMaskDecoderConfig(
                **small_values(Sam2VideoMaskDecoderConfig())
            )
        }
    },
    "vibevoice": {"config": {"diffusion_head_config": {"latent_size": 32}}},
    "video_llava": {
        "calls": {"get_image_features": lambda model: {"pixel_values_images": pixels(model)}}
    },
    "vipllava": {"config": {"vision_feature_layers": [-2, -1]}},
    "vision-text-dual-encoder": {
        "config": {
            "from_scratch": True,
            "text_config": small("bert"),
            "vision_config": small("clip_vision_model"),
        }
    },
}
BEFORE_5_17: Mapping[str, Changes] = {
    "cpmant": {"generates": False, "because": "it has no cache for its prompt"},
    "seamless_m4t": {"left": ("SeamlessM4TAttention",), "because": TEXT_SIDE},
    "seamless_m4t_v2": {
        "reference": "eager",
        "left": ("SeamlessM4Tv2Attention",),
        "because": f"{TEXT_SIDE}, and it knows eager attention alone",
    },
}


# The latest first.
BEFORE = (("5.23", BEFORE_5_23), ("5.17", BEFORE_5_17))


def is_older(version: str) -> bool:
    """Whether some rows have changed since this version of transformers."""
    return Version(version) < Version(BEFORE[0][0])


def as_before(version: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows as they were in a version of transformers."""
    result = dict(rows)
    for change, changes in BEFORE:
        if Version(version) < Version(change):
            for name, changed in changes.items():
                row = result.get(name, Row())
                joined = {
                    "config": merged(row.config, changed.get("config", {})),
                    "calls": {**row.calls, **changed.get("calls", {})},
                }
                result[name] = replace(row, **{**changed, **joined})
    return result
