"""The same bits from the Hopper kernels on a card, every time, in whatever order programs run."""

import pytest
import torch
from hopper_calls import DEVICE, DTYPES, SIZES, TOGETHER, UNORDERED, attend, many

from flashpatch_kernels.masks import Band

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", [64, 128])
def test_200_repeats_give_the_same_bits_but_of_dq(case, launched, mask, d):
    """dq is summed in no fixed order."""
    one = case(mask, n=777, m=777, d=d)
    first = one.answer(attend)
    size, eps = first["q"].double().norm(), torch.finfo(one.q.dtype).eps
    for _ in range(200):
        again = one.answer(attend)
        assert all(torch.equal(again[name], x) for name, x in first.items() if name != "q")
        assert (again["q"].double() - first["q"]).norm() <= eps * size
    assert launched == TOGETHER * 201


@pytest.mark.parametrize(
    ("mask", "kv_heads"), [("full", 2), ("causal", 4), ("causal", 2), ("causal keys", 2)]
)
@pytest.mark.parametrize("d", SIZES)
def test_200_repeats_of_deterministic_algorithms_give_the_same_bits(
    case, launched, deterministic, mask, kv_heads, d
):
    one = case(mask, kv_heads=kv_heads, n=777, m=777, d=d)
    first = one.answer(attend)
    for _ in range(200):
        again = one.answer(attend)
        assert all(torch.equal(again[name], x) for name, x in first.items())
    assert launched == (UNORDERED if mask == "causal keys" else SIZES)[d] * 201


@pytest.mark.parametrize("mask", ["full", "causal", Band(left=1000, right=0)], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_1000_repeats_of_many_programs_in_one_order_give_the_same_bits(
    case, launched, deterministic, mask, d
):
    """Told of before all would see it, an addition follows another too early once in many runs."""
    one = many(case(mask, n=5000, m=5000, d=d), 2, 8, 8)
    first = one.answer(attend)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        again = one.answer(attend)
        for name, x in first.items():
            same &= (again[name] == x).all()
    assert same
    assert launched == TOGETHER * 1001


@pytest.mark.parametrize("mask", ["full", "causal", "causal keys"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 96])
def test_deterministic_algorithms_are_as_exact(case, compare, deterministic, mask, dtype, d):
    compare(case(mask, n=900, m=1001, d=d, dtype=dtype), UNORDERED[128])


# Queries, keys, row of the batch, heads and heads of keys: fewer programs than there are, more,
# and such as have one more tile than others; as many tiles of keys as one, odd and even numbers.
CROWDS = [
    (100, 100, 1, 2, 2),
    (300, 128, 2, 4, 2),
    (1001, 1001, 3, 8, 8),
    (1500, 900, 5, 12, 4),
    (2048, 2048, 4, 16, 16),
    (2100, 2100, 3, 24, 8),
    (5000, 5000, 2, 8, 1),
]
IN_ORDER = [
    *("full", "causal", Band(right=-300), Band(right=77)),
    *(Band(left=500, right=0), Band(left=99, right=77)),
    *(Band(left=5, right=5, offset=1000), Band(left=5, right=5, offset=-1000)),
]


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("mask", IN_ORDER, ids=str)
@pytest.mark.parametrize(("n", "m", "batch", "heads", "kv_heads"), CROWDS)
def test_programs_add_in_one_order_however_many(
    case, launched, deterministic, d, n, m, batch, heads, kv_heads, mask
):
    one = many(case(mask, n=n, m=m, d=d), batch, heads, kv_heads)
    torch.use_deterministic_algorithms(False)
    usual = one.answer(attend)
    torch.use_deterministic_algorithms(True)
    first = one.answer(attend)
    for _ in range(3):
        again = one.answer(attend)
        assert all(torch.equal(again[name], x) for name, x in first.items())
    window = isinstance(mask, Band) and mask.left is not None
    unordered = window and (mask.left < mask.offset or 2 * (mask.left + mask.right) > m)
    assert launched == TOGETHER + (UNORDERED[d] if unordered else TOGETHER) * 4
    error = (first["q"].double() - usual["q"]).norm()
    assert error <= 2 * torch.finfo(one.q.dtype).eps * usual["q"].double().norm()


def test_deterministic_algorithms_give_the_same_gradients(case, assert_as_exact_as_pytorch):
    one = case("causal keys")
    usual = one.answer(attend)
    torch.use_deterministic_algorithms(True)
    try:
        found = one.answer(attend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in found.items():
        seen = usual[name].isfinite()
        error = (x.double() - usual[name])[seen].norm()
        assert error <= 2 * torch.finfo(one.q.dtype).eps * x[seen].double().norm(), name


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("d", SIZES)
def test_a_cuda_graph_replays_gradients_that_are_the_same_every_time(
    case, launched, deterministic, mask, d
):
    """Programs that wait for each other are launched together, which a graph must keep."""
    one = case(mask, n=700, m=600, d=d)

    def gradients():
        out, _ = attend(one.q, one.k, one.v, one.options)
        return torch.autograd.grad(out, (one.q, one.k, one.v), one.dout)

    gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    one.dout.copy_(torch.randn_like(one.dout))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, gradients(), strict=True))
    assert launched == SIZES[d] * 3
