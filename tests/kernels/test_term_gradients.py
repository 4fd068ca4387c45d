"""Which tiles' ds the gradient of a term is a sum of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashpatch_kernels.masks import Band, Intervals
from flashpatch_kernels.options import Options

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from flashpatch_kernels.triton import setups, term_gradients

SIDES = st.none() | st.integers(0, 12)


def beyond(n, m, mask, first, entries):
    """What is beyond the ends of such a table under a mask of n queries and m keys."""
    q, k, table = (torch.zeros(1, 1, rows, 16) for rows in (n, m, entries))
    options = Options(mask, table=table[0, ..., 0], first=first)
    return term_gradients.beyond(setups.Setup.of(q, k, k, (), options))


@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    sides=st.tuples(SIDES, SIDES),
    offset=st.integers(-6, 12),
    first=st.integers(-14, 14),
    entries=st.integers(1, 8),
)
def test_ends_beyond_which_a_band_shows_distances(sizes, sides, offset, first, entries):
    n, m = sizes
    left, right = sides
    place, j = torch.arange(n)[:, None] + offset, torch.arange(m)
    seen = torch.ones(n, m, dtype=torch.bool)
    if left is not None:
        seen &= j >= place - left
    if right is not None:
        seen &= j <= place + right
    distances = (j - place + offset)[seen]
    expected = bool((distances < first).any()), bool((distances >= first + entries).any())
    found = beyond(n, m, Band(left, right, offset), first, entries)
    # Where a band shows nothing at all it does not matter.
    assert found == expected or not seen.any()


def test_of_intervals_nothing_is_known():
    bounds = torch.zeros(1, 9, 2, dtype=torch.int32)
    assert beyond(9, 9, Intervals(bounds), -3, 7) == (True, True)
