"""How tiles are shared out and in which order programs add, by the device's own functions.

They are arithmetic on whole numbers, and are run here as what they look like: functions in Python.
"""

import random
from collections import Counter
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from flashpatch_kernels.hopper import ordering, scheduling

BM, BN = 64, 128
MULTIPROCESSORS = 132


class Call(NamedTuple):
    """A backward pass: its tiles of keys, and how many of queries meet each from `first` on."""

    batch: int
    kv_heads: int
    group: int
    n_queries: int
    n_keys: int
    causal: bool
    programs: int

    @property
    def n_tiles(self):
        return -(-self.n_keys // BN)

    def met(self, tile):
        """First of the tiles of queries that see a tile of keys, and how many there are."""
        m = -(-self.n_queries // BM)
        offset = self.n_keys - self.n_queries
        first = min(max(tile * BN - offset, 0) // BM, m) if self.causal else 0
        return first, max(m - first, 1)


class Step(NamedTuple):
    """What a program does at a time: for which tile of keys and of queries, and of which head."""

    tile: int
    turn: int
    bh: int
    head: tuple[int, int]
    i: int


def in_python(programs, seat):
    """The functions of `scheduling` and `ordering`, as one program runs them."""
    gl = SimpleNamespace(
        minimum=min,
        maximum=max,
        where=lambda condition, x, y: x if condition else y,
        num_programs=lambda axis: programs,
        program_id=lambda axis: seat,
    )
    names = {"gl": gl}
    for module, name in (
        *((scheduling, name) for name in ("share", "turns", "place", "course", "step_place")),
        (ordering, "rank"),
    ):
        names[name] = FunctionType(getattr(module, name).fn.__code__, names, name)
    return SimpleNamespace(**names)


def steps_of(call, seat):
    """All steps of a program, in its order, and its device functions."""
    device = in_python(call.programs, seat)
    steps = []
    for turn in range(device.turns(call.n_tiles, call.batch * call.kv_heads, call.causal)):
        tile, bh, b, g = device.place(turn, call.n_tiles, call.batch, call.kv_heads, call.causal)
        assert bh == b * call.kv_heads + g
        first, n = call.met(tile)
        begin = device.course(tile, call.n_tiles, n, call.group, call.causal)
        for y in range(n * call.group):
            head, x = device.step_place(y, begin, g * call.group, n, call.group, call.causal)
            assert 0 <= x < n
            steps.append(Step(tile, turn, bh, (b, head), first + x))
    return steps, device


def calls(causal):
    return st.builds(
        Call,
        st.integers(1, 3),
        st.integers(1, 4),
        st.sampled_from([1, 2, 3, 4]),
        st.integers(1, 2000),
        st.integers(1, 2000),
        causal,
        st.sampled_from([1, 5, 13, MULTIPROCESSORS]),
    )


@given(calls(st.booleans()))
def test_programs_take_every_step_once(call):
    taken = Counter(
        (step.head, step.tile, step.i)
        for seat in range(call.programs)
        for step in steps_of(call, seat)[0]
    )
    assert set(taken.values()) == {1}
    met = sum(call.met(tile)[1] for tile in range(call.n_tiles))
    assert len(taken) == met * call.group * call.kv_heads * call.batch


def ranks(call):
    """Of every program the tiles that it adds to, each with how many come before."""
    found = []
    for seat in range(call.programs):
        steps, device = steps_of(call, seat)
        found.append(
            [
                (
                    (*step.head, step.i),
                    device.rank(step.i, step.turn, step.tile, step.bh, call.n_tiles),
                )
                for step in steps
            ]
        )
    return found


def time_of(programs, lag, jitter=0.0):
    """When the last has added, if a step takes 1 and the next hears of it `lag` later."""
    draw = random.Random(0).random
    told: dict = {}
    times, at = [0.0] * len(programs), [0] * len(programs)
    left = sum(map(len, programs))
    while left:
        before = left
        for seat, steps in enumerate(programs):
            while at[seat] < len(steps):
                tile, rank = steps[at[seat]]
                if rank and (tile, rank - 1) not in told:
                    break
                done = times[seat] + 1 + jitter * (draw() - 0.5)
                if rank:
                    done = max(done, told[tile, rank - 1])
                told[tile, rank], times[seat] = done + lag, done
                at[seat] += 1
                left -= 1
        assert left < before, "programs wait for each other"
    return max(times)


@given(calls(st.just(False)).filter(lambda call: call.n_queries >= call.n_keys))
def test_programs_add_to_a_tile_one_after_another_and_all_come_to_their_end(call):
    programs = ranks(call)
    seen: dict = {}
    for steps in programs:
        for tile, rank in steps:
            seen.setdefault(tile, []).append(rank)
    assert all(sorted(found) == list(range(call.n_tiles)) for found in seen.values())
    time_of(programs, lag=1.0)


@pytest.mark.parametrize("group", [1, 4])
def test_programs_that_keep_step_do_not_wait_for_each_other(group):
    """Even if the next hears of an addition almost two steps after it."""
    programs = ranks(Call(2, 16 // group, group, 4096, 4096, False, MULTIPROCESSORS))
    longest = max(map(len, programs))
    assert time_of(programs, lag=1.9) == longest
    assert time_of(programs, lag=1.5, jitter=0.2) < 1.02 * longest


@pytest.mark.parametrize("n_keys", [2048, 8192])
def test_causal_programs_of_one_head_never_meet(n_keys):
    """In no step do two of them add to the same tile of queries."""
    call = Call(1, 1, 1, n_keys, n_keys, True, n_keys // BN // 2)
    programs = [steps_of(call, seat)[0] for seat in range(call.programs)]
    assert len({len(steps) for steps in programs}) == 1
    for at in zip(*programs, strict=True):
        assert len({step.i for step in at}) == call.programs
