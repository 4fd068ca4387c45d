"""Every model type of transformers as a tiny random model: served, or left with a reason.

Forward and all gradients, plain and padded, and greedy generation, against the model's own eager
attention, with every call on the tiled engine; undone afterwards, bit by bit.
"""

from typing import Any

import pytest
import torch
from matrix import models
from matrix.row import Row
from matrix.table import ROWS
from transformers import CONFIG_MAPPING

import flashpatch
from flashpatch.architectures import attention_classes
from flashpatch.patches.left import LEFT

# Relative to the largest number of a tensor.
OUTPUTS, GRADIENTS = 2e-5, 1e-4


def test_every_row_is_of_a_model_type():
    assert set(ROWS) <= set(CONFIG_MAPPING)


# what WavLM itself makes PyTorch say of its padding
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING))
def test_a_model_computes_the_same_and_is_restored(model_type):
    if not attention_classes(model_type):
        pytest.skip("no attention")
    row = ROWS.get(model_type, Row())
    if row.needs:
        pytest.importorskip(row.needs)
    model = models.build(model_type, row)
    calls = models.calls_of(model, row)
    padded = (models.padded(model, calls[0], padding) for padding in row.paddings)
    calls += [call for call in padded if call is not None]
    expected = [models.step(model, call) for call in calls]
    texts = models.generated(model, calls[0]) if row.generates else None
    reasons: list[Any] = []
    report = flashpatch.apply(model, on_fallback=reasons.append)
    with models.tiled_and_counted(model) as served:
        ours = [models.step(model, call) for call in calls]
        assert texts is None or torch.equal(models.generated(model, calls[0]), texts)
    assert not reasons
    left = {name.rpartition(".")[2] for name in LEFT}
    attending = {r.class_name for r in report.rows}
    assert attending
    assert attending - left == set(served.classes)
    for one, other in zip(ours, expected, strict=True):
        outputs, gradients = models.largest_distances(one, other)
        assert outputs < OUTPUTS
        assert gradients < GRADIENTS
    flashpatch.revert(model)
    again = models.step(model, calls[0])
    assert all(torch.equal(x, expected[0].outputs[name]) for name, x in again.outputs.items())
