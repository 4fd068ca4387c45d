"""A user's function of scores: what is checked of it, and what PyTorch makes of a call with one.

The functions here are none of Triton's, and an engine that multiplies scores stands in for Triton.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flashpatch_kernels import Score, attention, engines, op, schema, tiled
from flashpatch_kernels.options import Options

TAKEN = ["s", "i", "j", "batch", "head", "arguments"]


def function(*taken):
    """What has the attributes by which a function of Triton's is known."""
    return SimpleNamespace(fn=function, arg_names=[*taken])


MULTIPLY, DERIVATIVE = function(*TAKEN), function(*TAKEN, "ds")


def tensors():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 20, 16, generator=generator).requires_grad_() for _ in range(3))


class Multiplying:
    """An engine whose scores are multiplied by the score's argument, one of each head."""

    @staticmethod
    def plain(q, options):
        score = options.score
        assert score.function is MULTIPLY
        assert score.derivative is DERIVATIVE
        factor = score.arguments[0][:, None, None]
        return q * factor, replace(options, score=None), factor

    @staticmethod
    def forward(q, k, v, options):
        q, options, _ = Multiplying.plain(q, options)
        return tiled.forward(q, k, v, options)

    @staticmethod
    def backward(dout, dlse, q, k, v, out, lse, options, needs):
        q, options, factor = Multiplying.plain(q, options)
        grads = tiled.backward(dout, dlse, q, k, v, out, lse, options, needs)
        return {name: x * factor if name == "q" else x for name, x in grads.items()}


@pytest.fixture
def multiplying(monkeypatch):
    """A call with a score that `Multiplying` serves on a CPU, and one without that is the same."""
    monkeypatch.setattr(op, "_module", lambda engine: Multiplying if engine == "triton" else tiled)
    monkeypatch.setattr(engines, "TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    factor = torch.tensor([0.5, 1.0, 2.0, 3.0])
    score = Score(MULTIPLY, DERIVATIVE, (factor,))

    def with_score(q, k, v):
        return attention(q, k, v, causal=True, score=score).square().sum()

    def without(q, k, v):
        q = q * factor[:, None, None]
        return attention(q, k, v, causal=True, engine="tiled").square().sum()

    return with_score, without


BAD = {
    "no function of Triton's": (
        "function of a score must be a triton.jit function, not 'tanh'",
        ("tanh",),
    ),
    "no derivative of Triton's": (
        "derivative of a score must be a triton.jit function, not 1",
        (MULTIPLY, 1),
    ),
    "too few arguments": (
        r"function of a score takes 6 arguments, not \(s, i\)",
        (function("s", "i"),),
    ),
    "derivative's arguments": (
        r"derivative of a score takes 7 arguments, not \(s, i, j, batch, head, arguments\)",
        (MULTIPLY, MULTIPLY),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_score_is_refused_when_it_is_made(name):
    message, arguments = BAD[name]
    with pytest.raises(TypeError, match=message):
        Score(*arguments)


@pytest.mark.parametrize("engine", ["sdpa", "reference"])
def test_engines_without_triton_refuse_a_score(engine):
    with pytest.raises(ValueError, match=f"engine '{engine}' cannot serve this call: .* Triton"):
        attention(*tensors(), score=Score(MULTIPLY), engine=engine)


def test_without_a_gradient_an_argument_may_be_a_parameter(multiplying):
    score = Score(MULTIPLY, DERIVATIVE, (torch.ones(4, requires_grad=True),))
    q, k, v = tensors()
    with torch.no_grad():
        out = attention(q, k, v, score=score)
        assert torch.equal(out, attention(q, k, v, engine="tiled"))


def test_functions_of_one_name_are_told_apart():
    """Both are called `function`, and operators know a score by a name."""
    first, second = function(*TAKEN), function(*TAKEN)
    scores = [Score(first), Score(second), Score(second, DERIVATIVE)]
    assert len({score.name for score in scores}) == 3
    assert Score(first).name == scores[0].name
    for score in scores:
        again = Score.named(score.name, ())
        assert again == score
        assert again.function is score.function


def test_the_operators_keep_the_rules_of_torch(multiplying):
    q, k, v = tensors()
    flat = schema.flat(Options(score=Score(MULTIPLY, DERIVATIVE, (torch.rand(4),))))
    torch.library.opcheck(torch.ops.flashpatch.forward.default, (q, k, v, "triton", *flat))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.flashpatch.forward.default(q, k, v, "triton", *flat)
    torch.library.opcheck(
        torch.ops.flashpatch.backward.default,
        (out, lse, q, k, v, out, lse, "triton", ["q", "v"], *flat),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_its_gradients_compiled_or_not(multiplying, compiled):
    with_score, without = multiplying
    inputs = tensors()
    expected = torch.autograd.grad(without(*inputs), inputs)
    if compiled:
        torch._dynamo.reset()
        with_score = torch.compile(with_score, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(with_score(*inputs), inputs)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true)


def test_a_score_is_made_outside_of_what_is_compiled(multiplying):
    """The operators must find its functions while a graph with its name is traced."""

    def call(q, k, v, factor):
        return attention(q, k, v, score=Score(MULTIPLY, DERIVATIVE, (factor,)))

    inputs = (*(x.detach() for x in tensors()), torch.rand(4))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot make a Score"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="aot_eager")(*inputs), call(*inputs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_it(multiplying, reentrant):
    with_score, _ = multiplying
    inputs = tensors()
    plain = torch.autograd.grad(with_score(*inputs), inputs)
    torch.utils.checkpoint.checkpoint(with_score, *inputs, use_reentrant=reentrant).backward()
    for x, true in zip(inputs, plain, strict=True):
        assert torch.equal(x.grad, true)
