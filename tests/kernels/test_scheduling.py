"""How tiles are shared out and in which order programs add, by the device's own functions.

They are arithmetic on whole numbers, and are run here as what they look like: functions in Python.
"""

import random
from collections import Counter
from itertools import product
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

from flashpatch_kernels import tuning
from flashpatch_kernels.hopper import crews, ordering, scheduling
from flashpatch_kernels.masks import Band, Intervals
from flashpatch_kernels.options import Options
from flashpatch_kernels.triton import setups, tile_masks

BM, BN = 64, 128
MULTIPROCESSORS = 132


class Call(NamedTuple):
    """A backward pass: its tiles of keys, and how many of queries meet each from `first` on."""

    batch: int
    kv_heads: int
    group: int
    n_queries: int
    n_keys: int
    reach: int | None  # if not all keys, query x sees those up to x + reach,
    left: int | None  # and if not all of these, those from x - left on
    programs: int
    in_order: bool = False
    staggered: bool = True

    @property
    def n_tiles(self):
        return -(-self.n_keys // BN)

    @property
    def constants(self):
        causal = self.reach is not None and self.left is None
        alone = self.group == 1
        staggered = self.staggered or self.in_order
        paced = causal and staggered and not (alone or self.in_order)
        kinds = {"PAIRED": causal, "ALONE": alone, "STAGGERED": staggered, "PACED": paced}
        return SimpleNamespace(BM=BM, BN=BN, **kinds)

    def met(self, tile):
        """First of the tiles of queries that see a tile of keys, and how many steps they are."""
        m = -(-self.n_queries // BM)
        first = 0 if self.reach is None else min(max(tile * BN - self.reach, 0) // BM, m)
        end = self.n_queries
        if self.left is not None:
            end = min(end, min((tile + 1) * BN, self.n_keys) + self.left)
        return first, max(-(-end // BM) - first, 0)


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
        cdiv=lambda x, y: -(-x // y),
        static_assert=lambda condition: None,
        num_programs=lambda axis: programs,
        program_id=lambda axis: seat,
    )
    names = {"gl": gl}
    names["tile_masks"] = SimpleNamespace(
        edge_tile=FunctionType(tile_masks.edge_tile.fn.__code__, {"tl": gl})
    )
    of_programs = "share", "rounds_of_pairs", "to_and_fro", "turns", "place", "dealt", "in_row"
    of_steps = "edges_first", "course", "step_place", "met_tile"
    for module, name in (
        *((scheduling, name) for name in (*of_programs, *of_steps)),
        *((ordering, name) for name in ("rank", "between")),
    ):
        function = getattr(module, name).fn
        names[name] = FunctionType(function.__code__, names, name, function.__defaults__)
    return SimpleNamespace(**names)


def steps_of(call, seat):
    """All steps of a program, in its order, and its device functions."""
    device = in_python(call.programs, seat)
    steps, C = [], call.constants
    for turn in range(device.turns(call.n_tiles, call.batch * call.kv_heads, C.PAIRED)):
        tile, bh, b, g = device.place(turn, call.n_tiles, call.batch, call.kv_heads, C.PAIRED)
        assert bh == b * call.kv_heads + g
        first, met = call.met(tile)
        n = max(met, 1)
        begin = device.course(tile, call.n_tiles, first, n, call.group, C)
        for y in range(n * call.group):
            head, x = device.step_place(y, begin, turn, g * call.group, n, call.group, C)
            assert 0 <= x < n
            assert x == device.met_tile(y, begin, turn, n, C) or not C.ALONE
            i = first + x if met else call.n_queries
            steps.append(Step(tile, turn, bh, (b, head), i))
    return steps, device


@st.composite
def calls(draw):
    n_queries, n_keys = draw(st.integers(1, 2000)), draw(st.integers(1, 2000))
    reach = st.one_of(st.none(), st.just(0), st.just(n_keys - n_queries), st.integers(-2100, 2100))
    reached = draw(reach)
    window = st.one_of(st.none(), st.integers(-300, 2100))
    left = None if reached is None else draw(window)
    return Call(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 2, 3, 4])),
        *(n_queries, n_keys, reached, left),
        draw(st.sampled_from([1, 5, 13, MULTIPROCESSORS])),
        staggered=draw(st.booleans()),
    )


def have_order(call):
    return call.n_queries >= call.n_keys


@given(calls())
def test_programs_take_every_step_once(call):
    taken = Counter(
        (step.head, step.tile, step.i)
        for seat in range(call.programs)
        for step in steps_of(call, seat)[0]
    )
    assert set(taken.values()) == {1}
    met = sum(max(call.met(tile)[1], 1) for tile in range(call.n_tiles))
    assert len(taken) == met * call.group * call.kv_heads * call.batch


def far(bound):
    return 2**30 if bound is None else bound


def ranks(call):
    """Of every program the tiles that it adds to, each with how many come before."""
    found = []
    mask = far(call.left), far(call.reach), 0
    for seat in range(call.programs):
        steps, device = steps_of(call, seat)
        found.append([])
        for tile, turn, bh, head, i in steps:
            before = device.rank(
                i, turn, tile, bh, call.n_tiles, call.n_queries, mask, call.constants
            )
            found[-1].append(((*head, i), before))
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


@given(calls().filter(have_order))
def test_programs_add_to_a_tile_one_after_another_and_all_come_to_their_end(call):
    programs = ranks(call._replace(in_order=True))
    seen: dict = {}
    for steps in programs:
        for tile, rank in steps:
            seen.setdefault(tile, []).append(rank)
    met = [call.met(tile) for tile in range(call.n_tiles)]
    for (*_, i), found in seen.items():
        if i * BM < call.n_queries:
            assert sorted(found) == list(range(sum(t <= i < t + n for t, n in met)))
        else:  # steps of keys that no query sees wait for nobody
            assert not any(found)
    time_of(programs, lag=1.0)


@pytest.mark.parametrize(("group", "reach"), [(1, None), (4, None), (1, 0), (4, 0)])
def test_programs_that_keep_step_do_not_wait_for_each_other(group, reach):
    """Even if the next hears of an addition almost two steps after it."""
    programs = ranks(Call(2, 16 // group, group, 4096, 4096, reach, None, MULTIPROCESSORS, True))
    longest = max(map(len, programs))
    assert time_of(programs, lag=1.9) == longest
    assert time_of(programs, lag=1.5, jitter=0.2) < 1.02 * longest


@pytest.mark.parametrize(
    ("reach", "left", "most"), [(0, 1000, 1.1), (99, 500, 1.1), (1000, 0, 1.1), (0, 2048, 1.3)]
)
@pytest.mark.parametrize("group", [1, 4])
def test_programs_under_windows_wait_less_than_two_kernels_take(group, reach, left, most):
    """Those at an end of the keys meet fewer tiles of queries, and are out of step."""
    programs = ranks(Call(2, 16 // group, group, 4096, 4096, reach, left, MULTIPROCESSORS, True))
    assert time_of(programs, lag=1.9) < most * max(map(len, programs))


@pytest.mark.parametrize("n_keys", [2048, 8192])
def test_causal_programs_of_one_head_never_meet(n_keys):
    """In no step do two of them add to the same tile of queries."""
    call = Call(1, 1, 1, n_keys, n_keys, 0, None, n_keys // BN // 2)
    programs = [steps_of(call, seat)[0] for seat in range(call.programs)]
    assert len({len(steps) for steps in programs}) == 1
    for at in zip(*programs, strict=True):
        assert len({step.i for step in at}) == call.programs


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("n_keys", [2048, 8192])
def test_causal_programs_that_are_not_staggered_read_the_same(n_keys, group):
    """At any time one tile of queries those with their first tile of a pair, one the others."""
    seats = n_keys // BN // 2
    call = Call(1, 1, group, n_keys, n_keys, 0, None, seats, staggered=False)
    programs = [steps_of(call, seat)[0] for seat in range(seats)]
    assert len({len(steps) for steps in programs}) == 1
    for at in zip(*programs, strict=True):
        assert len({(step.head, step.i, step.turn) for step in at}) <= 2


@pytest.mark.parametrize("n_tiles", [16, 64])
def test_causal_programs_read_the_same_tiles_of_keys(n_tiles):
    """Forward, but for the last that each tile of queries sees, which comes first."""
    C = SimpleNamespace(PAIRED=True, PLAIN=True)
    programs = []
    for own in tiles_of(n_tiles // 2, n_tiles, 1, 1, dealt=False):
        device = in_python(n_tiles // 2, 0)
        read = [
            (turn, device.edges_first(x, turn, 0, 0, tile, tile + 1, C), x == 0)
            for turn, (tile, *_) in enumerate(own)
            for x in range(tile + 1)
        ]
        for turn, (tile, *_) in enumerate(own):
            assert sorted(at for t, at, _ in read if t == turn) == list(range(tile + 1))
            assert [at for t, at, first in read if t == turn and first] == [tile]
        programs.append(read)
    assert len({len(read) for read in programs}) == 1
    for at in zip(*programs, strict=True):
        assert len({(turn, tile) for turn, tile, first in at if not first}) <= 2


def tiles_of(programs, n_tiles, batch, heads, *, dealt):
    """Of every program of a causal forward pass its tiles, each with row of the batch and head."""
    found = []
    for seat in range(programs):
        device = in_python(programs, seat)
        found.append([])
        for turn in range(device.turns(n_tiles, batch * heads, True, dealt)):
            tile, bh, b, head = device.place(turn, n_tiles, batch, heads, True, dealt)
            assert bh == b * heads + head
            found[-1].append((tile, b, head))
    return found


@given(
    st.integers(2, 100),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([1, 2, 5, 13, MULTIPROCESSORS]),
)
def test_every_tile_that_is_dealt_out_is_once(n_tiles, batch, heads, programs):
    found = [x for own in tiles_of(programs, n_tiles, batch, heads, dealt=True) for x in own]
    assert sorted(found) == list(product(range(n_tiles), range(batch), range(heads)))


def idle(n, heads, *, dealt):
    """Which part of the time programs of a causal forward have no work, with heads of 64."""
    crew = tuning.CREWS["forward", 64, 64]
    found = tiles_of(MULTIPROCESSORS, -(-n // crew.own), 1, heads, dealt=dealt)
    # In steps, of which a tile's beginning and end take one and a half.
    work = [
        sum(-(-min(n, (tile + 1) * crew.own) // crew.others) + 1.5 for tile, *_ in own)
        for own in found
    ]
    return 1 - sum(work) / len(work) / max(work)


@pytest.mark.parametrize(
    ("n", "heads"), [(6144, 64), (8192, 32), (8192, 64), (16384, 32), (32768, 16), (65536, 8)]
)
def test_tiles_that_are_dealt_out_leave_few_programs_without_work(n, heads):
    assert idle(n, heads, dealt=True) < 0.02
    assert idle(n, heads, dealt=True) < idle(n, heads, dealt=False) / 2


def test_steps_are_staggered_where_additions_to_dq_would_meet():
    def staggered(size, name="dqdkdv", **more):
        q = torch.empty(1, 2, 999, size, dtype=torch.float16, device="meta")
        call = setups.Setup.of(q, q, q, (), Options(Band(), scale=1.0))
        return crews.tuned(call, name, **more)[1].STAGGERED

    assert staggered(64)
    assert staggered(128, in_order=True)
    assert not staggered(128)
    assert not staggered(256, "dkdv")
    assert not staggered(64, "dkdv")


def test_tiles_are_dealt_out_in_long_causal_forwards_of_small_heads():
    def dealt(n=8192, size=64, mask=Band(right=0), name="forward"):
        q = torch.empty(1, 2, n, size, dtype=torch.float16, device="meta")
        return crews.dealt(setups.Setup.of(q, q, q, (), Options(mask, scale=1.0)), name)

    assert dealt()
    assert dealt(size=40)
    bounds = torch.empty(1, 8192, 2, dtype=torch.int32, device="meta")
    others = Band(), Band(left=99, right=0), Intervals(bounds)
    assert not any(dealt(mask=mask) for mask in others)
    assert not any(dealt(n) for n in (2048, 6143))
    assert not dealt(size=128)
    assert not dealt(name="dq")
