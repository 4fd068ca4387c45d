"""Masks against their definition, spelled out query by query."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashpatch_kernels.masks import (
    Band,
    Boolean,
    Intervals,
    allowed,
    band_bounds,
    cu_seqlens,
    documents,
    intersect,
    key_mask,
    rows,
    runs_of,
)

lengths = st.integers(1, 12)
sides = st.none() | st.integers(-3, 12)
bands = st.builds(Band, sides, sides, st.integers(-6, 12))


@st.composite
def masks(draw, n, m):
    """Any mask of n queries and m keys for a batch of 2."""
    kind = draw(st.sampled_from(["band", "intervals", "keys", "boolean"]))
    if kind == "band":
        return draw(bands)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batch = draw(st.sampled_from([1, 2]))
    if kind == "keys":
        return key_mask(torch.rand(batch, m, generator=generator) > 0.4)
    if kind == "intervals":
        ends = torch.randint(
            0, m + 1, (batch, draw(st.sampled_from([1, n])), 2), generator=generator
        )
        return Intervals(ends.int())
    return Boolean(torch.rand(batch, 1, n, m, generator=generator) > 0.4)


@given(band=bands, n=lengths, m=lengths)
@settings(max_examples=60)
def test_a_band_is_what_its_numbers_say(band, n, m):
    seen = allowed(band, n, m, "cpu")[0, 0]
    for i in range(n):
        for j in range(m):
            after_left = band.left is None or j >= i + band.offset - band.left
            before_right = band.right is None or j <= i + band.offset + band.right
            assert seen[i, j] == (after_left and before_right)


@given(band=bands, n=lengths, m=lengths)
@settings(max_examples=60)
def test_a_bands_bounds_stay_within_the_keys(band, n, m):
    bounds = band_bounds(band, n, m, "cpu")
    assert bounds.dtype == torch.int32
    assert bounds.shape == (1, n, 2)
    assert bounds.min() >= 0
    assert bounds.max() <= m
    assert torch.equal(allowed(Intervals(bounds), n, m, "cpu"), allowed(band, n, m, "cpu"))


@given(data=st.data(), n=lengths, m=lengths)
@settings(max_examples=100)
def test_an_intersection_allows_what_both_allow(data, n, m):
    a, b = data.draw(masks(n, m)), data.draw(masks(n, m))
    both = allowed(a, n, m, "cpu") & allowed(b, n, m, "cpu")
    found = allowed(intersect(a, b, n, m, "cpu"), n, m, "cpu")
    assert torch.equal(found.expand(2, 1, n, m), both.expand(2, 1, n, m))


@given(data=st.data(), n=lengths, m=lengths)
@settings(max_examples=60)
def test_rows_are_the_mask_of_some_queries(data, n, m):
    mask = data.draw(masks(n, m))
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    whole = allowed(mask, n, m, "cpu").expand(-1, -1, n, m)[:, :, start:stop]
    part = allowed(rows(mask, start, stop), stop - start, m, "cpu")
    assert torch.equal(part.expand(*whole.shape), whole)


def test_an_intersection_of_structured_masks_stays_structured():
    keys = key_mask(torch.tensor([[True, False, True, True]]))
    assert isinstance(intersect(Band(right=0), keys, 4, 4, "cpu"), Intervals)
    assert isinstance(intersect(keys, keys, 4, 4, "cpu"), Intervals)
    of_keys = Boolean(torch.tensor([[[[True, True, False, True]]]]))
    assert isinstance(intersect(Band(right=0), of_keys, 4, 4, "cpu"), Intervals)
    assert intersect(Band(), keys, 4, 4, "cpu") is keys
    assert intersect(Band(right=0), Band(), 4, 4, "cpu") == Band(right=0)


@pytest.mark.parametrize(
    ("visible", "bounds", "runs"),
    [
        ([0, 0, 1, 1], [2, 4], [0, 0, 4, 4]),
        ([1, 1, 0, 0], [0, 2], [2, 2, 0, 0]),
        ([1, 0, 1, 1], [0, 4], [1, 0, 4, 4]),
        ([1, 1, 1, 1], [0, 4], [4, 4, 4, 4]),
    ],
)
def test_a_key_mask_has_tight_bounds_and_exact_runs(visible, bounds, runs):
    mask = key_mask(torch.tensor([visible]).bool())
    assert mask.bounds.tolist() == [[bounds]]
    assert mask.runs.tolist() == [runs]


def test_a_key_mask_without_visible_keys_is_empty():
    mask = key_mask(torch.zeros(2, 4, dtype=torch.bool))
    lo, hi = mask.bounds.unbind(-1)
    assert bool((lo >= hi).all())
    assert not allowed(mask, 3, 4, "cpu").any()


def test_a_key_mask_without_keys_is_empty():
    mask = key_mask(torch.zeros(2, 0, dtype=torch.bool))
    assert mask.bounds.shape == (2, 1, 2)
    assert mask.runs.shape == (2, 0)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
@settings(max_examples=60)
def test_runs_end_at_the_next_hidden_key(visible):
    runs = runs_of(torch.tensor([visible]))[0].tolist()
    for j, seen in enumerate(visible):
        end = next((e for e in range(j, len(visible)) if not visible[e]), len(visible))
        assert runs[j] == (end if seen else 0)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
@settings(max_examples=60)
def test_documents_are_runs_of_equal_ids(ids):
    seen = allowed(documents(torch.tensor([ids])), len(ids), len(ids), "cpu")[0, 0]
    for i in range(len(ids)):
        for j in range(len(ids)):
            between = ids[min(i, j) : max(i, j) + 1]
            assert seen[i, j] == (len(set(between)) == 1)


def test_cumulative_lengths_are_documents():
    mask = cu_seqlens(torch.tensor([0, 2, 5]), 7)
    expected = documents(torch.tensor([[1, 1, 2, 2, 2, 3, 3]]))
    assert torch.equal(mask.bounds, expected.bounds)
