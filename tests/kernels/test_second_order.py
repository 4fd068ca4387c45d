"""The gradients of `tiled` can be differentiated; other engines say that theirs cannot."""

from types import SimpleNamespace

import pytest
import torch

from flashpatch_kernels import attention, op, second_order
from flashpatch_kernels.masks import Band, Boolean, key_mask
from flashpatch_kernels.options import TERMS, Options, Relative

B, H, H_KV, N, M, D, DV = 2, 2, 1, 5, 6, 3, 2


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, N, D), (B, H_KV, M, D), (B, H_KV, M, DV))
    return tuple(
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    )


def every_term(**more):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return Options(
        mask=Band(right=0, offset=M - N),
        softcap=2.0,
        slopes=random(H),
        bias=random(1, H, N, M),
        sinks=random(H),
        relative_queries=Relative(random(H, 4, 2), -2, random(B, H, N, 2)),
        relative_keys=Relative(random(1, 3, 1), -1, random(B, H, M, 1)),
        relative_values=Relative(random(H, 5, DV), -3),
        **{
            name: random(*shape) if isinstance(shape, tuple) else shape
            for name, shape in more.items()
        },
    )


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "keys": {"mask": key_mask(torch.tensor([[True] * 4 + [False] * 2, [False] + [True] * 5]))},
    "boolean": {"mask": Boolean(torch.arange(B * N * M).view(B, 1, N, M) % 3 > 0)},
    "rows that see nothing": {"causal": True, "mask": torch.tensor([[False] * 3 + [True] * 3])},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(second_order, "ROWS", 2)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_gradients_are_those_of_finite_differences(mask):
    def attend(q, k, v):
        return attention(q, k, v, engine="tiled", **MASKS[mask])

    assert torch.autograd.gradgradcheck(attend, tensors())


@pytest.mark.parametrize("table", [{"table": (H, N + M - 1)}, {"table": (H, 4), "first": -2}])
def test_every_term_takes_part(table):
    options = every_term(**table)
    names = list(options.terms)
    assert names == list(TERMS)

    def attend(q, k, v, *more):
        changed = options.with_terms(dict(zip(names, more, strict=True)))
        return op.run(q, k, v, changed, "tiled")[0]

    inputs = (*tensors(), *options.terms.values())
    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


def test_the_lse_takes_part():
    def attend(q, k, v):
        return attention(q, k, v, engine="tiled", return_lse=True)

    assert torch.autograd.gradgradcheck(attend, tensors())


def test_a_penalty_on_the_gradient_trains_like_the_reference():
    grads = {}
    for engine in ("tiled", "reference"):
        q, k, v = tensors(torch.float32)
        out = attention(q, k, v, causal=True, engine=engine)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        (out.sum() + dq.square().sum()).backward()
        grads[engine] = [x.grad for x in (q, k, v)]
    for found, true in zip(grads["tiled"], grads["reference"], strict=True):
        torch.testing.assert_close(found, true)


def test_another_engine_refuses_and_names_this_one():
    with pytest.raises(NotImplementedError, match=r"'triton' has no second.*engine='tiled' has"):
        op._differentiate_twice(SimpleNamespace(engine="triton"), [])


def test_what_has_no_second_derivative_says_so():
    q, k, v = tensors()
    out = attention(q, k, v, engine="tiled", dropout=0.5)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="with dropout has no second derivative"):
        dq.sum().backward()
    out = attention(q, k, v, engine="tiled")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        torch.autograd.grad(dq.square().sum(), q, create_graph=True)
