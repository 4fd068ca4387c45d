"""What alike calls share, and what makes calls differ, with launches that are only written down."""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flashpatch_kernels.masks import Band, Boolean, Intervals
from flashpatch_kernels.options import Options, Relative

triton = pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from flashpatch_kernels import hopper  # noqa: E402
from flashpatch_kernels import triton as portable  # noqa: E402
from flashpatch_kernels.triton import launching, plans  # noqa: E402
from flashpatch_kernels.tuning import Tile  # noqa: E402

ENGINES = pytest.mark.parametrize("engine", [hopper, portable], ids=["hopper", "triton"])
OPTIONS = {"mask": Band(right=0), "scale": 0.125}


class Launched(NamedTuple):
    again: bool
    arguments: tuple

    @property
    def numbers(self):
        """All but the tensors, whose places are empty."""
        return [None if isinstance(x, Tensor) else x for x in self.arguments]

    @property
    def tensors(self):
        """Which they are, in order."""
        return [id(x) for x in self.arguments if isinstance(x, Tensor)]


@pytest.fixture
def launches(monkeypatch):
    """What was launched, in order."""
    made = []

    def launch(kernel, n_programs, tile, *arguments):
        made.append(Launched(False, (n_programs, *arguments)))
        return kernel

    def start(compiled, n_programs, tile, arguments):
        made.append(Launched(True, (n_programs, *arguments)))

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(launching, "start", start)
    plans.shared.cache_clear()
    yield made
    plans.shared.cache_clear()


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


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_alike_calls_share_a_launch_and_bring_their_tensors(launches, engine, dtype, sinks):
    for _ in range(2):
        q, k, v = tensors(dtype=dtype)
        options = Options(**OPTIONS, sinks=torch.randn(4) if sinks else None)
        out, lse = engine.forward(q, k, v, options)
    plans.shared.cache_clear()
    expected = engine.forward(q, k, v, options)
    assert [one.again for one in launches] == [False, True, False]
    assert launches[1].numbers == launches[2].numbers
    given = [id(x) for x in (options.sinks,) if x is not None]
    assert launches[1].tensors == [*map(id, (q, k, v, out, lse)), *given]
    assert launches[2].tensors == [*map(id, (q, k, v, *expected)), *given]
    assert [*map(layout, (out, lse))] == [*map(layout, expected)]


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
    for given in (sinks, change(sinks)):
        engine.forward(*tensors(), Options(**OPTIONS, sinks=given))
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
    for x in (shifted(q), shifted(q), q):
        hopper.forward(x, k, v, Options(**OPTIONS))
    portable.forward(shifted(q), k, v, Options(**OPTIONS))
    assert [one.again for one in launches] == [False, True, False, True]
    assert launches[0].numbers == launches[1].numbers != launches[2].numbers


TENSORS = {
    "intervals": {"mask": Intervals(torch.zeros(2, 300, 2, dtype=torch.int32))},
    "boolean": {"mask": Boolean(torch.ones(1, 1, 300, 333, dtype=torch.bool))},
    "table": {"table": torch.randn(4, 11), "first": -5},
    "slopes": {"slopes": torch.randn(4)},
    "bias": {"bias": torch.randn(1, 4, 1, 333)},
    "relative values": {"relative_values": Relative(torch.randn(4, 11, 128), -5)},
    "dropout": {"dropout": 0.1, "seed": torch.tensor([1])},
}


@pytest.mark.parametrize("more", TENSORS)
def test_calls_with_other_tensors_share_nothing(launches, more):
    for _ in range(2):
        portable.forward(*tensors(), Options(**OPTIONS | TENSORS[more]))
    assert not any(one.again for one in launches)


@ENGINES
def test_a_plan_keeps_no_tensor(launches, engine):
    inputs = tensors()
    options = Options(**OPTIONS, sinks=torch.randn(4))
    outputs = engine.forward(*inputs, options)
    kept = [weakref.ref(x) for x in (*inputs, *outputs, options.sinks)]
    del inputs, outputs, options
    launches.clear()
    assert [x() for x in kept] == [None] * 6


def test_a_launch_that_was_not_made_is_not_kept(launches, monkeypatch):
    """As under the interpreter."""
    monkeypatch.setattr(launching, "launch", lambda *arguments: launches.append(arguments))
    for _ in range(2):
        portable.forward(*tensors(), Options(**OPTIONS))
    assert len(launches) == 2


class Compiled:
    """What Triton compiled, as all its versions from 3.6 have it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.ran = []

    def run(self, *arguments):
        self.ran.append(arguments)

    def __getitem__(self, grid):
        return lambda *arguments: self.ran.append((grid, *arguments))


@pytest.fixture
def compiled(monkeypatch):
    driver = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda at: at + 4)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    return Compiled()


def test_a_launch_goes_to_the_current_stream(compiled):
    launching.start(compiled, 9, Tile(64, 64, 4, 1), ["q", 5])
    rest = (None, None, None, "q", 5)
    assert compiled.ran == [(9, 1, 1, 7, "function", "metadata", *rest)]


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("replaced", [False, True])
def test_hooks_are_told_of_launches(compiled, monkeypatch, which, replaced):
    def hook(*_):
        pass

    runtime = triton.knobs.runtime
    if replaced:
        monkeypatch.setattr(runtime, which, hook)
    else:
        monkeypatch.setattr(getattr(runtime, which), "calls", [hook])
    launching.start(compiled, 9, Tile(64, 64, 4, 1), ["q", 5])
    assert compiled.ran == [((9, 1, 1), "q", 5)]


def test_only_another_card_is_made_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert isinstance(launching.on(torch.device("cuda", 0)), torch.cuda.device)
    for device in ("cuda:1", "cpu"):
        assert isinstance(launching.on(torch.device(device)), nullcontext)
