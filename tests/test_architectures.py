"""What is told of the architectures of the installed transformers."""

from pathlib import Path

import pytest
import transformers
from matrix import models
from matrix.table import ROWS

import flashpatch
from flashpatch import architectures
from flashpatch.architectures import ROUTES, as_markdown, attention_classes, coverage
from flashpatch.registry import registered

# One process reads the source of all models.
pytestmark = pytest.mark.xdist_group("architectures")


def names(model_type: str) -> set[str]:
    return {cls.__name__ for cls in attention_classes(model_type)}


@pytest.mark.parametrize(
    ("model_type", "classes"),
    [
        ("llama", {"LlamaAttention"}),
        ("t5", {"T5Attention"}),
        ("rembert", {"RemBertSelfAttention"}),
        ("resnet", set()),
        ("mamba", set()),
    ],
)
def test_the_classes_of_a_type_are_found_in_its_source(model_type, classes):
    assert names(model_type) == classes


def test_the_classes_of_the_models_within_a_model_are_its_own():
    assert {"LlamaAttention", "CLIPAttention"} <= names("llava")


def test_attention_of_pytorch_itself_is_found():
    assert "MultiheadAttention" in names("siglip")


def test_a_type_is_described_by_what_its_classes_name():
    (gemma2,) = (a for a in coverage() if a.model_type == "gemma2")
    assert gemma2.route == "interface"
    assert {"window", "softcap", "grouped heads"} <= set(gemma2.needs)
    assert "flash_attention_2" in gemma2.alternatives


def test_every_type_is_told_of_and_what_is_left_has_its_reason():
    found = coverage()
    assert [a.model_type for a in found] == sorted(transformers.CONFIG_MAPPING)
    assert {a.route for a in found} <= set(ROUTES)
    for a in found:
        for cls in a.attention:
            assert bool(cls.reason) == (cls.route == "left"), a.model_type


def test_a_class_that_nobody_has_named_is_told_as_left(monkeypatch):
    monkeypatch.setattr(architectures, "patch_of", lambda cls: None)
    described = architectures._described(next(iter(attention_classes("llama"))))
    assert (described.route, described.reason) == ("left", "no patch for this class")


def test_a_report_gives_the_reason_that_the_list_gives():
    """It said that there was no patch, of a class that is left on purpose."""
    report = flashpatch.apply(models.build("reformer", ROWS["reformer"]))
    (hashed,) = (reason for reason in report.reasons if reason.name == "HASHED")
    (reformer,) = (a for a in coverage() if a.model_type == "reformer")
    assert [c.reason for c in reformer.attention if c.reason] == [hashed.text]


def test_the_document_has_a_row_for_each_type_with_attention():
    some = [a for a in coverage() if a.model_type in ("llama", "resnet", "bert")]
    text = as_markdown(some)
    assert "| llama | interface |" in text
    assert "| resnet |" not in text
    assert "- 1 without attention" in text


def test_the_committed_document_is_that_of_the_tested_transformers():
    text = (Path(__file__).parent.parent / "ARCHITECTURES.md").read_text("utf-8")
    if f"transformers {transformers.__version__}\n" not in text:
        pytest.skip("written with another transformers")
    assert text == as_markdown(coverage())


def test_every_class_that_is_named_for_the_installed_transformers_exists():
    """A class that has gone is deleted, unless the oldest transformers still has it."""
    here = {
        f"{c.__module__}.{c.__qualname__}"
        for t in transformers.CONFIG_MAPPING
        for c in attention_classes(t)
    }
    gone = {p.owner for p in registered() if p.attends} - here
    assert gone <= ONLY_IN_OLDER


ONLY_IN_OLDER = {
    f"transformers.models.{name}"
    for name in (
        "dinov2.modeling_dinov2.Dinov2SelfAttention",
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersSelfAttention",
        "radio.modeling_radio.RadioSelfAttention",
        "rf_detr.modeling_rf_detr.RfDetrDinov2SelfAttention",
        "tipsv2.modeling_tipsv2.Tipsv2VisionSelfAttention",
    )
}
