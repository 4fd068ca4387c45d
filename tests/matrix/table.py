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

NEWEST: dict[str, Row] = {
    **audio.ROWS,
    **audio_n_to_z.ROWS,
    **long_texts.ROWS,
    **multimodal.ROWS,
    **multimodal_h_to_z.ROWS,
    **other.ROWS,
    **text.ROWS,
    **vision.ROWS,
}
ROWS = older.as_before(transformers.__version__, NEWEST)
