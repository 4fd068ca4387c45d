"""The terms of scores in the Hopper kernels on a card: learnt, given, and such as hide keys."""

from dataclasses import replace

import pytest
import torch
from hopper_calls import APART, DTYPES, FORWARD, SIZES, UNORDERED, attend, spread

from flashpatch_kernels import reference
from flashpatch_kernels.masks import Band

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

# Where the kernels of heads of 256 sum for biases, heads of 192 leave a part of a tile empty.
LEARNT = SIZES | {192: APART}


@pytest.fixture
def left_to_sum(monkeypatch):
    """The biases whose gradients the portable kernels summed, by computing dS anew."""
    from flashpatch_kernels.hopper import backward_pass

    names = []
    of_terms = backward_pass.term_gradients

    def spy(shared, row_sums, needs):
        names.extend(sorted({"bias", "table"} & needs))
        return of_terms(shared, row_sums, needs)

    monkeypatch.setattr(backward_pass, "term_gradients", spy)
    return names


@pytest.mark.parametrize("mask", ["full", "causal", "causal keys", "intervals"])
@pytest.mark.parametrize(
    "terms",
    [("softcap",), ("sinks",), ("slopes",), ("softcap", "sinks"), ("softcap", "slopes")],
    ids=str,
)
@pytest.mark.parametrize("d", SIZES)
def test_every_term(case, compare, mask, terms, d):
    """The gradient of slopes that are learnt is the portable kernels'."""
    compare(case(mask, terms=terms, d=d), [FORWARD] if "slopes" in terms else SIZES[d])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", ["full", "causal", "causal keys", "intervals"])
@pytest.mark.parametrize("d", LEARNT)
def test_a_bias_of_keys(case, compare, left_to_sum, mask, kv_heads, shape, d):
    """Its gradient is of sums that the kernels take along where one is of all heads of a key's."""
    compare(case(mask, terms=("bias",), bias_shape=shape, kv_heads=kv_heads, d=d), LEARNT[d])
    assert left_to_sum == ([] if kv_heads == 4 or shape[1] == 1 else ["bias"])


@pytest.mark.parametrize("terms", [("table",), ("clamped table",)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "window", "causal keys", "intervals"])
@pytest.mark.parametrize(
    ("d", "kv_heads"), [*[(d, kv_heads) for d in SIZES for kv_heads in (4, 2)], (192, 4)]
)
def test_a_table(case, compare, mask, kv_heads, terms, d):
    """Beyond its ends it is summed by the kernels of the keys' gradients, of each head."""
    summed = terms == ("table",) or kv_heads == 4
    one = case(mask, terms=terms, n=500, m=600, kv_heads=kv_heads, d=d, entries=150, first=-90)
    compare(one, LEARNT[d] if summed else [FORWARD])


@pytest.mark.parametrize("terms", [("bias",), ("clamped table",)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "causal keys"])
def test_what_is_learnt_beside_values_of_another_head_size(case, compare, mask, terms):
    compare(case(mask, terms=terms, n=500, m=600, kv_heads=4, d=192, dv=128), APART)


ENDS = [
    *[("full", *ends) for ends in [(2, 0), (40, -300), (40, 260)]],
    *[(mask, *ends) for mask in ("causal", "causal keys") for ends in [(40, -300), (2, -77)]],
    *[(Band(left=200, right=30), 20, first) for first in (-33, 0, 32, 64)],
]
# All that a query sees has one entry, whose gradient is what lse adds and else rounding: too much
# of that for four numbers of wide heads.
ONE_ENTRY = [("full", 1, 0), ("full", 1, 999), (Band(left=200, right=30), 20, -300)]


@pytest.mark.parametrize(
    ("mask", "entries", "first", "d"),
    [
        *[(*ends, d) for ends in ENDS for d in LEARNT],
        *[(*ends, d) for ends in ONE_ENTRY for d in (64, 128)],
    ],
)
def test_the_ends_of_a_table_anywhere(case, compare, mask, entries, first, d):
    options = {"terms": ("clamped table",), "entries": entries, "first": first}
    compare(case(mask, n=500, m=500, kv_heads=4, d=d, **options), LEARNT[d])


@pytest.mark.parametrize(
    "terms",
    [
        ("softcap", "bias"),
        ("softcap", "table"),
        ("bias", "clamped table", "sinks"),
        ("softcap", "bias", "table", "sinks"),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", SIZES)
def test_biases_beside_each_other(case, compare, request, mask, in_order, terms, d):
    if in_order:
        request.getfixturevalue("deterministic")
    unordered = in_order and mask == "causal keys"
    kernels = (UNORDERED if unordered else SIZES)[d]
    if "clamped table" in terms and unordered and d == 64:
        kernels = [FORWARD]
    compare(case(mask, terms=terms, n=400, m=400, kv_heads=4, d=d), kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [("bias",), ("table",), ("clamped table",)], ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_many_programs_with_biases(case, compare, terms, dtype, d):
    options = {"entries": 200, "first": -100, "bias_shape": (2, 4, 1), "dtype": dtype}
    one = case("causal", terms=terms, n=2011, m=2011, kv_heads=4, d=d, **options)
    compare(one, SIZES[d])


@pytest.mark.parametrize("hides", [-1e9, float("-inf")])
@pytest.mark.parametrize("d", SIZES)
def test_a_bias_of_keys_may_hide_them(case, compare, hides, d):
    """As masks that models make do, of single keys and of whole tiles, from the first on."""
    one = case("causal", terms=("bias",), bias_shape=(2, 1, 1), n=700, m=700, d=d)
    bias = one.options.bias.detach().clone()
    bias[0, ..., 1:300] = hides
    bias[1, ..., 5::7] = hides
    compare(replace(one, options=replace(one.options, bias=bias.requires_grad_())), SIZES[d])


@pytest.mark.parametrize("hides", [-1e9, float("-inf")])
@pytest.mark.parametrize("d", SIZES)
def test_a_table_may_hide_distances(case, compare, hides, d):
    """Single ones and all of many tiles, in a table whose heads lie beside each other in memory."""
    one = case("full", terms=("table",), n=700, m=700, d=d)
    table = one.options.table.detach().t().contiguous().t()
    table[:, :450] = hides
    table[:, 5::7] = hides
    compare(replace(one, options=replace(one.options, table=table.requires_grad_())), SIZES[d])


GIVEN = {
    "slopes": ("slopes", {}),
    "a bias of keys": ("bias", {}),
    "a table": ("table", {}),
    "a table of some distances": ("clamped table", {"entries": 150, "first": -90}),
    "one number": ("clamped table", {"entries": 1, "first": 0}),
    "two numbers": ("clamped table", {"entries": 2, "first": 0}),
    "a table of unseen distances": ("clamped table", {"entries": 40, "first": 260}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "causal window", "causal keys"])
@pytest.mark.parametrize("bias", GIVEN)
@pytest.mark.parametrize("d", SIZES)
def test_biases_that_are_given(
    case, pytorch, assert_as_exact_as_pytorch, launched, poisoned_memory, bias, mask, dtype, d
):
    """As ALiBi's slopes are; slopes that are learnt have the portable kernels' gradient."""

    def answer(one, attend):
        given = one.options.with_terms({x: t.detach() for x, t in one.options.terms.items()})
        out, _ = attend(one.q, one.k, one.v, given)
        return out, *torch.autograd.grad(out, (one.q, one.k, one.v), one.dout)

    term, more = GIVEN[bias]
    one = case(mask, terms=(term,), dtype=dtype, n=500, m=500, d=d, **more)
    true = answer(one.to(torch.float64), reference.attention)
    theirs, ours = answer(one, pytorch), answer(one, attend)
    assert launched == SIZES[d]
    for name, *found in zip(("out", "dq", "dk", "dv"), ours, theirs, true, strict=True):
        assert_as_exact_as_pytorch(*found, name)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("term", ["slopes", "bias", "table", "clamped table"])
@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", [64, 128])
def test_alike_calls_after_each_other_with_their_own_terms(
    case, launched, monkeypatch, mask, term, learnt, d
):
    """Slopes that are learnt take the portable kernels' steps."""
    from flashpatch_kernels.triton import launching

    one = case(mask, terms=(term,), n=500, m=500, kv_heads=4, d=d, entries=150, first=-90)
    ((name, x),) = one.options.terms.items()

    def answer(attend, q, k, v, options, dout):
        out, _ = attend(q, k, v, options)
        inputs = (q, k, v, *options.terms.values()) if learnt else (q, k, v)
        return out, *torch.autograd.grad(out, inputs, dout)

    for factor in (1.0, 0.5, -2.0):
        inputs = [spread(x.detach() * factor).requires_grad_() for x in (one.q, one.k, one.v)]
        mine = (x.detach() * abs(factor)).requires_grad_(learnt)
        options = one.options.with_terms({name: mine})
        found = answer(attend, *inputs, options, spread(one.dout))
        exact = [x.detach().double().requires_grad_() for x in inputs]
        options = options.with_terms({name: mine.detach().double().requires_grad_(learnt)})
        true = answer(reference.attention, *exact, options, one.dout.double())
        for ours, theirs in zip(found, true, strict=True):
            assert (ours - theirs).norm() < 2e-2 * theirs.norm()
        monkeypatch.setattr(launching, "launch", None)
    assert launched == ([FORWARD] if term == "slopes" and learnt else SIZES[d]) * 3
