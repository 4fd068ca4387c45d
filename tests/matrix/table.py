"""All rows of the matrix, by model type."""

from matrix.row import Row
from matrix.rows import audio, long_texts, multimodal, multimodal_h_to_z, other, text, vision

ROWS: dict[str, Row] = {
    **audio.ROWS,
    **long_texts.ROWS,
    **multimodal.ROWS,
    **multimodal_h_to_z.ROWS,
    **other.ROWS,
    **text.ROWS,
    **vision.ROWS,
}
