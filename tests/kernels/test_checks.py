"""What the caller passes: whom it lets see whom, and which errors name what is wrong."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small_calls import B, D, H, M, N, tensors, vectors

from flashpatch_kernels import attention, checks
from flashpatch_kernels.masks import Band, Boolean, Intervals, key_mask
from flashpatch_kernels.options import Relative, Score

# What may be seen.


def seen_keys(n=N, m=M, **mask):
    """Who sees whom, read off the gradient of each output: bool [N, M] of the first batch row."""
    q = torch.zeros(B, 1, n, D)
    v = torch.eye(m).expand(B, 1, m, m)
    out = attention(q, torch.zeros(B, 1, m, D), v, engine="tiled", **mask)
    return out[0, 0] > 0


def test_causal_lets_the_last_query_see_every_key():
    assert seen_keys(2, 5, causal=True).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen_keys(3, 2, causal=True).tolist() == [[0, 0], [1, 0], [1, 1]]


def test_a_causal_window_keeps_the_last_keys():
    assert seen_keys(3, 4, causal=True, window=2).tolist() == [
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_a_window_reaches_as_far_to_both_sides():
    assert seen_keys(4, 4, window=2).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
    ]


def test_the_sides_of_a_window_may_differ_or_be_open():
    assert seen_keys(3, 3, window=(0, 1)).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert seen_keys(3, 3, window=(None, 0)).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen_keys(3, 3, window=(1, None)).tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]
    assert seen_keys(3, 3, window=(1, 2), causal=True).tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 1, 1],
    ]


def test_causal_window_and_mask_intersect():
    keys = torch.tensor([[False, True, True], [True, True, True]])
    assert seen_keys(3, 3, causal=True, mask=keys).tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    grid = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()[None, None]
    assert seen_keys(3, 3, causal=True, window=2, mask=grid).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]


def test_every_form_of_a_mask_means_the_same():
    keys = torch.tensor([[False, True, True, False], [False, True, True, False]])
    bounds = torch.tensor([[[1, 3]]], dtype=torch.int32)
    forms = (
        keys,
        keys[:1],
        keys[:, None, None],
        bounds,
        bounds.expand(B, 3, 2),
        key_mask(keys),
        Intervals(bounds),
        Boolean(keys[:1, None, None]),
    )
    for form in forms:
        assert seen_keys(3, 4, mask=form).tolist() == [[0, 1, 1, 0]] * 3
    assert seen_keys(3, 4, mask=Band(left=0, right=0, offset=1)).tolist() == [
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_intervals_that_leave_the_keys_are_cut():
    bounds = torch.tensor([[[-5, 2], [1, 99], [3, 1]]], dtype=torch.int32)
    assert seen_keys(3, 4, mask=bounds).tolist() == [[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_a_limit_that_hides_nothing_leaves_the_mask_full():
    band = partial(checks.to_band, 1, 9)
    assert band(causal=True, window=None) == Band()
    assert band(causal=True, window=9) == Band()
    assert band(causal=True, window=8) == Band(left=7, offset=8)


# Refusals.

q, k, v = tensors()
QUERIES, KEYS, VALUES = (
    vectors()[name] for name in ("relative_queries", "relative_keys", "relative_values")
)
# What is known of a function of Triton without importing it.
FUNCTION = SimpleNamespace(fn=tensors, arg_names=["s", "i", "j", "batch", "head", "arguments"])
BAD = {
    "no tensor": (TypeError, "q must be a tensor, not list", {"q": [1.0]}),
    "rank": (ValueError, r"k must have 4 dimensions.*\(2, 2, 8\)", {"k": k[..., 0]}),
    "integers": (
        TypeError,
        "v must be of a floating point dtype, not torch.int64",
        {"v": v.long()},
    ),
    "device": (ValueError, "k is on meta, q on cpu", {"k": k.to("meta")}),
    "dtypes": (TypeError, "k is torch.float64, q is torch.float32", {"k": k.double()}),
    "batch": (ValueError, r"differ in batch: \(1, 4, 6, 16\)", {"q": q[:1]}),
    "length": (ValueError, r"k and v differ .*\(2, 2, 7, 16\)", {"v": v[:, :, 1:]}),
    "kv heads": (ValueError, r"k and v differ .*\(2, 1, 8, 16\)", {"k": k[:, :1]}),
    "head size": (ValueError, r"q and k differ in head size: \(2, 4, 6, 9\)", {"q": q[..., :9]}),
    "no head size": (ValueError, "a head size is 0", {"v": v[..., :0]}),
    "groups": (ValueError, "3 query heads are not a multiple of 2", {"q": q[:, :3]}),
    "no kv heads": (
        ValueError,
        "4 query heads are not a multiple of 0",
        {"k": k[:, :0], "v": v[:, :0]},
    ),
    "window 0": (ValueError, "at least 1 key, not 0", {"window": 0}),
    "window below 0": (ValueError, "at least 1 key, not -3", {"window": -3}),
    "window side": (ValueError, "None or at least 0, not -1", {"window": (2, -1)}),
    "window float": (TypeError, "an int or a pair, not 2.5", {"window": 2.5}),
    "window bool": (TypeError, "an int or a pair, not True", {"window": True}),
    "window triple": (TypeError, r"an int or a pair, not \(1, 2, 3\)", {"window": (1, 2, 3)}),
    "float mask": (TypeError, "scores go in `bias`", {"mask": torch.zeros(B, M)}),
    "mask type": (TypeError, "a mask record, not str", {"mask": "causal"}),
    "mask rank": (ValueError, r"torch.bool of shape \(8,\)", {"mask": torch.ones(M).bool()}),
    "key mask": (ValueError, r"\(2 or 1, 8\), not \(2, 6\)", {"mask": torch.ones(B, N).bool()}),
    "bool mask": (
        ValueError,
        r"\(2 or 1, 4 or 1, 6 or 1, 8\), not \(2, 2, 6, 8\)",
        {"mask": torch.ones(B, 2, N, M).bool()},
    ),
    "intervals": (
        ValueError,
        r"\(2 or 1, 6 or 1, 2\), not \(2, 8, 2\)",
        {"mask": torch.zeros(B, M, 2).int()},
    ),
    "int64 intervals": (
        TypeError,
        "must be bool or int32, not torch.int64",
        {"mask": torch.zeros(B, N, 2).long()},
    ),
    "record's dtype": (
        TypeError,
        "torch.int32, not torch.int64",
        {"mask": Intervals(torch.zeros(B, N, 2).long())},
    ),
    "record's runs": (
        ValueError,
        r"mask's runs must have shape \(2 or 1, 8\)",
        {"mask": Intervals(torch.zeros(B, N, 2).int(), torch.zeros(B, N).int())},
    ),
    "mask device": (
        ValueError,
        "mask is on meta",
        {"mask": torch.ones(B, M, device="meta").bool()},
    ),
    "scale nan": (ValueError, "scale must be finite, not nan", {"scale": math.nan}),
    "scale inf": (ValueError, "scale must be finite, not inf", {"scale": math.inf}),
    "scale type": (TypeError, "scale must be a number, not '1'", {"scale": "1"}),
    "softcap negative": (ValueError, "softcap must be positive", {"softcap": -1.0}),
    "softcap 0": (ValueError, "softcap must be positive and finite, not 0", {"softcap": 0}),
    "softcap nan": (
        ValueError,
        "softcap must be positive and finite, not nan",
        {"softcap": math.nan},
    ),
    "softcap type": (TypeError, "softcap must be a number", {"softcap": True}),
    "table size": (
        ValueError,
        r"table must have shape \(4, 13\), not \(4, 12\)",
        {"table": torch.zeros(H, 12)},
    ),
    "slopes shape": (
        ValueError,
        r"slopes must have shape \(4\), not \(3,\)",
        {"slopes": torch.zeros(3)},
    ),
    "table type": (TypeError, "table must be a tensor, not list", {"table": [1.0]}),
    "first type": (
        TypeError,
        "first must be an int or None, not 1.5",
        {"table": torch.zeros(H, 3), "first": 1.5},
    ),
    "first bool": (
        TypeError,
        "first must be an int or None, not True",
        {"table": torch.zeros(H, 3), "first": True},
    ),
    "first of no table": (ValueError, "first=-3 says where a table begins", {"first": -3}),
    "empty table": (
        ValueError,
        r"table must have at least one distance, not shape \(4, 0\)",
        {"table": torch.zeros(H, 0), "first": 0},
    ),
    "clamped table's heads": (
        ValueError,
        r"table must have shape \(4, 3\), not \(2, 3\)",
        {"table": torch.zeros(2, 3), "first": 0},
    ),
    "clamped table's type": (
        TypeError,
        "table must be a tensor, not list",
        {"table": [1.0], "first": 0},
    ),
    "no Relative": (
        TypeError,
        "relative_queries must be a Relative, not Tensor",
        {"relative_queries": QUERIES.embeddings},
    ),
    "first of a Relative": (
        TypeError,
        "first of relative_keys must be an int, not None",
        {"relative_keys": replace(KEYS, first=None)},
    ),
    "embeddings' rank": (
        ValueError,
        r"embeddings of relative_queries must have shape \(heads or 1, T, E\), not \(5, 3\)",
        {"relative_queries": replace(QUERIES, embeddings=QUERIES.embeddings[0])},
    ),
    "no embeddings": (
        ValueError,
        r"embeddings of relative_keys must have shape \(heads or 1, T, E\), not \(1, 0, 2\)",
        {"relative_keys": replace(KEYS, embeddings=KEYS.embeddings[:, :0])},
    ),
    "embeddings' type": (
        ValueError,
        r"embeddings of relative_values must have shape \(heads or 1, T, E\), not list",
        {"relative_values": Relative([1.0], 0)},
    ),
    "embeddings' heads": (
        ValueError,
        r"embeddings of relative_queries must have shape \(4 or 1, 5, 3\), not \(2, 5, 3\)",
        {"relative_queries": replace(QUERIES, embeddings=QUERIES.embeddings[:2])},
    ),
    "embeddings' size": (
        ValueError,
        r"embeddings of relative_values must have shape \(4 or 1, 1, 16\), not \(1, 1, 7\)",
        {"relative_values": Relative(torch.zeros(1, 1, 7), 0)},
    ),
    "embeddings' dtype": (
        TypeError,
        "embeddings of relative_values must be of a floating point dtype, not torch.int64",
        {"relative_values": Relative(VALUES.embeddings.long(), 0)},
    ),
    "embeddings' device": (
        ValueError,
        "embeddings of relative_values is on meta, q on cpu",
        {"relative_values": Relative(VALUES.embeddings.to("meta"), 0)},
    ),
    "vectors of values": (
        ValueError,
        "relative_values takes no vectors",
        {"relative_values": replace(VALUES, vectors=q)},
    ),
    "no vectors": (
        ValueError,
        "relative_keys needs the vectors",
        {"relative_keys": replace(KEYS, vectors=None)},
    ),
    "vectors' shape": (
        ValueError,
        r"vectors of relative_keys must have shape \(2, 4, 8, 2\), not \(2, 4, 6, 3\)",
        {"relative_keys": replace(KEYS, vectors=QUERIES.vectors)},
    ),
    "vectors' type": (
        TypeError,
        "vectors of relative_queries must be a tensor, not int",
        {"relative_queries": replace(QUERIES, vectors=3)},
    ),
    "vectors' dtype": (
        TypeError,
        "vectors of relative_queries must be of a floating point dtype, not torch.int64",
        {"relative_queries": replace(QUERIES, vectors=QUERIES.vectors.long())},
    ),
    "vectors' device": (
        ValueError,
        "vectors of relative_queries is on meta, q on cpu",
        {"relative_queries": replace(QUERIES, vectors=QUERIES.vectors.to("meta"))},
    ),
    "no Score": (TypeError, "score must be a Score, not function", {"score": tensors}),
    "score's argument": (
        TypeError,
        "arguments of score must be tensors, not float",
        {"score": Score(FUNCTION, arguments=(q, 1.0))},
    ),
    "score's device": (
        ValueError,
        "an argument of score is on meta, q on cpu",
        {"score": Score(FUNCTION, arguments=(q.to("meta"),))},
    ),
    "score's gradient": (
        ValueError,
        "an argument of score gets no gradient: pass it detached",
        {"score": Score(FUNCTION, arguments=(torch.ones(H, requires_grad=True),))},
    ),
    "score elsewhere": (
        ValueError,
        "no engine takes this call: a Triton function on scores runs on the Triton engine only",
        {"score": Score(FUNCTION)},
    ),
    "score on tiled": (
        ValueError,
        "engine 'tiled' cannot serve this call: a Triton function on scores",
        {"score": Score(FUNCTION), "engine": "tiled"},
    ),
    "table dtype": (TypeError, "table must be of a floating", {"table": torch.zeros(H, 13).int()}),
    "table device": (ValueError, "table is on meta", {"table": torch.zeros(H, 13, device="meta")}),
    "bias shape": (
        ValueError,
        r"bias must have shape \(2 or 1, 4 or 1, 6 or 1, 8\), not \(1, 1, 6, 1\)",
        {"bias": torch.zeros(1, 1, N, 1)},
    ),
    "bias dtype": (
        TypeError,
        "bias must be of a floating",
        {"bias": torch.ones(1, 1, N, M).bool()},
    ),
    "sinks shape": (
        ValueError,
        r"sinks must have shape \(4\), not \(2,\)",
        {"sinks": torch.zeros(2)},
    ),
    "dropout 1": (ValueError, r"dropout must be in \[0, 1\), not 1", {"dropout": 1.0}),
    "dropout negative": (ValueError, r"dropout must be in \[0, 1\), not -0.1", {"dropout": -0.1}),
    "dropout type": (TypeError, "dropout must be a number, not '0.1'", {"dropout": "0.1"}),
    "engine": (
        ValueError,
        "engine must be one of hopper, triton, sdpa, tiled, reference, not 'flash'",
        {"engine": "flash"},
    ),
    "engine that cannot": (
        ValueError,
        "engine 'sdpa' cannot serve this call: PyTorch's attention has no softcap",
        {"engine": "sdpa", "softcap": 2.0},
    ),
    "engine elsewhere": (
        ValueError,
        "engine 'triton' cannot serve this call",
        {"engine": "triton", "softcap": 2.0},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_argument_is_refused_with_its_value(name):
    error, message, change = BAD[name]
    with pytest.raises(error, match=message):
        attention(**({"q": q, "k": k, "v": v} | change))


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="attn_mask"):
        attention(q, k, v, attn_mask=None)
