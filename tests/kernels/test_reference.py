"""The oracle against PyTorch, by other formulas than its own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flashpatch_kernels import dropout, reference
from flashpatch_kernels.masks import Band, Boolean, allowed
from flashpatch_kernels.options import Options, Relative


def test_it_is_pytorchs_attention(sample, mask_name):
    one = sample(mask_name, dtype=torch.float64)
    seen = allowed(one.options.mask, 37, 45, "cpu")
    out, _ = reference.attention(one.q, one.k, one.v, one.options)
    expected = scaled_dot_product_attention(one.q, one.k, one.v, seen, scale=one.options.scale)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)


def test_it_agrees_with_a_user_of_pytorch_on_every_term(sample, mask_name, pytorch):
    one = sample(
        mask_name,
        dtype=torch.float64,
        kv_heads=2,
        terms=(
            "softcap",
            "clamped table",
            "slopes",
            "bias",
            "sinks",
            "relative_queries",
            "relative_keys",
            "relative_values",
        ),
        dropout=0.3,
    )
    found, expected = one.answer(reference.attention), one.answer(pytorch)
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_computes_in_float64_whatever_the_dtype(sample, dtype):
    one = sample("causal", dtype=dtype)
    out, lse = reference.attention(one.q, one.k, one.v, one.options)
    exact, exact_lse = reference.attention(
        one.q.double(), one.k.double(), one.v.double(), one.options
    )
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))
    assert torch.equal(lse, exact_lse.float())


def test_the_table_is_read_by_the_distance_of_key_and_query():
    table = torch.arange(2 * 6.0).view(2, 6)  # 2 heads, 3 queries, 4 keys
    dense = table[:, reference.distances(3, 4, -2, 6, table.device)]
    for h in range(2):
        for i in range(3):
            for j in range(4):
                assert dense[h, i, j] == table[h, j - i + 2]


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_vectors_on_keys_and_values_are_the_equations_of_shaw():
    """Equations 3 and 4 of Shaw et al. (2018), whose distances are clipped at k = 2."""
    k, n, d = 2, 7, 3
    Q, K, V = random(n, d), random(n, d), random(n, d)
    wK, wV = random(2 * k + 1, d), random(2 * k + 1, d)
    z = torch.zeros(n, d, dtype=torch.float64)
    for i in range(n):
        clip = [max(-k, min(k, j - i)) + k for j in range(n)]
        e = torch.stack([Q[i] @ (K[j] + wK[clip[j]]) / d**0.5 for j in range(n)])
        for j, a in enumerate(e.softmax(0)):
            z[i] += a * (V[j] + wV[clip[j]])

    Q, K, V = (x[None, None] for x in (Q, K, V))
    options = Options(
        scale=d**-0.5,
        relative_queries=Relative(wK[None], -k, Q * d**-0.5),
        relative_values=Relative(wV[None], -k),
    )
    out, _ = reference.attention(Q, K, V, options)
    torch.testing.assert_close(out[0, 0], z)


def test_vectors_of_queries_and_of_keys_are_the_terms_of_deberta():
    """Equation 4 of He et al. (2021), less its scale: content, content to position, and back."""
    k, n, d = 2, 6, 3
    Qc, Kc, V = random(2, n, d), random(2, n, d), random(2, n, d)  # 2 heads
    Qr, Kr = random(2, 2 * k, d), random(2, 2 * k, d)

    def delta(i, j):
        return 0 if i - j <= -k else 2 * k - 1 if i - j >= k else i - j + k

    scores = torch.zeros(2, n, n, dtype=torch.float64)
    for h in range(2):
        for i in range(n):
            for j in range(n):
                scores[h, i, j] = Qc[h, i] @ Kc[h, j] + Qc[h, i] @ Kr[h, delta(i, j)]
                scores[h, i, j] += Kc[h, j] @ Qr[h, delta(j, i)]

    # Its index of content to position falls with j - i, so that its entries go backwards.
    options = Options(
        relative_queries=Relative(Kr.flip(1), 1 - k, Qc[None]),
        relative_keys=Relative(Qr, -k, Kc[None]),
    )
    out, lse = reference.attention(Qc[None], Kc[None], V[None], options)
    torch.testing.assert_close(out[0], scores.softmax(-1) @ V)
    torch.testing.assert_close(lse[0], scores.logsumexp(-1))


def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(sample):
    one = sample("full")
    hidden = Options(mask=Boolean(torch.zeros(1, 1, 1, 45, dtype=torch.bool)))
    out, lse = reference.attention(one.q, one.k, one.v, hidden)
    out.sum().backward()
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    assert not one.q.grad.any()
    assert not one.v.grad.any()


def test_it_is_differentiable_twice(sample):
    one = sample("causal", dtype=torch.float64, kv_heads=2, n=3, m=4, d=2)

    def call(q, k, v):
        return reference.attention(q, k, v, one.options)[0]

    assert torch.autograd.gradgradcheck(call, (one.q, one.k, one.v))


def test_dropout_is_unbiased():
    """The mean over many seeds is the output without dropout."""
    q, k, v = (torch.randn(1, 1, 4, 4, dtype=torch.float64) for _ in range(3))
    plain, _ = reference.attention(q, k, v, Options(mask=Band(right=0)))
    outs = [
        reference.attention(
            q, k, v, Options(mask=Band(right=0), dropout=0.25, seed=torch.tensor([seed]))
        )[0]
        for seed in range(600)
    ]
    assert (torch.stack(outs).mean(0) - plain).abs().max() < 0.2


@pytest.mark.parametrize(("p", "kept"), [(0.0, 65536), (0.5, 32768), (0.1, 58982)])
def test_the_scale_of_dropout_is_that_of_the_share_kept(p, kept):
    assert dropout.threshold(p) == kept
    assert dropout.keep_probability(p) == kept / 65536
