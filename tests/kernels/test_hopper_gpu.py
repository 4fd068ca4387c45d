"""The Hopper kernels on a card, against the equations in float64, and that it is they who ran."""

from dataclasses import replace

import pytest
import torch

from flashpatch_kernels import attention, reference
from flashpatch_kernels.engines import Call, choose
from flashpatch_kernels.masks import Band, Intervals
from flashpatch_kernels.op import run
from flashpatch_kernels.options import Options

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16]
FORWARD, JOINT, KEYS, QUERIES = "forward_kernel", "joint_kernel", "key_kernel", "query_kernel"
# Which of the engine's own kernels give all gradients; where there are none, portable ones do.
TOGETHER, APART = [FORWARD, JOINT], [FORWARD, KEYS, QUERIES]
# Head sizes, what serves them, and what does with gradients that are the same every time where
# programs have no order in which they add to dQ.
SIZES = {64: TOGETHER, 128: TOGETHER, 256: APART}
UNORDERED = {64: [*TOGETHER, QUERIES], 128: [*TOGETHER, QUERIES], 256: APART}
# Where the kernels of heads of 256 sum for biases, heads of 192 leave a part of a tile empty.
LEARNT = SIZES | {192: APART}


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):  # for no other are these kernels chosen
        pytest.skip("not a Hopper card")


def attend(q, k, v, options):
    return run(q, k, v, options, "hopper")


def spread(x):
    """The same numbers in memory whose gaps, and what follows, are NaN."""
    b, h, n, d = x.shape
    whole = x.new_full((b, n + 3, h, d + 8), torch.nan)
    whole[:, :n, :, :d] = x.detach().transpose(1, 2)
    return whole[:, :n, :, :d].transpose(1, 2).requires_grad_(x.requires_grad)


def shifted(x):
    """The same numbers in rows that start at no multiple of 16 bytes."""
    return torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2]


@pytest.fixture
def case(sample):
    """A sample on the card, its tensors spread out; `mask` is a name or a record."""

    def case(mask="causal", *, dtype=torch.bfloat16, kv_heads=2, n=300, m=333, d=64, **options):
        scale = options.pop("scale", None)
        name = mask if isinstance(mask, str) else "full"
        one = sample(name, dtype=dtype, kv_heads=kv_heads, n=n, m=m, d=d, **options).on(DEVICE)
        if name != mask:
            one = replace(one, options=replace(one.options, mask=mask))
        if scale is not None:
            one = replace(one, options=replace(one.options, scale=scale))
        return replace(one, **{x: spread(getattr(one, x)) for x in ("q", "k", "v", "dout")})

    return case


def capped(one, cap):
    """The sample with another softcap."""
    return replace(one, options=replace(one.options, softcap=cap))


def many(one, batch, heads, kv_heads):
    """A sample with other tensors, of more heads and rows of the batch, and the same mask."""
    _, _, n, d = one.q.shape

    def random(heads, length):
        return spread(torch.randn(batch, heads, length, d, device=DEVICE).to(one.q.dtype))

    torch.manual_seed(0)
    q, k, v = random(heads, n), *(random(kv_heads, one.k.shape[2]) for _ in range(2))
    dlse = torch.randn(batch, heads, n, device=DEVICE)
    inputs = {name: x.requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    return replace(one, **inputs, dout=random(heads, n), dlse=dlse)


def own_kernels():
    from flashpatch_kernels.hopper import backward_pass, forward_pass

    apart = backward_pass.key_kernel, backward_pass.query_kernel
    return forward_pass.forward_kernel, backward_pass.joint_kernel, *apart


@pytest.fixture
def launched(monkeypatch):
    """The names of the engine's own kernels that ran, in order."""
    from flashpatch_kernels.triton import launching, plans

    names = []
    launch, make = launching.launch, plans.Launch.make

    def note(kernel):
        if kernel in own_kernels():
            names.append(kernel.__name__)

    def spy_launch(kernel, *arguments):
        note(kernel)
        return launch(kernel, *arguments)

    def spy_make(one, *tensors):
        note(one.compiled.src.fn)
        make(one, *tensors)

    monkeypatch.setattr(launching, "launch", spy_launch)
    monkeypatch.setattr(plans.Launch, "make", spy_make)
    plans.forget()  # of launches that nobody spies on
    yield names
    plans.forget()


@pytest.fixture
def left_to_sum(monkeypatch):
    """The biases whose gradients the portable kernels summed, by computing dS anew."""
    from flashpatch_kernels.hopper import backward_pass

    names = []
    of_terms = backward_pass.term_gradients

    def spy(shared, row_sums, needs):
        names.extend(sorted({"bias", "table"} & needs))
        return of_terms(shared, row_sums, needs)

    monkeypatch.setattr(backward_pass, "term_gradients", spy)
    return names


@pytest.fixture
def compare(check, launched, poisoned_memory):
    """Judges all that a call and its gradient give, and that these kernels gave it."""

    def compare(one, kernels=TOGETHER):
        launched.clear()
        check(one, attend)
        assert launched == list(kernels)

    return compare


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


@pytest.mark.parametrize("mask", ["full", "causal", "causal keys", "intervals"])
@pytest.mark.parametrize(
    "terms",
    [("softcap",), ("sinks",), ("slopes",), ("softcap", "sinks"), ("softcap", "slopes")],
    ids=str,
)
@pytest.mark.parametrize("d", SIZES)
def test_every_term(case, compare, mask, terms, d):
    """The gradient of slopes that are learnt is the portable kernels'."""
    compare(case(mask, terms=terms, d=d), [FORWARD] if "slopes" in terms else SIZES[d])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", ["full", "causal", "causal keys", "intervals"])
@pytest.mark.parametrize("d", LEARNT)
def test_a_bias_of_keys(case, compare, left_to_sum, mask, kv_heads, shape, d):
    """Its gradient is of sums that the kernels take along where one is of all heads of a key's."""
    compare(case(mask, terms=("bias",), bias_shape=shape, kv_heads=kv_heads, d=d), LEARNT[d])
    assert left_to_sum == ([] if kv_heads == 4 or shape[1] == 1 else ["bias"])


@pytest.mark.parametrize("terms", [("table",), ("clamped table",)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "causal keys", "intervals"])
@pytest.mark.parametrize("d", LEARNT)
def test_a_table(case, compare, mask, kv_heads, terms, d):
    """Beyond its ends it is summed by the kernels of the keys' gradients, of each head."""
    summed = terms == ("table",) or kv_heads == 4
    one = case(mask, terms=terms, n=500, m=600, kv_heads=kv_heads, d=d, entries=150, first=-90)
    compare(one, LEARNT[d] if summed else [FORWARD])


@pytest.mark.parametrize("terms", [("bias",), ("clamped table",)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "causal keys"])
def test_what_is_learnt_beside_values_of_another_head_size(case, compare, mask, terms):
    compare(case(mask, terms=terms, n=500, m=600, kv_heads=4, d=192, dv=128), APART)


@pytest.mark.parametrize(
    ("mask", "entries", "first"),
    [
        *[("full", *ends) for ends in [(1, 0), (2, 0), (40, -300), (40, 260), (1, 999)]],
        *[(mask, *ends) for mask in ("causal", "causal keys") for ends in [(40, -300), (2, -77)]],
        *[(Band(left=200, right=30), 20, first) for first in (-300, -33, 0, 32, 64)],
    ],
)
@pytest.mark.parametrize("d", LEARNT)
def test_the_ends_of_a_table_anywhere(case, compare, mask, entries, first, d):
    options = {"terms": ("clamped table",), "entries": entries, "first": first}
    compare(case(mask, n=500, m=500, kv_heads=4, d=d, **options), LEARNT[d])


@pytest.mark.parametrize(
    "terms",
    [
        ("softcap", "bias"),
        ("softcap", "table"),
        ("bias", "clamped table", "sinks"),
        ("softcap", "bias", "table", "sinks"),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", SIZES)
def test_biases_beside_each_other(case, compare, request, mask, in_order, terms, d):
    if in_order:
        request.getfixturevalue("deterministic")
    unordered = in_order and mask == "causal keys"
    kernels = (UNORDERED if unordered else SIZES)[d]
    if "clamped table" in terms and unordered and d == 64:
        kernels = [FORWARD]
    compare(case(mask, terms=terms, n=400, m=400, kv_heads=4, d=d), kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [("bias",), ("table",), ("clamped table",)], ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_many_programs_with_biases(case, compare, terms, dtype, d):
    options = {"entries": 200, "first": -100, "bias_shape": (2, 4, 1), "dtype": dtype}
    one = case("causal", terms=terms, n=2011, m=2011, kv_heads=4, d=d, **options)
    compare(one, SIZES[d])


@pytest.mark.parametrize("hides", [-1e9, float("-inf")])
@pytest.mark.parametrize("d", SIZES)
def test_a_bias_of_keys_may_hide_them(case, compare, hides, d):
    """As masks that models make do, of single keys and of whole tiles, from the first on."""
    one = case("causal", terms=("bias",), bias_shape=(2, 1, 1), n=700, m=700, d=d)
    bias = one.options.bias.detach().clone()
    bias[0, ..., 1:300] = hides
    bias[1, ..., 5::7] = hides
    compare(replace(one, options=replace(one.options, bias=bias.requires_grad_())), SIZES[d])


@pytest.mark.parametrize("hides", [-1e9, float("-inf")])
@pytest.mark.parametrize("d", SIZES)
def test_a_table_may_hide_distances(case, compare, hides, d):
    """Single ones and all of many tiles, in a table whose heads lie beside each other in memory."""
    one = case("full", terms=("table",), n=700, m=700, d=d)
    table = one.options.table.detach().t().contiguous().t()
    table[:, :450] = hides
    table[:, 5::7] = hides
    compare(replace(one, options=replace(one.options, table=table.requires_grad_())), SIZES[d])


GIVEN = {
    "slopes": ("slopes", {}),
    "a bias of keys": ("bias", {}),
    "a table": ("table", {}),
    "a table of some distances": ("clamped table", {"entries": 150, "first": -90}),
    "one number": ("clamped table", {"entries": 1, "first": 0}),
    "two numbers": ("clamped table", {"entries": 2, "first": 0}),
    "a table of unseen distances": ("clamped table", {"entries": 40, "first": 260}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "causal window", "causal keys"])
@pytest.mark.parametrize("bias", GIVEN)
@pytest.mark.parametrize("d", SIZES)
def test_biases_that_are_given(
    case, pytorch, assert_as_exact_as_pytorch, launched, poisoned_memory, bias, mask, dtype, d
):
    """As ALiBi's slopes are; slopes that are learnt have the portable kernels' gradient."""

    def answer(one, attend):
        given = one.options.with_terms({x: t.detach() for x, t in one.options.terms.items()})
        out, _ = attend(one.q, one.k, one.v, given)
        return out, *torch.autograd.grad(out, (one.q, one.k, one.v), one.dout)

    term, more = GIVEN[bias]
    one = case(mask, terms=(term,), dtype=dtype, n=500, m=500, d=d, **more)
    true = answer(one.to(torch.float64), reference.attention)
    theirs, ours = answer(one, pytorch), answer(one, attend)
    assert launched == SIZES[d]
    for name, *found in zip(("out", "dq", "dk", "dv"), ours, theirs, true, strict=True):
        assert_as_exact_as_pytorch(*found, name)


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


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("term", ["slopes", "bias", "table", "clamped table"])
@pytest.mark.parametrize("mask", ["causal", "causal keys"])
@pytest.mark.parametrize("d", [64, 128])
def test_alike_calls_after_each_other_with_their_own_terms(
    case, launched, monkeypatch, mask, term, learnt, d
):
    """Slopes that are learnt take the portable kernels' steps."""
    from flashpatch_kernels.triton import launching

    one = case(mask, terms=(term,), n=500, m=500, kv_heads=4, d=d, entries=150, first=-90)
    ((name, x),) = one.options.terms.items()

    def answer(attend, q, k, v, options, dout):
        out, _ = attend(q, k, v, options)
        inputs = (q, k, v, *options.terms.values()) if learnt else (q, k, v)
        return out, *torch.autograd.grad(out, inputs, dout)

    for factor in (1.0, 0.5, -2.0):
        inputs = [spread(x.detach() * factor).requires_grad_() for x in (one.q, one.k, one.v)]
        mine = (x.detach() * abs(factor)).requires_grad_(learnt)
        options = one.options.with_terms({name: mine})
        found = answer(attend, *inputs, options, spread(one.dout))
        exact = [x.detach().double().requires_grad_() for x in inputs]
        options = options.with_terms({name: mine.detach().double().requires_grad_(learnt)})
        true = answer(reference.attention, *exact, options, one.dout.double())
        for ours, theirs in zip(found, true, strict=True):
            assert (ours - theirs).norm() < 2e-2 * theirs.norm()
        monkeypatch.setattr(launching, "launch", None)
    assert launched == ([FORWARD] if term == "slopes" and learnt else SIZES[d]) * 3


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


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
