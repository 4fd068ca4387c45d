"""Which engine takes a call, and that the reason of each that does not is told."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flashpatch_kernels import engines, op
from flashpatch_kernels.engines import (
    COMMON,
    ENGINES,
    HOPPER,
    SDPA,
    TILED,
    TRITON,
    Call,
    choose,
    why_not,
)
from flashpatch_kernels.masks import Band, Boolean, Intervals, key_mask
from flashpatch_kernels.options import Options

CPU = Call(device="cpu", n_queries=2048, n_keys=2048)
CUDA = Call(device="cuda", capability=(9, 0), dtype=torch.bfloat16)
CAUSAL = {"band": Band(right=0), "one_row": False}
INTERVALS = {"mask": Intervals, "band": None, "one_row": False}
BOOLEAN = {"mask": Boolean, "band": None, "one_row": False}

# One call per requirement that the engine does not take, and for no other reason.
UNMET = {
    "MIXED": (TILED, CPU._replace(mixed=True)),
    "DTYPE": (TILED, CPU._replace(dtype=torch.float8_e5m2)),
    "HEADS": (TILED, CPU._replace(heads=3, kv_heads=2)),
    "HOPPER_GLUON": (HOPPER, CUDA),
    "HOPPER_DEVICE": (HOPPER, CUDA._replace(capability=(10, 0))),
    "HOPPER_DTYPE": (HOPPER, CUDA._replace(dtype=torch.float32)),
    "HOPPER_HEAD_SIZE": (HOPPER, CUDA._replace(head_size=264)),
    "HOPPER_ALIGNMENT": (HOPPER, CUDA._replace(aligned=False)),
    "HOPPER_MASK": (HOPPER, CUDA._replace(**BOOLEAN)),
    "HOPPER_BIAS": (HOPPER, CUDA._replace(bias=True)),
    "HOPPER_SLOPES": (HOPPER, CUDA._replace(slopes=True, n_keys=(1 << 23) + 1)),
    "HOPPER_SCORE": (HOPPER, CUDA._replace(score=True)),
    "HOPPER_DROPOUT": (HOPPER, CUDA._replace(dropout=0.1)),
    "TRITON_MISSING": (TRITON, CUDA),
    "TRITON_DEVICE": (TRITON, CPU),
    "TRITON_DTYPE": (TRITON, CUDA._replace(dtype=torch.float64)),
    "TRITON_BFLOAT16": (TRITON, CUDA._replace(capability=(7, 5))),
    "TRITON_HEAD_SIZE": (TRITON, CUDA._replace(head_size=513)),
    "TRITON_SLOPES": (TRITON, CUDA._replace(slopes=True, n_queries=(1 << 23) + 1)),
    "TILED_SCORE": (TILED, CPU._replace(score=True)),
    "SDPA_LSE": (SDPA, CPU._replace(lse=True)),
    "SDPA_SOFTCAP": (SDPA, CPU._replace(softcap=True)),
    "SDPA_RELATIVE": (SDPA, CPU._replace(relative=True)),
    "SDPA_SCORE": (SDPA, CPU._replace(score=True)),
    "SDPA_SINKS": (SDPA, CPU._replace(sinks=True)),
    "SDPA_DTYPE": (SDPA, CUDA._replace(dtype=torch.float64)),
    "SDPA_HEAD_SIZE": (SDPA, CPU._replace(value_size=32)),
    "SDPA_TABLE": (SDPA, CPU._replace(slopes=True)),
    "SDPA_MASK": (SDPA, CPU._replace(**INTERVALS)),
    "SDPA_BIAS": (SDPA, CPU._replace(bias=True, bias_grad=True)),
    "SDPA_DROPOUT": (SDPA, CPU._replace(dropout=0.1)),
}


@pytest.fixture(autouse=True)
def triton_installed(monkeypatch):
    monkeypatch.setattr(engines, "TRITON_INSTALLED", True)
    monkeypatch.setattr(engines, "GLUON_INSTALLED", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("name", UNMET)
def test_the_first_requirement_that_is_not_met_is_the_reason(name, monkeypatch):
    engine, call = UNMET[name]
    if name == "TRITON_MISSING":
        monkeypatch.setattr(engines, "TRITON_INSTALLED", False)
    if name == "HOPPER_GLUON":
        monkeypatch.setattr(engines, "GLUON_INSTALLED", False)
    assert why_not(engine, call).name == name


def test_every_reason_has_one_row_and_one_call_above():
    rows = [*COMMON, *(row for engine in ENGINES for row in engine.requirements)]
    names = [reason.name for reason, _ in rows]
    assert sorted(names) == sorted(UNMET)
    texts = [reason.text for reason, _ in rows]
    assert len(set(texts)) == len(texts)


def test_preferences_have_reasons_of_their_own():
    rows = [row for engine in ENGINES for row in engine.preferences]
    names = [reason.name for reason, _ in rows]
    assert len(set(names)) == len(names)
    assert not set(names) & set(UNMET)


def test_a_reason_prints_as_its_sentence():
    assert str(why_not(SDPA, CPU._replace(softcap=True))) == "PyTorch's attention has no softcap"


@pytest.mark.parametrize(
    ("call", "engine"),
    [
        (CUDA, "hopper"),
        (CUDA._replace(dtype=torch.float16), "hopper"),
        (CUDA._replace(**CAUSAL), "hopper"),
        (CUDA._replace(**INTERVALS), "hopper"),
        (CUDA._replace(lse=True), "hopper"),
        (CUDA._replace(heads=8, kv_heads=2), "hopper"),
        (CUDA._replace(needs_grad=True), "hopper"),
        (CUDA._replace(softcap=True), "hopper"),
        (CUDA._replace(sinks=True, **INTERVALS), "hopper"),
        (CUDA._replace(slopes=True), "hopper"),
        (CUDA._replace(slopes=True, n_keys=1 << 23), "hopper"),
        (CUDA._replace(slopes=True, n_keys=(1 << 23) + 1), "tiled"),
        (CUDA._replace(slopes=True, n_queries=1), "sdpa"),
        (CUDA._replace(head_size=128, value_size=128), "hopper"),
        (CUDA._replace(head_size=256, value_size=256), "hopper"),
        (CUDA._replace(n_queries=257), "hopper"),
        (CUDA._replace(n_queries=256), "triton"),
        (CUDA._replace(aligned=False), "triton"),
        (CUDA._replace(head_size=96, value_size=96), "hopper"),
        (CUDA._replace(head_size=192, value_size=128), "hopper"),
        (CUDA._replace(head_size=128), "hopper"),
        (CUDA._replace(value_size=128), "triton"),
        (CUDA._replace(head_size=32, value_size=32), "triton"),
        (CUDA._replace(capability=(8, 0)), "triton"),
        (CUDA._replace(capability=(8, 0), **INTERVALS), "triton"),
        (CUDA._replace(capability=(8, 0), softcap=True), "triton"),
        (CUDA._replace(capability=(10, 0)), "triton"),
        (CUDA._replace(dtype=torch.float32), "sdpa"),
        (CUDA._replace(dtype=torch.float32, **CAUSAL), "sdpa"),
        (CUDA._replace(dtype=torch.float32, **INTERVALS), "triton"),
        (CUDA._replace(dtype=torch.float32, lse=True), "triton"),
        (CUDA._replace(score=True, dtype=torch.float32), "triton"),
        (CUDA._replace(dtype=torch.float64), "tiled"),
        (CUDA._replace(**BOOLEAN), "triton"),
        (CUDA._replace(head_size=512, value_size=512), "triton"),
        (CUDA._replace(head_size=520, value_size=520), "sdpa"),
        (CUDA._replace(dropout=0.1), "sdpa"),
        (CUDA._replace(dropout=0.1, **INTERVALS), "triton"),
        (CUDA._replace(bias=True), "triton"),
        (CUDA._replace(bias=True, bias_grad=True), "triton"),
        (CUDA._replace(bias=True, bias_one_row=True), "hopper"),
        (CUDA._replace(table=True), "hopper"),
        (CUDA._replace(table=True, table_grad=True, n_queries=1536), "triton"),
        (CUDA._replace(table=True, table_grad=True, n_queries=1537), "hopper"),
        (CUDA._replace(n_queries=1), "sdpa"),
        (CUDA._replace(n_queries=1, sinks=True), "triton"),
        (CUDA._replace(table=True, n_queries=1), "sdpa"),
        (CUDA._replace(relative=True), "triton"),
        (CUDA._replace(score=True), "triton"),
        (CPU, "sdpa"),
        (CPU._replace(dtype=torch.float64), "sdpa"),
        (CPU._replace(**CAUSAL), "sdpa"),
        (CPU._replace(**CAUSAL, n_keys=4096), "tiled"),
        (CPU._replace(band=Band(left=99, right=0), one_row=False), "tiled"),
        (CPU._replace(**INTERVALS), "tiled"),
        (CPU._replace(mask=Intervals, band=None), "sdpa"),
        (CPU._replace(**INTERVALS, n_queries=512, n_keys=512), "sdpa"),
        (CPU._replace(**BOOLEAN), "sdpa"),
        (CPU._replace(table=True), "tiled"),
        (CPU._replace(slopes=True), "tiled"),
        (CPU._replace(slopes=True, n_queries=1), "sdpa"),
        (CPU._replace(table=True, n_queries=200, n_keys=200), "sdpa"),
        (CPU._replace(table=True, n_queries=512, n_keys=512), "tiled"),
        (CPU._replace(table=True, n_queries=1), "sdpa"),
        (CPU._replace(bias=True), "sdpa"),
        (CPU._replace(bias=True, **CAUSAL), "tiled"),
        (CPU._replace(bias=True, bias_one_row=True, mask=Intervals, band=None), "sdpa"),
        (CPU._replace(dropout=0.1), "tiled"),
        (CPU._replace(n_queries=1, band=Band(left=99, right=0, offset=2047)), "sdpa"),
        (CPU._replace(value_size=32), "tiled"),
    ],
)
def test_the_engine_of_choice(call, engine):
    assert choose(call).name == engine


def test_without_triton_a_cuda_call_runs_all_the_same(monkeypatch):
    monkeypatch.setattr(engines, "GLUON_INSTALLED", False)
    assert choose(CUDA).name == "triton"
    monkeypatch.setattr(engines, "TRITON_INSTALLED", False)
    assert choose(CUDA).name == "sdpa"
    assert choose(CUDA._replace(**INTERVALS)).name == "tiled"


def test_the_interpreter_serves_only_who_asks_for_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not(TRITON, CPU) is None
    assert choose(CPU).name == "sdpa"
    assert choose(CPU._replace(**INTERVALS)).name == "tiled"


def test_no_engine_at_all_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match="multiple of the key heads"):
        choose(CPU._replace(heads=3, kv_heads=2))
    with pytest.raises(ValueError, match="a Triton function on scores runs on the Triton engine"):
        choose(CPU._replace(score=True))


def test_a_call_is_described_by_its_metadata():
    q = torch.randn(2, 8, 5, 16, requires_grad=True)
    k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 12)
    options = Options(
        mask=key_mask(torch.ones(2, 7, dtype=torch.bool)),
        softcap=3.0,
        bias=torch.zeros(1, 8, 1, 7),
        dropout=0.1,
    )
    assert Call.of(q, k, v, options, lse=True) == Call(
        device="cpu",
        dtype=torch.float32,
        batch=2,
        heads=8,
        kv_heads=4,
        n_queries=5,
        n_keys=7,
        head_size=16,
        value_size=12,
        mask=Intervals,
        band=None,
        softcap=True,
        bias=True,
        bias_one_row=True,
        dropout=0.1,
        needs_grad=True,
        lse=True,
    )
    with torch.no_grad():
        assert not Call.of(q, k, v, options).needs_grad
    assert Call.of(q, k.double(), v, options).mixed


def test_rows_are_aligned_if_they_lie_multiples_of_16_bytes_apart():
    x = torch.randn(2, 300, 4, 80, dtype=torch.bfloat16)
    rows = x[..., :64].transpose(1, 2)

    def aligned(q, k, v):
        return Call.of(q, k, v, Options()).aligned

    assert aligned(rows, rows, rows)
    assert aligned(rows, x[..., 8:72].transpose(1, 2), rows)
    assert aligned(rows, rows[:1, :1].expand(rows.shape), rows)
    for other in (
        x[..., :68].contiguous()[..., :64].transpose(1, 2),
        rows.mT.contiguous().mT,
        x[..., :80:2].transpose(1, 2),
    ):
        assert not aligned(other, rows, rows)
        assert not aligned(rows, other, rows)
        assert not aligned(rows, rows, other)
    floats = torch.randn(2, 4, 300, 68)[..., :64]
    assert aligned(floats, floats, floats)


@pytest.mark.parametrize("error", [ImportError, ModuleNotFoundError, AttributeError])
def test_where_gluon_has_changed_the_portable_kernels_run(error, monkeypatch):
    portable = SimpleNamespace()

    def import_module(name):
        if name == "flashpatch_kernels.triton":
            return portable
        raise error(name)

    monkeypatch.setattr(op, "import_module", import_module)
    monkeypatch.setattr(op, "_module", op._module.__wrapped__)
    assert op._module("hopper") is portable
    with pytest.raises(error, match="tiled"):
        op._module("tiled")


@pytest.mark.filterwarnings("ignore:Triton .* does not compile:UserWarning")
def test_where_gluon_does_not_compile_the_portable_kernels_run(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.compiler.errors import CompilationError

    from flashpatch_kernels import hopper

    tried = []

    def broken(*arguments):
        tried.append(arguments)
        raise CompilationError("tma.load()", None, "no attribute of that name")

    monkeypatch.setattr(hopper, "_ERRORS", [])
    monkeypatch.setattr(hopper.forward_pass, "forward", broken)
    monkeypatch.setattr(hopper.portable, "forward", lambda *arguments: arguments)
    monkeypatch.setattr(hopper.portable, "backward", lambda *arguments: arguments)
    with pytest.warns(UserWarning, match="portable ones run instead: no attribute of that name"):
        assert hopper.forward(1, 2) == (1, 2)
    assert hopper.forward(3) == (3,)
    assert hopper.backward(4) == (4,)
    assert tried == [(1, 2)]


def test_without_gradients_a_learned_bias_is_fused_too(sample, monkeypatch):
    monkeypatch.setattr(engines, "SMALL_BIAS", 0)
    one = sample("full", terms=("bias",))
    assert why_not(SDPA, Call.of(one.q, one.k, one.v, one.options)).name == "SDPA_BIAS"
    with torch.no_grad():
        assert why_not(SDPA, Call.of(one.q, one.k, one.v, one.options)) is None
        assert fused(one)


def test_the_dtype_of_a_call_is_that_of_autocast():
    x = torch.randn(1, 1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        call = Call.of(x, x.bfloat16(), x, Options())
        assert Call.of(*[x.double()] * 3, Options()).dtype == torch.float64
    assert call.dtype == torch.bfloat16
    assert not call.mixed


def fused(one):
    """Whether PyTorch chooses a fused kernel for the call that the engine makes of a sample."""
    seen = []

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        choice = torch._fused_sdp_choice(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        seen.append(choice != torch.nn.attention.SDPBackend.MATH.value)
        return scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashpatch_kernels.sdpa.scaled_dot_product_attention", spy)
        op.run(one.q, one.k, one.v, one.options, "sdpa")
    return seen == [True]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("terms", [(), ("bias",)])
def test_a_long_call_on_a_cpu_is_fused_wherever_sdpa_takes_it(
    sample, mask_name, terms, kv_heads, monkeypatch
):
    monkeypatch.setattr(engines, "SMALL_MASK", 0)
    monkeypatch.setattr(engines, "SMALL_BIAS", 0)
    for n, m in ((37, 45), (45, 45), (1, 45)):
        one = sample(mask_name, n=n, m=m, terms=terms, kv_heads=kv_heads)
        if terms:
            one.options.bias.requires_grad_(False)
        if why_not(SDPA, Call.of(one.q, one.k, one.v, one.options)) is None:
            assert fused(one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("terms", [(), ("table", "bias")])
def test_sdpa_is_as_exact_as_pytorch(sample, check, mask_name, terms, dtype):
    def attend(q, k, v, options):
        call = Call.of(q, k, v, options)
        assert why_not(SDPA, call) is None
        assert choose(call) is SDPA
        out, lse = op.run(q, k, v, options, "sdpa")
        assert lse is None
        # The rule also wants an lse.
        return out, op.run(q, k, v, options, "tiled")[1]

    check(sample(mask_name, kv_heads=2, terms=terms, dtype=dtype), attend)


@pytest.mark.parametrize("terms", [(), ("table", "bias")])
def test_sdpa_slices_the_keys_of_a_single_query(sample, check, terms):
    def attend(q, k, v, options):
        return op.run(q, k, v, options, "sdpa")[0], op.run(q, k, v, options, "tiled")[1]

    for mask in ("full", "causal", "causal window", "window", "future only", "keys", "boolean"):
        check(sample(mask, n=1, kv_heads=2, terms=terms), attend)


def test_sdpa_takes_any_strides(sample, check):
    one = sample("causal")
    for name in "qkv":
        x = getattr(one, name).detach().transpose(2, 3).contiguous().transpose(2, 3)
        object.__setattr__(one, name, x.requires_grad_())
    check(one, lambda *call: (op.run(*call, "sdpa")[0], op.run(*call, "tiled")[1]))


def test_sdpa_gives_zero_and_finite_gradients_to_rows_that_see_nothing(sample):
    for mask in ("boolean", "boolean per head", "intervals", "causal keys"):
        one = sample(mask)
        out, _ = op.run(one.q, one.k, one.v, one.options, "sdpa")
        _, lse = op.run(one.q, one.k, one.v, one.options, "tiled")
        dead = lse == -torch.inf
        assert dead.any()
        assert not out[dead].any()
        grads = torch.autograd.grad(out.sum(), (one.q, one.k, one.v))
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][dead].any()


def test_sdpa_drops_weights_by_torchs_generator(sample):
    one = sample("causal", dropout=0.5)
    torch.manual_seed(0)
    first, _ = op.run(one.q, one.k, one.v, one.options, "sdpa")
    second, _ = op.run(one.q, one.k, one.v, one.options, "sdpa")
    torch.manual_seed(0)
    third, _ = op.run(one.q, one.k, one.v, one.options, "sdpa")
    assert not torch.equal(first, second)
    assert torch.equal(first, third)
