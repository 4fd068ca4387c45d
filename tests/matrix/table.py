"""All rows of the matrix, by model type."""

from matrix.row import Row
from matrix.rows import audio, long_texts, multimodal, other, text, vision

ROWS: dict[str, Row] = {
    **audio.ROWS,
    **long_texts.ROWS,
    **multimodal.ROWS,
    **other.ROWS,
    **text.ROWS,
    **vision.ROWS,
}
