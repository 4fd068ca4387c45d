"""The Triton kernels on a GPU, against the equations in float64."""

import pytest
import torch

from flashpatch_kernels import reference
from flashpatch_kernels.masks import (
    Band,
    Intervals,
    allowed,
    documents,
    intersect,
    key_mask,
)
from flashpatch_kernels.op import run
from flashpatch_kernels.options import Options

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
NAMES = ["out", "lse", "dq", "dk", "dv"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def full_precision():
    """Products of float32 in float32, in PyTorch as in the kernels."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def padding(n):
    """Two rows of keys: one padded on the left, one on the right with holes."""
    visible = torch.ones(2, n, dtype=torch.bool, device=DEVICE)
    visible[0, : n // 3] = False
    visible[1, n - n // 4 :] = False
    visible[1, 5:9] = False
    return key_mask(visible)


def packed(n):
    """Three documents in a row, causal within each."""
    ids = (torch.arange(n, device=DEVICE) >= n // 2).int()
    ids = ids + (torch.arange(n, device=DEVICE) >= n // 2 + 3).int()
    return intersect(documents(ids[None]), Band(right=0), n, n, DEVICE)


def two_packings(n):
    """Rows with bounds of their own, some of them empty."""
    up = torch.arange(n, device=DEVICE)
    lo = torch.stack((up // 2, up.flip(0) // 3))
    hi = torch.stack((up, up.flip(0)))
    return Intervals(torch.stack((lo, hi), dim=-1).int())


MASKS = {
    "full": lambda n, m: Band(),
    "causal": lambda n, m: Band(right=0, offset=m - n),
    "window": lambda n, m: Band(left=99, right=0, offset=m - n),
    "band": lambda n, m: Band(left=120, right=57),
    "padding": lambda n, m: padding(m),
    "padding, causal": lambda n, m: intersect(
        padding(m), Band(right=0, offset=m - n), n, m, DEVICE
    ),
    "documents": lambda n, m: packed(n),
    "two packings": lambda n, m: two_packings(n),
}
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}


def view(b, h, n, d, dtype):
    """A (B, H, N, D) view of (B, N, H, D + 8) memory whose gaps, and what follows, are NaN."""
    whole = torch.full((b, n + 3, h, d + 8), torch.nan, dtype=dtype, device=DEVICE)
    whole[:, :n, :, :d] = torch.randn(b, n, h, d, device=DEVICE)
    return whole[:, :n, :, :d].transpose(1, 2)


def case(mask, *, heads="GQA", n=300, m=300, d=64, dv=None, dtype=torch.bfloat16, scale=None):
    """Inputs of a call: q, k, v, dout, dlse, options."""
    torch.manual_seed(0)
    h, h_kv = HEADS[heads]
    q, dout = view(2, h, n, d, dtype), view(2, h, n, dv or d, dtype)
    k, v = view(2, h_kv, m, d, dtype), view(2, h_kv, m, dv or d, dtype)
    dlse = torch.randn(2, h, n, device=DEVICE)
    return q, k, v, dout, dlse, Options(MASKS[mask](n, m), scale=scale or d**-0.5)


def with_gradients(attend, q, k, v, dout, dlse, options):
    """Output, lse and the gradients of q, k and v."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = attend(q, k, v, options)
    seen = lse.detach() > -torch.inf
    loss = (out * dout).sum() + (torch.where(seen, lse, 0) * dlse).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    return [t.detach() for t in (out, lse, *grads)]


def plain(q, k, v, options):
    """Attention as models write it: products and weights in q's dtype, softmax in float32."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    s = (q @ k.mT) * options.scale
    seen = allowed(options.mask, q.shape[2], k.shape[2], q.device)
    dead = ~seen.any(-1, keepdim=True)
    s = s.float().masked_fill(~(seen | dead), -torch.inf)
    p = s.softmax(-1).masked_fill(dead, 0).to(q.dtype)
    return p @ v, s.logsumexp(-1).masked_fill(dead[..., 0], -torch.inf)


def triton(q, k, v, options):
    return run(q, k, v, options, "triton")


def in_float64(q, k, v, dout, dlse, options):
    """What is exact, for those inputs."""
    tensors = (t.double() for t in (q, k, v, dout, dlse))
    return with_gradients(reference.attention, *tensors, options)


def error(found, exact):
    seen = exact > -torch.inf
    return ((found.double() - exact)[seen].norm() / exact[seen].norm()).item()


@pytest.fixture
def check(assert_as_exact_as_pytorch, poisoned_memory):
    """Compares all that a call and its gradient give, by the rule of tolerance."""

    def check(*inputs):
        exact = in_float64(*inputs)
        theirs = with_gradients(plain, *inputs)
        ours = with_gradients(triton, *inputs)
        assert not ours[0][exact[1] == -torch.inf].any()
        for name, mine, their, true in zip(NAMES, ours, theirs, exact, strict=True):
            assert_as_exact_as_pytorch(mine, their, true, name)

    return check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [64, 128])
def test_every_mask_with_every_sharing_of_heads(check, mask, heads, dtype, d):
    check(*case(mask, heads=heads, dtype=dtype, d=d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["causal", "padding, causal"])
@pytest.mark.parametrize("d", [16, 24, 32, 40, 48, 72, 80, 88, 96, 104, 112, 160, 192, 224, 256])
def test_every_head_size(check, mask, dtype, d):
    check(*case(mask, dtype=dtype, d=d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(192, 128), (96, 64), (64, 128), (20, 52)])
def test_values_may_have_another_head_size(check, sizes, dtype):
    check(*case("causal", d=sizes[0], dv=sizes[1], dtype=dtype))


@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 300), (300, 1), (128, 128), (77, 1025), (1025, 77)]
)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_lengths_that_divide_nothing(check, lengths, mask):
    check(*case(mask, n=lengths[0], m=lengths[1]))


@pytest.mark.parametrize("mask", MASKS)
def test_long_sequences(check, mask):
    check(*case(mask, n=2011, m=2011, heads="MQA"))


@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_the_scale_may_be_anything(check, scale):
    check(*case("causal", scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere_in_memory(check, dtype):
    """Strides that are no multiple of 16 bytes leave the copy engine and wide loads unused."""
    q, k, v, dout, dlse, options = case("padding, causal", dtype=dtype)
    q, k, v, dout = (
        torch.nn.functional.pad(t, (3, 2), value=torch.nan)[..., 3:-2] for t in (q, k, v, dout)
    )
    check(q, k, v, dout, dlse, options)


def test_a_last_dimension_with_a_stride(check):
    q, k, v, dout, dlse, options = case("causal")
    check(*(t.mT.contiguous().mT for t in (q, k, v, dout)), dlse, options)


def test_expanded_keys_and_a_gradient_of_ones(check):
    q, k, v, dout, dlse, options = case("causal")
    k, v = (t[:1, :1].expand(t.shape) for t in (k, v))
    check(q, k, v, torch.ones((), device=DEVICE, dtype=q.dtype).expand(dout.shape), dlse, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["causal", "padding, causal"])
def test_twenty_repeats_give_the_same_bits(mask, dtype):
    inputs = case(mask, dtype=dtype, n=777, m=777)
    first = with_gradients(triton, *inputs)
    for _ in range(20):
        again = with_gradients(triton, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_lower_precision_of_float32_is_still_close_to_it():
    torch.set_float32_matmul_precision("high")
    inputs = case("causal", dtype=torch.float32)
    for found, exact in zip(with_gradients(triton, *inputs), in_float64(*inputs), strict=True):
        assert error(found, exact) < 5e-6


def test_float32_is_within_1e_5_of_float64():
    inputs = case("padding, causal", dtype=torch.float32, d=128, n=1000, m=1000)
    for found, exact in zip(with_gradients(triton, *inputs), in_float64(*inputs), strict=True):
        assert error(found, exact) < 1e-5


def test_one_compilation_serves_every_length_and_window():
    from flashpatch_kernels.triton.forward_pass import forward_kernel

    def compiled():
        return sum(len(caches[0]) for caches in forward_kernel.device_caches.values())

    with_gradients(triton, *case("causal", n=128, m=128, d=64))
    before = compiled()
    for n in (1, 16, 17, 100, 128, 1000):
        for mask in ("full", "causal", "window", "band"):
            with_gradients(triton, *case(mask, n=n, m=n, d=64))
    assert compiled() == before


def test_more_than_65535_heads():
    q, k, v = (torch.randn(70_000, 1, 3, 16, device=DEVICE, dtype=torch.float16) for _ in range(3))
    out, _ = triton(q, k, v, Options(Band(right=0), scale=0.25))
    true, _ = reference.attention(q[-9:], k[-9:], v[-9:], Options(Band(right=0), scale=0.25))
    assert error(out[-9:], true.double()) < 1e-3


def test_offsets_beyond_32_bits():
    """The last head's elements start beyond 2^31."""
    whole = torch.empty(1, 260, 65_536, 128, device=DEVICE, dtype=torch.float16)
    q = whole[:, :, -200:]
    q[:, -1].normal_()
    k, v = (torch.randn(1, 1, 128, 128, device=DEVICE, dtype=torch.float16) for _ in range(2))
    out, _ = triton(q, *(t.expand(1, 260, -1, -1) for t in (k, v)), Options(scale=0.1))
    true, _ = reference.attention(q[:, -1:], k, v, Options(scale=0.1))
    assert q[:, -1:].storage_offset() > 1 << 31
    assert error(out[:, -1:], true.double()) < 1e-3


def test_a_second_derivative_is_refused():
    q, k, v, dout, _, options = case("causal", n=40, m=40)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(triton(q, k, v, options)[0], q, dout, create_graph=True)
    with pytest.raises(NotImplementedError, match="engine='tiled' has"):
        dq.sum().backward()


def test_a_second_device_is_used_where_there_is_one():
    device = f"cuda:{torch.cuda.device_count() - 1}"
    q, k, v = (torch.randn(1, 2, 100, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    out, _ = triton(q, k, v, Options(scale=0.125))
    true, _ = reference.attention(q, k, v, Options(scale=0.125))
    assert out.device == q.device
    assert error(out, true.double()) < 1e-2


def test_a_cuda_graph_replays_it():
    q, k, v, *_, options = case("padding, causal")
    triton(q, k, v, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = triton(q, k, v, options)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, triton(q, k, v, options)[0])
