"""The tiled engine against the equations, in every combination that a call may ask for."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashpatch_kernels import dropout, tiled, tiled_heads, tiled_masks
from flashpatch_kernels.masks import Band, Boolean, Intervals
from flashpatch_kernels.op import run
from flashpatch_kernels.options import Options, Relative

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
RELATIVE = ("relative_queries", "relative_keys", "relative_values")
TERMS = ("softcap", "table", "slopes", "bias", "sinks", *RELATIVE)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that a short sequence has many, and not all heads fit one."""
    monkeypatch.setattr(tiled, "CPU_TILE", tiled.TileSize(16, 12, 2 * 16 * 12))


def attend(q, k, v, options):
    return run(q, k, v, options, "tiled")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_mask_is_as_exact_as_pytorch(sample, check, mask_name, kv_heads, dtype):
    check(sample(mask_name, kv_heads=kv_heads, dtype=dtype), attend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_terms_together_are_as_exact_as_pytorch(sample, check, mask_name, dtype):
    check(sample(mask_name, kv_heads=2, dtype=dtype, terms=TERMS, dropout=0.3), attend)


@pytest.mark.parametrize("term", [*TERMS, "clamped table"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("mask", ["full", "causal", "causal keys"])
def test_each_term_alone_is_as_exact_as_pytorch(sample, check, term, kv_heads, mask):
    check(sample(mask, terms=(term,), kv_heads=kv_heads), attend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("embedding_heads", [4, 1])
@pytest.mark.parametrize("term", ["clamped table", *RELATIVE])
def test_terms_by_distance_are_as_exact_as_pytorch(sample, check, term, embedding_heads, dtype):
    one = sample(
        "window",
        dtype=dtype,
        terms=(term,),
        kv_heads=2,
        d=6,
        dv=9,
        embedding_heads=embedding_heads,
        dropout=0.2,
    )
    check(one, attend)


@pytest.mark.parametrize(
    ("first", "entries"),
    [
        (-36, 81),  # every distance has its own
        (-60, 30),  # before and into the distances that there are
        (-60, 10),  # before all of them
        (30, 40),  # within and beyond
        (60, 10),  # beyond all of them
        (-100, 300),
        (0, 1),
        (-3, 2),
    ],
)
def test_distances_beyond_the_ends_have_the_entry_of_the_end(sample, check, first, entries):
    one = sample("full", terms=("clamped table", *RELATIVE), first=first, entries=entries)
    check(one, attend)


@given(
    lengths=st.tuples(*[st.integers(1, 30)] * 2),
    tile=st.tuples(*[st.integers(1, 16)] * 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    embedding_heads=st.sampled_from([1, 4]),
    entries=st.integers(1, 30),
    first=st.integers(-40, 40),
    terms=st.sets(st.sampled_from(["clamped table", *RELATIVE]), min_size=1),
)
@settings(max_examples=40)
def test_repeating_the_entries_of_the_ends_changes_nothing(
    sample, lengths, tile, kv_heads, embedding_heads, entries, first, terms
):
    """A call whose tables are clamped, and one whose tables have all distances, agree."""
    n, m = lengths
    one = sample(
        "full",
        dtype=torch.float64,
        n=n,
        m=m,
        d=3,
        kv_heads=kv_heads,
        embedding_heads=embedding_heads,
        entries=entries,
        first=first,
        terms=tuple(sorted(terms)),
    )
    names = [name for name in one.options.terms if not name.endswith("vectors")]
    at = (torch.arange(1 - n, m) - first).clamp(0, entries - 1)
    whole = {name: x.index_select(1, at) for name, x in one.inputs.items() if name in names}
    moved = {name: replace(getattr(one.options, name), first=1 - n) for name in terms & {*RELATIVE}}
    options = replace(one.options, first=None, **moved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "CPU_TILE", tiled.TileSize(*tile, 3 * math.prod(tile)))
        clamped = one.answer(attend)
        every = one.answer(lambda q, k, v, _: attend(q, k, v, options.with_terms(whole)))
    for name, x in clamped.items():
        torch.testing.assert_close(x, every[name], msg=name)


@pytest.mark.parametrize(("n", "m"), [(1, 90), (90, 1), (3, 70), (70, 3)])
@pytest.mark.parametrize("term", RELATIVE)
def test_vectors_by_distance_of_few_queries_or_keys(sample, check, n, m, term):
    check(sample("causal", n=n, m=m, terms=(term,), kv_heads=2), attend)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (1, 1, 37), (2, 4, 37), (1, 4, 37), (2, 1, 37)]
)
def test_a_bias_of_any_broadcast_has_its_gradient(sample, check, shape):
    check(sample("causal keys", terms=("bias",), bias_shape=shape), attend)


def test_a_bias_of_stride_zero_is_read_in_place(sample, check):
    one = sample("causal", terms=("bias",), bias_shape=(1, 1, 37))
    seen = one.options.bias.detach().expand(2, 4, -1, -1)
    expanded = sample("causal", terms=("bias",), bias_shape=(2, 4, 37))
    object.__setattr__(expanded.options, "bias", seen.requires_grad_())
    check(expanded, attend)


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 45), (45, 1), (16, 12), (17, 13), (33, 24), (2, 90)]
)
@pytest.mark.parametrize("mask", ["full", "causal", "keys", "causal window"])
def test_lengths_that_fit_no_tile(sample, check, n, m, mask):
    check(sample(mask, n=n, m=m, terms=("table",), dropout=0.2), attend)


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (7, 3), (3, 12), (48, 20)])
def test_values_of_another_size_than_the_keys(sample, check, d, dv):
    check(sample("causal", d=d, dv=dv, kv_heads=2), attend)


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    kv_heads=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 24),
    keys=st.integers(1, 24),
    offset=st.integers(-10, 40),
    sides=st.tuples(*[st.none() | st.integers(-3, 20)] * 2),
    rate=st.sampled_from([0.0, 0.25]),
)
@settings(max_examples=40)
def test_any_band_in_tiles_of_any_size(
    sample, check, n, m, kv_heads, rows, keys, offset, sides, rate
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "CPU_TILE", tiled.TileSize(rows, keys, 3 * rows * keys))
        one = sample("full", n=n, m=m, kv_heads=kv_heads, terms=("table",), dropout=rate)
        object.__setattr__(one.options, "mask", Band(*sides, offset=offset))
        check(one, attend)


def test_nothing_unwritten_is_read(sample, check, mask_name, poisoned_memory):
    check(sample(mask_name, kv_heads=2, terms=TERMS, dropout=0.3), attend)


def test_rows_that_see_nothing_give_zero(sample):
    one = sample("full", terms=("table", *RELATIVE))
    hidden = Boolean(torch.zeros(1, 1, 1, 45, dtype=torch.bool))
    object.__setattr__(one.options, "mask", hidden)
    answer = one.answer(attend)
    assert torch.equal(answer.pop("lse"), torch.full((2, 4, 37), -torch.inf))
    for name, x in answer.items():
        assert not x.any(), name


def test_a_sink_takes_the_weight_of_rows_that_see_nothing(sample):
    one = sample("full", terms=("sinks",))
    object.__setattr__(one.options, "mask", Boolean(torch.zeros(1, 1, 1, 45, dtype=torch.bool)))
    out, lse = attend(one.q, one.k, one.v, one.options)
    assert not out.any()
    assert torch.allclose(lse, one.options.sinks[:, None].expand(2, 4, 37))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", ["full", "causal", "causal keys"])
@pytest.mark.parametrize("terms", [(), ("softcap", "slopes", "relative_values")])
def test_alike_keys_and_values_have_gradients_as_exact_as_pytorch(
    sample, check, monkeypatch, dtype, mask, terms
):
    # All keys in one tile. dP and delta are ten times their difference, and the rounding of delta
    # would be multiplied by the sum of keys that are alike too.
    monkeypatch.setattr(tiled, "CPU_TILE", tiled.TileSize(16, 48, 2 * 16 * 48))
    one = sample(mask, dtype=dtype, terms=terms, d=64)
    with torch.no_grad():
        for x in (one.k, one.v):
            x[:] = 1 + x / 10
    check(one, attend)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1e10])
def test_a_bias_without_bound_hides_its_keys(sample, check, hidden):
    one = sample("full", terms=("bias",), bias_shape=(2, 1, 37))
    with torch.no_grad():
        one.options.bias[..., 20:] = hidden
        one.options.bias[1, :, 5] = hidden
    answer = one.answer(attend)
    assert not answer["out"][1, :, 5].any()
    assert not answer["bias"][..., 20:].any()
    with torch.no_grad():
        one.options.bias[one.options.bias == hidden] = -torch.inf
    check(one, attend)


def test_the_output_is_laid_out_as_the_projection_reads_it(sample):
    one = sample("causal")
    out, lse = attend(one.q, one.k, one.v, one.options)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert (
        attend(*(x.double() for x in (one.q, one.k, one.v)), one.options)[1].dtype == torch.float64
    )


def test_gradients_are_laid_out_as_their_tensors(sample):
    one = sample("causal")
    grads = one.answer(attend)
    assert grads["q"].stride() == one.q.stride()
    assert grads["k"].stride() == one.k.stride()


def test_any_strides(sample, check):
    plain = sample("causal", kv_heads=2)
    views = {
        "q": plain.q.detach().transpose(2, 3).contiguous().transpose(2, 3),  # D is not the fastest
        "k": plain.k.detach()[:, :1].expand(-1, 2, -1, -1),  # stride 0
        "v": torch.stack((plain.v.detach(),) * 2, dim=-1)[..., 0],  # gaps
    }
    for name, x in views.items():
        object.__setattr__(plain, name, x.requires_grad_())
    check(plain, attend)


def test_only_the_gradients_that_are_needed_are_computed(sample):
    one = sample("causal", terms=TERMS)
    out, lse = tiled.forward(one.q, one.k, one.v, one.options)
    names = tuple(one.inputs)
    every = tiled.backward(
        one.dout, None, one.q, one.k, one.v, out, lse, one.options, frozenset(names)
    )
    assert set(every) == set(names)
    for name in names:
        alone = tiled.backward(
            one.dout, None, one.q, one.k, one.v, out, lse, one.options, frozenset((name,))
        )
        assert list(alone) == [name]
        assert torch.equal(alone[name], every[name])


def test_two_runs_agree_to_the_bit(sample):
    one = sample("causal keys", terms=TERMS, dropout=0.2)
    first, second = one.answer(attend), one.answer(attend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("terms", "rate"),
    [((), 0.0), (("softcap",), 0.0), (TERMS, 0.0), (("table",), 0.4), (RELATIVE, 0.4)],
)
def test_gradients_agree_with_finite_differences(sample, terms, rate):
    one = sample(
        "causal",
        dtype=torch.float64,
        kv_heads=2,
        n=4,
        m=5,
        d=2,
        terms=terms,
        dropout=rate,
        entries=3,
        first=-1,
    )

    def call(*tensors):
        other = one.with_inputs(dict(zip(one.inputs, tensors, strict=True)))
        return attend(other.q, other.k, other.v, other.options)

    assert torch.autograd.gradcheck(call, tuple(one.inputs.values()), fast_mode=True)


def test_on_a_device_no_mask_is_read():
    """A tensor of the meta device has no data: to read it raises."""
    q, k, v = (torch.randn(2, 4, 40, 8, device="meta") for _ in range(3))
    bounds = torch.zeros(2, 40, 2, dtype=torch.int32, device="meta")
    masks = (
        Band(right=0),
        Intervals(bounds, torch.zeros(2, 40, dtype=torch.int32, device="meta")),
        Boolean(torch.zeros(2, 1, 40, 40, dtype=torch.bool, device="meta")),
    )
    for mask in masks:
        options = Options(
            mask=mask,
            table=torch.zeros(4, 79, device="meta"),
            sinks=torch.zeros(4, device="meta"),
            relative_queries=Relative(torch.zeros(4, 9, 8, device="meta"), -4, q),
            relative_keys=Relative(torch.zeros(1, 9, 8, device="meta"), -4, k),
            relative_values=Relative(torch.zeros(1, 9, 8, device="meta"), -4),
            dropout=0.1,
            seed=torch.zeros(1, dtype=torch.int64, device="meta"),
        )
        out, lse = tiled.forward(q, k, v, options)
        needs = frozenset(("q", "k", "v", *options.terms))
        grads = tiled.backward(out, lse, q, k, v, out, lse, options, needs)
        assert grads["table"].shape == (4, 79)
        assert grads["key_embeddings"].shape == (1, 9, 8)


def test_a_mask_read_on_a_cpu_and_one_that_is_not_give_the_same(sample, mask_name, monkeypatch):
    one = sample(mask_name, terms=("table",))
    read = one.answer(attend)
    whole = tiled_masks.TileMask.rows

    def rows(self, i0, i1):
        self.readable = False
        return whole(self, i0, i1)

    monkeypatch.setattr(tiled_masks.TileMask, "rows", rows)
    unread = one.answer(attend)
    for name in read:
        assert torch.allclose(read[name], unread[name], atol=1e-5), name


@pytest.mark.parametrize("mask", ["causal", "causal window", "documents", "keys", "boolean"])
def test_tiles_that_a_mask_hides_are_skipped(sample, mask, monkeypatch):
    """Counts the scores that are computed: fewer than all of them."""
    counted = []
    scores = tiled_heads.Heads.scores

    def count(self, Q, rows, j0, j1):
        counted.append(Q.shape[0] * Q.shape[1] * (j1 - j0))
        return scores(self, Q, rows, j0, j1)

    monkeypatch.setattr(tiled_heads.Heads, "scores", count)
    one = sample(mask, n=96, m=96)
    attend(one.q, one.k, one.v, one.options)
    assert sum(counted) < 0.85 * 2 * 4 * 96 * 96


def test_dropout_keeps_the_share_that_it_should():
    kept = dropout.keep(torch.tensor([7]), 0.1, 2, 3, 256, 512)
    assert kept.float().mean().item() == pytest.approx(0.9, abs=2e-3)
    by_row, by_column = kept.float().mean(-1), kept.float().mean(-2)
    assert by_row.std().item() == pytest.approx((0.09 / 512) ** 0.5, rel=0.1)
    assert by_column.std().item() == pytest.approx((0.09 / 256) ** 0.5, rel=0.1)


def test_dropped_weights_are_not_correlated():
    kept = dropout.keep(torch.tensor([7]), 0.5, 2, 2, 256, 256).double() * 2 - 1
    shifted = {
        "keys": (kept[..., 1:] * kept[..., :-1]),
        "pairs": (kept[..., 0::2] * kept[..., 1::2]),
        "queries": (kept[..., 1:, :] * kept[..., :-1, :]),
        "diagonals": (kept[..., 1:, 1:] * kept[..., :-1, :-1]),
        "heads": kept[:, 1] * kept[:, 0],
        "batch": kept[1] * kept[0],
        "rectangles": kept[..., 1:, 2:]
        * kept[..., :-1, 2:]
        * kept[..., 1:, :-2]
        * kept[..., :-1, :-2],
        "seeds": kept * (dropout.keep(torch.tensor([8]), 0.5, 2, 2, 256, 256).double() * 2 - 1),
        "high bits of the seed": kept
        * (dropout.keep(torch.tensor([7 + 2**40]), 0.5, 2, 2, 256, 256).double() * 2 - 1),
    }
    for name, x in shifted.items():
        assert abs(x.mean().item()) < 5 / x.numel() ** 0.5, name


@pytest.mark.parametrize("size", [(5, 4, 20), (16, 12, 400), (64, 64, 40000)])
def test_dropout_does_not_depend_on_the_tiles(sample, check, size, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", tiled.TileSize(*size))
    check(sample("causal window", dropout=0.5), attend)


TABLE = "table=random(2, 2 * n - 1)"
VECTORS = (
    "relative_queries=Relative(random(2, 2 * n - 1, 16), 1 - n, random(1, 2, n, 16)), "
    "relative_keys=Relative(random(1, 65, 16), -32, random(1, 2, n, 16)), "
    "relative_values=Relative(random(2, 2 * n - 1, 16), 1 - n)"
)


@pytest.mark.parametrize("terms", [TABLE, VECTORS])
def test_memory_is_linear_in_the_length(terms):
    """Twice the length takes about twice the memory, and far less than one matrix of scores."""
    used = mebibytes(
        f"""
def call(n):
    q, k, v = (random(1, 2, n, 16) for _ in range(3))
    attention(q, k, v, {terms}, causal=True, engine="tiled").sum().backward()
call(512)
""",
        "call(4096)",
    )
    assert used < 2 * 4096 * 4096 * 4 / 2**20 / 4


def test_one_query_has_no_matrix_of_keys():
    """With few queries a tile has many keys, which vectors of keys must not make a square of."""
    used = mebibytes(
        """
def call(m):
    q, k, v = random(1, 2, 1, 16), random(1, 2, m, 16), random(1, 2, m, 16)
    keys = Relative(random(1, 65, 16), -32, random(1, 2, m, 16))
    attention(q, k, v, relative_keys=keys, engine="tiled").sum().backward()
call(32)
""",
        "call(4096)",
    )
    assert used < 2 * 4096 * 4096 * 4 / 2**20 / 4


def mebibytes(before, call):
    """By how much a call raises the peak of a process."""
    code = f"""
import resource, torch
from flashpatch_kernels import attention
from flashpatch_kernels.options import Relative
torch.set_num_threads(1)
def random(*shape):
    return torch.randn(*shape, requires_grad=True)
{before}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{call}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(answer.stdout)
