"""What alike calls share, and what makes calls differ, with launches that are only written down."""

import math
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._C._dynamo import guards

from flashpatch_kernels.masks import Band, Boolean, Intervals
from flashpatch_kernels.options import Options, Relative

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from flashpatch_kernels import hopper
from flashpatch_kernels import triton as portable
from flashpatch_kernels.triton import launching, memory, plans

ENGINES = pytest.mark.parametrize("engine", [hopper, portable], ids=["hopper", "triton"])
OPTIONS = {"mask": Band(right=0), "scale": 0.125}


class Launcher:
    """What Triton 3.6 has between a kernel and `launch`, its function in C."""

    def __init__(self, launch):
        self.launch = launch

    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(x, y, z, stream, function, False, False, None, None, *rest)


class Compiled(NamedTuple):
    """What Triton compiled."""

    run: Launcher
    function: str = "function"
    packed_metadata: str = "metadata"


class Launched(NamedTuple):
    again: bool
    arguments: tuple

    @property
    def numbers(self):
        """All but the tensors, whose places are empty."""
        return [None if isinstance(x, Tensor) else x for x in self.arguments]

    @property
    def leaves(self):
        """The arguments with those in tuples, one by one, where these begin and end as well."""
        found, rest = [], [*self.arguments]
        while rest:
            x = rest.pop(0)
            if type(x) is tuple:
                rest = ["(", *x, ")", *rest]
            else:
                found.append(x)
        return found

    def tensors(self):
        """In order."""
        return [x for x in self.arguments if isinstance(x, Tensor)]

    def addressed(self, tensors):
        """The same with the addresses of other tensors."""
        rest = iter(tensors)
        return tuple(next(rest).data_ptr() if isinstance(x, Tensor) else x for x in self.arguments)


@pytest.fixture
def launches(monkeypatch, driver):
    """What was launched, in order."""
    made = []

    def launch(kernel, n_programs, tile, *arguments):
        made.append(Launched(False, (n_programs, *arguments)))
        return Compiled(Launcher(relaunch))

    def relaunch(n_programs, *rest):
        made.append(Launched(True, (n_programs, *rest[12:])))

    monkeypatch.setattr(launching, "launch", launch)
    plans.forget()
    yield made
    plans.forget()


def tensors(b=2, h=4, h_kv=2, n=300, m=333, d=128, dv=128, dtype=torch.bfloat16):
    """q, k and v as a projection lays them out."""
    shapes = (b, n, h, d), (b, m, h_kv, d), (b, m, h_kv, dv)
    return tuple(torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes)


def changed(at, change):
    """q, k and v, of which one is changed."""
    return [change(x) if at == i else x for i, x in enumerate(tensors())]


def shifted(x):
    """The same numbers and strides at another multiple of 8 bytes than one of 16."""
    elements = 8 // x.element_size()
    whole = x.new_empty(x.untyped_storage().nbytes() // x.element_size() + elements)
    return whole.as_strided(x.shape, x.stride(), elements).copy_(x)


def spread(x):
    """The same numbers in rows that are further apart."""
    return torch.nn.functional.pad(x, (0, 8))[..., :-8]


def layout(x):
    return x.shape, x.stride(), x.dtype


def intervals(batch=2, n=300, runs=False):
    bounds = torch.randint(0, 333, (batch, n, 2), dtype=torch.int32)
    return Intervals(bounds, torch.randint(0, 333, (2, 333), dtype=torch.int32) if runs else None)


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


def table(entries=11, first=-5, dtype=torch.float32):
    return {"table": torch.randn(4, entries, dtype=dtype), "first": first}


def bias(*shape, dtype=torch.float32):
    return {"bias": torch.randn(shape, dtype=dtype)}


# What makes new tensors for a call, and the engines that serve it.
TERMS = {
    "slopes": lambda: {"slopes": torch.randn(4)},
    "a table": table,
    "a table in half": lambda: table(dtype=torch.bfloat16),
    "a table in columns": lambda: {"table": torch.randn(11, 4).T, "first": -5},
    "all distances": lambda: table(632, None),
    "keys": lambda: bias(2, 4, 1, 333),
    "keys in half": lambda: bias(1, 1, 1, 333, dtype=torch.bfloat16),
    "keys in columns": lambda: {"bias": torch.randn(1, 1, 333, 4).transpose(1, 3)},
    "all": lambda: table() | bias(2, 1, 1, 333) | {"slopes": torch.randn(4), "softcap": 9.0},
}
TERMS_OF_PORTABLE = {
    "pairs": lambda: bias(1, 4, 300, 333, dtype=torch.bfloat16),
    "pairs in columns": lambda: {"bias": torch.randn(1, 4, 333, 300).mT},
    "keys of every query": lambda: {"bias": torch.randn(2, 1, 1, 333).expand(2, 4, 300, 333)},
    "dropout": lambda: {"dropout": 0.1, "seed": torch.tensor([1])},
}
BOTH = {"hopper": hopper, "triton": portable}
CASES = [
    *[(engine, name) for engine in BOTH for name in TERMS],
    *[("triton", name) for name in TERMS_OF_PORTABLE],
]


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_alike_calls_bring_their_terms(launches, engine, name):
    engine, make = BOTH[engine], (TERMS | TERMS_OF_PORTABLE)[name]
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


class Backward(NamedTuple):
    """What a backward pass is given beside options, and the names of what it gives."""

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    needs: frozenset[str] = frozenset("qkv")

    def run(self, engine, **more):
        *inputs, needs = self
        return engine.backward(*inputs, Options(**OPTIONS | more), needs)

    def needing(self, *names):
        """The same for these gradients as well."""
        return self._replace(needs=self.needs | set(names))

    def addresses(self):
        """Of its tensors."""
        return [x.data_ptr() for x in self if isinstance(x, Tensor)]


def backward(dlse=False, **sizes):
    """One of random tensors."""
    q, k, v = tensors(**sizes)
    dout, out = tensors(**sizes)[0], tensors(**sizes)[0]
    lse = torch.randn(q.shape[:3])
    return Backward(dout, torch.randn(lse.shape) if dlse else None, q, k, v, out, lse)


@pytest.fixture
def unwritten(monkeypatch):
    """Memory of which it shows if nobody writes it."""

    def empty(size, stride, dtype, device):
        assert device.type == "cpu"
        return guards._empty_strided_cpu(size, stride, dtype).fill_(7)

    monkeypatch.setattr(memory, "empty", empty)


def check_moved(again, anew, moved):
    """The same launches, but that memory of their own lies elsewhere, the same for all of them.

    `moved` are addresses by those that they have anew; it gets those of that memory.
    """
    for one, other in zip(again, anew, strict=True):
        for x, y in zip(one.leaves, other.leaves, strict=True):
            assert x == (moved.setdefault(y.data_ptr(), x) if isinstance(y, Tensor) else y)
    assert len(set(moved.values())) == len(moved)


def check_alike(launches, engine, first, second, given=({}, {})):
    """The second takes the steps of the first: those that it would take by itself.

    Args:
        given: The options of either.

    Returns:
        Its gradients.
    """
    first.run(engine, **given[0])
    n = len(launches)
    grads = second.run(engine, **given[1])
    plans.forget()
    expected = second.run(engine, **given[1])
    mask = given[1].get("mask")
    of_mask = [] if mask is None else [mask.bounds, mask.runs]
    more = [x.data_ptr() for x in (*given[1].values(), *of_mask) if torch.is_tensor(x)]
    again, anew = launches[n : 2 * n], launches[2 * n :]
    assert [one.again for one in (*again, *anew)] == [True] * n + [False] * n
    assert n > 0
    moved = {x: x for x in (*second.addresses(), *more)}
    check_moved(again, anew, moved)
    assert grads.keys() == expected.keys() == second.needs
    for name, grad in grads.items():
        assert grad.data_ptr() == moved.get(expected[name].data_ptr(), grad.data_ptr())
        assert layout(grad) == layout(expected[name])
    return grads


@ENGINES
@pytest.mark.parametrize(
    "sizes", [{}, {"h_kv": 4, "d": 64, "dv": 64}, {"d": 256, "dv": 256}], ids=str
)
@pytest.mark.parametrize("dlse", [False, True])
def test_alike_backward_passes_take_the_same_steps(launches, engine, sizes, dlse):
    check_alike(launches, engine, backward(dlse, **sizes), backward(dlse, **sizes))


@ENGINES
@pytest.mark.parametrize("runs", [False, True])
def test_alike_backward_passes_under_intervals_take_the_same_steps(launches, engine, runs):
    given = [{"mask": intervals(runs=runs)} for _ in range(2)]
    check_alike(launches, engine, backward(), backward(), given)


@pytest.mark.parametrize(
    ("d", "needs", "kernels"), [(64, "qkv", 1), (64, "q", 1), (64, "kv", 1), (256, "qkv", 2)]
)
def test_a_table_is_copied_once_for_tiles_of_each_orientation(launches, d, needs, kernels):
    """After the statistics, by a launch for each kernel that reads the copy."""
    one = backward(h_kv=4, d=d, dv=d)._replace(needs=frozenset(needs))
    one.run(hopper, **table())
    assert len(launches) == 1 + 2 * kernels


# What is learnt of some of those terms.
LEARNT = {
    "slopes": "slopes",
    "a table": "table",
    "a table in half": "table",
    "all distances": "table",
    "keys": "bias",
    "keys in half": "bias",
    "pairs": "bias",
    "dropout": None,
}


@pytest.mark.parametrize("sizes", [{"h_kv": 4}, {}, {"h_kv": 4, "d": 256, "dv": 256}], ids=str)
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize(("engine", "name"), [one for one in CASES if one[1] in LEARNT])
def test_alike_backward_passes_bring_their_terms(launches, engine, name, learnt, sizes):
    make, which = (TERMS | TERMS_OF_PORTABLE)[name], LEARNT[name]
    first, second = (backward(**sizes) for _ in range(2))
    if learnt and which:
        first, second = first.needing(which), second.needing(which)
    check_alike(launches, BOTH[engine], first, second, [make(), make()])


@ENGINES
@pytest.mark.parametrize("needs", ["q", "k", "v", "qk", "kv"])
def test_alike_backward_passes_for_some_gradients_take_the_same_steps(launches, engine, needs):
    first, second = (backward()._replace(needs=frozenset(needs)) for _ in range(2))
    check_alike(launches, engine, first, second)


@pytest.mark.usefixtures("deterministic")
def test_alike_backward_passes_in_one_order_take_the_same_steps(launches):
    sizes = {"n": 333}
    check_alike(launches, hopper, backward(**sizes), backward(**sizes))


# Masks of 333 keys, and whether programs keep step under them.
IN_ORDER = [
    (Band(), True),
    (Band(right=0), True),
    (Band(left=100, right=66), True),
    (Band(left=100, right=67), False),
    (Band(left=5, right=5, offset=5), True),
    (Band(left=5, right=5, offset=6), False),
    (Band(left=5), False),
]


@pytest.mark.parametrize(("mask", "in_order"), IN_ORDER, ids=str)
@pytest.mark.usefixtures("deterministic")
def test_masks_without_an_order_have_a_kernel_for_queries(launches, mask, in_order):
    """After that of the statistics and one for the rest."""
    backward(n=333).run(hopper, mask=mask)
    assert len(launches) == (2 if in_order else 3)


@pytest.mark.usefixtures("unwritten")
def test_what_is_added_up_in_memory_begins_with_zeros_each_time(launches):
    """The launches that are only written down add nothing."""
    grads = check_alike(launches, hopper, backward(), backward())
    assert not grads["q"].any()
    assert grads["k"].eq(7).all()


def taken(change):
    """A backward pass of which something is changed."""
    one = backward()
    return one._replace(**{name: f(getattr(one, name)) for name, f in change.items()})


# From what a backward pass has, by what differs.
OTHER_BACKWARDS = {
    **{f"strides of {x}": {x: spread} for x in ("q", "k", "v", "out", "dout")},
    **{f"address of {x}": {x: shifted} for x in ("q", "k", "v", "out", "dout", "lse")},
    "dlse": {"dlse": lambda _: torch.randn(2, 4, 300)},
    "needs": {"needs": lambda _: frozenset("kv")},
    "strides of lse": {"lse": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)},
}


@ENGINES
@pytest.mark.parametrize("other", OTHER_BACKWARDS)
def test_backward_passes_that_differ_share_nothing(launches, engine, other):
    backward().run(engine)
    taken(OTHER_BACKWARDS[other]).run(engine)
    assert not any(one.again for one in launches)


@ENGINES
@pytest.mark.parametrize(
    "more", [{"scale": 0.25}, {"softcap": 50.0}, {"mask": Band(left=63, right=0)}], ids=str
)
def test_backward_passes_of_other_options_share_nothing(launches, engine, more):
    backward().run(engine)
    backward().run(engine, **more)
    assert not any(one.again for one in launches)


def test_backward_passes_in_an_order_and_in_none_share_nothing(launches, request):
    backward(n=333).run(hopper)
    request.getfixturevalue("deterministic")
    backward(n=333).run(hopper)
    assert not any(one.again for one in launches)


@ENGINES
@pytest.mark.parametrize("needs", [("q", "sinks"), ("q", "k", "v", "sinks"), ("sinks",)], ids=str)
@pytest.mark.usefixtures("unwritten")
def test_gradients_of_sinks_are_computed_each_time(launches, engine, needs):
    """From statistics that the launches, which are only written down, leave as they are: 7."""
    one = backward()._replace(needs=frozenset(needs))
    one.run(engine, sinks=torch.randn(4))
    sinks = torch.randn(4)
    grads = one.run(engine, sinks=sinks)
    expected = -7 * 2 * 300 * torch.exp2(sinks / math.log(2) - 7)
    torch.testing.assert_close(grads["sinks"], expected)
    assert grads.keys() == set(needs)
    assert launches[-1].again


@ENGINES
def test_a_backward_pass_for_nothing_gives_nothing(launches, engine):
    one = backward()._replace(needs=frozenset())
    assert [one.run(engine) for _ in range(2)] == [{}, {}]


def test_a_gradient_in_memory_that_steps_do_not_know_is_not_kept(launches):
    """As that of sinks in float32, for which sums are taken anew."""
    for _ in range(2):
        one = backward(dtype=torch.float32)._replace(needs=frozenset(("q", "sinks")))
        one.run(portable, sinks=torch.randn(4))
    assert not any(one.again for one in launches)


@ENGINES
def test_a_plan_keeps_no_tensor(launches, engine):
    inputs, given = tensors(), backward()
    options = Options(**OPTIONS, sinks=torch.randn(4))
    outputs = engine.forward(*inputs, options)
    grads = given.run(engine)
    kept = (*inputs, *outputs, options.sinks, *given[2:-1], *grads.values())
    kept = [weakref.ref(x) for x in kept]
    del inputs, outputs, options, given, grads
    launches.clear()
    assert not any(x() is not None for x in kept)


def test_a_launch_that_was_not_made_is_not_kept(launches, monkeypatch):
    """As under the interpreter."""
    monkeypatch.setattr(launching, "launch", lambda *arguments: launches.append(arguments))
    for _ in range(2):
        portable.forward(*tensors(), Options(**OPTIONS))
    assert len(launches) == 2
