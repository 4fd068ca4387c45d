"""All rows of the matrix, by model type."""

from matrix.row import Row
from matrix.rows import (
    audio,
    audio_n_to_z,
    long_texts,
    multimodal,
    multimodal_h_to_z,
    other,
    text,
    vision,
)

ROWS: dict[str, Row] = {
    **audio.ROWS,
    **audio_n_to_z.ROWS,
    **long_texts.ROWS,
    **multimodal.ROWS,
    **multimodal_h_to_z.ROWS,
    **other.ROWS,
    **text.ROWS,
    **vision.ROWS,
}
