"""Models of long texts and other attention of their own."""

from dataclasses import fields

import torch
from matrix.inputs import BATCH, LENGTH, draw, token_mask, tokens
from matrix.row import Row


def some_global(model):
    """Longformer's tokens that see all and are seen by all: one in each text, then two."""
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    mask[:, 0] = mask[1, 4] = 1
    return {"input_ids": tokens(), "global_attention_mask": mask}


def evolla(model):
    """A text, and two proteins of which the second is shorter."""
    mask = torch.ones(BATCH, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return {"protein_input_ids": tokens(10, seed=3, most=30), "protein_attention_mask": mask}


def residues(sequence):
    """The features of a protein, named by the letters of its residues."""
    # not in every transformers that is supported
    from transformers.models.esmfold2.protein_utils import prepare_protein_features

    return prepare_protein_features(sequence)


def protein(model):
    """A sequence of residues, and the atoms of each."""
    from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomInputs

    features = residues("MKTAYIA")
    del features["distogram_atom_idx"]
    names = [field.name for field in fields(EsmFold2AtomInputs)]
    atoms = EsmFold2AtomInputs(**{name: features.pop(name) for name in names})
    return {**features, "atom_inputs": atoms}


ATOMS = {"num_spatial_rope_pairs_per_axis": 1, "num_uid_rope_pairs": 1}
EVOLLA = Row(
    config={
        "aligner_num_add_layers": 2,
        "resampler_depth": 1,
        "resampler_num_latents": 4,
        "protein_encoder_config": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 3},
    },
    more=evolla,
)

CLVP = {"hidden_size": 64, "num_attention_heads": 2}
BARK = {
    "input_vocab_size": 99,
    "output_vocab_size": 99,
    "block_size": 64,
}

ROWS: dict[str, Row] = {
    "EvollaModel": EVOLLA,
    "bark": Row(
        config={
            "codec_config": {
                "num_filters": 2,
                "hidden_size": 8,
                "codebook_size": 8,
                "num_lstm_layers": 1,
            },
            "semantic_config": BARK,
            "coarse_acoustics_config": BARK,
            "fine_acoustics_config": BARK,
        },
        inputs=lambda model: {},
        calls={
            "semantic": lambda model: {"input_ids": tokens()},
            "coarse_acoustics": lambda model: {
                "input_ids": tokens(),
                "attention_mask": token_mask("left"),
            },
            "fine_acoustics": lambda model: {
                "codebook_idx": 1,
                "input_ids": torch.stack([tokens(seed=seed) for seed in range(8)], dim=-1),
            },
        },
    ),
    "big_bird": Row(
        config={"block_size": 4, "num_random_blocks": 1},
        model="BigBirdForMaskedLM",
        inputs=lambda model: {"input_ids": tokens(32)},
    ),
    "bigbird_pegasus": Row(
        config={"block_size": 4, "num_random_blocks": 1},
        more=lambda model: {"input_ids": tokens(36)},
    ),
    "clvp": Row(
        config={
            "text_config": CLVP,
            "speech_config": CLVP,
            # which take the place of what is spoken behind its end
            "decoder_config": {"decoder_fixing_codes": [83, 45, 45, 48]},
        },
        more=lambda model: {"input_features": draw(BATCH, 16, 8)},
        calls={
            "text_encoder_model": lambda model: {
                "input_ids": tokens(),
                "attention_mask": token_mask("left"),
            },
            "generate": lambda model: {
                "input_ids": tokens(),
                "input_features": draw(BATCH, 16, 8),
                "do_sample": False,
                "max_new_tokens": 4,
                "return_dict_in_generate": True,
            },
        },
        paddings=(),
        generates=False,
        because="it gives a vector for each text; padded, the encoder of texts is called; "
        "its `generate` fails unless it returns a dict",
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
    "esmfold2": Row(
        config={
            "atom_feature_dim": None,
            "single_inputs_size": 99,
            "pairwise_hidden_size": 32,
            "pair_transition_intermediate_size": 48,
            "sliding_window": 8,
            "num_loops": 1,
            "folding_trunk_num_hidden_layers": 1,
            "parcae_num_coda_layers": 1,
            "atom_encoder": ATOMS,
            "structure_head": {
                "diffusion_module": {"atom_encoder": ATOMS, "pair_intermediate_size": 48},
                "num_diffusion_samples": 1,
                "inference_num_steps": 4,
            },
            "confidence_head": {"num_hidden_layers": 1},
            "msa_encoder": {"num_hidden_layers": 1, "outer_hidden_size": 4},
            "lm_encoder": {"num_hidden_layers": 1},
        },
        inputs=protein,
        calls={"fold": lambda model: residues("MKTAY")},
    ),
    "evolla": EVOLLA,
    "funnel": Row(config={"d_inner": 48, "block_sizes": [1, 1]}),
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
    "reformer": Row(
        config={
            "attn_layers": ["local", "lsh"],
            "axial_pos_embds": False,
            "max_position_embeddings": 64,
            "hash_seed": 0,
            "num_buckets": 4,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 8,
            "is_decoder": True,
        },
        more=lambda model: {"input_ids": tokens(16)},
        training=True,
        because="its reversible layers compute no gradients in evaluation mode",
    ),
    "vits": Row(
        config={
            "vocab_size": 99,
            "noise_scale": 0.0,
            "noise_scale_duration": 0.0,
            "speaking_rate": 1e3,
            "flow_size": 16,
            "spectrogram_bins": 16,
            "upsample_initial_channel": 16,
            "upsample_rates": [2, 2],
            "upsample_kernel_sizes": [4, 4],
            "duration_predictor_filter_channels": 16,
            "posterior_encoder_num_wavenet_layers": 1,
        },
        calls={
            "text_encoder": lambda model: {
                "input_ids": tokens(),
                "attention_mask": token_mask("right"),
                "padding_mask": token_mask("right")[..., None].float(),
            },
        },
        paddings=(),
        because="its outputs are sound; of padded texts, those of its encoder are compared",
    ),
    "xlnet": Row(config={"d_inner": 48}),
}
