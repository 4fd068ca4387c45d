"""Time series, proteins, actions and the rest."""

from matrix.row import Row

ROWS: dict[str, Row] = {}
