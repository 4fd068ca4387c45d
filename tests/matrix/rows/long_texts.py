"""Models of long texts and other attention of their own."""

import torch
from matrix.inputs import BATCH, LENGTH, tokens
from matrix.row import Row


def some_global(model):
    """Longformer's tokens that see all and are seen by all: one in each text, then two."""
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    mask[:, 0] = mask[1, 4] = 1
    return {"input_ids": tokens(), "global_attention_mask": mask}


ROWS: dict[str, Row] = {
    "big_bird": Row(
        config={"block_size": 4, "num_random_blocks": 1},
        model="BigBirdForMaskedLM",
        inputs=lambda model: {"input_ids": tokens(32)},
    ),
    "bigbird_pegasus": Row(
        config={"block_size": 4, "num_random_blocks": 1},
        more=lambda model: {"input_ids": tokens(36)},
    ),
    "cpmant": Row(config={"dim_head": 8, "dim_ff": 48, "prompt_length": 4, "segment_types": 4}),
    "esm": Row(
        config={
            "vocab_size": 99,
            "pad_token_id": 1,
            "mask_token_id": 3,
            "position_embedding_type": "rotary",
        }
    ),
    "led": Row(
        config={
            "attention_window": [4, 8],
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
        calls={
            "forward": lambda model: {**some_global(model), "decoder_input_ids": tokens(6)},
        },
    ),
    "longformer": Row(config={"attention_window": [4, 8]}, calls={"forward": some_global}),
    "longt5": Row(
        config={"local_radius": 3, "decoder_start_token_id": 0, "bos_token_id": 1},
    ),
    "sew-d": Row(
        config={
            "conv_dim": [16, 16],
            "conv_stride": [5, 4],
            "conv_kernel": [10, 8],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "position_buckets": 8,
        },
    ),
    "xlnet": Row(),
}
