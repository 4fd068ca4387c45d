"""The Hopper kernels on a card, against the equations in float64, and that it is they who ran."""

from dataclasses import replace

import pytest
import torch
from hopper_calls import (
    APART,
    DEVICE,
    DTYPES,
    FORWARD,
    JOINT,
    QUERIES,
    SIZES,
    TOGETHER,
    UNORDERED,
    attend,
    many,
    own_kernels,
    spread,
)

from flashpatch_kernels import attention, reference
from flashpatch_kernels.engines import Call, choose
from flashpatch_kernels.masks import Band, Intervals
from flashpatch_kernels.options import Options

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def shifted(x):
    """The same numbers in rows that start at no multiple of 16 bytes."""
    return torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2]


def capped(one, cap):
    """The sample with another softcap."""
    return replace(one, options=replace(one.options, softcap=cap))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("d", SIZES)
def test_every_mask_with_every_sharing_of_heads(case, compare, range_mask_name, kv_heads, dtype, d):
    compare(case(range_mask_name, kv_heads=kv_heads, dtype=dtype, d=d), SIZES[d])


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("length", [128, 2011])
def test_many_tiles_of_every_mask(case, compare, range_mask_name, length, d):
    compare(case(range_mask_name, kv_heads=1, n=length, m=length, d=d), SIZES[d])


@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", [40, 48, 56, 72, 80, 88, 96, 104, 112, 120, 136, 160, 192, 224])
def test_head_sizes_between_the_widths_of_tiles(case, compare, mask, d):
    compare(case(mask, d=d), TOGETHER if d <= 128 else APART)


@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("sizes", [(192, 128), (160, 96), (96, 64), (72, 40), (256, 128)], ids=str)
def test_values_may_have_another_head_size(case, compare, mask, sizes):
    """As those of multi-head latent attention."""
    d, dv = sizes
    compare(case(mask, d=d, dv=dv), APART if d > 128 else [FORWARD])


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 300), (300, 1), (128, 128), (77, 1025), (1025, 77), (2011, 2011)]
)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("d", SIZES)
def test_lengths_that_divide_nothing(case, compare, mask, n, m, d):
    window = Band(left=99, right=0, offset=m - n)
    compare(case(window if mask == "window" else mask, n=n, m=m, d=d), SIZES[d])


@pytest.mark.parametrize(
    "band",
    [
        Band(left=120, right=57),
        Band(left=0, right=0),
        Band(left=200),
        Band(right=-130, offset=33),
        Band(left=-140),
        Band(left=5, right=5, offset=-1000),
    ],
    ids=str,
)
def test_bands_that_leave_tiles_and_rows_out(case, compare, band):
    compare(case(band))


@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", SIZES)
def test_the_scale_may_be_anything(case, compare, mask, scale, d):
    compare(case(mask, scale=scale, d=d), SIZES[d])


GROWTHS = {
    "from tile to tile": lambda j: 1 + j / 32,
    "at one key, beyond any float": lambda j: torch.where(j == 700, 400.0, 1.0),
    "and falls again": lambda j: 1 + 40 * torch.exp(-(((j - 500) / 50) ** 2)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "causal keys"])
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("d", [*SIZES, 96])
def test_scores_that_outgrow_the_first_tile(case, compare, mask, growth, dtype, cap, d):
    one = capped(case(mask, n=1000, m=1000, d=d, dtype=dtype), cap)
    by = GROWTHS[growth](torch.arange(1000, device=DEVICE)).to(dtype)[:, None]
    k = spread((one.k.detach() * by).requires_grad_())
    compare(replace(one, k=k), SIZES.get(d, TOGETHER))


@pytest.mark.parametrize("cap", [None, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_a_row_does_not_depend_on_its_neighbours(case, launched, dtype, d, cap):
    """Nor on how far their scores grow, which makes a warp take another path."""
    one = capped(case("causal", n=1000, m=1000, d=d, dtype=dtype), cap)
    q, k, v = (x.detach() for x in (one.q, one.k, one.v))
    usual, lse = attend(q, k, v, one.options)
    steep = q.clone()
    steep[:, :, 5::16] *= 100
    found, lse_found = attend(steep, k, v, one.options)
    same = torch.arange(1000, device=DEVICE) % 16 != 5
    assert torch.equal(found[:, :, same], usual[:, :, same])
    assert torch.equal(lse_found[:, :, same], lse[:, :, same])
    assert launched == [FORWARD] * 2


@pytest.mark.parametrize("key", [450, 451, 452, 453, 454])
@pytest.mark.parametrize("cap", [None, 50.0])
@pytest.mark.parametrize("d", SIZES)
def test_what_is_not_a_number_stays_in_its_row(case, d, cap, key):
    one = capped(case("causal", n=600, m=600, d=d), cap)
    q, k, v = (x.detach().clone() for x in (one.q, one.k, one.v))
    usual, _ = attend(q, k, v, one.options)
    q[:, :, 300] = torch.nan
    k[:, :, key] = torch.nan
    found, lse = attend(q, k, v, one.options)
    row = torch.arange(600, device=DEVICE)
    lost = (row == 300) | (row >= key)
    assert found[:, :, lost].isnan().all()
    assert lse[:, :, lost].isnan().all()
    assert torch.equal(found[:, :, ~lost], usual[:, :, ~lost])


@pytest.mark.parametrize("terms", [(), ("sinks",)], ids=str)
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", SIZES)
def test_alike_calls_after_each_other(
    case, compare, launched, monkeypatch, request, terms, in_order, stream, mask, d
):
    """The second and third take the steps that the first left, on whichever stream."""
    from flashpatch_kernels.triton import launching, plans

    if in_order:
        request.getfixturevalue("deterministic")
    plans.forget()
    one = case(mask, terms=terms, n=333, d=d)
    kernels = (UNORDERED if in_order and mask == "causal keys" else SIZES)[d]
    compare(one, kernels)
    launched.clear()

    def answer(attend, q, k, v, options, dout):
        out, lse = attend(q, k, v, options)
        return out, lse.nan_to_num(neginf=0), *torch.autograd.grad(out, (q, k, v), dout)

    for factor in (1.0, 0.5, -2.0):
        inputs = [spread(x.detach() * factor).requires_grad_() for x in (one.q, one.k, one.v)]
        dout = spread(one.dout)
        sinks = None if one.options.sinks is None else one.options.sinks.detach() * factor
        its = one.options.mask
        if mask != "causal":
            its = Intervals(its.bounds.clone(), None if its.runs is None else its.runs.clone())
        options = replace(one.options, sinks=sinks, mask=its)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream() if stream else torch.cuda.current_stream()):
            found = answer(attend, *inputs, options, dout)
        torch.cuda.synchronize()
        exact = [x.detach().double().requires_grad_() for x in inputs]
        for ours, true in zip(
            found, answer(reference.attention, *exact, options, dout.double()), strict=True
        ):
            assert (ours - true).norm() < 1e-2 * true.norm()
        monkeypatch.setattr(launching, "launch", None)
    assert launched == kernels * 3


@pytest.mark.parametrize("mask", ["full", "causal", "causal keys"])
@pytest.mark.parametrize("d", SIZES)
def test_programs_that_take_many_turns(case, compare, mask, d):
    """16 heads of 4 rows of the batch have more tiles than a card runs programs."""
    padded = case(mask, n=1500, m=1500, d=d)
    batch = 2 if mask == "causal keys" else 4
    compare(many(padded, batch, 32 // batch * 2, 8), SIZES[d])


@pytest.mark.parametrize("n", [129, 257, 385, 513, 641, 900])
@pytest.mark.parametrize("d", SIZES)
def test_a_tile_in_the_middle_has_no_partner(case, compare, n, d):
    compare(many(case("causal", n=n, m=n, d=d), 3, 48, 16), SIZES[d])


@pytest.mark.parametrize(("n", "kv_heads"), [(6200, 40), (8192, 10)])
def test_tiles_that_are_dealt_out_give_the_same_bits(
    launched, monkeypatch, poisoned_memory, n, kv_heads
):
    """Each is computed as it is in pairs, whoever does it."""
    from flashpatch_kernels.hopper import crews
    from flashpatch_kernels.triton import plans

    q = torch.randn(1, 40, n, 64, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, n, 64, device=DEVICE, dtype=q.dtype) for _ in range(2))
    options = Options(Band(right=0), scale=0.125)
    dealt = attend(q, k, v, options)
    monkeypatch.setattr(crews, "dealt", lambda *_: False)
    plans.shared.cache_clear()
    for ours, in_pairs in zip(dealt, attend(q, k, v, options), strict=True):
        assert torch.equal(ours, in_pairs)
    assert launched == [FORWARD, FORWARD]


def test_expanded_keys(case, compare):
    one = case("causal")
    k, v = (x.detach()[:1, :1].expand(x.shape).requires_grad_() for x in (one.k, one.v))
    compare(replace(one, k=k, v=v))


@pytest.mark.parametrize("names", ["qkv", "q", "kv"])
def test_rows_that_start_anywhere_in_memory(case, compare, names):
    """The copy engine cannot read them: the portable kernels do."""
    one = case("causal keys")
    moved = {x: shifted(getattr(one, x).detach()).requires_grad_() for x in names}
    compare(replace(one, **moved), [])


DOUTS = {
    "spread out": (lambda x: x, TOGETHER),
    "one number": (lambda x: x.new_ones(()).expand(x.shape), TOGETHER),
    "one head": (lambda x: x[:1, :1].expand(x.shape), TOGETHER),
    "heads first": (lambda x: x.contiguous(), TOGETHER),
    "columns first": (lambda x: x.mT.contiguous().mT, TOGETHER),
    "anywhere": (shifted, [FORWARD]),
}


@pytest.mark.parametrize("layout", DOUTS)
@pytest.mark.parametrize("d", [64, 128])
def test_a_gradient_of_any_layout(
    case, pytorch, assert_as_exact_as_pytorch, launched, poisoned_memory, layout, d
):
    def gradients(one, attend):
        out, _ = attend(one.q, one.k, one.v, one.options)
        return torch.autograd.grad(out, (one.q, one.k, one.v), lay(one.dout))

    lay, kernels = DOUTS[layout]
    one = case("causal", d=d)
    true = gradients(one.to(torch.float64), reference.attention)
    theirs, ours = gradients(one, pytorch), gradients(one, attend)
    assert launched == kernels
    for name, *found in zip("qkv", ours, theirs, true, strict=True):
        assert_as_exact_as_pytorch(*found, f"d{name}")


@pytest.mark.parametrize(
    ("names", "kernels"),
    [("q", [QUERIES]), ("k", [JOINT]), ("v", [JOINT]), ("qk", [JOINT]), ("kv", [JOINT])],
    ids=str,
)
@pytest.mark.parametrize("d", [64, 128])
def test_some_of_the_gradients_alone(
    case, pytorch, assert_as_exact_as_pytorch, launched, poisoned_memory, names, kernels, d
):
    def gradients(one, attend):
        inputs = {x: getattr(one, x).detach().requires_grad_(x in names) for x in "qkv"}
        out, _ = attend(*inputs.values(), one.options)
        return torch.autograd.grad(out, [inputs[x] for x in names], one.dout)

    one = case("causal keys", d=d)
    true = gradients(one.to(torch.float64), reference.attention)
    theirs, ours = gradients(one, pytorch), gradients(one, attend)
    assert launched == [FORWARD, *kernels]
    for name, *found in zip(names, ours, theirs, true, strict=True):
        assert_as_exact_as_pytorch(*found, f"d{name}")


def test_more_than_65535_heads(launched):
    q, k, v = (torch.randn(70_000, 1, 3, 64, device=DEVICE, dtype=torch.float16) for _ in range(3))
    out, _ = attend(q, k, v, Options(Band(right=0), scale=0.125))
    true, _ = reference.attention(
        *(x[-9:].double() for x in (q, k, v)), Options(Band(right=0), scale=0.125)
    )
    assert (out[-9:] - true).norm() < 1e-3 * true.norm()
    assert launched == [FORWARD]


def test_offsets_beyond_32_bits(launched):
    """The last head's elements start beyond 2^31."""
    whole = torch.empty(1, 260, 65_536, 128, device=DEVICE, dtype=torch.float16)
    q = whole[:, :, -200:]
    q[:, -1].normal_()
    k, v = (torch.randn(1, 1, 128, 128, device=DEVICE, dtype=torch.float16) for _ in range(2))
    out, _ = attend(q, *(x.expand(1, 260, -1, -1) for x in (k, v)), Options(scale=0.1))
    true, _ = reference.attention(q[:, -1:].double(), k.double(), v.double(), Options(scale=0.1))
    assert q[:, -1:].storage_offset() > 1 << 31
    assert (out[:, -1:] - true).norm() < 1e-3 * true.norm()
    assert launched == [FORWARD]


def test_a_second_derivative_is_refused(case):
    one = case("causal")
    out, _ = attend(one.q, one.k, one.v, one.options)
    (dq,) = torch.autograd.grad(out, one.q, one.dout, create_graph=True)
    with pytest.raises(NotImplementedError, match="engine='tiled' has"):
        dq.sum().backward()


@pytest.mark.parametrize("mask", ["causal", "causal window", "causal keys"])
@pytest.mark.parametrize("d", [64, 256])
def test_one_compilation_serves_every_length(case, mask, d):
    def compiled():
        caches = (c for x in own_kernels() for c in x.device_caches.values())
        return sum(len(cache[0]) for cache in caches)

    case(mask, n=128, m=128, d=d).answer(attend)
    before = compiled()
    for n in (16, 17, 100, 128, 1000):
        case(mask, n=n, m=n, d=d).answer(attend)
    assert compiled() == before


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("d", SIZES)
def test_nothing_waits_for_the_gpu(case, range_mask_name, launched, d):
    one = case(range_mask_name, d=d, terms=("sinks",))
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(one.q, one.k, one.v, one.options)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert launched == SIZES[d]


def test_the_choice_for_a_cuda_call():
    q, k, v = (torch.randn(1, 4, 512, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    options = Options(mask=Band(right=0))
    assert choose(Call.of(q, k, v, options)).name == "hopper"
    assert choose(Call.of(q[:, :, :256], k, v, options)).name == "triton"
    assert choose(Call.of(q, shifted(k), v, options)).name == "triton"


def test_autocast_runs_it_in_half_precision(launched):
    inputs = [torch.randn(2, 4, 300, 64, device=DEVICE, requires_grad=True) for _ in range(3)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(*inputs, causal=True)
    found = torch.autograd.grad(out.float().square().sum(), inputs)
    assert launched == TOGETHER
    assert out.dtype == torch.bfloat16
    expected = attention(*(x.bfloat16() for x in inputs), causal=True)
    assert torch.equal(out, expected)
    wanted = torch.autograd.grad(expected.float().square().sum(), inputs)
    assert all(x.dtype == torch.float32 for x in found)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])
    assert (found[0] - wanted[0]).norm() <= torch.finfo(torch.bfloat16).eps * wanted[0].norm()


@pytest.mark.parametrize("call", [{"causal": True}, {"window": 50}, {"softcap": 20.0}], ids=str)
def test_it_compiles_without_a_break(launched, call):
    q, k, v = (
        torch.randn(2, 4, 300, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def both(q, k, v):
        return attention(q, k, v, return_lse=True, **call)

    def answer(attend):
        out, lse = attend(q, k, v)
        loss = out.float().square().sum() + lse.square().sum()
        return out, lse, *torch.autograd.grad(loss, (k, v, q))

    expected = answer(both)
    eager = list(launched)
    assert eager[0] == FORWARD
    torch._dynamo.reset()
    found = answer(torch.compile(both, fullgraph=True, backend="aot_eager"))
    assert launched == eager * 2
    *same, dq = zip(found, expected, strict=True)
    assert all(torch.equal(mine, true) for mine, true in same)
    assert (dq[0] - dq[1]).norm() <= torch.finfo(torch.bfloat16).eps * dq[1].norm()


@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", SIZES)
def test_a_cuda_graph_replays_it(case, mask, d):
    one = case(mask, d=d)
    q, k, v = (x.detach() for x in (one.q, one.k, one.v))
    attend(q, k, v, one.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(q, k, v, one.options)
    q.copy_(torch.randn_like(q))
    graph.replay()
    expected = attend(q, k, v, one.options)
    assert all(torch.equal(mine, true) for mine, true in zip(found, expected, strict=True))
