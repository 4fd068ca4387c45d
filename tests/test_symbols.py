"""What a mask function says when it is called with symbols is what it says on all indices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from flashpatch.symbols import BLOCKS, DOCUMENTS, POSITIONS, Place, read
from flashpatch_kernels import masks
from flashpatch_kernels.masks import Intervals

B, L = 2, 12  # batch, length of the tables
TABLES = torch.Generator().manual_seed(0)
VISIBLE = torch.rand(B, L, generator=TABLES) > 0.3
SORTED = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4], [5, 5, 6, 7, 7, 7, 7, 8, 8, 9, 9, 9]])
BLOCK = torch.tensor(
    [[-1, 0, 0, 0, -1, -1, 1, 1, -1, 2, 2, -1], [0, 0, -1, 1, 1, 1, 1, 2, 2, 2, -1, 3]]
)
PREFIX = torch.tensor([3, 7])
PADDING = torch.tensor([2, 0])
WINDOW = torch.tensor(3)

READABLE = {
    "window": lambda b, h, q, k: (k <= q) & (k > q - 3),
    "window of a tensor": lambda b, h, q, k: (k <= q) & (k > q - WINDOW),
    "both sides": lambda b, h, q, k: abs(q - k) <= 2,
    "both sides, exclusive": lambda b, h, q, k: abs(k - q) < 2,
    "prefix": lambda b, h, q, k: (k <= q) | (k < PREFIX[b]),
    "chunks": lambda b, h, q, k: q // 3 == k // 3,
    "chunks after padding": lambda b, h, q, k: (k - PADDING[b]) // 4 == (q - PADDING[b]) // 4,
    "neighbours": lambda b, h, q, k: (k < q) | (k == q) | (k == q + 1),
    "negatives": lambda b, h, q, k: (-k >= -q) & (-(q - k) <= 0),
    "numbers first": lambda b, h, q, k: 3 + q >= 1 + k,
    "a Moonshine window": lambda b, h, q, k: (
        ((q - k >= 0) & (q - k < 4)) | ((q - k < 0) & (-(q - k) < 2))
    ),
    "everything": lambda b, h, q, k: q == q,
    "a tensor": lambda b, h, q, k: torch.tensor(True),
    "queries of a table": lambda b, h, q, k: (SORTED[b, q] > 2) & (k <= q),
    "a table of truths": lambda b, h, q, k: VISIBLE[b, q] & VISIBLE[b, k] & (k <= q),
    "the key before": lambda b, h, q, k: VISIBLE[b, k + 1] & (k <= q),
}

UNREADABLE = {
    "every second key": lambda b, h, q, k: (k % 2 == 0) & (k <= q),
    "a gap": lambda b, h, q, k: (k < q - 3) | (k == q),
    "all but one": lambda b, h, q, k: k != q,
    "a branch": lambda b, h, q, k: torch.where(q > k, k >= 0, k == q),
    "PyTorch's division": lambda b, h, q, k: (
        torch.div(q, 3, rounding_mode="floor") >= torch.div(k, 3, rounding_mode="floor")
    ),
    "a fraction": lambda b, h, q, k: k > q - 2.5,
    "one key for all": lambda b, h, q, k: (k <= q) | VISIBLE[b, k],
    "positions of no document": lambda b, h, q, k: SORTED[b, k] <= SORTED[b, q],
    "a table of pairs": lambda b, h, q, k: torch.ones(L, L, dtype=torch.bool).tril()[q, k],
    "a table of one row": lambda b, h, q, k: (SORTED[0][q] == SORTED[0][k]) & (k <= q),
}


def place(n, m, first_query=0, first_key=0):
    return Place((torch.arange(n) + first_query)[None], B, first_key, m)


def filled(function, n, m, first_query=0, first_key=0):
    """The mask as transformers fills it for functions of users."""
    return masking_utils.sdpa_mask(
        B, n, m, first_query, first_key, function, allow_is_causal_skip=False, use_vmap=True
    )


def meaning(condition, n, m):
    """The N x M mask that a condition stands for."""
    runs = None if condition.visible is None else masks.runs_of(condition.visible)
    mask = Intervals(condition.bounds(), runs)
    return masks.allowed(mask, n, m, "cpu").expand(B, 1, n, m)


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize(("n", "m", "q", "k"), [(7, 7, 0, 0), (3, 7, 4, 0), (1, 5, 6, 2)])
def test_a_readable_function_is_read_exactly(name, n, m, q, k):
    condition = read(READABLE[name], place(n, m, q, k))
    assert condition is not None
    assert torch.equal(meaning(condition, n, m), filled(READABLE[name], n, m, q, k))


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_function_that_may_not_be_an_interval_is_not_read(name):
    assert read(UNREADABLE[name], place(7, 7)) is None


@pytest.mark.parametrize("name", ["branch", "index", "fail"])
def test_a_function_that_can_not_take_symbols_is_not_read(name):
    functions = {
        "branch": lambda b, h, q, k: k <= q if q > 2 else k == q,
        "index": lambda b, h, q, k: [True, False][k],
        "fail": lambda b, h, q, k: k.item() <= q.item(),
    }
    assert read(functions[name], place(7, 7)) is None


def test_a_function_that_is_not_read_leaves_no_trace_on_later_calls():
    read(UNREADABLE["every second key"], place(7, 7))
    assert torch.equal(SORTED[torch.tensor(0), torch.tensor(3)], torch.tensor(1))


def test_a_table_too_short_for_the_keys_is_not_read():
    assert read(lambda b, h, q, k: VISIBLE[b, k], place(2, L + 1)) is None


def test_a_table_of_too_few_rows_is_not_read():
    assert read(lambda b, h, q, k: VISIBLE[:1][b, k], place(2, L)) is None


def test_what_is_taken_for_granted_about_tables_is_named():
    def equal(table):
        return lambda b, h, q, k: table[b, q] == table[b, k]

    def causal(b, h, q, k):
        return k <= q

    documents = masking_utils.and_masks(causal, equal(SORTED))
    blocks = masking_utils.or_masks(causal, equal(BLOCK))
    assert read(causal, place(7, 7)).given == frozenset()
    assert read(documents, place(7, 7)).given == {DOCUMENTS}
    assert read(blocks, place(7, 7)).given == {BLOCKS}


def test_positions_may_be_remapped_inside_documents_only():
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [4, 5, 0, 1, 0, 1, 2]])
    number = (torch.diff(position, prepend=position[:, :1] - 1) != 1).cumsum(-1)

    def remapped(b, h, q, k):
        q, k = position[b, q], position[b, k]
        return (k <= q) & (q // 2 == k // 2)

    def document(b, h, q, k):
        return number[b, q] == number[b, k]

    both = masking_utils.and_masks(document, remapped)
    condition = read(both, place(7, 7))
    assert POSITIONS not in condition.given
    assert torch.equal(meaning(condition, 7, 7), filled(both, 7, 7))
    assert read(remapped, place(7, 7)) is None


def atoms():
    """Mask functions of the kinds that transformers composes."""
    size = st.integers(1, 5)
    return st.one_of(
        st.just(masking_utils.causal_mask_function),
        st.just(masking_utils.bidirectional_mask_function),
        st.just(masking_utils.packed_sequence_mask_function(SORTED)),
        st.just(masking_utils.blockwise_overlay(BLOCK)),
        st.just(masking_utils.padding_mask_function(VISIBLE)),
        st.sampled_from(list(READABLE.values())),
        size.map(masking_utils.sliding_window_overlay),
        size.map(masking_utils.sliding_window_bidirectional_overlay),
        size.map(lambda n: masking_utils.chunked_overlay(n, PADDING)),
    )


def compositions():
    return st.recursive(
        atoms(),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda f: masking_utils.and_masks(*f)),
            st.tuples(inner, inner).map(lambda f: masking_utils.or_masks(*f)),
        ),
        max_leaves=5,
    )


@settings(max_examples=60, deadline=None)
@given(compositions(), st.integers(0, 6), st.integers(1, 6), st.integers(0, 3), st.integers(1, 8))
def test_whatever_is_read_of_a_composition_is_exact(function, first_query, n, first_key, m):
    n, m = min(n, L - first_query), min(m, L - 1 - first_key)
    condition = read(function, place(n, m, first_query, first_key))
    if condition is not None:
        expected = filled(function, n, m, first_query, first_key)
        assert torch.equal(meaning(condition, n, m), expected)
