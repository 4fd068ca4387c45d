"""Every model type of transformers as a tiny random model: served, or left with a reason.

Forward and all gradients, plain and padded, and greedy generation, against the model's own eager
attention, with every call on the tiled engine; undone afterwards, bit by bit.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from matrix import models
from matrix.rows.older import is_older
from matrix.table import FILES, NEWEST, ROWS
from transformers import CONFIG_MAPPING

import flashpatch
from flashpatch.patches.left import LEFT
from flashpatch_kernels.engines import TILED

pytestmark = pytest.mark.usefixtures("one_thread")

# Relative to the largest number of a tensor.
OUTPUTS, GRADIENTS = 2e-5, 1e-4

# Types whose own attention raises, before anything is patched, when it is asked for its weights.
RAISE_WHEN_ASKED = {"llama4_vision_model": IndexError, "maskformer-swin": TypeError}
# Types that say they have checkpoints, and whose own training with them raises.
RAISE_WITH_CHECKPOINTS = {
    "diffusion_gemma_text": ValueError,
    "gemma3n_audio": ValueError,
    "gemma4_audio": ValueError,
    "git": RuntimeError,
    "idefics2_perceiver": ValueError,
    "molmo2": ValueError,
    "molmo2_adapter": ValueError,
    "pi0": AttributeError,
    "qwen2_5_omni_dit": ValueError,
    "qwen2_5_omni_token2wav": ValueError,
    "sam3_lite_text_detr_decoder": ValueError,
    "sam3_lite_text_detr_encoder": ValueError,
    "sam3_lite_text_mask_decoder": ValueError,
}


@pytest.mark.skipif(is_older(transformers.__version__), reason="rows are of newer types too")
def test_every_row_is_of_a_model_type():
    assert set(ROWS) <= set(CONFIG_MAPPING)


def test_no_file_of_rows_has_what_another_has():
    assert len(NEWEST) == sum(len(file.ROWS) for file in FILES)


@pytest.mark.filterwarnings("ignore::UserWarning")  # models warn of much, once a process
@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING))
def test_a_model_computes_the_same_and_is_restored(model_type):
    row = models.row_or_skip(model_type)
    model = models.build(model_type, row)
    calls = models.all_calls(model, row)
    expected = [models.step(model, call) for call in calls]
    texts = models.generated(model, calls[0]) if row.generates else None
    reasons: list[Any] = []
    report = flashpatch.apply(model, on_fallback=reasons.append)
    with models.counted(model, TILED) as served:
        ours = [models.step(model, call) for call in calls]
        assert texts is None or torch.equal(models.generated(model, calls[0]), texts)
    assert not reasons
    assert set(served.engines) == {TILED.name}
    left = {*row.left, *(name.rpartition(".")[2] for name in LEFT)}
    attending = {r.class_name for r in report.rows}
    assert attending
    assert attending - left == set(served.classes)
    flashpatch.revert(model)
    again = models.step(model, calls[0])
    assert all(torch.equal(x, expected[0].outputs[name]) for name, x in again.outputs.items())
    for call, one, other in zip(calls, ours, expected, strict=True):
        assert_close(model, call, one, other)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING))
def test_attention_weights_that_are_asked_for_are_the_models_own(model_type):
    row = models.row_or_skip(model_type)
    if row.reference != "eager":  # a fact of the row: there is nothing to compare ours with
        pytest.skip("only eager attention has weights")
    model = models.build(model_type, row)
    call = models.calls_of(model, row)[0]
    asking = replace(call, arguments={**call.arguments, "output_attentions": True})
    if call.method != "forward":  # a fact of the row: no model is there to be asked
        pytest.skip("its parts are called one by one")
    with torch.no_grad():
        if model_type in RAISE_WHEN_ASKED:
            with pytest.raises(RAISE_WHEN_ASKED[model_type]):
                asking.run(model)
            return
        expected = dict(models.tensors_of(asking.run(model), weights=True))
        flashpatch.apply(model)
        ours = dict(models.tensors_of(asking.run(model), weights=True))
    assert expected.keys() <= ours.keys()
    assert all(models.distance(ours[name], x, 1e-3) < OUTPUTS for name, x in expected.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING))
def test_checkpoints_give_the_same_gradients(model_type):
    row = models.row_or_skip(model_type)
    model = models.build(model_type, row)
    call = models.calls_of(model, row)[0]
    if not getattr(model, "supports_gradient_checkpointing", False):  # transformers' own word
        pytest.skip("it has no checkpoints")
    models.without_dropout(model.train())
    if model_type in RAISE_WITH_CHECKPOINTS:
        with pytest.raises(RAISE_WITH_CHECKPOINTS[model_type]):
            checkpointed(model, call)
        return
    expected = checkpointed(model, call)
    reasons: list[Any] = []
    flashpatch.apply(model, on_fallback=reasons.append)
    with models.counted(model, TILED) as served:
        ours = models.step(model, call)
    assert served.engines
    assert not reasons
    flashpatch.revert(model)
    assert_close(model, call, ours, expected)


def checkpointed(model: Any, call: models.Call) -> models.Step:
    """A step of the model with checkpoints, which it keeps."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return models.step(model, call)


def assert_close(model: Any, call: models.Call, ours: models.Step, eager: models.Step) -> None:
    """Within a rounding of eager attention, or as exact."""
    distances = models.largest_distances(ours, eager)
    if distances[0] >= OUTPUTS or distances[1] >= GRADIENTS:
        assert_as_exact_as_eager(model, call, ours, eager)


def assert_as_exact_as_eager(
    model: Any, call: models.Call, ours: models.Step, eager: models.Step
) -> None:
    """Of a model that enlarges rounding: at most twice the error that eager attention makes."""
    exact = models.step(model.double(), models.converted(call, torch.float64))
    model.float()
    pairs = zip(
        models.largest_distances(ours, exact), models.largest_distances(eager, exact), strict=True
    )
    for error, theirs in pairs:
        assert error <= 2 * theirs + 8 * torch.finfo(torch.float32).eps
