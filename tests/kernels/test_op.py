"""The public function: what it computes; what autograd, compile and checkpointing make of it."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from beartype import beartype
from small_calls import DV, B, D, H, M, N, tensors, terms, vectors
from torch.utils.checkpoint import checkpoint

import flashpatch_kernels
from flashpatch_kernels import attention, checks, op, reference, schema, tiled
from flashpatch_kernels.masks import Intervals, key_mask
from flashpatch_kernels.options import Options, Relative

# What is added to the scores.


@pytest.mark.parametrize("lengths", [(N, M), (5, 5), (1, 7)])
@pytest.mark.parametrize("with_table", [False, True])
def test_slopes_fall_with_the_distance_from_the_query(lengths, with_table):
    n, m = lengths
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], requires_grad=True)
    distance = (torch.arange(n)[:, None] + m - n - torch.arange(m)).abs()
    bias = -slopes[:, None, None] * distance
    more = {"table": terms(n, m)["table"]} if with_table else {}
    q, k, v = tensors(n, m, grad=True)
    out = attention(q, k, v, slopes=slopes, causal=True, **more)
    expected = attention(q, k, v, bias=bias[None], causal=True, engine="reference", **more)
    torch.testing.assert_close(out, expected)
    inputs = (q, k, v, slopes)
    dout = torch.randn_like(out)
    for found, true in zip(
        torch.autograd.grad(out, inputs, dout),
        torch.autograd.grad(expected, inputs, dout),
        strict=True,
    ):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("engine", [None, "tiled"])
def test_shaws_vectors_are_those_of_a_matrix_of_keys(engine):
    q, k, v = tensors(grad=True)
    embeddings = torch.randn(1, 2 * 2 + 1, D, requires_grad=True)
    values = torch.randn(1, 2 * 2 + 1, DV, requires_grad=True)
    at = (torch.arange(M) - torch.arange(N)[:, None]).clamp(-2, 2) + 2
    out = attention(
        q,
        k,
        v,
        relative_queries=Relative(embeddings, -2, q * D**-0.5),
        relative_values=Relative(values, -2),
        engine=engine,
    )
    keys = k.repeat_interleave(2, 1)[:, :, None] + embeddings[0, at]  # [B, H, N, M, D]
    weights = (torch.einsum("bhid,bhijd->bhij", q, keys) * D**-0.5).softmax(-1)
    expected = weights @ v.repeat_interleave(2, 1)
    expected = expected + torch.einsum("bhij,ijd->bhid", weights, values[0, at])
    torch.testing.assert_close(out, expected)
    inputs = (q, k, v, embeddings, values)
    dout = torch.randn_like(out)
    for found, true in zip(
        torch.autograd.grad(out, inputs, dout),
        torch.autograd.grad(expected, inputs, dout),
        strict=True,
    ):
        torch.testing.assert_close(found, true)


# The other arguments.


def test_the_default_scale_is_that_of_the_head_size():
    q, k, v = tensors()
    assert torch.equal(attention(q, k, v), attention(q, k, v, scale=D**-0.5))


@pytest.mark.parametrize("scale", [1.0, 0, -0.3, 3])
def test_any_finite_scale(scale):
    q, k, v = tensors()
    expected = reference.attention(q, k, v, Options(scale=scale))[0]
    for engine in ("tiled", "sdpa"):
        assert torch.allclose(attention(q, k, v, scale=scale, engine=engine), expected, atol=1e-5)


@pytest.mark.parametrize("engine", [None, "tiled", "reference"])
def test_the_lse_is_returned_on_demand(engine):
    q, k, v = tensors()
    out, lse = attention(q, k, v, causal=True, engine=engine, return_lse=True)
    assert torch.allclose(out, attention(q, k, v, causal=True, engine=engine), atol=1e-6)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * D**-0.5
    seen = torch.ones(N, M).tril(M - N).bool()
    expected = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    assert lse.dtype == torch.float32
    assert torch.allclose(lse, expected, atol=1e-6)


def test_dropout_is_drawn_from_torchs_generator():
    q, k, v = tensors(300, 300)
    call = partial(attention, q, k, v, dropout=0.5, engine="tiled")
    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    third = call()
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_the_engines_agree():
    q, k, v = tensors()
    results = [
        attention(q, k, v, causal=True, engine=engine)
        for engine in (None, "tiled", "sdpa", "reference")
    ]
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "batch", "heads"),
    [(0, 5, 2, 4), (5, 0, 2, 4), (0, 0, 2, 4), (5, 5, 0, 4), (5, 5, 2, 0)],
)
@pytest.mark.parametrize("engine", [None, "tiled", "sdpa", "reference"])
def test_empty_inputs_give_empty_outputs_or_zeros(n, m, batch, heads, engine):
    q = torch.randn(batch, heads, n, D, requires_grad=True)
    k, v = (torch.randn(batch, heads, m, D, requires_grad=True) for _ in range(2))
    out = attention(q, k, v, engine=engine)
    assert out.shape == (batch, heads, n, D)
    assert not out.any()
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0)])
def test_vectors_by_distance_of_empty_inputs_have_no_gradient(n, m):
    options = vectors(n, m, grad=True)
    out = attention(*tensors(n, m, grad=True), **options)
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), tuple(Options(**options).terms.values())):
        assert not grad.any()


def test_without_keys_the_lse_is_that_of_the_sink():
    q, k, v = tensors(3, 0)
    _, lse = attention(q, k, v, return_lse=True)
    assert bool((lse == -torch.inf).all())
    sinks = torch.randn(H)
    _, lse = attention(q, k, v, return_lse=True, sinks=sinks)
    assert torch.allclose(lse, sinks[:, None].expand(B, H, 3))


# What the rest of PyTorch makes of it.

q, k, _ = tensors()
CALLS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "keys": {"mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]] * B).bool(), "causal": True},
    "bool": {"mask": (torch.arange(N * M).view(1, 1, N, M) % 3 > 0)},
    "dropout": {"dropout": 0.4},
    "terms": {**terms(), "softcap": 3.0},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "vectors": {**vectors(), "causal": True},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_operators_keep_the_rules_of_torch(name):
    call = dict(CALLS[name])
    dropout = call.pop("dropout", 0.0)
    mask = {key: call.pop(key, None) for key in ("causal", "window", "mask")}
    options = Options(
        mask=checks.to_mask(q, k, **{**mask, "causal": bool(mask["causal"])}),
        dropout=dropout,
        seed=torch.tensor([5]) if dropout else None,
        **call,
    )
    inputs = tensors(grad=True)
    flat = schema.flat(options)
    torch.library.opcheck(torch.ops.flashpatch.forward.default, (*inputs, "tiled", *flat))
    with torch.no_grad():
        out, lse = torch.ops.flashpatch.forward.default(*inputs, "tiled", *flat)
    needs = ["q", "v", *options.terms]
    inputs = tuple(x.detach() for x in inputs)
    torch.library.opcheck(
        torch.ops.flashpatch.backward.default,
        (out, lse, *inputs, out, lse, "tiled", needs, *flat),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("engine", [None, "tiled"])
def test_it_compiles_without_a_break(name, engine):
    """In training, with the chosen engine as with one that is an operator."""
    if engine is None and name == "dropout":  # compared with the same seed on "tiled" beside it
        pytest.skip("compiled, PyTorch's own dropout draws other numbers")

    def loss(q, k, v):
        return attention(q, k, v, engine=engine, **CALLS[name]).square().sum()

    inputs = tensors(grad=True)
    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(function(*inputs), inputs))
    for plain, compiled in zip(*results, strict=True):
        assert torch.allclose(plain, compiled, atol=1e-6)


def test_it_compiles_once_for_every_length():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    call = torch.compile(
        partial(attention, causal=True, engine="tiled"),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for n in (12, 20, 33):
        inputs = tensors(n, n)
        expected = attention(*inputs, causal=True, engine="tiled")
        assert torch.allclose(call(*inputs), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_dropout(reentrant):
    inputs, options = tensors(grad=True), terms(grad=True) | vectors(grad=True)

    def call(q, k, v):
        return attention(q, k, v, causal=True, dropout=0.5, engine="tiled", **options)

    every = (*inputs, *Options(**options).terms.values())
    results = []
    for run in (call, partial(checkpoint, call, use_reentrant=reentrant)):
        torch.manual_seed(0)
        run(*inputs).square().sum().backward()
        results.append([x.grad for x in every])
        for x in every:
            x.grad = None
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("engine", [None, "tiled", "reference"])
def test_autocast_computes_in_its_dtype(engine):
    inputs, options = tensors(grad=True), terms(grad=True) | vectors(grad=True)
    low = tuple(x.detach().bfloat16() for x in inputs)
    expected = attention(*low, engine=engine, **options)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*inputs, engine=engine, **options)
        mixed = attention(low[0], *inputs[1:], engine=engine, **options)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)
    for x in (*inputs, *Options(**options).terms.values()):
        assert x.grad.dtype == torch.float32


def test_the_lse_alone_may_be_differentiated():
    inputs = tensors(grad=True)
    _, lse = attention(*inputs, return_lse=True, engine="tiled")
    grads = torch.autograd.grad(lse.sum(), inputs)
    expected = torch.autograd.grad(
        attention(*inputs, return_lse=True, engine="reference")[1].sum(),
        inputs,
        materialize_grads=True,
    )
    for grad, exact in zip(grads, expected, strict=True):
        assert torch.allclose(grad, exact, atol=1e-5)


def test_frozen_inputs_cost_no_gradient(monkeypatch):
    from flashpatch_kernels import tiled

    asked = []
    backward = tiled.backward

    def spy(*arguments):
        asked.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(tiled, "backward", spy)
    q, k, v = tensors()
    attention(q.requires_grad_(), k, v, engine="tiled").sum().backward()
    assert asked == [frozenset(("q",))]
    assert not attention(q.detach(), k, v, engine="tiled").requires_grad


def test_autograd_is_passed_by_where_nothing_needs_a_gradient(monkeypatch):
    q, k, v = tensors()
    expected = attention(q, k, v, bias=torch.zeros(1, H, 1, M), engine="tiled")
    applied = []
    monkeypatch.setattr(op._Attention, "apply", lambda *_: applied.append(1) or (expected, None))
    out = attention(q, k, v, bias=torch.zeros(1, H, 1, M), engine="tiled")
    assert not applied
    assert not out.requires_grad
    torch.testing.assert_close(out, expected)
    for learnt in (q, k, v):
        attention(*[x.clone().requires_grad_(x is learnt) for x in (q, k, v)], engine="tiled")
    attention(q, k, v, bias=torch.zeros(1, H, 1, M, requires_grad=True), engine="tiled")
    assert len(applied) == 4


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_derivatives_are_the_references_alone(mode):
    q, k, v = tensors()
    tangent, bias = torch.randn_like(k), torch.randn(1, 1, 1, M)

    def attend(k, engine, bias=None):
        return attention(q, k, v, bias=bias, engine=engine)

    said = "engine 'tiled' has no forward-mode derivative; engine='reference' has"
    with mode():
        with pytest.raises(NotImplementedError, match=said):
            torch.func.jvp(partial(attend, engine="tiled"), (k,), (tangent,))
        with pytest.raises(NotImplementedError, match=said):
            torch.func.jvp(partial(attend, k, "tiled"), (bias,), (bias,))
        out, slope = torch.func.jvp(partial(attend, engine="reference"), (k,), (tangent,))
        # What has no tangent itself is computed as ever, within a derivative too.
        one = torch.ones(())
        _, other = torch.func.jvp(lambda x: attend(k, "tiled") * x, (one,), (one,))
        torch.testing.assert_close(other, attend(k, "tiled"))
    step = 1e-3 * tangent
    expected = (attend(k + step, "reference") - attend(k - step, "reference")) / 2e-3
    torch.testing.assert_close(slope, expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(out, attend(k, "tiled"))


def test_no_seed_is_drawn_without_dropout():
    before = torch.random.get_rng_state()
    attention(*tensors(), engine="tiled")
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_shapes_that_it_is_annotated_with_are_true():
    checked = jaxtyping.jaxtyped(attention, typechecker=beartype)
    q, k, v = tensors()
    every = terms()
    assert checked(q, k, v, causal=True, **every).shape == (B, H, N, DV)
    assert checked(q, k, v, **vectors()).shape == (B, H, N, DV)
    assert checked(q, k, v, slopes=torch.ones(H)).shape == (B, H, N, DV)
    assert checked(q, k, v, mask=key_mask(torch.ones(B, M).bool()), window=(2, None)).shape
    assert len(checked(q, k, v, mask=torch.ones(B, M).bool(), return_lse=True)) == 2
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(q, k[..., :3], v)


def test_the_package_shows_what_it_says():
    visible = {name for name in vars(flashpatch_kernels) if not name.startswith("_")}
    modules = {name for name in visible if f"flashpatch_kernels.{name}" in sys.modules}
    assert sorted(visible - modules) == sorted(set(flashpatch_kernels.__all__) - modules)
    assert all(hasattr(flashpatch_kernels, name) for name in flashpatch_kernels.__all__)


def test_importing_it_imports_no_triton_and_touches_no_gpu():
    code = """
import sys, time, torch
torch_imports = "triton" in sys.modules
start = time.process_time()
import flashpatch_kernels
print(time.process_time() - start)
assert torch_imports or "triton" not in sys.modules
assert "flashpatch_kernels.triton" not in sys.modules
assert not torch.cuda.is_initialized()
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert float(answer.stdout) < 0.2


@pytest.mark.parametrize("needs_grad", [False, True])
def test_an_engine_gets_the_record_of_options_itself(monkeypatch, needs_grad):
    given = []

    def forward(*arguments):
        given.append(arguments[3])
        return tiled.forward(*arguments)

    monkeypatch.setattr(op, "_module", lambda _: SimpleNamespace(forward=forward))
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=needs_grad) for _ in range(3))
    options = Options(sinks=torch.randn(2))
    with torch.set_grad_enabled(needs_grad):
        op.run(q, k, v, options, "tiled")
    assert given[0] is options


@pytest.mark.parametrize(
    "more",
    [{}, {"sinks": torch.randn(H)}, {"mask": Intervals(torch.tensor([[[0, 5]]]).int())}],
    ids=["bare", "sinks", "intervals"],
)
def test_an_engine_gets_the_same_options_for_its_backward_pass(monkeypatch, more):
    """The record itself, but for tensors, which autograd saves."""
    given = []

    def backward(*arguments):
        given.append(arguments[7])
        return tiled.backward(*arguments)

    module = SimpleNamespace(forward=tiled.forward, backward=backward)
    monkeypatch.setattr(op, "_module", lambda _: module)
    options = Options(scale=0.5, **more)
    out, _ = op.run(*tensors(grad=True), options, "tiled")
    out.sum().backward()
    (found,) = given
    assert (found is options) == (not more)
    assert all(
        x is y or x == y for x, y in zip(schema.flat(found), schema.flat(options), strict=True)
    )
