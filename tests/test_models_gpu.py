"""Whole models on a GPU: the engine that is promised runs, and errs no more than PyTorch.

The oracle is the model in float64 with the engine `reference`: eager attention rounds its softmax
to float32, whatever the model is in, and gives NaN for rows that see nothing. The yardstick is the
unpatched model in the dtype under test. That patched models equal eager ones is tested on the CPU,
in `patches/test_families.py`.
"""

from collections import Counter
from copy import deepcopy

import pytest
import torch
import transformers

import flashpatch
from flashpatch import dispatch
from flashpatch_kernels.engines import Reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COMMON = {
    "vocab_size": 211,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "attention_dropout": 0.0,
}
# name -> (model class, config class, what differs from COMMON)
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2}),
    "llama-96": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"num_key_value_heads": 1, "head_dim": 96},
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {"num_key_value_heads": 2, "sliding_window": 100},
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 100},
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"n_head": 4, "n_layer": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 256,
            "d_kv": 64,
            "d_ff": 384,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 1,
        },
    ),
}
LENGTH = 333


def forbid(reason: Reason) -> None:
    raise AssertionError(f"fell back: {reason}")


def build(name: str) -> torch.nn.Module:
    model_class, config_class, differing = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**COMMON, **differing})
    return getattr(transformers, model_class)(config).cuda()


def batch(padding: str) -> dict[str, torch.Tensor]:
    tokens = torch.randint(5, 211, (2, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()
    if padding == "none":
        return {"input_ids": tokens, "labels": tokens}
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 70) if padding == "left" else slice(-70, None)] = 0
    # a query that sees no key is a matter of taste: its own prediction is left out of the loss
    labels = tokens.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss and all gradients, in float64."""
    model.zero_grad()
    loss = (
        model(**inputs, use_cache=False).loss
        if "Bert" not in type(model).__name__
        else (model(**inputs).loss)
    )
    loss.backward()
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.double(), **grads}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_errs_no_more_than_unpatched(name, dtype, padding, monkeypatch):
    engines = Counter()
    run = dispatch.run

    def counting(q, k, v, options, engine):
        if q.dtype == torch.float64:
            return run(q, k, v, options, "reference")
        engines.update([engine])
        return run(q, k, v, options, engine)

    monkeypatch.setattr(dispatch, "run", counting)
    exact, inputs = build(name), batch(padding)
    plain = deepcopy(exact).to(dtype)
    exact = exact.double()
    flashpatch.apply(exact, on_fallback=forbid)
    want, usual = step(exact, inputs), step(plain, inputs)
    flashpatch.apply(plain, on_fallback=forbid)
    got = step(plain, inputs)

    assert engines.total() > 0
    if dtype != torch.float32:
        assert set(engines) <= {"hopper", "triton"}
    floor = torch.finfo(dtype).eps
    for key, right in want.items():
        size = right.norm() + 1e-3 * want["loss"]
        error, yardstick = ((x[key] - right).norm() / size for x in (got, usual))
        assert error <= 2 * yardstick + 4 * floor, (key, error.item(), yardstick.item())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "t5", "gemma2"])
def test_generation_agrees_token_for_token(name, cache):
    model = build(name).eval()
    inputs = {k: v for k, v in batch("left").items() if k != "labels"}
    call = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    if name == "t5":
        call["decoder_start_token_id"] = 1
    want = model.generate(**inputs, **call)
    flashpatch.apply(model, on_fallback=forbid)
    got = model.generate(**inputs, cache_implementation=cache, disable_compile=True, **call)
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # of what torch.compile compiles
def test_a_patched_model_compiles_in_one_graph():
    model = build("llama").bfloat16()
    flashpatch.apply(model, on_fallback=forbid)
    want = model(**batch("left"), use_cache=False).loss
    compiled = torch.compile(model, fullgraph=True)
    got = compiled(**batch("left"), use_cache=False).loss
    got.backward()
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    assert all(p.grad is not None for p in model.parameters())


def test_a_forward_pass_can_be_captured_in_a_cuda_graph():
    model, inputs = build("llama").bfloat16().eval(), batch("left")
    del inputs["labels"]
    flashpatch.apply(model, on_fallback=forbid)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            want = model(**inputs, use_cache=False).logits
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(**inputs, use_cache=False).logits
        graph.replay()
    assert torch.equal(got, want)
