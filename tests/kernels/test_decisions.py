"""Which calls of `attention` are decided once for all of them, with an engine that does nothing."""

import weakref
from dataclasses import replace

import pytest
import torch
from small_calls import B, H, M, N, tensors

from flashpatch_kernels import attention, decisions, op


@pytest.fixture
def ran(monkeypatch):
    """Options and engine of every call, whose answer is made up."""
    made = []

    def run(q, k, v, options, engine):
        made.append((options, engine))
        return q, q[..., 0]

    monkeypatch.setattr(op, "run", run)
    return made


def test_calls_that_are_alike_share_what_was_decided(ran):
    for seed in range(2):
        attention(*tensors(seed=seed), causal=True)
    (first, _), (second, _) = ran
    assert first is second


TERMS_OF_A_CALL = {
    "table": lambda: {"table": torch.randn(H, 5), "first": -2},
    "slopes": lambda: {"slopes": torch.randn(H)},
    "bias": lambda: {"bias": torch.randn(B, 1, 1, M)},
    "sinks": lambda: {"sinks": torch.randn(H)},
    "all": lambda: {"slopes": torch.randn(H), "bias": torch.randn(1, H, N, M), "softcap": 2.0},
}


@pytest.mark.parametrize("name", TERMS_OF_A_CALL)
def test_calls_with_alike_terms_are_decided_once_and_have_each_its_own(ran, monkeypatch, name):
    first, second = (TERMS_OF_A_CALL[name]() for _ in range(2))
    attention(*tensors(), **first)
    monkeypatch.setattr(op, "choose", lambda _: pytest.fail("decided again"))
    attention(*tensors(), **second)
    assert ran[0][1] == ran[1][1]
    for (options, _), more in zip(ran, (first, second), strict=True):
        assert all(getattr(options, key) is x for key, x in more.items())
    assert replace(ran[0][0], **second) == ran[1][0]


def test_what_was_decided_keeps_no_term(ran):
    terms = TERMS_OF_A_CALL["all"]()
    kept = [weakref.ref(x) for x in terms.values() if torch.is_tensor(x)]
    attention(*tensors(), **terms)
    ran.clear()
    del terms
    assert not any(x() is not None for x in kept)


# What differs from a call without arguments on `tensors`.
DIFFERENT = {
    "causal": {"causal": True},
    "window": {"window": 3},
    "sides": {"window": (3, 3)},
    "scale": {"scale": 2.0},
    "softcap": {"softcap": 2.0},
    "engine": {"engine": "reference"},
    "lse": {"return_lse": True},
    "sinks": {"sinks": torch.ones(H)},
    "slopes": {"slopes": torch.ones(H)},
    "table": {"table": torch.ones(H, N + M - 1)},
    "a clamped table": {"table": torch.ones(H, N + M - 1), "first": 0},
    "bias": {"bias": torch.ones(1, 1, 1, M)},
    "mask": {"mask": torch.ones(B, M, dtype=torch.bool)},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_are_decided_each(ran, name):
    for more in ({}, DIFFERENT[name], {}, DIFFERENT[name]):
        attention(*tensors(), **more)
    assert ran[0][0] is ran[2][0]
    assert ran[1][0] is not ran[0][0]
    decisions.forget()
    attention(*tensors(), **DIFFERENT[name])
    assert ran[-1][1] == ran[1][1] == ran[3][1]


SITUATIONS = {
    "other queries": lambda: attention(*tensors(n=N - 1), causal=True),
    "other dtype": lambda: attention(*tensors(dtype=torch.float64), causal=True),
    "gradients": lambda: attention(*tensors(grad=True), causal=True),
    "autocast": lambda: autocast(torch.bfloat16),
    "another autocast": lambda: autocast(torch.float16),
}


def autocast(dtype):
    with torch.autocast("cpu", dtype):
        attention(*tensors(), causal=True)


def test_calls_in_other_situations_are_decided_each(ran):
    with torch.no_grad():
        attention(*tensors(), causal=True)
    attention(*tensors(), causal=True)
    for call in SITUATIONS.values():
        call()
    assert len({id(options) for options, _ in ran}) == len(SITUATIONS) + 2


def test_no_interpreter_is_asked_for_because_it_was_before(ran, monkeypatch):
    for asked in ("1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", asked)
        attention(*tensors())
    assert ran[0][0] is not ran[1][0]


# Equal to what is right, and wrong.
WRONG = [
    ({"window": 1}, {"window": True}),
    ({"scale": 1.0}, {"scale": True}),
    ({"softcap": 1.0}, {"softcap": True}),
    ({"dropout": 0.0}, {"dropout": False}),
    ({"window": (1, 1)}, {"window": [1, 1]}),
]


@pytest.mark.parametrize(("right", "wrong"), WRONG)
def test_a_wrong_argument_is_refused_after_a_right_one_that_it_equals(ran, right, wrong):
    attention(*tensors(), **right)
    with pytest.raises(TypeError):
        attention(*tensors(), **wrong)


@pytest.mark.parametrize("at", range(3))
def test_what_is_no_tensor_is_refused_after_calls_on_tensors(ran, at):
    given = list(tensors())
    attention(*given)
    given[at] = given[at].tolist()
    with pytest.raises(TypeError, match=f"{'qkv'[at]} must be a tensor"):
        attention(*given)
