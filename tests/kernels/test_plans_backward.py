"""What alike calls share, and what makes calls differ: backward passes."""

import math
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._C._dynamo import guards

from flashpatch_kernels.masks import Band
from flashpatch_kernels.options import Options

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from written_launches import (
    BOTH,
    CASES,
    ENGINES,
    OPTIONS,
    TERMS,
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
from flashpatch_kernels.triton import memory, plans


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
    make, which = TERMS[name], LEARNT[name]
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
