"""The Triton kernels, in Triton's interpreter, against the equations.

The interpreter must be chosen before Triton is imported, so it runs in a process of its own.
"""

import itertools
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from flashpatch_kernels import dropout, reference, tuning
from flashpatch_kernels.masks import (
    Band,
    Boolean,
    Intervals,
    documents,
    intersect,
    key_mask,
)
from flashpatch_kernels.options import Options, Relative, Score

pytest.importorskip("triton", reason="Triton is not installed")

# Reads pairs (name of a function of the engine, arguments) and writes what the function returns.
WORKER = """
import pickle, sys, warnings
import score_functions
import torch
from flashpatch_kernels import triton as engine
class Unpickler(pickle.Unpickler):
    def persistent_load(self, name):
        return getattr(score_functions, name)
warnings.simplefilter("ignore")  # NumPy's, of rows without a key: log2(0) and 1 / 0.
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # Memory that nobody wrote is NaN.
answers, sys.stdout = sys.stdout.buffer, sys.stderr
while True:
    name, arguments = Unpickler(sys.stdin.buffer).load()
    pickle.dump(getattr(engine, name)(*arguments), answers)
    answers.flush()
"""


class Pickler(pickle.Pickler):
    """Says of a `triton.jit` function its name: each process has its own of that name."""

    def persistent_id(self, obj):
        return obj.fn.__name__ if hasattr(obj, "fn") else None


@dataclass
class Interpreter:
    """The engine, in a process where `triton.jit` gives Python functions."""

    process: subprocess.Popen

    def __call__(self, name, *arguments):
        Pickler(self.process.stdin).dump((name, arguments))
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


@pytest.fixture(scope="module")
def engine():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", WORKER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield Interpreter(process)
        process.stdin.close()
        process.terminate()


def views(shape, dtype, generator):
    """A (B, H, N, D) view of (B, N, H, D + 3) memory whose gaps are NaN."""
    b, h, n, d = shape
    whole = torch.full((b, n, h, d + 3), torch.nan, dtype=dtype)
    whole[..., :d] = torch.randn(b, n, h, d, generator=generator)
    return whole[..., :d].transpose(1, 2)


def padding(n):
    """Two rows of keys: one padded on the left, one on the right with holes."""
    visible = torch.ones(2, n, dtype=torch.bool)
    visible[0, : n // 3] = False
    visible[1, n - n // 4 :] = False
    visible[1, 5:9] = False
    return key_mask(visible)


def packed(n):
    """Three documents in a row, causal within each."""
    ids = (torch.arange(n) >= n // 2).int() + (torch.arange(n) >= n // 2 + 3).int()
    return intersect(documents(ids[None]), Band(right=0), n, n, "cpu")


def two_packings(n):
    """Rows with bounds of their own, some of them empty."""
    lo = torch.stack((torch.arange(n) // 2, torch.arange(n).flip(0) // 3))
    hi = torch.stack((torch.arange(n), torch.arange(n).flip(0)))
    return Intervals(torch.stack((lo, hi), dim=-1).int())


def boolean(n, m, heads=1, rows=None):
    """Any pairs, with tiles that are empty and tiles that are full, and a row that sees nothing."""
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, heads, n if rows is None else rows, m, generator=generator) > 0.6
    if rows is None:
        seen[:, :, : n // 2, m // 3 :] = False
        seen[:, :, n // 2 :, m // 2 :] = True
        seen[1, :, 1] = False
    return Boolean(seen)


MASKS = {
    "full": lambda n, m: Band(),
    "causal": lambda n, m: Band(right=0, offset=m - n),
    "window": lambda n, m: Band(left=9, right=0, offset=m - n),
    "band": lambda n, m: Band(left=20, right=7),
    "shifted": lambda n, m: Band(left=-2, right=30),
    "padding": lambda n, m: padding(m),
    "padding, causal": lambda n, m: intersect(padding(m), Band(right=0, offset=m - n), n, m, "cpu"),
    "documents": lambda n, m: packed(n),
    "two packings": lambda n, m: two_packings(n),
    "boolean": boolean,
    "boolean of one row": lambda n, m: boolean(n, m, rows=1),
}


def case(
    mask, *, heads=1, group=1, n=70, m=70, d=16, dv=16, dtype=torch.float32, scale=None, terms=()
):
    """Inputs of a call: q, k, v, dout, dlse, options; terms by name, or as functions like TERMS."""
    generator = torch.Generator().manual_seed(0)
    q = views((2, heads, n, d), dtype, generator)
    k = views((2, heads // group, m, d), dtype, generator)
    v = views((2, heads // group, m, dv), dtype, generator)
    dout = views((2, heads, n, dv), dtype, generator)
    dlse = torch.randn(2, heads, n, generator=generator)
    options = {"mask": MASKS[mask](n, m), "scale": d**-0.5 if scale is None else scale}
    for term in terms:
        options |= TERMS.get(term, term)(heads, n, m, generator)
    return q, k, v, dout, dlse, Options(**options)


def biased(shared=(), hidden=(), blind=(), lowest=-3.4e38):
    """A bias [B, H, N, M] of which the dimensions `shared` are one.

    `lowest` hides the keys `hidden` from all queries, and all keys from the queries `blind`.
    """

    def make(heads, n, m, generator):
        sizes = [1 if at in shared else size for at, size in enumerate((2, heads, n, m))]
        bias = torch.randn(sizes, generator=generator)
        bias[..., list(hidden)] = lowest
        bias[..., list(blind), :] = lowest
        return {"bias": bias}

    return make


def relative(*names, size=24, dv=16, entries=11, first=-4, one=False):
    """Vectors by distance, all kinds by default, with embeddings that `one` is of all heads."""
    names = names or ("relative_queries", "relative_keys", "relative_values")

    def make(heads, n, m, generator):
        found = {}
        for name in names:
            rows = {"relative_queries": n, "relative_keys": m, "relative_values": None}[name]
            shape = (1 if one else heads, entries, size if rows else dv)
            embeddings = torch.randn(shape, generator=generator) * 0.3
            vectors = torch.randn(2, rows, heads, size, generator=generator) if rows else None
            found[name] = Relative(embeddings, first, rows and vectors.transpose(1, 2))
        return found

    return make


TERMS = {
    "softcap": lambda heads, n, m, generator: {"softcap": 0.7},
    "table": lambda heads, n, m, generator: {
        "table": torch.randn(heads, n + m - 1, generator=generator)
    },
    "table of few distances": lambda heads, n, m, generator: {
        "table": torch.randn(heads, 21, generator=generator),
        "first": -7,
    },
    "table of one distance": lambda heads, n, m, generator: {
        "table": torch.randn(heads, 1, generator=generator),
        "first": 3,
    },
    "table beyond all distances": lambda heads, n, m, generator: {
        "table": torch.randn(heads, 9, generator=generator),
        "first": m + 40,
    },
    "slopes": lambda heads, n, m, generator: {"slopes": torch.rand(heads, generator=generator)},
    "bias": biased(),
    "bias of one row": biased(shared=(0,)),
    "bias of one head": biased(shared=(1,)),
    "bias of a pair": biased(shared=(0, 1)),
    "bias of keys": biased(shared=(2,)),
    "bias of keys alone": biased(shared=(0, 1, 2)),
    "bias that hides": biased(shared=(1, 2), hidden=(0, 3, 4)),
    "bias that hides all from some": biased(shared=(1,), hidden=(5,), blind=(2, 33), lowest=-1e10),
    "sinks": lambda heads, n, m, generator: {"sinks": torch.randn(heads, generator=generator)},
    "dropout": lambda heads, n, m, generator: {"dropout": 0.3, "seed": torch.tensor([2**61 + 11])},
}


def expected(q, k, v, dout, dlse, options):
    """Output, lse and gradients in float64."""
    inputs = {"q": q, "k": k, "v": v, **options.terms}
    inputs = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    options = options.with_terms({name: inputs[name] for name in options.terms})
    out, lse = reference.attention(inputs["q"], inputs["k"], inputs["v"], options)
    seen = lse.detach() > -torch.inf
    loss = (out * dout).sum() + (torch.where(seen, lse, 0) * dlse).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return out.detach(), lse.detach(), dict(zip(inputs, grads, strict=True))


def check(engine, q, k, v, dout, dlse, options, same=None):
    """Compares all that a call and its gradient give with the equations, of `same` options."""
    # The interpreter rounds towards zero, hence a whole unit in the last place and not a half.
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[q.dtype]
    out, lse = engine("forward", q, k, v, options)
    true_out, true_lse, true_grads = expected(q, k, v, dout, dlse, same or options)
    needs = frozenset(("q", "k", "v", *options.terms))
    true_grads = {name: grad for name, grad in true_grads.items() if name in needs}
    grads = engine("backward", dout, dlse, q, k, v, out, lse, options, needs)
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(lse == -torch.inf, true_lse == -torch.inf)
    seen = true_lse > -torch.inf
    copied = options.table is not None and options.first is None
    rounded = copied and q.dtype != torch.float32  # to half precision
    rounding = options.table.abs().max() * 2**-11 if rounded else 0
    assert (lse - true_lse)[seen].abs().max() < 1e-5 + rounding
    assert not out[~seen].any()
    assert set(grads) == needs
    for name, true in {"out": true_out, **true_grads}.items():
        found = {"out": out, **grads}[name]
        assert found.shape == true.shape, name
        assert (found.double() - true).norm() <= tolerance * true.norm(), name


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_gives_the_equations_output_and_gradients(engine, mask):
    check(engine, *case(mask))


@pytest.mark.parametrize("mask", ["full", "padding, causal"])
@pytest.mark.parametrize("term", TERMS)
def test_every_term_gives_the_equations_output_and_gradients(engine, term, mask):
    check(engine, *case(mask, heads=2, n=40, m=70, terms=[term]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamped_table_of_any_layout_that_hides_what_lies_beyond_its_ends(engine, dtype):
    *tensors, options = case("causal", heads=2, n=70, m=90, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(21, 2, generator=generator).to(dtype)
    table[0], table[-1] = -1e10, -3e38
    check(engine, *tensors, replace(options, table=table.T, first=-7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_terms_at_once(engine, dtype):
    terms = ["softcap", "table", "bias of one head", "sinks", "dropout"]
    check(engine, *case("window", heads=4, group=2, n=40, m=50, dtype=dtype, terms=terms))


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("name", ["relative_queries", "relative_keys", "relative_values"])
def test_vectors_by_distance(engine, name, one):
    check(engine, *case("full", heads=2, n=20, m=35, terms=[relative(name, one=one)]))


@pytest.mark.parametrize(
    "mask", ["window", "shifted", "padding, causal", "two packings", "boolean"]
)
def test_vectors_by_distance_under_masks(engine, mask):
    check(engine, *case(mask, n=20, m=20, terms=[relative()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vectors_by_distance_beside_all_other_terms(engine, dtype):
    terms = ["softcap", "table of few distances", "bias of one head", "slopes", "sinks", "dropout"]
    terms.append(relative())
    *tensors, options = case("causal", heads=2, group=2, n=18, m=20, dtype=dtype, terms=terms)
    vectors = {name: x.to(dtype) for name, x in options.terms.items() if "_" in name}
    check(engine, *tensors, options.with_terms(vectors))


@pytest.mark.parametrize("sizes", [(1, 40), (40, 1), (33, 17), (17, 33)])
def test_vectors_by_distance_of_lengths_that_divide_nothing(engine, sizes):
    check(engine, *case("causal", n=sizes[0], m=sizes[1], terms=[relative()]))


@pytest.mark.parametrize(("entries", "first"), [(1, 3), (9, 80), (9, -90), (90, -40), (20, -50)])
def test_vectors_by_distance_beyond_either_end(engine, entries, first):
    term = relative(entries=entries, first=first)
    check(engine, *case("full", n=20, m=35, terms=[term]))


@pytest.mark.parametrize("size", [1, 8, 64, 72, 200])
def test_vectors_by_distance_of_any_size(engine, size):
    check(engine, *case("causal", n=17, m=17, d=24, dv=40, terms=[relative(size=size, dv=40)]))


def test_one_gradient_of_vectors_by_distance_alone(engine):
    q, k, v, dout, dlse, options = case("full", n=9, m=9, terms=[relative()])
    out, lse = engine("forward", q, k, v, options)
    _, _, every = expected(q, k, v, dout, dlse, options)
    for name in options.terms:
        arguments = (dout, dlse, q, k, v, out, lse, options, frozenset({name}))
        grads = engine("backward", *arguments)
        assert set(grads) == {name}
        assert (grads[name] - every[name]).norm() <= 2e-6 * every[name].norm()


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("mask", ["causal", "padding, causal"])
def test_query_heads_share_key_heads(engine, mask, group):
    check(engine, *case(mask, heads=4, group=group, n=40, m=40))


@pytest.mark.parametrize("group", [1, 2, 4])
def test_heads_with_masks_of_their_own_share_key_heads(engine, group):
    q, k, v, dout, dlse, options = case("full", heads=4, group=group, n=70, m=90)
    options = replace(options, mask=boolean(70, 90, heads=4))
    check(engine, q, k, v, dout, dlse, options)


@pytest.mark.parametrize("term", ["table", "bias", "bias of keys alone"])
def test_terms_under_a_boolean_mask(engine, term):
    check(engine, *case("boolean", heads=2, terms=[term]))


@pytest.mark.parametrize("mask", ["full", "causal", "padding, causal", "boolean"])
@pytest.mark.parametrize("group", [1, 2])
def test_a_score_function_reads_where_it_is(engine, score_functions, mask, group):
    *tensors, options = case(mask, heads=2, group=group, n=40, m=50, terms=["bias"])
    arguments = (options.bias, torch.tensor([2, 40, 50]))
    score = Score(score_functions.add_dense, arguments=arguments)
    check(engine, *tensors, replace(options, bias=None, score=score), same=options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_score_function_with_a_derivative(engine, score_functions, dtype):
    *tensors, options = case("causal", heads=2, n=40, m=50, dtype=dtype, terms=["softcap"])
    functions = score_functions.cap, score_functions.cap_derivative
    score = Score(*functions, (torch.tensor([options.softcap]),))
    check(engine, *tensors, replace(options, softcap=None, score=score), same=options)


def test_a_score_function_hides_keys(engine, score_functions):
    *tensors, options = case("full", n=40, m=70)
    hidden = Score(score_functions.hide_far, arguments=(torch.tensor([9]),))
    same = replace(options, mask=Band(left=9, right=9))
    check(engine, *tensors, replace(options, score=hidden), same=same)


@pytest.mark.parametrize(
    ("distances", "m"), [("table", 50), ("table of few distances", 100), ("slopes", 50)]
)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_score_function_comes_after_the_cap_and_before_all_else(
    engine, score_functions, softcap, distances, m
):
    """Twice the cap of a score is twice the score under twice the cap."""
    terms = [distances, "bias of one head", "sinks", "dropout"]
    *tensors, options = case("full", heads=2, group=2, n=40, m=m, terms=terms)
    options = replace(options, softcap=softcap)
    same = replace(options, scale=2 * options.scale, softcap=softcap and 2 * softcap)
    functions = score_functions.multiply, score_functions.multiply_derivative
    score = Score(*functions, (torch.full((2,), 2.0),))
    check(engine, *tensors, replace(options, score=score), same=same)


def test_a_score_function_without_arguments(engine, score_functions):
    """Adding the same to every score changes nothing but the lse."""
    q, k, v, _, _, options = case("causal", n=33, m=33)
    out, lse = engine("forward", q, k, v, options)
    more = replace(options, score=Score(score_functions.add_one))
    found, found_lse = engine("forward", q, k, v, more)
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(found_lse, lse + 1)


def test_dropout_does_not_depend_on_the_tiles(engine):
    """The mask, read off the output and off dv: v and dout are the identity, all weights equal."""
    n, seed = 48, torch.tensor([2**61 + 11])
    options = Options(dropout=0.4, seed=seed)
    identity = torch.eye(n).expand(2, 2, n, n)
    kept = dropout.keep(seed, 0.4, 2, 2, n, n)
    seen = set()
    for dtype, d in itertools.product((torch.float32, torch.float16), (16, 128, 256)):
        asked = tuning.Question("any", dtype, max(d, n))
        seen |= {tuning.tile(asked, name)[:2] for name in ("forward", "dv")}
        q = torch.zeros(2, 2, n, d, dtype=dtype)
        call = (q, q, identity.to(dtype))
        out, lse = engine("forward", *call, options)
        grads = engine("backward", call[2], None, *call, out, lse, options, frozenset({"v"}))
        assert torch.equal(out > 0, kept)
        assert torch.equal(grads["v"].mT > 0, kept)
    assert len(seen) > 3


def test_dropout_has_the_gradients_of_an_explicit_mask(engine):
    q, k, v, dout, _, options = case("causal", heads=2, n=40, m=40, terms=["dropout"])
    out, lse = engine("forward", q, k, v, options)
    grads = engine("backward", dout, None, q, k, v, out, lse, options, frozenset({"q", "k", "v"}))

    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    scores = (q @ k.mT * options.scale).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    kept = dropout.keep(options.seed, options.dropout, 2, 2, 40, 40)
    weights = scores.softmax(-1) * kept / dropout.keep_probability(options.dropout)
    explicit = weights @ v
    torch.testing.assert_close(out, explicit.float())
    expected = torch.autograd.grad(explicit, (q, k, v), dout.double())
    for name, true in zip("qkv", expected, strict=True):
        torch.testing.assert_close(grads[name], true.float())


@pytest.mark.parametrize("sizes", [(1, 40), (40, 1), (33, 65), (65, 33)])
def test_lengths_that_divide_nothing(engine, sizes):
    check(engine, *case("causal", n=sizes[0], m=sizes[1]))


@pytest.mark.parametrize("d", [8, 20, 24, 40, 48, 72, 96, 320, 512])
def test_head_sizes_are_covered_by_two_chunks(engine, d):
    check(engine, *case("causal", n=33, m=33, d=d, dv=d))


BESIDE = ("", "bias", "ends", "dropout", "boolean", "score", "relative")


def test_every_head_size_has_a_tile_for_every_pass():
    passes = get_args(tuning.Pass)
    for arch, dtype, aligned, beside in itertools.product(
        ("sm90", "any"), (torch.bfloat16, torch.float32), (True, False), BESIDE
    ):
        for size in range(1, 513):
            asked = tuning.Question(arch, dtype, size, aligned, beside)
            for name in passes:
                if name != "dkdv" or tuning.has_tile(asked, name):
                    assert tuning.tile(asked, name)


def test_values_may_have_another_head_size(engine):
    check(engine, *case("full", n=33, m=40, d=48, dv=16))


@pytest.mark.parametrize("scale", [1.0, -0.4, 0.0])
def test_the_scale_may_be_anything(engine, scale):
    check(engine, *case("causal", n=33, m=33, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(engine, dtype):
    check(engine, *case("padding, causal", dtype=dtype, n=40, m=40))


def test_a_last_dimension_with_a_stride(engine):
    q, k, v, dout, dlse, options = case("causal", n=33, m=33)
    q, k, v, dout = (t.mT.contiguous().mT for t in (q, k, v, dout))
    check(engine, q, k, v, dout, dlse, options)


def test_expanded_keys_and_a_gradient_of_ones(engine):
    q, k, v, dout, dlse, options = case("causal", n=33, m=33)
    k, v = (t[:1, :1].expand(t.shape) for t in (k, v))
    check(engine, q, k, v, torch.ones(()).expand(dout.shape), dlse, options)


def test_only_the_gradients_that_are_asked_for(engine):
    q, k, v, dout, _, options = case("full", n=20, m=20)
    out, lse = engine("forward", q, k, v, options)
    for needs in ("q", "k", "v"):
        grads = engine("backward", dout, None, q, k, v, out, lse, options, frozenset(needs))
        assert set(grads) == {needs}


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_empty_sequences(engine, sizes):
    q, k, v, dout, dlse, options = case("full", n=sizes[0], m=sizes[1])
    out, lse = engine("forward", q, k, v, options)
    assert out.shape == dout.shape
    assert not out.any()
    assert (lse == -torch.inf).all()
    needs = frozenset({"q", "k", "v"})
    grads = engine("backward", dout, dlse, q, k, v, out, lse, options, needs)
    assert [g.shape for g in grads.values()] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in grads.values())


# What `tile_lists.key_tiles` says of random bounds, against the mask itself.
KEY_TILES = """
import torch
from flashpatch_kernels.masks import Intervals, allowed
from flashpatch_kernels.triton import setups, tile_lists
from flashpatch_kernels.triton.plans import Steps
from flashpatch_kernels.tuning import Tile
BM, BN, ROWS = 48, 32, 16
for seed in range(12):
    torch.manual_seed(seed)
    n, m = torch.randint(1, 200, (2,)).tolist()
    bounds = torch.randint(-3, m + 4, (2, n, 2)).sort(-1).values.int()
    if seed % 3:
        bounds[:, torch.rand(n) < 0.9] = torch.tensor([0, m], dtype=torch.int32)
    j = torch.arange(m)
    runs = (torch.rand(2, m) < 0.9).int()
    runs = runs * (m - j).int() if seed % 2 else None
    if runs is not None:  # one beyond the run that a key belongs to
        ends = torch.where(runs > 0, m, j).flip(1).cummin(1).values.flip(1)
        runs = torch.where(runs > 0, ends, 0).int()
    mask = Intervals(bounds, runs)
    seen = allowed(mask, n, m, "cpu")[:, 0]
    code = setups.mask_code(mask)
    found = tile_lists.key_tiles(Steps(kept=False), code, Tile(BM, BN, 4, 1), ROWS, n, m)[:, 0]
    assert found.shape == (2, -(-n // BM), 4)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(found.shape[1])).tolist():
        rows = seen[b, t * BM : (t + 1) * BM]
        t0, t1, t2, t3 = found[b, t].tolist()
        assert 0 <= t0 <= t1 <= t2 <= t3, found[b, t]
        assert not rows[:, : t0 * BN].any() and not rows[:, t3 * BN :].any(), (seed, b, t)
        assert rows[:, t1 * BN : t2 * BN].all(), (seed, b, t)
        assert t2 * BN <= m or t1 == t2, (seed, b, t)
print("all")
"""


def test_key_tiles_of_intervals_hold_all_that_is_seen():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", "-c", KEY_TILES]
    found = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert found.stdout == "all\n", found.stderr
