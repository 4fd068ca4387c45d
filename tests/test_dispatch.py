"""Which calls of patched modules are decided once for all of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_calls import DV, B, H, M, N, tensors
from torch import Tensor

from flashpatch import dispatch
from flashpatch.dispatch import Settings, attend
from flashpatch_kernels.engines import TILED, Call, Reason
from flashpatch_kernels.masks import Band, Boolean, Intervals
from flashpatch_kernels.options import Options, Relative


def intervals(n: int = N) -> Intervals:
    return Intervals(torch.tensor([0, M], dtype=torch.int32).expand(B, n, 2).contiguous())


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that were decided."""
    calls: list[Call] = []

    def decide(call: Call) -> Any:
        calls.append(call)
        return TILED

    monkeypatch.setattr(dispatch, "decide", decide)
    return calls


def run(options: Options, inputs: tuple[Tensor, ...] | None = None) -> Any:
    return attend(*(inputs or tensors()), options, Settings(), lambda: None)


# A call, by what makes it anew.
CALLS = {
    "full": lambda: Options(),
    "causal": lambda: Options(mask=Band(right=0)),
    "window": lambda: Options(mask=Band(left=2, right=0)),
    "offset": lambda: Options(mask=Band(right=0, offset=1)),
    "intervals": lambda: Options(mask=intervals()),
    "one interval": lambda: Options(mask=intervals(1)),
    "boolean": lambda: Options(mask=Boolean(torch.ones(B, 1, N, M, dtype=torch.bool))),
    "softcap": lambda: Options(softcap=2.0),
    "table": lambda: Options(table=torch.randn(H, 3), first=-1),
    "table with gradient": lambda: Options(table=torch.randn(H, 3, requires_grad=True), first=-1),
    "slopes": lambda: Options(slopes=torch.randn(H)),
    "bias of keys": lambda: Options(bias=torch.randn(B, 1, 1, M)),
    "bias of pairs": lambda: Options(bias=torch.randn(B, 1, N, M)),
    "sinks": lambda: Options(sinks=torch.randn(H)),
    "dropout": lambda: Options(dropout=0.5, seed=torch.tensor([1])),
}


def test_calls_that_are_alike_are_decided_once(decided):
    for options in CALLS.values():
        for _ in range(3):
            run(options())
    assert len(decided) == len(CALLS)


def test_what_was_decided_is_what_would_be(decided):
    """For calls in turns, each of which takes the place of the last of its kind."""
    for make in (*CALLS.values(), *reversed(CALLS.values())):
        options, inputs = make(), tensors()
        before = len(decided)
        run(options, inputs)
        call = Call.of(*inputs, options)
        assert decided[before:] in ([], [call])
        assert call in decided


SITUATIONS = {
    "length": lambda: run(Options(), tensors(n=N - 1)),
    "dtype": lambda: run(Options(), tensors(dtype=torch.float64)),
    "gradients": lambda: run(Options(), tensors(grad=True)),
    "no gradients": lambda: torch.no_grad()(run)(Options()),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(run)(Options()),
}


def test_calls_in_other_situations_are_decided_each(decided):
    run(Options())
    for call in SITUATIONS.values():
        call()
    assert len(decided) == 1 + len(SITUATIONS)


def test_scales_and_the_first_distance_decide_nothing(decided):
    options = CALLS["table"]()
    for change in ({}, {"scale": 2.0}, {"first": 0}):
        run(replace(options, **change))
    assert len(decided) == 1


def test_a_reason_to_fall_back_is_told_each_time(monkeypatch):
    refused, asked, told = Reason("REFUSED", "for the test"), [], []
    monkeypatch.setattr(dispatch, "decide", lambda call: asked.append(call) or refused)
    settings = Settings(on_fallback=told.append)
    assert [attend(*tensors(), Options(), settings, lambda: 5) for _ in range(3)] == [5, 5, 5]
    assert (len(asked), told) == (1, [refused] * 3)


def test_calls_with_vectors_are_decided_each_time(decided):
    options = Options(relative_values=Relative(torch.randn(H, 3, DV), -1))
    for _ in range(2):
        run(options)
    assert len(decided) == 2
