"""Images and videos: classification, detection, segmentation, depth."""

from matrix.row import Row

ROWS: dict[str, Row] = {}
