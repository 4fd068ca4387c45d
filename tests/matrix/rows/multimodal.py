"""Models of text and images or sound together."""

from matrix.row import Row

ROWS: dict[str, Row] = {}
