"""Attention written out operation by operation, in the ways that models do, read and served."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flashpatch import dispatch
from flashpatch.dispatch import Settings
from flashpatch.masks import pack
from flashpatch.products import released
from flashpatch.reading import Reading, know_buffers
from flashpatch.scores import groups, spread
from flashpatch_kernels.engines import Reason
from flashpatch_kernels.masks import key_mask

B, H, N, M, D = 2, 3, 7, 9, 8
LEAST = torch.finfo(torch.float32).min


def numbers(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=draw).requires_grad_()


def forbid(reason: Reason) -> None:
    raise AssertionError(f"fell back: {reason}")


def reading(function: Callable[..., Any], *args: Any, refused: Reason | None = None) -> Any:
    with Reading(Settings(on_fallback=forbid if refused is None else lambda _: None), refused):
        out = function(*args)
    return released(out, weights=refused is not None)


def hidden_keys() -> Tensor:
    """Numbers to add that hide the last keys of one text: [B, 1, 1, M]."""
    mask = torch.zeros(B, 1, 1, M)
    mask[1, ..., -4:] = LEAST
    return mask


# The ways to write it: (q, k, v, a bias of all pairs) -> output.


def plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
    return torch.matmul(functional.softmax(scores + hidden_keys(), dim=-1), v)


def with_operators(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q * 0.25 @ k.mT
    scores = bias + scores
    scores *= 2
    return scores.softmax(-1) @ v


def with_heads_in_the_batch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    flat = [x.reshape(B * H, -1, D) for x in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
    scores = scores.view(B, H, N, M) + hidden_keys()
    scores = torch.max(scores, torch.tensor(LEAST))
    scores = scores.view(B * H, N, M)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    kept = weights.view(B, H, N, M)
    weights = functional.dropout(kept.view(B * H, N, M), p=0.0, training=True)
    return torch.bmm(weights, flat[2]).view(B, H, N, D)


def with_a_bias_to_begin_with(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    flat = [x.reshape(B * H, -1, D) for x in (q, k, v)]
    start = bias.expand(B, H, N, M).reshape(B * H, N, M)
    scores = torch.baddbmm(start, flat[0], flat[1].transpose(1, 2), beta=0.5, alpha=0.3)
    return (scores.softmax(dim=-1) @ flat[2]).view(B, H, N, D)


def with_einsum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    first, then = (x.permute(2, 0, 1, 3) for x in (q, k))  # sequence first
    scores = torch.einsum("ibnd,jbnd->bnij", first, then) * 0.3 + bias
    weights = functional.softmax(scores, dim=3)
    out = torch.einsum("bnij,jbnd->ibnd", weights, v.permute(2, 0, 1, 3))
    return out.permute(1, 2, 0, 3)


def with_filled_masks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    later = torch.ones(N, M, dtype=torch.bool).triu(3)
    scores = (q @ k.transpose(2, 3)).masked_fill(later, -torch.inf)
    first = torch.ones(1, 1, N, M, dtype=torch.bool).tril(1)
    scores = torch.where(first, scores, torch.full([], LEAST, dtype=scores.dtype))
    return torch.softmax(scores, dim=-1).matmul(v)


def with_a_scale_of_each_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
    scale = bias[0, :, :1, :1].exp()  # [H, 1, 1]
    return nn.Softmax(dim=-1)((scores + bias) * scale) @ v


def with_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    shifted = torch.zeros(B, N, M)
    shifted[1, 2:, :3] = -100.0
    scores = scores.view(1, B, H, N, M) + shifted.unsqueeze(1).unsqueeze(0)
    return scores.view(-1, H, N, M).softmax(-1) @ v


def with_keys_of_one_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k[:, :1].transpose(-1, -2) - bias
    return scores.float().softmax(-1).type_as(q) @ v[:, :1]


SOFTCAP = torch.tensor(2.0)


def with_capped_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.tanh((q @ k.transpose(-1, -2)) * 0.3 / SOFTCAP) * SOFTCAP
    return (scores + bias).softmax(-1) @ v


def with_capped_scores_and_biases(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * 0.3 + bias) / SOFTCAP + bias[..., :1, :]
    scores = torch.tanh(scores) * SOFTCAP
    later = torch.ones(N, M, dtype=torch.bool).triu(3)
    return scores.masked_fill(later, -1e9).softmax(-1) @ v


def with_heads_in_another_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q.transpose(0, 1) @ k.transpose(0, 1).mT + bias.transpose(0, 1)
    weights = scores.masked_fill(bias.transpose(0, 1) < -1, -torch.inf).softmax(-1)
    flat = weights.permute(1, 0, 2, 3).reshape(-1, N, M)
    return torch.bmm(flat, v.reshape(B * H, M, D)).view(B, H, N, D)


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)


def by_pytorch_with_heads_in_the_batch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    flat = [x.reshape(B * H, -1, D) for x in (q, k, v)]
    seen = bias.expand(B, H, N, M).reshape(B * H, N, M) > -1
    out = functional.scaled_dot_product_attention(flat[0], flat[1], flat[2], attn_mask=seen)
    return out.view(B, H, N, D)


def with_its_largest_taken_off(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) + 1.0
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    hidden = torch.ones(N, M).triu(3).bool().expand_as(scores)
    return scores.masked_fill(hidden, -1e4).softmax(dim=-1) @ v


def by_the_logarithm_of_the_sum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) + bias
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def with_sizes_that_have_no_name(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    first, then, last = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("...qhd,...khd->...hqk", first, then).softmax(-1)
    return torch.einsum("...hqk,...khd->...qhd", weights, last).transpose(1, 2)


def with_weights_set_to_zero(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    seen = torch.ones(B, N * M, dtype=torch.long)
    seen[1, M : M + 4] = 0
    scores = q @ k.transpose(-1, -2)
    scores = torch.masked_fill(scores, seen.view(B, 1, N, M) == torch.tensor(0), -torch.inf)
    weights = torch.masked_fill(scores.softmax(-1), seen.view(B, 1, N, M) == torch.tensor(0), 0.0)
    return weights @ v


def with_a_mask_of_queries(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    seen = torch.ones(1, 1, N, 1, dtype=torch.bool)
    return torch.where(seen, q @ k.transpose(-1, -2), torch.tensor(LEAST)).softmax(-1) @ v


WAYS = [
    plainly,
    with_operators,
    with_heads_in_the_batch,
    with_a_bias_to_begin_with,
    with_einsum,
    with_filled_masks,
    with_a_scale_of_each_head,
    with_windows,
    with_keys_of_one_head,
    with_capped_scores,
    with_capped_scores_and_biases,
    with_heads_in_another_place,
    with_its_largest_taken_off,
    by_the_logarithm_of_the_sum,
    with_sizes_that_have_no_name,
    with_weights_set_to_zero,
    with_a_mask_of_queries,
    by_pytorch,
    by_pytorch_with_heads_in_the_batch,
]


def inputs() -> list[Tensor]:
    return [
        numbers(B, H, N, D),
        numbers(B, H, M, D, seed=1),
        numbers(B, H, M, D, seed=2),
        numbers(1, H, N, M, seed=3),
    ]


def step(function: Callable[..., Any], *args: Any) -> tuple[Tensor, list[Tensor | None]]:
    given = inputs()
    out = function(*args, *given)
    (out * numbers(*out.shape, seed=5).detach()).sum().backward()
    return out.detach(), [x.grad for x in given]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_served_with_the_same_results_and_gradients(way, tiled_calls):
    expected = step(way)
    ours = step(reading, way)
    assert len(tiled_calls) == 1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_call_runs_the_same_operations(way, tiled_calls):
    told = []
    refused = Reason("REFUSED", "for the test")

    def run(*given: Tensor) -> Any:
        with Reading(Settings(on_fallback=told.append), refused):
            out = way(*given)
        return released(out, weights=True)

    expected, ours = step(way), step(run)
    assert told == [refused]
    assert not tiled_calls
    assert torch.equal(ours[0], expected[0])
    assert all(a is b or torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_no_engine_serves_runs_the_same_operations(way, monkeypatch):
    """An equation's result was put in order twice where no engine had computed it."""
    refused, told = Reason("REFUSED", "for the test"), []
    monkeypatch.setattr(dispatch, "decide", lambda call: refused)

    def run(*given: Tensor) -> Any:
        with Reading(Settings(on_fallback=told.append)):
            out = way(*given)
        return released(out, weights=False)

    expected, ours = step(way), step(run)
    assert set(told) == {refused}
    assert torch.equal(ours[0], expected[0])
    assert all(a is b or torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))


# What is done to products and is no attention, or not one that an engine computes.


def looked_at(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    weights = (scores - scores.mean(-1, keepdim=True)).softmax(-1)
    return weights @ v * (weights > 0.1).sum()


def with_weights_changed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(-1) * torch.tensor([1.0, 0.0, 0.5])[:, None, None]
    return weights @ v


def with_heads_mixed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).permute(0, 2, 3, 1) @ bias[0, :, :3, 0]
    return scores.permute(0, 3, 1, 2).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-2) @ v


def with_one_entry_set(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores[..., 0] = 0.0
    return scores.softmax(-1) @ v


def with_other_weights_set_to_zero(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    seen = torch.ones(B, N * M, dtype=torch.long)
    seen[1, M : M + 4] = 0
    scores = (q @ k.transpose(-1, -2)).masked_fill(seen.view(B, 1, N, M) == 0, -torch.inf)
    seen[0, 3:5] = 0
    return scores.softmax(-1).masked_fill(seen.view(B, 1, N, M) == 0, 0.0) @ v


def less_another_logarithm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return torch.exp(scores * 0.5 - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def of_no_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([q @ k.transpose(-1, -2), bias.expand(B, H, N, M)], dim=-1)


@pytest.mark.parametrize(
    "way",
    [
        looked_at,
        with_weights_changed,
        with_heads_mixed,
        over_queries,
        with_one_entry_set,
        with_other_weights_set_to_zero,
        less_another_logarithm,
    ],
)
def test_what_is_no_attention_is_computed_as_written(way, tiled_calls):
    expected, ours = step(way), step(reading, way)
    assert torch.equal(ours[0], expected[0])
    assert all(a is b or torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))


def test_scores_that_are_returned_are_computed(tiled_calls):
    assert torch.equal(reading(of_no_values, *inputs()), of_no_values(*inputs()))
    assert not tiled_calls


def test_weights_beside_the_output_are_not_computed(tiled_calls):
    def way(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v, weights, weights.mean(1)

    out, weights, mean = reading(way, *inputs()[:3])
    assert out.shape == (B, H, N, D)
    assert weights is None
    assert mean is None


class Named(NamedTuple):
    """What some classes return."""

    out: Tensor
    weights: Tensor | None


@pytest.mark.parametrize("refused", [None, Reason("REFUSED", "for the test")])
def test_what_a_class_returns_by_name_holds_no_products(tiled_calls, refused):
    def way(q: Tensor, k: Tensor, v: Tensor) -> Named:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return Named(weights @ v, weights)

    q, k, v, _ = inputs()
    expected = way(q, k, v)
    with Reading(Settings(on_fallback=lambda _: None), refused):
        out = way(q, k, v)
    named = released(out, weights=refused is not None)
    torch.testing.assert_close(named.out, expected.out)
    if refused is None:
        assert named.weights is None
    else:
        torch.testing.assert_close(named.weights, expected.weights)


def test_a_compact_mask_that_is_added_hides_its_keys(tiled_calls):
    visible = torch.ones(B, M, dtype=torch.bool)
    visible[1, -4:] = False
    compact = pack(key_mask(visible))

    def way(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v

    q, k, v, _ = inputs()
    expected = way(q, k, v, hidden_keys())
    torch.testing.assert_close(reading(way, q, k, v, compact), expected)
    assert tiled_calls[0].bias is None
    refused = reading(way, q, k, v, compact, refused=Reason("REFUSED", "for the test"))
    torch.testing.assert_close(refused, expected)


def test_a_change_in_place_is_a_change_of_what_is_read(tiled_calls):
    def way(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        same = scores
        scores.mul_(0.5).add_(bias)
        return same.softmax(-1) @ v

    expected = step(way)
    torch.testing.assert_close(step(reading, way), expected)
    assert len(tiled_calls) == 1


def test_dropout_is_drawn_by_the_engine_and_follows_the_seed(tiled_calls):
    def way(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        weights = functional.dropout((q @ k.transpose(-1, -2)).softmax(-1), p=0.5, training=True)
        return weights @ v

    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(reading(way, *inputs()))
    assert tiled_calls[0].dropout == 0.5
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_a_softcap_is_read_again_when_it_changes(tiled_calls):
    softcap = torch.tensor(2.0)

    def way(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (torch.tanh(q @ k.transpose(-1, -2) / softcap) * softcap).softmax(-1) @ v

    reading(way, *inputs())
    softcap.fill_(3.0)
    reading(way, *inputs())
    assert [options.softcap for options in tiled_calls] == [2.0, 3.0]


def test_a_buffer_that_says_what_hides_a_key_is_read_again_when_it_changes(tiled_calls):
    """Its first number was kept: weights loaded later, in place, were not noticed."""
    module = nn.Module()
    module.register_buffer("least", torch.tensor(LEAST))
    first = torch.ones(N, M, dtype=torch.bool).tril(1)

    def way(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.where(first, q @ k.transpose(-1, -2), module.least).softmax(-1) @ v

    know_buffers(module)
    reading(way, *inputs())
    assert len(tiled_calls) == 1
    module.least.fill_(0.5)
    know_buffers(module)
    assert torch.equal(reading(way, *inputs()), way(*inputs()))
    assert len(tiled_calls) == 1


def test_pytorchs_own_module_is_served(tiled_calls):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    x = numbers(B, N, 24)
    hidden = torch.zeros(B, N, dtype=torch.bool)
    hidden[1, -3:] = True
    expected = module(x, x, x, key_padding_mask=hidden)[0]
    out, weights = reading(lambda: module(x, x, x, key_padding_mask=hidden))
    assert len(tiled_calls) == 1
    assert weights is None
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("halves", ["", "k", "kv", "v"])
def test_products_under_autocast_have_its_dtype(halves, tiled_calls):
    """Also those of a sum with a parameter, which is in float32, and what a layer has made."""
    given = dict(zip("qkv", inputs(), strict=False))
    q, k, v = (x.bfloat16() if name in halves else x for name, x in given.items())
    bias = inputs()[3]
    with torch.autocast("cpu", torch.bfloat16):
        expected = plainly(q, k, v, bias)
        out = reading(plainly, q, k, v, bias)
    assert len(tiled_calls) == 1
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_it_compiles_without_a_graph_break(tiled_calls):
    q, k, v, bias = inputs()
    expected = with_heads_in_the_batch(q, k, v, bias)

    settings = Settings()

    def way(*given: Tensor) -> Any:
        with Reading(settings):
            out = with_heads_in_the_batch(*given)
        return released(out, weights=False)

    compiled = torch.compile(way, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, bias), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("coarse", "fine", "expected"),
    [
        ((6,), (2, 3), [2]),
        ((6,), (1, 6), [2]),
        ((2, 3), (2, 1, 3), [2, 1]),
        ((1, 6), (1, 2, 3), [1, 2]),
        ((4, 6), (2, 2, 6), [2, 1]),
        ((1,), (1, 1, 1), [3]),
        ((1, 1), (1, 1), [1, 1]),
        ((2, 3), (3, 2), None),
        ((6,), (6, 2), None),
        ((2, 3), (6,), None),
    ],
)
def test_sizes_are_split_as_views_split_them(coarse, fine, expected):
    assert groups(coarse, fine) == expected
    if expected is not None:
        x = torch.arange(math.prod(coarse) * 5).view(*coarse, 5)
        assert torch.equal(spread(x, coarse=coarse, fine=fine), x.view(*fine, 5))


# Positions in two axes: a bias of heights and one of widths, each from the queries.

HEIGHT, WIDTH = 3, 3
HEIGHTS, WIDTHS = (numbers(7, size, D, seed=seed).detach() for size, seed in ((3, 6), (3, 7)))


def of_heights_and_widths(q: Tensor) -> tuple[Tensor, Tensor]:
    """[B * H, N, 1, HEIGHT, 1] and [B * H, N, 1, 1, WIDTH], for queries in one column."""
    column = q.reshape(B * H, N, 1, D)
    rel_h = torch.einsum("bhwc,hkc->bhwk", column, HEIGHTS)
    rel_w = torch.einsum("bhwc,hkc->bhwk", column, WIDTHS)
    return rel_h[..., None], rel_w[..., None, :]


def with_a_bias_in_the_shape_of_the_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    scores = (q * 0.3) @ k.transpose(-2, -1)
    rel_h, rel_w = of_heights_and_widths(q)
    scores = scores + (rel_h + rel_w).reshape_as(scores)
    return (scores.softmax(dim=-1) @ v).view(B, H, N, D)


def with_scores_split_and_joined(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    scores = (q * 0.3) @ k.transpose(-2, -1)
    rel_h, rel_w = of_heights_and_widths(q)
    scores = scores.view(B * H, N, 1, HEIGHT, WIDTH) + rel_h + rel_w
    return (scores.view(B * H, N, M).softmax(dim=-1) @ v).view(B, H, N, D)


def with_a_row_of_keys_hidden(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    hidden = torch.arange(HEIGHT)[:, None] == 1
    scores = (q @ k.transpose(-2, -1)).view(B, H, N, HEIGHT, WIDTH)
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.view(B, H, N, M).softmax(dim=-1) @ v


def with_a_mask_expanded_to_the_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    hidden = (torch.arange(M) > M - 3).expand_as(scores)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


@pytest.mark.parametrize(
    "way",
    [
        with_a_bias_in_the_shape_of_the_scores,
        with_scores_split_and_joined,
        with_a_row_of_keys_hidden,
        with_a_mask_expanded_to_the_scores,
    ],
)
def test_scores_are_followed_where_their_shape_is_used_or_split(way, tiled_calls):
    expected = step(way)
    ours = step(reading, way)
    assert len(tiled_calls) == 1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def over_widths(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).view(B, H, N, HEIGHT, WIDTH)
    return scores.softmax(dim=-1).view(B, H, N, M) @ v


def test_a_softmax_over_widths_alone_is_no_attention(tiled_calls):
    def way(*given: Tensor) -> Any:
        with Reading(Settings()):
            out = over_widths(*given)
        return released(out, weights=True)

    expected, ours = step(over_widths), step(way)
    assert not tiled_calls
    torch.testing.assert_close(ours, expected)


def test_an_einsum_may_be_given_its_tensors_in_a_list(tiled_calls):
    def way(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.einsum("bhlk,bhtk->bhlt", [q, k])
        return torch.einsum("bhlt,bhtv->bhlv", [scores.softmax(-1), v])

    expected = step(way)
    ours = step(reading, way)
    assert len(tiled_calls) == 1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_what_only_a_tensor_knows_of_scores_can_be_asked_while_they_are_read(tiled_calls):
    q, k, _, _ = inputs()
    with Reading(Settings()):
        # the scores were computed within the reading, which made a product of them, without end
        assert (q @ k.transpose(-1, -2)).requires_grad
