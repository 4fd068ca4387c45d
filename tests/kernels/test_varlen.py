"""Documents one after the other give what each gives alone."""

import itertools

import pytest
import torch

from flashpatch_kernels import attention, attention_varlen

LENGTHS = (5, 1, 0, 9, 4)
OTHER_LENGTHS = (3, 6, 2, 9, 7)


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def tensors(n, m):
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, 4, 16), (m, 2, 16), (m, 2, 8))
    return tuple(torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes)


def alone(q, k, v, lengths, key_lengths, **options):
    """Each document by itself, on the equations."""
    parts, i, j = [], 0, 0
    for n, m in zip(lengths, key_lengths, strict=True):
        part = (q[i : i + n], k[j : j + m], v[j : j + m])
        out = attention(*(x.transpose(0, 1)[None] for x in part), engine="reference", **options)
        parts.append(out[0].transpose(0, 1))
        i, j = i + n, j + m
    return torch.cat(parts)


@pytest.mark.parametrize("engine", [None, "tiled"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("key_lengths", [None, OTHER_LENGTHS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window": 3},
        {"window": (1, 2)},
        {"softcap": 2.0, "scale": 0.5},
    ],
    ids=str,
)
def test_documents_give_what_each_gives_alone(key_lengths, options, dtype, engine):
    q, k, v = tensors(sum(LENGTHS), sum(key_lengths or LENGTHS))
    cu_seqlens_k = None if key_lengths is None else cumulative(key_lengths, dtype)
    out = attention_varlen(
        q, k, v, cumulative(LENGTHS, dtype), cu_seqlens_k, engine=engine, **options
    )
    expected = alone(q, k, v, LENGTHS, key_lengths or LENGTHS, **options)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for found, true in zip(
        torch.autograd.grad(out, (q, k, v), dout),
        torch.autograd.grad(expected, (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(found, true)


def test_slopes_go_by_the_distance_within_a_document():
    q, k, v = tensors(sum(LENGTHS), sum(LENGTHS))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    out = attention_varlen(q, k, v, cumulative(LENGTHS), causal=True, slopes=slopes)
    torch.testing.assert_close(out, alone(q, k, v, LENGTHS, LENGTHS, causal=True, slopes=slopes))


def test_tokens_beyond_the_last_document_belong_to_none():
    q, k, v = tensors(22, 22)
    out, lse = attention_varlen(q, k, v, cumulative(LENGTHS), return_lse=True)
    assert out.shape == (22, 4, 8)
    assert lse.shape == (4, 22)
    assert not out[19:].any()
    assert (lse[:, 19:] == -torch.inf).all()
    assert lse[:, :19].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "must be int32 or int64, not"),
        ({"cu_seqlens": torch.tensor([0])}, ValueError, r"shape \(documents \+ 1,\), not \(1,\)"),
        ({"cu_seqlens_k": torch.tensor([0, 1, 4])}, ValueError, r"cu_seqlens_k must have shape"),
        ({"cu_seqlens": torch.tensor([0, 4], device="meta")}, ValueError, "cu_seqlens is on meta"),
        ({"q": torch.zeros(1, 4, 4, 16)}, ValueError, r"q must have 3 dimensions"),
        ({"mask": torch.ones(1, 4)}, ValueError, "takes no mask"),
        (
            {"slopes": torch.ones(4), "cu_seqlens_k": torch.tensor([0, 4])},
            ValueError,
            "slopes goes by places",
        ),
        ({"window": 0}, ValueError, "window must be at least 1 key, not 0"),
    ],
)
def test_bad_arguments_get_a_clear_sentence(changes, error, message):
    q, k, v = tensors(4, 4)
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 4])} | changes
    with pytest.raises(error, match=message):
        attention_varlen(**arguments)
