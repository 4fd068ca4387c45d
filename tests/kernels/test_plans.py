"""What alike calls share, and what makes calls differ: forward passes."""

import pytest
import torch

from flashpatch_kernels.masks import Band, Boolean, Intervals
from flashpatch_kernels.options import Options, Relative

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from written_launches import (
    BOTH,
    CASES,
    ENGINES,
    OPTIONS,
    TERMS,
    bias,
    check_moved,
    intervals,
    layout,
    shifted,
    spread,
    table,
    tensors,
)

from flashpatch_kernels import hopper
from flashpatch_kernels import triton as portable
from flashpatch_kernels.triton import launching, plans


def changed(at, change):
    """q, k and v, of which one is changed."""
    return [change(x) if at == i else x for i, x in enumerate(tensors())]


@ENGINES
@pytest.mark.parametrize("runs", [False, True])
def test_alike_calls_under_intervals_bring_these_as_well(launches, engine, runs):
    for _ in range(2):
        q, k, v = tensors()
        mask = intervals(runs=runs)
        out, lse = engine.forward(q, k, v, Options(mask=mask, scale=0.125))
    plans.forget()
    expected = engine.forward(q, k, v, Options(mask=mask, scale=0.125))
    n = len(launches) // 3
    again, anew = launches[n : 2 * n], launches[2 * n :]
    assert [one.again for one in launches] == [False] * n + [True] * n + [False] * n
    moved = {x.data_ptr(): x.data_ptr() for x in (q, k, v, mask.bounds, mask.runs) if x is not None}
    check_moved(again, anew, moved)
    assert [moved[x.data_ptr()] for x in expected] == [out.data_ptr(), lse.data_ptr()]


@ENGINES
@pytest.mark.parametrize(
    "other",
    [intervals(batch=1), intervals(n=1), intervals(runs=True), Band(right=0)],
    ids=["one for the batch", "one for all queries", "runs", "a band"],
)
def test_calls_under_other_masks_share_nothing(launches, engine, other):
    for mask in (intervals(), other):
        engine.forward(*tensors(), Options(mask=mask, scale=0.125))
    assert not any(one.again for one in launches)


@ENGINES
def test_intervals_that_are_copied_share_nothing(launches, engine):
    for _ in range(2):
        mask = intervals()
        bounds = mask.bounds.transpose(0, 1).contiguous().transpose(0, 1)
        engine.forward(*tensors(), Options(mask=Intervals(bounds), scale=0.125))
    assert not any(one.again for one in launches)


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_alike_calls_share_a_launch_and_bring_their_tensors(launches, engine, dtype, sinks):
    for _ in range(2):
        q, k, v = tensors(dtype=dtype)
        options = Options(**OPTIONS, sinks=torch.randn(4) if sinks else None)
        out, lse = engine.forward(q, k, v, options)
    plans.forget()
    expected = engine.forward(q, k, v, options)
    assert [one.again for one in launches] == [False, True, False]
    given = [options.sinks] if sinks else []
    anew = launches[2].tensors()
    assert [*map(id, anew)] == [*map(id, (q, k, v, *expected, *given))]
    assert launches[1].arguments == launches[2].addressed([q, k, v, out, lse, *given])
    assert [*map(layout, (out, lse))] == [*map(layout, expected)]


@pytest.fixture(params=[False, True], ids=["recent", "not recent"])
def recency(request, monkeypatch):
    """Whether plans are found for being the last that were used, or by all that decides alone."""
    if request.param:
        monkeypatch.setattr(plans.Recent, "found", lambda *_: None)


@ENGINES
@pytest.mark.usefixtures("recency")
def test_calls_in_turns_have_a_plan_each(launches, engine):
    """With tensors that need gradients, at other addresses, of other sizes and of other strides."""
    shapes = [
        tensors,
        lambda: changed(0, shifted),
        lambda: tensors(n=301),
        lambda: changed(2, spread),
    ]
    shapes.append(lambda: [x.requires_grad_() for x in tensors()])
    for make in shapes * 2:
        with torch.no_grad():
            q, k, v = make()
            made = engine.forward(q, k, v, Options(**OPTIONS))
    assert [one.again for one in launches] == [False] * 4 + [True] * 6
    assert launches[-1].arguments == launches[0].addressed([q, k, v, *made])


# From what the calls below have, by what differs.
OTHERS = {
    "batch": lambda: (tensors(b=1), {}),
    "heads": lambda: (tensors(h=8), {}),
    "key heads": lambda: (tensors(h_kv=4), {}),
    "queries": lambda: (tensors(n=301), {}),
    "keys": lambda: (tensors(m=332), {}),
    "head size": lambda: (tensors(d=96, dv=96), {}),
    "value size": lambda: (tensors(dv=96), {}),
    "dtype": lambda: (tensors(dtype=torch.float16), {}),
    **{f"strides of {x}": lambda at=at: (changed(at, spread), {}) for at, x in enumerate("qkv")},
    **{f"address of {x}": lambda at=at: (changed(at, shifted), {}) for at, x in enumerate("qkv")},
    "scale": lambda: (tensors(), {"scale": 0.25}),
    "a negative scale": lambda: (tensors(), {"scale": -0.125}),
    "softcap": lambda: (tensors(), {"softcap": 50.0}),
    "left": lambda: (tensors(), {"mask": Band(left=63, right=0)}),
    "right": lambda: (tensors(), {"mask": Band(right=1)}),
    "no right": lambda: (tensors(), {"mask": Band()}),
    "offset": lambda: (tensors(), {"mask": Band(right=0, offset=33)}),
    "sinks": lambda: (tensors(), {"sinks": torch.randn(4)}),
}


@ENGINES
@pytest.mark.parametrize("other", OTHERS)
def test_calls_that_differ_share_nothing(launches, engine, other):
    engine.forward(*tensors(), Options(**OPTIONS))
    inputs, more = OTHERS[other]()
    engine.forward(*inputs, Options(**OPTIONS | more))
    assert [one.again for one in launches] == [False, False]


@ENGINES
@pytest.mark.parametrize("change", [torch.Tensor.half, shifted])
def test_sinks_that_differ_share_nothing(launches, engine, change):
    sinks = torch.randn(4)
    for one in (sinks, change(sinks)):
        engine.forward(*tensors(), Options(**OPTIONS, sinks=one))
    assert [one.again for one in launches] == [False, False]


def test_the_precision_that_torch_is_told_of_makes_calls_differ(launches):
    inputs = tensors(dtype=torch.float32)
    precision = torch.get_float32_matmul_precision()
    try:
        for told in ("highest", "high"):
            torch.set_float32_matmul_precision(told)
            portable.forward(*inputs, Options(**OPTIONS))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert [one.again for one in launches] == [False, False]


def test_an_address_that_hopper_cannot_read_goes_to_the_portable_kernels_each_time(launches):
    q, k, v = tensors()
    shifts = [shifted(q), shifted(q)]
    made = [hopper.forward(x, k, v, Options(**OPTIONS)) for x in (*shifts, q)]
    portable.forward(shifted(q), k, v, Options(**OPTIONS))
    assert [one.again for one in launches] == [False, True, False, True]
    assert launches[1].arguments == launches[0].addressed([shifts[1], k, v, *made[1]])
    assert launches[0].numbers != launches[2].numbers


NOT_SHARED = {
    "boolean": {"mask": Boolean(torch.ones(1, 1, 300, 333, dtype=torch.bool))},
    "relative values": {"relative_values": Relative(torch.randn(4, 11, 128), -5)},
}


@pytest.mark.parametrize("more", NOT_SHARED)
def test_calls_under_booleans_and_with_vectors_share_nothing(launches, more):
    for _ in range(2):
        portable.forward(*tensors(), Options(**OPTIONS | NOT_SHARED[more]))
    assert not any(one.again for one in launches)


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_alike_calls_bring_their_terms(launches, engine, name):
    engine, make = BOTH[engine], TERMS[name]
    for _ in range(2):
        q, k, v = tensors()
        more = make()
        out, lse = engine.forward(q, k, v, Options(**OPTIONS | more))
    plans.forget()
    expected = engine.forward(q, k, v, Options(**OPTIONS | more))
    n = len(launches) // 3
    assert [one.again for one in launches] == [False] * n + [True] * n + [False] * n
    moved = {x.data_ptr(): x.data_ptr() for x in (q, k, v, *more.values()) if torch.is_tensor(x)}
    check_moved(launches[n : 2 * n], launches[2 * n :], moved)
    assert [moved[x.data_ptr()] for x in expected] == [out.data_ptr(), lse.data_ptr()]


OTHER_TERMS = {
    "entries": lambda: table(12),
    "first": lambda: table(first=-6),
    "dtype of the table": lambda: table(dtype=torch.float16),
    "slopes as well": lambda: table() | {"slopes": torch.randn(4)},
    "one bias for all heads": lambda: table() | bias(2, 1, 1, 333),
    "one bias for the batch": lambda: table() | bias(1, 4, 1, 333),
    "address of the table": lambda: {"table": shifted(table()["table"]), "first": -5},
    "offset": lambda: table() | {"slopes": torch.randn(4), "offset": 5},
}


@ENGINES
@pytest.mark.parametrize("other", OTHER_TERMS)
def test_calls_with_other_terms_share_nothing(launches, engine, other):
    made = [make() for make in (table, *OTHER_TERMS.values()) if make is not OTHER_TERMS[other]]
    for more in made:
        engine.forward(*tensors(), Options(**OPTIONS | more))
    n = len(launches)
    engine.forward(*tensors(), Options(**OPTIONS | OTHER_TERMS[other]()))
    assert n < len(launches)
    assert not any(one.again for one in launches)


def test_dropout_of_another_probability_shares_nothing(launches):
    for p in (0.1, 0.2):
        portable.forward(*tensors(), Options(**OPTIONS, dropout=p, seed=torch.tensor([1])))
    assert not any(one.again for one in launches)


def test_calls_whose_rows_are_copied_share_the_launch_on_the_copies(launches):
    q, k, v = tensors()
    columns = k.transpose(2, 3).contiguous().transpose(2, 3)
    for keys in (k.contiguous(), columns, columns):
        portable.forward(q, keys, v, Options(**OPTIONS))
    assert [one.again for one in launches] == [False, False, True]


@ENGINES
def test_one_tensor_in_two_places_makes_no_plan_for_calls_with_two(launches, engine):
    x, y, z = tensors(h_kv=4, m=300)
    for qkv in [(x, x, x), (x, y, z), (x, y, z), (x, x, x)]:
        made = engine.forward(*qkv, Options(**OPTIONS))
    assert [one.again for one in launches] == [False, False, True, True]
    assert launches[3].arguments == launches[1].addressed([x, x, x, *made])


def test_a_launch_that_was_not_made_is_not_kept(launches, monkeypatch):
    """As under the interpreter."""
    monkeypatch.setattr(launching, "launch", lambda *arguments: launches.append(arguments))
    for _ in range(2):
        portable.forward(*tensors(), Options(**OPTIONS))
    assert len(launches) == 2
