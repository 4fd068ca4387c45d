"""Dropout: how many weights are kept, which ones, and what that makes of the gradients.

The mask that an engine used is read off its output: with v the identity, what query i gets of key j
is its weight.
"""

import math

import pytest
import torch

from flashpatch_kernels import attention, dropout, tiled
from flashpatch_kernels.masks import Band
from flashpatch_kernels.op import run
from flashpatch_kernels.options import Options

SEED = torch.tensor([2**61 + 11])


def equal_weights(n, m, rate, engine):
    """The weights [2, 4, N, M] of queries that see all keys alike."""
    q, k = torch.zeros(2, 4, n, 8), torch.zeros(2, 4, m, 8)
    v = torch.eye(m).expand(2, 4, m, m)
    return run(q, k, v, Options(dropout=rate, seed=SEED), engine)[0]


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 7, -(2**62), 2**40 + 1])
def test_as_many_weights_are_kept_as_a_fair_draw_keeps(rate, seed):
    """Within Bernstein's bound, which a binomial count leaves once in a million times."""
    kept = dropout.keep(torch.tensor([seed]), rate, 2, 4, 128, 256).double()
    share = dropout.keep_probability(rate)
    for dims in ((0, 1, 2, 3), (2, 3), (3,), (2,)):
        counts = kept.sum(dims)
        n = kept.numel() / counts.numel()
        tail = math.log(2 * counts.numel() / 1e-6)
        bound = (2 * n * share * (1 - share) * tail) ** 0.5 + 2 / 3 * tail
        assert (counts - n * share).abs().max() < bound, dims


@pytest.mark.parametrize("engine", ["tiled", "reference"])
def test_what_is_kept_is_scaled_and_the_rest_is_nothing(engine):
    weights = equal_weights(37, 45, 0.3, engine)
    kept = dropout.keep(SEED, 0.3, 2, 4, 37, 45)
    expected = kept / (45 * dropout.keep_probability(0.3))
    torch.testing.assert_close(weights, expected)


def test_the_mask_is_the_same_in_tiles_of_any_size(monkeypatch):
    masks = []
    for size in ((5, 4, 20), (16, 12, 2 * 16 * 12), (64, 64, 40000)):
        monkeypatch.setattr(tiled, "CPU_TILE", tiled.TileSize(*size))
        masks.append(equal_weights(37, 45, 0.5, "tiled") > 0)
    assert torch.equal(masks[0], dropout.keep(SEED, 0.5, 2, 4, 37, 45))
    assert torch.equal(masks[1], masks[0])
    assert torch.equal(masks[2], masks[0])


@pytest.mark.parametrize("size", [(5, 4, 20), (64, 64, 40000)])
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_gradients_are_those_of_an_explicit_mask(sample, rate, size, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", tiled.TileSize(*size))
    one = sample("full", n=40, m=40, dtype=torch.float64, dropout=rate)
    inputs = (one.q, one.k, one.v)
    options = Options(mask=Band(right=0), scale=0.7, dropout=rate, seed=SEED)
    out, _ = run(*inputs, options, "tiled")

    scores = (one.q @ one.k.mT * 0.7).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    kept = dropout.keep(SEED, rate, 2, 4, 40, 40)
    explicit = (scores.softmax(-1) * kept / dropout.keep_probability(rate)) @ one.v
    torch.testing.assert_close(out, explicit)
    found = torch.autograd.grad(out, inputs, one.dout)
    expected = torch.autograd.grad(explicit, inputs, one.dout)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true)


def test_a_manual_seed_gives_the_same_mask_in_output_and_gradients(sample):
    one = sample("full")
    answers = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        out = attention(one.q, one.k, one.v, dropout=0.5, engine="tiled")
        answers.append((out, *torch.autograd.grad(out, (one.q, one.k, one.v), one.dout)))
    for first, second, other in zip(*answers, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
