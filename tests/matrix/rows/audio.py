"""Speech, music and what listens."""

from matrix.row import Row

ROWS: dict[str, Row] = {}
