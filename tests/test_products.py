"""Attention that is read while a class computes it, operation by operation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashpatch import dispatch
from flashpatch.dispatch import Settings
from flashpatch.products import Product, Reading, released


def draw(*shape: int) -> Tensor:
    seed = sum(size * 31**place for place, size in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Positions in two axes: height and width of the queries and of the keys

B, QH, QW, KH, KW, D = 4, 2, 3, 3, 2, 8
N, M = QH * QW, KH * KW


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engines of the calls that were served."""
    engines: list[str] = []
    run = dispatch.run

    def noted(*args: object) -> object:
        engines.append(str(args[-1]))
        return run(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(dispatch, "run", noted)
    return engines


def refuse(reason: object) -> None:
    raise AssertionError(reason)


def compare(attention: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Output and gradients, read and not."""
    ours = [x.clone().requires_grad_() for x in tensors]
    theirs = [x.clone().requires_grad_() for x in tensors]
    with Reading(Settings(on_fallback=refuse)):
        out = released(attention(*ours), weights=True)
    expected = attention(*theirs)
    torch.testing.assert_close(out, expected)
    weights = draw(*expected.shape)
    out.backward(weights)
    expected.backward(weights)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def inputs() -> tuple[Tensor, ...]:
    return draw(B, N, D), draw(B, M, D), draw(B, M, D + 1), draw(QH, KH, D), draw(QW, KW, D)


def heights_and_widths(q: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    q = q.reshape(B, QH, QW, D)
    rel_h = torch.einsum("bhwc,hkc->bhwk", q, rows)
    rel_w = torch.einsum("bhwc,wkc->bhwk", q, columns)
    return rel_h[..., None], rel_w[..., None, :]


def test_a_bias_may_take_the_shape_of_the_scores(served: list[str]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
        rel_h, rel_w = heights_and_widths(q, rows, columns)
        scores = scores + (rel_h + rel_w).reshape_as(scores)
        return scores.softmax(dim=-1) @ v

    compare(attention, *inputs())
    assert len(served) == 1


def test_scores_may_be_split_into_heights_and_widths_and_joined_again(served: list[str]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
        rel_h, rel_w = heights_and_widths(q, rows, columns)
        scores = (scores.view(B, QH, QW, KH, KW) + rel_h + rel_w).view(B, N, M)
        return scores.softmax(dim=-1) @ v

    compare(attention, *inputs())
    assert len(served) == 1


def test_a_mask_of_heights_hides_whole_rows_of_keys(served: list[str]) -> None:
    visible = torch.ones(QH, 1, KH, 1, dtype=torch.bool).tril()
    visible[:, 0, 1] = False

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).view(2, 2, QH, QW, KH, KW)
        scores = scores.masked_fill(~visible, -torch.inf)
        return (scores.view(B, N, M).softmax(dim=-1)) @ v

    compare(attention, *inputs()[:3])
    assert len(served) == 1


def test_a_softmax_over_widths_alone_is_no_attention(served: list[str]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).view(B, N, KH, KW)
        return scores.softmax(dim=-1).view(B, N, M) @ v

    compare(attention, *inputs()[:3])
    assert not served


def test_a_mask_may_be_expanded_to_the_scores(served: list[str]) -> None:
    hidden = torch.arange(M) > M - 3

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        scores = scores.masked_fill(hidden.expand_as(scores), -torch.inf)
        return scores.softmax(dim=-1) @ v

    compare(attention, *inputs()[:3])
    assert len(served) == 1


def test_the_shape_of_scores_is_known_before_they_are_computed() -> None:
    q, k = inputs()[:2]
    with Reading(Settings()):
        scores = q @ k.transpose(-2, -1)
        assert isinstance(scores, Product)
        assert scores.view(B, QH, -1, KH, KW).shape == (B, QH, QW, KH, KW)
        assert scores.view(2, 2, N, KH, KW).shape == (2, 2, N, KH, KW)
        assert scores.computed is None


def test_what_only_a_tensor_knows_of_scores_can_be_asked_while_they_are_read() -> None:
    q, k = inputs()[:2]
    with Reading(Settings()):
        scores = q.requires_grad_() @ k.transpose(-2, -1)
        # it was computed within the reading, which made a product of it, without end
        assert scores.requires_grad
