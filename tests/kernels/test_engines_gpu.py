"""The engines on a GPU: terms of scores, exactness, memory, and that nothing waits for it."""

from dataclasses import replace

import pytest
import torch

from flashpatch_kernels import attention
from flashpatch_kernels.engines import SDPA, Call, choose, why_not
from flashpatch_kernels.masks import Band, key_mask
from flashpatch_kernels.op import run
from flashpatch_kernels.options import Options, Score

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TERMS = ("softcap", "table", "bias", "sinks")
BY_DISTANCE = ("clamped table", "slopes", "relative_queries", "relative_keys", "relative_values")


@pytest.fixture(autouse=True)
def full_precision():
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [(), TERMS, BY_DISTANCE])
def test_tiled_is_as_exact_as_pytorch(sample, check, mask_name, terms, dtype):
    rate = 0.3 if terms else 0.0
    one = sample(mask_name, kv_heads=2, terms=terms, dropout=rate, dtype=dtype)
    check(one.on("cuda"), lambda *call: run(*call, "tiled"))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("size", [16, 64, 96, 128, 256])
@pytest.mark.parametrize(
    "call",
    [
        {"terms": ("softcap",)},
        {"terms": ("table",)},
        {"terms": ("clamped table",)},
        {"terms": ("slopes",)},
        {"terms": ("relative_queries",)},
        {"terms": ("relative_keys",)},
        {"terms": ("relative_values",)},
        {"terms": BY_DISTANCE, "dropout": 0.3, "embedding_heads": 1},
        {"terms": ("sinks",)},
        {"dropout": 0.3},
        {"terms": TERMS, "dropout": 0.3},
        *(
            {"terms": ("bias",), "bias_shape": shape}
            for shape in ((2, 4, 300), (1, 4, 300), (2, 1, 300), (1, 1, 300), (2, 4, 1), (1, 1, 1))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["full", "causal", "causal keys", "boolean per head"])
def test_triton_computes_every_term(sample, check, call, mask, size, dtype):
    one = sample(mask, kv_heads=2, dtype=dtype, n=300, m=333, d=size, **call)
    check(one.on("cuda"), lambda *call: run(*call, "triton"))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize("call", [{"terms": ("softcap",)}, {"terms": TERMS, "dropout": 0.3}])
@pytest.mark.parametrize("mask", ["full", "causal", "causal keys", "boolean per head"])
def test_triton_runs_a_function_with_a_derivative(
    sample, check, score_functions, call, mask, size, dtype
):
    def attend(q, k, v, options):
        cap = torch.tensor([options.softcap], device=q.device)
        score = Score(score_functions.cap, score_functions.cap_derivative, (cap,))
        return run(q, k, v, replace(options, softcap=None, score=score), "triton")

    one = sample(mask, kv_heads=2, dtype=dtype, n=300, m=333, d=size, **call)
    check(one.on("cuda"), attend)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_that_adds_is_a_bias(score_functions, compiled):
    q, k, v = (torch.randn(2, 4, n, 64, device="cuda", requires_grad=True) for n in (300, 333, 333))
    bias = torch.randn(2, 4, 300, 333, device="cuda")
    score = Score(
        score_functions.add_dense, arguments=(bias, torch.tensor([4, 300, 333], device="cuda"))
    )
    assert choose(Call.of(q, k, v, Options(score=score))).name == "triton"

    def loss(q, k, v, **added):
        return attention(q, k, v, causal=True, **added).square().sum()

    expected = torch.autograd.grad(loss(q, k, v, bias=bias, engine="tiled"), (q, k, v))
    torch._dynamo.reset()
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    found = torch.autograd.grad(call(q, k, v, score=score), (q, k, v))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-4, rtol=1e-4)


def test_functions_of_one_name_are_not_mixed_up(score_functions):
    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    _, plain = attention(q, k, v, return_lse=True)
    for function, added in ((score_functions.add_two, 2), (score_functions.add_three, 3)):
        _, lse = attention(q, k, v, score=Score(function), return_lse=True)
        torch.testing.assert_close(lse, plain + added, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_triton_computes_every_mask(sample, check, mask_name, kv_heads, dtype):
    one = sample(mask_name, kv_heads=kv_heads, dtype=dtype, n=300, m=333, d=64)
    check(one.on("cuda"), lambda *call: run(*call, "triton"))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("size", [8, 40, 200])
@pytest.mark.parametrize(("entries", "first"), [(1, 0), (65, -32), (700, -350)])
def test_triton_takes_vectors_by_distance_of_any_number_and_size(
    sample, check, entries, first, size, dtype
):
    sizes = {"n": 300, "m": 333, "d": 64, "dv": 96, "embedding_size": size}
    embeddings = {"terms": BY_DISTANCE[2:], "entries": entries, "first": first}
    one = sample("causal keys", kv_heads=2, dtype=dtype, **sizes, **embeddings)
    check(one.on("cuda"), lambda *call: run(*call, "triton"))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("terms", [TERMS, BY_DISTANCE])
def test_the_terms_gradients_have_the_same_bits_every_time(sample, terms, dtype):
    one = sample("causal", terms=terms, dropout=0.3, dtype=dtype, n=777, m=777, d=64).on("cuda")
    first = one.answer(lambda *call: run(*call, "triton"))
    for _ in range(10):
        again = one.answer(lambda *call: run(*call, "triton"))
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sdpa_is_as_exact_as_pytorch_where_it_applies(sample, check, mask_name, kv_heads, dtype):
    applied = 0
    for terms in ((), ("bias",)):
        one = sample(mask_name, kv_heads=kv_heads, terms=terms, dtype=dtype, n=48, m=48, d=16)
        one = one.on("cuda")
        if why_not(SDPA, Call.of(one.q, one.k, one.v, one.options)) is None:
            applied += 1
            check(one, lambda *call: (run(*call, "sdpa")[0], run(*call, "tiled")[1]))
    if mask_name in ("full", "causal", "keys", "boolean"):
        assert applied


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_sdpa_gives_zero_and_finite_gradients_to_rows_that_see_nothing(sample, dtype):
    for mask in ("boolean", "boolean per head"):
        one = sample(mask, dtype=dtype, n=48, m=48, d=16).on("cuda")
        out, _ = run(one.q, one.k, one.v, one.options, "sdpa")
        dead = run(one.q, one.k, one.v, one.options, "tiled")[1] == -torch.inf
        assert dead.any()
        assert not out[dead].any()
        grads = torch.autograd.grad(out.float().sum(), (one.q, one.k, one.v))
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][dead].any()


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("kind", ["full", "causal", "keys", "key bias", "dropout"])
def test_sdpa_takes_linear_memory_where_it_applies(dtype, kv_heads, kind):
    n = 8192
    q = torch.randn(1, 8, n, 64, device="cuda", dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(1, kv_heads, n, 64, device="cuda", dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    visible = torch.arange(n, device="cuda")[None] < n - 100
    arguments = {
        "full": {},
        "causal": {"causal": True},
        "keys": {"mask": visible},
        "key bias": {"bias": torch.zeros(1, 8, 1, n, device="cuda", dtype=dtype)},
        "dropout": {"dropout": 0.1},
    }[kind]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, engine="sdpa", **arguments).float().sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 8 * n * n  # a byte for each score


def test_tiled_takes_linear_memory():
    q, k, v = (torch.randn(1, 8, 16384, 64, device="cuda", requires_grad=True) for _ in range(3))
    table = torch.randn(8, 2 * 16384 - 1, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, table=table, engine="tiled").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * 16384 * 16384


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["tiled", "sdpa"])
def test_nothing_waits_for_the_gpu(sample, mask_name, name):
    one = sample(mask_name, n=48, m=48, d=16, dropout=0.2 if name == "tiled" else 0.0).on("cuda")
    if name == "sdpa" and why_not(SDPA, Call.of(one.q, one.k, one.v, one.options)) is not None:
        # No refusal of a call that it should serve hides here: that is asserted above, by
        # test_sdpa_is_as_exact_as_pytorch_where_it_applies.
        pytest.skip("not a call of this engine")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(one.q, one.k, one.v, one.options, name)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_choice_for_a_cuda_call():
    q, k, v = (torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options = Options(mask=Band(right=0))
    assert choose(Call.of(q, k, v, options)).name == "triton"
    assert choose(Call.of(q.float(), k.float(), v.float(), options)).name == "sdpa"
    padded = replace(options, mask=key_mask(torch.ones(1, 64, device="cuda").bool()))
    assert choose(Call.of(q, k, v, padded)).name == "triton"


@pytest.mark.parametrize("name", [None, "tiled", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_compiles_without_a_break(name, dtype):
    q, k, v = (
        torch.randn(2, 4, 64, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)
    )

    def loss(q, k, v):
        return attention(q, k, v, causal=True, engine=name).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for grad, plain in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected, strict=True
    ):
        assert torch.allclose(grad, plain, atol=1e-2)
