"""All rows of the matrix, by model type."""

import transformers
from matrix.row import Row
from matrix.rows import (
    audio,
    audio_n_to_z,
    long_texts,
    multimodal,
    multimodal_h_to_z,
    older,
    other,
    text,
    vision,
)

FILES = (
    audio,
    audio_n_to_z,
    long_texts,
    multimodal,
    multimodal_h_to_z,
    other,
    text,
    vision,
)
NEWEST: dict[str, Row] = {name: row for file in FILES for name, row in file.ROWS.items()}
ROWS = older.as_before(transformers.__version__, NEWEST)
