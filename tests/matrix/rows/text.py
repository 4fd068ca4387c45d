"""Models of text alone."""

from matrix.row import Row

ROWS: dict[str, Row] = {}
