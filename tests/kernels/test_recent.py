"""Which tensors are like those for which something was noted."""

import weakref

import pytest
import torch
from torch._C._dynamo import guards

from flashpatch_kernels.recent import Recent


def tensors():
    return torch.randn(2, 3, 4), torch.randn(3, dtype=torch.bfloat16)


@pytest.fixture
def recent():
    """What has noted 1 for two tensors that are no more."""
    recent = Recent()
    recent.note(1, *tensors())
    return recent


def test_nothing_is_found_before_something_is_noted():
    assert Recent().found(*tensors()) is None


def test_what_was_noted_is_found_for_other_tensors_that_are_alike(recent):
    assert recent.found(*tensors()) == 1
    with torch.no_grad():
        assert recent.found(*tensors()) == 1


OTHERS = {
    "shape": lambda x: x[:1],
    "dimensions": lambda x: x[None],
    "strides": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dtype": torch.Tensor.half,
    "device": lambda x: x.to("meta"),
    "gradient": lambda x: x.clone().requires_grad_(),
    "type": lambda x: torch.nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_is_found_for_tensors_that_differ(recent, other):
    x, y = tensors()
    assert recent.found(OTHERS[other](x), y) is None


def test_nothing_is_found_for_more_tensors_or_fewer_or_what_is_none(recent):
    x, y = tensors()
    assert [recent.found(*given) for given in [(x,), (x, y, y), (x, None)]] == [None] * 3
    assert recent.found(x, y) == 1


def test_nothing_is_found_for_one_tensor_in_two_places():
    recent = Recent()
    recent.note(1, *(torch.ones(3) for _ in range(2)))
    x = torch.ones(3)
    assert recent.found(x, x) is None
    assert recent.found(x, x.clone()) == 1


def test_what_is_noted_later_takes_the_place_of_what_was_before(recent):
    recent.note(2, x := torch.ones(5))
    assert recent.found(x) == 2


def test_no_tensor_is_kept():
    recent = Recent()
    recent.note(1, x := torch.ones(3))
    known = weakref.ref(x)
    del x
    assert known() is None


def missing(monkeypatch):
    monkeypatch.delattr(guards, "TensorGuards")


def changed(monkeypatch):
    monkeypatch.setattr(guards, "TensorGuards", lambda *tensors: tensors)


@pytest.mark.parametrize("change", [missing, changed])
def test_without_torchs_guards_nothing_is_found(recent, monkeypatch, change):
    change(monkeypatch)
    recent.note(2, *tensors())
    assert recent.found(*tensors()) is None
