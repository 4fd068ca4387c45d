"""The demo: its text, its measuring, its verdicts, and all of it at toy size."""

import json
import subprocess
import sys
from dataclasses import replace

import matplotlib.image
import pytest
import torch
from rich.console import Console

from flashpatch.demo import embeddings, measure, run, t5, text, training

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not reset the peak")


def test_passages_are_distinct_sentences_of_many_lengths():
    found = text.passages(48)
    assert len(set(found)) == 48
    assert all(passage[0].isupper() and passage[-1] in ".!?" for passage in found)
    lengths = sorted(len(passage.split()) for passage in found)
    assert lengths[0] < 6
    assert lengths[-1] > 150
    assert found == text.passages(48)


def test_stream_is_the_start_of_the_sources():
    assert len(text.stream(300_000)) == 300_000
    assert text.stream(300_000).startswith(text.stream(1000))


# In a process of its own, where no block of memory is one that was freed before.
STEP = """
import torch
from flashpatch.demo import measure
ones = lambda mebibytes: torch.ones(mebibytes * 2**18).sum().item()
ones({earlier})
result, seconds, peak = measure.measured(lambda: ones(64), torch.device("cpu"))
assert result == 64 * 2**18
assert seconds > 0
print(peak)
"""


def peak_after(earlier):
    """What a step of 64 MiB is charged with, after one that took `earlier`."""
    command = [sys.executable, "-W", "ignore", "-c", STEP.format(earlier=earlier)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_step_is_charged_with_its_own_peak():
    assert 60 * MIB < peak_after(1) < 100 * MIB


@LINUX
def test_an_earlier_peak_is_forgotten():
    assert 60 * MIB < peak_after(256) < 100 * MIB


@LINUX
def test_a_fresh_process_does_not_inherit_the_peak_of_its_parent():
    ballast = torch.ones(1024 * MIB // 4)
    peak = measure.in_fresh_process(measure._resident_bytes, "VmHWM")
    assert peak < ballast.nbytes
    assert measure._resident_bytes("VmHWM") > ballast.nbytes


EMBEDDINGS = embeddings.Embeddings(
    passages=2,
    shortest=3,
    longest=9,
    padding=0.3,
    difference=1e-7,
    neighbours=2,
    restored=True,
    served=6,
    report="a report",
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"difference": 2e-5}, "differ by 2.0e-05"),
        ({"difference": float("nan")}, "differ by nan"),
        ({"restored": False}, "not bit-identical"),
        ({"served": 0}, "serves none"),
    ],
)
def test_embeddings_fail_for_one_reason_each(change, words):
    failures = replace(EMBEDDINGS, **change).failures()
    assert len(failures) == (words is not None)
    assert all(words in failure for failure in failures)


def step(attention, peak_bytes):
    return t5.Step(attention, 1.0, peak_bytes, 5.0, {}, "")


@pytest.mark.parametrize(
    ("peak_bytes", "error", "words"),
    [
        (10, 1e-6, None),
        (10, 2e-4, None),
        (10, 3e-4, "bias gradient is off by 3.0e-04"),
        (10, float("nan"), "bias gradient is off by nan"),
        (100, 1e-6, "does not need less memory"),
    ],
)
def test_t5_fails_for_one_reason_each(peak_bytes, error, words):
    steps = [step("eager", 100), step("flashpatch", peak_bytes)]
    failures = t5.T5(t5.Setting("cpu", 64, 64), steps, [1e-4, error]).failures()
    assert len(failures) == (words is not None)
    assert all(words in failure for failure in failures)


TRAINING = training.Training(
    parameters=10,
    batch=2,
    context=8,
    stock=[5.0, 4.0, 3.0],
    patched=[5.0, 4.0, 3.0],
    unseen=(3.5, 3.5),
    served=4,
    report="a report",
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"unseen": (3.5, 3.6)}, "differ by 1.0e-01"),
        ({"unseen": (3.5, float("nan"))}, "differ by nan"),
        ({"patched": [5.0, 4.001, 3.0]}, "part within the first 20 steps"),
        ({"stock": [5.0, 5.5, 6.0], "patched": [5.0, 5.5, 6.0]}, "did not learn"),
        ({"served": 0}, "serves none"),
    ],
)
def test_training_fails_for_one_reason_each(change, words):
    failures = replace(TRAINING, **change).failures()
    assert len(failures) == (words is not None)
    assert all(words in failure for failure in failures)


def test_picture_shows_both_curves(tmp_path):
    training.draw(TRAINING, tmp_path / "loss.png")
    pixels = matplotlib.image.imread(tmp_path / "loss.png")[..., :3]
    assert pixels.shape == (825, 1200, 3)
    for colour in (training.STOCK_COLOUR, training.PATCHED_COLOUR):
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        near = (torch.from_numpy(pixels) - wanted).abs().amax(dim=-1) < 0.01
        assert near.sum() > 500


def test_the_whole_demo_runs_and_saves_its_numbers(tmp_path):
    with (tmp_path / "screen").open("w") as screen:
        failures = run.run(tmp_path, "cpu", quick=True, console=Console(file=screen, width=100))
    assert failures == []
    shown = (tmp_path / "screen").read_text()
    assert shown.count("flashpatch serves") == 3
    assert "All as it should be" in shown
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["embeddings"]["difference"] < embeddings.TOLERANCE
    assert record["t5"]["steps"][0]["attention"] == "eager"
    assert len(record["training"]["stock"]) == len(record["training"]["patched"])
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no device 'abacus' here"):
        run.run(tmp_path / "out", "abacus")
    assert not (tmp_path / "out").exists()
