"""What models pass to the attention interface beside queries, keys, values and a mask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flashpatch.dispatch import Settings
from flashpatch.masks import expand, pack
from flashpatch.patches.interface import among, fpatch_attention, selected_keys
from flashpatch_kernels.masks import Intervals, allowed

# the oldest transformers has neither
inkling2 = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
minimax = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")

N, M = 5, 11
INDICES = torch.tensor([[0, 1], [3, 0], [2, 5], [4, 1], [7, 10]]).expand(2, -1, -1)


def bounds():
    """Each query sees what is before it, and not the first key."""
    end = torch.arange(M - N + 1, M + 1)
    return Intervals(torch.stack((torch.ones_like(end), end), dim=-1)[None].int())


def masks_of_all_kinds():
    seen = allowed(bounds(), N, M, torch.device("cpu"))
    return {
        "compact": pack(bounds()),
        "boolean": seen,
        "additive": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
    }, seen


def test_indices_are_the_keys_that_a_query_sees():
    selected = selected_keys(nn.Module(), 4, M, {"indices": INDICES.int()})
    assert selected.shape == (2, 1, N, M)
    assert all(
        selected[0, 0, i].nonzero().flatten().tolist() == sorted(INDICES[0, i].tolist())
        for i in range(N)
    )


@pytest.mark.parametrize("n_keys", [9, 11, 12])
def test_block_indices_are_what_the_model_itself_makes_of_them(n_keys):
    config: Any = SimpleNamespace(index_block_size=3, num_attention_heads=4)
    blocks = torch.tensor([[[0, -1], [1, 0], [3, 2]], [[2, -1], [0, 1], [1, 3]]])[None]
    blocks = blocks.clamp(max=-(-n_keys // 3) - 1)
    everything = torch.ones(1, 1, 3, n_keys, dtype=torch.bool)
    theirs = minimax.MiniMaxM3VLIndexer.build_block_mask(
        SimpleNamespace(block_size=3, config=config),
        blocks,
        everything,
        n_keys,
        torch.float32,
        torch.device("cpu"),
        None,
    )
    module = nn.Module()
    module.config = config
    assert torch.equal(selected_keys(module, 4, n_keys, {"block_indices": blocks}), theirs == 0)


@pytest.mark.parametrize("kind", ["compact", "boolean", "additive"])
def test_only_selected_keys_remain_of_a_mask(kind):
    made, seen = masks_of_all_kinds()
    selected = selected_keys(nn.Module(), 4, M, {"indices": INDICES})
    both = among(selected, made[kind], causal=False)
    visible = both == 0 if kind == "additive" else both
    assert torch.equal(visible, seen & selected)


@pytest.mark.parametrize("causal", [True, False])
def test_only_selected_keys_remain_where_there_is_no_mask(causal):
    selected = selected_keys(nn.Module(), 4, N, {"indices": INDICES[..., :1].clamp(max=N - 1)})
    all_seen = torch.ones(N, N, dtype=torch.bool)
    assert torch.equal(
        among(selected, None, causal), selected & (all_seen.tril() if causal else all_seen)
    )


@pytest.mark.parametrize("active", [True, False])
def test_an_engine_and_the_original_see_the_same_selected_keys(active):
    def forbid(reason: Any) -> None:
        raise AssertionError(reason)

    module = nn.Module()
    module._flashpatch = Settings(active=active, original="sdpa", on_fallback=forbid)
    made, _ = masks_of_all_kinds()
    q, k, v = torch.randn(2, 4, N, 8), torch.randn(2, 4, M, 8), torch.randn(2, 4, M, 8)
    # keys that the mask shows as well, so that no query is left with none
    indices = torch.stack((torch.arange(1, N + 1), torch.arange(2, N + 2)), dim=-1)
    indices = indices.expand(2, -1, -1)
    out, _ = fpatch_attention(module, q, k, v, made["compact"], indices=indices)
    mask = among(selected_keys(module, 4, M, {"indices": indices}), made["compact"], False)
    scores = q @ k.transpose(2, 3) * 8**-0.5 + expand(mask, N, M, q, causal=False, additive=True)
    torch.testing.assert_close(out.transpose(1, 2), scores.softmax(-1) @ v)


@pytest.mark.parametrize("shared", ["queries", "keys"])
def test_queries_or_keys_that_come_once_serve_a_whole_batch(shared):
    """Granite's q-former asks all sequences the same queries: the first alone was answered."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 3) if shared == "queries" else (3, 1)
    q = torch.randn(sizes[0], 2, N, 8, generator=generator)
    k, v = (torch.randn(sizes[1], 2, M, 8, generator=generator) for _ in range(2))
    module = nn.Module()
    module._flashpatch = Settings(on_fallback=lambda reason: pytest.fail(str(reason)))
    out, _ = fpatch_attention(module, q, k, v, None, is_causal=False)
    expected = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_query_may_have_a_sink_of_its_own():
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    given = draw(2, 4, N, 8), draw(2, 2, M, 8), draw(2, 2, M, 8), draw(2, 4, N, M), draw(2, 4, N, 1)
    module: Any = nn.Module()
    module.num_key_value_groups = 2
    reasons: list[Any] = []
    module._flashpatch = Settings(on_fallback=reasons.append)
    masks, _ = masks_of_all_kinds()

    def step(attention: Any, mask: torch.Tensor) -> list[torch.Tensor]:
        q, k, v, bias, sinks = given
        bias_and_sinks = {"position_bias": bias, "sinks": sinks}
        out, _ = attention(module, q, k, v, mask, scaling=0.3, **bias_and_sinks)
        return [out, *torch.autograd.grad((out * out.detach().sin()).sum(), given)]

    ours = step(fpatch_attention, masks["compact"])
    theirs = step(inkling2.eager_attention_forward, masks["additive"])
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert not reasons
